"""The evaluation report: one HTML file that needs nothing but a browser.

The caller hands over evaluations; every number, interval and picture on the page is taken or
drawn from them here. Text of unknown origin (ids, names, notes) is escaped by the template and
by `charts.element`; the page forbids scripts and network by its own content security policy.
"""

import base64
import dataclasses
import datetime
import hashlib
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.evals import charts
from brgsa_jax.evals.bootstrap import Interval
from brgsa_jax.evals.evaluate import Evaluation, compare
from brgsa_jax.evals.gap import distance_difference
from brgsa_jax.evals.metrics import roc_curve
from brgsa_jax.evals.scores import write_atomic

MODE_FORMULAS = {"direct": "cos(v, t)", "bridged": "cos(v̂, t̂)", "image_bridged": "cos(v̂, t)",
                 "text_bridged": "cos(v, t̂)", "mean": "½ cos(v, t) + ½ cos(v̂, t)",
                 "given": "as read from the file"}
KIND_FORMULAS = {"direct": "v, t", "bridged": "v̂, t̂", "image_bridged": "v̂, t"}

# Numbers of a log row that are bookkeeping rather than a training curve.
_BOOKKEEPING = ("step", "epoch", "time", "sec", "samples", "examples", "mfu", "throughput", "eta",
                "memory", "wait", "flops", "rate", "seed")


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
    """

    name: str
    label: str
    evaluation: Evaluation
    history: Sequence[Mapping[str, Any]] = ()
    untrained: bool = False


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
    """

    id: str
    picture: bytes
    top: tuple[RankedFinding, ...]
    truth: tuple[str, ...]

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
    return f"macro AUROC {_estimate(evaluation.macro_auroc)}"


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
    scores = evaluation.scores[evaluation.mode]
    spread = scores.std(axis=0)
    outstanding = (scores[row] - scores.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
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
    import jinja2

    if not data.models:
        raise UserError("a report needs at least one model; hand over its evaluation")
    names = [model.name for model in data.models]
    if len(set(names)) != len(names):
        raise UserError(f"the models of a report need different names, these are "
                        f"{', '.join(names)}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=_number, estimate=_estimate, signed=_signed,
                               span=_span, percent=_percent, png=_png)
    return environment.get_template("report.html").render(_page(data))


class _Shown(NamedTuple):
    """A model with the colour class it is drawn in."""

    css: str
    label: str
    model: ModelResult
    evaluation: Evaluation


def _page(data: ReportData) -> dict[str, Any]:
    """Everything the template places, computed; the template holds no arithmetic."""
    colours = iter(f"m{index % 4}" for index in range(len(data.models)))
    shown = [_Shown("mu" if model.untrained else next(colours), model.label, model,
                    model.evaluation) for model in data.models]
    main, others = shown[0], shown[1:]
    comparisons = [(other, compare(main.evaluation, other.evaluation)) for other in others]
    macros = [model.evaluation.macro_auroc for model in shown]
    scale = _scale([bound for found in macros for bound in (found.value, found.low, found.high)])
    protocol = main.evaluation.protocol
    counts = main.evaluation.metrics["counts"]
    return {
        "data": data, "main": main, "models": shown, "protocol": protocol, "counts": counts,
        "date": data.date or datetime.date.today().isoformat(),
        "level": f"{100 * protocol.level:g}%",
        "mode_formula": MODE_FORMULAS[main.evaluation.mode],
        "headline": [
            {"shown": model, "macro": found,
             "strip": charts.strip([charts.Mark(model.css, *found[:3])], *scale, height=22)}
            for model, found in zip(shown, macros, strict=True)],
        "headline_axis": charts.strip_axis(*scale),
        "differences": [(other, found.auroc) for other, found in comparisons],
        "undefined": main.evaluation.metrics["undefined"],
        **_findings(shown),
        "modes": _modes(shown), "mode_formulas": MODE_FORMULAS,
        "gaps": _gaps(shown), "gap_differences": _gap_differences(main, comparisons),
        "projections": _projections(shown),
        "curves": _curves(shown),
    }


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """A round AUROC scale that holds all values and the chance level."""
    finite = [value for value in values if math.isfinite(value)] or [0.5]
    return (min(0.4, math.floor(min(finite) * 10) / 10), 1.0)


def _findings(shown: Sequence[_Shown]) -> dict[str, Any]:
    """The table of findings and the ROC plots."""
    main = shown[0]
    rows, plots, bounds = [], [], []
    for p, name in enumerate(main.evaluation.protocol.findings):
        entries = [model.evaluation.metrics["findings"][name] for model in shown]
        marks = [charts.Mark(model.css, *(entry["auroc"][key] for key in ("value", "low", "high")))
                 for model, entry in zip(shown, entries, strict=True)]
        bounds += [marks[0].low, *(mark.value for mark in marks)]
        rows.append({"name": name, "marks": marks, "entry": entries[0],
                     "others": [entry["auroc"]["value"] for entry in entries[1:]]})
        labels = main.evaluation.labels[:, p]
        if labels.any() and not labels.all():
            curves = [(model.css, roc_curve(model.evaluation.labels[:, p],
                                            model.evaluation.scores[model.evaluation.mode][:, p]))
                      for model in shown]
            plots.append({"name": name, "auroc": entries[0]["auroc"]["value"],
                          "positives": entries[0]["positives"],
                          "svg": charts.roc(curves, name)})
    scale = _scale(bounds)
    for row in rows:
        row["strip"] = charts.strip(row.pop("marks"), *scale)
    return {"findings": rows, "findings_axis": charts.strip_axis(*scale), "rocs": plots}


def _modes(shown: Sequence[_Shown]) -> list[dict[str, Any]]:
    """One row for each score mode that any model has."""
    names = [mode for mode in MODE_FORMULAS
             if any(mode in model.evaluation.scores for model in shown)]
    rows = []
    for mode in names:
        cells = [(model.evaluation.metrics["scores"].get(mode, {}).get("macro", {}).get("auroc"),
                  model.evaluation.mode == mode) for model in shown]
        rows.append({"mode": mode, "cells": cells})
    return rows


def _gaps(shown: Sequence[_Shown]) -> list[dict[str, Any]]:
    return [{"shown": model, "kind": kind, "formula": KIND_FORMULAS[kind], "gap": found.gap}
            for model in shown for kind, found in model.evaluation.gaps.items()]


def _gap_differences(main: _Shown, comparisons: Sequence[Any]) -> list[dict[str, Any]]:
    """Centroid distances of the main model minus others', and its own bridged minus direct."""
    rows = []
    own = main.evaluation.gaps
    if "bridged" in own and "direct" in own:
        rows.append({"first": (main, "bridged"), "second": (main, "direct"),
                     "difference": distance_difference(own["bridged"], own["direct"],
                                                       main.evaluation.protocol.level)})
    for other, found in comparisons:
        rows += [{"first": (main, kind), "second": (other, against), "difference": difference}
                 for (kind, against), difference in found.distance.items()
                 if kind in ("direct", "bridged")]
    return rows


def _projections(shown: Sequence[_Shown]) -> list[dict[str, Any]]:
    """Scatter plots on one shared scale, so that distances can be compared between them."""
    kept = [(model, kind, plane) for model in shown
            for kind, plane in model.evaluation.projections.items() if kind != "image_bridged"]
    if not kept:
        return []
    offsets = [np.abs(np.concatenate([plane.image, plane.text])
                      - (plane.image.mean(0) + plane.text.mean(0)) / 2).max(0)
               for _, _, plane in kept]
    reach = tuple(float(value) or 1.0 for value in np.max(offsets, axis=0))
    return [{"shown": model, "kind": kind, "formula": KIND_FORMULAS[kind],
             "distance": model.evaluation.gaps[kind].gap.distance,
             "explained": float(plane.explained.sum()),
             "svg": charts.scatter(plane, reach, model.css,
                                   f"{model.label}, {kind} embeddings in two dimensions")}
            for model, kind, plane in kept]


def _curves(shown: Sequence[_Shown], most: int = 12) -> list[dict[str, Any]]:
    """Training curves: the total loss first, then every logged term."""
    histories = [(model.css, model.label, model.model.history) for model in shown
                 if model.model.history]
    keys: dict[str, None] = {}
    for _, _, rows in histories:
        for row in rows:
            for key, value in row.items():
                if isinstance(value, int | float | np.number) and not isinstance(value, bool):
                    keys.setdefault(key)
    named = [key for key in keys if not any(part in _BOOKKEEPING for part in
                                            key.lower().replace("/", "_").split("_"))]
    named.sort(key=lambda key: (key != "loss",))
    found = []
    for key in named[:most]:
        curves = charts.history_lines(histories, key)
        if curves:
            found.append({"name": key, "svg": charts.lines(curves, f"{key} over training")})
    return found


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    # Rounding first keeps a tiny negative number from being written as minus zero.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def _bounds(found: Interval | Mapping[str, float]) -> tuple[float, float, float]:
    if isinstance(found, Interval):
        return found.value, found.low, found.high
    return found["value"], found["low"], found["high"]


def _span(found: Interval | Mapping[str, float]) -> str:
    """The interval alone: "0.851–0.894", with "to" where a minus sign would be misread."""
    _, low, high = _bounds(found)
    if not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    return f"{_number(low)}{' to ' if min(low, high) < 0 else '–'}{_number(high)}"


def _estimate(found: Interval | Mapping[str, float]) -> str:
    """The value with its interval: "0.873 (0.851–0.894)"."""
    return f"{_number(_bounds(found)[0])} ({_span(found)})"


def _signed(found: Interval) -> str:
    """A difference with its sign and interval: "+0.031 (0.012–0.050)"."""
    return f"{'+' if round(found.value, 3) > 0 else ''}{_estimate(found)}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if value < 0.0995 else f"{100 * value:.0f}%"


def _png(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()
