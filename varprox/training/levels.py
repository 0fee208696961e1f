"""Training from coarse to fine: one run of `fit` after the other."""

from collections.abc import Callable, Sequence
from typing import Any

from varprox.checks import check_integer
from varprox.methods.method import Method, Status
from varprox.training.fit import attach, fit
from varprox.training.solution import Solution, join


def fit_levels(
    make: Callable[[int, Solution | None], Method],
    theta: Any,
    data: tuple,
    *,
    levels: int,
    prolong: Callable[[Any], Any],
    max_work: float | Sequence[float] | None = None,
    **options,
) -> Solution:
    """Trains from coarse to fine: runs ``fit`` level by level and prolongs θ in between.

    A network that is a flow in time can be trained with few time steps, and so with few weights,
    first. Each level starts from the prolonged weights of the level before. The problems of the
    levels may differ in their penalties, not in their model.

    The history concatenates the levels, with a column ``level`` that counts from zero. Work units
    and seconds accumulate, although a work unit costs more on a finer level. The first entry of
    each level is its start, where the columns of the method's info are NaN. A level whose budget
    allows no step has no other entry. If a level ends with a non-finite objective or by Ctrl-C, no
    further level runs. An exception has what was found before it, of all levels, as its attribute
    ``solution``.

    Arguments:
        make: A function ``(level, solution) -> method``. It gets the ``Solution`` of the level
            before, or None on level 0, and returns a ``Method``.
        theta: The initial nonlinear weights θ of level 0, a pytree.
        data: The data, as for ``fit``.
        levels: The number of levels, an integer ≥ 1.
        prolong: A function that maps the θ of one level to the next, such as
            ``varprox.networks.prolong``, which doubles the time steps of a network.
        max_work: The budget of each level in work units, or a sequence with one budget per level.
        **options: The other options of ``fit`` but ``start`` and ``checkpoint``, which are of a
            single run. ``max_seconds`` and ``epochs`` also are budgets of each level.

    Returns:
        The ``Solution`` of the last level, with the history and the compile time of all levels.

    Raises:
        TypeError: If ``make`` is not a function, and as ``fit`` does.
        ValueError: If ``levels`` is not an integer ≥ 1, if ``max_work`` is a sequence with another
            number of entries, and as ``fit`` does.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> def features(theta, z):  # one Euler step per weight
        ...     for weight in theta:
        ...         z = z + jnp.tanh(weight * z) / len(theta)
        ...     return z
        >>> problem = vp.Problem(vp.Separable(features), vp.least_squares(), theta_penalty=1e-3)
        >>> inputs = jnp.linspace(-1, 1, 20)[:, None]
        >>> solution = vp.fit_levels(
        ...     lambda level, before: vp.lbfgsvpro(problem), jnp.ones(1), (inputs, inputs**3),
        ...     levels=2, prolong=lambda theta: jnp.repeat(theta, 2), epochs=2,
        ... )
        >>> solution.theta.shape, solution.history["level"].tolist()
        ((2,), [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    """
    if not callable(make):
        raise TypeError(f"make: expected a function (level, solution) -> Method, got {make!r:.80}")
    for name in ("start", "checkpoint"):
        if options.get(name) is not None:
            raise ValueError(f"{name}: expected none for levels, each a run of its own, got one")
    levels = check_integer("levels", levels, least=1)
    budgets = list(max_work) if isinstance(max_work, Sequence) else levels * [max_work]
    if len(budgets) != levels:
        raise ValueError(f"max_work: expected {levels} numbers, one a level, got {max_work!r}")
    found: list[Solution] = []
    for level, budget in enumerate(budgets):
        before = found[-1] if found else None
        start = theta if before is None else prolong(before.theta)
        try:
            found.append(fit(make(level, before), start, data, max_work=budget, **options))
        except Exception as error:  # which has what this level had found, if that was anything
            if hasattr(error, "solution"):
                found.append(error.solution)
            if found:
                attach(error, join(found))
            raise
        if found[-1].status in (Status.NON_FINITE, Status.INTERRUPTED):
            break
    return join(found)
