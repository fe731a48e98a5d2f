"""The sides of ``benchmarks.calibration`` that run in processes of their own.

    python -m benchmarks.calibration_worker make FOLDER IMAGES
    python -m benchmarks.calibration_worker onnxruntime|nncf FOLDER METHOD

``make`` writes ``resnet50.pt``, the same as ``float.onnx``, and ``images.npz``, uint8 ``(N, 224, 224, 3)``;
the others read the last two and write ``METHOD.onnx`` or ``METHOD.xml``. As in ``benchmarks.rivals``, weights
have a scale for each channel and activations are uint8.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE = 224
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
AT_A_TIME = 16
"""Images whose activations onnxruntime's histogram calibrators hold at a time; by default, of all."""


def make(folder: Path, count: str) -> None:
    """Write the network, with random weights and the batch-norm statistics of some images, and the images."""
    import torch

    from benchmarks.crops import make_crops
    from modelopt_cli import torchvision_start  # noqa: F401  before torchvision

    # isort: split
    from torchvision.models import resnet50

    make_crops(folder, calibration=-(-int(count) // 17), test=1)
    with np.load(folder / "calibration.npz") as crops:
        images = crops["images"][: int(count), 16 : 16 + SIDE, 16 : 16 + SIDE]
    np.savez(folder / "images.npz", images=images, labels=np.zeros(len(images), dtype=np.int64))
    torch.manual_seed(0)
    network = resnet50().train()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over batches
    batches = np.concatenate(list(samples(folder)))[:: max(1, len(images) // 32)]
    with torch.no_grad():
        for batch in torch.from_numpy(batches).split(16):
            network(batch)
    torch.save(network.state_dict(), folder / "resnet50.pt")
    torch.onnx.export(
        network.eval(),
        (torch.from_numpy(batches[:2]),),
        folder / "float.onnx",
        input_names=["images"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def samples(folder: Path) -> Iterator[NDArray[np.float32]]:
    """The images one by one, float32 ``(1, 3, 224, 224)``, as the network takes them."""
    with np.load(folder / "images.npz") as file:
        images = file["images"]
    for image in images:
        normal = (image.astype(np.float32) / 255 - MEAN) / STD
        yield np.ascontiguousarray(normal.transpose(2, 0, 1)[None])


def onnxruntime(folder: Path, method: str) -> None:
    """``quantize_static`` with one of its calibrators."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images, self.left = samples(folder), AT_A_TIME

        def __len__(self) -> int:
            with np.load(folder / "images.npz") as file:
                return len(file["labels"])

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = end_index - start_index

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            self.left -= 1
            image = next(self.images, None) if self.left >= 0 else None
            return None if image is None else {"images": image}

    ready = folder / f"{method}-ready.onnx"
    quant_pre_process(str(folder / "float.onnx"), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready),
        str(folder / f"{method}.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
        extra_options={"CalibStridedMinMax": AT_A_TIME},
    )


def nncf(folder: Path, method: str) -> None:
    """``nncf.quantize`` of an OpenVINO model, on all images."""
    import nncf as library
    import openvino

    images: Any = samples(folder)
    with np.load(folder / "images.npz") as file:
        count = len(file["labels"])
    model = openvino.Core().read_model(folder / "float.onnx")
    openvino.save_model(
        library.quantize(model, library.Dataset(images), subset_size=count), folder / f"{method}.xml"
    )


SIDES: dict[str, Callable[[Path, str], None]] = {"make": make, "onnxruntime": onnxruntime, "nncf": nncf}

if __name__ == "__main__":
    SIDES[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
