"""``pairs:INPUTS@TARGETS``: images, and images of the same names for targets: masks, or pictures."""

import os
import re
from collections.abc import Mapping, Sequence

from modelopt_cli.data.data_spec import DataSpec, choice, sides
from modelopt_cli.data.decode import GREY, ImageFile, decode
from modelopt_cli.data.images import files_in, is_image, left_out
from modelopt_cli.data.shards import find_shards
from modelopt_cli.data.source import Raw, Source
from modelopt_cli.data.targets import RawTarget
from modelopt_cli.errors import DataError
from modelopt_cli.settings import option
from modelopt_cli.text import short

_TASKS = {"mask": "segment", "image": "restore"}


class PairsSource(Source):
    """Image files, and for each the file of its target."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        targets: Sequence[str],
        kind: str = "",
        values: tuple[int, ...] = (),
    ) -> None:
        self.name, self.inputs, self.targets = name, inputs, targets
        self.channels = 1 if decode(inputs[0]).mode in GREY else 3
        self._kind, self._values = kind, values

    @property
    def task(self) -> str:  # type: ignore[override]
        """Segmentation where targets are masks, else restoration; the first tells, unless an option does."""
        return _TASKS["mask" if self._target(0).is_mask else "image"]

    def _target(self, index: int) -> ImageFile:
        return ImageFile(self.targets[index], self._kind, self._values)

    def __len__(self) -> int:
        return len(self.inputs)

    def where(self, index: int) -> str:
        """Both paths."""
        return f"{self.inputs[index]} with {self.targets[index]}"

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The decoded image, and the file of its target."""
        return decode(self.inputs[index]), self._target(index)


def open_pairs(spec: DataSpec) -> Source:
    """Open ``pairs:INPUTS@TARGETS``: two folders or patterns, whose files belong together by their names."""
    kind = choice(spec, "target", ("", *_TASKS))
    inputs, targets = (_keyed(side) for side in sides(spec))
    for files, partners, side in ((inputs, targets, "target"), (targets, inputs, "input")):
        alone = sorted(files.keys() - partners.keys())
        if alone:
            more = f", like {len(alone) - 1} others" if len(alone) > 1 else ""
            hint = "a pair has the same path, up to the suffix; of patterns, the same in place of each *"
            raise DataError(
                f"has no {side} called {short(alone[0])!r}{more}", where=files[alone[0]], hint=hint
            )
    keys = sorted(inputs)
    values = _values(spec)
    source = PairsSource(
        spec.text, [inputs[key] for key in keys], [targets[key] for key in keys], kind, values
    )
    folders = [side for side in sides(spec) if os.path.isdir(side)]
    notes = (
        left_out(side, list(files_in(side)), {*source.inputs, *source.targets}, "images") for side in folders
    )
    source.notes = tuple(
        filter(None, (*notes, None if kind == "image" else _black_and_white(source.targets[0], values)))
    )
    return source


def _values(spec: DataSpec) -> tuple[int, ...]:
    """The pixel values of the classes, ``?classes=0,255``."""
    text = str(spec.option("classes"))
    if "classes" not in spec.options:
        return ()
    values = tuple(int(each) for each in text.split(",") if re.fullmatch("[0-9]{1,9}", each.strip()))
    problem = f"classes is {text!r}" if len(values) != text.count(",") + 1 else None
    for place, value in enumerate(values):
        if problem is None and value in values[:place]:
            problem = f"classes names the pixel value {value} twice"
    if problem is not None:
        raise DataError(problem, where=spec.text, hint="write the pixel values, each once: ?classes=0,255")
    return values


def _black_and_white(path: str, values: tuple[int, ...]) -> str | None:
    """A warning where a mask seems to have 255 for its class 1, which is ignored by default."""
    try:
        pixels = ImageFile(path).decode() if not values else None
    except DataError:  # of no concern where targets are not read
        return None
    if pixels is None or pixels.mode != "L" or pixels.format == "JPEG":
        return None
    if [value for value, count in enumerate(pixels.histogram()) if count] != [0, 255]:
        return None
    task = option("task", "segment")
    return f"{path} holds 0 and 255: if 255 is a class, add ?classes=0,255, for {task} ignores it"


def _keyed(side: str) -> Mapping[str, str]:
    """The files of a folder, in depth, or of a pattern, by what their partners are called, too."""
    if os.path.isdir(side):
        paths = [path for path in files_in(side) if is_image(path)]
        keys = [os.path.splitext(os.path.relpath(path, side))[0] for path in paths]
    else:
        paths = find_shards(side)
        keys = [_wild(side, path) for path in paths]
    if not paths:
        raise DataError("holds no images", where=side, hint="give a folder of images, or a pattern")
    files: dict[str, str] = {}
    for key, path in zip(keys, paths, strict=True):
        if key in files:
            raise DataError(
                f"has the name of {files[key]}, but for its suffix", where=path, hint="remove one"
            )
        files[key] = path
    return files


def _wild(pattern: str, path: str) -> str:
    """The part of a path that stands for the wildcards of its pattern, else its name without suffix."""
    text = re.escape(pattern).replace(r"\*\*/", "(?:(.*)/)?").replace(r"\*", "([^/]*)")
    match = re.fullmatch(re.sub(r"\\\{\d+\\\.\\\.\d+\\\}", r"(\\d+)", text), path)
    if match is None or not match.groups():
        return os.path.splitext(os.path.basename(path))[0]
    return "/".join(part for part in match.groups() if part)
