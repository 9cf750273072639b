# %% [markdown]
# # Train, save, generate
# `train` goes through `transformers.Trainer`; what it leaves is an ordinary model folder.
# Run with `--smoke` for a few steps only.

# %%
import sys
import tempfile

from path_attn.config import TrainConfig
from path_attn.evaluate import continue_text
from path_attn.training import load_run, train

steps = 5 if "--smoke" in sys.argv else 150
with tempfile.TemporaryDirectory() as folder:
    config = TrainConfig(
        task="fflm",
        length=64,
        max_steps=steps,
        logging_steps=5,
        save_steps=steps,
        output_dir=f"{folder}/run",
    )
    model, tokenizer, _ = load_run(train(config))
    text = continue_text(model, tokenizer, "w 1 i 0 i 0 i 1 i 0 r", max_new_tokens=1, temperature=0)
    print(text)  # ends in 1, the bit that was written
