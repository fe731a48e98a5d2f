"""Imported first: the package makes torchvision importable beside CPU-only torch."""

import modelopt_cli  # noqa: F401
