"""What cannot be judged is known before the work begins; what fails after it says that the file is there."""

import errno
import json

import pytest
import torch
from safetensors.torch import save_file

from modelopt_cli import measure
from modelopt_cli.errors import ArchitectureError, DataError, UsageError
from modelopt_cli.measure import gates
from modelopt_cli.measure.config import Gates
from modelopt_cli.tasks import parse_task

HOW = ["--input-size", "8", "--channels", "1", "--latency-runs", "0", "-q"]
DATA = ["--data", "digits"]
TRAIN = ["--train", "digits?split=train", "--epochs", "1", "--lr", "0.01"]
OUT = ["-o", "out.safetensors"]
METHODS = {
    "quantize": ["quantize", "{}"],
    "quantize untraced": ["quantize", "{}", "--scheme", "int8-weight"],
    "prune": ["prune", "{}", "--sparsity", "0.5", "--structure", "unstructured"],
    "share": ["share", "{}", "--bits", "4"],
}
TRAINED = {
    "train": ["train", "{}", *TRAIN],
    "distill": ["distill", "{}", "--student", "net.py:make?width=3", *TRAIN],
}
MAP = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(1, 10, 3, padding=1))
"""


def line(words, checkpoint, arch):
    return [word.format(checkpoint) for word in words] + ["--arch", arch, *HOW, *OUT]


@pytest.mark.parametrize("name", METHODS)
def test_a_network_that_is_no_classifier_is_not_compressed_to_be_judged(name, here, modelopt):
    (here / "map.py").write_text(MAP)
    torch.save({"0.weight": torch.randn(10, 1, 3, 3), "0.bias": torch.zeros(10)}, here / "map.pth")
    words = line(METHODS[name], "map.pth", "map.py:make")
    found = modelopt(*words, *DATA)
    assert found.code == 2
    assert (
        "map.pth: returned (8, 10, 8, 8) for 8 samples where a classifier returns (8, classes);" in found.err
    )
    assert not (here / "out.safetensors").exists()
    calib = ["--calibration", "digits"] if name == "quantize" else []
    assert modelopt(*words, *calib).code == 0  # without data nothing has to be judged


SEGMENTS = """
import torch
from safetensors.torch import save_file

def none():
    return [(torch.rand(1, 8, 8), torch.full((8, 8), 255)) for _ in range(70)]

def last():
    return [*none(), (torch.rand(1, 8, 8), torch.zeros(8, 8, dtype=torch.int64))]
"""


@pytest.mark.parametrize("name", METHODS)
def test_a_drop_is_not_judged_on_masks_of_which_no_pixel_counts(name, here, modelopt):
    """One that counts suffices, however late it comes; without a limit a note says what is missing."""
    (here / "map.py").write_text(MAP)
    (here / "masks.py").write_text(SEGMENTS)
    bias = torch.tensor([1e3] + 9 * [0.0])  # always class 0, which the last mask is of
    torch.save({"0.weight": torch.randn(10, 1, 3, 3), "0.bias": bias}, here / "map.pth")
    words = [*line(METHODS[name], "map.pth", "map.py:make"), "--task", "segment"]
    words += ["--calibration", "synthetic:1x8x8"] if name.startswith("quantize") else []
    found = modelopt(*words, "--data", "masks.py:none", "--max-drop", "100")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert "--max-drop: cannot be judged on this data: no pixel counts" in found.err
    assert not (here / "out.safetensors").exists()
    assert modelopt(*words, "--data", "masks.py:last", "--max-drop", "100").code == 0
    told = modelopt(*[word for word in words if word != "-q"], "--force", "--data", "masks.py:none")
    assert (told.code, "mIoU not measured: no pixel counts" in told.out) == (0, True)


@pytest.mark.parametrize("name", METHODS)
def test_a_drop_is_not_judged_of_a_network_that_gets_nothing_right(name, here, modelopt):
    """From 0 nothing can be lost, so that any file would keep the limit."""
    (here / "map.py").write_text(MAP)
    (here / "masks.py").write_text(SEGMENTS)
    bias = torch.tensor([-1e3] + 9 * [0.0])  # never class 0, which all masks are of
    torch.save({"0.weight": torch.randn(10, 1, 3, 3), "0.bias": bias}, here / "map.pth")
    words = [*line(METHODS[name], "map.pth", "map.py:make"), "--task", "segment"]
    words += ["--calibration", "synthetic:1x8x8"] if name.startswith("quantize") else []
    found = modelopt(*words, "--data", "masks.py:last", "--max-drop", "1")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert "mIoU of map.pth is 0.00 %, so it has nothing to lose" in found.err
    assert not (here / "out.safetensors").exists()
    told = modelopt(*[word for word in words if word != "-q"], "--data", "masks.py:last")
    assert told.code == 0
    assert "map.pth: mIoU is 0.00 %, of which nothing can be lost: check the preprocessing" in told.out
    files = ["map.pth", "out.safetensors", "--arch", "map.py:make", *HOW, "--task", "segment"]
    judged = modelopt("eval", *files, "--data", "masks.py:last", "--max-drop", "1")
    assert (judged.code, "max-drop was not measured" in judged.err) == (1, True)


@pytest.mark.parametrize("name", [*METHODS, "train", "distill"])
def test_labels_that_the_network_does_not_have_are_found_first(name, here, modelopt):
    words = line({**METHODS, **TRAINED}[name], "seven.pth", "net.py:make?num_classes=7")
    data = ["--data", "digits", *(["--calibration", "synthetic:1x8x8"] if name == "quantize" else [])]
    if name in TRAINED:  # that what is trained on fits is another matter
        (here / "labels.py").write_text(
            "import torch\ndef few():\n    return [(torch.zeros(1, 8, 8), i % 7) for i in range(64)]\n"
        )
        words = [word.replace("digits?split=train", "labels.py:few") for word in words]
        words = [word.replace("width=3", "width=3&num_classes=7") for word in words]
    found = modelopt(*words, *data)
    assert found.code == 2
    assert "7 classes" in found.err
    assert not (here / "out.safetensors").exists()


def test_bare_tensors_are_not_written_to_be_judged_on_data(here, modelopt):
    torch.save({"mystery.weight": torch.randn(4, 5)}, here / "bare.pth")
    found = modelopt("quantize", "bare.pth", "--scheme", "int8-weight", *DATA, "-q", *OUT)
    assert (found.code, "give --arch" in found.err) == (2, True)
    assert not (here / "out.safetensors").exists()


def test_a_drop_is_not_judged_without_labels(here, modelopt):
    words = line(METHODS["share"], "net.pth", "net.py:make")
    for data in ([], ["--data", "synthetic:1x8x8"]):
        found = modelopt(*words, *data, "--max-drop", "1")
        assert (found.code, "--max-drop: needs labelled data" in found.err) == (2, True)
    assert not (here / "out.safetensors").exists()


@pytest.mark.parametrize("name", [*METHODS, "train", "distill"])
@pytest.mark.parametrize("error", [DataError, KeyboardInterrupt])
def test_an_evaluation_that_fails_says_that_the_file_is_there(error, name, here, modelopt, monkeypatch):
    real = measure.evaluate

    def fails(*args, **kwargs):
        if (here / "out.safetensors").exists():
            raise error("is gone")
        return real(*args, **kwargs)

    monkeypatch.setattr(measure, "evaluate", fails)
    found = modelopt(*line({**METHODS, **TRAINED}[name], "net.pth", "net.py:make"), *DATA)
    assert found.code == (2 if error is DataError else 130)
    assert found.err.endswith("; before that out.safetensors was written, whole\n")
    assert found.err.count("\n") == 1


def test_a_table_that_cannot_be_exported_says_so_too(here, modelopt, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "table.json")

    monkeypatch.setattr("modelopt_cli.report.export", full)
    words = line(METHODS["share"], "net.pth", "net.py:make")
    found = modelopt(*words, *DATA, "--export", "table.json")
    assert found.code == 3
    assert found.err.endswith("no space left on device; before that out.safetensors was written, whole\n")


def test_what_is_deleted_again_was_there(here, modelopt, monkeypatch):
    real = measure.evaluate
    monkeypatch.setattr(
        measure,
        "evaluate",
        lambda *a, **k: real(*a, **k) if not (here / "out.safetensors").exists() else 1 / 0,
    )
    found = modelopt(*line(METHODS["share"], "net.pth", "net.py:make"), *DATA, "--delete-on-fail")
    assert found.err.endswith(
        "before that out.safetensors was written, whole; out.safetensors was deleted again\n"
    )


def test_signal_to_noise_is_in_the_summary_the_json_and_the_history(here, modelopt):
    quiet = [word for word in line(METHODS["quantize untraced"], "net.pth", "net.py:make") if word != "-q"]
    planned = modelopt(*quiet, "--dry-run")
    (shown,) = [row for row in planned.out.splitlines() if "signal to noise" in row]
    made = modelopt(*quiet, "--no-eval")
    assert shown in made.err.splitlines()
    told = " ".join(modelopt("inspect", "out.safetensors").out.split())
    assert f"snr db {shown.split()[2]}" in told
    found = json.loads(modelopt(*quiet, "--force", "--no-eval", "--json").out)
    kept = f"outputs keep {found['snr_db']:.1f} dB of signal to noise"
    assert shown == f"{kept} on the few samples checked before writing"


def recipe(folder, *more):
    lines = ["checkpoint: net.pth", "output: out.safetensors", "arch: net.py:make", "input-size: 8"]
    lines += ["channels: 1", "latency-runs: 0", *more, "steps:", "- prune: {sparsity: 0.333}"]
    (folder / "recipe.yaml").write_text("\n".join([*lines, "- quantize: {calib: digits}"]))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("data: labels.py:many", "label 12 is not among the network's 10 classes; classes count from 0"),
        ("max-drop: 1", "--max-drop: needs labelled data"),
    ],
)
def test_a_recipe_is_rehearsed_before_its_first_step(more, says, here, modelopt):
    (here / "labels.py").write_text(
        "import torch\ndef many():\n    return [(torch.zeros(1, 8, 8), 12) for _ in range(9)]\n"
    )
    recipe(here, more)
    found = modelopt("run", "recipe.yaml")
    assert (found.code, says in found.err) == (2, True)
    assert not [*here.rglob("*prune.safetensors")]


def test_a_rehearsal_of_files_measures_nothing(here, modelopt):
    words = [*HOW, "--dry-run", *DATA]
    found = modelopt("eval", "net.pth", "net-int8-weight.safetensors", "--arch", "net.py:make", *words)
    assert (found.code, found.err) == (0, "")
    assert found.out == "all 2 files can be measured\n"
    found = modelopt("eval", "seven.pth", "--arch", "net.py:make?num_classes=7", *words)
    assert (found.code, "7 classes" in found.err) == (2, True)


def test_a_recipe_that_begins_with_training_is_rehearsed_too(here, modelopt):
    (here / "labels.py").write_text(
        "import torch\ndef many():\n    return [(torch.zeros(1, 8, 8), 12) for _ in range(9)]\n"
    )
    lines = [
        "output: out.safetensors",
        "arch: net.py:make",
        "input-size: 8",
        "channels: 1",
        "latency-runs: 0",
    ]
    lines += ["data: labels.py:many", "steps:", "- train: {train: 'digits?split=train', epochs: 1}"]
    (here / "recipe.yaml").write_text("\n".join([*lines, "- quantize: {calib: digits}"]))
    found = modelopt("run", "recipe.yaml", "-q")
    assert (found.code, "label 12 is not among the network's 10 classes" in found.err) == (2, True)
    assert not [*here.rglob("*train.safetensors")]


LABELS = "--max-drop: needs labelled data to be held against; give --data"
ARCH = "cannot be judged, nothing says its architecture; give --arch"


@pytest.fixture
def pair(here, modelopt):
    """A file that holds its network, and tensors of which nobody knows what they are of."""
    words = line(METHODS["quantize untraced"], "net.pth", "net.py:make")
    assert modelopt(*words, "--no-eval").code == 0
    torch.save({"mystery.weight": torch.randn(4, 5)}, here / "bare.pth")
    return {"whole": "out.safetensors", "bare": "bare.pth"}


@pytest.mark.parametrize(
    ("files", "gate", "says"),
    [
        ("bare whole", ["--max-drop", "1", *DATA], f"--max-drop: bare.pth: {ARCH}"),
        ("whole bare", ["--max-drop", "1", *DATA], f"--max-drop: bare.pth: {ARCH}"),
        ("bare whole", ["--min-speedup", "1"], f"--min-speedup: bare.pth: {ARCH}"),
        ("whole bare", ["--min-speedup", "1"], f"--min-speedup: bare.pth: {ARCH}"),
        ("whole whole", ["--max-drop", "1"], LABELS),
        ("whole whole", ["--max-drop", "1", "--data", "synthetic:1x8x8"], LABELS),
        (
            "whole whole",
            ["--min-speedup", "1", "--latency-runs", "5"],
            "--min-speedup: 5 runs give no 95 % interval",
        ),
        ("whole bare", ["--min-coverage", "0"], "--min-coverage: bare.pth: cannot be judged, nothing says"),
        ("whole", ["--min-ratio", "1"], "a gate needs a second model"),
    ],
)
def test_what_eval_cannot_judge_is_known_before_it_measures(files, gate, says, pair, modelopt, monkeypatch):
    monkeypatch.setattr(measure, "evaluate", lambda *a, **k: pytest.fail("something was measured"))
    paths = [pair[name] for name in files.split()]
    found = modelopt("eval", *paths, *gate, "-q")
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert says in found.err
    if len(paths) > 1:
        assert says in modelopt("eval", *paths, *gate, "-q", "--dry-run").err


@pytest.mark.parametrize("command", [["eval", "net.pth"], ["quantize", "net.pth", "-o", "new.safetensors"]])
def test_a_limit_beyond_the_range_of_the_metric_is_refused(command, here, modelopt):
    first = line(METHODS["quantize untraced"], "net.pth", "net.py:make")
    assert modelopt(*first, "--no-eval").code == 0
    files = ["out.safetensors"] if command[0] == "eval" else []
    words = [*command, *files, "--arch", "net.py:make", *HOW, *DATA]
    found = modelopt(*words, "--max-drop", "100.5")
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert "--max-drop 100.5: is more than top-1 can lose, 100 pp: every file would pass" in found.err
    assert not (here / "new.safetensors").exists()
    assert modelopt(*words, "--max-drop", "100").code == 0


def test_an_error_that_has_no_bound_has_any_limit():
    gates.require_reachable(
        Gates(max_drop=150), parse_task("sequence")
    )  # of characters more than all are wrong
    gates.require_reachable(Gates(max_drop=150), parse_task("restore"))
    with pytest.raises(UsageError, match=r"is more than Spearman can lose, 2: every file would pass"):
        gates.require_reachable(Gates(max_drop=2.5), parse_task("embed"))


def test_a_limit_on_what_is_known_is_judged(pair, modelopt):
    """Only the file that is held against a limit has to say what is compressed, or to run."""
    found = modelopt("eval", "bare.pth", "out.safetensors", "--min-coverage", "1", "--latency-runs", "0")
    assert (found.code, "min-coverage 1 keeps the limit" in found.out) == (0, True)
    files = ["out.safetensors", "out.safetensors", "bare.pth"]
    found = modelopt(
        "eval", *files, "--target-model", "out.safetensors", "--baseline", "bare.pth", "--min-ratio", "0"
    )
    assert found.code == 0


@pytest.mark.parametrize("name", ["quantize untraced", "prune", "share"])
def test_speed_is_not_judged_of_what_does_not_run(name, pair, here, modelopt):
    words = [word.format("bare.pth") for word in METHODS[name]]
    found = modelopt(*words, "--min-speedup", "1", "-q", "-o", "new.safetensors")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert f"--min-speedup: bare.pth: {ARCH}" in found.err
    assert not (here / "new.safetensors").exists()
    found = modelopt(*words, "--min-coverage", "1", "--min-ratio", "0", "-q", "-o", "new.safetensors")
    assert (found.code, found.err) == (0, "")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["max-drop: 1"], "--max-drop: needs labelled data"),
        (["max-drop: 1", "data: synthetic"], "--max-drop: needs labelled data"),
        (["max-drop: 1", "data: labels.py:none"], "--max-drop: needs labelled data"),
        (["min-speedup: 1", "latency-runs: 3"], "--min-speedup: 3 runs give no 95 % interval"),
    ],
)
def test_limits_of_a_recipe_without_a_checkpoint_are_looked_at_first(more, says, here, modelopt):
    lines = ["output: out.safetensors", "arch: net.py:make", "input-size: 8", "channels: 1", *more, "steps:"]
    lines += ["- train: {train: 'digits?split=train', epochs: 1}", "- quantize: {calib: digits}"]
    (here / "recipe.yaml").write_text("\n".join(lines))
    (here / "labels.py").write_text(
        "import torch\ndef none():\n    return [torch.zeros(1, 8, 8) for _ in range(9)]\n"
    )
    found = modelopt("run", "recipe.yaml", "-q")
    assert (found.code, says in found.err) == (2, True)
    assert not (here / "out.steps").exists()


def test_a_recipe_without_a_checkpoint_is_judged_on_labelled_data(here, modelopt):
    lines = ["output: out.safetensors", "latency-runs: 0", "max-drop: 100", "data: digits", "steps:"]
    how = "arch: net.py:make, input-size: 8, channels: 1"
    lines += [f"- train: {{train: 'digits?split=train', epochs: 1, {how}}}", "- quantize: {calib: digits}"]
    (here / "recipe.yaml").write_text("\n".join(lines))
    found = modelopt("run", "recipe.yaml", "-q")
    assert found.code == 0, found.err


NEEDS_GRAPH = {
    "quantize": (["--scheme", "int8", "--calibration", "npz:broken.npz"], "scheme int8"),
    "prune": (["--flops", "0.5", "--data", "npz:broken.npz"], "structure channels"),
    "share": (["--bits", "auto", "--ratio", "9", "--calibration", "npz:broken.npz"], "--bits auto"),
    "prune and train": (["--sparsity", "0.5", "--structure", "unstructured", *TRAIN], "fine-tuning"),
}


@pytest.mark.parametrize("name", NEEDS_GRAPH)
def test_what_takes_a_graph_is_refused_before_data_are_opened_and_says_why(name, here, modelopt, monkeypatch):
    """Also where notes are not shown, and for a folder whose configuration names what nobody can build."""
    monkeypatch.setattr("modelopt_cli.checkpoint.recognition.resolve", unknown)
    folder = here / "folder"
    folder.mkdir()
    save_file({"w": torch.randn(8, 8)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Foo"], "model_type": "foo"}))
    (here / "broken.npz").write_bytes(b"opening this would fail")
    words, needs = NEEDS_GRAPH[name]
    found = modelopt(name.split()[0], "folder", *words, "-q", *OUT)
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert f"{needs} needs a network that can be traced; hf:folder: {WHY}; or " in found.err
    assert "broken.npz" not in found.err
    assert not (here / "out.safetensors").exists()
    measured = modelopt("eval", "folder", *DATA, "--latency-runs", "0", "-q")
    assert (measured.code, measured.err) == (
        2,
        f"error: digits: no model can be run on it; hf:folder: {WHY}; give --arch\n",
    )
    shown = modelopt("eval", "folder", "--latency-runs", "0", "-q")
    assert (shown.code, f"hf:folder: {WHY} (give --arch)" in shown.out) == (0, True)


WHY = "config.json says model_type 'foo', which nobody knows"


def unknown(spec):
    raise ArchitectureError(WHY, where=spec)


def test_a_student_that_cannot_be_traced_is_refused_before_data_are_opened(here, modelopt):
    (here / "branch.py").write_text(BRANCH)
    (here / "broken.npz").write_bytes(b"opening this would fail")
    words = line(["distill", "{}", "--student", "branch.py:make"], "net.pth", "net.py:make")
    words += [*TRAIN, "--data", "npz:broken.npz"]
    for more in (["--finetune-epochs", "1"], ["--compare-scratch"]):
        found = modelopt(*words, *more)
        assert found.code == 2
        assert f"{more[0]}: needs a student that can be traced; the network cannot be traced" in found.err


BRANCH = """
import torch
from torch import nn

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 10))

    def forward(self, x):
        x = x.flatten(1)
        return x @ self.weight if float(x.sum()) > 0 else -x @ self.weight

def make():
    return Branch()
"""


CHANGING = """
import torch
from torch import nn

class Changing(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        Changing.calls += 1
        y = self.layer(x.flatten(1))
        return (y,) if Changing.calls % 2 else {"logits": y}

def make():
    return Changing()
"""


def test_outputs_without_a_common_name_are_known_before_a_limit_on_them_is_judged(here, modelopt):
    (here / "net.py").write_text(CHANGING)
    torch.save({"layer.weight": torch.randn(10, 64), "layer.bias": torch.zeros(10)}, here / "net.pth")
    words = line(["quantize", "net.pth"], "net.pth", "net.py:make")
    for gate in (["--min-snr", "1"], ["--min-cosine", "0"]):
        found = modelopt(*words, *DATA, *gate)
        assert (found.code, found.out) == (2, "")
        assert f"{gate[0]}: cannot be judged: the baseline returned " in found.err
        assert not (here / "out.safetensors").exists()
    found = modelopt(*words, *DATA)
    assert found.code == 0
    assert "signal to noise and cosine not measured: the baseline returned " in found.out
