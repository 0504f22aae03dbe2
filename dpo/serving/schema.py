"""What a request may hold, and what is answered where it is not so. What is not named here is refused by its name.

Limits are in characters and numbers of things; tokens are counted where there is a tokenizer (`text`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException

PromptText = Annotated[str, Field(min_length=1, max_length=400_000)]
AnswerText = Annotated[str, Field(max_length=400_000, pattern=r"\S")]
StopString = Annotated[str, Field(min_length=1, max_length=100)]
PositiveCount = Annotated[int, Field(ge=1)]
ZeroOnly = Annotated[float, Field(ge=0, le=0)]


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


def _alone(given: Any) -> Any:
    """LangChain sends its one prompt in a list."""
    return given[0] if isinstance(given, list) and len(given) == 1 else given


UpToFourStops = Annotated[list[StopString], Field(max_length=4)]
StopStrings = Annotated[UpToFourStops, BeforeValidator(_listed, json_schema_input_type=StopString | UpToFourStops)]


class APIError(HTTPException):
    """What the client is told, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        super().__init__(status, f"{code}: {message}", {"retry-after": "1"} if status in (429, 503) else None)


class StrictModel(BaseModel):
    """Refuses unknown fields, NaN, infinity, and what would have to be converted ("0.5", a number for a truth)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, given: Any) -> Any:
        """An unknown field that is null asks for nothing: clients send our replies back with all that was in them."""
        known = cls.model_fields
        return {k: v for k, v in given.items() if k in known or v is not None} if isinstance(given, dict) else given


class ChatMessage(StrictModel):
    """One turn. A system message comes first, where the model has learned any."""

    role: Literal["system", "user", "assistant"]
    content: PromptText
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None  # old clients put it into every reply

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        """Parts of text are one text; of parts of another kind it is said that they are none."""
        parts = content if isinstance(content, list) else [None]
        texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
        said = [text for text in texts if isinstance(text, str)]
        return "".join(said) if len(said) == len(parts) else content


ChatMessages = Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]


class StreamOptions(StrictModel):
    """OpenAI's."""

    include_usage: bool = False


class GenerationRequest(StrictModel):
    """What chat and completions share. Temperature 0 is greedy; without a seed every answer is drawn anew."""

    model: Annotated[str, Field(json_schema_extra={"enum": ["policy", "reference"]})]
    max_tokens: PositiveCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    reward: bool = Field(default=False, description="Also give the answer's implicit reward: one forward a model.")
    n: Literal[1] | None = None
    presence_penalty: ZeroOnly | None = None
    frequency_penalty: ZeroOnly | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _streamed(self) -> "GenerationRequest":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: expected stream to be true")
        return self


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: ChatMessages
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _agreeing(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected logprobs to be true")
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_completion_tokens: expected it or max_tokens, got both")
        return self


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`: the prompt goes to the model as it is."""

    prompt: Annotated[PromptText, BeforeValidator(_alone)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class PromptRequest(StrictModel):
    """What is answered: one question or hh-rlhf dialogue as text, or messages."""

    prompt: PromptText | None = None
    messages: ChatMessages | None = None

    @model_validator(mode="after")
    def _one(self) -> "PromptRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self


class ScoreRequest(PromptRequest):
    """`POST /v1/score`."""

    answers: Annotated[list[AnswerText], Field(min_length=1, max_length=64)]
    tokens: bool = False


class AnswerPair(PromptRequest):
    """Two answers to one question."""

    chosen: AnswerText
    rejected: AnswerText


class CompareRequest(StrictModel):
    """`POST /v1/compare`."""

    pairs: Annotated[list[AnswerPair], Field(min_length=1, max_length=64)]
    tokens: bool = False
