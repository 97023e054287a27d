"""One model's evaluation from arrays: every score mode, intervals, the modality gap, files."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.evals import gap as gaps
from brgsa_jax.evals.bootstrap import (
    Interval,
    group_patients,
    interval,
    macro_difference,
    macro_interval,
    rank_samples,
)
from brgsa_jax.evals.gap import GapSamples, Projection, distance_difference
from brgsa_jax.evals.metrics import Decisions, Ranking, call, decisions, rank_metrics, write_metrics
from brgsa_jax.evals.protocol import GIVEN, Protocol
from brgsa_jax.evals.scores import (
    all_scores,
    columns,
    join,
    read_labels,
    read_scores,
    write_all_scores,
    write_labels,
)


class Embeddings(NamedTuple):
    """Un-normalised embeddings of one model on one split.

    Attributes:
        image: v of the volumes, [N,D].
        prompts: t of the protocol's prompts, [P,D], in the order of `protocol.findings`.
        captions: t of each volume's own report, [N,D]; None leaves the modality gap out.
        image_bridged: v̂ [N,D]; None for a model without a bank.
        prompts_bridged: t̂ of the prompts, [P,D], or None.
        captions_bridged: t̂ of the reports, [N,D], or None.
    """

    image: np.ndarray
    prompts: np.ndarray
    captions: np.ndarray | None = None
    image_bridged: np.ndarray | None = None
    prompts_bridged: np.ndarray | None = None
    captions_bridged: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one model scored on one split under one protocol.

    Attributes:
        protocol: as asked.
        mode: the score judged: the protocol's, or "direct" for a model without a bank.
        ids: N volume ids.
        patients: N patient ids.
        labels: [N,P] bool in the order of `protocol.findings`.
        scores: score mode -> [N,P].
        values: score mode -> Ranking of two [P] arrays on the whole set.
        samples: score mode -> Ranking of two [R,P] arrays on the resamples.
        gaps: kind of `gap.KINDS` -> figures and samples; empty without captions.
        projections: kind -> joint plane of both modalities.
        metrics: the content of metrics.json.
    """

    protocol: Protocol
    mode: str
    ids: tuple[str, ...]
    patients: tuple[str, ...]
    labels: np.ndarray
    scores: Mapping[str, np.ndarray]
    values: Mapping[str, Ranking]
    samples: Mapping[str, Ranking]
    gaps: Mapping[str, GapSamples]
    projections: Mapping[str, Projection]
    metrics: Mapping[str, Any]

    @property
    def macro_auroc(self) -> Interval:
        """Macro AUROC of the judged score with its interval."""
        return macro_interval(self.values[self.mode].auroc, self.samples[self.mode].auroc,
                              self.protocol.level)


class Comparison(NamedTuple):
    """Paired differences, first minus second.

    Attributes:
        auroc: of the macro AUROC of the judged scores.
        distance: (kind of the first, kind of the second) -> difference of centroid distances.
    """

    auroc: Interval
    distance: dict[tuple[str, str], Interval]


def evaluate(protocol: Protocol, *, ids: Sequence[str], patients: Sequence[str],
             findings: Sequence[str], labels: np.ndarray, embeddings: Embeddings) -> Evaluation:
    """Judges one model; a pure function of its arguments.

    Args:
        protocol: findings, score, resamples and seed.
        ids: N volume ids, each once.
        patients: N patient ids.
        findings: names of the label columns, in any order and possibly more than needed.
        labels: [N,len(findings)] bool.
        embeddings: of the same N volumes, row by row, and of `protocol.prompts`.

    Returns:
        The evaluation; `.metrics` is the content of metrics.json.

    Raises:
        UserError: findings of the protocol without labels, repeated ids, fewer than two
            patients, embeddings that are not finite.
        ValueError: shapes that do not fit.
    """
    image, prompts = embeddings.image, embeddings.prompts
    missing = [name for name in protocol.findings if name not in findings]
    if missing:
        raise UserError(f"the data has no labels for {', '.join(missing[:5])}"
                        f"{' …' if len(missing) > 5 else ''}, which the protocol "
                        f"{protocol.name!r} needs; choose another protocol or label them")
    if len(prompts) != len(protocol.findings) or len(image) != len(ids):
        raise ValueError(f"{len(image)} image and {len(prompts)} prompt embeddings for "
                         f"{len(ids)} volumes and {len(protocol.findings)} findings")
    position = {name: index for index, name in enumerate(findings)}
    labels = np.asarray(labels, dtype=bool)[:, [position[name] for name in protocol.findings]]
    scores = all_scores(image, prompts, embeddings.image_bridged, embeddings.prompts_bridged)
    mode = protocol.score if protocol.score in scores else "direct"

    pairs = {}
    if embeddings.captions is not None:
        pairs["direct"] = (image, embeddings.captions)
        if embeddings.image_bridged is not None:
            if embeddings.captions_bridged is not None:
                pairs["bridged"] = (embeddings.image_bridged, embeddings.captions_bridged)
            pairs["image_bridged"] = (embeddings.image_bridged, embeddings.captions)
    measured = {kind: gaps.measure_gap(*pair, patients, resamples=protocol.resamples,
                                       seed=protocol.seed, level=protocol.level)
                for kind, pair in pairs.items()}
    projections = {kind: gaps.project(*pair) for kind, pair in pairs.items()}
    return _judge(protocol, mode, ids, patients, labels, scores, measured, projections)


def evaluate_files(scores: str | Path, labels: str | Path, *, patients: str | None = None,
                   protocol: Protocol | None = None) -> Evaluation:
    """Judges a score file of any system against a label file, joined by id.

    Args:
        scores: CSV, first column the id, the others scores.
        labels: CSV, first column the id; the columns named like the scores hold 0 or 1.
        patients: column of `labels` that names the patient; None takes every id for its own.
        protocol: whose findings are judged; None takes every score column.

    Returns:
        The evaluation, with "given" as its only score mode.

    Raises:
        UserError: unreadable tables, ids or columns that do not match.
    """
    table = read_scores(scores)
    if protocol is None:
        protocol = Protocol("score-file", table.names, score=GIVEN)
    values = columns(table, protocol.findings)
    truth = join(table, read_labels(labels, protocol.findings, patients))
    return _judge(dataclasses.replace(protocol, score=GIVEN), GIVEN, table.ids,
                  truth.patients or table.ids, truth.values, {GIVEN: values}, {}, {})


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Paired differences of two models on the same patients; rows may come in another order.

    Centroid distances are compared kind by kind; where the second model has no bank, its direct
    distance stands against every kind of the first.

    Raises:
        UserError: the two were not judged on the same volumes, findings and resamples.
    """
    same = [getattr(first.protocol, field) == getattr(second.protocol, field)
            for field in ("findings", "resamples", "seed", "level")]
    if not all(same) or (dict(zip(first.ids, first.patients, strict=True))
                         != dict(zip(second.ids, second.patients, strict=True))):
        raise UserError("two evaluations can be compared only on the same volumes, patients, "
                        "findings and resamples; evaluate both again under one protocol")
    pair = [(e.values[e.mode].auroc, e.samples[e.mode].auroc) for e in (first, second)]
    level = first.protocol.level
    distance = {}
    for kind, measured in first.gaps.items():
        other = kind if kind in second.gaps else "direct"
        if other in second.gaps:
            distance[kind, other] = distance_difference(measured, second.gaps[other], level)
    return Comparison(macro_difference((pair[0][0], pair[1][0]), (pair[0][1], pair[1][1]), level),
                      distance)


def write_evaluation(folder: str | Path, evaluation: Evaluation) -> list[Path]:
    """Writes scores.csv, scores_MODE.csv, labels.csv and metrics.json into the folder.

    Returns:
        The files written.
    """
    folder, findings = Path(folder), evaluation.protocol.findings
    files = write_all_scores(folder, evaluation.ids, findings, evaluation.scores, evaluation.mode)
    write_labels(folder / "labels.csv", evaluation.ids, findings, evaluation.labels,
                 evaluation.patients)
    write_metrics(folder / "metrics.json", evaluation.metrics)
    return [*files, folder / "labels.csv", folder / "metrics.json"]


def _judge(protocol: Protocol, mode: str, ids: Sequence[str], patients: Sequence[str],
           labels: np.ndarray, scores: Mapping[str, np.ndarray],
           measured: Mapping[str, GapSamples],
           projections: Mapping[str, Projection]) -> Evaluation:
    if len(set(ids)) != len(ids):
        repeated = next(key for key in ids if list(ids).count(key) > 1)
        raise UserError(f"the volume id {repeated!r} comes more than once; make ids unique")
    grouped = group_patients(patients)
    values, samples = {}, {}
    for name, matrix in scores.items():
        ranked = [rank_metrics(labels[:, p], matrix[:, p]) for p in range(labels.shape[1])]
        values[name] = Ranking(*(np.concatenate(part) for part in zip(*ranked, strict=True)))
        samples[name] = rank_samples(labels, matrix, patients, resamples=protocol.resamples,
                                     seed=protocol.seed)
    modes = {name: _summary(protocol, labels, values[name], samples[name]) for name in scores}
    findings = modes[mode]["findings"]
    metrics: dict[str, Any] = {
        "protocol": {"name": protocol.name, "hash": protocol.hash},
        "macro": modes[mode]["macro"],
        "findings": findings,
        "score": mode,
        "counts": {"volumes": len(ids), "patients": len(grouped.names),
                   "findings": len(protocol.findings)},
        "undefined": [name for name, entry in findings.items()
                      if not np.isfinite(entry["auroc"]["value"])],
        "bootstrap": {"unit": "patient", "resamples": protocol.resamples, "seed": protocol.seed,
                      "level": protocol.level},
        "scores": modes,
    }
    if protocol.threshold != "none":
        metrics["decisions"] = _decide(protocol, labels, scores[mode], patients)
    if measured:
        metrics["gap"] = {kind: found.gap.as_dict() for kind, found in measured.items()}
    return Evaluation(protocol, mode, tuple(ids), tuple(patients), labels, dict(scores), values,
                      samples, dict(measured), dict(projections), metrics)


def _summary(protocol: Protocol, labels: np.ndarray, values: Ranking,
             samples: Ranking) -> dict[str, Any]:
    """The "macro" and "findings" entries of metrics.json for one score mode."""
    findings = {}
    for p, name in enumerate(protocol.findings):
        auroc = interval(values.auroc[p], samples.auroc[:, p], protocol.level)
        auprc = interval(values.auprc[p], samples.auprc[:, p], protocol.level)
        findings[name] = {"auroc": auroc.as_dict(), "auprc": auprc.as_dict(),
                          "auprc_chance": float(labels[:, p].mean()),
                          "positives": int(labels[:, p].sum()),
                          "undefined_resamples": auroc.undefined}
    auroc = macro_interval(values.auroc, samples.auroc, protocol.level)
    auprc = macro_interval(values.auprc, samples.auprc, protocol.level)
    return {"macro": {"auroc": auroc.as_dict(), "auprc": auprc.as_dict(),
                      "auprc_chance": float(labels[:, np.isfinite(values.auprc)].mean(0).mean())
                      if np.isfinite(values.auprc).any() else float("nan"),
                      "partial_resamples": auroc.undefined},
            "findings": findings}


def _decide(protocol: Protocol, labels: np.ndarray, scores: np.ndarray,
            patients: Sequence[str]) -> dict[str, Any]:
    """The "decisions" entry: thresholded figures, beside a constant negative answer."""
    found: dict[str, Decisions] = {}
    for p, name in enumerate(protocol.findings):
        called = call(labels[:, p], scores[:, p], patients, protocol.threshold, protocol.seed)
        if called is not None:
            found[name] = decisions(labels[:, p], called)
    index = [protocol.findings.index(name) for name in found]
    nothing = [decisions(labels[:, p], np.zeros(len(labels), bool)) for p in index]

    def mean(rows: Sequence[Decisions]) -> dict[str, float] | None:
        return Decisions(*map(float, np.mean(rows, axis=0)))._asdict() if rows else None

    return {"rule": protocol.threshold, "optimistic": protocol.threshold == "ctclip-test",
            "macro": mean(list(found.values())), "all_negative": mean(nothing),
            "undefined": [name for name in protocol.findings if name not in found],
            "findings": {name: row._asdict() for name, row in found.items()}}
