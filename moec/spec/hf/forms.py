"""Recognise the forms in which people hold models that moec does not read, and say what to do.

Only names and the first bytes of files are looked at, so that a refusal takes milliseconds.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from moec.spec.bounded.own import check_utf8, is_regular
from moec.spec.bounded.read import open_file
from moec.spec.errors import refuse

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: the files that list the weights of a checkpoint
LISTS = (INDEX, SINGLE)
ADAPTER = "adapter_config.json"

_GGUF = b"GGUF"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
#: with one slash too: a path has no two side by side
_HUB_URL = re.compile(
    r"(?:https?:/{1,2}(?:huggingface\.co|hf\.co)/|hf:/{1,2})(?:models/)?([^/]+/[^/?#]+)"
)
_EXPECTED = "a folder with config.json and safetensors weights"


def split_list(source: Path) -> tuple[Path, str]:
    """The folder of a checkpoint, and the file that lists its weights if `source` names that."""
    return (source.parent, source.name) if source.name in LISTS else (source, "")


def checkpoint_folder(source: str | Path) -> Path | None:
    """The folder of the checkpoint that `source` names; None if it names none.

    A user names a checkpoint by its folder, or by the file in it that lists the weights, where
    the folder has two.
    """
    # pathlib would raise on names that the operating system cannot have; os.path returns False.
    if str(source) and os.path.isdir(source):
        return Path(source)
    path = Path(source)
    return path.parent if path.name in LISTS and is_regular(path) else None


def for_others(source: str | Path) -> str:
    """The folder of the checkpoint `source`, for another library to read as a checkpoint.

    Whatever gives a folder to another library asks here first. An adapter beside the weights would
    change the model, and its config may name code that peft imports; of two sets of weights the
    other library would choose one itself.

    Raises:
        MoecError: another library would read more there than the weights that moec reads, or cannot
            have the folder's name.
    """
    folder = checkpoint_folder(source)
    if folder is None:
        refuse(source, "no folder", "the folder of a checkpoint", "name the folder")
    check_utf8(folder)
    if os.path.lexists(folder / ADAPTER):
        refuse(
            folder / ADAPTER,
            "an adapter beside the weights, which other engines apply",
            "the weights alone, or merged with it",
            f"move it, or moec quantize {quote(str(folder))} --adapter {quote(str(folder))}",
        )
    named = split_list(Path(source))[1]
    if named and (other := next((x for x in LISTS if x != named and (folder / x).exists()), None)):
        refuse(
            folder / other,
            f"weights beside those of {named}, of which other engines choose one",
            "one set of weights",
            f"move {other} out of the folder",
        )
    return str(folder.resolve())


def refuse_other_form(source: str | Path) -> None:
    """Refuse `source` if it is a model in a form that moec knows by name but does not read.

    Raises:
        MoecError: it is one; the message names the form and what to do.
    """
    text = str(source)
    where = source if len(text) <= 4096 else f"{text[:200]} ..."
    if found := _HUB_URL.match(text):
        _download(where, found[1])
    if os.path.isdir(source):
        _refuse_folder(Path(source))
    elif os.path.isfile(source):
        _refuse_file(Path(source))
    elif _HUB_NAME.fullmatch(text) and not os.path.lexists(text):
        _download(where, text)


def _download(where: object, name: str) -> None:
    local = name.partition("/")[2]
    refuse(
        where,
        "the name of a model on the Hugging Face Hub, and no such folder here",
        f"{_EXPECTED}: moec downloads nothing",
        f"hf download {quote(name)} --local-dir {quote(local)}, then --checkpoint {quote(local)}",
    )


@dataclass(frozen=True, slots=True)
class _Form:
    """A form of model files: which names they have, what it is, and what to do about it."""

    names: str
    what: str
    next_step: str

    def has(self, name: str) -> bool:
        return re.fullmatch(self.names, name) is not None


_SAFE = (
    "download the safetensors files of this model, or convert it with transformers: "
    "AutoModelForImageTextToText.from_pretrained(DIR, dtype='auto').save_pretrained(OUT)"
)
_PUBLISHED = (
    "download the safetensors checkpoint that it was made from; moec quantises it: "
    "--precision fp8, or --target ort --precision int4"
)

#: in the order in which a folder is searched
_FORMS = (
    _Form(
        r"consolidated(\.\d+)?\.pth|params\.json",
        "Meta's original layout",
        "download the Hugging Face form of this model (the same name without -Original), or "
        "convert it: python -m transformers.models.llama4.convert_llama4_weights_to_hf",
    ),
    _Form(r".*\.gguf", "GGUF, the format of llama.cpp", _PUBLISHED),
    _Form(
        r".*\.distcp|(zero_pp_rank|mp_rank)_.*\.pt|latest",
        "the state of a training run (FSDP or DeepSpeed)",
        "export the model: accelerate merge-weights, or the zero_to_fp32.py beside it with "
        "--safe_serialization",
    ),
    _Form(
        r"pytorch_model.*\.bin(\.index\.json)?"
        r"|(?!training_args|optimizer|scheduler|rng_state).*\.(bin|pt|pth|ckpt|pkl)",
        "pickled PyTorch weights, which can run code when they are loaded",
        _SAFE,
    ),
    _Form(
        r"model-\d+-of-\d+\.safetensors",
        f"a shard, but no {INDEX} that lists the tensors",
        f"download {INDEX}",
    ),
    _Form(r"consolidated.*\.safetensors", "Mistral's own layout of weights", _SAFE),
    _Form(r".*\.(h5|msgpack|npz|tflite)", "weights of TensorFlow, Flax or NumPy", _SAFE),
    _Form(
        r".*\.(onnx|engine|plan|pt2|mlmodel)",
        "a compiled model",
        "give the checkpoint that it was made from",
    ),
    _Form(r".*\.(zip|tar|tgz|gz|bz2|xz|zst|7z)", "an archive", "unpack it, and give its folder"),
)


def _refuse_folder(folder: Path) -> None:
    found = sorted((each.name, each.is_dir()) for each in os.scandir(folder))[:100_000]
    names = [name for name, is_folder in found if not is_folder]
    folders = [name for name, is_folder in found if is_folder]
    if "manifest.json" in names and "config.json" not in names:
        refuse(
            folder,
            "an artefact of moec (it has a manifest.json)",
            _EXPECTED,
            f"give the checkpoint that it was built from: moec inspect {quote(str(folder))} "
            "shows it",
        )
    if ADAPTER in names and "config.json" not in names:
        refuse(
            folder,
            f"an adapter ({ADAPTER}): changes to a checkpoint, and no checkpoint",
            _EXPECTED,
            f"--checkpoint BASE --adapter {quote(str(folder))}",
        )
    if "snapshots" in folders and "blobs" in folders:
        revisions = sorted(each.name for each in os.scandir(folder / "snapshots"))[:1]
        refuse(
            folder,
            "a model's folder in the cache of the Hugging Face Hub",
            f"one of its snapshots, {_EXPECTED}",
            f"--checkpoint {quote(str(folder / 'snapshots' / (revisions or ['REVISION'])[0]))}",
        )
    for form in _FORMS:
        if own := next(filter(form.has, names), None):
            refuse(folder, f"{own}: {form.what}", _EXPECTED, form.next_step)
    below = [name for name in folders if is_regular(folder / name / "config.json")]
    if below and "config.json" not in names:
        refuse(
            folder,
            f"no config.json here, but one in {below[0]}",
            _EXPECTED,
            f"--checkpoint {quote(str(folder / below[0]))}",
        )


def _refuse_file(path: Path) -> None:
    with open_file(path) as file:
        start = file.read(len(_GGUF))
    if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json"):
        refuse(
            path,
            "one file of a checkpoint",
            _EXPECTED,
            f"give its folder: --checkpoint {quote(str(path.parent))}",
        )
    if start == _GGUF:
        refuse(path, "GGUF, the format of llama.cpp", _EXPECTED, _PUBLISHED)
    for form in _FORMS:
        if form.has(path.name):
            refuse(path, form.what, _EXPECTED, form.next_step)
