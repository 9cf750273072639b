"""Models behind an OpenAI-compatible server: listeners, speakers and the command, over HTTP."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tenfold_common.errors import UserError
from tenfold_common.lm import ServerModel
from wavelength_rsa.cache import fingerprint
from wavelength_rsa.cli import main
from wavelength_rsa.listeners import LogprobListener, SamplingListener
from wavelength_rsa.scales import Scale, grid
from wavelength_rsa.speakers import RSAListener, RSASpeaker, SamplingSpeaker

HOT = Scale("Cold", "Hot")
HEAVY = ("torch", "transformers")

HEEDS_CTRL_C = (  # a test run in the background has told its children not to
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from wavelength_rsa.cli import main; sys.exit(main())"
)


def connected(fake, **named):
    return ServerModel(fake.url, **{"backoff": 0.001, **named})


def expected(peak, step=5):
    """What the server's log-probabilities amount to."""
    weights = np.exp(-np.abs(grid(step) - peak) / 20)
    return weights / weights.sum()


def refused(capsys, *arguments):
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    [line] = captured.err.splitlines()
    assert captured.out == ""
    return line.removeprefix("error: ")


@pytest.fixture
def data(tmp_path):
    rows = [("fire", 90), ("ice", 10), ("tea", 50), ("sauna", 80)] * 5
    lines = [
        json.dumps({"left": f"Cold{i // 4}", "right": f"Hot{i // 4}", "clue": c, "target": t})
        for i, (c, t) in enumerate(rows)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    return tmp_path / "items.jsonl"


class TestLibrary:
    def test_logprob_listener_reads_the_server_s_probabilities(self, server):
        listener = LogprobListener(connected(server))
        probs = listener.listen([(HOT, "fire"), (HOT, "ice"), (HOT, "fire")])
        np.testing.assert_allclose(probs[0], expected(90), atol=1e-12)
        np.testing.assert_allclose(probs[1], expected(10), atol=1e-12)
        assert (probs[2] == probs[0]).all()
        assert server.asked() == 2 * (1 + 21)  # equal questions are asked once
        path, body, _ = server.requests[0]
        assert path == "/v1/chat/completions"
        assert body["model"] == "tiny"
        assert body["messages"][0]["content"].rstrip().endswith("nothing else.")

    def test_pmi_and_another_step(self, server):
        listener = LogprobListener(connected(server), step=20, normalize="pmi")
        [probs] = listener.listen([(HOT, "fire")])
        weights = np.exp((np.abs(grid(20) - 50) - np.abs(grid(20) - 90)) / 20)
        np.testing.assert_allclose(probs, weights / weights.sum(), atol=1e-12)

    def test_sampling_listener(self, server):
        listener = SamplingListener(connected(server), num_samples=40, smoothing=0.0)
        found = listener.distribution(HOT, ["fire", "ice"], seed=3)
        assert 85 < found[0].mean < 95
        assert 5 < found[1].mean < 15
        assert found[0].probs[:16].sum() == 0
        again = listener.distribution(HOT, ["fire", "ice"], seed=3)
        assert [d.probs.tolist() for d in again] == [d.probs.tolist() for d in found]
        assert server.requests[0][1]["stop"] == ["</answer>"]
        assert len({body["seed"] for _, body, _ in server.requests}) == 80

    def test_speakers(self, server):
        model = connected(server)
        speaker = SamplingSpeaker(model, num_candidates=40, on_violation="drop")
        direct = speaker.propose([(HOT, 100.0)], seed=1)[0]
        assert direct.counts.sum() == 40
        assert len(direct.clues) == 6
        assert direct.probs[direct.clues.index("75")] == 0  # a number is no clue
        server.peaks = {"boiling": 100, "freezing": 0}
        pragmatic = RSASpeaker(speaker, LogprobListener(model), alpha=2.0)
        found = pragmatic.propose([(HOT, 100.0)], seed=1)[0]
        assert found.clues == direct.clues
        heard = [
            expected({"boiling": 100, "freezing": 0}.get(c, 50))[-1] if p else found.listener[k]
            for k, (c, p) in enumerate(zip(found.clues, direct.probs, strict=True))
        ]
        np.testing.assert_allclose(found.listener, heard, atol=1e-12)
        weights = direct.probs * np.array(heard) ** 2
        np.testing.assert_allclose(found.probs, weights / weights.sum(), atol=1e-12)
        listener = RSAListener(LogprobListener(model), {HOT: ["boiling", "freezing"]})
        assert listener.distribution(HOT, "boiling").mean > 50

    def test_a_busy_server_is_asked_again(self, server):
        wanted = LogprobListener(connected(server)).distribution(HOT, "fire").probs
        server.script = [(429, {"Retry-After": "0"}, {}), (503, {}, {}), (429, {}, {})]
        before = server.asked()
        found = LogprobListener(connected(server, concurrency=1)).distribution(HOT, "fire").probs
        assert (found == wanted).all()
        assert server.asked() - before == 22 + 3

    def test_what_is_refused_is_not_asked_again(self, server):
        server.script = [(400, {}, {"error": {"message": "too long"}})]
        with pytest.raises(UserError, match=r"answered 400 .*too long") as caught:
            LogprobListener(connected(server, concurrency=1)).distribution(HOT, "fire")
        assert 0 < server.asked() == len({str(body) for _, body, _ in server.requests}) < 10
        assert "sample" not in str(caught.value)

    @pytest.mark.parametrize("logprobs", ["absent", "refused"])
    def test_without_log_probabilities_the_way_out_is_named(self, server, logprobs):
        server.logprobs = logprobs
        with pytest.raises(UserError, match=r"use SamplingListener, .* --mode sample"):
            LogprobListener(connected(server, concurrency=1)).distribution(HOT, "fire")
        assert server.asked() < 10  # not one for each answer
        SamplingListener(connected(server), num_samples=2).distribution(HOT, "fire")

    def test_a_wrong_name_lists_the_right_ones(self, server):
        server.models = ["tiny", "large"]
        with pytest.raises(UserError, match=r"no model 'tinny'; it offers tiny, large. Did you"):
            LogprobListener(connected(server, model="tinny")).distribution(HOT, "fire")


class TestCommand:
    def test_listen(self, server, tmp_path, capsys):
        out = tmp_path / "l.json"
        command = ["listen", f"--model={server.url}", "--left=Cold", "--right=Hot", "fire", "ice"]
        assert main([*command, f"--json={out}"]) == 0
        found = json.loads(out.read_text())
        np.testing.assert_allclose(found["clues"][0]["probs"], expected(90), atol=1e-12)
        assert (found["model"], found["class"]) == ("tiny", "LogprobListener")
        mean = expected(10) @ grid(5)
        assert re.search(rf"^ice: mean {mean:.1f}, .*mode 10$", capsys.readouterr().out, re.M)
        assert main([*command, "--mode=sample", "--num_samples=8", "--seed=2"]) == 0

    @pytest.mark.parametrize("logprobs", ["absent", "refused"])
    def test_without_log_probabilities(self, server, capsys, logprobs):
        server.logprobs = logprobs
        line = refused(
            capsys, "listen", f"--model={server.url}", "--left=Cold", "--right=Hot", "fire"
        )
        assert "--mode sample" in line
        assert "log-probabilities" in line or "logprobs" in line

    def test_names_of_models(self, server, capsys):
        server.models = ["tiny", "large"]
        command = ["listen", "--left=Cold", "--right=Hot", "fire"]
        assert "offers tiny, large" in refused(capsys, *command, f"--model={server.url}")
        assert "Did you mean 'tiny'" in refused(capsys, *command, f"--model={server.url}#tinny")
        assert main([*command, f"--model={server.url}#large"]) == 0
        assert server.requests[-1][1]["model"] == "large"
        assert main([*command, f"--model={server.url}", "--model_name=tiny"]) == 0
        assert server.requests[-1][1]["model"] == "tiny"

    def test_no_server(self, capsys):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        line = refused(capsys, "listen", f"--model={url}", "--left=Cold", "--right=Hot", "fire")
        assert line.startswith(f"no server listens at {url}")

    def test_the_key_is_sent_and_kept_nowhere(self, server, data, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("THE_KEY", "sk-secret")
        command = ["eval", "--task=listener", f"--model={server.url}", f"--data={data}"]
        command += [f"--out={tmp_path / 'r.json'}", f"--cache={tmp_path / 'c.db'}", "--limit=2"]
        assert main([*command, "--api_key_env=THE_KEY", "--resamples=20"]) == 0
        assert all(h["Authorization"] == "Bearer sk-secret" for _, _, h in server.requests)
        kept = (tmp_path / "r.json").read_bytes() + (tmp_path / "c.db").read_bytes()
        assert b"sk-secret" not in kept + capsys.readouterr().out.encode()

    def test_judge_and_imagined_listener_are_told_apart(self, start_server, data, tmp_path, capsys):
        ours, judge = start_server(), start_server()
        ours.peaks = {"boiling": 90, "freezing": 0}
        judge.peaks = {"boiling": 20, "freezing": 30}
        judge.models = ["judge"]
        out = tmp_path / "r.json"
        command = ["eval", "--task=speaker", f"--model={ours.url}", f"--judge={judge.url}"]
        command += [f"--data={data}", f"--out={out}", "--rsa", "--alpha=3", "--limit=1"]
        assert main([*command, "--resamples=20"]) == 0
        report = json.loads(out.read_text())
        assert report["notes"] == ["The speaker imagines a listener of its own model."]
        ours_is, judge_is = (fingerprint(ServerModel(one.url)) for one in (ours, judge))
        assert report["settings"]["models"] == {
            "speaker": [ours_is],
            "imagined listener": [ours_is],
            "judge": [judge_is],
        }
        assert ours_is != judge_is
        assert report["settings"]["judge"]["model"] == "judge"
        assert report["settings"]["speaker"]["listener"]["model"] == "tiny"
        rows = {row["clue"]: row for row in report["rows"][0]["candidates"]}
        for clue, imagined, judged in (("boiling", 90, 20), ("freezing", 0, 30)):
            at = grid(5).tolist().index(90)
            assert rows[clue]["listener"] == pytest.approx(expected(imagined)[at])
            assert rows[clue]["judged_mean"] == pytest.approx(expected(judged) @ grid(5))
        assert max(rows.values(), key=lambda r: r["prob"])["clue"] == "boiling"
        scored = [json.dumps(body) for _, body, _ in judge.requests]
        assert all("prompt_logprobs" in body for body in scored)

    def test_a_second_run_asks_nothing_and_gives_the_same_bytes(
        self, server, data, tmp_path, capsys
    ):
        command = ["eval", "--task=both", f"--model={server.url}", "--self_play", "--mode=sample"]
        command += [f"--data={data}", "--num_samples=2", "--num_candidates=3", "--resamples=20"]
        command += [f"--cache={tmp_path / 'c.db'}"]
        assert main([*command, f"--out={tmp_path / 'a.json'}"]) == 0
        asked = server.asked()
        assert main([*command, f"--out={tmp_path / 'b.json'}"]) == 0
        assert server.asked() == asked
        for task in ("listener", "speaker"):
            whole = (tmp_path / f"a-{task}.json").read_bytes()
            assert whole == (tmp_path / f"b-{task}.json").read_bytes()

    def test_interrupted_and_resumed(self, server, data, tmp_path, capsys):
        """Ctrl-C in the second block of prompts: 130, no report; then only that block is asked."""
        command = ["eval", "--task=listener", f"--model={server.url}", "--mode=sample"]
        command += [f"--data={data}", "--num_samples=2", "--resamples=20", "--seed=4"]
        command += [f"--cache={tmp_path / 'c.db'}", f"--out={tmp_path / 'r.json'}"]
        server.held = 2 * 16  # a block's
        child = subprocess.Popen(
            [sys.executable, "-c", HEEDS_CTRL_C, *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert server.full.wait(120)
        child.send_signal(signal.SIGINT)
        server.go.set()
        out, errors = child.communicate(timeout=60)
        assert (child.returncode, out) == (130, "")
        progress, last = errors.splitlines()
        assert progress.endswith("INFO 16 of 20 prompts")
        assert last == "interrupted"
        assert not (tmp_path / "r.json").exists()
        server.held = None
        server.full.clear()
        before = server.asked()
        assert main(command) == 0
        assert server.asked() - before == 2 * 4
        resumed = (tmp_path / "r.json").read_bytes()
        (tmp_path / "c.db").unlink()
        assert main([*command, "--overwrite"]) == 0
        assert (tmp_path / "r.json").read_bytes() == resumed

    def test_nothing_heavy_is_imported_for_a_server(self, server):
        code = (
            "import sys; from wavelength_rsa.cli import main; code = main(sys.argv[1:]); "
            f"print([m for m in {HEAVY} if m in sys.modules]); sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "listen", f"--model={server.url}", "--left=Cold",
             "--right=Hot", "fire"],
            capture_output=True, text=True, check=False, env={**os.environ},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == "[]"
