"""How near a compiled model is to the transformers model: same tokens, logits, KL, perplexity."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashformer.sampling import surprise
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from flashformer.model import FlashModel


@dataclass(frozen=True)
class Verification:
    """What `verify` found; logits are compared after every token of the same greedy text.

    Attributes:
        tokens: How many greedy tokens were compared.
        same: How many of them the compiled model chooses as well, each given the text before.
        first_difference: The first token it chooses differently, counted from 0; None if none.
        gap: There, by how much the transformers model prefers its token, in logits: a tie where
            this is about `max_error` or less. None without a difference.
        max_error: The largest difference of a logit.
        kl: Mean KL divergence of the compiled model's next token from the other's, in nats.
    """

    tokens: int
    same: int
    first_difference: int | None
    gap: float | None
    max_error: float
    kl: float

    @property
    def equal(self) -> bool:
        """Whether all tokens are the same."""
        return self.first_difference is None

    def __str__(self) -> str:
        where = (
            "all the same"
            if self.first_difference is None
            else f"first differs at {self.first_difference}, where the gap is {self.gap:.3g}"
        )
        return (
            f"{self.same} of {self.tokens} tokens the same ({where}); largest error of a logit "
            f"{self.max_error:.3g}, KL {self.kl:.3g} nats"
        )


def verify(
    model: "FlashModel",
    reference: "PreTrainedModel",
    *,
    prompt: "Tensor | None" = None,
    n: int = 64,
) -> Verification:
    """Compare a compiled model with a transformers model on the text the latter writes.

    Args:
        model: The compiled model.
        reference: The model it should equal; a float32 one shows what the format costs.
        prompt: `[1, k]` or `[k]` int64. Defaults to the first token of the model (bos or 0).
        n: Greedy tokens to compare, at least 1.

    Raises:
        UserError: the vocabularies differ, or prompt and n do not fit.
    """
    import torch

    if not hasattr(model, "spec") or not hasattr(reference, "config"):
        raise UserError("verify takes the compiled model, then the transformers model")
    model.check_fresh()
    if reference.config.vocab_size != model.spec.vocab:
        raise UserError(
            f"the reference has {reference.config.vocab_size} tokens, the model {model.spec.vocab}"
        )
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UserError(f"n must be a whole number of at least 1, not {n!r}")
    if prompt is None:
        start = reference.config.bos_token_id
        prompt = torch.tensor([0 if start is None else start])
    ids = torch.as_tensor(prompt)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or not len(ids):
        raise UserError(f"prompt must be [k] or [1, k] with k >= 1, not of shape {list(ids.shape)}")
    ids = ids.to(reference.device)
    if model.spec.growing and len(ids) + n > model.spec.max_positions:
        raise UserError(
            f"behind {model.spec.max_positions} positions the rotary positions of this model grow "
            "with the text, so that logits depend on how it is cut into calls; compare less"
        )
    if len(ids) + n > model.max_len:
        raise UserError(f"{len(ids)} tokens and {n} more are over max_len {model.max_len}")
    text = greedy(reference, ids, n)
    with torch.inference_mode():
        theirs = reference(text[None]).logits[0, len(ids) - 1 : -1].float().cpu()
    cache = model.new_cache(len(text))
    mine = model.feed(text[:-1], cache, every=True)[len(ids) - 1 :].cpu()
    chosen, wanted = mine.argmax(1), text[len(ids) :].cpu()
    different = (chosen != wanted).nonzero().flatten().tolist()
    first = different[0] if different else None
    gap = None
    if first is not None:
        gap = float(theirs[first, wanted[first]] - theirs[first, chosen[first]])
    return Verification(
        tokens=n,
        same=n - len(different),
        first_difference=first,
        gap=gap,
        max_error=float((mine - theirs).abs().max()),
        kl=surprise(theirs, mine),
    )


def greedy(reference: "PreTrainedModel", ids: "Tensor", n: int) -> "Tensor":
    """Return ids and n greedy tokens after them, whatever tokens end a text."""
    import torch

    text, cache, new = ids, None, ids
    with torch.inference_mode():
        for _ in range(n):
            out = reference(new[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            new = out.logits[0, -1].argmax()[None]
            text = torch.cat([text, new])
    return text
