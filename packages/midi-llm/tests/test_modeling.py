"""Music rows behind text rows, prompts to the id, and folders of the public checkpoint."""

import json
import shutil

import pytest
import torch

from midi_llm.decode import MidiLM
from midi_llm.modeling import SPARE, SYSTEM, TextMidiProcessor, convert, expand_vocabulary
from midi_llm.vocab import AMTConfig
from tenfold_common.errors import UserError
from tenfold_common.tiny import byte_tokenizer, tiny_llama, tiny_qwen, word_tokenizer

SMALL = AMTConfig.small()
ANTICIPATING = AMTConfig(20, 20, 4, 17, 128, True)
FULL = AMTConfig()
TEXT = 50


def text_model(tied=True, **named):
    return tiny_llama(TEXT, **{"hidden": 16, "layers": 1, "tie_word_embeddings": tied, **named})


def tables(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


# ------------------------------------------------------------------------------------------------
# expand_vocabulary


@pytest.mark.parametrize("init", ["normal", "mean", "amt", "factored"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen])
def test_tied_stays_tied_through_a_folder(make, init, tmp_path):
    model = make(TEXT, hidden=16, layers=1, tie_word_embeddings=True)
    source = torch.randn(SMALL.size, 16) if init == "amt" else None
    assert expand_vocabulary(model, SMALL, init=init, source=source) is model
    inner, outer = tables(model)
    assert inner is outer
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    inner2, outer2 = tables(again)
    assert inner2 is outer2
    assert torch.equal(inner2, inner)
    assert again.config.tie_word_embeddings is True
    assert again.config.music_offset == TEXT
    assert again.config.vocab_size == TEXT + SMALL.size + SPARE == len(inner2)
    with torch.no_grad():
        ids = torch.tensor([[1, 7, TEXT, TEXT + SMALL.autoregress]])
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_untied_stays_untied_through_a_folder(tmp_path):
    model = expand_vocabulary(text_model(tied=False), SMALL)
    inner, outer = tables(model)
    assert inner is not outer
    assert inner.shape == outer.shape == (TEXT + SMALL.size + SPARE, 16)
    assert not torch.equal(inner[TEXT:], outer[TEXT:])
    model.save_pretrained(tmp_path)
    inner2, outer2 = tables(type(model).from_pretrained(tmp_path))
    assert torch.equal(inner2, inner)
    assert torch.equal(outer2, outer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("init", ["normal", "mean", "amt", "factored"])
def test_old_rows_and_text_logits_stay(init, tied):
    model = text_model(tied)
    before = [table.clone() for table in tables(model)]
    ids = torch.tensor([[1, 5, 9, 30]])
    logits = model(ids).logits
    source = torch.randn(SMALL.size, 16) if init == "amt" else None
    expand_vocabulary(model, SMALL, init=init, source=source)
    for old, new in zip(before, tables(model), strict=True):
        assert torch.equal(new[:TEXT], old)
    torch.testing.assert_close(model(ids).logits[..., :TEXT], logits)
    assert model.config.vocab_size == model(ids).logits.shape[-1] == TEXT + SMALL.size + 2
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size
    assert model.lm_head.out_features == model.config.vocab_size


@pytest.mark.parametrize("tied", [True, False])
def test_normal_rows_have_the_spread_of_the_config(tied):
    model = expand_vocabulary(text_model(tied, initializer_range=0.05), SMALL)
    for table in tables(model):
        new = table[TEXT:]
        assert new.std().item() == pytest.approx(0.05, rel=0.02)
        assert abs(new.mean().item()) < 0.05 * 5 / new.numel() ** 0.5
        kurtosis = ((new / new.std()) ** 4).mean().item()
        assert kurtosis == pytest.approx(3, abs=0.15)
        assert new.unique(dim=0).shape == new.shape


@pytest.mark.parametrize("tied", [True, False])
def test_mean_rows_are_of_the_old_mean(tied):
    model = text_model(tied)
    with torch.no_grad():
        for table in tables(model):
            table.add_(torch.linspace(-1, 1, 16))
    old = [table[:TEXT].detach().clone() for table in tables(model)]
    expand_vocabulary(model, SMALL, init="mean")
    for before, table in zip(old, tables(model), strict=True):
        new = table[TEXT:]
        torch.testing.assert_close(new.mean(0), before.mean(0), atol=2e-3, rtol=0)
        assert new.std(0).max() <= before.std(0).max() * 1.2


def test_amt_rows_are_copied_from_the_source():
    source = torch.randn(SMALL.size + 2, 16)
    model = expand_vocabulary(text_model(), SMALL, init="amt", source=source)
    assert torch.equal(tables(model)[0][TEXT : TEXT + SMALL.size], source[: SMALL.size])


@pytest.mark.parametrize("width", [8, 24, 64])
def test_amt_rows_of_another_width_keep_their_distances(width):
    source = torch.randn(SMALL.size, width) * 0.3
    model = expand_vocabulary(text_model(), SMALL, init="amt", source=source)
    new = tables(model)[0][TEXT : TEXT + SMALL.size]
    first, second = torch.randint(0, SMALL.size, (2, 3000))
    apart = first != second
    before = (source[first] - source[second]).norm(dim=1)[apart]
    after = (new[first] - new[second]).norm(dim=1)[apart]
    if width <= 16:
        torch.testing.assert_close(after, before)
    else:
        ratio = (after**2).mean() / (before**2).mean()
        assert ratio.item() == pytest.approx(1, abs=0.15)
        assert torch.corrcoef(torch.stack([before, after]))[0, 1] > 0.2


def test_factored_rows_say_what_ids_have_in_common():
    model = expand_vocabulary(text_model(hidden=64, initializer_range=0.02), SMALL, init="factored")
    rows = tables(model)[0][TEXT:].detach()
    assert rows[: SMALL.size].square().mean().sqrt().item() == pytest.approx(0.02, rel=0.15)
    notes = rows[SMALL.note_offset : SMALL.rest].view(17, 128, 64)
    # a sum of instrument and height: the difference of two instruments is that at every pitch
    gap = notes[3] - notes[5]
    torch.testing.assert_close(gap, gap[:1].expand_as(gap), atol=1e-6, rtol=0)
    # octaves and pitch classes are shared too
    leap = notes[0, 60:72] - notes[0, 48:60]
    torch.testing.assert_close(leap, leap[:1].expand_as(leap), atol=1e-6, rtol=0)
    time = rows[: SMALL.times]
    near = (time[1:] - time[:-1]).norm(dim=1).mean()
    far = (time[100:] - time[:-100]).norm(dim=1).mean()
    assert near < 0.8 * far


@pytest.mark.parametrize("init", ["normal", "mean", "factored"])
def test_seeds_decide_and_leave_the_global_state(init):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = [expand_vocabulary(text_model(), SMALL, init=init, seed=s) for s in (1, 1, 2)]
    one, same, other = (tables(m)[0] for m in made)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("multiple", [8, 64, 1000])
def test_padding_rows_move_no_id(multiple):
    plain = expand_vocabulary(text_model(), SMALL)
    padded = expand_vocabulary(text_model(), SMALL, pad_to_multiple_of=multiple)
    size = padded.config.vocab_size
    assert size % multiple == 0
    assert 0 <= size - plain.config.vocab_size < multiple
    assert size == len(tables(padded)[0])
    assert padded.config.music_offset == plain.config.music_offset == TEXT
    assert torch.equal(tables(padded)[0][:TEXT], tables(plain)[0][:TEXT])
    words = word_tokenizer([str(i) for i in range(TEXT - 4)])
    TextMidiProcessor(words, SMALL, TEXT).check_model(padded)


def test_a_model_is_expanded_once(tmp_path):
    model = expand_vocabulary(text_model(), SMALL)
    before = tables(model)[0].clone()
    with pytest.raises(UserError, match=f"already, from {TEXT} on"):
        expand_vocabulary(model, SMALL)
    assert torch.equal(tables(model)[0], before)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="already"):
        expand_vocabulary(type(model).from_pretrained(tmp_path), SMALL)


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ({"init": "zeros"}, "init must be one of"),
        ({"init": "amt"}, "needs source"),
        ({"init": "normal", "source": torch.zeros(SMALL.size, 16)}, "source"),
        ({"init": "amt", "source": torch.zeros(SMALL.size - 1, 16)}, "shape"),
        ({"init": "amt", "source": torch.zeros(SMALL.size)}, "shape"),
        ({"init": "amt", "source": torch.zeros(1, SMALL.size, 16)}, "shape"),
    ],
)
def test_wrong_arguments_leave_the_model_alone(named, match):
    model = text_model()
    with pytest.raises(UserError, match=match):
        expand_vocabulary(model, SMALL, **named)
    assert len(tables(model)[0]) == TEXT
    assert getattr(model.config, "music_offset", None) is None


def test_sources_of_half_precision_fit_models_of_half_precision():
    model = text_model().to(torch.bfloat16)
    source = torch.randn(SMALL.size, 16).to(torch.float16)
    expand_vocabulary(model, SMALL, init="amt", source=source)
    new = tables(model)[0][TEXT : TEXT + SMALL.size]
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, source.float().to(torch.bfloat16))


# ------------------------------------------------------------------------------------------------
# TextMidiProcessor


def spelt(text):
    """Return ids of the byte tokenizer, from its table."""
    table = byte_tokenizer().get_vocab()
    return [table[letter] for letter in text.replace(" ", "Ġ")]


def test_the_layout_of_a_prompt_to_the_id():
    made = TextMidiProcessor(byte_tokenizer(), ANTICIPATING, 259)
    body = [1, *spelt(SYSTEM + "a sad tune" + " ")]
    assert made.encode_text("a sad tune") == body
    assert made.encode("a sad tune") == [*body, 259 + ANTICIPATING.separator + 1]
    assert made.encode("a sad tune", controls=True) == [*body, 259 + ANTICIPATING.separator + 2]
    assert made.encode("  a sad tune\n") == made.encode("a sad tune")
    assert SYSTEM.endswith("description: ")


def test_the_public_layout_has_the_published_ids():
    """The tokenizer is not at hand; its size is, and the ids follow from it."""
    made = TextMidiProcessor(byte_tokenizer(), FULL, 128256, system="")
    assert made.encode("x") == [1, *spelt("x "), 183282]
    assert 128256 + FULL.size + SPARE == 183286


def test_system_may_be_empty_and_bos_may_be_missing():
    tokenizer = byte_tokenizer()
    assert TextMidiProcessor(tokenizer, SMALL, 300, system="").encode_text("x") == [1, *spelt("x ")]
    tokenizer.bos_token = None
    assert TextMidiProcessor(tokenizer, SMALL, 300, system="").encode_text("x") == spelt("x ")


def test_any_letters_do():
    made = TextMidiProcessor(byte_tokenizer(), SMALL, 259, system="")
    ids = made.encode_text("Walzer für 钢琴 🎹")
    assert made.tokenizer.decode(ids[1:]) == "Walzer für 钢琴 🎹 "
    assert max(ids) < 259


@pytest.mark.parametrize("prompt", ["", "   ", "\n", None, 5, ["a"]])
def test_prompts_must_be_texts(prompt):
    with pytest.raises(UserError, match="must be a text"):
        TextMidiProcessor(byte_tokenizer(), SMALL, 259).encode(prompt)


def test_the_system_sentence_is_not_given_twice():
    made = TextMidiProcessor(byte_tokenizer(), SMALL, 259)
    with pytest.raises(UserError, match="system sentence"):
        made.encode(SYSTEM + "a sad tune")
    TextMidiProcessor(byte_tokenizer(), SMALL, 259, system="").encode(SYSTEM + "a sad tune")


def test_a_grid_without_controls_encodes_none():
    with pytest.raises(UserError, match="no controls"):
        TextMidiProcessor(byte_tokenizer(), SMALL, 259).encode("x", controls=True)


@pytest.mark.parametrize("offset", [258, 0, -1, 259.0, "259", None, True])
def test_music_ids_begin_behind_the_text(offset):
    with pytest.raises(UserError, match="offset"):
        TextMidiProcessor(byte_tokenizer(), SMALL, offset)


@pytest.mark.parametrize("system", [SYSTEM, "", "Spiel für mich: "])
def test_processors_round_trip_through_a_folder(system, tmp_path):
    made = TextMidiProcessor(byte_tokenizer(), ANTICIPATING, 300, system=system)
    made.save_pretrained(tmp_path / "new" / "folder")
    again = TextMidiProcessor.from_pretrained(tmp_path / "new" / "folder")
    assert (again.amt, again.offset, again.system) == (ANTICIPATING, 300, system)
    assert again.encode("ein Lied", controls=True) == made.encode("ein Lied", controls=True)


@pytest.fixture
def saved(tmp_path):
    TextMidiProcessor(byte_tokenizer(), SMALL, 259).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        lambda v: "{", lambda v: "", lambda v: "[]", lambda v: "null", lambda v: "5",
        lambda v: {k: x for k, x in v.items() if k != "amt"},
        lambda v: {k: x for k, x in v.items() if k != "offset"},
        lambda v: {k: x for k, x in v.items() if k != "system"},
        lambda v: {**v, "amt": None}, lambda v: {**v, "amt": []}, lambda v: {**v, "amt": ["x"]},
        lambda v: {**v, "amt": {**v["amt"], "resolution": 0}},
        lambda v: {**v, "amt": {**v["amt"], "resolutoin": 5}},
        lambda v: {**v, "offset": "259"}, lambda v: {**v, "offset": 3},
        lambda v: {**v, "system": None}, lambda v: {**v, "system": 5},
    ],
)  # fmt: skip
def test_broken_settings_are_refused(change, saved):
    file = saved / "amt.json"
    changed = change(json.loads(file.read_text()))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UserError):
        TextMidiProcessor.from_pretrained(saved)


def test_settings_that_are_no_text_are_refused(saved):
    (saved / "amt.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="broken"):
        TextMidiProcessor.from_pretrained(saved)


def test_folders_without_settings_or_tokenizer_are_refused(saved, tmp_path_factory):
    with pytest.raises(UserError, match=r"amt\.json"):
        TextMidiProcessor.from_pretrained(saved / "none")
    empty = tmp_path_factory.mktemp("bare")
    (empty / "amt.json").write_text((saved / "amt.json").read_text())
    with pytest.raises(UserError, match="tokenizer"):
        TextMidiProcessor.from_pretrained(empty)


def test_check_model_counts_rows():
    made = TextMidiProcessor(word_tokenizer([]), SMALL, TEXT)
    with pytest.raises(UserError, match=f"has {TEXT} rows"):
        made.check_model(text_model())
    expanded = expand_vocabulary(text_model(), SMALL)
    made.check_model(expanded)
    made.check_model(tiny_llama(TEXT + SMALL.size, hidden=16, layers=1))
    with pytest.raises(UserError, match="rows"):
        made.check_model(tiny_llama(TEXT + SMALL.size - 1, hidden=16, layers=1))
    with pytest.raises(UserError, match="rows"):
        MidiLM(expanded, TextMidiProcessor(word_tokenizer([]), SMALL, TEXT + SPARE + 1))


def test_a_model_folder_without_weights_is_refused(saved):
    with pytest.raises(UserError, match="model"):
        MidiLM.from_pretrained(saved)


# ------------------------------------------------------------------------------------------------
# convert


def public(folder, *, rows=259 + 55030, safe=True):
    """Make a folder laid out as the public checkpoint, but tiny."""
    model = tiny_llama(rows, hidden=8, heads=2, kv_heads=1, layers=1, tie_word_embeddings=True)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        for file in folder.glob("*.safetensors"):
            file.unlink()
    return model


def test_convert_makes_a_folder_that_loads(tmp_path):
    model = public(tmp_path / "public")
    before = {f.name: f.read_bytes() for f in (tmp_path / "public").iterdir()}
    out = convert(tmp_path / "public", tmp_path / "out")
    assert out == tmp_path / "out"
    assert {f.name: f.read_bytes() for f in (tmp_path / "public").iterdir()} == before
    made = MidiLM.from_pretrained(out, device="cpu")
    assert made.processor.offset == made.model.config.music_offset == 259
    assert made.processor.amt == FULL
    assert made.processor.system == SYSTEM
    assert made.processor.encode("x")[-1] == 259 + 55026
    assert tables(made.model)[0] is tables(made.model)[1]
    assert torch.equal(tables(made.model)[0], tables(model)[0])
    assert made.model.config.vocab_size == 259 + 55030
    assert json.loads((out / "amt.json").read_text())["offset"] == 259
    assert (out / "generation_config.json").is_file()
    piece = made.generate("x", max_notes=3)[0]
    assert len(piece.ids) in (4, 7, 9)
    with pytest.raises(UserError, match="already"):
        expand_vocabulary(made.model, FULL)


def test_convert_reads_a_hubs_cache(tmp_path):
    """There files are links to blobs, by paths that hold only there."""
    model = public(tmp_path / "blobs")
    snapshot = tmp_path / "models" / "snapshots"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    out = convert(snapshot, tmp_path / "a" / "b" / "out")
    assert not any(file.is_symlink() for file in out.iterdir())
    shutil.rmtree(tmp_path / "models")
    made = MidiLM.from_pretrained(out, device="cpu")
    assert torch.equal(tables(made.model)[0], tables(model)[0])


@pytest.mark.parametrize("rows", [259 + 55028, 259 + 55029, 259 + 55031, 259])
def test_convert_says_the_numbers_where_sizes_are_wrong(rows, tmp_path):
    public(tmp_path / "public", rows=rows)
    with pytest.raises(UserError) as error:
        convert(tmp_path / "public", tmp_path / "out")
    for number in (rows, 259, 55028, 259 + 55030):
        assert str(number) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_convert_takes_another_grid(tmp_path):
    public(tmp_path / "public", rows=259 + SMALL.size + SPARE)
    convert(tmp_path / "public", tmp_path / "out", amt=SMALL)
    assert TextMidiProcessor.from_pretrained(tmp_path / "out").amt == SMALL
    with pytest.raises(UserError):
        convert(tmp_path / "public", tmp_path / "out2")


def test_convert_reads_no_pickles(tmp_path):
    public(tmp_path / "public", safe=False)
    with pytest.raises(UserError, match="pickles"):
        convert(tmp_path / "public", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_refuses_missing_and_used_folders(tmp_path):
    with pytest.raises(UserError, match="checkpoint"):
        convert(tmp_path / "none", tmp_path / "out")
    public(tmp_path / "public")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UserError):
        convert(tmp_path / "public", tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine.txt"]
