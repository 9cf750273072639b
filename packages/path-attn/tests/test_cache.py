"""The cache: pieces equal one pass; taking back, reordering and repeating rows; what it costs."""

import itertools

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from path_attn import (
    PaTHKVCache,
    global_path_attention,
    naive_path_attention,
    path_attention,
    path_attention_decode,
)
from path_attn.cache import FOLD
from path_attn.decoding import PAST_QUERIES, _scores
from tenfold_common import UserError
from tenfold_common.testing import assert_matches_reference

# Float64 sums over at most 330 keys and as many products of K x K matrices, none expanding:
# about 1e4 operations of 1.1e-16 each, times 10.
TIGHT = 1e-11


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def make(B=2, T=9, HQ=2, H=1, K=5, V=4, R=None, gates=True, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    steps = () if R is None else (R,)
    w = normalize(rand(B, T, H, *steps, K), dim=-1)
    beta = 1.99 * torch.sigmoid(2 * rand(B, T, H, *steps))
    g = logsigmoid(rand(B, T, HQ) + 2) if gates else None
    inputs = (rand(B, T, HQ, K), rand(B, T, H, K), rand(B, T, H, V), w, beta, g)
    return tuple(None if x is None else x.to(dtype) for x in inputs)


def part(inputs, start, stop=None):
    return tuple(None if x is None else x[:, start:stop] for x in inputs)


def join(*inputs):
    return tuple(None if x[0] is None else torch.cat(x, 1) for x in zip(*inputs, strict=True))


def take(inputs, index):
    return tuple(None if x is None else x[index] for x in inputs)


def feed(inputs, pieces, cache, mask=None, **options):
    """Outputs of all tokens, given `pieces` tokens at a time; the rest one by one."""
    outs, start, total = [], 0, inputs[0].shape[1]
    for size in itertools.chain(pieces, itertools.repeat(1)):
        if start == total:
            return torch.cat(outs, 1)
        stop = min(start + size, total)
        given = None if mask is None else mask[:, start:stop]
        out, same = path_attention(
            *part(inputs, start, stop), cache=cache, attention_mask=given, **options
        )
        assert same is cache
        outs.append(out)
        start = stop


def oracle(inputs, mask=None, **options):
    """Row by row over the real tokens; 0 at masked ones."""
    q, k, v, w, beta, g = inputs
    if w is None:
        w, beta = torch.zeros_like(k), torch.zeros_like(k[..., 0])
    inputs = (q, k, v, w, beta, g)
    if mask is None:
        return global_path_attention(*inputs, **options)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for b, keep in enumerate(mask.bool()):
        if keep.any():
            row = [None if x is None else x[b : b + 1, keep] for x in inputs]
            out[b, keep] = global_path_attention(*row, **options)[0]
    return out


def assert_close(seen, expected, tolerance=TIGHT):
    torch.testing.assert_close(seen, expected, atol=tolerance, rtol=0)


PIECES = {
    "one-by-one": [],
    "all-at-once": [1000],
    "prefill-then-steps": [100],
    "odd": [3, 1, 70, 1, 1, 33, 2, 17],
    "eights": [8] * 30,
    "nines": [9] * 30,
    "fold-sized": [FOLD] * 4,
    "beyond-a-fold": [FOLD + 1, FOLD - 1, 1, 40],
}
KINDS = {
    "path": ({}, {}),
    "fox": ({"gates": True}, {}),
    "two-reflections": ({"R": 2, "gates": True}, {}),
    "plain": ({"w": None}, {}),
    "plain-fox": ({"w": None, "gates": True}, {}),
    "window": ({"gates": True}, {"window": 20}),
    "wide-window": ({}, {"window": 110}),
    "softcap": ({"gates": True}, {"softcap": 0.8}),
    "fla": ({"gates": True}, {"gate_scale": "fla", "scale": 0.3}),
    "gqa": ({"HQ": 6, "H": 2, "gates": True}, {}),
    "wide-values": ({"K": 3, "V": 11}, {}),
}


def make_kind(kind, T=200, **more):
    shape, options = KINDS[kind]
    shape = {"gates": False, **shape}
    without = shape.pop("w", "given") is None
    q, k, v, w, beta, g = make(T=T, **shape, **more)
    return (q, k, v, None, None, g) if without else (q, k, v, w, beta, g), options


def padding(kind, B=4, T=200):
    position = torch.arange(T)
    gen = torch.Generator().manual_seed(3)
    holes = torch.rand(B, T, generator=gen) < 0.6
    return {
        "left": position >= torch.tensor([[0], [5], [80], [T - 1]]),
        "right": position < torch.tensor([[T], [5], [80], [1]]),
        "holes": holes,
        "empty-row": holes & (torch.arange(B) != 1)[:, None],
        "late-start": holes & (position >= 150),
    }[kind]


# -- pieces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_pieces_equal_one_pass(kind, pieces):
    inputs, options = make_kind(kind)
    cache = PaTHKVCache()
    assert_close(feed(inputs, pieces, cache, **options), oracle(inputs, **options))
    assert cache.length == 200
    assert cache.lengths.tolist() == [200, 200]


@pytest.mark.parametrize("keep_open", [0, 1, 7, 64, 100])
@pytest.mark.parametrize("pieces", ["one-by-one", "odd", "prefill-then-steps"])
def test_keep_open_does_not_change_the_result(keep_open, pieces):
    inputs, options = make_kind("fox")
    cache = PaTHKVCache(keep_open=keep_open)
    assert_close(feed(inputs, PIECES[pieces], cache, **options), oracle(inputs, **options))


@pytest.mark.parametrize("padded", ["left", "right", "holes", "empty-row", "late-start"])
@pytest.mark.parametrize("pieces", ["prefill-then-steps", "odd", "fold-sized"])
@pytest.mark.parametrize("kind", ["fox", "window", "softcap", "plain", "two-reflections"])
def test_any_pieces_under_any_mask(kind, pieces, padded):
    inputs, options = make_kind(kind, B=4)
    mask = padding(padded)
    cache = PaTHKVCache()
    out = feed(inputs, PIECES[pieces], cache, mask, **options)
    assert_close(out, oracle(inputs, mask, **options))
    assert cache.lengths.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("kind", ["fox", "window"])
def test_rows_of_different_length_go_on_together(kind):
    """Right-padded prompts, then steps without a mask: no row sees another's padding."""
    inputs, options = make_kind(kind, B=4, T=120)
    mask = padding("right", T=90)
    mask = torch.cat([mask, torch.ones(4, 30, dtype=torch.bool)], 1)
    cache = PaTHKVCache()
    first = feed(part(inputs, 0, 90), [90], cache, mask[:, :90], **options)
    rest = feed(part(inputs, 90), [7], cache, **options)
    assert_close(torch.cat([first, rest], 1), oracle(inputs, mask, **options))


def test_a_mask_can_come_late():
    inputs, _ = make_kind("fox", B=4, T=160)
    mask = torch.cat([torch.ones(4, 100, dtype=torch.bool), padding("holes", T=60)], 1)
    cache = PaTHKVCache()
    first = feed(part(inputs, 0, 100), [70], cache)
    rest = feed(part(inputs, 100), [30], cache, mask[:, 100:])
    assert_close(torch.cat([first, rest], 1), oracle(inputs, mask))


def test_garbage_under_the_mask_does_not_reach_the_cache():
    inputs, _ = make_kind("fox", B=4)
    mask = padding("holes")
    dirty = [x.masked_fill(~mask.view(4, 200, *[1] * (x.dim() - 2)), float("nan")) for x in inputs]
    out = feed(dirty, [100, 9], PaTHKVCache(), mask)
    assert_close(out, oracle(inputs, mask))


@pytest.mark.parametrize("pieces", ["one-by-one", "prefill-then-steps", "odd"])
def test_decode_is_the_same_operation(pieces):
    inputs, _ = make_kind("fox")
    cache = PaTHKVCache()
    path_attention(*part(inputs, 0, 10), cache=cache)
    outs, start = [], 10
    for size in itertools.chain(PIECES[pieces], itertools.repeat(1)):
        if start == 200:
            break
        stop = min(200, start + size)
        outs.append(path_attention_decode(*part(inputs, start, stop), cache=cache))
        start = stop
    assert_close(torch.cat(outs, 1), oracle(inputs)[:, 10:])


def test_decode_passes_every_option_on():
    inputs, _ = make_kind("fox", B=4, T=60)
    mask = padding("holes", T=60)
    options = {"gate_scale": "fla", "window": 9, "softcap": 0.7, "scale": 0.4, "max_beta": 1.1}
    cache = PaTHKVCache()
    path_attention(*part(inputs, 0, 40), cache=cache, attention_mask=mask[:, :40], **options)
    outs = [
        path_attention_decode(
            *part(inputs, t, t + 1), cache=cache, attention_mask=mask[:, t : t + 1], **options
        )
        for t in range(40, 60)
    ]
    del options["max_beta"]
    inputs = (*inputs[:4], inputs[4].clamp(max=1.1), inputs[5])
    assert_close(torch.cat(outs, 1), oracle(inputs, mask, **options)[:, 40:])


def test_many_keys_at_once():
    """More keys than one piece of a fold handles."""
    q, k, v, w, beta, _ = make(B=1, T=4300, HQ=1, K=8, gates=False)
    inputs = (q, k, v, w, torch.full_like(beta, 2.0), None)  # no key shrinks on its way
    cache = PaTHKVCache()
    path_attention(*part(inputs, 0, 4200), cache=cache)
    out = feed(part(inputs, 4200), [], cache)
    whole = path_attention(*inputs)[0]
    assert_close(out, whole[:, 4200:])


def test_outputs_have_the_dtype_of_q_and_stay_close_in_bfloat16():
    q, k, v, w, beta, g = make(B=1, T=150, K=16, V=16, dtype=torch.float32)
    low = (q.bfloat16(), k.bfloat16(), v.bfloat16(), w, beta, g)
    out = feed(low, [40], PaTHKVCache())
    assert out.dtype == torch.bfloat16
    exact = oracle([x.double() for x in low])
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(torch.bfloat16).eps  # o, and keys rounded at two folds


@pytest.mark.parametrize("pieces", [[], [20] * 25])
def test_strong_gates_over_many_steps_stay_exact_in_float32(pieces):
    """The gates add up to -2000; sums kept from the start would cost four digits."""
    q, k, v, w, beta, g = make(B=1, T=500, dtype=torch.float32)
    inputs = (q, k, v, w, beta, g - 12.0 * (torch.arange(500) % 3 == 0)[None, :, None])
    out = feed(inputs, pieces, PaTHKVCache())
    exact = oracle([x.double() for x in inputs])
    assert (out - exact).norm() / exact.norm() < 3e-6


def test_bfloat16_steps_are_at_most_twice_as_far_off_as_the_definition_in_bfloat16():
    q, k, v, w, beta, g = make(B=1, T=110, K=16, V=16, dtype=torch.bfloat16)
    inputs = (q * 4, k, v, w, beta.clamp(max=1.9), g)  # sharp weights show rounded logits
    seen = feed(inputs, [50], PaTHKVCache())
    low = naive_path_attention(*inputs)
    assert_matches_reference(seen, oracle([x.double() for x in inputs]), low, name="o")


# -- state ------------------------------------------------------------------------------------


def test_the_cache_keeps_copies():
    inputs, _ = make_kind("fox")
    expected = oracle(inputs)
    cache = PaTHKVCache(history=True)
    for start in range(0, 200, 25):
        given = [x.clone() for x in part(inputs, start, start + 25)]
        out, _ = path_attention(*given, cache=cache)
        assert_close(out, expected[:, start : start + 25])
        for x in given:
            x.fill_(float("nan"))


def test_two_caches_share_nothing():
    one, other = make(T=150), make(T=150, seed=1)
    caches = PaTHKVCache(), PaTHKVCache()
    outs = [[], []]
    for t in range(150):
        for cache, inputs, out in zip(caches, (one, other), outs, strict=True):
            out.append(path_attention(*part(inputs, t, t + 1), cache=cache)[0])
    assert_close(torch.cat(outs[0], 1), oracle(one))
    assert_close(torch.cat(outs[1], 1), oracle(other))


def test_what_the_cache_holds_carries_no_gradient():
    """Prefill inside a graph is allowed; the steps after it must not drag that graph along."""
    with torch.enable_grad():
        first = [x.requires_grad_() for x in make(T=100)]
        out, cache = path_attention(*first, return_cache=True)
        assert out.requires_grad
        for t in range(20):
            out, _ = path_attention(*make(T=1, seed=t), cache=cache)
            assert not out.requires_grad


def test_inference_mode():
    inputs = make(T=120)
    with torch.inference_mode():
        out = feed(inputs, [90, 12], PaTHKVCache())
    assert_close(out, oracle(inputs))


def test_flush_moves_all_keys_to_the_end_and_changes_no_result():
    inputs = make(T=150)
    cache = PaTHKVCache()
    first = feed(part(inputs, 0, 100), [77], cache)
    cache.flush()
    _, k, _, w, beta, _ = part(inputs, 0, 100)
    keys = k.clone()
    for t in range(1, 100):
        direction, strength = w[:, t : t + 1], beta[:, t : t + 1, :, None]
        keys[:, :t] -= strength * direction * (direction * keys[:, :t]).sum(-1, keepdim=True)
    assert_close(cache.folded_keys.transpose(1, 2), keys)
    rest = feed(part(inputs, 100), [], cache)
    assert_close(torch.cat([first, rest], 1), oracle(inputs))


def test_old_keys_are_read_only_between_folds():
    """The point of folding lazily: a step writes no folded key."""
    inputs = make(T=300, dtype=torch.float32)
    cache = PaTHKVCache()
    path_attention(*part(inputs, 0, 128), cache=cache)
    changes, before = 0, cache.folded_keys.clone()
    for t in range(128, 300):
        path_attention(*part(inputs, t, t + 1), cache=cache)
        after = cache.folded_keys.clone()
        changes += after.shape != before.shape or not torch.equal(after, before)
        before = after
    assert 1 <= changes <= 172 // FOLD + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_that_of_keys_and_values(dtype):
    def held(T, **settings):
        q, k, v, w, beta, _ = make(B=1, T=T, HQ=2, H=2, K=64, V=64, gates=False, dtype=dtype)
        cache = PaTHKVCache(**settings)
        path_attention(q, k, v, w, beta, cache=cache)
        return cache.nbytes

    keys_and_values = 2 * 2048 * 2 * 64 * dtype.itemsize
    assert keys_and_values < held(2048) < 1.5 * keys_and_values
    assert 1.5 * held(1024) < held(2048) < 2.2 * held(1024)
    assert 1.3 * held(2048) < held(2048, history=True) < 2.5 * held(2048)


@pytest.mark.parametrize("T", [300, 600, 1100])
def test_memory_after_many_steps_stays_within_twice_the_contents(T):
    inputs = make(B=1, T=T, HQ=1, K=16, V=16, gates=False, dtype=torch.float32)
    cache = PaTHKVCache()
    feed(inputs, [], cache)
    walk_and_open = (16 + 96) * 16 * 4 + 96 * (16 + 16 + 1) * 4
    assert cache.nbytes < 2 * (2 * T * 16 * 4) + walk_and_open


def test_keys_drift_less_than_when_rewritten_every_step():
    """Random data, 1300 steps, d = 64, bfloat16: at most 1 % against about 4 %."""
    T = 1300
    q, k, v, w, beta, _ = make(B=1, T=T, HQ=1, H=1, K=64, V=1, gates=False)
    low = [x.bfloat16() for x in (q, k, v)]
    exact = low[1][0, :, 0].double()
    rewritten = low[1][0, :, 0].clone()
    cache = PaTHKVCache()
    for t in range(T):
        direction, strength = w[0, t, 0].float().double(), beta[0, t, 0].float().double()
        exact[:t] -= strength * torch.outer(exact[:t] @ direction, direction)
        moved = rewritten[:t].float()
        moved -= strength.float() * torch.outer(moved @ direction.float(), direction.float())
        rewritten[:t] = moved.bfloat16()
        path_attention(
            *(x[:, t : t + 1] for x in low),
            w[:, t : t + 1].float(),
            beta[:, t : t + 1].float(),
            cache=cache,
        )
    cache.flush()
    lazy = cache.folded_keys[0, 0].double()

    def drift(keys):  # mean over the keys: late ones are long, early ones have shrunk
        return ((keys.double() - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()

    assert cache.folded_keys.dtype == torch.bfloat16
    assert drift(lazy) <= 0.01
    assert drift(rewritten) > 0.03
    assert drift(lazy) < drift(rewritten) / 4


# -- crop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", ["odd", "all-at-once"])
@pytest.mark.parametrize("back", [1, 32])
def test_crop_is_as_if_the_tokens_had_never_come(kind, pieces, back):
    inputs, options = make_kind(kind, T=160)
    other, _ = make_kind(kind, T=100, seed=8)
    cache = PaTHKVCache()
    feed(inputs, PIECES[pieces], cache, **options)
    cache.crop(160 - back)
    assert cache.length == 160 - back
    assert cache.lengths.tolist() == [160 - back] * 2
    seen = feed(other, [3, 30], cache, **options)
    whole = join(part(inputs, 0, 160 - back), other)
    assert_close(seen, oracle(whole, **options)[:, 160 - back :])


@pytest.mark.parametrize("T", [1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 150, 161])
@pytest.mark.parametrize("pieces", ["one-by-one", "all-at-once", "eights", "nines"])
def test_keep_open_tokens_can_always_be_taken_back(T, pieces):
    inputs = make(T=T)
    cache = PaTHKVCache(keep_open=32)
    feed(inputs, PIECES[pieces], cache)
    left = max(0, T - 32)
    cache.crop(left)
    again = feed(part(inputs, left), [], cache)
    assert_close(again, oracle(inputs)[:, left:])


@pytest.mark.parametrize("length", [1, 63, 64, 65, 199])
@pytest.mark.parametrize("kind", ["fox", "two-reflections", "plain-fox", "window"])
def test_with_history_any_length_can_be_cropped_to(kind, length):
    inputs, options = make_kind(kind)
    other, _ = make_kind(kind, T=40, seed=8)
    for pieces in ([100, *[8] * 13], [150]):
        cache = PaTHKVCache(history=True)
        feed(inputs, pieces, cache, **options)
        cache.crop(length)
        assert cache.length == length
        seen = feed(other, [2], cache, **options)
        whole = join(part(inputs, 0, length), other)
        assert_close(seen, oracle(whole, **options)[:, length:])


def test_history_forgets_what_was_cropped():
    """Crop within the open tokens, go on differently until that is folded, crop once more."""
    inputs, other = make(T=200), make(T=150, seed=8)
    cache = PaTHKVCache(history=True)
    feed(inputs, [], cache)
    cache.crop(180)
    feed(part(other, 0, 140), [], cache)
    cache.crop(200)
    seen = feed(part(other, 140), [], cache)
    whole = join(part(inputs, 0, 180), part(other, 0, 20), part(other, 140))
    assert_close(seen, oracle(whole)[:, 200:])


@pytest.mark.parametrize("history", [False, True])
def test_crop_of_padded_rows(history):
    inputs, options = make_kind("fox", B=4)
    mask = padding("holes")
    other, _ = make_kind("fox", B=4, T=20, seed=8)
    cache = PaTHKVCache(history=history)
    feed(inputs, [90, 1, 50], cache, mask, **options)
    length = 60 if history else 175
    cache.crop(length)
    assert cache.lengths.tolist() == mask[:, :length].sum(1).tolist()
    seen = feed(other, [4], cache, **options)
    mask = torch.cat([mask[:, :length], torch.ones(4, 20, dtype=torch.bool)], 1)
    whole = join(part(inputs, 0, length), other)
    assert_close(seen, oracle(whole, mask, **options)[:, length:])


def test_crop_twice_and_crop_after_crop_and_growth():
    inputs = make(T=300)
    cache = PaTHKVCache(history=True)
    feed(part(inputs, 0, 200), [], cache)
    cache.crop(150)
    cache.crop(70)
    feed(part(inputs, 70, 180), [60], cache)
    cache.crop(100)
    assert_close(feed(part(inputs, 100), [], cache), oracle(inputs)[:, 100:])


@pytest.mark.parametrize("history", [False, True])
def test_crop_to_nothing_is_a_fresh_cache(history):
    cache = PaTHKVCache(history=history)
    feed(make(B=3, T=100, K=7), [], cache)
    cache.crop(0)
    assert (cache.length, cache.batch, cache.nbytes) == (0, 0, 0)
    inputs = make(T=80, gates=False, dtype=torch.float64)  # another shape, other options
    assert_close(feed(inputs, [5], cache, gate_scale="fla"), oracle(inputs))


def test_crop_beyond_what_is_open_is_refused_and_changes_nothing():
    inputs = make(T=300)
    cache = PaTHKVCache()
    feed(part(inputs, 0, 200), [], cache)
    with pytest.raises(UserError, match=r"crop to 10 .*history=True") as caught:
        cache.crop(10)
    assert "200" in str(caught.value)
    assert cache.length == 200
    assert_close(feed(part(inputs, 200), [], cache), oracle(inputs)[:, 200:])


def test_crop_to_a_negative_length_is_refused():
    cache = PaTHKVCache()
    feed(make(T=5), [], cache)
    with pytest.raises(UserError, match="-1"):
        cache.crop(-1)
    assert cache.length == 5


def test_crop_to_more_than_is_held_is_refused():
    cache = PaTHKVCache()
    feed(make(T=70), [70], cache)
    with pytest.raises(UserError, match="cannot crop 70 tokens to 71"):
        cache.crop(71)
    assert cache.length == 70


def test_crop_to_the_present_length_changes_nothing():
    inputs = make(T=90)
    cache = PaTHKVCache()
    feed(part(inputs, 0, 70), [50], cache)
    cache.crop(70)
    assert cache.length == 70
    assert_close(feed(part(inputs, 70), [], cache), oracle(inputs)[:, 70:])


# -- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("index", [[2, 2, 0], [1]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reorder(kind, index, history):
    inputs, options = make_kind(kind, B=3, T=130)
    index = torch.tensor(index)
    more, _ = make_kind(kind, B=len(index), T=70, seed=8)
    cache = PaTHKVCache(history=history)
    feed(inputs, [90], cache, **options)
    cache.reorder(index)
    assert cache.batch == len(index)
    seen = feed(more, [3, 1], cache, **options)  # copies of one row go different ways
    whole = join(take(inputs, index), more)
    assert_close(seen, oracle(whole, **options)[:, 130:])


def test_reorder_takes_masks_and_extra_state_along():
    inputs, _ = make_kind("fox", B=4)
    mask = padding("holes")
    cache = PaTHKVCache(history=True)
    feed(part(inputs, 0, 150), [90], cache, mask[:, :150])
    cache.extra["window"] = torch.arange(4.0)[:, None]
    index = torch.tensor([3, 0, 0, 2])
    cache.reorder(index)
    assert cache.extra["window"].flatten().tolist() == [3, 0, 0, 2]
    assert cache.lengths.tolist() == mask[index, :150].sum(1).tolist()
    cache.crop(70)
    mask = torch.cat([mask[index, :70], mask[:, 150:]], 1)
    more = part(inputs, 150)
    whole = join(part(take(inputs, index), 0, 70), more)
    assert_close(feed(more, [], cache, mask[:, 70:]), oracle(whole, mask)[:, 70:])


def test_repeat_puts_copies_side_by_side():
    inputs, _ = make_kind("fox", T=120)
    cache = PaTHKVCache()
    feed(inputs, [90], cache)
    cache.extra["window"] = torch.tensor([[1.0], [2.0]])
    cache.repeat(3)
    assert cache.batch == 6
    assert cache.extra["window"].flatten().tolist() == [1, 1, 1, 2, 2, 2]
    more, _ = make_kind("fox", B=6, T=50, seed=8)
    whole = join(take(inputs, torch.tensor([0, 0, 0, 1, 1, 1])), more)
    assert_close(feed(more, [2], cache), oracle(whole)[:, 120:])


def test_beam_search_loop():
    """Reorder before every step, as generate does."""
    gen = torch.Generator().manual_seed(4)
    inputs, _ = make_kind("fox", B=3, T=100)
    history = part(inputs, 0, 40)
    cache = PaTHKVCache()
    path_attention(*history, cache=cache)
    for t in range(40, 100):
        index = torch.randint(0, 3, (3,), generator=gen)
        cache.reorder(index)
        history = join(take(history, index), part(inputs, t, t + 1))
        out, _ = path_attention(*part(inputs, t, t + 1), cache=cache)
        if t % 7 == 0:
            assert_close(out, oracle(history)[:, -1:])


# -- what does not fit ------------------------------------------------------------------------


def filled():
    inputs = make(B=2, T=40, HQ=4, H=2, K=6, V=5, dtype=torch.float32)
    cache = PaTHKVCache()
    path_attention(*inputs, cache=cache)
    return cache


MISFITS = {
    "dtype": ({"dtype": torch.float64}, {}, r"float32.*float64"),
    "rows": ({"B": 3}, {}, r"rows.* 2.* 3"),
    "key-heads": ({"H": 1}, {}, r"heads.* 2.* 1"),
    "query-heads": ({"HQ": 2}, {}, r"heads.* 4.* 2"),
    "head-dim": ({"K": 8}, {}, r" 6.* 8"),
    "value-dim": ({"V": 8}, {}, r" 5.* 8"),
    "no-gates": ({"gates": False}, {}, r"gate"),
    "gate-scale": ({}, {"gate_scale": "fla"}, r"gate_scale.*paper.*fla"),
    "no-reflections": ({"w": None}, {}, r"w|reflection|direction"),
}


@pytest.mark.parametrize("call", [path_attention, path_attention_decode])
@pytest.mark.parametrize("T", [1, 3, 20])
@pytest.mark.parametrize("misfit", MISFITS)
def test_inputs_that_do_not_fit_are_refused_and_leave_the_cache_alone(misfit, T, call):
    shape, options, message = MISFITS[misfit]
    shape = {"B": 2, "HQ": 4, "H": 2, "K": 6, "V": 5, "dtype": torch.float32, **shape}
    without = shape.pop("w", "given") is None
    inputs = make(T=T, seed=5, **shape)
    if without:
        inputs = (*inputs[:3], None, None, inputs[5])
    cache, control = filled(), filled()
    with pytest.raises(UserError, match=message):
        call(*inputs, cache=cache, **options)
    good = make(B=2, T=3, HQ=4, H=2, K=6, V=5, dtype=torch.float32, seed=6)
    assert cache.length == 40
    expected, _ = path_attention(*good, cache=control)
    assert torch.equal(path_attention(*good, cache=cache)[0], expected)


@pytest.mark.parametrize("T", [1, 20])
def test_gates_cannot_join_an_ungated_cache(T):
    inputs = make(T=30, gates=False)
    cache = PaTHKVCache()
    path_attention(*inputs, cache=cache)
    with pytest.raises(UserError, match="gate"):
        path_attention(*make(T=T), cache=cache)


@pytest.mark.parametrize("T", [1, 20])
def test_reflections_cannot_join_a_plain_cache(T):
    q, k, v, _, _, g = make(T=30)
    cache = PaTHKVCache()
    path_attention(q, k, v, None, None, g, cache=cache)
    with pytest.raises(UserError, match=r"w|reflection|direction"):
        path_attention(*make(T=T), cache=cache)


@pytest.mark.parametrize("T", [1, 20])
def test_gradients_into_a_filled_cache_are_refused(T):
    cache = PaTHKVCache()
    path_attention(*make(T=30), cache=cache)
    inputs = [x.requires_grad_() for x in make(T=T)]
    with torch.enable_grad(), pytest.raises(UserError, match="no_grad"):
        path_attention(*inputs, cache=cache)


def test_decoding_needs_a_filled_cache():
    with pytest.raises(UserError, match=r"empty.*prefill"):
        path_attention_decode(*make(T=1), cache=PaTHKVCache())


@pytest.mark.parametrize("options", [{"cache": PaTHKVCache()}, {"return_cache": True}], ids=str)
def test_the_reference_has_no_cache(options):
    with pytest.raises(UserError, match="reference"):
        path_attention(*make(), backend="reference", **options)


def test_negative_keep_open_is_refused():
    with pytest.raises(UserError, match=r"keep_open.*-1"):
        PaTHKVCache(keep_open=-1)


@pytest.mark.parametrize("index", [[0, 2], [-1, 0]], ids=str)
def test_rows_that_do_not_exist_are_refused(index):
    cache = PaTHKVCache()
    path_attention(*make(B=2, T=5), cache=cache)
    with pytest.raises((UserError, IndexError)):
        cache.reorder(torch.tensor(index))
    assert cache.batch == 2


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 60])
def test_many_padded_tokens_after_a_filled_cache(softcap, window):
    """More new tokens than meet the past at once."""
    total = PAST_QUERIES + 90
    inputs = make(T=total, HQ=2, H=1)
    mask = torch.ones(2, total, dtype=torch.bool)
    mask[1, :20] = False
    options = {"softcap": softcap, "window": window}
    seen = feed(inputs, [60, total - 60], PaTHKVCache(), mask, **options)
    assert_close(seen, oracle(inputs, mask, **options))


def test_a_cache_of_inference_mode_says_how_to_go_on():
    inputs = make(T=20)
    cache = PaTHKVCache()
    with torch.inference_mode():
        path_attention(*part(inputs, 0, 10), cache=cache)
    with pytest.raises(UserError, match="inference_mode"):
        path_attention(*part(inputs, 10, 11), cache=cache)
    with torch.inference_mode():
        seen, _ = path_attention(*part(inputs, 10), cache=cache)
    assert_close(seen, oracle(inputs)[:, 10:])


def test_half_precision_keys_give_logits_in_float32():
    torch.manual_seed(0)
    q, keys = 16 * torch.randn(1, 2, 3, 64), torch.randn(1, 2, 2500, 64).bfloat16()
    exact = q.double() @ keys.double().mT
    error = (_scores(q, keys).double() - exact).abs().max()
    assert error < 64 * 2**-24 * float((q.double().abs() @ keys.double().abs().mT).max())
    assert _scores(q, keys[:, :, :0]).shape == (1, 2, 3, 0)
