import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tenfold_common.errors import UserError
from tenfold_common.lm import ScriptedModel, TransformersModel
from tenfold_common.lm.tokens import common_length
from tenfold_common.tiny import byte_tokenizer, tiny_llama
from wavelength_rsa import play, prompts
from wavelength_rsa.prompts import WavelengthPrompts, prompts_for
from wavelength_rsa.rules import check_clue
from wavelength_rsa.scales import STEPS, Scale, fold, grid

SCALE = Scale("Slow", "Fast")
CHAT, PLAIN = WavelengthPrompts(), WavelengthPrompts(style="plain")
GAME = re.compile(r"^0: (.+)\n100: (.+)\n(?:Clue|Target): ", re.MULTILINE)


def text_of(prompt: object) -> str:
    if isinstance(prompt, str):
        return prompt
    assert isinstance(prompt, list)
    [message] = prompt
    assert message["role"] == "user"
    return message["content"]


def every_text(own: WavelengthPrompts, scale: Scale = SCALE, clue: str = "bicycle") -> list[str]:
    texts = [
        own.listener(scale, clue, step=step, cot=cot)
        for step in (None, *STEPS)
        for cot in (False, True)
    ]
    texts += [own.speaker(scale, 70, cot=cot) for cot in (False, True)]
    return [text_of(text) for text in texts]


@pytest.mark.parametrize("own", [CHAT, PLAIN], ids=["chat", "plain"])
@pytest.mark.parametrize("cot", [False, True])
def test_the_question_comes_last_so_that_the_long_beginning_is_shared(
    own: WavelengthPrompts, cot: bool
) -> None:
    first = text_of(own.listener(SCALE, "bicycle", cot=cot))
    second = text_of(own.listener(Scale("Hot", "Cold"), "tea", cot=cot))
    shared = common_length(first, second)
    assert first[shared:].startswith("Slow\n100: Fast\nClue: bicycle\n")
    assert shared > 0.8 * len(first)
    same_scale = text_of(own.listener(SCALE, "tea", cot=cot))
    assert first[common_length(first, same_scale) :].startswith("bicycle\n")
    first = text_of(own.speaker(SCALE, 70, cot=cot))
    second = text_of(own.speaker(Scale("Hot", "Cold"), 35, cot=cot))
    shared = common_length(first, second)
    assert first[shared:].startswith("Slow\n100: Fast\nTarget: 70\n")
    assert shared > 0.8 * len(first)


@pytest.mark.parametrize("step", STEPS)
def test_the_listener_is_told_the_legal_answers_and_shown_only_such(step: int) -> None:
    text = text_of(CHAT.listener(SCALE, "bicycle", step=step))
    legal = [f"{t:g}" for t in grid(step)]
    assert f"one of these positions: {', '.join(legal)}." in text
    shown = re.findall(r"<answer>([0-9]+)</answer>|^Guess: ([0-9]+)$", text, re.MULTILINE)
    assert len(shown) == 5
    assert {a or b for a, b in shown} <= set(legal)


def test_without_a_step_any_whole_number_is_asked_for() -> None:
    text = text_of(CHAT.listener(SCALE, "bicycle", step=None))
    assert "any whole number from 0 to 100" in text
    assert "these positions" not in text


def test_only_reasoning_prompts_ask_for_thought() -> None:
    for own in (CHAT, PLAIN):
        for ask in (lambda c, own=own: own.listener(SCALE, "x", cot=c),
                    lambda c, own=own: own.speaker(SCALE, 70, cot=c)):  # fmt: skip
            direct, reasoned = text_of(ask(False)), text_of(ask(True))
            assert "step by step" not in direct
            assert "step by step" in reasoned
            # Only the end differs: both kinds share the beginning.
            assert common_length(direct, reasoned) > 0.85 * len(direct)


def test_a_plain_prompt_ends_where_the_reply_begins() -> None:
    assert PLAIN.listener(SCALE, "bicycle").endswith("Clue: bicycle\nReply:\n")
    assert PLAIN.speaker(SCALE, 70).endswith("Target: 70\nReply:\n")
    assert PLAIN.listener(SCALE, "bicycle", cot=True).endswith("the answer.")  # no blank behind
    assert "Reply:\n<answer>" in PLAIN.listener(SCALE, "bicycle")  # as in the games shown
    assert "Reply:\n<clue>" in PLAIN.speaker(SCALE, 70)


def test_the_speaker_is_shown_the_target() -> None:
    assert text_of(CHAT.speaker(SCALE, 70)).count("Target: 70\n") == 1
    assert "Target: 42.5\n" in text_of(CHAT.speaker(SCALE, 42.5))
    for target in (-1, 101, float("nan")):
        with pytest.raises(UserError, match="target must be a number from 0 to 100"):
            CHAT.speaker(SCALE, target)


def test_a_blank_clue_is_an_empty_line() -> None:
    with_clue = text_of(CHAT.listener(SCALE, "bicycle"))
    assert text_of(CHAT.listener(SCALE, "")) == with_clue.replace("Clue: bicycle\n", "Clue:\n")


@pytest.mark.parametrize("nasty", ["{{ 7 * 7 }}", "<b>&amp;", "{% raw %}", "a\\nb", "Macy's"])
def test_clues_and_ends_stand_as_they_are(nasty: str) -> None:
    text = text_of(CHAT.listener(Scale(nasty, "Fast"), nasty))
    assert f"0: {nasty}\n100: Fast\nClue: {nasty}\n" in text


def test_positions_can_be_read_back() -> None:
    for own in (CHAT, PLAIN):
        for position in range(101):
            text = own.answer(position)
            [stop] = own.answer_stop
            assert own.read_answer(text) == own.read_answer(text, cot=True) == position
            assert own.read_answer(text.partition(stop)[0]) == position


def test_clues_can_be_read_back() -> None:
    [stop] = CHAT.clue_stop
    assert CHAT.read_clue(f"<clue>race car{stop}".partition(stop)[0]) == "race car"


def test_a_chat_is_read_from_its_end_and_a_base_model_from_its_beginning() -> None:
    text = "<answer>10</answer> <answer>20</answer> <clue>a</clue> <clue>b</clue>"
    assert CHAT.read_answer(text, cot=True) == 20
    assert PLAIN.read_answer(text, cot=True) == 10
    assert CHAT.read_answer(text) == PLAIN.read_answer(text) == 10
    assert CHAT.read_clue(text, cot=True) == "b"
    assert PLAIN.read_clue(text, cot=True) == "a"


def test_the_example_of_the_tags_is_itself_no_answer() -> None:
    for text in every_text(CHAT):
        for tag, read in (("answer", CHAT.read_answer), ("clue", CHAT.read_clue)):
            [*found] = re.findall(rf"<{tag}>\.\.\.</{tag}>", text)
            assert [read(example) for example in found] == [None] * len(found)


def games(text: str) -> list[Scale]:
    return [Scale(*ends) for ends in GAME.findall(text)]


def test_two_games_are_explained_and_three_shown_alike_to_both_sides() -> None:
    listener, speaker = (
        games(text_of(p)) for p in (CHAT.listener(SCALE, "x"), CHAT.speaker(SCALE, 70))
    )
    assert len(listener) == 6
    assert listener == speaker
    assert listener[-1] == SCALE
    assert len(set(listener)) == 6


def test_the_games_shown_are_not_those_played_in_the_terminal() -> None:
    assert not known_pairs(games(text_of(CHAT.listener(SCALE, "x")))) & known_pairs(play.SCALES)


@pytest.mark.realdata
def test_the_games_shown_are_not_in_the_data(data_folder: Path) -> None:
    with (data_folder / "wavelength" / "data.csv").open(encoding="utf-8-sig", newline="") as file:
        scales = [Scale(row["left"], row["right"]) for row in csv.DictReader(file)]
    data = known_pairs(scales)
    assert len(data) == 50
    for text in every_text(CHAT):
        assert not known_pairs(games(text)[:-1]) & data


def known_pairs(scales: Iterable[Scale]) -> set[frozenset[str]]:
    return {frozenset((fold(s.left), fold(s.right))) for s in scales}


def test_the_clues_shown_keep_the_rules() -> None:
    text = text_of(CHAT.listener(SCALE, "x"))
    shown = re.findall(r"^0: (.+)\n100: (.+)\nClue: (.+)$", text, re.MULTILINE)[:-1]
    assert len(shown) == 5
    for left, right, clue in shown:
        assert check_clue(clue, Scale(left, right)) == []


def test_the_hash_names_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = WavelengthPrompts().hash
    assert re.fullmatch(r"[0-9a-f]{64}", before)
    assert WavelengthPrompts().hash == before
    assert PLAIN.hash != before
    shutil.copytree(prompts._FOLDER, tmp_path / "templates")
    monkeypatch.setattr(prompts, "_FOLDER", tmp_path / "templates")
    for name in ("games", "listener", "speaker"):
        path = tmp_path / "templates" / "v1" / f"{name}.jinja"
        was = path.read_text()
        path.write_text(was.replace("lies", "is found").replace("honest", "fair"))
        prompts._templates.cache_clear()
        assert WavelengthPrompts().hash != before, name
        path.write_text(was)
    prompts._templates.cache_clear()
    assert WavelengthPrompts().hash == before
    prompts._templates.cache_clear()


def test_the_hash_is_the_same_in_every_process() -> None:
    code = "from wavelength_rsa.prompts import WavelengthPrompts as P; print(P().hash)"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == CHAT.hash


def test_prompts_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, wavelength_rsa.prompts, wavelength_rsa.listeners, wavelength_rsa.speakers;"
        "print([m for m in ('torch', 'transformers', 'scipy', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_style_follows_the_model() -> None:
    tokenizer = byte_tokenizer()
    model = TransformersModel(tiny_llama(len(tokenizer), layers=1), tokenizer)
    assert prompts_for(model).style == "plain"
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert prompts_for(model).style == "chat"
    assert prompts_for(ScriptedModel()).style == "chat"  # no tokenizer to ask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version": "v2"}, "version must be one of v1, not 'v2'"),
        ({"version": "../v1"}, "version must be one of v1"),
        (
            {"style": "plane"},
            "one of chat, plain, not 'plane'. Did you mean 'plain'?",
        ),
    ],
)
def test_unknown_prompts_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        WavelengthPrompts(**arguments)


def test_an_illegal_step_is_refused() -> None:
    with pytest.raises(UserError, match="step must be one of"):
        CHAT.listener(SCALE, "bicycle", step=3)
