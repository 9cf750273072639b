"""The settings: the paper's presets, what is refused, and the reward they describe."""

import pytest

from rlcr.config import PRESETS, RLCRConfig
from rlcr.options import PRESET_NAMES
from rlcr.parsing import render_completion
from rlcr.rewards import RLCRReward
from tenfold_common.errors import UserError

CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}

SHARED = {
    "num_generations": 32,
    "temperature": 0.7,
    "beta": 0.0,
    "num_iterations": 1,
    "epsilon": 0.2,
    "max_grad_norm": 1.0,
    "loss_type": "bnpo",
    "scale_rewards": "none",
    "seed": 43,
    "format": "tabc",
    "method": "rlcr",
    "correctness_weight": 0.5,
    "calibration_weight": 0.5,
    "format_weight": 0.5,
    "rule": "brier",
}
MATH = {
    **SHARED,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.2,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 64,
    "max_prompt_tokens": 1024,
    "max_completion_length": 4096,
    "mask_truncated_completions": True,
    "num_train_epochs": 0.5,
    "verifier": "math",
}
HOTPOT = {
    **SHARED,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 64,
    "max_prompt_tokens": 3072,
    "max_completion_length": 1536,
    "mask_truncated_completions": False,
    "num_train_epochs": 1,
    "verifier": "exact_match",
}


def config(tmp_path, **changes):
    values = {"per_device_train_batch_size": 32, "num_generations": 8, "verifier": "choice"}
    return RLCRConfig(output_dir=str(tmp_path), **{**CPU, **values, **changes})


class TestPresets:
    @pytest.mark.parametrize(
        ("name", "expected"), [("hotpot", HOTPOT), ("math", MATH), ("math_sft", MATH)]
    )
    def test_are_the_published_settings(self, name, expected, tmp_path):
        made = RLCRConfig.preset(name, str(tmp_path), **CPU)
        found = {field: getattr(made, field) for field in expected}
        found["lr_scheduler_type"] = str(getattr(found["lr_scheduler_type"], "value", ""))
        assert found == expected

    @pytest.mark.parametrize(("name", "processes", "prompts"), [("hotpot", 4, 64), ("math", 6, 72)])
    def test_prompts_of_a_step(self, name, processes, prompts):
        values = PRESETS[name]
        batch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
        assert batch * processes / values["num_generations"] == prompts

    @pytest.mark.parametrize("name", ["hotpot", "math", "math_sft"])
    def test_on_a_gpu(self, name):
        assert PRESETS[name]["bf16"] is True
        assert PRESETS[name]["gradient_checkpointing"] is True
        assert PRESETS[name]["gradient_checkpointing_kwargs"] == {"use_reentrant": False}

    def test_tiny_runs_on_a_cpu(self, tmp_path):
        made = RLCRConfig.preset("tiny", str(tmp_path), use_cpu=True)
        assert (made.bf16, made.gradient_checkpointing, made.max_completion_length) == (
            False, False, 12,
        )  # fmt: skip
        assert made.temperature == 1.0
        assert made.loss_type == "bnpo"

    def test_names_are_the_commands(self):
        assert tuple(PRESETS) == PRESET_NAMES

    def test_changes_win_and_the_preset_stays(self, tmp_path):
        before = {name: dict(values) for name, values in PRESETS.items()}
        made = RLCRConfig.preset("math", str(tmp_path), **CPU, learning_rate=1e-4)
        assert made.learning_rate == 1e-4
        made.gradient_checkpointing_kwargs = None
        assert before == PRESETS

    def test_unknown_preset(self, tmp_path):
        with pytest.raises(UserError, match=r"no preset 'hotpt'.*Did you mean 'hotpot'"):
            RLCRConfig.preset("hotpt", str(tmp_path))

    def test_unknown_field(self, tmp_path):
        with pytest.raises(UserError, match=r"no field 'learning_rat'.*'learning_rate'"):
            RLCRConfig.preset("tiny", str(tmp_path), learning_rat=1.0)


class TestDefaults:
    def test_differ_from_trl_in_three(self, tmp_path):
        from trl import GRPOConfig

        ours, theirs = RLCRConfig.__dataclass_fields__, GRPOConfig.__dataclass_fields__
        changed = {n for n in theirs if ours[n].default != theirs[n].default}
        assert changed == {"loss_type", "scale_rewards", "temperature"}
        made = config(tmp_path)
        assert (made.loss_type, made.scale_rewards, made.temperature) == ("bnpo", "none", 0.7)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"method": "rlrc"}, "method must be 'rlcr' or 'rlvr', not 'rlrc'.*Did you mean"),
            ({"format": "tacb"}, "format must be one of tabc, tbac, tac, ta, not 'tacb'"),
            ({"format": "ta"}, "'ta' has no confidence"),
            ({"calibration_ramp_steps": -1}, "calibration_ramp_steps is -1; .*at least 0"),
            ({"calibration_ramp_steps": None}, "calibration_ramp_steps is None"),
            ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0; .*at least 1"),
            ({"max_completion_length": 0}, "max_completion_length is 0; .*at least 1"),
            ({"max_completion_length": -5}, "max_completion_length is -5"),
            ({"max_completion_length": 12.0}, "is 12.0; it must be a whole number"),
            ({"max_completion_length": "12"}, "is '12'; it must be a whole number"),
            ({"max_completion_length": True}, "is True; it must be a whole number"),
            ({"num_generations": "8"}, "num_generations is '8'"),
            ({"num_generations": 1}, "num_generations is 1; .*at least 2"),
            ({"calibration_weight": -0.5}, "calibration_weight.*-0.5"),
            ({"correctness_weight": -1.0}, "correctness_weight.*-1"),
            ({"format_weight": float("nan")}, "format_weight.*nan"),
            ({"rule": "brie"}, "brie.*Did you mean 'brier'"),
            ({"rule_parameters": {"eps": 0.1}}, "eps"),
            ({"verifier": "exactly"}, "verifier must be one of"),
        ],
    )
    def test_before_anything_is_loaded(self, changes, message, tmp_path):
        with pytest.raises(UserError, match=message):
            config(tmp_path, **changes)

    def test_negative_margin_is_named(self, tmp_path):
        """Unscaled log clipped at .05: 0.5 + 0.5 (ln .05 - ln .95) = -0.9722 at q = 0."""
        with pytest.raises(UserError, match=r"is -0\.9722"):
            config(tmp_path, rule="log", rule_parameters={"eps": 0.05, "scaled": False})

    def test_negative_margin_can_be_accepted(self, tmp_path):
        made = config(
            tmp_path, rule="log", rule_parameters={"eps": 0.05, "scaled": False},
            allow_incorrect_incentive=True,
        )  # fmt: skip
        assert made.reward().rule.margin(0.5, 0.5) == pytest.approx(-0.9722, abs=1e-4)

    def test_calibration_above_correctness(self, tmp_path):
        with pytest.raises(UserError, match=r"calibration_weight 0\.6.*at most 0\.5"):
            config(tmp_path, calibration_weight=0.6)

    def test_rlvr_needs_no_margin(self, tmp_path):
        made = config(tmp_path, method="rlvr", calibration_weight=0.6)
        assert made.reward().weights == [0.5, 0.5, 0.0]


class TestReward:
    def test_rlcr_and_rlvr_weights(self, tmp_path):
        assert config(tmp_path).reward().weights == [0.5, 0.5, 0.5]
        weights = config(tmp_path, method="rlvr").reward().weights
        assert weights[2] == 0.0
        assert weights == [0.5, 0.5, 0.0]

    def test_rlvr_of_the_shortest_format(self, tmp_path):
        reward = config(tmp_path, method="rlvr", format="ta").reward()
        text = render_completion("B", format="ta")
        assert reward(completions=[text], answer=["B"]) == [1.0]

    def test_describes_what_was_asked(self, tmp_path):
        reward = config(
            tmp_path, rule="spherical", correctness_weight=2.0, calibration_weight=1.5,
            format_weight=0.25, format="tac", gold_column="gold", verifier_column="how",
        ).reward()  # fmt: skip
        assert isinstance(reward, RLCRReward)
        assert reward.weights == [0.25, 2.0, 1.5]
        assert (reward.rule.name, reward.format) == ("spherical", "tac")
        assert (reward.gold_column, reward.verifier_column) == ("gold", "how")
        assert reward.verifier.name == "choice"

    @pytest.mark.parametrize(
        ("answer", "q", "expected"),
        [("B", 0.75, 1.46875), ("A", 0.75, 0.71875), ("A", 1.0, 0.5), ("B", 0.0, 1.0)],
    )
    def test_values_by_hand(self, answer, q, expected, tmp_path):
        """0.5 (1 + c + 1 - (q - c)^2) for a gold B."""
        reward = config(tmp_path).reward()
        text = render_completion(answer, q)
        assert reward(completions=[text], answer=["B"]) == [pytest.approx(expected)]
        assert reward(completions=["no tags"], answer=["B"]) == [0.0]

    def test_reward_weights_are_those_of_others(self, tmp_path):
        made = config(tmp_path, reward_weights=[0.1])
        made.reward()
        assert made.reward_weights == [0.1]
