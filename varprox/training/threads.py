"""One thread for BLAS while a run lasts.

On CPU JAX factorises matrices by the LAPACK that SciPy brings, mostly OpenBLAS. Its threads wait
busily after every call, which keeps the processors from XLA's own threads, and where other
processes want the processors, too, a factorisation waits for threads that are not running: one of a
100 × 100 matrix then takes 100 ms instead of 0.2 ms.
"""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, Thread

import jax
from threadpoolctl import threadpool_limits

# The number of threads is the process's. Runs may overlap, and the last to end restores it.
_lock, _undo = Lock(), ExitStack()
_under_way: list[object] = []


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS uses one thread inside this context, or function, if JAX computes on CPU.

    The limit holds for all threads of the process. What was before it is back at the end of the
    last of the contexts that overlap. A limit that the caller has set by threadpoolctl 3.8 or newer
    stays as it is.
    """
    if jax.default_backend() != "cpu":
        yield
        return
    importlib.import_module("scipy.linalg.cython_lapack")  # only a loaded library can be limited
    with _lock:
        if not _under_way:
            _apart(lambda: _undo.enter_context(threadpool_limits(1, user_api="blas")))
        _under_way.append(None)
    try:
        yield
    finally:
        with _lock:
            _under_way.pop()
            if not _under_way:
                _apart(_undo.close)


def _apart(fn):
    """Calls `fn` in a thread of its own: threadpoolctl lets only the thread that has set a limit
    change it while this thread lives."""
    thread = Thread(target=fn)
    thread.start()
    thread.join()
