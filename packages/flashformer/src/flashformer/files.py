"""Compiled models on disk: a folder of packed weights, settings and transformers' configs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashformer._version import __version__
from flashformer.config import ModelSpec
from flashformer.pack import Packed
from flashformer.weights import LayerWeights, ModelWeights
from tenfold_common.atomic import atomic_dir, verify
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from flashformer.model import FlashModel

SETTINGS, TENSORS = "flashformer.json", "packed.safetensors"
LAYOUT = 1  # grows when the layout of tiles changes
_VECTORS = (
    "norm1", "norm2", "query_norm", "key_norm", "qkv_bias", "output_bias", "up_bias", "down_bias",
)  # fmt: skip


def save(
    model: "FlashModel", folder: Path, *, overwrite: bool = False, tokenizer: Any = None
) -> None:
    """Write a compiled model; the folder appears whole or not at all.

    Raises:
        UserError: the folder is there and is not one written here, or `overwrite` is not set.
    """
    from safetensors.torch import save_file

    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]) and not overwrite:
        raise UserError(f"{folder} is not empty; name another folder, or set overwrite")
    weights = model.backend.weights
    tensors: dict[str, Tensor] = {}
    matrices: dict[str, dict[str, Any]] = {}
    for name, packed in model.backend.packed.items():
        tensors[f"{name}.tiles"] = packed.tiles.contiguous()
        matrices[name] = {
            "format": packed.format,
            "group": packed.group,
            "zeros": packed.zeros,
            "shape": list(packed.shape),
        }
    for number, layer in enumerate(weights.layers):
        for name in _VECTORS:
            if (vector := getattr(layer, name)) is not None:
                tensors[f"layer {number} {name}"] = vector.contiguous()
    for name in ("norm", "embedding", "cos", "sin"):
        tensors[name] = getattr(weights, name).contiguous()
    settings = {
        "layout": LAYOUT,
        "version": __version__,
        "spec": model.spec.to_dict(),
        "weights": model.weights,
        "head": model.head,
        "cache": model.backend.cache_format,
        "max_len": model.max_len,
        "matrices": matrices,
    }
    with atomic_dir(folder) as target:
        save_file(tensors, target / TENSORS)
        text = json.dumps(settings, indent=1) + "\n"
        (target / SETTINGS).write_text(text, encoding="utf-8")
        model.config.save_pretrained(target)
        model.generation_config.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what `save` wrote of a model besides its tensors.

    Raises:
        UserError: the folder is not there, holds something else, was written in another layout or
            lacks a setting.
    """
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"{folder} holds no compiled model (it has no {SETTINGS}); FlashModel.save and "
            "`flashformer quantize` write them"
        )
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        layout = settings["layout"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SETTINGS} is broken: {error}") from error
    if layout != LAYOUT:
        raise UserError(
            f"{folder} has layout {layout}, this version reads {LAYOUT}; compile the model anew"
        )
    for name in ("spec", "weights", "head", "cache", "max_len", "matrices"):
        if name not in settings:
            raise UserError(f"{folder} is broken: it lacks {name!r}")
    return settings


def load(folder: Path, *, workers: int, backend: str) -> "FlashModel":
    """Read what `save` wrote.

    Raises:
        UserError: the folder is not there, holds something else or was written in another layout.
        CheckpointError: a file of it is missing or broken.
    """
    from transformers import AutoConfig, GenerationConfig

    from flashformer.api import make_backend
    from flashformer.model import FlashModel

    if (folder / SETTINGS).is_file():
        verify(folder)
    settings = read_settings(folder)
    try:
        spec = ModelSpec.from_dict(settings["spec"])
        weights = _read(folder, spec, settings["matrices"])
        named = {name: settings[name] for name in ("weights", "head", "max_len")}
        cache = settings["cache"]
    except KeyError as error:
        raise UserError(f"{folder} is broken: it lacks {error.args[0]!r}") from error
    device = "cuda" if backend == "cuda" else "cpu"
    return FlashModel(
        make_backend(spec, weights, cache=cache, workers=workers, backend=backend, device=device),
        config=AutoConfig.from_pretrained(folder),
        generation_config=GenerationConfig.from_pretrained(folder),
        **named,
    )


def _read(folder: Path, spec: ModelSpec, matrices: dict[str, dict[str, Any]]) -> ModelWeights:
    from safetensors.torch import load_file

    tensors = load_file(folder / TENSORS)

    def packed(name: str) -> Packed:
        about = matrices[name]
        return Packed(
            about["format"], about["group"], about["zeros"], tuple(about["shape"]),
            tensors[f"{name}.tiles"],
        )  # fmt: skip

    layers = []
    for number in range(spec.layers):
        parts: dict[str, Any] = {
            kind: packed(f"layer {number} {kind}") for kind in ("qkv", "output", "up", "down")
        }
        vectors: dict[str, Any] = {name: tensors.get(f"layer {number} {name}") for name in _VECTORS}
        layers.append(LayerWeights(**parts, **vectors))
    return ModelWeights(
        layers=tuple(layers),
        norm=tensors["norm"],
        head=packed("head"),
        embedding=tensors["embedding"],
        cos=tensors["cos"],
        sin=tensors["sin"],
    )
