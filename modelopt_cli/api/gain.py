"""Notes on methods that gained little or nothing."""

from pathlib import Path

from modelopt_cli.api.opening import file_length
from modelopt_cli.checkpoint import Opened
from modelopt_cli.checkpoint.state_file import state_bytes
from modelopt_cli.measure.size import Size, safetensors_bytes, times_smaller
from modelopt_cli.program.coverage import Coverage

_FEW = 0.5  # share of the weights' bytes below which a warning says how little was compressed


def gain_notes(
    source: str | Path,
    opened: Opened,
    coverage: Coverage,
    output: str | Path | None,
    file_bytes: int,
    remedy: str = "",
) -> tuple[str, ...]:
    """One warning for each way in which a method gained less than one would think.

    Args:
        source: what it was given.
        opened: the same, opened.
        coverage: what became of each layer.
        output: the file that was written; None where none was.
        file_bytes: length of that file, or what it would have.
        remedy: what would compress more, where there is such a thing.
    """
    notes = []
    if coverage.byte_fraction < _FEW:
        line = f"warning: only {100 * coverage.byte_fraction:.1f} % of the weights' bytes are compressed"
        notes.append(f"{line}; {remedy}" if remedy else line)
    stored = opened.tensor_bytes or safetensors_bytes(Path(source)) or state_bytes(opened.state)
    before = Size(file_length(source, opened), 0, 0, None, stored)
    after = Size(file_bytes, 0, 0, None, safetensors_bytes(Path(output)) if output is not None else None)
    ratio = times_smaller(after, before)
    if ratio is not None and round(ratio, 2) <= 1:
        notes.append(
            f"warning: the file is not smaller than its source: {_described(after)}, "
            f"before {_described(before)}"
        )
    return tuple(notes)


def _described(size: Size) -> str:
    tensors = "" if size.tensor_bytes is None else f" with {size.tensor_bytes:,} bytes of tensors"
    return f"{size.file_bytes:,} bytes{tensors}"
