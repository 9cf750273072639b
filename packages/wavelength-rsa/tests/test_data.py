import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold_common.errors import UserError
from wavelength_rsa.data import (
    Item,
    clusters,
    human_baseline,
    load_items,
    random_halves,
    save_items,
)
from wavelength_rsa.scales import Distribution, Scale, fold, grid

HOT = Scale("Cold", "Hot")
HEADER = "left,right,clue,target,response_list,response_mean\n"


def some_items(pairs=6, seed=0, responses=8):
    rng = np.random.default_rng(seed)
    items = []
    for pair in range(pairs):
        for clue in ("a", "b"):
            target = float(5 * rng.integers(21))
            guesses = np.clip(target + rng.normal(0, 15, responses), 0, 100).round()
            scale = Scale(f"low {pair}", f"high {pair}")
            items.append(Item(scale, clue, target, tuple(guesses.tolist()), f"{pair}{clue}"))
    return items


def write(tmp_path, text, name="d.csv"):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def row(**changes):
    base = {"left": "Cold", "right": "Hot", "clue": "tea", "target": 80, "responses": [70, 90]}
    return {**base, **changes}


# --- Item


def test_an_item_turns_positions_into_floats_and_counts_people():
    item = Item(HOT, "tea", np.int64(80), (70, 72), "x")
    assert (item.target, item.responses) == (80.0, (70.0, 72.0))
    assert {type(v) for v in (item.target, *item.responses)} == {float}
    np.testing.assert_allclose(item.human().probs, Distribution.from_samples([70, 72]).probs)
    smooth = item.human(step=25, smoothing=1.0)
    np.testing.assert_allclose(smooth.probs, (np.array([0, 0, 0.32, 1.68, 0]) + 1) / 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clue": " "}, "the clue is ' '; it must be a word"),
        ({"clue": None}, "the clue is None"),
        ({"clue": "HOT "}, "'HOT ' is an end of the scale Cold .. Hot"),
        ({"clue": "cold"}, "is an end of the scale"),
        ({"target": 101}, "target must be a number from 0 to 100, not 101"),
        ({"target": float("nan")}, "target must be a number from 0 to 100, not nan"),
        ({"responses": (50,)}, "at least 2 responses, or none at all"),
        ({"responses": ()}, "at least 2 responses, or none at all"),
        ({"responses": (50, 60, -1)}, "response 2 must be a number from 0 to 100, not -1"),
        ({"responses": (50, True)}, "response 1 must be a number"),
    ],
)
def test_an_item_that_does_not_fit(changes, message):
    fields = {"scale": HOT, "clue": "tea", "target": 80, "responses": None, **changes}
    with pytest.raises(UserError, match=message):
        Item(**fields)


def test_an_item_nobody_was_asked_about_has_no_histogram():
    with pytest.raises(UserError, match="item '7' has no human responses"):
        Item(HOT, "tea", 80, id="7").human()


# --- reading


def test_csv_as_the_data_set_is_written(tmp_path):
    text = HEADER + 'Cold,Hot,Macy\'s,35,"[48, 12, 30]",30\nCold,Hot,"tea, hot-ish",80,,\n'
    first, second = load_items(write(tmp_path, text))
    assert first == Item(HOT, "Macy's", 35.0, (48.0, 12.0, 30.0), "0")
    assert second == Item(HOT, "tea, hot-ish", 80.0, None, "1")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["d.csv", "d.json", "d.jsonl"])
def test_the_bytes_of_clues_are_kept(tmp_path, name, bom):
    clues = [
        "cafe\u0301",
        "café",
        " spaced ",
        "Macy's",
        "日本 🫖",
        'a "b"',
        "line\u2028sep",
        "X\nY",
    ]
    rows = [row(clue=clue, id=str(i)) for i, clue in enumerate(clues)]
    if name.endswith("csv"):
        file = write(tmp_path, b"", name)
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        data = file.read_bytes()
    elif name.endswith("jsonl"):
        data = b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows)
    else:
        data = json.dumps(rows, ensure_ascii=False).encode()
    assert [i.clue for i in load_items(write(tmp_path, bom + data, name))] == clues


def test_json_arrays_json_lines_and_both_names_of_the_list(tmp_path):
    rows = [row(), {**row(clue="ice", id=12, other=[1]), "response_list": [1, 2.5]}]
    del rows[1]["responses"]
    lines = "\n".join(json.dumps(r) for r in rows)
    expected = [
        Item(HOT, "tea", 80.0, (70.0, 90.0), "0"),
        Item(HOT, "ice", 80.0, (1.0, 2.5), "12"),
    ]
    assert load_items(write(tmp_path, json.dumps(rows), "a.json")) == expected
    assert load_items(write(tmp_path, lines + "\n\n", "b.json")) == expected
    assert load_items(write(tmp_path, lines, "c.jsonl")) == expected


def test_lists_may_be_written_as_python_but_are_never_run(tmp_path):
    text = 'left,right,clue,target,responses\nCold,Hot,tea,80,"{}"\n'
    for written in ("(1, 2,)", "[1,2,]", "1, 2", " [1, 2.0] "):
        assert load_items(write(tmp_path, text.format(written)))[0].responses == (1.0, 2.0)
    trap = tmp_path / "ran"
    attack = f"[__import__('pathlib').Path('{trap}').touch(), 2]"
    with pytest.raises(UserError, match="responses must be a list of numbers"):
        load_items(write(tmp_path, text.format(attack)))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Cold,Hot,tea,80,many,", "line 3: responses must be a list of numbers, not 'many'"),
        ("Cold,Hot,tea,80,70,", "line 3: responses must be a list of numbers, not '70'"),
        ('Cold,Hot,tea,80,"[70]",70', "line 3: there must be at least 2 responses"),
        ("Cold,Hot,tea,80,[],", "line 3: there must be at least 2 responses"),
        ("Cold,Hot,tea,80,[],50", "line 3: response_mean is 50 but"),
        ('Cold,Hot,tea,80,"[70, 101]",', "line 3: response 1 must be .* not 101"),
        ('Cold,Hot,tea,80,"[70, NaN]",', "line 3: response 1 must be .* not nan"),
        ('Cold,Hot,tea,80,"[70, null]",', "line 3: response 1 must be .* not None"),
        ('Cold,Hot,tea,80,"[70, 90]",79', "line 3: response_mean is 79 .* have the mean 80; was"),
        ('Cold,Hot,tea,80,"[70, 90]",80.000001', "line 3: response_mean is 80.000001"),
        ("Cold,Hot,tea,eighty,,", "line 3: target must be .* not 'eighty'"),
        ("Cold,Hot,tea,,,", "line 3: target must be .* not ''"),
        ("Cold,Hot,tea,nan,,", "line 3: target must be .* not 'nan'"),
        ("Cold,Hot,tea,-5,,", "line 3: target must be .* not -5"),
        ("Cold,Hot, ,80,,", "line 3: the clue is ' '"),
        ("Cold,Hot,cold,80,,", "line 3: the clue 'cold' is an end"),
        (",Hot,tea,80,,", "line 3: the left end of a scale is ''"),
        ("Cold,,tea,80,,", "line 3: the right end of a scale is ''"),
        ("Hot,hot,tea,80,,", "line 3: the ends of a scale are"),
        ("Cold,Hot,tea,80", "line 3: 4 values under 6 column names"),
        ('Cold,Hot,"tea,80,,', "broken CSV"),
    ],
)
def test_a_wrong_row_is_named_with_its_file(tmp_path, line, message):
    file = write(tmp_path, f'{HEADER}Cold,Hot,ice,5,"[1, 2]",1.5\n{line}\n')
    with pytest.raises(UserError, match=f"d.csv.*{message}"):
        load_items(file)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "d.csv", "the file has no rows"),
        (HEADER, "d.csv", "the file has no rows"),
        ("", "d.jsonl", "the file has no rows"),
        ("[]", "d.json", "the file has no rows"),
        ("left,right,clu,target\na,b,c,5\n", "d.csv", "line 2: column 'clue' is missing.*'clu'"),
        ("left,left\na,b\n", "d.csv", "a column name repeats"),
        (json.dumps(row(id="a")) + "\n" + json.dumps(row(id="a")), "d.jsonl", "line 2: id 'a' is"),
        (json.dumps([row(id=1), row(id="1")]), "d.json", "item 2: id '1' is that of item 1 too"),
        (json.dumps(row(id=" ")), "d.jsonl", "line 1: id must be a name"),
        (json.dumps(row(id=None)), "d.jsonl", "line 1: id must be a name"),
        (json.dumps(row(id=True)), "d.jsonl", "line 1: id must be a name"),
        (json.dumps(row(clue=5)), "d.jsonl", "line 1: left, right and clue must be text, not 5"),
        (json.dumps(row(responses={"a": 1})), "d.jsonl", "line 1: responses must be a list"),
        (json.dumps(row(responses=[True, 5])), "d.jsonl", "line 1: response 0 must be"),
        (json.dumps(row(response_list=[1, 2])), "d.jsonl", "line 1: give responses or resp"),
        (json.dumps(row(response_mean=[80])), "d.jsonl", "line 1: response_mean must be"),
        ("[1]", "d.json", "item 1: not a JSON object: 1"),
        ("\n5\n", "d.jsonl", "line 2: not a JSON object: 5"),
        ('{"left": ', "d.jsonl", "line 1: broken JSON"),
        ("[" * 100_000, "d.json", "broken JSON"),
        ("[" * 100_000, "d.jsonl", "line 1: broken JSON"),
        (b"\xff\xfe{}", "d.jsonl", "line 1: not UTF-8 text at byte 0"),
        (b"left,right\n\xff\xfe,b\n", "d.csv", "not UTF-8 text"),
        ("x", "d.tsv", "must end in .csv, .jsonl, .json, not '.tsv'"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, name, message):
    with pytest.raises(UserError, match=f"(?s){name}.*{message}"):
        load_items(write(tmp_path, text, name))


def test_a_file_must_be_there(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        load_items(tmp_path / "no.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        load_items(str(tmp_path / "folder.csv"))


def refusal(file):
    """Return why a file is refused, or None; anything but a UserError fails the test."""
    try:
        load_items(file)
    except UserError as error:
        return str(error)


@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)), st.booleans())
def test_no_bytes_bring_the_reader_down(tmp_path_factory, data, header):
    folder = tmp_path_factory.mktemp("fuzz")
    prefix = HEADER.encode() + b"a,b,c," if header else b""
    for name in ("d.csv", "d.json", "d.jsonl"):
        file = folder / name
        file.write_bytes(prefix + data)
        assert str(file) in (refusal(file) or str(file))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.sampled_from([*row(), "id", "response_mean", "response_list"]), json_values)
def test_no_json_value_brings_the_reader_down(tmp_path_factory, key, value):
    file = tmp_path_factory.mktemp("fuzz") / "d.jsonl"
    file.write_text(json.dumps(row(**{key: value})))
    assert f"{file}, line 1: " in (refusal(file) or f"{file}, line 1: ")


# --- writing


words = st.text(min_size=1, max_size=8).filter(str.strip)
positions = st.floats(0, 100)


@given(
    st.lists(
        st.tuples(words, positions, st.none() | st.lists(positions, min_size=2, max_size=5)),
        min_size=1,
        max_size=5,
    )
)
def test_what_is_written_is_read_back(tmp_path_factory, drawn):
    items = [
        Item(HOT, clue, target, None if responses is None else tuple(responses), f"i{n}")
        for n, (clue, target, responses) in enumerate(drawn)
        if fold(clue) not in ("cold", "hot")
    ]
    if items:
        file = tmp_path_factory.mktemp("io") / "d.jsonl"
        save_items(items, file)
        assert load_items(file) == items


def test_items_without_ids_are_numbered_when_written(tmp_path):
    file = tmp_path / "d.jsonl"
    save_items([Item(HOT, "tea", 80), Item(HOT, "ice", 5)], file)
    assert [i.id for i in load_items(file)] == ["0", "1"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "d.jsonl"
    save_items(some_items(), file)
    before = file.read_bytes()
    with pytest.raises(AttributeError):
        save_items([*some_items(), "no item"], file)  # pyright: ignore[reportArgumentType]
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(UserError, match=r"name the file \*.jsonl"):
        save_items(some_items(), tmp_path / "d.csv")


# --- clusters, halves and what people achieve


def test_items_of_one_scale_are_one_cluster():
    scales = [HOT, Scale("Slow", "Fast"), HOT, Scale("Hot", "Cold"), Scale("Cold", "Warm")]
    found = clusters([Item(s, "tea", 50) for s in scales])
    assert found.tolist() == [0, 1, 0, 2, 3]
    assert found.dtype == np.int64
    assert clusters([]).tolist() == []


def test_halves_are_a_partition_drawn_item_by_item():
    items = some_items(responses=9)
    first, second = random_halves(items, 30, seed=1)
    assert first.shape == second.shape == (30, 12, 21)
    np.testing.assert_allclose(first.sum(-1), 4)
    np.testing.assert_allclose(second.sum(-1), 5)
    whole = np.stack([9 * item.human().probs for item in items])
    np.testing.assert_allclose(first + second, np.broadcast_to(whole, first.shape), atol=1e-9)
    assert np.abs(first - first[0]).sum((1, 2))[1:].min() > 0  # every split differs
    again, _ = random_halves(items, 30, seed=1)
    np.testing.assert_array_equal(again, first)
    # The same responses in two items are not split alike: columns are no persons.
    twin = [Item(HOT, clue, 50, tuple(range(0, 100, 5))) for clue in ("tea", "soup")]
    first, _ = random_halves(twin, 5, seed=0)
    assert (np.abs(first[:, 0] - first[:, 1]).sum(-1) > 0).all()
    with pytest.raises(UserError, match="splits must be at least 1, not 0"):
        random_halves(items, 0, seed=1)


def test_every_response_is_as_often_in_the_first_half():
    item = Item(HOT, "tea", 50, (0, 25, 50, 75, 100))
    first, _ = random_halves([item], 2000, seed=0, step=25)
    np.testing.assert_allclose(first.mean((0, 1)), 0.4, atol=0.035)


def test_baseline_worked_by_hand():
    items = [
        Item(Scale("a", "b"), "x", 0, (0, 20)),
        Item(Scale("a", "b"), "y", 100, (80, 80)),
        Item(Scale("c", "d"), "z", 50, (40, 100)),
    ]
    found = human_baseline(items, resamples=50)
    assert {k: found[k] for k in ("items", "clusters", "responses", "step", "seed")} == {
        **{"items": 3, "clusters": 2, "responses": 6, "step": 5, "seed": 0}
    }
    rows = {
        name: {metric: cell["value"] for metric, cell in row.items()}
        for name, row in found["rows"].items()
    }
    close = pytest.approx
    assert rows["humans"]["mean_error"] == close((10 + 20 + 20) / 3)
    assert rows["humans"]["rmse"] == close(np.sqrt((100 + 400 + 400) / 3))
    assert rows["humans"]["expected_distance"] == close((10 + 20 + 30) / 3)
    # Squared half a jump over 20 points; 20 points; squared half a jump over 10 and over 50.
    assert rows["humans"]["crps"] == close((5 + 20 + 15) / 3)
    assert rows["humans"]["pearson"] == close(np.corrcoef([10, 80, 70], [0, 100, 50])[0, 1])
    for metric in ("mean_error", "expected_distance", "crps"):
        assert rows["single_human"][metric] == close(20)
        assert rows["always_50"][metric] == close(100 / 3)
        assert rows["leave_one_out"][metric] == close((20 + 0 + 60) / 3)
    assert rows["single_human"]["median_error"] == 20
    assert rows["single_human"]["rmse"] == close(np.sqrt((200 + 400 + 1300) / 3))
    assert rows["single_human"]["pearson"] == close(
        np.corrcoef([0, 20, 80, 80, 40, 100], [0, 0, 100, 100, 50, 50])[0, 1]
    )
    assert rows["leave_one_out"]["pearson"] == close(
        np.corrcoef([0, 20, 80, 80, 40, 100], [20, 0, 80, 80, 100, 40])[0, 1]
    )
    assert rows["uniform"]["mean_error"] == close(100 / 3)
    assert rows["uniform"]["expected_distance"] == close((50 + 50 + 550 / 21) / 3)
    assert rows["random_guess"]["mean_error"] == close((50 + 50 + 550 / 21) / 3)
    # A half is one person: as good as a single human, and the halves differ by 20, 0 and 60.
    assert rows["half"]["expected_distance"] == close(20, abs=4)
    assert rows["half"]["crps"] == close(rows["half"]["expected_distance"])
    assert rows["half"]["other_half_w1"] == close(80 / 3)
    assert {"pearson"} & {*rows["always_50"], *rows["uniform"], *rows["random_guess"]} == set()


def test_baseline_is_json_and_repeats():
    items = some_items()
    found = human_baseline(items, resamples=50, seed=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert human_baseline(items, resamples=50, seed=3) == found
    other = human_baseline(items, resamples=50, seed=4)
    assert (
        other["rows"]["half"]["mean_error"]["value"]
        != (found["rows"]["half"]["mean_error"]["value"])
    )
    cell = found["rows"]["humans"]["rmse"]
    assert cell["low"] < cell["value"] < cell["high"]


def test_baseline_of_one_target_has_no_correlation():
    items = [Item(HOT, clue, 50, (40, 70)) for clue in ("tea", "soup")]
    found = human_baseline(items, resamples=10)
    assert "pearson" not in found["rows"]["humans"]
    assert found["rows"]["humans"]["mean_error"] == {
        **{"value": 5.0, "se": None, "low": None, "high": None}
    }


def test_baseline_says_what_it_needs():
    with pytest.raises(UserError, match="there are no items"):
        human_baseline([])
    with pytest.raises(UserError, match="item 'tea' has no human responses"):
        human_baseline([Item(HOT, "tea", 80)])
    with pytest.raises(UserError, match=r"targets\[0\] is 81, not a position of the grid"):
        human_baseline([Item(HOT, "tea", 81, (70, 90))])
    fine = human_baseline([Item(HOT, "tea", 81, (70, 90))], step=1, resamples=10)
    assert fine["rows"]["humans"]["mean_error"]["value"] == pytest.approx(1)


# --- the data of arXiv 2509.06952


@pytest.fixture(scope="module")
def real(data_folder):
    return load_items(data_folder / "wavelength" / "data.csv")


@pytest.mark.realdata
def test_the_real_data_are_what_the_paper_says(real):
    assert len(real) == 100
    groups = clusters(real)
    assert np.bincount(groups).tolist() == [2] * 50
    assert {len(item.responses) for item in real} == {40}
    assert all(item.target % 5 == 0 for item in real)
    assert sorted({item.target for item in real}) == grid(5).tolist()
    assert [item.id for item in real] == [str(i) for i in range(100)]
    assert {"Macy's", "Schwarzenegger", "self-published poetry book"} <= {i.clue for i in real}


@pytest.mark.realdata
def test_the_real_data_survive_writing(real, tmp_path):
    save_items(real, tmp_path / "d.jsonl")
    assert load_items(tmp_path / "d.jsonl") == real


@pytest.mark.realdata
def test_what_people_achieve_on_the_real_data(real):
    found = human_baseline(real, resamples=2000)
    rows = found["rows"]
    value = {(n, m): cell["value"] for n, row in rows.items() for m, cell in row.items()}
    for key, expected in {
        ("humans", "mean_error"): 7.23,
        ("humans", "rmse"): 8.97,
        ("single_human", "mean_error"): 14.27,
        ("single_human", "median_error"): 10.0,
        ("always_50", "mean_error"): 26.4,
        ("random_guess", "mean_error"): 34.88,
        ("humans", "crps"): 5.20,
        ("leave_one_out", "mean_error"): 13.41,
    }.items():
        assert value[key] == pytest.approx(expected, abs=0.005), key
    assert value["humans", "pearson"] == pytest.approx(0.958, abs=5e-4)
    assert value["uniform", "mean_error"] == pytest.approx(26.4)
    assert value["uniform", "expected_distance"] == pytest.approx(
        value["random_guess", "mean_error"]
    )
    assert value["humans", "expected_distance"] == pytest.approx(
        value["single_human", "mean_error"]
    )
    # Half of the people are a little worse than all, and agree with the other half.
    assert 7.3 < value["half", "mean_error"] < 7.9
    assert 0.97 < value["half", "other_half_pearson"] < 0.985
    assert 6.0 < value["half", "other_half_w1"] < 6.6
    cell = rows["humans"]["mean_error"]
    assert 6.0 < cell["low"] < 7.23 < cell["high"] < 8.6
    assert cell["se"] == pytest.approx(0.52, abs=0.05)
