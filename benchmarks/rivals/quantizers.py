"""Quantizers to W8A8, each one a function from a float network and calibration images to one that runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]
"""The quantized network, on a batch of at most ``BATCH`` images."""
BATCH = 10


def ours(program: Any, images: Tensor, folder: Path, **options: Any) -> Run:
    """``modelopt_cli.quantize`` with channels equalised and biases corrected, with kernels."""
    import modelopt_cli
    from modelopt_cli.kernels import prepare

    options = {"equalize": "outputs", "bias_correction": "measured", **options}
    return prepare(modelopt_cli.quantize(program, calibration=images, **options).program)


def onnxruntime(program: Any, images: Tensor, folder: Path, method: str) -> Run:
    """``quantize_static`` with one of its calibrators; weights per channel, activations uint8."""
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(images.split(1))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.rest, None)
            return None if image is None else {"images": image.numpy()}

    source, ready, output = exported(program, images, folder), folder / "ready.onnx", folder / "int8.onnx"
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready),
        str(output),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
    )
    session = InferenceSession(str(output), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def nncf(program: Any, images: Tensor, folder: Path, **options: Any) -> Run:
    """``nncf.quantize`` of an OpenVINO model, run by OpenVINO in float32 where it is not int8."""
    import nncf as library
    import openvino

    model = openvino.Core().read_model(exported(program, images, folder))
    data = library.Dataset([image.numpy() for image in images.split(1)])
    quantized = library.quantize(model, data, subset_size=len(images), **options)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.compile_model(quantized, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def torchao(program: Any, images: Tensor, folder: Path) -> Run:
    """PT2E with the quantizer for x86, run by torch as it stands: dequantized, in float32."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(program, (images[:BATCH],)).module(), quantizer)
    for batch in full_batches(images):
        prepared(batch)
    return convert_pt2e(prepared)


def exported(program: Any, images: Tensor, folder: Path) -> Path:
    """The float network as an ONNX file with any number of images."""
    path = folder / "float.onnx"
    if not path.exists():
        torch.onnx.export(
            program,
            (images[:2],),
            path,
            input_names=["images"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return path


def full_batches(images: Tensor) -> Iterator[Tensor]:
    """Batches of ``BATCH``; what is left over stays out."""
    return (batch for batch in images.split(BATCH) if len(batch) == BATCH)


QUANTIZERS: dict[str, Callable[[Any, Tensor, Path], Run]] = {
    "modelopt": ours,
    "modelopt, minmax": lambda *given: ours(*given, observer="minmax"),
    "modelopt, neither equalized nor corrected": lambda *given: ours(
        *given, equalize="none", bias_correction="none"
    ),
    "onnxruntime, MinMax": lambda *given: onnxruntime(*given, "MinMax"),
    "onnxruntime, Entropy": lambda *given: onnxruntime(*given, "Entropy"),
    "onnxruntime, Percentile": lambda *given: onnxruntime(*given, "Percentile"),
    "NNCF": nncf,
    "torchao": torchao,
}
"""By the name in the table."""
