"""`quantize` writes a checkpoint anew, in FP8 or 4-bit integers, for moec, vLLM and transformers.

The result is a Hugging Face folder in compressed-tensors form: the published names, experts apart.
No graph is built, and the weights are streamed as a build streams them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote

from torch import Tensor

from moec.artefact.artefact import named_folder
from moec.artefact.folder import default_folder, refuse_filled, writing
from moec.artefact.placement import Progress, copy_companions
from moec.exporters.publish import describe, typed_as_packed
from moec.exporters.static_scales import scales_for
from moec.spec import names
from moec.spec.bounded.own import check_utf8
from moec.spec.calibration import Calibration
from moec.spec.errors import refuse
from moec.spec.files import load_scheme
from moec.spec.hf.architectures import ARCHITECTURES
from moec.spec.hf.written import told
from moec.spec.model import ModelSpec
from moec.spec.parameters import parameters
from moec.spec.scheme import Scheme
from moec.spec.tensors import quantized
from moec.weights.name_map import as_packed, read_model
from moec.weights.packed.published import Published, published
from moec.weights.packed.shards import write_shards
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry


@dataclass(frozen=True, slots=True)
class Quantised:
    """A checkpoint that `quantize` wrote.

    Attributes:
        path: its folder.
        files: its shards, by name, with their sizes in bytes.
        read: the bytes of weights that this call read.
        notes: what the checkpoint's config says and the model leaves aside.
    """

    path: Path
    files: dict[str, int]
    read: int
    notes: tuple[str, ...] = ()


def quantize(
    checkpoint: str | Path,
    scheme: str | Path | Scheme = "dynamic",
    out: str | Path | None = None,
    *,
    progress: Progress = lambda stage, done, total: None,
    weights_from: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    scales: str | Path | Calibration | None = None,
    mtp: bool = False,
) -> Quantised:
    """Quantise a checkpoint of wide weights, as a checkpoint that other engines read too.

    Args:
        checkpoint: a checkpoint folder.
        scheme: FP8: "dynamic" (all linear layers) or "meta" (the experts alone), with a scale for
            each output of a weight and each token of its inputs; "per-tensor" (one scale for a
            weight, a static one for its inputs); "deepseek" (scales of blocks). 4-bit integers:
            "w4a16" (a scale for 128 inputs of an output). Or a file.
        out: the folder to write, which must not hold anything; default build/NAME-SCHEME.
        progress: called with (stage, done, total) in bytes of weights read.
        weights_from: a further folder to which links in the checkpoint may lead.
        adapters: folders of LoRA adapters, merged into the weights in this order.
        scales: the result of `calibrate`, or a file of it, for static scales; default the
            checkpoint's own file scales.json.
        mtp: whether to write the layer of multi-token prediction too, if the model has one, for
            engines that draft tokens with it.

    A call that is cut off leaves a hidden folder beside `out`; the next one goes on with it.

    Raises:
        MoecError: the checkpoint is broken or quantised already, the format cannot say what the
            scheme says, or `out` holds something or is not UTF-8; then nothing is written.
    """
    spec, read, entries = read_model(checkpoint, named_folder(weights_from), adapters, mtp)
    if spec.scheme:
        refuse(
            checkpoint,
            f"weights that are {spec.scheme.precision.upper()} already ({spec.scheme.name})",
            "wide weights",
            f"build from it as it is: moec build --checkpoint {quote(str(checkpoint))}",
        )
    if spec.text.experts and not ARCHITECTURES[spec.architecture].reads_apart:
        refuse(
            checkpoint,
            f"a model of {spec.architecture}, whose experts other engines read in one tensor alone",
            "a model whose quantised experts they read one by one",
            f"quantise it for moec: moec build --checkpoint {quote(str(checkpoint))} "
            "--precision fp8",
        )
    chosen = load_scheme(scheme)
    as_told, config = told(spec, chosen)
    path = Path(out) if out else default_folder(f"{spec.name}-{chosen.name}")
    check_utf8(path)
    assert as_told.scheme is not None
    rules = (chosen.rules[0].model_copy(update={"of": as_told.scheme.rules[0].of}),)
    in_scheme = spec.model_copy(update={"scheme": chosen.model_copy(update={"rules": rules})})
    static = scales_for(in_scheme, "pack", scales, read.folder)
    _, stacks = as_packed(spec, entries)
    packings = _packings(as_told, stacks)
    places = published(as_told, packings)
    as_told = typed_as_packed(as_told, packings)
    with writing(path, refuse_filled) as folder:
        copy_companions(read, folder)
        stage, constants = partial(progress, "quantise"), _for_each_part(static, places)
        files, count = write_shards(folder, packings, stacks, places, stage, constants=constants)
        describe(folder, as_told, config, chosen.name, read)
        sizes = {file: (folder / file).stat().st_size for file in files}
    return Quantised(path, sizes, count, spec.notes)


def _packings(as_told: ModelSpec, stacks: dict[str, TensorEntry]) -> dict[str, Packing]:
    """How each parameter is written, by the first tensor that holds it: matrices are [out, in]."""
    rules, found = quantized(as_told), dict[str, Packing]()
    for name, shape in parameters(as_told).items():
        apart = len(shape) == 3 and (name in rules or as_told.separate_experts)
        stored = stacks[name].dtype
        packing = Packing.by(name, stored, rules.get(name), as_told.scheme, turned=apart)
        parts = len(names.separate(name, 0)) if apart else 1
        if packing.fp8 == "expert" and parts > 1:
            packing = packing.model_copy(update={"parts": parts})
        found[packing.names(stored)[0]] = packing
    return found


def _for_each_part(
    static: Mapping[str, Tensor], places: Mapping[str, Published]
) -> dict[str, Tensor]:
    """Static scales of inputs, by parameter: one for each tensor that a checkpoint has of it.

    `static` has one for each parameter, or one for each of its experts, by our names.
    """
    found = {}
    for name, each in static.items():
        count, own = len(places[name]), each.reshape(-1)
        found[names.scaled(name)] = own.repeat_interleave(count // len(own))
    return found
