"""Weight sharing: few distinct values, so that a weight is an index of a few bits."""

from modelopt_cli.methods.share.apply import apply
from modelopt_cli.methods.share.config import ShareConfig

__all__ = ["ShareConfig", "apply"]
