"""How many threads take part: chosen while running, as the results do not depend on it.

Two threads that wait for each other are slower than one where a core is busy with something else,
or where the model is so small that waiting costs more than reading. So both are timed, again and
again, and the faster one is used.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

TRIAL = 16  # tokens after which a number of threads has been tried
PERIOD = 512  # tokens after which the others are tried again


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
        self._seconds: dict[int, float] = {}
        self._trying = self._choices[0]
        self._trial, self._tokens = True, 0

    @contextmanager
    def measured(self, tokens: int) -> Iterator[int]:
        """Yield a number of threads for so many tokens, and note how long they took."""
        if self.fixed is not None or len(self._choices) == 1:
            yield self.fixed or self._choices[0]
            return
        threads = self._trying
        start = time.perf_counter()
        yield threads
        spent = (time.perf_counter() - start) / tokens
        self._note(threads, spent, tokens)

    def _note(self, threads: int, spent: float, tokens: int) -> None:
        known = self._seconds.get(threads)
        self._seconds[threads] = spent if known is None else min(spent, 1.1 * known)
        self._tokens += tokens
        if self._trial and self._tokens < TRIAL:
            return
        best = min(self._seconds, key=self._seconds.__getitem__)
        untried = [n for n in self._choices if n not in self._seconds]
        if untried:
            self._trying, self._tokens = untried[0], 0
        elif not self._trial and self._tokens >= PERIOD:
            self._seconds = {best: self._seconds[best]}
            self._trying = next(n for n in self._choices if n != best)
            self._trial, self._tokens = True, 0
        else:
            self._trial, self._trying = False, best
