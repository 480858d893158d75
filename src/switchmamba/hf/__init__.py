"""SwitchMamba in Hugging Face transformers: ``import switchmamba.hf`` registers the classes with the Auto classes.

    import switchmamba.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("exported")

Needs the extra ``hf``: ``pip install "switchmamba[hf]"``. The rest of the package never imports this.
"""

from switchmamba.extras import require

require("transformers", "hf", "switchmamba.hf")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from switchmamba.hf.cache import SwitchMambaCache
from switchmamba.hf.causal_lm import SwitchMambaForCausalLM
from switchmamba.hf.classification import SwitchMambaForSequenceClassification
from switchmamba.hf.configuration import SwitchMambaConfig
from switchmamba.hf.modeling import SwitchMambaModel

__all__ = [
    "SwitchMambaCache",
    "SwitchMambaConfig",
    "SwitchMambaForCausalLM",
    "SwitchMambaForSequenceClassification",
    "SwitchMambaModel",
]

AutoConfig.register(SwitchMambaConfig.model_type, SwitchMambaConfig, exist_ok=True)
AutoModel.register(SwitchMambaConfig, SwitchMambaModel, exist_ok=True)
AutoModelForCausalLM.register(SwitchMambaConfig, SwitchMambaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    SwitchMambaConfig, SwitchMambaForSequenceClassification, exist_ok=True
)
