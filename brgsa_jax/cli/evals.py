"""The command that judges trained models: eval."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brgsa_jax.cli.common import Add, complain, results_folder, terminal
from brgsa_jax.config import UserError


def add(command: Add) -> None:
    """Adds the command."""
    sub = command("eval", evaluate, "zero-shot evaluation of a trained model, with report.html")
    # Needed by all but --list-protocols.
    sub.set_defaults(wrong_use=sub.error)
    sub.add_argument("--workdir", help="work directory of brgsa train, or a folder of brgsa "
                     "convert")
    sub.add_argument("--protocol", action="append", metavar="NAME|FILE.yaml", help="how to judge; "
                     "several protocols share one encoding [ct-rate-18]")
    sub.add_argument("--list-protocols", action="store_true", help="list the protocols and exit")
    sub.add_argument("--out", help="where the files go, of several protocols into OUT/NAME "
                     "[WORKDIR/eval]")
    sub.add_argument("--data", help="data set [the one a work directory was trained on]")
    sub.add_argument("--heatmaps", nargs="?", const="boxes", metavar="MASKS",
                     help="also score where heat-maps point: by the boxes of the data set, or by a "
                     "folder of masks ID_FINDING.nii.gz")
    sub.add_argument("--no-untrained", action="store_true",
                     help="leave out the comparison with the model before training")


def list_protocols() -> None:
    """Prints name, version, hash, number of classes and threshold rule of every protocol."""
    from brgsa_jax.evals.protocol import get_protocol, protocols

    rows = [("name", "version", "hash", "classes", "threshold")]
    rows += [(p.name, p.version, p.hash, str(len(p.findings)), p.rule)
             for p in map(get_protocol, protocols())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def evaluate(options: argparse.Namespace) -> int:
    """Evaluates a model; that of a work directory beside itself before training."""
    if options.list_protocols:
        list_protocols()
        return 0
    if options.workdir is None:
        options.wrong_use("the following arguments are required: --workdir")
    from brgsa_jax import config as configs
    from brgsa_jax.evals.run import Candidate
    from brgsa_jax.predict import load_model

    workdir = Path(options.workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} holds no config.json; give the work directory of brgsa train, "
                        "or a folder of brgsa convert with --data")
    protocols = read_protocols(options.protocol or ["ct-rate-18"])
    config = configs.load_json(workdir / "config.json")
    if "format" in config:
        if not options.data:
            raise UserError(f"{workdir} is a model without data; add --data with a folder written "
                            "by brgsa data build")
        out, cache = folders(options, workdir)
        model = Candidate("model", workdir.resolve().name, load_model(workdir), [])
        write_reports([model], options.data, protocols, out, "model",
                      configs.get_config("brgsa").data, cache, options.heatmaps)
        return 0
    if not {"name", "seed", "model", "data", "optim"} <= set(config):
        raise UserError(f"{workdir / 'config.json'} is not that of a training run; give the work "
                        "directory of brgsa train")
    out, cache = folders(options, workdir)
    models = candidates(workdir, config, options.no_untrained)
    write_reports(models, options.data or config.data.path, protocols, out, config.name,
                  config.data, cache, options.heatmaps)
    return 0


def read_protocols(given: Sequence[str]) -> list[Any]:
    """The protocols of names and files, each name once, as it names a folder."""
    from brgsa_jax.evals.protocol import get_protocol

    protocols = [get_protocol(name) for name in given]
    names = [protocol.name.lower() for protocol in protocols]
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise UserError(f"the protocol {twice[0]!r} is asked for more than once; ask for each once")
    return protocols


def folders(options: argparse.Namespace, workdir: Path) -> tuple[Path, Any]:
    """The folder of the results, and the cache of embeddings, in OUT for a model elsewhere."""
    from brgsa_jax.evals.cache import Cache

    out = results_folder(options.out or workdir / "eval")
    try:
        place = results_folder(workdir / "eval" / "cache")
    except UserError:
        place = results_folder(out / "cache")
    return out, Cache(place, lambda told: complain(f"warning: {told}"))


def candidates(workdir: Path, config: Any, no_untrained: bool = False) -> list[Any]:
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
        complain(f"warning: the model before training is left out: {error}")
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


def write_reports(models: list[Any], data: str, protocols: Sequence[Any], out: Path, name: str,
                  captions: Any, cache: Any, places: str | None = None) -> None:
    """Evaluates under each protocol, into OUT, or OUT/NAME of several; see `write_report`."""
    from brgsa_jax.data.sources import open_source
    from brgsa_jax.evals.run import read_cases

    for protocol in protocols:
        # What the data cannot be judged by is told before hours of encoding.
        read_cases(open_source(data, protocol.split), protocol)
    for protocol in protocols:
        folder = out if len(protocols) == 1 else results_folder(out / protocol.name)
        write_report(models, data, protocol, folder, name, captions, cache, places)


def write_report(models: list[Any], data: str, protocol: Any, out: Path, name: str,
                 captions: Any, cache: Any = None, places: str | None = None) -> None:
    """Evaluates, writes report.html and ends with the headline.

    `captions` is the section `data` of a configuration, which says how captions are made; `cache`
    an `evals.cache.Cache`; `places` as in `evals.run.report_models`.
    """
    from rich.progress import Progress

    from brgsa_jax.data.sources import open_source
    from brgsa_jax.evals.report import headline
    from brgsa_jax.evals.run import report_models

    source = open_source(data, protocol.split)
    console = terminal()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=len(models) * len(source))

        def progress(label: str, done: int, total: int) -> None:
            before = [model.label for model in models].index(label) * total
            bar.update(task, completed=before + done, description=f"evaluating {label}")

        evaluation = report_models(
            models, source, protocol, out, title=f"{name}: {protocol.name}",
            normal_caption=captions.normal_caption, cache=cache, places=places, progress=progress)
    print(f"{headline(evaluation)}, report {out / 'report.html'}")
    missing = evaluation.metrics["undefined"]
    if missing:
        complain(f"warning: the mean is over the other findings, as no volume has, or all have: "
                 f"{', '.join(missing)}")
