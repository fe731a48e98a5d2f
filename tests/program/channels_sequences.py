"""Small networks over sequences, each around one thing that channel pruning has to follow."""

from typing import Any

import torch
import torch.nn.functional as F
from channels_networks import IMAGE, OUT, Case, Net, conv, parameter
from torch import Tensor, nn

STEPS = (5, 7)


def _recurrent(kind: str, width: int, **options: Any) -> Case:
    """A linear layer, a recurrent one, and what reads its last output."""

    def make() -> nn.Module:
        layer = getattr(nn, kind)(8, 6, batch_first=True, **options)
        return Net(
            lambda n, x: n.fc(torch.cat([n.rnn(n.a(x))[0][:, -1], n.b(x[:, 0])], 1)),
            a=nn.Linear(7, 8),
            rnn=layer,
            b=nn.Linear(7, 3),
            fc=nn.Linear(width + 3, 4),
        )

    units = {"rnn": 3, "rnn#2": 3} if options.get("proj_size") else {"rnn": 6}
    return Case(make, STEPS, {"a": 8, "b": 3, **units}, OUT)


def _last_state(n: Any, x: Tensor) -> Tensor:
    _, (hidden, cells) = n.rnn(x.transpose(0, 1))
    return n.fc(torch.cat([hidden[-2], hidden[-1], cells[0]], 1))


def _learned_state(n: Any, x: Tensor) -> Tensor:
    outputs, last = n.rnn(x, n.state.expand(-1, x.size(0), -1).contiguous())
    return n.fc(outputs[:, -1] * last[0])


def _state_of_zeros(n: Any, x: Tensor) -> Tensor:
    zeros = x.new_zeros(2, x.size(0), n.rnn.hidden_size)
    return n.fc(n.rnn(x, (zeros, torch.ones_like(zeros)))[0].sum(1))


def _state_of_a_layer(n: Any, x: Tensor) -> Tensor:
    return n.fc(n.rnn(x, torch.tanh(n.a(x[:, 0])).unsqueeze(0))[0][:, -1])


def _translated(n: Any, x: Tensor) -> Tensor:
    """Sutskever et al., NIPS 2014: what one network has read is where the other begins."""
    _, state = n.encoder(x)
    return n.fc(n.decoder(x.flip(1), state)[0])


def _attended(n: Any, x: Tensor) -> Tensor:
    """Luong et al., EMNLP 2015, "general" scores."""
    memory, state = n.encoder(x)
    outputs, _ = n.decoder(x, state)
    weights = torch.bmm(n.scores(outputs), memory.transpose(1, 2)).softmax(-1)
    return n.fc(torch.cat([torch.bmm(weights, memory), outputs], -1))


def _cells(n: Any, x: Tensor) -> Tensor:
    h = c = x.new_zeros(x.size(0), 6)
    g, r = x.new_full((x.size(0), 5), 0.1), None
    for step in range(5):
        h, c = n.lstm(x[:, step], (h, c))
        g = n.gru(F.relu(h), g)
        r = n.rnn(g, r)
    return n.fc(r)


def _cells_by_turns(n: Any, x: Tensor) -> Tensor:
    state, outputs = None, []
    for step in range(5):
        state = n.lstm(n.a(x[:, step]), state)
        outputs.append(state[0])
    return n.fc(torch.stack(outputs, 1))


def _text_line(n: Any, x: Tensor) -> Tensor:
    """Shi et al., TPAMI 2017: columns of a feature map are steps."""
    x = F.max_pool2d(F.relu(n.a(x)), 2).permute(0, 3, 1, 2).flatten(2)
    return n.fc(n.rnn(x)[0]).log_softmax(-1)


def _pooled_text(n: Any, x: Tensor) -> Tensor:
    outputs, _ = n.rnn(n.words((x * 9).abs().clamp(max=9).long()))
    return n.fc((outputs * n.scores(torch.tanh(n.a(outputs))).softmax(1)).sum(1))


SEQUENCES: dict[str, Case] = {
    "a GRU": _recurrent("GRU", 6),
    "a GRU of two layers and directions": _recurrent("GRU", 12, num_layers=2, bidirectional=True),
    "an LSTM of two layers": _recurrent("LSTM", 6, num_layers=2, dropout=0.1),
    "an LSTM that projects": _recurrent("LSTM", 6, num_layers=2, proj_size=3, bidirectional=True),
    "an RNN without bias": _recurrent("RNN", 12, nonlinearity="relu", bias=False, bidirectional=True),
    "the last state": Case(
        lambda: Net(_last_state, rnn=nn.LSTM(7, 6, 2, bidirectional=True), fc=nn.Linear(18, 4)),
        STEPS,
        {"rnn": 6},
        OUT,
    ),
    "a learned first state": Case(
        lambda: Net(
            _learned_state,
            rnn=nn.GRU(7, 6, 2, batch_first=True),
            state=parameter(2, 1, 6),
            fc=nn.Linear(6, 4),
        ),
        STEPS,
        {"rnn": 6},
        OUT,
    ),
    "a first state of constants": Case(
        lambda: Net(_state_of_zeros, rnn=nn.LSTM(7, 6, 2, batch_first=True), fc=nn.Linear(6, 4)),
        STEPS,
        {"rnn": 6},
        OUT,
    ),
    "a first state from a layer": Case(
        lambda: Net(
            _state_of_a_layer, a=nn.Linear(7, 6), rnn=nn.GRU(7, 6, batch_first=True), fc=nn.Linear(6, 4)
        ),
        STEPS,
        {"a": 6},
        OUT,
    ),
    "an encoder's state": Case(
        lambda: Net(
            _translated,
            encoder=nn.LSTM(7, 6, batch_first=True),
            decoder=nn.LSTM(7, 6, batch_first=True),
            fc=nn.Linear(6, 4),
        ),
        STEPS,
        {"encoder": 6},
        OUT,
    ),
    "attention over an encoder's outputs": Case(
        lambda: Net(
            _attended,
            encoder=nn.GRU(7, 6, batch_first=True),
            decoder=nn.GRU(7, 6, batch_first=True),
            scores=nn.Linear(6, 6),
            fc=nn.Linear(12, 4),
        ),
        STEPS,
        {"encoder": 6},
        OUT,
    ),
    "cells": Case(
        lambda: Net(
            _cells, lstm=nn.LSTMCell(7, 6), gru=nn.GRUCell(6, 5), rnn=nn.RNNCell(5, 3), fc=nn.Linear(3, 4)
        ),
        STEPS,
        {"lstm": 6, "gru": 5, "rnn": 3},
        OUT,
    ),
    "a cell without a first state": Case(
        lambda: Net(
            _cells_by_turns, a=nn.Linear(7, 5), lstm=nn.LSTMCell(5, 6, bias=False), fc=nn.Linear(6, 4)
        ),
        STEPS,
        {"a": 5, "lstm": 6},
        OUT,
    ),
    "a line of text": Case(
        lambda: Net(
            _text_line,
            a=conv(3, 5),
            rnn=nn.LSTM(20, 6, batch_first=True, bidirectional=True),
            fc=nn.Linear(12, 4),
        ),
        IMAGE,
        {"a": 5, "rnn": 6},
        OUT,
    ),
    "words, pooled by attention": Case(
        lambda: Net(
            _pooled_text,
            words=nn.Embedding(10, 7),
            rnn=nn.GRU(7, 6, batch_first=True, bidirectional=True),
            a=nn.Linear(12, 5),
            scores=nn.Linear(5, 1),
            fc=nn.Linear(12, 4),
        ),
        (5,),
        {"words": 7, "rnn": 6, "a": 5},
        OUT | {"scores": "is spread over other channels"},
    ),
}
"""Networks that lose channels without any change to what the others compute."""

STATES: dict[str, Case] = {
    "a state that is given": Case(
        lambda: Net(
            lambda n, x: n.fc(n.rnn(x[:, 1:], x[:, :1].transpose(0, 1).contiguous())[0][:, -1]),
            rnn=nn.GRU(7, 7, batch_first=True),
            fc=nn.Linear(7, 4),
        ),
        STEPS,
        {},
        OUT | {"rnn": "has a first state that no layer makes"},
    ),
    "a state that is returned": Case(
        lambda: Net(lambda n, x: n.lstm(n.a(x[:, 0]))[1], a=nn.Linear(7, 5), lstm=nn.LSTMCell(5, 6)),
        STEPS,
        {"a": 5},
        {"lstm": "feeds the network's output"},
    ),
    "an output next to a value without channels": Case(
        lambda: Net(lambda n, x: torch.cat([n.a(x), x[:, :1]], 1), a=nn.Linear(7, 7)),
        (3, 7),
        {},
        {"a": "is combined with a value that has no prunable channels"},
    ),
    "a layer without a rule": Case(
        lambda: Net(
            lambda n, x: n.fc(n.b(n.a(x), x)), a=nn.Linear(7, 5), b=nn.Bilinear(5, 7, 6), fc=nn.Linear(6, 4)
        ),
        STEPS,
        {},
        OUT
        | {
            "a": "goes through b (Bilinear)",
            "b": "Bilinear, which channels cannot be followed through",
        },
    ),
}
"""Layers that have to keep their channels, and why."""
