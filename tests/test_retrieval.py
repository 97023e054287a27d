"""Retrieval against its definitions, over all orders of what is tied, and the known floors."""

import itertools

import numpy as np
import pytest

from brgsa_jax.config import UserError
from brgsa_jax.evals.protocol import Protocol
from brgsa_jax.evals.retrieval import both_sides, directions, retrieve
from brgsa_jax.evals.run import Cases, evaluate_embedded
from brgsa_jax.evals.scores import score_matrix

KS = (1, 2, 4, 9)


def jaccard(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def by_definition(scores, relevant, kept, labels, ks=KS):
    """The figures of one query by their definitions, averaged over all orders of equal scores."""
    items = np.flatnonzero(kept)
    blocks = [list(items[scores[items] == value]) for value in np.unique(scores[items])[::-1]]
    orders = [list(itertools.chain(*parts)) for parts in itertools.product(
        *(list(itertools.permutations(block)) for block in blocks))]
    rows = []
    for order in orders:
        good = relevant[order]
        precision = np.cumsum(good) / np.arange(1, len(order) + 1)
        agree = np.array([labels[item] for item in order])
        rows.append([(good[:k].any(), (precision * good)[:k].sum() / max(min(k, good.sum()), 1),
                      agree[:k].mean()) for k in ks])
    return np.mean(rows, axis=0), bool(relevant[items].any())


def case(seed, queries=7, gallery=6, distinct=4):
    """Embeddings of few distinct values, so that scores tie within and across the cut-offs."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(distinct, 3))
    codes = rng.integers(3, size=queries + gallery)
    owners = rng.integers(4, size=queries + gallery)
    labels = rng.random((queries + gallery, 4)) < 0.4
    return (points[rng.integers(distinct, size=queries)] * rng.uniform(0.5, 2, (queries, 1)),
            points[rng.integers(distinct, size=gallery)],
            [(codes[:queries], codes[queries:])], (owners[:queries], owners[queries:]),
            (labels[:queries], labels[queries:]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("excluding", [False, True])
def test_figures_equal_their_definitions_over_all_orders_of_ties(seed, excluding):
    queries, gallery, relations, owners, labels = case(seed)
    again = [*relations, (owners[0] % 2, owners[1] % 2 + 1)]
    found = retrieve(queries, gallery, again, exclude=owners if excluding else None,
                     labels=labels, ks=KS, resamples=3)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery)]
    scores = np.round(unit[0] @ unit[1].T, 6)
    expected, answered, open_ = [], [], []
    for i in range(len(queries)):
        relevant = np.any([q[i] == g for q, g in again], axis=0)
        kept = owners[1] != owners[0][i] if excluding else np.ones(len(gallery), bool)
        if not kept.any():
            continue
        agree = [jaccard(labels[0][i], row) for row in labels[1]]
        figures, has = by_definition(scores[i], relevant, kept, agree)
        expected.append(figures)
        answered.append(has)
        # A constant score is a random order.
        chance, _ = by_definition(np.zeros(len(gallery)), relevant, kept, agree)
        open_.append(chance)
    expected, open_ = np.array(expected), np.array(open_)
    assert found.with_positive == sum(answered) and found.queries == 7 and found.gallery == 6
    for n, k in enumerate(KS):
        for column, figures in enumerate((found.recall, found.average_precision,
                                          found.label_jaccard)):
            rows = np.array(answered) if column < 2 else slice(None)
            assert figures[k].found.value == pytest.approx(expected[rows, n, column].mean(),
                                                           abs=1e-6), (k, column)
            assert figures[k].chance == pytest.approx(open_[rows, n, column].mean(), abs=1e-6)
    constant = retrieve(np.ones((7, 3)), np.ones((6, 3)), again, labels=labels, ks=KS,
                        exclude=owners if excluding else None, resamples=3)
    for figures in (constant.recall, constant.average_precision, constant.label_jaccard):
        for figure in figures.values():
            assert figure.found.value == pytest.approx(figure.chance, abs=1e-12)
    assert constant.median_rank == constant.median_rank_chance


def test_a_chunk_changes_no_figure_and_neither_does_float32():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(300, 32))
    text = image + 2 * rng.normal(size=(300, 32))
    codes = rng.integers(150, size=300)
    labels = rng.random((300, 6)) < 0.3
    whole, *others = (retrieve(text, image, [(codes, codes)], labels=(labels, labels),
                               patients=[str(i // 2) for i in range(300)], chunk=chunk,
                               resamples=20) for chunk in (300, 1, 7, 128, 1000))
    for other in others:
        np.testing.assert_equal(other, whole)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, image)]
    order = np.argsort(-(unit[0] @ unit[1].T), axis=1)
    good = codes[order] == codes[:, None]
    first = good.argmax(axis=1) + 1
    assert whole.median_rank == np.quantile(first, 0.5, method="inverted_cdf")
    ranks = np.arange(1, 301)
    precision = good * np.cumsum(good, 1) / ranks
    agree = np.array([[jaccard(labels[i], labels[j]) for j in order[i, :50]] for i in range(300)])
    for k in (1, 5, 10, 50):
        assert whole.recall[k].found.value == pytest.approx((first <= k).mean(), abs=1e-12)
        assert whole.average_precision[k].found.value == pytest.approx(
            (precision[:, :k].sum(1) / np.minimum(good.sum(1), k)).mean(), abs=1e-12)
        assert whole.label_jaccard[k].found.value == pytest.approx(agree[:, :k].mean(), abs=1e-6)


def test_right_pairs_come_first_and_a_perfect_model_reaches_one():
    eye = np.eye(5)
    found = retrieve(eye, 3 * eye, [(range(5), range(5))], resamples=10)
    assert found.recall[1] == ((1.0, 1.0, 1.0, 0), pytest.approx(0.2), 5)
    assert found.average_precision[5].found.value == 1.0
    assert (found.median_rank, found.median_rank_chance) == (1, 3)
    assert found.label_jaccard == {}
    assert retrieve(eye, -eye, [(range(5), range(5))], ks=(4, 5), resamples=1).recall[4][0][0] == 0


def test_chance_is_exact_in_a_large_gallery():
    items = 50_000
    found = retrieve(np.eye(2, 3), np.tile([[0.0, 0, 1]], (items, 1)),
                     [([0, 1], [0, 1, *[2] * (items - 2)])], ks=(1, 5, 50, 100), resamples=2)
    for k in (1, 5, 50, 100):
        assert found.recall[k].chance == pytest.approx(k / items, abs=1e-9 if k > 64 else 1e-14)
        assert found.recall[k].found.value == pytest.approx(found.recall[k].chance, abs=1e-14)
        harmonic = sum(1 / place for place in range(1, k + 1))
        assert found.average_precision[k].chance == pytest.approx(harmonic / items, abs=1e-14)
    assert found.median_rank == found.median_rank_chance == items / 2


def test_intervals_are_over_patients_and_not_over_queries():
    rng = np.random.default_rng(1)
    image = np.repeat(rng.normal(size=(60, 16)), 4, axis=0)
    text = np.repeat(rng.normal(size=(60, 16)), 4, axis=0) + image
    codes = np.arange(240)
    owners = [f"p{i // 4}" for i in range(240)]

    def width(patients):
        found = retrieve(text, image, [(codes // 4, codes // 4)], patients=patients).recall[1].found
        assert found.low < found.value < found.high
        return found.high - found.low

    assert width(owners) / width(None) == pytest.approx(2, rel=0.2)


def test_queries_without_a_right_answer_are_counted_and_left_out():
    image = np.random.default_rng(0).normal(size=(6, 4))
    owners = list("aabbcc")
    found = directions(image, image, captions=list("uuvwxx"), findings=list("uuvvxx"),
                       labels=np.eye(6, dtype=bool), patients=owners, resamples=5)
    across = found["volume_to_volume"]
    # Equal findings are of the same patient only, which is left out.
    assert across.with_positive == 0 and across.queries == 6
    assert np.isnan(across.recall[1].found.value) and np.isnan(across.median_rank)
    assert across.recall[1].queries == 0 and across.label_jaccard[1].queries == 6
    # Captions v and w differ; the scan is the same, for its findings and its patient are.
    for name in ("report_to_volume", "volume_to_report"):
        assert found[name].with_positive == 6
        assert found[name].recall[1].chance == pytest.approx(2 / 6)
    alone = retrieve(image, image, [(range(6), range(6))], exclude=([0] * 6, [0] * 6),
                     labels=(np.eye(6), np.eye(6)), resamples=5)
    assert np.isnan(alone.label_jaccard[1].found.value) and alone.label_jaccard[1].queries == 0


def test_a_report_of_many_volumes_has_as_many_right_answers():
    image = np.array([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]])
    text = np.array([[0.0, 1], [1, 0], [0, 1], [1, 0]])
    options = {"findings": range(4), "labels": np.eye(4, dtype=bool), "patients": range(4),
               "resamples": 5, "ks": (1, 2)}
    apart = directions(image, text, captions=range(4), **options)["report_to_volume"]
    same = directions(image, text, captions=[0, 1, 1, 0], **options)["report_to_volume"]
    assert apart.recall[1].found.value == 0.0
    assert same.recall[1].found.value == 0.5
    assert same.average_precision[2].found.value == pytest.approx((0.25 + 0.25 + 0.5 + 0.5) / 4)


@pytest.mark.parametrize("mode", ["direct", "bridged", "image_bridged", "text_bridged", "mean"])
def test_sides_have_the_score_as_their_cosine(mode):
    parts = np.random.default_rng(2).normal(size=(4, 5, 3))
    image, text = both_sides(mode, parts[0], parts[1], parts[2], parts[3])
    assert score_matrix(image, text, mode="direct") == pytest.approx(
        score_matrix(*parts, mode=mode), abs=1e-14)


def script_floor(agreement, chance, ks):
    """What CT-CLIP's script shows of a model that knows the scan again and guesses otherwise.

    It leaves the query and its second reconstruction in the gallery, calls the mean Jaccard index
    average precision, and never empties the list that it averages over cut-offs.
    """
    kept = [(min(k, 2) * agreement + max(k - 2, 0) * chance) / k for k in ks]
    return [np.mean(kept[:n + 1]) for n in range(len(ks))]


def test_floors_of_random_embeddings():
    ks = (1, 5, 10, 50)
    # As measured with the script on labels of CT-RATE, 11.4 % of whose queries have no label.
    np.testing.assert_allclose(script_floor(0.886, 0.151, ks), [0.886, 0.667, 0.544, 0.453],
                               atol=0.003)
    rng = np.random.default_rng(0)
    scans = 700
    # Findings from common to rare, and several at once in the ill.
    severity = 0.6 * rng.normal(size=(scans, 1))
    labels = severity + rng.normal(size=(scans, 18)) > np.linspace(0.2, 2.2, 18)
    assert 0.15 < labels.mean() < 0.25
    labels = np.repeat(labels, 2, axis=0)
    patients = np.repeat(np.arange(scans), 2)
    image = np.repeat(rng.normal(size=(scans, 24)), 2, axis=0)
    image += 1e-3 * rng.normal(size=image.shape)
    options = {"labels": (labels, labels), "ks": ks, "patients": patients}
    relation = (patients, patients)
    script = retrieve(image, image, [relation], **options, resamples=2).label_jaccard
    kept = [script[k].found.value for k in ks]
    shown = [np.mean(kept[:n + 1]) for n in range(len(ks))]
    honest = retrieve(image, image, [relation], exclude=relation, **options,
                      resamples=300).label_jaccard
    floor = script_floor(labels.any(axis=1).mean(), honest[1].chance, ks)
    np.testing.assert_allclose(shown, floor, atol=0.01)
    assert floor[1] > 0.6 and floor[3] > 0.4
    for k in ks:
        figure = honest[k]
        assert figure.found.low < figure.chance < figure.found.high, k
        assert figure.chance == pytest.approx(0.15, abs=0.04)


def test_an_evaluation_of_a_split_holds_the_three_directions():
    """Captions that say the same in another order are the same; the score is the judged one."""
    found = [("A", "B"), ("B", "A"), ("C",), (), ("C", "A"), ("C", "A")] * 4
    ids = [f"v{i}" for i in range(24)]
    patients = [f"p{i // 2}" for i in range(24)]
    names = ("A", "B", "C")
    labels = np.array([[name in row for name in names] for row in found])
    rng = np.random.default_rng(0)
    words = dict(zip((*names, "nothing"), rng.normal(size=(4, 8)), strict=True))

    class Model:
        bank = None

        def encode_text(self, texts):
            self.texts = list(texts)
            return np.stack([sum(words[name] for name in words if name in text.split())
                             for text in texts])

    model, protocol = Model(), Protocol("three", names, resamples=20)
    image = np.stack([sum((words[name] for name in row), words["nothing"] * (not row))
                      for row in found]) + 0.01 * rng.normal(size=(24, 8))
    metrics = evaluate_embedded(model, image, Cases(ids, patients, found, names, labels), protocol,
                                normal_caption="nothing").metrics
    told = metrics["retrieval"]
    assert list(told) == ["report_to_volume", "volume_to_report", "volume_to_volume"]
    for entry in told.values():
        assert entry["queries"] == entry["gallery"] == entry["with_positive"] == 24
        for figure in ("recall", "map", "label_jaccard"):
            assert list(entry[figure]) == ["1", "5", "10", "50"]
            assert set(entry[figure]["1"]) == {"value", "low", "high", "chance", "queries"}
    across = told["volume_to_volume"]
    # Two of each six volumes have other findings than any other patient's, {C} and {}: 4 a kind.
    assert across["recall"]["1"]["value"] == across["map"]["1"]["value"] == 1
    kinds = [frozenset(row) for row in found]
    chance = np.mean([np.mean([kinds[i] == kinds[j] for j in range(24)
                               if patients[i] != patients[j]]) for i in range(24)])
    assert across["recall"]["1"]["chance"] == pytest.approx(chance)
    report = told["report_to_volume"]
    assert report["recall"]["1"]["value"] == 1
    equal = np.mean([[a == b for b in kinds] for a in kinds])
    assert report["recall"]["1"]["chance"] == pytest.approx(equal)
    assert {"There is A There is B", "There is B There is A"} <= set(model.texts)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"queries": np.zeros((2, 4))}, ValueError, "do not fit"),
    ({"gallery": np.zeros((0, 3))}, ValueError, "do not fit"),
    ({"positives": []}, ValueError, "do not fit"),
    ({"positives": [([0], [0, 1])]}, ValueError, "do not fit"),
    ({"exclude": ([0, 1], [0])}, ValueError, "do not fit"),
    ({"labels": (np.zeros((2, 1)), np.zeros((3, 1)))}, ValueError, "do not fit"),
    ({"ks": (0, 5)}, ValueError, "do not fit"), ({"chunk": 0}, ValueError, "do not fit"),
    ({"queries": np.full((2, 3), np.nan)}, UserError, "not finite"),
    ({"patients": ["a", "a"]}, UserError, "at least two"),
])
def test_what_cannot_be_ranked_is_refused(change, error, message):
    arguments = {"queries": np.eye(2, 3), "gallery": np.eye(2, 3),
                 "positives": [([0, 1], [0, 1])]} | change
    with pytest.raises(error, match=message):
        retrieve(**arguments)
