"""--task from the shell: what says it, what is measured and recorded, gates in its unit, and bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

CODE = """
from torch import nn

def make():
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    return nn.Sequential(*layers)

def right(outputs, targets):
    return (outputs.argmax(1) == targets).double().flatten(1).mean(1)

def pictures():
    import torch
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [(a, a.argmax(0)) for a in x]
"""
HOW = ["--arch", "net.py:make", "--input-shape", "3x8x8", "--latency-runs", "0", "-q"]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a segmentation network and pictures with masks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    torch.save(nn.Sequential(*layers).state_dict(), tmp_path / "net.pth")
    x = torch.randn(24, 3, 8, 8)
    masks = x.argmax(1)
    masks[:, 0] = 255
    save(tmp_path / "masks.npz", x, masks)
    return tmp_path


def save(path: Path, x: torch.Tensor, y: torch.Tensor) -> None:
    np.savez(path, x=x.numpy(), y=y.numpy())


DATA = ["--data", "npz:masks.npz"]
Run = Callable[..., Any]


def test_a_task_is_recorded_and_known_to_later_commands(there: Path, modelopt: Run) -> None:
    made = modelopt("quantize", "net.pth", *HOW, *DATA, "--task", "segment", "-o", "q.safetensors", "--json")
    assert made.code == 0, made.err
    evaluation = json.loads(made.out)["evaluation"]
    assert evaluation["task"] == "segment (--task given)"
    assert set(evaluation["models"][1]["metrics"]) == {"miou", "pixel_accuracy"}
    later = modelopt("eval", "q.safetensors", "q.safetensors", *DATA, "--latency-runs", "0", "-q", "--json")
    assert later.code == 0, later.err
    found = json.loads(later.out)
    assert found["task"] == "segment (recorded)"
    assert found["models"][0]["metrics"] == evaluation["models"][1]["metrics"]
    assert found["models"][1]["fidelity"]["snr_db"] == {"output": 200.0}
    table = modelopt("eval", "net.pth", "q.safetensors", *HOW[:-1], *DATA)
    assert table.code == 0, table.err
    for text in ("mIoU", "mIoU drop", "signal to noise", "KL divergence", "task: segment (recorded)"):
        assert text in table.out
    assert "bootstrapped 95 % interval" in table.out


def test_options_of_a_task_are_recorded_too(there: Path, modelopt: Run) -> None:
    words = ["--task", "segment?ignore=0", "-o", "q.safetensors"]
    masks = torch.randint(1, 4, (24, 8, 8))
    masks[:, 0] = 0
    save(there / "masks.npz", torch.randn(24, 3, 8, 8), masks)
    assert modelopt("quantize", "net.pth", *HOW, *DATA, *words).code == 0
    later = modelopt("eval", "q.safetensors", *DATA, "--latency-runs", "0", "-q", "--json")
    assert json.loads(later.out)["task"] == "segment?ignore=0 (recorded)"


def test_files_of_two_tasks_are_named(there: Path, modelopt: Run) -> None:
    how = [*HOW, "--scheme", "int8-weight", "--no-eval"]
    for task in ("segment", "restore"):
        words = ["quantize", "net.pth", *how, "--task", task, "-o", f"{task}.safetensors"]
        assert modelopt(*words).code == 0
    pair = ["eval", "segment.safetensors", "restore.safetensors", "--latency-runs", "0", "-q"]
    says = "restore.safetensors: is for the task restore, and segment.safetensors is for segment"
    for more in ([], DATA, [*DATA, "--dry-run"]):
        found = modelopt(*pair, *more)
        assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
        assert found.err.startswith(f"error: {says}; give --task for both")
    assert modelopt(*pair, *DATA, "--task", "segment").code == 0


def test_the_drop_is_held_against_its_limit_and_likeness_against_its_own(there: Path, modelopt: Run) -> None:
    assert modelopt("quantize", "net.pth", *HOW, *DATA, "--task", "segment", "-o", "q.safetensors").code == 0
    pair = ["eval", "net.pth", "q.safetensors", *HOW, *DATA, "--task", "segment"]
    kept = modelopt(*pair, "--max-drop", "50", "--min-snr", "5", "--min-cosine", "0.5", "--json")
    assert kept.code == 0, kept.err
    names = [(gate["name"], gate["passed"]) for gate in json.loads(kept.out)["gates"]]
    assert names == [("max-drop", True), ("min-snr", True), ("min-cosine", True)]
    missed = modelopt(*pair, "--min-snr", "150")
    assert missed.code == 1
    assert "dB is below the limit of 150 dB" in missed.err
    without_labels = modelopt("eval", "net.pth", "q.safetensors", *HOW, "--min-snr", "5", "--json")
    assert without_labels.code == 0
    assert json.loads(without_labels.out)["models"][0]["samples"] is None


def test_a_metric_of_one_s_own_is_not_run_because_a_file_says_so(there: Path, modelopt: Run) -> None:
    words = ["--task", "net.py:right", "--data", "net.py:pictures"]
    made = modelopt("quantize", "net.pth", *HOW, *words, "-o", "q.safetensors", "--json")
    assert made.code == 0, made.err
    evaluation = json.loads(made.out)["evaluation"]
    assert 0 < evaluation["models"][0]["metrics"]["right"] < 1
    assert evaluation["task"] == "net.py:right (--task given)"
    later = modelopt("eval", "q.safetensors", "--data", "net.py:pictures", "--latency-runs", "0", "-q")
    assert later.code == 2
    assert "label is " in later.err
    assert "--task" in later.err


def test_an_output_can_be_named(there: Path, modelopt: Run) -> None:
    words = ["--task", "segment", "--output-name", "out"]
    refused = modelopt("eval", "net.pth", *HOW, *DATA, *words)
    assert refused.code == 2
    assert "--output-name: the network has no output 'out'" in refused.err


BAD: dict[str, tuple[Any, Any, str]] = {
    "mask of another size": (
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 4, 8).long(),
        "masks.npz row 0: mask is 4x8, the image 8x8",
    ),
    "unknown class": (
        torch.zeros(2, 3, 8, 8),
        torch.full((2, 8, 8), 7),
        "masks.npz row 0: mask holds class 7, which is not among the network's 4",
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
@pytest.mark.parametrize("command", ["eval", "quantize"])
def test_targets_that_do_not_fit_end_in_one_line(case: Any, command: str, there: Path, modelopt: Run) -> None:
    x, y, message = case
    save(there / "masks.npz", x, y)
    output = [] if command == "eval" else ["-o", "q.safetensors", "--calibration", "synthetic:3x8x8"]
    found = modelopt(command, "net.pth", *HOW, *DATA, "--task", "segment", *output)
    assert found.code == 2
    assert message in found.err
    assert found.err.strip().count("\n") == 0
    assert not (there / "q.safetensors").exists()


OWN = """
import torch
from torch import nn

def samples():
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [(a, a.mean((1, 2))[: 2 + (i == 2)]) for i, a in enumerate(x)]

def three():
    return [(a, torch.ones(3)) for a, _ in samples()]

def two():
    return [(a, torch.ones(2)) for a, _ in samples()]

class Numbers(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

class Changing(Numbers):
    calls = 0
    def forward(self, x):
        y = super().forward(x)
        self.calls += 1
        return {"logits": y} if self.calls % 2 else (y, y)

def short(outputs, targets): return outputs[:-1, 0]
def undefined(outputs, targets): return torch.tensor([1.0] * (len(outputs) - 1) + [torch.nan])
def words(outputs, targets): return "good"
def fails(outputs, targets): raise KeyError("logits")
def learned(outputs, targets): return outputs[:, 0]
learned.loss = short
"""
WRONG = {
    "short": (
        "Numbers",
        "own.py:short",
        "two",
        "own.py:short: returned (3,) for 4 samples where one number for",
    ),
    "NaN": (
        "Numbers",
        "own.py:undefined",
        "two",
        "own.py:two sample 3: own.py:undefined returned NaN for this",
    ),
    "words": ("Numbers", "own.py:words", "two", "own.py:words: returned str for 4 samples"),
    "fails": ("Numbers", "own.py:fails", "two", "own.py:fails: failed: KeyError: 'logits'"),
    "shapes": (
        "Numbers",
        "regress",
        "samples",
        "own.py:samples sample 2: target has shape (3,), where others have (2,)",
    ),
    "structure": (
        "Changing",
        "regress",
        "two",
        "own.pth: returned logits after 0 and 1; have it return the same",
    ),
}


@pytest.fixture
def own(there: Path) -> Path:
    """A folder with metrics, data and networks that are wrong."""
    (there / "own.py").write_text(OWN)
    torch.save({"0.weight": torch.ones(2, 3, 1, 1), "0.bias": torch.zeros(2)}, there / "own.pth")
    return there


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_metrics_targets_and_outputs_that_are_wrong_end_in_one_line(
    case: Any, own: Path, modelopt: Run
) -> None:
    network, task, data, message = case
    words = ("--arch", f"own.py:{network}", "--input-shape", "3x8x8", "--data", f"own.py:{data}")
    found = modelopt("eval", "own.pth", *words, "--task", task, "--data-batch-size", "4", *HOW[-3:])
    assert found.code == 2
    assert message in found.err
    assert found.err.strip().count("\n") == 0


LEARNED_WRONG = {
    "numbers": ("regress", "three", "sample 3: target has 3 numbers, the network returns 2"),
    "loss": ("own.py:learned", "two", "own.py:learned.loss: returned (3,) where a loss is one number"),
}


@pytest.mark.parametrize("case", LEARNED_WRONG.values(), ids=LEARNED_WRONG)
def test_targets_and_losses_that_nothing_can_be_learned_from(case: Any, own: Path, modelopt: Run) -> None:
    task, data, message = case
    words = (
        "--arch",
        "own.py:Numbers",
        "--input-shape",
        "3x8x8",
        "--train",
        f"own.py:{data}",
        "--task",
        task,
    )
    found = modelopt("train", *words, "--epochs", "1", "--batch-size", "4", "-o", "t.safetensors", "-q")
    assert found.code == 2
    assert message in found.err
    assert found.err.strip().count("\n") == 0
    assert not (own / "t.safetensors").exists()


def test_a_task_that_there_is_not_is_refused_before_anything_is_opened(there: Path, modelopt: Run) -> None:
    found = modelopt("eval", "net.pth", "--task", "segmnt")
    assert found.code == 2
    assert "there is no task 'segmnt'; did you mean 'segment'" in found.err


BAD_TASKS = {
    "option": ("segment?ignored=0", "segment has no option 'ignored'; did you mean 'ignore'"),
    "number": ("segment?ignore=x", "segment: ignore is 'x', not an integer"),
    "loss": ("regress?loss=hubr", "regress: there is no loss 'hubr'; did you mean 'huber'"),
    "no choice": ("segment?loss=l1", "segment has no option 'loss'"),
    "nothing": ("segment?", "'segment?' has nothing after its ?"),
}


@pytest.mark.parametrize("case", BAD_TASKS.values(), ids=BAD_TASKS)
def test_options_that_a_task_does_not_have_are_refused(case: Any, there: Path, modelopt: Run) -> None:
    task, message = case
    found = modelopt("eval", "net.pth", "--task", task)
    assert found.code == 2
    assert message in found.err
    assert found.err.strip().count("\n") == 0


def test_frames_and_samples_that_are_equally_many_are_told_apart(there: Path, modelopt: Run) -> None:
    (there / "line.py").write_text(
        "from torch import nn\n"
        "class Line(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv1d(4, 4, 1)\n"
        "    def forward(self, x):\n"
        "        return self.conv(x).permute(2, 0, 1)\n"
    )
    weights = {"conv.weight": 9 * torch.eye(4)[:, :, None], "conv.bias": torch.zeros(4)}
    torch.save(weights, there / "line.pth")
    ids = torch.tensor([[1, 2, 3], [3, 2, 1], [2, 1, 2]])
    x = nn.functional.one_hot(ids, 4).float().transpose(1, 2)
    save(there / "lines.npz", x, ids)
    words = ["--arch", "line.py:Line", "--data", "npz:lines.npz", "--latency-runs", "0", "--json", "-q"]
    found = modelopt("eval", "line.pth", *words, "--task", "sequence")
    assert found.code == 0, found.err
    assert json.loads(found.out)["models"][0]["metrics"] == {"cer": 0.0}
    wrong = modelopt("eval", "line.pth", *words, "--task", "sequence?batch_first=true")
    assert json.loads(wrong.out)["models"][0]["metrics"]["cer"] > 0


def test_a_target_too_long_to_be_learned_is_named_by_its_sample(there: Path, modelopt: Run) -> None:
    (there / "long.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Line(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv1d(4, 4, 1)\n"
        "    def forward(self, x):\n"
        "        return self.conv(x).transpose(1, 2)\n"
        "def load():\n"
        "    ids = [torch.ones(1 + 4 * (i == 5), dtype=torch.int64) for i in range(8)]\n"
        "    return [(torch.rand(4, 6), each) for each in ids]\n"
    )
    torch.save({"conv.weight": torch.eye(4)[:, :, None], "conv.bias": torch.zeros(4)}, there / "long.pth")
    words = ["--arch", "long.py:Line", "--train", "long.py:load", "--task", "sequence", "--epochs", "1"]
    found = modelopt("train", "long.pth", *words, "--no-eval", "-q", "-o", "trained.safetensors")
    assert found.code == 2
    assert "long.py:load sample 5: target of 5 symbols needs 9 frames, the network gives 6" in found.err


def test_boxes_without_the_library_say_what_to_install(
    there: Path, modelopt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    (there / "boxes.py").write_text(
        "import torch\n"
        "def load():\n"
        "    box = {'boxes': torch.tensor([[1., 1, 4, 4]]), 'labels': torch.tensor([1])}\n"
        "    return [(torch.zeros(3, 8, 8), box)] * 2\n"
    )
    found = modelopt("eval", "net.pth", *HOW, "--data", "boxes.py:load", "--task", "detect")
    assert found.code == 3
    assert "pip install 'modelopt-cli[detect]'" in found.err


def test_a_segmentation_network_is_trained_from_random_weights(there: Path, modelopt: Run) -> None:
    words = ["--train", "npz:masks.npz", "--val-fraction", "0.25", "--epochs", "2", "--batch-size", "8"]
    made = modelopt("train", *HOW, *words, *DATA, "--task", "segment", "-o", "t.safetensors", "--json")
    assert made.code == 0, made.err
    metrics = [json.loads(line) for line in (there / "t.run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2]
    assert all(0 <= line["val_miou"] <= 100 for line in metrics)
    later = modelopt("eval", "t.safetensors", *DATA, "--latency-runs", "0", "-q", "--json")
    assert json.loads(later.out)["task"] == "segment (recorded)"


def test_a_pruned_network_recovers_by_the_loss_of_its_task(there: Path, modelopt: Run) -> None:
    words = ["--train", "npz:masks.npz", "--epochs", "1", "--batch-size", "8", "--sparsity", "0.25"]
    made = modelopt("prune", "net.pth", *HOW, *words, "--task", "segment", "-o", "p.safetensors", *DATA)
    assert made.code == 0, made.err
    shared = modelopt(
        *("share", "net.pth", *HOW, "--task", "segment", "-o", "s.safetensors", "--bits", "4", *DATA),
        *("--train", "npz:masks.npz", "--epochs", "1", "--batch-size", "8"),
    )
    assert shared.code == 0, shared.err
