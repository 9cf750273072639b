"""Workflows, hooks and metadata: what actionlint and zizmor do not ask."""

import json
import os
import re
import subprocess

import pytest
import yaml

import house
import import_contracts

ROOT = house.ROOT
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path):
    return yaml.safe_load(path.read_text("utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_hold_no_right_by_default_and_end_in_time(path):
    workflow = load(path)
    assert workflow["permissions"] == {}
    assert "pull_request_target" not in workflow[True]  # YAML reads the key `on` as True
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job, name
        assert "permissions" in job, name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_actions_are_pinned_by_hash_with_their_version(path):
    used = re.findall(r"uses:\s*(.*)", path.read_text("utf-8"))
    assert used
    for line in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_one_action_has_one_version_everywhere():
    used = {}
    for path in WORKFLOWS:
        for name, rest in re.findall(r"uses:\s*([\w./-]+)@(.*)", path.read_text("utf-8")):
            used.setdefault("/".join(name.split("/")[:2]), set()).add(rest)
    assert {name: pins for name, pins in used.items() if len(pins) > 1} == {}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_checkouts_leave_no_token_behind(path):
    for job in load(path)["jobs"].values():
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_the_gate_waits_for_every_job_and_always_runs():
    jobs = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    assert jobs["gate"]["if"] == "always()"
    assert set(jobs["gate"]["needs"]) == set(jobs) - {"gate", "nightly"}


@pytest.mark.parametrize(
    ("results", "code"),
    [
        ({"changes": "success", "repository": "success", "tests": "success"}, 0),
        ({"changes": "success", "repository": "success", "tests": "failure"}, 1),
        ({"changes": "success", "repository": "success", "tests": "cancelled"}, 1),
        ({"changes": "failure", "repository": "success", "tests": "skipped"}, 1),
        ({"changes": "success", "repository": "success", "tests": "skipped"}, 1),
    ],
)
@pytest.mark.parametrize("packages", ["[]", '["path-attn"]'])
def test_the_gate_does_not_read_a_skipped_matrix_as_green(results, code, packages):
    step = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["gate"]["steps"][-1]
    needs = {name: {"result": result} for name, result in results.items()}
    environment = {**os.environ, "NEEDS": json.dumps(needs), "PACKAGES": packages}
    done = subprocess.run(["bash", "-c", step["run"]], env=environment, capture_output=True)
    if results["tests"] == "skipped" and results["changes"] == "success" and packages == "[]":
        code = 0  # nothing was to be tested
    assert done.returncode == code, done.stdout + done.stderr


def test_hooks_and_sessions_use_the_same_versions():
    pins = house.pins()
    hooks = load(ROOT / ".pre-commit-config.yaml")["repos"]
    asked = [d for r in hooks for h in r["hooks"] for d in h.get("additional_dependencies", [])]
    assert asked
    for requirement in asked:
        name, _, version = requirement.partition("==")
        assert pins[name] == version, requirement


def test_the_torch_pin_is_there():
    assert "torch" in house.pins()


def test_import_contracts_name_every_package():
    text = import_contracts.contracts(["tenfold-common", "path-attn", "two-words"])
    siblings = text.split("[importlinter:contract:siblings]")[1].split("[")[0]
    assert siblings.split("modules =")[1].split() == ["path_attn", "two_words"]
    assert "forbidden_modules =\n    path_attn\n    two_words\n" in text


def test_dependabot_waits_and_groups():
    updates = load(ROOT / ".github" / "dependabot.yml")["updates"]
    assert updates
    for update in updates:
        assert update["cooldown"]["default-days"] >= 7
        assert update["groups"]


def test_every_package_is_in_the_root_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    for package in house.packages():
        assert f"(packages/{package}" in text, package


def test_ci_run_is_executable_and_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "exec make test" in script.read_text("utf-8")


def test_the_citation_file_is_readable():
    citation = load(ROOT / "CITATION.cff")
    assert citation["license"] == "Apache-2.0"
    assert citation["cff-version"] == "1.2.0"
