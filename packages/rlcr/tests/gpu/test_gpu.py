"""On a CUDA device: the trainer runs, learns and writes the same logs as on a CPU."""

import pytest
import torch
from transformers import PrinterCallback

from rlcr.config import RLCRConfig
from rlcr.toy import NoisySensor, evaluate_policy
from rlcr.trainer import RLCRTrainer, sft_warmup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    task = NoisySensor()
    model = sft_warmup(
        task.model(0), task.warmup(256 * 200, 1), str(tmp_path_factory.mktemp("sft")),
        task.tokenizer(), max_steps=200, per_device_train_batch_size=256, learning_rate=3e-3,
        bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        remove_callbacks=(PrinterCallback,),
    )  # fmt: skip
    assert next(model.parameters()).is_cuda
    return task, model


def test_the_calibration_reward_rises(warm, tmp_path):
    task, model = warm
    args = RLCRConfig.preset(
        "tiny", str(tmp_path), max_steps=80, save_strategy="no", disable_tqdm=True
    )
    data = task.dataset(task.draw(32 * 80, 3))
    trainer = RLCRTrainer(model, args, data, processing_class=task.tokenizer())
    trainer.train()
    rewards = [row["rlcr/calibration"] for row in trainer.state.log_history if "loss" in row]
    assert rewards[-1] > rewards[0]


def test_greedy_answers_equal_those_on_the_cpu(warm):
    task, model = warm
    test = task.draw(256, 5)
    there = evaluate_policy(model.cuda(), task, test)[0]
    here = evaluate_policy(model.cpu(), task, test)[0]
    same = sum(a == b for a, b in zip(there.answers, here.answers, strict=True))
    assert same >= 250  # near ties of two tokens may fall either way
    torch.testing.assert_close(
        torch.tensor(there.answer_probability), torch.tensor(here.answer_probability),
        atol=2e-3, rtol=0,
    )  # fmt: skip
