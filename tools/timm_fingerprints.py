"""Write or check modelopt_cli/checkpoint/timm_fingerprints.json, by which timm's networks are recognised.

    python tools/timm_fingerprints.py            write it from the installed timm
    python tools/timm_fingerprints.py --check    exit 1 if it would change

Every network is built once, on the meta device.
"""

import argparse
import json
import sys
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
from fingerprints import compact, write_or_check

import modelopt_cli
from modelopt_cli.checkpoint.tensor_names import shapes_of
from modelopt_cli.checkpoint.timm_fingerprint import shapes_hash

TARGET = Path(modelopt_cli.__file__).parent / "checkpoint" / "timm_fingerprints.json"


def fingerprint(name: str) -> tuple[str, str, tuple[str, ...], int | None] | None:
    """Name, hash, classifier and number of classes; None of what cannot be built on the meta device."""
    import timm

    torch.set_num_threads(1)
    try:
        with torch.device("meta"):
            network = timm.create_model(name, pretrained=False)
    except Exception as error:  # some compute with real numbers while they are built
        print(f"{name} is left out: {error}", file=sys.stderr)
        return None
    shapes = shapes_of(network.state_dict())
    named = getattr(network, "default_cfg", {}).get("classifier") or ()
    layers = (named,) if isinstance(named, str) else tuple(named)
    layers = tuple(layer for layer in layers if f"{layer}.weight" in shapes)
    classes = shapes[f"{layers[0]}.weight"][0] if layers else None
    return name, shapes_hash(shapes, layers), layers, classes


def generate(names: list[str] | None = None, processes: int = 1) -> dict[str, Any]:
    """The whole table, or the part for some networks."""
    import timm

    with Pool(processes) as pool:
        found = pool.map(fingerprint, names or timm.list_models(), chunksize=4)
    networks: dict[str, dict[str, int | None]] = {}
    classifiers = set()
    for name, key, layers, classes in filter(None, found):
        networks.setdefault(key, {})[name] = classes
        classifiers.add(layers)
    return {"timm": timm.__version__, "classifiers": sorted(classifiers), "networks": networks}


def to_text(table: dict[str, Any]) -> str:
    """JSON with one hash to a line, so that a change can be reviewed."""
    head = {key: value for key, value in table.items() if key != "networks"}
    lines = ",\n".join(f"{json.dumps(key)}:{compact(names)}" for key, names in table["networks"].items())
    return f'{compact(head)[:-1]},\n"networks":{{\n{lines}\n}}}}\n'


def main() -> int:
    """Write, or with --check compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the file is out of date")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    return write_or_check(TARGET, to_text(generate(processes=arguments.processes)), check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
