"""The side of ``benchmarks.distillation`` that runs in torchdistill's own environment.

One job comes in as a file of ``torch.save``: states of teacher and student, images, labels, and how to
train. One JSON object goes out: ``{"top1": 88.1, "seconds": 200, "torchdistill": "1.1.5"}``. The training is
torchdistill's: its ``DistillationBox``, its ``KDLoss``, its loop over a ``DataLoader``. What it has no name
for is registered or handed over as it provides for: which parameters decay, and the rate of each step. Of
this project it has the architecture and the schedule.

    ENV/bin/python -m benchmarks.torchdistill_worker JOB.pt
"""

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import modelopt_cli  # noqa: F401  makes torchvision importable next to a CPU-only torch, once it is there

# isort: split

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler
from torchdistill.core.distillation import DistillationBox
from torchdistill.optim.registry import register_optimizer
from torchvision.transforms import v2

from modelopt_cli.checkpoint.builtin import resnet8
from modelopt_cli.training import TrainConfig
from modelopt_cli.training.optim import factor, parameter_groups, warmup_steps


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images, cropped and flipped anew each time they are asked for."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        edge = images.shape[-1] // 8
        self.transform = v2.Compose(
            [v2.RandomCrop(images.shape[-1], padding=edge), v2.RandomHorizontalFlip()]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


@register_optimizer  # type: ignore[untyped-decorator]
def decaying_sgd(module: nn.Module, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    """SGD that leaves biases and norms alone."""
    return torch.optim.SGD(parameter_groups(module, weight_decay), **options)


def settings(config: TrainConfig, steps_per_epoch: int, weights: dict[str, float]) -> dict[str, Any]:
    """The training in torchdistill's terms."""
    steps = config.epochs * steps_per_epoch
    warmup = warmup_steps(config, steps, steps_per_epoch)
    loss = {
        "student_module_path": ".",
        "student_module_io": "output",
        "teacher_module_path": ".",
        "teacher_module_io": "output",
        "temperature": weights["temperature"],
        "alpha": weights["ce"],
        "beta": weights["kd"],
    }
    return {
        "num_epochs": config.epochs,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": config.batch_size},
        },
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"forward_proc": "forward_batch_only"},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}},
        },
        "optimizer": {
            "key": "decaying_sgd",
            "filters_params": False,
            "kwargs": {
                "lr": config.peak_lr,
                "momentum": config.momentum,
                "weight_decay": config.weight_decay,
            },
        },
        "scheduler": {
            "key": "LambdaLR",
            "kwargs": {"lr_lambda": lambda step: factor(config.schedule, step, steps, warmup)},
            "scheduling_step": 1,
        },
    }


def network(state: dict[str, Tensor], width: float) -> nn.Module:
    """The residual network with these weights."""
    made = resnet8(10, 1, width=width)
    made.load_state_dict(state)
    return made


def train(job: dict[str, Any]) -> tuple[nn.Module, float]:
    """The student that torchdistill trained, and how many seconds that took."""
    torch.manual_seed(job["seed"])
    teacher, student = network(job["teacher"], 1.0).eval(), network(job["student"], job["width"])
    data = Augmented(job["images"], job["labels"])
    config: TrainConfig = TrainConfig(**job["config"])
    plan = settings(config, -(-len(data) // config.batch_size), job["weights"])
    device = torch.device("cpu")
    started = time.monotonic()
    box = DistillationBox(
        teacher, student, {"train": data}, plan, device, device_ids=None, distributed=False, lr_factor=1
    )
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for images, labels, extra in box.train_data_loader:
            loss = box.forward_process(images, labels, extra)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
    return box.student_model.eval(), time.monotonic() - started


def main() -> None:
    """Do the job named on the command line."""
    torch.set_num_threads(1)
    job = torch.load(sys.argv[1])
    student, seconds = train(job)
    with torch.inference_mode():
        predicted = torch.cat([student(images).argmax(1) for images in job["test_images"].split(500)])
    top1 = 100 * (predicted == job["test_labels"]).double().mean().item()
    print(json.dumps({"top1": top1, "seconds": round(seconds), "torchdistill": version("torchdistill")}))


if __name__ == "__main__":
    main()
