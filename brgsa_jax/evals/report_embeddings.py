"""What the report shows of embeddings, heat-maps and training.

Each function returns what its part of the templates places.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from brgsa_jax.evals import charts
from brgsa_jax.evals.evaluate import Comparison
from brgsa_jax.evals.gap import distance_difference
from brgsa_jax.evals.report_scores import Shown, scale
from brgsa_jax.evals.report_text import bounds

KIND_FORMULAS = {"direct": "v, t", "bridged": "v̂, t̂", "image_bridged": "v̂, t"}

_RETRIEVAL = {"recall": "Recall", "map": "mAP", "label_jaccard": "Jaccard"}

_RULES = {"pointing": "Pointing game", "dice": "Dice", "hit_rate": "Hit rate"}
_UNSKILLED = {"body": "the whole body", "other_prompts": "other findings",
              "other_patients": "other patients"}

_GAP_COLUMNS = (("relative", "Relative distance"), ("matched", "Matched cosine"),
                ("mismatched", "Mismatched cosine"), ("floor", "Sampling floor"))

_CLOUD_COLUMNS = (("separability", "Separability"), ("alignment", "Alignment"),
                  ("uniformity_image", "Uniformity, volumes"),
                  ("uniformity_text", "Uniformity, reports"),
                  ("rank_image", "Effective rank, volumes"),
                  ("rank_text", "Effective rank, reports"))

# Numbers of a log row that are bookkeeping rather than a training curve.
_BOOKKEEPING = ("step", "epoch", "time", "sec", "samples", "examples", "mfu", "throughput", "eta",
                "memory", "wait", "flops", "rate", "seed")


def gaps(shown: Sequence[Shown]) -> dict[str, Any]:
    """The table of the modality gap, before the bank and after, each row with its interval."""
    rows = [{"shown": model, "kind": kind, "formula": KIND_FORMULAS[kind],
             "gap": found.gap.as_dict()}
            for model in shown for kind, found in model.evaluation.gaps.items()]
    if not rows:
        return {"gaps": []}
    high = max(value for row in rows for value in bounds(row["gap"]["distance"])
               if np.isfinite(value)) * 1.02 or 1.0
    for row in rows:
        row["strip"] = charts.strip([charts.Mark(row["shown"].css,
                                                 *bounds(row["gap"]["distance"]))],
                                    0.0, high, chance=row["gap"]["floor"])
    return {"gaps": rows, "gap_axis": charts.strip_axis(0.0, high, 0.0),
            "gap_columns": _GAP_COLUMNS, "cloud_columns": _CLOUD_COLUMNS}


def gap_differences(main: Shown, comparisons: Sequence[tuple[Shown, Comparison]]
                    ) -> list[dict[str, Any]]:
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


def projections(shown: Sequence[Shown]) -> list[dict[str, Any]]:
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


def training(shown: Sequence[Shown], most: int = 12) -> list[dict[str, Any]]:
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


def retrieval(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """Tables of recall, and of average precision and agreement, with a chance row a direction."""
    having = [(model, model.evaluation.metrics["retrieval"]) for model in shown
              if model.evaluation.metrics.get("retrieval")]
    if not having:
        return []
    tables = []
    for families in (("recall",), ("map", "label_jaccard")):
        first = next(iter(having[0][1].values()))
        columns = [(family, k) for family in families for k in first[family]]
        directions = []
        for name, figures in having[0][1].items():
            rows = [_retrieved(model, found[name], columns) for model, found in having]
            rows.append(_retrieved(None, figures, columns))
            directions.append({"name": name, "rows": rows, "gallery": figures["gallery"],
                               "queries": rows[0]["queries"]})
        tables.append({"titles": [f"{_RETRIEVAL[family]}@{k}" for family, k in columns],
                       "directions": directions, "ranks": families == ("recall",)})
    return tables


def _retrieved(model: Shown | None, found: Mapping[str, Any],
               columns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One row; without a model that of chance."""
    cells = [found[family][k] for family, k in columns]
    return {"shown": model, "queries": cells[0]["queries"],
            "rank": found["median_rank"]["value" if model else "chance"],
            "cells": cells if model else [cell["chance"] for cell in cells]}


def probe(shown: Sequence[Shown]) -> dict[str, Any] | None:
    """Macro AUROC of the linear probes by share of the labels; None where none was given."""
    rows = [{"shown": model, "share": f"{100 * found['fraction']:g}%",
             "patients": found["patients"], "volumes": found["volumes"],
             "auroc": found["macro"]["auroc"]}
            for model in shown if model.model.probe for found in model.model.probe["fractions"]]
    if not rows:
        return None
    ends = scale([bound for row in rows for bound in bounds(row["auroc"])])
    for row in rows:
        row["strip"] = charts.strip([charts.Mark(row["shown"].css, *bounds(row["auroc"]))], *ends)
    return {"rows": rows, "axis": charts.strip_axis(*ends)}


def localisation(main: Shown) -> dict[str, Any] | None:
    """A table for each way to score heat-maps against regions, beside what needs no skill."""
    found = main.evaluation.metrics.get("localisation")
    if not found:
        return None
    tables = []
    for rule, told in found["rules"].items():
        rows = [{"name": name, "regions": entry["regions"], "entry": entry[rule], "total": False}
                for name, entry in found["findings"].items()]
        rows.append({"name": "Mean", "regions": found["counts"]["regions"],
                     "entry": found["macro"][rule], "total": True})
        levels = list(found["macro"][rule]["against"])
        for row in rows:
            chance = row["entry"]["against"][levels[0]]["level"]
            row["strip"] = charts.strip([charts.Mark(main.css, *bounds(row["entry"]))], 0.0, 1.0,
                                        chance=chance)
        tables.append({"title": _RULES.get(rule, rule), "told": told,
                       "levels": {name: _UNSKILLED.get(name, name) for name in levels},
                       "rows": rows, "axis": charts.strip_axis(0.0, 1.0)})
    return {"tables": tables, "method": found.get("method", ""), **found["counts"]}
