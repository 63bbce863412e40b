"""The SVG chart of the proofs: well-formed, and its points where logarithmic axes have them."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks._chart import HEIGHT, WIDTH, Line, log_chart


def test_points_lie_on_logarithmic_axes():
    lines = [Line("a & b", [(10, 1), (100, 10), (1000, 100)], "#000000", hollow=frozenset({100}))]
    chart = log_chart(
        "title", "x", "y", (10, 1000), [*lines, Line("ideal", [(10, 1), (1000, 100)], "#999", dashed=True)]
    )
    root = ElementTree.fromstring(chart)
    circles = [tag for tag in root if tag.tag.endswith("circle")]
    places = [(float(circle.get("cx", "")), float(circle.get("cy", ""))) for circle in circles]
    assert len(places) == 3
    (x1, y1), (x2, y2), (x3, y3) = places
    assert (x2 - x1, y1 - y2) == pytest.approx((x3 - x2, y2 - y3), abs=0.2)
    assert 0 < x1 < x2 < x3 < WIDTH
    assert HEIGHT > y1 > y2 > y3 > 0
    assert [circle.get("fill") for circle in circles] == ["#000000", "white", "#000000"]
    texts = [tag.text for tag in root if tag.tag.endswith("text")]
    assert "a & b" in texts
    assert "1,000" in texts
    assert len(re.findall("stroke-dasharray", chart)) == 1


def test_values_near_one_another_fill_the_height():
    chart = log_chart("t", "x", "y", (10**13,), [Line("a", [(1e12, 2.31), (1e13, 1.94), (1e14, 1.62)], "#000000")])
    root = ElementTree.fromstring(chart)
    down = [float(tag.get("cy", "")) for tag in root if tag.tag.endswith("circle")]
    assert down[-1] - down[0] > 0.7 * (HEIGHT - 100)
    texts = [tag.text for tag in root if tag.tag.endswith("text")]
    assert "1e13" in texts
    assert {"1.6", "1.8", "2", "2.2", "2.4"} <= set(texts)


def test_one_value_is_drawn():
    assert "<circle" in log_chart("t", "x", "y", (), [Line("a", [(1, 3.0), (10, 3.0)], "#000000")])
