"""The last network of MTCNN (Zhang et al., IEEE SPL 2016), with three outputs; small pictures of faces."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.real import ASSETS, source


def onet() -> nn.Module:
    """For ``(N, 3, 48, 48)``: a box, five points of a face, and the probabilities."""
    package = "facenet_pytorch.models.utils"
    unused = {"detect_face": None, "extract_face": None}
    module = source("facenet_pytorch.models.mtcnn", **{package: {}, f"{package}.detect_face": unused})
    return module.ONet(pretrained=False)


def faces(test: bool = True) -> TensorDataset:
    """Every other one of 100 faces and 100 pieces of background, ``(100, 3, 48, 48)``; 1 is a face."""
    pictures = torch.from_numpy(np.load(ASSETS / "faces" / "lfw_subset.npy")).float()
    sized = F.interpolate(pictures[:, None], (48, 48), mode="bilinear", antialias=True)
    labels = (torch.arange(len(sized)) < 100).long()
    return TensorDataset((255 * sized[test::2].repeat(1, 3, 1, 1) - 127.5) / 128, labels[test::2])
