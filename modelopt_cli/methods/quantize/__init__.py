"""quantize: int8 weights and activations, dynamic int8, and int8 storage."""
