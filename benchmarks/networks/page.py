"""The page with the findings: a summary, and a table for each family of networks."""

import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any

Found = dict[str, Any]
LOW_DB = 30.0
LIBRARIES = ("torch", "torchvision", "timm", "transformers")
LEAST_LONG = 160
TITLES = {
    "timm": "timm: the smallest network of every module",
    "classification": "torchvision: classification",
    "segmentation": "torchvision: segmentation",
    "detection": "torchvision: detection",
    "video": "torchvision: video",
    "optical_flow": "torchvision: optical flow",
    "huggingface": "Hugging Face transformers, small random configurations",
}

TORCHVISION = "torchvision, all of these"
"""Row of the summary for the families of that library together."""


def _name(found: Found) -> str:
    kind = found.get("network", found["name"])
    name = found["name"] if kind == found["name"] else f"{found['name']}: {kind}"
    return f"{name} ({found['note']})" if found.get("note") else name


def _captured(found: Found) -> str:
    captured = found.get("captured", {})
    if "part" in captured:
        return f"in part: {_percent(captured['part'])} of the FLOPs"
    return "whole" if captured.get("whole") else f"refused: {_error(captured or found)}"


def _layers(found: Found) -> str:
    int8 = found.get("int8", {})
    return "{} of {}".format(*int8["layers"]) if "layers" in int8 else _error(int8 or found)


def _lowest(found: Found) -> str:
    """The layer after which the signal-to-noise falls the most, where it is low."""
    int8 = found.get("int8", {})
    if int8.get("fall") is None or int8["snr"] >= LOW_DB:
        return ""
    layer, before, after = int8["fall"]
    return f"{layer}: {before:.1f} to {after:.1f}"


def _pruned(found: Found) -> str:
    pruned = found.get("pruned", {})
    return _percent(pruned["parameters"]) if "parameters" in pruned else _error(pruned or found)


def _flops(found: Found) -> str:
    return _percent(found["pruned"]["flops"]) if "flops" in found.get("pruned", {}) else "-"


def _reloaded(found: Found) -> str:
    """How many of the three forms came back from their file with equal outputs."""
    forms = [found.get(stage, {}).get("reloaded") for stage in ("captured", "int8", "pruned")]
    made = [form for form in forms if form is not None]
    return f"{sum(made)} of {len(made)}" if made else "-"


def _db(key: str) -> Callable[[Found], str]:
    def cell(found: Found) -> str:
        value = found.get("int8", {}).get(key)
        return "-" if value is None else f"{value:.1f}"

    return cell


def _weights(found: Found) -> str:
    int8 = found.get("int8", {})
    return _percent(int8["weights"]) if "weights" in int8 else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _error(found: Found) -> str:
    text = " ".join(found.get("error", "-").split()).replace("|", "/")
    return text if len(text) <= LEAST_LONG else f"{text[: LEAST_LONG - 3]}..."


def _covered(rows: Iterable[Found]) -> str:
    """Layers with weights that are int8, of all of the rows that say how many."""
    known = [row["int8"]["layers"] for row in rows if "layers" in row.get("int8", {})]
    compressed, total = (sum(counts) for counts in zip(*known, strict=True)) if known else (0, 0)
    return f"{compressed:,} of {total:,}, {_percent(compressed / total)}" if total else "-"


def _left_out(rows: Iterable[Found]) -> Iterator[str]:
    """A line for each network of which layers stay in float: how many and, where it is known, why."""
    for row in rows:
        int8 = row.get("int8", {})
        compressed, total = int8.get("layers", (0, 0))
        if compressed < total:
            why = "; ".join(f"{reason} ({count})" for reason, count in int8.get("left_out", ()))
            yield f"- {_name(row)}: {total - compressed} of {total}{why and f', {why}'}"


COLUMNS: dict[str, Callable[[Found], str]] = {
    "network": _name,
    "input": lambda found: found.get("input", "-"),
    "parameters": lambda found: f"{found['parameters'] / 1e6:.2f} M" if "parameters" in found else "-",
    "captured": _captured,
    "int8 layers": _layers,
    "int8 weights": _weights,
    "int8, dB": _db("snr"),
    "noisy input, dB": _db("noisy"),
    "below 30 dB: falls most after": _lowest,
    "pruned: parameters left": _pruned,
    "FLOPs left": _flops,
    "reloaded equal": _reloaded,
    "code": lambda found: found.get("code", "-"),
}
SUMMARY: dict[str, Callable[[Found], bool]] = {
    "networks": lambda found: True,
    "captured whole": lambda found: bool(found.get("captured", {}).get("whole")),
    "in part": lambda found: "part" in found.get("captured", {}),
    "int8 runs": lambda found: found.get("int8", {}).get("snr") is not None,
    "at 20 dB or more": lambda found: (found.get("int8", {}).get("snr") or 0) >= 20,
    "at 30 dB or more": lambda found: (found.get("int8", {}).get("snr") or 0) >= LOW_DB,
    "pruned": lambda found: "parameters" in found.get("pruned", {}),
    "every form reloads equal": lambda found: (
        bool(found.get("captured")) and _reloaded(found) in ("1 of 1", "2 of 2", "3 of 3")
    ),
}


def page(rows: Sequence[Found], expected: dict[str, int], how: str) -> str:
    """The Markdown page.

    Args:
        rows: findings, of any order.
        expected: number of networks of each family; those that are missing are named as not measured.
        how: what was done with each network.
    """
    lines = ["# Networks", "", _conditions(rows), "", how, "", *_summary(rows, expected)]
    for family, title in TITLES.items():
        own = sorted((row for row in rows if row["family"] == family), key=lambda row: row["name"].lower())
        if own:
            lines += ["", f"## {title}", "", *table(COLUMNS, own)]
    return "\n".join(lines) + "\n"


def table(columns: dict[str, Callable[[Any], str]], rows: Iterable[Any]) -> list[str]:
    """Lines of a Markdown table."""
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*head, *("| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows)]


def _conditions(rows: Iterable[Found]) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    commits: dict[str, set[str]] = {}
    for row in rows:
        commits.setdefault(row.get("cpu", "an unknown CPU"), set()).add(row.get("code", "-"))
    cpus = "; ".join(f"on {cpu}: {', '.join(sorted(codes))}" for cpu, codes in sorted(commits.items()))
    return (
        f"Made by `python -m benchmarks.networks` on {datetime.date.today()}, one thread, {versions}. "
        f"The last column names the commit that a line was measured with. {cpus[:1].upper()}{cpus[1:]}."
    )


def _summary(rows: Sequence[Found], expected: dict[str, int]) -> list[str]:
    groups = {
        TITLES[name]: [row for row in rows if row["family"] == name] for name in TITLES if name in expected
    }
    groups[TORCHVISION] = [row for row in rows if TITLES[row["family"]].startswith("torchvision")]
    columns: dict[str, Callable[[str], str]] = {"family": lambda group: group}
    for title, holds in SUMMARY.items():
        columns[title] = lambda group, holds=holds: str(sum(map(holds, groups[group])))
    columns["int8 layers"] = lambda group: _covered(groups[group])
    lines = table(columns, groups)
    if left_out := list(_left_out(rows)):
        lines += ["", "Layers with weights that stay in float, and why, where that was kept:", "", *left_out]
    short = [
        f"{lacking} of {TITLES[name]}"
        for name, count in expected.items()
        if (lacking := count - len(groups[TITLES[name]]))
    ]
    return [*lines, *(["", f"Not measured, and left out: {'; '.join(short)}."] if short else [])]
