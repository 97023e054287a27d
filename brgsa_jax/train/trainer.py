"""The training loop: set up, restore, step, log, save, export."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from brgsa_jax import config as configs
from brgsa_jax import mesh as meshes
from brgsa_jax.config import UserError
from brgsa_jax.data import feed
from brgsa_jax.data import tokenizer as tok
from brgsa_jax.data.labelled import open_labelled
from brgsa_jax.data.recipe import check_recipe, training_recipe
from brgsa_jax.train import startup
from brgsa_jax.train.checkpoint import Checkpointer
from brgsa_jax.train.ledger import Ledger
from brgsa_jax.train.meter import Meter, MetricsFile
from brgsa_jax.train.pace import Pace, Trace
from brgsa_jax.train.start import first_state, prepare_tokenizer, tell_left_out
from brgsa_jax.train.step import Training, TrainState, check_finite, make_training, model_of
from brgsa_jax.train.validation import check_validation, validate

# Keys a resume may change: they change no number, or only its rounding.
FREE_ON_RESUME = ("data.path", "data.summaries", "data.threads", "train.log_every",
                  "train.checkpoint_every", "train.keep_checkpoints", "train.microbatch",
                  "train.parallel", "train.profile", "train.eval_volumes", "data.labels", "mesh.")
PREEMPTED = 143


class Outcome(NamedTuple):
    """How a call of `train` ended.

    Attributes:
        workdir: the work directory.
        start, stop: steps done before and after this call.
        preempted: the platform asked to stop; the state is saved.
        seconds: wall-clock time of this call by name, see `brgsa_jax.train.ledger`.
    """

    workdir: Path
    start: int
    stop: int
    preempted: bool
    seconds: dict[str, float]


def train(config: Any, workdir: str | Path, *, console: Console | None = None,
          stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Trains, or resumes what the work directory holds, and exports the model.

    Args:
        config: a whole configuration; `data.path` names a folder written by `brgsa data build`.
        workdir: gets config.json, tokenizer/, checkpoints/, metrics.jsonl and model/.
        console: where to tell; by default the terminal.
        stop: asked after every step and before every batch of a validation whether to save and end
            there, in all processes of a run alike; see `brgsa_jax.runtime.initialize_runtime`.

    Raises:
        UserError: what the configuration asks cannot be done, or differs from the run to resume.
    """
    console = console or Console()
    workdir = Path(workdir)
    ledger = Ledger()
    configs.validate(config)
    source = open_labelled(config, "train")
    if configs.reads_text(config) and config.data.captions != "report" and not any(
            row.findings for row in source.index):
        raise UserError(f"no volume of {config.data.path} has a finding, so that every caption "
                        "would be the same; build the data set with a column of findings, or "
                        "name a file of brgsa summarize in data.summaries")
    if len(source) < config.data.batch_size:
        raise UserError(f"data.batch_size={config.data.batch_size} is more than the "
                        f"{len(source)} volumes to train on of {config.data.path}; lower it")
    check_recipe(source, config.model.input)
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare_tokenizer(config, source, workdir)
    per_epoch = max(len(source) // config.data.batch_size, 1)
    config = configs.override(config, {"model.text.vocab": len(tokenizer),
                                       **training_recipe(source),
                                       **configs.train_durations(config, per_epoch)})
    if config.train.eval_every:
        check_validation(config)
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
    training = make_training(config, mesh, per_epoch=per_epoch)
    _check_claim(workdir, config)
    checkpointer = Checkpointer(workdir, every=config.train.checkpoint_every,
                                keep=config.train.keep_checkpoints)
    meta = {"config": json.loads(configs.to_json(config)), "fingerprint": source.fingerprint}
    state, begun = _start(config, workdir, training, source, tokenizer, checkpointer, meta, console)
    # Only now: what a new run was refused for can be mended in the same work directory.
    _write_config(workdir, config)
    tell_left_out(source, workdir, console)
    start = step = int(state.step)
    told = jax.process_index() == 0 and not (start >= config.train.steps and _exported(workdir))
    if told and not ledger.open(workdir, mark=begun["ledger"]):
        console.print(f"{ledger.path} cannot be read; time is counted from this start on")
    if start >= config.train.steps:
        console.print(f"{config.name}: already trained for {start} steps, nothing to do")
    else:
        state, step = _loop(config, workdir, training, state, source, tokenizer, mesh,
                            checkpointer, meta, console, ledger, stop)
    preempted = step < config.train.steps
    with ledger.time("checkpoint"):
        checkpointer.close()
    if not preempted:
        with ledger.time("export"):
            # Every process takes part: the bank's rows lie on all of them.
            weights = training.gather(state)
            check_finite(weights)
            if jax.process_index() == 0 and not _exported(workdir):
                model_of(config, weights, tokenizer).save(workdir / "model")
    if told:
        ledger.save()
        console.print(ledger.line(), highlight=False, soft_wrap=True)
    return Outcome(workdir, start, step, preempted, ledger.seconds)


def _loop(config: Any, workdir: Path, training: Training, state: TrainState, source: Any,
          tokenizer: tok.Tokenizer, mesh: Any, checkpointer: Checkpointer, meta: dict[str, Any],
          console: Console, ledger: Ledger, stop: Callable[[], bool]) -> tuple[TrainState, int]:
    """Steps until the end or a preemption; returns the state and the steps done."""
    start = step = int(state.step)
    first = jax.process_index() == 0
    batches = _batches(config, training, source, tokenizer, start)
    metrics = MetricsFile(workdir / "metrics.jsonl", resume_step=start) if first else None
    validate_every = config.train.eval_every

    def asked() -> bool:
        # What comes after the last step is finished.
        return stop() and step < config.train.steps

    def save() -> None:
        pace.drain()
        with ledger.time("checkpoint"):
            checkpointer.save(step, state, {**meta, "ledger": ledger.total})
            ledger.save()

    batch, work = next(batches), startup.work_of(config, mesh)
    with ledger.time("compile"):
        train_step = training.train_step.lower(state, batch).compile()
    if first:
        for line in startup.describe(config, mesh, state, volumes=len(source), work=work,
                                     temporary=startup.temporary_bytes(train_step)):
            console.print(line, highlight=False, soft_wrap=True)
    meter = Meter(metrics=metrics, console=console if first else Console(quiet=True),
                  title=config.name, start=start, steps=config.train.steps, work=work,
                  log_every=config.train.log_every, ledger=ledger)
    pace = Pace(ledger)
    trace = Trace(config.train.profile if first else (), workdir, pace=pace, ledger=ledger)
    # A transfer nobody asked for would make host and devices wait for each other at every step.
    with ledger, ledger.time("step"), pace, meter, trace, jax.transfer_guard("disallow"):
        while True:
            # A checkpoint holds the state before the validation of its step: a resume repeats it.
            if validate_every and step and step % validate_every == 0:
                pace.drain()
                with ledger.time("validation"):
                    found = validate(config, training, state, tokenizer, asked)
                    if found is None:
                        break
                    state = training.update_plateau(state, found["validation_loss"])
                    meter.flush()
                    if metrics is not None:
                        found = {name: float(x) for name, x in jax.device_get(found).items()}
                        metrics.write({"step": step, **found})
            if step == config.train.steps:
                break
            with trace.step(step + 1):
                state, values = train_step(state, batch)
                finished = pace.started(values["loss"])
            step += 1
            last = step == config.train.steps
            meter.step(step, values, finished)
            if not last:
                batch = pace.next(batches)
            if asked():
                break
            if checkpointer.due(step) or last:
                save()
            ledger.beat()
        if step < config.train.steps:
            save()
            console.print(f"asked to stop at step {step}; the state is saved, the same command "
                          "goes on from here")
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


def _start(config: Any, workdir: Path, training: Training, source: Any,
           tokenizer: tok.Tokenizer, checkpointer: Checkpointer, meta: dict[str, Any],
           console: Console) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from, and what was stored beside it."""
    restored = checkpointer.restore(training.abstract)
    if restored is None:
        state = first_state(training, config, _batches(config, training, source, tokenizer, 0),
                            samples=len(source), workdir=workdir, console=console)
        return state, {"ledger": {}}
    if restored.meta["fingerprint"] != meta["fingerprint"]:
        also = " and data.summaries to that file" if config.data.summaries else ""
        raise UserError(f"the data at {config.data.path} is not what this run was trained on (its "
                        f"fingerprint differs); point data.path to that data{also}, or take "
                        "another work directory")
    if jax.process_index() == 0:
        console.print(f"{config.name}: resuming at step {int(restored.state.step)}")
    return restored.state, {"ledger": None, **restored.meta}


def _exported(workdir: Path) -> bool:
    return (workdir / "model/config.json").exists()


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
