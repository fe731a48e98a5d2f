"""``wav:DIR`` and ``wav:FILE.csv``: sound files, as rows of samples of one length."""

import importlib
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from modelopt_cli.data.csv_columns import Labels, Table, labels_of
from modelopt_cli.data.csv_file import LABELS, PATHS
from modelopt_cli.data.data_spec import DataSpec, column, whole_number
from modelopt_cli.data.images import Files, FileSource, folder_of_classes
from modelopt_cli.data.source import Raw, Source
from modelopt_cli.data.targets import RawTarget
from modelopt_cli.errors import DataError, EnvironmentFailure
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.regular import open_regular, read_regular
from modelopt_cli.text import first_line

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")
TRANSCRIPTS = ("text", "transcript", "transcription", "sentence")
_SOUNDS = ("audio", "audiopath", "wav", "sound")
_PARTS = {"start": 0.0, "middle": 0.5, "end": 1.0}
_LONGEST = 2**27
_STREAMED = 0x7FFF0000
"""Bytes that a WAV file says to have, at least, which was written without knowing how long it will be."""
_PROCESSOR = "preprocessor_config.json"
_LARGEST_RATIO = 2**20
_WINDOW = ("kaiser", 8.0)
"""Window of the resampling filter: tones stay within 2e-4, where scipy's own window of 5 leaves 2e-3."""


@dataclass(frozen=True)
class Form:
    """The form in which a network takes sounds.

    Attributes:
        rate: samples per second.
        length: samples.
        part: what is left before the part that is kept of longer sounds, of what they have too much: 0 to 1.
        normalize: bring each to a mean of 0 and a variance of 1.
        shape: of an input, which has ``length`` elements.
    """

    rate: int
    length: int
    part: float
    normalize: bool
    shape: tuple[int, ...]

    def of(self, sound: Tensor, rate: int) -> Tensor:
        """A sound ``(T,)`` in this form: resampled, cut or filled up with silence."""
        sound = resample(sound, rate, self.rate)
        start = int((len(sound) - self.length) * self.part) if len(sound) > self.length else 0
        sound = sound[start : start + self.length]
        if self.normalize:
            sound = (sound - sound.mean()) / torch.sqrt(sound.var(correction=0) + 1e-7)
        return torch.cat([sound, sound.new_zeros(self.length - len(sound))]).view(self.shape)


class SoundSource(FileSource):
    """Sound files with their labels, read one at a time."""

    ready = True
    form: Form

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The samples of a file, the mean of its channels."""
        labels = self.labels
        target = labels if isinstance(labels, DataError) else labels[index]
        return self.form.of(*read_sound(self.paths[index])), target

    @cached_property
    def extents(self) -> list[tuple[int, int]]:
        """Number of samples and rate of each file.

        Raises:
            DataError: one cannot be read, or holds nothing.
        """
        return [_extent(path) for path in self.paths]


def open_sounds(spec: DataSpec, network: InputSpec | None, seed: int) -> Source:
    """Open ``wav:DIR``, with a folder for each class, or ``wav:FILE.csv``, with labels or transcripts.

    Args:
        spec: see ``docs/data.md`` for its options.
        network: its input, as far as it is known, which says how long a sample is.
        seed: of no concern here.

    Raises:
        DataError: there are no sounds, or one cannot be read; or rates differ and none is asked for.
    """
    files, task = _files(spec)
    source = SoundSource(
        spec.text, files.paths, files.labels, files.class_names, rows=files.rows, notes=files.notes
    )
    source.task, source.labelled = task, files.labelled
    source.form = _form(spec, network, source, transcribed=task == "sequence")
    source.other_shape = (1, source.form.length)
    lengths = _lengths(source, source.form.rate)
    counts = {"longer, and cut": 0, "shorter, and filled up with silence": 0}
    for length in lengths:
        if length != source.form.length:
            counts["longer, and cut" if length > source.form.length else [*counts][1]] += 1
    said = [f"{count} {what}" for what, count in counts.items() if count]
    if said:
        of = f"of {len(lengths)} sounds, {source.form.length:,} samples each"
        source.notes = (*source.notes, f"{of}: {'; '.join(said)}")
    return source


def _files(spec: DataSpec) -> tuple[Files, str | None]:
    """The files with their labels, and the task that these say."""
    if os.path.isdir(spec.target):
        return folder_of_classes(spec.target, SUFFIXES, "sounds", "wav:FILE.csv"), "classify"
    table = Table(Path(spec.target))
    named = {option: column(spec, option) for option in ("path", "label", "text")}
    path = named["path"] or table.usual((*PATHS, *_SOUNDS)) or "path"
    label = named["label"] or (None if named["text"] else table.usual(LABELS))
    text = named["text"] or (None if label else table.usual(TRANSCRIPTS))
    files = Files.of_table(table.path, table.cells(path))
    if text:
        try:
            labels = Labels([cell for _, cell in table.cells(text)], task="sequence")
        except DataError as error:
            labels = Labels(error, task="sequence")
    else:
        labels = labels_of(table, [label]) if label else Labels([None] * len(files.paths))
    has_some = bool(text or label)
    files = Files(files.paths, labels.values, labels.names, files.notes, files.rows, has_some)
    return files, labels.task or ("classify" if label else None)


def _form(spec: DataSpec, network: InputSpec | None, source: SoundSource, *, transcribed: bool) -> Form:
    said = _said(str(spec.option("processor")))
    rate = whole_number(spec, "rate", _LONGEST) or said.get("sampling_rate") or 0
    rates = {have for _, have in source.extents}
    if not isinstance(rate, int) or rate < 1:
        if len(rates) > 1:
            some = " and ".join(map(str, sorted(rates)[:3]))
            hint = "say which the network takes: ?rate=16000"
            raise DataError(f"has sounds of {some} samples a second", where=spec.text, hint=hint)
        (rate,) = rates
    part = str(spec.option("crop"))
    if part not in _PARTS:
        raise DataError(f"crop is {part!r}, none of {', '.join(_PARTS)}", where=spec.text)
    lengths = _lengths(source, rate)
    shape = network.shape if network is not None else (0,)
    if not shape or max(shape[:-1], default=1) > 1:
        sizes = "x".join(map(str, shape)) or "a number"
        hint = "compute what it takes in FILE.py:CALLABLE"
        raise DataError(f"the network takes {sizes}, not a row of samples", where=spec.text, hint=hint)
    free = network is None or (transcribed and len(shape) - 1 in network.free)
    length = whole_number(spec, "length", _LONGEST) or (max(lengths) if free else shape[-1])
    normalize = bool(spec.option("normalize")) or said.get("do_normalize") is True
    return Form(rate, length, _PARTS[part], normalize, (*shape[:-1], length))


def _lengths(source: SoundSource, rate: int) -> list[int]:
    """Samples of each file at a rate."""
    return [-(-samples * rate // have) for samples, have in source.extents]


def _said(folder: str) -> dict[str, Any]:
    """The settings of a Hugging Face folder for its sounds; empty where it has none."""
    if folder and not os.path.isdir(folder):
        raise DataError("no such folder", where=folder, hint="name that of the network")
    path = Path(folder, _PROCESSOR)
    if not folder or not path.is_file():
        return {}
    try:
        value = json.loads(read_regular(path, DataError))
    except (ValueError, RecursionError, OSError) as error:
        raise DataError("is not valid JSON", where=str(path)) from error
    return value if isinstance(value, dict) else {}


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # the second where soundfile finds no libsndfile
        raise EnvironmentFailure(
            f"sounds need the optional package {name.partition('.')[0]} ({first_line(error)})",
            hint="pip install 'modelopt-cli[audio]'",
        ) from error


def resample(sound: Tensor, have: int, want: int) -> Tensor:
    """Samples of a sound at another rate, by scipy's polyphase filter.

    Args:
        sound: ``(T,)``, float32.
        have: its rate, per second.
        want: the rate to bring it to.

    Returns:
        ``(ceil(T * want / have),)``, float32.

    Raises:
        DataError: the two rates have no small ratio, so that the filter is too long.
        EnvironmentFailure: scipy is missing.
    """
    if have == want:
        return sound
    common = math.gcd(have, want)
    up, down = want // common, have // common
    if max(up, down) > _LARGEST_RATIO:
        raise DataError(f"rates of {have} and {want} have no small ratio", hint="resample the files before")
    samples = _library("scipy.signal").resample_poly(sound.numpy(), up, down, window=_WINDOW)
    return torch.from_numpy(samples)


def _extent(path: str) -> tuple[int, int]:
    soundfile = _library("soundfile")
    with open_regular(path, DataError) as file:
        _require_whole(file, path)
        try:
            with soundfile.SoundFile(file) as sound:
                samples, rate = sound.frames, sound.samplerate
        except (soundfile.SoundFileError, RuntimeError, OSError) as error:
            raise _unreadable(error, path) from error
    if not 0 < samples <= _LONGEST or rate < 1:
        raise DataError("holds no sound" if samples < 1 else "is too long", where=path)
    return samples, rate


def _require_whole(file: BinaryIO, path: str) -> None:
    """Refuse a WAV file that ends before its header says, of which the library reads what is there.

    A file that was written as a stream says 0, or some number near the largest.
    """
    head, there = file.read(8), os.fstat(file.fileno()).st_size
    file.seek(0)
    said = 8 + int.from_bytes(head[4:], "little")
    if head[:4] == b"RIFF" and len(head) == 8 and there + 1 < said < _STREAMED and said > 8:
        raise DataError(f"is truncated: {there:,} of {said:,} bytes are there", where=path)


def _unreadable(error: Exception, path: str) -> DataError:
    """The library's reason, without its name for an open file, which is that of an object."""
    reason = first_line(getattr(error, "error_string", error))
    return DataError(f"is no sound that can be read: {reason}", where=path)


def read_sound(path: str) -> tuple[Tensor, int]:
    """Samples of a sound file ``(T,)``, the mean of its channels, float32 from -1 to 1; and its rate.

    Raises:
        DataError: it cannot be read.
        EnvironmentFailure: soundfile is missing, or the file may not be read.
    """
    soundfile = _library("soundfile")
    with open_regular(path, DataError) as file:
        try:
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError, OSError) as error:
            raise _unreadable(error, path) from error
    return torch.from_numpy(samples).mean(1), rate
