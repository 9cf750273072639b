"""What is asked of the model: system prompts, user turns, and texts that force a missing part.

The requirements are those of arXiv 2507.16806; the wording is this package's own, so results name
the prompt they were made with (`prompt_hash`). The order of the blocks is that of the format names
of `rlcr.parsing`: t(hink), a(nswer), b (uncertainty analysis), c(onfidence).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from rlcr.parsing import OTHER_NUMBER
from tenfold_common.errors import UserError, suggest

# What says after a number that it is on the scale from 0 to 100.
_OF_A_HUNDRED = r"\s*(?:%|percent\b|(?:/|(?:out )?of|in)\s*100\b(?![.,][0-9]))"

Message = dict[str, str]

_ORDERS = {
    "tabc": ("think", "answer", "analysis", "confidence"),
    "tbac": ("think", "analysis", "answer", "confidence"),
    "tac": ("think", "answer", "confidence"),
    "ta": ("think", "answer"),
}

_DUTIES = {
    "think": "reason about the problem step by step.",
    "answer": "state your final answer and nothing else.",
    "analysis": "examine how certain your reasoning and your final answer are, and say why.",
    "confidence": "give the probability that your final answer is right: one plain decimal number "
    "from 0 (surely wrong) to 1 (surely right), both allowed, and nothing else.",
}

_PLACEHOLDERS = {
    "think": "your reasoning",
    "answer": "your final answer",
    "analysis": "your analysis of the uncertainty",
    "confidence": "a number from 0 to 1",
}

_ANALYSIS_RULES = (
    "Point to the particular steps, facts or readings of the problem that may be wrong or that can "
    "be understood in more than one way.",
    "Do not repair or redo the solution here: only judge it.",
    "If little is doubtful, a short list of doubts, or none, is a good analysis.",
    "Being unsure of a step does not mean that the step is wrong; keep the two apart.",
    "Mention other approaches or answers that could reasonably have been chosen.",
    "Be specific to this problem; leave out remarks that would fit any problem.",
)

KINDS = ("general", "exact_match", "choice")

_KIND_NOTES = {
    "general": "",
    "exact_match": "Your answer will be compared word for word with the expected one. Put only the "
    "bare answer inside the answer tags: no full sentence, no explanation.",
    "choice": "Put only the letter of the choice you take inside the answer tags.",
}


def _template(order: tuple[str, ...]) -> str:
    return " ".join(f"<{tag}> {_PLACEHOLDERS[tag]} </{tag}>" for tag in order)


def _system_prompt(order: tuple[str, ...], rules: tuple[str, ...] = ()) -> str:
    lines = [
        "The user gives you a problem to solve. Your reply has "
        f"{len(order)} parts, in the order below, each inside its own pair of tags, and nothing "
        "follows the last tag.",
        *(f"{i}. Inside <{tag}> </{tag}>, {_DUTIES[tag]}" for i, tag in enumerate(order, 1)),
    ]
    if rules:
        lines += ["", "Rules for the part inside <analysis> </analysis>:"]
        lines += [f"- {rule}" for rule in rules]
    lines += ["", "The whole reply looks like this:", _template(order)]
    return "\n".join(lines)


SYSTEM_PROMPTS = {
    **{name: _system_prompt(order) for name, order in _ORDERS.items()},
    "tabc_long": _system_prompt(_ORDERS["tabc"], _ANALYSIS_RULES),
}
"""System prompt by name: one for each format of `rlcr.parsing`, and `"tabc_long"`."""


def system_prompt(format: str = "tabc", long: bool = False) -> str:
    """Return the system prompt of a format.

    Args:
        format: "tabc", "tbac", "tac" or "ta" (RLVR), as in `rlcr.parsing`.
        long: Add the rules for a good uncertainty analysis; only "tabc" has them. The paper uses
            the long prompt on HotpotQA and the short one on mathematics.

    Raises:
        UserError: the format is unknown, or has no long prompt.
    """
    if format not in _ORDERS:
        raise UserError(
            f"format {format!r} is not known; accepted: {', '.join(_ORDERS)}."
            + suggest(str(format), _ORDERS)
        )
    if long and format != "tabc":
        raise UserError(f"format {format!r} has no long system prompt; only 'tabc' has one")
    return SYSTEM_PROMPTS[f"{format}_long" if long else format]


def user_prompt(problem: str, kind: str = "general") -> str:
    """Return the user turn: the problem between blank lines, and how it will be graded.

    Args:
        problem: The problem text.
        kind: "general"; "exact_match", which asks for the bare answer; or "choice", which asks for
            the letter.

    Raises:
        UserError: the problem is empty or not a str, or the kind is unknown.
    """
    if not isinstance(problem, str) or not problem.strip():
        raise UserError(f"the problem must be a non-empty str, got {problem!r}")
    if kind not in _KIND_NOTES:
        raise UserError(
            f"kind {kind!r} is not known; accepted: {', '.join(KINDS)}." + suggest(str(kind), KINDS)
        )
    return f"PROBLEM:\n\n{problem.strip()}\n\n{_KIND_NOTES[kind]}".rstrip() + "\n"


def build_messages(
    problem: str, *, format: str = "tabc", long: bool = False, kind: str = "general"
) -> list[Message]:
    """Return the chat of one problem: a system and a user message, each {"role", "content"}.

    Args:
        problem: The problem text.
        format: Blocks of the reply, see `system_prompt`.
        long: Use the long system prompt.
        kind: How the answer is graded, see `user_prompt`.

    Raises:
        UserError: an argument is not accepted; the message says which.
    """
    return [
        {"role": "system", "content": system_prompt(format, long)},
        {"role": "user", "content": user_prompt(problem, kind)},
    ]


def plain_prompt(
    problem: str,
    *,
    format: str = "tabc",
    long: bool = False,
    kind: str = "general",
    open_think: bool = False,
) -> str:
    """Return the same request as one str, for base models without a chat template.

    Args:
        problem: The problem text.
        format: Blocks of the reply, see `system_prompt`.
        long: Use the long system prompt.
        kind: How the answer is graded, see `user_prompt`.
        open_think: End with an opening `<think>`, so that the completion starts inside it.

    Raises:
        UserError: an argument is not accepted; the message says which.
    """
    system, user = (
        m["content"] for m in build_messages(problem, format=format, long=long, kind=kind)
    )
    return f"{system}\n\nUser: {user}\nAssistant:{' <think>' if open_think else ''}"


def teacher_messages(problem: str, solution: str) -> list[Message]:
    """Return the chat that asks a teacher model for the analysis and confidence of a solution.

    Its replies, one `<analysis>` and one `<confidence>` block, are the `demo` column of
    `rlcr.data.build_sft_warmup`.

    Args:
        problem: The problem text.
        solution: A solution of it, right or wrong, written by the model to be warmed up.

    Raises:
        UserError: a text is empty or not a str.
    """
    if not isinstance(solution, str) or not solution.strip():
        raise UserError(f"the solution must be a non-empty str, got {solution!r}")
    system = (
        "You are shown a problem and a solution. Check the solution step by step, in the first "
        "person, as if it were your own, and write down how certain each part of it is.\n"
        "- Write at least 300 characters.\n"
        "- Check what is written; do not solve the problem again.\n"
        "- Mention wording that can be understood in more than one way, and what the solution "
        "takes for granted.\n"
        "Put the check inside <analysis> </analysis>. After it put the probability that the final "
        "answer is right, one plain decimal number from 0 to 1, inside <confidence> </confidence>. "
        "Write nothing else."
    )
    user = f"{user_prompt(problem)}\nSOLUTION:\n\n{solution.strip()}\n"
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def forced_answer(completion: str) -> str:
    """Return the assistant text to continue when a completion came without an answer.

    Open blocks are closed; the text ends with an opening `<answer>`. The paper lets the model
    continue for at most 50 tokens at temperature 0; stop at `</answer>`.
    """
    return f"{_closed(completion)}\n\nMy thinking has ended. My final answer is: <answer>"


def forced_confidence(completion: str) -> str:
    """Return the assistant text to continue when a completion came without a confidence.

    Open blocks are closed; the text asks for 0 to 100. The paper lets the model continue for at
    most 20 tokens at temperature 0. Read the reply with `read_forced_confidence`.
    """
    return (
        f"{_closed(completion)}\n\nMy confidence that this answer is right, as a whole number from "
        "0 to 100, is:"
    )


def read_forced_answer(reply: str) -> str | None:
    """Return the answer in the continuation of `forced_answer`, or None when it holds none.

    The answer ends at `</answer>`, else at the end of the first line with text.
    """
    answer, tag, _ = reply.partition("</answer>")
    if not tag:
        answer = reply.strip().partition("\n")[0]
    return answer.strip() or None


def read_forced_confidence(reply: str) -> float | None:
    """Return the confidence in [0, 1] in the continuation of `forced_confidence`.

    The first number is read on the scale that was asked for, so "1" is 0.01 and "90%" is 0.9.
    None when there is no number, when it is outside 0 to 100, or when it seems to be on another
    scale: a fraction of 1 ("0.8", "1.0"), a frequency or odds ("8 of 10", "1 in 2", "1:3"; "85/100"
    is 0.85), or up to 10 after other words ("very high: 9"). Which scale was meant cannot be told,
    and a guess could be wrong by 100.
    """
    said = reply.partition("<")[0]  # a number inside tags is something else
    found = re.search(rf"(?<![\w.])(-?[0-9]{{1,9}}(?:\.[0-9]{{1,9}})?)({_OF_A_HUNDRED})?", said)
    if found is None or (not found[2] and OTHER_NUMBER.match(said, found.end())):
        return None
    value = float(found[1])
    if not 0.0 <= value <= 100.0 or ("." in found[1] and 0.0 < value <= 1.0):
        return None
    if 0.0 < value <= 10.0 and not found[2] and re.search(r"\w", said[: found.start()]):
        return None
    return value / 100.0


def prompt_hash(
    *, format: str = "tabc", long: bool = False, kind: str = "general", plain: bool = False
) -> str:
    """Return 16 hexadecimal digits that change with any wording a result depends on.

    Args:
        format: Blocks of the reply, see `system_prompt`.
        long: Use the long system prompt.
        kind: How the answer is graded, see `user_prompt`.
        plain: The prompt is one str instead of a chat.

    Raises:
        UserError: an argument is not accepted; the message says which.
    """
    build = plain_prompt if plain else build_messages
    texts = [
        build("{problem}", format=format, long=long, kind=kind),
        forced_answer("{completion}"),
        forced_confidence("{completion}"),
    ]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def begun(prompt: str | Sequence[Mapping[str, str]], text: str) -> str | list[Mapping[str, str]]:
    """Return a prompt with the beginning of its reply, for a model to go on.

    Args:
        prompt: Text, or messages; if the last is the assistant's, `text` is added to it.
        text: What the reply begins with.
    """
    if isinstance(prompt, str):
        return prompt + text
    *before, last = prompt
    if last["role"] != "assistant":
        return [*prompt, {"role": "assistant", "content": text}]
    return [*before, {"role": "assistant", "content": last["content"] + text}]


def _closed(completion: str) -> str:
    """Close the blocks a cut-off completion left open, so that what follows is outside them."""
    text = completion.rstrip()
    if "</think>" not in text:
        text = f"{text}\n</think>".lstrip()
    reply = text[text.rfind("</think>") :]
    for tag in ("answer", "analysis", "confidence"):
        if reply.rfind(f"<{tag}>") > reply.rfind(f"</{tag}>"):
            text += f" </{tag}>"
    return text
