"""Commands, options and examples are what users have in their scripts: none may go unnoticed."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import moec
from moec.cli import COMMANDS, SPEC_COMMANDS, app

#: command -> its arguments and options, in the order of its help
OPTIONS = {
    "build": "--variant --spec --checkpoint --target --precision --out --weights --scheme --scales "
    "--cache --context --batch --prefill-chunk --sm --bindings --engine --no-engine "
    "--weights-from --hash --adapter --device --mtp --validate --no-validate",
    "engine": "artefact --sm --trtexec --weights-from",
    "library": "artefact --out --sm",
    "bind": "artefact --checkpoint --out --weights --scales --engine --no-engine "
    "--weights-from --hash --adapter",
    "calibrate": "checkpoint --tokens --out --percentile",
    "quantize": "checkpoint --scheme --out --scales --weights-from --adapter --mtp",
    "validate": "artefact --tokens --seed --reduced --html --device --reference --eval "
    "--source --against --python --gpus --weights-from --json",
    "generate": "artefact --prompt --ids --image --chat --system --messages --max-new-tokens "
    "--temperature --top-k --top-p --seed --repetition-penalty --mtp --engine --session-options "
    "--device --gpus --weights-from --trust-engines",
    "plan": "model --precision --context --batch --device --tiles --scheme --gpus --mtp --json",
    "inspect": "artefact --verify --weights-from --json",
    "bench": "artefact --batch --prompt-tokens --new-tokens --rounds --device "
    "--weights-from --trust-engines --json",
    "spec compare": "",
    "spec list": "",
    "spec show": "model --format",
    "spec schema": "",
    "spec diff": "left right",
    "spec": "",
    "": "--version",
}

#: what `moec --help` says of each command
SUMMARIES = {
    "build": "Build an artefact from one of --variant, --spec and --checkpoint, and prove its "
    "numbers.",
    "engine": "Build the engines of an artefact that has only their ONNX, or build them again.",
    "library": "Write the custom-op library with which ONNX Runtime runs an artefact without moec.",
    "bind": "Attach a checkpoint to an artefact that was built without weights, or attach another "
    "one.",
    "calibrate": "Find static scales: run a checkpoint on some tokens and record how large its "
    "values get.",
    "quantize": "Write a checkpoint anew, quantised, as vLLM, transformers and moec read it.",
    "validate": "Compare an artefact with the eager reference, op by op; exit code 1 if they "
    "differ.",
    "generate": "Continue a prompt of text and images, and print each token as it comes.",
    "plan": "Print what a model costs before anyone builds it: memory, FLOPs, and time at best.",
    "inspect": "Show an artefact's manifest: files, weights, costs of the build, and the last "
    "proof.",
    "bench": "Time opening, first token and decode, beside transformers if it is installed.",
    "spec": "List, show, compare and describe model specs.",
}

EXAMPLES = [each for examples in COMMANDS.values() for each in examples]
EXAMPLES += [example for _, example in SPEC_COMMANDS.values()]


def _commands(command: Any, *names: str) -> Iterator[tuple[str, Any]]:
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, *names, name)
    yield " ".join(names), command


def test_every_command_has_the_options_that_it_had() -> None:
    found = {
        name: " ".join(opt for param in each.params for opt in (*param.opts, *param.secondary_opts))
        for name, each in _commands(typer.main.get_command(app))
    }
    assert found == OPTIONS


def test_every_option_and_argument_says_what_it_is() -> None:
    for name, command in _commands(typer.main.get_command(app)):
        assert all(param.help for param in command.params), f"moec {name}"


def test_the_help_lists_every_command_with_a_sentence() -> None:
    shown = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["--help"]).output
    rows = re.findall(r"^│ (\w+) +(\S.*?) *│$", shown, re.M)
    assert dict(rows) == SUMMARIES


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_a_line_that_parses(example: str) -> None:
    program, *words = shlex.split(example)
    commands = dict(_commands(typer.main.get_command(app)))
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in commands)
    context = commands[name].make_context(name, words[len(name.split()) :])
    assert program == "moec" and (context.params or name.startswith("spec "))
    assert (
        example in CliRunner(env={"COLUMNS": "200"}).invoke(app, [*name.split(), "--help"]).output
    )


def test_the_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"moec {moec.__version__}\n"
