"""A small model of the same architecture, made from nothing: `make nano`, or `python -m ossia.train.nano OUT`.

    recipe.py    the shape and the stages, each a run of `ossia.train`
    make.py      vocabulary, first weights, the stages one after the other, the exported model
    report.py    what was measured, as docs/nano.md with plots

Everything goes into OUT, and what is there is not made again: a run that was ended goes on where it was.
"""
