"""Files that are no checkpoint at all are called what they are."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Refusal = Callable[[Path], str]

FOREIGN = {
    "empty": (b"", "is empty"),
    "text": (b"hello, this is not a checkpoint\n", "is a text file"),
    "utf-8 text": ("prêt\n".encode(), "is a text file"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
    "web page after blanks": (b"\n  <HTML>", "is a web page"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 46830571\n",
        "git lfs pull",
    ),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "numpy": (b"\x93NUMPY\x01\x00v\x00", "NumPy array"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(20), "gzip"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "GGUF"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
    "tar": (bytes(257) + b"ustar\x0000" + bytes(300), "tar archive"),
    "noise": (bytes(range(128, 256)) * 3, "is not a PyTorch or safetensors file"),
    "zeros": (bytes(4096), "is not a PyTorch or safetensors file"),
    "one byte": (b"\x80", "is not a PyTorch or safetensors file"),
    "json": (b'{"epoch": 3}', "is a text file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_named(kind: str, tmp_path: Path, refusal: Refusal) -> None:
    content, words = FOREIGN[kind]
    (tmp_path / "a.pth").write_bytes(content)
    assert words in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("keep", [0, 1, 8, 9, 20, 200])
def test_a_safetensors_file_cut_short(keep: int, tmp_path: Path, refusal: Refusal) -> None:
    import torch
    from safetensors.torch import save

    (tmp_path / "a.safetensors").write_bytes(save({"w": torch.ones(100)})[:keep])
    refusal(tmp_path / "a.safetensors")


def test_a_numpy_archive(tmp_path: Path, refusal: Refusal) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    assert "NumPy archive" in refusal(tmp_path / "a.npz")


def test_some_other_zip(tmp_path: Path, refusal: Refusal) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("net.pth", b"x")
    assert "no data.pkl" in refusal(tmp_path / "a.zip")
