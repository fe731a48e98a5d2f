"""The Program: capture, allow-list, data form and back."""

from typing import TYPE_CHECKING

from modelopt_cli.lazy_names import lazy_names

if TYPE_CHECKING:
    from modelopt_cli.program.input_spec import InputSpec, Preprocess
    from modelopt_cli.program.program import Encoding, Program

__all__ = ["Encoding", "InputSpec", "Preprocess", "Program"]

__getattr__ = lazy_names(
    __name__,
    {
        "Encoding": "program",
        "InputSpec": "input_spec",
        "Preprocess": "input_spec",
        "Program": "program",
    },
)
