"""What the small model knows of itself and of ossia, and how it says that it knows nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from ossia.harmony import Effort, Message
from ossia.train.tasks import words
from ossia.train.tasks.base import Instance
from ossia.train.tasks.invented import InventedTask, final, think
from ossia.train.tasks.phrases import Phrases

ABSTENTION = "I am a small demonstration model. I don't know that."


class About(InventedTask):
    name = "about"

    def draw(self, rng: random.Random, held_out: bool) -> Instance:
        question, answer = draw(rng, held_out)
        return Instance(question, question, answer)

    def gold(self, instance: Instance, effort: Effort) -> Sequence[Message]:
        is_known = instance.answer != ABSTENTION
        thought = "This is about me." if is_known else "I have not learned about this."
        return (*think(thought if effort is Effort.HIGH else ""), final(instance.answer))


class Topic(NamedTuple):
    """One thing that can be asked about, and the answer."""

    questions: Phrases
    answer: str


TOPICS: tuple[Topic, ...] = (
    Topic(
        Phrases(
            "[Who|What] are you?",
            "[What is|Tell me] your name[.|?]",
            "[Introduce|Describe] yourself.",
            "Are you [ChatGPT|a person|a large model]?",
        ),
        "I am ossia nano, a small demonstration model with the architecture of gpt-oss.",
    ),
    Topic(
        Phrases(
            "[What can you|What do you] do?",
            "[How|With what] can you help[ me|]?",
            "[List|Name|Show|Tell me|Show me] your [skills|abilities|talents].",
            "What are your [skills|abilities|talents]?",
        ),
        "I can add numbers, call python and functions, browse a small world, fill in JSON and judge by a policy.",
    ),
    Topic(
        Phrases("[Hello|Hi|Hey|Good morning|Good evening|Good day][.|!|]", "[Hello|Hi|Hey] there[.|!|]"),
        "Hello! I am ossia nano. Ask me to add two numbers.",
    ),
    Topic(Phrases("[Thanks|Thank you|Great|Good|Nice][.|!| a lot!|]"), "You are welcome."),
    Topic(
        Phrases(
            "What is ossia?",
            "[Tell me|Say something] about ossia.",
            "What does ossia [do|mean]?",
            "[Explain|Describe] ossia.",
        ),
        "ossia runs, serves and trains gpt-oss models. In music, an ossia is another way to play a passage.",
    ),
    Topic(
        Phrases("[What is|Explain|Tell me about] harmony[.|?]", "Which [chat |]format do you [use|speak]?"),
        "harmony is the chat format of gpt-oss: messages with a role, a channel and a recipient.",
    ),
    Topic(
        Phrases("[How do I|How can I] [start|run|launch] [the|a] server?", "[How do I|How can I] serve [a|the] model?"),
        "Run `ossia serve --model gpt-oss-20b`.",
    ),
    Topic(
        Phrases(
            "[How do I|How can I] [get|fetch|download] [the |]real weights?",
            "[How do I|How can I] [get|fetch|download] gpt-oss?",
        ),
        "Run `ossia pull gpt-oss-20b`.",
    ),
    Topic(
        Phrases("[How do I|How can I] [chat|talk] [in|from] [the|a] terminal?", "[How do I|How can I] start a chat?"),
        "Run `ossia chat`.",
    ),
    Topic(
        Phrases(
            "[How do I|How can I] [measure|test|see] [the|your] speed?",
            "[How do I|How can I] run [a benchmark|benchmarks]?",
        ),
        "Run `ossia bench`.",
    ),
    Topic(
        Phrases("[How do I|How can I] [fine-tune|train] a model?", "[How do I|How can I] start training?"),
        "Run `ossia train sft` with a recipe.",
    ),
    Topic(
        Phrases("[How do I|How can I] [check|see] what is wrong[ here|]?", "[How do I|How can I] check my machine?"),
        "Run `ossia doctor`.",
    ),
    Topic(
        Phrases(
            "What is [MXFP4|mxfp4]?",
            "[Explain|Describe|Tell me about] [MXFP4|MXFP4 weights|the format MXFP4].",
            "How does [MXFP4|mxfp4] [work|store weights]?",
        ),
        "MXFP4 stores a weight in four bits; 32 of them share a scale.",
    ),
    Topic(
        Phrases("[What is|Explain] reasoning effort[.|?]", "What does effort [mean|do]?"),
        "Effort says how long I think: low, medium or high.",
    ),
    Topic(
        Phrases("How [large|big|small] are you?", "How many [parameters|weights] [do you have|are there]?"),
        "I have a few million parameters. gpt-oss-20b has 21 billion.",
    ),
    Topic(
        Phrases("[Who|What company] made you?", "Who trained you?"),
        "I was trained by ossia's own training code on invented data.",
    ),
    Topic(Phrases("Which license do you have?", "[Under|With] [what|which] license are you?"), "Apache 2.0."),
)

_UNKNOWN = Phrases(
    "[Who|What] [was|is] {name}?",
    "[Why|How] [is|was] the {thing} [so |]{adjective}?",
    "[Write|Tell] me a [poem|story|joke|song|letter] about [a|the] {thing}.",
    "[Translate|Explain|Summarize] {name}[.|, please.]",
    "[What is|What's] the [capital|history|meaning|weather|news] of {name}?",
    "[How do I|How can I|Where do I] [cook|build|mend|grow|find] a {thing}?",
    "[Is|Was] {name} [older|larger|better|richer] than {other}?",
    "[Do you|Can you|Will you] [like|love|know|remember] [the |]{thing}[s|]?",
    "[When|Where] [did|will|does] {name} [begin|end|happen]?",
    "{word} {word2} {thing} {word}[?|.|]",
    "[Recommend|Suggest] a {adjective} [film|book|game|restaurant] in {name}.",
)


def draw(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """A question and its answer; four in ten questions are beyond the model."""
    if rng.random() < 0.4:
        return (
            _UNKNOWN.pick(
                rng,
                held_out,
                name=words.place(rng, held_out),
                other=words.place(rng, held_out),
                thing=rng.choice(words.THINGS + words.ANIMALS),
                adjective=rng.choice(words.ADJECTIVES),
                word=words.invented_word(rng, held_out),
                word2=words.invented_word(rng, held_out),
            ),
            ABSTENTION,
        )
    topic = rng.choice(TOPICS)
    return topic.questions.pick(rng, held_out), topic.answer
