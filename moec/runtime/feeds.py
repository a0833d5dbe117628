"""The inputs of one call of the decoder, by name."""

from torch import Tensor

from moec.runtime.cache import Cache, spans
from moec.runtime.engines.engine import Layout
from moec.runtime.inputs.image_tokens import image_mask
from moec.spec import names
from moec.spec.model import ModelSpec


def feeds(
    spec: ModelSpec,
    layout: Layout,
    ids: Tensor,
    lengths: Tensor,
    logit_index: Tensor,
    cache: Cache,
    rows: slice,
    features: Tensor | None = None,
) -> dict[str, Tensor]:
    """The inputs for ids [B, S], which come after what `rows` of the cache hold.

    Args:
        spec: the model.
        layout: the layout of the cache.
        ids: token ids, int64 [B, S], padded on the right.
        lengths: how many of them are tokens of each sequence, int64 [B].
        logit_index: the tokens whose logits are wanted, int64 [B, K].
        cache: the cache.
        rows: its sequences that the ids belong to.
        features: the features of the image tokens, [N, dim].
    """
    found = {
        names.INPUT_IDS: ids.contiguous(),
        names.PAST_LENGTHS: cache.lengths[rows],
        names.LENGTHS: lengths,
        names.LOGIT_INDEX: logit_index,
        **cache.of(rows),
    }
    if layout == "buffers":
        found |= spans(spec.text.chunk, cache.lengths[rows], ids.shape[1])
    if features is not None:
        # The graph would count image tokens in the padding: replace them by another token.
        image = spec.tokens.image
        padding = (ids == image) & ~image_mask(spec, ids, lengths)
        found[names.INPUT_IDS] = ids.masked_fill(padding, int(image == 0))
        found[names.IMAGE_FEATURES] = features
    return found
