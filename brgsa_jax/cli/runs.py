"""Commands that train: demo, train."""

import argparse
from pathlib import Path

from brgsa_jax.cli import evals
from brgsa_jax.cli.common import Add, terminal
from brgsa_jax.cli.data import tell_build
from brgsa_jax.config import UserError


def add_demo(command: Add) -> None:
    """Adds the command that shows everything."""
    sub = command("demo", demo, "phantom data, training, evaluation and report on this machine",
                  overrides=True)
    sub.add_argument("--workdir", default="runs/demo", help="where everything goes [%(default)s]")


def add(command: Add) -> None:
    """Adds the commands."""
    sub = command("train", train, "train a configuration, or resume its work directory",
                  overrides=True)
    sub.add_argument("--config", required=True, help="recipe name, Python file or config.json")
    sub.add_argument("--workdir", help="work directory [runs/NAME]")


def train(options: argparse.Namespace) -> int:
    """Trains or resumes one configuration."""
    from brgsa_jax import config as configs
    from brgsa_jax.runtime import initialize_runtime
    from brgsa_jax.train import trainer

    config = configs.get_config(options.config, **configs.parse_overrides(options.rest))
    if not config.data.path:
        raise UserError("the configuration names no data set; add --config.data.path=FOLDER with a "
                        "folder written by brgsa data build")
    with initialize_runtime() as stop:
        outcome = trainer.train(config, options.workdir or f"runs/{config.name}",
                                console=terminal(), stop=stop)
    return trainer.PREEMPTED if outcome.preempted else 0


DEMO = {"seed": 0, "train": 3000, "valid": 0, "test": 400}


def demo(options: argparse.Namespace) -> int:
    """Phantom data, BrgSA and CLIP on the same data for the same steps, one report."""
    from brgsa_jax import config as configs
    from brgsa_jax.data import builders
    from brgsa_jax.evals.protocol import get_protocol
    from brgsa_jax.stopping import stopping_on_sigterm
    from brgsa_jax.train import trainer

    workdir, console = Path(options.workdir), terminal()
    changes = configs.parse_overrides(options.rest)
    changes.setdefault("data.path", str(workdir / "data"))
    runs = {"brgsa": workdir, "clip": workdir / "clip"}
    # Losses and bank are what the two runs differ in; everything else is changed in both.
    own = {key: value for key, value in changes.items()
           if key.startswith(("losses.", "model.bank."))}
    shared = {key: value for key, value in changes.items() if key not in own}
    recipes = {"brgsa": configs.get_config("phantom:brgsa", **changes),
               "clip": configs.get_config("phantom:clip", **shared)}
    if changes["data.path"] == str(workdir / "data"):
        console.print("phantom patients (drawn, not real ones)")
        tell_build(builders.build_phantom(
            workdir / "data", shape=tuple(recipes["brgsa"].model.input.shape), **DEMO))
    for name, folder in runs.items():
        with stopping_on_sigterm() as stop:
            outcome = trainer.train(recipes[name], folder, console=console, stop=stop)
        if outcome.preempted:
            return trainer.PREEMPTED
    models = [model for name, folder in runs.items()
              for model in evals.candidates(folder, configs.load_json(folder / "config.json"))]
    evals.write_report(models, changes["data.path"], get_protocol("ct-rate-18"), workdir / "eval",
                       recipes["brgsa"].name, recipes["brgsa"].data)
    return 0
