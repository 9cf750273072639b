"""How many threads take part is found out while running, and changes nothing but the time."""

import itertools

import pytest

import flashformer as ff
from flashformer import threads as module
from flashformer.threads import CLEAR, LONGEST, LOST, PERIOD, TRIAL, Threads

A_WHILE = 8 * PERIOD  # tokens after which a choice is settled


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
        left = tokens
        while left:
            new = min(left, threads.most or left)
            with threads.measured(new) as chosen:
                used += [chosen] * new
                clock.now += seconds[chosen] * new
            left -= new
    return used


@pytest.mark.parametrize("best", [1, 4])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_the_faster_number_is_used(clock, best, tokens):
    threads = Threads(4)
    seconds = {1: 1.0, 4: 1.0, best: 0.5}
    used = run(threads, clock, seconds, tokens, A_WHILE // tokens)
    after = used[2 * TRIAL + 1 :]
    assert set(after[:PERIOD]) == {best}
    assert after.count(5 - best) <= 3 * CLEAR  # trials that were soon lost
    assert set(used[: 2 * TRIAL + 1]) == {1, 4}


def test_the_first_call_is_not_counted(clock):
    """It makes buffers and touches all of the weights for the first time."""
    threads = Threads(2)
    with threads.measured(1):
        clock.now += 100.0
    assert set(run(threads, clock, {1: 1.0, 2: 0.5}, 1, 2 * TRIAL + PERIOD)[2 * TRIAL :]) == {2}


def test_a_wrong_first_choice_is_soon_corrected(clock):
    """Another library's thread still spins on a core while the first trial runs."""
    threads = Threads(2)
    run(threads, clock, {1: 1.0, 2: 1.5}, 1, 2 * TRIAL + 1)
    used = run(threads, clock, {1: 1.0, 2: 0.5}, 1, PERIOD + TRIAL + 1)
    assert used[0] == 1
    assert used[-1] == 2


@pytest.mark.parametrize("slower", [LOST - 0.01, LOST + 0.01])
def test_a_trial_that_is_clearly_lost_ends(clock, slower):
    threads = Threads(2)
    run(threads, clock, {1: 1.0, 2: slower}, 1, 2 * TRIAL + 1)
    used = run(threads, clock, {1: 1.0, 2: slower}, 1, PERIOD + 2 * TRIAL)
    assert used.count(2) == (CLEAR if slower > LOST else TRIAL)


def test_one_slow_token_does_not_lose_a_trial(clock):
    threads = Threads(2)
    run(threads, clock, {1: 1.0, 2: 1.5}, 1, 2 * TRIAL + 1)
    run(threads, clock, {1: 1.0, 2: 1.5}, 1, PERIOD)
    assert run(threads, clock, {1: 1.0, 2: 3.0}, 1, CLEAR - 1) == [2] * (CLEAR - 1)
    assert set(run(threads, clock, {1: 1.0, 2: 0.5}, 1, TRIAL + PERIOD - CLEAR)) == {2}


def test_trials_are_short_and_become_rare_for_who_loses(clock):
    threads = Threads(2)
    used = run(threads, clock, {1: 1.0, 2: 50.0}, 1, 64 * PERIOD)
    trials = [i for i, n in enumerate(used) if n == 2 and used[i - 1] == 1]
    assert used.count(2) <= 1 + TRIAL + CLEAR * len(trials)
    gaps = [b - a for a, b in itertools.pairwise(trials)]
    assert len(gaps) >= 3
    assert all(1.8 * a < b < 2.2 * a for a, b in itertools.pairwise(gaps))


def test_the_wait_between_trials_has_an_end(clock):
    threads = Threads(2)
    used = run(threads, clock, {1: 1.0, 2: 50.0}, 1024, 6 * LONGEST // 1024)
    trials = [i for i, n in enumerate(used) if n == 2 and used[i - 1] == 1]
    last, before = (b - a for a, b in list(itertools.pairwise(trials))[:-3:-1])
    assert LONGEST <= last <= LONGEST + 1024 + TRIAL
    assert last == pytest.approx(before, abs=1024 + TRIAL)


def test_what_was_long_ago_does_not_count(clock):
    """One thread was slow for a while, short of alarm; now it is fast, and stays the choice."""
    threads = Threads(2)
    run(threads, clock, {1: 1.0, 2: 1.5}, 1, 2 * TRIAL + 1)
    run(threads, clock, {1: 1.0, 2: 1.5}, 1, 7 * PERIOD)  # the next trials are far away
    run(threads, clock, {1: 1.8, 2: 1.5}, 1, 4 * PERIOD)
    used = run(threads, clock, {1: 1.0, 2: 1.5}, 1, 6 * PERIOD)
    assert 2 in used
    assert used[-1] == 1


def test_it_changes_its_mind_when_the_machine_does(clock):
    threads = Threads(2)
    run(threads, clock, {1: 1.0, 2: 0.5}, 1, A_WHILE)
    late = run(threads, clock, {1: 1.0, 2: 9.0}, 1, 4 * A_WHILE)
    assert late[-1] == 1
    again = run(threads, clock, {1: 1.0, 2: 0.5}, 1, 8 * A_WHILE)
    assert again[-1] == 2


def test_a_machine_that_becomes_busy_is_noticed_at_once(clock):
    threads = Threads(2)
    run(threads, clock, {1: 1.0, 2: 0.5}, 8, A_WHILE // 8)
    busy = run(threads, clock, {1: 2.5, 2: 40.0}, 8, 8)
    assert busy.count(2) <= 8 + TRIAL + CLEAR  # the last: tried again
    assert busy[-1] == 1


def test_a_hitch_changes_nothing_for_long(clock):
    threads = Threads(2)
    run(threads, clock, {1: 1.0, 2: 0.5}, 8, A_WHILE // 8)
    run(threads, clock, {1: 50.0, 2: 50.0}, 8, 1)
    assert run(threads, clock, {1: 1.0, 2: 0.5}, 8, 8).count(1) <= TRIAL


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
    for _ in range(16 * TRIAL):
        ours, theirs = (
            m.decode(c, token, steps=3).tolist()
            for m, c in zip((model, alone), caches, strict=True)
        )
        assert ours == theirs
        token = ours[-1]
    assert set(model._threads._seconds) == {1, 2}
