"""Keys and values of all positions so far, in the layout that decoding reads."""

from typing import TYPE_CHECKING, Any

from flashformer.config import ModelSpec
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

LANES = 16


def _padded(size: int) -> int:
    return -(-size // LANES) * LANES


class KVCache:
    """Room for `max_len` positions of one sequence; `length` of them are filled.

    What lies beyond `length` is never read. Attributes `keys` and `values` hold one tensor a layer,
    `[Hkv, max_len / 16, D, 16]` and `[Hkv, max_len, D]`, with max_len and D padded to multiples of
    16.

    Args:
        spec: The model.
        max_len: Positions there is room for, at least 1.
        format: "fp32" or "bf16".
        device: Where its tensors are: that of the model's back-end.
    """

    def __init__(
        self, spec: ModelSpec, max_len: int, *, format: str = "bf16", device: Any = "cpu"
    ) -> None:
        import torch

        if isinstance(max_len, bool) or not isinstance(max_len, int) or max_len < 1:
            raise UserError(f"max_len must be a whole number of at least 1, not {max_len!r}")
        if not isinstance(spec, ModelSpec):
            raise UserError(f"a cache is made for a spec (model.spec), not {type(spec).__name__}")
        if format not in ("fp32", "bf16"):
            raise UserError(f"format must be 'fp32' or 'bf16', not {format!r}")
        self.spec, self.max_len, self.format = spec, max_len, format
        self.length = 0
        room, width = _padded(max_len), _padded(spec.head_dim)
        kind = torch.float32 if format == "fp32" else torch.bfloat16
        keys, values = (spec.kv_heads, room // LANES, width, LANES), (spec.kv_heads, room, width)
        self.device = torch.device(device)
        self.keys = [torch.zeros(keys, dtype=kind, device=device) for _ in range(spec.layers)]
        self.values = [torch.zeros(values, dtype=kind, device=device) for _ in range(spec.layers)]

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"KVCache(length={self.length}, max_len={self.max_len}, format={self.format!r})"

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def check_room(self, new: int) -> None:
        """Refuse to go on where `new` more positions do not fit.

        Raises:
            UserError: they do not.
        """
        if self.length + new > self.max_len:
            raise UserError(
                f"{self.length} positions are filled and {new} more asked for, but the cache has "
                f"room for {self.max_len}; compile with a larger max_len, or ask for less"
            )

    def crop(self, length: int) -> "KVCache":
        """Forget all positions from `length` on; a negative number counts from the end.

        Raises:
            UserError: it lies outside of what is filled.
        """
        if isinstance(length, bool) or not isinstance(length, int):
            raise UserError(f"length must be a whole number, not {length!r}")
        wanted = self.length + length if length < 0 else length
        if not 0 <= wanted <= self.length:
            raise UserError(f"cannot crop to {length}: {self.length} positions are filled")
        self.length = wanted
        return self

    def copy(self) -> "KVCache":
        """Return a copy with memory of its own."""
        other = KVCache(self.spec, self.max_len, format=self.format, device=self.device)
        other.length = self.length
        for mine, theirs in zip(
            (*self.keys, *self.values), (*other.keys, *other.values), strict=True
        ):
            theirs.copy_(mine)
        return other

    def layer(self, number: int) -> "tuple[Tensor, Tensor]":
        """Return keys and values of a layer, `[Hkv, length, D]` each."""
        size = self.spec.head_dim
        keys = self.keys[number].transpose(2, 3).flatten(1, 2)
        return keys[:, : self.length, :size], self.values[number][:, : self.length, :size]

    def to_transformers(self) -> "Cache":
        """Return a `DynamicCache` with the same keys and values, `[1, Hkv, length, D]` a layer."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for number in range(self.spec.layers):
            keys, values = (t[None].contiguous() for t in self.layer(number))
            cache.update(keys, values, number)
        return cache

    @classmethod
    def from_transformers(
        cls,
        cache: "Cache",
        spec: ModelSpec,
        max_len: int,
        *,
        format: str = "bf16",
        device: Any = "cpu",
    ) -> "KVCache":
        """Copy a cache of transformers (dynamic or static) of one sequence.

        Args:
            cache: Of the same model, batch size 1.
            spec: The model.
            max_len: Positions of the new cache.
            format: Of the new cache.
            device: Of the new cache.

        Raises:
            UserError: the shapes are not those of this model, the batch is not 1, or it is longer
                than `max_len`.
        """
        if not hasattr(cache, "layers"):
            raise UserError(f"{type(cache).__name__} is no cache of transformers")
        found = cls(spec, max_len, format=format, device=device)
        length = int(cache.get_seq_length())
        layers: Any = cache.layers
        if len(layers) != spec.layers:
            raise UserError(f"the cache has {len(layers)} layers, the model {spec.layers}")
        found.check_room(length)
        for number, layer in enumerate(layers):
            shape = (1, spec.kv_heads, spec.head_dim)
            keys, values = layer.keys, layer.values
            if (*keys.shape[:2], keys.shape[3]) != shape or keys.shape[2] < length:
                raise UserError(
                    f"layer {number} of the cache has keys of shape {list(keys.shape)}, expected "
                    f"[1, {spec.kv_heads}, {length}, {spec.head_dim}]: the cache of another model, "
                    "of a batch, or one that slides"
                )
            found.put(number, keys[0, :, :length], values[0, :, :length])
        found.length = length
        return found

    def put(self, number: int, keys: "Tensor", values: "Tensor") -> None:
        """Store keys and values `[Hkv, n, D]` at positions 0 to n - 1 of a layer."""
        count, size = keys.shape[1:]
        whole = count // LANES * LANES
        blocks = self.keys[number]
        blocks[:, : whole // LANES, :size] = (
            keys[:, :whole].reshape(len(keys), -1, LANES, size).transpose(2, 3).to(blocks)
        )
        if whole < count:
            rest = keys[:, whole:].transpose(1, 2).to(blocks)
            blocks[:, whole // LANES, :size, : count - whole] = rest
        self.values[number][:, :count, :size] = values.to(self.values[number])
