"""A text-to-music model of random weights, small enough for a test."""

from midi_llm.decode import MidiLM
from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
from midi_llm.vocab import AMTConfig
from tenfold_common.tiny import tiny_llama, word_tokenizer


def tiny_lm(amt: AMTConfig | None = None, **named: int) -> MidiLM:
    amt = amt or AMTConfig.small()
    tokenizer = word_tokenizer(["a", "calm", "piano", "piece"])
    model = expand_vocabulary(tiny_llama(len(tokenizer), **named), amt)  # type: ignore[arg-type]
    return MidiLM(model, TextMidiProcessor(tokenizer, amt, len(tokenizer), system=""))
