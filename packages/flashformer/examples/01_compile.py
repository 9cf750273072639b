# %% [markdown]
# # Compile a model and generate
# A small Llama with random weights stands for a model of yours; it is a real transformers object.

# %%
import torch

import flashformer as ff
from tenfold_common.tiny import byte_tokenizer, tiny_llama

tokenizer = byte_tokenizer()
model = tiny_llama(len(tokenizer), hidden=128, layers=4, max_position_embeddings=512)
fast = ff.compile(model)

# %%
ids = tokenizer("The whole model in one call", return_tensors="pt").input_ids
ours = fast.generate(ids, max_new_tokens=100, do_sample=False)
theirs = model.generate(ids, max_new_tokens=100, do_sample=False, pad_token_id=0)
print(torch.equal(ours, theirs))  # True

# %%
for weights in ("bf16", "int8", "int4"):
    found = ff.verify(ff.compile(model, weights=weights, group_size=32), model, prompt=ids, n=100)
    print(weights, found)

# %%
print(ff.explain(fast.spec, weights="int4", group=32, gpu="h200"))
