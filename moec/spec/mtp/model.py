"""The layer of multi-token prediction as a model of its own, which has a graph and a session."""

from moec.spec.errors import refuse
from moec.spec.model import ModelSpec, TextSpec
from moec.spec.mtp.layer import mtp_text
from moec.spec.reduced import matching


def mtp_of(spec: ModelSpec) -> ModelSpec:
    """The layer of multi-token prediction of `spec`, which has one, as a model.

    Its parameters have the names that they have in `spec`.

    Raises:
        MoecError: the caches are FP8, and the layer is not.
    """
    return _alone(spec, mtp_text(spec.text)).model_copy(update={"vision": None})


def without_mtp(spec: ModelSpec) -> ModelSpec:
    """`spec` without its layer of multi-token prediction, as if a checkpoint had none."""
    return _alone(spec, spec.text.model_copy(update={"mtp": "none"}))


def _alone(spec: ModelSpec, text: TextSpec) -> ModelSpec:
    """`spec` with another decoder, and with those scheme rules that match weights of it."""
    alone = spec.model_copy(update={"text": text})
    if spec.scheme is None:
        return alone
    rules = tuple(matching(spec.scheme.rules, alone))
    if not rules and spec.scheme.cache:
        refuse(
            f"--mtp: {spec.name}",
            "FP8 caches, and a wide layer of multi-token prediction",
            "a layer that is FP8 too, or wide caches",
            "leave --mtp out",
        )
    scheme = spec.scheme.model_copy(update={"rules": rules}) if rules else None
    return alone.model_copy(update={"scheme": scheme})
