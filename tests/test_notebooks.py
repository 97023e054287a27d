"""The notebooks: stripped of outputs in git, and each runs from start to end as it is."""

import ast
import os
import re
from pathlib import Path

import nbformat
import pytest
from conftest import FLAGS
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
INTERVAL = r"[+−]?\d\.\d{3} \(−?\d\.\d{3}(?: to |&nbsp;to&nbsp;)−?\d\.\d{3}\)"
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@named
def test_no_output_is_kept(path):
    text = path.read_text()
    notebook = nbformat.reads(text, 4)
    nbformat.validate(notebook)
    assert text.endswith("}\n") and set(notebook.metadata) == {"kernelspec", "language_info"}
    assert "\n" not in notebook.metadata.kernelspec.display_name
    for number, cell in enumerate(notebook.cells):
        assert cell.id == f"{path.stem[:2]}-{number:02d}" and cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, "strip the outputs"
            assert not cell.source.startswith(("%", "!"))
            assert max(map(len, cell.source.splitlines())) <= 100


@named
def test_only_what_is_public_is_used(path):
    notebook = nbformat.read(path, 4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.startswith("# Sizes"), "sizes come first"
    assert "not patients" in "".join(cell.source for cell in notebook.cells
                                     if cell.cell_type == "markdown") or "device" in path.stem
    for cell in notebook.cells:
        for node in ast.walk(ast.parse(cell.source if cell.cell_type == "code" else "")):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("brgsa_jax"):
                used = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not any(name.startswith("_") for name in used), used
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_"), node.attr


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """What kernels share: a folder to work in, compiled programs, the settings of the suite."""
    root = tmp_path_factory.mktemp("notebooks")
    startup = root / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    # As in conftest: a quarter of the time of tracing.
    (startup / "00.py").write_text("import gc\ngc.freeze()\ngc.set_threshold(50_000, 20, 20)\n")
    flags = " ".join(flag for flag in FLAGS.split() if "device_count" not in flag)
    return {**os.environ, "XLA_FLAGS": flags, "BRGSA_NOTEBOOK_WORK": str(root / "work"),
            "IPYTHONDIR": str(root / "ipython"), "HTTPS_PROXY": "http://127.0.0.1:9",
            "JAX_ENABLE_COMPILATION_CACHE": "1", "JAX_COMPILATION_CACHE_DIR": str(root / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def shown(notebook):
    """All that the cells show, without pictures; and how many pictures."""
    texts, pictures = [], 0
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            pictures += "image/png" in data
            texts.append(output.get("text") or data.get("text/html") or data.get("text/markdown")
                         or "")
    return "\n".join(texts), pictures


@named
def test_it_runs(path, surroundings, tmp_path):
    environment, here = dict(surroundings), tmp_path / "here"
    here.mkdir()
    if "device" in path.stem:
        # Compiled programs for several simulated devices must not be kept, see conftest.
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=300, startup_timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(here)}}).execute(env=environment)
    assert not list(here.iterdir()), "it wrote where it was started"
    text, pictures = shown(notebook)
    assert pictures >= 1
    if "ablate" in path.stem:
        rows = re.findall(r"<tr><td.*?</tr>", text)
        assert len(rows) == 4 and "failed" not in text
        for number, row in enumerate(rows):
            # AUROC, AUPRC, difference, gap, R@5; the first row has nothing to differ from.
            assert len(re.findall(INTERVAL, row)) >= (5 if number else 4), row
        assert "AUROC − that of phantom:" in text and "Phantoms are not patients" in text
    if "gap" in path.stem:
        assert len(re.findall(INTERVAL, text)) == 3 * 4 + 1


def test_the_page_names_every_notebook():
    page = (ROOT / "docs" / "notebooks.md").read_text()
    assert NOTEBOOKS and all(path.name in page for path in NOTEBOOKS)
