"""TRL's trainer with the calibration reward, a few real steps at a time on the toy task."""

import math
import warnings
from collections import deque
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from rlcr.config import RLCRConfig
from rlcr.monitor import CalibrationWarning, Monitor
from rlcr.parsing import parse_completion, render_completion
from rlcr.reference import naive_auroc, naive_brier, naive_ece
from rlcr.rewards import RLCRReward
from rlcr.toy import NoisySensor
from rlcr.trainer import RLCRTrainer, check_tokenizer, sft_warmup
from tenfold_common.errors import MissingDependencyError, UserError
from tenfold_common.tiny import word_tokenizer

TASK = NoisySensor()
WORDS = [w for w in TASK.tokenizer().get_vocab() if w not in ("<pad>", "<bos>", "<eos>", "<unk>")]
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **more):
        if "loss" in (logs or {}):
            self.values.append(float(logs["loss"]))


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.steps.append(torch.cat(parts).clone())


class Spy:
    """A reward function that earns nothing and remembers every completion."""

    def __init__(self, value=0.0):
        self.rows, self.value = [], value
        self.__name__ = "spy"

    def __call__(self, prompts, completions, answer, **more):
        self.rows += list(zip(prompts, completions, answer, strict=True))
        return [self.value] * len(completions)


def warmed(steps, rows, folder, losses=None):
    return sft_warmup(
        TASK.model(0), TASK.warmup(rows * steps, 7), str(folder), TASK.tokenizer(),
        callbacks=[losses] if losses else (), remove_callbacks=(PrinterCallback,),
        max_steps=steps, per_device_train_batch_size=rows, learning_rate=3e-3, warmup_steps=10,
        disable_tqdm=True, logging_steps=10, seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that writes the format, mostly, and knows little more."""
    return warmed(70, 128, tmp_path_factory.mktemp("base"))


def config(folder, **changes):
    values = {
        "per_device_train_batch_size": 32, "max_steps": 2, "logging_steps": 1, "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3, "seed": 0,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return RLCRConfig.preset("tiny", str(folder), **{**values, **changes})


def make(folder, model, *, rows=None, tokenizer=None, changes=None, **named):
    trainer = RLCRTrainer(
        deepcopy(model), config(folder, **(changes or {})),
        rows if rows is not None else TASK.dataset(TASK.draw(64, 5)),
        processing_class=tokenizer or TASK.tokenizer(), **named,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def history(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


class TestRefusals:
    def test_missing_gold_column(self, tmp_path):
        rows = TASK.dataset(TASK.draw(8, 0)).rename_column("answer", "solution")
        with pytest.raises(UserError, match=r"'answer'.*available: prompt, solution"):
            make(tmp_path, TASK.model(), rows=rows)

    def test_missing_prompt_in_the_evaluation_set(self, tmp_path):
        rows = TASK.dataset(TASK.draw(8, 0))
        with pytest.raises(UserError, match="lacks the column 'prompt'"):
            make(tmp_path, TASK.model(), eval_dataset=rows.remove_columns("prompt"))

    def test_missing_verifier_column(self, tmp_path):
        with pytest.raises(UserError, match="'how'"):
            make(tmp_path, TASK.model(), changes={"verifier_column": "how"})

    @pytest.mark.parametrize("specials", [("<answer>", "</answer>"), ("<confidence>",)])
    def test_tags_as_special_tokens(self, specials, tmp_path):
        words = [w for w in WORDS if w not in specials]
        tokenizer = word_tokenizer(words, specials=specials)
        with pytest.raises(UserError, match=rf"{specials[0]}.*special tokens, which decoding drop"):
            make(tmp_path, TASK.model(), tokenizer=tokenizer)

    def test_tags_not_in_the_vocabulary(self):
        with pytest.raises(UserError, match="its vocabulary cannot write them"):
            check_tokenizer(word_tokenizer(["1", "1.0"]), "tabc")

    def test_too_few_tokens(self, tmp_path):
        with pytest.raises(
            UserError, match=r"max_completion_length is 10, but .* has 11 tokens .*end of text"
        ):
            make(tmp_path, TASK.model(), changes={"max_completion_length": 10})
        make(tmp_path, TASK.model(), changes={"max_completion_length": 11})

    @pytest.mark.parametrize(("format", "tokens"), [("tabc", 11), ("tac", 9), ("ta", 6)])
    def test_length_by_format(self, format, tokens):
        assert check_tokenizer(TASK.tokenizer(), format) == tokens

    def test_every_prompt_too_long(self, tmp_path):
        with pytest.raises(UserError, match="shortest has 5"):
            make(tmp_path, TASK.model(), changes={"max_prompt_tokens": 4})

    def test_long_prompts_are_dropped(self, tmp_path):
        rows = TASK.dataset(TASK.draw(8, 0)).to_list()
        rows[3]["prompt"] = f"s1 {rows[3]['prompt']}"
        trainer = make(
            tmp_path, TASK.model(), rows=Dataset.from_list(rows), changes={"max_prompt_tokens": 5}
        )
        assert len(trainer.train_dataset) == 7

    def test_plain_trl_config(self, tmp_path):
        from trl import GRPOConfig

        args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        with pytest.raises(UserError, match="must be an RLCRConfig, not a GRPOConfig"):
            RLCRTrainer(TASK.model(), args, TASK.dataset(TASK.draw(8, 0)))

    def test_weights_without_functions(self, tmp_path):
        with pytest.raises(UserError, match="2 values for 1 extra reward function"):
            make(tmp_path, TASK.model(), extra_reward_funcs=[Spy()],
                 changes={"reward_weights": [1.0, 2.0]})  # fmt: skip

    def test_vllm_is_one_line(self, tmp_path):
        if __import__("importlib.util").util.find_spec("vllm"):
            pytest.skip("vLLM is installed")
        with pytest.raises(MissingDependencyError, match=r"needs vllm for use_vllm.*rlcr\[vllm\]"):
            make(tmp_path, TASK.model(), changes={"use_vllm": True})


def test_live_metrics_are_those_of_the_completions(base, tmp_path):
    """Recomputed from the texts with plain Python, over windows of two steps."""
    spy = Spy()
    trainer = make(
        tmp_path, base, extra_reward_funcs=[spy],
        changes={"max_steps": 4, "logging_steps": 2, "reward_weights": [0.0]},
    )  # fmt: skip
    trainer.train()
    logs = history(trainer)
    assert len(spy.rows) == 4 * 32
    assert len(logs) == 2
    for row, done in zip(logs, (spy.rows[:64], spy.rows[64:]), strict=True):
        parsed = [parse_completion(text) for _, text, _ in done]
        ok = [p.ok for p in parsed]
        right = [
            float(p.ok and p.answer == gold) for p, (_, _, gold) in zip(parsed, done, strict=True)
        ]
        q = [p.confidence for p in parsed if p.ok]
        c = [r for r, o in zip(right, ok, strict=True) if o]
        assert len(q) > 10  # otherwise there is nothing to compare
        expected = {
            "rlcr/accuracy": sum(right) / 64,
            "rlcr/stated": len(q) / 64,
            "rlcr/brier": naive_brier(q, c),
            "rlcr/ece": naive_ece(q, c),
            "rlcr/auroc": naive_auroc(q, c),
            "rlcr/confidence": sum(q) / len(q),
            "rlcr/distinct_confidences": len(set(q)),
            "rlcr/parse/ok": sum(ok) / 64,
            "rewards/format_reward/mean": sum(ok) / 64,
            "rewards/accuracy_reward/mean": sum(right) / 64,
            "rewards/calibration_reward/mean": sum(
                1 - (a - b) ** 2 for a, b in zip(q, c, strict=True)
            )
            / 64,
        }
        assert {n: row[n] for n in expected} == pytest.approx(expected, abs=1e-6)
        total = sum(row[f"rewards/{n}_reward/mean"] for n in ("format", "accuracy", "calibration"))
        assert row["reward"] == pytest.approx(0.5 * total, abs=1e-6)


class TestWeights:
    def test_of_extra_functions(self, base, tmp_path):
        args = config(tmp_path, reward_weights=[3.0, 0.25])
        trainer = RLCRTrainer(
            deepcopy(base), args, TASK.dataset(TASK.draw(64, 5)),
            processing_class=TASK.tokenizer(), extra_reward_funcs=[Spy(2.0), Spy(-1.0)],
        )  # fmt: skip
        assert args.reward_weights == [3.0, 0.25]  # the caller's object
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        for row in history(trainer):
            names = ("format", "accuracy", "calibration")
            own = 0.5 * sum(row[f"rewards/{n}_reward/mean"] for n in names)
            assert row["reward"] == pytest.approx(own + 3.0 * 2.0 - 0.25, abs=1e-5)

    def test_rlvr_logs_calibration_and_does_not_reward_it(self, base, tmp_path):
        trainer = make(tmp_path, base, changes={"method": "rlvr"})
        trainer.train()
        for row in history(trainer):
            own = row["rewards/format_reward/mean"] + row["rewards/accuracy_reward/mean"]
            assert row["reward"] == pytest.approx(0.5 * own, abs=1e-6)
            assert row["rewards/calibration_reward/mean"] > 0
            assert row["rlcr/brier"] > 0

    def test_a_reward_of_ones_own(self, base, tmp_path):
        reward = RLCRReward(
            verifier=lambda answer, gold: True, gold_column="answer", calibration_weight=0.5
        )
        trainer = make(tmp_path, base, reward=reward, changes={"max_steps": 1})
        trainer.train()
        (row,) = history(trainer)
        assert row["rlcr/accuracy"] == row["rewards/format_reward/mean"]
        expected = (
            row["rewards/format_reward/mean"]
            + row["rewards/accuracy_reward/mean"]
            + 0.5 * row["rewards/calibration_reward/mean"]
        )
        assert row["reward"] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.filterwarnings("ignore::rlcr.monitor.CalibrationWarning")
    def test_ramp_by_step_and_after_resuming(self, base, tmp_path):
        changes = {
            "calibration_ramp_steps": 4, "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
        }  # fmt: skip
        trainer = make(tmp_path, base, changes=changes)
        trainer.train()
        expected = [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
        assert ramp_weights(trainer) == pytest.approx(expected, abs=1e-4)
        again = make(tmp_path, base, changes=changes)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert ramp_weights(again) == pytest.approx(expected, abs=1e-4)
        assert [row["loss"] for row in history(again)] == [row["loss"] for row in history(trainer)]


def ramp_weights(trainer):
    """The calibration weight of every step, from what it logged."""
    weights = []
    for row in history(trainer):
        rest = row["rewards/format_reward/mean"] + row["rewards/accuracy_reward/mean"]
        weights.append((row["reward"] - 0.5 * rest) / row["rewards/calibration_reward/mean"])
    return weights


class TestGradients:
    CHANGES = {"max_steps": 1, "max_grad_norm": 0.0, "entropy_coef": 0.0}  # noqa: RUF012

    def first_gradient(self, folder, base, **changes):
        gradients = Gradients()
        make(folder, base, changes={**self.CHANGES, **changes}, callbacks=[gradients]).train()
        return gradients.steps[0]

    def test_arms_differ_by_the_calibration_term_only(self, base, tmp_path):
        """The first step's gradient is linear in the weights; both arms sample the same texts."""
        rlcr = self.first_gradient(tmp_path, base)
        rlvr = self.first_gradient(tmp_path, base, method="rlvr")
        calibration = self.first_gradient(
            tmp_path, base, format_weight=0.0, correctness_weight=0.0,
            allow_incorrect_incentive=True,
        )  # fmt: skip
        assert (rlcr - rlvr).norm() > 0.05 * rlcr.norm()
        assert (rlcr - rlvr - calibration).norm() < 1e-4 * rlcr.norm()

    def test_splitting_the_batch_changes_nothing(self, base, tmp_path):
        one = self.first_gradient(tmp_path, base, loss_type="dapo")
        two = self.first_gradient(
            tmp_path, base, loss_type="dapo", per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
        )  # fmt: skip
        assert (one - two).norm() < 1e-4 * one.norm()

    def test_malformed_rows_never_beat_well_formed_ones(self, base, tmp_path):
        spy = Spy()
        trainer = make(tmp_path, base, extra_reward_funcs=[spy],
                       changes={"max_steps": 1, "reward_weights": [0.0]})  # fmt: skip
        trainer.train()
        reward = trainer.calibration_reward
        texts, golds = [r[1] for r in spy.rows], [r[2] for r in spy.rows]
        scores = reward(completions=texts, answer=golds)
        well = [s for s, t in zip(scores, texts, strict=True) if parse_completion(t).ok]
        assert min(well) >= 0.5
        assert {s for s, t in zip(scores, texts, strict=True) if not parse_completion(t).ok} <= {0}


class TestAlarms:
    def test_raised_once_and_not_again_after_resuming(self, tmp_path):
        """An untrained model earns nothing: no variance, and every completion is cut off."""
        changes = {"save_strategy": "steps", "save_steps": 1}
        trainer = make(tmp_path, TASK.model(), changes=changes)
        with pytest.warns(CalibrationWarning) as caught:
            trainer.train()
        said = [str(w.message) for w in caught if w.category is CalibrationWarning]
        assert len(said) == 2
        assert all(text.startswith("step 1: ") for text in said)
        assert [a.kind for a in trainer.monitor.alarms] == ["no_variance", "truncated"]
        again = make(tmp_path, TASK.model(), changes=changes)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))  # a warning would raise
        assert [(a.kind, a.step) for a in again.monitor.alarms] == [
            ("no_variance", 1), ("truncated", 1),
        ]  # fmt: skip

    def test_monitor_of_ones_own(self, base, tmp_path):
        trainer = make(tmp_path, base, monitor=Monitor(collapse_std=2.0, collapse_logs=2))
        with pytest.warns(CalibrationWarning, match="step 2: confidence collapse"):
            trainer.train()
        assert trainer.monitor.alarms[0].kind == "confidence_collapse"


def test_unscorable_rows_are_left_out(base, tmp_path):
    rows = TASK.dataset(TASK.draw(4, 5)).to_list()
    rows[1]["answer"] = None
    trainer = make(tmp_path, base, rows=Dataset.from_list(rows), changes={"max_steps": 1})
    with pytest.warns(UserWarning, match="cannot be scored"):
        trainer.train()
    (row,) = history(trainer)
    assert row["rlcr/unscorable"] == pytest.approx(8 / 32)
    assert math.isfinite(row["loss"])
    assert 0 <= row["rlcr/accuracy"] <= 1


def test_evaluation_has_live_metrics(base, tmp_path):
    trainer = make(
        tmp_path, base, eval_dataset=TASK.dataset(TASK.draw(8, 3)),
        changes={"max_steps": 1, "per_device_eval_batch_size": 32},
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    row = next(r for r in reversed(trainer.state.log_history) if "eval_loss" in r)
    assert {"eval_rlcr/accuracy", "eval_rlcr/brier", "eval_rlcr/ece"} <= set(row)
    assert math.isfinite(found["eval_loss"])
    assert "rlcr/accuracy" not in row


def test_chat_prompts(base, tmp_path):
    tokenizer = TASK.tokenizer()
    tokenizer.chat_template = CHAT
    draws = TASK.draw(32, 5)
    rows = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in TASK.prompts(draws)],
            "answer": [str(d) for d in draws.digit],
        }
    )
    spy = Spy()
    trainer = make(
        tmp_path, base, rows=rows, tokenizer=tokenizer, extra_reward_funcs=[spy],
        changes={"reward_weights": [0.0]},
    )  # fmt: skip
    trainer.train()
    assert spy.rows[0][1][0]["role"] == "assistant"
    assert all(row["rewards/format_reward/mean"] > 0.3 for row in history(trainer))


def test_lora_changes_only_the_adapter(base, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make(tmp_path, base, peft_config=adapter)
    trainer.train()
    trained = dict(trainer.model.named_parameters())
    lora = {n: p for n, p in trained.items() if "lora_" in n}
    assert lora
    assert any(p.abs().sum() > 0 for n, p in lora.items() if "lora_B" in n)
    before = base.state_dict()
    compared = 0
    for name, weight in trainer.model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        if "lora_" not in name and plain in before:
            assert torch.equal(weight, before[plain])
            compared += 1
    assert compared >= len(before) - 1
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "saved" / "model.safetensors").exists()


class TestWarmup:
    def test_loss_falls(self, tmp_path):
        losses = Losses()
        model = warmed(40, 64, tmp_path, losses)
        assert losses.values[0] > 2.0
        assert losses.values[-1] < 0.6 * losses.values[0]
        pairs = zip(model.parameters(), TASK.model(0).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)

    def test_prompts_and_completions(self, tmp_path):
        draws = TASK.draw(32, 0)
        rows = Dataset.from_dict(
            {
                "prompt": [f"{text} " for text in TASK.prompts(draws)],
                "completion": [render_completion(str(d), 0.5) for d in draws.digit],
            }
        )
        losses = Losses()
        sft_warmup(
            TASK.model(0), rows, str(tmp_path), TASK.tokenizer(), callbacks=[losses],
            remove_callbacks=(PrinterCallback,), max_steps=3, per_device_train_batch_size=16,
            learning_rate=3e-3, logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        assert len(losses.values) == 3
        assert losses.values[-1] < losses.values[0]

    def test_unknown_setting(self, tmp_path):
        with pytest.raises(UserError, match="SFTConfig has no field 'learning_rat'"):
            sft_warmup(TASK.model(), TASK.warmup(8, 0), str(tmp_path), TASK.tokenizer(),
                       learning_rat=1.0)  # fmt: skip

    def test_wrong_columns(self, tmp_path):
        rows = Dataset.from_dict({"prompt": ["s0"], "text": ["x"]})
        with pytest.raises(UserError, match=r"'completion'.*available: prompt, text"):
            sft_warmup(TASK.model(), rows, str(tmp_path), TASK.tokenizer())


def test_model_by_folder_brings_its_tokenizer(base, tmp_path):
    base.save_pretrained(tmp_path / "model")
    TASK.tokenizer().save_pretrained(tmp_path / "model")
    trainer = RLCRTrainer(
        str(tmp_path / "model"), config(tmp_path / "run", max_steps=1),
        TASK.dataset(TASK.draw(8, 1)),
    )  # fmt: skip
    assert trainer.processing_class.padding_side == "left"
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert history(trainer)[0]["rewards/format_reward/mean"] > 0.3


@pytest.mark.slow
def test_calibration_rises(tmp_path):
    """40 steps of RLCR from a warm-up of 150: the calibration reward goes up, nothing is NaN."""
    model = warmed(150, 256, tmp_path / "sft")
    trainer = make(
        tmp_path, model, rows=TASK.dataset(TASK.draw(32 * 40, 5)),
        changes={"per_device_train_batch_size": 256, "max_steps": 40},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        trainer.train()
    rows = history(trainer)
    assert all(math.isfinite(row["loss"]) for row in rows)
    values = [row["rewards/calibration_reward/mean"] for row in rows]
    assert sum(values[-8:]) / 8 > sum(values[:8]) / 8 + 0.05
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-8:]) > sum(rewards[:8])


def test_the_window_takes_the_newest_batch_of_all_processes(monkeypatch):
    """Two processes of two rows gather four; older rows of the log are of windows before."""
    logged = {"rlcr_confidence": [0.9, 0.1, 0.2, None, 0.4], "rlcr_correct": [0, 1, 0, None, 1]}
    trainer = object.__new__(RLCRTrainer)
    trainer.accelerator = SimpleNamespace(num_processes=2)
    trainer.model = SimpleNamespace(training=True)
    trainer._logs = {"extra": {name: deque(values) for name, values in logged.items()}}
    trainer._window = {"train": [], "eval": []}
    output = {"rewards": torch.zeros(2)}
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda self, rows: output)
    assert trainer._generate_and_score_completions([{}, {}]) is output
    ((confidence, correct),) = trainer._window["train"]
    np.testing.assert_array_equal(confidence, [0.1, 0.2, math.nan, 0.4])
    np.testing.assert_array_equal(correct, [1, 0, math.nan, 1])
    assert trainer._window["eval"] == []


def test_a_model_made_in_memory_needs_its_tokenizer(tmp_path):
    task = NoisySensor()
    args = RLCRConfig.preset("tiny", str(tmp_path), max_steps=1, use_cpu=True)
    with pytest.raises(UserError, match="give processing_class"):
        RLCRTrainer(task.model(), args, task.dataset(task.draw(8, 0)))
