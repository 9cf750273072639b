"""The toy experiment: one warm-up, then RLVR and RLCR from the same checkpoint.

Every arm has the same data, seed, number of steps, learning rate and entropy bonus; only what its
name says differs. All of it runs through TRL's SFTTrainer and GRPOTrainer.
"""

import logging
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlcr.metrics import auroc, brier_score, ece
from rlcr.monitor import Alarm, CalibrationWarning
from rlcr.toy import Draws, NoisySensor, Policy, evaluate_policy
from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ARMS = ("rlvr", "rlcr", "log_unscaled", "hedging")
# Data seeds apart from one another: nothing that is trained on is tested on.
_WARMUP, _TRAIN, _TEST = 1_000_003, 2_000_003, 3_000_017


@dataclass(frozen=True)
class ToySettings:
    """Settings of the experiment, chosen after trial runs, some on the draws of seeds 0 and 1.

    Attributes:
        warmup_steps: Steps of the SFT warm-up, of 256 rows.
        steps: Steps of the arms `rlvr` and `rlcr`.
        side_steps: Steps of the arms that show failures.
        hedging_warmup_steps: Steps of the warm-up of the hedging arm: too few.
        learning_rate: Of all arms, linear to 0; the hedging one has 2e-3.
        entropy_coef: Of all arms but the hedging one, which has none.
        num_generations: Completions of a prompt.
        prompts: Prompts of a step.
        test_rows: Rows of the test draw.
        warmup_confidence: As for `NoisySensor.warmup`.
    """

    warmup_steps: int = 400
    steps: int = 450
    side_steps: int = 150
    hedging_warmup_steps: int = 120
    learning_rate: float = 1.5e-3
    entropy_coef: float = 0.03
    num_generations: int = 8
    prompts: int = 32
    test_rows: int = 2000
    warmup_confidence: str = "overconfident"


@dataclass
class ArmResult:
    """A trained arm on the test draw.

    Attributes:
        name: `sft` or one of `ARMS`.
        policy: Its greedy answers.
        model: The trained model.
        alarms: What the monitor said.
        history: The trainer's log.
    """

    name: str
    policy: Policy
    model: "PreTrainedModel"
    alarms: list[Alarm] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)


def run_experiment(
    arms: tuple[str, ...] = ("rlvr", "rlcr"),
    *,
    settings: ToySettings | None = None,
    seed: int = 0,
    task: NoisySensor | None = None,
) -> tuple[Draws, dict[str, ArmResult]]:
    """Warm up, train the arms and let them answer the test draw.

    Args:
        arms: Some of `ARMS`. `log_unscaled` has the clipped log rule at a weight that breaks the
            incentive to be right; `hedging` starts RLCR from a warm-up that is too short.
        settings: The settings. Defaults to `ToySettings()`.
        seed: Seed of weights, data and sampling.
        task: The task. Defaults to `NoisySensor()`.

    Returns:
        The test draw and the results, `sft` first.

    Raises:
        UserError: an arm is unknown.
    """
    for name in arms:
        if name not in ARMS:
            raise UserError(
                f"there is no arm {name!r}; choose from {', '.join(ARMS)}.{suggest(name, ARMS)}"
            )
    settings, task = settings or ToySettings(), task or NoisySensor()
    test = task.draw(settings.test_rows, _TEST + seed)
    with tempfile.TemporaryDirectory(prefix="rlcr-toy-") as scratch:
        folder = Path(scratch)
        base = _warm_up(task, settings, settings.warmup_steps, seed, folder / "sft")
        results = {"sft": ArmResult("sft", evaluate_policy(base, task, test)[0], base)}
        for name in arms:
            logger.info("seed %d, arm %s", seed, name)
            results[name] = _run_arm(name, base, task, settings, seed, folder / name, test)
    return test, results


def _warm_up(
    task: NoisySensor, settings: ToySettings, steps: int, seed: int, folder: Path
) -> "PreTrainedModel":
    """Finetune a new model on weakly confident completions."""
    from transformers import PrinterCallback

    from rlcr.trainer import sft_warmup

    rows = task.warmup(256 * steps, _WARMUP + seed, confidence=settings.warmup_confidence)
    return sft_warmup(
        task.model(seed),
        rows,
        str(folder),
        task.tokenizer(),
        remove_callbacks=(PrinterCallback,),
        max_steps=steps,
        per_device_train_batch_size=256,
        learning_rate=3e-3,
        warmup_steps=20,
        weight_decay=0.01,
        logging_steps=100,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )


def _run_arm(
    name: str,
    base: "PreTrainedModel",
    task: NoisySensor,
    settings: ToySettings,
    seed: int,
    folder: Path,
    test: Draws,
) -> ArmResult:
    from copy import deepcopy

    from transformers import PrinterCallback

    from rlcr.config import RLCRConfig
    from rlcr.trainer import RLCRTrainer

    model, changes = deepcopy(base), {}
    steps = settings.steps if name in ("rlvr", "rlcr") else settings.side_steps
    if name == "rlvr":
        changes = {"method": "rlvr"}
    elif name == "log_unscaled":
        changes = {
            "rule": "log",
            "rule_parameters": {"eps": 0.05, "scaled": False},
            "calibration_weight": 1.0,  # twice the weight of a right answer
            "allow_incorrect_incentive": True,
        }
    elif name == "hedging":
        model = _warm_up(task, settings, settings.hedging_warmup_steps, seed, folder / "sft")
        changes = {"entropy_coef": 0.0, "learning_rate": 2e-3, "logging_steps": 4}
    args = RLCRConfig.preset(
        "tiny",
        str(folder),
        **{
            "max_steps": steps,
            "learning_rate": settings.learning_rate,
            "entropy_coef": settings.entropy_coef,
            "num_generations": settings.num_generations,
            "per_device_train_batch_size": settings.num_generations * settings.prompts,
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": seed,
            **changes,
        },
    )
    trainer = RLCRTrainer(
        model,
        args,
        task.dataset(task.draw(settings.prompts * steps, _TRAIN + seed)),
        processing_class=task.tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # kept in the result
        trainer.train()
    return ArmResult(
        name,
        evaluate_policy(model, task, test)[0],
        model,
        trainer.monitor.alarms,
        trainer.state.log_history,
    )


def measures(
    confidence: np.ndarray, correct: np.ndarray, bayes: np.ndarray | None = None
) -> dict[str, float]:
    """Return the columns of the experiment's table.

    Args:
        confidence: float `[N]` in [0, 1].
        correct: 1 or 0, float `[N]`.
        bayes: Bayes' confidence, float `[N]`. Defaults to none.

    Returns:
        `accuracy`, `brier`, `ece` (ten bins, left-closed), `auroc`, `mean_q`, `std_q`, and with
        `bayes` the mean of |q - Bayes q| as `distance`.
    """
    values = {
        "accuracy": float(correct.mean()),
        "brier": brier_score(confidence, correct),
        "ece": ece(confidence, correct),
        "auroc": auroc(confidence, correct),
        "mean_q": float(confidence.mean()),
        "std_q": float(confidence.std()),
    }
    if bayes is not None:
        values["distance"] = float(np.abs(confidence - bayes).mean())
    return values
