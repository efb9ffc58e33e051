"""The answer in what a model said: a whole number, or the letter of a choice."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\(?:boxed|framebox)\s*\{")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textrm|,|;|!)\s*|[{}$*_`\s]")
_NUMBER = re.compile(r"(\d[\d,]*)(?:\.0+(?!\d))?")
# Between thousands, and of units such as cm^2.
_IN_NUMBER = re.compile(r"\{,\}|\\[,!]|\^(?:\d|\{\d+\})")


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, braces within it included; None without one that is closed."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if not depth:
                return text[match.end() : i]
    return None


def whole_number(text: str) -> int | None:
    """The number of the last box, or else the last whole number of the text; None where there is none.

    Thousands may be parted by commas. Of several numbers in a box, as "x = 12", the last counts.
    """
    box = boxed(text)
    found = _NUMBER.findall(_IN_NUMBER.sub("", box) if box is not None else text)
    return int(found[-1].replace(",", "")) if found else None


# From the plainest to the vaguest; of one kind the last counts, since people and models correct themselves. What a text
# calls its answer goes before options that it tells of besides, most often of why they are wrong.
_LETTER = r"[(\[*_`\s\"'“«]*([A-Z])(?![A-Za-z0-9'’])"
_OPENING = re.compile(r"^\s*[(\[*_`]*([A-Z])[)\]*_`]*(?:\s*[).:\-–—].*)?$", re.MULTILINE)
_ANSWERS = (
    re.compile(
        r"(?i:answers?(?:\s+(?:choice|option))?)\b[\s*_]*(?:[:\-–]|(?i:is|would\s+be|must\s+be|should\s+be)\b)[\s:*_\-–]*"
        rf"(?:(?i:option|choice)\b)?{_LETTER}"
    ),
    # As models say it that were asked in MMMLU's languages.
    re.compile(
        r"(?i:antwort|respuesta|réponse|risposta|resposta|jawaban|jibu|ìdáhùn|idahun|उत्तर|উত্তর|الإجابة|الجواب|答案|答え|回答"
        r"|解答|正解|정답|답변|답)(?:\s*(?i:correct[ae]|corretta|yang\s+benar|sahihi|tó\s+tọ́|الصحيحة))?"
        r"(?:\s*(?i:ist|es|est|è|é|adalah|ni|हैं?|হলো?|هي|هو|是|为|為|は|은|는))?[\s:：*_\-–]*"
        rf"{_LETTER}"
    ),
    re.compile(
        r"(?<![A-Za-z0-9'’])[(\[*_`\"“«]*([A-Z])[)\]*_`\"”».]*\s+(?i:is|would\s+be)\s+"
        r"(?i:(?:the\s+)?(?:only\s+)?(?:correct|right|best|true))\b"
    ),
    re.compile(rf"(?i:answers?)\b[\s:*_\-–]*{_LETTER}"),
)
_OPTIONS = (
    re.compile(rf"(?i:option|choice)\b(?:\s+(?i:is|would\s+be|must\s+be))?[\s:*_\-–]*{_LETTER}"),
    re.compile(r"(?<![A-Za-z0-9])[(\[]\s*([A-Z])\s*[)\]](?![A-Za-z0-9])"),
    re.compile(r"(?<![A-Za-z0-9*_])(?:\*{1,2}|_{1,2})\s*([A-Z])(?:[).:][^*_\n]*)?\s*(?:\*{1,2}|_{1,2})(?![A-Za-z0-9])"),
)


def letter(text: str, letters: str = "ABCD") -> str | None:
    """The choice that a text names: in a box, as its answer, at the beginning of a line, in brackets, or bold."""
    box = boxed(text)
    if box is not None and (match := re.match(rf"\(?([{letters}])(?![A-Za-z])", _WRAPPED.sub("", box))):
        return match[1]
    opening = _found(_OPENING, text, letters)
    # Several are a list of all the choices.
    first = opening if len(set(opening)) == 1 else []
    others = (_found(pattern, text, letters) for pattern in _OPTIONS)
    for found in (*(_found(pattern, text, letters) for pattern in _ANSWERS), first, *others, opening):
        if found:
            return found[-1]
    return None


def _found(pattern: re.Pattern[str], text: str, letters: str) -> list[str]:
    return [match[1] for match in pattern.finditer(text) if match[1] in letters]
