"""all-MiniLM-L6-v2, a BERT that makes vectors of sentences, and sentences."""

import re
from pydoc_data import topics

import torch
from torch import Tensor

from benchmarks.real import ASSETS, Samples

FOLDER = ASSETS / "minilm"
LENGTH = 48
SENTENCE = r"[A-Z][^.;:]{30,200}[.;:]"


def sentences(test: bool = True) -> Samples:
    """Token ids with their mask, ``(48,)`` each, and the float network's mean state over the tokens."""
    return _embedded(texts()[test:160:2])


def training(n: int = 1200) -> Samples:
    """Sentences of Python's own manual, and their vectors."""
    manual = re.sub(r"[*`\s]+", " ", " ".join(topics.topics.values()))
    found = list(dict.fromkeys(re.findall(SENTENCE, manual)))
    return _embedded(found[:: max(1, len(found) // n)][:n])


def _embedded(sentences: list[str]) -> Samples:
    """Token ids with their mask, and the float network's vectors."""
    from transformers import BertModel

    network = BertModel.from_pretrained(FOLDER).eval()
    ids, masks = tokens(sentences)
    batches = zip(ids.split(32), masks.split(32), strict=True)
    with torch.inference_mode():
        states = torch.cat([network(*batch).last_hidden_state for batch in batches])
    wanted = (states * masks[..., None]).sum(1) / masks.sum(1, keepdim=True)
    names = ("input_ids", "attention_mask", "token_type_ids")
    rows = zip(ids, masks, torch.zeros_like(ids), strict=True)
    return Samples([dict(zip(names, row, strict=True)) for row in rows], list(wanted.clone()))


def texts() -> list[str]:
    """Sentences of the licences."""
    whole = [path.read_text() for path in sorted((ASSETS / "licenses").glob("*/LICENSE*"))]
    found = re.findall(SENTENCE, re.sub(r"\s+", " ", " ".join(whole)))
    return list(dict.fromkeys(found))


def tokens(sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and masks, ``(N, 48)``."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(str(FOLDER / "vocab.txt"), lowercase=True)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch(sentences)
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])
