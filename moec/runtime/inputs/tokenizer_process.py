"""What the child process of a tokenizer runs: it holds one tokenizer, and its streams."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from moec.spec.errors import refuse


@dataclass(slots=True)
class _Held:
    """The tokenizer of this process, and its streams by number."""

    tokenizer: Tokenizer | None = None
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
        _HELD.tokenizer = held
    return None, b""


def _with_tokenizer(call: Callable[[Tokenizer], Any], where: str) -> tuple[Any, bytes]:
    assert _HELD.tokenizer is not None
    with _refusing(where):
        return call(_HELD.tokenizer), b""


def encode(data: bytes, where: str) -> tuple[Any, bytes]:
    """The ids of the text `data`, with those that the post-processor adds."""
    return _with_tokenizer(lambda held: list(held.encode(data.decode()).ids), where)


def encode_parts(data: bytes, where: str) -> tuple[Any, bytes]:
    """The ids of the parts [is a special token, text] that `data` holds as JSON.

    Special tokens in the text of other parts are text. The post-processor adds nothing.
    """

    def ids(held: Tokenizer) -> list[int]:
        found = list[Any]()
        held.encode_special_tokens = True  # as text, says the library
        try:
            for token, text in json.loads(data):
                if token:
                    found.append(held.token_to_id(text))
                else:
                    found += held.encode(text, add_special_tokens=False).ids
        finally:
            held.encode_special_tokens = False
        return found

    return _with_tokenizer(ids, where)


def encode_filled(data: bytes, where: str) -> tuple[Any, bytes]:
    """The ids of the text `data`, a filled template: the post-processor adds nothing."""
    return _with_tokenizer(
        lambda held: list(held.encode(data.decode(), add_special_tokens=False).ids), where
    )


def special(_: bytes, where: str) -> tuple[Any, bytes]:
    """The text of each special token."""
    return _with_tokenizer(
        lambda held: [
            each.content for each in held.get_added_tokens_decoder().values() if each.special
        ],
        where,
    )


def token_to_id(data: bytes, where: str) -> tuple[Any, bytes]:
    """The id of the token `data`, or None."""
    return _with_tokenizer(lambda held: held.token_to_id(data.decode()), where)


def decode_next(_: bytes, where: str, stream: int, token: int) -> tuple[Any, bytes]:
    """The text that `token` adds to the stream of number `stream`."""
    decoder = _HELD.streams.setdefault(stream, DecodeStream(skip_special_tokens=True))
    return _with_tokenizer(lambda held: decoder.step(held, token) or "", where)
