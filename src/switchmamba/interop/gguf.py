"""GGUF for llama.cpp: one file, architecture ``jamba``, tokenizer included.

It follows llama.cpp's own converter of JambaForCausalLM (conversion/jamba.py) and its loader (src/models/jamba.cpp):
names come from the gguf package's table for that architecture; an expert layer's matrices are stacked; ``ssm_a`` is
A = −exp(A_log); the convolution loses its middle dimension; layers without attention have 0 key-value heads. Vectors,
norms, routers, convolutions and A are always fp32. ``file_type`` says how other matrices are kept: f32, f16, bf16 or
q8_0 (blocks of 32; a matrix whose rows are no multiple of 32 long is f16). The vocabulary ends with the tokenizer's, as
in ``generate``.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.interop.conversion import Native, Written
from switchmamba.interop.gguf_reference import read_back
from switchmamba.interop.gguf_tokenizer import add_tokenizer, check_tokenizer
from switchmamba.interop.jamba import ADDED_LAYER, MAX_POSITIONS, from_jamba, to_jamba
from switchmamba.interop.jamba_shape import JambaShape, jamba_shape
from switchmamba.interop.verification import Foreign, generated_tokens, relative_difference, verify
from switchmamba.models.language_model import LanguageModel

FILE_TYPES = ("f32", "f16", "bf16", "q8_0")

TOLERANCE = 2e-5
"""Both in fp32, from the same rounded weights."""

_BLOCK = 32

_USAGE = """With [llama.cpp](https://github.com/ggml-org/llama.cpp):

```sh
llama-completion -m PATH/{file} -p "Once upon a time" -n 50 --temp 0 -no-cnv
```

or from Python, with `pip install llama-cpp-python`:

```python
from llama_cpp import Llama

model = Llama("PATH/{file}", n_ctx=2048)
print(model("Once upon a time", max_tokens=50, temperature=0)["choices"][0]["text"])
```"""


def export(native: Native, directory: Path) -> Written:
    """Write ``model-TYPE.gguf``; it is read back and computed as llama.cpp does, and the logits compared.

    In two steps, since rounding comes between: the native model with its translation, and the translation's rounded
    weights with the file.
    """
    file_type = native.options.get("file_type", "f32")
    if file_type not in FILE_TYPES:
        raise ConfigError(f"--file-type {file_type!r} is none of {', '.join(FILE_TYPES)}")
    shape = jamba_shape(native.model.config)
    if shape.expand != 2:
        raise ConfigError(f"mamba has expand = {shape.expand}; llama.cpp runs Jamba with expand = 2 only")
    check_tokenizer(native.tokenizer)
    exact, deviations = to_jamba(native.model, shape), [ADDED_LAYER] if shape.adds_attention else []
    entries = native.tokenizer.vocab_size
    if entries < shape.vocab_size:
        deviations.append(
            f"The last {shape.vocab_size - entries} rows of the vocabulary are no tokens and were left out."
        )
        shape = replace(shape, vocab_size=entries)
        exact |= {name: exact[name][:entries] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    translated = from_jamba(exact, shape, False, directory)
    original = Foreign(lambda tokens: native.model(tokens, observe_routers=False).logits[..., :entries])
    verify(translated, original, TOLERANCE, "the translation to Jamba")
    kept = {name: keep(array, name, file_type) for name, array in stacked(exact, shape).items()}
    path = directory / f"model-{file_type}.gguf"
    write(path, kept, shape, native, file_type)
    reference = _as_kept(exact, kept, shape, directory)
    if file_type != "f32":
        deviations.append(_rounding(native.model, reference, file_type))
    usage = _USAGE.format(file=path.name)
    return Written(read_back(path), TOLERANCE, usage, reference, tuple(deviations), {"library_name": "gguf"})


class Kept:
    """A tensor as the file holds it: bytes or floats, their GGML type, and the values that they stand for."""

    def __init__(self, array: npt.NDArray[np.float32], file_type: str) -> None:
        import gguf

        self.kind = getattr(gguf.GGMLQuantizationType, file_type.upper())
        self.data = gguf.quants.quantize(array, self.kind)
        self.values: npt.NDArray[np.float32] = gguf.quants.dequantize(self.data, self.kind).reshape(
            array.shape
        )


def keep(array: npt.NDArray[np.float32], name: str, file_type: str) -> Kept:
    """Round a tensor as the file type and its role say."""
    always_exact = ("norm.weight", "router.weight", "conv1d.weight", "A_log")
    if array.ndim == 1 or name.endswith(always_exact):
        return Kept(array, "f32")
    return Kept(array, "f16" if file_type == "q8_0" and array.shape[-1] % _BLOCK else file_type)


def stacked(tensors: dict[str, Tensor], shape: JambaShape) -> dict[str, npt.NDArray[np.float32]]:
    """Return Jamba's tensors as arrays: experts stacked, A_log as A, the convolution without its middle dimension."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items() if ".experts." not in name}
    for i, (_, feed_forward) in enumerate(shape.all_layers):
        if feed_forward == "moe":
            for name in ("gate_proj", "up_proj", "down_proj"):
                experts = (
                    tensors[f"model.layers.{i}.feed_forward.experts.{expert}.{name}.weight"]
                    for expert in range(shape.num_experts)
                )
                arrays[f"model.layers.{i}.mlp.experts.{name}.weight"] = torch.stack(list(experts)).numpy()
    for name, array in arrays.items():
        if name.endswith(".A_log"):
            arrays[name] = -np.exp(array)
        elif name.endswith(".conv1d.weight"):
            arrays[name] = array.squeeze(1)
    return arrays


def write(path: Path, kept: dict[str, Kept], shape: JambaShape, native: Native, file_type: str) -> None:
    """Write the file."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.JAMBA, shape.num_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.JAMBA])
    try:
        _add_shape(writer, shape)
        kind = "ALL_F32" if file_type == "f32" else f"MOSTLY_{file_type.upper()}"
        writer.add_file_type(getattr(gguf.LlamaFileType, kind))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, native.tokenizer, shape.vocab_size)
        for name, tensor in kept.items():
            there = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert there is not None, name
            writer.add_tensor(there, tensor.data, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_shape(writer: Any, shape: JambaShape) -> None:
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_head_count(shape.num_heads)
    heads = [shape.num_kv_heads if mixer == "attention" else 0 for mixer, _ in shape.all_layers]
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_ssm_conv_kernel(shape.d_conv)
    writer.add_ssm_inner_size(shape.expand * shape.d_model)
    writer.add_ssm_state_size(shape.d_state)
    writer.add_ssm_time_step_rank(shape.dt_rank)
    if shape.num_experts > 1:
        writer.add_expert_count(shape.num_experts)
        writer.add_expert_used_count(shape.top_k)


def _as_kept(
    exact: dict[str, Tensor], kept: dict[str, Kept], shape: JambaShape, source: Path
) -> LanguageModel:
    """Return the native model of the weights as the file holds them."""
    rounded = dict(exact)
    for name in exact:
        if ".experts." in name:
            _, _, layer, _, _, expert, matrix, _ = name.split(".")
            values = kept[f"model.layers.{layer}.mlp.experts.{matrix}.weight"].values[int(expert)]
        elif name.endswith((".A_log", ".conv1d.weight")):
            continue  # exact
        else:
            values = kept[name].values
        rounded[name] = torch.from_numpy(values)
    return from_jamba(rounded, shape, False, source)


@torch.no_grad()
def _rounding(model: LanguageModel, rounded: LanguageModel, file_type: str) -> str:
    difference = max(
        relative_difference(rounded(tokens).logits, model(tokens).logits[..., : rounded.config.vocab_size])
        for tokens in generated_tokens(rounded.config.vocab_size)
    )
    return (
        f"Matrices are rounded to {file_type}; on generated tokens that alone moves the logits by {difference:.1e} "
        "(relative). llama.cpp rounds activations as well."
    )
