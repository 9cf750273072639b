import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold_common import (
    Claim,
    Figure,
    Result,
    Sample,
    Table,
    UserError,
    environment,
    load_bench,
    update_between_markers,
    write_bench,
)
from tenfold_common.results import claims_table, markdown_table

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
FLOAT = st.floats()
CELL = st.one_of(TEXT, st.integers(), FLOAT, st.booleans(), st.none())


@st.composite
def claims(draw):
    measured = draw(FLOAT)
    passed = draw(st.booleans()) and not math.isnan(measured)
    margin = draw(st.none() | FLOAT)
    return Claim(draw(TEXT), draw(TEXT), measured, draw(TEXT), passed, draw(TEXT), margin)


@st.composite
def tables(draw):
    columns = draw(st.lists(TEXT, max_size=3))
    width = len(columns)
    rows = draw(st.lists(st.lists(CELL, min_size=width, max_size=width), max_size=3))
    return Table(draw(TEXT), columns, rows)


RESULTS = st.builds(
    Result,
    package=TEXT,
    title=TEXT,
    summary=TEXT,
    seeds=st.lists(st.integers(0), max_size=3),
    claims=st.lists(claims(), max_size=3),
    tables=st.lists(tables(), max_size=2),
    samples=st.lists(st.builds(Sample, TEXT, TEXT), max_size=2),
    notes=st.lists(TEXT, max_size=2),
    seconds=st.floats(0),
    environment=st.dictionaries(TEXT, CELL, max_size=3),
)


def example(**changes) -> Result:
    result = Result(
        package="path-attn",
        title="Flip-flop",
        summary="It remembers.",
        seeds=[0],
        claims=[Claim("error", "under 1 %", 0.25, "< 1", True, "%", 0.75)],
        tables=[Table("Errors", ["model", "error"], [["PaTH", 0.123456], ["RoPE", None]])],
        notes=["a note"],
        seconds=1.5,
    )
    return dataclasses.replace(result, **changes)


@SHARED_FOLDER
@given(result=RESULTS)
def test_a_result_survives_saving_in_strict_json(tmp_path_factory, result):
    folder = tmp_path_factory.mktemp("result") / "new folder"
    path = result.save(folder)

    def forbidden(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(encoding="utf-8"), parse_constant=forbidden)
    for place in (path, folder):
        back = Result.load(place)
        assert repr(back) == repr(result)  # repr, because NaN does not equal itself
        assert back.to_dict() == result.to_dict()


def test_passed_needs_a_claim_and_all_of_them():
    good = Claim("a", "b", 1.0, "> 0", True)
    assert example(claims=[good]).passed
    assert not example(claims=[good, dataclasses.replace(good, passed=False)]).passed
    assert not example(claims=[]).passed


def test_scalars_of_numpy_and_torch_become_plain():
    claim = Claim("a", "b", np.float32(0.5), "> 0", np.bool_(True), margin=torch.tensor(2))  # type: ignore[arg-type]
    assert (type(claim.measured), claim.passed, claim.margin) == (float, True, 2.0)
    assert type(claim.margin) is float
    table = Table("t", ["a", "b"], [(np.int64(3), torch.tensor(0.5))])  # type: ignore[list-item]
    assert table.rows == [[3, 0.5]]
    assert type(table.rows[0][0]) is int


def test_an_integer_is_a_float_but_a_bool_is_no_number():
    assert type(Claim("a", "b", 1, "", True).measured) is float
    with pytest.raises(UserError, match=r"Claim\.measured must be float, not True"):
        Claim("a", "b", True, "", True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Claim("a", "b", "3", "c", True), r"Claim\.measured must be float, not '3'"),
        (lambda: Claim("a", "b", None, "c", True), r"Claim\.measured must be float, not None"),
        (lambda: Claim("a", "b", 1.0, "c", 1), r"Claim\.passed must be bool, not 1"),
        (lambda: Claim(3, "b", 1.0, "c", True), r"Claim\.name must be str, not 3"),
        (lambda: Claim("a", "b", math.nan, "c", True), "'a' measured NaN and cannot have passed"),
        (lambda: Table("t", ["a"], [[1], [1, 2]]), "'t': row 1 has 2 cells for 1 columns"),
        (lambda: Table("t", ["a"], [[[1]]]), r"Table\.rows\[0\]\[0\] must be .* not \[1\]"),
        (lambda: Table("t", "ab", []), r"Table\.columns must be .*, not 'ab'"),
        (lambda: Figure("../x.png", ""), "must be a .png or .wav below"),
        (lambda: Figure("/x.png", ""), "must be a .png or .wav below"),
        (lambda: Figure("x.svg", ""), "must be a .png or .wav below"),
        (lambda: example(seeds=[True]), r"Result\.seeds\[0\] must be int, not True"),
        (lambda: example(environment={"a": {}}), r"Result\.environment\['a'\] must be"),
        (lambda: example(environment={1: "a"}), r"Result\.environment must be str, not 1"),
        (lambda: example(environment=[]), r"Result\.environment must be dict"),
        (lambda: example(claims=[3]), r"Result\.claims\[0\] must be an object with fields, not 3"),
    ],
)
def test_wrong_fields_are_named_when_made(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="x"), "not a result of schema tenfold-result/1"),
        (lambda d: d.pop("schema"), "not a result of schema tenfold-result/1"),
        (
            lambda d: d.update(claim=[]),
            "result has an unknown field 'claim'. Did you mean 'claims'",
        ),
        (lambda d: d.pop("notes"), "result lacks the field 'notes'"),
        (lambda d: d["claims"][0].pop("unit"), r"Result.claims\[0\] lacks the field 'unit'"),
        (lambda d: d["claims"][0].update(x=1), r"Result.claims\[0\] has an unknown field 'x'"),
        (lambda d: d.update(seconds="1"), r"Result\.seconds must be float"),
        (lambda d: d.update(seconds={"nonfinite": "1"}), r"Result\.seconds must be float"),
    ],
)
def test_loading_is_strict_and_names_file_and_field(tmp_path, change, message):
    data = example().to_dict()
    change(data)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as caught:
        Result.load(path)
    assert str(caught.value).startswith(f"{str(path)!r}: ")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\x00", "[" * 100_000], ids=repr)
def test_junk_is_a_user_error(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_text(content)
    for load in (Result.load, load_bench):
        with pytest.raises(UserError, match=r"r\.json'"):
            load(path)


def test_a_missing_or_non_utf8_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"result\.json' cannot be read: No such file"):
        Result.load(tmp_path)
    (tmp_path / "result.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not valid JSON"):
        Result.load(tmp_path)


def test_a_missing_figure_is_noticed_when_saving(tmp_path):
    result = example(figures=[Figure("a/b.png", "c")])
    with pytest.raises(UserError, match=r"figure 'a/b\.png' is not in"):
        result.save(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").write_bytes(b"x")
    assert Result.load(result.save(tmp_path)).figures == result.figures


def test_markdown():
    result = example(
        figures=[Figure("f.png", "A figure")],
        samples=[Sample("Said", "one ``` two")],
        claims=[Claim("a|b", "two\nlines", 0.1234567, "< 1", False, "%")],
    )
    assert result.markdown() == (
        "It remembers.\n\n"
        "| claim | claimed | measured | expected | result |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| a\\|b | two lines | 0.1235 % | < 1 | FAIL |\n\n"
        "**Errors**\n\n"
        "| model | error |\n| --- | --- |\n| PaTH | 0.1235 |\n| RoPE | - |\n\n"
        "![A figure](f.png)\n\n"
        "**Said**\n\n````text\none ``` two\n````\n\n"
        "- a note\n"
    )
    assert Result("p", "t", "", []).markdown() == "\n"


def test_a_table_of_cells():
    rows = [["a|b", 0.123456, None], ["two\nlines", True, 3]]
    assert markdown_table(["x", "y|z", "w"], rows) == (
        "| x | y\\|z | w |\n|---|---|---|\n| a\\|b | 0.1235 | - |\n| two lines | yes | 3 |"
    )
    assert markdown_table(["x"], [], rule=" :-: ") == "| x |\n| :-: |"


def test_claims_with_and_without_a_verdict():
    found = [Claim("a", "it holds", 2.0, "> 1", True), Claim("b", "so too", 2.0, "< 1", False, "%")]
    assert claims_table(found) == (
        "| claim | claimed | measured | expected | result |\n|---|---|---|---|---|\n"
        "| a | it holds | 2 | > 1 | PASS |\n| b | so too | 2 % | < 1 | FAIL |"
    )
    assert claims_table(found[:1], rule="-", verdict=False) == (
        "| claim | claimed | measured | expected |\n|-|-|-|-|\n| a | it holds | 2 | > 1 |"
    )


# environment ----------------------------------------------------------------------------------

FACTS = [
    *("cpu", "cores", "threads", "gpu", "driver", "torch", "triton", "transformers"),
    *("python", "os", "commit", "dirty"),
]


def test_environment_is_an_allow_list_of_plain_facts(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    facts = environment()
    assert list(facts) == FACTS
    assert "hunter2" not in json.dumps(facts)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] >= 1  # type: ignore[operator]
    assert facts["cpu"]
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert example(environment=facts).environment == facts


def test_environment_knows_commit_and_dirt_of_a_repository(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init")
    git("commit", "--allow-empty", "-m", "x")
    monkeypatch.chdir(tmp_path)
    clean = environment()
    assert clean["commit"] == git("rev-parse", "HEAD").stdout.strip()
    assert clean["dirty"] is False
    (tmp_path / "new").write_text("")
    assert environment()["dirty"] is True


def test_environment_without_git_gpu_torch_or_cpuinfo(tmp_path):
    code = """
import sys
from importlib import metadata
from pathlib import Path
def absent(name): raise metadata.PackageNotFoundError(name)
def unreadable(*args, **named): raise OSError
metadata.version = absent
Path.read_text = unreadable
from tenfold_common import environment
facts = environment()
assert "torch" not in sys.modules
assert facts["cpu"] and facts["python"] and facts["os"] and facts["cores"]
unknown = "threads gpu driver torch triton transformers commit dirty".split()
assert [facts[name] for name in unknown] == [None] * 8, facts
"""
    nowhere = {**os.environ, "GIT_DIR": str(tmp_path / "absent")}
    subprocess.run([sys.executable, "-c", code], check=True, env=nowhere, timeout=60)


def test_environment_asks_for_the_driver_where_there_is_a_gpu(monkeypatch):
    from tenfold_common import results

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(results, "_output_of", lambda command: "1.2\n1.2")
    facts = environment()
    assert (facts["gpu"], facts["driver"]) == ("Some GPU", "1.2")


def test_a_program_that_fails_or_is_absent_gives_none():
    from tenfold_common.results import _output_of

    assert _output_of([sys.executable, "-c", "print('x')"]) == "x"
    assert _output_of([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert _output_of(["no-such-program-here"]) is None


# benchmarks -----------------------------------------------------------------------------------

ROW = {"name": "forward", "impl": "ours", "shape": "T=4", "dtype": "float32", "median_ms": 1.5}


def bench(path, **changes):
    named = {
        "package": "path-attn",
        "version": "0.1.0",
        "command": "python bench.py",
        "correctness": {"gate": "against the reference", "max_err": 1e-6},
        "rows": [ROW],
        "notes": ["two threads"],
    }
    write_bench(path, **{**named, **changes})
    return path


def test_a_benchmark_round_trip(tmp_path):
    extra = {"peak_mb": 3, "note": None}
    data = load_bench(bench(tmp_path / "b.json", rows=[ROW, {**ROW, "n": 5, "extra": extra}]))
    assert list(data) == [
        *("schema", "package", "version", "commit", "dirty", "created_at", "command"),
        *("environment", "correctness", "rows", "notes"),
    ]
    assert data["schema"] == 1
    assert data["rows"] == [ROW, {**ROW, "n": 5, "extra": extra}]
    assert set(data["environment"]) == set(FACTS) - {"commit", "dirty"}


def test_scalars_in_a_benchmark_become_plain(tmp_path):
    rows = [{**ROW, "median_ms": np.float32(2.5)}]
    correctness = {"gate": True, "max_err": torch.tensor(0.5)}
    data = load_bench(bench(tmp_path / "b.json", rows=rows, correctness=correctness))
    assert data["rows"][0]["median_ms"] == 2.5
    assert data["correctness"] == {"gate": True, "max_err": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correctness": {"gate": False, "max_err": 1.0}}, "no numbers without one"),
        ({"correctness": {"gate": "", "max_err": 1.0}}, "no numbers without one"),
        ({"correctness": {"gate": "x"}}, "correctness lacks the field 'max_err'"),
        ({"correctness": {"gate": "x", "max_err": "1"}}, r"correctness\.max_err must be"),
        ({"rows": [{**ROW, "mediam_ms": 1.0}]}, r"rows\[0\] has an unknown field 'mediam_ms'. Did"),
        ({"rows": [ROW, {"name": "x"}]}, r"rows\[1\] lacks the field 'impl'"),
        ({"rows": [{**ROW, "shape": [4]}]}, r"rows\[0\]\.shape must be str"),
        ({"rows": [{**ROW, "median_ms": math.nan}]}, r"median_ms must be a finite number >= 0"),
        ({"rows": [{**ROW, "median_ms": math.inf}]}, r"median_ms must be a finite number >= 0"),
        ({"rows": [{**ROW, "median_ms": -1}]}, r"median_ms must be a finite number >= 0"),
        ({"rows": [{**ROW, "extra": {"a": []}}]}, r"rows\[0\]\.extra\['a'\] must be"),
        ({"rows": ROW}, "rows must be list"),
        ({"rows": [3]}, r"rows\[0\] must be dict"),
        ({"notes": "x"}, "notes must be list"),
        ({"command": 3}, "command must be str"),
        ({"rows": [{**ROW, "extra": {"a": math.nan}}]}, "cannot be written"),
    ],
)
def test_bad_benchmarks_are_not_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        bench(tmp_path / "b.json", **changes)
    assert list(tmp_path.iterdir()) == []


def test_loading_a_benchmark_is_strict(tmp_path):
    path = bench(tmp_path / "b.json")
    data = json.loads(path.read_text())
    for key, value in (("commit", 3), ("dirty", "no"), ("environment", []), ("schema", 2)):
        path.write_text(json.dumps({**data, key: value}))
        with pytest.raises(UserError, match=r"b\.json': "):
            load_bench(path)


def test_what_json_cannot_hold_is_refused(tmp_path):
    from pathlib import Path

    from tenfold_common.results import _write_json

    with pytest.raises(UserError, match="does not fit into JSON"):
        _write_json(tmp_path / "x.json", {"a": Path("x")})
    assert list(tmp_path.iterdir()) == []


# markers --------------------------------------------------------------------------------------


@SHARED_FOLDER
@given(before=TEXT, after=TEXT, first=TEXT, second=TEXT)
def test_only_what_stands_between_the_markers_changes(
    tmp_path_factory, before, after, first, second
):
    path = tmp_path_factory.mktemp("md") / "README.md"
    path.write_bytes(f"{before}<!-- x:begin -->old<!-- x:end -->{after}".encode())
    update_between_markers(path, "x", first)
    once = path.read_bytes()
    assert not update_between_markers(path, "x", first)
    assert path.read_bytes() == once
    update_between_markers(path, "x", second)
    update_between_markers(path, "x", first)
    assert path.read_bytes() == once
    assert once.startswith(f"{before}<!-- x:begin -->".encode())
    assert once.endswith(f"<!-- x:end -->{after}".encode())


def test_markers_keep_their_lines(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- bench-1:begin -->\nold\n<!-- bench-1:end -->\nb\n")
    assert update_between_markers(path, "bench-1", "| new |\n")
    assert path.read_text() == "a\n<!-- bench-1:begin -->\n| new |\n<!-- bench-1:end -->\nb\n"


def test_line_ends_of_the_file_are_used(tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(b"a\r\n<!-- x:begin --><!-- x:end -->\r\n")
    update_between_markers(path, "x", "1\n2")
    assert path.read_bytes() == b"a\r\n<!-- x:begin -->\r\n1\r\n2\r\n<!-- x:end -->\r\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- x:begin -->",
        "<!-- x:end --><!-- x:begin -->",
        "<!-- x:begin --><!-- x:begin --><!-- x:end -->",
        "<!-- x:begin --><!-- x:end --><!-- x:end -->",
        "<!-- y:begin --><!-- y:end -->",
    ],
)
def test_markers_must_be_there_once_and_in_order(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(UserError, match="each once"):
        update_between_markers(path, "x", "new")
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "markdown", "message"),
    [
        ("X", "", "marker name 'X'"),
        ("a b", "", "marker name 'a b'"),
        ("", "", "marker name ''"),
        ("x", "<!-- x:end -->", "contains the marker itself"),
        ("x", "<!-- x:begin -->", "contains the marker itself"),
    ],
)
def test_bad_marker_names_and_texts(tmp_path, name, markdown, message):
    path = tmp_path / "README.md"
    path.write_text("<!-- x:begin --><!-- x:end -->")
    with pytest.raises(UserError, match=message):
        update_between_markers(path, name, markdown)
