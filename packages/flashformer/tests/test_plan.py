"""Plans: every wait is needed and enough, on real models with many workers."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashformer.config import ModelSpec
from flashformer.pack import gate_order
from flashformer.plan import CHUNK, KINDS, TILE, Plan, PlanError, Wait, partition
from flashformer.reference import Reference
from tenfold_common import UserError

WORKERS = (1, 2, 3, 7, 132)
# name: (config class, hidden, intermediate, layers, heads, kv heads, head_dim, vocab, others)
REAL = {
    "Llama-3.2-1B": ("Llama", 2048, 8192, 16, 32, 8, 64, 128256, {"tie_word_embeddings": True}),
    "Llama-3.2-3B": ("Llama", 3072, 8192, 28, 24, 8, 128, 128256, {"tie_word_embeddings": True}),
    "Llama-3.1-8B": ("Llama", 4096, 14336, 32, 32, 8, 128, 128256, {}),
    "Llama-3.1-70B": ("Llama", 8192, 28672, 80, 64, 8, 128, 128256, {}),
    "Llama-2-7B": ("Llama", 4096, 11008, 32, 32, 32, None, 32000, {}),
    "TinyLlama-1.1B": ("Llama", 2048, 5632, 22, 32, 4, None, 32000, {}),
    "SmolLM2-135M": ("Llama", 576, 1536, 30, 9, 3, None, 49152, {"tie_word_embeddings": True}),
    "SmolLM2-360M": ("Llama", 960, 2560, 32, 15, 5, None, 49152, {"tie_word_embeddings": True}),
    "SmolLM2-1.7B": ("Llama", 2048, 8192, 24, 32, 32, None, 49152, {"tie_word_embeddings": True}),
    "SmolLM3-3B": ("SmolLM3", 2048, 11008, 36, 16, 4, None, 128256, {}),
    "Qwen2.5-0.5B": ("Qwen2", 896, 4864, 24, 14, 2, None, 151936, {"tie_word_embeddings": True}),
    "Qwen2.5-1.5B": ("Qwen2", 1536, 8960, 28, 12, 2, None, 151936, {"tie_word_embeddings": True}),
    "Qwen2.5-7B": ("Qwen2", 3584, 18944, 28, 28, 4, None, 152064, {}),
    "Qwen2.5-32B": ("Qwen2", 5120, 27648, 64, 40, 8, None, 152064, {}),
    "Qwen3-0.6B": ("Qwen3", 1024, 3072, 28, 16, 8, 128, 151936, {"tie_word_embeddings": True}),
    "Qwen3-1.7B": ("Qwen3", 2048, 6144, 28, 16, 8, 128, 151936, {"tie_word_embeddings": True}),
    "Qwen3-4B": ("Qwen3", 2560, 9728, 36, 32, 8, 128, 151936, {"tie_word_embeddings": True}),
    "Qwen3-8B": ("Qwen3", 4096, 12288, 36, 32, 8, 128, 151936, {}),
    "Qwen3-32B": ("Qwen3", 5120, 25600, 64, 64, 8, 128, 151936, {}),
    "Mistral-7B": ("Mistral", 4096, 14336, 32, 32, 8, None, 32000, {"sliding_window": 4096}),
    "Phi-3-mini": ("Phi3", 3072, 8192, 32, 32, 32, None, 32064, {"sliding_window": 2047}),
}  # fmt: skip


def real_spec(name, layers=None):
    import transformers

    kind, hidden, intermediate, depth, heads, kv_heads, head_dim, vocab, others = REAL[name]
    fields = {"head_dim": head_dim} if head_dim else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers or depth,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab, **fields,
        **({"pad_token_id": 0} if kind == "Phi3" else {}), **others,
    )  # fmt: skip
    return ModelSpec.from_config(config)


@pytest.mark.parametrize("name", REAL)
def test_plans_of_real_models_hold(name):
    spec = real_spec(name, layers=2)
    for workers in WORKERS:
        plan = Plan.make(spec, workers)
        plan.validate()
        for stage in plan.stages:
            assert stage.first[0] == 0
            assert len(stage.first) == workers + 1
        assert plan.barriers == (5 * 2 + 1 if workers > 1 else 0)
    if spec.kv_heads <= 8:
        Plan.make(spec, 132, chunk=16).validate(position=200)
        Plan.make(spec, 3).validate(position=5000)


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen3-0.6B"])
def test_plans_of_whole_models_have_five_stages_a_layer_and_a_head(name):
    spec = real_spec(name)
    plan = Plan.make(spec, 132)
    assert [s.kind for s in plan.stages] == [*KINDS[:-1]] * spec.layers + ["head"]
    assert plan.barriers == 5 * spec.layers + 1
    assert plan.stages[-1].name == "head"
    assert plan.stages[8].name == "layer 1 up"


# --------------------------------------------------------------------------------------------------
# Every wait is needed


@pytest.fixture(scope="module")
def small(kit):
    """Four layers' worth of hazards in two, over several chunks of the attention."""
    model = kit.model("qwen2-window")
    spec, weights = kit.weights(model)
    return spec, weights, kit.tokens(18)


STAGES = range(11)


@pytest.mark.parametrize("workers", [2, 3, 7])
@pytest.mark.parametrize("number", STAGES)
def test_without_any_one_wait_validation_fails(small, number, workers):
    plan = Plan.make(small[0], workers, chunk=16)
    plan.validate(position=20)
    with pytest.raises(PlanError, match="a wait is missing") as caught:
        plan.without_wait(number).validate(position=20)
    names = [stage.name for stage in plan.stages]
    assert names[number] in str(caught.value) or names[number - 1] in str(caught.value)


def run(plan, small, random=None):
    """Return logits of reading a prompt and choosing 5 tokens."""
    _, weights, tokens = small
    return Reference(plan, weights, dtype=torch.float32, max_len=48).decode(
        tokens, 5, random=random
    )


@pytest.mark.parametrize("number", STAGES)
@pytest.mark.parametrize("workers", [2, 5])
def test_without_any_one_wait_some_order_of_workers_gives_other_logits(small, number, workers):
    plan = Plan.make(small[0], workers, chunk=16)
    right, chosen = run(plan, small)
    assert torch.isfinite(right).all()
    for seed in range(8):
        logits, others = run(plan.without_wait(number), small, Random(seed))
        if not torch.equal(logits, right) or others != chosen:
            return
    pytest.fail("no order of the workers shows that the wait is missing")


def test_with_all_waits_no_order_of_workers_changes_anything(small):
    plan = Plan.make(small[0], 5, chunk=16)
    right, chosen = run(plan, small)
    for seed in range(4):
        logits, others = run(plan, small, Random(seed))
        assert torch.equal(logits, right)
        assert others == chosen


@pytest.mark.parametrize("number", STAGES)
def test_one_worker_needs_no_waits(small, number):
    Plan.make(small[0], 1, chunk=16).without_wait(number).validate(position=20)


# --------------------------------------------------------------------------------------------------
# Waits that never end, or end too early


def changed(plan, number, wait):
    stages = list(plan.stages)
    stages[number] = replace(stages[number], wait=wait)
    return replace(plan, stages=tuple(stages))


@pytest.mark.parametrize(
    ("number", "wait", "words"),
    [
        (4, Wait(3, 4), "waits for 4 workers, but only 3 arrive"),
        (4, Wait(6, 3), "waits for layer 1 attention, which comes after it"),
        (4, Wait(4, 3), "waits for layer 0 down, which comes after it"),
        (4, Wait(99, 3), "waits for stage 99, which the plan lacks"),
        (4, Wait(-1, 3), "waits for stage -1, which the plan lacks"),
        (4, Wait(3, 2), "a wait is missing"),  # it is not known which two
        (4, Wait(2, 3), "a wait is missing"),  # too early
        (0, Wait(9, 3, previous=True), "a wait is missing"),
    ],
)
def test_wrong_waits_are_refused(small, number, wait, words):
    with pytest.raises(PlanError, match=words):
        changed(Plan.make(small[0], 3, chunk=16), number, wait).validate(position=20)


@pytest.mark.parametrize("wait", [Wait(3, 4), Wait(6, 3), Wait(4, 3)])
def test_the_reference_notices_that_nobody_will_come(small, wait):
    plan = changed(Plan.make(small[0], 3, chunk=16), 4, wait)
    with pytest.raises(PlanError, match="all workers wait"):
        run(plan, small)


def test_overlapping_rows_are_refused(small):
    plan = Plan.make(small[0], 3, chunk=16)
    stages = list(plan.stages)
    first = list(stages[0].first)
    stages[0] = replace(stages[0], first=(first[0], first[1], first[1], first[3]))
    replace(plan, stages=tuple(stages)).validate()  # other shares, but apart

    class Twice(Plan):
        def accesses(self, stage, worker, position):
            yield from super().accesses(stage, 1 if stage.kind == "up" else worker, position)

    with pytest.raises(
        PlanError, match=r"worker . writes act in layer 0 up while worker . may still write it"
    ):
        Twice(plan.spec, 3, plan.stages, 16).validate()


@pytest.mark.parametrize(("late", "early"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("more", [0, 1])
def test_an_overlap_of_one_is_one(small, late, early, more):
    shares = [(0, 8 + more), (8, 16)]  # of workers 0 and 1

    class Two(Plan):
        """In the first two stages one worker each writes its share."""

        def accesses(self, stage, worker, position):
            if worker == {"attention": late, "qkv": early}[stage.kind]:
                yield "qkv", *shares[worker], True

    plan = Two(small[0], 2, Plan.make(small[0], 2, chunk=16).stages, 16)
    if more:
        with pytest.raises(PlanError, match="may still write it in layer 0 qkv"):
            plan._check_pair(1, 0, 0)
    else:
        plan._check_pair(1, 0, 0)


def test_writing_what_others_may_still_read_is_refused(small):
    class Blind(Plan):
        """Down does not read what up writes, so that nothing but x is in danger."""

        def accesses(self, stage, worker, position):
            found = super().accesses(stage, worker, position)
            return (a for a in found if a[0] != "act")

    plan = changed(Plan.make(small[0], 3, chunk=16), 4, Wait(2, 3))
    pattern = "worker . writes x in layer 0 down while worker . may still read it in layer 0 up"
    with pytest.raises(PlanError, match=pattern):
        Blind(plan.spec, 3, plan.stages, 16).validate()


# --------------------------------------------------------------------------------------------------
# Shares


@given(st.integers(0, 500), st.integers(1, 140))
def test_shares_are_contiguous_and_even(tiles, workers):
    first = partition(tiles, workers)
    shares = [b - a for a, b in pairwise(first)]
    assert (len(first), first[0], first[-1]) == (workers + 1, 0, tiles)
    assert max(shares) - min(shares) <= 1
    assert min(shares) >= 0


@given(
    st.integers(0, 900), st.sampled_from([16, 64, 256]), st.integers(1, 5),
    st.none() | st.integers(1, 500), st.integers(1, 9),
)  # fmt: skip
def test_parts_cover_what_is_seen_once(position, chunk, kv_heads, window, workers):
    spec = ModelSpec(
        "llama", 32, 32, 2 * kv_heads, kv_heads, 8, 32, 1e-6, 8, 999, (window,), (True,)
    )
    plan = Plan.make(spec, workers, chunk=chunk)
    parts = plan.parts(0, position)
    low = 0 if window is None else max(0, position + 1 - window)
    for head in range(kv_heads):
        mine = sorted(p[1:] for p in parts if p[0] == head)
        assert [number for number, _, _ in mine] == list(range(len(mine)))
        assert [t for _, a, b in mine for t in range(a, b)] == list(range(low, position + 1))
        assert all(a // chunk == (b - 1) // chunk for _, a, b in mine)
        assert sum(stop == position + 1 for _, _, stop in mine) == 1
    plan.validate(position)


@given(
    st.integers(1, 200), st.integers(1, 200), st.integers(1, 4), st.integers(1, 4),
    st.integers(1, 3), st.integers(1, 300), st.integers(1, 3), st.integers(1, 20),
    st.integers(0, 60),
)  # fmt: skip
def test_plans_of_any_shape_hold(
    hidden, intermediate, kv_heads, group, half, vocab, layers, workers, position
):
    spec = ModelSpec(
        "llama", hidden, intermediate, kv_heads * group, kv_heads, 2 * half, vocab, 1e-6, 2 * half,
        999, (None, 9, None)[:layers], (True,) * layers,
    )  # fmt: skip
    plan = Plan.make(spec, workers, chunk=16)
    plan.validate(position)
    for stage in plan.stages:
        if stage.kind == "up":
            assert stage.first[-1] * TILE == len(gate_order(intermediate))
        elif stage.kind != "attention":
            assert (stage.first[-1] - 1) * TILE < stage.rows <= stage.first[-1] * TILE


def test_imbalance_is_the_largest_share_over_the_mean():
    spec = real_spec("Llama-3.2-1B", layers=1)
    plan = Plan.make(spec, 132)
    assert plan.imbalance("output") == 132 / 128  # 128 tiles
    assert plan.imbalance("qkv") == pytest.approx(2 * 132 / 192)
    assert Plan.make(spec, 1).imbalance("head") == 1


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, None, "2"])
def test_a_wrong_number_of_workers_is_refused(workers):
    with pytest.raises(UserError, match="workers must be a whole number of at least 1"):
        Plan.make(real_spec("Llama-3.2-1B", layers=1), workers)


@pytest.mark.parametrize("chunk", [0, 8, 20, -16])
def test_a_wrong_chunk_is_refused(chunk):
    with pytest.raises(UserError, match=f"chunk must be a multiple of 16, not {chunk}"):
        Plan.make(real_spec("Llama-3.2-1B", layers=1), 2, chunk=chunk)


def test_the_default_chunk():
    assert Plan.make(real_spec("Llama-3.2-1B", layers=1), 2).chunk == CHUNK
