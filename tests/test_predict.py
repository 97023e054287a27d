"""Zero-shot on files: scores, names and pictures; foreign models and prompts."""

import json
import shutil
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_model import radiographs

from brgsa_jax import cli
from brgsa_jax import model as models
from brgsa_jax.config import UserError, get_config
from brgsa_jax.data import phantom
from brgsa_jax.data.tokenizer import sentences_of, train_tokenizer
from brgsa_jax.evals.scores import read_scores
from brgsa_jax.network import build
from brgsa_jax.predict import (
    load_model,
    read_files,
    read_prompts,
    volume_id,
    write_heatmaps,
    zero_shot,
)
from brgsa_jax.summarize.vocabulary import CT_RATE_18

PROMPTS = ["There is Lung nodule", "There is Emphysema", "There is Pleural effusion"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small untrained model on the phantom's own grid."""
    import jax

    tokenizer = train_tokenizer(sentences_of(CT_RATE_18), 16)
    config = get_config("phantom", **{
        "model.text.vocab": len(tokenizer), "model.text.max_tokens": 16, "model.embed_dim": 24,
        "model.vision.patch": (16, 16, 16), "model.vision.stem": (), "model.vision.depth": 1,
        "model.vision.width": 24, "model.vision.mlp_width": 48, "model.text.width": 24,
        "model.text.mlp_width": 48, "model.text.depth": 1, "model.bank.rows": 16}).model
    network = build(config)
    params = jax.jit(network.init)(jax.random.key(0))
    bank = models.init_bank(jax.random.key(1), config.bank.rows, config.embed_dim)
    return models.Model(config, params, bank, tokenizer).save(
        tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Patients in random orientations, and what the model is to see of each."""
    root = tmp_path_factory.mktemp("scans")
    paths, seen = [], []
    x, y = (((np.arange(64) + 0.5) / 64 - 0.5) * 2 for _ in range(2))
    circle = (x[:, None] ** 2 + y[None] ** 2 <= 1)[..., None]
    for patient in range(3):
        case = phantom.generate(4, patient)
        paths.append(root / f"patient {patient}.nii.gz")
        nibabel.save(phantom.native_image(case, seed=patient + 3), paths[-1])
        seen.append(np.where(circle, np.clip(case.volume, -1000, 1000), -1000).astype(np.int16))
    orientations = {nibabel.aff2axcodes(nibabel.load(path).affine) for path in paths}
    assert len(orientations) == 3
    return SimpleNamespace(paths=paths, seen=np.stack(seen), ids=[f"patient {i}" for i in range(3)])


def predict(capsys, *arguments):
    code = cli.main(["predict", *map(str, arguments)])
    shown = capsys.readouterr()
    return SimpleNamespace(code=code, out=shown.out, err=shown.err)


def test_files_in_any_orientation_score_as_their_canonical_arrays(folder, model, scans, tmp_path,
                                                                  capsys):
    out = tmp_path / "new" / "out"
    result = predict(capsys, *scans.paths, "--model", folder, "--out", out)
    assert (result.code, result.err) == (0, "")
    files = read_files(model, scans.paths)
    for volume, seen in zip(files.volumes, scans.seen, strict=True):
        np.testing.assert_array_equal(volume.volume, seen)
    table = read_scores(out / "scores.csv")
    assert (out / "scores.csv").read_text().startswith("id,There is ")
    assert list(table.ids) == scans.ids and list(table.names) == list(sentences_of(CT_RATE_18))
    expected = zero_shot(model, scans.seen, sentences_of(CT_RATE_18)).scores
    np.testing.assert_allclose(table.values, expected, atol=1e-6)
    assert np.ptp(expected, axis=0).min() > 1e-5
    assert {path.name for path in out.iterdir()} == {
        "scores.csv", *(f"{name}.png" for name in scans.ids)}
    for name in scans.ids:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    best = table.names[table.values[2].argmax()]
    shown = result.out[result.out.index("patient 2\n"):]
    assert best in shown.splitlines()[4] and f"{table.values[2].max():+.3f}" in shown
    assert str(out / "scores.csv") in result.out.splitlines()[-1]


def test_a_broken_file_is_named_and_the_others_go_on(folder, scans, tmp_path, capsys):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(scans.paths[0].read_bytes()[:900])
    prompts = tmp_path / "p.txt"
    prompts.write_text("There is Emphysema\n")
    result = predict(capsys, broken, scans.paths[1], tmp_path / "none.nii", tmp_path / ("x" * 300),
                     "--model", folder, "--prompts", prompts, "--out", tmp_path / "o")
    assert result.code == 1 and read_scores(tmp_path / "o" / "scores.csv").ids == ("patient 1",)
    lines = result.err.splitlines()
    assert len(lines) == 3 and all(line.startswith("brgsa: refused: ") for line in lines)
    assert str(broken) in lines[0] and "cut short" in lines[0] and "no such file" in lines[1]
    result = predict(capsys, broken, "--model", folder, "--out", tmp_path / "p")
    assert result.code == 1 and "none of the 1 files is a usable image" in result.err
    assert not (tmp_path / "p" / "scores.csv").exists()


def test_an_odd_volume_is_scored_with_a_warning(folder, tmp_path, capsys):
    case = phantom.generate(4, 0)
    slab = case.volume[:, :, :8].clip(-100, 300)
    slab[:20] = -1000
    affine = np.diag([-case.spacing[0], -case.spacing[1], 5.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(slab, affine), tmp_path / "slab.nii")
    result = predict(capsys, tmp_path / "slab.nii", "--model", folder, "--out", tmp_path / "o")
    assert result.code == 0 and "brgsa: warning: slab: may not be a chest" in result.err


def test_prompts_are_lines_of_a_text_file(tmp_path):
    path = tmp_path / "p.txt"

    def read(content):
        path.write_bytes(content)
        return read_prompts(path)

    assert read(b"\xef\xbb\xbfThere is X\r\n\r\n # no\r\n#no\n There\tis  Y \nThere is X") == [
        "There is X", "There is Y"]
    for content, words in ((b"", "holds no prompt"), (b"# a\n \n", "holds no prompt"),
                           (b"\xe9", "cannot be read"), ("a".encode("utf-16"), "cannot be read"),
                           (b"a\0b", "control characters"), (b"\x1b[31m", "control characters")):
        with pytest.raises(UserError, match=words):
            read(content)
    for bad in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match="cannot be read"):
            read_prompts(bad)


def test_prompts_stay_text_on_the_terminal_and_in_the_table(folder, scans, tmp_path, capsys):
    prompts = ["<script>alert(1)</script>", "=cmd()", "[bold]a :smile: [/red]", 'say "a, b"']
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    result = predict(capsys, scans.paths[0], "--model", folder, "--prompts", tmp_path / "p.txt",
                     "--score", "direct", "--out", tmp_path / "[o]")
    assert result.code == 0
    assert all(prompt in result.out for prompt in prompts) and "[o]" in result.out
    text = (tmp_path / "[o]" / "scores.csv").read_text()
    assert ",'=cmd()," in text
    assert list(read_scores(tmp_path / "[o]" / "scores.csv").names) == prompts


@pytest.mark.parametrize(("path", "expected"), [
    ("a/b.nii.gz", "b"), ("b.NII", "b"), ("a.b.nii", "a.b"), (".nii.gz", ".nii.gz"), ("c", "c"),
    ("a\nb\x1b\udcff.nii", "a_b__")])
def test_names_of_volumes(path, expected):
    assert volume_id(path) == expected


def test_files_of_the_same_name_keep_apart(model, scans, tmp_path):
    paths = []
    for name in ("x/a.nii.gz", "y/a.nii.gz", "a_2.nii.gz"):
        paths.append(tmp_path / name)
        paths[-1].parent.mkdir(exist_ok=True)
        shutil.copy(scans.paths[0], paths[-1])
    ids = read_files(model, paths).ids
    assert len(set(ids)) == 3 and ids[0] == "a"


def test_a_checkpoint_is_no_model_folder_and_says_how_to_become_one(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a.ckpt is a file; .* brgsa convert .*a.ckpt FOLDER"):
        load_model(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["none", "../none/m", "~/m", "a/b/c", "", "x" * 400,
                                  "hf://a/b", "./m"])
def test_what_cannot_be_a_model_is_said_so(name):
    with pytest.raises(UserError, match="there is no model at"):
        load_model(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "x y/z", "owner/..", "-/-", "x" * 300 + "/y"])
def test_hub_ids_without_a_model_are_explained(name):
    with pytest.raises(UserError, match="no folder here, and the hub gave no model"):
        load_model(name)


def vary(folder, out, change, file="config.json"):
    shutil.copytree(folder, out)
    content = json.loads((out / file).read_text())
    content = change(content) or content
    (out / file).write_text(json.dumps(content))
    return out


@pytest.mark.parametrize(("key", "value"), [
    ("embed_dim", "x"), ("embed_dim", 10**9), ("embed_dim", None), ("dtype", "float99"),
    ("input", 5), ("input.shape", [64, 64]), ("input.shape", [10**6] * 3), ("input.shape", [0] * 3),
    ("input.spacing", ["a", 1, 1]), ("input.spacing", [0, 1, 1]), ("input.window", []),
    ("input.window", [0, 0]), ("input.mean", "x"), ("vision", []), ("vision.name", "nope"),
    ("vision.heads", 5), ("vision.patch", [0, 0, 0]), ("vision.depth", 10**6), ("vision.more", 1),
    ("text.vocab", 10**12), ("text.vocab", -1), ("text.max_tokens", 10**7), ("text.max_tokens", 0),
    ("bank.rows", 10**12), ("bank", None)])
def test_a_wrong_configuration_is_one_sentence(folder, tmp_path, key, value):
    def change(content):
        *parents, leaf = f"model.{key}".split(".")
        for parent in parents:
            content = content[parent]
        content[leaf] = value

    with pytest.raises(UserError) as caught:
        load_model(vary(folder, tmp_path / "m", change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["null", "[1]", "{", '{"format": "brgsa_jax/2"}', "[" * 100000])
def test_a_file_that_is_no_configuration_is_one_sentence(folder, tmp_path, text):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        load_model(tmp_path / "m")


def test_surplus_tensors_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "surplus": np.zeros(2, "f4")}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match="surplus is unknown"):
        load_model(tmp_path / "m")


def test_weights_that_are_no_numbers_are_told(folder, scans, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: np.full_like(value, np.nan) for name, value in tensors.items()},
              tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        zero_shot(load_model(tmp_path / "m"), scans.seen[:1], PROMPTS)


def test_code_beside_a_tokenizer_never_runs(folder, tmp_path):
    proof = tmp_path / "proof"

    def change(content):
        content["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        content["tokenizer_class"] = "Evil"

    out = vary(folder, tmp_path / "m", change, "tokenizer_config.json")
    (out / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Evil: pass\n")
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_model(out)
    assert not proof.exists()


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    def grow(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["zebra"] = len(vocabulary)

    with pytest.raises(UserError, match="tokens up to number"):
        load_model(vary(folder, tmp_path / "more", grow, "tokenizer.json"))
    broken = vary(folder, tmp_path / "broken", lambda content: {"a": 1}, "tokenizer.json")
    with pytest.raises(UserError, match="no tokenizer can be loaded from"):
        load_model(broken)


def test_a_model_of_radiographs_loads_and_scores_arrays(tmp_path, scans, capsys):
    model = radiographs("vit2d")
    folder = model.save(tmp_path / "m")
    again = load_model(folder)
    grey = np.random.default_rng(0).integers(0, 256, (2, 32, 48)).astype("u1")
    found = zero_shot(again, grey, PROMPTS)
    v, t = (x / np.linalg.norm(x, axis=1, keepdims=True)
            for x in (model.encode_volume(grey), model.encode_text(PROMPTS)))
    np.testing.assert_allclose(found.scores, v @ t.T, atol=1e-5)
    result = predict(capsys, scans.paths[0], "--model", folder, "--out", tmp_path / "o")
    assert result.code == 1 and "48 pixels, which no file gives" in result.err
    for name, shape in (("empty", [0, 48]), ("long", [32, 48, 16])):
        def change(content, shape=shape):
            content["model"]["input"]["shape"] = shape

        with pytest.raises(UserError):
            load_model(vary(folder, tmp_path / name, change))


def test_heatmaps_lie_on_the_grid_of_their_files(folder, model, scans, tmp_path, capsys):
    prompts = ["There is X/../y: é", "There is X:../y: é"]
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    result = predict(capsys, *scans.paths[:2], "--model", folder, "--prompts", tmp_path / "p.txt",
                     "--heatmaps", "--out", tmp_path / "o")
    assert (result.code, result.err) == (0, "") and "2 heat-maps of each image" in result.out
    stems = ["There_is_X____y__é", "There_is_X____y__é_2"]
    names = {f"{key}_{stem}{end}" for key in scans.ids[:2] for stem in stems
             for end in (".nii.gz", ".png")}
    assert {path.name for path in (tmp_path / "o").iterdir()} == {
        "scores.csv", *(f"{key}.png" for key in scans.ids[:2]), *names}
    found = zero_shot(model, scans.paths[:2], prompts[:1], heatmaps=True)
    assert found.heatmaps.shape == (2, 1, 64, 64, 32) and found.heatmaps.min() >= 0
    for path, key, heat in zip(scans.paths, scans.ids, found.heatmaps[:, 0], strict=False):
        image, written = nibabel.load(path), nibabel.load(
            tmp_path / "o" / f"{key}_{stems[0]}.nii.gz")
        np.testing.assert_allclose(written.affine, image.affine)
        # The phantom's file holds the model's voxels in another order: back in order, all agree.
        codes = nibabel.orientations.axcodes2ornt("LPS")
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(image.affine), codes)
        back = nibabel.orientations.apply_orientation(written.get_fdata(), turn)
        np.testing.assert_allclose(back, heat, atol=2e-4 * heat.max())


def test_names_of_heatmaps_never_meet(model, scans, tmp_path):
    files = read_files(model, scans.paths[:1])._replace(ids=["a" * 240])
    written = write_heatmaps(tmp_path, model, files, ["x/y", "z" * 300])
    assert len(set(written)) == 4 and all(path.parent == tmp_path for path in written)
    assert max(len(path.name.encode()) for path in written) <= 255
