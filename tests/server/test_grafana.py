"""The Grafana dashboard of the docs asks for metrics and labels that a server has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from wispprof.server.metrics import Metrics

FILE = Path(__file__).parents[2] / "docs" / "grafana" / "wispprof.json"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def panels() -> list[dict[str, Any]]:
    return list(json.loads(FILE.read_text())["panels"])


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def labels_by_sample() -> dict[str, set[str]]:
    """Labels of each name that /metrics lists."""
    metrics = Metrics()
    found = {}
    for name in vars(metrics):
        metric = getattr(metrics, name)
        if hasattr(metric, "describe"):
            [family] = metric.describe()
            for suffix in SUFFIXES[family.type]:
                found[family.name + suffix] = set(metric._labelnames)
    return found


def test_the_alerts_of_the_docs_name_metrics_that_exist() -> None:
    page = FILE.parents[1].joinpath("metrics.md").read_text()
    [rules] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    expressions = [rule["expr"] for rule in yaml.safe_load(rules)["groups"][0]["rules"]]
    expressions += re.findall(r"```promql\n(.*?)```", page, re.DOTALL)
    assert len(expressions) == 6
    assert set(re.findall(r"wispprof:\w+", " ".join(expressions))) <= labels_by_sample().keys()


def test_every_expression_names_metrics_and_labels_that_exist() -> None:
    known = labels_by_sample()
    assert len(known) > 40
    for expression in expressions():
        named = re.findall(r"wispprof:\w+", expression)
        assert named
        for name in named:
            assert name in known, f"{name} in {expression}"
        grouped = {
            label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")
        }
        assert grouped - {"le"} <= set().union(*(known[name] for name in named)), expression


def test_panels_are_complete_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in panels()}) == len(panels())
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "timeseries"
        assert panel["datasource"]["uid"] == "${datasource}"
    document = json.loads(FILE.read_text())
    assert {one["name"] for one in document["templating"]["list"]} == {"datasource", "job"}
    assert "id" not in document, "an imported dashboard gets its id from Grafana"
