"""The options that commands share, declared once; those of one command in a file of its name."""

from modelopt_cli.cli.options.distill import DistillOptions
from modelopt_cli.cli.options.measure import (
    GATES,
    MEASURING,
    GateOptions,
    MeasureOptions,
    MeasureTrainedOptions,
    NoEval,
)
from modelopt_cli.cli.options.network import (
    Arch,
    Channels,
    InputShape,
    InputSize,
    InputValues,
    Interpolation,
    NetworkOptions,
)
from modelopt_cli.cli.options.output import (
    OUTPUT,
    Checkpoint,
    Code,
    DeleteOnFail,
    DryRun,
    Export,
    Force,
    Output,
    TrainDryRun,
    check_exports,
    chosen_output,
    read_code,
    read_exports,
    undone,
)
from modelopt_cli.cli.options.prune import PruneOptions
from modelopt_cli.cli.options.quantize import OBSERVERS, SCHEMES, QuantizeOptions
from modelopt_cli.cli.options.request import Request, read_request
from modelopt_cli.cli.options.run import RunOptions
from modelopt_cli.cli.options.share import TUNINGS, ShareOptions
from modelopt_cli.cli.options.train import (
    FineTuneOptions,
    TrainOptions,
    beside_another,
    of_several,
    read_curve,
    read_training_dry_run,
    training_request,
)

__all__ = [
    "GATES",
    "MEASURING",
    "OBSERVERS",
    "OUTPUT",
    "SCHEMES",
    "TUNINGS",
    "Arch",
    "Channels",
    "Checkpoint",
    "Code",
    "DeleteOnFail",
    "DistillOptions",
    "DryRun",
    "Export",
    "FineTuneOptions",
    "Force",
    "GateOptions",
    "InputShape",
    "InputSize",
    "InputValues",
    "Interpolation",
    "MeasureOptions",
    "MeasureTrainedOptions",
    "NetworkOptions",
    "NoEval",
    "Output",
    "PruneOptions",
    "QuantizeOptions",
    "Request",
    "RunOptions",
    "ShareOptions",
    "TrainDryRun",
    "TrainOptions",
    "beside_another",
    "check_exports",
    "chosen_output",
    "of_several",
    "read_code",
    "read_curve",
    "read_exports",
    "read_request",
    "read_training_dry_run",
    "training_request",
    "undone",
]
