"""A wrong file of each kind: one line that says what and where, the right exit code, nothing written."""

import os
import pickle
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

OURS = "net-int8-weight.safetensors"
HOW = ["--arch", "net.py:make", "--input-size", "8", "--channels", "1"]
RUN = [*HOW, "--data", "digits", "--latency-runs", "0", "--limit", "64"]
RGB = ["--data", "synthetic:3x64x64"]
OUT = ["-o", "out.safetensors"]


class RunsCode:
    """Unpickling it would leave a file behind."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def workshop(good_files, tmp_path_factory):
    """Good files, and bad ones made from them."""
    folder = tmp_path_factory.mktemp("workshop") / "files"
    shutil.copytree(good_files, folder)
    spoil(folder, folder / "net-int8-weight.safetensors")
    (folder / "empty").mkdir()
    (folder / "classes" / "cat").mkdir(parents=True)
    (folder / "classes" / "cat" / "notes.txt").write_text("no image")
    return folder


def spoil(folder: Path, artifact: Path) -> None:
    whole, stored = (folder / "net.pth").read_bytes(), artifact.read_bytes()
    (folder / "text.pth").write_text("epoch 1 loss 0.3\n" * 50)
    (folder / "empty.pth").write_bytes(b"")
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    plain = (folder / "net.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(plain[:-10])
    (folder / "short.safetensors").write_bytes(plain[:5])
    (folder / "truncated-int8.safetensors").write_bytes(stored[:-10])
    flipped = bytearray(stored)
    flipped[-1] ^= 1
    (folder / "flipped-int8.safetensors").write_bytes(flipped)
    (folder / "evil.pth").write_bytes(pickle.dumps({"weight": RunsCode()}))
    torch.save({"weight": RunsCode()}, folder / "evil-zip.pth")
    torch.save([1, 2, 3], folder / "list.pth")
    torch.save({"epoch": 3}, folder / "nothing.pth")
    a, b = (b'"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}' % name for name in (b"a", b"b"))
    for name, header in (("duplicate", b"{%s,%s}" % (a, a)), ("overlap", b"{%s,%s}" % (a, b))):
        (folder / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (folder / "huge.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


@pytest.fixture
def here(workshop, enter):
    """A fresh copy of the workshop as the current directory."""
    return enter(workshop)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Case:
    name: str
    argv: list[str]
    code: int
    says: tuple[str, ...]


BAD_FILES = {
    "a text file": ("text.pth", ("text",)),
    "an empty file": ("empty.pth", ("empty",)),
    "a truncated checkpoint": ("truncated.pth", ()),
    "a truncated safetensors": ("truncated.safetensors", ()),
    "a safetensors without its header": ("short.safetensors", ()),
    "a truncated artifact": ("truncated-int8.safetensors", ()),
    "an artifact with one bit flipped": ("flipped-int8.safetensors", ()),
    "a pickle that would run code": ("evil.pth", ("system",)),
    "a zip with a pickle that would run code": ("evil-zip.pth", ("system",)),
    "a list": ("list.pth", ()),
    "a checkpoint without tensors": ("nothing.pth", ()),
    "duplicate names": ("duplicate.safetensors", ("duplicate",)),
    "overlapping tensors": ("overlap.safetensors", ()),
    "a header of 2^60 bytes": ("huge.safetensors", ()),
    "a file that is not there": ("missing.pth", ()),
    "a folder without a checkpoint": ("empty", ()),
    "a device": ("/dev/null", ()),
}

CASES = [
    *(
        Case(f"{command}: {name}", [command, file, *(RUN if command != "inspect" else [])], 2, (file, *says))
        for command in ("quantize", "eval", "inspect")
        for name, (file, says) in BAD_FILES.items()
    ),
    Case("eval: the second of two", ["eval", "net.pth", "text.pth", *RUN], 2, ("text.pth",)),
    Case(
        "wrong architecture",
        ["quantize", "net.pth", *RGB, "--arch", "torchvision:resnet18"],
        2,
        ("resnet18",),
    ),
    Case("wrong width", ["quantize", "net.pth", *RUN, "--arch", "net.py:make?width=5"], 2, ()),
    Case("wrong class count", ["quantize", "seven.pth", *RUN], 2, ("5.weight", "7", "10")),
    Case(
        "unknown network",
        ["quantize", "net.pth", *RUN, "--arch", "torchvision:resnet81"],
        2,
        ("resnet81", "resnet18"),
    ),
    Case("unknown kind of arch", ["quantize", "net.pth", *RUN, "--arch", "torchvison:resnet18"], 2, ()),
    Case("no such network file", ["quantize", "net.pth", *RUN, "--arch", "nett.py:make"], 2, ("nett.py",)),
    Case("no such function", ["quantize", "net.pth", *RUN, "--arch", "net.py:maek"], 2, ("maek",)),
    Case("folder without images", ["quantize", "net.pth", *HOW, "--data", "classes"], 2, ("classes",)),
    Case("folder that is empty", ["quantize", "net.pth", *HOW, "--data", "empty"], 2, ("empty",)),
    Case("no such folder", ["quantize", "net.pth", *HOW, "--data", "vall"], 2, ("vall",)),
    Case("no such csv", ["eval", "net.pth", *HOW, "--data", "csv:x.csv"], 2, ("x.csv",)),
    Case("unknown data", ["eval", "net.pth", *HOW, "--data", "digts"], 2, ("digts",)),
    Case("data of another shape", ["eval", "net.pth", *HOW, "--data", "synthetic:3x9x9"], 2, ()),
    Case("static int8 without data", ["quantize", "net.pth", *HOW], 2, ("--data", "int8-weight")),
    Case("a glob that matches nothing", ["quantize", "net.pth", *RUN, "--include", "conv*"], 2, ("conv*",)),
    Case("nothing left to compress", ["quantize", "net.pth", *RUN, "--exclude", "*"], 1, ()),
    Case("output is a directory", ["quantize", "net.pth", *RUN, "-o", "empty"], 2, ("empty", "directory")),
    Case("output is a device", ["quantize", "net.pth", *RUN, "-o", "/dev/null"], 2, ("/dev/null",)),
    Case("output exists", ["quantize", "net.pth", *RUN, "-o", OURS], 2, (OURS, "--force")),
    Case("output is the input", ["quantize", OURS, *RUN[len(HOW) :], "-o", OURS, "--force"], 2, (OURS,)),
    Case("output in no folder", ["quantize", "net.pth", *RUN, "-o", "no/out.safetensors"], 2, ("no",)),
    Case("export exists", ["eval", "net.pth", *RUN, "--export", "t.json"], 2, ("t.json", "--force")),
    Case("a gate without a second model", ["eval", "net.pth", *RUN, "--max-drop", "1"], 2, ()),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_line_the_right_code_and_nothing_written(case, here, modelopt):
    (here / "t.json").write_text("{}")
    before = contents(here)
    argv = case.argv if "-o" in case.argv or case.argv[0] != "quantize" else [*case.argv, *OUT]
    outcome = modelopt(*argv)
    assert (outcome.code, outcome.out) == (case.code, ""), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("error: ")
    assert all(word in outcome.err for word in case.says), outcome.err
    assert contents(here) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "command",
    [
        ["eval", "net.pth"],
        ["quantize", "net.pth", *OUT],
        ["prune", "net.pth", "--sparsity", "0.5", *OUT],
        ["prune", "net.pth", "--dry-run", "--sensitivity"],
        ["train", "net.pth", "--train", "digits?split=train", *OUT],
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_no_cuda_device_is_the_environment(command, here, modelopt):
    before = contents(here)
    outcome = modelopt(*command, *RUN, "--device", "cuda")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (3, "", 1), outcome.err
    assert "no CUDA device is available" in outcome.err
    assert contents(here) == before


@pytest.mark.parametrize(("package", "arch"), [("timm", "timm:resnet18"), ("transformers", "hf:folder")])
def test_a_missing_package_is_the_environment(package, arch, here, modelopt, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (here / "folder").mkdir()
    (here / "folder" / "config.json").write_text("{}")
    before = contents(here)
    outcome = modelopt("quantize", "net.pth", *RUN, "--arch", arch, *OUT)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (3, "", 1), outcome.err
    assert f"needs the optional package {package}" in outcome.err
    assert contents(here) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_permission_is_the_environment(here, modelopt):
    (here / "empty").chmod(0o500)
    outcome = modelopt("quantize", "net.pth", *RUN, "-o", "empty/out.safetensors")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (3, "", 1)


@pytest.mark.slow
def test_a_full_disk_is_the_environment_and_leaves_nothing(here, environ):
    """A limit on the size of files stands in for a full disk."""
    command = [
        sys.executable,
        "-m",
        "modelopt_cli",
        "quantize",
        "net.pth",
        *HOW,
        "--scheme",
        "int8-weight",
        "--no-eval",
    ]
    limited = f"ulimit -f 1; trap '' XFSZ; exec {subprocess.list2cmdline([*command, *OUT])}"
    before = contents(here)
    done = subprocess.run(
        ["bash", "-c", limited],
        cwd=here,
        env={**environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert contents(here) == before


def test_a_gate_that_is_not_met_shows_the_table_and_is_1(here, modelopt):
    outcome = modelopt("eval", "net.pth", "net-int8-weight.safetensors", *RUN, "--min-ratio", "100")
    assert outcome.code == 1
    assert "net-int8-weight" in outcome.out
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert "min-ratio" in outcome.err


BROKEN_DATA = """
import torch

class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((1, 8, 8), float("nan") if index % 2 else 0.0), index % 10

make = Broken
"""
LEARN = ["--train", "bad.py:make", "--epochs", "1"]
TRAINING = {
    "train": ["train", *HOW],
    "train, with a log for TensorBoard": ["train", *HOW, "--tensorboard", "board"],
    "prune": ["prune", "net.pth", *HOW, "--flops", "0.5"],
    "prune in rounds": ["prune", "net.pth", *HOW, "--flops", "0.5", "--schedule", "iterative"],
    "share": ["share", "net.pth", *HOW, "--bits", "4"],
    "distill": ["distill", "net.pth", *HOW, "--student", "width:0.5"],
}


@pytest.mark.parametrize("command", TRAINING.values(), ids=TRAINING)
def test_a_training_that_fails_before_anything_could_be_resumed_leaves_nothing(here, modelopt, command):
    if "--tensorboard" in command:
        pytest.importorskip("tensorboard")
    (here / "bad.py").write_text(BROKEN_DATA)
    before = contents(here)
    outcome = modelopt(*command, *LEARN, "--no-eval", *OUT)
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: bad.py:make")
    assert contents(here) == before


RECIPE = """
checkpoint: net.pth
output: out.safetensors
input-size: "8"
channels: "1"
steps:
"""
FINE = '  - prune: {arch: "net.py:make", structure: unstructured, sparsity: "0.5"}\n'
FAILS = '  - train: {arch: "net.py:make", epochs: "1", train: "bad.py:make"}\n'


@pytest.mark.parametrize("steps", [[FAILS, FINE], [FINE, FAILS]], ids=["first", "second"])
def test_a_recipe_keeps_what_is_finished_and_nothing_of_the_step_that_fails(here, modelopt, steps):
    (here / "bad.py").write_text(BROKEN_DATA)
    (here / "r.yaml").write_text(RECIPE + "".join(steps))
    before = set(contents(here))
    outcome = modelopt("run", "r.yaml")
    assert outcome.code == 2, outcome.err
    assert "error: bad.py:make" in outcome.err
    kept = {"out.steps", "out.steps/recipe.json", "out.steps/1-prune.safetensors"}
    assert set(contents(here)) - before == (kept if steps[0] == FINE else set())


WRONG = {
    "missing file": (["--data", "npz:nowhere.npz"], "nowhere.npz: no such file"),
    "missing folder": (["--data", "idx:nowhere"], "nowhere: no such folder"),
    "missing code": (["--data", "nowhere.py:load?n=3"], "nowhere.py: no such file; give FILE.py:CALLABLE"),
    "unknown option": (
        ["--data", "digits?splt=train"],
        "digits?splt=train: digits data has no option",
    ),
    "unknown kind": (["--data", "digit"], "digit: no data kind is called 'digit'; did you mean 'digits'?"),
    "missing network": (["--arch", "nowhere.py:make?n=3"], "nowhere.py: no such file; give FILE.py:CALLABLE"),
}
LINES = {
    "quantize": ["quantize", "net.pth", "-o", "out.safetensors"],
    "eval": ["eval", "net.pth"],
    "eval --dry-run": ["eval", "net.pth", "--dry-run"],
    "train": ["train", "net.pth", "--train", "digits", "--epochs", "1", "-o", "out.safetensors"],
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_there_is_said_before_torch_is_imported(name, wrong, here, modelopt, monkeypatch):
    """Importing it takes most of the time of such an error; nothing of ``api`` is called before."""
    monkeypatch.setitem(sys.modules, "modelopt_cli.api", None)
    words, says = WRONG[wrong]
    found = modelopt(*LINES[name], *words)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(f"error: {says}")


@pytest.mark.parametrize("option", ["--calibration", "--val"])
def test_the_other_data_are_looked_at_too(option, here, modelopt, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt_cli.api", None)
    found = modelopt(*LINES["train" if option == "--val" else "quantize"], option, "npz:nowhere.npz")
    assert (found.code, found.err) == (2, "error: nowhere.npz: no such file\n")
