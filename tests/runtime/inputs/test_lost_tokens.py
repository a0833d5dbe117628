"""Special tokens that the library does not find, or that it finds in plain text, are refused."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from moec.runtime.inputs.tokenizer import load_tokenizer
from tests.refusals import refusal

TOKENS = ["<|user|>", "</s>"]


def written(folder: Path, normalizer: normalizers.Normalizer, **how: bool) -> Path:
    """A tokenizer of whole words, whose special tokens the normalizer may change."""
    pieces = ["[UNK]", *"0123456789", "go", *TOKENS]
    held = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "[UNK]"))
    held.normalizer, held.pre_tokenizer = normalizer, pre_tokenizers.Whitespace()
    held.add_special_tokens([AddedToken(each, special=True, **how) for each in TOKENS])
    held.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("text", ["0 1 go", "9 1"])
def test_digits_are_no_special_tokens(text: str, tmp_path: Path) -> None:
    """The normalizer drops what is for private use, such as the marks in other names of tokens."""
    drops = normalizers.Replace(Regex(r"\p{C}"), "")
    tokenizer = load_tokenizer(written(tmp_path, drops, normalized=True))
    parts = [(True, "<|user|>"), (False, text), (True, "</s>")]
    refusal(lambda: tokenizer.encode_parts(parts, TOKENS), "special tokens")


def test_a_token_that_needs_space_around_it_is_not_lost(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(written(tmp_path, normalizers.NFC(), single_word=True))
    refusal(lambda: tokenizer.encode_parts([(False, "go"), (True, "</s>")], TOKENS), "special")
    assert tokenizer.encode_parts([(False, "go "), (True, "</s>")], TOKENS) == [11, 13]


def test_words_that_nobody_knows_are_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(written(tmp_path, normalizers.NFC()))
    parts = [(True, "<|user|>"), (False, "what 7"), (True, "</s>")]
    assert tokenizer.encode_parts(parts, [*TOKENS, "[UNK]"]) == [12, 0, 8, 13]
