"""How far the host runs ahead, what counts as waiting for data, profiles, the cost of the loop."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from benchmarks import loop
from brgsa_jax.config import UserError, get_config, train_durations, validate
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.train.ledger import Ledger
from brgsa_jax.train.pace import Pace, Trace


class Work:
    """The result of a step that is finished when it is told so."""

    def __init__(self, *, done=False):
        self._done = threading.Event()
        if done:
            self._done.set()

    def finish(self):
        self._done.set()

    def block_until_ready(self):
        assert self._done.wait(60)


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def pace(ledger):
    with Pace(ledger) as pace:
        yield pace


def slow(seconds, work=None):
    """An iterator whose next batch takes a while; `work` is finished at half of it."""
    time.sleep(seconds / 2)
    if work is not None:
        work.finish()
    time.sleep(seconds / 2)
    yield "batch"


def test_the_host_stays_one_step_ahead(pace):
    first, second = Work(), Work()
    finished = [pace.started(first), pace.started(second)]
    taken = threading.Event()

    def take():
        assert pace.next(iter(["batch"])) == "batch"
        taken.set()

    threading.Thread(target=take, daemon=True).start()
    assert not taken.wait(0.2), "two steps were unfinished"
    first.finish()
    assert taken.wait(60) and not finished[1].done()
    second.finish()
    pace.drain()
    assert finished[0].result() <= finished[1].result() <= time.perf_counter()


def test_only_the_wait_that_idle_devices_see_is_one_for_data(pace, ledger):
    pace.started(Work(done=True)).result()
    pace.next(slow(0.2))
    idle = ledger.seconds["data_wait"]
    assert 0.2 <= idle < ledger.seconds["setup"] + idle
    busy = Work()
    pace.started(busy)
    pace.next(slow(0.2))
    assert ledger.seconds["data_wait"] == idle, "the devices worked all the time"
    busy.finish()
    half = Work()
    pace.started(half)
    pace.next(slow(0.4, half))
    assert idle + 0.19 < ledger.seconds["data_wait"] < idle + 0.4


def test_a_step_that_fails_is_not_hidden(pace):
    class Broken:
        def block_until_ready(self):
            raise RuntimeError("device lost")

    pace.started(Broken())
    with pytest.raises(RuntimeError, match="device lost"):
        pace.drain()


def traced(folder):
    """Numbers of the steps in the profile of a folder."""
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    events = (event for plane in jax.profiler.ProfileData.from_file(str(file)).planes
              for line in plane.lines for event in line.events if event.name == "train")
    return sorted(dict(event.stats)["step_num"] for event in events)


@pytest.mark.parametrize(("window", "last", "expected"), [
    ((2, 3), 5, [2, 3]), ((4, 9), 5, [4, 5])])
def test_a_window_of_steps_is_traced_even_when_the_run_ends_in_it(pace, ledger, tmp_path, window,
                                                                  last, expected):
    step = jax.jit(lambda x: x + 1)
    value = step(jnp.zeros(()))
    with Trace(window, tmp_path, pace=pace, ledger=ledger) as trace:
        for number in range(1, last + 1):
            with trace.step(number):
                value = step(value)
                pace.started(value)
    assert traced(tmp_path / "profile") == expected
    assert ledger.seconds["profile"] > 0


def test_without_a_window_nothing_is_written(pace, ledger, tmp_path):
    with Trace((), tmp_path, pace=pace, ledger=ledger) as trace, trace.step(1):
        pass
    assert not list(tmp_path.iterdir()) and ledger.seconds["profile"] == 0


@pytest.mark.parametrize("window", [(3, 2), (0, 1), (5,), (1, 2, 3), (1, 101), (1.0, 2.0),
                                    ("a", "b")])
def test_windows_that_make_no_sense_are_refused(window):
    with pytest.raises(UserError, match=r"train.profile=.* must be the first and the last of at "
                                        r"most 100 steps") as told:
        validate(get_config("phantom", **{"train.profile": window}))
    assert "\n" not in str(told.value)


def test_a_window_beyond_the_run_is_refused():
    for steps in (20, "2epochs"):
        config = get_config("phantom", **{"train.profile": (19, 21), "train.steps": steps})
        with pytest.raises(UserError, match="goes beyond the last step, 20"):
            train_durations(validate(config), per_epoch=10)
    train_durations(get_config("phantom", **{"train.profile": (19, 20), "train.steps": 20}), 10)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("pace") / "phantom"
    build_phantom(out, train=32, valid=2, test=2, shape=(32, 32, 16), workers=1, progress=False)
    return out


def test_the_loop_costs_the_host_little(data):
    """At most 2 ms a step on 8 devices; on a busy machine little more than the calls it must make.

    The processor time of its thread, in the best of several windows.
    """
    assert jax.device_count() == 8
    for _ in range(3):
        found = loop.measure(data, "brgsa", steps=400, console=Console(quiet=True))
        best, bare = min(found.processor), min(found.bare_processor)
        if best <= max(2.0, 1.5 * bare):
            return
    raise AssertionError(f"{best:.2f} ms a step; only placing and dispatching take {bare:.2f}")
