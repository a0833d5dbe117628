"""The layer of multi-token prediction (MTP), section 2.2 of https://arxiv.org/abs/2412.19437.

It predicts the token after the next one, from the decoder's hidden value of a token and the
embedding of the next. It is an MoE layer like the decoder's own, with a cache of its own. Embedding
and head are the decoder's. Nothing but drafting needs it, so that a build leaves it out by default.
"""

from collections.abc import Iterator

from moec.spec.errors import refuse
from moec.spec.model import ALPHABETS, LayerSpec, ModelSpec, TextSpec

#: a note on a layer that a build left out
_ASIDE = (
    "Left aside: layer {index}, which predicts further tokens (multi-token prediction). "
    "--mtp builds it."
)


class MtpText(TextSpec):
    """The layer of multi-token prediction alone, as a decoder of one layer.

    Its number is `after`: how many layers the decoder has. Its graph takes the decoder's hidden
    values beside token ids.
    """

    after: int

    @property
    def all_layers(self) -> tuple[LayerSpec, ...]:
        """The layer itself."""
        return (self.layer(self.after),)


def mtp_text(text: TextSpec) -> MtpText:
    """The layer of multi-token prediction of a decoder. Its attention is that of the last layer."""
    fields = {name: getattr(text, name) for name in TextSpec.model_fields}
    last = {name: fields[name][(text.layers - 1) % len(fields[name])] for name in ALPHABETS}
    return MtpText(**fields | last | {"layers": 1, "ffn": "M", "mtp": "none"}, after=text.layers)


def stored_layers(text: TextSpec) -> Iterator[LayerSpec]:
    """The layers that have weights: those of the decoder, and the one of multi-token prediction."""
    yield from text.all_layers
    if text.mtp == "built":
        yield from mtp_text(text).all_layers


def with_mtp(spec: ModelSpec, wanted: bool) -> ModelSpec:
    """`spec` with its layer of multi-token prediction if `wanted`; else with a note on that layer.

    Raises:
        MoecError: the model has no such layer.
    """
    text = spec.text
    if wanted and text.mtp == "none":
        refuse(
            f"--mtp: {spec.name}",
            "a model without a layer of multi-token prediction",
            "one with such a layer, such as DeepSeek-V3 (num_nextn_predict_layers)",
            "leave --mtp out",
        )
    said = _ASIDE.format(index=text.layers)
    notes = tuple(note for note in spec.notes if note != said)
    if wanted:
        text = text.model_copy(update={"mtp": "built"})
    elif text.mtp == "aside":
        notes = spec.notes if said in spec.notes else (*spec.notes, said)
    if (text, notes) == (spec.text, spec.notes):
        return spec
    return spec.model_copy(update={"text": text, "notes": notes})


def lacking(spec: ModelSpec, where: str) -> ModelSpec:
    """`spec` for a checkpoint at `where` without its layer of multi-token prediction.

    Raises:
        MoecError: the layer is to be built.
    """
    if spec.text.mtp == "built":
        refuse(
            where,
            f"no tensors of layer {spec.text.layers}",
            "its layer of multi-token prediction (num_nextn_predict_layers in config.json)",
            "leave --mtp out, or download the shards that have the layer",
        )
    none = spec.model_copy(update={"text": spec.text.model_copy(update={"mtp": "none"})})
    return with_mtp(none, False)
