"""Settings of quantised checkpoints: what is refused, by its key, and what says the same."""

import json

import pytest
import torch
from checkpoint_files import (
    DYNAMIC,
    INT4,
    INT8,
    O,
    awq,
    compressed,
    gptq,
    load,
    spoil_config,
    stage,
)

from flashformer.checkpoints import load_checkpoint
from tenfold_common import UserError


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
