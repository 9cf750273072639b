"""Decoding: equal to transformers' own, legal whatever is drawn, and true to what is given."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import LogitsProcessor

from midi_llm.anticipate import REST
from midi_llm.decode import Composer, MidiLM, Sampling, _draw, decode
from midi_llm.grammar import GenerationConstraints, Grammar, Rules
from midi_llm.midi_read import read_notes
from midi_llm.midi_write import Style
from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
from midi_llm.notes import Note, Notes
from midi_llm.tokenizer import AMTTokenizer
from midi_llm.vocab import AMTConfig
from tenfold_common.errors import UserError
from tenfold_common.tiny import byte_tokenizer, tiny_llama

SMALL = AMTConfig.small()
ANTICIPATING = AMTConfig(20, 20, 4, 17, 128, True)
PROMPTS = ["a", "sad tune", "a fast dance for flute", "x y"]
GREEDY = Sampling(temperature=0)


@functools.cache
def tokenizer(config):
    return AMTTokenizer(config)


def make(amt=SMALL, *, stop=-25.0, bias=True, room=512, hidden=32, seed=3):
    """Make a model whose pieces last: its head is steep, and early onsets are likely."""
    text = byte_tokenizer()
    model = tiny_llama(
        len(text), hidden=hidden, layers=1, tie_word_embeddings=False, seed=seed,
        max_position_embeddings=room,
    )  # fmt: skip
    expand_vocabulary(model, amt, seed=seed)
    rows = model.config.vocab_size
    head = torch.nn.Linear(hidden, rows, bias=bias)
    offset = model.config.music_offset
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # what came before matters
        head.weight.copy_(model.lm_head.weight * 20)
        if bias:
            head.bias.zero_()
            head.bias[offset : offset + amt.times] = -0.3 * torch.arange(amt.times)
            head.bias[offset + amt.separator] = stop
            head.bias[offset + amt.duration_offset] = -2  # rests
    model.set_output_embeddings(head)
    return MidiLM(model.eval(), TextMidiProcessor(text, amt, len(text), system=""))


@functools.cache
def singer(amt=SMALL, **named):
    return make(amt, **named)


def greedy(made, prompts, *, most=20, wanted=None, sliced=True, sampling=GREEDY, each=None):
    rules = Rules(made.processor.amt, wanted)
    grammars = [Grammar(rules, max_events=most) for _ in prompts]
    found = decode(
        made.model, [made.processor.encode(p) for p in prompts], grammars, made.processor.offset,
        sampling, seeds=range(len(prompts)), pad=0, sliced=sliced, each=each,
    )  # fmt: skip
    return found, grammars


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first.columns, second.columns, strict=True))


# ------------------------------------------------------------------------------------------------
# Equal to other ways


WANTED = {
    "free": None,
    "wanted": GenerationConstraints(
        instruments=[0, 40, "drums"], key="D minor", max_polyphony=2, notes_per_second=4,
        end_time=12, min_notes=5,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("wanted", "bias"), [("free", True), ("wanted", True), ("free", False)])
def test_the_sliced_head_equals_the_full_one(wanted, bias):
    made = singer(bias=bias)
    one, _ = greedy(made, PROMPTS, wanted=WANTED[wanted])
    two, _ = greedy(made, PROMPTS, wanted=WANTED[wanted], sliced=False)
    assert one == two
    drawn = Sampling(1.0, 0.9)
    one, _ = greedy(made, PROMPTS, wanted=WANTED[wanted], sampling=drawn)
    two, _ = greedy(made, PROMPTS, wanted=WANTED[wanted], sampling=drawn, sliced=False)
    assert one == two
    if bias:
        assert len({tuple(ids) for ids in one}) == len(PROMPTS)
        assert min(map(len, one)) >= 15


class Masked(LogitsProcessor):
    """Leaves what a grammar allows, found anew from all ids at each step."""

    def __init__(self, rules, most, width, offset):
        self.rules, self.most, self.width, self.offset = rules, most, width, offset

    def __call__(self, input_ids, scores):
        masked = torch.full_like(scores, -math.inf)
        for row, ids in enumerate(input_ids[:, self.width :].tolist()):
            grammar = Grammar(self.rules, max_events=self.most)
            for one in ids:
                if not grammar.finished:
                    grammar.push(one - self.offset)
            allowed = [0] if grammar.finished else self.offset + grammar.allowed().ids()
            masked[row, allowed] = scores[row, allowed]
        return masked


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("stop", [-25.0, -1000.0])
def test_greedy_equals_generate_of_transformers(wanted, stop):
    made, most = singer(stop=stop), 15
    amt, offset = made.processor.amt, made.processor.offset
    prompts = [made.processor.encode(p) for p in PROMPTS]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    separator = offset + amt.separator
    out = made.model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=3 * most,
        logits_processor=[Masked(Rules(amt, WANTED[wanted]), most, width, offset)],
        eos_token_id=separator, pad_token_id=0,
    )  # fmt: skip
    expected = []
    for row in out[:, width:].tolist():
        music = row[: row.index(separator) + 1] if separator in row else row
        expected.append([i - offset for i in music if i])
    found, grammars = greedy(made, PROMPTS, most=most, wanted=WANTED[wanted])
    assert found == expected
    reasons = {g.finish_reason for g in grammars}
    assert reasons == {"length"} if stop < -100 and wanted == "free" else reasons


@pytest.mark.parametrize("stop", [-25.0, -1000.0])
def test_a_batch_equals_one_by_one(stop):
    made = singer(stop=stop)
    together, _ = greedy(made, PROMPTS, most=25)
    alone = [greedy(made, [p], most=25)[0][0] for p in PROMPTS]
    assert together == alone
    rules, prompts = Rules(SMALL), [made.processor.encode(p) for p in PROMPTS]
    # they leave the batch at different times
    cut = [Grammar(rules, max_events=most) for most in (9, 3, 25, 6)]
    found = decode(made.model, prompts, cut, made.processor.offset, GREEDY, seeds=range(4), pad=0)
    for one, short, most in zip(together, found, (9, 3, 25, 6), strict=True):
        assert short == one[: 3 * most]
    # sampled pieces follow their seeds, not their batch
    pieces = [
        made.generate(PROMPTS, n=2, max_notes=12, batch_size=size, seed=4) for size in (1, 3, 16)
    ]
    for other in pieces[1:]:
        assert [p.ids for p in other] == [p.ids for p in pieces[0]]


def test_each_is_told_every_id():
    told = [[] for _ in PROMPTS]
    found, _ = greedy(singer(), PROMPTS, each=lambda row, token: told[row].append(token))
    assert told == found


# ------------------------------------------------------------------------------------------------
# generate


def test_seeds_decide():
    made = singer()
    one, same_, other = (
        made.generate(PROMPTS[:2], n=3, max_notes=6, seed=seed) for seed in (1, 1, 2)
    )
    assert [p.ids for p in one] == [p.ids for p in same_]
    assert [p.prompt for p in one] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert len({p.ids for p in one + other}) == 12


def test_draws_leave_the_global_state():
    made, before = singer(), torch.get_rng_state()
    made.generate("a", max_notes=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 50.0])
def test_sampled_pieces_are_legal_and_keep_constraints(temperature):
    """At 50 nearly every allowed id is drawn alike."""
    made = singer()
    wanted = GenerationConstraints(
        instruments=[0, 40, "drums"], key="D minor", pitch_range=(40, 80), max_polyphony=2,
        notes_per_second=4, end_time=9.5, min_notes=4 if temperature < 2 else 0,
    )  # fmt: skip
    scale = {2, 4, 5, 7, 9, 10, 0, 1}
    for seed in range(2):
        for constraints in (None, wanted):
            pieces = made.generate(
                PROMPTS[:2], n=8, max_notes=12, temperature=temperature, top_p=1.0, seed=seed,
                constraints=constraints,
            )  # fmt: skip
            for piece in pieces:
                events = tokenizer(SMALL).to_events(piece.ids)
                assert len(events) <= 12
                notes = piece.notes
                assert len(notes) == (events[:, 2] != REST).sum()
                assert piece.finish_reason in ("stop", "length", "end_time")
                ended = piece.ids[-1] == SMALL.separator
                assert ended == (piece.finish_reason != "length")
                if constraints is None:
                    assert len(events) == 12 or ended
                    continue
                assert set(notes.instrument.tolist()) <= {0, 40, 128}
                pitched = notes.instrument != 128
                assert {p % 12 for p in notes.pitch[pitched].tolist()} <= scale
                assert ((notes.pitch >= 40) & (notes.pitch <= 80) | ~pitched).all()
                assert len(notes) >= constraints.min_notes or not ended
                assert piece.seconds <= 9.5
                tick = np.rint(notes.onset * 20).astype(int)
                end = tick + np.rint(notes.duration * 20).astype(int)
                for i, now in enumerate(tick):
                    assert ((tick[: i + 1] <= now) & (end[: i + 1] > now)).sum() <= 2
                    assert i + 1 <= 4 * now / 20 + 4 + 1e-9


def test_finish_reasons():
    stopping = singer(stop=1000.0).generate("a", temperature=0, max_notes=20)[0]
    assert stopping.finish_reason == "stop"
    assert len(stopping.notes) == 1  # min_notes is 1
    assert stopping.ids[-1] == SMALL.separator
    lasting = singer(stop=-1e4)
    cut = lasting.generate("a", temperature=0, max_notes=7)[0]
    assert cut.finish_reason == "length"
    assert len(cut.ids) == 21
    wanted = GenerationConstraints(end_time=1, max_polyphony=1)
    ended = lasting.generate("a", temperature=0, max_notes=100, constraints=wanted)[0]
    assert ended.finish_reason == "end_time"
    assert 0 < ended.seconds <= 1


def test_max_notes_is_cut_to_what_the_model_can_read():
    made = singer(stop=-1e4, room=64)
    with pytest.warns(UserWarning, match="fit behind the prompt"):
        piece = made.generate("a", max_notes=60)[0]
    assert piece.finish_reason == "length"
    length = len(made.processor.encode("a"))
    assert len(piece.ids) == (64 - length) // 3 * 3


def test_prompts_too_long_are_refused():
    made = singer(stop=-1e4, room=64)
    with pytest.raises(UserError, match="shorten the prompt"):
        made.generate("x" * 70)
    with pytest.raises(UserError, match="shorten the prompt"):
        made.generate(["a", "x" * 60])  # 63 ids: two are left
    assert len(made.generate("x" * 58, max_notes=1)[0].ids) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 2, "temperature": 0}, {"n": 0}, {"n": True}, {"n": 1.0}, {"max_notes": 0},
        {"max_notes": 2.0}, {"batch_size": 0}, {"temperature": -0.1}, {"temperature": math.nan},
        {"temperature": 101}, {"temperature": True}, {"temperature": math.inf}, {"top_p": 0},
        {"top_p": 1.1}, {"top_p": -1}, {"top_p": math.nan}, {"temperature": "1"},
        {"top_p": None},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(UserError) as error:
        singer().generate("a", **{"max_notes": 4, **wrong})
    assert next(iter(wrong)) in str(error.value)


@pytest.mark.parametrize("prompts", [[], "", [""], ["a", "  "], [None]])
def test_prompts_must_be_there(prompts):
    with pytest.raises(UserError):
        singer().generate(prompts, max_notes=4)


def test_constraints_that_leave_nothing_are_named():
    wanted = GenerationConstraints(instruments=[0], key="C major", pitch_range=(61, 61))
    with pytest.raises(UserError, match="instruments and key and pitch_range"):
        singer().generate("a", constraints=wanted, max_notes=60)
    wanted = GenerationConstraints(end_time=0.2, max_polyphony=1, min_notes=50)
    with pytest.raises(UserError, match="min_notes"):
        singer().generate("a", constraints=wanted, max_notes=60)


def test_a_stuck_piece_does_not_end_the_others():
    wanted = GenerationConstraints(end_time=1, max_polyphony=1, min_notes=3)
    with pytest.warns(UserWarning, match=r"pieces are stuck, first that at \d+: .*min_notes is 3"):
        found = singer().generate("a", n=24, constraints=wanted, max_notes=9)
    stuck = [piece.finish_reason == "stuck" for piece in found]
    assert 0 < sum(stuck) < 24
    for piece, short in zip(found, stuck, strict=True):
        assert (len(piece.notes) < 3) == short
        assert piece.notes.end <= 1


def test_min_notes_beyond_max_notes_is_no_silent_shortage():
    wanted = GenerationConstraints(min_notes=9)
    try:
        piece = singer().generate("a", constraints=wanted, max_notes=4)[0]
    except UserError:
        return
    assert len(piece.notes) >= 9


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nan_logits_are_an_error(sliced, temperature):
    made = make()
    with torch.no_grad():
        made.model.get_output_embeddings().weight[made.processor.offset + 7] = math.nan
    with pytest.raises(UserError, match="NaN"):
        greedy(made, ["a"], sliced=sliced, sampling=Sampling(temperature))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5)])
def test_first_ids_are_drawn_as_often_as_they_should(temperature, top_p):
    made, count = singer(), 1200
    wanted = GenerationConstraints(end_time=0.6)  # 12 onsets, and no separator yet
    pieces = made.generate(
        "a", n=count, max_notes=1, temperature=temperature, top_p=top_p, constraints=wanted,
        batch_size=500, seed=8,
    )  # fmt: skip
    seen = np.bincount([p.ids[0] for p in pieces], minlength=12)
    with torch.no_grad():
        logits = made.model(torch.tensor([made.processor.encode("a")])).logits[0, -1].double()
    weights = torch.exp(logits[made.processor.offset :][:12] / temperature).numpy()
    probs = weights / weights.sum()
    order = np.argsort(-probs)
    fewest = next(k for k in range(1, 13) if k == 12 or probs[order[:k]].sum() >= top_p)
    kept = order[:fewest]
    assert fewest > 1
    assert seen.sum() == seen[kept].sum() == count
    expected = probs[kept] / probs[kept].sum() * count
    rare = expected < 5
    observed = seen[kept]
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    assert statistic < chi2.ppf(1 - 1e-4, len(expected) - 1)


def test_top_p_takes_the_fewest_that_reach_it():
    made = singer()
    tiny = {p.ids for p in made.generate("a", n=6, top_p=1e-9, max_notes=5)}
    assert tiny == {made.generate("a", temperature=0, max_notes=5)[0].ids}


def test_models_round_trip_through_a_folder(tmp_path):
    text = byte_tokenizer()
    model = expand_vocabulary(tiny_llama(len(text), hidden=16, layers=1), SMALL)
    made = MidiLM(model, TextMidiProcessor(text, SMALL, len(text)))
    made.save_pretrained(tmp_path)
    again = MidiLM.from_pretrained(tmp_path, device="cpu")
    one, two = (m.generate("a", max_notes=8, seed=3)[0] for m in (made, again))
    assert one.ids == two.ids
    assert not again.model.training


# ------------------------------------------------------------------------------------------------
# MidiOutput


@pytest.mark.parametrize("tempo", [120.0, 77.0])
def test_saved_files_read_back_to_the_same_notes(tempo, tmp_path):
    made = singer()
    half = 60 / tempo / 480 / 2 + 1e-4 * 60 / tempo  # the file's tempo is in whole microseconds
    for i, piece in enumerate(made.generate(PROMPTS, n=3, max_notes=20, style=Style(tempo=tempo))):
        file = piece.save(tmp_path / f"{i}.mid")
        assert file == tmp_path / f"{i}.mid"
        back, notes = read_notes(file), piece.notes
        assert len(back) == len(notes) > 0
        assert set(zip(back.instrument, back.pitch, strict=True)) == set(
            zip(notes.instrument, notes.pitch, strict=True)
        )
        for instrument, pitch in set(zip(notes.instrument, notes.pitch, strict=True)):
            one, two = (n[(n.instrument == instrument) & (n.pitch == pitch)] for n in (notes, back))
            assert np.abs(one.onset - two.onset).max() <= half
            # a reader pairs ends first in, first out: which end is whose is not in the file
            ends = [np.sort(n.onset + n.duration) for n in (one, two)]
            assert np.abs(ends[0] - ends[1]).max() <= half
        assert piece.seconds == pytest.approx(back.end, abs=half)
        assert piece.score.note_num() == len(notes)


def test_the_key_wanted_is_the_key_of_the_file():
    wanted = GenerationConstraints(key="D minor")
    piece = singer().generate("a", max_notes=4, constraints=wanted)[0]
    assert piece.style.key == "D minor"
    assert piece.score.key_signatures[0].key == -1


class Told(list):
    """Takes notes as they come; `of` gives those of a piece."""

    def __call__(self, piece, note):
        self.append((piece, note))

    def of(self, piece):
        return [note for number, note in self if number == piece]


def as_told(notes):
    return [Note(*(c[i].item() for c in notes.columns[:4])) for i in range(len(notes))]


@pytest.mark.parametrize("batch_size", [2, 16])
def test_notes_are_told_as_they_come(batch_size):
    told = Told()
    outs = singer().generate(
        PROMPTS[:3], n=2, max_notes=12, batch_size=batch_size, seed=4, on_note=told
    )
    for number, out in enumerate(outs):
        assert told.of(number) == as_told(out.notes)
    pieces = [number for number, _ in told]
    assert pieces != sorted(pieces), "told only at the end"


def test_what_is_told_may_cancel():
    def on_note(piece, note):
        told.append(note)
        if len(told) == 5:
            raise KeyboardInterrupt

    told = []
    with pytest.raises(KeyboardInterrupt):
        singer().generate("a", max_notes=100, seed=4, on_note=on_note)
    assert len(told) == 5


def test_the_new_notes_of_a_continuation_and_an_infill_are_told():
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    told = Told()
    out = made.continue_(notes, seconds=25, prompt="a", seed=1, on_note=told)
    new = out.notes[np.arange(len(notes), len(out.notes))]
    assert out.notes.end > notes.end + 25 > 20, "the context should slide"
    assert [n[:3:2] for n in told.of(0)] == [n[:3:2] for n in as_told(new)]
    assert [n.onset for n in told.of(0)] == new.onset.tolist()
    told = Told()
    out = made.infill(notes, start=6, end=9, prompt="a", seed=1, on_note=told)
    new = minus(out.notes, notes[(notes.onset < 6) | (notes.onset >= 9)])
    assert new is not None
    assert told.of(0) == as_told(new)


def test_max_notes_caps_what_is_new():
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    out = made.continue_(notes, seconds=200, prompt="a", max_notes=7, seed=1)
    assert len(out.notes) <= len(notes) + 7
    assert out.finish_reason == "length"
    kept = notes[(notes.onset < 2) | (notes.onset >= 15)]
    out = made.infill(notes, start=2, end=15, prompt="a", max_notes=3, seed=1)
    assert len(out.notes) <= len(kept) + 3
    for call in (
        lambda: made.continue_(notes, seconds=5, prompt="a", max_notes=0),
        lambda: made.infill(notes, start=2, end=5, prompt="a", max_notes=0),
    ):
        with pytest.raises(UserError, match="max_notes must be a whole number"):
            call()


def test_files_of_what_is_changed_keep_tempo_metre_and_key():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    style = Style(tempo=96, time_signature=(3, 4), key="Eb minor")
    source = made.generate("a", max_notes=15, seed=2, style=style)[0].score
    for out in (
        made.infill(source, start=1, end=3, prompt="a"),
        made.continue_(source, seconds=2, prompt="a"),
    ):
        assert out.style.tempo == pytest.approx(96)
        assert (out.style.time_signature, out.style.key) == ((3, 4), "Eb minor")
    assert made.infill(source, start=1, end=3, prompt="a", style=Style()).style == Style()


def test_a_key_that_no_file_can_have_is_refused_before_decoding(monkeypatch):
    monkeypatch.setattr("midi_llm.decode.decode", lambda *a, **k: pytest.fail("decoded"))
    wanted = GenerationConstraints(key="G# major")
    with pytest.raises(UserError, match="G# major has 8 sharps"):
        singer().generate("a", constraints=wanted)


@pytest.mark.parametrize("temperature", [1e-40, 1e-300])
def test_a_tiny_temperature_is_as_good_as_none(temperature):
    least = singer().generate("a", max_notes=10, temperature=temperature)
    none = singer().generate("a", max_notes=10, temperature=0)
    assert least[0].ids == none[0].ids


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(value, temperature):
    made = make()
    with torch.no_grad():
        made.model.get_output_embeddings().bias[made.processor.offset + 3] = value
    with pytest.raises(UserError, match="NaN or infinite"):
        made.generate("a", max_notes=4, temperature=temperature)


def test_min_notes_that_do_not_fit_into_the_model_are_refused():
    with pytest.raises(UserError, match=r"min_notes is 500, but a piece has \d+ events"):
        singer().generate("a", constraints=GenerationConstraints(min_notes=500))


# ------------------------------------------------------------------------------------------------
# infill


def song(*, count=36, gap=0.5, seed=1):
    rng = np.random.default_rng(seed)
    onset = np.arange(count) * gap + rng.random(count) * 0.4
    onset = np.sort(onset).clip(0, 17.9)
    return Notes.of(
        onset, rng.random(count) * 2, rng.choice([0, 33, 128], count), rng.integers(30, 90, count),
        rng.integers(1, 128, count),
    )  # fmt: skip


def minus(piece, known):
    """Return the notes of a piece that are not known, all columns compared bit for bit."""
    left = [tuple(r) for r in zip(*piece.columns, strict=True)]
    for row in zip(*known.columns, strict=True):
        assert tuple(row) in left, "a note that should be kept is gone or changed"
        left.remove(tuple(row))
    return Notes.of(*map(np.array, zip(*left, strict=True))) if left else None


@pytest.mark.parametrize("keep", [(), ("bass",), (0, "drums")])
@pytest.mark.parametrize(("start", "end"), [(6.0, 8.0), (0.0, 1.5), (17.0, 20.0), (0.0, 20.0)])
def test_infill_keeps_what_is_outside_and_stays_within(keep, start, end):
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    numbers = {(): [], ("bass",): [33], (0, "drums"): [0, 128]}[keep]
    outside = (notes.onset < start) | (notes.onset >= end)
    kept = notes[outside | np.isin(notes.instrument, numbers)]
    total = 0
    for seed in range(2 if end - start < 20 else 1):
        out = made.infill(notes, start=start, end=end, prompt="a", keep_instruments=keep, seed=seed)
        new = minus(out.notes, kept)
        assert (np.diff(out.notes.onset) >= 0).all()
        tokenizer(ANTICIPATING).to_events(out.ids, controls="merge")
        assert out.finish_reason in ("stop", "length", "end_time")
        if new is None:
            continue
        total += len(new)
        assert new.onset.min() >= start
        assert new.onset.max() < end
        assert new.end <= end + 1e-9
    assert total > 0


def test_infill_of_a_span_off_the_grid_stays_within():
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    start, end = 6.0375, 9.0375  # 120.75 and 180.75 ticks
    kept = notes[(notes.onset < start) | (notes.onset >= end)]
    out = made.infill(notes, start=start, end=end, prompt="a", temperature=0)
    new = minus(out.notes, kept)
    assert new is not None
    assert new.onset.min() >= start
    assert new.end <= end


def test_infill_has_the_controls_after_the_span_in_order():
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    out = made.infill(notes, start=6.0, end=11.0, prompt="a", temperature=0)
    amt = ANTICIPATING
    rows = np.array(out.ids[: len(out.ids) // 3 * 3]).reshape(-1, 3)
    told = rows[rows[:, 0] >= amt.control_offset]
    told = told[told[:, 0] < amt.separator] - amt.control_offset
    after = notes[notes.onset >= 11.0]
    expected = np.rint(after.onset * 20).astype(int)
    assert len(told) > 0
    assert (np.diff(told[:, 0]) >= 0).all()
    behind = expected[expected.searchsorted(told[0, 0]) :][: len(told)]
    assert told[:, 0].tolist() == behind.tolist()


def test_infill_copes_with_a_note_at_the_very_end_of_the_grid():
    """19.98 s rounds to tick 400, which the grid does not have."""
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    notes = Notes.of([1.0, 14.5, 19.98], 0.1, 0, [60, 61, 62])
    out = made.infill(notes, start=14.0, end=19.0, prompt="a", temperature=0)
    tokenizer(ANTICIPATING).to_events(out.ids, controls="merge")
    assert 19.98 in out.notes.onset


def test_infill_keeps_what_is_behind_the_grid():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    notes = Notes.of([1.0, 5.5, 30.0, 300.0], 0.1, 0, [60, 61, 62, 63])
    out = made.infill(notes, start=5.0, end=8.0, prompt="a", seed=2)
    minus(out.notes, notes[np.array([0, 2, 3])])


def test_infill_of_silence_and_of_a_score():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    out = made.infill(Notes.of([], 0.0, 0, 0), start=0, end=5, prompt="a", seed=1)
    assert len(out.notes)
    source = made.generate("a", max_notes=15, seed=2)[0].score
    assert len(made.infill(source, start=1, end=3, prompt="a").notes)


def test_infill_honours_constraints():
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    wanted = GenerationConstraints(instruments=[40], key="C major", end_time=9)
    kept = notes[(notes.onset < 6) | (notes.onset >= 11)]
    new = minus(
        made.infill(notes, start=6, end=11, prompt="a", constraints=wanted, seed=1).notes, kept
    )
    assert new is not None
    assert set(new.instrument.tolist()) == {40}
    assert {p % 12 for p in new.pitch.tolist()} <= {0, 2, 4, 5, 7, 9, 11}
    assert new.end <= 9


def test_infill_never_reads_past_the_model():
    """Controls take ids as events do: 50 of them fall due with the first new note."""
    made = singer(ANTICIPATING, stop=-1e4, room=128)
    notes = Notes.of([0.5, *np.linspace(6, 7.5, 50)], 0.1, 0, np.arange(51) + 40)
    length = len(made.processor.encode("a", controls=True))
    try:
        out = made.infill(notes, start=3.0, end=4.0, prompt="a", temperature=0)
    except UserError:
        return
    assert length + 3 + len(out.ids) <= 128


def test_infill_doubles_no_note_that_is_kept():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    wanted = GenerationConstraints(instruments=[0], pitch_range=(60, 61))
    onset = np.arange(4.0, 5.0, 0.05)
    out = made.infill(
        Notes.of(onset, 0.1, 0, 60), start=4.0, end=5.0, prompt="a", keep_instruments=[0],
        constraints=wanted, temperature=0,
    )  # fmt: skip
    assert len(out.notes) > len(onset)
    rows = list(
        zip(np.rint(out.notes.onset * 20), out.notes.instrument, out.notes.pitch, strict=True)
    )
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(("start", "end"), [(5, 5), (6, 5), (-1, 5), (15, 21), (math.nan, 5)])
def test_infill_refuses_wrong_spans(start, end):
    with pytest.raises(UserError, match="span"):
        singer(ANTICIPATING, stop=-1e4, room=1024).infill(song(), start=start, end=end, prompt="a")


def test_infill_needs_controls_and_known_instruments():
    with pytest.raises(UserError, match="no controls"):
        singer().infill(song(), start=0, end=5, prompt="a")
    with pytest.raises(UserError, match="no instrument"):
        singer(ANTICIPATING, stop=-1e4, room=1024).infill(
            song(), start=0, end=5, prompt="a", keep_instruments=["kazoo"]
        )


# ------------------------------------------------------------------------------------------------
# Going on with a piece


@pytest.mark.parametrize("seconds", [2.0, 25.0])
def test_continue_keeps_the_old_notes_and_adds_time(seconds):
    made, notes = singer(stop=-1e4, room=400), song()
    out = made.continue_(notes, seconds=seconds, prompt="a", seed=3)
    new = minus(out.notes, notes)
    assert new is not None
    assert (np.diff(out.notes.onset) >= 0).all()
    assert out.seconds >= notes.end + seconds
    assert out.seconds <= notes.end + seconds + 5
    # nothing is squeezed in before what was there has begun
    assert new.onset.min() >= notes.onset.max() - 0.05


def test_continue_goes_on_from_far_behind_the_grid():
    made = singer(stop=-1e4, room=400)
    notes = Notes.of(np.arange(100) * 1.1, 0.4, 0, 60 + np.arange(100) % 7)
    out = made.continue_(notes, seconds=12, prompt="a", seed=3)
    new = minus(out.notes, notes)
    assert new.onset.min() >= notes.onset.max() - 0.05
    assert out.seconds >= notes.end + 12


def test_continue_is_reproducible_and_stops_where_the_model_does():
    made, notes = singer(stop=-1e4, room=400), song()
    one, two, three = (
        made.continue_(notes, seconds=3, prompt="a", seed=seed) for seed in (1, 1, 2)
    )
    assert same(one.notes, two.notes)
    assert one.ids != three.ids
    out = singer(stop=1e3).continue_(notes, seconds=8, prompt="a", temperature=0)
    assert out.finish_reason == "stop"
    assert same(out.notes, notes)


def test_continue_from_silence():
    out = singer(stop=-1e4).continue_(Notes.of([], 0.0, 0, 0), seconds=4, prompt="a")
    assert out.seconds >= 4


def test_continue_honours_constraints():
    made, notes = singer(stop=-1e4, room=400), song()
    wanted = GenerationConstraints(instruments=[40], key="C major", end_time=6)
    out = made.continue_(notes, seconds=30, prompt="a", constraints=wanted, seed=1)
    new = minus(out.notes, notes)
    assert set(new.instrument.tolist()) == {40}
    assert {p % 12 for p in new.pitch.tolist()} <= {0, 2, 4, 5, 7, 9, 11}
    assert new.end <= notes.end + 6 + 1e-9


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, 3600])
def test_continue_refuses_wrong_lengths(seconds):
    with pytest.raises(UserError, match="seconds"):
        singer().continue_(song(), seconds=seconds, prompt="a")


def test_the_context_of_an_infill_reaches_the_span():
    """Silence before the span is rests, as in training, and controls come five seconds ahead."""
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    notes = Notes.of([1.0, 13.0], 0.5, 0, [60, 72])
    seen = []
    hook = made.model.base_model.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        made.infill(notes, start=9.0, end=11.0, prompt="a", temperature=0)
    finally:
        hook.remove()
    prompt = made.processor.encode("a", controls=True)
    amt, ids = ANTICIPATING, [i - made.processor.offset for i in seen[0][len(prompt) :]]
    rows = np.array(ids).reshape(-1, 3)
    rests = rows[rows[:, 2] == amt.rest]
    assert rests[:, 0].tolist() == [20 * s for s in (2, 3, 4, 5, 6, 7, 8)]
    controls = rows[rows[:, 0] >= amt.control_offset]
    assert (controls[:, 0] - amt.control_offset).tolist() == [260]
    place = (rows[:, 0] >= amt.control_offset).argmax()
    assert rows[place - 1, 0] == 160, "the first event from which it is at most five seconds away"


def test_what_was_there_does_not_use_up_the_notes_a_second():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    dense = Notes.of(np.arange(0, 3, 0.05), 0.1, 0, np.arange(60) + 30)
    wanted = GenerationConstraints(notes_per_second=2)
    out = made.continue_(dense, seconds=3, prompt="a", constraints=wanted, seed=1)
    new = out.notes.onset[len(dense) :]
    assert len(new) > 2
    assert new[0] < 4
    for time in new:
        assert (new <= time).sum() <= 2 * (time - dense.onset[-1]) + 2


def test_a_drone_does_not_hide_the_context():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    notes = Notes.of([0.0, 0.5, 1.0], [60.0, 0.2, 0.2], 0, [36, 60, 64])
    out = made.continue_(notes, seconds=2, prompt="a", max_notes=6, seed=1)
    minus(out.notes, notes)
    assert out.notes.onset[3] < 3, "it goes on from the last onset"


def test_files_say_what_the_prompt_says():
    one, two = singer().generate(["a waltz in 3/4 at 90 bpm in Eb minor", "a"], max_notes=3)
    assert one.style == Style(tempo=90, time_signature=(3, 4), key="Eb minor")
    assert two.style == Style()
    wanted = GenerationConstraints(key="C major")
    [three] = singer().generate("at 90 bpm in Eb minor", max_notes=3, constraints=wanted)
    assert (three.style.key, three.style.tempo) == ("C major", 90)
    [four] = singer().generate("at 90 bpm in G# major", max_notes=3, style=Style(tempo=70))
    assert four.style == Style(tempo=70)
    [five] = singer().generate("at 90 bpm in G# major", max_notes=3)
    assert (five.style.key, five.style.tempo) == (None, 90)


# ------------------------------------------------------------------------------------------------
# What engines are asked for


class Scripted(Composer):
    """An engine that plays what it is told: functions of a grammar, one a call."""

    def __init__(self, *plays, amt=ANTICIPATING, room=600):
        text = byte_tokenizer()
        self.processor = TextMidiProcessor(text, amt, len(text), system="")
        self.plays, self.room, self.calls = list(plays), room, []

    def _context(self, text):
        return self.room - text

    def _decode(self, rows, sampling, batch_size, seed, each):
        found = []
        for ids, grammar in rows:
            self.calls.append((list(ids), grammar, seed))
            play = self.plays[min(len(self.calls), len(self.plays)) - 1]
            found.append([])
            for id in play(grammar):
                allowed = grammar.proceed()
                if allowed is None or id not in allowed:
                    break
                grammar.push(id)
                found[-1].append(id)
            if grammar.proceed() is not None:
                grammar.finish_reason = "length"
        return found


def notes_at(*onsets, note=60, lasts=2, gap=0):
    """Play notes at ticks behind where the grammar is."""

    def play(grammar):
        amt, start = grammar.rules.config, grammar.allowed().start
        for onset in onsets:
            yield start + onset
            yield amt.duration_offset + lasts
            yield amt.note_offset + note

    return play


def then_end(play):
    def both(grammar):
        yield from play(grammar)
        yield grammar.rules.config.separator

    return both


def test_every_window_draws_anew_until_the_time_is_full():
    made = Scripted(notes_at(1, 30, 60))
    made.continue_(song(), seconds=9, prompt="a", seed=5)
    seeds = [seed for _, _, seed in made.calls]
    assert len(seeds) >= 3
    assert seeds == list(range(5, 5 + len(seeds)))


def test_what_the_model_ends_is_not_gone_on_with():
    made = Scripted(then_end(notes_at(1, 20)))
    out = made.continue_(song(), seconds=60, prompt="a")
    assert len(made.calls) == 1
    assert out.finish_reason == "stop"
    assert len(out.notes) == len(song()) + 2


def test_rests_count_among_the_most():
    def play(grammar):
        amt, start = grammar.rules.config, grammar.allowed().start
        for number in range(1, 9):
            yield start + 20 * number
            yield from (amt.duration_offset, amt.rest)
        yield from notes_at(1)(grammar)

    made = Scripted(play)
    out = made.continue_(song(), seconds=60, prompt="a", max_notes=12)
    assert out.finish_reason == "length"
    assert sum(len(grammar.events) for _, grammar, _ in made.calls) == 12


@pytest.mark.parametrize("room", [120, 300])
def test_half_of_what_the_model_reads_is_left_to_go_on(room):
    made = Scripted(notes_at(1), room=room)
    dense = Notes.of(np.arange(200) * 0.08, 0.1, 0, 60)
    made.continue_(dense, seconds=1, prompt="a", max_notes=1)
    [(ids, grammar, _)] = made.calls
    text = len(made.processor.encode("a"))
    assert len(ids) - text == 3 * ((room - text) // 6)
    assert grammar.max_events == 1


def test_an_infill_leaves_room_for_what_is_kept():
    made = Scripted(notes_at(1), room=120)
    notes = Notes.of([0.5, *np.linspace(12, 14, 12)], 0.1, 0, np.arange(13) + 40)
    made.infill(notes, start=1.0, end=2.0, prompt="a")
    [(ids, grammar, _)] = made.calls
    assert grammar.placed == 0
    assert grammar.max_events == (120 - len(ids)) // 3 - 12
    with pytest.raises(UserError, match="then 12 notes that are kept"):
        Scripted(notes_at(1), room=42).infill(notes, start=1.0, end=2.0, prompt="a")


def test_instruments_that_are_not_heard_keep_their_channels():
    """15 families at the start, then one alone for a minute: no sixteenth may join."""
    families = [8 * i for i in range(15)]
    onset = [0.0] * 15 + list(np.arange(40.0, 42.0, 0.25))
    notes = Notes.of(onset, 0.2, families + [0] * 8, 60)
    made = Scripted(notes_at(1))
    made.continue_(notes, seconds=1, prompt="a")
    ids, grammar, _ = made.calls[0]
    allowed = {int(i) // 128 for i in np.flatnonzero(grammar._mask)}
    used = {int(ANTICIPATING.of_instrument(i)) for i in families}
    assert allowed == used | {grammar.rules.drums}
    assert len(ids) == len(made.processor.encode("a")) + 3 * 8, "they are not in the context"


def test_notes_that_sound_on_count_for_the_polyphony():
    wanted = GenerationConstraints(max_polyphony=1)
    drone = Notes.of([0.0, *np.arange(30.0, 31.0, 0.25)], [35.0, *[0.2] * 4], 0, 60)
    made = Scripted(notes_at(0))
    out = made.continue_(drone, seconds=3, prompt="a", constraints=wanted)
    assert out.notes.onset[5] >= 35
    inside = Notes.of([0.0, 1.0], [18.0, 0.2], 0, [40, 60])
    made = Scripted(notes_at(0))
    out = made.infill(inside, start=2.0, end=19.5, prompt="a", constraints=wanted)
    assert out.notes.onset[2] >= 18


def test_the_first_of_top_p_alone_where_it_reaches_it_exactly():
    scores = torch.tensor([math.log(0.5), math.log(0.25), math.log(0.25)])
    draw = torch.Generator().manual_seed(0)
    assert {_draw(scores, Sampling(1.0, 0.5), draw) for _ in range(50)} == {0}
    assert {_draw(scores, Sampling(1.0, 0.51), draw) for _ in range(50)} == {0, 1}
    assert _draw(torch.tensor([1e38, 2e38, 0.0]), Sampling(0.5, 1.0), draw) == 1
    cold = torch.tensor([0.0, 1e-3])
    assert {_draw(cold, Sampling(1e-6, 1.0), draw) for _ in range(50)} == {1}
