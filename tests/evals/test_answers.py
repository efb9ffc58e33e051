"""Answers found in what models say."""

from __future__ import annotations

import pytest

from ossia.evals.answers import boxed, letter, whole_number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"So \boxed{204}.", "204"),
        (r"\boxed{\frac{1}{2}} and then \boxed{x = {3}}", "x = {3}"),
        (r"\framebox {7}", "7"),
        (r"\boxed{1} then \boxed{2", "1"),
        ("no box", None),
    ],
)
def test_the_last_box_that_is_closed_counts(text, found):
    assert boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"The answer is $\boxed{073}$.", 73),
        (r"\boxed{1{,}024}", 1024),
        (r"\boxed{m+n = 12}", 12),
        (r"\boxed{\text{none}}", None),
        (r"\boxed{204\text{ cm}^2}", 204),
        (r"\boxed{1\,000}", 1000),
        (r"\boxed{12.0}", 12),
        ("It is 12, so 1,024.", 1024),
        ("none", None),
        ("", None),
    ],
)
def test_a_whole_number(text, found):
    assert whole_number(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A", "A"),
        ("**C**", "C"),
        ("(D)", "D"),
        ("Answer: B", "B"),
        ("**Answer:** A", "A"),
        ("The correct answer is (C).", "C"),
        ("the final answer is **D**, not A.", "D"),
        ("Answer: A. No, wait.\n\nAnswer: B", "B"),
        (r"Hence $\boxed{\textbf{(B)}}$", "B"),
        (r"\boxed{C) 3.2 m}", "C"),
        ("Option C is right", "C"),
        ("I rule out (A) and (B); it must be (D)", "D"),
        ("**B) 2.08 m**", "B"),
        ("The reasons are long.\nB", "B"),
        ("C. Because it is hot", "C"),
        ("A cat sat on the mat", None),
        ("I don't know", None),
        ("Answer: none of them", None),
        ("Answer: E", None),
        ("**Answer: B**\n\nOption A ignores friction, option C does so too", "B"),
        ("Answer: B\n\nExplanation: choice A is true only of mitosis.", "B"),
        ("Answer: C\n\nWhy not answer A? Because it is false.", "C"),
        ("The correct answer is B. Option A is wrong", "B"),
        ("Therefore, the answer is **B**. A common mistake is to choose option A.", "B"),
        ("The correct answer is **Option B**.", "B"),
        ("B – The enzyme in (A) is inhibited", "B"),
        ("**B** – The reaction proceeds via A and (C)", "B"),
        ("**Option B** is correct; option A is wrong", "B"),
        ("A is the correct answer.", "A"),
        ('The answer is "B"', "B"),
        ("The correct choice is option\u202f**D**.", "D"),
        ("A. It is cold.\nB. It is hot.\nI choose option B", "B"),
        ("Respuesta: B. La opción A es incorrecta.", "B"),
        ("", None),
    ],
)
def test_a_letter(text, found):
    assert letter(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "Die richtige Antwort ist C.",
        "La respuesta correcta es C",
        "La réponse est C.",
        "La risposta corretta è **C**",
        "A resposta é C.",
        "答案是C",
        "答えはC",
        "정답은 C입니다",
        "الإجابة الصحيحة هي C",
        "सही उत्तर C है",
        "সঠিক উত্তর: C",
        "Jibu sahihi ni C",
        "Jawaban yang benar adalah C",
        "Ìdáhùn: C",
    ],
)
def test_a_letter_in_the_languages_of_mmmlu(text):
    assert letter(text) == letter(f"A, B, no.\n{text}\nD'accord.") == "C"
