"""Fine-tuning: labels, the classifier's objective and step, runs of it, AUROC while training."""

import csv
import json

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from sklearn.metrics import log_loss, roc_auc_score
from test_model import drawn_model, tokenizer_of_prompts
from test_step import make_batch, moments_of, training_on
from test_trainer import after, rows

from brgsa_jax import config as configs
from brgsa_jax import flops, mesh, paths
from brgsa_jax.cli import main
from brgsa_jax.config import UserError
from brgsa_jax.data import feed
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.data.labelled import open_labelled, positive_weights
from brgsa_jax.data.sources import open_source
from brgsa_jax.evals import scores
from brgsa_jax.losses import classification
from brgsa_jax.network import build
from brgsa_jax.predict import load_model
from brgsa_jax.train import trainer, validation
from brgsa_jax.train.step import Batch, make_training, model_of
from brgsa_jax.weights.initialise import initial_weights

QUIET = Console(quiet=True)
NAMES = ("Emphysema", "Cardiomegaly", "Pleural effusion")
TINY = {
    "model.input.shape": (32, 32, 16), "model.input.spacing": (12.0, 12.0, 24.0),
    "data.crop": (32, 32, 16), "model.vision.stem": (), "model.embed_dim": 24,
    "model.vision.width": 24, "model.vision.mlp_width": 48, "model.text.width": 24,
    "model.text.mlp_width": 48, "model.bank.rows": 16, "model.text.max_tokens": 16,
    "data.batch_size": 8, "optim.name": "adamw", "optim.warmup": 0}


def tuned(**changes):
    """The recipe at a size that compiles fast."""
    return configs.get_config("finetune:phantom", **{**TINY, "model.classes": NAMES,
                                                     "model.text.vocab": 120, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "phantom"
    build_phantom(out, seed=1, train=40, valid=24, test=8, shape=(32, 32, 16), workers=1,
                  progress=False)
    return out


@pytest.fixture(scope="module")
def table(data):
    """Labels of the training split but for every fourth volume, some of them unknown."""
    file = data.parent / "labels.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["id", "patient", *reversed(NAMES)])
        for number, row in enumerate(open_source(data, "train").index):
            cells = [str(int(name in row.findings)) for name in reversed(NAMES)]
            if number % 4:
                writer.writerow([row.id, row.patient, *cells[:2], ("-1", "", cells[2])[number % 3]])
    return file


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A model whose weights are drawn, as `brgsa train` exports one."""
    model = drawn_model(configs.get_config("phantom", **{
        **TINY, "model.text.vocab": len(tokenizer_of_prompts())}))
    return model.save(tmp_path_factory.mktemp("pretrained") / "model")


# The objective.


def test_the_loss_is_the_mean_cross_entropy_of_what_is_known():
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(12, 3))
    labels = rng.integers(-1, 2, (12, 3)).astype("i1")
    weights = np.array([0.5, 2.0, 7.0])
    known, p = labels >= 0, 1 / (1 + np.exp(-logits))
    by_hand = -np.where(labels == 1, weights * np.log(p), np.log(1 - p))
    loss = jax.jit(classification)
    with jax.enable_x64():
        np.testing.assert_allclose(loss(logits, labels, positive_weights=weights),
                                   by_hand[known].mean(), rtol=1e-12)
        np.testing.assert_allclose(loss(logits, labels), log_loss(labels[known], p[known]),
                                   rtol=1e-12)
        gradient = jax.jit(jax.grad(lambda z: classification(z, labels)))(logits)
        np.testing.assert_allclose(gradient, np.where(known, p - labels, 0) / known.sum(),
                                   atol=1e-12)
    nothing = jax.jit(jax.value_and_grad(classification))(jnp.ones((2, 3)), jnp.full((2, 3), -1))
    assert nothing[0] == 0 and not nothing[1].any()
    with pytest.raises(ValueError, match=r"labels has shape \[12, 2\], but \[B,P\] is needed"):
        classification(logits, labels[:, :2])
    with pytest.raises(ValueError, match="positive_weights"):
        classification(logits, labels, positive_weights=weights[:1])


def labelled_batch(config, seed=0):
    labels = np.random.default_rng(seed).integers(-1, 2, (config.data.batch_size, 3)).astype("i1")
    return make_batch(config, seed)._replace(labels=labels)


MODES = {"mesh in chunks": (2, 2, {"train.microbatch": 2}),
         "pmap": (4, 1, {"train.parallel": "pmap"})}


@pytest.fixture(scope="module")
def on_one_device():
    return one_step(1, 1, {})


def one_step(data, fsdp, changes):
    """Metrics, moments and parameters of a step of a model whose text tower is not a number."""
    config = tuned(**{"losses.classification.positive_weights": (1.0, 4.0, 0.5), "optim.ema": 0.0,
                      **changes})
    training = training_on(config, data, fsdp, data * fsdp)
    model = drawn.weights(training.abstract.model)
    model["params"]["text"] = jax.tree.map(lambda x: x * np.nan, model["params"]["text"])
    state = drawn.state(training, model)
    state, metrics = training.train_step(state, training.place(labelled_batch(config)))
    return jax.device_get(metrics), moments_of(state), model["params"], jax.device_get(state.params)


@pytest.mark.parametrize("mode", MODES)
def test_devices_do_not_change_a_step(on_one_device, mode):
    (one, first, *_), (many, moments, *_) = on_one_device, one_step(*MODES[mode])
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-6)
    assert set(moments) == set(first)
    for name, value in first.items():
        assert np.abs(moments[name] - value).max() <= 1e-5 * np.abs(value).max() + 1e-9, name


def test_a_step_trains_image_tower_and_classifier_and_reads_no_text(on_one_device):
    metrics, moments, before, params = on_one_device
    assert set(metrics) == {"loss", "classification", "grad_norm", "learning_rate"}
    assert all(np.isfinite(value) for value in metrics.values())
    old, new = paths.flat(before), paths.flat(params)
    for name, value in old.items():
        if name.startswith(("vision/", "classifier/")):
            # What is added to all keys cancels.
            assert (new[name] != value).any() or name.endswith("key/bias"), name
        else:
            np.testing.assert_array_equal(new[name], value)
            assert not any(name in key for key in moments), name
    change = np.abs(new["classifier/linear/kernel"] - old["classifier/linear/kernel"])
    # Adam's first step is the learning rate, and the head's is a hundred times that of the rest.
    np.testing.assert_allclose(change, 100 * metrics["learning_rate"], rtol=0.2)
    per_row = flops.forward(tuned())
    assert flops.step(tuned()) == 3 * 8 * (per_row["vision"] + per_row["heads"])


@pytest.mark.parametrize(("arg", "trained"), [("", {"vision", "classifier"}),
                                              ("2d", {"classifier"})])
def test_the_recipes_at_their_full_size(arg, trained):
    config = configs.get_config(f"finetune:{arg}", **{"model.text.vocab": 30522,
                                                      "train.steps": 100})
    if arg:
        assert config.model.classes == ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema",
                                        "Pleural Effusion")
    else:
        config = configs.override(config, {"model.classes": NAMES})
    training = make_training(configs.validate(config), mesh.make_mesh(), per_epoch=10)
    params, classes = training.abstract.params, len(config.model.classes)
    assert params["classifier"]["linear"]["kernel"].shape == (768, classes)
    assert params["vision"]["layers"]["blocks"]["query"]["kernel"].shape == (12, 768, 768)
    assert {name.partition("/nu/")[2].split("/")[1] for name in paths.flat(training.abstract.opt)
            if "/nu/" in name} == trained
    size, struct = config.data.batch_size, jax.ShapeDtypeStruct
    ids = struct((size, config.model.text.max_tokens), jnp.int32)
    images = struct((size, *config.data.crop), jnp.uint8 if arg else jnp.int16)
    _, metrics = jax.eval_shape(training.train_step, training.abstract, Batch(
        images, ids, ids, ids, struct((size, 3), jnp.int32), struct((size, classes), jnp.int8)))
    assert set(metrics) == {"loss", "classification", "grad_norm", "learning_rate"}


def test_the_other_tower_of_radiographs_is_probed_too():
    config = configs.validate(configs.get_config("finetune:2d/resnet50"))
    assert config.model.vision.name == "resnet50" and config.name == "finetune_2d_resnet50"
    assert config.optim.freeze == ("params/(?!classifier/).*",)


@pytest.mark.parametrize(("changes", "message"), [
    ({"data.label_fraction": 0.0}, "data.label_fraction=0.0 must be a share above 0"),
    ({"data.label_fraction": 1.5}, "data.label_fraction=1.5 must be a share above 0"),
    ({"model.classes": ("A", "A")}, "must be different names"),
    ({"model.classes": ("",)}, "must be different names"),
    ({"losses.classification.positive_weights": (1.0,)}, "a positive number for each"),
    ({"losses.classification.positive_weights": (1.0, 0.0, 1.0)}, "a positive number for each"),
    ({"losses.classification.positive_weights": ("prevalent",)}, "'prevalence',"),
    ({"train.eval_volumes": 5}, "train.eval_every sets"),
    ({"train.eval_volumes": -1, "train.eval_every": 1}, "must be a number of volumes")])
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        configs.validate(tuned(**changes))


def test_a_classifier_needs_the_recipe_and_its_classes(tmp_path):
    config = configs.get_config("phantom:clip")
    with config.unlocked():
        config.losses.classification = {"weight": 1.0, "positive_weights": ()}
    with pytest.raises(UserError, match="start from the recipe finetune"):
        configs.validate(config)
    for key in ("model.classes", "losses.classification.positive_weights"):
        value = () if key == "model.classes" else ("prevalence",)
        with pytest.raises(UserError, match=f"{key}=.* the data set"):
            training_on(tuned(**{key: value}), 1, 1, 1)
    (tmp_path / "config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="names no trained model"):
            configs.get_config(f"finetune:{folder}")


# Labels.


def labelled(data, split="train", **changes):
    return open_labelled(tuned(**{"data.path": str(data), **changes}), split)


def test_labels_are_the_findings_and_come_with_their_volumes(data):
    source = labelled(data)
    truth = np.array([[name in row.findings for name in NAMES]
                      for row in open_source(data, "train").index])
    np.testing.assert_array_equal(source.labels, truth)
    assert source.recipe == {"model.classes": NAMES} and not source.left_out
    config = tuned(**{"data.path": str(data)}).data
    tokenizer = tokenizer_of_prompts()
    volumes = [record["volume"] for record in open_source(data, "train")]
    batches = feed.host_batches(source, config, tokenizer, seed=0)
    for _ in range(2):
        batch = next(batches)
        assert batch.labels.dtype == np.int8
        for volume, label in zip(batch.volume, batch.labels, strict=True):
            (same,) = [n for n, other in enumerate(volumes) if np.array_equal(volume, other)]
            np.testing.assert_array_equal(label, truth[same])
    held = next(feed.eval_batches(labelled(data, "valid"), config, tokenizer))
    np.testing.assert_array_equal(held.labels, labelled(data, "valid").labels[:8])
    plain = next(feed.eval_batches(open_source(data, "valid"), config, tokenizer))
    assert plain.labels is None
    everything = labelled(data, **{"model.classes": ()})
    assert everything.recipe["model.classes"] == tuple(everything.metadata["findings"])


def test_smaller_shares_of_labels_are_part_of_larger_ones(data):
    patients, seeds = {}, {}
    for share in (0.01, 0.1, 0.5, 1.0):
        source = labelled(data, **{"data.label_fraction": share})
        patients[share] = {row.patient for row in source.index}
        mine = [row for row in open_source(data, "train").index if row.patient in patients[share]]
        assert [row.id for row in mine] == [row.id for row in source.index], "whole patients"
    everyone = len(patients[1.0])
    assert [len(p) for p in patients.values()] == [
        1, round(0.1 * everyone), round(0.5 * everyone), everyone]
    assert patients[0.01] < patients[0.1] < patients[0.5] < patients[1.0]
    for seed in (0, 1):
        part = labelled(data, **{"data.label_fraction": 0.5, "seed": seed})
        seeds[seed] = [row.id for row in part.index]
        again = labelled(data, **{"data.label_fraction": 0.5, "seed": seed})
        assert again.fingerprint == part.fingerprint != labelled(data).fingerprint
    assert seeds[0] != seeds[1]
    # Of the split to validate on nothing is left out.
    assert len(labelled(data, "valid", **{"data.label_fraction": 0.01})) == 24


def test_labels_of_a_table_go_by_id_and_may_be_unknown(data, table):
    changes = {"data.labels": str(table),
               "losses.classification.positive_weights": ("prevalence",)}
    source = labelled(data, **changes)
    index = open_source(data, "train").index
    kept = [n for n in range(40) if n % 4]
    assert [row.id for row in source.index] == [index[n].id for n in kept]
    assert [failure.id for failure in source.left_out] == [index[n].id for n in range(0, 40, 4)]
    for label, number in zip(source.labels, kept, strict=True):
        truth = [int(name in index[number].findings) for name in NAMES]
        assert list(label[1:]) == truth[1:]
        assert label[0] == (truth[0] if number % 3 == 2 else -1)
    weights = source.recipe["losses.classification.positive_weights"]
    for name, column, weight in zip(NAMES, source.labels.T, weights, strict=True):
        assert weight == (column == 0).sum() / (column == 1).sum(), name
    assert positive_weights(np.array([[1, 0, -1], [1, 0, 0]], "i1")) == (1.0, 1.0, 1.0)
    # A volume without labels stays in the split to validate on, where it is masked.
    with pytest.raises(UserError, match="has labels of none of the 24 volumes.*ids are like"):
        labelled(data, "valid", **changes)


@pytest.mark.parametrize(("text", "message"), [
    ("id,Emphysema,Cardiomegaly\na,1,0\n", "Pleural effusion"),
    ("id,Emphysema,Cardiomegaly,Pleural effusion\na,1,0,maybe\n", "row 1 .*'maybe' as Pleural"),
    ("id,Emphysema,Cardiomegaly,Pleural effusion\na,1,0,1\na,1,0,0\n", "row 2 .* other labels")])
def test_a_table_that_holds_no_labels_is_refused(data, tmp_path, text, message):
    file = tmp_path / "labels.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        labelled(data, **{"data.labels": str(file)})


def test_an_unknown_class_is_told_with_the_nearest(data):
    with pytest.raises(UserError, match="'Emphysem'; did you mean 'Emphysema'"):
        labelled(data, **{"model.classes": ("Emphysem",)})


# Runs.


class Compiled:
    """A jitted function that is compiled once, however often it is asked for."""

    def __init__(self, function):
        self._function, self._made = function, None

    def lower(self, *args):
        self._made = self._made or self._function.lower(*args).compile()
        return self

    def compile(self):
        return self._made


MADE = {}


@pytest.fixture
def quick(one_device, monkeypatch):
    """Runs on one device, from a drawn state but for the weights they name."""
    def make(config, mesh, **options):
        key = configs.to_json(configs.override(config, {"train.eval_volumes": 0}))
        if key not in MADE:
            made = drawn.training(config, mesh, **options)
            MADE[key] = made._replace(train_step=Compiled(made.train_step))
        return MADE[key]

    monkeypatch.setattr(trainer, "make_training", make)


RUN = {"train.steps": 6, "train.log_every": 1, "train.checkpoint_every": 3, "train.eval_every": 3,
       "train.eval_volumes": 10, "data.batch_size": 8, "optim.learning_rate": 1e-3}


def config_of(data, pretrained, **changes):
    return configs.get_config(f"finetune:{pretrained}", **{
        **RUN, "data.path": str(data), "model.classes": NAMES, **changes})


def auroc_of(config, scores_of):
    """Macro AUROC of the volumes that are scored while training, by scikit-learn."""
    cases = validation.cases_to_score(open_labelled(config, "valid"), config)
    scores = scores_of(np.stack([record["volume"] for record in cases.volumes]), cases.names)
    return np.mean([roc_auc_score(label, score)
                    for label, score in zip(cases.labels.T, scores.T, strict=True)])


@pytest.fixture
def whole(data, pretrained, quick, tmp_path_factory):
    """A run to its end; the same for every test."""
    workdir = tmp_path_factory.getbasetemp() / "whole"
    trainer.train(config_of(data, pretrained), workdir, console=QUIET)
    return workdir


def test_a_run_starts_from_a_model_and_exports_a_classifier(data, pretrained, whole):
    fates = json.loads((whole / "initialised.json").read_text())
    assert {row["path"].split("/")[1] for row in fates if row["how"] == "at random"} == {
        "classifier"}
    model, config = load_model(whole), configs.load_json(whole / "config.json")
    assert model.classes == NAMES == config.model.classes
    old, new = (load_file(folder / "model.safetensors") for folder in (pretrained, whole / "model"))
    for name, value in old.items():
        trained = name.startswith("params/vision/") and not name.endswith("key/bias")
        assert (new[name] != value).any() >= trained, name
        assert name.startswith("params/vision/") or (new[name] == value).all(), name
    found = [row["valid_auroc"] for row in rows(whole) if "valid_auroc" in row]
    assert len(found) == 2
    volumes = []

    def scores_of(stack, names):
        volumes.append(stack)
        probabilities = model.classify(stack)
        assert probabilities.shape == (len(stack), 3)
        assert (0 < probabilities).all() and (probabilities < 1).all()
        return probabilities[:, [NAMES.index(name) for name in names]]

    np.testing.assert_allclose(found[-1], auroc_of(config, scores_of), atol=1e-9)
    np.testing.assert_allclose(model.classify(volumes[0], batch_size=3), model.classify(volumes[0]),
                               atol=1e-6)
    with pytest.raises(UserError, match="has no classifier"):
        load_model(pretrained).classify(volumes[0])


def test_a_resumed_run_is_the_same(data, pretrained, whole, tmp_path):
    config = config_of(data, pretrained)
    assert trainer.train(config, tmp_path, console=QUIET, stop=after(4)).preempted
    # What is known of the split "valid" changes no weight.
    trainer.train(configs.override(config, {"train.eval_volumes": 0}), tmp_path, console=QUIET)
    assert [row["loss"] for row in rows(tmp_path) if "loss" in row] == [
        row["loss"] for row in rows(whole) if "loss" in row]
    one, two = (load_file(w / "model/model.safetensors") for w in (tmp_path, whole))
    for name, value in two.items():
        np.testing.assert_array_equal(one[name], value, err_msg=name)
    with pytest.raises(UserError, match="data.label_fraction was 1.0 and is now 0.5"):
        trainer.train(configs.override(config, {"data.label_fraction": 0.5}), tmp_path,
                      console=QUIET)


def test_a_linear_probe_on_some_of_the_labels(data, pretrained, table, quick, tmp_path):
    config = config_of(data, pretrained, **{
        "optim.freeze": ("params/(?!classifier/).*",), "data.label_fraction": 0.6,
        "data.labels": str(table), "train.eval_every": 0, "train.eval_volumes": 0,
        "losses.classification.positive_weights": ("prevalence",), "train.steps": 3})
    trainer.train(config, tmp_path, console=QUIET)
    old, new = (load_file(f / "model.safetensors") for f in (pretrained, tmp_path / "model"))
    assert all((new[name] == value).all() for name, value in old.items())
    kept = configs.load_json(tmp_path / "config.json")
    source = open_labelled(config, "train")
    assert kept.losses.classification.positive_weights == positive_weights(source.labels)
    with (tmp_path / "left_out.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == [f.id for f in source.left_out]
    assert (new["params/classifier/linear/kernel"] != 0).any()
    # A classifier of other classes is not what a run of these starts from.
    again = config_of(data, tmp_path, **{"model.classes": tuple(reversed(NAMES))})
    shapes = jax.eval_shape(lambda: {"params": build(again.model).init(jax.random.key(0))})
    found, _ = initial_weights(again.model, shapes)
    assert not any("classifier" in name for name in found) and len(found) > 20
    found, _ = initial_weights(config_of(data, tmp_path).model, shapes)
    assert "params/classifier/linear/kernel" in found


def test_a_classifier_is_judged_by_its_probabilities(data, whole, tmp_path, capsys):
    model, out = load_model(whole), tmp_path / "out"
    protocol = tmp_path / "mine.yaml"
    protocol.write_text(
        "name: mine\nversion: '1'\nclasses: [Emphysema, Pleural effusion]\nresamples: 20\n")
    assert main(["eval", "--workdir", str(whole), "--protocol", str(protocol), "--out", str(out),
                 "--no-untrained"]) == 0
    assert capsys.readouterr().out.startswith("macro AUROC 0.")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["score"] == "classifier" and set(metrics["scores"]) == {"classifier"}
    assert metrics["calibration"]["raw_is"] == "probability" and "gap" not in metrics
    volumes = open_source(data, "test")
    expected = model.classify(np.stack([record["volume"] for record in volumes]))[:, [0, 2]]
    table = scores.read_scores(out / "scores.csv")
    assert table.ids == tuple(row.id for row in volumes.index)
    np.testing.assert_allclose(table.values, expected, atol=1e-6)
    assert "the classifier’s probability" in (out / "report.html").read_text().replace(
        "&#39;", "’").replace("'", "’")
    protocol.write_text(protocol.read_text().replace("Emphysema", "Lung nodule"))
    assert main(["eval", "--workdir", str(whole), "--protocol", str(protocol), "--out",
                 str(tmp_path / "none"), "--no-untrained"]) == 1
    assert "needs Lung nodule too; choose another protocol" in capsys.readouterr().err


# AUROC while training.


@pytest.mark.parametrize("mode", ["mesh", "pmap"])
def test_zero_shot_auroc_while_training_is_that_of_the_exported_model(data, mode):
    changes = {"mesh.rules": ((".*/query/kernel", (None, None, "fsdp")),)} if mode == "mesh" else {
        "train.parallel": "pmap"}
    reference = drawn_model(configs.get_config("phantom", **TINY, **{"model.text.vocab": 120}))
    config = configs.get_config("phantom", **{
        **TINY, "model.text.vocab": 120, "data.path": str(data), "train.eval_every": 1,
        "train.eval_volumes": 13, "optim.ema": 0.9, **changes})
    sizes = (2, 2) if mode == "mesh" else (4, 1)
    calls, nothing = [], {"loss": jnp.zeros(())}
    training = training_on(config, *sizes, 4)._replace(eval_step=lambda state, batch: nothing)

    def encode(state, batch, encode=training.encode):
        calls.append("volumes" if batch.ids is None else "texts")
        return encode(state, batch)

    training = training._replace(encode=encode)
    state = drawn.state(training)
    model = model_of(config, training.gather(state), reference.tokenizer)
    found = validation.validate(config, training, state, model.tokenizer, lambda: False)

    def scores_of(stack, names):
        unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
        v = model.encode_volume(stack)
        t = model.encode_text([f"There is {name}" for name in names])
        codes = jax.nn.softmax(v @ model.bank.T, axis=1)
        return 0.5 * (unit(v) + unit(codes @ model.bank)) @ unit(t).T

    np.testing.assert_allclose(found["valid_auroc"], auroc_of(config, scores_of), atol=1e-9)
    assert calls.count("volumes") == 2 and 1 <= calls.count("texts") <= 5
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **rest: compiled.append(event) if "compile" in event else None)
    with jax.transfer_guard("disallow"):
        again = validation.validate(config, training, state, model.tokenizer, lambda: False)
    jax.monitoring.clear_event_listeners()
    assert again["valid_auroc"] == found["valid_auroc"] and not compiled
    left = iter([False] * 4 + [True])
    assert validation.validate(config, training, state, model.tokenizer,
                               lambda: next(left)) is None


def test_volumes_to_score_are_whole_patients_of_the_split_to_validate_on(data, tmp_path):
    source = open_source(data, "valid")
    everyone = {row.id for row in source.index}
    config = configs.get_config("phantom", **{"data.path": str(data), "train.eval_every": 1})
    chosen = {}
    for count in (4, 10, 24, 1000):
        cases = validation.cases_to_score(
            source, configs.override(config, {"train.eval_volumes": count}))
        mine = {row.patient for row in cases.volumes.index}
        chosen[count] = {row.id for row in cases.volumes.index}
        assert chosen[count] == {row.id for row in source.index if row.patient in mine}
        assert chosen[count] <= everyone and len(chosen[count]) >= min(count, 24)
        assert ((cases.labels == 1).any(0) & (cases.labels == 0).any(0)).all()
    assert chosen[4] < chosen[10] < chosen[24] == chosen[1000] == everyone
    with pytest.raises(UserError, match="no finding is in some of the .* raise it, or set it to 0"):
        validation.check_validation(configs.override(config, {
            "train.eval_volumes": 1, "data.batch_size": 8}))
