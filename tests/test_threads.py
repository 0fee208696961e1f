"""One thread for BLAS: where the limit holds, and that it goes."""

import threading

import jax
import pytest
import scipy.linalg.cython_lapack  # noqa: F401  loads the library that JAX calls on CPU
from problems import features, initial_theta, make_data
from threadpoolctl import threadpool_info, threadpool_limits

import varprox as vp
from varprox.training.threads import one_blas_thread


def threads():
    """Those of each BLAS library that is loaded."""
    return {i["filepath"]: i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def two_threads():
    """As on a machine with two processors, whatever this one has."""
    limits = []
    apart(lambda: limits.append(threadpool_limits(2, user_api="blas")))
    assert two() and any("scipy" in path for path in threads())
    yield
    apart(limits[0].restore_original_limits)


def apart(fn):
    """A thread that has set a limit, and lives, is the only one that may change it."""
    thread = threading.Thread(target=fn)
    thread.start()
    thread.join()


def one():
    return set(threads().values()) == {1}


def two():
    return set(threads().values()) == {2}


def test_the_limit_ends_with_the_context():
    assert two()
    with one_blas_thread():
        assert one()
    assert two()


def test_the_limit_ends_with_an_exception():
    with pytest.raises(KeyError), one_blas_thread():
        raise KeyError
    assert two()


def test_the_last_of_overlapping_contexts_restores():
    """The first to begin ends first, as runs in threads may."""
    begun, end = threading.Event(), threading.Event()

    def run():
        with one_blas_thread():
            begun.set()
            assert end.wait(60)

    first = threading.Thread(target=run)
    first.start()
    assert begun.wait(60)
    with one_blas_thread():
        end.set()
        first.join()
        assert one()
        with one_blas_thread():
            assert one()
        assert one()
    assert two()


def test_an_accelerator_is_none_of_its_business(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with one_blas_thread():
        assert two()
    assert two()


def test_fit_limits_while_it_runs():
    theta, data = initial_theta(dtype="float32"), make_data("least_squares", 2, dtype="float32")
    problem = vp.Problem(vp.Separable(features), vp.least_squares(), 1e-2, 1e-2)
    seen = []

    def note(predictions, targets):
        seen.append(one())
        return 0.0

    vp.fit(vp.gnvpro(problem), theta, data, epochs=1, metrics={"note": note})
    assert seen == [True, True]
    assert two()
    with pytest.raises(ValueError, match="epochs"):
        vp.fit(vp.gnvpro(problem), theta, data, epochs=-1)
    assert two()
