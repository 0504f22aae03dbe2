"""Pydantic models of the request bodies, and the error that a client gets for an invalid one.

Fields that are not defined here are refused by name. Limits are in characters and items; `tokenization` checks the
number of tokens.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException

PromptText = Annotated[str, Field(min_length=1, max_length=400_000)]
AnswerText = Annotated[str, Field(max_length=400_000, pattern=r"\S")]
StopString = Annotated[str, Field(min_length=1, max_length=100)]
PositiveCount = Annotated[int, Field(ge=1)]
ZeroOnly = Annotated[float, Field(ge=0, le=0)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _single_item(value: Any) -> Any:
    """Unwrap a list of one prompt, which LangChain sends."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


UpToFourStops = Annotated[list[StopString], Field(max_length=4)]
StopStrings = Annotated[UpToFourStops, BeforeValidator(_as_list, json_schema_input_type=StopString | UpToFourStops)]


class APIError(HTTPException):
    """An error that the client is told about, in OpenAI's format.

    Args:
        status: HTTP status.
        message: What is wrong, for people.
        code: What is wrong, for programs.
        param: The field of the request that is at fault, if it is one.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        types = {401: "authentication_error", 429: "rate_limit_error"}
        error_type = types.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": error_type, "param": param, "code": code}}
        super().__init__(status, f"{code}: {message}", {"retry-after": "1"} if status in (429, 503) else None)


class StrictModel(BaseModel):
    """A model that refuses unknown fields, NaN, infinity and values of another type (such as "0.5" for a number)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown_nulls(cls, value: Any) -> Any:
        """Drop unknown fields that are null: clients send replies back with all their empty fields."""
        known = cls.model_fields
        return {k: v for k, v in value.items() if k in known or v is not None} if isinstance(value, dict) else value


class ChatMessage(StrictModel):
    """One message of a conversation; a system message must come first and needs a model trained with them."""

    role: Literal["system", "user", "assistant"]
    content: PromptText
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None  # old clients add an empty list to every reply

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, content: Any) -> Any:
        """Join content given as parts if all are text; otherwise leave it, to be refused as not a string."""
        parts = content if isinstance(content, list) else [None]
        text_parts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
        texts = [text for text in text_parts if isinstance(text, str)]
        return "".join(texts) if len(texts) == len(parts) else content


ChatMessages = Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]


class StreamOptions(StrictModel):
    """Options of a stream: `include_usage` adds a last chunk with the token counts."""

    include_usage: bool = False


class GenerationRequest(StrictModel):
    """The fields that both generation routes share.

    Temperature 0 is greedy decoding. Without a seed, every request is sampled anew.
    """

    model: Annotated[str, Field(json_schema_extra={"enum": ["policy", "reference"]})]
    max_tokens: PositiveCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    reward: bool = Field(
        default=False, description="Also return the answer's implicit reward, at the cost of a forward pass per model."
    )
    n: Literal[1] | None = None
    presence_penalty: ZeroOnly | None = None
    frequency_penalty: ZeroOnly | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: expected stream to be true")
        return self


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: ChatMessages
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected logprobs to be true")
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("expected max_tokens or max_completion_tokens, got both")
        return self


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`; the prompt goes to the model unchanged."""

    prompt: Annotated[PromptText, BeforeValidator(_single_item)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class PromptRequest(StrictModel):
    """What is to be answered: a question or an hh-rlhf dialogue as text, or messages."""

    prompt: PromptText | None = None
    messages: ChatMessages | None = None

    @model_validator(mode="after")
    def _check_exactly_one(self) -> "PromptRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected exactly one of prompt and messages")
        return self


class ScoreRequest(PromptRequest):
    """The body of `POST /v1/score`."""

    answers: Annotated[list[AnswerText], Field(min_length=1, max_length=64)]
    tokens: bool = False


class AnswerPair(PromptRequest):
    """Two answers to one prompt."""

    chosen: AnswerText
    rejected: AnswerText


class CompareRequest(StrictModel):
    """The body of `POST /v1/compare`."""

    pairs: Annotated[list[AnswerPair], Field(min_length=1, max_length=64)]
    tokens: bool = False
