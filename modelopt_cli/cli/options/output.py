"""The file that is read and the files that are written."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from modelopt_cli.artifact import check_output, check_suffix
from modelopt_cli.artifact.coding import CODINGS
from modelopt_cli.cli.groups import Work
from modelopt_cli.cli.values import Reader
from modelopt_cli.data.data_spec import require_possible
from modelopt_cli.errors import ArchitectureError, CheckpointError
from modelopt_cli.measure.config import EvalOptions
from modelopt_cli.regular import require_there
from modelopt_cli.report.formats import TABLES, file_names
from modelopt_cli.settings import Setting
from modelopt_cli.user_code import require_file

OUTPUT = "Output"  # title of the group

# What is taken off a file's name before what was done is put behind it.
_SUFFIXES = {
    ".pth",
    ".pt",
    ".pt2",
    ".tar",
    ".bin",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".safetensors",
    ".index",
    ".json",
}

_setting = partial(Setting, title=OUTPUT)

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of any kind, or a modelopt file.")
]
Output = Annotated[
    Path | None,
    _setting(
        "The safetensors file to write.",
        flags=("-o", "--output"),
        default="NAME-SCHEME.safetensors, NAME-pruned.safetensors, NAME-shared.safetensors, "
        "NAME-distilled.safetensors or NAME-trained.safetensors in the current directory",
    ),
]
Force = Annotated[bool, _setting("Replace the output file if it exists.")]
DeleteOnFail = Annotated[
    bool,
    _setting(
        "Leave the output as it was, absent or old, where a gate is not met or anything else fails.",
        advanced=True,
    ),
]
Code = Annotated[str, _setting("Form in which numbers are written.", choices=CODINGS)]
SchemeCode = Annotated[
    str | None,
    _setting("Form in which numbers are written.", choices=CODINGS, default="that of the scheme"),
]
DryRun = Annotated[bool, _setting("Print the plan for each layer and the size to expect; write nothing.")]
TrainDryRun = Annotated[bool, _setting("Check, time a few steps, print what it would take; write nothing.")]
Export = Annotated[
    tuple[Path, ...],
    _setting(f"Also write the table to {file_names(TABLES)}; may be repeated."),
]
NoEval = Annotated[bool, _setting("Only write the file; measure nothing.", title=EvalOptions.title)]


def read_exports(reader: Reader, paths: tuple[Path, ...], *, measured: bool = True) -> tuple[Path, ...]:
    """The files to export to; their endings choose the format. There is a table only of what is measured."""
    reader.check(measured or not paths, "--export", "has no meaning with --dry-run or --no-eval")
    for path in paths:
        read_ending(reader, "--export", path, TABLES)
    return paths


def read_ending(reader: Reader, option: str, path: Path, endings: Iterable[str]) -> None:
    """The ending of a file's name chooses its format."""
    reader.check(path.suffix.lower() in endings, option, f"{path} ends in none of {', '.join(endings)}")


def check_exports(paths: tuple[Path, ...], force: bool) -> None:
    """Refuse files that must not be written to, before anything is measured; raises OutputError."""
    for path in paths:
        check_output(path, force)


def checked(
    work: Work,
    sources: Iterable[Path | None],
    outputs: Iterable[Path] = (),
    *,
    force: bool = False,
    arch: str | None = None,
    data: Iterable[str | None] = (),
) -> Work:
    """``work`` that looks at the paths of its files first, before it takes seconds to import torch.

    Args:
        work: what is to be done.
        sources: files that are read.
        outputs: files that are written.
        force: replace existing files.
        arch: the architecture.
        data: specs of all data.
    """
    inputs, targets = [path for path in sources if path is not None], list(outputs)

    def guarded() -> None:
        for path in inputs:
            require_there(path, CheckpointError)
        for path in targets:
            check_output(path, force, inputs)
        require_file(arch or "", ArchitectureError)
        for text in filter(None, data):
            require_possible(text)
        work()

    return guarded


def undone(work: Work, wanted: bool, *outputs: Path) -> Work:
    """``work`` that leaves its outputs as they were where it fails, if that is ``wanted``."""
    if not wanted:
        return work

    def guarded() -> None:
        from modelopt_cli.artifact.undo import undone_on_failure

        with undone_on_failure(*outputs):
            work()

    return guarded


def chosen_output(output: Path | None, checkpoint: Path | None, ending: str) -> Path:
    """The file to write: what ``--output`` names, or ``NAME-ENDING.safetensors`` in the current directory.

    Raises:
        OutputError: its suffix promises another format.
    """
    if output is None:
        return _default_output(checkpoint or Path(), ending)
    check_suffix(output)
    return output


def _default_output(checkpoint: Path, ending: str) -> Path:
    name = Path(checkpoint.absolute().name)
    while name.suffix.lower() in _SUFFIXES:
        name = name.with_suffix("")
    return Path(f"{name}-{ending}.safetensors")
