"""The command `rlcr`: every verb, exit codes, and one clear line for every wrong input."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from rlcr import CalibrationWarning, calibration_report, render_completion
from rlcr.cli import main
from rlcr.metrics import MetricsWarning
from tenfold_common.lm import ServerModel
from tenfold_common.tiny import byte_tokenizer, tiny_llama

FULL = render_completion("4", "0.9")
VERBS = ("train", "eval", "score", "plot", "vote", "data", "toy", "demo")
SMALL = [
    "--model=toy", "--data=toy", "--device=cpu", "--seed=1", "--training_args",
    "per_device_train_batch_size=16", "logging_steps=1",
]  # fmt: skip


def refused(capsys, *arguments):
    """Run a command that must be refused, and return its one line."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    lines = captured.err.splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[-1].removeprefix("error: ")


def in_process(*arguments, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rlcr", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a space and an umlaut."""
    return tmp_path_factory.mktemp("mit Umläuten und Leerzeichen")


@pytest.fixture(scope="module")
def predictions(folder):
    random = np.random.default_rng(1)
    q = random.random(40).round(2)
    right = random.random(40) < q
    rows = [{"confidence": a, "correct": bool(b)} for a, b in zip(q.tolist(), right, strict=True)]
    rows += [{"confidence": None, "correct": True}, {"confidence": 0.5, "correct": None}]
    return write(folder / "vorhersägen 1.jsonl", rows)


@pytest.fixture(scope="module")
def model(folder):
    """A model whose next letter depends on the last one alone: y, answer 4, confidence 85."""
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    network = tiny_llama(size, hidden=512, layers=1, heads=8, kv_heads=8)
    chain = {"=": "y", "y": "<eos>", ">": "4", "4": "<eos>", ":": "8", "8": "5", "5": "<eos>"}
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
        network.model.norm.weight.fill_(1)
        network.model.embed_tokens.weight[:, :size] = torch.eye(size)
        for last, following in chain.items():
            places = tokenizer(following).input_ids[0], tokenizer(last).input_ids[0]
            network.lm_head.weight[places] = 1
    network.save_pretrained(folder / "modell ü")
    tokenizer.save_pretrained(folder / "modell ü")
    return folder / "modell ü"


def cpu_seconds(code):
    """Run Python and return what it printed and the processor time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class TestHelp:
    @pytest.mark.parametrize("verb", [None, *VERBS])
    def test_help_costs_little_and_imports_nothing_heavy(self, verb):
        code = (
            f"import sys; from rlcr.cli import main; code = main({[verb] if verb else []} + "
            "['--help']); heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'yaml', "
            "'sklearn', 'matplotlib', 'pyarrow'}; assert not heavy & set(sys.modules); "
            "sys.exit(code)"
        )
        runs = [cpu_seconds(code)]
        if runs[0][1] >= 0.3:  # a busy machine must not fail this
            runs.append(cpu_seconds(code))
        assert min(seconds for _, seconds in runs) < 0.3
        assert runs[0][0].startswith(f"usage: rlcr {verb or ''}".rstrip())

    def test_help_names_every_verb_and_option(self, capsys):
        assert main(["--help"]) == 0
        text = capsys.readouterr().out
        assert all(re.search(rf"^    {verb} ", text, re.MULTILINE) for verb in VERBS)
        assert main(["train", "--help"]) == 0
        text = capsys.readouterr().out
        for option in ("--method", "--preset", "--warmup_data", "--peft_rank", "--training_args"):
            assert option in text

    @pytest.mark.parametrize(("verb", "out"), [("demo", "out/demo/rlcr"), ("toy", "out/rlcr-toy")])
    def test_help_of_the_experiments_says_where_results_go(self, verb, out, capsys):
        assert main([verb, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"--out DIR folder for figures and pictures (default {out})" in text
        assert "--seed SEED fixes weights, data and sampling (default 0)" in text

    def test_no_verb_prints_help(self, capsys):
        assert main([]) == 2
        assert "VERB" in capsys.readouterr().out

    def test_version(self, capsys):
        from rlcr import __version__

        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"rlcr {__version__}\n"

    @pytest.mark.parametrize("arguments", ["train --help", "score FILE"])
    def test_reader_that_stops_after_one_line(self, tmp_path, arguments):
        file = write(tmp_path / "p.jsonl", [{"confidence": 0.5, "correct": c} for c in (0, 1)])
        command = (
            f"{sys.executable} -m rlcr {arguments.replace('FILE', str(file))} | head -n 1; "
            "echo ${PIPESTATUS[0]}"
        )
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
        )
        first, code = done.stdout.splitlines()
        assert first.startswith("usage: rlcr train" if "help" in arguments else "2 rows; ")
        assert code in ("0", "141")  # 0: all was written before the reader left
        assert done.stderr == ""

    def test_reader_that_is_gone(self, predictions):
        child = in_process("score", predictions)
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(60) == 141
        child.stderr.close()


class TestScore:
    def test_numbers_are_those_of_the_report(self, predictions, tmp_path, capsys):
        target = tmp_path / "s.json"
        command = ["score", str(predictions), "--json", str(target), "--n_bins=7", "--seed=3"]
        assert main([*command, "--binning=right"]) == 0
        rows = [json.loads(line) for line in predictions.read_text("utf-8").splitlines()][:40]
        expected = calibration_report(
            [r["confidence"] for r in rows], [r["correct"] for r in rows],
            n_bins=7, binning="right", seed=3,
        )  # fmt: skip
        found = json.loads(target.read_text("utf-8"))
        assert found["report"] == json.loads(json.dumps(expected.to_dict()))
        assert (found["rows"], found["without_confidence"], found["without_grade"]) == (42, 1, 1)
        right = sum(r["correct"] for r in rows) + 1
        assert found["accuracy_all"] == pytest.approx(right / 41)
        out = capsys.readouterr().out
        assert str(expected) in out
        assert out.startswith("42 rows; 1 without a confidence, 1 without a grade: left out\n")

    def test_no_intervals(self, predictions, capsys):
        assert main(["score", str(predictions), "--no_ci"]) == 0
        assert "95%" not in capsys.readouterr().out

    @pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
    def test_columns_kinds_and_percentages(self, tmp_path, capsys, suffix):
        rows = [{"p": 90, "ok": 1}, {"p": 80, "ok": 1}, {"p": 30, "ok": 0}, {"p": 60, "ok": 0}]
        file = tmp_path / f"f.{suffix}"
        if suffix == "json":
            file.write_text(json.dumps(rows))
        else:
            from datasets import Dataset

            getattr(Dataset.from_list(rows), f"to_{suffix}")(file)
        columns = ["--confidence_column=p", "--correct_column=ok", "--scale=100"]
        assert main(["score", str(file), *columns, f"--json={tmp_path / 's.json'}"]) == 0
        report = json.loads((tmp_path / "s.json").read_text())["report"]
        assert report["brier"] == pytest.approx(0.125)
        assert report["auroc"] == 1.0

    def test_one_class_is_a_warning_and_valid_json(self, tmp_path, capsys):
        file = write(tmp_path / "p.jsonl", [{"confidence": q, "correct": 1} for q in (0.5, 0.9)])
        with pytest.warns(MetricsWarning, match="AUROC is undefined"):
            assert main(["score", str(file), f"--json={tmp_path / 's.json'}"]) == 0
        assert re.search(r"^AUROC +- ", capsys.readouterr().out + " ", re.MULTILINE)

        def refuse(name):
            raise AssertionError(name)

        found = json.loads((tmp_path / "s.json").read_text(), parse_constant=refuse)
        assert found["report"]["auroc"] is None
        child = in_process("score", file)
        out, errors = child.communicate(timeout=60)
        assert child.returncode == 0
        assert "AUROC is undefined" in errors
        assert "Traceback" not in errors
        assert "Brier score" in out

    def test_grade_a_gsm8k_file(self, tmp_path, capsys):
        rows = [
            {"question": "q", "answer": f"so it is\n#### {gold}", "completion": completion}
            for gold, completion in [
                ("18", render_completion("18", "0.9")),
                ("1,234", render_completion("1234", "0.8")),
                ("5", render_completion("6", "0.3")),
                ("7", "<think>no idea"),
                ("8", "<think>t</think> <answer>8</answer>"),
            ]
        ]
        file = write(tmp_path / "g.jsonl", rows)
        target = tmp_path / "s.json"
        assert main(["score", str(file), "--grade", "--json", str(target)]) == 0
        found = json.loads(target.read_text())
        assert (found["without_confidence"], found["without_grade"]) == (2, 0)
        assert found["accuracy_all"] == pytest.approx(3 / 5)
        assert found["report"]["brier"] == pytest.approx((0.01 + 0.04 + 0.09) / 3)
        assert found["report"]["accuracy"] == pytest.approx(2 / 3)
        target.unlink()
        command = ["score", str(file), "--grade", "exact_match", "--strict", "--json", str(target)]
        assert main(command) == 0
        # Strictly read the fifth completion is malformed, and so has no answer.
        assert json.loads(target.read_text())["accuracy_all"] == pytest.approx(2 / 5)
        assert "5 rows" in capsys.readouterr().out

    @pytest.mark.realdata
    def test_grade_the_real_gsm8k(self, tmp_path, capsys, data_folder):
        rows = []
        lines = (data_folder / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()
        for i, line in enumerate(lines):
            row = json.loads(line)
            gold = row["answer"].split("####")[1].strip()
            said = gold if i % 4 else str(float(gold.replace(",", "")) + 1)
            if i % 8 == 1:
                said = rf"\boxed{{{gold}}}"
            rows.append({**row, "completion": render_completion(said, "0.9" if i % 4 else "0.2")})
        file = write(tmp_path / "gsm8k.jsonl", rows)
        target = tmp_path / "s.json"
        assert main(["score", str(file), "--grade", "math", "--no_ci", f"--json={target}"]) == 0
        found = json.loads(target.read_text())
        assert (found["rows"], found["without_confidence"], found["without_grade"]) == (1319, 0, 0)
        right = sum(i % 4 > 0 for i in range(1319))
        assert found["accuracy_all"] == pytest.approx(right / 1319)
        assert found["report"]["auroc"] == 1.0

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "has no rows"),
            ('{"confidence": 0.5, "correct": tr', "line 1: broken JSON at character"),
            ('{"confidence": 0.5, "correct": true}\n{"confidence": 0.', "line 2: broken JSON"),
            ('{"confidence": 85, "correct": 1}', r"line 1: confidence must be .* scale=100"),
            ('{"confidence": NaN, "correct": 1}', "line 1: confidence must be a number .* got nan"),
            ('{"confidence": -0.1, "correct": 1}', "got -0.1"),
            ('{"confidence": "high", "correct": 1}', "got 'high'"),
            ('{"confidence": 0.5, "correct": 2}', "line 1: correct must be true, false"),
            ('{"confidence": 0.5}', "column 'correct' is missing"),
            ('{"confidense": 0.5, "correct": 1}', "Did you mean 'confidense'"),
            ("[1, 2]", "not a JSON object"),
            ('{"confidence": null, "correct": 1}', "no row with both a confidence and a grade: "),
        ],
    )
    def test_files_that_are_refused(self, tmp_path, capsys, text, message):
        (tmp_path / "p.jsonl").write_text(text)
        line = refused(capsys, "score", tmp_path / "p.jsonl")
        assert re.search(message, line)
        assert "p.jsonl" in line

    def test_other_files_that_are_refused(self, tmp_path, capsys):
        assert "there is no such file" in refused(capsys, "score", tmp_path / "no.jsonl")
        (tmp_path / "d.jsonl").mkdir()
        assert "is a folder" in refused(capsys, "score", tmp_path / "d.jsonl")
        assert "must end in .jsonl" in refused(capsys, "score", tmp_path)
        for name in ("b.jsonl", "b.csv", "b.json", "b.parquet"):
            (tmp_path / name).write_bytes(b"\x80\x00\xff\n" * 50)
            line = refused(capsys, "score", tmp_path / name)
            assert "not UTF-8 text (a binary file?)" in line or "not a readable parquet" in line
        (tmp_path / "l.csv").write_text("confidence,correct\n0.5,1\n0.5\n")
        assert "1 values under 2 column names" in refused(capsys, "score", tmp_path / "l.csv")

    def test_grade_needs_its_columns(self, tmp_path, capsys):
        file = write(tmp_path / "g.jsonl", [{"answer": "1", "completion": 3}])
        assert "'completion' must be text" in refused(capsys, "score", file, "--grade")
        file = write(tmp_path / "g.jsonl", [{"answer": "1", "completions": "x"}])
        assert "Did you mean 'completions'" in refused(capsys, "score", file, "--grade")
        line = refused(capsys, "score", file, "--grade", "exact_mach")
        assert "Did you mean 'exact_match'" in line

    def test_output_file_is_checked_before_the_work(self, predictions, capsys, tmp_path):
        line = refused(capsys, "score", predictions, "--json", tmp_path / "no" / "s.json")
        assert "there is no folder" in line
        assert "it is a directory" in refused(capsys, "score", "nothing", "--json", tmp_path)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_output_file_in_a_read_only_folder(self, predictions, capsys, tmp_path):
        (tmp_path / "ro").mkdir(mode=0o555)
        line = refused(capsys, "score", predictions, "--json", tmp_path / "ro" / "s.json")
        assert "is not writable" in line


class TestPlotAndVote:
    def test_plot_writes_two_pictures(self, predictions, tmp_path, capsys):
        other = write(tmp_path / "b.jsonl", [{"confidence": 0.5, "correct": c} for c in (0, 1)])
        out = tmp_path / "neu" / "Bilder ä"
        assert main(["plot", str(predictions), str(other), "--out", str(out)]) == 0
        names = ["reliability.png", "risk_coverage.png"]
        assert capsys.readouterr().out.splitlines() == [str(out / name) for name in names]
        assert [(out / name).read_bytes()[:4] for name in names] == [b"\x89PNG"] * 2

    def test_plot_refuses(self, predictions, tmp_path, capsys):
        (tmp_path / "f").write_text("a file")
        assert "is a file" in refused(capsys, "plot", predictions, "--out", tmp_path / "f")
        empty = write(tmp_path / "e.jsonl", [{"confidence": None, "correct": 1}])
        assert "no row with both" in refused(capsys, "plot", empty, "--out", tmp_path / "o")
        assert "--out" in refused(capsys, "plot", predictions)
        command = ["plot", predictions, "--out", tmp_path / "o"]
        assert "n_bins" in refused(capsys, *command, "--n_bins=0")
        line = refused(capsys, "plot", predictions, "--out", tmp_path / "f" / "x" / "y")
        assert line.startswith(f"cannot make the folder {tmp_path / 'f' / 'x' / 'y'}: ")
        assert line.endswith(f"{tmp_path / 'f'} is a file. Give --out another folder.")
        (tmp_path / "link").symlink_to("nowhere")
        assert "link is a file" in refused(capsys, "plot", predictions, "--out", tmp_path / "link")
        assert not (tmp_path / "o").exists()

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_plot_in_a_read_only_folder(self, predictions, tmp_path, capsys):
        (tmp_path / "ro").mkdir(mode=0o555)
        line = refused(capsys, "plot", predictions, "--out", tmp_path / "ro" / "a" / "b")
        assert "ro is not writable" in line

    def test_vote(self, tmp_path, capsys):
        rows = [
            {"id": f"a#{k}", "answer": answer, "confidence": q, "correct": answer == "4"}
            for k, (answer, q) in enumerate([("4", 0.9), ("5", 0.3), ("5", 0.3)])
        ]
        file = write(tmp_path / "v.jsonl", rows)
        target, picture = tmp_path / "v.json", tmp_path / "v.png"
        command = ["vote", str(file), "--json", str(target), "--plot", str(picture)]
        assert main(command) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        out = capsys.readouterr().out
        assert out.startswith("1 prompts, 3 samples each\n")
        table = [line.split() for line in out.splitlines()[2:6]]
        assert table[0] == ["samples", "majority", "max", "weighted", "pass@n"]
        assert table[3] == ["3", "0.0000", "1.0000", "1.0000", "1.0000"]
        assert "1.200, above 1 for 100.0%" in out
        assert json.loads(target.read_text())["accuracy"]["weighted"][-1] == 1.0

    def test_vote_draws_what_it_prints(self, tmp_path, capsys, monkeypatch):
        from rlcr import plots

        rows = [
            {"id": f"a#{k}", "answer": answer, "confidence": 0.5, "correct": answer == "4"}
            for k, answer in enumerate("4554")
        ]
        drawn = []
        monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append((figure, path)))
        file, picture = write(tmp_path / "v.jsonl", rows), str(tmp_path / "v.png")
        assert main(["vote", str(file), "--plot", picture]) == 0
        table = [line.split() for line in capsys.readouterr().out.splitlines()[2:6]]
        ((figure, path),) = drawn
        assert path == picture
        lines = figure.axes[0].get_lines()
        assert [line.get_label() for line in lines] == [*table[0][1:4], "any right (pass@N)"]
        for line, *column in zip(lines, *(row[1:] for row in table[1:]), strict=True):
            assert [f"{y:.4f}" for y in line.get_ydata()] == column

    def test_vote_without_confidences_writes_valid_json(self, tmp_path, capsys):
        rows = [{"id": f"a#{k}", "answer": "4", "confidence": None, "correct": 1} for k in (0, 1)]
        file, target = write(tmp_path / "v.jsonl", rows), tmp_path / "v.json"
        assert main(["vote", str(file), "--json", str(target)]) == 0

        def refuse(name):
            raise AssertionError(name)

        found = json.loads(target.read_text(), parse_constant=refuse)
        assert found["accuracy"]["majority"] == [1.0, 1.0]

    def test_vote_refuses(self, predictions, tmp_path, capsys):
        assert "is not NAME#0, NAME#1" in refused(capsys, "vote", predictions)
        rows = [
            {"id": i, "answer": "4", "confidence": 1, "correct": 1} for i in ("a#0", "b#0", "b#1")
        ]
        file = write(tmp_path / "v.jsonl", rows)
        assert "prompts have 1 to 2 samples" in refused(capsys, "vote", file)
        line = refused(capsys, "vote", file, "--plot", tmp_path / "no" / "v.png")
        assert "there is no folder" in line
        file = write(tmp_path / "w.jsonl", rows[1:])
        assert "xyz" in refused(capsys, "vote", file, "--plot", tmp_path / "v.xyz")
        assert "jsonl" in refused(capsys, "vote", file, "--plot", file)
        assert len(file.read_text().splitlines()) == 2


GSM8K = [{"question": "2+2?", "answer": "4 #### 4"}, {"question": "ä?", "answer": "#### 1,000"}]


def hotpot_row(number):
    return {
        "_id": f"h{number}",
        "question": "Who?",
        "answer": "Ann",
        "context": [[f"title {i}", [f"sentence {i}."]] for i in range(10)],
        "supporting_facts": [["title 2", 0], ["title 7", 0]],
    }


class TestData:
    def test_gsm8k(self, tmp_path, capsys):
        file, out = write(tmp_path / "test.jsonl", GSM8K), tmp_path / "ö.jsonl"
        assert main(["data", "gsm8k", "--path", str(file), "--out", str(out), "--plain"]) == 0
        assert capsys.readouterr().out == f"2 rows: {out}\n"
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        assert [r["answer"] for r in rows] == ["4", "1000"]
        assert "ä?" in out.read_text("utf-8")
        assert all(isinstance(r["prompt"], str) for r in rows)
        line = refused(capsys, "data", "gsm8k", "--path", file, "--out", out)
        assert "is there already" in line

    def test_hotpot_modified(self, tmp_path, capsys):
        file, out = write(tmp_path / "h.jsonl", map(hotpot_row, range(6))), tmp_path / "o.jsonl"
        command = ["data", "hotpot_modified", f"--path={file}", f"--out={out}", "--long_prompt"]
        assert main([*command, "--limit=5"]) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == 5
        for row in rows:
            assert len(row["removed_titles"]) == 2
            gold = {"title 2", "title 7"} & set(row["removed_titles"])
            assert row["gold_removed"] == len(gold)
            assert row["prompt"][0]["role"] == "system"
        first = out.read_bytes()
        out.unlink()
        assert main([*command, "--limit=5"]) == 0
        assert out.read_bytes() == first
        out.unlink()
        assert main([*command, "--seed=1"]) == 0
        assert out.read_bytes()[: len(first)] != first

    @pytest.mark.realdata
    def test_the_real_gsm8k(self, tmp_path, capsys, data_folder):
        file = data_folder / "gsm8k" / "test.jsonl"
        assert main(["data", "gsm8k", f"--path={file}", f"--out={tmp_path / 'o.jsonl'}"]) == 0
        assert capsys.readouterr().out.startswith("1319 rows: ")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["gsm8"], "Did you mean 'gsm8k'"),
            (["gsm8k", "--path=nothing.jsonl"], "there is no such file"),
            (["gsm8k", "--path=g.jsonl", "--split=test"], "has no meaning with a file"),
            (["gsm8k", "--path=g.jsonl", "--limit=0"], "limit must be at least 1, not 0"),
            (["bigmath", "--path=g.jsonl", "--limit=-3"], "limit must be at least 1, not -3"),
            (["bigmath", "--path=g.jsonl", "--split=dev"], "split must be train or test"),
            (["gsm8k", "--path=g.jsonl", "--seed=-1"], "seed"),
            (["math500", "--path=g.jsonl"], "problem"),
            (["gsm8k", "--path=g.jsonl", "--format=tac", "--long_prompt"], "no long system prompt"),
            (["hotpot", "--path=g.jsonl"], "'id'"),
            (["gsm8k", "--path=g.jsonl", "--out=no/o.jsonl"], "there is no folder no"),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, list) else "",
    )
    def test_refused(self, tmp_path, capsys, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "g.jsonl", GSM8K)
        assert message in refused(capsys, "data", "--out=o.jsonl", *arguments)
        assert not (tmp_path / "o.jsonl").exists()

    def test_no_network_is_one_line(self, tmp_path, capsys):
        line = refused(capsys, "data", "gsm8k", "--out", tmp_path / "o.jsonl")
        assert "cannot load" in line


@pytest.mark.parametrize("verb", ["score", "vote"])
def test_figures_never_replace_their_input(verb, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "a#0", "confidence": 0.5, "correct": true, "answer": "1"}\n')
    before = file.read_bytes()
    assert "would be overwritten" in refused(capsys, verb, file, "--json", file)
    assert "seed is -1" in refused(capsys, verb, file, "--seed", "-1")
    assert file.read_bytes() == before


class TestEval:
    ROWS = [  # noqa: RUF012
        {"id": f"ü{i}", "prompt": f"{i}+{i}=", "answer": f"{2 * i}"} for i in range(3)
    ]

    def test_end_to_end_and_scored(self, model, folder, tmp_path, capsys):
        data, out = write(folder / "däta.jsonl", self.ROWS), tmp_path / "p.jsonl"
        command = ["-q", "eval", f"--model={model}", f"--data={data}", "--max_tokens=8"]
        command += ["--device=cpu", f"--out={out}"]
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("3 rows, 3 graded; confidences: 3 forced\n")
        assert printed.endswith(f"predictions: {out}\n")
        assert "accuracy over all graded rows 0.3333" in printed
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        assert [r["id"] for r in rows] == ["ü0", "ü1", "ü2"]
        for row in rows:
            assert (row["completion"], row["answer"], row["confidence"]) == ("y", "4", 0.85)
        assert main(["score", str(out), f"--json={tmp_path / 's.json'}"]) == 0
        report = json.loads((tmp_path / "s.json").read_text())["report"]
        assert report["brier"] == pytest.approx((2 * 0.85**2 + 0.15**2) / 3)
        assert report["auroc"] == 0.5
        assert "3 rows; 0 without a confidence" in capsys.readouterr().out
        # Graded anew: the answers in the file are the model's own, not the golds.
        file = write(tmp_path / "g.jsonl", [{**r, "completion": FULL} for r in rows])
        assert main(["score", str(file), "--grade", f"--json={tmp_path / 'g.json'}"]) == 0
        assert json.loads((tmp_path / "g.json").read_text())["accuracy_all"] == pytest.approx(1 / 3)

        assert "has content; resume the run" in refused(capsys, *command)
        line = refused(capsys, *command, "--resume", "--temperature=1")
        assert "temperature: 0.0 in the file, 1.0 now" in line
        whole = out.read_bytes()
        out.write_bytes(whole[:-20])  # as if killed
        assert main([*command, "--resume"]) == 0
        assert out.read_bytes() == whole

    def test_samples_of_problems_then_votes(self, model, tmp_path, capsys):
        data = write(tmp_path / "d.jsonl", [{"question": "2+2?", "answer": "#### 4"}] * 3)
        out = tmp_path / "p.jsonl"
        command = ["-q", "eval", f"--model={model}", f"--data={data}", f"--out={out}", "--plain"]
        line = refused(capsys, *command, "--max_tokens=4")
        assert "the model's context is 512" in line  # the instructions alone are longer
        command = [
            "-q", "eval", f"--model={model}", "--out", str(tmp_path / "q.jsonl"), "--samples=2",
            "--temperature=1", "--limit=2", "--max_tokens=4", "--no_force", "--device=cpu",
            "--data", str(write(tmp_path / "e.jsonl", self.ROWS)),
        ]  # fmt: skip
        assert main(command) == 0
        assert "4 rows, 4 graded; confidences: 4 missing" in capsys.readouterr().out
        assert main(["vote", str(tmp_path / "q.jsonl")]) == 0
        assert "2 prompts, 2 samples each" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--data=no.jsonl"], "there is no such file"),
            (["--samples=0"], "samples must be at least 1, not 0"),
            (["--max_tokens=0"], "max_tokens must be at least 1"),
            (["--batch_size=-1"], "batch_size must be at least 1"),
            (["--limit=0"], "limit must be at least 1"),
            (["--temperature=hot"], "invalid float value: 'hot'"),
            (["--temperature=-1"], "temperature must be"),
            (["--top_p=0"], "top_p must be"),
            (["--temperature=nan"], "temperature must be"),
            (["--seed=-1"], "seed must be"),
            (["--backend=vlm"], "Did you mean 'vllm'"),
            (["--format=tabd"], "Did you mean 'tabc'"),
            (["--verifier=exact_mach"], "Did you mean 'exact_match'"),
            (["--gold_column=gold"], "gold"),
            (["--out=no/p.jsonl"], "there is no folder no"),
            (["--out=."], "it is a directory"),
            (["--model=./nothing"], "there is no folder './nothing'"),
            (["--model=e.jsonl"], "is a file; a model is a folder"),
            (["--model=."], "holds no model"),
            (["--model_name=x"], "--model_name is for servers"),
            (["--backend=server"], "needs the http:// or https:// address"),
            (["--model=http://127.0.0.1:1", "--backend=vllm"], "needs a folder or name"),
            (["--device=cud"], "cud"),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, list) else "",
    )
    def test_refused(self, model, tmp_path, capsys, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "e.jsonl", self.ROWS)
        command = ["eval", f"--model={model}", "--data=e.jsonl", "--out=o.jsonl", "--max_tokens=2"]
        assert message in refused(capsys, *command, *arguments)
        assert not (tmp_path / "o.jsonl").exists() or not (tmp_path / "o.jsonl").read_bytes()

    @pytest.mark.parametrize("more", [[], ["--model_name=m"]], ids=["any model", "named"])
    def test_no_server_is_one_line(self, tmp_path, capsys, monkeypatch, more):
        quick = {**(ServerModel.__init__.__kwdefaults__ or {}), "backoff": 0.0, "retries": 1}
        monkeypatch.setattr(ServerModel.__init__, "__kwdefaults__", quick)
        data = write(tmp_path / "e.jsonl", self.ROWS)
        command = ["eval", "--model=http://127.0.0.1:1", f"--data={data}", *more]
        assert "127.0.0.1:1" in refused(capsys, *command, "--out", tmp_path / "o.jsonl")

    def test_remote_code_is_only_run_on_request(self, model, tmp_path, capsys):
        data = write(tmp_path / "e.jsonl", self.ROWS)
        command = ["eval", f"--model={model}", f"--data={data}", f"--out={tmp_path / 'o.jsonl'}"]
        assert main([*command, "--trust_remote_code", "--max_tokens=1", "--no_force"]) == 0
        about = json.loads((tmp_path / "o.jsonl.meta.json").read_text())
        assert about["trust_remote_code"] is True
        assert (about["data"], about["rows"]) == ("e.jsonl", 3)


class TestTrain:
    def test_config_file_flags_over_it_and_resume(self, folder, tmp_path, capsys):
        config = folder / "einstellungen ä.yaml"
        config.write_text(
            "model: toy\ndata: toy\nmax_steps: 9\nmethod: rlvr\nseed: 7\ndevice: cpu\n"
            "training_args:\n  per_device_train_batch_size: 16\n  logging_steps: 5\n"
        )
        out = tmp_path / "ö run"
        command = ["-q", "train", f"--config={config}", f"--output_dir={out}", "--max_steps=2"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)  # it is untrained
            assert main([*command, "--training_args", "logging_steps=1"]) == 0
        assert capsys.readouterr().out == f"model: {out / 'final'}\n"
        stored = json.loads((out / "train_options.json").read_text())
        assert (stored["max_steps"], stored["method"], stored["seed"]) == (2, "rlvr", 7)
        assert stored["training_args"] == {"per_device_train_batch_size": 16, "logging_steps": 1}
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2]
        assert (out / "final" / "COMPLETE").is_file()
        line = refused(capsys, *command, "--training_args", "logging_steps=1")
        assert "is not empty" in line
        assert main(["-q", "train", "--resume", f"--output_dir={out}"]) == 0  # complete: no work
        line = refused(capsys, "-q", "train", "--resume", f"--output_dir={out}", "--seed=8")
        assert "was started with seed 7, not 8" in line

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--max_step=3"], "Did you mean '--max_steps'"),
            (["--method=rlcrr"], "Did you mean 'rlcr'"),
            (["--preset=hotpott"], "Did you mean 'hotpot'"),
            (["--max_steps=0"], "max_steps is 0; it must be at least 1"),
            (["--max_steps=many"], "invalid int value: 'many'"),
            (["--learning_rate=nan"], "learning_rate is nan"),
            (["--learning_rate=0"], "learning_rate is 0.0"),
            (["--warmup_steps=3"], "warmup_steps needs --warmup_data"),
            (["--data=no.jsonl"], "the toy model knows only the toy's words"),
            (["--model=m", "--data=no.jsonl"], "data 'no.jsonl' is not there"),
            (["--model=m", "--data=."], "data '.' is a folder"),
            (["--training_args", "fsdp"], "KEY=VALUE"),
            (["--training_args", "adam_betal=1"], "Did you mean 'adam_beta"),
            (["--training_args", "seed=3"], "use --seed instead"),
            (["--training_args", "calibration_weight=2"], "calibration_weight"),
            (["--training_args", "num_generations=1"], "num_generations is 1"),
            (["--config=nothing.json"], "cannot read the options in nothing.json"),
            (["--config=."], "cannot read the options in ."),
            (["--config=broken.json"], "is neither JSON nor YAML"),
            (["--config=list.yaml"], "must hold a mapping of options, not list"),
            (["--config=typo.yaml"], "Did you mean 'max_steps'"),
            (["--config=kind.yaml"], "max_steps must be a int, not 'x'"),
            (["--resume", "--output_dir=nothing"], "nothing to resume in nothing"),
            (["--device=cud"], "cud"),
            (["--output_dir=list.yaml"], "list.yaml"),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, list) else "",
    )
    def test_refused(self, tmp_path, capsys, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "broken.json").write_text('{"seed": ')
        (tmp_path / "list.yaml").write_text("- 1\n")
        (tmp_path / "typo.yaml").write_text("max_stps: 1\n")
        (tmp_path / "kind.yaml").write_text("max_steps: x\n")
        before = sorted(tmp_path.iterdir())
        command = ["-q", "train", "--model=toy", "--data=toy", "--output_dir=o", "--device=cpu"]
        assert message in refused(capsys, *command, *arguments)
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize("option", ["data", "warmup_data"])
    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("e.jsonl", "\n", "e.jsonl: the file has no rows"),
            ("e.json", "[]", "e.json: the file has no rows"),
            ("e.csv", "prompt,answer\n", "e.csv: the file has no rows"),
            ("e.txt", "x", "the name must end in"),
            ("b.jsonl", "{", "line 1: broken JSON"),
        ],
    )
    def test_an_empty_file_is_refused_at_once(self, tmp_path, capsys, option, name, text, message):
        file = tmp_path / name
        file.write_text(text)
        good = write(tmp_path / "good.jsonl", [{"prompt": "p", "answer": "a"}])
        files = {"data": good, "warmup_data": good, option: file}
        command = ["train", "--model=m", f"--output_dir={tmp_path / 'o'}"]
        command += [f"--{key}={value}" for key, value in files.items()]
        code = (
            f"import sys; from rlcr.cli import main; code = main({command}); heavy = {{'torch', "
            "'transformers', 'trl', 'datasets', 'numpy'}; print(code, heavy & set(sys.modules))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout == "2 set()\n"
        assert message in done.stderr
        assert not (tmp_path / "o").exists()

    def test_needs(self, capsys):
        assert "train needs --output_dir" in refused(capsys, "train")
        assert "train needs --data" in refused(capsys, "train", "--model=toy", "--output_dir=o")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_read_only_output_folder(self, capsys, tmp_path):
        (tmp_path / "ro").mkdir(mode=0o555)
        line = refused(capsys, "-q", "train", f"--output_dir={tmp_path / 'ro' / 'o'}", *SMALL)
        assert "Permission denied" in line

    @pytest.mark.parametrize(
        ("number", "code"),
        [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
    )
    def test_signal_leaves_a_run_that_resumes(self, tmp_path, number, code):
        """A signal after a logged step: 128 + its number, a checkpoint, --resume ends it."""
        out = tmp_path / "run"
        child = in_process("train", f"--output_dir={out}", "--max_steps=25", *SMALL)
        end = time.monotonic() + 120
        while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.01)
        child.send_signal(number)
        _, errors = child.communicate(timeout=120)
        assert child.returncode == code, errors
        assert "go on with --resume" in errors
        assert "Traceback" not in errors
        (checkpoint,) = out.glob("checkpoint-*")
        assert 0 < int(checkpoint.name.removeprefix("checkpoint-")) < 25
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)  # an untrained model learns little
            assert main(["-q", "train", "--resume", f"--output_dir={out}"]) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, 26))


class TestToy:
    def test_tiny_settings(self, tmp_path, capsys):
        out = tmp_path / "toy ä"
        small = ["--steps=2", "--warmup_steps=2", "--test_rows=50"]
        with pytest.warns(MetricsWarning, match="are wrong"):  # it has learned nothing
            assert main(["-q", "toy", *small, f"--out={out}", "--arms", "rlcr"]) == 0
        printed = capsys.readouterr().out
        assert "Greedy answers to 50 test prompts" in printed
        assert "| RLCR | stated |" in printed
        assert "RLVR" not in printed
        assert {"reliability.png", "risk_coverage.png"} <= {p.name for p in out.iterdir()}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--steps=0"], "steps must be positive, not 0"),
            (["--learning_rate=nan"], "learning_rate must be positive, not nan"),
            (["--entropy_coef=-1"], "entropy_coef must be positive, not -1.0"),
            (["--num_generations=1"], "num_generations must be at least 2"),
            (["--arms", "rlcr", "rlcr"], "arms names one twice"),
            (["--arms", "rlvrr"], "Did you mean 'rlvr'"),
            (["--seed=-1"], "seed is -1"),
            (["--warmup_confidence=randum"], "Did you mean 'random'"),
            (["--out=file"], "is a file"),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, list) else "",
    )
    def test_refused(self, tmp_path, capsys, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("a file")
        assert message in refused(capsys, "toy", "--out=o", *arguments)

    def test_demo_refuses_and_returns_1_for_a_failed_claim(self, tmp_path, capsys, monkeypatch):
        from rlcr import demo
        from tenfold_common.results import Claim, Result

        assert "seed is -1" in refused(capsys, "demo", "--seed=-1", f"--out={tmp_path}")
        (tmp_path / "f").write_text("a file")
        assert "is a file" in refused(capsys, "demo", f"--out={tmp_path / 'f'}")

        def made_up(out, *, seed, full):
            claim = Claim("c", "said", 1.0, "<= 0", passed=seed == 1, margin=0.0)
            return Result(package="rlcr", title="t", summary="s", seeds=[seed], claims=[claim])

        monkeypatch.setattr(demo, "run_demo", made_up)
        assert main(["demo", f"--out={tmp_path / 'o'}"]) == 1
        assert main(["demo", f"--out={tmp_path / 'o'}", "--seed=1"]) == 0
        assert list((tmp_path / "o").glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean 'train'"),
        (["scores"], "Did you mean 'score'"),
        (["score"], "FILE"),
        (["score", "x", "--n_bin=3"], "Did you mean '--n_bins'"),
        (["score", "x", "--binning=lefft"], "Did you mean 'left'"),
        (["plot", "--out=o"], "FILE"),
        (["vote", "x.jsonl", "--verifer=auto"], "Did you mean '--verifier'"),
        (["data", "gsm8k"], "--out"),
        (["eval", "--model=m"], "--data"),
        (["toy", "--stepps=2"], "Did you mean '--steps'"),
        (["demo", "--ful"], "Did you mean '--full'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_unknown_verbs_and_options(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize("option", [["--n_bins=0"], ["--scale=0"], ["--scale=nan"]])
def test_options_of_score(capsys, predictions, option):
    assert option[0].split("=")[0].lstrip("-") in refused(capsys, "score", predictions, *option)


def test_console_script_and_module_are_one_command(predictions):
    child = in_process("score", predictions, "--no_ci")
    out, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, "")
    assert out.startswith("42 rows; ")
