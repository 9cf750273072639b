"""Look inside: what the path does between two positions, and where attention goes.

All functions are for reading, not for training: they run without gradients, and attention maps take
O(T^2) memory per head.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from path_attn.layers import AttentionInputs, PaTHAttention, new_columns_mask
from path_attn.modeling_path_attn import PaTHForCausalLM, PaTHModel
from path_attn.reference import global_path_attention
from tenfold_common.errors import UserError


class Spectrum(NamedTuple):
    """Eigenvalues and singular values of transforms `[..., K, K]`.

    Attributes:
        eigenvalues: Complex, `[..., K]`, by falling magnitude. All lie in the unit disc.
        singular_values: `[..., K]`, falling. 1 is a direction the path leaves alone, 0 one it
            wipes out.
    """

    eigenvalues: Tensor
    singular_values: Tensor


def relative_transform(w: Tensor, beta: Tensor, *, query: int, key: int) -> Tensor:
    """The matrix between a key and a query: `A = k_j^T M q_i` with M = H_{j+1} H_{j+2} ... H_i.

    Args:
        w: Unit directions, `[B, T, H, K]` or `[B, T, H, R, K]`.
        beta: Strengths, `[B, T, H]` or `[B, T, H, R]`.
        query: Position i of the query.
        key: Position j of the key, `0 <= j <= i < T`.

    Returns:
        M, `[B, H, K, K]`, dtype of w; the identity for `key == query`.

    Raises:
        UserError: the positions are out of order or range, or the shapes do not fit.
    """
    if beta.shape != w.shape[:-1] or w.dim() not in (4, 5):
        raise UserError(
            f"w has shape {list(w.shape)} and beta {list(beta.shape)}; expected [B, T, H, K] and "
            "[B, T, H], or [B, T, H, R, K] and [B, T, H, R]."
        )
    if not 0 <= key <= query < w.shape[1]:
        raise UserError(
            f"key is {key} and query {query}; expected 0 <= key <= query < {w.shape[1]} (length)."
        )
    if w.dim() == 4:
        w, beta = w.unsqueeze(3), beta.unsqueeze(3)
    batch, _, heads, reflections, dim = w.shape
    product = torch.eye(dim, dtype=w.dtype, device=w.device).expand(batch, heads, dim, dim)
    for position in range(key + 1, query + 1):
        for r in range(reflections):
            w_r = w[:, position, :, r]  # [B, H, K]
            moved = (product @ w_r[..., None]) * (beta[:, position, :, r, None] * w_r)[..., None, :]
            product = product - moved
    return product


def spectrum(transform: Tensor) -> Spectrum:
    """Eigenvalues and singular values of matrices `[..., K, K]`."""
    if transform.dim() < 2 or transform.shape[-1] != transform.shape[-2]:
        raise UserError(f"transform has shape {list(transform.shape)}; expected [..., K, K].")
    eigenvalues = torch.linalg.eigvals(transform)
    order = eigenvalues.abs().argsort(dim=-1, descending=True)
    return Spectrum(eigenvalues.gather(-1, order), torch.linalg.svdvals(transform))


@torch.no_grad()
def attention_map(
    layer: PaTHAttention,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention probabilities of one layer.

    Args:
        layer: The layer, with any position encoding.
        hidden_states: What the layer is given, `[B, T, D]`.
        attention_mask: `[B, T]`, 1 for real tokens, or None.
        position_embeddings: cos and sin, `[B or 1, T, K]`; needed by "rope".

    Returns:
        Post-softmax probabilities, `[B, HQ, T, T]` (query, key), at least float32. Rows of real
        queries sum to 1; rows and columns of masked tokens are 0.

    Raises:
        UserError: shapes do not fit.
    """
    mask = new_columns_mask(attention_mask, hidden_states.shape[:2], None)
    inputs = layer.project(hidden_states, mask, position_embeddings=position_embeddings)
    return _probabilities(layer, inputs, mask)


@torch.no_grad()
def attention_maps(
    model: PaTHModel | PaTHForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Attention probabilities of a model on given tokens.

    Args:
        model: The model; it is run as it stands, call `eval()` first if it has dropout of your own.
        input_ids: Token ids, `[B, T]`.
        attention_mask: `[B, T]`, 1 for real tokens, or None.
        layers: Indices of the blocks wanted, negative ones from the end. Defaults to all.

    Returns:
        `[L, B, HQ, T, T]` (block, row, head, query, key), at least float32; see `attention_map`.

    Raises:
        UserError: an index is out of range, or the inputs do not fit.
    """
    found = layer_inputs(model, input_ids, attention_mask, layers=layers)
    mask = new_columns_mask(attention_mask, input_ids.shape, None)
    return torch.stack([_probabilities(layer, inputs, mask) for layer, inputs in found])


@torch.no_grad()
def model_relative_transform(
    model: PaTHModel | PaTHForCausalLM,
    input_ids: Tensor,
    *,
    layer: int,
    query: int,
    key: int,
) -> Tensor:
    """`relative_transform` inside a model on given tokens.

    Args:
        model: A model with position encoding "path" or "path_fox".
        input_ids: Token ids, `[B, T]`, without padding.
        layer: Index of the block.
        query: Position of the query.
        key: Position of the key, not after the query.

    Returns:
        `[B, H, K, K]`, at least float32.

    Raises:
        UserError: the model has no reflections, or an index is out of range.
    """
    ((_, inputs),) = layer_inputs(model, input_ids, layers=[layer])
    if inputs.w is None or inputs.beta is None:
        raise UserError(
            f"position_encoding {model.config.position_encoding!r} has no reflections; "
            "only 'path' and 'path_fox' have a relative transform."
        )
    return relative_transform(inputs.w, inputs.beta, query=query, key=key)


@torch.no_grad()
def layer_inputs(
    model: PaTHModel | PaTHForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
) -> list[tuple[PaTHAttention, AttentionInputs]]:
    """Run a model and collect q, k, v, w, beta and g of its attention layers.

    Args:
        model: The model.
        input_ids: Token ids, `[B, T]`.
        attention_mask: `[B, T]`, 1 for real tokens, or None.
        layers: Indices of the blocks wanted, negative ones from the end. Defaults to all.

    Returns:
        One pair of layer and `AttentionInputs` for each index, in the order asked for.

    Raises:
        UserError: an index is out of range, or the inputs do not fit.
    """
    decoder = model.model if isinstance(model, PaTHForCausalLM) else model
    count = len(decoder.layers)
    blocks = [block.get_submodule("self_attn") for block in decoder.layers]
    wanted = list(range(count)) if layers is None else [_index(i, count) for i in layers]
    found: dict[int, tuple[PaTHAttention, AttentionInputs]] = {}

    def recorder(index: int) -> Callable[[torch.nn.Module, tuple, dict], None]:
        def record(layer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            if isinstance(layer, PaTHAttention):
                rotary = kwargs["position_embeddings"]
                found[index] = (layer, layer.project(args[0], args[1], position_embeddings=rotary))

        return record

    handles = [
        blocks[index].register_forward_pre_hook(recorder(index), with_kwargs=True)
        for index in set(wanted)
    ]
    try:
        decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in wanted]


def _index(index: int, count: int) -> int:
    if not -count <= index < count:
        raise UserError(f"layer {index} does not exist; the model has {count} (0 to {count - 1}).")
    return index % count


def _probabilities(layer: PaTHAttention, inputs: AttentionInputs, mask: Tensor | None) -> Tensor:
    """`[B, HQ, T, T]`: with unit vectors as values, attention returns its probabilities."""
    wide = torch.promote_types(inputs.q.dtype, torch.float32)
    q, k = inputs.q.to(wide), inputs.k.to(wide)
    batch, length, heads, _ = q.shape
    if inputs.w is None or inputs.beta is None:
        w, beta = torch.zeros_like(k), torch.zeros_like(k[..., 0])
    else:
        w, beta = inputs.w.to(wide), inputs.beta.to(wide)
    maps = q.new_zeros(batch, heads, length, length)
    every = torch.arange(length, device=q.device)
    for row in range(batch):
        real = every if mask is None else every[mask[row]]
        units = torch.eye(real.numel(), dtype=wide, device=q.device)
        v = units[None, :, None].expand(1, -1, k.shape[2], -1)
        out = global_path_attention(
            *(x[row : row + 1, real] for x in (q, k)),
            v,
            *(x[row : row + 1, real] for x in (w, beta)),
            None if inputs.g is None else inputs.g[row : row + 1, real].to(wide),
            gate_scale=layer.gate_scale,
            window=layer.window,
            softcap=layer.softcap,
        )  # [1, n, HQ, n]
        maps[row][:, real[:, None], real] = out[0].transpose(0, 1)
    return maps
