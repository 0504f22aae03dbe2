"""Batched generation for many requests at a time (continuous batching), and scoring that matches training.

The engine works on token ids only. The thread that builds and runs the batches is that of `transformers`.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from uuid import uuid4

import psutil
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, TopPLogitsWarper
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import GenerationOutput

from dpo.models.batch import Batch
from dpo.models.generation import derive_seed
from dpo.models.prompt_sharing import share_if_exact, weight_sharing_copy
from dpo.models.scoring import score, score_alternatives
from dpo.serving.schema import APIError

CACHE_PAGE_TOKENS = 32  # tokens per page of the key-value cache
MIN_CPU_CACHE_BYTES = 2**28
MAX_BATCH_TOKENS = 512  # per forward pass; longer prompts are read in chunks, so other requests keep going in between
GREEDY_TEMPERATURE = 1e-3  # below this, dividing logits could overflow, and sampling equals greedy decoding anyway

TokenLogprob = tuple[float, list[tuple[int, float]]]
"""Log-probability of a token in nats, and ids and log-probabilities of the most probable tokens in its place."""


@dataclass
class TokenSampler:
    """The sampling settings of one request, and the log-probabilities of its tokens.

    A token is sampled by adding Gumbel noise to the scores and taking the argmax. The noise depends only on the seed
    and the token's position, so a request gets the same answer whatever else is in the batch.

    Attributes:
        temperature: Divides the logits; below `GREEDY_TEMPERATURE` decoding is greedy.
        top_p: Probability mass of the nucleus to sample from.
        seed: Seed of the noise.
        top_logprobs: How many of the most probable tokens to record per position; None records nothing.
        logprobs: Per generated token: its log-probability under the model in nats, before temperature and top-p, and
            the ids and log-probabilities of the most probable tokens.
    """

    temperature: float
    top_p: float
    seed: int
    top_logprobs: int | None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenSampler":
        return self  # transformers copies a request that it evicts from the cache; it must keep recording here

    def __call__(self, logits: Float[Tensor, " vocab"], position: int) -> Float[Tensor, " vocab"]:
        """Return scores whose argmax is the token to generate at `position`."""
        scores = logits if self.temperature < GREEDY_TEMPERATURE else self._perturb(logits, position)
        if self.top_logprobs is not None:
            logps = logits.log_softmax(-1)
            top, tokens = logps.topk(self.top_logprobs)
            alternatives = list(zip(tokens.tolist(), top.tolist(), strict=True))
            self.logprobs.append((logps[scores.argmax()].item(), alternatives))
        return scores

    def _perturb(self, logits: Tensor, position: int) -> Tensor:
        scores = logits / self.temperature
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores[None])[0]
        # On the device: no copy to it and no wait for it. A generator of its own keeps the row independent of others.
        generator = torch.Generator(scores.device).manual_seed(derive_seed(self.seed, position))
        return scores - torch.empty_like(scores).exponential_(generator=generator).log_()


class BatchLogitsProcessor(ContinuousBatchingLogitsProcessorList):
    """The logits processor that applies the `TokenSampler` of every request in a batch."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.supported_keys = {"token_sampler": TokenSampler}

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Remember which request each row of logits will belong to."""
        self.states = [request.state for request in requests_in_batch if request.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Replace each row of logits by the scores of its request's sampler."""
        for row, state in enumerate(self.states):
            position = len(state.initial_tokens) + len(state.generated_tokens)
            scores[row] = state.logit_processor_kwargs["token_sampler"](scores[row], position)
        return scores


def default_cache_bytes(model: PreTrainedModel) -> int:
    """Return how much memory the cache of one of two served models may take.

    On CUDA it is a third of what is free, and the last third is left to activations. Main memory is shared with all
    else: there it is as much as the weights take (at least 256 MiB), but at most an eighth of what is available.
    """
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0] // 3)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return int(min(max(weights, MIN_CPU_CACHE_BYTES), psutil.virtual_memory().available // 8))


class GenerationEngine:
    """A model with its batching thread, and a copy of it for scoring.

    The scoring copy shares the weights. `transformers` changes attributes of a model during its forward pass, so two
    threads on one model would lose the causal mask; with the copy, scoring also never delays a stream.

    Args:
        model: The model to serve.
        slots: Maximum number of concurrent requests. The cache holds half of the context of each, as far as
            `cache_bytes` allow; when it is full, requests are evicted and later resume with the tokens they have.
        context: Maximum tokens of prompt and answer together.
        cache_bytes: Memory for the cache. It always holds two contexts, so that every request can be answered.

    Attributes:
        cache_tokens: Tokens that the cache holds.
        cache_bytes: Memory that it takes.
        result_queues: Per running request, the outputs that it has not read yet; None means that no more will come.
    """

    def __init__(self, model: PreTrainedModel, slots: int, context: int, cache_bytes: int) -> None:
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * head_size * model.dtype.itemsize
        # Half the context per slot, as few requests use all of theirs.
        self.cache_tokens = max(2 * context, min(slots * context // 2, cache_bytes // token_bytes))
        self.cache_bytes = self.cache_tokens * token_bytes
        self.batching_config = ContinuousBatchingConfig(
            page_size=CACHE_PAGE_TOKENS,
            num_blocks=-(-self.cache_tokens // CACHE_PAGE_TOKENS),
            max_batch_tokens=max(MAX_BATCH_TOKENS, slots),
            auto_switch_to_flash=False,
            use_cuda_graph=False,
            use_async_batching=False,
        )
        self.model: Any = model  # transformers declares continuous batching for a private type
        self.scoring_model = weight_sharing_copy(model)
        share_if_exact(self.scoring_model)
        self.result_queues: dict[str, asyncio.Queue[GenerationOutput | None]] = {}

    def start_batching(self) -> None:
        """Start a new batching thread, also after the previous one has died."""
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)
        self.manager: ContinuousBatchingManager = self.model.init_continuous_batching(generation, self.batching_config)
        self.manager.logit_processor = BatchLogitsProcessor()
        self.manager.start()

    def abort_requests(self) -> None:
        """End every running request with an error."""
        for queue in self.result_queues.values():
            queue.put_nowait(None)

    @property
    def is_alive(self) -> bool:
        """Whether the batching thread runs and accepts requests."""
        # Despite its name, can_accept_new_requests returns the reason why not, or None.
        return self.manager.is_running() and not self.manager.background_thread_status.can_accept_new_requests()

    @property
    def cache_usage(self) -> float:
        """Fraction of the cache in use."""
        processor = self.manager.batch_processor
        return 0.0 if processor is None else 1 - processor.cache.compute_free_capacity()

    @torch.no_grad()
    def score_batch(self, batch: Batch) -> list[list[float]]:
        """Return the log-probability of each token of every answer, in nats. Call it from one thread at a time."""
        logps = score(self.scoring_model, batch.to(self.scoring_model.device)).logps.cpu()
        return [answer.tolist() for answer in logps.split(batch.lengths)]

    def score_alternatives(self, batch: Batch, count: int) -> list[list[TokenLogprob]]:
        """Return the log-probabilities of each token of every answer, with `count` alternatives; as `score_batch`."""
        logps, tokens = score_alternatives(self.scoring_model, batch.to(self.scoring_model.device), count)
        rows = zip(logps.tolist(), tokens[:, 1:].tolist(), strict=True)
        scored = iter([(first, list(zip(top, others, strict=True))) for (first, *others), top in rows])
        return [list(islice(scored, length)) for length in batch.lengths]

    async def generate(
        self, prompt: Sequence[int], token_sampler: TokenSampler, max_tokens: int, end_ids: Sequence[int]
    ) -> AsyncGenerator[list[int]]:
        """Generate an answer; closing the generator early cancels the request.

        Args:
            prompt: Token ids of the prompt.
            token_sampler: How to choose the tokens.
            max_tokens: Maximum tokens of the answer.
            end_ids: Token ids that end the answer; the one that does is part of it.

        Yields:
            All tokens of the answer so far, whenever there are more.

        Raises:
            APIError: The batching thread has died or was told to stop.
        """
        manager = self.manager
        request_id = uuid4().hex
        finished = False
        queue = self.result_queues[request_id] = asyncio.Queue()
        manager.register_result_handler(request_id, queue.put_nowait)
        try:
            accepted = manager.add_request(
                [*prompt], request_id, max_tokens, streaming=True, eos_token_id=[*end_ids], token_sampler=token_sampler
            )
            while accepted and not finished:
                output = await queue.get()
                while not queue.empty() and output is not None:  # each output holds all tokens, so skip to the newest
                    output = queue.get_nowait()
                if output is None or output.error:
                    break
                finished = output.is_finished()
                yield output.generated_tokens
            if not finished:
                raise APIError(503, "the model stopped answering: try again", "unavailable")
        finally:
            del self.result_queues[request_id]
            if not finished:
                manager.cancel_request(request_id)
                manager.output_router.result_handlers.pop(request_id, None)
            manager.output_router.output_queue.queue.clear()  # outputs of cancelled requests, which nobody reads
