"""Read `generation_config.json`: the tokens that end a sequence, and how to sample."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moec.spec.errors import refuse
from moec.spec.fields import read_own_json
from moec.spec.model import ModelSpec, Sampling, Tokens

_NEXT = "correct the field, or delete the file: config.json is enough"


def with_generation(spec: ModelSpec, path: Path) -> ModelSpec:
    """`spec` with what the file `path` says of generation; `spec` itself if there is no such file.

    Its end tokens come before those of config.json, which still end a sequence. `do_sample` false
    or absent means greedy, whatever the other fields say, as in transformers.

    Raises:
        MoecError: the file cannot be read, or a field holds no such value.
    """
    if not path.is_file():
        return spec
    raw = read_own_json(path)
    named = raw.get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    tokens = {
        "eos": tuple(dict.fromkeys([*named, *spec.tokens.eos])) if _ids(named) else named,
        "bos": raw.get("bos_token_id", spec.tokens.bos),
        "pad": raw.get("pad_token_id", spec.tokens.pad),
    }
    kept = {key: each for key, each in tokens.items() if each is not None}
    try:
        return spec.model_copy(
            update={
                "tokens": Tokens.model_validate({**spec.tokens.model_dump(), **kept}, strict=False),
                "sampling": _sampling(raw),
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        refuse(f"{path}: {_FIELDS.get(field.split('.')[0], field)}", first["msg"], "a value", _NEXT)


#: fields of ours, and their names in the file
_FIELDS = {"eos": "eos_token_id", "bos": "bos_token_id", "pad": "pad_token_id"}


def _ids(values: list[Any]) -> bool:
    return all(type(each) is int for each in values)


def _sampling(raw: dict[str, Any]) -> Sampling | None:
    if not raw.get("do_sample"):
        return None
    values = {key: raw.get(key) for key in ("temperature", "top_k", "top_p")}
    given = {key: each for key, each in values.items() if each is not None}
    if given.get("top_k") == 0:  # transformers' way to say: of all tokens
        del given["top_k"]
    return Sampling.model_validate(given)
