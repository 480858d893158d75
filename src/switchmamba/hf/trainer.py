"""transformers' Trainer, with the weight decay that a state-space model wants.

transformers decays every parameter but biases and norms. A_log and D set how fast a state forgets and must not be
drawn to 0 (Mamba, arXiv 2312.00752; state-spaces/mamba issue 798); the layers mark such parameters.
"""

import torch
from torch import nn
from transformers import Trainer

from switchmamba.hf.modeling import SwitchMambaBackbone, SwitchMambaModel


def undecayed_parameter_names(model: nn.Module) -> set[str]:
    """Return the names of a model's parameters that its layers exempt from weight decay."""
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, SwitchMambaModel):
            # Loading replaces parameters and their marks: those of a fresh model are asked.
            with torch.device("meta"):
                fresh = SwitchMambaBackbone(module.config.native)
            prefix = f"{path}.backbone." if path else "backbone."
            names |= {
                prefix + name
                for name, parameter in fresh.named_parameters()
                if getattr(parameter, "_no_weight_decay", False)
            }
    return names


class SwitchMambaTrainer(Trainer):
    """The Trainer; only ``weight_decay`` leaves out what the layers exempt."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that are decayed."""
        exempt = undecayed_parameter_names(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]
