"""Run llama.cpp for comparison: write a Llama 4 checkpoint as GGUF, and open it.

Writing needs the package gguf and running needs llama-cpp-python. No extra of moec installs them.
"""

import ctypes
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    _check(config)
    writer = gguf.GGUFWriter(out, "llama4")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_metadata(writer, config)

    tensors = list(_tensors(config, _open(checkpoint)))
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


def _check(config: dict[str, Any]) -> None:
    """Refuse a config with other values than the constants that llama.cpp has in its code."""
    layers, step = config["num_hidden_layers"], config["interleave_moe_layer_step"]
    ropes = [int((i + 1) % 4 > 0) for i in range(layers)]
    fixed = {
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
    for key, value in fixed.items():
        if config.get(key) not in (None, [], value):  # [] stands for the default
            raise ValueError(
                f"llama.cpp always uses {key} = {value}, but the checkpoint has {config[key]}"
            )


def _add_metadata(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size_mlp"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_sliding_window(config["attention_chunk_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


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


def _tensors(config: dict[str, Any], weights: dict[str, Array]) -> Iterator[_Tensor]:
    """All tensors, with llama.cpp's names and layout.

    The two elements of a rotary pair are neighbours in both formats, so that queries and keys stay
    as they are. Experts are [expert, out, in] in GGUF. In the checkpoint they are [expert, in, out]
    and gate and up are one tensor.
    """
    plain = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "feed_forward.router",
        "ffn_gate_shexp": "feed_forward.shared_expert.gate_proj",
        "ffn_up_shexp": "feed_forward.shared_expert.up_proj",
        "ffn_down_shexp": "feed_forward.shared_expert.down_proj",
        "ffn_gate": "feed_forward.gate_proj",
        "ffn_up": "feed_forward.up_proj",
        "ffn_down": "feed_forward.down_proj",
    }

    def tensor(name: str, array: Array) -> _Tensor:
        return _Tensor(f"{name}.weight", array.shape, partial(_floats, array))

    yield tensor("token_embd", weights["model.embed_tokens.weight"])
    if not config["tie_word_embeddings"]:
        yield tensor("output", weights["lm_head.weight"])
    yield tensor("output_norm", weights["model.norm.weight"])
    factors = _rope_factors(config)
    if factors is not None:
        yield tensor("rope_freqs", factors)
    for i in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{i}.", f"blk.{i}."
        for name, source in plain.items():
            if f"{layer}{source}.weight" in weights:
                yield tensor(block + name, weights[f"{layer}{source}.weight"])
        if f"{layer}feed_forward.experts.down_proj" in weights:
            width = config["intermediate_size"]
            gate_up = weights[f"{layer}feed_forward.experts.gate_up_proj"].swapaxes(1, 2)
            down = weights[f"{layer}feed_forward.experts.down_proj"].swapaxes(1, 2)
            yield tensor(block + "ffn_gate_exps", gate_up[:, :width])
            yield tensor(block + "ffn_up_exps", gate_up[:, width:])
            yield tensor(block + "ffn_down_exps", down)


def _rope_factors(config: dict[str, Any]) -> Floats | None:
    """The factors by which llama.cpp divides the rotary frequencies (llama3 scaling)."""
    scaling = config.get("rope_scaling")
    if not scaling or scaling["rope_type"] == "default":
        return None
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"rope scaling {scaling['rope_type']} is not supported")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    dim, context = config["head_dim"], scaling["original_max_position_embeddings"]
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
