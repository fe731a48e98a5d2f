"""Networks of several inputs and outputs of every form, given to the verbs as Python objects."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modelopt_cli as mo
from modelopt_cli.measure.output_comparison import snr_db
from modelopt_cli.program.output_structure import flatten, plain

sys.path.insert(0, str(Path(__file__).parent / "program"))

from program_inputs_networks import FORMS, IDS, IMAGE, MASK, WORDS, Captioned, Keywords, ModelOutput, spec

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(64, 3, 8, 8, generator=GENERATOR)
TOKENS = torch.randint(WORDS, (64, 5), generator=GENERATOR)
MASKS = torch.rand(64, 5, generator=GENERATOR) < 0.7
LABELS = torch.randint(4, (64,), generator=GENERATOR)
EVERY = {"image": IMAGES, "ids": TOKENS, "mask": MASKS}
TWO = {"image": IMAGES, "ids": TOKENS}


def likeness(program: mo.Program, model: nn.Module, inputs: dict[str, Tensor] = TWO) -> float:
    """Signal-to-noise of all outputs in dB, which must have the original's names."""
    with torch.no_grad():
        found, expected = program(**inputs), plain(model(**inputs))
    assert flatten(found).keys() == flatten(expected).keys()
    assert type(found) is type(expected)
    ratio = snr_db(expected, found)
    assert ratio is not None
    return ratio


GIVEN: dict[str, Any] = {
    "tuple": (IMAGES, TOKENS),
    "list": [IMAGES, TOKENS],
    "dict": {"ids": TOKENS, "image": IMAGES},
}


@pytest.mark.parametrize("example", GIVEN.values(), ids=GIVEN)
def test_examples_of_several_inputs_say_what_a_network_takes(example: Any) -> None:
    model = Captioned()
    program = mo.share(model, bits=8, example_inputs=example).program
    assert program is not None
    assert {each.name for each in program.input.tensors} == {"image", "ids"}
    assert likeness(program, model) > 35


@pytest.mark.parametrize(
    "shape",
    [
        {"image": (3, 8, 8), "ids": "5:int64"},
        "image=3x8x8,ids=5:int64",
        [(3, 8, 8), "5:int64"],
    ],
    ids=["dict", "text", "list"],
)
def test_shapes_of_several_inputs_do_too(shape: Any) -> None:
    program = mo.share(Captioned(), bits=8, input_shape=shape).program
    assert program is not None
    assert program.input == mo.share(Captioned(), bits=8, example_inputs=(IMAGES, TOKENS)).program.input


BATCHES: dict[str, Any] = {
    "by-place": [((IMAGES[:32], TOKENS[:32]), LABELS[:32])],
    "by-name": [(TWO, LABELS)],
    "one-mapping": [{**TWO, "labels": LABELS}],
    "without-labels": [TWO],
}


@pytest.mark.parametrize("form", FORMS)
def test_int8_gives_what_the_float_network_gives(form: str) -> None:
    model = Captioned(FORMS[form])
    program = mo.quantize(model, calibration=BATCHES["by-name"]).program
    assert program is not None
    assert any("Quantized" in type(layer).__name__ for layer in program.modules())
    if form in ("largest", "integers"):  # which is the largest may change
        assert flatten(program(**TWO)).keys() == flatten(plain(model(**TWO))).keys()
    else:
        assert likeness(program, model) > 25


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_calibration_takes_every_form_of_batch(batches: Any) -> None:
    model = Captioned(FORMS["dict"])
    program = mo.quantize(model, calibration=batches).program
    assert program is not None
    assert likeness(program, model) > 25


@pytest.mark.slow
def test_masks_and_keyword_inputs_are_quantized_with(tmp_path: Path) -> None:
    for model, inputs in ((Captioned(), EVERY), (Keywords(), TWO)):
        program = mo.quantize(model, tmp_path / "q.safetensors", calibration=[inputs], force=True).program
        assert program is not None
        assert likeness(program, model, inputs) > 25
        assert likeness(mo.load(tmp_path / "q.safetensors"), model, inputs) > 25


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dict", "pyramid", "one"])
def test_channels_that_reach_an_output_stay(form: str) -> None:
    model = Captioned(FORMS[form])
    pruned = mo.prune(model, flops=0.583, example_inputs=(IMAGES, TOKENS)).program
    assert pruned is not None
    before, after = (
        {name: tensor.shape for name, tensor in flatten(plain(net(**TWO))).items()} for net in (model, pruned)
    )
    assert before == after
    assert pruned.get_submodule("stem").out_channels < 12
    assert (pruned.get_submodule("conv").out_channels == 6) is (form != "one")


@pytest.mark.slow
def test_pruned_channels_are_those_that_were_worth_nothing() -> None:
    """Without what is zero anyway the outputs are what they were."""
    model = Captioned(FORMS["tuple"])
    with torch.no_grad():
        for tensor in (*model.stem.parameters(), *model.hidden.parameters()):
            tensor[::2] = 0
    pruned = mo.prune(model, flops=0.583, example_inputs=(IMAGES, TOKENS), bn_recalibration=False).program
    assert pruned is not None
    assert pruned.get_submodule("stem").out_channels < 12
    assert likeness(pruned, model) > 100


@pytest.mark.slow
def test_one_after_the_other_and_back_from_the_file(tmp_path: Path) -> None:
    model, path = Captioned(FORMS["model-output"]), tmp_path / "net.safetensors"
    pruned = mo.prune(model, flops=0.832, example_inputs=TWO, calibration=[TWO]).program
    mo.quantize(pruned, path, calibration=[TWO])
    again = mo.load(path)
    assert [entry["method"] for entry in again.history] == ["prune", "quantize"]
    assert likeness(again, pruned) > 25
    assert isinstance(model(**TWO), ModelOutput)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one-of-two": ({"example_inputs": IMAGES}, r"needs 2 inputs \(image, ids\), and 1 is described"),
    "other-counts": ({"example_inputs": (IMAGES, TOKENS[:3])}, "has inputs of 64 and 3 samples"),
    "no-tensor": ({"example_inputs": (IMAGES, "text")}, "example_inputs: a tuple is not a torch.Tensor"),
    "unknown-name": (
        {"example_inputs": {"image": IMAGES, "idx": TOKENS}},
        "^example_inputs: the network has no input 'idx'; did you mean 'ids'",
    ),
    "nothing": ({"example_inputs": []}, "^example_inputs: holds no tensor; give one batch"),
    "no-sample": (
        {"example_inputs": (IMAGES[:0], TOKENS[:0])},
        r"^example_inputs: is a tensor of shape \(0, .*\), which holds no sample; give one batch",
    ),
    "shape": ({"input_shape": {"image": "large"}}, "input_shape: {'image': 'large'} is no shape"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_one_line(case: tuple[dict[str, Any], str]) -> None:
    given, part = case
    with pytest.raises(mo.InputError, match=part) as error:
        mo.prune(Captioned(), flops=0.583, **given)
    assert "\n" not in str(error.value)


def test_a_sample_without_an_input_is_one_line() -> None:
    program = mo.share(Captioned(), bits=8, example_inputs=(IMAGES, TOKENS)).program
    with pytest.raises(mo.DataError, match="calibration sample 0: has no input 'ids'"):
        mo.quantize(program, calibration=[{"image": IMAGES, "mask": MASKS}])


def test_the_masked_network_needs_its_mask() -> None:
    program = mo.share(Captioned(), bits=8, input_shape="image=3x8x8,ids=5:int64,mask=5:bool").program
    assert program is not None
    assert program.input == spec(
        *(
            mo.InputSpec(each.shape, dtype=each.dtype, name=each.name, free=free)
            for each, free in (
                (IMAGE, (1, 2)),
                (IDS, (0,)),
                (MASK, (0,)),
            )
        )
    )
