# %% [markdown]
# # One piece in your own loop: the PaTH layer on the flip-flop language
# No Trainer, no command line: `PaTHForCausalLM` and the data set in a plain PyTorch loop.
# Run with `--smoke` for a few steps only.

# %%
import sys

import torch
from torch.utils.data import DataLoader

from path_attn import PaTHConfig, PaTHForCausalLM
from path_attn.evaluate import task_error
from path_attn.tasks import FlipFlop

steps = 5 if "--smoke" in sys.argv else 120
torch.manual_seed(0)
config = PaTHConfig(
    vocab_size=5,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    position_encoding="path",
    bos_token_id=None,
    eos_token_id=None,
)
model = PaTHForCausalLM(config)
loader = DataLoader(FlipFlop(length=64, size=32 * steps), batch_size=32)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)

# %%
for batch in loader:
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()

held_out = FlipFlop(length=64, size=200, split="validation")
print(
    f"error after {steps} steps: {task_error(model, held_out)['error']:.2%}"
)  # 0.00% after 120 steps
