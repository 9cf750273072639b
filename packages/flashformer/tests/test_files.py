"""Saved models: whole or not there, the same tokens, and what is broken is named."""

import json

import pytest
import torch

import flashformer as ff
from tenfold_common import TenfoldError, UserError
from tenfold_common.atomic import mark_complete

FORMATS = {
    "fp32": {"weights": "fp32"},
    "bf16": {"weights": "bf16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "group_size": 32},
    "int4-zeros": {"weights": "int4", "group_size": 32, "symmetric": False, "head": "bf16"},
}


def make(kit, options, kind="llama-biases"):
    model = kit.model(kind, hidden_size=64, intermediate_size=96, head_dim=16)
    return ff.compile(model, threads=2, max_len=64, backend="cpu", **options)


@pytest.fixture
def saved(kit, tmp_path):
    made = make(kit, {})
    made.save(tmp_path / "model")
    return made, tmp_path / "model"


@pytest.mark.parametrize("id", FORMATS)
@pytest.mark.parametrize("kind", ["llama-biases", "qwen3", "qwen2-window"])
def test_loaded_models_say_the_same_to_the_last_bit(kit, tmp_path, id, kind):
    made = make(kit, FORMATS[id], kind)
    made.save(tmp_path / "model")
    tokens = kit.tokens(30)
    wanted = made.feed(tokens, made.new_cache(), every=True)
    for threads in (1, 3):
        loaded = ff.load(tmp_path / "model", threads=threads, backend="cpu")
        assert loaded.plan.workers == threads
        assert torch.equal(loaded.feed(tokens, loaded.new_cache(), every=True), wanted)
    assert (loaded.weights, loaded.head, loaded.max_len) == (made.weights, made.head, 64)
    assert loaded.spec == made.spec
    assert loaded.config.to_dict().keys() == made.config.to_dict().keys()
    prompt = torch.tensor([tokens])  # is fed here, and read by the source there
    a, b = (m.generate(prompt, max_new_tokens=20) for m in (made, loaded))
    assert loaded.source is None
    if id == "fp32":
        assert torch.equal(a, b)


def test_the_torch_back_end_reads_packed_weights(kit, tmp_path):
    for id, options in FORMATS.items():
        made = make(kit, options)
        made.save(tmp_path / id)
        plain = ff.load(tmp_path / id, backend="torch")
        own = ff.compile(made.source, threads=1, max_len=64, backend="torch", **options)
        tokens = kit.tokens(12)
        a, b = (m.feed(tokens, m.new_cache(), every=True) for m in (plain, own))
        assert torch.allclose(a, b, atol=1e-5)


def test_saving_a_loaded_model_gives_the_same_files(saved, tmp_path):
    _, folder = saved
    ff.load(folder, backend="cpu").save(tmp_path / "again")
    ff.load(folder, backend="torch").save(tmp_path / "plain")
    for other in ("again", "plain"):
        for name in ("flashformer.json", "packed.safetensors"):
            assert (tmp_path / other / name).read_bytes() == (folder / name).read_bytes()


def test_a_loaded_model_has_nothing_to_refresh_from(saved):
    loaded = ff.load(saved[1], threads=1)
    loaded.check_fresh()
    with pytest.raises(UserError, match="was loaded and has no transformers model"):
        loaded.refresh()


# --------------------------------------------------------------------------------------------------
# Broken and foreign folders


@pytest.mark.parametrize("file", ["packed.safetensors", "flashformer.json", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damage_is_noticed_and_the_file_named(saved, file, damage):
    path = saved[1] / file
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(TenfoldError, match=file.replace(".", r"\.")):
        ff.load(saved[1])


def test_a_folder_without_its_marker_was_cut_short(saved):
    (saved[1] / "COMPLETE").unlink()
    with pytest.raises(TenfoldError, match="not complete"):
        ff.load(saved[1])


def altered(folder, change):
    path = folder / "flashformer.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    mark_complete(folder)


def test_another_layout_is_refused(saved):
    altered(saved[1], lambda s: s.update(layout=99))
    with pytest.raises(
        UserError, match="has layout 99, this version reads 1; compile the model anew"
    ):
        ff.load(saved[1])


@pytest.mark.parametrize(
    "key", ["layout", "spec", "matrices", "weights", "head", "cache", "max_len"]
)
def test_settings_that_lack_something_are_broken(saved, key):
    altered(saved[1], lambda s: s.pop(key))
    with pytest.raises(UserError, match=key):
        ff.load(saved[1])


def test_a_model_that_lacks_a_tensor_is_broken(saved):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved[1] / "packed.safetensors")
    del tensors["layer 1 up.tiles"]
    save_file(tensors, saved[1] / "packed.safetensors")
    mark_complete(saved[1])
    with pytest.raises(UserError, match="layer 1 up"):
        ff.load(saved[1])


@pytest.mark.parametrize("what", ["absent", "empty", "checkpoint", "file"])
def test_other_folders_are_refused(kit, tmp_path, what):
    folder = tmp_path / "other"
    if what == "empty":
        folder.mkdir()
    elif what == "checkpoint":
        kit.model().save_pretrained(folder)
    elif what == "file":
        folder.write_text("x")
    with pytest.raises(UserError, match=r"holds no compiled model \(it has no flashformer.json\)"):
        ff.load(folder)


# --------------------------------------------------------------------------------------------------
# Writing


def test_nothing_is_overwritten_unless_asked(saved, kit):
    made, folder = saved
    with pytest.raises(UserError, match="is not empty"):
        made.save(folder)
    other = ff.compile(kit.model(seed=3), threads=1, max_len=32, backend="cpu")
    other.save(folder, overwrite=True)
    assert ff.load(folder, threads=1).max_len == 32
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


def test_what_was_not_written_here_is_never_overwritten(saved):
    made, folder = saved
    note = folder / "note.txt"
    note.write_text("mine")
    with pytest.raises(UserError, match=r"note\.txt"):
        made.save(folder, overwrite=True)
    assert note.read_text() == "mine"
    assert ff.load(folder).max_len == 64
    with pytest.raises(UserError):
        made.save(note, overwrite=True)


def test_a_failed_save_leaves_nothing(kit, tmp_path, monkeypatch):
    made = make(kit, {})
    import safetensors.torch

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        made.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_written_into(kit, tmp_path):
    (tmp_path / "model").mkdir()
    make(kit, {}).save(tmp_path / "model")
    assert ff.load(tmp_path / "model").max_len == 64
