"""load, quantize and evaluate from end to end, on small networks and the bundled digits."""

import hashlib
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import modelopt_cli
from modelopt_cli import api, artifact
from modelopt_cli.artifact import lazy
from modelopt_cli.checkpoint import resolve
from modelopt_cli.data import PreprocessOverrides, open_data
from modelopt_cli.errors import (
    ArchitectureError,
    CaptureError,
    DataError,
    GateNotMet,
    NothingCompressed,
    OutputError,
    UsageError,
)
from modelopt_cli.measure import EvalOptions, Gates, gates
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.quantized_linear import DynamicLinear

ROOT = Path(__file__).parents[1]
QUICK = EvalOptions(runs=0, memory=False, threads=1, limit=100)
LENET = "builtin:lenet5?width=0.2"

OWN_NET = """
from torch import nn

class Scaled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.norm(self.conv1(x)).relu()
        x = (x + self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))

class Branching(Scaled):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x) + 0 * sum(p.sum() for p in self.parameters())

def make(width=8):
    return Scaled(width)

def branching(width=8):
    return Branching(width)
"""
SHAPE = PreprocessOverrides(input_size=8, channels=1)


def scheme(name, **options):
    return QuantizeConfig(scheme=name, calibration_samples=64, **options)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def lenet5(tmp_path):
    torch.manual_seed(0)
    torch.save(resolve(LENET).build().state_dict(), tmp_path / "lenet5.pth")
    return tmp_path / "lenet5.pth"


@pytest.fixture
def own(tmp_path):
    """A network in the user's own file, and a checkpoint of it."""
    (tmp_path / "own_net.py").write_text(OWN_NET)
    scope = {"__name__": "own_net"}
    exec(compile(OWN_NET, "own_net.py", "exec"), scope)  # noqa: S102 -- our own text, a few lines above
    torch.manual_seed(0)
    net = scope["make"]()
    net(torch.rand(16, 1, 8, 8))  # so that the batch norm has seen something
    torch.save(net.state_dict(), tmp_path / "own.pth")
    return tmp_path / "own.pth"


def arch(folder, function="make"):
    return f"{folder / 'own_net.py'}:{function}"


def test_a_recognised_checkpoint_is_quantized_written_and_measured(lenet5, tmp_path):
    output, notes, stages = tmp_path / "out.safetensors", [], []
    outcome = modelopt_cli.quantize(
        lenet5,
        output,
        config=scheme("int8"),
        data="digits",
        options=QUICK,
        on_note=notes.append,
        progress=lambda stage, done, total: stages.append(stage),
    )
    shape = "1x28x28, resize 28x28 bilinear, mean 0, std 1"
    assert notes == [f"recognised as {LENET}", f"input {shape} (set by {LENET})"]
    assert outcome.evaluation.input == f"{shape} (set by {LENET})"
    assert any("calibrated on digits and is judged on the same" in note for note in outcome.evaluation.notes)
    assert {"quantizing", "accuracy"} <= set(stages)
    assert outcome.coverage.fraction == 1.0
    assert outcome.predicted_bytes == outcome.written.file_bytes == output.stat().st_size
    assert outcome.written.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    source, result = outcome.evaluation.models
    assert (source.path, result.path) == (str(lenet5), str(output))
    assert (source.coverage, result.coverage) == (0.0, 1.0)
    assert result.accuracy.samples == 100
    assert outcome.evaluation.comparisons[0].agreement > 0.8
    assert result.size.file_bytes < source.size.file_bytes / 2


def test_a_loaded_program_runs_and_knows_its_history(lenet5, tmp_path):
    output = tmp_path / "out.safetensors"
    api.quantize(lenet5, output, config=scheme("int8"), data="digits", evaluate=False)
    program = modelopt_cli.load(output)
    assert isinstance(program, Program)
    (entry,) = program.history
    assert entry["method"] == "quantize"
    assert entry["calibration"] == "digits"
    assert entry["source_sha256"] == hashlib.sha256(lenet5.read_bytes()).hexdigest()
    images = torch.rand(4, *program.input.shape)
    difference = (program(images) - api.load(lenet5)(images)).abs().max()
    assert 0 < difference < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int8-dynamic", "int8-weight"])
def test_the_file_is_enough_in_a_process_that_cannot_import_the_network(name, own, tmp_path):
    output, elsewhere = tmp_path / "own-int8.safetensors", tmp_path / "elsewhere"
    elsewhere.mkdir()
    data = "digits" if name == "int8" else None
    api.quantize(
        own, output, config=scheme(name), arch=arch(tmp_path), data=data, preprocessing=SHAPE, evaluate=False
    )
    (tmp_path / "own_net.py").unlink()
    own.unlink()
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.save(images, elsewhere / "images.pt")
    script = [
        "import importlib.util, sys, torch, modelopt_cli",
        "assert importlib.util.find_spec('own_net') is None",
        "torch.set_num_threads(1)",
        "program = modelopt_cli.load(sys.argv[1])",
        "with torch.inference_mode(): logits = program(torch.load('images.pt'))",
        "torch.save(logits, 'logits.pt')",
        "assert not [name for name in sys.modules if 'own_net' in name]",
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "\n".join(script), str(output)]
    subprocess.run(command, cwd=elsewhere, env=environ, check=True, timeout=120)
    with torch.inference_mode():
        assert torch.equal(api.load(output)(images), torch.load(elsewhere / "logits.pt"))


@pytest.mark.parametrize("name", ["int8", "int8-dynamic", "int8-weight"])
def test_the_same_command_gives_the_same_bytes(name, lenet5, tmp_path):
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for file in files:
        api.quantize(lenet5, file, config=scheme(name), data="digits", evaluate=False)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_another_seed_calibrates_on_other_samples(lenet5, tmp_path):
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for seed, file in enumerate(files):
        options = EvalOptions(seed=seed)
        api.quantize(lenet5, file, config=scheme("int8"), data="digits", options=options, evaluate=False)
    images = torch.rand(4, 1, 28, 28)
    first, second = (api.load(file)(images) for file in files)
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_calibration_keeps_to_the_threads_asked_for(lenet5, tmp_path):
    seen = []
    api.quantize(
        lenet5,
        tmp_path / "out.safetensors",
        config=scheme("int8"),
        data="digits",
        options=EvalOptions(threads=2),
        evaluate=False,
        progress=lambda stage, done, total: seen.append((stage, torch.get_num_threads())),
    )
    assert set(seen) == {("quantizing", 2)}
    assert torch.get_num_threads() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8-dynamic", "int8-weight"])
def test_a_network_that_cannot_be_traced(name, own, tmp_path):
    output, notes, spec = tmp_path / "out.safetensors", [], arch(tmp_path, "branching")
    outcome = api.quantize(
        own,
        output,
        config=scheme(name),
        arch=spec,
        data="digits",
        preprocessing=SHAPE,
        options=QUICK,
        on_note=notes.append,
    )
    assert any("cannot be traced" in note for note in notes)
    compressed = [layer.name for layer in outcome.coverage.layers if layer.compressed]
    assert compressed == (["fc"] if name == "int8-dynamic" else ["conv1", "conv2", "fc"])
    assert outcome.evaluation.comparisons[0].agreement > 0.9
    network = api.load_network(output, arch=spec)
    assert not isinstance(network, Program)
    assert isinstance(network.fc, DynamicLinear if name == "int8-dynamic" else nn.Linear)
    again = api.evaluate([own, output], arch=spec, data="digits", preprocessing=SHAPE, options=QUICK)
    assert again.comparisons[0].agreement == outcome.evaluation.comparisons[0].agreement
    with pytest.raises(CaptureError):
        api.load(output, arch=spec)


def test_the_file_of_an_untraceable_network_says_which_it_was_but_never_imports_it(own, tmp_path):
    output, spec = tmp_path / "out.safetensors", arch(tmp_path, "branching")
    api.quantize(
        own,
        output,
        config=scheme("int8-weight"),
        arch=spec,
        preprocessing=SHAPE,
        data="digits",
        evaluate=False,
    )
    (tmp_path / "own_net.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ArchitectureError, match="name it with arch"):
        api.load(output)


def sharded(folder, state):
    folder.mkdir()
    names = list(state)
    homes = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for home in set(homes.values()):
        save_file({name: state[name] for name in names if homes[name] == home}, folder / home)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return folder


def test_shards_are_quantized_one_tensor_at_a_time(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    state = {f"{i}.weight": torch.randn(6, 8, generator=generator) for i in range(9)}
    state |= {"half.weight": torch.randn(5, 4, generator=generator).bfloat16(), "bias": torch.ones(3)}
    torch.save(state, tmp_path / "whole.pth")
    folder = sharded(tmp_path / "folder", state)
    alive, read, progress = [], lazy.read_tensor, []

    def counting(*arguments):
        assert not any(reference() is not None for reference in alive)
        alive.append(weakref.ref(tensor := read(*arguments)))
        return tensor

    outputs = [tmp_path / "lazy", tmp_path / "eager"]
    monkeypatch.setattr(lazy, "read_tensor", counting)
    how = {"config": scheme("int8-weight"), "evaluate": False}
    made = api.quantize(folder, outputs[0], progress=lambda *step: progress.append(step), **how)
    assert progress == [("quantizing", i + 1, 11) for i in range(11)]
    assert len(alive) == 2 * 11  # once to look for NaN
    api.quantize(tmp_path / "whole.pth", outputs[1], **how)
    found = [artifact.read_tensors(path) for path in outputs]
    assert list(found[0].state) == list(found[1].state) == list(state)
    assert all(torch.equal(found[0].state[name], tensor) for name, tensor in found[1].state.items())
    assert (made.coverage.compressed, made.coverage.total) == (10, 10)
    stored = [artifact.read_safetensors(path) for path in outputs]
    assert stored[0]["3.weight"].dtype == torch.int8
    assert all(torch.equal(stored[0][name], tensor) for name, tensor in stored[1].items())


def test_measuring_without_a_network_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    folder = sharded(tmp_path / "folder", {f"{i}.weight": torch.ones(6, 8) for i in range(9)})
    alive = []

    def counting(function):
        def call(*arguments):
            assert not any(reference() is not None for reference in alive)
            result = function(*arguments)
            alive.append(weakref.ref(result[0] if isinstance(result, tuple) else result))
            return result

        return call

    monkeypatch.setattr(lazy, "read_tensor", counting(lazy.read_tensor))
    made = api.quantize(folder, tmp_path / "out", config=scheme("int8-weight"), options=QUICK)
    before, after = (model.size for model in made.evaluation.models)
    assert before.parameters == after.parameters == before.nonzero == 9 * 48
    assert (before.bits_per_weight, after.bits_per_weight) == (32, 8 + 32 / 8)
    assert len(alive) == 3 * 9


def test_tied_weights_are_quantized_once(tmp_path):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.save({"embed.weight": weight, "head.weight": weight, "bias": torch.ones(2)}, tmp_path / "tied.pth")
    api.quantize(tmp_path / "tied.pth", tmp_path / "out", config=scheme("int8-weight"), evaluate=False)
    assert artifact.read_header(tmp_path / "out")["tied"] == {"head.weight": "embed.weight"}
    assert artifact.read_tensors(tmp_path / "out").state.keys() == {"embed.weight", "head.weight", "bias"}


def test_a_bare_state_dict_nobody_recognises(tmp_path):
    source, output, notes = tmp_path / "bare.pth", tmp_path / "out.safetensors", []
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    torch.save({"mystery.weight": weight, "mystery.bias": torch.ones(8)}, source)
    outcome = api.quantize(source, output, config=scheme("int8-weight"), options=QUICK, on_note=notes.append)
    assert any("not recognised" in note for note in notes)
    assert outcome.coverage.fraction == 1.0
    assert outcome.evaluation.comparisons[0].ratio > 0
    restored = artifact.read_tensors(output).state
    assert torch.equal(restored["mystery.bias"], torch.ones(8))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((restored["mystery.weight"] - weight).abs() <= step * 0.501).all()


@pytest.mark.parametrize(
    ("kind", "name", "ways"),
    [
        ("untraceable", "int8", "int8-dynamic or int8-weight or fp16 or bf16"),
        ("bare", "int8", "int8-weight or fp16 or bf16"),
        ("bare", "int8-dynamic", "int8-weight or fp16 or bf16"),
    ],
)
def test_a_scheme_that_needs_more_than_there_is(kind, name, ways, own, tmp_path):
    source, options = own, {"arch": arch(tmp_path, "branching"), "preprocessing": SHAPE}
    if kind == "bare":
        source, options = tmp_path / "bare.pth", {}
        torch.save({"mystery.weight": torch.randn(8, 16)}, source)
    with pytest.raises(UsageError, match=f"scheme {name} needs") as caught:
        api.quantize(source, tmp_path / "out.safetensors", config=scheme(name), data="digits", **options)
    ask = "name its network with arch, or " if kind == "bare" else ""
    assert caught.value.hint.endswith(f"{ask}use scheme {ways}")
    assert ("cannot be traced" in caught.value.hint) == (kind == "untraceable")
    assert not (tmp_path / "out.safetensors").exists()


def test_static_int8_without_data_names_both_ways_forward(lenet5, tmp_path):
    with pytest.raises(UsageError) as caught:
        api.quantize(lenet5, tmp_path / "out.safetensors")
    assert "give data" in caught.value.hint
    assert "int8-weight" in caught.value.hint
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_to_compress_is_an_error_and_writes_nothing(tmp_path):
    torch.save({"mystery.bias": torch.ones(8)}, tmp_path / "bare.pth")
    with pytest.raises(NothingCompressed):
        api.quantize(tmp_path / "bare.pth", tmp_path / "out.safetensors", config=scheme("int8-weight"))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        (Gates(min_ratio=1.5, min_coverage=1.0), True),
        (Gates(min_ratio=100.0), False),
        (Gates(max_drop=-100.0), False),
    ],
    ids=["met", "too large", "too bad"],
)
def test_gates_are_judged_and_the_file_is_there_either_way(limits, passed, lenet5, tmp_path):
    output = tmp_path / "out.safetensors"
    outcome = api.quantize(lenet5, output, config=scheme("int8"), data="digits", options=QUICK, gates=limits)
    assert output.exists()
    assert all(gate.passed for gate in outcome.evaluation.gates) is passed
    if passed:
        gates.require(outcome.evaluation)
    else:
        with pytest.raises(GateNotMet):
            gates.require(outcome.evaluation)


def test_a_gate_that_nothing_would_be_measured_for_is_refused(lenet5, tmp_path):
    output = tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="gate"):
        api.quantize(lenet5, output, config=scheme("int8-weight"), gates=Gates(min_ratio=1.0), evaluate=False)
    assert not output.exists()


def test_an_existing_file_is_replaced_only_with_force(lenet5, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_text("precious")
    with pytest.raises(OutputError):
        api.quantize(lenet5, output, config=scheme("int8-weight"), evaluate=False)
    assert output.read_text() == "precious"
    api.quantize(lenet5, output, config=scheme("int8-weight"), evaluate=False, force=True)
    assert artifact.is_artifact(output)


def test_the_source_is_never_the_output(lenet5):
    before = lenet5.read_bytes()
    with pytest.raises(OutputError):
        api.quantize(lenet5, lenet5, config=scheme("int8-weight"), force=True)
    assert lenet5.read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("program", name) for name in ("int8", "int8-dynamic", "int8-weight")),
        *(("untraceable", name) for name in ("int8-dynamic", "int8-weight")),
        ("bare", "int8-weight"),
    ],
)
def test_a_dry_run_writes_nothing_and_knows_the_size(kind, name, own, tmp_path):
    output, options = tmp_path / "out.safetensors", {"config": scheme(name), "evaluate": False}
    if kind != "bare":
        function = "make" if kind == "program" else "branching"
        options |= {"arch": arch(tmp_path, function), "preprocessing": SHAPE, "data": "digits"}
    before = sorted(tmp_path.iterdir())
    planned = api.quantize(own, output, dry_run=True, **options)
    assert planned.written is planned.evaluation is None
    assert sorted(p for p in tmp_path.iterdir() if p.name != "__pycache__") == before
    done = api.quantize(own, output, **options)
    assert planned.predicted_bytes == output.stat().st_size
    assert planned.coverage == done.coverage


def test_the_preprocessing_is_recorded_and_used_again(lenet5, tmp_path):
    output = tmp_path / "out.safetensors"
    mine = PreprocessOverrides(mean=(0.25,), std=(0.5,))
    first = api.quantize(
        lenet5, output, config=scheme("int8"), data="digits", preprocessing=mine, options=QUICK
    )
    recorded = artifact.read_program(output).input
    assert (recorded.preprocess.mean, recorded.preprocess.std) == ((0.25,), (0.5,))
    samples = open_data("digits", input_spec=recorded)
    images, _ = next(samples.batches(100))
    plain, _ = next(open_data("digits", input_spec=resolve(LENET).input, overrides=None).batches(100))
    assert not torch.equal(images, plain)
    again = api.evaluate([output], data="digits", options=QUICK)
    assert again.models[0].accuracy == first.evaluation.models[1].accuracy
    labels = next(samples.batches(100))[1]
    with torch.inference_mode():
        predicted = api.load(output)(images).argmax(1)
    expected = 100 * (predicted == labels).double().mean().item()
    assert again.models[0].accuracy.top1 == pytest.approx(expected)


def test_labels_beyond_the_network_s_classes_are_refused(tmp_path):
    torch.save(resolve("builtin:lenet5?width=0.2&num_classes=7").build().state_dict(), tmp_path / "seven.pth")
    with pytest.raises(DataError, match=r"label \d is not among the network's 7 classes"):
        api.evaluate([tmp_path / "seven.pth"], data="digits", options=EvalOptions(runs=0, memory=False))


@pytest.fixture
def three_folders(tmp_path):
    for name in ("ant", "bee", "cat"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (28, 28), 99).save(tmp_path / "images" / name / "one.png")
    return str(tmp_path / "images")


def test_folders_for_fewer_classes_than_the_network_has_are_worth_a_note(lenet5, three_folders):
    found = api.evaluate([lenet5], data=three_folders, options=QUICK)
    assert any("has 3 classes, the network has 10" in note and "'cat'" in note for note in found.notes)


def test_folders_for_every_class_are_not(three_folders, tmp_path):
    torch.save(resolve("builtin:lenet5?width=0.2&num_classes=3").build().state_dict(), tmp_path / "three.pth")
    found = api.evaluate([tmp_path / "three.pth"], data=three_folders, options=QUICK)
    assert not any("has 3 classes" in note for note in found.notes)


def test_bits_per_weight_are_those_of_the_file(lenet5, tmp_path):
    half = {name: tensor.half() for name, tensor in torch.load(lenet5).items()}
    torch.save(half, tmp_path / "half.pth")
    report = api.evaluate([lenet5, tmp_path / "half.pth"], options=QUICK)
    assert [model.size.bits_per_weight for model in report.models] == [32.0, 16.0]


def test_nothing_to_measure():
    with pytest.raises(UsageError):
        api.evaluate([])


def test_an_input_given_by_hand_wins(lenet5):
    mine = InputSpec((1, 28, 28), name="images")  # as its forward calls it
    assert api.load(lenet5, input_spec=mine).input == mine
