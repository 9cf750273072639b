"""Conversion of RoPE models, distillation, and fla checkpoints."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from path_attn import PaTHConfig, PaTHForCausalLM, convert_rope_model
from path_attn.convert import (
    AttentionTransferTrainer,
    ConvertConfig,
    KLDistillTrainer,
    distill,
    kl_divergence,
    record_attention,
)
from path_attn.fla_checkpoint import fla_config, from_fla, load_fla_state_dict
from tenfold_common.errors import CheckpointError, UserError

TINY = {
    "vocab_size": 12,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
TEACHERS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12, "tie_word_embeddings": True}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {}),
}


def make_teacher(kind: str, **options):
    model, config, own = TEACHERS[kind]
    teacher = model(config(**{**TINY, **own, **options})).eval()
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if name.endswith("bias") or "norm" in name:  # so that a lost bias or norm would show
                p.add_(torch.randn_like(p) * 0.3)
    return teacher


def sums(count: int) -> list[dict]:
    """Sequences x[t+1] = (x[t] + x[t-1]) mod 11: the next token needs the last two positions."""
    items = []
    for _ in range(count):
        x = torch.randint(0, 11, (2,)).tolist()
        while len(x) < 16:
            x.append((x[-1] + x[-2]) % 11)
        ids = torch.tensor(x) + 1
        items.append({"input_ids": ids, "labels": ids.clone()})
    return items


@pytest.mark.parametrize("kind", TEACHERS)
def test_all_but_positions_is_carried_over(kind, tmp_path):
    teacher = make_teacher(kind)
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    ids = torch.randint(1, 12, (2, 14))
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :4] = 0

    def no_rotation(
        x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*position_ids.shape, teacher.model.layers[0].self_attn.head_dim)
        return x.new_ones(shape), x.new_zeros(shape)

    teacher.model.rotary_emb.forward = no_rotation
    expected = teacher(ids, attention_mask=mask).logits
    for options in ({"position_encoding": "nope"}, {"beta_bias": -1e4}):
        student = convert_rope_model(teacher, **options)
        logits = student(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-4)
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, student(ids).logits)
    assert again.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 17)


def test_seed_dtype_and_new_parameters():
    teacher = make_teacher("llama").to(torch.bfloat16)
    torch.manual_seed(5)
    a = convert_rope_model(teacher, position_encoding="path_fox", beta_bias=-3.0, gate_bias=2.0)
    after = torch.rand(1)
    b = convert_rope_model(teacher, position_encoding="path_fox", beta_bias=-3.0, gate_bias=2.0)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1)), "the caller's random state must not move"
    assert a.dtype == torch.bfloat16
    layer = a.model.layers[1].self_attn
    assert (layer.bt_proj.bias == -3).all()
    assert (layer.g_proj.bias == 2).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**{**TINY, "head_dim": 8})),
            "'gemma2' cannot be converted: its blocks differ",
        ),
        (lambda: LlamaModel(LlamaConfig(**TINY)), "not a causal language model"),
        (lambda: make_teacher("llama", attention_dropout=0.1), "attention_dropout is 0.1"),
        (
            lambda: make_teacher(
                "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1
            ),
            "sliding attention",
        ),
    ],
    ids=["gemma2", "headless", "dropout", "mixed windows"],
)
def test_what_cannot_be_converted_is_named(make, message):
    with pytest.raises(UserError, match=message):
        convert_rope_model(make())


def test_converting_to_rope_is_refused():
    with pytest.raises(UserError, match="which the model has"):
        convert_rope_model(make_teacher("llama"), position_encoding="rope")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage1_steps": -1}, "stage1_steps is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"ce_weight": 1.5}, r"ce_weight is 1.5; it must lie in \[0, 1\]"),
    ],
)
def test_wrong_settings_are_named(options, message, tmp_path):
    teacher = make_teacher("llama")
    with pytest.raises(UserError, match=message):
        distill(teacher, convert_rope_model(teacher), [], tmp_path, config=ConvertConfig(**options))


def arguments(folder, **options) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }
    return TrainingArguments(**settings)


def test_distillation_closes_most_of_the_gap(tmp_path):
    data = sums(512)
    teacher = make_teacher("qwen3", num_hidden_layers=1, initializer_range=0.02)
    settings = {"max_steps": 120, "learning_rate": 1e-2, "per_device_train_batch_size": 32}
    Trainer(model=teacher, args=arguments(tmp_path, **settings), train_dataset=data).train()
    teacher.eval()
    ids = torch.stack([x["input_ids"] for x in sums(64)])
    student = convert_rope_model(teacher)

    def gap() -> float:
        with torch.no_grad():
            return kl_divergence(student(ids).logits, teacher(ids).logits).mean().item()

    before = gap()
    config = ConvertConfig(
        stage1_steps=40, stage2_steps=40, batch_size=32, stage1_learning_rate=1e-2,
        stage2_learning_rate=5e-3, logging_steps=5,
    )  # fmt: skip
    logs = distill(teacher, student.train(), data, tmp_path / "out", config=config)
    first = [x["loss"] for x in logs["stage1"] if "loss" in x]
    second = [x["loss"] for x in logs["stage2"] if "loss" in x]
    assert first[-1] < 0.6 * first[0]
    assert second[-1] < 0.6 * second[0]
    assert before > 0.3
    assert gap() < 0.3 * before
    student.eval().save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(again(ids).logits, student(ids).logits)


def test_stage_1_loss_is_zero_for_equal_attention_and_trains_attention_only(tmp_path):
    teacher = make_teacher("llama")
    student = convert_rope_model(teacher, position_encoding="nope")
    data = sums(4)
    trainer = AttentionTransferTrainer(
        student=student, teacher=teacher, args=arguments(tmp_path), train_dataset=data
    )
    trained = {id(p) for p in trainer.model.parameters()}
    attention = {id(p) for layer in student.model.layers for p in layer.self_attn.parameters()}
    assert trained == attention
    first_tokens = {
        "input_ids": torch.randint(1, 12, (3, 1))
    }  # at the first token RoPE does nothing
    assert trainer.compute_loss(trainer.model, first_tokens).item() < 1e-10
    ids = torch.stack([x["input_ids"] for x in data])
    with record_attention(teacher) as (given, returned):
        teacher(ids)
    expected = sum(
        (layer.self_attn(x)[0] - y).square()[:, :-1].mean()
        for layer, x, y in zip(student.model.layers, given, returned, strict=True)
    )
    loss = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(loss, expected / 2)


def test_accumulated_losses_equal_one_batch(tmp_path):
    teacher = make_teacher("llama")
    data = sums(4)
    data[1]["labels"][:9] = -100
    for trainer_class, stage in ((AttentionTransferTrainer, 1), (KLDistillTrainer, 2)):
        results = []
        for batch, accumulate in ((4, 1), (1, 4)):
            student = convert_rope_model(teacher)
            args = arguments(
                tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
                learning_rate=0.1, optim="sgd", logging_steps=1, max_grad_norm=1e9,
            )  # fmt: skip
            trainer = trainer_class(student=student, teacher=teacher, args=args, train_dataset=data)
            trainer.train()
            results.append(
                (trainer.state.log_history[0]["loss"], student.model.layers[0].self_attn)
            )
        (one, a), (four, b) = results
        assert one == pytest.approx(four, rel=1e-4), stage
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_stage_2_mixes_in_the_next_token_loss(tmp_path):
    teacher = make_teacher("llama")
    student = convert_rope_model(teacher)
    ids = torch.stack([x["input_ids"] for x in sums(4)])
    batch = {"input_ids": ids, "labels": ids}
    losses = {}
    for weight in (0.0, 0.25, 1.0):
        trainer = KLDistillTrainer(
            student=student,
            teacher=teacher,
            args=arguments(tmp_path),
            ce_weight=weight,
            temperature=2.0,
        )
        losses[weight] = trainer.compute_loss(student, batch)
    divergence = kl_divergence(student(ids).logits, teacher(ids).logits, 2.0)[:, :-1].mean()
    torch.testing.assert_close(losses[0.0], divergence)
    torch.testing.assert_close(losses[1.0], student(ids, labels=ids).loss)
    torch.testing.assert_close(losses[0.25], 0.75 * losses[0.0] + 0.25 * losses[1.0])
    with pytest.raises(UserError, match="no labels"):
        trainer.compute_loss(student, {"input_ids": ids})
    other = PaTHForCausalLM(PaTHConfig(**{**TINY, "vocab_size": 13}))
    with pytest.raises(UserError, match="different vocabularies"):
        KLDistillTrainer(student=other, teacher=teacher, args=arguments(tmp_path))


def test_stage_1_checkpoints_resume(tmp_path):
    teacher, data = make_teacher("llama"), sums(16)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    finals = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        student = convert_rope_model(teacher)
        trainer = AttentionTransferTrainer(
            student=student,
            teacher=teacher,
            args=arguments(tmp_path, **settings),
            train_dataset=data,
        )
        trainer.train(resume_from_checkpoint=resume)
        finals.append(student.state_dict())
    assert all(torch.equal(x, finals[1][name]) for name, x in finals[0].items())


# -- fla checkpoints ----------------------------------------------------------------------

FLA = {
    "model_type": "path_attn",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_ratio": 4,
    "hidden_act": "swish",
    "norm_eps": 1e-5,
    "vocab_size": 20,
    "use_forget_gate": True,
    "use_w_shortconv": True,
    "use_low_rank_w": True,
    "fuse_norm": True,
    "tie_word_embeddings": False,
}


def fla_weights() -> dict[str, torch.Tensor]:
    """Names and shapes of fla's PaTHAttentionForCausalLM, written down by hand."""
    shapes = {
        "model.embeddings.weight": (20, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (20, 32),
    }
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {
            f"{layer}attn_norm.weight": (32,),
            f"{layer}attn.q_proj.weight": (32, 32),
            f"{layer}attn.k_proj.weight": (16, 32),
            f"{layer}attn.v_proj.weight": (16, 32),
            f"{layer}attn.w_proj.0.weight": (32, 32),
            f"{layer}attn.w_proj.1.weight": (16, 32),
            f"{layer}attn.w_conv1d.weight": (16, 1, 3),
            f"{layer}attn.bt_proj.weight": (2, 32),
            f"{layer}attn.bt_proj.bias": (2,),
            f"{layer}attn.g_proj.weight": (4, 32),
            f"{layer}attn.g_proj.bias": (4,),
            f"{layer}attn.o_proj.weight": (32, 32),
            f"{layer}mlp_norm.weight": (32,),
            f"{layer}mlp.gate_proj.weight": (256, 32),
            f"{layer}mlp.up_proj.weight": (256, 32),
            f"{layer}mlp.down_proj.weight": (32, 256),
        }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_fla_weights_land_where_they_belong(tmp_path):
    from safetensors.torch import save_file

    weights = fla_weights()
    model = load_fla_state_dict(weights, FLA)
    assert (model.config.gate_scale, model.config.position_encoding) == ("fla", "path_fox")
    assert (model.config.rms_norm_eps, model.config.intermediate_size) == (1e-5, 256)
    block = model.model.layers[1]
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embeddings.weight"])
    assert torch.equal(
        block.self_attn.w_conv1d.weight, weights["model.layers.1.attn.w_conv1d.weight"]
    )
    assert torch.equal(
        block.post_attention_layernorm.weight, weights["model.layers.1.mlp_norm.weight"]
    )
    save_file({n: x.to(torch.bfloat16) for n, x in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FLA))
    assert from_fla(tmp_path).dtype == torch.bfloat16


def test_fla_faults_are_all_named(tmp_path):
    weights = fla_weights()
    del weights["model.layers.0.attn.bt_proj.bias"], weights["model.embeddings.weight"]
    weights["model.layers.0.attn.extra.weight"] = torch.zeros(1)
    weights["model.layers.1.attn.q_proj.weight"] = torch.zeros(4, 4)
    with pytest.raises(CheckpointError) as caught:
        load_fla_state_dict(weights, FLA)
    for part in (
        "missing: model.layers.0.attn.bt_proj.bias",
        "missing: model.embeddings.weight",
        "unexpected: model.layers.0.attn.extra.weight",
        "model.layers.1.attn.q_proj.weight has shape [4, 4], expected [32, 32]",
    ):
        assert part in str(caught.value)
    for change, message in (
        ({"model_type": "gla"}, "model_type is 'gla'"),
        ({"attnres_block_size": 2}, "attnres_block_size"),
        ({"hidden_act": "powlu"}, "hidden_act is 'powlu'"),
        ({"num_heads": "4"}, "num_heads is '4'"),
    ):
        with pytest.raises(UserError, match=message):
            fla_config({**FLA, **change})
    with pytest.raises(UserError, match=r"config.json does not exist"):
        from_fla(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        from_fla(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FLA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickled weights are not loaded"):
        from_fla(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        from_fla(tmp_path)
