"""Our tensor names and the keys of a Hugging Face checkpoint, as its architecture has them.

Our tensors have the shapes of the checkpoint's, so that they can be read in place. A weight in FP8
has the key of the plain weight, one of 4-bit integers its own. The keys of scales depend on the
scheme's layout.
"""

from collections.abc import Iterator

from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.hf.architectures import ARCHITECTURES
from moec.spec.model import ModelSpec
from moec.spec.scheme import INT4, Layout
from moec.spec.tensors import Group, groups

#: what the keys of the decoder start with in a checkpoint with a vision tower
DECODER = "language_model."
#: what other keys of such a checkpoint start with
TOWER = ("vision_model.", "multi_modal_projector.")
_LAYER = "model.layers.{i}"
#: what follows the key of a weight in that of its scales, where it is not "_scale"
_SCALES: dict[Layout, str] = {"fp8": "_scale_inv"}
_CACHE_SCALES: dict[Layout, str] = {
    "modelopt": f"{_LAYER}.self_attn.{{x}}_proj.{{x}}_scale",
    "compressed-tensors": f"{_LAYER}.self_attn.{{x}}_scale",
}


def keys(spec: ModelSpec) -> dict[str, str]:
    """The checkpoint key of every tensor of `spec`, by our name.

    A model with a vision tower has the prefix `language_model.` on the keys of its decoder.
    """
    found: dict[str, str] = {}
    for group, theirs in in_groups(spec):
        each = (names.of_each(some, group.experts) for some in (group.kinds, theirs))
        found.update(zip(*each, strict=True))
    return found


def in_groups(spec: ModelSpec) -> Iterator[tuple[Group, list[str]]]:
    """The stored tensors of each parameter of `spec`, and their keys, as patterns for experts."""
    prefix = DECODER if spec.vision else ""
    layout = spec.scheme.layout if spec.scheme else "moec"
    for group in groups(spec):
        yield (
            group,
            [
                prefixed(key_of(name, layout, spec.architecture), prefix)
                + ("_packed" if layout == INT4 and names.scale_of(name) in group.kinds else "")
                for name in group.kinds
            ],
        )


def prefixed(key: str, prefix: str) -> str:
    """`key` with `prefix`, unless it belongs to the vision tower or the projector."""
    return key if key.startswith(TOWER) else prefix + key


def key_of(name: str, layout: Layout = "moec", architecture: str = "llama4") -> str:
    """The checkpoint key of the tensor `name`, without prefix. `layout` matters for scales only.

    The key of a pattern for each expert is one too: see `moec.spec.names.of_each`.
    """
    if names.is_cache_scale(name):
        template, numbers = names.template(name)
        key = _CACHE_SCALES.get(layout, _CACHE_SCALES["modelopt"])
        return key.format(x=names.scaled(template)[-1], **numbers)
    if names.is_input_scale(name):
        return names.input_scale_of(key_of(names.scaled(name), architecture=architecture))
    if names.is_zero_point(name):
        return names.zero_point_of(
            key_of(name.removesuffix("_zero_point"), architecture=architecture)
        )
    if names.is_scale(name):
        parameter = names.scaled(name)
        stacked = names.is_routed(parameter) and layout == "modelopt"
        key = key_of(parameter, architecture=architecture)
        return key + ("_weight_scale" if stacked else _SCALES.get(layout, "_scale"))
    template, numbers = names.template(name)
    found = ARCHITECTURES[architecture].keys.get(template)
    if found is None:
        refuse(
            f"spec.architecture {architecture}",
            f"no key for {name}",
            "the architecture of such a model",
            "correct the spec, or build the artefact again",
        )
    return found.format_map(numbers)
