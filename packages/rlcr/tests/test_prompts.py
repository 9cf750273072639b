import pytest

from rlcr import prompts
from tenfold_common.errors import UserError

FORMATS = ("tabc", "tbac", "tac", "ta")


def test_system_prompts_have_the_five_names():
    assert set(prompts.SYSTEM_PROMPTS) == {"tabc", "tabc_long", "tbac", "tac", "ta"}
    assert len(set(prompts.SYSTEM_PROMPTS.values())) == 5


@pytest.mark.parametrize("name", sorted(prompts.SYSTEM_PROMPTS))
def test_the_template_at_the_end_is_a_well_formed_reply(name):
    from rlcr.parsing import parse_completion

    template = prompts.SYSTEM_PROMPTS[name].splitlines()[-1]
    reply = template.replace("a number from 0 to 1", "0.5")
    parsed = parse_completion(reply, format=name.removesuffix("_long"), mode="strict")
    assert parsed.ok, parsed.detail
    assert parsed.answer == "your final answer"
    assert parsed.confidence == (None if name == "ta" else 0.5)


def test_the_order_of_the_blocks_follows_the_format():
    def order(name):
        template = prompts.SYSTEM_PROMPTS[name].splitlines()[-1]
        return [t for t in template.replace(">", "<").split("<") if t.isalpha()]

    assert order("tabc") == ["think", "answer", "analysis", "confidence"]
    assert order("tbac") == ["think", "analysis", "answer", "confidence"]
    assert order("tac") == ["think", "answer", "confidence"]
    assert order("ta") == ["think", "answer"]


def test_rlvr_does_not_ask_for_confidence():
    assert "confidence" not in prompts.SYSTEM_PROMPTS["ta"]
    assert "analysis" not in prompts.SYSTEM_PROMPTS["tac"]


def test_the_long_prompt_adds_rules_to_the_short_one():
    short, long = prompts.SYSTEM_PROMPTS["tabc"], prompts.SYSTEM_PROMPTS["tabc_long"]
    assert [line for line in short.splitlines() if line not in long.splitlines()] == []
    assert sum(line.startswith("- ") for line in long.splitlines()) == 6


def test_user_prompt_puts_the_problem_between_blank_lines():
    assert prompts.user_prompt(" What is 2 + 2? ") == "PROBLEM:\n\nWhat is 2 + 2?\n"
    exact = prompts.user_prompt("Who?", "exact_match")
    assert exact.startswith("PROBLEM:\n\nWho?\n\n")
    assert "bare answer" in exact
    assert "letter" in prompts.user_prompt("Which?", "choice")


def test_messages_and_plain_prompt_hold_the_same_texts():
    messages = prompts.build_messages("Why?", format="tabc", long=True, kind="exact_match")
    assert [m["role"] for m in messages] == ["system", "user"]
    assert messages[0]["content"] == prompts.SYSTEM_PROMPTS["tabc_long"]
    plain = prompts.plain_prompt("Why?", format="tabc", long=True, kind="exact_match")
    assert all(m["content"] in plain for m in messages)
    assert plain.endswith("\nAssistant:")
    assert prompts.plain_prompt("Why?", open_think=True).endswith("\nAssistant: <think>")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: prompts.build_messages("p", format="tabcd"), ["'tabcd'", "tbac", "Did you mean"]),
        (lambda: prompts.build_messages("p", format="ta", long=True), ["'ta'", "'tabc'"]),
        (lambda: prompts.user_prompt("p", "exact-match"), ["'exact-match'", "exact_match"]),
        (lambda: prompts.user_prompt("  "), ["non-empty"]),
        (lambda: prompts.user_prompt(3), ["3"]),
        (lambda: prompts.teacher_messages("p", ""), ["solution"]),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in words)


def test_teacher_sees_problem_and_solution_and_must_not_solve():
    system, user = prompts.teacher_messages("2 + 2?", "It is 5.")
    assert "300" in system["content"]
    assert "<analysis>" in system["content"]
    assert "<confidence>" in system["content"]
    assert "2 + 2?" in user["content"]
    assert user["content"].endswith("It is 5.\n")


@pytest.mark.parametrize(
    ("completion", "start"),
    [
        ("<think> it may be 4", "<think> it may be 4\n</think>\n\nMy thinking"),
        ("it may be 4 </think>\n", "it may be 4 </think>\n\nMy thinking"),
        ("<think>see <answer> later</think>", "<think>see <answer> later</think>\n\nMy thinking"),
        ("<think>t</think> <answer>4", "<think>t</think> <answer>4 </answer>\n\nMy thinking"),
        ("", "</think>\n\nMy thinking"),
    ],
)
def test_forced_answer_closes_what_is_open(completion, start):
    prefix = prompts.forced_answer(completion)
    assert prefix.startswith(start)
    assert prefix.endswith("<answer>")


def test_a_forced_answer_can_be_parsed_and_followed_by_a_forced_confidence():
    from rlcr.parsing import parse_completion

    answered = prompts.forced_answer("<think> cut off") + "42</answer>"
    assert parse_completion(answered, format="ta", mode="lenient").answer == "42"
    prefix = prompts.forced_confidence(answered)
    assert prefix.startswith(answered)
    assert not prefix.endswith(" ")  # a trailing space would be a token of its own
    assert "0 to 100" in prefix


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (" 42 </answer> and so on", "42"),
        ("\n 42 \nBecause", "42"),
        ("</answer>", None),
        (" ", None),
    ],
)
def test_read_forced_answer(reply, answer):
    assert prompts.read_forced_answer(reply) == answer


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        (" 90.", 0.9),
        ("90%", 0.9),
        ("1", 0.01),
        ("100", 1.0),
        ("0", 0.0),
        ("about 72.5 percent", 0.725),
        ("0.0", 0.0),
        ("0.8", None),
        ("1.0", None),
        ("120", None),
        ("-3", None),
        ("high", None),
        ("<answer> 99 </answer> 80", None),
        ("80 <answer> 99 </answer>", 0.8),
        ("٣", None),
        ("", None),
        ("1 in 2", None),
        ("8 of 10", None),
        ("8 out of ten", None),
        ("8/10", None),
        ("1:3", None),
        ("3 to 1", None),
        ("1,000", None),
        ("1e2", None),
        ("very high: 9", None),
        ("about 5", None),
        ("about 5%", 0.05),
        ("very high: 90", 0.9),
        (" **9** because I guessed", 0.09),
        ("85/100", 0.85),
        ("85 out of 100.", 0.85),
        ("85/1000", None),
        ("90percent", 0.9),
        ("90: I checked 2 steps", 0.9),
    ],
)
def test_read_forced_confidence_uses_the_scale_that_was_asked_for(reply, value):
    assert prompts.read_forced_confidence(reply) == (
        None if value is None else pytest.approx(value)
    )


def test_prompt_hash_changes_with_every_setting_and_wording(monkeypatch):
    settings = [{"format": f} for f in FORMATS]
    settings += [{"long": True}, {"kind": "exact_match"}, {"plain": True}]
    hashes = {prompts.prompt_hash(**s) for s in settings}
    assert len(hashes) == len(settings)
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)
    assert prompts.prompt_hash() == prompts.prompt_hash(format="tabc")
    before = prompts.prompt_hash()
    monkeypatch.setitem(prompts.SYSTEM_PROMPTS, "tabc", "another wording")
    assert prompts.prompt_hash() != before


def test_a_reply_that_has_begun_goes_on():
    assert prompts.begun("2+2=", "<answer>") == "2+2=<answer>"
    chat = [{"role": "user", "content": "2+2"}]
    begun = prompts.begun(chat, "<answer>")
    assert begun == [*chat, {"role": "assistant", "content": "<answer>"}]
    assert prompts.begun(begun, "4")[-1]["content"] == "<answer>4"
    assert chat == [{"role": "user", "content": "2+2"}]
