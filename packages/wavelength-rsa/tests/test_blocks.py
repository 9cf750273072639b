"""Models are asked in blocks: alike with and without a cache, and a kill loses one block."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tenfold_common.lm import Generation, Score
from tenfold_common.lm.base import stream_seed
from wavelength_rsa.cache import CachedModel
from wavelength_rsa.data import Item
from wavelength_rsa.evaluate import evaluate_listener, evaluate_speaker
from wavelength_rsa.listeners import TOGETHER, LogprobListener, SamplingListener
from wavelength_rsa.scales import Scale
from wavelength_rsa.speakers import RSAListener, RSASpeaker, SamplingSpeaker


class Dice:
    """A model whose replies and scores depend on the seed and on the place in the call.

    One reply in four is no answer, so that there are further rounds.
    """

    name = "dice"

    def __init__(self, fatal=""):
        self.fatal, self.asked, self.seeds = fatal, [], []

    def sample(self, prompts, *, n, seed, **settings):
        self.asked.append(len(prompts))
        self.seeds.append(seed)
        self._check(prompts)
        return [
            [self._reply(p, stream_seed(seed, i, j)) for j in range(n)]
            for i, p in enumerate(prompts)
        ]

    def score(self, prefix, continuations):
        return self.score_many([prefix], [continuations])[0]

    def score_many(self, prefixes, continuations):
        self.asked.append(len(prefixes))
        self._check(prefixes)
        return [
            [Score((-(stream_seed(0, i, len(str(p)) + k) % 97) / 10,), ((0, len(text)),))
             for k, text in enumerate(texts)]
            for i, (p, texts) in enumerate(zip(prefixes, continuations, strict=True))
        ]  # fmt: skip

    def _check(self, prompts):
        if self.fatal and any(self.fatal in str(prompt) for prompt in prompts):
            os.kill(os.getpid(), signal.SIGKILL)

    def _reply(self, prompt, number):
        text = str(prompt)
        if number % 4 == 0:
            return Generation("I would rather not", "stop", 4)
        if "<clue>" in text:
            return Generation(f"<clue>{WORDS[number % len(WORDS)]}", "stop", 1)
        return Generation(f"<answer>{number % 101}", "stop", 1)


WORDS = ("fire", "ice", "tea", "moon", "sand", "wool", "drum", "silk", "mint")
MANY = [Scale(f"Calm{i}", f"Wild{i}") for i in range(2 * TOGETHER + 5)]


def ask(kind, model):
    """Ask about one thing on every scale, and return all that was said."""
    if kind == "speaker":
        speaker = SamplingSpeaker(model, num_candidates=1)
        return [c.to_dict() for c in speaker.propose([(s, 50) for s in MANY], seed=9)]
    listener = (
        SamplingListener(model, num_samples=2)
        if kind == "samples"
        else LogprobListener(model, normalize="pmi")
    )
    return listener.listen([(scale, "tea") for scale in MANY], seed=9).tolist()


KINDS = ("samples", "probabilities", "speaker")


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_changes_no_figure(kind, tmp_path):
    bare = Dice()
    wanted = ask(kind, bare)
    assert bare.asked[:2] == [TOGETHER, TOGETHER]
    assert len(bare.asked) > 3  # blank clues, or further rounds, follow
    empty, silent = Dice(), Dice()
    with CachedModel(empty, tmp_path / "c.db", identity="d") as model:
        assert ask(kind, model) == wanted
    assert empty.asked == bare.asked
    with CachedModel(silent, tmp_path / "c.db", identity="d") as model:
        assert ask(kind, model) == wanted
        assert (model.hits, model.misses) == (sum(bare.asked), 0)
    assert silent.asked == []


@pytest.mark.parametrize("kind", ["samples", "speaker"])
def test_every_block_of_every_round_has_a_seed_of_its_own(kind):
    model = Dice()
    ask(kind, model)
    assert model.seeds[0] == 9
    assert len(set(model.seeds)) == len(model.seeds) > 3  # three blocks, and rounds


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_blocks import MANY, CachedModel, Dice, ask
ask(sys.argv[2], CachedModel(Dice(fatal=MANY[int(sys.argv[4])].left), sys.argv[3], identity="d"))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_a_block_the_blocks_before_it_are_kept(kind, tmp_path):
    """Killed in the third block: it is asked again, the two before it are not."""
    here, file = str(Path(__file__).parent), str(tmp_path / "c.db")
    command = [sys.executable, "-c", KILLED, here, kind, file, str(2 * TOGETHER + 2)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    bare, rest = Dice(), Dice()
    wanted = ask(kind, bare)
    with CachedModel(rest, file, identity="d") as model:
        assert ask(kind, model) == wanted
        assert model.hits == 2 * TOGETHER
        assert rest.asked == bare.asked[2:]


def test_whole_reports_are_the_same_bytes_with_and_without_a_cache(tmp_path):
    """Pragmatic speaker and listener on more scales than a block has: bare, asked, remembered."""
    items = [Item(scale, "tea", 50.0, id=str(i)) for i, scale in enumerate(MANY[: TOGETHER + 3])]

    def reports(model):
        literal = SamplingListener(model, step=50, num_samples=3)
        direct = SamplingSpeaker(model, num_candidates=3)
        reasoning = RSASpeaker(direct, literal)
        pragmatic = RSAListener(literal, direct)
        options = {"seed": 5, "resamples": 20}
        return [
            evaluate_listener(pragmatic, items, **options).to_json(),
            evaluate_speaker(reasoning, items, judge=pragmatic, **options).to_json(),
        ]

    wanted = reports(Dice())
    for _ in range(2):
        with CachedModel(Dice(), tmp_path / "c.db") as model:
            assert reports(model) == wanted
