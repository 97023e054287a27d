"""Where heat-maps point, against boxes or masks of what is there.

Three scores of a map and a region, as a radiologist's box or a mask:

pointing game (Zhang et al. 2018): the highest voxel lies in the region; of several highest voxels,
    the share that does, so that a map without contrast scores what chance does;
Dice: 2|M ∩ R| / (|M| + |R|) with M the voxels of at least half the map's maximum;
hit rate: one of the highest 1 % of the voxels lies in the region; equal voxels at the edge of that
    1 % are left out.

A region may be hit without any understanding, so every score stands beside what scores it:

body: a point drawn at random in the body (for Dice, the body itself);
other_prompts: the maps of the other prompts on the same volume. A map that follows the volume and
    not the prompt gains nothing on these;
other_patients: only pointing; the same prompt's points on the other patients. A map that knows
    where a finding usually lies, and not where it lies here, gains nothing on these.

Findings count alike (macro), intervals are over patients.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from brgsa_jax.config import UserError
from brgsa_jax.data.recipe import centre, check_recipe
from brgsa_jax.data.volume import Preprocess, canonical_affine, read_stored, to_canonical
from brgsa_jax.evals.bootstrap import draws, group_patients, interval, macro_samples
from brgsa_jax.evals.heatmap import Directions, automatic, directions, mapper
from brgsa_jax.evals.metrics import macro

RULES = {"pointing": "the highest voxel lies in the region",
         "dice": "of the voxels of at least half the map's maximum",
         "hit_rate": "one of the highest 1 % of the voxels lies in the region"}
AGAINST = {"pointing": ("body", "other_prompts", "other_patients"),
           "dice": ("body", "other_prompts"), "hit_rate": ("other_prompts",)}
_TISSUE = -500  # HU above which a voxel is no air.


class Case(NamedTuple):
    """An image with the places of its findings.

    Attributes:
        patient: whose image it is.
        image: HU [X, Y, Z], or grey levels [H, W].
        regions: finding -> bool of the image's shape, with at least one voxel.
    """

    patient: str
    image: np.ndarray
    regions: Mapping[str, np.ndarray]


class Marks(NamedTuple):
    """What of one map is scored.

    Attributes:
        highest: flat indices of its highest voxels; empty for a map without contrast.
        half, top: bool masks of at least half the maximum, and of the highest 1 %.
    """

    highest: np.ndarray
    half: np.ndarray
    top: np.ndarray


def marks_of(heat: np.ndarray) -> Marks:
    """Finds what of a map ≥ 0 is scored; see the module."""
    heat = np.asarray(heat)
    peak = heat.max()
    count = max(1, heat.size // 100)
    # Voxels that equal the first one outside the 1 % are no more in it than that one.
    edge = np.partition(heat, -count - 1, axis=None)[-count - 1]
    highest = np.flatnonzero(heat == peak) if peak > heat.min() else np.empty(0, np.intp)
    return Marks(highest, (heat >= 0.5 * peak) & (heat > 0), heat > edge)


def score_marks(marks: Marks, region: np.ndarray) -> dict[str, float]:
    """Scores one map against one region; see the module."""
    together = np.count_nonzero(marks.half) + np.count_nonzero(region)
    return {"pointing": _pointing(marks.highest, region),
            "dice": 2.0 * np.count_nonzero(marks.half & region) / together,
            "hit_rate": float((marks.top & region).any())}


def body_of(image: np.ndarray) -> np.ndarray:
    """Bool of the image's shape: the largest body of tissue with the air it encloses in a slice.

    All of a radiograph, and of a volume that holds air alone.
    """
    if image.ndim == 2 or not (image > _TISSUE).any():
        return np.ones(image.shape, bool)
    parts, _ = ndimage.label(image > _TISSUE)
    body = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    for z in range(body.shape[2]):
        body[:, :, z] = ndimage.binary_fill_holes(body[:, :, z])
    return body


def localise(cases: Callable[[], Iterator[Case]], draw: Callable[[np.ndarray], np.ndarray],
             findings: Sequence[str], *, resamples: int = 1000, seed: int = 0,
             level: float = 0.95) -> dict[str, Any]:
    """Scores the maps of all cases that have a region.

    Args:
        cases: yields them, in the same order whenever it is called; it is called twice, so that
            no map and no region has to be kept.
        draw: image -> maps [P, *shape] ≥ 0 in the order of `findings`, as `heatmap.mapper` gives.
        findings: P names.
        resamples, seed, level: of the bootstrap over patients.

    Returns:
        {"rules", "counts", "macro", "findings"}; "macro" and every finding hold for each of
        `RULES` {"value", "low", "high", "against": {NAME: {"level", "gain": {"value", "low",
        "high"}}}}: the score, what NAME scores, and the difference of the two.

    Raises:
        UserError: no case has a region of these findings, or only one patient has.
    """
    rows: list[_Row] = []
    points: dict[str, list[np.ndarray]] = {name: [] for name in findings}
    for number, case in enumerate(cases()):
        wanted = [name for name in findings if name in case.regions]
        if not wanted:
            continue
        marks = {name: marks_of(heat)
                 for name, heat in zip(findings, draw(case.image), strict=True)}
        body = body_of(case.image)
        for name in wanted:
            rows.append(_Row(name, case.patient, number,
                             _score_region(name, case.regions[name], marks, body)))
            points[name].append(marks[name].highest)
    if not rows:
        raise UserError("no volume has a place of one of the findings to score heat-maps against; "
                        "give a data set with boxes, or masks")
    _add_other_patients(rows, cases(), points)
    return {"rules": dict(RULES), "counts": {
        "regions": len(rows), "volumes": len({row.volume for row in rows}),
        "patients": len({row.patient for row in rows})},
        **_summary(rows, findings, resamples, seed, level)}


class _Row(NamedTuple):
    """One region: its scores by (rule, "") and, of what it stands beside, by (rule, name)."""

    finding: str
    patient: str
    volume: int
    scores: dict[tuple[str, str], float]


def _pointing(highest: np.ndarray, region: np.ndarray) -> float:
    return float((region.ravel()[highest] if highest.size else region).mean())


def _score_region(name: str, region: np.ndarray, marks: Mapping[str, Marks],
                  body: np.ndarray) -> dict[tuple[str, str], float]:
    scores = {(rule, ""): value for rule, value in score_marks(marks[name], region).items()}
    inside = np.count_nonzero(region & body)
    scores["pointing", "body"] = inside / np.count_nonzero(body)
    scores["dice", "body"] = 2.0 * inside / (np.count_nonzero(region) + np.count_nonzero(body))
    others = [score_marks(mark, region) for other, mark in marks.items() if other != name]
    for rule in RULES:
        scores[rule, "other_prompts"] = float(np.mean([other[rule] for other in others])) \
            if others else float("nan")
    return scores


def _add_other_patients(rows: Sequence[_Row], cases: Iterator[Case],
                        points: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Scores the regions by the same prompt's points on other patients."""
    by_volume: dict[int, list[_Row]] = {}
    for row in rows:
        by_volume.setdefault(row.volume, []).append(row)
    owners = {name: [row.patient for row in rows if row.finding == name] for name in points}
    for number, case in enumerate(cases):
        for row in by_volume.get(number, []):
            region = case.regions[row.finding]
            hits = [_pointing(highest, region) for owner, highest
                    in zip(owners[row.finding], points[row.finding], strict=True)
                    if owner != row.patient]
            row.scores["pointing", "other_patients"] = float(np.mean(hits)) if hits \
                else float("nan")


def _summary(rows: Sequence[_Row], findings: Sequence[str], resamples: int, seed: int,
             level: float) -> dict[str, Any]:
    """Means per finding and their macro, with intervals over resampled patients."""
    present = [name for name in findings if any(row.finding == name for row in rows)]
    member = np.array([[row.finding == name for name in present] for row in rows], np.float64)
    grouped = group_patients([row.patient for row in rows])
    weights = np.concatenate([counts[:, grouped.code] for counts in draws(
        len(grouped.names), resamples, seed)]).astype(np.float64)

    def means(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """[r, findings] of weights [r, rows]; NaN where no row with a value is left."""
        known = np.isfinite(values)
        total = (weights * known) @ member
        sums = (weights * np.where(known, values, 0.0)) @ member
        return np.where(total > 0, sums / np.maximum(total, 1e-300), np.nan)

    whole = np.ones((1, len(rows)))
    result: dict[str, Any] = {"macro": {}, "findings": {
        name: {"regions": int(count)} for name, count in zip(present, member.sum(0), strict=True)}}
    for rule, references in AGAINST.items():
        own = np.array([row.scores[rule, ""] for row in rows])
        found = {"": (means(whole, own)[0], means(weights, own))}
        for name in references:
            other = np.array([row.scores[rule, name] for row in rows])
            found[name] = (means(whole, own - other)[0], means(weights, own - other))

        def tell(pick: Callable[[np.ndarray], Any], pick_samples: Callable[[np.ndarray], Any],
                 found: Any = found) -> dict[str, Any]:
            told = {name: interval(pick(value), pick_samples(samples), level).as_dict()
                    for name, (value, samples) in found.items()}
            own = told.pop("")
            return {**own, "against": {name: {"level": own["value"] - gain["value"], "gain": gain}
                                       for name, gain in told.items()}}

        result["macro"][rule] = tell(macro, macro_samples)
        for p, name in enumerate(present):
            result["findings"][name][rule] = tell(lambda x, p=p: x[p], lambda x, p=p: x[:, p])
    return result


def localise_source(model: Any, source: Any, protocol: Any, *, method: str = "auto",
                    masks: str | Path | None = None,
                    progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Scores a model's heat-maps on a split with boxes, or with masks; for "localisation".

    A finding's map is that of the mean over its positive prompts, less the mean over its negative
    ones where the protocol contrasts the two: what its score is made of.

    Args:
        model: from `load_model`.
        source: the split, on the model's grid.
        protocol: findings, prompts, score, exclusions, bootstrap.
        method: see `heatmap.heatmaps`.
        masks: folder of ID_FINDING.nii.gz, not zero where the finding is, each on the grid of its
            volume's own file; None takes the boxes of the records.
        progress: called with (volumes done, all volumes).

    Returns:
        What `localise` returns, with "method", "regions" ("boxes" or "masks") and "phantom".

    Raises:
        UserError: as `localise`; volumes of another grid; masks that cannot be read.
    """
    check_recipe(source, model.config.input)
    files = None if masks is None else find_masks(masks, [row.id for row in source.index],
                                                  protocol.findings)
    recipe, done = source.metadata["preprocess"], set()

    def cases() -> Iterator[Case]:
        for number, row in enumerate(source.index):
            if row.id in protocol.exclude or (files is not None and row.id not in files):
                continue
            record = source[number]
            regions = (boxes_to_masks(record["boxes"], record["volume"].shape) if files is None
                       else {name: read_mask(path, recipe)
                             for name, path in files[row.id].items()})
            yield Case(row.patient, centre(record["volume"], model.shape), {
                name: inside for name, mask in regions.items()
                if (inside := centre(mask, model.shape)).any()})
            done.add(row.id)
            if progress is not None:
                progress(len(done), len(source))

    draw = mapper(model, finding_directions(model, protocol, method), method)
    found = localise(cases, draw, protocol.findings, resamples=protocol.resamples,
                     seed=protocol.seed, level=protocol.level)
    return {"method": automatic(model) if method == "auto" else method,
            "regions": "boxes" if files is None else "masks",
            "phantom": source.metadata["source"] == "phantom", **found}


def finding_directions(
        model: Any, protocol: Any, method: str = "auto",
        encode: Callable[[Sequence[str]], np.ndarray] | None = None) -> Directions:
    """The direction of each of a protocol's findings; see `localise_source` and `directions`.

    Raises:
        UserError: the model is judged by its classifier, not by prompts.
    """
    if model.classes:
        raise UserError("heat-maps explain the scores of prompts, and this model is judged by its "
                        "classifier; draw them with a model that has none")
    texts = list(protocol.texts)
    encoded = directions(model, texts, score=protocol.score, method=method,
                         encode=encode)
    row = {text: number for number, text in enumerate(texts)}

    def mean(table: np.ndarray, positive: Sequence[str], negative: Sequence[str]) -> np.ndarray:
        told = table[[row[text] for text in positive]].mean(axis=0)
        return told - table[[row[text] for text in negative]].mean(axis=0) if negative else told

    return Directions(*(np.stack([mean(table, *pair) for pair in zip(
        protocol.positive, protocol.negative, strict=True)]) for table in encoded))


def boxes_to_masks(boxes: Mapping[str, Sequence[Sequence[int]]],
                   shape: Sequence[int]) -> dict[str, np.ndarray]:
    """Bool masks of the findings' half-open voxel boxes (low corner, high corner) in a shape."""
    masks = {}
    for name, found in boxes.items():
        mask = np.zeros(shape, bool)
        for box in found:
            mask[tuple(slice(low, high) for low, high in zip(
                box[:len(shape)], box[len(shape):], strict=True))] = True
        masks[name] = mask
    return masks


def find_masks(folder: str | Path, ids: Sequence[str],
               findings: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Finds ID_FINDING.nii.gz or .nii, blanks of a finding also as "_"; id -> finding -> file.

    Raises:
        UserError: the folder cannot be read, or holds no mask of these volumes and findings.
    """
    folder = Path(folder)
    try:
        there = {path.name: path for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"the masks of {folder} cannot be read ({error.strerror}); give a folder "
                        "of ID_FINDING.nii.gz") from error
    found: dict[str, dict[str, Path]] = {}
    for key in ids:
        for name in findings:
            for form in (name, name.replace(" ", "_")):
                for end in (".nii.gz", ".nii"):
                    if f"{key}_{form}{end}" in there:
                        found.setdefault(key, {})[name] = there[f"{key}_{form}{end}"]
    if not found:
        raise UserError(f"{folder} holds no mask ID_FINDING.nii.gz of these volumes and findings, "
                        f"such as {ids[0]}_{findings[0].replace(' ', '_')}.nii.gz")
    return found


def read_mask(path: str | Path, recipe: Mapping[str, Any]) -> np.ndarray:
    """Reads a mask onto the canonical grid of its volume, bool [X, Y, Z].

    A mask too small for that grid's voxels counts in the voxels its own voxels' centres lie in.

    Args:
        path: a NIfTI file with shape and affine of the volume's own file.
        recipe: "preprocess" of the data set.

    Raises:
        NotACT: it cannot be read or placed.
    """
    stored = read_stored(path)
    marked = stored.values * stored.slope + stored.intercept > 0
    grid = Preprocess(spacing=tuple(recipe["spacing"]), shape=tuple(recipe["shape"]), low=0,
                      high=1000)
    mask = to_canonical(marked.astype(np.int16) * 1000, stored.affine, grid) >= 500
    if mask.any() or not marked.any():
        return mask
    to_grid = np.linalg.inv(canonical_affine(marked.shape, stored.affine, grid)) @ stored.affine
    places = np.rint(np.argwhere(marked) @ to_grid[:3, :3].T + to_grid[:3, 3]).astype(int)
    places = places[((places >= 0) & (places < mask.shape)).all(axis=1)]
    mask[tuple(places.T)] = True
    return mask
