"""Texts as data: columns, tokens, lengths, and what cannot be read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modelopt_cli.data import Data, open_data
from modelopt_cli.data.raw_inputs import check_input
from modelopt_cli.errors import DataError, EnvironmentFailure
from modelopt_cli.program import InputSpec
from modelopt_cli.tasks import parse_task

tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "d")
PAD, CLS, SEP, UNK, A, B, C, D = range(8)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tokenizer of words, which marks beginnings and ends as BERT's does."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    made.enable_padding(pad_id=PAD, pad_token="[PAD]", length=50)  # what the file itself asks for is not done
    (tmp_path / "bert").mkdir()
    made.save(str(tmp_path / "bert" / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(text: str, options: str = "", name: str = "a.csv", **how: Any) -> Data:
    Path(name).write_text(text)
    return open_data(f"text:{name}?tokenizer=bert{options}", labels=False, **how)


def batch(data: Data, count: int = 4) -> dict[str, list[Any]]:
    inputs, _ = next(data.batches(count))
    assert isinstance(inputs, dict)
    return {name: each.tolist() for name, each in inputs.items()}


def targets(data: Data) -> Any:
    assert data.source.task is not None
    return next(parse_task(data.source.task).read_targets(data).batches(8))[1]


FORMS = {
    "a.csv": "text,label\na b,1\n\"c, z\",0\n",
    "a.tsv": "label\ttext\n1\ta b\n0\tc, z\n",
    "a.jsonl": '{"text": "a b", "label": 1, "more": [1]}\n\n{"label": 0, "text": "c, z"}\n',
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_texts_and_labels(name: str) -> None:
    data = opened(FORMS[name], name=name)
    assert data.source.task == "text"
    assert batch(data) == {
        "input_ids": [[CLS, A, B, SEP, PAD], [CLS, C, UNK, UNK, SEP]],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        "token_type_ids": [[0] * 5] * 2,
    }
    assert targets(data).tolist() == [1, 0]


def test_lines_of_text_are_their_own_targets() -> None:
    data = opened("a b\n\nc\n", name="a.txt")
    assert data.source.task is None
    assert not data.labelled
    read = parse_task("language").read_targets(data)
    assert next(read.batches(4))[1].tolist() == [[CLS, A, B, SEP], [CLS, C, SEP, -100]]


def test_two_texts_are_one_sample() -> None:
    data = opened("premise,hypothesis,label\na b,c,yes\na,d d,no\n")
    assert batch(data)["input_ids"] == [[CLS, A, B, SEP, C, SEP], [CLS, A, SEP, D, D, SEP]]
    assert batch(data)["token_type_ids"] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert data.class_names == ("no", "yes")
    assert targets(data).tolist() == [1, 0]


@pytest.mark.parametrize("names", [["input_ids", "attention_mask"], ["input_ids", "token_type_ids"], None])
def test_types_of_tokens_are_there_where_the_folder_gives_them_to_its_network(names: Any) -> None:
    """Compared with transformers; left out, the network takes zeros."""
    transformers = pytest.importorskip("transformers", reason="the optional package transformers is missing")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    Path("bert/tokenizer_config.json").write_text(
        json.dumps({**config, "model_input_names": names} if names else {"tokenizer_class": "BertTokenizer"})
    )
    made = batch(opened("premise,hypothesis,label\na b,c,yes\na,d d,no\n"))
    theirs = transformers.AutoTokenizer.from_pretrained("bert", local_files_only=True)
    expected = theirs(["a b", "a"], ["c", "d d"])
    assert made["input_ids"] == expected["input_ids"]
    assert made["token_type_ids"] == expected.get("token_type_ids", [[0] * 6] * 2)


def test_two_texts_with_a_score_are_two_samples() -> None:
    data = opened("sentence1,sentence2,score\na b,c,0.5\na,d,4\n")
    assert batch(data)["input_ids"] == [
        [CLS, A, B, SEP],
        [CLS, C, SEP, PAD],
        [CLS, A, SEP, PAD],
        [CLS, D, SEP, PAD],
    ]
    read = targets(data)
    assert read["pair"].tolist() == [0, 0, 1, 1]
    assert read["score"].tolist() == [0.5, 0.5, 4, 4]
    assert data.source.where(3) == "a.csv line 3"


def test_columns_by_name_and_numbers_as_labels() -> None:
    data = opened("id,review,stars\n7,a,1.5\n8,b,3\n", "&text=review&label=stars")
    assert data.source.task == "regress"
    assert targets(data).flatten().tolist() == [1.5, 3]


IDS = InputSpec((6,), dtype="int64", name="input_ids")


@pytest.mark.parametrize(
    ("spec", "options", "length"),
    [
        (IDS, "", 6),
        (replace(IDS, free=(0,)), "", 4),
        (replace(IDS, shape=(3,), free=(0,)), "", 3),
        (replace(IDS, shape=(3,)), "", 3),
        (replace(IDS, free=(0,)), "&length=5", 5),
        (replace(IDS, name="x"), "", 6),
    ],
)
def test_a_sample_is_as_long_as_the_network_or_the_data_want(
    spec: InputSpec, options: str, length: int
) -> None:
    data = opened("text\na b\n", options, input_spec=spec)
    inputs, _ = next(data.batches(1))
    ids = [CLS, A, B, SEP] if length > 3 else [CLS, A, SEP]  # what marks the end stays
    assert isinstance(inputs, torch.Tensor)
    assert inputs.tolist() == [[*ids, *[PAD] * (length - len(ids))]]
    cut = ("1 of 1 text is longer than 3 tokens, and cut",)
    assert data.notes == (cut if length == 3 else ())


def test_inputs_go_by_the_networks_names() -> None:
    mask = InputSpec((4,), dtype="bool", name="attention_mask")
    data = opened("text\na b\na\n", input_spec=replace(IDS, shape=(4,), others=(mask,)))
    inputs, _ = next(data.batches(2))
    assert isinstance(inputs, dict)
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert inputs["attention_mask"].tolist() == [[True] * 4, [True] * 3 + [False]]


def test_ids_that_the_network_does_not_know() -> None:
    with pytest.raises(
        DataError,
        match=r"a.csv line 2: input input_ids holds index 7, outside the 7 rows of .* embedding, 0 to 6",
    ) as caught:
        opened("text\nd\n", input_spec=replace(IDS, below=7))
    assert "give the tokenizer" in str(caught.value)
    opened("text\nd\n", input_spec=replace(IDS, below=8))


def test_an_index_outside_an_embedding_needs_no_tokenizer_where_no_text_is() -> None:
    ids = InputSpec((2,), dtype="int64", name="ids", below=20)
    with pytest.raises(DataError, match="input ids holds index 25, outside the 20 rows of") as caught:
        check_input(torch.tensor([1, 25]), ids, ready=True)
    assert "tokenizer" not in str(caught.value)
    with pytest.raises(DataError, match=r"input ids holds index -1, .* give indices that it was trained"):
        check_input(torch.tensor([-1, 3]), ids, ready=True)


@pytest.mark.parametrize(
    ("said", "padding"),
    [
        ({"tokenizer_config.json": {"pad_token": "d"}}, D),
        ({"tokenizer_config.json": {"pad_token": {"content": "c"}}}, C),
        ({"config.json": {"pad_token_id": 5}}, B),
        ({}, PAD),
    ],
)
def test_the_token_that_fills_up(said: dict[str, Any], padding: int, here: Path) -> None:
    path = here / "bert" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding": None}))
    for name, content in said.items():
        (here / "bert" / name).write_text(json.dumps(content))
    assert batch(opened("text\na b\na\n"))["input_ids"][1] == [CLS, A, SEP, padding]


def test_a_tokenizer_of_words_alone(here: Path) -> None:
    """As older folders have it: transformers makes the tokenizer of it, and is the reference."""
    transformers = pytest.importorskip("transformers", reason="the optional package is not installed")
    (here / "old").mkdir()
    (here / "old" / "vocab.txt").write_text("\n".join([*WORDS, "##d", "e"]))
    (here / "old" / "config.json").write_text('{"model_type": "bert"}')
    own = transformers.BertTokenizer.from_pretrained(str(here / "old"))
    wanted = own(["A bd", "e"], padding=True)["input_ids"]
    (here / "a.csv").write_text("text\nA bd\ne\n")
    data = open_data("text:a.csv?tokenizer=old")
    assert batch(data)["input_ids"] == wanted == [[CLS, A, B, 8, SEP], [CLS, 9, SEP, PAD, PAD]]


def test_a_folder_without_words(here: Path) -> None:
    """transformers makes a tokenizer of it, which takes every word for an unknown one."""
    pytest.importorskip("transformers", reason="the optional package is not installed")
    (here / "bare").mkdir()
    (here / "bare" / "config.json").write_text('{"model_type": "bert"}')
    (here / "a.csv").write_text("text\nA bd\ne\n")
    with pytest.raises(
        DataError, match=r"bare: its tokenizer knows no word; it should have a tokenizer\.json"
    ):
        open_data("text:a.csv?tokenizer=bare")


NOT_READ = {
    "no file": (None, "", "a.csv: no such file"),
    "no rows": ("text\n", "", "holds no rows"),
    "nothing": ("", "", "holds no rows"),
    "another column": ("txt,label\na,1\n", "", "no columns called 'text'; did you mean 'txt'"),
    "semicolons": ("text;label\na, b;1\n", "", "a.csv: has semicolons between its columns, not commas"),
    "unknown column": ("text,label\na,1\n", "&label=stars", "no columns called 'stars'"),
    "two columns": ("review,content\na,b\n", "", r"may mean .* say which: \?text=NAME"),
    "an empty text": ("text,label\na,1\n ,0\n", "", "a.csv line 3: text is empty"),
    "an empty label": ("text,label\na,1\na,\n", "", "label is empty"),
    "a score of one text": ("text,score\na,1\n", "&score=score", r"name the second: \?pair=NAME"),
    "a score that is none": ("text,pair,score\na,b,much\n", "", "score is 'much', not a finite number"),
    "a length": ("text\na\n", "&length=-1", "length is -1, not an integer"),
    "a comma in a text": (
        "text,label\na, b,1\n",
        "",
        "a.csv line 2: has 3 cells, 1 more than the first line",
    ),
    "a length of nothing": ("text\na\n", "&length=0", "length is 0, not an integer above 0; give 1 to"),
    "a column without name": ("text,label\na,1\n", "&text=", r"text is empty; name a column: \?text=NAME"),
    "no labels": ("text,label\na,1\n", "&label=", "label is empty; name a column"),
    "a label twice": ("text,label\na,1\n", "&label=label,label", "label names 'label' twice"),
    "no option": ("text\na\n", "&lenght=9", "no option 'lenght'"),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_what_cannot_be_read(kind: str) -> None:
    text, options, words = NOT_READ[kind]

    def read() -> None:
        targets(opened(text, options) if text is not None else open_data("text:a.csv?tokenizer=bert"))

    with pytest.raises(DataError, match=words) as caught:
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": ["good"]}', r"a\.jsonl line 2: text is a list, not a text or a number"),
        ('{"text": {"en": "good"}}', "line 2: text is an object, not a text"),
        ('{"text": null}', "line 2: text is null"),
        ('{"text": ""}', "line 2: text is empty"),
        ("[1]", "line 2: is not a JSON object"),
        ("{", "line 2: is not a JSON object"),
        ("\udcff", "not UTF-8"),
        ('{"text": "a \\ud800"}', r"a.jsonl line 2: text holds half of a character"),
        ('{"text": "a", "\\ud800": "a"}', r"a.jsonl line 2: \\ud800 holds half of a character"),
    ],
)
def test_lines_that_are_no_objects(content: str, words: str, here: Path) -> None:
    (here / "a.jsonl").write_text('{"text": "a"}\n' + content, errors="surrogateescape")
    with pytest.raises(DataError, match=words):
        open_data("text:a.jsonl?tokenizer=bert")


def test_rows_of_tabs_with_a_cell_too_many_or_an_unclosed_quote() -> None:
    with pytest.raises(DataError, match=r"a\.tsv line 3: has 3 cells.*holds tabs"):
        opened("text\tlabel\na\t1\nb\tc\t0\n", name="a.tsv")
    with pytest.raises(DataError, match=r"a\.tsv line 2: has a quote that is not closed"):
        opened('text\tlabel\n"a\t1\nb\t0\n', name="a.tsv")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_lines_alone(name: str) -> None:
    with pytest.raises(DataError, match="holds no text; its lines are empty"):
        opened("\n \n", name=name)


def test_a_character_of_two_surrogates() -> None:
    data = opened('{"text": "a \\ud83d\\ude00"}\n', name="a.jsonl")
    assert batch(data)["input_ids"] == [[CLS, A, UNK, SEP]]


def test_a_tokenizer_that_cannot_be_used(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a.csv").write_text("text\na\n")
    for place, words in {
        "": "no tokenizer is given; add",
        "none": "no such folder",
        ".": "no tokenizer",
    }.items():
        with pytest.raises(DataError, match=words):
            open_data(f"text:a.csv?tokenizer={place}" if place else "text:a.csv")
    (here / "bert" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer"):
        open_data("text:a.csv?tokenizer=bert")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (here / "bert" / "tokenizer.json").write_text("[]")
    with pytest.raises(EnvironmentFailure, match=r"pip install 'modelopt-cli\[hf\]'"):
        open_data("text:a.csv?tokenizer=bert")
