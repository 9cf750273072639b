"""A tiny text-to-music model with random weights, for the tests of vLLM."""

from pathlib import Path

from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
from midi_llm.vocab import AMTConfig
from tenfold_common.tiny import byte_tokenizer, tiny_llama

LENGTH = 1024
SMALL = AMTConfig.small()
WITH_CONTROLS = AMTConfig(20, 20, 4, 17, 128, True)


def write_model(folder: Path, amt: AMTConfig) -> Path:
    """Write a model whose likeliest ids are far from the others, and its processor."""
    tokenizer = byte_tokenizer()
    model = tiny_llama(
        len(tokenizer), hidden=128, max_position_embeddings=LENGTH, initializer_range=0.1,
        tie_word_embeddings=True,
    )  # fmt: skip
    expand_vocabulary(model, amt)
    model.save_pretrained(folder)
    TextMidiProcessor(tokenizer, amt, len(tokenizer)).save_pretrained(folder)
    return folder
