import json
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from tenfold_common.errors import UserError
from tenfold_common.lm import Prompt, ScriptedModel, TransformersModel
from tenfold_common.tiny import byte_tokenizer, tiny_llama
from wavelength_rsa.data import Item
from wavelength_rsa.listeners import (
    Listener,
    LogprobListener,
    Question,
    SamplingListener,
    TableListener,
)
from wavelength_rsa.prompts import WavelengthPrompts
from wavelength_rsa.scales import Distribution, Scale, grid, project
from wavelength_rsa.toy import ToyPrompts, World

SPEED, HEAT = Scale("Slow", "Fast"), Scale("Hot", "Cold")
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def last_line_number(text: str) -> int:
    return int(text.partition("<answer>")[2].partition("</answer>")[0])


def tiny(chat: bool, **options: object) -> TransformersModel:
    tokenizer = byte_tokenizer()
    if chat:
        tokenizer.chat_template = CHATML
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "max_position_embeddings": 4096}
    model = tiny_llama(len(tokenizer), **sizes, initializer_range=0.2)  # so that context matters
    return TransformersModel(model, tokenizer, **options)


class AnyText(WavelengthPrompts):
    """Short prompts whose replies can always be read: by what bytes they hold."""

    answer_stop = clue_stop = ()

    def listener(self, scale: Scale, clue: str, *, step: int | None = 5, cot: bool = False) -> str:
        return f"{scale} {clue}:"

    def speaker(self, scale: Scale, target: float, *, cot: bool = False) -> str:
        return f"{scale} {target:g}:"

    def read_answer(self, text: str, *, cot: bool = False) -> float | None:
        return sum(text.encode()) % 101

    def read_clue(self, text: str, *, cot: bool = False) -> str | None:
        return f"clue {sum(text.encode()) % 7}"


# --------------------------------------------------------------------------------------------------
# What all listeners do


class Counting(Listener):
    """Hears the length of a clue; remembers what it was asked."""

    def __init__(self, step: int = 50, fault: Callable | None = None) -> None:
        self.name, self.step = "counting", step
        self.asked: list[list[Question]] = []
        self.fault = fault

    def describe(self) -> dict:
        return {"class": "Counting"}

    def _listen(self, questions: list[Question], seed: int) -> np.ndarray:
        self.asked.append(list(questions))
        rows = np.eye(len(grid(self.step)))[[len(clue) % 3 for _, clue in questions]]
        return self.fault(rows) if self.fault else rows


def test_equal_questions_are_asked_once_and_answered_in_order() -> None:
    listener = Counting()
    questions = [
        (SPEED, "a"),
        (HEAT, "a"),
        (SPEED, "bb"),
        (SPEED, " a "),
        (SPEED, "A"),
        (HEAT, "a"),
    ]
    probs = listener.listen(questions)
    assert listener.asked == [[(SPEED, "a"), (HEAT, "a"), (SPEED, "bb"), (SPEED, "A")]]
    assert probs.argmax(1).tolist() == [1, 1, 2, 1, 1, 1]
    assert probs.shape == (6, 3)
    assert probs.dtype == np.float64


def test_no_question_needs_no_answer() -> None:
    listener = Counting(step=5)
    assert listener.listen([]).shape == (0, 21)
    assert listener.asked == []


def test_one_clue_gives_one_distribution_and_several_give_a_list() -> None:
    one = Counting().distribution(SPEED, "bb")
    assert isinstance(one, Distribution)
    assert one.mean == 100
    both = Counting().distribution(SPEED, ["bb", "a"])
    assert [d.mean for d in both] == [100, 50]
    assert Counting().distribution(SPEED, []) == []


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ((SPEED, "  "), "the clue on Slow .. Fast is blank"),
        ((SPEED, None), "a question is a pair"),
        ((SPEED,), "a question is a pair"),
        (("Slow", "Fast", "x"), "a question is a pair"),
        ((("Slow", "Fast"), "x"), "a question is a pair"),
        ("ab", "a question is a pair"),
    ],
)
def test_what_is_no_question_is_refused(question: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Counting().listen([question])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda rows: rows * 2, "does not sum to 1"),
        (lambda rows: rows * np.nan, "NaN"),
        (lambda rows: rows[:, :2], "positions"),
    ],
)
def test_a_subclass_that_answers_with_no_distribution_is_found_out(
    fault: Callable, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Counting(fault=fault).listen([(SPEED, "a")])


# --------------------------------------------------------------------------------------------------
# Tables


def test_a_table_answers_what_it_holds() -> None:
    table = {("Slow", "Fast", "snail"): [0.5, 0.5, 0], ("Hot", "Cold", "snail"): [0, 0, 1]}
    listener = TableListener(table, step=50)
    probs = listener.listen([(HEAT, "snail"), (SPEED, " snail ")])
    assert probs.tolist() == [[0, 0, 1], [0.5, 0.5, 0]]


def test_unknown_clues_raise_or_tell_nothing() -> None:
    table = {("Slow", "Fast", "snail"): [0.5, 0.5, 0]}
    with pytest.raises(UserError, match=r"'snial' on Slow .. Fast.*Did you mean 'snail'"):
        TableListener(table, step=50).listen([(SPEED, "snial")])
    with pytest.raises(UserError, match="knows 0 clues there"):
        TableListener(table, step=50).listen([(HEAT, "snail")])
    uniform = TableListener(table, step=50, default="uniform").listen([(HEAT, "snail")])
    assert uniform.tolist() == [[1 / 3] * 3]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.5, 0.5], "has the shape"),
        ([0.5, 0.6, 0], "does not sum to 1"),
        ([-0.5, 1.5, 0], "negative"),
        ([math.nan, 1, 0], "NaN"),
    ],
)
def test_a_table_takes_only_distributions(row: list[float], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s)'snail' on Slow .. Fast.*{message}"):
        TableListener({("Slow", "Fast", "snail"): row}, step=50)
    with pytest.raises(UserError, match="default must be"):
        TableListener({}, default="none")  # type: ignore[arg-type]


def test_people_are_a_listener() -> None:
    items = [
        Item(SPEED, "snail", 10, responses=(0, 50, 50, 100)),
        Item(SPEED, "snail", 10, responses=(100, 100, 100, 100)),
        Item(HEAT, "tea", 20, responses=(25, 25, 25, 25)),
    ]
    people = TableListener.from_items(items, step=50)
    probs = people.listen([(SPEED, "snail"), (HEAT, "tea")])
    assert probs.tolist() == [[1 / 8, 2 / 8, 5 / 8], [0.5, 0.5, 0]]  # pooled; split
    first = TableListener.from_items(items, 50, responses=slice(2))
    assert first.listen([(SPEED, "snail")]).tolist() == [[1 / 4, 1 / 4, 2 / 4]]
    smooth = TableListener.from_items(items[2:], 50, smoothing=1.0)
    np.testing.assert_allclose(smooth.listen([(HEAT, "tea")]), [[3 / 7, 3 / 7, 1 / 7]])
    with pytest.raises(UserError, match=r"'tea'.* has no responses"):
        TableListener.from_items([Item(HEAT, "tea", 20)])
    with pytest.raises(UserError, match="has no responses"):
        TableListener.from_items(items, responses=slice(10, 20))


def test_a_table_is_described_by_what_it_holds() -> None:
    table = {("Slow", "Fast", "snail"): [0.5, 0.5, 0]}
    described = TableListener(table, step=50).describe()
    assert described["clues"] == 1
    assert described == TableListener(table, step=50).describe()
    other = TableListener({("Slow", "Fast", "snail"): [0.5, 0, 0.5]}, step=50).describe()
    assert other["hash"] != described["hash"]
    json.dumps(described)


# --------------------------------------------------------------------------------------------------
# Log-probabilities


def clue_of(prefix: Prompt) -> str:
    text = prefix if isinstance(prefix, str) else prefix[-1]["content"]
    return text.rpartition("Clue:")[2].split("\n")[0].strip()


def prompts_of(call: dict) -> list[Prompt]:
    return call["prompts"]


def by_distance(prefix: Prompt, continuation: str) -> float:
    """A made-up log-probability: falls with the distance from 10 times the clue's length."""
    where = 10 * len(clue_of(prefix))
    return -abs(last_line_number(continuation) - where) / 20 - 0.1 * len(continuation)


def test_probabilities_are_the_softmax_over_the_answers() -> None:
    model = ScriptedModel(score=by_distance)
    listener = LogprobListener(model, step=25)
    probs = listener.listen([(SPEED, "abc"), (HEAT, "a" * 8), (SPEED, "abc")])
    for row, length in zip(probs, (3, 8, 3), strict=True):
        score = [-abs(t - 10 * length) / 20 - 0.1 * len(f"<answer>{t}</answer>") for t in
                 (0, 25, 50, 75, 100)]  # fmt: skip
        weight = [math.exp(s) for s in score]
        np.testing.assert_allclose(row, [w / sum(weight) for w in weight], rtol=1e-12)
    scored = [call for call in model.calls if call["method"].startswith("score")]
    assert len(scored) == 2  # the third question is the first
    assert scored[0]["continuations"] == [f"<answer>{t}</answer>" for t in (0, 25, 50, 75, 100)]
    assert scored[0]["prefix"] == WavelengthPrompts().listener(SPEED, "abc", step=25)


def test_all_questions_are_scored_in_one_call() -> None:
    model = ScriptedModel(score=by_distance)
    calls = []
    whole = model.score_many

    def counted(prefixes: list, continuations: list) -> list:
        calls.append(len(prefixes))
        return whole(prefixes, continuations)

    model.score_many = counted
    LogprobListener(model).listen([(SPEED, "abc"), (HEAT, "a"), (SPEED, "b")])
    assert calls == [3]
    LogprobListener(model, normalize="pmi").listen([(SPEED, "abc"), (HEAT, "a"), (SPEED, "b")])
    assert calls == [3, 5]  # and once per scale without a clue


def softmax(scores: list[float]) -> np.ndarray:
    weights = np.exp(np.array(scores) - max(scores))
    return weights / weights.sum()


def per_word(prefix: Prompt, continuation: str) -> list[float]:
    """Several tokens for answers above 20, so that normalisation matters."""
    bias = 0.5 if clue_of(prefix) else 0.2
    position = last_line_number(continuation)
    return [-bias - position / 70] * len(continuation.split())


class Spelt(WavelengthPrompts):
    """Answers of unequal numbers of words and characters."""

    def answer(self, position: int) -> str:
        return f"<answer>{position}</answer>" + " w" * (position // 25)


@pytest.mark.parametrize("normalize", ["none", "token", "char", "pmi"])
def test_scores_are_normalised_as_asked(normalize: str) -> None:
    listener = LogprobListener(ScriptedModel(score=per_word), Spelt(), step=25, normalize=normalize)
    expected = []
    for t in (0, 25, 50, 75, 100):
        words, characters = 1 + t // 25, len(f"<answer>{t}</answer>") + 2 * (t // 25)
        total = -words * (0.5 + t / 70)
        blank = -words * (0.2 + t / 70)
        expected.append(
            {
                "none": total,
                "token": total / words,
                "char": total / characters,
                "pmi": total - blank,
            }[normalize]
        )
    np.testing.assert_allclose(listener.listen([(SPEED, "abc")])[0], softmax(expected), rtol=1e-12)


def test_pmi_takes_away_what_the_answers_have_without_this_scales_clue() -> None:
    def score(prefix: Prompt, continuation: str) -> float:
        cold = "Cold" in prefix[-1]["content"].rpartition("100:")[2]
        bias = (3.0 if cold else -2.0) * (last_line_number(continuation) == 50)
        return bias + by_distance([{"role": "user", "content": "Clue: ab"}], continuation) * bool(
            clue_of(prefix)
        )

    probs = LogprobListener(ScriptedModel(score=score), step=50, normalize="pmi").listen(
        [(SPEED, "ab"), (HEAT, "ab")]
    )
    np.testing.assert_allclose(probs[0], probs[1], rtol=1e-12)
    plain = LogprobListener(ScriptedModel(score=score), step=50).listen(
        [(SPEED, "ab"), (HEAT, "ab")]
    )
    assert plain[1][1] > plain[0][1] + 0.3


def test_temperature_flattens() -> None:
    model = ScriptedModel(score=by_distance)
    cold, warm = (
        LogprobListener(model, step=25, temperature=t).listen([(SPEED, "abc")])[0] for t in (1, 3)
    )
    np.testing.assert_allclose(warm, cold ** (1 / 3) / (cold ** (1 / 3)).sum(), rtol=1e-12)


def test_impossible_answers_have_probability_0() -> None:
    def score(prefix: Prompt, continuation: str) -> float:
        return -math.inf if last_line_number(continuation) < 100 else -5.0

    for normalize in ("none", "pmi"):
        listener = LogprobListener(ScriptedModel(score=score), step=50, normalize=normalize)
        assert listener.listen([(SPEED, "abc")]).tolist() == [[0, 0, 1]]
    nothing = ScriptedModel(score=lambda prefix, text: -math.inf)
    with pytest.raises(UserError, match=r"no answer about 'abc' on Slow .. Fast a finite"):
        LogprobListener(nothing).listen([(SPEED, "abc")])


def test_small_differences_of_large_scores_count() -> None:
    model = ScriptedModel(score=lambda prefix, text: -5000.0 - last_line_number(text) / 100)
    probs = LogprobListener(model, step=50).listen([(SPEED, "abc")])[0]
    np.testing.assert_allclose(probs, softmax([0, -0.5, -1]), rtol=1e-9)


def test_the_end_is_scored_with_every_answer() -> None:
    model = ScriptedModel(score=by_distance)
    LogprobListener(model, step=50, end="<|end|>").listen([(SPEED, "abc")])
    assert model.calls[0]["continuations"] == [f"<answer>{t}</answer><|end|>" for t in (0, 50, 100)]


def test_the_end_of_the_turn_comes_from_the_chat_template() -> None:
    assert LogprobListener(tiny(chat=True), end="turn").end == "<|end|>\n"
    assert LogprobListener(tiny(chat=True)).end == ""
    for model in (tiny(chat=False), ScriptedModel()):
        with pytest.raises(UserError, match="end='turn' needs the chat template"):
            LogprobListener(model, end="turn")
    silent = tiny(chat=True)
    silent.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="puts nothing after a reply"):
        LogprobListener(silent, end="turn")


@pytest.mark.parametrize(
    ("chat", "end"), [(True, None), (True, "turn"), (False, None)], ids=["chat", "turn", "plain"]
)
def test_probabilities_are_those_of_full_forwards_by_hand(chat: bool, end: str | None) -> None:
    import torch

    model = tiny(chat)
    questions = [(SPEED, "bicycle"), (HEAT, "tea with ice")]
    listener = LogprobListener(model, step=20, end=end)
    probs = listener.listen(questions)
    for row, (scale, clue) in zip(probs, questions, strict=True):
        prompt = WavelengthPrompts(style="chat" if chat else "plain").listener(scale, clue, step=20)
        if not isinstance(prompt, str):
            prompt = model.tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True
            )
        begin = model.tokenizer(prompt, add_special_tokens=False).input_ids
        scores = []
        for t in (0, 20, 40, 60, 80, 100):
            answer = f"<answer>{t}</answer>" + ("<|end|>\n" if end else "")
            ids = begin + model.tokenizer(answer, add_special_tokens=False).input_ids
            with torch.no_grad():
                logs = model.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(begin), len(ids))))
        np.testing.assert_allclose(np.log(row), np.log(softmax(scores)), atol=1e-4)
    assert np.abs(probs[0] - probs[1]).max() > 1e-6


def test_scores_do_not_depend_on_the_other_questions() -> None:
    listener = LogprobListener(tiny(chat=True), step=50)
    alone = listener.listen([(HEAT, "tea with ice")])[0]
    among = listener.listen([(SPEED, "bicycle"), (HEAT, "tea with ice"), (HEAT, "sun")])[1]
    np.testing.assert_allclose(alone, among, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "tokens"}, "normalize must be one of .* Did you mean 'token'"),
        ({"temperature": 0}, "temperature must be a number above 0, not 0"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"step": 3}, "step must be one of"),
    ],
)
def test_bad_settings_of_a_logprob_listener_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LogprobListener(ScriptedModel(), **options)


def test_a_logprob_listener_describes_what_decides() -> None:
    described = LogprobListener(ScriptedModel(name="m"), step=10, normalize="pmi").describe()
    assert described == {
        "class": "LogprobListener",
        "model": "m",
        "prompts": WavelengthPrompts().hash,
        "step": 10,
        "normalize": "pmi",
        "temperature": 1.0,
        "end": "",
    }
    json.dumps(described)


# --------------------------------------------------------------------------------------------------
# Samples


def test_samples_are_counted_on_the_grid() -> None:
    replies = {"snail": ["0", "<answer>10</answer>", "around 40"], "jet": ["100", "99", "75"]}
    model = ScriptedModel(lambda prompt, seed, j: replies[clue_of(prompt)][j])
    listener = SamplingListener(model, step=25, num_samples=3, smoothing=0.0)
    probs = listener.listen([(SPEED, "snail"), (SPEED, "jet"), (SPEED, "snail")], seed=5)
    expected = np.stack([project([0, 10, 40], 25), project([100, 99, 75], 25)]) / 3
    np.testing.assert_allclose(probs, expected[[0, 1, 0]], rtol=1e-12)
    np.testing.assert_allclose(probs @ grid(25), [50 / 3, 274 / 3, 50 / 3], rtol=1e-12)
    [call] = model.calls  # all questions in one
    assert call["n"] == 3
    assert call["seed"] == 5
    assert call["temperature"] == 1.0
    assert call["max_tokens"] == 24
    assert call["stop"] == ("</answer>",)
    assert call["prompts"][0] == WavelengthPrompts().listener(SPEED, "snail", step=None)
    assert len(call["prompts"]) == 2
    assert listener.last_stats == {
        "questions": 2, "drawn": 6, "used": 6, "unusable": 0, "cut_off": 0, "rounds": 1,
        "incomplete": 0,
    }  # fmt: skip


def test_smoothing_defaults_to_half_a_sample_in_all() -> None:
    model = ScriptedModel(lambda prompt, seed, j: "50")
    probs = SamplingListener(model, step=50, num_samples=2).listen([(SPEED, "x")])[0]
    np.testing.assert_allclose(probs, [0.5 / 3 / 2.5, (2 + 0.5 / 3) / 2.5, 0.5 / 3 / 2.5])


def test_reasoning_is_not_stopped_and_has_more_room() -> None:
    model = ScriptedModel(lambda prompt, seed, j: "first 10, no: <answer>80</answer>")
    listener = SamplingListener(model, cot=True, num_samples=2, smoothing=0, step=20)
    assert listener.listen([(SPEED, "jet")]).tolist() == [[0, 0, 0, 0, 1, 0]]
    [call] = model.calls
    assert call["stop"] == ()
    assert call["max_tokens"] == 1024
    assert call["prompts"] == [WavelengthPrompts().listener(SPEED, "jet", step=None, cot=True)]


def test_unreadable_samples_are_drawn_again_with_other_seeds() -> None:
    def reply(prompt: Prompt, seed: int, j: int) -> str:
        if clue_of(prompt) == "jet":
            return "100"
        if seed == 7:
            return ["0", "what?", "120", "60-70"][j]
        return "25" if len(seeds) > 1 else "hm"

    model = ScriptedModel(reply)
    seeds: list[int] = []
    whole = model.sample

    def recorded(prompts: list, **options: object) -> list:
        seeds.append(options["seed"])
        return whole(prompts, **options)

    model.sample = recorded
    listener = SamplingListener(model, step=25, num_samples=4, smoothing=0)
    probs = listener.listen([(SPEED, "snail"), (SPEED, "jet")], seed=7)
    assert probs.tolist() == [[1 / 4, 3 / 4, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert len(seeds) == len(set(seeds)) == 2
    assert all(0 <= seed < 2**32 for seed in seeds)
    first, second = model.calls
    assert (first["n"], len(first["prompts"])) == (4, 2)
    assert (second["n"], [clue_of(p) for p in prompts_of(second)]) == (3, ["snail"])  # what lacks
    assert listener.last_stats == {
        "questions": 2, "drawn": 11, "used": 8, "unusable": 3, "cut_off": 0, "rounds": 2,
        "incomplete": 0,
    }  # fmt: skip


def test_every_question_gets_the_samples_it_lacks_and_no_more() -> None:
    def reply(prompt: Prompt, seed: int, j: int) -> str:
        if seed:
            return "100"
        return "0" if j < (1 if clue_of(prompt) == "snail" else 3) else "no"

    listener = SamplingListener(ScriptedModel(reply), step=50, num_samples=4, smoothing=0)
    probs = listener.listen([(SPEED, "snail"), (SPEED, "jet")], seed=0)
    assert probs.tolist() == [[1 / 4, 0, 3 / 4], [3 / 4, 0, 1 / 4]]
    assert listener.last_stats["used"] == 8
    assert listener.last_stats["drawn"] == 8 + 3 + 1


def test_every_round_has_its_own_seed_and_there_are_at_most_max_retries() -> None:
    model = ScriptedModel(lambda prompt, seed, j: "50" if j == 0 and seed == 3 else "no")
    listener = SamplingListener(model, step=50, num_samples=3, max_retries=4, smoothing=0)
    assert listener.listen([(SPEED, "x")], seed=3).tolist() == [[0, 1, 0]]
    seeds = [call["seed"] for call in model.calls]
    assert len(seeds) == len(set(seeds)) == 5
    assert listener.last_stats["incomplete"] == 1
    assert listener.last_stats["used"] == 1
    assert listener.last_stats["drawn"] == 3 + 4 * 2
    assert listener.last_stats["rounds"] == 5


def test_retries_differ_between_seeds() -> None:
    def seeds(seed: int) -> list[object]:
        model = ScriptedModel(lambda prompt, s, j: "50" if s == seed and j == 0 else "no")
        SamplingListener(model, num_samples=2, max_retries=3).listen([(SPEED, "x")], seed=seed)
        return [call["seed"] for call in model.calls]

    assert seeds(1) == seeds(1)
    assert not set(seeds(1)) & set(seeds(2))


def test_no_readable_sample_at_all_is_an_error_that_shows_them() -> None:
    model = ScriptedModel(lambda prompt, seed, j: f"I pass {'abcdef'[j]}")
    listener = SamplingListener(model, num_samples=6, max_retries=2)
    with pytest.raises(UserError) as caught:
        listener.listen([(SPEED, "bicycle")])
    message = str(caught.value)
    assert "none of 18 replies about the clue 'bicycle' on Slow .. Fast" in message
    assert all(f"I pass {letter}" in message for letter in "abc")
    assert "I pass d" not in message
    assert listener.last_stats["unusable"] == 18


def test_at_temperature_0_asking_again_is_no_use() -> None:
    model = ScriptedModel(lambda prompt, seed, j: "no")
    with pytest.raises(UserError, match="none of 4 replies"):
        SamplingListener(model, num_samples=4, temperature=0).listen([(SPEED, "x")])
    assert len(model.calls) == 1


def test_a_reply_cut_off_may_be_half_a_number() -> None:
    model = ScriptedModel(lambda prompt, seed, j: "<answer> 4 5" if seed == 0 else "45")
    listener = SamplingListener(model, num_samples=1, max_tokens=2, step=5, smoothing=0)
    assert listener.distribution(SPEED, "x").mean == 45
    assert listener.last_stats["cut_off"] == 1
    assert listener.last_stats["unusable"] == 1


def test_out_of_range_samples_are_dropped_not_clipped() -> None:
    model = ScriptedModel(lambda prompt, seed, j: ["50", "150", "-20", "50"][j])
    listener = SamplingListener(model, num_samples=4, max_retries=0, smoothing=0, step=50)
    assert listener.listen([(SPEED, "x")]).tolist() == [[0, 1, 0]]
    assert listener.last_stats["unusable"] == 2


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_equal_seeds_give_equal_answers_and_others_do_not(chat: bool) -> None:
    listener = SamplingListener(tiny(chat), AnyText(), num_samples=6, max_tokens=4)
    questions = [(SPEED, "bicycle"), (HEAT, "tea")]
    first, again, other = (listener.listen(questions, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.05
    assert np.abs(first[0] - first[1]).max() > 0.05


def test_samples_match_the_models_own_probabilities() -> None:
    """One-token answers: softmax(score / T) is also how they are sampled at temperature T."""
    world = World.make(0, clues=2)
    model = world.train(steps=0, lines=10)
    questions = world.questions()[:2]
    exact = LogprobListener(model, ToyPrompts(), temperature=0.2).listen(questions)
    sampled = SamplingListener(
        model, ToyPrompts(), num_samples=1000, max_tokens=1, smoothing=0, temperature=0.2
    ).listen(questions, seed=3)
    near, flat = (np.abs(exact - other).sum(1).max() / 2 for other in (sampled, 1 / 21))
    assert near < 0.1
    assert flat > 0.2  # so the agreement says something


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, not 0"),
        ({"num_samples": 2.0}, "num_samples must be a whole number"),
        ({"num_samples": True}, "num_samples must be a whole number"),
        ({"max_retries": -1}, "max_retries must be a whole number of at least 0"),
        ({"smoothing": -0.1}, "smoothing must be a number of at least 0"),
        ({"temperature": -1}, "temperature must be a number of at least 0"),
        ({"temperature": "1"}, "temperature must be a number of at least 0, not '1'"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, not 0"),
        ({"step": 7}, "step must be one of"),
    ],
)
def test_bad_settings_of_a_sampling_listener_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingListener(ScriptedModel(), **options)


def test_a_sampling_listener_describes_what_decides() -> None:
    described = SamplingListener(ScriptedModel(name="m"), cot=True).describe()
    json.dumps(described)
    assert described["max_tokens"] == 1024
    assert described["smoothing"] == 0.5 / 21
    plain = SamplingListener(ScriptedModel(name="m")).describe()
    changed = [key for key in plain if plain[key] != described[key]]
    assert Counter(changed) == Counter(["cot", "max_tokens"])
