"""Experiments that compare the methods of varprox with what else one would use.

`python -m benchmarks --help` lists them.
"""

import os

# Before anything loads OpenBLAS, which jax uses for factorisations on CPU. Its threads wait busily
# for some 25 ms after every call, and keep the processors from the threads of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
