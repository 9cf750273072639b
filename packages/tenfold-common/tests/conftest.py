"""No network, no hub, repeatable examples."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest

from tenfold_common.testing import no_network

hypothesis.settings.register_profile("house", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def _offline():
    with no_network():
        yield


@pytest.fixture(scope="session")
def merging_tokenizer():
    """A byte-level BPE of plain letters that has learned "the", " hello" and the like."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["the quick brown fox jumps over the lazy dog. hello world, hello there! AB CD 12"]
    trainer = trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(corpus * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
        ),
    )
