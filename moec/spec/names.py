"""Every name that a graph, a file or a manifest uses, built and parsed in one place.

    parameter     layers.3.attn.q.weight, layers.3.moe.gate_up, vision.layers.0.mlp.fc1.bias
    scale         layers.3.attn.q.weight_scale, layers.3.attn.q.input_scale, layers.3.attn.k_scale
    expert        layers.3.moe.gate_up[7], one matrix of a parameter that holds all experts
    input         input_ids, past.3.key, ring.last
    output        logits, present.3.key
    inner value   embed, layers.3.out, layers.3.moe.router: a proof reads these, as "taps"

Artefacts, manifests and checkpoints of scales hold these names: changing one breaks them. An
`Index` is a layer's number, "*" in a pattern, or "{i}" in a template.
"""

import re
from collections.abc import Iterable, Iterator

Index = int | str


def _join(*parts: Index) -> str:
    return ".".join(map(str, parts))


# ---- parameters ----


def layer(index: Index, *parts: Index) -> str:
    """What belongs to decoder layer `index`, such as "layers.3.ffn.norm.weight"."""
    return _join("layers", index, *parts)


def attention(index: Index, *parts: Index) -> str:
    """What belongs to a layer's attention, such as "layers.3.attn.q.weight"."""
    return layer(index, "attn", *parts)


def dense(index: Index, *parts: Index) -> str:
    """What belongs to the feed-forward part of a dense layer; the norm before an MoE layer too."""
    return layer(index, "ffn", *parts)


def moe(index: Index, *parts: Index) -> str:
    """What belongs to the experts of an MoE layer, such as "layers.3.moe.router.weight"."""
    return layer(index, "moe", *parts)


def shared(index: Index, *parts: Index) -> str:
    """What belongs to the shared expert of an MoE layer."""
    return moe(index, "shared", *parts)


def mtp(index: Index, *parts: Index) -> str:
    """What is in front of and behind a layer of multi-token prediction, with its number."""
    return layer(index, "mtp", *parts)


def routed(index: Index) -> tuple[str, str]:
    """The two parameters that hold all routed experts of a layer."""
    return moe(index, "gate_up"), moe(index, "down")


def vision(*parts: Index) -> str:
    """What belongs to the vision tower."""
    return _join("vision", *parts)


def vision_layer(index: Index, *parts: Index) -> str:
    """What belongs to layer `index` of the vision tower."""
    return vision("layers", index, *parts)


EMBED_WEIGHT, NORM_WEIGHT, HEAD_WEIGHT = "embed.weight", "norm.weight", "head.weight"
PROJECTOR_WEIGHT = "projector.weight"
PATCH_WEIGHT, POSITIONS = vision("patch", "weight"), vision("positions")
CLASS_TOKEN = vision("class_token")


def of_vision(name: str) -> bool:
    """Whether a name is the vision tower's; the projector is not in the tower."""
    return name.startswith("vision.")


def of_attention(name: str) -> bool:
    """Whether a name is that of a layer's attention."""
    return ".attn." in name


def of_moe(name: str) -> bool:
    """Whether a name is that of an MoE layer's experts, shared ones and router included."""
    return ".moe." in name


def is_routed(parameter: str) -> bool:
    """Whether a parameter holds the routed experts of a layer."""
    return parameter.endswith((".moe.gate_up", ".moe.down"))


def is_mtp_join(parameter: str) -> bool:
    """Whether a parameter joins hidden value and embedding for multi-token prediction."""
    return parameter.endswith(".mtp.join.weight")


def is_router(parameter: str) -> bool:
    """Whether a parameter is a router's weight."""
    return parameter.endswith(".moe.router.weight")


def is_of_heads(parameter: str) -> bool:
    """Whether a parameter is the weight of the heads in latent attention.

    It has no product of its own: a head uses a part of it on queries, and another on what it mixes.
    So nothing is its input, and nothing can have a scale for that.
    """
    return parameter.endswith(".attn.kv_up.weight")


def is_norm(parameter: str) -> bool:
    """Whether a parameter is the gain of a norm."""
    return parameter.endswith(("norm.weight", "vision.pre.weight", "vision.post.weight"))


def is_bias(parameter: str) -> bool:
    """Whether a parameter is a bias."""
    return parameter.endswith(".bias")


# ---- scales and experts ----


def scale_of(parameter: str) -> str:
    """The name of a parameter's scales; of "layers.3.attn.k": that of the keys in the cache."""
    return f"{parameter}_scale"


def zero_point_of(parameter: str) -> str:
    """The name of the zero points of a parameter's 4-bit integers."""
    return f"{parameter}_zero_point"


def is_zero_point(name: str) -> bool:
    """Whether a tensor holds zero points."""
    return name.endswith("_zero_point")


def input_scale_of(parameter: str) -> str:
    """The name of the static scale of a parameter's input."""
    stem = parameter.removesuffix(".weight")
    return f"{stem}.input_scale" if stem != parameter else f"{parameter}_input_scale"


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales."""
    return name.endswith("_scale")


def is_cache_scale(name: str) -> bool:
    """Whether a tensor is the scale of a layer's keys or values."""
    return name.endswith((".attn.k_scale", ".attn.v_scale"))


def is_input_scale(name: str) -> bool:
    """Whether a tensor is the static scale of a parameter's input."""
    return name.endswith((".input_scale", "_input_scale"))


def scaled(scale: str) -> str:
    """The parameter that a scale belongs to: the inverse of `scale_of` and `input_scale_of`."""
    if scale.endswith(".input_scale"):
        return scale.removesuffix(".input_scale") + ".weight"
    return scale.removesuffix("_scale").removesuffix("_input")


def separate(parameter: str, expert: Index) -> tuple[str, ...]:
    """Where each expert has tensors of its own: the names of one expert's share of `parameter`.

    Each is a matrix [out, in]; "gate_up" is two of them.
    """
    stem, _, parts = parameter.rpartition(".")
    return tuple(_join(stem, "experts", expert, part, "weight") for part in parts.split("_"))


#: stands for an expert's number in a pattern: a name or a key that is the same for all experts
EACH = "{e}"


def of_each(patterns: Iterable[str], count: int | None) -> Iterator[str]:
    """The names that `patterns` stand for: all of expert 0, all of expert 1, ... of `count`.

    They are the names themselves if `count` is None.
    """
    if count is None:
        yield from patterns
        return
    halves = [pattern.partition(EACH)[::2] for pattern in patterns]
    for expert in range(count):
        for start, end in halves:
            yield f"{start}{expert}{end}"


def list_of(parameter: str) -> str:
    """Where each expert has tensors of its own: the name of the list of those of `parameter`."""
    stem, _, part = parameter.rpartition(".")
    return _join(stem, "experts", part)


def holds_routed(tensor: str) -> bool:
    """Whether a stored tensor holds weights of routed experts, in any layout; no scales."""
    part = tensor.partition(".moe.")[2]
    other = "scale" in part or is_zero_point(part)
    return bool(part) and not part.startswith(("router.", "shared.")) and not other


def expert_of(tensor: str, index: int) -> str:
    """The name of one expert's matrix in a tensor that holds all: "TENSOR[INDEX]"."""
    return f"{tensor}[{index}]"


def split_expert(name: str) -> tuple[str, int | None]:
    """The inverse of `expert_of`; the index is None where `name` is a whole tensor's."""
    tensor, _, index = name.partition("[")
    return tensor, int(index.rstrip("]")) if index else None


def template(name: str) -> tuple[str, dict[str, str]]:
    """A name with "{i}" for the layer and "{e}" for the expert, and what these stand for.

    The expert of a pattern is "{e}" itself.
    """
    numbers = dict(zip("ie", re.findall(r"(?:layers|experts)\.(\d+|{e})", name), strict=False))
    text = re.sub(r"^(.*?layers)\.(\d+)", r"\1.{i}", name)
    return re.sub(r"experts\.(\d+)", f"experts.{EACH}", text), numbers


def family(name: str) -> str:
    """A name with "*" for the layer, which stands for the same tensor of all layers."""
    return re.sub(r"layers\.\d+\.", "layers.*.", name)


# ---- what a graph takes and gives ----

INPUT_IDS, PAST_LENGTHS, LENGTHS = "input_ids", "past_lengths", "lengths"
LOGIT_INDEX, LOGITS = "logit_index", "logits"
#: the decoder's values that its head takes, of all tokens, for multi-token prediction
HIDDEN = "hidden"
#: the likeliest tokens, which a graph can give in place of logits, and the input that asks for them
BEST, GREEDY = "best", "greedy"
IMAGE_FEATURES, PIXEL_VALUES = "image_features", "pixel_values"
#: input of the graph for onnxruntime-genai
ATTENTION_MASK = "attention_mask"

#: what a layer's cache holds
CACHED = ("key", "value")
#: what a layer's cache holds in multi-head latent attention
LATENT = "latent"
#: kinds of caches: of chunked layers, and of layers that see every position
RING, GLOBAL = "ring", "global"


def past(index: Index, kind: str) -> str:
    """The input that is a layer's cache of `kind`, "key" or "value", before a call."""
    return _join("past", index, kind)


def present(index: Index, kind: str) -> str:
    """The output that is this cache after the call."""
    return _join("present", index, kind)


def is_past(name: str) -> bool:
    """Whether an input is a cache."""
    return name.startswith("past.")


def is_present(name: str) -> bool:
    """Whether an output is a cache."""
    return name.startswith("present.")


def present_of(cache: str) -> str:
    """The output that is the cache `past.*` after the call."""
    return "present." + cache.removeprefix("past.")


def past_of(output: str) -> str:
    """The input that is the cache which `output` is; "" where the output is no cache."""
    return "past." + output.removeprefix("present.") if is_present(output) else ""


def cache_kind(chunk: int | None) -> str:
    """Which kind of cache a layer has that attends within `chunk` tokens (None: to all)."""
    return GLOBAL if chunk is None else RING


def slots(kind: str) -> str:
    """The symbol that stands for how many slots caches of `kind` have."""
    return f"{kind}_slots"


def last(kind: str) -> str:
    """The input that says into which slot of caches of `kind` each sequence's last token goes."""
    return f"{kind}.last"


def total(kind: str) -> str:
    """The input that says how many slots of caches of `kind` are in use at most."""
    return f"{kind}.total"


def is_total(name: str) -> bool:
    """Whether an input is a `total`."""
    return name in (total(RING), total(GLOBAL))


def is_input(name: str) -> bool:
    """Whether an input of a graph is something that a caller gives, and no weight."""
    given = (INPUT_IDS, PAST_LENGTHS, LENGTHS, LOGIT_INDEX, HIDDEN, IMAGE_FEATURES, PIXEL_VALUES)
    return name in given or name.startswith(("past.", f"{RING}.", f"{GLOBAL}."))


# ---- inner values that a proof reads ----

EMBED = "embed"
#: the embeddings with image features in place of image tokens
WITH_IMAGES = "fused"


def out(index: Index) -> str:
    """The output of a decoder layer."""
    return layer(index, "out")


def router(index: Index) -> str:
    """The router's logits of an MoE layer."""
    return moe(index, "router")


def ranks(index: Index) -> str:
    """What an MoE layer chooses experts by, where that is not the router's logits."""
    return moe(index, "ranks")


def chosen(index: Index) -> str:
    """The experts that an MoE layer chose for each token."""
    return moe(index, "route", 1)


def given(name: str) -> str:
    """The input that replaces the inner value `name`, where a caller gives that value."""
    return f"{name}.given"


def computed(name: str) -> str:
    """The inner value `name`, or the one that the input `name` replaces: the inverse of `given`."""
    return name.removesuffix(".given")


def taken(name: str) -> str:
    """What a graph uses in place of the value `name`, if it was given another."""
    return f"{name}.taken"


def layer_of(name: str) -> int | None:
    """The number of the decoder layer that a name belongs to; None where it belongs to none."""
    found = re.match(r"layers\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def title(name: str) -> str:
    """What a report calls an inner value: a layer's output goes by the layer's own name."""
    return name.removesuffix(".out")
