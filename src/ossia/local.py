"""A checkpoint opened for use from Python: messages in, deltas out.

    model = ossia.load("gpt-oss-20b")
    for delta in model.generate("Why is the sky blue?", effort="low"):
        print(delta.text, end="")
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ossia import ops as backends
from ossia.config import Config
from ossia.engine import Engine, EngineConfig, SamplingParams
from ossia.errors import InputError
from ossia.harmony import (
    Conversation,
    Delta,
    DeveloperContent,
    Effort,
    Message,
    StreamParser,
    SystemContent,
    Tokenizer,
    ToolDescription,
    ToolNamespace,
    render_for_completion,
)
from ossia.model.hub import resolve_model
from ossia.model.weights import Checkpoint, load_weights
