"""What every test runs under: strict promotion of dtypes, none of ranks, and warnings as errors.

The warnings are pytest's `filterwarnings` in pyproject.toml. JAX's promotion modes are set here,
before a test module can trace anything under the others.
"""

from pathlib import Path

import jax
import pytest
from repository import build

MOST_MAPS = 20_000  # a module may add as many

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
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


@pytest.fixture(autouse=True, scope="module")
def few_maps():
    """XLA maps memory for each thing it compiles, and crashes where Linux allows no more maps (by
    default 65,530 a process): what is compiled goes before that."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()


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


@pytest.fixture
def rank_promotion():
    """Run one test under JAX's usual broadcasting, for features as people write them, such as
    exp(−t[:, None] · rates)."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The package as a wheel, which Python also imports from."""
    return build("wheel", tmp_path_factory.mktemp("wheel"))
