"""When peptides leave a column: DeepLC (Bouwmeester et al., Nature Methods 2021) and its own table.

The network has an output for each of the columns that it was trained on. The table is of another, so the
output that goes with it best is read through a line; both were found on the other half of the table.
"""

import csv
import gzip
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.real import ASSETS, Samples, source

FOLDER = ASSETS / "deeplc"
LENGTH = 60
RESIDUES = {
    "A": (3, 5, 1, 1, 0), "C": (3, 5, 1, 1, 1), "D": (4, 5, 1, 3, 0), "E": (5, 7, 1, 3, 0),
    "F": (9, 9, 1, 1, 0), "G": (2, 3, 1, 1, 0), "H": (6, 7, 3, 1, 0), "I": (6, 11, 1, 1, 0),
    "K": (6, 12, 2, 1, 0), "L": (6, 11, 1, 1, 0), "M": (5, 9, 1, 1, 1), "N": (4, 6, 2, 2, 0),
    "P": (5, 7, 1, 1, 0), "Q": (5, 8, 2, 2, 0), "R": (6, 12, 4, 1, 0), "S": (3, 5, 1, 2, 0),
    "T": (4, 7, 1, 2, 0), "V": (5, 9, 1, 1, 0), "W": (11, 10, 2, 1, 0), "Y": (9, 9, 1, 2, 0),
}  # fmt: skip
"""Atoms of a residue: C, H, N, O and S."""
ORDER = "KRPTNAQVSGILCMHFYWED"
"""Amino acids as the network numbers them."""
COLUMN, SLOPE, START = 721, 29.6181, 14.4985
"""Output whose times go best with those of the other half of the table, and the least-squares line."""


def multitask() -> nn.Module:
    """Of four descriptions of a peptide, times in minutes on the columns that it knows."""
    state = torch.load(FOLDER / "multitask_model.pt", weights_only=True)
    return source("deeplc._architecture").DeepLCModel(n_heads=len(state["heads.b2"]))


def peptides(test: bool = True) -> Samples:
    """400 unmodified peptides, described in four ways, and when they were seen, in minutes."""
    seen, half = _seen(), slice(test, 800, 2)
    return _described({name: seen[name] for name in _spread(seen)[half]})


def training() -> Samples:
    """All peptides of the table that :func:`peptides` has neither for the test nor for calibration."""
    seen = _seen()
    chosen = {*_spread(seen)[:800]}
    return _described({name: minutes for name, minutes in seen.items() if name not in chosen})


def _seen() -> dict[str, float]:
    """Minutes of the table's unmodified peptides, in the order of the alphabet."""
    with gzip.open(FOLDER / "example_psms.tsv.gz", "rt") as table:
        rows = [row for row in csv.DictReader(table, delimiter="\t") if float(row["qvalue"]) <= 0.01]
    seen = {row["peptidoform"].split("/")[0]: float(row["retention_time"]) for row in rows}
    plain = sorted(name for name in seen if set(name) <= RESIDUES.keys() and 7 <= len(name) <= LENGTH)
    return {name: seen[name] for name in plain}


def _spread(seen: Mapping[str, float]) -> list[str]:
    """Peptides at even distances in the alphabet."""
    return list(seen)[:: len(seen) // 800]


def _described(seen: Mapping[str, float]) -> Samples:
    return Samples([described_by(name) for name in seen], [torch.tensor(seen[name]) for name in seen])


def described_by(peptide: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Atoms of each residue, ``(60, 6)``, and of two in a row, ``(30, 6)``; sums and ends, ``(55,)``."""
    atoms = torch.zeros(LENGTH, 6)
    atoms[: len(peptide), :5] = torch.tensor([RESIDUES[letter] for letter in peptide])
    letters = torch.zeros(LENGTH, len(ORDER))
    letters[range(len(peptide)), [ORDER.index(letter) for letter in peptide]] = 1
    pairs = (atoms[:-1] + atoms[1:])[::2]
    ends = torch.cat([atoms[len(peptide) - 4 : len(peptide)], atoms[:4]])
    sums = torch.cat([atoms.sum(0), torch.tensor([float(len(peptide))]), ends.flatten()])
    return atoms, pairs, sums, letters


def minutes(outputs: Tensor, seen: Tensor) -> Tensor:
    """Absolute error in minutes."""
    return (SLOPE * outputs[:, COLUMN] + START - seen).abs()


def loss(outputs: Tensor, seen: Tensor) -> Tensor:
    """Mean absolute error of the one output that is judged; the others learn nothing by it."""
    return minutes(outputs, seen).mean()


minutes.higher_is_better, minutes.unit, minutes.loss = False, " min", loss
