"""One declaration of an option: checks, command line, environment, older spellings, completion, schema."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import torch
import yaml

from modelopt_cli.artifact.reader import open_artifact
from modelopt_cli.checkpoint import resolve
from modelopt_cli.checkpoint.builtin import BUILTINS
from modelopt_cli.checkpoint.fingerprint import torchvision_inputs
from modelopt_cli.cli import main as wiring
from modelopt_cli.cli.completion import architectures, layer_names
from modelopt_cli.cli.groups import Signature, nearest_option, signature_of
from modelopt_cli.cli.main import build, main
from modelopt_cli.errors import UsageError
from modelopt_cli.settings import (
    Config,
    Setting,
    fields_of,
    fraction,
    help_of,
    naming_flags,
    option,
    problems,
)

ROOT = Path(__file__).parents[2]
COLOURS = {"red": "like blood", "green": "like grass"}


@dataclass(frozen=True)
class Paint(Config, title="Painting"):
    colour: Annotated[str, Setting("Colour of it.", choices=COLOURS)] = "red"
    coats: Annotated[int, Setting("Coats of it.", least=1, most=3, advanced=True)] = 1
    share: Annotated[float, Setting("Part that is painted.", above=0, parse=fraction)] = 1.0
    name: Annotated[str | None, Setting("Name of it.", flags=("-n", "--called"), older=("--name",))] = None
    walls: Annotated[tuple[str, ...], Setting("Walls; may be repeated.", metavar="GLOB")] = ()
    dry: Annotated[bool | None, Setting("Let it dry.", default="in summer")] = None
    wet: Annotated[bool, Setting("Paint it wet.", shared=True)] = False
    inner: int = 0

    def conflicts(self):
        if self.wet and self.dry:
            yield f"{option('wet')} excludes {option('dry')}"


def paint(console, method: Paint):
    """Paint."""


SIGNATURE = Signature("paint", paint)


def read(environ=None, monkeypatch=None, **texts):
    notes = []
    for name, value in (environ or {}).items():
        monkeypatch.setenv(name, value)
    found = SIGNATURE.arguments(texts, environment=environ is not None, notes=notes)
    return found["method"], notes


def test_a_config_tells_everything_that_is_wrong():
    with pytest.raises(UsageError) as caught:
        Paint(colour="gren", coats=4, share=0.0, walls=("a", 1))
    assert str(caught.value) == (
        "colour: 'gren' is not one of red, green; did you mean 'green'?; "
        "coats: must be at least 1 and at most 3, not 4; share: must be above 0, not 0; "
        "walls: holds 1, which is not a text"
    )


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"coats": True}, "coats: True is not an integer"),
        ({"coats": "two"}, "coats: 'two' is not an integer"),
        ({"share": float("nan")}, "share: nan is not a finite number"),
        ({"colour": 7}, "colour: 7 is not a text"),
        ({"wet": True, "dry": True}, "wet excludes dry"),
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_refused(values, line):
    with pytest.raises(UsageError, match=f"^{re.escape(line)}$"):
        Paint(**values)


def test_messages_name_arguments_in_python_and_flags_on_the_command_line():
    config = object.__new__(Paint)
    for field in fields_of(Paint):
        object.__setattr__(config, field.name, field.initial)
    object.__setattr__(config, "name", 3)
    assert problems(config) == ["called: 3 is not a text"]
    with naming_flags():
        assert problems(config) == ["--called: 3 is not a text"]
        assert option("max_drop") == "--max-drop"


def test_a_list_is_as_good_as_a_tuple_and_json_gets_one():
    assert Paint(walls=["a", "b"]).walls == ("a", "b")
    assert json.loads(json.dumps(Paint(walls=("a",)).as_dict()))["walls"] == ["a"]


def test_texts_become_values_and_what_is_not_given_the_default():
    method, notes = read(colour="green", share="30%", walls=["a", "b"], dry=False, called="x")
    assert method == Paint(colour="green", share=0.3, walls=("a", "b"), dry=False, name="x")
    assert (read()[0], notes) == (Paint(), [])


def test_all_wrong_texts_are_told_together():
    with pytest.raises(UsageError) as caught:
        read(colour="blue", coats="0", share="half")
    assert [line.partition(":")[0] for line in str(caught.value).split("; ")] == [
        "--colour",
        "--coats",
        "--share",
    ]


def test_only_what_is_a_setting_is_an_option():
    assert list(SIGNATURE.fields) == [
        *("colour", "coats", "share", "called", "walls", "dry", "wet"),
        *("quiet", "debug", "json"),
    ]
    assert SIGNATURE.fields["dry"].spellings == ("--dry", "--no-dry")


def test_the_environment_sets_what_the_command_line_does_not(monkeypatch):
    environ = {
        "MODELOPT_PAINT_COLOUR": "green",
        "MODELOPT_PAINT_COATS": "2",
        "MODELOPT_PAINT_WALLS": "a 'b c'",
        "MODELOPT_WET": "true",
        "MODELOPT_PAINT_DRY": "0",
    }
    method, _ = read(environ, monkeypatch, coats="3")
    assert method == Paint(colour="green", coats=3, walls=("a", "b c"), wet=True, dry=False)
    method, _ = read({"MODELOPT_PAINT_WET": "false"}, monkeypatch)
    assert not method.wet  # that of the command goes before the shared one
    monkeypatch.setenv("MODELOPT_PAINT_COATS", "many")
    with pytest.raises(UsageError, match=r"^MODELOPT_PAINT_COATS: 'many' is not an integer$"):
        read({}, monkeypatch)


def test_a_recipe_s_step_takes_nothing_from_the_environment(monkeypatch):
    monkeypatch.setenv("MODELOPT_PAINT_COATS", "2")
    assert SIGNATURE.arguments({}, environment=False, notes=[])["method"].coats == 1


def test_an_older_spelling_works_with_a_note():
    method, notes = read(called_older="x")
    assert method.name == "x"
    assert notes == ["--name is now --called; the next version takes only that"]


def test_two_spellings_of_one_option_are_refused():
    with pytest.raises(UsageError, match=r"^--name: is the older name of --called; give one of the two$"):
        read(called_older="x", called="y")


OLDER = [
    (["quantize", "a", "--calib", "d"], "--calibration"),
    (["eval", "a", "--runs", "1"], "--latency-runs"),
    (["eval", "a", "--batch-size", "1"], "--latency-batch-size"),
    (["eval", "a", "--warmup", "1"], "--latency-warmup"),
    (["train", "--train", "d", "--run", "r", "-o", "o.safetensors"], "--run-dir"),
    (["train", "--train", "d", "--views", "1", "-o", "o.safetensors"], "--augmentation-cycle"),
]


@pytest.mark.parametrize(("argv", "new"), OLDER, ids=[" ".join(argv) for argv, _ in OLDER])
def test_older_spellings_of_this_version(argv, new, here, capsys):
    main(argv)
    old = next(word for word in argv if word.startswith("--") and word != "--train")
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"{old} is now {new}; the next version takes only that"


UNKNOWN = [
    (["eval", "a", "--run", "0"], "--latency-runs"),  # nearest is --runs, an older name of it
    (["train", "--view", "1"], "--augmentation-cycle"),
    (["train", "--no-resum"], "--resume"),
    (["prune", "a", "--no-reestimat"], "--no-bn-recalibration"),
    (["quantize", "a", "--calibratio", "d"], "--calibration"),
]


@pytest.mark.parametrize(("argv", "new"), UNKNOWN, ids=[" ".join(argv) for argv, _ in UNKNOWN])
def test_a_hint_names_an_option_as_it_is_spelled_today(argv, new, modelopt):
    outcome = modelopt(*argv)
    wrong = next(word for word in argv if word.startswith("--"))
    assert (outcome.code, outcome.err) == (2, f"error: unknown option {wrong}; did you mean {new}?\n")


def test_no_hint_is_an_older_spelling(modelopt):
    """For each older spelling with a letter left out."""
    for verb, command in build().commands.items():
        known = signature_of(command).spellings()
        for old in {flag for field in known.values() for flag in field.older}:
            for at in range(3, len(old)):
                word = old[:at] + old[at + 1 :]
                if word not in known:
                    near = nearest_option(command, word)
                    assert near is None or near not in known[near].older, (verb, word)


def test_help_shows_what_matters_and_help_all_the_rest(modelopt):
    short, everything = (modelopt("prune", each).out for each in ("--help", "--help-all"))
    advanced = [f for f in signature_of(build().commands["prune"]).fields.values() if f.setting.advanced]
    assert len(advanced) > 10
    assert not [field.flag for field in advanced if f"  {field.flag} " in short]
    assert not [field.flag for field in advanced if field.flag not in everything]
    assert f"{len(advanced)} more options: modelopt prune --help-all" in short
    assert "--help-all" in short
    assert "more options" not in everything


def test_help_all_is_an_option_of_every_command_and_of_the_root(modelopt):
    everything = modelopt("--help-all")
    assert (everything.code, everything.err) == (0, "")
    assert modelopt("--help").out.strip() in everything.out
    for name, command in build().commands.items():
        short, long = (modelopt(name, each) for each in ("--help", "--help-all"))
        assert (long.code, long.err) == (0, "")
        assert long.out.strip() in everything.out
        hidden = any(field.setting.advanced for field in signature_of(command).fields.values())
        assert (short.out != long.out) is hidden


def test_help_imports_no_torch():
    code = "import sys; from modelopt_cli.cli.main import main; main(['prune', '--help-all'])"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def complete(*words):
    environ = {**os.environ, "_MODELOPT_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words)}
    environ["COMP_CWORD"] = str(len(words) - 1)
    done = subprocess.run(
        [sys.executable, "-m", "modelopt_cli"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.slow
def test_a_shell_completes_commands_after_help_and_never_fails():
    assert complete("modelopt", "help", "q") == ["quantize"]
    assert complete("modelopt", "--version", "q") == complete("modelopt", "--help-all", "q") == ["quantize"]
    assert complete("modelopt", "quantize", "--help-all", "--sch") == ["--scheme"]
    assert complete("modelopt", "quantize", "--no-such", "x", "") == []


def test_nothing_is_offered_where_completing_fails(monkeypatch, capsys):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setenv("_MODELOPT_COMPLETE", "complete_bash")
    monkeypatch.setattr(wiring, "build", fail)
    with pytest.raises(SystemExit):
        wiring.run()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_of_a_shell_is_all_that_is_shown(shell, modelopt, monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, shell))
    shown = modelopt("--show-completion")
    assert (shown.code, shown.err) == (0, "")
    assert f"_MODELOPT_COMPLETE=complete_{shell}" in shown.out
    assert modelopt("--show-completion", shell) == shown


def test_an_unknown_shell_is_the_environments_fault(modelopt, monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("dash", "dash"))
    assert (modelopt("--show-completion").code, modelopt("--install-completion").code) == (3, 3)


def test_a_shell_completes_commands_choices_and_layers(tmp_path):
    from safetensors.torch import save_file

    save_file({"body.fc.weight": torch.ones(2, 2), "body.fc.bias": torch.ones(2)}, tmp_path / "a.safetensors")
    assert complete("modelopt", "qua") == ["quantize"]
    assert complete("modelopt", "quantize", "--scheme", "int8-") == ["int8-dynamic", "int8-weight"]
    found = complete("modelopt", "prune", str(tmp_path / "a.safetensors"), "--exclude", "bo")
    assert found == ["body.fc"]


def in_fish(*words):
    environ = {**os.environ, "_MODELOPT_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environ["_TYPER_COMPLETE_ARGS"] = " ".join(words)
    command = [sys.executable, "-m", "modelopt_cli"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_shell_completes_architectures():
    """bash parts words at colons, and replaces what stands behind the last one; other shells do not."""
    assert complete("modelopt", "prune", "--arch", "buil") == [f"builtin:{name}" for name in BUILTINS]
    assert complete("modelopt", "prune", "--arch", "builtin", ":") == list(BUILTINS)
    found = complete("modelopt", "prune", "--arch", "torchvision", ":", "resnet1")
    assert found == ["resnet101", "resnet152", "resnet18"]
    assert complete("modelopt", "distill", "--student", "ti") == ["timm:"]
    assert complete("modelopt", "prune", "--arch", "builtin", ":", "lenet5", "--structur") == ["--structure"]
    assert in_fish("modelopt", "prune", "--arch", "builtin:resnet2") == ["builtin:resnet20"]


def test_architectures_are_those_there_are():
    known = {name.partition(":")[0]: set() for name in architectures()}
    for name in architectures():
        source, _, rest = name.partition(":")
        known[source].add(rest)
    assert known["builtin"] == BUILTINS.keys()
    assert known["torchvision"] == torchvision_inputs().keys()
    for name, shape in architectures().items():
        if shape[0].isdigit() and name.startswith("builtin:"):
            assert shape == "x".join(map(str, resolve(name).input.shape))


def test_completing_imports_no_torch():
    code = "import sys; from modelopt_cli.cli.completion import architectures; architectures()"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_layers_are_read_from_any_header(tmp_path, modelopt, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arch = "builtin:resnet8?width=0.25&in_channels=1"
    train = ["train", "--arch", arch, "--train", "digits", "--epochs", "1", "--no-eval", "-q"]
    assert modelopt(*train, "--seed", "1", "-o", "a.safetensors").code == 0
    assert modelopt("share", "a.safetensors", "--bits", "3", "--no-eval", "-o", "s.safetensors").code == 0
    for name in ("a.safetensors", "s.safetensors"):
        with open_artifact(Path(name)) as artifact:
            weights = [p.name for p in artifact.document.parameters if p.name.endswith(".weight")]
        assert sorted(layer_names(Path(name))) == sorted(each.removesuffix(".weight") for each in weights)
    Path("no.pth").write_bytes(b"\xff" * 100)
    assert layer_names(Path("no.pth")) == layer_names(Path("none")) == []


def fits(value, schema):
    """Whether a value keeps a JSON schema, of the keywords that the recipe's has."""
    kinds = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool}
    if "anyOf" in schema and not any(fits(value, each) for each in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    names = schema.get("type", [])
    for name in [names] if isinstance(names, str) else names:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and (name == "number" or (name == "integer" and value == int(value))):
            break
        if name in kinds and isinstance(value, kinds[name]):
            break
    else:
        if names:
            return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        if not value.keys() >= set(schema.get("required", ())):
            return False
        return all(name in known and fits(each, known[name]) for name, each in value.items())
    if isinstance(value, list) and "items" in schema:
        return len(value) >= schema.get("minItems", 0) and all(fits(each, schema["items"]) for each in value)
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    limits = (("minimum", float.__ge__), ("exclusiveMinimum", float.__gt__))
    limits += (("maximum", float.__le__), ("exclusiveMaximum", float.__lt__))
    return value is None or all(
        holds(float(value), float(schema[name])) for name, holds in limits if name in schema
    )


def plain(node):
    """A recipe as JSON: numbers and truths are such, ``2:4`` is a text."""
    if isinstance(node, dict):
        return {name: plain(each) for name, each in node.items()}
    if isinstance(node, list):
        return [plain(each) for each in node]
    try:
        return json.loads(node)
    except ValueError:
        return node or None


@pytest.fixture(scope="module")
def schema():
    import io

    from modelopt_cli.cli.console import Console

    stdout, group = io.StringIO(), build()
    from modelopt_cli.cli.recipe.commands import Commands
    from modelopt_cli.cli.recipe.schema import recipe_schema

    console = Console(stdout=stdout)
    console.result_json(recipe_schema(Commands(group.commands, console)))
    return json.loads(stdout.getvalue())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_schema_takes_the_recipes_that_are_here(path, schema):
    assert fits(plain(yaml.load(path.read_text(), Loader=yaml.BaseLoader)), schema)


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"steps": []},
        {"steps": ["quantise"]},
        {"steps": [{"quantize": {"scheme": "int9"}}]},
        {"steps": [{"quantize": {"sheme": "int8"}}]},
        {"steps": [{"prune": {"structure": "2:"}}]},
        {"steps": [{"prune": {"flops": 1.5}}]},
        {"steps": [{"prune": {"rounds": 0}}]},
        {"steps": [{"quantize": {}, "prune": {}}]},
        {"steps": ["quantize"], "seed": -1},
        {"steps": ["quantize"], "sceme": "int8"},
    ],
    ids=str,
)
def test_the_schema_refuses_what_run_refuses(recipe, schema):
    assert not fits(recipe, schema)
    assert fits(
        {"steps": ["quantize", {"prune": {"structure": "2:4", "criterion": "obs"}}], "seed": 1}, schema
    )


def test_the_schema_is_printed(modelopt):
    outcome = modelopt("run", "--schema")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out)["title"] == "modelopt recipe"


@pytest.mark.parametrize("command", list(build().commands))
def test_help_of_an_option_can_be_read_alone(command):
    for field in signature_of(build().commands[command]).fields.values():
        assert re.match(r"[A-Z][^\n]*\.$", field.setting.help), field.flag
        for name, row in (field.setting.choices or {}).items():
            assert re.match(r"[^\n]+[^.\n]$", help_of(row)), f"{field.flag} {name}"
