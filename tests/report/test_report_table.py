"""The table in all its forms: every figure there, hostile names harmless, the picture well-formed."""

import csv
import dataclasses
import io
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from modelopt_cli.measure import Evaluation, Speedup
from modelopt_cli.measure.layer_status import Coverage, LayerStatus
from modelopt_cli.measure.metrics import METRICS
from modelopt_cli.measure.statistics import Interval
from modelopt_cli.option_names import naming_flags
from modelopt_cli.report import (
    coverage_json,
    coverage_lines,
    coverage_table,
    csv_text,
    markdown_text,
    plain_text,
    table,
    to_json,
    to_svg,
)
from modelopt_cli.report.evaluation_table import MISSING, headings, rows
from modelopt_cli.text import printable, shortened

HOSTILE = "[/red]\x1b[31m\x07\u202e`|<b>.pth"


def cells(evaluation: Evaluation) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for row in rows(evaluation):
        name = row.label if row.label not in found else f"{row.label} (2)"
        found[name] = row.cells
    return found


def renamed(evaluation: Evaluation, *paths: str) -> Evaluation:
    models = (dataclasses.replace(m, path=path) for m, path in zip(evaluation.models, paths, strict=True))
    return dataclasses.replace(evaluation, models=tuple(models))


def test_cells(evaluation: Evaluation) -> None:
    found = cells(evaluation)
    assert found["file size"] == ("46.83 MB", "11.81 MB", "0.0001 MB")
    assert found["tensors in it"] == ("46.76 MB", "11.80 MB", MISSING)
    assert found["vs baseline"][:2] == (MISSING, "3.97x smaller")
    assert found["parameters"] == ("11.69 M", "11.69 M", "0")
    assert found["bits per weight"] == ("32.01", "8.08", MISSING)
    assert found["MACs"][0] == "1.81 G"
    assert found["FLOPs"][0] == "3.63 G"
    assert found["top-1"] == ("69.76 %", "69.50 %", MISSING)
    assert found["top-1 drop"] == (MISSING, "+0.26 pp", MISSING)
    assert re.fullmatch(r"[-+]0\.\d\d to \+0\.\d\d pp", found["95 % interval"][1])
    assert found["same prediction"][1] == "98.70 %"
    assert found["latency, median"] == ("52.50 ms", "22.50 ms", MISSING)
    assert found["vs baseline (2)"][1] == "2.33x faster"
    assert found["timed as"] == ("prepacked", "as loaded", MISSING)
    assert found["throughput"][1] == "44.4 /s"
    assert found["time to load"] == ("41.5 ms", "2.35 s", MISSING)
    assert found["peak memory"] == ("250.00 MB", MISSING, MISSING)
    assert found["layers compressed"] == (MISSING, "100 %", MISSING)
    assert found["weights compressed"] == (MISSING, "98.7 %", MISSING)


def test_a_loss_is_called_one(evaluation: Evaluation) -> None:
    slower = Speedup(0.8, 0.75, 0.85, 30)
    worse = dataclasses.replace(evaluation.comparisons[0], ratio=0.5, speedup=slower)
    found = cells(dataclasses.replace(evaluation, comparisons=(worse,)))
    assert found["vs baseline"][1] == "2.00x larger"
    assert found["vs baseline (2)"][1] == "1.25x slower"


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(1.0, "not smaller"), (1.004, "not smaller"), (0.996, "not smaller"), (1.006, "1.01x smaller")],
)
def test_what_gained_nothing_is_not_called_smaller(evaluation: Evaluation, ratio: float, said: str) -> None:
    compared = dataclasses.replace(evaluation.comparisons[0], ratio=ratio)
    assert cells(dataclasses.replace(evaluation, comparisons=(compared,)))["vs baseline"][1] == said


@pytest.mark.parametrize(
    ("speedup", "said", "interval"),
    [
        (Speedup(1.58, 0.97, 2.4, 30), "not distinguishable", "0.97x to 2.40x"),
        (Speedup(1.58, 1.01, 2.4, 30), "1.58x faster", "1.01x to 2.40x"),
        (Speedup(1.58, 0.0, math.inf, 5), "not distinguishable", "too few runs"),
    ],
    ids=["holds one", "above one", "no interval"],
)
def test_a_speedup_from_noise_is_not_called_one(
    evaluation: Evaluation, speedup: Speedup, said: str, interval: str
) -> None:
    compared = dataclasses.replace(evaluation.comparisons[0], speedup=speedup)
    changed = dataclasses.replace(evaluation, comparisons=(compared,))
    assert cells(changed)["vs baseline (2)"][1] == said
    assert cells(changed)["speedup, 95 % interval"][1] == interval
    assert said in markdown_text(changed)
    assert json.loads(json.dumps(to_json(changed), allow_nan=False))["comparisons"][0]["speedup"] == 1.58


def test_rows_without_a_single_figure_are_left_out(evaluation: Evaluation) -> None:
    bare = dataclasses.replace(evaluation, models=evaluation.models[2:], comparisons=(), gates=())
    assert [row.label for row in rows(bare)] == ["file size", "parameters", "non-zero"]


def test_conditions_are_stated(evaluation: Evaluation) -> None:
    text = plain_text(table(evaluation))
    for said in (
        "val/, 5,000 samples",
        "batch 1, 1 thread, 30 interleaved runs, baseline in its fastest form: prepacked",
        "Some CPU, torch 2.13.0, device cpu",
        "MB is 1,000,000 bytes. FLOPs are 2 x MACs",
        "note: bare.pth: no architecture",
        "pass  net-int8.safetensors: max-drop 0.26 pp keeps the limit of 1 pp",
        "FAIL  net-int8.safetensors: min-speedup 2.25x, the lower end of its 95 % interval, is below the "
        "limit of 3x",
        "FAIL  bare.pth: max-drop was not measured (limit 1 pp)",
    ):
        assert said in text


def test_plain_text_is_never_folded_or_coloured(evaluation: Evaluation) -> None:
    long = "x" * 300 + ".pth"
    text = plain_text(table(renamed(evaluation, long, "b.pth", "c.pth")))
    assert long in text
    assert "\x1b" not in text


def test_same_file_names_show_their_folders(evaluation: Evaluation) -> None:
    assert headings(evaluation) == ("net.pth", "net-int8.safetensors", "bare.pth")
    assert headings(renamed(evaluation, "a/n.pth", "b/n.pth", "c/m.pth")) == ("a/n.pth", "b/n.pth", "m.pth")


def test_hostile_names_are_shown_and_harmless(evaluation: Evaluation) -> None:
    hostile = dataclasses.replace(
        renamed(evaluation, HOSTILE, "b.pth", "c.pth"), notes=(HOSTILE,), data=HOSTILE
    )
    output = io.StringIO()
    Console(file=output, force_terminal=True, width=200, color_system=None).print(table(hostile))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())
    for text in (shown, plain_text(table(hostile)), markdown_text(hostile), to_svg(hostile)):
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    assert r"red]\x1b[31m\x07\u202e`|<b>.pth" in plain_text(table(hostile))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\nb", r"a\nb"), ("\ud800", r"\ud800"), ("é 日本", "é 日本"), ("\x9b31m", r"\x9b31m")],
    ids=ascii,
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_picture_is_one_well_formed_file_that_loads_nothing(evaluation: Evaluation) -> None:
    drawn = to_svg(evaluation, "modelopt eval")
    ET.fromstring(drawn)
    assert drawn == to_svg(evaluation, "modelopt eval")
    assert "url(http" not in drawn.replace("&quot;", "").replace('"', "")
    shown = "".join(ET.fromstring(drawn).itertext()).replace("\xa0", " ")
    assert "net-int8.safetensors" in shown
    assert "FAIL" in shown


def test_markdown_is_one_table_of_equal_rows(evaluation: Evaluation) -> None:
    text = markdown_text(renamed(evaluation, "a|b*.pth", "<b>.pth", "c.pth"))
    grid = [line for line in text.splitlines() if line.startswith("|")]
    assert len(grid) == len(rows(evaluation)) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in grid} == {5}
    assert r"a\|b\*.pth (baseline)" in grid[0]
    assert r"\<b\>.pth" in grid[0]
    assert "- FAIL" in text


def test_csv_has_a_line_for_each_model(evaluation: Evaluation) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(renamed(evaluation, 'a,"b".pth', "b.pth", "c.pth")))))
    assert [line["path"] for line in lines] == ['a,"b".pth', "b.pth", "c.pth"]
    assert [line["baseline"] for line in lines] == ["true", "false", "false"]
    assert float(lines[1]["latency_median_ms"]) == 22.5
    assert float(lines[1]["load_s"]) == 2.3456
    assert float(lines[1]["drop_pp"]) == pytest.approx(0.26)
    assert lines[0]["drop_pp"] == lines[2]["macs"] == lines[2]["ratio"] == ""


def test_coverage_names_each_layer_and_the_reason() -> None:
    coverage = Coverage(
        (
            LayerStatus("features.0", "Conv2d", True, scheme="int8"),
            LayerStatus("[/head]\x1b", "Linear", False, reason="excluded by --exclude"),
        )
    )
    with naming_flags():
        lines = plain_text(coverage_table(coverage)).splitlines()
    assert lines[1].split() == ["features.0", "Conv2d", "int8"]
    assert lines[2].split() == [r"[/head]\x1b", "Linear", "no", "excluded", "by", "--exclude"]
    assert len(lines) == 3


def layers(*groups: tuple[str, int, int]) -> Coverage:
    """So many layers of so many bytes for each reason; of an empty reason they are compressed."""
    return Coverage(
        tuple(
            LayerStatus(f"{why}.{i}", "Linear", not why, reason=why, bytes=size)
            for why, count, size in groups
            for i in range(count)
        )
    )


def test_coverage_counts_layers_and_bytes_for_each_reason() -> None:
    covered = layers(("", 29, 20), ("used inside a function", 23, 18), ("\x1b[31m", 1, 6))
    assert coverage_lines(covered) == [
        "compressed 29 of 53 layers, 58.0 % of the weights' bytes",
        "  not 23 layers, 41.4 %: used inside a function",
        r"  not 1 layer, 0.6 %: \x1b[31m",
    ]
    assert coverage_json(covered) == {
        **{"layers": 29, "of_layers": 53, "bytes": 580, "of_bytes": 1000, "layers_before": 0},
        "left_out": [
            {"reason": "used inside a function", "layers": 23, "bytes": 414},
            {"reason": "\x1b[31m", "layers": 1, "bytes": 6},
        ],
    }


def test_nearly_all_is_not_called_all() -> None:
    lines = coverage_lines(layers(("", 1, 99_999), ("tiny", 1, 1)))
    assert lines[0].startswith("compressed 1 of 2 layers, over 99.9 %")
    assert lines[1] == "  not 1 layer, under 0.1 %: tiny"


def test_many_reasons_are_counted() -> None:
    lines = coverage_lines(layers(*((f"reason {i}", 2, 10 - i) for i in range(8))))
    assert len(lines) == 7
    assert lines[-1] == "  not 6 layers for 3 other reasons; -v lists every layer"


@pytest.mark.parametrize(
    ("name", "word"), [("mae", "rise"), ("perplexity", "rise"), ("cer", "rise"), ("psnr", "drop")]
)
def test_an_error_rises_where_another_metric_drops(name: str, word: str, evaluation: Evaluation) -> None:
    metric = METRICS[name]
    worse = dataclasses.replace(
        evaluation.comparisons[0], difference=Interval(0.5, 0.2, 0.9, 24), metric=metric
    )
    found = dataclasses.replace(evaluation, comparisons=(worse,), rows={name: metric})
    assert cells(found)[f"{metric.title} {word}"][1].startswith("+0.5")
    lost = "model minus baseline" if word == "rise" else "baseline minus model"
    for text in (plain_text(table(found)), markdown_text(found)):
        assert f"; {word} is {lost}, with a bootstrapped" in text
        assert f"{metric.title} {'drop' if word == 'rise' else 'rise'}" not in text


def test_one_sample_has_no_plural_and_no_interval(evaluation: Evaluation) -> None:
    metric = METRICS["mae"]
    none = dataclasses.replace(
        evaluation.comparisons[0], difference=Interval(0.5, -math.inf, math.inf, 1), metric=metric
    )
    accuracy = evaluation.models[0].accuracy
    assert accuracy is not None
    model = dataclasses.replace(evaluation.models[0], accuracy=dataclasses.replace(accuracy, samples=1))
    found = dataclasses.replace(evaluation, models=(model,) * 3, comparisons=(none,), rows={"mae": metric})
    line = next(line for line in plain_text(table(found)).splitlines() if line.startswith("data: "))
    assert line == "data: val/, 1 sample; rise is model minus baseline"


def test_a_long_name_of_data_loses_its_middle_in_tables_alone(evaluation: Evaluation) -> None:
    name = f"csv:{'folder/' * 40}labels.csv?labels=price"
    found = dataclasses.replace(evaluation, data=name)
    for text in (plain_text(table(found)), markdown_text(found)):
        line = next(line for line in text.splitlines() if "data: " in line)
        assert "csv:folder/" in line
        assert "labels.csv?labels=price, 5,000 samples" in line
        assert len(line) < 220
    assert [shortened("abcdefgh", limit) for limit in (8, 7, 4)] == ["abcdefgh", "abc…fgh", "ab…h"]
