"""Models of random weights whose pieces last, and what tells of their notes."""

import functools

import numpy as np
import torch

from midi_llm.decode import MidiLM
from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
from midi_llm.notes import Note
from midi_llm.tokenizer import AMTTokenizer
from midi_llm.vocab import AMTConfig
from tenfold_common.tiny import byte_tokenizer, tiny_llama

SMALL = AMTConfig.small()
ANTICIPATING = AMTConfig(20, 20, 4, 17, 128, True)


@functools.cache
def tokenizer(config):
    return AMTTokenizer(config)


def make(amt=SMALL, *, stop=-25.0, bias=True, room=512, hidden=32, seed=3):
    """Make a model whose pieces last: its head is steep, and early onsets are likely."""
    text = byte_tokenizer()
    model = tiny_llama(
        len(text), hidden=hidden, layers=1, tie_word_embeddings=False, seed=seed,
        max_position_embeddings=room,
    )  # fmt: skip
    expand_vocabulary(model, amt, seed=seed)
    rows = model.config.vocab_size
    head = torch.nn.Linear(hidden, rows, bias=bias)
    offset = model.config.music_offset
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # what came before matters
        head.weight.copy_(model.lm_head.weight * 20)
        if bias:
            head.bias.zero_()
            head.bias[offset : offset + amt.times] = -0.3 * torch.arange(amt.times)
            head.bias[offset + amt.separator] = stop
            head.bias[offset + amt.duration_offset] = -2  # rests
    model.set_output_embeddings(head)
    return MidiLM(model.eval(), TextMidiProcessor(text, amt, len(text), system=""))


@functools.cache
def singer(amt=SMALL, **named):
    return make(amt, **named)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first.columns, second.columns, strict=True))


class Told(list):
    """Takes notes as they come; `of` gives those of a piece."""

    def __call__(self, piece, note):
        self.append((piece, note))

    def of(self, piece):
        return [note for number, note in self if number == piece]


def as_told(notes):
    return [Note(*(c[i].item() for c in notes.columns[:4])) for i in range(len(notes))]
