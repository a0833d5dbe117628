"""Write an artefact: its models, its weights and its manifest, all of them or none."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moec.artefact.artefact import Artefact, file_of, write_manifest
from moec.artefact.card import CARD
from moec.artefact.engine_options import EngineOptions
from moec.artefact.folder import writing
from moec.artefact.manifest import Build, Manifest, Ports
from moec.artefact.placement import pack, place
from moec.artefact.process_memory import memory
from moec.artefact.targets import find_target
from moec.exporters.builder import Model, builder_of, no_companion
from moec.exporters.publish import describe_build
from moec.exporters.stages import Stages
from moec.spec.bounded.own import own_file
from moec.spec.tensors import tensors
from moec.weights.checkpoint import Checkpoint
from moec.weights.packed.journal import discard
from moec.weights.shard import TensorEntry


def write_artefact(
    path: Path,
    models: dict[str, Model],
    manifest: Manifest,
    checkpoint: Checkpoint | None,
    entries: dict[str, TensorEntry],
    mode: str,
    stages: Stages,
    constants: dict[str, Tensor],
    engines: Artefact | None = None,
    hashed: bool = False,
) -> Artefact:
    """Write the artefact at `path`.

    `hashed` asks for hashes of weights that stay where they are.

    `engines` is an artefact whose TensorRT engines are copied because they still fit; None: the new
    artefact has none yet.

    Raises:
        MoecError: `path` cannot be written, or the weights cannot be placed.
    """
    with writing(path) as folder:
        if not (checkpoint and mode == "pack"):
            discard(folder)
        builder, suffix = builder_of(manifest.target), find_target(manifest.target).suffix
        options = manifest.options or EngineOptions()
        targets = {part: folder / f"{part}{suffix}" for part in models}
        progress, below = stages.progress, builder.weights
        if manifest.weights.mode == "unbound":
            with stages("check"):
                for part, model in models.items():
                    builder.save_unbound(model, targets[part])
        bound = None
        if checkpoint:
            with stages("weights"):
                if mode == "pack":
                    bound = pack(checkpoint, entries, manifest, folder, progress, constants, below)
                    if bound.weights.published:
                        card = describe_build(folder, manifest, checkpoint)
                        weights = bound.weights.model_copy(update={"card": card})
                        bound = replace(bound, weights=weights)
                else:
                    used = {name: entries[name] for name in tensors(manifest.spec)}
                    bound = place(checkpoint, used, mode, folder, progress, hashed, below)
            with stages("write"):
                for part, model in models.items():
                    builder.save_bound(model, targets[part], bound.seen_from(part), options)
            manifest = manifest.model_copy(update={"weights": bound.weights})
        if builder.beside:
            companion = checkpoint.companion if checkpoint else no_companion
            builder.beside(folder, path, manifest, companion)
        written = {
            each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()
        }
        apart = {*bound.weights.shards, CARD} if bound else set()
        files = {name: file_of(folder / name) for name in sorted(written - apart)}
        if engines:
            _copy_engines(engines, folder)
        done = manifest.model_copy(
            update={
                "checkpoint": str(checkpoint.source) if checkpoint else None,
                "adapters": tuple(map(str, checkpoint.adapters)) if checkpoint else (),
                "files": files,
                "engines": engines.manifest.engines if engines else {},
                **_ports({part: builder.ports(model) for part, model in models.items()}),
                "parity": None,
                "build": Build(
                    seconds={k: round(v, 3) for k, v in stages.seconds.items()},
                    peak_bytes=memory().peak,
                    bytes_written=sum(f.size for f in files.values())
                    + (bound.copied + bound.packed if bound else 0),
                    bytes_copied=bound.copied if bound else 0,
                    bytes_packed=bound.packed if bound else 0,
                    bytes_read=bound.read if bound else 0,
                ),
            }
        )
        done = write_manifest(folder, done)
    return Artefact(path, done)


def _copy_engines(source: Artefact, folder: Path) -> None:
    """Copy the files of engines that the manifest lists, and no file that a link leads out to."""
    for engine in source.manifest.engines.values():
        for name in {engine.file, *engine.plugins, *engine.files}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            real = own_file(source.path / name, source.path, f"moec engine {source.path}")
            shutil.copyfile(real, folder / name)


def _ports(by_part: dict[str, Ports]) -> dict[str, Any]:
    """The inputs and outputs of the graphs, as fields of the manifest."""
    decoder = by_part["model"]
    return {
        "inputs": decoder.inputs,
        "outputs": decoder.outputs,
        "vision": by_part.get("vision"),
        "mtp": by_part.get("mtp"),
    }
