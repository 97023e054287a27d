"""Linear probe: what a logistic regression reads from frozen embeddings with few or all labels."""

import csv
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from brgsa_jax.config import UserError, override
from brgsa_jax.data.tables import quoted
from brgsa_jax.evals.bootstrap import (
    Interval,
    group_patients,
    interval,
    macro_interval,
    rank_samples,
)
from brgsa_jax.evals.metrics import auroc, write_metrics
from brgsa_jax.evals.scores import write_atomic

FRACTIONS = (0.01, 0.1, 1.0)

# Inverse strengths of the penalty that are tried on held-out training patients, in rising order,
# so that of equals the strongest penalty is taken.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 3


class Probe(NamedTuple):
    """One share of the labels.

    Attributes:
        fraction: share of the training patients.
        patients, volumes: of training.
        positives: [P] training volumes with each finding.
        strengths: [P] chosen inverse strengths C of the penalty; NaN where all training labels of
            the finding, or all embeddings, agree. Its score is then constant, and its AUROC a half.
        macro: macro AUROC.
        findings: AUROC of each finding, P of them.
        scores: [M,P] log-odds of the test volumes.
    """

    fraction: float
    patients: int
    volumes: int
    positives: np.ndarray
    strengths: np.ndarray
    macro: Interval
    findings: tuple[Interval, ...]
    scores: np.ndarray


class ProbeResult(NamedTuple):
    """Probes of one model.

    Attributes:
        names: P findings.
        test_volumes, test_patients: numbers.
        test_positives: [P] test volumes with each finding.
        probes: one a fraction.
    """

    names: tuple[str, ...]
    test_volumes: int
    test_patients: int
    test_positives: np.ndarray
    probes: tuple[Probe, ...]

    def as_dict(self) -> dict[str, Any]:
        """The content of probe.json."""
        return {
            "test": {"volumes": self.test_volumes, "patients": self.test_patients},
            "fractions": [{
                "fraction": probe.fraction, "patients": probe.patients, "volumes": probe.volumes,
                "macro": {"auroc": probe.macro.as_dict(),
                          "partial_resamples": probe.macro.undefined},
                "findings": {name: {
                    "auroc": probe.findings[p].as_dict(), "C": float(probe.strengths[p]),
                    "train_positives": int(probe.positives[p]),
                    "test_positives": int(self.test_positives[p])}
                    for p, name in enumerate(self.names)}} for probe in self.probes]}


def linear_probe(embeddings: np.ndarray, labels: np.ndarray, patients: Sequence[str],
                 train: np.ndarray, *, names: Sequence[str] | None = None,
                 fractions: Sequence[float] = FRACTIONS, seed: int = 0, resamples: int = 1000,
                 level: float = 0.95,
                 progress: Callable[[int, int], None] | None = None) -> ProbeResult:
    """Fits a logistic regression to each finding on shares of the training patients.

    A smaller share is part of a larger one. Embeddings are standardised by the training share. The
    penalty of each finding is the one of least log loss on held-out patients of the share; with
    fewer than two patients of a kind the strongest is taken. Intervals are over test patients: how
    the figures of a small share depend on its draw shows only in other seeds.

    Args:
        embeddings: [N,D] of training and test volumes.
        labels: [N,P] bool.
        patients: N patient ids.
        train: [N] bool, True where a volume is for training.
        names: P findings; None numbers them.
        fractions: shares of the training patients, rounded up.
        seed: of the shares, the inner folds and the resamples.
        resamples: number of bootstrap resamples of test patients.
        level: coverage.
        progress: told the fits that are done and all of them.

    Returns:
        The figures.

    Raises:
        UserError: a patient in training and test, no training volume, fewer than two test patients,
            no finding, embeddings that are not finite, or a fraction outside (0, 1].
        ValueError: shapes that do not fit.
    """
    from sklearn.exceptions import ConvergenceWarning

    embeddings, train = np.asarray(embeddings), np.asarray(train, dtype=bool)
    labels, owners = np.asarray(labels, dtype=bool), np.asarray(patients, dtype=str)
    names = tuple(map(str, range(labels.shape[1]))) if names is None else tuple(names)
    if not len(embeddings) == len(labels) == len(owners) == len(train) or (
            len(names) != labels.shape[1]):
        raise ValueError(f"embeddings {embeddings.shape}, labels {labels.shape}, {len(owners)} "
                         f"patients, {len(train)} rows of the split and {len(names)} names do not "
                         "fit")
    _check(embeddings, names, owners, train, fractions)
    group_patients(owners[~train])
    members = np.random.default_rng(seed).permutation(np.unique(owners[train]))
    probes = []
    for fraction in fractions:
        share = members[:int(np.ceil(fraction * len(members) - 1e-9))]
        rows = train & np.isin(owners, share)
        mean, spread = (statistic(embeddings[rows], axis=0, dtype=np.float64)
                        for statistic in (np.mean, np.std))
        spread = np.where(spread > 1e-6 * np.maximum(np.abs(mean), 1e-30), spread, 1.0)
        x = (embeddings[rows] - mean) / spread
        codes = np.unique(owners[rows], return_inverse=True)[1]
        with warnings.catch_warnings():
            # Where Newton's method finds no step, scikit-learn goes on with lbfgs and warns.
            warnings.simplefilter("ignore", ConvergenceWarning)
            fits = []
            for p in range(len(names)):
                fits.append(_fit(x, labels[rows, p], codes, (embeddings[~train] - mean) / spread,
                                 seed))
                if progress is not None:
                    progress(len(probes) * len(names) + p + 1, len(fractions) * len(names))
        scores = np.stack([score for _, score in fits], axis=1)
        probes.append(_judge(fraction, len(share), labels, rows, np.array([c for c, _ in fits]),
                             scores, owners, ~train, resamples, seed, level))
    return ProbeResult(names, int((~train).sum()), len(np.unique(owners[~train])),
                       labels[~train].sum(0), tuple(probes))


def write_probe(folder: str | Path, result: ProbeResult, about: dict[str, Any]) -> list[Path]:
    """Writes probe.json, with the entries of `about` first, and probe.csv; returns both."""
    folder = Path(folder)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["fraction", "train_patients", "train_volumes", "finding", "auroc", "low",
                     "high", "train_positives", "test_positives", "C"])
    for probe in result.probes:
        about_share = [f"{probe.fraction:g}", probe.patients, probe.volumes]
        writer.writerow([*about_share, "macro", *map(_cell, probe.macro[:3]), "", "", ""])
        for p, name in enumerate(result.names):
            writer.writerow([*about_share, quoted(name), *map(_cell, probe.findings[p][:3]),
                             int(probe.positives[p]), int(result.test_positives[p]),
                             _cell(probe.strengths[p])])
    files = [folder / "probe.json", folder / "probe.csv"]
    write_metrics(files[0], {**about, **result.as_dict()})
    write_atomic(files[1], buffer.getvalue())
    return files


class Backbone:
    """The image tower of a `model.Model` without projection, as `run.embed_volumes` takes it.

    Attributes:
        config: the model's, with the tower's width and no head, so that a cache of embeddings
            keeps the two apart.
    """

    def __init__(self, model: Any) -> None:
        network = model.network

        def pooled(params: Any, stats: Any, volumes: jax.Array) -> jax.Array:
            return network.vision.apply(params["vision"], network.normalize(volumes),
                                        stats=stats.get("vision")).pooled

        self._pooled = jax.jit(pooled)
        self.shape, self.params, self.stats = model.shape, model.params, model.stats
        self.bank, self.tokenizer = model.bank, model.tokenizer
        example = jax.ShapeDtypeStruct((1, *model.shape), np.int16)
        width = jax.eval_shape(pooled, model.params, model.stats, example).shape[-1]
        self.config = override(model.config, {"head.name": "none", "embed_dim": width})

    def encode_volume(self, volumes: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Returns [B, W] float32 of a batch as it comes; `batch_size` is its own."""
        return np.asarray(self._pooled(self.params, self.stats, volumes), np.float32)


def _check(embeddings: np.ndarray, names: Sequence[str], owners: np.ndarray, train: np.ndarray,
           fractions: Sequence[float]) -> None:
    if not len(names):
        raise UserError("there is no finding to probe; give labels of at least one")
    if not np.isfinite(embeddings).all():
        raise UserError("embeddings to probe are not finite; the model has diverged, so use an "
                        "earlier checkpoint")
    wrong = [fraction for fraction in fractions if not 0 < fraction <= 1]
    if wrong or not len(fractions):
        raise UserError(f"{', '.join(map(str, wrong)) or 'nothing'} is no share of the labels; "
                        "give fractions above 0 and up to 1, such as 0.01,0.1,1")
    if not train.any():
        raise UserError("there is no volume to train the probe on; give a data set with a train "
                        "split")
    both = sorted(set(owners[train]) & set(owners[~train]))
    if both:
        raise UserError(f"{len(both)} of the patients are in training and test, {str(both[0])!r} "
                        "for one; split by patient")


def _regression(x: np.ndarray, **options: Any) -> Any:
    from sklearn.linear_model import LogisticRegression

    # One optimum by either; Newton's steps are dear where embeddings are wide.
    solver = "newton-cholesky" if x.shape[1] <= 64 else "lbfgs"
    return LogisticRegression(solver=solver, max_iter=2000, **options)


def _fit(x: np.ndarray, y: np.ndarray, owners: np.ndarray, test: np.ndarray,
         seed: int) -> tuple[float, np.ndarray]:
    """The chosen strength and the log-odds of `test`, for x[n,D], y[n] bool and patient codes."""
    if y.all() or not y.any() or not x.any():
        return float("nan"), np.zeros(len(test))
    strength = _strength(x, y, owners, seed)
    model = _regression(x, C=strength).fit(x, y)
    return strength, model.decision_function(test).astype(np.float64)


def _strength(x: np.ndarray, y: np.ndarray, owners: np.ndarray, seed: int) -> float:
    """The strength of least log loss on held-out patients."""
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(FOLDS, len(np.unique(owners[y])), len(np.unique(owners[~y])))
    if folds < 2:
        return STRENGTHS[0]
    loss = np.zeros(len(STRENGTHS))
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for rows, held in split.split(x, y, owners):
        if y[rows].all() or not y[rows].any():
            continue
        model = _regression(x, warm_start=True)
        for index, strength in enumerate(STRENGTHS):
            model.set_params(C=strength).fit(x[rows], y[rows])
            loss[index] += log_loss(y[held], model.predict_proba(x[held])[:, 1],
                                    labels=[False, True], normalize=False)
    return STRENGTHS[int(np.argmin(loss))]


def _judge(fraction: float, members: int, labels: np.ndarray, rows: np.ndarray,
           strengths: np.ndarray, scores: np.ndarray, owners: np.ndarray, test: np.ndarray,
           resamples: int, seed: int, level: float) -> Probe:
    truth = labels[test]
    samples = rank_samples(truth, scores, owners[test], resamples=resamples, seed=seed).auroc
    values = np.array([auroc(truth[:, p], scores[:, p]) for p in range(truth.shape[1])])
    return Probe(float(fraction), members, int(rows.sum()), labels[rows].sum(0), strengths,
                 macro_interval(values, samples, level),
                 tuple(interval(value, samples[:, p], level) for p, value in enumerate(values)),
                 scores)


def _cell(value: float) -> str:
    return f"{value:.6g}" if np.isfinite(value) else ""
