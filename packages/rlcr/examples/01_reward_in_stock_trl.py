# %% [markdown]
# # The reward in TRL's own GRPOTrainer
# Nothing but `RLCRReward` is taken from rlcr; the trainer, its settings and the model are the ones
# you have. Here the model is a tiny untrained one, so that the script runs anywhere in seconds.

# %%
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from rlcr import NoisySensor, RLCRReward

reward = RLCRReward(verifier="exact_match")  # the Brier score; the column with the gold is "answer"
print(reward.rule, f"margin {reward.rule.margin():.2f}")  # Brier() margin 0.00

# %%
task = NoisySensor()
data = Dataset.from_dict({"prompt": ["s3 4 4 4 ?", "s0 1 2 3 ?"] * 8, "answer": ["4", "2"] * 8})
trainer = GRPOTrainer(
    model=task.model(),
    reward_funcs=reward.functions(),  # format, accuracy, calibration: logged one by one
    args=GRPOConfig(
        "out/example",
        reward_weights=reward.weights,
        scale_rewards="none",  # dividing by a group's deviation would spoil the proper score
        loss_type="bnpo",
        max_steps=2,
        num_generations=4,
        per_device_train_batch_size=16,
        max_completion_length=12,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
    ),
    train_dataset=data,
    processing_class=task.tokenizer(),
)
trainer.train()
names = [name for name in trainer.state.log_history[0] if name.startswith("rlcr/")]
print(len(names) > 10)  # True: accuracy, Brier score, share of each parse error, ...
