"""`generate` as transformers means it: natively where it can be, else by transformers' loop."""

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flashformer.cache import KVCache
from flashformer.sampling import COLDEST, check_seed
from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig

    from flashformer.model import FlashModel

# Fields that the native path heeds, or that change nothing for one greedy or sampled sequence.
_NATIVE = {
    "max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "bos_token_id", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "use_cache", "transformers_version",
    "cache_implementation", "num_beams", "num_return_sequences", "decoder_start_token_id",
    "repetition_penalty", "length_penalty", "early_stopping", "_from_model_config",
    "no_repeat_ngram_size", "min_length", "diversity_penalty", "num_beam_groups",
    "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "remove_invalid_values",
    "renormalize_logits", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate",
}  # fmt: skip
# Of these the values that do nothing.
_NEUTRAL = {
    "repetition_penalty": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "diversity_penalty": (None, 0, 0.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "return_dict_in_generate": (None, False),
}
_SAMPLED = {
    "top_k": (0,),
    "top_p": (None, 1, 1.0),
    "min_p": (None, 0, 0.0),
    "typical_p": (None, 1, 1.0),
}
_REFUSED = {
    "num_beams": ((None, 1), "beam search"),
    "num_beam_groups": ((None, 1), "beam search"),
    "num_return_sequences": ((None, 1), "several sequences"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search"),
    "prompt_lookup_num_tokens": ((None,), "prompt lookup"),
    "dola_layers": ((None,), "DoLa"),
    "guidance_scale": ((None, 1, 1.0), "guidance"),
    "assistant_early_exit": ((None,), "assisted generation"),
    "output_attentions": ((None, False), "attention weights"),
    "output_hidden_states": ((None, False), "hidden states"),
}


def generate(
    model: "FlashModel",
    input_ids: "Tensor | None",
    generation_config: "GenerationConfig | None",
    logits_processor: Any,
    stopping_criteria: Any,
    streamer: Any,
    *,
    attention_mask: "Tensor | None",
    cache: KVCache | None,
    seed: int | None,
    named: dict[str, Any],
) -> Any:
    """Do what `FlashModel.generate` says."""
    if "inputs" in named:  # what transformers calls it
        if input_ids is not None:
            raise UserError("inputs and input_ids are the same; give one of them")
        input_ids = named.pop("inputs")
    ids = _checked(model, input_ids, attention_mask)
    tokenizer = named.pop("tokenizer", None)
    config = _config(model, generation_config, named)
    _check_sampling(config, seed)
    length = ids.shape[1]
    new = _new_tokens(model, config, length)
    if cache is None:
        cache = model.new_cache(length + new)
    elif not isinstance(cache, KVCache):
        raise UserError(
            f"past_key_values is a {type(cache).__name__}, must be a KVCache; make one with "
            "KVCache.from_transformers"
        )
    elif cache.length >= length:
        raise UserError(
            f"past_key_values holds {cache.length} positions and input_ids {length}: it must hold "
            "fewer, of the same sequence"
        )
    cache.check_room(length + new - cache.length - 1)
    if logits_processor or stopping_criteria or not _native(config):
        return _by_transformers(
            model, ids, config, logits_processor, stopping_criteria, streamer, cache, seed,
            tokenizer,
        )  # fmt: skip
    return _natively(model, ids, config, streamer, cache, seed, new)


def _natively(
    model: "FlashModel",
    ids: "Tensor",
    config: "GenerationConfig",
    streamer: Any,
    cache: KVCache,
    seed: int | None,
    new: int,
) -> "Tensor":
    import torch

    from flashformer.model import BURST
    from flashformer.sampling import choose

    ends = _ends(config)
    sampled = bool(config.do_sample)
    temperature = (
        (1.0 if config.temperature is None else float(config.temperature)) if sampled else None
    )
    if sampled and seed is None:
        seed = int(torch.randint(2**62, ()))
    if streamer is not None:
        streamer.put(ids.cpu())
    logits = model.prefill(ids[0, cache.length :], cache)
    # The token at place p of a sequence is drawn with the counter p - 1, wherever it is drawn.
    found = [choose(logits, temperature, seed or 0, cache.length - 1)]
    if streamer is not None:
        streamer.put(torch.tensor(found[-1:]))
    burst = 4 if streamer is not None else BURST
    while len(found) < new and found[-1] not in ends:
        more = model.decode(
            cache, found[-1], steps=min(burst, new - len(found)), temperature=temperature,
            seed=seed or 0, ends=ends,
        )  # fmt: skip
        found += more.tolist()
        if streamer is not None:
            for token in more:
                streamer.put(token[None].cpu())
    if streamer is not None:
        streamer.end()
    return torch.cat([ids, torch.tensor([found], device=ids.device)], 1)


def _by_transformers(
    model: "FlashModel",
    ids: "Tensor",
    config: "GenerationConfig",
    logits_processor: Any,
    stopping_criteria: Any,
    streamer: Any,
    cache: KVCache,
    seed: int | None,
    tokenizer: Any,
) -> Any:
    import torch

    decoder = _decoder(model, cache)
    config.use_cache = False  # of transformers; ours is beside it
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return decoder.generate(
            ids,
            generation_config=config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            attention_mask=torch.ones_like(ids),
            tokenizer=tokenizer,  # for stop_strings
        )


def _decoder(model: "FlashModel", cache: KVCache) -> Any:
    """Return a model of transformers whose forward pass is ours, one sequence at a time."""
    import torch
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Decoder(PreTrainedModel, GenerationMixin):
        main_input_name = "input_ids"
        config_class = type(model.config)
        _is_stateful = True  # nothing that rewinds

        @property
        def device(self) -> Any:
            return model.device

        @property
        def dtype(self) -> Any:
            return model.dtype

        def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, input_ids: "Tensor", attention_mask: "Tensor | None" = None, **_: Any
        ) -> dict[str, Any]:
            return {"input_ids": input_ids[:, cache.length :]}

        def forward(self, input_ids: "Tensor", **_: Any) -> CausalLMOutput:
            logits = model.prefill(input_ids[0], cache)
            batch: Any = logits[None, None]
            return CausalLMOutput(logits=batch)

    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # there is no attention in it to choose
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return Decoder(config)


def _checked(
    model: "FlashModel", input_ids: "Tensor | None", attention_mask: "Tensor | None"
) -> "Tensor":
    import torch

    if input_ids is None:
        raise UserError("generate needs input_ids, [1, n] with n >= 1")
    try:
        ids = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"input_ids must be [1, n] whole numbers, not {type(input_ids).__name__}; the output "
            f"of a tokenizer has them as .input_ids ({error})"
        ) from error
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise UserError(f"input_ids must be [1, n] with n >= 1, not of shape {list(ids.shape)}")
    if ids.shape[0] != 1:
        raise UserError(
            f"input_ids has {ids.shape[0]} sequences; this model decodes one at a time. Call "
            "generate for each, or use the transformers model for batches"
        )
    if attention_mask is not None:
        mask = torch.as_tensor(attention_mask)
        if mask.shape != ids.shape:
            raise UserError(
                f"attention_mask has the shape {list(mask.shape)}, input_ids {list(ids.shape)}"
            )
        if not bool((mask == 1).all()):
            raise UserError(
                "attention_mask has zeros: padding is not supported, and one sequence needs none; "
                "leave the padding out"
            )
    return model._checked(ids[0])[None]


def _config(
    model: "FlashModel", given: "GenerationConfig | None", named: dict[str, Any]
) -> "GenerationConfig":
    if "assistant_model" in named or "prefix_allowed_tokens_fn" in named:
        raise UserError(
            "assisted generation and prefix_allowed_tokens_fn are not supported; use the "
            "transformers model"
        )
    config = copy.deepcopy(given if given is not None else model.generation_config)
    if given is not None:  # as in transformers, what it leaves open is as the model has it
        defaults = model.generation_config.to_dict()
        config.update(**defaults, defaults_only=True, allow_custom_entries=True)
    unknown = config.update(**named)
    if unknown:
        name = next(iter(unknown))
        raise UserError(f"generate knows no argument {name!r}.{suggest(name, vars(config))}")
    for name, (allowed, what) in _REFUSED.items():
        value = getattr(config, name, None)
        if value not in allowed:
            raise UserError(
                f"{name} is {value!r}: {what} is not supported here (greedy decoding and sampling "
                "are); use the transformers model"
            )
    return config


def _check_sampling(config: "GenerationConfig", seed: int | None) -> None:
    temperature = config.temperature
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if (
        config.do_sample
        and temperature is not None
        and not (number and COLDEST <= temperature < float("inf"))
    ):
        raise UserError(
            f"temperature must be a finite number of at least {COLDEST}, not {temperature!r}; "
            "do_sample=False always takes the most likely token"
        )
    check_seed(seed)
    for name in ("max_new_tokens", "max_length", "top_k", "num_return_sequences"):
        value = getattr(config, name, None)
        least = 0 if name == "top_k" else 1
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < least
        ):
            raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")
    ends = config.eos_token_id
    for end in ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]:
        if isinstance(end, bool) or not isinstance(end, int):
            raise UserError(f"eos_token_id must be a token or a list of them, not {ends!r}")


def _new_tokens(model: "FlashModel", config: "GenerationConfig", length: int) -> int:
    if config.max_new_tokens is not None:
        new = config.max_new_tokens
    else:
        new = (20 + length if config.max_length is None else config.max_length) - length
    if new < 1:
        raise UserError(
            f"the prompt has {length} tokens, so that none may follow (max_length "
            f"{config.max_length}, max_new_tokens {config.max_new_tokens}); give max_new_tokens"
        )
    if length + new > model.max_len:
        raise UserError(
            f"the prompt has {length} tokens and {new} more are asked for, but the model was "
            f"compiled for max_len {model.max_len}; compile with a larger one, or ask for less"
        )
    return new


def _native(config: "GenerationConfig") -> bool:
    """Whether the native loop has all that a config asks for."""
    if not set(config.to_diff_dict()) <= _NATIVE:
        return False
    checks = {**_NEUTRAL, **(_SAMPLED if config.do_sample else {})}
    return all(getattr(config, name, None) in values for name, values in checks.items())


def _ends(config: "GenerationConfig") -> Sequence[int]:
    ends = config.eos_token_id
    if ends is None:
        return ()
    return [int(t) for t in ends] if isinstance(ends, list | tuple) else [int(ends)]
