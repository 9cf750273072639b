"""Same conditions for every test: one thread, fixed seeds, no network."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch

from tenfold_common.seed import seed_everything
from tenfold_common.testing import no_network

torch.set_num_threads(1)
hypothesis.settings.register_profile("house", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def _same_conditions() -> Iterator[None]:
    """Seed everything and refuse connections to other machines."""
    seed_everything(0)
    with no_network(allow_loopback=True):
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of real data, or skip the test."""
    root = Path(__file__).resolve().parents[3]
    folder = Path(os.environ.get("TENFOLD_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there; set TENFOLD_DATA")
    return folder


CLUES = ("warm", "lukewarm", "boiling", "freezing", "75", "hot")
TEMPLATE = (
    "{% for m in messages %}<bos> {{ m.role }}: {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def bigram_player(folder: Path, *, chat: bool = True) -> Path:
    """Write a real Llama that plays: its next token depends on the last one only.

    After a prompt it says `<answer>t</answer>`, likelier the farther to the right, or one of CLUES
    in tags, as one token each, and then ends. All its layers add zero to the embedding, which is
    one-hot, so that the head's rows are the table of log-probabilities.
    """
    from tenfold_common.tiny import tiny_llama, word_tokenizer

    answers = [f"<answer>{t}</answer>" for t in range(101)]
    clues = [f"<clue>{c}</clue>" for c in CLUES]
    tokenizer = word_tokenizer([*answers, *clues, "assistant:", "Reply:"])
    if chat:
        tokenizer.chat_template = TEMPLATE
    size = -(-len(tokenizer) // 8) * 8
    model = tiny_llama(
        len(tokenizer), hidden=size, heads=4, kv_heads=4, layers=1, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    table = torch.full((len(tokenizer), len(tokenizer)), -30.0)  # [from, to]
    start = [ids(w) for w in ("assistant:", "Reply:", tokenizer.unk_token)]
    for t, word in enumerate(answers):
        table[start, ids(word)] = t / 50.0 if t % 5 == 0 else -10.0
    for word in clues:
        table[start, ids(word)] = 3.0
    table[[ids(w) for w in (*answers, *clues)], tokenizer.eos_token_id] = 30.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.zero_()
        embedding[:, : len(tokenizer)] = torch.eye(len(tokenizer))
        head = model.get_output_embeddings().weight
        head.zero_()
        head[:, : len(tokenizer)] = table.T / size**0.5  # the last norm scales one-hot rows
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def player(tmp_path_factory) -> Path:
    """A model folder that plays both roles, with a chat template."""
    return bigram_player(tmp_path_factory.mktemp("players") / "player")


@pytest.fixture(scope="session")
def base_player(tmp_path_factory) -> Path:
    """The same without a chat template."""
    return bigram_player(tmp_path_factory.mktemp("players") / "base", chat=False)
