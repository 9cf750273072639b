"""Checkpoints: numbers of every layout to the last bit, logits as of the numbers meant, refusals.

The folders are written here, number by number, as the libraries' documentation has the layouts:
AutoAWQ (`WQLinear_GEMM`, `WQLinear_GEMV`), GPTQModel (`pack_original`, formats `gptq` and
`gptq_v2`) and compressed-tensors (`pack_to_int32`).
"""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import flashformer as ff
from flashformer.checkpoints import Shards, load_checkpoint, load_config
from flashformer.pack import unpack
from tenfold_common import UserError
from tenfold_common.testing import rms_ratio

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


@pytest.mark.parametrize(
    ("pack", "part", "expected"),
    [
        (pack_gemm, "qweight", [[0x75316420]]),
        (pack_gemv, "qweight", [[0x00000000], [0x11111111], [0x22222222]]),
        (pack_gptq, "qweight", [[0, 0x11111111, 0x22222222]]),
        (pack_compressed, "weight_packed", [[0x00000000], [0x11111111], [0x22222222]]),
    ],
)
def test_packing_of_eight_numbers(pack, part, expected):
    rows = 8 if pack is pack_gemm else 3
    q = [[row] * (1 if pack is pack_gemm else 8) for row in range(rows)]
    if pack is pack_gemv:
        q = [row * 4 for row in q]
    z, s = [[8] for _ in q], torch.ones(rows, 1)
    found = pack("x", q, z, s)[f"x.{part}"]
    assert found[:, :1].tolist() == expected if pack is pack_gemv else found.tolist() == expected


def test_the_lowest_bits_come_first():
    assert word(range(8)) == 0x76543210
    assert word([255, 1, 2, 3], bits=8) == 0x030201FF


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


@pytest.fixture(scope="module")
def written(tmp_path_factory, kit):
    """Checkpoints by case, written once; not to be changed."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = write(tmp_path_factory.mktemp("checkpoints") / case, kit, case)
        return made[case]

    return get


@pytest.fixture
def fresh(tmp_path, kit):
    """Write a checkpoint that may be spoilt; by default with one layer."""

    def get(case, **changes):
        return write(tmp_path / case, kit, case, **{"num_hidden_layers": 1, **changes})

    return get


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


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_exactly_what_was_written(written, case):
    made = written(case)
    model = load(made)
    fused = made.model.config.model_type == "phi3"
    for layer in range(2):
        names = {stage.kind: stage.name for stage in model.plan.stages if stage.layer == layer}
        qkv = ["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"]
        assert torch.equal(stage(model, names["qkv"]), joined(made, layer, *qkv))
        assert torch.equal(stage(model, names["output"]), joined(made, layer, "o_proj"))
        assert torch.equal(stage(model, names["down"]), joined(made, layer, "down_proj"))
    kind, _, group, zeros, *_ = CASES[case]
    assert (model.weights, model.backend.group) == ("int4" if group else "int8", group)
    assert model.backend.packed[names["qkv"]].zeros == zeros
    assert model.head == ("bf16" if case.startswith("compressed") else "fp32")
    assert model.source is None
    assert model.spec.model_type == made.model.config.model_type
    assert kind.partition("-")[0] == model.spec.model_type


@pytest.mark.parametrize("case", CASES)
def test_logits_without_rounding_are_those_of_the_numbers_meant(written, kit, case):
    made = written(case)
    tokens = kit.tokens(24)
    model = load(made, cache="fp32")
    ours = model.feed(tokens, model.new_cache(), every=True)
    assert rms_ratio(ours, kit.logits(made.model.double(), tokens)) < 3e-6


def rounding(made, group):
    """Make a model round the inputs of its quantised layers to max / 127 of each group."""

    def hook(module, arguments):
        x = arguments[0].unflatten(-1, (-1, group))
        step = x.abs().amax(-1, keepdim=True) / 127
        return ((x / step).round() * step).flatten(-2)

    for name in made.dense:
        made.model.get_submodule(name).register_forward_pre_hook(hook)
    return made.model


@pytest.mark.parametrize(
    "case", ["awq-gemm", "gptq-asym", "gptq-v2", "compressed-asym", "compressed-8", "int-quantized"]
)
def test_logits_with_rounded_activations(tmp_path, kit, case):
    made = write(tmp_path / case, kit, case)
    tokens = kit.tokens(24)
    model = load(made, cache="fp32", backend="cpu", threads=2)
    ours = model.feed(tokens, model.new_cache(), every=True)
    exact = kit.logits(made.model, tokens)
    rounded = kit.logits(rounding(made, CASES[case][2] or 128).double(), tokens)
    # A rounding leaves (max / rms) / (127 sqrt 12) of its input, 0.7 % where max is 3.2 rms; what
    # eight of them make of the logits is measured by the model above. Beside it there is float32
    # noise of 1e-6, which turns one rounding in 1e4 to the other side: sqrt(1e-4) of it.
    noise = rms_ratio(rounded, exact)
    assert 0.005 < noise < 0.1
    assert rms_ratio(ours, exact) == pytest.approx(noise, rel=0.05)
    assert rms_ratio(ours, rounded) < 0.05 * noise


def test_generation_is_that_of_the_numbers_meant(written, kit):
    made = written("gptq-asym")
    prompt = torch.tensor([kit.tokens(8)])
    model = load(made, cache="fp32")
    mine = model.generate(prompt, max_new_tokens=12, do_sample=False)
    theirs = made.model.double().generate(
        prompt, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["rope-llama3", "rope-yarn", "rope-linear"])
def test_rotary_tables_come_from_the_config(kit, tmp_path, monkeypatch, kind):
    monkeypatch.setitem(CASES, "other", (kind, *CASES["gptq"][1:]))
    made = write(tmp_path / "x", kit, "other", num_hidden_layers=1)
    tokens = kit.tokens(24)
    model = load(made, cache="fp32")
    ours = model.feed(tokens, model.new_cache(), every=True)
    assert rms_ratio(ours, kit.logits(made.model.double(), tokens)) < 3e-6


@pytest.mark.parametrize("case", ["gptq", "compressed", "int-quantized"])
def test_a_quantised_head(kit, fresh, case):
    vocab = 97 if case == "int-quantized" else 104
    made = fresh(case, head=True, vocab_size=vocab)
    model = load(made, cache="fp32")
    assert model.head == model.weights
    assert torch.equal(stage(model, model.plan.stages[-1].name), made.dense["lm_head"])
    tokens = kit.tokens(12)
    ours = model.feed(tokens, model.new_cache(), every=True)
    assert rms_ratio(ours, kit.logits(made.model.double(), tokens)) < 3e-6
    with pytest.raises(UserError, match="head is 'bf16', but the head is int"):
        load(made, head="bf16")


def test_rows_that_fill_no_word(kit, fresh):
    made = fresh("gptq", head=True)  # 97 tokens
    model = load(made)
    assert torch.equal(stage(model, model.plan.stages[-1].name), made.dense["lm_head"])


@pytest.mark.parametrize("head", ["bf16", "int8"])
def test_the_head_in_another_format(written, head):
    made = written("gptq")
    model = load(made, head=head)
    assert model.head == model.backend.packed[model.plan.stages[-1].name].format == head


def test_gptq_zero_points_of_zero_are_borrowed_and_given_back(kit, fresh):
    made = fresh("gptq-asym")
    name = "model.layers.0.self_attn.o_proj"
    rows, k = made.dense[name].shape
    z = [[(row * 5 + g) % 3 for g in range(k // 32)] for row in range(rows)]
    q = [[(row + column) % 16 for column in range(k)] for row in range(rows)]
    s = torch.full((rows, k // 32), 0.5, dtype=torch.float16)
    rewrite(made, lambda tensors: tensors.update(pack_gptq(name, q, z, s)))
    model = load(made)
    output = next(s.name for s in model.plan.stages if s.kind == "output")
    found = stage(model, output)
    expected = [[(q[r][c] - z[r][c // 32]) * 0.5 for c in range(k)] for r in range(rows)]
    assert found.tolist() == expected


def test_a_saved_model_is_the_same(written, kit, tmp_path):
    made = written("awq-gemm")
    tokens = kit.tokens(12)
    model = load(made)
    model.save(tmp_path / "saved")
    again = ff.load(tmp_path / "saved", threads=1, backend="torch")
    assert torch.equal(again.feed(tokens, again.new_cache()), model.feed(tokens, model.new_cache()))
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    with pytest.raises(UserError, match=r"compiled model; load it with flashformer\.load"):
        load_checkpoint(tmp_path / "saved")
    assert load_config(tmp_path / "saved").model_type == "llama"


def test_from_pretrained_is_the_way_in(written):
    made = written("gptq")
    model = ff.from_pretrained(made.folder, max_len=32, threads=1, backend="torch")
    assert (model.weights, model.max_len) == ("int4", 32)
    with pytest.raises(TypeError, match="trust_remote_code"):
        ff.from_pretrained(made.folder, trust_remote_code=True)


def test_generation_settings_come_along(fresh):
    made = fresh("gptq")
    assert load(made).generation_config.eos_token_id == 2  # of the config
    (made.folder / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.5}')
    found = load(made).generation_config
    assert (found.eos_token_id, found.temperature) == (7, 0.5)
    (made.folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is broken"):
        load(made)


# --------------------------------------------------------------------------------------------------
# Files


def shard(made, count=3):
    """Spread a checkpoint over files, odd tensors first; returns the names of the files."""
    tensors = load_file(made.folder / "model.safetensors")
    (made.folder / "model.safetensors").unlink()
    files = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    homes = {name: files[n % count] for n, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: tensors[n] for n, home in homes.items() if home == file}, made.folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": homes}
    (made.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def test_shards_are_read_as_one(kit, fresh):
    made = fresh("awq-gemm")
    tokens = kit.tokens(12)
    whole = load(made)
    before = whole.feed(tokens, whole.new_cache())
    shard(made)
    parts = load(made)
    assert torch.equal(parts.feed(tokens, parts.new_cache()), before)


def test_another_name_of_the_only_file(fresh):
    made = fresh("gptq")
    (made.folder / "model.safetensors").rename(made.folder / "gptq_model-4bit-32g.safetensors")
    assert load(made).weights == "int4"


def test_several_files_without_an_index(fresh):
    made = fresh("gptq")
    shard(made)
    (made.folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="3 files"):
        load(made)


def test_a_missing_shard_is_named(fresh):
    made = fresh("gptq")
    files = shard(made)
    (made.folder / files[1]).unlink()
    with pytest.raises(UserError, match=rf"{files[1]} is missing"):
        load(made)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_file_that_is_cut_off_is_named(fresh, kept):
    made = fresh("gptq")
    file = made.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors is broken or cut off"):
        load(made)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": null}', "\xff\x00"]
)
def test_a_broken_index_is_named(fresh, text):
    made = fresh("gptq")
    shard(made)
    (made.folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is broken"):
        load(made)


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", ".."]
)
def test_an_index_reaches_no_other_folder(fresh, tmp_path, place):
    made = fresh("gptq")
    shard(made)
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    index = made.folder / "model.safetensors.index.json"
    homes = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**homes, "x": place}}))
    with pytest.raises(UserError, match=r"is not a file of this folder|is missing"):
        load(made)


def test_an_index_that_promises_too_much(fresh):
    made = fresh("gptq")
    files = shard(made)
    index = made.folder / "model.safetensors.index.json"
    homes = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**homes, "model.extra": files[2]}}))
    with pytest.raises(UserError, match=rf"{files[2]} has no tensor 'model.extra'"):
        load(made)


class Bomb:
    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path("went-off"),)


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused_unopened(fresh, tmp_path, monkeypatch, quantised, file):
    monkeypatch.chdir(tmp_path)
    made = fresh("gptq")
    (made.folder / "model.safetensors").unlink()
    (made.folder / file).write_bytes(pickle.dumps(Bomb()))
    if not quantised:
        spoil_config(made, quantization_config=None)
    with pytest.raises(UserError, match=rf"only as pickles \({file}\)"):
        load(made)
    assert not (tmp_path / "went-off").exists()
    pickle.loads((made.folder / file).read_bytes())  # the bomb is live
    assert (tmp_path / "went-off").exists()


def spoil_config(made, **changes):
    text = {**made.config, **changes}
    text = {name: value for name, value in text.items() if value is not None}
    (made.folder / "config.json").write_text(json.dumps(text))


def test_code_of_a_checkpoint_never_runs(fresh, tmp_path):
    made = fresh("gptq")
    mark = tmp_path / "ran"
    (made.folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig as Config\n"
    )
    spoil_config(made, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(UserError, match="neither a folder nor a hub name with a config"):
        load(made)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere", "neither a folder nor a hub name"),
        ("empty", "no config.json"),
        ("file", "is a file; name the folder"),
    ],
)
def test_places_without_a_checkpoint(tmp_path, place, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / place)
    with pytest.raises(UserError, match=words):
        load_config(str(tmp_path / place))


def test_a_folder_without_weights(fresh):
    made = fresh("gptq")
    (made.folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        load(made)


def test_a_broken_config(fresh):
    made = fresh("gptq")
    (made.folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="neither a folder"):
        load(made)


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """Put a folder into the hub's cache under a name; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put_there(folder, name):
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs/main").write_text("a" * 40)
        (home / "snapshots").mkdir()
        (home / "snapshots" / ("a" * 40)).symlink_to(folder)

    return put_there


def test_pickles_of_the_hub_are_refused_unopened(plain, on_hub, tmp_path, monkeypatch):
    on_hub(plain.folder, "tiny/plain")
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint("tiny/plain", max_len=32, threads=1, backend="torch").weights == "fp32"
    (plain.folder / "model.safetensors").unlink()
    torch.save(plain.model.state_dict(), plain.folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"tiny/plain cannot be loaded: .*safetensors"):
        load_checkpoint("tiny/plain", max_len=32, threads=1, backend="torch")


def test_a_model_of_the_hub(written, on_hub, tmp_path, monkeypatch):
    made = written("gptq")
    on_hub(made.folder, "tiny/gptq")
    monkeypatch.chdir(tmp_path)
    model = load_checkpoint("tiny/gptq", max_len=64, threads=1, backend="torch")
    plain = load(made)
    ours, theirs = (m.feed([3, 5], m.new_cache()) for m in (model, plain))
    assert torch.equal(ours, theirs)
    for wrong in ({"name": "tiny/other"}, {"name": "tiny/gptq", "revision": "v2"}):
        with pytest.raises(UserError, match=f"{wrong['name']} is neither a folder nor a hub name"):
            load_checkpoint(**wrong)


# --------------------------------------------------------------------------------------------------
# Tensors

O = "model.layers.0.self_attn.o_proj"


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


def nan(tensor):
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


SPOILT = {
    # what: (case, change of the tensors, words of the message)
    "no-qweight": ("gptq", drop(f"{O}.qweight"), [f"no tensor '{O}.qweight'"]),
    "no-zeros": ("awq-gemm", drop(f"{O}.qzeros"), [f"no tensor '{O}.qzeros'"]),
    "no-scales": ("gptq", drop(f"{O}.scales"), [f"no tensor '{O}.scales'"]),
    "no-shape": ("compressed", drop(f"{O}.weight_shape"), [f"no tensor '{O}.weight_shape'"]),
    "no-norm": ("gptq", drop("model.norm.weight"), ["no weight 'model.norm.weight'"]),
    "no-head": ("gptq", drop("lm_head.weight"), ["no weight 'lm_head.weight'"]),
    "no-bias": (
        "gptq-asym",
        drop("model.layers.0.self_attn.q_proj.bias"),
        ["no weight 'model.layers.0.self_attn.q_proj.bias'"],
    ),
    "rows": (
        "gptq",
        put(f"{O}.scales", lambda t: t[:, :-1]),
        [f"{O}.scales has the shape [4, 127], expected [4, 128]"],
    ),
    "groups": (
        "awq-gemm",
        put(f"{O}.scales", lambda t: t[:2]),
        [f"{O}.scales has the shape [2, 128], expected [4, 128]"],
    ),
    "zeros": (
        "awq-gemm",
        put(f"{O}.qzeros", lambda t: t[:, :8]),
        [f"{O}.qzeros has the shape [4, 8], expected [4, 16]"],
    ),
    "gemv-zeros": (
        "awq-gemv",
        put(f"{O}.qzeros", lambda t: t[:, :0]),
        [f"{O}.qzeros is for 0 groups of K = 128, not 4"],
    ),
    "gemv-rows": (
        "awq-gemv",
        put(f"{O}.scales", lambda t: t[:8]),
        [f"{O}.scales has the shape [8, 32], expected [128, any]"],
    ),
    "eight-bits": (
        "gptq",
        put(f"{O}.qweight", lambda t: torch.cat([t, t])),
        [f"{O}.g_idx has the shape [128], expected [256]"],
    ),
    "too-wide": (
        "awq-gemv",
        lambda t: t.update({f"{O}.qweight": t[f"{O}.qweight"].repeat(1, 2)}),
        [f"{O} has the shape [128, 256], expected [128, 128]"],
    ),
    "odd-k": (
        "awq-gemm",
        put(f"{O}.qweight", lambda t: t[:100]),
        [f"{O} has K = 100", "group_size 32"],
    ),
    "packed": (
        "compressed",
        put(f"{O}.weight_packed", lambda t: t[:, :-1]),
        [f"{O}.weight_packed has the shape [128, 15], expected [128, 16]"],
    ),
    "packed-8": (
        "compressed-8",
        put(f"{O}.weight_packed", lambda t: t[:, :-1]),
        [f"{O}.weight_packed has the shape [128, 31], expected [128, 32]"],
    ),
    "shape": (
        "compressed",
        put(f"{O}.weight_shape", lambda t: t[:1]),
        [f"{O}.weight_shape has the shape [1], expected [2]"],
    ),
    "channel": (
        "int-quantized",
        put(f"{O}.weight_scale", lambda t: t[:1]),
        [f"{O}.weight_scale has the shape [1, 1], expected [128, 1]"],
    ),
    "dtype": (
        "gptq",
        put(f"{O}.qweight", lambda t: t.float()),
        [f"{O}.qweight is torch.float32, expected torch.int32"],
    ),
    "dtype-scale": (
        "gptq",
        put(f"{O}.scales", lambda t: t.int()),
        [f"{O}.scales is torch.int32, expected torch.float16 or"],
    ),
    "dtype-int8": (
        "int-quantized",
        put(f"{O}.weight", lambda t: t.half()),
        [f"{O}.weight is torch.float16, expected torch.int8"],
    ),
    "dtype-zero": (
        "compressed-asym",
        put(f"{O}.weight_zero_point", lambda t: t.to(torch.int8)),
        [f"{O}.weight_zero_point is torch.int8, expected torch.int32"],
    ),
    "nan": ("gptq", put(f"{O}.scales", nan), ["a scale of", O, "NaN"]),
    "too-large": (
        "compressed",
        put(f"{O}.weight_scale", lambda t: t * 1e9),
        ["a scale of", O, "65504"],
    ),
    "nan-norm": (
        "gptq",
        put("model.norm.weight", lambda t: t * torch.nan),
        ["model.norm.weight holds NaN"],
    ),
    "act-order": ("gptq", put(f"{O}.g_idx", lambda t: t.flip(0)), [f"{O}.g_idx", "desc_act"]),
    "act-order-2": (
        "compressed",
        put(f"{O}.weight_g_idx", lambda _: torch.arange(128).flip(0) // 32),
        [f"{O}.weight_g_idx", "actorder"],
    ),
    "mixed": (
        "gptq",
        lambda t: (t.pop(f"{O}.qweight"), t.update({f"{O}.weight": torch.zeros(128, 128)})),
        [
            f"{O} is not quantised, but other layers are",
            "modules_to_not_convert, ignore or dynamic",
        ],
    ),
    "mixed-int8": (
        "int-quantized",
        drop(f"{O}.weight_scale"),
        [f"{O} is not quantised, but other layers are"],
    ),
    "layer-too-many": (
        "gptq",
        put("model.layers.7.mlp.down_proj.weight", lambda _: torch.zeros(2)),
        ["has model.layers.7.mlp.down_proj.weight, which a model of this config does not use"],
    ),
    "quantised-stranger": (
        "awq-gemm",
        lambda t: t.update(pack_gemm("vision.proj", [[1] * 32] * 8, [[8]] * 8, torch.ones(8, 1))),
        ["has vision.proj, which"],
    ),
    "bias": (
        "gptq",
        put(f"{O}.bias", lambda _: torch.ones(128)),
        [f"has {O}.bias, which a model of this config does not use"],
    ),
    "key-scale": (
        "compressed",
        put("model.layers.0.self_attn.k_scale", lambda _: torch.ones(1)),
        ["has model.layers.0.self_attn.k_scale, which"],
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_tensor_is_named(fresh, what):
    case, change, expected = SPOILT[what]
    made = fresh(case)
    load(made)  # sound before
    rewrite(made, change)
    with pytest.raises(UserError) as caught:
        load(made)
    for part in expected:
        assert part in str(caught.value)


def test_leftovers_without_meaning_are_no_matter(fresh, kit):
    made = fresh("gptq")
    tokens = kit.tokens(6)
    model = load(made)
    before = model.feed(tokens, model.new_cache())

    def change(tensors):
        tensors[f"{O}.bias"] = torch.zeros(128)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    rewrite(made, change)
    model = load(made)
    assert torch.equal(model.feed(tokens, model.new_cache()), before)


def test_a_tied_head_may_be_stored_twice(fresh):
    made = fresh("compressed-asym")
    rewrite(made, put("lm_head.weight", lambda _: torch.ones(97, 128)))
    assert load(made).spec.tied


def test_gptq_without_an_order_of_columns(fresh):
    made = fresh("gptq")
    rewrite(made, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith("g_idx")])
    assert load(made).weights == "int4"


def test_scales_beyond_float16_are_rounded_with_a_warning(fresh):
    made = fresh("compressed")

    def change(tensors):
        for name in (n for n in tensors if n.endswith("weight_scale")):
            tensors[name] = tensors[name].float() * (1 + 2**-12)

    rewrite(made, change)
    with pytest.warns(UserWarning, match="scales of 7 matrices, such as model") as caught:
        model = load(made)
    output = next(s.name for s in model.plan.stages if s.kind == "output")
    meant = made.dense[O] * (1 + 2**-12)
    error = (stage(model, output) - meant).abs()
    assert (error <= meant.abs() * 2**-11).all()
    assert error.max() > 0
    assert len(caught) == 1


def test_scales_too_small_for_float16_go_without_one(fresh):
    made = fresh("compressed")

    def change(tensors):
        tensors[f"{O}.weight_scale"][0, 0] = 1e-9

    rewrite(made, change)
    model = load(made)
    output = next(s.name for s in model.plan.stages if s.kind == "output")
    assert (stage(model, output)[0, :32] == 0).all()


def test_shards_tell_what_was_used(written):
    shards = Shards(written("gptq").folder)
    assert len(shards) == len(list(shards)) == len(written("gptq").tensors)
    assert "nothing" not in shards
    assert not shards.used
    _ = shards["lm_head.weight"]
    assert shards.used == {"lm_head.weight"}


# --------------------------------------------------------------------------------------------------
# Settings


def groups(*parts, **fields):
    settings = compressed(group_size=32, **INT4)
    settings["config_groups"] = {f"group_{n}": part for n, part in enumerate(parts)}
    return {**settings, **fields}


def part(weights=None, **fields):
    return {"targets": ["Linear"], "weights": weights or {**INT4, "group_size": 32}, **fields}


REFUSED = {
    # what: (quantization_config, words of the message)
    "method": ({"quant_method": "bitsandbytes"}, ["quant_method is 'bitsandbytes'", "awq, gptq"]),
    "no-method": ({"bits": 4}, ["quant_method is 'None'"]),
    "near-method": ({"quant_method": "gptqq"}, ["Did you mean 'gptq'?"]),
    "awq-bits": (awq(bits=8), ["awq: bits is 8, must be 4", "compile the unquantised model"]),
    "awq-no-bits": (awq(bits=None), ["awq: bits is None"]),
    "awq-group": (awq(group_size=-1), ["awq: group_size is -1, must be 32 or 64 or 128"]),
    "awq-version": (
        awq(version="gemv_fast"),
        ["awq: version is 'gemv_fast', must be 'gemm' or 'gemv'"],
    ),
    "awq-backend": (awq(backend="llm-awq"), ["awq: version is 'llm-awq'"]),
    "gptq-bits": (gptq(bits=3), ["gptq: bits is 3, must be 4"]),
    "gptq-group": (gptq(group_size=-1), ["gptq: group_size is -1, must be"]),
    "gptq-256": (gptq(group_size=256), ["gptq: group_size is 256, must be"]),
    "gptq-format": (gptq(checkpoint_format="marlin"), ["gptq: checkpoint_format is 'marlin'"]),
    "gptq-format-2": (gptq(format="gptq_p"), ["gptq: checkpoint_format is 'gptq_p'"]),
    "gptq-marlin": (gptq(is_marlin_format=True), ["gptq: is_marlin_format is True"]),
    "gptq-rotation": (gptq(rotation="hadamard"), ["gptq: rotation is 'hadamard'"]),
    "gptq-words": (gptq(pack_dtype="int16"), ["gptq: pack_dtype is 'int16'"]),
    "cache": (
        groups(part(), kv_cache_scheme={"num_bits": 8}),
        ["kv_cache_scheme is {'num_bits': 8}"],
    ),
    "transform": (groups(part(), transform_config={"R1": 1}), ["transform_config is"]),
    "sparse": (
        groups(part(), sparsity_config={"format": "sparse-24"}),
        ["sparsity_config.format is 'sparse-24'"],
    ),
    "format": (
        groups(part(), format="float-quantized"),
        ["format is 'float-quantized', must be 'pack-quantized'"],
    ),
    "format-2": (groups(part(format="nvfp4-pack-quantized")), ["format is 'nvfp4-pack-quantized'"]),
    "float": (
        groups(part({**INT4, "group_size": 32, "type": "float"})),
        ["weights.type is 'float'"],
    ),
    "bits": (
        groups(part({**INT4, "group_size": 32, "num_bits": 3})),
        ["weights.num_bits is 3, must be 4 or 8"],
    ),
    "channel": (
        groups(part({**INT4, "strategy": "channel"})),
        ["weights.strategy is 'channel', must be 'group'"],
    ),
    "minus-one": (
        groups(part({"num_bits": 4, "group_size": -1})),
        ["weights.strategy is 'channel', must be 'group'"],
    ),
    "group": (groups(part({**INT4, "group_size": 16})), ["weights.group_size is 16"]),
    "group-8": (
        groups(part({**INT8, "strategy": "group", "group_size": 128})),
        ["weights.strategy is 'group', must be 'channel'"],
    ),
    "tensor-8": (
        groups(part({"num_bits": 8})),
        ["weights.strategy is 'tensor', must be 'channel'"],
    ),
    "asym-8": (groups(part({**INT8, "symmetric": False})), ["weights.symmetric is False"]),
    "static": (
        groups(part(input_activations={"num_bits": 8, "dynamic": False})),
        ["input_activations.dynamic is False"],
    ),
    "float-8": (
        groups(part(input_activations={**DYNAMIC, "type": "float"})),
        ["input_activations.type is 'float'"],
    ),
    "input-4": (
        groups(part(input_activations={**DYNAMIC, "num_bits": 4})),
        ["input_activations.num_bits is 4"],
    ),
    "outputs": (groups(part(output_activations={"num_bits": 8})), ["output_activations is"]),
    "two-kinds": (
        groups(part(), part(INT8)),
        ["4 bits, group 32; 8 bits, group 0", "must have one kind"],
    ),
    "no-kind": (groups(), ["config_groups has nothing"]),
    "preset": (groups(["Linear"]), ["config_groups has ['Linear'], must describe weights"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_quantisations_are_refused_by_their_key(kit, tmp_path, what):
    settings, expected = REFUSED[what]
    kit.config("llama").save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**text, "quantization_config": settings}))
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path)
    for piece in expected:
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("awq-gemm", {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
        ("awq-gemm", {"method": "awq", "bits": 4, "group_size": 32, "format": "gemm"}),
        ("gptq-v2", {"method": "gptq", "bits": 4, "group_size": 64, "format": "gptq_v2"}),
        ("compressed", groups(part({"num_bits": 4, "group_size": 32}), part())),
        (
            "compressed",
            groups(
                part(input_activations=DYNAMIC, format="pack-quantized"), format="mixed-precision"
            ),
        ),
        ("compressed-8", groups(part({"num_bits": 8, "group_size": -1}))),
    ],
)  # fmt: skip
def test_other_ways_to_say_the_same(fresh, case, settings):
    made = fresh(case)
    spoil_config(made, quantization_config=settings)
    model = load(made)
    output = next(s.name for s in model.plan.stages if s.kind == "output")
    assert torch.equal(stage(model, output), made.dense[O])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weights": "bf16"}, "weights is 'bf16', but .* quantised already"),
        ({"group_size": 128}, "group_size is 128, but"),
        ({"symmetric": False}, "symmetric is False, but"),
        ({"dtype": "float32"}, "dtype is 'float32', but"),
        ({"cache": "int8"}, "cache must be"),
        ({"head": "int3"}, "must be one of"),
        ({"max_len": 0}, "max_len must be"),
        ({"threads": 0}, "threads must be"),
        ({"backend": "tpu"}, "backend must be"),
    ],
)
def test_options_that_a_quantised_checkpoint_does_not_take(written, options, expected):
    with pytest.raises(UserError, match=expected):
        load(written("gptq"), **options)


def test_options_that_agree_are_taken(written):
    model = load(written("gptq"), weights="int4", group_size=32, dtype="auto")
    assert model.weights == "int4"


def test_a_model_of_another_kind_is_refused_before_its_files_are_read(fresh):
    made = fresh("gptq")
    (made.folder / "model.safetensors").unlink()
    spoil_config(made, hidden_act="gelu")
    with pytest.raises(UserError, match="hidden_act is 'gelu'"):
        load(made)


# --------------------------------------------------------------------------------------------------
# Unquantised checkpoints


@pytest.fixture
def plain(kit, tmp_path):
    """An unquantised checkpoint and its model."""
    model = kit.model("qwen2")
    model.save_pretrained(tmp_path / "plain")
    return SimpleNamespace(
        folder=tmp_path / "plain", model=model,
        config=json.loads((tmp_path / "plain/config.json").read_text()),
    )  # fmt: skip


def test_an_unquantised_folder_is_compiled(kit, plain):
    tokens = kit.tokens(24)
    model = load(plain)
    assert (model.weights, model.head) == ("fp32", "fp32")
    assert not model.source.training
    ours = model.feed(tokens, model.new_cache(), every=True)
    assert rms_ratio(ours, kit.logits(plain.model.double(), tokens)) < 3e-6


def test_options_of_an_unquantised_folder(plain):
    model = load(plain, dtype="bfloat16")
    assert (model.weights, model.source.dtype) == ("bf16", torch.bfloat16)
    model = load(plain, weights="int8", head="bf16", cache="fp32")
    assert (model.weights, model.head, model.backend.cache_format) == ("int8", "bf16", "fp32")
    with pytest.raises(UserError, match="group_size must be one of"):
        load(plain, weights="int4", group_size=48)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (drop("model.norm.weight"), r"missing model\.norm\.weight$"),
        (
            lambda t: [t.pop(n) for n in list(t) if "mlp" in n],
            r"missing model\.layers\.0\.mlp\.down_proj\.weight and 5 more",
        ),
        (put("model.norm.weight", lambda t: t[:-1]), "model.norm.weight|cannot be loaded"),
    ],
    ids=["missing", "several", "shape"],
)
def test_weights_that_are_not_there_are_not_made_up(plain, change, expected):
    rewrite(plain, change)
    with pytest.raises(UserError, match=expected):
        load(plain)


def test_an_unquantised_folder_that_is_cut_off(plain):
    file = plain.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"model\.safetensors is broken or cut off"):
        load(plain)


def test_a_quantised_folder_whose_config_does_not_say_so(fresh):
    made = fresh("gptq")
    spoil_config(made, quantization_config=None)
    with pytest.raises(UserError, match=r"missing model\.layers\.0\.mlp\.down_proj\.weight"):
        load(made)
