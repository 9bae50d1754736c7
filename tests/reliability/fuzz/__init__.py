"""Fuzzing of every parser: targets, their corpus, and what runs them.

``python -m tests.reliability.fuzz --minutes 10`` runs all targets, with atheris where that is
installed; ``python -m tests.reliability.fuzz.seeds`` writes the corpus. What tests of each run do
is in tests/reliability/test_fuzzing.py.
"""
