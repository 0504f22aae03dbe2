"""Use of a policy in Python: answers to prompts, and a folder that transformers loads."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dpo.data.datamodule import TextData
from dpo.data.prompts import Prompt, encode_prompt
from dpo.data.tokenization import PairEncoder
from dpo.models.generation import GeneratedAnswer, Sampling, generate_answers
from dpo.models.loading import ModelLoader, context_length, read_end_ids
from dpo.models.lora import Adapter
from dpo.models.origin import PolicyOrigin, save_policy, trained_format
from dpo.models.sharding import gather_model
from dpo.training.checkpointing import CheckpointedModule

DEFAULT_CONTEXT = 4096  # tokens, of models that name no limit


class PolicyModule(CheckpointedModule):
    """A module around a policy, which it reads on first use.

    Attributes:
        policy: The model; available from `configure_model` on.
        policy_path: Where it is read from.
        adapter: Which of its weights train.
        loader: How models are read.
    """

    policy: PreTrainedModel
    policy_path: str
    adapter: Adapter
    loader: ModelLoader
    _encoder: PairEncoder | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the format of the text that the policy is trained on, for whoever generates from the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, TextData):
            checkpoint["text_format"] = data.encoder.format

    @abstractmethod
    def models_by_role(self) -> dict[str, PreTrainedModel]:
        """Return every model in memory by its role, ``policy`` or ``reference``."""

    @abstractmethod
    def origin(self) -> PolicyOrigin:
        """Say how the policy came about, for whoever serves its export."""

    @property
    def encoder(self) -> PairEncoder:
        """What turns dialogues into tokens: that of the trainer's data, or one made for the policy."""
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, TextData):
            self._encoder = data.encoder
        elif self._encoder is None:
            tokenizer = self.loader.load_tokenizer(self.policy_path)
            format = self.text_format or trained_format(self.policy_path)
            length = context_length(self.policy) or DEFAULT_CONTEXT
            self._encoder = PairEncoder(tokenizer, length, format, read_end_ids(self.policy_path))
        return self._encoder

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        reference: bool = False,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Answer prompts with the policy, or with its reference.

        Args:
            prompts: Questions or dialogues as text, or lists of messages with ``role`` and ``content``.
            reference: Answer with the reference instead of the policy.
            max_new_tokens: Longest answer.
            temperature: Divides the logits; 0 takes the most probable token.
            top_p: Sample only from the most probable tokens that together have this probability.
            seed: Of the samples.

        Returns:
            One answer for every prompt.

        Raises:
            TypeError: A single string was given instead of a list.
            ValueError: A prompt cannot be used, or there is no reference in memory.
        """
        if isinstance(prompts, str):
            raise TypeError(f"generate: expected a list of prompts, got the text {prompts!r}: put it in a list.")
        self.configure_model()
        role = "reference" if reference else "policy"
        if role not in self.models_by_role():
            raise ValueError(f"generate: {type(self).__name__} has no {role} model in memory.")
        tokens = [encode_prompt(self.encoder, prompt) for prompt in prompts]
        answers = self.generate_from_tokens(tokens, role, max_new_tokens, temperature, top_p, seed)
        return [answer.text for answer in answers]

    def generate_from_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        role: str = "policy",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[GeneratedAnswer]:
        """Answer prompts that are token ids, with the model of a role; see `generate`."""
        model = self.models_by_role()[role]
        sampling = Sampling(answers=1, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
        return [answer for (answer,) in generate_answers(model, self.encoder, prompts, sampling, seed)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write policy and tokenizer as a Hugging Face folder; of a policy with an adapter, as the adapter says.

        Args:
            folder: Where to. Other files that are there stay.
        """
        self.configure_model()
        save_policy(
            folder, self.adapter.model_to_export(gather_model(self.policy)), self.encoder.tokenizer, self.origin()
        )
