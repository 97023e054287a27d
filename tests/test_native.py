"""The native folder: whole or not there, its own numbers only, and back without loss."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from brgsa_jax.config import UserError, override
from brgsa_jax.model import Model
from brgsa_jax.predict import load_model
from brgsa_jax.weights import export_checkpoint, import_checkpoint, native

BRGSA = Path(__file__).parent / "golden/ckpt/brgsa_public"
IDS = np.arange(40, dtype=np.int32).reshape(2, 20)


@pytest.fixture(scope="module")
def model():
    return import_checkpoint(BRGSA / "checkpoint.ckpt")


@pytest.fixture
def folder(model, tmp_path):
    return model.save(tmp_path / "model")


def other(model, **changes):
    return Model(override(model.config, changes), model.params, model.bank, model.tokenizer,
                 model.stats, model.origin)


def text(model):
    return model.encode_text_ids(IDS, np.ones_like(IDS))


@pytest.mark.parametrize("after", range(5))
def test_a_save_cut_short_leaves_the_old_model_or_none(model, folder, after, monkeypatch):
    """Parts of two models, of the same shapes, would load as one that neither was."""
    before, moved = text(load_model(folder)), []

    def replace(source, target):
        if Path(target).parent == folder and len(moved) == after:
            raise KeyboardInterrupt
        moved.append(Path(target).name)
        real(source, target)

    real = native.os.replace
    monkeypatch.setattr(native.os, "replace", replace)
    new = other(model, **{"text.heads": 2})
    try:
        new.save(folder)
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    try:
        found = text(load_model(folder))
    except UserError as error:
        assert "config.json" in str(error)
    else:
        assert np.array_equal(found, before) or np.array_equal(found, text(new))
    assert not list(folder.glob(".saving-*"))
    new.save(folder)
    np.testing.assert_array_equal(text(load_model(folder)), text(new))


def test_a_tokenizer_that_was_there_does_not_stay(model, folder):
    Model(model.config, model.params, model.bank, None, model.stats, model.origin).save(folder)
    assert load_model(folder).tokenizer is None


def test_files_of_others_stay(model, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "vocab.txt").write_text("mine")
    model.save(tmp_path)
    assert {(tmp_path / name).read_text() for name in ("README.md", "vocab.txt")} == {"mine"}


@pytest.mark.parametrize(("change", "match"), [
    ({"text.last_n_layers": 7}, "text.last_n_layers=7"), ({"text.last_n_layers": 0}, "layers=0"),
    ({"text.divisor": -3}, "text.divisor=-3"), ({"text.norm_epsilon": -1.0}, "norm_epsilon=-1"),
    ({"input.std": 0.0}, "input.std=0"), ({"input.window": [float("nan"), 1]}, "input.window"),
    ({"bank.scale": "x"}, "bank.scale='x'"), ({"text.heads": 0}, "text.heads=0"),
    ({"text.heads": 5}, "divisor of model.text.width"), ({"dtype": "float16"}, "dtype='float16'"),
    ({"input.shape": [10**6] * 3}, "input.shape"), ({"text.max_tokens": 33}, "max_tokens=33"),
    ({"text.depth": "x"}, "text.depth='x'"), ({"vision": {}}, "cannot be")])
def test_numbers_that_cannot_be_are_named(folder, change, match):
    content = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        (content["model"][section] if section else content["model"])[name] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=match) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_dtypes_that_there_are_not_are_named(folder):
    for dtype in ("float16", "float64", ""):
        with pytest.raises(UserError, match="bfloat16"):
            load_model(folder, dtype=dtype)


@pytest.mark.parametrize(("change", "match"), [
    (lambda x: x.astype("i1"), "holds int8, not float32"), (lambda x: x != 0, "holds bool"),
    (lambda x: x * np.nan, "not finite")])
def test_tensors_of_another_type_are_named(folder, change, match):
    tensors = load_file(folder / "model.safetensors")
    tensors["bank"] = change(tensors["bank"])
    save_file(tensors, str(folder / "model.safetensors"))
    with pytest.raises(UserError, match=match):
        load_model(folder)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"added_tokens": 1}'])
def test_a_broken_tokenizer_is_one_sentence(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="no tokenizer can be loaded|does not put"):
        load_model(folder)


def test_a_tokenizer_without_ends_is_refused(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"does not put \[CLS\] before and \[SEP\] after"):
        load_model(folder)


def test_a_bert_is_no_whole_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="one encoder and no whole model.*init_from"):
        load_model(tmp_path)


# Back to the original names.

def test_what_the_original_reads_from_its_configuration_comes_back(model, tmp_path):
    new = other(model, **{"input.window": (-1000, 400), "input.mean": 0.1, "input.std": 0.7,
                          "input.spacing": (12.0, 12.0, 24.0), "text.clean": False})
    again = import_checkpoint(export_checkpoint(new, tmp_path / "a.safetensors"),
                              tokenizer=BRGSA / "vocab.txt")
    assert again.config.to_dict() == new.config.to_dict()
    hu = np.random.default_rng(0).integers(-1000, 1000, (1, *model.shape)).astype("i2")
    np.testing.assert_array_equal(again.encode_volume(hu), new.encode_volume(hu))


def test_the_configuration_of_another_checkpoint_stays(model, tmp_path):
    shutil.copyfile(BRGSA / "checkpoint.ckpt", tmp_path / "checkpoint.ckpt")
    shutil.copyfile(BRGSA / "config.json", tmp_path / "config.json")
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match="belongs to another model"):
        export_checkpoint(other(model, **{"text.heads": 2}), tmp_path / "other.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.ckpt", "config.json"]
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(("key", "value"), [
    ("large_volume", v) for v in ("abc", 5, [0, 0, 0], [-16, 16, 8], [16.5, 16, 8], ["16"] * 3,
                                  [10**9] * 3, [17, 17, 9])
] + [("vision.base_grid", v) for v in ("abc", 64, ["a"] * 3, [[4]] * 3, {})]
  + [("vision.img_size", v) for v in ("abc", ["x"] * 3, [1, 2], {})]
  + [("text.mean_divisor", 10**29), ("text.last_n_layers", 7), ("text.max_length", 5000),
     ("bank.norm", "yes"), ("text.aggregate_method", "max"), ("text.aggregate_method", 3),
     ("text.do_lower_case", "no"), ("input.window", 3), ("input.std", "x")])
def test_nonsense_beside_a_checkpoint_is_one_sentence(key, value):
    config: dict = {}
    section, _, name = key.rpartition(".")
    (config.setdefault(section, {}) if section else config)[name] = value
    with pytest.raises(UserError) as error:
        import_checkpoint(BRGSA / "checkpoint.ckpt", config=config)
    assert "checkpoint.ckpt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["i4", "u1", "i8"])
def test_integers_are_no_weights(dtype, tmp_path):
    from brgsa_jax.weights.tensors import open_tensors

    tensors = open_tensors(BRGSA / "checkpoint.ckpt")
    save_file({name: tensors.read(name).astype(dtype) for name in tensors.specs},
              str(tmp_path / "model.safetensors"))
    shutil.copyfile(BRGSA / "config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match="not floats"):
        import_checkpoint(tmp_path / "model.safetensors")
