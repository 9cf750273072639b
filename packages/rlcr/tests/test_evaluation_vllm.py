"""vLLM for real: an engine in this process, then a server on loopback, with one tiny model."""

import json
import os

import pytest

from rlcr.cli import main
from rlcr.evaluation import evaluate
from tenfold_common.lm import ServerModel, TransformersModel, VLLMModel
from tenfold_common.testing import letter_tokenizer, vllm_server
from tenfold_common.tiny import tiny_llama

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM and what it brings warn at import and at start
]

TEXTS = [
    {"id": f"t{i}", "prompt": f"{i} + {i} = ", "answer": f"{2 * i}", "verifier": "exact_match"}
    for i in range(5)
]
CHATS = [
    {**row, "id": f"c{i}", "prompt": [{"role": "user", "content": row["prompt"]}]}
    for i, row in enumerate(TEXTS)
]
NAMED = {"max_tokens": 16, "batch_size": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "tiny"
    tokenizer = letter_tokenizer()
    # Wide weights: the most likely token leads by far, whatever the order of the sums. With this
    # seed one forced reply is a confidence.
    tiny_llama(
        len(tokenizer), hidden=256, heads=4, initializer_range=0.2, max_position_embeddings=512,
        seed=1,
    ).save_pretrained(path)  # fmt: skip
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def local(folder, tmp_path_factory):
    """What transformers answers, by the kind of the prompts."""
    model = TransformersModel(folder, device="cpu", batch_size=4)
    out = tmp_path_factory.mktemp("local")
    return {
        name: evaluate(model, rows, out / f"{name}.jsonl", **NAMED).rows
        for name, rows in (("texts", TEXTS), ("chats", CHATS))
    }


@pytest.fixture(scope="module")
def engine(folder):
    pytest.importorskip("vllm")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    model = VLLMModel(folder, engine={"enforce_eager": True, "max_model_len": 512})
    yield model
    model.close()


@pytest.fixture(scope="module")
def server(folder):
    pytest.importorskip("vllm")
    log = folder.parent / "server.log"
    with vllm_server(folder, log=log, arguments=("--max-model-len", "512")) as address:
        yield address


KINDS = pytest.mark.parametrize(("kind", "rows"), [("texts", TEXTS), ("chats", CHATS)])


def test_the_comparison_is_not_idle(local):
    for rows in local.values():
        assert len({row["completion"] for row in rows}) == len(rows)
        assert any(row["answer_source"] == "forced" for row in rows)
    assert any(row["source"] == "forced" for rows in local.values() for row in rows)


@KINDS
def test_engine_equals_transformers(engine, local, tmp_path, kind, rows):
    found = evaluate(engine, rows, tmp_path / "p.jsonl", **NAMED)
    assert found.rows == local[kind]


def test_engine_samples_are_reproducible_and_resumed(engine, tmp_path):
    named = {**NAMED, "samples": 3, "temperature": 1.0, "seed": 5}
    first = evaluate(engine, TEXTS, tmp_path / "a.jsonl", **named)
    assert [row["id"] for row in first.rows[:3]] == ["t0#0", "t0#1", "t0#2"]
    assert len({row["completion"] for row in first.rows}) > 5
    evaluate(engine, TEXTS, tmp_path / "b.jsonl", **named)
    whole = (tmp_path / "a.jsonl").read_bytes()
    assert (tmp_path / "b.jsonl").read_bytes() == whole
    (tmp_path / "b.jsonl").write_bytes(whole[: len(whole) // 2])
    evaluate(engine, TEXTS, tmp_path / "b.jsonl", **named, resume=True)
    assert (tmp_path / "b.jsonl").read_bytes() == whole


@KINDS
def test_server_equals_transformers(server, local, tmp_path, kind, rows):
    found = evaluate(ServerModel(server), rows, tmp_path / "p.jsonl", **NAMED)
    assert found.rows == local[kind]


@pytest.mark.parametrize("model_name", [None, "tiny"])
def test_eval_command_asks_the_server(server, local, tmp_path, capsys, model_name):
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    out = tmp_path / "p.jsonl"
    command = ["-q", "eval", f"--model={server}", f"--data={data}", f"--out={out}"]
    command += [f"--model_name={model_name}"] if model_name else []
    assert main([*command, "--max_tokens=16", "--batch_size=3"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == local["texts"]
    assert "5 rows, 5 graded" in capsys.readouterr().out
