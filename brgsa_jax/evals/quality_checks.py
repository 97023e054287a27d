"""What the measured voxels of a data set say: values, geometry and field of view.

Each function takes records of one pass and returns a section of the result, as JSON types, with
the problems found in it.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.evals.quality_scan import SIDES, Measured, Scale

ERROR, LOOK, INFO = "error", "look", "info"

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_ENOUGH = 8  # Volumes below which nothing is called unlike the others.
_FAR = 6.0  # Robust standard deviations at which a histogram is unlike the others,
_FAR_LEAST = {"ct": 40.0, "radiograph": 20.0}  # and the least distance for it.
_SPLITS_FAR = {"ct": 40.0, "radiograph": 20.0}  # The same between whole splits.
_LEAST_BODY = 0.01  # A CT with less tissue than this holds no patient.
_MOST_SATURATED = {"ct": 0.05, "radiograph": 0.5}
_TOUCHES = 0.02  # Share of a face that is body from which the body counts as cut,
_CUT = 0.2  # and as cut by much.
_LEAST_FILLED = 0.5
_THICK_MM = 5.0
_UNEQUAL = 1.02  # Ratio of the two spacings of a slice that are meant to be equal.


class Problem(NamedTuple):
    """Something to know about a data set.

    Attributes:
        severity: "error" (do not use the set as it is), "look" (judge it by eye) or "info".
        count: how many of what `title` names.
        title: what is wrong, with the count.
        advice: what to do about it.
        section: name of the section with the details.
    """

    severity: str
    count: int
    title: str
    advice: str
    section: str


class Section(NamedTuple):
    """JSON types for one section of the page, and the problems found in it."""

    content: dict[str, Any]
    problems: list[Problem]


def named(record: Measured, **more: Any) -> dict[str, Any]:
    """A record by its id and place, as JSON types."""
    return {"id": record.id, "split": record.split, "position": record.position, **more}


def many(count: int, one: str, several: str = "") -> str:
    """A count with its noun, e.g. "1 volume", "1,204 volumes"."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def quantiles(values: Sequence[float]) -> list[float]:
    """Returns least, 5 %, 25 %, 50 %, 75 %, 95 % and greatest value; empty without values."""
    return [float(v) for v in np.quantile(values, _QUANTILES)] if len(values) else []


def values(records: Sequence[Measured], scale: Scale) -> Section:
    """Histograms and shares of voxels, and the records unlike the others."""
    if not records:
        return Section({"volumes": 0}, [])
    histograms = np.stack([record.histogram for record in records])
    shares = np.stack([record.shares for record in records])
    splits = np.array([record.split for record in records])
    distances, deviations = _distances(histograms, scale)
    content = {
        "volumes": len(records), "kind": scale.kind, "edges": scale.edges.tolist(),
        "bands": {name: np.quantile(histograms, q, axis=0).round(7).tolist() for name, q in
                  (("low", 0.05), ("quarter", 0.25), ("median", 0.5), ("three_quarters", 0.75),
                   ("high", 0.95))},
        "classes": {name: {"from": first, "to": last, "shares": quantiles(shares[:, place]),
                           "splits": {split: float(shares[splits == split, place].mean())
                                      for split in dict.fromkeys(splits.tolist())}}
                    for place, (name, (first, last)) in enumerate(scale.classes.items())},
        "enough": len(records) >= _ENOUGH,
        "distance": quantiles(distances[np.isfinite(distances)]),
        "split_distances": _split_distances(histograms, splits, scale),
    }
    empty = np.array([is_empty(record, scale) for record in records])
    saturated = shares[:, -1] > _MOST_SATURATED[scale.kind]
    far = (deviations > _FAR) & (distances > _FAR_LEAST[scale.kind]) & ~empty

    def listed(chosen: np.ndarray, order: np.ndarray, **more: np.ndarray) -> list[dict[str, Any]]:
        return [named(records[p], histogram=histograms[p].round(7).tolist(),
                      **{name: float(found[p]) for name, found in more.items()})
                for p in np.argsort(order, kind="stable") if chosen[p]]

    content |= {
        "empty": listed(empty, shares[:, 0], share=histograms.max(axis=1)),
        "saturated": listed(saturated, -shares[:, -1], share=shares[:, -1]),
        "outliers": listed(far, -distances, distance=distances,
                           deviations=np.minimum(deviations, 999))}
    return Section(content, _value_problems(content, scale))


def is_empty(record: Measured, scale: Scale) -> bool:
    """Whether a CT holds hardly any tissue, or a radiograph hardly more than one grey value."""
    if scale.kind == "ct":
        return bool(record.shares[3:].sum() < _LEAST_BODY)
    return bool(record.histogram.max() > 1 - _LEAST_BODY)


def _beyond_air(histograms: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Cumulated shares of all that is neither air nor padding, and the width of each bin."""
    names = list(scale.classes)
    start = scale.classes[names[2 if scale.kind == "ct" else 1]][0]
    first = int(np.searchsorted(scale.edges[:-1], start))
    kept = histograms[..., first:]
    with np.errstate(invalid="ignore", divide="ignore"):
        return kept.cumsum(-1) / kept.sum(-1, keepdims=True), np.diff(scale.edges[first:])


def _distances(histograms: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Each histogram's Wasserstein distance to the median one, and how unusual that is.

    Air and padding are left out: how much of them a volume has tells the size of the patient and
    of the field of view, not whether its values are right.

    Returns:
        The distance in HU or grey values, NaN for a record of nothing but air; and the robust
        standard deviations by which it exceeds the median distance, 0 where there are too few.
    """
    cumulated, widths = _beyond_air(histograms, scale)
    reference = np.nanmedian(cumulated, axis=0) if np.isfinite(cumulated).any() else 0.0
    distances = np.abs(cumulated - reference) @ widths
    finite = distances[np.isfinite(distances)]
    if finite.size < _ENOUGH:
        return distances, np.zeros(len(distances))
    middle = np.median(finite)
    spread = 1.4826 * np.median(np.abs(finite - middle))
    return distances, np.nan_to_num((distances - middle) / max(spread, 1e-6))


def _split_distances(histograms: np.ndarray, splits: np.ndarray, scale: Scale) -> dict[str, float]:
    """How far the median histogram of each split lies from that of all others, in values."""
    cumulated, widths = _beyond_air(histograms, scale)
    known, found = np.isfinite(cumulated[:, -1]), {}
    for split in dict.fromkeys(splits.tolist()):
        inside, outside = known & (splits == split), known & (splits != split)
        if min(inside.sum(), outside.sum()) >= _ENOUGH:
            found[split] = float(np.abs(np.median(cumulated[inside], axis=0)
                                        - np.median(cumulated[outside], axis=0)) @ widths)
    return found


def _value_problems(content: Mapping[str, Any], scale: Scale) -> list[Problem]:
    ct, problems = scale.kind == "ct", []
    if count := len(content["empty"]):
        problems.append(Problem(
            ERROR, count, f"{many(count, 'volume holds', 'volumes hold')} no patient" if ct else
            f"{many(count, 'image is', 'images are')} of one grey value",
            "Under 1% of the voxels are denser than lung; the rescale intercept was probably "
            "applied twice. Convert the series again and rebuild." if ct else
            "Export the images again and rebuild.", "values"))
    if count := len(content["saturated"]):
        problems.append(Problem(
            ERROR if ct else LOOK, count,
            f"{many(count, 'volume is', 'volumes are')} saturated at the upper clamp" if ct else
            f"{many(count, 'image is', 'images are')} mostly white",
            "More than 5% of the voxels lie at the clamp; these are probably raw stored values "
            "without their intercept. Convert the series again and rebuild." if ct else
            "Look whether they are inverted or empty.", "values"))
    if count := len(content["outliers"]):
        problems.append(Problem(
            LOOK, count, f"{many(count, 'histogram')} far from the rest",
            "Look at the pictures: wrong units, another body part, metal, or a rare patient.",
            "values"))
    far = [s for s, d in content["split_distances"].items() if d > _SPLITS_FAR[scale.kind]]
    if far:
        problems.append(Problem(
            LOOK, len(far), f"Values differ between splits ({', '.join(far)})",
            "Check that all splits were converted from the same release in the same way.",
            "values"))
    return problems


def geometry(records: Sequence[Measured]) -> Section:
    """Voxel sizes and orientations of the files the volumes came from."""
    placed = [(record, *_spacings(record)) for record in records
              if len(record.file_spacing) == len(record.file_orientation) == 3
              and set("SI") & set(record.file_orientation)]
    codes: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        codes[record.file_orientation or "not recorded"][record.split] += 1
    content: dict[str, Any] = {
        "known": len(placed), "volumes": len(records),
        "orientations": {code: dict(counts) for code, counts in
                         sorted(codes.items(), key=lambda pair: -pair[1].total())}}
    problems = []
    for name, column in (("in_plane", 1), ("between_slices", 2)):
        by_split = defaultdict(list)
        for row in placed:
            by_split[row[0].split].append(row[column])
        content[name] = histogram_by_split(by_split)
    content["unequal"] = [named(r, spacing=list(r.file_spacing)) for r, _, _, ratio in placed
                          if ratio > _UNEQUAL]
    content["thick"] = [named(r, spacing=list(r.file_spacing)) for r, _, between, _ in placed
                        if between > _THICK_MM]
    if count := len(content["unequal"]):
        problems.append(Problem(
            LOOK, count, f"{many(count, 'file')} with slices of unequal voxel sides",
            "Scanners make square voxels in plane; check the headers of these files.", "geometry"))
    if count := len(content["thick"]):
        problems.append(Problem(
            INFO, count, f"{many(count, 'volume')} with slices over {_THICK_MM:g} mm apart",
            "Small findings are lost in them; leave them out if finer series exist.", "geometry"))
    known = [code for code in codes if code != "not recorded"]
    if len(known) > 1:
        problems.append(Problem(
            INFO, len(known), f"{len(known)} orientations among the files",
            "All were turned to LPS by their affine; look at a picture of the rare ones if you "
            "doubt the headers.", "geometry"))
    return Section(content, problems)


def _spacings(record: Measured) -> tuple[float, float, float]:
    """Millimetres in plane (mean of two) and along the body, and the ratio of the two in plane."""
    along = next(axis for axis, code in enumerate(record.file_orientation) if code in "SI")
    first, second = (s for axis, s in enumerate(record.file_spacing) if axis != along)
    return (first + second) / 2, record.file_spacing[along], max(first, second) / min(first, second)


def histogram_by_split(by_split: Mapping[str, Sequence[float]], bins: int = 30) -> dict[str, Any]:
    """Quantiles and counts in shared bins of each split; whole numbers get bins of whole width."""
    everything = [value for found in by_split.values() for value in found]
    if not everything:
        return {"edges": [], "splits": {}}
    edges = np.histogram_bin_edges(everything, bins)
    if isinstance(everything[0], int):
        width = -(-(max(everything) - min(everything) + 1) // bins)
        edges = np.arange(min(everything), max(everything) + width + 1, width) - 0.5
    return {"edges": edges.tolist(),
            "splits": {split: {"quantiles": quantiles(found),
                               "counts": np.histogram(found, edges)[0].tolist()}
                       for split, found in by_split.items()}}


def field_of_view(records: Sequence[Measured], spacing: Sequence[float], shape: Sequence[int]
                  ) -> Section:
    """What of the box is padding, and which of its faces cut the body."""
    if not records:
        return Section({"volumes": 0}, [])
    margins = np.stack([record.margins for record in records]).astype(np.float64)
    filled = 1 - margins.sum(axis=2)
    padding = 1 - filled.prod(axis=1)
    # Bare air around the patient can be at the clamp too, above and below it is no patient.
    short = filled[:, -1] if len(shape) == 3 else filled.prod(axis=1)
    sides = SIDES if len(shape) == 3 else ("left edge", "right edge", "top edge", "bottom edge")
    if len(shape) == 2:
        margins = margins[:, ::-1]  # Rows come first in an image, x first in a volume.
    content: dict[str, Any] = {
        "volumes": len(records), "padding": quantiles(padding),
        "short": [named(records[p], share=float(short[p]))
                  for p in np.argsort(short, kind="stable") if short[p] < _LEAST_FILLED],
        "sides": {side: {"margin": quantiles(margins[:, place // 2, place % 2])}
                  for place, side in enumerate(sides)}}
    problems = []
    if len(shape) == 3:
        faces = np.stack([record.faces for record in records])
        for place, side in enumerate(sides):
            worst = np.argsort(-faces[:, place], kind="stable")
            content["sides"][side] |= {
                "mm": shape[place // 2] * spacing[place // 2],
                "touched": int((faces[:, place] > _TOUCHES).sum()),
                "worst": [named(records[p], share=float(faces[p, place])) for p in worst[:5]
                          if faces[p, place] > _TOUCHES]}
        around = faces[:, :4].max(axis=1)
        content["touched"] = int((around > _TOUCHES).sum())
        content["cut"] = [named(records[p], share=float(around[p]),
                                side=sides[int(faces[p, :4].argmax())])
                          for p in np.argsort(-around, kind="stable") if around[p] > _CUT]
        problems += _cut_problems(content)
    if count := len(content["short"]):
        problems.append(Problem(
            LOOK, count, f"{many(count, 'volume fills', 'volumes fill')} less than half the height "
            "of the box" if len(shape) == 3 else
            f"{many(count, 'image fills', 'images fill')} less than half the frame",
            "Check that they are whole and show what the report describes.", "view"))
    return Section(content, problems)


def _cut_problems(content: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if count := len(content["cut"]):
        problems.append(Problem(
            LOOK, count, f"{many(count, 'body', 'bodies')} cut by much at a side of the box",
            f"Over {_CUT:.0%} of a side is body; look whether the spacing in the header is right, "
            "else a larger box keeps more.", "view"))
    if content["touched"]:
        problems.append(Problem(
            INFO, content["touched"], f"{many(content['touched'], 'volume')} whose body reaches "
            "the right, left, front or back of the box",
            "Usual for arms and large patients; a larger box keeps more, for more memory.", "view"))
    return problems
