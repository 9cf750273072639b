import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from midi_llm.attributes import analyze
from midi_llm.captions import Request, describe
from midi_llm.decode import MidiOutput
from midi_llm.evaluation import EvaluationReport, Score, evaluate
from midi_llm.metrics import (
    CONTROL,
    DURATION_EDGES,
    INTERVAL_EDGES,
    clap_scores,
    compression_ratio,
    control_scores,
    distribution_scores,
    duration_histogram,
    frechet_distance,
    grammar_errors,
    in_key_ratio,
    instrument_scores,
    interval_histogram,
    key_match,
    kl_divergence,
    mel_embedding,
    most_at_once,
    notes_of,
    overlapped_area,
    pitch_class_entropy,
    real_time_factor,
    self_similarity,
    tempo_error,
    tempo_match,
)
from midi_llm.midi_write import Style, to_score, write_midi
from midi_llm.notes import Notes, empty_notes
from midi_llm.tokenizer import AMTTokenizer
from midi_llm.vocab import DRUMS, AMTConfig
from tenfold_common.errors import MissingDependencyError, UserError

RATE = 16_000
SMALL = AMTConfig.small()  # onsets from 0, durations from 400, notes from 480
REST, END = 2656, 2657


def pulse(tempo=120, n=64, *, instrument=0, pitches=(60, 64, 67, 65)) -> Notes:
    onset = np.arange(n) * 60 / tempo
    return Notes.of(onset, 60 / tempo, instrument, np.resize(pitches, n))


def tone(*hertz: float, seconds=1.0, rate=RATE) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return np.sum([np.sin(2 * np.pi * h * t) for h in hertz], 0)


# One output against one request


def test_instrument_scores_by_hand():
    assert instrument_scores([0, 32, DRUMS], [0, 33, DRUMS, 48]) == {
        "precision": 0.5, "recall": pytest.approx(2 / 3), "f1": pytest.approx(4 / 7), "exact": 0.0
    }  # fmt: skip
    assert instrument_scores([0, 32], [1, 33, 33], families=True)["exact"] == 1
    assert set(instrument_scores([0, 5], [5, 0]).values()) == {1.0}
    assert set(instrument_scores([0], []).values()) == {0.0}
    with pytest.raises(UserError, match="no instrument was requested"):
        instrument_scores([], [0])


@given(
    st.sets(st.integers(0, DRUMS), min_size=1, max_size=6),
    st.sets(st.integers(0, DRUMS), max_size=6),
)
def test_f1_is_the_harmonic_mean(asked, got):
    found = instrument_scores(sorted(asked), sorted(got))
    p, r = found["precision"], found["recall"]
    assert found["f1"] == pytest.approx(2 * p * r / (p + r) if p + r else 0)
    assert (found["exact"] == 1) == (asked == got)
    back = instrument_scores(sorted(got), sorted(asked)) if got else None
    assert back is None or (back["precision"], back["recall"]) == (r, p)


@pytest.mark.parametrize(
    ("asked", "got", "found"),
    [(120, 140, (True, True)), (120, 141, (False, True)), (120, 161, (False, False)),
     (140, 110.1, (True, True)), (110, 120, (False, True)), (40, 40.5, (False, True)),
     ("Allegro", 111, (True, True)), ("Grave", 70, (False, False)), ("Slow", 80, (True, True)),
     ("Slow", 100, (False, True)), ("Slow", 130, (False, False)), ("Very fast", 300, (True, True)),
     (120, None, (False, False)), ("Presto", None, (False, False))],
)  # fmt: skip
def test_tempo_bins_by_hand(asked, got, found):
    assert tempo_match(asked, got) == found


def test_unknown_tempo_words_are_refused():
    with pytest.raises(UserError, match=r"'Alegro' is no tempo word\. Did you mean 'Allegro'"):
        tempo_match("Alegro", 120)


@given(st.floats(20, 300), st.floats(20, 300))
def test_a_matching_bin_is_a_neighbouring_one_and_matching_is_mutual(a, b):
    exact, near = tempo_match(a, b)
    assert near or not exact
    assert tempo_match(b, a) == (exact, near)
    assert tempo_match(a, a) == (True, True)
    assert tempo_error(a, b, octave=True) <= tempo_error(a, b)


def test_tempo_errors_by_hand():
    assert tempo_error(100, 90) == pytest.approx(0.1)
    assert tempo_error(100, 210, octave=True) == pytest.approx(0.05)
    assert tempo_error(120, 40, octave=True) == pytest.approx(0)


@pytest.mark.parametrize(
    ("asked", "got", "found"),
    [("C major", "C major", (True, True)), ("C# minor", "Db minor", (True, True)),
     ("C major", "A minor", (False, True)), ("A minor", "C major", (False, True)),
     ("F# minor", "A major", (False, True)), ("Eb major", "C minor", (False, True)),
     ("C major", "C minor", (False, False)), ("C major", "G major", (False, False)),
     ("C major", "E minor", (False, False)), ("C major", None, (False, False))],
)  # fmt: skip
def test_keys_match_by_hand(asked, got, found):
    assert key_match(asked, got) == found


def test_keys_that_are_none_are_refused():
    with pytest.raises(UserError, match="is no key"):
        key_match("H major", "C major")


def test_in_key_ratio_by_hand():
    notes = Notes.of(np.arange(5.0), [9, 1, 1, 1, 1], [0, 0, 0, 0, DRUMS], [60, 62, 63, 69, 61])
    assert in_key_ratio(notes, "C major") == 3 / 4  # by number, not by duration; no drums
    assert in_key_ratio(notes, "C minor") == 3 / 4  # A is not in it
    assert np.isnan(in_key_ratio(empty_notes(), "C major"))
    even = Notes.of(np.arange(12.0), 1.0, 0, range(60, 72))
    assert in_key_ratio(even, "F# minor") == pytest.approx(7 / 12)


@given(st.lists(st.integers(0, 127), min_size=1, max_size=30))
def test_relative_keys_have_one_scale(pitches):
    notes = Notes.of(np.arange(float(len(pitches))), 1.0, 0, pitches)
    assert in_key_ratio(notes, "Eb major") == in_key_ratio(notes, "C minor")


def test_compression_is_of_the_text_that_is_documented():
    import zlib

    notes = Notes.of([0.5, 0.75], [0.25, 1.0], [0, DRUMS], [60, 36])
    text = b"0 25 0 60\n25 100 128 36\n"
    assert compression_ratio(notes) == len(text) / len(zlib.compress(text, 9))
    assert np.isnan(compression_ratio(empty_notes()))


def test_what_repeats_is_compressed_further():
    rng = np.random.default_rng(0)
    chaos = Notes.of(
        np.cumsum(rng.integers(1, 50, 256)) / 100, rng.integers(1, 99, 256) / 100,
        0, rng.integers(20, 100, 256),
    )  # fmt: skip
    assert compression_ratio(pulse(n=256)) > 4 * compression_ratio(chaos) > 4


def test_the_real_time_factor_is_bigger_for_the_faster():
    assert real_time_factor(30, 10) == 3
    for bad in ((10, 0), (-1, 3), (1, float("nan"))):
        with pytest.raises(UserError, match="the second over 0"):
            real_time_factor(*bad)


def test_control_scores_of_a_piece_by_hand():
    asked = Request(
        key="A minor", tempo=240.0, tempo_word="Prestissimo", instruments=(0, 32),
        notes_per_second=8.0, density_word="busy", seconds=30.0, duration_word="Short fragment",
    )  # fmt: skip
    found = control_scores(asked, pulse(120))  # C E G F: two notes a second for 32 s
    assert list(found) == list(CONTROL)
    assert found["instrument_precision"] == 1
    assert found["instrument_recall"] == 0.5
    assert found["TB"] == found["TBT"] == 0
    assert found["tempo_error"] == pytest.approx(0.5, abs=0.01)
    assert found["tempo_error_octave"] == pytest.approx(0, abs=0.01)
    assert (found["CK"], found["CKD"], found["in_key"]) == (0, 1, 1)
    assert (found["density_bin"], found["duration_bin"], found["empty"]) == (0, 0, 0)
    assert found["density_log_ratio"] == pytest.approx(2)


def test_what_is_not_asked_for_is_not_scored():
    found = control_scores("", pulse())
    assert [name for name, value in found.items() if not np.isnan(value)] == ["empty"]
    words = control_scores("a fast song", pulse(130))
    assert words["TB"] == 1
    assert np.isnan(words["tempo_error"])


def test_nothing_follows_no_request():
    asked = describe(analyze(pulse()), style="plain")
    found = control_scores(asked, empty_notes())
    assert found["empty"] == 1
    zero = ("instrument_precision", "instrument_f1", "TB", "TBT", "CK", "CKD", "density_bin",
            "duration_bin")  # fmt: skip
    assert all(found[name] == 0 for name in zero)
    assert np.isnan(found["tempo_error"])
    assert np.isfinite(
        control_scores(Request(notes_per_second=4.0), empty_notes())["density_log_ratio"]
    )


def test_the_tempo_is_not_that_which_a_file_says(tmp_path):
    write_midi(pulse(120), tmp_path / "a.mid", Style(tempo=97))
    assert control_scores("97 bpm", tmp_path / "a.mid")["TB"] == 0
    assert control_scores("120 bpm", tmp_path / "a.mid")["tempo_error"] < 0.01


def test_outputs_of_all_kinds_are_read(tmp_path):
    notes = pulse()
    write_midi(notes, tmp_path / "a.mid")
    score = to_score(notes)
    for output in (notes, score, SimpleNamespace(score=score), tmp_path / "a.mid",
                   (tmp_path / "a.mid").read_bytes()):  # fmt: skip
        assert (notes_of(output).pitch == notes.pitch).all()
    with pytest.raises(UserError, match="an output must be"):
        notes_of(3)


def test_self_similarity_by_hand():
    # Windows of 2 s: C, C, nothing, G; the cosines of the three pairs are 1, 0, 0.
    notes = Notes.of([0, 2, 7.9], 0.1, 0, [60, 72, 67])
    assert self_similarity(notes) == pytest.approx(1 / 3)
    # {C, E} against {C, C}: one over the root of two. Drums do not count.
    notes = Notes.of([0, 1, 2, 3, 5], 0.1, [0, 0, 0, 0, DRUMS], [60, 64, 60, 60, 38])
    assert self_similarity(notes) == pytest.approx(0.5**0.5)
    assert np.isnan([self_similarity(notes, window=10), self_similarity(empty_notes())]).all()
    with pytest.raises(UserError, match="window must be over 0"):
        self_similarity(notes, window=0)


def test_most_at_once_by_hand():
    notes = Notes.of([0, 0, 0.004, 0.5], 0.1, 0, [60, 64, 67, 60])
    assert most_at_once(notes) == 3
    assert most_at_once(notes, resolution=1000) == 2
    assert most_at_once(empty_notes()) == 0


@pytest.mark.parametrize(
    ("ids", "errors", "read"),
    [
        ([], 0, 0),
        ([0, 404, 540, 5, 402, 541, 5, 402, 542, END], 0, 10),
        ([0, 404, 540, END, 540, 540], 0, 4),  # what is behind the end does not count
        ([9, 404, 540, 5, 404, 540, 7, 404, 540], 1, 9),  # times fall once
        ([0, 404, 540, 404, 540, 9, 404, 540], 2, 8),  # an onset is missing
        ([0, 540, 9, 404, 540], 1, 5),  # a duration is missing
        ([0, 404, 9, 404, 540], 1, 5),  # a note is missing
        ([9, 400, REST, 19, 404, REST], 1, 6),  # a rest that lasts
        ([9, 400, 540], 1, 3),  # a note that does not
        ([9, 404, 540, 9, 404, 540], 1, 6),  # a note twice
        ([540, 540, 540], 3, 3),
        ([0, END, 0], 1, 2),
        ([99_999, -1], 2, 2),
    ],
)
def test_grammar_errors_by_hand(ids, errors, read):
    assert grammar_errors(ids, SMALL) == (errors, read)
    assert grammar_errors(np.array(ids, np.int64), SMALL) == (errors, read)


def test_ids_of_the_tokenizer_have_no_errors_on_their_own_grid():
    ids = AMTTokenizer(SMALL).encode(pulse(n=30)).ids
    assert grammar_errors(ids, SMALL) == (0, 90)
    assert grammar_errors(ids, AMTConfig())[0] > 0


# Distributions


def test_entropy_by_hand():
    assert pitch_class_entropy(pulse(pitches=(60, 72))) == 0
    assert pitch_class_entropy(pulse()) == 2
    everything = Notes.of(np.arange(12.0), 1.0, 0, range(12))
    assert pitch_class_entropy(everything) == pytest.approx(np.log2(12))
    assert np.isnan(pitch_class_entropy(empty_notes()))


def test_histograms_count_what_they_say():
    notes = Notes.of([0, 0, 0.5, 7], [0.5, 20, 0.01, 1], [0, 0, 0, DRUMS], 60)
    intervals, durations = interval_histogram(notes), duration_histogram(notes)
    assert intervals.sum() == 3
    assert intervals[0] == intervals[-1] == 1
    assert intervals[np.searchsorted(INTERVAL_EDGES, 0.5, "right") - 1] == 1
    assert durations.sum() == 3
    assert durations[0] == durations[-1] == 1
    assert durations[np.searchsorted(DURATION_EDGES, 0.5, "right") - 1] == 1


def test_overlap_and_divergence_by_hand():
    assert overlapped_area([1, 1, 0], [0, 2, 2]) == 0.5
    p, q = np.array([1.5, 0.5]) / 2, np.array([0.5, 1.5]) / 2
    assert kl_divergence([1, 0], [0, 1]) == pytest.approx((p * np.log(p / q)).sum())


counts = st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any)


@given(counts, counts)
def test_overlap_is_symmetric_and_both_know_equal_histograms(p, q):
    assert overlapped_area(p, q) == pytest.approx(overlapped_area(q, p))
    assert 0 <= overlapped_area(p, q) <= 1 + 1e-12
    assert overlapped_area(p, p) == pytest.approx(1)
    assert kl_divergence(p, q) >= 0
    assert kl_divergence(p, p) == 0


@pytest.mark.parametrize("bad", [[], [0, 0], [1, -1], [1, np.nan], [[1, 2]], [1, 2, 3]])
def test_histograms_that_are_none_are_refused(bad):
    with pytest.raises(UserError, match="histogram"):
        overlapped_area(bad, [1, 2])


def test_distributions_of_equal_and_of_other_pieces():
    same = distribution_scores([pulse()], [pulse()])
    assert same["interval_oa"] == same["duration_oa"] == same["pitch_class_oa"] == 1
    assert same["interval_kl"] == same["pitch_class_entropy"] == 0
    other = distribution_scores([pulse(40, pitches=(61, 63))], [pulse()])
    assert other["interval_oa"] == other["pitch_class_oa"] == 0
    assert other["pitch_class_entropy"] == -1
    assert np.isnan(distribution_scores([empty_notes()], [pulse()])["interval_kl"])


# Frechet distance


def test_the_distance_of_normals_with_one_axis_has_a_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, (50, 1)), rng.normal(3, 5, (60, 1))
    by_hand = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(by_hand)


def test_the_distance_is_that_of_the_matrix_square_root():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40, 5)), rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)) + 1
    s, t = np.cov(a.T), np.cov(b.T)
    gap = a.mean(0) - b.mean(0)
    by_hand = gap @ gap + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(by_hand)
    assert frechet_distance(b, a) == pytest.approx(by_hand)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(20)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(by_hand)


def test_constant_and_dependent_embeddings_give_finite_distances():
    a = np.zeros((10, 3))
    assert frechet_distance(a, a + 1) == 3
    line = np.arange(10.0)[:, None] * np.ones(3)
    assert frechet_distance(line, line) == pytest.approx(0, abs=1e-6)


def test_too_few_embeddings_need_a_shrinkage():
    rng = np.random.default_rng(2)
    few, many = rng.normal(size=(4, 4)), rng.normal(size=(5, 4))
    with pytest.raises(UserError, match=r"a has 4 embeddings of dimension 4.*5 or more"):
        frechet_distance(few, many)
    with pytest.raises(UserError, match="b has 4"):
        frechet_distance(many, few)
    assert frechet_distance(few, many, 0.5) > 0
    full = frechet_distance(few, many, 1.0)  # both spheres: a closed form again
    variances = [np.trace(np.cov(x.T)) / 4 for x in (few, many)]
    gap = few.mean(0) - many.mean(0)
    assert full == pytest.approx(gap @ gap + 4 * np.diff(np.sqrt(variances))[0] ** 2)


@pytest.mark.parametrize(
    ("a", "b", "shrinkage", "message"),
    [(np.zeros((9, 2)), np.zeros((9, 3)), None, "have the shapes"),
     (np.zeros(9), np.zeros((9, 3)), None, "have the shapes"),
     (np.full((9, 2), np.nan), np.zeros((9, 2)), None, "a holds NaN"),
     (np.zeros((9, 2)), np.zeros((9, 2)), 1.5, "shrinkage must be"),
     (np.zeros((1, 2)), np.zeros((9, 2)), 0.5, "a has 1 embeddings")],
)  # fmt: skip
def test_bad_embeddings_are_refused(a, b, shrinkage, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(a, b, shrinkage)


# Audio


def test_the_embedding_tells_tones_apart_and_ignores_level_and_channels():
    a = mel_embedding(tone(440), RATE)
    assert a.shape == (120,)
    assert np.isfinite(a).all()
    assert mel_embedding(tone(440) * 0.1, RATE) == pytest.approx(a, abs=1e-6)
    stereo = np.stack([tone(440)] * 2, 1)
    assert mel_embedding(stereo, RATE) == pytest.approx(a)
    assert a[96:108].argmax() == 9  # A
    assert mel_embedding(tone(261.63), RATE)[96:108].argmax() == 0  # C
    near = np.linalg.norm(mel_embedding(tone(440, seconds=1.4), RATE) - a)
    assert near < 0.2 * np.linalg.norm(mel_embedding(tone(880, 1320), RATE) - a)


def test_the_embedding_hardly_depends_on_the_rate():
    wav = tone(440, 660, rate=44_100)
    a, b = mel_embedding(wav, 44_100), mel_embedding(tone(440, 660), RATE)
    assert np.corrcoef(a, b)[0, 1] > 0.95


@pytest.mark.parametrize("wav", [np.zeros(8000), np.zeros(1), np.ones(100)])
def test_silence_and_short_sounds_have_finite_embeddings(wav):
    assert np.isfinite(mel_embedding(wav, RATE)).all()


@pytest.mark.parametrize(
    ("wav", "rate", "message"),
    [(np.zeros(0), RATE, "wav has the shape"), (np.zeros((2, 2, 2)), RATE, "wav has the shape"),
     (np.array([np.nan]), RATE, "NaN"), (np.zeros(9), 8000, "at least 16000"),
     (np.zeros(9), 22050.5, "at least 16000")],
)  # fmt: skip
def test_bad_audio_is_refused(wav, rate, message):
    with pytest.raises(UserError, match=message):
        mel_embedding(wav, rate)


class FakeClap:
    """Embeds by loudness: text of its length, audio of its greatest sample."""

    def __init__(self, **named) -> None:
        self.rates = []

    def load_ckpt(self) -> None:
        pass

    def get_text_embedding(self, texts):
        return np.array([[len(t), 1.0] for t in texts])

    def get_audio_embedding_from_data(self, x):
        assert x.dtype == np.float32
        assert x.ndim == 2
        self.rates.append(x.shape[1])
        return np.array([[np.abs(x).max().round(), 1.0]])


def test_clap_is_the_cosine_of_pairs_at_48_khz():
    model = FakeClap()
    audios = [(np.full(RATE, 1.0), RATE), (np.full((44_100, 2), 3.0), 44_100)]
    found = clap_scores(["a", "a"], audios, model=model)
    assert found == pytest.approx([100, 100 * (3 + 1) / np.sqrt(2 * 10)])
    assert model.rates == [48_000, 48_000]
    with pytest.raises(UserError, match="they must pair"):
        clap_scores(["a"], audios, model=model)


def test_without_laion_clap_one_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "laion_clap", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'midi-llm\[clap\]'"):
        clap_scores(["a"], [(np.zeros(9), RATE)])
    fake = ModuleType("laion_clap")
    fake.CLAP_Module = FakeClap
    monkeypatch.setitem(sys.modules, "laion_clap", fake)
    assert clap_scores(["a"], [(np.full(RATE, 1.0), RATE)]) == pytest.approx([100])


# Reports


def pieces() -> list[Notes]:
    tempos, tonics, instruments = (84, 100, 120, 150), (60, 62, 65), (0, 24, 73, 40)
    return [
        pulse(t, instrument=i, pitches=(k, k + 4, k + 7, k + 12, k + 7))
        for t, i in zip(tempos, instruments, strict=True)
        for k in tonics
    ]


def test_what_was_asked_for_scores_one_and_shuffled_less():
    outputs = pieces()
    asked = [describe(analyze(n), style="plain") for n in outputs]
    report = evaluate(outputs, asked, references=outputs, resamples=200)
    for name in ("instrument_f1", "TB", "TBT", "CK", "CKD", "in_key"):
        score = report.scores[name]
        assert score.value == score.low == score.high == score.real == 1
        assert score.n == 12
        assert score.shuffled < 0.9
    assert report.scores["TB"].shuffled < 0.4
    assert report.settings["prompts"] == 12
    assert "| CK | 1.000 | 1.000 to 1.000 | 12 |" in report.table()


def test_reports_repeat_themselves_and_survive_json(tmp_path):
    outputs = pieces()
    asked = [analyze(n) for n in outputs]
    made = [
        evaluate(
            outputs[::-1], asked, metrics=("control", "compression", "distribution", "rtf"),
            real=outputs, wall_seconds=2.0, resamples=50, seed=3,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert made[0].table() == made[1].table()
    made[0].save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    read = EvaluationReport.load(tmp_path / "report.json")
    assert read.to_dict() == made[0].to_dict() == json.loads(text)
    assert read.table() == made[0].table()
    seconds = sum(n.end for n in outputs)
    assert read.scores["RTF"].value == pytest.approx(seconds / 2)
    assert read.scores["interval_oa"].value == pytest.approx(1)
    assert read.scores["CR"].real == pytest.approx(read.scores["CR"].value)


def test_references_pair_with_requests_and_the_pool_does_not():
    piano, violin = pulse(), pulse(instrument=40, n=16)
    pool = [pulse(n=8), violin, piano]
    named = {"metrics": ["control", "compression"], "resamples": 10}
    asked = ["piano", "violin"]

    def reached(**real) -> list[float]:
        scores = evaluate([violin, piano], asked, **named, **real).scores
        assert scores["instrument_exact"].value == 0
        return [scores[name].real for name in ("instrument_exact", "CR")]

    mean, own = (np.mean([compression_ratio(n) for n in some]) for some in (pool, pool[1:]))
    assert mean != pytest.approx(own)
    assert reached(references=[piano, violin], real=pool) == pytest.approx([1, mean])
    assert reached(references=[violin, piano], real=pool[::-1]) == pytest.approx([0, mean])
    assert reached(references=[piano, violin]) == pytest.approx([1, own])
    assert reached(real=pool) == pytest.approx([np.nan, mean], nan_ok=True)
    report = evaluate(
        [piano, violin], asked, metrics=["distribution"], references=[piano, violin], real=pool[:1]
    )
    assert report.scores["duration_oa"].value == 1  # all are of half a second
    assert report.scores["pitch_class_oa"].value == 1
    assert (report.settings["references"], report.settings["real"]) == (2, 1)


def test_validity_of_outputs():
    wrong = MidiOutput("a", pulse(n=2), (9, 404, 540, 5, 404, 540), "length")
    right = MidiOutput("b", empty_notes(), (0, 404, 540, 5, 402, 541, END), "stop")
    chord = Notes.of([0, 0, 0], 1.0, 0, [60, 64, 67])
    report = evaluate(
        [wrong, right, chord], ["a", "b", "c"], metrics=["validity"], amt=SMALL,
        real=[chord, chord, pulse(), empty_notes()],
    )  # fmt: skip
    assert list(report.scores) == ["grammar_errors", "empty", "most_at_once"]
    errors = report.scores["grammar_errors"]
    assert errors.value == pytest.approx(1000 / 13)
    assert (errors.low, errors.high, errors.n) == (0, pytest.approx(1000 / 6), 2)
    assert [report.scores["empty"].value, report.scores["empty"].real] == [1 / 3, 1 / 4]
    most = report.scores["most_at_once"]
    assert [most.value, most.real] == pytest.approx([(1 + 0 + 3) / 3, (3 + 3 + 1 + 0) / 4])
    bare = evaluate(
        [chord], ["a"], metrics=["validity", "control"], references=[chord], real=[empty_notes()]
    )
    assert "grammar_errors" not in bare.scores
    assert "not counted, as no output has ids" in bare.table()
    assert bare.scores["empty"].real == 0  # that of control
    assert bare.scores["most_at_once"].real == 0  # that of the pool


def test_self_similarity_stands_beside_that_of_the_pool():
    same, other = Notes.of([0, 2], 1.0, 0, [60, 60]), Notes.of([0, 2], 1.0, 0, [60, 61])
    score = evaluate(
        [same, other, pulse(n=1)], ["a"] * 3, metrics=["self_similarity"], real=[other]
    ).scores["self_similarity"]
    assert (score.value, score.n, score.real) == (0.5, 2, 0)


def test_the_real_time_factor_of_all_or_of_each():
    outputs = [pulse(), pulse(n=32)]  # 32 and 16 s
    whole = evaluate(outputs, ["a", "b"], metrics=["rtf"], wall_seconds=12.0).scores["RTF"]
    assert (whole.value, whole.n) == (pytest.approx(4), 2)
    assert np.isnan(whole.low)
    each = evaluate(outputs, ["a", "b"], metrics=["rtf"], wall_seconds=[2.0, 6.0]).scores["RTF"]
    assert [each.value, each.low, each.high] == pytest.approx([48 / 8, 16 / 6, 32 / 2])


def test_the_interval_is_that_of_a_bootstrap_over_prompts():
    notes = pulse()
    right, wrong = Request(instruments=(0,)), Request(instruments=(9,))
    asked = [Request(instruments=(0 if i % 2 else 9,), seconds=float(i)) for i in range(100)]
    score = evaluate([notes] * 100, asked, resamples=4000).scores["instrument_exact"]
    assert score.value == 0.5
    assert (score.high - score.low) / 2 == pytest.approx(1.96 * 0.05, rel=0.1)
    takes = evaluate([notes] * 100, [right] * 50 + [wrong] * 50).scores["instrument_exact"]
    assert (takes.low, takes.high) == (0, 1)  # two prompts with 50 takes each
    assert takes.shuffled == 0.5


def test_intervals_are_of_the_outputs_for_which_a_metric_is_defined():
    asked = ["piano", "piano in C major", "120 bpm", "90 bpm"]
    score = evaluate([pulse()] * 4, asked).scores["instrument_exact"]
    assert (score.value, score.low, score.high, score.n) == (1, 1, 1, 2)


def test_one_prompt_has_neither_interval_nor_shuffle():
    score = evaluate([pulse(), pulse()], ["120 bpm"] * 2).scores["TB"]
    assert score.value == 1
    assert np.isnan([score.low, score.high, score.shuffled, score.real]).all()


def test_outputs_without_notes_are_counted():
    report = evaluate([pulse(), empty_notes()], ["piano", "C major"])
    assert report.scores["empty"].value == 0.5
    assert report.scores["CK"].value == 0
    assert report.scores["instrument_f1"].n == 1


def test_fad_and_clap_of_outputs():
    outputs, rng = pieces(), np.random.default_rng(0)
    audio = [(tone(h) + 0.1 * rng.normal(size=RATE), RATE) for h in np.linspace(200, 900, 12)]
    far = [(0.1 * rng.normal(size=RATE), RATE) for _ in outputs]
    captions = [describe(analyze(n), seed=i) for i, n in enumerate(outputs)]
    named = {"metrics": ["fad"], "real_audio": audio, "shrinkage": 0.1}
    near = evaluate(outputs, captions, audio=audio, **named)
    name = "mel-FAD, not comparable with published FAD"
    assert list(near.scores) == [name]
    assert near.scores[name].value == pytest.approx(0, abs=1e-6)
    assert near.scores[name].real > 0
    assert evaluate(outputs, captions, audio=far, **named).scores[name].value > 10
    with pytest.raises(UserError, match="choose a shrinkage"):
        evaluate(outputs, captions, audio=audio, metrics=["fad"], real_audio=audio)

    def loudness(wav, rate):
        return np.array([np.abs(wav).max()])

    own = evaluate(
        outputs, captions, audio=audio, metrics=["fad"], real_audio=audio, embedder=loudness
    )
    assert list(own.scores) == ["FAD (loudness)"]

    # The distance of two levels, 1 and 3 or 1 and 5 in the mean, all of variance 0.
    one, three, five = ((np.full(9, level), RATE) for level in (1.0, 3.0, 5.0))
    named = {"metrics": ["fad"], "audio": [one] * 2, "embedder": loudness}
    named["reference_audio"] = [three] * 2
    paired = evaluate([pulse()] * 2, ["a", "b"], **named)
    assert paired.scores["FAD (loudness)"].value == pytest.approx(4)
    pooled = evaluate([pulse()] * 2, ["a", "b"], real_audio=[five] * 5, **named)
    assert pooled.scores["FAD (loudness)"].value == pytest.approx(16)


def test_clap_of_outputs_stands_beside_that_of_other_prompts_and_of_real_music():
    one, three = (np.full(RATE, 1.0), RATE), (np.full(RATE, 3.0), RATE)
    score = evaluate(
        [pulse(), pulse()], ["a", "aaa"], metrics=["clap"], audio=[one, three],
        reference_audio=[three, one], real_audio=[one] * 5, clap_model=FakeClap(),
    ).scores["CLAP"]  # fmt: skip
    assert score.value == pytest.approx(100)
    assert [score.shuffled, score.real] == pytest.approx([400 / np.sqrt(2 * 10)] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requested": ["a", "b"]}, "1 outputs but 2 requests"),
        ({"outputs": [], "requested": []}, "at least one of both"),
        ({"outputs": "a.mid"}, "outputs must be a list"),
        ({"requested": [3]}, "must be a caption"),
        ({"metrics": ["contrl"]}, "'contrl' is no metric.*Did you mean 'control'"),
        ({"metrics": []}, "metrics is empty"),
        ({"metrics": "control"}, "metrics must be a list"),
        ({"metrics": ["distribution"]}, "needs real"),
        ({"metrics": ["fad"]}, "needs audio"),
        ({"metrics": ["fad"], "audio": [(np.zeros(9), RATE)]}, "needs real_audio"),
        ({"metrics": ["fad"], "audio": [(np.zeros(9), RATE)] * 2}, "2 entries"),
        ({"metrics": ["clap"]}, "needs audio"),
        ({"metrics": ["clap"], "requested": [Request()]}, "needs captions"),
        ({"metrics": ["rtf"]}, "needs wall_seconds"),
        ({"metrics": ["rtf"], "wall_seconds": 0}, "needs wall_seconds over 0"),
        ({"metrics": ["rtf"], "wall_seconds": [1.0, 1.0]}, "a list with one for each"),
        ({"metrics": ["rtf"], "wall_seconds": "soon"}, "not 'soon'"),
        ({"references": []}, "references has 0 entries, but there are 1 outputs"),
        ({"reference_audio": [(np.zeros(9), RATE)] * 2}, "reference_audio has 2 entries"),
        ({"real": "folder"}, "real must be a list, not str"),
        ({"resamples": 1}, "resamples must be"),
    ],
)
def test_bad_arguments_of_evaluate_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        evaluate(**{"outputs": [pulse()], "requested": ["a"], **change})


def test_an_embedder_must_return_vectors_of_one_length():
    audio = [(np.ones(9), RATE), (np.ones(9), RATE)]
    with pytest.raises(UserError, match="must return"):
        evaluate(
            [pulse()] * 2, ["a", "b"], metrics=["fad"], audio=audio, real_audio=audio,
            embedder=lambda wav, rate: np.zeros((2, 2)),
        )  # fmt: skip


def test_what_is_no_report_is_refused(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match="cannot read"):
        EvaluationReport.load(path)
    score = {"value": "x"}
    for text in ("{", "[]", "{}", json.dumps({"scores": {"a": score}, "settings": {}, "notes": []}),
                 '{"scores": {"a": {"worth": 1}}, "settings": {}, "notes": []}'):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.json"):
            EvaluationReport.load(path)


def test_tables_show_what_is_undefined_as_a_dash():
    report = EvaluationReport({"CK": Score(0.25, n=4)}, {}, ["A note."])
    assert report.table().splitlines()[-3:] == ["| CK | 0.250 | - | 4 | - | - |", "", "A note."]


@pytest.mark.realdata
def test_real_tunes_follow_their_own_captions_and_not_those_of_others(data_folder):
    paths = sorted((data_folder / "nottingham" / "MIDI").glob("*.mid"))[::20]
    captions = [describe(analyze(p), seed=i) for i, p in enumerate(paths)]
    report = evaluate(paths, captions, references=paths, resamples=200)
    for name in ("TB", "CK", "density_bin", "duration_bin"):
        assert report.scores[name].value == report.scores[name].real > 0.95
        assert report.scores[name].shuffled < 0.8
    assert report.scores["in_key"].shuffled < report.scores["in_key"].low
