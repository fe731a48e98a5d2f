"""Unfolding of a convolution's input into rows, for any dtype and device."""

import torch.nn.functional as F
from torch import Tensor


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Length of a convolution's output along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def im2col(
    x: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    fill: int,
) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches of ``x`` as rows: one row an output position, columns in (kh, kw, channel) order.

    ``F.unfold`` refuses integers, so the windows are a strided view that one reshape copies.

    Args:
        x: ``(N, C, H, W)``.
        kernel_size, stride, padding, dilation: (height, width) of each.
        fill: value of the padding.

    Returns:
        The rows ``(N * OH * OW, KH * KW * C)`` and ``(N, OH, OW)``.
    """
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    n, c, h, w = x.shape
    oh, ow = output_size(h, kh, sh, ph, dh), output_size(w, kw, sw, pw, dw)
    nhwc = F.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph), value=fill).contiguous()
    sn, sy, sx, sc = nhwc.stride()
    windows = nhwc.as_strided((n, oh, ow, kh, kw, c), (sn, sy * sh, sx * sw, sy * dh, sx * dw, sc))
    return windows.reshape(n * oh * ow, kh * kw * c), (n, oh, ow)
