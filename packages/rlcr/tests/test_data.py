import json
import logging
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcr import data, prompts
from rlcr.files import numbered_rows
from tenfold_common.errors import UserError

COLUMNS = {"prompt", "problem", "answer", "source", "verifier", "id"}


def hotpot_row(row_id="r0", gold=(2, 5), paragraphs=10, **changes):
    titles = [f"Title {i}" for i in range(paragraphs)]
    row = {
        "id": row_id,
        "question": "Which river is longer?",
        "answer": "The Blue",
        "context": {
            "title": titles,
            "sentences": [[f"First of {i}.", f" Second of {i}."] for i in range(paragraphs)],
        },
        "supporting_facts": {
            "title": [titles[i] for i in gold if i < paragraphs for _ in range(2)],
            "sent_id": [s for _ in gold for s in range(2)],
        },
    }
    return {**row, **changes}


def as_published(row):
    context, facts = row["context"], row["supporting_facts"]
    return {
        "_id": row["id"],
        "question": row["question"],
        "answer": row["answer"],
        "context": [list(p) for p in zip(context["title"], context["sentences"], strict=True)],
        "supporting_facts": [list(f) for f in zip(facts["title"], facts["sent_id"], strict=True)],
    }


def shown_titles(problem):
    return [line for line in problem.splitlines() if line.startswith("Title ")]


# --- HotpotQA-Modified


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**63),
    row_id=st.text(min_size=1).filter(str.strip),
    gold=st.lists(st.integers(0, 9), min_size=2, max_size=2, unique=True),
    published=st.booleans(),
    vanilla=st.booleans(),
)
def test_eight_paragraphs_are_left_and_two_minus_u_of_them_gold(
    seed, row_id, gold, published, vanilla
):
    row = hotpot_row(row_id, gold)
    given_row = as_published(row) if published else row
    [built] = data.build_hotpot_modified([given_row], seed=seed, vanilla=vanilla)
    kept = shown_titles(built["problem"])
    gold_titles = {f"Title {i}" for i in gold}
    u = built["gold_removed"]
    assert u in ((0,) if vanilla else (0, 1, 2))
    assert len(kept) == 8
    assert len(gold_titles & set(kept)) == 2 - u
    assert kept == sorted(kept)  # in the order they had
    assert sorted(kept + built["removed_titles"]) == row["context"]["title"]
    assert built["removed_titles"] == sorted(built["removed_titles"])


def test_hotpot_row_as_a_whole():
    dataset = data.build_hotpot_modified([hotpot_row()], seed=0, vanilla=True, long=True)
    assert set(dataset.column_names) == COLUMNS | {"gold_removed", "removed_titles"}
    row = dataset[0]
    first = shown_titles(row["problem"])[0]
    number = first.removeprefix("Title ")
    assert row["problem"].startswith(
        f"Paragraphs:\n\n{first}\nFirst of {number}. Second of {number}.\n\n"
    )
    assert row["problem"].endswith("\n\nQuestion: Which river is longer?")
    assert row["answer"] == "The Blue"
    assert (row["source"], row["verifier"], row["id"]) == ("hotpot", "exact_match", "r0")
    assert row["prompt"] == prompts.build_messages(row["problem"], long=True, kind="exact_match")


def test_both_layouts_give_the_same_rows():
    rows = [hotpot_row(f"r{i}") for i in range(20)]
    hub = data.build_hotpot_modified(rows, seed=3)
    published = data.build_hotpot_modified(map(as_published, rows), seed=3)
    assert hub.to_list() == published.to_list()


def test_a_datasets_dataset_is_accepted():
    from datasets import Dataset

    rows = [hotpot_row(f"r{i}") for i in range(3)]
    built = data.build_hotpot_modified(Dataset.from_list(rows), seed=3)
    assert built.to_list() == data.build_hotpot_modified(rows, seed=3).to_list()


def test_draws_depend_on_seed_and_id_and_not_on_the_order():
    rows = [hotpot_row(f"r{i}") for i in range(60)]

    def drawn(rows, seed):
        built = data.build_hotpot_modified(rows, seed=seed)
        return {r["id"]: (r["gold_removed"], tuple(r["removed_titles"])) for r in built}

    assert drawn(rows, 1) == drawn(rows[::-1], 1)
    assert drawn(rows[20:40], 1).items() <= drawn(rows, 1).items()
    changed = sum(drawn(rows, 1)[k] != drawn(rows, 2)[k] for k in drawn(rows, 1))
    assert changed > 40


def test_u_is_uniform_and_so_is_what_is_removed():
    built = data.build_hotpot_modified([hotpot_row(f"r{i}") for i in range(3000)], seed=0)
    counts = Counter(built["gold_removed"])
    assert set(counts) == {0, 1, 2}
    # Standard deviation of each count: sqrt(3000 * 1/3 * 2/3) = 25.8; four of them.
    assert all(abs(counts[u] - 1000) < 104 for u in range(3))
    single = Counter(t for r in built if r["gold_removed"] == 1 for t in r["removed_titles"])
    n = counts[1]
    for title in ("Title 2", "Title 5"):  # each gold paragraph half the time
        assert abs(single[title] - n / 2) < 4 * (n / 4) ** 0.5
    for i in (0, 1, 3, 4, 6, 7, 8, 9):  # each distractor one time in eight
        assert abs(single[f"Title {i}"] - n / 8) < 4 * (n * 7 / 64) ** 0.5


def test_rows_that_do_not_fit_are_skipped_and_counted(caplog):
    repeated = hotpot_row("repeated")
    repeated["context"]["title"][0] = "Title 9"
    rows = [
        hotpot_row("good"),
        hotpot_row("one gold", gold=(4,)),
        hotpot_row("three gold", gold=(1, 2, 3)),
        hotpot_row("short", paragraphs=9),
        hotpot_row("two", paragraphs=6),
        hotpot_row("no answer", answer=None),
        hotpot_row("absent", supporting_facts={"title": ["Title 1", "X"], "sent_id": [0, 0]}),
        repeated,
        hotpot_row("long", question="x" * 6000),
    ]
    skipped = Counter({"no answer": 5})
    with caplog.at_level(logging.WARNING):
        built = data.build_hotpot_modified(rows, seed=0, skipped=skipped)
    assert built["id"][:] == ["good"]
    assert skipped == {
        "not two supporting titles": 2,
        "not ten paragraphs": 2,
        "no answer": 6,
        "a supporting title is not in the context": 1,
        "a title repeats": 1,
        "problem of 6000 characters or more": 1,
    }
    assert "hotpot: 1 rows kept" in caplog.text
    assert "2 for: not ten paragraphs" in caplog.text


def test_max_chars_is_exclusive():
    [row] = data.build_hotpot_modified([hotpot_row()], seed=0)
    size = len(row["problem"])
    assert len(data.build_hotpot_modified([hotpot_row()], seed=0, max_chars=size + 1)) == 1
    with pytest.raises(UserError, match=f"1 for: problem of {size} characters"):
        data.build_hotpot_modified([hotpot_row()], seed=0, max_chars=size)


def test_limit_counts_the_rows_kept():
    rows = [hotpot_row("bad", paragraphs=3), *(hotpot_row(f"r{i}") for i in range(5))]
    built = data.build_hotpot_modified(rows, seed=0, limit=2)
    assert built["id"][:] == ["r0", "r1"]


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([hotpot_row(), hotpot_row()], {}, ["'r0'", "repeats"]),
        ([hotpot_row(paragraphs=4)], {}, ["no row is left", "not ten paragraphs"]),
        ([], {}, ["no row is left"]),
        ([hotpot_row(context=["a", "b"])], {}, ["row 1 (r0)", "context must be"]),
        ([hotpot_row(context=[["a", "text"]])], {}, ["context must be"]),
        ([hotpot_row(context=None)], {}, ["context must be"]),
        ([hotpot_row(supporting_facts=[1])], {}, ["supporting_facts must be"]),
        ([{"id": "x"}], {}, ["'question'", "available: id"]),
        ([hotpot_row()], {"seed": -1}, ["seed", "-1"]),
        ([hotpot_row()], {"seed": True}, ["seed"]),
        ([hotpot_row()], {"limit": 0}, ["limit", "0"]),
        ([hotpot_row()], {"max_chars": 1.5}, ["max_chars", "1.5"]),
        ([hotpot_row()], {"format": "abc"}, ["'abc'", "tabc"]),
    ],
)
def test_hotpot_errors_say_what_is_wrong(rows, settings, words):
    with pytest.raises(UserError) as error:
        data.build_hotpot_modified(rows, **{"seed": 0, **settings})
    assert all(word in str(error.value) for word in words)


def test_plain_prompts_are_one_str():
    [row] = data.build_hotpot_modified([hotpot_row()], seed=0, plain=True, format="tac")
    assert row["prompt"] == prompts.plain_prompt(row["problem"], format="tac", kind="exact_match")


# --- Big-Math-digits


def bigmath_row(i, answer="42", rate=0.5):
    return {"problem": f"Problem {i}?", "answer": answer, "llama8b_solve_rate": rate}


def test_bigmath_filters():
    answers = ["42", "-3.5", "1e3", " .5 ", "7."]
    good = [bigmath_row(i, a) for i, a in enumerate(answers)]
    bad = [bigmath_row(f"bad {a}", a) for a in ("nan", "inf", "1_000", "٣", r"\text{4}", "1/2")]
    bad += [bigmath_row("overflow", "1e999"), bigmath_row("1,000", "1,000")]
    long = [bigmath_row("long", "1" * 20), bigmath_row("not long", "1" * 19)]
    rates = [bigmath_row(f"rate {r}", rate=r) for r in (0.0, 0.75, 1, None)]
    rest = [bigmath_row("none", None), {**bigmath_row(0), "problem": " "}]
    skipped = Counter()
    built = data.build_bigmath_digits(
        good + bad + long + rates + rest, train=4, test=2, skipped=skipped
    )
    kept = built["train"]["answer"][:] + built["test"]["answer"][:]
    assert sorted(kept) == sorted([a.strip() for a in answers] + ["1" * 19])
    assert skipped == {
        "answer is not a number": 8,
        "answer of 20 characters or more": 1,
        "solve rate outside (0, 0.75)": 4,
        "no answer": 1,
        "no problem text": 1,
    }
    assert set(built["train"].column_names) == COLUMNS | {"solve_rate"}
    assert set(built["train"]["verifier"]) == {"math"}


def test_bigmath_split_is_seeded_and_disjoint():
    rows = [bigmath_row(i) for i in range(50)]

    def ids(seed):
        built = data.build_bigmath_digits(rows, seed=seed, train=30, test=10)
        return built["train"]["id"][:], built["test"]["id"][:]

    train, test = ids(42)
    assert (len(train), len(test)) == (30, 10)
    assert not set(train) & set(test)
    assert ids(42) == (train, test)
    assert ids(43) != (train, test)
    assert train != sorted(train)


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([bigmath_row(0), bigmath_row(1, "x")], {}, ["30000", "1 rows pass", "not a number"]),
        ([bigmath_row(0)], {"train": 0}, ["train", "0"]),
        ([bigmath_row(0, rate="0.5")], {}, ["row 1", "llama8b_solve_rate", "'0.5'"]),
        ([{"problem": "p", "answer": "1"}], {}, ["'llama8b_solve_rate'", "available"]),
    ],
)
def test_bigmath_errors(rows, settings, words):
    with pytest.raises(UserError) as error:
        data.build_bigmath_digits(rows, **settings)
    assert all(word in str(error.value) for word in words)


# --- SFT warm-up


def warmup_row(demo="<analysis> sure of each step </analysis>\n<confidence> 0.9 </confidence>"):
    output = "<think> 2 + 2 is 4 </think>\n<answer> 4 </answer>\n"
    return {"problem": "2 + 2?", "output_0": output, "demo": demo}


def test_warmup_completions_are_well_formed():
    from rlcr.parsing import parse_completion

    dataset = data.build_sft_warmup([warmup_row()])
    assert set(dataset.column_names) == {"prompt", "completion"}
    [message] = dataset[0]["completion"]
    assert message["role"] == "assistant"
    assert message["content"] == (
        "<think> 2 + 2 is 4 </think>\n<answer> 4 </answer>\n"
        "<analysis> sure of each step </analysis>\n<confidence> 0.9 </confidence>"
    )
    parsed = parse_completion(message["content"])
    assert (parsed.ok, parsed.answer, parsed.confidence) == (True, "4", 0.9)
    assert dataset[0]["prompt"] == prompts.build_messages("2 + 2?")
    [plain] = data.build_sft_warmup([warmup_row()], plain=True)
    assert plain["completion"] == f" {message['content']}"
    assert plain["prompt"] == prompts.plain_prompt("2 + 2?")


def test_malformed_warmup_rows_are_dropped_with_a_reason(caplog):
    rows = [
        warmup_row(),
        warmup_row("<analysis> fine </analysis>"),
        warmup_row("<analysis> fine </analysis> <confidence> high </confidence>"),
        warmup_row("<analysis> fine </analysis> <confidence> 1.2 </confidence>"),
        warmup_row("<analysis> fine </analysis> <confidence> 1.2 </confidence>"),
    ]
    skipped = Counter()
    dataset = data.build_sft_warmup(rows, skipped=skipped)
    assert len(dataset) == 1
    assert skipped == {"missing_confidence": 1, "not_a_number": 1, "out_of_range": 2}
    assert "2 for: out_of_range" in caplog.text
    with pytest.raises(UserError, match="1 for: missing_confidence"):
        data.build_sft_warmup(rows[1:2])
    with pytest.raises(UserError, match="row 1: column 'demo' must be non-empty text, got None"):
        data.build_sft_warmup([warmup_row(None)])


# --- benchmarks


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


GSM8K = [
    {"question": "Six boxes of 700?", "answer": "6 * 700 = <<6*700=4200>>4200\n#### 4,200"},
    {"question": "Two less than nothing?", "answer": "0 - 2 = -2\n#### -2"},
]


def test_gsm8k(tmp_path):
    dataset = data.read_benchmark("gsm8k", write_lines(tmp_path / "t.jsonl", GSM8K))
    assert dataset["answer"][:] == ["4200", "-2"]
    assert dataset["id"][:] == ["gsm8k-0", "gsm8k-1"]
    assert set(dataset["verifier"]) == {"math"}
    assert set(dataset.column_names) == COLUMNS
    assert dataset[0]["prompt"][1]["content"] == prompts.user_prompt("Six boxes of 700?")
    assert len(data.read_benchmark("gsm8k", tmp_path / "t.jsonl", limit=1)) == 1
    other = data.read_benchmark("gsm8k", tmp_path / "t.jsonl", verifier="exact_match")
    assert set(other["verifier"]) == {"exact_match"}


def test_the_verifiers_that_datasets_name_exist():
    from rlcr.verify import Judge, get_verifier

    for name in ("exact_match", "math", "choice"):
        assert get_verifier(name).name == name
    assert Judge.name == "judge"


@pytest.mark.realdata
def test_real_gsm8k(data_folder):
    dataset = data.read_benchmark("gsm8k", data_folder / "gsm8k" / "test.jsonl")
    assert len(dataset) == 1319
    assert dataset["answer"][:3] == ["18", "3", "70000"]
    assert all(float(answer) == int(answer) for answer in dataset["answer"])


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    from datasets import Dataset

    file = tmp_path / f"t.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(GSM8K, indent=1))
    elif suffix == "jsonl":
        write_lines(file, GSM8K)
    elif suffix == "csv":
        Dataset.from_list(GSM8K).to_csv(file)
    else:
        Dataset.from_list(GSM8K).to_parquet(file)
    assert data.read_benchmark("gsm8k", file)["answer"][:] == ["4200", "-2"]


def trivia_row(i, aliases):
    answer = {"value": "Rome", "aliases": aliases, "normalized_aliases": []}
    return {"question": f"Capital {i}?", "question_id": f"tq_{i}", "answer": answer}


def test_triviaqa(tmp_path):
    rows = [trivia_row(i, ["Roma", "Rome"]) for i in range(40)]
    rows += [trivia_row("many", list("abcdef")), trivia_row("five", list("abcde"))]
    file = write_lines(tmp_path / "t.jsonl", rows)
    dataset = data.read_benchmark("triviaqa", file)
    assert len(dataset) == 41
    ids = dataset["id"][:]
    assert "tq_many" not in ids
    assert ids != [f"tq_{i}" for i in range(40)] + ["tq_five"]
    golds = dict(zip(ids, dataset["answer"], strict=True))
    assert golds["tq_0"] == ["Rome", "Roma"]
    assert golds["tq_five"] == ["Rome", *"abcde"]
    assert data.read_benchmark("triviaqa", file)["id"][:] == ids
    assert data.read_benchmark("triviaqa", file, seed=1)["id"][:] != ids
    assert data.read_benchmark("triviaqa", file, limit=7)["id"][:] == ids[:7]


def test_simpleqa_and_math500(tmp_path):
    row = {"metadata": "{}", "problem": "Who, and when?", "answer": "Ada, 1843"}
    file = tmp_path / "t.csv"
    file.write_text('metadata,problem,answer\n{},"Who, and when?","Ada, 1843"\n')
    [simple] = data.read_benchmark("simpleqa", file)
    assert (simple["problem"], simple["answer"]) == ("Who, and when?", "Ada, 1843")
    assert simple["verifier"] == "judge"
    lines = write_lines(tmp_path / "m.jsonl", [{**row, "unique_id": "test/x/1.json"}])
    [math] = data.read_benchmark("math500", lines)
    assert (math["id"], math["verifier"]) == ("test/x/1.json", "math")


def csqa_row(**changes):
    row = {
        "id": "q1",
        "question": "Where do fish live?",
        "choices": {"label": list("ABC"), "text": ["sky", "water", "fire"]},
        "answerKey": "B",
    }
    return {**row, **changes}


def test_commonsenseqa(tmp_path):
    [row] = data.read_benchmark("commonsenseqa", write_lines(tmp_path / "t.jsonl", [csqa_row()]))
    assert row["problem"] == "Where do fish live?\n\nA. sky\nB. water\nC. fire"
    assert (row["answer"], row["verifier"]) == ("B", "choice")
    assert row["choices"] == ["sky", "water", "fire"]
    assert "letter" in row["prompt"][1]["content"]


def gpqa_row(i):
    wrong = {f"Incorrect Answer {k}": f"wrong {k}\n" for k in (1, 2, 3)}
    return {
        "Question": f"Question {i}?",
        "Correct Answer": " right ",
        "Record ID": f"g{i}",
        **wrong,
    }


def test_gpqa_options_are_shuffled_and_the_letter_follows(tmp_path):
    file = write_lines(tmp_path / "t.jsonl", [gpqa_row(i) for i in range(400)])
    dataset = data.read_benchmark("gpqa", file)
    letters = Counter(dataset["answer"])
    assert all(abs(letters[x] - 100) < 4 * (400 * 3 / 16) ** 0.5 for x in "ABCD")
    for row in dataset:
        assert row["choices"]["ABCD".index(row["answer"])] == "right"
        assert sorted(row["choices"]) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert f"\n{row['answer']}. right" in row["problem"]
    reversed_file = write_lines(tmp_path / "r.jsonl", [gpqa_row(i) for i in reversed(range(400))])
    again = {r["id"]: r["choices"] for r in data.read_benchmark("gpqa", reversed_file)}
    assert again == {r["id"]: r["choices"] for r in dataset}


def test_hotpot_as_a_benchmark(tmp_path):
    file = tmp_path / "dev.json"
    file.write_text(json.dumps([as_published(hotpot_row(f"r{i}")) for i in range(30)]))
    vanilla = data.read_benchmark("hotpot", file)
    assert set(vanilla["gold_removed"]) == {0}
    assert set(vanilla["source"]) == {"hotpot"}
    modified = data.read_benchmark("hotpot_modified", file, seed=3, limit=20)
    assert set(modified["source"]) == {"hotpot_modified"}
    assert len(modified) == 20
    built = data.build_hotpot_modified(map(hotpot_row, map("r{}".format, range(20))), seed=3)
    assert modified["gold_removed"][:] == built["gold_removed"][:]


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("gsm8k", {"question": "q", "answer": "12"}, ["line 1", "####"]),
        ("gsm8k", {"question": "q", "answer": "so ####  "}, ["line 1", "####"]),
        ("gsm8k", {"question": "q"}, ["line 1", "'answer'", "available: question"]),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, ["'question'", "non-empty"]),
        ("triviaqa", trivia_row(0, "Rome") | {"answer": "Rome"}, ["'answer'", "aliases"]),
        ("triviaqa", trivia_row(0, [1]), ["'aliases'", "[1]"]),
        ("commonsenseqa", csqa_row(answerKey=""), ["''", "['A', 'B', 'C']", "validation split"]),
        ("commonsenseqa", csqa_row(choices=["sky"]), ["'choices'"]),
        ("gpqa", {"Question": "q"}, ["'Correct Answer'"]),
        ("hotpot", {"_id": "h", "question": "q"}, ["line 1", "'answer'"]),
    ],
)
def test_benchmark_rows_that_do_not_fit_are_named(tmp_path, name, row, words):
    file = write_lines(tmp_path / "t.jsonl", [row])
    with pytest.raises(UserError) as error:
        data.read_benchmark(name, file)
    assert all(word in str(error.value) for word in [*words, str(file)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "gsm8"}, ["'gsm8'", "Did you mean 'gsm8k'?"]),
        ({"name": "gsm8k", "path": "x.jsonl", "split": "test"}, ["'test'", "leave it out"]),
        ({"name": "gsm8k", "verifier": "maths"}, ["'maths'", "Did you mean 'math'?"]),
        ({"name": "gsm8k", "path": "x.jsonl", "limit": -1}, ["limit", "-1"]),
        ({"name": "gsm8k", "path": "x.jsonl"}, ["x.jsonl", "no such file"]),
    ],
)
def test_benchmark_arguments(arguments, words):
    with pytest.raises(UserError) as error:
        data.read_benchmark(**arguments)
    assert all(word in str(error.value) for word in words)


def test_without_the_hub_one_line_says_to_give_a_file():
    with pytest.raises(UserError) as error:
        data.read_benchmark("gsm8k")
    message = str(error.value)
    assert "openai/gsm8k" in message
    assert "give a file" in message
    assert "\n" not in message


def test_hub_rows_are_read_with_the_right_names(monkeypatch):
    import datasets

    def load_dataset(hub, config, *, split):
        assert (hub, config, split) == ("openai/gsm8k", "main", "train")
        return datasets.Dataset.from_list(GSM8K)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.read_benchmark("gsm8k", split="train")["answer"][:] == ["4200", "-2"]


# --- files


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", ["no rows"]),
        ("a.jsonl", b"\n \n", ["no rows"]),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', ["line 2", "broken JSON"]),
        ("a.jsonl", b'{"a": 1}\n[1]\n', ["line 2", "not a JSON object"]),
        ("a.jsonl", b'{"a": 1}\n\n\xff\xfe\x00\n', ["line 3", "UTF-8"]),
        ("a.jsonl", b"[" * 100_000, ["line 1"]),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ["line 1"]),
        ("a.json", b'[{"a": 1},\n{"a": }]', ["line 2", "broken JSON"]),
        ("a.json", b'[{"a": 1}, 3]', ["item 2", "3"]),
        ("a.json", b'[{"a": 1},\n"\xff"]', ["line 2", "UTF-8"]),
        ("a.json", b"[]", ["no rows"]),
        ("a.csv", b"", ["no rows"]),
        ("a.csv", b"a,b\n", ["no rows"]),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", ["line 3", "3 values under 2"]),
        ("a.csv", b"a,a\n1,2\n", ["repeats"]),
        ("a.csv", b'a,b\n1,"2\n', ["line 2", "broken CSV"]),
        ("a.csv", b"a,b\n1,\xff\n", ["UTF-8"]),
        ("a.parquet", b"not parquet", ["parquet"]),
        ("a.txt", b"x", [".jsonl", "'.txt'"]),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        numbered_rows(file)
    assert all(word in str(error.value) for word in [*words, str(file)])


def test_a_folder_is_not_a_file(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        numbered_rows(tmp_path / "a.csv")


def test_line_separators_inside_strings_and_byte_order_marks(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"a": "x\u2028y"}\r\n\n{"a": "é"}'.encode())
    assert numbered_rows(file) == [("line 1", {"a": "x\u2028y"}), ("line 3", {"a": "é"})]


# --- checks before a run


def test_check_columns():
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list([{"prompt": "p", "answer": "a"}])
    data.check_columns(dataset, ["prompt", "answer"])
    with pytest.raises(UserError) as error:
        data.check_columns(dataset, ["prompt", "answers", "id"])
    message = str(error.value)
    assert "columns 'answers', 'id'" in message
    assert "available: prompt, answer" in message
    assert "Did you mean 'answer'?" in message
    with pytest.raises(UserError, match="train"):
        data.check_columns(DatasetDict(train=dataset), ["prompt"])
    streamed = dataset.to_iterable_dataset().map(lambda row: row)
    data.check_columns(streamed, ["prompt"])
    with pytest.raises(UserError, match="'gold'"):
        data.check_columns(streamed, ["gold"])


def test_drop_long_drops_and_counts(caplog):
    from datasets import Dataset

    from tenfold_common.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    texts = ["a" * 5, "b" * 9, "c" * 6]
    extra = len(tokenizer("a" * 5)["input_ids"]) - 5
    dataset = Dataset.from_list([{"prompt": t, "id": str(i)} for i, t in enumerate(texts)])
    kept = data.drop_long(dataset, tokenizer, 6 + extra)
    assert kept["id"][:] == ["0", "2"]
    assert "dropped 1 of 3 rows" in caplog.text
    assert len(data.drop_long(dataset, tokenizer, 9 + extra)) == 3
    with pytest.raises(UserError, match=f"the shortest has {5 + extra}"):
        data.drop_long(dataset, tokenizer, 4 + extra)
    with pytest.raises(UserError, match="'prompt'"):
        data.drop_long(dataset.remove_columns("prompt"), tokenizer, 4)


def test_drop_long_counts_what_the_chat_template_adds():
    from datasets import Dataset

    from tenfold_common.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    chat = [{"role": "user", "content": "abc"}]
    dataset = Dataset.from_list([{"prompt": chat}])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="plain=True"):
        data.drop_long(dataset, tokenizer, 100)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
        "{% if add_generation_prompt %}!!{% endif %}"
    )
    assert len(data.drop_long(dataset, tokenizer, 7)) == 1  # < a b c > ! !
    with pytest.raises(UserError, match="the shortest has 7"):
        data.drop_long(dataset, tokenizer, 6)
