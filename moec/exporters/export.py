"""`export` builds an artefact; `bind` attaches a checkpoint to an artefact."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moec.artefact.artefact import (
    Artefact,
    check_digest,
    check_files,
    named_folder,
    open_artefact,
)
from moec.artefact.choices import check_placement, choose, for_device, merging
from moec.artefact.engine_options import EngineOptions
from moec.artefact.folder import default_out, refuse_foreign
from moec.artefact.manifest import Build, Manifest, Weights
from moec.artefact.placement import Progress
from moec.artefact.session_options import options_of
from moec.artefact.targets import find_target
from moec.exporters.builder import Wanted, builder_for, builder_of, turned_experts
from moec.exporters.engines import build_engines
from moec.exporters.precision import in_precision
from moec.exporters.stages import Stages, no_collection
from moec.exporters.static_scales import scales_for
from moec.exporters.versions import versions
from moec.exporters.write import write_artefact
from moec.spec.bounded.own import check_utf8
from moec.spec.calibration import Calibration
from moec.spec.errors import MoecError, refuse
from moec.spec.files import load_spec, other_model
from moec.spec.hf.forms import checkpoint_folder
from moec.spec.hf.generation import generates_as
from moec.spec.model import ModelSpec
from moec.spec.scheme import Scheme
from moec.weights.checkpoint import Checkpoint
from moec.weights.name_map import as_packed, read_model
from moec.weights.shard import TensorEntry
from moec.weights.trust.records import allow, allow_folder


@no_collection()
def export(
    source: str | Path | ModelSpec,
    target: str = "onnx",
    precision: str | None = None,
    out: str | Path | None = None,
    *,
    weights: str | None = None,
    progress: Progress = lambda stage, done, total: None,
    scheme: str | Path | Scheme | None = None,
    scales: str | Path | Calibration | None = None,
    cache: str | None = None,
    options: EngineOptions | None = None,
    weights_from: str | Path | None = None,
    hash_weights: bool = False,
    adapters: Sequence[str | Path] = (),
    device: str | None = None,
    mtp: bool = False,
) -> Artefact:
    """Build an artefact of a model.

    Args:
        source: a checkpoint folder; or a preset, a spec file or a spec. Those three have no
            weights, so that the artefact is unbound.
        target: "onnx" (plain ONNX), "ort" (ONNX Runtime's own operators; "ort-cuda" is its FP8 on
            a GPU), "torch" (a torch.export
            program, of fused FP8 ops where the model has them), "tensorrt" or "tensorrt-rtx"
            (TensorRT engines).
        precision: "fp32", "fp16" and "bf16" are the dtype that the graph computes in; weights keep
            the dtype in which they are stored, unless they are packed. "int8" and "int4" (target
            "ort") are dtypes of packed weights; the graph computes in fp32. "int4" is the precision
            of checkpoints of 4-bit integers too (targets "onnx" and "ort"). "fp8" rounds weights
            and inputs to E4M3; the graph computes in fp32, or in bf16 for the targets of GPUs. The
            default is "fp8" or "int4" if the source's weights are, and "fp8" for target "torch";
            else "bf16" for TensorRT and "fp32" for the other targets.
        out: the artefact's folder; default build/NAME-TARGET-PRECISION.
        weights: "in-place" (the artefact refers to the checkpoint's files), "link" (hard links
            beside the model), "copy", or "pack" (moec writes the weights anew: in the layout that
            runs fastest, or in FP8). The default is "in-place" if the precision allows it, else
            "pack". A build without a checkpoint places no weights, but "pack" still decides which
            layout the graph expects.
        progress: called with (stage, done, total).
        scheme: how wide weights become FP8: "meta" (default), "dynamic" (default for target
            "torch"; fused ops have no other), "mixed" (default for "tensorrt"), "static" (default
            for "tensorrt-rtx"), "modelopt", "deepseek", or a file. An FP8 checkpoint has its own
            scheme.
        scales: the result of `calibrate`, or a file of it, for schemes with static scales; default
            the checkpoint's own file scales.json.
        cache: "fp8" or "wide": how the caches store keys and values; default as the scheme says.
        options: the sizes that TensorRT engines are built for; only for targets "tensorrt" and
            "tensorrt-rtx".
        weights_from: a further folder to which links in the checkpoint may lead.
        hash_weights: whether weights that stay where they are get a SHA-256 too.
        adapters: folders of LoRA adapters, which moec merges into the weights in this order. The
            sum is made in float32. Merged weights are copied or packed.
        device: what ONNX Runtime will run on, "cpu" or "cuda"; only for target "ort". FP8, the
            default for "cuda", is target "ort-cuda" there, whose ops a library of moec's kernels
            runs. Without `device` FP8 is for a CPU.
        mtp: whether to build the layer of multi-token prediction too, if the model has one. It
            drafts tokens for `Session.generate`.

    The folders that hold the checkpoint are recorded in the user's state folder, so that this user
    may open artefacts whose weights lie there.

    Raises:
        MoecError: source, weights, out or another argument is wrong; then nothing is written. Or a
            TensorRT engine cannot be built; then the rest of the artefact is written.
    """
    stages = Stages(progress)
    with stages("read"):
        chosen = find_target(target)
        checkpoint, entries = None, dict[str, TensorEntry]()
        if not isinstance(source, ModelSpec) and checkpoint_folder(source):
            named = named_folder(weights_from)
            spec, checkpoint, entries = read_model(source, named, adapters, mtp)
        else:
            if adapters:
                name = source.name if isinstance(source, ModelSpec) else source
                refuse("adapters", f"no weights in {name}", "a checkpoint", "give its folder")
            spec = load_spec(source, mtp)
        chosen, precision = for_device(chosen, precision, device, spec.scheme)
        target = chosen.name
        spec = in_precision(spec, precision, scheme, cache, chosen.scheme)
        dialect, mode = choose(chosen, precision, weights, spec.scheme)
        mode = merging(mode, weights) if adapters else mode
        if mode == "pack":
            spec, entries = as_packed(spec, entries)
        builder = builder_of(target)
        dialect = builder.dialect(dialect, spec) if builder.dialect else dialect
        wanted = Wanted(
            spec, precision, chosen.compute(precision), dialect, options or EngineOptions()
        )
        builder.check(wanted)
        compiler = builder.compiler
        if options is not None and not compiler:
            refuse(
                "options",
                f"target {target}, which has no engines",
                "tensorrt or tensorrt-rtx",
                "leave them out",
            )
        if compiler:
            sizes = compiler.check(wanted.options, dialect)
            if sizes.build:
                compiler.need()
            if sizes.build and not checkpoint:  # an engine without weights takes them as inputs
                sizes = sizes.model_copy(update={"bindings": "all"})
            wanted = replace(wanted, options=sizes)
        path = Path(out) if out else default_out(spec.name, target, precision)
        _check_places(path, checkpoint)
        if scales is not None and not checkpoint:
            refuse("--scales", "a build without weights", "a checkpoint", "give it to bind instead")
        constants = scales_for(spec, mode, scales, checkpoint.folder) if checkpoint else {}
        in_fp8 = builder.packings(spec) if spec.fp8 and mode == "pack" else {}
        wanted = replace(wanted, turned=turned_experts(in_fp8))
    with stages("graph"):
        graphs = builder.graphs(wanted)
    with stages("lower"):
        lowered = {part: builder.lower(wanted, graph, part) for part, graph in graphs.items()}
        models = {part: model for part, (model, _) in lowered.items()}
        packings = {name: each for _, wanted in lowered.values() for name, each in wanted.items()}
        packings = in_fp8 or packings
    manifest = Manifest(
        spec=spec,
        target=target,
        dialect=dialect,
        opset=builder.opset,
        precision=precision,
        checkpoint=None,
        weights=Weights(mode="unbound"),
        files={},
        inputs=(),
        outputs=(),
        packings=packings,
        options=wanted.options if compiler else None,
        versions=versions(),
        build=Build(bytes_written=0, bytes_copied=0),
    )
    manifest = manifest.model_copy(update={"presets": options_of(manifest)})
    art = write_artefact(
        path, models, manifest, checkpoint, entries, mode, stages, constants, hashed=hash_weights
    )
    _allow(checkpoint)
    return _with_engines(art, progress) if compiler and wanted.options.build else art


def _with_engines(art: Artefact, progress: Progress) -> Artefact:
    """Build the TensorRT engines of the complete artefact `art`; if that fails, `art` remains."""
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


@no_collection()
def bind(
    artefact: str | Path,
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    weights: str | None = None,
    progress: Progress = lambda stage, done, total: None,
    scales: str | Path | Calibration | None = None,
    engine: bool = True,
    weights_from: str | Path | None = None,
    hash_weights: bool = False,
    adapters: Sequence[str | Path] = (),
) -> Artefact:
    """Attach a checkpoint to an artefact that was built without one, or replace its checkpoint.

    The graphs stay as they were built. `bind` keeps a TensorRT engine that takes all weights as
    inputs. It builds other TensorRT engines again, because they contain weights.

    Args:
        artefact: the artefact's folder.
        checkpoint: the folder of the weights.
        out: where the result goes; default in place of the artefact.
        weights: the placement of the weights, as in `export`.
        progress: called with (stage, done, total).
        scales: as in `export`.
        engine: whether to build TensorRT engines, if the artefact's options ask for them.
        weights_from: as in `export`.
        hash_weights: as in `export`.
        adapters: as in `export`.

    The folders that hold the checkpoint are recorded as by `export`.

    Raises:
        MoecError: the checkpoint is broken or of another model; the artefact's graphs are not as
            they were built (exit code 1); or a TensorRT engine cannot be built.
    """
    stages = Stages(progress)
    with stages("read"):
        named = named_folder(weights_from)
        built = open_artefact(artefact, named)
        check_digest(built)
        check_files(built, built.graphs)
        builder = builder_for(built)
        packs = bool(built.manifest.packings)
        mode = weights or ("pack" if packs else "in-place")
        mode = merging(mode, weights) if adapters else mode
        check_placement(mode, packs)
        path = Path(out or artefact)
        refuse_foreign(path)
        wanted = built.manifest.spec
        spec, read, entries = read_model(checkpoint, named, adapters, wanted.text.mtp == "built")
        _check_places(path, read)
        if packs:
            spec, entries = as_packed(spec, entries)
        if packs and not spec.scheme:  # this artefact quantises wide weights
            wanted = wanted.model_copy(update={"scheme": None})
        elif spec.fp8 and wanted.scheme and not wanted.scheme.cache:
            spec = in_precision(spec, "fp8", None, "wide")
        odd = other_model(spec, wanted)
        if odd:
            field_path, found, expected = odd[0]
            refuse(
                f"{checkpoint}: {field_path}",
                found,
                f"{expected}, as {artefact} was built ({len(odd)} fields differ)",
                f"moec build --checkpoint {checkpoint}",
            )
        constants = scales_for(built.manifest.spec, mode, scales, read.folder)
        bound_spec = generates_as(built.manifest.spec, spec)
        options = built.manifest.options
        stays = bool(built.manifest.engines) and options is not None and options.bindings == "all"
        compiler = builder.compiler
        wants = engine and options is not None and options.build and not stays
        if wants and compiler:
            compiler.need()
        models = {part: builder.load(built, part) for part in built.parts}
    art = write_artefact(
        path,
        models,
        built.manifest.model_copy(update={"spec": bound_spec}),
        read,
        entries,
        mode,
        stages,
        constants,
        engines=built if stays else None,
        hashed=hash_weights,
    )
    _allow(read)
    return _with_engines(art, progress) if wants else art


def _allow(checkpoint: Checkpoint | None) -> None:
    """Record the folders and the adapters that this user has built or bound from."""
    if checkpoint:
        for folder in checkpoint.folders:
            allow_folder(folder)
        for adapter in checkpoint.adapters:
            allow("adapter", os.path.realpath(adapter))


def _check_places(out: Path, checkpoint: Checkpoint | None) -> None:
    """Refuse an `out` that holds something else, and folders whose names are not UTF-8.

    An `out` that is or contains a source of weights is refused too: replacing it would delete them.
    """
    refuse_foreign(out)
    check_utf8(out)
    for folder in sorted(checkpoint.folders) if checkpoint else ():
        check_utf8(folder)
        if folder.resolve().is_relative_to(out.resolve()):
            refuse(
                f"--out {out}",
                f"the folder of the checkpoint {folder}",
                "another folder",
                "choose another --out",
            )
