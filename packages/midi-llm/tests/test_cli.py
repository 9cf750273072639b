"""The command: every verb, what it writes, and one line with exit code 2 for what is wrong."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from midi_llm.cli import _parser, main
from midi_llm.data import prepare_sft
from midi_llm.decode import MidiLM
from midi_llm.midi_read import read_notes
from midi_llm.midi_write import write_midi
from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
from midi_llm.notes import Notes
from midi_llm.vocab import AMTConfig
from tenfold_common.tiny import tiny_llama, word_tokenizer

ANTICIPATING = AMTConfig(20, 20, 4, 17, 128, True)


def tune(count=24):
    return Notes.of(np.arange(count) * 0.25, 0.2, [0, 33, 128] * (count // 3), 60)


def save_model(folder, amt):
    tokenizer = word_tokenizer(["slow", "jazz", "a", "tune"])
    made = TextMidiProcessor(tokenizer, amt, len(tokenizer), system="")
    model = tiny_llama(
        made.offset, hidden=32, layers=1, heads=2, kv_heads=2, max_position_embeddings=1024, seed=1
    )
    expand_vocabulary(model, amt)
    MidiLM(model.eval(), made).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("models") / "small", AMTConfig.small()))


@pytest.fixture
def midi(tmp_path):
    write_midi(tune(), tmp_path / "tune.mid")
    return str(tmp_path / "tune.mid")


def call(*arguments, code=0):
    assert main([str(a) for a in arguments]) == code


def test_help_is_there_at_once():
    start = time.process_time()
    for verb in (None, "generate", "train"):
        arguments = [verb, "--help"] if verb else ["--help"]
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "midi_llm", *arguments],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "usage: midi-llm" in done.stdout
        assert "numpy" not in done.stderr
    assert time.process_time() - start < 3


def test_every_verb_takes_json_and_seed():
    verbs = next(a for a in _parser()._actions if a.dest == "verb").choices
    for name, verb in verbs.items():
        assert {"--json", "--seed"} <= set(verb._option_string_actions), name


def test_generate_writes_takes_that_are_the_same_for_a_seed(model, tmp_path, capsys):
    common = ("generate", "slow jazz", "--model", model, "--max_notes", 12, "--key", "C minor")
    common += ("--instruments", "piano", "drums", "--device", "cpu")
    call(*common, "--out", tmp_path / "a", "--n", 2, "--seed", 3, "--json", tmp_path / "a.json")
    out = capsys.readouterr().out
    assert "take-1.mid" in out
    assert "take-2.mid" in out
    call(*common, "--out", tmp_path / "b", "--n", 2, "--seed", 3)
    call(*common, "--out", tmp_path / "c", "--n", 2, "--seed", 4)
    first, again, other = (
        [(tmp_path / folder / f"take-{i}.mid").read_bytes() for i in (1, 2)] for folder in "abc"
    )
    assert first == again
    assert first != other
    found = json.loads((tmp_path / "a.json").read_text())
    assert [take["finish_reason"] in ("stop", "length") for take in found["takes"]] == [True] * 2
    notes = read_notes(tmp_path / "a" / "take-1.mid")
    assert set(notes.instrument.tolist()) <= {0, 128}
    call(*common, "--out", tmp_path / "a", code=2)  # they are there
    assert "give --overwrite" in capsys.readouterr().err
    call(*common, "--out", tmp_path / "a", "--overwrite")


def test_continue_and_infill(model, midi, tmp_path, capsys):
    call(
        "continue", midi, "--prompt", "a tune", "--seconds", 3, "--model", model, "--device", "cpu",
        "--out", tmp_path / "longer.mid",
    )  # fmt: skip
    assert len(read_notes(tmp_path / "longer.mid")) >= 24
    infill = ("infill", midi, "--prompt", "a tune", "--start", 1, "--end", 3, "--device", "cpu")
    call(*infill, "--model", model, "--out", tmp_path / "x.mid", code=2)
    assert "has no controls" in capsys.readouterr().err
    other = save_model(tmp_path / "anticipating", ANTICIPATING)
    call(*infill, "--model", other, "--keep", "bass", "--out", tmp_path / "new.mid")
    found = read_notes(tmp_path / "new.mid")
    assert ((found.onset < 1).sum(), (found.onset >= 3).sum()) == (4, 12)


def test_tokenize_and_back(midi, tmp_path, capsys):
    call("tokenize", midi, "--json", tmp_path / "ids.json")
    assert len(json.loads(capsys.readouterr().out.splitlines()[0])) == 72
    call("detokenize", tmp_path / "ids.json", "--out", tmp_path / "back.mid", "--tempo", 90)
    back, notes = read_notes(tmp_path / "back.mid"), tune()
    assert np.allclose(np.sort(back.onset), notes.onset, atol=1e-3)
    assert sorted(back.instrument) == sorted(notes.instrument)
    call("tokenize", midi, "--windows", "--small")
    assert len(capsys.readouterr().out.splitlines()) >= 1


def test_inspect_and_caption(midi, tmp_path, capsys):
    call("inspect", midi, "--json", tmp_path / "a.json")
    assert "notes/s" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["files"][0]["drums"] is True
    call("inspect", "--instruments")
    assert "128 drums" in capsys.readouterr().out
    call("caption", midi, "--style", "short", "--seed", 1)
    assert "drum" in capsys.readouterr().out or "percussion" in capsys.readouterr().out


def test_expand_prepare_and_evaluate(midi, tmp_path, capsys):
    from datasets import load_from_disk

    tokenizer = word_tokenizer(["slow", "jazz"])
    base = tiny_llama(len(tokenizer), hidden=16, layers=1, heads=2, kv_heads=2)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    call("expand", "--base", tmp_path / "base", "--out", tmp_path / "m", "--small")
    assert "music from" in capsys.readouterr().out
    prepare = ("--midi", tmp_path, "--model", tmp_path / "m", "--length", 128)
    call("prepare", "sft", *prepare, "--out", tmp_path / "sft", code=2)  # too short a tune
    assert "nothing to learn from" in capsys.readouterr().err
    call("prepare", "sft", *prepare, "--out", tmp_path / "sft", "--all", "--overwrite")
    (tmp_path / "texts").write_text("slow jazz\n\njazz")
    call(
        "prepare", "cpt", *prepare, "--out", tmp_path / "cpt", "--all", "--text", tmp_path / "texts"
    )
    assert len(load_from_disk(str(tmp_path / "sft"))) >= 1
    assert len(load_from_disk(str(tmp_path / "cpt"))) >= 1
    rows = [{"file": "tune.mid", "caption": "piano, bass and drums"}] * 3
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call("evaluate", tmp_path / "asked.jsonl", "--json", tmp_path / "r.json", "--resamples", 50)
    scores = json.loads((tmp_path / "r.json").read_text())["scores"]
    assert scores["family_f1"]["value"] == 1


def test_prepare_names_captions_and_options_that_do_not_belong(model, tmp_path, capsys):
    common = ("--midi", tmp_path, "--model", model, "--out", tmp_path / "o")
    call("prepare", "cpt", *common, "--captions", "x", code=2)
    assert "--captions is for sft" in capsys.readouterr().err
    call("prepare", "sft", *common, code=2)
    assert "has no *.mid" in capsys.readouterr().err


WRONG = {
    # what: (arguments, words of the one line)
    "no-model": (["generate", "x", "--out", "o", "--model", "nowhere"], "has no amt.json"),
    "near-verb": (["generat"], "Did you mean 'generate'?"),
    "near-option": (["tokenize", "x", "--window"], "Did you mean '--windows'?"),
    "no-file": (["tokenize", "nothing.mid"], "nothing.mid is not there"),
    "folder": (["inspect", "."], "is a folder"),
    "no-ids": (["detokenize", "nothing.json", "--out", "o.mid"], "nothing.json"),
    "seed": (["inspect", "x", "--seed", "-1"], "a seed is 0 to"),
    "metre": (["detokenize", "x", "--out", "o.mid", "--time_signature", "4"], "No such file"),
    "nothing": (["inspect"], "name MIDI files"),
    "render": (["render", "x.mid"], "name --wav, --roll or both"),
    "server": (["generate", "x", "--out", "o", "--model", "http://127.0.0.1:9"], "--processor"),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_end_in_one_line(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, words = WRONG[what]
    call(*arguments, code=2)
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [("junk", "is no JSON"), ("[1.5]", "one list of whole numbers"), ("[99999]", "no music id")],
)
def test_ids_that_are_none(text, says, tmp_path, capsys):
    (tmp_path / "ids.json").write_text(text)
    call("detokenize", tmp_path / "ids.json", "--out", tmp_path / "o.mid", code=2)
    assert says in capsys.readouterr().err
    assert not (tmp_path / "o.mid").exists()


def test_a_prepared_set_trains(model, tmp_path):
    made = TextMidiProcessor.from_pretrained(model)
    prepare_sft([(tune(), "slow jazz")] * 4, made, length=128).save_to_disk(str(tmp_path / "data"))
    call(
        "train", "--model", model, "--data", tmp_path / "data", "--out", tmp_path / "run",
        "--steps", 2, "--batch_size", 2, "--log_every", 1,
    )  # fmt: skip
    assert (tmp_path / "run" / "model" / "amt.json").is_file()
