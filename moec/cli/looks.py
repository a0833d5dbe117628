"""Commands that look and change nothing: plan, inspect, and those below `moec spec`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.options import Json, Mtp, WeightsFrom
from moec.cli.output import print_json, say, write
from moec.spec.errors import refuse

if TYPE_CHECKING:
    from moec.artefact.artefact import Artefact

Model = Annotated[
    str, typer.Argument(help="The name of a preset, a spec file or a checkpoint folder.")
]


def plan(
    model: Model,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, bf16, fp8, int8 or int4. Default: fp8 for fp8 weights, else bf16."
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="The tokens in each sequence.")] = 8192,
    batch: Annotated[int, typer.Option(help="The number of sequences.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="The device that sets the time limits: h200 or h100.")
    ] = None,
    tiles: Annotated[int, typer.Option(help="The image tiles in the prompts.")] = 0,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="With fp8: how weights are quantised: dynamic (default), meta, modelopt, "
            "deepseek, or a file."
        ),
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            help="fp8 only: how many GPUs share the model. Costs are those of one of them."
        ),
    ] = 1,
    mtp: Mtp = False,
    as_json: Json = False,
) -> None:
    """Print what a model costs before anyone builds it: memory, FLOPs, and time at best."""
    import moec
    from moec.cli.tables import plan_table
    from moec.weights.spec_of import load_spec

    result = moec.plan(
        load_spec(model, mtp=mtp),
        precision,
        context=context,
        batch=batch,
        device=device,
        tiles=tiles,
        scheme=scheme,
        gpus=gpus,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        plan_table(result)


def inspect(
    artefact: Annotated[Path, typer.Argument(help="The artefact's folder.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Also hash everything that has a hash in the manifest."),
    ] = False,
    weights_from: WeightsFrom = None,
    as_json: Json = False,
) -> None:
    """Show an artefact's manifest: files, weights, costs of the build, and the last proof.

    With --verify the exit code is 1 if something is not as it was written.
    Hashes find damage, not malice: who can change a file can change its hash.
    """
    from moec.artefact.artefact import open_artefact, verify_files
    from moec.cli.tables import artefact_tables

    art = open_artefact(artefact, weights_from)
    if as_json:
        print_json(art.manifest.model_dump(mode="json"))
    else:
        artefact_tables(art)
        if art.manifest.parity:
            _show_report(art)
    if verify:
        hashed, not_hashed = verify_files(art)
        say(f"verified: {len(hashed)} files are as they were written: {', '.join(hashed)}")
        for what in not_hashed:
            say(f"not hashed: {what}")
        say("note: hashes find damage, not malice; who can change a file can change its hash")


def _show_report(art: "Artefact") -> None:
    """Print the report of the last proof: plain data, which may have any form in a file."""
    from moec.artefact.manifest import NAME
    from moec.cli.tables import report_table

    try:
        report_table(art.manifest.parity or {})
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        refuse(
            f"{art.path / NAME}: parity",
            f"{type(error).__name__}: {error}",
            "a report as this version of moec writes it",
            f"moec validate {art.path}",
            cause=error,
        )


def spec_list() -> None:
    """Print the presets side by side."""
    from moec.cli.tables import spec_table
    from moec.spec.presets import PRESETS

    spec_table(PRESETS.values())


def spec_compare() -> None:
    """Print what a much-quoted article says of the models, with its errors marked."""
    from moec.cli.tables import comparison_table, spec_table
    from moec.spec.presets import PRESETS
    from moec.spec.presets.claims import CLAIMS

    spec_table(PRESETS.values())
    comparison_table(CLAIMS)


def spec_show(
    model: Model,
    form: Annotated[
        str, typer.Option("--format", help="The format to print: yaml, json or config.")
    ] = "yaml",
) -> None:
    """Print a model spec as YAML, as JSON or as a Hugging Face config.json."""
    from moec.spec.files import dump_yaml
    from moec.spec.hf.config import write_config
    from moec.weights.spec_of import load_spec

    spec = load_spec(model)
    if form == "yaml":
        write(dump_yaml(spec))
    elif form in ("json", "config"):
        print_json(spec.model_dump(mode="json") if form == "json" else write_config(spec))
    else:
        refuse(f"--format {form}", form, "yaml, json or config", "choose one of them")


def spec_schema() -> None:
    """Print the JSON schema of spec files."""
    from moec.spec.model import ModelSpec

    print_json(ModelSpec.model_json_schema())


def spec_diff(
    left: Model,
    right: Annotated[str, typer.Argument(help="The model to compare it with, in the same forms.")],
) -> None:
    """Print the fields in which two model specs differ; exit code 1 if there are any."""
    from moec.cli.tables import diff_table
    from moec.spec.files import diff
    from moec.weights.spec_of import load_spec

    rows = diff(load_spec(left), load_spec(right))
    if rows:
        diff_table(left, right, rows)
        raise typer.Exit(1)
    say("no difference")
