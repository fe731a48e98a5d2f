"""From what the user names (a path, an architecture, data) to what the methods and measures take."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from modelopt_cli import artifact
from modelopt_cli.api.inputs import assumptions
from modelopt_cli.artifact.header import input_from_json
from modelopt_cli.checkpoint import Opened, captured, open_model, resolve
from modelopt_cli.checkpoint.opened import SHAPE_HINT
from modelopt_cli.data import PreprocessOverrides, open_data
from modelopt_cli.data.preprocess import resolve_preprocess
from modelopt_cli.errors import ArchitectureError, UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.measure import Subject
from modelopt_cli.methods.layer_selection import tensor_coverage
from modelopt_cli.methods.quantize.state_dict import restore
from modelopt_cli.program import InputSpec
from modelopt_cli.program.coverage import Coverage, coverage

Note = Callable[[str], None]
"""Called with one line that is worth knowing."""


def open_input(
    paths: Sequence[str | Path],
    arch: str | None,
    data: str | None,
    overrides: PreprocessOverrides | None,
) -> InputSpec | None:
    """What one sample looks like, as far as it is known before any network is built.

    An artifact among the paths has recorded it; an architecture may imply it; the user's word comes
    before both; and where nobody else says anything, the data's own shape decides. None leaves it to
    what recognition finds.
    """
    if overrides is not None and overrides.sample is not None:
        return overrides.sample
    recorded = [_recorded(path) for path in paths]
    known = next((spec for spec in recorded if spec is not None), None)
    if known is None and arch is not None:
        known = resolve(arch).input
    if known is None and arch is None:
        return None
    if data is not None and (known is None or overrides):
        return open_data(data, input=known, overrides=overrides, labels=False).input
    return overridden(known, overrides)


def overridden(known: InputSpec | None, overrides: PreprocessOverrides | None) -> InputSpec | None:
    """An input with what the user said instead; as it was where its shape would not be known."""
    if not overrides:
        return known
    if overrides.sample is not None:
        return overrides.sample
    preprocess, shape = resolve_preprocess(known, overrides)
    return InputSpec(shape, preprocess) if shape is not None else known


def _recorded(path: str | Path) -> InputSpec | None:
    if not artifact.is_artifact(Path(path)):
        return None
    return input_from_json(artifact.read_header(Path(path), verify=False).get("input"))


def open_source(
    path: str | Path,
    arch: str | None,
    input: InputSpec | None,
    overrides: PreprocessOverrides | None = None,
) -> Opened:
    """Open a checkpoint, or an artifact, to which no ``--arch`` applies if it holds its own network."""
    adapt = partial(overridden, overrides=overrides)
    opened = open_model(path, None if has_graph(path) else arch, input, adapt)
    opened = replace(opened, path=str(path))
    if opened.module is not None and opened.tensors is not None:
        restore(opened.module, opened.tensors.history, opened.tensors.encodings)
        opened = captured(opened)
    return opened


def open_noting(
    path: str | Path,
    arch: str | None,
    wanted: InputSpec | None,
    on_note: Note | None,
    overrides: PreprocessOverrides | None = None,
    *,
    graph: bool = True,
) -> Opened:
    """``open_source``, with its notes handed to ``on_note``; without ``graph``, not why there is none."""
    opened = open_source(path, arch, wanted, overrides)
    tell_notes(opened, on_note, overrides, graph=graph)
    return opened


def tell_notes(
    opened: Opened,
    on_note: Note | None,
    overrides: PreprocessOverrides | None = None,
    *,
    graph: bool = True,
) -> None:
    """Hand the notes of an opened model to ``on_note``, and what was assumed of its input."""
    for note in (*opened.notes, *assumptions(opened, overrides)):
        if on_note is not None:
            on_note(note)
    if graph:
        _tell_untraced(opened, on_note)


def _tell_untraced(opened: Opened, on_note: Note | None) -> None:
    if opened.untraced is not None and on_note is not None:
        on_note(f"works without a graph: {opened.untraced}")


@contextmanager
def without_graph(opened: Opened, on_note: Note | None) -> Iterator[None]:
    """Work that does without a graph where there is none: why is a note if it succeeds, else in the error."""
    try:
        yield
    except UsageError as error:
        if opened.untraced is None:
            raise
        hint = f"{opened.untraced}; or {error.hint}" if error.hint else opened.untraced
        raise UsageError(error.what, where=error.where, hint=hint) from error
    _tell_untraced(opened, on_note)


def noting_once(on_note: Note | None) -> Note:
    """``on_note`` without what was said before; data that is opened twice has the same notes."""
    said: set[str] = set()

    def note(line: str) -> None:
        if on_note is not None and line not in said:
            said.add(line)
            on_note(line)

    return note


def sample_of(opened: Opened, where: str | Path) -> InputSpec:
    """What a sample of an opened network looks like.

    Raises:
        ArchitectureError: nothing says so.
    """
    found = input_of(opened)
    if found is None:
        raise ArchitectureError("nothing says what its input is", where=str(where), hint=SHAPE_HINT)
    return found


def input_of(opened: Opened) -> InputSpec | None:
    """Shape and preprocessing of a sample of an opened network, or None where nothing says so."""
    architecture = opened.architecture
    return opened.program.input if opened.program else architecture.input if architecture else None


def labels_of(opened: Opened) -> tuple[str, ...] | None:
    """Names of an opened network's classes, in logit order, or None."""
    return opened.program.labels if opened.program is not None else None


def has_graph(path: str | Path) -> bool:
    """Whether the path is an artifact that holds its own network."""
    if not artifact.is_artifact(Path(path)):
        return False
    return artifact.read_header(Path(path), verify=False).get("program") is not None


def as_subject(path: str | Path, opened: Opened, arch: str | None, device: str) -> Subject:
    """An opened model, ready to be measured on a device."""
    network: nn.Module | None = opened.program or opened.module
    if opened.program is not None:
        prepare(opened.program, device)
    elif network is not None:
        network.to(device)
    architecture = opened.architecture
    return Subject(
        str(path),
        network,
        opened.program,
        file_length(path, opened),
        coverage=coverage_of(opened),
        input=opened.program.input if opened.program else architecture.input if architecture else None,
        tensor_bytes=opened.tensor_bytes,
        state=None if network is not None else opened.state,
        arch=None if has_graph(path) else arch,
    )


def coverage_of(opened: Opened) -> Coverage | None:
    """What became of the layers of an opened model, or None where nothing says so."""
    if opened.tensors is not None:
        return tensor_coverage(opened.tensors)
    return coverage(opened.program) if opened.program is not None else None


def file_length(path: str | Path, opened: Opened) -> int:
    """Bytes on disk; of a checkpoint of several files, of those that it was read from."""
    return Path(path).stat().st_size if opened.file_bytes is None else opened.file_bytes
