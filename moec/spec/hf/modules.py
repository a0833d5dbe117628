"""From the modules that a checkpoint's quantisation lists to a scheme for our parameters."""

from typing import Any

from moec.spec.fields import Fields, shown
from moec.spec.hf.listed import Kind, listed
from moec.spec.hf.names import key_of, prefixed
from moec.spec.model import ModelSpec
from moec.spec.names import EACH, family, is_mtp_join, is_router, of_each, separate
from moec.spec.scheme import INT4, Layout, Scheme
from moec.spec.tensors import eligible

#: fields that say how weights were quantised, and nothing about what they mean
INERT = frozenset(
    """
    global_compression_ratio quantization_status version observer observer_kwargs actorder
    scale_dtype zp_dtype moe_sparsity_config producer dequantize
    """.split()
)

#: what to do about a format that moec does not read
NEXT = (
    "use the bf16 checkpoint that it was made from; moec quantises it: --precision fp8, or "
    "--target ort --precision int4"
)


def strings(at: Fields, key: str, default: Any = ()) -> list[str]:
    """Read field `key`, a list of strings."""
    found: list[str] = list(at.take(key, list, default=default))
    for each in found:
        if not isinstance(each, str):
            raise at.error(key, shown(each), "a list of module names or patterns")
    return found


def square(at: Fields, key: str) -> int:
    """Read field `key`, the two sides of a block: equal, from 2 to 1,024."""
    sides = at.take(key, list)
    size = sides[0] if len(sides) == 2 and sides[0] == sides[1] else None
    if type(size) is not int or not 2 <= size <= 1024:
        raise at.error(key, shown(sides), "two equal numbers, such as [128, 128]")
    return size


def scheme_of(
    at: Fields,
    field: str,
    layout: Layout,
    spec: ModelSpec,
    kind: Kind,
    left_out: list[str],
    weight: str,
    inputs: str,
    targets: tuple[Fields, list[str]] | None = None,
    routers: bool = True,
    **more: Any,
) -> Scheme:
    """A scheme with one scheme rule, for the weights whose modules are all quantised.

    `field` of `at` lists the modules `left_out`, as `kind` says. `targets` are the modules that a
    format lists as quantised, and where; by default all are. Without `routers` the format
    quantises neither these nor what joins inputs for multi-token prediction, listed or not.
    """
    names = [
        name for name in eligible(spec) if routers or not (is_router(name) or is_mtp_join(name))
    ]
    separate_experts = layout in ("compressed-tensors", "fp8", INT4)
    own = {name: modules(name, spec, separate_experts) for name in names}
    every = [module for each in own.values() for module in each]
    kept = set(every)
    if targets:
        kept &= listed(every, targets[1], kind, targets[0], "targets")
    kept -= listed(every, left_out, kind, at, field)
    chosen = [name for name in names if kept.issuperset(own[name])]
    if not chosen:
        raise at.error(field, "all linear layers are left out", "at least one linear layer")
    return Scheme.model_validate(
        {
            "name": layout,
            "layout": layout,
            "rules": [{"of": patterns(chosen, eligible(spec)), "weight": weight, "inputs": inputs}],
            **more,
        }
    )


def modules(name: str, spec: ModelSpec, separate_experts: bool) -> list[str]:
    """The checkpoint's modules that hold a parameter: one, or one for each separate expert."""
    apart = separate_experts and not name.endswith(".weight")
    parts = separate(name, EACH) if apart else (name,)
    prefix = "language_model." if spec.vision else ""
    theirs = (prefixed(key_of(part, architecture=spec.architecture), prefix) for part in parts)
    own = (key.rpartition(".")[0] for key in theirs)
    return list(of_each(own, spec.text.expert_count if apart else None))


def patterns(chosen: list[str], names: list[str]) -> list[str]:
    """Patterns that match `chosen` and no other of `names`.

    Where all layers agree, one pattern stands for all of them; elsewhere single names do.
    """
    partial = {family(name) for name in set(names) - set(chosen)}
    return list(dict.fromkeys(n if family(n) in partial else family(n) for n in chosen))
