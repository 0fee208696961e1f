"""What a run has found: weights, history and why it ended; and how it is kept."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from varprox.checks import listed, told
from varprox.methods.method import Status
from varprox.methods.slimtrain import learned_by, with_learned
from varprox.problem.model import Problem, check_problem
from varprox.training import storage


class Best(NamedTuple):
    """The weights with the lowest validation loss that a run has evaluated.

    Attributes:
        theta: The nonlinear weights θ.
        w: The last layer W, (columns, outputs).
        problem: The problem, with what its features had learned from batches by then.
        validation_loss: The loss on the validation data.
        step: The entry of the history that they belong to, counted from the start as 0.
    """

    theta: Any
    w: jax.Array
    problem: Problem
    validation_loss: float
    step: int


class Solution(NamedTuple):
    """The trained weights, the history of the run and why it ended.

    ``history`` maps column names to float arrays with one entry per step, the first for the start.
    ``pandas.DataFrame(solution.history)`` makes a table of it. Under a stochastic method an entry
    is an epoch: its columns are means over the steps, and the start has no objective.

    ================================================  ==========================================
    Column                                            What it holds
    ================================================  ==========================================
    ``objective``                                     Φ(W, θ), penalties included
    ``train_loss``                                    the objective without penalties
    ``work_units``                                    work so far, in passes over the data
    ``seconds``                                       run time so far, without compilation and
                                                      evaluation
    the fields of the method's info                   such as ``gradient_norm``, see below
    ``validation_loss``                               the loss on the validation data, if given
    ``train_<name>``, ``validation_<name>``           your metrics, if given
    ================================================  ==========================================

    The fields of infos are explained in ``varprox.methods.gnvpro.Info``,
    ``varprox.methods.quasi_newton.Info`` and ``varprox.methods.slimtrain.Info``. An entry is NaN if
    its column was not evaluated there.

    ``fit(method, theta, data, start=solution)`` goes on from where a run has ended, and
    ``solution.save(folder)`` keeps it for another process.

    Attributes:
        theta: The trained nonlinear weights θ, with the structure that ``fit`` was given.
        w: The trained last layer W, (columns, outputs), its last row the bias if the head has one.
        history: The mapping from column names to arrays.
        status: Why the run ended, a ``Status``; ``status.message`` is a sentence.
        compile_seconds: The seconds spent on tracing and compiling ``init`` and ``step``.
        problem: The problem of the method, with what its features have learned from batches. Pass
            this one to ``predict``.
        state: The last state of the method.
        method: The name of the method; of the last one if ``fit`` was given a problem.
        best: The weights with the lowest validation loss, with the fields ``theta``, ``w``,
            ``problem``, ``validation_loss`` and ``step``; None without validation data.
        inputs: The shapes and dtypes of the inputs, by which ``load`` tells problems apart.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> data = inputs, 2 * jnp.exp(-3 * inputs)
        >>> solution = vp.fit(vp.lbfgsvpro(problem), jnp.ones(1), data, epochs=3)
        >>> solution
        Solution: BUDGET. The work, the seconds or the epochs allowed are used up.
          objective ... after 3 steps of lbfgsvpro
          ...
        >>> solution.history["objective"].shape
        (4,)
        >>> method = vp.lbfgsvpro(problem)
        >>> vp.fit(method, solution.theta, data, start=solution, max_work=200).status.name
        'CONVERGED'
    """

    theta: Any
    w: jax.Array
    history: Mapping[str, np.ndarray]
    status: Status
    compile_seconds: float
    problem: Problem
    state: Any = None
    method: str = ""
    best: Best | None = None
    inputs: Any = None

    def __repr__(self) -> str:
        """How the run ended, in a few lines; the arrays are left to those who ask for them."""
        last = {name: column[-1] for name, column in self.history.items() if len(column)}
        steps = max(max(map(len, self.history.values()), default=0) - 1, 0)
        theta = jax.tree.leaves(self.theta)
        size = sum(map(np.size, theta))
        spent = [
            f"{last['work_units']:.6g} work units" if "work_units" in last else "",
            f"{last['seconds']:.3g} seconds" if "seconds" in last else "",
            f"{self.compile_seconds:.3g} seconds to compile",
        ]
        by = f" of {self.method}" if self.method else ""
        return "\n".join(
            [
                f"Solution: {self.status.name}. {self.status.message}",
                f"  objective {last.get('objective', math.nan):.6g} after {steps} steps{by}",
                f"  {', '.join(filter(None, spent))}",
                f"  theta: {size} weights in {len(theta)} arrays; w: {np.shape(self.w)}",
                f"  history: {', '.join(self.history)}",
            ]
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Keeps the solution in a folder, for ``varprox.load`` in this or another process.

        The folder holds a NumPy archive and a JSON file, and nothing is pickled. A solution of the
        same problem that is there is replaced, in one go: whenever the process is killed, the
        folder holds the old solution or the new one.

        Arguments:
            folder: The path of a new folder, or of one with an earlier solution.

        Raises:
            FileExistsError: If the folder has something else in it.
            TypeError: If the state of the optimizer of ``slimtrain`` is made of classes of other
                packages than optax.
            ValueError: If the folder holds the solution of another problem, or a damaged one.

        Example:
            >>> import tempfile
            >>> import jax.numpy as jnp
            >>> import varprox as vp
            >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
            >>> problem = vp.Problem(model, vp.least_squares())
            >>> inputs = jnp.linspace(0, 1, 20)[:, None]
            >>> data = inputs, 2 * jnp.exp(-3 * inputs)
            >>> solution = vp.fit(problem, jnp.ones(1), data, max_work=100)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     solution.save(folder)
            ...     again = vp.load(folder, problem)
            >>> bool((again.theta == solution.theta).all()), again.status.name
            (True, 'CONVERGED')
        """
        about = {
            "problem": _described(self.problem),
            "status": self.status.name,
            "compile_seconds": self.compile_seconds,
            "method": self.method,
        }
        best = self.best
        tree = {
            "theta": self.theta,
            "w": self.w,
            "history": {name: np.asarray(column) for name, column in self.history.items()},
            "state": self.state,
            "inputs": jax.tree.map(lambda x: np.empty((0, *x.shape), x.dtype), self.inputs),
            "learned": learned_by(self.problem.model),
            "best": best
            and {
                "theta": best.theta,
                "w": best.w,
                "learned": learned_by(best.problem.model),
                "validation_loss": np.asarray(best.validation_loss),
                "step": np.asarray(best.step),
            },
        }
        storage.write(folder, about, tree, self.theta)


def load(folder: str | os.PathLike, problem: Problem, theta: Any = None) -> Solution:
    """The solution that ``solution.save`` has kept in a folder.

    Arguments:
        folder: The path that was given to ``save``, or to ``fit`` as ``checkpoint``.
        problem: The problem that was solved, made anew: functions are not stored. Its loss, head
            and penalties are compared with those that were saved, and what its features make of the
            shapes of θ and inputs.
        theta: Weights of the structure that was saved, such as those that training began with.
            Needed only where θ has other containers than dicts, lists and tuples, such as an
            equinox module.

    Returns:
        The ``Solution``, equal to the one that was saved to the last bit.

    Raises:
        FileNotFoundError: If there is no solution in the folder.
        TypeError: If ``problem`` is not a ``Problem``, or if ``theta`` is needed and missing.
        ValueError: If the folder holds the solution of another problem or a damaged one, or arrays
            in double precision which JAX is not set to use.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> data = inputs, 2 * jnp.exp(-3 * inputs)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = vp.fit(problem, jnp.ones(1), data, max_work=5, checkpoint=folder)
        ...     again = vp.load(folder, problem)
        >>> vp.fit(problem, again.theta, data, start=again, max_work=100).status.name
        'CONVERGED'
    """
    check_problem(problem)
    about = storage.read_about(folder)
    storage.check_same(about["problem"], _described(problem), folder)
    tree = storage.read(folder, theta)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree["inputs"])
    if jax.tree.leaves(inputs):
        _check_features(problem, tree, inputs, folder)
    best = tree["best"]
    return Solution(
        theta=tree["theta"],
        w=tree["w"],
        history=tree["history"],
        status=Status[about["status"]],
        compile_seconds=about["compile_seconds"],
        problem=with_learned(problem, tree["learned"]),
        state=tree["state"],
        method=about["method"],
        best=best
        and Best(
            best["theta"],
            best["w"],
            with_learned(problem, best["learned"]),
            float(best["validation_loss"]),
            int(best["step"]),
        ),
        inputs=inputs,
    )


def _check_features(problem, tree, inputs, folder):
    """Refuses a problem whose features do not go with the weights that were saved."""
    model = problem.model
    try:
        if len(learned_by(model)) != len(tree["learned"]):
            raise ValueError("they learn from batches" if learned_by(model) else "they learn not")
        jax.eval_shape(
            lambda theta, w, inputs: model.head.apply(model.features(theta, inputs), w),
            tree["theta"], tree["w"], inputs,
        )  # fmt: skip
    except Exception as error:  # features may raise anything
        raise ValueError(
            f"problem: expected the one whose solution is in {folder}, with features for "
            f"{listed(theta=tree['theta'], w=tree['w'])}, got other ones: {told(error)}"
        ) from error


def _described(problem):
    """What can be told of a problem in numbers and words, to tell it from another one."""
    return {
        "loss": type(problem.loss).__name__,
        "head": type(problem.model.head).__name__,
        "w_penalty": float(problem.w_penalty),
        "theta_penalty": [np.asarray(x).tolist() for x in jax.tree.leaves(problem.theta_penalty)],
    }


def join(levels: Sequence[Solution]) -> Solution:
    """The solution of the last of several levels with the history of them all, as `fit_levels` has
    it. The first may be a solution of `fit_levels` itself."""
    histories, level, spent = [], 0.0, {"work_units": 0.0, "seconds": 0.0}
    for solution in levels:
        own = {"level": np.zeros(len(solution.history["seconds"]))} | dict(solution.history)
        own["level"] = own["level"] + level
        level = own["level"][-1] + 1
        own |= {name: own[name] + before for name, before in spent.items()}
        spent = {name: own[name][-1] for name in spent}
        histories.append(own)
    columns = dict.fromkeys(name for own in reversed(histories) for name in own)

    def whole(name):  # a level without a step has no columns of what steps do
        parts = [own.get(name, np.full(len(own["level"]), math.nan)) for own in histories]
        return np.concatenate(parts)

    return levels[-1]._replace(
        history={name: whole(name) for name in columns},
        compile_seconds=sum(solution.compile_seconds for solution in levels),
    )
