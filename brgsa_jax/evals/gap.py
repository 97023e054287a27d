"""The modality gap: how far the clouds of image and text embeddings lie apart.

All figures are of L2-normalised embeddings of matched (volume, report) pairs. A bank that maps
everything onto one point would also bring the centroids together; therefore the distance comes
with the matched and mismatched cosine, with the distance relative to the clouds' own size, and
with what tells a collapsed cloud: effective rank and uniformity.
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
        separability: share of embeddings whose modality a linear classifier tells, on patients it
            has not seen; 0.5 where the modalities are mixed, 1 where a plane parts them.
        alignment: mean ‖v − t‖² of a volume and its own report (Wang and Isola, 2020), 0 to 4.
        uniformity_image, uniformity_text: log mean exp(−2‖x − y‖²) over the embeddings of two
            patients (ibid.); 0 for a single point, about −4 for a sphere evenly covered.
        rank_image, rank_text: effective rank of the embeddings as rows of a matrix, the exponential
            of the entropy of its singular values (Roy and Vetterli, 2007), 1 to min(N,D).
        pairs: number of (volume, report) pairs.
        patients: number of patients.
    """

    distance: Interval
    relative: Interval
    matched: Interval
    mismatched: Interval
    floor: float
    separability: Interval
    alignment: Interval
    uniformity_image: float
    uniformity_text: float
    rank_image: float
    rank_text: float
    pairs: int
    patients: int

    def as_dict(self) -> dict[str, object]:
        """The figures under the names of metrics.json."""
        return {name: value.as_dict() if isinstance(value, Interval) else value
                for name, value in self._asdict().items()}


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
        separable = (counts @ right) / rows
        return np.stack([distance, radius, matched, mismatched, separable], axis=1)

    told = tell_modality(image, text, grouped.code, seed=seed)
    right = per_patient(told.mean(1))

    distance, radius, matched, mismatched, separable = figures(np.ones((1, members)))[0]
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
        floor=float(np.sqrt(noise)),
        separability=interval(separable, samples[:, 4], level),
        # Of unit vectors: ‖v − t‖² = 2 − 2 v·t.
        alignment=interval(2 - 2 * matched, 2 - 2 * samples[:, 2], level),
        uniformity_image=uniformity(image, grouped.code),
        uniformity_text=uniformity(text, grouped.code),
        rank_image=effective_rank(image), rank_text=effective_rank(text),
        pairs=len(image), patients=members)
    return GapSamples(gap, distances)


def tell_modality(image: np.ndarray, text: np.ndarray, patients: np.ndarray, *, folds: int = 5,
                  seed: int = 0) -> np.ndarray:
    """Whether a logistic regression tells each embedding's modality, trained on other patients.

    Args:
        image: [N,D].
        text: [N,D].
        patients: N codes; both embeddings of all volumes of a patient are in one fold.
        folds: at most; no more than there are patients.
        seed: of the folds.

    Returns:
        [N,2] bool, image and text; right for a half where the two are the same.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    both = np.concatenate([image, text])
    kind = np.repeat([0, 1], len(image))
    owners = np.tile(patients, 2)
    right = np.zeros(len(both), bool)
    # One optimum by either; Newton's steps are dear where embeddings are wide.
    solver = "newton-cholesky" if both.shape[1] <= 64 else "lbfgs"
    split = GroupKFold(min(folds, len(np.unique(patients))), shuffle=True, random_state=seed)
    for train, test in split.split(both, kind, owners):
        model = make_pipeline(StandardScaler(), LogisticRegression(solver=solver, max_iter=1000))
        right[test] = model.fit(both[train], kind[train]).predict(both[test]) == kind[test]
    return right.reshape(2, -1).T


def effective_rank(x: np.ndarray) -> float:
    """exp of the entropy of the singular values of x[N,D] over their sum (Roy, Vetterli, 2007)."""
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))
    # Embeddings are float32: what is smaller is rounding.
    values = values[values >= 1e-7 * values[-1]]
    if not values.sum():
        return float("nan")
    shares = values / values.sum()
    return float(np.exp(-np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)))))


def uniformity(x: np.ndarray, patients: np.ndarray, *, limit: int = 10_000,
               chunk: int = 1024) -> float:
    """log mean exp(−2‖x_i − x_j‖²) over embeddings x[N,D] of different patients (codes [N]).

    Of more than `limit` embeddings as many, evenly picked, are compared with each other.
    """
    every = -(-len(x) // limit)
    x, patients = x[::every], patients[::every]
    norms, total, pairs = (x ** 2).sum(1), 0.0, 0
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        square = norms[part, None] + norms - 2 * x[part] @ x.T
        apart = patients[part, None] != patients
        total += (np.exp(-2 * np.maximum(square, 0.0)) * apart).sum()
        pairs += int(apart.sum())
    return float(np.log(total / pairs)) if pairs else float("nan")


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
    if np.ptp(both, axis=0).max() < 1e-12:
        # A model that has collapsed: every embedding is the middle.
        middle = np.zeros((len(both), 2))
        return Projection(middle[:len(image)], middle[len(image):], np.zeros(2))
    # Two of many components: the iterative solver, from a fixed start, beats the full one.
    solver = "arpack" if keep < min(both.shape) else "full"
    pca = PCA(n_components=keep, svd_solver=solver, random_state=0).fit(both)
    plane = np.zeros((len(both), 2))
    plane[:, :keep] = pca.transform(both)
    explained = np.zeros(2)
    explained[:keep] = np.nan_to_num(pca.explained_variance_ratio_)
    return Projection(plane[:len(image)], plane[len(image):], explained)
