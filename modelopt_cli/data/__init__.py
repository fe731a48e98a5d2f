"""Data specs, preprocessing, and batches in a fixed order."""

from modelopt_cli.data.dataset import Data
from modelopt_cli.data.open import open_data
from modelopt_cli.data.preprocess import PreprocessOverrides

__all__ = ["Data", "PreprocessOverrides", "open_data"]
