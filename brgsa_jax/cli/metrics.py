"""The command that judges score files of any system: metrics."""

import argparse

from brgsa_jax.cli.common import Add, results_folder


def add(command: Add) -> None:
    """Adds the command."""
    sub = command("metrics", metrics, "the same metrics from any system's score file")
    sub.add_argument("--scores", required=True, help="CSV, first column the id")
    sub.add_argument("--labels", required=True, help="CSV, first column the id, cells 0 or 1")
    sub.add_argument("--patients", help="column of the labels that names the patient")
    sub.add_argument("--out", required=True)


def metrics(options: argparse.Namespace) -> int:
    """Judges a score file of any system."""
    from brgsa_jax.evals.evaluate import evaluate_files
    from brgsa_jax.evals.metrics import write_metrics
    from brgsa_jax.evals.report import headline

    # Only this file: OUT may well hold the user's own scores.csv and labels.csv.
    path = results_folder(options.out) / "metrics.json"
    evaluation = evaluate_files(options.scores, options.labels, patients=options.patients)
    write_metrics(path, evaluation.metrics)
    print(f"{headline(evaluation)}, metrics {path}")
    return 0
