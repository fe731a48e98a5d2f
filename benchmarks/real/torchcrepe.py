"""CREPE's smallest network (Kim et al., ICASSP 2018), which hears a pitch, and tones of known pitch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.real import source

BINS, RATE, WINDOW = 360, 16_000, 1024
CENTS = 20
LOWEST = 1997.3794084376191
"""Cents above 10 Hz of the first bin; each next one is 20 cents higher."""


def tiny() -> nn.Module:
    """Of windows ``(N, 1024)`` at 16 kHz, probabilities of 360 pitches 20 cents apart."""
    return source("torchcrepe.model", torchcrepe={"PITCH_BINS": BINS}).Crepe("tiny")


def tones(n: int = 1000, seed: int = 0) -> TensorDataset:
    """Windows of tones with four to eight overtones and some noise, and their pitch in cents above 10 Hz."""
    draw = torch.Generator().manual_seed(seed)
    hertz = 80 * (800 / 80) ** torch.rand(n, generator=draw)
    time = torch.arange(WINDOW) / RATE
    sound = torch.zeros(n, WINDOW)
    for overtone in range(1, 9):
        loudness = torch.rand(n, 1, generator=draw) / overtone * (overtone * hertz < RATE / 2)[:, None]
        loudness = loudness + (overtone == 1) / 2
        phase = 2 * math.pi * torch.rand(n, 1, generator=draw)
        sound += loudness * torch.sin(2 * math.pi * overtone * hertz[:, None] * time + phase)
    sound += 0.05 * torch.randn(n, WINDOW, generator=draw)
    sound = sound - sound.mean(1, keepdim=True)
    return TensorDataset(sound / sound.std(1, keepdim=True), 1200 * torch.log2(hertz / 10))


def within_50_cents(outputs: Tensor, cents: Tensor) -> Tensor:
    """100 where the pitch is right within half a semitone, else 0: their mean is in percent."""
    return 100.0 * ((pitch(outputs) - cents).abs() <= 50)


def loss(outputs: Tensor, cents: Tensor) -> Tensor:
    """Binary cross-entropy with a bell of 25 cents around the right pitch, as in the paper."""
    distance = LOWEST + CENTS * torch.arange(BINS) - cents[:, None]
    return F.binary_cross_entropy(outputs, torch.exp(-(distance.square()) / (2 * 25**2)))


within_50_cents.loss, within_50_cents.unit = loss, " %"


def pitch(outputs: Tensor) -> Tensor:
    """Cents above 10 Hz: the mean of the nine bins around the likeliest, weighted by their probabilities."""
    bins = torch.arange(BINS)
    near = (bins - outputs.argmax(1, keepdim=True)).abs() <= 4
    weights = outputs * near
    return (weights * (LOWEST + CENTS * bins)).sum(1) / weights.sum(1)
