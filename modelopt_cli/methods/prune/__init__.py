"""prune: weights, channels and layers removed from a Program."""

from modelopt_cli.methods.prune.config import PruneConfig

__all__ = ["PruneConfig"]
