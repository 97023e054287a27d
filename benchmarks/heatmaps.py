"""Where heat-maps point on phantom patients: `python -m benchmarks.heatmaps --workdir DIR`.

DIR is a work directory of `brgsa demo`; its test patients' boxes are compared with the maps of
every method and, as a control, with those of the same model before training.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.record import fill, origin, read, save, table

METHODS = ("cam", "rollout", "similarity")
PROTOCOL = "ct-rate-18"


def main() -> None:
    """Scores the maps and records the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    workdir = parser.parse_args().workdir
    from brgsa_jax import config as configs
    from brgsa_jax.data.sources import open_source
    from brgsa_jax.evals.localisation import localise_source
    from brgsa_jax.evals.protocol import get_protocol
    from brgsa_jax.predict import load_model
    from brgsa_jax.train.start import untrained_model

    config = configs.load_json(workdir / "config.json")
    protocol, model = get_protocol(PROTOCOL), load_model(workdir)
    source = open_source(config.data.path, "test")
    found: dict[str, Any] = {method: localise_source(model, source, protocol, method=method)
                             for method in METHODS}
    found["cam, untrained"] = localise_source(untrained_model(config, model.tokenizer), source,
                                              protocol, method="cam")
    save("heatmaps", "python -m benchmarks.heatmaps --workdir DIR", {
        "data": "phantom patients, not real ones", "steps": config.train.steps,
        "protocol": {"name": protocol.name, "hash": protocol.hash},
        "dataset": source.fingerprint, "methods": json.loads(json.dumps(found))})
    print_table()


def print_table() -> None:
    """Prints the table of the result file and puts it into the page on heat-maps."""
    recorded = read("heatmaps")

    def gain(score: dict[str, Any], name: str) -> str:
        if name not in score["against"]:
            return "–"
        found = score["against"][name]["gain"]
        return f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"

    rows = []
    for method, found in recorded["result"]["methods"].items():
        pointing, macro = found["macro"]["pointing"], found["macro"]
        rows.append([method, f"{pointing['value']:.3f}",
                     f"{pointing['against']['body']['level']:.3f}",
                     *(gain(pointing, name) for name in ("body", "other_prompts",
                                                         "other_patients")),
                     f"{macro['dice']['value']:.3f}", f"{macro['hit_rate']['value']:.3f}"])
    lines = table(["Phantom patients, not real ones", "Pointing game", "Chance", "over chance",
                   "over other prompts", "over other patients", "Dice", "Hit rate"], rows)
    fill("docs/heatmaps.md", "heatmaps", [*lines, "", origin(recorded, "heatmaps")])


if __name__ == "__main__":
    main()
