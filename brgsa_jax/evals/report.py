"""The evaluation report: one HTML file that needs nothing but a browser.

The caller hands over evaluations; every number, interval and picture on the page is taken or
drawn from them here. Text of unknown origin (ids, names, notes) is escaped by the template and
by `charts.element`; the page forbids scripts and network by its own content security policy.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.evals import charts
from brgsa_jax.evals import report_embeddings as embeddings
from brgsa_jax.evals import report_scores as scores
from brgsa_jax.evals.evaluate import Evaluation, compare
from brgsa_jax.evals.protocol import Protocol
from brgsa_jax.evals.protocol_checks import CLASSIFIER, GIVEN
from brgsa_jax.evals.report_scores import Shown, scale
from brgsa_jax.evals.report_text import estimate, render_template
from brgsa_jax.evals.scores import write_atomic


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """One model of the report.

    Attributes:
        name: short and unique, e.g. "brgsa".
        label: as shown, e.g. "BrgSA".
        evaluation: what `evaluate` returned, on the same volumes for every model.
        history: rows of metrics.jsonl, each with "step" and numbers such as "loss"; empty for a
            model that was not trained.
        untrained: drawn in grey, as the level the others start from.
        probe: the content of probe.json, see `probe.ProbeResult.as_dict`; None shows no probe.
    """

    name: str
    label: str
    evaluation: Evaluation
    history: Sequence[Mapping[str, Any]] = ()
    untrained: bool = False
    probe: Mapping[str, Any] | None = None


class RankedFinding(NamedTuple):
    """A finding among the model's first: how far its score stands out, and the truth."""

    name: str
    deviations: float
    present: bool


@dataclasses.dataclass(frozen=True)
class SampleCase:
    """One volume shown in the report; made by `sample_case`.

    Attributes:
        id: volume id.
        picture: PNG bytes, e.g. of `volume_picture`.
        top: the model's first findings, most outstanding first.
        truth: names of all findings present.
        overlays: finding -> PNG bytes of its heat-map over the volume, e.g. of `heatmap.overlay`.
    """

    id: str
    picture: bytes
    top: tuple[RankedFinding, ...]
    truth: tuple[str, ...]
    overlays: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def missed(self) -> tuple[str, ...]:
        """Findings that are present and not among the model's first."""
        named = {finding.name for finding in self.top}
        return tuple(name for name in self.truth if name not in named)


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything the page shows.

    Attributes:
        title: of the page.
        models: the first is the one reported on, the others are set beside it. All must have
            been judged on the same volumes under the same protocol.
        dataset: one line, e.g. "phantom chest CT, 64×64×32 at 6×6×12 mm, split test".
        phantom: True writes that these are phantom patients, not real ones.
        samples: volumes to show, see `choose_samples` and `sample_case`.
        environment: name -> value, see `describe_environment`.
        date: ISO date of the evaluation; None takes today's.
        notes: sentences for the section on method.
    """

    title: str
    models: Sequence[ModelResult]
    dataset: str
    phantom: bool = False
    samples: Sequence[SampleCase] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    date: str | None = None
    notes: Sequence[str] = ()


def headline(evaluation: Evaluation) -> str:
    """One line for the terminal, e.g. "macro AUROC 0.873 (0.851–0.894)"."""
    return f"macro AUROC {estimate(evaluation.macro_auroc)}"


def describe_environment(**extra: str) -> dict[str, str]:
    """Versions and machine for the report, without host names or paths.

    Args:
        **extra: more entries, e.g. devices="1 × NVIDIA H200"; `_` in a name shows as a space.
    """
    found = {"Python": platform.python_version()}
    for package in ("brgsa-jax", "jax", "flax", "numpy", "scikit-learn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["System"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    return found | {name.replace("_", " "): value for name, value in extra.items()}


def choose_samples(evaluation: Evaluation, count: int = 4) -> tuple[str, ...]:
    """Returns ids drawn by a hash of the id, so that nobody picks the cases that look good."""
    by_hash = sorted(evaluation.ids, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return tuple(by_hash[:count])


def sample_case(evaluation: Evaluation, volume_id: str, picture: bytes,
                top: int = 5) -> SampleCase:
    """Pairs a picture with the model's first findings and the truth.

    Cosines of different prompts are not comparable, so findings are ordered by how many standard
    deviations the score lies above that finding's mean over the evaluated volumes.

    Args:
        evaluation: of the model reported on.
        volume_id: one of `evaluation.ids`.
        picture: PNG bytes.
        top: how many findings to name.

    Raises:
        UserError: the id was not evaluated.
    """
    if volume_id not in evaluation.ids:
        raise UserError(f"the volume {volume_id!r} was not evaluated; choose samples among the "
                        f"{len(evaluation.ids)} evaluated ids")
    row = evaluation.ids.index(volume_id)
    judged = evaluation.scores[evaluation.mode]
    spread = judged.std(axis=0)
    outstanding = (judged[row] - judged.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    names, present = evaluation.protocol.findings, evaluation.labels[row]
    first = np.argsort(-outstanding, kind="stable")[:top]
    return SampleCase(
        volume_id, picture,
        tuple(RankedFinding(names[p], float(outstanding[p]), bool(present[p])) for p in first),
        tuple(name for name, is_there in zip(names, present, strict=True) if is_there))


def write_report(path: str | Path, data: ReportData) -> Path:
    """Writes the page whole or not at all.

    Returns:
        The path.

    Raises:
        UserError: no model, repeated names, or models judged on different volumes.
    """
    path = Path(path)
    write_atomic(path, render(data))
    return path


def render(data: ReportData) -> str:
    """Returns the page as text; raises as `write_report`."""
    if not data.models:
        raise UserError("a report needs at least one model; hand over its evaluation")
    names = [model.name for model in data.models]
    if len(set(names)) != len(names):
        raise UserError(f"the models of a report need different names, these are "
                        f"{', '.join(names)}")
    return render_template("report.html", _page(data))


def _page(data: ReportData) -> dict[str, Any]:
    """Everything the template places, computed; the template holds no arithmetic."""
    colours = iter(f"m{index % 4}" for index in range(len(data.models)))
    shown = [Shown("mu" if model.untrained else next(colours), model.label, model,
                   model.evaluation) for model in data.models]
    main, others = shown[0], shown[1:]
    comparisons = [(other, compare(main.evaluation, other.evaluation)) for other in others]
    macros = [model.evaluation.macro_auroc for model in shown]
    ends = scale([bound for found in macros for bound in (found.value, found.low, found.high)])
    protocol, metrics = main.evaluation.protocol, main.evaluation.metrics
    page = {
        "data": data, "main": main, "models": shown, "protocol": protocol,
        "counts": metrics["counts"], "size": _size(metrics),
        "date": data.date or datetime.date.today().isoformat(),
        "level": f"{100 * protocol.level:g}%",
        "headline": [
            {"shown": model, "macro": found,
             "strip": charts.strip([charts.Mark(model.css, *found[:3])], *ends)}
            for model, found in zip(shown, macros, strict=True)],
        "headline_axis": charts.strip_axis(*ends),
        "differences": [(other, found.auroc) for other, found in comparisons],
        **scores.findings(shown), **scores.curves(shown),
        "difference_tables": scores.difference_tables(main, comparisons),
        "decisions": scores.decisions(shown), "calibration": scores.calibration(shown),
        "all_negative": metrics["all_negative"]["macro"],
        "modes": scores.modes(shown), "mode_formulas": scores.MODE_FORMULAS,
        **embeddings.gaps(shown), "retrieval": embeddings.retrieval(shown),
        "gap_differences": embeddings.gap_differences(main, comparisons),
        "projections": embeddings.projections(shown), "probe": embeddings.probe(shown),
        "localisation": embeddings.localisation(main), "training": embeddings.training(shown),
        "method": _method(data, main), "prompts": _prompts(protocol),
    }
    shown_parts = {"samples": data.samples, "method": True} | page
    page["sections"] = [(name, title) for name, key, title in _SECTIONS if shown_parts[key]]
    return page


# Anchor, what must not be empty for the section to be there, and its name in the list of contents.
_SECTIONS = (("findings", "findings", "Findings"), ("curves", "rocs", "Curves"),
             ("decisions", "decisions", "Decisions"), ("calibration", "calibration", "Calibration"),
             ("modes", "modes", "Ways to score"), ("retrieval", "retrieval", "Retrieval"),
             ("gap", "gaps", "Modality gap"), ("probe", "probe", "Linear probe"),
             ("localisation", "localisation", "Localisation"), ("training", "training", "Training"),
             ("cases", "samples", "Sample patients"), ("method", "method", "Method"))


def _size(metrics: Mapping[str, Any]) -> str:
    """Volumes, scans where they are told apart, and patients."""
    counts = metrics["counts"] | {key: metrics["data"][key] for key in ("volumes", "scans")
                                  if key in metrics.get("data", {})}
    named = [f"{counts[key]:,} {key[:-1] if counts[key] == 1 else key}"
             for key in ("volumes", "scans", "patients") if key in counts]
    return " of ".join(named)


def _method(data: ReportData, main: Shown) -> list[tuple[str, str]]:
    """Name and value of everything that must be known to repeat or compare the numbers."""
    found, protocol = main.evaluation, main.evaluation.protocol
    metrics, macro = found.metrics, found.metrics["macro"]
    excluded = metrics.get("data", {}).get("excluded", protocol.exclude)
    rows = [
        ("Protocol", f"{protocol.name}, version {protocol.version}, hash {protocol.hash}"),
        ("Source", protocol.source),
        ("Data", f"{data.dataset}{' (phantom patients, not real ones)' if data.phantom else ''}; "
                 f"{_size(metrics)}"),
        ("Split", protocol.split if protocol.score != GIVEN else ""),
        ("Label mapping", protocol.labels or "none: the labels of the data set by their names"),
        ("Volumes left out", f"{len(excluded):,} by the protocol" if excluded else "none"),
        ("Reconstructions", _RECONSTRUCTIONS[protocol.reconstructions]),
        ("Prompt", protocol.wording if protocol.score != CLASSIFIER else ""),
        ("Score", f"{found.mode.replace('_', ' ')}: {scores.MODE_FORMULAS[found.mode]}"
                  + ("; a model without a bank is judged by its direct score"
                     if found.mode not in (GIVEN, CLASSIFIER) else "")),
        ("Thresholds", protocol.rule),
        ("Intervals", f"{100 * protocol.level:g}% percentile bootstrap, {protocol.resamples:,} "
                      f"resamples of patients, seed {protocol.seed}, shared by all findings and "
                      "models; the interval of a mean is that of the mean in each resample"),
        ("Rare findings", f"{macro['partial_resamples']:,} of {protocol.resamples:,} resamples "
                          "lacked positives of at least one finding, which was then left out of "
                          "that resample's mean")]
    return [(name, value) for name, value in rows if value]


_RECONSTRUCTIONS = {"all": "all volumes of a scan count by themselves",
                    "first": "the first volume of each scan",
                    "mean": "the mean score of the volumes of each scan"}


def _prompts(protocol: Protocol) -> list[dict[str, Any]]:
    """The sentences that were encoded for each finding; none where no text was."""
    if protocol.score in (GIVEN, CLASSIFIER):
        return []
    return [{"name": name, "positive": positive, "negative": negative}
            for name, positive, negative in zip(protocol.findings, protocol.positive,
                                                protocol.negative, strict=True)]
