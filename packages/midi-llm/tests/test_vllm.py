"""vLLM for real: an engine with a grid that has controls, then a server with the small grid."""

import gc
import os

import numpy as np
import pytest
import torch
from vllm_models import LENGTH, SMALL, WITH_CONTROLS, write_model

from midi_llm.anticipate import REST
from midi_llm.decode import MidiLM
from midi_llm.grammar import GenerationConstraints, Grammar, Rules
from midi_llm.midi_read import read_notes
from midi_llm.modeling import TextMidiProcessor
from midi_llm.notes import Notes
from midi_llm.vllm_engine import ServerMidiLM, VLLMMidiLM, midi_args
from midi_llm.vocab import DRUMS
from tenfold_common.errors import UserError
from tenfold_common.testing import vllm_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM and what it brings warn at import and at start
]

PROMPTS = ["slow jazz trio", "a march in C major for brass", "techno", "Klavier, leise: äöü"]
CONSTRAINTS = {
    "none": None,
    "instruments and key": GenerationConstraints(
        instruments=["bass", "piano", "drums"], key="D minor"
    ),
    "one voice": GenerationConstraints(max_polyphony=1, pitch_range=(48, 72)),
    "short": GenerationConstraints(end_time=4.0, min_notes=2),
    "sparse": GenerationConstraints(notes_per_second=1.5, instruments=["violin", "cello"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("lm") / "tiny", WITH_CONTROLS)


@pytest.fixture(scope="module")
def local(folder):
    return MidiLM.from_pretrained(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(folder):
    pytest.importorskip("vllm")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    model = VLLMMidiLM.from_pretrained(folder, enforce_eager=True, max_num_seqs=32)
    yield model
    model.close()
    model.engine = None
    gc.collect()  # vLLM leaves a ZMQ context open, which warns: here, where warnings are ignored


def check_legal(output, amt, constraints, max_notes):
    """All ids pass a fresh grammar, and what it collects is what the output says."""
    grammar = Grammar(Rules(amt, constraints), max_events=max_notes)
    for id in output.ids:
        grammar.push(id)
    assert grammar.finish_reason == output.finish_reason
    assert len(output.notes) == sum(note != REST for _, _, note in grammar.events)
    assert len(output.notes) > 0


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_greedy_ids_are_those_of_transformers(engine, local, name):
    named = {"temperature": 0.0, "max_notes": 25, "constraints": CONSTRAINTS[name]}
    wanted = local.generate(PROMPTS, **named)
    found = engine.generate(PROMPTS, **named)
    assert [output.ids for output in found] == [output.ids for output in wanted]
    assert [o.finish_reason for o in found] == [o.finish_reason for o in wanted]
    assert [o.prompt for o in found] == PROMPTS
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours.notes.columns, theirs.notes.columns, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len({output.ids for output in found}) > 1  # the prompts matter


def test_samples_are_legal_and_keep_to_constraints(engine, tmp_path):
    made = {
        name: engine.generate(PROMPTS[:2], n=4, max_notes=40, constraints=one, seed=3)
        for name, one in CONSTRAINTS.items()
    }
    for name, outputs in made.items():
        for output in outputs:
            check_legal(output, WITH_CONTROLS, CONSTRAINTS[name], 40)
    for output in made["instruments and key"]:
        # On this grid the families' own programs: 0 piano, 33 bass.
        assert set(output.notes.instrument.tolist()) <= {0, 33, DRUMS}
        pitched = output.notes.pitch[output.notes.instrument != DRUMS]
        assert set((pitched % 12).tolist()) <= {2, 4, 5, 7, 9, 10, 0, 1}
    for output in made["one voice"]:
        ends = output.notes.onset + output.notes.duration
        assert (output.notes.onset[1:] >= np.maximum.accumulate(ends)[:-1] - 1e-9).all()
        pitched = output.notes.pitch[output.notes.instrument != DRUMS]
        assert ((pitched >= 48) & (pitched <= 72)).all()
    for output in made["short"]:
        assert output.seconds <= 4.0
        assert output.finish_reason in ("stop", "end_time", "length")
    saved = made["none"][0].save(tmp_path / "a.mid")
    assert len(read_notes(saved)) > 0


def test_seeds_decide_and_takes_differ(engine):
    def ids(prompts, **named):
        return [output.ids for output in engine.generate(prompts, max_notes=15, **named)]

    four = ids("rain", n=4, seed=5)
    assert len(set(four)) == 4
    assert ids("rain", n=4, seed=5) == four
    assert ids("rain", n=2, seed=5) == four[:2]  # whatever else is in the batch
    assert not set(ids("rain", n=4, seed=6)) & set(four)


def test_other_requests_of_the_batch_are_left_alone(engine):
    import vllm

    processor = engine.processor
    grammar = Grammar(Rules(WITH_CONTROLS), max_events=10)
    prompt = processor.encode("song")
    midi = midi_args(grammar, processor.offset)
    plain = {"max_tokens": 30, "temperature": 0.0, "detokenize": False, "ignore_eos": True}
    stop = [processor.offset + WITH_CONTROLS.separator]
    bound = vllm.SamplingParams(**plain, stop_token_ids=stop, extra_args={"midi": midi})
    free = vllm.SamplingParams(**plain)
    text = {"prompt_token_ids": processor.encode_text("hello")}
    music = {"prompt_token_ids": prompt}

    def run(prompts, params):
        outputs = engine.engine.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    [alone] = run([text], [free])
    mixed = run([text, music, text, music], [free, bound, free, free])
    assert mixed[0] == mixed[2] == alone
    for token in mixed[1]:
        grammar.push(token - processor.offset)
    assert grammar.finished
    assert mixed[3] != mixed[1]  # without a grammar this model writes no music


def piece():
    """Two voices: chords of strings once a second, and a melody."""
    onset = np.concatenate([np.arange(0, 18, 1.0), np.arange(0.5, 18, 0.75)])
    order = np.argsort(onset, kind="stable")
    instrument = np.where(np.arange(len(onset)) < 18, 48, 0)
    pitch = np.where(instrument == 48, 48, 60 + np.arange(len(onset)) % 12)
    return Notes.of(onset[order], np.full(len(onset), 0.5), instrument[order], pitch[order])


def test_infilling_anticipates_what_comes_as_transformers_does(engine, local):
    source = piece()
    named = {"start": 4.0, "end": 8.0, "prompt": "waltz", "temperature": 0.0}
    named["keep_instruments"] = [48]
    wanted = local.infill(source, **named)
    found = engine.infill(source, **named)
    assert found.ids == wanted.ids
    controls = [id for id in found.ids if WITH_CONTROLS.block(id).startswith("control")]
    assert len(controls) >= 3
    assert len(controls) % 3 == 0
    sampled = engine.infill(source, **{**named, "temperature": 1.0}, seed=4)
    kept = source[(source.onset < 4) | (source.onset >= 8) | (source.instrument == 48)]
    old = set(zip(*(c.tolist() for c in kept.columns), strict=True))
    both = set(zip(*(c.tolist() for c in sampled.notes.columns), strict=True))
    assert old < both
    for onset, duration, *_ in both - old:
        assert onset >= 4
        assert onset + duration <= 8


def test_pieces_go_on_as_with_transformers(engine, local):
    named = {"seconds": 3.0, "prompt": "waltz", "temperature": 0.0}
    source = piece()
    source = source[source.onset < 6]
    wanted = local.continue_(source, **named)
    found = engine.continue_(source, **named)
    assert found.ids == wanted.ids
    assert len(found.notes) > len(source)


def test_what_cannot_be_is_said(engine):
    tight = GenerationConstraints(end_time=0.5, max_polyphony=1, min_notes=11)
    with pytest.raises(UserError, match="min_notes"):
        engine.generate("x", constraints=tight, max_notes=20)
    with pytest.raises(UserError, match="shorten the prompt"):
        engine.generate("x" * 2 * LENGTH)
    assert engine.generate("still there", max_notes=2)[0].ids  # the engine lives on


def test_options_that_vllm_does_not_take_are_said(folder):
    pytest.importorskip("vllm")
    with pytest.raises(UserError, match="vLLM does not start"):
        VLLMMidiLM.from_pretrained(folder, enforce_egaer=True)


def test_server_writes_as_transformers_does(engine, tmp_path_factory, tmp_path):
    engine.close()  # one engine at a time: this test comes last
    path = write_model(tmp_path_factory.mktemp("server") / "tiny", SMALL)
    local = MidiLM.from_pretrained(path, device="cpu", dtype=torch.float32)
    arguments = ("--logits-processors", "midi_llm.vllm_plugin:MidiGrammarV1")
    with vllm_server(path, log=tmp_path / "log", arguments=arguments) as address:
        lm = ServerMidiLM(address, TextMidiProcessor.from_pretrained(path))
        assert lm.context == LENGTH
        for constraints in CONSTRAINTS.values():
            named = {"temperature": 0.0, "max_notes": 12, "constraints": constraints}
            wanted = local.generate(PROMPTS, **named)
            found = lm.generate(PROMPTS, **named)
            assert [o.ids for o in found] == [o.ids for o in wanted]
        named = {"n": 3, "max_notes": 20, "constraints": CONSTRAINTS["one voice"]}
        outputs = lm.generate(PROMPTS[:2], seed=1, **named)
        for output in outputs:
            check_legal(output, SMALL, CONSTRAINTS["one voice"], 20)
        again = lm.generate(PROMPTS[:2], seed=1, **named)
        assert [o.ids for o in again] == [o.ids for o in outputs]
        assert len({o.ids for o in outputs}) == 6
        source = piece()
        source = source[source.onset < 6]
        named = {"seconds": 2.0, "prompt": "waltz", "temperature": 0.0}
        assert lm.continue_(source, **named).ids == local.continue_(source, **named).ids
        check_errors_of_the_server(address, lm)


def check_errors_of_the_server(address, lm):
    body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 3}
    with pytest.raises(UserError, match="lacks 'grid'"):  # the server's own words
        lm.server.complete([{**body, "vllm_xargs": {"midi": "{}"}}])
    with pytest.raises(UserError, match="no token ids"):
        lm.server.complete([body])
    with pytest.raises(UserError, match="max_model_len"):
        ServerMidiLM(address, lm.processor, model="other")
    other = TextMidiProcessor(lm.processor.tokenizer, WITH_CONTROLS, lm.processor.offset)
    with pytest.raises(UserError, match="out-of-vocab"):  # the model has no such separator
        ServerMidiLM(address, other).generate("x", max_notes=3)
    [free] = lm.server.complete([{**body, "return_token_ids": True}])  # of no grammar
    with pytest.raises(UserError, match="started with --logits-processors"):
        lm._replay([3, *free], Grammar(Rules(SMALL), max_events=3))
    with pytest.raises(UserError, match="http"):
        ServerMidiLM("localhost", lm.processor)
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        ServerMidiLM(address, lm.processor, "NO_SUCH_KEY")
    with pytest.raises(UserError, match="no server listens"):
        ServerMidiLM("http://127.0.0.1:9", lm.processor)
