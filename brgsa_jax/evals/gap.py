"""The modality gap: how far the clouds of image and text embeddings lie apart.

All figures are of L2-normalised embeddings of matched (volume, report) pairs. A bank that maps
everything onto one point would also bring the centroids together; therefore the distance comes
with the matched and mismatched cosine and with the distance relative to the clouds' own size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from brgsa_jax.evals.bootstrap import Interval, group_patients, interval, statistic_samples
from brgsa_jax.evals.scores import unit

KINDS = ("direct", "bridged", "image_bridged")
"""The pairs measured: (v,t), (v̂,t̂) and (v̂,t)."""


class Gap(NamedTuple):
    """Modality-gap figures of one kind of pair, with intervals over patients.

    Attributes:
        distance: ‖mean(v/|v|) − mean(t/|t|)‖, between 0 and 2.
        relative: distance divided by the root mean square distance of the embeddings from the
            centroid of their own modality.
        matched: mean cosine of a volume and its own report.
        mismatched: mean cosine of a volume and the report of another patient.
        floor: the distance expected from this many pairs if the true centroids coincided.
        pairs: number of (volume, report) pairs.
        patients: number of patients.
    """

    distance: Interval
    relative: Interval
    matched: Interval
    mismatched: Interval
    floor: float
    pairs: int
    patients: int

    def as_dict(self) -> dict[str, object]:
        """The figures under the names of metrics.json."""
        return {"distance": self.distance.as_dict(), "relative": self.relative.as_dict(),
                "matched": self.matched.as_dict(), "mismatched": self.mismatched.as_dict(),
                "floor": self.floor, "pairs": self.pairs, "patients": self.patients}


class GapSamples(NamedTuple):
    """A Gap and its bootstrap samples [R] of the distance, for paired differences."""

    gap: Gap
    distance: np.ndarray


class Projection(NamedTuple):
    """Joint plane of both modalities: image[N,2], text[N,2] and the variance shares [2]."""

    image: np.ndarray
    text: np.ndarray
    explained: np.ndarray


def measure_gap(image: np.ndarray, text: np.ndarray, patients: Sequence[str], *,
                resamples: int = 1000, seed: int = 0, level: float = 0.95) -> GapSamples:
    """Measures the gap of matched pairs with intervals from a bootstrap over patients.

    A mean of resampled rows carries the sampling noise twice, which pushes every resampled
    distance up. Each resample's squared distance is therefore lowered by the variance that the
    resampling adds, Σ_p ‖Σ_{i∈p}(v_i − t_i) − n_p m‖² / N², which centres the interval on the
    measured value; the square root of the same term is `floor`.

    Args:
        image: [N,D], un-normalised; row i belongs to row i of text.
        text: [N,D].
        patients: N patient ids.
        resamples: number of bootstrap resamples.
        seed: of the draws, shared with every other interval of the evaluation.
        level: coverage.

    Returns:
        The figures and the samples of the distance.

    Raises:
        ValueError: image and text differ in shape.
    """
    if image.shape != text.shape or len(image) != len(patients):
        raise ValueError(f"image {image.shape}, text {text.shape} and {len(patients)} patients "
                         "are not matched pairs")
    image, text = unit(image), unit(text)
    grouped = group_patients(patients)
    members = len(grouped.names)

    def per_patient(rows: np.ndarray) -> np.ndarray:
        total = np.zeros((members, *rows.shape[1:]))
        np.add.at(total, grouped.code, rows)
        return total

    size = per_patient(np.ones(len(image)))
    images, texts = per_patient(image), per_patient(text)
    same = per_patient(np.einsum("nd,nd->n", image, text))
    # Volumes of one patient share a report or nearly so: all their pairs are left out below.
    within = np.einsum("md,md->m", images, texts)
    square_norms = per_patient((image ** 2).sum(1)), per_patient((text ** 2).sum(1))

    def figures(counts: np.ndarray) -> np.ndarray:
        rows = counts @ size
        v, t = counts @ images, counts @ texts
        mean_v, mean_t = v / rows[:, None], t / rows[:, None]
        distance = np.linalg.norm(mean_v - mean_t, axis=1)
        spread = [(counts @ squares) / rows - (mean ** 2).sum(1)
                  for squares, mean in zip(square_norms, (mean_v, mean_t), strict=True)]
        radius = np.sqrt(np.maximum(sum(spread) / 2, 0.0))
        matched = (counts @ same) / rows
        pairs = rows ** 2 - counts ** 2 @ size ** 2
        crossed = np.einsum("rd,rd->r", v, t) - counts ** 2 @ within
        mismatched = np.where(pairs > 0, crossed / np.where(pairs > 0, pairs, 1.0), np.nan)
        return np.stack([distance, radius, matched, mismatched], axis=1)

    distance, radius, matched, mismatched = figures(np.ones((1, members)))[0]
    mean = (images - texts).sum(0) / len(image)
    residual = (images - texts) - size[:, None] * mean
    noise = float((residual ** 2).sum() / len(image) ** 2)

    samples = statistic_samples(figures, members, resamples=resamples, seed=seed)
    distances = np.sqrt(np.maximum(samples[:, 0] ** 2 - noise, 0.0))

    def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        # A collapsed cloud has no size to compare with.
        tiny = whole < 1e-9
        return np.where(tiny, np.nan, part / np.where(tiny, 1.0, whole))

    gap = Gap(
        distance=interval(distance, distances, level),
        relative=interval(float(ratio(distance, radius)), ratio(distances, samples[:, 1]), level),
        matched=interval(matched, samples[:, 2], level),
        mismatched=interval(mismatched, samples[:, 3], level),
        floor=float(np.sqrt(noise)), pairs=len(image), patients=members)
    return GapSamples(gap, distances)


def distance_difference(first: GapSamples, second: GapSamples, level: float = 0.95) -> Interval:
    """Paired interval of the first centroid distance minus the second, of the same draws.

    Raises:
        ValueError: the samples are not of the same patients and number of resamples.
    """
    if (first.gap.patients != second.gap.patients
            or first.distance.shape != second.distance.shape):
        raise ValueError("the two gaps were not measured on the same patients and resamples")
    return interval(first.gap.distance.value - second.gap.distance.value,
                    first.distance - second.distance, level)


def project(image: np.ndarray, text: np.ndarray) -> Projection:
    """First two principal components of both modalities together, of normalised embeddings.

    Args:
        image: [N,D].
        text: [N,D].

    Returns:
        Projection; components that do not exist (D = 1, or fewer points) are zero.
    """
    from sklearn.decomposition import PCA

    both = np.concatenate([unit(image), unit(text)])
    keep = min(2, *both.shape)
    # Two of many components: the iterative solver, from a fixed start, beats the full one.
    solver = "arpack" if keep < min(both.shape) else "full"
    pca = PCA(n_components=keep, svd_solver=solver, random_state=0).fit(both)
    plane = np.zeros((len(both), 2))
    plane[:, :keep] = pca.transform(both)
    explained = np.zeros(2)
    explained[:keep] = np.nan_to_num(pca.explained_variance_ratio_)
    return Projection(plane[:len(image)], plane[len(image):], explained)
