"""What models are asked, and how their replies are read.

The texts are jinja templates in `templates/<version>`; their wording is this package's own, so
results name it by its hash. The instructions come first and the scale and the clue last: the long
beginning is then one and the same for every question, and a back-end computes it once.
"""

import json
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tenfold_common.errors import UserError, suggest
from wavelength_rsa.parsing import read_clue, read_position
from wavelength_rsa.scales import STEPS, Scale, check_position, grid

if TYPE_CHECKING:
    from jinja2 import Environment

    from tenfold_common.lm import Prompt, TextModel

STYLES = ("chat", "plain")
_FOLDER = Path(__file__).parent / "templates"


class Prompts(Protocol):
    """What listeners and speakers need of prompts; anything with these members will do."""

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides the texts."""
        ...

    @property
    def answer_stop(self) -> tuple[str, ...]:
        """Texts at which a listener's reply ends, used when it does not reason."""
        ...

    @property
    def clue_stop(self) -> tuple[str, ...]:
        """Texts at which a speaker's reply ends, used when it does not reason."""
        ...

    def listener(
        self, scale: Scale, clue: str, *, step: int | None = 5, cot: bool = False
    ) -> "Prompt":
        """Ask where a clue points; a blank clue asks where a target lies without any clue.

        Args:
            scale: The scale.
            clue: The clue.
            step: Ask for a multiple of it; None asks for any whole number from 0 to 100.
            cot: Ask for reasoning before the answer.
        """
        ...

    def answer(self, position: int) -> str:
        """Return the text of an answer, as it follows the prompt."""
        ...

    def read_answer(self, text: str, *, cot: bool = False) -> float | None:
        """Return the position that a reply names; None if it names none from 0 to 100."""
        ...

    def speaker(self, scale: Scale, target: float, *, cot: bool = False) -> "Prompt":
        """Ask for a clue."""
        ...

    def read_clue(self, text: str, *, cot: bool = False) -> str | None:
        """Return the clue that a reply gives, or None."""
        ...


class WavelengthPrompts:
    """The game's own prompts.

    Args:
        version: Folder of the templates. Defaults to the only one, "v1".
        style: "chat" for one message of the user; "plain" for a text that ends where the reply
            begins, for base models.

    Raises:
        UserError: there is no such version or style.

    Example:
        >>> prompts = WavelengthPrompts(style="plain")
        >>> print(prompts.listener(Scale("Slow", "Fast"), "bicycle")[-39:])
        0: Slow
        100: Fast
        Clue: bicycle
        Reply:
        <BLANKLINE>
        >>> prompts.answer(35), prompts.read_answer("<answer>35")
        ('<answer>35</answer>', 35.0)
    """

    answer_stop: tuple[str, ...] = ("</answer>",)
    clue_stop: tuple[str, ...] = ("</clue>",)

    def __init__(self, version: str = "v1", style: str = "chat") -> None:
        known = sorted(folder.name for folder in _FOLDER.iterdir() if folder.is_dir())
        for name, value, accepted in (("version", version, known), ("style", style, STYLES)):
            if value not in accepted:
                raise UserError(
                    f"{name} must be one of {', '.join(accepted)}, not {value!r}."
                    + suggest(str(value), accepted)
                )
        self.version, self.style = version, style

    @cached_property
    def hash(self) -> str:
        """SHA-256 of every text there is, with placeholders for scale, clue and target."""
        scale = Scale("{left}", "{right}")
        texts = [
            [self.listener(scale, "{clue}", step=s, cot=c) for s in (None, *STEPS) for c in _BOTH],
            [self.speaker(scale, 50.0, cot=c) for c in _BOTH],
            [self.listener(scale, ""), self.answer(50), *self.answer_stop, *self.clue_stop],
        ]
        return sha256(json.dumps(texts).encode()).hexdigest()

    def listener(
        self, scale: Scale, clue: str, *, step: int | None = 5, cot: bool = False
    ) -> "Prompt":
        """Ask where a clue points; see `Prompts.listener`.

        Raises:
            UserError: the step does not divide 100.
        """
        positions = [] if step is None else [f"{t:g}" for t in grid(step)]
        return self._prompt("listener", scale, cot, clue=clue, positions=positions, step=step or 1)

    def answer(self, position: int) -> str:
        """Return the text of an answer, such as `<answer>45</answer>`."""
        return f"<answer>{position}</answer>"

    def read_answer(self, text: str, *, cot: bool = False) -> float | None:
        """Return the position that a reply names, or None; see `wavelength_rsa.parsing`."""
        return read_position(text, cot=cot, last=self._reads_last(cot))

    def speaker(self, scale: Scale, target: float, *, cot: bool = False) -> "Prompt":
        """Ask for a clue.

        Raises:
            UserError: the target is not from 0 to 100.
        """
        return self._prompt("speaker", scale, cot, target=f"{check_position(target):g}")

    def read_clue(self, text: str, *, cot: bool = False) -> str | None:
        """Return the clue that a reply gives, or None; see `wavelength_rsa.parsing`."""
        return read_clue(text, cot=cot, last=self._reads_last(cot))

    def _reads_last(self, cot: bool) -> bool:
        # A base model does not end its reply but goes on with games of its own.
        return cot and self.style == "chat"

    def _prompt(self, name: str, scale: Scale, cot: bool, **fields: object) -> "Prompt":
        template = _templates(self.version).get_template(f"{name}.jinja")
        text = template.render(
            left=scale.left, right=scale.right, cot=cot, style=self.style, **fields
        ).strip()
        if self.style == "chat":
            return [{"role": "user", "content": text}]
        return text if cot else text + "\n"


_BOTH = (False, True)


def prompts_for(model: "TextModel") -> WavelengthPrompts:
    """Return the game's prompts in the style that suits a model.

    Plain text for a model whose tokenizer is at hand and has no chat template, else a chat.
    """
    tokenizer = getattr(model, "tokenizer", None)
    base = tokenizer is not None and not getattr(tokenizer, "chat_template", None)
    return WavelengthPrompts(style="plain" if base else "chat")


@lru_cache
def _templates(version: str) -> "Environment":
    """Return a version's templates; `snap` moves a position to the nearest multiple of a step."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(_FOLDER / version),
        autoescape=False,  # noqa: S701 - the texts are for models; < must stay <
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["snap"] = lambda position, step: step * int(position / step + 0.5)
    return templates
