"""The Program: capture, allow-list, data form and back."""

from modelopt_cli.program.input_spec import InputSpec, Preprocess
from modelopt_cli.program.program import Encoding, Program

__all__ = ["Encoding", "InputSpec", "Preprocess", "Program"]
