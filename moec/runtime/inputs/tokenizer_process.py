"""What the child process of a tokenizer runs: it holds one tokenizer, and its streams."""

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
    """Load the tokenizer whose file has the bytes `data`."""
    with _refusing(where):
        _HELD.tokenizer = Tokenizer.from_buffer(data)
    return None, b""


def _with_tokenizer(call: Callable[[Tokenizer], Any], where: str) -> tuple[Any, bytes]:
    assert _HELD.tokenizer is not None
    with _refusing(where):
        return call(_HELD.tokenizer), b""


def encode(data: bytes, where: str) -> tuple[Any, bytes]:
    """The ids of the text `data`."""
    return _with_tokenizer(lambda held: list(held.encode(data.decode()).ids), where)


def token_to_id(data: bytes, where: str) -> tuple[Any, bytes]:
    """The id of the token `data`, or None."""
    return _with_tokenizer(lambda held: held.token_to_id(data.decode()), where)


def decode_next(_: bytes, where: str, stream: int, token: int) -> tuple[Any, bytes]:
    """The text that `token` adds to the stream of number `stream`."""
    decoder = _HELD.streams.setdefault(stream, DecodeStream(skip_special_tokens=True))
    return _with_tokenizer(lambda held: decoder.step(held, token) or "", where)
