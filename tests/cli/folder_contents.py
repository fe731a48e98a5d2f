"""What a command has left in a folder."""

import hashlib
from pathlib import Path


def digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def names(folder: Path) -> set[str]:
    """Names of the entries of a folder."""
    return {path.name for path in folder.iterdir()}
