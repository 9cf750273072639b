# %% [markdown]
# # Decoding in a loop of your own
# One piece of the library: logits go into your code, your token comes back. Here the loop tries
# continuations of a prompt by three likely tokens and keeps the best, going back by `crop`.

# %%
import torch

import flashformer as ff
from tenfold_common.tiny import byte_tokenizer, tiny_llama

tokenizer = byte_tokenizer()
model = ff.compile(tiny_llama(len(tokenizer), hidden=128, layers=4, max_position_embeddings=512))
prompt = tokenizer("To be or not to be").input_ids

# %%
cache = model.new_cache()
first = torch.log_softmax(model.feed(prompt, cache), -1)
scores: dict[tuple[int, int, int], float] = {}
for a in first.topk(3).indices.tolist():
    second = torch.log_softmax(model.step(a, cache)[0], -1)
    for b in second.topk(3).indices.tolist():
        third = torch.log_softmax(model.step(b, cache)[0], -1)
        c = int(third.argmax())
        scores[a, b, c] = float(first[a] + second[b] + third[c])
        cache.crop(-1)
    cache.crop(-1)
best = max(scores, key=scores.__getitem__)
print(len(scores), len(cache) == len(prompt))  # 9 True

# %%
# Greedy decoding is one of the nine, so the best is at least as likely.
greedy = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)
print(scores[best] >= scores[tuple(greedy[0, -3:].tolist())])  # True
