import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcr.parsing import render_completion
from rlcr.predictions import (
    FIELDS,
    PredictionWriter,
    grade_predictions,
    metadata_path,
    read_metadata,
    read_predictions,
)
from tenfold_common.errors import UserError

META = {"model": "tiny", "prompt_hash": "abc", "seed": 0, "settings": {"temperature": 0.7}}


def record(i, **changes):
    values = [f"r{i}", f"Question {i}?", "text", str(i), 0.5, True, "toy"]
    return {**dict(zip(FIELDS, values, strict=True)), **changes}


def write(path, n=3, **settings):
    with PredictionWriter(path, META, **settings) as writer:
        for i in range(n):
            writer.write(record(i))


# --- writing and resuming


def test_what_is_written_is_read_back(tmp_path):
    file = tmp_path / "p.jsonl"
    write(file)
    predictions = read_predictions(file)
    assert predictions.rows == [record(i) for i in range(3)]
    assert predictions.confidence.tolist() == [0.5] * 3
    assert predictions.correct.tolist() == [1.0] * 3
    assert predictions.source.tolist() == ["toy"] * 3
    assert predictions.weights.tolist() == [1.0] * 3
    assert read_metadata(file) == META
    assert metadata_path(file).name == "p.jsonl.meta.json"


def test_every_record_is_in_the_file_when_write_returns(tmp_path):
    file = tmp_path / "p.jsonl"
    with PredictionWriter(file, META) as writer:
        for i in range(3):
            writer.write(record(i))
            assert file.read_bytes().count(b"\n") == i + 1
            assert writer.done == {f"r{k}" for k in range(i + 1)}


def test_a_file_with_content_is_not_touched_without_resume(tmp_path):
    file = tmp_path / "p.jsonl"
    write(file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="has content; resume"):
        PredictionWriter(file, META)
    assert file.read_bytes() == before


@given(cut=st.integers(0, 10**6), rewritten=st.booleans())
def test_cut_anywhere_and_resumed_the_file_is_as_if_never_cut(tmp_path_factory, cut, rewritten):
    file = tmp_path_factory.mktemp("cut") / "p.jsonl"
    write(file, 4)
    whole = file.read_bytes()
    cut %= len(whole) + 1
    file.write_bytes(whole[:cut])
    with PredictionWriter(file, dict(META), resume=True) as writer:
        # A record whose line feed alone is missing is whole.
        complete = whole[: cut + 1].count(b"\n") if cut < len(whole) else 4
        assert writer.done == {f"r{i}" for i in range(complete)}
        for i in range(4):
            if f"r{i}" not in writer.done:
                writer.write(record(i))
    assert file.read_bytes() == whole


def test_a_run_killed_while_writing_can_be_resumed(tmp_path):
    file = tmp_path / "p.jsonl"
    script = (
        "import sys; from rlcr.predictions import PredictionWriter\n"
        "writer = PredictionWriter(sys.argv[1], {'seed': 0})\n"
        "for i in range(10**7): writer.write({'id': str(i), 'completion': 'x' * 5000})\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(file)]) as child:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (file.exists() and file.stat().st_size > 10**5):
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    with PredictionWriter(file, {"seed": 0}, resume=True) as writer:
        n = len(writer.done)
        assert n >= 19
        assert writer.done == {str(i) for i in range(n)}
        writer.write({"id": "last"})
    lines = file.read_bytes().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [*map(str, range(n)), "last"]


def test_resume_of_a_file_that_is_not_there_starts_it(tmp_path):
    write(tmp_path / "p.jsonl", resume=True)
    assert len(read_predictions(tmp_path / "p.jsonl").rows) == 3


def test_a_corrupt_line_in_the_middle_is_named_and_nothing_is_changed(tmp_path):
    file = tmp_path / "p.jsonl"
    write(file)
    lines = file.read_bytes().splitlines(keepends=True)
    broken = lines[0] + lines[1][:20] + b"\n" + lines[2]
    file.write_bytes(broken)
    with pytest.raises(UserError, match="line 2: broken JSON"):
        PredictionWriter(file, META, resume=True)
    assert file.read_bytes() == broken
    with pytest.raises(UserError, match="line 2: broken JSON"):
        read_predictions(file)


def test_a_repeated_id_is_refused(tmp_path):
    file = tmp_path / "p.jsonl"
    with PredictionWriter(file, META) as writer:
        writer.write(record(0))
        with pytest.raises(UserError, match="'r0' is in the file already"):
            writer.write(record(0))
        writer.write(record(1))
    assert file.read_bytes().count(b"\n") == 2
    file.write_bytes(file.read_bytes() * 2)
    with pytest.raises(UserError, match="record 3: the id 'r0'"):
        PredictionWriter(file, META, resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": None}, ["'id'", "None"]),
        ({"id": ""}, ["'id'"]),
        ({"id": 3}, ["'id'", "3"]),
        ({"confidence": float("nan")}, ["r0", "finite"]),
        ({"completion": b"x"}, ["r0", "bytes"]),
        ({3: "x"}, ["keys must be str"]),
    ],
)
def test_records_that_cannot_be_written_leave_no_trace(tmp_path, changes, words):
    file = tmp_path / "p.jsonl"
    with PredictionWriter(file, META) as writer:
        with pytest.raises(UserError) as error:
            writer.write({**record(0), **changes})
        assert all(word in str(error.value) for word in words)
        assert file.read_bytes() == b""
        assert writer.done == set()
        writer.write(record(0))


def test_a_full_disk_leaves_whole_lines_only(tmp_path):
    script = (
        "import resource, signal, sys; from rlcr.predictions import PredictionWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "writer = PredictionWriter(sys.argv[1], {'seed': 0})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "for i in range(3):\n"
        "    try: writer.write({'id': str(i), 'completion': 'x' * (700 if i < 2 else 10)})\n"
        "    except OSError: print('full', sorted(writer.done))\n"
    )
    file = tmp_path / "p.jsonl"
    run = subprocess.run(
        [sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True
    )
    assert run.stdout == "full ['0']\n"
    ids = [json.loads(line)["id"] for line in file.read_bytes().splitlines()]
    assert ids == ["0", "2"]


def test_odd_characters_survive(tmp_path):
    file = tmp_path / "p.jsonl"
    text = "é \u2028 \ud800 \x00 \n 数"
    with PredictionWriter(file, META) as writer:
        writer.write(record(0, completion=text))
        writer.write(record(1))
    with PredictionWriter(file, META, resume=True) as writer:
        assert writer.done == {"r0", "r1"}
    assert read_predictions(file).rows[0]["completion"] == text


# --- settings beside the file


def test_resume_with_other_settings_names_the_difference(tmp_path):
    file = tmp_path / "p.jsonl"
    write(file)
    other = {**META, "seed": 1, "new": True}
    del other["model"]
    before = file.read_bytes()
    with pytest.raises(UserError) as error:
        PredictionWriter(file, other, resume=True)
    message = str(error.value)
    assert "seed: 0 in the file, 1 now" in message
    assert "new: absent in the file, True now" in message
    assert "model: 'tiny' in the file, absent now" in message
    assert "prompt_hash" not in message
    assert file.read_bytes() == before
    assert read_metadata(file) == META


def test_settings_are_compared_as_they_are_stored(tmp_path):
    file = tmp_path / "p.jsonl"
    with PredictionWriter(file, {"stop": ("a", "b")}) as writer:
        writer.write(record(0))
    with PredictionWriter(file, {"stop": ("a", "b")}, resume=True) as writer:
        assert writer.done == {"r0"}


def test_settings_of_a_file_without_records_can_still_change(tmp_path):
    file = tmp_path / "p.jsonl"
    write(file, 0)
    write(file, 1, resume=True)
    file.write_bytes(b'{"id": "hal')
    with PredictionWriter(file, {"seed": 9}, resume=True):
        assert read_metadata(file) == {"seed": 9}
    assert file.read_bytes() == b""


def test_missing_or_broken_settings_are_errors(tmp_path):
    file = tmp_path / "p.jsonl"
    write(file)
    metadata_path(file).write_text("{")
    with pytest.raises(UserError, match=r"meta\.json: broken JSON"):
        PredictionWriter(file, META, resume=True)
    metadata_path(file).unlink()
    with pytest.raises(UserError, match=r"settings of .* are not known"):
        PredictionWriter(file, META, resume=True)


def test_places_and_settings_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        PredictionWriter(tmp_path / "no" / "p.jsonl", META)
    with pytest.raises(UserError, match="is a folder"):
        PredictionWriter(tmp_path, META)
    with pytest.raises(UserError, match="the metadata cannot be written"):
        PredictionWriter(tmp_path / "p.jsonl", {"model": object()})
    assert list(tmp_path.iterdir()) == []


# --- reading


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_layouts_give_the_same_arrays(tmp_path):
    from datasets import Dataset

    rows = [
        {"confidence": 0.25, "correct": True, "source": "a"},
        {"confidence": None, "correct": False, "source": "b"},
        {"confidence": 1.0, "correct": None, "source": None},
    ]
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "p.csv").write_text(
        "confidence,correct,source\n0.25,True,a\n,false,b\n1,,\n", encoding="utf-8"
    )
    Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    rows_file(tmp_path / "p.jsonl", rows)
    for name in ("p.json", "p.csv", "p.parquet", "p.jsonl"):
        read = read_predictions(tmp_path / name)
        np.testing.assert_array_equal(read.confidence, [0.25, np.nan, 1.0])
        np.testing.assert_array_equal(read.correct, [1.0, 0.0, np.nan])
        assert read.source.tolist() == ["a", "b", ""]
        assert read.confidence.dtype == read.correct.dtype == read.weights.dtype == np.float64


def test_columns_scale_and_weights_can_be_chosen(tmp_path):
    file = rows_file(
        tmp_path / "p.jsonl",
        [
            {"q": 80, "label": 1, "set": "a", "w": 2},
            {"q": "5.5", "label": "0", "set": "a", "w": 0.5},
            {"q": 100, "label": 0.25, "set": 7, "w": 0},
        ],
    )
    read = read_predictions(
        file, confidence="q", correct="label", source="set", weight="w", scale=100
    )
    np.testing.assert_allclose(read.confidence, [0.8, 0.055, 1.0])
    assert read.correct.tolist() == [1.0, 0.0, 0.25]
    assert read.source.tolist() == ["a", "a", "7"]
    assert read.weights.tolist() == [2.0, 0.5, 0.0]


@pytest.mark.parametrize("value", ["True", "true", " TRUE ", 1, 1.0, "1", True])
def test_ways_to_say_correct(tmp_path, value):
    file = rows_file(tmp_path / "p.jsonl", [{"confidence": 0, "correct": value}])
    assert read_predictions(file).correct.tolist() == [1.0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"confidence": 80}, ["confidence", "80", "scale=100"]),
        ({"confidence": -0.1}, ["confidence", "-0.1"]),
        ({"confidence": 1.5e300}, ["confidence"]),
        ({"confidence": float("nan")}, ["confidence", "nan"]),
        ({"confidence": "nan"}, ["confidence", "'nan'"]),
        ({"confidence": "0,8"}, ["confidence", "'0,8'"]),
        ({"confidence": "0_5"}, ["confidence", "'0_5'"]),
        ({"confidence": True}, ["confidence", "True"]),
        ({"confidence": [0.5]}, ["confidence", "[0.5]"]),
        ({"confidence": 10**400}, ["confidence"]),
        ({"correct": 2}, ["correct", "2"]),
        ({"correct": "yes"}, ["correct", "'yes'"]),
        ({"correct": float("inf")}, ["correct", "inf"]),
        ({"w": -1}, ["w must be", "-1"]),
        ({"w": None}, ["w must be", "None"]),
    ],
)
def test_values_that_do_not_fit_are_named_with_their_line(tmp_path, row, words):
    good = {"confidence": 0.5, "correct": True, "w": 1}
    file = rows_file(tmp_path / "p.jsonl", [good, {**good, **row}])
    with pytest.raises(UserError) as error:
        read_predictions(file, weight="w")
    assert all(word in str(error.value) for word in [*words, "line 2", str(file)])


def test_missing_columns_and_bad_scales(tmp_path):
    file = rows_file(tmp_path / "p.jsonl", [{"confidence": 0.5, "corect": 1}])
    with pytest.raises(UserError) as error:
        read_predictions(file)
    message = str(error.value)
    assert "line 1: column 'correct' is missing" in message
    assert "available: confidence, corect" in message
    assert "Did you mean 'corect'?" in message
    for scale in (0, -1, float("nan"), True, "100"):
        with pytest.raises(UserError, match="scale"):
            read_predictions(file, scale=scale)


# --- grading


def completion(answer, q):
    return f"<think>so</think> <answer>{answer}</answer> <confidence>{q}</confidence>"


def test_gsm8k_shaped_rows_are_graded():
    rows = [
        {"question": "a?", "answer": "9 * 2 = 18\n#### 18", "completion": completion("18", 0.9)},
        {"question": "b?", "answer": "#### 1,200", "completion": completion("1200", 0.7)},
        {"question": "c?", "answer": "#### 3", "completion": completion("4", 0.2)},
        {"question": "d?", "answer": "#### 3", "completion": "no tags at all"},
        {"question": "e?", "answer": None, "completion": completion("4", 0.2)},
    ]
    graded = grade_predictions(rows, verifier="math", format="tac")
    assert [g["correct"] for g in graded] == [True, True, False, False, None]
    assert [g["confidence"] for g in graded] == [0.9, 0.7, 0.2, None, 0.2]
    assert [g["answer"] for g in graded] == ["18", "1200", "4", None, "4"]
    assert [g["gold"] for g in graded] == ["18", "1200", "3", "3", None]
    assert [g["error"] for g in graded] == [None, None, None, "missing_think", None]
    assert [g["question"] for g in graded] == ["a?", "b?", "c?", "d?", "e?"]
    assert rows[0]["answer"] == "9 * 2 = 18\n#### 18"


def test_lists_of_golds_and_other_columns():
    rows = [{"golds": ["Rome", "Roma"], "text": completion("roma", 1)}]
    [graded] = grade_predictions(rows, gold="golds", completion="text", format="tac")
    assert graded["correct"] is True
    assert graded["golds"] == graded["gold"] == ["Rome", "Roma"]


def test_strict_mode_gates_on_the_format():
    rows = [{"answer": "4", "completion": completion("4", "80%")}]
    [lenient] = grade_predictions(rows, format="tac")
    [strict] = grade_predictions(rows, format="tac", mode="strict")
    assert (lenient["correct"], lenient["confidence"]) == (True, 0.8)
    assert (strict["correct"], strict["confidence"], strict["answer"]) == (False, None, None)
    assert lenient["error"] == strict["error"] == "not_a_number"


def test_graded_rows_can_be_written_and_read_again(tmp_path):
    rows = [
        {"id": str(i), "answer": "#### 4", "completion": completion(a, 0.6)}
        for i, a in enumerate(["4", "5"])
    ]
    with PredictionWriter(tmp_path / "p.jsonl", META) as writer:
        for row in grade_predictions(rows, format="tac"):
            writer.write(row)
    read = read_predictions(tmp_path / "p.jsonl")
    assert read.correct.tolist() == [1.0, 0.0]
    assert read.confidence.tolist() == [0.6, 0.6]


def test_a_judge_is_shown_the_questions():
    from rlcr.verify import Verifier

    class Spy(Verifier):
        name = "spy"

        def grade(self, answers, golds, prompts=None):
            self.prompts = prompts
            return [1.0] * len(answers)

    rows = [{"question": "a?", "answer": "4", "completion": completion("4", 1)}]
    spy = Spy()
    grade_predictions(rows, verifier=spy, format="tac", prompt="question")
    assert spy.prompts == ["a?"]
    grade_predictions(rows, verifier=spy, format="tac")
    assert spy.prompts is None


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"answer": "4"}, {}, ["row 1", "'completion'", "available: answer"]),
        ({"completion": "x"}, {}, ["row 1", "'answer'"]),
        ({"completion": ["x"], "answer": "4"}, {}, ["row 1", "must be text", "['x']"]),
        ({"completion": "x", "answer": "4"}, {"format": "xyz"}, ["'xyz'"]),
        ({"completion": "x", "answer": "4"}, {"mode": "loose"}, ["'loose'"]),
        ({"completion": "x", "answer": "4"}, {"verifier": "maths"}, ["'maths'"]),
        ({"completion": "x", "answer": "4"}, {"prompt": "question"}, ["'question'"]),
    ],
)
def test_grading_errors(row, settings, words):
    with pytest.raises(UserError) as error:
        grade_predictions([row], **settings)
    assert all(word in str(error.value) for word in words)


@pytest.mark.realdata
def test_real_gsm8k_solutions_grade_as_right(data_folder):
    lines = (data_folder / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    rows = [json.loads(line) for line in lines]
    for i, row in enumerate(rows):
        final = row["answer"].rpartition("#### ")[2]
        row["completion"] = completion(final if i % 2 else "no idea", 0.5)
    graded = grade_predictions(rows, verifier="math", format="tac")
    assert [g["correct"] for g in graded] == [bool(i % 2) for i in range(50)]


def test_a_verifier_that_raises_leaves_its_row_ungraded():
    rows = [{"completion": render_completion(a, "0.5"), "answer": "6"} for a in ("3", "0", "4")]
    graded = grade_predictions(rows, verifier=lambda a, gold: int(str(gold)) % int(a) == 0)
    assert [row["correct"] for row in graded] == [True, None, False]
