"""Lines on a network that was captured in parts."""

from dataclasses import dataclass

from modelopt_cli.measure.flops import count_macs
from modelopt_cli.program import Program
from modelopt_cli.program.parted import parts_of_network
from modelopt_cli.text import listing


@dataclass(frozen=True)
class PartsSummary:
    """Share of a network that its parts are.

    Attributes:
        submodules: paths of the parts.
        flops: share of the multiply-accumulates of one sample, 0 to 1; a part counts as often as it runs.
        parameters: share of the numbers in its parameters and buffers, 0 to 1.
        reason: why the rest was not captured.
    """

    submodules: tuple[str, ...]
    flops: float
    parameters: float
    reason: str

    @classmethod
    def of(cls, program: Program | None) -> "PartsSummary | None":
        """The summary of a network that was captured in parts; None of any other."""
        parts = None if program is None else parts_of_network(program)
        if program is None or parts is None:
            return None
        macs = count_macs(program, program.input)
        sizes = {name: tensor.numel() for name, tensor in program.state_dict().items()}
        outside = sum(sizes[name] for name in parts.remaining)
        return cls(
            tuple(parts.by_path),
            sum(macs.per_layer.values()) / (macs.total or 1),
            1 - outside / (sum(sizes.values()) or 1),
            parts.reason,
        )

    def __str__(self) -> str:
        count = len(self.submodules)
        parts = f"{count} {'part' if count == 1 else 'parts'} ({listing(list(self.submodules))})"
        shares = f"{100 * self.flops:.1f} % of the FLOPs and {100 * self.parameters:.1f} % of the parameters"
        return f"captured in {parts}, {shares}; its own code runs the rest: {self.reason}"
