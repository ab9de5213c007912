"""The survey: how much of transformers and diffusers plans, runs in half its memory, and gives eager's bits.

`python -m tests.survey` builds every model tiny and random, plans it at half of its memory, and compares; `results.md` is what
came out last. Not part of the test suite: it takes an hour.
"""
