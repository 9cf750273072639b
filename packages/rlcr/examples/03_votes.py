# %% [markdown]
# # Votes among samples of one prompt
# Equal answers are found by the verifier, not by their spelling.

# %%
from rlcr import aggregate, get_verifier

answers = ["1/2", "0.5", "3", "3", "3"]
confidences = [0.9, 0.8, 0.3, 0.2, 0.3]
same = get_verifier("math").normal_form  # needs rlcr[math]

for method in ("majority", "max", "weighted"):
    vote = aggregate(answers, confidences, method, normal_form=same)
    print(f"{method:9} {vote.answer:4} share {vote.confidence:.2f}")
# majority  3    share 0.32
# max       1/2  share 0.68
# weighted  1/2  share 0.68
