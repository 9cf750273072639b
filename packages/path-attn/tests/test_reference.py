"""The oracle itself: hand-worked numbers, closed forms and a second, explicit derivation."""

import math
import random

import pytest
import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

from path_attn import global_path_attention, naive_path_attention

BOTH = pytest.mark.parametrize(
    "attention", [naive_path_attention, global_path_attention], ids=["naive", "global"]
)


def make(B=2, T=9, HQ=2, H=2, K=5, V=4, R=None, gates=False, seed=0):
    """Random float64 inputs q, k, v, w, beta, g; beta covers (0, 2)."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    steps = () if R is None else (R,)
    w = normalize(rand(B, T, H, *steps, K), dim=-1)
    beta = 2 * torch.sigmoid(2 * rand(B, T, H, *steps))
    g = torch.nn.functional.logsigmoid(rand(B, T, HQ)) if gates else None
    return rand(B, T, HQ, K), rand(B, T, H, K), rand(B, T, H, V), w, beta, g


def probabilities(attention, q, k, w, beta, g=None, **options):
    """Softmax weights `[B, HQ, T, T]`, read off with the unit vectors as values."""
    T = q.shape[1]
    v = torch.eye(T, dtype=q.dtype).expand(q.shape[0], k.shape[2], T, T).transpose(1, 2)
    return attention(q, k, v, w, beta, g, **options).transpose(1, 2)


def explicit_logits(q, k, w, beta):
    """A `[B, HQ, T, T]` from K x K matrices: A_ij = k_j^T (H_{j+1} @ ... @ H_i) q_i."""
    if w.dim() == 4:
        w, beta = w.unsqueeze(3), beta.unsqueeze(3)
    B, T, HQ, K = q.shape
    eye = torch.eye(K, dtype=q.dtype)
    logits = torch.full((B, HQ, T, T), -math.inf, dtype=q.dtype)
    for b in range(B):
        for h in range(HQ):
            kv = h // (HQ // k.shape[2])
            for i in range(T):
                for j in range(i + 1):
                    product = eye
                    for t in range(j + 1, i + 1):
                        for r in range(w.shape[3]):
                            direction = w[b, t, kv, r]
                            product = product @ (
                                eye - beta[b, t, kv, r] * torch.outer(direction, direction)
                            )
                    logits[b, h, i, j] = k[b, j, kv] @ product @ q[b, i, h]
    return logits


def hand_worked():
    """d = 2, T = 3. H_1 = diag(-1, 1); H_2 = [[.5, -.5], [-.5, .5]]; H_0 must not matter."""
    half = math.sqrt(0.5)
    rows = {
        "q": [[7.0, 7.0], [1.0, 2.0], [1.0, 0.0]],
        "k": [[2.0, 0.0], [0.0, 4.0], [3.0, 5.0]],
        "w": [[0.6, 0.8], [1.0, 0.0], [half, half]],
    }
    q, k, w = (torch.tensor(rows[n], dtype=torch.float64)[None, :, None] for n in "qkw")
    return q, k, w, torch.tensor([1.3, 2.0, 1.0], dtype=torch.float64)[None, :, None]


# A_10 = k_0^T H_1 q_1 = -2, A_11 = 8,
# A_20 = k_0^T H_1 H_2 q_2 = -1, A_21 = k_1^T H_2 q_2 = -2, A_22 = 3.
HAND_LOGITS = {1: [-2.0, 8.0], 2: [-1.0, -2.0, 3.0]}


def softmax(numbers):
    exps = [math.exp(x) for x in numbers]
    return [x / sum(exps) for x in exps]


@BOTH
def test_hand_worked_numbers(attention):
    weights = probabilities(attention, *hand_worked(), scale=0.25)[0, 0]
    assert weights[0].tolist() == [1.0, 0.0, 0.0]
    for i, logits in HAND_LOGITS.items():
        expected = softmax([x / 4 for x in logits])
        assert weights[i, : i + 1].tolist() == pytest.approx(expected, abs=1e-15)


@BOTH
def test_default_scale_is_one_over_the_root_of_the_head_dim(attention):
    weights = probabilities(attention, *hand_worked())[0, 0, 2].tolist()
    assert weights == pytest.approx(softmax([x / math.sqrt(2) for x in HAND_LOGITS[2]]), abs=1e-15)


@BOTH
@pytest.mark.parametrize(
    ("gate_scale", "expected"),
    [
        ("paper", [-1 / 4 - 0.9, -2 / 4 - 0.4, 3 / 4]),  # sum of log f_s over s = j + 1 .. i
        ("fla", [(-1 - 0.9) / 4, (-2 - 0.4) / 4, 3 / 4]),  # gate added before the scale
    ],
)
def test_hand_worked_gates(attention, gate_scale, expected):
    g = torch.tensor([-3.0, -0.5, -0.4], dtype=torch.float64)[None, :, None]
    weights = probabilities(attention, *hand_worked(), g, scale=0.25, gate_scale=gate_scale)
    assert weights[0, 0, 2].tolist() == pytest.approx(softmax(expected), abs=1e-15)


@BOTH
def test_hand_worked_softcap_comes_after_the_scale_and_before_the_gates(attention):
    g = torch.tensor([-3.0, -0.5, -0.4], dtype=torch.float64)[None, :, None]
    weights = probabilities(attention, *hand_worked(), g, scale=0.25, softcap=0.6)
    capped = [0.6 * math.tanh(x / 4 / 0.6) for x in HAND_LOGITS[2]]
    expected = softmax([x + gate for x, gate in zip(capped, (-0.9, -0.4, 0.0), strict=True)])
    assert weights[0, 0, 2].tolist() == pytest.approx(expected, abs=1e-15)


@BOTH
def test_hand_worked_window(attention):
    weights = probabilities(attention, *hand_worked(), scale=0.25, window=2)[0, 0]
    assert weights[2].tolist() == pytest.approx([0, *softmax([-2 / 4, 3 / 4])], abs=1e-15)
    assert weights[1, :2].tolist() == pytest.approx(softmax([-2 / 4, 8 / 4]), abs=1e-15)


@BOTH
@pytest.mark.parametrize("R", [None, 1, 3])
@pytest.mark.parametrize(("HQ", "H"), [(2, 2), (4, 2), (3, 1)])
def test_against_explicit_matrices(attention, HQ, H, R):
    q, k, v, w, beta, _ = make(B=1, T=6, HQ=HQ, H=H, R=R)
    expected = (explicit_logits(q, k, w, beta) * 0.7).softmax(-1)
    values = v.repeat_interleave(HQ // H, 2).transpose(1, 2)
    out = attention(q, k, v, w, beta, scale=0.7)
    torch.testing.assert_close(out, (expected @ values).transpose(1, 2), atol=1e-13, rtol=0)


@pytest.mark.parametrize("T", [1, 2, 33])
@pytest.mark.parametrize("R", [None, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"softcap": 0.8}, {"gate_scale": "fla", "scale": 0.3}],
    ids=["plain", "window", "softcap", "fla"],
)
def test_naive_equals_global(T, R, options):
    inputs = make(T=T, HQ=4, R=R, gates=True)
    naive = naive_path_attention(*inputs, **options)
    torch.testing.assert_close(global_path_attention(*inputs, **options), naive, atol=1e-12, rtol=0)


@BOTH
def test_beta_zero_is_plain_softmax_attention(attention):
    q, k, v, w, beta, _ = make(T=17, HQ=4)
    expected = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    for w_used, beta_used in ((w, beta * 0), (w * 0, beta)):
        out = attention(q, k, v, w_used, beta_used)
        torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-13, rtol=0)


@BOTH
def test_open_gates_change_nothing(attention):
    q, k, v, w, beta, _ = make()
    closed = attention(q, k, v, w, beta, torch.zeros(*q.shape[:3], dtype=q.dtype))
    assert torch.equal(closed, attention(q, k, v, w, beta))


@BOTH
def test_single_full_reflection_mirrors_the_query(attention):
    q, k, _, w, _, _ = make(B=1, T=2, HQ=1, H=1, K=3)
    beta = torch.full((1, 2, 1), 2.0, dtype=q.dtype)
    mirrored = q[0, 1, 0] - 2 * (q[0, 1, 0] @ w[0, 1, 0]) * w[0, 1, 0]
    expected = torch.stack([k[0, 0, 0] @ mirrored, k[0, 1, 0] @ q[0, 1, 0]]).softmax(0)
    weights = probabilities(attention, q, k, w, beta, scale=1.0)[0, 0, 1]
    torch.testing.assert_close(weights, expected, atol=1e-14, rtol=0)


@BOTH
def test_beta_one_projects_the_direction_away(attention):
    q, k, _, w, beta, _ = make(B=1, T=2, HQ=1, H=1, K=3)
    q = q.clone()
    q[0, 1, 0] = w[0, 1, 0] * 4  # nothing of it survives H_1, so A_10 = 0
    weights = probabilities(attention, q, k, w, torch.ones_like(beta), scale=1.0)[0, 0, 1]
    expected = torch.stack([torch.zeros((), dtype=q.dtype), k[0, 1, 0] @ q[0, 1, 0]]).softmax(0)
    torch.testing.assert_close(weights, expected, atol=1e-14, rtol=0)


@BOTH
def test_two_reflections_make_rope_in_one_plane(attention):
    """H_{t,1} H_{t,2} with directions at angles a and 0 rotates by 2 a in the plane."""
    T, angle = 12, 0.37
    q, k, v, _, _, _ = make(B=1, T=T, HQ=1, H=1, K=2)
    first = torch.tensor([math.cos(angle / 2), math.sin(angle / 2)], dtype=q.dtype)
    second = torch.tensor([1.0, 0.0], dtype=q.dtype)
    w = torch.stack([first, second]).expand(1, T, 1, 2, 2)
    out = attention(q, k, v, w, torch.full((1, T, 1, 2), 2.0, dtype=q.dtype))

    def rope(x):
        turn = torch.arange(T, dtype=q.dtype)[None, :, None] * angle
        a, b = x[..., 0], x[..., 1]
        return torch.stack(
            [a * turn.cos() - b * turn.sin(), a * turn.sin() + b * turn.cos()], dim=-1
        ).transpose(1, 2)

    expected = scaled_dot_product_attention(rope(q), rope(k), v.transpose(1, 2), is_causal=True)
    torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-13, rtol=0)


@BOTH
def test_transpositions_track_a_permutation_of_three(attention):
    """w = (e_x - e_y) / sqrt 2 with beta = 2 swaps coordinates x and y (the paper's S_n proof)."""
    T = 10
    swaps = [tuple(random.Random(t).sample(range(3), 2)) for t in range(T)]
    w = torch.zeros(1, T, 1, 3, dtype=torch.float64)
    for t, (x, y) in enumerate(swaps):
        w[0, t, 0, x], w[0, t, 0, y] = math.sqrt(0.5), -math.sqrt(0.5)
    start = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)  # tells the three items apart
    q = start.expand(1, T, 1, 3).clone()
    beta = torch.full((1, T, 1), 2.0, dtype=torch.float64)
    for item in range(3):
        k = torch.zeros(1, T, 1, 3, dtype=torch.float64)
        k[..., item] = 1.0
        weights = probabilities(attention, q, k, w, beta, scale=1.0)[0, 0]
        for i in range(T):
            state = [1.0, 2.0, 3.0]
            for t in range(i, 0, -1):  # swap i is the first to act on the query
                x, y = swaps[t]
                state[x], state[y] = state[y], state[x]
            seen = float((weights[i, 0] / weights[i, i]).log()) + float(start[item])  # A_i0
            assert seen == pytest.approx(state[item], abs=1e-12)


@BOTH
def test_first_reflection_is_never_used(attention):
    q, k, v, w, beta, _ = make()
    w, beta = w.clone().requires_grad_(), beta.clone().requires_grad_()
    out = attention(q, k, v, w, beta)
    grad_w, grad_beta = torch.autograd.grad(out.pow(2).sum(), (w, beta))
    assert not grad_w[:, 0].any()
    assert not grad_beta[:, 0].any()
    assert grad_w[:, 1].any()


@pytest.mark.slow
def test_fla_scale_agrees_with_flash_linear_attention():
    """Its naive reference runs on a CPU; it is not a dependency, so this needs it installed."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns on import where there is no GPU
            from fla.ops.path_attn.naive import naive_path_attn
    except ImportError as missing:
        pytest.skip(f"flash-linear-attention is not installed ({missing})")
    inputs = [x.float() for x in make(T=70, HQ=4, K=16, V=16, gates=True)]
    theirs = naive_path_attn(*inputs, scale=0.25)
    ours = global_path_attention(*inputs, scale=0.25, gate_scale="fla")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    unscaled = global_path_attention(*inputs, scale=0.25, gate_scale="paper")
    assert (unscaled - theirs).abs().max() > 0.01
