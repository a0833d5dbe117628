"""The engines of an artefact, which may be built with it, or later, elsewhere, again."""

import time
from dataclasses import replace
from pathlib import Path

from moec.artefact.artefact import Artefact, file_of, open_artefact, write_manifest
from moec.artefact.engine_options import EngineOptions, engine_options
from moec.artefact.folder import writing
from moec.artefact.placement import Progress
from moec.artefact.targets import PACKAGES
from moec.exporters.backends import backend_of
from moec.exporters.tensorrt.build import ENGINES, check_options, need_package
from moec.exporters.tensorrt.trtexec import commands
from moec.spec.errors import refuse


def build_engines(
    artefact: str | Path | Artefact,
    architectures: tuple[str, ...] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Artefact:
    """Build the engines of an artefact as it lies there, for others of `architectures` if given.

    They and the plugin are the folder `engine`, which is replaced as a whole, or stays.

    Raises:
        MoecError: not an artefact of a target with engines, or what builds engines is missing.
    """
    built = artefact if isinstance(artefact, Artefact) else open_artefact(artefact)
    options = _options_of(built)
    manifest, backend = built.manifest, backend_of(built)
    assert backend.engines
    options = options.model_copy(update={"build": True})
    if architectures:
        chosen = {**options.model_dump(), "architectures": architectures}
        options = check_options(engine_options(chosen), manifest.target, manifest.dialect)
    need_package(PACKAGES[manifest.target])
    if manifest.weights.mode != "unbound":
        built.stored()  # refuses changed shards
    models = {part: backend.load(built, part) for part in built.parts}
    start = time.perf_counter()
    with writing(built.path / ENGINES, ours=True) as folder:
        engines = backend.engines(
            models, built.path, folder, built.weights_folder, manifest.spec, options, progress
        )
        files = {
            f"{ENGINES}/{each.relative_to(folder).as_posix()}": file_of(each)
            for each in sorted(folder.rglob("*"))
            if each.is_file()
        }
    seconds = manifest.build.seconds | {"engine": round(time.perf_counter() - start, 3)}
    of_plugin = {name: each for name, each in files.items() if not name.endswith(".engine")}
    update = {
        "options": options,
        "engines": {
            part: each.model_copy(
                update={
                    "files": {each.file: files[each.file]} | (of_plugin if each.plugins else {})
                }
            )
            for part, each in engines.items()
        },
        "build": manifest.build.model_copy(update={"seconds": seconds}),
    }
    done = replace(built, manifest=manifest.model_copy(update=update))
    write_manifest(built.path, done.manifest)
    return done


def trtexec_commands(artefact: str | Path) -> list[str]:
    """What builds the same engines without moec: see `moec.exporters.tensorrt.trtexec`.

    Raises:
        MoecError: not an artefact of target tensorrt, or weights that trtexec would not find.
    """
    built = open_artefact(artefact)
    _options_of(built)
    if built.manifest.target != "tensorrt":
        refuse(
            artefact,
            f"an artefact of target {built.manifest.target}",
            "target tensorrt",
            "build it with --target tensorrt",
        )
    return list(commands(built))


def _options_of(artefact: Artefact) -> EngineOptions:
    """What engines of `artefact` are built for."""
    options = artefact.manifest.options
    if artefact.manifest.target not in PACKAGES or options is None:
        refuse(
            artefact.path,
            f"an artefact of target {artefact.manifest.target}, without engines",
            " or ".join(PACKAGES),
            "build it with --target tensorrt",
        )
    return options
