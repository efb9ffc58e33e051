"""What Chat Completions and Completions have in common: how to sample, how much, and how it is sent."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ossia.responses.schema import Json, Number

_MAX_CHOICES = 16

# Fields that change nothing here, and harm nothing: they are taken without a word.
HINTS = frozenset(
    {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier", "prediction"}
)

# As a text, since it is the key of an object.
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Stops = str | Annotated[list[str], Field(max_length=16)] | None


class StreamOptions(BaseModel):
    """How chunks are sent."""

    model_config = ConfigDict(extra="allow")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(BaseModel):
    """What Chat Completions and Completions share."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=_MAX_CHOICES)
    stop: Stops = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    # As other servers have them.
    top_k: int | None = Field(default=None, ge=-1)
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None

    @field_validator("stop")
    @classmethod
    def _whole_characters(cls, stop: Stops) -> Stops:
        for text in [stop] if isinstance(stop, str) else stop or ():
            if any(0xD800 <= ord(one) <= 0xDFFF for one in text):
                raise ValueError("a text with half a character, which no answer holds")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    def sampling(self, choice: int) -> Json:
        """Fields of SamplingParams that were given; every choice draws its own."""
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        fields = {
            "seed": None if self.seed is None else (self.seed + choice) % 2**63,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": bias or None,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
        }
        return {name: value for name, value in fields.items() if value is not None}
