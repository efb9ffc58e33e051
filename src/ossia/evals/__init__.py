"""The model card's evaluations, asked of any server of the Responses API.

benchmarks.py  what is asked and which answers are right: AIME, GPQA Diamond, MMLU
answers.py     the answer in what a model said
data.py        the questions, from where they are published or from a file
card.py        what the model card reports, and others have measured
run.py         a benchmark asked at one effort: many at once, kept line by line, gone on with
"""
