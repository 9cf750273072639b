# %% [markdown]
# A piece as ids and back: no model needed.

# %%
import tempfile
from pathlib import Path

from midi_llm import AMTTokenizer, Notes, Style, read_notes, write_midi

notes = Notes.of([0.0, 0.5, 1.0, 4.0], 0.45, [0, 0, 33, 0], [60, 64, 36, 67])
file = Path(tempfile.mkdtemp()) / "tune.mid"
write_midi(notes, file, Style(tempo=90, key="C major"))

# %%
tokenizer = AMTTokenizer()
ids = tokenizer.encode(file).ids
print(len(ids) // 3)  # 6
print(tokenizer.amt.block(ids[-6]), tokenizer.amt.block(ids[-4]))  # time rest

# %% The silence of three seconds is filled with two rests; they are no notes.
back = tokenizer.decode(ids)
print(sum(len(track.notes) for track in back.tracks))  # 4
print(round(float(read_notes(file).onset[-1]), 3))  # 4.0
