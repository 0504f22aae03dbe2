"""What a request may hold. What is not named here is refused by its name.

Limits are in characters and numbers of things; tokens are counted where there is a tokenizer (`text`).
"""

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MESSAGES, ANSWERS, STOPS = 256, 64, 4
Words = Annotated[str, Field(min_length=1, max_length=400_000)]
Answer = Annotated[str, Field(max_length=400_000, pattern=r"\S")]
Stop = Annotated[str, Field(min_length=1, max_length=100)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Fault(Exception):
    """What the client is told in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        self.status, self.kind = status, kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": self.kind, "param": param, "code": code}}


class Strict(BaseModel):
    """Refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Message(Strict):
    """One turn; the models have learned no other roles."""

    role: Literal["user", "assistant"]
    content: Words
    name: None = None


class StreamOptions(Strict):
    """OpenAI's; obfuscation is a padding that we never add."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Generation(Strict, ABC):
    """What chat and completions share. Temperature 0 is greedy; without a seed every answer is drawn anew."""

    model: Annotated[str, Field(json_schema_extra={"enum": ["policy", "reference"]})]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    reward: bool = Field(default=False, description="Also give the answer's implicit reward: one forward a model.")
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    user: str | None = None

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """Most tokens of the answer; None is what the context leaves."""

    @property
    @abstractmethod
    def top(self) -> int | None:
        """Alternatives to tell of each token; None where no log-probs are asked for."""

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def usage_streamed(self) -> bool:
        """The stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        """`max_completion_tokens` is the newer name."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int | None:
        """None without `logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """`POST /v1/completions`: the prompt goes to the model as it is."""

    prompt: Words
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def limit(self) -> int:
        """OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int | None:
        """`logprobs` is their number."""
        return self.logprobs


class Question(Strict):
    """What is answered: one question or hh-rlhf dialogue as text, or messages."""

    prompt: Words | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)] | None = None

    @model_validator(mode="after")
    def _one(self) -> "Question":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self


class ScoreRequest(Question):
    """`POST /v1/score`."""

    answers: Annotated[list[Answer], Field(min_length=1, max_length=ANSWERS)]
    tokens: bool = False


class PairRequest(Question):
    """Two answers to one question."""

    chosen: Answer
    rejected: Answer


class CompareRequest(Strict):
    """`POST /v1/compare`."""

    pairs: Annotated[list[PairRequest], Field(min_length=1, max_length=ANSWERS)]
    tokens: bool = False
