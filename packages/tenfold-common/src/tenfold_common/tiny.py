"""Tokenizers and models made on the spot, real transformers objects without a download.

Tokenizers start with `<pad>` 0, `<bos>` 1, `<eos>` 2 and add none of them by themselves; the
models use the same three ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_SPECIALS = ("<pad>", "<bos>", "<eos>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per UTF-8 byte: any text goes in and comes out unchanged.

    Returns:
        A tokenizer of 259 tokens: the three special ones and the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*_SPECIALS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer, extra=[])


def word_tokenizer(words: Sequence[str], specials: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word; text is split at white space.

    Args:
        words: The vocabulary, without white space or repetition.
        specials: More special tokens, such as `"<think>"`; found anywhere in a text.

    Returns:
        A tokenizer: `<pad>`, `<bos>`, `<eos>`, `<unk>`, `specials`, `words`, in this order.

    Raises:
        UserError: a word is empty, holds white space or occurs twice.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = [*_SPECIALS, "<unk>", *specials, *words]
    seen: set[str] = set()
    for token in tokens:
        if token.split() != [token]:
            raise UserError(f"token {token!r} must be one word without white space")
        if token in seen:
            raise UserError(f"token {token!r} occurs twice")
        seen.add(token)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(tokenizer, extra=["<unk>", *specials])


def tiny_llama(
    vocab_size: int,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    **named: object,
) -> PreTrainedModel:
    """Make a small Llama with random weights, in float32 on the CPU, in eval mode.

    Equal arguments give equal weights, and the global random state is left as it was.

    Args:
        vocab_size: Number of tokens, at least 3.
        hidden: Width of the residual stream, a multiple of `heads`.
        layers: Number of layers.
        heads: Number of query heads, a multiple of `kv_heads`.
        kv_heads: Number of key and value heads.
        seed: Fixes the weights.
        **named: Other fields of `LlamaConfig`, such as `tie_word_embeddings`; unknown ones raise.

    Returns:
        A `LlamaForCausalLM`.

    Raises:
        UserError: the sizes do not fit together, or a field is unknown.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = _sizes(vocab_size, hidden, layers, heads, kv_heads)
    return _seeded(LlamaForCausalLM, LlamaConfig, {**sizes, **named}, seed)


def tiny_qwen(
    vocab_size: int,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    family: str = "qwen3",
    **named: object,
) -> PreTrainedModel:
    """Make a small Qwen with random weights, in float32 on the CPU, in eval mode.

    Args:
        vocab_size: Number of tokens, at least 3.
        hidden: Width of the residual stream, a multiple of `heads`.
        layers: Number of layers.
        heads: Number of query heads, a multiple of `kv_heads`.
        kv_heads: Number of key and value heads.
        seed: Fixes the weights.
        family: `"qwen3"` (normalises queries and keys) or `"qwen2"` (biases on them).
        **named: Other fields of the config, such as `tie_word_embeddings`; unknown ones raise.

    Returns:
        A `Qwen3ForCausalLM` or `Qwen2ForCausalLM`.

    Raises:
        UserError: the sizes do not fit together, or a field or the family is unknown.
    """
    import transformers

    sizes = _sizes(vocab_size, hidden, layers, heads, kv_heads)
    if family == "qwen3":
        sizes["head_dim"] = hidden // heads
        kinds = (transformers.Qwen3ForCausalLM, transformers.Qwen3Config)
    elif family == "qwen2":
        kinds = (transformers.Qwen2ForCausalLM, transformers.Qwen2Config)
    else:
        raise UserError(f"family must be 'qwen2' or 'qwen3', not {family!r}")
    return _seeded(*kinds, {**sizes, **named}, seed)


def _wrapped(tokenizer: object, *, extra: list[str]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = _SPECIALS
    unknown = {"unk_token": extra[0]} if extra else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=extra[1:],
        clean_up_tokenization_spaces=False,
        **unknown,
    )


def _sizes(
    vocab_size: int, hidden: int, layers: int, heads: int, kv_heads: int
) -> dict[str, object]:
    numbers = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    for name, number in numbers.items():
        least = len(_SPECIALS) if name == "vocab_size" else 1
        if number < least:
            raise UserError(f"{name} must be at least {least}, not {number}")
    if hidden % heads or heads % kv_heads:
        raise UserError(
            f"hidden {hidden} must be a multiple of heads {heads}, and heads of kv_heads {kv_heads}"
        )
    return {
        **numbers,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _seeded(model: type, config: type, fields: dict[str, object], seed: int) -> PreTrainedModel:
    import torch

    known = config().to_dict()
    for name in fields:
        if name not in known:
            near = suggest(name, known)
            raise UserError(f"{config.__name__} has no field {name!r}.{near}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return model(config(**fields)).eval()
