"""Quantizers to W8A8, each one a row: a function from a float network and samples to one that runs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs, batch_size, named, select, tensors_of

Run = Callable[[Inputs], Tensor]
"""The quantized network, on any number of samples."""
BATCH = 16
"""Samples at a time."""


@dataclass(frozen=True, eq=False)
class Given:
    """What every quantizer is given.

    Attributes:
        program: the float network.
        inputs: all calibration samples, as one batch.
        validation: labelled samples of the same source, for those that try out what they lose; None where
            the network does not classify.
        folder: for files of the quantizers.
    """

    program: Program
    inputs: Inputs
    validation: tuple[Inputs, Tensor] | None
    folder: Path

    @cached_property
    def exported(self) -> Path:
        """The float network as an ONNX file for any number of samples."""
        path, example = self.folder / "float.onnx", select(self.inputs, slice(2))
        torch.onnx.export(
            self.program,
            tensors_of(example),
            path,
            input_names=list(self.array(example)),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * len(tensors_of(example)),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        return path

    def array(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """A batch in NumPy, by the names that the inputs have in ``exported``."""
        return {f"in_{name}": each.numpy() for name, each in named(inputs, self.program.input).items()}

    def arrays(self, size: int) -> list[dict[str, np.ndarray]]:
        """The calibration samples in NumPy, so many at a time."""
        return [self.array(batch) for batch in batches(self.inputs, size)]


@dataclass(frozen=True)
class Quantizer:
    """A row of the comparison.

    Attributes:
        make: the function.
        package: whose quantizer it is.
        options: keyword arguments of ``make``.
        classifiers: it takes labels, and no other networks.
    """

    make: Callable[..., Run]
    package: str
    options: Mapping[str, Any] = field(default_factory=dict)
    classifiers: bool = False

    @property
    def made_by(self) -> str:
        """The package, its version and the options: figures by other ones are measured again."""
        return " ".join([self.package, version(self.package), *map(str, self.options.items())])


def modelopt(given: Given, **options: Any) -> Run:
    """``modelopt_cli.quantize``, run by its kernels."""
    import modelopt_cli
    from modelopt_cli.kernels import prepare
    from modelopt_cli.program.input_batch import call

    network = prepare(modelopt_cli.quantize(given.program, calibration=given.inputs, **options).program)
    return lambda inputs: call(network, inputs)


def onnxruntime(given: Given, method: str) -> Run:
    """``quantize_static`` with one of its calibrators; weights per channel, activations uint8.

    Its fourth calibrator, ``Distribution``, finds ranges for float8.
    """
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = given.arrays(BATCH)
            self.rest = iter(self.batches)

        def __len__(self) -> int:
            return len(self.batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.rest = iter(self.batches[start_index:end_index])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    ready, output = given.folder / "ready.onnx", given.folder / "int8.onnx"
    quant_pre_process(str(given.exported), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready),
        str(output),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
        # Activations of one batch at a time are in memory, with any calibrator.
        extra_options={"CalibStridedMinMax": 1},
    )
    session = InferenceSession(str(output), providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, given.array(inputs))[0])


def nncf(given: Given, preset: str = "performance", ranges: str | None = None, **options: Any) -> Run:
    """``nncf.quantize`` of an OpenVINO model.

    By default its activations are symmetric, in ranges from the means of the samples' minima and maxima.

    Args:
        given: network and samples.
        preset: ``mixed`` has a zero point in activations.
        ranges: of activations, a name in ``RangeEstimatorParametersSet``.
        options: other keyword arguments of ``nncf.quantize``.
    """
    import nncf as library
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    model, data = _for_nncf(given)
    advanced = AdvancedQuantizationParameters()
    if ranges is not None:
        advanced.activations_range_estimator_params = getattr(RangeEstimatorParametersSet, ranges)
    options |= {"preset": library.QuantizationPreset(preset), "advanced_parameters": advanced}
    return _by_openvino(given, library.quantize(model, data, subset_size=batch_size(given.inputs), **options))


def accuracy_control(given: Given, **options: Any) -> Run:
    """``nncf.quantize_with_accuracy_control``: layers go back to float while validation loses too much."""
    import nncf as library

    assert given.validation is not None
    images, labels = given.validation
    pairs = list(zip(batches(images, 1), labels.tolist(), strict=True))

    def accuracy(network: Any, samples: Any) -> tuple[float, list[float]]:
        hits = [float(network(given.array(image))[0].argmax() == label) for image, label in samples]
        return float(np.mean(hits)), hits

    model, data = _for_nncf(given)
    quantized = library.quantize_with_accuracy_control(
        model, data, library.Dataset(pairs), accuracy, subset_size=batch_size(given.inputs), **options
    )
    return _by_openvino(given, quantized)


def _for_nncf(given: Given) -> tuple[Any, Any]:
    """The network and the calibration samples, as NNCF takes them.

    Read without ``convert_model``, biases of convolutions hang on the sizes of their inputs, and NNCF finds
    none to correct.
    """
    import nncf as library
    import openvino

    return openvino.convert_model(given.exported), library.Dataset(given.arrays(1))


def _by_openvino(given: Given, quantized: Any) -> Run:
    """Run by OpenVINO, in float32 where it is not int8."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.compile_model(quantized, "CPU", settings)
    return lambda inputs: torch.from_numpy(compiled(given.array(inputs))[0])


def torchao(given: Given) -> Run:
    """PT2E with the quantizer for x86, run by torch as it stands: dequantized, in float32."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    example = tensors_of(select(given.inputs, slice(2)))
    free = ({0: torch.export.Dim.DYNAMIC},) * len(example)
    # Not strictly exported, additions of residual networks are one to the quantizer, and it refuses them.
    exported = torch.export.export(given.program, example, dynamic_shapes=free, strict=True)
    prepared = prepare_pt2e(exported.module(), quantizer)
    for batch in batches(given.inputs, BATCH):
        prepared(*tensors_of(batch))
    network = convert_pt2e(prepared)
    return lambda inputs: network(*tensors_of(inputs))


def batches(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """So many samples at a time; the last may be fewer."""
    for start in range(0, batch_size(inputs), size):
        yield select(inputs, slice(start, start + size))


MODELOPT = "modelopt-cli"
PLAIN = {"observer": "mse", "equalize": "none", "bias_correction": "none"}
ORT = "onnxruntime"
QUANTIZERS = {
    "modelopt": Quantizer(modelopt, MODELOPT),
    "modelopt, plain": Quantizer(modelopt, MODELOPT, PLAIN),
    "onnxruntime, MinMax": Quantizer(onnxruntime, ORT, {"method": "MinMax"}),
    "onnxruntime, Entropy": Quantizer(onnxruntime, ORT, {"method": "Entropy"}),
    "onnxruntime, Percentile": Quantizer(onnxruntime, ORT, {"method": "Percentile"}),
    "NNCF": Quantizer(nncf, "nncf"),
    "NNCF, full bias correction": Quantizer(nncf, "nncf", {"fast_bias_correction": False}),
    "NNCF, mixed, MinMax": Quantizer(nncf, "nncf", {"preset": "mixed", "ranges": "MINMAX"}),
    "NNCF, accuracy control": Quantizer(accuracy_control, "nncf", classifiers=True),
    "torchao": Quantizer(torchao, "torchao"),
}
"""By the name in the table."""
