"""The plan executed in torch is the model, whoever of the workers goes first."""

import copy
from random import Random

import pytest
import torch

from flashformer.backends.cpu import CPUBackend
from flashformer.plan import Plan
from flashformer.quant import quantize
from flashformer.reference import Reference, quantized_activation, rms_norm, rotate
from tenfold_common import UserError
from tenfold_common.testing import rms_ratio

KINDS = (
    "llama",
    "llama-biases",
    "llama-groups-of-7",
    "qwen2-window",
    "qwen3",
    "mistral",
    "smollm3-window",
    "phi3-partial",
)
WORKERS = (1, 2, 3, 7, 132)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_for_any_number_of_workers(kit, kind):
    model = kit.model(kind)
    spec, weights = kit.weights(model)
    tokens = kit.tokens(20)
    theirs = kit.logits(copy.deepcopy(model).double(), tokens)
    for workers in (2, 7):
        plan = Plan.make(spec, workers, chunk=16)
        logits, chosen = Reference(plan, weights, max_len=32).decode(tokens)
        assert logits.dtype == torch.float64
        assert rms_ratio(logits, theirs) < 1e-6  # transformers computes norms in float32
        assert chosen == []


def test_neither_the_number_of_workers_nor_their_order_matters(kit):
    spec, weights = kit.weights(kit.model("llama-biases"))
    tokens = kit.tokens(18)
    first = None
    for workers in WORKERS:
        for random in (None, Random(workers)) if workers < 100 else (None,):  # those take long
            found = Reference(Plan.make(spec, workers, chunk=16), weights, max_len=32)
            logits, chosen = found.decode(tokens, 3, random=random)
            if first is None:
                first = logits, chosen
            assert torch.allclose(logits, first[0], rtol=0, atol=1e-12)
            assert chosen == first[1]


def test_greedy_tokens_equal_transformers(kit):
    model = kit.model("qwen3")
    spec, weights = kit.weights(model)
    tokens = kit.tokens(5)
    wanted = model.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)
    plan = Plan.make(spec, 3, chunk=16)
    logits, chosen = Reference(plan, weights, max_len=32).decode(tokens, 12)
    assert chosen == wanted[0, 5:].tolist()
    assert logits.shape == (16, 97)


def test_it_goes_on_where_it_stopped(kit):
    spec, weights = kit.weights(kit.model())
    tokens = kit.tokens(20)
    plan = Plan.make(spec, 2, chunk=16)
    whole, _ = Reference(plan, weights, max_len=32).decode(tokens)
    found = Reference(plan, weights, max_len=32)
    parts = [found.decode(tokens[a:b])[0] for a, b in ((0, 1), (1, 7), (7, 20))]
    assert torch.equal(torch.cat(parts), whole)


def test_packed_weights_are_refused(kit):
    spec, weights = kit.weights(kit.model())
    backend = CPUBackend(Plan.make(spec, 1), weights, cache_format="fp32")
    from dataclasses import replace

    from flashformer.pack import Packed

    packed = replace(weights, head=backend.packed["head"])
    assert isinstance(packed.head, Packed)
    with pytest.raises(UserError, match="not packed"):
        Reference(Plan.make(spec, 1), packed)


# --------------------------------------------------------------------------------------------------
# Equations, by hand


def test_rms_norm_by_hand():
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = rms_norm(x, torch.tensor([1.0, 2.0]), 0.5)  # mean square 12.5
    assert found.tolist() == pytest.approx([3 / 13**0.5, 8 / 13**0.5])


def test_rotation_by_hand():
    x = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64)
    cos, sin = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    # (1, 3) turned by a right angle, (2, 4) not at all, the rest is not rotary
    assert rotate(x, cos, sin).tolist() == [-3, 2, 1, 4, 5, 6]


def test_a_rotation_keeps_scores_of_equal_distances():
    noise = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 8, generator=noise, dtype=torch.float64)
    angle = torch.arange(20, dtype=torch.float64)[:, None] * 0.3 ** torch.arange(4)
    turned = [(rotate(q, a.cos(), a.sin()), rotate(k, a.cos(), a.sin())) for a in angle]
    scores = [float(turned[t + 3][0] @ turned[t][1]) for t in range(15)]
    assert scores == pytest.approx([scores[0]] * 15)
    assert abs(scores[0] - float(q @ k)) > 1e-3


def test_activations_of_quantised_products_are_rounded_group_by_group():
    x = torch.cat([torch.linspace(-127, 127, 128), torch.linspace(-1, 1, 60)]).double()
    w = torch.randn(4, 256)
    int8, int4 = quantize(w, "int8"), quantize(w, "int4", group=32)
    assert torch.equal(quantized_activation(x, quantize(w, "bf16")), x)
    found = quantized_activation(x, int8)
    assert torch.equal(found[:128], x[:128].round())
    assert (found[128:] - x[128:]).abs().max() <= 0.5 / 127 + 1e-12
    finer = quantized_activation(x, int4)
    assert (finer[32:64] - x[32:64]).abs().max() <= 0.5 * x[32:64].abs().max() / 127 + 1e-12
    assert torch.equal(
        quantized_activation(torch.zeros(64).double(), int4), torch.zeros(64).double()
    )
