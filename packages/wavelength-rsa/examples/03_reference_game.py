# %% [markdown]
# # A reference game by hand
# Blue square, blue circle, green square (Frank and Goodman, 2012). Who hears "blue" reasons: for
# the circle the speaker could have said "circle", so the square is meant. Gradients reach alpha.

# %%
import numpy as np
import torch

from wavelength_rsa import RSA

objects = ["blue square", "blue circle", "green square"]
words = ["blue", "green", "square", "circle"]
fits = np.array([[float(w in o) for o in objects] for w in words])  # [utterances, states]
with np.errstate(divide="ignore"):
    literal = np.log(fits / fits.sum(1, keepdims=True))

heard = RSA(alpha=1.0, null=None).listener(literal)
print(heard[0].round(2).tolist())  # [0.6, 0.4, 0.0]

# %%
alpha = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
probs = RSA(alpha=alpha, null=None).listener(torch.from_numpy(literal))
probs[0, 0].backward()
print(alpha.grad is not None and bool(alpha.grad > 0))  # True: more rational, more surely square
