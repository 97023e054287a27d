"""Charts: geometry that follows the numbers and text that cannot become markup."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from brgsa_jax.evals import charts
from brgsa_jax.evals.gap import Projection
from brgsa_jax.evals.metrics import RocCurve


def parse(svg):
    return ElementTree.fromstring(str(svg))


@pytest.mark.parametrize("low, high, expected", [
    (0.4, 1.0, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]), (0, 595, [0, 100, 200, 300, 400, 500]),
    (-0.3, 0.3, [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]), (2.0, 2.0, [2.0])])
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high, 6) == pytest.approx(expected)


def test_labels_use_a_true_minus_and_no_needless_digits():
    assert [charts.label(v) for v in (0.5, -2.0, 12000.0)] == ["0.5", "−2", "12k"]


def test_strip_places_marks_by_value_and_leaves_undefined_ones_out():
    marks = [charts.Mark("m0", 0.75, 0.5, 1.0), charts.Mark("mu", float("nan"), 0, 0),
             charts.Mark("m1", 0.2, 0.1, 0.3)]
    svg = parse(charts.strip(marks, 0.5, 1.0))
    circles = {c.get("class"): c.get("cx") for c in svg.iter("circle")}
    assert circles == {"dot m0": "50.00%", "ring m1": "0.00%"}
    whisker = next(line for line in svg.iter("line") if line.get("class") == "whisker m0")
    assert (whisker.get("x1"), whisker.get("x2")) == ("0.00%", "100.00%")


def test_roc_goes_from_corner_to_corner():
    curve = RocCurve(np.array([0, 0, 1.0]), np.array([0, 1.0, 1.0]))
    svg = parse(charts.roc([("m0", curve)], "<X>"))
    path = next(svg.iter("path")).get("d")
    assert path == "M5.0,127.0 L5.0,5.0 L127.0,5.0"
    assert next(svg.iter("title")).text == "ROC curve of <X>"


def test_scatter_joins_the_centroids_and_keeps_to_the_limit():
    plane = Projection(np.tile([[-1.0, 0.0]], (50, 1)), np.tile([[1.0, 0.0]], (50, 1)),
                       np.array([1.0, 0.0]))
    svg = parse(charts.scatter(plane, (1.0, 0.5), "m0", "name", limit=10))
    classes = [node.get("class") for node in svg.iter()]
    assert classes.count("point m0") == classes.count("point text") == 10
    bond = next(line for line in svg.iter("line") if line.get("class") == "bond")
    assert float(bond.get("x1")) == pytest.approx(8) and float(bond.get("x2")) == pytest.approx(292)


def test_lines_fall_when_values_fall_and_ends_are_named_without_overlap():
    x = np.arange(5.0)
    curves = [charts.Line("m0", "A&B", x, 5 - x), charts.Line("m1", "C", x, 5 - x)]
    svg = parse(charts.lines(curves, "loss"))
    heights = [float(y) for y in re.findall(r",([\d.]+)", next(svg.iter("path")).get("d"))]
    assert heights == sorted(heights) and heights[0] < heights[-1]
    names = [t for t in svg.iter("text") if t.get("class").startswith("name")]
    assert {t.text for t in names} == {"A&B", "C"}
    assert abs(float(names[0].get("y")) - float(names[1].get("y"))) >= 14


def test_a_flat_line_is_drawn():
    svg = parse(charts.lines([charts.Line("m0", "A", np.array([3.0]), np.array([0.0]))], "zero"))
    assert "nan" not in ElementTree.tostring(svg, encoding="unicode")


def test_history_is_sorted_binned_and_free_of_holes():
    rows = [{"step": step, "loss": float(step)} for step in reversed(range(1000))]
    rows += [{"step": 5, "loss": float("nan")}, {"step": 6}, {"loss": 1.0},
             {"step": 7, "loss": "bad"}, {"step": 8, "loss": True}]
    (line,) = charts.history_lines([("m0", "A", rows)], "loss", points=100)
    assert len(line.x) == 100 and (np.diff(line.x) > 0).all()
    np.testing.assert_allclose(line.x, line.y)
    assert charts.history_lines([("m0", "A", rows)], "other") == []
