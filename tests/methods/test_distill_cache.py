"""A cache of a teacher's logits: the same student, fewer calls, and nothing that is not true."""

import errno
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_cache_cases import (
    CLASSES,
    INPUT,
    SAMPLES,
    SHAPE,
    config,
    context,
    network,
    noise,
    running,
    student,
    taught,
)
from torch import Tensor
from torch.utils.data import Dataset

from modelopt_cli.data import Data
from modelopt_cli.data.dataset_sources import DatasetSource
from modelopt_cli.errors import EnvironmentFailure, ModeloptError, OutputError, UsageError
from modelopt_cli.measure.latency import threads
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.distill.apply import learn
from modelopt_cli.methods.distill.cache import ENTRIES, HEADER, Cache, CacheRequest
from modelopt_cli.methods.distill.cache_identity import PROBED
from modelopt_cli.methods.distill.cache_layout import Layout
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.distill_context import DistillContext
from modelopt_cli.methods.distill.teacher import Teacher, TeacherMember, TeacherOutput
from modelopt_cli.methods.quantize.apply import apply as quantize
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program.capture import capture
from modelopt_cli.training import StepInputs
from modelopt_cli.training.distributed import World
from modelopt_cli.training.state import read_state

Asked = list[int]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower in several."""
    with threads(1):
        yield


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """How many images each question to a teacher had, but for the one that tells the form of its outputs."""
    sizes: Asked = []
    call = Teacher.__call__

    def counting(self: Teacher, images: Tensor) -> TeacherOutput:
        if len(images) > PROBED:
            sizes.append(len(images))
        return call(self, images)

    monkeypatch.setattr(Teacher, "__call__", counting)
    return sizes


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def teachers(kind: str) -> tuple[TeacherMember, ...]:
    """A Program is packed and rounds alike in any batch; a plain module does so on some CPUs only."""
    module = network(8)
    return (TeacherMember(capture(module, INPUT) if kind == "program" else module, INPUT),)


@pytest.mark.parametrize("kind", ["program", "module"])
def test_an_answer_does_not_depend_on_the_batch(kind: str) -> None:
    images = torch.stack([noise().get(i)[0] for i in range(SAMPLES)])
    teacher = Teacher(teachers(kind), batch_size=16)
    whole = teacher(images).logits
    for size in (1, 2, 3, 15, 16, 17):
        parts = torch.cat([teacher(part).logits for part in images.split(size)])
        if kind == "program":
            assert torch.equal(parts, whole), size
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    for teacher in (Teacher(teachers(kind)), Teacher(teachers(kind), batch_size=100)):
        torch.testing.assert_close(teacher(images).logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["program", "module"])
def test_the_student_is_the_same_and_the_teacher_is_asked_once(
    kind: str, tmp_path: Path, asked: Asked
) -> None:
    who = {"teachers": teachers(kind)}
    plain = taught(context(None, **who))
    assert asked == [16, 16, 3] * 3
    asked.clear()
    first = taught(context(tmp_path / "logits", **who))
    assert asked == [16, 16, 3]
    asked.clear()
    second = taught(context(tmp_path / "logits", **who))
    assert asked == []
    assert equal(first, second)
    if kind == "program":
        assert equal(plain, first)
    for name, tensor in plain.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)
    assert not equal(plain, dict(student().state_dict()))
    # Another student asks nothing either, though its batches are others.
    another = context(tmp_path / "logits", config(batch_size=9), **who)
    taught(another, student(3))
    assert asked == []


def test_what_is_kept_is_what_the_teacher_answers(tmp_path: Path) -> None:
    given = context(tmp_path / "logits")
    taught(given)
    layout = Layout(SAMPLES, 1, CLASSES, 64)
    assert (tmp_path / "logits" / ENTRIES).stat().st_size == layout.size == SAMPLES * (4 + 4 * CLASSES)
    kept = layout.unpack(np.fromfile(tmp_path / "logits" / ENTRIES, layout.entry))
    images = torch.stack([noise().get(i)[0] for i in range(SAMPLES)])
    with torch.no_grad():
        expected = network(8)(images)
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)


def test_several_teachers_are_one(tmp_path: Path, asked: Asked) -> None:
    members = tuple(TeacherMember(capture(network(8, seed), INPUT), INPUT, 1.0 + seed) for seed in (0, 1))
    plain = taught(context(None, teachers=members))
    asked.clear()
    assert equal(plain, taught(context(tmp_path / "logits", teachers=members)))
    assert len(asked) == 3


def test_views_are_kept_one_by_one(tmp_path: Path, asked: Asked) -> None:
    how = config(epochs=5, augment="cifar", augmentation_cycle=2)
    plain = taught(context(None, how))
    asked.clear()
    assert equal(plain, taught(context(tmp_path / "logits", how)))
    assert asked == [16, 16, 3] * 2
    assert (tmp_path / "logits" / ENTRIES).stat().st_size == Layout(SAMPLES, 2, CLASSES, 64).size


def test_held_out_samples_take_no_room(tmp_path: Path, asked: Asked) -> None:
    how = config(val_fraction=0.4)
    plain = taught(context(None, how))
    asked.clear()
    assert equal(plain, taught(context(tmp_path / "logits", how)))
    assert asked == [16, 5]
    assert (tmp_path / "logits" / ENTRIES).stat().st_size == Layout(21, 1, CLASSES, 64).size


def test_of_many_classes_the_answer_is_the_same_new_or_kept(tmp_path: Path) -> None:
    """So that an interruption, or what another run has left, makes no difference."""
    first = taught(context(tmp_path / "logits"), cache_top=2)
    assert equal(first, taught(context(tmp_path / "logits"), cache_top=2))
    assert not equal(first, taught(context(None)))


@pytest.mark.parametrize("top", [2, 64])
def test_an_interrupted_run_goes_on_to_the_same_student(
    top: int, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = taught(context(tmp_path / "through"), cache_top=top)
    asked.clear()
    given = context(tmp_path / "logits", config(save_every=1))
    with monkeypatch.context() as broken:
        answer, steps = Cache.output, Counter[str]()

        def interrupted(
            self: Cache, inputs: StepInputs, teacher: Callable[[Tensor], TeacherOutput]
        ) -> TeacherOutput:
            steps["done"] += 1
            if steps["done"] == 3:
                raise KeyboardInterrupt
            return answer(self, inputs, teacher)

        broken.setattr(Cache, "output", interrupted)
        run, stopped = running(given, tmp_path / "run", resume=False)
        with run, pytest.raises(KeyboardInterrupt):
            taught(stopped, cache_top=top)
    assert asked == [16, 16]
    run, resumed = running(given, tmp_path / "run", resume=True)
    with run:
        assert equal(through, taught(resumed, cache_top=top))
    assert asked == [16, 16, 3]


def entry_of(folder: Path, sample: int) -> slice:
    size = Layout(SAMPLES, 1, CLASSES, 64).entry.itemsize
    return slice(sample * size, (sample + 1) * size)


@pytest.mark.parametrize("damage", ["a bit of the data", "a bit of the sum", "zeros", "another's"])
def test_a_torn_entry_is_not_there(damage: str, tmp_path: Path, asked: Asked) -> None:
    folder = tmp_path / "logits"
    first = taught(context(folder))
    whole = (folder / ENTRIES).read_bytes()
    content, place = bytearray(whole), entry_of(folder, 7)
    if damage == "zeros":
        content[place] = bytes(place.stop - place.start)
    elif damage == "another's":
        content[place] = whole[entry_of(folder, 8)]
    else:
        content[place.start + (6 if "data" in damage else 2)] ^= 1
    (folder / ENTRIES).write_bytes(content)
    asked.clear()
    assert equal(first, taught(context(folder)))
    assert asked in ([16], [3])
    assert (folder / ENTRIES).read_bytes() == whole


@pytest.mark.parametrize("left", ["no header", "no entries", "too few entries"])
def test_what_a_killed_process_left_is_made_whole(left: str, tmp_path: Path, asked: Asked) -> None:
    folder = tmp_path / "logits"
    first = taught(context(folder))
    if left == "no header":
        (folder / HEADER).unlink()
    elif left == "no entries":
        (folder / ENTRIES).unlink()
    else:
        (folder / ENTRIES).write_bytes(b"\0" * 7)
    asked.clear()
    assert equal(first, taught(context(folder)))
    assert len(asked) == (0 if left == "no header" else 3)
    assert (folder / HEADER).exists()


def test_entries_of_another_identity_are_not_there(tmp_path: Path) -> None:
    """Even where they lie in the file that is opened."""
    layout, inputs = Layout(3, 1, 2, 2), StepInputs(torch.zeros(3, 1), torch.arange(3))
    for number in (1.0, 2.0):
        cache = Cache(CacheRequest(tmp_path, {}), layout, {"number": number}, World())
        for _ in range(2):
            found = cache.output(inputs, lambda images, n=number: TeacherOutput(torch.full((3, 2), n)))
        assert bool((found.logits == number).all())
        (tmp_path / HEADER).unlink()


def test_what_was_never_written_is_not_there_whatever_its_sum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(zlib, "crc32", lambda data, start=0: 0)
    cache = Cache(CacheRequest(tmp_path, {}), Layout(3, 1, 2, 2), {}, World())
    inputs, asked = StepInputs(torch.zeros(3, 1), torch.arange(3)), []
    for _ in range(2):
        cache.output(inputs, lambda images: (asked.append(0), TeacherOutput(torch.ones(3, 2)))[1])
    assert len(asked) == 1


# What another distillation asks for, and how that is called.
OTHERS: dict[str, tuple[Callable[[Path], DistillContext], dict[str, Any]]] = {
    "teachers.1.sha256": (
        lambda folder: context(folder, cache=CacheRequest(folder, {"1": {"sha256": "def", "weight": 1.0}})),
        {},
    ),
    "teachers.1.weight": (
        lambda folder: context(folder, cache=CacheRequest(folder, {"1": {"sha256": "abc", "weight": 2.0}})),
        {},
    ),
    "samples": (lambda folder: trained_on(context(folder), noise(40)), {}),
    "chosen": (
        lambda folder: trained_on(context(folder), replace(noise(), indices=tuple(range(34, -1, -1)))),
        {},
    ),
    "pixels": (lambda folder: trained_on(context(folder), noise(seed=1)), {}),
    "data": (
        lambda folder: trained_on(context(folder), replace(noise(), source=renamed(noise()))),
        {},
    ),
    "augment": (lambda folder: context(folder, config(augment="cifar", augmentation_cycle=1)), {}),
    "views": (lambda folder: context(folder, config(augment="cifar", augmentation_cycle=3)), {}),
    "seed": (lambda folder: context(folder, config(augment="cifar", augmentation_cycle=1), seed=9), {}),
    "amp": (lambda folder: context(folder, config(amp=True)), {}),
    "cache_top": (lambda folder: context(folder), {"cache_top": 3}),
    "torch": (lambda folder: context(folder), {}),
}


def trained_on(given: DistillContext, data: Data) -> DistillContext:
    assert given.training is not None
    return replace(given, training=replace(given.training, train=data))


def renamed(data: Data) -> Any:
    data.source.name = "other noise"  # type: ignore[misc]
    return data.source


@pytest.fixture(scope="module")
def kept_logits(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders with the logits of a distillation: of plain samples, and of drawn ones."""
    folders = {drawn: tmp_path_factory.mktemp("kept") / "logits" for drawn in (False, True)}
    with threads(1):
        taught(context(folders[False], config(epochs=1)))
        taught(context(folders[True], config(epochs=1, augment="cifar", augmentation_cycle=1)))
    return folders


@pytest.mark.parametrize("name", OTHERS)
def test_answers_of_another_kind_are_refused_by_name_and_replaced_by_force(
    name: str, kept_logits: dict[bool, Path], tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "logits"
    shutil.copytree(kept_logits[name in ("views", "seed")], folder)
    before = (folder / ENTRIES).read_bytes()
    make, settings = OTHERS[name]
    given = make(folder)
    if name == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99")
    asked.clear()
    with pytest.raises(UsageError) as refused:
        taught(given, **settings)
    text = str(refused.value)
    assert text.startswith(f"{folder}: holds the logits of another distillation: ")
    assert f"{name} (" in text
    assert text.endswith("; give another folder, or force=True")
    assert "\n" not in text
    assert (folder / ENTRIES).read_bytes() == before
    assert asked == []
    assert given.cache is not None
    forced = replace(given, cache=replace(given.cache, force=True))
    first = taught(forced, **settings)
    assert asked
    asked.clear()
    assert equal(first, taught(given, **settings))
    assert asked == []


def test_the_seed_and_the_student_are_no_part_of_what_is_not_drawn(tmp_path: Path, asked: Asked) -> None:
    taught(context(tmp_path / "logits"))
    asked.clear()
    taught(context(tmp_path / "logits", config(lr=0.01, label_smoothing=0.1), seed=5), temperature=2.0)
    assert asked == []


@pytest.mark.parametrize("header", [b"", b"{}", b'{"format": 1, "format": 1}', b"\xff"])
def test_a_damaged_header_is_refused(header: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "logits"
    first = taught(context(folder))
    (folder / HEADER).write_bytes(header)
    with pytest.raises(UsageError, match="give another folder, or force=True"):
        taught(context(folder))
    given = context(folder)
    assert given.cache is not None
    assert equal(first, taught(replace(given, cache=replace(given.cache, force=True))))


class Own(Dataset[tuple[Tensor, int]]):
    """May draw what it likes."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(SHAPE), index % CLASSES


def own() -> Data:
    return Data(DatasetSource("own", "own", {}, Own()), INPUT)


def dynamic() -> tuple[TeacherMember, ...]:
    program = quantize(capture(network(8), INPUT), QuantizeConfig(scheme="int8-dynamic"), Context()).program
    return (TeacherMember(program, INPUT, name="int8"),)


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (
            lambda folder: context(folder, config(augment="cifar")),
            {},
            r"^cache: .*; leave it out, or use augmentation_cycle N",
        ),
        (
            lambda folder: trained_on(context(folder), own()),
            {},
            r"^cache: .*; leave it out, or use augmentation_cycle N",
        ),
        (
            lambda folder: context(folder, config(mixup=0.2)),
            {},
            r"^cache: .*; leave it out, or use no mixup$",
        ),
        (lambda folder: context(folder), {"loss": "kd+at"}, r"^cache: .* at needs features; leave it out"),
        (lambda folder: context(folder, teachers=dynamic()), {}, r"^int8: .*; leave out cache, or"),
    ],
    ids=["new images", "own dataset", "mixup", "features", "dynamic"],
)
def test_what_no_kept_answer_fits_is_refused(
    given: Callable[[Path], DistillContext], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        taught(given(tmp_path / "logits"), **settings)
    assert not (tmp_path / "logits").exists()


def test_features_of_weight_0_are_no_obstacle(tmp_path: Path) -> None:
    taught(context(tmp_path / "logits"), loss="kd+at:0")


def test_the_users_own_dataset_is_drawn_in_views(tmp_path: Path, asked: Asked) -> None:
    plain = taught(trained_on(context(None, config(augmentation_cycle=1)), own()))
    asked.clear()
    assert equal(plain, taught(trained_on(context(tmp_path / "logits", config(augmentation_cycle=1)), own())))
    assert asked == [16, 16, 3]


def test_a_size_beyond_all_reason_is_refused(tmp_path: Path) -> None:
    layout = Layout(1_300_000, 1000, 1000, 64)
    with pytest.raises(UsageError, match=r"509,600,000,000 bytes.*; lower augmentation_cycle or cache_top"):
        Cache(CacheRequest(tmp_path / "logits", {}), layout, {}, World())
    assert not (tmp_path / "logits").exists()


def test_the_size_is_known_before(tmp_path: Path) -> None:
    notes: list[str] = []
    given = context(tmp_path / "logits")
    assert given.cache is not None
    taught(replace(given, cache=replace(given.cache, on_note=notes.append)))
    assert notes == [f"the teacher's logits take 840 bytes in {tmp_path / 'logits'}"]


@pytest.mark.parametrize("how", ["reserving fails", "too little is free"])
def test_a_full_disk_ends_it_before_anything_is_learned(
    how: str, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "reserving fails":

        def full(handle: int, offset: int, size: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 10))  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentFailure, match=r"free some space") as failed:
        taught(context(tmp_path / "logits"))
    assert str(tmp_path / "logits") in str(failed.value)
    assert asked == []
    assert list((tmp_path / "logits").iterdir()) == []


def test_all_of_the_file_is_on_the_disk(tmp_path: Path) -> None:
    """A page of a hole that finds no room when it is written would kill the process."""
    Cache(CacheRequest(tmp_path, {}), Layout(5000, 1, 64, 64), {}, World())
    found = (tmp_path / ENTRIES).stat()
    assert found.st_blocks * 512 >= found.st_size == 5000 * 260


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: path.write_text("a file"), OutputError),
        (lambda path: (path.mkdir(), (path / ENTRIES).mkdir()), EnvironmentFailure),
    ],
    ids=["a file", "a folder in the way"],
)
def test_a_folder_that_cannot_be_used_is_named(
    make: Callable[[Path], Any], error: type[ModeloptError], tmp_path: Path
) -> None:
    make(tmp_path / "logits")
    with pytest.raises(error, match="logits"):
        taught(context(tmp_path / "logits"))


def test_no_parent_no_cache(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="No such file"):
        taught(context(tmp_path / "none" / "logits"))


@pytest.mark.slow
def test_two_processes_share_one_file(tmp_path: Path, asked: Asked, torchrun: Callable[..., Any]) -> None:
    done = torchrun(Path(__file__).parent / "distill_cache_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr
    together = read_state(tmp_path / "together")
    assert together.about["torn"] == 0
    # All logits are there for a process that is alone.
    alone = taught(context(tmp_path / "logits"))
    assert asked == []
    for name, tensor in taught(context(None)).items():
        torch.testing.assert_close(alone[name], tensor, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(together.tensors[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_network_without_a_graph_learns_from_kept_answers_too(tmp_path: Path, asked: Asked) -> None:
    for folder in (None, tmp_path / "logits"):
        pupil = network(2, seed=1)
        entry = learn(pupil, DistillConfig(cache_top=3), context(folder), {})
        assert entry.get("logits") == (None if folder is None else {"kept": 3, "classes": CLASSES})
    assert asked == [16, 16, 3] * 4
