# %% [markdown]
# The grammar in a decoding loop of your own: here the "model" is a uniform draw.

# %%
import numpy as np

from midi_llm import AMTConfig, GenerationConstraints
from midi_llm.grammar import Grammar, Rules

rules = Rules(AMTConfig(), GenerationConstraints(instruments=["piano"], key="A minor", end_time=8))
grammar = Grammar(rules, max_events=20)
rng = np.random.default_rng(0)
while not grammar.finished:
    grammar.push(int(rng.choice(grammar.allowed().ids())))

# %%
pitches = {note % 128 % 12 for _, duration, note in grammar.events if note >= 0}
print(pitches <= {9, 11, 0, 2, 4, 5, 7, 8})  # True
print(all(time < 800 for time, _, _ in grammar.events))  # True
