"""What a model said once is not asked again, and never mistaken for something else."""

import json
import shutil
import sqlite3
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

from tenfold_common.errors import UserError
from tenfold_common.lm import (
    ScriptedModel,
    ServerModel,
    TextModel,
    TransformersModel,
)
from tenfold_common.tiny import byte_tokenizer, tiny_llama
from wavelength_rsa.cache import CachedModel, fingerprint, open_cache


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
        assert first == scripted().sample(prompts, n=2, seed=3)
        assert len(inner.calls) == 1
        assert model.sample(prompts, n=2, seed=3) == first
        assert len(inner.calls) == 1
        assert (model.hits, model.misses) == (3, 3)
        for change in (
            {"seed": 4}, {"n": 3}, {"temperature": 0.5}, {"top_p": 0.9}, {"max_tokens": 5},
            {"stop": ["x"]},
        ):  # fmt: skip
            before = len(inner.calls)
            model.sample(prompts, **{"n": 2, "seed": 3, **change})
            assert len(inner.calls) == before + 1, change
        for others in (prompts[:2], prompts[::-1], ["a", "B", prompts[2]], [*prompts, "a"]):
            before = len(inner.calls)  # what is sampled depends on the place in the call
            assert model.sample(others, n=2, seed=3) == scripted().sample(others, n=2, seed=3)
            assert len(inner.calls) == before + 1, others


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


# --------------------------------------------------------------------------------------------------
# What is the same model


CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MERGES = (("h", "o"), ("o", "t"))


def built(folder, *, words=("hot", "cold"), template=CHAT, merges=(), **named):
    """Write a model with a big matrix, and a tokenizer that merges pairs of bytes."""
    tokenizer = byte_tokenizer()
    if merges:
        inner = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = inner["model"]["vocab"]
        vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(sorted(merges))}
        inner["model"]["merges"] = [list(pair) for pair in merges]
        made = Tokenizer.from_str(json.dumps(inner))
        tokenizer = type(tokenizer)(
            tokenizer_object=made, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
        )
    tokenizer.add_tokens(list(words))
    tokenizer.chat_template = template
    network = tiny_llama(20_000, hidden=64, heads=2, kv_heads=2, layers=1, **named)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return built(tmp_path_factory.mktemp("one") / "model", merges=MERGES)


def test_the_same_model_loaded_twice_is_the_same(known, tmp_path):
    one = TransformersModel(known)
    print_ = fingerprint(one)
    assert print_.startswith("model:")
    assert fingerprint(TransformersModel(known)) == print_
    moved = shutil.copytree(known, tmp_path / "model")
    assert fingerprint(TransformersModel(moved)) == print_
    assert fingerprint(TransformersModel(built(tmp_path / "new" / "model", merges=MERGES))) == (
        print_
    )
    one.sample(["a prompt"], n=2, max_tokens=3, seed=1)  # use leaves no trace
    one.score_many(["a", "much longer"], [["x"], ["y", "zz"]])
    assert fingerprint(one) == print_
    with CachedModel(one, tmp_path / "c.db") as cached:
        assert fingerprint(cached) == cached.identity == print_
        assert fingerprint(CachedModel(cached, tmp_path / "d.db")) == print_


@pytest.mark.parametrize(
    "change",
    [
        {"template": CHAT + "Now: "},
        {"template": None},
        {"words": ("hot", "cold", "tepid")},
        {"words": ("cold", "hot")},
        {"words": ()},
        {"merges": MERGES[::-1]},
        {"merges": MERGES[:1]},
        {"merges": ()},
        {"eos_token_id": 5},
        {"rms_norm_eps": 1e-5},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_part_of_a_model_tells_it_from_others(known, tmp_path, change):
    other = built(tmp_path / "model", **{"merges": MERGES, **change})
    assert fingerprint(TransformersModel(other)) != fingerprint(TransformersModel(known))


def test_settings_that_tell_models_apart(known):
    def of(**named):
        return fingerprint(TransformersModel(known, **named))

    assert of(template_options={"enable_thinking": False}) != of()
    both = [of(template_options={"enable_thinking": value}) for value in (True, False)]
    assert both[0] != both[1]
    assert of(dtype="bfloat16") != of()
    assert of(context=100) != of()
    model = TransformersModel(known)
    model.model.generation_config.eos_token_id = 7  # what ends a reply
    assert fingerprint(model) != of()
    assert of(skip_special_tokens=False) != of()


def test_settings_of_adapters_tell_models_apart(known):
    """With peft the scale of an adapter is no weight."""

    def of(**state):
        """The attributes of a layer of peft."""
        model = TransformersModel(known)
        layer = {"_disable_adapters": False, "_active_adapter": ["a"], "scaling": {"a": 2.0}}
        vars(model.model.lm_head).update({**layer, **state})
        return fingerprint(model)

    prints = [
        fingerprint(TransformersModel(known)),
        of(),
        of(scaling={"a": 32.0}),
        of(_active_adapter=["b"]),
        of(_disable_adapters=True),
        of(merged_adapters=["a"]),
    ]
    assert len(set(prints)) == len(prints)
    assert of() == of()


def test_special_tokens_tell_models_apart(known, tmp_path):
    """Which token begins and which ends a text is no part of the fast tokenizer itself."""
    one = fingerprint(TransformersModel(known))
    copy = tmp_path / "other name"
    shutil.copytree(known, copy)
    renamed = fingerprint(TransformersModel(copy))
    assert renamed.startswith("other name:")
    assert renamed.rpartition(":")[2] == one.rpartition(":")[2]  # the name is not in the hash
    file = copy / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["eos_token"], settings["bos_token"] = settings["bos_token"], settings["eos_token"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert fingerprint(TransformersModel(copy)).rpartition(":")[2] != one.rpartition(":")[2]


def test_addresses_of_one_server_are_one():
    urls = (
        "http://127.0.0.1:8",
        "http://127.0.0.1:8/",
        "http://127.0.0.1:8/v1",
        "http://localhost:8",
    )
    models = [SimpleNamespace(name="m", base_url=url, extra={}) for url in urls]
    assert len({fingerprint(model) for model in models}) == 1
    other = SimpleNamespace(name="m", base_url="http://127.0.0.1:9", extra={})
    assert fingerprint(other) != fingerprint(models[0])


@pytest.mark.parametrize("value", ["[]", "3", "[[3]]", '{"a": 1}'])
def test_values_of_another_form_are_damage(tmp_path, value):
    inner = ScriptedModel(lambda p, *_: p, score=lambda *_: -1.0)
    with CachedModel(inner, tmp_path / "c.db") as model:
        model.sample(["a"])
        model.score_many(["p"], [["x"]])
    with sqlite3.connect(tmp_path / "c.db") as file:
        file.execute("update answers set value = ?", (value,))
    with CachedModel(inner, tmp_path / "c.db") as model:
        for ask in (lambda: model.sample(["a"]), lambda: model.score_many(["p"], [["x"]])):
            with pytest.raises(UserError, match="is damaged"):
                ask()


def test_a_database_of_something_else_is_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "f.db") as file:
        file.execute("create table bookmarks (a text)")
    before = (tmp_path / "f.db").read_bytes()
    with pytest.raises(UserError, match=r"something else \(it holds 'bookmarks'\)"):
        open_cache(tmp_path / "f.db")
    assert (tmp_path / "f.db").read_bytes() == before


def test_answers_in_another_order_are_asked_anew(tmp_path):
    inner = ScriptedModel(lambda p, *_: p, score=lambda prefix, text: -float(len(text)))
    with CachedModel(inner, tmp_path / "c.db") as model:
        (first,) = model.score_many(["p"], [["x", "xyz"]])
        (other,) = model.score_many(["p"], [["xyz", "x"]])
    assert [s.total for s in first] == [s.total for s in other][::-1]
    assert first[0].total != first[1].total


@pytest.mark.parametrize("place", [0, 12_345, 640_000, -1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_weight_of_a_million_tells_models_apart(known, place, dtype):
    model = TransformersModel(known, dtype=dtype)
    before = fingerprint(model)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        weight = model.model.get_parameter(name).detach().view(-1)
        where = place % weight.numel()
        old = weight[where].clone()
        weight[where] = torch.nextafter(old, torch.tensor(9.0, dtype=old.dtype))  # the last bit
        assert weight[where] != old
        assert fingerprint(model) != before
        weight[where] = old
        assert fingerprint(model) == before


def test_a_weight_that_moves_to_another_place_is_seen(known):
    model = TransformersModel(known)
    before = fingerprint(model)
    rows = model.model.get_parameter("model.embed_tokens.weight").detach()
    rows[[3, 4]] = rows[[4, 3]]
    assert fingerprint(model) != before
    rows[[3, 4]] = rows[[4, 3]]
    block = model.model.model.layers[0].mlp
    assert block.gate_proj.weight.shape == block.up_proj.weight.shape
    block.gate_proj, block.up_proj = block.up_proj, block.gate_proj
    assert fingerprint(model) != before


def test_servers_are_told_apart_by_address_and_what_is_sent(start_server):
    first, second = start_server(), start_server()
    one = fingerprint(ServerModel(first.url))
    assert fingerprint(ServerModel(first.url)) == one
    assert fingerprint(ServerModel(first.url, concurrency=3, retries=1)) == one
    assert fingerprint(ServerModel(second.url)) != one
    assert fingerprint(ServerModel(first.url, extra={"top_k": 5})) != one
    assert fingerprint(ServerModel(first.url, model="other")) != one


# --------------------------------------------------------------------------------------------------
# Failures


def test_a_failed_call_leaves_nothing_and_those_before_it_all(tmp_path):
    def reply(prompt, seed, sample):
        if prompt == "bad":
            raise RuntimeError("gone")
        return prompt

    model = CachedModel(ScriptedModel(reply), tmp_path / "c.db")
    with model:
        model.sample(["a", "b"])
        with pytest.raises(RuntimeError, match="gone"):
            model.sample(["c", "bad"])
    with CachedModel(ScriptedModel(lambda p, *_: p), tmp_path / "c.db") as model:
        assert [g.text for (g,) in model.sample(["a", "b"])] == ["a", "b"]
        assert (model.hits, model.misses) == (2, 0)
        assert [g.text for (g,) in model.sample(["c", "bad"])] == ["c", "bad"]
        assert (model.hits, model.misses) == (2, 2)


def test_a_broken_file_is_told_before_a_model_is_asked_for_its_weights(tmp_path):
    class Heavy:
        name = "heavy"

        @property
        def tokenizer(self):
            raise AssertionError("the fingerprint was taken")

    (tmp_path / "junk").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="cannot be used"):
        CachedModel(Heavy(), tmp_path / "junk")
    with pytest.raises(UserError, match="cannot be used"):
        open_cache(tmp_path / "junk")
    open_cache(tmp_path / "new").close()
    assert (tmp_path / "new").is_file()


def test_bad_files(tmp_path):
    (tmp_path / "junk").write_bytes(b"not a database, but long enough to be looked at" * 50)
    with pytest.raises(UserError, match="cannot be used"):
        CachedModel(scripted(), tmp_path / "junk")
    with pytest.raises(UserError, match="is a folder"):
        CachedModel(scripted(), tmp_path)
    with pytest.raises(UserError, match="no folder that exists"):
        CachedModel(scripted(), tmp_path / "no" / "c.db")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["junk"]
    with CachedModel(scripted(), tmp_path / "c.db") as model:
        model.sample(["a"])
    with sqlite3.connect(tmp_path / "c.db") as file:
        file.execute("update answers set value = '[[['")
    file.close()
    model = CachedModel(scripted(), tmp_path / "c.db")
    with model, pytest.raises(UserError, match="is damaged"):
        model.sample(["a"])
