"""Every wrong call of a public function is refused in one line that names the argument."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import modelopt_cli as mo
from modelopt_cli.api.signatures import WrongCall
from modelopt_cli.program.capture import capture
from modelopt_cli.settings import naming_flags

X = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 10


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(*layers).eval()


CALLS: dict[str, dict[str, Any]] = {
    "distill": {"teacher": net(), "student": "width:0.5", "train": [(X, Y)], "epochs": 1},
    "evaluate": {"models": net(), "latency_runs": 0, "data": [(X, Y)]},
    "layers": {"model": net(), "example_inputs": X},
    "load": {"path": "net.safetensors"},
    "load_network": {"path": "net.safetensors"},
    "load_state_dict": {"path": "net.safetensors"},
    "prune": {"model": net(), "flops": 0.5, "example_inputs": X, "train": [(X, Y)], "epochs": 1},
    "quantize": {"model": net(), "calibration": [X], "train": [(X, Y)], "epochs": 1},
    "run": {"recipe": "r.yaml", "output": "o.safetensors"},
    "save": {"model": capture(net(), mo.InputSpec((1, 8, 8))), "path": "x.safetensors"},
    "share": {"model": net(), "bits": 4, "example_inputs": X, "train": [(X, Y)], "epochs": 1},
    "train": {"model": net(), "train": [(X, Y)], "epochs": 1},
}
"""Good calls but for the files, which are not there: what is wrong is said before any file is opened."""

FUNCTIONS = [name for name in mo.__all__ if inspect.isfunction(getattr(mo, name))]


def parameters_of(name: str) -> list[str]:
    return list(inspect.signature(getattr(mo, name)).parameters)


WRONG = {"an object": object(), "a complex number": 3j, "an array of bytes": b"a"}


def refused(call: Callable[[], Any], kind: type[mo.ModeloptError] = mo.InputError) -> str:
    with pytest.raises(kind) as error:
        call()
    told = str(error.value)
    assert "\n" not in told
    assert "--" not in told
    return told


def test_every_function_has_a_call():
    assert sorted(CALLS) == FUNCTIONS


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_value_of_another_type_is_refused_by_its_argument(name, wrong):
    function = getattr(mo, name)
    for parameter in parameters_of(name):
        told = refused(lambda key=parameter: function(**CALLS[name] | {key: wrong}))
        assert told.startswith(f"{parameter}: "), told


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_that_a_function_does_not_take(name):
    function, keywords = getattr(mo, name), CALLS[name]
    first = parameters_of(name)[0]
    rest = {key: value for key, value in keywords.items() if key != first}
    assert refused(lambda: function(**keywords, qqqq=1), WrongCall).startswith(
        f"{name} has no argument 'qqqq'; "
    )
    assert "without a name, not 9 arguments" in refused(lambda: function(*range(9)), WrongCall)
    twice = f"{name} has been given {first} twice; leave one of them out"
    assert refused(lambda: function(keywords[first], **keywords), WrongCall) == twice
    needs = "nothing to train" if name == "train" else f"{name} needs {first}; call {name}({first}=...)"
    assert refused(lambda: function(**rest)).startswith(needs)
    assert issubclass(WrongCall, TypeError)


PATHS = {"path", "output", "recipe", "model", "models", "run_dir", "cache"}


@pytest.mark.parametrize("wrong", ["", "a\0b"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_no_file_can_be_called_is_refused(name, wrong):
    for key in PATHS.intersection(parameters_of(name)) - ({"model"} if name == "save" else set()):
        told = refused(lambda key=key: getattr(mo, name)(**CALLS[name] | {key: wrong}))
        assert told == f"{key}: {wrong!r} is no name of a file"


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "nearest": (
        lambda: mo.save(net(), "x.safetensors", forse=True),
        "save has no argument 'forse'; did you mean 'force'?",
    ),
    "option of a recipe": (
        lambda: mo.run("r.yaml", latency_runs=0),
        "run has no argument 'latency_runs'; options of the recipe stand in settings={'latency_runs': ...}",
    ),
    "module for a path": (lambda: mo.load(net()), "path: a Sequential is not a path"),
    "function for a name": (
        lambda: mo.load("net.pth", arch=net),
        "arch: a function is not a text; name it in a text, such as 'torchvision:resnet18' or 'net.py:make', "
        "or hand in the network itself",
    ),
    "none": (lambda: mo.quantize(None), "model: None is not a path, an nn.Module or a Program"),
    "module that is no Program": (
        lambda: mo.save(net(), "x.safetensors"),
        "model: a Sequential is not a Program or a Result; quantize, prune, share or load it first",
    ),
    "result of a dry run": (
        lambda: mo.save(mo.quantize(net(), calibration=[X], dry_run=True), "x.safetensors"),
        "model: has no network; of a dry run nothing is kept",
    ),
    "code": (
        lambda: mo.save(mo.quantize(net(), calibration=[X]), "x.safetensors", code="packd"),
        "code: 'packd' is not one of plain, packed, entropy; did you mean 'packed'?",
    ),
    "device": (lambda: mo.load("net.pth", device="mps"), "device: 'mps' is not cpu, cuda or cuda:N"),
    "callback": (
        lambda: mo.quantize(net(), calibration=[X], progress=lambda stage: None),
        "progress: a function is not a function of 3 arguments",
    ),
    "weight of a teacher": (
        lambda: mo.distill(**CALLS["distill"], also=[(net(), "heavy")]),
        "also: holds what is neither a model nor a pair; "
        "give models, or pairs of a model and a weight above 0",
    ),
    "teacher among others": (
        lambda: mo.distill(**CALLS["distill"], also=[3]),
        "also: 3 is not a path, an nn.Module or a Program",
    ),
    "teacher without an input": (
        lambda: mo.distill(net(), student="width:0.5"),
        "teacher: nothing says what its input is; give example_inputs, one batch: a tensor, or several in a "
        "tuple or by name",
    ),
    "model among others": (
        lambda: mo.evaluate([net(), 3], data=[(X, Y)]),
        "models: 3 is not a path, an nn.Module or a Program",
    ),
    "baseline": (
        lambda: mo.evaluate([net(), net()], data=[(X, Y)], baseline=2),
        "baseline: there is no model 2 among 2; count from 0 to 1",
    ),
    "training that is not asked for": (
        lambda: mo.prune(net(), flops=0.5, example_inputs=X, val=[(X, Y)]),
        "val: has no meaning without epochs",
    ),
    "config as a whole": (lambda: mo.quantize(net(), config=3), "config: 3 is not a QuantizeConfig"),
    "two examples": (
        lambda: mo.layers(net(), example_inputs=(X, X)),
        "example_inputs: the network cannot process inputs of shapes (12, 1, 8, 8) and (12, 1, 8, 8): "
        "Sequential.forward() takes 2 positional arguments but 3 were given; give samples such as the "
        "network takes",
    ),
    "shape said twice": (
        lambda: mo.load("net.pth", input_shape=(1, 8, 8), input_spec=mo.InputSpec((1, 8, 8))),
        "input_shape: cannot be given together with input_spec",
    ),
    "shape": (lambda: mo.InputSpec(3), "shape: 3 is not a list of integers"),
    "size": (
        lambda: mo.InputSpec((3, 0)),
        "shape: (3, 0) is no shape of a sample; give the sizes of one sample without the batch, such as "
        "(3, 224, 224)",
    ),
    "element type": (
        lambda: mo.InputSpec((3,), dtype="float16"),
        "dtype: 'float16' is not one of float32, int64, int32, uint8, bool; did you mean 'float32'?",
    ),
    "preprocessing": (lambda: mo.Preprocess(resize="a"), "resize: 'a' is not an integer or 2 integers"),
    "channels": (lambda: mo.Preprocess(channels=2), "channels: 2 is neither 1 (grey) nor 3 (RGB)"),
}


@pytest.mark.parametrize(("call", "says"), CASES.values(), ids=CASES)
def test_a_wrong_call_says_what_to_do(call, says):
    assert refused(call) == says


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({3: 4}, "settings: 3 is no name of an option"),
        ({"seed": None}, "settings: 'seed': None is not True or False, an integer, a number or a text"),
        ({"seed": []}, "settings: 'seed' has no value; leave it out"),
        ({"seed": [3, 4]}, "r.yaml: 'seed': takes one value"),
        (
            {"quantise.scheme": "int8"},
            "r.yaml: settings: no step is called 'quantise'; did you mean 'quantize'?",
        ),
        (
            {"quantize.shceme": "int8"},
            "r.yaml: step 1 (quantize): 'shceme': is no option of quantize; did you mean 'scheme'?",
        ),
    ],
)
def test_wrong_settings_of_a_recipe(settings, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mo.save(mo.share(net(), bits=4, example_inputs=X).program, "net.safetensors")
    (tmp_path / "r.yaml").write_text(
        "checkpoint: net.safetensors\noutput: o.safetensors\nsteps: [quantize]\n"
    )
    assert refused(lambda: mo.run("r.yaml", settings=settings)).startswith(says)


def test_settings_of_a_recipe_are_values_of_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mo.quantize(net(), scheme="int8-weight", example_inputs=X)
    mo.save(mo.train(net(), train=[(X, Y)], epochs=1).program, "net.safetensors")
    (tmp_path / "r.yaml").write_text(
        "checkpoint: net.safetensors\nsteps:\n  - quantize: {scheme: int8-weight}\n"
    )
    settings = {"latency_runs": np.int64(0), "quantize.include": ["0", "4"], "quantize.skip_first": True}
    mo.run("r.yaml", tmp_path / "o.safetensors", data="synthetic:1x8x8", settings=settings, seed=np.int64(3))
    config = mo.load("o.safetensors").history[-1]["config"]
    assert (config["include"], config["skip_first"]) == (["0", "4"], True)
    assert result.coverage.total == 2


@pytest.mark.slow
def test_numbers_of_numpy_and_torch_devices_and_lists_are_taken():
    plain = mo.share(net(), bits=4, input_shape=(1, 8, 8), device="cpu").program.history
    other = mo.share(
        net(), bits=np.int64(4), input_shape=[1, 8, 8], device=torch.device("cpu")
    ).program.history
    assert plain == other
    halves = [
        mo.prune(net(), flops=half, example_inputs=[X]).program.history
        for half in (0.5, torch.tensor(0.5, dtype=float))
    ]
    assert halves[0] == halves[1]


@pytest.mark.slow
def test_a_single_teacher_may_be_given_alone():
    alone, listed = (
        mo.distill(**CALLS["distill"], also=also, evaluate=False) for also in (net(), [(net(), 1)])
    )
    assert alone.entry == listed.entry
    assert len(alone.entry["teacher_sha256"]) == 2


def test_layers_of_a_module_and_of_its_program():
    program = mo.share(net(), bits=4, example_inputs=X).program
    found = [mo.layers(model, example_inputs=X) for model in (net(), program)]
    assert found[0] == found[1]
    by_name = {layer.name: layer for layer in found[0]}
    assert by_name["0"] == mo.Layer("0", "Conv2d", (4, 6, 6), 4 * 9 * 36)
    assert by_name["4"].macs == 160


def test_recorded_reasons_name_arguments_where_they_are_shown_and_flags_in_the_file(tmp_path):
    """One text for the file, whoever made it; the reader of the table sees what can be written here."""
    made = {
        "quantize": mo.quantize(net(), scheme="int8-weight", example_inputs=X, include=["0"]),
        "prune": mo.prune(net(), sparsity=0.5, structure="unstructured", example_inputs=X, exclude=["4"]),
        "share": mo.share(net(), bits=4, example_inputs=X, exclude="4"),
    }
    for verb, result in made.items():
        name = "include" if verb == "quantize" else "exclude"
        assert f"matched by {name}" in str(result)
        assert "--" not in str(result) + result._repr_html_()
        with naming_flags():
            assert f"matched by --{name}" in str(result)
        assert f"matched by --{name}" in str(result.program.history[-1]["skipped"])
        again = mo.quantize(result.program, scheme="int8-weight", example_inputs=X, dry_run=True)
        assert "--" not in str(again)
