"""``modelopt inspect``: what a file holds, tensor by tensor, and what was done to it."""

from pathlib import Path
from typing import Any

from modelopt_cli.cli.console import Console
from modelopt_cli.cli.options import Checkpoint


def inspect(console: Console, checkpoint: Checkpoint) -> None:
    """Show what a file holds: its tensors and its history."""
    facts = describe(checkpoint)
    if console.json:
        console.result_json({"schema_version": 1, **facts})
        return
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    summary = Table(box=None, show_header=False, pad_edge=False)
    for name in ("path", "kind", "file_bytes", "arch", "input"):
        summary.add_row(name.replace("_", " "), Text(_text(facts[name])))
    for entry in facts["history"]:
        summary.add_row("history", Text(_text(entry)))
    tensors = Table(box=None, pad_edge=False)
    for title in ("name", "codec", "dtype", "shape"):
        tensors.add_column(title)
    for tensor in facts["tensors"]:
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        tensors.add_row(Text(tensor["name"]), tensor["codec"], tensor["dtype"], shape)
    console.result(Group(summary, Text(), tensors))


def describe(path: Path) -> dict[str, Any]:
    """What the file at ``path`` holds, as JSON values.

    Raises:
        CheckpointError: it is neither an artifact nor a checkpoint.
        ArtifactError: it is a damaged artifact.
    """
    from modelopt_cli.artifact import is_artifact

    facts = _artifact(path) if is_artifact(path) else _checkpoint(path)
    return {"path": str(path), "file_bytes": _size(path), **facts}


def _artifact(path: Path) -> dict[str, Any]:
    from modelopt_cli.artifact import read_header

    header = read_header(path)
    return {
        "kind": f"modelopt artifact, format {header['format']}",
        "arch": header["network"],
        "input": header["input"],
        "history": header["history"],
        "tensors": [
            {key: parameter[key] for key in ("name", "codec", "dtype", "shape")}
            for parameter in header["parameters"]
        ],
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    from modelopt_cli.artifact.dtypes import NAMES
    from modelopt_cli.checkpoint import read_state, recognise

    file = read_state(path)
    architecture = recognise(file.state)
    shape = architecture.input.shape if architecture and architecture.input else None
    return {
        "kind": file.source,
        "arch": architecture.spec if architecture else None,
        "input": {"shape": list(shape)} if shape else None,
        "history": [],
        "tensors": [
            {"name": name, "codec": "raw", "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
            for name, tensor in file.state.items()
        ],
    }


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return "x".join(map(str, value))
    return str(value)
