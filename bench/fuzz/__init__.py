"""Mutated files of every format: one line and exit code 2, or a result; never anything else.

    python -m bench.fuzz --count 50000 --seed 0 [--only tar]

builds small valid files (`seeds`), damages one at a time (`mutations`), gives it to the command
that reads it (`trial`) and counts the outcomes. Exit code 1 if there is a fault.
"""
