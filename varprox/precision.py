"""Products in full precision, whatever the device would do by default.

On an accelerator a product of single precision is rounded to TF32 or bfloat16 unless it asks for
more; a solve, a factor or a step made of such products is wrong in its third digit.
"""

from collections.abc import Callable
from functools import wraps

import jax


def full_products(fn: Callable) -> Callable:
    """`fn` with every product and convolution traced inside it in full precision, also those of
    functions that it is given; those that name a precision themselves keep it."""

    @wraps(fn)
    def in_full(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return fn(*args, **kwargs)

    return in_full
