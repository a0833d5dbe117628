"""The command `validate`, and the proof that `build` ends with."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.given import check_given, check_to_write
from moec.cli.options import Device, Gpus, Json, WeightsFrom
from moec.cli.output import bar, error_line, note_cpu, print_json
from moec.cli.streams import is_quiet_rank
from moec.spec.errors import MoecError, refuse

if TYPE_CHECKING:
    from moec.runtime.proof.report import Report


def validate(
    artefact: Annotated[Path, typer.Argument(help="The artefact's folder.")],
    tokens: Annotated[
        int | None,
        typer.Option(help="The length of the longest sequence. Default: chosen by chunk size."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The seed that the tokens are drawn from. Default: fresh.")
    ] = None,
    reduced: Annotated[
        bool,
        typer.Option(
            "--reduced",
            help="Prove a reduced-size model with the same kinds of layers and random weights, and "
            "do not run the artefact's own weights.",
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report as a web page.")] = None,
    device: Device = "cpu",
    reference: Annotated[
        str | None,
        typer.Option(
            help="Also measure what the precision costs, against bf16 (the weights that the "
            "artefact was built from) or a folder of wide weights."
        ),
    ] = None,
    eval_file: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            help="The tokens to measure that on, in a file as for `moec calibrate`. Default: "
            "drawn from the reference.",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint that the artefact was built from: its weights are compared with "
            "the artefact's. Default: the folder in the manifest, if it is there."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Prove a checkpoint instead of an artefact: run its prompts in another engine, "
            "vllm or transformers, and compare."
        ),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(help="The Python interpreter that has the engine of --against."),
    ] = None,
    gpus: Gpus = None,
    weights_from: WeightsFrom = None,
    as_json: Json = False,
) -> None:
    """Compare an artefact with the eager reference, op by op; exit code 1 if they differ.

    The report goes into the artefact's manifest, where `moec inspect` finds it.
    """
    if html:
        from moec.runtime.proof.report import PAGE

        check_to_write("--html", html, PAGE)
    if against is not None:
        others: dict[str, object] = {
            "--source": source,
            "--reference": reference,
            "--eval": eval_file,
            "--reduced": reduced or None,
            "--gpus": gpus,
            "--weights-from": weights_from,
        }
        for option, value in others.items():
            if value is not None:
                refuse(option, "--against", "an artefact's proof, without it", "leave one out")
        prove_against(artefact, against, tokens, seed, html, as_json, python)
        return
    prove(
        artefact,
        tokens,
        seed,
        reduced,
        html,
        as_json,
        device,
        reference,
        eval_file,
        source,
        weights_from,
        gpus,
    )


def prove(
    artefact: Path,
    tokens: int | None = None,
    seed: int | None = None,
    reduced: bool = False,
    html: Path | None = None,
    as_json: bool = False,
    device: str = "cpu",
    reference: str | None = None,
    rows: Path | None = None,
    source: Path | None = None,
    weights_from: Path | None = None,
    gpus: int | None = None,
) -> None:
    """Prove an artefact, print the report and store it in the artefact's manifest.

    A report that cannot be stored is a warning: the exit code says what the proof said.

    Raises:
        typer.Exit: exit code 1, if a check failed.
    """
    check_given(artefact, weights_from=weights_from)
    import moec
    from moec.artefact.parity import record

    note_cpu(device, gpus)
    with bar(quiet=as_json) as progress:
        report = moec.validate(
            artefact,
            tokens=tokens,
            seed=seed,
            reduced=reduced,
            progress=progress,
            device=device,
            reference=reference,
            rows=rows,
            source=source,
            weights_from=weights_from,
            gpus=gpus,
        )
    if is_quiet_rank():  # rank 0 stores the report
        return
    _show(report, as_json)
    try:
        record(artefact, report, weights_from)
    except MoecError as error:
        error_line(f"warning: the report was not stored: {error.where}: {error.found}", "yellow")
    _end(report, html)


def prove_against(
    checkpoint: Path,
    engine: str,
    tokens: int | None,
    seed: int | None,
    html: Path | None,
    as_json: bool,
    python: Path | None,
) -> None:
    """Compare a checkpoint in another engine with the eager reference, and print the report.

    The report goes into the model card that moec wrote, if there is one.

    Raises:
        typer.Exit: exit code 1, if a check failed.
    """
    check_given(checkpoint=checkpoint)
    import moec
    from moec.exporters.model_card import add_proof
    from moec.runtime.proof.report import cells
    from moec.spec.hf.forms import checkpoint_folder

    with bar(quiet=as_json) as progress:
        report = moec.validate(
            checkpoint, against=engine, tokens=tokens, seed=seed, progress=progress, python=python
        )
    _show(report, as_json)
    ran = f"{report.engine} against {report.reference}, prompts of {report.tokens} tokens"
    try:
        rows = (cells(check.to_dict()) for check in report.checks)
        add_proof(checkpoint_folder(checkpoint) or checkpoint, ran, report.passed, rows)
    except OSError as error:
        error_line(f"warning: the card was not written: {error.strerror}", "yellow")
    _end(report, html)


def _show(report: "Report", as_json: bool) -> None:
    from moec.cli.tables import report_table

    (print_json if as_json else report_table)(report.to_dict())


def _end(report: "Report", html: Path | None) -> None:
    """Write the web page that the user asked for, and end with what the proof said.

    A page that cannot be written is a warning if the proof failed, as scripts must learn that.
    """
    if html:
        try:
            report.to_html(html)
        except OSError as error:
            what = error.strerror or str(error)
            if report.passed:
                refuse(f"--html {html}", what, "a file that can be written", "choose another")
            error_line(f"warning: the page was not written: --html {html}: {what}", "yellow")
    if not report.passed:
        raise typer.Exit(1)
