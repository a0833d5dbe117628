"""Mutate valid inputs of ten parsers at random; none may raise a bug, hang, or take a gigabyte.

    python -m benchmarks.fuzz --number 100000
    python -m benchmarks.fuzz --number 1000 --processes --parsers images tokenizer

Each parser gets valid inputs (seeds) that were damaged: keys dropped, doubled and swapped, extreme
numbers, wrong types, deep nesting, long strings, flipped bytes, cut ends, splices of two seeds. The
only exception that may come out is MoecError. All inputs of a parser run in one process. Images and
tokenizers run in this process too, by the functions that their child processes call; with
--processes they run as users run them, where an abort must be survived.

The table has, for each parser, the worst seconds of one input, and the most resident memory
that the process took beyond what it held before the first input. The exit code is 1 if an input
broke a rule.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS, MEMORY = 10.0, 1 << 30
COLUMNS = ("inputs", "refused", "accepted", "worst s", "MiB", "faults")

NUMBERS = (
    0, -1, 1, 2, 3, 7, 255, 2**15, 2**24, 2**31 - 1, 2**31, 2**32, 2**40, 2**53 + 1, 2**62, 2**63,
    2**64, 10**9, 10**18, 10**30, -(2**63), 0.0, -0.0, 0.5, 1e-320, 1e-45, 1e300, 1e308, -1e308,
    float("inf"), float("-inf"), float("nan"), 1e-30, 4096, 100_000,
)  # fmt: skip
STRINGS = (
    "", " ", "x", "*", "**", "LLLG", "a" * 300, "a" * 70_000, "\0", "\x1b[2J", "\ud800", "é" * 50,
    "../../etc/passwd", "/dev/zero", "re:" + "(a+)+" * 4 + "$", "re:(", "[", "{i}", "%s" * 20,
    "layers.*.moe.*", "1e999", "NaN", "true", "null", "\U0001d518" * 9, "re:.*", "language_model",
)  # fmt: skip
WORDS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [{}], {"": {}}, [None], {"a": [1]})


class Mutator:
    """Damages values and bytes, as one generator of random numbers says."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def leaf(self) -> Any:
        """A value that is probably wrong wherever it stands."""
        kind = self.random.randrange(8)
        if kind < 3:
            return self.random.choice(NUMBERS)
        if kind < 5:
            return self.random.choice(STRINGS)
        if kind == 5:
            return json.loads(json.dumps(self.random.choice(WORDS)))
        value: Any = self.random.choice(NUMBERS)
        if kind == 6:  # nested, sometimes too deep
            for _ in range(self.random.choice((2, 9, 60, 300))):
                value = [value] if self.random.random() < 0.5 else {"a": value}
            return value
        return [value] * self.random.choice((1, 2, 3, 20, 2000))

    def value(self, seed: Any, other: Any) -> Any:
        """A damaged copy of `seed`; parts may come from `other`."""
        value = json.loads(json.dumps(seed))
        for _ in range(self.random.choice((1, 1, 1, 2, 3, 6))):
            place = self._place(value)
            if place is None:
                return self.leaf()
            holder, key = place
            kind = self.random.randrange(8)
            if kind == 0:
                del holder[key]
            elif kind == 1 and isinstance(holder, dict):
                holder[self.random.choice((str(key) + "x", *STRINGS))] = holder[key]
            elif kind == 1:
                holder.insert(key, holder[key])
            elif kind == 2:
                spare = self._place(other)
                holder[key] = json.loads(json.dumps(spare[0][spare[1]])) if spare else self.leaf()
            elif kind == 3 and isinstance(holder[key], int | float):
                holder[key] = self.near(holder[key])
            elif kind == 4 and isinstance(holder[key], str):
                holder[key] = self.text(holder[key])
            elif kind == 5 and isinstance(holder, list):
                holder.extend(holder[: self.random.choice((1, 50))])
            else:
                holder[key] = self.leaf()
        return value

    def near(self, number: float) -> float:
        """A number beside `number`."""
        with contextlib.suppress(OverflowError):
            return self.random.choice((number + 1, number - 1, -number, number * 2, number / 2))
        return 0

    def text(self, text: str) -> str:
        """A damaged copy of `text`."""
        at = self.random.randrange(len(text) + 1)
        middle = self.random.choice((*STRINGS, "*", ".*", "?", "[", "]", "(", ")"))
        return text[:at] + middle + text[at + self.random.choice((0, 1, len(text))) :]

    def _place(self, value: Any) -> tuple[Any, Any] | None:
        """The holder and the key of a random place in `value`; None if it has no places."""
        holder, key = None, None
        while isinstance(value, dict | list) and value:
            if holder is not None and self.random.random() < 0.15:
                break
            holder = value
            key = self.random.choice([*value] if isinstance(value, dict) else range(len(value)))
            value = value[key]
        return None if holder is None else (holder, key)

    def bytes(self, seed: bytes, other: bytes) -> bytes:
        """A damaged copy of `seed`; parts may come from `other`."""
        raw = bytearray(seed)
        for _ in range(self.random.choice((1, 1, 2, 4))):
            at = self.random.randrange(len(raw) + 1)
            kind = self.random.randrange(7)
            if kind < 2 and raw:
                for _ in range(self.random.choice((1, 2, 8))):
                    raw[self.random.randrange(len(raw))] = self.random.randrange(256)
            elif kind == 2 and raw:  # near the start, where sizes are
                raw[self.random.randrange(min(len(raw), 64))] = self.random.choice((0, 127, 255))
            elif kind == 3:
                del raw[at:]
            elif kind == 4:
                raw[at:at] = self.random.choice(
                    (b"[", b"{", b'{"a":', b"&a [")
                ) * self.random.choice((1, 9, 1000))
            elif kind == 5:
                start = self.random.randrange(len(other) + 1)
                raw[at:] = other[start:]
            else:
                raw[at : at + 4] = struct.pack("<I", self.random.choice((0, 2**31 - 1, 2**32 - 1)))
        return bytes(raw)

    def json(self, seeds: list[Any]) -> bytes:
        """A damaged JSON file: mostly its values, at times its bytes."""
        seed, other = (self.random.choice(seeds) for _ in range(2))
        if self.random.random() < 0.8:
            text = json.dumps(self.value(seed, other))
            if self.random.random() < 0.03:  # the same key twice
                text = text.replace("}", ', "a": 1, "a": 2}', 1)
            return text.encode()
        return self.bytes(json.dumps(seed).encode(), json.dumps(other).encode())


@dataclass(slots=True)
class Parser:
    """A parser under test: makes an input from a mutator, and parses it.

    It accepts `sound`, or what it refuses says nothing.
    """

    name: str
    sound: bytes
    make: Callable[[Mutator], bytes]
    parse: Callable[[bytes], object]
    refused: int = 0
    accepted: int = 0
    worst: float = 0.0
    peak: int = 0
    faults: list[str] = field(default_factory=list)

    def run(self, number: int, seed: int, keep: Path | None) -> None:
        """Parse `number` inputs, and count what happened."""
        from moec.spec.errors import MoecError

        mutator = Mutator(seed)
        self.parse(self.sound)
        reset_peak()
        held = peak()
        for index in range(number):
            data = self.make(mutator)
            start = time.perf_counter()
            try:
                self.parse(data)
                self.accepted += 1
            except MoecError as error:
                self.refused += 1
                parts = error.where, error.found, error.expected, error.next_step
                if not all(part.strip() for part in parts) or len(str(error).splitlines()) != 4:
                    self.fault(f"a message without its four parts: {error}", index, data, keep)
            except (Exception, RecursionError):
                self.fault(traceback.format_exc(limit=-4), index, data, keep)
            took = time.perf_counter() - start
            self.worst = max(self.worst, took)
            if took > SECONDS:
                self.fault(f"{took:.1f} s", index, data, keep)
            if index % 200 == 0 or took > 0.5:
                before, self.peak = self.peak, peak() - held
                if self.peak > MEMORY >= before:
                    self.fault(f"{self.peak >> 20} MiB, in the last 200 inputs", index, data, keep)
        self.peak = peak() - held

    def fault(self, what: str, index: int, data: bytes, keep: Path | None) -> None:
        """Note a broken rule, and keep the input that broke it."""
        self.faults.append(f"{self.name} #{index}: {what}")
        if keep:
            (keep / f"{self.name.replace(' ', '-')}-{index}").write_bytes(data)


def reset_peak() -> None:
    """Forget the peak of this process's resident memory."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The peak of this process's resident memory, in bytes."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(row.split()[1]) for row in rows if row.startswith("VmHWM:"))


def parsers(folder: Path, processes: bool) -> list[Parser]:
    """The ten parsers; their inputs are written below `folder`."""
    import numpy as np
    import yaml
    from PIL import Image

    import moec
    from moec.artefact.artefact import open_artefact
    from moec.runtime.inputs import image, tokenizer_process
    from moec.runtime.inputs.text import open_text
    from moec.runtime.inputs.token_file import read_rows
    from moec.spec.calibration import read_calibration, static_scales
    from moec.spec.files import dump_yaml, load_scheme, load_spec
    from moec.spec.hf.config import write_config
    from moec.spec.hf.quantization import read_scheme
    from moec.spec.presets import PRESETS
    from moec.spec.reduced import reduced
    from moec.spec.scheme import SCHEMES
    from moec.spec.tensors import tensors
    from moec.weights.name_map import match, read_checkpoint
    from moec.weights.random import write_random_checkpoint

    warnings.filterwarnings("ignore", module=r"PIL\.")
    small = reduced(PRESETS["tiny-scout"])
    tiny = ROOT / "examples" / "tiny-scout"

    def at(name: str) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def written(name: str, data: bytes) -> Path:
        path = at(name)
        path.write_bytes(data)
        return path

    configs = [write_config(PRESETS[name]) for name in ("scout", "maverick", "tiny-scout")]
    configs.append(json.loads((tiny / "config.json").read_text()))

    def config(data: bytes) -> object:
        spec = load_spec(written("config/config.json", data).parent)
        tensors(spec)
        return moec.plan(spec)

    specs = [spec.model_dump(mode="json") for spec in (*PRESETS.values(), small)]
    schemes = [each.model_dump(mode="json") for each in SCHEMES.values()]

    def yaml_or_json(values: list[Any]) -> Callable[[Mutator], bytes]:
        texts = [yaml.safe_dump(each, sort_keys=False).encode() for each in values]

        def make(mutator: Mutator) -> bytes:
            chance = mutator.random.random()
            if chance < 0.5:
                return b"j" + mutator.json(values)
            if chance < 0.75:
                seed, other = (mutator.random.choice(texts) for _ in range(2))
                return b"y" + mutator.bytes(seed, other)
            damaged = mutator.value(mutator.random.choice(values), mutator.random.choice(values))
            with contextlib.suppress(Exception):  # PyYAML cannot write some text
                return b"y" + yaml.dump(damaged, Dumper=dumper).encode("utf-8", "replace")
            return b"y"

        return make

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

    def spec_file(data: bytes) -> object:
        spec = load_spec(written("spec.json" if data[:1] == b"j" else "spec.yaml", data[1:]))
        dump_yaml(spec)
        return moec.plan(spec)

    def scheme_file(data: bytes) -> object:
        name = "scheme.json" if data[:1] == b"j" else "scheme.yaml"
        scheme = load_scheme(written(name, data[1:]))
        return tensors(small.model_copy(update={"scheme": scheme}))

    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    quantised = [
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["re:vision_model.*", "re:.*lm_head", "re:.*router", "multi_modal_projector"],
            "kv_cache_scheme": {**number, "dynamic": False, "strategy": "tensor"},
        },
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "ignore": ["*router*", "lm_head", "*vision_model*"],
            "kv_cache_scheme": {**number, "dynamic": False},
        },
        {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": ["lm_head", "router", "vision_model", "self_attn"],
        },
    ]

    def quantisation(data: bytes) -> object:
        from moec.spec.bounded.read import parse_json

        try:
            raw = parse_json(data, "quantization_config")
        except (ValueError, RecursionError):
            return None  # read_config refuses such a file before it comes to this field
        return read_scheme(raw, at("none/config.json"), small)

    checkpoint = folder / "checkpoint"
    write_random_checkpoint(small, checkpoint)
    (shard_file,) = checkpoint.glob("*.safetensors")
    raw = shard_file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    listed = {"metadata": {}, "weight_map": dict.fromkeys(header, "model.safetensors")}
    listed["weight_map"].pop("__metadata__", None)
    index_file = checkpoint / "model.safetensors.index.json"

    def shard(mutator: Mutator) -> bytes:
        index = mutator.json([listed]) if mutator.random.random() < 0.3 else b""
        top = mutator.json([header])
        size = len(top) if mutator.random.random() < 0.9 else mutator.random.choice((0, 2**63, 9))
        return struct.pack("<IQ", len(index), size) + index + top

    def shard_and_index(data: bytes) -> object:
        index = struct.unpack("<I", data[:4])[0]
        index_file.unlink(missing_ok=True)
        if index:
            index_file.write_bytes(data[12 : 12 + index])
        with (checkpoint / "model.safetensors").open("wb") as file:
            file.write(data[4:12] + data[12 + index :])
            file.truncate(len(data) - 4 - index + len(body))  # zeros, which nobody reads
        return match(small, read_checkpoint(checkpoint))

    artefact = moec.export(small, out=folder / "artefact").path
    manifests = [json.loads((artefact / "manifest.json").read_text())]

    def manifest(data: bytes) -> object:
        (artefact / "manifest.json").write_bytes(data)
        return open_artefact(artefact)

    scales = [json.loads((tiny / "scales.json").read_text())]
    static = PRESETS["tiny-scout"].model_copy(update={"scheme": SCHEMES["modelopt"]})

    def scales_file(data: bytes) -> object:
        return static_scales(static, read_calibration(written("scales.json", data)))

    npy = io.BytesIO()
    np.save(npy, np.arange(600, dtype=np.int32).reshape(3, 200))
    rows = [[1, 2, 3] * 20, [[5, 6], [7, 8]]]

    def tokens(mutator: Mutator) -> bytes:
        if mutator.random.random() < 0.5:
            return b"j" + mutator.json(rows)
        data = npy.getvalue()
        if mutator.random.random() < 0.5:
            shape = str(tuple(mutator.random.choice(NUMBERS) for _ in range(2))).encode()
            data = data.replace(b"(3, 200)", shape)
            for old in (b"<i4",):
                kinds = (b"|O8", b"<i8", b"<f4", b"<U9", b"|V9", b"<i4")
                data = data.replace(old, mutator.random.choice(kinds))
            return b"n" + data
        return b"n" + mutator.bytes(data, data)

    def token_file(data: bytes) -> object:
        name = "rows.json" if data[:1] == b"j" else "rows.npy"
        return read_rows(written(name, data[1:]), PRESETS["tiny-scout"], tiny)

    photo = Image.effect_noise((40, 30), 90).convert("RGB")
    pictures = []
    for kind, options in (
        ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("GIF", {}),
        ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}),
    ):  # fmt: skip
        for exif in (False, kind in ("PNG", "JPEG", "WEBP", "TIFF")):
            out = io.BytesIO()
            notes = Image.Exif()
            notes[274] = 6
            photo.save(out, kind, **options, **({"exif": notes} if exif else {}))
            pictures.append(out.getvalue())

    def picture(mutator: Mutator) -> bytes:
        return mutator.bytes(*(mutator.random.choice(pictures) for _ in range(2)))

    def decoded(data: bytes) -> object:
        if processes:
            return image.read_image(data)
        return image.decode(data, "", "image", image.PIXELS)

    words = json.loads((tiny / "tokenizer.json").read_text())
    words["model"]["vocab"] = dict([*words["model"]["vocab"].items()][:300])
    known = words["model"]["vocab"]
    pairs = [
        each if isinstance(each, list) else each.split(" ") for each in words["model"]["merges"]
    ]
    words["model"]["merges"] = [
        pair for pair in pairs if all(part in known for part in (*pair, "".join(pair)))
    ][:40]
    others = [
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "aa"},
        {"type": "Prepend", "prepend": "x"},
    ]
    vocabularies = [words, *({**words, "normalizer": each} for each in others)]

    def tokenizer(data: bytes) -> object:
        from moec.spec.bounded.limits import TOKENIZER
        from moec.spec.bounded.read import check_json

        if processes:
            path = written("words/tokenizer.json", data)
            text = open_text(path.parent)
            try:
                return text.encode("Hello, world")
            finally:
                text.tokenizer.worker.close()
        check_json(data, "tokenizer.json", TOKENIZER)
        tokenizer_process.load(data, "tokenizer.json")
        return tokenizer_process.encode(b"Hello, world", "tokenizer.json")

    def text(value: Any) -> bytes:
        return json.dumps(value).encode()

    sound = struct.pack("<IQ", 0, len(text(header))) + text(header)
    return [
        Parser("config", text(configs[0]), lambda m: m.json(configs), config),
        Parser("spec", b"j" + text(specs[0]), yaml_or_json(specs), spec_file),
        Parser("scheme", b"j" + text(schemes[0]), yaml_or_json(schemes), scheme_file),
        Parser(
            "quantisation config", text(quantised[0]), lambda m: m.json(quantised), quantisation
        ),
        Parser("shard header and index", sound, shard, shard_and_index),
        Parser("manifest", text(manifests[0]), lambda m: m.json(manifests), manifest),
        Parser("scales", text(scales[0]), lambda m: m.json(scales), scales_file),
        Parser("token files", b"n" + npy.getvalue(), tokens, token_file),
        Parser("images", pictures[0], picture, decoded),
        Parser("tokenizer", text(vocabularies[0]), lambda m: m.json(vocabularies), tokenizer),
    ]


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--number", type=int, default=1000, help="inputs for each parser")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--parsers", nargs="*", default=[], help="first words of their names")
    options.add_argument("--processes", action="store_true", help="as users run them")
    options.add_argument("--keep", type=Path, help="a folder for inputs that broke a rule")
    chosen = options.parse_args(arguments)
    if chosen.keep:
        chosen.keep.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="moec-fuzz-"))
    print(
        f"{'parser':24}{'inputs':>9}{'refused':>9}{'accepted':>9}{'worst s':>9}{'MiB':>7}  faults"
    )
    faults: list[str] = []
    try:
        for each in parsers(folder, chosen.processes):
            if chosen.parsers and not each.name.startswith(tuple(chosen.parsers)):
                continue
            each.run(chosen.number, chosen.seed, chosen.keep)
            print(
                f"{each.name:24}{chosen.number:9,}{each.refused:9,}{each.accepted:9,}"
                f"{each.worst:9.2f}{each.peak >> 20:7,}  {len(each.faults)}",
                flush=True,
            )
            faults += each.faults
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(faults[:20]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
