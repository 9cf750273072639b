"""The toy world: its meanings and speakers by counting, its texts, and a model trained in it."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from tenfold_common.errors import UserError
from wavelength_rsa.listeners import LogprobListener, SamplingListener
from wavelength_rsa.rules import check_clue
from wavelength_rsa.scales import Scale, grid
from wavelength_rsa.speakers import SamplingSpeaker
from wavelength_rsa.toy import REGIONS, SCALES, STEP, ToyPrompts, World

WORLD = World.make(3)
PROMPTS = ToyPrompts()
COLD = Scale("cold", "hot")


def share(counts):
    total = sum(counts.values())
    return {key: value / total for key, value in counts.items()}


class TestWorld:
    def test_meanings_against_the_formula(self):
        meanings = WORLD.meanings()
        assert meanings.shape == (12, 20, 21)
        for s, w in ((0, 0), (5, 13), (11, 19)):
            density = [
                math.exp(-((t - WORLD.mean[s, w]) ** 2) / (2 * WORLD.sd[s, w] ** 2))
                for t in range(0, 101, 5)
            ]
            expected = [value / math.fsum(density) for value in density]
            np.testing.assert_allclose(meanings[s, w], expected, rtol=1e-12)

    @pytest.mark.parametrize("region", [None, 0, 2])
    def test_speaker_against_the_formula(self, region):
        found = WORLD.speaker(region=region)
        assert found.shape == (12, 21, 20)
        s, t = 4, 6
        weight = []
        for w in range(20):
            mu = WORLD.mean[s, w]
            value = WORLD.frequency[s, w] * math.exp(-((mu - 30) ** 2) / (2 * 25**2))
            if region is not None:
                centre = (100 / 6, 50, 500 / 6)[region]
                value *= math.exp(-((mu - centre) ** 2) / (2 * 15**2))
            weight.append(value)
        expected = [value / math.fsum(weight) for value in weight]
        np.testing.assert_allclose(found[s, t], expected, rtol=1e-12)

    def test_what_is_drawn(self):
        assert WORLD.mean.min() >= 0
        assert WORLD.mean.max() <= 100
        assert WORLD.sd.min() >= 4
        assert WORLD.sd.max() <= 25
        np.testing.assert_allclose(WORLD.frequency.sum(1), 1, rtol=1e-12)
        ranked = np.sort(WORLD.frequency, 1)[:, ::-1]
        np.testing.assert_allclose(ranked[:, 0] / ranked[:, 4], 5)
        assert WORLD.held_out.sum() == 50  # a fifth of 252
        clues = [clue for _, clue in WORLD.questions()]
        assert len(set(clues)) == 240
        assert all(check_clue(clue, scale) == [] for scale, clue in WORLD.questions())

    def test_seeds(self):
        again, other = World.make(3), World.make(4)
        assert again.clues == WORLD.clues != other.clues
        assert (again.mean == WORLD.mean).all()
        assert (other.mean != WORLD.mean).all()
        assert (other.held_out != WORLD.held_out).any()

    def test_tasks_and_items(self):
        asked, hidden = (WORLD.tasks(held_out=h) for h in (False, True))
        assert len(asked) == 202
        assert len({*asked, *hidden}) == 252
        items = WORLD.items(held_out=True, seed=1)
        assert [(i.scale, i.target) for i in items] == hidden
        assert all(item.clue in WORLD.clues[SCALES.index(item.scale)] for item in items)
        assert items == WORLD.items(held_out=True, seed=1) != WORLD.items(held_out=True, seed=2)

    def test_the_judge_knows_every_clue_and_nothing_of_others(self):
        judge = WORLD.judge()
        found = judge.listen(WORLD.questions())
        np.testing.assert_allclose(found, WORLD.meanings().reshape(240, 21), rtol=1e-12)
        stranger = judge.listen([(SCALES[0], WORLD.clues[1][0])])
        np.testing.assert_allclose(stranger, 1 / 21)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: World.make(clues=1), "clues must be at least 2, not 1"),
            (lambda: World.make(held_out=1.0), "held_out must be at least 0 and below 1, not 1"),
            (lambda: WORLD.lines(0, 0), "n must be at least 1, not 0"),
            (lambda: WORLD.train(steps=-1), "not -1 and 128"),
            (lambda: WORLD.train(steps=1, batch_size=0), "not 1 and 0"),
        ],
    )
    def test_what_is_refused(self, call, message):
        with pytest.raises(UserError, match=message):
            call()


class TestLines:
    lines = WORLD.lines(60_000, 0)

    def test_kinds(self):
        kinds = share(Counter(" ".join(w for w in line.split() if w in
                      ("target", "think", "answer")) for line in self.lines))  # fmt: skip
        assert kinds["answer"] == pytest.approx(0.5, abs=0.01)
        assert kinds["target"] == pytest.approx(0.25, abs=0.01)
        assert kinds["target think"] == pytest.approx(0.25, abs=0.01)

    def test_no_speaker_is_asked_for_a_held_out_target(self):
        cells = {tuple(line.split()[1:5]) for line in self.lines if " target " in line}
        expected = {(s.left, s.right, "target", f"{t:g}") for s, t in WORLD.tasks(held_out=False)}
        assert cells == expected

    def test_counts_follow_the_world(self):
        scale, clue = SCALES[2], WORLD.clues[2][int(WORLD.frequency[2].argmax())]
        prefix = f"scale {scale.left} {scale.right} clue {clue} answer "
        heard = share(Counter(float(line[len(prefix):]) for line in self.lines
                              if line.startswith(prefix)))  # fmt: skip
        meaning = WORLD.judge().distribution(scale, clue)
        mean = sum(t * p for t, p in heard.items())
        assert mean == pytest.approx(meaning.mean, abs=3 * meaning.sd / math.sqrt(400))
        for kind, region in (("clue", None), ("think low clue", 0), ("think high clue", 2)):
            said, expected = Counter(), np.zeros(20)
            for line in self.lines:
                words = line.split()
                if words[1:4:2] == [scale.left, "target"] and " ".join(words[5:-1]) == kind:
                    said[words[-1]] += 1
                    expected += WORLD.speaker(region=region)[2, int(words[4]) // STEP]
            expected /= expected.sum()
            found = np.array([share(said).get(clue, 0) for clue in WORLD.clues[2]])
            assert sum(said.values()) > 250
            assert np.abs(found - expected).sum() / 2 < 0.1

    def test_the_region_is_the_targets(self):
        seen = {tuple(line.split()[4:7:2]) for line in self.lines if " think " in line}
        assert seen == {
            (f"{t:g}", REGIONS[0 if t < 33 else 1 if t < 67 else 2]) for t in grid(STEP)
        }

    def test_reproducible(self):
        assert WORLD.lines(50, 1) == WORLD.lines(50, 1) != WORLD.lines(50, 2)


class TestPrompts:
    def test_asked_as_in_the_corpus(self):
        lines = set(WORLD.lines(60_000, 0))
        scale, clue = COLD, WORLD.clues[0][int(WORLD.frequency[0].argmax())]
        answers = {PROMPTS.listener(scale, clue) + PROMPTS.answer(int(t)) for t in grid(STEP)}
        assert answers & lines
        target = next(t for s, t in WORLD.tasks(held_out=False) if s == COLD)
        said = {PROMPTS.speaker(scale, target) + f" {c}" for c in WORLD.clues[0]}
        thought = {PROMPTS.speaker(scale, target, cot=True) + f" {r} clue {c}"
                   for c in WORLD.clues[0] for r in REGIONS}  # fmt: skip
        assert said & lines
        assert thought & lines

    def test_every_word_is_a_token_and_comes_back(self):
        tokenizer = WORLD.tokenizer()
        for line in WORLD.lines(300, 2):
            ids = tokenizer(line).input_ids
            assert tokenizer.unk_token_id not in ids
            assert len(ids) == len(line.split())
            assert tokenizer.decode(ids) == line

    def test_reading(self):
        assert PROMPTS.read_answer(" 45 ") == 45
        assert [PROMPTS.read_answer(t) for t in ("47", "45 50", "", "hot", "nan")] == [None] * 5
        assert PROMPTS.read_clue(" bazulo") == "bazulo"
        assert [PROMPTS.read_clue(t) for t in ("", "two words")] == [None] * 2
        assert PROMPTS.read_clue(" low clue bazulo", cot=True) == "bazulo"
        for text in ("bazulo", "low", "low clue", "low clue two words", "far clue bazulo", ""):
            assert PROMPTS.read_clue(text, cot=True) is None

    def test_hash_and_refusals(self):
        assert len(PROMPTS.hash) == 64
        assert PROMPTS.hash == ToyPrompts().hash
        assert PROMPTS.listener(COLD, "x", step=None) == PROMPTS.listener(COLD, "x")
        with pytest.raises(UserError, match="multiples of 5, not of 10"):
            PROMPTS.listener(COLD, "x", step=10)
        with pytest.raises(UserError, match="do not reason"):
            PROMPTS.listener(COLD, "x", cot=True)


class TestTraining:
    small = World.make(0, clues=2)

    def test_learns_what_clues_mean_and_how_speakers_choose(self):
        model = self.small.train(steps=250, lines=5000)
        assert model.name == "toy model 0 (250 steps)"
        questions = self.small.questions()
        true = self.small.meanings().reshape(-1, 21)
        heard = LogprobListener(model, PROMPTS).listen(questions)
        untrained = LogprobListener(self.small.train(steps=0, lines=1), PROMPTS).listen(questions)
        assert np.abs(heard - true).sum(1).mean() / 2 < 0.35
        assert np.abs(untrained - true).sum(1).mean() / 2 > 0.4
        assert np.corrcoef(heard @ grid(STEP), true @ grid(STEP))[0, 1] > 0.85
        sampled = SamplingListener(model, PROMPTS, num_samples=50).listen(questions)
        assert np.abs((sampled - heard) @ grid(STEP)).mean() < 5
        tasks = self.small.tasks(held_out=False)
        for cot in (False, True):
            speaker = SamplingSpeaker(model, PROMPTS, num_candidates=20, cot=cot)
            proposals = speaker.propose(tasks)
            own = [
                count
                for (scale, _), found in zip(tasks, proposals, strict=True)
                for clue, count in zip(found.clues, found.counts, strict=True)
                if clue in self.small.clues[SCALES.index(scale)]
            ]
            assert sum(own) > 0.85 * 20 * len(tasks)

    def test_reproducible(self):
        a, b, c = (self.small.train(seed, steps=3, lines=500) for seed in (0, 0, 1))
        for one, same, other in zip(
            a.model.parameters(), b.model.parameters(), c.model.parameters(), strict=True
        ):
            assert torch.equal(one, same)
            assert one.ndim == 1 or not torch.equal(one, other)
        assert not a.model.training

    def test_leaves_the_global_random_state(self):
        before = torch.get_rng_state()
        self.small.train(steps=2, lines=50)
        assert torch.equal(before, torch.get_rng_state())
