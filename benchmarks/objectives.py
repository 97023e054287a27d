"""The objectives on the same phantoms: `python -m benchmarks.objectives [--workdir DIR]`.

Same towers, data, order of the data and steps; three seeds each. A work directory that is given
keeps the runs, and finished ones are not trained again.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.record import fill, read, save, table
from brgsa_jax.config import get_config, load_json
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.data.sources import open_source
from brgsa_jax.data.tokenizer import caption
from brgsa_jax.evals.protocol import get_protocol
from brgsa_jax.evals.retrieval import chance_recall_at_k, recall_at_k
from brgsa_jax.evals.run import embed_volumes, evaluate_embedded, read_cases
from brgsa_jax.evals.scores import score_matrix
from brgsa_jax.predict import load_model
from brgsa_jax.summarize.vocabulary import CT_RATE_18, CT_RATE_LT_15

# MGCA twice: its BatchNorm heads centre both modalities, which is half of what its row shows.
RUNS = {
    "clip": ("phantom:clip", {}),
    "siglip": ("phantom:siglip", {}),
    "mgca": ("phantom:mgca", {}),
    "mgca, linear heads": ("phantom:mgca", {"model.head.name": "linear"}),
    "brgsa": ("phantom:brgsa", {}),
    "brgsa_mgca": ("phantom:brgsa_mgca", {}),
}
DATA = {"seed": 0, "train": 3000, "valid": 0, "test": 1000}
STEPS = 500
SEEDS = (0, 1, 2)
COLUMNS = {"AUROC, 18 common": "auroc_common", "AUROC, 15 rare": "auroc_rare",
           "report → volume R@10": "report_to_volume",
           "volume → report R@10": "volume_to_report",
           "centroid distance, direct": "distance_direct", "bridged": "distance_bridged"}


def main() -> None:
    """Trains and judges every recipe and seed; writes the result file and the page's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", help="keeps data and runs here")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    fresh = options.workdir is None
    with tempfile.TemporaryDirectory() if fresh else contextlib.nullcontext(
            options.workdir) as folder:
        root = Path(folder)
        build_phantom(root / "data", shape=tuple(get_config("phantom").model.input.shape), **DATA)
        source = open_source(root / "data", "test")
        runs = {name: [judge(train(root, name, seed, options.steps), source)
                       for seed in options.seeds] for name in RUNS}
        chance = chance_of(source)
    summary = {name: {key: spread([run[key] for run in rows]) for key in rows[0]}
               for name, rows in runs.items()}
    save("objectives", "python -m benchmarks.objectives", {
        "data": "phantom patients, not real ones", **DATA, "steps": options.steps,
        "batch_size": get_config("phantom").data.batch_size, "seeds": list(options.seeds),
        "protocol": "ct-rate-33", "recipes": RUNS,
        "common": list(CT_RATE_18), "rare": list(CT_RATE_LT_15),
        "chance": chance, "mean_and_sd": summary, "runs": runs})
    print_table()


def train(root: Path, name: str, seed: int, steps: int) -> Path:
    """Trains one run as a user would; returns its work directory."""
    recipe, changes = RUNS[name]
    workdir = root / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    changes = {"data.path": root / "data", "seed": seed, "train.steps": steps, **changes}
    subprocess.run([sys.executable, "-m", "brgsa_jax.cli", "train", "--config", recipe,
                    "--workdir", str(workdir),
                    *(f"--config.{key}={value}" for key, value in changes.items())], check=True)
    return workdir


def judge(workdir: Path, source) -> dict[str, float | None]:
    """Zero-shot AUROC, retrieval and gap of one run on the test split."""
    model, data = load_model(workdir), load_json(workdir / "config.json").data
    protocol = get_protocol("ct-rate-33")
    cases = read_cases(source, protocol)
    image = embed_volumes(model, source)
    evaluation = evaluate_embedded(model, image, cases, protocol,
                                   normal_caption=data.normal_caption, sentences=data.sentences)
    auroc = {name: found["auroc"]["value"]
             for name, found in evaluation.metrics["findings"].items()}
    texts, match = reports(cases, data.normal_caption)
    cosine = score_matrix(image, model.encode_text(texts), None, None, "direct")
    gap = evaluation.metrics["gap"]
    return {
        "auroc_common": float(np.mean([auroc[name] for name in CT_RATE_18])),
        "auroc_rare": float(np.mean([auroc[name] for name in CT_RATE_LT_15])),
        "report_to_volume": recall_at_k(cosine.T, match.T)[10],
        "volume_to_report": recall_at_k(cosine, match)[10],
        "distance_direct": gap["direct"]["distance"]["value"],
        "distance_bridged": gap["bridged"]["distance"]["value"] if "bridged" in gap else None,
    }


def reports(cases, normal_caption: str) -> tuple[list[str], np.ndarray]:
    """The different captions of all findings, and which volume [N, M] each belongs to."""
    texts = [caption(findings, limit=0, normal=normal_caption) for findings in cases.findings]
    different = sorted(set(texts))
    return different, np.array([[text == other for other in different] for text in texts])


def chance_of(source) -> dict[str, float]:
    """What a model that knows nothing scores."""
    cases = read_cases(source, get_protocol("ct-rate-33"))
    _, match = reports(cases, "There is no abnormality")
    return {"auroc_common": 0.5, "auroc_rare": 0.5,
            "report_to_volume": chance_recall_at_k(match.T)[10],
            "volume_to_report": chance_recall_at_k(match)[10]}


def spread(values: list[float | None]) -> dict[str, float] | None:
    """Mean and sample standard deviation over seeds."""
    if values[0] is None:
        return None
    return {"mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def print_table() -> None:
    """Prints the table of the result file and puts it into the documentation."""
    result = read("objectives")["result"]

    def cell(found: dict[str, float] | None) -> str:
        return "–" if found is None else f"{found['mean']:.3f} ± {found['sd']:.3f}"

    rows = [[name, *(cell(found[key]) for key in COLUMNS.values())]
            for name, found in result["mean_and_sd"].items()]
    rows.append(["chance", *(f"{result['chance'][key]:.3f}" if key in result["chance"] else "–"
                             for key in COLUMNS.values())])
    header = ["phantom patients, not real ones", *COLUMNS]
    note = (f"Mean ± SD over {len(result['seeds'])} seeds; {result['steps']} steps of "
            f"{result['batch_size']} on {result['train']} patients, judged on {result['test']}; "
            f"from `benchmarks/results/objectives.json`.")
    fill("docs/objectives.md", "objectives", [*table(header, rows), "", note])


if __name__ == "__main__":
    main()
