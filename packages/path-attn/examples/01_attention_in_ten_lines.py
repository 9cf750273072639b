# %% [markdown]
# # PaTH attention by itself
# The operation takes queries, keys, values and, for every token, a unit direction `w` and a
# strength `beta`.

# %%
import torch

from path_attn import path_attention

torch.manual_seed(0)
q, k, v, w = (torch.randn(1, 300, 4, 32) for _ in range(4))
w = torch.nn.functional.normalize(w, dim=-1)
beta = 2 * torch.rand(1, 300, 4)
out, _ = path_attention(q, k, v, w, beta)
print(out.shape)  # torch.Size([1, 300, 4, 32])

# %% [markdown]
# With `beta = 0` nothing is reflected, and what remains is ordinary causal attention without
# positions.

# %%
plain, _ = path_attention(q, k, v, w, torch.zeros_like(beta))
heads = [x.transpose(1, 2) for x in (q, k, v)]
sdpa = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
print(f"largest difference from SDPA: {(plain - sdpa).abs().max():.1e}")  # about 1e-6
