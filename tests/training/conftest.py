"""Imported first: the package makes torchvision importable next to CPU-only torch."""

import modelopt_cli  # noqa: F401
