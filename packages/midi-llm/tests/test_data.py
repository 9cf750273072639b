"""Training data: samples keep their slots, rows keep samples apart, choices follow the seed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from midi_llm.data import (
    IGNORED,
    Filters,
    MidiDataCollator,
    Sample,
    cpt_samples,
    music_samples,
    pack,
    prepare_cpt,
    prepare_sft,
    sft_samples,
)
from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
from midi_llm.notes import Notes
from midi_llm.tokenizer import AMTTokenizer
from midi_llm.vocab import AMTConfig
from tenfold_common.errors import UserError
from tenfold_common.tiny import tiny_llama, word_tokenizer

SMALL = AMTConfig.small()
ANTICIPATING = AMTConfig(20, 20, 4, 17, 128, True)
WORDS = ("slow", "fast", "sad", "jazz", "for", "piano", "drums.", "A", "tune")


def processor(amt=SMALL):
    tokenizer = word_tokenizer(list(WORDS))
    return TextMidiProcessor(tokenizer, amt, len(tokenizer), system="")


def tune(count, *, gap=0.25, seed=0):
    rng = np.random.default_rng(seed)
    return Notes.of(
        np.arange(count) * gap, 0.2, rng.choice([0, 33, 128], count), rng.integers(40, 80, count)
    )


def events_of_sample(ids, made):
    return AMTTokenizer(made.amt).to_events(np.array(ids) - made.offset, controls="merge")


# ------------------------------------------------------------------------------------------------
# Samples


@given(
    count=st.integers(1, 120),
    gap=st.sampled_from([0.05, 0.25, 0.9, 3.0, 30.0]),
    room=st.integers(7, 200),
)
def test_samples_hold_every_note_once_and_stay_in_their_slots(count, gap, room):
    made, notes = processor(), tune(count, gap=gap)
    samples = list(music_samples(notes, made, room=room))
    found = []
    for ids in samples:
        assert len(ids) <= room
        assert ids[0] == made.offset + SMALL.autoregress
        events = events_of_sample(ids, made)  # refuses ids in wrong slots
        found += events[events[:, 2] >= 0, 2].tolist()
    families = SMALL.of_instrument(notes.instrument) * 128 + notes.pitch
    assert found == families.tolist()
    ends = [ids[-3:] == [made.offset + SMALL.separator] * 3 for ids in samples]
    assert not any(ends[:-1])
    assert ends[-1] or len(samples[-1]) + 3 > room


def test_a_piece_that_fits_ends_with_separators():
    made = processor()
    (ids,) = music_samples(tune(4), made, room=40)
    assert len(ids) == 1 + 12 + 3
    assert ids[-3:] == [made.offset + SMALL.separator] * 3
    (ids,) = music_samples(tune(4), made, room=15)  # no room for them
    assert len(ids) == 13


def test_no_room_for_an_event_is_an_error():
    with pytest.raises(UserError, match="a flag and an event need 4"):
        list(music_samples(tune(4), processor(), room=3))


def test_captions_come_first_and_are_not_learnt():
    made = processor()
    (sample,) = sft_samples([(tune(4), "slow jazz")], made, length=64)
    text = made.encode_text("slow jazz")
    assert sample.ids[: len(text) + 1] == [*text, made.offset + SMALL.autoregress]
    assert sample.masked == len(text) + 1
    (sample,) = sft_samples([(tune(4), "slow jazz")], made, length=64, mask_prompt=False)
    assert sample.masked == 0


def test_copies_follow_the_schedule_where_there_are_controls():
    made = processor(ANTICIPATING)
    samples = list(sft_samples([(tune(30), "slow")], made, length=400, copies=10))
    text = len(made.encode_text("slow"))
    flags = [sample.ids[text] - made.offset for sample in samples]
    assert flags == [ANTICIPATING.autoregress] + [ANTICIPATING.anticipate] * 9
    plain = list(sft_samples([(tune(30), "slow")], processor(), length=400, copies=3))
    assert len({tuple(sample.ids) for sample in plain}) == 1  # a grid without controls


def test_choices_of_a_pair_do_not_depend_on_the_others():
    made = processor(ANTICIPATING)
    caption = "A slow tune. A sad tune. A jazz tune. A fast tune."
    first, second = (tune(30, seed=1), caption), (tune(30, seed=2), caption)
    named = {"length": 400, "copies": 6, "dropout": 1.0, "seed": 3}
    alone = list(sft_samples([first], made, **named))
    both = list(sft_samples([first, second], made, **named))
    assert both[: len(alone)] == alone
    assert list(sft_samples([first], made, **{**named, "seed": 4})) != alone
    lengths = {len(sample.ids) for sample in alone}
    assert len(lengths) > 1  # captions were thinned


def test_a_caption_as_long_as_a_row_is_an_error():
    with pytest.raises(UserError, match="caption 0 has"):
        list(sft_samples([(tune(3), "slow " * 30)], processor(), length=20))


def test_text_and_music_are_mixed_in_the_first_stage():
    made = processor()
    samples = list(
        cpt_samples([tune(50)] * 5, ["slow jazz for piano"] * 5, made, length=30, seed=0)
    )
    music = [sample.ids[0] >= made.offset for sample in samples]
    assert 5 < sum(music) < len(music)
    assert music != sorted(music)
    assert samples == list(
        cpt_samples([tune(50)] * 5, ["slow jazz for piano"] * 5, made, length=30, seed=0)
    )


# ------------------------------------------------------------------------------------------------
# Rows


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=30), masked=st.integers(0, 3))
def test_rows_hold_whole_samples_in_order(sizes, masked):
    samples = [
        Sample(list(range(100 * i, 100 * i + n)), min(masked, n)) for i, n in enumerate(sizes)
    ]
    rows = list(pack(samples, length=20, pad=9))
    flat = []
    for row in rows:
        assert {len(v) for v in row.values()} == {20}
        starts = [i for i, p in enumerate(row["position_ids"]) if p == 0]
        for a, b in zip(starts, [*starts[1:], 20], strict=True):
            assert row["position_ids"][a:b] == list(range(b - a))
            ids, labels = row["input_ids"][a:b], row["labels"][a:b]
            if set(labels) == {IGNORED} and set(ids) == {9}:
                continue  # padding
            flat.append(ids)
            hidden = max(min(masked, len(ids)), 1)
            assert labels == [IGNORED] * hidden + ids[hidden:]
    assert [ids for ids in flat if ids != [9] * len(ids)] == [
        s.ids for s in samples if s.ids != [9] * len(s.ids)
    ]


def test_a_sample_longer_than_a_row_is_an_error():
    with pytest.raises(UserError, match="a sample has 21 ids, more than the 20"):
        list(pack([Sample(list(range(21)))], length=20, pad=0))


def test_no_sample_attends_to_another():
    """Logits in a packed row are those of each sample alone."""
    made = processor()
    model = tiny_llama(made.offset, hidden=32, layers=2, heads=2, kv_heads=2, seed=1)
    expand_vocabulary(model, SMALL)
    model.eval()
    pairs = [(tune(n, seed=n), "slow jazz") for n in (3, 5, 4)]
    samples = list(sft_samples(pairs, made, length=80))
    row = next(pack(samples, length=80, pad=made.offset + SMALL.size))
    batch = MidiDataCollator()([row])
    batch.pop("labels")
    with torch.inference_mode():
        packed = model(**batch, use_cache=False).logits[0]
        place = 0
        for sample in samples:
            alone = model(torch.tensor([sample.ids]), use_cache=False).logits[0]
            there = packed[place : place + len(sample.ids)]
            assert torch.allclose(there, alone, atol=1e-5)
            place += len(sample.ids)
    assert place > 50


def test_datasets_of_both_stages(tmp_path):
    from datasets import load_from_disk

    made = processor()
    sft = prepare_sft([(tune(20), "slow")] * 4, made, length=128, seed=1)
    cpt = prepare_cpt([tune(20)] * 4, ["slow jazz"], made, length=128, seed=1)
    for dataset in (sft, cpt):
        assert dataset.column_names == ["input_ids", "labels", "position_ids"]
        assert {len(row["input_ids"]) for row in dataset} == {128}
        dataset.save_to_disk(str(tmp_path / "d"))
        assert load_from_disk(str(tmp_path / "d"))[0] == dataset[0]
    batch = MidiDataCollator()([sft[0], sft[0]])
    assert batch["input_ids"].shape == (2, 128)
    assert batch["labels"].dtype == torch.int64
    with pytest.raises(UserError, match="there is nothing to learn from"):
        prepare_cpt([], [], made)


def test_filters_say_why():
    filters = Filters()
    assert filters.reason(tune(120)) is None
    assert filters.reason(tune(99)) == "fewer than 100 notes"
    assert filters.reason(tune(200, gap=0.01)) == "not 10 to 3600 s long"
    many = Notes.of(np.arange(120) * 0.2, 0.1, np.arange(120) % 17, 60)
    assert filters.reason(many) == "more than 16 instruments"
