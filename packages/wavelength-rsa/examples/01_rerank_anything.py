# %% [markdown]
# # Say what sets it apart
# Candidates from anywhere (here: written down, as a captioning model would propose them) and a
# score of how well each fits each state. The reranker prefers what a listener would not confuse.

# %%
from wavelength_rsa import pragmatic_rerank

pictures = {
    "a": "a brown dog runs on a beach",
    "b": "a brown dog sleeps on a sofa",
    "c": "a white cat sleeps on a sofa",
}
captions = ["a dog", "a brown dog", "a sleeping dog", "a dog on a sofa", "a pet on a sofa"]
proposed = [40, 25, 10, 15, 10]  # how often the captioning model said each


def fits(caption: str, picture: str) -> float:
    """Log of how well a caption fits: its words in the picture, sleeping told by its stem."""
    words = [w.replace("sleeping", "sleeps") for w in caption.split() if w not in ("a", "on")]
    return float(sum(2.0 * (w in pictures[picture].split()) for w in words) - len(words))


# %%
for alpha in (0.0, 1.0, 4.0):
    best = pragmatic_rerank(captions, list(pictures), "b", fits, proposed, alpha=alpha)[0]
    print(f"alpha {alpha:g}: {best.candidate} ({best.prob:.2f})")
# alpha 0: a dog (0.40)
# alpha 1: a dog (0.34)
# alpha 4: a dog on a sofa (0.43)
