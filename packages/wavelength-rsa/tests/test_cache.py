"""What a model said once is not asked again, and never mistaken for something else."""

import sqlite3
import subprocess
import sys

import pytest
import torch

from tenfold_common.errors import UserError
from tenfold_common.lm import ScriptedModel, TextModel, TransformersModel
from tenfold_common.tiny import byte_tokenizer, tiny_llama
from wavelength_rsa.cache import CachedModel, fingerprint


def scripted(name="one"):
    return ScriptedModel(
        lambda prompt, seed, sample: f"{prompt}/{seed}/{sample}",
        score=lambda prefix, text: -float(len(str(prefix)) + len(text)),
        name=name,
    )


def tiny(seed=0):
    tokenizer = byte_tokenizer()
    model = tiny_llama(len(tokenizer), hidden=16, heads=2, kv_heads=2, layers=1, seed=seed)
    return TransformersModel(model, tokenizer)


def test_it_is_a_text_model(tmp_path):
    with CachedModel(scripted(), tmp_path / "c.db") as model:
        assert isinstance(model, TextModel)
        assert model.name == "one"
        assert model.tokenizer is None


def test_samples_are_kept_by_all_that_decides_them(tmp_path):
    prompts = ["a", "b", [{"role": "user", "content": "c"}]]
    inner = scripted()
    with CachedModel(inner, tmp_path / "c.db") as model:
        first = model.sample(prompts, n=2, seed=3)
        assert len(inner.calls) == 2  # two blocks
        assert model.sample(prompts, n=2, seed=3) == first
        assert len(inner.calls) == 2
        assert (model.hits, model.misses) == (3, 3)
        for change in (
            {"seed": 4}, {"n": 3}, {"temperature": 0.5}, {"top_p": 0.9}, {"max_tokens": 5},
            {"stop": ["x"]},
        ):  # fmt: skip
            before = len(inner.calls)
            model.sample(prompts, **{"n": 2, "seed": 3, **change})
            assert len(inner.calls) == before + 2, change
        before = len(inner.calls)
        model.sample(["a", "B"], n=2, seed=3)
        assert len(inner.calls) == before + 1
    blocks = [t.split("/")[1] for each in first for t in (g.text for g in each)]
    assert blocks[0] == blocks[2] != blocks[4]  # each block has a seed of its own


def test_a_second_process_asks_nothing(tmp_path):
    with CachedModel(scripted(), tmp_path / "c.db") as model:
        first = model.sample(["a"], n=2), model.score("p", ["x", "yy"])
    silent = ScriptedModel(name="one")
    with CachedModel(silent, tmp_path / "c.db") as model:
        assert (model.sample(["a"], n=2), model.score("p", ["x", "yy"])) == first
    assert silent.calls == []
    other = CachedModel(ScriptedModel(name="two"), tmp_path / "c.db")
    with other, pytest.raises(UserError, match="used up"):
        other.sample(["a"], n=2)


def test_only_missing_scores_are_asked(tmp_path):
    inner = scripted()
    with CachedModel(inner, tmp_path / "c.db") as model:
        model.score_many(["p", "q"], [["x"], ["x"]])
        asked = len(inner.calls)
        found = model.score_many(["p", "r", "q", "p"], [["x"], ["x"], ["x"], ["y"]])
        assert [c["prefix"] for c in inner.calls[asked:]] == ["r", "p"]
        assert [s[0].total for s in found] == [-2.0, -2.0, -2.0, -2.0]
        assert found == [scripted().score(p, [c]) for p, c in zip("prqp", "xxxy", strict=True)]


def test_scores_come_back_to_the_last_bit(tmp_path):
    model = tiny()
    wanted = model.score("a prefix ", ["one", "two"])
    with CachedModel(model, tmp_path / "c.db") as cached:
        assert cached.score("a prefix ", ["one", "two"]) == wanted
        assert cached.score("a prefix ", ["one", "two"]) == wanted
        assert cached.hits == 1


def test_weights_tell_models_apart():
    one, same, other = tiny(), tiny(), tiny(1)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    with torch.no_grad():
        one.model.get_output_embeddings().weight.mul_(1.5)
    assert fingerprint(one) != fingerprint(same)
    thinking = TransformersModel(
        same.model, same.tokenizer, template_options={"enable_thinking": True}
    )
    assert fingerprint(thinking) != fingerprint(same)


def test_a_failed_call_leaves_the_blocks_before_it(tmp_path):
    def reply(prompt, seed, sample):
        if prompt == "bad":
            raise RuntimeError("gone")
        return prompt

    model = CachedModel(ScriptedModel(reply), tmp_path / "c.db")
    with model, pytest.raises(RuntimeError, match="gone"):
        model.sample(["a", "b", "bad", "c"])
    with CachedModel(ScriptedModel(lambda p, *_: p), tmp_path / "c.db") as model:
        texts = [g.text for (g,) in model.sample(["a", "b", "bad", "c"])]
        assert texts == ["a", "b", "bad", "c"]
        assert (model.hits, model.misses) == (2, 2)


KILLED = """
import os, signal, sys
from tenfold_common.lm import ScriptedModel
from wavelength_rsa.cache import CachedModel
def reply(prompt, seed, sample):
    if prompt == "7":
        os.kill(os.getpid(), signal.SIGKILL)
    return prompt
CachedModel(ScriptedModel(reply), sys.argv[1]).sample([str(i) for i in range(10)])
"""


def test_killed_in_the_middle(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "c.db")], check=False)
    assert done.returncode == -9
    with CachedModel(ScriptedModel(lambda p, *_: p), tmp_path / "c.db") as model:
        model.sample([str(i) for i in range(10)])
        assert (model.hits, model.misses) == (6, 4)


def test_bad_files(tmp_path):
    (tmp_path / "junk").write_bytes(b"not a database, but long enough to be looked at" * 50)
    with pytest.raises(UserError, match="cannot be used"):
        CachedModel(scripted(), tmp_path / "junk")
    with pytest.raises(UserError, match="is a folder"):
        CachedModel(scripted(), tmp_path)
    with pytest.raises(UserError, match="no folder that exists"):
        CachedModel(scripted(), tmp_path / "no" / "c.db")
    with pytest.raises(UserError, match="block must be at least 1"):
        CachedModel(scripted(), tmp_path / "c.db", block=0)
    with CachedModel(scripted(), tmp_path / "c.db") as model:
        model.sample(["a"])
    with sqlite3.connect(tmp_path / "c.db") as file:
        file.execute("update answers set value = '[[['")
    file.close()
    model = CachedModel(scripted(), tmp_path / "c.db")
    with model, pytest.raises(UserError, match="is damaged"):
        model.sample(["a"])
