"""What a back-end is: a plan with packed weights that decodes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from flashformer.plan import Plan
from flashformer.weights import ModelWeights

if TYPE_CHECKING:
    from torch import Tensor

    from flashformer.pack import Packed


class Backend(Protocol):
    """A plan with its weights, ready to decode; see `CPUBackend.decode` for the arguments.

    `limit` is the CPU back-end's alone: only there are threads to choose from.

    Attributes:
        plan: The plan.
        cache_format: Of keys and values, "fp32" or "bf16".
        group: Group size of int4 matrices, 0 without any.
        device: Where its tensors are.
        weights: The vectors and tables; the matrices may be missing.
    """

    plan: Plan
    cache_format: str
    group: int
    device: Any
    weights: ModelWeights

    @property
    def name(self) -> str:
        """Such as `cpu (avx2)`."""
        ...

    @property
    def packed(self) -> "dict[str, Packed]":
        """The matrices by the name of their stage."""
        ...

    @property
    def streamed(self) -> int:
        """Bytes of weights that a token reads."""
        ...

    def decode(
        self,
        keys: "Sequence[Tensor]",
        values: "Sequence[Tensor]",
        given: "Tensor",
        *,
        position: int,
        new: int,
        logits: "Tensor",
        threads: int,
        temperature: float | None = None,
        seed: int = 0,
        ends: Sequence[int] = (),
        cancel: "Tensor | None" = None,
    ) -> "Tensor":
        """Read tokens and choose new ones."""
        ...
