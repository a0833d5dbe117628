"""Commands on checkpoints: calibrate finds their scales, quantize writes them anew."""

from pathlib import Path
from typing import Annotated

import typer

from moec.cli.given import check_given, check_to_write
from moec.cli.options import Adapters, LinksTo, Mtp, Scales
from moec.cli.output import bar, say
from moec.spec.bounded.own import put_at
from moec.spec.errors import refuse


def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder with wide weights.")],
    tokens: Annotated[
        Path, typer.Option(help="The tokens to run: token ids (.npy, .json) or text (.txt).")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, .json.")],
    percentile: Annotated[
        float,
        typer.Option(help="The percentile of the magnitudes to keep; 100 is the largest."),
    ] = 100.0,
) -> None:
    """Find static scales: run a checkpoint on some tokens and record how large its values get.

    The values are the inputs of each matrix product, and the keys and values of the caches.
    """
    import moec

    check_to_write("--out", out, '{"format": "moec-scales/1"')
    with bar() as progress:
        found = moec.calibrate(checkpoint, tokens, percentile=percentile, progress=progress)
    try:
        put_at(out, found.model_dump_json(indent=1))
    except OSError as error:
        refuse(f"--out {out}", error.strerror, "a file that can be written", "choose another")
    sites = len(found.inputs) + len(found.caches)
    say(f"{out}: {sites} sites of {found.model} over {found.tokens:,} tokens")
    if found.unseen:
        say(
            f"warning: {len(found.unseen)} experts saw no token, and got the largest magnitude of "
            f"their layer: {', '.join(found.unseen[:8])}{', ...' if found.unseen[8:] else ''}",
            "yellow",
        )


def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder with wide weights.")],
    scheme: Annotated[
        str,
        typer.Option(
            help="FP8: dynamic (all linear layers), meta (the experts alone), per-tensor (static "
            "scales of inputs), deepseek (a scale for each 128 x 128 values). 4-bit integers: "
            "w4a16. Or a .yaml or .json file."
        ),
    ] = "dynamic",
    out: Annotated[
        Path | None, typer.Option(help="The folder to write. Default: build/NAME-SCHEME.")
    ] = None,
    scales: Scales = None,
    weights_from: LinksTo = None,
    adapter: Adapters = None,
    mtp: Mtp = False,
) -> None:
    """Write a checkpoint anew, quantised, as vLLM, transformers and moec read it.

    The result is a Hugging Face folder in compressed-tensors form; no graph is built.
    """
    check_given(checkpoint=checkpoint, weights_from=weights_from)
    import moec
    from moec.cli.tables import checkpoint_table

    with bar() as progress:
        done = moec.quantize(
            checkpoint,
            scheme,
            out,
            progress=progress,
            weights_from=weights_from,
            adapters=adapter or (),
            scales=scales,
            mtp=mtp,
        )
    checkpoint_table(done)
