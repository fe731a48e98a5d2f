"""Loss of the outputs when one layer alone is rounded, why, and how long the layer takes."""
