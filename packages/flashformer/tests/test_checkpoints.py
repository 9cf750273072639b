"""Checkpoints: numbers of every layout to the last bit, logits as of the numbers meant."""

import json

import pytest
import torch
from checkpoint_files import (
    CASES,
    drop,
    joined,
    load,
    pack_compressed,
    pack_gemm,
    pack_gemv,
    pack_gptq,
    put,
    rewrite,
    spoil_config,
    stage,
    word,
    write,
)

import flashformer as ff
from flashformer.checkpoints import load_checkpoint, load_config
from tenfold_common import UserError
from tenfold_common.testing import rms_ratio


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
