"""The logits processors by themselves: V1 with vLLM's batch updates, V2 with made-up states."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm_models import SMALL, WITH_CONTROLS

from midi_llm.grammar import GenerationConstraints, Grammar, Rules
from midi_llm.vllm_engine import midi_args
from tenfold_common.errors import UserError

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

OFFSET, TEXT = 11, 5
SIZE = OFFSET + WITH_CONTROLS.size + 7
INF = float("inf")


@pytest.fixture(scope="module")
def plugin():
    pytest.importorskip("vllm")
    from midi_llm import vllm_plugin

    return vllm_plugin


@pytest.fixture(scope="module")
def vllm():
    return pytest.importorskip("vllm")


def grammar_of(amt=SMALL, max_events=20, given=None, controls=None, start=0, **constraints):
    rules = Rules(amt, GenerationConstraints(**constraints))
    return Grammar(rules, max_events=max_events, given=given, controls=controls, start=start)


def params_of(vllm, make=None, *, as_text=False, **changes):
    """SamplingParams of a request, bound to a grammar or not."""
    if make is None:
        return vllm.SamplingParams(max_tokens=100)
    grammar = make()
    args = midi_args(grammar, OFFSET) | changes
    return vllm.SamplingParams(
        max_tokens=100, extra_args={"midi": json.dumps(args) if as_text else args}
    )


CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(get_vocab_size=lambda: SIZE), speculative_config=None
)
MAKERS = {
    "free": grammar_of,
    "bass and drums in D": lambda: grammar_of(instruments=["bass", "drums"], key="D major"),
    "one voice": lambda: grammar_of(max_polyphony=1, end_time=6.0, pitch_range=(40, 80)),
    "sparse": lambda: grammar_of(notes_per_second=2.0, min_notes=3),
    "controls": lambda: grammar_of(
        WITH_CONTROLS, controls=np.array([[40, 3, 60], [120, 3, 64], [130, 5, 2100]])
    ),
}


class Runner1:
    """What vLLM's model runner V1 does with a processor: a batch whose rows move."""

    def __init__(self, plugin):
        from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

        self.update, self.ways = BatchUpdate, MoveDirectionality
        self.processor = plugin.MidiGrammarV1(CONFIG, torch.device("cpu"), False)
        self.rows = []  # (name, grammar or None, output)

    def add(self, name, params, grammar, output=()):
        output = list(output)
        self.rows.append((name, grammar, output))
        self._tell(added=[(len(self.rows) - 1, params, [3, 4], output)])

    def remove(self, index):
        """As vLLM does: the last row takes the place of one that is gone."""
        last = len(self.rows) - 1
        moved = [] if index == last else [(last, index, self.ways.UNIDIRECTIONAL)]
        self.rows[index] = self.rows[last]
        self.rows.pop()
        self._tell(removed=[index], moved=moved)

    def swap(self, a, b):
        self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
        self._tell(moved=[(a, b, self.ways.SWAP)])

    def step(self, rng):
        self.processor.update_state(None)
        logits = random_logits(len(self.rows), rng)
        found = self.processor.apply(logits.clone())
        for row, (_, grammar, output) in enumerate(self.rows):
            output.append(check_row(found[row], logits[row], grammar, rng))

    def _tell(self, removed=(), added=(), moved=()):
        self.processor.update_state(self.update(len(self.rows), list(removed), added, list(moved)))


class Runner2:
    """What vLLM's model runner V2 does with a processor: slots, and rows in any order."""

    def __init__(self, plugin, slots=8, length=200):
        self.states = SimpleNamespace(
            prompt_len=SimpleNamespace(np=np.zeros(slots, np.int32)),
            all_token_ids=SimpleNamespace(gpu=torch.full((slots, length), -7, dtype=torch.int32)),
        )
        self.processor = plugin.MidiGrammarV2(CONFIG, self.states)
        self.total = {}
        self.grammars = {}

    def add(self, slot, params, grammar, output=(), prompt=(3, 4, 9)):
        self.states.prompt_len.np[slot] = len(prompt)
        ids = torch.tensor([*prompt, *output])
        self.states.all_token_ids.gpu[slot, : len(ids)] = ids
        self.total[slot], self.grammars[slot] = len(ids), grammar
        bound = self.processor.add_request(slot, params)
        assert bound == (grammar is not None)

    def remove(self, slot):
        del self.total[slot], self.grammars[slot]

    def context(self, slots, positions):
        ids = self.states.all_token_ids.gpu
        last = [int(ids[slot, at]) for slot, at in zip(slots, positions, strict=True)]
        return SimpleNamespace(
            expanded_idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping_np=np.array(slots),
            expanded_local_pos=torch.zeros(len(slots), dtype=torch.int32),
            input_ids=torch.tensor(last, dtype=torch.int32),
            pos=torch.tensor(positions, dtype=torch.int64),
        )

    def step(self, rng):
        slots = rng.permutation(list(self.total)).tolist()
        logits = random_logits(len(slots), rng)
        ctx = self.context(slots, [self.total[slot] - 1 for slot in slots])
        found = self.processor.apply(logits.clone(), ctx)
        for row, slot in enumerate(slots):
            token = check_row(found[row], logits[row], self.grammars[slot], rng)
            self.states.all_token_ids.gpu[slot, self.total[slot]] = token
            self.total[slot] += 1


def random_logits(rows, rng):
    return torch.from_numpy(rng.normal(size=(rows, SIZE)).astype(np.float32))


def check_row(found, before, grammar, rng):
    """What is left of a row must be what the grammar allows; returns a draw, and pushes it."""
    if grammar is None:
        assert torch.equal(found, before)
        return int(found.argmax())
    amt = grammar.rules.config
    wanted = grammar.allowed().ids() if not grammar.finished else np.array([amt.separator])
    left = torch.isfinite(found).nonzero().ravel().numpy()
    np.testing.assert_array_equal(left, wanted + OFFSET)
    assert torch.equal(found[left], before[left])
    # The end is improbable, so that sequences become long.
    choices = left[left != OFFSET + amt.separator] if rng.random() < 0.97 else left
    token = int(rng.choice(choices if len(choices) else left))
    if not grammar.finished:
        grammar.push(token - OFFSET)
    return token


@pytest.mark.parametrize("as_text", [False, True])
def test_v1_leaves_what_the_grammar_allows_while_rows_move(plugin, vllm, as_text):
    rng = np.random.default_rng(0)
    runner = Runner1(plugin)
    for name, make in MAKERS.items():
        runner.add(name, params_of(vllm, make, as_text=as_text), make())
    runner.add("text", params_of(vllm), None)
    for step in range(45):
        runner.step(rng)
        if step == 10:
            runner.swap(0, 5)
        if step == 20:
            runner.remove(1)
        if step == 25:
            runner.add("late", params_of(vllm, MAKERS["one voice"]), MAKERS["one voice"]())
    assert [name for name, _, _ in runner.rows] == [
        "text", "free", "one voice", "sparse", "controls", "late"
    ]  # fmt: skip
    assert not runner.processor.is_argmax_invariant()


def test_v1_takes_up_a_request_that_was_interrupted(plugin, vllm):
    rng = np.random.default_rng(1)
    runner = Runner1(plugin)
    make = MAKERS["controls"]
    runner.add("a", params_of(vllm, make), make())
    for _ in range(8):
        runner.step(rng)
    _, _, output = runner.rows[0]
    runner.remove(0)
    grammar = make()
    for token in output:
        grammar.push(token - OFFSET)
    runner.add("b", params_of(vllm, make), grammar, output)
    for _ in range(8):
        runner.step(rng)


def test_v1_waits_for_ids_that_are_not_known_yet_and_follows_ids_taken_back(plugin, vllm):
    runner = Runner1(plugin)
    runner.add("a", params_of(vllm, grammar_of), None)
    output = runner.rows[0][2]
    processor = runner.processor

    def left():
        found = processor.apply(torch.zeros(1, SIZE))
        return torch.isfinite(found[0]).nonzero().ravel().tolist()

    onset = left()
    output.append(-1)
    assert left() == onset
    output[-1] = OFFSET + 3
    duration = left()
    assert duration == [OFFSET + i for i in range(400, 480)]  # a rest, or a note
    output.pop()
    assert left() == onset


def test_v2_leaves_what_the_grammar_allows_in_any_order(plugin, vllm):
    rng = np.random.default_rng(2)
    runner = Runner2(plugin)
    for slot, make in enumerate(MAKERS.values()):
        runner.add(slot, params_of(vllm, make, as_text=slot % 2 == 0), make())
    runner.add(6, params_of(vllm), None)
    for step in range(40):
        runner.step(rng)
        if step == 12:
            runner.remove(0)
            runner.add(0, params_of(vllm), None)  # the slot of another: no grammar now
        if step == 20:
            runner.remove(6)
            make = MAKERS["one voice"]
            runner.add(6, params_of(vllm, make), make(), prompt=(1, 2, 3, 4, 5, 6))


def test_v2_takes_up_a_request_that_was_interrupted(plugin, vllm):
    rng = np.random.default_rng(3)
    runner = Runner2(plugin)
    make = MAKERS["controls"]
    runner.add(2, params_of(vllm, make), make())
    for _ in range(11):
        runner.step(rng)
    output = runner.states.all_token_ids.gpu[2, 3 : runner.total[2]].tolist()
    grammar = runner.grammars[2]
    runner.remove(2)
    runner.add(5, params_of(vllm, make), grammar, output)
    for _ in range(10):
        runner.step(rng)


def test_v2_leaves_parts_of_a_long_prompt_alone(plugin, vllm):
    runner = Runner2(plugin)
    runner.add(1, params_of(vllm, grammar_of), grammar_of(), prompt=range(3, 20))
    logits = torch.zeros(1, SIZE)
    assert torch.equal(
        runner.processor.apply(logits.clone(), runner.context([1], [9])), torch.zeros(1, SIZE)
    )
    found = runner.processor.apply(logits.clone(), runner.context([1], [16]))
    assert torch.isfinite(found[0]).sum() == 400


def test_v2_refuses_speculative_decoding(plugin):
    config = SimpleNamespace(model_config=CONFIG.model_config, speculative_config=object())
    with pytest.raises(UserError, match="speculative"):
        plugin.MidiGrammarV2(config, None)


def test_names_follow_the_runner_and_are_not_registered(plugin):
    from importlib.metadata import entry_points

    for version in (1, 2):
        name = plugin.processor_name(SimpleNamespace(use_v2_model_runner=version == 2))
        assert name == f"midi_llm.vllm_plugin:MidiGrammarV{version}"
    assert not [e for e in entry_points(group="vllm.logits_processors") if "midi" in e.value]


def test_vllm_loads_each_class_for_its_runner_only(plugin):
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
    from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

    one, two = (f"midi_llm.vllm_plugin:MidiGrammarV{i}" for i in (1, 2))
    assert _load_logitsprocs_by_fqcns([one]) == [plugin.MidiGrammarV1]
    assert _load_v2_logitsprocs_by_fqcns([two]) == [plugin.MidiGrammarV2]
    for load, name in ((_load_logitsprocs_by_fqcns, two), (_load_v2_logitsprocs_by_fqcns, one)):
        with pytest.raises(ValueError, match="subclass"):
            load([name])


def test_nan_leaves_the_sign_and_then_the_end(plugin, vllm):
    runner = Runner1(plugin)
    for name in ("a", "b"):
        runner.add(name, params_of(vllm, grammar_of), grammar_of())
    logits = torch.zeros(2, SIZE)
    logits[0, OFFSET + 5] = float("nan")
    logits[1, 2] = float("nan")  # of a text's id: without effect
    found = runner.processor.apply(logits)
    assert found[0].argmax() == 0
    assert torch.softmax(found[0], 0)[0] == 1
    assert not found.isnan().any()
    assert torch.isfinite(found[1]).sum() == 400
    runner.rows[0][2].append(0)
    found = runner.processor.apply(torch.zeros(2, SIZE))
    assert torch.isfinite(found[0]).nonzero().ravel().tolist() == [OFFSET + SMALL.separator]


def test_constraints_that_leave_nothing_end_the_sequence_not_the_engine(plugin, vllm):
    runner = Runner1(plugin)
    make = lambda: grammar_of(end_time=0.1, max_polyphony=1, min_notes=9)  # noqa: E731
    runner.add("a", params_of(vllm, make), make())
    output = runner.rows[0][2]
    grammar = make()
    for music in (1, 401, 480):  # till the end
        output.append(OFFSET + music)
        grammar.push(music)
    with pytest.raises(UserError, match="min_notes"):
        grammar.allowed()
    found = runner.processor.apply(torch.zeros(1, SIZE))
    assert torch.isfinite(found[0]).nonzero().ravel().tolist() == [OFFSET + SMALL.separator]


def test_numbers_beyond_floats_end_the_sequence_not_the_engine(plugin, vllm):
    runner = Runner1(plugin)
    make = lambda: grammar_of(notes_per_second=1e-308)  # noqa: E731
    runner.add("a", params_of(vllm, make), None)
    runner.rows[0][2][:] = [OFFSET + music for music in (1, 401, 480)]
    found = runner.processor.apply(torch.zeros(1, SIZE))
    assert torch.isfinite(found[0]).nonzero().ravel().tolist() == [OFFSET + SMALL.separator]


def test_a_model_without_the_ids_gives_the_sign(plugin, vllm):
    runner = Runner1(plugin)
    make = MAKERS["free"]
    runner.add("a", params_of(vllm, make, offset=SIZE), None)
    found = runner.processor.apply(torch.zeros(1, SIZE))
    assert torch.isfinite(found[0]).nonzero().ravel().tolist() == [0]


GRID = SMALL.to_dict()


@pytest.mark.parametrize(
    ("midi", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([1], "object"),
        ({"grid": GRID, "offset": 3}, "lacks 'max_events'"),
        ({"grid": GRID, "offset": 3, "max_events": 3, "contraints": {}}, "Did you mean"),
        ({"grid": GRID, "offset": 0, "max_events": 3}, "offset"),
        ({"grid": GRID, "offset": 3, "max_events": True}, "max_events"),
        ({"grid": {"pitch": 3}, "offset": 3, "max_events": 3}, "no field 'pitch'"),
        ({"grid": 7, "offset": 3, "max_events": 3}, "does not fit"),
        ({"grid": GRID, "offset": 3, "max_events": 3, "constraints": {"key": "H"}}, "key"),
        (
            {"grid": GRID, "offset": 3, "max_events": 3, "constraints": {"end_time": "x"}},
            "end_time",
        ),
        (
            {"grid": GRID, "offset": 3, "max_events": 3, "constraints": {"pitch_range": [9, 1]}},
            "pitch_range",
        ),
        ({"grid": GRID, "offset": 3, "max_events": 3, "given": [[0, 1]]}, "three whole numbers"),
        ({"grid": GRID, "offset": 3, "max_events": 3, "given": [[0, -1, 1]]}, "outside"),
        ({"grid": GRID, "offset": 3, "max_events": 3, "controls": [[0, 1, 1]]}, "no controls"),
        (
            {"grid": GRID, "offset": 3, "max_events": 3, "given": [[5, 1, 1], [4, 1, 1]]},
            "must rise",
        ),
    ],
)
def test_wrong_requests_are_refused_before_they_run(plugin, vllm, midi, message):
    params = vllm.SamplingParams(extra_args={"midi": midi})
    for kind in (plugin.MidiGrammarV1, plugin.MidiGrammarV2):
        with pytest.raises(UserError, match=message):
            kind.validate_params(params)


def test_right_requests_and_others_pass(plugin, vllm):
    for make in (*MAKERS.values(), None):
        plugin.MidiGrammarV1.validate_params(params_of(vllm, make))
    plugin.MidiGrammarV1.validate_params(vllm.SamplingParams(extra_args={"other": 1}))


def test_given_and_controls_come_out_of_the_grammar(plugin, vllm):
    amt = WITH_CONTROLS
    given = np.array([[0, 5, 60], [70, 5, 64]])
    controls = np.array([[90, 5, 60], [160, 5, 62], [300, 2, 2050]])
    make = lambda: grammar_of(amt, given=given, controls=controls, start=80)  # noqa: E731
    args = midi_args(make(), OFFSET)
    assert args["given"] == given.tolist()
    assert args["controls"] == controls.tolist()
    assert args["start"] == 80
    made, _ = plugin.read_request(vllm.SamplingParams(extra_args={"midi": args}))
    first, second = made(), make()
    rng = np.random.default_rng(0)
    while not second.finished:
        wanted = second.allowed().ids()
        np.testing.assert_array_equal(first.allowed().ids(), wanted)
        id = int(rng.choice(wanted))
        first.push(id)
        second.push(id)
    assert first.events == second.events
