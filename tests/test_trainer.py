"""The loop as a user runs it: resume after a kill, another mesh, refusals, the exported model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from brgsa_jax import config as configs
from brgsa_jax.config import UserError
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.predict import load_model
from brgsa_jax.train import trainer
from brgsa_jax.train.meter import MetricsFile, read_metrics

QUIET = Console(quiet=True)
TIMES = ("seconds_per_step", "samples_per_second")
CHANGES = {
    "model.input.shape": (32, 32, 16), "data.crop": (32, 32, 16), "model.vision.patch": (16, 16, 8),
    "model.vision.stem": (), "model.input.spacing": (12.0, 12.0, 24.0), "model.embed_dim": 24,
    "model.vision.width": 24, "model.vision.mlp_width": 48, "model.text.width": 24,
    "model.text.mlp_width": 48, "model.bank.rows": 16, "model.text.depth": 1,
    "model.text.max_tokens": 16, "model.vision.depth": 1, "data.batch_size": 8, "train.steps": 12,
    "train.log_every": 1, "train.checkpoint_every": 3, "optim.ema": 0.9}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "phantom"
    build_phantom(out, seed=1, train=24, valid=8, test=8, shape=(32, 32, 16), workers=1,
                  progress=False)
    return out


def config_for(data, **changes):
    return configs.get_config("phantom", **{**CHANGES, "data.path": str(data), **changes})


def rows(workdir):
    return [{k: v for k, v in row.items() if k not in TIMES}
            for row in read_metrics(Path(workdir) / "metrics.jsonl")]


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
from brgsa_jax.train import trainer
trainer.train(configs.get_config(sys.argv[1]), sys.argv[2], console=Console())
"""


@pytest.mark.parametrize("moment", ["between", "early"])
def test_a_killed_run_goes_on_bit_exactly(data, whole, tmp_path, moment):
    file = tmp_path / "config.json"
    file.write_text(configs.to_json(config_for(data)))
    workdir = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", RUN, str(file), str(workdir)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wanted = {"early": 1, "between": 8}[moment]
    deadline = time.time() + 120
    while len(read_metrics(workdir / "metrics.jsonl")) < wanted:
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline, "the run did not get to the step where it is killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    outcome = trainer.train(config_for(data), workdir, console=QUIET)
    assert outcome.stop == 12 and outcome.start < 12
    assert rows(workdir) == rows(whole)
    one, two = (load_file(w / "model/model.safetensors") for w in (workdir, whole))
    for name, value in two.items():
        np.testing.assert_array_equal(one[name], value, err_msg=name)


def test_an_interrupted_run_goes_on_and_a_finished_one_does_nothing(data, whole, tmp_path,
                                                                    monkeypatch):
    workdir = tmp_path / "stopped"
    original = trainer.Checkpointer.preempted
    monkeypatch.setattr(trainer.Checkpointer, "preempted", lambda self, step: step == 6)
    first = trainer.train(config_for(data), workdir, console=QUIET)
    assert (first.start, first.stop, first.preempted) == (0, 6, True)
    assert not (workdir / "model").exists()
    assert load_model(workdir).encode_text(["There is Emphysema"]).shape == (1, 24)
    monkeypatch.setattr(trainer.Checkpointer, "preempted", original)
    second = trainer.train(config_for(data, **{"train.log_every": 1}), workdir, console=QUIET)
    assert (second.start, second.stop, second.preempted) == (6, 12, False)
    assert rows(workdir) == rows(whole)
    third = trainer.train(config_for(data), workdir, console=QUIET)
    assert (third.start, third.stop) == (12, 12)


def test_another_mesh_resumes_to_the_same_run(data, whole, tmp_path, monkeypatch):
    workdir = tmp_path / "moved"
    monkeypatch.setattr(trainer.Checkpointer, "preempted", lambda self, step: step == 6)
    trainer.train(config_for(data), workdir, console=QUIET)
    monkeypatch.setattr(trainer.Checkpointer, "preempted", lambda self, step: False)
    trainer.train(config_for(data, **{"mesh.data": 2, "mesh.fsdp": 4}), workdir, console=QUIET)
    moved, still = rows(workdir), rows(whole)
    assert moved[:6] == still[:6]
    for a, b in zip(moved[6:], still[6:], strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-3)


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


def test_validation_feeds_the_plateau_rule_and_is_logged(data, tmp_path):
    config = config_for(data, **{"optim.schedule": "plateau", "train.eval_every": 2,
                                 "optim.plateau_patience": 1, "train.steps": 4,
                                 "optim.learning_rate": 1e-9, "optim.warmup": 0})
    trainer.train(config, tmp_path / "w", console=QUIET)
    losses = [row["validation_loss"] for row in rows(tmp_path / "w") if "validation_loss" in row]
    assert len(losses) == 2 and all(np.isfinite(losses))


def test_a_diverged_run_says_so(data, tmp_path):
    config = config_for(data, **{"optim.learning_rate": 1e30, "optim.clip": 0.0,
                                 "optim.warmup": 0})
    with pytest.raises(UserError, match="the loss is (nan|inf)"):
        trainer.train(config, tmp_path / "w", console=QUIET)


def test_metrics_file_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    file = MetricsFile(path, resume_step=2)
    file.write({"step": 3, "loss": 1.0})
    file.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
