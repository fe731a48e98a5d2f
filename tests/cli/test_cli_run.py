"""Recipes: what they are checked for, what they do, what is repeated after an interruption."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folder_contents import digest

import modelopt_cli
from modelopt_cli import api
from modelopt_cli.training.lock import Lock

ROOT = Path(__file__).parents[2]
RECIPE = """
output: small.safetensors
arch: net.py:make
input_size: 8
channels: 1
data: digits
train: digits?split=train
threads: 1
latency-runs: 0
steps:
  - train: {epochs: 1, batch_size: 64, lr: 0.05}
  - prune: {structure: 2:4, epochs: 1, lr: 0.02}
  - quantize: {scheme: int8-weight, skip_first: true}
"""
FILES = ("small.steps/1-train.safetensors", "small.steps/2-prune.safetensors", "small.safetensors")


@pytest.fixture
def here(good_files, tmp_path, monkeypatch):
    """A folder with the small network and the recipe as the current directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("net.py", "net.pth"):
        shutil.copy(good_files / name, folder)
    (folder / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return folder


def digests(*paths: str) -> list[str]:
    return [digest(path) for path in paths]


def written() -> list[tuple[int, int]]:
    """What changes when a file is written again: the time, for a system may use a number again."""
    return [(status.st_ino, status.st_mtime_ns) for status in (Path(path).stat() for path in FILES)]


def test_it_does_what_its_command_lines_do(here, modelopt):
    outcome = modelopt("run", "r.yaml", "--json")
    assert outcome.code == 0, outcome.err
    models = json.loads(outcome.out)["models"]
    assert [model["path"] for model in models] == list(FILES)
    assert [model["samples"] for model in models] == [364] * 3
    assert models[0]["file_bytes"] > models[1]["file_bytes"] > models[2]["file_bytes"]
    methods = [entry["method"] for entry in modelopt_cli.load("small.safetensors").history]
    assert methods == ["train", "prune", "quantize"]
    at_once = digests(*FILES)
    shutil.rmtree("small.steps")
    Path("small.safetensors").unlink()
    lines = modelopt("run", "r.yaml", "--dry-run").out.splitlines()
    assert lines.pop(0) == "mkdir -p small.steps"
    Path("small.steps").mkdir()
    for line in lines:
        program, *argv = shlex.split(line)
        assert program == "modelopt"
        assert modelopt(*argv).code == 0
    assert digests(*FILES) == at_once


def test_a_dry_run_prints_and_does_nothing(here, modelopt):
    before = sorted(here.iterdir())
    outcome = modelopt("run", "r.yaml", "--dry-run", "--json", "--seed", "7", "--checkpoint", "net.pth")
    assert (outcome.code, outcome.err) == (0, "")
    shared = ["--arch", "net.py:make", "--input-size", "8", "--channels", "1", "--data", "digits"]
    train, run = ["--train", "digits?split=train"], ["--threads", "1", "--seed", "7"]
    write = [["--no-eval", "-o", path] for path in FILES]
    first = ["--epochs", "1", "--batch-size", "64", "--lr", "0.05"]
    second = ["--structure", "2:4", "--epochs", "1", "--lr", "0.02"]
    third = ["--scheme", "int8-weight", "--skip-first"]
    assert json.loads(outcome.out)["commands"] == [
        ["modelopt", "train", "net.pth", *shared, *train, *run, *first, *write[0]],
        ["modelopt", "prune", FILES[0], *shared, *train, *run, *second, *write[1]],
        ["modelopt", "quantize", FILES[1], *shared, *train, *run, *third, *write[2]],
        [
            "modelopt",
            "eval",
            "net.pth",
            *FILES,
            *shared,
            "--threads",
            "1",
            "--latency-runs",
            "0",
            "--seed",
            "7",
        ],
    ]
    assert sorted(here.iterdir()) == before


ONE = """output: o.safetensors
arch: net.py:make
input-size: 8
channels: 1
checkpoint: net.pth
latency-runs: 0
"""
INT8 = f"{ONE}steps:\n  - quantize: {{scheme: int8-weight}}\n"


def lines_of(modelopt, text: str, *argv: str) -> list[str]:
    Path("r.yaml").write_text(text)
    outcome = modelopt("run", "r.yaml", "--dry-run", *argv)
    assert outcome.code == 0, outcome.err
    return outcome.out.splitlines()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("prune: {sparsity: 0.10}", "--sparsity 0.10"),
        ("prune: {sparsity: 0.1, bn-recalibration: false}", "--sparsity 0.1 --no-bn-recalibration"),
        ("prune: {sparsity: 0.1, no-bn-recalibration: true}", "--sparsity 0.1 --no-bn-recalibration"),
        ("prune: {sparsity: 0.1, no-bn-recalibration: false}", "--sparsity 0.1 --bn-recalibration"),
        ("prune: {sparsity: 0.1, reestimate: false}", "--sparsity 0.1 --no-bn-recalibration"),
        ("prune: {sparsity: 0.1, skip_last: false}", "--sparsity 0.1"),
        ("prune: {sparsity: 0.1, exclude: [a*, 'b c']}", "--sparsity 0.1 --exclude 'a*' --exclude 'b c'"),
        ("prune: {sparsity: 0.1, exclude: a}", "--sparsity 0.1 --exclude a"),
        ("quantize", ""),
        ("quantize:", ""),
    ],
    ids=str,
)
def test_a_step_becomes_arguments(step, words, here, modelopt):
    (line, _) = lines_of(modelopt, f"{ONE}steps:\n  - {step}\n")
    shared = "--arch net.py:make --input-size 8 --channels 1"
    end = "--no-eval -o o.safetensors"
    assert line == " ".join(filter(None, ("modelopt", step.split(":")[0], "net.pth", shared, words, end)))


def test_beside_the_steps_a_name_goes_where_it_means_the_same(here, modelopt):
    text = "batch-size: 16\nlatency-batch-size: 2\ndata-batch-size: 5\nlimit: 9\n" + RECIPE.strip()
    train, prune, quantize, evaluation = lines_of(modelopt, text)[1:]
    assert "--batch-size 64" in train  # its own goes before
    assert "--batch-size 16" in prune
    assert "--batch-size" not in (quantize + evaluation).replace("latency-batch", "").replace(
        "data-batch", ""
    )
    assert "--latency-batch-size 2" in evaluation
    assert "--limit 9" in evaluation
    for line in (train, prune, quantize):
        assert "--data-batch-size 5" in line
        assert not any(word in line for word in ("--limit", "--latency-batch-size", "--latency-runs"))


def test_the_command_line_goes_before_the_recipe(here, modelopt):
    settings = [
        "--set",
        "prune.lr=0.5",
        "--set",
        "1.epochs=4",
        "--set",
        "limit=3",
        "--set",
        "quantize.scheme=int8",
    ]
    train, prune, quantize, evaluation = lines_of(
        modelopt, RECIPE, *settings, "--data", "digits?split=train", "-o", "x"
    )[1:]
    assert "--epochs 4" in train
    assert "--epochs 1 --lr 0.5" in prune
    assert "--scheme int8 " in quantize
    assert quantize.endswith("-o x")
    assert "--limit 3" in evaluation
    assert all("--data 'digits?split=train'" in line for line in (train, prune, quantize, evaluation))


WRONG = {
    "not there": (None, "r.yaml: no such file"),
    "not YAML": ("steps: [", "r.yaml: line 1: "),
    "not UTF-8": (b"\xff", "r.yaml: is not UTF-8 text"),
    "too long": (b"#" * 70_000, "r.yaml: has more than 65,536 bytes"),
    "too deep": ("[" * 2_000, "r.yaml: is nested too deeply"),
    "no mapping": ("- quantize", "r.yaml: is not a recipe"),
    "nothing": ("", "r.yaml: is not a recipe"),
    "no steps": ("output: x", "r.yaml: has no steps"),
    "steps misspelled": ("output: x\nstep: []", "has no steps; 'step': did you mean 'steps'?"),
    "empty steps": ("steps: []", "r.yaml: has no steps"),
    "two documents": ("steps: [quantize]\n---\nsteps: []", "line 2: but found another document"),
    "key twice": (f"{INT8}latency-runs: 1\n", "line 9: 'latency-runs' is given twice"),
    "option twice": (f"{ONE}steps:\n  - quantize: {{skip-last: true, skip_last: true}}", "'skip-last' is g"),
    "tag": (f"{ONE}steps:\n  - quantize: {{calib: !!python/name:os.system x}}", "'calib' is neither a plain"),
    "nested value": (f"{ONE}steps:\n  - quantize: {{calib: {{a: b}}}}", "line 8: 'calib' is neither a plain"),
    "two verbs": (f"{ONE}steps:\n  - quantize: {{}}\n    prune: {{}}", "line 8: a step is one verb"),
    "options in a list": (f"{ONE}steps:\n  - quantize: [int8]", "the options of 'quantize' are not 'name: "),
    "unknown verb": (f"{ONE}steps: [quantise]", "step 1: 'quantise' cannot be a step; did you mean 'quan"),
    "verb that writes nothing": (f"{ONE}steps: [eval]", "'eval' cannot be a step; it is one of trai"),
    "unknown option": (f"{ONE}steps:\n  - quantize: {{observr: mse}}", "(quantize): 'observr': is no opti"),
    "suggestion": (f"{ONE}steps:\n  - quantize: {{observr: mse}}", "did you mean 'observer'?"),
    "unknown for all": (f"sedd: 1\n{INT8}", "'sedd': is an option of no step here; did you mean 'seed'?"),
    "suggestion of today": (f"run: 1\n{INT8}", "an option of no step here; did you mean 'latency-runs'?"),
    "old and new": (f"runs: 1\n{INT8}", "'latency-runs': is another name of 'runs'; give one of the two"),
    "old and new in a step": (
        f"{ONE}steps:\n  - quantize: {{calib: digits, calibration: digits}}",
        "step 1 (quantize): 'calibration': is another name of 'calib'; give one of the two",
    ),
    "opposites": (
        f"{ONE}steps:\n  - prune: {{flops: 0.5, bn-recalibration: true, no-bn-recalibration: true}}",
        "'no-bn-recalibration': is another name of 'bn-recalibration'",
    ),
    "of no step": (f"flops: 0.5\n{INT8}", "'flops': is an option of no step here"),
    "ours": (f"{ONE}steps:\n  - quantize: {{output: x}}", "'output': is no option of quantize"),
    "of one command": (f"{ONE}steps:\n  - prune: {{curve: c.png}}", "'curve': is no option of prune"),
    "limit in a step": (f"{ONE}steps:\n  - quantize: {{max-drop: 1}}", "write it next to the steps"),
    "not a number": (f"{ONE}steps:\n  - prune: {{flops: half}}", "'flops': 'half' is neither"),
    "wrong for all": (f"seed: -1\n{INT8}", "r.yaml: 'seed': must be at least 0"),
    "no truth": (f"{ONE}steps:\n  - quantize: {{skip-first: yes}}", "'skip-first': is either true or false"),
    "no value": (f"{ONE}steps:\n  - quantize: {{observer: }}", "'observer': needs a value"),
    "two values": (f"{ONE}steps:\n  - quantize: {{observer: [mse, minmax]}}", "'observer': takes one value"),
    "what the command checks": (f"{ONE}steps:\n  - prune: {{flops: 0.5, epochs: 1}}", "(prune): --epochs: "),
    "what the config checks": (f"{ONE}steps:\n  - prune: {{flops: 7}}", "step 1 (prune): 'flops': must be"),
    "no target": (f"{ONE}steps: [prune]", "step 1 (prune): nothing says how m"),
    "no output": ("steps: [quantize]", "output: there is no file to write"),
    "output is a folder": ("output: ..\nsteps: [quantize]", "output: name a file"),
    "no checkpoint": ("output: o\nsteps: [quantize]", "there is no checkpoint to start from"),
    "checkpoint missing": ("checkpoint: none.pth\noutput: o\nsteps: [quantize]", "checkpoint: there is no "),
    "data missing": (f"data: idx:none\n{INT8}", "'data': idx:none: there is no none"),
    "data of a step": (
        f"{ONE}steps:\n  - quantize: {{calibration: digts}}",
        "step 1 (quantize): 'calibration'"),
    "limit without a baseline": (
        "output: o\nmax-drop: 1\nsteps:\n  - train: {train: digits, arch: net.py:make}",
        "eval: --target-model: o is the baseline itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "line"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_before_anything_is_done(text, line, here, modelopt):
    Path("r.yaml").unlink()
    if text is not None:
        Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = sorted(here.iterdir())
    outcome = modelopt("run", "r.yaml")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome.err
    assert line in outcome.err
    assert sorted(here.iterdir()) == before


def test_a_setting_that_comes_twice_has_two_values(here, modelopt):
    text = f"{ONE}steps:\n  - quantize: {{scheme: int8-weight, include: other}}"
    lines = lines_of(modelopt, text, "--set", "quantize.include=a*", "--set", "1.include=b")
    assert "--include 'a*' --include b" in lines[0]
    assert "other" not in lines[0]


def test_all_that_is_wrong_is_reported_together(here, modelopt):
    settings = ["1.epochs=x", "1.lrr=1", "2.structure=odd", "3.observer=mes", "seed=-1", "9.x=1", "nothing"]
    outcome = modelopt("run", "r.yaml", *(word for setting in settings for word in ("--set", setting)))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    for part in (
        "step 1 (train): 'epochs': 'x' is not an integer",
        "step 1 (train): 'lrr': is no option of train; did you mean 'lr'?",
        "step 2 (prune): 'structure': 'odd' is not one of",
        "step 3 (quantize): 'observer': 'mes' is not one of ",
        "'seed': must be at least 0",
        "--set: no step is called '9'; give its number, 1 to 3",
        "--set: 'nothing' is not [STEP.]KEY=VALUE",
    ):
        assert part in outcome.err
    assert outcome.err.count("'seed'") == 1  # once, not for every step


def test_a_verb_that_two_steps_have_does_not_name_one(here, modelopt):
    text = f"{ONE}steps:\n  - prune: {{sparsity: 0.1}}\n  - prune: {{sparsity: 0.2}}\n"
    Path("r.yaml").write_text(text)
    outcome = modelopt("run", "r.yaml", "--set", "prune.sparsity=0.5")
    assert "--set: more than one step is called 'prune'; give its number, 1 to 2" in outcome.err
    first, second = lines_of(modelopt, text, "--set", "2.sparsity=0.5")[1:3]
    assert ("--sparsity 0.1" in first, "--sparsity 0.5" in second) == (True, True)


@pytest.mark.slow
def test_only_the_last_file_is_held_against_the_limits(here, modelopt):
    outcome = modelopt("run", "r.yaml", "--json")
    pruned, small = (against["ratio"] for against in json.loads(outcome.out)["comparisons"])
    assert 1 < pruned < small
    between = f"min-ratio={(pruned + small) / 2}"
    assert modelopt("run", "r.yaml", "--resume", "--set", between).code == 0
    outcome = modelopt("run", "r.yaml", "--resume", "--set", "min-ratio=50", "--export", "t.json")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith("error: small.safetensors: min-ratio ")
    assert "2-prune.safetensors: min-ratio" not in outcome.err
    assert len(json.loads(Path("t.json").read_text())["models"]) == 3
    assert all(Path(path).exists() for path in FILES)


@pytest.mark.slow
def test_finished_steps_are_not_repeated(here, modelopt):
    assert modelopt("run", "r.yaml", "--resume").code == 0  # nothing there: it just starts
    before, bytes_before = written(), digests(*FILES)
    outcome = modelopt("run", "r.yaml")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "holds the steps of an earlier run; go on with --resume, or start over with --force" in outcome.err
    outcome = modelopt("run", "r.yaml", "--resume", "--set", "limit=50")  # measures otherwise, does the same
    assert outcome.code == 0
    assert outcome.err.count(" is finished: ") == 3
    assert written() == before
    outcome = modelopt("run", "r.yaml", "--force", "-q")
    assert (outcome.code, outcome.err) == (0, "")
    assert not set(written()) & set(before)
    assert digests(*FILES) == bytes_before


def redone(modelopt, *argv: str) -> list[bool]:
    """Resume, and say of each file whether it was written anew."""
    before = written()
    outcome = modelopt("run", "r.yaml", "--resume", "--force", *argv)
    assert outcome.code == 0, outcome.err
    return [old != new for old, new in zip(before, written(), strict=True)]


@pytest.mark.slow
def test_what_changed_is_done_again_and_what_follows(here, modelopt, monkeypatch):
    assert modelopt("run", "r.yaml").code == 0
    outcome = modelopt("run", "r.yaml", "--resume", "--set", "2.lr=0.01")
    assert outcome.code == 2  # the output is there already, and nothing has been done
    assert outcome.err.splitlines()[-1].startswith("error: small.safetensors: already exists")
    assert redone(modelopt) == [False, False, False]
    assert redone(modelopt, "--set", "2.lr=0.01") == [False, True, True]
    assert redone(modelopt, "--set", "2.lr=0.01", "--set", "3.skip-first=false") == [False, False, True]
    Path(FILES[1]).write_bytes(Path(FILES[0]).read_bytes())  # a whole file, but not the one that was made
    assert redone(modelopt, "--set", "2.lr=0.01", "--set", "3.skip-first=false") == [False, True, True]
    monkeypatch.setattr("modelopt_cli.cli.recipe.record.__version__", "9")
    assert redone(modelopt, "--set", "2.lr=0.01", "--set", "3.skip-first=false") == [True, True, True]


def test_another_checkpoint_under_the_same_name_starts_over(here, good_files, modelopt):
    Path("r.yaml").write_text(INT8)
    assert modelopt("run", "r.yaml").code == 0
    before = digests("o.safetensors")
    assert " is finished: " in modelopt("run", "r.yaml", "--resume").err
    shutil.copy(good_files / "seven.pth", "net.pth")
    Path("net.py").write_text(Path("net.py").read_text().replace("num_classes=10", "num_classes=7"))
    outcome = modelopt("run", "r.yaml", "--resume", "--force")
    assert outcome.code == 0
    assert " is finished: " not in outcome.err
    assert digests("o.safetensors") != before


@pytest.mark.parametrize("path", [FILES[0], FILES[2]], ids=["step", "output"])
@pytest.mark.parametrize("argv", [[], ["--resume"]], ids=["run", "resume"])
def test_files_of_others_are_not_replaced(path, argv, here, modelopt):
    Path("small.steps").mkdir()
    Path(path).write_text("mine")
    outcome = modelopt("run", "r.yaml", *argv)
    assert outcome.code == 2
    assert f"{path}: already exists" in outcome.err
    assert Path(path).read_text() == "mine"
    assert not Path("small.steps/2-prune.safetensors").exists()


def test_the_checkpoint_is_never_written(here, modelopt):
    Path("small.steps").mkdir()
    shutil.copy("net.pth", FILES[1])
    before = digests(FILES[1])
    outcome = modelopt("run", "r.yaml", "--checkpoint", FILES[1], "--force")
    assert outcome.code == 2
    assert digests(FILES[1]) == before


def test_a_step_that_fails_says_which_it_was(here, modelopt):
    outcome = modelopt("run", "r.yaml", "--set", "2.lr=1e30")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].endswith("; this was step 2 of 3 (prune)")
    assert not Path("small.safetensors").exists()
    outcome = modelopt("run", "r.yaml", "--resume")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count(" is finished: ") == 1


@pytest.mark.parametrize(
    ("damage"), ["", "{}", '{"steps":[{"command":1}]}'], ids=["empty", "no-steps", "types"]
)
def test_a_damaged_record_is_one_line(damage, here, modelopt):
    Path("small.steps").mkdir()
    Path("small.steps/recipe.json").write_text(damage)
    outcome = modelopt("run", "r.yaml", "--resume")
    assert (outcome.code, outcome.err) == (
        2,
        "error: small.steps/recipe.json: is damaged; start over with --force\n",
    )


def test_two_do_not_run_in_one_folder(here, modelopt):
    Path("small.steps").mkdir()
    lock = Lock(Path("small.steps/lock"))
    outcome = modelopt("run", "r.yaml", "--resume")
    lock.release()
    assert outcome.code == 2
    assert "small.steps: another run is at work here" in outcome.err


def test_not_under_torchrun(here, modelopt, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = modelopt("run", "r.yaml")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "run the lines that --dry-run prints" in outcome.err


def test_ctrl_c_in_a_step_without_training_says_how_to_go_on_too(here, modelopt, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    Path("r.yaml").write_text(INT8)
    with monkeypatch.context() as patch:
        patch.setattr(api, "execute", interrupted)
        outcome = modelopt("run", "r.yaml", "-q")
    line = "error: interrupted; this was step 1 of 1 (quantize); go on with the same command and --resume\n"
    assert (outcome.code, outcome.err) == (130, line)
    assert modelopt("run", "r.yaml", "--resume").code == 0


@pytest.mark.slow
def test_ctrl_c_in_the_middle_goes_on_to_the_same_bytes(here, environ, modelopt):
    long = ["--set", "2.epochs=12"]
    assert modelopt("run", "r.yaml", *long, "-q").code == 0
    whole = digests(*FILES)
    shutil.rmtree("small.steps")
    Path("small.safetensors").unlink()
    command = [sys.executable, "-m", "modelopt_cli", "run", "r.yaml", "-q", *long]
    child = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not Path("small.steps/2-prune.run/state.safetensors").exists():
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    how = "go on with the same command and --resume (small.steps/2-prune.run)"
    assert (child.returncode, out) == (130, "")
    assert err == f"error: interrupted; {how}; this was step 2 of 3 (prune)\n"
    first = Path(FILES[0]).stat().st_ino
    outcome = modelopt("run", "r.yaml", "--resume", "--set", "2.epochs=13")
    assert outcome.code == 2  # a training is not thrown away for a change of mind
    assert "was begun otherwise: " in outcome.err
    outcome = modelopt("run", "r.yaml", "--resume", *long)
    assert outcome.code == 0, outcome.err
    assert first == Path(FILES[0]).stat().st_ino
    assert digests(*FILES) == whole


@pytest.mark.assets
@pytest.mark.skipif(not (ROOT / "assets").is_dir(), reason="needs `make assets`")
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_the_recipes_of_the_project_are_fine(name, tmp_path, modelopt, monkeypatch):
    monkeypatch.chdir(ROOT)
    outcome = modelopt("run", f"configs/{name}", "--dry-run", "-o", tmp_path / "small.safetensors")
    assert outcome.code == 0, outcome.err
