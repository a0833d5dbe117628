"""LoRA adapters, merged while weights are read: against peft's own merge, in every placement."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moec
from moec.spec.hf.names import keys
from moec.weights.adapter import read as of_adapters
from moec.weights.adapter.read import WEIGHTS
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint
from moec.weights.trust import records
from moec.weights.view import read_into, view
from tests.families import CASES
from tests.refusals import refusal

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.full

CONFIG = "adapter_config.json"
LINEAR: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": [
        "q_proj", "o_proj", "shared_expert.up_proj", "router", "embed_tokens", "fc1", "linear_1",
    ],
    "alpha_pattern": {
        "^language_model.model.layers.1.self_attn.q_proj": 40,
        "router": 1,
        r"layers\.2\.self_attn\.q_proj": 9,
        "self.attn.o_proj": 3,
    },
    "rank_pattern": {"o_proj": 2},
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 8,
    "use_rslora": True,
    "alpha_pattern": {"experts.down_proj": 20, "feed_forward.experts": 99},
    "target_modules": ["lm_head"],
    "target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
}


PARAMETERS: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 8,
    "target_modules": ["router", "k_proj"],
    "target_parameters": ["self_attn.q_proj.weight"],
    "alpha_pattern": {"q_proj": 3, "v_proj.weight": 9, "1.self_attn.q_proj.weight": 5},
    "rank_pattern": {"router": 24, "q_proj.weight": 3},
}


@pytest.fixture(scope="module")
def float32(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` in float32, so that what is compared is the merge and not its rounding."""
    folder = tmp_path_factory.mktemp("float32") / "base"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("golden*"))
    for shard in folder.glob("*.safetensors"):
        save_file({k: t.float() for k, t in load_file(shard).items()}, shard)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("bfloat16", "float32"))
    return folder


def _model(folder: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def _train(base: Path, out: Path, config: dict[str, Any], seed: int) -> Path:
    """Save an adapter of random values."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(_model(base), peft.LoraConfig(**config))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def adapters(float32: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        _train(float32, folder / "linear", LINEAR, 0),
        _train(float32, folder / "experts", EXPERTS, 1),
        _train(float32, folder / "parameters", PARAMETERS, 2),
    ]


@pytest.fixture(scope="module")
def merged(float32: Path, adapters: Sequence[Path]) -> dict[str, Tensor]:
    """The weights after peft's own merge of both, by our names."""
    model = _model(float32)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    found = model.state_dict()
    return {name: found[key] for name, key in keys(moec.load_spec(float32)).items() if key in found}


def test_the_weights_are_those_of_peft(
    float32: Path, adapters: Sequence[Path], merged: dict[str, Tensor]
) -> None:
    spec, checkpoint, entries = read_model(float32, adapters=adapters)
    assert checkpoint.adapters == tuple(adapters)
    assert set(entries) == set(merged)
    for name, entry in entries.items():
        torch.testing.assert_close(view(entry), merged[name], rtol=0, atol=2e-6, msg=name)
    changed = {name for name, entry in entries.items() if entry.changes}
    layers = spec.text.layers
    wanted = {"embed.weight", "head.weight", *(f"layers.{i}.moe.gate_up" for i in range(layers))}
    assert wanted <= changed, changed
    assert len(changed) >= 2 + 6 * layers

    entry = entries["layers.1.moe.down"]
    rows, columns = entry.shape[-2:]
    part = torch.empty(3, columns)
    read_into(entry, (2 * rows + 1) * columns, part)
    assert torch.equal(part, view(entry)[2, 1:4]), "a few rows at a time"
    assert torch.equal(view(entry[2]), view(entry)[2]), "one expert"


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"precision": "fp8", "scheme": "dynamic"}, marks=pytest.mark.slow),
        pytest.param({"weights": "pack", "target": "ort"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_artefact_has_the_merged_weights_and_is_proven(
    float32: Path, adapters: Sequence[Path], merged: dict[str, Tensor], tmp_path: Path,
    options: dict[str, str],
) -> None:  # fmt: skip
    art = moec.export(float32, out=tmp_path / "art", adapters=adapters, **options)
    assert art.manifest.adapters == tuple(map(str, adapters))
    assert art.manifest.weights.mode == ("pack" if options else "copy")
    report = moec.validate(art.path)
    assert report.passed, report
    assert not any("not compared" in note for note in report.notes)
    if not options:
        for name, entry in art.entries().items():
            torch.testing.assert_close(view(entry), merged[name], rtol=0, atol=2e-6, msg=name)
        moec.artefact.artefact.verify_files(art)


def test_binding_merges_too(float32: Path, adapters: Sequence[Path], tmp_path: Path) -> None:
    moec.export(moec.load_spec(float32), out=tmp_path / "art")
    bound = moec.bind(tmp_path / "art", float32, adapters=adapters)
    built = moec.export(float32, out=tmp_path / "built", adapters=adapters)
    assert bound.manifest.weights.shards == built.manifest.weights.shards
    ids = [[1, 2, 3, 4]]
    logits = [moec.open_session(each).logits(ids) for each in (bound.path, built.path, float32)]
    assert np.array_equal(logits[0], logits[1]) and not np.allclose(logits[0], logits[2])


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        held = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(held | changes))

    return change


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file({key: each.contiguous() for key, each in held.items()}, folder / WEIGHTS)

    return write


def _first(held: dict[str, Tensor], side: str) -> str:
    return next(key for key in held if f"lora_{side}" in key and "q_proj" in key)


#: what is wrong -> (how, what the message names)
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "DoRA": (_config(use_dora=True), "use_dora"),
    "another method": (_config(peft_type="LOHA"), "peft_type"),
    "biases": (_config(bias="all"), "adapter_config.json: bias"),
    "whole modules": (_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "PiSSA": (_config(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "tokens": (_config(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "an unknown field": (_config(sparkle=3), "sparkle"),
    "alpha that is text": (_config(lora_alpha="8"), "lora_alpha"),
    "an expression": (_config(alpha_pattern={"(a+)+$": 2}), "alpha_pattern"),
    "a class of characters": (_config(alpha_pattern={r"layers\.\d\.q_proj": 2}), "alpha_pattern"),
    "a large number": (_config(alpha_pattern={"q_proj": 10**400}), "alpha_pattern"),
    "an infinite number": (_config(lora_alpha=1e999), "lora_alpha"),
    "modules that peft leaves aside": (_config(target_modules=["lm_head"]), "target_modules"),
    "modules that are excluded": (_config(exclude_modules=["q_proj"]), "exclude_modules"),
    "modules excluded by an expression": (_config(exclude_modules="q.*"), "exclude_modules"),
    "layers that peft leaves aside": (_config(layers_to_transform=[0]), "layers_to_transform"),
    "layers that are no numbers": (_config(layers_to_transform=[[0]]), "layers_to_transform"),
    "modules that are no names": (_config(target_modules=[1]), "target_modules"),
    "parameters that are no names": (_config(target_parameters=[1]), "target_parameters"),
    "other names of layers": (_config(layers_pattern="blocks"), "layers_pattern"),
    "a rank that tensors do not have": (_config(r=8), "adapter_config.json: r"),
    "a rank of some modules": (_config(rank_pattern={"o_proj": 3}), "rank_pattern"),
    "a side twice": (
        _tensors(lambda held: held.update(
            {(k := _first(held, "A")).replace(".weight", ".default.weight"): held[k].clone()}
        )),
        "second lora_A",
    ),
    "a norm": (
        _tensors(lambda held: held.update(
            {key.replace("self_attn.q_proj", "input_layernorm"): held.pop(key)
             for key in list(held) if "q_proj" in key}
        )),
        "input_layernorm",
    ),
    "a base of integers": (
        _tensors(lambda held: held.update(
            {_first(held, "A").replace("lora_A", "base_layer"): torch.ones(2, dtype=torch.int8)}
        )),
        "int8",
    ),
    "a high rank": (
        _tensors(lambda held: held.update(
            {(k := _first(held, side)): held[k].repeat_interleave(99, dim)
             for side, dim in (("A", 0), ("B", 1))}
        )),
        "of a low rank",
    ),
    "no config": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "pickled weights": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        "adapter_model.bin, which can run code",
    ),
    "one side": (_tensors(lambda held: held.pop(_first(held, "A"))), "lora_B alone"),
    "another rank": (
        _tensors(lambda held: held.update({(k := _first(held, "A")): held[k][:1]})),
        "lora_A [1, ",
    ),
    "another width": (
        _tensors(lambda held: held.update({(k := _first(held, "A")): held[k][:, :5]})),
        "whose product",
    ),
    "integers": (
        _tensors(lambda held: held.update({(k := _first(held, "A")): held[k].to(torch.int8)})),
        "int8",
    ),
    "of another model": (
        _tensors(lambda held: held.update(
            {key.replace("layers.1.", "layers.99."): held.pop(key) for key in list(held)}
        )),
        "layers.99",
    ),
    "a whole weight": (
        _tensors(lambda held: held.update({"base_model.model.lm_head.weight": torch.ones(2)})),
        "lm_head.weight",
    ),
    "nothing": (
        _tensors(lambda held: (held.clear(), held.update(x=torch.ones(1)))),
        "tensor that is no lora_A",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_merged_is_named(
    float32: Path, adapters: Sequence[Path], tmp_path: Path, kind: str
) -> None:
    damage, names = BAD[kind]
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    damage(folder)
    refusal(lambda: read_model(float32, adapters=[folder]), names)


@pytest.mark.full
def test_an_adapter_of_some_layers_is_what_peft_makes_of_it(float32: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(
        _model(float32),
        peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], layers_to_transform=[1]),
    )
    for name, each in model.named_parameters():
        if "lora_" in name:
            each.data = torch.randn_like(each) * 0.1
    model.save_pretrained(tmp_path / "adapter")
    _, _, entries = read_model(float32, adapters=[tmp_path / "adapter"])
    expected = model.merge_and_unload().state_dict()
    theirs = keys(moec.load_spec(float32))
    changed = {name for name, entry in entries.items() if entry.changes}
    wanted = {f"{tower}layers.1.attn.{part}.weight" for tower in ("", "vision.") for part in "qo"}
    assert changed == wanted
    for name in changed:
        torch.testing.assert_close(view(entries[name]), expected[theirs[name]], rtol=0, atol=2e-6)


def test_one_adapter_needs_no_list(float32: Path, adapters: Sequence[Path]) -> None:
    _, checkpoint, _ = read_model(float32, adapters=str(adapters[0]))
    assert checkpoint.adapters == (adapters[0],)


def test_a_note_says_that_a_tied_head_changes_too(
    float32: Path, adapters: Sequence[Path], tmp_path: Path
) -> None:
    def noted(folder: Path) -> bool:
        spec, *_ = read_model(folder, adapters=adapters[:1])
        return any("which are the head too" in note for note in spec.notes)

    tied = Path(shutil.copytree(float32, tmp_path / "tied"))
    config = json.loads((tied / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    (tied / "config.json").write_text(json.dumps(config))
    index = tied / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    head = next(key for key in listed["weight_map"] if key.endswith("lm_head.weight"))
    shard = tied / listed["weight_map"].pop(head)
    save_file({k: each for k, each in load_file(shard).items() if k != head}, shard)
    index.write_text(json.dumps(listed))
    assert noted(tied) and not noted(float32)


def test_adapters_need_wide_weights_of_their_own(
    float32: Path, adapters: Sequence[Path], tmp_path: Path
) -> None:
    def build(**options: Any) -> object:
        return moec.export(float32, out=tmp_path / "art", adapters=adapters, **options)

    refusal(lambda: build(weights="in-place"), "--weights in-place")
    refusal(lambda: moec.export("scout", out=tmp_path / "a", adapters=adapters), "no weights")
    refusal(lambda: moec.export(float32, out=adapters[0].parent, adapters=adapters), "--out")
    assert not (tmp_path / "art").exists()


def test_square_experts_of_old_versions_are_refused(
    float32: Path, adapters: Sequence[Path], tmp_path: Path
) -> None:
    """Before peft 0.19 their axes were the other way round, which square shapes do not show."""
    spec = moec.load_spec(float32)
    assert spec.text.dim == 2 * spec.text.experts.hidden, "gate_up is square in the fixture"
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[1], folder)
    _config(peft_version="0.18.1")(folder)
    refusal(lambda: read_model(float32, adapters=[folder]), "0.18.1")


def test_the_same_adapter_twice_counts_twice(
    float32: Path, adapters: Sequence[Path], merged: dict[str, Tensor]
) -> None:
    """The second adapter's copy of the base is compared with the base, not with what was merged."""
    once, twice = (read_model(float32, adapters=[adapters[0]] * n)[2] for n in (1, 2))
    base = read_model(float32)[2]
    name = "layers.1.attn.q.weight"
    change = view(once[name]) - view(base[name])
    torch.testing.assert_close(view(twice[name]), view(base[name]) + 2 * change)


def test_weights_that_were_never_merged_fail_the_proof(
    float32: Path, adapters: Sequence[Path], tmp_path: Path
) -> None:
    """A stranger's manifest may name adapters beside the base's own weights."""
    plain = moec.export(float32, out=tmp_path / "plain")
    file = plain.path / "manifest.json"
    held = json.loads(file.read_text()) | {"adapters": [str(adapters[0])]}
    file.write_text(json.dumps(held))
    refusal(lambda: moec.validate(plain.path), "adapters")


def test_an_adapter_counts_only_if_this_user_has_merged_it(
    float32: Path, adapters: Sequence[Path], tmp_path: Path
) -> None:
    """A folder that a build has read as a checkpoint is no adapter that somebody trusts."""
    art = moec.export(float32, out=tmp_path / "art", adapters=adapters[:1])
    report = moec.validate(art.path, source=float32, tokens=20)
    assert report.passed and any(str(adapters[0]) in note for note in report.notes)
    records.disallow("adapter", str(adapters[0].resolve()))
    records.allow_folder(adapters[0])
    error = refusal(lambda: moec.validate(art.path, source=float32, tokens=20), adapters[0].name)
    assert "merged into no build" in error.found and "--adapter" in error.next_step


@pytest.mark.slow
def test_a_base_that_moved_and_a_download_cache_are_merged_again(
    float32: Path, adapters: Sequence[Path], tmp_path: Path
) -> None:
    cache = tmp_path / "hub"
    shutil.copytree(float32, cache / "blobs")
    snapshot = cache / "snapshots" / "r"
    snapshot.mkdir(parents=True)
    for file in (cache / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    art = moec.export(snapshot, out=tmp_path / "art", adapters=adapters)
    assert moec.validate(art.path).passed
    cache.rename(tmp_path / "moved")
    assert moec.validate(art.path, source=tmp_path / "moved" / "snapshots" / "r").passed


def test_a_router_has_the_name_that_transformers_gives_it(tmp_path: Path) -> None:
    """Mixtral's checkpoints say block_sparse_moe where its class in transformers 5 says mlp."""
    spec = CASES["mixtral"]
    write_random_checkpoint(spec, tmp_path / "base", seed=1)
    rank, count = 2, spec.text.expert_count
    down, up = torch.randn(rank, spec.text.dim), torch.randn(count, rank)
    module = "base_model.model.model.layers.1.mlp.gate"
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up},
        tmp_path / "adapter/adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["gate"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    _, _, entries = read_model(tmp_path / "base", adapters=[tmp_path / "adapter"])
    _, _, before = read_model(tmp_path / "base")
    name = "layers.1.moe.router.weight"
    base = view(before[name]).float()
    expected = (base + 2 * up @ down).to(view(before[name]).dtype)
    assert torch.equal(view(entries[name]), expected)


def test_thousands_of_patterns_take_no_time(tmp_path: Path) -> None:
    """Each names a module, as some trainers write them; the first that is for a module counts."""
    patterns = {f"layers.{i}.self_attn.q_proj": float(i) for i in range(20_000)}
    indexed = of_adapters._indexed({"other": 1.0, r"layers\.7\.self_attn\.q_proj": 0.5, **patterns})
    found = [
        of_adapters._first(indexed, f"model.layers.{i}.self_attn.q_proj", None) for i in range(200)
    ]
    assert found == [0.5 if i == 7 else float(i) for i in range(200)]
    assert of_adapters._first(indexed, "model.layers.0.mlp", 3.0) == 3.0
