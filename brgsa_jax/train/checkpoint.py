"""Checkpoints: asynchronous, atomic, restorable onto another mesh. The only user of orbax."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from brgsa_jax.config import UserError

logging.getLogger("absl").setLevel(logging.WARNING)


class Restored(NamedTuple):
    """A restored state and what was stored beside it."""

    state: Any
    meta: dict[str, Any]


class Checkpointer:
    """Saves the train state every `every` steps below WORKDIR/checkpoints.

    A save is written beside its final name and renamed when complete: a process killed at any
    moment leaves the last complete checkpoint.
    """

    def __init__(self, workdir: str | Path, *, every: int, keep: int) -> None:
        self._every = every
        folder = Path(workdir).resolve() / "checkpoints"
        if set("[]\\") & set(str(folder)):
            raise UserError(f"checkpoints cannot be kept below {workdir}: its path has one of the "
                            "characters [ ] \\, with which they could not be restored; rename it")
        folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True))

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether to save the state after this step: the first one ever, and every so many."""
        # Orbax would tell the same, and take a tenth of the loop's time for it.
        return step % self._every == 0 or self.latest is None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Hands the state to the writer, unless this step is there already.

        Args:
            step: updates done.
            state: TrainState.
            meta: JSON-able; configuration, data fingerprint, ledger.
        """
        if self.latest != step:
            self._manager.save(step, force=True, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))

    def restore(self, abstract: Any) -> Restored | None:
        """Restores the newest checkpoint onto the shardings of `abstract`; None without one.

        Raises:
            UserError: the checkpoint does not fit, or cannot be read.
        """
        step = self.latest
        if step is None:
            return None
        try:
            item = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()))
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"the checkpoint of step {step} in {self._manager.directory} cannot be "
                            f"restored ({reason}); use the configuration it was trained with, or "
                            "another work directory") from error
        return Restored(item.state, item.meta)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
