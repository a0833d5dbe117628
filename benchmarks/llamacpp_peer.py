"""Run llama.cpp for comparison: write a checkpoint of Llama 4 or OLMoE as GGUF, and open it.

Writing needs the package gguf and running needs llama-cpp-python. No extra of moec installs them.
"""

import ctypes
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

FILE_TYPES = {"f32": "ALL_F32", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def write_gguf(checkpoint: Path, out: Path, kind: str) -> None:
    """Write a text checkpoint in Hugging Face layout as GGUF. `kind` is f32, q8_0 or q4_0.

    As in llama.cpp's own quantiser, all matrices but the routers are quantised. For q4_0 that
    quantiser stores the head in Q6_K, which the gguf package cannot write; here it is Q8_0. The
    file has no tokenizer. Only one tensor is in memory at a time.
    """
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    architecture = ARCHITECTURES[config["model_type"]]
    _check(config, architecture.fixed(config))
    writer = gguf.GGUFWriter(out, architecture.name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_metadata(writer, config, architecture)

    tensors = list(_tensors(config, _open(checkpoint), architecture))
    for tensor in tensors:
        quant = gguf.GGMLQuantizationType[_precision(tensor, kind)]
        block, size = gguf.GGML_QUANT_SIZES[quant]
        nbytes = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        quant = gguf.GGMLQuantizationType[_precision(tensor, kind)]
        writer.write_tensor_data(gguf.quantize(tensor.read(), quant))
    writer.close()


class LlamaCpp:
    """A model of llama.cpp and its cache, for one sequence. It returns logits of the last token."""

    def __init__(
        self, path: Path | str, threads: int, context: int, cache: Literal["f16", "f32"] = "f16"
    ) -> None:
        """Map the file and make a context with llama.cpp's defaults.

        `cache` is the type of keys and values. With "f32" flash attention is off, because
        llama.cpp's flash attention computes from f16 even then.
        """
        import llama_cpp as api

        self._api = api
        api.llama_log_set(_quiet(api), ctypes.c_void_p())
        api.llama_backend_init()
        model = api.llama_model_default_params()
        model.load_mode, model.n_gpu_layers = api.LLAMA_LOAD_MODE_MMAP, 0
        self._context, self._limit = None, context
        self._model = api.llama_model_load_from_file(str(path).encode(), model)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")

        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = getattr(api, f"GGML_TYPE_{cache.upper()}")
        if cache == "f32":
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Clear the cache and run `ids`; return the logits after the last token."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        return self._run(ids)

    def decode(self, token: int) -> Floats:
        """Run one more token; return the logits after it."""
        return self._run([token])

    def close(self) -> None:
        """Free the context and the model."""
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._context = self._model = None

    def _run(self, ids: Sequence[int]) -> Floats:
        if not 0 < len(ids) <= self._limit:  # llama.cpp would abort the process
            raise ValueError(f"{len(ids)} tokens at once, with a context of {self._limit}")
        tokens = (self._api.llama_token * len(ids))(*map(int, ids))
        status = self._api.llama_decode(
            self._context, self._api.llama_batch_get_one(tokens, len(ids))
        )
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._vocabulary,)).copy()


def system_info() -> str:
    """The features that the installed llama.cpp was built with."""
    import llama_cpp

    return str(llama_cpp.llama_print_system_info().decode().strip(" |"))


_callbacks: list[Any] = []


def _quiet(api: Any) -> Any:
    """A log callback that drops all messages. It must stay alive: llama.cpp keeps its address."""
    if not _callbacks:
        _callbacks.append(api.llama_log_callback(lambda level, text, data: None))
    return _callbacks[0]


def _check(config: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Refuse a config with other values than the constants that llama.cpp has in its code."""
    for key, value in fixed.items():
        if config.get(key) not in (None, [], value):  # [] stands for the default
            raise ValueError(
                f"llama.cpp always uses {key} = {value}, but the checkpoint has {config[key]}"
            )


def _fixed_of_llama4(config: dict[str, Any]) -> dict[str, Any]:
    layers, step = config["num_hidden_layers"], config["interleave_moe_layer_step"]
    ropes = [int((i + 1) % 4 > 0) for i in range(layers)]
    return {
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "use_qk_norm": config["num_local_experts"] != 128,
        "no_rope_layers": ropes,
        "layer_types": ["chunked_attention" if rope else "full_attention" for rope in ropes],
        "moe_layers": [i for i in range(layers) if (i + 1) % step == 0],
        "attention_bias": False,
        "hidden_act": "silu",
    }


def _fixed_of_olmoe(config: dict[str, Any]) -> dict[str, Any]:
    width = config["hidden_size"] // config["num_attention_heads"]
    return {
        "norm_topk_prob": False,
        "clip_qkv": None,
        "attention_bias": False,
        "hidden_act": "silu",
        "head_dim": width,
        "tie_word_embeddings": False,
    }


def _add_metadata(writer: Any, config: dict[str, Any], architecture: "_Architecture") -> None:
    for method, key in (_METADATA | architecture.metadata).items():
        getattr(writer, f"add_{method}")(config[key])
    width = _head_dim(config)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_tokenizer_model("none")


#: methods of gguf's writer without "add_", and the fields of the config that they store
_METADATA = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "expert_used_count": "num_experts_per_tok",
    "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads",
    "layer_norm_rms_eps": "rms_norm_eps",
    "rope_freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the GGUF file. `shape` is in numpy's order, which is the reverse of ggml's."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Floats]


def _precision(tensor: _Tensor, kind: str) -> str:
    if len(tensor.shape) < 2 or "ffn_gate_inp" in tensor.name:
        return "F32"
    return "Q8_0" if kind == "q4_0" and tensor.name == "output.weight" else kind.upper()


def _tensor(name: str, array: Array) -> _Tensor:
    return _Tensor(f"{name}.weight", array.shape, partial(_floats, array))


def _tensors(
    config: dict[str, Any], weights: dict[str, Array], architecture: "_Architecture"
) -> Iterator[_Tensor]:
    """All tensors, with llama.cpp's names and layout.

    llama.cpp pairs the elements of a rotary pair as the checkpoint does, so that queries and keys
    stay as they are. Experts are [expert, out, in] in GGUF.
    """
    yield _tensor("token_embd", weights["model.embed_tokens.weight"])
    if not config["tie_word_embeddings"]:
        yield _tensor("output", weights["lm_head.weight"])
    yield _tensor("output_norm", weights["model.norm.weight"])
    factors = _rope_factors(config)
    if factors is not None:
        yield _tensor("rope_freqs", factors)
    for i in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{i}.", f"blk.{i}."
        for name, source in (_PLAIN | architecture.plain).items():
            if f"{layer}{source}.weight" in weights:
                yield _tensor(block + name, weights[f"{layer}{source}.weight"])
        yield from architecture.experts(config, weights, layer, block)


def _fused_experts(
    config: dict[str, Any], weights: dict[str, Array], layer: str, block: str
) -> Iterator[_Tensor]:
    """Experts that the checkpoint has as [expert, in, out], gate and up in one tensor."""
    if f"{layer}feed_forward.experts.down_proj" in weights:
        width = config["intermediate_size"]
        gate_up = weights[f"{layer}feed_forward.experts.gate_up_proj"].swapaxes(1, 2)
        down = weights[f"{layer}feed_forward.experts.down_proj"].swapaxes(1, 2)
        yield _tensor(block + "ffn_gate_exps", gate_up[:, :width])
        yield _tensor(block + "ffn_up_exps", gate_up[:, width:])
        yield _tensor(block + "ffn_down_exps", down)


def _separate_experts(
    config: dict[str, Any], weights: dict[str, Array], layer: str, block: str
) -> Iterator[_Tensor]:
    """Experts that the checkpoint has as three tensors [out, in] each."""
    for part in ("gate", "up", "down"):
        each = [
            weights[f"{layer}mlp.experts.{expert}.{part}_proj.weight"]
            for expert in range(config["num_experts"])
        ]
        shape = (len(each), *each[0].shape)
        yield _Tensor(f"{block}ffn_{part}_exps.weight", shape, partial(_stacked, each))


def _stacked(each: Sequence[Array]) -> Floats:
    return np.stack([_floats(array) for array in each])


#: llama.cpp's names of a layer's weights, and the checkpoint's, in every architecture
_PLAIN = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What sets an architecture of llama.cpp apart.

    `fixed` gives the values of a config that are constants in llama.cpp's code. `metadata` and
    `plain` add to `_METADATA` and `_PLAIN`. `experts` yields the routed experts of a layer.
    """

    name: str
    fixed: Callable[[dict[str, Any]], dict[str, Any]]
    experts: Callable[[dict[str, Any], dict[str, Array], str, str], Iterator[_Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)


_LLAMA4 = _Architecture(
    "llama4",
    _fixed_of_llama4,
    _fused_experts,
    {
        "feed_forward_length": "intermediate_size_mlp",
        "expert_feed_forward_length": "intermediate_size",
        "expert_count": "num_local_experts",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
        "sliding_window": "attention_chunk_size",
    },
    {
        "ffn_gate_inp": "feed_forward.router",
        "ffn_gate_shexp": "feed_forward.shared_expert.gate_proj",
        "ffn_up_shexp": "feed_forward.shared_expert.up_proj",
        "ffn_down_shexp": "feed_forward.shared_expert.down_proj",
        "ffn_gate": "feed_forward.gate_proj",
        "ffn_up": "feed_forward.up_proj",
        "ffn_down": "feed_forward.down_proj",
    },
)
#: by the `model_type` of a config
ARCHITECTURES = {
    "llama4_text": _LLAMA4,
    "olmoe": _Architecture(
        "olmoe",
        _fixed_of_olmoe,
        _separate_experts,
        {"feed_forward_length": "intermediate_size", "expert_count": "num_experts"},
        {
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "ffn_gate_inp": "mlp.gate",
        },
    ),
}


def _rope_factors(config: dict[str, Any]) -> Floats | None:
    """The factors by which llama.cpp divides the rotary frequencies (llama3 scaling)."""
    scaling = config.get("rope_scaling")
    if not scaling or scaling["rope_type"] == "default":
        return None
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"rope scaling {scaling['rope_type']} is not supported")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    dim, context = _head_dim(config), scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    turns = context / wavelengths  # rotations within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1) if high > low else turns >= low
    factors: Floats = (1 / (smooth + (1 - smooth) / scaling["factor"])).astype(np.float32)
    return factors


def _open(checkpoint: Path) -> dict[str, Array]:
    """Map each tensor of the checkpoint, without reading it."""
    found: dict[str, Array] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        mapped = np.memmap(path, np.uint8, "r")
        start = 8 + int(mapped[:8].view("<u8")[0])
        header = json.loads(bytes(mapped[8:start]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            data = mapped[start + begin : start + end].view(_DTYPES[entry["dtype"]])
            found[name] = data.reshape(entry["shape"])
    return found


def _floats(array: Array) -> Floats:
    """`array` as contiguous fp32. 16-bit integers are the bits of bf16 values."""
    array = np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)
