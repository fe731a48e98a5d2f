"""Tokenizers of Hugging Face folders: from a text to token ids."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modelopt_cli.errors import DataError, EnvironmentFailure
from modelopt_cli.regular import read_regular
from modelopt_cli.text import first_line

TOKENIZER = "tokenizer.json"
_CONFIG, _TYPES = "tokenizer_config.json", "token_type_ids"
_INSTALL = "pip install 'modelopt-cli[hf]'"
_PADDING = ("[PAD]", "<pad>")
Text = tuple[str, str | None]
"""A text, and a second one where the two are one sample."""


class Tokenizer(NamedTuple):
    """A tokenizer of the tokenizers library, and what fills up a sample.

    Attributes:
        own: the library's object.
        padding: token id behind the end of a text.
        typed: False where all tokens are of the first type, as a network has it that is given no types.
    """

    own: Any
    padding: int
    typed: bool = True

    def encode(self, text: Text, length: int) -> dict[str, Tensor]:
        """Token ids ``(length,)``, the mask of those that are there, and the number of the text of each.

        Longer texts are cut, of two the longer first; what marks their ends stays.
        """
        self.own.enable_truncation(length)
        made = self.own.encode(*text)
        parts = {
            "input_ids": (made.ids, self.padding),
            "attention_mask": (made.attention_mask, 0),
            _TYPES: (made.type_ids if self.typed else [], 0),
        }
        return {name: _filled(values, length, filling) for name, (values, filling) in parts.items()}

    def lengths(self, texts: tuple[Text, ...]) -> list[int]:
        """Number of tokens of each text, with those that mark its ends."""
        self.own.no_truncation()
        return [len(self.own.encode(*text).ids) for text in texts]


def _filled(values: list[int], length: int, filling: int) -> Tensor:
    return torch.tensor([*values, *[filling] * (length - len(values))], dtype=torch.int64)


@lru_cache(maxsize=4)
def lengths_of(tokenizer: Tokenizer, texts: tuple[Text, ...]) -> list[int]:
    """Lengths, as :meth:`Tokenizer.lengths`, that are kept: a command opens its data several times."""
    return tokenizer.lengths(texts)


def load_tokenizer(place: str) -> Tokenizer:
    """The tokenizer in a folder, or of a ``tokenizer.json``.

    A folder without that file, of an older network, is read by transformers, which runs no code of it.

    Raises:
        DataError: there is none, or it cannot be used.
        EnvironmentFailure: a package is missing, or the file cannot be read.
    """
    folder = Path(place)
    path = folder if folder.is_file() else folder / TOKENIZER
    if path.is_file():
        return _of_text(_read(path), _padding_said(path.parent))._replace(typed=_is_typed(path.parent))
    if not folder.is_dir():
        raise DataError("no such folder", where=place, hint="name the folder of a tokenizer")
    return _of_text(_converted(folder), _padding_said(folder))._replace(typed=_is_typed(folder))


def _read(path: Path) -> str:
    try:
        return read_regular(path, DataError).decode()
    except OSError as error:
        raise EnvironmentFailure(f"cannot be read ({error.strerror})", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8 text", where=str(path)) from error


@lru_cache(maxsize=4)
def _of_text(text: str, padding: tuple[str | int, ...]) -> Tokenizer:
    """A tokenizer of the JSON of one; the same for the same text."""
    try:
        import tokenizers
    except ImportError as error:
        missing = f"texts need the optional package tokenizers ({first_line(error)})"
        raise EnvironmentFailure(missing, hint=_INSTALL) from error
    try:
        own = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise DataError(f"is no tokenizer: {first_line(error)}", where=TOKENIZER) from error
    inside = [own.padding["pad_id"]] if own.padding else []
    own.no_padding()
    known = [own.token_to_id(each) if isinstance(each, str) else each for each in (*padding, *_PADDING)]
    return Tokenizer(own, next((each for each in (*inside, *known) if each is not None), 0))


def _converted(folder: Path) -> str:
    """The JSON of a tokenizer that is only there as files of words."""
    if not any((folder / name).is_file() for name in (_CONFIG, "config.json")):
        hint = f"it should have a {TOKENIZER}"
        raise DataError("holds no tokenizer", where=str(folder), hint=hint)
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        missing = f"has no {TOKENIZER}, and reading its words needs the optional package transformers"
        raise EnvironmentFailure(missing, where=str(folder), hint=_INSTALL) from error
    try:
        made = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        words, text = (
            set(made.get_vocab()) - set(made.all_special_tokens),
            str(made.backend_tokenizer.to_str()),
        )
    except Exception as error:  # any files, any class of tokenizers
        problem = f"its tokenizer cannot be read: {first_line(error)}"
        raise DataError(problem, where=str(folder), hint=f"save it as a {TOKENIZER}") from error
    if not words:  # transformers makes one of special tokens alone where there are no files of words
        hint = f"it should have a {TOKENIZER}, or the files of words of its class"
        raise DataError("its tokenizer knows no word", where=str(folder), hint=hint)
    return text


def _padding_said(folder: Path) -> tuple[str | int, ...]:
    """The padding token, by its text or number, as far as the folder's files name it."""
    token = _object(folder / _CONFIG).get("pad_token")
    number = _object(folder / "config.json").get("pad_token_id")
    text = token.get("content") if isinstance(token, dict) else token
    return tuple(each for each in (text, number) if isinstance(each, str | int) and each != -1)


def _is_typed(folder: Path) -> bool:
    """False where the folder leaves the types of tokens out of what its network is given."""
    names = _object(folder / _CONFIG).get("model_input_names")
    return not isinstance(names, list) or _TYPES in names


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DataError("is not valid JSON", where=str(path)) from error
    return value if isinstance(value, dict) else {}
