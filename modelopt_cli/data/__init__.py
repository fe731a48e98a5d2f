"""Data specs, preprocessing, and batches in a fixed order."""

from typing import TYPE_CHECKING

from modelopt_cli.lazy_names import lazy_names

if TYPE_CHECKING:
    from modelopt_cli.data.config import PreprocessOverrides
    from modelopt_cli.data.dataset import Data
    from modelopt_cli.data.open import open_data

__all__ = ["Data", "PreprocessOverrides", "open_data"]

__getattr__ = lazy_names(
    __name__,
    {
        "Data": "dataset",
        "PreprocessOverrides": "config",
        "open_data": "open",
    },
)
