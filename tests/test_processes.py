"""Runs of 1, 2 and 4 real processes: equal, stopped by SIGTERM, killed, and how they go on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import drawn
import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from test_trainer import CHANGES, rows

from brgsa_jax import config as configs
from brgsa_jax import mesh as meshes
from brgsa_jax.cli import main
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.data.sources import open_source
from brgsa_jax.data.tokenizer import corpus, train_tokenizer
from brgsa_jax.train import trainer

ROOT = Path(__file__).parents[1]
MEMBER = [sys.executable, str(ROOT / "tests/member.py")]
STEPS, EVERY = 20, 6


def environment():
    """Of a process with one device."""
    one = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return {**os.environ, "XLA_FLAGS": one, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with data and the configurations line.json and grid.json, of meshes N×1 and 2×2."""
    root = tmp_path_factory.mktemp("processes")
    build_phantom(root / "data", seed=1, train=24, valid=16, test=8, shape=(32, 32, 16), workers=1,
                  progress=False)
    config = configs.get_config("phantom", **{
        **CHANGES, "data.path": str(root / "data"), "train.steps": STEPS,
        "train.eval_every": EVERY, "train.checkpoint_every": 7,
        # Made once and not by every process.
        "model.text.tokenizer": str(root / "tokenizer")})
    texts = corpus(open_source(root / "data", "train"), config.data)
    train_tokenizer(texts, config.model.text.max_tokens).save(root / "tokenizer")
    for name, fsdp in (("line", 1), ("grid", 2)):
        (root / f"{name}.json").write_text(configs.to_json(
            configs.override(config, {"mesh.fsdp": fsdp})))
    return root


def plan(root, name, *parts):
    """Writes what every process of a start has to train."""
    file = root / f"{name}.plan.json"
    file.write_text(json.dumps([{**part, "config": str(root / f"{part['config']}.json"),
                                 "workdir": str(root / part["workdir"])} for part in parts]))
    return [*MEMBER, "train", str(file)]


def start(folder, count, command):
    """Starts processes that write to FOLDER/INDEX.log."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for index in range(count):
        with (folder / f"{index}.log").open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env={
                **environment(), "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}))
    return processes


def logs(folder):
    return [file.read_text() for file in sorted(folder.glob("?.log"))]


@pytest.fixture(scope="module")
def one_process(root):
    """train(CONFIG, WORKDIR): in this process, on one device."""
    make, made = meshes.make_mesh, {}

    def make_training(config, mesh, **options):
        made["once"] = made.get("once") or drawn.training(config, mesh, **options)
        return made["once"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda *_: make(1, 1, jax.devices()[:1]))
        patch.setattr(trainer, "make_training", make_training)
        yield lambda workdir: trainer.train(configs.get_config(str(root / "line.json")),
                                            root / workdir, console=Console(quiet=True))


@pytest.fixture(scope="module")
def alone(root, one_process):
    assert one_process("alone").stop == STEPS
    return root / "alone"


@pytest.fixture(scope="module")
def pair(root):
    """Two processes under launch/local.sh: a whole run; one that process 1 is asked to stop."""
    command = plan(root, "pair", {"config": "line", "workdir": "whole"},
                   # The calls are of 6 steps and of the 2 batches of the validation of step 6.
                   {"config": "line", "workdir": "stopped", "signal": [1, signal.SIGTERM, 8]})
    run = subprocess.run([ROOT / "launch/local.sh", "2", *command], capture_output=True, text=True,
                         timeout=500, env={**environment(), "BRGSA_LOGS": str(root / "pair")})
    assert run.returncode == 143, (run, logs(root / "pair"))
    shutil.copytree(root / "stopped", root / "moved")
    return root


@pytest.fixture(scope="module")
def four(root, pair):
    """Four processes on a mesh 2×2: a whole run; the stopped one, of which process 3 is killed."""
    processes = start(root / "four", 4, plan(
        root, "four", {"config": "grid", "workdir": "square"},
        # The 2 batches of the validation that was cut short, and 4 steps.
        {"config": "grid", "workdir": "moved", "signal": [3, signal.SIGKILL, 6]}))
    try:
        codes = [processes[3].wait(500)]
        since = time.monotonic()
        codes += [process.wait(500) for process in processes[:3]]
    finally:
        for process in processes:
            process.kill()
    return root, codes, time.monotonic() - since


def assert_same_losses(workdir, other):
    ours, theirs = rows(workdir), rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for name in {"loss", "validation_loss"} & one.keys():
            np.testing.assert_allclose(one[name], two[name], rtol=1e-5, err_msg=str(one["step"]))


def test_two_processes_train_as_one(pair, alone):
    assert len(rows(alone)) == STEPS + STEPS // EVERY
    assert_same_losses(pair / "whole", alone)
    assert all("Traceback" not in told for told in logs(pair / "pair"))


def test_four_processes_on_a_square_mesh_train_as_one(four, alone):
    assert_same_losses(four[0] / "square", alone)
    assert "mesh {'data': 2, 'fsdp': 2}" in logs(four[0] / "four")[0]


def test_sigterm_to_one_process_saves_in_all_and_resumes_bit_exactly(pair):
    workdir, whole = pair / "stopped", pair / "whole"
    for told in logs(pair / "pair"):
        assert told.count("asked to stop at step 6; the state is saved") == 1, told
    assert "6" in os.listdir(workdir / "checkpoints") and not (workdir / "model").exists()
    assert rows(workdir) == rows(whole)[:6]
    processes = start(pair / "again", 2, plan(pair, "again", {
        "config": "line", "workdir": "stopped"}))
    assert [process.wait(500) for process in processes] == [0, 0], logs(pair / "again")
    assert "resuming at step 6" in logs(pair / "again")[0]
    assert rows(workdir) == rows(whole)
    ours, theirs = (load_file(w / "model/model.safetensors") for w in (workdir, whole))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_a_killed_process_ends_the_others_and_one_alone_goes_on(four, alone, one_process):
    root, codes, seconds = four
    told = logs(root / "four")
    assert codes == [-signal.SIGKILL, 1, 1, 1] and seconds < 60, told
    assert "resuming at step 6" in told[0]
    for text in told[:3]:
        last = text.splitlines()[-1]
        assert last.startswith(f"brgsa: process 3 on {socket.gethostname()} ended without"), text
    # What two processes began and four went on with.
    assert 6 <= one_process("moved").start < 10
    assert_same_losses(root / "moved", alone)


def signalled(place, *command, **options):
    """`brgsa COMMAND` with a SIGTERM at a call of MODULE:NAME:CALL."""
    return subprocess.run([*MEMBER, "at", place, *map(str, command)], capture_output=True,
                          text=True, timeout=500, env=environment(), **options)


def test_sigterm_before_the_first_step_ends_at_once(root, tmp_path):
    run = signalled("brgsa_jax.train.trainer:_start:1", "train", "--config", root / "line.json",
                    "--workdir", tmp_path)
    assert run.returncode == 143 and run.stderr.splitlines()[-1] == (
        "brgsa: asked to stop; the same command goes on from what is finished"), run
    assert not (tmp_path / "checkpoints/1").exists() and not (tmp_path / "model").exists()


def test_sigterm_in_a_step_saves_its_state(root, tmp_path):
    run = signalled("brgsa_jax.train.meter:Meter.step:2", "train", "--config", root / "line.json",
                    "--workdir", tmp_path)
    assert run.returncode == 143 and "asked to stop at step 2; the state is saved" in run.stdout
    assert "2" in os.listdir(tmp_path / "checkpoints") and "Traceback" not in run.stderr
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_sigterm_to_an_evaluation_leaves_no_half_result(alone, tmp_path):
    run = signalled("brgsa_jax.evals.run:evaluate_embedded:1", "eval", "--workdir", alone,
                    "--out", tmp_path, "--no-untrained")
    assert run.returncode == 143 and "brgsa: asked to stop; the same command" in run.stderr, run
    assert not (tmp_path / "report.html").exists()


def test_sigterm_to_a_build_ends_it_and_the_same_command_goes_on(tmp_path, capsys):
    build = ("data", "build", "--source", "phantom", "--train", 30, "--valid", 0, "--test", 0,
             "--shape", "32,32,16", "--out", tmp_path / "data", "--workers")
    run = signalled("brgsa_jax.data.shards:wait:12", *build, 2)
    assert run.returncode == 143 and "brgsa: asked to stop; the same command" in run.stderr, run
    assert not (tmp_path / "data/dataset.json").exists()
    staged = len(list(tmp_path.glob("data/.staging/records/*.json")))
    assert 8 <= staged < 30
    assert main([*map(str, build), "1"]) == 0 and "30 images" in capsys.readouterr().out


def test_sigterm_to_summaries_ends_them(tmp_path):
    (tmp_path / "reports.csv").write_text("id,report\na,Pleural effusion.\nb,Normal.\n")
    run = signalled("brgsa_jax.summarize.run:_write:1", "summarize", tmp_path / "reports.csv",
                    "--text-column", "report", "--out", tmp_path / "out.jsonl")
    assert run.returncode == 143 and "brgsa: asked to stop" in run.stderr, run
    assert not (tmp_path / "out.jsonl").exists()


def test_sigterm_to_the_demo_ends_it_after_the_run_it_trains(tmp_path, monkeypatch):
    trained = []

    def train(config, workdir, *, console, stop):
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        trained.append(workdir)
        return trainer.Outcome(workdir, 0, 1, stop(), {})

    monkeypatch.setattr(trainer, "train", train)
    assert main(["demo", "--workdir", str(tmp_path), f"--config.data.path={tmp_path}"]) == 143
    assert trained == [tmp_path]
