"""Checkpoints for tests, written number by number as the libraries' documentation has the layouts:
AutoAWQ (`WQLinear_GEMM`, `WQLinear_GEMV`), GPTQModel (`pack_original`, formats `gptq` and
`gptq_v2`) and compressed-tensors (`pack_to_int32`). The fixtures are in conftest.py.
"""

import json
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from flashformer.checkpoints import load_checkpoint
from flashformer.pack import unpack

O = "model.layers.0.self_attn.o_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the numbers of a word, from its lowest bits up


# --------------------------------------------------------------------------------------------------
# Packing, as slow as can be


def word(numbers, bits=4):
    """An int32 of numbers without a sign, the first in its lowest bits."""
    total = 0
    for place, number in enumerate(numbers):
        assert 0 <= number < 2**bits
        total |= int(number) << (bits * place)
    return total - 2**32 if total >= 2**31 else total


def words(rows, bits=4, order=None):
    """Pack along the last axis of a list of lists, padded with zeros."""
    size = 32 // bits
    order = order or range(size)
    packed = []
    for row in rows:
        row = [*row, *[0] * (-len(row) % size)]
        packed.append(
            [word([row[start + o] for o in order], bits) for start in range(0, len(row), size)]
        )
    return torch.tensor(packed, dtype=torch.int32)


def columns(matrix):
    return [list(column) for column in zip(*matrix, strict=True)]


def pack_gemm(name, q, z, s):
    return {
        f"{name}.qweight": words(columns(q), order=AWQ_ORDER),
        f"{name}.qzeros": words(columns(z), order=AWQ_ORDER),
        f"{name}.scales": s.T.contiguous(),
    }


def pack_gemv(name, q, z, s):
    width = -(-len(z[0]) // 8)
    width += -width % {32: 4, 64: 2, 128: 1}[len(q[0]) // len(z[0])]
    scales = torch.zeros(len(q), 8 * width, dtype=s.dtype)
    scales[:, : s.shape[1]] = s
    zeros = torch.zeros(len(q), width, dtype=torch.int32)
    packed = words(z)
    zeros[:, : packed.shape[1]] = packed
    return {f"{name}.qweight": words(q), f"{name}.qzeros": zeros, f"{name}.scales": scales}


def pack_gptq(name, q, z, s, *, less=1):
    k, groups = len(q[0]), len(z[0])
    zeros = words(columns(z)).tolist()
    zeros = [[(w - less * 0x11111111 + 2**31) % 2**32 - 2**31 for w in row] for row in zeros]
    return {
        f"{name}.qweight": words(q).T.contiguous(),
        f"{name}.qzeros": torch.tensor(zeros, dtype=torch.int32),
        f"{name}.scales": s.T.contiguous(),
        f"{name}.g_idx": torch.tensor([i // (k // groups) for i in range(k)], dtype=torch.int32),
    }


def pack_gptq_v2(name, q, z, s):
    return pack_gptq(name, q, z, s, less=0)


def pack_compressed(name, q, z, s):
    packed = {
        f"{name}.weight_packed": words(q),
        f"{name}.weight_scale": s,
        f"{name}.weight_shape": torch.tensor([len(q), len(q[0])]),
    }
    if any(number != 8 for row in z for number in row):
        packed[f"{name}.weight_zero_point"] = words(columns(z)).T.contiguous()
    return packed


def pack_compressed8(name, q, z, s):
    return {
        f"{name}.weight_packed": words([[n + 128 for n in row] for row in q], bits=8),
        f"{name}.weight_scale": s,
        f"{name}.weight_shape": torch.tensor([len(q), len(q[0])]),
    }


def pack_int8(name, q, z, s):
    return {f"{name}.weight": torch.tensor(q, dtype=torch.int8), f"{name}.weight_scale": s}


# --------------------------------------------------------------------------------------------------
# Whole checkpoints


def awq(**fields):
    return {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", **fields}


def gptq(**fields):
    return {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": True, **fields}


def compressed(activations=None, *, format="pack-quantized", **weights):
    part = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": part},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
DYNAMIC = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}

# case: (kind of model, packer, group, has zero points, dtype of scales, quantization_config)
CASES = {
    "awq-gemm": ("llama", pack_gemm, 32, True, torch.float16, awq(group_size=32)),
    "awq-gemm-64": ("qwen3", pack_gemm, 64, True, torch.float16, awq(group_size=64)),
    "awq-gemv": ("llama", pack_gemv, 32, True, torch.float16, awq(group_size=32, version="GEMV")),
    "awq-gemv-128": (
        "phi3",
        pack_gemv,
        128,
        True,
        torch.float16,
        awq(group_size=128, version="gemv"),
    ),
    "awq-no-zeros": ("llama", pack_gemm, 32, False, torch.float16, awq(group_size=32)),
    "gptq": ("llama", pack_gptq, 32, False, torch.float16, gptq(group_size=32)),
    "gptq-asym": ("qwen2", pack_gptq, 32, True, torch.float16, gptq(group_size=32, sym=False)),
    "gptq-v2": (
        "llama-biases",
        pack_gptq_v2,
        64,
        True,
        torch.float16,
        gptq(group_size=64, checkpoint_format="gptq_v2", sym=False),
    ),
    "compressed": (
        "llama",
        pack_compressed,
        32,
        False,
        torch.bfloat16,
        compressed(group_size=32, **INT4),
    ),
    "compressed-asym": (
        "llama-tied",
        pack_compressed,
        64,
        True,
        torch.bfloat16,
        compressed(group_size=64, **{**INT4, "symmetric": False}),
    ),
    "compressed-8": ("qwen2", pack_compressed8, 0, False, torch.bfloat16, compressed(**INT8)),
    "int-quantized": (
        "llama",
        pack_int8,
        0,
        False,
        torch.float32,
        compressed(DYNAMIC, format="int-quantized", **INT8),
    ),
}
WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32,
        "eos_token_id": 2}  # fmt: skip
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
           "qkv_proj", "gate_up_proj")  # fmt: skip


class Checkpoint(SimpleNamespace):
    """A folder, and a model in float32 that means the same.

    Attributes: folder, model, dense (name of a layer to `[N, K]`), tensors, config.
    """


def numbers(shape, group, *, zeros, eight_bits, dtype, noise):
    """Random numbers, zero points and scales: q, z as lists, s, and what they mean."""
    rows, k = shape
    groups = k // group if group else 1
    size = 0.004 if eight_bits else 0.07
    s = (size * (0.5 + torch.rand(rows, groups, generator=noise)) * (16 / k) ** 0.5).to(dtype)
    low, high = (-128, 128) if eight_bits else (0, 16)
    q = torch.randint(low, high, shape, generator=noise)
    middle = 0 if eight_bits else 8
    z = torch.full((rows, groups), middle)
    if zeros:
        z = torch.randint(0, 16, (rows, groups), generator=noise)
    each = k // groups
    dense = torch.empty(shape)
    for g in range(groups):
        part = slice(g * each, (g + 1) * each)
        dense[:, part] = (q[:, part] - z[:, g : g + 1]).float() * s[:, g : g + 1].float()
    return q.tolist(), z.tolist(), s, dense


def write(folder, kit, case, *, head=False, settings=None, **changes):
    """Write a checkpoint of a case."""
    kind, pack, group, zeros, dtype, config = CASES[case]
    stored = torch.bfloat16 if case.startswith("compressed") else torch.float16
    model = kit.model(kind, **{**WIDE, **changes})
    noise = torch.Generator().manual_seed(11)
    tensors, dense = {}, {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weight.to(stored))
            layer = name.removesuffix(".weight")
            last = layer.rpartition(".")[2]
            if not (last in LINEARS and name.endswith("weight")) and not (
                head and last == "lm_head"
            ):
                tensors[name] = weight.detach().to(stored)
                continue
            *parts, meant = numbers(
                tuple(weight.shape),
                group,
                zeros=zeros,
                eight_bits=not group,
                dtype=dtype,
                noise=noise,
            )
            weight.copy_(meant)
            tensors |= pack(layer, *parts)
            dense[layer] = meant
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text())
    text |= {"quantization_config": settings or config, "dtype": str(stored).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(text))
    return Checkpoint(folder=folder, model=model, dense=dense, tensors=tensors, config=text)


def rewrite(made, change):
    """Change the tensors of a checkpoint."""
    tensors = load_file(made.folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, made.folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip


def load(made, **options):
    return load_checkpoint(
        made.folder, **{"max_len": 64, "threads": 1, "backend": "torch", **options}
    )


def stage(model, name):
    """The numbers a packed matrix means, `[N, K]`, padding off."""
    packed = model.backend.packed[name]
    return unpack(packed.tiles, packed).dense()[: packed.shape[0]]


def joined(made, layer, *names):
    parent = "self_attn" if names[0] in ("q_proj", "qkv_proj", "o_proj") else "mlp"
    return torch.cat([made.dense[f"model.layers.{layer}.{parent}.{name}"] for name in names])


def spoil_config(made, **changes):
    text = {**made.config, **changes}
    text = {name: value for name, value in text.items() if value is not None}
    (made.folder / "config.json").write_text(json.dumps(text))


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors.get(name))})
