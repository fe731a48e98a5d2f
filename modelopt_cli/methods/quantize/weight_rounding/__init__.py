"""Choosing which integer each weight becomes: the rows of ``--rounding``, and what they share."""
