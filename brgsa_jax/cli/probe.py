"""The command that judges what a trained image tower has learnt: probe."""

import argparse
from pathlib import Path
from typing import Any

from brgsa_jax.cli import evals
from brgsa_jax.cli.common import Add, terminal
from brgsa_jax.config import UserError


def add(command: Add) -> None:
    """Adds the command."""
    sub = command("probe", probe, "linear probe of a trained model's frozen image embeddings")
    sub.add_argument("--workdir", required=True, help="work directory of brgsa train, or a "
                     "folder of brgsa convert")
    sub.add_argument("--data", help="data set with the splits train and test [the one a work "
                     "directory was trained on]")
    sub.add_argument("--fractions", type=shares, default=shares("0.01,0.1,1"), metavar="A,B,…",
                     help="shares of the training patients whose labels are used [0.01,0.1,1]")
    sub.add_argument("--projected", action="store_true", help="probe the embedding that is "
                     "compared with texts, not what the image tower gives before its projection")
    sub.add_argument("--seed", type=int, default=0, help="of the shares [%(default)s]")
    sub.add_argument("--out", help="where probe.json and probe.csv go [WORKDIR/probe]")


def shares(text: str) -> tuple[float, ...]:
    """Type of an argument: numbers above 0 and up to 1."""
    values = tuple(float(part) for part in text.split(","))
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text} are not shares above 0 and up to 1, such as "
                                         "0.01,0.1,1")
    return values


def probe(options: argparse.Namespace) -> int:
    """Embeds the splits train and test, fits the probes and writes their figures."""
    import numpy as np
    from rich.progress import Progress

    from brgsa_jax import config as configs
    from brgsa_jax.data.recipe import check_recipe
    from brgsa_jax.data.sources import open_source
    from brgsa_jax.evals.probe import Backbone, linear_probe, write_probe
    from brgsa_jax.evals.run import embed_volumes
    from brgsa_jax.predict import load_model

    workdir = Path(options.workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} holds no config.json; give the work directory of brgsa train, "
                        "or a folder of brgsa convert with --data")
    config = configs.load_json(workdir / "config.json")
    if not options.data and ("format" in config or not config.get("data")):
        raise UserError(f"{workdir} is a model without data; add --data with a folder written by "
                        "brgsa data build")
    data = options.data or config.data.path
    sources = [open_source(data, split) for split in ("train", "test")]
    rows = [row for source in sources for row in source.index]
    names = tuple(name for name in sources[0].metadata["findings"]
                  if any(name in row.findings for row in rows))
    if not names:
        raise UserError(f"no volume of {data} has a finding; build the data set with a column of "
                        "findings")
    options.out = options.out or workdir / "probe"
    out, cache = evals.folders(options, workdir)
    model = load_model(workdir)
    for source in sources:
        check_recipe(source, model.config.input)
    reader = model if options.projected else Backbone(model)
    console = terminal()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        def embed(source: Any) -> Any:
            task = bar.add_task(f"encoding {source.split}", total=len(source))
            return cache.volumes(reader, source, lambda: embed_volumes(
                reader, source, progress=lambda done, _: bar.update(task, completed=done)))

        embeddings = [embed(source) for source in sources]
        probing = bar.add_task("probing", total=None)
        result = linear_probe(
            np.concatenate(embeddings), [[name in row.findings for name in names] for row in rows],
            [row.patient for row in rows], np.arange(len(rows)) < len(sources[0]), names=names,
            fractions=options.fractions, seed=options.seed,
            progress=lambda done, total: bar.update(probing, completed=done, total=total))
    metadata = sources[0].metadata
    files = write_probe(out, result, {
        "data": {"name": metadata["name"], "source": metadata["source"],
                 "fingerprint": metadata["dataset_fingerprint"]},
        "embedding": "projected" if options.projected else "pooled", "seed": options.seed})
    for row in result.probes:
        print(f"{row.fraction:.4g} of the labels ({row.patients} patients): macro AUROC "
              f"{row.macro.value:.3f} ({row.macro.low:.3f}–{row.macro.high:.3f})")
    print(f"probe {files[0]}")
    return 0
