"""Maps against boxes and masks: scores by hand, chance, controls, masks of files."""

import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from test_model import make_model

from brgsa_jax import cli
from brgsa_jax.config import UserError
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.data.volume import Preprocess, load_volume
from brgsa_jax.evals import localisation as loc
from brgsa_jax.evals.protocol import Prompts, Protocol

SHAPE = (12, 10, 8)
FINDINGS = ("A", "B")


def box(*corners, shape=SHAPE):
    return loc.boxes_to_masks({"x": [corners]}, shape)["x"]


def bump(at):
    """A map with its only maximum at a voxel."""
    away = np.indices(SHAPE) - np.reshape(at, (3, 1, 1, 1))
    return np.exp(-np.abs(away).sum(0) / 2.0)


def localised(cases, maps, **options):
    """`localise` with the maps of each case listed."""
    drawn = iter(maps)
    return loc.localise(lambda: iter(cases), lambda image: next(drawn), FINDINGS,
                        **{"resamples": 200, **options})


def test_scores_of_one_map_by_hand():
    heat = np.zeros(SHAPE)
    heat[2, 3, 4], heat[2, 3, 5], heat[9, 9, 7] = 4, 2, 1.9
    marks = loc.marks_of(heat)
    found = loc.score_marks(marks, box(2, 3, 4, 3, 4, 7))
    assert found == {"pointing": 1.0, "dice": 2 * 2 / (2 + 3), "hit_rate": 1.0}
    # 960 voxels: the highest 9, but no voxel that equals the tenth.
    assert marks.top.sum() == 3
    found = loc.score_marks(marks, box(8, 8, 6, 12, 10, 8))
    assert found == {"pointing": 0.0, "dice": 0.0, "hit_rate": 1.0}
    heat[7, 7, 0] = 4
    assert loc.score_marks(loc.marks_of(heat), box(7, 7, 0, 8, 8, 1))["pointing"] == 0.5


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_map_without_contrast_scores_what_chance_does(value):
    region = box(0, 0, 0, 6, 5, 4)
    found = loc.score_marks(loc.marks_of(np.full(SHAPE, value)), region)
    assert found["pointing"] == region.mean() and found["hit_rate"] == 0


def test_the_body_is_tissue_and_the_air_it_encloses():
    volume = np.full((20, 20, 6), -1000, np.int16)
    volume[4:16, 4:16] = 0
    volume[7:10, 7:12] = -850
    volume[0, :, :] = 100
    wanted = np.zeros(volume.shape, bool)
    wanted[4:16, 4:16] = True
    np.testing.assert_array_equal(loc.body_of(volume), wanted)
    assert loc.body_of(np.full((4, 4, 4), -1000)).all()
    assert loc.body_of(np.zeros((5, 6), np.uint8)).shape == (5, 6)


def test_levels_gains_and_their_intervals():
    """A points at A's region always, B elsewhere; chance is each region's share of the body."""
    image = np.zeros(SHAPE, np.int16)
    rng = np.random.default_rng(0)
    cases, maps, chance = [], [], []
    for patient in range(30):
        low = rng.integers(0, [8, 6, 5])
        regions = {"A": box(*low, *(low + 3))}
        if patient < 10:
            regions["B"] = box(0, 0, 0, 4, 4, 2)
        cases.append(loc.Case(f"p{patient}", image, regions))
        maps.append(np.stack([bump(low + 1), bump((11, 9, 7))]))
        chance.append(27 / image.size)
    found = localised(cases, maps)
    assert found["counts"] == {"regions": 40, "volumes": 30, "patients": 30}
    a, b = (found["findings"][name]["pointing"] for name in FINDINGS)
    assert (a["value"], b["value"]) == (1.0, 0.0) and found["findings"]["B"]["regions"] == 10
    np.testing.assert_allclose(a["against"]["body"]["level"], np.mean(chance))
    np.testing.assert_allclose(a["against"]["body"]["gain"]["value"], 1 - np.mean(chance))
    # A's own map on other patients finds its region now and then, B's map hardly ever.
    others = a["against"]["other_patients"]["level"]
    hits = [[case.regions["A"][np.unravel_index(heat[0].argmax(), SHAPE)] for heat in maps]
            for case in cases]
    np.testing.assert_allclose(others, (np.sum(hits) - 30) / (30 * 29))
    macro = found["macro"]["pointing"]
    assert macro["value"] == 0.5 and macro["low"] <= 0.5 <= macro["high"]
    gain = macro["against"]["body"]["gain"]
    np.testing.assert_allclose(gain["value"], (1 - np.mean(chance) - 32 / image.size) / 2)
    assert gain["low"] > 0.4
    dice = found["macro"]["dice"]["against"]
    assert set(dice) == {"body", "other_prompts"} and dice["other_prompts"]["gain"]["low"] > 0
    json.dumps(found, allow_nan=False)


def test_random_maps_gain_nothing():
    rng = np.random.default_rng(1)
    cases, maps = [], []
    for patient in range(60):
        low = rng.integers(0, [6, 4, 3])
        cases.append(loc.Case(f"p{patient}", np.zeros(SHAPE, np.int16),
                              {name: box(*low, *(low + 5)) for name in FINDINGS}))
        maps.append(rng.random((2, *SHAPE)))
    gains = localised(cases, maps)["macro"]["pointing"]["against"]
    assert all(e["gain"]["low"] <= 0 <= e["gain"]["high"] for e in gains.values())
    assert abs(gains["body"]["gain"]["value"]) < 0.1


def test_a_usual_place_is_told_from_knowledge_of_the_patient():
    """Every map points at the middle of the usual place, whoever the patient is."""
    cases = [loc.Case(f"p{n}", np.zeros(SHAPE, np.int16), {"A": box(2, 2, 2, 6, 6, 6)})
             for n in range(8)]
    found = localised(cases, [np.stack([bump((3, 3, 3)), bump((3, 3, 3))])] * 8)
    against = found["macro"]["pointing"]["against"]
    assert against["body"]["gain"]["low"] > 0.5
    assert against["other_patients"]["gain"] == {"value": 0, "low": 0, "high": 0}
    assert against["other_prompts"]["gain"] == {"value": 0, "low": 0, "high": 0}


def test_what_cannot_be_scored_is_refused(tmp_path):
    empty = loc.Case("p", np.zeros(SHAPE, np.int16), {})
    with pytest.raises(UserError, match="no volume has a place"):
        localised([empty, empty], [])
    one = loc.Case("p", np.zeros(SHAPE, np.int16), {"A": box(0, 0, 0, 2, 2, 2)})
    with pytest.raises(UserError, match="at least two"):
        localised([one], [np.stack([bump((1, 1, 1))] * 2)])
    with pytest.raises(UserError, match="cannot be read"):
        loc.find_masks(tmp_path / "none", ["v"], ["A"])
    with pytest.raises(UserError, match="holds no mask .* such as v_Lung_nodule.nii.gz"):
        loc.find_masks(tmp_path, ["v"], ["Lung nodule"])


class Records(list):
    """A split in memory."""

    path = "records"

    def __init__(self, records, recipe):
        super().__init__(records)
        self.metadata = {"preprocess": recipe.as_dict(), "source": "phantom"}
        self.index = [SimpleNamespace(id=r["id"], patient=r["patient"]) for r in records]


GRID = Preprocess(spacing=(6.0, 6.0, 12.0), shape=(32, 32, 16))


def test_boxes_and_masks_of_a_split_say_the_same(tmp_path):
    model = make_model(**{"model.vision.pool": "weighted", "model.input.spacing": GRID.spacing,
                          "model.vision.depth": 1})
    protocol = Protocol("mine", ("Lung nodule", "Emphysema"), Prompts(
        overrides={"Emphysema": {"positive": ("There is Emphysema", "There is Pleural effusion")}}),
        resamples=50, exclude=("v2",))
    rng = np.random.default_rng(0)
    records, low, high = [], np.array([4, 5, 6]), np.array([12, 20, 11])
    for number in range(4):
        hu = rng.integers(-1000, 500, (32, 16, 32)).astype(np.int16)
        # In the file: y to the front, axes in the order x, z, y.
        affine = np.array([[-6, 0, 0, 90], [0, 0, 6, 10], [0, 12, 0, -70], [0, 0, 0, 1.0]])
        nibabel.save(nibabel.Nifti1Image(hu, affine), tmp_path / f"v{number}.nii.gz")
        mask = np.zeros(hu.shape, np.uint8)
        mask[low[0]:high[0], low[2]:high[2], 32 - high[1]:32 - low[1]] = 1
        folder = tmp_path / "masks"
        folder.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(mask, affine), folder / f"v{number}_Lung_nodule.nii.gz")
        records.append({"id": f"v{number}", "patient": f"p{number}",
                        "volume": load_volume(tmp_path / f"v{number}.nii.gz", GRID).volume,
                        "boxes": {"Lung nodule": [(*low, *high)], "Emphysema": []}})
    source, done = Records(records, GRID), []
    boxes = loc.localise_source(model, source, protocol, progress=lambda *x: done.append(x))
    masks = loc.localise_source(model, source, protocol, masks=folder)
    assert (boxes.pop("regions"), masks.pop("regions")) == ("boxes", "masks")
    assert boxes == masks and boxes["method"] == "rollout" and boxes["phantom"] is True
    assert boxes["counts"] == {"regions": 3, "volumes": 3, "patients": 3}
    assert set(boxes["findings"]) == {"Lung nodule"} and done[-1][0] == 3
    found = loc.finding_directions(model, protocol)
    alone = loc.directions(model, protocol.texts)
    np.testing.assert_allclose(found.direct[1], alone.direct[1:3].mean(0), rtol=1e-6)


def test_a_mask_too_small_for_the_grid_is_kept(tmp_path):
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    mask = np.zeros((60, 60, 60), np.uint8)
    mask[31, 21, 14] = 255
    nibabel.save(nibabel.Nifti1Image(mask, affine), tmp_path / "m.nii.gz")
    grid = Preprocess(spacing=(6.0, 6.0, 12.0), shape=(10, 10, 5))
    found = loc.read_mask(tmp_path / "m.nii.gz", grid.as_dict())
    np.testing.assert_array_equal(np.argwhere(found), [[5, 4, 1]])
    nibabel.save(nibabel.Nifti1Image(0 * mask, affine), tmp_path / "m.nii.gz")
    assert not loc.read_mask(tmp_path / "m.nii.gz", grid.as_dict()).any()


def test_eval_adds_them_to_the_metrics(tmp_path, capsys):
    spacing, shape = (24.0, 24.0, 48.0), (16, 16, 8)
    build_phantom(tmp_path / "d", shape=shape, seed=3, train=0, valid=0, test=12)
    make_model(**{"model.input.shape": shape, "model.input.spacing": spacing,
                  "model.vision.patch": (8, 8, 8), "model.vision.depth": 1,
                  "model.vision.pool": "weighted"}).save(tmp_path / "m")
    (tmp_path / "p.yaml").write_text('name: two\nversion: "1"\nresamples: 20\n'
                                     "classes: [Emphysema, Lung opacity]\n")
    asked = ["eval", "--workdir", tmp_path / "m", "--data", tmp_path / "d", "--out", tmp_path / "o",
             "--protocol", tmp_path / "p.yaml", "--heatmaps"]
    code = cli.main(list(map(str, asked)))
    assert code == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "o" / "metrics.json").read_text())["localisation"]
    assert found["regions"] == "boxes" and found["phantom"] and found["counts"]["regions"] > 2
    page = (tmp_path / "o" / "report.html").read_text()
    # Four patients with a picture and two maps each.
    assert page.count("data:image/png;base64,") >= 12
    assert cli.main(list(map(str, [*asked, tmp_path / "none"]))) == 1
    assert "the masks of" in capsys.readouterr().err
