"""What the calibration reward adds to a GRPO step: RLCRTrainer beside TRL's GRPOTrainer.

    python benchmarks/bench_step.py --json FILE

Both train the toy policy from the same weights on the same prompts, in one process, in alternating
blocks. The plain trainer's reward is one comparison per completion, which is as cheap as a reward
gets. Beside the difference of the medians, which is noisy, stands the time that the reward and the
live metrics took inside the step, measured by a clock around them.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rlcr._version import __version__
from rlcr.config import RLCRConfig
from rlcr.toy import NoisySensor
from rlcr.trainer import RLCRTrainer
from tenfold_common.cli import run
from tenfold_common.results import write_bench

ROUNDS, STEPS, SKIPPED = 4, 12, 2


class StepClock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        """Nothing measured yet."""
        self.seconds: list[float] = []
        self.begun = 0.0

    def on_step_begin(self, args, state, control, **more):
        """Start the clock."""
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **more):
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self.begun)


def ends_well(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """A reward that costs next to nothing."""
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def settings(out: str, *, ours: bool) -> RLCRConfig | GRPOConfig:
    """The same settings for both trainers."""
    common = {
        "num_generations": 8,
        "per_device_train_batch_size": 256,
        "max_completion_length": 12,
        "temperature": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "loss_type": "bnpo",
        "scale_rewards": "none",
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if ours:
        return RLCRConfig(output_dir=out, verifier="exact_match", **common)
    return GRPOConfig(output_dir=out, **common)


def block(task: NoisySensor, model, data, out: str, *, ours: bool) -> tuple[list[float], float]:
    """Train some steps; returns the seconds of each and, for ours, those of the reward a step."""
    clock = StepClock()
    inside = [0.0]

    def timed(function):
        def wrapper(*args, **named):
            begun = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                inside[0] += time.perf_counter() - begun

        wrapper.__name__ = function.__name__
        return wrapper

    if ours:
        trainer = RLCRTrainer(
            model, settings(out, ours=True), data, processing_class=task.tokenizer()
        )
        trainer.reward_funcs = [timed(f) for f in trainer.reward_funcs]
    else:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[ends_well],
            args=settings(out, ours=False),
            train_dataset=data,
            processing_class=task.tokenizer(),
        )
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds[SKIPPED:], inside[0] / STEPS


def main(argv: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    task = NoisySensor()
    data = task.dataset(task.draw(32 * STEPS, 1))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        from rlcr.trainer import sft_warmup

        base = sft_warmup(
            task.model(0), task.warmup(256 * 60, 2), scratch, task.tokenizer(),
            max_steps=60, per_device_train_batch_size=256, learning_rate=3e-3, disable_tqdm=True,
            remove_callbacks=(PrinterCallback,),
        )  # fmt: skip
        from copy import deepcopy

        times: dict[bool, list[float]] = {False: [], True: []}
        spent: list[float] = []
        for number in range(ROUNDS):
            for ours in (number % 2 == 0, number % 2 == 1):
                seconds, reward = block(task, deepcopy(base), data, scratch, ours=ours)
                times[ours] += seconds
                if ours:
                    spent.append(reward)
    for ours, name in ((False, "trl GRPOTrainer"), (True, "rlcr RLCRTrainer")):
        cuts = statistics.quantiles(times[ours], n=10)
        rows.append(
            {
                "name": "training step",
                "impl": name,
                "shape": "256 completions of 12 tokens, 163k parameters",
                "dtype": "float32",
                "median_ms": 1e3 * statistics.median(times[ours]),
                "p20_ms": 1e3 * cuts[1],
                "p80_ms": 1e3 * cuts[7],
                "n": len(times[ours]),
                "extra": {"reward_ms": 1e3 * statistics.median(spent)} if ours else {},
            }
        )
    plain, own = (row["median_ms"] for row in rows)
    share = rows[1]["extra"]["reward_ms"] / plain
    for row in rows:
        print(f"{row['impl']:20} {row['median_ms']:8.2f} ms a step")
    print(f"difference of medians {own / plain - 1:+.1%}; reward inside the step {share:.2%}")
    rows[1]["extra"]["reward_share"] = share
    write_bench(
        arguments.json,
        package="rlcr",
        version=__version__,
        command=f"python benchmarks/bench_step.py --json FILE --threads {arguments.threads}",
        correctness={"gate": "both trainers ran all steps", "max_err": None},
        rows=rows,
        notes=[
            "Alternating blocks in one process. The policy is tiny, which is the worst case: where "
            "generating takes longer, the same reward is a smaller share."
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
