"""``text:FILE``: texts of a table or of lines, as the token ids that a network takes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelopt_cli.data.csv_columns import Labels, Table, labels_of
from modelopt_cli.data.csv_file import LABELS, read_lines
from modelopt_cli.data.data_spec import DataSpec, column, columns, whole_number
from modelopt_cli.data.source import Raw, Source
from modelopt_cli.data.targets import RawTarget
from modelopt_cli.data.tokenizer import Text, Tokenizer, lengths_of, load_tokenizer
from modelopt_cli.errors import DataError
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.regular import read_regular
from modelopt_cli.text import short

TEXTS = ("text", "sentence", "sentence1", "text1", "question1", "premise", "review", "content")
SECOND = ("pair", "textpair", "sentence2", "text2", "question2", "hypothesis")
SCORES = ("score", "similarity", "similarityscore", "cosine")
"""Usual names of columns, as those of a table of images."""
IDS = "input_ids"
_LONGEST = 512
_TABLES = {".csv": ",", ".tsv": "\t"}
_OBJECTS = (".jsonl", ".ndjson", ".json")
_KINDS = {
    list: "a list, not a text or a number",
    dict: "an object, not a text or a number",
    type(None): "null",
}


class TextSource(Source):
    """Texts, each a sample of token ids, mask and types, all ``(length,)``.

    Args:
        name: the spec.
        texts: in the order of the samples.
        labels: one for each, or the reason why there are none.
        rows: where each text stands, for messages.
        tokenizer: makes ids of them.
        length: tokens of a sample.
    """

    ready = True
    tokenized = True

    def __init__(
        self,
        name: str,
        texts: Sequence[Text],
        labels: Sequence[RawTarget] | DataError,
        rows: Sequence[str],
        tokenizer: Tokenizer,
        length: int,
    ) -> None:
        self.name, self.texts, self.labels, self.rows = name, texts, labels, rows
        self.tokenizer, self.length = tokenizer, length

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        """The file and the line."""
        return self.rows[index]

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The tokens of a text, and its label."""
        labels = self.labels
        target = labels if isinstance(labels, DataError) else labels[index]
        return self.tokenizer.encode(self.texts[index], self.length), target


def open_texts(spec: DataSpec, network: InputSpec | None, seed: int) -> Source:
    """Open ``text:FILE?tokenizer=FOLDER``: a CSV, TSV or JSONL with a column of texts, or lines of text.

    Args:
        spec: ``text``, ``pair``, ``label`` and ``score`` name columns, and ``length`` the tokens of a sample.
        network: its inputs, as far as they are known, which say how long a sample is.
        seed: of no concern here.

    Raises:
        DataError: the file, a column or the tokenizer cannot be used.
    """
    path = Path(spec.target)
    table = _table(path)
    texts, labels = _columns(spec, table)
    rows = [table.where(line) for line, _ in table.lines]
    if labels.task == "embed":  # the two texts of a row are two samples
        texts = [(text, None) for both in texts for text in both if text is not None]
        rows = [row for row in rows for _ in range(2)]
    place = str(spec.option("tokenizer"))
    if not place:
        raise DataError("no tokenizer is given", where=spec.text, hint="add ?tokenizer=FOLDER")
    tokenizer = load_tokenizer(place)
    lengths = lengths_of(tokenizer, tuple(texts))
    if 0 in lengths:
        raise DataError("the tokenizer makes no token of it", where=rows[lengths.index(0)])
    length = _length(spec, network, max(lengths))
    source = TextSource(spec.text, texts, labels.values, rows, tokenizer, length)
    source.labelled = labels.values != [None] * len(table.lines)
    source.task, source.class_names, source.num_classes = labels.task, labels.names, labels.count
    if longer := sum(each > length for each in lengths):
        are = "text is" if longer == 1 else "texts are"
        source.notes = (f"{longer} of {len(texts)} {are} longer than {length} tokens, and cut",)
    return source


def _length(spec: DataSpec, network: InputSpec | None, longest: int) -> int:
    """Tokens of a sample: as asked, as the network has it or, where it may be shorter, as the data need."""
    if asked := whole_number(spec, "length"):
        return asked
    named = {each.name: each for each in network.tensors} if network is not None else {}
    ids = named.get(IDS, network)
    if ids is None or len(ids.shape) != 1:
        return min(longest, _LONGEST)
    return min(longest, ids.shape[0]) if 0 in ids.free else ids.shape[0]


def _columns(spec: DataSpec, table: Table) -> tuple[list[Text], Labels]:
    """The texts and the labels of the rows."""
    names = {option: column(spec, option) for option in ("text", "pair", "score", "label")}
    usual = {"text": TEXTS, "pair": SECOND, "score": SCORES, "label": LABELS}
    for option, name in names.items():
        taken = [each for each in names.values() if each]
        try:
            names[option] = name or table.usual(usual[option], taken) or ""
        except DataError as error:
            raise DataError(error.message, where=error.where, hint=f"say which: ?{option}=NAME") from None
    firsts = [cell for _, cell in table.cells(names["text"] or "text")]
    seconds = [cell for _, cell in table.cells(names["pair"])] if names["pair"] else [None] * len(firsts)
    texts = list(zip(firsts, seconds, strict=True))
    if names["score"] and (names["pair"] or spec.option("score")):
        return texts, _scores(table, names)
    if not names["label"]:
        return texts, Labels([None] * len(texts))
    labels = labels_of(table, columns(spec, "label") or [names["label"]])
    return texts, Labels(labels.values, labels.names, labels.count, labels.task or "text")


def _scores(table: Table, names: dict[str, str]) -> Labels:
    """Likeness of the two texts of each row, the target of both."""
    if not names["pair"]:
        raise DataError("a score is of two texts", where=str(table.path), hint="name the second: ?pair=NAME")
    try:
        scores = table.numbers([names["score"]])[:, 0]
    except DataError as error:
        return Labels(error, task="embed")
    return Labels([{"pair": n, "score": s} for n, s in enumerate(scores) for _ in range(2)], task="embed")


def _table(path: Path) -> Table:
    """The rows of a file by the names of their columns; lines of text are a column of that name."""
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return Table(path, read_lines(path, _TABLES[suffix]))
    lines = [(number, line.strip()) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not lines:
        raise DataError("holds no text", where=str(path), hint="its lines are empty")
    if suffix not in _OBJECTS:
        return Table(path, [(0, [TEXTS[0]]), *((number, [line]) for number, line in lines)])
    return _table_of_objects(path, lines)


def _lines(path: Path) -> list[str]:
    try:
        return read_regular(path, DataError).decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(error.strerror or "cannot be read", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error})", where=str(path)) from None


def _table_of_objects(path: Path, lines: Sequence[tuple[int, str]]) -> Table:
    """JSON objects, one on each line, as a table with the columns of all of them."""
    objects = [(number, _object(line, f"{path} line {number}")) for number, line in lines]
    names = list(dict.fromkeys(name for _, each in objects for name in each))
    rows = [(number, [_cell(each.get(name)) for name in names]) for number, each in objects]
    unusable = {
        (number, name): _KINDS[type(value)]
        for number, each in objects
        for name, value in each.items()
        if type(value) in _KINDS
    }
    return Table(path, [(0, names), *rows], unusable)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError("is not a JSON object", where=where) from None
    if not isinstance(value, dict):
        raise DataError("is not a JSON object", where=where)
    for name, each in value.items():
        if not (_is_unicode(name) and _is_unicode(_cell(each))):
            problem = f"{short(name)} holds half of a character, an escape from \\ud800 to \\udfff by itself"
            raise DataError(problem, where=where, hint="write both halves, or leave it out")
    return value


def _is_unicode(text: str) -> bool:
    """False of text with a lone surrogate, which JSON may hold, and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _cell(value: Any) -> str:
    """A value as a cell; one that no column of ours has is left out."""
    if isinstance(value, bool):
        return str(int(value))
    return str(value).strip() if isinstance(value, str | int | float) else ""
