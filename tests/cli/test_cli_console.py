"""The console: what goes where, in which form."""

import io
import json

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from modelopt_cli.cli.console import Console
from modelopt_cli.text import printable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make(terminal: bool = False, **environ: str) -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
    return Console(out, err, {"TERM": "xterm", "COLUMNS": "40", **environ}), out, err


def table(cell: str = "x" * 300) -> Table:
    made = Table()
    made.add_column("name", style="red")
    made.add_row(Text(cell))
    return made


def test_result_on_stdout_and_the_rest_on_stderr():
    console, out, err = make()
    console.verbosity = 1
    console.result("answer")
    console.note("note")
    console.detail("detail")
    console.error("bad")
    assert out.getvalue() == "answer\n"
    assert err.getvalue() == "note\ndetail\nerror: bad\n"


def test_details_need_verbose_and_quiet_keeps_only_errors():
    console, out, err = make()
    console.detail("detail")
    assert err.getvalue() == ""
    console.quiet, console.verbosity = True, 1
    console.result("answer")
    console.note("note")
    console.detail("detail")
    console.error("bad")
    assert (out.getvalue(), err.getvalue()) == ("answer\n", "error: bad\n")


def test_no_terminal_means_plain_text_at_full_width():
    console, out, _ = make()
    console.result(table())
    assert "x" * 300 in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert not any(line.endswith(" ") for line in out.getvalue().splitlines())


def test_a_terminal_gets_colour_and_its_own_width():
    console, out, _ = make(terminal=True)
    console.result(table())
    assert "\x1b[31m" in out.getvalue()
    assert "x" * 50 not in out.getvalue()


@pytest.mark.parametrize(
    ("terminal", "environ", "coloured"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colour(terminal, environ, coloured):
    console, out, err = make(terminal, **environ)
    console.result(table("short"))
    console.error("bad")
    assert ("\x1b" in out.getvalue()) == coloured
    assert ("\x1b" in err.getvalue()) == coloured


@pytest.mark.parametrize(
    "name", ["[/foo]", "[red]x", "a\x1b[2Jb", "a\rb", "a\x07", "\u202egnp", "\x9b31m", "\udce9", ":smile:"]
)
@pytest.mark.parametrize("wrap", [str, Text, table], ids=["str", "Text", "table"])
def test_names_from_files_cannot_move_the_cursor(name, wrap):
    console, out, _ = make()
    console.result(wrap(name))
    # rich's Text itself drops a few controls (bell, carriage return); none may arrive as it was.
    assert all(char == "\n" or char.isprintable() for char in out.getvalue())
    if name.isprintable():
        assert name in out.getvalue()


FORGED = "w\nwrote out.safetensors (12 bytes)\r\u2028\u202eerror: none"


@pytest.mark.parametrize("wrap", [str, Text, table, lambda x: Group(x, nested(table(x)))])
@pytest.mark.parametrize("terminal", [True, False])
def test_names_from_files_cannot_forge_a_line(wrap, terminal):
    console, out, _ = make(terminal, COLUMNS="400")
    console.result(wrap(FORGED))
    assert not any(line.startswith(("wrote", "error")) for line in out.getvalue().splitlines())


def nested(inside):
    outside = Table()
    outside.add_column("name\nforged")
    outside.add_row(inside)
    return outside


def test_printable_keeps_ordinary_text():
    assert printable("café ‑ 模型 [x]") == "café ‑ 模型 [x]"
    assert printable("a\tb\nc") == "a\\tb\\nc"


def test_a_narrow_encoding_loses_nothing_and_raises_nothing():
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, "ascii"), io.StringIO(), {})
    console.result(table("é"))
    assert b"\\xe9" in raw.getvalue()
    assert b"\\u" not in raw.getvalue()  # the frame is drawn with ASCII


def test_json_is_one_object_and_refuses_nan():
    console, out, _ = make(terminal=True)
    console.result_json({"a": [1, None], "name": "\x1b é"})
    assert json.loads(out.getvalue()) == {"a": [1, None], "name": "\x1b é"}
    assert "\x1b" not in out.getvalue()
    console, out, _ = make()
    with pytest.raises(ValueError, match="Out of range float"):
        console.result_json({"a": float("nan")})
    assert out.getvalue() == ""


def test_a_failing_renderable_leaves_nothing_half_printed():
    class Breaks(Table):
        def __rich_console__(self, console, options):
            yield Text("first")
            raise RuntimeError("second")

    console, out, _ = make()
    with pytest.raises(RuntimeError, match="second"):
        console.result(Breaks())
    assert out.getvalue() == ""


def test_a_stderr_nobody_reads_does_not_end_the_work():
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    console = Console(io.StringIO(), Closed(), {})
    console.note("lost")
    console.error("lost")


@pytest.mark.parametrize(
    ("terminal", "quiet", "drawn"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_progress_is_drawn_only_for_a_terminal(terminal, quiet, drawn):
    console, out, err = make(terminal)
    console.quiet = quiet
    with console.progress() as progress:
        progress("calibrating", 0, None)
        progress("calibrating", 3, 10)
        progress("evaluating\x1b[2J", 1, 1)
        console.note("a note meanwhile")
    console.note("and after")
    assert out.getvalue() == ""
    assert ("calibrating" in err.getvalue()) == drawn
    assert ("\x1b[" in err.getvalue()) == drawn
    assert "evaluating\x1b[2J" not in err.getvalue()
    assert ("a note meanwhile" in err.getvalue()) == (not quiet)
    assert ("and after" in err.getvalue()) == (not quiet)


def test_forced_colour_draws_no_progress_into_a_file():
    console, _, err = make(FORCE_COLOR="1")
    with console.progress() as progress:
        progress("calibrating", 1, 2)
    assert err.getvalue() == ""


def test_a_closed_stdout_is_no_error():
    console = Console(io.StringIO(), io.StringIO(), {})
    console._stdout = None
    console.result("nobody hears this")
