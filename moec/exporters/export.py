"""`export` and `bind`: from a description of a model, with or without weights, to an artefact."""

import gc
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact, file_of, open_artefact, write_manifest
from moec.artefact.engine_options import EngineOptions
from moec.artefact.folder import refuse_foreign, writing
from moec.artefact.manifest import Build, Manifest, Ports, Weights, compute_of
from moec.artefact.placement import Progress, pack, place
from moec.artefact.process_memory import memory
from moec.artefact.targets import (
    PACKAGES,
    SCHEMES,
    SUFFIXES,
    check_placement,
    choose,
    default_precision,
)
from moec.exporters.backends import BACKENDS, Model, backend_of
from moec.exporters.engines import build_engines
from moec.exporters.onnx.genai import write_genai
from moec.exporters.onnx.write import GENAI
from moec.exporters.precision import in_precision
from moec.exporters.tensorrt.build import ENGINES, check_options, need_package
from moec.spec.calibration import Calibration, read_calibration, static_scales
from moec.spec.errors import MoecError, refuse
from moec.spec.files import diff, load_spec
from moec.spec.model import ModelSpec
from moec.spec.scheme import Scheme
from moec.spec.tensors import tensors
from moec.weights.checkpoint import Checkpoint
from moec.weights.journal import PACKED, discard
from moec.weights.name_map import read_model
from moec.weights.shard import TensorEntry
from moec.weights.view import STORED

#: what `calibrate` found, where a checkpoint has it with it
SCALES = "scales.json"


@dataclass(slots=True)
class _Stages:
    """Times each stage of a build and tells the caller."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.progress(name, 0, 1)
        yield
        self.seconds[name] = time.perf_counter() - start
        self.progress(name, 1, 1)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage meanwhile: a build makes many objects and drops few.

    Walking all of them again and again took a third of its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def export(
    source: str | Path | ModelSpec,
    target: str = "onnx",
    precision: str | None = None,
    out: str | Path | None = None,
    weights: str | None = None,
    progress: Progress = lambda stage, done, total: None,
    scheme: str | Path | Scheme | None = None,
    scales: str | Path | Calibration | None = None,
    cache: str | None = None,
    options: EngineOptions | None = None,
) -> Artefact:
    """Build an artefact of `source`: a checkpoint folder, or a preset, spec file or spec (unbound).

    Args:
        target: "onnx" (plain ONNX), "ort" (ONNX Runtime's own operators), "torch" (a torch.export
            program of fused FP8 ops), "tensorrt" or "tensorrt-rtx" (engines).
        precision: what the graph computes in, "fp32", "fp16" or "bf16"; weights stay in the dtype
            that they are stored in, unless they are packed. "int8" and "int4" (ort) compute in
            fp32 on packed weights; so does "fp8", on weights and inputs rounded to E4M3, but for
            targets of GPUs, which compute it in bf16. Default "fp8" where the source's weights
            are and for target "torch", which has no other, "bf16" for TensorRT, else "fp32".
        out: the artefact's folder; default build/NAME-TARGET-PRECISION.
        weights: "in-place" (the checkpoint's own bytes, not copied), "link" (hard links beside the
            model), "copy", or "pack" (rewritten once: in the layout that runs fastest, or in FP8).
            Default "in-place" where the precision allows it, else "pack". Without a checkpoint
            there is nothing to place, but "pack" still says what the graph will want.
        progress: called with (stage, done, total).
        scheme: how wide weights become FP8: "meta" (default), "dynamic" (default for target
            "torch", which has no other), "mixed" (default for "tensorrt"), "static" (default for
            "tensorrt-rtx"), "modelopt", "deepseek", or a file. FP8 checkpoints come with theirs.
        scales: what `calibrate` found, for schemes with static scales; default the checkpoint's
            own file scales.json.
        cache: "fp8" or "wide": how keys and values are kept; default as the scheme says.
        options: what engines are built for; targets "tensorrt" and "tensorrt-rtx" alone.

    Raises:
        MoecError: anything wrong with source, weights or out; nothing is left behind. Or an engine
            cannot be built: then all else is there.
    """
    stages = _Stages(progress)
    with stages("read"):
        checkpoint, entries = None, dict[str, TensorEntry]()
        if not isinstance(source, ModelSpec) and os.path.isdir(source):
            spec, checkpoint, entries = read_model(source)
        else:
            spec = load_spec(source)
        if precision is None:
            precision = default_precision(target, spec.scheme)
        spec = in_precision(spec, precision, scheme, cache, SCHEMES.get(target, "meta"))
        dialect, mode = choose(target, precision, weights, spec.scheme)
        backend = BACKENDS[target]
        backend.check(spec, precision)
        if options is not None and not backend.engines:
            refuse(
                "options",
                f"target {target}, which has no engines",
                "tensorrt or tensorrt-rtx",
                "leave them out",
            )
        sizes = options or EngineOptions()
        if backend.engines:
            sizes = check_options(sizes, target, dialect)
            if sizes.build:
                need_package(PACKAGES[target])
            if sizes.build and not checkpoint:  # what such an engine is; no weights will change it
                sizes = sizes.model_copy(update={"bindings": "all"})
        path = Path(out or f"build/{spec.name}-{target}-{precision}")
        refuse_foreign(path)
        if checkpoint:
            _refuse_inside(path, checkpoint.folder)
        if scales is not None and not checkpoint:
            refuse("--scales", "a build without weights", "a checkpoint", "give it to bind instead")
        constants = _constants(spec, mode, scales, checkpoint.folder) if checkpoint else {}
    with stages("graph"):
        graphs = backend.graphs(spec, compute_of(target, precision), dialect, sizes)
    with stages("lower"):
        lowered = {
            part: backend.lower(graph, dialect, f"{spec.name} {part}", part)
            for part, graph in graphs.items()
        }
        models = {part: model for part, (model, _) in lowered.items()}
        packings = {name: each for _, wanted in lowered.values() for name, each in wanted.items()}
        if spec.scheme and mode == "pack":
            packings = backend.fp8_packings(spec)
    manifest = Manifest(
        spec=spec,
        target=target,
        dialect=dialect,
        opset=backend.opset,
        precision=precision,
        checkpoint=None,
        weights=Weights(mode="unbound"),
        files={},
        inputs=(),
        outputs=(),
        packings=packings,
        presets=backend.presets(any(p.bits for p in packings.values()), spec.scheme is not None),
        options=sizes if backend.engines else None,
        versions=_versions(),
        build=Build(seconds={}, peak_bytes=0, bytes_written=0, bytes_copied=0),
    )
    art = _write(path, models, manifest, checkpoint, entries, mode, stages, constants)
    return _with_engines(art, progress) if backend.engines and sizes.build else art


def _with_engines(art: Artefact, progress: Progress) -> Artefact:
    """`art`, which is whole, with its engines; it stays where they cannot be built."""
    try:
        return build_engines(art, progress=progress)
    except MoecError as error:
        refuse(
            error.where,
            error.found,
            error.expected,
            f"{error.next_step}; the rest is there: moec engine {art.path}",
            exit_code=error.exit_code,
            cause=error,
        )


@_no_collection()
def bind(
    artefact: str | Path,
    checkpoint: str | Path,
    out: str | Path | None = None,
    weights: str | None = None,
    progress: Progress = lambda stage, done, total: None,
    scales: str | Path | Calibration | None = None,
    engine: bool = True,
) -> Artefact:
    """Attach `checkpoint` to an artefact that was built without one, or bind it anew.

    The result goes to `out`, or replaces the artefact. The graph stays as it was built. `scales`
    as in `export`. An engine that takes all weights as inputs stays too; others are built anew
    where the artefact was to have some, unless `engine` is false.

    Raises:
        MoecError: the checkpoint is not of the artefact's model, or is broken.
    """
    stages = _Stages(progress)
    with stages("read"):
        built = open_artefact(artefact)
        backend = backend_of(built)
        packs = bool(built.manifest.packings)
        mode = weights or ("pack" if packs else "in-place")
        check_placement(mode, packs)
        path = Path(out or artefact)
        refuse_foreign(path)
        spec, read, entries = read_model(checkpoint)
        _refuse_inside(path, read.folder)
        wanted = built.manifest.spec
        if packs:  # wide weights, which this artefact makes narrow
            wanted = wanted.model_copy(update={"scheme": None})
        elif spec.scheme and wanted.scheme and not wanted.scheme.cache:
            spec = in_precision(spec, "fp8", None, "wide")
        odd = [row for row in diff(spec, wanted) if row[0] != "provenance"]
        if odd:
            field_path, found, expected = odd[0]
            refuse(
                f"{checkpoint}: {field_path}",
                found,
                f"{expected}, as {artefact} was built ({len(odd)} fields differ)",
                f"moec build --checkpoint {checkpoint}",
            )
        constants = _constants(built.manifest.spec, mode, scales, read.folder)
        options = built.manifest.options
        stays = bool(built.manifest.engines) and options is not None and options.bindings == "all"
        wants = engine and options is not None and options.build and not stays
        if wants:
            need_package(PACKAGES[built.manifest.target])
        models = {part: backend.load(built, part) for part in built.parts}
    art = _write(
        path,
        models,
        built.manifest,
        read,
        entries,
        mode,
        stages,
        constants,
        engines=built if stays else None,
    )
    return _with_engines(art, progress) if wants else art


def _write(
    path: Path,
    models: dict[str, Model],
    manifest: Manifest,
    checkpoint: Checkpoint | None,
    entries: dict[str, TensorEntry],
    mode: str,
    stages: _Stages,
    constants: dict[str, Tensor],
    engines: Artefact | None = None,
) -> Artefact:
    """The artefact at `path`; with the engines of another, which fit it, or without any."""
    with writing(path) as folder:
        if not (checkpoint and mode == "pack"):
            discard(folder / PACKED)
        backend, suffix = BACKENDS[manifest.target], SUFFIXES[manifest.target]
        options = manifest.options or EngineOptions()
        targets = {folder / f"{part}{suffix}": model for part, model in models.items()}
        if manifest.weights.mode == "unbound":
            with stages("check"):
                for target, model in targets.items():
                    backend.save_unbound(model, target)
        bound = None
        if checkpoint:
            with stages("weights"):
                if mode == "pack":
                    bound = pack(checkpoint, entries, manifest, folder, stages.progress, constants)
                else:
                    used = {name: entries[name] for name in tensors(manifest.spec)}
                    bound = place(checkpoint, used, mode, folder, stages.progress)
            with stages("write"):
                for target, model in targets.items():
                    backend.save_bound(model, target, bound.entries, bound.root, options)
        if GENAI in models:
            root = Path(bound.weights.folder) if bound and bound.weights.folder else path
            companions = checkpoint.folder if checkpoint else None
            write_genai(folder / "genai", path / "genai", manifest, root, companions)
        written = {
            each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()
        }
        shards = set(bound.weights.shards) if bound else set()
        files = {name: file_of(folder / name) for name in sorted(written - shards)}
        if engines:
            shutil.copytree(engines.path / ENGINES, folder / ENGINES)
        done = manifest.model_copy(
            update={
                "checkpoint": str(checkpoint.folder.resolve()) if checkpoint else None,
                "weights": bound.weights if bound else manifest.weights,
                "files": files,
                "engines": engines.manifest.engines if engines else {},
                **_ports({part: backend.ports(model) for part, model in models.items()}),
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
        write_manifest(folder, done)
    return Artefact(path, done)


def _ports(by_part: dict[str, Ports]) -> dict[str, Any]:
    """What the graphs take and give, as fields of the manifest."""
    decoder = by_part["model"]
    return {
        "inputs": decoder.inputs,
        "outputs": decoder.outputs,
        "vision": by_part.get("vision"),
    }


def _constants(
    spec: ModelSpec, mode: str, scales: str | Path | Calibration | None, checkpoint: Path
) -> dict[str, Tensor]:
    """The static scales that a packed file has beside the weights."""
    scheme = spec.scheme
    wanted = mode == "pack" and scheme is not None and scheme.static
    if scales is not None and not wanted:
        refuse(
            "--scales",
            "a build that has no static scales to find",
            "a scheme with static scales, on wide weights",
            "leave --scales out",
        )
    if scheme is None or not wanted:
        return {}
    if scales is None and (checkpoint / SCALES).is_file():
        scales = checkpoint / SCALES
    found = (
        scales if scales is None or isinstance(scales, Calibration) else read_calibration(scales)
    )
    dtype, constants = STORED[scheme.scales], dict[str, Tensor]()
    for name, each in static_scales(spec, found).items():
        scale = torch.tensor(each, dtype=dtype).clamp(min=torch.finfo(dtype).smallest_normal)
        if not bool(scale.isfinite().all()):
            refuse(
                f"--scales: {name}",
                f"{each}, which {scheme.scales} cannot hold",
                "a finite scale",
                "use scales: fp32 in the scheme, or calibrate again",
            )
        constants[name] = scale
    return constants


def _refuse_inside(out: Path, checkpoint: Path) -> None:
    """Refuse an `out` that is the checkpoint or holds it: replacing `out` would delete it."""
    if checkpoint.resolve().is_relative_to(out.resolve()):
        refuse(
            f"--out {out}",
            f"the folder of the checkpoint {checkpoint}",
            "another folder",
            "choose another --out",
        )


def _versions() -> dict[str, str]:
    packages = ("moec", "torch", "onnx", "onnx-ir", "onnxruntime")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except ImportError:  # a checkout that is not installed, or an optional runtime
            continue
    return found
