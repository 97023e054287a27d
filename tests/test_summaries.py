import csv
import json

import numpy as np
import pytest

from brgsa_jax import get_config
from brgsa_jax.config import UserError
from brgsa_jax.data import builders
from brgsa_jax.data.recipe import check_recipe, training_recipe
from brgsa_jax.data.sources import open_source
from brgsa_jax.data.summaries import Summarised, open_captioned, read_summaries
from brgsa_jax.train.trainer import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summaries") / "data"
    builders.build_phantom(folder, train=11, valid=8, shape=(16, 16, 8), workers=1, progress=False)
    return folder


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(id_, *findings, status="ok"):
    return {"id": id_, "findings": list(findings), "sentences": [], "status": status,
            "backend": "lexicon/1"}


@pytest.fixture
def table(data, tmp_path):
    """Summaries in another order than the volumes: two failed, one is missing, one too many."""
    ids = [r.id for r in open_source(data).index]
    rows = [row(ids[7], "Rib fracture"), row("stranger", "Empyema"),
            row(ids[1], status="failed: empty report"), row(ids[0], "Lung cyst", "Emphysema"),
            row(ids[4], status="failed: the answer is not JSON"), row(ids[2], status="normal"),
            *(row(ids[i], "Pneumonia") for i in (5, 6, 8, 9, 10))]
    return written(tmp_path / "s.jsonl", rows)


def test_summaries_take_the_place_of_findings_by_id(data, table):
    whole = open_source(data)
    ids = [r.id for r in whole.index]
    source = Summarised(whole, table)
    kept = [ids[i] for i in (0, 2, 5, 6, 7, 8, 9, 10)]
    assert [r.id for r in source.index] == [record["id"] for record in source] == kept
    assert [r.findings for r in source.index] == [
        ("Lung cyst", "Emphysema"), (), ("Pneumonia",), ("Pneumonia",), ("Rib fracture",),
        *[("Pneumonia",)] * 3]
    assert len(source) == 8
    for position, id_ in enumerate(kept):
        plain = whole[ids.index(id_)]
        assert np.array_equal(source[position]["volume"], plain["volume"])
        assert source[position]["report"] == plain["report"]
        assert source[position]["findings"] == source.index[position].findings
    assert [(f.id, f.reason) for f in source.left_out] == [
        (ids[1], "its summary failed: empty report"), (ids[3], "no row in s.jsonl"),
        (ids[4], "its summary failed: the answer is not JSON")]


def test_the_fingerprint_follows_the_summaries_and_not_their_file(data, table, tmp_path):
    whole = open_source(data)
    first = Summarised(whole, table).fingerprint
    lines = table.read_text().splitlines()
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(lines[::-1]))
    assert Summarised(whole, turned).fingerprint == first != whole.fingerprint
    other = tmp_path / "other.jsonl"
    other.write_text(table.read_text().replace("Lung cyst", "Lung mass"))
    assert Summarised(whole, other).fingerprint != first


def test_a_table_of_findings_will_do(tmp_path):
    path = tmp_path / "findings.csv"
    path.write_text("id,findings\na,Lung cyst; Emphysema ;\nb,\n")
    assert read_summaries(path) == ({"a": ("Lung cyst", "Emphysema"), "b": ()}, {})


@pytest.mark.parametrize(("rows", "match"), [
    ([row("x", "Emphysema")], "a summary of none of the 11 volumes .* like 'x'"),
    ([row("a", "Emphysema"), row("a", "Empyema")], "row 2 .* gives 'a' other findings"),
    ([row("a", "Emphysema"), row("a", status="failed: no")], "both that it failed"),
    ([row("")], "row 1 .* has no id"),
    ([{"id": "a"}], "findings"),
])
def test_unusable_summaries_are_refused_in_one_sentence(data, tmp_path, rows, match):
    with pytest.raises(UserError, match=match):
        Summarised(open_source(data), written(tmp_path / "bad.jsonl", rows))


def test_summaries_that_all_failed_say_so(data, tmp_path):
    rows = [row(r.id, status="failed: empty report") for r in open_source(data).index]
    with pytest.raises(UserError, match="all 11 failed, the first, .*: empty report"):
        Summarised(open_source(data), written(tmp_path / "f.jsonl", rows))


def small(data, **changes):
    return get_config("phantom:clip", **{
        "data.path": str(data), "data.crop": (16, 16, 8), "model.input.shape": (16, 16, 8),
        "model.input.spacing": (24.0, 24.0, 48.0), "model.vision.patch": (8, 8, 4),
        "model.vision.stem": (), "model.vision.width": 16, "model.vision.heads": 2,
        "model.vision.mlp_width": 16, "model.text.width": 16, "model.text.heads": 2,
        "model.text.mlp_width": 16, "model.embed_dim": 8, "data.batch_size": 8, "train.steps": 2,
        **changes})


def test_training_reads_summaries_and_lists_what_has_none(data, table, tmp_path, capsys):
    config = small(data, **{"data.summaries": str(table), "data.captions": "mixed"})
    outcome = train(config, tmp_path / "run")
    assert outcome.stop == 2
    assert "3 of 11 volumes have no summary and are left out" in capsys.readouterr().out
    with (tmp_path / "run/left_out.csv").open() as stream:
        assert [r["reason"] for r in csv.DictReader(stream)][1] == "no row in s.jsonl"
    vocabulary = (tmp_path / "run/tokenizer/tokenizer.json").read_text()
    assert '"pneumonia"' in vocabulary and '"fracture"' in vocabulary
    saved = json.loads((tmp_path / "run/model/config.json").read_text())
    image = saved["model"]["input"]
    assert {f"model.input.{key}": tuple(image[key]) for key in ("stored", "clamp")} == \
        training_recipe(open_source(data)) == {"model.input.stored": (16, 16, 8),
                                               "model.input.clamp": (-1000, 3071)}
    with pytest.raises(UserError, match="its fingerprint differs"):
        train(small(data, **{"data.captions": "mixed", "data.summaries": str(written(
            tmp_path / "new.jsonl", [row(r.id, "Empyema") for r in open_source(data).index])),
            "train.steps": 2}), tmp_path / "run")


def test_only_normal_summaries_teach_nothing(data, tmp_path):
    table = written(tmp_path / "n.jsonl", [row(r.id, status="normal")
                                           for r in open_source(data).index])
    with pytest.raises(UserError, match="no volume of .* has a finding"):
        train(small(data, **{"data.summaries": str(table)}), tmp_path / "run")
    assert len(open_captioned(small(data).data, "valid")) == 8


def test_a_window_beyond_the_clamp_of_training_is_refused(data):
    source = open_source(data)
    image = small(data).model.input
    for window, clamp, refused in [
            ((-1000, 1000), (), False), ((-1000, 1000), (-1000, 3071), False),
            ((-1000, 1000), (-1000, 1000), False), ((-1350, 150), (-1000, 1000), False),
            ((-1000, 2000), (-1000, 1000), True), ((-1350, 150), (-1024, 3071), True),
            (((-1000, 1000), (300, 1500)), (-1000, 1000), True)]:
        image.window, image.clamp = window, clamp
        if refused:
            with pytest.raises(UserError, match="clamped to -1000 to 3071 HU, the model was"):
                check_recipe(source, image)
        else:
            check_recipe(source, image)
    image.update(clamp=(), spacing=(24.0, 24.0, 40.0))
    with pytest.raises(UserError, match="build the data set on the model's grid"):
        check_recipe(source, image)
