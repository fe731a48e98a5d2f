"""Opening of models, from a path, an architecture or data to a network; each file is opened once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Timer

from modelopt_cli.api.parts_notes import PartsSummary
from modelopt_cli.api.preprocessing_notes import assumptions
from modelopt_cli.api.request import Note
from modelopt_cli.api.shape_of_sounds import input_that_runs
from modelopt_cli.artifact.reader import Artifact
from modelopt_cli.checkpoint import Opened, open_header, open_model, resolve
from modelopt_cli.checkpoint.opened import shape_hint
from modelopt_cli.data import PreprocessOverrides, open_data
from modelopt_cli.data.preprocess import resolve_preprocess
from modelopt_cli.data.source import Samples
from modelopt_cli.errors import ArchitectureError, GraphNeeded
from modelopt_cli.program import InputSpec

PATIENCE = 10.0
"""Seconds after which the user is told that a network is still being opened."""


@dataclass(frozen=True)
class ModelFile:
    """A model's file, of which no more than an artifact's header has been read.

    Attributes:
        path: as it was given.
        header: of an artifact, checked; None of any other file.
    """

    path: str | Path
    header: Artifact | None

    @classmethod
    def of(cls, path: str | Path) -> "ModelFile":
        """Read the header, if it has one of ours.

        Raises:
            ArtifactError: it is damaged.
        """
        return cls(path, open_header(path))

    @property
    def recorded(self) -> InputSpec | None:
        """Input that an artifact has recorded."""
        return self.header.document.input if self.header is not None else None

    def open(
        self,
        arch: str | None,
        known: InputSpec | None,
        on_note: Note | None = None,
        preprocessing: PreprocessOverrides | None = None,
        *,
        graph: bool = True,
    ) -> Opened:
        """Read the rest, and hand the notes on it to ``on_note``.

        Args:
            arch: its architecture, for files that do not hold their own network.
            known: shape and preprocessing of a sample; see :func:`known_input`.
            on_note: called with one line for each thing worth knowing.
            preprocessing: what the user says about the input.
            graph: tell, too, why there is no graph.

        Raises:
            InputError: the file or its architecture cannot be used.
        """
        own = self.header is not None and self.header.document.stands_alone
        adapt = partial(overridden, preprocessing=preprocessing)
        with told_if_slow(f"opening {self.path}", on_note):
            opened = open_model(self.path, None if own else arch, known, adapt, self.header)
        opened = replace(opened, path=str(self.path))
        tell_notes(opened, on_note, preprocessing, graph=graph)
        return opened


@contextmanager
def told_if_slow(doing: str, on_note: Note | None) -> Iterator[None]:
    """Work that follows a network: where it takes longer than ``PATIENCE``, a note says what goes on."""
    if on_note is None:
        yield
        return
    goes_on = f"{doing} takes a while: its network is followed as a whole, then in parts"
    timer = Timer(PATIENCE, on_note, [goes_on])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def known_input(
    files: Iterable[ModelFile],
    arch: str | None,
    data: Samples | None,
    preprocessing: PreprocessOverrides | None,
) -> InputSpec | None:
    """Shape and preprocessing of a sample, as far as they are known before any network is built.

    An artifact among the files has recorded it; an architecture may imply it; the user's word comes
    before both; and where nobody else says anything, the data's own shape decides, of sounds that in which
    the network runs. None leaves it to what recognition finds.
    """
    if preprocessing is not None and preprocessing.sample is not None:
        return preprocessing.sample
    known = next((file.recorded for file in files if file.recorded is not None), None)
    if known is None and arch is not None:
        known = resolve(arch).input
    if known is None and arch is None:
        return None
    if data is not None and (known is None or preprocessing):
        found = open_data(data, input_spec=known, overrides=preprocessing, labels=False)
        return (
            found.input if known is not None or arch is None else input_that_runs(found, resolve(arch).build)
        )
    return overridden(known, preprocessing)


def overridden(known: InputSpec | None, preprocessing: PreprocessOverrides | None) -> InputSpec | None:
    """An input with what the user said instead; as it was where its shape would not be known."""
    if not preprocessing:
        return known
    if preprocessing.sample is not None:
        return preprocessing.sample
    merged, shape = resolve_preprocess(known, preprocessing)
    if shape is None:
        return known
    return InputSpec(shape, merged) if known is None else replace(known, shape=shape, preprocess=merged)


def open_alone(
    path: str | Path,
    arch: str | None,
    data: Samples | None = None,
    preprocessing: PreprocessOverrides | None = None,
    on_note: Note | None = None,
    *,
    graph: bool = True,
) -> Opened:
    """Open one model whose input no other one decides; arguments are those of :meth:`ModelFile.open`."""
    file = ModelFile.of(path)
    known = known_input([file], arch, data, preprocessing)
    return file.open(arch, known, on_note, preprocessing, graph=graph)


def tell_notes(
    opened: Opened,
    on_note: Note | None,
    preprocessing: PreprocessOverrides | None = None,
    *,
    graph: bool = True,
) -> None:
    """Hand the notes of an opened model to ``on_note``, and what was assumed of its input."""
    for note in (*opened.notes, *assumptions(opened, preprocessing)):
        if on_note is not None:
            on_note(note)
    if graph:
        _tell_untraced(opened, on_note)
        if on_note is not None and (parts := PartsSummary.of(opened.program)) is not None:
            on_note(str(parts))


def _tell_untraced(opened: Opened, on_note: Note | None) -> None:
    if opened.untraced is not None and on_note is not None:
        on_note(untraced_note(opened.untraced))


def untraced_note(reason: str) -> str:
    """The line that says why work is done without a graph."""
    return f"works without a graph: {reason}"


@contextmanager
def without_graph(opened: Opened, on_note: Note | None) -> Iterator[None]:
    """Work that does without a graph where there is none: why is a note if it succeeds, else in the error."""
    with telling_why(opened.without_graph):
        yield
    _tell_untraced(opened, on_note)


@contextmanager
def telling_why(reason: str | None) -> Iterator[None]:
    """Work whose error, where it needs a graph, says why there is none; notes may not have been read."""
    try:
        yield
    except GraphNeeded as error:
        if reason is not None and reason not in (error.hint or ""):
            error.hint = f"{reason}; or {error.hint}" if error.hint else reason
        raise


def sample_of(opened: Opened, where: str | Path) -> InputSpec:
    """Shape and preprocessing of a sample of an opened network.

    Raises:
        ArchitectureError: nothing says so.
    """
    if opened.input is None:
        raise ArchitectureError("nothing says what its input is", where=str(where), hint=shape_hint())
    return opened.input


def file_length(path: str | Path, opened: Opened) -> int:
    """Bytes on disk; of a checkpoint of several files, of those that it was read from."""
    return Path(path).stat().st_size if opened.file_bytes is None else opened.file_bytes
