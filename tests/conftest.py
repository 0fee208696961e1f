"""What every test runs under: strict dtype promotion, and warnings as errors.

The warnings are pytest's `filterwarnings` in pyproject.toml. JAX's promotion mode is set here,
before a test module can trace anything under the other one.
"""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# The tests compile much and compute little.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config):
    """The workers of a run, and later runs, share what they compile; `--cache-clear` forgets it."""
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Two workers may meet at one entry, of which one then compiles for itself.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation"
    )


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
