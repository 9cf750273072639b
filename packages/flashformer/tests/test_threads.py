"""How many threads take part is found out while running, and changes nothing but the time."""

import pytest

import flashformer as ff
from flashformer import threads as module
from flashformer.threads import PERIOD, TRIAL, Threads


class Clock:
    """A clock that goes on as told."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def run(threads, clock, seconds, tokens, calls):
    """Decode some tokens in calls; `seconds` are those of a token by number of threads."""
    used = []
    for _ in range(calls):
        with threads.measured(tokens) as chosen:
            used.append(chosen)
            clock.now += seconds[chosen] * tokens
    return used


@pytest.mark.parametrize("best", [1, 4])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_the_faster_number_is_used(clock, best, tokens):
    threads = Threads(4)
    seconds = {1: 1.0, 4: 1.0, best: 0.5}
    trial = 2 * (-(-TRIAL // tokens))
    run(threads, clock, seconds, tokens, trial)
    calls = (PERIOD - 5 * TRIAL) // tokens
    assert set(run(threads, clock, seconds, tokens, calls)) == {best}


def test_both_are_tried_first_and_the_other_again_after_a_while(clock):
    threads = Threads(2)
    used = run(threads, clock, {1: 1.0, 2: 0.5}, 1, 2 * TRIAL)
    assert used == [2] * TRIAL + [1] * TRIAL
    later = run(threads, clock, {1: 1.0, 2: 0.5}, 1, 2 * PERIOD)
    assert later.count(1) in range(TRIAL, 3 * TRIAL + 1)
    assert set(later[: PERIOD - TRIAL]) == {2}


def test_it_changes_its_mind_when_the_machine_does(clock):
    threads = Threads(2)
    run(threads, clock, {1: 1.0, 2: 0.5}, 1, PERIOD)
    late = run(threads, clock, {1: 1.0, 2: 9.0}, 1, 2 * PERIOD)
    assert late[-1] == 1
    again = run(threads, clock, {1: 1.0, 2: 0.5}, 1, 3 * PERIOD)
    assert again[-1] == 2


def test_one_worker_has_no_choice(clock):
    assert set(run(Threads(1), clock, {1: 1.0}, 1, 50)) == {1}


def test_a_fixed_number_is_used(clock):
    threads = Threads(4)
    threads.fixed = 3
    assert set(run(threads, clock, {3: 1.0}, 1, 50)) == {3}


def test_a_call_that_fails_is_not_counted(clock):
    threads = Threads(2)
    with pytest.raises(RuntimeError), threads.measured(TRIAL):
        raise RuntimeError
    with threads.measured(1) as chosen:
        assert chosen == 2


def test_a_model_uses_both_and_says_the_same(kit):
    model = ff.compile(kit.model(), threads=2, max_len=400, backend="cpu")
    alone = ff.compile(kit.model(), threads=1, max_len=400, backend="cpu")
    caches = model.new_cache(), alone.new_cache()
    token = 5
    for _ in range(4 * TRIAL):
        ours, theirs = (
            m.decode(c, token, steps=3).tolist()
            for m, c in zip((model, alone), caches, strict=True)
        )
        assert ours == theirs
        token = ours[-1]
    assert set(model._threads._seconds) == {1, 2}
