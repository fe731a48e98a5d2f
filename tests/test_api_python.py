"""The functions of the package on modules, Programs, tensors, datasets, loaders and iterators."""

import copy
import inspect
import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import modelopt_cli as mo
from modelopt_cli.artifact import reader
from modelopt_cli.checkpoint import resolve
from modelopt_cli.data import open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.measure.config import EvalOptions, Gates
from modelopt_cli.methods.method_table import METHODS
from modelopt_cli.program import InputSpec, Preprocess
from modelopt_cli.program.capture import capture
from modelopt_cli.settings import fields_of

X = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 10
SHAPE = InputSpec((1, 8, 8))


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))


class Branching(nn.Module):
    """A network that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1) if x.sum() > 0 else -x.flatten(1)
        return self.fc(x) + 0 * sum(p.sum() for p in self.parameters())


MAKE = {
    "float": lambda net: capture(net, SHAPE),
    "int8": lambda net: mo.quantize(net, calibration=[X]).program,
    "int8-dynamic": lambda net: mo.quantize(net, scheme="int8-dynamic", example_inputs=X).program,
    "pruned": lambda net: mo.prune(net, flops=0.5, example_inputs=X).program,
    "shared": lambda net: mo.share(net, bits=4, example_inputs=X).program,
}


def through_torch_save(program):
    file = io.BytesIO()
    torch.save(program, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_file(program, folder):
    mo.save(program, folder / "again.safetensors")
    return mo.load(folder / "again.safetensors")


COPIES = {
    "copied": lambda program, folder: copy.copy(program),
    "deep-copied": lambda program, folder: copy.deepcopy(program),
    "pickled": lambda program, folder: pickle.loads(pickle.dumps(program)),  # noqa: S301 -- our own
    "through torch.save": lambda program, folder: through_torch_save(program),
    "moved": lambda program, folder: program.to("cpu"),
    "saved": through_a_file,
}


@pytest.mark.parametrize("kind", MAKE)
def test_a_program_is_an_ordinary_module(kind, net, tmp_path):
    program = MAKE[kind](net.eval())
    with torch.no_grad():
        expected = program(X)
        for what, change in COPIES.items():
            assert torch.equal(change(program, tmp_path)(X), expected), what
        batches = [program(images) for images, _ in DataLoader(TensorDataset(X, Y), batch_size=4)]
    close = 0.01 if kind == "int8-dynamic" else 1e-6  # whose scales are those of the batch
    torch.testing.assert_close(torch.cat(batches), expected, rtol=1e-5, atol=close)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MAKE)
def test_a_program_is_compiled_and_exported_or_says_why_not(kind, net):
    program = MAKE[kind](net.eval())
    with torch.no_grad():
        expected = program(X)
        compiled = torch.compile(program, backend="eager")
        torch.testing.assert_close(compiled(X), expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    if kind == "int8-dynamic":
        with pytest.raises(mo.CaptureError, match=r"torch\.export cannot follow"):
            torch.export.export(program, (X,))
        return
    exported = torch.export.export(program, (X,)).module()
    torch.testing.assert_close(exported(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_module_that_is_given_stays_as_it_was(training, net):
    net.train(training)
    net[1].eval()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    mo.quantize(net, calibration=[X])
    mo.prune(net, flops=0.5, example_inputs=X, train=[(X, Y)], epochs=1)
    mo.train(net, train=[(X, Y)], epochs=1)
    mo.evaluate(net, data=[(X, Y)], latency_runs=0)
    after = net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [module.training for module in net.modules()] == modes


def test_a_program_that_is_given_stays_as_it_was(net):
    program = MAKE["float"](net.eval())
    expected, before = program(X), copy.deepcopy(program.state_dict())
    results = [mo.quantize(program, calibration=[X]), mo.train(program, train=[(X, Y)], epochs=1)]
    assert program.history == ()
    assert torch.equal(program(X), expected)
    assert all(torch.equal(program.state_dict()[name], tensor) for name, tensor in before.items())
    assert [result.program.history[-1]["method"] for result in results] == ["quantize", "train"]
    assert not torch.equal(results[1].program(X), expected)


def test_int8_of_a_module_is_that_of_its_file(net, tmp_path):
    """Independent of how the network is given, the integers are the same."""
    mo.save(MAKE["float"](net.eval()), tmp_path / "net.safetensors")
    by_path = mo.quantize(tmp_path / "net.safetensors", calibration=[X]).program.state_dict()
    by_module = mo.quantize(net, calibration=[X]).program.state_dict()
    assert by_path.keys() == by_module.keys()
    assert all(torch.equal(tensor, by_module[name]) for name, tensor in by_path.items())


class Samples(Dataset):
    def __init__(self, form):
        self.form = form

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return self.form(X[index], int(Y[index]))


class Flow(IterableDataset):
    def __iter__(self):
        return iter([(x, int(y)) for x, y in zip(X, Y, strict=True)])


def stacked(samples):
    return {
        "pixel_values": torch.stack([x for x, _ in samples]),
        "labels": torch.tensor([y for _, y in samples]),
    }


PAIRS = TensorDataset(X, Y)
FORMS = {
    "a tensor": X,
    "an array": X.numpy(),
    "a pair": (X, Y),
    "a list of tensors": [X[:5], X[5:]],
    "a list of pairs": [(X[:5], Y[:5]), (X[5:], Y[5:])],
    "a list of mappings": [{"x": X[:5], "y": Y[:5]}, {"x": X[5:], "y": Y[5:]}],
    "a dataset": PAIRS,
    "a dataset of tensors": Samples(lambda x, y: x),
    "a dataset of mappings": Samples(lambda x, y: {"image": x, "label": y}),
    "an iterable dataset": Flow(),
    "a loader": DataLoader(PAIRS, batch_size=5),
    "a loader that shuffles": DataLoader(PAIRS, batch_size=5, shuffle=True),
    "a loader of mappings": DataLoader(list(zip(X, Y.tolist(), strict=True)), 5, collate_fn=stacked),
    "a loader of an iterable dataset": DataLoader(Flow(), batch_size=5),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_data_are_the_same_samples(form):
    data = open_data(as_samples(FORMS[form], "data"))
    images = torch.cat([images for images, _ in data.batches(4)])
    assert torch.equal(images, X)
    assert data.labelled == (
        form not in ("a tensor", "an array", "a list of tensors", "a dataset of tensors")
    )
    if data.labelled:
        assert torch.equal(torch.cat([labels for _, labels in data.batches(4)]), Y)


def test_an_iterator_gives_as_many_samples_as_are_wanted(net):
    taken = []

    def batches():
        for i in range(100):
            taken.append(i)
            yield torch.rand(4, 1, 8, 8)

    result = mo.quantize(net.eval(), calibration=batches(), calibration_samples=10)
    assert taken == [0, 1, 2]
    assert result.program.history[-1]["calibration"] == "calibration"


def test_an_iterator_that_never_ends_is_evaluated_on_as_far_as_the_limit(net):
    taken, said = [], []

    def batches():
        while True:
            taken.append(0)
            yield torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)

    how = {"example_inputs": X, "latency_runs": 0, "on_note": said.append}
    evaluation = mo.evaluate(net.eval(), data=batches(), limit=10, **how)
    assert evaluation.models[0].accuracy.samples == 10
    assert len(taken) == 3
    assert not any("no length" in line for line in said)
    mo.evaluate(net.eval(), data=Flow(), **how)
    assert sum("data has no length" in line and "limit ends it" in line for line in said) == 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (3, "calibration: is of type int"),
        ([], "calibration: holds no samples"),
        (iter([]), "calibration: holds no samples"),
        (["a", "b"], "calibration: holds a batch of type str"),
        ([torch.tensor(1.0)], r"calibration: holds a tensor of shape \(\)"),
        ([(X, Y[:3])], "calibration: holds a batch of 12 samples and 3 labels"),
        ([{"photo": "x.png"}], "calibration: is a mapping without tensors"),
        (
            [torch.zeros(2, 1, 8, 8, dtype=torch.uint8)],
            r"calibration sample 0: is torch\.uint8, not",
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_one_line(data, says, net):
    with pytest.raises(mo.DataError, match=says) as error:
        mo.quantize(net.eval(), calibration=data, example_inputs=X)
    assert "\n" not in str(error.value)
    assert "--" not in str(error.value)


def test_the_input_of_a_module_is_that_of_the_example_or_of_the_data(net):
    assert mo.quantize(net.eval(), calibration=[X]).program.input.shape == (1, 8, 8)
    assert mo.prune(net, flops=0.5, example_inputs=(X,)).program.input.shape == (1, 8, 8)
    assert mo.share(net, bits=4, input_shape=(1, 8, 8)).program.input.shape == (1, 8, 8)
    digits = replace(open_data("digits").input, free=(1, 2))  # which follows from the network
    assert mo.quantize(net, calibration="digits").program.input == digits
    with pytest.raises(mo.ArchitectureError, match="give example_inputs"):
        mo.prune(net, flops=0.5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda net: mo.quantize(net, shceme="int8"), "no argument 'shceme'; did you mean 'scheme'"),
        (lambda net: mo.quantize(3), "model: 3 is not a path, an nn.Module or a Program"),
        (lambda net: mo.quantize(net, scheme="int9", example_inputs=X), "scheme: 'int9' is not one of"),
        (lambda net: mo.quantize(net, example_inputs=X), "give data, or use scheme int8-dynamic"),
        (lambda net: mo.prune(net, flops=2.0, example_inputs=X), "flops: must be above 0"),
        (
            lambda net: mo.prune(net, flops=0.5, example_inputs=X, epochs=1),
            "epochs: there is nothing to train",
        ),
        (lambda net: mo.quantize(net, calibration=[X], max_drop=1.0), "max_drop: needs labelled data"),
        (lambda net: mo.quantize(net, [X], calibration=[X]), "output"),
        (
            lambda net: mo.save(net, "x.safetensors"),
            "model: a Sequential is not a Program or a Result; quantize",
        ),
        (lambda net: mo.evaluate([net, net], data=[(X, Y)], min_speedup=1.0, latency_runs=0), "latency_runs"),
    ],
)
def test_errors_name_arguments(call, says, net):
    with pytest.raises((mo.UsageError, TypeError)) as error:
        call(net.eval())
    assert says in str(error.value)
    assert "--" not in str(error.value)


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError):
        mo.prune("net.pth", sparsty=0.5)


@pytest.mark.parametrize("verb", METHODS)
def test_signatures_show_the_fields_of_the_configs(verb):
    function = getattr(mo, verb)
    parameters = inspect.signature(function).parameters
    for config in (METHODS[verb].config, EvalOptions, Gates):
        for field in fields_of(config):
            name = field.flag.removeprefix("--").replace("-", "_")
            assert name in parameters
            assert f"    {name}: " in function.__doc__
    own = {
        field.flag.removeprefix("--").replace("-", "_"): field for field in fields_of(METHODS[verb].config)
    }
    assert all(parameters[name].default == field.initial for name, field in own.items())
    assert "--" not in function.__doc__


def test_a_result_shows_itself(net):
    result = mo.quantize(net.eval(), calibration=[X], data=[(X, Y)], latency_runs=0, max_drop=-200)
    lines = str(result).splitlines()
    assert "top-1" in str(result)
    assert lines[0].split() == ["Sequential"]
    assert result._repr_html_().startswith("<pre>")
    assert "/tmp" not in str(result) + str(result.as_dict())
    assert result.as_dict()["evaluation"]["models"][1]["path"] == "quantize"
    assert not result.passed
    planned = mo.quantize(net, calibration=[X], dry_run=True)
    assert planned.program is None
    assert planned.predicted_bytes == mo.quantize(net, calibration=[X]).predicted_bytes


def test_evaluation_of_paths_modules_and_programs(net, tmp_path):
    int8 = MAKE["int8"](net.eval())
    mo.save(int8, tmp_path / "int8.safetensors")
    table = mo.evaluate([net, int8, str(tmp_path / "int8.safetensors")], data=[(X, Y)], latency_runs=0)
    with torch.no_grad():
        top1 = [100 * float((model(X).argmax(1) == Y).double().mean()) for model in (net, int8)]
    assert [model.accuracy.top1 for model in table.models] == pytest.approx([*top1, top1[1]])
    assert [model.path for model in table.models[:2]] == ["Sequential", "Program"]
    assert table.models[1].size == table.models[2].size
    one = mo.evaluate(str(tmp_path / "int8.safetensors"), latency_runs=0)
    assert len(one.models) == 1
    assert str(one).splitlines()


def test_what_cannot_be_traced_still_gets_what_needs_no_graph():
    notes = []
    result = mo.quantize(Branching(), scheme="int8-weight", example_inputs=X, on_note=notes.append)
    (note,) = [note for note in result.notes if note.startswith("works without a graph: ")]
    assert "cannot be traced: " in note
    assert "control flow depends on the values" in note
    assert note in notes
    assert note in str(result)
    assert note in result.as_dict()["notes"]
    with pytest.raises(mo.UsageError, match=r"no graph: .*values in a tensor.*load_state_dict.*mo\.save"):
        _ = result.program
    assert Branching().load_state_dict(result.state_dict())
    weight = result.state_dict()["fc.weight"]
    assert weight.shape == (10, 64)
    assert len(weight[0].unique()) <= 64


def test_saving_writes_the_bytes_that_an_output_has(net, tmp_path):
    mo.save(MAKE["float"](net.eval()), tmp_path / "net.safetensors")
    direct, later = tmp_path / "direct.safetensors", tmp_path / "later.safetensors"
    mo.share(tmp_path / "net.safetensors", direct, bits=4, evaluate=False)
    mo.save(mo.share(tmp_path / "net.safetensors", bits=4), later)
    assert direct.read_bytes() == later.read_bytes()
    with pytest.raises(mo.OutputError):
        mo.save(mo.load(later), direct)
    assert mo.save(mo.load(later), direct, force=True, code="entropy").path == direct


PREPROCESS = Preprocess(resize=10, crop=8, mean=(0.2,), std=(0.5,), channels=1)


@pytest.mark.parametrize("spec", [InputSpec((1, 8, 8), PREPROCESS), SHAPE], ids=["recorded", "by its shape"])
def test_preprocessing_is_that_of_the_data(spec, net, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (14, 11), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "val" / name / "0.png")
    program = capture(net.eval(), spec)
    expected = next(open_data(str(tmp_path / "val"), input_spec=spec).batches(1))[0]
    path = tmp_path / "val" / "a" / "0.png"
    for image in (
        path,
        str(path),
        Image.open(path),
        pixels,
        torch.from_numpy(pixels)[None],
        pixels[..., None],
    ):
        assert torch.equal(program.preprocess(image)[None], expected)
    assert torch.equal(program.preprocess([pixels, pixels]), torch.cat([expected, expected]))
    for wrong in (X[0], "nowhere.png", 3):
        with pytest.raises(mo.DataError):
            program.preprocess(wrong)


def test_a_layer_may_be_called_preprocess_too(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.preprocess = nn.Linear(4, 4)

        def forward(self, x):
            return self.preprocess(x)

    program = capture(Named(), InputSpec((4,)))
    mo.save(program, tmp_path / "a.safetensors")
    assert isinstance(mo.load(tmp_path / "a.safetensors").preprocess, nn.Linear)


def test_a_file_is_opened_once(net, tmp_path, monkeypatch):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    mo.save(MAKE["float"](net.eval()), paths[0])
    mo.save(MAKE["int8"](net), paths[1])
    headers, digests = [], []
    parse, digest = reader.parse_document, reader._check_digest
    monkeypatch.setattr(reader, "parse_document", lambda *a: headers.append(a[2]) or parse(*a))
    monkeypatch.setattr(reader, "_check_digest", lambda *a: digests.append(a[2]) or digest(*a))
    mo.load(paths[0])
    assert headers == digests == [str(paths[0])]
    headers.clear()
    digests.clear()
    mo.evaluate(paths, data=[(X, Y)], latency_runs=0)
    assert headers == digests == list(map(str, paths))
    headers.clear()
    mo.quantize(paths[0], tmp_path / "c.safetensors", calibration=[X], data=[(X, Y)], latency_runs=0)
    assert headers.count(str(paths[0])) == 1


def test_a_recipe_runs_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(resolve("builtin:lenet5?width=0.2").build().state_dict(), "net.pth")
    Path("r.yaml").write_text(
        "checkpoint: net.pth\nlatency-runs: 0\nsteps:\n  - quantize: {scheme: int8-weight}\n"
    )
    notes = []
    table = mo.run("r.yaml", "small.safetensors", on_note=notes.append)
    assert [Path(model.path).name for model in table.models] == ["net.pth", "small.safetensors"]
    assert any("step 1 of 1" in note for note in notes)
    with pytest.raises(mo.InputError):
        mo.run("r.yaml")


@pytest.mark.parametrize("scheme", ["int8", "int8-weight"])
@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (torch.rand(8, 3, 8, 8), "to have 1 channels, but got 3 channels"),
        (torch.randint(0, 5, (8, 1, 8, 8)), "Input type (long int)"),
        (torch.rand(4, 8, 8), "of shape (2, 8, 8)"),
    ],
    ids=["other channels", "integers", "no dimension of the batch"],
)
def test_samples_that_a_network_cannot_run_on_are_not_said_to_keep_it_from_being_traced(
    batch, reason, scheme, net
):
    with pytest.raises(mo.UsageError) as error:
        mo.quantize(net.eval(), calibration=[batch], scheme=scheme)
    assert str(error.value).startswith("calibration: the network cannot process an input of shape")
    assert reason in str(error.value)
    assert "traced" not in str(error.value)


def test_an_example_or_a_shape_that_a_network_cannot_run_on_is_refused(net):
    for given in ({"example_inputs": torch.rand(2, 3, 8, 8)}, {"input_shape": (3, 8, 8)}):
        with pytest.raises(mo.UsageError, match="but got 3 channels") as error:
            mo.prune(net.eval(), flops=0.5, **given)
        assert error.value.where == next(iter(given))


class Turning(nn.Module):
    """A network whose path depends on what it is given, and whose own code reads all weights."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        logits = self.net(x)
        logits = logits if logits.sum() > 0 else -logits
        return logits + 0 * sum(p.sum() for p in self.parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda model: mo.quantize(model, calibration=[X]),
        lambda model: mo.prune(model, flops=0.5, example_inputs=X),
        lambda model: mo.train(model, train=[(X, Y)], epochs=1),
        lambda model: mo.evaluate(model, data=[(X, Y)], latency_runs=0),
    ],
    ids=["quantize", "prune", "train", "evaluate"],
)
def test_an_error_for_want_of_a_graph_says_why_there_is_none(call, net):
    with pytest.raises(mo.InputError, match="control flow depends on the values in a tensor"):
        call(Turning(net.eval()))


def raising():
    yield X
    raise ValueError("bad\nnews")


BATCHLESS = Samples(lambda x, y: (x, y))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"device": "tpu"}, "device: 'tpu' is not cpu, cuda or cuda:N"),
        ({"input_shape": "large"}, "input_shape: 'large' is no shape; give"),
        ({"input_shape": (1, 8, 8), "input_size": 9}, "input_size: is a part of input_shape; give one"),
        ({"input_shape": (1, 8), "mean": (0.5,)}, "mean: is for images, which this is no shape of"),
        ({"input_shape": 5}, "input_shape: 5 is not a list of values, a text or a mapping; give"),
        ({"calibration": DataLoader(BATCHLESS, batch_size=None)}, "calibration: holds a batch with labels"),
        ({"calibration": [X.to("meta")]}, "calibration: holds a tensor on the meta device"),
        ({"calibration": [X.to_sparse()]}, "calibration: holds a tensor of layout torch.sparse_coo"),
        ({"calibration": raising()}, "calibration batch 1: cannot be read (ValueError: bad"),
        ({"calibration": Samples(lambda x, y: 1 // 0)}, "calibration sample 0: cannot be read (ZeroDivision"),
        ({"seed": 2**40}, "seed: must be at least 0 and at most 4294967295, not 1099511627776"),
        ({"include": 5}, "include: 5 is not a list of texts"),
        ({"include": [None]}, "include: holds None, which is not a text"),
        ({"device": 3}, "device: '3' is not cpu, cuda or cuda:N"),
        ({"calibration": [{"zz": X}]}, "calibration: the network has no input 'zz'; forward takes "),
        ({"calibration": [{"x": X, "zz": X}]}, "calibration: the network has no input "),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_by_its_argument(given, says, net):
    with pytest.raises(mo.InputError) as error:
        mo.quantize(net.eval(), **{"calibration": [X], **given})
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_a_text_stands_for_what_it_does_on_the_command_line(net):
    assert mo.quantize(net.eval(), calibration=[X], input_shape="1x8x8").program.input.shape == (1, 8, 8)
    made = [
        mo.prune(net, sparsity=each, structure="unstructured", include=globs, example_inputs=X)
        for each, globs in ((0.5, ["0", "6"]), ("50%", ("0", "6")))
    ]
    assert made[0].program.history == made[1].program.history
    alone = [mo.quantize(net, calibration=[X], include=each).program.history for each in ("6", ["6"])]
    assert alone[0] == alone[1]


class Averaging(nn.Module):
    """A network with a mean and a sum, whose values are watched while int8 is calibrated."""

    def __init__(self, net):
        super().__init__()
        self.net, self.first = net, nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.net(self.first(x) - torch.mean(x / 0.0, dim=(2, 3), keepdim=True))


def test_a_call_is_named_in_a_message_as_in_the_graph(net):
    with pytest.raises(mo.DataError, match="gives NaN or infinity") as error:
        mo.quantize(Averaging(net.eval()), calibration=[X], evaluate=False)
    assert error.value.where in ("layer mean", "layer truediv", "layer sub")
