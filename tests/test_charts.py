"""Charts: geometry that follows the numbers and text that cannot become markup."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from brgsa_jax.evals import charts
from brgsa_jax.evals.gap import Projection


def parse(svg):
    return ElementTree.fromstring(str(svg))


@pytest.mark.parametrize("low, high, expected", [
    (0.4, 1.0, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]), (0, 595, [0, 100, 200, 300, 400, 500]),
    (-0.3, 0.3, [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]), (2.0, 2.0, [2.0])])
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high, 6) == pytest.approx(expected)


def test_labels_use_a_true_minus_and_no_needless_digits():
    assert [charts.label(v) for v in (0.5, -2.0, 12000.0)] == ["0.5", "−2", "12k"]


def test_strip_places_marks_by_value_one_above_the_other():
    marks = [charts.Mark("m0", 0.75, 0.5, 1.0), charts.Mark("mu", float("nan"), 0, 0),
             charts.Mark("m1", 0.2, 0.1, 0.3)]
    svg = parse(charts.strip(marks, 0.5, 1.0))
    circles = {c.get("class"): c.get("cx") for c in svg.iter("circle")}
    assert circles == {"dot m0": "50.00%", "ring m1": "0.00%"}
    whisker = next(line for line in svg.iter("line") if line.get("class") == "whisker m0")
    assert (whisker.get("x1"), whisker.get("x2")) == ("0.00%", "100.00%")
    heights = [float(c.get("cy")) for c in svg.iter("circle")]
    assert 0 < heights[0] < heights[1] < float(svg.get("height"))


def test_strip_without_an_interval_has_no_whisker_and_chance_stands_where_it_is():
    svg = parse(charts.strip([charts.Mark("m0", 0.2, float("nan"), float("nan"))], 0.0, 1.0,
                             chance=0.1))
    lines = {line.get("class"): line.get("x1") for line in svg.iter("line")}
    assert lines == {"chance": "10.00%", "rail": "0"}


def test_a_narrow_screen_keeps_the_ticks_of_chance_and_the_end():
    svg = parse(charts.strip_axis(-0.31, 0.31, 0.0))
    assert [t.text for t in svg.iter("text") if t.get("class") == "tick"] == ["0", "0.3"]


def test_square_goes_from_corner_to_corner():
    curve = charts.Line("m0", "A", np.array([0, 0, 1.0]), np.array([0, 1.0, 1.0]))
    svg = parse(charts.square([curve], "ROC curve of <X>", chance=((0, 0), (1, 1))))
    chance, path = svg.iter("path")
    assert chance.get("class") == "chance" and chance.get("d") == "M5.0,127.0 L127.0,5.0"
    assert path.get("d") == "M5.0,127.0 L5.0,5.0 L127.0,5.0"
    assert next(svg.iter("title")).text == "ROC curve of <X>"
    assert not list(svg.iter("text"))


def test_discs_have_the_area_of_their_share_and_names_bring_axes():
    line = charts.Line("m0", "A", np.array([0.2, 0.8]), np.array([0.1, 0.9]), np.array([0.2, 0.8]))
    svg = parse(charts.square([line], "R", chance=((0, 0), (1, 1)), names=("<x>", "y")))
    small, large = (float(c.get("r")) - 1.5 for c in svg.iter("circle"))
    assert large / small == pytest.approx(2.0, abs=0.02)
    texts = [t.text for t in svg.iter("text")]
    assert texts[-2:] == ["<x>", "y"] and texts.count("0.6") == 2


def test_a_long_name_beside_a_chart_is_cut():
    x = np.arange(3.0)
    svg = parse(charts.lines([charts.Line("m0", "A" * 99, x, x), charts.Line("m1", "B", x, x)],
                             "loss"))
    assert {t.text for t in svg.iter("text") if t.get("class").startswith("name")} == {
        "A" * 12 + "…", "B"}


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
