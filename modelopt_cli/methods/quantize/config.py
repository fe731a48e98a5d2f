"""What to quantize and how."""

from dataclasses import asdict, dataclass
from typing import Any

from modelopt_cli.errors import UsageError

SCHEMES: dict[str, str] = {
    "int8": "weights and activations int8, scales fixed by calibration data",
    "int8-dynamic": "linear layers int8, activations scaled at every call, no data needed",
    "int8-weight": "weights stored as int8, computed in float32, no data needed",
}
LEAST_SNR_DB = 20.0
"""Signal-to-noise of the outputs, in dB, below which 8 bits have lost more than rounding takes."""
OBSERVER_NAMES = ("minmax", "percentile", "mse", "entropy")


@dataclass(frozen=True)
class QuantizeConfig:
    """Settings of ``quantize``.

    Attributes:
        scheme: a key of ``SCHEMES``.
        observer: how activation ranges are chosen from calibration data (``int8`` only).
        include: globs of layer names; empty means every layer.
        exclude: globs of layer names to leave in float.
        skip_first: leave the first convolution or linear layer in float.
        skip_last: leave the last one in float.
        calibration_samples: how many samples to calibrate on, at most.
    """

    scheme: str = "int8"
    observer: str = "mse"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_first: bool = False
    skip_last: bool = False
    calibration_samples: int = 512

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UsageError(f"unknown scheme {self.scheme!r}", hint=f"one of {', '.join(SCHEMES)}")
        if self.observer not in OBSERVER_NAMES:
            raise UsageError(
                f"unknown observer {self.observer!r}", hint=f"one of {', '.join(OBSERVER_NAMES)}"
            )
        if self.calibration_samples < 1:
            raise UsageError("--calibration-samples must be at least 1")

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the history."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
