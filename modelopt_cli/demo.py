"""``make demo``: train a small network on the bundled digits, quantize it, show the table.

Run as ``python -m modelopt_cli.demo [FOLDER]``. Everything happens offline, on the 1,797 digits that
come with the package, and takes well under a minute.
"""

import sys
from pathlib import Path

from modelopt_cli.cli.console import Console
from modelopt_cli.cli.main import main as modelopt

SIZE = 32
EPOCHS = 6
BATCH = 64


def train(path: Path) -> None:
    """Train ``builtin:resnet8`` on the training digits and save its state dict as others would."""
    import torch
    import torch.nn.functional as F

    from modelopt_cli.checkpoint import resolve
    from modelopt_cli.data import PreprocessOverrides, open_data

    torch.manual_seed(0)
    data = open_data("digits?split=train", overrides=PreprocessOverrides(input_size=SIZE, channels=1))
    images, labels = next(data.batches(10_000))
    net = resolve("builtin:resnet8?in_channels=1").build().train()
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.save(net.state_dict(), path)


def main(folder: Path = Path("demo")) -> int:
    """Run the demonstration in a folder and return the exit code."""
    console = Console()
    checkpoint, quantized = folder / "digits.pth", folder / "digits-int8.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    console.note(f"training builtin:resnet8 on the bundled digits, into {checkpoint} ...")
    train(checkpoint)
    command = ["quantize", str(checkpoint), "--data", "digits", "--calib", "digits?split=train"]
    command += ["--input-size", str(SIZE), "-o", str(quantized), "--force"]
    console.note(f"$ modelopt {' '.join(command)}")
    code = modelopt(command)
    if code == 0:
        console.note(
            "\nThe file needs neither the checkpoint nor the network's source any more. Try next:\n"
            f"  modelopt eval {checkpoint} {quantized} --data digits --input-size {SIZE}\n"
            f"  modelopt inspect {quantized}\n"
            f"  modelopt quantize {checkpoint} --scheme int8-weight -o {folder}/digits-stored.safetensors\n"
            "  modelopt quantize YOUR.pth --arch net.py:make --data FOLDER_OF_CLASS_FOLDERS"
        )
    return code


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
