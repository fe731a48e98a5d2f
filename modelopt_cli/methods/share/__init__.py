"""Weight sharing: few distinct values, so that a weight is an index of a few bits."""
