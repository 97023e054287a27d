"""The state a run starts from: random, from other weights, from data, or a checkpoint."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from brgsa_jax import mesh as meshes
from brgsa_jax import paths
from brgsa_jax.config import override
from brgsa_jax.data.records import write_rows
from brgsa_jax.data.tokenizer import (
    Tokenizer,
    corpus,
    find_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from brgsa_jax.model import Model
from brgsa_jax.train.bank_init import fill_bank
from brgsa_jax.train.step import Training, TrainState, make_training, model_of
from brgsa_jax.weights.initialise import Fate, initial_weights, native_folder, summary

LEFT_OUT_FILE = "left_out.csv"


def new_state(training: Training, config: Any) -> tuple[TrainState, list[Fate]]:
    """Returns a new state with the weights that `init_from` names, and every parameter's fate.

    Args:
        training: of the run.
        config: whole configuration.

    Raises:
        UserError: those weights cannot be read or do not fit.
    """
    sources = (config.model.init_from, config.model.vision.init_from, config.model.text.init_from)
    if not any(sources):
        return training.init(config.seed), []
    arrays, fates = initial_weights(config.model, training.abstract.model)
    state = training.init(config.seed)

    def loaded(tree: Any) -> Any:
        # A copy each, so that donation never sees a buffer twice: shards may alias an aligned
        # NumPy array whatever `may_alias` says.
        return paths.map_with_path(
            lambda path, leaf: jax.device_put(
                np.array(arrays[path], leaf.dtype), leaf.sharding, may_alias=False)
            if path in arrays else leaf, tree)

    model = loaded(state.model)
    return state.replace(params=model["params"], bank=model["bank"], stats=model["stats"],
                         ema=None if state.ema is None else loaded(state.ema)), fates


def first_state(training: Training, config: Any, batches: Iterable[Any], *, samples: int,
                workdir: Path, console: Console) -> TrainState:
    """Makes the state of a new run and says where its weights come from.

    Args:
        training: of the run.
        config: whole configuration.
        batches: placed batches of the training split, for a bank made of data.
        samples: size of that split.
        workdir: gets initialised.json, a record for every parameter, if weights were read.
        console: gets a table of them.

    Raises:
        UserError: weights or bank cannot be read or do not fit.
    """
    state, fates = new_state(training, config)
    if fates and jax.process_index() == 0:
        console.print(fate_table(fates))
        (workdir / "initialised.json").write_text(
            json.dumps([fate._asdict() for fate in fates], indent=1) + "\n")
    return fill_bank(state, training, config, batches, samples=samples)


def tell_left_out(source: Any, workdir: Path, console: Console) -> None:
    """Says which volumes have no summary or label to train on; lists them in left_out.csv."""
    left_out = getattr(source, "left_out", ())
    if left_out and jax.process_index() == 0:
        write_rows(workdir / LEFT_OUT_FILE, "reason", left_out)
        what = getattr(source, "lacking", "summary")
        console.print(f"{len(left_out)} of {len(source) + len(left_out)} volumes have no {what} "
                      f"and are left out, see {workdir / LEFT_OUT_FILE}", highlight=False,
                      soft_wrap=True)


def prepare_tokenizer(config: Any, source: Any, workdir: Path) -> Tokenizer:
    """Loads the configured tokenizer, or that of the weights to start from, or trains one.

    It is kept in the work directory.
    """
    folder, text = workdir / "tokenizer", config.model.text
    # One without a configuration is left over from a start that was refused.
    if (folder / "tokenizer.json").exists() and (workdir / "config.json").exists():
        return load_tokenizer(folder, text.max_tokens)
    if text.tokenizer:
        tokenizer = load_tokenizer(text.tokenizer, text.max_tokens)
    elif (tokenizer := initial_tokenizer(config.model)) is None:
        tokenizer = train_tokenizer(corpus(source, config.data), text.max_tokens)
    partial = workdir / f"tokenizer.tmp{jax.process_index()}"
    tokenizer.save(partial)
    try:
        os.replace(partial, folder)
    except OSError:
        # Another process of this run was first, with the same files; or a start that was refused
        # left others behind.
        ours, theirs = (f / "tokenizer.json" for f in (partial, folder))
        if theirs.exists() and theirs.read_bytes() == ours.read_bytes():
            shutil.rmtree(partial)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    return load_tokenizer(folder, text.max_tokens)


def initial_tokenizer(config: Any) -> Tokenizer | None:
    """The tokenizer of the weights a text tower starts from; None where they bring none.

    Args:
        config: section `model`.

    Raises:
        UserError: it cannot be read.
    """
    for place in (config.text.init_from, config.init_from):
        if not place:
            continue
        if not os.path.exists(place):
            return load_tokenizer(place, config.text.max_tokens)
        folder = native_folder(place) or (Path(place) if os.path.isdir(place) else None)
        beside = folder / "config.json" if folder else Path(place)
        return find_tokenizer(beside, None, config.text.max_tokens)
    return None


def fate_table(fates: Sequence[Fate]) -> Table:
    """A table of what was loaded, resized or left at random."""
    table = Table(title="weights to start from", title_justify="left")
    for name, justify in (("part", "left"), ("numbers", "right"), ("how", "left"),
                          ("from", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    for row in summary(list(fates)):
        table.add_row(*row)
    return table


def untrained_model(config: Any, tokenizer: Any) -> Model:
    """Makes the model a run with this configuration starts from."""
    mesh = meshes.make_mesh(1, 1, jax.local_devices()[:1])
    config = override(config, {"train.parallel": "mesh"})
    training = make_training(config, mesh, per_epoch=1)
    state, _ = new_state(training, config)
    return model_of(config, training.gather(state), tokenizer)
