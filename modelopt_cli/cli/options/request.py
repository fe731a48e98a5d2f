"""What the commands that measure are asked, as the keyword arguments of the Python API."""

from dataclasses import dataclass
from typing import Any

from modelopt_cli.cli.options.measure import GateOptions, MeasureOptions
from modelopt_cli.cli.options.network import InputValues, NetworkOptions
from modelopt_cli.cli.options.run import RunOptions
from modelopt_cli.cli.values import Reader


@dataclass(frozen=True)
class Request:
    """What quantize and eval are both asked, read and checked, before torch is imported."""

    network: NetworkOptions
    image: InputValues
    run: RunOptions
    measure: MeasureOptions
    gates: dict[str, Any]

    def keywords(self, baseline: int = 0, judged: int | None = None) -> dict[str, Any]:
        """The fields of ``api.request.Measuring``, but for notes and progress."""
        from modelopt_cli.data import PreprocessOverrides
        from modelopt_cli.measure import EvalOptions, Gates

        return {
            "arch": self.network.arch,
            "data": self.network.data,
            "preprocessing": PreprocessOverrides(**self.image.given()),
            "options": EvalOptions(baseline=baseline, **self.measure.values(), **vars(self.run)),
            "gates": Gates(**self.gates, judged=judged),
        }

    def require_limits(self, files: int) -> None:
        """Refuse limits that nothing could be held against, whatever the files are; raises UsageError."""
        if self.gates:
            from modelopt_cli.measure.gates import Gates, Means, require_comparable, require_means

            gates = Gates(**self.gates)
            require_comparable(gates, files)
            require_means(gates, Means(self.network.data is not None, self.measure.runs))


def read_request(
    reader: Reader, network: NetworkOptions, run: RunOptions, measure: MeasureOptions, gates: GateOptions
) -> Request:
    """Check the values of all groups; what is wrong is left with ``reader``."""
    run.read(reader)
    return Request(network, network.read(reader), run, measure, gates.read(reader))
