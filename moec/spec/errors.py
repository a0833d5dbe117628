"""The one error type that users see."""


class MoecError(Exception):
    """A refusal in four lines: where, what was found, what was expected, what to do next.

    `exit_code` is what the command line ends with: 2 for bad input, 3 for a missing package or
    device, 1 for a check that failed.
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


def _line(text: object) -> str:
    """`text` on one line; control characters, which a file may hold in a name, become "?"."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(str(text).splitlines()))
