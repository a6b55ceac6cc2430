"""The report is complete, escapes what it shows and loads nothing."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from lowbit import report


def module(name, error=0.01, **more):
    return {
        "name": name,
        "shape": [48, 64],
        "format": "int4",
        "group_size": 32,
        "bits_per_weight": 4.5,
        "relative_error": error,
        "error_of": "output",
        "damp": 0.01,
        "seconds": 0.25,
        "fallback": None,
        **more,
    }


def a_report(modules=None, **more):
    return {
        "model": "models/tiny",
        "output": "out",
        "version": "0.1.0",
        "recipe": {"bits": 4, "damp": 0.01, "rules": {"lm_head": "skip"}},
        "calibration": {"source": "some text", "tokens": 4096, "context": 512},
        "modules": [module(f"model.layers.{i}.mlp.{m}", 0.01 * (i + 1)) for i in range(3) for m in ("up", "down")]
        if modules is None
        else modules,
        "totals": {
            "modules": 6,
            "bytes_before": 7_300_000,
            "bytes_after": 2_400_000,
            "bits_per_weight": 4.25,
            "seconds": 12.0,
        },
        "kept": [{"name": "lm_head", "shape": [96, 64], "reason": "the recipe gives it 16 bits"}],
        "evaluation": None,
        **more,
    }


class Collector(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_self_contained_and_well_formed():
    page = Collector(report.to_html(a_report()))
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "onload", "onclick"}
    text = report.to_html(a_report())
    assert "url(" not in text and "@import" not in text and "://" not in text


def test_page_shows_every_module_and_the_totals():
    page = report.to_html(a_report())
    for i in range(3):
        assert f"<td>model.layers.{i}.mlp.up</td><td>48×64</td><td>int4</td>" in page
    assert "7.3 MB → 2.4 MB" in page and "33%" in page
    assert "some text" in page and "4096" in page
    assert "<td>lm_head</td><td>96×64</td><td class=words>the recipe gives it 16 bits</td>" in page


def test_page_escapes_names_and_reasons():
    hostile = "<script>alert('x')</script>"
    page = report.to_html(
        a_report(
            [module(f"model.layers.0.{hostile}", fallback=hostile)],
            model=hostile,
            recipe={hostile: hostile},
            calibration={"source": hostile},
        )
    )
    assert "<script" not in page
    assert "script" not in Collector(page).tags


def test_missing_figures_are_dashes():
    page = report.to_html(a_report([module("lm_head", error=None, damp=None)]))
    assert page.count("<td class=number>-</td>") == 2
    assert "<svg" not in page


def test_fallbacks_and_evaluation_are_shown():
    evaluation = {"perplexity": 8.4, "reference_perplexity": 8.31, "kl_divergence": 0.0081}
    page = report.to_html(a_report([module("model.layers.0.q", fallback="too few tokens")], evaluation=evaluation))
    assert "too few tokens" in page
    assert "8.4" in page and "from 8.31" in page and "0.0081" in page


def test_chart_has_a_line_a_kind_and_a_point_a_module():
    svg = report.error_chart(a_report()["modules"])
    root = ET.fromstring(svg)
    assert len(root.findall("polyline")) == 2
    circles = root.findall("circle")
    assert len(circles) == 6
    assert circles[0].find("title").text == "model.layers.0.mlp.up: 0.01"
    width, height = map(float, root.get("viewBox").split()[2:])
    assert all(0 < float(c.get("cx")) < width and 0 < float(c.get("cy")) < height for c in circles)
    # Larger errors are higher up.
    heights = [float(c.get("cy")) for c in circles[:3]]
    assert heights == sorted(heights, reverse=True) and len(set(heights)) == 3


def test_chart_joins_experts_into_one_kind():
    modules = [module(f"model.layers.{i}.mlp.experts.{e}.up", 0.01 + e / 100) for i in range(2) for e in range(5)]
    root = ET.fromstring(report.error_chart(modules))
    assert len(root.findall("polyline")) == 1
    assert len(root.findall("circle")) == 10
    assert "mlp.experts.*.up" in [text.text for text in root.findall("text")]


def test_chart_grows_with_its_key():
    modules = [module(f"model.layers.0.m{chr(97 + i)}", 0.01) for i in range(25)]
    root = ET.fromstring(report.error_chart(modules))
    height = float(root.get("viewBox").split()[3])
    assert max(float(text.get("y")) for text in root.findall("text")) <= height


@pytest.mark.parametrize("errors", [[None], [0.0], [float("nan")], [float("inf")], []])
def test_chart_needs_a_positive_error(errors):
    assert report.error_chart([module("model.layers.0.q", error) for error in errors]) == ""


@pytest.mark.parametrize("errors", [(1e-9, 3.0), (0.5, 0.5), (1.0, 1.0), (1e-300, 1e-299), (0.1, 0.2)])
def test_chart_copes_with_any_range(errors):
    modules = [module(f"layers.{i}.q", error) for i, error in enumerate(errors)]
    root = ET.fromstring(report.error_chart(modules))
    assert all(0 < float(c.get("cy")) < 340 for c in root.findall("circle"))


def a_sensitivity(**more):
    rows = [
        {"name": f"model.layers.{i}.<mlp>", "format": label, "relative_error": 0.1 / (i + 1) / width}
        for i in range(2)
        for label, width in (("trit", 1), ("4", 4))
    ]
    pareto = [{"bytes": size, "loss": loss} for size, loss in ((1000, 3.0), (2000, 1.0), (4000, 0.0))]
    return {
        **{"model": "a<b>", "version": "0.1.0", "by": "modules", "formats": ["trit", "4"], "measure": "squared error"},
        **{"modules": rows, "groups": [], "perplexity": None, "pareto": pareto, "choice": None},
        **more,
    }


def test_the_page_of_a_sensitivity_is_well_formed_and_escapes_names():
    page = report.sensitivity_to_html(a_sensitivity(choice={"bytes": 2500, "loss": 0.9}))
    html = Collector(page)
    assert not html.open and html.tags.count("svg") == 3
    assert "Sensitivity of a<b>" in html.text and "model.layers.1.<mlp>" in html.text and "chosen" in html.text
    charts = [ET.fromstring(svg) for svg in re.findall("<svg.*?</svg>", page, re.DOTALL)]
    # A loss of 0 has no place on a logarithmic axis.
    assert [len(chart.findall("circle")) for chart in charts] == [2, 2, 3]


def test_the_page_of_groups_has_a_line_a_group():
    groups = [
        {"group": group, "format": label, "bits_per_weight": bits, "kl_divergence": kl}
        for group in ("attention", "mlp")
        for label, bits, kl in (("4", 4.1, 0.01), ("trit", 2.0, 0.5), ("8", 8.1, None))
    ]
    page = report.sensitivity_to_html(a_sensitivity(groups=groups, formats=["trit", "4", "8"], perplexity=24.5))
    chart = ET.fromstring(re.search("<svg.*?</svg>", page, re.DOTALL)[0])
    assert len(chart.findall("polyline")) == 2
    assert [c.find("title").text for c in chart.findall("circle")][:2] == [
        "attention as trit: 0.5",
        "attention as 4: 0.01",
    ]
    assert "perplexity 24.50" in page and ">-<" in page


def test_a_chart_of_sizes_needs_a_positive_loss():
    assert report.size_chart({"a": [(1.0, 0.0, "x"), (2.0, float("nan"), "y")]}, "MB", "loss") == ""
    chart = ET.fromstring(report.size_chart({"a": [(3.0, 0.5, "only")]}, "MB", "loss"))
    assert len(chart.findall("circle")) == 1


@pytest.mark.parametrize(
    "names, expected",
    [
        (["model.layers.3.self_attn.q_proj", "lm_head"], [(3, "self_attn.q_proj"), (None, "lm_head")]),
        (["h.0.mlp.c_fc", "h.11.mlp.c_fc"], [(0, "mlp.c_fc"), (11, "mlp.c_fc")]),
        (["model.layers.1.experts.7.up"], [(1, "experts.7.up")]),
        (["vision.0.fc", "text.0.fc"], [(0, "vision.*.fc"), (0, "text.*.fc")]),
        (["0.fc"], [(0, "fc")]),
        (["layers.0"], [(None, "layers.0")]),
    ],
)
def test_split_names(names, expected):
    assert report.split_names(names) == expected


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (7_348_736, "7.3 MB"),
        (999_600, "1.0 MB"),
        (123_456_789, "123 MB"),
        (16.1e9, "16.1 GB"),
        (4e12, "4000 GB"),
    ],
)
def test_human_bytes(count, text):
    assert report.human_bytes(count) == text


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        (0, "0"),
        (0.04123, "0.0412"),
        (8.312, "8.31"),
        (27.029, "27.03"),
        (float("nan"), "nan"),
        (1.5e9, "1.5e+09"),
    ],
)
def test_human_figure(value, text):
    assert report.human_figure(value) == text


def test_json_is_standard(tmp_path):
    evaluation = {"perplexity": float("inf"), "reference_perplexity": 8.0, "kl_divergence": float("nan")}
    page, data = report.write_report(a_report(evaluation=evaluation, more=[float("nan"), 1]), tmp_path)
    read = json.loads(data.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["evaluation"] == {"perplexity": None, "reference_perplexity": 8.0, "kl_divergence": None}
    assert read["more"] == [None, 1]
    assert len(read["modules"]) == 6
    assert re.match("<!doctype html>", page.read_text("utf-8"))
