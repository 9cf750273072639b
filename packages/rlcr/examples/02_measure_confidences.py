# %% [markdown]
# # Measuring confidences that you have
# Any confidences and any correctness will do; no model is involved.

# %%
import numpy as np

from rlcr import Platt, calibration_report

random = np.random.default_rng(0)
truth = random.beta(2, 1, 2000)  # the chance of each answer to be right
correct = (random.random(2000) < truth).astype(float)
stated = np.clip(0.5 + 0.6 * truth, 0, 1)  # over-confident
print(calibration_report(stated, correct))

# %% [markdown]
# Recalibrated on one half, measured on the other.

# %%
half = Platt().fit(stated[:1000], correct[:1000])
before = calibration_report(stated[1000:], correct[1000:], ci=None)
after = calibration_report(half.predict(stated[1000:]), correct[1000:], ci=None)
print(f"ECE {before.ece:.3f} before, {after.ece:.3f} after")
