"""prune: weights, channels and layers removed from a Program."""
