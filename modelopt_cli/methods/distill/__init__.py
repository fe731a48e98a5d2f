"""Distillation: a network learns from the outputs of others, not from labels alone."""
