"""Distillation: a network learns from what another one answers, not from labels alone."""
