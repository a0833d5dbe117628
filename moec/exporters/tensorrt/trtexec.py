"""The same engines by TensorRT's own command: what to say to `trtexec`, and to the compiler."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from moec.artefact.artefact import Artefact
from moec.artefact.engine_job import Job
from moec.artefact.engine_options import EngineOptions
from moec.exporters.onnx.external_data import load_onnx
from moec.exporters.tensorrt.build import job_of, plugin_of, wants_plugin_library
from moec.spec.errors import refuse


def commands(artefact: Artefact) -> Iterator[str]:
    """A command for each part of `artefact`, of target tensorrt; before them that of the plugin.

    They write to the folder `trtexec` of the artefact, as the plugin's sources are. What they do
    not do is hold what the parser made of the graph against what it means: `build_engines` does.

    Raises:
        MoecError: weights that trtexec would not find: it looks beside the model alone.
    """
    manifest, path = artefact.manifest, artefact.path
    assert manifest.options is not None
    if manifest.weights.mode == "in-place" and manifest.options.bindings != "all":
        refuse(
            path,
            f"weights in place, in {manifest.weights.folder}",
            "weights beside the model",
            f"moec bind {path} --checkpoint {manifest.checkpoint} --weights link",
        )
    folder = path / "trtexec"
    try:
        folder.mkdir(exist_ok=True)
        yield from _parts(artefact, manifest.options, folder)
    except OSError as error:
        refuse(
            error.filename or folder,
            error.strerror,
            "a folder that can be written",
            "make room, or copy the artefact elsewhere",
        )


def _parts(artefact: Artefact, options: EngineOptions, folder: Path) -> Iterator[str]:
    manifest, path = artefact.manifest, artefact.path
    for part in artefact.parts:
        model, plugins = load_onnx(artefact.graph(part)), tuple[str, ...]()
        if wants_plugin_library(model):
            plugin = plugin_of(folder, manifest.spec, options, "tensorrt")
            yield plugin.command
            plugins = (str(plugin.folder / "libmoec_plugin.so"),)
        job = job_of(model, part, path, folder, None, manifest.spec, options, "tensorrt")
        yield _command(job, plugins)


def _command(job: Job, plugins: tuple[str, ...]) -> str:
    words = ["trtexec", f"--onnx={job.onnx}", f"--saveEngine={job.engine}", "--skipInference"]
    words += [f"--staticPlugins={each}" for each in plugins]
    for index, profile in enumerate(job.profiles):
        words.append(f"--profile={index}")
        for option, which in (("minShapes", "min"), ("optShapes", "opt"), ("maxShapes", "max")):
            shapes = (
                f"{name}:{'x'.join(map(str, getattr(span, which)))}"
                for name, span in profile.items()
            )
            words.append(f"--{option}={','.join(shapes)}")
    return shlex.join(words)
