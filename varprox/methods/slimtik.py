"""slimTik: sampled limited-memory Tikhonov regularisation, for design rows and targets alone.

It follows the solution of a ridge regression whose rows arrive in batches, and chooses the
regularisation parameter on the way.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jax.tree_util import Partial

from varprox.checks import check_array, check_integer, check_number, shown
from varprox.methods.method import check_state
from varprox.methods.selection import Fit, Trials, sgcv, tries
from varprox.precision import full_products
from varprox.problem.heads import Moments, dense
from varprox.problem.weighted import Targets, mapped, means, plain, shifted


class State(NamedTuple):
    """W and what the next update of slimTik needs.

    Attributes:
        w: W, (columns, outputs).
        lambda_sum: ΣΛ.
        grams: A ring of the Gram matrices AᵀA of the last batches, (memory + 1, columns, columns);
            (memory + 1, outputs, columns, columns) if outputs have weights of their own.
        place: The place in the ring for the next Gram matrix.
    """

    w: jax.Array  # (columns, outputs)
    lambda_sum: jax.Array  # ΣΛ
    grams: jax.Array  # a ring of AᵀA of the last batches
    place: jax.Array  # of the next one in the ring


class Info(NamedTuple):
    """What an update of slimTik did.

    Attributes:
        lambda_: The Λ that was chosen.
        lambda_sum: ΣΛ after the update.
        trace: The trace of A B Aᵀ, over all scalar residuals of the batch.
        residual: ‖A W − c‖² at the new W.
        value: The value of the selection.
        finite: Whether the batch was finite. If not, W and all else stayed as they were.
    """

    lambda_: jax.Array
    lambda_sum: jax.Array  # after the update
    trace: jax.Array  # of A B Aᵀ, over all residuals of the batch
    residual: jax.Array  # ‖A w − c‖² at the new W
    value: jax.Array  # of the selection function
    finite: jax.Array  # False where the batch was not; W and all else then stay as they were


class Options(NamedTuple):
    """Those of `slimtik`, checked."""

    memory: int
    selection: Partial
    initial: float
    lower_bound: float


class SlimTik(NamedTuple):
    """A pair of pure functions: ``state = init(w)`` and
    ``state, info = update(state, rows, targets)``."""

    init: Callable
    update: Callable


def slimtik(
    memory: int = 5,
    selection: Callable | None = None,
    *,
    initial: float = 0.05,
    lower_bound: float = 1e-7,
) -> SlimTik:
    """slimTik: W from batches of design rows, by sampled limited-memory Tikhonov steps.

    Every batch with rows A and targets c gives one step of Newton's method for W, with the Gram
    matrices of this batch and of the `memory` batches before it::

        W ← W − (M + (ΣΛ + Λ) I)⁻¹ (Aᵀ(A W − c) + Λ W),   ΣΛ ← ΣΛ + Λ,   M = Σ AᵀA in memory

    The regularisation parameter Λ is chosen at every step and may be negative. ΣΛ is never below
    `lower_bound`; if it is less than the rounding error of M, it counts as that much. The outputs
    share one Gram matrix. The selections are:

    ===================  ==================  =================================  ==================
    selection            needs               chooses                            factorisation of M
    ===================  ==================  =================================  ==================
    `sgcv()`             nothing             Λ by generalised cross validation  eigenvectors
    ``supre(variance)``  the noise variance  Λ by the predictive risk           eigenvectors
    ``sdp(variance)``    the noise variance  Λ by the discrepancy principle     eigenvectors
    `proportional()`     nothing             a ΣΛ that starts high and decays   Cholesky
    ``constant(value)``  Λ                   the same Λ at every step           Cholesky
    ===================  ==================  =================================  ==================

    In the eigenbasis of M a trial of Λ costs little. `proportional` and `constant` try none: they
    take the Cholesky factorisation, which costs less. Except for `supre` and `sdp`, which know the
    noise, the selections do not depend on the unit of the targets: Λ is the same in other units,
    and W is in proportion.

    Arguments:
        memory: The number of earlier batches whose Gram matrices are kept, an integer ≥ 0.
        selection: How Λ is chosen, one of the table or a function of your own,
            ``select(trials, count, lambda_sum, lower_bound) -> (lambda_, value)``. There
            ``trials(lambda_)`` is the pair of the squared residual ‖A W − c‖² and the trace of A B
            Aᵀ with B = (M + (ΣΛ + Λ) I)⁻¹, both over the `count` scalar residuals of the batch.
            `trials.scale` is the mean eigenvalue of M, and `trials.row` the mean squared norm of a
            row in memory. None, the default, means `sgcv()`.
        initial: ΣΛ at the start, a finite number ≥ 0.
        lower_bound: The least ΣΛ, a finite number ≥ 0.

    Returns:
        A pair of pure functions, `init` and `update`. ``state = init(w)`` starts at W
        (columns, outputs), float32 or float64, with nothing remembered.
        ``state, info = update(state, rows, targets)`` takes rows (batch, columns) and targets
        (batch, outputs) as they are, in the dtype of W. The new W is `state.w`. The scalars
        `info.lambda_`, `info.lambda_sum`, `info.trace`, `info.residual` (at the new W) and
        `info.value` (of the selection) say what was done. A batch that is not finite changes
        nothing and sets `info.finite` to False. Both functions raise ValueError for shapes and
        TypeError for dtypes that do not fit.

    Raises:
        TypeError: If `selection` is not callable, or if `initial` or `lower_bound` is not a number.
        ValueError: If `memory` is not an integer ≥ 0, or if `initial` or `lower_bound` is negative
            or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> slimtik = vp.slimtik(memory=5, selection=vp.constant(0.0), initial=1e-3)
        >>> state = slimtik.init(jnp.zeros((2, 1)))
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> for _ in range(3):
        ...     state, info = slimtik.update(state, rows, rows @ jnp.array([[3.0], [1.0]]))
        >>> [round(float(x), 2) for x in state.w[:, 0]]
        [3.0, 1.0]

    Source:
        Newman, Chung, Chung, Ruthotto, arXiv:2109.14002, section 3; Chung, Chung, Slagel, Tenorio,
        Inverse Problems 36 (2020).
    """
    options = checked(memory, selection, initial, lower_bound)
    return SlimTik(partial(start_tikhonov, options), partial(_update, options))


def checked(memory, selection, initial, lower_bound) -> Options:
    """Refuses what are no options with a TypeError or ValueError."""
    memory = check_integer("memory", memory, least=0)
    initial = check_number("initial", initial)
    lower_bound = check_number("lower_bound", lower_bound)
    selection = sgcv() if selection is None else selection
    if not callable(selection) or not _takes_trials(selection):
        raise TypeError(
            f"selection: expected one such as varprox.sgcv(), a function of four arguments, got "
            f"{shown(selection)}"
        )
    selection = selection if isinstance(selection, Partial) else Partial(selection)
    return Options(memory, selection, initial, lower_bound)


def _takes_trials(selection):
    """Does its signature take the arguments that `slimtik` gives?"""
    try:
        inspect.signature(selection).bind(*4 * [None])
    except TypeError:
        return False
    except ValueError:  # it has none
        pass
    return True


def start_tikhonov(options: Options, w: jax.Array, *, shared: bool = True) -> State:
    """The state at W (columns, outputs), with nothing remembered; not `shared` where each output
    has a Gram matrix of its own."""
    check_array("w", w)
    if jnp.ndim(w) != 2:
        raise ValueError(f"w: expected shape (columns, outputs), got {jnp.shape(w)}")
    w, (columns, outputs) = jnp.asarray(w), jnp.shape(w)
    kept = options.memory + 1, *(() if shared else (outputs,))
    if w.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"w: expected float32 or float64, got {w.dtype}; cast it to float32, as there are no "
            "factorisations in other precisions"
        )
    return State(
        w,
        jnp.maximum(*(jnp.asarray(x, w.dtype) for x in (options.initial, options.lower_bound))),
        jnp.zeros((*kept, columns, columns), w.dtype),
        jnp.zeros((), jnp.int32),
    )


def _update(options, state, rows, targets):
    check_state("slimtik", isinstance(state, State), state)
    check_array("rows", rows)
    check_array("targets", targets)
    columns, outputs = state.w.shape
    if jnp.ndim(rows) != 2 or rows.shape[1] != columns:
        raise ValueError(
            f"rows: expected shape (batch, {columns}), as W asks for, got {jnp.shape(rows)}"
        )
    if len(rows) == 0:
        raise ValueError("rows: expected at least one row, got none")
    if jnp.shape(targets) != (len(rows), outputs):
        raise ValueError(
            f"targets: expected shape {(len(rows), outputs)}, got {jnp.shape(targets)}"
        )
    check_dtype(state.w, rows=rows, targets=targets)
    return _update_checked(options, state, rows, targets)


def check_dtype(w, **arrays) -> None:
    """Refuses arrays of another dtype than W has with a TypeError."""
    for name, array in arrays.items():
        came = jnp.result_type(array)
        if came != w.dtype:
            raise TypeError(f"{name}: expected dtype {w.dtype}, that of W, got {came}; cast them")


@jax.jit
@full_products
def _update_checked(options, state, rows, targets):
    moments = dense(bias=False).moments(rows, state.w, targets)
    return tikhonov_step(options, state, moments, targets.size)


def tikhonov_step(options: Options, state: State, batch: Moments, count) -> tuple[State, Info]:
    """The update for a batch of `count` scalar residuals, of which no more is known than this.

    What is (columns, outputs) where the outputs share a Gram matrix is (outputs, columns, 1) where
    they do not.
    """
    shared = state.grams.ndim == 3
    arranged = lambda x: x if shared else x.T[:, :, None]  # noqa: E731
    batch = batch._replace(gradient=arranged(batch.gradient))
    w, lambda_sum = arranged(state.w), state.lambda_sum
    lower_bound = jnp.asarray(options.lower_bound, w.dtype)  # under trace it may have another
    others = jnp.arange(len(state.grams), dtype=jnp.int32) != state.place
    total = batch.gram + jnp.tensordot(others.astype(w.dtype), state.grams, 1)
    trace, rounding = _trace(total), 4 * jnp.finfo(w.dtype).eps

    def ridge(lambda_):
        least = rounding * trace  # what is added to M and not lost to rounding
        some = jnp.maximum(lambda_sum + lambda_, least)
        return jnp.where(some > 0, some, 1)  # without any rows there is no gradient to divide

    solver = _in_eigenbasis if tries(options.selection) else _by_cholesky
    change, freedom = solver(total, batch, w, ridge)

    def fit(lambda_):
        step = change(lambda_)
        residual = batch.square + jnp.sum(step * (batch.gram @ step - 2 * batch.gradient))
        # The difference is known to rounding error of what it is taken from, and may be negative.
        return Fit(jnp.maximum(residual, rounding * batch.square), w.shape[-1] * freedom(lambda_))

    rows = count / state.w.shape[1] * len(state.grams)  # in memory, once it is full
    trials = Trials(fit, jnp.mean(trace) / len(state.w), jnp.mean(trace) / rows)
    chosen = options.selection(trials, count, lambda_sum, lower_bound)
    lambda_, value = (jnp.asarray(x, w.dtype) for x in chosen)
    lambda_ = jnp.maximum(lambda_, lower_bound - lambda_sum)
    found = fit(lambda_)
    step = change(lambda_) if shared else change(lambda_)[:, :, 0].T
    new_w, new_sum = state.w - step, jnp.maximum(lambda_sum + lambda_, lower_bound)

    finite = jnp.isfinite(new_w).all() & jnp.isfinite(new_sum)
    choose = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    after = State(
        w=choose(new_w, state.w),
        lambda_sum=choose(new_sum, lambda_sum),
        grams=state.grams.at[state.place].set(choose(batch.gram, state.grams[state.place])),
        place=choose((state.place + 1) % len(state.grams), state.place),
    )
    return after, Info(lambda_, after.lambda_sum, found.trace, found.residual, value, finite)


def _in_eigenbasis(total, batch, w, ridge):
    """Functions of Λ: what W loses, and the trace of A B Aᵀ for one output. In the basis of M a
    trial takes no solve, and no rows."""
    eigenvalues, v = jnp.linalg.eigh(total, symmetrize_input=False)
    eigenvalues = jnp.maximum(eigenvalues, 0)[..., None]  # less is rounding
    gradient, weights = v.mT @ batch.gradient, v.mT @ w
    # Nor has the gradient a part where M is zero to rounding; divided by a small ΣΛ it would drift.
    zero = eigenvalues <= 4 * jnp.finfo(w.dtype).eps * _trace(total)
    gradient = jnp.where(zero, 0, gradient)
    diagonal = jnp.sum(v * (batch.gram @ v), axis=-2)[..., None]

    def change(lambda_):
        return v @ ((gradient + lambda_ * weights) / (eigenvalues + ridge(lambda_)))

    def freedom(lambda_):
        return jnp.sum(diagonal / (eigenvalues + ridge(lambda_)))

    return change, freedom


def _by_cholesky(total, batch, w, ridge):
    """The same by one factorisation for each Λ."""

    def solve(lambda_, right):
        identity = jnp.broadcast_to(jnp.eye(total.shape[-1], dtype=w.dtype), total.shape)
        return cho_solve(cho_factor(total + ridge(lambda_) * identity), right)

    def change(lambda_):
        return solve(lambda_, batch.gradient + lambda_ * w)

    def freedom(lambda_):
        return jnp.sum(_trace(solve(lambda_, batch.gram)))

    return change, freedom


def _trace(matrices):
    """Of a matrix, or of each of several, (outputs, 1, 1)."""
    trace = jnp.trace(matrices, axis1=-2, axis2=-1)
    return trace if matrices.ndim == 2 else trace[:, None, None]


def centre_and_unit(targets: Targets, bias: bool) -> tuple[jax.Array, jax.Array]:
    """What to subtract from targets, (outputs,), and what to divide them by, a scalar.

    The centre is their mean where there is a bias to stand for it, and zero elsewhere. The unit is
    the root mean square of what is left, both weighted. Targets that are constant but for rounding
    are in units of their largest entry, and zeros in units of one.
    """
    largest = jnp.max(jnp.abs(plain(targets)))
    largest = jnp.where(largest > 0, largest, 1)
    shares = mapped(lambda values: values / largest, targets)  # so that no square overflows
    # The mean of equal numbers is exact this way.
    first = plain(shares).reshape(-1, targets.shape[-1])[0]
    mean = first + means(shifted(shares, first))
    centre = mean if bias else jnp.zeros_like(mean)
    squares = mapped(jnp.square, shifted(shares, centre))
    spread = jnp.sqrt(jnp.mean(means(squares)))
    constant = spread <= 4 * jnp.finfo(spread.dtype).eps
    return largest * centre, largest * jnp.where(constant, 1, spread)


def raised(w: jax.Array, centre: jax.Array) -> jax.Array:
    """W whose predictions are higher by the centre, which is zero where there is no bias."""
    return jnp.asarray(w).at[..., -1, :].add(centre)
