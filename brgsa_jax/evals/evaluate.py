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
    macro_interval,
    paired_macro,
    rank_samples,
    reversed_share,
)
from brgsa_jax.evals.calibration import judge_calibration
from brgsa_jax.evals.delong import DeLong, delong, delong_test
from brgsa_jax.evals.gap import GapSamples, Projection, distance_difference
from brgsa_jax.evals.metrics import Ranking, macro, rank_metrics, write_findings, write_metrics
from brgsa_jax.evals.protocol import Protocol
from brgsa_jax.evals.retrieval import judge_retrieval
from brgsa_jax.evals.scans import pool
from brgsa_jax.evals.scores import (
    protocol_scores,
    write_all_scores,
    write_labels,
)
from brgsa_jax.evals.thresholds import all_negative, judge_decisions


class Embeddings(NamedTuple):
    """Un-normalised embeddings of one model on one split.

    Attributes:
        image: v of the volumes, [N,D].
        prompts: t of `protocol.texts`, [T,D].
        captions: t of each volume's own report, [N,D]; None leaves the modality gap out.
        image_bridged: v̂ [N,D]; None for a model without a bank.
        prompts_bridged: t̂ of the prompts, [T,D], or None.
        captions_bridged: t̂ of the reports, [N,D], or None.
        caption_codes: N codes, equal where the captions say the same; None takes captions of the
            same findings for equal.
    """

    image: np.ndarray
    prompts: np.ndarray
    captions: np.ndarray | None = None
    image_bridged: np.ndarray | None = None
    prompts_bridged: np.ndarray | None = None
    captions_bridged: np.ndarray | None = None
    caption_codes: Sequence | None = None


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


class Difference(NamedTuple):
    """A paired difference, first minus second.

    Attributes:
        interval: over resamples of patients.
        reversed_share: see `bootstrap.reversed_share`.
        delong: of a single finding's AUROC, which takes volumes for independent; else None.
    """

    interval: Interval
    reversed_share: float
    delong: DeLong | None = None

    def as_dict(self) -> dict[str, Any]:
        """The numbers under the names of metrics.json."""
        found = self.interval.as_dict() | {"reversed_share": self.reversed_share}
        return found if self.delong is None else found | {"delong": self.delong.as_dict()}


class Comparison(NamedTuple):
    """Paired differences, first minus second.

    Attributes:
        auroc: of the macro AUROC of the judged scores.
        distance: (kind of the first, kind of the second) -> difference of centroid distances.
        macro: "auroc" and "auprc" -> difference of the macro means.
        findings: finding -> difference of its AUROC.
    """

    auroc: Interval
    distance: dict[tuple[str, str], Interval]
    macro: dict[str, Difference]
    findings: dict[str, Difference]

    def as_dict(self) -> dict[str, Any]:
        """The entry "comparison" of metrics.json."""
        return {"macro": {name: found.as_dict() for name, found in self.macro.items()},
                "findings": {name: {"auroc": found.as_dict()}
                             for name, found in self.findings.items()}}


def evaluate(protocol: Protocol, *, ids: Sequence[str], patients: Sequence[str],
             findings: Sequence[str], labels: np.ndarray, embeddings: Embeddings) -> Evaluation:
    """Judges one model; a pure function of its arguments.

    Args:
        protocol: findings, score, resamples and seed.
        ids: N volume ids, each once.
        patients: N patient ids.
        findings: names of the label columns, in any order and possibly more than needed.
        labels: [N,len(findings)] bool.
        embeddings: of the same N volumes, row by row, and of `protocol.texts`.

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
    if len(prompts) != len(protocol.texts) or len(image) != len(ids):
        raise ValueError(f"{len(image)} image and {len(prompts)} prompt embeddings for "
                         f"{len(ids)} volumes and {len(protocol.texts)} prompts")
    position = {name: index for index, name in enumerate(findings)}
    everything = np.asarray(labels, dtype=bool)
    labels = everything[:, [position[name] for name in protocol.findings]]
    scores = protocol_scores(protocol, embeddings)
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
    found = judge(protocol, mode, ids, patients, labels, scores, measured, projections)
    if embeddings.captions is not None:
        found.metrics["retrieval"] = judge_retrieval(protocol, mode, embeddings, everything, labels,
                                                     patients)
    return found


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
    row = {key: index for index, key in enumerate(second.ids)}
    order = [row[key] for key in first.ids]
    if (first.labels != second.labels[order]).any():
        raise UserError("two evaluations can be compared only on the same labels; evaluate both "
                        "again with one label file")
    level = first.protocol.level
    pair = [(e.values[e.mode], e.samples[e.mode]) for e in (first, second)]

    def difference(figure: str, picked: Any, tested: DeLong | None = None) -> Difference:
        values, samples = (tuple(getattr(one[k], figure)[..., picked] for one in pair)
                           for k in (0, 1))
        paired = paired_macro(values, samples)
        return Difference(paired.interval(level), reversed_share(paired.value, paired.samples),
                          tested)

    macro = {figure: difference(figure, slice(None)) for figure in Ranking._fields}
    scores = first.scores[first.mode], second.scores[second.mode][order]
    findings = {name: difference("auroc", [p], delong_test(
        first.labels[:, p], scores[0][:, p], scores[1][:, p], level))
        for p, name in enumerate(first.protocol.findings)}
    distance = {}
    for kind, measured in first.gaps.items():
        other = kind if kind in second.gaps else "direct"
        if other in second.gaps:
            distance[kind, other] = distance_difference(measured, second.gaps[other], level)
    return Comparison(macro["auroc"].interval, distance, macro, findings)


def write_evaluation(folder: str | Path, evaluation: Evaluation) -> list[Path]:
    """Writes scores.csv, scores_MODE.csv, labels.csv, metrics.json and metrics.csv into the folder.

    Returns:
        The files written.
    """
    folder, findings = Path(folder), evaluation.protocol.findings
    files = write_all_scores(folder, evaluation.ids, findings, evaluation.scores, evaluation.mode)
    write_labels(folder / "labels.csv", evaluation.ids, findings, evaluation.labels,
                 evaluation.patients)
    return [*files, folder / "labels.csv", *write_judged(folder, evaluation)]


def write_judged(folder: str | Path, evaluation: Evaluation) -> list[Path]:
    """Writes metrics.json and metrics.csv into the folder; returns the two files."""
    files = [Path(folder) / "metrics.json", Path(folder) / "metrics.csv"]
    write_metrics(files[0], evaluation.metrics)
    write_findings(files[1], evaluation.metrics)
    return files


def judge(protocol: Protocol, mode: str, ids: Sequence[str], patients: Sequence[str],
          labels: np.ndarray, scores: Mapping[str, np.ndarray],
          measured: Mapping[str, GapSamples], projections: Mapping[str, Projection], *,
          calibrated: bool = True) -> Evaluation:
    """Judges scores, however they were made.

    Args:
        protocol: findings, threshold, groups, resamples and seed.
        mode: the entry of `scores` that is judged.
        ids, patients: N of each.
        labels: [N,P] bool in the order of `protocol.findings`.
        scores: score mode -> [N,P].
        measured, projections: as `Evaluation.gaps` and `.projections`; may be empty.
        calibrated: False leaves "calibration" out of metrics.json, and scikit-learn with it.

    Raises:
        UserError: repeated ids, fewer than two patients, scores that are not finite.
    """
    if len(set(ids)) != len(ids):
        repeated = next(key for key in ids if list(ids).count(key) > 1)
        raise UserError(f"the volume id {repeated!r} comes more than once; make ids unique")
    for name, matrix in scores.items():
        bad = np.argwhere(~np.isfinite(matrix))
        if len(bad):
            row, column = bad[0]
            raise UserError(f"the score {name!r} of {ids[row]!r} for {protocol.findings[column]!r} "
                            f"is not finite ({len(bad)} in all); leave those volumes out")
    ids, patients, labels, scores = pool(protocol, ids, patients, labels, scores)
    grouped = group_patients(patients)
    values, samples = {}, {}
    for name, matrix in scores.items():
        ranked = [rank_metrics(labels[:, p], matrix[:, p]) for p in range(labels.shape[1])]
        values[name] = Ranking(*(np.concatenate(part) for part in zip(*ranked, strict=True)))
        samples[name] = rank_samples(labels, matrix, patients, resamples=protocol.resamples,
                                     seed=protocol.seed)
    modes = {name: _summary(protocol, labels, values[name], samples[name]) for name in scores}
    findings = {name: entry | {"delong": delong(labels[:, p], scores[mode][:, p],
                                                protocol.level).as_dict()}
                for p, (name, entry) in enumerate(modes[mode]["findings"].items())}
    metrics: dict[str, Any] = {
        "protocol": {"name": protocol.name, "hash": protocol.hash},
        "macro": modes[mode]["macro"],
        "groups": _groups(protocol, labels, values[mode], samples[mode]),
        "findings": findings,
        "all_negative": all_negative(protocol.findings, labels),
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
        metrics["decisions"] = judge_decisions(protocol, labels, scores[mode], patients)
    if calibrated:
        metrics["calibration"] = judge_calibration(protocol, labels, scores[mode], patients)
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
        prevalence = float(labels[:, p].mean())
        findings[name] = {"auroc": auroc.as_dict(), "auprc": auprc.as_dict(),
                          "auprc_chance": prevalence, "prevalence": prevalence,
                          "positives": int(labels[:, p].sum()),
                          "undefined_resamples": auroc.undefined}
    return {"macro": _macro(labels, values, samples, protocol.level), "findings": findings}


def _macro(labels: np.ndarray, values: Ranking, samples: Ranking, level: float) -> dict[str, Any]:
    auroc = macro_interval(values.auroc, samples.auroc, level)
    auprc = macro_interval(values.auprc, samples.auprc, level)
    return {"auroc": auroc.as_dict(), "auprc": auprc.as_dict(),
            "auprc_chance": macro(np.where(np.isfinite(values.auprc), labels.mean(0), np.nan)),
            "partial_resamples": auroc.undefined}


def _groups(protocol: Protocol, labels: np.ndarray, values: Ranking,
            samples: Ranking) -> dict[str, Any]:
    """The macro means over each of the protocol's groups of findings."""
    found = {}
    for group, names in protocol.groups.items():
        index = [protocol.findings.index(name) for name in names]
        found[group] = _macro(labels[:, index], Ranking(*(part[index] for part in values)),
                              Ranking(*(part[:, index] for part in samples)),
                              protocol.level) | {"findings": list(names)}
    return found
