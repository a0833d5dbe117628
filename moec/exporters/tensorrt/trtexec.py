"""Print the commands with which `trtexec` builds the same TensorRT engines."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from moec.artefact.artefact import Artefact
from moec.artefact.engine_job import Job
from moec.artefact.engine_options import EngineOptions
from moec.exporters.onnx.strangers import load_checked
from moec.exporters.tensorrt.build import job_of, plugin_of, wants_plugin_library
from moec.spec.errors import refuse


def commands(artefact: Artefact) -> Iterator[str]:
    """A shell command for each part of `artefact`, which has target tensorrt.

    If a part uses the MoE plugin, its sources are written, and a command that compiles them comes
    first. All files go to the folder `trtexec` of the artefact. Unlike `build_engines`, the
    commands do not check whether the parser kept the meaning of the graph.

    Raises:
        MoecError: the weights are not beside the model, where trtexec looks for them; or the folder
            cannot be written.
    """
    manifest, path = artefact.manifest, artefact.path
    assert manifest.options is not None
    if manifest.weights.mode == "in-place" and manifest.options.bindings != "all":
        refuse(
            path,
            f"weights left in place, in {manifest.weights.folder}",
            "weights beside the model, where trtexec looks for them",
            f"moec bind {path} --checkpoint {shlex.quote(str(manifest.checkpoint))} --weights link",
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
            "make room on the disk, or copy the artefact elsewhere",
        )


def _parts(artefact: Artefact, options: EngineOptions, folder: Path) -> Iterator[str]:
    manifest, path = artefact.manifest, artefact.path
    for part in artefact.parts:
        model = load_checked(artefact, part)
        plugins = tuple[str, ...]()
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
