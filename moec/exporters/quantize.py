"""`quantize` writes a checkpoint anew in FP8, so that moec, vLLM and transformers can read it.

The result is a Hugging Face folder in compressed-tensors form: the published names, experts apart.
No graph is built, and the weights are streamed as a build streams them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote

from moec.artefact.artefact import named_folder
from moec.artefact.folder import default_folder, refuse_filled, writing
from moec.artefact.placement import Progress, copy_companions
from moec.exporters.publish import describe
from moec.spec.errors import refuse
from moec.spec.files import load_scheme
from moec.spec.hf.architectures import ARCHITECTURES
from moec.spec.hf.written import told
from moec.spec.model import ModelSpec
from moec.spec.parameters import parameters
from moec.spec.scheme import Scheme
from moec.spec.tensors import quantized
from moec.weights.name_map import as_packed, read_model
from moec.weights.packed.published import published
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
) -> Quantised:
    """Quantise a checkpoint of wide weights to FP8, as a checkpoint that other engines read too.

    Args:
        checkpoint: a checkpoint folder.
        scheme: "dynamic" (all linear layers) or "meta" (the experts alone), with a scale for each
            output of a weight and each token of its inputs; "deepseek" (scales of blocks); a file.
        out: the folder to write, which must not hold anything; default build/NAME-SCHEME.
        progress: called with (stage, done, total) in bytes of weights read.
        weights_from: a further folder to which links in the checkpoint may lead.
        adapters: folders of LoRA adapters, merged into the weights in this order.

    A call that is cut off leaves a hidden folder beside `out`; the next one goes on with it.

    Raises:
        MoecError: the checkpoint is broken or quantised already, the format cannot say what the
            scheme says, or `out` holds something; then nothing is written.
    """
    spec, read, entries = read_model(checkpoint, named_folder(weights_from), adapters)
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
    _, stacks = as_packed(spec, entries)
    packings = _packings(as_told, stacks)
    places = published(as_told, packings)
    with writing(path, refuse_filled) as folder:
        copy_companions(read, folder)
        files, count = write_shards(folder, packings, stacks, places, partial(progress, "quantise"))
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
        found[packing.names(stored)[0]] = packing
    return found
