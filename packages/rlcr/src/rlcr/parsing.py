"""Reading a completion: reasoning, answer, analysis and stated confidence.

The output contract is that of arXiv 2507.16806. In format `"tabc"` a completion reads

    <think> .. </think> <answer> y </answer> <analysis> .. </analysis> <confidence> q </confidence>

with nothing but white space between the blocks and after the last one. Training reads it strictly;
evaluation may read it leniently. Time is linear in the length of the text, whatever it holds.
"""

import re
from dataclasses import dataclass

from tenfold_common.errors import UserError, suggest

FORMATS = ("tabc", "tbac", "tac", "ta")
MODES = ("strict", "lenient")

ERROR_CODES = (
    "missing_think",
    "missing_answer",
    "missing_analysis",
    "missing_confidence",
    "unclosed_tag",
    "duplicate_tag",
    "wrong_order",
    "nested_tag",
    "trailing_text",
    "text_between",
    "empty_answer",
    "not_a_number",
    "out_of_range",
)

_BLOCKS = {
    "tabc": ("answer", "analysis", "confidence"),
    "tbac": ("analysis", "answer", "confidence"),
    "tac": ("answer", "confidence"),
    "ta": ("answer",),
}
_OPEN_THINK, _CLOSE_THINK = "<think>", "</think>"
_TAG = re.compile(r"<(/?)(think|answer|analysis|confidence)>")
_SPACE = re.compile(r"\s*")
# [0-9] and not \d, which takes the digits of every script.
_PROBABILITY = re.compile(r"0(?:\.[0-9]*)?|1(?:\.0*)?|\.[0-9]+")
_DECIMAL = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
_LENIENT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_PERCENT = re.compile(r"\s*(?:%|percent\b)", re.IGNORECASE)
# What makes the number before it something else: 1e-1, 0_5, 1,000, 0.8.1, and the frequencies and
# odds 8/10, 8 out of 10, 8 of 10, 1 in 2, 1:3, 3 to 1.
_COUNT = r"(?:[0-9]|(?:an? )?(?:two|three|four|five|six|seven|eight|nine|ten|hundred|thousand)\b)"
OTHER_NUMBER = re.compile(
    rf"\w|[.,][0-9]|\s*/|\s*:\s*[0-9]|\s*out\b|\s+(?:of|in|to)\s+{_COUNT}", re.IGNORECASE
)

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ParsedCompletion:
    """What a completion says.

    Attributes:
        text: The completion as it was given.
        format: The format it was read as, one of `FORMATS`.
        answer: The answer without surrounding white space, or None.
        confidence: The stated probability that the answer is right, in [0, 1], or None.
        analysis: The model's account of its own uncertainty, or None.
        think: The reasoning, or None.
        ok: Strict mode: the completion is well formed. Lenient mode: an answer was found.
        error: What makes the completion malformed, one of `ERROR_CODES`, or None. In lenient mode
            this is what strict mode would say, also where `ok` is True.
        detail: The same for people, one sentence; `""` when well formed.
        spans: For each part found, `(start, end)` in characters of `text`, without surrounding
            white space: `text[start:end]` is the part. Keys: think, answer, analysis, confidence.
        confidence_source: `"stated"`, or `"missing"` when `confidence` is None.
    """

    text: str
    format: str
    answer: str | None
    confidence: float | None
    analysis: str | None
    think: str | None
    ok: bool
    error: str | None
    detail: str
    spans: dict[str, Span]
    confidence_source: str


def parse_completion(text: str, format: str = "tabc", mode: str = "strict") -> ParsedCompletion:
    r"""Read a completion; malformed text is reported in the result and never raises.

    Strict mode, for training. `<think>` may be absent, because a chat template may have put it
    into the prompt; `</think>` is required. Everything before the `</think>` that the chain of
    blocks follows is reasoning and may hold any text, other tags and other `</think>` included: of
    several `</think>` the last one followed by the first block counts. After it each block of the
    format must come once, in order, with only white space around it. Tags inside a block are an
    error. Tags are lower case. The confidence is `0`, `1`, `0.x`, `.x`, `1.` or `1.0` in ASCII
    digits: no sign, exponent, percent sign, comma, underscore or nan. A malformed completion has no
    parts: `answer` and `confidence` are None.

    Lenient mode, for evaluation. Each part is read from its last complete block after the last
    `</think>`, or from the last one anywhere if there is none after it. The first number in the
    confidence block counts: with a percent sign it is divided by 100, and so is one in (1, 100]
    without (`80%` and `80` are 0.8, `1%` is 0.01, `1` is 1.0). `0,8` is 0.8. Not guessed at are
    numbers out of range, `8/10`, `8 of 10`, `1 in 2`, `1:3`, `3 to 1`, `1e-1`, and one in (1, 10]
    among words, which may be on a scale of ten (`very high: 9`): the confidence is then missing.

    Args:
        text: The completion, without the prompt.
        format: `"tabc"` (think, answer, analysis, confidence), `"tbac"` (analysis before answer),
            `"tac"` (no analysis) or `"ta"` (answer only, for RLVR). Defaults to `"tabc"`.
        mode: `"strict"` or `"lenient"`. Defaults to `"strict"`.

    Returns:
        The parts and, for a malformed completion, the reason.

    Raises:
        UserError: `text` is not a str, or the format or mode is unknown.

    Example:
        >>> text = "2+2=4</think><answer>4</answer>\n<confidence>0.9</confidence>"
        >>> parsed = parse_completion(text, format="tac")
        >>> parsed.ok, parsed.answer, parsed.confidence
        (True, '4', 0.9)
        >>> parse_completion(text, format="tabc").error
        'missing_analysis'
    """
    if not isinstance(text, str):
        raise UserError(f"a completion must be a str, not {type(text).__name__}: {text!r:.80}")
    if format not in _BLOCKS:
        near = suggest(str(format), FORMATS)
        raise UserError(f"format must be one of {', '.join(FORMATS)}, not {format!r}.{near}")
    if mode not in MODES:
        raise UserError(f"mode must be 'strict' or 'lenient', not {mode!r}")
    spans = _well_formed(text, format)
    confidence = None
    problem = _malformation(text, format) if spans is None else _bad_content(text, spans)
    if spans is not None and problem is None and "confidence" in spans:
        confidence = float(text[slice(*spans["confidence"])])
    ok = problem is None
    if problem is not None:
        spans = {}
        if mode == "lenient":
            spans, confidence = _recovered(text)
            ok = "answer" in spans
    error, detail = problem or (None, "")
    parts = {name: text[start:end] for name, (start, end) in (spans or {}).items()}
    return ParsedCompletion(
        text=text,
        format=format,
        answer=parts.get("answer"),
        confidence=confidence,
        analysis=parts.get("analysis"),
        think=parts.get("think"),
        ok=ok,
        error=error,
        detail=detail,
        spans=spans or {},
        confidence_source="missing" if confidence is None else "stated",
    )


def _well_formed(text: str, format: str) -> dict[str, Span] | None:
    """Return the spans of the parts if the tags are as the format wants them, else None."""
    blocks = _BLOCKS[format]
    chain = _chain_start(text, blocks[0])
    if chain is None:
        return None
    think, position = chain
    spans = {"think": _think_span(text, think)}
    for name in blocks:
        position = _skip_space(text, position)
        if not text.startswith(f"<{name}>", position):
            return None
        start = position + len(name) + 2
        end = text.find(f"</{name}>", start)
        if end < 0 or _TAG.search(text, start, end):
            return None
        spans[name] = _stripped(text, start, end)
        position = end + len(name) + 3
    return spans if _skip_space(text, position) == len(text) else None


def _chain_start(text: str, first: str) -> Span | None:
    """Find the last `</think>` that `<first>` follows: where it starts and where it ends."""
    close = text.rfind(_CLOSE_THINK)
    while close >= 0:
        end = close + len(_CLOSE_THINK)
        if text.startswith(f"<{first}>", _skip_space(text, end)):
            return close, end
        close = text.rfind(_CLOSE_THINK, 0, close)
    return None


def _bad_content(text: str, spans: dict[str, Span]) -> tuple[str, str] | None:
    """Say what is wrong inside tags that are themselves in order."""
    start, end = spans["answer"]
    if start == end:
        return "empty_answer", "The answer block is empty."
    if "confidence" not in spans:
        return None
    number = text[slice(*spans["confidence"])]
    if _PROBABILITY.fullmatch(number):
        return None
    shown = f"{number:.40}"
    bare = number.removeprefix("-")
    if _DECIMAL.fullmatch(bare):
        negative = bare != number
        if (negative and float(bare) > 0) or (not negative and not _leading_zero(bare)):
            return "out_of_range", f"The confidence {shown} is not between 0 and 1."
    return (
        "not_a_number",
        f"The confidence {shown!r} is not a plain number from 0 to 1, such as 0.8.",
    )


def _leading_zero(number: str) -> bool:
    return number[:1] == "0" and number[1:2].isdigit()


def _malformation(text: str, format: str) -> tuple[str, str]:
    """Say what is wrong with the tags; called only when something is."""
    blocks = _BLOCKS[format]
    chain = _chain_start(text, blocks[0])
    close = chain[0] if chain else text.rfind(_CLOSE_THINK)
    if close < 0:
        if _OPEN_THINK in text:
            return "unclosed_tag", "<think> is never closed."
        return "missing_think", "There is no </think>."
    position = close + len(_CLOSE_THINK)
    found = _blocks_after(text, position)
    if found[0] is not None:
        return found
    names = [name for name, _, _ in found[1]]
    for name in names:
        if name in blocks and names.count(name) > 1:
            return "duplicate_tag", f"There is more than one {name} block."
    for name in blocks:
        if name not in names:
            return f"missing_{name}", f"There is no {name} block after </think>."
    wanted = [block for block in found[1] if block[0] in blocks]
    if tuple(name for name, _, _ in wanted) != blocks:
        order = ", ".join(blocks)
        return "wrong_order", f"The blocks must come in the order {order}."
    for name, start, end in wanted:
        if _skip_space(text, position) != start:
            return "text_between", f"There is text before the {name} block."
        position = end
    return "trailing_text", f"There is text after the {blocks[-1]} block."


def _blocks_after(
    text: str, position: int
) -> tuple[str, str] | tuple[None, list[tuple[str, int, int]]]:
    """Pair the tags from a position on: (None, blocks), or the code and detail of what is amiss."""
    tags = [(m[2], bool(m[1]), m.start(), m.end()) for m in _TAG.finditer(text, position)]
    last_close = {name: start for name, closing, start, _ in tags if closing}
    found: list[tuple[str, int, int]] = []
    name = None
    opened = opened_end = 0
    for tag, closing, start, end in tags:
        if name is None:
            if not closing and tag != "think":
                name, opened, opened_end = tag, start, end
            elif closing and tag != "think":
                return "unclosed_tag", f"</{tag}> closes nothing."
        elif closing and tag == name:
            found.append((name, opened, end))
            name = None
        elif last_close.get(name, -1) < opened_end:
            break
        else:
            return "nested_tag", f"<{'/' * closing}{tag}> stands inside the {name} block."
    if name is not None:
        return "unclosed_tag", f"<{name}> is never closed."
    return None, found


def _recovered(text: str) -> tuple[dict[str, Span], float | None]:
    """Find what can be read of a malformed completion, each part by its last complete block."""
    spans: dict[str, Span] = {}
    close = text.rfind(_CLOSE_THINK)
    if close >= 0:
        spans["think"] = _think_span(text, close)
    for name in _BLOCKS["tabc"]:
        span = _last_block(text, name)
        if span is not None and (name != "answer" or span[0] < span[1]):
            spans[name] = span
    confidence = None
    if "confidence" in spans:
        confidence = _lenient_number(text[slice(*spans["confidence"])])
    return spans, confidence


def _last_block(text: str, name: str) -> Span | None:
    """Return the last opening tag's content up to its closing one, if no other tag lies between."""
    before = text.rfind(f"</{name}>")
    start = text.rfind(f"<{name}>", 0, before) if before >= 0 else -1
    if start < 0:
        return None
    inside = start + len(name) + 2
    tag = _TAG.search(text, inside)
    if tag is None or tag[0] != f"</{name}>":
        return None
    return _stripped(text, inside, tag.start())


def _lenient_number(content: str) -> float | None:
    match = _LENIENT.search(content)
    if match is None:
        return None
    before, rest = content[: match.start()][-1:], content[match.end() :]
    comma = re.match(r",[0-9]+", rest)
    digits = match[0]
    if digits == "0" and comma:
        digits += "." + comma[0][1:]
        rest = rest[comma.end() :]
    if before.isalnum() or before == "_" or OTHER_NUMBER.match(rest):
        return None
    value = float(digits)
    percent = _PERCENT.match(rest)
    words = re.search(r"\w", content[: match.start()]) or re.search(r"\w", rest)
    if 1 < value <= 10 and words and not percent:
        return None
    if percent or value > 1:
        value /= 100
    return abs(value) if 0 <= value <= 1 else None  # abs: no minus zero


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # the pattern takes the empty string
    return match.end()


def _stripped(text: str, start: int, end: int) -> Span:
    content = text[start:end].rstrip()
    end = start + len(content)
    return end - len(content.lstrip()), end


def _think_span(text: str, close: int) -> Span:
    start = _skip_space(text, 0)
    start = start + len(_OPEN_THINK) if text.startswith(_OPEN_THINK, start) else 0
    return _stripped(text, min(start, close), close)


def render_completion(
    answer: str,
    confidence: str | float | None = None,
    *,
    think: str = "",
    analysis: str = "",
    format: str = "tabc",
) -> str:
    """Write a completion that `parse_completion` reads back.

    Args:
        answer: The answer.
        confidence: The confidence in [0, 1], as a number or as written. Needed unless the format is
            `"ta"`.
        think: The reasoning.
        analysis: The analysis, where the format has one.
        format: One of `FORMATS`.

    Returns:
        The blocks, every tag and text set apart by one space.

    Raises:
        UserError: the format is unknown, or what was written does not read back strictly.

    Example:
        >>> render_completion("4", 0.9, format="tac")
        '<think> </think> <answer> 4 </answer> <confidence> 0.9 </confidence>'
    """
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    parts = {"think": think, "answer": answer, "analysis": analysis, "confidence": confidence}
    words = []
    for name in ("think", *_BLOCKS[format]):
        content = "" if parts[name] is None else str(parts[name])
        words += [f"<{name}>", content, f"</{name}>"]
    text = " ".join(word for word in words if word)
    parsed = parse_completion(text, format)
    if not parsed.ok:
        raise UserError(f"no legal completion: {parsed.detail} It would read {text!r}")
    return text
