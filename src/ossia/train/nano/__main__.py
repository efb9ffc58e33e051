"""`python -m ossia.train.nano OUT`: make a small model from nothing."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ossia.errors import OssiaError
from ossia.train.nano.make import make, run_stage
from ossia.train.nano.report import write_report
from ossia.train.parallel import end_process
from ossia.train.result import tell_nothing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ossia.train.nano", description="Train a small model from nothing.")
    parser.add_argument("out", type=Path, help="folder of all that is made; what is there is not made again")
    parser.add_argument("--docs", type=Path, help="folder that gets the report, nano.md and its plots")
    parser.add_argument("--count", type=int, default=1000, help="exercises per task and effort that are measured")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the steps of a stage")
    parser.add_argument("--stage", help="train this stage alone, behind those before it, as one of these processes")
    arguments = parser.parse_args()
    try:
        if arguments.stage:
            is_first = os.environ.get("RANK", "0") == "0"
            run_stage(arguments.stage, arguments.out, _say if is_first else tell_nothing)
            end_process(0)
            return 0
        make(arguments.out, count=arguments.count, say=_say, processes=arguments.processes)
        if arguments.docs:
            write_report(arguments.out, arguments.docs)
    except OssiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is there", file=sys.stderr)
        return 130
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
