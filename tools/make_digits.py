"""Make ``modelopt_cli/data/digits/digits.npz`` from the table that scikit-learn ships.

Usage: python tools/make_digits.py PATH/TO/sklearn/datasets/data/digits.csv.gz
"""

import gzip
import sys
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parent.parent / "modelopt_cli" / "data" / "digits" / "digits.npz"


def main() -> None:
    """Convert without changing a value; numpy writes a constant time stamp, so the bytes are reproducible."""
    with gzip.open(sys.argv[1], "rt") as stream:
        table = np.loadtxt(stream, delimiter=",")
    images = table[:, :-1].astype(np.uint8).reshape(-1, 8, 8)
    labels = table[:, -1].astype(np.uint8)
    if not (np.array_equal(images.reshape(-1, 64), table[:, :-1]) and np.array_equal(labels, table[:, -1])):
        raise SystemExit("the table does not hold small integers")
    np.savez_compressed(TARGET, images=images, labels=labels)


if __name__ == "__main__":
    main()
