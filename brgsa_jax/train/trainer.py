"""The training loop: set up, restore, step, log, save, export."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from brgsa_jax import config as configs
from brgsa_jax import mesh as meshes
from brgsa_jax.config import UserError
from brgsa_jax.data import feed
from brgsa_jax.data import tokenizer as tok
from brgsa_jax.data.recipe import check_recipe, training_recipe
from brgsa_jax.data.summaries import open_captioned
from brgsa_jax.train import startup
from brgsa_jax.train.checkpoint import Checkpointer
from brgsa_jax.train.meter import Ledger, Meter, MetricsFile
from brgsa_jax.train.start import first_state, prepare_tokenizer, tell_left_out
from brgsa_jax.train.step import Training, TrainState, check_finite, make_training, model_of

# Keys a resume may change: they change no number, or only its rounding.
FREE_ON_RESUME = ("data.path", "data.summaries", "data.threads", "train.log_every",
                  "train.checkpoint_every", "train.keep_checkpoints", "train.microbatch",
                  "train.parallel", "mesh.")
PREEMPTED = 143


class Outcome(NamedTuple):
    """How a call of `train` ended.

    Attributes:
        workdir: the work directory.
        start, stop: steps done before and after this call.
        preempted: the platform asked to stop; the state is saved.
        seconds: wall-clock time by name.
    """

    workdir: Path
    start: int
    stop: int
    preempted: bool
    seconds: dict[str, float]


def train(config: Any, workdir: str | Path, *, console: Console | None = None) -> Outcome:
    """Trains, or resumes what the work directory holds, and exports the model.

    Args:
        config: a whole configuration; `data.path` names a folder written by `brgsa data build`.
        workdir: gets config.json, tokenizer/, checkpoints/, metrics.jsonl and model/.
        console: where to tell; by default the terminal.

    Raises:
        UserError: what the configuration asks cannot be done, or differs from the run to resume.
    """
    console = console or Console()
    workdir = Path(workdir)
    ledger = Ledger()
    with ledger.time("setup"):
        configs.validate(config)
        source = open_captioned(config.data, "train")
        if config.data.captions != "report" and not any(row.findings for row in source.index):
            raise UserError(f"no volume of {config.data.path} has a finding, so that every caption "
                            "would be the same; build the data set with a column of findings, or "
                            "name a file of brgsa summarize in data.summaries")
        if len(source) < config.data.batch_size:
            raise UserError(f"data.batch_size={config.data.batch_size} is more than the "
                            f"{len(source)} volumes of {config.data.path}; lower it")
        check_recipe(source, config.model.input)
        workdir.mkdir(parents=True, exist_ok=True)
        tokenizer = prepare_tokenizer(config, source, workdir)
        per_epoch = max(len(source) // config.data.batch_size, 1)
        config = configs.override(config, {"model.text.vocab": len(tokenizer),
                                           **training_recipe(source),
                                           **configs.train_durations(config, per_epoch)})
        if config.train.eval_every:
            validation_split(config)
        mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
        training = make_training(config, mesh, per_epoch=per_epoch)
        _check_claim(workdir, config)
        checkpointer = Checkpointer(workdir, every=config.train.checkpoint_every,
                                    keep=config.train.keep_checkpoints)
        meta = {"config": json.loads(configs.to_json(config)), "fingerprint": source.fingerprint}
        state = _start(config, workdir, training, source, tokenizer, checkpointer, meta, console)
        # Only now: what a new run was refused for can be mended in the same work directory.
        _write_config(workdir, config)
        tell_left_out(source, workdir, console)
        start = step = int(state.step)
    if start >= config.train.steps:
        console.print(f"{config.name}: already trained for {start} steps, nothing to do")
    else:
        state, step = _loop(config, workdir, training, state, source, tokenizer, mesh,
                            checkpointer, meta, console, ledger)
    preempted = step < config.train.steps
    with ledger.time("checkpoint"):
        checkpointer.close()
    if not preempted:
        with ledger.time("export"):
            # Every process takes part: the bank's rows lie on all of them.
            weights = training.gather(state)
            check_finite(weights)
            if jax.process_index() == 0 and not (workdir / "model/config.json").exists():
                model_of(config, weights, tokenizer).save(workdir / "model")
    return Outcome(workdir, start, step, preempted, ledger.seconds)


def _loop(config: Any, workdir: Path, training: Training, state: TrainState, source: Any,
          tokenizer: tok.Tokenizer, mesh: Any, checkpointer: Checkpointer, meta: dict[str, Any],
          console: Console, ledger: Ledger) -> tuple[TrainState, int]:
    """Steps until the end or a preemption; returns the state and the steps done."""
    start = step = int(state.step)
    first = jax.process_index() == 0
    batches = _batches(config, training, source, tokenizer, start)
    metrics = MetricsFile(workdir / "metrics.jsonl", resume_step=start) if first else None
    validate_every = config.train.eval_every
    with ledger.time("compile"):
        batch = next(batches)
        train_step = training.train_step.lower(state, batch).compile()
    if first:
        for line in startup.describe(config, mesh, state, volumes=len(source),
                                     temporary=startup.temporary_bytes(train_step)):
            console.print(line, highlight=False, soft_wrap=True)
    meter = Meter(metrics=metrics, console=console if first else Console(quiet=True),
                  title=config.name, start=start, steps=config.train.steps,
                  batch_size=config.data.batch_size, log_every=config.train.log_every)
    with meter, ledger.time("train"):
        while step < config.train.steps:
            state, values = train_step(state, batch)
            step += 1
            if step < config.train.steps:
                with ledger.time("data"):
                    batch = next(batches)
            meter.step(step, values)
            if validate_every and step % validate_every == 0:
                loss = validation_loss(config, training, state, tokenizer)
                state = training.update_plateau(state, loss)
                if metrics is not None:
                    metrics.write({"step": step, "validation_loss": float(loss)})
            last = step == config.train.steps
            with ledger.time("checkpoint"):
                checkpointer.save(step, state, meta, force=last)
            if checkpointer.preempted(step) and not last:
                console.print(f"asked to stop at step {step}; the state is saved, the same command "
                              "goes on from here")
                break
    if metrics is not None:
        metrics.close()
    return state, step


def _batches(config: Any, training: Training, source: Any, tokenizer: tok.Tokenizer,
             start: int) -> Any:
    """Placed batches of the training split from step `start`, without end."""
    return feed.global_batches(
        feed.host_batches(source, config.data, tokenizer, seed=config.seed, start=start,
                          process_index=jax.process_index(), process_count=jax.process_count()),
        training.place)


def validation_loss(config: Any, training: Training, state: TrainState,
                    tokenizer: tok.Tokenizer) -> jax.Array:
    """Mean loss over the split "valid" with centre crops and unshuffled captions."""
    source = validation_split(config)
    losses = [training.eval_step(state, training.place(batch))["loss"]
              for batch in feed.eval_batches(source, config.data, tokenizer,
                                             process_index=jax.process_index(),
                                             process_count=jax.process_count())]
    return sum(losses) / len(losses)


def validation_split(config: Any) -> Any:
    """Opens the split "valid".

    Raises:
        UserError: it is missing, or holds less than one batch.
    """
    source = open_captioned(config.data, "valid")
    if len(source) < config.data.batch_size:
        raise UserError(f"the split valid of {config.data.path} holds {len(source)} volumes, less "
                        f"than one batch of {config.data.batch_size}; lower data.batch_size, or "
                        "set train.eval_every=0")
    return source


def _start(config: Any, workdir: Path, training: Training, source: Any,
           tokenizer: tok.Tokenizer, checkpointer: Checkpointer, meta: dict[str, Any],
           console: Console) -> TrainState:
    restored = checkpointer.restore(training.abstract)
    if restored is None:
        return first_state(training, config, _batches(config, training, source, tokenizer, 0),
                           samples=len(source), workdir=workdir, console=console)
    if restored.meta["fingerprint"] != meta["fingerprint"]:
        also = " and data.summaries to that file" if config.data.summaries else ""
        raise UserError(f"the data at {config.data.path} is not what this run was trained on (its "
                        f"fingerprint differs); point data.path to that data{also}, or take "
                        "another work directory")
    if jax.process_index() == 0:
        console.print(f"{config.name}: resuming at step {int(restored.state.step)}")
    return restored.state


def _check_claim(workdir: Path, config: Any) -> None:
    """Refuses a work directory that holds another run."""
    path = workdir / "config.json"
    if path.exists():
        old, new = (configs.flatten(c) for c in (configs.load_json(path),
                                                 configs.from_tree(config.to_dict())))
        different = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)
                     and not key.startswith(FREE_ON_RESUME)]
        if different:
            changes = ", ".join(f"{k} was {old.get(k)!r} and is now {new.get(k)!r}"
                                for k in different[:5])
            raise UserError(f"{workdir} holds a run with another configuration ({changes}); take "
                            "another --workdir, or the configuration it was started with")


def _write_config(workdir: Path, config: Any) -> None:
    """Claims the work directory by its config.json."""
    if jax.process_index() == 0:
        path = workdir / "config.json"
        partial = path.with_suffix(".tmp")
        partial.write_text(configs.to_json(config))
        os.replace(partial, path)
