"""The trust-region subproblem against a dense bisection, and what one iteration promises."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varprox.numerics import trust_region
from varprox.numerics.krylov import KrylovSpace, Tridiagonal

SIZE = 6


def dense(diagonal, off):
    return np.diag(diagonal) + np.diag(off[:-1], 1) + np.diag(off[:-1], -1)


def reference(matrix, gradient, radius):
    """The least value of gᵀs + ½ sᵀHs with ‖s‖ ≤ radius, by bisection on log(σ + λ_min)."""
    eigenvalues, q = np.linalg.eigh(matrix)
    g, gaps = q.T @ gradient, eigenvalues - eigenvalues[0]

    def value(s):
        return g @ s + 0.5 * s @ (eigenvalues * s)

    if eigenvalues[0] > 0 and np.linalg.norm(g / eigenvalues) <= radius:
        return value(-g / eigenvalues)
    low, high = np.log(1e-40), np.log(np.linalg.norm(g) / radius + max(0, eigenvalues[0]) + 1)
    for _ in range(200):
        middle = 0.5 * (low + high)
        long = np.linalg.norm(g / (gaps + np.exp(middle))) > radius
        low, high = (middle, high) if long else (low, middle)
    s = -g / (gaps + np.exp(high))
    missing = radius**2 - s @ s
    if missing > 1e-8 * radius**2:  # the hard case
        s[0] += np.sqrt(missing)
    return value(s)


SPECTRA = {
    "definite": (np.linspace(1, 4, SIZE), np.full(SIZE, 0.7)),
    "indefinite": (np.linspace(-2, 3, SIZE), np.full(SIZE, 0.7)),
    "negative": (np.linspace(-4, -1, SIZE), np.full(SIZE, 0.7)),
    "singular": (np.full(SIZE, 2.0), np.full(SIZE, 1 / np.cos(np.pi / (SIZE + 1)))),
    "tiny": (1e-9 * np.linspace(1, 4, SIZE), np.full(SIZE, 0.7e-9)),
    "ill-conditioned": (np.logspace(0, -10, SIZE), 1e-1 * np.logspace(-1, -10, SIZE)),
    "easily hard": (np.array([3.0, 2, -1, 0, 1, 2]), np.array([0.5, 0, 0.5, 0.5, 0.5, 0])),
}


@jax.jit
def solve(diagonal, off, size, start_norm, radius):
    space = KrylovSpace(
        jnp.eye(SIZE, dtype=off.dtype), Tridiagonal(diagonal, off, size), start_norm
    )
    return trust_region.krylov_step(space, radius)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("radius", [1e-6, 0.1, 1.0, 30.0, 1e6])
def test_subproblem_is_solved_as_a_dense_bisection_does(spectrum, radius, x64):
    """Interior, boundary, indefinite and hard cases: no feasible point is better."""
    diagonal, off = SPECTRA[spectrum]
    matrix, gradient = dense(diagonal, off), 2.0 * np.eye(SIZE)[0]
    result = solve(diagonal, off, np.int32(SIZE), 2.0, radius)
    s = np.asarray(result.step)
    value = gradient @ s + 0.5 * s @ matrix @ s
    best = reference(matrix, gradient, radius)
    assert np.linalg.norm(s) <= radius * (1 + 1e-8)
    assert abs(value - best) <= 1e-8 * abs(best)
    assert abs(result.decrease + value) <= 1e-8 * abs(best)
    if result.shift > 0 and np.linalg.eigvalsh(matrix)[0] + result.shift > 1e-8:
        shifted = matrix + result.shift * np.eye(SIZE)
        np.testing.assert_allclose(shifted @ s, -gradient, atol=1e-7)
    minimum = np.linalg.eigvalsh(matrix)[0]
    if minimum > 1e-8:
        inside = np.linalg.norm(np.linalg.solve(matrix, gradient)) < radius
        assert bool(result.on_boundary) == (not inside)
    elif minimum < -1e-8:
        assert result.on_boundary


@pytest.mark.parametrize("size", [1, 2, 4])
def test_unused_rows_play_no_part(size, x64):
    diagonal, off = SPECTRA["indefinite"]
    used = np.arange(SIZE) < size
    result = solve(np.where(used, diagonal, 0), np.where(used, off, 0), np.int32(size), 2.0, 0.5)
    s = np.asarray(result.step)
    assert not s[size:].any()
    matrix = dense(diagonal[:size], off[:size])
    best = reference(matrix, 2.0 * np.eye(size)[0], 0.5)
    assert abs(result.decrease + best) <= 1e-8 * abs(best)


def test_infinite_radius_gives_the_newton_step(x64):
    diagonal, off = SPECTRA["definite"]
    matrix, gradient = dense(diagonal, off), 2.0 * np.eye(SIZE)[0]
    result = solve(diagonal, off, np.int32(SIZE), 2.0, np.inf)
    np.testing.assert_allclose(result.step, -np.linalg.solve(matrix, gradient), rtol=1e-9)
    expected = 0.5 * gradient @ np.linalg.solve(matrix, gradient)
    assert abs(result.decrease - expected) < 1e-9 * expected


def test_infinite_radius_has_no_boundary(x64):
    """However the length of the step is rounded."""
    rng = np.random.default_rng(0)
    diagonals, offs = rng.uniform(2, 3, (200, SIZE)), rng.uniform(0, 1, (200, SIZE))
    found = jax.vmap(lambda d, o: solve(d, o, np.int32(SIZE), 2.0, np.inf))(diagonals, offs)
    assert not found.on_boundary.any() and not found.shift.any()


def test_infinite_radius_of_an_indefinite_model_gives_a_finite_descent_step(x64):
    diagonal, off = SPECTRA["indefinite"]
    result = solve(diagonal, off, np.int32(SIZE), 2.0, np.inf)
    s = np.asarray(result.step)
    eigenvalues, q = np.linalg.eigh(dense(diagonal, off))
    length = np.linalg.norm(2.0 * q[0] / np.abs(eigenvalues))
    assert np.linalg.norm(s) <= length * (1 + 1e-8)
    assert (
        abs(result.decrease + reference(dense(diagonal, off), 2.0 * np.eye(SIZE)[0], length)) < 1e-6
    )


def test_decrease_grows_with_the_radius(x64):
    diagonal, off = SPECTRA["indefinite"]
    decreases = [
        float(solve(diagonal, off, np.int32(SIZE), 2.0, r).decrease) for r in np.logspace(-3, 3, 13)
    ]
    assert all(a < b for a, b in itertools.pairwise(decreases))


@pytest.mark.parametrize("radius", [0.1, 1e3])
def test_subproblem_in_single_precision(radius):
    diagonal, off = (part.astype(np.float32) for part in SPECTRA["indefinite"])
    result = solve(diagonal, off, np.int32(SIZE), np.float32(2), np.float32(radius))
    best = reference(dense(diagonal, off).astype(float), 2.0 * np.eye(SIZE)[0], radius)
    assert result.decrease.dtype == jnp.float32
    assert abs(result.decrease + best) < 1e-4 * abs(best)


# The subproblem from a matrix


@jax.jit
def solve_matrix(matrix, gradient, radius, shift):
    return trust_region.matrix_step(matrix, gradient, radius, shift)


@pytest.mark.parametrize("spectrum", ["definite", "singular", "tiny"])
@pytest.mark.parametrize("radius", [1e-6, 0.1, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("shift", [0.0, 1e-6, 1e3])
def test_matrix_step_is_exact_for_a_radius_near_the_one_asked(spectrum, radius, shift, x64):
    """Whatever the shift it begins with, the step has its length within a tenth of the radius, and
    of all steps so long none is better."""
    diagonal, off = SPECTRA[spectrum]
    matrix, gradient = dense(diagonal, off), 2.0 * np.arange(1.0, SIZE + 1)
    result = solve_matrix(matrix, gradient, radius, shift)
    s = np.asarray(result.step)
    length = np.linalg.norm(s)
    value = gradient @ s + 0.5 * s @ matrix @ s
    assert abs(result.decrease + value) <= 1e-8 * abs(value)
    assert abs(value - reference(matrix, gradient, length)) <= 1e-8 * abs(value)
    if result.on_boundary:
        assert 0.9 * radius <= length <= 1.1 * radius
    else:
        assert result.shift == 0 and length <= radius
        np.testing.assert_allclose(matrix @ s, -gradient, rtol=1e-8)


def test_matrix_step_can_be_exact(x64, monkeypatch):
    monkeypatch.setattr(trust_region, "CLOSE", 1e-12)
    matrix, gradient = dense(*SPECTRA["definite"]), np.arange(1.0, SIZE + 1)
    result = trust_region.matrix_step(matrix, gradient, jnp.array(0.3), jnp.array(0.0))
    value = reference(matrix, gradient, 0.3)
    assert abs(np.linalg.norm(result.step) - 0.3) < 1e-12
    assert abs(result.decrease + value) <= 1e-12 * abs(value)


@pytest.mark.parametrize("radius", [0.5, np.inf])
def test_matrix_step_where_rounding_leaves_no_definite_matrix(radius):
    """In single precision, and of half the rank."""
    root = np.random.default_rng(0).normal(size=(40, 80)).astype(np.float32)
    matrix, gradient = root.T @ root - 1e-6 * np.eye(80, dtype=np.float32), root[0]
    assert not np.isfinite(jnp.linalg.cholesky(matrix)).all()
    result = solve_matrix(matrix, gradient, np.float32(radius), np.float32(0))
    s = np.asarray(result.step)
    assert np.isfinite(s).all() and result.shift > 0
    assert np.linalg.norm(s) <= 1.1 * radius
    value = gradient @ s + 0.5 * s @ matrix @ s
    assert value < 0 and abs(result.decrease + value) < 1e-3 * abs(value)


@pytest.mark.parametrize("radius", [30.0, np.inf])
def test_a_shift_in_the_size_of_rounding_leaves_a_step_inside(radius, x64):
    """Where the matrix is singular and the gradient in its range."""
    matrix, gradient = np.diag([2.0, 0.0]), np.array([1.0, 0.0])
    result = solve_matrix(matrix, gradient, radius, 0.0)
    np.testing.assert_allclose(result.step, [-0.5, 0.0], rtol=1e-12)
    assert not result.on_boundary and 0 < result.shift < 1e-15


SIZES_OF_RANDOM = 7


def random_problem(rng, kind):
    """A matrix with a random spectrum of a kind, and a gradient of any size."""
    size = SIZES_OF_RANDOM
    eigenvalues = 10.0 ** rng.uniform(-5, 2, size)
    if kind == "indefinite":
        eigenvalues *= rng.choice([-1, 1], size)
    elif kind == "negative":
        eigenvalues *= -1
    elif kind == "singular":
        eigenvalues[: size // 2] = 0
    elif kind == "huge":
        eigenvalues *= 1e15
    elif kind == "tiny":
        eigenvalues *= 1e-15
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    matrix = (q * eigenvalues) @ q.T
    return 0.5 * (matrix + matrix.T), rng.normal(size=size) * 10.0 ** rng.uniform(-8, 8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["definite", "indefinite", "negative", "singular", "huge", "tiny"])
def test_matrix_step_for_random_spectra(kind, dtype, x64):
    """Finite, in the ball, and nearly the best there; what rounding hides of a singular matrix, a
    long way along nothing, it may leave out."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        matrix, gradient = random_problem(rng, kind)
        for radius in (1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e8, np.inf):
            arguments = (np.asarray(x, dtype) for x in (matrix, gradient, radius, 0.0))
            found = solve_matrix(*arguments)
            s = np.asarray(found.step, float)
            assert np.isfinite(s).all() and np.isfinite(found.shift) and found.shift >= 0
            assert np.isfinite(found.decrease) and found.decrease >= 0
            assert np.linalg.norm(s) <= (1 + trust_region.CLOSE) * radius * (1 + 1e-5)
            hidden = kind == "singular" and radius >= 1
            if np.isfinite(radius) and not hidden:
                value = gradient @ s + 0.5 * s @ matrix @ s
                least = 0.8 if dtype == np.float64 else 0.7
                assert value <= least * reference(matrix, gradient, radius)


def test_matrix_step_of_what_is_not_a_number_stays_in_place(x64):
    for matrix, gradient in (
        (np.full((3, 3), np.nan), np.ones(3)),
        (np.eye(3), np.full(3, np.inf)),
    ):
        found = solve_matrix(matrix, gradient, 1.0, 0.0)
        assert not np.asarray(found.step).any() and np.isfinite(found.shift)


# One iteration


def quadratic(seed=0, shift=0.5):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(SIZE, SIZE))
    return root @ root.T + shift * np.eye(SIZE), rng.normal(size=SIZE)


def iterate(matvec, gradient, evaluate, x, aux, radius, *, max_trials=10, **space):
    """Builds a Krylov space and tries steps in it; returns what came of it and the products."""
    space = trust_region.krylov_space(matvec, gradient, radius, **space)
    result = trust_region.search(
        lambda radius, shift: trust_region.krylov_step(space, radius),
        evaluate, x, aux, radius, jnp.zeros_like(radius), max_trials=max_trials,
    )  # fmt: skip
    return result, space.tridiagonal.size


class Run:
    """One iteration on ½ xᵀAx − bᵀx plus `extra(x)`, from x = 1; counts what it costs."""

    def __init__(self, matrix, b, extra=lambda x: 0.0, **options):
        self.x = jnp.ones(SIZE)

        def value(x):
            return 0.5 * x @ matrix @ x - b @ x + extra(x)

        def evaluate(trial, found):
            return value(self.x) - value(trial), trial.sum()

        settings = {"rank": SIZE, "flat": 0.0, "radius": jnp.inf} | options
        radius = jnp.asarray(settings.pop("radius"), jnp.float64)
        self.start = float(value(self.x))
        self.result, self.products = jax.jit(
            lambda radius: iterate(
                lambda v: matrix @ v, matrix @ self.x - b, evaluate, self.x, self.x.sum(), radius,
                **settings,
            )
        )(radius)  # fmt: skip
        self.end = float(value(self.result.x))


def test_a_convex_quadratic_is_minimised_in_one_step(x64):
    matrix, b = quadratic()
    run = Run(matrix, b)
    np.testing.assert_allclose(run.result.x, np.linalg.solve(matrix, b), rtol=1e-9)
    assert run.result.accepted and run.result.trials == 1 and run.products == SIZE
    assert abs(run.result.ratio - 1) < 1e-9
    assert abs(run.result.promise - (run.start - run.end)) < 1e-9 * abs(run.start)
    assert abs(run.result.aux - run.result.x.sum()) < 1e-12


def test_the_space_grows_until_its_gradient_is_small_enough(x64):
    matrix, b = quadratic()

    def left(run):
        return 0.5 * np.sum((matrix @ np.asarray(run.result.x) - b) ** 2)

    sizes = [left(Run(matrix, b, rank=rank)) for rank in range(1, SIZE)]
    for enough in (3 * sizes[-1], 3 * sizes[-2], 1.1 * max(sizes)):
        run = Run(matrix, b, enough=enough)
        products = int(run.products)
        assert products < SIZE and left(run) < enough
        assert all(size >= enough for size in sizes[: products - 1])


def test_first_radius_is_that_of_the_first_step(x64):
    """Gain ratio one: the radius is the length of the step, twice it after so good a step."""
    matrix, b = quadratic()
    run = Run(matrix, b)
    length = np.linalg.norm(np.asarray(run.result.x) - 1)
    assert abs(run.result.radius - 2 * length) < 1e-9 * length


def test_a_good_step_on_the_boundary_doubles_the_radius(x64):
    run = Run(*quadratic(), radius=0.1)
    assert abs(np.linalg.norm(np.asarray(run.result.x) - 1) - 0.1) < 1e-9
    assert run.result.accepted and abs(run.result.radius - 0.2) < 1e-9


def test_a_good_step_inside_keeps_the_radius(x64):
    run = Run(*quadratic(), radius=1e3)
    assert run.result.accepted and run.result.radius == 1e3


def test_rejected_steps_shrink_the_radius_and_cost_no_product(x64):
    """A wall away from the start turns long steps down."""
    wall = lambda x: 1e3 * jnp.maximum(jnp.sum((x - 1) ** 2) - 0.01, 0)  # noqa: E731
    free, walled = Run(*quadratic()), Run(*quadratic(), wall)
    assert free.products == walled.products == SIZE
    assert walled.result.accepted and walled.result.trials > 1
    assert walled.result.first_ratio < 0 < walled.result.ratio
    assert walled.end < walled.start
    step = np.linalg.norm(np.asarray(walled.result.x) - 1)
    first = np.linalg.norm(np.asarray(free.result.x) - 1)
    assert step <= first * 0.25 ** (int(walled.result.trials) - 1) * (1 + 1e-8)


@pytest.mark.parametrize("bad", [1e6, jnp.nan, jnp.inf])
def test_where_no_trial_is_accepted_the_point_stays(bad, x64):
    run = Run(*quadratic(), lambda x: jnp.where(jnp.all(x == 1), 0.0, bad), max_trials=4)
    assert not run.result.accepted and run.result.trials == 4
    np.testing.assert_array_equal(run.result.x, np.ones(SIZE))
    assert run.result.aux == SIZE
    assert 0 < run.result.radius < np.inf


def corrected(correction, *, radius, better=-1.0):
    """One iteration from 0 on a function that falls by 1 at 1 + 0.25 and by `better` at 1, where
    the model takes it, its radius being at least 1."""

    def solve(radius, shift):
        length = jnp.minimum(radius, 1.0)
        return trust_region.Step(length[None], length, radius <= 1, shift, shift)

    def evaluate(x, found):
        decrease = jnp.select([x[0] == 1, x[0] == 1.25], [better, 1.0], -2.0)
        return decrease, x[0]

    return trust_region.search(
        solve, evaluate, jnp.zeros(1), jnp.array(0.0), jnp.array(radius), jnp.array(0.0),
        max_trials=4, correct=lambda found, aux: correction * aux * jnp.ones(1),
    )  # fmt: skip


def test_a_rejected_step_is_tried_again_corrected(x64):
    """The radius is then the length of what was accepted."""
    result = corrected(0.25, radius=1.0)
    assert result.accepted and result.trials == 2 and result.x == result.aux == 1.25
    assert result.ratio == 1 and result.first_ratio == -1 and result.radius == 2.5
    assert corrected(0.25, radius=9.0).radius == 1.25


def test_a_poor_first_step_is_not_taken(x64):
    """A gain ratio of 0.1 lets any step pass but the first."""
    for first, trials in ((False, 1), (True, 2)):
        result = trust_region.search(
            lambda radius, shift: trust_region.Step(radius[None], radius, True, shift, shift),
            lambda x, found: (jnp.where(x[0] == 1, 0.1, 1.0), x[0]),
            jnp.zeros(1), jnp.array(0.0), jnp.array(1.0), jnp.array(0.0),
            max_trials=4, first=first,
        )  # fmt: skip
        assert result.accepted and result.trials == trials


def test_the_promise_bounds_what_the_model_gains_within_reach(x64):
    """By duality, for a step that its radius has cut short."""
    matrix, gradient = quadratic()
    for radius in (0.01, 0.1, 1.0):
        result = trust_region.search(
            lambda radius, shift: trust_region.matrix_step(matrix, gradient, radius, shift),
            lambda x, found: (found.decrease, x[0]),
            jnp.zeros(SIZE), jnp.array(0.0), jnp.array(radius), jnp.array(0.0),
            max_trials=1, reach=2.0,
        )  # fmt: skip
        assert result.promise >= -reference(matrix, gradient, 2.0)
    assert result.promise < -1.5 * reference(matrix, gradient, 2.0)


def test_an_accepted_step_is_not_corrected(x64):
    result = corrected(0.25, radius=1.0, better=0.5)
    assert result.accepted and result.trials == 1 and result.x == 1


@pytest.mark.parametrize(
    "radius, ends",
    [
        (1.0, (0.25, 0.5, 1.0, 2.0)),  # on the boundary
        (4.0, (0.25, 0.5, 4.0, 4.0)),  # inside
        (np.inf, (0.25, 0.5, 1.0, 2.0)),  # not chosen yet
    ],
)
def test_the_radius_follows_the_gain_ratio_and_the_length_of_the_step(radius, ends, x64):
    """Which is 1; the step is not taken, is poor, is fair and is good."""
    for ratio, end in zip((-1.0, 0.2, 0.5, 0.8), ends, strict=True):
        result = trust_region.search(
            lambda radius, shift: trust_region.Step(
                jnp.ones(1), jnp.array(2.0), radius <= 1, shift, shift
            ),
            lambda x, found, ratio=ratio: (ratio * found.decrease, x[0]),
            jnp.zeros(1), jnp.array(0.0), jnp.array(radius), jnp.array(0.0), max_trials=1,
        )  # fmt: skip
        assert result.accepted == (ratio > 0) and abs(result.ratio - ratio) < 1e-15
        assert result.radius == end


@pytest.mark.parametrize("correction, trials", [(0.6, 1), (jnp.nan, 1), (0.3, 2)])
def test_a_failed_or_long_correction_leaves_the_radius_to_shrink(correction, trials, x64):
    """Radii 1, 1/4, … are tried, each with its correction where that is short."""
    result = corrected(correction, radius=1.0)
    assert not result.accepted and result.trials == 4 and result.x == 0
    assert result.radius == 0.25 ** (4 / trials)


def test_not_a_number_at_the_first_trial_is_recovered_from(x64):
    """Trial points where the function is not defined are rejected like bad ones."""
    run = Run(*quadratic(), lambda x: jnp.where(jnp.sum((x - 1) ** 2) > 0.04, jnp.nan, 0.0))
    assert run.result.accepted and run.result.trials > 1 and run.end < run.start


def test_flat_ends_the_space_early(x64):
    """Eigenvalues falling fast: a few products give nearly all of the decrease."""
    matrix, b = np.diag(np.logspace(3, 0, SIZE)), np.zeros(SIZE)
    exact = Run(matrix, b)
    early = Run(matrix, b, flat=0.5)
    assert 1 <= early.products < exact.products == SIZE
    assert early.start - early.end > 0.25 * (exact.start - exact.end)


def test_rank_caps_the_products(x64):
    assert Run(*quadratic(), rank=3).products == 3


def test_an_indefinite_function_is_decreased(x64):
    run = Run(quadratic()[0] - 8 * np.eye(SIZE), quadratic()[1], lambda x: 0.1 * jnp.sum(x**4))
    assert run.result.accepted and run.end < run.start


def test_iterating_minimises_the_rosenbrock_function(x64):
    """Repeated, the iteration finds the one minimum of a curved valley, with the true Hessian."""

    def rosenbrock(x):
        return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    @jax.jit
    def step(x, radius):
        here, gradient = jax.value_and_grad(rosenbrock)(x)
        matvec = functools.partial(jnp.matmul, jax.hessian(rosenbrock)(x))
        result, _ = iterate(
            matvec, gradient, lambda trial, _: (here - rosenbrock(trial), ()), x, (), radius,
            rank=2, flat=0.0,
        )  # fmt: skip
        return result.x, result.radius

    x, radius = jnp.array([-1.2, 1.0]), jnp.array(jnp.inf)
    values = [float(rosenbrock(x))]
    for _ in range(40):
        x, radius = step(x, radius)
        values.append(float(rosenbrock(x)))
    assert all(b <= a for a, b in itertools.pairwise(values))
    np.testing.assert_allclose(x, 1, atol=1e-7)
