"""`brgsa data`: build, check and measure data sets, and make label tables."""

import argparse
import math
from pathlib import Path
from typing import Any

from brgsa_jax.cli import labels
from brgsa_jax.cli.common import Add, natural, numbers, positive, results_folder, terminal
from brgsa_jax.config import UserError


def add(command: Add, commands: Any) -> None:
    """Adds the commands."""
    data = commands.add_parser("data", help="build, check and measure data sets",
                               description="Build, check and measure data sets.")
    data.set_defaults(overrides=False)
    data_commands = data.add_subparsers(title="commands", dest="data_command", required=True)
    sub = command("build", data_build, "volumes and a table of reports to array_record shards",
                  into=data_commands)
    sub.add_argument("--source", required=True, choices=tuple(_BUILDS))
    sub.add_argument("--out", required=True, help="folder of the data set")
    sub.add_argument("--workers", type=positive, help="processes [one a core]")
    sub.add_argument("--beam-runner", metavar="NAME",
                     help="convert as an Apache Beam pipeline: DirectRunner, FlinkRunner, …")
    sub.add_argument("--beam-arg", action="append", default=[], metavar="=--FLAG=VALUE",
                     help="flag of the pipeline, may be repeated")
    sub.add_argument("--spacing", type=numbers(float), default=(1.5, 1.5, 3.0), metavar="X,Y,Z",
                     help="mm [1.5,1.5,3; phantom by its shape]")
    sub.add_argument("--shape", type=numbers(int), default=None, metavar="X,Y,Z",
                     help="voxels [256,256,128; phantom 64,64,32]")
    sub.add_argument("--compression", choices=("none", "zstd"), default="none",
                     help="of the shards; zstd takes less disk and more time [%(default)s]")
    sub.add_argument("--split", metavar="NAME|train=.8,valid=.1,test=.1",
                     help="one split, or shares by patient [folder train, rad-chestct test]")
    folder = sub.add_argument_group("folder and image2d")
    folder.add_argument("--images", help="folder with NIfTI, npz, npy or DICOM; PNG, JPEG or DICOM")
    folder.add_argument("--table", help="CSV, TSV, JSON lines or Parquet, one row per volume")
    folder.add_argument("--id-column", default="id", help="file name, with or without its ending")
    folder.add_argument("--report-column", default="report")
    folder.add_argument("--findings-column", help="canonical findings separated by ;")
    folder.add_argument("--summaries", metavar="FILE",
                        help="findings of brgsa summarize instead of a column")
    folder.add_argument("--patient-column", help="keeps a patient's images in one split")
    folder.add_argument("--series-column", help="UID of the series, where a folder holds several")
    public = sub.add_argument_group("ct-rate, rad-chestct and MIMIC-CXR")
    public.add_argument("--root", help="the downloaded files")
    public.add_argument("--version", choices=("auto", "v1", "fixed"), default="auto",
                        help="ct-rate: raw numbers or HU [%(default)s: HU if there]")
    public.add_argument("--twins", choices=("all", "first", "thinnest"), default="all",
                        help="ct-rate: which reconstructions of a scan [%(default)s]")
    public.add_argument("--impressions", action="store_true",
                        help="ct-rate: impressions after the findings in the report")
    public.add_argument("--holdout", type=float, default=0.0, metavar="SHARE",
                        help="ct-rate: training patients that become valid [%(default)s]")
    public.add_argument("--official-valid", choices=("test", "valid"), default="test",
                        help="ct-rate: what the official valid becomes [%(default)s]")
    public.add_argument("--mapping", default="brgsa", metavar="NAME|FILE.yaml",
                        help="rad-chestct: brgsa, hlip, strict or a file [%(default)s]")
    grey = sub.add_argument_group("image2d (--images and --table, or --root of MIMIC-CXR-JPG)")
    grey.add_argument("--reports", metavar="DIR", help="MIMIC-CXR's reports [those below --root]")
    grey.add_argument("--views", default="PA,AP", help="MIMIC-CXR's ViewPositions [%(default)s]")
    grey.add_argument("--size", type=positive, default=256, help="pixels of a side [%(default)s]")
    phantom = sub.add_argument_group("phantom")
    phantom.add_argument("--seed", type=natural, default=0)
    for split, count in (("train", 1000), ("valid", 100), ("test", 200)):
        phantom.add_argument(f"--{split}", type=natural, default=count, metavar="N",
                             help=f"patients in {split} [%(default)s]")
    sub.set_defaults(defaults={name: sub.get_default(name) for name in _FOR})
    sub = command("check", data_check, "whether a data set can be trusted, as one HTML page",
                  into=data_commands)
    sub.add_argument("data", metavar="DIR", help="data set")
    sub.add_argument("--out", help="HTML file; quality.json goes beside it [DIR/check.html]")
    sub.add_argument("--workers", type=positive, help="processes [one a core]")
    sub.add_argument("--no-verify", action="store_true", help="do not compare digests")
    sub = command("bench", data_bench, "speed of the feed, beside nibabel on .nii.gz",
                  into=data_commands)
    sub.add_argument("data", metavar="DIR", help="data set")
    sub.add_argument("--split", help="[its first one]")
    sub.add_argument("--crop", type=_sizes, metavar="X,Y,Z", help="[7/8 of each axis]")
    sub.add_argument("--batch-size", type=positive, default=8, help="[%(default)s]")
    sub.add_argument("--batches", type=positive, default=64, help="[%(default)s]")
    sub.add_argument("--threads", type=positive, default=2, help="that read [%(default)s]")
    labels.add(command, data_commands)


# Which sources an option is for; all others are for all of them.
_FOR = {
    **dict.fromkeys(("images", "table", "id_column", "report_column", "findings_column",
                     "summaries", "patient_column"), ("folder", "image2d")),
    "series_column": ("folder",), "root": ("ct-rate", "rad-chestct", "image2d"),
    **dict.fromkeys(("version", "twins", "impressions", "holdout", "official_valid"),
                    ("ct-rate",)),
    "mapping": ("rad-chestct",), **dict.fromkeys(("reports", "views", "size"), ("image2d",)),
    **dict.fromkeys(("seed", "train", "valid", "test"), ("phantom",)),
    "split": ("folder", "rad-chestct", "image2d"),
    "spacing": ("folder", "ct-rate", "rad-chestct"),
    "shape": ("folder", "ct-rate", "rad-chestct", "phantom")}


def _refuse_options_of_others(options: argparse.Namespace) -> None:
    """Refuses what the source would ignore: the set would not be what was asked for."""
    for name, sources in _FOR.items():
        if options.source not in sources and getattr(options, name) != options.defaults[name]:
            hint = ("; name the summaries in data.summaries when training"
                    if name == "summaries" else "")
            raise UserError(f"--{name.replace('_', '-')} is not for --source {options.source} but "
                            f"for {' and '.join(sources)}; leave it out{hint}")


def data_build(options: argparse.Namespace) -> int:
    """Builds a data set and says what became of every volume."""
    _refuse_options_of_others(options)
    needed = {"folder": ("images", "table"), "ct-rate": ("root",), "rad-chestct": ("root",)}
    missing = [f"--{name}" for name in needed.get(options.source, ())
               if not getattr(options, name)]
    if missing:
        raise UserError(f"--source {options.source} needs {' and '.join(missing)}")
    if options.beam_arg and not options.beam_runner:
        raise UserError("--beam-arg needs --beam-runner")
    beam = [f"--runner={options.beam_runner}", *options.beam_arg] if options.beam_runner else None
    tell_build(_BUILDS[options.source](options, workers=options.workers, beam=beam,
                                          compression=options.compression))
    return 0


def _build_phantom(options: argparse.Namespace, **how: Any) -> Any:
    from brgsa_jax.data import builders

    if options.shape and min(options.shape) < 8:
        raise UserError(f"--shape {','.join(map(str, options.shape))} is too small to draw a "
                        "chest in; give at least 8 voxels on each axis")
    return builders.build_phantom(
        options.out, seed=options.seed, train=options.train, valid=options.valid,
        test=options.test, shape=options.shape or (64, 64, 32), **how)


def _build_folder(options: argparse.Namespace, **how: Any) -> Any:
    from brgsa_jax.data import builders

    return builders.build_folder(
        options.out, images=options.images, table=options.table, id_column=options.id_column,
        report_column=options.report_column, findings_column=options.findings_column,
        patient_column=options.patient_column, series_column=options.series_column,
        summaries=options.summaries, split=_split(options.split or "train"),
        preprocess=_preprocess(options), **how)


def _build_ct_rate(options: argparse.Namespace, **how: Any) -> Any:
    from brgsa_jax.data import builders

    return builders.build_ct_rate(
        options.out, root=options.root, version=options.version, twins=options.twins,
        impressions=options.impressions, official_valid=options.official_valid,
        holdout=options.holdout, preprocess=_preprocess(options), **how)


def _build_rad_chestct(options: argparse.Namespace, **how: Any) -> Any:
    from brgsa_jax.data import builders

    return builders.build_rad_chestct(
        options.out, root=options.root, mapping=options.mapping,
        split=_split(options.split or "test"), preprocess=_preprocess(options), **how)


def _build_image2d(options: argparse.Namespace, **how: Any) -> Any:
    from brgsa_jax.data import builders

    return builders.build_image2d(
        options.out, images=options.images, table=options.table, root=options.root,
        reports=options.reports, id_column=options.id_column,
        report_column=options.report_column, findings_column=options.findings_column,
        patient_column=options.patient_column, summaries=options.summaries,
        views=options.views.split(","),
        split=_split(options.split) if options.split else None, size=options.size, **how)


def _preprocess(options: argparse.Namespace) -> Any:
    from brgsa_jax.data.volume import Preprocess

    return Preprocess(spacing=options.spacing, shape=options.shape or (256, 256, 128))


_BUILDS = {"folder": _build_folder, "ct-rate": _build_ct_rate, "rad-chestct": _build_rad_chestct,
           "image2d": _build_image2d, "phantom": _build_phantom}


def _split(text: str) -> Any:
    if "=" not in text:
        return text
    try:
        pairs = [part.split("=") for part in text.split(",")]
        shares = {name: float(share) for name, share in pairs}
        if not all(map(math.isfinite, shares.values())) or len(shares) < len(pairs):
            raise ValueError(text)
        return shares
    except ValueError as error:
        raise UserError(f"--split {text} is not understood; write a name, or shares such as "
                        "train=.8,valid=.1,test=.1") from error


def tell_build(summary: Any) -> None:
    """Says what a build did."""
    if summary.reused:
        terminal().print(f"data set {summary.out}: already built with {summary.written} images, "
                      "reused")
        return
    rate = summary.written / max(summary.seconds, 1e-9)
    terminal().print(f"data set {summary.out}: {summary.written} images written in "
                  f"{summary.seconds:.0f} s ({rate:.1f} images/s)")
    listed = [f"{count} {what}" for count, what in (
        (summary.failed, "refused"), (summary.unlisted, "left out"))
        if count]
    if listed:
        terminal().print(f"{', '.join(listed)}, see {Path(summary.out) / 'failures.csv'}")
    if summary.warned:
        terminal().print(f"{summary.warned} warnings, see {Path(summary.out) / 'warnings.csv'}")


def data_check(options: argparse.Namespace) -> int:
    """Reads every record of a data set and writes the page that says whether it can be trusted."""
    from rich.progress import Progress

    from brgsa_jax.evals import quality, quality_page

    console = terminal()
    page = Path(options.out or Path(options.data) / "check.html")
    if page.is_dir():
        raise UserError(f"{page} is a folder; name an HTML file in it")
    # The folder of a data set that is not there must not be made.
    if options.out or page.parent.is_dir():
        results_folder(page.parent)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("records", total=None)
        found = quality.check(
            options.data, workers=options.workers, verify=not options.no_verify,
            progress=lambda done, total: bar.update(task, completed=done, total=total))
    quality_page.write_page(found, page)
    for problem in found.problems:
        console.print(f"{problem.severity:<5} {problem.title}")
    verdict = "no error" if found.passed else f"{found.count('error')} kinds of error"
    console.print(f"{found.facts['volumes']} records checked: {verdict}, {found.count('look')} to "
                  f"look at; see {page}")
    return 0 if found.passed else 1


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(positive, text.split(",")))


_sizes.__name__ = "positive numbers X,Y,Z"


def data_bench(options: argparse.Namespace) -> int:
    """Measures the feed."""
    from rich.table import Table

    from brgsa_jax.data.bench import bench

    result = bench(options.data, split=options.split, crop=options.crop,
                   batch_size=options.batch_size, batches=options.batches, threads=options.threads)
    table = Table(title=f"crops of {_by(result.crop)} from {_by(result.shape)}, batches of "
                  f"{result.batch_size}, {result.threads} threads", title_justify="left")
    for name in ("read from", "GB/s per core", "images/s", "CPU ms per image"):
        table.add_column(name, justify="left" if name == "read from" else "right")
    for name, rate in (("shards", result.feed), (".nii.gz by nibabel, 1 thread", result.nifti)):
        if rate is not None:
            table.add_row(name, f"{rate.per_core:.2f}", f"{rate.samples / rate.seconds:.1f}",
                          f"{rate.cpu_seconds / rate.samples * 1e3:.1f}")
    terminal().print(table)
    terminal().print(f"a step of {result.step_seconds * 1e3:.0f} ms waited for its batch "
                     f"{result.waited:.1%} of the time")
    return 0


def _by(sizes: Any) -> str:
    return "×".join(map(str, sizes))
