# %% [markdown]
# # Any causal language model as a listener
# Only the listener is imported. The model is made on the spot and knows nothing, so its guesses
# mean nothing; `TransformersModel("path/or/hub-name")` loads yours.

# %%
from tenfold_common.lm import TransformersModel
from tenfold_common.tiny import byte_tokenizer, tiny_llama
from wavelength_rsa import LogprobListener, Scale

tokenizer = byte_tokenizer()
model = TransformersModel(
    tiny_llama(
        len(tokenizer), hidden=32, layers=1, max_position_embeddings=4096, initializer_range=0.5
    ),
    tokenizer,
)
listener = LogprobListener(model, step=10, normalize="char")

# %%
for found in listener.distribution(Scale("Cold", "Hot"), ["lava", "a fridge"]):
    print(f"mean {found.mean:.1f}, sd {found.sd:.1f}, CRPS from 90: {found.crps(90):.1f}")
