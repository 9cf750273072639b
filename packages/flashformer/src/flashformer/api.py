"""From a transformers model, a folder or a hub name to a `FlashModel`."""

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashformer.backends.base import Backend
from flashformer.config import ModelSpec
from flashformer.jit import CompilerError
from flashformer.model import FlashModel, warn_training
from flashformer.plan import Plan
from flashformer.quant import check_format, default_head
from flashformer.weights import (
    ModelWeights,
    Seen,
    check_model,
    left_out,
    read_weights,
    rotary_tables,
)
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_LEN = 4096
BACKENDS = ("auto", "cpu", "torch", "cuda")


def compile(
    model: "PreTrainedModel",
    *,
    weights: str | None = None,
    group_size: int = 128,
    symmetric: bool = True,
    head: str | None = None,
    cache: str | None = None,
    max_len: int | None = None,
    threads: int | None = None,
    backend: str = "auto",
) -> FlashModel:
    """Compile a transformers model for decoding one sequence.

    The weights are copied; the model is kept to read long prompts.

    Args:
        model: A causal LM of a supported kind (`supported(model.config)`), in eval mode.
        weights: "fp32", "bf16", "int8" (a scale a row) or "int4" (a scale a group). Defaults to
            fp32 for a float32 model, else bf16. With int8 and int4 activations are rounded to int8.
        group_size: Of int4: 32, 64 or 128.
        symmetric: Of int4: no zero points.
        head: Format of the head. Defaults to int8 for int4, else that of the weights.
        cache: Format of keys and values, "fp32" or "bf16". Defaults to fp32 for fp32 weights.
        max_len: The longest sequence. Defaults to what the model was made for, at most 4096.
        threads: Workers on the CPU. Defaults to `torch.get_num_threads()`.
        backend: "cpu", "cuda", "torch" (slow, without a compiler), or "auto": cuda for a model on a
            GPU, else cpu, else with a warning torch.

    Raises:
        UserError: the model or an argument is not supported; the message says what to do.
        CompilerError: with backend="cpu", if the C++ compiler is missing or fails.
    """
    check_model(model)
    spec = ModelSpec.from_config(model.config)
    if not isinstance(symmetric, bool):
        raise UserError(f"symmetric must be True or False, not {symmetric!r}")
    warn_training(model)
    import torch

    weights = weights or ("fp32" if model.dtype == torch.float32 else "bf16")
    settings = _settings(weights, group_size, head, cache)
    room = _room(spec, max_len)
    build = partial(_build, model, spec, settings, symmetric, room, _workers(threads), backend)
    return FlashModel(
        build(),
        config=model.config,
        generation_config=model.generation_config,
        weights=settings["weights"],
        head=settings["head"],
        max_len=room,
        source=model,
        rebuild=build,
    )


def _build(
    model: "PreTrainedModel",
    spec: ModelSpec,
    settings: dict[str, Any],
    symmetric: bool,
    max_len: int,
    workers: int,
    backend: str,
) -> Backend:
    state = Seen(model.state_dict())
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if spec.tied and head.weight is not embedding.weight:
        raise UserError(
            "tie_word_embeddings is true, but the head's weights are not the embedding's; set "
            "model.config.tie_word_embeddings = False, or call model.tie_weights()"
        )
    read = read_weights(
        spec,
        state,
        rotary_tables(model, max_len),
        format=settings["weights"],
        group=settings["group"],
        head=settings["head"],
        symmetric=symmetric,
    )
    if left := left_out(spec, state, state.used):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(
            f"the model has {left[0]}{more}, of which its config says nothing: it would be left out"
        )
    return make_backend(
        spec, read, cache=settings["cache"], workers=workers, backend=backend,
        device=model.device,
    )  # fmt: skip


def make_backend(
    spec: ModelSpec,
    weights: ModelWeights,
    *,
    cache: str,
    workers: int,
    backend: str = "auto",
    device: Any = "cpu",
) -> Backend:
    """Return a back-end with packed weights; see `compile`."""
    import torch

    if backend not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and backend in ("cpu", "torch"):
        raise UserError(
            f"the model lies on a GPU, but backend is {backend!r}; move it first: model.cpu()"
        )
    if backend == "cuda" or (backend == "auto" and on_gpu):
        from flashformer.backends.cuda import make

        return make(spec, weights, cache_format=cache, device=device)
    plan = Plan.make(spec, workers)
    if backend != "torch":
        from flashformer.backends.cpu import CPUBackend

        try:
            return CPUBackend(plan, weights, cache_format=cache)
        except CompilerError as error:
            if backend == "cpu":
                raise
            first = str(error).splitlines()[0]
            warnings.warn(
                f"decoding by plain torch, many times slower: {first}", RuntimeWarning, stacklevel=4
            )
    from flashformer.backends.plain import TorchBackend

    return TorchBackend(plan, weights, cache_format=cache)


def from_pretrained(name: "str | Path", **options: Any) -> FlashModel:
    """Compile a model from a folder or from the hub.

    A folder of AWQ, GPTQ or compressed-tensors (int4, symmetric or not) is read as it is
    quantised; see `flashformer.checkpoints`.

    Args:
        name: A folder with a transformers checkpoint, or a hub name.
        **options: As of `compile`; `dtype` and `revision` go to transformers.

    Raises:
        UserError: as `compile`, or the model cannot be loaded.
    """
    from flashformer.checkpoints import load_checkpoint

    return load_checkpoint(name, **options)


def load(folder: "str | Path", *, threads: int | None = None, backend: str = "auto") -> FlashModel:
    """Load what `FlashModel.save` wrote.

    It has no transformers model: prompts are read token by token.

    Raises:
        UserError: the folder holds no such model.
        CheckpointError: a file of it is missing or broken.
    """
    from flashformer.files import load as load_files

    return load_files(Path(folder), workers=_workers(threads), backend=backend)


def _settings(weights: str, group: int, head: str | None, cache: str | None) -> dict[str, Any]:
    check_format(weights, group)
    head = head or default_head(weights)
    check_format(head, group, "head")
    cache = cache or ("fp32" if weights == "fp32" else "bf16")
    if cache not in ("fp32", "bf16"):
        raise UserError(f"cache must be 'fp32' or 'bf16', not {cache!r}")
    return {"weights": weights, "group": group, "head": head, "cache": cache}


def _room(spec: ModelSpec, max_len: int | None) -> int:
    if max_len is None:
        return min(spec.max_positions, DEFAULT_LEN)
    if isinstance(max_len, bool) or not isinstance(max_len, int) or max_len < 1:
        raise UserError(f"max_len must be a whole number of at least 1, not {max_len!r}")
    if max_len > spec.max_positions and spec.longrope:
        raise UserError(
            f"max_len is {max_len}, but behind {spec.max_positions} positions longrope changes the "
            "angles of the whole text, which a cache cannot follow; use the transformers model for "
            "longer ones"
        )
    if max_len > spec.max_positions:
        warnings.warn(
            f"max_len {max_len} is longer than the {spec.max_positions} positions the model was "
            "made for",
            stacklevel=3,
        )
    return max_len


def _workers(threads: int | None) -> int:
    import torch

    if threads is None:
        return torch.get_num_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise UserError(f"threads must be a whole number from 1 to 1024, not {threads!r}")
    return threads
