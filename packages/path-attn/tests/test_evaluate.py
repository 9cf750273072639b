"""Losses by position and task errors against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from path_attn.config import TrainConfig
from path_attn.evaluate import (
    comparison_markdown,
    continue_text,
    evaluate_model,
    parse_lengths,
    position_losses,
    report_markdown,
    task_error,
    write_comparison_plot,
)
from path_attn.tasks import FlipFlop, TextChunks, task_tokenizer
from tenfold_common.errors import UserError
from tenfold_common.tiny import byte_tokenizer, tiny_llama


class FlipFlopMachine(nn.Module):
    """Solves FFL exactly, by memory. Ids: w 0, r 1, i 2, "0" 3, "1" 4."""

    def __init__(self, *, forgets=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.forgets = forgets

    def forward(self, input_ids, use_cache=False):
        logits = torch.zeros(*input_ids.shape, 5)
        for row, ids in enumerate(input_ids.tolist()):
            memory = 3
            for t, token in enumerate(ids):
                if t and ids[t - 1] == 0:
                    memory = token
                logits[row, t, 3 if self.forgets else memory] = 10.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["1", "2", "4"], [100, 200, 400]),
        (["4x", "1x"], [100, 400]),
        (["0.5x"], [50]),
        (["64"], [6400]),
        (["65", "512"], [65, 512]),
        (["100", "1"], [100]),
        (["0.01x"], [1]),
    ],
)
def test_lengths(given, expected):
    assert parse_lengths(given, 100) == expected


@pytest.mark.parametrize(
    "bad", ["0", "-2", "", "x", "1.5", "infx", "two", "0.001x", "1e300x", "9" * 12]
)
def test_lengths_that_do_not_fit(bad):
    with pytest.raises(UserError, match=f"length '{bad}'"):
        parse_lengths([bad], 100)


class TestPositionLosses:
    def test_against_plain_cross_entropy(self):
        model = tiny_llama(40, layers=1)
        tokens = torch.randint(3, 40, (66,))
        total, count = position_losses(model, TextChunks(tokens, 11))
        chunks = tokens.view(6, 11)
        with torch.no_grad():
            logits = model(chunks).logits
        for t in range(1, 11):
            expected = F.cross_entropy(logits[:, t - 1], chunks[:, t], reduction="sum")
            assert total[t].item() == pytest.approx(expected.item(), rel=1e-5)
        assert count.tolist() == [0.0] + [6.0] * 10
        assert total[0] == 0

    def test_batches_do_not_matter(self, monkeypatch):
        from path_attn import evaluate

        model, tokens = tiny_llama(40, layers=1), torch.randint(3, 40, (66,))
        one = position_losses(model, TextChunks(tokens, 11))[0]
        monkeypatch.setattr(evaluate, "TOKENS_PER_BATCH", 22)
        torch.testing.assert_close(
            position_losses(model, TextChunks(tokens, 11))[0], one, rtol=1e-5, atol=1e-5
        )

    def test_mode_is_put_back(self):
        model = tiny_llama(40, layers=1).train()
        position_losses(model, TextChunks(torch.arange(20) + 3, 10))
        assert model.training


class TestTaskError:
    def test_perfect_memory_has_no_error(self):
        found = task_error(FlipFlopMachine(), FlipFlop(length=40, size=30))
        assert found["error"] == 0
        assert found["loss"] == pytest.approx(math.log(1 + 4 * math.exp(-10)), rel=1e-4)

    def test_always_saying_zero_errs_as_often_as_ones_are_read(self):
        data = FlipFlop(length=40, size=60, seed=2)
        ones = reads = 0
        for i in range(60):
            ids = data[i]["input_ids"].tolist()
            bits = [ids[t + 1] for t in range(0, 40, 2) if ids[t] == 1]
            reads, ones = reads + len(bits), ones + bits.count(4)
        found = task_error(FlipFlopMachine(forgets=True), data)
        assert (found["scored"], found["sequences"]) == (reads, 60)
        assert found["error"] == ones / reads
        assert 0.3 < found["error"] < 0.7


class TestSets:
    def test_sparse_has_few_reads_and_dense_many(self, caplog):
        """Of 20 pairs the last is a read and 18 are one with probability (1 - p)/2 each."""
        caplog.set_level("INFO", logger="path_attn")
        config = TrainConfig(task="fflm", length=40).resolved()
        tokenizer = task_tokenizer(config)
        model = tiny_llama(len(tokenizer), hidden=16, layers=1)
        report = evaluate_model(model, tokenizer, config, ["1"])
        reads = {r["set"]: r["scored"] / r["sequences"] for r in report["rows"]}
        assert reads["sparse"] == pytest.approx(1 + 18 * 0.02 / 2, abs=0.05)
        assert reads["in distribution"] == pytest.approx(1 + 18 * 0.2 / 2, abs=0.2)
        assert reads["dense"] == pytest.approx(1 + 18 * 0.9 / 2, abs=0.3)
        said = [r.getMessage() for r in caplog.records if r.name == "path_attn.evaluate"]
        assert [text.split(", ")[0] for text in said] == [
            "evaluating: in distribution", "evaluating: sparse", "evaluating: dense",
        ]  # fmt: skip


class TestReports:
    @pytest.fixture
    def config(self, tmp_path):
        (tmp_path / "t").write_text("abcdefghij" * 300)  # 3000 bytes, 300 of them for validation
        return TrainConfig(
            task="text", data=str(tmp_path / "t"), length=32, position_encoding="rope"
        )

    def test_same_text_for_every_length(self, config, caplog):
        caplog.set_level("INFO", logger="path_attn")
        tokenizer = byte_tokenizer()
        report = evaluate_model(tiny_llama(len(tokenizer), layers=1), tokenizer, config)
        assert [r["length"] for r in report["rows"]] == [32, 64, 128]
        assert [r["tokens"] for r in report["rows"]] == [
            8 * 31,
            4 * 63,
            2 * 127,
        ]  # 256 of the 300 tokens
        for row in report["rows"]:
            mean = sum(p["loss"] * p["tokens"] for p in row["positions"]) / row["tokens"]
            assert mean == pytest.approx(row["loss"], rel=1e-9)
            assert [p["start"] for p in row["positions"]] == list(range(0, row["length"], 8))
        assert "| 128 | 4 | " in report_markdown(report)
        assert [r.getMessage() for r in caplog.records] == [
            f"evaluating: length {n}, {256 // n} chunks" for n in (32, 64, 128)
        ]

    def test_lengths_beyond_the_text_are_left_out_and_named(self, config, caplog):
        tokenizer = byte_tokenizer()
        config.length = 128
        report = evaluate_model(tiny_llama(len(tokenizer), layers=1), tokenizer, config)
        assert [r["length"] for r in report["rows"]] == [128, 256]
        assert "length 512 is left out" in caplog.text
        with pytest.raises(UserError, match="has 300 tokens, fewer than one chunk of 512"):
            evaluate_model(tiny_llama(len(tokenizer), layers=1), tokenizer, config, ["512"])

    def test_comparison_table_and_figure(self, tmp_path):
        def report(shift):
            positions = [
                {"start": s, "end": s + 5, "loss": shift + s, "tokens": 10} for s in (0, 5, 10, 15)
            ]
            rows = [
                {"length": 10, "loss": 1.0 + shift, "tokens": 40, "positions": positions[:2]},
                {"length": 20, "loss": 2.0 + shift, "tokens": 40, "positions": positions},
            ]
            return {
                "kind": "loss",
                "train_length": 10,
                "rows": rows,
                "training": {"parameters": 77},
            }

        comparison = {"results": {"path": report(0.0), "rope": report(0.5)}}
        lines = comparison_markdown(comparison).splitlines()
        assert lines[0].split(" | ")[2:] == [
            "loss at 1x",
            "loss at 2x",
            "positions 0-10",
            "positions 10-20 |",
        ]
        assert (
            lines[3] == "| rope | 77 | 1.5000 | 2.5000 | 3.0000 | 13.0000 |"
        )  # means of 0.5, 5.5 and 10.5, 15.5
        assert write_comparison_plot(comparison, tmp_path).read_bytes()[:4] == b"\x89PNG"


class TestContinueText:
    def test_sampling_is_seeded_and_leaves_the_global_generator(self):
        tokenizer = byte_tokenizer()
        model = tiny_llama(len(tokenizer), layers=1)
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        texts = [continue_text(model, tokenizer, "ab", max_new_tokens=6, seed=s) for s in (1, 1, 2)]
        assert torch.equal(torch.rand(1), expected)
        assert texts[0] == texts[1] != texts[2]
        assert all(text.startswith("ab") for text in texts)

    @pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0, 1e-45])
    def test_temperature_that_does_not_do(self, temperature):
        tokenizer = byte_tokenizer()
        model = tiny_llama(len(tokenizer), layers=1)
        with pytest.raises(UserError, match=rf"temperature is {temperature}; it must be 0 "):
            continue_text(model, tokenizer, "ab", temperature=temperature)
        assert continue_text(model, tokenizer, "ab", max_new_tokens=2, temperature=1e-4)

    def test_greedy_is_the_most_likely_token(self):
        tokenizer = byte_tokenizer()
        model = tiny_llama(len(tokenizer), layers=1)
        ids = tokenizer("hello", return_tensors="pt")["input_ids"]
        best = model(ids).logits[0, -1].argmax()
        text = continue_text(model, tokenizer, "hello", max_new_tokens=1, temperature=0)
        assert text == tokenizer.decode([*ids[0].tolist(), int(best)], skip_special_tokens=True)
