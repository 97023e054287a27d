"""The command that judges trained models: eval."""

import argparse
from pathlib import Path
from typing import Any

from brgsa_jax.cli.common import Add, complain, results_folder, terminal
from brgsa_jax.config import UserError


def add(command: Add) -> None:
    """Adds the command."""
    sub = command("eval", evaluate, "zero-shot evaluation of a trained model, with report.html")
    sub.add_argument("--workdir", required=True, help="work directory of brgsa train, or a "
                     "folder of brgsa convert")
    sub.add_argument("--protocol", default="ct-rate-18", help="[%(default)s]")
    sub.add_argument("--out", help="where the files go [WORKDIR/eval]")
    sub.add_argument("--data", help="data set [the one a work directory was trained on]")
    sub.add_argument("--no-untrained", action="store_true",
                     help="leave out the comparison with the model before training")


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
        out = results_folder(options.out or workdir / "eval")
        write_report([Candidate("model", workdir.resolve().name, model, [])], options.data,
                     protocol, out, "model", configs.get_config("brgsa").data)
        return 0
    if not {"name", "seed", "model", "data", "optim"} <= set(config):
        raise UserError(f"{workdir / 'config.json'} is not that of a training run; give the work "
                        "directory of brgsa train")
    out = results_folder(options.out or workdir / "eval")
    models = candidates(workdir, config, options.no_untrained)
    write_report(models, options.data or config.data.path, protocol, out, config.name,
                 config.data)
    return 0


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


def write_report(models: list[Any], data: str, protocol: Any, out: Path, name: str,
                  captions: Any) -> None:
    """Evaluates, writes report.html and ends with the headline.

    `captions` is the section `data` of a configuration, which says how captions are made.
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
            normal_caption=captions.normal_caption, sentences=captions.sentences,
            progress=progress)
    print(f"{headline(evaluation)}, report {out / 'report.html'}")
