"""The demo runs whole on tiny sizes; etudes and corpora are what their captions say."""

import numpy as np
import pytest

from midi_llm.attributes import analyze
from midi_llm.corpus import etude_pairs, jsb_pairs, nottingham_pairs, text_tokenizer
from midi_llm.demo import RUNS, DemoSettings, corpus, run_demo
from midi_llm.etudes import plan_etude, play
from midi_llm.grammar import scale_of
from midi_llm.midi_read import read_notes
from midi_llm.midi_write import Style, to_score
from midi_llm.vocab import DRUMS
from tenfold_common.errors import UserError
from tenfold_common.results import Result


def test_the_demo_runs_whole(tmp_path, monkeypatch):
    monkeypatch.delenv("TENFOLD_DATA", raising=False)
    result = run_demo(tmp_path, settings=DemoSettings.smoke())
    result.save(tmp_path)
    assert Result.load(tmp_path) == result
    claims = {claim.name: claim for claim in result.claims}
    assert claims["legal"].passed
    assert claims["constraints kept"].passed
    assert [row[0] for row in result.tables[0].rows][:4] == list(RUNS)
    real = result.tables[0].rows[-1]
    assert real[1] == 1.0  # the held-out music has the instruments that its captions name
    assert len(read_notes(tmp_path / "take-1.mid")) > 0
    assert any(figure.path.endswith(".wav") for figure in result.figures)


def test_a_seed_fixes_everything(tmp_path, monkeypatch):
    monkeypatch.delenv("TENFOLD_DATA", raising=False)
    tiny = DemoSettings(
        pairs=30, held_out=3, cpt_steps=1, sft_steps=2, hidden=16, layers=1, max_notes=10
    )
    first, again, other = (
        run_demo(tmp_path / name, seed=seed, settings=tiny)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.tables == again.tables
    assert first.tables != other.tables


def test_etudes_are_what_their_plans_say():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        plan = plan_etude(rng)
        notes = play(plan, rng)
        assert set(notes.instrument.tolist()) == set(plan.instruments)
        pitched = notes[notes.instrument != DRUMS]
        assert set((pitched.pitch % 12).tolist()) <= scale_of(plan.key)
        assert notes.end <= plan.seconds + 1e-6
        found = analyze(to_score(notes, Style(tempo=plan.tempo, time_signature=(plan.beats, 4))))
        assert found.tempo == pytest.approx(plan.tempo, rel=1e-3)
        assert found.time_signature == (plan.beats, 4)
    with pytest.raises(UserError, match="shorter than a bar"):
        play(plan_etude(np.random.default_rng(0), seconds=0.5), np.random.default_rng(0))


@pytest.mark.realdata
def test_real_tunes_become_pairs(data_folder):
    tunes = [*nottingham_pairs(data_folder, 20, 0), *jsb_pairs(data_folder, 20, 0)]
    assert {pair.source for pair in tunes} == {"nottingham", "jsb"}
    for pair in tunes:
        assert 0 < pair.notes.end < 20
        assert pair.caption
    assert sum(len(pair.attributes.instruments) == 4 for pair in tunes[20:]) > 10
    train, held = corpus(0, DemoSettings(pairs=90, held_out=9), data_folder)
    assert {p.source for p in held} == {p.source for p in train} == {"etude", "nottingham", "jsb"}


def test_a_folder_without_tunes_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no nottingham"):
        run_demo(tmp_path / "out", data=tmp_path, settings=DemoSettings.smoke())


def test_captions_survive_the_tokenizer():
    captions = [pair.caption for pair in etude_pairs(30, 0)]
    tokenizer = text_tokenizer(captions)
    for caption in captions:
        ids = tokenizer(caption, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == caption
        assert len(ids) < 40
