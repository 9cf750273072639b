"""Checkpoints of transformers, and those of AWQ, GPTQ and compressed-tensors as they are quantised.

Layouts, after the libraries that write them; a word is an int32 of eight numbers of four bits, the
first in its lowest bits, and G is K / group:

    AWQ gemm   qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]; the eight neighbours of a word
               lie in the order 0 2 4 6 1 3 5 7
    AWQ gemv   qweight [N, K / 8], qzeros [N, >= G / 8], scales [N, >= G], padded at their ends
    GPTQ       qweight [K / 8, N], qzeros [G, N / 8], scales [G, N], g_idx [K]; in the format `gptq`
               (not in `gptq_v2`) 0x11111111 is subtracted from every word of qzeros
    compressed-tensors, pack-quantized
               weight_packed [N, K / 8], weight_scale [N, G], weight_zero_point [N / 8, G] where not
               symmetric, weight_shape; numbers are -8..7, packed with 8 added. With 8 bits four
               numbers of -128..127 a word, 128 added, and one scale a row
    compressed-tensors, int-quantized
               weight [N, K] int8, weight_scale [N, 1]

No number is quantised twice, and nothing but safetensors is read: pickled weights and code that a
checkpoint brings along are refused.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from flashformer.api import _room, _settings, _workers, compile, make_backend
from flashformer.config import ModelSpec
from flashformer.files import SETTINGS
from flashformer.model import FlashModel
from flashformer.quant import GROUPS, Matrix
from flashformer.weights import left_out, read_weights, rotary_tables
from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PretrainedConfig

METHODS = ("awq", "gptq", "compressed-tensors")
_INSTEAD = "; compile the unquantised model instead"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight neighbours lies


def load_checkpoint(
    name: "str | Path",
    *,
    dtype: Any = None,
    revision: str | None = None,
    weights: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    head: str | None = None,
    cache: str | None = None,
    max_len: int | None = None,
    threads: int | None = None,
    backend: str = "auto",
) -> FlashModel:
    """Compile the model of a folder or of the hub.

    A model that is quantised already has no transformers model beside it: prompts are read token by
    token. Rounding activations to int8, as `compile` says, stands in for the rounding that a
    compressed-tensors checkpoint may ask for.

    Args:
        name: A folder, or a hub name.
        dtype: Of an unquantised model, as transformers takes it. Defaults to the checkpoint's.
        revision: Of the hub.
        weights: As of `compile`. A quantised checkpoint brings its own.
        group_size: The same.
        symmetric: The same.
        head: As of `compile`. Defaults, where the layers are quantised and the head is not, to
            bf16 if it is bfloat16, else to fp32, so that it is as it was.
        cache: As of `compile`.
        max_len: As of `compile`.
        threads: As of `compile`.
        backend: As of `compile`.

    Raises:
        UserError: there is no such checkpoint, a file or tensor of it is missing or broken, it
            needs pickle or its own code, or its model, its quantisation or an argument is not
            supported; the message says which.
        CompilerError: as in `compile`.
    """
    _check_place(name)
    if (Path(name) / SETTINGS).is_file():
        raise UserError(f"{name} holds a compiled model; load it with flashformer.load")
    config = load_config(name, revision)
    spec = ModelSpec.from_config(config)
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        asked = {"group_size": group_size, "symmetric": symmetric}
        model = _unquantised(name, dtype, revision, on_gpu=backend == "cuda")
        return compile(
            model, weights=weights, head=head, cache=cache, max_len=max_len, threads=threads,
            backend=backend, **{key: value for key, value in asked.items() if value is not None},
        )  # fmt: skip
    scheme = _scheme(settings if isinstance(settings, Mapping) else settings.to_dict())
    for key, value, own in (
        ("weights", weights, scheme.format),
        ("group_size", group_size, scheme.group),
        ("symmetric", symmetric, None),
        ("dtype", None if dtype == "auto" else dtype, None),
    ):
        if value is not None and value != own:
            raise UserError(
                f"{key} is {value!r}, but {name} is quantised already; leave {key} out, or compile "
                "the unquantised model"
            )
    shards = Shards(_folder(name, revision))
    config: Any = copy.deepcopy(config)
    del config.quantization_config
    return _quantised(
        shards, config, spec, scheme, head=head, cache=cache, room=_room(spec, max_len),
        workers=_workers(threads), backend=backend,
    )  # fmt: skip


def load_config(name: "str | Path", revision: str | None = None) -> "PretrainedConfig":
    """Return the config of a folder or a hub name.

    Raises:
        UserError: there is none, or transformers does not know its kind without code of its own.
    """
    from transformers import AutoConfig

    _check_place(name)
    with _told(f"{name} is neither a folder nor a hub name with a config that transformers knows"):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def _quantised(
    shards: "Shards",
    config: "PretrainedConfig",
    spec: ModelSpec,
    scheme: "_Scheme",
    *,
    head: str | None,
    cache: str | None,
    room: int,
    workers: int,
    backend: str,
) -> FlashModel:
    import torch

    matrices = read_matrices(shards, scheme)
    source = "model.embed_tokens" if spec.tied else "lm_head"
    if source in matrices:
        if head not in (None, scheme.format):
            raise UserError(
                f"head is {head!r}, but the head is {scheme.format} already; leave it out"
            )
        head = scheme.format
    elif head is None:
        weight = shards.get(f"{source}.weight")
        head = "bf16" if weight is not None and weight.dtype == torch.bfloat16 else "fp32"
    chosen = _settings(scheme.format, scheme.group or GROUPS[-1], head, cache)

    def ready(name: str) -> Matrix | None:
        if name in matrices:
            return matrices.pop(name)
        if name == source:
            return None
        if f"{name}.weight" in shards:
            raise UserError(
                f"{name} is not quantised, but other layers are (modules_to_not_convert, ignore or "
                f"dynamic in the quantization_config): all must have one format{_INSTEAD}"
            )
        raise UserError(f"{shards.folder} has no tensor '{name}.{scheme.marker}'")

    read = read_weights(
        spec, shards, _tables(config, room), format=scheme.format, group=chosen["group"],
        head=head, ready=ready,
    )  # fmt: skip
    _check_leftovers(shards, spec, matrices)
    made = make_backend(
        spec, read, cache=chosen["cache"], workers=workers, backend=backend,
        device="cuda" if backend == "cuda" else "cpu",
    )  # fmt: skip
    return FlashModel(
        made,
        config=config,
        generation_config=_generation_config(shards.folder, config),
        weights=scheme.format,
        head=head,
        max_len=room,
    )


# --------------------------------------------------------------------------------------------------
# Files


class Shards(Mapping[str, "Tensor"]):
    """The tensors of a folder by name, each read when it is asked for.

    Attributes:
        folder: Where the files are.
        used: Names that were asked for.

    Raises:
        UserError: there are no safetensors, the index is broken, or a file of it is missing, is not
            of this folder, lacks a tensor or is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: set[str] = set()
        self._homes: dict[str, Any] = {}  # tensor: open file
        file = self._find()
        if file.suffix == ".json":
            self._read_index(file)
        else:
            opened = self._open(file)
            self._homes = dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> "Tensor":
        found = self._homes[name].get_tensor(name)
        self.used.add(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def take(self, name: str, dtypes: str, *shape: int | None) -> "Tensor":
        """Return a tensor of a known kind.

        Args:
            name: The tensor.
            dtypes: "int8", "int32", "integer" or "float".
            *shape: None where any size will do.

        Raises:
            UserError: it is missing, or of another kind.
        """
        import torch

        if name not in self:
            raise UserError(f"{self.folder} has no tensor {name!r}")
        found = self[name]
        known = {
            "int8": (torch.int8,),
            "int32": (torch.int32,),
            "integer": (torch.int32, torch.int64),
            "float": (torch.float16, torch.bfloat16, torch.float32),
        }[dtypes]
        if found.dtype not in known:
            raise UserError(f"{name} is {found.dtype}, expected {' or '.join(map(str, known))}")
        sizes = found.shape
        if len(sizes) != len(shape) or any(
            wanted not in (None, size) for size, wanted in zip(sizes, shape, strict=True)
        ):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise UserError(f"{name} has the shape {list(sizes)}, expected [{expected}]")
        return found

    def _find(self) -> Path:
        for usual in ("model.safetensors", "model.safetensors.index.json"):
            if (self.folder / usual).is_file():
                return self.folder / usual
        for pattern in ("*.safetensors.index.json", "*.safetensors"):
            found = sorted(self.folder.glob(pattern))
            if len(found) == 1:
                return found[0]
            if found:
                raise UserError(
                    f"{self.folder} has {len(found)} files {pattern} and no "
                    "model.safetensors.index.json that says how they belong together"
                )
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise UserError(
                f"{self.folder} has its weights only as pickles ({pickles[0]}), which can run any "
                "code when they are read; convert them to safetensors"
            )
        raise UserError(f"{self.folder} has no weights: no *.safetensors")

    def _read_index(self, file: Path) -> None:
        try:
            homes = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
            pairs = [(str(tensor), str(shard)) for tensor, shard in homes.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is broken: {error!r}") from error
        opened, held = {}, {}
        for shard in sorted({shard for _, shard in pairs}):
            if Path(shard).name != shard or "\\" in shard:
                raise UserError(f"{file} names {shard!r}, which is not a file of this folder")
            opened[shard] = self._open(self.folder / shard)
            held[shard] = set(opened[shard].keys())
        for tensor, shard in pairs:
            if tensor not in held[shard]:
                raise UserError(
                    f"{self.folder / shard} has no tensor {tensor!r}, but the index says so"
                )
            self._homes[tensor] = opened[shard]

    @staticmethod
    def _open(file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            raise UserError(f"{file} is missing; download the checkpoint anew")
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is broken or cut off: {error}") from error


def _check_place(name: "str | Path") -> None:
    """Refuse what is certainly neither a folder with a checkpoint nor a hub name."""
    if not isinstance(name, str | Path) or not str(name).strip():
        raise UserError(f"name a folder or a model of the hub, not {name!r}")
    place = Path(name)
    if place.is_file():
        raise UserError(f"{name} is a file; name the folder that holds the checkpoint")
    if not place.is_dir():
        return
    if not (place / "config.json").is_file():
        raise UserError(f"{name} holds no checkpoint: it has no config.json")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn what transformers and the hub raise into one line for the user."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{what}: {lines[0] if lines else error!r}") from error


def _folder(name: "str | Path", revision: str | None) -> Path:
    """Return the folder; of a hub name that with its downloaded files."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with _told(f"{name} cannot be downloaded"):
        found = snapshot_download(
            str(name), revision=revision, allow_patterns=["*.json", "*.safetensors"],
            ignore_patterns=["*/*"],
        )  # fmt: skip
    return Path(found)


def _unquantised(name: "str | Path", dtype: Any, revision: str | None, *, on_gpu: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if Path(name).is_dir():
        Shards(Path(name))  # its messages name the file
    with _told(f"{name} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if dtype is None else dtype,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        wrong = sorted(str(key) for key in info.get(problem, ()))
        if wrong:
            raise UserError(
                f"{name} does not fit its config: {problem.replace('_keys', '')} "
                f"{wrong[0]}{_more(wrong)}"
            )
    return model.eval().to("cuda" if on_gpu and torch.cuda.is_available() else "cpu")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _generation_config(folder: Path, config: "PretrainedConfig") -> "GenerationConfig":
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    with _told(f"{folder / 'generation_config.json'} is broken"):
        return GenerationConfig.from_pretrained(folder)


def _tables(config: "PretrainedConfig", positions: int) -> "tuple[Tensor, Tensor]":
    """Return `rotary_tables` of a model that exists by its config alone."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    rotary = type(empty.get_decoder().rotary_emb)(config)
    decoder = SimpleNamespace(rotary_emb=rotary)
    model: Any = SimpleNamespace(get_decoder=lambda: decoder, config=config)
    return rotary_tables(model, positions)


def _check_leftovers(shards: Shards, spec: ModelSpec, matrices: Mapping[str, Matrix]) -> None:
    """Refuse a checkpoint of which something would be left out."""
    left = [
        name
        for name in left_out(spec, shards, shards.used)
        # some quantisers give every layer a bias
        if not (name.endswith(".bias") and not shards[name].any())
    ]
    left = sorted(matrices) + left
    if left:
        raise UserError(
            f"{shards.folder} has {left[0]}{_more(left)}, which a model of this config does not use"
        )


# --------------------------------------------------------------------------------------------------
# Quantised matrices

Parts = tuple[
    "Tensor", "Tensor", "Tensor | None"
]  # values [N, K], scale [N, G] or [N], zero [N, G]


@dataclass(frozen=True)
class _Scheme:
    """How the matrices of a checkpoint are quantised.

    Attributes:
        format: As of `Matrix`.
        group: As of `Matrix`.
        marker: The last part of the name of a tensor that every quantised matrix has.
        read: Returns the parts of a matrix by its name.
    """

    format: str
    group: int
    marker: str
    read: Callable[[Shards, str, int], Parts]


def read_matrices(shards: Shards, scheme: _Scheme) -> dict[str, Matrix]:
    """Return every quantised matrix by the name of its layer.

    Zero points that are 8 throughout the model are left out. Scales become float16 for int4 and
    float32 for int8; a warning tells if that changes one.
    """
    import torch

    ending = f".{scheme.marker}"
    names = [name.removesuffix(ending) for name in shards if name.endswith(ending)]
    found, rounded = {}, []
    for name in names:
        values, scale, zero = scheme.read(shards, name, scheme.group)
        kept = scale.to(torch.float16 if scheme.format == "int4" else torch.float32).contiguous()
        if not torch.isfinite(kept).all():
            raise UserError(
                f"a scale of {name} is NaN, infinite or over 65504; mend the checkpoint"
            )
        if (kept.float() - scale.float()).abs().max() > 2**-25:  # as near as float16 comes to 0
            rounded.append(name)
        zero = None if zero is None else zero.contiguous()
        found[name] = Matrix(scheme.format, values.contiguous(), kept, zero, scheme.group)
    if rounded:
        warnings.warn(
            f"scales of {len(rounded)} matrices, such as {rounded[0]}, are rounded to float16",
            stacklevel=5,
        )
    if all(m.zero is None or bool((m.zero == 8).all()) for m in found.values()):
        return {name: replace(matrix, zero=None) for name, matrix in found.items()}
    return found


def _scheme(settings: Mapping[str, Any]) -> _Scheme:
    method = settings.get("quant_method") or settings.get("method")
    readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}
    method = str(getattr(method, "value", method))
    if method not in readers:
        raise UserError(
            f"quant_method is {method!r}, must be one of {', '.join(METHODS)}"
            f"{_INSTEAD}.{suggest(method, METHODS)}"
        )
    return readers[method](settings)


def _must(method: str, key: str, value: object, *accepted: object) -> None:
    if value not in accepted:
        known = " or ".join(map(repr, accepted))
        raise UserError(f"{method}: {key} is {value!r}, must be {known}{_INSTEAD}")


def _awq(settings: Mapping[str, Any]) -> _Scheme:
    group = settings.get("group_size", settings.get("q_group_size", 128))
    _must("awq", "bits", settings.get("bits", settings.get("w_bit", 4)), 4)
    _must("awq", "group_size", group, *GROUPS)
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if settings.get("backend") == "llm-awq":
        version = "llm-awq"
    _must("awq", "version", version, "gemm", "gemv")
    return _Scheme("int4", group, "qweight", _read_gemm if version == "gemm" else _read_gemv)


def _gptq(settings: Mapping[str, Any]) -> _Scheme:
    group = settings.get("group_size", 128)
    _must("gptq", "bits", settings.get("bits", 4), 4)
    _must("gptq", "group_size", group, *GROUPS)
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    _must("gptq", "checkpoint_format", str(layout).lower(), "gptq", "gptq_v2")
    for key in ("is_marlin_format", "rotation"):
        _must("gptq", key, settings.get(key) or None, None)
    _must("gptq", "pack_dtype", settings.get("pack_dtype", "int32"), "int32")
    first = 1 if str(layout).lower() == "gptq" else 0

    def read(shards: Shards, name: str, group: int) -> Parts:
        return _read_gptq(shards, name, group, less=first)

    return _Scheme("int4", group, "qweight", read)


def _compressed(settings: Mapping[str, Any]) -> _Scheme:
    method = "compressed-tensors"
    for key in ("kv_cache_scheme", "transform_config"):
        _must(method, key, settings.get(key) or None, None)
    sparsity = settings.get("sparsity_config") or {}
    _must(method, "sparsity_config.format", sparsity.get("format", "dense"), "dense")
    groups = list((settings.get("config_groups") or {}).values())
    found = []
    for part in groups:
        if not isinstance(part, Mapping):
            raise UserError(
                f"{method}: config_groups has {part!r}, must describe weights{_INSTEAD}"
            )
        layout = part.get("format") or settings.get("format")
        _must(method, "format", layout, "pack-quantized", "int-quantized")
        weights = part.get("weights") or {}
        _must(method, "weights.type", weights.get("type", "int"), "int")
        bits = weights.get("num_bits", 8)
        _must(method, "weights.num_bits", bits, *((4, 8) if layout == "pack-quantized" else (8,)))
        strategy, group = weights.get("strategy"), weights.get("group_size")
        if strategy is None:
            strategy = {None: "tensor", -1: "channel"}.get(group, "group")
        _must(method, "weights.strategy", strategy, "group" if bits == 4 else "channel")
        if bits == 4:
            _must(method, "weights.group_size", group, *GROUPS)
        else:
            _must(method, "weights.symmetric", weights.get("symmetric", True), True)
        given = part.get("input_activations") or {}
        if given:
            _must(method, "input_activations.type", given.get("type", "int"), "int")
            _must(method, "input_activations.num_bits", given.get("num_bits", 8), 8)
            _must(method, "input_activations.dynamic", given.get("dynamic", False), True)
        _must(method, "output_activations", part.get("output_activations") or None, None)
        found.append((layout, bits, group if bits == 4 else 0))
    if len(set(found)) != 1:
        kinds = "; ".join(f"{bits} bits, group {group}" for _, bits, group in sorted(set(found)))
        raise UserError(
            f"{method}: config_groups has {kinds or 'nothing'}, must have one kind{_INSTEAD}"
        )
    layout, bits, group = found[0]
    if layout == "int-quantized":
        return _Scheme("int8", 0, "weight_scale", _read_int8)
    read = _read_packed4 if bits == 4 else _read_packed8
    return _Scheme("int4" if bits == 4 else "int8", group, "weight_packed", read)


def nibbles(words: "Tensor") -> "Tensor":
    """Unpack numbers of four bits: `[..., n]` int32 to `[..., 8 n]` uint8, lowest bits first."""
    import torch

    low, high = (_octets(words) & 15, _octets(words) >> 4)
    return torch.stack([low, high], -1).flatten(-2)


def _octets(words: "Tensor") -> "Tensor":
    """Unpack bytes: `[..., n]` int32 to `[..., 4 n]` uint8, lowest bits first."""
    import torch

    shifts = torch.arange(0, 32, 8, dtype=torch.int32)
    return (words[..., None] >> shifts & 255).to(torch.uint8).flatten(-2)


def _neighbours(words: "Tensor") -> "Tensor":
    """Unpack `[..., n]` words of AWQ's gemm to `[..., 8 n]`."""
    return nibbles(words).unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2)


def _groups(name: str, k: int, group: int) -> int:
    if k % group:
        raise UserError(f"{name} has K = {k}, which group_size {group} does not divide{_INSTEAD}")
    return k // group


def _read_gemm(shards: Shards, name: str, group: int) -> Parts:
    words = shards.take(f"{name}.qweight", "int32", None, None)
    k, n = words.shape
    count = _groups(name, k, group)
    zeros = shards.take(f"{name}.qzeros", "int32", count, n)
    scales = shards.take(f"{name}.scales", "float", count, 8 * n)
    return _neighbours(words).T, scales.T, _neighbours(zeros).T


def _read_gemv(shards: Shards, name: str, group: int) -> Parts:
    words = shards.take(f"{name}.qweight", "int32", None, None)
    rows, k = len(words), 8 * words.shape[1]
    count = _groups(name, k, group)
    # Words of zero points, padded as AutoAWQ pads them, and as many scales.
    width = -(-count // 8)
    width += -width % (128 // group)
    zeros = nibbles(shards.take(f"{name}.qzeros", "int32", rows, width))
    scales = shards.take(f"{name}.scales", "float", rows, 8 * width)
    return nibbles(words), scales[:, :count], zeros[:, :count]


def _read_gptq(shards: Shards, name: str, group: int, *, less: int) -> Parts:
    words = shards.take(f"{name}.qweight", "int32", None, None)
    k, rows = 8 * len(words), words.shape[1]
    count = _groups(name, k, group)
    _check_order(shards, f"{name}.g_idx", k, group, "desc_act")
    zeros = shards.take(f"{name}.qzeros", "int32", count, -(-rows // 8))
    scales = shards.take(f"{name}.scales", "float", count, rows)
    zeros = nibbles(zeros + less * 0x11111111)  # with carries, as they were subtracted
    return nibbles(words.T), scales.T, zeros[:, :rows].T


def _check_order(shards: Shards, name: str, k: int, group: int, key: str) -> None:
    """Refuse columns that were quantised in another order than they stand in."""
    import torch

    if name not in shards:
        return
    order = shards.take(name, "integer", k)
    if not torch.equal(order.long(), torch.arange(k) // group):
        raise UserError(
            f"{name} does not follow the columns ({key}, act order), as the groups of streamed "
            f"weights must; quantise without {key}, or compile the unquantised model"
        )


def _shape(shards: Shards, name: str) -> tuple[int, int]:
    rows, k = shards.take(f"{name}.weight_shape", "integer", 2).tolist()
    return rows, k


def _read_packed4(shards: Shards, name: str, group: int) -> Parts:
    import torch

    rows, k = _shape(shards, name)
    count = _groups(name, k, group)
    _check_order(shards, f"{name}.weight_g_idx", k, group, "actorder")
    words = shards.take(f"{name}.weight_packed", "int32", rows, k // 8)
    scale = shards.take(f"{name}.weight_scale", "float", rows, count)
    if f"{name}.weight_zero_point" in shards:
        packed = shards.take(f"{name}.weight_zero_point", "int32", -(-rows // 8), count)
        zero = nibbles(packed.T)[:, :rows].T
    else:
        zero = torch.full((rows, count), 8, dtype=torch.uint8)
    return nibbles(words), scale, zero


def _read_packed8(shards: Shards, name: str, group: int) -> Parts:
    import torch

    rows, k = _shape(shards, name)
    words = shards.take(f"{name}.weight_packed", "int32", rows, -(-k // 4))
    scale = shards.take(f"{name}.weight_scale", "float", rows, 1)
    return (_octets(words)[:, :k] ^ 128).view(torch.int8), scale[:, 0], None


def _read_int8(shards: Shards, name: str, group: int) -> Parts:
    weight = shards.take(f"{name}.weight", "int8", None, None)
    scale = shards.take(f"{name}.weight_scale", "float", len(weight), 1)
    return weight, scale[:, 0], None
