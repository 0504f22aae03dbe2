"""Direct Preference Optimization in PyTorch Lightning.

    import lightning as L
    from dpo import DPO, HHRLHF, losses

    data = HHRLHF("Anthropic/hh-rlhf", subsets=["harmless-base"], batch_size=16)
    model = DPO("HuggingFaceTB/SmolLM2-135M", loss=losses.DPO(beta=0.1))
    L.Trainer(max_steps=100, gradient_clip_val=1.0).fit(model, data)

Everything named here is loaded on first use, so that ``import dpo`` itself is quick. `docs/design.md` has the map of
the code.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo import losses as losses
    from dpo.data.columns import Columns as Columns
    from dpo.data.preferences import HHRLHF as HHRLHF
    from dpo.data.preferences import Part as Part
    from dpo.data.preferences import PreferencePairs as PreferencePairs
    from dpo.data.prompts import Prompts as Prompts
    from dpo.models.batch import Example as Example
    from dpo.models.generation import Sampling as Sampling
    from dpo.models.lora import AsLoaded as AsLoaded
    from dpo.models.lora import LoRA as LoRA
    from dpo.models.lora import QLoRA as QLoRA
    from dpo.models.reference import AdapterOff as AdapterOff
    from dpo.models.reference import Copy as Copy
    from dpo.models.reference import Model as Model
    from dpo.models.reference import Moving as Moving
    from dpo.models.reference import Nothing as Nothing
    from dpo.models.reference import Reference as Reference
    from dpo.training.dpo import DPO as DPO
    from dpo.training.precomputed import Cached as Cached
    from dpo.training.schedules import Warmup as Warmup
    from dpo.training.sft import SFT as SFT

__version__ = "0.1.0"

_MODULE_OF = {
    "AdapterOff": "dpo.models.reference",
    "AsLoaded": "dpo.models.lora",
    "Cached": "dpo.training.precomputed",
    "Columns": "dpo.data.columns",
    "Copy": "dpo.models.reference",
    "DPO": "dpo.training.dpo",
    "Example": "dpo.models.batch",
    "HHRLHF": "dpo.data.preferences",
    "LoRA": "dpo.models.lora",
    "Model": "dpo.models.reference",
    "Moving": "dpo.models.reference",
    "Nothing": "dpo.models.reference",
    "Part": "dpo.data.preferences",
    "PreferencePairs": "dpo.data.preferences",
    "Prompts": "dpo.data.prompts",
    "QLoRA": "dpo.models.lora",
    "Reference": "dpo.models.reference",
    "SFT": "dpo.training.sft",
    "Sampling": "dpo.models.generation",
    "Warmup": "dpo.training.schedules",
}
__all__ = sorted([*_MODULE_OF, "losses"])


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    if name == "losses":
        return import_module("dpo.losses")
    raise AttributeError(f"module 'dpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
