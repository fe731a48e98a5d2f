"""Tables whose columns are named: several labels, numbers, and inputs that are numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modelopt_cli.data import Data, open_data
from modelopt_cli.errors import DataError
from modelopt_cli.tasks import parse_task

TABLE = """file,cat,dog,age,kind,name,x,y
a.png,1,0,3,2,tom,0.5,-1
b.png,0,0,4.5,0,rex,1e2,7
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for place, name in enumerate(("a.png", "b.png")):
        Image.new("L", (4, 4), place).save(tmp_path / name)
    path = tmp_path / "t.csv"
    path.write_text(TABLE)
    return path


def opened(path: Path, options: str, task: str | None = None) -> Data:
    data = open_data(f"csv:{path}?{options}", labels=False)
    return parse_task(task or data.source.task or "classify").read_targets(data)


CASES: dict[str, tuple[str, str | None, Any]] = {
    "several labels": ("labels=cat,dog", "multilabel", [[1, 0], [0, 0]]),
    "a number": ("labels=age", "regress", [[3], [4.5]]),
    "several numbers": ("labels=age,x,y", "regress", [[3, 0.5, -1], [4.5, 100, 7]]),
    "integers": ("labels=cat,kind", "regress", [[1, 2], [0, 0]]),
    "a class": ("labels=kind", None, [2, 0]),
    "a class by name": ("labels=name", None, [1, 0]),
}


@pytest.mark.parametrize(("options", "task", "targets"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("inputs", ["", "&inputs=x,age"], ids=["images", "numbers"])
def test_columns_are_labels_of_any_form(
    table: Path, options: str, task: str | None, targets: Any, inputs: str
) -> None:
    data = opened(table, options + inputs)
    assert data.source.task == task
    x, y = next(data.batches(2))
    assert y.tolist() == targets
    wanted = torch.tensor([[0.5, 3], [100, 4.5]]) if inputs else torch.arange(2).view(2, 1, 1, 1) / 255
    assert torch.equal(x, wanted.expand_as(x))


def test_a_column_of_classes_may_be_taken_for_numbers_or_for_one_class_each(table: Path) -> None:
    assert next(opened(table, "labels=kind", "regress").batches(2))[1].tolist() == [[2], [0]]
    data = opened(table, "labels=cat,dog")
    assert data.class_names == ("cat", "dog")
    assert data.num_classes == 2


def test_what_is_not_named_has_its_usual_name(table: Path) -> None:
    table.write_text(TABLE.replace("kind", "label"))
    assert next(opened(table, "inputs=x").batches(2))[1].tolist() == [2, 0]
    table.write_text(TABLE.replace("file", "where"))
    assert opened(table, "path=where&labels=kind").source.where(0) == f"{table.parent}/a.png ({table} line 2)"


def test_inputs_without_labels_have_none(table: Path) -> None:
    data = open_data(f"csv:{table}?inputs=x,y", labels=False)
    assert not data.labelled
    assert next(data.batches(2))[0].tolist() == [[0.5, -1], [100, 7]]


BAD = {
    "NaN": ("labels=age", ("4.5", "nan"), "line 3: age is 'nan', not a finite number"),
    "infinity": ("labels=age,x", ("1e2", "inf"), "line 3: x is 'inf', not a finite number"),
    "text": ("labels=age", ("4.5", "old"), "line 3: age is 'old', not a finite number"),
    "underscore": (
        "labels=age",
        ("4.5", "4_5"),
        "line 3: age is '4_5', not a finite number; write it as 1000",
    ),
    "underscore in inputs": ("inputs=y", ("1e2,7", "1e2,7_0"), "line 3: y is '7_0', not a finite number"),
    "digits of another script": (
        "inputs=y",
        ("1e2,7", "1e2,\u0667"),
        "not a finite number; write it as 1000",
    ),
    "class in digits of another script": (
        "labels=kind",
        ("0,rex", "\uff10,rex"),
        "line 3: label '\uff10' is not an integer from 0 as others are",
    ),
    "classes in digits of another script": (
        "",
        (TABLE, "path,label\na.png,\uff11\n"),
        "line 2: label '\uff11' is not an integer; write it with the digits 0 to 9",
    ),
    "class with an underscore": (
        "",
        (TABLE, "path,label\na.png,1_0\n"),
        "line 2: label '1_0' is not an integer; write it with the digits 0 to 9",
    ),
    "no name": ("labels=", ("", ""), "labels is empty; name a column: ?labels=NAME"),
    "no name of one": ("labels=cat,,dog", ("", ""), "labels has an empty name: 'cat,,dog'"),
    "name twice": ("labels=y,x,y", ("", ""), "labels names 'y' twice; name each column once"),
    "input twice": ("inputs=y,y", ("", ""), "inputs names 'y' twice"),
    "nothing": ("labels=cat,dog", ("0,0,4.5", "0,,4.5"), "line 3: dog is empty"),
    "short row": ("labels=x,y", (",1e2,7", ",1e2"), "line 3: y is empty"),
    "decimal comma": (
        "inputs=x&labels=y",
        ("1e2,7", "1e2,7,5"),
        "line 3: has 9 cells, 1 more than the first line; quote a cell that holds commas",
    ),
    "one cell too many and empty": ("labels=y", ("1e2,7", "1e2,7,"), "line 3: has 9 cells, 1 more"),
    "cell too many without options": ("", (TABLE, "path,label\na.png,1,5\n"), "line 2: has 3 cells, 1 more"),
    "cell too many without a header": ("", (TABLE, "a.png,1\nb.png,1,5\n"), "line 2: has 3 cells, 1 more"),
    "unclosed quote": (
        "labels=kind",
        ("1,0,3,2,tom", '1,0,3,2,"tom'),
        "line 2: has a quote that is not closed; close it",
    ),
    "unclosed quote in a row of several lines": (
        "labels=kind",
        ("1,0,3,2,tom", '"1","0\n",3,2,"tom'),
        "line 3: has a quote that is not closed; close it",
    ),
    "quote that ends before its cell": (
        "labels=kind",
        ("3,2,tom", '"3"3,2,tom'),
        "line 2: is no CSV (',' expe",
    ),
    "input": ("inputs=x&labels=kind", ("0.5", "NaN"), "line 2: x is 'NaN', not a finite number"),
    "no such column": ("labels=aeg", ("", ""), "t.csv: has no columns called 'aeg'; did you mean 'age'"),
    "column twice": (
        "labels=dog",
        ("cat,dog", "dog,dog"),
        "t.csv: has 2 columns called 'dog'; give each its",
    ),
    "two inputs": ("inputs=x&path=file", ("", ""), "has more than one input"),
    "no file": ("labels=kind", ("b.png", "c.png"), "line 3: no such file"),
    "no rows": ("labels=kind", (TABLE, "kind\n"), "holds no rows"),
}


@pytest.mark.parametrize(("options", "spoil", "part"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_told_in_one_line(
    table: Path, options: str, spoil: tuple[str, str], part: str
) -> None:
    table.write_text(TABLE.replace(*spoil) if spoil[0] else TABLE)
    with pytest.raises(DataError) as caught:
        opened(table, options)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_last_column_of_all_lines_is_none(table: Path) -> None:
    table.write_text(TABLE.replace("\n", ",\n"))
    assert next(opened(table, "inputs=x&labels=y").batches(2))[1].tolist() == [[-1], [7]]


@pytest.mark.parametrize("cell", ["7", "-7", "+.5", "7.", "0.07", "1E-2", "007"])
def test_numbers_as_files_have_them(table: Path, cell: str) -> None:
    table.write_text(TABLE.replace("1e2", cell))
    assert next(opened(table, "inputs=y&labels=x,y").batches(2))[1][1, 0] == torch.tensor(float(cell))


def test_labels_that_are_not_read_may_be_anything(table: Path) -> None:
    table.write_text(TABLE.replace("4.5", "nan"))
    data = open_data(f"csv:{table}?inputs=x&labels=age", labels=False)
    assert next(data.batches(2))[1].tolist() == [-1, -1]
