"""Score files of any system against a label file: joins by id, protocols, comparisons."""

import dataclasses

import numpy as np
import pytest

from brgsa_jax.config import UserError
from brgsa_jax.evals.evaluate import compare
from brgsa_jax.evals.metrics import auroc
from brgsa_jax.evals.protocol import Protocol
from brgsa_jax.evals.score_files import evaluate_files
from brgsa_jax.evals.scores import write_labels, write_scores

NAMES = ("Alpha", "Beta", "Gamma")
IDS = tuple(f"v{i}" for i in range(40))
PROTOCOL = Protocol("three", NAMES, resamples=20)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.random((40, 3)) < 0.4
    scores = rng.normal(size=labels.shape) + labels
    write_scores(tmp_path / "s.csv", IDS, NAMES, scores)
    write_scores(tmp_path / "t.csv", IDS, NAMES, scores + rng.normal(size=labels.shape))
    write_labels(tmp_path / "l.csv", IDS, NAMES, labels, [f"p{i // 2}" for i in range(40)])
    return tmp_path


def drop(path, *names):
    """Takes rows away by their id."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if line.split(",")[0] not in names) + "\n")


def test_a_bare_score_file_takes_every_column_and_every_id_for_a_patient(files):
    found, = evaluate_files([files / "s.csv"], files / "l.csv")
    assert found.protocol.findings == NAMES and found.mode == "given"
    assert found.metrics["counts"]["patients"] == 40
    assert found.metrics["decisions"]["rule"] == "heldout-patients"
    assert found.metrics["left_out"] == {"scores": 0, "labels": 0}


def test_labels_may_have_columns_that_are_no_labels(files):
    lines = (files / "l.csv").read_text().splitlines()
    (files / "l.csv").write_text("\n".join(
        [lines[0] + ",age,site", *(line + ",63.5,north" for line in lines[1:])]) + "\n")
    found, = evaluate_files([files / "s.csv"], files / "l.csv", patients="patient")
    assert found.protocol.findings == NAMES and found.metrics["counts"]["patients"] == 20


def test_a_protocol_judges_its_own_findings_of_more_and_can_be_changed(files):
    protocol = dataclasses.replace(PROTOCOL, findings=("Gamma", "Alpha"))
    found, = evaluate_files([files / "s.csv"], files / "l.csv", protocol=protocol,
                            changes={"resamples": 7, "threshold": "test:f1"})
    assert tuple(found.metrics["findings"]) == ("Gamma", "Alpha")
    assert found.metrics["bootstrap"]["resamples"] == 7
    assert found.metrics["decisions"]["rule"] == "test:f1"
    assert found.metrics["protocol"]["name"] == "three"


def test_missing_and_extra_ids_are_refused_unless_told(files):
    drop(files / "s.csv", "v3", "v9")
    drop(files / "l.csv", "v5")
    with pytest.raises(UserError, match=r"1 scored ids have no labels \(v5\) and 2 labelled ids "
                                        r"have no scores \(v3, v9\)"):
        evaluate_files([files / "s.csv"], files / "l.csv")
    found, = evaluate_files([files / "s.csv"], files / "l.csv", allow_missing=True)
    assert set(found.ids) == set(IDS) - {"v3", "v5", "v9"}
    assert found.metrics["left_out"] == {"scores": 1, "labels": 2}


def test_a_judged_finding_cannot_name_the_patients(files):
    with pytest.raises(UserError, match="'Beta' is judged as a finding"):
        evaluate_files([files / "s.csv"], files / "l.csv", patients="Beta")


def test_nothing_in_common_is_refused(files):
    write_scores(files / "s.csv", ("a", "b"), NAMES, np.eye(2, 3))
    with pytest.raises(UserError, match="no id of .*s.csv is in .*l.csv"):
        evaluate_files([files / "s.csv"], files / "l.csv", allow_missing=True)


def test_two_files_are_judged_on_the_same_ids(files):
    drop(files / "t.csv", "v0")
    with pytest.raises(UserError, match="t.csv: .*v0"):
        evaluate_files([files / "s.csv", files / "t.csv"], files / "l.csv")
    lines = (files / "t.csv").read_text().splitlines()
    (files / "t.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    first, second = evaluate_files([files / "s.csv", files / "t.csv"], files / "l.csv",
                                   patients="patient", allow_missing=True)
    assert set(first.ids) == set(second.ids) == set(IDS[1:]) and first.ids != second.ids
    assert first.metrics["left_out"] == {"scores": 1, "labels": 1}
    assert second.metrics["left_out"] == {"scores": 0, "labels": 1}
    assert compare(first, second).auroc.value == pytest.approx(
        first.macro_auroc.value - second.macro_auroc.value)


def test_the_second_file_needs_the_columns_of_the_first(files):
    write_scores(files / "t.csv", IDS, NAMES[:2], np.zeros((40, 2)))
    with pytest.raises(UserError, match=r"t.csv: the scores have no column .Gamma."):
        evaluate_files([files / "s.csv", files / "t.csv"], files / "l.csv")


def test_a_combined_finding_is_read_from_its_parts_or_its_own_column(files):
    protocol = dataclasses.replace(PROTOCOL, findings=("Both", "Gamma"),
                                   combine={"Both": ("Alpha", "Beta")})
    found, = evaluate_files([files / "s.csv"], files / "l.csv", protocol=protocol)
    whole, = evaluate_files([files / "s.csv"], files / "l.csv")
    both = whole.labels[:, :2].any(axis=1), whole.scores["given"][:, :2].max(axis=1)
    assert found.metrics["findings"]["Both"]["auroc"]["value"] == auroc(*both)
    assert found.metrics["findings"]["Both"]["positives"] == both[0].sum()
    own, = evaluate_files([files / "s.csv"], files / "l.csv", protocol=dataclasses.replace(
        protocol, combine={"Gamma": ("Alpha", "Beta")}, findings=("Gamma",)))
    assert own.metrics["findings"]["Gamma"] == whole.metrics["findings"]["Gamma"] | {
        key: own.metrics["findings"]["Gamma"][key] for key in ("auroc", "auprc")}


def test_exclusions_leave_both_tables(files):
    protocol = dataclasses.replace(PROTOCOL, exclude=("v1", "v2", "elsewhere"))
    drop(files / "s.csv", "v2")
    found, = evaluate_files([files / "s.csv"], files / "l.csv", protocol=protocol)
    assert set(found.ids) == set(IDS) - {"v1", "v2"}
    everything = dataclasses.replace(PROTOCOL, exclude=IDS)
    with pytest.raises(UserError, match="0 patient|no id"):
        evaluate_files([files / "s.csv"], files / "l.csv", protocol=everything)


@pytest.mark.parametrize("policy", ["all", "first", "mean"])
def test_reconstructions_of_a_scan_follow_the_protocol(tmp_path, policy):
    rng = np.random.default_rng(1)
    ids = [f"valid_{i}_a_{k}.nii.gz" for i in range(30) for k in (2, 1)]
    labels = np.repeat(rng.random((30, 1)) < 0.4, 2, axis=0)
    scores = rng.normal(size=(60, 1)) + labels
    write_scores(tmp_path / "s.csv", ids, NAMES[:1], scores)
    write_labels(tmp_path / "l.csv", ids, NAMES[:1], labels)
    protocol = Protocol("one", NAMES[:1], resamples=5, reconstructions=policy)
    found, = evaluate_files([tmp_path / "s.csv"], tmp_path / "l.csv", protocol=protocol)
    expected = {"all": (labels[:, 0], scores[:, 0]), "first": (labels[1::2, 0], scores[1::2, 0]),
                "mean": (labels[::2, 0], (scores[::2, 0] + scores[1::2, 0]) / 2)}[policy]
    assert found.metrics["findings"]["Alpha"]["auroc"]["value"] == pytest.approx(
        auroc(*expected), abs=1e-15)
    assert len(found.ids) == len(expected[0])
