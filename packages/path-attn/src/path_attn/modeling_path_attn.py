"""A Llama-shaped decoder on `PaTHAttention`, as a transformers model.

Importing this module registers it with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`;
touching `path_attn.PaTHForCausalLM` imports it. The registered model type is "tenfold_path_attn".
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from path_attn.configuration_path_attn import PaTHConfig
from path_attn.layers import PaTHAttention, PaTHLayerCache, ShortConv, new_columns_mask
from tenfold_common.errors import UserError

ASSISTED_KEEP_OPEN = 128  # tokens that assisted decoding may take back


class PaTHCacheLayer(CacheLayerMixin):
    """One layer's `PaTHLayerCache` behind the interface transformers calls.

    Args:
        keep_open: Columns that `crop` can always take back.
        history: Whether `crop` reaches any length, for twice the memory.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, *, keep_open: int = 32, history: bool = False) -> None:
        super().__init__()
        self.state = PaTHLayerCache(keep_open=keep_open, history=history)

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.state.length

    def get_max_length(self) -> int:
        """-1: it grows as long as memory lasts."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the columns that a mask for `query_length` new ones would cover."""
        return self.state.length + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Not used: `PaTHAttention` fills its own cache."""
        raise _foreign_attention()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Not used: `PaTHAttention` fills its own cache."""
        raise _foreign_attention()

    def activate_past_recording(self) -> None:
        """Keep more columns croppable from here on, if the cache is still empty."""
        if self.state.length == 0:
            self.state.keep_open = max(self.state.keep_open, ASSISTED_KEEP_OPEN)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns.

        Args:
            tokens_to_remove: A negative number: how many columns to remove. 0 does nothing.

        Raises:
            UserError: the number is positive, or the cache cannot be taken back so far.
        """
        if tokens_to_remove > 0:
            raise UserError(
                f"crop({tokens_to_remove}): give the number to remove as a negative number."
            )
        if tokens_to_remove < 0:
            self.state.crop(max(0, self.state.length + tokens_to_remove))

    def reset(self) -> None:
        """Forget everything."""
        self.state = PaTHLayerCache(keep_open=self.state.keep_open, history=self.state.history)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was; `beam_idx` is `[B]` int32 or int64."""
        self.state.reorder(beam_idx.long())  # beam search counts rows in int32

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in this order."""
        self.state.reorder(indices.long())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self.state.repeat(repeats)

    def offload(self) -> None:
        """Not supported."""
        raise UserError("PaTHCache cannot be offloaded.")

    def prefetch(self) -> None:
        """Not supported."""
        raise UserError("PaTHCache cannot be offloaded.")


class PaTHCache(Cache):
    """The cache of a whole `PaTHModel`: one `PaTHCacheLayer` per block.

    Args:
        config: Configuration of the model it is for.
        keep_open: Tokens that `crop` can always take back (more are possible until the next fold).
        history: Whether `crop` reaches any length, for twice the memory.
    """

    layers: list[PaTHCacheLayer]

    def __init__(self, config: PaTHConfig, *, keep_open: int = 32, history: bool = False) -> None:
        count = config.num_hidden_layers
        super().__init__(
            layers=[PaTHCacheLayer(keep_open=keep_open, history=history) for _ in range(count)]
        )


class PaTHMLP(nn.Module):
    """Gated MLP, `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: PaTHConfig) -> None:
        super().__init__()
        inner = config.intermediate_size or 0
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PaTHDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: PaTHConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = PaTHAttention.from_config(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = PaTHMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: PaTHLayerCache | None = None,
        cu_seqlens: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`; arguments as in `PaTHAttention.forward`."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask,
            cache,
            cu_seqlens=cu_seqlens,
            position_embeddings=position_embeddings,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class PaTHPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what transformers asks of a model class."""

    config_class = PaTHConfig
    config: PaTHConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = (
        True  # Trainer hands over num_items_in_batch, so accumulated losses are right
    )
    _no_split_modules = ["PaTHDecoderLayer"]  # noqa: RUF012 (a plain attribute of the base class)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(
            module, ShortConv
        ):  # keeps the scale of w: taps of 0.02 would shrink it below w_norm_eps
            initialization.normal_(module.weight, mean=0.0, std=module.kernel_size[0] ** -0.5)


class PaTHModel(PaTHPreTrainedModel):
    """The decoder without its output matrix: token ids `[B, T]` to hidden states `[B, T, D]`.

    An embedding, `num_hidden_layers` pre-norm blocks of attention and gated MLP, and a last RMS
    norm. D is `config.hidden_size`; the states have the dtype of the weights. `forward` says what
    masks, packed rows and caches look like.

    Args:
        config: Sizes and options.

    Example:
        >>> import torch
        >>> config = PaTHConfig(
        ...     vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> PaTHModel(config)(torch.tensor([[3, 4, 5]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, config: PaTHConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            PaTHDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        is_rope = config.position_encoding == "rope"
        self.rotary_emb = LlamaRotaryEmbedding(config) if is_rope else None  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PaTHCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Compute hidden states.

        Args:
            input_ids: Token ids, `[B, T]` int64; or give `inputs_embeds`.
            attention_mask: `[B, T]`, or `[B, columns + T]` with a cache; 1 for real tokens.
            position_ids: `[B or 1, T]`. Used by "rope"; made from the mask if None. If they
                restart within a row and neither mask nor cache is given, the row is taken as
                packed documents.
            past_key_values: A `PaTHCache`; it is extended in place.
            inputs_embeds: `[B, T, D]` in place of `input_ids`.
            use_cache: Whether to return a cache. Defaults to the configuration's value without
                gradients and to False with them.
            output_hidden_states: Whether to return the input of every block and the last state.
            output_attentions: Refused; see `path_attn.explain.attention_maps`.
            return_dict: False returns a tuple.
            cu_seqlens: Document starts and the end of one packed row, `[N + 1]` int32 or int64,
                needs B == 1.
            cu_seq_lens_q: The same under the name of `DataCollatorWithFlattening`.
            cu_seq_lens_k: Must equal `cu_seq_lens_q`; accepted for the same collator.
            max_length_q: Not needed; accepted for the same collator.
            max_length_k: Not needed; accepted for the same collator.

        Returns:
            `last_hidden_state` `[B, T, D]`, `past_key_values`, `hidden_states`.

        Raises:
            UserError: inputs do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give exactly one of input_ids and inputs_embeds.")
        if output_attentions:
            raise UserError(
                "output_attentions is not available; use path_attn.explain.attention_maps."
            )
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        cu_seqlens = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
        if cu_seqlens is None and attention_mask is None and past_key_values is None:
            cu_seqlens = _documents_of(position_ids, hidden.shape[0])
        if cu_seqlens is not None and past_key_values is None:
            cache = None
        first = None if cache is None else cache.layers[0].state
        mask = _drop_if_full(new_columns_mask(attention_mask, hidden.shape[:2], first))
        rotary = None
        if self.rotary_emb is not None:
            if position_ids is None:
                position_ids = _positions(hidden, mask, first, cu_seqlens)
            rotary = self.rotary_emb(hidden, position_ids=position_ids)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = [hidden]
        for index, layer in enumerate(self.layers):
            state = None if cache is None else cache.layers[index].state
            hidden = layer(hidden, mask, state, cu_seqlens, rotary)
            states.append(hidden)
        hidden = self.norm(hidden)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,  # type: ignore[arg-type]
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _cache(self, given: Cache | None, use_cache: bool | None) -> PaTHCache | None:
        if given is not None and not isinstance(given, PaTHCache):
            raise UserError(
                f"past_key_values is a {type(given).__name__}; expected a PaTHCache(config)."
            )
        if self.training and self.gradient_checkpointing:
            if given is not None or use_cache:
                raise UserError(
                    "a cache cannot be used with gradient checkpointing while training."
                )
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        if given is None and use_cache:
            return PaTHCache(self.config)
        return given if use_cache or given is not None else None


class PaTHForCausalLM(PaTHPreTrainedModel, GenerationMixin):
    """The decoder with its output matrix: losses, `generate`, `save_pretrained`.

    Args:
        config: Sizes and options.

    Example:
        >>> import torch
        >>> config = PaTHConfig(
        ...     vocab_size=16,
        ...     hidden_size=32,
        ...     num_hidden_layers=1,
        ...     num_attention_heads=2,
        ...     eos_token_id=None,
        ... )
        >>> model = PaTHForCausalLM(config)
        >>> model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape
        torch.Size([1, 5])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PaTHConfig) -> None:
        super().__init__(config)
        self.model = PaTHModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PaTHCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Compute logits, and the loss if labels are given.

        Args:
            input_ids: As in `PaTHModel.forward`, and so are all arguments not named here.
            attention_mask: See there.
            position_ids: See there.
            past_key_values: See there.
            inputs_embeds: See there.
            labels: Token ids, `[B, T]` int64, -100 where no loss is wanted; shifted inside.
            use_cache: See there; False by default if labels are given.
            output_hidden_states: See there.
            output_attentions: See there.
            return_dict: See there.
            logits_to_keep: Compute the logits of the last so many tokens (0: of all), or of these
                indices.
            cu_seqlens: See there.
            cu_seq_lens_q: See there.
            cu_seq_lens_k: See there.
            max_length_q: See there.
            max_length_k: See there.
            num_items_in_batch: Divide the summed loss by this, as `Trainer` asks when it
                accumulates gradients.

        Returns:
            `loss` scalar or None, `logits` `[B, T or kept, vocab]`, `past_key_values`,
            `hidden_states`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if use_cache is None and labels is not None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        *args: object,
        **kwargs: object,
    ) -> None:
        """Give `generate` a `PaTHCache` where it would make a `DynamicCache`."""
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic"):
            raise UserError(
                f"cache_implementation is {wanted!r}; this model has one cache of its own (None)."
            )
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = PaTHCache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache


def _foreign_attention() -> UserError:
    return UserError(
        "PaTHCache is filled by PaTHAttention; it cannot serve another kind of attention."
    )


def _drop_if_full(mask: Tensor | None) -> Tensor | None:
    """None for a mask without padding, where that can be looked up."""
    if mask is None or torch.compiler.is_compiling() or mask.is_meta:
        return mask
    return None if bool(mask.all()) else mask


def _positions(
    hidden: Tensor, mask: Tensor | None, state: PaTHLayerCache | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Number of real tokens before each one in its document, `[B or 1, T]`."""
    token = torch.arange(hidden.shape[1], device=hidden.device)[None]
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens.to(token.dtype), token[0], right=True) - 1
        return token - cu_seqlens[document]
    if mask is not None:
        token = mask.cumsum(1).sub(1).clamp(min=0)
    return token if state is None or state.length == 0 else token + state.lengths[:, None]


def _documents_of(position_ids: Tensor | None, batch: int) -> Tensor | None:
    """Document starts `[N + 1]` of a row whose positions restart; None for one document."""
    if position_ids is None or batch != 1 or torch.compiler.is_compiling() or position_ids.is_meta:
        return None
    positions = position_ids.reshape(-1)
    starts = (positions[1:] != positions[:-1] + 1).nonzero().flatten() + 1
    if starts.numel() == 0:
        return None
    return torch.cat([starts.new_zeros(1), starts, starts.new_tensor([positions.numel()])])


AutoConfig.register(PaTHConfig.model_type, PaTHConfig, exist_ok=True)
AutoModel.register(PaTHConfig, PaTHModel, exist_ok=True)
AutoModelForCausalLM.register(PaTHConfig, PaTHForCausalLM, exist_ok=True)
