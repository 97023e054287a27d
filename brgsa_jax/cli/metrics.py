"""The command that judges score files of any system: metrics."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from brgsa_jax.cli.common import Add, positive, results_folder
from brgsa_jax.config import UserError


def add(command: Add) -> None:
    """Adds the command."""
    sub = command("metrics", metrics, "the same metrics from any system's score file")
    sub.add_argument("--scores", required=True, help="CSV, first column the id")
    sub.add_argument("--labels", required=True, help="CSV, first column the id, cells 0 or 1")
    sub.add_argument("--patients", help="column of the labels that names the patient")
    sub.add_argument("--protocol", help="name or YAML file; judges its findings [every column of "
                     "the scores]")
    sub.add_argument("--threshold", type=rule, metavar="RULE", help="none, fixed=VALUE, "
                     "heldout-patients or test, the latter two also with :youden or :f1, or "
                     "ctclip-test; on scores as they are, without the protocol's calibration "
                     "[the protocol's; heldout-patients without one]")
    sub.add_argument("--resamples", type=positive, help="of the patients, for the intervals "
                     "[the protocol's; 1000 without one]")
    sub.add_argument("--compare", metavar="SCORES", help="scores of another system on the same "
                     "ids, for paired differences")
    sub.add_argument("--calibrate", action="store_true", help="also calibrate on held-out "
                     "patients, and report calibration errors")
    sub.add_argument("--allow-missing", action="store_true", help="judge the ids that all files "
                     "have, and count the others")
    sub.add_argument("--report", action="store_true", help="also write report.html, one page with "
                     "tables and curves")
    sub.add_argument("--out", required=True, help="folder for metrics.json and metrics.csv")


def rule(text: str) -> str:
    """Type of an argument: a threshold rule."""
    from brgsa_jax.evals.thresholds import parse_rule

    try:
        parse_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def metrics(options: argparse.Namespace) -> int:
    """Judges a score file of any system."""
    from brgsa_jax.evals.evaluate import compare, write_judged
    from brgsa_jax.evals.protocol import get_protocol
    from brgsa_jax.evals.report_text import estimate
    from brgsa_jax.evals.score_files import evaluate_files

    out = results_folder(options.out)
    files = [options.scores, *([options.compare] if options.compare else [])]
    # Only these two: OUT may well hold the user's own scores.csv and labels.csv.
    written = {(out / name).resolve() for name in ("metrics.json", "metrics.csv")}
    for file in (*files, options.labels):
        if Path(file).resolve() in written:
            raise UserError(f"{file} would be overwritten by the results; choose another --out")
    changes = {name: getattr(options, name) for name in ("threshold", "resamples")
               if getattr(options, name) is not None}
    if options.threshold is not None:
        changes["calibration"] = "none"
    evaluations = evaluate_files(
        files, options.labels, patients=options.patients, changes=changes,
        protocol=get_protocol(options.protocol) if options.protocol else None,
        allow_missing=options.allow_missing, calibrated=options.calibrate)
    first = evaluations[0]
    if options.compare:
        other = evaluations[1].metrics
        first.metrics["comparison"] = {
            "with": Path(options.compare).name, "left_out": other["left_out"]["scores"],
            **compare(*evaluations).as_dict()}
    path, _ = write_judged(out, first)
    if options.report:
        _write_report(out / "report.html", files, evaluations, options.labels)
    lines = [f"macro AUROC {estimate(first.macro_auroc)}, metrics {path}",
             *table(first.metrics), *remarks(first.metrics)]
    if not options.patients:
        lines.append("every id is taken for a patient of its own; if not so, add --patients COLUMN")
    for line in lines:
        print("".join(c if c.isprintable() else " " for c in line).rstrip())
    return 0


def _write_report(page: Path, files: list[str], evaluations: list[Any], labels: str) -> None:
    """One page of the score files side by side."""
    from brgsa_jax.evals.report import (
        ModelResult,
        ReportData,
        describe_environment,
        write_report,
    )

    names = [Path(file).name for file in files]
    if len(set(names)) < len(names):
        names = [str(file) for file in files]
    write_report(page, ReportData(
        title=names[0], dataset=Path(labels).name, environment=describe_environment(),
        models=[ModelResult(f"system-{number}", name, evaluation) for number, (name, evaluation)
                in enumerate(zip(names, evaluations, strict=True), 1)]))


_FIGURES = {"accuracy": "acc", "balanced_accuracy": "bal", "f1_positive": "F1+",
            "f1_weighted": "F1w", "precision": "prec", "recall": "rec", "specificity": "spec"}


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines of the table: findings, groups, macro, and the system that always answers "no"."""
    from brgsa_jax.evals.report_text import estimate, number

    decided = found.get("decisions")
    columns = _FIGURES if decided else {}
    rows = [(name, entry["prevalence"], entry, decided and decided["findings"].get(name))
            for name, entry in found["findings"].items()]
    rows += [(name, entry["auprc_chance"], entry, None)
             for name, entry in found["groups"].items()]
    rows += [("macro", found["macro"]["auprc_chance"], found["macro"],
              decided and decided["macro"])]
    chance = found["macro"]["auprc_chance"]
    nothing = (decided and decided["all_negative"]) or found["all_negative"]["macro"]
    rows += [("all negative", chance, {"auroc": 0.5, "auprc": chance}, nothing)]
    wide = min(max(len(name) for name, *_ in rows), 40)
    level = f"({100 * found['bootstrap']['level']:g} %)"
    yield f"{'':{wide}}  {'prev':>5}  {'AUROC ' + level:19}  {'AUPRC ' + level:19}" + "".join(
        f"  {short:>5}" for short in columns.values())
    for name, prevalence, entry, figures in rows:
        line = (f"{name[:wide]:{wide}}  {number(prevalence):>5}  {estimate(entry['auroc']):19}  "
                f"{estimate(entry['auprc']):19}")
        yield line + "".join(f"  {number(figures and figures[key]):>5}" for key in columns)
    if not decided and nothing:
        yield (f"always answering no: accuracy {number(nothing['accuracy'])}, weighted F1 "
               f"{number(nothing['f1_weighted'])}")


def remarks(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines below the table: what was judged and left out, rule, calibration, comparison."""
    from brgsa_jax.evals.report_text import number, percent, signed

    counts, protocol = found["counts"], found["protocol"]
    yield (f"protocol {protocol['name']} {protocol['hash']}; {counts['volumes']} ids of "
           f"{counts['patients']} patients, {found['bootstrap']['resamples']} resamples of them")
    left = found["left_out"]
    compared = found.get("comparison", {}).get("left_out", 0)
    if any(left.values()) or compared:
        yield (f"left out: {left['scores']} scored ids and {left['labels']} labelled ids"
               + (f", and {compared} of {found['comparison']['with']}" if compared else ""))
    if found["undefined"]:
        yield f"undefined, as one class is missing: {', '.join(found['undefined'])}"
    decided = found.get("decisions")
    if decided:
        after = decided["calibration"]
        yield f"decisions by {decided['rule']}" + (f" after {after}" if after != "none" else "") + (
            "; optimistic, as the thresholds were fitted on the labels that are judged"
            if decided["optimistic"] else "")
        unfitted = [name for name in decided["undefined"] if name not in found["undefined"]]
        if unfitted:
            yield (f"no threshold, as a half of the patients lacks a class: {', '.join(unfitted)}; "
                   "the macro of decisions leaves them out, that of AUROC does not")
    for name in ("raw", "temperature", "platt", "prevalence") if "calibration" in found else ():
        entry = found["calibration"][name]
        yield f"calibration {name}: ECE {number(entry['ece'])}, Brier {number(entry['brier'])}"
    if "comparison" in found:
        for figure, entry in found["comparison"]["macro"].items():
            yield (f"macro {figure.upper()} minus that of {found['comparison']['with']}: "
                   f"{signed(entry)}, zero or reversed in {percent(entry['reversed_share'])} of "
                   "the resamples")
