"""A damaged FP8 checkpoint gives one clear message; sound ones are read however scales lie."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moec
from moec.spec.hf.names import keys
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.scheme import ATTENTION, DENSE, EXPERTS, SHARED, Scheme
from moec.spec.tensors import tensors
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint
from moec.weights.view import view
from tests.damage import ONLY, config, drop, only_shard
from tests.refusals import refused_and_nothing_left

_TWIN = reduced(PRESETS["tiny-scout"], layers=2)
_TEXT = _TWIN.text.model_copy(
    update={"ffn": "DM", "experts": _TWIN.text.experts.model_copy(update={"count": 4})}
)
#: a dense layer and one of 4 experts
BASE = _TWIN.model_copy(update={"vision": None, "text": _TEXT})
#: layout -> what a checkpoint of it says of weights and inputs, and the rest
LAYOUTS: dict[str, dict[str, object]] = {
    "compressed-tensors": {"weight": "channel", "inputs": "token", "cache": True},
    "modelopt": {"weight": "tensor", "inputs": "tensor", "cache": True},
    "fbgemm_fp8": {"weight": "channel", "inputs": "token", "bound": 1200.0},
}

Q = "model.layers.1.self_attn.q_proj.weight"
ROUTER = "model.layers.1.feed_forward.router.weight"
NORM = "model.layers.1.input_layernorm.weight"
AT = "model.layers.1.feed_forward.experts"
#: layout -> an expert's weight and its scales
EXPERT = {
    "compressed-tensors": (f"{AT}.3.up_proj.weight", f"{AT}.3.up_proj.weight_scale"),
    "modelopt": (f"{AT}.gate_up_proj", f"{AT}.gate_up_proj_weight_scale"),
    "fbgemm_fp8": (f"{AT}.down_proj", f"{AT}.down_proj_scale"),
}

#: changes tensors of a checkpoint
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound checkpoint of each layout."""
    found = {}
    for layout, said in LAYOUTS.items():
        of = (*EXPERTS, *SHARED, *DENSE, *ATTENTION)
        rule = {"of": of, "weight": said["weight"], "inputs": said["inputs"]}
        more = {key: value for key, value in said.items() if key not in rule}
        scheme = Scheme.model_validate({"name": layout, "layout": layout, "rules": [rule], **more})
        found[layout] = tmp_path_factory.mktemp(layout) / "checkpoint"
        write_random_checkpoint(BASE.model_copy(update={"scheme": scheme}), found[layout])
    return found


@pytest.fixture
def copy(sounds: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a sound checkpoint that a test may damage; its parent holds nothing else."""
    return lambda layout: Path(shutil.copytree(sounds[layout], tmp_path / "checkpoint"))


def scales(held: dict[str, Tensor]) -> list[str]:
    return [key for key in held if key.endswith("_scale")]


# ---------------------------------------------------------------- sound ones


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_tables_damage_was_sound(
    sounds: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    art = moec.export(sounds[layout], out=tmp_path / "out", weights="copy")
    assert art.manifest.precision == "fp8"
    held = load_file(sounds[layout] / ONLY)
    for key in (Q, EXPERT[layout][0]):
        assert held[key].dtype == torch.float8_e4m3fn
    assert held.keys() >= {f"{Q}_scale", EXPERT[layout][1]}
    assert held[ROUTER].dtype == held[NORM].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_is_consumed_once(sounds: dict[str, Path], layout: str) -> None:
    spec, checkpoint, entries = read_model(sounds[layout])
    assert {entry.name for entry in entries.values()} == set(checkpoint.tensors)
    places = {(entry.file, entry.offset) for entry in entries.values()}
    assert len(places) == len(entries) == len(checkpoint.tensors)
    assert {name: (e.shape, e.dtype) for name, e in entries.items()} == tensors(spec)
    assert keys(spec) == {name: entry.name for name, entry in entries.items()}


#: how a scale lies -> its shape from ours, which is [], [out] or [expert, out]
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "as ours": lambda t: t,
    "[1], [out, 1], [E, out, 1]": lambda t: t[..., None],
    "[1], [1, out], [1, E, out]": lambda t: t[None],
    "[1], [1, out], [E, 1, out]": lambda t: t.unsqueeze(-2) if t.dim() else t[None],
    "[1, 1], [out, 1, 1], [E, 1, out, 1]": lambda t: (
        t.unsqueeze(1)[..., None] if t.dim() else t[None, None]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_the_same_however_they_lie(
    copy: Callable[[str], Path], layout: str, shape: str, dtype: torch.dtype
) -> None:
    folder, expected = copy(layout), dict[str, Tensor]()

    def change(held: dict[str, Tensor]) -> None:
        for key in scales(held):
            expected[key] = torch.exp2(held[key].log2().round())  # any dtype holds it
            held[key] = SHAPES[shape](expected[key]).to(dtype)

    only_shard(change)(folder)
    spec, _, entries = read_model(folder)
    found = {e.name: view(e) for e in entries.values() if e.name in expected}
    assert found.keys() == expected.keys()
    assert all(each.dtype == dtype for each in found.values())
    assert all(torch.equal(found[key].float(), expected[key]) for key in expected)
    assert {name: (e.shape, e.dtype) for name, e in entries.items()} == tensors(spec)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_the_same_however_scales_lie(
    copy: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    folder = copy(layout)
    plain = moec.export(folder, out=tmp_path / "plain", weights="copy")
    only_shard(lambda held: held.update({k: held[k][..., None] for k in scales(held)}))(folder)
    other = moec.export(folder, out=tmp_path / "other", weights="copy")
    ids = torch.arange(12)[None]
    first, second = (moec.open_session(art.path).logits(ids) for art in (plain, other))
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))


# ---------------------------------------------------------------- bad ones


def filled(value: float) -> Callable[[Tensor], Tensor]:
    """One element, the last, is `value`."""

    def change(scale: Tensor) -> Tensor:
        scale = scale.clone()
        scale.view(-1)[-1] = value
        return scale

    return change


#: what becomes of a scale
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": filled(math.nan),
    "zero": filled(0.0),
    "minus zero": filled(-0.0),
    "negative": filled(-0.01),
    "infinite": filled(math.inf),
    "too many": lambda t: torch.cat([t.flatten()] * 2),
    "another rank": lambda t: t.flatten()[0].expand(2, 3, 5),
    "integers": lambda t: t.to(torch.int32),
    "64 bits": lambda t: t.double(),
    "codes": lambda t: t.to(torch.float8_e4m3fn),
    "another dtype than the rest": lambda t: t.half(),
}


@pytest.mark.parametrize("what", ["linear", "expert"])
@pytest.mark.parametrize("case", SCALES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_scale_is_refused(
    copy: Callable[[str], Path], tmp_path: Path, layout: str, case: str, what: str
) -> None:
    key = f"{Q}_scale" if what == "linear" else EXPERT[layout][1]
    only_shard(lambda held: held.update({key: SCALES[case](held[key])}))(copy(layout))
    refused(tmp_path, key)


def refused(world: Path, names: str) -> None:
    checkpoint = world / "checkpoint"
    refused_and_nothing_left(
        world, lambda: moec.export(checkpoint, out=world / "out", weights="copy"), names
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scale_without_elements_is_no_scalar(
    copy: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    only_shard(lambda held: held.update({f"{Q}_scale": torch.ones(0)}))(copy(layout))
    refused(tmp_path, "fp32 [0]")


def cast(key: str, dtype: torch.dtype) -> Change:
    return lambda held: held.update({key: held[key].float().to(dtype)})


def extra(key: str, like: str = f"{Q}_scale") -> Change:
    return lambda held: held.update({key: held[like]})


F8 = torch.float8_e4m3fn
ANY: dict[str, tuple[Change, str]] = {
    "no scale": (lambda held: held.pop(f"{Q}_scale"), f"{Q}_scale"),
    "no weight, but its scale": (lambda held: held.pop(Q), Q),
    "a scale of a wide weight": (extra(f"{ROUTER}_scale"), f"{ROUTER}_scale"),
    "a scale of no weight": (extra("model.layers.1.sparkle_scale"), "sparkle_scale"),
    "a scale of a layer too many": (extra(Q.replace("1", "2") + "_scale"), "layers.2."),
    "an inverse scale": (extra(f"{Q}_scale_inv"), f"{Q}_scale_inv"),
    "a wide weight": (cast(Q, torch.bfloat16), Q),
    "a float32 weight": (cast(Q, torch.float32), Q),
    "a weight in E5M2": (cast(Q, torch.float8_e5m2), Q),
    "a weight in integers": (lambda held: held.update({Q: held[Q].view(torch.uint8)}), Q),
    "a row too few": (lambda held: held.update({Q: held[Q][1:]}), Q),
    "a router in FP8": (cast(ROUTER, F8), ROUTER),
    "a norm in FP8": (cast(NORM, F8), NORM),
    "an embedding in FP8": (cast("model.embed_tokens.weight", F8), "model.embed_tokens.weight"),
    "a head in FP8": (cast("lm_head.weight", F8), "lm_head.weight"),
}

K, V = "model.layers.1.self_attn.k_proj.k_scale", "model.layers.0.self_attn.v_proj.v_scale"
K_CT = "model.layers.1.self_attn.k_scale"


def drop_expert(held: dict[str, Tensor]) -> None:
    for key in [key for key in held if key.startswith(f"{AT}.2.")]:
        del held[key]


def add_expert(held: dict[str, Tensor]) -> None:
    for key in [key for key in held if key.startswith(f"{AT}.3.")]:
        held[key.replace("experts.3.", "experts.4.")] = held[key]


def fuse(held: dict[str, Tensor]) -> None:
    """Experts as other layouts have them."""
    for part in ("gate", "up", "down"):
        parts = [held.pop(f"{AT}.{e}.{part}_proj.weight") for e in range(4)]
        held[f"{AT}.{part}_proj"] = torch.stack([each.view(torch.uint8).T for each in parts])


#: what is wrong -> (layout, what becomes of the tensors, what the message must name)
ONE: dict[str, tuple[str, Change, str]] = {
    "an expert is missing": ("compressed-tensors", drop_expert, f"{AT}.2."),
    "a part of an expert is missing": (
        "compressed-tensors",
        lambda held: held.pop(f"{AT}.0.gate_proj.weight"),
        f"{AT}.0.gate_proj.weight",
    ),
    "an expert too many": ("compressed-tensors", add_expert, f"{AT}.4."),
    "fused experts": ("compressed-tensors", fuse, f"{AT}.0.gate_proj.weight"),
    "a wide expert": (
        "compressed-tensors",
        cast(EXPERT["compressed-tensors"][0], torch.bfloat16),
        EXPERT["compressed-tensors"][0],
    ),
    "static inputs, not in the config": (
        "compressed-tensors",
        extra(Q.replace(".weight", ".input_scale")),
        "q_proj.input_scale",
    ),
    "no scale of keys, apart": ("compressed-tensors", lambda held: held.pop(K_CT), K_CT),
    "keys named as ModelOpt does": (
        "compressed-tensors",
        lambda held: held.update({K: held.pop(K_CT)}),
        K_CT,
    ),
    "no scale of keys": ("modelopt", lambda held: held.pop(K), K),
    "a scale of values for each head": (
        "modelopt",
        lambda held: held.update({V: torch.ones(2)}),
        V,
    ),
    "a scale of values that is NaN": (
        "modelopt",
        lambda held: held.update({V: torch.tensor(math.nan)}),
        V,
    ),
    "no scale of inputs": (
        "modelopt",
        lambda held: held.pop(f"{AT}.down_proj_input_scale"),
        f"{AT}.down_proj_input_scale",
    ),
    "a scale of inputs that is zero": (
        "modelopt",
        lambda held: held.update({f"{AT}.down_proj_input_scale": torch.zeros(())}),
        f"{AT}.down_proj_input_scale",
    ),
    "wide fused experts": ("modelopt", cast(f"{AT}.gate_up_proj", torch.bfloat16), "gate_up_proj"),
    "fused experts [out, in]": (
        "fbgemm_fp8",
        lambda held: held.update({f"{AT}.down_proj": held[f"{AT}.down_proj"].transpose(1, 2)}),
        f"{AT}.down_proj",
    ),
    "scales of the other fused weight": (
        "fbgemm_fp8",
        lambda held: held.update({f"{AT}.down_proj_scale": held[f"{AT}.down_proj_scale"][:, 1:]}),
        f"{AT}.down_proj_scale",
    ),
    "scales by ModelOpt's name": (
        "fbgemm_fp8",
        lambda held: held.update(
            {f"{AT}.down_proj_weight_scale": held.pop(f"{AT}.down_proj_scale")}
        ),
        f"{AT}.down_proj_scale",
    ),
    "caches, not in the config": ("fbgemm_fp8", extra(K), K),
}


@pytest.mark.parametrize("case", ANY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_tensors_are_refused(
    copy: Callable[[str], Path], tmp_path: Path, layout: str, case: str
) -> None:
    change, names = ANY[case]
    only_shard(change)(copy(layout))
    refused(tmp_path, names)


@pytest.mark.parametrize("case", ONE)
def test_bad_tensors_of_one_layout_are_refused(
    copy: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    layout, change, names = ONE[case]
    only_shard(change)(copy(layout))
    refused(tmp_path, names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_weights_without_a_word_of_it_are_refused(
    copy: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    drop("config.json", "quantization_config")(copy(layout))
    refused(tmp_path, "fp8")


def test_scales_of_caches_that_the_config_denies_are_refused(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    config("quantization_config.kv_cache_scheme", None)(copy("compressed-tensors"))
    refused(tmp_path, "k_scale")


# ---------------------------------------------------------------- what the messages blame


def test_config_json_is_not_blamed_for_two_dtypes_of_scales(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    only_shard(cast(f"{Q}_scale", torch.float16))(copy("compressed-tensors"))
    with pytest.raises(moec.MoecError) as caught:
        moec.export(tmp_path / "checkpoint", out=tmp_path / "out")
    assert "from config.json" not in caught.value.expected, "no config says it"


def test_a_scale_of_keys_is_not_called_a_weights(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    config("quantization_config.kv_cache_scheme", None)(copy("compressed-tensors"))
    with pytest.raises(moec.MoecError) as caught:
        moec.export(tmp_path / "checkpoint", out=tmp_path / "out")
    assert "weight that config.json does not quantise" not in caught.value.found
