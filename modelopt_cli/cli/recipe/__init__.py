"""Recipes: command lines that run one after the other, each on the output of the one before.

``document`` reads the file, ``plan`` makes command lines of it and has the ``commands`` check them,
``execute`` runs them, and ``record`` remembers which are finished. ``docs/recipes.md`` is for users.
"""
