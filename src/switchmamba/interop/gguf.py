"""GGUF for llama.cpp: one file, tokenizer included; architecture ``jamba``, ``mamba`` or ``mamba2`` (``gguf_layouts``).

It follows llama.cpp's own converters and loaders (src/models). Vectors, norms, routers, convolutions, A and D are fp32
always. ``file_type`` says how other matrices are kept: f32, f16, bf16 or q8_0 (blocks of 32; a matrix whose rows are no
multiple of 32 long is f16). The vocabulary ends with the tokenizer's, as in ``generate``.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from switchmamba.errors import ConfigError
from switchmamba.interop.conversion import Native, Written
from switchmamba.interop.gguf_layouts import Layout, layout_of, stack_name
from switchmamba.interop.gguf_reference import read_back
from switchmamba.interop.gguf_tokenizer import add_tokenizer, check_tokenizer
from switchmamba.interop.verification import Foreign, generated_tokens, relative_difference, verify
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.loading import read_chat_template

FILE_TYPES = ("f32", "f16", "bf16", "q8_0")

TOLERANCE = 2e-5
"""Both in fp32, from the same rounded weights."""

_BLOCK = 32
_ALWAYS_EXACT = ("norm.weight", "router.weight", "conv1d.weight", ".A_log", ".D")

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
    layout = layout_of(native, directory)
    check_tokenizer(native.tokenizer)
    entries = native.tokenizer.vocab_size
    original = Foreign(lambda tokens: native.model(tokens, observe_routers=False).logits[..., :entries])
    translation = f"the translation to {layout.architecture}"
    verify(layout.build(layout.tensors), original, TOLERANCE, translation, native.seed)
    kept = {name: keep(array, name, file_type) for name, array in layout.arrays.items()}
    path = directory / f"model-{file_type}.gguf"
    write(path, kept, layout, native, file_type)
    reference, deviations = _as_kept(layout, kept), list(layout.deviations)
    if entries < native.model.config.vocab_size:
        unused = native.model.config.vocab_size - entries
        deviations.append(f"The last {unused} rows of the vocabulary are no tokens and were left out.")
    if file_type != "f32":
        deviations.append(_rounding(native.model, reference, file_type))
    usage = _USAGE.format(file=path.name)
    return Written(read_back(path), TOLERANCE, usage, reference, tuple(deviations), {"library_name": "gguf"})


class Kept:
    """A tensor as the file holds it: bytes or floats, their GGML type, and the values that they stand for."""

    def __init__(self, array: npt.NDArray[np.float32], file_type: str) -> None:
        import gguf

        self.file_type, self.kind = file_type, getattr(gguf.GGMLQuantizationType, file_type.upper())
        self.data = gguf.quants.quantize(array, self.kind)
        values = gguf.quants.dequantize(self.data, self.kind)
        self.values: npt.NDArray[np.float32] = values.reshape(array.shape)


def keep(array: npt.NDArray[np.float32], name: str, file_type: str) -> Kept:
    """Round a tensor as the file type and its role say."""
    if array.ndim == 1 or name.endswith(_ALWAYS_EXACT):
        return Kept(array, "f32")
    return Kept(array, "f16" if file_type == "q8_0" and array.shape[-1] % _BLOCK else file_type)


def write(path: Path, kept: dict[str, Kept], layout: Layout, native: Native, file_type: str) -> None:
    """Write the file."""
    import gguf

    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, layout.architecture.upper()), layout.num_layers)
    writer = gguf.GGUFWriter(path, layout.architecture)
    try:
        layout.add_keys(writer)
        kind = "ALL_F32" if file_type == "f32" else f"MOSTLY_{file_type.upper()}"
        writer.add_file_type(getattr(gguf.LlamaFileType, kind))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, native.tokenizer)
        template = read_chat_template(native.path)
        if template is not None:
            writer.add_chat_template(template)
        for name, tensor in kept.items():
            there = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert there is not None, name
            writer.add_tensor(there, tensor.data, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _as_kept(layout: Layout, kept: dict[str, Kept]) -> LanguageModel:
    """Return the native model of the weights as the file holds them."""
    tensors = dict(layout.tensors)
    for name in layout.tensors:
        if ".experts." in name:
            _, _, layer, _, _, expert, matrix, _ = name.split(".")
            tensors[name] = torch.from_numpy(kept[stack_name(layer, matrix)].values[int(expert)])
        elif name in kept and kept[name].file_type != "f32":
            tensors[name] = torch.from_numpy(kept[name].values)
    return layout.build(tensors)


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
