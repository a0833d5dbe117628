"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Device = Annotated[str, typer.Option(help="The device to run on: cpu or cuda.")]
Gpus = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many GPUs of this host share the model (target torch, FP8). With --device cpu as "
        "many processes share the cores.",
    ),
]
Placement = Annotated[
    str | None,
    typer.Option(
        help="Where the weights go: in-place (nothing is copied), link (hard links beside the "
        "model), copy, or pack (rewritten once: quantised, or in the layout that ONNX Runtime "
        "runs fastest). Default: in-place if the precision allows it, else pack."
    ),
]
WeightsFrom = Annotated[
    Path | None,
    typer.Option(
        "--weights-from",
        help="The folder of the weights, for an artefact that refers to files outside it: if the "
        "checkpoint has moved, or if the artefact comes from somebody else.",
    ),
]
LinksTo = Annotated[
    Path | None,
    typer.Option(
        "--weights-from", help="A further folder to which links in the checkpoint may lead."
    ),
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        help="A folder with a LoRA adapter, which is merged into the weights. May be repeated.",
    ),
]
Mtp = Annotated[
    bool,
    typer.Option(
        "--mtp",
        help="Include the layer of multi-token prediction, which drafts tokens. DeepSeek-V3 has "
        "one; it is left out by default.",
    ),
]
TrustEngines = Annotated[
    bool,
    typer.Option(
        "--trust-engines",
        help="Run TensorRT engines that you did not build here. They are native code, which can "
        "do anything.",
    ),
]
Scales = Annotated[
    Path | None,
    typer.Option(help="The file that `moec calibrate` wrote, for schemes with static scales."),
]
Build = Annotated[
    bool,
    typer.Option("--engine/--no-engine", help="Build the engines, or write only their ONNX files."),
]
Architectures = Annotated[
    list[str] | None,
    typer.Option(
        "--sm",
        help="tensorrt-rtx only: a GPU architecture to build for, such as SM89 or SM120. Repeat "
        "the option for more. Default: both of these, or what the artefact was built for.",
    ),
]
Hashed = Annotated[
    bool,
    typer.Option(
        "--hash",
        help="Also hash weights that stay in place or are linked, which means to read all of them. "
        "Weights that are copied or packed are hashed anyway.",
    ),
]
