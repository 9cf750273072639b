"""The noisy sensor: its posterior by enumeration, its words, and a policy's answers."""

import itertools
import math

import numpy as np
import pytest
import torch

from rlcr.parsing import parse_completion, render_completion
from rlcr.reference import naive_brier, naive_ece
from rlcr.toy import CONFIDENCES, DIGITS, MAX_COMPLETION, Draws, NoisySensor, evaluate_policy
from rlcr.trainer import check_tokenizer
from tenfold_common.errors import UserError

TASK = NoisySensor()


def counted_posterior(reliability, readings):
    """Bayes by the joint probability of every digit with these readings, one reading at a time."""
    joint = []
    for digit in range(10):
        probability = 1 / 10
        for reading in readings:
            probability *= reliability if reading == digit else (1 - reliability) / 9
        joint.append(probability)
    return [value / math.fsum(joint) for value in joint]


class TestPosterior:
    @pytest.mark.parametrize("m", [1, 2, 3])
    def test_every_prompt_against_the_joint_distribution(self, m):
        task = NoisySensor(reliabilities=(0.05, 0.5, 0.9), readings=m)
        rows = [(s, r) for s in range(3) for r in itertools.product(range(10), repeat=m)]
        level, readings = np.array([s for s, _ in rows]), np.array([r for _, r in rows])
        posterior = task.posterior(Draws(level, readings, np.zeros(len(rows), int)))
        assert posterior.shape == (len(rows), 10)
        assert posterior.dtype == np.float64
        step = 1 if m < 3 else 37
        for got, (s, r) in list(zip(posterior, rows, strict=True))[::step]:
            expected = counted_posterior(task.reliabilities[s], r)
            np.testing.assert_allclose(got, expected, rtol=1e-12)

    def test_worked_by_hand(self):
        # p = 0.7, readings 4 4 7: weights .7^2/30, .7/30^2 and, for the eight others, 1/30^3.
        draws = Draws(np.array([2]), np.array([[4, 4, 7]]), np.array([4]))
        total = 0.49 / 30 + 0.7 / 900 + 8 / 27000
        answer, confidence = TASK.bayes(draws)
        assert answer.tolist() == [4]
        assert confidence[0] == pytest.approx(0.49 / 30 / total, rel=1e-12)
        assert TASK.posterior(draws)[0, 7] == pytest.approx(0.7 / 900 / total, rel=1e-12)

    def test_frequencies_agree_with_it(self):
        """Counting, with no use of the formula: how often d is what two equal readings say."""
        draws = TASK.draw(200_000, 3)
        same = (draws.readings == draws.readings[:, :1]).all(1)
        for level in range(4):
            rows = same & (draws.level == level)
            share = (draws.digit == draws.readings[:, 0])[rows].mean()
            _, q = TASK.bayes(Draws(*(part[rows][:1] for part in draws)))
            error = 4 * math.sqrt(q[0] * (1 - q[0]) / rows.sum()) + 1e-9
            assert abs(share - q[0]) < error

    def test_calibrated_on_20_000_draws(self):
        draws = TASK.draw(20_000, 11)
        answer, q = TASK.bayes(draws)
        right = (answer == draws.digit).astype(float)
        assert naive_ece(q.tolist(), right.tolist()) < 0.015
        for low in np.arange(0, 1, 0.1):
            inside = (q >= low) & (q < low + 0.1 + (low > 0.85))
            if inside.sum() > 200:
                error = math.sqrt(0.25 / inside.sum())
                assert abs(right[inside].mean() - q[inside].mean()) < 4 * error
        assert right.mean() == pytest.approx(0.708, abs=0.015)
        assert naive_brier(q.tolist(), right.tolist()) == pytest.approx(0.097, abs=0.008)

    def test_no_answer_beats_bayes(self):
        draws = TASK.draw(20_000, 12)
        answer, _ = TASK.bayes(draws)
        best = (answer == draws.digit).mean()
        for reading in range(3):
            assert (draws.readings[:, reading] == draws.digit).mean() < best


class TestDraws:
    def test_shapes_and_ranges(self):
        draws = TASK.draw(1000, 5)
        assert draws.level.shape == draws.digit.shape == (1000,)
        assert draws.readings.shape == (1000, 3)
        assert {part.dtype for part in draws} == {np.dtype(np.int64)}
        assert set(draws.level) == set(range(4))
        assert set(draws.digit) == set(draws.readings.ravel()) == set(range(10))

    def test_marginals(self):
        draws = TASK.draw(50_000, 6)
        for level, p in enumerate(TASK.reliabilities):
            rows = draws.level == level
            hits = (draws.readings == draws.digit[:, None])[rows]
            assert hits.mean() == pytest.approx(p, abs=0.015)
            wrong = (draws.readings - draws.digit[:, None])[rows][~hits] % 10
            np.testing.assert_allclose(np.bincount(wrong, minlength=10)[1:] / len(wrong), 1 / 9,
                                       atol=0.02)  # fmt: skip

    def test_seeds(self):
        one, same, other = TASK.draw(50, 1), TASK.draw(50, 1), TASK.draw(50, 2)
        assert all((a == b).all() for a, b in zip(one, same, strict=True))
        assert (one.readings != other.readings).any()

    def test_leaves_the_global_random_state(self):
        before = np.random.get_state()[1].tolist()  # noqa: NPY002 - what must not be touched
        TASK.draw(10, 0)
        TASK.warmup(4, 0)
        assert np.random.get_state()[1].tolist() == before  # noqa: NPY002

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"reliabilities": ()}, "reliabilities"),
            ({"reliabilities": (0.5, 1.0)}, r"\(0, 1\), not \[0.5, 1.0\]"),
            ({"reliabilities": (0.0,)}, "reliabilities"),
            ({"reliabilities": (math.nan,)}, "reliabilities"),
            ({"readings": 0}, "readings must be at least 1, not 0"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(UserError, match=message):
            NoisySensor(**arguments)

    def test_no_rows(self):
        with pytest.raises(UserError, match="at least 1, not 0"):
            TASK.draw(0, 0)


class TestCells:
    def test_by_hand(self):
        readings = np.array([[1, 2, 3], [1, 1, 3], [1, 3, 1], [5, 5, 5], [9, 8, 7]])
        draws = Draws(np.array([0, 0, 1, 3, 3]), readings, np.zeros(5, int))
        assert TASK.cells(draws).tolist() == [0, 1, 4, 11, 9]

    def test_bayes_confidence_depends_on_nothing_else(self):
        draws = TASK.draw(5000, 4)
        cells, (_, q) = TASK.cells(draws), TASK.bayes(draws)
        assert set(cells) == set(range(12))
        values = [set(np.round(q[cells == cell], 12)) for cell in range(12)]
        assert all(len(value) == 1 for value in values)
        flat = sorted(value.pop() for value in values)
        assert min(np.diff(flat)) > 1e-4  # all twelve differ
        assert flat[0] < 0.25
        assert flat[-1] > 0.99


class TestWords:
    def test_prompts(self):
        draws = Draws(np.array([2, 0]), np.array([[4, 4, 7], [0, 9, 1]]), np.array([4, 0]))
        assert TASK.prompts(draws) == ["s2 4 4 7 ?", "s0 0 9 1 ?"]
        assert TASK.dataset(draws)[:] == {
            "prompt": ["s2 4 4 7 ?", "s0 0 9 1 ?"],
            "answer": ["4", "0"],
        }

    def test_tokenizer_keeps_every_completion(self):
        tokenizer = TASK.tokenizer()
        for answer, q in itertools.product(range(10), CONFIDENCES):
            text = render_completion(str(answer), q)
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert len(ids) + 1 == 11 <= MAX_COMPLETION
            parsed = parse_completion(tokenizer.decode(ids, skip_special_tokens=True))
            assert (parsed.ok, parsed.answer, parsed.confidence) == (True, str(answer), float(q))

    def test_vocabulary(self):
        tokenizer = TASK.tokenizer()
        assert check_tokenizer(tokenizer, "tabc") == 11
        assert not set(tokenizer.all_special_tokens) & {"<think>", "<answer>", "0.0", "4", "s0"}
        assert tokenizer.padding_side == "left"
        assert tokenizer("s3 1 2 9 ?").input_ids == [
            tokenizer.get_vocab()[word] for word in ("s3", "1", "2", "9", "?")
        ]

    def test_other_tasks(self):
        task = NoisySensor(reliabilities=(0.2, 0.4), readings=5)
        prompt = task.prompts(task.draw(1, 0))[0]
        assert len(task.tokenizer()(prompt).input_ids) == 7
        assert "<unk>" not in task.tokenizer().decode(task.tokenizer()(prompt).input_ids)

    def test_model(self):
        one, same, other = TASK.model(0), TASK.model(0), TASK.model(1)
        assert 100_000 < one.num_parameters() < 250_000
        pairs = zip(one.parameters(), same.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert not torch.equal(next(one.parameters()), next(other.parameters()))


class TestWarmup:
    @pytest.mark.parametrize("task", [TASK, NoisySensor(reliabilities=(0.3, 0.8), readings=2)])
    def test_rows_decode_to_legal_completions(self, task):
        draws, rows, tokenizer = task.draw(300, 9), task.warmup(300, 9), task.tokenizer()
        assert rows.column_names == ["input_ids", "labels"]
        prompts = task.prompts(draws)
        for i, row in enumerate(rows):
            ids, labels = row["input_ids"], row["labels"]
            start = task.readings + 2
            assert tokenizer.decode(ids[:start]) == prompts[i]
            assert labels[:start] == [-100] * start
            assert labels[start:] == ids[start:]
            assert ids[-1] == tokenizer.eos_token_id
            parsed = parse_completion(tokenizer.decode(ids[start:], skip_special_tokens=True))
            assert parsed.ok
            assert parsed.answer == str(draws.digit[i])

    def confidences(self, rows):
        tokenizer = TASK.tokenizer()
        words = tokenizer.convert_ids_to_tokens([row[-3] for row in rows["input_ids"]])
        return np.array([float(word) for word in words])

    def test_overconfident(self):
        n = 20_000
        q = self.confidences(TASK.warmup(n, 2))
        draws = TASK.draw(n, 2)
        answer, bayes = TASK.bayes(draws)
        # By the docstring: a quarter uniform (mean .5), else about .6 + .4 Bayes, cut off at 1.
        assert 0.75 < q.mean() < 0.25 * 0.5 + 0.75 * (0.6 + 0.4 * bayes.mean())
        assert q.mean() > (answer == draws.digit).mean() + 0.04
        assert np.corrcoef(q, bayes)[0, 1] > 0.15
        assert (q == 0).mean() == pytest.approx(0.25 / 11, abs=0.006)

    def test_random(self):
        n = 20_000
        q = self.confidences(TASK.warmup(n, 2, confidence="random"))
        shares = np.bincount(np.rint(10 * q).astype(int), minlength=11) / n
        np.testing.assert_allclose(shares, 1 / 11, atol=0.01)
        assert abs(np.corrcoef(q, TASK.bayes(TASK.draw(n, 2))[1])[0, 1]) < 0.03

    def test_seeds(self):
        assert TASK.warmup(20, 1)[:] == TASK.warmup(20, 1)[:]
        assert TASK.warmup(20, 1)[:] != TASK.warmup(20, 2)[:]

    def test_unknown_confidence(self):
        with pytest.raises(UserError, match="'overconfident' or 'random', not 'honest'"):
            TASK.warmup(5, 0, confidence="honest")


def scripted_model(answer, confidence, *, sharpness=30.0):
    """A real model whose next token depends on the last token only, so it writes one completion."""
    tokenizer, model = TASK.tokenizer(), TASK.model(0)
    words = f"? {render_completion(answer, confidence)} {tokenizer.eos_token}".split()
    ids = tokenizer.convert_tokens_to_ids(words)
    size = len(tokenizer)
    table = torch.zeros(size, size)
    for now, after in itertools.pairwise(ids):
        table[now, after] = sharpness

    def forward(input_ids=None, **named):
        output = original(input_ids=input_ids, **named)
        output.logits = table[input_ids][:, -output.logits.shape[1] :]
        return output

    original, model.forward = model.forward, forward
    return model


class TestEvaluatePolicy:
    def test_what_a_known_model_says(self):
        draws = TASK.draw(40, 0)
        (policy,) = evaluate_policy(scripted_model("4", "0.3"), TASK, draws)
        assert policy.answers == ["4"] * 40
        assert policy.confidence.tolist() == [0.3] * 40
        assert policy.correct.tolist() == (draws.digit == 4).astype(float).tolist()
        assert policy.well_formed == 1.0
        np.testing.assert_allclose(policy.answer_probability, 1.0, atol=1e-6)

    def test_answer_probability_of_a_known_model(self):
        draws = TASK.draw(5, 0)
        (policy,) = evaluate_policy(scripted_model("4", "0.3", sharpness=3.0), TASK, draws)
        expected = math.exp(3) / (math.exp(3) + len(TASK.tokenizer()) - 1)
        np.testing.assert_allclose(policy.answer_probability, expected, rtol=1e-5)

    def test_malformed_completions(self):
        draws = TASK.draw(30, 0)
        (policy,) = evaluate_policy(TASK.model(0), TASK, draws)  # untrained
        assert policy.well_formed == 0.0
        assert policy.answers == [None] * 30
        assert policy.correct.tolist() == policy.confidence.tolist() == [0.0] * 30
        assert ((policy.answer_probability >= 0) & (policy.answer_probability <= 1)).all()

    def test_probability_is_the_direct_forwards(self):
        draws = TASK.draw(16, 1)
        model, tokenizer = TASK.model(3), TASK.tokenizer()
        (policy,) = evaluate_policy(model, TASK, draws, batch_size=5)
        ids = tokenizer(TASK.prompts(draws), return_tensors="pt").input_ids
        with torch.no_grad():  # greedy by hand, without a cache
            for _ in range(3):
                ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
            expected = model(ids).logits[:, -1].softmax(-1).max(-1).values
        np.testing.assert_allclose(policy.answer_probability, expected.numpy(), rtol=1e-4)

    def test_samples(self):
        draws = TASK.draw(25, 2)
        one, two = (
            evaluate_policy(scripted_model("4", "0.3", sharpness=5.0), TASK, draws, samples=3,
                            temperature=1.0, seed=7)
            for _ in range(2)
        )  # fmt: skip
        other = evaluate_policy(
            scripted_model("4", "0.3", sharpness=5.0), TASK, draws, samples=3, temperature=1.0,
            seed=8,
        )  # fmt: skip
        assert [p.answers for p in one] == [p.answers for p in two] != [p.answers for p in other]
        assert len(one) == 3
        assert one[0].answers != one[1].answers
        for policy in one:
            assert len(policy.answers) == 25
            assert policy.confidence.shape == policy.correct.shape == (25,)
            assert policy.answer_probability.shape == (25,)
            assert 0 < policy.well_formed < 1

    @pytest.mark.parametrize("training", [True, False])
    def test_leaves_the_model_and_the_random_state(self, training):
        model = TASK.model(0).train(training)
        state = torch.random.get_rng_state()
        evaluate_policy(model, TASK, TASK.draw(4, 0), temperature=1.0, seed=3)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert model.training is training
        assert not any(p.grad is not None for p in model.parameters())

    def test_digits_and_levels_are_what_the_module_says(self):
        assert DIGITS == 10
        assert CONFIDENCES == ("0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8",
                               "0.9", "1.0")  # fmt: skip
