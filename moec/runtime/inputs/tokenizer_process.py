"""What the child process of a tokenizer runs: it holds one tokenizer, and its streams."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from moec.runtime.inputs.chat import guarded, split
from moec.spec.errors import refuse


@dataclass(slots=True)
class _Held:
    """The tokenizer of this process, and its streams by number."""

    tokenizer: Tokenizer | None = None
    file: bytes = b""
    #: the tokenizer with other names for some tokens; these names; the tokens' ids; the mark in the
    #: names, the tokens
    renamed: Tokenizer | None = None
    names: dict[str, str] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    mark: tuple[str, frozenset[str]] = "", frozenset()
    streams: dict[int, DecodeStream] = field(default_factory=dict)


_HELD = _Held()


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turn what the library raises into a MoecError.

    The bindings raise a bare Exception, and a BaseException where Rust code panics.
    """
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        found = f"{type(error).__name__}: {error}" if type(error) is not Exception else error
        refuse(where, found, "a file of the tokenizers library", "download the file again")


def load(data: bytes, where: str) -> tuple[Any, bytes]:
    """Load the tokenizer whose file has the bytes `data`.

    The file may say how texts were cut and padded for training. That is no part of a prompt.
    """
    with _refusing(where):
        held = Tokenizer.from_buffer(data)
        held.no_truncation()
        held.no_padding()
        _HELD.tokenizer, _HELD.file, _HELD.mark = held, data, ("", frozenset())
    return None, b""


def _with_tokenizer(call: Callable[[Tokenizer], Any], where: str) -> tuple[Any, bytes]:
    assert _HELD.tokenizer is not None
    with _refusing(where):
        return call(_HELD.tokenizer), b""


def encode(data: bytes, where: str) -> tuple[Any, bytes]:
    """The ids of the text `data`, with those that the post-processor adds."""
    return _with_tokenizer(lambda held: list(held.encode(data.decode()).ids), where)


def encode_split(data: bytes, where: str) -> tuple[Any, bytes]:
    """The ids of a filled template, whose special tokens `split` finds; `data` is JSON."""
    given = json.loads(data)
    parts = split(given["text"], given["special"], given["marker"])
    return _of_parts(parts, frozenset(given["special"]), where)


def encode_parts(data: bytes, where: str) -> tuple[Any, bytes]:
    """The ids of `parts`, each [is a token, text]; `data` holds them as JSON, and the `tokens`."""
    given = json.loads(data)
    return _of_parts(given["parts"], frozenset(given["tokens"]), where)


def _of_parts(
    parts: Sequence[tuple[bool, str]], tokens: frozenset[str], where: str
) -> tuple[Any, bytes]:
    """The ids of parts of a text, each with whether it is one of `tokens`.

    Tokens in the text of other parts are text. The post-processor adds nothing. The whole text is
    encoded at once, so that what the library does at its start or beside a token happens there
    alone. Only the tokens have other names in it, which no part spells.
    """
    spelled = {character for _, text in parts for character in text}
    mark = next(each for each in map(chr, range(0xF0000, 0xFFFFE)) if each not in spelled)
    with _refusing(where):
        if _HELD.mark != (mark, tokens):
            _HELD.renamed, _HELD.names, _HELD.ids = _renamed(_HELD.file, mark, tokens)
            _HELD.mark = mark, tokens
        held, names = _HELD.renamed, _HELD.names
        assert held is not None
        text = "".join(names.get(text, text) if token else text for token, text in parts)
        ids = list(held.encode(text, add_special_tokens=False).ids)
        known = set(_HELD.ids.values())
        asked = [_HELD.ids[text] for token, text in parts if token and text in _HELD.ids]
        if [each for each in ids if each in known] != asked:
            raise ValueError("it does not find its special tokens within other text, or finds more")
        return ids, b""


def _renamed(
    file: bytes, mark: str, tokens: frozenset[str]
) -> tuple[Tokenizer, dict[str, str], dict[str, int]]:
    """The tokenizer in `file` with other names for added `tokens`, and these by the old ones.

    The names have `mark` in them, a character for private use. The third result has the ids of the
    tokens by the old names, but for that of unknown text, which any text may have.
    """
    raw = json.loads(file)
    special = [each for each in raw.get("added_tokens") or () if each["content"] in tokens]
    names = {each["content"]: f"{mark}{i}{mark}" for i, each in enumerate(special)}
    for each in special:
        each["content"] = names[each["content"]]
    model = raw["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):  # text does not become such a token by merging
        merges = [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]
        model["merges"] = [each for each in merges if not names.keys() & {*each, "".join(each)}]
    raw["post_processor"] = None
    held = Tokenizer.from_str(json.dumps(raw))
    held.no_truncation()
    held.no_padding()
    assert _HELD.tokenizer is not None
    ids = dict[str, int]()
    for old, new in names.items():
        number = held.token_to_id(new)
        if number is None or number != _HELD.tokenizer.token_to_id(old):
            raise ValueError(f"the id of {old} depends on its name")
        ids[old] = number
    unknown = held.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    unknown = model.get("unk_id") if unknown is None else unknown
    return held, names, {old: number for old, number in ids.items() if number != unknown}


def encode_filled(data: bytes, where: str) -> tuple[Any, bytes]:
    """The ids of the text `data`, a filled template: the post-processor adds nothing."""
    return _with_tokenizer(
        lambda held: list(held.encode(data.decode(), add_special_tokens=False).ids), where
    )


def special(data: bytes, where: str) -> tuple[Any, bytes]:
    """The text of each special token, and of other added tokens that the text `data` spells."""
    spelled = data.decode()
    return _with_tokenizer(
        lambda held: [
            each.content
            for each in held.get_added_tokens_decoder().values()
            if each.special or (each.content.strip() and each.content in spelled)
        ],
        where,
    )


def unknown(data: bytes, where: str) -> tuple[Any, bytes]:
    """The first token of the list `data`, as JSON, that the tokenizer does not have; or None."""
    return _with_tokenizer(
        lambda held: next((t for t in json.loads(data) if held.token_to_id(t) is None), None), where
    )


def guard(data: bytes, where: str) -> tuple[Any, bytes]:
    """What `guarded` makes of its arguments, which `data` holds as JSON."""
    return guarded(**json.loads(data)), b""


def normalises(_: bytes, where: str) -> tuple[Any, bytes]:
    """Whether text changes before tokens are looked for, so that other text may become a token."""
    return _with_tokenizer(lambda held: held.normalizer is not None, where)


def token_to_id(data: bytes, where: str) -> tuple[Any, bytes]:
    """The id of the token `data`, or None."""
    return _with_tokenizer(lambda held: held.token_to_id(data.decode()), where)


def decode_next(_: bytes, where: str, stream: int, token: int) -> tuple[Any, bytes]:
    """The text that `token` adds to the stream of number `stream`."""
    decoder = _HELD.streams.setdefault(stream, DecodeStream(skip_special_tokens=True))
    return _with_tokenizer(lambda held: decoder.step(held, token) or "", where)
