"""Files of checkpoints: shards, folders, the hub; what is broken, missing or a pickle."""

import json
import pickle

import pytest
import torch
from checkpoint_files import (
    load,
    spoil_config,
)
from safetensors.torch import load_file, save_file

from flashformer.checkpoints import load_checkpoint, load_config
from tenfold_common import UserError


def shard(made, count=3):
    """Spread a checkpoint over files, odd tensors first; returns the names of the files."""
    tensors = load_file(made.folder / "model.safetensors")
    (made.folder / "model.safetensors").unlink()
    files = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    homes = {name: files[n % count] for n, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: tensors[n] for n, home in homes.items() if home == file}, made.folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": homes}
    (made.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def test_shards_are_read_as_one(kit, fresh):
    made = fresh("awq-gemm")
    tokens = kit.tokens(12)
    whole = load(made)
    before = whole.feed(tokens, whole.new_cache())
    shard(made)
    parts = load(made)
    assert torch.equal(parts.feed(tokens, parts.new_cache()), before)


def test_another_name_of_the_only_file(fresh):
    made = fresh("gptq")
    (made.folder / "model.safetensors").rename(made.folder / "gptq_model-4bit-32g.safetensors")
    assert load(made).weights == "int4"


def test_several_files_without_an_index(fresh):
    made = fresh("gptq")
    shard(made)
    (made.folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="3 files"):
        load(made)


def test_a_missing_shard_is_named(fresh):
    made = fresh("gptq")
    files = shard(made)
    (made.folder / files[1]).unlink()
    with pytest.raises(UserError, match=rf"{files[1]} is missing"):
        load(made)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_file_that_is_cut_off_is_named(fresh, kept):
    made = fresh("gptq")
    file = made.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors is broken or cut off"):
        load(made)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": null}', "\xff\x00"]
)
def test_a_broken_index_is_named(fresh, text):
    made = fresh("gptq")
    shard(made)
    (made.folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is broken"):
        load(made)


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", ".."]
)
def test_an_index_reaches_no_other_folder(fresh, tmp_path, place):
    made = fresh("gptq")
    shard(made)
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    index = made.folder / "model.safetensors.index.json"
    homes = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**homes, "x": place}}))
    with pytest.raises(UserError, match=r"is not a file of this folder|is missing"):
        load(made)


def test_an_index_that_promises_too_much(fresh):
    made = fresh("gptq")
    files = shard(made)
    index = made.folder / "model.safetensors.index.json"
    homes = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**homes, "model.extra": files[2]}}))
    with pytest.raises(UserError, match=rf"{files[2]} has no tensor 'model.extra'"):
        load(made)


class Bomb:
    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path("went-off"),)


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused_unopened(fresh, tmp_path, monkeypatch, quantised, file):
    monkeypatch.chdir(tmp_path)
    made = fresh("gptq")
    (made.folder / "model.safetensors").unlink()
    (made.folder / file).write_bytes(pickle.dumps(Bomb()))
    if not quantised:
        spoil_config(made, quantization_config=None)
    with pytest.raises(UserError, match=rf"only as pickles \({file}\)"):
        load(made)
    assert not (tmp_path / "went-off").exists()
    pickle.loads((made.folder / file).read_bytes())  # the bomb is live
    assert (tmp_path / "went-off").exists()


def test_code_of_a_checkpoint_never_runs(fresh, tmp_path):
    made = fresh("gptq")
    mark = tmp_path / "ran"
    (made.folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig as Config\n"
    )
    spoil_config(made, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(UserError, match="neither a folder nor a hub name with a config"):
        load(made)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere", "neither a folder nor a hub name"),
        ("empty", "no config.json"),
        ("file", "is a file; name the folder"),
    ],
)
def test_places_without_a_checkpoint(tmp_path, place, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / place)
    with pytest.raises(UserError, match=words):
        load_config(str(tmp_path / place))


def test_a_folder_without_weights(fresh):
    made = fresh("gptq")
    (made.folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        load(made)


def test_a_broken_config(fresh):
    made = fresh("gptq")
    (made.folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="neither a folder"):
        load(made)


def test_pickles_of_the_hub_are_refused_unopened(plain, on_hub, tmp_path, monkeypatch):
    on_hub(plain.folder, "tiny/plain")
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint("tiny/plain", max_len=32, threads=1, backend="torch").weights == "fp32"
    (plain.folder / "model.safetensors").unlink()
    torch.save(plain.model.state_dict(), plain.folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"tiny/plain cannot be loaded: .*safetensors"):
        load_checkpoint("tiny/plain", max_len=32, threads=1, backend="torch")


def test_a_model_of_the_hub(written, on_hub, tmp_path, monkeypatch):
    made = written("gptq")
    on_hub(made.folder, "tiny/gptq")
    monkeypatch.chdir(tmp_path)
    model = load_checkpoint("tiny/gptq", max_len=64, threads=1, backend="torch")
    plain = load(made)
    ours, theirs = (m.feed([3, 5], m.new_cache()) for m in (model, plain))
    assert torch.equal(ours, theirs)
    for wrong in ({"name": "tiny/other"}, {"name": "tiny/gptq", "revision": "v2"}):
        with pytest.raises(UserError, match=f"{wrong['name']} is neither a folder nor a hub name"):
            load_checkpoint(**wrong)
