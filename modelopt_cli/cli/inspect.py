"""``modelopt inspect``: what a file holds, tensor by tensor, and what was done to it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from modelopt_cli.cli import options
from modelopt_cli.cli.console import Console
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.values import Reader
from modelopt_cli.data.config import Channels, InputSize, PreprocessOverrides
from modelopt_cli.errors import ModeloptError
from modelopt_cli.settings import Setting

if TYPE_CHECKING:
    from modelopt_cli.api import Layer
    from modelopt_cli.artifact.header import StoredParameter
    from modelopt_cli.artifact.reader import Artifact
    from modelopt_cli.checkpoint.state_file import StateFile
    from modelopt_cli.program import InputSpec

_UNNAMED = "no name known; the file holds the network's graph"
"""Shown as the architecture of a file that needs none."""

Layers = Annotated[
    bool, Setting("Instead: show the network's layers, by the names that globs match.", title=options.OUTPUT)
]


def inspect(
    console: Console,
    checkpoint: options.Checkpoint,
    layers: Layers = False,
    arch: options.Arch = None,
    input_size: InputSize = None,
    channels: Channels = None,
    input_shape: options.InputShape = (),
) -> Work:
    """Show what a file holds: its tensors and its history.

    Example: modelopt inspect resnet18-int8.safetensors --layers
    """
    reader = Reader()
    needing_layers = {
        "arch": arch,
        "input_size": input_size,
        "channels": channels,
        "input_shape": input_shape or None,
    }
    image = PreprocessOverrides(input_size=input_size, channels=channels)
    overrides = options.with_shape(reader, image, input_shape)
    for name, value in needing_layers.items():
        option = f"--{name.replace('_', '-')}"
        reader.check(layers or value is None, option, "has no meaning without --layers")
    reader.finish()

    def work() -> None:
        if not layers:
            _show_file(console, checkpoint)
            return
        from modelopt_cli import api

        described = api.layers_of(checkpoint, arch, overrides, console.note)
        _show_layers(console, checkpoint, described)

    return options.checked(work, [checkpoint])


def _show_layers(console: Console, path: Path, layers: "list[Layer]") -> None:
    if console.json:
        console.result_json(
            {"schema_version": 1, "path": str(path), "layers": [vars(each) for each in layers]}
        )
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("layer", "kind", "output"):
        table.add_column(title)
    table.add_column("MACs", justify="right")
    for each in layers:
        shape = "x".join(map(str, each.shape)) or "scalar"
        table.add_row(Text(each.name), each.kind, shape, f"{each.macs:,}" if each.macs else "")
    console.result(table)


def _show_file(console: Console, checkpoint: Path) -> None:
    facts = describe(checkpoint)
    if console.json:
        console.result_json({"schema_version": 1, **facts})
        return
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    summary = Table(box=None, show_header=False, pad_edge=False)
    for name in ("path", "kind", "file_bytes", "arch", "input", "input_from"):
        shown = _UNNAMED if name == "arch" and facts[name] is None and facts["graph"] else facts[name]
        summary.add_row(name.replace("_", " "), Text(_text(shown)))
    for entry in facts["history"]:
        summary.add_row("history", Text(_text(entry.get("method"))))
        for name, value in entry.items():
            if name != "method" and not _empty(value):
                summary.add_row(Text(f"  {name.replace('_', ' ')}"), Text(_text(value)))
    tensors = Table(box=None, pad_edge=False)
    for title in ("name", "codec", "dtype", "shape"):
        tensors.add_column(title)
    for title in ("bytes", "zeros"):
        tensors.add_column(title, justify="right")
    for tensor in facts["tensors"]:
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        codec = " ".join(filter(None, (tensor["codec"], tensor["form"])))
        zeros = "" if tensor["zeros"] is None else f"{100 * tensor['zeros']:.1f} %"
        row = (Text(tensor["name"]), Text(codec), tensor["dtype"], shape, f"{tensor['bytes']:,}", zeros)
        tensors.add_row(*row)
    console.result(Group(summary, Text(), tensors))


def describe(path: Path) -> dict[str, Any]:
    """The contents of the file at ``path``, as JSON values.

    Of each tensor: ``name``, ``codec``, ``form`` (how a codec with several writes it, else null),
    ``dtype``, ``shape``, ``bytes`` (in the file) and ``zeros`` (the fraction of a pruned tensor that is
    zero, else null). ``graph`` says if the network's graph is in the file.

    Raises:
        CheckpointError: it is neither an artifact nor a checkpoint.
        ArtifactError: it is a damaged artifact.
    """
    from modelopt_cli.artifact import is_artifact

    facts = _artifact(path) if is_artifact(path) else _checkpoint(path)
    return {"path": str(path), "file_bytes": _size(path), **facts}


def _artifact(path: Path) -> dict[str, Any]:
    from modelopt_cli.artifact.reader import open_artifact

    with open_artifact(path) as artifact:
        header = artifact.document.to_json(artifact.digest)
        tensors = [_stored(artifact, parameter) for parameter in artifact.document.parameters]
    return {
        "kind": f"modelopt artifact, format {header['format']}",
        "arch": header["network"],
        "graph": header["program"] is not None,
        "input": header["input"],
        "input_from": "recorded" if header["input"] else None,
        "history": header["history"],
        "tensors": tensors,
    }


def _stored(artifact: "Artifact", parameter: "StoredParameter") -> dict[str, Any]:
    """The storage of one parameter; a pruned one is decoded to count its zeros."""
    from modelopt_cli.artifact.codecs import CODECS

    codec, zeros = CODECS.get(parameter.codec), None  # one of a later version is listed by its name
    if codec is not None and codec.is_pruned(parameter.params):
        tensor, _ = artifact.decode(parameter)
        zeros = 1 - int(tensor.count_nonzero()) / tensor.numel() if tensor.numel() else 0.0
    return {
        "name": parameter.name,
        "codec": parameter.codec,
        "form": None if codec is None else codec.form(parameter.params),
        "dtype": parameter.dtype,
        "shape": list(parameter.shape),
        "bytes": artifact.stored_bytes(parameter),
        "zeros": zeros,
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    from modelopt_cli.artifact.codecs import PLAIN
    from modelopt_cli.artifact.dtypes import NAMES
    from modelopt_cli.artifact.lazy import described
    from modelopt_cli.checkpoint import read_state, recognise
    from modelopt_cli.program.metadata import input_to_data

    file = read_state(path)
    state = described(file.state)
    architecture = recognise(state)
    known = architecture.input if architecture else None
    origin = (
        "; ".join((architecture.source_of_input, *architecture.assumed)) if architecture and known else None
    )
    exported = _input_of_graph(file)
    if exported is not None and (known is None or not exported.fits(known.shape)):
        known, origin = exported, "of its own graph"
    return {
        "kind": file.source,
        "arch": architecture.spec if architecture else None,
        "graph": exported is not None,
        "input": input_to_data(known) if known else None,
        "input_from": origin,
        "history": [],
        "tensors": [
            {
                "name": name,
                "codec": PLAIN.codec,
                "form": None,
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "zeros": None,
            }
            for name, tensor in state.items()
        ],
    }


def _input_of_graph(file: "StateFile") -> "InputSpec | None":
    """The input of the graph in a ``.pt2`` file; None where there is none that can be read."""
    if file.exported is None:
        return None
    from modelopt_cli.checkpoint.pt2_network import read_input

    try:
        return read_input(file.exported, file.path)
    except ModeloptError:  # its tensors are shown in any case
        return None


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items() if not _empty(inner))
    if isinstance(value, list):
        return ("x" if all(isinstance(inner, int) for inner in value) else ", ").join(map(_text, value))
    return str(value)


def _empty(value: Any) -> bool:
    """True of an empty list or object, and of an option that was not given."""
    return value is None or value == [] or value == {}
