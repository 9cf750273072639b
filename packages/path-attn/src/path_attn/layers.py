"""The PaTH attention layer, its short convolution and its cache, for use in any model.

The state-dict names are those of fla's layer of the same name, so its weights load unchanged.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from path_attn.cache import FOLD, PaTHKVCache
from path_attn.ops import path_attention
from path_attn.options import check_attention
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from path_attn.configuration_path_attn import PaTHConfig

HALF_MAX_BETA = 2 - 2**-7  # bfloat16 resolves 2 to 2^-7: above this, rounding may leave [-1, 1]


class AttentionInputs(NamedTuple):
    """What `path_attention` is given by a layer.

    Attributes:
        q: Queries, `[B, T, HQ, K]`.
        k: Keys, `[B, T, H, K]`.
        v: Values, `[B, T, H, K]`.
        w: Unit directions (or 0), `[B, T, H, K]` or `[B, T, H, R, K]`, at least float32; None
            without PaTH.
        beta: Strengths in (0, max_beta], `[B, T, H]` or `[B, T, H, R]`, at least float32; None
            without PaTH.
        g: Log forget gates, `[B, T, HQ]`, at least float32; None without gates.
        conv_inputs: Inputs of the short convolution to remember, `[B, N, C]`, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor | None
    beta: Tensor | None
    g: Tensor | None
    conv_inputs: Tensor | None


class ShortConv(nn.Conv1d):
    """Causal depthwise convolution followed by SiLU, which sees real tokens of one document only.

    The weight is `[C, 1, width]`, its last column meeting the present token.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=False, padding=width - 1)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        before: Tensor | None = None,
        remember: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve.

        Args:
            x: Inputs, `[B, T, C]`.
            attention_mask: `[B, T]` bool, True for real tokens. Others are stepped over and give 0.
            cu_seqlens: Document starts and the end, `[N + 1]`, needs B == 1.
            before: Inputs of the last real tokens before `x`, `[B, M, C]`, right-aligned; None:
                zeros.
            remember: How many inputs of the last real tokens to return.

        Returns:
            y: `[B, T, C]`, at least float32. last: `[B, remember, C]` in the dtype of x, or None.
        """
        width, length = self.kernel_size[0], x.shape[1]
        reach = width - 1
        rank = None
        if attention_mask is not None:
            # Real tokens first, in order; the outputs go back to their places below.
            order = attention_mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
            x = x.gather(1, order[..., None].expand_as(x))
            rank = attention_mask.cumsum(1).sub(1).clamp(min=0)
        kept = max(reach, remember)
        history = x.new_zeros(x.shape[0], kept, x.shape[2])
        if before is not None:
            history = torch.cat([history, before.to(x.dtype)], 1)[:, -kept:] if kept else history
        extended = torch.cat([history, x], 1)
        last = _last_inputs(extended, attention_mask, length, remember) if remember else None

        taps = _wide(self.weight[:, 0])  # [C, width]
        y = x * taps[:, reach]
        place = None if cu_seqlens is None else _place_in_document(cu_seqlens, length)
        for distance in range(1, width):
            start = kept - distance
            earlier = extended[:, start : start + length]
            if place is not None:
                earlier = earlier * (place >= distance)[:, None]
            y = y + earlier * taps[:, reach - distance]
        y = F.silu(y)
        if attention_mask is not None and rank is not None:
            y = y.gather(1, rank[..., None].expand_as(y)) * attention_mask[..., None]
        return y, last


class PaTHLayerCache(PaTHKVCache):
    """What one `PaTHAttention` remembers: keys, values and inputs of its short convolution.

    Columns count padding, real tokens do not; see `PaTHKVCache` for the arguments.
    """

    # In `extra`, [B, N, C]: inputs of each row's last real tokens, right-aligned.
    _CONV_INPUTS = "conv_inputs"

    @property
    def conv_inputs(self) -> Tensor | None:
        """Inputs of the short convolution of each row's last real tokens, `[B, N, C]`, or None."""
        return self.extra.get(self._CONV_INPUTS)

    @conv_inputs.setter
    def conv_inputs(self, inputs: Tensor) -> None:
        self.extra[self._CONV_INPUTS] = inputs

    def conv_inputs_needed(self, reach: int, new: int) -> int:
        """Inputs to remember, so that `crop` finds those before the cut.

        Args:
            reach: Tokens the convolution looks back.
            new: Columns about to be added.
        """
        if not self.history:
            return reach + self.keep_open + FOLD
        return (reach if self.conv_inputs is None else self.conv_inputs.shape[1]) + new

    def crop(self, length: int) -> None:
        """Forget all columns from `length` on; `PaTHKVCache.crop` says how far that reaches."""
        removed = max(0, self.length - length)
        valid, inputs = self.valid, self.conv_inputs
        super().crop(length)
        if inputs is None or removed == 0:
            return
        if self.length == 0:
            del self.extra[self._CONV_INPUTS]
        elif valid is None:
            self.conv_inputs = F.pad(inputs, (0, 0, removed, 0))[:, : inputs.shape[1]]
        else:
            size, real = inputs.shape[1], valid[:, -removed:].sum(1)
            index = torch.arange(size, device=real.device) - real[:, None]
            moved = inputs.gather(1, index.clamp(min=0)[..., None].expand_as(inputs))
            self.conv_inputs = moved * (index >= 0)[..., None]


class PaTHAttention(nn.Module):
    """Causal self-attention with accumulated Householder products as position encoding.

    w is low-rank projection -> short convolution -> SiLU -> L2 norm per head; beta = 2 sigmoid(.);
    g = logsigmoid(.). w and beta belong to a key/value head, g to a query head (arXiv 2505.16381).

    Args:
        hidden_size: Width D of the input and output.
        num_heads: Query heads HQ.
        num_kv_heads: Key/value heads H, a divisor of HQ. Defaults to HQ.
        head_dim: Width K of a head. Defaults to D / HQ.
        position_encoding: "path", "path_fox", "rope", "fox" or "nope".
        gate_scale: "paper" or "fla": whether log gates are added after or before the scaling.
        num_reflections: Householder reflections per token, R.
        low_rank_w: Rank of the projection that makes w. None: one full matrix.
        conv_size: Width of the short convolution. None: none.
        w_norm_eps: Added to the squared norm of w.
        max_beta: Upper limit of beta. None: 2 - 2^-7 in bfloat16 and float16, no limit otherwise.
        qk_norm: RMS norm of each query and key head.
        norm_eps: Epsilon of that norm.
        window: Number of real tokens a query sees, itself included. None: all.
        softcap: Soft limit of the scores. None: none.
        qkv_bias: Bias of the three input projections.
        o_bias: Bias of the output projection.
        backend: See `path_attention`.
        block_size: See `path_attention`.

    Raises:
        UserError: an option does not fit; the message says which.

    Example:
        >>> import torch
        >>> layer = PaTHAttention(hidden_size=32, num_heads=4, num_kv_heads=2)
        >>> with torch.no_grad():  # no gradient flows through a cache
        ...     out, cache = layer(torch.randn(2, 5, 32), return_cache=True)
        ...     out, cache = layer(torch.randn(2, 1, 32), cache=cache)
        >>> tuple(out.shape), cache.length
        ((2, 1, 32), 6)
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        position_encoding: str = "path",
        gate_scale: str = "paper",
        num_reflections: int = 1,
        low_rank_w: int | None = 32,
        conv_size: int | None = 3,
        w_norm_eps: float = 1e-6,
        max_beta: float | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        window: int | None = None,
        softcap: float | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        backend: str = "auto",
        block_size: int = 64,
    ) -> None:
        super().__init__()
        check_attention(
            {
                "hidden_size": hidden_size,
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
                "position_encoding": position_encoding,
                "gate_scale": gate_scale,
                "num_reflections": num_reflections,
                "low_rank_w": low_rank_w,
                "conv_size": conv_size,
                "w_norm_eps": w_norm_eps,
                "max_beta": max_beta,
                "norm_eps": norm_eps,
                "window": window,
                "softcap": softcap,
                "backend": backend,
                "block_size": block_size,
            }
        )
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.position_encoding, self.gate_scale = position_encoding, gate_scale
        self.num_reflections, self.conv_size = num_reflections, conv_size
        self.w_norm_eps, self.max_beta = w_norm_eps, max_beta
        self.window, self.softcap = window, softcap
        self.backend, self.block_size = backend, block_size

        out, kv = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, out, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv, bias=qkv_bias)
        self.o_proj = nn.Linear(out, hidden_size, bias=o_bias)
        self.q_norm = nn.RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.uses_reflections = position_encoding in ("path", "path_fox")
        self.uses_gate = position_encoding in ("path_fox", "fox")
        if self.uses_reflections:
            channels = kv * num_reflections
            self.w_proj: nn.Module = (
                nn.Linear(hidden_size, channels, bias=False)
                if low_rank_w is None
                else nn.Sequential(
                    nn.Linear(hidden_size, low_rank_w, bias=False),
                    nn.Linear(low_rank_w, channels, bias=False),
                )
            )
            self.w_conv1d = None if conv_size is None else ShortConv(channels, conv_size)
            self.bt_proj = nn.Linear(hidden_size, num_kv_heads * num_reflections, bias=True)
        if self.uses_gate:
            self.g_proj = nn.Linear(hidden_size, num_heads, bias=True)
        if position_encoding == "rope":
            from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

            self._rotate = apply_rotary_pos_emb

    @classmethod
    def from_config(cls, config: "PaTHConfig") -> "PaTHAttention":
        """Make the attention layer a `PaTHConfig` describes."""
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim=config.head_dim,
            position_encoding=config.position_encoding,
            gate_scale=config.gate_scale,
            num_reflections=config.num_reflections,
            low_rank_w=config.low_rank_w,
            conv_size=config.conv_size,
            w_norm_eps=config.w_norm_eps,
            max_beta=config.max_beta,
            qk_norm=config.qk_norm,
            norm_eps=config.rms_norm_eps,
            window=config.window,
            softcap=config.softcap,
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            backend=config.backend,
            block_size=config.block_size,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: PaTHLayerCache | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        return_cache: bool = False,
    ) -> tuple[Tensor, PaTHLayerCache | None]:
        """Attend.

        Args:
            hidden_states: `[B, T, D]`.
            attention_mask: `[B, T]`, 1 for real tokens, in any pattern. With a cache it may also
                cover the columns before (`[B, columns + T]`); the last T are used. Masked tokens
                are nobody's keys, do not move the path, and their attention output is 0.
            cache: State of the columns before, or an empty `PaTHLayerCache`; it is extended in
                place.
            cu_seqlens: Document starts and the end of a packed row, `[N + 1]`, needs B == 1.
            position_embeddings: cos and sin, `[B or 1, T, K]` each; "rope" needs them, the others
                ignore them.
            return_cache: Make a cache when none was given.

        Returns:
            out: `[B, T, D]`. cache: `PaTHLayerCache`, or None if none was given or asked for.

        Raises:
            UserError: shapes do not fit, or options that exclude each other.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise UserError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; "
                f"expected [B, T, {self.hidden_size}]."
            )
        if cache is not None and not isinstance(cache, PaTHLayerCache):
            raise UserError(
                f"cache is a {type(cache).__name__}; PaTHAttention needs its own PaTHLayerCache "
                "(return_cache=True makes one)."
            )
        if return_cache and cache is None:
            cache = PaTHLayerCache()
        if cu_seqlens is not None and (cache is not None or attention_mask is not None):
            raise UserError("cu_seqlens cannot be combined with attention_mask or a cache.")
        mask = new_columns_mask(attention_mask, hidden_states.shape[:2], cache)
        inputs = self.project(
            hidden_states,
            mask,
            cache,
            cu_seqlens=cu_seqlens,
            position_embeddings=position_embeddings,
        )
        o, _ = path_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.w,
            inputs.beta,
            inputs.g,
            gate_scale=self.gate_scale,  # type: ignore[arg-type]
            cu_seqlens=cu_seqlens,
            attention_mask=mask,
            window=self.window,
            softcap=self.softcap,
            cache=cache,
            backend=self.backend,  # type: ignore[arg-type]
            block_size=self.block_size,
        )
        if cache is not None and inputs.conv_inputs is not None:
            cache.conv_inputs = inputs.conv_inputs
        return self.o_proj(o.flatten(2)), cache

    def project(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        cache: PaTHLayerCache | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> AttentionInputs:
        """Compute what attention is done with; arguments as in `forward`, the mask `[B, T]` bool.

        The cache is read, not changed: `AttentionInputs.conv_inputs` is what it should
        remember next.
        """
        q = self.q_proj(hidden_states).unflatten(2, (self.num_heads, self.head_dim))
        k = self.k_proj(hidden_states).unflatten(2, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(hidden_states).unflatten(2, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            wide = self.q_norm.weight.dtype  # under autocast the weight is wider than q and k
            q, k = self.q_norm(q.to(wide)), self.k_norm(k.to(wide))
        if self.position_encoding == "rope":
            if position_embeddings is None:
                raise UserError("position_encoding 'rope' needs position_embeddings=(cos, sin).")
            q, k = self._rotate(q, k, *position_embeddings, unsqueeze_dim=2)
        q, k = q.to(v.dtype), k.to(v.dtype)
        w = beta = conv_inputs = g = None
        if self.uses_reflections:
            w, conv_inputs = self._directions(hidden_states, mask, cache, cu_seqlens)
            beta = self._strengths(hidden_states, v.dtype)
        if self.uses_gate:
            g = F.logsigmoid(_wide(self.g_proj(hidden_states)))
        return AttentionInputs(q, k, v, w, beta, g, conv_inputs)

    def _directions(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        cache: PaTHLayerCache | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        w, conv_inputs = self.w_proj(hidden_states), None
        if self.w_conv1d is not None:
            reach = self.w_conv1d.kernel_size[0] - 1
            remember = 0 if cache is None else cache.conv_inputs_needed(reach, w.shape[1])
            w, conv_inputs = self.w_conv1d(
                w,
                attention_mask=mask,
                cu_seqlens=cu_seqlens,
                before=None if cache is None else cache.conv_inputs,
                remember=remember,
            )
        heads = (self.num_kv_heads, self.head_dim)
        if self.num_reflections > 1:
            heads = (self.num_kv_heads, self.num_reflections, self.head_dim)
        w = _wide(w).unflatten(2, heads)
        return w * torch.rsqrt(w.pow(2).sum(-1, keepdim=True) + self.w_norm_eps), conv_inputs

    def _strengths(self, hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
        beta = 2 * torch.sigmoid(_wide(self.bt_proj(hidden_states)))
        if self.num_reflections > 1:
            beta = beta.unflatten(2, (self.num_kv_heads, self.num_reflections))
        limit = self.max_beta
        if limit is None and dtype in (torch.bfloat16, torch.float16):
            limit = HALF_MAX_BETA
        return beta if limit is None else beta.clamp(max=limit)

    def extra_repr(self) -> str:
        """Name what the sub-modules do not show."""
        return (
            f"position_encoding={self.position_encoding!r}, "
            f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, "
            f"num_reflections={self.num_reflections}"
        )


def new_columns_mask(
    attention_mask: Tensor | None, shape: torch.Size, cache: PaTHLayerCache | None
) -> Tensor | None:
    """Cut a 2-D mask to the new columns.

    Args:
        attention_mask: `[B, T]` or, with a cache, `[B, columns + T]`; 1 for real tokens. None
            stays None.
        shape: `(B, T)` of the new tokens.
        cache: State of the columns before, or None.

    Returns:
        `[B, T]` bool, or None.

    Raises:
        UserError: the mask is not 2-D or has another shape.
    """
    if attention_mask is None:
        return None
    batch, length = shape
    if attention_mask.dim() != 2:
        raise UserError(
            f"attention_mask has {attention_mask.dim()} dimensions; expected [B, T], 1 for real "
            "tokens (the causal part is built in)."
        )
    seen = 0 if cache is None else cache.length
    if attention_mask.shape[0] != batch or attention_mask.shape[1] not in (length, seen + length):
        expected = f"[{batch}, {length}]" + (f" or [{batch}, {seen + length}]" if seen else "")
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected {expected}."
        )
    return attention_mask[:, -length:].bool()


def _wide(x: Tensor) -> Tensor:
    """Raise half precision to float32 and leave float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _last_inputs(extended: Tensor, mask: Tensor | None, length: int, count: int) -> Tensor:
    """Inputs of the last `count` real tokens of each row of `[B, M + T, C]`, real tokens first."""
    if mask is None:
        return extended[:, -count:]
    first = extended.shape[1] - length - count + mask.sum(1)  # [B]
    index = first[:, None] + torch.arange(count, device=mask.device)
    return extended.gather(1, index[..., None].expand(-1, -1, extended.shape[2]))


def _place_in_document(cu_seqlens: Tensor, length: int) -> Tensor:
    """Distance of every token `[T]` to the first token of its document."""
    token = torch.arange(length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.to(token.dtype), token, right=True) - 1
    return token - cu_seqlens[document]
