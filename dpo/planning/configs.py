"""Models made of their configurations alone, whose weights are never read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dpo.models.loading import ModelLoader, adapter_base_model, attach_adapter, resolve_model_path


@dataclass(frozen=True)
class ConfigLoader(ModelLoader):
    """Makes models of their configurations alone.

    Attributes:
        configs: Configurations by path, of models that are not looked for.
    """

    configs: Mapping[str, PreTrainedConfig] = field(default_factory=dict)

    def load_model(self, path: str, **options: Any) -> PreTrainedModel:
        """Make a model of its configuration, with an adapter if the path is one.

        Args:
            path: Folder or hub id.
            options: Ignored: number formats are added up afterwards.

        Raises:
            ValueError: There is no such model.
        """
        path = resolve_model_path(path)
        if path not in self.configs and (base := adapter_base_model(path)) is not None:
            from peft import PeftConfig

            model = self.load_model(base)
            attach_adapter(model, PeftConfig.from_pretrained(path, inference_mode=False))
            return model
        config = self.configs.get(path) or read_model_config(self, path)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=self.trust_remote_code)
        return model.eval()  # type: ignore[no-any-return]


def read_model_config(loader: ModelLoader, path: str) -> PreTrainedConfig:
    """Read the configuration of a model.

    Raises:
        ValueError: There is none.
    """
    path = resolve_model_path(path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, **loader._options(path))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model.policy: expected a folder or hub id whose config.json can be read, got {path!r} ({reason}). A "
            "plan reads nothing else of a model; without a network, give a folder."
        ) from error
    return config
