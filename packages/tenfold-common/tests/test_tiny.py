import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold_common import UserError, byte_tokenizer, tiny_llama, tiny_qwen, word_tokenizer

BYTES = byte_tokenizer()


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_survives_the_byte_tokenizer(text):
    ids = BYTES(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert BYTES.decode(ids) == text


def test_byte_tokenizer_ids():
    assert len(BYTES) == BYTES.vocab_size == 259
    assert (BYTES.pad_token_id, BYTES.bos_token_id, BYTES.eos_token_id) == (0, 1, 2)
    assert BYTES("a<eos>")["input_ids"][-1] == 2
    ids = {BYTES(chr(i))["input_ids"][0] for i in range(128)}
    assert len(ids) == 128
    assert min(ids) >= 3


def test_byte_tokenizer_pads_and_survives_saving(tmp_path):
    batch = BYTES(["a", "abc"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 3)
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    BYTES.save_pretrained(tmp_path)
    back = type(BYTES).from_pretrained(tmp_path)
    text = "Größe  5 — ok\n <eos>"
    assert back(text)["input_ids"] == BYTES(text)["input_ids"]
    assert back.decode(back(text)["input_ids"]) == text


def test_word_tokenizer():
    tokenizer = word_tokenizer(["yes", "no", "?"], ["<think>"])
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [
        *("<pad>", "<bos>", "<eos>", "<unk>", "<think>", "yes", "no", "?")
    ]
    ids = tokenizer("yes  maybe\nno<think>?")["input_ids"]
    assert ids == [5, 3, 6, 4, 7]
    assert tokenizer.decode([5, 6, 7]) == "yes no ?"
    assert tokenizer.decode([1, 5, 4, 6, 2], skip_special_tokens=True) == "yes no"
    assert tokenizer.unk_token_id == 3


@pytest.mark.parametrize(
    ("words", "specials", "message"),
    [
        (["a b"], [], "'a b' must be one word"),
        ([""], [], "'' must be one word"),
        (["a", "a"], [], "'a' occurs twice"),
        (["<eos>"], [], "'<eos>' occurs twice"),
        (["a"], ["a"], "'a' occurs twice"),
    ],
)
def test_bad_words_are_refused(words, specials, message):
    with pytest.raises(UserError, match=message):
        word_tokenizer(words, specials)


MAKERS = pytest.mark.parametrize(
    ("make", "kind"),
    [
        (tiny_llama, "LlamaForCausalLM"),
        (tiny_qwen, "Qwen3ForCausalLM"),
        (lambda *a, **k: tiny_qwen(*a, family="qwen2", **k), "Qwen2ForCausalLM"),
    ],
    ids=["llama", "qwen3", "qwen2"],
)


@MAKERS
def test_models_are_real_small_and_repeatable(make, kind):
    state = torch.random.get_rng_state()
    model = make(50, hidden=32, layers=1, heads=2, kv_heads=1, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(model).__name__ == kind
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.tensor([[1, 7, 9]])
    with torch.no_grad():
        logits = model(ids).logits
        again = make(50, hidden=32, layers=1, heads=2, kv_heads=1, seed=3)(ids).logits
        other = make(50, hidden=32, layers=1, heads=2, kv_heads=1, seed=4)(ids).logits
    assert logits.shape == (1, 3, 50)
    assert torch.equal(logits, again)
    assert not torch.equal(logits, other)
    config = model.config
    assert (config.num_hidden_layers, config.num_key_value_heads) == (1, 1)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert (
        config.hidden_size // config.num_attention_heads == model.model.layers[0].self_attn.head_dim
    )


@MAKERS
def test_models_generate_save_and_load(make, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make(259, hidden=32, layers=1, heads=2, kv_heads=2)
    ids = BYTES("ab", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 5)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back).__name__ == kind
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)


@MAKERS
def test_other_fields_are_passed_on_and_unknown_ones_raise(make, kind):
    assert make(20, layers=1, tie_word_embeddings=True).config.tie_word_embeddings
    with pytest.raises(UserError, match="has no field 'rope_thta'"):
        make(20, rope_thta=1.0)
    with pytest.raises(UserError, match="Did you mean 'intermediate_size'"):
        make(20, intermediate_siz=1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 2}, "vocab_size must be at least 3, not 2"),
        ({"layers": 0}, "num_hidden_layers must be at least 1, not 0"),
        ({"heads": 0}, "num_attention_heads must be at least 1"),
        ({"hidden": 63}, "hidden 63 must be a multiple of heads 4"),
        ({"kv_heads": 3}, "heads of kv_heads 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    for make in (tiny_llama, tiny_qwen):
        with pytest.raises(UserError, match=message):
            make(**{"vocab_size": 10, **sizes})


def test_an_unknown_family_is_refused():
    with pytest.raises(UserError, match="family must be 'qwen2' or 'qwen3', not 'qwen9'"):
        tiny_qwen(10, family="qwen9")
