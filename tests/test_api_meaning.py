"""Figures that mean what they seem to: classes by name, preprocessing said, labels only where needed."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import modelopt_cli
from modelopt_cli import api, artifact
from modelopt_cli.api.doubts import doubts
from modelopt_cli.api.opening import open_alone
from modelopt_cli.api.request import Request, TrainingRequest
from modelopt_cli.api.teachers import TeacherFile, require_same_names
from modelopt_cli.api.trainer import trainer
from modelopt_cli.checkpoint import open_model, resolve
from modelopt_cli.checkpoint.sources import published_top1
from modelopt_cli.data import PreprocessOverrides, open_data
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.measure import EvalOptions
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.criterion_statistics import squared_gradients
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program.capture import capture
from modelopt_cli.program.input_spec import InputSpec, Preprocess
from modelopt_cli.training import TrainConfig

QUICK = EvalOptions(runs=0, memory=False)
GREY = {"bird": 40, "cat": 120, "dog": 200, "fox": 160}
THREE = {name: GREY[name] for name in ("bird", "cat", "dog")}
INPUT = InputSpec((1, 4, 4), Preprocess(mean=(0.0,), std=(1.0,), channels=1))


def nearest_grey(path, names):
    """A network that names the class whose grey is nearest to an image's mean: ``2 v m - v^2`` is largest."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, len(names)))
    values = torch.tensor([GREY[name] / 255 for name in names])
    with torch.no_grad():
        model[1].weight.copy_((2 * values / 16)[:, None].expand(-1, 16))
        model[1].bias.copy_(-(values**2))
    artifact.write_program(capture(model.eval(), INPUT, labels=tuple(names)), path)
    return path


def folders(root, classes):
    """Two images for each class, named as it is or otherwise."""
    for name, value in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (4, 4), value + i).save(root / name / f"{i}.png")
    return str(root)


@pytest.fixture
def network(tmp_path):
    return nearest_grey(tmp_path / "net.safetensors", ["bird", "cat", "dog"])


def top1(*paths, data):
    return [model.accuracy.top1 for model in api.evaluate(paths, data=data, options=QUICK).models]


def test_a_missing_class_folder_costs_nothing(network, tmp_path):
    data = folders(tmp_path / "val", {"dog": 200, "cat": 120})
    notes = []
    found = api.evaluate([network], data=data, options=QUICK, on_note=notes.append)
    assert found.models[0].accuracy.top1 == 100.0
    assert "2 of 3 classes of the network are in the data, matched by name" in notes


def test_class_names_in_another_case_are_matched(network, tmp_path):
    data = folders(tmp_path / "val", {"cat": 120, "Dog": 200, "bird": 40})
    assert top1(network, data=data) == [100.0]


def test_a_renamed_class_folder_is_refused(network, tmp_path):
    data = folders(tmp_path / "val", {"cat": 120, "dog": 200, "jbird": 40})
    with pytest.raises(DataError, match=r"class 'jbird' is not among the network's 3.*did you mean 'bird'"):
        top1(network, data=data)


def test_files_with_the_same_classes_in_another_order_are_compared_by_name(network, tmp_path):
    other = nearest_grey(tmp_path / "other.safetensors", ["dog", "bird", "cat"])
    data = folders(tmp_path / "val", THREE)
    found = api.evaluate([network, other], data=data, options=QUICK)
    assert [model.accuracy.top1 for model in found.models] == [100.0, 100.0]
    assert found.comparisons[0].agreement == 1.0
    assert any("in another order" in note for note in found.notes)


def test_files_of_other_classes_are_not_compared(network, tmp_path):
    other = nearest_grey(tmp_path / "other.safetensors", ["bird", "dog", "fox"])
    with pytest.raises(
        DataError, match=r"other\.safetensors: does not have the classes of .*net\.safetensors"
    ):
        top1(network, other, data=folders(tmp_path / "val", {"bird": 40}))


def test_criteria_that_read_labels_take_the_networks_classes(network, tmp_path):
    program = open_model(network).program
    by_name = open_data(folders(tmp_path / "calib", {"dog": 200}), input_spec=INPUT, labels=False)
    (tmp_path / "t.csv").write_text("calib/dog/0.png,2\ncalib/dog/1.png,2\n")
    by_number = open_data(f"csv:{tmp_path / 't.csv'}", input_spec=INPUT)
    found, wanted = (squared_gradients(program, data.sample(8), Context()) for data in (by_name, by_number))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_validation_folders_are_matched_with_those_of_training(tmp_path):
    train = folders(tmp_path / "train", {"bird": 40, "cat": 120, "dog": 200})
    val = folders(tmp_path / "val", {"dog": 200})

    def asked(val):
        training = TrainingRequest(train, val)
        return Request(
            command="train", source=None, output=tmp_path / "out", training=training, options=QUICK
        )

    with trainer(asked(val), {}, INPUT) as tools:
        assert torch.cat([labels for _, labels in tools.training.val.batches(8)]).tolist() == [2, 2]
        tools.run.discard()
    other = folders(tmp_path / "other", {"dog": 200, "kat": 120, "bird": 40})
    with (
        pytest.raises(DataError, match="class 'kat'"),
        trainer(asked(other), {}, INPUT),
    ):
        pass


def test_teacher_and_student_must_have_the_same_classes_in_the_same_order(network, tmp_path):
    teacher = TeacherFile(network, open_model(network))
    other = open_model(nearest_grey(tmp_path / "other.safetensors", ["dog", "bird", "cat"]))
    assert require_same_names([teacher], open_model(network)) == ("bird", "cat", "dog")
    with pytest.raises(UsageError, match=r"the student: does not have the classes of .* in the same order"):
        require_same_names([teacher], other)


def test_accuracy_at_chance_is_said(network, tmp_path):
    (tmp_path / "t.csv").write_text(
        "".join(f"val/{name}/0.png,{(i + 1) % 3}\n" for i, name in enumerate(THREE))
    )
    data = folders(tmp_path / "val", THREE)
    found = api.evaluate([network], data=f"csv:{tmp_path / 't.csv'}", options=QUICK)
    assert any("0.00 % is no better than chance (33.33 %)" in note for note in found.notes)
    assert not any("chance" in note for note in api.evaluate([network], data=data, options=QUICK).notes)


MORE = "give more epochs, a smaller batch_size or another lr"


@pytest.mark.parametrize(
    ("entry", "length"),
    [
        ({"method": "distill", "epochs": 3, "steps": 6, "training": {"epochs": 3}}, "6 steps"),
        ({"method": "distill", "epochs": 1, "steps": 1000, "finetuned": {"steps": 234}}, "1,234 steps"),
        ({"method": "train", "epochs": 1, "steps": 1}, "1 step"),
        ({"method": "prune", "training": {"epochs": 2}}, "2 epochs"),
        ({"method": "prune", "training": {"epochs": 0}}, None),
        ({"method": "quantize"}, None),
    ],
)
def test_a_result_at_chance_says_how_long_it_was_trained(entry, length, network, tmp_path):
    program = artifact.read_program(nearest_grey(tmp_path / "flat.safetensors", THREE))
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.zero_()
    program.history = (entry,)
    artifact.write_program(program, guessing := tmp_path / "guessing.safetensors")
    data = folders(tmp_path / "val", THREE)
    trained = f"it was trained for {length}: {MORE}"
    line = f"{guessing}: top-1 of 33.33 % is no better than chance (33.33 %): "
    notes = api.evaluate([network, guessing], data=data, options=QUICK).notes
    assert [note for note in notes if "chance" in note] == ([line + trained] if length else [])
    (note,) = (note for note in api.evaluate([guessing], data=data, options=QUICK).notes if "chance" in note)
    line += "check the preprocessing, the order of the classes and the labels"
    assert note == (f"{line}; {trained}" if length else line)


def test_a_student_that_learned_too_little_to_tell_classes_apart_is_said(network, tmp_path):
    data = folders(tmp_path / "val", THREE)
    (tmp_path / "student.py").write_text(
        "from torch import nn\ndef fresh(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))\n"
    )

    def notes(student):
        outcome = api.distill(
            network,
            tmp_path / f"{len(student)}.safetensors",
            student=api.Student(student),
            data=data,
            training=TrainingRequest(data, config=TrainConfig(epochs=3, batch_size=3, lr=1e-6)),
            options=QUICK,
        )
        return [note for note in outcome.evaluation.notes if "chance" in note]

    (note,) = notes(f"{tmp_path}/student.py:fresh")
    assert note.endswith(f"is no better than chance (33.33 %): it was trained for 6 steps: {MORE}")
    assert notes(str(network)) == []


USER = """import torch
class Samples(list):
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        return {item}
def load(): return Samples(range(16))
"""


@pytest.mark.parametrize(
    "item",
    [
        "torch.rand(1, 4, 4, generator=g)",
        "(torch.rand(1, 4, 4, generator=g), 0.25)",
        "(torch.rand(1, 4, 4, generator=g), torch.rand(7))",
        "(torch.rand(1, 4, 4, generator=g), {'boxes': 3})",
    ],
    ids=["tensor", "float", "vector", "map"],
)
def test_calibration_needs_no_labels(network, tmp_path, item):
    (tmp_path / "u.py").write_text(USER.replace("{item}", item))
    results = []
    for name, spec in (("a", f"{tmp_path / 'u.py'}:load"), ("b", f"npz:{tmp_path / 'x.npz'}")):
        images = torch.stack(
            [torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(16)]
        )
        np.savez(tmp_path / "x.npz", x=images.numpy(), y=np.zeros(16, int))
        output = tmp_path / f"{name}.safetensors"
        modelopt_cli.quantize(
            network, output, calibration=spec, config=QuantizeConfig(scheme="int8"), evaluate=False
        )
        results.append(artifact.read_program(output).state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.fixture(scope="module")
def recognised(tmp_path_factory):
    path = tmp_path_factory.mktemp("shuffle") / "net.pth"
    torch.manual_seed(0)
    torch.save(resolve("torchvision:shufflenet_v2_x0_5?num_classes=10").build().state_dict(), path)
    return path


def test_preprocessing_that_is_assumed_is_said(recognised):
    notes = []
    open_alone(recognised, None, on_note=notes.append)
    spec = "torchvision:shufflenet_v2_x0_5?num_classes=10"
    line = "input 3x224x224, resize 256 bilinear, crop 224, mean 0.485,0.456,0.406, std 0.229,0.224,0.225"
    assert f"{line} (published for {spec}, assumed)" in notes
    assert any(note.startswith("its 10 classes are not the 1000 it was published with") for note in notes)


@pytest.mark.slow
def test_preprocessing_that_is_given_holds_for_data_and_network_and_is_said(recognised, tmp_path):
    data = folders(tmp_path / "val", {"a": 1, "b": 2})
    given = PreprocessOverrides(input_size=64, resize=64)
    found = api.evaluate([recognised], data=data, preprocessing=given, options=QUICK)
    assert found.input.startswith("3x64x64, resize 64 bilinear, crop 64, mean 0.485")
    assert "input_size, resize given, the rest published for torchvision:shufflenet" in found.input
    assert open_alone(recognised, None, None, given).program.input.shape == (3, 64, 64)
    assert found.models[0].macs.total < 5e6  # 41 M at 224 pixels


@pytest.mark.slow
def test_what_was_assumed_is_recorded_as_assumed(recognised, tmp_path):
    output = tmp_path / "out.safetensors"
    modelopt_cli.quantize(recognised, output, config=QuantizeConfig(scheme="int8-dynamic"), evaluate=False)
    spec = "torchvision:shufflenet_v2_x0_5?num_classes=10"
    assert artifact.read_program(output).history[-1]["preprocessing"] == f"published for {spec}"
    found = api.evaluate([output], options=QUICK)
    assert found.input.endswith(f"(recorded, where it was assumed as published for {spec})")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_the_assumed_input_transform_is_said(name):
    (note,) = resolve(f"torchvision:{name}").assumed
    assert "transform_input=true is assumed" in note
    assert f"'torchvision:{name}?transform_input=false'" in note
    assert resolve(f"torchvision:{name}?transform_input=false").assumed == ()


def test_accuracy_far_below_what_was_published_is_said(recognised, network, tmp_path):
    assert published_top1("torchvision:resnet18") == 69.758
    found = api.evaluate([network], data=folders(tmp_path / "val", {"bird": 40}), options=QUICK)
    opened = open_model(recognised)
    model = found.models[0]
    right = {"samples": 1000, "metrics": {"top1": 40.0}, "classes": 1000}
    accuracy = type(model.accuracy)(**right)
    report = type(found)((type(model)(model.path, model.size, accuracy=accuracy),), 0, (), found.environment)
    spec = resolve("torchvision:resnet18")
    line = doubts(report, open_data("digits"), [type(opened)({}, False, "", architecture=spec)])
    assert line == [
        f"{network}: top-1 of 40.00 % is far below the 69.76 % published for torchvision:resnet18: "
        "check input_size, resize, crop, mean, std and the order of the classes"
    ]


@pytest.mark.slow
def test_a_teachers_input_is_what_was_given(tmp_path):
    torch.manual_seed(0)
    teacher = tmp_path / "teacher.pth"
    torch.save(resolve("builtin:resnet8?in_channels=1&width=0.5").build().state_dict(), teacher)
    outcome = api.distill(
        teacher,
        tmp_path / "out.safetensors",
        student=api.Student("width:0.5"),
        training=TrainingRequest("digits?split=test", config=TrainConfig(batch_size=4)),
        preprocessing=PreprocessOverrides(input_size=16, mean=(0.5,), std=(0.25,)),
        options=QUICK,
        evaluate=False,
        dry_run=True,
    )
    at_16 = open_model(teacher, input_spec=InputSpec((1, 16, 16)))
    macs = (
        api.evaluate([teacher], preprocessing=PreprocessOverrides(input_size=16), options=QUICK)
        .models[0]
        .macs
    )
    assert at_16.program.input.shape == (1, 16, 16)
    assert outcome.plan.networks[0].flops == macs.flops


def test_a_criterion_that_reads_labels_may_not_choose_by_what_judges(network, tmp_path):
    data = folders(tmp_path / "val", THREE)
    config = PruneConfig(structure="unstructured", criterion="taylor", sparsity=0.5)
    with pytest.raises(UsageError, match="taylor reads the labels of the samples that the result"):
        modelopt_cli.prune(network, tmp_path / "out.safetensors", config=config, data=data, options=QUICK)
    other = folders(tmp_path / "calib", THREE)
    modelopt_cli.prune(
        network, tmp_path / "out.safetensors", config=config, data=data, calibration=other, options=QUICK
    )


def test_a_budget_of_accuracy_may_not_be_chosen_by_what_judges(network, tmp_path):
    config = ShareConfig(bits="auto", max_drop=1.0)
    data = folders(tmp_path / "val", THREE)
    with pytest.raises(UsageError, match="max_drop is measured on the samples that the result"):
        modelopt_cli.share(network, tmp_path / "out.safetensors", config=config, data=data, options=QUICK)


@pytest.mark.slow
def test_calibration_on_what_judges_is_said_in_the_table(network, tmp_path):
    data, other = folders(tmp_path / "val", THREE), folders(tmp_path / "calib", THREE)
    for calibration, said in ((None, True), (data, True), (other, False)):
        found = modelopt_cli.quantize(
            network,
            tmp_path / f"{said}{calibration is None}.safetensors",
            data=data,
            calibration=calibration,
            options=QUICK,
        )
        assert any("is judged on the same samples" in note for note in found.evaluation.notes) == said


def test_what_is_trained_on_folders_is_judged_by_their_names(tmp_path):
    not_named_as_weights = nearest_grey(tmp_path / "net.safetensors", ["bird", "cat", "dog"])
    program = artifact.read_program(not_named_as_weights)
    program.labels = None
    artifact.write_program(program, not_named_as_weights, force=True)
    train, data = folders(tmp_path / "train", THREE), folders(tmp_path / "val", {"dog": 200})
    outcome = modelopt_cli.prune(
        not_named_as_weights,
        tmp_path / "out.safetensors",
        config=PruneConfig(structure="unstructured", sparsity=0.05),
        training=TrainingRequest(train, config=TrainConfig(epochs=1, lr=1e-6)),
        data=data,
        options=QUICK,
    )
    assert artifact.read_program(tmp_path / "out.safetensors").labels == ("bird", "cat", "dog")
    assert outcome.evaluation.models[0].accuracy.top1 == 100.0


@pytest.mark.parametrize(("outputs", "said"), [(10, True), (3, False)])
def test_a_network_of_another_number_of_outputs_is_said_before_training(tmp_path, outputs, said):
    data, notes = folders(tmp_path / "train", THREE), []
    api.train(
        None,
        tmp_path / "out.safetensors",
        training=TrainingRequest(train=data, config=TrainConfig(epochs=1, lr=0.01, augment="none")),
        arch=f"builtin:lenet300?num_classes={outputs}",
        evaluate=False,
        dry_run=True,
        on_note=notes.append,
    )
    assert said == any("has 3 classes, the network to be trained has 10 outputs" in note for note in notes)
