"""The checkpoint that moec writes quantised: its spec, its `quantization_config`, and their limits.

It is in compressed-tensors form, so that other engines read it. That form has one kind of weights
and inputs for a whole model, and a scheme of several kinds cannot be said in it.
"""

from pathlib import Path
from typing import Any

from moec.spec import names
from moec.spec.errors import MoecError, refuse
from moec.spec.hf.architectures import ARCHITECTURES
from moec.spec.hf.modules import patterns
from moec.spec.hf.quantization import read_scheme, write_scheme
from moec.spec.model import ModelSpec
from moec.spec.parameters import parameters
from moec.spec.scheme import INT4, NAMED, STATIC, Scheme
from moec.spec.tensors import eligible, quantized

#: the kinds of weights and inputs that compressed-tensors can say and moec writes
SAID = (
    ("channel", "token"),
    ("channel", "none"),
    ("expert", "tensor"),
    ("expert", "expert"),
    ("block", "group"),
    ("group", "none"),
)

#: what vLLM reorders, and the values, which it joins with them in one product of one scheme
_REORDERED = {names.attention("*", part, "weight") for part in "qkv"}


def can_say(scheme: Scheme) -> bool:
    """Whether compressed-tensors can say what a scheme of moec's says."""
    kinds = {(rule.weight, rule.inputs) for rule in scheme.rules}
    return len(kinds) == 1 and kinds <= set(SAID) and not scheme.cache and not scheme.bound


def published_spec(spec: ModelSpec) -> ModelSpec | None:
    """The spec of the checkpoint in which a build writes the weights of `spec`.

    None if a build writes tensors of moec's own names: the scheme is static or none that the form
    can say, or other engines would read the model, or some of its scales, otherwise than moec does.
    A build asks `is_said` too, which takes longer.
    """
    scheme = spec.scheme
    if scheme is None or scheme.layout != "moec" or scheme.static or not can_say(scheme):
        return None
    if spec.text.experts and not ARCHITECTURES[spec.architecture].reads_apart:
        return None
    found = quantized(spec)
    if any(is_reordered(spec, name) for name in found) and scheme.rules[0].weight == "block":
        return None
    told = spec.model_copy(
        update={
            "scheme": scheme.model_copy(update={"layout": "compressed-tensors"}),
            "separate_experts": ARCHITECTURES[spec.architecture].separate_experts,
        }
    )
    return None if odd_block(told) else told


def is_said(spec: ModelSpec) -> bool:
    """Whether a build can write the weights of `spec` as a checkpoint, by all of its scheme."""
    if spec.scheme is None or published_spec(spec) is None:
        return False
    try:
        told(spec.model_copy(update={"scheme": None}), spec.scheme)
    except MoecError:
        return False
    return True


def told(spec: ModelSpec, scheme: Scheme) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec that a checkpoint of the wide `spec` has once it is quantised, and its config.

    Blocks and 4-bit integers leave out weights that vLLM reorders; 4-bit integers and static scales
    the weight of heads in latent attention.

    Raises:
        MoecError: compressed-tensors cannot say what `scheme` says.
    """
    if not can_say(scheme):
        kinds = {(rule.weight, rule.inputs) for rule in scheme.rules}
        shown = ", ".join(f"weights by {w}, inputs by {i}" for w, i in sorted(kinds))
        refuse(
            f"--scheme {scheme.name}",
            shown + (", FP8 caches" if scheme.cache else ""),
            "one kind: " + "; or ".join(f"weights by {w}, inputs by {i}" for w, i in SAID),
            f"choose one of {', '.join(n for n, each in NAMED.items() if can_say(each))}; "
            "moec build takes the others",
        )
    layout = INT4 if scheme.int4 else "compressed-tensors"
    # Engines compute with 4-bit integers in the model's own type, and cast their scales to it.
    scales = spec.dtype if scheme.int4 else scheme.scales
    values = scheme.model_dump() | {"layout": layout, "scales": scales}
    weight, inputs = scheme.rules[0].weight, scheme.rules[0].inputs
    known = eligible(spec)
    wanted = [name for name in known if scheme.rule(name)]
    in_order = weight in ("block", "group")
    chosen = [
        name
        for name in wanted
        if not (in_order and is_reordered(spec, name))
        and not (names.is_of_heads(name) and (scheme.int4 or inputs in STATIC))
    ]
    if not chosen:
        quantized(spec.model_copy(update={"scheme": scheme}))  # says which rule matches nothing
    of = patterns(chosen, known)
    # each product has its own static scale there, whether or not experts have the same
    told_inputs = "expert" if inputs in STATIC else inputs
    values["rules"] = [{"of": of, "weight": weight, "inputs": told_inputs}]
    config = write_scheme(spec.model_copy(update={"scheme": Scheme.model_validate(values)}))
    found = read_scheme(config, Path("config.json"), spec)
    assert found is not None
    done = spec.model_copy(update={"scheme": found.model_copy(update={"scales": scales})})
    if name := odd_block(done):
        refuse(
            f"--scheme {scheme.name}: {name}",
            f"experts of width {_width(done, name)}",
            f"a multiple of {found.block}, the side of a block",
            "use --scheme dynamic, or blocks of another size",
        )
    return done, config


def is_reordered(spec: ModelSpec, name: str) -> bool:
    """Whether vLLM changes the order of a weight's rows, which scales of blocks do not survive.

    It turns adjacent pairs of RoPE into halves, in the queries and keys of each head.
    """
    adjacent = spec.text.rope_pairs == "adjacent" and not spec.text.latent
    return adjacent and names.family(name) in _REORDERED


def odd_block(told: ModelSpec) -> str | None:
    """The first parameter with blocks that hold values of an expert's gate and of its up too."""
    scheme = told.scheme
    for name, rule in quantized(told).items():
        apart = names.is_routed(name) and len(names.separate(name, 0)) > 1
        if scheme and rule.weight == "block" and apart and _width(told, name) % scheme.block:
            return name
    return None


def _width(told: ModelSpec, name: str) -> int:
    return parameters(told)[name][-1] // len(names.separate(name, 0))
