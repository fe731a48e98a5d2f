"""What ends ``modelopt distill`` on the way: killed processes, a full disk. It goes on to the same bytes."""

import errno
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from modelopt_cli.training.state import read_state

SAMPLES, BATCH, EPOCHS, SAVE_EVERY = 72, 8, 4, 5
PER_EPOCH = 6
"""Steps; a third of the samples is validated on."""
HOW = [
    *(
        "--train",
        "npz:data.npz",
        "--val-fraction",
        "0.3333",
        "--augment",
        "cifar",
        "--augmentation-cycle",
        "2",
    ),
    *("--epochs", EPOCHS, "--batch-size", BATCH, "--lr", "0.05", "--ema", "0.8", "--save-every", SAVE_EVERY),
    *("--threads", 1, "--no-eval", "--resume"),
]


@pytest.fixture
def command(good_files, tmp_path, monkeypatch):
    """Everything but the output."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (SAMPLES, 8, 8), np.uint8)
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", images=images, labels=draw.integers(0, 10, SAMPLES))
    teacher = [good_files / "net.pth", "--arch", f"{good_files / 'net.py'}:make", "--input-size", "8"]
    student = ["--channels", "1", "--student", "builtin:resnet8?in_channels=1&width=0.25"]
    return ["distill", *teacher, *student, *HOW]


def deaths_of(seed: int) -> list[dict[str, object]]:
    """One of either process, in any order, the second further on; the main one's perhaps while it saves."""
    draw = random.Random(seed)
    ranks, steps = draw.sample([0, 1], 2), sorted(draw.sample(range(1, EPOCHS * PER_EPOCH), 2))
    saving = draw.random() < 0.5
    return [{"rank": r, "step": s, "saving": saving and r == 0} for r, s in zip(ranks, steps, strict=True)]


def saved_before(step: int) -> int:
    """The step that a run goes on from which was killed on the way from ``step`` to the next saved state."""
    return max(step // SAVE_EVERY * SAVE_EVERY, step // PER_EPOCH * PER_EPOCH)


@pytest.mark.slow
def test_killed_in_either_process_it_goes_on_to_the_same_bytes(command, torchrun):
    whole = torchrun("-m", "modelopt_cli", *command, "-o", "whole.safetensors", "--cache", "a")
    assert whole.returncode == 0, whole.stderr
    seed = random.randrange(2**32)
    deaths = deaths_of(seed)
    print(f"seed {seed}: {deaths}")
    worker = Path(__file__).parent / "killed_worker.py"
    argv = [*command, "-o", "killed.safetensors", "--cache", "b"]
    killed = torchrun(worker, json.dumps(deaths), *argv, restarts=len(deaths))
    assert killed.returncode == 0, killed.stderr
    begun = [json.loads(line) for line in Path("begun").read_text().splitlines()]
    expected = [0, *(saved_before(death["step"]) for death in deaths)]
    assert sorted(begun) == [[time, rank, step] for time, step in enumerate(expected) for rank in (0, 1)]
    assert "bug in modelopt" not in killed.stderr
    assert Path("killed.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    logs = [Path(folder, "metrics.jsonl").read_text() for folder in ("whole.run", "killed.run")]
    assert logs[0] == logs[1]
    assert [path.name for path in Path("killed.run").iterdir()] == ["metrics.jsonl"]
    assert not list(Path().glob(".*.part"))


class Disk:
    """Has room for ``left`` whole files that are to be called ``name``, and for any others."""

    def __init__(self, name: str, left: int) -> None:
        self.part, self.left = f".{name}.part", left
        self.real = os.write

    def write(self, handle: int, data: memoryview) -> int:
        if Path(f"/proc/self/fd/{handle}").readlink().name == self.part:
            done = os.lseek(handle, 0, os.SEEK_CUR)
            self.left -= done == 0
            if self.left < 0 < done:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(handle, data)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("name", "left", "kept"),
    [
        ("killed.run/state.safetensors", 3, 10),
        ("killed.run/stage-distill.safetensors", 0, EPOCHS * PER_EPOCH),
        ("killed.safetensors", 0, None),
    ],
    ids=["state", "stage", "output"],
)
def test_once_there_is_room_again_it_goes_on_to_the_same_bytes(
    name, left, kept, command, modelopt, monkeypatch
):
    assert modelopt(*command, "-o", "whole.safetensors").code == 0
    command = [*command, "-o", "killed.safetensors"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", Disk(Path(name).name, left).write)
        outcome = modelopt(*command, "-q")
    assert outcome.code == 3
    cause = "cannot write: no space left on the device; free some space or write elsewhere"
    assert outcome.err == f"error: {name}: {cause}; go on with the same command and --resume (killed.run)\n"
    assert not Path("killed.safetensors").exists()
    assert not list(Path().rglob(".*.part"))
    state = Path("killed.run", "state.safetensors")
    assert (read_state(state).about["state"]["place"]["step"] if state.exists() else None) == kept
    outcome = modelopt(*command)
    assert outcome.code == 0, outcome.err
    for part in ("safetensors", "run/metrics.jsonl"):
        assert Path(f"killed.{part}").read_bytes() == Path(f"whole.{part}").read_bytes()
