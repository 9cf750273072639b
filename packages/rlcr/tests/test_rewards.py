import logging
import math
import pickle
import threading
import warnings

import numpy as np
import pytest

from rlcr import rewards
from rlcr.parsing import ERROR_CODES, parse_completion
from rlcr.reference import naive_rlcr_reward
from rlcr.rewards import RewardWarning, RLCRReward, completion_text, prompt_text
from rlcr.scoring import BetaFamily, Brier, ClippedLog, RankedBins, Spherical
from rlcr.verify import ExactMatch, FunctionVerifier, Judge, Verifier
from tenfold_common.errors import MissingDependencyError, UserError
from tenfold_common.lm import ScriptedModel
from tenfold_common.tiny import tiny_llama, word_tokenizer


def tac(answer: str, confidence: object = 0.5, think: str = "t") -> str:
    return f"{think}</think><answer>{answer}</answer><confidence>{confidence}</confidence>"


def exact(**named) -> RLCRReward:
    return RLCRReward(**{"verifier": "exact_match", "format": "tac", **named})


class Counting(Verifier):
    name = "counting"

    def __init__(self) -> None:
        self.calls, self.answers = 0, 0

    def grade(self, answers, golds, prompts=None):
        self.calls += 1
        self.answers += len(answers)
        return ExactMatch().grade(answers, golds)


# The numbers


@pytest.mark.parametrize("q", [0.0, 0.25, 0.8, 1.0])
@pytest.mark.parametrize("c", [0, 1])
def test_total_is_the_papers_reward_and_a_constant(q: float, c: int) -> None:
    (total,) = exact()(completions=[tac("x", q)], answer=["x" if c else "y"])
    assert total == pytest.approx(naive_rlcr_reward(c, q) + 2.0)
    half = exact(format_weight=0.5, correctness_weight=0.5, calibration_weight=0.5)
    (total,) = half(completions=[tac("x", q)], answer=["x" if c else "y"])
    assert total == pytest.approx(0.5 * naive_rlcr_reward(c, q) + 1.0)


@pytest.mark.parametrize("rule", [Brier(), Spherical(), ClippedLog(), BetaFamily(2, 1)])
def test_functions_and_weights_make_up_the_total(rule) -> None:
    reward = exact(rule=rule, format_weight=0.7, correctness_weight=1.25, calibration_weight=0.5)
    assert reward.weights == [0.7, 1.25, 0.5]
    completions = [tac("x", 0.9), tac("x", 0.1), tac("y", 0.9), "broken", tac("x", 2)]
    columns = {"completions": completions, "answer": ["x"] * 5}
    terms = [function(**columns) for function in reward.functions()]
    assert terms[0] == [1, 1, 1, 0, 0]
    assert terms[1] == [1, 1, 0, 0, 0]
    expected = rule.score([0.9, 0.1, 0.9], [1, 1, 0]).tolist()
    assert terms[2] == [*expected, 0, 0]
    total = np.array(reward.weights) @ np.array(terms)
    assert reward(**columns) == pytest.approx(total.tolist())


def test_malformed_gets_zero_and_no_well_formed_completion_gets_less() -> None:
    reward = exact()
    malformed = ["", "x", tac("x", "nan"), tac("x", 80), tac("", 1), tac("x") + "!", "<think>"]
    for function in [*reward.functions(), reward]:
        assert function(completions=malformed, answer=["x"] * 7) == [0.0] * 7
    for rule in (Brier(), Spherical(), ClippedLog(), BetaFamily(3, 0.5), RankedBins()):
        for weights in ((1, 1, 1), (0.5, 0.5, 0.5), (0, 1, 0.3), (0.1, 2, 0)):
            names = ("format_weight", "correctness_weight", "calibration_weight")
            reward = exact(rule=rule, **dict(zip(names, weights, strict=True)))
            totals = [
                reward(completions=[tac("x", q)], answer=[gold])[0]
                for q in (0, 0.5, 1)
                for gold in "xy"
            ]
            assert min(totals) >= -1e-6
            assert min(totals) == pytest.approx(reward.format_margin(), abs=1e-6)
    assert exact().format_margin() == 1.0  # the paper's code: 0.5, with weights of 0.5


def test_score_returns_everything() -> None:
    with pytest.warns(RewardWarning, match="row 3"):
        scores = exact().score([tac("x", 0.9), tac("y", 0.2), "bad", tac("x")], ["x", "x", "x", ""])
    np.testing.assert_array_equal(scores.format, [1, 1, 0, np.nan])
    np.testing.assert_array_equal(scores.correct, [1, 0, 0, np.nan])
    np.testing.assert_array_equal(scores.confidence, [0.9, 0.2, np.nan, 0.5])
    np.testing.assert_allclose(scores.calibration, [0.99, 0.96, 0, np.nan])
    np.testing.assert_allclose(scores.reward, [2.99, 1.96, 0, np.nan])
    assert scores.parsed[2].error == "missing_think"
    assert scores.verifier_failures == 0
    assert exact().score([], []).reward.shape == (0,)


def test_rlvr_has_no_calibration_reward_but_logs_it() -> None:
    for format, text in (("tac", tac("x", 0.9)), ("ta", "</think><answer>x</answer>")):
        reward = exact(method="rlvr", format=format)
        assert reward.weights == [1.0, 1.0, 0.0]
        assert reward(completions=[text], answer=["x"]) == [2.0]
        logged = {}
        reward.format_reward(completions=[text], answer=["x"], log_metric=logged.__setitem__)
        assert logged["rlcr/calibration"] == pytest.approx(0.99 if format == "tac" else 0.0)
        assert ("rlcr/confidence" in logged) == (format == "tac")


# Rows that cannot be scored


def test_rows_without_a_gold_answer_are_left_out_of_every_term() -> None:
    reward = exact()
    columns = {
        "completions": [tac("x"), tac("x"), "bad", tac("x"), tac("x")],
        "answer": ["x", None, "  ", [], float("nan")],
    }
    with pytest.warns(RewardWarning, match=r"row 1 and 3 others of a batch of 5.*left out"):
        first = reward.format_reward(**columns)
    assert first == [1, None, None, None, None]
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        for function in [*reward.functions(), reward]:
            assert function(**columns)[1:] == [None] * 4
        reward.format_reward(completions=[tac("y")], answer=[None])


def test_nan_is_never_returned() -> None:
    reward = RLCRReward(verifier=FunctionVerifier(lambda answer, gold: math.nan), format="tac")
    for function in [*reward.functions(), reward]:
        (value,) = function(completions=[tac("x", 0.25)], answer=["x"])
        assert value is not None
        assert math.isfinite(value)


# Verifiers that fail


def test_a_verifier_that_raises_costs_its_row_only(caplog: pytest.LogCaptureFixture) -> None:
    def fragile(answer: str, gold: object) -> bool:
        if answer == "boom":
            raise RuntimeError("no")
        return answer == gold

    reward = exact(verifier=fragile)
    completions = [tac("x"), tac("boom"), tac("y"), tac("boom"), "bad"]
    logged = {}
    with caplog.at_level(logging.WARNING):
        columns = {"completions": completions, "answer": ["x"] * 5}
        assert reward.accuracy_reward(**columns) == [1, 0, 0, 0, 0]
        reward.format_reward(**columns, log_metric=logged.__setitem__)
        reward.accuracy_reward(completions=[tac("boom")], answer=["x"])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "fragile raised RuntimeError: no" in caplog.text
    assert logged["rlcr/verifier_failures"] == 0.4
    assert reward.score(completions, ["x"] * 5).verifier_failures == 2


def test_a_batch_verifier_that_raises_is_asked_once() -> None:
    class Down(Counting):
        rowwise = False

        def grade(self, answers, golds, prompts=None):
            self.calls += 1
            raise ConnectionError("down")

    verifier = Down()
    scores = exact(verifier=verifier).score([tac("x"), tac("y")], ["x", "y"])
    assert (verifier.calls, scores.verifier_failures) == (1, 2)
    assert scores.correct.tolist() == [0.0, 0.0]


def test_a_missing_package_is_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(MissingDependencyError):
        RLCRReward(verifier="auto", format="tac").score([tac("7")], ["7"])


def test_grades_out_of_range_or_too_few_count_as_failures() -> None:
    class Odd(Verifier):
        name = "odd"

        def grade(self, answers, golds, prompts=None):
            return [7.0] if golds == ["seven"] else []

    scores = exact(verifier=Odd()).score([tac("x"), tac("x")], ["seven", "none"])
    assert scores.correct.tolist() == [0.0, 0.0]
    assert scores.verifier_failures == 2


# Sharing between the functions


def test_one_parse_and_one_verification_for_all_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    monkeypatch.setattr(
        rewards, "parse_completion", lambda *a: parsed.append(a) or parse_completion(*a)
    )
    verifier = Counting()
    reward = exact(verifier=verifier)

    def batch(text: str, gold: object) -> dict:
        return {"completions": [[{"role": "assistant", "content": text}]] * 3, "answer": [gold] * 3}

    for function in [*reward.functions(), reward]:
        function(**batch(tac("x"), "x"))
    assert (len(parsed), verifier.calls, verifier.answers) == (1, 1, 3)  # equal texts: once
    reward.accuracy_reward(**batch(tac("x"), "y"))  # other gold answers: another batch
    reward.accuracy_reward(**batch(tac("x", 0.6), "x"))
    assert (len(parsed), verifier.calls) == (3, 3)
    assert reward.accuracy_reward(**batch(tac("1"), 1)) == [1.0] * 3
    assert reward.accuracy_reward(**batch(tac("1"), "1")) == [1.0] * 3
    for i in range(20):
        reward.accuracy_reward(**batch(tac("x"), str(i)))
    assert len(reward._batches) <= 4


def test_functions_may_run_in_threads() -> None:
    verifier = Counting()
    reward = exact(verifier=verifier)
    columns = {"completions": [tac("x", i / 200) for i in range(200)], "answer": ["x"] * 200}
    results: list = []
    threads = [
        threading.Thread(target=lambda f=function: results.append(f(**columns)))
        for function in reward.functions() * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    assert (verifier.calls, verifier.answers) == (1, 200)


def test_reward_can_be_sent_to_another_process() -> None:
    reward = RLCRReward(format="tac")
    columns = {"completions": [tac("1/2")], "answer": ["0.5"]}
    before = reward(**columns)
    copies = pickle.loads(pickle.dumps([reward, *reward.functions()]))
    assert copies[0](**columns) == before
    assert copies[2](**columns) == [1.0]


# Columns and completions


def test_missing_columns_are_named() -> None:
    reward = exact(gold_column="solution", verifier_column="kind")
    with pytest.raises(UserError, match=r"no column 'solution' for gold_column.*'answer', 'kind'"):
        reward(completions=[tac("x")], answer=["x"], kind=["exact_match"], trainer_state=None)
    with pytest.raises(UserError, match=r"no column 'kind' for verifier_column.*Did you mean 'kin"):
        reward.check_columns(["solution", "kin"])
    reward.check_columns(["kind", "solution", "prompt"])
    with pytest.raises(UserError, match="it has none"):
        exact()(completions=[tac("x")])
    with pytest.raises(UserError, match="one value for each of the 1 completions"):
        exact()(completions=[tac("x")], answer=["x", "y"])
    with pytest.raises(UserError, match="2 golds do not fit 1"):
        exact().score([tac("x")], ["x", "y"])


def test_verifier_by_column() -> None:
    reward = exact(verifier_column="kind")
    completions = [tac("1/2"), tac("1/2"), tac("(B)"), tac("the x")]
    columns = {"answer": ["0.5", "0.5", "B", "x"], "kind": ["math", "exact_match", "choice", None]}
    assert reward.accuracy_reward(completions=completions, **columns) == [1, 0, 1, 1]
    with pytest.raises(UserError, match="Did you mean 'math'"):
        reward(completions=[tac("x")], answer=["x"], kind=["maths"])
    scores = exact().score([tac("x")] * 2, ["x"] * 2, verifiers=[None, lambda a, g: False])
    assert scores.correct.tolist() == [1.0, 0.0]


def test_chat_completions() -> None:
    def said(content: object, **more: object) -> dict:
        return {"role": "assistant", "content": content, **more}

    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert completion_text("plain") == "plain"
    assert completion_text([said("x")]) == "x"
    assert completion_text([said("x"), {"role": "tool", "content": "t"}, said("y")]) == "y"
    assert completion_text([said("x"), {"role": "user", "content": "t"}]) == "x"
    assert completion_text([said(blocks)]) == "ab"
    assert completion_text([said(None, tool_calls=[{}])]) == ""


@pytest.mark.parametrize(
    "completion",
    [
        {"role": "assistant", "content": "x"},
        None,
        7,
        [],
        [{"role": "user", "content": "x"}],
        ["x"],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": {"a": 1}}],
        [{"role": "assistant", "content": [{"type": "image", "image": 0}]}],
        [{"role": "assistant"}],
    ],
)
def test_other_completions_are_refused_by_index(completion: object) -> None:
    with pytest.raises(UserError, match="completion 1"):
        exact()(completions=[tac("x"), completion], answer=["x", "x"])


def test_judge_gets_the_question() -> None:
    class Model:
        name = "scripted"
        asked: tuple[str, ...] = ()

        def sample(self, prompts, *, temperature, max_tokens):
            self.asked += tuple(prompts)
            return [[type("Reply", (), {"text": "YES"})] for _ in prompts]

    model = Model()
    reward = exact(verifier=Judge(model))  # pyright: ignore[reportArgumentType]
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Who?"}]
    columns = {"prompts": [chat, "Where?"], "completions": [tac("x")] * 2, "answer": ["y"] * 2}
    for function in reward.functions():
        function(**columns)
    assert len(model.asked) == 2
    assert "\nWho?\n" in model.asked[0]
    assert "\nWhere?\n" in model.asked[1]
    with pytest.raises(UserError, match="a prompt must be"):
        prompt_text([{"role": "system", "content": "S"}])


def test_another_prompt_is_another_grade() -> None:
    """Equal texts and golds share a batch's scores only if the judge saw the same questions."""
    model = ScriptedModel(lambda prompt, seed, sample: "YES" if "\nWho?\n" in prompt else "NO")
    reward = exact(verifier=Judge(model))
    columns = {"completions": [tac("x", 1)], "answer": ["y"]}
    for prompt, right in (("Who?", 1), ("Where?", 0), ("Who?", 1)):
        for function in (reward.accuracy_reward, reward.calibration_reward):
            assert function(prompts=[prompt], **columns) == [right]
        assert reward(prompts=[prompt], **columns) == [1 + 2 * right]
    assert len(model.calls) == 2  # the third batch is the first


# Settings that are refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration_weight": 1.5}, "margin|is -0.5"),
        ({"calibration_weight": 1.5}, r"at most 1\b"),
        ({"rule": ClippedLog(scaled=False)}, r"is -1\.944.*at most 0\.3396"),
        ({"rule": ClippedLog(eps=0.4, scaled=False), "calibration_weight": 1.2}, "outweighs"),
        ({"correctness_weight": -1}, "correctness_weight must be a finite number >= 0, not -1"),
        ({"calibration_weight": -0.1}, "calibration_weight must be"),
        ({"format_weight": math.nan}, "format_weight must be"),
        ({"format_weight": math.inf}, "format_weight must be"),
        ({"format": "abc"}, "Did you mean 'tabc'"),
        ({"format": "ta"}, "no confidence to reward"),
        ({"method": "rlcrr"}, "Did you mean 'rlcr'"),
        ({"rule": "breir"}, "Did you mean 'brier'"),
        ({"verifier": "exact_mach"}, "Did you mean 'exact_match'"),
    ],
)
def test_settings_that_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        exact(**settings)


def test_incorrect_incentives_need_to_be_allowed_and_negative_weights_never_are() -> None:
    exact(calibration_weight=1.5, allow_incorrect_incentive=True)
    exact(rule=ClippedLog(scaled=False), allow_incorrect_incentive=True)
    exact(correctness_weight=0.1 + 0.2, calibration_weight=0.3)
    exact(correctness_weight=0.3, calibration_weight=0.1 + 0.2)
    exact(correctness_weight=2.0, calibration_weight=1.5)
    exact(method="rlvr", rule=ClippedLog(scaled=False))  # weight 0: no incentive to break
    with pytest.raises(UserError, match="must be a finite number >= 0"):
        exact(calibration_weight=-1, allow_incorrect_incentive=True)


# Logs


def test_metrics_are_finite_and_logged_once_per_batch() -> None:
    reward = exact()
    completions = [tac("x", 0.9), tac("y", 0.5), "bad", tac("x", 80), tac("x", 0.9)]
    columns = {"completions": completions, "answer": ["x", "x", "x", "x", None]}
    logged: list[tuple[str, float]] = []
    extra: dict[str, list] = {}
    loggers = {"log_metric": lambda *pair: logged.append(pair), "log_extra": extra.__setitem__}
    form, *others = reward.functions()
    with pytest.warns(RewardWarning):
        form(**columns, **loggers)
    for function in others:
        function(**columns, **loggers)
    metrics = dict(logged)
    assert len(metrics) == len(logged)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert metrics["rlcr/parse/ok"] == 0.6
    assert metrics["rlcr/parse/missing_think"] == 0.2
    assert metrics["rlcr/parse/out_of_range"] == 0.2
    assert sum(metrics[f"rlcr/parse/{code}"] for code in ERROR_CODES) == pytest.approx(0.4)
    assert metrics["rlcr/accuracy"] == 0.25
    assert metrics["rlcr/unscorable"] == 0.2
    assert metrics["rlcr/confidence"] == pytest.approx(2.3 / 3)
    assert metrics["rlcr/distinct_confidences"] == 2
    assert metrics["rlcr/brier"] == pytest.approx((0.01 + 0.25) / 2)
    assert extra["rlcr_confidence"] == [0.9, 0.5, None, None, 0.9]
    assert extra["rlcr_parse"] == ["ok", "ok", "missing_think", "out_of_range", "ok"]
    assert extra["rlcr_answer"] == ["x", "y", None, None, "x"]
    logged.clear()
    reward(completions=["bad"], answer=["x"], **loggers)
    assert "rlcr/confidence" not in dict(logged)
    assert dict(logged)["rlcr/accuracy"] == 0.0


def test_names_in_the_training_log() -> None:
    reward = exact()
    names = [getattr(function, "__name__", None) for function in [*reward.functions(), reward]]
    assert names == ["format_reward", "accuracy_reward", "calibration_reward", "rlcr_reward"]


# A stock trainer


WORDS = ["</think>", "<answer>", "</answer>", "<confidence>", "</confidence>", "x", "y", "0.5", "?"]


@pytest.mark.parametrize("single", [False, True], ids=["functions", "total"])
def test_stock_grpo_trainer(single: bool, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, at import and in training
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        tokenizer = word_tokenizer(WORDS)
        verifier = Counting()
        reward = exact(verifier=verifier, gold_column="gold")
        args = GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            max_steps=2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            loss_type="bnpo",
            scale_rewards="none",
            reward_weights=None if single else reward.weights,
        )
        rows = {"prompt": ["?", "x ?"] * 4, "gold": ["x", None] * 4}
        trainer = GRPOTrainer(
            model=tiny_llama(len(tokenizer), hidden=32, layers=1, heads=2, kv_heads=1),
            reward_funcs=reward if single else reward.functions(),
            args=args,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
        )
        good = "</think> <answer> x </answer> <confidence> 0.5 </confidence>"
        decode = tokenizer.batch_decode
        monkeypatch.setattr(  # an untrained model cannot be expected to hit the format
            type(tokenizer),
            "batch_decode",
            lambda self, ids, **named: [good, *decode(ids, **named)[1:]],
        )
        trainer.train()
    log = trainer.state.log_history
    assert verifier.calls == 2
    assert verifier.answers == 16
    steps = [entry for entry in log if "reward" in entry]
    assert len(steps) == 2
    for entry in steps:
        assert entry["rlcr/unscorable"] == 0.5
        assert 1 / 8 <= entry["rlcr/parse/ok"] <= 1
        assert math.isfinite(entry["loss"])
        names = ["rlcr_reward"] if single else ["format_reward", "accuracy_reward"]
        names += [] if single else ["calibration_reward"]
        means = [entry[f"rewards/{name}/mean"] for name in names]
        assert all(map(math.isfinite, means))
        assert entry["reward"] == pytest.approx(sum(means))
