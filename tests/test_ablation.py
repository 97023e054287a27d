"""Sweeps as a notebook runs them: rows, paired intervals, failures, what is refused."""

import csv
import io
from types import SimpleNamespace

import drawn
import jax
import numpy as np
import pytest
from brgsa_jax.configs.ablations import SMALL
from rich.console import Console
from scipy.stats import t as student

import brgsa_jax
from brgsa_jax import ablation
from brgsa_jax import config as configs
from brgsa_jax.ablation import AblationRow, AblationTable, ablate
from brgsa_jax.config import UserError, get_config
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.evals.bootstrap import Interval, interval
from brgsa_jax.evals.evaluate import compare
from brgsa_jax.train import trainer

QUIET = Console(quiet=True)
TINY = {**SMALL, "data.batch_size": 8, "train.steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "phantom"
    build_phantom(out, seed=1, train=16, test=24, shape=(32, 32, 16), workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def compiled_once():
    """Trainings on one device from a drawn state; seeds of a run share what is compiled."""
    made, make = {}, trainer.meshes.make_mesh

    def make_training(config, mesh, **options):
        key = configs.to_json(configs.override(config, {"seed": 0}))
        if key not in made:
            training, compiled = drawn.training(config, mesh, **options), []

            def lower(*arguments):
                compiled[:] = compiled or [training.train_step.lower(*arguments).compile()]
                return SimpleNamespace(compile=lambda: compiled[0])

            made[key] = training._replace(train_step=SimpleNamespace(lower=lower))
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.meshes, "make_mesh", lambda *_: make(1, 1, jax.devices()[:1]))
        patch.setattr(trainer, "make_training", make_training)
        yield


@pytest.fixture(scope="module")
def swept(data, compiled_once, tmp_path_factory):
    """A sweep of two runs and two seeds, with a run that fails; its evaluations; the same again."""
    workdir, told, kept = tmp_path_factory.mktemp("sweep"), io.StringIO(), {}
    console = Console(file=told, width=200)
    runs = {"phantom/bank_128": "phantom/bank_128", "no bank": ("phantom:clip", {}),
            "<b>bad|": ("phantom", {"data.batch_size": 64})}
    run = ablation._run

    def keep(config, folder, *rest):
        kept[folder.relative_to(workdir).as_posix()] = evaluation = run(config, folder, *rest)
        return evaluation

    def sweep(runs, seeds):
        table = ablate(runs, data=data, workdir=workdir, seeds=seeds, overrides=TINY,
                       console=console)
        return table, {path: path.stat().st_mtime_ns for path in workdir.rglob("model/*")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "_run", keep)
        table, before = sweep(runs, (0, 3))
        told.truncate(0)
        again, after = sweep({"no bank": runs["no bank"]}, (3,))
    return workdir, table, kept, (again, before, after, told.getvalue())


def test_rows_are_means_over_seeds_with_differences_to_the_first(swept):
    workdir, table, kept, _ = swept
    bank, clip, bad = table.rows
    assert (bank.seeds, clip.seeds, bad.seeds) == ((0, 3), (0, 3), ())
    assert len(bad.failures) == 2 and "seed 3 failed" in bad.failures[1] and not bad.figures
    assert "more than the 16 volumes" in bad.failures[0] and "\n" not in bad.failures[0]
    assert "difference" not in bank.figures and "gap_bridged" not in clip.figures
    runs = {name: [kept[f"{name}/seed_{seed}"] for seed in (0, 3)]
            for name in ("phantom_bank_128", "no_bank")}
    for row, evaluations in zip((bank, clip), runs.values(), strict=True):
        expected = np.mean([e.metrics["macro"]["auroc"]["value"] for e in evaluations])
        assert row.figures["auroc"].value == pytest.approx(expected, abs=1e-12)
    gaps = [e.gaps["bridged"].gap.distance.value for e in runs["phantom_bank_128"]]
    assert bank.figures["gap_bridged"].value == pytest.approx(np.mean(gaps), abs=1e-12)
    recall = [e.metrics["retrieval"]["report_to_volume"]["recall"]["5"]["value"]
              for e in runs["no_bank"]]
    assert clip.figures["recall_at_5"].value == pytest.approx(np.mean(recall), abs=1e-12)
    paired = [compare(one, other).auroc
              for one, other in zip(runs["no_bank"], runs["phantom_bank_128"], strict=True)]
    found = clip.figures["difference"]
    assert found.value == pytest.approx(np.mean([p.value for p in paired]), abs=1e-12)
    spread = student.ppf(0.975, 1) * np.std([p.value for p in paired], ddof=1) / np.sqrt(2)
    assert found.high - found.low >= min(2 * spread, 1.0)
    for name in runs:
        assert (workdir / name / "seed_3/eval/metrics.json").is_file()


def test_what_is_finished_is_not_trained_again(swept):
    workdir, _, kept, (again, before, after, told) = swept
    assert before == after and len(before) > 4
    assert told.count("already trained for 2 steps") == 1
    assert again.rows[0].figures["auroc"][:3] == kept["no_bank/seed_3"].macro_auroc[:3]


def test_one_seed_gives_the_interval_of_the_evaluation_itself(swept, data):
    _, _, kept, _ = swept
    one, other = kept["no_bank/seed_0"], kept["phantom_bank_128/seed_0"]
    figures = ablation._figures({0: one}, {0: other}, 0.95)
    assert figures["auroc"][:3] == one.macro_auroc[:3]
    assert figures["difference"][:3] == pytest.approx(compare(one, other).auroc[:3], abs=1e-12)
    assert figures["gap"][:3] == one.gaps["direct"].gap.distance[:3]


def test_a_folder_of_another_run_is_refused_in_its_row(swept, data):
    workdir, *_ = swept
    before = (workdir / "no_bank/seed_0/config.json").read_bytes()
    table = ablate({"no bank": "phantom:clip"}, data=data, workdir=workdir, console=QUIET,
                   overrides={**TINY, "train.steps": 3})
    [failure] = table.rows[0].failures
    assert "holds a run with another configuration (train.steps was 2 and is now 3)" in failure
    assert (workdir / "no_bank/seed_0/config.json").read_bytes() == before


def test_the_interval_over_seeds_covers_what_it_says():
    """Estimates of a known mean from few patients and few seeds, both of which vary."""
    rng, seeds, patients, hits = np.random.default_rng(0), 4, 200, 0
    for _ in range(400):
        shared = rng.normal(size=patients)
        offsets = rng.normal(size=seeds) * 0.08
        rows = shared + 0.3 * rng.normal(size=(seeds, patients)) + offsets[:, None]
        picked = rng.integers(patients, size=(200, patients))
        means = rows.mean(1)
        known = interval(means.mean(), rows.mean(0)[picked].mean(-1))
        found = ablation._over_seeds(means, known, 0.95, (-9.0, 9.0))
        assert found.low <= known.low and known.high <= found.high
        hits += found.low <= 0.0 <= found.high
    assert 0.93 <= hits / 400 <= 0.99


def table_of(label, failures=()):
    figures = {"auroc": Interval(0.8123, 0.79, 0.83), "difference": Interval(-0.01, -0.04, 0.02)}
    return AblationTable((AblationRow("first", {"auroc": Interval(0.5, 0.4, np.nan)}, (0,), ()),
                          AblationRow(label, figures, (0, 1), failures)), ("A <note>.",))


def test_a_table_reads_the_same_everywhere_and_stays_text(tmp_path):
    table = table_of("=1+1 <script>a|b`", ("seed 2 failed: <i>x</i> @y",))
    shown, page = table.to_markdown(), table._repr_html_()
    assert "−0.010 (−0.040 to 0.020)" in shown and "−0.010 (−0.040&nbsp;to&nbsp;0.020)" in page
    assert "0.812 (0.790 to 0.830)" in shown
    assert "<script" not in page + shown and "<i>" not in page + shown and "<note" not in page
    assert r"\|" in shown.splitlines()[3] and len({
        line.replace(r"\|", "").count("|") for line in shown.splitlines()[:4]}) == 1
    table.to_csv(tmp_path / "t.csv")
    rows = list(csv.DictReader((tmp_path / "t.csv").open(newline="")))
    assert rows[1]["label"] == "'=1+1 <script>a|b`" and rows[1]["difference_low"] == "-0.04"
    assert rows[0]["difference"] == "" and rows[1]["seeds"] == "0 1"
    for word in ("best", "better than", "winner", "significant", "<b>", "<strong>", "**"):
        assert word not in page and word not in shown


@pytest.mark.parametrize(("runs", "options", "words"), [
    ([], {}, "no run to compare"),
    (["phantom", "phantom"], {}, "more than once"),
    (["phantom/bank_12"], {}, "run 'phantom/bank_12': unknown"),
    (["phantom"], {"overrides": {"model.bank.row": 3}}, "run 'phantom': unknown configuration key"),
    (["phantom"], {"overrides": {"data.batch_size": 1}}, "batch_size=1 must be at least 2"),
    (["phantom", "phantom/bank_128"], {"overrides": {"model.bank.rows": 8}},
     "'phantom' and 'phantom/bank_128' are the same configuration"),
    ({"a b": "phantom", "a_b": "phantom:clip"}, {}, "'a b' makes no folder of its own"),
    ({"..": "phantom"}, {}, "makes no folder of its own"),
    ({"": "phantom"}, {}, "makes no folder of its own"),
    ({"x" * 300: "phantom"}, {}, "makes no folder of its own"),
    (["phantom"], {"seeds": ()}, "seeds"), (["phantom"], {"seeds": (1, 1)}, "seeds"),
    (["phantom"], {"seeds": (-1,)}, "seeds"),
    (["phantom"], {"protocol": "nope"}, "unknown protocol"),
    (["phantom"], {"data": None}, "no data set"),
    ({"a": 5}, {}, "run 'a'"), ({"a": ("phantom", 5)}, {}, "run 'a'"),
])
def test_a_wrong_sweep_is_one_sentence_before_anything_is_trained(data, tmp_path, runs, options,
                                                                  words):
    with pytest.raises(UserError, match=words) as caught:
        ablate(runs, **{"data": data, "workdir": tmp_path / "w", **options})
    assert "\n" not in str(caught.value) and not (tmp_path / "w").exists()


def test_runs_may_be_configurations_and_data_their_own(data):
    config = get_config("phantom", **{"data.path": str(data), "train.steps": 7})
    plan = ablation._plan({"mine": config, "other": ("phantom/bank_128", {"train.steps": 5})},
                          None, {"data.path": str(data), "train.steps": 3})
    assert [c.train.steps for c in plan.values()] == [3, 5]
    assert [c.model.bank.rows for c in plan.values()] == [256, 128]
    with pytest.raises(UserError, match="different data sets"):
        ablation._plan({"mine": config, "other": ("phantom", {"data.path": "y"})}, None, {})


def test_it_is_there_by_its_name():
    assert brgsa_jax.ablate is ablate
