"""`brgsa convert` and `brgsa export` as commands, on the stored checkpoints."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brgsa_jax.cli import main
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.data.sources import open_source
from brgsa_jax.predict import load_model
from brgsa_jax.weights import import_checkpoint
from brgsa_jax.weights.tensors import open_tensors

BRGSA = Path(__file__).parent / "golden/ckpt/brgsa_public"


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "native"
    assert main(["convert", str(BRGSA / "checkpoint.ckpt"), str(folder)]) == 0
    return folder


def test_a_checkpoint_becomes_a_folder_and_goes_back(native, tmp_path, capsys):
    model, imported = load_model(native), import_checkpoint(BRGSA / "checkpoint.ckpt")
    texts = ["There is Tree-in-bud opacity"]
    np.testing.assert_array_equal(model.encode_text(texts), imported.encode_text(texts))
    assert model.config.to_dict() == imported.config.to_dict()
    back = tmp_path / "out" / "brgsa.safetensors"
    assert main(["convert", str(native), str(back)]) == 0
    assert "219,952 parameters" in capsys.readouterr().out
    before, after = open_tensors(BRGSA / "checkpoint.ckpt"), open_tensors(back)
    assert before.specs.keys() == after.specs.keys()
    for name in before.specs:
        np.testing.assert_array_equal(before.read(name), after.read(name))
    # Others on the machine can read what the owner's rights let them.
    for path in (native / "model.safetensors", back):
        assert path.stat().st_mode == (native / "config.json").stat().st_mode
    assert stat.S_IMODE(back.stat().st_mode) & stat.S_IRUSR


def test_nothing_of_another_owner_is_replaced(native, tmp_path, capsys):
    shutil.copytree(BRGSA, tmp_path / "theirs")
    before = (tmp_path / "theirs/config.json").read_bytes()
    assert main(["convert", str(BRGSA / "checkpoint.ckpt"), str(tmp_path / "theirs")]) == 1
    assert (tmp_path / "theirs/config.json").read_bytes() == before
    kept = (native / "config.json").read_bytes()
    assert main(["convert", str(native), str(native / "model.safetensors")]) == 1
    assert (native / "config.json").read_bytes() == kept
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and all("config.json belongs to" in e for e in errors)


def test_a_checkpoint_without_tokenizer_is_said_to_encode_ids_only(tmp_path, capsys):
    for name in ("checkpoint.ckpt", "config.json"):
        shutil.copyfile(BRGSA / name, tmp_path / name)
    assert main(["convert", str(tmp_path / "checkpoint.ckpt"), str(tmp_path / "out")]) == 0
    assert "give --tokenizer" in capsys.readouterr().err
    model = load_model(tmp_path / "out")
    assert model.tokenizer is None
    with np.load(BRGSA / "io.npz") as io:
        t = model.encode_text_ids(io["caption_ids"], io["caption_mask"])
        np.testing.assert_allclose(t, io["t"], rtol=0, atol=1e-5 * np.abs(io["t"]).max())
    assert main(["convert", str(tmp_path / "checkpoint.ckpt"), str(tmp_path / "out"),
                 "--tokenizer", str(BRGSA / "vocab.txt")]) == 0
    assert len(load_model(tmp_path / "out").tokenizer) == 200


@pytest.mark.parametrize(("source", "match"), [
    ("none.ckpt", "none.ckpt"), ("page.ckpt", "page.ckpt"), ("folder", "config.json")])
def test_what_is_no_model_ends_in_one_sentence(source, match, tmp_path):
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html><html>Sign in</html>")
    (tmp_path / "folder").mkdir()
    run = subprocess.run([sys.executable, "-m", "brgsa_jax.cli", "convert",
                          str(tmp_path / source), str(tmp_path / "out")],
                         capture_output=True, text=True)
    assert run.returncode == 1
    assert len(run.stderr.strip().splitlines()) == 1 and match in run.stderr
    assert not (tmp_path / "out").exists()


def test_the_export_of_an_imported_model_is_complete(native, tmp_path, capsys):
    assert main(["export", str(native), "--out", str(tmp_path / "export")]) == 0
    assert "run it with" in capsys.readouterr().out
    about = json.loads((tmp_path / "export/export.json").read_text())
    assert set(about["programs"]) == {"encode_volume", "encode_text", "reconstruct"}
    assert (tmp_path / "export/tokenizer.json").is_file()


def test_a_converted_model_is_evaluated_on_a_data_set(native, tmp_path, capsys):
    data = tmp_path / "data"
    build_phantom(data, seed=1, test=12, shape=(20, 16, 12), workers=1, progress=False)
    # Phantoms this small have large voxels; the tiny model knows nothing either way.
    folder = tmp_path / "model"
    shutil.copytree(native, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["input"]["spacing"] = open_source(data, "test").metadata["spacing"]
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["eval", "--workdir", str(folder), "--out", str(tmp_path / "eval")]
    assert main(arguments) == 1
    assert "add --data" in capsys.readouterr().err
    assert main([*arguments, "--data", str(data)]) == 0
    assert "macro AUROC" in capsys.readouterr().out
    assert (tmp_path / "eval/report.html").is_file()
