"""The command `brgsa metrics`: its files, its table, its refusals, and what it imports."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from brgsa_jax.cli import main
from brgsa_jax.evals.scores import write_labels, write_scores

NAMES = ("Lung nodule", "Atelectasis", "=Emphysema")
IDS = [f"v{i}" for i in range(80)]


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.random((80, 3)) < (0.5, 0.3, 0.15)
    scores = rng.normal(size=labels.shape) + 1.5 * labels
    write_scores(tmp_path / "s.csv", IDS, NAMES, scores)
    write_scores(tmp_path / "t.csv", IDS, NAMES, scores + 3 * rng.normal(size=labels.shape))
    write_labels(tmp_path / "l.csv", IDS, NAMES, labels, [f"p{i // 2}" for i in range(80)])
    return tmp_path


def run(files, *more, scores="s.csv", labels="l.csv"):
    return main(["metrics", "--scores", str(files / scores), "--labels", str(files / labels),
                 "--patients", "patient", "--resamples", "50", "--out", str(files / "out"), *more])


def test_everything_at_once_in_a_process_of_its_own_without_jax(files):
    code = ("import sys\nfrom brgsa_jax.cli import main\n"
            "code = main(sys.argv[1:])\n"
            "heavy = {'jax', 'flax', 'orbax', 'matplotlib', 'pandas'} & set(sys.modules)\n"
            "assert not heavy, heavy\nsys.exit(code)")
    done = subprocess.run(
        [sys.executable, "-c", code, "metrics", "--scores", files / "s.csv", "--labels",
         files / "l.csv", "--compare", files / "t.csv", "--calibrate", "--report", "--out",
         files / "out"],
        capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {path.name for path in (files / "out").iterdir()} == {"metrics.json", "metrics.csv",
                                                             "report.html"}
    page = (files / "out" / "report.html").read_text()
    assert "t.csv" in page and "=Emphysema" in page and "Calibration" in page
    found = json.loads((files / "out" / "metrics.json").read_text())
    assert set(found) >= {"macro", "findings", "groups", "decisions", "calibration", "comparison",
                          "all_negative", "left_out"}
    assert found["comparison"]["with"] == "t.csv"
    difference = found["comparison"]["macro"]["auroc"]
    assert difference["low"] > 0
    value, low, high = (f"{difference[key]:.3f}" for key in ("value", "low", "high"))
    assert f"macro AUROC minus that of t.csv: +{value} ({low}–{high}), zero or " in done.stdout
    assert "every id is taken for a patient of its own" in done.stdout


def test_the_table_shows_every_finding_beside_the_row_that_always_says_no(files, capsys):
    assert run(files) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((files / "out" / "metrics.json").read_text())
    value = found["macro"]["auroc"]
    estimate = f"{value['value']:.3f} ({value['low']:.3f}–{value['high']:.3f})"
    assert lines[0] == f"macro AUROC {estimate}, metrics {files / 'out' / 'metrics.json'}"
    assert lines[1].split() == ["prev", "AUROC", "(95", "%)", "AUPRC", "(95", "%)", "acc", "bal",
                                "F1+", "F1w", "prec", "rec", "spec"]
    rows = {line[:12].strip(): line[12:].split() for line in lines[2:7]}
    assert list(rows) == [*NAMES, "macro", "all negative"]
    negative = found["decisions"]["all_negative"]
    assert rows["all negative"] == [
        f"{found['macro']['auprc_chance']:.3f}", "0.500", f"{found['macro']['auprc_chance']:.3f}",
        *(f"{negative[name]:.3f}" for name in ("accuracy", "balanced_accuracy", "f1_positive",
                                               "f1_weighted", "precision", "recall",
                                               "specificity"))]
    assert rows["macro"][1:3] == estimate.split()
    assert rows["Atelectasis"][0] == f"{found['findings']['Atelectasis']['prevalence']:.3f}"
    # Columns stand under each other.
    assert len({len(line) for line in lines[2:7]}) == 1


def test_the_row_is_there_without_a_threshold_too(files, capsys):
    assert run(files, "--threshold", "none") == 0
    text = capsys.readouterr().out
    found = json.loads((files / "out" / "metrics.json").read_text())
    row = found["all_negative"]["macro"]
    assert "decisions" not in found
    assert (f"always answering no: accuracy {row['accuracy']:.3f}, weighted F1 "
            f"{row['f1_weighted']:.3f}") in text


def test_metrics_csv_has_one_row_a_finding_and_runs_no_formula(files):
    assert run(files, "--calibrate") == 0
    with (files / "out" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["finding"] for row in rows] == [*NAMES[:2], "'=Emphysema"]
    assert {"auroc_low", "auprc", "f1_positive", "f1_weighted", "balanced_accuracy",
            "all_negative_f1_weighted", "ece_platt", "brier_raw"} <= set(rows[0])


def test_an_optimistic_rule_is_called_so(files, capsys):
    assert run(files, "--threshold", "test:f1") == 0
    assert "decisions by test:f1; optimistic" in capsys.readouterr().out
    assert run(files, "--threshold", "fixed=0.5") == 0
    assert capsys.readouterr().out.endswith("decisions by fixed=0.5\n")


def test_missing_ids_are_refused_with_the_way_out_unless_told(files, capsys):
    lines = (files / "s.csv").read_text().splitlines()
    (files / "short.csv").write_text("\n".join(lines[:-3]) + "\n")
    assert run(files, scores="short.csv") == 1
    told = capsys.readouterr().err
    assert "3 labelled ids have no scores (v77, v78, v79)" in told and "--allow-missing" in told
    assert run(files, "--allow-missing", scores="short.csv") == 0
    assert "left out: 0 scored ids and 3 labelled ids" in capsys.readouterr().out


def test_a_protocol_by_name_needs_its_findings(files, capsys):
    assert run(files, "--protocol", "ct-rate-18") == 1
    assert "l.csv has no column 'Medical material'" in capsys.readouterr().err
    assert run(files, "--protocol", "ct-rate") == 1
    assert "ct-rate-18" in capsys.readouterr().err


def test_a_finding_of_one_class_is_a_dash_and_named(files, capsys):
    rows = (files / "l.csv").read_text().splitlines()
    (files / "none.csv").write_text("\n".join(
        [rows[0], *(row.rsplit(",", 1)[0] + ",0" for row in rows[1:])]) + "\n")
    assert run(files, labels="none.csv") == 0
    text = capsys.readouterr().out
    assert "undefined, as one class is missing: =Emphysema" in text
    assert "nan" not in text
    found = json.loads((files / "out" / "metrics.json").read_text())
    assert found["findings"]["=Emphysema"]["auroc"]["value"] is None


@pytest.mark.parametrize("rule", ["fixed", "fixed=nan", "best", "test:corner2"])
def test_an_unknown_rule_is_wrong_use(files, rule, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(files, "--threshold", rule)
    assert stopped.value.code == 2
    assert "choices: none, fixed=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(("cell", "told"), [
    ("nan", "'nan' is not a finite number"), ("inf", "'inf' is not a finite number"),
    ("", "'' is not a finite number"), ("high", "'high' is not a finite number")])
def test_a_score_that_is_none_is_named_by_line_and_column(files, cell, told, capsys):
    lines = (files / "s.csv").read_text().splitlines()
    lines[4] = ",".join([*lines[4].split(",")[:2], cell, *lines[4].split(",")[3:]])
    (files / "bad.csv").write_text("\n".join(lines) + "\n")
    assert run(files, scores="bad.csv") == 1
    error = capsys.readouterr().err
    assert told in error and "line 5" in error and "'Atelectasis'" in error
    assert error.count("\n") == 1 and not (files / "out" / "metrics.json").exists()


def test_results_never_replace_what_they_are_made_of(files, capsys):
    (files / "out").mkdir()
    scores = (files / "s.csv").read_bytes()
    (files / "out" / "metrics.csv").write_bytes(scores)
    assert run(files, scores="out/metrics.csv") == 1
    assert "would be overwritten by the results" in capsys.readouterr().err
    assert (files / "out" / "metrics.csv").read_bytes() == scores


def test_a_name_cannot_write_to_the_terminal(files, capsys):
    (files / "t\x1b[31m.csv").write_bytes((files / "t.csv").read_bytes())
    assert run(files, "--compare", str(files / "t\x1b[31m.csv")) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "minus that of t [31m.csv" in text
    (files / "s.csv").write_text((files / "s.csv").read_text().replace("Atel", "Atel\x1b[31m"))
    assert run(files) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_a_half_without_positives_gets_no_threshold_and_is_named(files, capsys):
    write_labels(files / "rare.csv", IDS, NAMES[:1], np.arange(80)[:, None] == 3,
                 [f"p{i // 2}" for i in range(80)])
    write_scores(files / "one.csv", IDS, NAMES[:1], np.arange(80.0)[:, None])
    assert run(files, "--calibrate", scores="one.csv", labels="rare.csv") == 0
    text = capsys.readouterr().out
    assert "no threshold, as a half of the patients lacks a class: Lung nodule" in text
    found = json.loads((files / "out" / "metrics.json").read_text())
    row = found["all_negative"]["macro"]
    assert f"{row['accuracy']:.3f}  0.500  0.000" in text and "nan" not in text
    assert found["findings"]["Lung nodule"]["undefined_resamples"] > 0
    assert found["calibration"]["platt"]["brier"] is None


def test_two_equal_files_do_not_differ(files, capsys):
    assert run(files, "--compare", str(files / "s.csv")) == 0
    assert ("minus that of s.csv: 0.000 (0.000–0.000), zero or reversed in 100%"
            in capsys.readouterr().out)


def test_ids_that_only_the_compared_file_has_are_counted(files, capsys):
    for name in ("s.csv", "l.csv"):
        lines = (files / name).read_text().splitlines()
        (files / name).write_text("\n".join(lines[:-2]) + "\n")
    assert run(files, "--compare", str(files / "t.csv"), "--allow-missing") == 0
    assert ("left out: 0 scored ids and 0 labelled ids, and 2 of t.csv"
            in capsys.readouterr().out)
    found = json.loads((files / "out" / "metrics.json").read_text())
    assert found["comparison"]["left_out"] == 2


def test_a_calibration_before_the_cut_is_told(files, capsys):
    (files / "cut.yaml").write_text(
        "name: cut\nversion: '1'\nclasses: [Lung nodule, Atelectasis]\n"
        "threshold: fixed=0.5\ncalibration: platt\nresamples: 20\n")
    assert run(files, "--protocol", str(files / "cut.yaml")) == 0
    assert capsys.readouterr().out.endswith("decisions by fixed=0.5 after platt\n")
    assert run(files, "--protocol", str(files / "cut.yaml"), "--threshold", "test") == 0
    assert "after platt" not in capsys.readouterr().out
