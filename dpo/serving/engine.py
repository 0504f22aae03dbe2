"""One model that answers many requests at a time (continuous batching), and scores answers as training does.

Takes token ids and a `Draw`, gives the tokens as they come; takes a batch, gives the log-probs of its tokens. Knows no
text. The batching thread is `transformers`' own.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, TopPLogitsWarper
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import GenerationOutput

from dpo.models.batch import Batch
from dpo.models.prompt_sharing import share_if_exact, weight_sharing_copy
from dpo.models.scoring import score
from dpo.serving.schema import APIError

CACHE_PAGE_TOKENS = 32  # tokens in a block of the cache
MAX_CACHE_BYTES = 4 * 2**30
MAX_BATCH_TOKENS = 512  # in one forward: longer prompts are read in pieces, between which the others go on
GREEDY_TEMPERATURE = 1e-3  # dividing by less than this overflows, and a draw would be the most probable token anyway


@dataclass
class TokenSampler:
    """How one request draws its tokens, and what it remembers of them.

    Adding Gumbel noise to log-probs and taking the largest is a draw from them. The noise depends on seed and position
    alone, so the same request gives the same answer whoever else is in the batch.

    Attributes:
        top_logprobs: How many of the most probable tokens to remember; None: nothing.
        logprobs: Of every drawn token, if asked for: its true log-prob in nats, before temperature and top-p, and the
            most probable tokens with theirs.
    """

    temperature: float
    top_p: float
    seed: int
    top_logprobs: int | None
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenSampler":
        return self  # a request that had to leave the cache comes back with the same draw

    def __call__(self, logits: Float[Tensor, " vocab"], position: int) -> Float[Tensor, " vocab"]:
        """Scores whose argmax is the token at `position`."""
        scores = logits if self.temperature < GREEDY_TEMPERATURE else self._perturbed(logits, position)
        if self.top_logprobs is not None:
            logps = logits.log_softmax(-1)
            top, tokens = logps.topk(self.top_logprobs)
            alternatives = list(zip(tokens.tolist(), top.tolist(), strict=True))
            self.logprobs.append((logps[scores.argmax()].item(), alternatives))
        return scores

    def _perturbed(self, logits: Tensor, position: int) -> Tensor:
        scores = logits / self.temperature
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores[None])[0]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + position) % 2**63)
        noise = torch.empty(scores.shape).exponential_(generator=generator)
        return scores - noise.log_().to(scores.device)


class BatchLogitsProcessor(ContinuousBatchingLogitsProcessorList):
    """Calls the `Draw` of every request."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing, self.supported_keys = True, {"draw": TokenSampler}

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Note whose logits the rows will be."""
        self.states = [request.state for request in requests_in_batch if request.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """One row of scores for every request."""
        for row, state in enumerate(self.states):
            position = len(state.initial_tokens) + len(state.generated_tokens)
            scores[row] = state.logit_processor_kwargs["draw"](scores[row], position)
        return scores


class GenerationEngine:
    """A model and its batching thread.

    Scores come from a twin around the same weights, so that neither thread sees what the other sets on its model during
    a forward (or it would lose its causal mask), and no stream waits for a score.

    Args:
        slots: Requests at a time. Half of their contexts fit into the cache, as far as `CACHE_BYTES` reach; when it is
            full some requests leave it, and come back with what they have said.
        context: Most tokens of prompt and answer.
    """

    def __init__(self, model: PreTrainedModel, slots: int, context: int) -> None:
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
        tokens = max(2 * context, min(slots * context // 2, MAX_CACHE_BYTES // token_bytes))  # few use all of theirs
        sizes = {
            "page_size": CACHE_PAGE_TOKENS,
            "num_blocks": -(-tokens // CACHE_PAGE_TOKENS),
            "max_batch_tokens": max(MAX_BATCH_TOKENS, slots),
        }
        off: Any = dict.fromkeys(("auto_switch_to_flash", "use_cuda_graph", "use_async_batching"), False)
        self.batching_config = ContinuousBatchingConfig(**sizes, **off)
        self.model: Any = model  # its continuous batching is declared for a private type
        self.scoring_model = weight_sharing_copy(model)
        share_if_exact(self.scoring_model)
        self.result_queues: dict[str, asyncio.Queue[GenerationOutput | None]] = {}

    def start_batching(self) -> None:
        """Start a batching thread; after a death, a new one."""
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)
        self.manager: ContinuousBatchingManager = self.model.init_continuous_batching(generation, self.batching_config)
        self.manager.logit_processor = BatchLogitsProcessor()
        self.manager.start()

    def abort_requests(self) -> None:
        """Tell everyone who waits that no more will come."""
        for queue in self.result_queues.values():
            queue.put_nowait(None)

    @property
    def is_alive(self) -> bool:
        """The batching thread runs and takes requests."""
        return self.manager.is_running() and not self.manager.background_thread_status.can_accept_new_requests()

    @property
    def cache_usage(self) -> float:
        """Share of the cache that holds tokens."""
        processor = self.manager.batch_processor
        return 0.0 if processor is None else 1 - processor.cache.compute_free_capacity()

    @torch.no_grad()
    def score_batch(self, batch: Batch) -> list[list[float]]:
        """Log-prob of each token of every answer, nats; for one thread at a time."""
        logps = score(self.scoring_model, batch.to(self.scoring_model.device)).logps.cpu()
        return [answer.tolist() for answer in logps.split(batch.lengths)]

    async def generate(
        self, prompt: Sequence[int], token_sampler: TokenSampler, max_tokens: int, end_ids: Sequence[int]
    ) -> AsyncGenerator[list[int]]:
        """All tokens so far, again and again until one of `ends` or `limit` tokens; leaving early cancels the rest."""
        manager, name, finished = self.manager, uuid4().hex, False
        queue = self.result_queues[name] = asyncio.Queue()
        manager.register_result_handler(name, queue.put_nowait)
        try:
            taken = manager.add_request(
                list(prompt), name, max_tokens, streaming=True, eos_token_id=list(end_ids), draw=token_sampler
            )
            while taken and not finished:
                output = await queue.get()
                while not queue.empty() and output is not None:
                    output = queue.get_nowait()
                if output is None or output.error:
                    break
                finished = output.is_finished()
                yield output.generated_tokens
            if not finished:
                raise APIError(503, "the model does not answer at the moment", "unavailable")
        finally:
            del self.result_queues[name]
            if not finished:
                manager.cancel_request(name)
                manager.output_router.result_handlers.pop(name, None)
            manager.output_router.output_queue.queue.clear()  # what came for requests that have left
