"""Build the reduced-size model that stands for an artefact whose weights are absent or too many."""

from pathlib import Path

import torch

from moec.artefact.artefact import Artefact
from moec.artefact.manifest import Manifest
from moec.artefact.targets import find_target
from moec.exporters.export import export
from moec.runtime.calibrate import calibrate
from moec.spec.hf.architectures import ARCHITECTURES
from moec.spec.model import ModelSpec
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint

#: the length of a proof's longest sequence if the user names none: it crosses three chunk borders,
#: if the chunk is small enough
MOST_TOKENS = 512

#: precision -> the most layers of its reduced-size model, and the length of the longest sequence.
#: In float16 and below, a rounding flips a near tie in a router of random weights for one token in
#: hundreds at each layer, and the token that results is another one. So after dozens of layers
#: little is left to compare.
REDUCED = dict.fromkeys(("fp16", "bf16", "int8", "int4", "fp8"), (4, 101))
#: the fewest tokens of a proof in such a precision, in more sequences if need be: among fewer, one
#: token that went to another expert is a large part of the error
REDUCED_TOKENS = 128
#: engine options of a reduced-size model: no TensorRT engine is built, and caches are small
REDUCED_OPTIONS = {"context": MOST_TOKENS, "piece": MOST_TOKENS, "build": False}


def reduced_spec(manifest: Manifest, layers: int | None) -> ModelSpec:
    """The reduced-size model of an artefact, with at most `layers` layers; None: all of them.

    Its sizes are large enough for the kernels of the artefact's target.
    """
    sizes = find_target(manifest.target).reduced.get(manifest.dialect, {})
    return reduced(manifest.spec, layers, **sizes)


def build_reduced(artefact: Artefact, small: ModelSpec, folder: Path, seed: int) -> Artefact:
    """Build an artefact of `small` in `folder`, with random weights, as `artefact` was built.

    `seed` determines the weights, and the tokens that calibrate static scales.
    """
    manifest, scheme = artefact.manifest, small.scheme
    ours = scheme if scheme and scheme.layout == "moec" else None  # moec quantises wide weights
    weights, scales = folder / "weights", None
    # Packing has stacked the experts; a checkpoint has them as its architecture does.
    apart = {"separate_experts": ARCHITECTURES[small.architecture].separate_experts}
    written = small if small.scheme and not ours else small.model_copy(update=apart)
    if ours:
        written = written.model_copy(update={"scheme": None})
    write_random_checkpoint(written, weights, seed)
    if ours and ours.static:
        tokens = torch.randint(
            0, small.text.vocab, (4, 64), generator=torch.Generator().manual_seed(seed)
        )
        scales = calibrate(weights, tokens)
    return export(
        weights,
        target=manifest.target,
        precision=manifest.precision,
        out=folder / "twin",
        weights="pack" if manifest.packings else None,
        scheme=ours,
        scales=scales,
        cache=None if small.fp8 is None or ours else "fp8" if small.fp8.cache else "wide",
        options=manifest.options and manifest.options.model_copy(update=REDUCED_OPTIONS),
        mtp=small.text.mtp == "built",
    )
