"""Shapes that oneDNN's int8 operators get wrong do not reach them, and those nobody knows yet are found."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import assert_matches, conv, dynamic, exact_conv, exact_linear, linear, random_uint8
from test_kernels_saturation import as_program
from torch import Tensor

from modelopt_cli.kernels import onednn, prepare, routes, trials
from modelopt_cli.kernels.routes import Route, idle_taps, route
from modelopt_cli.program.quantization import QParams, dynamic_qparams, quantize

HAS_AMX = routes.has_amx()

# Channels in and out, groups, kernel, stride, padding, dilation, image: wrong with some instruction set.
WRONG: dict[str, tuple[Any, ...]] = {
    "wider stride": (1, 16, 1, (3, 3), (1, 4), (1, 1), (1, 1), (14, 3)),
    "wider stride, unpadded": (1, 32, 1, (7, 3), (1, 3), (0, 0), (1, 1), (11, 4)),
    "wider stride, grouped": (16, 32, 16, (3, 3), (1, 4), (0, 0), (1, 1), (5, 3)),
    "many outputs a group": (8, 264, 8, (3, 3), (4, 5), (4, 1), (1, 1), (2, 6)),
    "many outputs, one column": (4, 132, 4, (3, 7), (4, 2), (2, 0), (1, 1), (26, 7)),
    "large image": (1, 32, 1, (1, 2), (5, 1), (0, 0), (1, 1), (297, 61)),
    "taps on both sides": (16, 4, 1, (2, 2), (2, 2), (1, 1), (2, 2), (8, 1)),
    "taps on both sides, grouped": (96, 2, 2, (4, 2), (3, 4), (3, 1), (3, 3), (4, 2)),
    "pointwise in the padding": (5, 3, 1, (1, 1), (1, 5), (0, 1), (1, 1), (33, 1)),
    "depthwise in the padding": (16, 16, 16, (1, 1), (2, 1), (2, 0), (1, 1), (3, 4)),
    "deadly": (12, 5, 1, (3, 1), (5, 2), (0, 1), (2, 3), (10, 1)),
    "deadly, grouped": (24, 64, 8, (3, 1), (2, 2), (0, 1), (1, 2), (7, 1)),
}
WRONG_WITH_AMX: dict[str, tuple[Any, ...]] = {
    "one column": (8, 5, 1, (3, 4), (2, 4), (2, 3), (1, 2), (30, 4)),
    "one column, cut off": (65, 15, 1, (3, 3), (2, 2), (2, 0), (1, 1), (57, 4)),
    "one column, depthwise": (96, 96, 96, (5, 5), (2, 4), (0, 0), (2, 1), (39, 8)),
    "zero point in the padding": (48, 7, 1, (3, 1), (2, 2), (1, 0), (1, 1), (8, 119)),
    "few inputs a group": (4, 130, 2, (3, 3), (1, 2), (0, 1), (1, 1), (5, 31)),
    "patches that fill rows": (32, 7, 1, (3, 4), (2, 4), (0, 0), (1, 1), (61, 32)),
    "patches that fill rows, padded": (48, 1, 1, (4, 4), (2, 4), (1, 1), (2, 1), (6, 118)),
    "rows are filled, grouped": (32, 24, 2, (1, 8), (1, 2), (0, 3), (1, 2), (3, 40)),
    "dilated, narrow": (24, 1, 1, (1, 7), (4, 2), (0, 9), (1, 3), (14, 119)),
    "wide padding, deadly": (31, 8, 1, (1, 3), (5, 3), (0, 5), (1, 3), (76, 84)),
}
COMMON: dict[str, tuple[Any, ...]] = {
    "stem": (3, 64, 1, (7, 7), (2, 2), (3, 3), (1, 1), (224, 224)),
    "block": (64, 64, 1, (3, 3), (1, 1), (1, 1), (1, 1), (7, 7)),
    "small map": (64, 64, 1, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    "pointwise": (64, 256, 1, (1, 1), (2, 2), (0, 0), (1, 1), (56, 56)),
    "depthwise": (96, 96, 96, (5, 5), (2, 2), (2, 2), (1, 1), (28, 28)),
    "grouped": (128, 128, 32, (3, 3), (1, 1), (1, 1), (1, 1), (28, 28)),
    "dilated": (256, 256, 1, (3, 3), (1, 1), (12, 12), (12, 12), (28, 28)),
}


def layer_of(form: tuple[Any, ...], **more: Any) -> Any:
    names = ("in_channels", "out_channels", "groups", "kernel_size", "stride", "padding", "dilation")
    plain = {"output": None, "has_bias": False, "input": QParams(1.0, 200)}
    return conv(**dict(zip(names, form, strict=False)), **{**plain, **more})


def report() -> dict[str, float]:
    """The largest error of each prepared layer, with the trial and by the rule alone."""
    errors: dict[str, float] = {}
    with torch.inference_mode():
        for name, form in (WRONG | WRONG_WITH_AMX).items():
            layer = layer_of(form)
            x = random_uint8(2, form[0], *form[-1]).contiguous(memory_format=torch.channels_last)
            exact = exact_conv(layer, x)
            size = float(exact.abs().max().clamp(min=1))
            with mock.patch.object(trials, "conv2d", return_value=True):
                ruled = onednn.conv2d(layer, may_overwrite_residual=False)(x)
            errors[name] = max(
                float((y - exact).abs().max()) / size for y in (ruled, prepare(as_program(layer))(x))
            )
    return errors


@pytest.mark.parametrize("amx", [False, True])
def test_right_here(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other instruction sets: test_kernels_saturation.py. AMX's routes are right without it, too."""
    monkeypatch.setattr(routes, "has_amx", lambda: amx or HAS_AMX)
    assert max(report().values()) < 1e-6


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_residual_added_to_a_grouped_convolution(activation: str) -> None:
    form = (144, 144, 3, (1, 7), (2, 5), (0, 3), (1, 1), (2, 1))
    layer = layer_of(form, output=QParams(60.0, 90), residual=QParams(30.0, 5), activation=activation)
    x = random_uint8(1, 144, 2, 1)
    residual = random_uint8(1, 144, 1, 1, seed=3)
    with mock.patch.object(trials, "conv2d", return_value=True):
        got = onednn.conv2d(layer, may_overwrite_residual=False)(x, residual)
    assert_matches(got, exact_conv(layer, x, residual), layer.output)


@pytest.mark.parametrize("name", [*WRONG, *COMMON])
def test_only_what_is_odd_is_taken_round(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "has_amx", lambda: False)
    form = (WRONG | COMMON)[name]
    assert (route(layer_of(form), *form[-1]) == Route()) == (name in COMMON)


@pytest.mark.parametrize("name", [*WRONG_WITH_AMX, *sorted(COMMON.keys() - {"dilated"})])
def test_only_what_is_odd_with_amx_is_taken_round_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = (COMMON | WRONG_WITH_AMX)[name]
    layer = layer_of(form, input=QParams(1.0, 0 if name in COMMON else 200))
    for amx in (False, True):
        monkeypatch.setattr(routes, "has_amx", lambda amx=amx: amx)
        assert (route(layer, *form[-1]) == Route()) == (not amx or name in COMMON)


@pytest.mark.parametrize("side", [1, 2, 5, 40])
def test_padding_first_depends_on_the_image(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "has_amx", lambda: False)
    layer = layer_of((8, 8, 1, (2, 1), (1, 1), (1, 0), (3, 1), None))
    assert route(layer, side, 9) == Route((0, 0, 1, 1, 0, 0) if side <= 3 else ())


# Kernel, stride, padding, dilation and image of a convolution, and its idle taps along height and width.
IDLE: dict[str, tuple[Any, ...]] = {
    "dilated beyond the image": ((3, 3), (1, 1), (36, 36), (36, 36), (32, 32), (1, 1)),
    "dilated beyond the height": ((3, 3), (1, 1), (9, 9), (9, 9), (8, 12), (1, 0)),
    "a map of one element": ((5, 3), (1, 1), (2, 1), (1, 1), (1, 1), (2, 1)),
    "strided": ((5, 5), (3, 2), (8, 8), (4, 4), (4, 6), (2, 1)),
    "even": ((4, 2), (1, 1), (6, 3), (4, 4), (6, 6), (1, 0)),
    "windows in the padding": ((3, 3), (1, 1), (5, 5), (1, 1), (4, 4), (0, 0)),
    "none": ((3, 3), (1, 1), (1, 1), (1, 1), (4, 4), (0, 0)),
}


def idle_by_axis(form: tuple[Any, ...], axis: int) -> list[bool]:
    """For each tap along an axis: it gives nothing for an image of ones, wherever the window is."""
    kernel, stride, padding, dilation, size = (pair[axis] for pair in form[:5])
    image, taps = torch.ones(1, 1, size), torch.eye(kernel).unsqueeze(1)
    sums: Tensor = F.conv1d(image, taps, None, stride, padding, dilation)
    return [not bool(of_tap.any()) for of_tap in sums[0]]


@pytest.mark.parametrize("form", IDLE.values(), ids=IDLE)
def test_taps_that_never_meet_the_image_are_left_out(form: tuple[Any, ...]) -> None:
    layer = layer_of((8, 6, 1, *form[:4]))
    found = idle_taps(layer, form[4])
    assert found == form[5]
    for axis, count in enumerate(found):
        idle = idle_by_axis(form, axis)
        assert all(idle[:count] + idle[len(idle) - count :])
    x = random_uint8(2, 8, *form[4]).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        prepare(as_program(layer))(x).double(), exact_conv(layer, x), rtol=1e-6, atol=0
    )


def _off_by_one(operator: Any, only: Any = lambda x: True) -> Any:
    def wrong(x: Tensor, *args: Any) -> Tensor:
        y: Tensor = operator(x, *args)
        return y + 1 if only(x) else y

    return wrong


@pytest.mark.parametrize("output", [None, QParams(0.02, 90)], ids=["float", "uint8"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_an_operator_that_is_wrong_for_a_shape_is_not_used(output: Any, depthwise: bool) -> None:
    layer = conv(output=output, **({"in_channels": 12, "groups": 12} if depthwise else {}))
    narrow, wide = random_uint8(2, layer.in_channels, 9, 4), random_uint8(2, layer.in_channels, 9, 9)
    wrong = _off_by_one(onednn._conv, lambda x: x.shape[3] in (4, 6))  # 6: padded first
    with mock.patch.dict(trials._outcomes, clear=True), mock.patch.object(onednn, "_conv", wrong):
        prepare(as_program(layer))
        for x in (wide, narrow, wide):
            assert_matches(layer(x), exact_conv(layer, x), output)
        assert sorted(trials._outcomes.values()) == [False, True]


def test_a_post_op_that_is_wrong_is_not_used() -> None:
    layer = conv(activation="silu")
    x = random_uint8(2, 8, 9, 9)
    silu = onednn.POST_OPS | {"silu": onednn.POST_OPS["relu"]}
    with mock.patch.dict(trials._outcomes, clear=True), mock.patch.object(onednn, "POST_OPS", silu):
        prepare(as_program(layer))
        assert_matches(layer(x), exact_conv(layer, x), layer.output)


def test_a_linear_operator_that_is_wrong_is_not_used() -> None:
    static, moving = linear(), dynamic()
    x, floats = random_uint8(5, 24), torch.randn(5, 24)
    wrong = _off_by_one(onednn._linear)
    with mock.patch.dict(trials._outcomes, clear=True), mock.patch.object(onednn, "_linear", wrong):
        prepare(as_program(static)), prepare(as_program(moving))
        assert list(trials._outcomes.values()) == [False, False]
        assert_matches(static(x), exact_linear(static, x, static.input), static.output)
        q = dynamic_qparams(floats)
        assert_matches(moving(floats), exact_linear(moving, quantize(floats, q), q), None)


def test_layers_of_one_form_are_tried_once() -> None:
    with mock.patch.dict(trials._outcomes, clear=True):
        for seed in range(3):
            layer = conv(seed=seed)
            prepare(as_program(layer))
            for side in (20, 20, 30, 224):  # larger images are tried on a part
                layer(random_uint8(1, 8, side, side))
        assert len(trials._outcomes) == 1
        layer(random_uint8(2, 8, 20, 5))
        assert len(trials._outcomes) == 2
