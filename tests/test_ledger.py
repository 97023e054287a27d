"""The ledger of wall-clock time: every second has one name, over any number of starts."""

import json
import time

import pytest

from brgsa_jax.train import ledger as ledgers
from brgsa_jax.train.ledger import NAMES, Ledger, goodput, read_ledger
from tests.clock import Clock


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(ledgers, "time", clock)
    return clock


def spent(found):
    return {name: seconds for name, seconds in found.items() if seconds}


def test_every_second_goes_to_one_name_the_innermost(clock):
    ledger = Ledger()
    clock.now += 1
    with ledger.time("step"):
        clock.now += 2
        with ledger.time("validation"):
            clock.now += 4
        clock.now += 8
        ledger.move(3, "data_wait")
    clock.now += 16
    assert spent(ledger.seconds) == {"setup": 17, "step": 7, "validation": 4, "data_wait": 3}
    assert sum(ledger.total.values()) == 31 and goodput(ledger.total) == round(7 / 31, 4)


def test_an_error_inside_does_not_keep_its_name(clock):
    ledger = Ledger()
    with pytest.raises(KeyError), ledger.time("export"):
        clock.now += 1
        raise KeyError
    clock.now += 2
    assert spent(ledger.seconds) == {"setup": 2, "export": 1}


def run(clock, folder, *, mark, saved=0, steps=0, compile_=5):
    """A start that compiles, makes steps, saves, and is killed after more of them."""
    ledger = Ledger()
    with ledger.time("compile"):
        clock.now += compile_
    assert ledger.open(folder, mark=mark)
    with ledger.time("step"):
        clock.now += saved
        found = ledger.total
        with ledger.time("validation"):
            clock.now += 1
        clock.now += steps
        ledger.save()
    return found


def test_what_came_after_the_checkpoint_is_lost_and_the_pause_is_downtime(clock, tmp_path):
    mark = run(clock, tmp_path, mark={}, saved=100, steps=30)
    clock.now += 50
    second = run(clock, tmp_path, mark=mark, saved=40, steps=7)
    found = read_ledger(tmp_path / "ledger.json")
    assert spent(found["seconds"]) == {"compile": 10, "step": 147, "validation": 1, "lost": 31,
                                       "downtime": 50}
    assert found["starts"] == 2 and found["wall_seconds"] == 239
    assert found["goodput"] == round(147 / 239, 4) and found["until"] == clock.now
    # A third start goes on from the first checkpoint: the second one is damaged, say.
    run(clock, tmp_path, mark=mark)
    found = read_ledger(tmp_path / "ledger.json")
    assert found["seconds"]["step"] == 100 and found["seconds"]["lost"] == 31 + 47 + 1
    assert second["step"] == 140


def test_a_start_before_the_first_checkpoint_is_all_lost(clock, tmp_path):
    run(clock, tmp_path, mark={}, steps=30)
    run(clock, tmp_path, mark={}, steps=0)
    assert spent(read_ledger(tmp_path / "ledger.json")["seconds"]) == {
        "compile": 10, "lost": 31, "validation": 1}


def test_without_a_mark_nothing_is_known_to_be_lost(clock, tmp_path):
    run(clock, tmp_path, mark={}, steps=30)
    run(clock, tmp_path, mark=None, steps=1)
    found = read_ledger(tmp_path / "ledger.json")["seconds"]
    assert (found["lost"], found["step"]) == (0, 31)


def test_a_clock_that_went_back_is_no_negative_downtime(clock, tmp_path):
    run(clock, tmp_path, mark={})
    clock.now -= 500
    run(clock, tmp_path, mark={})
    assert read_ledger(tmp_path / "ledger.json")["seconds"]["downtime"] == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"seconds": 3, "until": 1, "starts": 1}',
                                  '{"seconds": {}, "until": "x", "starts": 1}', "\0\xff"])
def test_a_damaged_file_is_told_and_replaced(clock, tmp_path, text):
    (tmp_path / "ledger.json").write_text(text)
    assert Ledger().open(tmp_path, mark={}) is False
    found = json.loads((tmp_path / "ledger.json").read_text())
    assert found["starts"] == 1 and set(found["seconds"]) == set(NAMES)


def test_it_is_written_rarely_whole_and_at_the_end(clock, tmp_path, monkeypatch):
    writes = []
    replace = ledgers.os.replace
    took = [0.0] * 3 + [0.021] * 99

    def slowly(*paths):
        replace(*paths)
        writes.append(clock.now)
        clock.now += took.pop(0)

    monkeypatch.setattr(ledgers.os, "replace", slowly)
    with pytest.raises(KeyError), Ledger() as ledger:
        ledger.beat()
        assert not writes, "no file before it is opened"
        ledger.open(tmp_path, mark={})
        for _ in range(60):
            clock.now += 0.25
            ledger.beat()
        raise KeyError
    # After one of 21 ms, 4.2 s pass.
    assert [b - a for a, b in zip(writes, writes[1:], strict=False)] == pytest.approx(
        [1.25] * 3 + [4.27] * 2 + [2.77], abs=0.03)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


def test_the_line_for_people(clock, tmp_path):
    ledger = Ledger()
    clock.now += 6
    with ledger.time("step"):
        clock.now += 93.7
    with ledger.time("export"):
        clock.now += 0.3
    assert ledger.line() == "goodput 93.7% of 100 s: setup 6 s, step 94 s"
    ledger.open(tmp_path, mark={})
    clock.now += 100
    ledger = Ledger()
    ledger.open(tmp_path, mark=None)
    assert ledger.line() == ("goodput 46.9% of 200 s over 2 starts: setup 6 s, step 94 s, "
                             "downtime 100 s")


def test_real_clocks_agree(tmp_path):
    begin = time.perf_counter()
    ledger = Ledger()
    with ledger.time("step"):
        time.sleep(0.05)
    total = sum(ledger.seconds.values())
    assert 0.05 <= ledger.seconds["step"] <= total <= time.perf_counter() - begin
