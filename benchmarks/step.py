"""Train and inference step of a ViT beside an equivalent PyTorch model, same machine, same run.

`python -m benchmarks.step [--torch PYTHON] [--device cpu|gpu] [--rounds N]` writes
benchmarks/results/step_DEVICE.json. PYTHON is an interpreter with PyTorch: this one by default,
on a CPU one where `pip install torch==2.13.0` was run. Both workers hold the same weights, which
ours draws, and take the same images; that they give the same embeddings is checked first. They
take turns, one step each; a turn is one step on a CPU and `STEPS` of them on a GPU. Nobody
recomputes activations. The twin runs eagerly and compiled, and is judged by the faster one. On a
GPU it runs in bfloat16 by autocast, with PyTorch's fused AdamW on both devices.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record

HERE = Path(__file__).parent
VIT = {"patch": [16, 16, 8], "width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}
# Image, images a step; 343 and 1 372 patches on a CPU, 2 744 and 4 096 on a GPU.
CASES = {"cpu": {"343 tokens": ([112, 112, 56], 4), "1 372 tokens": ([224, 224, 56], 1)},
         "gpu": {"224×224×112": ([224, 224, 112], 64), "256×256×128": ([256, 256, 128], 64)}}
# The second size of a GPU is for inference alone.
MODES = {"256×256×128": ("inference",)}
WORKERS = {"ours": {}, "ours, all tokens": {"all_tokens": True},
           "PyTorch": {}, "PyTorch, compiled": {"compiled": True}}
STEPS = {"cpu": 1, "gpu": 10}


class Worker:
    """A process that holds a model and runs a turn whenever it is told."""

    def __init__(self, name: str, spec: dict[str, Any], torch: str) -> None:
        self.name = name
        python, script = ((torch, "step_torch.py") if name.startswith("PyTorch")
                          else (sys.executable, "step_ours.py"))
        # What the other framework has reserved on a GPU is missing here.
        environ = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(HERE.parent), environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [python, str(HERE / script), json.dumps({**spec, **WORKERS[name]})], env=environ,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, word: str) -> dict[str, Any]:
        """Sends one word and returns the answer."""
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"the worker {self.name!r} ended; see its message above")

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


def compare(spec: dict[str, Any], rounds: int, torch: str) -> dict[str, Any]:
    """Lets all workers take turns; seconds of a step by worker, and how far apart results are."""
    turns: dict[str, list[float]] = {name: [] for name in WORKERS}
    workers = []
    try:
        for name in WORKERS:
            workers.append(Worker(name, spec, torch))
            # The first writes the weights that the others read.
            workers[-1].ask("ready")
        outputs = {worker.name: worker.ask("check")["output"] for worker in workers}
        for worker in workers:
            worker.ask("step")
        versions = {worker.name: worker.ask("version")["version"] for worker in workers}
        for number in range(rounds):
            # To and fro: a turn leaves its traces to the next.
            for worker in workers[::-1 if number % 2 else 1]:
                # Threads that wait by spinning after a turn are asleep before the next.
                time.sleep(0.3)
                turns[worker.name].append(worker.ask("step")["seconds"])
        memory = {worker.name: worker.ask("memory")["bytes"] for worker in workers}
    finally:
        for worker in workers:
            worker.close()
    ours = outputs["ours"]
    scale = max(abs(x) for x in ours)
    return {"seconds": {name: statistics.median(times) for name, times in turns.items()},
            "least_seconds": {name: min(times) for name, times in turns.items()},
            "turns": turns, "peak_bytes": memory, "versions": versions,
            "largest_difference": max(abs(a - b) / scale for other in outputs.values()
                                      for a, b in zip(ours, other, strict=True))}


def judged(result: dict[str, Any], batch: int) -> dict[str, Any]:
    """Adds samples per second and our speed over that of the faster twin."""
    for kind in ("seconds", "least_seconds"):
        times = result[kind]
        twin = min(times["PyTorch"], times["PyTorch, compiled"])
        suffix = "" if kind == "seconds" else "_least"
        result["ratio" + suffix] = twin / times["ours"]
        result["ratio_all_tokens" + suffix] = twin / times["ours, all tokens"]
    result["samples_per_second"] = {name: batch / s for name, s in result["seconds"].items()}
    return result


def model_flops(image: list[int], batch: int, mode: str) -> float:
    """Analytic FLOPs of a step, the last block for the first token alone."""
    from brgsa_jax import flops

    places = 1
    for size, patch in zip(image, VIT["patch"], strict=True):
        places *= size // patch
    width = VIT["width"]
    forward = (flops.vit_blocks(places + 1, width, VIT["depth"], VIT["mlp_width"], only_cls=True)
               + 2 * places * width * VIT["patch"][0] * VIT["patch"][1] * VIT["patch"][2])
    return batch * forward * (3 if mode == "training" else 1)


def main() -> None:
    """Runs all cases of a device and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every worker [7]")
    parser.add_argument("--show", action="store_true", help="only the table, from the result file")
    options = parser.parse_args()
    if options.show:
        return show(options.device)
    results, kind = {}, None
    for case, (image, batch) in CASES[options.device].items():
        for mode in MODES.get(case, ("inference", "training")):
            with tempfile.TemporaryDirectory() as folder:
                spec = {**VIT, "image": image, "batch": batch, "mode": mode,
                        "device": options.device, "steps": STEPS[options.device],
                        "dtype": "float32" if options.device == "cpu" else "bfloat16",
                        "threads": len(os.sched_getaffinity(0)), "folder": folder}
                result = judged(compare(spec, options.rounds, options.torch), batch)
            result |= {"image": image, "batch": batch, "mode": mode, "dtype": spec["dtype"]}
            if options.device == "gpu":
                kind = kind or subprocess.run(
                    ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], check=True,
                    capture_output=True, text=True).stdout.splitlines()[0]
                from brgsa_jax.hardware import chip_of
                chip = chip_of(kind)
                work = model_flops(image, batch, mode)
                result["mfu"] = chip and work / result["seconds"]["ours"] / chip.flops
            results[f"{case}, {mode}"] = result
            print(f"{case}, {mode}: " + ", ".join(
                f"{name} {s * 1e3:.0f} ms" for name, s in result["seconds"].items())
                + f"; {result['ratio']:.2f} x the faster twin", flush=True)
    record.save(f"step_{options.device}", f"python -m benchmarks.step --device {options.device}",
                {"vit": VIT, "gpu": kind, "cases": results})
    show(options.device)


def show(device: str) -> None:
    """Fills the table of a device in docs/running.md from its result file."""
    recorded = record.read(f"step_{device}")
    cases = recorded["result"]["cases"]
    versions = ", ".join(sorted(set(next(iter(cases.values()))["versions"].values())))
    rows = [[case, str(r["batch"]), *(f"{r['seconds'][name] * 1e3:.0f}" for name in WORKERS),
             f"{r['ratio']:.2f} ×", f"{r['ratio_all_tokens']:.2f} ×",
             *([f"{r['mfu']:.0%}" if r["mfu"] else "–"] if device == "gpu" else [])]
            for case, r in cases.items()]
    lines = record.table(
        ["ms, ViT-B/16, " + ("float32, CPU" if device == "cpu" else
                             f"bfloat16, {recorded['result']['gpu']}"),
         "batch", *WORKERS, "ours : faster PyTorch", "the same, all tokens",
         *(["MFU"] if device == "gpu" else [])], rows)
    record.fill("docs/running.md", f"step-{device}", [
        *lines, "", f"{record.origin(recorded, f'step_{device}')} {versions}."])


if __name__ == "__main__":
    main()
