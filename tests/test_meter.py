"""The numbers of a run while it trains: speed without what is no step, MFU, memory."""

import io
import time
from concurrent.futures import Future
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from brgsa_jax.config import UserError
from brgsa_jax.train import ledger, meter
from brgsa_jax.train.ledger import Ledger
from brgsa_jax.train.meter import SPEED, Meter, MetricsFile, Work, read_metrics
from tests.clock import Clock

VALUES = {"loss": 2.0, "grad_norm": 1.0, "batch/top1": 0.5}


class Run:
    """A meter whose steps are finished when they are told."""

    def __init__(self, folder, *, work=None, log_every=2, steps=100, clock=time):
        self.clock = clock
        self.path = folder / "metrics.jsonl"
        self.ledger = Ledger()
        self.console = Console(file=io.StringIO(), width=200)
        self.meter = Meter(metrics=MetricsFile(self.path, resume_step=0), console=self.console,
                           title="run", start=0, steps=steps, log_every=log_every,
                           work=work or Work(8, 1e9, None), ledger=self.ledger)
        self.done = 0

    def step(self, seconds, values=VALUES):
        with self.ledger.time("step"):
            self.clock.sleep(seconds)
        finished = Future()
        finished.set_result(self.clock.perf_counter())
        self.done += 1
        self.meter.step(self.done, {k: jnp.float32(v) for k, v in values.items()}, finished)

    @property
    def rows(self):
        return read_metrics(self.path)


def test_a_row_tells_the_speed_of_steps_and_nothing_else(tmp_path, monkeypatch):
    clock = Clock()
    for module in (ledger, meter):
        monkeypatch.setattr(module, "time", clock)
    run = Run(tmp_path, clock=clock)
    with run.meter:
        for _ in range(2):
            run.step(0.02)
        for name in ("validation", "checkpoint", "profile"):
            with run.ledger.time(name):
                clock.sleep(0.3)
        run.step(0.02)
        with run.ledger.time("step"):
            clock.sleep(0.1)
            run.ledger.move(0.1, "data_wait")
        run.step(0.02)
        with run.ledger.time("validation"):
            clock.sleep(0.3)
    first, second = run.rows
    assert first["step"] == 2 and {"loss", "grad_norm", "batch/top1"} <= set(first)
    assert first["seconds_per_step"] == pytest.approx(0.02) and first["data_wait_share"] == 0
    assert second["seconds_per_step"] == pytest.approx(0.07)
    assert second["data_wait_share"] == pytest.approx(0.1 / 0.14)
    for row in run.rows:
        assert row["samples_per_second"] == 8 / row["seconds_per_step"]


def test_values_are_fetched_one_interval_late(tmp_path):
    run = Run(tmp_path)
    with run.meter:
        for _ in range(3):
            run.step(0)
        assert run.rows == []
        run.step(0)
        assert [row["step"] for row in run.rows] == [2]
    assert [row["step"] for row in run.rows] == [2, 4]


@pytest.mark.parametrize(("work", "expected"), [
    (Work(8, 3e12, 4e12), 1.5), (Work(8, 3e12, None), None), (Work(8, float("nan"), 4e12), None)])
def test_mfu_is_told_where_it_is_known(tmp_path, work, expected):
    assert work.utilisation(0.5) == expected
    run = Run(tmp_path, work=work, steps=2)
    with run.meter:
        run.step(0.01)
        run.step(0.01)
    (row,) = run.rows
    told = run.console.file.getvalue()
    assert ("mfu" in row) == ("MFU" in told) == (expected is not None)
    if expected is not None:
        assert row["mfu"] == work.flops / row["seconds_per_step"] / work.peak
        assert f"MFU {row['mfu']:.1%}" in told


def test_memory_is_that_of_the_fullest_device_that_tells(tmp_path, monkeypatch):
    def devices(*stats):
        monkeypatch.setattr(jax, "local_devices", lambda: [
            SimpleNamespace(memory_stats=lambda s=s: s) for s in stats])

    run = Run(tmp_path, log_every=1, steps=3)
    with run.meter:
        devices(None, None)
        run.step(0)
        run.meter.flush()
        devices({"bytes_in_use": 2**30, "peak_bytes_in_use": 5 * 2**30},
                {"bytes_in_use": 3 * 2**30, "peak_bytes_in_use": 4 * 2**30})
        run.step(0)
        run.meter.flush()
        devices({"bytes_in_use": 7})
        run.step(0)
    silent, full, half = run.rows
    assert "memory_bytes" not in silent and "memory_peak_bytes" not in silent
    assert (full["memory_bytes"], full["memory_peak_bytes"]) == (3 * 2**30, 5 * 2**30)
    assert half["memory_bytes"] == 7 and "memory_peak_bytes" not in half
    for row in run.rows:
        assert set(row) - set(SPEED) == {"step", *VALUES}


def test_the_line_of_a_run_without_a_terminal(tmp_path, monkeypatch):
    stats = {"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30}
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    run = Run(tmp_path, work=Work(64, 1e6, 1e12), log_every=1, steps=1)
    with run.meter:
        run.step(0.01)
    line = run.console.file.getvalue()
    assert line.startswith("run  step 1/1  ") and " ms/step  " in line and " samples/s  " in line
    assert "  data wait 0%  memory 1.0 GiB, peak 3.0  left 0 s  loss 2.000\n" in line
    assert "batch/top1" not in line


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, name):
    run = Run(tmp_path, log_every=1)
    run.step(0, {**VALUES, name: float("nan")})
    with pytest.raises(UserError, match="is nan at step 1; lower optim.learning_rate"):
        run.meter.flush()
    assert run.rows == []
