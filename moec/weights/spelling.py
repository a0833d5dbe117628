"""Read the keys of a checkpoint as a published one has them, whoever saved it.

Tools add buffers that follow from the config, keep or drop the prefix of the decoder, and store a
tied head twice. None of that changes the model.
"""

import re
from dataclasses import replace

from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.hf.architectures import ARCHITECTURES
from moec.spec.hf.names import DECODER, TOWER, key_of
from moec.spec.model import ModelSpec
from moec.spec.mtp.layer import lacking
from moec.weights.checkpoint import Checkpoint
from moec.weights.shard import TensorEntry

#: tensors that every runtime computes from the config: angles of RoPE, and positions
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.(original_)?inv_freq|freqs_c(is|os_sin)|position_ids)$")
#: bytes that are compared at once
_STEP = 1 << 26


def spelled(spec: ModelSpec, checkpoint: Checkpoint) -> tuple[ModelSpec, Checkpoint]:
    """The spec and the checkpoint with the keys that moec expects; notes say what was left aside.

    Raises:
        MoecError: a tied model stores a head that is not its embedding, or the layer of
            multi-token prediction that is to be built is not there.
    """
    found, aside = dict(checkpoint.tensors), ARCHITECTURES[spec.architecture].aside
    layer = aside(spec.text.model_copy(update={"mtp": "aside"}))
    if spec.text.mtp != "none" and not any(re.match(layer, key) for key in found):
        spec = lacking(spec, str(checkpoint.folder))
    pattern, notes = aside(spec.text), list(spec.notes)
    unused = [key for key in found if pattern and re.match(pattern, key)]
    for key in unused:
        del found[key]
    if unused:
        notes.append(f"{len(unused)} tensors were left aside, such as {min(unused)[:200]}.")
    derived = [key for key in found if _DERIVED.search(key)]
    for key in derived:
        del found[key]
    if derived:
        notes.append(f"{len(derived)} buffers were left aside, such as {min(derived)[:200]}.")
    if spec.vision and found and not any(key.startswith(TOWER) for key in found):
        spec = spec.model_copy(update={"vision": None})
        notes.append(
            "No tensor of the tower that vision_config describes is there: a model of text alone."
        )
    if spec.vision is None and all(key.startswith(DECODER) for key in found):
        found = {key.removeprefix(DECODER): each for key, each in found.items()}
    _without_tied_head(spec, found, notes)
    return (
        spec.model_copy(update={"notes": tuple(notes)}),
        replace(checkpoint, tensors=found),
    )


def _without_tied_head(spec: ModelSpec, found: dict[str, TensorEntry], notes: list[str]) -> None:
    """Remove the head of a tied model from `found`, if it is the embedding."""
    prefix = DECODER if spec.vision else ""
    head, embed = (
        prefix + key_of(name, architecture=spec.architecture)
        for name in (names.HEAD_WEIGHT, names.EMBED_WEIGHT)
    )
    if not spec.text.tie_embeddings or head not in found or embed not in found:
        return
    if not _equal(found[head], found[embed]):
        refuse(
            f"{found[head].file}: {head}",
            f"other values than {embed}, although config.json says tie_word_embeddings",
            "the same values, or a model that is not tied",
            "set tie_word_embeddings to false in config.json if the head is right",
        )
    del found[head]
    notes.append(f"{head} was left aside: the model is tied, and it equals {embed}.")


def _equal(one: TensorEntry, two: TensorEntry) -> bool:
    """Whether two tensors have the same type, shape and bytes; a few of these are in memory."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    with one.file.open("rb") as left, two.file.open("rb") as right:
        left.seek(one.offset)
        right.seek(two.offset)
        for at in range(0, one.nbytes, _STEP):
            size = min(_STEP, one.nbytes - at)
            if left.read(size) != right.read(size):
                return False
    return True
