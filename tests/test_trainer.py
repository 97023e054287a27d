"""The loop as a user runs it: resume after a kill, another mesh, refusals, the exported model."""

import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from rich.console import Console
from safetensors.numpy import load_file

from brgsa_jax import config as configs
from brgsa_jax.config import UserError
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.data.sources import open_source
from brgsa_jax.model import Model
from brgsa_jax.predict import load_model
from brgsa_jax.train import start, trainer
from brgsa_jax.train.ledger import NAMES, read_ledger
from brgsa_jax.train.meter import SPEED, MetricsFile, read_metrics

QUIET = Console(quiet=True)
CHANGES = {
    "model.input.shape": (32, 32, 16), "data.crop": (32, 32, 16), "model.vision.patch": (16, 16, 8),
    "model.vision.stem": (), "model.input.spacing": (12.0, 12.0, 24.0), "model.embed_dim": 24,
    "model.vision.width": 24, "model.vision.mlp_width": 48, "model.text.width": 24,
    "model.text.mlp_width": 48, "model.bank.rows": 16, "model.text.depth": 1,
    "model.text.max_tokens": 16, "model.vision.depth": 1, "data.batch_size": 8, "train.steps": 12,
    "train.log_every": 1, "train.checkpoint_every": 3, "optim.ema": 0.9,
    # Muon compiles longer; test_step has it.
    "optim.name": "adamw", "optim.learning_rate": 1e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "phantom"
    build_phantom(out, seed=1, train=24, valid=8, test=8, shape=(32, 32, 16), workers=1,
                  progress=False)
    return out


def config_for(data, recipe="phantom", **changes):
    return configs.get_config(recipe, **{**CHANGES, "data.path": str(data), **changes})


def after(steps):
    """Asks a run to stop after so many steps."""
    calls = itertools.count(1)
    return lambda: next(calls) == steps


def rows(workdir):
    return [{k: v for k, v in row.items() if k not in SPEED}
            for row in read_metrics(Path(workdir) / "metrics.jsonl")]


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of equal configurations share their compiled functions; kills use another process."""
    made = {}

    def make_training(config, mesh, **options):
        key = configs.to_json(config), str(mesh)
        made[key] = made.get(key) or make(config, mesh, **options)
        return made[key]

    make = trainer.make_training
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_training", make_training)
        yield


@pytest.fixture
def cheapest(one_device, monkeypatch):
    """Runs on one device from a drawn state: what they start from does not matter."""
    made = {}

    def make_training(config, mesh, **options):
        key = configs.to_json(config)
        made[key] = made.get(key) or drawn.training(config, mesh, **options)
        return made[key]

    monkeypatch.setattr(trainer, "make_training", make_training)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    trainer.train(config_for(data), workdir, console=QUIET)
    return workdir


RUN = """
import os, sys
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"]
from rich.console import Console
from brgsa_jax import config as configs
from brgsa_jax.train import ledger, trainer
ledger.BEAT, ledger.SHARE = 0.0, 1e9
trainer.train(configs.get_config(sys.argv[1]), sys.argv[2], console=Console())
"""


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """What lies on the disk when a run dies before its first checkpoint, and between two."""
    root = tmp_path_factory.mktemp("killed")
    file, workdir = root / "config.json", root / "between"
    file.write_text(configs.to_json(config_for(data)))
    process = subprocess.Popen([sys.executable, "-c", RUN, str(file), str(workdir)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120

    def send(signal_, rows):
        while len(read_metrics(workdir / "metrics.jsonl")) < rows:
            assert process.poll() is None, process.stderr.read()
            assert time.time() < deadline, "the run did not get to the step where it is killed"
            time.sleep(0.005)
        os.kill(process.pid, signal_)

    # Of a stopped process the disk holds what it would if it had been killed.
    send(signal.SIGSTOP, 1)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    shutil.copytree(workdir, root / "early")
    os.kill(process.pid, signal.SIGCONT)
    send(signal.SIGKILL, 8)
    process.wait()
    return root


def ledger_of_checkpoint(workdir):
    """The ledger beside the checkpoint that a resume takes; zeros without one."""
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    if not steps:
        return dict.fromkeys(NAMES, 0.0)
    return json.loads((workdir / f"checkpoints/{max(steps)}/meta/metadata").read_text())["ledger"]


@pytest.mark.parametrize("moment", ["between", "early"])
def test_a_killed_run_goes_on_bit_exactly(data, whole, killed, moment):
    workdir, console = killed / moment, Console(file=io.StringIO(), width=200)
    before = read_ledger(workdir / "ledger.json")
    mark = ledger_of_checkpoint(workdir)
    outcome = trainer.train(config_for(data), workdir, console=console)
    assert outcome.stop == 12 and outcome.start < 12
    assert rows(workdir) == rows(whole)
    after = read_ledger(workdir / "ledger.json")
    assert (before["starts"], after["starts"]) == (1, 2)
    repeated = sum(before["seconds"][name] - mark[name] for name in ("step", "data_wait"))
    assert after["seconds"]["lost"] == pytest.approx(repeated, abs=1e-6)
    assert repeated > 0 or moment == "early"
    assert after["seconds"]["downtime"] > 0
    assert after["wall_seconds"] == pytest.approx(sum(after["seconds"].values()), abs=0.01)
    assert after["until"] - after["wall_seconds"] == pytest.approx(
        before["until"] - before["wall_seconds"], abs=2), "the first start is when it was"
    assert after["goodput"] == pytest.approx(
        after["seconds"]["step"] / after["wall_seconds"], abs=1e-4)
    assert f"goodput {after['goodput']:.1%} of" in console.file.getvalue()
    assert "over 2 starts: setup" in console.file.getvalue()
    one, two = (load_file(w / "model/model.safetensors") for w in (workdir, whole))
    for name, value in two.items():
        np.testing.assert_array_equal(one[name], value, err_msg=name)


def test_an_interrupted_run_goes_on_and_a_finished_one_does_nothing(data, whole, tmp_path):
    workdir = tmp_path / "stopped"
    first = trainer.train(config_for(data), workdir, console=QUIET, stop=after(6))
    assert (first.start, first.stop, first.preempted) == (0, 6, True)
    assert not (workdir / "model").exists()
    assert load_model(workdir).encode_text(["There is Emphysema"]).shape == (1, 24)
    second = trainer.train(config_for(data, **{"train.log_every": 1}), workdir, console=QUIET)
    assert (second.start, second.stop, second.preempted) == (6, 12, False)
    assert rows(workdir) == rows(whole)
    finished = (workdir / "ledger.json").read_bytes()
    third = trainer.train(config_for(data), workdir, console=QUIET)
    assert (third.start, third.stop) == (12, 12)
    assert (workdir / "ledger.json").read_bytes() == finished, "the run was over"


def test_another_mesh_resumes_to_the_same_run(data, whole, tmp_path):
    workdir = tmp_path / "moved"
    trainer.train(config_for(data), workdir, console=QUIET, stop=after(6))
    trainer.train(config_for(data, **{"mesh.data": 2, "mesh.fsdp": 4}), workdir, console=QUIET)
    moved, still = rows(workdir), rows(whole)
    assert moved[:6] == still[:6]
    for a, b in zip(moved[6:], still[6:], strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-3)


# All terms with batch statistics; Adam without the tiny gradients it would blow up at warm-up.
EVERYTHING = {"model.head.name": "batchnorm", "model.head.hidden": 32,
              "model.local_head.hidden": 32, "data.batch_size": 16, "optim.name": "adamw",
              "optim.learning_rate": 1e-4, "optim.warmup": 0, "train.steps": 3,
              "train.checkpoint_every": 2}


@pytest.fixture(scope="module")
def mapped_then_mesh(data, tmp_path_factory):
    """A run under pmap that goes on on the mesh, one that never moved, and what they told."""
    root = tmp_path_factory.mktemp("modes")
    centres = np.random.default_rng(0).normal(size=(16, 24)).astype("f4")
    np.save(root / "centres.npy", centres)
    told = {}

    def run(name, workdir, stop=None, **changes):
        console = Console(file=io.StringIO(), width=200)
        config = config_for(data, "phantom:brgsa_mgca", **{
            **EVERYTHING, "model.bank.init": str(root / "centres.npy"), **changes})
        outcome = trainer.train(config, root / workdir, console=console, stop=after(stop))
        told[name] = console.file.getvalue()
        return outcome.start, outcome.stop

    assert run("still", "still") == (0, 3)
    mapped = {"train.parallel": "pmap", "train.microbatch": 2}
    assert run("mapped", "moved", stop=2, **mapped) == (0, 2)
    assert run("resumed", "moved") == (2, 3)
    return root, told, centres


def test_pmap_in_chunks_goes_on_on_the_mesh_to_the_same_run(mapped_then_mesh):
    root, _, _ = mapped_then_mesh
    moved, still = rows(root / "moved"), rows(root / "still")
    assert [row["step"] for row in moved] == [1, 2, 3]
    for ours, expected in zip(moved, still, strict=True):
        np.testing.assert_allclose(ours["loss"], expected["loss"], rtol=1e-5)
    for name, value in still[-1].items():
        np.testing.assert_allclose(moved[-1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    one, two = (load_file(root / w / "model/model.safetensors") for w in ("moved", "still"))
    assert set(one) == set(two)
    for name in ("params/prototypes", "bank", "params/vision_head/out/kernel",
                 "stats/vision_head/out_norm/var", "stats/text_local_head/hidden_norm/var"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_log_holds_batch_and_bank_and_the_start_says_where_they_lie(mapped_then_mesh):
    root, told, centres = mapped_then_mesh
    row = rows(root / "moved")[0]
    assert {"batch/top1", "batch/duplicates", "batch/hardest_negative_cosine", "bank/dead_rows",
            "bank/usage_entropy", "word", "patch", "prototype_image_to_text"} <= set(row)
    # The file of centres is what the first step found.
    norms = np.linalg.norm(centres, axis=1)
    np.testing.assert_allclose([row["bank/row_norm_max"], row["bank/row_norm_mean"]],
                               [norms.max(), norms.mean()], rtol=1e-5)
    for name, words in (("mapped", "by pmap over 8 devices, bank replicated: all 16 rows"),
                        ("mapped", "towers in 2 chunks"),
                        ("still", "bank rows: 2 of 16 on each device"),
                        ("resumed", "resuming at step 2")):
        assert words in told[name], name
    for name, text in told.items():
        assert "negatives of each sample: 15 in knowledge_interaction" in text, name
        assert re.search(r"each device holds [\d.]+ MiB parameters.* MiB bank.* MiB average.* MiB "
                         "activations", text), name
        assert "of 16 =" in text and "24 volumes" in text, name


def test_the_exported_model_reads_its_batch_statistics(mapped_then_mesh):
    root, _, _ = mapped_then_mesh
    model = load_model(root / "moved")
    assert set(model.stats) == {"vision_head", "text_head", "vision_local_head", "text_local_head"}
    volumes = np.random.default_rng(0).integers(-1000, 1000, (2, 32, 32, 16)).astype("i2")
    encoded = model.encode_volume(volumes)
    assert encoded.shape == (2, 24) and np.isfinite(encoded).all()
    for statistic in ("mean", "var"):
        stats = {part: {norm: {**values, statistic: np.zeros_like(values[statistic])}
                        for norm, values in norms.items()} for part, norms in model.stats.items()}
        other = Model(model.config, model.params, model.bank, model.tokenizer, stats)
        assert np.abs(other.encode_volume(volumes) - encoded).max() > 1e-3, statistic
        assert np.abs(other.encode_text(["Emphysema"])
                      - model.encode_text(["Emphysema"])).max() > 1e-3, statistic


def test_work_directory_holds_what_the_contract_names(whole):
    assert {"checkpoints", "config.json", "metrics.jsonl", "model", "tokenizer"} <= {
        p.name for p in whole.iterdir()}
    row = rows(whole)[-1]
    assert row["step"] == 12 and {"loss", "mse_image", "learning_rate", "grad_norm"} <= set(row)
    saved = json.loads((whole / "config.json").read_text())
    assert saved["model"]["text"]["vocab"] > 5 and saved["train"]["steps"] == 12
    model = load_model(whole)
    assert model.encode_volume(np.zeros((1, 32, 32, 16), "i2")).shape == (1, 24)


def test_another_configuration_or_other_data_are_refused(data, whole, tmp_path):
    with pytest.raises(UserError, match="optim.learning_rate was"):
        trainer.train(config_for(data, **{"optim.learning_rate": 0.5}), whole, console=QUIET)
    other = tmp_path / "other"
    build_phantom(other, seed=2, train=24, shape=(32, 32, 16), workers=1, progress=False)
    with pytest.raises(UserError, match="fingerprint"):
        trainer.train(config_for(other), whole, console=QUIET)
    with pytest.raises(UserError, match="no finished data set|dataset.json|brgsa data build"):
        trainer.train(config_for(tmp_path / "none"), tmp_path / "w", console=QUIET)


@pytest.mark.usefixtures("cheapest")
def test_a_refused_start_claims_no_work_directory(data, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        trainer.train(config_for(data, **{"model.bank.init": "none.npy"}), tmp_path, console=QUIET)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.usefixtures("cheapest")
def test_a_validation_that_is_cut_short_is_made_on_resuming(data, tmp_path):
    """Steps 1, 2, 3, validation of 3, step 4 and so on: the calls of `stop` number both."""
    config = config_for(data, **{"optim.schedule": "plateau", "train.eval_every": 3,
                                 "optim.plateau_patience": 0, "train.steps": 9, "optim.warmup": 0,
                                 "train.checkpoint_every": 4})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer.train(config, whole, console=QUIET)
    losses = [row["validation_loss"] for row in rows(whole) if "validation_loss" in row]
    assert len(losses) == 3 and all(np.isfinite(losses)) and len(rows(whole)) == 12
    # Within the validation of step 3, which then is made, and after that of step 6.
    for calls, stopped in ((4, 3), (5, 6), (2, 7)):
        outcome = trainer.train(config, parts, console=QUIET, stop=after(calls))
        assert (outcome.stop, outcome.preempted) == (stopped, True)
    # Neither the last validation nor the export is cut short.
    assert not trainer.train(config, parts, console=QUIET, stop=after(3)).preempted
    assert rows(parts) == rows(whole)
    one, two = (load_file(w / "model/model.safetensors") for w in (parts, whole))
    for name, value in two.items():
        np.testing.assert_array_equal(one[name], value, err_msg=name)


@pytest.mark.usefixtures("cheapest")
def test_a_diverged_run_says_so(data, tmp_path):
    config = config_for(data, **{"optim.learning_rate": 1e30, "optim.clip": 0.0,
                                 "optim.warmup": 0})
    with pytest.raises(UserError, match="the loss is (nan|inf)"):
        trainer.train(config, tmp_path / "w", console=QUIET)


@pytest.mark.usefixtures("cheapest")
def test_weights_that_diverged_at_the_last_step_are_not_exported(data, tmp_path):
    config = config_for(data, "phantom:clip", **{
        "optim.learning_rate": 1e30, "optim.clip": 0.0, "optim.warmup": 0, "train.steps": 2,
        "optim.ema": 0.0, "model.bank.rows": 0})
    # The second time the last checkpoint may be complete, and is of no use.
    for _ in range(2):
        with pytest.raises(UserError, match="(loss|norm of the gradient) is nan|not finite"):
            trainer.train(config, tmp_path / "w", console=QUIET)
    assert not (tmp_path / "w/model").exists()


def test_a_refused_start_leaves_no_vocabulary_behind(data, tmp_path):
    refused = config_for(data, **{"data.captions": "report", "train.microbatch": 3})
    with pytest.raises(UserError, match="microbatch"):
        trainer.train(refused, tmp_path, console=QUIET)
    source = open_source(data, "train")
    again, fresh = (start.prepare_tokenizer(config_for(data), source, folder)
                    for folder in (tmp_path, tmp_path / "fresh"))
    assert again.backend.get_vocab() == fresh.backend.get_vocab()


def test_a_share_of_a_short_run_is_at_least_a_step(data):
    config = config_for(data, **{"train.log_every": "1%", "train.eval_every": 0,
                                 "train.checkpoint_every": "1%"})
    assert configs.train_durations(config, 3) == {
        "train.steps": 12, "train.log_every": 1, "train.eval_every": 0,
        "train.checkpoint_every": 1}


@pytest.mark.parametrize("hidden", [
    lambda values: jnp.add(values["loss"], np.float32(1)), lambda values: values["loss"] + 1])
def test_a_hidden_transfer_in_the_loop_is_refused(data, tmp_path, monkeypatch, hidden, cheapest):
    step = trainer.Meter.step
    monkeypatch.setattr(trainer.Meter, "step", lambda self, number, values, finished: (
        hidden(values), step(self, number, values, finished)))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        trainer.train(config_for(data), tmp_path / "w", console=QUIET)


def test_only_late_metrics_validations_and_checkpoints_read_the_devices(data, tmp_path,
                                                                        monkeypatch, cheapest):
    """On the CPU no guard sees a read, so every one is noted here; GPUs and TPUs refuse it."""
    reads, allowed = [], []

    def noted(function, name):
        def run(*args, **options):
            allowed.append(name)
            try:
                return function(*args, **options)
            finally:
                allowed.pop()
        return run

    value = ArrayImpl._value
    in_loop = threading.current_thread()

    def read(array):
        if allowed and threading.current_thread() is in_loop:
            reads.append(tuple(allowed))
        return value.fget(array)

    monkeypatch.setattr(ArrayImpl, "_value", property(read))
    monkeypatch.setattr(jax, "device_get", noted(jax.device_get, "device_get"))
    monkeypatch.setattr(trainer.Checkpointer, "save", noted(trainer.Checkpointer.save, "save"))
    for name in ("step", "flush"):
        monkeypatch.setattr(trainer.Meter, name, noted(getattr(trainer.Meter, name), name))
    monkeypatch.setattr(trainer, "_loop", noted(trainer._loop, "loop"))
    monkeypatch.setattr(trainer.Pace, "started", noted(trainer.Pace.started, "started"))
    trainer.train(config_for(data, **{"train.log_every": 4, "train.eval_every": 6}),
                  tmp_path / "w", console=QUIET)
    # Before its first step the loop reads which it is.
    first = [read for read in reads if read == ("loop",)]
    assert len(first) <= 1
    others = {read for read in reads if read != ("loop",) and "save" not in read}
    assert others and all(read[-1] == "device_get" for read in others), others
    assert [row["step"] for row in rows(tmp_path / "w") if "loss" in row] == [4, 8, 12]


def test_steps_are_profiled_into_the_work_directory(data, tmp_path, cheapest):
    config = config_for(data, **{"train.profile": (2, 3)})
    outcome = trainer.train(config, tmp_path / "w", console=QUIET)
    (file,) = (tmp_path / "w/profile").glob("plugins/profile/*/*.xplane.pb")
    assert file.stat().st_size > 1000 and outcome.seconds["profile"] > 0
    with pytest.raises(UserError, match="goes beyond the last step, 12"):
        trainer.train(config_for(data, **{"train.profile": (12, 13)}), tmp_path / "x",
                      console=QUIET)


def test_metrics_file_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    file = MetricsFile(path, resume_step=2)
    file.write({"step": 3, "loss": 1.0})
    file.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
