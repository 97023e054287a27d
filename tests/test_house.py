"""The floors of the house: who may import whom, and what stays out."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "brgsa_jax"

# Longest match wins. Files of one floor may import each other.
FLOORS = {
    "brgsa_jax.version": 0, "brgsa_jax.config": 0, "brgsa_jax.registry": 0, "brgsa_jax.paths": 0,
    "brgsa_jax.mesh": 0, "brgsa_jax.peers": 0, "brgsa_jax.runtime": 0, "brgsa_jax.stopping": 0,
    "brgsa_jax.configs": 0,
    "brgsa_jax.hardware": 0,
    "brgsa_jax.data": 1, "brgsa_jax.summarize": 1,
    "brgsa_jax.nn": 2,
    "brgsa_jax.model": 3, "brgsa_jax.model_config": 3, "brgsa_jax.network": 3,
    "brgsa_jax.weights": 3, "brgsa_jax.flops": 3,
    "brgsa_jax.losses": 4,
    "brgsa_jax.train.optim": 5, "brgsa_jax.train.step": 5,
    "brgsa_jax.train.checkpoint": 6, "brgsa_jax.train.meter": 6, "brgsa_jax.evals": 6,
    "brgsa_jax.train.ledger": 6, "brgsa_jax.train.pace": 6, "brgsa_jax.train.validation": 6,
    "brgsa_jax.train.bank_init": 6, "brgsa_jax.train.start": 6, "brgsa_jax.train.startup": 6,
    "brgsa_jax.train.trainer": 7, "brgsa_jax.predict": 7, "brgsa_jax.export": 7,
    "brgsa_jax.planner": 7, "brgsa_jax.ablation": 7,
    "brgsa_jax.cli": 8,
}

# Third-party package -> the only places that may import it.
ONLY = {
    "flax.linen": ("nn/",),
    "orbax": ("train/checkpoint.py",),
    "grain": ("data/feed.py",),
    "tensorflow_datasets": ("data/",),
    "transformers": ("data/tokenizer.py", "weights/", "summarize/llm.py"),
    "ml_collections": ("config.py", "configs/"),
    "tensorboardX": ("train/meter.py",),
    "tensorboard": ("train/meter.py",),
    "wandb": ("train/meter.py",),
    "torch": ("weights/",),
    "tensorflow": (),
    "jax.experimental.pjit": (),
    "jax.experimental.shard_map": (),
}
NOT_USED = ("pjit", "PRNGKey", "device_put_sharded", "device_put_replicated", "Partitioned",
            "tree_map_with_names")


def sources():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "configs").glob("*.py")]
    assert len(files) > 30
    return files


def module_name(path):
    if path.is_relative_to(PACKAGE):
        parts = ("brgsa_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    else:
        parts = ("brgsa_jax", "configs", path.stem)
    return ".".join(parts).removesuffix(".__init__")


def imports(path, *, lazy=True):
    """(module, line) of every import; `lazy` includes those inside functions."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def floor_of(module):
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in FLOORS:
            return FLOORS[".".join(parts[:end])]
    return None


def short(path):
    return str(path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT))


def test_every_file_has_a_floor_and_imports_only_lower_ones():
    wrong = []
    for path in sources():
        name = module_name(path)
        if name in ("brgsa_jax", "brgsa_jax.train", "brgsa_jax.train.__init__"):
            continue
        mine = floor_of(name)
        assert mine is not None, f"{name} stands on no floor"
        for module, line in imports(path):
            other = floor_of(module) if module.startswith("brgsa_jax.") else None
            if other is not None and other > mine:
                wrong.append(f"{short(path)}:{line} (floor {mine}) imports {module} ({other})")
    assert not wrong, "\n".join(wrong)


def test_every_outside_package_has_its_place():
    wrong = []
    for path in sources():
        for module, line in imports(path):
            for package, places in ONLY.items():
                inside = module == package or module.startswith(package + ".")
                if inside and not short(path).startswith(places or "-"):
                    wrong.append(f"{short(path)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_only_runtime_starts_distributed_and_only_step_may_pmap():
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                text = ast.unparse(node)
                if text.startswith("jax.distributed") and path.name != "runtime.py":
                    wrong.append(f"{short(path)}:{node.lineno} {text}")
                if text == "jax.pmap" and short(path) != "train/step.py":
                    wrong.append(f"{short(path)}:{node.lineno} {text}")
                if node.attr in NOT_USED:
                    wrong.append(f"{short(path)}:{node.lineno} {text}")
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_and_sweeps_import_the_trainer():
    for path in sources():
        if path == PACKAGE / "ablation.py":
            continue
        for module, line in imports(path):
            if module.startswith(("brgsa_jax.train.trainer", "brgsa_jax.train.trainer.")) \
                    or module.startswith("brgsa_jax.cli"):
                assert path.parent.name == "cli", f"{short(path)}:{line} imports {module}"


def test_modules_know_no_config_and_losses_no_parameters():
    forbidden = {"nn": ("config", "mesh", "losses", "train", "model"),
                 "losses": ("config", "mesh", "model", "nn", "train", "weights")}
    for folder, names in forbidden.items():
        for path in (PACKAGE / folder).glob("*.py"):
            for module, line in imports(path):
                for name in names:
                    assert not module.startswith(f"brgsa_jax.{name}"), \
                        f"{short(path)}:{line} imports {module}"


def test_the_loop_stays_readable():
    assert len((PACKAGE / "train/trainer.py").read_text().splitlines()) < 250


@pytest.mark.parametrize("module", ["brgsa_jax", "brgsa_jax.data.volume", "brgsa_jax.data.sources",
                                    "brgsa_jax.data.phantom", "brgsa_jax.data.builders",
                                    "brgsa_jax.data.tokenizer", "brgsa_jax.cli"])
def test_reading_data_brings_in_no_jax(module):
    code = (f"import sys, {module}\n"
            "heavy = {'jax', 'grain', 'flax', 'tensorflow', 'torch', 'orbax'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr


def test_the_whole_house_runs_without_tensorflow_and_torch():
    code = ("import sys, brgsa_jax.predict, brgsa_jax.train.trainer\n"
            "heavy = {'tensorflow', 'torch'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
