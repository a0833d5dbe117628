"""A conversation on the command line: each line of stdin is a message, and each has a reply."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.cli.output import error_line, show_error, write
from moec.cli.streams import is_quiet_rank
from moec.spec.bounded.limits import TOKENS_TEXT
from moec.spec.errors import MoecError, refuse

if TYPE_CHECKING:
    from moec.runtime.conversation import Conversation

#: a line that gives an image for the next message; the rest of the line is its path
_IMAGE = "/image "


def converse(talk: "Conversation", images: Sequence[Path], **settings: Any) -> None:
    """Reply to each line of stdin until it ends; `images` belong to the first message.

    `settings` go to each `Conversation.say`. On a terminal, a refusal does not end the
    conversation.

    Raises:
        MoecError: stdin is closed; or it is no terminal, and a message is refused.
    """
    if sys.stdin is None:
        refuse("stdin", "closed", "a message in each line", "give one message: --prompt TEXT")
    shown: list[str | Path] = [*images]
    for line in _lines():
        if line.startswith(_IMAGE):
            shown.append(line.removeprefix(_IMAGE).strip())
            continue
        try:
            reply = talk.say(line, shown, stream=write, **settings)
        except MoecError as error:
            if not sys.stdin.isatty():
                raise
            show_error(error)
            continue
        finally:
            shown = []
        write("\n")
        for note in reply.notes:
            error_line(f"note: {note}")
        if reply.anew:
            counts = f"{reply.fed:,} of {reply.prompt_tokens:,} tokens"
            error_line(f"note: computed {counts}, earlier turns among them: {reply.anew}")


def _lines() -> Iterator[str]:
    """The lines of stdin that are not empty; a terminal shows where to type."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(
            errors="surrogateescape"
        )  # refused with its message, where it is said
    from moec.runtime.ranks.group import same  # imports torch

    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = same("" if is_quiet_rank() else sys.stdin.readline(TOKENS_TEXT + 1))
        if len(line) > TOKENS_TEXT:
            found = f"a line of over {TOKENS_TEXT:,} characters"
            refuse("stdin", found, "a message in each line", "shorten the line")
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")
