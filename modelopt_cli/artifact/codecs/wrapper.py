"""Codecs that store the integers of others."""

from abc import abstractmethod
from typing import Any

import torch

from modelopt_cli.artifact.codecs.base import Codec, IntegerView, Params, Shape
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.program import Encoding


class Wrapper(Codec):
    """A codec that stores the integers of others in fewer bits.

    Its settings begin with ``codec`` and ``params``: the name and the settings of the inner codec.
    """

    wraps = True

    def __init__(self, inner: tuple[Codec, ...]) -> None:
        """A codec that may wrap these."""
        self._codecs = {codec.name: codec for codec in inner}

    @abstractmethod
    def offer(self, tensor: torch.Tensor, encoding: Encoding) -> Encoding | None:
        """The wrapped encoding of a tensor, or None where it cannot be wrapped.

        Args:
            tensor: on the CPU.
            encoding: one of this tensor, by a codec that wraps no other.
        """

    def _wraps(self, encoding: Encoding, dtype: torch.dtype) -> bool:
        """True if the integers of a parameter of this type that is stored so can be wrapped."""
        return encoding.codec in self._codecs and self._codecs[encoding.codec].makes_integers(dtype)

    def _wrapped(self, encoding: Encoding) -> dict[str, Any]:
        """The first two settings."""
        return {"codec": encoding.codec, "params": dict(encoding.params)}

    def _view(self, params: Params, shape: Shape, dtype: torch.dtype) -> IntegerView:
        """The inner codec of settings that may come from a hostile file.

        Raises:
            ArtifactError: there is no such codec of integers, or its settings do not fit the tensor.
        """
        name, settings = params.get("codec"), params.get("params")
        if not isinstance(settings, dict):
            raise ArtifactError("the settings of the inner codec are missing")
        if not isinstance(name, str) or name not in self._codecs:
            raise ArtifactError(f"codec {self.name} stores no integers of {str(name)[:40]!r}")
        return self._codecs[name].integers(settings, shape, dtype)
