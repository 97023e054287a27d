"""`brgsa plan` as a process: a compile for a TPU slice that is not there, and its refusals."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_planner import SMALL

# As small as a whole step can be, so that the compile takes seconds.
TINY = {**SMALL, "model.vision.depth": 1, "model.text.depth": 1,
        "losses.info_nce.negatives": "ring"}


def brgsa(*arguments, **changes):
    options = [f"--config.{key}={value}" for key, value in changes.items()]
    return subprocess.run([sys.executable, "-m", "brgsa_jax.cli", "plan", *arguments, *options],
                          capture_output=True, text=True, timeout=1200,
                          env={**os.environ, "COLUMNS": "200"})


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The finished process, and its JSON."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    run = brgsa("--config", "clip", "--topology", "v5e:2x2", "--batch", "32", "--json", str(path),
                **TINY)
    assert run.returncode == 0, run.stderr
    return run, json.loads(path.read_text())


def test_a_step_is_compiled_for_a_slice_that_is_not_there(compiled):
    run, found = compiled
    assert found["compiled"] and found["fits"] and found["devices"] == 4
    assert found["batch"] == 32 and not found["assumed"]
    memory = found["memory"]
    arrays = sum(memory[name] for name in (
        "parameters", "optimiser", "bank", "average", "statistics", "batch"))
    rest = memory["temporaries"] + memory["padding"] + memory["program"]
    assert memory["peak"] == arrays + rest
    # Rows of 64 are padded to tiles of 128.
    assert 0 <= memory["padding"] < arrays
    assert memory["usable"] == 15.75 * 2**30 and memory["total"] == 2**34
    assert 0 < found["loss_memory"] < memory["peak"]
    assert run.stderr == ""
    for text in ("clip on v5e:2x2: 4 devices, data=4 × fsdp=1; global batch 32, 8 rows a device",
                 "of 15.75 GiB usable", "collective-permute", "Largest global batch: ",
                 "It fits: "):
        assert text in run.stdout, text


def test_its_collectives_are_those_of_the_losses_and_gradients(compiled):
    found = compiled[1]
    gradients = found["collectives"]["all-reduce"]["sent"] / (2 * 3 / 4)
    # All are summed up in float32, also those of what is multiplied in bfloat16; texts of 16
    # tokens leave out 496 of 512 positions.
    assert gradients == pytest.approx(found["memory"]["parameters"] - 496 * 64 * 4, abs=200)
    ring = found["collectives"]["collective-permute"]
    block = 8 * 32 * 4
    # Texts once forwards, texts and gradients backwards, texts for diagnostics; four turns each.
    assert ring["count"] % 4 == 0 and 4 * 4 * block <= ring["sent"] < 1.5 * 4 * 4 * block


@pytest.mark.parametrize(("arguments", "words"), [
    (("--config", "brgs", "--topology", "v5e:2x2"), "brgsa"),
    (("--config", "no/such.py", "--topology", "v5e:2x2"), "does not exist"),
    (("--config", "brgsa", "--topology", "v5:2x2"), "did you mean v5p or v5e"),
    (("--config", "brgsa", "--topology", "v5e:16x16"), "give --batch a multiple of 256"),
    (("--config", "brgsa", "--topology", "h200:8", "--json", "no/such/plan.json"),
     "--json=no/such/plan.json cannot be written")])
def test_mistakes_are_one_sentence(arguments, words):
    run = brgsa(*arguments)
    assert run.returncode == 1 and words in run.stderr
    assert run.stderr.startswith("brgsa: ") and run.stderr.count("\n") == 1 and not run.stdout


@pytest.mark.parametrize("batch", ["0", "-8", "8.5", "many"])
def test_a_batch_is_a_number_of_rows(batch):
    run = brgsa("--config", "brgsa", "--topology", "h200:8", f"--batch={batch}")
    assert run.returncode == 2 and "--batch" in run.stderr


def test_what_does_not_fit_ends_with_one(tmp_path):
    path = tmp_path / "plan.json"
    run = brgsa("--config", "brgsa:vit3d_l", "--topology", "l4:8", "--batch", "4096", "--json",
                str(path))
    assert run.returncode == 1 and run.stderr == ""
    assert "It does not fit: " in run.stdout and "30522 rows were assumed" in run.stdout
    found = json.loads(path.read_text())
    assert not found["fits"] and found["memory"]["peak"] > found["memory"]["usable"]
    assert found["largest_batch"] < 4096
