"""PaTH attention on a GPU: `attend_triton`, the Triton counterpart of `path_attn.blockwise.attend`.

`blockwise.cut` absorbs the reflections inside blocks of 64 tokens, `path_attn.tree` moves
queries and keys up a binary tree over the blocks, and the kernels then are those of ordinary flash
attention: for a query block, level after level, the keys of one contiguous run, a plain dot product
each. There is no product of Householder matrices in any inner loop, no walk to repeat in the
backward pass, no order to keep and nothing to invert.

Count per head, T tokens, n = T / b blocks of b, L = ceil(log2 n), head dimension d for keys and
values:
    forward    2 T^2 d FLOPs as causal flash attention, and 2 T d^2 (L - 1) for the tree:
               2 % more at T = 32k, d = 64
    backward   7/2 of the forward's attention (two kernels, each recomputes the logits), and
               4 T d^2 (L - 1) for the tree
    memory     L / 2 copies of q and of k in the compute dtype, T b floats of logits inside blocks

Walking right to left over the products of 512-token super-blocks would need one copy instead of L /
2, but d / 1024 of the attention's FLOPs inside the inner loop, the states of every query again in
the backward pass and a rounding per super-block instead of one per level.

Operands of tensor-core products are in the compute dtype, everything else is float32. Logits inside
blocks come from `cut` in float32, soft cap applied; gates are added here, after the cap. Not yet
measured on a GPU: proven through the Triton interpreter against the float64 reference, and compiled
for compute capability 8.0 to 10.0.
"""

import torch
import triton
from torch import Tensor

from path_attn.blockwise import Prepared
from path_attn.kernels.backward import tree_attention_bwd_kernel_dkv, tree_attention_bwd_kernel_dq
from path_attn.kernels.forward import tree_attention_fwd_kernel
from path_attn.kernels.tiles import launch
from path_attn.tree import levels_of, tree_forward, tree_gates

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attend_triton(
    prepared: Prepared,
    gates: Tensor | None = None,
    *,
    softcap: float = 0.0,
    window: int = 0,
    compute_dtype: torch.dtype | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Attention over a sequence prepared by `blockwise.cut(..., g=None)`; differentiable.

    torch.compile takes it without a graph break.

    Args:
        prepared: `logits [N, G, n, b, b]`, `v [N, T', V]` and the blocks, on a CUDA device (on any
            under the interpreter).
        gates: Log gates of every query head, already scaled, `[N, G, T']` or shorter (padded with
            0), or None.
        softcap: Cap of the logits, gates excluded, as given to `cut`; 0 for none.
        window: Visible keys per query; 0 for all.
        compute_dtype: float32, bfloat16 or float16 for the operands of matrix products. Defaults to
            the dtype of `v`.
        precision: How float32 operands are multiplied: "ieee", "tf32x3" or "tf32".

    Returns:
        out: `[N, G, T', V]` in the compute dtype. lse: log-sum-exp of the logits, `[N, G, T']`,
            float32, without
        gradient. A query that sees no key has out 0 and lse -inf.
    """
    dtype = compute_dtype or prepared.v.dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"the Triton kernels compute in {', '.join(map(str, DTYPES))}, not in {dtype}"
        )
    level, logits, v = prepared.level, prepared.logits.float(), prepared.v.to(dtype)
    queries, keys = tree_forward(level.q, level.k, level.p.float(), dtype)
    gate_q = gate_k = None
    if gates is not None:
        gates = torch.nn.functional.pad(gates.float(), (0, v.shape[1] - gates.shape[-1]))
        gate_q, gate_k, inside = tree_gates(gates, logits.shape[-1])
        logits = logits + (inside[..., :, None] - inside[..., None, :])
    return tree_attention_forward(
        queries, keys, logits, v, gate_q, gate_k, softcap, window, precision
    )


def _constants(
    queries: Tensor,
    logits: Tensor,
    v: Tensor,
    gated: bool,
    softcap: float,
    window: int,
    precision: str,
):
    """The keyword arguments that all three kernels take alike."""
    blocks, block = logits.shape[2:4]
    k_dim, v_dim = queries.shape[-1], v.shape[-1]
    if max(k_dim, v_dim) > MAX_HEAD_DIM:
        raise ValueError(
            f"head dimensions are {k_dim} and {v_dim}; "
            f"the Triton kernels take at most {MAX_HEAD_DIM}"
        )
    return {
        "rows": queries.shape[2],
        "blocks": blocks,
        "levels": levels_of(blocks),
        "groups": queries.shape[1],
        "softcap": float(softcap),
        "window": int(window),
        "BLOCK": block,
        "BLOCK_PAD": max(16, triton.next_power_of_2(block)),
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "K_PAD": max(16, triton.next_power_of_2(k_dim)),
        "V_PAD": max(16, triton.next_power_of_2(v_dim)),
        "GATED": gated,
        "CAPPED": softcap > 0,
        "WINDOWED": window > 0,
        "PRECISION": precision,
    }


@torch.library.custom_op("path_attn::tree_attention_forward", mutates_args=())
def tree_attention_forward(
    queries: Tensor,
    keys: Tensor,
    logits: Tensor,
    v: Tensor,
    gate_q: Tensor | None,
    gate_k: Tensor | None,
    softcap: float,
    window: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tree: out `[N, G, T, V]` in the dtype of v and lse `[N, G, T]`.

    Args:
        queries: From `tree_forward`, `[N, G, rows, K]`.
        keys: From `tree_forward`, `[N, rows, K]`.
        logits: Final logits inside the blocks, `[N, G, n, b, b]`; entries above the diagonal have
            no meaning.
        v: Values, `[N, T, V]`.
        gate_q: From `tree_gates`, `[N, G, rows]`, or None.
        gate_k: From `tree_gates`, `[N, G, rows]`, or None.
        softcap: Cap of the logits between blocks, gates excluded; 0 for none.
        window: Visible keys per query; 0 for all.
        precision: Triton's `input_precision` for float32 operands.
    """
    queries, keys, logits, v = (x.contiguous() for x in (queries, keys, logits, v))
    gated = gate_q is not None and gate_k is not None
    gate_q, gate_k = (logits if x is None else x.contiguous() for x in (gate_q, gate_k))
    out = v.new_empty(*queries.shape[:2], *v.shape[1:])
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device=v.device)
    constants = _constants(queries, logits, v, gated, softcap, window, precision)
    heads, blocks = queries.shape[0] * queries.shape[1], constants["blocks"]
    launch(
        tree_attention_fwd_kernel,
        lambda merge: heads * (blocks // merge),
        *(queries, keys, v, logits, gate_q, gate_k, out, lse),
        **constants,
    )
    return out, lse


@tree_attention_forward.register_fake
def _(queries, keys, logits, v, gate_q, gate_k, softcap, window, precision):
    out = v.new_empty(*queries.shape[:2], *v.shape[1:])
    return out, v.new_empty(out.shape[:3], dtype=torch.float32)


@torch.library.custom_op("path_attn::tree_attention_backward", mutates_args=())
def tree_attention_backward(
    d_out: Tensor,
    queries: Tensor,
    keys: Tensor,
    logits: Tensor,
    v: Tensor,
    gate_q: Tensor | None,
    gate_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softcap: float,
    window: int,
    precision: str,
) -> list[Tensor]:
    """Gradients of `tree_attention_forward`: queries, keys, logits, v and, if given, both gates."""
    d_out, queries, keys, logits, v = (
        x.contiguous() for x in (d_out.to(v.dtype), queries, keys, logits, v)
    )
    gated = gate_q is not None and gate_k is not None
    gate_q, gate_k = (logits if x is None else x.contiguous() for x in (gate_q, gate_k))
    delta = (d_out.float() * out.float()).sum(-1)
    # Rows that no query or key uses keep 0: the ragged end of the last pairs.
    grads = [
        torch.zeros_like(queries),
        torch.empty_like(keys),
        torch.empty_like(logits),
        torch.empty_like(v),
    ]
    grads += [torch.zeros_like(gate_q), torch.zeros_like(gate_k)] if gated else []
    d_gates = grads[4:] or [logits, logits]
    constants = _constants(queries, logits, v, gated, softcap, window, precision)
    rows, heads, blocks = queries.shape[0], queries.shape[1], constants["blocks"]
    inputs = (queries, keys, v, logits, gate_q, gate_k, d_out, lse, delta)
    launch(
        tree_attention_bwd_kernel_dq,
        lambda merge: rows * heads * (blocks // merge),
        *(*inputs, grads[0], grads[2], d_gates[0]),
        **constants,
    )
    launch(
        tree_attention_bwd_kernel_dkv,
        lambda merge: rows * (blocks // merge),
        *(*inputs, grads[1], grads[3], d_gates[1]),
        **constants,
    )
    return grads


@tree_attention_backward.register_fake
def _(d_out, queries, keys, logits, v, gate_q, gate_k, out, lse, softcap, window, precision):
    inputs = [queries, keys, logits, v] + ([] if gate_q is None else [gate_q, gate_k])
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _save(ctx, inputs, output):
    *tensors, ctx.softcap, ctx.window, ctx.precision = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, _):
    if d_out is None:
        return (None,) * 9
    grads = tree_attention_backward(
        d_out, *ctx.saved_tensors, ctx.softcap, ctx.window, ctx.precision
    )
    return *grads, *(None,) * (9 - len(grads))


tree_attention_forward.register_autograd(_backward, setup_context=_save)
