"""PaTH attention written down twice, slowly and obviously: the oracle for everything fast.

Per head, with column vectors and H_t = I - beta_t w_t w_t^T (arXiv 2505.16381, section 3):

    A_ij = k_j^T H_{j+1} H_{j+2} ... H_i q_i          for j <= i
    o_i  = sum_j softmax_j(scale * A_ij + G_i - G_j) v_j,   G_t = sum_{s<=t} g_s

`naive_path_attention` multiplies the matrices out, one query at a time. `global_path_attention`
uses the UT transform once over the whole sequence. Both run in the dtype of `q`; use float64 for an
oracle.

With R reflections per token, H_t = H_{t,1} H_{t,2} ... H_{t,R}: the last sub-step meets the query
first.
"""

import torch
from torch import Tensor


def naive_path_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    gate_scale: str = "paper",
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """PaTH attention by its definition: a query walks back through every Householder matrix.

    Args:
        q: Queries, `[B, T, HQ, K]`.
        k: Keys, `[B, T, H, K]`; HQ must be a multiple of H.
        v: Values, `[B, T, H, V]`.
        w: Unit reflection directions, `[B, T, H, K]`, or `[B, T, H, R, K]` for R reflections a
            token.
        beta: Reflection strengths in [0, 2], `[B, T, H]` (or `[B, T, H, R]`).
        g: Log forget gates <= 0, `[B, T, HQ]`, or None.
        scale: Multiplies A. Defaults to `K ** -0.5`.
        gate_scale: "paper" adds the gates after scaling A, "fla" before (the gates are scaled too).
        window: Key j is visible to query i iff `0 <= i - j < window`. None: all earlier keys.
        softcap: Replaces `x = scale * A` by `softcap * tanh(x / softcap)`, before the gates.

    Returns:
        o: `[B, T, HQ, V]`, dtype of q.
    """
    batch, length, heads, _ = q.shape
    w, beta = _sub_steps(w, beta)
    logits = q.new_full((batch, heads, length, length), -torch.inf)
    group = heads // k.shape[2]
    k_heads = k.repeat_interleave(group, 2)
    w_heads = w.repeat_interleave(group, 2)
    beta_heads = beta.repeat_interleave(group, 2)
    for i in range(length):
        moved = q[:, i]  # H_{j+1} ... H_i q_i, [B, HQ, K]
        for j in range(i, -1, -1):
            logits[:, :, i, j] = (k_heads[:, j] * moved).sum(-1)
            for r in range(w.shape[3] - 1, -1, -1):
                w_r, beta_r = w_heads[:, j, :, r], beta_heads[:, j, :, r, None]
                moved = moved - beta_r * w_r * (w_r * moved).sum(-1, keepdim=True)
    return _attend(
        logits, v, g, q.shape[-1] ** -0.5 if scale is None else scale, gate_scale, window, softcap
    )


def global_path_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    gate_scale: str = "paper",
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """PaTH attention by the UT transform over the whole sequence: O(T^3) time, O(T^2) memory.

    A = tril(Q K^T) - tril(Q W^T) T stril(W K^T), with T = (I + stril(D W W^T))^{-1} D, D =
    diag(beta).

    Arguments and result are those of `naive_path_attention`.
    """
    w, beta = _sub_steps(w, beta)
    length, reflections = w.shape[1], w.shape[3]
    group = q.shape[2] // k.shape[2]
    q_, k_ = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(group, 1)  # [B, HQ, T, K]
    w_ = w.permute(0, 2, 1, 3, 4).flatten(2, 3).repeat_interleave(group, 1)  # [B, HQ, T R, K]
    beta_ = beta.permute(0, 2, 1, 3).flatten(2, 3).repeat_interleave(group, 1)[..., None]
    token = torch.arange(length, device=q.device)
    step = token.repeat_interleave(reflections)  # the token a sub-step belongs to

    eye = torch.eye(length * reflections, dtype=q.dtype, device=q.device)
    system = eye + (beta_ * w_ @ w_.mT).tril(-1)
    after_key = (w_ @ k_.mT) * (step[:, None] > token)  # stril(W K^T)
    before_query = (q_ @ w_.mT) * (token[:, None] >= step)  # tril(Q W^T)
    pulled = torch.linalg.solve_triangular(
        system, beta_ * after_key, upper=False, unitriangular=True
    )
    logits = q_ @ k_.mT - before_query @ pulled
    logits = logits.masked_fill(token[:, None] < token, -torch.inf)
    return _attend(
        logits, v, g, q.shape[-1] ** -0.5 if scale is None else scale, gate_scale, window, softcap
    )


def _sub_steps(w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Give `w` and `beta` their reflection axis: `[B, T, H, R, K]` and `[B, T, H, R]`."""
    return (w, beta) if w.dim() == 5 else (w.unsqueeze(3), beta.unsqueeze(3))


def _attend(
    logits: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    gate_scale: str,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Turn raw A `[B, HQ, T, T]` (-inf above the diagonal) into the output `[B, T, HQ, V]`."""
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
    if g is not None:
        total = g.to(logits.dtype).transpose(1, 2).cumsum(-1)  # [B, HQ, T]
        bias = total[..., :, None] - total[..., None, :]
        logits = logits + bias * (scale if gate_scale == "fla" else 1.0)
    if window is not None:
        logits = logits.masked_fill(
            torch.ones_like(logits, dtype=torch.bool).tril(-window), -torch.inf
        )
    values = v.transpose(1, 2).repeat_interleave(logits.shape[1] // v.shape[2], 1)
    return (logits.softmax(-1) @ values).transpose(1, 2).to(v.dtype)
