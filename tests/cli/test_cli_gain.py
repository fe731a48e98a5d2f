"""What a method gained is said as it is: of the network alone, of all layers, and where it is nothing."""

import json

import torch
from torch import nn

HOW = ["--arch", "net.py:make", "--input-size", "8", "--channels", "1"]
BARE = ["--scheme", "int8-weight", "-o", "out.safetensors"]


def write_large(name: str, size: int, **beside: object) -> dict[str, torch.Tensor]:
    """A checkpoint of two linear layers large enough for a header not to count."""
    network = nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False))
    torch.save({"state_dict": network.state_dict(), **beside}, name)
    return network.state_dict()


def test_an_optimizer_next_to_the_weights_is_no_gain(here, modelopt):
    size = 200
    moments = {i: {m: torch.zeros(size, size) for m in ("exp_avg", "exp_avg_sq")} for i in range(2)}
    states = [{"state": moments, "param_groups": []}]
    state = write_large("last.ckpt", size, optimizer_states=states, **{"pytorch-lightning_version": "2.0"})
    outcome = modelopt("quantize", "last.ckpt", *BARE, "--runs", "0", "--json")
    assert outcome.code == 0, outcome.err
    evaluation = json.loads(outcome.out)["evaluation"]
    before, after = evaluation["models"]
    tensors = sum(t.numel() * t.element_size() for t in state.values())
    stored = 2 * (size * size + 4 * size)  # a byte for each weight, a scale of four for each row
    assert (before["tensor_bytes"], after["tensor_bytes"]) == (tensors, stored)
    assert before["file_bytes"] > 3 * tensors
    assert evaluation["comparisons"][0]["ratio"] == tensors / stored
    assert 3.9 < evaluation["comparisons"][0]["ratio"] < 4
