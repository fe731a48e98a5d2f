"""Points of size against accuracy, kept in a file while they are measured, and the tables made of them."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

OURS = "modelopt"
POINTS_LOST = 0.1
"""The top-1 that a file may cost, in points; of 20 images, none."""
DIVERGENCES = (0.003, 0.01, 0.03)
"""In nats, at which sizes are compared, too."""


@dataclass(frozen=True)
class Point:
    """One file.

    Attributes:
        setting: of NNCodec, or ``OURS``.
        at: the QP, or the ratio that was asked for.
        size: bytes.
        correct: images whose top-1 is right.
        divergence: from the fp32 network, mean over the images, in nats.
        seconds: to write the file; ours with everything from the command's start.
        reading: seconds to read it.
    """

    setting: str
    at: float
    size: int
    correct: int
    divergence: float
    seconds: float
    reading: float

    @property
    def cell(self) -> str:
        """For a table."""
        return f"{self.size:,} / {self.correct:,} / {self.divergence:.4f}"


@dataclass
class Curves:
    """The points of a network, kept in a file.

    Attributes:
        path: of the file.
        points: that have been measured.
        about: images, those that the fp32 network gets right, its parameters and the bytes of its file.
    """

    path: Path
    points: list[Point] = field(default_factory=list)
    about: dict[str, int] = field(default_factory=dict)

    def read(self) -> None:
        """Measurements of an earlier run."""
        if self.path.exists():
            stored = json.loads(self.path.read_text())
            self.points, self.about = [Point(**each) for each in stored["points"]], stored["about"]

    def add(self, setting: str, at: float, measure: Callable[[], Point]) -> None:
        """Measure a point that is not there yet."""
        if any((point.setting, point.at) == (setting, at) for point in self.points):
            return
        self.points.append(measure())
        print(f"{self.path.stem}, {setting}, {at}: {self.points[-1].cell}", file=sys.stderr, flush=True)
        self.path.write_text(json.dumps({"about": self.about, "points": [asdict(p) for p in self.points]}))

    def side(self, mine: bool) -> list[Point]:
        """The points of one tool."""
        return [point for point in self.points if (point.setting == OURS) == mine]

    @property
    def fewest(self) -> int:
        """Images that a file must get right to be as accurate as the fp32 network."""
        return math.ceil(self.about["correct"] - self.about["images"] * POINTS_LOST / 100)


def smallest(points: Iterable[Point], held: Callable[[Point], bool]) -> Point | None:
    """The smallest file that holds what is asked."""
    return min(filter(held, points), key=lambda point: point.size, default=None)


def criteria(curves: Curves) -> Iterator[tuple[str, Callable[[Point], bool]]]:
    """Sizes and losses at which files are compared."""
    lost = f"{POINTS_LOST} pp" if curves.about["images"] * POINTS_LOST >= 100 else "no image"
    yield f"at least {curves.fewest:,} right ({lost} lost)", lambda p: p.correct >= curves.fewest
    for limit in DIVERGENCES:
        yield f"divergence at most {limit}", lambda p, limit=limit: p.divergence <= limit


def comparison(all_curves: dict[str, Curves]) -> Iterator[str]:
    """The smallest files of both tools at each criterion."""
    yield "| network | at | NNCodec | with | ours | ours over theirs |"
    yield "|---|---|---|---|---|---|"
    for name, curves in all_curves.items():
        for what, held in criteria(curves):
            theirs, mine = (smallest(curves.side(side), held) for side in (False, True))
            ratio = f"{mine.size / theirs.size:.3f}" if mine and theirs else "-"
            how = f"{theirs.setting}, QP {theirs.at:g}" if theirs else "-"
            sizes = [f"{point.size:,}" if point else "none" for point in (theirs, mine)]
            yield f"| {name} | {what} | {sizes[0]} | {how} | {sizes[1]} | {ratio} |"


def table(name: str, curves: Curves) -> Iterator[str]:
    """All points of a network, each as bytes / images right / divergence."""
    about = curves.about
    yield (
        f"**{name}**: {about['parameters']:,} parameters and buffers, {about['bytes']:,} bytes, fp32 right "
        f"on {about['correct']:,} of {about['images']:,} images. Bytes / right / divergence:"
    )
    yield ""
    yield "| asked for | ours | writing, s | reading, s |"
    yield "|---|---|---|---|"
    for point in sorted(curves.side(True), key=lambda point: point.at):
        yield f"| {point.at:g}x | {point.cell} | {point.seconds:.1f} | {point.reading:.2f} |"
    yield ""
    theirs = {(point.setting, point.at): point for point in curves.side(False)}
    settings = list(dict.fromkeys(setting for setting, _ in theirs))
    yield f"| QP | {' | '.join(settings)} |"
    yield "|---" * (len(settings) + 1) + "|"
    for at in sorted({at for _, at in theirs}):
        cells = [theirs[setting, at].cell if (setting, at) in theirs else "-" for setting in settings]
        yield f"| {at:g} | {' | '.join(cells)} |"
    spent = {s: [p for p in curves.side(False) if p.setting == s] for s in settings}
    slowest = ", ".join(f"{s} {max(p.seconds for p in points):.1f}" for s, points in spent.items())
    yield ""
    yield f"NNCodec's longest encoding, s: {slowest}; decoding {max(p.reading for p in theirs.values()):.2f}."
