"""Quantization-aware training: the form of an integer network that is trained, and back."""
