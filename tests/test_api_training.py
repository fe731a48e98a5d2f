"""train and prune from end to end through the Python API, on the bundled digits."""

import hashlib
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import modelopt_cli
from modelopt_cli import api
from modelopt_cli.api import TrainingRequest
from modelopt_cli.api import training as training_verb
from modelopt_cli.checkpoint import resolve
from modelopt_cli.data import PreprocessOverrides, open_data
from modelopt_cli.errors import ArtifactError, EnvironmentFailure, InputError, UsageError
from modelopt_cli.measure import EvalOptions, Gates
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.flops import count_macs
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.training import TrainConfig
from modelopt_cli.training.split import hold_out

ARCH = "builtin:resnet8?in_channels=1&width=0.5"
SMALL = PreprocessOverrides(input_size=16)
QUICK = EvalOptions(runs=0, memory=False, threads=1)
DIGITS = TrainingRequest("digits?split=train", config=TrainConfig(epochs=4, val_fraction=0.1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained network and what became known on the way."""
    path, stages, notes = tmp_path_factory.mktemp("trained") / "base.safetensors", [], []
    before = torch.get_num_threads()
    outcome = modelopt_cli.train(
        None,
        path,
        training=DIGITS,
        arch=ARCH,
        data="digits",
        preprocessing=SMALL,
        options=QUICK,
        on_note=notes.append,
        progress=lambda *stage: stages.append(stage),
    )
    assert torch.get_num_threads() == before
    return path, outcome, stages, notes


@pytest.mark.slow
def test_a_network_from_scratch(trained):
    path, outcome, stages, notes = trained
    assert notes == []
    assert ("train", 44, 44) in stages
    assert outcome.written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (model,) = outcome.evaluation.models
    assert model.accuracy.top1 > 60
    program = modelopt_cli.load(path)
    assert program.input.shape == (1, 16, 16)
    assert program.arch == ARCH
    (entry,) = program.history
    assert (entry["epochs"], entry["steps"], entry["best_epoch"]) == (4, 44, outcome.trained.best_epoch)
    held_out = open_data("digits?split=train", input_spec=program.input)
    images, labels = next(hold_out(held_out, 0.1)[1].batches(1000))
    with torch.inference_mode():
        found = 100 * (program(images).argmax(1) == labels).double().mean().item()
    assert found == pytest.approx(outcome.trained.best)
    assert entry["best"] == pytest.approx(found, abs=1e-4)


@pytest.mark.slow
def test_random_weights_are_those_of_the_seed_and_leave_the_generator_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    still = TrainingRequest("digits?split=train", config=TrainConfig(epochs=1, lr=1e-30, weight_decay=0))
    weights = []
    for seed in (1, 1, 2):
        path = tmp_path / f"{len(weights)}.safetensors"
        options = replace(QUICK, seed=seed)
        api.train(None, path, training=still, arch=ARCH, preprocessing=SMALL, options=options, evaluate=False)
        weights.append(modelopt_cli.load(path).state_dict()["conv1.weight"])
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.manual_seed(1)
    assert torch.allclose(weights[0], resolve(ARCH).build().conv1.weight, atol=1e-6)


@pytest.mark.slow
def test_channels_to_half_of_the_arithmetic_with_tuning(trained, tmp_path):
    source, output, stages = trained[0], tmp_path / "pruned.safetensors", []
    outcome = modelopt_cli.prune(
        source,
        output,
        config=PruneConfig(flops=0.5, round_to=1),
        training=replace(DIGITS, config=TrainConfig(epochs=1, teacher="self")),
        data="digits",
        options=QUICK,
        gates=Gates(min_ratio=1.2, min_coverage=1.0),
        progress=lambda *stage: stages.append(stage),
    )
    assert {"tune-1", "accuracy"} <= {stage for stage, *_ in stages}
    base, result = outcome.evaluation.models
    assert (base.path, result.path) == (str(source), str(output))
    assert result.macs.total / base.macs.total == pytest.approx(outcome.target.reached)
    assert abs(outcome.target.reached - 0.5) <= 0.01
    assert all(gate.passed for gate in outcome.evaluation.gates)
    program, before = modelopt_cli.load(output), modelopt_cli.load(source)
    for layer in outcome.layers:
        assert layer.shape_left == tuple(program.get_submodule(layer.name).weight.shape)
        assert layer.shape == tuple(before.get_submodule(layer.name).weight.shape)
        assert layer.kept == program.get_submodule(layer.name).weight.numel()
    assert coverage(program).fraction == 1.0
    assert [entry["method"] for entry in program.history] == ["train", "prune"]
    assert program.labels == before.labels
    assert count_macs(program, program.input).total == result.macs.total


@pytest.mark.slow
def test_a_plan_is_made_without_training_or_writing(trained, tmp_path):
    outcome = api.prune(
        trained[0],
        tmp_path / "pruned.safetensors",
        config=PruneConfig(params=0.5, schedule="iterative"),
        training=DIGITS,
        options=QUICK,
        dry_run=True,
    )
    assert outcome.written is outcome.evaluation is None
    assert outcome.target.reached == pytest.approx(0.5, abs=0.01)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_nothing_is_left_of_a_target_that_cannot_be_reached(trained, tmp_path):
    with pytest.raises(modelopt_cli.errors.GateNotMet):
        api.prune(
            trained[0],
            tmp_path / "pruned.safetensors",
            config=PruneConfig(flops=0.05, include=("layer1*",)),
            training=DIGITS,
            options=QUICK,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected"),
    [(KeyboardInterrupt, True), (EnvironmentFailure("full"), True), (UsageError("diverged"), False)],
    ids=["interrupted", "out of space", "diverged"],
)
def test_an_error_says_how_to_go_on_if_that_would_help(error, expected, tmp_path, monkeypatch):
    path = tmp_path / "out.safetensors"
    fit = training_verb.fit

    def failing(*args, **options):
        fit(*args, **options)
        raise error

    monkeypatch.setattr(training_verb, "fit", failing)
    request = replace(DIGITS, config=TrainConfig(epochs=1))
    with pytest.raises(type(error) if isinstance(error, Exception) else error) as caught:
        api.train(None, path, training=request, arch=ARCH, preprocessing=SMALL, options=QUICK, evaluate=False)
    said = getattr(caught.value, "__notes__", [])
    assert said == (
        [f"go on with the same command and resume=True ({tmp_path / 'out.run'})"] if expected else []
    )
    assert (tmp_path / "out.run" / "state.safetensors").exists() is expected


@pytest.mark.slow
def test_the_test_data_may_not_choose(trained, tmp_path):
    request = TrainingRequest("digits?split=train", val="digits")
    for verb, options in ((api.train, {}), (api.prune, {"config": PruneConfig(flops=0.5)})):
        with pytest.raises(UsageError, match="judged on"):
            verb(trained[0], tmp_path / "out.safetensors", training=request, data="digits", **options)


@pytest.mark.slow
def test_sensitivities_of_every_group(trained):
    parts = api.sensitivity(
        api.Request(
            command="prune",
            source=trained[0],
            output="unused",
            config=PruneConfig(),
            calibration="digits",
            options=QUICK,
        )
    )
    assert "layer3.0.conv1" in {part.name for part in parts}
    for part in parts:
        sparsities = [point.sparsity for point in part.points]
        assert sparsities == sorted(sparsities)
        assert all(point.divergence >= 0 and 0 <= point.agreement <= 1 for point in part.points)


def test_a_teacher_is_for_pruning(tmp_path):
    request = replace(DIGITS, config=TrainConfig(teacher="self"))
    with pytest.raises(InputError, match=r"^teacher: "):
        api.train(None, tmp_path / "out.safetensors", training=request, arch=ARCH)


def test_a_run_keeps_its_state_from_other_data_and_preprocessing(tmp_path, monkeypatch):
    path = tmp_path / "out.safetensors"
    np.savez(tmp_path / "d.npz", x=np.zeros((40, 8, 8, 1), np.uint8), y=np.arange(40) % 4)
    request = replace(DIGITS, train=f"npz:{tmp_path / 'd.npz'}", config=TrainConfig(epochs=2, batch_size=8))
    how = {"arch": ARCH, "preprocessing": SMALL, "options": QUICK, "evaluate": False}
    fit = training_verb.fit

    def stopped(*args, **options):
        fit(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_verb, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            api.train(None, path, training=request, **how)
    state = tmp_path / "out.run" / "state.safetensors"
    before = state.read_bytes()
    again = replace(request, resume=True)
    other = replace(SMALL, mean=(0.3,), std=(0.2,))
    with pytest.raises(UsageError, match=r"begun otherwise: input.preprocess.mean \(\[0.0\], now \[0.3\]\)"):
        api.train(None, path, training=again, **{**how, "preprocessing": other})
    np.savez(tmp_path / "d.npz", x=np.zeros((20, 8, 8, 1), np.uint8), y=np.arange(20) % 4)
    with pytest.raises(ArtifactError, match="another one, of 10 steps, not 6") as caught:
        api.train(None, path, training=again, **how)
    assert not hasattr(caught.value, "__notes__")
    assert state.read_bytes() == before


@pytest.mark.parametrize(
    ("source", "output", "refused"),
    [
        ("base.pth", "x.run", True),
        ("base.pth", "r/stage-1.safetensors", True),
        ("r/state.safetensors", "x.safetensors", True),
        ("r/a.pth", "r/x.safetensors", False),
        ("stage-1.safetensors", "state.safetensors", False),
    ],
)
def test_a_run_and_the_files_beside_it_keep_apart(source, output, refused, tmp_path):
    request = replace(DIGITS, run=None if output == "x.run" else tmp_path / "r")
    expected = pytest.raises(UsageError, match=r"that the run in .* uses itself; give the run another folder")
    with expected if refused else nullcontext():
        request.require_apart(tmp_path / output, [tmp_path / source])


DETECTOR = """
import torch
from torch import nn

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(1, 8, 3, padding=1)
        self.classes, self.boxes = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, images, targets=None):
        seen = self.features(images).relu().amax((2, 3))
        logits, boxes = self.classes(seen)[:, None], self.boxes(seen).sigmoid()[:, None]
        if targets is None:
            return {"logits": logits, "pred_boxes": boxes}
        labels = torch.cat([target["labels"] for target in targets])
        return {"classes": nn.functional.cross_entropy(logits[:, 0], labels)}

def squares():
    images = torch.rand(32, 1, 8, 8) * (torch.arange(32) % 2 + 1).view(-1, 1, 1, 1)
    box = torch.tensor([[1.0, 1.0, 6.0, 6.0]])
    return [(image, {"boxes": box, "labels": torch.tensor([i % 2])}) for i, image in enumerate(images)]
"""


def test_a_detector_that_can_be_traced_learns_by_its_own_losses(tmp_path):
    (tmp_path / "net.py").write_text(DETECTOR)
    arch, data, path = (
        f"{tmp_path}/net.py:Detector",
        f"{tmp_path}/net.py:squares",
        tmp_path / "net.safetensors",
    )
    options = {"task": "detect", "train": data, "epochs": 20, "lr": 0.05, "evaluate": False}
    result = modelopt_cli.train(None, path, arch=arch, **options)
    assert result.trained.loss < 0.65  # guessing which of two classes it is has 0.69
    int8 = modelopt_cli.quantize(path, arch=arch, calibration=data, evaluate=False).program
    found = int8(torch.ones(2, 1, 8, 8))
    assert {name: tuple(output.shape) for name, output in found.items()} == {
        "logits": (2, 1, 4),
        "pred_boxes": (2, 1, 4),
    }
    modelopt_cli.save(modelopt_cli.load(path, arch=arch), tmp_path / "graph.safetensors")
    with pytest.raises(InputError, match="holds a graph, which computes no losses of its own"):
        modelopt_cli.train(tmp_path / "graph.safetensors", **options)
