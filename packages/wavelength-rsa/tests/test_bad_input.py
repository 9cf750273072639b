"""Everything wrong that a user can give: one line that helps, exit code 2, nothing overwritten."""

import json
import re
import sqlite3

import numpy as np
import pytest

from tenfold_common.errors import UserError
from tenfold_common.lm import ScriptedModel
from tenfold_common.tiny import byte_tokenizer, tiny_llama
from wavelength_rsa import (
    RSA,
    Distribution,
    Item,
    LogprobListener,
    PragmaticReranker,
    RSAListener,
    RSASpeaker,
    Rules,
    SamplingListener,
    SamplingSpeaker,
    Scale,
    TableListener,
    WavelengthPrompts,
    evaluate_listener,
    evaluate_speaker,
    fit_rsa,
    grid,
    human_baseline,
)
from wavelength_rsa.cli import main
from wavelength_rsa.scales import grid_index, project

HOT = Scale("Cold", "Hot")
ENDS = ("--left=Cold", "--right=Hot")
HALVES = np.log([[0.5, 0.5], [0.1, 0.9]])


def says(text):
    return ScriptedModel(lambda *_: text, score=lambda *_: -1.0, name="m")


def scores(value):
    return ScriptedModel(score=lambda *_: value, name="m")


def table(step=50):
    return TableListener({}, step=step, default="uniform")


LIBRARY = [
    # targets and grids
    (lambda: grid_index(47), r"47 is not a multiple of step 5; use step 1 \(--step 1\)"),
    (lambda: grid_index(105), r"from 0 to 100, not 105"),
    (lambda: grid_index(float("nan"), snap="nearest"), r"from 0 to 100, not nan"),
    (lambda: grid(7), r"step must be one of 1, 2, 4, 5, 10, 20, 25, 50, not 7"),
    (lambda: project([50, 101]), r"101"),
    (lambda: Item(HOT, "tea", -1), r"from 0 to 100, not -1"),
    (lambda: evaluate_listener(table(), [Item(HOT, "x", 47, id="k")]), r"item 'k' \('x'\).* 47"),
    (lambda: SamplingSpeaker(says("x")).propose([(HOT, 200.0)]), r"from 0 to 100, not 200"),
    (lambda: RSASpeaker(SamplingSpeaker(says("x")), table()).speak(HOT, 47), r"47.*step 50"),
    # words
    (lambda: Scale("", "Hot"), r"left end of a scale is ''"),
    (lambda: Scale("Cold", " \t"), r"right end of a scale is ' \\t'"),
    (lambda: Scale("Hot", "hot "), r"must differ"),
    (lambda: Item(HOT, " ", 5), r"the clue is ' '"),
    (lambda: Item(HOT, "HOT", 5), r"is an end of the scale Cold .. Hot"),
    (lambda: table().distribution(HOT, " "), r"the clue on Cold .. Hot is blank"),
    (lambda: table().listen([("Cold", "Hot", "x")]), r"pair \(Scale, clue\)"),
    (lambda: Item(HOT, "tea", 5, (50.0,)), r"at least 2 responses"),
    (lambda: Item(HOT, "tea", 5, (50.0, 101.0)), r"response 1 must be .* not 101"),
    (lambda: human_baseline([Item(HOT, "tea", 5)]), r"responses"),
    # settings
    (lambda: SamplingSpeaker(says("x"), num_candidates=0), r"num_candidates .*at least 1, not 0"),
    (lambda: SamplingListener(says("x"), num_samples=0), r"num_samples .*at least 1, not 0"),
    (lambda: SamplingListener(says("x"), temperature=-1), r"temperature .*at least 0, not -1"),
    (lambda: LogprobListener(says("x"), normalize="tokens"), r"Did you mean 'token'"),
    (lambda: LogprobListener(says("x"), temperature=0), r"temperature .*above 0"),
    (lambda: LogprobListener(says("x"), end="turn"), r"needs the chat template of m"),
    (lambda: LogprobListener(says("x"), step=3), r"step"),
    (lambda: SamplingSpeaker(says("x"), on_violation="rise"), r"Did you mean 'raise'"),
    (lambda: RSASpeaker(SamplingSpeaker(says("x")), table(), alpha=-1), r"alpha .*, not -1"),
    (lambda: RSASpeaker(SamplingSpeaker(says("x")), table(), alpha=float("nan")), r"not nan"),
    (lambda: RSASpeaker(SamplingSpeaker(says("x")), table(), utility="log"), r"utility must be"),
    (lambda: RSAListener(table(), {}).distribution(HOT, "tea"), r"no alternatives for the scale"),
    (lambda: Rules(max_words=0), r"max_words must be at least 1"),
    (lambda: WavelengthPrompts(version="v0"), r"version must be one of v1, not 'v0'"),
    (lambda: PragmaticReranker(lambda *_: 0.0, alpha=-1), r"alpha"),
    # matrices
    (lambda: RSA(alpha=-1).listener(HALVES), r"alpha"),
    (lambda: RSA(alpha=float("nan")).listener(HALVES), r"alpha"),
    (lambda: RSA(depth=-1).listener(HALVES), r"depth"),
    (lambda: RSA().listener(np.log([[0.5, 0.4], [0.1, 0.9]])), r"sum"),
    (lambda: RSA().listener(HALVES.T), r"axes \[..., utterances, states\] .* looks transposed"),
    (lambda: RSA().listener(np.array([[np.nan, 0.0]])), r"(?i)nan"),
    (lambda: RSA().listener(np.array([[0.5, -1.0]])), r"log"),
    (
        lambda: RSA(null=None).listener(np.array([[0.0, -np.inf], [0.0, -np.inf]])),
        r"null.*smooth|smooth.*null",
    ),
    (lambda: RSA(state_prior=[1.0]).listener(HALVES), r"state_prior"),
    (lambda: fit_rsa([HALVES], [5], [[1, 1]], ["a"]), r"heard\[0\] is 5"),
    (lambda: Distribution(grid(50), np.array([0.5, 0.6, 0.2])), r"sum"),
    # what models say
    (
        lambda: SamplingListener(says("no idea"), num_samples=4, max_retries=2).distribution(
            HOT, "x"
        ),
        r"none of 12 replies about the clue 'x' on Cold .. Hot named a position from 0 to 100 \(0 "
        r"were cut off at max_tokens\)\. The first: 'no idea'; 'no idea'; 'no idea'\. Use a model",
    ),
    (
        lambda: SamplingListener(says("<answer>150"), num_samples=2).distribution(HOT, "x"),
        r"none of 22 replies .*'<answer>150'",
    ),
    (
        lambda: SamplingListener(says("<think>45, or"), num_samples=2).distribution(HOT, "x"),
        r"none of 22 .* for a reasoning model its switch in template_options",
    ),
    (
        lambda: SamplingSpeaker(says("I would rather not."), num_candidates=2).speak(HOT, 5),
        r"none of 22 replies for target 5 on Cold .. Hot held a clue",
    ),
    (
        lambda: SamplingSpeaker(says("<clue>very hot</clue>"), on_violation="raise").speak(HOT, 5),
        r"every clue for target 5 on Cold .. Hot breaks a rule .*end_word, hedge.*'drop'",
    ),
    (lambda: LogprobListener(scores(float("-inf"))).distribution(HOT, "x"), r"dtype float32"),
    (lambda: LogprobListener(scores(float("nan"))).distribution(HOT, "x"), r"dtype float32"),
    (lambda: evaluate_listener(table(), []), r"no item"),
    (lambda: evaluate_speaker(SamplingSpeaker(says("x")), [], judge=table()), r"no item"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), LIBRARY, ids=range(len(LIBRARY)))
def test_the_library_says_what_is_wrong(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert str(caught.value)[0] != "'"  # a sentence, not a bare value
    assert len(str(caught.value)) < 1200


def test_the_least_bad_clue_is_said_and_flagged():
    clues = iter(["<clue>very hot 5</clue>", "<clue>very nice</clue>"] * 2)
    model = ScriptedModel(lambda *_: next(clues), name="m")
    said = SamplingSpeaker(model, num_candidates=4, on_violation="drop").speak(HOT, 5)
    assert (said.clue, said.flagged) == ("very nice", True)


def test_positions_out_of_range_are_dropped_and_counted_not_moved():
    replies = iter(["<answer>150</answer>", "<answer>-3</answer>", "<answer>40</answer>"] * 9)
    listener = SamplingListener(
        ScriptedModel(lambda *_: next(replies), name="m"), num_samples=3, smoothing=0.0
    )
    assert listener.distribution(HOT, "x").mean == 40
    assert listener.last_stats["used"] == 3
    assert listener.last_stats["unusable"] >= 4


# --------------------------------------------------------------------------------------------------
# The command

GOOD = '{"left": "Cold", "right": "Hot", "clue": "tea", "target": 50, "responses": [40, 60]}\n'
CSV = "left,right,clue,target,response_list\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with good data and things that are in the way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text(GOOD)
    (tmp_path / "taken.json").write_text("{}")
    (tmp_path / "there").mkdir()
    return tmp_path


def snapshot(folder):
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def refused(capsys, folder, *arguments):
    """Run a command that must be refused and change nothing, and return its one line."""
    before = snapshot(folder)
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert snapshot(folder) == before
    return line.removeprefix("error: ")


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error: what is refused must be refused before."""
    import tenfold_common.lm

    def load(*arguments, **named):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(tenfold_common.lm, "load_text_model", load)


LISTEN = ["listen", "--model=m", *ENDS, "fire"]
SPEAK = ["speak", "--model=m", *ENDS, "--target=5"]
EVAL = ["eval", "--task=listener", "--model=m", "--data=d.jsonl", "--out=r.json"]
SPEAKER = ["eval", "--task=speaker", "--model=m", "--data=d.jsonl", "--out=r.json"]
FIT = ["fit-alpha", "--data=d.jsonl"]
PLAY = ["play", "--model=m"]
COUNT = "must be a whole number of at least 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lisen"], "Did you mean 'listen'"),
        (["listen", "--model=m", *ENDS], "required: CLUE"),
        (["listen", "--left=a", "--right=b", "x"], "--model"),
        ([*LISTEN, "--devise=cpu"], "Did you mean '--device'"),
        ([*LISTEN, "--mode=guess"], "choose from logprob, sample, cot"),
        ([*LISTEN, "--backend=vlm"], "Did you mean 'vllm'"),
        ([*LISTEN, "--step=7"], "choose from 1, 2, 4, 5, 10, 20, 25, 50"),
        ([*LISTEN, "--seed=-1"], "from 0 to 4294967295, not '-1'"),
        ([*LISTEN, "--seed=4294967296"], "from 0 to 4294967295"),
        ([*LISTEN, "--num_samples=0"], COUNT),
        ([*LISTEN, "--max_tokens=1.5"], COUNT),
        ([*LISTEN, "--max_tokens=²"], COUNT),
        (["listen", "--model=m", "--left=Hot", "--right= hot", "x"], "must differ"),
        (["listen", "--model=m", "--left= ", "--right=b", "x"], "left end of a scale is ' '"),
        ([*LISTEN, "--json=no/l.json"], "there is no folder no"),
        ([*LISTEN, "--json=there"], "it is a directory"),
        ([*LISTEN, "--cache=c.db", "--json=c.db"], "would replace the file of --cache"),
        ([*LISTEN, "--cache=no/c.db"], "the cache 'no/c.db' is in no folder that exists"),
        ([*LISTEN, "--cache=there"], "the cache 'there' is a folder; name a file"),
        ([*LISTEN, "--cache=d.jsonl"], "the cache d.jsonl cannot be used (file is not a database)"),
        ([*EVAL, "--cache=d.jsonl/c.db"], "is in no folder that exists"),
        ([*LISTEN, "--model_name=n"], "is for a server; 'm' is the model itself"),
        (["speak", "--model=m", *ENDS], "required: --target"),
        (["speak", "--model=m", *ENDS, "--target=47"], "target 47 is not a multiple of step 5"),
        (["speak", "--model=m", *ENDS, "--target=101"], "from 0 to 100, not 101"),
        (["speak", "--model=m", *ENDS, "--target=-5"], "from 0 to 100, not -5"),
        (["speak", "--model=m", *ENDS, "--target=nan"], "from 0 to 100, not nan"),
        (["speak", "--model=m", *ENDS, "--target=inf"], "from 0 to 100, not inf"),
        (["speak", "--model=m", *ENDS, "--target=hot"], "invalid float value: 'hot'"),
        ([*SPEAK, "--num_candidates=0"], COUNT),
        ([*SPEAK, "--rsa", "--alpha=-1"], "must be a number of at least 0 or inf, not '-1'"),
        ([*SPEAK, "--rsa", "--alpha=nan"], "must be a number of at least 0 or inf, not 'nan'"),
        ([*SPEAK, "--utility=neg_w2"], "Did you mean 'neg_w1'"),
        ([*SPEAK, "--select=max"], "sample, argmax"),
        ([*SPEAK, "--on_violation=rise"], "Did you mean 'raise'"),
        ([*SPEAK, "--judge=j", "--self_play"], "exclude each other"),
        (["eval", "--model=m", "--data=d.jsonl", "--out=r.json"], "required: --task"),
        ([*EVAL, "--out=taken.json"], "taken.json exists; name another file or give --overwrite"),
        ([*EVAL, "--out=there", "--overwrite"], "it is a directory"),
        ([*EVAL, "--out=no/r.json"], "there is no folder no"),
        ([*EVAL, "--out=d.jsonl", "--overwrite"], "would replace the file of --data"),
        ([*EVAL, "--out=there/../d.jsonl", "--overwrite"], "would replace the file of --data"),
        ([*EVAL, "--cache=r.json"], "would replace the file of --cache"),
        ([*EVAL, "--limit=0"], COUNT),
        ([*EVAL, "--resamples=0"], "must be a whole number of at least 2, not '0'"),
        ([*EVAL, "--resamples=1"], "must be a whole number of at least 2, not '1'"),
        ([*EVAL, "--judge=j"], "are for --task speaker or both"),
        ([*EVAL, "--rsa"], "are for --task speaker or both"),
        ([*EVAL, "--step=20"], "item '0' ('tea'): target 50 is not a multiple of step 20"),
        ([*EVAL, "--data=none.csv"], "none.csv: there is no such file"),
        ([*EVAL, "--data=there"], "there: is a folder; name a file in it"),
        (SPEAKER, "a speaker needs one judge"),
        ([*SPEAKER, "--judge=j", "--self_play"], "a speaker needs one judge"),
        (["report", "none.json"], "cannot read none.json: No such file"),
        (["report", "there"], "cannot read there"),
        (["report", "taken.json"], "taken.json is no report; wavelength-rsa eval writes them"),
        (["report", "d.jsonl"], "d.jsonl is no report"),
        (["human-baseline", "--data=d.jsonl", "--json=d.jsonl"], "would replace"),
        (["human-baseline", "--data=d.jsonl", "--splits=0"], COUNT),
        ([*FIT, "--json=d.jsonl"], "would replace the file of --data"),
        ([*FIT, "--folds=1"], "must be a whole number of at least 2"),
        (FIT, "give items of at least two scales"),
        (["play", "--model=m", "--rounds=0"], COUNT),
        (["play", "--model=m", "--role=watch"], "choose from speak, listen"),
        (["play", "--model=m", "--data=none.csv"], "there is no such file"),
        (["demo", "--out=taken.json"], "taken.json is a file; name a folder"),
        (["demo", "--seed=x"], "from 0 to 4294967295, not 'x'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refused_before_a_model_is_loaded(folder, capsys, no_model, arguments, message):
    assert message in refused(capsys, folder, *arguments)


USELESS = [
    # no reasoning about a listener or a speaker
    ([*SPEAK, "--alpha=2"], "--alpha is for --rsa"),
    ([*EVAL, "--alpha=2"], "--alpha is for --rsa or --rsa_listener"),
    ([*SPEAK, "--utility=neg_w1"], "--utility is for --rsa"),
    ([*EVAL, "--rsa_listener", "--utility=neg_w1"], "--utility is for --rsa"),
    ([*SPEAK, "--select=argmax"], "--select is for --rsa"),
    ([*PLAY, "--role=speak", "--rsa", "--select=argmax"], "--rsa is for a model that speaks"),
    # nobody speaks
    ([*EVAL, "--num_candidates=4"], "--num_candidates is for a model that speaks"),
    ([*EVAL, "--cot"], "--cot is for a model that speaks"),
    ([*PLAY, "--role=speak", "--cot"], "--cot is for a model that speaks"),
    ([*EVAL, "--on_violation=drop"], "--on_violation is for a model that speaks"),
    # how a model listens
    ([*LISTEN, "--num_samples=4"], "--num_samples is for --mode sample or cot"),
    ([*LISTEN, "--max_tokens=9"], "--max_tokens is for --mode sample or cot, or a model that"),
    ([*EVAL, "--max_tokens=9"], "--max_tokens is for --mode sample or cot, or a model that"),
    ([*FIT, "--model=m", "--max_tokens=9"], "--max_tokens is for --mode sample or cot, or a"),
    ([*LISTEN, "--mode=sample", "--normalize=pmi"], "--normalize is for --mode logprob"),
    ([*LISTEN, "--mode=cot", "--end=x"], "--end is for --mode logprob"),
    # nobody listens
    ([*SPEAK, "--mode=sample"], "--mode is for a model that listens"),
    ([*SPEAK, "--normalize=pmi"], "--normalize is for --mode logprob, where a model listens"),
    ([*PLAY, "--role=listen", "--end=x"], "--end is for --mode logprob, where a model listens"),
    ([*FIT, "--mode=cot"], "--mode is for a model that listens"),
    # where the model is
    ([*FIT, "--device=cpu"], "--device is for a model in this process"),
    ([*FIT, "--cache=c.db"], "--cache is for a model"),
    ([*LISTEN, "--api_key_env=KEY"], "--api_key_env is for a server"),
    ([*SPEAKER, "--judge=j", "--judge_api_key_env=KEY"], "--judge_api_key_env is for a judge"),
    ([*FIT, "--backend=vllm"], "--backend is for --model"),
    ([*FIT, "--model_name=n"], "--model_name is for --model"),
    ([*FIT, "--model=http://h", "--dtype=float16"], "--dtype is for a model in this process"),
    ([*FIT, "--model=http://h", "--thinking"], "--thinking is for a model in this process; a"),
    # nobody judges
    ([*SPEAK, "--judge_backend=server"], "--judge_backend is for --judge"),
    ([*SPEAKER, "--self_play", "--judge_backend=server"], "--judge_backend is for --judge"),
    ([*SPEAKER, "--self_play", "--judge_model_name=n"], "--judge_model_name is for --judge"),
]
USED = [
    [*SPEAK, "--rsa", "--alpha=2", "--utility=neg_w1", "--select=argmax"],
    [*SPEAKER, "--self_play", "--rsa", "--alpha=2", "--utility=neg_w1", "--select=argmax"],
    [*PLAY, "--role=listen", "--rsa", "--alpha=2", "--select=argmax", "--cot"],
    [*EVAL, "--rsa_listener", "--alpha=2"],
    [*EVAL, "--rsa_listener", "--num_candidates=4", "--cot", "--on_violation=drop"],
    [*SPEAK, "--num_candidates=4", "--cot", "--on_violation=drop", "--max_tokens=9"],
    [*EVAL, "--rsa_listener", "--max_tokens=9"],
    [*LISTEN, "--mode=sample", "--num_samples=4", "--max_tokens=9"],
    [*LISTEN, "--mode=cot", "--num_samples=4", "--max_tokens=9"],
    [*FIT, "--model=m", "--mode=sample", "--max_tokens=9"],
    [*LISTEN, "--normalize=pmi", "--end=x"],
    [*SPEAKER, "--judge=j", "--judge_backend=transformers"],
    [
        *SPEAKER,
        "--judge=http://j",
        "--judge_model_name=n",
        "--judge_api_key_env=KEY",
        "--device=cpu",
    ],
    [*SPEAK, "--rsa", "--mode=sample", "--num_samples=4"],
    [*SPEAK, "--self_play", "--mode=sample"],
    [*SPEAK, "--self_play", "--normalize=token"],
    [*SPEAK, "--judge=j", "--end=x"],
    # what is the default may be said
    [*EVAL, "--alpha=1", "--num_samples=32", "--num_candidates=32", "--normalize=none"],
]


@pytest.mark.parametrize(
    ("arguments", "message"), USELESS, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_options_that_would_change_nothing(folder, capsys, no_model, arguments, message):
    line = refused(capsys, folder, *arguments)
    assert line.startswith(message)
    assert line.endswith(" and would change nothing here; leave it out")


@pytest.mark.parametrize("arguments", USED, ids=" ".join)
def test_options_that_are_used_get_as_far_as_the_model(folder, capsys, monkeypatch, arguments):
    import tenfold_common.lm

    def load(*arguments, **named):
        raise UserError("now a model is loaded")

    monkeypatch.setattr(tenfold_common.lm, "load_text_model", load)
    assert refused(capsys, folder, *arguments) == "now a model is loaded"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("e.jsonl", "", "e.jsonl: the file has no rows"),
        ("e.csv", "", "e.csv: the file has no rows"),
        ("e.csv", CSV, "the file has no rows"),
        ("e.jsonl", GOOD + '{"left": ', "line 2: broken JSON"),
        ("e.jsonl", "[1, 2]", "line 1: not a JSON object"),
        ("e.csv", "left,right,clu,target\na,b,c,5\n", "column 'clue' is missing.* you mean 'clu'"),
        ("e.csv", CSV + "a,b,c,5\n", "line 2: 4 values under 5 column names"),
        ("e.csv", CSV + "a,b,c,5,forty\n", "line 2: responses must be a list of num.* 'forty'"),
        ("e.csv", CSV + 'a,b,c,5,"__import__(\'os\')"\n', "line 2: responses must be a list"),
        ("e.csv", CSV + "a,b,c,5,[50]\n", "line 2: there must be at least 2 responses"),
        ("e.csv", CSV + 'a,b,c,5,"[50, 101]"\n', "line 2: response 1 must be .* not 101"),
        ("e.csv", CSV + 'a,b,c,5,"[50, NaN]"\n', "line 2: response 1 must be .* not nan"),
        ("e.csv", CSV + "a,b,c,x,\n", "line 2: target must be a number from 0 to 100, not 'x'"),
        ("e.csv", CSV + "a,b,c,101,\n", "line 2: target must be a number from 0 to 100, not 101"),
        ("e.csv", CSV + "a,b, ,5,\n", "line 2: the clue is ' '"),
        ("e.csv", CSV + "a,b,c,5,\na,A,c,5,\n", "line 3: the ends of a scale .* must differ"),
        ("e.csv", CSV + "a,b,B,5,\n", "line 2: the clue 'B' is an end of the scale a .. b"),
        ("e.csv", "id," + CSV + "1,a,b,c,5,\n1,a,b,d,5,\n", "line 3: id '1' is that of line 2 too"),
        ("e.csv", b"\x80\x00\xff", "not UTF-8 text"),
        ("e.jsonl", b"\x80\x00\xff", "not UTF-8 text"),
        ("e.csv", CSV + "a,b,c,47,\n", r"item '0' \('c'\): target 47 is not a multiple of step 5"),
    ],
    ids=str,
)  # fmt: skip
def test_data_that_are_refused(folder, capsys, no_model, name, text, message):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(
        capsys, folder, "eval", "--task=listener", "--model=m", f"--data={name}", "--out=r.json"
    )
    assert re.search(message, line)
    assert name in line or "item" in line


@pytest.mark.parametrize("verb", ["human-baseline", "fit-alpha"])
def test_items_without_people(folder, capsys, verb):
    (folder / "e.csv").write_text(CSV + "a,b,c,5,\nd,e,f,10,\n")
    assert "responses" in refused(capsys, folder, verb, "--data=e.csv")


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory):
    """Folders: `short`, whose context is 64 tokens, `noise`, which says anything, `empty`."""
    root = tmp_path_factory.mktemp("odd")
    tokenizer = byte_tokenizer()
    for name, length in (("short", 64), ("noise", 8192)):
        network = tiny_llama(
            len(tokenizer), hidden=16, heads=2, kv_heads=2, layers=1, max_position_embeddings=length
        )
        network.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "empty").mkdir()
    return root


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("empty", [], "holds no model: it has no config.json"),
        ("short", [], r"a prompt has \d+ tokens, but the model's context is 64 tokens"),
        ("short", ["--mode=sample"], r"a prompt has \d+ tokens .* context is 64 tokens"),
        ("noise", ["--mode=cot", "--num_samples=2", "--max_tokens=2"],
         r"none of 22 replies about the clue 'fire' .* \(22 were cut off"),
        ("noise", ["--end=turn"], "end='turn' needs the chat template of noise"),
        ("noise", ["--device=tpu"], "unknown device 'tpu'"),
        ("noise", ["--dtype=int8"], "unknown dtype 'int8'"),
        ("noise", ["--backend=server"], "needs the http:// or https:// address"),
        ("noise", ["--cache=d.jsonl"], r"the cache d\.jsonl cannot be used \(file is not a"),
        ("noise", [" "], "the clue on Cold .. Hot is blank"),
    ],
)  # fmt: skip
def test_models_that_are_refused(folder, capsys, odd_models, model, arguments, message):
    line = refused(
        capsys, folder, "listen", f"--model={odd_models / model}", *ENDS, "fire", *arguments
    )
    assert re.search(message, line)


def test_a_model_that_says_no_clue(folder, capsys, odd_models):
    command = ["speak", f"--model={odd_models / 'noise'}", *ENDS, "--target=5", "--max_tokens=3"]
    line = refused(capsys, folder, *command, "--num_candidates=2")
    assert re.search(r"none of 22 replies for target 5 on Cold .. Hot held a clue", line)
    assert line.isprintable()


def test_a_model_that_is_nowhere(folder, capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "nowhere" in refused(capsys, folder, "listen", "--model=nowhere", *ENDS, "fire")


def test_all_clues_break_a_rule(folder, capsys, server):
    server.reply = "<clue>very hot</clue>"
    command = ["speak", f"--model={server.url}", *ENDS, "--target=5", "--num_candidates=2"]
    line = refused(capsys, folder, *command, "--on_violation=raise")
    assert line.startswith("every clue for target 5 on Cold .. Hot breaks a rule")
    assert main([*command, "--on_violation=drop"]) == 0
    assert capsys.readouterr().out.startswith("very hot   (breaks a rule)\n")


def test_escapes_of_a_model_do_not_reach_the_terminal(folder, capsys, server):
    server.reply = "\x1b[2J" * 100
    command = ["listen", f"--model={server.url}", *ENDS, "x", "--mode=sample", "--num_samples=1"]
    assert refused(capsys, folder, *command).isprintable()
    server.reply = "<clue>\x1b[2Jtea</clue>"
    command = ["speak", f"--model={server.url}", *ENDS, "--target=5", "--num_candidates=1"]
    assert refused(capsys, folder, *command).isprintable()


def test_a_damaged_cache(folder, capsys, server):
    command = ["listen", f"--model={server.url}", *ENDS, "fire", "--cache=c.db"]
    assert main(command) == 0
    with sqlite3.connect(folder / "c.db") as file:
        file.execute("update answers set value = '[[['")
    file.close()
    assert "c.db is damaged" in refused(capsys, folder, *command)


def test_reports_that_do_not_compare(folder, capsys, server):
    command = ["eval", f"--model={server.url}", "--resamples=20"]
    both = ["--task=both", "--self_play", "--num_candidates=2"]
    assert main([*command, *both, "--data=d.jsonl", "--out=a.json"]) == 0
    other = json.loads(GOOD) | {"clue": "ice"}
    (folder / "o.jsonl").write_text(json.dumps(other))
    assert main([*command, "--task=listener", "--data=o.jsonl", "--out=o.json"]) == 0
    compared = ["report", "a-listener.json", "--compare"]
    line = refused(capsys, folder, *compared, "a-speaker.json")
    assert line == "one report is of a listener, the other of a speaker"
    assert "no row in common" in refused(capsys, folder, *compared, "o.json")
    for change in ({"rows": [{"x": 1}]}, {"rows": [3]}, {"rows": 3}, {"task": "both"}):
        values = json.loads((folder / "o.json").read_text()) | change
        (folder / "broken.json").write_text(json.dumps(values))
        assert "broken.json is no report" in refused(capsys, folder, *compared, "broken.json")
