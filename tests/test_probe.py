"""The linear probe: shares by patient, penalties from inner folds, the command on both kinds."""

import csv
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_radiographs import TINY, picture

from brgsa_jax import cli
from brgsa_jax import model as models
from brgsa_jax.config import UserError, get_config
from brgsa_jax.data import builders
from brgsa_jax.data.sources import open_source
from brgsa_jax.data.tokenizer import train_tokenizer
from brgsa_jax.evals import probe as probes
from brgsa_jax.evals.run import embed_volumes
from brgsa_jax.network import build
from brgsa_jax.predict import load_model


def volumes(patients=150, width=12, seed=0):
    """Two volumes a patient; the first finding is linear in the embedding, the second is not."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(patients, width))
    x = np.repeat(truth, 2, axis=0) + 0.1 * rng.normal(size=(2 * patients, width))
    noise = rng.normal(size=patients)
    labels = np.stack([truth[:, :4].sum(1) + noise > 0, rng.random(patients) < 0.4], axis=1)
    owners = np.repeat([f"p{i:03d}" for i in range(patients)], 2)
    return SimpleNamespace(x=x * 7 + 3, labels=np.repeat(labels, 2, axis=0), owners=owners,
                           train=np.arange(2 * patients) < patients)


@pytest.fixture(scope="module")
def found():
    data = volumes()
    return data, probes.linear_probe(data.x, data.labels, data.owners, data.train,
                                     names=("easy", "=noise()"), fractions=(0.1, 0.5, 1.0),
                                     resamples=200)


def test_all_labels_give_what_scikit_learn_gives(found):
    data, result = found
    full = result.probes[-1]
    for p in range(2):
        plain = make_pipeline(StandardScaler(), LogisticRegression(C=full.strengths[p],
                                                                   solver="newton-cholesky"))
        plain.fit(data.x[data.train], data.labels[data.train, p])
        expected = plain.decision_function(data.x[~data.train])
        np.testing.assert_allclose(full.scores[:, p], expected, atol=1e-6)
        assert full.findings[p].value == pytest.approx(
            roc_auc_score(data.labels[~data.train, p], expected), abs=1e-12)
    assert full.macro.value == pytest.approx(np.mean([f.value for f in full.findings]))


def test_more_labels_help_where_there_is_something_to_learn(found):
    _, result = found
    easy = [probe.findings[0].value for probe in result.probes]
    assert easy[0] < easy[2] and easy[2] > 0.85
    last = result.probes[-1].findings
    assert last[0].low > 0.7 and last[1].low < 0.5 < last[1].high
    assert all(probe.macro.low < probe.macro.value < probe.macro.high for probe in result.probes)


def test_shares_are_of_patients_and_nested(monkeypatch):
    data, seen = volumes(), []
    judge = probes._judge
    monkeypatch.setattr(probes, "_judge", lambda fraction, members, labels, rows, *rest: (
        seen.append(rows), judge(fraction, members, labels, rows, *rest))[1])
    result = probes.linear_probe(data.x, data.labels, data.owners, data.train, resamples=2,
                                 fractions=(0.01, 0.1, 0.5, 1.0))
    assert [probe.patients for probe in result.probes] == [1, 8, 38, 75]
    owners = [set(data.owners[rows]) for rows in seen]
    for few, more in zip(owners[:-1], owners[1:], strict=True):
        assert few < more
    for rows, mine, probe in zip(seen, owners, result.probes, strict=True):
        # All volumes of a patient come along, none of a test patient.
        assert rows.sum() == 2 * len(mine) == probe.volumes and not rows[~data.train].any()
    other = probes.linear_probe(data.x, data.labels, data.owners, data.train, resamples=2, seed=1,
                                fractions=(0.1,))
    assert set(data.owners[seen[-1]]) != mine and other.probes[0].patients == 8


def test_what_one_patient_tells_is_a_constant_score():
    data = volumes()
    one = probes.linear_probe(data.x, data.labels, data.owners, data.train, fractions=(0.001,),
                              resamples=20).probes[0]
    assert one.patients == 1 and np.isnan(one.strengths).all()
    assert [figure.value for figure in one.findings] == [0.5, 0.5] and one.macro.value == 0.5
    data.labels[~data.train, 1] = False
    none = probes.linear_probe(data.x, data.labels, data.owners, data.train, fractions=(1.0,),
                               resamples=20).probes[0]
    assert np.isnan(none.findings[1].value) and none.macro.value == none.findings[0].value


def test_penalties_are_chosen_on_other_patients():
    """Embeddings know the patient and nothing else: with rows apart a weak penalty would win."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(60, 64)), 4, axis=0)
    y = np.repeat(rng.random((60, 1)) < 0.5, 4, axis=0)
    owners = np.repeat(np.arange(60), 4)
    assert probes._strength(x, y[:, 0], owners, seed=0) <= 0.01
    assert probes._strength(x, y[:, 0], np.arange(240), seed=0) == probes.STRENGTHS[-1]
    assert probes._strength(x[:8], y[:8, 0], np.repeat([0, 1], 4), seed=0) == probes.STRENGTHS[0]


def test_every_fit_is_told():
    data, told = volumes(), []
    probes.linear_probe(data.x, data.labels, data.owners, data.train, fractions=(0.1, 0.2),
                        resamples=2, progress=lambda *done: told.append(done))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_constant_features_and_scales_do_not_matter(found, recwarn):
    data, result = found
    huge = (data.x * 1e35).astype(np.float32)
    again = probes.linear_probe(huge, data.labels, data.owners, data.train, fractions=(1.0,),
                                resamples=2).probes[0]
    np.testing.assert_allclose(again.scores, result.probes[-1].scores, atol=1e-4)
    collapsed = probes.linear_probe(np.ones_like(huge), data.labels, data.owners, data.train,
                                    resamples=2).probes[-1]
    assert collapsed.macro.value == 0.5 and not recwarn.list
    x = np.concatenate([data.x * 1e3 - 5, np.full((len(data.x), 2), 1e8)], axis=1)
    again = probes.linear_probe(x, data.labels, data.owners, data.train, fractions=(1.0,),
                                resamples=2).probes[0]
    np.testing.assert_allclose(again.scores, result.probes[-1].scores, atol=1e-5)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"owners": np.repeat("p", 300)}, UserError, "'p' for one; split by patient"),
    ({"train": np.zeros(300, bool)}, UserError, "no volume to train"),
    ({"train": np.ones(300, bool)}, UserError, "0 patient in the evaluation"),
    ({"x": np.full((300, 2), np.inf)}, UserError, "not finite"),
    ({"labels": np.zeros((300, 0), bool)}, UserError, "no finding to probe"),
    ({"labels": np.zeros((299, 2), bool)}, ValueError, "do not fit"),
])
def test_what_cannot_be_probed_is_refused(change, error, message):
    data = SimpleNamespace(**{**vars(volumes()), **change})
    with pytest.raises(error, match=message):
        probes.linear_probe(data.x, data.labels, data.owners, data.train)


@pytest.mark.parametrize("fractions", [(), (0.0, 1.0), (1.5,), (float("nan"),)])
def test_fractions_are_shares(fractions):
    data = volumes()
    with pytest.raises(UserError, match="give fractions above 0 and up to 1"):
        probes.linear_probe(data.x, data.labels, data.owners, data.train, fractions=fractions)


def test_files_hold_every_figure(found, tmp_path):
    _, result = found
    files = probes.write_probe(tmp_path, result, {"embedding": "pooled"})
    written = json.loads(files[0].read_text())
    assert written["embedding"] == "pooled"
    assert written["test"] == {"volumes": 150, "patients": 75}
    rows = list(csv.DictReader(files[1].open()))
    assert len(rows) == 9 and {row["finding"] for row in rows} == {"macro", "easy", "'=noise()"}
    for entry, probe in zip(written["fractions"], result.probes, strict=True):
        assert entry["macro"]["auroc"] == probe.macro.as_dict()
        assert entry["macro"]["partial_resamples"] == probe.macro.undefined
        assert entry["findings"]["easy"]["C"] == probe.strengths[0]
        mine = [row for row in rows if float(row["fraction"]) == probe.fraction]
        assert float(mine[1]["auroc"]) == pytest.approx(probe.findings[0].value, abs=1e-6)
        assert int(mine[1]["train_positives"]) == probe.positives[0]


# The command


def save_model(folder, name, **changes):
    tokenizer = train_tokenizer(["There is Edema"], 16)
    config = get_config(name, **{**changes, "model.text.vocab": len(tokenizer),
                                 "model.text.max_tokens": 16}).model
    network = build(config)
    params, stats = jax.jit(lambda key: (network.init(key), network.init_stats(key)))(
        jax.random.key(0))
    return models.Model(config, params, None, tokenizer, stats).save(folder)


@pytest.fixture(scope="module")
def radiographs(tmp_path_factory):
    """Radiographs whose one finding is a bright corner, and an untrained MGCA."""
    root = tmp_path_factory.mktemp("radiographs")
    (root / "images").mkdir()
    with (root / "t.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "report", "findings"])
        for number in range(80):
            image = picture(number % 5)
            if number % 2:
                image[20:45, 15:45] = 255
            Image.fromarray(image).save(root / "images" / f"i{number:02d}.png")
            table.writerow([f"i{number:02d}", f"Report {number} of a chest.",
                            "Edema" if number % 2 else ""])
    data = builders.build_image2d(root / "set", images=root / "images", table=root / "t.csv",
                                  size=32, workers=1, findings_column="findings", progress=False,
                                  split={"train": 0.5, "test": 0.5}).out
    model = save_model(root / "model", "mgca", **{
        key: value for key, value in TINY.items() if key.startswith("model.")},
        **{"model.local_head.name": ""})
    return SimpleNamespace(data=data, model=model, root=root)


def run(capsys, *arguments):
    code = cli.main(["probe", *map(str, arguments)])
    shown = capsys.readouterr()
    return SimpleNamespace(code=code, out=shown.out, err=shown.err)


def test_the_command_probes_radiographs_before_and_after_the_projection(radiographs, capsys):
    model = load_model(radiographs.model)
    source = open_source(radiographs.data, "test")
    pooled = probes.Backbone(model)
    # What the tower gives, projected, is what the model gives.
    tower = embed_volumes(pooled, source)
    head = jax.jit(model.network.parts["vision_head"].apply)
    projected = head(model.params["vision_head"], tower, stats=model.stats.get("vision_head"))
    np.testing.assert_allclose(projected, embed_volumes(model, source), atol=1e-5)
    ends = []
    for options in (("--projected",), (), ()):
        result = run(capsys, "--workdir", radiographs.model, "--data", radiographs.data,
                     "--fractions", "0.2,1", *options)
        assert result.code == 0, result
        written = json.loads((radiographs.model / "probe" / "probe.json").read_text())
        assert written["embedding"] == ("projected" if options else "pooled")
        assert [entry["fraction"] for entry in written["fractions"]] == [0.2, 1.0]
        assert list(written["fractions"][1]["findings"]) == ["Edema"]
        ends.append(written["fractions"][1]["macro"]["auroc"])
        assert f"macro AUROC {ends[-1]['value']:.3f}" in result.out
    # Kept embeddings give the same figures; both kinds are kept, train and test.
    assert ends[1] == ends[2] and ends[1]["low"] > 0.9
    assert len(list((radiographs.model / "eval" / "cache").glob("volumes-*.npz"))) == 4


def test_the_command_probes_volumes(tmp_path, capsys):
    data = builders.build_phantom(tmp_path / "data", train=20, test=8, shape=(32, 32, 16),
                                  workers=1, progress=False).out
    model = save_model(tmp_path / "model", "phantom", **{
        "model.input.shape": (32, 32, 16), "model.input.spacing": (12.0, 12.0, 24.0),
        "model.vision.patch": (16, 16, 8), "model.vision.stem": (), "model.vision.depth": 1,
        "model.vision.width": 24, "model.vision.mlp_width": 48, "model.embed_dim": 24,
        "model.text.width": 24, "model.text.mlp_width": 48, "model.text.depth": 1,
        "model.bank.rows": 0})
    result = run(capsys, "--workdir", model, "--data", data, "--out", tmp_path / "out")
    assert result.code == 0, result
    rows = list(csv.DictReader((tmp_path / "out" / "probe.csv").open()))
    assert {row["fraction"] for row in rows} == {"0.01", "0.1", "1"}
    assert {row["train_patients"] for row in rows} == {"1", "2", "20"}


def test_mistakes_are_told_in_a_sentence(radiographs, tmp_path, capsys):
    for arguments, message in (
            (("--workdir", tmp_path), "holds no config.json"),
            (("--workdir", radiographs.model), "add --data with a folder"),
            (("--workdir", radiographs.model, "--data", tmp_path), "data build")):
        result = run(capsys, *arguments)
        assert result.code == 1 and message in result.err and result.err.count("\n") == 1
    for fractions in ("0", "2", "a", ""):
        with pytest.raises(SystemExit) as stop:
            run(capsys, "--workdir", tmp_path, "--fractions", fractions)
        assert stop.value.code == 2 and "--fractions" in capsys.readouterr().err
