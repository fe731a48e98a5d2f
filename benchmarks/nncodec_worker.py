"""The side of ``benchmarks.nncodec`` that runs in NNCodec's own environment.

It needs nothing of this project but the finder that makes torchvision importable next to a CPU-only torch.
One JSON object a line comes in and one goes out; tensors travel as ``.npz`` files:

    in: {"state": "in.npz", "decoded": "out.npz", "norms": [...], "options": {...}}
    out: {"evaluate": "out.npz"}, as often as inference-optimised quantization asks; in: {"score": -0.01}
    out: {"bytes": 28707, "encode_s": 0.05, "decode_s": 0.01}, or {"error": "..."}
"""

import contextlib
import io
import json
import sys
import time
from typing import Any

import numpy as np

import modelopt_cli  # noqa: F401  makes torchvision importable next to a CPU-only torch

FOLD_EPS = np.float32(1e-5)
"""The epsilon that NNCodec's batch-norm folding takes for granted."""
State = dict[str, Any]


def blocks(job: dict[str, Any], state: State) -> dict[str, dict[str, str]]:
    """Parameters of each layer, which NNCodec asks for before it folds batch norms."""
    owner: dict[str, str] = {}
    kind: dict[str, str] = {}
    for norm in job["norms"]:
        parts = {f"{norm['layer']}.weight": "weight", f"{norm['layer']}.bias": "bias"}
        for name, role in (
            ("weight", "gamma"),
            ("bias", "beta"),
            ("running_mean", "mean"),
            ("running_var", "var"),
        ):
            parts[f"{norm['norm']}.{name}"] = f"bn.{role}"
        for name, role in parts.items():
            if name in state:
                owner[name], kind[name] = norm["layer"], role
    return {"block_identifier": owner, "parameter_type": kind}


def shift_eps(job: dict[str, Any], state: State, sign: int) -> State:
    """The state with variances for which NNCodec's epsilon does what the network's own does."""
    moved = dict(state)
    for norm in job["norms"]:
        name = f"{norm['norm']}.running_var"
        moved[name] = moved[name] + sign * (np.float32(norm["eps"]) - FOLD_EPS)
    return moved


def unfold(job: dict[str, Any], decoded: State, state: State) -> State:
    """Batch norms that only add what was folded into a bias; NNCodec leaves it under the layer's name."""
    unfolded = dict(decoded)
    for norm in job["norms"]:
        layer, name = norm["layer"], norm["norm"]
        had_bias = f"{layer}.bias" in state
        bias = unfolded.pop(f"{layer}.bias" if had_bias else f"{layer}.weight.bias")
        if had_bias:
            unfolded[f"{layer}.bias"] = np.zeros_like(bias)
        unfolded[f"{name}.bias"], unfolded[f"{name}.running_mean"] = bias, np.zeros_like(bias)
        unfolded[f"{name}.weight"] = np.ones_like(bias)
        unfolded[f"{name}.running_var"] = np.full_like(bias, 1 - norm["eps"])
    return unfolded


def asking(job: dict[str, Any]) -> Any:
    """The model that NNCodec runs: it asks whoever sent the job."""
    from nncodec.nnc_core.nnr_model import ModelExecute  # type: ignore[import-not-found]

    class Asking(ModelExecute):  # type: ignore[misc]
        def eval_model(self, parameters: State, verbose: bool = False) -> dict[str, float]:
            np.savez(job["decoded"], **shift_eps(job, parameters, -1))
            send({"evaluate": job["decoded"]})
            return {"score": float(json.loads(sys.stdin.readline())["score"])}

        def has_eval(self) -> bool:
            return True

        def has_test(self) -> bool:
            return False

        has_tune_ft = has_tune_lsa = has_test

    return Asking()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Encode and decode one state."""
    from nncodec import nnc  # type: ignore[attr-defined]

    with np.load(job["state"]) as file:
        state = shift_eps(job, dict(file), 1)
    options = job["options"]
    extra = {"block_id_and_param_type": blocks(job, state), "bnf": True} if job["norms"] else {}
    if options.get("ioq"):
        extra["model_executer"] = asking(job)
    begin = time.perf_counter()
    stream = nnc.compress(state, bitstream_path=None, return_bitstream=True, **options, **extra)
    encoded = time.perf_counter()
    found = nnc.decompress(bytearray(stream), reconstruct_lsa=True)
    decoded = time.perf_counter()
    np.savez(job["decoded"], **unfold(job, found, state))
    return {"bytes": len(stream), "encode_s": encoded - begin, "decode_s": decoded - encoded}


def send(message: dict[str, Any]) -> None:
    """One line to whoever sent the job, past what NNCodec prints."""
    assert sys.__stdout__ is not None
    print(json.dumps(message), file=sys.__stdout__, flush=True)


def main() -> None:
    """Do jobs until there are no more."""
    while line := sys.stdin.readline():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = work(json.loads(line))
        except (Exception, SystemExit) as error:  # nncodec ends the process where others raise
            found = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        send(found)


if __name__ == "__main__":
    main()
