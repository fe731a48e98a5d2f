"""A small MobileNetV2 for Fashion-MNIST."""

from torch import nn

STAGES = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 3, 1], [6, 96, 2, 1]]
"""Expansion, channels, blocks and first stride, as torchvision's MobileNetV2 takes them."""


def mobilenet() -> nn.Module:
    """MobileNetV2 (Sandler et al., CVPR 2018) at half its width, for ``(N, 1, 28, 28)``."""
    from torchvision.models.mobilenetv2 import MobileNetV2

    network = MobileNetV2(10, width_mult=0.5, inverted_residual_setting=STAGES, dropout=0.0)
    stem = network.features[0][0]
    network.features[0][0] = nn.Conv2d(1, stem.out_channels, 3, stride=2, padding=1, bias=False)
    return network
