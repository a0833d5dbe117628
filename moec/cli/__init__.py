"""The command line. It parses arguments, calls the API and prints.

Exit codes: 0 done, 1 a check failed, 2 bad input, 3 a needed package or device is missing.
"""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer

from moec.cli.artefacts import bind, build, engine, library
from moec.cli.checkpoints import calibrate, quantize
from moec.cli.ending import run
from moec.cli.looks import (
    inspect,
    plan,
    spec_compare,
    spec_diff,
    spec_list,
    spec_schema,
    spec_show,
)
from moec.cli.proofs import validate
from moec.cli.renamed import current_spelling
from moec.cli.runs import bench, generate

#: command -> examples that its help ends with
COMMANDS: dict[Callable[..., None], tuple[str, ...]] = {
    build: (
        "moec build --checkpoint examples/tiny-scout --out build/tiny",
        "moec build --variant scout",
        "moec build --variant scout --target tensorrt --precision fp8 --no-engine",
        "moec build --variant scout --target ort --precision fp8 --device cuda",
    ),
    engine: (
        "moec engine build/scout-tensorrt-fp8",
        "moec engine build/scout-tensorrt-fp8 --trtexec",
    ),
    library: ("moec library build/scout-ort-cuda-fp8 --sm SM90",),
    bind: ("moec bind build/scout-onnx-fp32 --checkpoint DIR",),
    calibrate: ("moec calibrate DIR --tokens text.txt --out scales.json",),
    quantize: ("moec quantize DIR --scheme dynamic --out DIR-FP8",),
    validate: (
        "moec validate build/tiny --html report.html",
        "moec validate build/tiny --reduced",
    ),
    generate: (
        'moec generate build/tiny --prompt "def main(argv=None):"',
        'moec generate build/tiny --image photo.jpg --prompt "What is this?" --chat',
        "moec generate build/tiny --chat",
    ),
    plan: (
        "moec plan scout",
        "moec plan scout --precision fp8 --context 1000000 --device h200",
        "moec plan maverick --precision fp8 --context 1000000 --device h200 --gpus 4",
    ),
    inspect: ("moec inspect build/tiny --verify",),
    bench: ("moec bench build/tiny --new-tokens 64",),
}

#: the same for the commands below `moec spec`, by name
SPEC_COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "list": (spec_list, "moec spec list"),
    "show": (spec_show, "moec spec show scout --format config"),
    "schema": (spec_schema, "moec spec schema"),
    "diff": (spec_diff, "moec spec diff scout maverick"),
    "compare": (spec_compare, "moec spec compare"),
}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
specs = typer.Typer(no_args_is_help=True)


def _epilog(*examples: str) -> str:
    """Examples, a line each, as Typer wants them."""
    return "\n\n".join(("Examples:" if len(examples) > 1 else "Example:", *examples))


def _print_version(wanted: bool) -> None:
    if wanted:
        import moec

        typer.echo(f"moec {moec.__version__}")
        raise typer.Exit


@app.callback()
def _moec(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Compile MoE checkpoints to artefacts, and prove that they compute the same numbers."""


for _command, _examples in COMMANDS.items():
    app.command(epilog=_epilog(*_examples))(_command)
for _name, (_command, _example) in SPEC_COMMANDS.items():
    specs.command(_name, epilog=_epilog(_example))(_command)
app.add_typer(specs, name="spec", help="List, show, compare and describe model specs.")


def main() -> None:
    """Run the command line and exit; a user's mistake is a message, never a stack trace."""
    # Pillow warns of odd metadata and of large images; an image that matters raises an error.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    arguments, notes = current_spelling(sys.argv[1:])
    command = partial(app, arguments, prog_name="moec", standalone_mode=False)
    sys.exit(run(command, arguments, notes))
