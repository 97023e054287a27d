"""Commands on finished models: predict, convert, export, show-config."""

import argparse
from pathlib import Path
from typing import Any

from brgsa_jax.cli.common import Add, complain, results_folder, terminal
from brgsa_jax.config import UserError


def add(command: Add) -> None:
    """Adds the commands."""
    sub = command("predict", predict, "zero-shot scores of volumes or radiographs against prompts")
    sub.add_argument("volumes", nargs="+", metavar="VOLUME")
    sub.add_argument("--model", required=True, help="work directory, exported folder or hub id")
    sub.add_argument("--prompts", help="text file, one prompt a line [There is X, 18 findings]")
    sub.add_argument("--series", metavar="UID", help="the one to read of a DICOM folder of several")
    sub.add_argument("--score", default="mean", help="[%(default)s]")
    sub.add_argument("--heatmaps", action="store_true", help="also ID_PROMPT.nii.gz on the grid of "
                     "the file and ID_PROMPT.png: what the score hangs on")
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


def predict(options: argparse.Namespace) -> int:
    """Scores files against prompts; files that cannot be read are named, the others go on.

    Returns 1 when a file was refused, since no list of failures stays behind as from a build.
    """
    from brgsa_jax.evals.protocol import get_protocol
    from brgsa_jax.evals.scores import write_scores
    from brgsa_jax.predict import (
        load_model,
        read_files,
        read_prompts,
        write_heatmaps,
        write_pictures,
        zero_shot,
    )

    prompts = (read_prompts(options.prompts) if options.prompts
               else list(get_protocol("ct-rate-18").texts))
    out = results_folder(options.out)
    model = load_model(options.model)
    console = terminal()
    files = read_files(model, options.volumes, options.series)
    for failure in files.failures:
        complain(f"refused: {failure}")
    if not files.volumes:
        raise UserError(f"none of the {len(options.volumes)} files is a usable image")
    for name, warnings in zip(files.ids, files.warnings, strict=True):
        for warning in warnings:
            complain(f"warning: {name}: {warning}")
    result = zero_shot(model, [v.volume for v in files.volumes], prompts, score=options.score,
                       ids=files.ids)
    write_scores(out / "scores.csv", result.ids, result.prompts, result.scores)
    pictures = write_pictures(out, files)
    _print_scores(result, console)
    console.print(f"scores {out / 'scores.csv'}, pictures {', '.join(map(str, pictures))}")
    if options.heatmaps:
        written = write_heatmaps(out, model, files, prompts, score=options.score)
        console.print(f"{len(prompts)} heat-maps of each image in {out}, {len(written)} files")
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
            complain(f"warning: no tokenizer lies beside {source}, so that the model encodes "
                      "token ids only; give --tokenizer to encode texts")
    else:
        model = load_model(options.source)
    if back:
        export_checkpoint(model, target)
    else:
        model.save(target)
    count = parameter_count((model.params, model.bank))
    terminal().print(f"{source} -> {target}: {count:,} parameters")
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
