"""Silero's voice activity detector, with its state as input and output, and speech in noise."""

import wave
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.real import ASSETS, Samples

WINDOW, CONTEXT, RATE = 512, 64, 16_000
FRAMES = 64


class Detector(nn.Module):
    """The network for 16 kHz: the probability of speech in each window of 32 ms.

    Layers and names are those of the file; a window sees the last 64 samples of the one before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, windows: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities ``(N, T)`` of windows ``(N, T, 576)``, and the state after them, ``(N, 2, 128)``."""
        frames = windows.shape[1]
        sound = F.pad(windows.flatten(0, 1), (0, 64), mode="reflect").unsqueeze(1)
        spectrum = self.stft_conv(sound)
        seen = (spectrum[:, :129].square() + spectrum[:, 129:].square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = conv(seen).relu()
        features = seen.squeeze(-1).unflatten(0, (-1, frames))
        hidden, cell = state.unbind(1)
        heard = []
        for frame in features.unbind(1):
            hidden, cell = self.lstm_cell(frame, (hidden, cell))
            heard.append(self.final_conv(hidden.relu().unsqueeze(-1)).sigmoid().flatten(1))
        return torch.cat(heard, 1), torch.stack([hidden, cell], 1)


def speech(test: bool = True, n: int = 30) -> Samples:
    """Two seconds of a pause and speech in noise, a state of zeros, and which windows have speech.

    The noise is a tenth, three tenths or all of the speech's root mean square.
    """
    voices = [recording(path) for path in sorted((ASSETS / "speech").iterdir())][test::2]
    mixed = [mixture(voices[seed % len(voices)], (0.1, 0.3, 1.0)[seed % 3], seed) for seed in range(n)]
    sounds, spoken = zip(*mixed, strict=True)
    return Samples([(sound, torch.zeros(2, 128)) for sound in sounds], spoken)


def mixture(voice: Tensor, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Windows ``(64, 576)`` of a part of a recording after a pause, and 1. where they have speech, else 0."""
    draw = torch.Generator().manual_seed(seed)
    length = FRAMES * WINDOW
    pause = int(torch.randint(length // 4, length // 2, (), generator=draw))
    begin = int(torch.randint(max(1, len(voice) - length + pause), (), generator=draw))
    part = voice[begin : begin + length - pause]
    clean = F.pad(part, (pause, length - pause - len(part)))
    sound = F.pad(clean + noise * clean.std() * torch.randn(length, generator=draw), (CONTEXT, 0))
    power = clean.unflatten(0, (FRAMES, WINDOW)).square().mean(1)
    return sound.unfold(0, WINDOW + CONTEXT, WINDOW), (power > 0.05 * power.mean()).float()


def recording(path: Path) -> Tensor:
    """Samples of 16 bits at 16 kHz, from -1 to 1."""
    content = path.read_bytes()
    if path.suffix == ".wav":
        with wave.open(str(path)) as stream:
            content = stream.readframes(stream.getnframes())
    return torch.frombuffer(bytearray(content), dtype=torch.int16).float() / 32768


def auc(outputs: tuple[Tensor, Tensor], speech: Tensor) -> Tensor:
    """Area under the ROC curve of each recording's windows, in percent: how often speech is above a pause."""

    def area(heard: Tensor, wanted: Tensor) -> Tensor:
        above = heard[wanted == 1][:, None] - heard[wanted == 0]
        return 100 * ((above > 0).float() + (above == 0).float() / 2).mean()

    return torch.stack([area(*each) for each in zip(outputs[0], speech, strict=True)])


def loss(outputs: tuple[Tensor, Tensor], speech: Tensor) -> Tensor:
    """Cross-entropy of each window by itself."""
    return F.binary_cross_entropy(outputs[0], speech)


auc.unit, auc.loss = " %", loss
