"""Networks with changed parameters, compared by the same images and figures whatever changed them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modelopt_cli
from modelopt_cli.api.opening import ModelFile, known_input
from modelopt_cli.data import PreprocessOverrides, open_data

ROOT = Path(__file__).parent.parent
BATCH = 20
COUNTER = "num_batches_tracked"
"""What a batch norm counts in training only; neither tool has to keep it."""
SCORED = 512
"""Calibration images by which a network is scored while it is compressed."""


@dataclass(frozen=True)
class Network:
    """A trained network and its data.

    Attributes:
        checkpoint: the file, from the root of the project.
        data: what top-1 and divergence are measured on, as ``--data`` takes it.
        calib: what may be looked at while compressing.
        arch: as ``--arch`` takes it, where the file does not hold the network.
        preprocess: of a sample, where neither the file nor the data say.
    """

    checkpoint: str
    data: str
    calib: str
    arch: str | None = None
    preprocess: PreprocessOverrides | None = None

    @property
    def options(self) -> list[str]:
        """Options of the command for it."""
        words = ["--arch", self.arch] if self.arch else []
        for name, value in asdict(self.preprocess).items() if self.preprocess else ():
            if value is not None:
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words += [f"--{name.replace('_', '-')}", text]
        return words


class Comparison:
    """A network and its images; says how good the network is with other parameters."""

    def __init__(self, network: Network) -> None:
        spec = known_input(
            [ModelFile.of(ROOT / network.checkpoint)], network.arch, network.data, network.preprocess
        )
        self.program = modelopt_cli.load(ROOT / network.checkpoint, arch=network.arch, input_spec=spec)
        self.images, self.labels = self._samples(network.data, network.preprocess, None)
        self.scored, _ = self._samples(network.calib, network.preprocess, SCORED)
        self.state = {name: each.clone() for name, each in self.program.state_dict().items()}
        self.outputs = self._outputs(self.program, self.images)
        self.scored_outputs = self._outputs(self.program, self.scored)
        self.correct = self._correct(self.outputs)

    def _samples(
        self, data: str, overrides: PreprocessOverrides | None, limit: int | None
    ) -> tuple[Tensor, Tensor]:
        opened = open_data(data, input_spec=self.program.input, overrides=overrides)
        images, labels = zip(*opened.batches(256, limit=limit), strict=True)
        return torch.cat(images), torch.cat(labels)

    @torch.inference_mode()
    def _outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """Log-probabilities in float64, ``(N, classes)``."""
        logits = torch.cat([model(batch) for batch in images.split(BATCH)])
        return logits.double().log_softmax(1)

    def _correct(self, outputs: Tensor) -> int:
        return int((outputs.argmax(1) == self.labels).sum())

    def figures(self, model: nn.Module) -> tuple[int, float]:
        """Images classified correctly, and the mean divergence."""
        outputs = self._outputs(model, self.images)
        return self._correct(outputs), _divergence(outputs, self.outputs)

    def put(self, state: Mapping[str, Any]) -> nn.Module:
        """The network with parameters that NNCodec decoded."""
        names = [name for name in self.state if not name.endswith(COUNTER)]
        tensors = {name: torch.from_numpy(state[name]).reshape(self.state[name].shape) for name in names}
        self.program.load_state_dict(tensors, strict=False)
        return self.program

    def score(self, state: Mapping[str, Any]) -> float:
        """The higher, the closer to the fp32 network on the calibration images."""
        return -_divergence(self._outputs(self.put(state), self.scored), self.scored_outputs)

    def norms(self) -> list[dict[str, Any]]:
        """The batch norms that can be folded into the layer before them, as the worker takes them."""
        modules, norms = dict(self.program.named_modules()), []
        for node in self.program.graph.nodes:
            norm = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(norm, nn.BatchNorm2d):
                layer = node.args[0]
                assert len(layer.users) == 1, "the layer before a batch norm has another use"
                assert isinstance(modules[layer.target], nn.Conv2d)
                norms.append({"layer": layer.target, "norm": node.target, "eps": norm.eps})
        return norms


def _divergence(outputs: Tensor, reference: Tensor) -> float:
    return float(F.kl_div(outputs, reference, log_target=True, reduction="batchmean"))
