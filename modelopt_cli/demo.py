"""``make demo``: train a small network on the bundled digits, prune it, quantize it, show one table.

Run as ``python -m modelopt_cli.demo [FOLDER]``. Everything happens offline, through the command line itself,
on the 1,797 digits that come with the package, and takes well under a minute.
"""

import shlex
import shutil
import sys
from pathlib import Path

from modelopt_cli.cli.console import Console
from modelopt_cli.cli.main import main as modelopt

ARCH = "builtin:resnet8?in_channels=1"
TRAIN = ("--train", "digits?split=train")
TEST = ("--data", "digits")


def commands(folder: Path) -> list[list[str]]:
    """The command lines, in order; the last one shows the table."""
    trained, pruned, quantized = (
        str(folder / f"digits{ending}.safetensors") for ending in ("", "-pruned", "-pruned-int8")
    )
    write = ["--no-eval", "--force", "-q", "-o"]
    tune = [*TRAIN, "--epochs", "4", "--batch-size", "32", "--lr", "0.02"]
    return [
        ["train", "--arch", ARCH, *TRAIN, "--epochs", "6", "--batch-size", "32", *write, trained],
        ["prune", trained, "--flops", "0.5", *tune, *write, pruned],
        ["quantize", pruned, "--calibration", TRAIN[1], *write, quantized],
        ["eval", trained, pruned, quantized, *TEST, "--threads", "1"],
    ]


def main(folder: Path = Path("demo")) -> int:
    """Run the demonstration in a folder and return the exit code."""
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    for command in commands(folder):
        console.note(f"$ modelopt {shlex.join(command)}")
        if code := modelopt(command):
            return code
    last = folder / "digits-pruned-int8.safetensors"
    command_line = "modelopt" if shutil.which("modelopt") else str(Path(sys.executable).with_name("modelopt"))
    for line in (
        "",
        "The files need neither a checkpoint nor the network's source. Try next:",
        f"  {command_line} inspect {last}",
        f"  {command_line} prune {folder}/digits.safetensors --flops 0.3 --dry-run",
        f"  {command_line} quantize {folder}/digits.safetensors --scheme int8-weight",
        f"  {command_line} quantize YOUR.pth --arch net.py:make --data FOLDER_OF_CLASS_FOLDERS",
    ):
        console.note(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
