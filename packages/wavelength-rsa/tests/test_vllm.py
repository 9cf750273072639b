"""vLLM for real: an engine in this process, then a server on loopback, with one tiny model."""

import json
import os

import numpy as np
import pytest

from tenfold_common.lm import ServerModel, TransformersModel, VLLMModel
from tenfold_common.testing import letter_tokenizer, vllm_server
from tenfold_common.tiny import tiny_llama
from wavelength_rsa.cli import main
from wavelength_rsa.listeners import LogprobListener, SamplingListener
from wavelength_rsa.scales import Scale
from wavelength_rsa.speakers import RSAListener, RSASpeaker, SamplingSpeaker

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM and what it brings warn at import and at start
]

HOT, LOUD = Scale("Cold", "Hot"), Scale("Quiet", "Loud")
QUESTIONS = [(HOT, "fire"), (HOT, "ice"), (LOUD, "library"), (LOUD, "a jet taking off")]
LENGTH = 4096  # the prompts have up to 2100 letters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights: its probabilities depend on the whole prompt."""
    path = tmp_path_factory.mktemp("lm") / "tiny"
    tokenizer = letter_tokenizer()
    tiny_llama(
        len(tokenizer), hidden=256, heads=4, initializer_range=0.1, max_position_embeddings=LENGTH
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def local(folder):
    return TransformersModel(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def engine(folder):
    """An engine with the random model."""
    pytest.importorskip("vllm")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    model = VLLMModel(
        folder, dtype="float32", engine={"enforce_eager": True, "max_model_len": LENGTH}
    )
    yield model
    model.close()


def serve(folder):
    """Serve a model until the tests of this file are over."""
    pytest.importorskip("vllm")
    log = folder.parent / f"{folder.name}.log"
    with vllm_server(folder, log=log, arguments=("--max-model-len", str(LENGTH))) as address:
        yield address


@pytest.fixture(scope="module")
def random_server(folder):
    yield from serve(folder)


@pytest.fixture(scope="module")
def player_server(player):
    """A server whose model plays both roles, see conftest."""
    yield from serve(player)


NORMALIZE = pytest.mark.parametrize("normalize", ["none", "pmi"])


def check_listener(model, local, normalize):
    """The distributions of two models with equal weights are equal, and depend on the question."""
    step = {"none": 5, "pmi": 20}[normalize]
    wanted = LogprobListener(local, step=step, normalize=normalize).listen(QUESTIONS)
    found = LogprobListener(model, step=step, normalize=normalize).listen(QUESTIONS)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(wanted[0] - wanted[2]).max() > 1e-3


@NORMALIZE
def test_engine_listens_as_transformers_does(engine, local, normalize):
    check_listener(engine, local, normalize)


@NORMALIZE
def test_server_listens_as_transformers_does(random_server, local, normalize):
    check_listener(ServerModel(random_server), local, normalize)


def check_players(model, rigged):
    """Samples and pragmatic choices of a model that plays, against its probabilities."""
    listener = LogprobListener(model)
    [probs] = listener.listen(QUESTIONS[:1])
    np.testing.assert_allclose(probs, rigged, atol=1e-4)
    sampling = SamplingListener(model, num_samples=64, smoothing=0.0)
    sampled = sampling.distribution(HOT, "fire", seed=1)
    assert sampling.last_stats["incomplete"] == 0
    mean, sd = rigged @ sampled.grid, 27.3
    assert abs(sampled.mean - mean) < 4 * sd / 8  # four standard errors
    assert sampled.probs.tolist() == sampling.distribution(HOT, "fire", seed=1).probs.tolist()
    speaker = SamplingSpeaker(model, num_candidates=32, on_violation="drop")
    [direct] = speaker.propose([(HOT, 70.0)], seed=2)
    assert set(direct.clues) <= {"warm", "lukewarm", "boiling", "freezing", "75", "hot"}
    assert direct.refused > 0  # where it answered as a listener would
    pragmatic = RSASpeaker(speaker, listener, alpha=3.0)
    [found] = pragmatic.propose([(HOT, 70.0)], seed=2)
    assert found.clues == direct.clues
    heard = np.where(direct.probs > 0, found.listener, 0.0)
    weights = direct.probs * heard**3
    np.testing.assert_allclose(found.probs, weights / weights.sum(), rtol=1e-6)
    assert pragmatic.speak(HOT, 70.0, seed=2).clue in direct.clues
    alternatives = RSAListener(listener, {HOT: ["fire", "ice"]})
    assert alternatives.distribution(HOT, "fire").probs.sum() == pytest.approx(1)


@pytest.fixture
def rigged():
    positions = np.arange(0, 101, 5)
    weights = np.exp(positions / 50)
    return weights / weights.sum()


def test_server_plays(player_server, rigged):
    check_players(ServerModel(player_server), rigged)


def test_eval_command_asks_the_server(player_server, random_server, rigged, tmp_path, capsys):
    rows = [("Cold", "Hot", "fire", 90), ("Cold", "Hot", "ice", 10), ("Quiet", "Loud", "x", 50)]
    names = ("left", "right", "clue", "target")
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(json.dumps(dict(zip(names, r, strict=True))) for r in rows))
    command = ["eval", "--task=both", f"--model={player_server}", f"--judge={random_server}"]
    command += [f"--data={data}", f"--cache={tmp_path / 'c.db'}", "--rsa", "--num_candidates=8"]
    command += ["--judge_model_name=tiny", "--resamples=50"]
    for name in ("a", "b"):
        assert main([*command, f"--out={tmp_path / name}.json"]) == 0
    capsys.readouterr()
    for task in ("listener", "speaker"):
        whole = (tmp_path / f"a-{task}.json").read_bytes()
        assert (tmp_path / f"b-{task}.json").read_bytes() == whole
    report = json.loads((tmp_path / "a-listener.json").read_bytes())
    np.testing.assert_allclose([row["probs"] for row in report["rows"]], [rigged] * 3, atol=1e-4)
    report = json.loads((tmp_path / "a-speaker.json").read_bytes())
    assert len(report["rows"]) == 3
    assert all(0 <= row["mean_error"] <= 100 for row in report["rows"])


def test_listen_command_says_what_it_would_with_transformers(
    random_server, folder, tmp_path, capsys
):
    found = []
    for number, model in enumerate((random_server, folder)):
        out = tmp_path / f"{number}.json"
        command = ["listen", f"--model={model}", "--left=Cold", "--right=Hot", "fire", "ice"]
        assert main([*command, f"--json={out}"]) == 0
        found.append([row["probs"] for row in json.loads(out.read_text())["clues"]])
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_engine_plays(engine, player, rigged):
    """After the others: the engine of the random model gives way to that of the player."""
    engine.close()
    model = VLLMModel(
        player, dtype="float32", engine={"enforce_eager": True, "max_model_len": LENGTH}
    )
    try:
        check_players(model, rigged)
    finally:
        model.close()
