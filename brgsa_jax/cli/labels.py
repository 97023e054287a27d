"""`brgsa data labels`: summaries to labels, and the sheets that readers fill in."""

import argparse
from pathlib import Path
from typing import Any

from brgsa_jax.cli.common import Add, natural, results_folder, terminal


def add(command: Add, commands: Any) -> None:
    """Adds the command to those of `brgsa data`."""
    sub = command("labels", data_labels, "summaries to labels and a sheet to review", into=commands)
    sub.add_argument("summaries", metavar="SUMMARIES", help="JSONL of brgsa summarize")
    sub.add_argument("--out", required=True,
                     help="folder; it remembers what it was asked, but for --review")
    sub.add_argument("--review", action="append", default=[], metavar="SHEET",
                     help="filled-in sheet to apply, may be repeated")
    sub.add_argument("--findings", metavar="NAME,…|@LIST|FILE",
                     help="lists are @ct-rate-18, @ct-rate-lt and @all [@ct-rate-lt]")
    sub.add_argument("--min-positives", type=natural, metavar="N",
                     help="leave out findings drafted in fewer reports [0]")
    sub.add_argument("--negatives", type=natural, metavar="N",
                     help="reports without a finding to read as well, of each finding [50]")
    sub.add_argument("--seed", type=natural, help="of their choice [0]")
    reports = sub.add_argument_group("table of the reports")
    reports.add_argument("--reports", metavar="TABLE", help="CSV, TSV, JSONL or Parquet")
    reports.add_argument("--id-column", metavar="I", help="['id', else the row]")
    reports.add_argument("--text-column", action="append", metavar="C",
                         help="writes the report into the sheets; may be repeated")
    reports.add_argument("--patient-column", metavar="C", help="patients for labels.csv")
    reports.add_argument("--scan-column", metavar="C",
                         help="volumes of one scan have one report, which is reviewed once")


def data_labels(options: argparse.Namespace) -> int:
    """Makes labels of summaries and tells what they come to."""
    from brgsa_jax.summarize.labels import make_labels

    labels = make_labels(
        options.summaries, results_folder(options.out), reviews=options.review,
        findings=options.findings, min_positives=options.min_positives,
        negatives=options.negatives, seed=options.seed, reports=options.reports,
        id_column=options.id_column, text_column=options.text_column,
        patient_column=options.patient_column, scan_column=options.scan_column)
    _tell_findings(labels.findings)
    _tell_files(labels, Path(options.out))
    return 0


def _tell_findings(findings: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    def share(rate: Any) -> str:
        return f"{rate.count}/{rate.of} {rate.low:.0%}–{rate.high:.0%}" if rate.of else ""

    read, corrected, implied = (sum(getattr(tally, name) for tally in findings.values())
                                for name in ("reviewed", "corrected", "implied"))
    table = Table(box=box.SIMPLE)
    table.add_column("finding")
    for column in ("reports", *(("read", "drafts right", "missed") if read else ())):
        table.add_column(column, justify="right", no_wrap=True)
    for name, tally in findings.items():
        told = (str(tally.reviewed), share(tally.right), share(tally.missed)) if read else ()
        table.add_row(name, f"{tally.positive} ({tally.prevalence:.1%})", *told)
    terminal().print(table)
    if read:
        terminal().print(f"{read} labels read, {corrected} of them corrected; {implied} more "
                         "changed by what those imply")


def _tell_files(labels: Any, out: Path) -> None:
    console = terminal()
    for pair in labels.agreement:
        kappa = "undefined" if pair.kappa is None else f"{pair.kappa:.2f}"
        console.print(f"{' and '.join(pair.by)}: {pair.agreed} of {pair.cells} answers agree, "
                      f"kappa {kappa}")
    if labels.too_rare:
        console.print(f"too rare: {', '.join(f'{n} ({c})' for n, c in labels.too_rare.items())}")
    if labels.failed:
        console.print(f"{labels.failed} ids have no summary, see {out / 'left_out.csv'}")
    if labels.conflicts:
        console.print(f"{labels.open} labels are empty as answers disagree; settle them in "
                      f"{labels.conflicts} and add --review {labels.conflicts}")
    if labels.sheet:
        console.print(f"to review: {labels.questions} rows of {labels.to_read} reports in "
                      f"{labels.sheet}")
    if labels.shows_reports:
        console.print("the sheets hold report text: keep them where the reports may be")
    console.print(f"labels of {labels.ids} ids of {labels.reports} reports in "
                  f"{out / 'labels.csv'}")
