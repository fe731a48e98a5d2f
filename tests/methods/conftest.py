"""Imported first: the package makes torchvision importable next to CPU-only torch."""

import sys
from pathlib import Path

import modelopt_cli  # noqa: F401

# The oracle of channel pruning stands with the tests of the Program.
sys.path.append(str(Path(__file__).parents[1] / "program"))
