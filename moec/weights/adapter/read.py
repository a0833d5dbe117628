"""Read a LoRA adapter of peft: which weights it changes, and by what.

The adapter is data from outside. What would change the arithmetic in a way that moec does not
merge is refused with its name.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from moec.spec.errors import refuse
from moec.spec.fields import Fields, read_own_json, shown
from moec.spec.hf.forms import ADAPTER
from moec.spec.hf.names import DECODER, keys
from moec.spec.model import ModelSpec
from moec.weights.adapter.low_rank import ELEMENTS, LowRank
from moec.weights.adapter.targets import Targets
from moec.weights.shard import Shard, TensorEntry, read_shard
from moec.weights.trust.links import own_shard
from moec.weights.view import TORCH_DTYPES, view

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_MERGE = (
    "merge it into its base with peft: PeftModel.from_pretrained(BASE, DIR).merge_and_unload()"
    ".save_pretrained(OUT); then --checkpoint OUT"
)
#: fields that are about training, or repeat what the tensors say
_INERT = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config
    inference_mode loftq_config lora_dropout lora_ga_config
    megatron_config megatron_core peft_version qalora_group_size revision
    runtime_config task_type
    """.split()
)
#: fields that stand for another arithmetic unless they are false
_OFF = ("fan_in_fan_out", "lora_bias", "use_bdlora", "use_dora", "use_qalora")
#: ways to begin the training of an adapter that leave the base as it is
_PLAIN_START = (True, False, "gaussian", "eva", "orthogonal")
#: what `alpha_pattern` may hold: names, whose dots may be escaped; peft takes any expression
_LITERAL = re.compile(r"\^?\w+(\\?\.\w+)*\$?")
_MOST = 1e300
#: the first version of peft whose adapters of square experts are [out, in]
_TURNS = (0, 19)

_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?"
)
_BASE_COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")
#: what peft adds to the names of modules
_WRAPPER = re.compile(r"^base_model\.model\.|(\.base_layer)+(?=\.|$)")
#: how classes of transformers name modules -> how checkpoints do
_RENAMED = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.(?=vision_model\.|multi_modal_projector\.)"), ""),
)
#: how transformers 5 names an MoE block -> how some checkpoints do
_BLOCK = ".mlp.", ".block_sparse_moe."


def with_adapters(
    spec: ModelSpec,
    entries: Mapping[str, TensorEntry],
    adapters: Sequence[str | Path],
    named: Path | None = None,
) -> dict[str, TensorEntry]:
    """`entries` with the changes of all `adapters`, in their order.

    `named` is a further folder in which the user lets links to weights end.

    Raises:
        MoecError: an adapter cannot be read, is of another model, or cannot be merged.
    """
    changed = dict(entries)
    for adapter in adapters:
        for name, change in read_adapter(Path(adapter), spec, entries, named).items():
            entry = changed[name]
            changed[name] = replace(entry, changes=(*entry.changes, change))
    return changed


def read_adapter(
    folder: Path, spec: ModelSpec, entries: Mapping[str, TensorEntry], named: Path | None = None
) -> dict[str, LowRank]:
    """The changes that the adapter in `folder` makes to the weights `entries`, by our name.

    Raises:
        MoecError: as `with_adapters`.
    """
    at = Fields(str(folder / ADAPTER), read_own_json(folder / ADAPTER), _MERGE)
    scales = _Scales(at)
    if not os.path.lexists(folder / WEIGHTS):
        pickled = (folder / PICKLED).exists()
        refuse(
            folder,
            f"no {WEIGHTS}" + (f", but {PICKLED}, which can run code when it is loaded" * pickled),
            f"an adapter with {WEIGHTS}",
            _MERGE if pickled else f"download {WEIGHTS}",
        )
    shard = read_shard(own_shard(folder / WEIGHTS, folder, named, "put the file into it"), WEIGHTS)
    names_of = keys(spec)
    names = {key: name for name, key in names_of.items()}
    changes: dict[str, LowRank] = {}
    for module, kind, down, up in _pairs(folder, shard, names, entries):
        name, turned, experts = _place(folder, module, kind, down, up, names, entries, at)
        if name in changes:
            _refuse(folder, module, "two changes of one weight", "one for each weight")
        scales.targets.check(_WRAPPER.sub("", module))
        rank = down.shape[0] // experts
        leaf = names_of[name].rpartition(".")[2]
        scale = scales.of(_WRAPPER.sub("", module), leaf, rank, experts > 1)
        changes[name] = LowRank(down, up, scale, turned, experts)
    if not changes:
        _refuse(folder, WEIGHTS, "no tensor lora_A or lora_B", "those of a LoRA adapter")
    return changes


class _Scales:
    """The factor of each module's product, and which modules have one: `adapter_config.json`."""

    def __init__(self, at: Fields) -> None:
        at.require("peft_type", "LORA")
        for field in _OFF:
            at.require(field, False, default=False)
        at.require("bias", "none", default="none")
        start = at.left.pop("init_lora_weights", True)
        if start not in _PLAIN_START:
            raise at.error("init_lora_weights", shown(start), f"one of {_PLAIN_START}")
        if kept := at.take("modules_to_save", list, default=[]):
            raise at.error("modules_to_save", shown(kept), "none: changes of low rank alone")
        self.alpha = at.take("lora_alpha", int, float)
        if not abs(self.alpha) < _MOST:
            raise at.error("lora_alpha", shown(self.alpha), "a number of usual size")
        self.root = at.take("use_rslora", bool, default=False)
        patterns = at.take("alpha_pattern", dict, default={})
        for pattern, alpha in patterns.items():
            number = type(alpha) in (int, float) and abs(alpha) < _MOST
            if not _LITERAL.fullmatch(pattern) or not number:
                raise at.error(
                    "alpha_pattern", shown({pattern: alpha}), "names of modules, and numbers"
                )
        self.patterns = _indexed(patterns)
        self.rank = at.take("r", int, default=None)
        ranks = at.take("rank_pattern", dict, default={})
        self.ranks = _indexed(ranks)
        if not all(map(_LITERAL.fullmatch, ranks)):
            self.rank, self.ranks = None, {}  # the tensors alone say it
        self.parameters = at.take("target_parameters", list, default=[])
        self.targets = Targets.read(at, self.parameters)
        self.at = at
        at.left = {
            key: value for key, value in at.left.items() if value not in (None, [], {}, False)
        }
        at.finish(_INERT)

    def of(self, module: str, parameter: str, rank: int, stacked: bool) -> float:
        """The factor for a parameter of a module, both by the name that peft has for it.

        Patterns are for the names of modules, but for `target_parameters`, as all that is stacked.
        """
        own = f"{module}.{parameter}"
        if stacked or any(own == each or own.endswith(f".{each}") for each in self.parameters):
            module = own
        named = _first(self.ranks, module, self.rank)
        if named is not None and named != rank:
            expected = f"{rank}, the rank of the tensors of {module[:200]}"
            raise self.at.error(
                "r" if named is self.rank else "rank_pattern", shown(named), expected
            )
        alpha = _first(self.patterns, module, self.alpha)
        return float(alpha / (math.sqrt(rank) if self.root else rank))


Patterns = dict[str, list[tuple[int, str, Any]]]


def _indexed(patterns: Mapping[str, Any]) -> Patterns:
    """Patterns, which may be thousands, by what `_plain` makes of them: place, pattern, value."""
    found: Patterns = {}
    for index, (pattern, value) in enumerate(patterns.items()):
        name = _plain(pattern.removeprefix("^").removesuffix("$").replace("\\", ""))
        found.setdefault(name, []).append((index, pattern, value))
    return found


def _plain(name: str) -> str:
    """A name in which dots and underscores are one: a dot of a pattern stands for either."""
    return name.replace("_", ".")


def _first(patterns: Patterns, module: str, default: Any) -> Any:
    """The value of the first pattern that is for a module, as peft matches them."""
    parts = module.split(".")
    ends = (_plain(".".join(parts[at:])) for at in range(len(parts)))
    some = sorted(
        (each for end in ends for each in patterns.get(end, ())), key=lambda each: each[0]
    )
    found = (value for _, key, value in some if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _pairs(
    folder: Path, shard: Shard, names: Mapping[str, str], entries: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, str, TensorEntry, TensorEntry]]:
    """Each adapted module, whether it is an embedding, and its two matrices."""
    sides: dict[tuple[str, str], dict[str, TensorEntry]] = {}
    for key, entry in shard.tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            _refuse(folder, key, entry.dtype, " or ".join(TORCH_DTYPES))
        if found := _PART.fullmatch(key):
            at = found["module"], found["kind"] or ""
            if found["side"] in sides.setdefault(at, {}):
                _refuse(folder, key, f"a second lora_{found['side']} of one module", "one")
            sides[at][found["side"]] = entry
        elif found := _BASE_COPY.fullmatch(key):
            name = _find(f"{_canonical(found['module'])}.weight", names)
            if name is None or not _equal(entry, entries[name]):
                _refuse(folder, key, "other values than the base", "the weights of the base")
        else:
            _refuse(
                folder, key, "a tensor that is no lora_A or lora_B", "changes of low rank alone"
            )
    for (module, kind), both in sides.items():
        if len(both) < 2:
            _refuse(folder, module, f"lora_{min(both)} alone", "lora_A and lora_B")
        if any(len(each.shape) != 2 for each in both.values()):
            _refuse(folder, module, "shapes that are no matrices", "lora_A and lora_B of two axes")
        yield module, kind, both["A"], both["B"]


def _place(
    folder: Path,
    module: str,
    kind: str,
    down: TensorEntry,
    up: TensorEntry,
    names: Mapping[str, str],
    entries: Mapping[str, TensorEntry],
    at: Fields,
) -> tuple[str, bool, int]:
    """Our name of the weight that a module's matrices change, whether turned, and its experts."""
    canonical = _canonical(module)
    candidates = [f"{canonical}.weight", f"{canonical}.gate_up_proj", f"{canonical}.down_proj"]
    found = [name for each in candidates if (name := _find(each, names)) is not None]
    if not found:
        _refuse(folder, module, "no such weight in the checkpoint", "an adapter of this model")
    outer, inner = up.shape[0], down.shape[1]
    for name in found:
        if len(entries[name].shape) < 2:
            continue
        *stack, rows, columns = entries[name].shape
        experts = stack[0] if stack else 1
        rank, rest = divmod(down.shape[0], experts)
        if down.shape[0] != up.shape[1] or rest or not 1 <= rank <= max(rows, columns):
            continue
        straight = (outer, inner) == (rows, columns) and not kind
        turned = (outer, inner) == (columns, rows) and bool(kind or stack)
        if straight and turned and _version(at) < _TURNS:
            _refuse(
                folder,
                module,
                f"square experts of peft {shown(at.left.get('peft_version'))}",
                "peft 0.19 or newer, whose adapters say which axis is which",
            )
        if straight or turned:
            if entries[name].dtype not in TORCH_DTYPES:
                _refuse(folder, module, f"a weight of {entries[name].dtype}", "a wide base")
            return name, not straight, experts
    shapes = ", ".join(f"{list(entries[name].shape)}" for name in found)
    _refuse(
        folder,
        module,
        f"lora_A {list(down.shape)} and lora_B {list(up.shape)}",
        f"matrices of a low rank, whose product has the shape of the weight, {shapes}",
    )


def _version(at: Fields) -> tuple[int, ...]:
    parts = re.match(r"(\d{1,4})\.(\d{1,4})", str(at.left.get("peft_version")))
    return tuple(map(int, parts.groups())) if parts else ()


def _canonical(module: str) -> str:
    module = _WRAPPER.sub("", module)
    for pattern, name in _RENAMED:
        module = pattern.sub(name, module)
    return module


def _find(key: str, names: Mapping[str, str]) -> str | None:
    """Our name of the tensor `key`; decoders alone have no prefix."""
    bare = key.removeprefix(DECODER)
    spelled = key, DECODER + bare, bare, bare.replace(*_BLOCK)
    return next((names[each] for each in spelled if each in names), None)


def _equal(left: TensorEntry, right: TensorEntry) -> bool:
    if left.shape != right.shape:
        return False
    parts = (torch.split(view(each).flatten(), ELEMENTS) for each in (left, right))
    return all(torch.equal(a.float(), b.float()) for a, b in zip(*parts, strict=True))


def _refuse(folder: Path, what: str, found: str, expected: str) -> NoReturn:
    refuse(f"{folder / WEIGHTS}: {what[:200]}", found, expected, _MERGE)
