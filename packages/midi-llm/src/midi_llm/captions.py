"""Captions: written of measured attributes, thinned out for training, and read for what they ask.

`describe` writes in the manner of MidiCaps what `analyze` measured; `parse_caption` finds in any
caption what can be held against notes. Both work by templates and rules, without a network.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from midi_llm.attributes import (
    DENSITY_WORDS,
    DURATION_WORDS,
    TEMPO_WORDS,
    TONICS,
    MusicAttributes,
    coarse_tempo_word,
    density_word,
    duration_word,
    tempo_word,
)
from midi_llm.midi_write import Style, parse_key, with_what_fits
from midi_llm.vocab import DRUMS, PROGRAMS, instrument_name
from tenfold_common.errors import UserError

_LONGEST = 20_000  # letters of a caption
STYLES = ("midicaps", "plain", "short")
_STREAM = 2511_03942  # beside the seed: another stream than that of data with the same seed

# ------------------------------------------------------------------------------------------------
# From attributes to captions


def _spoken(instrument: int) -> tuple[str, ...]:
    """Return what captions call an instrument; `parse_caption` understands each of them."""
    name = instrument_name(instrument)
    if 96 <= instrument < 104 or 120 <= instrument < DRUMS:
        name += " effect"  # "rain" or "atmosphere" alone are words of any caption
    elif instrument == 87:
        name += " synth"  # "bass and lead guitar" are others
    return (name, *_SAID.get(instrument, ()))


_SAID: dict[int, tuple[str, ...]] = {
    0: ("piano", "grand piano"), 4: ("electric piano",), 11: ("vibes",), 19: ("organ",),
    24: ("acoustic guitar", "classical guitar", "guitar"), 25: ("steel string guitar",),
    27: ("electric guitar", "lead guitar"), 30: ("distorted guitar",),
    32: ("double bass", "upright bass"),
    33: ("electric bass", "bass", "bass guitar"), 38: ("synth bass",), 48: ("strings",
    "string ensemble", "string section"), 50: ("synth strings", "synthesized strings"),
    52: ("choir",), 53: ("voice",), 60: ("horn",), 61: ("brass", "brass ensemble"),
    62: ("synth brass",), 64: ("soprano saxophone",), 65: ("alto saxophone", "saxophone", "sax"),
    66: ("tenor saxophone",), 67: ("baritone saxophone",), 80: ("synth lead", "synth",
    "synthesizer"), 89: ("synth pad", "pad"), DRUMS: ("drum kit", "percussion", "drum set"),
}  # fmt: skip


def describe(
    attributes: MusicAttributes, *, style: str = "midicaps", seed: int = 0, dropout: float = 0.0
) -> str:
    """Write a caption of attributes.

    Args:
        attributes: What to say.
        style: "midicaps", two to five sentences in the manner of MidiCaps, with changing words
            and at random some of mood, density, range and duration; "plain", all of them, a
            sentence each; "short", a list as one types it.
        seed: Which words; the same seed gives the same caption.
        dropout: Probability that an attribute is left out, 0 to 1; one always stays.

    Raises:
        UserError: there is nothing to say (no notes), or an argument is out of range.
    """
    if style not in STYLES:
        raise UserError(f"style must be one of {', '.join(STYLES)}, not {style!r}")
    if not 0 <= dropout <= 1:
        raise UserError(f"dropout must be 0 to 1, not {dropout!r}")
    if not attributes.instruments:
        raise UserError("there is nothing to describe: the music has no notes")
    rng = np.random.default_rng([seed, _STREAM])
    facts = _facts(attributes)
    if style == "midicaps":
        rare = ("mood", "density", "range", "duration")
        facts = {k: v for k, v in facts.items() if k not in rare or rng.random() < 0.5}
    elif style == "short":
        facts = {k: v for k, v in facts.items() if k not in ("density", "range", "duration")}
    stays = list(facts)[rng.integers(len(facts))]
    facts = {k: v for k, v in facts.items() if rng.random() >= dropout or k == stays}
    said = {k: v[rng.integers(len(v))] if style == "midicaps" else v[0] for k, v in facts.items()}
    if "instruments" in said:
        names = [_spoken(i) for i in attributes.instruments]
        chosen = [
            min(n, key=len) if style == "short"
            else n[0] if style == "plain"
            else n[rng.integers(len(n))] for n in names
        ]  # fmt: skip
        said["instruments"] = _listed(chosen)
    if style == "short":
        return ", ".join(said[k].removeprefix("in ").removeprefix("at ") for k in said)
    if style == "plain":
        return _plain(said)
    return _flowing(said, rng)


def _facts(attributes: MusicAttributes) -> dict[str, tuple[str, ...]]:
    """Return the ways in which to say each attribute; of instruments there are more elsewhere."""
    facts: dict[str, tuple[str, ...]] = {}
    if attributes.mood:
        facts["mood"] = (" and ".join(attributes.mood), attributes.mood[0])
    facts["instruments"] = ("",)
    if attributes.key is not None:
        tonic, mode = parse_key(attributes.key)
        spelt = (
            tonic.replace("#", " sharp") if "#" in tonic else tonic[0] + " flat" * ("b" in tonic)
        )
        facts["key"] = (f"in {tonic} {mode}", f"in the key of {tonic} {mode}", f"in {spelt} {mode}")
    if attributes.time_signature is not None:
        beats, unit = attributes.time_signature
        facts["metre"] = (
            f"in {beats}/{unit} time", f"with a {beats}/{unit} time signature", f"in {beats}/{unit}"
        )  # fmt: skip
    if attributes.tempo is not None:
        number, word = f"{attributes.tempo:.0f}", tempo_word(attributes.tempo)
        coarse = coarse_tempo_word(attributes.tempo).lower().removesuffix(" tempo")
        facts["tempo"] = (
            f"at {number} bpm", f"at a tempo of {number} beats per minute", f"at {number} BPM",
            f"at {_a(word)} tempo of {number} bpm", f"at {_a(word)} tempo", f"at a {coarse} tempo",
        )  # fmt: skip
    facts["density"] = (f"The texture is {density_word(attributes.notes_per_second)}.",)
    facts["density"] += (f"About {attributes.notes_per_second:.1f} notes sound per second.",)
    if attributes.pitch_range is not None:
        low, high = (f"{TONICS['major'][p % 12]}{p // 12 - 1}" for p in attributes.pitch_range)
        facts["range"] = (f"Its pitches range from {low} to {high}.",)
    facts["duration"] = (
        f"It lasts about {max(attributes.seconds, 1):.0f} seconds.",
        f"It is a {attributes.duration_word.lower()}.",
    )
    return facts


def _plain(said: dict[str, str]) -> str:
    forms = {
        "mood": "The mood is {}.", "instruments": "It is played by {}.", "key": "It is {}.",
        "metre": "It is {}.", "tempo": "It goes {}.",
    }  # fmt: skip
    return " ".join(forms.get(k, "{}").format(v) for k, v in said.items())


def _flowing(said: dict[str, str], rng: np.random.Generator) -> str:
    """Write sentences in the manner of MidiCaps: mood and instruments, then key, metre, tempo."""

    def pick(*choices: str) -> str:
        return choices[rng.integers(len(choices))]

    noun = pick("piece", "composition", "tune", "track", "instrumental")
    first = f"{_a(said['mood'])} {noun}" if "mood" in said else pick(_a(noun), f"This {noun}")
    sentences = []
    if "instruments" in said:
        opening = pick("features", "is played by", "is led by", "is carried by")
        if "mood" in said or not first.startswith("This"):
            opening = pick("featuring", "played by", "led by", "for")
        sentences.append(f"{first} {opening} {said['instruments']}.")
    elif "mood" in said:
        sentences.append(f"{first}.")
    parts = [said[k] for k in ("key", "metre", "tempo") if k in said]
    if len(parts) == 3 and rng.random() < 0.3:
        sentences.append(f"It is {parts[0]}.")
        parts = parts[1:]
    if parts:
        start = pick(
            "It is", "The music moves", f"The {noun} is set", "It unfolds", "It is written"
        )
        start = "It comes" if parts[0].startswith("with") else start
        sentences.append(f"{start} {_listed(parts)}.")
    more = [said[k] for k in ("density", "range", "duration") if k in said]
    sentences += [more[i] for i in rng.permutation(len(more))]
    return " ".join(s[0].upper() + s[1:] for s in sentences)


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiouAEIOU' else 'a'} {word}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def caption_dropout(
    text: str, rng: np.random.Generator, *, probability: float = 0.5, least: int = 0
) -> str:
    """Leave out sentences of a caption; by default as in the training of Text2midi.

    With some probability a share of 20 to 50 % of the sentences goes, rounded down if there are
    fewer than four and up otherwise, but never all of them; their order stays.

    Args:
        text: Sentences end with a full stop, an exclamation or a question mark and a space.
        rng: Is advanced alike whatever the text.
        probability: That sentences go at all.
        least: How many go then even where the share is rounded to fewer.
    """
    leave_out, share, order_seed = rng.random(), rng.uniform(0.2, 0.5), rng.integers(2**63)
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    count = len(sentences)
    gone = int(np.floor(share * count) if count < 4 else np.ceil(share * count))
    gone = min(max(gone, least), count - 1)
    if leave_out >= probability or gone == 0:
        return text
    order = np.random.default_rng(order_seed).permutation(count)
    return " ".join(sentences[i] for i in sorted(order[gone:].tolist()))


# ------------------------------------------------------------------------------------------------
# From captions to what they ask for


@dataclass(frozen=True)
class Request:
    """What was asked for, as far as notes can be held against it; None is: not asked.

    Attributes:
        key: Such as "C minor".
        tempo: Beats a minute.
        tempo_word: One of `TEMPO_WORDS` or `COARSE_WORDS`; of the tempo, if that is known.
        instruments: Numbers 0 to 128, in the order in which they are named.
        time_signature: Beats of a bar and the note that is one.
        notes_per_second: As of `MusicAttributes`.
        density_word: One of `DENSITY_WORDS`.
        seconds: How long.
        duration_word: One of `DURATION_WORDS`.
    """

    key: str | None = None
    tempo: float | None = None
    tempo_word: str | None = None
    instruments: tuple[int, ...] | None = None
    time_signature: tuple[int, int] | None = None
    notes_per_second: float | None = None
    density_word: str | None = None
    seconds: float | None = None
    duration_word: str | None = None

    @classmethod
    def of(cls, asked: "Request | MusicAttributes | str") -> "Request":
        """Make a request of attributes (all of them are asked for) or of a caption.

        Raises:
            UserError: it is neither.
        """
        if isinstance(asked, Request):
            return asked
        if isinstance(asked, str):
            return parse_caption(asked)
        if not isinstance(asked, MusicAttributes):
            raise UserError(
                "what was asked for must be a caption, MusicAttributes or a Request, not "
                f"{type(asked).__name__}"
            )
        some = asked.instruments or None
        return cls(
            asked.key, asked.tempo, asked.tempo_word, some, asked.time_signature,
            asked.notes_per_second if some else None,
            density_word(asked.notes_per_second) if some else None,
            asked.seconds if some else None, asked.duration_word if some else None,
        )  # fmt: skip


_SIGN = {"sharp": "#", "#": "#", "\u266f": "#", "flat": "b", "b": "b", "\u266d": "b"}
# A small "a" is an article but in "key of a minor" and "a flat major".
_SMALL_A = r"(?<=of )a|a(?=b\b|#|[\s-]?(?:sharp|flat|\u266f|\u266d)\b)"
_TONIC = (
    rf"(?P<tonic>[A-Gb-g]|{_SMALL_A})(?:[\s-]?(?P<sign>sharp|flat|\u266f|\u266d|#)|(?P<tight>b))?"
)
_NO_CHORD = r"(?![\s-]*(?:chords?|triads?|sevenths?|7|thirds?|sixths?|seconds?)\b)"
_KEY = re.compile(
    rf"(?<![\w#']){_TONIC}[\s-]*(?P<mode>[Mm]ajor|[Mm]inor|MAJOR|MINOR|maj|min)\b{_NO_CHORD}"
)
_KEY_OF = re.compile(
    rf"(?:[Kk]ey(?: of| is|:)|[Ii]n) {_TONIC}(?P<mode>m?)(?![\w#'-])"
    rf"(?! \w+ (?:key|mode)\b){_NO_CHORD}"
)
_BPM = re.compile(
    r"(?<![\d.])(\d{2,3}(?:\.\d{1,9})?)[\s-]*(?:bpm\b|beats (?:per|a) minute)"
    r"|(?:tempo|speed) (?:of|is|at) (?:about |around )?(\d{2,3}(?:\.\d{1,9})?)"
    r"(?!\.?\d)(?! ?(?:%|sec))",
    re.IGNORECASE,
)
_SPEED = re.compile(
    r"\b(?:(very fast)|(moderate|medium|mid)[ -](?:paced|tempo)|tempo is (moderate)|(fast)|(slow))"
    r"\b(?! (?:attack|decay|release|build))",
    re.IGNORECASE,
)
_METRE = re.compile(r"(?<![\d/])(\d{1,2})/(2|4|8|16|32)(?![\d/])")
_METRES = {"common time": (4, 4), "cut time": (2, 2), "waltz time": (3, 4)}
_RATE = re.compile(
    r"(?<![\d.])(\d{1,4}(?:\.\d{1,9})?) notes (?:\w+ )?(?:per|a|every) second", re.IGNORECASE
)
_LONG = re.compile(
    r"(?<![\d.])(\d{1,5}(?:\.\d{1,9})?)[\s-]?(sec|min)(?:ond|ute)?s?\b", re.IGNORECASE
)
_WITHOUT = re.compile(r"\b(?:no|without|without any|not|lacks?) (?:the |a |an )?$")


def parse_caption(text: str) -> Request:
    """Find in a caption what can be checked in notes, by rules.

    It knows keys ("F# minor", "B flat major", "key of Cm"; not "a minor key", and no chords),
    tempos (a number of beats a minute, else one of the words of MidiCaps, slow, moderate or medium
    tempo, fast, very fast), instruments of General MIDI and their common names ("without drums"
    asks for none), metres ("6/8", "common time"), and how dense and long the music should be. Of
    several keys, tempos or metres the first counts.

    Raises:
        UserError: the text is none or has more than 20,000 letters.
    """
    if not isinstance(text, str):
        raise UserError(f"a caption must be text, not {type(text).__name__}")
    if len(text) > _LONGEST:
        raise UserError(f"a caption of {len(text)} letters; at most {_LONGEST} are read")
    lower = text.lower()
    bpm = next((float(m[1] or m[2]) for m in _BPM.finditer(text)), None)
    bpm = bpm if bpm is not None and 20 <= bpm <= 400 else None
    metre = _METRE.search(text)
    rate, long = _RATE.search(text), _LONG.search(text)
    seconds = float(long[1]) * (60 if long[2].lower().startswith("m") else 1) if long else None
    notes = float(rate[1]) if rate else None
    words = [w for w in DURATION_WORDS if w != "Song" and w.lower() in lower]  # any is a "song"
    dense = re.search(rf"\btexture is ({'|'.join(DENSITY_WORDS)})\b", lower)
    return Request(
        key=_find_key(text),
        tempo=bpm,
        tempo_word=tempo_word(bpm) if bpm is not None else _find_speed(text),
        instruments=_find_instruments(lower) or None,
        time_signature=(int(metre[1]), int(metre[2]))
        if metre and int(metre[1])
        else next((m for name, m in _METRES.items() if name in lower), None),
        notes_per_second=notes,
        density_word=density_word(notes) if notes is not None else dense and dense[1],
        seconds=seconds,
        duration_word=duration_word(seconds) if seconds is not None else (words or [None])[0],
    )


def style_of_prompt(text: str, *, key: str | None = None) -> Style:
    """Return the tempo (if it is a number), metre and key that a prompt asks for, for files.

    Args:
        text: The prompt; see `parse_caption`.
        key: Written in place of the prompt's.

    Raises:
        UserError: `key` is none, or one that no file can have.
    """
    found = parse_caption(text[:_LONGEST])
    return with_what_fits(
        Style(key=key), tempo=found.tempo, time_signature=found.time_signature,
        key=found.key if key is None else None,
    )  # fmt: skip


def _find_key(text: str) -> str | None:
    for found in _KEY.finditer(text):
        # "A minor key makes it sad" begins a sentence, "In A minor" does not.
        begins = not text[: found.start()].rstrip() or text[: found.start()].rstrip()[-1] in ".!?"
        if found["tonic"] == "A" and begins and re.match(r"\s+(?:key|mode)\b", text[found.end() :]):
            continue
        return _key_name(found)
    found = _KEY_OF.search(text)
    return _key_name(found) if found and (found[0][0] in "kK" or found["mode"]) else None


def _key_name(found: re.Match[str]) -> str:
    sign = _SIGN[found["sign"] or "b"] if found["sign"] or found["tight"] else ""
    tonic, mode = parse_key(f"{found['tonic'].upper()}{sign} {found['mode'].lower()}")
    return f"{tonic} {mode}"


def _find_speed(text: str) -> str | None:
    """Return the first tempo word; "grave" counts with a capital or before "tempo" only."""
    pattern = rf"\b(?:{'|'.join(TEMPO_WORDS[1:])})\b"
    found = [(m.start(), m[0].capitalize()) for m in re.finditer(pattern, text, re.IGNORECASE)]
    found += [(m.start(), "Grave") for m in re.finditer(r"\bGrave\b|\bgrave tempo\b", text)]
    if found:
        return min(found)[1]
    match = _SPEED.search(text)
    if match is None:
        return None
    which = next(i for i, group in enumerate(match.groups()) if group)
    return ("Very fast", "Moderate tempo", "Moderate tempo", "Fast", "Slow")[which]


@cache
def _names() -> tuple[re.Pattern[str], dict[str, int]]:
    known = {"bass drum": DRUMS, "drum": DRUMS, "steel drum": 114}
    known |= {n.removesuffix(" 1"): i for i, n in enumerate(PROGRAMS) if n.endswith(" 1")}
    for number in range(DRUMS + 1):
        known |= dict.fromkeys(_spoken(number), number)
    known |= {name.replace("-", " "): number for name, number in known.items()}
    names = sorted(known, key=len, reverse=True)  # "bass drum" before "bass"
    return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, names))})(?:e?s)?(?![\w])"), known


def _find_instruments(lower: str) -> tuple[int, ...]:
    pattern, known = _names()
    found = (
        known[m[1]]
        for m in pattern.finditer(lower)
        if not _WITHOUT.search(lower[max(m.start() - 24, 0) : m.start()])
    )
    return tuple(dict.fromkeys(found))
