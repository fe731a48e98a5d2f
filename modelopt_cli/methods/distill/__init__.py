"""Distillation: a network learns from what another one answers, not from labels alone."""

from modelopt_cli.methods.distill.apply import apply
from modelopt_cli.methods.distill.config import DistillConfig

__all__ = ["DistillConfig", "apply"]
