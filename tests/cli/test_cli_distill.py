"""``modelopt distill``: who may learn from whom, what is written and printed, and what goes wrong."""

import json
import shutil

import pytest
import torch

import modelopt_cli
from modelopt_cli.artifact import read_program

TRAIN = ["--train", "digits?split=train", "--lr", "0.05"]
QUICK = ["--latency-runs", "0", "--data", "digits", *TRAIN, "--epochs", "2"]
OUT = ["-o", "out.safetensors"]
HOW = ["--arch", "net.py:make", "--input-size", "8", "--channels", "1"]
RESNET = "builtin:resnet8?width=0.25"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two trained networks for 1x8x8 images, and their int8 and pruned forms."""
    from modelopt_cli.cli.main import main

    folder = tmp_path_factory.mktemp("teachers")
    small = [
        "--train",
        "digits?split=train",
        "--input-size",
        "8",
        "--epochs",
        "4",
        "--lr",
        "0.05",
        "--no-eval",
        "-q",
    ]
    arch = "builtin:resnet8?in_channels=1&width=0.5"
    for name, seed in (("one", "0"), ("two", "1")):
        path = str(folder / f"{name}.safetensors")
        assert main(["train", "--arch", arch, *small, "--seed", seed, "-o", path]) == 0
    one = str(folder / "one.safetensors")
    for name, argv in {
        "int8": ["quantize", one, "--data", "digits"],
        "pruned": ["prune", one, "--structure", "unstructured", "--sparsity", "0.8"],
        "shared": ["share", one, "--bits", "3"],
    }.items():
        assert main([*argv, "--no-eval", "-q", "-o", str(folder / f"{name}.safetensors")]) == 0
    return folder


@pytest.fixture
def here(teachers, good_files, enter):
    """A copy of those and of the good files as the current directory."""
    folder = enter(good_files)
    for path in teachers.glob("*.safetensors"):
        shutil.copy(path, folder)
    return folder


def parameters(path) -> int:
    return sum(p.numel() for p in modelopt_cli.load(path).parameters())


@pytest.mark.slow
def test_a_student_of_another_architecture_learns_and_is_compared(here, modelopt):
    outcome = modelopt("distill", "one.safetensors", "--student", RESNET, *QUICK, *OUT)
    assert outcome.code == 0, outcome.err
    assert "one.safetensors" in outcome.out
    assert "learned ce:0.1+kd:0.9, 2 epochs, 24 steps" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("wrote out.safetensors (")
    # One channel and ten classes are the teacher's.
    student = modelopt_cli.load("out.safetensors")
    assert student(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert student.history[-1]["method"] == "distill"
    assert [path.name for path in (here / "out.run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_a_student_without_a_teacher_is_compared_and_not_judged(here, modelopt):
    outcome = modelopt(
        *("distill", "one.safetensors", "--student", RESNET, *QUICK, *OUT, "--val-fraction", "0.2"),
        *("--compare-scratch", "--finetune-epochs", "1", "--json", "-q"),
        *("--min-ratio", "1.5", "--max-drop", "0.01"),
    )
    assert outcome.code == 1
    assert "max-drop" in outcome.err
    assert "scratch" not in outcome.err
    found = json.loads(outcome.out)
    assert found["output"]["path"] == "out.safetensors"
    assert found["scratch"]["path"] == "out-scratch.safetensors"
    assert found["distillation"]["finetuned"]["epochs"] == 1
    names = [model["path"] for model in found["evaluation"]["models"]]
    assert names == ["one.safetensors", "out-scratch.safetensors", "out.safetensors"]
    scratch = modelopt_cli.load("out-scratch.safetensors").history[-1]
    assert (scratch["method"], scratch["epochs"]) == ("train", 3)  # as long as both parts together


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes(here, modelopt):
    digests = []
    for name in ("a", "b"):
        argv = [
            "distill",
            "one.safetensors",
            "--student",
            RESNET,
            *TRAIN,
            "--epochs",
            "1",
            "--no-eval",
            "--json",
        ]
        digests.append(json.loads(modelopt(*argv, "-q", "-o", f"{name}.safetensors").out)["output"]["sha256"])
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "teacher", "smaller"),
    [
        pytest.param("width:0.5", "one.safetensors", True, id="width"),
        pytest.param("same", "one.safetensors", False, id="same"),
        pytest.param("two.safetensors", "one.safetensors", False, id="file"),
        pytest.param("pruned.safetensors", "one.safetensors", False, id="pruned"),
        pytest.param(RESNET, "int8.safetensors", True, id="int8 teacher"),
    ],
)
def test_students_and_teachers_of_all_kinds(student, teacher, smaller, here, modelopt):
    outcome = modelopt("distill", teacher, "--student", student, *TRAIN, "--epochs", "1", "--no-eval", *OUT)
    assert outcome.code == 0, outcome.err
    assert (parameters("out.safetensors") < parameters("one.safetensors")) is smaller
    if student == "pruned.safetensors":
        before, after = (modelopt_cli.load(f).state_dict() for f in ("pruned.safetensors", "out.safetensors"))
        weight = "layer3.0.conv1.weight"
        assert torch.equal(before[weight] == 0, after[weight] == 0)


def test_a_student_with_half_the_channels_starts_from_the_teacher_s_weights(here, modelopt):
    """One step with a rate of nearly 0 changes nothing: the channels are those of the teacher."""
    argv = ["--student", "width:0.5", "--train", "digits?split=train", "--epochs", "1", "--lr", "1e-12"]
    assert modelopt("distill", "one.safetensors", *argv, "--no-eval", *OUT).code == 0
    student = modelopt_cli.load("out.safetensors").state_dict()["conv1.weight"]
    teacher = modelopt_cli.load("one.safetensors").state_dict()["conv1.weight"]
    distances = (student[:, None] - teacher[None]).abs().amax((2, 3, 4))
    assert (distances.amin(1) < 1e-6).all()


def test_another_teacher_counts_as_much_as_its_weight_says(here, modelopt):
    argv = ["--also", "two.safetensors=0.5", "--student", RESNET, *TRAIN, "--epochs", "1", "--no-eval"]
    assert modelopt("distill", "one.safetensors", *argv, *OUT).code == 0
    entry = modelopt_cli.load("out.safetensors").history[-1]
    assert [(t["name"], t["weight"]) for t in entry["teachers"]] == [
        ("one.safetensors", 1.0), ("two.safetensors", 0.5)
    ]  # fmt: skip
    assert len(set(entry["teacher_sha256"])) == 2


def test_without_a_graph_a_student_learns_all_the_same(here, modelopt):
    (here / "odd.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)\n\n"
        "    def forward(self, x):\n"
        "        y = self.a(x).mean((2, 3))\n"
        "        return self.b(y if y.sum() > 0 else -y) + 0 * sum(p.sum() for p in self.parameters())\n"
    )
    argv = ["--student", "odd.py:Odd", *TRAIN, "--epochs", "1", "--loss", "kd+hint:0.1@a=layer1", "--no-eval"]
    outcome = modelopt("distill", "one.safetensors", *argv, *OUT)
    assert outcome.code == 0, outcome.err
    assert "hint:0.1@a=layer1 compared a=layer1.0.relu" in outcome.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param([], "--student: say what is to learn", id="no student"),
        pytest.param(["--student", "width:2"], "--student: '2' is no fraction between 0 and 1", id="width"),
        pytest.param(["--student", "nothing.safetensors"], "nothing.safetensors: no such file", id="no file"),
        pytest.param(
            ["--student", "builtin:resnet8?num_classes=7"],
            "one.safetensors: has 10 classes, the student 7; give the student as many",
            id="classes",
        ),
        pytest.param(
            ["--student", "shared.safetensors"], "codebook values, which training would", id="shared"
        ),
        pytest.param(
            ["--student", RESNET, "--loss", "kdd"], "--loss: unknown loss 'kdd'; did you mean", id="loss"
        ),
        pytest.param(
            ["--student", RESNET, "--loss", "hint@layer9"],
            "--loss: 'layer9' matches no layer of the student; the nearest is",
            id="layer",
        ),
        pytest.param(
            ["--student", RESNET, "--also", "two.safetensors=-1"], "is not FILE or FILE=W", id="weight"
        ),
        pytest.param(
            ["--student", RESNET, "--student-arch", "net.py:make"],
            "--student-arch: has no meaning",
            id="arch",
        ),
        pytest.param(
            ["--student", RESNET, "--val", "digits"], "--val: is what the result is judged on", id="val"
        ),
        pytest.param(
            ["--student", RESNET, "--lr", "1e9"], "the loss is not a finite number at step", id="nan"
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(argv, message, here, modelopt):
    before = {path.name for path in here.iterdir()}
    outcome = modelopt("distill", "one.safetensors", *QUICK, *argv, *OUT)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert {path.name for path in here.iterdir()} <= before


@pytest.mark.slow
def test_images_of_another_size_are_resized_only_where_asked(here, modelopt):
    """The student takes 12x12 images, the teacher 8x8."""
    argv = ["train", "--arch", "builtin:resnet8?in_channels=1&width=0.25", "--input-size", "12", *TRAIN]
    assert modelopt(*argv, "--epochs", "1", "--no-eval", "-o", "twelve.safetensors").code == 0
    argv = [
        "distill",
        "one.safetensors",
        "--student",
        "twelve.safetensors",
        *TRAIN,
        "--epochs",
        "1",
        "--no-eval",
    ]
    outcome = modelopt(*argv, *OUT)
    assert outcome.code == 2
    assert "one.safetensors: takes 1x8x8, the student 1x12x12; resize the images" in outcome.err
    outcome = modelopt(*argv, *OUT, "--resize-for-teacher")
    assert outcome.code == 0, outcome.err


def test_an_existing_scratch_file_is_not_replaced(here, modelopt):
    (here / "out-scratch.safetensors").write_text("mine")
    argv = ["distill", "one.safetensors", "--student", RESNET, *QUICK, *OUT, "--compare-scratch"]
    outcome = modelopt(*argv)
    assert outcome.code == 2
    assert "out-scratch.safetensors" in outcome.err
    assert (here / "out-scratch.safetensors").read_text() == "mine"


@pytest.mark.slow
def test_an_architecture_that_cannot_take_the_teachers_images_takes_its_own(here, modelopt):
    """LeNet-300 has one size, 28x28; the teacher takes 8x8."""
    argv = ["distill", "one.safetensors", "--student", "builtin:lenet300?width=0.1", *QUICK, *OUT]
    outcome = modelopt(*argv)
    assert outcome.code == 2
    assert "one.safetensors: takes 1x8x8, the student 1x28x28; resize the images" in outcome.err
    outcome = modelopt(*argv, "--resize-for-teacher", "--json")
    assert outcome.code == 0, outcome.err
    assert (
        "one.safetensors takes images of another size than the student, and is not in the table"
        in outcome.err
    )
    assert [each["path"] for each in json.loads(outcome.out)["evaluation"]["models"]] == [OUT[-1]]
    assert read_program(here / OUT[-1]).input.shape == (1, 28, 28)
    outcome = modelopt(*argv, "--resize-for-teacher", "--force", "--max-drop", "1")
    assert outcome.code == 2
    assert "no gate can compare them; measure each with eval" in outcome.err
