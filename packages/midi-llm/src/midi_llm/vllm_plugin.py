"""The grammar inside vLLM: logits processors for its two model runners.

vLLM is told of them by name, `midi_llm.vllm_plugin:MidiGrammarV1` or `...:MidiGrammarV2`, when an
engine or a server starts; `processor_name` says which. They are not registered as entry points on
purpose: vLLM would load both everywhere, and each runner refuses to start with the other's class,
so installing this package would break all other uses of vLLM in the environment.

A request is bound to the grammar by `SamplingParams.extra_args={"midi": {...}}`, or over HTTP by
`vllm_xargs={"midi": "..."}`, the same as JSON; requests without it are left alone:

    grid         fields of AMTConfig
    offset       the model's id of music id 0
    max_events   events after which the sequence ends
    constraints  fields of GenerationConstraints; left out for none
    given        [[onset, duration, note], ...], events that stand in the prompt
    controls     events to be anticipated, rising
    placed       how many of them, the first ones, stand in the prompt already
    start        tick before which no event may begin

The prompt must end before an onset, and the separator must be a stop id (`stop_token_ids`). What
cannot go on, since constraints leave nothing or logits are NaN, ends with an id that is not
allowed: an error here would end the whole engine with all requests. Who reads the answer finds out
by pushing its ids through a `Grammar`, as `midi_llm.vllm_engine` does.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from midi_llm.anticipate import REST
from midi_llm.grammar import Allowed, GenerationConstraints, Grammar, Rules
from midi_llm.vocab import AMTConfig
from tenfold_common.errors import UserError, suggest
from tenfold_common.optional import require

if TYPE_CHECKING:
    from torch import Tensor

_WANTED = {"extra": "vllm", "package": "midi-llm", "purpose": "the engine vllm"}
require("vllm", **_WANTED)
_v1 = require("vllm.v1.sample.logits_processor", **_WANTED)
_v2 = require("vllm.v1.worker.gpu.sample.logits_processor", **_WANTED)

_FIELDS = ("grid", "offset", "max_events", "constraints", "given", "controls", "placed", "start")
_NOTHING = 1e30  # logit of id 0, a text's, in a row that has no other


def processor_name(vllm_config: Any) -> str:
    """Return the name of the processor for the model runner that a config leads to."""
    return f"{__name__}:MidiGrammarV{2 if vllm_config.use_v2_model_runner else 1}"


class _Sequence:
    """A request's grammar and how far it has come.

    Args:
        make: Makes the grammar anew.
        offset: The id of music id 0.
        size: How many ids the model has.
    """

    def __init__(self, make: Callable[[], Grammar], offset: int, size: int = 2**62) -> None:
        self.make, self.offset = make, offset
        self.grammar = make()
        self.fits = offset + self.grammar.rules.config.size <= size
        self.done = 0  # ids taken note of
        self.stuck = False

    def follow(self, ids: Sequence[int]) -> None:
        """Take note of all ids generated so far, of which some may have been taken back."""
        if len(ids) < self.done:
            self.grammar, self.done, self.stuck = self.make(), 0, False
        for id in ids[self.done :]:
            self.advance(id)

    def advance(self, id: int) -> None:
        """Take note of one more id of the model."""
        self.done += 1
        if not self.stuck and not self.grammar.finished:
            try:
                self.grammar.push(id - self.offset)
            except (ValueError, ArithmeticError):
                self.stuck = True

    def allowed(self) -> Allowed:
        """Return which ids of the model may follow."""
        separator = self.grammar.rules.config.separator
        found = Allowed(separator, separator + 1)  # an ended or stuck sequence is made to stop
        if not self.fits:
            return Allowed(0, 1)
        if not self.stuck and not self.grammar.finished:
            try:
                found = self.grammar.allowed()
            except (ValueError, ArithmeticError):
                self.stuck = True
        extra = None if found.extra is None else self.offset + found.extra
        return Allowed(self.offset + found.start, self.offset + found.stop, found.mask, extra)


def read_request(params: Any) -> "tuple[Callable[[], Grammar], int] | None":
    """Read what a request asks for.

    Args:
        params: vLLM's `SamplingParams`.

    Returns:
        What makes its grammar, and the offset; None if it is not bound to a grammar.

    Raises:
        UserError: a field is missing, unknown or wrong.
    """
    values = (params.extra_args or {}).get("midi")
    if values is None:
        return None
    try:
        values = json.loads(values) if isinstance(values, str) else values
    except (ValueError, RecursionError) as error:
        raise UserError(f'"midi" is not JSON: {error}') from error
    if not isinstance(values, Mapping):
        raise UserError(f'"midi" must be an object, not {type(values).__name__}')
    for name in values:
        if name not in _FIELDS:
            raise UserError(f'"midi" has no field {name!r}.{suggest(str(name), _FIELDS)}')
    for name in _FIELDS[:3]:
        if name not in values:
            raise UserError(f'"midi" lacks {name!r}')
    offset, max_events = values["offset"], values["max_events"]
    placed, start = values.get("placed", 0), values.get("start", 0)
    numbers = (
        ("offset", offset, 1), ("max_events", max_events, 1), ("placed", placed, 0),
        ("start", start, 0),
    )  # fmt: skip
    for name, value, low in numbers:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise UserError(f"{name} must be a whole number of at least {low}, not {value!r}")
    try:
        rules = _rules(
            json.dumps(values["grid"], sort_keys=True),
            json.dumps(values.get("constraints") or {}, sort_keys=True),
        )
        given = _events(values.get("given"), rules.config, rests=True)
        controls = _events(values.get("controls"), rules.config, rests=False)
    except (TypeError, ArithmeticError, RecursionError, AttributeError) as error:
        raise UserError(f'"midi" does not fit: {error}') from error
    if controls is not None and not rules.config.anticipation:
        raise UserError("this grid has no controls (anticipation is false)")

    def make() -> Grammar:
        return Grammar(
            rules, max_events=max_events, given=given, controls=controls, placed=placed, start=start
        )

    return make, offset


@lru_cache(maxsize=64)
def _rules(grid: str, constraints: str) -> Rules:
    return Rules(
        AMTConfig.from_dict(json.loads(grid)),
        GenerationConstraints.from_dict(json.loads(constraints)),
    )


def _events(values: Any, config: AMTConfig, *, rests: bool) -> "np.ndarray | None":
    if values is None or not len(values):
        return None
    events = np.array(values)
    if events.ndim != 2 or events.shape[1] != 3 or events.dtype.kind != "i":
        raise UserError("events are lists of three whole numbers: onset, duration, note")
    longest = 2**31 if rests else config.durations  # what was given may sound on
    low, high = [0, 0, REST if rests else 0], [config.times, longest, config.notes]
    if (events < low).any() or (events >= high).any():
        raise UserError("an event lies outside the grid")
    if (np.diff(events[:, 0]) < 0).any():
        raise UserError("the onsets of events must rise")
    return events


def _validate(params: Any) -> None:
    found = read_request(params)
    if found is not None:
        try:
            found[0]().allowed()
        except ArithmeticError as error:
            raise UserError(f"a constraint is too large or too small: {error}") from error


def _sequence(params: Any, size: int) -> "_Sequence | None":
    found = read_request(params)
    return None if found is None else _Sequence(*found, size)


def keep_allowed(logits: "Tensor", rows: Sequence[int], allowed: Sequence[Allowed]) -> None:
    """Set all logits of rows to -inf but those of allowed ids; others stay as they are.

    A row with NaN among those of its range keeps only id 0, no music, for a sign.

    Args:
        logits: `[batch, ids]` float32, changed in place.
        rows: Which ones.
        allowed: Ids of the model for each.
    """
    import torch

    if not rows:
        return
    # However many rows there are, one window holds all their ranges: few kernels, one copy.
    low, high = min(a.start for a in allowed), max(a.stop for a in allowed)
    inside = np.zeros((len(rows), high - low), bool)
    for row, one in zip(inside, allowed, strict=True):
        row[one.start - low : one.stop - low] = True if one.mask is None else one.mask
    extra = [(row, a.extra) for row, a in zip(rows, allowed, strict=True) if a.extra is not None]
    device, nothing = logits.device, -float("inf")
    index = torch.tensor(rows, device=device)
    window = logits[index, low:high]
    window.masked_fill_(~torch.from_numpy(inside).to(device, non_blocking=True), nothing)
    broken = window.isnan().any(1)
    window.masked_fill_(broken[:, None], nothing)
    at = torch.tensor(extra, device=device).T if extra else None
    kept = None if at is None else logits[at[0], at[1]]
    logits[index] = nothing
    logits[index, low:high] = window
    if at is not None and kept is not None:
        logits[at[0], at[1]] = kept.masked_fill(kept.isnan(), nothing)
    logits[index, 0] = torch.where(broken, _NOTHING, logits[index, 0])


class MidiGrammarV1(_v1.LogitsProcessor):
    """The grammar for vLLM's model runner V1, that of CPUs; see the module.

    Args:
        vllm_config: vLLM's.
        device: vLLM's.
        is_pin_memory: vLLM's.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._size = vllm_config.model_config.get_vocab_size()
        self._rows: dict[int, tuple[_Sequence, list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request whose "midi" is wrong; raises UserError, which is a ValueError."""
        _validate(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """Say that the likeliest id may change."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow requests that come, go and move within the batch."""
        _v1.process_dict_updates(self._rows, batch_update, self._new)

    def _new(
        self, params: Any, prompt: "list[int] | None", output: list[int]
    ) -> "tuple[_Sequence, list[int]] | None":
        sequence = _sequence(params, self._size)
        return None if sequence is None else (sequence, output)  # output grows as vLLM goes on

    def apply(self, logits: "Tensor") -> "Tensor":
        """Leave only allowed ids in the rows of requests with a grammar."""
        for sequence, output in self._rows.values():
            known = len(output)
            while known and output[known - 1] < 0:  # a place kept for an id that is not known yet
                known -= 1
            sequence.follow(output[:known] if known < len(output) else output)
        allowed = [sequence.allowed() for sequence, _ in self._rows.values()]
        keep_allowed(logits, list(self._rows), allowed)
        return logits


class MidiGrammarV2(_v2.LogitsProcessor):
    """The grammar for vLLM's model runner V2, that of GPUs; see the module.

    Args:
        vllm_config: vLLM's.
        req_states: What vLLM keeps of requests.

    Raises:
        UserError: speculative decoding is on.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        if getattr(vllm_config, "speculative_config", None) is not None:
            raise UserError("the grammar of music does not work with speculative decoding")
        self._size = vllm_config.model_config.get_vocab_size()
        self._states = req_states
        self._sequences: dict[int, _Sequence] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request whose "midi" is wrong; raises UserError, which is a ValueError."""
        _validate(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a request into a slot, and return whether it has a grammar."""
        sequence = _sequence(sampling_params, self._size)
        if sequence is None:
            self._sequences.pop(req_idx, None)
            return False
        self._sequences[req_idx] = sequence
        return True

    def apply(self, logits: "Tensor", ctx: Any) -> "Tensor":
        """Leave only allowed ids in the rows of requests with a grammar."""
        import torch

        if not self._sequences.keys() & set(ctx.idx_mapping_np.tolist()):
            return logits
        # The one wait for the device in a step: which ids it drew in the last.
        columns = (ctx.expanded_idx_mapping, ctx.pos, ctx.input_ids)
        table = torch.stack([column.long() for column in columns]).tolist()
        rows, allowed = [], []
        for row, (slot, position, last) in enumerate(zip(*table, strict=True)):
            sequence = self._sequences.get(slot)
            if sequence is None:
                continue
            prompt = int(self._states.prompt_len.np[slot])
            known = position + 1 - prompt
            if known < 0:
                continue  # a part of a long prompt; what is drawn there is thrown away
            if known == sequence.done + 1:
                sequence.advance(last)
            elif known != sequence.done:  # it was interrupted, and goes on
                ids = self._states.all_token_ids.gpu[slot, prompt : position + 1]
                sequence.follow(ids.tolist())
            rows.append(row)
            allowed.append(sequence.allowed())
        keep_allowed(logits, rows, allowed)
        return logits
