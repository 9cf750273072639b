"""The command: every verb, what it writes, and one line with exit code 2 for what is wrong."""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk

from midi_llm import evaluation
from midi_llm.cli import METRICS, _parser, main
from midi_llm.data import prepare_sft
from midi_llm.decode import MidiLM
from midi_llm.midi_read import read_notes, read_score
from midi_llm.midi_write import Style, style_of_score, write_midi
from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
from midi_llm.notes import Notes
from midi_llm.train import TrainConfig
from midi_llm.train import train as fit
from midi_llm.vocab import AMTConfig
from tenfold_common.errors import UserError
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


def asked(folder, *rows):
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "asked.jsonl"


def evaluated(*arguments, folder):
    call("evaluate", *arguments, "--resamples", 9, "--json", folder / "report.json")
    return json.loads((folder / "report.json").read_text())


@pytest.fixture
def music(tmp_path):
    """Make two outputs whose real pieces sort the other way, and a pool of three."""
    for name, instrument in (
        ("a", 0), ("b", 40), ("real/2", 0), ("real/1", 40), ("pool/x", 0), ("pool/deep/y", 9),
    ):  # fmt: skip
        file = tmp_path / f"{name}.mid"
        file.parent.mkdir(exist_ok=True)
        write_midi(Notes.of(np.arange(9) / 4, 0.2, instrument, 60), file)
    (tmp_path / "pool/deep/y.mid").rename(tmp_path / "pool/deep/y.MIDI")
    (tmp_path / "pool/z.MID").write_bytes((tmp_path / "pool/x.mid").read_bytes())
    (tmp_path / "pool/z.txt").write_text("no music")
    return tmp_path


def test_evaluate_pairs_by_the_lines_and_pools_a_folder(music, capsys):
    rows = [
        {"file": "a.mid", "caption": "piano", "real": "real/2.mid", "wall_seconds": 1},
        {"file": "b.mid", "caption": "violin", "real": "real/1.mid", "wall_seconds": 3},
    ]
    file = asked(music, *rows)
    found = evaluated(
        file, "--metrics", "control", "distribution", "rtf", "--real", music / "pool", folder=music
    )
    assert found["scores"]["instrument_exact"]["real"] == 1
    assert found["scores"]["RTF"]["value"] == pytest.approx(2 * 2.2 / 4, abs=0.01)
    assert (found["settings"]["references"], found["settings"]["real"]) == (2, 3)
    found = evaluated(file, "--metrics", "distribution", "rtf", "--wall_seconds", 2, folder=music)
    assert found["settings"]["real"] == 2
    assert found["scores"]["RTF"]["value"] == pytest.approx(2.2, abs=0.01)

    bare = asked(music, *({k: row[k] for k in ("file", "caption")} for row in rows))
    found = evaluated(bare, "--metrics", *METRICS[:3], "--real", music / "pool", folder=music)
    assert found["scores"]["instrument_exact"]["real"] is None
    assert found["scores"]["CR"]["real"] > 1
    capsys.readouterr()
    for metric, says in (
        ("distribution", "distribution compares with real music"), ("fad", "fad compares with"),
        ("rtf", "rtf needs --wall_seconds"),
    ):  # fmt: skip
        call("evaluate", bare, "--metrics", metric, code=2)
        assert says in capsys.readouterr().err
    call("evaluate", bare, "--real", music / "real" / "none", code=2)
    assert "is no folder" in capsys.readouterr().err
    del rows[0]["real"]
    call("evaluate", asked(music, *rows), code=2)
    assert "1 of 2 lines have real" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::midi_llm.render.PreviewWarning")
def test_evaluate_hears_pieces_and_names_the_one_it_cannot(music, capsys):
    rows = [{"file": f"{name}.mid", "caption": "piano"} for name in "ab"]
    fad = ("--metrics", "fad", "--shrinkage", 0.5, "--real", music / "pool")
    found = evaluated(asked(music, *rows), *fad, folder=music)
    assert next(iter(found["scores"].values()))["value"] > 0
    paired = asked(music, *({**row, "real": row["file"]} for row in rows))
    found = evaluated(paired, *fad[:4], folder=music)
    assert next(iter(found["scores"].values()))["value"] == pytest.approx(0, abs=1e-6)
    write_midi(Notes.of([], 0.0, 0, 0), music / "pool" / "deep" / "silent.mid")
    capsys.readouterr()
    call("evaluate", music / "asked.jsonl", *fad, code=2)
    err = capsys.readouterr().err
    assert "silent.mid cannot be heard: the piece has no notes" in err
    assert len(err.splitlines()) == 1


def test_evaluate_offers_every_metric():
    assert METRICS == evaluation.METRICS


def test_render_draws_what_sounds(midi, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs midi-llm[plot]")
    preview = ("render", midi, "--engine", "preview", "--spectrogram")
    call(*preview, tmp_path / "alone.png")
    call(*preview, tmp_path / "a.png", "--wav", tmp_path / "a.wav", "--roll", tmp_path / "r.png")
    written = capsys.readouterr().out.split()
    assert written == [str(tmp_path / n) for n in ("alone.png", "a.wav", "r.png", "a.png")]
    alone, beside = ((tmp_path / name).read_bytes() for name in ("alone.png", "a.png"))
    assert alone == beside
    assert alone[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("stage", "options", "says"),
    [
        ("cpt", ["--captions", "x"], "--captions is for sft"),
        ("cpt", ["--copies", 1], "--copies is for sft"),
        ("cpt", ["--dropout", 0], "--dropout is for sft"),
        ("sft", ["--text", "x"], "--text is for cpt"),
        ("sft", ["--exclude", "x"], "--exclude is for cpt"),
        ("sft", ["--dropout", 2], "--dropout must be 0 to 1"),
        ("sft", ["--length", 3], "--length must be at least 4"),
        ("sft", [], "has no *.mid"),
    ],
)
def test_prepare_refuses_what_does_not_belong(stage, options, says, tmp_path, capsys):
    (tmp_path / "midi").mkdir()
    common = ("--midi", tmp_path / "midi", "--model", "nowhere", "--out", tmp_path / "o")
    call("prepare", stage, *common, *options, code=2)
    assert says in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.fixture
def folder(tmp_path):
    """Three tunes, one of them in a folder of its own."""
    for name in ("a.mid", "b.mid", "sub/c.mid"):
        (tmp_path / "midi" / name).parent.mkdir(parents=True, exist_ok=True)
        write_midi(tune(), tmp_path / "midi" / name)
    return tmp_path / "midi"


def test_prepare_says_what_was_used_and_what_left_out(model, folder, tmp_path, capsys):
    common = ("--midi", folder, "--model", model, "--length", 128, "--all")
    rows = [{"file": name, "caption": "slow jazz"} for name in ("./a.mid", "sub/c.mid", "gone.mid")]
    (tmp_path / "captions").write_text("\n\n".join(map(json.dumps, rows)))
    (folder / "a.mid").write_text("junk")
    call(
        "prepare", "sft", *common, "--captions", tmp_path / "captions", "--out", tmp_path / "sft",
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "1 rows of 128 ids from 1 of 2 pieces" in out
    for reason in ("1 captions without a file", "1 not readable", "1 without a caption"):
        assert f"left out: {reason}" in out
    assert json.loads((tmp_path / "r.json").read_text())["pieces"] == 1
    (tmp_path / "held").write_text("sub/c.mid\r\n./gone.mid\n\n")
    call("prepare", "cpt", *common, "--exclude", tmp_path / "held", "--out", tmp_path / "cpt")
    out = capsys.readouterr().out
    assert "from 1 of 2 pieces" in out
    assert "left out: 1 held out by --exclude" in out
    assert "left out: 1 named by --exclude, but not in the folder" in out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"file": "a.mid", "caption": "fast"}', "a.mid has a caption already"),
        ('{"file": "./a.mid", "caption": "fast"}', "a.mid has a caption already"),
        ('{"file": "/a.mid", "caption": "fast"}', "relative to --midi, not '/a.mid'"),
        ('{"file": 5, "caption": "fast"}', "relative to --midi, not 5"),
        ('{"file": "b.mid", "caption": " "}', "must be a text, not ' '"),
        ('{"file": "b.mid", "caption": null}', "must be a text, not None"),
        ('{"file": "b.mid"}', "needs file and caption"),
        ("\xff", "no JSON"),
    ],
)
def test_a_doubtful_caption_is_an_error_with_its_line(line, says, model, folder, tmp_path, capsys):
    good = '{"file": "a.mid", "caption": "slow"}'
    (tmp_path / "captions").write_bytes(f"{good}\n\n{line}\n".encode("latin-1"))
    call(
        "prepare", "sft", "--midi", folder, "--model", model, "--out", tmp_path / "o",
        "--captions", tmp_path / "captions", code=2,
    )  # fmt: skip
    err = capsys.readouterr().err
    assert "captions, line 3: " in err
    assert says in err
    assert len(err.splitlines()) == 1


def test_captions_of_other_files_are_an_error(model, folder, tmp_path, capsys):
    (tmp_path / "captions").write_text('{"file": "midi/a.mid", "caption": "slow"}')
    call(
        "prepare", "sft", "--midi", folder, "--model", model, "--out", tmp_path / "o",
        "--captions", tmp_path / "captions", code=2,
    )  # fmt: skip
    assert "has 'midi/a.mid'" in capsys.readouterr().err


def test_prepare_replaces_old_data_only_by_whole_new(model, folder, tmp_path, capsys):
    from datasets import load_from_disk

    out = tmp_path / "o"
    command = ("prepare", "cpt", "--midi", folder, "--model", model, "--out", out)
    call(*command, "--all", "--length", 128)
    call(*command, "--all", code=2)
    assert "is not empty" in capsys.readouterr().err
    call(*command, "--overwrite", code=2)  # too short, all of them
    assert "(3 fewer than 100 notes)" in capsys.readouterr().err
    assert len(load_from_disk(str(out))[0]["input_ids"]) == 128
    call(*command, "--all", "--overwrite", "--length", 64)
    assert len(load_from_disk(str(out))[0]["input_ids"]) == 64
    assert {path.name for path in tmp_path.iterdir()} == {"midi", "o"}  # nothing else is left
    call(*command[:-1], tmp_path, "--all", "--overwrite", code=2)
    assert "will not overwrite" in capsys.readouterr().err
    assert (folder / "a.mid").exists()


def test_serve(model, tmp_path, monkeypatch, capsys):
    uvicorn = pytest.importorskip("uvicorn", reason="needs midi-llm[serve]")
    pytest.importorskip("fastapi", reason="needs midi-llm[serve]")
    httpx = pytest.importorskip("httpx", reason="asks the server for what it was told")
    seen = []

    async def health(app, address):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=address) as client:
            return (await client.get("/api/health")).json()

    def run(server, sockets):
        address = json.loads((tmp_path / "ready.json").read_text())["address"]
        assert address == f"http://127.0.0.1:{sockets[0].getsockname()[1]}/"
        assert capsys.readouterr().out.splitlines()[0] == f"serving {address} until Ctrl-C"
        app = server.config.app
        seen.append((app.state.studio.soundfont, asyncio.run(health(app, address))))

    monkeypatch.setattr(uvicorn.Server, "run", run)
    (tmp_path / "a.sf2").write_bytes(b"RIFF    sfbk")
    common = ("serve", "--model", model, "--port", 0)
    call(
        *common, "--json", tmp_path / "ready.json", "--max_queue", 1, "--max_notes", 9,
        "--max_upload", 1000, "--soundfont", tmp_path / "a.sf2", "--seed", 3,
    )  # fmt: skip
    [(soundfont, told)] = seen
    assert soundfont == str(tmp_path / "a.sf2")
    wanted = {"max_queue": 1, "max_notes": 9, "max_upload": 1000, "seed": 3}
    assert {name: told[name] for name in wanted} == wanted
    call(*common, "--max_upload", 0, code=2)
    assert "max_upload must be" in capsys.readouterr().err
    call(*common, "--soundfont", tmp_path / "none.sf2", code=2)
    assert "none.sf2" in capsys.readouterr().err
    assert len(seen) == 1


WRONG = {
    # what: (arguments, words of the one line)
    "no-model": (["generate", "x", "--out", "o", "--model", "nowhere"], "has no amt.json"),
    "near-verb": (["generat"], "Did you mean 'generate'?"),
    "near-option": (["tokenize", "x", "--window"], "Did you mean '--windows'?"),
    "no-file": (["tokenize", "nothing.mid"], "nothing.mid is not there"),
    "folder": (["inspect", "."], "is a folder"),
    "no-ids": (["detokenize", "nothing.json", "--out", "o.mid"], "nothing.json"),
    "seed": (["inspect", "x", "--seed", "-1"], "a whole number from 0 to"),
    "metre": (["detokenize", "x", "--out", "o.mid", "--time_signature", "4"], "No such file"),
    "nothing": (["inspect"], "name MIDI files"),
    "render": (["render", "x.mid"], "name --wav, --roll or --spectrogram"),
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


def test_what_is_read_is_never_overwritten(model, midi, tmp_path, capsys):
    home = tmp_path / "home"
    shutil.copytree(model, home / "model")
    (home / "midi").mkdir()
    shutil.copy(midi, home / "midi" / "a.mid")
    before = sorted(p.relative_to(home) for p in home.rglob("*"))
    expand = ("expand", "--small", "--base", home / "model")
    prepare = ("prepare", "sft", "--all", "--midi", home / "midi", "--model", home / "model")
    for out in (home, home / "model"):
        call(*expand, "--out", out, "--overwrite", code=2)
        assert "will not overwrite" in capsys.readouterr().err
    for out in (home, home / "model", home / "midi"):
        call(*prepare, "--out", out, "--overwrite", code=2)
        assert "will not overwrite" in capsys.readouterr().err
    call(*prepare, "--out", home / "data", "--length", 256)
    train = ("train", "--model", home / "model", "--data", home / "data", "--steps", 1)
    for out in (home, home / "model", home / "data"):
        call(*train, "--out", out, "--overwrite", code=2)
        assert "will not overwrite" in capsys.readouterr().err
        loaded = MidiLM.from_pretrained(home / "model", device="cpu")
        data: Any = load_from_disk(str(home / "data"))
        with pytest.raises(UserError, match="will not overwrite"):  # in Python as well
            fit(loaded.model, loaded.processor, data, out, TrainConfig(steps=1), overwrite=True)
    after = sorted(p.relative_to(home) for p in home.rglob("*") if "data" not in p.parts)
    assert after == before
    MidiLM.from_pretrained(home / "model", device="cpu")


def test_a_failing_expand_leaves_the_old_folder(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept.txt").write_text("x")
    call("expand", "--base", tmp_path / "none", "--out", tmp_path / "old", "--overwrite", code=2)
    assert (tmp_path / "old" / "kept.txt").exists()


@pytest.mark.parametrize("verb", ["generate", "infill", "continue", "serve"])
def test_every_verb_with_a_model_takes_every_engine(verb, model, midi, tmp_path, capsys):
    asked = {
        "generate": ["x", "--out", tmp_path / "out"],
        "infill": [midi, "--prompt", "x", "--start", 1, "--end", 2, "--out", tmp_path / "a.mid"],
        "continue": [midi, "--prompt", "x", "--seconds", 1, "--out", tmp_path / "a.mid"],
        "serve": ["--port", 0],
    }[verb]
    nowhere = "http://127.0.0.1:9/v1"
    call(verb, *asked, "--model", nowhere, code=2)
    assert "--processor" in capsys.readouterr().err
    call(verb, *asked, "--model", nowhere, "--processor", model, code=2)
    assert "127.0.0.1:9" in capsys.readouterr().err


def test_a_changed_file_keeps_its_tempo_metre_and_key(tmp_path):
    save_model(tmp_path / "model", ANTICIPATING)
    style = Style(tempo=90, time_signature=(3, 4), key="D minor")
    write_midi(tune(), tmp_path / "tune.mid", style)
    named = ("--prompt", "slow jazz", "--model", tmp_path / "model", "--max_notes", 4)
    one, two = tmp_path / "one.mid", tmp_path / "two.mid"
    call("continue", tmp_path / "tune.mid", "--seconds", 3, "--out", one, *named)
    call(
        "infill", tmp_path / "tune.mid", "--start", 2, "--end", 4, "--out", two, *named,
        "--tempo", 100, "--time_signature", "6/8",
    )  # fmt: skip
    kept, said = (style_of_score(read_score(file)) for file in (one, two))
    assert kept.tempo == pytest.approx(90)
    assert (kept.time_signature, kept.key) == ((3, 4), "D minor")
    assert said.tempo == pytest.approx(100)
    assert (said.time_signature, said.key) == ((6, 8), "D minor")
    assert len(tune()) < len(read_notes(one)) <= len(tune()) + 4


def test_ids_come_back_on_the_grid_they_were_written_on(midi, tmp_path, capsys):
    call("tokenize", midi, "--small", "--json", tmp_path / "ids.json")
    call("detokenize", tmp_path / "ids.json", "--out", tmp_path / "back.mid")
    back = read_notes(tmp_path / "back.mid")
    assert back.onset == pytest.approx(tune().onset, abs=0.03)
    assert len(back) == len(tune())
    written = json.loads((tmp_path / "ids.json").read_text())
    (tmp_path / "two.json").write_text(json.dumps({**written, "ids": written["ids"] * 2}))
    call("detokenize", tmp_path / "two.json", "--out", tmp_path / "no.mid", code=2)
    assert "2 windows" in capsys.readouterr().err
    (tmp_path / "true.json").write_text("[true, 0, 1]")
    call("detokenize", tmp_path / "true.json", "--out", tmp_path / "no.mid", code=2)
    assert "whole numbers" in capsys.readouterr().err


def test_the_list_of_instruments_is_written_too(tmp_path):
    call("inspect", "--instruments", "--json", tmp_path / "all.json")
    found = json.loads((tmp_path / "all.json").read_text())["instruments"]
    assert len(found) == 129
    assert found["128"] == "drums"


def test_training_is_in_float32_whatever_the_folder_holds(model, midi, tmp_path, monkeypatch):
    loaded = MidiLM.from_pretrained(model, device="cpu", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "half")
    (tmp_path / "midi").mkdir()
    shutil.copy(midi, tmp_path / "midi" / "a.mid")
    call(
        "prepare", "sft", "--all", "--midi", tmp_path / "midi", "--model", model, "--out",
        tmp_path / "data", "--length", 256,
    )  # fmt: skip
    seen = []

    def stop(trained, *arguments, **named):
        seen.append(trained.dtype)
        raise UserError("seen")

    monkeypatch.setattr("midi_llm.train.train", stop)
    named = ("--data", tmp_path / "data", "--out", tmp_path / "run", "--steps", 1)
    call("train", "--model", tmp_path / "half", *named, code=2)
    assert seen == [torch.float32]


def test_adapters_without_peft_are_one_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("tenfold_common.optional.is_available", lambda name: name != "peft")
    data = Dataset.from_dict({"input_ids": [[1]], "labels": [[1]], "position_ids": [[0]]})
    data.save_to_disk(str(tmp_path / "data"))
    named = ("--data", tmp_path / "data", "--out", tmp_path / "run", "--lora", 4)
    call("train", "--model", model, *named, code=2)
    assert "midi-llm[peft]" in capsys.readouterr().err


def test_rows_of_an_amt_checkpoint(model, tmp_path, capsys):
    grid = AMTConfig.small()
    amt = tiny_llama(grid.size, hidden=32, layers=1, heads=2, kv_heads=2, seed=5)
    amt.save_pretrained(tmp_path / "amt")
    base = tiny_llama(7, hidden=32, layers=1, heads=2, kv_heads=2)
    base.save_pretrained(tmp_path / "base")
    word_tokenizer(["a", "b", "c"]).save_pretrained(tmp_path / "base")
    asked = ("expand", "--small", "--base", tmp_path / "base", "--out", tmp_path / "out")
    call(*asked, "--init", "amt", code=2)
    assert "source" in capsys.readouterr().err
    call(*asked, "--init", "amt", "--source", tmp_path / "amt")
    found = MidiLM.from_pretrained(tmp_path / "out", device="cpu")
    rows: Any = found.model.get_input_embeddings()
    wanted: Any = amt.get_input_embeddings()
    assert torch.equal(rows.weight[found.processor.offset :][: grid.size], wanted.weight)


def test_no_output_is_an_input_or_another_output(model, midi, tmp_path, capsys):
    before, config = Path(midi).read_bytes(), Path(model) / "config.json"
    assert config.exists()
    named = ("--prompt", "x", "--model", model)
    for arguments in (
        ("tokenize", midi, "--json", midi),
        ("inspect", midi, "--json", midi),
        ("caption", midi, "--json", midi),
        ("render", midi, "--wav", midi),
        ("continue", midi, "--seconds", 1, "--out", midi, *named),
        ("infill", midi, "--start", 1, "--end", 2, "--out", midi, *named),
        ("generate", "x", "--out", tmp_path / "out", "--model", model, "--json", config),
        ("render", midi, "--wav", tmp_path / "a.wav", "--roll", tmp_path / "a.wav"),
    ):
        call(*arguments, code=2)
        assert "would be overwritten" in capsys.readouterr().err, arguments
    assert Path(midi).read_bytes() == before
    assert not (tmp_path / "a.wav").exists()


def test_folders_and_texts_that_are_none(model, midi, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    named = ("--model", model)
    for arguments, says in (
        (("generate", "x", "--out", tmp_path / "file", *named), "is a file"),
        (("generate", "p\udcffq", "--out", tmp_path / "out", *named), "no text from letter 1 on"),
        (("generate", "x", "--out", tmp_path / "out", "--key", "H major", *named), "no key"),
        (("convert", tmp_path / "none", "--out", tmp_path / "out"), "is no folder"),
        (("expand", "--base", model, "--out", tmp_path / "out", "--source", "x"), "--init amt"),
    ):
        call(*arguments, code=2)
        assert says in capsys.readouterr().err, arguments
    assert not (tmp_path / "out").exists()
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    call("generate", "x", "--out", tmp_path / "out", "--model", broken, code=2)
    assert "holds no model that can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "options", "says"),
    [
        ({"caption": None}, [], "line 1: the caption must be a text"),
        ({"caption": " "}, [], "line 1: the caption must be a text"),
        ({"attributes": {"key": "C major"}}, [], "line 1: attributes lack"),
        ({"caption": "x"}, ["--wall_seconds", 3], "for rtf and would change nothing"),
        ({"caption": "x"}, ["--shrinkage", 0.5], "for fad and would change nothing"),
        ({"caption": "x"}, ["--metrics", "rtf", "--wall_seconds", 0], "must be over 0"),
        ({"caption": "x"}, ["--metrics", "fad", "--shrinkage", 5, "--real", "."], "0 to 1"),
    ],
)
def test_requests_that_ask_for_nothing(line, options, says, midi, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.jsonl").write_text(json.dumps({"file": "tune.mid", **line}))
    call("evaluate", "asked.jsonl", *options, code=2)
    assert says in capsys.readouterr().err
