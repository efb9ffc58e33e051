"""Tokens in, tokens out: the inference engine over any backend's operations.

engine = Engine(Runner(ops, config, weights, EngineConfig()))
LLM(engine).generate(prompts, SamplingParams(max_tokens=64))        many prompts, offline
AsyncEngine(engine).generate(prompt, params)                        an async iterator for each of many callers
"""

from ossia.engine.config import EngineConfig
from ossia.engine.engine import AsyncEngine, Engine, EngineStats
from ossia.engine.llm import LLM, Completion
from ossia.engine.request import NO_TOKEN, Constraint, FinishReason, SamplingParams, Scored, TokenOutput
from ossia.engine.runner import Runner
from ossia.engine.scheduler import Totals
from ossia.engine.stops import Stop

__all__ = [
    "LLM",
    "NO_TOKEN",
    "AsyncEngine",
    "Completion",
    "Constraint",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "Runner",
    "SamplingParams",
    "Scored",
    "Stop",
    "TokenOutput",
    "Totals",
]
