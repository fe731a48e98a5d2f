"""Names of artifacts: what they may end in, and what stands next to one. Standard library only."""

from pathlib import Path

from modelopt_cli.errors import OutputError

SUFFIX = ".safetensors"


def check_suffix(path: str | Path) -> None:
    """Refuse an artifact's name that promises another format than safetensors.

    Raises:
        OutputError: it has a suffix, and that is another one.
    """
    suffix = Path(path).suffix
    if suffix and suffix.lower() != SUFFIX:
        raise OutputError(
            f"ends in {suffix}, but what is written is a safetensors file",
            where=str(path),
            hint=f"end its name in {SUFFIX}",
        )


def scratch_beside(output: str | Path) -> Path:
    """Where the student without a teacher is written."""
    path = Path(output)
    return path.with_name(f"{path.stem}-scratch{path.suffix}")
