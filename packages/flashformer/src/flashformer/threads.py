"""How many threads take part: chosen while running, as the results do not depend on it.

Two threads that wait for each other are slower than one where a core is busy with something else,
or where the model is so small that waiting costs more than reading. So both are timed, the faster
one is used, and the other is tried again after a while, the longer after, the more often it lost;
and at once where a call takes much longer than it did. The first choice is soon looked at again: it
is made right after a prompt was read, while other libraries' threads may still spin on the cores.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

TRIAL = 7  # tokens of a trial, each timed by itself; their median counts
CLEAR, LOST = 3, 1.25  # a trial ends when its so many first tokens all took so much longer
PERIOD = 32  # tokens until the first repetition of a trial; doubled with each that is lost
LONGEST = 2**16
SLOWED = 2.0  # times as slow as it was: the other is tried at once


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
        self._sample: list[float] = []
        self._left, self._wait = TRIAL, PERIOD  # tokens to the end of the trial or of the wait

    @property
    def most(self) -> int | None:
        """Tokens that the next call should have at most: one in a trial, which stays short."""
        trial = self.fixed is None and len(self._choices) > 1 and self._trial
        return 1 if trial else None

    @property
    def _trial(self) -> bool:
        return len(self._seconds) < len(self._choices) or self._trying != self._best

    @contextmanager
    def measured(self, tokens: int) -> Iterator[int]:
        """Yield a number of threads for so many tokens, and note how long they took."""
        if self.fixed is not None or len(self._choices) == 1:
            yield self.fixed or self._choices[0]
            return
        start = time.perf_counter()
        yield self._trying
        spent = (time.perf_counter() - start) / tokens
        if self._cold:
            self._cold = False
            return
        self._sample.append(spent)
        self._left -= tokens
        slowed = not self._trial and spent > SLOWED * self._seconds[self._best]
        if slowed:  # the machine has become busy, or it was a hitch: both are timed anew
            self._seconds, self._sample, self._left = {}, [], TRIAL
        elif self._left <= 0 or self._clear:
            self._decide()

    @property
    def _clear(self) -> bool:
        """Whether a trial is lost for certain."""
        best = self._seconds.get(self._best)
        if not self._trial or best is None or len(self._sample) < CLEAR:
            return False
        return min(self._sample) > LOST * best

    def _decide(self) -> None:
        self._seconds[self._trying] = median(self._sample[-64:])
        self._sample = []
        untried = [n for n in self._choices if n not in self._seconds]
        if untried:
            self._trying, self._left = untried[0], TRIAL
        elif not self._trial:
            self._trying = next(n for n in self._choices if n != self._best)
            self._left = TRIAL
        else:
            winner = min(self._seconds, key=self._seconds.__getitem__)
            self._wait = PERIOD if winner != self._best else min(2 * self._wait, LONGEST)
            self._best = self._trying = winner
            self._left = self._wait
