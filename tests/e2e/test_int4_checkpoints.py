"""W4A16 checkpoints of compressed-tensors, against what that library says that they mean."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import moec
from benchmarks.sparse_checkpoint import write_sparse_checkpoint
from moec.graph_builder.ops.int4 import dequantize_int4
from moec.spec.hf.names import keys
from moec.spec.names import scale_of, zero_point_of
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.scheme import ATTENTION, EXPERTS, INT4, SHARED, Rule, Scheme
from moec.weights.name_map import read_model
from moec.weights.packing import Packed
from moec.weights.random import write_random_checkpoint
from moec.weights.view import view
from tests.int4_checkpoints import make
from tests.oracle import relative, transformers_logits
from tests.proofs import assert_passed
from tests.refusals import refusal
from tests.small import SMALL

pytestmark = pytest.mark.full

SPEC = SMALL.model_copy(
    update={"vision": None, "text": reduced(PRESETS["tiny-scout"], 1, block=128, head_dim=32).text}
)
SPEC = SPEC.model_copy(
    update={
        "text": SPEC.text.model_copy(
            update={
                "layers": 2, "attention": "LG", "rope": "RN", "qk_norm": "Q-",
                "temperature": "-T", "ffn": "DM",
                "experts": SPEC.text.experts.model_copy(update={"count": 3}),
            }
        )
    }
)  # fmt: skip

#: how a checkpoint is quantised
KINDS: dict[str, dict[str, object]] = {
    "32": {"group": 32},
    "64, zero points, float32": {"group": 64, "symmetric": False, "dtype": torch.float32},
    "128, zero points": {"group": 128, "symmetric": False},
    "rows, float16": {"group": None, "dtype": torch.float16},
    "128, experts' down projections wide": {"group": 128, "kept": ("experts.*down_proj",)},
    "attention alone": {"group": 128, "kept": ("feed_forward",)},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "wide"
    write_random_checkpoint(SPEC, folder, seed=4)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_means_what_the_library_says(kind: str, wide: Path, tmp_path: Path) -> None:
    folder, plain = tmp_path / "int4", tmp_path / "plain"
    means = make(wide, folder, plain, **KINDS[kind])  # type: ignore[arg-type]
    spec, _, entries = read_model(folder)
    assert spec.scheme and spec.scheme.int4
    ours = {key.removesuffix("_packed"): name for name, key in keys(spec).items()}
    seen = 0
    for key, expected in means.items():
        name = ours[key]
        if scale_of(name) in entries:
            parts = [view(entries[each]) for each in (name, scale_of(name))]
            zero = view(entries[zero_point_of(name)]) if spec.scheme.zero_points else None
            found = dequantize_int4(*parts, zero, spec.scheme.scales)
            assert found.dtype == expected.dtype and torch.equal(found, expected), key
            seen += 1
    assert seen >= 8
    rows = [torch.randint(0, SPEC.text.vocab, (n,)) for n in (21, 8)]
    wanted = transformers_logits(plain, rows)
    art = moec.export(folder, out=tmp_path / "art")
    assert art.manifest.weights.mode == "in-place" and not art.manifest.rewritten
    assert art.manifest.build.bytes_written < 2e6
    for session in (moec.open_session(folder), moec.open_session(art.path)):
        for row, want in zip(rows, wanted, strict=True):
            assert relative(session.logits(row[None])[0], want) < 1e-4
            cache = session.new_cache(1, 1)
            steps = [session.decode(token[None], cache)[0] for token in row]
            assert relative(torch.stack(steps), want) < 1e-4


@pytest.mark.parametrize("kind", [each for each in KINDS if "wide" not in each])
def test_target_ort_keeps_the_integers(kind: str, wide: Path, tmp_path: Path) -> None:
    """Its operators multiply in float32, and do not round weights to the scales' type."""
    folder, plain = tmp_path / "int4", tmp_path / "plain"
    make(wide, folder, plain, rounded=False, **KINDS[kind])  # type: ignore[arg-type]
    rows = [torch.randint(0, SPEC.text.vocab, (n,)) for n in (21, 8)]
    wanted = transformers_logits(plain, rows)
    art = moec.export(folder, "ort", out=tmp_path / "art")
    assert art.manifest.weights.mode == "pack" and art.manifest.precision == "int4"
    for row, want in zip(rows, wanted, strict=True):
        found = moec.open_session(art.path, session_options="exact").logits(row[None])[0]
        assert relative(found, want) < 1e-4
    stored = art.entries()
    entries = read_model(folder)[2]
    assert entries.keys() - stored.keys() <= {n for n in entries if ".experts." in n}  # wide ones
    for name in entries.keys() & stored.keys():
        mine, entry = stored[name], entries[name]
        found = mine.read() if isinstance(mine, Packed) else view(mine)
        assert torch.equal(found.to(view(entry).dtype), view(entry)), name


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_binding_later_gives_the_same_artefact(target: str, wide: Path, tmp_path: Path) -> None:
    folder = tmp_path / "int4"
    make(wide, folder, group=64, symmetric=False)
    at_once = moec.export(folder, target, out=tmp_path / "once")
    later = moec.export(moec.load_spec(folder), target, out=tmp_path / "later")
    assert later.manifest.weights.mode == "unbound" and later.manifest.precision == "int4"
    bound = moec.bind(later.path, folder)
    assert bound.manifest.weights.tensors == at_once.manifest.weights.tensors
    assert bound.manifest.packings == at_once.manifest.packings
    ours, theirs = ({n: f.sha256 for n, f in a.manifest.files.items()} for a in (bound, at_once))
    assert ours == theirs
    assert_passed(moec.validate(bound.path, tokens=19))
    assert moec.plan(folder).precision == "int4"


@pytest.mark.parametrize("target", ["onnx", pytest.param("ort", marks=pytest.mark.slow)])
def test_an_unbound_artefact_is_proven(target: str, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"scheme": _scheme(block=64, zero_points=True)})
    art = moec.export(spec, target, out=tmp_path / "art")
    assert_passed(moec.validate(art.path, tokens=19))


def _scheme(**more: object) -> Scheme:
    rule = Rule(of=(*EXPERTS, *SHARED, *ATTENTION), weight="group")
    return Scheme(name=INT4, layout=INT4, rules=(rule,), scales="bf16", **more)  # type: ignore[arg-type]


def _changed(folder: Path, change: Callable[[dict[str, Tensor], str], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("experts.1.up_proj.weight_packed"))
    change(tensors, key.removesuffix("_packed"))
    save_file(tensors, file, metadata={"format": "pt"})


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor], str], object], str]] = {
    "an index of groups": (
        lambda tensors, key: tensors.update({f"{key}_g_idx": torch.zeros(8, dtype=torch.int32)}),
        "weight_g_idx",
    ),
    "another shape": (
        lambda tensors, key: tensors.update({f"{key}_shape": torch.tensor([7, 9])}),
        "weight_shape",
    ),
    "no scales": (lambda tensors, key: tensors.pop(f"{key}_scale"), "up_proj.weight_scale"),
    "no integers": (lambda tensors, key: tensors.pop(f"{key}_packed"), "up_proj.weight_packed"),
    "words of another type": (
        lambda tensors, key: tensors.update({f"{key}_packed": tensors[f"{key}_packed"].long()}),
        "up_proj.weight_packed",
    ),
    "scales of other groups": (
        lambda tensors, key: tensors.update({f"{key}_scale": torch.ones(3, 3)}),
        "up_proj.weight_scale",
    ),
    "zero points that nobody announced": (
        lambda tensors, key: tensors.update(
            {f"{key}_zero_point": torch.zeros(8, dtype=torch.int32)}
        ),
        "weight_zero_point",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_tensors_that_do_not_fit_are_refused(case: str, wide: Path, tmp_path: Path) -> None:
    change, names = CHANGES[case]
    make(wide, tmp_path / "int4", group=32)
    _changed(tmp_path / "int4", change)  # type: ignore[arg-type]
    refusal(lambda: read_model(tmp_path / "int4"), names)


def test_targets_and_precisions_that_do_not_fit_are_refused(wide: Path, tmp_path: Path) -> None:
    folder = tmp_path / "int4"
    make(wide, folder, group=128, kept=("experts.*down_proj",))
    for target in ("torch", "tensorrt", "tensorrt-rtx"):
        refusal(lambda to=target: moec.export(folder, to, out=tmp_path / "a"), "onnx or ort")  # type: ignore[misc]
    refusal(lambda: moec.export(folder, "onnx", "fp32", tmp_path / "a"), "--precision int4")
    refusal(lambda: moec.export(folder, "ort", out=tmp_path / "a"), "--target onnx")
    refusal(lambda: moec.export(wide, "onnx", "int4", tmp_path / "a"), "--target ort")
    refusal(lambda: moec.calibrate(folder, torch.zeros(1, 4, dtype=torch.int64)), "INT4 weights")


@pytest.mark.slow
def test_perplexity_is_the_librarys(tiny: Path, golden: dict[str, Tensor], tmp_path: Path) -> None:
    """The plain model is transformers' on the library's weights; `onnx` has the same logits."""
    make(tiny, tmp_path / "int4", tmp_path / "plain", group=64, symmetric=False)
    windows = golden["eval_ids"]

    def perplexity(source: Path) -> float:
        logits = moec.open_session(source).logits(windows[:, :-1]).transpose(1, 2)
        return float(functional.cross_entropy(logits, windows[:, 1:]).exp())

    wanted = perplexity(tmp_path / "plain")
    for target, most in (("onnx", 1e-4), ("ort", 2e-3)):
        art = moec.export(tmp_path / "int4", target, out=tmp_path / target)
        assert abs(perplexity(art.path) / wanted - 1) < most


@pytest.mark.slow
@pytest.mark.parametrize("zero_points", [False, True])
def test_full_size_integers_stay_in_place(zero_points: bool, tmp_path: Path) -> None:
    """A sparse checkpoint of the full size: only headers are read, and no byte is copied."""
    scheme = _scheme(block=128, zero_points=zero_points)
    spec = PRESETS["scout"].model_copy(update={"scheme": scheme})
    write_sparse_checkpoint(spec, tmp_path / "weights")
    build = moec.export(tmp_path / "weights", out=tmp_path / "a").manifest.build
    assert build.bytes_copied == build.bytes_packed == 0 and build.bytes_written < 20e6
    unbound = moec.export(moec.load_spec(tmp_path / "weights"), "ort", out=tmp_path / "b")
    assert unbound.manifest.dialect == "ort-given"
    assert max(build.peak_bytes, unbound.manifest.build.peak_bytes) < 1e9
