"""Overhead of distillation: ours next to a loop written by hand, and what keeping the logits saves.

The loop is ``pace.by_hand`` with Hinton's loss: a teacher in evaluation mode and channels-last under
``torch.inference_mode``. Ours is ``methods.distill.apply.learn`` with the default loss, timed as a whole,
with all its preparations and checks; then once more with ``--cache``, where all logits are there already,
as they are in every epoch but the first. Repetitions are interleaved and medians compared, on one thread.
Every repetition checks that the student is the same to the last bit with kept logits as without.

    python -m benchmarks.distill_steps [TEACHER:STUDENT ...] [--repetitions N] [--steps N] [--batch-size N]
        [--augment ...] [--output FILE.md]

A network is one of the library's own, by name, with its width after a slash.
"""

import argparse
import datetime
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pace import EPOCHS, LR, Samples, Speed, Stopwatch, by_hand, compare, make
from modelopt_cli.measure.environment import cpu_name
from modelopt_cli.methods.distill.apply import learn
from modelopt_cli.methods.distill.cache import ENTRIES, CacheRequest
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.distill_context import DistillContext
from modelopt_cli.methods.distill.teacher import TeacherMember
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.training import AUGMENTATIONS, TrainConfig, Training

PAIRS = ("resnet20:resnet8", "resnet20:resnet8/0.5", "resnet8:lenet5")
CONFIG = DistillConfig()
HARD, SOFT = 0.1, 0.9
"""Weights of the labels and of the teacher's logits in the default loss."""


class Contest:
    """All three on the same random samples; images are those of the student."""

    def __init__(self, pair: str, steps: int, batch_size: int, augment: str, folder: Path) -> None:
        self.teacher, self.student = pair.split(":")
        self.shape = make(self.student).input.shape
        self.samples = Samples(make(self.student), steps, batch_size, augment)
        self.folder = folder
        self.ours(cached=True)  # to fill it

    def networks(self) -> tuple[Program, Program]:
        """Student and teacher."""
        return make(self.student), make(self.teacher, seed=1, channels=self.shape[0]).eval()

    def ours(self, *, cached: bool) -> tuple[Speed, dict[str, Tensor]]:
        """``learn``, and what the student has become."""
        samples, (student, teacher) = self.samples, self.networks()
        config = TrainConfig(
            epochs=EPOCHS,
            batch_size=samples.batch_size,
            lr=LR,
            augment=samples.augment,
            augmentation_cycle=EPOCHS if AUGMENTATIONS[samples.augment].is_random else 0,
        )
        context = DistillContext(
            training=Training(samples.data, config=config),
            teachers=(TeacherMember(teacher, InputSpec(self.shape)),),
            cache=CacheRequest(self.folder, {}) if cached else None,
        )
        watch = Stopwatch()
        entry = learn(student, CONFIG, context, {})
        assert entry["steps"] == samples.steps
        return watch.speed(samples.steps), dict(student.state_dict())

    def plain(self) -> Speed:
        """The loop written by hand."""
        student, teacher = self.networks()
        watch = Stopwatch()
        teacher.to(memory_format=torch.channels_last)
        by_hand(student, self.samples, lambda images, labels: hinton(student, teacher, images, labels))
        return watch.speed(self.samples.steps)

    def repetition(self) -> tuple[Speed, Speed, Speed]:
        """Seconds by hand, ours, and ours with the logits at hand."""
        plain, (asked, one), (kept, other) = self.plain(), self.ours(cached=False), self.ours(cached=True)
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        return plain, asked, kept

    @property
    def kept(self) -> int:
        """Bytes of logits."""
        return (self.folder / ENTRIES).stat().st_size


def hinton(student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of a batch."""
    with torch.inference_mode():
        taught = teacher(images)
    logits, t = student(images), CONFIG.temperature
    logs = F.log_softmax(logits / t, 1), F.log_softmax(taught / t, 1)
    soft = F.kl_div(*logs, reduction="batchmean", log_target=True)
    return HARD * F.cross_entropy(logits, labels) + SOFT * t * t * soft


def row(pair: str, options: argparse.Namespace) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(pair, options.steps, options.batch_size, options.augment, Path(folder, "logits"))
        rounds = [contest.repetition() for _ in range(options.repetitions + 1)][1:]
        plain, asked, kept = zip(*rounds, strict=True)
        cached = compare(asked, kept)
        saved = f"{cached.second:.1f} | {cached.ratio:.2f}x | {contest.kept:,}"
    return f"| {pair.replace(':', ' | ')} | {compare(plain, asked)} | {saved} |"


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pairs", nargs="*", default=PAIRS)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50, help="of an epoch; there are two")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--augment", default="cifar")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{datetime.date.today()}, {cpu_name()}, torch {torch.__version__}, one thread, loss "
        f"{CONFIG.terms}, batches of {options.batch_size}, {options.repetitions} interleaved repetitions of "
        f"{EPOCHS * options.steps} steps, augmentation {options.augment}, median steps/s",
        "",
        "| teacher | student | by hand | ours | ours over by hand | single pairs | by processor time "
        "| logits kept | over asking | bytes kept |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for pair in options.pairs:
        lines.append(row(pair, options))
        print(lines[-1], flush=True)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
