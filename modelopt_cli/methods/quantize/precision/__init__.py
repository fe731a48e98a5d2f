"""A precision for each layer: the rows of ``--precision``, and the search."""
