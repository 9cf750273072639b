"""Effective transforms, their spectra and attention maps."""

import pytest
import torch

from path_attn import PaTHConfig, PaTHForCausalLM
from path_attn.explain import (
    attention_map,
    attention_maps,
    layer_inputs,
    model_relative_transform,
    relative_transform,
    spectrum,
)
from tenfold_common.errors import UserError


def make(encoding: str = "path", **options) -> PaTHForCausalLM:
    config = PaTHConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        position_encoding=encoding,
        initializer_range=0.2,
        pad_token_id=0,
        **options,
    )
    return PaTHForCausalLM(config).double().eval()


def test_transform_gives_the_logits_of_the_definition():
    w = torch.nn.functional.normalize(torch.randn(1, 6, 2, 2, 5, dtype=torch.float64), dim=-1)
    beta = 2 * torch.rand(1, 6, 2, 2, dtype=torch.float64)
    q, k = torch.randn(5).double(), torch.randn(5).double()
    moved = q
    for t in (4, 3, 2):
        for r in (1, 0):
            moved = moved - beta[0, t, 1, r] * w[0, t, 1, r] * (w[0, t, 1, r] @ moved)
    transform = relative_transform(w, beta, query=4, key=1)
    assert transform.shape == (1, 2, 5, 5)
    torch.testing.assert_close(k @ transform[0, 1] @ q, k @ moved)
    same = relative_transform(w, beta, query=3, key=3)
    assert torch.equal(same, torch.eye(5).double().expand(1, 2, 5, 5))


def test_spectrum_of_one_reflection():
    w = torch.nn.functional.normalize(torch.randn(1, 2, 1, 4, dtype=torch.float64), dim=-1)
    beta = torch.full((1, 2, 1), 1.75, dtype=torch.float64)
    result = spectrum(relative_transform(w, beta, query=1, key=0))
    expected = torch.tensor([1, 1, 1, -0.75], dtype=torch.float64)
    torch.testing.assert_close(result.eigenvalues[0, 0].real, expected)
    torch.testing.assert_close(result.singular_values[0, 0], expected.abs())
    long = torch.nn.functional.normalize(torch.randn(1, 30, 1, 4, dtype=torch.float64), dim=-1)
    path = spectrum(relative_transform(long, 2 * torch.rand(1, 30, 1).double(), query=29, key=0))
    assert path.singular_values.max() <= 1 + 1e-12
    assert path.eigenvalues.abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("encoding", ["path", "path_fox", "rope", "fox", "nope"])
def test_maps_reproduce_the_attention_output(encoding):
    model = make(encoding, window=7, softcap=5.0)
    ids = torch.randint(1, 20, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    maps = attention_maps(model, ids, mask)
    assert maps.shape == (2, 2, 4, 12, 12)
    real = mask.bool()
    sums = maps.sum(-1)
    torch.testing.assert_close(sums, real[None, :, None].double().expand_as(sums))
    assert (maps.triu(1) == 0).all()
    assert (maps[:, 0, :, :, :4] == 0).all()
    ((layer, inputs),) = layer_inputs(model, ids, mask, layers=[-1])
    outputs = []
    handle = layer.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model(ids, attention_mask=mask)
    handle.remove()
    values = inputs.v.repeat_interleave(2, 2).transpose(1, 2)  # [B, HQ, T, K]
    torch.testing.assert_close((maps[1] @ values).transpose(1, 2).flatten(2), outputs[0])


def test_layer_map_and_model_transform_agree_with_the_model():
    model = make()
    ids = torch.randint(1, 20, (1, 9))
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    layer = model.model.layers[0].self_attn
    torch.testing.assert_close(
        attention_map(layer, hidden), attention_maps(model, ids, layers=[0])[0]
    )
    transform = model_relative_transform(model, ids, layer=0, query=8, key=2)
    inputs = layer.project(hidden)
    scores = torch.stack(
        [
            inputs.k[0, j, 0]
            @ relative_transform(inputs.w, inputs.beta, query=8, key=j)[0, 0]
            @ inputs.q[0, 8, 1]
            for j in range(9)
        ]
    )
    torch.testing.assert_close((scores / 8**0.5).softmax(0), attention_map(layer, hidden)[0, 1, 8])
    torch.testing.assert_close(transform, relative_transform(inputs.w, inputs.beta, query=8, key=2))


def test_bad_input_is_named():
    w, beta = torch.randn(1, 4, 1, 3), torch.rand(1, 4, 1)
    with pytest.raises(UserError, match="key is 3 and query 2"):
        relative_transform(w, beta, query=2, key=3)
    with pytest.raises(UserError, match="beta"):
        relative_transform(w, beta[:, :3], query=2, key=1)
    with pytest.raises(UserError, match=r"expected \[\.\.\., K, K\]"):
        spectrum(torch.randn(3, 4))
    with pytest.raises(UserError, match="layer 5 does not exist"):
        attention_maps(make(), torch.ones(1, 3, dtype=torch.long), layers=[5])
    with pytest.raises(UserError, match="has no reflections"):
        model_relative_transform(
            make("fox"), torch.ones(1, 3, dtype=torch.long), layer=0, query=1, key=0
        )
