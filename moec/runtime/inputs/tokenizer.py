"""A tokenizer of the tokenizers library, in a child process of its own.

A tokenizer.json from a stranger may abort the process that loads it, or that encodes with it: rules
can double a text again and again, and expressions can take exponential time. The child has limits
of memory and time, and its end is an error message here.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.runtime.inputs.chat import Message
from moec.spec.bounded.limits import SPECIAL, TOKENIZER
from moec.spec.bounded.read import check_json, read_bytes
from moec.spec.bounded.worker import Worker
from moec.spec.errors import refuse

_NEXT = "download the file again, or use another tokenizer"
#: bytes of a text that a slow tokenizer encodes in a second
_RATE = 250_000


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer in `path`, which a child process has loaded."""

    path: Path
    worker: Worker

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, with those that the tokenizer's post-processor adds.

        Raises:
            MoecError: the text is no valid Unicode; or encoding it takes too much memory or time.
        """
        return self._encoded("encode", text)

    def encode_filled(self, text: str) -> list[int]:
        """The token ids of `text`, a filled chat template, which has its special tokens in it.

        Raises:
            MoecError: as `encode`.
        """
        return self._encoded("encode_filled", text)

    def encode_split(self, text: str, special: Collection[str], marker: str) -> list[int]:
        """The token ids of a filled template: `special` are tokens, unless a `marker` breaks them.

        Raises:
            MoecError: as `encode`.
        """
        data = {"text": text, "special": sorted(special), "marker": marker}
        return self._encoded("encode_split", json.dumps(data, ensure_ascii=False))

    def encode_parts(
        self, parts: list[tuple[bool, str]], tokens: Collection[str] | None = None
    ) -> list[int]:
        """The token ids of parts of a text: (is one of `tokens`, text); default all special ones.

        Text that spells one of them is text.

        Raises:
            MoecError: as `encode`.
        """
        named = sorted(self.special() if tokens is None else tokens)
        data = json.dumps({"parts": parts, "tokens": named}, ensure_ascii=False)
        return self._encoded("encode_parts", data)

    def special(self, templates: Iterable[str] = ()) -> list[str]:
        """The text of each special token, and of other added tokens that `templates` spell.

        Some tokenizers do not call the tokens of roles special.

        Raises:
            MoecError: together they are longer than any tokenizer's.
        """
        data = "\n".join(templates).encode(errors="replace")
        found: list[str] = self._ask("special", data, "list its special tokens")
        if (size := sum(map(len, found))) > SPECIAL:
            refuse(
                self.path,
                f"special tokens of {size:,} characters together",
                f"at most {SPECIAL:,}, which is far above all known tokenizers",
                _NEXT,
            )
        return found

    def unknown(self, tokens: Sequence[str]) -> str | None:
        """The first of some tokens that the vocabulary does not have, added ones included."""
        found: str | None = self._ask("unknown", json.dumps(tokens).encode(), "look up its tokens")
        return found

    def guard(self, messages: Sequence[Message], **more: object) -> tuple[list[Any], str]:
        """What `guarded` makes of messages. A stranger's tokens can make that take hours.

        Raises:
            MoecError: as `guarded`; or it takes too much memory or time.
        """
        arguments = {"messages": messages, **more}
        data = json.dumps(arguments, ensure_ascii=False, default=list).encode()
        found, marker = self._ask(
            "guard", data, "look for its special tokens in the messages", len(data) // _RATE
        )
        return found, marker

    def normalises(self) -> bool:
        """Whether text changes before tokens are looked for: then other text may become one."""
        return bool(self._ask("normalises", b"", "look for a normaliser"))

    def _encoded(self, name: str, text: str) -> list[int]:
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            refuse("prompt", error, "text without lone surrogates", "correct the prompt")
        ids: list[int] = self._ask(name, data, "encode the text", len(data) // _RATE)
        return ids

    def token_to_id(self, token: str) -> int | None:
        """The id of `token`; None if the vocabulary does not have it."""
        found: int | None = self._ask("token_to_id", token.encode(), "look up a token")
        return found

    def decode_next(self, stream: int, token: int) -> str:
        """The new text of stream number `stream` after `token`, which may still be nothing."""
        text: str = self._ask("decode_next", b"", "decode a token", stream=stream, token=token)
        return text

    def _ask(self, name: str, data: bytes, what: str, more_seconds: int = 0, **more: object) -> Any:
        if name != "load" and not self.worker.alive:
            refuse(self.path, "its process has ended", "an open tokenizer", _NEXT)
        value, _ = self.worker.ask(
            f"moec.runtime.inputs.tokenizer_process:{name}",
            {"where": str(self.path), **more},
            data,
            where=self.path,
            what=what,
            next_step=_NEXT,
            more_seconds=more_seconds,
        )
        return value


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer in the file `path`.

    Raises:
        MoecError: there is no such file; it is no tokenizer, or above a limit; or loading it takes
            too much memory or time.
    """
    raw = read_bytes(path, TOKENIZER.bytes, "a file of the tokenizers library", _NEXT)
    check_json(raw, path, TOKENIZER)
    found = Tokenizer(path, Worker())
    found._ask("load", raw, "load the tokenizer")
    return found
