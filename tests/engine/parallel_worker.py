"""A process of `test_parallel.py` beside the first: its share of a model, until that one says that this was all.

python parallel_worker.py MODEL OPTIONS         with the environment that torchrun makes
"""

from __future__ import annotations

import json
import sys

import torch

from ossia.engine import EngineConfig
from ossia.engine.parallel import TeamRunner, load_team_runner
from ossia.errors import UnavailableError
from ossia.model.weights import Checkpoint
from ossia.ops import load

if __name__ == "__main__":
    torch.set_num_threads(1)
    ops = load("gpu", dtype="float32")
    try:
        runner = load_team_runner(ops, Checkpoint.open(sys.argv[1]), EngineConfig(**json.loads(sys.argv[2])), 0, 2)
        assert isinstance(runner, TeamRunner)
        runner.follow()
    except UnavailableError as error:
        sys.exit(error.message)
