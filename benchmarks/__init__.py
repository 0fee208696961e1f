"""Experiments that compare the methods of varprox with what else one would use.

`python -m benchmarks --help` lists them.
"""
