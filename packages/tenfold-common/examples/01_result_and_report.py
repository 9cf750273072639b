# %% [markdown]
# # A result, checked, saved and shown
# A claim is measured, saved as strict JSON with its provenance, and shown as one HTML page.
# Needs only the standard library. Run it as a script, or open it as a notebook with jupytext.

# %%
import argparse
import random
import time
from pathlib import Path

from tenfold_common import Claim, Result, Table, atomic_write, environment, html_report

parser = argparse.ArgumentParser(description="toss a coin and report it")
parser.add_argument("--out", type=Path, default=Path("out/example"))
parser.add_argument("--smoke", action="store_true", help="toss a little only")
args, _ = parser.parse_known_args()  # a notebook passes arguments of its own

# %%
start = time.perf_counter()
rows = []
for seed in (0, 1, 2):
    generator = random.Random(seed)
    tosses = 20_000 if args.smoke else 1_000_000
    rows.append([seed, sum(generator.random() < 0.5 for _ in range(tosses)) / tosses])
worst = max(abs(share - 0.5) for _, share in rows)

# %%
claim = Claim(
    "fair coin", "heads in half of the tosses", worst, "|share - 0.5| < 0.02", worst < 0.02
)
result = Result(
    package="coin",
    title="Is Python's coin fair?",
    summary=f"{tosses} tosses for each of three seeds.",
    seeds=[0, 1, 2],
    claims=[claim],
    tables=[Table("Share of heads", ["seed", "share"], rows)],
    seconds=time.perf_counter() - start,
    environment=environment(),
)
result.save(args.out / "coin")
with atomic_write(args.out / "index.html", "w") as page:
    page.write(html_report([(result, args.out / "coin")]))
print(result.markdown())
