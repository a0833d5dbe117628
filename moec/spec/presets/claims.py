"""What an article on these models says, beside what their configs say.

The article compares Llama 4 with DeepSeek-MoE and others, and is often quoted.
"""

from collections.abc import Callable
from typing import NamedTuple

from moec.spec.model import ModelSpec
from moec.spec.parameters import counts


class Claim(NamedTuple):
    """One claim: the preset and the property that it is about, and how to read the latter."""

    preset: str
    what: str
    said: str
    read: Callable[[ModelSpec], str]


def _total(spec: ModelSpec) -> str:
    return f"{counts(spec)['total'] / 1e9:.0f} B"


def _active(spec: ModelSpec) -> str:
    return f"{counts(spec)['active_text'] / 1e9:.0f} B"


def _experts(spec: ModelSpec) -> str:
    return str(spec.text.expert_count)


def _chosen(spec: ModelSpec) -> str:
    experts = spec.text.experts
    if experts is None:
        return "none"
    shared = (experts.shared_hidden or 0) // experts.hidden
    return f"{shared} shared, {experts.top_k} of {experts.count} routed"


def _irope(spec: ModelSpec) -> str:
    return f"RoPE in layers {spec.text.rope}, masks {spec.text.attention}"


CLAIMS = (
    Claim("scout", "parameters", "402 B", _total),
    Claim("scout", "experts", "128", _experts),
    Claim("scout", "active", "17 B", _active),
    Claim("maverick", "parameters", "109 B", _total),
    Claim("maverick", "experts", "16", _experts),
    Claim("maverick", "active", "17 B", _active),
    Claim("maverick", "iRoPE", "dense and MoE layers in turn", _irope),
    Claim("behemoth", "experts", "16", _experts),
    Claim("deepseek-moe-16b", "experts", "1 shared, 7 of 64 routed", _chosen),
)
