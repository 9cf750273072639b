"""How many threads take part: chosen while running, as the results do not depend on it.

Two threads that wait for each other are slower than one where a core is busy with something else,
or where the model is so small that waiting costs more than reading. So both are timed, the faster
one is used, and the other is tried again after a while, the longer after, the more often it lost;
and at once where a call takes much longer than it did. The first choice is soon looked at again: it
is made right after a prompt was read, while other libraries' threads may still spin on the cores.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# A trial has so many tokens and takes so many seconds: on a busy machine threads run undisturbed
# for some milliseconds at a time, and wait for more. It ends sooner where so many calls all took so
# many times as long as the best, or the time was long enough and the mean is so bad.
TRIAL, SLICE = 7, 0.03
CLEAR, LOST = 3, 1.25
PERIOD = 32  # tokens until the first repetition of a trial; at least doubled with each that is lost
SHARE = 0.05  # of the time, at most, for trials that are lost
LONGEST = 2**16
SLOWED = 2.0  # times as slow as it was: the other is tried at once
RECENT = 64  # calls


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
        self._calls: deque[tuple[float, int]] = deque(maxlen=RECENT)  # seconds and tokens
        self._left, self._wait = TRIAL, PERIOD  # tokens to the end of the trial or of the wait

    @property
    def most(self) -> int | None:
        """Tokens that the next call should have at most: few in a trial, which stays short."""
        if self.fixed is not None or len(self._choices) == 1 or not self._trial:
            return None
        return 1 if len(self._calls) < CLEAR else TRIAL

    @property
    def _trial(self) -> bool:
        return len(self._seconds) < len(self._choices) or self._trying != self._best

    @contextmanager
    def measured(self, tokens: int) -> Iterator[Call]:
        """Yield a call of so many tokens, to be made meanwhile, and note how long it took."""
        if self.fixed is not None or len(self._choices) == 1:
            yield Call(self.fixed or self._choices[0], tokens)
            return
        usual = self._seconds.get(self._best, 0.0)
        call = Call(self._trying, tokens, max(SLICE, SLOWED * usual * tokens))
        start = time.perf_counter()
        yield call
        spent = time.perf_counter() - start
        if self._cold:
            self._cold = False
            return
        self._calls.append((spent, call.tokens))
        self._left -= call.tokens
        if self._over(spent / call.tokens):
            self._decide()

    def _over(self, seconds: float) -> bool:
        """Whether the trial, or the wait for the next one, is over after a call."""
        best = self._seconds.get(self._best)
        if not self._trial:
            assert best is not None
            return self._left <= 0 or seconds > SLOWED * best  # the machine has become busy
        spent, tokens = self._total()
        if best is not None:
            each = [spent / tokens for spent, tokens in self._calls]
            if len(each) >= CLEAR and min(each) > LOST * best:
                return True
            if spent >= SLICE and spent / tokens > LOST * best:
                return True
        return self._left <= 0 and spent >= SLICE

    def _total(self) -> tuple[float, int]:
        """Return seconds and tokens of the calls since the last decision."""
        return sum(spent for spent, _ in self._calls), sum(tokens for _, tokens in self._calls)

    def _decide(self) -> None:
        spent, tokens = self._total()
        self._seconds[self._trying] = spent / tokens
        self._calls.clear()
        untried = [n for n in self._choices if n not in self._seconds]
        if untried:
            self._trying, self._left = untried[0], TRIAL
        elif not self._trial:
            self._trying = next(n for n in self._choices if n != self._best)
            self._left = TRIAL
        else:
            winner = min(self._seconds, key=self._seconds.__getitem__)
            longer = max(2 * self._wait, spent / (SHARE * self._seconds[winner]))
            self._wait = PERIOD if winner != self._best else min(int(longer), LONGEST)
            self._best = self._trying = winner
            self._left = self._wait
