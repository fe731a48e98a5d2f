"""The keyword arguments that the verbs of the Python API share."""

from dataclasses import dataclass, replace
from typing import Any

from modelopt_cli.cli.options.network import NetworkOptions, with_shape
from modelopt_cli.cli.values import Reader
from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.measure.config import EvalOptions, Gates


@dataclass(frozen=True)
class RequestOptions:
    """Network, data, measuring and limits, read and checked before torch is imported."""

    network: NetworkOptions
    image: PreprocessOverrides
    measure: EvalOptions
    gates: Gates

    def keywords(self, baseline: int = 0, judged: int | None = None) -> dict[str, Any]:
        """The fields of ``api.request.Measuring``, but for notes and progress."""
        return {
            "arch": self.network.arch,
            "data": self.network.data,
            "preprocessing": self.image,
            "options": replace(self.measure, baseline=baseline),
            "gates": replace(self.gates, judged=judged),
            "task": self.network.task,
            "output_name": self.network.output_name,
        }

    def require_limits(self, files: int) -> None:
        """Refuse limits that nothing could be held against, whatever the files are; raises UsageError."""
        if self.gates:
            from modelopt_cli.measure.conditions import Conditions
            from modelopt_cli.measure.gates import require_comparable, require_conditions

            require_comparable(self.gates, files)
            require_conditions(self.gates, Conditions(self.network.data is not None, self.measure.runs))


def read_request(
    reader: Reader, network: NetworkOptions, image: PreprocessOverrides, measure: EvalOptions, gates: Gates
) -> RequestOptions:
    """The groups of options as one request; what does not go together is left with ``reader``."""
    return RequestOptions(network, with_shape(reader, image, network.input_shape), measure, gates)
