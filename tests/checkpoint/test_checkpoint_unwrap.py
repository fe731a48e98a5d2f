"""The shapes in which training scripts leave weights."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from modelopt_cli.checkpoint import read_state
from modelopt_cli.checkpoint.unwrap import unwrap
from modelopt_cli.errors import CheckpointError

State = dict[str, torch.Tensor]


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def nested(*keys: str) -> "object":
    def wrap(state: State) -> object:
        saved: object = state
        for key in reversed(keys):
            saved = {
                "epoch": 3,
                key: saved,
                "optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": []},
            }
        return saved

    return wrap


WRAPPERS = {
    "plain": lambda s: s,
    "OrderedDict": OrderedDict,
    **{
        key: nested(key)
        for key in (
            "state_dict", "model", "model_state_dict", "net", "params", "params_ema", "ema", "weights",
            "some_name_nobody_foresaw",
        )
    },
    "model.state_dict": nested("model", "state_dict"),
    "DataParallel": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled DataParallel": lambda s: {"state_dict": prefixed(s, "module._orig_mod.")},
    "DataParallel compiled": lambda s: {"state_dict": prefixed(s, "_orig_mod.module.")},
    "averaged model": lambda s: {"model_ema": {"n_averaged": torch.tensor(7), **prefixed(s, "module.")}},
    "thop's counters": lambda s: {**s, "total_ops": torch.zeros(1), "hidden1.total_params": torch.zeros(1)},
    "scalars next to it": lambda s: {"step": 12, **s, "lr": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_weights_come_out_alone(name: str, state: State, tmp_path: Path) -> None:
    torch.save(WRAPPERS[name](state), tmp_path / "a.pth")
    found = read_state(tmp_path / "a.pth").state
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_compiled_part_loses_its_mark() -> None:
    state = unwrap({"layer1._orig_mod.conv.weight": torch.ones(1)}, "f").state
    assert list(state) == ["layer1.conv.weight"]


def test_a_layer_called_module_keeps_its_name() -> None:
    state = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert list(unwrap(state, "f").state) == list(state)


def test_plain_weights_are_preferred_and_the_averaged_ones_mentioned(state: State) -> None:
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    found = unwrap({"model_ema": averaged, "model": state}, "f")
    assert torch.equal(found.state["hidden1.bias"], state["hidden1.bias"])
    assert any("model_ema" in note for note in found.notes)


REFUSED = {
    "a tensor": (torch.ones(3), "single tensor"),
    "a list": ([torch.ones(3)], "holds a list"),
    "nothing": (None, "holds a NoneType"),
    "an empty dict": ({}, "empty dict"),
    "an optimizer": (
        {"state": {0: {"m": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "optimizer's state",
    ),
    "only scalars": ({"epoch": 3, "loss": 0.1}, "epoch, loss"),
    "two networks": ({"netA": {"w": torch.ones(1)}, "netB": {"w": torch.ones(1)}}, "several sets of weights"),
    "numbers as names": ({0: torch.ones(1)}, "no network's weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_state_dict_is_refused(name: str) -> None:
    saved, words = REFUSED[name]
    with pytest.raises(CheckpointError, match=words):
        unwrap(saved, "f")


def test_a_real_data_parallel_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    torch.save(nn.DataParallel(module).state_dict(), tmp_path / "a.pth")
    assert list(read_state(tmp_path / "a.pth").state) == list(module.state_dict())
