"""The Program: capture, allow-list, data form and back."""

from modelopt_cli.program.program import Encoding, Program
from modelopt_cli.program.spec import InputSpec, Preprocess

__all__ = ["Encoding", "InputSpec", "Preprocess", "Program"]
