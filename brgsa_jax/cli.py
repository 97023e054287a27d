"""The command line `brgsa`: one handler a command; errors are one sentence.

Exit codes: 0 success, 1 failure, 2 wrong use, 143 stopped by the platform with the state saved.
"""

import argparse
import contextlib
import glob
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from brgsa_jax.config import UserError, parse_overrides
from brgsa_jax.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = build_parser()
    choose_platform()
    options, rest = parser.parse_known_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    if rest and not options.overrides:
        parser.error(f"unknown arguments {' '.join(rest)}; see brgsa {options.command} --help")
    try:
        parse_overrides(rest)
    except UserError as error:
        parser.error(str(error))
    options.rest = rest
    # Only its tokenizers are used; the advice to install PyTorch would mislead.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return options.run(options) or 0
    except UserError as error:
        _complain(error)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            place = f"{error.filename}: " if error.filename else ""
            _complain(f"{place}{error.strerror or error}; check the path, its rights and the free "
                      "space")
        return 1
    except KeyboardInterrupt:
        print("brgsa: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT


def _complain(message: object) -> None:
    """Prints one line on stderr; names of files may hold line breaks and terminal codes."""
    text = "".join(c if c.isprintable() else " " for c in str(message))
    print(f"brgsa: {text}", file=sys.stderr)


ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")


def choose_platform() -> None:
    """Takes the CPU at once where Linux shows no accelerator.

    With libtpu installed but no TPU there, JAX asks a metadata server for a minute, prints its
    errors, and ends on the CPU all the same.
    """
    if sys.platform == "linux" and not any(map(glob.glob, ACCELERATORS)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(prog="brgsa", description=(
        "Align 3-D medical images with their reports, and read scans zero-shot."))
    parser.add_argument("--version", action="version", version=f"brgsa_jax {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    def command(name: str, run: Callable[..., Any], text: str, *, into: Any = commands,
                overrides: bool = False) -> argparse.ArgumentParser:
        epilog = "Change the configuration with --config.section.key=value." if overrides else None
        sub = into.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                              epilog=epilog)
        sub.set_defaults(run=run, overrides=overrides)
        return sub

    sub = command("demo", demo, "phantom data, training, evaluation and report on this machine",
                  overrides=True)
    sub.add_argument("--workdir", default="runs/demo", help="where everything goes [%(default)s]")

    data = commands.add_parser("data", help="build a data set", description="Build a data set.")
    data.set_defaults(overrides=False)
    data_commands = data.add_subparsers(title="commands", dest="data_command", required=True)
    sub = command("build", data_build, "volumes and a table of reports to array_record shards",
                  into=data_commands)
    sub.add_argument("--source", required=True, choices=tuple(_BUILDS))
    sub.add_argument("--out", required=True, help="folder of the data set")
    sub.add_argument("--workers", type=_positive, help="processes [one a core]")
    sub.add_argument("--beam-runner", metavar="NAME",
                     help="convert as an Apache Beam pipeline: DirectRunner, FlinkRunner, …")
    sub.add_argument("--beam-arg", action="append", default=[], metavar="=--FLAG=VALUE",
                     help="flag of the pipeline, may be repeated")
    sub.add_argument("--spacing", type=_numbers(float), default=(1.5, 1.5, 3.0), metavar="X,Y,Z",
                     help="mm [1.5,1.5,3; phantom by its shape]")
    sub.add_argument("--shape", type=_numbers(int), default=None, metavar="X,Y,Z",
                     help="voxels [256,256,128; phantom 64,64,32]")
    sub.add_argument("--split", metavar="NAME|train=.8,valid=.1,test=.1",
                     help="one split, or shares by patient [folder train, rad-chestct test]")
    folder = sub.add_argument_group("folder")
    folder.add_argument("--images", help="folder with NIfTI, npz, npy or DICOM, searched in depth")
    folder.add_argument("--table", help="CSV, TSV, JSON lines or Parquet, one row per volume")
    folder.add_argument("--id-column", default="id", help="file name, with or without its ending")
    folder.add_argument("--report-column", default="report")
    folder.add_argument("--findings-column", help="canonical findings separated by ;")
    folder.add_argument("--patient-column", help="keeps a patient's volumes in one split")
    public = sub.add_argument_group("ct-rate and rad-chestct")
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
    phantom = sub.add_argument_group("phantom")
    phantom.add_argument("--seed", type=_natural, default=0)
    for split, count in (("train", 1000), ("valid", 100), ("test", 200)):
        phantom.add_argument(f"--{split}", type=_natural, default=count, metavar="N",
                             help=f"patients in {split} [%(default)s]")

    sub = command("summarize", summarize, "reports to lists of canonical findings")
    sub.add_argument("table", metavar="IN", help="CSV, TSV, JSONL or Parquet, a row a report")
    sub.add_argument("--text-column", required=True, action="append", metavar="C",
                     help="column of the report; may be repeated, the columns are joined")
    sub.add_argument("--id-column", metavar="I", help="column of the ids ['id', else the row]")
    sub.add_argument("--out", required=True, help="JSONL file, one object a report")
    sub.add_argument("--backend", default="lexicon", choices=("lexicon", "openai", "transformers"),
                     help="rules, a server, or a model on this machine [%(default)s]")
    sub.add_argument("--cache", help="answers kept between calls [OUT.cache; lexicon keeps none]")
    both = sub.add_argument_group("openai and transformers")
    both.add_argument("--model", help="name at the server; or a folder or hub id")
    both.add_argument("--max-tokens", type=_positive, help="of one answer [512; 256]")
    server = sub.add_argument_group("openai")
    server.add_argument("--endpoint", default="http://127.0.0.1:8000/v1", help="[%(default)s]")
    server.add_argument("--send-reports-to", metavar="HOST",
                        help="the one other machine that may be sent reports")
    server.add_argument("--key-variable", metavar="NAME",
                        help="environment variable with the key [OPENAI_API_KEY]")
    server.add_argument("--concurrency", type=_positive, default=8, help="[%(default)s]")
    server.add_argument("--requests-per-minute", type=float)
    server.add_argument("--timeout", type=float, default=120.0, help="seconds [%(default)s]")
    server.add_argument("--retries", type=_natural, default=6, help="[%(default)s]")
    server.add_argument("--seed", type=_natural, default=0, help="[%(default)s]")
    server.add_argument("--prices", type=_prices, metavar="IN,OUT",
                        help="of a million prompt and answer tokens")
    local = sub.add_argument_group("transformers")
    local.add_argument("--batch-size", type=_positive, default=8, help="[%(default)s]")
    local.add_argument("--device", help="cpu, cuda, cuda:1 … [a GPU if there is one]")

    sub = command("train", train, "train a configuration, or resume its work directory",
                  overrides=True)
    sub.add_argument("--config", required=True, help="recipe name, Python file or config.json")
    sub.add_argument("--workdir", help="work directory [runs/NAME]")

    sub = command("eval", evaluate, "zero-shot evaluation of a trained model, with report.html")
    sub.add_argument("--workdir", required=True, help="work directory of brgsa train, or a "
                     "folder of brgsa convert")
    sub.add_argument("--protocol", default="ct-rate-18", help="[%(default)s]")
    sub.add_argument("--out", help="where the files go [WORKDIR/eval]")
    sub.add_argument("--data", help="data set [the one a work directory was trained on]")
    sub.add_argument("--no-untrained", action="store_true",
                     help="leave out the comparison with the model before training")

    sub = command("metrics", metrics, "the same metrics from any system's score file")
    sub.add_argument("--scores", required=True, help="CSV, first column the id")
    sub.add_argument("--labels", required=True, help="CSV, first column the id, cells 0 or 1")
    sub.add_argument("--patients", help="column of the labels that names the patient")
    sub.add_argument("--out", required=True)

    sub = command("predict", predict, "zero-shot scores of NIfTI files against prompts")
    sub.add_argument("volumes", nargs="+", metavar="VOLUME")
    sub.add_argument("--model", required=True, help="work directory, exported folder or hub id")
    sub.add_argument("--prompts", help="text file, one prompt a line [There is X, 18 findings]")
    sub.add_argument("--score", default="mean", help="[%(default)s]")
    sub.add_argument("--out", required=True, help="folder for scores.csv and pictures")

    sub = command("convert", convert, "released checkpoints to a model folder, and models back")
    sub.add_argument("source", metavar="IN", help="checkpoint of BrgSA or MGCA (.ckpt, .pth, "
                     ".safetensors), work directory, model folder or hub id")
    sub.add_argument("target", metavar="OUT", help="folder; or a file .safetensors, .ckpt or .pth "
                     "by the names of BrgSA's or MGCA's own code")
    sub.add_argument("--kind", default="auto", choices=("auto", "brgsa", "mgca"))
    sub.add_argument("--config", help="JSON with what no tensor tells [config.json beside IN]")
    sub.add_argument("--tokenizer", help="folder, hub id or vocab.txt [beside IN]")

    sub = command("export", export, "a model as programs that need only jax (jax.export)")
    sub.add_argument("model", metavar="MODEL", help="work directory, model folder or hub id")
    sub.add_argument("--out", required=True, help="new folder, or an earlier export to replace")

    sub = command("show-config", show_config, "print a resolved configuration as JSON",
                  overrides=True)
    sub.add_argument("config", help="recipe name, Python file or config.json")
    return parser


def _numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        values = tuple(kind(part) for part in text.split(","))
        if len(values) != 3 or min(values) <= 0:
            raise ValueError(text)
        return values

    parse.__name__ = "three positive numbers X,Y,Z"
    return parse


def _prices(text: str) -> tuple[float, float]:
    prompt, answer = map(float, text.split(","))
    return prompt, answer


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _console() -> Any:
    from rich.console import Console

    # Names of files and prompts may hold brackets and colons, which are not markup.
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def _folder(path: str | Path) -> Path:
    """Makes the folder for results before the work starts, so that no finished work is lost.

    Raises:
        UserError: no file can be written there.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"nothing can be written into {folder} ({error.strerror}); choose another "
                        "--out") from error
    return folder


def data_build(options: argparse.Namespace) -> int:
    """Builds a data set and says what became of every volume."""
    needed = {"folder": ("images", "table"), "ct-rate": ("root",), "rad-chestct": ("root",)}
    missing = [f"--{name}" for name in needed.get(options.source, ())
               if not getattr(options, name)]
    if missing:
        raise UserError(f"--source {options.source} needs {' and '.join(missing)}")
    if options.beam_arg and not options.beam_runner:
        raise UserError("--beam-arg needs --beam-runner")
    beam = [f"--runner={options.beam_runner}", *options.beam_arg] if options.beam_runner else None
    _tell_build(_BUILDS[options.source](options, workers=options.workers, beam=beam), _console())
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
        patient_column=options.patient_column, split=_split(options.split or "train"),
        preprocess=_preprocess(options), **how)


def _build_ct_rate(options: argparse.Namespace, **how: Any) -> Any:
    from brgsa_jax.data import builders

    if options.split:
        raise UserError("--split is not for ct-rate, whose splits are official; see --holdout and "
                        "--official-valid")
    return builders.build_ct_rate(
        options.out, root=options.root, version=options.version, twins=options.twins,
        impressions=options.impressions, official_valid=options.official_valid,
        holdout=options.holdout, preprocess=_preprocess(options), **how)


def _build_rad_chestct(options: argparse.Namespace, **how: Any) -> Any:
    from brgsa_jax.data import builders

    return builders.build_rad_chestct(
        options.out, root=options.root, mapping=options.mapping,
        split=_split(options.split or "test"), preprocess=_preprocess(options), **how)


def _preprocess(options: argparse.Namespace) -> Any:
    from brgsa_jax.data.volume import Preprocess

    return Preprocess(spacing=options.spacing, shape=options.shape or (256, 256, 128))


_BUILDS = {"folder": _build_folder, "ct-rate": _build_ct_rate, "rad-chestct": _build_rad_chestct,
           "phantom": _build_phantom}


def _split(text: str) -> Any:
    if "=" not in text:
        return text
    try:
        shares = {name: float(share) for name, share in (p.split("=") for p in text.split(","))}
        if not all(map(math.isfinite, shares.values())):
            raise ValueError(text)
        return shares
    except ValueError as error:
        raise UserError(f"--split {text} is not understood; write a name, or shares such as "
                        "train=.8,valid=.1,test=.1") from error


def _tell_build(summary: Any, console: Any) -> None:
    if summary.reused:
        console.print(f"data set {summary.out}: already built with {summary.written} volumes, "
                      "reused")
        return
    rate = summary.written / max(summary.seconds, 1e-9)
    console.print(f"data set {summary.out}: {summary.written} volumes written in "
                  f"{summary.seconds:.0f} s ({rate:.1f} volumes/s)")
    listed = [f"{count} {what}" for count, what in (
        (summary.failed, "refused"), (summary.unlisted, "left out"))
        if count]
    if listed:
        console.print(f"{', '.join(listed)}, see {Path(summary.out) / 'failures.csv'}")
    if summary.warned:
        console.print(f"{summary.warned} warnings, see {Path(summary.out) / 'warnings.csv'}")


def summarize(options: argparse.Namespace) -> int:
    """Summarises a table of reports; what has no summary is listed in it with the reason."""
    from rich.progress import Progress

    from brgsa_jax.summarize.cache import Cache
    from brgsa_jax.summarize.run import summarize_table

    backend = _summary_backend(options)
    console = _console()
    # The lexicon is faster than its cache, and an old answer would outlive a new rule.
    keep = contextlib.nullcontext() if options.backend == "lexicon" else Cache(
        options.cache or f"{options.out}.cache")
    try:
        with keep as cache, Progress(console=console, transient=True,
                                     disable=not console.is_terminal) as bar:
            task = bar.add_task("reports", total=None)
            counts = summarize_table(
                options.table, text_column=options.text_column, id_column=options.id_column,
                out=options.out, backend=backend, cache=cache,
                progress=lambda done, total: bar.update(task, completed=done, total=total))
    finally:
        # Also of a run that was stopped: what it asked for was paid.
        account = getattr(backend, "account", None)
        if account is not None:
            console.print(str(account))
    console.print(f"{counts.rows} reports: {counts.ok} with findings, {counts.normal} normal, "
                  f"{counts.failed} failed; {counts.asked} read, {counts.cached} from the cache")
    console.print(f"summaries {options.out}")
    return 1 if counts.failed == counts.rows else 0


def _summary_backend(options: argparse.Namespace) -> Any:
    """The backend that the options name.

    Raises:
        UserError: an option or a package is missing.
    """
    if options.backend == "lexicon":
        from brgsa_jax.summarize.lexicon import Lexicon

        return Lexicon()
    from brgsa_jax.summarize import llm

    if not options.model:
        raise UserError(f"--backend {options.backend} needs --model")
    limit = {} if options.max_tokens is None else {"max_tokens": options.max_tokens}
    if options.backend == "transformers":
        return llm.TransformersBackend(options.model, batch_size=options.batch_size,
                                       device=options.device, **limit)
    return llm.OpenAIBackend(
        options.model, endpoint=options.endpoint, send_reports_to=options.send_reports_to,
        key_variable=options.key_variable, concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute, timeout=options.timeout,
        retries=options.retries, seed=options.seed,
        prices=llm.Prices(*options.prices) if options.prices else None, **limit)


def train(options: argparse.Namespace) -> int:
    """Trains or resumes one configuration."""
    from brgsa_jax import config as configs
    from brgsa_jax.mesh import initialize_runtime
    from brgsa_jax.train import trainer

    config = configs.get_config(options.config, **configs.parse_overrides(options.rest))
    if not config.data.path:
        raise UserError("the configuration names no data set; add --config.data.path=FOLDER with a "
                        "folder written by brgsa data build")
    initialize_runtime()
    outcome = trainer.train(config, options.workdir or f"runs/{config.name}", console=_console())
    return trainer.PREEMPTED if outcome.preempted else 0


def evaluate(options: argparse.Namespace) -> int:
    """Evaluates a model; that of a work directory beside itself before training."""
    from brgsa_jax import config as configs
    from brgsa_jax.evals.protocol import get_protocol
    from brgsa_jax.evals.run import Candidate
    from brgsa_jax.predict import load_model

    workdir = Path(options.workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} holds no config.json; give the work directory of brgsa train, "
                        "or a folder of brgsa convert with --data")
    protocol = get_protocol(options.protocol)
    config = configs.load_json(workdir / "config.json")
    if "format" in config:
        if not options.data:
            raise UserError(f"{workdir} is a model without data; add --data with a folder written "
                            "by brgsa data build")
        model = load_model(workdir)
        out = _folder(options.out or workdir / "eval")
        _write_report([Candidate("model", workdir.resolve().name, model, [])], options.data,
                      protocol, out, "model", configs.get_config("brgsa").data)
        return 0
    if not {"name", "seed", "model", "data", "optim"} <= set(config):
        raise UserError(f"{workdir / 'config.json'} is not that of a training run; give the work "
                        "directory of brgsa train")
    out = _folder(options.out or workdir / "eval")
    models = _candidates(workdir, config, options.no_untrained)
    _write_report(models, options.data or config.data.path, protocol, out, config.name,
                  config.data)
    return 0


def _candidates(workdir: Path, config: Any, no_untrained: bool = False) -> list[Any]:
    """The trained model of a work directory and, unless unwanted, what it started from."""
    from brgsa_jax.evals.run import Candidate
    from brgsa_jax.model import bank_from_data
    from brgsa_jax.predict import load_model
    from brgsa_jax.train.meter import read_metrics
    from brgsa_jax.train.start import untrained_model

    model = load_model(workdir)
    if config.model.to_dict() != model.config.to_dict():
        raise UserError(f"{workdir / 'config.json'} is not the configuration its model was trained "
                        "with; bring back the file that brgsa train wrote")
    label = _label(config)
    history = [row for row in read_metrics(workdir / "metrics.jsonl")
               if isinstance(row, dict) and isinstance(row.get("loss"), float)]
    trained = Candidate(config.name, label, model, history)
    bank = config.model.bank
    # A bank that started from data: an untrained model has none to read.
    if no_untrained or (bank.rows and bank_from_data(bank.init)):
        return [trained]
    try:
        before = untrained_model(config, model.tokenizer)
    except UserError as error:
        # Weights it started from may have gone since; what was trained is there.
        _complain(f"warning: the model before training is left out: {error}")
        return [trained]
    return [trained, Candidate(f"{config.name}_untrained", f"{label}, untrained", before, [],
                               untrained=True)]


def _label(config: Any) -> str:
    """The method a configuration trains, by its enabled losses; its own name for a mixture."""
    used = frozenset(name for name, term in config.losses.items() if term.weight)
    tokens = {"token_alignment", "prototype_alignment"}
    methods = {frozenset({"info_nce"}): "CLIP", frozenset({"sigmoid"}): "SigLIP",
               frozenset({"knowledge_interaction"}): "BrgSA",
               frozenset({"info_nce", *tokens}): "MGCA",
               frozenset({"knowledge_interaction", *tokens}): "BrgSA + MGCA"}
    return methods.get(used, config.name)


def _write_report(models: list[Any], data: str, protocol: Any, out: Path, name: str,
                  captions: Any) -> None:
    """Evaluates, writes report.html and ends with the headline.

    `captions` is the section `data` of a configuration, which says how captions are made.
    """
    from rich.progress import Progress

    from brgsa_jax.data.sources import open_source
    from brgsa_jax.evals.report import headline
    from brgsa_jax.evals.run import report_models

    source = open_source(data, protocol.split)
    console = _console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=len(models) * len(source))

        def progress(label: str, done: int, total: int) -> None:
            before = [model.label for model in models].index(label) * total
            bar.update(task, completed=before + done, description=f"evaluating {label}")

        evaluation = report_models(
            models, source, protocol, out, title=f"{name}: {protocol.name}",
            normal_caption=captions.normal_caption, sentences=captions.sentences,
            progress=progress)
    print(f"{headline(evaluation)}, report {out / 'report.html'}")


DEMO = {"seed": 0, "train": 3000, "valid": 0, "test": 400}


def demo(options: argparse.Namespace) -> int:
    """Phantom data, BrgSA and CLIP on the same data for the same steps, one report."""
    from brgsa_jax import config as configs
    from brgsa_jax.data import builders
    from brgsa_jax.evals.protocol import get_protocol
    from brgsa_jax.train import trainer

    workdir, console = Path(options.workdir), _console()
    changes = configs.parse_overrides(options.rest)
    changes.setdefault("data.path", str(workdir / "data"))
    runs = {"brgsa": workdir, "clip": workdir / "clip"}
    # Losses and bank are what the two runs differ in; everything else is changed in both.
    own = {key: value for key, value in changes.items()
           if key.startswith(("losses.", "model.bank."))}
    shared = {key: value for key, value in changes.items() if key not in own}
    recipes = {"brgsa": configs.get_config("phantom:brgsa", **changes),
               "clip": configs.get_config("phantom:clip", **shared)}
    if changes["data.path"] == str(workdir / "data"):
        console.print("phantom patients (drawn, not real ones)")
        _tell_build(builders.build_phantom(
            workdir / "data", shape=tuple(recipes["brgsa"].model.input.shape), **DEMO), console)
    for name, folder in runs.items():
        outcome = trainer.train(recipes[name], folder, console=console)
        if outcome.preempted:
            return trainer.PREEMPTED
    models = [model for name, folder in runs.items()
              for model in _candidates(folder, configs.load_json(folder / "config.json"))]
    _write_report(models, changes["data.path"], get_protocol("ct-rate-18"), workdir / "eval",
                  recipes["brgsa"].name, recipes["brgsa"].data)
    return 0


def metrics(options: argparse.Namespace) -> int:
    """Judges a score file of any system."""
    from brgsa_jax.evals.evaluate import evaluate_files
    from brgsa_jax.evals.metrics import write_metrics
    from brgsa_jax.evals.report import headline

    # Only this file: OUT may well hold the user's own scores.csv and labels.csv.
    path = _folder(options.out) / "metrics.json"
    evaluation = evaluate_files(options.scores, options.labels, patients=options.patients)
    write_metrics(path, evaluation.metrics)
    print(f"{headline(evaluation)}, metrics {path}")
    return 0


def predict(options: argparse.Namespace) -> int:
    """Scores files against prompts; files that cannot be read are named, the others go on.

    Returns 1 when a file was refused, since no list of failures stays behind as from a build.
    """
    from brgsa_jax.evals.protocol import get_protocol
    from brgsa_jax.evals.scores import write_scores
    from brgsa_jax.predict import load_model, read_files, read_prompts, write_pictures, zero_shot

    prompts = (read_prompts(options.prompts) if options.prompts
               else list(get_protocol("ct-rate-18").prompts))
    out = _folder(options.out)
    model = load_model(options.model)
    console = _console()
    files = read_files(model, options.volumes)
    for failure in files.failures:
        _complain(f"refused: {failure}")
    if not files.volumes:
        raise UserError(f"none of the {len(options.volumes)} files is a usable CT volume")
    for name, warnings in zip(files.ids, files.warnings, strict=True):
        for warning in warnings:
            _complain(f"warning: {name}: {warning}")
    result = zero_shot(model, [v.volume for v in files.volumes], prompts, score=options.score,
                       ids=files.ids)
    write_scores(out / "scores.csv", result.ids, result.prompts, result.scores)
    pictures = write_pictures(out, files)
    _print_scores(result, console)
    console.print(f"scores {out / 'scores.csv'}, pictures {', '.join(map(str, pictures))}")
    return 1 if files.failures else 0


def _print_scores(result: Any, console: Any) -> None:
    from rich.table import Table

    for name, row in zip(result.ids, result.scores, strict=True):
        table = Table(title=name, title_justify="left")
        table.add_column("prompt")
        table.add_column("score", justify="right")
        for index in row.argsort()[::-1]:
            table.add_row(result.prompts[index], f"{row[index]:+.3f}")
        console.print(table)


def convert(options: argparse.Namespace) -> int:
    """Converts a checkpoint to a model folder, or a model to the names of the original code."""
    from brgsa_jax.model import parameter_count
    from brgsa_jax.predict import load_model
    from brgsa_jax.weights import export_checkpoint, import_checkpoint, native

    if not options.target.strip():
        raise UserError("OUT is empty; give a folder, or a file such as model.safetensors")
    source, target = Path(options.source), Path(options.target)
    back = target.suffix in (".safetensors", ".ckpt", ".pth", ".pt")
    if not back:
        native.check_free(target)
    if source.is_file():
        model = import_checkpoint(source, options.kind, options.config,
                                  tokenizer=options.tokenizer)
        if model.tokenizer is None:
            _complain(f"warning: no tokenizer lies beside {source}, so that the model encodes "
                      "token ids only; give --tokenizer to encode texts")
    else:
        model = load_model(options.source)
    if back:
        export_checkpoint(model, target)
    else:
        model.save(target)
    count = parameter_count((model.params, model.bank))
    _console().print(f"{source} -> {target}: {count:,} parameters")
    return 0


def export(options: argparse.Namespace) -> int:
    """Writes a model as programs that need only jax."""
    from brgsa_jax.export import export_model
    from brgsa_jax.predict import load_model

    folder = export_model(load_model(options.model), options.out)
    print(f"exported to {folder}, run it with {folder / 'run.py'}")
    return 0


def show_config(options: argparse.Namespace) -> int:
    """Prints a resolved configuration."""
    from brgsa_jax import config as configs

    config = configs.get_config(options.config, **configs.parse_overrides(options.rest))
    print(configs.to_json(config), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
