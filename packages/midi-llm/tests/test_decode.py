"""Decoding: equal to transformers' own, legal whatever is drawn, within what is asked."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from singers import SMALL, Told, as_told, make, singer, tokenizer
from transformers import LogitsProcessor

from midi_llm.anticipate import REST
from midi_llm.decode import MidiLM, Sampling, _draw, decode
from midi_llm.grammar import GenerationConstraints, Grammar, Rules
from midi_llm.midi_read import read_notes
from midi_llm.midi_write import Style
from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
from tenfold_common.errors import UserError
from tenfold_common.tiny import byte_tokenizer, tiny_llama

PROMPTS = ["a", "sad tune", "a fast dance for flute", "x y"]
GREEDY = Sampling(temperature=0)
WANTED = {
    "free": None,
    "wanted": GenerationConstraints(
        instruments=[0, 40, "drums"], key="D minor", max_polyphony=2, notes_per_second=4,
        end_time=12, min_notes=5,
    ),
}  # fmt: skip


def greedy(made, prompts, *, most=20, wanted=None, sliced=True, sampling=GREEDY, each=None):
    rules = Rules(made.processor.amt, wanted)
    grammars = [Grammar(rules, max_events=most) for _ in prompts]
    found = decode(
        made.model, [made.processor.encode(p) for p in prompts], grammars, made.processor.offset,
        sampling, seeds=range(len(prompts)), pad=0, sliced=sliced, each=each,
    )  # fmt: skip
    return found, grammars


# ------------------------------------------------------------------------------------------------
# Equal to other ways


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


def test_the_first_of_top_p_alone_where_it_reaches_it_exactly():
    scores = torch.tensor([math.log(0.5), math.log(0.25), math.log(0.25)])
    draw = torch.Generator().manual_seed(0)
    assert {_draw(scores, Sampling(1.0, 0.5), draw) for _ in range(50)} == {0}
    assert {_draw(scores, Sampling(1.0, 0.51), draw) for _ in range(50)} == {0, 1}
    assert _draw(torch.tensor([1e38, 2e38, 0.0]), Sampling(0.5, 1.0), draw) == 1
    cold = torch.tensor([0.0, 1e-3])
    assert {_draw(cold, Sampling(1e-6, 1.0), draw) for _ in range(50)} == {1}


# ------------------------------------------------------------------------------------------------
# What comes out


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


def test_a_key_that_no_file_can_have_is_refused_before_decoding(monkeypatch):
    monkeypatch.setattr("midi_llm.decode.decode", lambda *a, **k: pytest.fail("decoded"))
    wanted = GenerationConstraints(key="G# major")
    with pytest.raises(UserError, match="G# major has 8 sharps"):
        singer().generate("a", constraints=wanted)
