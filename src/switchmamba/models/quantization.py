"""Models in eight bits, for inference: a quarter of the memory, and of what decoding one sequence has to read.

Which layers, and which stay as they are, is written in ``layers/quantized.py``.
"""

from torch import nn

from switchmamba.errors import ConfigError
from switchmamba.layers.quantized import Int8Linear, Int8MoE, quantize_layers
from switchmamba.models.language_model import LanguageModel


def quantize(model: LanguageModel) -> LanguageModel:
    """Store projections, head and experts of ``model`` in int8 with a scale for each row, in place; return it.

    A tied head becomes a matrix of its own. The model is for inference from now on: neither trained nor exported.
    Raises ConfigError for a model in training mode, one that is quantised already, or weights that are not finite.
    """
    if model.training:
        raise ConfigError("the model is in training mode; quantise for inference, after model.eval()")
    if is_quantized(model):
        raise ConfigError("the model is in eight bits already; quantise the checkpoint that it was made of")
    quantize_layers(model)
    return model


def is_quantized(model: nn.Module) -> bool:
    """Tell whether any layer is in eight bits."""
    return any(isinstance(module, (Int8Linear, Int8MoE)) for module in model.modules())
