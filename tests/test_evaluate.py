"""One model's evaluation: the contract of metrics.json, joins by id, and paired comparisons."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from brgsa_jax.config import UserError
from brgsa_jax.evals import evaluate as ev
from brgsa_jax.evals.bootstrap import macro_interval
from brgsa_jax.evals.delong import delong, delong_test
from brgsa_jax.evals.metrics import auroc
from brgsa_jax.evals.protocol import Protocol
from brgsa_jax.evals.score_files import evaluate_files
from brgsa_jax.evals.scores import read_scores

FINDINGS = ("Alpha", "Beta", "Gamma")
PROTOCOL = Protocol("three", FINDINGS, resamples=60)
IDS = tuple(f"v{i}" for i in range(60))
PATIENTS = tuple(f"p{i // 2}" for i in range(60))


def model(seed=0, bank=True, noise=1.0):
    rng = np.random.default_rng(5)
    labels = rng.random((60, 3)) < 0.3
    prompts = rng.normal(size=(3, 10))
    rng = np.random.default_rng(seed)
    image = labels @ prompts + noise * rng.normal(size=(60, 10))
    captions = labels @ prompts + 0.1
    bridged = {} if not bank else {"image_bridged": image + 0.5, "prompts_bridged": prompts + 0.5,
                                   "captions_bridged": captions + 0.5}
    return labels, ev.Embeddings(image, prompts, captions, **bridged)


def judge(seed=0, bank=True, noise=1.0, protocol=PROTOCOL):
    labels, embeddings = model(seed, bank, noise)
    return ev.evaluate(protocol, ids=IDS, patients=PATIENTS, findings=FINDINGS, labels=labels,
                       embeddings=embeddings)


@pytest.fixture(scope="module")
def judged():
    return judge()


def test_metrics_follow_the_contract(judged):
    found = judged
    metrics = found.metrics
    assert metrics["protocol"] == {"name": "three", "hash": PROTOCOL.hash}
    assert set(metrics["macro"]["auroc"]) == {"value", "low", "high"}
    assert tuple(metrics["findings"]) == FINDINGS
    for p, name in enumerate(FINDINGS):
        entry = metrics["findings"][name]
        assert entry["auroc"]["value"] == auroc(found.labels[:, p], found.scores["mean"][:, p])
        assert entry["positives"] == found.labels[:, p].sum()
        assert entry["auprc_chance"] == found.labels[:, p].mean()
    mean = np.mean([entry["auroc"]["value"] for entry in metrics["findings"].values()])
    assert metrics["macro"]["auroc"]["value"] == pytest.approx(mean, abs=1e-15)
    assert tuple(metrics["scores"]) == ("direct", "bridged", "image_bridged", "text_bridged",
                                        "mean")
    assert metrics["score"] == "mean" and metrics["macro"] == metrics["scores"]["mean"]["macro"]
    assert set(metrics["gap"]) == {"direct", "bridged", "image_bridged"}
    assert metrics["counts"] == {"volumes": 60, "patients": 30, "findings": 3}


def test_label_columns_are_taken_by_name(judged):
    labels, embeddings = model()
    turned = ev.evaluate(PROTOCOL, ids=IDS, patients=PATIENTS,
                         findings=("Delta", "Gamma", "Beta", "Alpha"),
                         labels=np.column_stack([labels[:, 0], labels[:, ::-1]]),
                         embeddings=embeddings)
    assert turned.metrics == judged.metrics
    with pytest.raises(UserError, match="no labels for Gamma"):
        ev.evaluate(PROTOCOL, ids=IDS, patients=PATIENTS, findings=("Alpha", "Beta", "X"),
                    labels=labels, embeddings=embeddings)


def test_a_model_without_a_bank_is_judged_by_direct():
    found = judge(bank=False)
    assert found.mode == found.metrics["score"] == "direct"
    assert list(found.metrics["gap"]) == ["direct"]
    labels, embeddings = model(bank=False)
    bare = ev.evaluate(PROTOCOL, ids=IDS, patients=PATIENTS, findings=FINDINGS, labels=labels,
                       embeddings=embeddings._replace(captions=None))
    assert "gap" not in bare.metrics and not bare.projections


def test_a_finding_without_positives_is_listed_and_written_as_null(tmp_path):
    labels, embeddings = model()
    labels[:, 1] = False
    found = ev.evaluate(PROTOCOL, ids=IDS, patients=PATIENTS, findings=FINDINGS, labels=labels,
                        embeddings=embeddings)
    assert found.metrics["undefined"] == ["Beta"]
    ev.write_evaluation(tmp_path, found)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["findings"]["Beta"]["auroc"] == {"value": None, "low": None, "high": None}
    assert written["findings"]["Beta"]["positives"] == 0
    assert written["macro"]["auroc"]["value"] == pytest.approx(
        (written["findings"]["Alpha"]["auroc"]["value"]
         + written["findings"]["Gamma"]["auroc"]["value"]) / 2)


def test_repeated_ids_are_refused():
    labels, embeddings = model()
    with pytest.raises(UserError, match="'v1' comes more than once"):
        ev.evaluate(PROTOCOL, ids=("v1", "v1", *IDS[2:]), patients=PATIENTS, findings=FINDINGS,
                    labels=labels, embeddings=embeddings)


def test_files_judged_again_give_the_same_numbers_in_any_row_order(tmp_path, judged):
    found = judged
    files = ev.write_evaluation(tmp_path, found)
    assert {file.name for file in files} == {
        "scores.csv", "scores_direct.csv", "scores_bridged.csv", "scores_image_bridged.csv",
        "scores_text_bridged.csv", "labels.csv", "metrics.json", "metrics.csv"}
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "turned.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    again, = evaluate_files([tmp_path / "scores.csv"], tmp_path / "turned.csv",
                            patients="patient",
                            protocol=dataclasses.replace(PROTOCOL, name="three"))
    assert again.metrics["macro"] == found.metrics["macro"]
    assert again.metrics["findings"] == found.metrics["findings"]
    assert again.ids == read_scores(tmp_path / "scores.csv").ids


def test_comparison_is_paired_and_survives_another_row_order():
    good, poor = judge(0), judge(1, bank=False, noise=6.0)
    found = ev.compare(good, poor)
    assert found.auroc.value == pytest.approx(good.macro_auroc.value - poor.macro_auroc.value)
    assert found.auroc.low > 0
    assert set(found.distance) == {("direct", "direct"), ("bridged", "direct"),
                                   ("image_bridged", "direct")}
    assert ev.compare(good, good).auroc == (0.0, 0.0, 0.0, 0)

    labels, embeddings = model(1, bank=False, noise=6.0)
    order = np.random.default_rng(0).permutation(60)
    turned = ev.evaluate(PROTOCOL, ids=[IDS[i] for i in order],
                         patients=[PATIENTS[i] for i in order], findings=FINDINGS,
                         labels=labels[order], embeddings=ev.Embeddings(
                            embeddings.image[order], embeddings.prompts,
                            embeddings.captions[order]))
    other = ev.compare(good, turned)
    np.testing.assert_allclose(other.auroc[:3], found.auroc[:3], atol=1e-12)
    np.testing.assert_allclose(other.distance["direct", "direct"][:3],
                               found.distance["direct", "direct"][:3], atol=1e-12)


def test_comparison_of_different_volumes_is_refused(judged):
    other = dataclasses.replace(judged, ids=tuple(f"w{i}" for i in range(60)))
    with pytest.raises(UserError, match="same volumes"):
        ev.compare(judged, other)


@pytest.mark.parametrize("rule", ["heldout-patients", "ctclip-test"])
def test_decisions_stand_beside_the_constant_negative(rule, judged):
    found = judge(protocol=dataclasses.replace(PROTOCOL, threshold=rule)).metrics["decisions"]
    assert found["rule"] == rule and found["optimistic"] == (rule == "ctclip-test")
    labels = judged.labels
    assert found["all_negative"]["accuracy"] == pytest.approx(1 - labels.mean())
    assert found["macro"]["recall"] > 0.5 and found["all_negative"]["recall"] == 0
    assert "decisions" not in judged.metrics


def test_the_constant_negative_stands_in_every_result(judged):
    found = judged
    row = found.metrics["all_negative"]
    assert row["macro"]["accuracy"] == pytest.approx(1 - found.labels.mean())
    assert row["findings"]["Beta"]["accuracy"] == pytest.approx(1 - found.labels[:, 1].mean())
    for p, name in enumerate(FINDINGS):
        assert found.metrics["findings"][name]["prevalence"] == found.labels[:, p].mean()


def test_the_published_score_is_the_mean_of_direct_and_image_bridged(judged):
    found = judged
    np.testing.assert_allclose(
        found.scores["mean"], (found.scores["direct"] + found.scores["image_bridged"]) / 2,
        rtol=0, atol=1e-15)
    assert (found.metrics["findings"]["Alpha"]["auroc"]
            == found.metrics["scores"]["mean"]["findings"]["Alpha"]["auroc"])


def test_groups_have_a_macro_and_an_interval_of_their_own(judged):
    found = judge(protocol=dataclasses.replace(
        PROTOCOL, groups={"head": ("Gamma", "Alpha"), "tail": ("Beta",)}))
    groups = found.metrics["groups"]
    values, samples = found.values["mean"], found.samples["mean"]
    head = macro_interval(values.auroc[[0, 2]], samples.auroc[:, [0, 2]])
    assert groups["head"]["auroc"] == head.as_dict()
    assert groups["head"]["findings"] == ["Gamma", "Alpha"]
    assert groups["tail"]["auprc"] == found.metrics["findings"]["Beta"]["auprc"]
    assert groups["tail"]["auprc_chance"] == found.labels[:, 1].mean()
    assert judged.metrics["groups"] == {}


def test_delong_stands_beside_the_bootstrap(judged):
    found = judged
    for p, name in enumerate(FINDINGS):
        entry = found.metrics["findings"][name]
        expected = delong(found.labels[:, p], found.scores["mean"][:, p])
        assert entry["delong"] == expected.as_dict()
        assert entry["delong"]["value"] == pytest.approx(entry["auroc"]["value"], abs=1e-14)


def test_calibration_is_judged_unless_left_out(judged):
    found = judged
    assert set(found.metrics["calibration"]) >= {"raw", "temperature", "platt", "prevalence"}
    bare = ev.judge(PROTOCOL, "mean", IDS, PATIENTS, found.labels, {"mean": found.scores["mean"]},
                    {}, {}, calibrated=False)
    assert "calibration" not in bare.metrics
    assert bare.metrics["findings"] == found.metrics["findings"]


def test_scores_that_are_not_finite_are_refused_by_name(judged):
    found = judged
    scores = found.scores["mean"].copy()
    scores[7, 1] = np.nan
    with pytest.raises(UserError, match="'mean' of 'v7' for 'Beta' is not finite .1 in all"):
        ev.judge(PROTOCOL, "mean", IDS, PATIENTS, found.labels, {"mean": scores}, {}, {})


def test_comparison_has_both_macros_and_delong_for_every_finding():
    good, poor = judge(0), judge(1, noise=6.0)
    found = ev.compare(good, poor)
    assert found.macro["auroc"].interval == found.auroc
    assert found.macro["auroc"].reversed_share < 0.05
    assert found.macro["auprc"].interval.value == pytest.approx(
        good.metrics["macro"]["auprc"]["value"] - poor.metrics["macro"]["auprc"]["value"])
    for p, name in enumerate(FINDINGS):
        entry = found.findings[name]
        assert entry.delong == delong_test(good.labels[:, p], good.scores["mean"][:, p],
                                           poor.scores["mean"][:, p])
        assert entry.interval.value == pytest.approx(entry.delong.value, abs=1e-14)
    written = found.as_dict()
    assert written["macro"]["auroc"]["reversed_share"] == found.macro["auroc"].reversed_share
    assert set(written["findings"]["Beta"]["auroc"]) == {"value", "low", "high", "reversed_share",
                                                         "delong"}


def test_comparison_under_other_labels_is_refused(judged):
    other = judged
    labels = other.labels.copy()
    labels[4, 2] = ~labels[4, 2]
    with pytest.raises(UserError, match="same labels"):
        ev.compare(judged, dataclasses.replace(other, labels=labels))


def test_metrics_csv_has_one_row_a_finding_with_every_figure(tmp_path):
    found = judge(protocol=dataclasses.replace(PROTOCOL, threshold="heldout-patients:f1"))
    path = ev.write_judged(tmp_path, found)[1]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["finding"] for row in rows] == list(FINDINGS)
    entry = found.metrics["findings"]["Beta"]
    assert float(rows[1]["auroc_low"]) == entry["auroc"]["low"]
    assert float(rows[1]["prevalence"]) == entry["prevalence"]
    decided = found.metrics["decisions"]["findings"]["Beta"]
    assert {name: float(rows[1][name]) for name in decided} == decided
    assert float(rows[1]["all_negative_accuracy"]) == 1 - entry["prevalence"]
    assert float(rows[1]["brier_platt"]) == (
        found.metrics["calibration"]["platt"]["findings"]["Beta"]["brier"])
