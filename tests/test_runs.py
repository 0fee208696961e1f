"""Runs that are watched, stopped, kept and taken up again."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from kept_run import run as kept_run
from problems import features, initial_theta, make_data

import varprox as vp
from varprox.training import storage
from varprox.training.clock import _covered, timed
from varprox.training.history import History

PROBLEM = vp.Problem(vp.Separable(features), vp.least_squares(), 3e-2, 1e-2)
METHODS = {
    "krylov": (vp.gnvpro(PROBLEM, curvature="krylov", rank=6), {}),
    "dense": (vp.gnvpro(PROBLEM, curvature="dense"), {}),
    "lbfgsvpro": (vp.lbfgsvpro(PROBLEM, memory=5), {}),
    "broydenvpro": (vp.broydenvpro(PROBLEM), {}),
    "slimtrain": (vp.slimtrain(PROBLEM, optax.sgd(0.05, momentum=0.9)), {"batch_size": 5}),
}
GNVPRO, _ = METHODS["krylov"]
THETA = initial_theta(dtype=np.float32)
DATA = make_data("least_squares", 2, dtype=np.float32)
VALIDATION = make_data("least_squares", 2, samples=11, seed=5, dtype=np.float32)


def fit(method=GNVPRO, **options):
    return vp.fit(method, THETA, DATA, **({"epochs": 6} | options))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)


def same_histories(one, other):
    assert one.keys() == other.keys()
    for name, column in one.items():
        if name != "seconds":
            np.testing.assert_array_equal(other[name], column)


# Watched and stopped


def test_a_callback_sees_every_entry_and_the_solution_so_far():
    seen = []
    whole = fit(callback=lambda row, found: seen.append((row, found)))
    assert len(seen) == 7
    for step, (row, found) in enumerate(seen):
        assert (
            row["objective"] == whole.history["objective"][step] == found.history["objective"][-1]
        )
        assert len(found.history["seconds"]) == step + 1
    same(seen[-1][1].theta, whole.theta)
    assert seen[2][1].status == vp.Status.RUNNING and whole.status == vp.Status.BUDGET


def test_a_callback_may_stop_the_run():
    stopped = fit(callback=lambda row, found: row["work_units"] > 20)
    work = stopped.history["work_units"]
    assert stopped.status == vp.Status.STOPPED and work[-2] <= 20 < work[-1]


def test_a_run_stops_at_an_objective():
    value = fit().history["objective"][3]
    stopped = fit(stop_when=value)
    assert stopped.status == vp.Status.STOPPED and len(stopped.history["objective"]) == 4


@pytest.mark.parametrize("evaluate_every", [1, 2])
def test_patience_ends_a_run_and_the_best_weights_are_kept(evaluate_every):
    """Against the history of a run without patience."""
    noise = np.random.default_rng(0).normal(size=VALIDATION[1].shape).astype(np.float32)
    worse = VALIDATION[0], VALIDATION[1] + 3 * noise
    options = {"validation": worse, "evaluate_every": evaluate_every, "epochs": 12}
    whole = fit(**options)
    losses = whole.history["validation_loss"]
    stopped = fit(patience=1, **options)
    last = len(stopped.history["objective"]) - 1
    assert stopped.status == vp.Status.STOPPED and last < 12
    evaluated = losses[: last + 1 : evaluate_every]
    assert (np.diff(evaluated)[:-1] < 0).all() and evaluated[-1] >= evaluated[-2]
    best = last - evaluate_every
    assert stopped.best.step == best and stopped.best.validation_loss == losses[best]
    kept = vp.predict(stopped.best.problem, stopped.best.theta, stopped.best.w, worse[0])
    loss = PROBLEM.loss.value(kept, worse[1])
    np.testing.assert_allclose(loss, losses[best], rtol=1e-5)


def test_without_validation_there_is_no_best():
    assert fit(epochs=1).best is None


def test_an_interrupt_gives_the_solution_so_far():
    def interrupt(row, found):
        if len(found.history["objective"]) == 4:
            raise KeyboardInterrupt

    found = fit(callback=interrupt, validation=VALIDATION, evaluate_every=10)
    assert found.status == vp.Status.INTERRUPTED and len(found.history["objective"]) == 4
    assert np.isfinite(found.history["validation_loss"][-1])
    same(fit(start=found, validation=VALIDATION).state, fit().state)


def failing(calls_before):
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) > calls_before:
            raise ZeroDivisionError("of the test")
        return 0.0

    return fail


@pytest.mark.parametrize("where", ["callback", "metrics"])
def test_an_exception_has_what_was_found(where):
    fail = failing(3)
    with pytest.raises(ZeroDivisionError, match="of the test") as caught:
        fit(**{where: fail if where == "callback" else {"gap": fail}})
    found = caught.value.solution
    assert len(found.history["objective"]) == 4 and "solution" in caught.value.__notes__[0]
    same(fit(start=found).state, fit().state)


def test_a_level_that_cannot_be_made_loses_none_of_those_before():
    def make(level, before):
        if level == 1:
            raise ZeroDivisionError("of the test")
        return GNVPRO

    with pytest.raises(ZeroDivisionError) as caught:
        vp.fit_levels(make, THETA, DATA, levels=2, prolong=lambda theta: theta, epochs=3)
    assert len(caught.value.solution.history["objective"]) == 4


def test_an_exception_in_a_level_has_that_level_too_and_stays_itself():
    fail = failing(6)
    with pytest.raises(ZeroDivisionError, match="of the test") as caught:
        vp.fit_levels(
            lambda *_: GNVPRO, THETA, DATA, levels=2, prolong=lambda theta: theta, epochs=3,
            callback=fail,
        )  # fmt: skip
    found = caught.value.solution
    assert found.history["level"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert len(caught.value.__notes__) == 1
    with pytest.raises(ValueError, match=r"^inputs: expected"):
        vp.fit_levels(
            lambda *_: GNVPRO, THETA, (DATA[0], DATA[1][1:]), levels=2, prolong=None, epochs=3
        )


def test_an_interrupt_ends_all_levels():
    def interrupt(row, found):
        if len(found.history["objective"]) == 2:
            raise KeyboardInterrupt

    found = vp.fit_levels(
        lambda *_: GNVPRO, THETA, DATA, levels=3, prolong=lambda theta: theta, epochs=3,
        callback=interrupt,
    )  # fmt: skip
    assert found.status == vp.Status.INTERRUPTED and found.history["level"].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["start", "checkpoint"])
def test_levels_refuse_what_belongs_to_one_run(name):
    with pytest.raises(ValueError, match=f"^{name}: expected none for levels"):
        vp.fit_levels(
            lambda *_: GNVPRO, THETA, DATA, levels=1, prolong=None, epochs=1, **{name: "folder"}
        )


# Kept and taken up again


@pytest.fixture(scope="module")
def halves():
    """Of every method the run of six entries, and its first half."""
    return {
        name: [fit(m, validation=VALIDATION, epochs=n, **options) for n in (6, 3)]
        for name, (m, options) in METHODS.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_solution_is_kept_and_goes_on_to_the_last_bit(name, halves, tmp_path):
    whole, half = halves[name]
    half.save(tmp_path / "run")
    kept = vp.load(tmp_path / "run", PROBLEM)
    same(kept[:3], half[:3])
    same(kept.state, half.state)
    same(kept.best[:2], half.best[:2])
    assert kept.best[3:] == half.best[3:] and kept.status == half.status
    assert type(kept.state) is type(half.state) and repr(kept) == repr(half)
    method, options = METHODS[name]
    went_on = fit(method, start=kept, validation=VALIDATION, **options)
    same(went_on.state, whole.state)
    same_histories(went_on.history, whole.history)


@pytest.mark.parametrize("name", METHODS)
def test_states_are_arrays_that_others_can_keep(name, halves, tmp_path):
    """In pickle, orbax and NumPy."""
    state = halves[name][0].state
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) and leaf.size for leaf in leaves)
    same(pickle.loads(pickle.dumps(state)), state)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "state", state), state)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as file:
        same(jax.tree.unflatten(structure, [file[f"arr_{i}"] for i in range(len(leaves))]), state)


def test_what_batches_have_taught_is_kept(tmp_path):
    def features(mean, theta, inputs):
        return jnp.tanh((inputs - mean) @ theta)

    def training(bound, theta, inputs):
        mean = 0.5 * bound.args[0] + 0.5 * inputs.mean(axis=0, keepdims=True)
        return bound(theta, inputs), jax.tree_util.Partial(features, mean)

    start = jax.tree_util.Partial(features, jnp.zeros((1, 2)))
    model = vp.Separable(start, training=training)
    problem = vp.Problem(model, vp.least_squares())
    method = vp.slimtrain(problem, optax.sgd(0.05, momentum=0.9))
    theta = jnp.ones((2, 3))
    data = DATA[0] + np.float32(1), DATA[1]
    found = vp.fit(method, theta, data, epochs=2, batch_size=5, validation=VALIDATION)
    found.save(tmp_path / "run")
    kept = vp.load(tmp_path / "run", problem)
    for one, other in ((found, kept), (found.best, kept.best)):
        predictions = [vp.predict(x.problem, x.theta, x.w, data[0]) for x in (one, other)]
        np.testing.assert_array_equal(*predictions)
    mean = kept.problem.model.features.args[0]
    assert np.abs(mean).max() > 0.1


class Weights(NamedTuple):
    """As a user may name them."""

    kernel: jax.Array
    rest: list


class Layer(eqx.Module):
    kernel: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, inputs):
        return jnp.tanh(inputs @ self.kernel)


@pytest.mark.parametrize(
    "theta, fn",
    [
        (Weights(jnp.ones((2, 3)), []), lambda theta, inputs: jnp.tanh(inputs @ theta.kernel)),
        (eqx.filter(Layer(jnp.ones((2, 3)), "own"), eqx.is_array), lambda theta, x: theta(x)),
    ],
)
def test_weights_may_be_in_containers_of_ones_own(theta, fn, tmp_path):
    """For these, weights have to be shown where a solution is loaded."""
    problem = vp.Problem(vp.Separable(fn), vp.least_squares(), 1e-2)
    method = vp.lbfgsvpro(problem)
    found = vp.fit(method, theta, DATA, epochs=2, checkpoint=tmp_path / "run")
    with pytest.raises(TypeError, match=r"^theta: expected weights of the structure of those"):
        vp.load(tmp_path / "run", problem)
    kept = vp.load(tmp_path / "run", problem, theta)
    same(kept.theta, found.theta)
    whole = vp.fit(method, theta, DATA, epochs=4)
    same(vp.fit(method, theta, DATA, epochs=4, checkpoint=tmp_path / "run").state, whole.state)


def test_another_problem_is_refused_and_nothing_is_overwritten(tmp_path):
    folder = tmp_path / "run"
    found = fit(epochs=1)
    found.save(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = PROBLEM.model
    for other in (
        vp.Problem(model, vp.least_squares(), 3e-2, 2e-2),
        vp.Problem(model, vp.least_squares(), 1e-2, 1e-2),
        vp.Problem(model, vp.least_squares(), None, 1e-2),
        vp.Problem(model, vp.softmax_cross_entropy(), 3e-2, 1e-2),
    ):
        with pytest.raises(ValueError, match=r"^problem: expected the one whose solution is in "):
            vp.load(folder, other)
        with pytest.raises(ValueError, match=r"^problem: expected the one whose solution is in "):
            found._replace(problem=other).save(folder)
        if other.loss.quadratic:
            with pytest.raises(ValueError, match=r"^problem: expected the one whose solution"):
                vp.fit(vp.gnvpro(other), THETA, DATA, epochs=1, checkpoint=folder)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def wider(theta, inputs):
    return jnp.tanh(inputs @ theta["opening"] @ jnp.ones((3, 5)))


def test_features_for_other_weights_are_refused(tmp_path):
    fit(epochs=1).save(tmp_path / "run")

    def of_other_weights(theta, inputs):
        return jnp.tanh(inputs @ theta["kernel"])

    for fn in (of_other_weights, wider):
        problem = vp.Problem(vp.Separable(fn), vp.least_squares(), 3e-2, 1e-2)
        with pytest.raises(ValueError, match=r"^problem: expected .* features for .* got other"):
            vp.load(tmp_path / "run", problem)


@pytest.mark.parametrize("damage", ["json cut", "json other", "arrays cut", "arrays gone"])
def test_a_damaged_folder_is_told_and_left_alone(damage, tmp_path):
    folder = tmp_path / "run"
    found = fit(epochs=1)
    found.save(folder)
    (arrays,) = folder.glob(storage.ARRAYS)
    file = folder / storage.NAME
    if damage == "json cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "json other":
        file.write_text('{"name": "of somebody else"}')
    elif damage == "arrays cut":
        arrays.write_bytes(arrays.read_bytes()[:-100])
    else:
        arrays.unlink()
    with pytest.raises(ValueError, match=r"^folder: expected a whole file .* cannot be read"):
        vp.load(folder, PROBLEM)
    if damage.startswith("json"):
        with pytest.raises(ValueError, match=r"^folder: expected a whole file"):
            found.save(folder)


def test_a_folder_of_somebody_else_is_told_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("of value")
    for call in (
        lambda: fit(epochs=1).save(tmp_path),
        lambda: fit(epochs=1, checkpoint=tmp_path),
        lambda: fit(epochs=1, checkpoint=tmp_path / "thesis.tex"),
    ):
        with pytest.raises(FileExistsError, match=r"^folder: expected a new one"):
            call()
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileNotFoundError, match=r"^folder: expected one that a solution was saved"):
        vp.load(tmp_path, PROBLEM)


def test_a_newer_format_is_told(tmp_path):
    fit(epochs=1).save(tmp_path / "run")
    file = tmp_path / "run" / storage.NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": storage.FORMAT + 1}))
    with pytest.raises(ValueError, match="which a newer varprox has written"):
        vp.load(tmp_path / "run", PROBLEM)


@pytest.mark.parametrize(
    "old, new",
    [
        ("varprox.methods.gnvpro:State", "os:system"),
        ("varprox.methods.gnvpro:State", "optax:adam"),  # a function, which would be called
        ("varprox.methods.gnvpro:State", "varprox.nowhere:State"),
        ('"radius"', '"size"'),  # as another version may call it
    ],
)
def test_what_is_no_record_of_the_packages_is_not_made(old, new, tmp_path):
    fit(epochs=1).save(tmp_path / "run")
    file = tmp_path / "run" / storage.NAME
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"^folder: expected records of the varprox and optax"):
        vp.load(tmp_path / "run", PROBLEM)


def test_an_optimizer_of_other_classes_is_told(tmp_path):
    class Own(NamedTuple):
        count: jax.Array

    optimizer = optax.GradientTransformation(
        lambda theta: Own(jnp.zeros(())), lambda updates, state, theta=None: (updates, state)
    )
    found = fit(vp.slimtrain(PROBLEM, optimizer), epochs=1, batch_size=8)
    with pytest.raises(TypeError, match="Own, which cannot be stored"):
        found.save(tmp_path / "run")


def test_double_precision_wants_double_precision(tmp_path, x64):
    theta, data = jax.tree.map(lambda x: x.astype(np.float64), (THETA, DATA))
    vp.fit(GNVPRO, theta, data, epochs=1).save(tmp_path / "run")
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        vp.load(tmp_path / "run", PROBLEM)


def test_a_checkpoint_is_written_and_taken_up(tmp_path):
    """A run that is started again does what is left of it, and nothing where nothing is."""
    folder = tmp_path / "run"
    half = fit(epochs=3, checkpoint=folder)
    same(vp.load(folder, PROBLEM).state, half.state)
    steps = []
    whole = fit(checkpoint=folder, callback=lambda *_: steps.append(None))
    assert len(steps) == 3
    same(whole.state, fit().state)
    again = fit(checkpoint=folder, callback=lambda *_: steps.append(None))
    assert len(steps) == 3 and again.status == vp.Status.BUDGET
    same(again.state, whole.state)


def test_checkpoints_are_as_far_apart_as_was_asked(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(storage, "write", lambda *_: saved.append(None))
    fit(checkpoint=tmp_path / "run", every=0)
    fit(checkpoint=tmp_path / "run", every=1e6)
    assert len(saved) == (1 + 6 + 1) + 2


def test_a_run_without_a_method_goes_on_with_the_method_that_it_had_come_to(x64, monkeypatch):
    theta, data = jax.tree.map(lambda x: x.astype(np.float64), (THETA, DATA))
    first, last = vp.gnvpro(PROBLEM, curvature="krylov", rank=2), vp.broydenvpro(PROBLEM)

    def step(state, data):
        state, info = first.step(state, data)
        done = state.work_units >= 20
        return state._replace(status=jnp.where(done, vp.Status.STALLED, 0).astype(jnp.int32)), info

    methods = [first._replace(step=step), last]
    monkeypatch.setattr(sys.modules["varprox.training.fit"], "default_methods", lambda *_: methods)
    whole = vp.fit(PROBLEM, theta, data, max_work=60)
    for work in (18, 40):
        half = vp.fit(PROBLEM, theta, data, max_work=work)
        went_on = vp.fit(PROBLEM, theta, data, start=half, max_work=60)
        same(went_on.state, whole.state)
        same_histories(went_on.history, whole.history)
        assert went_on.method == "broydenvpro"


def test_a_killed_run_ends_as_if_nothing_had_been(tmp_path):
    """Killed at random moments, also while it is being kept, and started again."""
    script = Path(__file__).with_name("kept_run.py")
    folder, rng = tmp_path / "run", random.Random(0)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in conftest.py
    }
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, script, folder], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(rng.randint(1, 8)):
            assert process.stdout.readline() == "entry\n"
        time.sleep(rng.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    expected = kept_run()
    entries = []
    found = kept_run(checkpoint=folder, every=0, callback=lambda *_: entries.append(None))
    assert 0 < len(entries) < len(expected.history["objective"]) - 3
    same(found.state, expected.state)
    same_histories(found.history, expected.history)
    assert (np.diff(found.history["seconds"]) > 0).all()


# Columns and clocks


def test_a_history_grows_and_keeps_what_it_has_shown():
    history = History()
    for step in range(40):
        history.append({"even": 2.0 * step} | ({"late": 1.0} if step > 20 else {}))
        if step == 30:
            shown = history.columns()
    history.update({"last": 5.0})
    np.testing.assert_array_equal(history.columns()["even"], 2 * np.arange(40))
    assert len(shown["even"]) == 31 and "last" not in shown
    assert np.isnan(history.columns()["late"][:21]).all() and history.last()["last"] == 5
    again = History(history.columns())
    again.append({"even": 80.0})
    np.testing.assert_array_equal(again.columns()["even"], 2 * np.arange(41))
    with pytest.raises(ValueError, match="read-only"):
        shown["even"][0] = 1


def test_spans_that_lie_in_one_another_count_once():
    assert _covered([(1, 2), (3, 4), (0.5, 4.5), (6, 7)]) == pytest.approx(5)
    assert _covered([]) == 0


def test_the_clock_tells_compiling_from_running():
    def slow(x):
        time.sleep(0.2)  # while it is traced
        return jnp.sin(x) @ x.T

    def waits(x):
        time.sleep(0.1)
        return fn(x)

    fn = jax.jit(slow)
    x = jnp.ones((3, 3))
    result, seconds, compiling = timed(waits, x)
    np.testing.assert_allclose(result, jnp.sin(x) @ x.T, rtol=1e-6)
    assert compiling > 0.2 and 0.1 <= seconds < 0.2
    _, seconds, compiling = timed(waits, x)
    assert compiling == 0 and 0.1 <= seconds < 0.2


@pytest.mark.parametrize("stage", ["jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile"])
def test_every_stage_of_compilation_counts(stage):
    def works():
        time.sleep(0.2)
        told = jax.monitoring.record_event_duration_secs
        told(f"/jax/core/compile/{stage}_duration", 0.05)
        told("/jax/something/else_duration", 0.2)

    _, seconds, compiling = timed(works)
    assert compiling == pytest.approx(0.05) and seconds > 0.14


def test_preparation_between_tracing_and_lowering_counts_as_compilation():
    def works():
        told = jax.monitoring.record_event_duration_secs
        time.sleep(0.2)
        told("/jax/core/compile/jaxpr_trace_duration", 0.05)
        time.sleep(0.1)
        told("/jax/core/compile/jaxpr_to_mlir_module_duration", 0.01)
        time.sleep(0.1)
        told("/jax/core/compile/jaxpr_trace_duration", 0.01)

    _, seconds, compiling = timed(works)
    assert compiling >= 0.16 and seconds > 0.2


def test_what_another_thread_compiles_is_not_the_callers():
    def compiles():
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 0.1)

    def works():
        time.sleep(0.1)
        other = threading.Thread(target=compiles)
        other.start()
        other.join()

    assert timed(works)[2] == 0
