"""One model that answers many requests at a time (continuous batching).

Takes token ids and a `Draw`, gives the tokens as they come. Knows no text and no HTTP. The batching thread is
`transformers`' own; it delivers through a `Router` into the event loop.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

from dpo.serving.sampling import Draw, Sampler

PAGE = 32  # tokens in a block of the cache
CACHE_BYTES = 4 * 2**30
BATCH_TOKENS = 512  # in one forward: longer prompts are read in pieces, between which the others go on


class Unavailable(RuntimeError):
    """The engine does not answer: it died, or the server stops."""


class Router(OutputRouter):
    """Hands what the batching thread made to whoever waits for it; what nobody waits for is dropped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.loop = loop
        self.waiting: dict[str, asyncio.Queue[GenerationOutput | None]] = {}

    def deliver(self, output: GenerationOutput) -> None:
        """From the batching thread: one output."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """From the batching thread: the outputs of one step."""
        with suppress(RuntimeError):  # the event loop has ended
            self.loop.call_soon_threadsafe(self._hand_over, outputs)

    def _hand_over(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            if output.request_id in self.waiting:
                self.waiting[output.request_id].put_nowait(output)


class Engine:
    """A model and its batching thread.

    Args:
        model: Used by the batching thread alone: a forward from another thread would lose its causal mask.
        slots: Requests at a time. Half of their contexts fit into the cache, as far as `CACHE_BYTES` reach; when it is
            full some requests leave it, and come back with what they have said.
        context: Most tokens of prompt and answer.
    """

    def __init__(self, model: PreTrainedModel, slots: int, context: int) -> None:
        self.model = model
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
        tokens = max(2 * context, min(slots * context // 2, CACHE_BYTES // token_bytes))  # few use all of theirs
        self.batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=-(-tokens // PAGE),
            max_batch_tokens=max(BATCH_TOKENS, slots),
            auto_switch_to_flash=False,
            use_cuda_graph=False,
            use_async_batching=False,
        )
        self.numbers = itertools.count()

    def start(self) -> None:
        """Start a batching thread, inside the event loop; after a death, a new one."""
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)
        self.manager: ContinuousBatchingManager = self.model.init_continuous_batching(  # type: ignore[operator]
            generation, self.batching
        )
        self.router = self.manager.output_router = Router(asyncio.get_running_loop())
        self.manager.logit_processor = Sampler()
        self.manager.start()

    def stop(self) -> None:
        """End the batching thread; who still waits is told."""
        self.abort()
        self.manager.stop(block=True, timeout=2, hard_stop=True)

    def abort(self) -> None:
        """Tell everyone who waits that no more will come."""
        for queue in self.router.waiting.values():
            queue.put_nowait(None)

    @property
    def alive(self) -> bool:
        """The batching thread runs and takes requests."""
        return self.manager.is_running() and not self.manager.background_thread_status.can_accept_new_requests()

    @property
    def active(self) -> int:
        """Requests that wait for tokens."""
        return len(self.router.waiting)

    @property
    def cache_used(self) -> float:
        """Share of the cache that holds tokens."""
        processor = self.manager.batch_processor
        return 0.0 if processor is None else 1 - processor.cache.compute_free_capacity()

    async def generate(
        self, prompt: Sequence[int], draw: Draw, limit: int, ends: Sequence[int]
    ) -> AsyncGenerator[list[int]]:
        """All tokens so far, again and again until one of `ends` or `limit` tokens; leaving early cancels the rest.

        Raises:
            Unavailable: No (more) tokens will come.
        """
        name, finished = str(next(self.numbers)), False
        queue = self.router.waiting[name] = asyncio.Queue()
        router, manager = self.router, self.manager
        try:
            taken = self.alive and manager.add_request(
                list(prompt), name, limit, streaming=True, eos_token_id=list(ends), draw=draw
            )
            while taken:
                output = await queue.get()
                while not queue.empty() and output is not None:
                    output = queue.get_nowait()
                if output is None or output.error:
                    break
                finished = output.is_finished()
                yield output.generated_tokens
                if finished:
                    return
            raise Unavailable("the model does not answer at the moment")
        finally:
            del router.waiting[name]
            if not finished:
                manager.cancel_request(name)
