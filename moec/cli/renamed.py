"""Options that have a new name: the old one works for one more version, with a note on stderr."""

from collections.abc import Sequence

#: command -> old spelling -> new spelling
RENAMED = {
    "build": {"--piece": "--prefill-chunk"},
    "generate": {"--preset": "--session-options"},
    "validate": {"--twin": "--reduced"},
}


def current_spelling(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """`arguments` with new spellings for old ones, and a note for each that was old."""
    renamed = RENAMED.get(arguments[0], {}) if arguments else {}
    current: list[str] = []
    notes: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in renamed:
            notes.append(f"{name} is now {renamed[name]}; the next version drops the old name")
            argument = f"{renamed[name]}{equals}{value}"
        current.append(argument)
    return current, notes
