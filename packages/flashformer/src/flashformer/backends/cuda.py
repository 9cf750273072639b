"""The CUDA back-end: the same plan and the same tiles as on the CPU, a worker a thread block.

`mode="megakernel"` runs a whole call, of any number of tokens, in one cooperative launch
(csrc/cuda/decode.cuh); `mode="graph"` has one kernel a stage in a CUDA graph (csrc/cuda/graph.cuh).
Keys and values have the layout of the CPU (`KVCache`), only on the GPU.

The kernels compile, and run in the tests thread by thread on the CPU; they have not yet been run or
measured on a GPU.
"""

import copy
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flashformer.backends.cpu import GREEDY, GUMBEL, NONE, small
from flashformer.backends.cuda_build import (
    MODES,
    PRODUCTS,
    Chip,
    Compiled,
    Form,
    State,
    arch_of,
    compile_for,
)
from flashformer.backends.cuda_run import (
    MOST_ENDS,
    DeviceModel,
    GraphRunner,
    Megakernel,
    Runner,
)
from flashformer.config import ModelSpec
from flashformer.cuda_driver import TOO_LARGE, CudaError
from flashformer.pack import Packed
from flashformer.plan import Plan, chunk_for
from flashformer.quant import default_head
from flashformer.weights import ModelWeights
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class CUDABackend:
    """A plan with its weights on a GPU, ready to decode.

    Args:
        plan: The plan; its workers are at most the GPU's multiprocessors.
        weights: Of the model; the matrices are copied, the vectors kept.
        cache_format: Of keys and values, "fp32" or "bf16".
        device: A CUDA device.
        mode: "megakernel", or "graph". Where the GPU refuses the first (it is shared, or a debugger
            is attached), the second is taken with a warning.
        runner: Makes what launches the kernels; for tests.

    Raises:
        UserError: the GPU is too old, or the model does not fit.
        CompilerError: there is neither NVRTC nor nvcc, or it failed.
        CudaError: the driver failed.
    """

    def __init__(
        self,
        plan: Plan,
        weights: ModelWeights,
        *,
        cache_format: str,
        device: Any = "cuda",
        mode: str = "megakernel",
        runner: "Callable[[CUDABackend], Any] | None" = None,
    ) -> None:
        if mode not in MODES:
            raise UserError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        self.plan, self.mode, self.cache_format = plan, mode, cache_format
        self.model = DeviceModel(plan, weights, cache_format=cache_format, device=device)
        self.device = self.model.device
        self.group = self.model.forms["qkv"].group
        self.weights = small(weights)
        self._busy = threading.Lock()
        self._runner = (runner or CUDABackend._make_runner)(self)

    def in_mode(self, mode: str) -> "CUDABackend":
        """Return a back-end of the same weights, not copied, in another mode."""
        other = copy.copy(self)
        other.mode = mode
        other._runner = other._make_runner()
        return other

    @property
    def name(self) -> str:
        """What it is and how it runs."""
        return f"cuda ({self.mode})"

    @property
    def packed(self) -> dict[str, Packed]:
        """Copies of the matrices on the CPU."""
        return self.model.packed()

    @property
    def streamed(self) -> int:
        """Bytes of weights that a token reads."""
        return self.model.weights.numel()

    def _make_runner(self) -> Runner:
        import torch

        if self.device.type != "cuda" or not torch.cuda.is_available():
            raise UserError(f"the CUDA back-end needs a CUDA GPU, not {self.device}")
        torch.cuda.init()
        found = torch.cuda.get_device_properties(self.device)
        if self.plan.workers > found.multi_processor_count:
            raise UserError(
                f"the plan has {self.plan.workers} workers, but {found.name} has "
                f"{found.multi_processor_count} multiprocessors"
            )
        chip = Chip.of(arch_of(found.major, found.minor))
        with self._here():
            torch.zeros(1, device=self.device)  # makes the context current
            if self.mode == "megakernel":
                runner = Megakernel(self.model, self.compile(chip, "megakernel"))
                if runner.fits():
                    return runner
                self._fall_back("a block does not fit a multiprocessor")
            return GraphRunner(self.model, self.compile(chip, "graph"))

    def _fall_back(self, why: str) -> None:
        warnings.warn(
            f"one kernel for the whole model is not possible here ({why}); using a CUDA graph",
            RuntimeWarning,
            stacklevel=4,
        )
        self.mode = "graph"

    def compile(self, chip: Chip, mode: str, **options: Any) -> Compiled:
        """Compile the kernels of a mode for a kind of GPU; see `compile_kernels`."""
        model = self.model
        return compile_for(
            self.plan.spec, model.forms, chip, mode, workers=self.plan.workers,
            chunk=self.plan.chunk, embedding=model.embedding_format, cache=self.cache_format,
            **options,
        )  # fmt: skip

    @staticmethod
    def compile_only(
        spec: ModelSpec,
        arch: str,
        *,
        weights: str = "bf16",
        head: str | None = None,
        group: int = 128,
        zeros: bool = False,
        cache: str = "bf16",
        mode: str = "megakernel",
        workers: int = 132,
        max_len: int = 4096,
        ptx: bool = False,
        compiler: str = "auto",
    ) -> Compiled:
        """Compile for a model and a kind of GPU, with neither of them here.

        Args:
            spec: The model.
            arch: Such as `sm_90a`.
            weights: Format of the layers' matrices.
            head: Of the head. Defaults to int8 for int4, else that of the weights.
            group: Of int4.
            zeros: Whether int4 has zero points.
            cache: Format of keys and values.
            mode: One of `MODES`.
            workers: Multiprocessors.
            max_len: The longest sequence.
            ptx: Whether the PTX is wanted too.
            compiler: "nvrtc", "nvcc" or "auto".

        Returns:
            The cubin with registers, spills and shared memory.

        Raises:
            UserError: the arguments do not fit.
            CompilerError: there is no compiler, or it failed.
        """

        def form(name: str) -> Form:
            int4 = name == "int4"
            return Form(name, group if int4 else 0, zeros and int4)

        forms = {name: form(weights) for name in PRODUCTS[:-1]}
        return compile_for(
            spec, {**forms, "head": form(head or default_head(weights))}, Chip.of(arch), mode,
            workers=workers, chunk=chunk_for(spec, workers, max_len),
            embedding="fp32" if weights == "fp32" else "bf16", cache=cache, ptx=ptx,
            compiler=compiler,
        )  # fmt: skip

    def decode(
        self,
        keys: "Sequence[Tensor]",
        values: "Sequence[Tensor]",
        given: "Tensor",
        *,
        position: int,
        new: int,
        logits: "Tensor",
        threads: int = 0,
        temperature: float | None = None,
        seed: int = 0,
        ends: Sequence[int] = (),
        cancel: "Tensor | None" = None,
    ) -> "Tensor":
        """Read the tokens given and choose new ones, in one launch.

        Args:
            keys: For each layer `[Hkv, max_len / 16, D padded, 16]`, on the device; see `KVCache`.
            values: For each layer `[Hkv, max_len, D padded]`, on the device.
            given: `[n]` int64, n >= 1, on the device, already checked.
            position: Of the first of them.
            new: How many tokens to choose, at least 0.
            logits: On the device, `[V]` float32 for those of the last step, or `[n + new - 1, V]`
                for all.
            threads: Of no meaning here.
            temperature: None is greedy; else the token is drawn at this temperature.
            seed: Of the draws; the same as on the CPU.
            ends: Tokens after which to stop, at most 1024.
            cancel: `[1]` int32 on the CPU; stops after the token during which it becomes 1.

        Returns:
            The tokens chosen, `[<= new]` int64, on the device.

        Raises:
            UserError: a logit is NaN, or there are too many ends.
            CudaError: the driver failed, or a worker did not come to a wait.
        """
        import torch

        if len(ends) > MOST_ENDS:
            raise UserError(f"there are {len(ends)} ends, at most {MOST_ENDS} are possible")
        wrong = next((t for t in (*keys, *values, given, logits) if t.device != self.device), None)
        if wrong is not None:
            raise UserError(
                f"cache, tokens and logits must be on {self.device}, not {wrong.device}"
            )
        steps = len(given) + max(new - 1, 0)
        chosen = torch.zeros(max(new, 1), dtype=torch.int64, device=self.device)
        every = logits.ndim == 2
        with self._busy, self._here():
            flag = self._flag
            flag.zero_()
            self.model.ask(
                keys,
                values,
                list(ends),
                position=position,
                steps=steps,
                given=given.data_ptr(),
                given_count=len(given),
                chosen=chosen.data_ptr(),
                choice=NONE if not new else GREEDY if temperature is None else GUMBEL,
                all_logits=every,
                logits=logits.data_ptr(),
                temperature=temperature or 1.0,
                seed=seed % 2**64,
                cancel=flag.data_ptr(),
            )
            place = State.token.offset
            self.model.state[place : place + 8] = given[:1].view(torch.uint8)
            self._run([every or step + 1 >= len(given) for step in range(steps)])
            if cancel is not None:
                self._watch(cancel, flag)
            state = self.model.answer()
        if state.hung:
            self._report(state)
        if state.not_a_number:
            raise UserError(
                "a logit is NaN: the model's numbers overflow, or its weights changed to NaN after "
                "they were packed"
            )
        return chosen[: state.chosen_count]

    def _here(self) -> AbstractContextManager[object]:
        """Make the device the current one of torch and of the driver."""
        import torch

        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @cached_property
    def _flag(self) -> "Tensor":
        """Where the kernel sees that it is to stop: memory of the host that it can read."""
        import torch

        flag = torch.zeros(1, dtype=torch.int32)
        return flag.pin_memory() if self.device.type == "cuda" else flag

    def _run(self, heads: list[bool]) -> None:
        try:
            self._runner.run(heads)
        except CudaError as error:
            if error.code != TOO_LARGE or self.mode == "graph":
                raise
            self._fall_back("the GPU has no room for all of its blocks at once")
            self._runner = self._make_runner()
            self._runner.run(heads)

    def _watch(self, cancel: "Tensor", flag: "Tensor") -> None:
        """Pass the caller's wish to stop on to the kernel, until it is done."""
        import torch

        if self.device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        while not done.query():
            if int(cancel[0]):
                flag.fill_(1)
            time.sleep(1e-4)

    def _report(self, state: State) -> None:
        stage = self.plan.stages[min(state.hung_stage, len(self.plan.stages) - 1)]
        raise CudaError(
            f"after {stage.name} worker {state.hung_worker} waited "
            f"{self.model.patience} s for the others: {state.hung_arrived} arrivals of "
            f"{state.hung_wanted} by {self.plan.workers} workers. "
            "Is the GPU shared with other programs? mode='graph' does without such waits"
        )


def make(
    spec: ModelSpec,
    weights: ModelWeights,
    *,
    cache_format: str,
    device: Any = "cuda",
    mode: str = "megakernel",
) -> CUDABackend:
    """Plan a model for all multiprocessors of a GPU and put it there.

    Raises:
        UserError: there is no such GPU; and as `CUDABackend`.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UserError(
            "the CUDA back-end needs a CUDA GPU and a torch built for it; here is none. "
            "Use backend='cpu'"
        )
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    workers = torch.cuda.get_device_properties(device).multi_processor_count
    plan = Plan.make(spec, workers, chunk=chunk_for(spec, workers, len(weights.cos)))
    return CUDABackend(plan, weights, cache_format=cache_format, device=device, mode=mode)
