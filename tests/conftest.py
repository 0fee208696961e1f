"""What every test runs under: strict dtype promotion, and warnings as errors.

The warnings are pytest's `filterwarnings` in pyproject.toml. JAX's promotion mode is set here,
before a test module can trace anything under the other one.
"""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# The tests compile much and compute little.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """Run one test in double precision; single precision is back when it ends."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """Run one test under JAX's usual promotion, for what calls code that strict promotion refuses.

    optax.adam is such code: it raises a Python float to the power of an integer step count.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield
