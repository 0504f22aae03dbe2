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
FinishReason = Literal["stop", "length"]
MAX_CHOICES = 128  # answers to one request: prompts times `n`
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=400_000)]
ZeroOnly = Annotated[float, Field(ge=0, le=0)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """Return a list of prompts, each a text or token ids; one prompt may come without the list around it."""
    is_one = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
    return [value] if is_one else value


# OpenAI allows four; the tasks of evaluation harnesses have more.
UpToSixteenStops = Annotated[list[StopString], Field(max_length=16)]
StopStrings = Annotated[
    UpToSixteenStops, BeforeValidator(_as_list, json_schema_input_type=StopString | UpToSixteenStops)
]
RawPrompt = PromptText | TokenIds
RawPrompts = Annotated[list[RawPrompt], Field(min_length=1, max_length=MAX_CHOICES)]


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
    # AutoGen names every speaker. Names are accepted and left out of the prompt: the training data have none, so a
    # model that was shown one would be asked what it was never trained on.
    name: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["text", "message"] | None = None  # lm-eval and OpenAI's newer clients say what kind of item this is

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
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: ZeroOnly | None = None
    frequency_penalty: ZeroOnly | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: expected stream to be true")
        if self.stream and self.n not in (None, 1):
            raise ValueError("n: a stream has one answer: expected n to be 1, or stream to be false")
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
    """The body of `POST /v1/completions`; prompts, as text or token ids, go to the model unchanged.

    With `echo`, a choice repeats its prompt, also in its log-probabilities; `max_tokens` 0 then generates nothing.
    """

    prompt: Annotated[RawPrompts, BeforeValidator(_as_prompts, json_schema_input_type=RawPrompt | RawPrompts)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_choices(self) -> "CompletionRequest":
        choices = len(self.prompt) * (self.n or 1)
        if choices > MAX_CHOICES:
            raise ValueError(f"n: expected at most {MAX_CHOICES} answers (prompts x n) a request, got {choices}")
        if self.stream and (choices > 1 or self.echo):
            raise ValueError("stream: expected one prompt and no echo in a stream")
        if self.max_tokens == 0 and not (self.echo and not self.reward):
            raise ValueError("max_tokens: expected at least 1 without echo or with reward, got 0")
        return self


class PromptRequest(StrictModel):
    """What is to be answered: a question or an hh-rlhf dialogue as text, or messages."""

    prompt: PromptText | None = None
    messages: ChatMessages | None = None

    @model_validator(mode="after")
    def _check_exactly_one(self) -> "PromptRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected exactly one of prompt and messages")
        return self


class TokenizeRequest(PromptRequest):
    """The body of `POST /tokenize`, as in vLLM: a text as it is, or messages in the format of the training."""

    model: str | None = None
    add_special_tokens: bool | None = Field(default=None, description="Of a text; true unless given.")

    @model_validator(mode="after")
    def _check_special_tokens(self) -> "TokenizeRequest":
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens: expected a prompt; messages get those of the training")
        return self


class DetokenizeRequest(StrictModel):
    """The body of `POST /detokenize`, as in vLLM."""

    model: str | None = None
    tokens: TokenIds


class AnswersRequest(PromptRequest):
    """A prompt with answers that are given as text.

    An answer that ended for the reason `length` was cut, and is scored without the end token that it never had.
    """

    finish_reasons: list[FinishReason] | None = Field(
        default=None, description="Why each answer ended, as its reply said; stop unless given."
    )

    @property
    def texts(self) -> list[str]:
        """The answers as given, in order."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_finish_reasons(self) -> "AnswersRequest":
        if self.finish_reasons is not None and len(self.finish_reasons) != len(self.texts):
            got = f"{len(self.finish_reasons)} for {len(self.texts)}"
            raise ValueError(f"finish_reasons: expected one for every answer, got {got}")
        return self


class ScoreRequest(AnswersRequest):
    """The body of `POST /v1/score`."""

    answers: Annotated[list[AnswerText], Field(min_length=1, max_length=64)]
    tokens: bool = False

    @property
    def texts(self) -> list[str]:
        """The answers as given, in order."""
        return self.answers


class AnswerPair(AnswersRequest):
    """Two answers to one prompt; `finish_reasons` first has that of the chosen one."""

    chosen: AnswerText
    rejected: AnswerText

    @property
    def texts(self) -> list[str]:
        """The chosen and the rejected answer."""
        return [self.chosen, self.rejected]


class CompareRequest(StrictModel):
    """The body of `POST /v1/compare`."""

    pairs: Annotated[list[AnswerPair], Field(min_length=1, max_length=64)]
    tokens: bool = False
