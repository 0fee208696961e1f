"""How well the data determine the weights of a solution: their covariance.

The curvature of the objective at the solution is taken as that of a normal distribution. It comes
from the singular values of the whole Jacobian, which `varprox.problem.covariance` makes deviations
of.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from varprox.checks import kind
from varprox.numerics.krylov import after, norm
from varprox.precision import full_products
from varprox.problem.covariance import Covariance, deviations, times_derivative
from varprox.problem.data import automatic, check_data, check_w
from varprox.problem.model import Problem
from varprox.problem.traits import derivatives
from varprox.problem.weighted import counted, plain, rooted


def covariance(problem: Problem, solution: Any, data: tuple) -> Covariance:
    """The covariance of θ and W together at trained weights, with their standard errors.

    Given this covariance, `predict` has standard deviations, too.

    Under least squares it is s² (JᵀJ + P)⁻¹, where J is the Jacobian of all residuals in θ and W
    and P the second derivative of the penalties, where it is positive, times the number of samples.
    Without penalties this is what SciPy's ``curve_fit`` returns as ``pcov``. The noise is taken to
    be independent and of the same size in all samples and outputs; s² is the sum of squared
    residuals, divided by the number of residuals less the number of weights. Where penalties hold
    weights, or the data leave some open, fewer weights are counted: the trace of J (JᵀJ + P)⁻¹ Jᵀ.
    Noise of different sizes asks for data with the weights 1 / σ². Residuals and rows of J are then
    multiplied by the roots of the weights, and gaps are no residuals.

    Under another loss it is Laplace's approximation (N ∇²Φ)⁻¹ for N samples, without s²: the loss
    is taken as the negative logarithm of a likelihood, which cross entropies are.

    In both cases second derivatives of the features are left out, as by Gauss and Newton, and
    penalties count as the knowledge that there was before the data: the result is the covariance of
    the weights given the data, and not how much an estimate that they pull to zero would scatter.
    Both hold near a minimum only, and where the weights are known well enough for the model to be
    linear that far.

    A direction counts as open where its singular value, with the columns of J scaled to one size,
    is below eps times the number of weights times the largest. J is held as a whole, (batch ·
    outputs, weights), which is meant for up to some thousand weights. It takes a forward pass for
    each weight. Features without a derivative in forward mode take a reverse pass for each
    prediction.

    Arguments:
        problem: The `Problem` that was solved; its head must not be convolutional. If features
            learn from batches, pass ``solution.problem``, as to `predict`.
        solution: The `Solution`, or anything else with weights ``theta`` and ``w``, such as
            ``solution.best`` or the state of a method.
        data: The data that the problem was solved for, with the weights if there are any.

    Returns:
        The `Covariance`, infinite where the data leave a weight open. It is infinite throughout
        if there are no more residuals than weights to tell the noise from.

    Raises:
        TypeError: If `solution` has no weights, if the features have a derivative neither in
            forward nor in reverse mode, and in the cases in which `solve_w` does.
        ValueError: If the weights ``w`` are not those of such rows and targets, and in the cases in
            which `solve_w` does.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> inputs = jnp.linspace(0, 1, 50)[:, None]
        >>> noise = 0.01 * jax.random.normal(jax.random.key(0), inputs.shape)
        >>> data = inputs, 2 * jnp.exp(-3 * inputs) + noise
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> solution = vp.fit(problem, jnp.ones(1), data, max_work=100)
        >>> found = vp.covariance(problem, solution, data)
        >>> print(f"{solution.theta[0]:.2f} ± {found.theta_std[0]:.2f}")
        3.01 ± 0.01
        >>> at = problem, solution.theta, solution.w
        >>> predictions, std = vp.predict(*at, inputs, covariance=found)
        >>> std.shape
        (50, 1)

    Source:
        Bates and Watts, Nonlinear Regression Analysis and Its Applications (1988), chapter 2; the
        number of weights that count: MacKay, Neural Computation 4 (1992) 415.
    """
    if not (hasattr(solution, "theta") and hasattr(solution, "w")):
        raise TypeError(
            "solution: expected a varprox.Solution or something else with theta and w, got "
            f"{kind(solution)}"
        )
    w = automatic(solution.w)
    theta, data = check_data(problem, solution.theta, data)
    check_w(problem, theta, w, data)
    forward, reverse = derivatives(problem, theta, data[0])
    if not (forward or reverse):
        raise TypeError("problem: expected features with a derivative, got some without one")
    return _covariance(problem, theta, w, data, forward=forward)


@partial(jax.jit, static_argnames="forward")
@full_products
def _covariance(problem, theta, w, data, *, forward):
    inputs, targets = data
    flat, unravel = ravel_pytree((theta, w))
    size = flat.size

    def predictions_at(flat):
        theta, w = unravel(flat)
        return (problem.rows(theta, inputs) @ w).reshape(-1)

    predictions = predictions_at(flat).reshape(targets.shape)
    jacobian = times_derivative(
        predictions_at, flat, jnp.eye(size, dtype=flat.dtype), forward=forward
    )
    rows = _rows(problem.loss, predictions, targets, jacobian.reshape(*targets.shape, size))
    penalties = jnp.sqrt(len(targets)) * _penalty_root(problem, theta, w, rows)
    axes, inverse = _axes(jnp.concatenate([rows, penalties]))
    known = jnp.isfinite(inverse)
    noise = jnp.ones((), flat.dtype)
    if problem.loss.quadratic:
        held = norm(penalties @ (axes * jnp.where(known, inverse, 0)[None])) ** 2
        freedom = counted(targets) - (jnp.sum(known, dtype=flat.dtype) - held)
        enough = freedom > size * jnp.finfo(flat.dtype).eps
        residual = rooted(targets, predictions - plain(targets))
        noise = norm(residual) / jnp.sqrt(jnp.where(enough, freedom, 1))
        noise = jnp.where(enough, noise, jnp.inf)
    spreads = jnp.where(known, noise * inverse, jnp.inf)

    std = deviations(spreads, axes)
    scaled = axes * jnp.where(jnp.isfinite(spreads), spreads, 0)[None]
    unknown = ~jnp.isfinite(std)
    theta_std, w_std = unravel(std)
    return Covariance(
        theta_std=theta_std,
        w_std=w_std,
        matrix=jnp.where(unknown[:, None] | unknown[None], jnp.inf, scaled @ scaled.T),
        noise_std=noise,
        axes=axes,
        spreads=spreads,
    )


def _rows(loss, predictions, targets, jacobian):
    """Rows whose Gram matrix is the sum over samples of Jᵀ Q J, for J (batch, outputs, size)."""
    if loss.quadratic:
        jacobian = jax.vmap(partial(rooted, targets), 2, 2)(jacobian)
    else:
        units = jnp.eye(targets.shape[1], dtype=targets.dtype)

        def root_of(prediction, target):  # Lᵀ, where Q = L Lᵀ
            target = jax.tree.map(lambda leaf: leaf[None], target)
            along = lambda v: loss.curvature_root(prediction[None], target, v[None])[0]  # noqa: E731
            return jax.vmap(along)(units)

        jacobian = jax.vmap(root_of)(predictions, targets) @ jacobian
    return jacobian.reshape(-1, jacobian.shape[-1])


def _penalty_root(problem, theta, w, before):
    """Rows whose Gram matrix is the second derivative of the penalties in (θ, W), where it is
    positive; found once `before` is."""
    flat, unravel = ravel_pytree(theta)
    root = jnp.zeros((0, flat.size), flat.dtype)
    if problem.theta_penalty:
        hessian = jax.hessian(lambda flat: problem.penalty(unravel(flat)))(flat)
        values, vectors = jnp.linalg.eigh(after(norm(before), hessian))
        rounding = flat.size * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(values))
        root = jnp.sqrt(jnp.where(values > rounding, values, 0))[:, None] * vectors.T
    of_w = jnp.sqrt(problem.w_penalty_like(w)) * jnp.eye(w.size, dtype=w.dtype)
    return jax.scipy.linalg.block_diag(root, of_w)


def _axes(rows):
    """Axes A, the columns of a matrix, and inverse lengths s for which A diag(s²) Aᵀ is the inverse
    of rowsᵀ rows; infinite for the axes that the rows do not determine."""
    size, eps = rows.shape[1], jnp.finfo(rows.dtype).eps
    largest = jnp.max(jnp.abs(rows), axis=0)
    units = jnp.where(largest > 0, largest, 1)
    factor = jnp.linalg.qr(rows / units[None], mode="r")
    _, lengths, vt = jnp.linalg.svd(jnp.pad(factor, ((0, size - len(factor)), (0, 0))))
    known = lengths > size * eps * lengths[0]
    return vt.T / units[:, None], jnp.where(known, 1 / jnp.where(known, lengths, 1), jnp.inf)
