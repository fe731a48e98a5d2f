"""inspect on pruned files: form, bytes and zeros of each parameter."""

import json
import textwrap

import torch

from modelopt_cli.artifact import write_tensors
from modelopt_cli.artifact.encodings import compact_state
from modelopt_cli.checkpoint import fresh_model
from modelopt_cli.program import Encoding


def test_pruned_tensors_show_their_form_bytes_and_zeros(tmp_path, modelopt):
    steps = torch.zeros(8, 64)
    steps[:, ::16] = 3.0
    half = torch.ones(8, 64)
    half.view(8, 16, 4)[..., :2] = 0
    state = {"a.weight": half, "b.weight": steps / 4, "c.weight": torch.ones(4, 4), "bias": torch.zeros(8)}
    scale = {
        "b.weight": Encoding(
            "affine", {"bits": 8, "axis": 0, "group": None}, {"scale": torch.full((8,), 0.25)}
        )
    }
    encodings = compact_state(state, scale, ["a.weight", "b.weight", "c.weight"])
    path = tmp_path / "net.safetensors"
    write_tensors(state, encodings, path)
    data = json.loads(modelopt("inspect", path, "--json").out)
    found = {tensor["name"]: tensor for tensor in data["tensors"]}
    assert [(found[name]["codec"], found[name]["form"]) for name in state] == [
        ("sparse", "2:4"),
        ("sparse", "1:16, affine8"),
        ("sparse", "dense"),
        ("raw", None),
    ]
    assert [found[name]["bytes"] for name in state] == [256 * 4 + 64, 32 + 16 + 8 * 4, 64, 32]
    assert [found[name]["zeros"] for name in state] == [0.5, 1 - 32 / 512, 0.0, None]
    shown = modelopt("inspect", path).out
    line = next(line for line in shown.splitlines() if line.startswith("b.weight"))
    assert line.split() == ["b.weight", "sparse", "1:16,", "affine8", "F32", "8x64", "80", "93.8", "%"]


def test_zeros_of_a_pruned_codebook_are_shown(tmp_path, modelopt):
    weight = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    params = {"entries": 3, "groups": 1, "vector": 1, "pruned": True}
    encodings = {"weight": Encoding("codebook", params, {"table": torch.tensor([[0.0, 1.0, 2.0]])})}
    write_tensors({"weight": weight}, encodings, tmp_path / "net.safetensors")
    data = json.loads(modelopt("inspect", tmp_path / "net.safetensors", "--json").out)
    assert [(each["codec"], each["zeros"]) for each in data["tensors"]] == [("codebook", 1 - 2 / 6)]


def test_history_is_told_line_by_line_and_lists_are_teachers_identity(tmp_path, modelopt):
    path = tmp_path / "net.safetensors"
    entry = {
        "method": "prune",
        "config": {"include": ["conv*", "fc"], "exclude": [], "flops": None},
        "seed": 3,
    }
    write_tensors({"weight": torch.ones(2, 2)}, {}, path, history=[entry])
    lines = [line.split(maxsplit=1) for line in modelopt("inspect", path).out.splitlines() if line]
    at = lines.index(["history", "prune"])
    assert lines[at + 1 : at + 3] == [["config", "include conv*, fc"], ["seed", "3"]]


def saved(tmp_path, spec):
    path = tmp_path / "net.pth"
    torch.save(fresh_model(spec).state, path)
    return path


def test_layers_are_listed_with_shapes_and_macs(tmp_path, modelopt):
    path = saved(tmp_path, "builtin:lenet5")
    lines = modelopt("inspect", path, "--layers").out.splitlines()
    assert lines[0].split() == ["layer", "kind", "output", "MACs"]
    by_hand = {
        "features.conv1": ["Conv2d", "20x24x24", f"{20 * 24 * 24 * 25:,}"],
        "features.pool1": ["MaxPool2d", "20x12x12"],
        "features.conv2": ["Conv2d", "50x8x8", f"{50 * 8 * 8 * 20 * 25:,}"],
        "features.pool2": ["MaxPool2d", "50x4x4"],
        "flatten": ["flatten", "800"],
        "hidden": ["Linear", "500", f"{800 * 500:,}"],
        "relu": ["relu", "500"],
        "output": ["Linear", "10", f"{500 * 10:,}"],
    }
    assert {name: rest for name, *rest in map(str.split, lines[1:])} == by_hand
    data = json.loads(modelopt("inspect", path, "--layers", "--json").out)
    assert (data["schema_version"], data["path"]) == (1, str(path))
    first = {"name": "features.conv1", "kind": "Conv2d", "shape": [20, 24, 24], "macs": 288000}
    assert data["layers"][0] == first


def test_layers_of_a_network_without_a_graph_are_its_modules(tmp_path, modelopt):
    code = """
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            x = self.body(x)
            x = x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))
            return self.head(x) + 0 * sum(p.sum() for p in self.parameters())
    """
    (tmp_path / "net.py").write_text(textwrap.dedent(code))
    path = tmp_path / "net.pth"
    conv, head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)
    state = {"body.0.weight": conv.weight, "body.0.bias": conv.bias}
    torch.save(state | {"head.weight": head.weight, "head.bias": head.bias}, path)
    how = ["--layers", "--arch", f"{tmp_path / 'net.py'}:Net", "--input-size", "8", "--channels", "3"]
    data = json.loads(modelopt("inspect", path, *how, "--json", "-q").out)
    found = [(each["name"], each["kind"], each["shape"]) for each in data["layers"]]
    assert found == [
        ("body.0", "Conv2d", [4, 6, 6]),
        ("body.1", "ReLU", [4, 6, 6]),
        ("body", "Sequential", [4, 6, 6]),
        ("head", "Linear", [5]),
    ]


def test_layers_need_a_network_and_its_options_need_layers(tmp_path, modelopt):
    outcome = modelopt("inspect", saved(tmp_path, "builtin:lenet300"), "--arch", "builtin:lenet300")
    assert (outcome.code, outcome.err) == (2, "error: --arch: has no meaning without --layers\n")
    path = tmp_path / "odd.pth"
    torch.save({"weight": torch.ones(3, 5)}, path)
    outcome = modelopt("inspect", path, "--layers")
    assert outcome.code == 2
    assert "name it with --arch" in outcome.err
    assert modelopt("inspect", path).code == 0


def test_the_input_of_a_recognised_network_is_shown_as_assumed(tmp_path, modelopt):
    spec = "torchvision:squeezenet1_1?num_classes=4"
    path = saved(tmp_path, spec)
    data = json.loads(modelopt("inspect", path, "--json").out)
    assert data["input"]["shape"] == [3, 224, 224]
    assert (data["input"]["preprocess"]["resize"], data["input"]["preprocess"]["crop"]) == (256, 224)
    assert data["input"]["preprocess"]["mean"] == [0.485, 0.456, 0.406]
    assert data["input_from"] == f"published for {spec}, assumed"
    assert f"published for {spec}, assumed" in modelopt("inspect", path).out
