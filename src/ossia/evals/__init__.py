"""The model card's evaluations, asked of any server of the Responses API.

benchmarks.py  what is asked and what marks an answer: AIME, GPQA Diamond, MMLU, MMMLU, SimpleQA, HealthBench
hierarchy.py   a benchmark that is made here: who wants a rule of the developer's broken
asking.py      a question, in its file and as it is put to a model
answers.py     the answer in what a model said
judged.py      what a model is asked that judges answers
data.py        the questions, from where they are published or from a file
card.py        what the model card reports, and others have measured
run.py         a benchmark asked at one effort: many at once, kept line by line, gone on with
"""
