"""Turn RoPE language models into PaTH models.

**No conversion is exact.** A PaTH layer with beta = 0 is attention without positions (NoPE), not
RoPE, and one reflection per token cannot express RoPE's rotations. `convert_rope_model` therefore
only carries over everything that is not a position encoding; the student must then be distilled:
stage 1 matches the output of every attention layer on the teacher's hidden states, stage 2 the
teacher's next-token distribution (arXiv 2505.16381, section 4.4).

Checkpoints of flash-linear-attention load exactly; `from_fla` is in `path_attn.fla_checkpoint`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from path_attn.configuration_path_attn import PaTHConfig
from path_attn.fla_checkpoint import from_fla as from_fla
from path_attn.fla_checkpoint import load_fla_state_dict as load_fla_state_dict
from path_attn.layers import PaTHAttention
from path_attn.modeling_path_attn import PaTHForCausalLM
from tenfold_common.errors import UserError

CONVERTIBLE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # SmolLM and SmolLM2 are "llama"
_NEW_PARAMETERS = (".w_proj.", ".w_conv1d.", ".bt_proj.", ".g_proj.")
_INPUTS = ("input_ids", "attention_mask", "labels")


def convert_rope_model(
    model: PreTrainedModel,
    *,
    position_encoding: str = "path",
    gate_scale: str = "paper",
    num_reflections: int = 1,
    low_rank_w: int | None = 32,
    conv_size: int | None = 3,
    max_beta: float | None = None,
    beta_bias: float = 0.0,
    gate_bias: float = 6.0,
    backend: str = "auto",
    seed: int = 0,
) -> PaTHForCausalLM:
    """Make a PaTH student from a RoPE language model.

    Embeddings, norms, MLPs, query/key/value/output projections with their biases, query/key norms,
    head dimension and grouping are copied; RoPE is dropped; w, beta and gates are new. The student
    **needs distillation** (`distill`): PaTH with beta = 0 is NoPE, not RoPE, and no initialisation
    makes the two equal.

    Args:
        model: A causal language model of a type in `CONVERTIBLE`. It is not changed.
        position_encoding: "path", "path_fox", "fox" or "nope".
        gate_scale: "paper" or "fla".
        num_reflections: Householder reflections per token.
        low_rank_w: Rank of the projection that makes w. None: one full matrix.
        conv_size: Width of the short convolution on w. None: none.
        max_beta: Upper limit of beta, see `PaTHConfig`.
        beta_bias: Initial bias of beta = 2 sigmoid(.). 0 gives 1, as in a new layer, and distils
            faster than small betas; -10 starts at attention without positions.
        gate_bias: Initial bias of the forget gates sigmoid(.); 6 gives 0.998.
        backend: See `path_attention`.
        seed: Seeds the new parameters.

    Returns:
        The student, with the dtype, device and generation settings of `model`. It saves, loads and
        generates like any `PaTHForCausalLM`.

    Raises:
        UserError: the model cannot be converted; the message says why.
    """
    if position_encoding == "rope":
        raise UserError(
            "position_encoding is 'rope', which the model has; choose path, path_fox, fox or nope."
        )
    config = _student_config(
        model,
        position_encoding=position_encoding,
        gate_scale=gate_scale,
        num_reflections=num_reflections,
        low_rank_w=low_rank_w,
        conv_size=conv_size,
        max_beta=max_beta,
        backend=backend,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = PaTHForCausalLM(config)
    weights = model.state_dict()
    outcome = student.load_state_dict(weights, strict=False)
    lost = [
        name for name in outcome.missing_keys if not any(part in name for part in _NEW_PARAMETERS)
    ]
    if lost or outcome.unexpected_keys:
        raise UserError(
            f"the {model.config.model_type} model cannot be converted: weights without a place in "
            f"the student: {_listed(outcome.unexpected_keys)}; weights it lacks: {_listed(lost)}."
        )
    with torch.no_grad():
        for layer in _attention_layers(student):
            if layer.uses_reflections:
                layer.bt_proj.bias.fill_(beta_bias)
            if layer.uses_gate:
                layer.g_proj.bias.fill_(gate_bias)
    student.to(device=model.device, dtype=model.dtype)  # type: ignore[call-overload]
    student.tie_weights()
    if model.generation_config is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.train(model.training)


def _student_config(
    model: PreTrainedModel,
    *,
    position_encoding: str,
    gate_scale: str,
    num_reflections: int,
    low_rank_w: int | None,
    conv_size: int | None,
    max_beta: float | None,
    backend: str,
) -> PaTHConfig:
    old = model.config
    kind = old.model_type
    if kind not in CONVERTIBLE:
        raise UserError(
            f"model type {kind!r} cannot be converted: its blocks differ from Llama's. "
            f"Convertible: {', '.join(CONVERTIBLE)} (SmolLM and SmolLM2 are llama)."
        )
    if not type(model).__name__.endswith("ForCausalLM"):
        raise UserError(
            f"{type(model).__name__} cannot be converted: it is not a causal language model."
        )
    if getattr(old, "attention_dropout", 0.0):
        raise UserError(
            f"attention_dropout is {old.attention_dropout}; PaTH attention has none: set it to 0."
        )
    if getattr(old, "quantization_config", None) is not None:
        raise UserError("the model is quantized; load it unquantized to convert it.")
    if "sliding_attention" in (getattr(old, "layer_types", None) or ()):
        raise UserError(
            "some layers use sliding attention, others do not; PaTHConfig has one window for all."
        )
    bias = bool(getattr(old, "attention_bias", False))
    return PaTHConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads,
        hidden_act=old.hidden_act,
        rms_norm_eps=old.rms_norm_eps,
        max_position_embeddings=old.max_position_embeddings,
        position_encoding=position_encoding,
        gate_scale=gate_scale,
        num_reflections=num_reflections,
        low_rank_w=low_rank_w,
        conv_size=conv_size,
        max_beta=max_beta,
        qk_norm=kind == "qwen3",
        window=old.sliding_window if kind == "mistral" else None,
        qkv_bias=True if kind == "qwen2" else bias,
        o_bias=False if kind == "qwen2" else bias,
        mlp_bias=bool(getattr(old, "mlp_bias", False)),
        backend=backend,
        initializer_range=old.initializer_range,
        tie_word_embeddings=old.tie_word_embeddings,
        pad_token_id=old.pad_token_id,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
    )


# ------------------------------------------------------------------------------------------
# Distillation


@dataclass
class ConvertConfig:
    """Settings of the two distillation stages; the defaults suit small models.

    Attributes:
        stage1_steps: Optimizer steps of attention transfer. 0 skips it.
        stage2_steps: Optimizer steps of logit distillation. 0 skips it.
        stage1_learning_rate: Peak learning rate of stage 1 (attention layers only are trained).
        stage2_learning_rate: Peak learning rate of stage 2 (everything is trained).
        batch_size: Sequences per device and step.
        gradient_accumulation_steps: Batches per optimizer step.
        warmup_ratio: Share of the steps in which the learning rate rises.
        weight_decay: AdamW weight decay.
        max_grad_norm: Gradient clipping.
        temperature: Softens both distributions in stage 2; the loss is multiplied by its square.
        ce_weight: Weight of the ordinary next-token loss in stage 2; the KL term has 1 - ce_weight.
        bf16: Mixed precision.
        logging_steps: Steps between two logged losses.
        seed: Seeds data order.
    """

    stage1_steps: int = 500
    stage2_steps: int = 1000
    stage1_learning_rate: float = 1e-3
    stage2_learning_rate: float = 2e-4
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    ce_weight: float = 0.0
    bf16: bool = False
    logging_steps: int = 10
    seed: int = 0

    def validate(self) -> None:
        """Check every value; raise `UserError` at the first that does not fit."""
        values = asdict(self)
        for name in ("stage1_steps", "stage2_steps"):
            if values[name] < 0:
                raise UserError(f"{name} is {values[name]}; it must be 0 or more.")
        for name in ("batch_size", "gradient_accumulation_steps", "logging_steps"):
            if values[name] < 1:
                raise UserError(f"{name} is {values[name]}; it must be at least 1.")
        for name in (
            "stage1_learning_rate",
            "stage2_learning_rate",
            "temperature",
            "max_grad_norm",
        ):
            if not values[name] > 0:
                raise UserError(f"{name} is {values[name]}; it must be > 0.")
        for name in ("ce_weight", "warmup_ratio"):
            if not 0 <= values[name] <= 1:
                raise UserError(f"{name} is {values[name]}; it must lie in [0, 1].")

    def training_arguments(self, stage: int, output_dir: str | Path) -> TrainingArguments:
        """What `Trainer` is told in stage 1 or 2; change the result freely."""
        steps = self.stage1_steps if stage == 1 else self.stage2_steps
        return TrainingArguments(
            output_dir=str(output_dir),
            max_steps=steps,
            learning_rate=self.stage1_learning_rate if stage == 1 else self.stage2_learning_rate,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            warmup_steps=round(self.warmup_ratio * steps),
            lr_scheduler_type="cosine",
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            bf16=self.bf16,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=self.logging_steps,
            save_strategy="no",
            report_to="none",
            seed=self.seed,
        )


class AttentionTransfer(nn.Module):
    """The student's attention layers and the loss of stage 1.

    Args:
        student: The student; its layers are shared, not copied.
    """

    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"  # tells Trainer to count labels[:, 1:], the tokens of `_weights`

    def __init__(self, student: PaTHForCausalLM) -> None:
        super().__init__()
        self.config = student.config
        self.layers = nn.ModuleList(_attention_layers(student))

    def forward(
        self,
        inputs: list[Tensor],
        targets: list[Tensor],
        attention_mask: Tensor | None,
        weights: Tensor,
        count: Tensor | int,
    ) -> Tensor:
        """Mean squared error between student and teacher attention outputs.

        Args:
            inputs: What each attention layer of the teacher was given, `[B, T, D]` each.
            targets: What it returned, `[B, T, D]` each.
            attention_mask: `[B, T]`, 1 for real tokens, or None.
            weights: 1 for the tokens that count, `[B, T]`.
            count: Number the summed error is divided by (tokens).

        Returns:
            Scalar: averaged over tokens, channels and layers.
        """
        total = weights.new_zeros(())
        for layer, given, target in zip(self.layers, inputs, targets, strict=True):
            out, _ = layer(given, attention_mask)
            total = total + ((out.float() - target.float()).square().mean(-1) * weights).sum()
        return total / (count * len(self.layers))


class _DistillTrainer(Trainer):
    """What both stages share: the teacher, and which tokens count."""

    def __init__(
        self,
        *,
        student: PaTHForCausalLM,
        teacher: PreTrainedModel,
        model: nn.Module,
        args: TrainingArguments,
        **trainer_arguments: object,
    ) -> None:
        super().__init__(model=model, args=args, **trainer_arguments)  # type: ignore[arg-type]
        self.student = student
        self.teacher = teacher.to(args.device).eval()  # type: ignore[arg-type]

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*_INPUTS, "position_ids"]

    def _scale(self, loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Undo the averaging over processes where the count already spans them."""
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return loss
        return loss * (self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu)


class AttentionTransferTrainer(_DistillTrainer):
    """Stage 1: every attention layer of the student learns the output of the teacher's.

    Each layer is given the teacher's hidden states (teacher forcing), so that layers learn
    independently. Only attention layers are trained.

    Args:
        student: From `convert_rope_model`.
        teacher: The model it was made from; it is put in evaluation mode.
        args: As for `transformers.Trainer`.
        trainer_arguments: Anything else `transformers.Trainer` takes (`train_dataset`,
            `data_collator`, ...).
    """

    def __init__(
        self,
        *,
        student: PaTHForCausalLM,
        teacher: PreTrainedModel,
        args: TrainingArguments,
        **trainer_arguments: object,
    ) -> None:
        super().__init__(
            student=student,
            teacher=teacher,
            model=AttentionTransfer(student),
            args=args,
            **trainer_arguments,
        )

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict]:
        """Run the teacher, then compare layer by layer; see `AttentionTransfer.forward`."""
        mask = inputs.get("attention_mask")
        with torch.no_grad(), record_attention(self.teacher) as (given, returned):
            self.teacher(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False)
        weights = _weights(inputs)
        count = weights.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = model(given, returned, mask, weights, count)
        loss = self._scale(loss, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the student whole, so that it loads like any model."""
        self.student.save_pretrained(output_dir or self.args.output_dir)  # type: ignore[arg-type]

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        saved = PaTHForCausalLM.from_pretrained(resume_from_checkpoint)
        self.student.load_state_dict(saved.state_dict())


class KLDistillTrainer(_DistillTrainer):
    """Stage 2: the student learns the teacher's next-token distribution, KL(teacher || student).

    Args:
        student: From stage 1.
        teacher: The model it was made from; it is put in evaluation mode.
        args: As for `transformers.Trainer`.
        temperature: Softens both distributions; the loss is multiplied by its square.
        ce_weight: Weight of the ordinary next-token loss; needs labels in the data.
        trainer_arguments: Anything else `transformers.Trainer` takes.
    """

    def __init__(
        self,
        *,
        student: PaTHForCausalLM,
        teacher: PreTrainedModel,
        args: TrainingArguments,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        **trainer_arguments: object,
    ) -> None:
        if teacher.config.vocab_size != student.config.vocab_size:
            raise UserError(
                f"teacher and student have different vocabularies: {teacher.config.vocab_size} and "
                f"{student.config.vocab_size} tokens."
            )
        super().__init__(
            student=student, teacher=teacher, model=student, args=args, **trainer_arguments
        )
        self.temperature, self.ce_weight = temperature, ce_weight

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        """Average the divergence (and the next-token loss) over the tokens that count."""
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        with torch.no_grad():
            target = self.teacher(**tokens, use_cache=False).logits
        outputs = model(**tokens, use_cache=False)
        weights = _weights(inputs)
        count = weights.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        divergence = kl_divergence(outputs.logits, target, self.temperature)
        loss = (divergence * weights).sum() / count
        if self.ce_weight:
            if "labels" not in inputs:
                raise UserError(f"ce_weight is {self.ce_weight} but the data has no labels.")
            following = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
            ce = F.cross_entropy(outputs.logits.float().mT, following, reduction="sum") / count
            loss = (1 - self.ce_weight) * loss + self.ce_weight * ce
        loss = self._scale(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) of every token, times the temperature squared.

    Args:
        student_logits: `[..., vocab]`.
        teacher_logits: `[..., vocab]`.
        temperature: Divides both.

    Returns:
        `[...]`, float32, in nats.
    """
    ours = F.log_softmax(student_logits.float() / temperature, -1)
    theirs = F.log_softmax(teacher_logits.float() / temperature, -1)
    return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1) * temperature**2


def distill(
    teacher: PreTrainedModel,
    student: PaTHForCausalLM,
    train_dataset: object,
    output_dir: str | Path,
    *,
    config: ConvertConfig | None = None,
    data_collator: Callable | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> dict[str, list[dict]]:
    """Run both stages; the student is trained in place.

    Args:
        teacher: The RoPE model.
        student: From `convert_rope_model(teacher)`.
        train_dataset: Items with `input_ids`, and `attention_mask` and `labels` where they are
            needed.
        output_dir: Folder for what `Trainer` writes; stages get a folder each.
        config: Steps, learning rates and the rest. Defaults to `ConvertConfig()`.
        data_collator: As for `transformers.Trainer`.
        callbacks: As for `transformers.Trainer`.

    Returns:
        `{"stage1": log, "stage2": log}`, each `Trainer`'s log history with its losses.

    Raises:
        UserError: a setting does not fit.
    """
    config = ConvertConfig() if config is None else config
    config.validate()
    logs: dict[str, list[dict]] = {"stage1": [], "stage2": []}
    shared = {
        "train_dataset": train_dataset,
        "data_collator": data_collator,
        "callbacks": callbacks,
    }
    if config.stage1_steps:
        args = config.training_arguments(1, Path(output_dir) / "stage1")
        transfer = AttentionTransferTrainer(student=student, teacher=teacher, args=args, **shared)
        transfer.train()
        logs["stage1"] = transfer.state.log_history
    if config.stage2_steps:
        args = config.training_arguments(2, Path(output_dir) / "stage2")
        final = KLDistillTrainer(
            student=student,
            teacher=teacher,
            args=args,
            temperature=config.temperature,
            ce_weight=config.ce_weight,
            **shared,
        )
        final.train()
        logs["stage2"] = final.state.log_history
    return logs


@contextmanager
def record_attention(model: PreTrainedModel) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collect what each attention layer of a convertible model is given and returns.

    Both lists hold one `[B, T, D]` tensor per layer once the model has run.
    """
    given: list[Tensor] = []
    returned: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        given.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        returned.append(output[0])

    layers = [layer.self_attn for layer in model.model.layers]
    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield given, returned
    finally:
        for handle in handles:
            handle.remove()


def _weights(inputs: Mapping[str, Tensor]) -> Tensor:
    """1 for tokens that predict a labelled one, without labels for all real ones, `[B, T]`."""
    if "labels" in inputs:
        return F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].ne(-100).float()
    mask = inputs.get("attention_mask")
    return (
        torch.ones_like(inputs["input_ids"], dtype=torch.float32) if mask is None else mask.float()
    )


def _attention_layers(student: PaTHForCausalLM) -> list[PaTHAttention]:
    return [layer.self_attn for layer in student.model.layers]  # type: ignore[misc]


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"
