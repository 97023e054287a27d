"""Exported programs run with jax alone, for every batch size, and say what the model says."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_model import PROMPTS, make_model, radiographs, random_stats

from brgsa_jax.config import UserError
from brgsa_jax.data.tokenizer import load_tokenizer
from brgsa_jax.evals.run import bridge
from brgsa_jax.export import export_model
from brgsa_jax.model import Model

# Runs run.py where nothing can be imported but jax and what jax needs.
ALONE = """
import runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
import numpy as np
known = {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers"}
class OnlyJax:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top in known | sys.stdlib_module_names or top.startswith("_sysconfigdata"):
            return PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, OnlyJax]
for name in ("brgsa_jax", "flax", "transformers"):
    try:
        __import__(name)
        sys.exit(f"{name} is not blocked")
    except ModuleNotFoundError:
        pass
script, volumes, tokens, out = sys.argv[1:]
load = runpy.run_path(script)["load"]
encode_volume, encode_text, reconstruct = map(
    load, ("encode_volume", "encode_text", "reconstruct"))
images, results = np.load(volumes), {}
with np.load(tokens) as file:
    ids, mask = file["ids"], file["mask"]
for rows in (1, 3, 5):
    image = encode_volume(images[:rows], batch_size=rows)
    results[f"volumes_{rows}"], results[f"bank_{rows}"] = image, reconstruct(image, batch_size=rows)
    results[f"texts_{rows}"] = encode_text(ids[:rows], mask[:rows], batch_size=rows)
np.savez(out + ".sizes.npz", **results)
sys.argv = [script, "--volumes", volumes, "--tokens", tokens, "--out", out, "--batch-size", "2"]
runpy.run_path(script, run_name="__main__")
print("transformers" in sys.modules, "flax" in sys.modules, "brgsa_jax" in sys.modules)
"""


def hu(model, rows):
    return np.random.default_rng(0).integers(-1200, 1200, (rows, *model.shape)).astype(np.int16)


def program(folder, name):
    return runpy.run_path(str(folder / "run.py"))["load"](name)


def same(actual, expected):
    """Equal to 1e-6 of the largest entry."""
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with a bank; 129 image tokens, for which a CPU would not choose XLA's attention."""
    model = make_model(**{"model.vision.patch": (8, 8, 2)})
    return SimpleNamespace(model=model, folder=export_model(
        model, tmp_path_factory.mktemp("export") / "new" / "m"))


@pytest.fixture(scope="module")
def plain():
    """A model in bfloat16 with two windows and no bank."""
    return make_model("clip", **{"model.dtype": "bfloat16", "model.vision.depth": 1,
                                 "model.input.window": ((-1000, 1000), (-160, 240))})


def test_one_program_for_all_batch_sizes_runs_where_only_jax_can_be_imported(exported, tmp_path):
    model, images = exported.model, hu(exported.model, 5)
    texts = [*PROMPTS, "There is Lung nodule There is Emphysema", "There is"]
    ids, mask = model.tokenizer(texts)
    np.save(tmp_path / "volumes.npy", images)
    np.savez(tmp_path / "tokens.npz", ids=ids, mask=mask)
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, exported.folder / "run.py", tmp_path / "volumes.npy",
         tmp_path / "tokens.npz", out], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""})
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[-1] == "False False False"
    assert run.stdout.startswith(f"volumes (5, 48) in {out}\ntexts (5, 48) in {out}\n")
    image, text = model.encode_volume(images), model.encode_text(texts)
    with np.load(f"{out}.sizes.npz") as sizes:
        for rows in (1, 3, 5):
            same(sizes[f"volumes_{rows}"], image[:rows])
            same(sizes[f"texts_{rows}"], text[:rows])
            same(sizes[f"bank_{rows}"], bridge(model, image[:rows]))
    with np.load(out) as results:
        for name, expected in (("volumes", image), ("texts", text)):
            same(results[name], expected)
            same(results[f"{name}_from_bank"], bridge(model, expected))


def test_the_folder_tells_what_is_in_it(exported):
    about = json.loads((exported.folder / "export.json").read_text())
    model = exported.model
    assert about["format"] == "brgsa_jax.export/1" and about["jax"] == jax.__version__
    assert about["input"] == {"shape": [32, 32, 16], "spacing": list(model.spacing),
                              "orientation": "LPS", "values": "HU"}
    assert about["embed_dim"] == 48
    assert about["model"]["vision"]["patch"] == [8, 8, 2]
    assert sorted(about["files"]) == sorted(path.name for path in exported.folder.iterdir())
    shapes = {name: [entry["shape"] for entry in part["inputs"]]
              for name, part in about["programs"].items()}
    assert shapes == {"encode_volume": [["b", 32, 32, 16]], "encode_text": [["b", 16]] * 2,
                      "reconstruct": [["b", 48]]}
    with np.load(exported.folder / "weights.npz", allow_pickle=False) as weights:
        named = [name for part in about["programs"].values() for name in part["weights"]]
        assert sorted(weights.files) == sorted(named)
        np.testing.assert_array_equal(weights["params/text/word/embedding"],
                                      model.params["text"]["word"]["embedding"])
        np.testing.assert_array_equal(weights["bank"], model.bank)
    for name in about["programs"]:
        content = (exported.folder / f"{name}.stablehlo").read_bytes()
        assert jax.export.deserialize(bytearray(content)).platforms == ("cpu", "cuda", "tpu")
        # The weights are arguments, not constants in the program.
        assert len(content) < 60_000
    saved = load_tokenizer(exported.folder, 16)
    np.testing.assert_array_equal(saved(PROMPTS), model.tokenizer(PROMPTS))


def test_bfloat16_and_several_windows_without_bank_and_tokenizer(plain, tmp_path):
    bare = Model(plain.config, plain.params, None, None)
    folder = tmp_path / "empty"
    folder.mkdir()
    assert export_model(bare, folder, platforms=("cpu",)) == folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "encode_text.stablehlo", "encode_volume.stablehlo", "export.json", "run.py", "weights.npz"]
    images, (ids, mask) = hu(plain, 3), plain.tokenizer(PROMPTS)
    same(program(folder, "encode_volume")(images, batch_size=3), plain.encode_volume(images))
    same(program(folder, "encode_text")(ids, mask, batch_size=3), plain.encode_text(PROMPTS))


def test_radiographs_with_their_batch_statistics(tmp_path):
    model = radiographs("resnet50")
    model.stats = random_stats(model.stats)
    folder = export_model(model, tmp_path / "m", platforms=("cpu",))
    about = json.loads((folder / "export.json").read_text())
    assert about["input"] == {"shape": [32, 48], "spacing": [], "orientation": None,
                              "values": "grey levels"}
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 48)).astype(np.uint8)
    expected = model.encode_volume(images)
    assert np.abs(expected).max() > 1e-3
    same(program(folder, "encode_volume")(images, batch_size=3), expected)


def test_a_platform_the_programs_were_not_made_for_is_named(plain, tmp_path):
    with pytest.raises(UserError, match="unknown platform 'gpu'.*choices: cpu, cuda, rocm, tpu"):
        export_model(plain, tmp_path / "m", platforms=("cpu", "gpu"))
    with pytest.raises(UserError, match="choices: cpu, cuda, rocm, tpu"):
        export_model(plain, tmp_path / "m", platforms=())
    assert not list(tmp_path.iterdir())
    folder = export_model(plain, tmp_path / "m", platforms=("cuda",))
    with pytest.raises(ValueError, match="exported for platforms.*cuda.*used on.*cpu"):
        program(folder, "encode_volume")(hu(plain, 1))


def test_only_an_earlier_export_is_replaced(exported, plain, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(exported.folder, folder)
    (folder / "__pycache__").mkdir()
    before = {path.name for path in folder.iterdir()}

    def full_disk(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full_disk)
        with pytest.raises(OSError, match="no space left"):
            export_model(plain, folder)
    assert {path.name for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    export_model(plain, folder, platforms=("cpu",))
    assert before - {path.name for path in folder.iterdir()} == {"__pycache__",
                                                                 "reconstruct.stablehlo"}
    about = json.loads((folder / "export.json").read_text())
    assert about["model"]["dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    (folder / "embeddings.npz").write_bytes(b"mine")
    with pytest.raises(UserError, match="out holds embeddings.npz, which no export wrote"):
        export_model(plain, folder)
    assert (folder / "embeddings.npz").read_bytes() == b"mine"
    native = plain.save(tmp_path / "native")
    with pytest.raises(UserError, match="native holds config.json, which no export wrote"):
        export_model(plain, native)
    with pytest.raises(UserError, match="config.json is a file"):
        export_model(plain, native / "config.json")


def test_the_script_tells_mistakes_in_one_sentence(exported, tmp_path, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments), "--out",
                                          str(tmp_path / "out.npz")])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(exported.folder / "run.py"), run_name="__main__")
        assert not (tmp_path / "out.npz").exists()
        return stopped.value.code

    path = tmp_path / "volumes.npy"
    np.save(path, np.zeros((1, 32, 32, 8), np.int16))
    assert run("--volumes", path) == ("run.py: volumes of the shape (1, 32, 32, 8) are none of "
                                      "this model; give ['b', 32, 32, 16]")
    np.save(path, np.full((1, 32, 32, 16), np.nan, np.float32))
    assert "encode_volume gave values that are not finite" in run("--volumes", path)
    np.save(path, np.array([{}]), allow_pickle=True)
    assert run("--volumes", path) == (
        f"run.py: {path} cannot be read (Array can't be memory-mapped: Python objects in dtype.); "
        "give a .npy file of numbers")
    path.write_bytes(path.read_bytes()[:20])
    assert f"{path} cannot be read" in run("--volumes", path)
    assert "missing.npy cannot be read" in run("--volumes", tmp_path / "missing.npy")
    tokens = tmp_path / "tokens.npz"
    np.savez(tokens, ids=np.full((2, 16), 10**6), mask=np.ones((2, 16)))
    assert "token ids of another vocabulary" in run("--tokens", tokens)
    np.savez(tokens, ids=np.zeros((2, 16)), mask=np.ones((1, 16)))
    assert "mask of the shape (1, 16)" in run("--tokens", tokens)
    np.savez(tokens, ids=np.zeros((2, 16)))
    for wrong in (tokens, path):
        assert "give a .npz file with ids and mask" in run("--tokens", wrong)
    assert "give a .npy file of numbers" in run("--volumes", tokens)


def test_no_rows_give_no_embeddings(exported):
    assert program(exported.folder, "encode_volume")(hu(exported.model, 0)).shape == (0, 48)
