import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlcr import baselines
from tenfold_common.errors import UserError
from tenfold_common.tiny import byte_tokenizer, tiny_llama

DONE = "<think>hm</think><answer> ab </answer>"


class Scorer:
    """Scores every character as one token; P = 0.5 for `a`, 0.25 for `b`, 0.9 for the rest."""

    name = "scorer"

    def __init__(self):
        self.calls = []

    def score(self, prefix, continuations):
        self.calls.append((prefix, list(continuations)))
        return [
            SimpleNamespace(
                logprobs=tuple(math.log({"a": 0.5, "b": 0.25}.get(x, 0.9)) for x in text),
                offsets=tuple((i, i + 1) for i in range(len(text))),
            )
            for text in continuations
        ]


def test_answer_probability_reads_the_answer_tokens_only():
    model = Scorer()
    found = baselines.answer_probability(model, ["P", "P", "Q"], [DONE, "none", DONE])
    np.testing.assert_allclose(found.mean, [0.375, math.nan, 0.375])
    np.testing.assert_allclose(found.product, [0.125, math.nan, 0.125])
    np.testing.assert_allclose(found.minimum, [0.25, math.nan, 0.25])
    assert found.missing == 1
    assert model.calls == [("P", [DONE]), ("Q", [DONE])]
    with pytest.raises(UserError, match="2 prompts but 1"):
        baselines.answer_probability(model, ["P", "Q"], [DONE])


def test_tokens_that_overlap_the_answer_count():
    start = DONE.index("ab")
    score = SimpleNamespace(
        logprobs=(-1.0, -2.0, -4.0, -8.0),
        offsets=((0, start), (start - 2, start + 1), (start + 1, start + 5), (start + 5, 99)),
    )
    model = SimpleNamespace(score=lambda prefix, continuations: [score])
    found = baselines.answer_probability(model, ["P"], [DONE])
    assert found.product[0] == pytest.approx(math.exp(-6))


def test_completions_of_one_prompt_are_scored_together():
    model = Scorer()
    messages = [{"role": "user", "content": "x"}]
    baselines.answer_probability(model, [messages, list(messages)], [DONE, DONE])
    assert len(model.calls) == 1


# Hidden states ------------------------------------------------------------------------------------


@pytest.fixture
def tiny():
    tokenizer = byte_tokenizer()
    return tiny_llama(len(tokenizer)), tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", [-1, 1, 0])
def test_hidden_states_do_not_depend_on_batch_or_padding(tiny, side, layer):
    model, tokenizer = tiny
    tokenizer.padding_side = side
    texts = ["a", "a longer text", "two", "ab" * 20]
    found = baselines.hidden_states(model, tokenizer, texts, layer=layer, batch_size=3)
    assert found.shape == (4, 64)
    assert found.dtype == np.float32
    for text, state in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            alone = model(ids, output_hidden_states=True).hidden_states[layer][0, -1]
        np.testing.assert_allclose(state, alone.numpy(), atol=2e-5)


def test_hidden_states_keep_mode_and_last_tokens(tiny):
    model, tokenizer = tiny
    model.train()
    long, short = (
        baselines.hidden_states(model, tokenizer, [text], max_length=3) for text in ("xxabc", "abc")
    )
    assert model.training
    np.testing.assert_allclose(long, short, atol=1e-6)
    for texts, settings, words in (
        (["a", ""], {}, "text 1 has no tokens"),
        ([], {}, "empty"),
        (["a"], {"layer": 9}, "layer must lie"),
        (["a"], {"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(UserError, match=words):
            baselines.hidden_states(model, tokenizer, texts, **settings)
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="padding token"):
        baselines.hidden_states(model, tokenizer, ["a"])


def test_probe_learns_and_survives_saving(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 5, (2000, 4))
    x[:, 3] = 1.0  # constant features must not divide by zero
    truth = 1 / (1 + np.exp(-(0.8 * x[:, 0] - 0.4 * x[:, 1] - 1)))
    c = (rng.random(2000) < truth).astype(int)
    probe = baselines.LinearProbe().fit(x[:1000], c[:1000])
    np.testing.assert_allclose(probe.predict(x[1000:]), truth[1000:], atol=0.15)
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x[:1000])
    peer = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(x[:1000]), c[:1000])
    np.testing.assert_allclose(
        probe.predict(x[1000:]), peer.predict_proba(scaler.transform(x[1000:]))[:, 1], atol=1e-6
    )
    probe.save(tmp_path / "probe.safetensors")
    again = baselines.LinearProbe.load(tmp_path / "probe.safetensors")
    np.testing.assert_array_equal(again.predict(x), probe.predict(x))


def test_probe_refuses_what_does_not_fit(tmp_path):
    probe = baselines.LinearProbe()
    with pytest.raises(UserError, match="not fitted"):
        probe.predict([[1.0]])
    with pytest.raises(UserError, match="not fitted"):
        probe.save(tmp_path / "x")
    with pytest.raises(UserError, match="one class"):
        probe.fit([[1.0], [2.0]], [1, 1])
    with pytest.raises(UserError, match="NaN"):
        probe.fit([[1.0], [math.nan]], [1, 0])
    with pytest.raises(UserError, match="2 values but correct has 1"):
        probe.fit([[1.0], [2.0]], [1])
    probe.fit([[1.0], [2.0]], [0, 1])
    with pytest.raises(UserError, match="3 columns"):
        probe.predict([[1.0, 2.0, 3.0]])
    (tmp_path / "bad").write_bytes(b"nonsense")
    for name in ("bad", "absent"):
        with pytest.raises(UserError, match="not a saved probe"):
            baselines.LinearProbe.load(tmp_path / name)
    with pytest.raises(UserError, match="strength"):
        baselines.LinearProbe(strength=0)


# Classifier ---------------------------------------------------------------------------------------


def test_classifier_texts_leave_the_confidence_out():
    full = "<think>t</think><answer>4</answer><analysis>sure</analysis><confidence>0.9</confidence>"
    (with_analysis,) = baselines.classifier_texts(["2+2"], [full], analysis=True)
    (without,) = baselines.classifier_texts(["2+2"], [full])
    assert "sure" in with_analysis
    assert "sure" not in without
    assert without == "PROBLEM: 2+2\n\nRESPONSE: <think>t</think><answer>4</answer>\n\nEND"
    cut = "<think>t</think><answer>4</answer><analysis>sure</analysis><confidence>0.9"
    (unclosed,) = baselines.classifier_texts(["2+2"], [cut], analysis=True)
    for text in (with_analysis, without, unclosed):
        assert "0.9" not in text
    assert "no tags" in baselines.classifier_texts(["p"], ["no tags"])[0]
    with pytest.raises(UserError, match="1 problems but 0"):
        baselines.classifier_texts(["p"], [])
    with pytest.raises(UserError, match="'tbac'"):
        baselines.classifier_texts(["p"], ["c"], format="tbac")


def test_losses_equal_their_closed_forms():
    logits, correct = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1, 0, 1])
    p = 1 / (1 + np.exp(-logits.numpy().astype(float)))
    c = correct.numpy()
    bce = -(c * np.log(p) + (1 - c) * np.log(1 - p)).mean()
    assert float(baselines.classifier_loss(logits, correct, "bce")) == pytest.approx(bce, rel=1e-6)
    brier = ((p - c) ** 2).mean()
    assert float(baselines.classifier_loss(logits, correct, "brier")) == pytest.approx(
        brier, rel=1e-6
    )


def tiny_classifier(loss, tmp_path):
    tokenizer = byte_tokenizer()
    tiny_llama(len(tokenizer), hidden=32, layers=1, heads=2).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return baselines.SequenceClassifier.from_pretrained(tmp_path / "base", loss=loss)


@pytest.mark.parametrize("loss", baselines.LOSSES)
def test_classifier_learns_and_survives_saving(loss, tmp_path):
    classifier = tiny_classifier(loss, tmp_path)
    rng = np.random.default_rng(0)
    c = rng.integers(0, 2, 128)
    texts = [f"{'x' * rng.integers(1, 6)}{'+' if y else '-'}" for y in c]
    start = baselines.classifier_loss(
        torch.logit(torch.tensor(classifier.predict(texts))), torch.tensor(c), loss
    )
    losses = classifier.fit(texts, c, epochs=6, batch_size=16, learning_rate=1e-2, seed=0)
    assert len(losses) == 48
    assert losses[0] == pytest.approx(float(start), abs=0.15)
    assert losses[-1] < losses[0] / 3
    found = classifier.predict(["xx+", "xxx-", "x+"])
    assert found[0] > 0.8
    assert found[1] < 0.2
    assert found[2] > 0.8
    np.testing.assert_allclose(classifier.predict(["xxx-"])[0], found[1], atol=1e-5)
    classifier.save(tmp_path / "done")
    again = baselines.SequenceClassifier.load(tmp_path / "done")
    np.testing.assert_allclose(again.predict(["xx+", "xxx-", "x+"]), found, atol=1e-6)
    assert (again.loss, again.max_length) == (loss, 2048)


def test_classifier_refuses_what_does_not_fit(tmp_path):
    classifier = tiny_classifier("bce", tmp_path)
    with pytest.raises(UserError, match="1 values"):
        classifier.fit(["a"], [1, 0])
    with pytest.raises(UserError, match="batch_size"):
        classifier.predict(["a"], batch_size=0)
    with pytest.raises(UserError, match="not a saved classifier"):
        baselines.SequenceClassifier.load(tmp_path)
    model, tokenizer = classifier.model, classifier.tokenizer
    with pytest.raises(UserError, match="Did you mean 'brier'"):
        baselines.SequenceClassifier(model, tokenizer, loss="brir")
    with pytest.raises(UserError, match="max_length"):
        baselines.SequenceClassifier(model, tokenizer, max_length=0)
    model.config.num_labels = 2
    with pytest.raises(UserError, match="num_labels=1"):
        baselines.SequenceClassifier(model, tokenizer)
