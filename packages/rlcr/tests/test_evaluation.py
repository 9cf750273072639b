"""Asking a model: sources of confidences, forced continuations, resuming, votes on a file."""

import json

import numpy as np
import pytest

from rlcr.evaluation import evaluate, prompt_text, summary, vote_on_file
from rlcr.metrics import MetricsWarning, calibration_report
from rlcr.parsing import render_completion
from rlcr.predictions import read_metadata
from rlcr.verify import ExactMatch, MathVerifier, get_verifier
from tenfold_common.errors import UserError
from tenfold_common.lm import ScriptedModel, TransformersModel
from tenfold_common.tiny import byte_tokenizer, tiny_llama

FULL = render_completion("4", "0.9")
NO_CONFIDENCE = "<think>hm</think> <answer>4</answer>"
CUT_OFF = "<think>let me see"


def kind_of(prompt):
    """Say what a prompt asks for: a completion, a forced answer or a forced confidence."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if text.endswith("<answer>"):
        return "answer"
    return "confidence" if text.endswith("from 0 to 100, is:") else "main"


def scripted(main, answer=" 4 </answer>", confidence=" 60\nmore"):
    """A model with one reply for each kind; `main` may be a function of prompt, seed, sample."""

    def reply(prompt, seed, sample):
        kind = kind_of(prompt)
        if kind != "main":
            return {"answer": answer, "confidence": confidence}[kind]
        return main(prompt, seed, sample) if callable(main) else main

    return ScriptedModel(reply)


def rows_of(n=1, **more):
    return [{"id": f"r{i}", "prompt": f"p{i}: 2+2=", "answer": "4", **more} for i in range(n)]


def asked(model, kind):
    return [p for call in model.calls for p in call["prompts"] if kind_of(p) == kind]


class TestSources:
    def test_stated_forced_and_missing_are_kept_apart(self, tmp_path):
        replies = {"p0": FULL, "p1": NO_CONFIDENCE, "p2": CUT_OFF}
        model = scripted(lambda p, *_: replies[p[:2]], answer=" \n")
        found = evaluate(model, rows_of(3), tmp_path / "p.jsonl")
        assert found.source.tolist() == ["stated", "forced", "missing"]
        assert found.confidence[:2].tolist() == [0.9, 0.6]
        assert np.isnan(found.confidence[2])
        assert [r["answer"] for r in found.rows] == ["4", "4", None]
        assert [r["answer_source"] for r in found.rows] == ["stated", "stated", "missing"]
        assert found.correct.tolist() == [1, 1, 0]  # no answer is a wrong one
        assert found.rows[0]["error"] is None
        assert all(r["error"] for r in found.rows[1:])
        assert [p[:2] for p in asked(model, "confidence")] == ["p1"]
        assert [p[:2] for p in asked(model, "answer")] == ["p2"]

    def test_a_forced_reply_cannot_change_the_answer(self, tmp_path):
        """The published evaluation reads the last answer of the text with its continuation."""
        model = scripted(NO_CONFIDENCE, confidence=" 80 <answer> 99 </answer>")
        (row,) = evaluate(model, rows_of(), tmp_path / "p.jsonl").rows
        assert (row["answer"], row["correct"], row["confidence"]) == ("4", True, 0.8)
        assert row["completion"] == NO_CONFIDENCE
        model = scripted(NO_CONFIDENCE, confidence=" surely <answer> 5 </answer>")
        (row,) = evaluate(model, rows_of(), tmp_path / "q.jsonl").rows
        assert (row["answer"], row["correct"]) == ("4", True)

    def test_a_missing_answer_is_forced_first(self, tmp_path):
        model = scripted(CUT_OFF, answer=" 7 </answer> 3")
        (row,) = evaluate(model, rows_of(), tmp_path / "p.jsonl").rows
        assert [kind_of(call["prompts"][0]) for call in model.calls] == [
            "main", "answer", "confidence",
        ]  # fmt: skip
        assert (row["answer"], row["answer_source"], row["correct"]) == ("7", "forced", False)
        assert (row["confidence"], row["source"]) == (0.6, "forced")
        (prompt,) = asked(model, "confidence")
        assert prompt.startswith(f"p0: 2+2={CUT_OFF}")
        assert "<answer> 7 </answer>" in prompt
        assert prompt.count("7") == 1
        assert "</think>" in prompt

    def test_forced_questions_are_greedy_and_short(self, tmp_path):
        model = scripted(CUT_OFF)
        evaluate(model, rows_of(), tmp_path / "p.jsonl", temperature=0.7, samples=2, max_tokens=9)
        main, answer, confidence = model.calls
        assert (main["temperature"], main["n"], main["max_tokens"]) == (0.7, 2, 9)
        for call, tokens, stop in ((answer, 50, "</answer>"), (confidence, 20, "\n")):
            assert call["stop"] == (stop,)
            assert (call["temperature"], call["n"], call["max_tokens"]) == (0, 1, tokens)
            assert len(call["prompts"]) == 2  # one for each sample

    @pytest.mark.parametrize(
        ("reply", "expected"),
        [(" 1", 0.01), ("90%", 0.9), (" 0", 0.0), ("0.8", None), ("101", None), ("very", None)],
    )
    def test_forced_confidence_is_from_0_to_100(self, tmp_path, reply, expected):
        model = scripted(NO_CONFIDENCE, confidence=reply)
        (row,) = evaluate(model, rows_of(), tmp_path / "p.jsonl").rows
        assert row["confidence"] == expected
        assert row["source"] == ("missing" if expected is None else "forced")

    @pytest.mark.parametrize(("first", "expected"), [(" 60", 0.6), (" I cannot tell", None)])
    def test_a_forced_confidence_ends_with_the_line(self, tmp_path, first, expected):
        """What a model writes below is a text of its own, such as the next problem."""
        found = []
        for i, below in enumerate(("", "\n75", "\n\nPROBLEM 9: 10%")):
            model = scripted(NO_CONFIDENCE, confidence=first + below)
            found += evaluate(model, rows_of(), tmp_path / f"{i}.jsonl").rows
        assert [row["confidence"] for row in found] == [expected] * 3

    def test_no_forcing(self, tmp_path):
        replies = {"p0": FULL, "p1": NO_CONFIDENCE, "p2": CUT_OFF}
        model = scripted(lambda p, *_: replies[p[:2]])
        found = evaluate(model, rows_of(3), tmp_path / "p.jsonl", force=False)
        assert len(model.calls) == 1
        assert found.source.tolist() == ["stated", "missing", "missing"]
        assert [r["answer"] for r in found.rows] == ["4", "4", None]

    def test_a_rlvr_completion_states_none(self, tmp_path):
        model = scripted(NO_CONFIDENCE)
        (row,) = evaluate(model, rows_of(), tmp_path / "p.jsonl", format="ta").rows
        assert (row["source"], row["error"]) == ("forced", None)

    def test_chats_are_continued_not_closed(self, tmp_path):
        chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}]
        prefilled = [*chat, {"role": "assistant", "content": "<think>"}]
        rows = [{"prompt": p, "answer": "4"} for p in (chat, prefilled)]
        model = scripted(NO_CONFIDENCE)
        found = evaluate(model, rows, tmp_path / "p.jsonl")
        assert found.source.tolist() == ["forced"] * 2
        plain, begun = asked(model, "confidence")
        assert [m["role"] for m in plain] == ["system", "user", "assistant"]
        assert plain[-1]["content"].startswith(NO_CONFIDENCE)
        assert [m["role"] for m in begun] == ["system", "user", "assistant"]
        assert begun[-1]["content"].startswith(f"<think>{NO_CONFIDENCE}")

    def test_completions_cut_at_the_limit_are_marked(self, tmp_path):
        model = scripted("<think>one two three four")
        found = evaluate(model, rows_of(), tmp_path / "p.jsonl", max_tokens=2)
        assert found.rows[0]["truncated"] is True
        assert found.rows[0]["completion"] == "<think>one two"
        found = evaluate(scripted(FULL), rows_of(), tmp_path / "q.jsonl")
        assert found.rows[0]["truncated"] is False


class TestRecords:
    def test_samples_have_numbered_ids(self, tmp_path):
        model = scripted(lambda p, seed, k: render_completion(str(k), f"0.{k}"))
        found = evaluate(model, rows_of(2), tmp_path / "p.jsonl", samples=3, temperature=1.0)
        assert [r["id"] for r in found.rows] == [f"r{i}#{k}" for i in (0, 1) for k in range(3)]
        assert [r["answer"] for r in found.rows] == ["0", "1", "2"] * 2
        assert [r["prompt"] for r in found.rows] == ["p0: 2+2="] * 3 + ["p1: 2+2="] * 3
        assert found.confidence.tolist() == [0.0, 0.1, 0.2] * 2

    def test_ids_default_to_places(self, tmp_path):
        rows = [{"prompt": "p", "answer": "4"}, {"prompt": "q", "answer": "5"}]
        found = evaluate(scripted(FULL), rows, tmp_path / "p.jsonl")
        assert [r["id"] for r in found.rows] == ["0", "1"]
        assert found.correct.tolist() == [1, 0]

    def test_each_row_s_own_verifier(self, tmp_path):
        half = render_completion("1/2", "0.5")
        rows = [
            {"prompt": "p", "answer": "0.5", "verifier": name, "id": str(name)}
            for name in ("exact_match", "math", None)
        ]
        found = evaluate(scripted(half), rows, tmp_path / "p.jsonl")
        assert found.correct.tolist() == [0, 1, 1]
        one = evaluate(scripted(half), rows, tmp_path / "q.jsonl", verifier="exact_match")
        assert one.correct.tolist() == [0, 0, 0]
        one = evaluate(scripted(half), rows, tmp_path / "r.jsonl", verifier=MathVerifier())
        assert one.correct.tolist() == [1, 1, 1]

    def test_a_gold_that_is_none_is_not_graded(self, tmp_path):
        golds = [None, "4", ""]
        rows = [{**row, "answer": gold} for row, gold in zip(rows_of(3), golds, strict=True)]
        found = evaluate(scripted(FULL), rows, tmp_path / "p.jsonl")
        assert [r["correct"] for r in found.rows] == [None, True, None]
        assert np.isnan(found.correct).tolist() == [True, False, True]
        assert [r["gold"] for r in found.rows] == [None, "4", ""]

    def test_any_of_several_golds_and_another_column(self, tmp_path):
        rows = [{"prompt": "p", "solution": ["four", "4"]}]
        found = evaluate(scripted(FULL), rows, tmp_path / "p.jsonl", gold_column="solution")
        assert found.correct.tolist() == [1]

    def test_settings_are_beside_the_file(self, tmp_path):
        out = tmp_path / "p.jsonl"
        evaluate(scripted(FULL), rows_of(), out, seed=5, batch_size=3, metadata={"data": "x"})
        about = read_metadata(out)
        assert (about["model"], about["seed"], about["data"]) == ("scripted", 5, "x")
        assert (about["verifier"], about["gold_column"], about["batch_size"]) == (None, "answer", 3)

    def test_prompt_text(self):
        assert prompt_text("2+2") == "2+2"
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>"}]
        assert prompt_text(chat) == "a"


class TestResume:
    """Five rows in batches of two; the confidence depends on the seed of the batch."""

    ROWS = rows_of(5)
    NAMED = {"batch_size": 2, "samples": 2, "temperature": 0.7, "seed": 3}  # noqa: RUF012

    @staticmethod
    def model(broken=()):
        def main(prompt, seed, sample):
            if prompt[:2] in broken:
                raise RuntimeError("the server is gone")
            return render_completion(prompt[1], f"0.{seed}{sample}")

        return scripted(main)

    @pytest.fixture
    def whole(self, tmp_path):
        file = tmp_path / "whole.jsonl"
        evaluate(self.model(), self.ROWS, file, **self.NAMED)
        return file.read_bytes()

    def test_after_an_exception(self, tmp_path, whole):
        file = tmp_path / "p.jsonl"
        with pytest.raises(RuntimeError, match="gone"):
            evaluate(self.model(broken=["p2"]), self.ROWS, file, **self.NAMED)
        assert file.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
        model = self.model()
        found = evaluate(model, self.ROWS, file, resume=True, **self.NAMED)
        assert file.read_bytes() == whole
        assert [p[:2] for p in asked(model, "main")] == ["p2", "p3", "p4"]
        assert [call["seed"] for call in model.calls] == [4, 5]
        assert len(found.rows) == 10

    @pytest.mark.parametrize("kept", [1, 300, 1000, 1500])
    def test_after_a_kill_at_any_byte(self, tmp_path, whole, kept):
        file = tmp_path / "p.jsonl"
        assert kept < len(whole)
        evaluate(self.model(), self.ROWS, file, **self.NAMED)  # for the settings beside it
        file.write_bytes(whole[:kept])
        evaluate(self.model(), self.ROWS, file, resume=True, **self.NAMED)
        assert file.read_bytes() == whole

    def test_a_complete_file_asks_nothing(self, tmp_path, whole):
        model = self.model()
        found = evaluate(model, self.ROWS, tmp_path / "whole.jsonl", resume=True, **self.NAMED)
        assert model.calls == []
        assert len(found.rows) == 10

    @pytest.mark.parametrize(
        "changed",
        [
            {"temperature": 1.0},
            {"seed": 4},
            {"batch_size": 3},  # the seeds of the samples would be others
            {"verifier": "exact_match"},
            {"gold_column": "id"},
            {"force": False},
            {"samples": 3},
            {"format": "tac"},
            {"max_tokens": 9},
            {"top_p": 0.5},
            {"metadata": {"data": "other"}},
        ],
        ids=lambda changed: next(iter(changed)),
    )
    def test_other_settings_are_refused(self, tmp_path, whole, changed):
        file = tmp_path / "whole.jsonl"
        (name,) = changed.get("metadata", changed)
        with pytest.raises(UserError, match=f"made with other settings.*{name}"):
            evaluate(self.model(), self.ROWS, file, resume=True, **{**self.NAMED, **changed})
        assert file.read_bytes() == whole

    def test_a_file_with_content_is_refused(self, tmp_path, whole):
        with pytest.raises(UserError, match="has content; resume the run"):
            evaluate(self.model(), self.ROWS, tmp_path / "whole.jsonl", **self.NAMED)


class TestRefused:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([], "there is no row"),
            ([{"answer": "4"}], "row 0 has no column 'prompt'; it has answer"),
            ([*rows_of(), {"prompt": "p", "gold": "4"}], "row 1 has no column 'answer'; it has"),
            ([{}], "it has none"),
            (rows_of(2, id="same"), "rows 0 and 1 have the same id 'same'"),
        ],
    )
    def test_rows(self, tmp_path, rows, message):
        with pytest.raises(UserError, match=message):
            evaluate(scripted(FULL), rows, tmp_path / "p.jsonl")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("named", "message"),
        [
            ({"samples": 0}, "samples and batch_size must be at least 1, not 0 and 64"),
            ({"batch_size": -1}, "not 1 and -1"),
            ({"verifier": "exakt_match"}, "exakt_match"),
            ({"format": "tabd"}, "format must be one of"),
            ({"temperature": -1.0}, "temperature must be"),
            ({"temperature": float("nan")}, "temperature must be"),
            ({"top_p": 0.0}, "top_p must be"),
            ({"max_tokens": 0}, "max_tokens must be"),
            ({"seed": -1}, "seed must be"),
        ],
    )
    def test_options(self, tmp_path, named, message):
        with pytest.raises(UserError, match=message):
            evaluate(scripted(FULL), rows_of(), tmp_path / "p.jsonl", **named)
        assert list(tmp_path.iterdir()) == []

    def test_file_in_no_folder(self, tmp_path):
        model = scripted(FULL)
        with pytest.raises(UserError, match="does not exist"):
            evaluate(model, rows_of(), tmp_path / "no" / "p.jsonl")
        assert model.calls == []  # nothing was asked for in vain


class TestSummary:
    def test_by_source(self, tmp_path):
        replies = ["0.9", "0.8", "", "0.7", ""]
        golds = ["4", "5", "4", None, "5"]
        rows = [{**row, "answer": gold} for row, gold in zip(rows_of(5), golds, strict=True)]

        def main(prompt, *_):
            stated = replies[int(prompt[1])]
            return render_completion("4", stated) if stated else NO_CONFIDENCE

        found = summary(evaluate(scripted(main), rows, tmp_path / "p.jsonl"))
        assert (found["rows"], found["graded"]) == (5, 4)
        assert found["accuracy"] == 0.5
        assert found["sources"] == {"forced": 2, "stated": 3}
        assert list(found["reports"]) == ["all", "forced", "stated"]
        assert found["reports"]["stated"] == calibration_report([0.9, 0.8], [1, 0])
        assert found["reports"]["forced"] == calibration_report([0.6, 0.6], [1, 0])
        assert found["reports"]["all"].brier == pytest.approx((0.01 + 0.64 + 0.16 + 0.36) / 4)

    def test_one_source_needs_one_report(self, tmp_path):
        found = evaluate(scripted(FULL), rows_of(2), tmp_path / "p.jsonl")
        with pytest.warns(MetricsWarning, match="AUROC is undefined: all 2 answers are right"):
            result = summary(found)
        assert list(result["reports"]) == ["all"]
        assert result["accuracy"] == 1.0

    def test_nothing_graded_or_nothing_stated(self, tmp_path):
        rows = rows_of(2, answer=None)
        found = summary(evaluate(scripted(FULL), rows, tmp_path / "p.jsonl"))
        assert (found["graded"], found["accuracy"], found["reports"]) == (0, None, {})
        model = scripted(NO_CONFIDENCE)
        found = summary(evaluate(model, rows_of(2), tmp_path / "q.jsonl", force=False))
        assert (found["accuracy"], found["sources"], found["reports"]) == (1.0, {"missing": 2}, {})


def sample_file(path, groups, first=0):
    """Write samples; a group holds (answer, confidence, correct)."""
    lines = [
        json.dumps(
            {"id": f"{name}#{first + k}", "answer": a, "confidence": q, "correct": c},
        )
        for name, samples in groups.items()
        for k, (a, q, c) in enumerate(samples)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


GROUPS = {
    # majority 5 (wrong); max and weighted 4 (0.9 against 0.6)
    "a": [("4", 0.9, True), ("5", 0.3, False), ("5", 0.3, False)],
    # majority 7 (right); max and weighted 8 (0.9 against 0.5)
    "b": [("7", 0.2, True), ("8", 0.9, False), ("7", 0.3, True)],
    # equal answers of other spelling: majority and weighted 1/2 (0.8 against 0.7), max 3
    "x#y": [("1/2", 0.4, True), ("0.5", 0.4, True), ("3", 0.7, False)],
}


class TestVoteOnFile:
    def test_accuracy_by_hand(self, tmp_path):
        found = vote_on_file(sample_file(tmp_path / "p.jsonl", GROUPS), verifier="math")
        assert (found["prompts"], found["samples"], found["sizes"]) == (3, 3, [1, 2, 3])
        last = {name: values[-1] for name, values in found["accuracy"].items()}
        assert last == pytest.approx({"majority": 2 / 3, "max": 1 / 3, "weighted": 2 / 3})
        assert found["pass_at_n"] == pytest.approx([5 / 9, (2 / 3 + 1 + 1) / 3, 1.0])
        assert found["consistency"]["mean_sum"] == pytest.approx((1.2 + 1.15 + 1.1) / 3)
        assert found["consistency"]["share_above_one"] == 1.0
        # With one sample there is nothing to vote on.
        assert len({values[0] for values in found["accuracy"].values()}) == 1

    def test_the_verifier_says_what_is_equal(self, tmp_path):
        file = sample_file(tmp_path / "p.jsonl", GROUPS)
        found = vote_on_file(file, verifier=ExactMatch())
        last = {name: values[-1] for name, values in found["accuracy"].items()}
        # Three spellings are three answers now, and the tie goes to the largest q: 3, wrong.
        assert last == pytest.approx({"majority": 1 / 3, "max": 1 / 3, "weighted": 1 / 3})
        assert found["consistency"]["mean_sum"] == pytest.approx((1.2 + 1.15 + 1.5) / 3)

    def test_missing_answers_and_confidences(self, tmp_path):
        groups = {"a": [(None, None, False), ("4", None, True), ("5", 0.0, False), (6, 0.1, False)]}
        found = vote_on_file(sample_file(tmp_path / "p.jsonl", groups))
        last = {name: values[-1] for name, values in found["accuracy"].items()}
        assert last == {"majority": 0.0, "max": 0.0, "weighted": 0.0}  # 6 has the largest q
        assert found["sizes"] == [1, 2, 4]
        groups = {"a": [(None, 0.9, False), ("4", None, True)]}
        found = vote_on_file(sample_file(tmp_path / "q.jsonl", groups))
        assert {values[-1] for values in found["accuracy"].values()} == {1.0}

    def test_the_seed_fixes_the_subsets(self, tmp_path):
        file = sample_file(tmp_path / "p.jsonl", GROUPS)
        assert vote_on_file(file, seed=1) == vote_on_file(file, seed=1)

    def test_what_evaluate_writes(self, tmp_path):
        def main(prompt, seed, sample):
            return render_completion("4" if sample else "5", "0.8")

        evaluate(scripted(main), rows_of(3), tmp_path / "p.jsonl", samples=4, temperature=1.0)
        found = vote_on_file(tmp_path / "p.jsonl")
        assert (found["prompts"], found["samples"]) == (3, 4)
        assert found["accuracy"]["majority"][-1] == 1.0

    @pytest.mark.parametrize("name", ["a", "", "a#", "a#one", "a#-1", None])
    def test_ids_of_another_form(self, tmp_path, name):
        file = tmp_path / "p.jsonl"
        file.write_text(json.dumps({"id": name, "answer": "4", "confidence": 1, "correct": 1}))
        with pytest.raises(UserError, match="is not NAME#0, NAME#1"):
            vote_on_file(file)

    def test_no_ids_at_all(self, tmp_path):
        (tmp_path / "p.jsonl").write_text('{"confidence": 1, "correct": 1}')
        with pytest.raises(UserError, match="is not NAME#0, NAME#1"):
            vote_on_file(tmp_path / "p.jsonl")

    def test_uneven_samples(self, tmp_path):
        file = sample_file(tmp_path / "p.jsonl", {**GROUPS, "z": [("1", 0.5, True)]})
        with pytest.raises(UserError, match="prompts have 1 to 3 samples"):
            vote_on_file(file)

    def test_an_id_twice(self, tmp_path):
        file = sample_file(tmp_path / "p.jsonl", GROUPS)
        file.write_text(file.read_text() * 2)
        with pytest.raises(UserError, match="the id 'a#0' is there twice"):
            vote_on_file(file)

    def test_rows_without_a_grade(self, tmp_path):
        groups = {"a": [("4", 0.9, None), ("5", 0.3, False)]}
        with pytest.raises(UserError, match="1 rows have no grade"):
            vote_on_file(sample_file(tmp_path / "p.jsonl", groups))


TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def parts():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    # Wide weights: the most likely token leads by far, whatever is computed beside it.
    model = tiny_llama(
        len(tokenizer), hidden=32, initializer_range=0.3, max_position_embeddings=1024
    )
    return model, tokenizer


class TestTransformers:
    """A tiny random model: nothing it says is right, all of it must be recorded alike."""

    ROWS = [{"id": f"r{i}", "prompt": "x" * (3 * i + 1), "answer": "4"} for i in range(5)]  # noqa: RUF012

    def test_end_to_end(self, parts, tmp_path):
        model = TransformersModel(*parts)
        found = evaluate(model, self.ROWS, tmp_path / "p.jsonl", max_tokens=12)
        assert [r["id"] for r in found.rows] == [row["id"] for row in self.ROWS]
        assert set(found.source) <= {"forced", "missing"}
        assert all(r["completion"] for r in found.rows)
        assert len({r["completion"] for r in found.rows}) > 1
        assert found.correct.tolist() == [0] * 5
        with pytest.warns(MetricsWarning, match="answers are wrong"):
            assert summary(found)["graded"] == 5

    def test_a_forced_question_without_room_leaves_its_row_missing(self, parts, tmp_path, caplog):
        model = TransformersModel(*parts, context=180)
        rows = [{"id": "long", "prompt": "x" * 100, "answer": "4"}, {**self.ROWS[0], "id": "short"}]
        found = evaluate(model, rows, tmp_path / "p.jsonl", max_tokens=60)
        assert found.rows[0]["answer_source"] == "missing"
        assert len(found.rows) == 2
        assert "does not fit" in caplog.text

    def test_greedy_is_reproducible_and_independent_of_batches(self, parts, tmp_path):
        seen = set()
        for i, (own, size) in enumerate([(1, 1), (16, 64), (16, 64), (2, 3), (16, 2)]):
            file = tmp_path / f"{i}.jsonl"
            model = TransformersModel(*parts, batch_size=own)
            evaluate(model, self.ROWS, file, max_tokens=12, batch_size=size)
            seen.add(file.read_bytes())
        assert len(seen) == 1

    def test_samples_are_reproducible(self, parts, tmp_path):
        texts = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            found = evaluate(
                TransformersModel(*parts), self.ROWS, tmp_path / f"{name}.jsonl", max_tokens=8,
                samples=2, temperature=1.0, seed=seed, force=False,
            )  # fmt: skip
            texts.append([r["completion"] for r in found.rows])
        assert texts[0] == texts[1]
        assert texts[0] != texts[2]
        assert texts[0][0] != texts[0][1]

    def test_chats_equal_the_texts_their_template_makes(self, parts, tmp_path):
        chats = [{"prompt": [{"role": "user", "content": c}], "answer": "4"} for c in "ab"]
        texts = [{"prompt": f"<bos>user: {c}<eos><bos>assistant: ", "answer": "4"} for c in "ab"]
        model = TransformersModel(*parts)
        results = [
            evaluate(model, rows, tmp_path / f"{i}.jsonl", max_tokens=12).rows
            for i, rows in enumerate((chats, texts))
        ]
        for one, other in zip(*results, strict=True):
            assert {**one, "prompt": 0} == {**other, "prompt": 0}
        assert results[0][0]["completion"] != results[0][1]["completion"]


def test_fractional_grades_stay_fractions(tmp_path):
    found = evaluate(
        scripted(FULL), rows_of(), tmp_path / "p.jsonl", verifier=get_verifier(lambda a, g: 0.25)
    )
    assert found.correct.tolist() == [0.25]
