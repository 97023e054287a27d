"""launch/slurm.sbatch on a real Slurm of one node; `make test-slurm` installs and runs it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_trainer import CHANGES, rows

from brgsa_jax import config as configs
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.train.meter import read_metrics

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "tests/slurm/setup.sh"
STEPS = 30


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
    """The environment in which sbatch and srun find the Slurm of these tests."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([SETUP, "start", folder], capture_output=True, text=True, timeout=120)
    try:
        assert started.returncode == 0, started.stderr
        name, _, path = started.stdout.strip().removeprefix("export ").partition("=")
        one = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        yield {**os.environ, name: path, "XLA_FLAGS": one, "PYTHONPATH": str(ROOT)}
    finally:
        subprocess.run([SETUP, "stop", folder], check=True, timeout=60)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    build_phantom(root / "data", seed=1, train=24, shape=(32, 32, 16), workers=1, progress=False)
    file = root / "config.json"
    file.write_text(configs.to_json(configs.get_config("phantom", **{
        **CHANGES, "data.path": str(root / "data"), "train.steps": STEPS})))
    return file


class Job:
    """A job of launch/slurm.sbatch; its log and work directory lie in `folder`."""

    def __init__(self, environ, folder, options, command, **variables):
        self.environ, self.folder = environ, folder
        self.number = self.call("sbatch", "--parsable", *options, ROOT / "launch/slurm.sbatch",
                                *command, **variables).strip()

    def call(self, *command, **variables):
        run = subprocess.run([*map(str, command)], cwd=self.folder, capture_output=True, text=True,
                             timeout=60, env={**self.environ, **variables})
        assert run.returncode == 0, run
        return run.stdout

    @property
    def log(self):
        path = self.folder / f"brgsa-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def shown(self, key):
        text = self.call("scontrol", "show", "job", self.number)
        return re.search(rf"\b{key}=(\S+)", text)[1]

    def until(self, condition, seconds=400):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.call("scontrol", "show", "job", self.number),
                                                 self.log)
            time.sleep(0.05)

    def wait(self):
        """Returns the job's last state."""
        self.until(lambda: self.shown("JobState") in (
            "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))
        return self.shown("JobState")


def test_a_job_is_requeued_after_sigterm_and_goes_on(environ, file, tmp_path):
    workdir = tmp_path / "run"
    job = Job(environ, tmp_path, ["--ntasks=2"], [
        sys.executable, "-m", "brgsa_jax.cli", "train", "--config", file, "--workdir", workdir])

    def stopped():
        return [int(step) for step in re.findall(r"0: asked to stop at step (\d+)", job.log)]

    # What --signal=B:TERM@… sends before the time limit; then what a preemption does.
    for start, command in enumerate([("scancel", "--batch", "--signal=TERM"),
                                     ("scontrol", "requeue")], start=1):
        goal = 2 + max([0, *stopped()])
        job.until(lambda goal=goal: len(read_metrics(workdir / "metrics.jsonl")) >= goal)
        job.call(*command, job.number)
        job.until(lambda start=start: f"start {start + 1}" in job.log)
        assert len(stopped()) == start and goal <= stopped()[-1] < STEPS, job.log
    assert job.wait() == "COMPLETED", job.log
    assert "2 tasks on each of 1 nodes" in job.log and "on 2 × cpu" in job.log
    assert job.shown("Restarts") == "2"
    assert [int(step) for step in re.findall(r"resuming at step (\d+)", job.log)] == stopped()
    assert [row["step"] for row in rows(workdir)] == list(range(1, STEPS + 1))
    assert (workdir / "model/model.safetensors").exists()


PLACE = """
import os
from brgsa_jax.runtime import find_place
found = find_place(os.environ)
print("found", found.place.index, found.place.count, found.devices,
      os.environ["CUDA_VISIBLE_DEVICES"])
"""


@pytest.mark.parametrize(("tasks", "expected"), [
    ("gpu", [f"found {index} 4 ({index},) 0,1,2,3" for index in range(4)]),
    ("", [f"found {index} 4 ({index},) 0,1,2,3" for index in range(4)]),
    ("node", ["found 0 1 None 0,1,2,3"]),
    ("2", ["found 0 2 (0, 1) 0,1,2,3", "found 1 2 (2, 3) 0,1,2,3"])])
def test_a_task_for_each_gpu_or_for_each_node(environ, tmp_path, tasks, expected):
    job = Job(environ, tmp_path, ["--gpus-per-node=4", "--cpus-per-gpu=1"],
              [sys.executable, "-c", PLACE], BRGSA_TASKS=tasks)
    assert job.wait() == "COMPLETED", job.log
    assert sorted(re.findall(r"(?m)^\d: (found .*)", job.log)) == expected


FAIL = """
import os, time
from brgsa_jax.config import UserError
from brgsa_jax.runtime import initialize_runtime
with initialize_runtime():
    if os.environ["SLURM_PROCID"] == "1":
        raise UserError("the reason")
    time.sleep(300)
"""


def test_a_failed_task_fails_the_job_at_once_and_is_not_requeued(environ, tmp_path):
    job = Job(environ, tmp_path, ["--ntasks=3"], [sys.executable, "-c", FAIL])
    start = time.monotonic()
    assert job.wait() == "FAILED" and time.monotonic() - start < 120
    assert job.shown("Restarts") == "0" and job.shown("ExitCode") == "1:0"
    for task in (0, 2):
        assert re.search(rf"(?m)^{task}: brgsa: process 1 on \S+ failed: the reason$", job.log)


@pytest.mark.parametrize(("variables", "options", "command", "words"), [
    ({}, [], [], "give the command"), ({"BRGSA_TASKS": "gpu"}, [], ["true"], "0 GPUs on each node"),
    ({"BRGSA_TASKS": "x"}, [], ["true"], "BRGSA_TASKS=x")])
def test_wrong_use_is_explained(environ, tmp_path, variables, options, command, words):
    job = Job(environ, tmp_path, options, command, **variables)
    assert job.wait() == "FAILED" and words in job.log and job.shown("ExitCode") == "2:0"
