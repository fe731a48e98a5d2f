"""Settings of ``quantize``."""

from dataclasses import dataclass
from typing import Annotated

from modelopt_cli.settings import CALIBRATION, Config, Setting

SCHEMES: dict[str, str] = {
    "int8": "weights and activations int8, scales fixed by calibration data",
    "int8-dynamic": "linear layers int8, activations scaled at every call, no data needed",
    "int8-weight": "weights stored as int8, computed in float32, no data needed",
}
LEAST_SNR_DB = 20.0
"""Signal-to-noise of the outputs, in dB, below which 8 bits have lost more than rounding takes."""
OBSERVERS: dict[str, str] = {
    "minmax": "the whole range that was seen",
    "percentile": "the range without its rarest values",
    "mse": "the range with the least squared error of rounding",
    "entropy": "the range whose distribution loses least, by Kullback-Leibler divergence",
}


@dataclass(frozen=True)
class QuantizeConfig(Config, title="Quantizing"):
    """Settings of ``quantize``."""

    scheme: Annotated[str, Setting("Number format of weights and activations.", choices=SCHEMES)] = "int8"
    observer: Annotated[
        str, Setting("Rule that chooses activation ranges from calibration data.", choices=OBSERVERS)
    ] = "mse"
    include: Annotated[
        tuple[str, ...],
        Setting("Quantize only layers whose names match; may be repeated.", metavar="GLOB"),
    ] = ()
    exclude: Annotated[
        tuple[str, ...],
        Setting("Leave layers whose names match in float; may be repeated.", metavar="GLOB"),
    ] = ()
    skip_first: Annotated[
        bool, Setting("Leave the first convolution or linear layer in float.", advanced=True)
    ] = False
    skip_last: Annotated[
        bool, Setting("Leave the last convolution or linear layer in float.", advanced=True)
    ] = False
    calibration_samples: Annotated[
        int, Setting("Calibrate on at most this many samples.", least=1, title=CALIBRATION)
    ] = 512
