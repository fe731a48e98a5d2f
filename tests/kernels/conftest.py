"""Imported first: the package makes torchvision importable next to CPU-only torch."""

from collections.abc import Iterator

import pytest
import torch

import modelopt_cli  # noqa: F401


@pytest.fixture
def inference(one_thread: None) -> Iterator[None]:
    """Kernels run as in inference, on one thread."""
    with torch.inference_mode():
        yield
