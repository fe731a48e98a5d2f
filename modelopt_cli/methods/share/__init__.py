"""share, weight clustering (palettization): few distinct values, so that a weight is an index of few bits."""
