"""How many threads take part is found out while running, and changes nothing but the time."""

import itertools
from contextlib import suppress

import pytest

import flashformer as ff
from flashformer import threads as module
from flashformer.threads import CLEAR, LONGEST, LOST, PARTS, PERIOD, SHARE, SLICE, SLOWED, Threads

MS = 1e-3
FIRST = 4 * int(SLICE / MS)  # tokens of a millisecond in which both were tried
A_WHILE = 32 * PERIOD  # tokens after which a choice is settled


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


def run(threads, clock, ms, tokens, calls):
    """Decode some tokens in calls, which keep to their limit; `ms` of a token by threads.

    Returns:
        The number of threads for every token.
    """
    used = []
    for _ in range(calls):
        left = tokens
        while left:
            with threads.measured(min(left, threads.most or left)) as call:
                each = ms[call.threads] * MS
                if call.limit is not None:
                    call.tokens = min(call.tokens, int(call.limit / each) + 1)
                clock.now += each * call.tokens
            used += [call.threads] * call.tokens
            left -= call.tokens
    return used


def chosen(threads, clock, ms):
    """Decode until the first choice is made."""
    while len(threads._seconds) < 2:
        run(threads, clock, ms, 1, 1)


def trials(used, best=1):
    """Where the other number begins to be tried."""
    return [i for i in range(1, len(used)) if used[i] != best and used[i - 1] == best]


@pytest.mark.parametrize("best", [1, 4])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_the_faster_number_is_used(clock, best, tokens):
    threads = Threads(4)
    used = run(threads, clock, {1: 1.0, 4: 1.0, best: 0.5}, tokens, A_WHILE // tokens)
    assert set(used[: 2 * FIRST]) == {1, 4}
    after = used[2 * FIRST :]
    part = max(tokens, int(SLICE / PARTS / (0.5 * MS)))
    assert after.count(5 - best) <= CLEAR * part * len(trials(after, best))


@pytest.mark.parametrize("best", [1, 2])
def test_calls_may_be_as_short_as_they_like(clock, best):
    threads = Threads(2)
    used = run(threads, clock, {1: 0.01, 2: 0.01, best: 0.005}, 1, 100_000)
    assert set(used[:10_000]) == {1, 2}
    assert used[20_000:].count(3 - best) < 2 * SHARE * 80_000


@pytest.mark.parametrize("tokens", [1, 8])
def test_trials_take_little_time(clock, tokens):
    """Those that are clearly lost, and however slow the other is."""
    for slower in (1.3, 3.0, 50.0, 500.0):
        threads = Threads(2)
        ms = {1: 1.0, 2: slower}
        chosen(threads, clock, ms)
        run(threads, clock, ms, tokens, 2 * PERIOD // tokens)  # the first repetition is soon
        before = clock.now
        used = run(threads, clock, ms, tokens, 30 * A_WHILE // tokens)
        assert trials(used)
        assert used.count(2) * slower * MS < (SHARE + 0.01) * (clock.now - before)


def test_the_first_call_is_not_counted(clock):
    """It makes buffers and touches all of the weights for the first time."""
    threads = Threads(2)
    with threads.measured(1):
        clock.now += 100.0
    used = run(threads, clock, {1: 1.0, 2: 0.5}, 1, 3 * FIRST)
    assert used[-1] == 2
    assert set(used[: int(SLICE / MS)]) == {2}


@pytest.mark.parametrize("best", [1, 2])
def test_a_wrong_first_choice_is_soon_corrected(clock, best):
    """Another library's thread still spins on a core while the first trial runs."""
    threads = Threads(2)
    chosen(threads, clock, {1: 1.0, 2: 1.0, best: 1.1})
    used = run(threads, clock, {1: 1.0, 2: 1.0, best: 0.5}, 1, PERIOD + FIRST)
    assert used[0] == 3 - best
    assert used[-1] == best
    assert used.index(best) <= PERIOD


@pytest.mark.parametrize("slower", [LOST - 0.01, LOST + 0.01])
def test_a_trial_that_is_clearly_lost_ends(clock, slower):
    threads = Threads(2)
    used = run(threads, clock, {1: 1.0, 2: slower}, 1, A_WHILE)
    begin = next(i for i in trials(used) if i > FIRST)
    length = used[begin:].index(1)
    assert length == CLEAR if slower > LOST else length * slower * MS >= SLICE


def test_a_trial_whose_mean_is_bad_ends_with_its_time(clock):
    """Threads that now and then wait for a slice of the processor are fast in between."""
    threads = Threads(2)
    while threads.most or len(threads._seconds) < 2:  # until the first choice is made
        run(threads, clock, {1: 1.0, 2: 2.0}, 1, 1)
    run(threads, clock, {1: 1.0, 2: 2.0}, 1, PERIOD * 4)
    while not threads.most:
        run(threads, clock, {1: 1.0, 2: 0.1}, 1, 1)
    used = run(threads, clock, {1: 1.0, 2: 0.1}, 1, 2)
    used += run(threads, clock, {1: 1.0, 2: 200.0}, 1, 1)
    assert used == [2, 2, 2]
    assert run(threads, clock, {1: 1.0, 2: 0.1}, 1, PERIOD) == [1] * PERIOD


def test_one_slow_token_does_not_lose_a_trial(clock):
    threads = Threads(2)
    run(threads, clock, {1: 1.0, 2: 1.5}, 1, FIRST)
    while not threads.most:
        run(threads, clock, {1: 1.0, 2: 0.5}, 1, 1)
    assert run(threads, clock, {1: 1.0, 2: 10.0}, 1, 1) == [2]
    assert set(run(threads, clock, {1: 1.0, 2: 0.5}, 1, 2 * PERIOD)) == {2}


def test_trials_become_rare_for_who_loses(clock):
    threads = Threads(2)
    used = run(threads, clock, {1: 1.0, 2: 1.3}, 1, 64 * A_WHILE)
    gaps = [b - a for a, b in itertools.pairwise(trials(used))]
    assert len(gaps) >= 5
    assert all(1.8 * a < b < 2.2 * a for a, b in itertools.pairwise(gaps[1:]))


def test_the_wait_between_trials_has_an_end(clock):
    threads = Threads(2)
    used = run(threads, clock, {1: 1.0, 2: 50.0}, 1024, 6 * LONGEST // 1024)
    last, before = (b - a for a, b in list(itertools.pairwise(trials(used)))[:-3:-1])
    assert LONGEST <= last <= LONGEST + 2 * 1024
    assert last == pytest.approx(before, abs=2 * 1024)


def test_what_was_long_ago_does_not_count(clock):
    """One thread was slow for a while, short of alarm; now it is fast, and stays the choice."""
    threads = Threads(2)
    run(threads, clock, {1: 1.0, 2: 1.5}, 1, A_WHILE)
    run(threads, clock, {1: 1.8, 2: 1.5}, 1, A_WHILE)
    used = run(threads, clock, {1: 1.0, 2: 1.5}, 1, 8 * A_WHILE)
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
    busy = run(threads, clock, {1: 2.5, 2: 100.0}, 8, 8)
    assert busy.count(2) <= 3
    assert busy[-1] == 1


def test_a_call_may_take_as_long_as_usual(clock):
    threads = Threads(2)
    run(threads, clock, {1: 10.0, 2: 5.0}, 8, A_WHILE // 8)
    while threads.most:
        run(threads, clock, {1: 10.0, 2: 5.0}, 1, 1)
    with threads.measured(100) as call:
        assert call.limit == pytest.approx(SLOWED * 100 * 5 * MS, rel=0.01)
        clock.now += 5 * MS
        call.tokens = 1
    with threads.measured(1) as call:
        assert call.limit == SLICE


def test_a_hitch_changes_nothing_for_long(clock):
    threads = Threads(2)
    run(threads, clock, {1: 1.0, 2: 0.5}, 8, A_WHILE // 8)
    with threads.measured(1):
        clock.now += 0.1
    used = run(threads, clock, {1: 1.0, 2: 0.5}, 8, A_WHILE // 8)
    assert used.count(1) <= 2 * (FIRST + PERIOD)
    assert used[-1] == 2


def test_one_worker_has_no_choice(clock):
    threads = Threads(1)
    assert set(run(threads, clock, {1: 1.0}, 1, 50)) == {1}
    with threads.measured(5) as call:
        assert call.limit is None


def test_a_fixed_number_is_used(clock):
    threads = Threads(4)
    threads.fixed = 3
    assert set(run(threads, clock, {3: 1.0}, 1, 50)) == {3}
    with threads.measured(5) as call:
        assert call.limit is None


def test_a_call_that_fails_is_not_counted(clock):
    threads = Threads(2)
    run(threads, clock, {2: 1.0}, 1, 2)
    with suppress(RuntimeError), threads.measured(8):
        clock.now += 100.0
        raise RuntimeError
    assert run(threads, clock, {2: 1.0}, 1, int(SLICE / MS) - 2) == [2] * (int(SLICE / MS) - 2)


def test_reading_is_not_counted(clock):
    """It has no head to compute for most of its tokens."""
    threads = Threads(2)
    chosen(threads, clock, {1: 1.0, 2: 0.5})
    for _ in range(3):
        with threads.untimed(1000) as call:
            assert (call.threads, call.limit) == (2, None)
            clock.now += 100.0
    assert set(run(threads, clock, {1: 1.0, 2: 0.5}, 1, PERIOD)) == {2}


def test_a_call_that_another_caller_overtook_is_not_counted(clock):
    threads = Threads(2)
    run(threads, clock, {2: 1.0}, 1, 2)
    with threads.measured(1) as late:
        while threads._trying == 2:
            run(threads, clock, {2: 1.0}, 1, 1)
        clock.now += 100.0
    assert late.threads == 2
    chosen(threads, clock, {1: 0.9, 2: 1.0})
    assert set(run(threads, clock, {1: 0.9, 2: 1.0}, 1, PERIOD)) == {1}


@pytest.mark.parametrize("slice", [1e-4, 0.0])  # seconds; with none, calls return after a token
def test_a_model_uses_both_and_says_the_same(kit, monkeypatch, slice):
    monkeypatch.setattr(module, "SLICE", slice)
    monkeypatch.setattr(module, "SLOWED", 1.0 if slice else 0.0)
    model = ff.compile(kit.model(), threads=2, max_len=400, backend="cpu")
    alone = ff.compile(kit.model(), threads=1, max_len=400, backend="cpu")
    caches = model.new_cache(), alone.new_cache()
    token = 5
    for _ in range(112):
        ours, theirs = (
            m.decode(c, token, steps=3).tolist()
            for m, c in zip((model, alone), caches, strict=True)
        )
        assert ours == theirs
        token = ours[-1]
    assert set(model._threads._seconds) == {1, 2}
