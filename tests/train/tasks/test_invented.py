"""The tasks of the embedded model: right answers, wrong answers, and two sides with nothing in common."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter

import pytest

from ossia.harmony import Channel, Effort, Message, Role
from ossia.train.tasks import (
    Transcript,
    browsing,
    draw_instance,
    functions,
    gold_conversation,
    gold_conversation_of_turns,
    hierarchy,
    make,
    make_mix,
    policies,
    problems,
    structured,
)
from ossia.train.tasks.about import ABSTENTION, TOPICS
from ossia.train.tasks.base import Instance
from ossia.train.tasks.invented import final, same_json
from ossia.train.tasks.phrases import Phrases, expand
from ossia.train.tasks.policies import Rule, Text
from ossia.train.tasks.sums import TAKES_EFFORT, Sum, draw_facts
from ossia.train.tasks.words import invented_word, is_held_out, place
from ossia.train.tasks.world import QUESTIONS, Entry, Fact

NAMES = ["sums", "python", "functions", "browsing", "structured", "policies", "hierarchy", "about"]


def draws(name: str, split: str, count: int, seed: int = 0):
    mix = make_mix([name])
    return [mix.draw(split, seed, number) for number in range(count)]


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("name", NAMES)
def test_gold_is_worth_everything_and_silence_nothing(name, split):
    for draw in draws(name, split, 20):
        gold = tuple(draw.task.gold(draw.instance, draw.effort))
        # What no effort of that kind can know is worth as little as a wrong number.
        is_known = gold[-1].text != TAKES_EFFORT
        assert draw.task.score(draw.instance, Transcript(gold)).value == pytest.approx(1.0 if is_known else 0.1)
        assert draw.task.score(draw.instance, Transcript(gold[:-1])).value == 0
        case = draw.instance.data.get("case")
        # Of a secret anything may be said but the secret.
        said = f"It is {case.word}." if case and case.errand is None else "something else altogether"
        wrong = Transcript((*gold[:-1], final(said)))
        assert draw.task.score(draw.instance, wrong).value <= 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_and_a_number_give_the_same_exercise(name):
    for one, again in zip(draws(name, "train", 5), draws(name, "train", 5), strict=True):
        assert gold_conversation(one).to_json() == gold_conversation(again).to_json()


@pytest.mark.parametrize("name", ["about", "sums", "python", "functions", "structured", "policies", "hierarchy"])
def test_no_held_out_request_is_a_trained_one(name):
    """Of many, since those without a name are soon drawn twice. Of python and sums neither in other words."""

    def keys(split: str, count: int) -> set[str]:
        return {draw.instance.key for draw in draws(name, split, count)}

    is_short = name in ("about", "hierarchy", "python", "sums")
    assert not keys("train", 4000 if is_short else 300) & keys("held_out", 400 if is_short else 100)


def test_no_held_out_policy_and_message_of_seen_rules_are_trained_ones():
    """By all of their words, since a message may have no name."""
    trained, seen = (make("policies", {"combinations": one}) for one in (True, False))
    for draw in draws("policies", "train", 200):
        assert not is_held_out(draw.instance.key)
    rng = random.Random(5)
    for _ in range(60):
        instance = draw_instance(seen, "held_out", rng)
        assert is_held_out(instance.key)
        assert is_held_out(seen.again(instance, rng).key)
    assert not is_held_out(trained.again(draw_instance(trained, "train", rng), rng).key)


def test_everything_that_can_be_asked_about_itself_has_a_wording_that_no_training_has():
    for topic in TOPICS:
        assert topic.questions.forms(held_out=True), topic.answer


def test_names_of_functions_are_of_the_side_that_was_asked_for():
    for split in ("train", "held_out"):
        for draw in draws("functions", split, 50):
            for function in draw.instance.data["functions"]:
                thing = function.description.rstrip(".").split()[-1]
                assert is_held_out(thing) == (split == "held_out")


def test_training_has_more_requests_that_no_function_fits_than_are_measured():
    shares = {
        split: sum(draw.instance.data["wanted"] is None for draw in draws("functions", split, 600)) / 600
        for split in ("train", "held_out")
    }
    assert shares["train"] == pytest.approx(0.36, abs=0.06)
    assert shares["held_out"] == pytest.approx(0.12, abs=0.05)


@pytest.mark.parametrize("digits", [1, 2, 3, 5])
def test_effort_is_the_length_of_the_thoughts(digits):
    task = make("sums", {"digits": digits, "exact": True})
    instance = task.instance(random.Random(1))
    low, medium, high = (sum(len(m.text) for m in task.gold(instance, effort)[:-1]) for effort in Effort)
    assert low == 0 < medium
    assert medium < high if digits == 1 else medium == high
    (answer,) = (m.text for m in task.gold(instance, Effort.LOW))
    assert answer == (instance.answer if digits == 1 else TAKES_EFFORT)


def is_true(x, sign, y, before, carry, digit):
    """Whether the digits, with what is carried or borrowed, make what the step says."""
    x, y, before, carry, digit = (int(one) for one in (x, y, before, carry, digit))
    return x + y + before == 10 * carry + digit if sign == "+" else x - y - before == digit - 10 * carry


def test_every_step_of_a_sum_is_true_and_carries_on():
    rng = random.Random(0)
    for _ in range(300):
        a, b = sorted((rng.randrange(10 ** rng.randint(1, 8)) for _ in range(2)), reverse=True)
        for sign, result in (("+", a + b), ("-", a - b)):
            one = Sum(a, sign, b)
            steps = re.findall(r"(\d)([+-])(\d)[+-](\d)=(\d)(\d)", one.thoughts(Effort.MEDIUM))
            assert len(steps) == len(str(a))
            assert all(is_true(*step) for step in steps)
            assert [step[3] for step in steps] == ["0", *(step[4] for step in steps[:-1])]
            first, second, *lines = one.thoughts(Effort.HIGH).splitlines()
            lines, ends = lines[: len(steps)], lines[len(steps) :]
            assert ends[-1].partition(":")[2] == str(result)
            assert all(line.endswith(line[1]) for line in ends if line[2:] != ":" or line[1] != "0")
            for given, number in ((first, a), (second, b)):
                named, _, digits = given.partition("=")
                assert int(named) == int(re.sub("[a-zA-Z]", "", digits)[::-1]) == number
            shown = [re.fullmatch(r"\w(\d)\w(\d):(\d)([+-])(\d)[+-](\d)=(\d)(\d)\w(\d)", line) for line in lines]
            assert [match.groups()[2:8] for match in shown if match] == steps
            assert all(
                match and match[1] == match[3] and match[2] == match[5] and match[8] == match[9] for match in shown
            )


def test_a_digit_is_behind_the_same_letter_wherever_it_stands():
    first, second, *lines = Sum(4821, "+", 937).thoughts(Effort.HIGH).splitlines()
    assert (first, second) == ("4821=a1b2c8d4", "937=A7B3C9D0")
    found = re.findall(r"[a-zA-Z]\d", " ".join(lines[:4]))
    assert found[0::3] == re.findall(r"[a-z]\d", first)
    assert found[1::3] == re.findall(r"[A-Z]\d", second)
    assert found[2::3] == [line[:2] for line in lines[4:]][::-1]
    assert [line[3:] for line in lines[4:]] == ["5", "57", "575", "5758"]


# What a question says that wants two numbers added.
ADDS = r"\+|plus|[Aa]dd|sum of|more"


def test_facts_are_steps_as_sums_have_them_or_numbers_that_are_read_or_put_together():
    rng = random.Random(2)
    steps, read, put_together = set(), 0, 0
    for _ in range(600):
        parts = draw_facts(rng)
        if parts[-1][0].endswith("<|return|>"):
            (given, _), (answer, _) = parts
            a, b = (int(line.partition("=")[0]) for line in given.splitlines()[1:3])
            *lines, last = answer.removesuffix("<|return|>").replace("<|end|>", "").splitlines()
            sign = "+" if "+" in answer else "-"
            assert (sign == "+") == bool(re.search(ADDS, given.splitlines()[0]))
            assert int(last) == (a + b if sign == "+" else a - b)
            assert lines[-1].partition(":")[2] == last
            assert max(a, b) < 10 or not is_held_out(f"{max(a, b)}{sign}{min(a, b)}")
            put_together += 1
        elif parts[-1][0].endswith("<|end|>"):
            for (question, _), (answer, _) in zip(parts[::2], parts[1::2], strict=True):
                numbers = []
                for line, first in zip(answer.removesuffix("<|end|>").splitlines(), "aA", strict=True):
                    number, _, digits = line.partition("=")
                    assert re.search(rf"\b{number}\b", question)
                    assert digits.startswith(first + number[-1])
                    numbers.append(number)
                    read += 1
                sign = "+" if re.search(ADDS, question) else "-"
                numbers.sort(key=int, reverse=True)
                assert int(numbers[0]) < 10 or not is_held_out(sign.join(numbers))
        else:
            for line in "".join(text for text, _ in parts).splitlines():
                match = re.fullmatch(r"(\d)([+-])(\d)[+-](\d)=(\d)(\d)", line)
                assert match
                assert is_true(*match.groups())
                steps.add(match.groups())
    assert len(steps) > 200
    assert read > 500
    assert put_together > 150


def answers_of(draw_facts, count: int) -> list[tuple[str, str]]:
    """What is asked and what is answered, of exercises with one answer."""
    rng = random.Random(1)
    drawn = [draw_facts(rng) for _ in range(count)]
    return [
        ("".join(text for text, _ in parts[:-1]), parts[-1][0])
        for parts in drawn
        if [is_answer for _, is_answer in parts] == [False] * (len(parts) - 1) + [True]
    ]


def test_facts_of_messages_name_their_topics():
    rng = random.Random(1)
    drawn = [parts for _ in range(60) if (parts := policies.draw_facts(rng))[0][0].endswith("The message:")]
    messages = [
        (asked, answer) for parts in drawn for (asked, _), (answer, _) in zip(parts[::2], parts[1::2], strict=True)
    ]
    assert len(messages) > 30
    for asked, answer in messages:
        thing, topic = re.match(r" (\w+), (\w+)\+ ", answer).groups()
        assert thing in asked
        assert thing.lower() in policies.TOPICS[topic]
    assert sum(asked.strip().split("\n")[0].isupper() for asked, _ in messages) > 10


def test_facts_of_policies_are_findings_and_a_verdict():
    rng = random.Random(1)
    drawn = [parts for _ in range(60) if (parts := policies.draw_facts(rng))[0][0].startswith("R1")]
    assert len(drawn) > 10
    for (policy, _), *turns, (end, _) in drawn:
        assert end == "<|return|>"
        rules = policy.splitlines()
        for (message, _), (answer, is_answer) in zip(turns[::2], turns[1::2], strict=True):
            assert is_answer
            features = set(re.findall(r"(\w+)\+", message))
            *lines, verdict = answer.splitlines()
            for rule, line in zip(rules, lines, strict=False):
                first = re.match(r"R\d: (\w+)", rule)[1]
                end = "." if rule == rules[-1] else ";"
                assert line.startswith(f"{rule}{end} {first}{'+' if first in features else '-'}")
            is_broken = lines[-1].endswith("broken")
            assert is_broken or len(lines) == len(rules)
            assert all(line.endswith("kept") for line in lines[:-1])
            expected = {"violation": int(is_broken), "rule": lines[-1][:2] if is_broken else None}
            assert json.loads(verdict) == expected


def test_facts_of_a_record_are_read_off_it():
    rng = random.Random(0)
    drawn = [parts for _ in range(40) if len(parts := structured.draw_facts(rng)) > 2]
    assert len(drawn) > 5
    for (record, _), *facts in drawn:
        answers = [text.strip() for text, is_answer in facts if is_answer]
        assert len(answers) >= 5
        assert all(answer in record or answer in ("true", "false") for answer in answers)


def test_a_schema_is_filled_by_copying_on():
    """Whatever key comes next stands behind the one before, in the schema, in the thought and in the answer."""
    pairs = [pair for pair in answers_of(structured.draw_facts, 60) if "<|return|>" in pair[1]]
    assert len(pairs) > 20
    for asked, answer in pairs:
        *thought, written = answer.removesuffix("<|return|>").splitlines()
        schema = json.loads(asked.splitlines()[0])
        described = {key for key, value in schema["properties"].items() if "description" in value}
        for i, key in enumerate(schema["required"]):
            if key in described:
                looked_up, _, value = thought.pop(2 * i).rpartition('":')
                assert looked_up.startswith(f'{key}":{{')
                assert looked_up in asked
                assert json.loads(value) == json.loads(written)[key]
        listed, members = thought[0::2], thought[1::2]
        assert all(line in asked for line in listed)
        assert all(line in written for line in members)
        assert [line.split('"')[-1] for line in listed[:-1]] == [line.split('"')[-1] for line in members[:-1]]
        assert list(json.loads(written)) == schema["required"]


def test_a_call_is_made_up_phrase_by_phrase():
    pairs = [pair for pair in answers_of(functions.draw_facts, 80) if "<|call|>" in pair[1]]
    assert len(pairs) > 20
    for asked, answer in pairs:
        *lines, end, called = answer.removesuffix("<|call|>").splitlines()
        errand = lines[1].rstrip("+-")
        num_compared = lines[1::2].index(f"{errand}+")
        compared = list(zip(lines[::2], lines[1::2], strict=False))[:num_compared]
        assert all(sign == f"{errand}-" for _, sign in compared)
        name = lines[2 * len(compared)]
        lines = lines[2 * len(compared) + 2 :]
        verb = errand.split()[0]
        declared = [one for one in re.findall(r"^type (\w+) ", asked, re.MULTILINE) if one.startswith(f"{verb}_")]
        assert [one for one, _ in compared] == declared[: declared.index(name)]
        request, phrases, arguments = asked.splitlines()[-1], lines[0::2], lines[1::2]
        assert called == name + (arguments[-1] + "}" if arguments else "{}")
        assert f"type {name} = " in asked
        said = errand[1:]
        for line in phrases:
            word, _, phrase = line.partition(" ")
            assert said.endswith(word)
            said += f" {phrase}"
        last = re.match(r"\w+", end)[0]
        assert said.endswith(last)
        ended = request if request[-1] in ".!" else f"{request}."
        assert ended.endswith(said + end.removeprefix(last))
        assert all(later.startswith(before) for before, later in itertools.pairwise(arguments))
        given = json.loads(called.removeprefix(name))
        assert set(given) <= set(re.findall(r"^(\w+)\??:", asked, re.MULTILINE))


def test_requests_that_nothing_fits_are_told_from_those_that_something_does():
    rng = random.Random(3)
    told = Counter()
    for _ in range(60):
        declarations, *parts = functions.draw_facts(rng)
        if len(parts) == 2:
            continue
        declared = re.findall(r"^type (\w+) ", declarations[0], re.MULTILINE)
        for (asked, _), (answer, _), (between, _) in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            assert between == "\n"
            request, _ = asked.split("<|message|>")
            lines = answer.splitlines()
            if lines[-1] == "No function fits." and len(lines) == 2 and "_" not in lines[0]:
                # By a word more, where no name is to be compared.
                assert lines[0].lower() in f"{request}.".lower()
                assert not any(name.startswith(f"{lines[0].split()[0]}_") for name in declared)
                told[""] += 1
                continue
            errand = lines[1][:-1]
            assert errand.lower() in request.lower()
            verb, thing = errand.split()[0], errand.split()[-1]
            with_its_verb = [name for name in declared if name.startswith(f"{verb}_")]
            fits = f"{verb}_{thing}" in declared
            if not fits:
                assert lines.pop() == "No function fits."
            assert lines[::2] == with_its_verb[: len(lines) // 2]
            assert lines[1::2] == [f"{errand}{'+' if name == f'{verb}_{thing}' else '-'}" for name in lines[::2]]
            assert fits or len(lines) == 2 * len(with_its_verb)
            told["+" if fits else "-"] += 1
    # Its verb alone does not tell.
    assert told["-"] > told[""] > 10
    assert told["+"] > 20


def test_a_request_that_nothing_fits_is_compared_with_the_functions_of_its_verb():
    found = Counter()
    for draw in draws("functions", "train", 100):
        if draw.instance.data["wanted"] is None:
            thought = draw.task.gold(draw.instance, Effort.HIGH)[0].text
            *_, says_so = lines = thought.splitlines()
            assert says_so == "No function fits."
            asked = draw.instance.data["asked"]
            declared = [one.name for one in draw.instance.data["functions"]]
            with_its_verb = [name for name in declared if name.partition("_")[0] == asked.name.partition("_")[0]]
            if with_its_verb:
                assert lines[:-1] == [line for name in with_its_verb for line in (name, f"{asked.errand}-")]
            else:
                (goes_on,) = lines[:-1]
                assert goes_on.startswith(asked.errand)
                assert goes_on.lower() in f"{draw.instance.prompt}.".lower()
                assert len(goes_on) > len(asked.errand)
            found[bool(with_its_verb)] += 1
    assert min(found.values()) > 3


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_training_has_more_requests_that_only_the_name_of_a_thing_tells_not_to_fit(split):
    found = Counter()
    for draw in draws("functions", split, 300):
        declared = {one.name for one in draw.instance.data["functions"]}
        asked = draw.instance.data["asked"].name
        if draw.instance.data["wanted"] is None:
            assert asked not in declared
            found[asked.partition("_")[0] in {name.partition("_")[0] for name in declared}] += 1
    share = found[True] / found.total()
    assert share > 0.5 if split == "train" else share < 0.4


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_training_has_more_functions_of_one_verb(split):
    verbs = [
        [one.name.partition("_")[0] for one in draw.instance.data["functions"]]
        for draw in draws("functions", split, 300)
    ]
    share = sum(len(set(each)) < len(each) for each in verbs) / 300
    assert share > 0.3 if split == "train" else share < 0.25


def test_facts_of_rules_lead_to_the_answer():
    checked = 0
    for asked, answer in answers_of(hierarchy.draw_facts, 60):
        *thought, said = answer.splitlines()
        assert len(asked.splitlines()) == 2
        if thought:
            assert thought[-1].removesuffix(".").endswith("refuse" if said == hierarchy.REFUSAL else said)
            checked += 1
    assert checked > 20


def test_facts_of_code_give_the_answer_when_run():
    rng = random.Random(1)
    num_repetitive = 0
    for _ in range(40):
        parts = [text for text, _ in problems.draw_facts(rng)]
        for asked, code, shown, answer in zip(parts[::4], parts[1::4], parts[2::4], parts[3::4], strict=True):
            assert asked.endswith("\n")
            *imports, expression = code.removesuffix("<|call|>").splitlines()
            assert code.endswith("<|call|>")
            assert imports in ([], ["import math"])
            value = eval(expression, {"math": math})
            assert shown == f"\n{value!r}\n"
            assert answer == f"{value}<|return|>"
            num_repetitive += len(set(re.findall(r"\d", expression))) <= 2 and len(re.findall(r"\d", expression)) > 4
    assert num_repetitive > 20


def test_facts_of_pages_are_a_plan_and_the_lines_up_to_its_fact():
    rng = random.Random(1)
    num_pages = num_links = 0
    for question, plan, *rest in (browsing.draw_facts(rng) for _ in range(60)):
        assert [is_answer for _, is_answer in (question, plan, *rest)] == [False, True] * (1 + len(rest) // 2)
        name, sought = re.fullmatch(r"Find (.*): (.*)<\|end\|>", plan[0]).groups()
        kinds = sought.split()
        assert name in question[0]
        assert [kind[-2:] for kind in kinds] == (["1."] if len(kinds) == 1 else ["1>", "2."])
        assert all(kind[:-2] in QUESTIONS for kind in kinds)
        if not rest:
            continue
        (page, _), (answer, _) = rest
        num_pages += 1
        if answer.endswith("<|end|>"):
            *lines, opened = answer.removesuffix("<|end|>").splitlines()
            number, link = re.fullmatch('Open 【(.)†(.*), "id":\\1', opened).groups()
            assert f"【{number}†{link}†" in page.replace("】", "†")
            assert lines[-1].endswith(f" {kinds[0]}")
            assert len(kinds) == 2
            num_links += 1
        else:
            read, noted, value, cited = re.fullmatch(
                r"(?s)(.*) (【.†L.】)<\|end\|>\nIt is (.*) (【.†L.】)\.", answer
            ).groups()
            lines = read.splitlines()
            assert value in lines[-1]
            assert noted == cited == f"【{len(kinds)}†{lines[-1].partition(':')[0]}】"
            assert lines[-1].endswith(f" {kinds[-1]}")
        assert lines[0] == f"Find {page.splitlines()[1][4:]}: {sought}"
        assert [line.rpartition(" ")[0] for line in lines[1:]] == page.split("\n")[2 : len(lines) + 1]
        assert all(line.rpartition(" ")[2] in QUESTIONS for line in lines[1:-1])
    assert 10 < num_links < num_pages - 10 < 40


def test_a_browser_reads_each_page_as_far_as_its_fact_and_follows_its_link():
    for draw in draws("browsing", "train", 30):
        gold = list(draw.task.gold(draw.instance, Effort.HIGH))
        thoughts = [one.text for one in gold if one.channel == Channel.ANALYSIS and one.recipient is None]
        calls = [json.loads(one.text) for one in gold if one.recipient and one.recipient.startswith("browser.")]
        pages = [one.text for one in gold if one.role is Role.TOOL]
        hops = draw.instance.data["quest"].hops
        plan, *read = (one.splitlines() for one in thoughts)
        (plan,) = plan
        opened = [lines.pop() for lines in read[:-1]]
        assert read.pop(0) == []
        assert len(opened) == len(read) == len(hops) == len(pages) - 1
        signs = ["1>", "2."] if len(hops) == 2 else ["1."]
        sought = [fact.kind + sign for (_, fact), sign in zip(hops, signs, strict=True)]
        assert plan == f"Find {hops[0][0].name}: {' '.join(sought)}"
        for (entry, fact), kind, link, call, (again, *found), shown, page in zip(
            hops, sought, opened, calls[1:], read, pages[:-1], pages[1:], strict=True
        ):
            assert re.fullmatch(f'Open 【(.)†{entry.name}, "id":\\1', link)
            assert link.removeprefix("Open ")[: -len(', "id":0')] in shown
            assert call == {"id": int(link[-1])}
            assert again == f"Find {entry.name}: {' '.join(sought)}"
            if fact is hops[-1][1]:
                found[-1], _, cited = found[-1].rpartition(" ")
                assert gold[-1].text.endswith(f" {cited}.")
                assert cited == f"【{len(hops)}†{found[-1].partition(':')[0]}】"
            assert all(line.rpartition(" ")[0] in page for line in found)
            kinds = [one.kind for one in entry.facts[: len(found)]]
            assert [line.rpartition(" ")[2] for line in found] == [*kinds[:-1], kind]
            assert fact.value in re.sub("【.†", "", found[-1])


def test_a_call_with_a_wrong_value_or_another_function_is_not_right():
    draw = next(
        d for d in draws("functions", "train", 50) if d.instance.data["wanted"] and d.instance.data["arguments"]
    )
    gold = list(draw.task.gold(draw.instance, Effort.LOW))
    called = next(i for i, message in enumerate(gold) if message.recipient and message.role is Role.ASSISTANT)
    arguments = json.loads(gold[called].text)
    for changed, recipient in (
        ({**arguments, next(iter(arguments)): "no such thing"}, gold[called].recipient),
        (arguments, "functions.other"),
    ):
        call = Message(
            Role.ASSISTANT, json.dumps(changed), channel=Channel.COMMENTARY, recipient=recipient, content_type="json"
        )
        reward = draw.task.score(draw.instance, Transcript((*gold[:called], call, *gold[called + 1 :])))
        assert reward.value < 0.5
        assert reward.parts["exact"] == 0


def test_a_call_that_fails_is_told():
    answers = Counter(draw.task.gold(draw.instance, Effort.LOW)[-1].text for draw in draws("functions", "train", 300))
    assert 5 < answers[functions.FAILED] < 40


def test_an_answer_with_the_fact_and_a_wrong_citation_is_half_right():
    draw = draws("browsing", "train", 1)[0]
    gold = tuple(draw.task.gold(draw.instance, Effort.LOW))
    for answer in (gold[-1].text.split("【")[0], re.sub("†L\\d+", "†L1", gold[-1].text)):
        reward = draw.task.score(draw.instance, Transcript((*gold[:-1], final(answer))))
        assert reward.parts["found"] == 1
        assert reward.parts["cited"] == reward.parts["exact"] == 0
        assert 0 < reward.value < 1


def test_a_part_of_a_longer_number_is_no_answer():
    task, fact = make("browsing"), Fact("price", "It costs 30 coins.", "30 coins")
    instance = Instance("", "", "", {"quest": browsing._Quest("", ((Entry("good", "Velkor", (fact,)), fact),))})
    assert task.check(instance, "It is 30 coins.") == 1
    assert task.check(instance, "It is 130 coins.") == 0


def test_some_questions_need_a_second_page():
    hops = Counter(len(draw.instance.data["quest"].hops) for draw in draws("browsing", "train", 40))
    assert hops[1] > 10
    assert hops[2] > 5


@pytest.mark.parametrize(
    ("rule", "text", "is_broken"),
    [
        (Rule("pets", None, None), Text("", "", "pets", frozenset()), True),
        (Rule("pets", None, None), Text("", "", "food", frozenset()), False),
        (Rule(None, "price", None), Text("", "", "food", frozenset({"price"})), True),
        (Rule("pets", "price", None), Text("", "", "pets", frozenset()), False),
        (Rule("pets", None, "place"), Text("", "", "pets", frozenset({"place"})), False),
        (Rule("pets", None, "place"), Text("", "", "pets", frozenset({"price"})), True),
    ],
)
def test_a_rule_is_broken_by_what_it_says(rule, text, is_broken):
    assert rule.is_broken_by(text) is is_broken
    assert rule.finding(text).endswith("broken" if is_broken else "kept")


def test_a_finding_names_each_part_of_a_rule_and_whether_it_is_there():
    text = Text("I need a bet for Kran.", "bet", "gambling", frozenset({"person"}))
    assert Rule("gambling", None, "price").wording() == "gambling unless price"
    assert Rule("gambling", None, "price").finding(text) == "gambling+ unless price-, broken"
    assert Rule("food", "person", None).finding(text) == "food- with person+, kept"
    assert Rule(None, "person", None).finding(text) == "person+, broken"


def test_names_of_places_have_an_ending_behind_a_vowel_alone():
    """Behind a consonant the vocabulary would need a piece for each pair of them."""
    rng = random.Random(0)
    ends = [match for _ in range(500) if (match := re.fullmatch(r"(\w+)(ford|haven|burg)", place(rng)))]
    assert len(ends) > 20
    assert all(match[1][-1] in "aeiou" for match in ends)


def test_held_out_policies_have_a_rule_that_was_never_trained():
    for split in ("train", "held_out"):
        for draw in draws("policies", split, 60):
            assert any(rule.is_held_out for rule in draw.instance.data["rules"]) == (split == "held_out")


def test_no_policy_has_a_rule_twice():
    for draw in draws("policies", "train", 60):
        rules = draw.instance.data["rules"]
        assert len(set(rules)) == len(rules)


def test_verdicts_are_of_both_kinds():
    verdicts = Counter(draw.instance.data["verdict"]["violation"] for draw in draws("policies", "train", 200))
    assert min(verdicts.values()) > 60


def test_what_the_model_cannot_know_is_said_to_be_unknown():
    answers = Counter(draw.instance.answer == ABSTENTION for draw in draws("about", "train", 300))
    assert 80 < answers[True] < 160


def test_json_is_compared_by_value_and_type():
    assert same_json('{"b": true, "a": 1}', {"a": 1, "b": True})
    assert not same_json('{"a": true}', {"a": 1})
    assert not same_json('{"a": "1"}', {"a": 1})
    assert not same_json('{"a": 1, "b": 2}', {"a": 1})
    assert not same_json("[1]", {"a": 1})
    assert not same_json("{", {})


def test_a_pattern_that_no_training_would_see_is_refused():
    with pytest.raises(ValueError, match="are held out; give it another wording"):
        Phrases("Who is {name}?", "[Tell me|Find] the designer of the {name}.")


def test_phrases_have_two_sides_and_every_form_is_on_one():
    assert expand("[a|b] {x}[?|]") == ["a {x}?", "a {x}", "b {x}?", "b {x}"]
    phrases = Phrases("[a|b|c|d|e|f|g|h] {x}[?|.|!|]")
    trained, held_out = phrases.forms(False), phrases.forms(True)
    assert len(trained) + len(held_out) == 32
    assert held_out
    rng = random.Random(0)
    assert {phrases.pick(rng, True, x=1) for _ in range(200)} == {form.format(x=1) for form in held_out}
    assert all(is_held_out(invented_word(rng, True)) for _ in range(50))


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "browsing"])
def test_a_conversation_goes_on_with_other_exercises_under_the_same_opening(name, split):
    rng = random.Random(3)
    for draw in draws(name, split, 10):
        once = gold_conversation(draw)
        turns = gold_conversation_of_turns(draw, 3, rng)
        assert turns.messages[: len(once.messages)] == once.messages
        later = turns.messages[len(once.messages) :]
        assert [m.role for m in later].count(Role.USER) == 2
        assert all(m.role in (Role.USER, Role.ASSISTANT, Role.TOOL) for m in later)
        assert later[-1].channel == Channel.FINAL


@pytest.mark.parametrize("name", [name for name in NAMES if name != "browsing"])
def test_a_further_exercise_is_of_the_same_side_and_its_gold_is_right(name):
    rng = random.Random(4)
    for split in ("train", "held_out"):
        for draw in draws(name, split, 10):
            again = draw.task.again(draw.instance, rng)
            assert draw.task.is_held_out(again) == (split == "held_out")
            gold = tuple(draw.task.gold(again, draw.effort))
            is_known = gold[-1].text != TAKES_EFFORT
            assert draw.task.score(again, Transcript(gold)).value == pytest.approx(1.0 if is_known else 0.1)


def test_browsing_has_no_further_exercise():
    (draw,) = draws("browsing", "train", 1)
    assert draw.task.again(draw.instance, random.Random(0)) is None
    assert len(gold_conversation_of_turns(draw, 3, random.Random(0)).messages) == len(gold_conversation(draw).messages)


def test_a_flag_that_nobody_asks_for_is_not_given():
    given = Counter()
    for draw in draws("functions", "train", 300):
        wanted = draw.instance.data["wanted"]
        for parameter in wanted.parameters if wanted else ():
            if parameter.kind == "flag":
                is_given = parameter.key in draw.instance.data["arguments"]
                assert is_given == (parameter.said in draw.instance.prompt)
                given[is_given] += 1
    assert given[True] > 10
    assert given[False] > 10
