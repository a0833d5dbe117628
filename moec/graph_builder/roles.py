"""What a node is for: how a pass finds it, whatever it is called.

The decoder gives a role to each node that a pass looks for, and the number of its layer: both are
in `node.meta["role"]`. A node that takes the place of another takes its role too: see
`moec.graph_builder.builder.stand_in`. Names are for readers: they may change, and no pass reads
them. Inputs and weights are the exception, because their names are part of every file.
"""

from collections.abc import Container
from enum import StrEnum
from typing import NamedTuple, NoReturn, Protocol

from torch import fx

from moec.spec import names
from moec.spec.errors import refuse


class Role(StrEnum):
    """What a pass may look for. A layer of the decoder has one node of a role at most."""

    # once in a decoder
    EMBEDDING = "embedding"  # of the tokens; its dtype is what the graph computes in
    ROPE_COS = "rope cos"  # tables of rotary positions, for the layers that have these
    ROPE_SIN = "rope sin"
    TEMPERATURE = "temperature"  # factors of the queries, by position
    HEAD = "head"  # product with the head's weight
    JOIN = "join"  # of embedding and hidden value, before the layer of multi-token prediction
    # once in a layer
    QUERY = "query"  # products of the layer's input
    QUERY_DOWN = "query down"  # the latent vector that queries come from
    LATENT = "latent"  # the one that keys and values come from, and the rotated key
    KEY = "key"
    VALUE = "value"
    KEYS = "keys"  # all keys that the layer sees: those in the cache, then new ones
    VALUES = "values"
    ATTENTION = "attention"  # its result, before the product with `o`
    ATTENTION_OUT = "attention out"  # that product
    GATE = "gate"  # products of the dense feed-forward part, or of the shared expert
    UP = "up"
    DOWN = "down"
    ROUTER = "router"  # logits
    SCORES = "scores"  # of the chosen experts
    CHOICE = "choice"  # the experts that the router chose
    EXPERTS = "experts"  # routed and shared experts together


class Place(NamedTuple):
    """A role, and the layer of the decoder, if it is in one."""

    role: Role
    layer: int | None = None

    def __str__(self) -> str:
        return self.role if self.layer is None else f"{self.role} of layer {self.layer}"


#: products of attention: four bits cost these the most accuracy
ATTENTION_PRODUCTS = (
    Role.QUERY,
    Role.QUERY_DOWN,
    Role.LATENT,
    Role.KEY,
    Role.VALUE,
    Role.ATTENTION_OUT,
)
#: roles of values that are whole and equal on all ranks that share a model
WHOLE = (
    Role.EMBEDDING,
    Role.ROPE_COS,
    Role.ROPE_SIN,
    Role.TEMPERATURE,
    Role.ROUTER,
    Role.SCORES,
    Role.CHOICE,
)
_CACHED = {Role.KEYS: "k", Role.VALUES: "v"}


class Find(Protocol):
    """Finds the node that has a role; a role that occurs in every layer needs `layer` too."""

    def __call__(self, role: Role, layer: int | None = None) -> fx.Node:
        """The node; a `MoecError` names the role if there is none."""


def finder(graph: fx.Graph, wanted_by: str) -> Find:
    """What finds nodes of `graph` by role, for the pass `wanted_by`."""
    places: dict[Place, fx.Node] = {
        node.meta["role"]: node for node in graph.nodes if "role" in node.meta
    }

    def find(role: Role, layer: int | None = None) -> fx.Node:
        place = Place(role, layer)
        if place not in places:
            _missing(wanted_by, "a graph", place)
        return places[place]

    return find


def place_of(node: fx.Node, wanted_by: str, roles: Container[Role] = tuple(Role)) -> Place:
    """The role of `node`, which must be one of `roles`, and its layer.

    Raises:
        MoecError: the node has none of these roles. The message names the pass `wanted_by`.
    """
    place: Place | None = node.meta.get("role")
    if place is not None and place.role in roles:
        return place
    wanted = " or ".join(role for role in Role if role in roles)
    _missing(wanted_by, f"node {node.meta.get('name', node.name)}", wanted)


def cached(node: fx.Node, wanted_by: str) -> str:
    """What a `cache_append` appends, such as "layers.3.attn.k", which names its scale.

    Raises:
        MoecError: the node is neither the keys nor the values of a layer.
    """
    role, layer = place_of(node, wanted_by, _CACHED)
    assert layer is not None
    return names.attention(layer, _CACHED[role])


def find_input(graph: fx.Graph, name: str, wanted_by: str) -> fx.Node:
    """The input of `graph` called `name`.

    Raises:
        MoecError: there is none, and the pass `wanted_by` cannot do without.
    """
    inputs: dict[str, fx.Node] = {n.meta["name"]: n for n in graph.nodes if n.op == "placeholder"}
    if name in inputs:
        return inputs[name]
    refuse(
        f"pass {wanted_by}",
        f"a graph without input {name}",
        f"input {name}",
        "give the pass a decoder of moec.graph_builder.decoder",
    )


def _missing(wanted_by: str, found: str, role: object) -> NoReturn:
    refuse(
        f"pass {wanted_by}",
        f"{found} without role: {role}",
        f"a node with meta['role']: {role}",
        "give it the role where it is emitted, and pass it on where it is replaced",
    )
