"""The command line as people use it: exit codes, one sentence per mistake, files of every command.

One tiny `brgsa demo` trains the work directory that the other tests evaluate.
"""

import contextlib
import csv
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import nibabel
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from brgsa_jax import cli
from brgsa_jax import mesh as meshes
from brgsa_jax.config import load_json
from brgsa_jax.data import phantom
from brgsa_jax.data.sources import open_source
from brgsa_jax.evals.scores import read_labels, read_scores
from brgsa_jax.summarize.vocabulary import CT_RATE_18

TINY = {
    "model.input.shape": (32, 32, 16), "data.crop": (32, 32, 16), "model.vision.patch": (16, 16, 8),
    "model.vision.stem": (), "model.input.spacing": (12.0, 12.0, 24.0), "model.embed_dim": 24,
    "model.vision.width": 24, "model.vision.depth": 1, "model.vision.mlp_width": 48,
    "model.text.width": 24, "model.text.depth": 1, "model.text.mlp_width": 48,
    "model.text.max_tokens": 16, "data.batch_size": 8, "optim.name": "adamw", "optim.ema": 0.0,
    "train.steps": 3, "train.log_every": 1, "train.checkpoint_every": 2}
GRID = ["--shape", "32,32,16", "--spacing", "12,12,24"]
HEADLINE = r"macro AUROC (\d\.\d{3}) \((\d\.\d{3})–(\d\.\d{3})\), report (.+)"
HOSTILE = ("=cmd()", "<script>alert(1)")


def brgsa(*arguments):
    """Runs a command in this process; returns its exit code, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def overrides(**changes):
    return [f"--config.{key}={value}" for key, value in {**TINY, **changes}.items()]


def refused(result, *words):
    """Holds for a mistake that was told in one line on stderr with exit code 1."""
    assert result.code == 1, result
    assert result.err.startswith("brgsa: ") and result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err
    return True


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "a demo of ü"
    command = ["demo", "--workdir", workdir, *overrides()]
    make_mesh = meshes.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.runs, "DEMO",
                      {"seed": 0, "train": 16, "valid": 0, "test": 12, "workers": 1})
        # Programs for one device compile faster; test_trainer.py uses all of them.
        patch.setattr(meshes, "make_mesh", lambda data=-1, fsdp=1, devices=None: make_mesh(
            data, fsdp, devices or jax.devices()[:1]))
        first = brgsa(*command)
        assert first.code == 0, first
        yield SimpleNamespace(workdir=workdir, command=command, first=first)


@pytest.fixture(scope="module")
def evaluated(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "out"
    result = brgsa("eval", "--workdir", demo.workdir, "--out", out)
    assert result.code == 0, result
    return SimpleNamespace(out=out, result=result)


def scan(path, patient=0, seed=1):
    """Writes a phantom patient as a scanner might have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(phantom.native_image(phantom.generate(5, patient), seed), path)
    return path


def write_table(path, rows):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("id", "report", "findings"), *rows])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of the folder source, built from good, hostile and broken files."""
    root = tmp_path_factory.mktemp("folder")
    images = root / "my images"
    for number, name in enumerate(("a.nii.gz", f"{HOSTILE[0]}.nii.gz", f"deep/{HOSTILE[1]}.nii",
                                   "silent.nii.gz", "one/twice.nii.gz", "two/twice.nii")):
        scan(images / name, patient=number, seed=number)
    shutil.copy(images / "a.nii.gz", images / "extra.nii.gz")
    (images / "text.nii.gz").write_text("no image at all")
    (images / "cut.nii.gz").write_bytes((images / "a.nii.gz").read_bytes()[:5000])
    header = bytearray(scan(images / "nan.nii").read_bytes())
    header[280:284] = np.float32(np.nan).tobytes()
    (images / "nan.nii").write_bytes(header)
    rows = [("a", "Clear lungs.", ""), (HOSTILE[0], "All of it.", ";".join(CT_RATE_18)),
            (HOSTILE[1], "A nodule.", "Lung nodule"), ("silent", "", ""), ("twice", "x", ""),
            ("text", "x", ""), ("cut", "x", ""), ("nan", "x", ""), ("=absent()", "x", ""),
            ("../a", "x", ""), ("/etc/passwd", "x", "")]
    table = write_table(root / "reports.csv", rows)
    command = ["data", "build", "--source", "folder", "--images", images, "--table", table, "--out",
               root / "set", "--findings-column", "findings", "--split", "test", "--workers", "1",
               *GRID]
    return SimpleNamespace(out=root / "set", command=command, result=brgsa(*command))


HELP = """
import contextlib, io, sys
from brgsa_jax import cli
def walk(parser, path):
    print(*path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            cli.main([*path, "--help"])
        except SystemExit as stop:
            assert stop.code == 0, path
    assert out.getvalue().startswith("usage: brgsa"), path
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for name, sub in action.choices.items():
                walk(sub, [*path, name])
walk(cli.build_parser(), [])
heavy = {"jax", "flax", "tensorflow_datasets", "transformers", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_of_every_command_works_without_importing_jax():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {
        "", "demo", "data", "data build", "data check", "data bench",
        "data labels", "train",
        "eval", "metrics", "predict", "probe",
        "show-config",
        "convert", "export", "plan", "summarize"}


def test_a_mistake_in_a_process_of_its_own_gives_one_line_and_no_traceback(tmp_path):
    program = "import sys; from brgsa_jax.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, "train", "--config", "phantom"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "--config.data.path=FOLDER" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [
    [], ["dmeo"], ["data"], ["data", "buidl"], ["eval"], ["eval", "--workdir", "w", "--config.a=1"],
    ["predict", "a.nii", "--model", "m", "--out", "o", "--heatmap"],
    ["train", "--config", "phantom", "--wrkdir=x"], ["train", "--config", "phantom", "left-over"],
    ["demo", "--steps", "5"], ["show-config", "phantom", "--config.train.steps"],
    ["data", "build", "--source", "inspect", "--out", "o"],
    ["data", "build", "--source", "phantom", "--out", "o", "--shape", "64,64"],
    ["data", "build", "--source", "phantom", "--out", "o", "--shape", "64,64,x"],
    ["data", "build", "--source", "phantom", "--out", "o", "--train", "-1"],
    ["data", "build", "--source", "phantom", "--out", "o", "--seed", "-1"],
    ["data", "build", "--source", "phantom", "--out", "o", "--workers", "0"]])
def test_wrong_use_exits_with_2(arguments):
    result = brgsa(*arguments)
    assert result.code == 2 and "usage: brgsa" in result.out + result.err


def test_show_config_prints_the_resolved_configuration():
    result = brgsa("show-config", "phantom:clip", "--config.train.steps=17",
                   "--config.data.path", "x y")
    shown = json.loads(result.out)
    assert (result.code, shown["train"]["steps"], shown["data"]["path"]) == (0, 17, "x y")
    assert "info_nce" in shown["losses"]


@pytest.mark.parametrize("command", [["show-config", "phantom"], ["train", "--config", "phantom"],
                                     ["demo"]])
def test_configuration_typos_are_refused_with_the_nearest_names(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = brgsa(*command, "--config.train.stps=5", "--config.optim.learnin_rate=1",
                   "--config.train.log_every=often")
    assert refused(result, "did you mean 'train.steps'", "optim.learning_rate",
                   "train.log_every='often' is a str")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "words"), [
    (["show-config", "phantm"], ["did you mean 'phantom'"]),
    (["show-config", "none.py"], ["none.py does not exist"]),
    (["show-config", "none.json"], ["none.json cannot be read"]),
    (["train", "--config", "phantom", "--config.data.path=none"],
     ["none is no data set", "brgsa data build"]),
    (["eval", "--workdir", "none"], ["none holds no config.json"]),
    (["metrics", "--scores", "s.csv", "--labels", "l.csv", "--out", "o"], ["cannot read s.csv"]),
    (["data", "build", "--source", "folder", "--out", "o"], ["--images and --table"]),
    (["data", "build", "--source", "folder", "--images", ".", "--table", "t.csv", "--out", "o",
      "--split", "train=nan"], ["--split train=nan", "train=.8"]),
    (["data", "build", "--source", "folder", "--images", ".", "--table", "t.csv", "--out", "o"],
     ["t.csv cannot be read"]),
    (["data", "build", "--source", "phantom", "--out", "o", "--shape", "4,64,32"],
     ["at least 8 voxels"]),
    (["data", "build", "--source", "phantom", "--out", "o", "--train", "0", "--valid", "0",
      "--test", "0"], ["no patients"]),
    (["data", "build", "--source", "phantom", "--out", "file", "--train", "1"],
     ["file is a file"])])
def test_mistakes_are_told_in_one_sentence(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    assert refused(brgsa(*command), *words)


def test_unprintable_characters_of_names_do_not_reach_the_terminal():
    assert refused(brgsa("eval", "--workdir", "a\nb\x1b[31m\udcff"), "a b [31m")


def test_errors_of_the_file_system_and_interrupts_are_no_tracebacks(monkeypatch, tmp_path):
    def stop(options):
        raise error

    monkeypatch.setattr(cli.models, "show_config", stop)
    error = PermissionError(13, "Permission denied", "/some/where")
    assert refused(brgsa("show-config", "phantom"), "/some/where: Permission denied")
    error = OSError("no space left")
    assert refused(brgsa("show-config", "phantom"), "no space left")
    error = KeyboardInterrupt()
    result = brgsa("show-config", "phantom")
    assert result.code == 130 and "goes on from the last checkpoint" in result.err
    error = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError):
        brgsa("show-config", "phantom")


def test_a_folder_with_broken_files_is_built_and_they_are_listed(folder):
    result = folder.result
    assert result.code == 0 and result.err == "", result
    assert "3 images written" in result.out
    assert f"8 refused, 1 left out, see {folder.out}" in result.out
    with (folder.out / "failures.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    reasons = {row["id"]: row["reason"] for row in rows if row["id"]}
    expected = {"silent": "report is empty", "twice": "2 files have this name",
                "text": "not a NIfTI, DICOM or NumPy file", "cut": "cut short",
                "nan": "sform is not finite",
                "'=absent()": "no image file", "../a": "no image file",
                "/etc/passwd": "no image file"}
    assert set(reasons) == set(expected)
    for id_, words in expected.items():
        assert words in reasons[id_]
    assert {row["file"] for row in rows if not row["id"]} == {"extra.nii.gz"}
    source = open_source(folder.out, "test")
    assert {row.id for row in source.index} == {"a", *HOSTILE}
    again = brgsa(*folder.command)
    assert again.code == 0 and "already built with 3 images, reused" in again.out


def test_a_build_with_nothing_usable_fails(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.nii").write_text("x")
    table = write_table(tmp_path / "t.csv", [("a", "fine", ""), ("b", "fine", "")])
    result = brgsa("data", "build", "--source", "folder", "--images", tmp_path / "images",
                   "--table", table, "--out", tmp_path / "set", "--workers", 1, *GRID)
    assert refused(result, "nothing usable: 2 failed", "failures.csv")
    assert (tmp_path / "set" / "failures.csv").read_text().count("\n") == 3


def test_demo_trains_both_models_and_ends_with_the_result(demo):
    lines = demo.first.out.splitlines()
    match = re.fullmatch(HEADLINE, lines[-1])
    assert match and Path(match[4]) == demo.workdir / "eval" / "report.html"
    value, low, high = map(float, match.groups()[:3])
    assert 0 <= low <= value <= high <= 1
    assert any("28 images written" in line for line in lines)
    for folder in (demo.workdir, demo.workdir / "clip"):
        assert {"checkpoints", "config.json", "metrics.jsonl", "model", "tokenizer"} <= {
            path.name for path in folder.iterdir()}
    page = (demo.workdir / "eval" / "report.html").read_text()
    for label in ("BrgSA, untrained", "CLIP, untrained"):
        assert label in page


def test_a_second_demo_reuses_everything_and_says_so(demo, monkeypatch):
    before = (demo.workdir / "model" / "model.safetensors").stat().st_mtime_ns
    # What is evaluated is tested by the first call; here only that nothing is made anew.
    monkeypatch.setattr(cli.evals, "candidates", lambda folder, *_: [folder])
    monkeypatch.setattr(cli.evals, "write_report", lambda models, data, protocol, out, *_: print(
        f"evaluate {[m.name for m in models]} on {Path(data).name} into {out.name}"))
    second = brgsa(*demo.command)
    assert second.code == 0, second
    assert "already built with 28 images, reused" in second.out
    assert second.out.count("already trained for 3 steps, nothing to do") == 2
    assert second.out.splitlines()[-1] == (
        f"evaluate {[demo.workdir.name, 'clip']} on data into eval")
    assert (demo.workdir / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_train_resumes_and_refuses_another_configuration(demo):
    command = ["train", "--config", demo.workdir / "config.json", "--workdir", demo.workdir]
    result = brgsa(*command)
    assert result.code == 0
    assert "resuming at step 3" in result.out and "nothing to do" in result.out
    assert refused(brgsa(*command, "--config.optim.learning_rate=0.5"), "optim.learning_rate was",
                   "--workdir")


def test_eval_writes_the_files_of_the_contract(demo, evaluated):
    match = re.fullmatch(HEADLINE, evaluated.result.out.splitlines()[-1])
    assert Path(match[4]) == evaluated.out / "report.html"
    metrics = json.loads((evaluated.out / "metrics.json").read_text())
    assert metrics["protocol"]["name"] == "ct-rate-18"
    assert re.fullmatch("[0-9a-f]{16}", metrics["protocol"]["hash"])
    assert set(metrics["macro"]["auroc"]) == {"value", "low", "high"}
    assert [f"{metrics['macro']['auroc'][key]:.3f}" for key in ("value", "low", "high")] == list(
        match.groups()[:3])
    assert tuple(metrics["findings"]) == CT_RATE_18
    source = open_source(demo.workdir / "data", "test")
    scores = read_scores(evaluated.out / "scores.csv")
    assert scores.ids == tuple(row.id for row in source.index) and scores.names == CT_RATE_18
    truth = read_labels(evaluated.out / "labels.csv", CT_RATE_18, "patient")
    assert truth.patients == tuple(row.patient for row in source.index)
    for p, name in enumerate(CT_RATE_18):
        labels = np.array([name in row.findings for row in source.index])
        np.testing.assert_array_equal(truth.values[:, p], labels)
        entry = metrics["findings"][name]["auroc"]
        assert set(entry) == {"value", "low", "high"}
        if labels.any() and not labels.all():
            # Not rounded: the file holds full precision.
            assert entry["value"] == pytest.approx(roc_auc_score(labels, scores.values[:, p]),
                                                   abs=1e-14)
        else:
            assert entry["value"] is None and name in metrics["undefined"]
    assert set(metrics["gap"]) == {"direct", "bridged", "image_bridged"}
    other = json.loads((evaluated.out / "phantom_brgsa_untrained" / "metrics.json").read_text())
    assert other["findings"] != metrics["findings"]


class Page(html.parser.HTMLParser):
    """Collects the tags of a page and everything it points to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.handlers = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.links.append(value)
            if name.startswith("on"):
                self.handlers.append(name)


def assert_self_contained(text):
    """Nothing on the page is fetched or run."""
    page = Page(text)
    assert "img" in page.tags and "svg" in page.tags
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "form"}
    assert not page.handlers and "@import" not in text and "url(" not in text
    assert page.links and all(link.startswith(("#", "data:image/png;")) for link in page.links)


def test_the_report_is_self_contained_and_shows_the_untrained_model(evaluated):
    page = (evaluated.out / "report.html").read_text()
    assert_self_contained(page)
    assert "untrained" in page and "phantom patients" in page
    value = json.loads((evaluated.out / "metrics.json").read_text())["macro"]["auroc"]["value"]
    assert f"{value:.3f}" in page


def test_metrics_reproduces_eval_and_leaves_the_given_files_alone(evaluated, tmp_path):
    given = {name: (evaluated.out / name).read_bytes() for name in ("scores.csv", "labels.csv")}
    for name, content in given.items():
        (tmp_path / name).write_bytes(content)
    result = brgsa("metrics", "--scores", tmp_path / "scores.csv", "--labels",
                   tmp_path / "labels.csv", "--patients", "patient", "--out", tmp_path)
    assert result.code == 0, result
    ours, theirs = (json.loads((folder / "metrics.json").read_text())
                    for folder in (tmp_path, evaluated.out))
    for key in ("macro", "findings", "counts", "undefined", "bootstrap"):
        assert ours[key] == theirs[key]
    assert {path.name for path in tmp_path.iterdir()} == {
        *given, "metrics.json", "metrics.csv"}
    for name, content in given.items():
        assert (tmp_path / name).read_bytes() == content
    headline = evaluated.result.out.splitlines()[-1].split(", report")[0]
    assert result.out.startswith(f"{headline}, metrics ")


def test_hostile_ids_stay_text_in_tables_and_report(demo, folder, tmp_path):
    result = brgsa("eval", "--workdir", demo.workdir, "--data", folder.out, "--out", tmp_path / "e",
                   "--no-untrained")
    assert result.code == 0, result
    text = (tmp_path / "e" / "scores.csv").read_text()
    assert "\n'=cmd()," in text and set(read_scores(tmp_path / "e" / "scores.csv").ids) == {
        "a", *HOSTILE}
    page = (tmp_path / "e" / "report.html").read_text()
    assert_self_contained(page)
    assert "&lt;script&gt;alert(1)" in page and "untrained" not in page


def test_data_of_another_grid_is_refused(demo, tmp_path):
    built = brgsa("data", "build", "--source", "phantom", "--out", tmp_path / "large", "--train", 0,
                  "--valid", 0, "--test", 2, "--workers", 1)
    assert built.code == 0, built
    result = brgsa("eval", "--workdir", demo.workdir, "--data", tmp_path / "large", "--out",
                   tmp_path / "e", "--no-untrained")
    assert refused(result, "64×64×32 voxels at 6×6×12 mm", "32×32×16 voxels at 12×12×24 mm")


def test_results_are_not_lost_to_a_folder_that_cannot_be_written(demo, evaluated, tmp_path):
    (tmp_path / "file").write_text("keep me")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        for command in (["eval", "--workdir", demo.workdir],
                        ["metrics", "--scores", evaluated.out / "scores.csv", "--labels",
                         evaluated.out / "labels.csv"],
                        ["predict", "a.nii", "--model", demo.workdir]):
            assert refused(brgsa(*command, "--out", out), "nothing can be written into", "--out")
    result = brgsa("train", "--config", "phantom", "--workdir", tmp_path / "file",
                   f"--config.data.path={demo.workdir / 'data'}", *overrides())
    assert refused(result, "file")
    assert (tmp_path / "file").read_text() == "keep me"


def test_a_work_directory_of_another_kind_is_refused(demo, tmp_path):
    assert refused(brgsa("eval", "--workdir", demo.workdir / "model"), "add --data")
    workdir = tmp_path / "w"
    shutil.copytree(demo.workdir, workdir, ignore=shutil.ignore_patterns("data", "eval", "clip"))
    (tmp_path / "config.json").write_text("{}")
    assert refused(brgsa("eval", "--workdir", tmp_path), "not that of a training run")
    (workdir / "metrics.jsonl").write_text('5\n"loss"\n{"loss": null, "step": 1}\n[1]\n{\n')
    good = (workdir / "config.json").read_text()
    config = json.loads(good)
    config["model"]["vision"]["depth"] = "x"
    (workdir / "config.json").write_text(json.dumps(config))
    assert refused(brgsa("eval", "--workdir", workdir), "not the configuration its model")
    (workdir / "config.json").write_text(good)
    model, = cli.evals.candidates(workdir, load_json(workdir / "config.json"), True)
    assert model.history == []
    shutil.rmtree(workdir / "model")
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").mkdir()
    assert refused(brgsa("eval", "--workdir", workdir), "no complete checkpoint")


def test_unknown_protocol_lists_the_choices(demo):
    assert refused(brgsa("eval", "--workdir", demo.workdir, "--protocol", "ct-rate"), "ct-rate-18")


@pytest.mark.parametrize(("found", "expected"), [([], "cpu"), (["/dev/accel0"], None)])
def test_the_cpu_is_taken_at_once_where_no_accelerator_is(monkeypatch, found, expected):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: [f for f in found
                                                           if f.startswith(pattern[:-1])])
    cli.choose_platform()
    assert os.environ.get("JAX_PLATFORMS") == expected


@pytest.mark.parametrize(("words", "message"), [
    (["ct-rate", "--root", "r", "--summaries", "s"], "--summaries is not for --source ct-rate but"),
    (["ct-rate", "--root", "r", "--split", "train"], "--split is not for --source ct-rate"),
    (["phantom", "--spacing", "3,3,3"], "--spacing is not for --source phantom"),
    (["folder", "--images", "i", "--table", "t", "--twins", "first"], "but for ct-rate; leave it"),
    (["rad-chestct", "--root", "r", "--id-column", "x"], "but for folder and image2d"),
    (["image2d", "--root", "r", "--findings-column", "x"], "CheXpert's"),
    (["folder", "--images", "i", "--table", "t", "--split", "train=.8,train=.2"], "not understood"),
])
def test_options_that_a_source_would_ignore_are_refused(tmp_path, words, message):
    result = brgsa("data", "build", "--out", tmp_path / "o", "--source", *words)
    assert refused(result, message)
    assert not (tmp_path / "o").exists()


def test_labels_are_drafted_reviewed_and_told(tmp_path):
    rows = [{"id": f"v{n}", "findings": ["Lung cyst"] if n % 4 == 0 else [], "sentences": [],
             "status": "ok" if n % 4 == 0 else "normal", "backend": "lexicon/1"} for n in range(20)]
    rows.append({**rows[1], "id": "late", "status": "failed: empty report"})
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["data", "labels", tmp_path / "s.jsonl", "--out", tmp_path / "out"]
    first = brgsa(*command, "--findings", "Lung cyst,Empyema", "--min-positives", "1",
                  "--negatives", "3")
    assert first.code == 0, first
    for words in ("5 (25.0%)", "too rare: Empyema (0)", "1 ids have no summary",
                  "to review: 8 rows of 8 reports", "labels of 20 ids of 20 reports"):
        assert words in first.out, first.out
    review = tmp_path / "out" / "review.csv"
    lines = review.read_text(encoding="utf-8-sig").splitlines()
    for name, right in (("a", 1), ("b", 0)):
        (tmp_path / f"{name}.csv").write_text("\n".join([lines[0], *(
            line.replace(",,,,", f",{line[-5] if right or line[-5] == '0' else 0},Dr. {name},"
                                 "2026-03-14,") for line in lines[1:])]))
    second = brgsa(*command, "--review", tmp_path / "a.csv")
    assert second.code == 0 and "5/5 48%–100%" in second.out and "0/3 0%–71%" in second.out
    third = brgsa(*command, "--review", tmp_path / "a.csv", "--review", tmp_path / "b.csv")
    assert "Dr. a and Dr. b: 3 of 8 answers agree, kappa 0.00" in third.out
    assert "5 labels are empty as answers disagree" in third.out
    assert refused(brgsa(*command), "come from a.csv, b.csv too")
