"""inspect on pruned files: form, bytes and zeros of each parameter."""

import json

import torch

from modelopt_cli.artifact import write_tensors
from modelopt_cli.artifact.sparsity import compact_state
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


def test_history_is_told_line_by_line_and_lists_are_told_apart(tmp_path, modelopt):
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
