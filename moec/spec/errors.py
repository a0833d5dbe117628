"""The one error type that users see, and the one way to raise it."""

from typing import NoReturn


class MoecError(Exception):
    """An error in four lines: where it is, what was found, what was expected, what to run next.

    No part is ever empty. The command line exits with `exit_code`: 2 for bad input, 3 for a
    missing package or device, 1 for a check that failed.
    """

    def __init__(
        self, where: object, found: object, expected: object, next_step: str, exit_code: int = 2
    ) -> None:
        self.where, self.found = _line(where), _line(found)
        self.expected, self.next_step = _line(expected), _line(next_step)
        self.exit_code = exit_code
        super().__init__(self.where, self.found, self.expected, self.next_step)

    def __str__(self) -> str:
        return (
            f"{self.where}\n  found:    {self.found}\n  expected: {self.expected}\n"
            f"  next:     {self.next_step}"
        )


def refuse(
    where: object,
    found: object,
    expected: object,
    next_step: str,
    *,
    exit_code: int = 2,
    cause: BaseException | None = None,
) -> NoReturn:
    """Raise a `MoecError` with these four parts.

    The traceback leaves out the exception that is being handled, because the message already says
    what it meant. Pass the exception as `cause` where a developer needs its traceback too.

    Raises:
        MoecError: always.
    """
    raise MoecError(where, found, expected, next_step, exit_code) from cause


#: characters of one part of a message
_LONGEST = 4096


def _line(text: object) -> str:
    """Put `text` on one line; an empty text becomes "nothing".

    A name from a file may hold control characters. Each of them becomes "?". It may also be longer
    than a screen, and is then cut.
    """
    text = str(text)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]} ..."
    line = " ".join(text.splitlines()).strip()
    return "".join(char if char.isprintable() else "?" for char in line) or "nothing"
