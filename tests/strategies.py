"""Random small models over every switch of the spec, for hypothesis."""

from hypothesis import strategies as st

from moec.spec.model import ModelSpec, TextSpec, Tokens
from moec.spec.names import is_router
from moec.spec.parts.rope import RopeScaling
from moec.spec.parts.routing import Experts
from moec.spec.parts.vision import VisionSpec
from moec.spec.scheme import (
    ATTENTION,
    DENSE,
    EXPERTS,
    INPUTS,
    SHARED,
    WEIGHTS,
    Layout,
    Scheme,
)
from moec.spec.tensors import eligible, quantized

LAYOUTS: tuple[Layout, ...] = ("moec", "compressed-tensors", "modelopt", "fbgemm_fp8")
#: what our own schemes can say of weights, inputs and bounds
OURS: tuple[list[str], list[str], list[float | None]] = (list(WEIGHTS), list(INPUTS), [None, 1.5])
#: what the config of each checkpoint format can say of weights, inputs and bounds
SAYABLE: dict[Layout, tuple[list[str], list[str], list[float | None]]] = {
    "compressed-tensors": (["expert", "channel"], ["none", "token"], [None]),
    "modelopt": (["tensor"], ["tensor"], [None]),
    "fbgemm_fp8": (["channel"], ["token"], [1200.0, 1.5]),
}


@st.composite
def specs(draw: st.DrawFn, layers: st.SearchStrategy[int] | None = None) -> ModelSpec:
    """A text model of 2 to 6 layers; patterns are drawn layer by layer, independently."""
    depth = draw(layers or st.integers(2, 6))

    def pattern(letters: str) -> str:
        return "".join(draw(st.lists(st.sampled_from(letters), min_size=depth, max_size=depth)))

    rope = draw(st.sampled_from(["RRRN", "RN", "R", pattern("RN")]))[:depth]
    rotates = [rope[i % len(rope)] == "R" for i in range(depth)]
    qk_norm, temperature = draw(st.booleans()), draw(st.booleans())
    kv_heads = draw(st.integers(1, 3))
    chunk = draw(st.integers(2, 9))
    low = draw(st.sampled_from([1.0, 0.5]))
    scaling = RopeScaling(
        factor=draw(st.sampled_from([16.0, 8.0])),
        low=low,
        high=draw(st.sampled_from([low, 4.0])),
        original_positions=draw(st.integers(4, 64)),
    )
    hidden = draw(st.integers(4, 24))
    count = draw(st.integers(2, 6))
    return ModelSpec(
        name="random",
        provenance="custom",
        dtype=draw(st.sampled_from(["fp32", "bf16"])),
        tokens=Tokens(bos=0, eos=(1,), pad=2),
        text=TextSpec(
            layers=depth,
            dim=draw(st.integers(8, 40)),
            heads=kv_heads * draw(st.integers(1, 4)),
            kv_heads=kv_heads,
            head_dim=draw(st.sampled_from([8, 16, 24, 4, 6, 10])),
            vocab=draw(st.integers(16, 100)),
            max_positions=256,
            norm_eps=1e-5,
            attention_bias=draw(st.booleans()),
            attention=draw(st.sampled_from(["LLLG", pattern("LG")]))[:depth],
            rope=rope,
            qk_norm="".join("Q" if on and qk_norm else "-" for on in rotates),
            temperature="".join("T" if temperature and not on else "-" for on in rotates),
            ffn=draw(st.sampled_from(["M", "DM", "D", pattern("DM")]))[:depth],
            chunk=chunk,
            rope_theta=draw(st.sampled_from([10_000.0, 500_000.0])),
            rope_scaling=draw(st.sampled_from([None, scaling])),
            temperature_floor=draw(st.integers(2, 12)),
            temperature_scale=draw(st.sampled_from([0.1, 0.5])),
            dense_hidden=draw(st.integers(4, 24)),
            experts=Experts(
                count=count,
                top_k=draw(st.integers(1, min(2, count))),
                hidden=hidden,
                shared_hidden=hidden,
            ),
        ),
    )


@st.composite
def schemes(draw: st.DrawFn, spec: ModelSpec, layouts: tuple[Layout, ...] = LAYOUTS) -> Scheme:
    """A scheme for some of the linear layers of `spec`: experts, when it has any, often alone."""
    groups = [EXPERTS, SHARED] if "M" in spec.text.ffn else []
    groups += [DENSE] if "D" in spec.text.ffn else []
    chosen = draw(st.lists(st.sampled_from([*groups, ATTENTION]), min_size=1, unique=True))
    layout = draw(st.sampled_from(layouts))
    weights, inputs, bounds = SAYABLE.get(layout, OURS)
    return Scheme.model_validate(
        {
            "name": "random",
            "layout": layout,
            "rules": [
                {
                    "of": [pattern for group in chosen for pattern in group],
                    "weight": draw(st.sampled_from(weights)),
                    "inputs": draw(st.sampled_from(inputs)),
                }
            ],
            "block": draw(st.sampled_from([4, 8, 16])),
            "bound": draw(st.sampled_from(bounds)),
            "cache": draw(st.booleans()) and layout != "fbgemm_fp8",
        }
    )


@st.composite
def fp8_specs(draw: st.DrawFn) -> ModelSpec:
    """A text model with a scheme, in any layout."""
    spec = draw(specs())
    return spec.model_copy(update={"scheme": draw(schemes(spec))})


@st.composite
def vision_specs(draw: st.DrawFn) -> ModelSpec:
    """A text model with a vision tower of 1 to 3 layers, within what transformers can express.

    There the MLP is as wide as a shuffled token, and the adapter has one width.
    """
    text = draw(specs())
    heads, factor = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    dim = heads * 4 * draw(st.integers(1, 3))
    patch, width = draw(st.integers(2, 5)), draw(st.integers(4, 24))
    vision = VisionSpec(
        layers=draw(st.integers(1, 3)),
        dim=dim,
        heads=heads,
        hidden=dim * factor**2,
        image=patch * factor * draw(st.integers(1, 3)),
        patch=patch,
        channels=draw(st.sampled_from([1, 3])),
        shuffle=factor,
        adapter_hidden=width,
        adapter_out=width,
        rope_theta=draw(st.sampled_from([100.0, 10_000.0])),
    )
    image = draw(st.integers(0, text.text.vocab - 1))
    tokens = text.tokens.model_copy(update={"image": image, "image_start": 3, "image_end": 4})
    return text.model_copy(update={"vision": vision, "tokens": tokens})


@st.composite
def checkpoint_specs(draw: st.DrawFn) -> ModelSpec:
    """A model as an FP8 checkpoint can hold it: a scheme with patterns, or any layers by name."""
    spec = draw(st.one_of(specs(), vision_specs()))
    scheme = draw(schemes(spec, tuple(SAYABLE)))
    names = list(quantized(spec.model_copy(update={"scheme": scheme})))
    if draw(st.booleans()):
        fused = "gate_up"  # goes with the down projection
        known = eligible(spec)
        if scheme.layout == "compressed-tensors":  # whose list of modules says nothing of routers
            known = [name for name in known if not is_router(name)]
        apart = [name for name in known if not name.endswith(fused)]
        names = draw(st.lists(st.sampled_from(apart), min_size=1, unique=True))
        names += [name[:-4] + fused for name in names if name.endswith("moe.down")]
    weights, inputs, bounds = SAYABLE[scheme.layout]
    rule = {
        "of": names,
        "weight": draw(st.sampled_from(weights)),
        "inputs": draw(st.sampled_from(inputs)),
    }
    said = scheme.model_dump() | {"rules": [rule], "bound": draw(st.sampled_from(bounds))}
    return spec.model_copy(update={"scheme": Scheme.model_validate(said)})
