"""What the report shows of the scores: findings, curves, decisions, calibration, score modes.

Each function returns what its part of templates/report_scores.html places; all numbers come from
the evaluations.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.evals import charts
from brgsa_jax.evals.calibration import METHODS, as_probabilities, calibrate, reliability
from brgsa_jax.evals.evaluate import Comparison, Evaluation
from brgsa_jax.evals.metrics import RocCurve, pr_curve, roc_curve
from brgsa_jax.evals.protocol import GIVEN
from brgsa_jax.evals.report_text import bounds, number

MODE_FORMULAS = {"direct": "cos(v, t)", "bridged": "cos(v̂, t̂)", "image_bridged": "cos(v̂, t)",
                 "text_bridged": "cos(v, t̂)", "mean": "½ cos(v, t) + ½ cos(v̂, t)",
                 "given": "as read from the file", "classifier": "the classifier's probability"}

_DIAGONAL = ((0.0, 0.0), (1.0, 1.0))
_GRID = np.linspace(0.0, 1.0, 501)

_DECISIONS = (("accuracy", "Accuracy"), ("balanced_accuracy", "Balanced accuracy"),
              ("precision", "Precision"), ("recall", "Sensitivity (recall)"),
              ("specificity", "Specificity"), ("f1_positive", "Positive F1"),
              ("f1_weighted", "Weighted F1"))
_CALIBRATIONS = {"raw": "Raw scores", "temperature": "Temperature scaling",
                 "platt": "Platt scaling", "prevalence": "Prevalence alone"}


class Shown(NamedTuple):
    """A model of the report with the colour class it is drawn in."""

    css: str
    label: str
    model: Any
    evaluation: Evaluation

    @property
    def scores(self) -> np.ndarray:
        """The judged scores [N,P]."""
        return self.evaluation.scores[self.evaluation.mode]


def scale(values: Sequence[float]) -> tuple[float, float]:
    """A round AUROC scale that holds all values and the chance level."""
    finite = [value for value in values if math.isfinite(value)] or [0.5]
    return (min(0.4, math.floor(min(finite) * 10) / 10), 1.0)


def findings(shown: Sequence[Shown]) -> dict[str, Any]:
    """The two tables of findings, groups and means, each row with its part of a forest plot."""
    main = shown[0].evaluation.metrics
    rows = [_row(name, [model.evaluation.metrics["findings"][name] for model in shown])
            for name in shown[0].evaluation.protocol.findings]
    groups = [name for name in main.get("groups", {})
              if all(name in model.evaluation.metrics.get("groups", {}) for model in shown)]
    totals = [_row(name, [model.evaluation.metrics["groups"][name] for model in shown], True)
              for name in groups]
    totals.append(_row("Mean", [model.evaluation.metrics["macro"] for model in shown], True))
    everything = rows + totals
    ends = scale([bound for row in everything for entry in row["entries"]
                  for bound in bounds(entry["auroc"])])
    for row in everything:
        marks = {key: [charts.Mark(model.css, *bounds(entry[key]))
                       for model, entry in zip(shown, row["entries"], strict=True)]
                 for key in ("auroc", "auprc")}
        row["auroc"] = charts.strip(marks["auroc"], *ends)
        row["auprc"] = charts.strip(marks["auprc"], 0.0, 1.0, chance=row["entry"]["auprc_chance"])
    return {"findings": rows, "totals": totals, "undefined": main["undefined"],
            "has_delong": all("delong" in row["entry"] for row in rows),
            "members": {name: main["groups"][name]["findings"] for name in groups},
            "auroc_axis": charts.strip_axis(*ends), "auprc_axis": charts.strip_axis(0.0, 1.0)}


def difference_tables(main: Shown, comparisons: Sequence[tuple[Shown, Comparison]]
                      ) -> list[dict[str, Any]]:
    """Paired differences of every finding, for each other model but an untrained one."""
    found = []
    for other, compared in comparisons:
        if other.model.untrained:
            continue
        rows = [{"name": name, "difference": difference.interval, "total": False,
                 "p": difference.delong.p if difference.delong else None}
                for name, difference in compared.findings.items()]
        rows += [{"name": f"Mean {figure.upper()}", "difference": difference.interval,
                  "total": True, "p": None} for figure, difference in compared.macro.items()]
        reach = max((abs(bound) for row in rows for bound in bounds(row["difference"])
                     if math.isfinite(bound)), default=0.0) or 1.0
        for row in rows:
            row["strip"] = charts.strip([charts.Mark(main.css, *bounds(row["difference"]))],
                                        -reach, reach, chance=0.0)
        found.append({"other": other, "rows": rows, "axis": charts.strip_axis(-reach, reach, 0.0)})
    return found


def _row(name: str, entries: Sequence[Mapping[str, Any]], total: bool = False) -> dict[str, Any]:
    return {"name": name, "entry": entries[0], "entries": entries, "others": entries[1:],
            "total": total}


def curves(shown: Sequence[Shown]) -> dict[str, Any]:
    """ROC and precision-recall curves of every defined finding, and their means."""
    labels = shown[0].evaluation.labels
    names = shown[0].evaluation.protocol.findings
    entries = shown[0].evaluation.metrics["findings"]
    defined = [p for p in range(len(names)) if labels[:, p].any() and not labels[:, p].all()]
    if not defined:
        return {"rocs": [], "precision_recalls": [], "macro_plots": []}
    rocs, precision_recalls, sums = [], [], np.zeros((2, len(shown), len(_GRID)))
    for p in defined:
        roc_lines, pr_lines = [], []
        for index, model in enumerate(shown):
            roc = roc_curve(labels[:, p], model.scores[:, p])
            precision = precision_at(labels[:, p], model.scores[:, p], _GRID)
            sums[:, index] += sensitivity_at(roc, _GRID), precision
            roc_lines.append(charts.Line(model.css, model.label, roc.false_positive_rate,
                                         roc.true_positive_rate))
            pr_lines.append(charts.Line(model.css, model.label, _GRID, precision))
        prevalence = float(labels[:, p].mean())
        rocs.append({
            "name": names[p],
            "note": f"{number(entries[names[p]]['auroc'])}, n = {entries[names[p]]['positives']}",
            "svg": charts.square(roc_lines, f"ROC curve of {names[p]}", chance=_DIAGONAL)})
        precision_recalls.append({
            "name": names[p],
            "note": f"{number(entries[names[p]]['auprc'])}, chance {number(prevalence)}",
            "svg": charts.square(pr_lines, f"Precision over recall of {names[p]}",
                                 chance=((0.0, prevalence), (1.0, prevalence)))})
    return {"rocs": rocs, "precision_recalls": precision_recalls,
            "macro_plots": _macro_plots(shown, sums / len(defined),
                                        float(labels[:, defined].mean()), len(defined))}


def _macro_plots(shown: Sequence[Shown], means: np.ndarray, prevalence: float,
                 count: int) -> list[dict[str, Any]]:
    lines = [[charts.Line(model.css, model.label, _GRID, y)
              for model, y in zip(shown, part, strict=True)] for part in means]
    note = f"mean over {count} findings at each point of the horizontal axis"
    return [
        {"name": "Mean ROC curve", "note": note,
         "svg": charts.square(lines[0], "Mean ROC curve", chance=_DIAGONAL,
                              names=("1 − specificity", "Sensitivity"))},
        {"name": "Mean precision over recall", "note": note,
         "svg": charts.square(lines[1], "Mean precision over recall",
                              chance=((0.0, prevalence), (1.0, prevalence)),
                              names=("Recall", "Precision"))}]


def sensitivity_at(curve: RocCurve, rates: np.ndarray) -> np.ndarray:
    """The highest sensitivity of a ROC curve at false positive rates[K]; its mean is the AUROC."""
    return np.interp(rates, curve.false_positive_rate, curve.true_positive_rate)


def precision_at(labels: np.ndarray, scores: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Precision of labels[N] bool and scores[N] where each of recalls[K] is first reached.

    Its mean over all recalls is the average precision Σ_k (R_k − R_{k−1}) P_k.
    """
    curve = pr_curve(labels, scores)
    # The first point, of no calls at all, has a precision by convention only.
    return curve.precision[np.maximum(np.searchsorted(curve.recall, recalls - 1e-12), 1)]


def decisions(shown: Sequence[Shown]) -> dict[str, Any] | None:
    """Thresholded figures beside the constant negative answer; None without a threshold rule."""
    having = [(model, model.evaluation.metrics["decisions"]) for model in shown
              if model.evaluation.metrics.get("decisions", {}).get("macro")]
    if not having:
        return None
    found = having[0][1]
    prevalences = {name: entry["auprc_chance"]
                   for name, entry in having[0][0].evaluation.metrics["findings"].items()}
    return {"columns": _DECISIONS, "optimistic": found["optimistic"],
            "count": len(found["findings"]), "undefined": found["undefined"],
            "all_negative": found["all_negative"],
            "models": [{"shown": model, "macro": entry["intervals"]["macro"]}
                       for model, entry in having],
            "prevalence": float(np.mean([prevalences[name] for name in found["findings"]])),
            "rows": [{"name": name, "prevalence": prevalences[name],
                      "entry": found["intervals"]["findings"][name]}
                     for name in found["findings"]]}


def calibration(shown: Sequence[Shown]) -> dict[str, Any] | None:
    """Errors of probabilities before and after scaling; None where nothing could be fitted."""
    having = [(model, model.evaluation.metrics["calibration"]) for model in shown
              if math.isfinite(bounds(model.evaluation.metrics.get("calibration", {})
                                      .get("platt", {}).get("brier"))[0])]
    if not having:
        return None
    rows = [{"shown": model, "method": title, "constant": False,
             **{key: entry[method].get(key) for key in ("ece", "brier", "brier_below")}}
            for model, entry in having for method, title in _CALIBRATIONS.items()
            if method != "prevalence"]
    # It looks at no score, and so is the same for every model.
    rows.append({"shown": None, "method": _CALIBRATIONS["prevalence"], "constant": True,
                 "brier_below": None, **{key: having[0][1]["prevalence"][key]
                                        for key in ("ece", "brier")}})
    return {"rows": rows, "raw_is": having[0][1]["raw_is"], **_reliability(having[0][0])}


def _reliability(model: Shown) -> dict[str, Any]:
    """Reliability diagrams of all findings together by method, and of each after Platt scaling."""
    found = model.evaluation
    probabilities = {"raw": as_probabilities(model.scores)} | {
        method: calibrate(found.labels, model.scores, found.patients, method, found.protocol.seed)
        for method in METHODS}
    fitted = np.flatnonzero(np.isfinite(probabilities["platt"]).all(axis=0))

    def diagram(labels: np.ndarray, predicted: np.ndarray, title: str, large: bool) -> Any:
        points = reliability(labels, predicted)
        line = charts.Line(model.css, title, points.mean, points.share,
                           points.count / points.count.sum())
        return charts.square([line], f"Reliability diagram, {title}", chance=_DIAGONAL,
                             names=("Predicted probability", "Share of positives") if large
                             else None)

    pooled = [{"name": _CALIBRATIONS[method], "note": f"all {len(fitted)} findings together",
               "svg": diagram(found.labels[:, fitted].ravel(), predicted[:, fitted].ravel(),
                              _CALIBRATIONS[method], True)}
              for method, predicted in probabilities.items()]
    entries = found.metrics["calibration"]["platt"]["findings"]
    single = []
    for p in fitted:
        name = found.protocol.findings[p]
        single.append({"name": name, "note": f"ECE {number(entries[name]['ece'])}",
                       "svg": diagram(found.labels[:, p], probabilities["platt"][:, p], name,
                                      False)})
    return {"pooled": pooled, "single": single}


def modes(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """One row for each score mode that any model has; none for scores from a file."""
    names = [mode for mode in MODE_FORMULAS if mode != GIVEN
             and any(mode in model.evaluation.scores for model in shown)]
    rows = []
    for mode in names:
        cells = [(model.evaluation.metrics["scores"].get(mode, {}).get("macro", {}).get("auroc"),
                  model.evaluation.mode == mode) for model in shown]
        rows.append({"mode": mode, "cells": cells})
    return rows
