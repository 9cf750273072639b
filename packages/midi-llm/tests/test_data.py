"""Training data: samples keep their slots, rows keep samples apart, choices follow the seed."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from midi_llm import data
from midi_llm.attributes import analyze
from midi_llm.data import (
    IGNORED,
    Filters,
    MidiDataCollator,
    Recipe,
    Sample,
    Source,
    cpt_samples,
    music_samples,
    pack,
    prepare_cpt,
    prepare_sft,
    sft_samples,
    text_sources,
    write_dataset,
)
from midi_llm.midi_write import write_midi
from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
from midi_llm.notes import Notes
from midi_llm.tokenizer import AMTTokenizer
from midi_llm.vocab import AMTConfig
from tenfold_common.atomic import atomic_dir
from tenfold_common.errors import UserError
from tenfold_common.tiny import tiny_llama, word_tokenizer

SMALL = AMTConfig.small()
EVERY = data.Filters(1, 0.0, 14400.0, 129)
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


def listed(samples):
    return [(sample.ids.tolist(), sample.masked) for sample in samples]


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
    samples = [ids.tolist() for ids in music_samples(notes, made, room=room)]
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
    assert (len(ids), ids.dtype) == (1 + 12 + 3, np.int32)
    assert ids[-3:].tolist() == [made.offset + SMALL.separator] * 3
    (ids,) = music_samples(tune(4), made, room=15)  # no room for them
    assert len(ids) == 13


def test_no_room_for_an_event_is_an_error():
    with pytest.raises(UserError, match="a flag and an event need 4"):
        list(music_samples(tune(4), processor(), room=3))


def test_captions_come_first_and_are_not_learnt():
    made = processor()
    (sample,) = sft_samples([(tune(4), "slow jazz")], made, length=64)
    text = made.encode_text("slow jazz")
    assert sample.ids[: len(text) + 1].tolist() == [*text, made.offset + SMALL.autoregress]
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
    assert listed(both)[: len(alone)] == listed(alone)
    assert listed(sft_samples([second], made, **named, first=1)) == listed(both)[len(alone) :]
    assert listed(sft_samples([first], made, **{**named, "seed": 4})) != listed(alone)
    lengths = {len(sample.ids) for sample in alone}
    assert len(lengths) > 1  # captions were thinned


@pytest.mark.parametrize("sentences", [1, 2, 3, 6])
@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_dropout_is_the_share_of_captions_that_lose_sentences(sentences, dropout):
    made, caption = processor(), "A tune. " * sentences
    whole = len(made.encode_text(caption))
    pairs = [(tune(1), caption)] * 400
    samples = sft_samples(pairs, made, length=64, dropout=dropout)
    thinned = np.mean([sample.masked - 1 < whole for sample in samples])
    assert thinned == pytest.approx(dropout if sentences > 1 else 0, abs=0.07)


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
    again = cpt_samples([tune(50)] * 5, ["slow jazz for piano"] * 5, made, length=30, seed=0)
    assert listed(samples) == listed(again)


# ------------------------------------------------------------------------------------------------
# Rows


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=30), masked=st.integers(0, 3))
def test_rows_hold_whole_samples_in_order(sizes, masked):
    samples = [
        Sample(np.arange(100 * i, 100 * i + n, dtype=np.int32), min(masked, n))
        for i, n in enumerate(sizes)
    ]
    rows = [
        {name: values.tolist() for name, values in row.items()}
        for row in pack(samples, length=20, pad=9)
    ]
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
        s.ids.tolist() for s in samples if s.ids.tolist() != [9] * len(s.ids)
    ]


def test_a_sample_longer_than_a_row_is_an_error():
    with pytest.raises(UserError, match="a sample has 21 ids, more than the 20"):
        list(pack([Sample(np.arange(21))], length=20, pad=0))


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
            alone = model(torch.tensor(sample.ids[None]), use_cache=False).logits[0]
            there = packed[place : place + len(sample.ids)]
            assert torch.allclose(there, alone, atol=1e-5)
            place += len(sample.ids)
    assert place > 50


def test_datasets_of_both_stages(tmp_path):
    from datasets import load_from_disk

    made = processor()
    sft = prepare_sft(((tune(20), "slow") for _ in range(4)), made, length=128, seed=1)
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


# ------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture
def sources(tmp_path):
    """Ten tunes with captions."""
    folder = tmp_path / "midi"
    folder.mkdir()
    made = []
    for number in range(10):
        file = folder / f"{number}.mid"
        write_midi(tune(20 + 7 * number, seed=number), file)
        made.append(Source(number, str(file), "A slow tune. A sad tune. A jazz tune."))
    return made


def texts_of(path, monkeypatch):
    path.write_bytes(b"slow jazz\n\nfor\npiano\r\n \r\n\n\nsad " + b"tune " * 30 + b"\n")
    monkeypatch.setattr(data, "TEXT_BYTES", 10)
    return list(text_sources(path, first=10))


def rows_of(folder):
    from datasets import load_from_disk

    return load_from_disk(str(folder)).to_dict()


EVERYTHING = Filters(min_notes=1, min_seconds=0)


@pytest.mark.parametrize("stage", ["cpt", "sft"])
def test_rows_are_the_same_for_any_number_of_workers(stage, sources, tmp_path, monkeypatch):
    made = processor(ANTICIPATING)
    recipe = Recipe(stage, made, length=100, dropout=0.5, seed=1, filters=EVERYTHING)
    if stage == "cpt":
        sources += texts_of(tmp_path / "texts", monkeypatch)
    monkeypatch.setattr(data, "SHARD", 4)
    one, two = (write_dataset(sources, tmp_path / str(n), recipe, workers=n) for n in (1, 2))
    assert (one.rows, one.used) == (two.rows, two.used)
    assert one.used == 10
    assert {file.name for file in (tmp_path / "2").iterdir()} == {
        "data-00000-of-00001.arrow", "dataset_info.json", "state.json",
    }  # fmt: skip
    found = rows_of(tmp_path / "1")
    assert found == rows_of(tmp_path / "2")
    assert len(found["input_ids"]) == one.rows


def test_a_folder_gives_the_samples_that_its_pieces_do(sources, tmp_path, monkeypatch):
    """A row for each sample, so that rows can be compared whatever their order."""
    from midi_llm.midi_read import read_notes

    made, length = processor(), 40
    texts = texts_of(tmp_path / "texts", monkeypatch)
    assert [source.number for source in texts] == [10, 11, 12]
    recipe = Recipe("cpt", made, length=length, filters=EVERYTHING)
    monkeypatch.setattr(data, "SHARD", 3)
    monkeypatch.setattr(data, "pack", lambda samples, **named: (
        row for sample in samples for row in pack([sample], **named)
    ))  # fmt: skip
    write_dataset(sources + texts, tmp_path / "o", recipe)
    wanted = prepare_cpt(
        [read_notes(source.file) for source in sources],
        ["slow jazz", "for\npiano", "sad " + "tune " * 30], made, length=length,
    )  # fmt: skip
    found = rows_of(tmp_path / "o")
    assert sorted(found["input_ids"]) == sorted(wanted["input_ids"])
    assert sorted(found["labels"]) == sorted(wanted["labels"])
    assert found["input_ids"] != wanted["input_ids"]  # another order


def test_what_is_left_out_is_counted_with_its_reason(sources, tmp_path, caplog, monkeypatch):
    def analyze_most(file):
        if Path(file).name == "odd.mid":
            raise UserError(f"{file} cannot be read: it is odd")
        return analyze(file)

    monkeypatch.setattr(data, "analyze", analyze_most)
    write_midi(tune(20), tmp_path / "odd.mid")
    (tmp_path / "junk.mid").write_text("no music")
    sources += [
        Source(10, str(tmp_path / "odd.mid")), Source(11, str(tmp_path / "junk.mid")),
        Source(12, sources[0].file, "slow " * 100), Source(13, sources[0].file),
    ]  # fmt: skip
    made = processor()
    with caplog.at_level(logging.WARNING):
        found = write_dataset(
            sources, tmp_path / "o", Recipe("sft", made, length=80, filters=Filters(2, 0))
        )
    assert dict(found.left_out) == {"without a usable caption": 2, "not readable": 1}
    assert found.used == 11
    for words in ("it is odd", "not a MIDI file", "caption 12 has"):
        assert words in caplog.text
    with pytest.raises(UserError, match=r"nothing to learn from.*\(10 fewer than 100 notes"):
        write_dataset(sources[:10], tmp_path / "p", Recipe("cpt", made))
    assert not list((tmp_path / "p").iterdir())


def test_shards_are_shuffled_each_in_its_own_way(sources, tmp_path, monkeypatch):
    """As many samples in the same order twice would be a bad shuffle."""
    orders = [list(data._shuffled(list(range(50)), 3, 3, number)) for number in (0, 1)]
    assert orders[0] != orders[1]
    seen = []
    monkeypatch.setattr(data, "_shuffled", lambda samples, *key: seen.append(key) or iter(samples))
    monkeypatch.setattr(data, "SHARD", 2)
    recipe = data.Recipe("cpt", processor(), length=64, filters=EVERY)
    found = [s for s in sources if not s.span][:6]
    data.write_dataset(found, tmp_path / "out", recipe)
    assert len(seen) == len(set(seen)) == -(-len(found) // 2)


def test_captions_of_files_differ_though_their_music_does_not(tmp_path, monkeypatch):
    for number in range(12):
        write_midi(tune(30), tmp_path / f"{number}.mid")
    said = []
    real = data.sft_samples
    monkeypatch.setattr(
        data, "sft_samples", lambda pairs, *a, **k: said.append(pairs[0][1]) or real(pairs, *a, **k)
    )
    found = [data.Source(i, str(tmp_path / f"{i}.mid")) for i in range(12)]
    recipe = data.Recipe("sft", processor(), length=512, filters=EVERY)
    data.write_dataset(found, tmp_path / "out", recipe)
    assert len(set(said)) > 6


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_texts_are_parted_by_empty_lines_of_any_system(end, tmp_path):
    (tmp_path / "a.txt").write_bytes(end.join(["one", "two", "", "three", " ", "four"]).encode())
    [source] = text_sources(tmp_path / "a.txt")
    assert data._texts(source) == ["one\ntwo", "three", "four"]


def test_texts_that_are_no_text_are_an_error(tmp_path):
    (tmp_path / "t").write_bytes(b"slow\n\xff\n")
    with pytest.raises(UserError, match=r"t, line 2: not UTF-8"):
        list(text_sources(tmp_path / "t"))


class Deadly(TextMidiProcessor):
    """Ends the process that receives it."""

    how = (os._exit, (3,))

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ((os._exit, (3,)), RuntimeError, "exit code 3"),
        ((signal.raise_signal, (signal.SIGKILL,)), UserError, "killed .signal 9."),
    ],
)
def test_a_worker_that_dies_ends_all(how, error, says, sources, tmp_path, monkeypatch):
    import multiprocessing

    plain = processor()
    deadly = Deadly(plain.tokenizer, plain.amt, plain.offset)
    monkeypatch.setattr(Deadly, "how", how)
    monkeypatch.setattr(data, "SHARD", 4)
    with pytest.raises(error, match=says):
        write_dataset(sources, tmp_path / "o", Recipe("sft", deadly), workers=2)
    assert not multiprocessing.active_children()
    assert not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_job_that_is_cut_short_leaves_the_old_data(how, sources, tmp_path):
    processor().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    with atomic_dir(out) as made:
        prepare_sft([(tune(20), "slow")], processor(), length=64).save_to_disk(str(made))
    before = rows_of(out)
    command = [
        sys.executable, "-m", "midi_llm", "prepare", "sft", "--midi", str(tmp_path / "midi"),
        "--model", str(tmp_path / "model"), "--out", str(out), "--all", "--overwrite",
        "--copies", "600", "--workers", "2", "--length", "256",
    ]  # fmt: skip
    job = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where pytest ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".out.*.tmp/shards-*/*.arrow")):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(how)
    _, said = job.communicate(timeout=120)  # ends when the last worker has closed its end as well
    assert job.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert said.splitlines() == ["interrupted"]
        assert not list(tmp_path.glob(".out*"))
    assert rows_of(out) == before
