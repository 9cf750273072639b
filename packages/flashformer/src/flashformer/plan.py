"""The plan of one token: which worker does which rows of which stage, and who waits for whom.

All back-ends follow the same plan. A layer has five stages and the model one more at its end:

    qkv        queries, keys and values of the normalised residual stream
    attention  parts: the query heads of one kv head over one chunk of positions
    output     the parts put together, times the output projection, added to the residual stream
    up         gate and up projections, silu(gate) * up
    down       the down projection, added to the residual stream
    head       logits, and each worker's best token

Everything else (norms, rotary positions, putting parts together, choosing among the workers' best)
is computed by every worker for itself, so that it costs no barrier: 5 L + 1 a token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from flashformer.config import ModelSpec
from tenfold_common.errors import TenfoldError, UserError

TILE = 16  # rows of a tile: the lanes of an AVX-512 register, and a warp's half
CHUNK = 256  # positions of one part of the attention
KINDS = ("qkv", "attention", "output", "up", "down", "head")


class PlanError(TenfoldError):
    """A plan would read what is not yet written, or wait for what never comes."""


@dataclass(frozen=True)
class Wait:
    """Wait until so many workers have finished a stage.

    Attributes:
        stage: Number of the stage in the plan; of the token before where `previous` is set.
        arrivals: How many workers must have finished it.
        previous: Whether the stage is one of the token before.
    """

    stage: int
    arrivals: int
    previous: bool = False


@dataclass(frozen=True)
class Stage:
    """One step of every worker.

    Attributes:
        kind: One of `KINDS`.
        layer: Number of the layer; that of the head is the number of layers.
        rows: Rows of the result; of the attention 0, as its parts depend on the position.
        k: Length of the input vector; of the attention 0.
        first: Worker w has the tiles `first[w]` to `first[w + 1]`.
        wait: What must be done before any worker starts; None lets it start at once.
    """

    kind: str
    layer: int
    rows: int
    k: int
    first: tuple[int, ...]
    wait: Wait | None

    @property
    def name(self) -> str:
        """What to call it, such as `layer 3 up`."""
        return self.kind if self.kind == "head" else f"layer {self.layer} {self.kind}"


def partition(tiles: int, workers: int) -> tuple[int, ...]:
    """Split tiles into runs, one for each worker, that differ by one tile at most.

    Returns:
        `workers + 1` numbers: worker w has the tiles from the w-th to the next.

    Example:
        >>> partition(7, 3)
        (0, 3, 5, 7)
    """
    share, over = divmod(tiles, workers)
    return tuple(w * share + min(w, over) for w in range(workers + 1))


def chunk_for(spec: ModelSpec, workers: int, max_len: int) -> int:
    """Return the chunk of the attention that gives a long sequence's parts to all of a GPU.

    Between 32 and 256 positions: a guess, not yet measured on a GPU.
    """
    chunk = 32
    while chunk < CHUNK and 2 * chunk * workers <= max_len * spec.kv_heads:
        chunk *= 2
    return chunk


@dataclass(frozen=True)
class Plan:
    """All stages of a token, in order.

    Attributes:
        spec: The model.
        workers: How many share the work.
        stages: 5 L + 1 stages.
        chunk: Positions of one part of the attention.
    """

    spec: ModelSpec
    workers: int
    stages: tuple[Stage, ...] = field(repr=False)
    chunk: int = CHUNK

    @classmethod
    def make(cls, spec: ModelSpec, workers: int, *, chunk: int = CHUNK) -> "Plan":
        """Plan a model for a number of workers.

        Args:
            spec: The model.
            workers: Threads of a CPU or thread blocks of a GPU, at least 1.
            chunk: Positions of one part of the attention, a multiple of 16.

        Raises:
            UserError: a number is out of range.
        """
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise UserError(f"workers must be a whole number of at least 1, not {workers!r}")
        if chunk < TILE or chunk % TILE:
            raise UserError(f"chunk must be a multiple of {TILE}, not {chunk}")
        shapes = {  # rows, k
            "qkv": (spec.qkv_rows, spec.hidden),
            "attention": (0, 0),
            "output": (spec.hidden, spec.attended),
            "up": (2 * spec.intermediate, spec.hidden),
            "down": (spec.hidden, spec.intermediate),
            "head": (spec.vocab, spec.hidden),
        }
        order = [(kind, layer) for layer in range(spec.layers) for kind in KINDS[:-1]]
        order.append(("head", spec.layers))
        stages = []
        for number, (kind, layer) in enumerate(order):
            rows, k = shapes[kind]
            before = Wait(number - 1, workers) if number else Wait(len(order) - 1, workers, True)
            tiles = _gate_tiles(spec) if kind == "up" else -(-rows // TILE)
            stages.append(Stage(kind, layer, rows, k, partition(tiles, workers), before))
        return cls(spec, workers, tuple(stages), chunk)

    def without_wait(self, number: int) -> "Plan":
        """Return the plan without the wait of one stage, to show that it is needed."""
        changed = replace(self.stages[number], wait=None)
        return replace(self, stages=(*self.stages[:number], changed, *self.stages[number + 1 :]))

    def parts(self, layer: int, position: int) -> list[tuple[int, int, int, int]]:
        """Return the parts of a layer's attention as (kv head, chunk, start, stop).

        Part i is that of worker i mod `workers`. The chunk that holds `position` is the last one of
        its kv head; whoever has it writes the key and the value of `position`.
        """
        window = self.spec.windows[layer]
        start = max(0, position + 1 - window) if window else 0
        chunks = range(start // self.chunk, position // self.chunk + 1)
        return [
            (
                head,
                chunk - chunks[0],
                max(start, chunk * self.chunk),
                min((chunk + 1) * self.chunk, position + 1),
            )
            for chunk in chunks
            for head in range(self.spec.kv_heads)
        ]

    def accesses(
        self, stage: Stage, worker: int, position: int
    ) -> Iterator[tuple[str, int, int, bool]]:
        """Yield what a worker touches in a stage: (buffer, start, stop, whether it writes)."""
        spec = self.spec
        low, high = (min(t * TILE, stage.rows) for t in stage.first[worker : worker + 2])
        stream = "x" if stage.layer else "embedding"  # layer 0 starts from the embedding itself
        if stage.kind == "qkv":
            if not stage.layer:
                yield "choice", 0, self.workers, False  # which token it is
            yield stream, 0, spec.hidden, False
            yield "qkv", low, high, True
        elif stage.kind == "attention":
            yield from self._part_accesses(stage.layer, worker, position)
        elif stage.kind == "output":
            yield "partial", 0, len(self.parts(stage.layer, position)), False
            yield stream, low, high, False
            yield "x", low, high, True
        elif stage.kind == "up":
            yield "x", 0, spec.hidden, False
            yield "act", low // 2, high // 2, True
        elif stage.kind == "down":
            yield "act", 0, spec.intermediate, False
            yield "x", low, high, False
            yield "x", low, high, True
        else:
            yield "x", 0, spec.hidden, False
            yield "logits", low, high, True
            yield "choice", worker, worker + 1, True

    def _part_accesses(
        self, layer: int, worker: int, position: int
    ) -> Iterator[tuple[str, int, int, bool]]:
        spec = self.spec
        for number, (head, _, start, stop) in enumerate(self.parts(layer, position)):
            if number % self.workers != worker:
                continue
            group = spec.heads // spec.kv_heads
            yield "qkv", head * group * spec.head_dim, (head + 1) * group * spec.head_dim, False
            cache = f"cache {layer} head {head}"
            if stop == position + 1:
                for first in (spec.heads + head, spec.heads + spec.kv_heads + head):
                    yield "qkv", first * spec.head_dim, (first + 1) * spec.head_dim, False
                yield cache, position, position + 1, True
            yield cache, start, stop, False
            yield "partial", number, number + 1, True

    def validate(self, position: int = 0) -> None:
        """Check that every worker finds what it reads, at a position and the one after it.

        Two accesses of different workers to the same place, one of them a write, must be ordered by
        a wait; a wait must name a stage of the plan that comes before, and as many workers as will
        arrive there, since with fewer it is not known whose work is done.

        Raises:
            PlanError: the message names the stages, the workers and the buffer.
        """
        for number, stage in enumerate(self.stages):
            self._check_wait(number, stage)
        size = len(self.stages)
        for number in range(2 * size):
            # What every worker has finished when this stage begins: all up to `done`. A stage that
            # waits for nothing follows its own worker's stages only.
            done = self._done(number)
            for other in range(max(done + 1, 0), number + 1):
                self._check_pair(number, other, position)

    def _check_wait(self, number: int, stage: Stage) -> None:
        wait = stage.wait
        if wait is None:
            return
        if not 0 <= wait.stage < len(self.stages):
            raise PlanError(f"{stage.name} waits for stage {wait.stage}, which the plan lacks")
        if wait.stage >= number and not wait.previous:
            name = self.stages[wait.stage].name
            raise PlanError(f"{stage.name} waits for {name}, which comes after it: nobody arrives")
        if wait.arrivals > self.workers:
            raise PlanError(
                f"{stage.name} waits for {wait.arrivals} workers, but only {self.workers} arrive: "
                "it would wait for ever"
            )

    def _done(self, number: int) -> int:
        """Return the last stage, counted over two tokens, that all have finished by then; or -1."""
        size, done = len(self.stages), -1
        for before in range(number + 1):
            wait = self.stages[before % size].wait
            if wait is None or wait.arrivals < self.workers:
                continue
            target = wait.stage + (before // size - wait.previous) * size
            done = max(done, target)
        return done

    def _check_pair(self, number: int, other: int, position: int) -> None:
        size = len(self.stages)
        late, early = self.stages[number % size], self.stages[other % size]
        here, there = (self._touched(s % size, position + s // size) for s in (number, other))
        for buffer, mine in here.items():
            for worker, low, high, writes in mine:
                for neighbour, start, stop, wrote in there.get(buffer, ()):
                    apart = worker == neighbour or high <= start or stop <= low
                    if apart or not (writes or wrote):
                        continue
                    now, then = "writes" if writes else "reads", "write" if wrote else "read"
                    raise PlanError(
                        f"worker {worker} {now} {buffer} in {late.name} while worker {neighbour} "
                        f"may still {then} it in {early.name}: a wait is missing"
                    )

    def _touched(
        self, number: int, position: int
    ) -> Mapping[str, list[tuple[int, int, int, bool]]]:
        found: dict[str, list[tuple[int, int, int, bool]]] = {}
        for worker in range(self.workers):
            for buffer, low, high, writes in self.accesses(self.stages[number], worker, position):
                if low < high:
                    found.setdefault(buffer, []).append((worker, low, high, writes))
        return found

    @property
    def barriers(self) -> int:
        """Barriers of one token."""
        return sum(stage.wait is not None for stage in self.stages) if self.workers > 1 else 0

    def imbalance(self, kind: str) -> float:
        """Return the largest share of a stage's tiles over the mean share; 1 is even."""
        stage = next(s for s in self.stages if s.kind == kind)
        shares = [b - a for a, b in zip(stage.first, stage.first[1:], strict=False)]
        return max(shares) * self.workers / max(1, sum(shares))


def _gate_tiles(spec: ModelSpec) -> int:
    """Tiles of the up stage, each of 8 rows of the gate and the 8 rows of up that go with them."""
    return -(-spec.intermediate // (TILE // 2))
