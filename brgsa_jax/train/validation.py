"""What a run knows of the split "valid" while it trains: the loss, and AUROC of some volumes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from brgsa_jax.config import UserError, classifies
from brgsa_jax.data import feed
from brgsa_jax.data import tokenizer as tok
from brgsa_jax.data.labelled import UNKNOWN, Part, open_labelled, patients_in_order
from brgsa_jax.evals.metrics import auroc, macro
from brgsa_jax.evals.scores import score_matrix
from brgsa_jax.train.step import Training, TrainState


def validate(config: Any, training: Training, state: TrainState, tokenizer: tok.Tokenizer,
             stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Makes one validation.

    Args:
        config: whole configuration.
        training: of the run.
        state: as it is now.
        tokenizer: of the text tower.
        stop: asked before every batch whether to end here.

    Returns:
        `validation_loss`, a scalar on the devices, and with `train.eval_volumes` `valid_auroc`;
        None where `stop` ended it.
    """
    source = validation_split(config)
    losses = []
    for batch in _batches(source, config, tokenizer):
        if stop():
            return None
        losses.append(training.eval_step(state, training.place(batch))["loss"])
    found = {"validation_loss": jnp.mean(jnp.stack(losses))}
    if config.train.get("eval_volumes", 0):
        area = _area(cases_to_score(source, config), config, training, state, tokenizer, stop)
        if area is None:
            return None
        found["valid_auroc"] = area
    return found


def check_validation(config: Any) -> None:
    """Refuses validations that cannot be made, before anything is trained.

    Raises:
        UserError: see `validation_split` and `cases_to_score`.
    """
    source = validation_split(config)
    if config.train.get("eval_volumes", 0):
        cases_to_score(source, config)


def validation_split(config: Any) -> Any:
    """Opens the split "valid".

    Raises:
        UserError: it is missing, or holds less than one batch.
    """
    source = open_labelled(config, "valid")
    if len(source) < config.data.batch_size:
        raise UserError(f"the split valid of {config.data.path} holds {len(source)} volumes, less "
                        f"than one batch of {config.data.batch_size}; lower data.batch_size, or "
                        "set train.eval_every=0")
    return source


class Cases(NamedTuple):
    """Volumes to score while training, and what is known of them.

    Attributes:
        volumes: N of them.
        names: P findings that some have and some have not.
        labels: int8 [N, P], -1 for unknown.
    """

    volumes: Part
    names: tuple[str, ...]
    labels: np.ndarray


def cases_to_score(source: Any, config: Any) -> Cases:
    """Chooses `train.eval_volumes` volumes by the seed, or so many more that patients are whole.

    Args:
        source: the split "valid".
        config: whole configuration.

    Raises:
        UserError: no finding is there in some of the volumes and not in others.
    """
    rank = {patient: place for place, patient in enumerate(patients_in_order(
        (row.patient for row in source.index), config.seed))}
    ranks = [rank[row.patient] for row in source.index]
    last = sorted(ranks)[min(config.train.eval_volumes, len(ranks)) - 1]
    chosen = [position for position, place in enumerate(ranks) if place <= last]
    if classifies(config):
        names, labels = tuple(config.model.classes), source.labels[chosen]
    else:
        rows = [source.index[position].findings for position in chosen]
        names = tuple(sorted({name for row in rows for name in row}))
        labels = np.array([[name in row for name in names] for row in rows], np.int8)
    judged = np.flatnonzero((labels == 1).any(0) & (labels == 0).any(0))
    if not len(judged):
        raise UserError(f"no finding is in some of the {len(chosen)} volumes that "
                        f"train.eval_volumes={config.train.eval_volumes} takes of the split valid "
                        f"of {config.data.path} and not in others; raise it, or set it to 0")
    return Cases(Part(source, chosen), tuple(names[p] for p in judged), labels[:, judged])


def _area(cases: Cases, config: Any, training: Training, state: TrainState,
          tokenizer: tok.Tokenizer, stop: Callable[[], bool]) -> float | None:
    """Macro AUROC of the weights to export: of a classifier's, else of zero-shot scores."""
    count, size = len(cases.volumes), config.data.batch_size
    # A last short batch is filled up, so that nothing else is compiled for it.
    filled = Part(cases.volumes, [*range(count), *[count - 1] * (-count % size)])
    parts = []
    for batch in _batches(filled, config, tokenizer):
        if stop():
            return None
        volumes = batch._replace(ids=None, mask=None, words=None, groups=None, labels=None)
        parts.append(jax.device_get(training.encode(state, training.place(volumes))))
    image, bridged, logits = (
        None if rows[0] is None else np.concatenate(rows)[:count] for rows in (
            [getattr(part, name) for part in parts]
            for name in ("image", "image_bridged", "logits")))
    if classifies(config):
        scores = logits[:, [config.model.classes.index(name) for name in cases.names]]
    else:
        text = _encode_texts(tok.sentences_of(cases.names), config, training, state, tokenizer)
        scores = score_matrix(image, text, bridged, mode="direct" if bridged is None else "mean")
    known = cases.labels != UNKNOWN
    return macro(np.array([auroc(label[k] == 1, score[k]) for label, score, k in zip(
        cases.labels.T, scores.T, known.T, strict=True)]))


def _encode_texts(texts: Sequence[str], config: Any, training: Training, state: TrainState,
                  tokenizer: tok.Tokenizer) -> np.ndarray:
    """Encodes texts to [T, D], in batches of the size that everything is compiled for."""
    size = config.data.batch_size
    ids, mask = tokenizer([*texts, *[texts[-1]] * (-len(texts) % size)])
    local = size // jax.process_count()
    parts = []
    for start in range(jax.process_index() * local, len(ids), size):
        rows = slice(start, start + local)
        batch = training.place(feed.HostBatch(None, ids[rows], mask[rows], None, None))
        parts.append(jax.device_get(training.encode(state, batch)).text)
    return np.concatenate(parts)[:len(texts)]



def _batches(source: Any, config: Any, tokenizer: tok.Tokenizer) -> Any:
    return feed.eval_batches(source, config.data, tokenizer, process_index=jax.process_index(),
                             process_count=jax.process_count())
