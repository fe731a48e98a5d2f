"""Precisions chosen for each layer: budgets are kept, and what breaks or slows a network stays in float."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_networks import chain, with_outlier_channel
from prune_cases import context, smooth
from quantize_networks import captured
from torch import nn

import modelopt_cli as mo
from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.precision import choosing_precisions
from modelopt_cli.methods.quantize.precision.precision_choice import PrecisionChoice
from modelopt_cli.methods.quantize.sensitivity import layer_times, rounding_sensitivity
from modelopt_cli.methods.quantize.sensitivity.layer_times import LayerTime
from modelopt_cli.methods.share.budget import BudgetNotMet
from modelopt_cli.program import Program

MANY = smooth(400, 3, 12, 12)


def chosen(program: Program, labelled: bool = True, code: Any = "plain", **options: Any) -> MethodResult:
    with torch.no_grad():
        labels = program(MANY).argmax(1) if labelled else None
    config = QuantizeConfig(
        precision="auto", observer="minmax", equalize="none", bias_correction="none", **options
    )
    return apply(program, config, context(MANY, labels, code=code))


def captured_with_float_second(program: Program) -> Program:
    """The int8 network with ``second`` in float32."""
    config = QuantizeConfig(observer="minmax", equalize="none", bias_correction="none", exclude=("second",))
    return apply(program, config, context(MANY)).program


def precisions(result: MethodResult) -> dict[str, str]:
    found: dict[str, str] = result.program.history[-1]["precisions"]
    return found


@pytest.mark.parametrize("labelled", [True, False], ids=["accuracy", "agreement"])
def test_the_layer_that_breaks_the_network_stays_out_of_int8(labelled: bool, tmp_path: Path) -> None:
    program = captured(with_outlier_channel(5), 3, 12, 12)
    result = chosen(program, labelled, max_drop=3.0)
    assert precisions(result) == {"first": "int8", "second": "bf16", "third": "int8", "fc": "int8"}
    assert not result.skipped
    second = result.program.get_submodule("second")
    assert isinstance(second, nn.Conv2d)
    assert torch.equal(second.weight, second.weight.bfloat16().float())
    assert "layers: 1 in bf16, 3 in int8" in result.notes[0]
    both = [copy.copy(each) for each in (result.program, captured_with_float_second(program))]
    for each in both:
        each.history = ()
    sizes = [predicted_bytes(each) for each in both]
    assert sizes[1] - sizes[0] == pytest.approx(2 * second.weight.numel(), abs=200)  # of the file's header
    mo.save(result.program, tmp_path / "mixed.safetensors")
    again, x = mo.load(tmp_path / "mixed.safetensors"), MANY[:9]
    assert torch.equal(again.get_submodule("second").weight, second.weight)
    assert (again.encodings["second.weight"].codec, again.encodings["second.weight"].params) == (
        "cast",
        {"dtype": "bfloat16"},
    )
    with torch.inference_mode():
        assert torch.equal(again(x), mo.load(tmp_path / "mixed.safetensors")(x))
        torch.testing.assert_close(again(x), result.program(x), rtol=1e-2, atol=1e-2)
    # As the samples are split, those that nothing was chosen by come first.
    with torch.no_grad():
        same = result.program(MANY[:200]).argmax(1) == program(MANY[:200]).argmax(1)
    lost, square = int((~same).sum()) / 200, 1.959964**2 / 200
    half = (lost * (1 - lost) * square + square * square / 4) ** 0.5
    upper = 100 * (lost + square / 2 + half) / (1 + square)
    assert result.target is not None
    assert result.target.reached == pytest.approx(upper, abs=0.2)
    assert result.target.reached <= 3


def test_all_layers_are_int8_where_none_breaks_anything() -> None:
    result = chosen(captured(chain(), 3, 12, 12), max_drop=5.0)
    assert set(precisions(result).values()) == {"int8"}
    assert not result.skipped


@pytest.mark.parametrize(("ratio", "in_float", "in_half"), [(1.2, 3, 1), (2.2, 0, 2)])
def test_the_file_is_small_enough_and_the_rest_is_float(ratio: float, in_float: int, in_half: int) -> None:
    program = captured(chain(), 3, 12, 12)
    result = chosen(program, min_ratio=ratio)
    assert predicted_bytes(program) / predicted_bytes(result.program) >= ratio * 0.99
    assert result.target is not None
    assert result.target.metric == "bytes"
    assert result.target.reached <= 1 / ratio
    found = list(precisions(result).values())
    assert (found.count("float32"), found.count("bf16")) == (in_float, in_half)


def test_a_file_that_cannot_be_so_small_is_refused() -> None:
    with pytest.raises(BudgetNotMet, match=r"times smaller; 4 was asked for, .* the most that was") as alone:
        chosen(captured(chain(), 3, 12, 12), min_ratio=4.0)
    assert "; take fewer weight_bits or ask for a smaller min_ratio" in str(alone.value)
    with pytest.raises(BudgetNotMet, match=r"allow a larger max_drop or take fewer weight_bits or ask for a"):
        chosen(captured(chain(), 3, 12, 12), min_ratio=4.0, max_drop=10.0)


def test_fewer_bits_make_a_smaller_file_within_the_same_drop() -> None:
    program = captured(chain(), 3, 12, 12)
    wide = chosen(program, max_drop=10.0)
    narrow = chosen(program, max_drop=10.0, weight_bits=3, code="packed")
    sizes = [predicted_bytes(each.program, code="packed") for each in (wide, narrow)]
    assert sizes[1] < sizes[0]
    assert narrow.target is not None
    assert narrow.target.reached <= 10
    assert any(precision.startswith("W") for precision in precisions(narrow).values())


def _timed(monkeypatch: pytest.MonkeyPatch, in_float: float, mixed: float, whole: float = 9.0) -> None:
    """Times in which ``third`` alone is slower in int8, and those of networks: float, mixed, all int8."""
    times = {
        name: LayerTime(1.0, 2.0 if name == "third" else 0.5, {"bfloat16": 1.0})
        for name in ("first", "second", "third", "fc")
    }
    monkeypatch.setattr(rounding_sensitivity, "layer_times", lambda ready: times)
    monkeypatch.setattr(
        choosing_precisions,
        "network_times",
        lambda ready, networks: [in_float, mixed, whole][: 1 + len(networks)],
    )


def test_a_layer_that_is_slower_in_int8_goes_back_to_float(monkeypatch: pytest.MonkeyPatch) -> None:
    _timed(monkeypatch, 4.0, 3.0)
    result = chosen(captured(chain(), 3, 12, 12), labelled=False, prefer="speed")
    assert precisions(result) == {"first": "int8", "second": "int8", "third": "float32", "fc": "int8"}
    assert result.skipped == {"third": "slower in int8: 2.000 ms in int8, 1.000 in float"}
    assert result.notes[1] == "one sample takes 3.000 ms, 4.000 in the fastest float32 form"


def test_nothing_is_made_that_is_slower_than_float(monkeypatch: pytest.MonkeyPatch) -> None:
    _timed(monkeypatch, 2.0, 3.0)
    with pytest.raises(BudgetNotMet, match=r"no precision is faster than float32 here: 3\.000 ms"):
        chosen(captured(chain(), 3, 12, 12), labelled=False, prefer="speed")
    with pytest.raises(BudgetNotMet, match=r"it gets 0\.67 times as fast; 1\.2 was asked for"):
        chosen(captured(chain(), 3, 12, 12), labelled=False, min_speedup=1.2)


def test_times_of_networks_are_measured(one_thread: None) -> None:
    program = captured(chain(), 3, 12, 12)
    choice = PrecisionChoice(program, QuantizeConfig(precision="auto", min_ratio=1.0), context(MANY))
    network = choice.network(choice.frontier[-1])
    assert network is not None
    assert all(0 < each < 100 for each in layer_times.network_times(choice.ready, [network], rounds=3))


def test_the_history_keeps_what_each_layer_loses_and_no_times() -> None:
    program = captured(chain(), 3, 12, 12)
    entries = [chosen(program, max_drop=5.0).program.history[-1] for _ in range(2)]
    assert entries[0] == entries[1]
    assert entries[0]["sensitivity_db"].keys() == {"first", "second", "third", "fc"}
    assert all(losses["int8"] > 20 for losses in entries[0]["sensitivity_db"].values())


def test_precisions_need_a_budget_and_data() -> None:
    program = captured(chain(), 3, 12, 12)
    with pytest.raises(UsageError, match="needs a budget"):
        chosen(program)
    with pytest.raises(UsageError, match="needs data"):
        apply(program, QuantizeConfig(precision="auto", max_drop=1.0), Context())
    with pytest.raises(UsageError, match=r"cannot tell a drop of 0\.5"):
        chosen(program, max_drop=0.5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"precision": "auto", "scheme": "int8-dynamic"}, "scales that are fixed"),
        ({"precision": "auto", "act_bits": 4}, "act_bits has no meaning with"),
        ({"prefer": "speed"}, "prefer has no meaning without"),
        ({"precision": "some"}, "is not one of"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        QuantizeConfig(**options)


def test_a_speed_that_is_asked_for_is_looked_for_among_times(monkeypatch: pytest.MonkeyPatch) -> None:
    _timed(monkeypatch, 4.0, 3.0)
    result = chosen(captured(chain(), 3, 12, 12), labelled=False, min_speedup=1.3)
    assert precisions(result)["third"] == "float32"  # which all int8 is smaller without
    with pytest.raises(BudgetNotMet, match=r"it gets 1\.33 times as fast; 1\.4 was asked for"):
        chosen(captured(chain(), 3, 12, 12), labelled=False, min_speedup=1.4)


def test_all_int8_is_taken_where_it_is_faster_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    _timed(monkeypatch, 4.0, 3.0, 2.0)
    result = chosen(captured(chain(), 3, 12, 12), labelled=False, prefer="speed")
    assert set(precisions(result).values()) == {"int8"}
    assert "layers: 4 in int8" in result.notes[0]


def test_in_python_a_limit_that_nothing_judges_is_the_budget_alone() -> None:
    result = mo.quantize(captured(chain(), 3, 12, 12), calibration=MANY, precision="auto", min_ratio=1.5)
    assert result.program is not None
    assert result.program.history[-1]["config"]["min_ratio"] == 1.5
