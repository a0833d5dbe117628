"""Build the TensorRT engines of an artefact.

`export` and `bind` build them with the artefact. A user may also build them later, on another
machine, or a second time.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moec.artefact.artefact import (
    Artefact,
    check_digest,
    check_files,
    file_of,
    open_artefact,
    write_manifest,
)
from moec.artefact.engine_job import ENGINES
from moec.artefact.engine_options import EngineOptions, engine_options
from moec.artefact.folder import writing
from moec.artefact.placement import Progress
from moec.artefact.targets import targets
from moec.exporters.builder import Compiler, builder_for, builder_of
from moec.spec.errors import refuse
from moec.weights.trust.records import allow


def build_engines(
    artefact: str | Path | Artefact,
    *,
    architectures: Sequence[str] = (),
    progress: Progress = lambda stage, done, total: None,
    weights_from: str | Path | None = None,
) -> Artefact:
    """Build the TensorRT engines of an artefact that has only their ONNX, or build them again.

    The engines and their plugin are the artefact's folder `engine`. A build that succeeds replaces
    the whole folder. A build that fails leaves the old folder.

    Args:
        artefact: an artefact, or its folder, of target "tensorrt" or "tensorrt-rtx".
        architectures: for target "tensorrt-rtx", the compute capabilities to build for, such as
            "SM89"; default those that the artefact was built for.
        progress: called with (stage, done, total).
        weights_from: the folder of the weights, as in `open_session`.

    The hashes of the engines and of their plugin are recorded in the user's state folder, so that
    this user may run them.

    Raises:
        MoecError: the artefact's target has no engines, an engine cannot be built, or a package is
            not installed (exit code 3).
    """
    built = artefact
    if not isinstance(built, Artefact):
        built = open_artefact(built, weights_from)
    check_digest(built)
    check_files(built, built.graphs)
    compiler, options = _compiler_of(built)
    manifest, builder = built.manifest, builder_for(built)
    options = options.model_copy(update={"build": True})
    if architectures:
        chosen = {**options.model_dump(), "architectures": tuple(architectures)}
        options = compiler.check(engine_options(chosen), manifest.dialect)
    compiler.need()
    if manifest.weights.mode != "unbound":
        built.stored()  # refuses shards that have changed
    models = {part: builder.load(built, part) for part in built.parts}
    start = time.perf_counter()
    with writing(built.path / ENGINES, check=lambda _: None) as folder:
        engines = compiler.build(
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
    done = write_manifest(built.path, manifest.model_copy(update=update))
    for each in files.values():
        allow("native", each.sha256)
    return replace(built, manifest=done, content=done.digest)


def trtexec_commands(artefact: str | Path, *, weights_from: str | Path | None = None) -> list[str]:
    """Return the shell commands that build an artefact's engines with trtexec, without moec.

    `weights_from` is the folder of the weights, as in `open_session`.

    Raises:
        MoecError: the artefact's target is not "tensorrt", or the commands would not find the
            weights.
    """
    built = open_artefact(artefact, weights_from)
    compiler, _ = _compiler_of(built)
    if compiler.commands is None:
        refuse(
            artefact,
            f"an artefact of target {built.manifest.target}",
            "target tensorrt",
            "build it with --target tensorrt",
        )
    return list(compiler.commands(built))


def _compiler_of(artefact: Artefact) -> tuple[Compiler, EngineOptions]:
    """The compiler of the artefact's target, and the options of the artefact's engines."""
    compiler, options = builder_of(artefact.manifest.target).compiler, artefact.manifest.options
    if compiler is None or options is None:
        known = [name for name in targets() if builder_of(name).compiler]
        refuse(
            artefact.path,
            f"an artefact of target {artefact.manifest.target}, without engines",
            " or ".join(known),
            "build it with --target tensorrt",
        )
    return compiler, options
