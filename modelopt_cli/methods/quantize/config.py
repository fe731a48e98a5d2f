"""Settings of ``quantize``."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from modelopt_cli.artifact.coding import Code
from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.methods.quantize.schemes import SCHEMES
from modelopt_cli.settings import CALIBRATION, Config, Setting


@dataclass(frozen=True)
class QuantizeConfig(Config, title="Quantizing"):
    """Settings of ``quantize``."""

    method: ClassVar[str] = "quantize"
    """Name of the command, in the history and in ``METHODS``."""
    scheme: Annotated[str, Setting("Number format of weights and activations.", choices=SCHEMES)] = "int8"
    observer: Annotated[
        str, Setting("Rule that chooses activation ranges from calibration data.", choices=OBSERVERS)
    ] = "mse"
    include: Annotated[
        tuple[str, ...],
        Setting("Quantize only layers whose names match; may be repeated.", of_layers=True),
    ] = ()
    exclude: Annotated[
        tuple[str, ...],
        Setting("Leave layers whose names match in float; may be repeated.", of_layers=True),
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

    @property
    def code(self) -> Code:
        """Coding of the file where none is asked for: that of the scheme."""
        return SCHEMES[self.scheme].code
