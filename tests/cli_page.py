"""docs/cli.md, whose second half lists the commands and options of the typer app.

`python -m tests.cli_page` writes that half again.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from moec.cli import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
#: what stands below this line is written by this file
MARK = "<!-- Below: commands and options, written by `python -m tests.cli_page`. -->\n"


def _spelled(parameter: Any) -> str:
    """An option as users type it, with both spellings of a switch; an argument in capitals."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return " ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is True:
        return f"`{parameter.opts[0]}`"
    unsaid = parameter.default is None or parameter.default is False or parameter.default == ()
    return "" if unsaid else f"`{parameter.default}`"


def _section(name: str, command: Any) -> Iterator[str]:
    """Title, help text and table of a command, then those of the commands below it."""
    shown = [each for each in command.params if not getattr(each, "hidden", False)]
    shown = [each for each in shown if each.name != "help"]
    yield f"### {name}\n\n{inspect.cleandoc(command.help or '')}\n"
    if shown:
        yield "| | meaning | default |\n|---|---|---|"
        for each in shown:
            meaning = " ".join((getattr(each, "help", None) or "").split()).replace("|", "\\|")
            yield f"| {_spelled(each)} | {meaning} | {_default(each)} |"
        yield ""
    for below, each in getattr(command, "commands", {}).items():
        if not each.hidden:
            yield from _section(f"{name} {below}", each)


def page() -> str:
    """The page as it should be: what people wrote, then what the app says of itself."""
    written = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    listed = "\n".join(_section("moec", get_command(app)))
    return f"{written}{MARK}\n## Every command and option\n\n{listed.strip()}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
