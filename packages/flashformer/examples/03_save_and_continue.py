# %% [markdown]
# # Save a compiled model, load it, go on from a cache
# A compiled folder needs no transformers weights any more. A conversation goes on where it stopped:
# what both prompts share is not read again.

# %%
import tempfile
from pathlib import Path

import torch

import flashformer as ff
from tenfold_common.tiny import byte_tokenizer, tiny_llama

tokenizer = byte_tokenizer()
source = tiny_llama(len(tokenizer), hidden=128, layers=4, max_position_embeddings=512)
folder = Path(tempfile.mkdtemp()) / "model"
ff.compile(source, weights="int4", group_size=32).save(folder, tokenizer=tokenizer)
model = ff.load(folder)

# %%
cache = model.new_cache()
text = tokenizer("Who is there?", return_tensors="pt").input_ids
text = model.generate(text, max_new_tokens=20, past_key_values=cache, eos_token_id=[])
more = torch.cat([text, tokenizer(" Nay, answer me.", return_tensors="pt").input_ids], 1)
read = len(cache)
again = model.generate(more, max_new_tokens=20, past_key_values=cache, eos_token_id=[])
whole = model.generate(more, max_new_tokens=20, eos_token_id=[])
print(read, torch.equal(again, whole))  # 32 True
