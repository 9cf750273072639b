"""Formats: what each number may be off by, and what is refused."""

import pytest
import torch

from flashformer.quant import FORMATS, GROUPS, Matrix, check_format, default_head, quantize
from tenfold_common import UserError


def weight(rows=24, k=256, *, seed=0, spread=True):
    """A matrix whose rows and groups differ in size by orders of magnitude."""
    noise = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, k, generator=noise)
    if spread:
        found *= 10 ** (4 * torch.rand(rows, k // 32, generator=noise) - 3).repeat_interleave(32, 1)
    return found


def spread(scale, group):
    return scale.float().repeat_interleave(group, 1)


def test_fp32_and_bf16_are_casts():
    w = weight()
    assert torch.equal(quantize(w, "fp32").dense(), w)
    assert torch.equal(quantize(w, "bf16").dense(), w.bfloat16().float())
    assert torch.equal(quantize(w.double(), "fp32").dense(), w)


def test_int8_is_off_by_half_a_scale_at_most():
    w = weight()
    found = quantize(w, "int8")
    assert (found.values.dtype, found.scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(found.scale, w.abs().amax(1) / 127)
    error = (w - found.dense()).abs()
    assert (error <= found.scale[:, None] / 2 * (1 + 1e-5)).all()
    assert (found.values.abs().amax(1) == 127).all()  # the whole range is used
    assert error.max() > found.scale.max() / 4  # and the bound is not idle


@pytest.mark.parametrize("group", GROUPS)
def test_asymmetric_int4_is_off_by_half_a_scale_or_so(group):
    w = weight() + 0.3
    found = quantize(w, "int4", group=group, symmetric=False)
    scale = spread(found.scale, group)
    # Half a scale for rounding, and as much for the zero point where a value falls off the ends;
    # scales are float16: 15 of them may fall short of the range by 15 * 2^-11 of it.
    assert ((w - found.dense()).abs() <= scale * (1 + 15 * 2**-11)).all()
    inside = (found.values > 0) & (found.values < 15)
    assert ((w - found.dense()).abs()[inside] <= scale[inside] * (0.5 + 1e-4)).all()
    assert found.values.max() == 15
    assert found.zero.dtype == torch.uint8


@pytest.mark.parametrize("group", GROUPS)
def test_asymmetric_int4_keeps_zero_exact(group):
    w = weight()
    w[:, ::5] = 0
    found = quantize(w, "int4", group=group, symmetric=False)
    assert (found.dense()[w == 0] == 0).all()


@pytest.mark.parametrize("group", GROUPS)
def test_symmetric_int4_is_off_by_half_a_scale_inside_of_its_range(group):
    w = weight()
    found = quantize(w, "int4", group=group)
    scale = spread(found.scale, group)
    inside = (found.values > 0) & (found.values < 15)
    assert ((w - found.dense()).abs()[inside] <= scale.abs()[inside] * (0.5 + 1e-4)).all()
    assert found.zero is None
    assert inside.float().mean() > 0.7


@pytest.mark.parametrize("group", GROUPS)
def test_the_search_is_never_worse_than_the_plain_scales(group):
    w = weight(spread=False)
    grouped = w.reshape(24, -1, group)
    error = (quantize(w, "int4", group=group).dense().reshape_as(grouped) - grouped).square().sum(2)
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    for plain in (largest / -8, largest.abs() / 7):
        step = plain.half().float()
        q = (grouped / torch.where(step != 0, step, 1.0)).round().clamp(-8, 7)
        base = (q * step - grouped).square().sum(2)
        assert (error <= base * (1 + 1e-5) + 1e-20).all()
        assert error.sum() < 0.999 * base.sum()


@pytest.mark.parametrize(
    ("format", "tolerance"), [("fp32", 0), ("bf16", 0), ("int8", 1e-6), ("int4", 2e-3)]
)
def test_bringing_what_is_in_a_format_into_it_again_changes_nothing(format, tolerance):
    once = quantize(weight(spread=False), format, group=32, symmetric=False).dense()
    again = quantize(once, format, group=32, symmetric=False).dense()
    assert (again - once).abs().max() <= tolerance * once.abs().max()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros_and_signs_signs(format, symmetric):
    w = torch.zeros(4, 64)
    w[1] = -1.0
    w[2, 5] = 3.0
    w[3, 7] = 1e-7  # smaller than any float16 scale
    found = quantize(w, format, group=32, symmetric=symmetric).dense()
    assert torch.isfinite(found).all()
    assert (found[0] == 0).all()
    assert torch.allclose(found[1], w[1], rtol=1e-3)
    assert torch.allclose(found[2], w[2], rtol=1e-3)


def test_int8_and_int4_have_the_error_of_torchao():
    primitives = pytest.importorskip(
        "torchao.quantization.quant_primitives", reason="torchao, the reference, is not installed"
    )
    kind = primitives.MappingType
    w = weight()

    def theirs(block, mapping, low, high, dtype):
        scale, zero = primitives.choose_qparams_affine(
            w, mapping, block, dtype, low, high, eps=1e-12
        )
        q = primitives.quantize_affine(w, block, scale, zero, dtype, low, high)
        return q, primitives.dequantize_affine(q, block, scale, zero, dtype, low, high)

    q, dense = theirs((1, 256), kind.SYMMETRIC_NO_CLIPPING_ERR, -127, 127, torch.int8)
    ours = quantize(w, "int8")
    assert (q.int() - ours.values.int()).abs().max() <= 1  # ties
    assert (q != ours.values).float().mean() < 1e-3
    assert (ours.dense() - dense).abs().max() < 1.01 * ours.scale.max()
    for group in GROUPS:
        _, dense = theirs((1, group), kind.ASYMMETRIC, 0, 15, torch.uint8)
        errors = [
            (quantize(w, "int4", group=group, symmetric=symmetric).dense() - w).square().mean()
            for symmetric in (True, False)
        ]
        assert float(errors[1]) == pytest.approx(float((dense - w).square().mean()), rel=0.02)
        _, dense = theirs((1, group), kind.SYMMETRIC, -8, 7, torch.int8)
        assert errors[0] < (dense - w).square().mean()


def test_stacking_and_choosing_rows():
    for format in FORMATS:
        a, b = (quantize(weight(8, seed=s), format, group=32, symmetric=False) for s in (1, 2))
        both = Matrix.stack([a, b])
        assert both.shape == (16, 256)
        assert torch.equal(both.dense(), torch.cat([a.dense(), b.dense()]))
        order = torch.tensor([3, 15, 0, 0])
        assert torch.equal(both.rows(order).dense(), both.dense()[order])


def test_stacking_different_formats_is_refused():
    a, b = quantize(weight(), "int4", group=32), quantize(weight(), "int4", group=64)
    with pytest.raises(UserError, match="different formats"):
        Matrix.stack([a, b])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(format, bad):
    w = weight()
    w[3, 100] = bad
    with pytest.raises(UserError, match=r"model\.layers\.7\.weight holds NaN or infinity"):
        quantize(w, format, name="model.layers.7.weight")


def test_a_group_that_does_not_divide_k_is_refused_with_those_that_do():
    with pytest.raises(
        UserError, match=r"gate has K = 96, which group_size 128 .*use group_size 32$"
    ):
        quantize(torch.ones(4, 96), "int4", name="gate")
    with pytest.raises(UserError, match="use int8: no group_size divides it"):
        quantize(torch.ones(4, 72), "int4")


def test_unknown_formats_groups_and_shapes_are_refused():
    with pytest.raises(UserError, match="Did you mean 'int4'"):
        quantize(weight(), "int44")
    with pytest.raises(UserError, match="group_size must be one of 32, 64, 128, not 48"):
        check_format("int4", 48)
    with pytest.raises(UserError, match=r"must be a matrix \[N, K\], not of shape \[4\]"):
        quantize(torch.ones(4), "int8")


def test_default_head():
    assert [default_head(f) for f in FORMATS] == ["fp32", "bf16", "int8", "int8"]


def test_the_weight_is_left_as_it_was():
    w = weight()
    before = w.clone()
    for format in FORMATS:
        quantize(w.requires_grad_(), format, group=64)
    assert torch.equal(w.detach(), before)
