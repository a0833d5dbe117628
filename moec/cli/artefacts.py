"""Commands that write artefacts and what belongs to them: build, engine, library, bind."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.given import check_given, check_source
from moec.cli.options import (
    Adapters,
    Architectures,
    Build,
    Hashed,
    LinksTo,
    Mtp,
    Placement,
    Scales,
    WeightsFrom,
)
from moec.cli.output import bar, say, write
from moec.cli.proofs import prove
from moec.spec.errors import refuse

if TYPE_CHECKING:
    from moec.artefact.artefact import Artefact

#: weights above this many bytes are not run after a build: it is proven on a reduced-size model
PROVE_ON_WEIGHTS = 4 * 10**9


def build(
    variant: Annotated[
        str | None, typer.Option(help="The name of a preset; `moec spec list` shows them.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="A spec file, .yaml or .json.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint folder: config.json and safetensors files.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="What to build for: onnx, ort, torch, tensorrt or tensorrt-rtx; ort-cuda is ort "
            "in fp8 for --device cuda."
        ),
    ] = "onnx",
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, bf16, fp8, int8 or int4. Default: fp8 or int4 if the weights are, "
            "fp8 if the target is torch, bf16 for TensorRT, else fp32."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write. Default: build/NAME-TARGET-PRECISION."),
    ] = None,
    weights: Placement = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="How weights are quantised to fp8: meta, dynamic, mixed, static, modelopt, "
            "deepseek, or a .yaml or .json file. Default: dynamic for torch and ort-cuda, mixed "
            "for tensorrt, static for tensorrt-rtx, else meta."
        ),
    ] = None,
    scales: Scales = None,
    cache: Annotated[
        str | None,
        typer.Option(help="How keys and values are stored: fp8 or wide. Default: by the scheme."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Engines only: the most tokens in a sequence, prompt included."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Engines only: the most sequences in a batch.")
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Engines only: the most prompt tokens that one call takes.")
    ] = None,
    architectures: Architectures = None,
    bindings: Annotated[
        str | None,
        typer.Option(
            help="Engines only: the weights that the engine takes as inputs and does not hold: "
            "experts, all or none."
        ),
    ] = None,
    engine: Build = True,
    weights_from: LinksTo = None,
    hashed: Hashed = False,
    adapter: Adapters = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Target ort: what it runs on, cpu or cuda (fp8 by default, or bf16). In fp8 they "
            "differ; the default is for a cpu."
        ),
    ] = None,
    mtp: Mtp = False,
    check: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Check the numbers after the build.")
    ] = True,
) -> None:
    """Build an artefact from one of --variant, --spec and --checkpoint, and prove its numbers.

    Without a checkpoint the artefact has no weights; `moec bind` adds them later.
    Such an artefact is proven on a reduced-size model with the same kinds of layers,
    and so is one with over 4 GB of weights.
    """
    given = [source for source in (variant, spec, checkpoint) if source is not None]
    if len(given) != 1:
        refuse(
            "build",
            f"{len(given)} sources",
            "exactly one of --variant, --spec, --checkpoint",
            "moec build --variant scout",
        )
    check_source(variant, spec, checkpoint)
    check_given(checkpoint=checkpoint, out=out, weights_from=weights_from)
    import moec
    from moec.cli.tables import artefact_tables

    chosen: dict[str, Any] = {
        "context": context,
        "batch": batch,
        "piece": prefill_chunk,
        "bindings": bindings,
        "architectures": architectures,
        "build": None if engine else False,
    }
    with bar() as progress:
        art = moec.export(
            given[0],
            target,
            precision,
            out,
            weights=weights,
            progress=progress,
            scheme=scheme,
            scales=scales,
            cache=cache,
            options=_engine_options(chosen),
            weights_from=weights_from,
            hash_weights=hashed,
            adapters=adapter or (),
            device=device,
            mtp=mtp,
        )
    artefact_tables(art)
    _note_unrecorded(art)
    if check:
        size = sum(shard.size for shard in art.manifest.weights.shards.values())
        prove(art.path, reduced=size > PROVE_ON_WEIGHTS)


def engine(
    artefact: Annotated[Path, typer.Argument(help="The artefact's folder.")],
    architectures: Architectures = None,
    trtexec: Annotated[
        bool,
        typer.Option(
            "--trtexec", help="Build nothing; print the commands that do it without moec."
        ),
    ] = False,
    weights_from: WeightsFrom = None,
) -> None:
    """Build the engines of an artefact that has only their ONNX, or build them again.

    Use it after `moec build --no-engine`, or on the machine whose GPU will run them.
    """
    check_given(artefact, weights_from=weights_from)
    import moec
    from moec.cli.tables import artefact_tables

    if trtexec:
        for line in moec.trtexec_commands(artefact, weights_from=weights_from):
            write(f"{line}\n")
        return
    with bar() as progress:
        art = moec.build_engines(
            artefact,
            architectures=architectures or (),
            progress=progress,
            weights_from=weights_from,
        )
    artefact_tables(art)
    _note_unrecorded(art)


def library(
    artefact: Annotated[Path, typer.Argument(help="The artefact's folder.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write. Default: ARTEFACT-library.")
    ] = None,
    architectures: Annotated[
        list[str] | None,
        typer.Option(
            "--sm",
            help="A GPU architecture to build for: SM89, SM90 or SM120. Repeat it for more. "
            "Default: SM90.",
        ),
    ] = None,
) -> None:
    """Write the custom-op library with which ONNX Runtime runs an artefact without moec.

    The artefact is one of target ort in fp8 for device cuda. Sessions of moec need no such folder.
    """
    check_given(artefact)
    import moec

    found = moec.build_library(artefact, out, architectures or ())
    if found.library:
        say(f"wrote {found.library}")
    else:
        say(f"wrote {found.folder}; not compiled: {found.why}", "yellow")
        say(f"compile it with: {found.command}")


def bind(
    artefact: Annotated[Path, typer.Argument(help="The artefact's folder.")],
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint folder of the same model.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write. Default: the artefact's own, which is replaced."),
    ] = None,
    weights: Placement = None,
    scales: Scales = None,
    engine: Build = True,
    weights_from: LinksTo = None,
    hashed: Hashed = False,
    adapter: Adapters = None,
) -> None:
    """Attach a checkpoint to an artefact that was built without weights, or attach another one."""
    check_given(artefact, checkpoint, out, weights_from)
    import moec
    from moec.cli.tables import artefact_tables

    with bar() as progress:
        art = moec.bind(
            artefact,
            checkpoint,
            out,
            weights=weights,
            progress=progress,
            scales=scales,
            engine=engine,
            weights_from=weights_from,
            hash_weights=hashed,
            adapters=adapter or (),
        )
    artefact_tables(art)
    _note_unrecorded(art)


def _note_unrecorded(art: "Artefact") -> None:
    """Say what to run later if this user's state folder could not be written."""
    from moec.artefact.opening.unrecorded import unrecorded

    for line in unrecorded(art):
        say(f"note: {line}", "yellow")


def _engine_options(chosen: dict[str, Any]) -> Any:
    """Options of engines; None where the user chose none, since most targets have no engines."""
    given = {name: each for name, each in chosen.items() if each is not None}
    if not given:
        return None
    from moec.artefact.engine_options import engine_options

    return engine_options(given)
