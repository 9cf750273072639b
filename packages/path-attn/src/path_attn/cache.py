"""The key/value cache of one PaTH attention layer, folded lazily.

The paper rewrites every cached key at every token (`k <- H_t k`), which costs an extra pass over
the keys per token and rounds them each time. Here the keys stay as they were at the last *fold
point*, read-only. The tokens since then are *open*: a small matrix, the *walk*, holds the product M
= H_{fold+1} ... H_t above the open keys moved up to t. A new token multiplies the walk by its H
once, and `walk @ q` yields both the query as the folded keys must see it (M q) and the logits of
the open tokens. Every `FOLD` tokens the oldest open ones are folded: one pass over the keys, one
rounding.
"""

from collections.abc import Callable
from operator import index

import torch
from torch import Tensor
from torch.nn import functional as F

from path_attn.blockwise import absorb, move_to_end
from tenfold_common.errors import UserError

FOLD = 64
FOLD_ROWS = 4096  # keys folded at once, so that a fold needs little extra memory


class PaTHKVCache:
    """Keys, values and open tokens of one layer, for inference: no gradient flows into it.

    Columns are tokens in the order they were given; a column can be masked in some rows (padding).
    All rows have the same number of columns, `length`; `lengths` counts the real tokens of each
    row.

    Args:
        keep_open: Tokens that always stay open, so that at least so many can be taken back by
            `crop`.
        history: Also keep the unfolded keys, directions, strengths and gates, so that `crop`
            reaches any length. That is the memory of the keys once more, and of the directions in
            compute dtype.

    Attributes:
        length: Columns held.
        form: What the first call's inputs were like, by name; later ones must agree.
        extra: Free for the layer's own per-row state (its convolution window); `[B, ...]` tensors
            by name, reordered with the rows.
    """

    def __init__(self, *, keep_open: int = 32, history: bool = False) -> None:
        if keep_open < 0:
            raise UserError(f"keep_open must be 0 or more, got {keep_open}")
        self.keep_open = keep_open
        self.history = history
        self.extra: dict[str, Tensor] = {}
        self.form: dict[str, object] = {}
        self._clear()

    def _clear(self) -> None:
        self.length = 0
        self._folded = 0  # columns whose keys lie in `_k`, at the fold point
        self._k: Tensor | None = None  # [B, H, capacity, K]
        self._v: Tensor | None = None  # [B, H, capacity, V]
        self._bias: Tensor | None = None  # [B, HQ, capacity]: minus the gates since the fold point
        self._bias_now: Tensor | None = None  # [B, HQ]: the gates since the fold point
        self._valid: Tensor | None = (
            None  # [B, capacity] bool; None while every column is real in every row
        )
        self._walk: Tensor | None = None  # [B, H, K + FOLD + keep_open, K]
        self._open: dict[
            str, Tensor
        ] = {}  # k [B, n, H, K], w [B, n, H, R, K], beta [B, n, H, R], g [B, n, HQ]
        self._past: dict[str, Tensor] = {}  # the same with room for more, with `history`

    # -- what it holds
    # -------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows held; 0 while empty."""
        return 0 if self._v is None else self._v.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Real tokens in each row, `[B]` int64."""
        if self._v is None:
            return torch.zeros(0, dtype=torch.long)
        if self._valid is None:
            return torch.full((self.batch,), self.length, device=self._v.device)
        return self._valid[:, : self.length].sum(1)

    @property
    def values(self) -> Tensor:
        """Values of all columns, `[B, H, length, V]`."""
        return self._held(self._v)

    @property
    def folded_keys(self) -> Tensor:
        """Keys of the folded columns at the fold point, `[B, H, folded, K]`."""
        return self._held(self._k)[:, :, : self._folded]

    @property
    def bias(self) -> Tensor | None:
        """What the gates add to each logit, up to a constant per row, `[B, HQ, length]`.

        None without gates.
        """
        return None if self._bias is None else self._bias[:, :, : self.length]

    @property
    def valid(self) -> Tensor | None:
        """Which columns are real tokens, `[B, length]` bool; None if all are."""
        return None if self._valid is None else self._valid[:, : self.length]

    @property
    def walk(self) -> Tensor | None:
        """M above the open keys, `[B, H, K + open, K]`; None without reflections."""
        if self._walk is None:
            return None
        return self._walk[:, :, : self._walk.shape[-1] + self.length - self._folded]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, spare capacity included."""
        own = (self._k, self._v, self._bias, self._bias_now, self._valid, self._walk)
        kept = (*own, *self._open.values(), *self._past.values(), *self.extra.values())
        return sum(x.nbytes for x in kept if x is not None)

    def _held(self, x: Tensor | None) -> Tensor:
        if x is None:
            raise UserError(
                "the cache is empty: prefill it first, with path_attention(..., return_cache=True)"
            )
        return x[:, :, : self.length]

    # -- adding tokens
    # -------------------------------------------------------------------------------------------

    def extend(
        self,
        k: Tensor,
        v: Tensor,
        w: Tensor | None,
        beta: Tensor | None,
        g: Tensor | None,
        valid: Tensor | None,
    ) -> None:
        """Append tokens; all but the last `keep_open` are folded at once.

        Masked tokens must already have zero w, beta and g.

        Args:
            k: `[B, T, H, K]`.
            v: `[B, T, H, V]`.
            w: `[B, T, H, R, K]`, or None for plain attention.
            beta: `[B, T, H, R]`, or None with `w`.
            g: Log gates as they enter the logits, `[B, T, HQ]`, or None.
            valid: `[B, T]` bool, or None if all tokens are real.
        """
        self._write(k, v, g, valid)
        if w is None or beta is None:
            self._store_keys(k.transpose(1, 2))
            self._rebase()
            return
        self._remember(k, w, beta)
        ready = self.length - self._folded - self.keep_open
        if ready > 0:
            self._fold(ready)
        else:
            self._rebuild()

    def advance(
        self,
        k: Tensor,
        v: Tensor,
        w: Tensor | None,
        beta: Tensor | None,
        g: Tensor | None,
        valid: Tensor | None,
    ) -> None:
        """Append one token, at O(K (K + open)) cost; arguments as for `extend` with T = 1."""
        if self._walk is None or w is None or beta is None:
            self.extend(k, v, w, beta, g, valid)
            return
        self.reserve(1)
        row = self._walk.shape[3] + self.length - self._folded
        self._write(k, v, g, valid)
        self._remember(k, w, beta)
        walk = self._walk[:, :, :row]
        for r in range(w.shape[3]):
            w_r = w[:, 0, :, r, None]  # [B, H, 1, K]
            along = w_r @ walk.mT  # a row times a transpose: twice as fast as `walk @ column`
            walk.addcmul_(along.mT, w_r * beta[:, 0, :, r, None, None], value=-1)
        self._walk[:, :, row] = k[:, 0]

    def reserve(self, count: int) -> None:
        """Fold now if the next `count` tokens, at most `FOLD`, would not all stay open."""
        if self._walk is None:
            return
        room = self._walk.shape[2] - self._walk.shape[3]
        if self.length - self._folded + count > room:
            self._fold(min(FOLD, self.length - self._folded))

    def present(self) -> tuple[Tensor, Tensor | None]:
        """All keys as the next token meets them, and what the gates add to their logits.

        Nothing is folded: this is a copy.

        Returns:
            keys: `[B, H, length, K]`, at least float32. bias: `[B, HQ, length]`, or None ungated.
        """
        keys = self.folded_keys
        if self.walk is not None:
            product, recent = self.walk.split([self.walk.shape[-1], self.length - self._folded], 2)
            keys = torch.cat([keys.to(product.dtype) @ product, recent], 2)
        if self.bias is None or self._bias_now is None:
            return keys, None
        return keys, self.bias + self._bias_now[..., None]

    def flush(self) -> None:
        """Fold every open token, so that all keys stand at the end of the sequence."""
        if self.length > self._folded:
            self._fold(self.length - self._folded)
        else:
            self._rebase()

    def _write(self, k: Tensor, v: Tensor, g: Tensor | None, valid: Tensor | None) -> None:
        """Put values, gate bias and mask of new columns in place and count them."""
        start, self.length = self.length, self.length + k.shape[1]
        if self._v is None:
            heads, batch = k.shape[2], k.shape[0]
            self._k, self._v = (
                k.new_empty(batch, heads, 0, k.shape[3]),
                v.new_empty(batch, heads, 0, v.shape[3]),
            )
            if g is not None:
                self._bias, self._bias_now = (
                    g.new_empty(batch, g.shape[2], 0),
                    g.new_zeros(batch, g.shape[2]),
                )
        if self.length > self._v.shape[2]:
            capacity = max(self.length, 256, 2 * start)
            self._each(
                lambda x, axis: _grow(x, axis, capacity), only=("_k", "_v", "_bias", "_valid")
            )
        self._v[:, :, start : self.length] = v.transpose(1, 2)
        if g is not None and self._bias is not None and self._bias_now is not None:
            sums = self._bias_now[..., None] + g.transpose(1, 2).cumsum(-1)
            self._bias[:, :, start : self.length] = -sums
            self._bias_now = sums[..., -1]
            self._archive("g", g, start)
        if self._valid is None and valid is not None and not bool(valid.all()):
            self._valid = torch.ones(
                v.shape[0], self._v.shape[2], dtype=torch.bool, device=v.device
            )
        if self._valid is not None:
            self._valid[:, start : self.length] = True if valid is None else valid

    def _remember(self, k: Tensor, w: Tensor, beta: Tensor) -> None:
        new = {"k": k.to(beta.dtype), "w": w, "beta": beta}
        self._open = {name: _join(self._open.get(name), x) for name, x in new.items()}
        for name, x in (("k", k), ("w", w), ("beta", beta)):
            self._archive(name, x, self.length - k.shape[1])

    def _archive(self, name: str, x: Tensor, start: int) -> None:
        """With `history`, keep `x [B, T, ...]` as columns `start` to `start + T`."""
        if not self.history:
            return
        held = self._past.get(name)
        if held is None:
            held = x.new_empty(x.shape[0], 0, *x.shape[2:])
        if start + x.shape[1] > held.shape[1]:
            held = _grow(held, 1, max(start + x.shape[1], 256, 2 * start))
        held[:, start : start + x.shape[1]] = x
        self._past[name] = held

    def _store_keys(self, k: Tensor) -> None:
        """Write keys `[B, H, n, K]`, standing at the fold point, behind the folded ones."""
        self._k[:, :, self._folded : self._folded + k.shape[2]] = k  # pyright: ignore[reportOptionalSubscript]
        self._folded += k.shape[2]

    def _rebase(self) -> None:
        """Count the gates from the present: recent biases stay small, so nothing cancels."""
        if self._bias is not None and self._bias_now is not None:
            self._bias[:, :, : self.length] += self._bias_now[..., None]
            self._bias_now = torch.zeros_like(self._bias_now)

    def _fold(self, count: int) -> None:
        """Move the fold point over the `count` oldest open tokens."""
        ready = {name: x[:, :count] for name, x in self._open.items()}
        self._open = {name: x[:, count:].clone() for name, x in self._open.items()}
        keys, product = _to_end(**ready)
        for first in range(0, self._folded, FOLD_ROWS):
            rows = self.folded_keys[:, :, first : min(first + FOLD_ROWS, self._folded)]
            rows.copy_(rows.to(product.dtype) @ product.mT)
        self._store_keys(keys)
        self._rebase()
        self._rebuild()

    def _rebuild(self) -> None:
        """Compute the walk anew from the open tokens."""
        k = self._open["k"]
        batch, count, heads, dim = k.shape
        if self._walk is None:
            self._walk = k.new_zeros(batch, heads, dim + FOLD + self.keep_open, dim)
        if count:
            keys, product = _to_end(**self._open)
            self._walk[:, :, :dim] = product.mT
            self._walk[:, :, dim : dim + count] = keys
        else:
            self._walk[:, :, :dim] = torch.eye(dim, dtype=k.dtype, device=k.device)

    # -- taking tokens back, choosing rows
    # -------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        """Forget all columns from `length` on.

        Raises:
            UserError: `length` is negative, more than are held, or lies before the fold point
                while `history` is off. H is singular at beta = 1, so a fold cannot be undone.
        """
        if not hasattr(length, "__index__") or not 0 <= index(length) <= self.length:
            raise UserError(f"cannot crop {self.length} tokens to {length}")
        length = index(length)
        if length == self.length:
            return
        if length == 0:
            self._clear()
            return
        if self._walk is not None and length < self._folded:
            if not self.history:
                raise UserError(
                    f"cannot crop to {length} tokens: {self._folded} of {self.length} are folded, "
                    f"which cannot be undone. Use PaTHKVCache(keep_open=n) to be able to take n "
                    f"tokens back, or history=True for any"
                )
            self._refill(length)
            return
        if self._bias is not None:
            self._bias_now = -self._bias[:, :, length - 1]
        self.length = length
        if self._walk is None:
            self._folded = length
        else:
            self._open = {name: x[:, : length - self._folded] for name, x in self._open.items()}
            self._rebuild()

    def _refill(self, length: int) -> None:
        past = {name: x[:, :length] for name, x in self._past.items()}
        v, valid = self.values[:, :, :length].transpose(1, 2), self.valid
        self._clear()
        self.extend(
            past["k"],
            v,
            past["w"],
            past["beta"],
            past.get("g"),
            None if valid is None else valid[:, :length],
        )

    def reorder(self, rows: Tensor) -> None:
        """Take row `rows[b]` as row b (beam search).

        `rows` is `[B']` int32 or int64, rows may repeat or be left out.
        """
        integers = (torch.int32, torch.int64)
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in integers:
            raise UserError(f"reorder needs row numbers, a tensor [B'] of integers, got {rows!r}")
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.batch:
            raise UserError(f"reorder to rows {rows.tolist()}, but the cache has {self.batch}")
        self._each(lambda x, _: x.index_select(0, rows.to(x.device)))

    def repeat(self, times: int) -> None:
        """Repeat every row `times` times, neighbours together."""
        if type(times) is not int or times < 1:
            raise UserError(f"repeat needs a whole number of times, at least 1, got {times}")
        self._each(lambda x, _: x.repeat_interleave(times, 0))

    def _each(self, change: Callable[[Tensor, int], Tensor], only: tuple[str, ...] = ()) -> None:
        """Apply `change(tensor, axis of columns)` to the state."""
        for name in only or ("_k", "_v", "_bias", "_bias_now", "_valid", "_walk"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, change(x, 1 if name == "_valid" else 2))
        if not only:
            for held in (self._open, self._past, self.extra):
                held.update({name: change(x, 1) for name, x in held.items()})


def _to_end(k: Tensor, w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Keys `[B, H, n, K]` at the end of n tokens and their product `[B, H, K, K]`.

    Inputs as in `_open`.
    """
    batch, count, heads, _ = k.shape
    block = min(FOLD, count)
    extra = (
        -count % block
    )  # in front: the identity steps must not come after the last token's own place
    rows = (
        F.pad(x.movedim(2, 1).flatten(0, 1), (0, 0) * (x.dim() - 3) + (extra, 0))
        for x in (k, w, beta)
    )
    done = absorb(*(x.unflatten(1, (-1, block)) for x in rows))
    keys, product = move_to_end(done.k, done.p)
    return keys[:, extra:].unflatten(0, (batch, heads)), product.unflatten(0, (batch, heads))


def _join(old: Tensor | None, new: Tensor) -> Tensor:
    return new.clone() if old is None else torch.cat([old, new], 1)


def _grow(x: Tensor, axis: int, capacity: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = capacity - shape[axis]
    return torch.cat([x, x.new_zeros(shape)], axis)
