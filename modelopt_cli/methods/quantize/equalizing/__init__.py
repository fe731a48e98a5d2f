"""Changes to the float network before it is rounded, and to its biases after."""
