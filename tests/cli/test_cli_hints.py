"""What hints tell to do can be done: the options they name exist, on that command, and take those values."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import modelopt_cli
from modelopt_cli.cli import main as command_line
from modelopt_cli.data import config as values
from modelopt_cli.errors import a_or_an
from modelopt_cli.settings import naming_flags, option

SOURCE = Path(modelopt_cli.__file__).parent
OF_ONE = {
    "methods/quantize/": "quantize", "methods/prune/": "prune", "methods/share/": "share",
    "api/distilling.py": "distill", "api/students.py": "distill", "api/teachers.py": "distill",
    "methods/distill/": "distill", "api/training.py": "train", "cli/inspect.py": "inspect",
    "measure/gates.py": "eval", "cli/run.py": "run", "cli/recipe/execute.py": "run",
}  # fmt: skip
# Other verbs use these too.
SHARED = {"methods/quantize/qat.py", "methods/prune/apply.py", "methods/distill/derived_student.py"}
PROSE = {"or", "and", "with", "to", "is", "as", "for", "in", "out", "keeps", "shows", "names", "that", "what"}


def hints() -> Iterator[tuple[str, str]]:
    """Every text that is handed to ``hint=``, or that a name or a function with ``hint`` in it holds."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "hint":
                yield from ((name, text) for text in texts(node.value))
            if isinstance(node, ast.Assign) and "hint" in ast.unparse(node.targets[0]).lower():
                yield from ((name, text) for text in texts(node.value))
            if isinstance(node, ast.FunctionDef) and "hint" in node.name:
                returned = [each for each in ast.walk(node) if isinstance(each, ast.Return)]
                yield from ((name, text) for each in returned for text in texts(each))


def texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            part.value if isinstance(part, ast.Constant) else value_of(part) for part in node.values
        )
    elif (spelled := option_of(node)) is not None:
        yield spelled
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def value_of(part: ast.AST) -> str:
    """Text of an f-string's part: an option as it is spelled, any other value as {}."""
    match part:
        case ast.Constant(text):
            return str(text)
        case ast.FormattedValue(value=value):
            return option_of(value) or "{}"
    return "{}"


def option_of(node: ast.AST) -> str | None:
    """The option on the command line that a call of ``option`` names, a value that is not known as {}."""
    match node:
        case ast.Call(func=ast.Name("option"), args=[ast.Constant(name), *given]):
            values = [each.value if isinstance(each, ast.Constant) else None for each in given]
            with naming_flags():
                unknown = " {}" * (values == [None])
                return option(str(name), *values) + unknown
    return None


@pytest.fixture(scope="module")
def options():
    """By command, the options by name."""
    commands = command_line.build().commands
    return {name: {o: p for p in c.params for o in p.opts + p.secondary_opts} for name, c in commands.items()}


def command_of(name: str) -> str | None:
    if name in SHARED:
        return None
    return next((verb for start, verb in OF_ONE.items() if name.startswith(start)), None)


FOUND = sorted({(name, text) for name, text in hints() if re.search(r"(?<![\w-])--[a-z]", text)})


def test_there_are_hints_to_look_at():
    assert len(FOUND) > 60
    assert any("--input-shape 3x224x224" in text for _, text in FOUND)


@pytest.mark.parametrize(("name", "text"), FOUND, ids=[f"{n}: {t[:60]}" for n, t in FOUND])
def test_the_options_of_a_hint_are_there_and_take_its_values(name, text, options):
    verb = command_of(name)
    asked = [verb] if verb else list(options)
    for flag, value in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)(?: ([^\s,;:()]+))?", text):
        known = [options[each][flag] for each in asked if flag in options[each]]
        assert known, f"{flag} is no option of {verb or 'any command'}"
        choices = {choice for parameter in known for choice in (parameter.metavar or "").split("|")}
        if value in PROSE:
            continue
        if flag == "--input-shape" and value:
            values.parse_inputs([value])
        elif len(choices) > 1 and value and "{" not in value:
            assert value in choices, f"{flag} takes one of {choices}"


def test_a_student_that_is_not_recognised_asks_for_its_own_option(here, modelopt):
    torch.save({"odd.weight": torch.ones(2, 2)}, "odd.pth")
    teacher = ["distill", "net.pth", "--arch", "net.py:make", "--input-shape", "1x8x8"]
    train = ["--train", "digits", "--epochs", "1", "--no-eval"]
    outcome = modelopt(*teacher, "--student", "odd.pth", *train, "-o", "s.safetensors")
    assert outcome.code == 2
    assert "--student-arch" in outcome.err
    assert "--arch" not in outcome.err.replace("--student-arch", "")


def test_a_student_of_other_channels_is_told_what_can_be_done(here, modelopt):
    teacher = ["distill", "net.pth", "--arch", "net.py:make", "--input-shape", "1x8x8"]
    train = ["--train", "digits", "--epochs", "1", "--no-eval", "-o", "s.safetensors"]
    outcome = modelopt(*teacher, "--student", "builtin:resnet8?in_channels=3&width=0.25", *train)
    assert outcome.code == 2, outcome.err
    assert "gets where --student names none" in outcome.err
    outcome = modelopt(*teacher, "--student", "builtin:resnet8?width=0.25", *train, "--dry-run")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("argparse.Namespace", "an argparse.Namespace"),
        ("Linear", "a Linear"),
        ("int", "an int"),
        ("OrderedDict", "an OrderedDict"),
        ("uint8", "a uint8"),
        ("", "a "),
    ],
)
def test_articles(word, told):
    assert a_or_an(word) == told


TWO = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x, mask):
        return self.fc(x) * mask

class Keyword(Two):
    def forward(self, x, *, mask):
        return self.fc(x) * mask

class Optional(Two):
    def forward(self, x, mask=None, **more):
        return self.fc(x)

class Pair(Two):
    def forward(self, x):
        return {"logits": self.fc(x), "features": x}

class Odd(Two):
    def forward(self, x):
        return torch.special.bessel_j0(self.fc(x) + 0 * self.fc.weight.sum())
"""


@pytest.mark.parametrize(
    ("net", "why"),
    [
        ("Two", "the network needs 2 inputs (x, mask), and 1 is described"),
        ("Keyword", "the network needs 2 inputs (x, mask), and 1 is described"),
        ("Optional", None),
        ("Odd", "calls torch.special_bessel_j0, which a Program cannot hold"),
    ],
)
def test_why_a_network_has_no_graph_is_said_in_plain_words(net, why, tmp_path, monkeypatch, modelopt):
    monkeypatch.chdir(tmp_path)
    Path("two.py").write_text(TWO)
    torch.save(torch.nn.Module.state_dict(torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 4)})), "fc.pth")
    how = ["fc.pth", "--arch", f"two.py:{net}", "--input-shape", "8", "--no-eval"]
    outcome = modelopt("quantize", *how, "--scheme", "int8-weight", "-o", "a.safetensors")
    assert outcome.code == 0
    assert ("works without a graph" in outcome.err) == (why is not None)
    assert (why or "wrote") in outcome.err
    outcome = modelopt("prune", *how, "--sparsity", "0.5", "-o", "b.safetensors")
    if why is not None:
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert why in outcome.err
        assert "TypeError" not in outcome.err


def test_eval_says_nothing_of_working_before_it_fails(tmp_path, monkeypatch, modelopt):
    monkeypatch.chdir(tmp_path)
    Path("two.py").write_text(TWO)
    torch.save(torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 4)}).state_dict(), "fc.pth")
    outcome = modelopt("eval", "fc.pth", "--arch", "two.py:Two", "--input-shape", "8", "--latency-runs", "0")
    assert outcome.code == 2
    assert "works without a graph" not in outcome.err


def test_a_hint_inside_a_recipe_says_where_options_go(here, modelopt):
    (here / "r.yaml").write_text(
        "checkpoint: net.pth\noutput: o.safetensors\narch: net.py:make\nlatency-runs: 0\nsteps:\n"
        "- prune: {structure: channels, sparsity: 0.5, criterion: l2}\n"
    )
    outcome = modelopt("run", "r.yaml")
    assert outcome.code == 2, outcome.err
    assert "--input-shape" in outcome.err
    assert "options of a step stand in the recipe, or behind --set prune.NAME=VALUE" in outcome.err
    followed = modelopt(
        "run", "r.yaml", "--force", "--set", "prune.input-shape=1x8x8", "--set", "prune.round-to=1"
    )
    assert followed.code in (0, 1), followed.err
