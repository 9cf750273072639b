"""A tiny model without transformers, for child processes of test_cpu and test_sanitizers."""

import torch

from flashformer.backends import cpu
from flashformer.cache import KVCache
from flashformer.config import ModelSpec
from flashformer.plan import Plan
from flashformer.quant import quantize
from flashformer.weights import LayerWeights, ModelWeights

H, I, HEADS, KV_HEADS, D, V = 64, 96, 4, 2, 12, 97


def make(format: str, *, symmetric: bool = True, workers: int = 3) -> cpu.CPUBackend:
    """Return a back-end with two layers, one of which has a window, and odd sizes."""
    noise = torch.Generator().manual_seed(0)
    spec = ModelSpec(
        "llama", H, I, HEADS, KV_HEADS, D, V, 1e-5, D, 64, (None, 9), (True, True), qkv_bias=True
    )

    def matrix(rows: int, k: int) -> "object":
        weight = torch.randn(rows, k, generator=noise) * k**-0.5
        return quantize(weight, format, group=32, symmetric=symmetric)

    def layer() -> LayerWeights:
        attended = 64 if format == "int4" else spec.attended  # a multiple of the group
        return LayerWeights(
            qkv=matrix(spec.qkv_rows, H), output=matrix(H, attended), up=matrix(2 * I, H),
            down=matrix(H, I), norm1=torch.ones(H), norm2=torch.ones(H),
            qkv_bias=torch.ones(spec.qkv_rows),
        )  # fmt: skip

    if format == "int4":
        spec = ModelSpec(**{**spec.to_dict(), "head_dim": 16, "rotary": 16})
    angles = torch.arange(64.0)[:, None] * 0.5 ** torch.arange(spec.rotary // 2)
    weights = ModelWeights(
        (layer(), layer()), torch.ones(H), matrix(V, H), torch.randn(V, H, generator=noise),
        angles.cos(), angles.sin(),
    )  # fmt: skip
    return cpu.CPUBackend(Plan.make(spec, workers, chunk=16), weights, cache_format="bf16")


def decode(backend: cpu.CPUBackend, *, threads: int, new: int = 36, **options: object) -> list[int]:
    """Read three tokens and choose some more."""
    cache = KVCache(backend.plan.spec, 64, format=backend.cache_format)
    found = backend.decode(
        cache.keys, cache.values, torch.tensor([1, 2, 3]), position=0, new=new,
        logits=torch.empty(V), threads=threads, **options,
    )  # fmt: skip
    return found.tolist()
