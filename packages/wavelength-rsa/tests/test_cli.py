"""The command `wavelength-rsa`: every verb with real models, exit codes, files, pipes, resuming."""

import json
import os
import platform
import re
import resource
import subprocess
import sys

import numpy as np
import pytest

from tenfold_common.errors import UserError
from tenfold_common.lm import ScriptedModel, TransformersModel
from wavelength_rsa import (
    LogprobListener,
    Report,
    RSASpeaker,
    SamplingSpeaker,
    Scale,
    compare,
    evaluate,
    evaluate_listener,
    evaluate_speaker,
    load_items,
)
from wavelength_rsa._version import __version__
from wavelength_rsa.cache import fingerprint
from wavelength_rsa.cli import main
from wavelength_rsa.data import human_baseline
from wavelength_rsa.fitting import fit_games
from wavelength_rsa.human import human_rsa

VERBS = ("listen", "speak", "eval", "report", "human-baseline", "fit-alpha", "play", "demo")
POSITIONS = np.arange(0, 101, 5)
RIGGED = np.exp(POSITIONS / 50) / np.exp(POSITIONS / 50).sum()  # whatever the clue, see conftest
HOT = ("--left=Cold", "--right=Hot")
ROWS = [
    ("Cold", "Hot", "fire", 90, [80, 90, 95, 100]),
    ("Cold", "Hot", "ice", 10, [0, 10, 20, 5]),
    ("Quiet", "Loud", "siren", 85, [90, 95]),
    ("Quiet", "Loud", "library", 5, [5, 15]),
    ("Slow", "Fast", "snail", 5, [0, 5, 10]),
]


def run(*arguments):
    """Run a command that must succeed."""
    assert main([str(a) for a in arguments]) == 0


def refused(capsys, *arguments):
    """Run a command that must be refused, and return its one line."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line.removeprefix("error: ")


def in_process(*arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "wavelength_rsa", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, **more,
    )  # fmt: skip


def write(path, rows):
    names = ("left", "right", "clue", "target", "responses")
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def read(path):
    def refuse(name):
        raise AssertionError(name)

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a space and an umlaut."""
    return tmp_path_factory.mktemp("mit Umläuten und Leerzeichen")


@pytest.fixture(scope="module")
def data(folder):
    return write(folder / "daten ü.jsonl", ROWS)


@pytest.fixture(scope="module")
def reports(folder, data, player, base_player):
    """Two listener reports: chat model and base model that answer alike but for the step."""
    files = folder / "r 1.json", folder / "r 2.json"
    task = ("eval", "--task=listener", f"--data={data}", "--resamples=50")
    run(*task, f"--model={player}", f"--out={files[0]}")
    run(*task, f"--model={base_player}", f"--out={files[1]}", "--normalize=char", "--limit=3")
    return files


@pytest.fixture
def silent(monkeypatch):
    """From now on the model loads but must not be asked."""

    def asked(*arguments, **named):
        raise AssertionError("the model was asked")

    def silence():
        monkeypatch.setattr(TransformersModel, "sample", asked)
        monkeypatch.setattr(TransformersModel, "score_many", asked)

    return silence


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error: what is refused must be refused before."""
    import tenfold_common.lm

    def load(*arguments, **named):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(tenfold_common.lm, "load_text_model", load)


def cpu_seconds(code):
    """Run Python and return what it printed and the processor time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def as_loaded(folder):
    """Return a model as the command loads it: told not to think."""
    return TransformersModel(folder, template_options={"enable_thinking": False})


def halved(folder, out):
    """Write the model again with weights that make it less sure."""
    import torch

    model = TransformersModel(folder)
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(0.5)
    model.model.save_pretrained(out)
    model.tokenizer.save_pretrained(out)
    return out


class TestHelp:
    @pytest.mark.parametrize("verb", [None, *VERBS])
    def test_help_costs_little_and_imports_nothing_heavy(self, verb):
        code = (
            "import sys; from wavelength_rsa.cli import main; "
            f"code = main({[verb] if verb else []} + ['--help']); "
            "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'jinja2', 'sqlite3', "
            "'matplotlib', 'vllm'}; assert not heavy & set(sys.modules); sys.exit(code)"
        )
        runs = [cpu_seconds(code)]
        if runs[0][1] >= 0.3:  # a busy machine must not fail this
            runs.append(cpu_seconds(code))
        assert min(seconds for _, seconds in runs) < 0.3
        assert runs[0][0].startswith(f"usage: wavelength-rsa {verb or ''}".rstrip())

    def test_help_names_every_verb(self, capsys):
        run("--help")
        text = capsys.readouterr().out
        assert all(re.search(rf"^    {verb}\s", text, re.MULTILINE) for verb in VERBS)

    @pytest.mark.parametrize(
        ("verb", "options"),
        [
            ("listen", "--left --right --model --mode --step --normalize --end --json --seed"),
            ("speak", "--target --rsa --alpha --cot --judge --self_play --on_violation --json"),
            ("eval", "--task --data --out --overwrite --cache --judge --limit --resamples"),
            ("report", "--compare --seed"),
            ("human-baseline", "--data --json --splits --seed"),
            ("fit-alpha", "--data --model --folds --json"),
            ("play", "--role --rounds --data --model"),
            ("demo", "--out --seed --full"),
        ],
    )
    def test_help_names_every_option(self, verb, options, capsys):
        run(verb, "--help")
        text = capsys.readouterr().out
        assert all(re.search(rf"^  {option}\b", text, re.M) for option in options.split())

    def test_no_verb_prints_help(self, capsys):
        assert main([]) == 2
        assert "VERB" in capsys.readouterr().out

    def test_version(self, capsys):
        from wavelength_rsa import __version__

        run("--version")
        assert capsys.readouterr().out == f"wavelength-rsa {__version__}\n"

    @pytest.mark.parametrize("arguments", ["eval --help", "report FILE", "human-baseline DATA"])
    def test_reader_that_stops_after_one_line(self, reports, data, arguments):
        arguments = arguments.replace("FILE", f"'{reports[0]}'").replace("DATA", f"--data='{data}'")
        command = f"{sys.executable} -m wavelength_rsa {arguments} | head -1; "
        done = subprocess.run(
            ["bash", "-c", command + "echo ${PIPESTATUS[0]}"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        first, code = done.stdout.splitlines()
        assert first.startswith(("usage: wavelength-rsa eval", "| metric | mean", "5 items on 3"))
        assert code in ("0", "141")  # 0: all was written before the reader left
        assert done.stderr == ""

    def test_reader_that_is_gone(self, reports):
        child = in_process("report", reports[0])
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(60) == 141
        child.stderr.close()


class TestListen:
    def test_by_probabilities(self, player, folder, capsys):
        out = folder / "l 1.json"
        run("listen", f"--model={player}", *HOT, "fire", "ice", f"--json={out}")
        captured = capsys.readouterr()
        assert captured.out == (
            f"fire: mean {RIGGED @ POSITIONS:.1f}, sd 27.3, mode 100\n"
            f"ice: mean {RIGGED @ POSITIONS:.1f}, sd 27.3, mode 100\nwritten: {out}\n"
        )
        assert captured.err == ""  # two prompts are no progress to speak of
        found = read(out)
        assert found["scale"] == ["Cold", "Hot"]
        assert (found["class"], found["model"]) == ("LogprobListener", "player")
        assert [row["clue"] for row in found["clues"]] == ["fire", "ice"]
        for row in found["clues"]:
            np.testing.assert_allclose(row["probs"], RIGGED, atol=1e-4)
            assert row["grid"] == POSITIONS.tolist()
            assert row["mean"] == pytest.approx(RIGGED @ POSITIONS, abs=0.01)

    def test_options_reach_the_listener(self, player, tmp_path):
        out = tmp_path / "l.json"
        options = ("--step=20", "--normalize=pmi", "--end=turn")
        run("listen", f"--model={player}", *HOT, "fire", *options, f"--json={out}")
        found = read(out)
        assert (found["step"], found["normalize"], found["end"].split()) == (20, "pmi", ["<eos>"])
        np.testing.assert_allclose(found["clues"][0]["probs"], np.full(6, 1 / 6), atol=1e-6)

    @pytest.mark.parametrize("mode", ["sample", "cot"])
    def test_by_samples(self, base_player, tmp_path, mode):
        command = ["listen", f"--model={base_player}", *HOT, "fire", f"--mode={mode}"]
        command += ["--num_samples=8", "--max_tokens=9"]
        found = []
        for number, seed in enumerate((1, 1, 2)):
            run(*command, f"--seed={seed}", f"--json={tmp_path / f'{number}.json'}")
            found.append(read(tmp_path / f"{number}.json"))
        assert found[0] == found[1] != found[2]
        assert found[0]["cot"] is (mode == "cot")
        assert (found[0]["num_samples"], found[0]["max_tokens"]) == (8, 9)


class TestSpeak:
    def test_a_pragmatic_speaker_and_a_judge(self, player, base_player, tmp_path, capsys):
        out = tmp_path / "s.json"
        command = ["speak", f"--model={player}", *HOT, "--target=70", "--rsa", "--alpha=2"]
        command += [f"--judge={base_player}", "--on_violation=drop", "--seed=5"]
        run(*command, f"--json={out}")
        found, shown = read(out), capsys.readouterr().out
        model = TransformersModel(player)
        speaker = RSASpeaker(
            SamplingSpeaker(model, on_violation="drop"), LogprobListener(model), alpha=2.0
        )
        wanted = speaker.speak(Scale("Cold", "Hot"), 70, seed=5)
        assert found["clue"] == wanted.clue == shown.splitlines()[0]
        rows = wanted.candidates.to_rows()
        mean = pytest.approx(RIGGED @ POSITIONS, abs=0.01)
        assert found["candidates"] == [{**row, "judged_mean": mean} for row in rows]
        assert (found["target"], found["alpha"], found["class"]) == (70, 2.0, "RSASpeaker")
        assert "judge's mean" in shown
        assert re.search(r"^ +0\.000 .* 75   \(number\)$", shown, re.M)

    def test_a_direct_speaker_says_what_breaks_a_rule(self, base_player, capsys):
        clues = {}
        for seed in range(12):
            run("speak", f"--model={base_player}", *HOT, "--target=5", "--num_candidates=6",
                f"--seed={seed}")  # fmt: skip
            said = capsys.readouterr().out.splitlines()[0]
            clues[said.removesuffix("   (breaks a rule)")] = "breaks" in said
        assert {clue for clue, broken in clues.items() if broken} <= {"75", "hot"}
        assert len(clues) > 2
        assert any(clues.values())

    def test_reasoning_self_play_and_max_tokens(self, player, tmp_path, capsys):
        out = tmp_path / "s.json"
        run("speak", f"--model={player}", *HOT, "--target=5", "--cot", "--self_play",
            "--max_tokens=40", f"--json={out}")  # fmt: skip
        found = read(out)
        assert (found["cot"], found["max_tokens"]) == (True, 40)
        assert all("judged_mean" in row for row in found["candidates"])
        run("speak", f"--model={player}", *HOT, "--target=5", "--max_tokens=7", f"--json={out}")
        assert read(out)["max_tokens"] == 7  # of a direct speaker too

    def test_an_earlier_file_is_replaced_by_a_whole_one(self, player, tmp_path, capsys):
        """As `eval` does not; a command that fails leaves it as it was."""
        out = tmp_path / "s.json"
        out.write_text("dear" * 10_000)
        command = ["speak", f"--model={player}", *HOT, "--num_candidates=2", f"--json={out}"]
        assert "target 47" in refused(capsys, *command, "--target=47")
        assert out.read_text() == "dear" * 10_000
        run(*command, "--target=45")
        first = out.read_bytes()
        assert read(out)["target"] == 45
        run(*command, "--target=45")
        assert out.read_bytes() == first
        assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


class TestEval:
    def test_listener(self, reports, data, player, capsys):
        wanted = evaluate_listener(
            LogprobListener(as_loaded(player)), load_items(data), resamples=50
        )
        assert wanted.settings["models"] == {"listener": [fingerprint(as_loaded(player))]}
        wanted.settings["data"] = "daten ü.jsonl"
        assert reports[0].read_text("utf-8") == wanted.to_json()
        errors = [abs(RIGGED @ POSITIONS - row[3]) for row in ROWS]
        assert [r["mean_error"] for r in wanted.rows] == pytest.approx(errors, abs=0.01)
        read(reports[0])

    def test_both_with_a_judge(self, player, base_player, data, tmp_path, capsys):
        command = ["eval", "--task=both", f"--model={player}", f"--judge={base_player}", "--rsa"]
        command += [f"--data={data}", "--resamples=50", "--num_candidates=8", "--seed=3"]
        run(*command, f"--out={tmp_path / 'run.x.json'}")
        captured = capsys.readouterr()
        files = sorted(path.name for path in tmp_path.iterdir())
        assert files == ["run.x-listener.json", "run.x-speaker.json"]
        assert re.fullmatch(  # the judge is asked about more than a block
            r"(\d\d:\d\d:\d\d INFO (16|20) of 20 prompts\n){2}", captured.err
        )
        assert f"report: {tmp_path / 'run.x-listener.json'}" in captured.out
        model, items = as_loaded(player), load_items(data)
        speaker = RSASpeaker(SamplingSpeaker(model, num_candidates=8), LogprobListener(model))
        judge = LogprobListener(as_loaded(base_player))
        wanted = evaluate_speaker(speaker, items, judge=judge, seed=3, resamples=50)
        wanted.settings["data"] = "daten ü.jsonl"
        assert (tmp_path / "run.x-speaker.json").read_text("utf-8") == wanted.to_json()
        assert wanted.settings["judge"]["model"] == "base"
        assert wanted.notes == ["The speaker imagines a listener of its own model."]
        assert wanted.settings["models"] == {
            "speaker": [fingerprint(model)],
            "imagined listener": [fingerprint(model)],
            "judge": [fingerprint(as_loaded(base_player))],
        }
        assert Report.load(tmp_path / "run.x-listener.json").settings["seed"] == 3

    def test_self_play_is_noted(self, player, data, tmp_path, capsys):
        command = ["eval", "--task=speaker", f"--model={player}", f"--data={data}", "--limit=2"]
        command += ["--resamples=20", "--num_candidates=4"]
        namesake = halved(player, tmp_path / "player")
        judged = "Self-play: the speaker and the judge are the same model."
        imagined = "Self-play: the judge is the listener that the speaker imagines"
        own = "The speaker imagines a listener of its own model."
        for number, (more, notes) in enumerate(
            [
                (["--self_play"], [judged]),
                ([f"--judge={player}"], [judged]),
                (["--self_play", "--rsa"], [imagined, judged, own]),
                ([f"--judge={player}", "--rsa"], [imagined, judged, own]),
                ([f"--judge={namesake}"], []),
                ([f"--judge={namesake}", "--rsa"], [own]),
            ]
        ):
            out = tmp_path / f"{number}.json"
            run(*command, *more, f"--out={out}")
            shown = re.findall("^note: (.*)$", capsys.readouterr().out, re.M)
            assert shown == read(out)["notes"]
            assert len(shown) == len(notes)
            assert all(text.startswith(note) for text, note in zip(shown, notes, strict=True))
            assert read(out)["settings"]["judge"]["model"] == "player"

    @pytest.mark.parametrize("more", [[], ["--mode=sample", "--num_samples=3"]])
    def test_same_seed_and_cache_give_the_same_bytes_and_ask_nothing(
        self, player, base_player, data, tmp_path, silent, more
    ):
        command = ["eval", "--task=both", f"--model={player}", f"--judge={base_player}", *more]
        command += [f"--data={data}", "--resamples=20", "--num_candidates=4", "--seed=2"]
        command += [f"--cache={tmp_path / 'c.db'}", "--rsa"]
        run(*command, f"--out={tmp_path / 'a.json'}")
        silent()
        run(*command, f"--out={tmp_path / 'b.json'}")
        for task in ("listener", "speaker"):
            whole = (tmp_path / f"a-{task}.json").read_bytes()
            assert whole == (tmp_path / f"b-{task}.json").read_bytes()
            assert str(tmp_path).encode() not in whole

    def test_another_seed_is_asked_anew(self, player, data, tmp_path):
        command = ["eval", "--task=listener", f"--model={player}", "--mode=sample"]
        command += [f"--data={data}", "--resamples=20", "--num_samples=4"]
        probs = []
        for seed in (0, 1, 0):
            out = tmp_path / f"{len(probs)}.json"
            run(*command, f"--seed={seed}", f"--cache={tmp_path / 'c.db'}", f"--out={out}")
            probs.append([row["probs"] for row in read(out)["rows"]])
        assert probs[0] == probs[2] != probs[1]

    def test_other_weights_are_asked_anew(self, player, data, tmp_path):
        """A checkpoint trained further, in a folder of the same name."""
        probs = []
        for folder in (player, halved(player, tmp_path / "player"), player):
            out = tmp_path / f"{len(probs)}.json"
            run("eval", "--task=listener", f"--model={folder}", f"--data={data}", f"--out={out}",
                "--resamples=20", f"--cache={tmp_path / 'c.db'}")  # fmt: skip
            probs.append([row["probs"] for row in read(out)["rows"]])
        assert probs[0] == probs[2]
        flatter = RIGGED**0.5 / (RIGGED**0.5).sum()
        np.testing.assert_allclose(probs[1], [flatter] * len(ROWS), atol=1e-4)

    def test_an_interrupted_run_goes_on(self, player, data, tmp_path, monkeypatch, capsys):
        """Ctrl-C in the second block of 16 prompts: 130 and no report; the first is kept."""
        items = write(tmp_path / "many.jsonl", [(f"L{i}", "R", "x", 50, None) for i in range(20)])
        command = ["eval", "--task=listener", f"--model={player}", "--mode=sample", "--seed=7"]
        command += [f"--data={items}", "--resamples=20", "--num_samples=2"]
        command += [f"--cache={tmp_path / 'c.db'}", f"--out={tmp_path / 'r.json'}"]
        honest, asked = TransformersModel.sample, []

        def sample(self, prompts, **named):
            asked.append(len(prompts))
            if len(asked) == 2:
                raise KeyboardInterrupt
            return honest(self, prompts, **named)

        monkeypatch.setattr(TransformersModel, "sample", sample)
        assert main(command) == 130
        progress, last = capsys.readouterr().err.splitlines()
        assert progress.endswith("INFO 16 of 20 prompts")
        assert last == "interrupted"
        assert not (tmp_path / "r.json").exists()
        run(*command)
        assert asked[:3] == [16, 4, 4]  # then the unreadable replies again
        resumed = (tmp_path / "r.json").read_bytes()
        (tmp_path / "c.db").unlink()
        run(*command, "--overwrite")
        assert (tmp_path / "r.json").read_bytes() == resumed

    @pytest.mark.parametrize("task", ["listener", "both"])
    def test_a_report_is_replaced_on_request_only(
        self, player, base_player, data, tmp_path, capsys, no_model, monkeypatch, task
    ):
        name = "r.json" if task == "listener" else "r-speaker.json"
        (tmp_path / name).write_text("dear")
        command = ["eval", f"--task={task}", f"--model={player}", f"--data={data}", "--limit=2"]
        command += ["--self_play", "--num_candidates=2"] if task == "both" else []
        command += [f"--out={tmp_path / 'r.json'}", "--resamples=20"]
        assert f"{name} exists" in refused(capsys, *command)
        assert [p.name for p in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_text() == "dear"
        monkeypatch.undo()
        run(*command, "--overwrite")
        assert read(tmp_path / name)["task"] == ("listener" if task == "listener" else "speaker")

    def test_a_listener_that_reasons_does_so_with_the_alpha_given(self, player, data, tmp_path):
        out = tmp_path / "r.json"
        run(
            "eval", "--task=listener", f"--model={player}", f"--data={data}", f"--out={out}",
            "--limit=1", "--resamples=20", "--rsa_listener", "--alpha=4", "--num_candidates=2",
        )  # fmt: skip
        listener = read(out)["settings"]["listener"]
        assert (listener["class"], listener["alpha"]) == ("RSAListener", 4.0)
        assert listener["alternatives"]["num_candidates"] == 2

    def test_speaker_and_judge_are_loaded_each_by_its_own_options(
        self, data, tmp_path, capsys, monkeypatch
    ):
        asked = []

        def load(spec, backend, **options):
            asked.append((spec, backend, options.get("model"), options.get("api_key_env")))
            if len(asked) == 2:
                raise UserError("that is enough")
            return ScriptedModel()

        monkeypatch.setattr("tenfold_common.lm.load_text_model", load)
        refused(
            capsys, "eval", "--task=speaker", "--model=http://a", "--model_name=one",
            "--api_key_env=A", "--judge=http://b", "--judge_backend=server",
            "--judge_model_name=two", "--judge_api_key_env=B", f"--data={data}",
            f"--out={tmp_path / 'r.json'}",
        )  # fmt: skip
        assert asked == [("http://a", "auto", "one", "A"), ("http://b", "server", "two", "B")]

    def test_speakers_need_a_judge(self, data, tmp_path, capsys, no_model):
        command = ["eval", "--model=m", f"--data={data}", f"--out={tmp_path / 'r.json'}"]
        for task in ("speaker", "both"):
            assert "--judge MODEL" in refused(capsys, *command, f"--task={task}")
            line = refused(capsys, *command, f"--task={task}", "--judge=m", "--self_play")
            assert "needs one judge" in line
        for option in ("--judge=m", "--self_play", "--rsa"):
            assert "for --task speaker" in refused(capsys, *command, "--task=listener", option)
        assert list(tmp_path.iterdir()) == []


class TestReport:
    def test_shows_what_eval_showed(self, reports, capsys):
        run("report", reports[0])
        assert capsys.readouterr().out == Report.load(reports[0]).table() + "\n"

    def test_compare_pairs_rows_by_what_they_are_about(self, reports, tmp_path, capsys):
        first, second = map(Report.load, reports)
        run("report", reports[0], "--compare", reports[1], "--seed=3")
        out = capsys.readouterr().out
        head = out.splitlines()[:3]
        assert head[0] == f"{reports[0]} less {reports[1]}"
        assert head[1] == ("3 rows on 2 concept pairs; left out: 2 of the first, 0 of the second")
        assert head[2].split() == ["metric", "mean", "95", "%", "interval"]
        wanted = compare(first, second, seed=3)["mean_error"]
        assert wanted.value != 0
        line = f"mean_error  *{wanted.value:.3f}  *{wanted.low:.3f} to {wanted.high:.3f}"
        assert re.search(line, out)
        values = json.loads(reports[1].read_text("utf-8"))
        values["rows"].reverse()
        (tmp_path / "reversed.json").write_text(json.dumps(values))
        run("report", reports[0], "--compare", tmp_path / "reversed.json", "--seed=3")
        assert capsys.readouterr().out.splitlines()[1:] == out.splitlines()[1:]
        run("report", reports[1], "--compare", reports[0])
        text = "3 rows on 2 concept pairs; left out: 0 of the first, 2 of the second"
        assert capsys.readouterr().out.splitlines()[1] == text
        run("report", reports[0], "--compare", reports[0])
        text = "5 rows on 3 concept pairs; left out: 0 of the first, 0 of the second"
        assert capsys.readouterr().out.splitlines()[1] == text

    def test_compare_says_what_differs(self, reports, tmp_path, capsys, monkeypatch):
        values = json.loads(reports[0].read_text("utf-8"))
        values["settings"]["listener"]["step"] = 1
        values["notes"] = ["Self-play: beware."]
        (tmp_path / "other.json").write_text(json.dumps(values))
        run("report", reports[0], "--compare", tmp_path / "other.json")
        lines = capsys.readouterr().out.splitlines()
        assert "differs in listener.step: 5, 1" in lines
        assert lines[-1] == f"note on {tmp_path / 'other.json'}: Self-play: beware."
        seeds = []
        real = evaluate.compare
        monkeypatch.setattr(
            evaluate, "compare", lambda *a, seed: seeds.append(seed) or real(*a, seed=seed)
        )
        run("report", reports[0], "--compare", reports[0], "--seed=7")
        assert seeds == [7]

    def test_files_of_a_model_are_not_replaced(self, player, capsys):
        before = (player / "config.json").read_bytes()
        line = refused(
            capsys, "listen", f"--model={player}", "--left=Cold", "--right=Hot", "fire",
            f"--json={player / 'config.json'}",
        )  # fmt: skip
        assert "lies in the folder of a model" in line
        assert (player / "config.json").read_bytes() == before


class TestPeople:
    def test_human_baseline(self, data, tmp_path, capsys):
        out = tmp_path / "h.json"
        run("human-baseline", f"--data={data}", f"--json={out}", "--splits=3", "--seed=4")
        items, found = load_items(data), read(out)
        assert list(found) == ["data", "version", "environment", "baseline", "rsa"]
        assert (found["data"], found["version"]) == ("daten ü.jsonl", __version__)
        assert found["environment"]["python"] == platform.python_version()
        wanted = [human_baseline(items, seed=4), human_rsa(items, splits=3, seed=4)]
        assert [found["baseline"], found["rsa"]] == json.loads(json.dumps(wanted))
        shown = capsys.readouterr().out
        assert shown.startswith("5 items on 3 concept pairs, 15 responses")
        value = found["baseline"]["rows"]["always_50"]["mean_error"]
        cell = f"{value['value']:.2f} ({value['low']:.2f}, {value['high']:.2f})"
        assert re.search(rf"^always 50 +{re.escape(cell)} ", shown, re.M)
        alphas = re.findall(r"^ +([0-9.]+) .*(?:helps|hurts|not clear)$", shown, re.M)
        assert alphas == ["0.5", "1", "2", "4", "8"]

    @pytest.mark.realdata
    def test_the_published_data(self, data_folder, tmp_path, capsys):
        out = tmp_path / "h.json"
        file = data_folder / "wavelength" / "data.csv"
        run("human-baseline", f"--data={file}", f"--json={out}", "--splits=2")
        rows = read(out)["baseline"]["rows"]
        assert rows["humans"]["mean_error"]["value"] == pytest.approx(7.23, abs=0.005)
        assert rows["single_human"]["mean_error"]["value"] == pytest.approx(14.27, abs=0.005)
        assert "100 items on 50 concept pairs, 4000 responses" in capsys.readouterr().out

    def test_fit_alpha_to_people_and_to_a_model(self, data, player, tmp_path, capsys):
        out = tmp_path / "f.json"
        run("fit-alpha", f"--data={data}", f"--json={out}", "--folds=2", "--seed=1")
        found, wanted = read(out), fit_games(load_items(data), folds=2, seed=1)
        assert (found["alpha"], len(found["folds"])) == (wanted.alpha, 2)
        assert found["cv_log_likelihood"] == wanted.cv_log_likelihood
        assert (found["listener"], found["data"], found["seed"]) == ("people", "daten ü.jsonl", 1)
        shown = capsys.readouterr().out
        assert shown.startswith(f"alpha {wanted.alpha:.3f} ({wanted.low:.3f} to {wanted.high:.3f})")
        # half of 4, 4, 2, 2 and 3 responses makes the listener, the larger half is explained
        assert f"{wanted.log_likelihood / 8:.4f}" in shown
        run("fit-alpha", f"--data={data}", f"--json={out}", f"--model={player}", "--step=10")
        listener = LogprobListener(TransformersModel(player), step=10)
        wanted = fit_games(load_items(data), listener=listener)
        assert read(out)["alpha"] == pytest.approx(wanted.alpha, rel=1e-6)
        assert read(out)["listener"]["step"] == 10
        assert f"{wanted.log_likelihood / 15:.4f}" in capsys.readouterr().out


class TestLoading:
    def test_remote_code_is_only_run_on_request(self, player, tmp_path, capsys):
        from shutil import copytree

        folder = copytree(player, tmp_path / "own")
        config = read(folder / "config.json")
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        line = refused(capsys, "listen", f"--model={folder}", *HOT, "fire")
        assert "custom code" in line or "trust_remote_code" in line
        assert not (tmp_path / "ran").exists()
