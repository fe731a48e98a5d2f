"""Importing the package is cheap, and makes torchvision importable next to a CPU-only torch."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_package_imports_no_torch() -> None:
    loaded = run(
        "import sys, modelopt_cli; print([m for m in ('torch', 'torchvision', 'numpy') if m in sys.modules])"
    )
    assert loaded == "[]"


@pytest.mark.slow
def test_torchvision_comes_with_its_models() -> None:
    out = run(
        "import modelopt_cli, torchvision; print(len(torchvision.models.list_models(torchvision.models)))"
    )
    assert out == "80"


@pytest.mark.slow
def test_schemas_are_defined_only_where_the_extension_is_missing() -> None:
    out = run(
        "import modelopt_cli, torchvision, torchvision.extension as e\n"
        "from modelopt_cli._torchvision import _libraries\n"
        "print(e._has_ops(), len(_libraries))"
    )
    assert out in ("True 0", "False 2")


@pytest.mark.slow
def test_schemas_are_not_defined_twice() -> None:
    run(
        "import torch; own = torch.library.Library('torchvision', 'DEF')\n"
        "for name in ('nms', 'qnms'):\n"
        "    own.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "import modelopt_cli, torchvision"
    )


def test_finder_is_installed_once() -> None:
    out = run(
        "import sys, modelopt_cli\n"
        "from modelopt_cli import _torchvision\n"
        "_torchvision.install()\n"
        "print(sum(isinstance(f, _torchvision.TorchvisionFinder) for f in sys.meta_path))"
    )
    assert out == "1"


@pytest.mark.slow
def test_a_mended_environment_imports_torchvision_alone(tmp_path: Path) -> None:
    """The start file makes it work in a program that does not import modelopt_cli itself."""
    from modelopt_cli import torchvision_start

    code = "import site, sys; site.addsitedir({!r}); import torchvision; print('modelopt_cli' in sys.modules)"
    torchvision_start.install(tmp_path)
    assert run(code.format(str(tmp_path))) == "True"
    if not torchvision_start.imports_alone():
        done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
        assert "torchvision::nms does not exist" in done.stderr


def test_the_start_file_imports_no_torch(tmp_path: Path) -> None:
    from modelopt_cli import torchvision_start

    torchvision_start.install(tmp_path)
    code = f"import site, sys; site.addsitedir({str(tmp_path)!r}); print('torch' in sys.modules)"
    assert run(code) == "False"


def test_public_names_load_on_first_use() -> None:
    import modelopt_cli
    from modelopt_cli.program.program import Program

    assert modelopt_cli.Program is Program
    assert {"Program", "evaluate", "load", "quantize", "__version__"} <= set(dir(modelopt_cli))


def test_unknown_name() -> None:
    import modelopt_cli

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = modelopt_cli.nothing
