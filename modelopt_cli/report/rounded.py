"""Showing what rounding each layer alone costs the outputs, and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from modelopt_cli.methods.quantize.sensitivity.layer_sensitivity import (
    LayerSensitivity,
    Loss,
    QuantizeSensitivity,
)
from modelopt_cli.methods.quantize.sensitivity.sensitivity_words import sentences
from modelopt_cli.report.plots import HeatMap
from modelopt_cli.text import json_number, printable

_PALEST_DB = 50.0
"""Signal-to-noise from which on all cells of a picture have the palest colour: nobody sees such noise."""


def sensitivity_table(found: QuantizeSensitivity) -> RenderableType:
    """Table with one line for each layer, and what it says in words."""
    grid = Table(box=None, pad_edge=False)
    for title in ("layer", "kind"):
        grid.add_column(title, overflow="fold")
    precisions = _precisions(found)
    for title in (*(f"bytes {name}" for name in precisions), *(f"ms {name}" for name in precisions)):
        grid.add_column(title, justify="right")
    for name in precisions[1:]:
        grid.add_column(f"dB {name}", justify="right")
        grid.add_column(f"KL {name}", justify="right")
    grid.add_column("reason", overflow="fold")
    for layer in found.layers:
        broken = layer in found.breaking or layer in found.dead
        grid.add_row(
            Text(printable(layer.name)),
            layer.kind,
            *(f"{loss.bytes:,}" for loss in layer.losses),
            *(_milliseconds(loss) for loss in layer.losses),
            *(cell for pair in zip(layer.losses[1:], precisions[1:], strict=True) for cell in _cells(*pair)),
            Text("–" if layer.reason is None else layer.reason.kind, "yellow" if broken else "dim"),
        )
    explained = (
        f"signal to noise of the outputs in dB and KL divergence in nats with this layer alone rounded, on "
        f"{found.samples} sample{'s' * (found.samples != 1)}; milliseconds for one sample, conversions "
        f"included"
    )
    lines = [Text(explained, "dim"), *(Text(printable(line), "bold") for line in sentences(found))]
    return Group(grid, *lines)


def _milliseconds(loss: Loss) -> str:
    return "" if loss.milliseconds is None else f"{loss.milliseconds:.3f}"


def _precisions(found: QuantizeSensitivity) -> list[str]:
    """The heading of each column of losses: the precision that most layers were measured in."""
    columns = zip(*(layer.losses for layer in found.layers), strict=True)
    return [Counter(loss.precision for loss in column).most_common(1)[0][0] for column in columns]


def _cells(loss: Loss, heading: str) -> tuple[str, str]:
    return (
        f"{loss.snr_db:.1f}{_other(loss, heading)}",
        "" if loss.divergence is None else f"{loss.divergence:.2g}",
    )


def _other(loss: Loss, heading: str) -> str:
    """The precision in brackets, where it is not the column's, as of the first and the last layers."""
    return "" if loss.precision == heading else f" ({loss.precision})"


def sensitivity_json(found: QuantizeSensitivity) -> dict[str, Any]:
    """The object that ``quantize --dry-run --sensitivity --json`` prints."""
    return {
        "schema_version": 1,
        "samples": found.samples,
        "least_db": found.least_db,
        "sensitivity": [_layer_json(layer) for layer in found.layers],
        "skipped": dict(found.skipped),
        "in_words": sentences(found),
    }


def _layer_json(layer: LayerSensitivity) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "losses": [{name: _json(value) for name, value in asdict(loss).items()} for loss in layer.losses],
        "reason": None if layer.reason is None else asdict(layer.reason),
        "makers": list(layer.makers),
    }


def _json(value: Any) -> Any:
    return json_number(value) if isinstance(value, float) else value


def sensitivity_picture(found: QuantizeSensitivity) -> HeatMap:
    """Picture of the table: the numbers are dB, and black is what breaks the network."""
    headings = _precisions(found)[1:]
    losses: Sequence[Sequence[Loss]] = [layer.losses[1:] for layer in found.layers]
    return HeatMap(
        rows=[layer.name for layer in found.layers],
        columns=headings,
        cells=[
            [
                (_noise(loss.snr_db), f"{loss.snr_db:.1f} dB{_other(loss, heading)}")
                for loss, heading in zip(row, headings, strict=True)
            ]
            for row in losses
        ],
        along="precision of this layer alone; in the cells, the signal-to-noise of the outputs",
        colours=f"black: below {found.least_db:g} dB",
        ticks={_noise(db): f"{db:g} dB" for db in (_PALEST_DB, 40.0, 30.0, 20.0, found.least_db)},
    )


def _noise(snr_db: float) -> float:
    """Noise as a fraction of the signal's power."""
    return float(10 ** (-snr_db / 10))
