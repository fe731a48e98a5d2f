"""Settings of ``quantize``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from modelopt_cli.artifact.coding import Code
from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.methods.quantize.roundings import ROUNDINGS
from modelopt_cli.methods.quantize.schemes import SCHEMES
from modelopt_cli.settings import CALIBRATION, Config, Setting, option


@dataclass(frozen=True)
class QuantizeConfig(Config, title="Quantizing"):
    """Settings of ``quantize``."""

    method: ClassVar[str] = "quantize"
    """Name of the command, in the history and in ``METHODS``."""
    scheme: Annotated[str, Setting("Number format of weights and activations.", choices=SCHEMES)] = "int8"
    observer: Annotated[
        str, Setting("Rule that chooses activation ranges from calibration data.", choices=OBSERVERS)
    ] = "mse"
    rounding: Annotated[
        str, Setting("Rule by which weights go up or down to an integer.", choices=ROUNDINGS)
    ] = "nearest"
    rounding_steps: Annotated[
        int,
        Setting(
            "Steps of learning for each layer or block, where rounding is learned.", least=1, advanced=True
        ),
    ] = 300
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

    def conflicts(self) -> Iterator[str]:
        """Settings that contradict each other or have no meaning together."""
        rounding = ROUNDINGS[self.rounding]
        if rounding.needs_data and not SCHEMES[self.scheme].needs_calibration:
            with_data = " or ".join(name for name, row in SCHEMES.items() if row.needs_calibration)
            yield (
                f"{option('rounding', rounding.name)} looks at the inputs of layers, which "
                f"{option('scheme', self.scheme)} does not; use {option('scheme', with_data)}"
            )
        if not rounding.learned and self.rounding_steps != QuantizeConfig.rounding_steps:
            learned = " or ".join(name for name, row in ROUNDINGS.items() if row.learned)
            yield f"{option('rounding_steps')} has no meaning without {option('rounding', learned)}"
