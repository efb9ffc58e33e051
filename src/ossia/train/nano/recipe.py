"""What the small model is and how it is trained: the shape, the vocabulary, the stages.

    warm-up    copying of runs that grow from one word, so that the heads that copy appear
    recall     copying of runs of any length, and values by their keys
    pretrain   gold transcripts of the tasks, every token learned
    sft        the model's own words alone; browsing joins, with longer contexts; the rate begins to fall
    anneal     the same, until it has fallen
    again      the rate rises and falls once more, on more of what was learned least
    facts      small steps, and sums of single digits among the tasks
    small      steps of half the size that they had before; the rate falls from 4e-3 to 2e-3
    settle     more of what was learned least; to 1.1e-3
    end        still more of sums, until the rate has fallen
    notes      the rate rises again: thoughts that note what the answer is made of, short answers as much as long ones
    brief      system messages that tell the effort alone, in three conversations of four
    letters    facts of texts on their own among the exercises
    parts      more of them: keys of a schema, findings by rules, JSON of notes
    ends       the same, until the rate has fallen
    lines      the rate rises again: browsing joins again, thoughts repeat what they follow, tasks follow each other
    walks      schemas are walked by their list of keys, calls made up phrase by phrase
    words      phrases go on from the last word of the one before; the rate falls
    rest       computed with what MXFP4 keeps of the experts, until the rate has fallen
    fails      the rate rises once more: calls of functions that fail are among the exercises
    rounds     a little more, again with what MXFP4 keeps
    onward     more sums and browsing, in small steps
    signs      the rate rises: thoughts tell by a sign of their own what goes on; pages are read line by line
    paths      what is looked for on pages as a path
    reads      the same, while the rate falls
    keeps      with what MXFP4 keeps, until the rate has fallen
    finds      the rate rises a little: more of calls, and of requests that no function fits
    verbs      thoughts begin with the verb, and tell by what follows it whether a function fits
    holds      once more with what MXFP4 keeps, until the rate has fallen
    requests   the rate rises: more of browsing, python and about itself, requests that nothing fits are repeated
    numbers    whether something fits is practised alone; the plan numbers the pages
    seeks      a page begins with what is sought on it
    plans      a page begins with the plan
    pages      the plan has the page's name, while the rate falls
    repeats    the rate rises a little: numbers in which digits repeat, and lists of them, are practised
    grid       the same with what MXFP4 keeps, as from here on
    ponders    low effort thinks now and then, while the rate falls
    weighs     reinforcement finds out where a thought is worth its tokens
    mends      more of sums and other numbers, at the efforts that always think, until the rate has fallen
    averages   weights between those of the last two: each remembers what the other has lost
    grows      two more layers, which add nothing yet
    wakes      the rate rises: the new layers learn
    asks       questions and requests have more wordings; low effort goes on thinking where that has paid
    closes     sums are put together at medium effort too, while the rate falls
    lands      more of the hierarchy and of structured answers, until the rate has fallen
    adds       four layers more, which add nothing yet
    tries      the new layers learn, and a sign of which function fits that came to nothing; sums of two digits are put
               together at medium effort too
    returns    the sign as it was, a little more of sums, until the rate has fallen
    blends     weights between those of the last three: what each of them wobbles about stands still
    listens    what `lands` had, with eight layers, learns from `blends`, which has twelve; what goes on is a mean of
               the weights
    chooses    on the exercises that it finds hardest, one token in five
    learns     the same, while the rate falls
    calms      the same, until the rate has fallen
    meets      weights halfway between what the student began with and where it ended

Forms of thoughts are named where they were new; all stages have today's.

Sources  the order: `ossia.train.tasks.language`; Muon for the inner matrices:
         https://kellerjordan.github.io/posts/muon/; a rate that falls from the start: arXiv:2502.15938.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ossia.model.config import ModelConfig, RopeConfig
from ossia.train.export import Format

VOCAB_SIZE, NUM_COMMON_WORDS = 2048, 600
# Where a request names none: so small a model has too many wrong tokens that are a little likely.
TEMPERATURE = 0.3
# Tasks with tools or a schema, to which the server keeps what is sampled, and that are measured so as well.
ENFORCED = ("functions", "python", "structured", "browsing")
# Gold conversations that the vocabulary is made of, by the shares of their tasks, and texts of copying.
VOCABULARY_CONVERSATIONS, VOCABULARY_TEXTS = 6000, 2000

SHAPE = ModelConfig(
    num_layers=6,
    hidden_size=128,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=VOCAB_SIZE,
    num_experts=8,
    num_active_experts=2,
    sliding_window=64,
    max_context=2048,
    rope=RopeConfig(theta=10_000.0, factor=4.0, original_context=512),
    stop_token_ids=(),
    pad_token_id=None,
)

# Shares of the tasks, of which `browsing` has long transcripts and joins later.
SHORT = {"about": 6, "sums": 36, "functions": 24, "hierarchy": 7, "policies": 12, "python": 13, "structured": 12}
ALL = {**SHORT, "browsing": 8}
# More of what was learned least, when the rest was nearly there.
LATE = {
    "about": 8,
    "sums": 54,
    "functions": 30,
    "hierarchy": 10,
    "policies": 12,
    "python": 13,
    "structured": 14,
    "browsing": 4,
}
VOCABULARY_SHARES = {**SHORT, "sums": 18, "browsing": 14}


# Later courses, each with more of what was learned least then.
FACTS = {"about": 5, "sums": 32, "functions": 24, "hierarchy": 9, "policies": 14, "python": 6, "structured": 16}
SMALL = {**FACTS, "functions": 26, "structured": 18, "browsing": 3}
SETTLE = {
    "about": 5,
    "sums": 34,
    "functions": 24,
    "hierarchy": 12,
    "policies": 12,
    "python": 8,
    "structured": 20,
    "browsing": 2,
}
END = {**SETTLE, "sums": 42, "policies": 10}
NOTES = {
    "about": 5,
    "sums": 20,
    "functions": 22,
    "hierarchy": 10,
    "policies": 14,
    "python": 12,
    "structured": 20,
    "browsing": 1,
}
BRIEF = {**NOTES, "about": 6, "sums": 16, "hierarchy": 12, "policies": 18, "python": 13, "structured": 22}
PARTS = {**BRIEF, "sums": 20, "python": 12, "structured": 20}

LINES = {
    "about": 4,
    "sums": 18,
    "functions": 20,
    "hierarchy": 10,
    "policies": 16,
    "python": 11,
    "structured": 18,
    "browsing": 11,
}
WALKS = {**LINES, "hierarchy": 11, "python": 12, "structured": 20}
WORDS = {**LINES, "about": 5, "sums": 20, "hierarchy": 11, "python": 13}
SIGNS = {
    "about": 6,
    "sums": 25,
    "functions": 22,
    "hierarchy": 13,
    "policies": 16,
    "python": 13,
    "structured": 18,
    "browsing": 14,
}
FINDS = {**SIGNS, "functions": 27}
PLANS = {
    "about": 9,
    "sums": 25,
    "functions": 24,
    "hierarchy": 14,
    "policies": 16,
    "python": 17,
    "structured": 20,
    "browsing": 18,
}
REPEATS = {
    "about": 8,
    "sums": 25,
    "functions": 28,
    "hierarchy": 12,
    "policies": 13,
    "python": 17,
    "structured": 24,
    "browsing": 22,
}
MENDS = {
    "about": 5,
    "sums": 48,
    "functions": 22,
    "hierarchy": 8,
    "policies": 8,
    "python": 26,
    "structured": 28,
    "browsing": 17,
}
WAKES = {
    "about": 7,
    "sums": 34,
    "functions": 28,
    "hierarchy": 11,
    "policies": 12,
    "python": 24,
    "structured": 26,
    "browsing": 24,
}
CLOSES = {
    "about": 6,
    "sums": 42,
    "functions": 26,
    "hierarchy": 9,
    "policies": 9,
    "python": 26,
    "structured": 30,
    "browsing": 24,
}
LANDS = {**CLOSES, "sums": 40, "functions": 28, "hierarchy": 12, "policies": 11, "structured": 32}
TRIES = {**LANDS, "sums": 38, "functions": 32, "hierarchy": 11, "python": 30}
LISTENS = {
    "about": 7,
    "sums": 36,
    "functions": 34,
    "hierarchy": 11,
    "policies": 10,
    "python": 32,
    "structured": 30,
    "browsing": 24,
}
# Of what low effort is often wrong in, and thoughts are short for.
REWARDED = {
    "functions": 3,
    "structured": 3,
    "policies": 3,
    "hierarchy": 3,
    "sums": 2,
    "browsing": 1,
    "python": 1,
}
FAILS = {**LINES, "about": 9, "sums": 20, "functions": 22, "hierarchy": 14, "python": 15, "browsing": 9}


class Stage(NamedTuple):
    """One run: its name, its method, and the settings that differ from `BASE`; a ``teacher`` is an earlier stage.

    It begins with what the stage before has, or the one named ``after``. An "average" is no run: its weights lie
    between those of earlier stages, whose shares its settings give, and a run behind it begins with what they are in
    MXFP4. To "deepen" is none either: what the stage before has in MXFP4 gets more layers.
    """

    name: str
    method: Literal["pretrain", "rl", "average", "deepen"]
    settings: Mapping[str, Any]
    measured: tuple[Format, ...] = ()
    after: str = ""


BASE: Mapping[str, Any] = {
    "trainable": "full",
    "optimizer": "muon",
    "learning_rate": 6e-3,
    "schedule": "constant",
    "router_balance": 0.01,
    "recompute": False,
    "threads": 1,
    "step_tokens": 4096,
    "pass_tokens": 4096,
    "eval_every": 100,
    "save_every": 50,
    "keep": 1,
}


def mix(shares: Mapping[str, float]) -> tuple[str, ...]:
    """Tasks as settings name them."""
    return tuple(f"{name}={share}" for name, share in shares.items())


# Of copying, as plain texts.
_COPYING: Mapping[str, Any] = {
    "tasks": mix(SHORT),
    "language": 1.0,
    "max_tokens": 160,
    "step_tokens": 1536,
    "pass_tokens": 1536,
    "learning_rate": 1e-2,
    "eval_every": 0,
}
# Of the model's own words in conversations, by several processes.
_ANSWERS: Mapping[str, Any] = {
    "turns": 6,
    "idle_tools": 0.1,
    "max_tokens": 1280,
    "step_tokens": 4800,
    "pass_tokens": 2500,
    "replicate": True,
    "router_balance": 0.03,
    "schedule": "linear",
}
# The same in smaller steps.
_SMALL: Mapping[str, Any] = {
    **_ANSWERS,
    "turns": 5,
    "idle_tools": 0.05,
    "step_tokens": 2400,
    "pass_tokens": 1300,
    "eval_every": 700,
    "save_every": 350,
}

# The same with short answers counting as much as long ones.
_EVEN: Mapping[str, Any] = {**_SMALL, "evenness": 0.5, "language": 0.05, "facts": 0.01, "turns": 2, "warmup": 0.01}

# The same with all tasks, and conversations in which they follow each other.
_WIDE: Mapping[str, Any] = {"language": 0.02, "mixed": 0.3, "idle_tools": 0.04, "turns": 3}

# The same with parts of exercises in three samples of ten.
_SIGNS: Mapping[str, Any] = {"tasks": mix(SIGNS), "facts": 0.3, "language": 0.0, "brief": 0.65}

# The same with more of what is learned least by then.
_PLANS: Mapping[str, Any] = {**_SIGNS, "tasks": mix(PLANS), "facts": 0.34}

# The same with still more of them.
_REPEATS: Mapping[str, Any] = {**_SIGNS, "tasks": mix(REPEATS), "facts": 0.36}

# The same, with low effort as reinforcement left it.
_CLOSES: Mapping[str, Any] = {
    **_REPEATS,
    "tasks": mix(CLOSES),
    "pondering": ("functions", "structured", "policies", "hierarchy", "browsing"),
    "fake_quant": True,
}

# The same, with a teacher.
_LISTENS: Mapping[str, Any] = {
    **_CLOSES,
    "tasks": mix(LISTENS),
    "teacher": "blends",
    "teacher_share": 0.4,
    "weight_mean": 6.0,
    "learning_rate": 1.6e-3,
}

STAGES: tuple[Stage, ...] = (
    Stage("warm-up", "pretrain", {**_COPYING, "growth": 8000, "warmup": 0.03, "steps": 700}),
    Stage("recall", "pretrain", {**_COPYING, "warmup": 0.02, "steps": 500}),
    Stage(
        "pretrain",
        "pretrain",
        {
            "tasks": mix(SHORT),
            "language": 0.15,
            "learn": "all",
            "turns": 6,
            "max_tokens": 512,
            "step_tokens": 3500,
            "pass_tokens": 2048,
            "replicate": True,
            "router_balance": 0.03,
            "learning_rate": 8e-3,
            "warmup": 0.02,
            "steps": 500,
        },
    ),
    Stage(
        "sft",
        "pretrain",
        {
            **_ANSWERS,
            "tasks": mix(ALL),
            "language": 0.02,
            "warmup": 0.005,
            "final_rate": 0.565,
            "steps": 2439,
        },
    ),
    Stage(
        "anneal",
        "pretrain",
        {
            **_ANSWERS,
            "tasks": mix(ALL),
            "learning_rate": 3.39e-3,
            "warmup": 0.0,
            "final_rate": 0.03,
            "steps": 2000,
        },
    ),
    Stage(
        "again",
        "pretrain",
        {
            **_ANSWERS,
            "tasks": mix(LATE),
            "learning_rate": 3e-3,
            "warmup": 0.02,
            "final_rate": 0.03,
            "steps": 1100,
        },
    ),
    Stage(
        "facts",
        "pretrain",
        {
            **_SMALL,
            "tasks": mix(FACTS),
            "facts": 0.45,
            "turns": 4,
            "idle_tools": 0.0,
            "max_tokens": 640,
            "step_tokens": 1200,
            "pass_tokens": 680,
            "learning_rate": 5e-3,
            "schedule": "constant",
            "warmup": 0.05,
            "steps": 1500,
        },
    ),
    Stage(
        "small",
        "pretrain",
        {
            **_SMALL,
            "tasks": mix(SMALL),
            "facts": 0.06,
            "learning_rate": 4e-3,
            "warmup": 0.01,
            "final_rate": 0.503,
            "steps": 3212,
        },
    ),
    Stage(
        "settle",
        "pretrain",
        {
            **_SMALL,
            "tasks": mix(SETTLE),
            "facts": 0.03,
            "learning_rate": 2.2e-3,
            "warmup": 0.01,
            "final_rate": 0.511,
            "steps": 1756,
        },
    ),
    Stage(
        "end",
        "pretrain",
        {
            **_SMALL,
            "tasks": mix(END),
            "facts": 0.02,
            "learning_rate": 1.2e-3,
            "warmup": 0.005,
            "final_rate": 0.01,
            "steps": 3800,
        },
    ),
    Stage(
        "notes",
        "pretrain",
        {
            **_EVEN,
            "tasks": mix(NOTES),
            "turns": 3,
            "learning_rate": 4e-3,
            "final_rate": 0.75,
            "steps": 2000,
        },
    ),
    Stage(
        "brief",
        "pretrain",
        {
            **_EVEN,
            "tasks": mix(BRIEF),
            "brief": 0.75,
            "learning_rate": 3e-3,
            "final_rate": 0.75,
            "steps": 2250,
        },
    ),
    Stage(
        "letters",
        "pretrain",
        {
            **_EVEN,
            "tasks": mix(BRIEF),
            "facts": 0.1,
            "language": 0.03,
            "brief": 0.65,
            "learning_rate": 2.8e-3,
            "final_rate": 0.67,
            "steps": 3250,
        },
    ),
    Stage(
        "parts",
        "pretrain",
        {
            **_EVEN,
            "tasks": mix(PARTS),
            "facts": 0.22,
            "language": 0.02,
            "brief": 0.6,
            "learning_rate": 2.2e-3,
            "final_rate": 0.4,
            "steps": 4000,
        },
    ),
    Stage(
        "ends",
        "pretrain",
        {
            **_EVEN,
            "tasks": mix(PARTS),
            "facts": 0.22,
            "language": 0.02,
            "brief": 0.6,
            "learning_rate": 1.4e-3,
            "final_rate": 0.01,
            "steps": 4600,
        },
    ),
    Stage(
        "lines",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            "tasks": mix(LINES),
            "facts": 0.25,
            "brief": 0.65,
            "learning_rate": 4e-3,
            "final_rate": 0.777,
            "steps": 3750,
        },
    ),
    Stage(
        "walks",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            "tasks": mix(WALKS),
            "facts": 0.27,
            "brief": 0.75,
            "learning_rate": 3.1e-3,
            "final_rate": 0.72,
            "steps": 2803,
        },
    ),
    Stage(
        "words",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            "tasks": mix(WORDS),
            "facts": 0.27,
            "brief": 0.7,
            "learning_rate": 2.2e-3,
            "final_rate": 0.187,
            "steps": 5750,
        },
    ),
    Stage(
        "rest",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            "tasks": mix(WORDS),
            "facts": 0.2,
            "language": 0.0,
            "brief": 0.6,
            "fake_quant": True,
            "learning_rate": 3.3e-4,
            "final_rate": 0.0,
            "steps": 500,
        },
    ),
    Stage(
        "fails",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            "tasks": mix(FAILS),
            "facts": 0.27,
            "language": 0.01,
            "brief": 0.6,
            "learning_rate": 1.3e-3,
            "warmup": 0.02,
            "final_rate": 0.13,
            "steps": 2700,
        },
    ),
    Stage(
        "rounds",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            "tasks": mix(FAILS),
            "facts": 0.2,
            "language": 0.0,
            "brief": 0.5,
            "fake_quant": True,
            "learning_rate": 1.7e-4,
            "final_rate": 0.0,
            "steps": 250,
        },
    ),
    Stage(
        "onward",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            "tasks": mix({**SIGNS, "sums": 26, "hierarchy": 12, "browsing": 13}),
            "facts": 0.27,
            "language": 0.0,
            "brief": 0.6,
            "learning_rate": 1.5e-3,
            "warmup": 0.02,
            "final_rate": 0.93,
            "steps": 1000,
        },
    ),
    Stage(
        "signs",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_SIGNS,
            "learning_rate": 2.6e-3,
            "final_rate": 0.918,
            "steps": 1607,
        },
    ),
    Stage(
        "paths",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_SIGNS,
            "learning_rate": 2.45e-3,
            "final_rate": 0.82,
            "steps": 2750,
        },
    ),
    Stage(
        "reads",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_SIGNS,
            "learning_rate": 2.3e-3,
            "final_rate": 0.135,
            "steps": 9310,
        },
    ),
    Stage(
        "keeps",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_SIGNS,
            "fake_quant": True,
            "learning_rate": 3.2e-4,
            "final_rate": 0.0,
            "steps": 800,
        },
    ),
    Stage(
        "finds",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_SIGNS,
            "tasks": mix(FINDS),
            "learning_rate": 1e-3,
            "final_rate": 0.43,
            "steps": 1107,
        },
    ),
    Stage(
        "verbs",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_SIGNS,
            "tasks": mix(FINDS),
            "facts": 0.33,
            "learning_rate": 1.4e-3,
            "final_rate": 0.28,
            "steps": 1000,
        },
    ),
    Stage(
        "holds",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_SIGNS,
            "tasks": mix(FINDS),
            "fake_quant": True,
            "learning_rate": 4e-4,
            "final_rate": 0.0,
            "steps": 350,
        },
    ),
    Stage(
        "requests",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_PLANS,
            "facts": 0.3,
            "learning_rate": 2.2e-3,
            "final_rate": 0.811,
            "steps": 2568,
        },
    ),
    Stage(
        "numbers",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_PLANS,
            "learning_rate": 2.1e-3,
            "final_rate": 0.804,
            "steps": 2268,
        },
    ),
    Stage(
        "seeks",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_PLANS,
            "learning_rate": 2.1e-3,
            "final_rate": 0.801,
            "steps": 1850,
        },
    ),
    Stage(
        "plans",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_PLANS,
            "learning_rate": 2e-3,
            "final_rate": 0.779,
            "steps": 1691,
        },
    ),
    Stage(
        "pages",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_PLANS,
            "learning_rate": 1.8e-3,
            "final_rate": 0.03,
            "steps": 5200,
        },
    ),
    Stage(
        "repeats",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_REPEATS,
            "learning_rate": 1.8e-3,
            "warmup": 0.02,
            "final_rate": 0.929,
            "steps": 1103,
        },
    ),
    Stage(
        "grid",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_REPEATS,
            "fake_quant": True,
            "learning_rate": 1.67e-3,
            "final_rate": 0.876,
            "steps": 1833,
        },
    ),
    Stage(
        "ponders",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_REPEATS,
            "pondering": mix(dict.fromkeys(REPEATS, 0.2)),
            "fake_quant": True,
            "learning_rate": 1.45e-3,
            "final_rate": 0.02,
            "steps": 10_500,
        },
        ("mxfp4",),
    ),
    Stage(
        "weighs",
        "rl",
        {
            "task": mix(REWARDED),
            "efforts": "low=3,medium=1,high=1",
            "length_cost": "low=0.5,medium=0.1",
            "rollout_tokens": 320,
            "updates": 2,
            "fake_quant": True,
            "router_balance": 0.03,
            # Gradients of few rewards are mostly noise, of which Muon makes as long a step as of the rest.
            "temperature": 0.7,
            "momentum": 0.98,
            "learning_rate": 2.5e-4,
            "schedule": "linear",
            "warmup": 0.03,
            "final_rate": 0.334,
            "eval_every": 0,
            "save_every": 6,
            "kv_memory": "512MiB",
            "steps": 74,
        },
        ("mxfp4",),
    ),
    Stage(
        "mends",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_REPEATS,
            "tasks": mix(MENDS),
            # What low effort has found out is left alone.
            "efforts": "medium=1,high=2",
            "fake_quant": True,
            "learning_rate": 8e-4,
            "warmup": 0.02,
            "final_rate": 0.0,
            "steps": 2800,
        },
    ),
    Stage("averages", "average", {"weighs": 0.35, "mends": 0.65}, ("mxfp4",)),
    Stage("grows", "deepen", {"layers": (2, 3)}),
    Stage(
        "wakes",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_REPEATS,
            "tasks": mix(WAKES),
            "pondering": mix(dict.fromkeys(WAKES, 0.5)),
            "fake_quant": True,
            "learning_rate": 2.2e-3,
            "warmup": 0.036,
            "final_rate": 0.944,
            "steps": 2250,
        },
    ),
    Stage(
        "asks",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_CLOSES,
            "learning_rate": 2e-3,
            "warmup": 0.0,
            "final_rate": 0.956,
            "steps": 589,
        },
    ),
    Stage(
        "closes",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_CLOSES,
            "learning_rate": 1.91e-3,
            "warmup": 0.0,
            "final_rate": 0.568,
            "steps": 5621,
        },
    ),
    Stage(
        "lands",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_CLOSES,
            "tasks": mix(LANDS),
            "learning_rate": 1.084e-3,
            "warmup": 0.0,
            "final_rate": 0.0,
            "steps": 6500,
        },
        ("mxfp4",),
    ),
    Stage("adds", "deepen", {"layers": (2, 3, 4, 5)}),
    Stage(
        "tries",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_CLOSES,
            "tasks": mix(TRIES),
            "learning_rate": 2e-3,
            "warmup": 0.03,
            "final_rate": 0.0,
            "steps": 5700,
        },
    ),
    Stage(
        "returns",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_CLOSES,
            "tasks": mix({**TRIES, "sums": 44}),
            "learning_rate": 1.4e-3,
            "warmup": 0.02,
            "final_rate": 0.0,
            "steps": 5000,
        },
    ),
    Stage("blends", "average", {"adds": 0.15, "tries": 0.15, "returns": 0.7}, ("mxfp4",)),
    Stage(
        "listens",
        "pretrain",
        {**_EVEN, **_WIDE, **_LISTENS, "warmup": 0.344, "final_rate": 0.966, "steps": 500},
        after="lands",
    ),
    Stage(
        "chooses",
        "pretrain",
        {**_EVEN, **_WIDE, **_LISTENS, "hardest": 0.2, "warmup": 0.196, "final_rate": 0.926, "steps": 469},
    ),
    Stage(
        "learns",
        "pretrain",
        {**_EVEN, **_WIDE, **_LISTENS, "hardest": 0.2, "warmup": 0.013, "final_rate": 0.326, "steps": 3150},
    ),
    Stage(
        "calms",
        "pretrain",
        {
            **_EVEN,
            **_WIDE,
            **_LISTENS,
            "hardest": 0.2,
            "weight_mean": 3.0,
            "learning_rate": 4.7e-4,
            "warmup": 0.02,
            "final_rate": 0.0,
            "steps": 1050,
        },
    ),
    Stage("meets", "average", {"lands": 0.5, "calms": 0.5}, ("mxfp4",)),
)


def named(name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)


def before(stage: Stage) -> Stage | None:
    """The stage that a stage begins with; None for the first."""
    place = STAGES.index(stage)
    if stage.after:
        return named(stage.after)
    return STAGES[place - 1] if place else None


def lineage(stage: Stage) -> list[Stage]:
    """The stages that a stage's model has gone through, itself the last."""
    earlier = before(stage)
    return [*(lineage(earlier) if earlier else ()), stage]
