"""``python -m modelopt_cli.mend``: makes ``import torchvision`` work in every program of this environment."""

from modelopt_cli import _torchvision

if __name__ == "__main__" and not _torchvision.imports_alone():
    _torchvision.mend()
