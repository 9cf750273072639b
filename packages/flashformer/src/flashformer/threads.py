"""How many threads take part: chosen while running, as the results do not depend on it.

Two threads that wait for each other are slower than one where a core is busy with something else,
or where the model is so small that waiting costs more than reading. So both are timed, the faster
one is used, and the other is tried again after a while, the longer after, the more often it lost;
and at once where the machine has become much slower. The first choice is soon looked at again: it
is made right after a prompt was read, while other libraries' threads may still spin on the cores.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

# What counts are the newest calls that have so many seconds and tokens together: on a busy machine
# threads run undisturbed for some milliseconds at a time, and wait for more.
SLICE, TOKENS = 0.03, 4
PARTS = 10  # calls to fill a slice in a trial
# A trial is lost sooner where its first calls, so many, all took more than LOST times as long as
# the best, or where all of a slice did on average.
CLEAR, LOST = 3, 1.25
# Tokens to the next trial: PERIOD after the first choice and after a change of it. A trial that is
# lost doubles them, or more, so that it took no more than SHARE of the time; LONGEST is the end.
PERIOD, LONGEST, SHARE = 32, 2**16, 0.05
SLOWED = 2.0  # times as slow as it was: the other is tried at once


@dataclass
class Call:
    """A native call.

    Attributes:
        threads: That take part.
        tokens: That it decodes; whoever made it says so if they were fewer.
        limit: Seconds after which it should return with the tokens that it has; None has no limit.
    """

    threads: int
    tokens: int
    limit: float | None = None


class _Calls:
    """The newest calls, as many as are enough to judge by."""

    def __init__(self) -> None:
        self._calls: deque[tuple[float, int]] = deque()
        self.seconds, self.tokens, self.fastest = 0.0, 0, float("inf")

    def add(self, seconds: float, tokens: int) -> None:
        self._calls.append((seconds, tokens))
        self.seconds += seconds
        self.tokens += tokens
        self.fastest = min(self.fastest, seconds / tokens)  # of all, also those long ago
        oldest = self._calls[0]
        while self.seconds - oldest[0] >= SLICE and self.tokens - oldest[1] >= TOKENS:
            self._calls.popleft()
            self.seconds -= oldest[0]
            self.tokens -= oldest[1]
            oldest = self._calls[0]

    @property
    def count(self) -> int:
        return len(self._calls)

    @property
    def mean(self) -> float:
        """Seconds of a token, 0 where there was none."""
        return self.seconds / self.tokens if self.tokens else 0.0

    @property
    def enough(self) -> bool:
        return self.seconds >= SLICE and self.tokens >= TOKENS


class Threads:
    """Chooses between one thread and all.

    Args:
        most: The number of workers of the plan.

    Attributes:
        fixed: A number of threads to use whatever the timings say; None chooses.
    """

    def __init__(self, most: int) -> None:
        self.fixed: int | None = None
        self._choices = sorted({1, most}, reverse=True)
        self._seconds: dict[int, float] = {}  # of a token, by number of threads
        self._best = self._trying = self._choices[0]
        self._cold = True  # the very first call makes buffers and touches all memory
        self._recent = _Calls()
        self._left = 0  # tokens to the next trial
        self._wait = PERIOD
        self._lock = Lock()

    @property
    def most(self) -> int | None:
        """Tokens that the next call should have at most; None says nothing."""
        if self.fixed is not None or len(self._choices) == 1 or not self._trial:
            return None
        usual = self._usual
        return max(1, int(SLICE / PARTS / usual)) if usual else 1

    @property
    def _trial(self) -> bool:
        return len(self._seconds) < len(self._choices) or self._trying != self._best

    @property
    def _usual(self) -> float:
        """Seconds of a token, 0 where nothing is known."""
        return self._seconds.get(self._best) or self._recent.mean

    @contextmanager
    def measured(self, tokens: int) -> Iterator[Call]:
        """Yield a call of so many tokens, to be made meanwhile, and note how long it took."""
        if self.fixed is not None or len(self._choices) == 1:
            yield Call(self.fixed or self._choices[0], tokens)
            return
        with self._lock:
            limit = max(SLICE, SLOWED * self._usual * tokens)
            call = Call(self._trying, tokens, limit)
        start = time.perf_counter()
        yield call
        spent = time.perf_counter() - start
        with self._lock:
            if self._cold:
                self._cold = False
            elif call.threads == self._trying:  # else another caller's call was decided upon
                self._note(spent, call.tokens)

    @contextmanager
    def untimed(self, tokens: int) -> Iterator[Call]:
        """Yield a call whose time does not count."""
        yield Call(self.fixed or self._best, tokens)

    def _note(self, spent: float, tokens: int) -> None:
        recent, best = self._recent, self._seconds.get(self._best)
        recent.add(spent, tokens)
        if self._trial:
            bad = LOST * best if best else float("inf")
            clear = recent.count >= CLEAR and recent.fastest > bad
            late = recent.seconds >= SLICE and recent.mean > bad
            if recent.enough or clear or late:
                self._judge()
            return
        assert best is not None
        self._left -= tokens
        slowed = recent.enough and recent.mean > SLOWED * best
        if slowed:
            self._wait //= 2  # undoes the doubling of a trial that is lost: nothing was waited for
        if slowed or self._left <= 0:
            self._seconds[self._best] = recent.mean
            self._trying = next(n for n in self._choices if n != self._best)
            self._recent = _Calls()

    def _judge(self) -> None:
        """End a trial."""
        first = len(self._seconds) < len(self._choices)
        spent = self._recent.seconds
        self._seconds[self._trying] = self._recent.mean
        self._recent = _Calls()
        untried = [n for n in self._choices if n not in self._seconds]
        if untried:
            self._trying = untried[0]
            return
        winner = min(self._seconds, key=self._seconds.__getitem__)
        if first or winner != self._best:
            self._wait = PERIOD
        else:
            wait = max(2 * self._wait, int(spent / (SHARE * self._seconds[winner])))
            self._wait = min(wait, LONGEST)
        self._best = self._trying = winner
        self._left = self._wait
