"""Time and memory of loading weights of real size: `python -m benchmarks.weights`.

The files hold the names and shapes of the real models and numbers of no meaning; they are read from
the page cache in a process of their own, after its imports.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.record import fill, origin, read, save, table

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "ckpt"
LOAD = """
import sys, time
import jax
from brgsa_jax.weights import import_checkpoint, load_bert
from brgsa_jax.weights.vision import read_vision
jax.block_until_ready(jax.numpy.zeros(1))

def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status")
                if line.startswith(key)) * 1024

open("/proc/self/clear_refs", "w").write("5")
before, start = memory("VmRSS"), time.perf_counter()
kept = {"bert": load_bert, "vit": read_vision, "brgsa": import_checkpoint,
        "mgca": import_checkpoint}[sys.argv[1]](sys.argv[2])
print(time.perf_counter() - start, memory("VmHWM") - before)
"""


def main() -> None:
    """Writes the files, loads each three times, keeps the medians."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, label, path, weights in files(Path(folder)):
            size = weights.stat().st_size
            runs = [list(map(float, subprocess.run(
                [sys.executable, "-c", LOAD, kind, str(path)], check=True, capture_output=True,
                text=True).stdout.split())) for _ in range(3)]
            seconds, peak = np.median(np.array(runs), axis=0)
            result[label] = {"file_bytes": size, "seconds": float(seconds),
                             "peak_over_file": float(peak / size)}
            weights.unlink()
    save("weights", "python -m benchmarks.weights", {
        "what": "loading in a fresh process, from the page cache, without the start of Python",
        "models": result})
    print_table()


def files(folder: Path):
    """Yields (kind, label, what to load, the file with the weights)."""
    shapes = json.loads((GOLDEN / "keys_full_brgsa.json").read_text())
    towers = {"bert": "gloria.text_encoder.model.", "vit": "img_encoder_q.model."}
    bert = {key.removeprefix(towers["bert"]): shape for key, shape in shapes.items()
            if key.startswith(towers["bert"])}
    (folder / "bert").mkdir()
    (folder / "bert/config.json").write_text(json.dumps({
        "model_type": "bert", "num_attention_heads": 12, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12}))
    yield ("bert", "BERT-base, safetensors", folder / "bert",
           write(bert, folder / "bert/model.safetensors"))
    mgca = json.loads((GOLDEN / "keys_full_mgca.json").read_text())
    vit = {key.removeprefix(towers["vit"]): shape for key, shape in mgca.items()
           if key.startswith(towers["vit"])}
    path = write(vit, folder / "vit.safetensors")
    yield "vit", "ViT-B/16, timm", path, path
    for kind, label, keys in (("brgsa", "BrgSA, imported", shapes),
                              ("mgca", "MGCA with ViT-B/16, imported", mgca)):
        path = write(keys, folder / f"{kind}.safetensors")
        yield kind, label, path, path


def write(shapes: dict[str, list[int]], path: Path) -> Path:
    """Writes a file with these tensors."""
    block = np.random.default_rng(0).normal(0.0, 0.02, 1 << 20).astype("f4")
    integers = ("position_ids", "num_batches_tracked")
    save_file({key: np.zeros(shape, "i8") if key.endswith(integers) else np.resize(block, shape)
               for key, shape in shapes.items()}, str(path))
    return path


def print_table() -> None:
    """Prints the table of the result file and puts it into the documentation."""
    recorded = read("weights")
    rows = [[label, f"{m['file_bytes'] / 1e6:.0f} MB", f"{m['seconds']:.1f} s",
             f"{m['peak_over_file']:.2f} × the file"]
            for label, m in recorded["result"]["models"].items()]
    lines = table(["Model", "File", "Time", "Memory above the start"], rows)
    fill("docs/weights.md", "weights", [*lines, "", origin(recorded, "weights")])


if __name__ == "__main__":
    main()
