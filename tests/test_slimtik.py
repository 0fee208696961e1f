"""slimTik against the authors' trace and a dense NumPy implementation; and how it chooses Λ."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import varprox as vp
from varprox.methods import selection as selections
from varprox.methods.selection import Fit, candidates

TRACE = dict(np.load(Path(__file__).parent / "reference" / "slimtik_trace.npz"))
LOWER = float(TRACE["lower_bound"])


def given(lambda_):
    """A user's selection: this Λ."""
    return Partial(lambda lambda_, fit, count, lambda_sum, lower: (lambda_, 0 * lambda_), lambda_)


def batches(count, rows=6, columns=5, outputs=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, rows, columns)), rng.normal(size=(count, rows, outputs))


def dense(w, lambda_sum, remembered, a, c, lambda_):
    """One step as the paper writes it, every output by itself."""
    total = sum(x.T @ x for x in remembered)
    b = np.linalg.inv(total + (lambda_sum + lambda_) * np.eye(len(w)))
    w = w - b @ (a.T @ (a @ w - c) + lambda_ * w)
    return w, c.shape[1] * np.trace(a @ b @ a.T), np.sum((a @ w - c) ** 2)


def test_w_follows_the_trace_of_the_authors(x64):
    memory, options = int(TRACE["memory"]), {"initial": 0.05, "lower_bound": LOWER}
    state = vp.slimtik(memory, **options).init(TRACE["w0"])
    for k, batch in enumerate(zip(TRACE["rows"], TRACE["targets"], strict=True)):
        method = vp.slimtik(memory, given(TRACE["lambda_"][k]), **options)
        state, info = method.update(state, *batch)
        np.testing.assert_allclose(state.w, TRACE["w"][k], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(state.lambda_sum, TRACE["lambda_sum"][k], rtol=1e-12)
        assert info.lambda_ == TRACE["lambda_"][k] and info.finite


def test_sgcv_of_the_same_candidates_picks_the_same(x64):
    """And the candidates are the authors', after which refinement finds nothing worse."""

    def authors(trials, fit, count, lambda_sum, lower):
        values = jax.vmap(lambda x: selections._sgcv(fit(x), count))(trials)
        return trials[jnp.argmin(values)], values

    memory, options = int(TRACE["memory"]), {"initial": 0.05, "lower_bound": LOWER}
    own = vp.slimtik(memory, vp.sgcv(), **options)
    state = own.init(TRACE["w0"])
    for k, batch in enumerate(zip(TRACE["rows"], TRACE["targets"], strict=True)):
        np.testing.assert_allclose(candidates(state.lambda_sum), TRACE["trial_lambda"][k])
        method = vp.slimtik(memory, Partial(authors, TRACE["trial_lambda"][k]), **options)
        _, refined = own.update(state, *batch)
        state, info = method.update(state, *batch)
        np.testing.assert_allclose(info.value, TRACE["trial_sgcv"][k], rtol=1e-9)
        assert info.lambda_ == TRACE["lambda_"][k]
        assert refined.value <= info.value.min() * (1 + 1e-12)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 1, 3]])
def test_one_pass_with_full_memory_solves_the_whole_problem(order, x64):
    """Tikhonov with λ, given λ / batches at every step, whatever the order of the batches."""
    rows, targets = batches(5)
    method = vp.slimtik(4, vp.constant(0.3 / 5), initial=0.0, lower_bound=0.0)
    state = method.init(jnp.zeros((5, 2)))
    for k in order:
        state, _ = method.update(state, rows[k], targets[k])
    a, c = rows.reshape(-1, 5), targets.reshape(-1, 2)
    expected = np.linalg.solve(a.T @ a + 0.3 * np.eye(5), a.T @ c)
    np.testing.assert_allclose(state.w, expected, atol=1e-10)


@pytest.mark.parametrize("memory", [0, 2])
def test_an_update_equals_the_dense_formula(memory, x64):
    """With several outputs, also once the ring of Gram matrices has come round."""
    rows, targets = batches(6)
    lambdas = [0.02, -0.01, 0.0, 0.3, -0.1, 0.05]
    state = vp.slimtik(memory, initial=0.05).init(np.ones((5, 2)))
    w, total = np.ones((5, 2)), 0.05
    for k, lambda_ in enumerate(lambdas):
        state, info = vp.slimtik(memory, given(lambda_)).update(state, rows[k], targets[k])
        remembered = rows[max(0, k - memory) : k + 1]
        w, trace, residual = dense(w, total, remembered, rows[k], targets[k], lambda_)
        total += lambda_
        np.testing.assert_allclose(state.w, w, rtol=1e-9)
        np.testing.assert_allclose([info.trace, info.residual], [trace, residual], rtol=1e-9)
        np.testing.assert_allclose([state.lambda_sum, info.lambda_sum], total, rtol=1e-12)


def test_a_constant_updates_like_the_same_value_of_a_selection_that_may_try_others(x64):
    rows, targets = batches(3)
    given_, constant = vp.slimtik(1, given(0.2)), vp.slimtik(1, vp.constant(0.2))
    a, b = given_.init(jnp.ones((5, 2))), constant.init(jnp.ones((5, 2)))
    for batch in zip(rows, targets, strict=True):
        (a, about_a), (b, about_b) = given_.update(a, *batch), constant.update(b, *batch)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), a, b)
        np.testing.assert_allclose(about_b.trace, about_a.trace, rtol=1e-12)
        np.testing.assert_allclose(about_b.residual, about_a.residual, rtol=1e-9)


@pytest.mark.parametrize("selection", [given(0.0), vp.constant(0.0)], ids=["basis", "Cholesky"])
@pytest.mark.parametrize("columns", [10, 100, 300])
def test_a_sum_that_rounding_hides_still_fits_a_singular_matrix(columns, selection):
    """Of rank three at ΣΛ of 1e-7 of nothing, in single precision."""
    rng = np.random.default_rng(columns)
    rows = 80 * rng.normal(size=(60, 3)) @ rng.normal(size=(3, columns))
    rows, w = rows.astype(np.float32), rng.normal(size=(columns, 1)).astype(np.float32)
    with np.errstate(all="raise"), pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(rows.T @ rows + np.float32(1e-7) * np.eye(columns, dtype=np.float32))
    method = vp.slimtik(0, selection, initial=1e-7)
    state, info = method.update(method.init(jnp.zeros_like(w)), rows, rows @ w)
    assert info.finite
    np.testing.assert_allclose(rows @ state.w, rows @ w, atol=1e-3 * np.abs(rows @ w).max())


def test_the_sum_stays_above_its_bound(x64):
    rows, targets = batches(1)
    method = vp.slimtik(0, given(-1.0), initial=0.05, lower_bound=1e-3)
    state, info = method.update(method.init(jnp.zeros((5, 2))), rows[0], targets[0])
    assert abs(state.lambda_sum - 1e-3) < 1e-15 and state.lambda_sum >= 1e-3
    assert abs(info.lambda_ - (1e-3 - 0.05)) < 1e-15


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_proportional_starts_high_falls_and_stays(scale, x64, monkeypatch):
    """At rows of any scale; it also follows them up, and starts again far above."""
    monkeypatch.setattr(selections, "FALL", 0.1)
    rows, targets = batches(8)
    sizes = np.array([1, 1, 1, 1, 1.2, 2.5, 0.5, 20])
    rows = scale * sizes[:, None, None] * rows
    method = vp.slimtik(1, vp.proportional(0.5), initial=0.0, lower_bound=0.0)
    state = method.init(jnp.zeros((5, 2)))
    did, expected = [], 0.0
    for k in range(8):
        w, before = state.w, expected
        state, info = method.update(state, rows[k], targets[k])
        gram = sum(a.T @ a for a in rows[max(0, k - 1) : k + 1])
        mean = np.mean(np.linalg.eigvalsh(gram))
        lowest = 0.5 * mean + 2.5 * np.trace(gram) / (2 * len(rows[k]))
        branches = {
            "starts": (before < 0.1 * lowest, 50 * mean),
            "rises": (before < lowest, lowest),
            "stays": (before <= 3 * lowest, before),
            "falls": (True, max(0.1 * before, lowest)),
        }
        name, expected = next((name, to) for name, (holds, to) in branches.items() if holds)
        did.append(name)
        np.testing.assert_allclose([state.lambda_sum, info.lambda_sum], expected, rtol=1e-9)
        change = np.linalg.solve(
            gram + expected * np.eye(5), rows[k].T @ (rows[k] @ w - targets[k]) + info.lambda_ * w
        )
        np.testing.assert_allclose(state.w, w - change, rtol=1e-8)
    assert did[:2] == ["starts", "falls"] and did[-1] == "starts"
    assert {"rises", "stays"} <= set(did)


def test_proportional_keeps_down_the_leverage_of_a_row_among_many_weights(x64):
    """From the first step on, however few rows there are: with one row ΣΛ is where it is to end."""
    row = np.random.default_rng(0).normal(size=(1, 1000))
    method = vp.slimtik(0, vp.proportional(0.5))
    state, _ = method.update(method.init(jnp.zeros((1000, 1))), row, np.ones((1, 1)))
    np.testing.assert_allclose(state.lambda_sum, (0.5 / 1000 + 2.5) * np.sum(row**2), rtol=1e-9)


FITS = {
    "sgcv": (vp.sgcv(), lambda r, t, n: r / (n - t) ** 2 if t < n else np.inf),
    "supre": (vp.supre(0.3), lambda r, t, n: r + 2 * 0.3 * t - n * 0.3),
    "sdp": (vp.sdp(0.3), lambda r, t, n: abs(r - n * 0.3)),
}


def dense_value(formula, state, rows, targets, lambda_):
    w, total = np.asarray(state.w), float(state.lambda_sum)
    _, trace, residual = dense(w, total, rows, rows[-1], targets[-1], lambda_)
    return formula(residual, trace, targets[-1].size)


@pytest.mark.parametrize("name", FITS)
def test_the_minimum_is_that_of_a_fine_grid(name, x64):
    """Of Λ between −ΣΛ/2 and ΣΛ/2, with residual and trace from the dense formula."""
    select, formula = FITS[name]
    for seed in range(4):
        rows, targets = batches(3, rows=4, seed=seed)
        method = vp.slimtik(2, vp.constant(0.5), initial=0.5)
        state = method.init(jnp.zeros((5, 2)))
        for k in range(2):
            state, _ = method.update(state, rows[k], targets[k])
        value = functools.partial(dense_value, formula, state, rows, targets)
        _, info = vp.slimtik(2, select, initial=0.5).update(state, rows[2], targets[2])
        np.testing.assert_allclose(info.value, value(float(info.lambda_)), rtol=1e-8)
        half = float(state.lambda_sum) / 2
        best = min(value(x) for x in np.linspace(-half, half, 4001))
        scale = max(abs(best), 1e-3)
        assert info.value <= best + 1e-4 * scale


def test_sgcv_keeps_away_from_beyond_its_pole():
    """Where the trace exceeds the number of residuals nothing is chosen but at the bound."""
    beyond = Fit(jnp.array(1.0), jnp.array(33.0))
    assert selections._sgcv(beyond, 32) == np.inf
    assert np.isfinite(selections._sgcv(beyond, 34))


@pytest.mark.parametrize("margin", [-3.0, 0.0, 1e-6])
def test_where_the_trace_leaves_no_freedom_the_largest_change_is_taken(margin):
    """Beyond the pole at every Λ, or as near to it as rounding: more regularisation leads away."""
    fit = lambda lambda_: Fit(jnp.float32(1e-3), 32 - jnp.float32(margin) + 0 * lambda_)  # noqa: E731
    select = vp.sgcv()
    lambda_, _ = select(fit, 32, jnp.float32(0.5), 1e-7)
    np.testing.assert_allclose(lambda_, 0.25, rtol=1e-6)


@pytest.mark.parametrize("make", [vp.sgcv, vp.proportional, lambda: vp.constant(0.1)])
@pytest.mark.parametrize("scale", [2.0**-33, 2.0**33])
def test_w_is_in_proportion_to_targets_of_any_size_in_single_precision(make, scale):
    """From ΣΛ as it begins to one that lets each batch be interpolated; times powers of two."""
    rows, targets = (x.astype(np.float32) for x in batches(8))
    method = vp.slimtik(2, make())
    states = [method.init(jnp.zeros((5, 2), jnp.float32)) for _ in range(2)]
    for a, c in zip(rows, targets, strict=True):
        for k, factor in enumerate((1, np.float32(scale))):
            states[k], info = method.update(states[k], a, factor * c)
            assert info.finite
    np.testing.assert_allclose(states[1].w / np.float32(scale), states[0].w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(states[1].lambda_sum, states[0].lambda_sum, rtol=1e-4)


@pytest.mark.parametrize("name", ["sdp", "supre"])
@pytest.mark.parametrize("scale", [2.0**-33, 2.0**33])
def test_a_variance_in_the_same_units_gives_the_same_choice(name, scale):
    rows, targets = (x.astype(np.float32) for x in batches(1))
    chosen = []
    for factor in (1.0, scale):
        method = vp.slimtik(0, getattr(vp, name)(0.3 * factor**2), initial=0.5)
        state = method.init(jnp.zeros((5, 2), jnp.float32))
        _, info = method.update(state, rows[0], np.float32(factor) * targets[0])
        chosen.append(info.lambda_)
    np.testing.assert_allclose(*chosen, rtol=1e-4)


@pytest.mark.parametrize("make", [vp.sgcv, vp.proportional, lambda: vp.constant(0.1)])
@pytest.mark.parametrize("lowest", [0.0, 1e-7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zero_rows_leave_w_alone_and_copies_of_a_column_share_its_weight(make, lowest, dtype):
    """Also if ΣΛ begins at nothing."""
    with jax.enable_x64(dtype is np.float64):
        method = vp.slimtik(1, make(), initial=lowest, lower_bound=lowest)
        state = method.init(jnp.zeros((4, 1), dtype))
        state, info = method.update(state, np.zeros((6, 4), dtype), np.ones((6, 1), dtype))
        assert info.finite and not state.w.any()
        rng = np.random.default_rng(0)
        for _ in range(6):
            some = rng.normal(size=(30, 2))
            rows = np.column_stack([some, some]).astype(dtype)
            state, info = method.update(state, rows, rows @ np.ones((4, 1), dtype))
            assert info.finite
        w = np.asarray(state.w)
        np.testing.assert_allclose(w[:2], w[2:], atol=2e-3)


@pytest.mark.parametrize("make", [vp.sgcv, lambda: vp.constant(0.0)])
def test_a_batch_that_is_fitted_to_rounding_is_fitted_in_single_precision(make):
    """Its residual is a difference that rounding may make negative, which is no reason to take the
    smallest Λ."""
    rng = np.random.default_rng(1)
    exact = rng.normal(size=(5, 1)).astype(np.float32)
    method = vp.slimtik(2, make())
    state = method.init(jnp.zeros((5, 1), jnp.float32))
    for _ in range(12):
        rows = rng.normal(size=(20, 5)).astype(np.float32)
        state, info = method.update(state, rows, rows @ exact)
        assert info.finite and info.residual >= 0
    np.testing.assert_allclose(state.w, exact, atol=1e-3)


@pytest.mark.parametrize("selection", [None, vp.constant(0.1)], ids=["sgcv", "constant"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_changes_nothing(bad, selection, x64):
    rows, targets = batches(2)
    method = vp.slimtik(2, selection)
    state, info = method.update(method.init(jnp.ones((5, 2))), rows[0], targets[0])
    assert info.finite
    rows[1, 2, 3] = bad
    after, info = method.update(state, rows[1], targets[1])
    assert not info.finite
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_it_scans_and_maps_in_single_precision():
    rows, targets = (x.astype(np.float32) for x in batches(7))
    method = vp.slimtik(2)

    def run(rows, targets):
        return jax.lax.scan(
            lambda state, batch: method.update(state, *batch),
            method.init(jnp.zeros((5, 2), jnp.float32)),
            (rows, targets),
        )

    state, info = jax.jit(run)(rows, targets)
    assert {x.dtype for x in jax.tree.leaves((state, info))} == {
        jnp.dtype(t) for t in (np.float32, np.int32, bool)
    }
    stepwise = method.init(jnp.zeros((5, 2), jnp.float32))
    for batch in zip(rows, targets, strict=True):
        stepwise, _ = method.update(stepwise, *batch)
    np.testing.assert_allclose(state.w, stepwise.w, rtol=1e-3, atol=1e-5)
    mapped, _ = jax.vmap(run)(np.stack([rows, -rows]), np.stack([targets, -targets]))
    np.testing.assert_allclose(mapped.w[1], mapped.w[0], rtol=1e-3, atol=1e-5)


def test_numbers_in_double_leave_single_precision_single(x64, standard_promotion):
    """Those of NumPy, and those that `jit` takes from there."""
    rows, targets = (x[0].astype(np.float32) for x in batches(1))

    def ends(number, selection):
        method = vp.slimtik(2, selection, initial=number, lower_bound=number)
        state, info = method.update(method.init(np.zeros((5, 2), np.float32)), rows, targets)
        return state.w, state.lambda_sum, state.grams, info

    number = np.float64(0.5)
    for make in (vp.sgcv, lambda: vp.constant(number), lambda: vp.supre(number)):
        expected = ends(0.5, make())
        traced = jax.jit(lambda x, make=make: ends(x, make()))(number)
        chex.assert_trees_all_equal_dtypes(ends(number, make()), traced, expected)
        chex.assert_trees_all_close(traced, expected, rtol=1e-4)
        assert expected[0].dtype == jnp.float32
    traced = jax.jit(lambda x: ends(0.5, vp.supre(x)))(number)
    chex.assert_trees_all_equal_dtypes(traced, expected)


ONE = np.ones((1, 1), np.float32)


def updated(rows, targets):
    return vp.slimtik().update(vp.slimtik().init(ONE), rows, targets)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: vp.slimtik(-1), ValueError, "memory: expected an integer ≥ 0, got -1"),
        (lambda: vp.slimtik(2.5), ValueError, "memory: expected an integer ≥ 0, got 2.5"),
        (lambda: vp.slimtik(selection="sgcv"), TypeError, "selection: expected one such as"),
        (lambda: vp.slimtik(selection=vp.sgcv), TypeError, "selection: expected one such as"),
        (lambda: vp.slimtik().init([[0.0]]), TypeError, "w: expected arrays of NumPy or JAX, got"),
        (lambda: vp.slimtik().update(None, 1, 1), TypeError, "state: expected one of slimtik, got"),
        (lambda: updated([[1.0]], ONE), TypeError, "rows: expected arrays of NumPy or JAX, got"),
        (lambda: updated(ONE, [[1.0]]), TypeError, "targets: expected arrays of NumPy or JAX, got"),
        (lambda: vp.slimtik(initial=-1.0), ValueError, "initial: expected"),
        (lambda: vp.slimtik(lower_bound=-1e-7), ValueError, "lower_bound: expected"),
        (lambda: vp.supre(-1.0), ValueError, "noise_variance: expected"),
        (lambda: vp.proportional(-1.0), ValueError, "factor: expected"),
        (lambda: vp.sdp("small"), TypeError, "noise_variance: expected"),
    ],
)
def test_bad_options_are_refused(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "rows, targets, message",
    [
        (np.ones((4, 3)), np.ones((4, 2)), "rows: expected shape (batch, 5), as W asks for, got"),
        (np.ones((4, 5)), np.ones((3, 2)), "targets: expected shape (4, 2), got (3, 2)"),
        (np.ones((4, 5)), np.ones((4, 3)), "targets: expected shape (4, 2), got (4, 3)"),
        (np.ones((4, 5)), np.ones(4), "targets: expected shape (4, 2), got (4,)"),
        (np.ones((0, 5)), np.ones((0, 2)), "rows: expected at least one row, got none"),
    ],
)
def test_bad_batches_are_refused(rows, targets, message):
    method = vp.slimtik()
    state = method.init(jnp.zeros((5, 2)))
    with pytest.raises(ValueError) as caught:
        method.update(state, rows.astype(np.float32), targets.astype(np.float32))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.int32])
def test_weights_without_a_factorisation_are_refused(dtype):
    with pytest.raises(
        TypeError, match=r"w: expected float32 or float64, got .*; cast it to float"
    ):
        vp.slimtik().init(jnp.zeros((5, 2), dtype))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float64, np.int32])
@pytest.mark.parametrize("name", ["rows", "targets"])
def test_batches_of_another_dtype_are_refused(name, dtype, x64):
    method = vp.slimtik()
    batch = {"rows": np.ones((4, 5), np.float32), "targets": np.ones((4, 2), np.float32)}
    batch[name] = batch[name].astype(dtype)
    with pytest.raises(TypeError) as caught:
        method.update(method.init(np.zeros((5, 2), np.float32)), **batch)
    assert str(caught.value).startswith(f"{name}: expected dtype float32, that of W, got")
