"""int8 weights: on the bound, no worse than 7 bits, and as close as promised."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modelopt_cli.artifact import read_safetensors, read_tensors, write_stream
from modelopt_cli.artifact.codecs import affine
from modelopt_cli.artifact.coding import CODINGS
from modelopt_cli.artifact.encodings import pruned_encoding
from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import never_saturates
from modelopt_cli.kernels.saturation import is_depthwise
from modelopt_cli.methods.layer_selection import select_layers
from modelopt_cli.methods.quantize import rounding
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.rounding import quantize_weight
from modelopt_cli.methods.quantize.schemes import SCHEMES, NetworkForm
from modelopt_cli.methods.quantize.state_dict import apply_to_state


def error(weight: Tensor, values: Tensor, scale: Tensor) -> np.ndarray[Any, Any]:
    w, q = weight.double().flatten(1).numpy(), values.flatten(1).numpy().astype(float)
    return np.asarray(np.square(w - q * scale.double().numpy()[:, None]).sum(1))


def rounded(weight: Tensor, levels: int) -> np.ndarray[Any, Any]:
    """Error of plain symmetric rounding to ``-levels..levels``."""
    w = weight.double().flatten(1).numpy()
    scale = np.maximum(np.abs(w).max(1, keepdims=True), 1e-30) / levels
    return np.asarray(np.square(w - np.round(w / scale) * scale).sum(1))


def random_weight(*shape: int, seed: int = 0, heavy: bool = False) -> Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return w**3 if heavy else w


SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "conv": ((6, 8, 3, 3), 1),
    "odd": ((6, 5, 3, 3), 1),
    "grouped": ((6, 2, 3, 3), 3),
    "linear": ((10, 64), 1),
    "one channel": ((4, 1, 3, 3), 1),
    "depthwise": ((6, 1, 5, 5), 6),
}


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_exact_everywhere_and_no_worse_than_seven_bits(name: str, heavy: bool) -> None:
    shape, groups = SHAPES[name]
    w = random_weight(*shape, heavy=heavy)
    values, scale = quantize_weight(w, groups)
    assert values.dtype == torch.int8
    assert values.shape == w.shape
    assert scale.dtype == torch.float32
    assert never_saturates(values, groups)
    assert (error(w, values, scale) <= rounded(w, 64) * 1.0001 + 1e-12).all()


def test_search_beats_seven_bits_where_pairs_allow_it() -> None:
    w = random_weight(16, 64, 3, 3, heavy=True)
    assert error(w, *quantize_weight(w)).sum() < 0.7 * rounded(w, 64).sum()


@pytest.mark.parametrize("groups", [1, 6])
def test_unbounded_where_nothing_is_multiplied_in_int8(groups: int) -> None:
    w = random_weight(6, 1, 3, 3) if groups == 6 else random_weight(6, 8, 3, 3)
    values, scale = quantize_weight(w, groups, exact_everywhere=groups == 6)
    assert values.flatten(1).abs().amax(1).tolist() == [127] * 6
    np.testing.assert_allclose(error(w, values, scale), rounded(w, 127), rtol=1e-3)
    torch.testing.assert_close(scale, w.flatten(1).abs().amax(1) / 127)


def test_scales_lie_between_eight_and_seven_bits() -> None:
    w = random_weight(32, 16, 3, 3)
    _, scale = quantize_weight(w)
    largest = w.flatten(1).abs().amax(1)
    assert (scale >= largest / 127 * 0.9999).all()
    assert (scale <= largest / 64 * 1.0001).all()


def test_a_channel_of_zeros() -> None:
    w = random_weight(3, 4, 3, 3)
    w[1] = 0
    values, scale = quantize_weight(w)
    assert not values[1].any()
    assert (scale > 0).all()
    assert scale.isfinite().all()


def test_zeros_stay_zero() -> None:
    w = random_weight(8, 16, 3, 3)
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    for exact in (True, False):
        values, _ = quantize_weight(w, exact_everywhere=exact)
        assert not values[w == 0].any()


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    w = random_weight(11, 6, 3, 3)
    whole = quantize_weight(w)
    monkeypatch.setattr(rounding, "CHUNK", 120)
    for a, b in zip(whole, quantize_weight(w), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("zeros", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize(
    "scheme",
    [name for name, row in SCHEMES.items() if row.source < NetworkForm.GRAPH and row.float_type is None],
)
def test_integers_reach_the_file_as_they_were_rounded(
    scheme: str, zeros: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recover(*_: Any) -> Tensor:
        raise AssertionError("recovers integers that were known")

    monkeypatch.setattr(affine, "_recovered", recover)
    net, row = nn.Sequential(nn.Linear(32, 16)), SCHEMES[scheme]
    weight = net[0].weight.detach()
    if zeros:
        weight[torch.rand(16, 32, generator=torch.Generator().manual_seed(0)) < 0.9] = 0
    earlier = {"0.weight": pruned_encoding(weight)} if zeros else {}
    layers = dict(net.named_modules())
    stream = apply_to_state(net.state_dict(), QuantizeConfig(scheme), layers, earlier).stream
    expected, scale = quantize_weight(weight, bits=row.weight_bits, exact_everywhere=row.integer_arithmetic)
    for code in CODINGS:
        write_stream(stream, tmp_path / code, code=code)
        steps = read_tensors(tmp_path / code).state["0.weight"] / scale[:, None]
        assert torch.equal(steps.round().to(torch.int8), expected)
    plain = read_safetensors(tmp_path / "plain")["0.weight"]
    assert torch.equal(plain, expected[expected != 0] if zeros else expected)


def test_the_weight_is_left_alone() -> None:
    w = random_weight(4, 6)
    before = w.clone()
    quantize_weight(w)
    assert torch.equal(w, before)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_empty_weights(shape: tuple[int, ...]) -> None:
    values, scale = quantize_weight(torch.empty(shape))
    assert values.shape == shape
    assert scale.shape == shape[:1]


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 4),
    inner=st.integers(1, 6),
    kernel=st.integers(1, 3),
    groups=st.integers(1, 3),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e6, 1e30]),
    seed=st.integers(0, 1000),
    same=st.booleans(),
)
def test_any_weight(
    out: int, inner: int, kernel: int, groups: int, scale: float, seed: int, same: bool
) -> None:
    w = random_weight(out * groups, inner, kernel, kernel, seed=seed)
    if same:
        w = w.sign()  # every pair at its extreme
    values, scales = quantize_weight(w * scale, groups)
    assert never_saturates(values, groups)
    # A depthwise weight has no pairs, and nothing is searched: it is rounded to 8 bits plainly.
    levels = 127 if is_depthwise(tuple(w.shape), groups) else 64
    assert (error(w, values, scales / scale) <= rounded(w, levels) * 1.001 + 1e-9).all()


NAMES = ["stem.conv", "body.0.conv", "body.1.conv", "head.fc"]


@pytest.mark.parametrize(
    ("options", "chosen", "reasons"),
    [
        ({}, NAMES, []),
        ({"include": ("body.*",)}, NAMES[1:3], ["not matched by --include"]),
        ({"include": ("stem*", "*.fc")}, [NAMES[0], NAMES[3]], ["not matched by --include"]),
        ({"exclude": ("*.conv",)}, NAMES[3:], ["matched by --exclude"]),
        (
            {"include": ("body.*",), "exclude": ("body.1*",)},
            NAMES[1:2],
            ["not matched by --include", "matched by --exclude"],
        ),
        ({"skip_first": True}, NAMES[1:], ["first layer"]),
        ({"skip_last": True}, NAMES[:3], ["last layer"]),
        ({"skip_first": True, "skip_last": True}, NAMES[1:3], ["first layer", "last layer"]),
        ({"include": ("body.[0]*",)}, NAMES[1:2], ["not matched by --include"]),
    ],
    ids=str,
)
def test_select(options: dict[str, Any], chosen: list[str], reasons: list[str]) -> None:
    selected, skipped = select_layers(NAMES, QuantizeConfig(**options))
    assert selected == chosen
    assert sorted([*selected, *skipped]) == sorted(NAMES)
    assert set(skipped.values()) == set(reasons)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_without_a_match(option: str) -> None:
    with pytest.raises(UsageError) as caught:
        select_layers(NAMES, QuantizeConfig(**{option: ("hed.fc",)}))  # type: ignore[arg-type]
    assert f"{option} 'hed.fc' matches no layer" in str(caught.value)
    assert "'head.fc'" in str(caught.value)
    with pytest.raises(UsageError, match="no such layers"):
        select_layers([], QuantizeConfig(**{option: ("x",)}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"scheme": "int4"}, {"observer": "mean"}, {"calibration_samples": 0}], ids=str
)
def test_config_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        QuantizeConfig(**options)


def test_config_as_data() -> None:
    data = QuantizeConfig(include=("a", "b")).as_dict()
    assert data["include"] == ["a", "b"]
    assert data["scheme"] == "int8"
