"""Small files that would take all memory or time are refused, with the limit in the message."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.spec.bounded import limits
from moec.spec.bounded.read import parse_json, parse_yaml
from moec.spec.files import dump_yaml, load_scheme, load_spec
from moec.spec.hf.listed import is_simple
from moec.spec.hf.quantization import read_scheme
from tests.damage import SPEC
from tests.refusals import refusal, within_a_gigabyte

TINY = Path(__file__).parents[2] / "examples" / "tiny-scout"
ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
RULE = "{of: ['layers.*.moe.gate_up', 'layers.*.moe.down'], weight: channel, inputs: token}"

#: what is wrong -> (the end of the file's name, what is in it, what the message must name)
FILES: dict[str, tuple[str, str, str]] = {
    "aliases of aliases": (".yaml", ALIASES, "aliases"),
    "an alias of itself": (".yaml", "a: &a [*a]", "alias"),
    "merge keys": (".yaml", "a: &a {x: 1}\n<<: [" + "*a," * 100_000 + "]\n", "values"),
    "200,000 rules": (".yaml", f"name: x\nr: &r {RULE}\nrules: [{'*r,' * 200_000}]", "values"),
    "5,000 rules": (".yaml", f"name: x\nrules: [{(RULE + ',') * 5000}]", "rules"),
    "YAML lists in lists": (".yaml", "a: " + "[" * 100_000, "nesting"),
    "YAML blocks in blocks": (".yaml", "- " * 100_000, "levels"),
    "YAML keys in keys": (".yaml", "? " * 100_000, "levels"),
    "YAML objects in objects": (".yaml", "{a: " * 100_000, "levels"),
    "a number in base 60": (".yaml", "a: " + "1:" * 500_000 + "1", "characters"),
    "a long number": (".yaml", "a: 0x" + "f" * 500_000, "characters"),
    "a long YAML file": (".yaml", "#" * (limits.YAML.bytes + 1), "bytes"),
    "JSON lists in lists": (".json", "[" * 10**6 + "]" * 10**6, "levels"),
    "JSON objects in objects": (".json", '{"a":' * 10**5 + "1" + "}" * 10**5, "levels"),
    "a million digits": (".json", '{"a": ' + "9" * 10**6 + "}", "digits"),
    "three million values": (".json", "[" + "1," * 3_000_000 + "1]", "values"),
    "a key twice": (".json", '{"name": "a", "name": "b"}', "twice"),
    "a long JSON file": (".json", " " * (limits.JSON.bytes + 1), "bytes"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("load", [load_spec, load_scheme], ids=["spec", "scheme"])
def test_a_file_that_grows_is_refused(
    tmp_path: Path, load: Callable[[Path], object], case: str
) -> None:
    suffix, content, names = FILES[case]
    if "rules" in case and load is load_spec:
        names = ""
    path = tmp_path / f"x{suffix}"
    path.write_text(content)
    with within_a_gigabyte():
        refusal(lambda: load(path), names)


def test_what_counts_in_json_is_not_what_stands_in_strings() -> None:
    quotes = json.dumps({"a": '[[[["\\' * 1000, "b": ["\\", "\\\\", '"', "[{,"] * 3}).encode()
    assert parse_json(quotes, "x") == json.loads(quotes)
    deep = b"[" * limits.JSON.depth + b"]" * limits.JSON.depth
    assert json.dumps(parse_json(deep, "x")).encode() == deep
    refusal(lambda: parse_json(b"[" + deep + b"]" + b"[" * 99, "x"), "levels")


def test_aliases_that_stay_small_are_read() -> None:
    text = b"a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}\nd: 1_000\ne: 2020-01-01\n"
    found = parse_yaml(text, "x")
    assert found["b"] == [{"x": 1}, {"x": 1}] and found["c"] == {"x": 1, "y": 2}
    assert found["d"] == 1000 and found["e"].year == 2020


# ---------------------------------------------------------------- what is no file


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as each:
        each.bind(str(path))


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "dev"),
    "a terminal": (lambda path: path.symlink_to("/dev/tty"), ""),
    "a socket": (_socket, "device"),
    "a folder": (Path.mkdir, "folder"),
    "a link to itself": (_loop, "symbolic links"),
    "a link to nowhere": (lambda path: path.symlink_to("gone"), "No such file"),
}


@pytest.mark.parametrize("case", NO_FILES)
def test_what_is_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    make, names = NO_FILES[case]
    make(Path("config.json"))
    refusal(lambda: load_spec("."), names)
    refusal(lambda: parse_or_read(Path("config.json")), names)


def parse_or_read(path: Path) -> object:
    from moec.spec.calibration import read_calibration

    return read_calibration(path)


# ---------------------------------------------------------------- sizes

#: field of text_config -> a size far above any model
HUGE = {
    "hidden_size": 10**9,
    "num_hidden_layers": 4096,
    "num_local_experts": 10**6,
    "vocab_size": 2**31 - 1,
    "num_attention_heads": 10**6,
    "head_dim": 10**9,
    "max_position_embeddings": 2**31,
    "attention_chunk_size": 2**40,
    "rope_theta": 1e299,
    "rms_norm_eps": 1e-300,
    "intermediate_size": 2**31 - 1,
    "floor_scale": 2**70,
}


@pytest.mark.parametrize("field", HUGE)
def test_a_huge_size_is_refused(tmp_path: Path, field: str) -> None:
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"][field] = HUGE[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refusal(lambda: moec.plan(tmp_path), "config.json")


@pytest.mark.parametrize("pixels", [14_000_000, 28_000])
def test_a_huge_image_is_refused(tmp_path: Path, pixels: int) -> None:
    config = json.loads((TINY / "config.json").read_text())
    config["vision_config"]["image_size"] = pixels
    (tmp_path / "config.json").write_text(json.dumps(config))
    refusal(lambda: moec.plan(tmp_path), "image_size")


def test_sizes_that_are_huge_together_are_refused(tmp_path: Path) -> None:
    values = SPEC.model_dump(mode="json")
    values["text"].update(layers=512, ffn="M")
    values["text"]["experts"]["count"] = 4096
    (tmp_path / "x.json").write_text(json.dumps(values))
    refusal(lambda: load_spec(tmp_path / "x.json"), "2097152 experts")
    values = SPEC.model_dump(mode="json")
    values["vision"].update(image=2048, patch=2, shuffle=2)
    (tmp_path / "x.json").write_text(json.dumps(values))
    refusal(lambda: load_spec(tmp_path / "x.json"), "1024 patches")


def test_the_largest_models_are_within_the_limits(tmp_path: Path) -> None:
    behemoth = moec.load_spec("behemoth")
    text = behemoth.text.model_copy(update={"max_positions": 2**27, "layers": 256})
    large = behemoth.model_copy(update={"text": text})
    (tmp_path / "x.yaml").write_text(dump_yaml(large))
    assert load_spec(tmp_path / "x.yaml") == large


# ---------------------------------------------------------------- patterns

NUMBER = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(ignore: list[str]) -> dict[str, Any]:
    weights = {**NUMBER, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["re:vision_model.*", "re:.*lm_head", "re:.*router", *ignore],
    }


#: what is wrong -> (quantization_config, what the message must name)
PATTERNS: dict[str, tuple[dict[str, Any], str]] = {
    "repeats of repeats": (compressed([r"re:(?:[\w.]+)+#"]), "ignore"),
    "choices of the same": (compressed(["re:" + "(a|[a-z.]|.)" * 40 + "#"]), "ignore"),
    "a long expression": (compressed(["re:" + "a?" * 1000]), "512 characters"),
    "a million expressions": (compressed([f"re:x{i}" for i in range(10**5)]), "patterns"),
    "an end that repeats": (
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": [r"(?:[\w.]*)*#"]},
        "modules_to_not_convert",
    ),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case == "repeats of repeats" else case
        for case in PATTERNS
    ],
)
def test_an_expression_that_does_not_end_is_refused(case: str) -> None:
    config, names = PATTERNS[case]
    refusal(lambda: read_scheme(config, Path("config.json"), SPEC), names)


@pytest.mark.parametrize(
    "pattern, simple",
    [
        ("re:.*lm_head", True),
        (r"re:.*\.experts\.\d+\..*", False),
        (r"re:.*feed_forward\.experts.*", True),
        (r"re:model\.layers\.(0|1|2)\.(self_attn|mlp)\..*", True),
        (r"re:^(?!.*experts\.\d+).*$", False),
        ("re:(a+)+$", False),
        ("re:(a|a)(a|a)(a|a)", False),
        ("re:a?a?a?", False),
        (r"re:(x)\1", False),
        ("re:[^.]*.self_attn.*", True),
    ],
)
def test_simple_expressions_run_here(pattern: str, simple: bool) -> None:
    assert is_simple(pattern) is simple


def test_many_plain_names_in_a_scheme_are_quick() -> None:
    names = [f"layers.{i}.attn.q.weight" for i in range(10**5)]
    rule = {"of": ["layers.0.moe.*", *names], "weight": "channel", "inputs": "token"}
    from moec.spec.scheme import Scheme
    from moec.spec.tensors import quantized

    scheme = Scheme.model_validate({"name": "x", "rules": [rule]})
    found = quantized(SPEC.model_copy(update={"scheme": scheme}))
    assert len(found) > SPEC.text.layers
