# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a simulator to a surrogate
#
# A surrogate is a network that answers in place of a simulator. You will see one
# trained on a few hundred runs of a simulator of prey and predators, how its error is
# measured, and how an ensemble of surrogates says where it should not be trusted.

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from scipy.integrate import solve_ivp

import varprox as vp

QUICK = "VARPROX_QUICK" in os.environ  # the test suite sets it
jax.config.update("jax_enable_x64", True)
plt.rcParams |= {
    "figure.constrained_layout.use": True,
    "figure.dpi": 90,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
COLOURS = {
    "GNvpro": "#0072b2",
    "Broydenvpro": "#8b1a1a",
    "LBFGSvpro": "#d55e00",
    "slimTrain": "#e69f00",
    "Adam": "#009e73",
    "L-BFGS": "#555555",
    "GN": "#cc79a7",
}

# %% [markdown]
# ## The simulator
#
# Prey $x$ and predators $y$ follow $x' = a x - b x y$, $y' = c x y - d y$. The
# four rates are the parameters. What is observed are both populations at 20 times, so
# an answer has 40 numbers. SciPy solves the equations to high accuracy.

# %%
TIMES = np.linspace(0.5, 10, 20)
LOW, HIGH = np.array([0.6, 0.3, 0.3, 0.6]), np.array([1.2, 0.6, 0.6, 1.2])


def simulate(rates):
    a, b, c, d = rates

    def change(_, state):
        x, y = state
        return [a * x - b * x * y, c * x * y - d * y]

    solved = solve_ivp(change, (0, 10), [1.5, 1.0], t_eval=TIMES, rtol=1e-8, atol=1e-8)
    return solved.y.ravel()


def sample(count, seed):
    """Rates drawn uniformly, as numbers between −1 and 1, and what is observed."""
    units = np.random.default_rng(seed).uniform(-1, 1, (count, 4))
    rates = LOW + (units + 1) / 2 * (HIGH - LOW)
    return jnp.asarray(units), jnp.asarray(np.array([simulate(r) for r in rates]))


train, validation = sample(60 if QUICK else 300, seed=0), sample(100, seed=1)
test = sample(50 if QUICK else 300, seed=2)

# %% [markdown]
# ## The surrogate
#
# A dense network with two hidden layers has one linear weight per feature and
# observation. Variable projection solves for these 40 columns at once. GNvpro with the
# whole matrix trains the rest.

# %%
WIDTH = 6 if QUICK else 16


def relative(predictions, targets):
    return jnp.sqrt(jnp.sum((predictions - targets) ** 2) / jnp.sum(targets**2))


def surrogate(seed, data, max_work):
    net = vp.networks.Dense((4, WIDTH, WIDTH, 40), rngs=nnx.Rngs(seed))
    theta, model = vp.nnx.split(net)
    problem = vp.Problem(model, vp.least_squares(), theta_penalty=1e-8, w_penalty=1e-8)
    return problem, vp.fit(
        vp.gnvpro(problem, curvature="dense"),
        theta,
        data,
        validation=validation,
        metrics={"error": relative},
        max_work=max_work,
        progress=False,
    )


problem, solution = surrogate(0, train, max_work=60 if QUICK else 1500)
print(solution)
answers = vp.predict(problem, solution.theta, solution.w, test[0])
print(f"relative error on the test runs: {float(relative(answers, test[1])):.1e}")

# %% [markdown]
# How long does an answer take? The network answers for many parameters at once, so the
# time per answer counts.

# %%
predict = jax.jit(
    lambda inputs: vp.predict(problem, solution.theta, solution.w, inputs)
)
many, _ = sample(10, seed=3)
many = jnp.tile(many, (100, 1))
predict(many).block_until_ready()  # compiles
begin = time.perf_counter()
predict(many).block_until_ready()
of_network = (time.perf_counter() - begin) / len(many)
begin = time.perf_counter()
for rates in LOW + (np.asarray(many[:10]) + 1) / 2 * (HIGH - LOW):
    simulate(rates)
of_simulator = (time.perf_counter() - begin) / 10
print(f"simulator {of_simulator:.1e} s, network {of_network:.1e} s per answer")
print(f"the network is {of_simulator / of_network:.0f} times as fast")

# %% [markdown]
# ## Where it errs
#
# On the left are three test runs that the network has not seen: the median one, and
# the two with the largest errors. On the right is how the objective and the error fell.
# The error on the validation runs stays above the training error: 300 runs say only so
# much of the simulator.

# %%
errors = np.linalg.norm(answers - test[1], axis=1) / np.linalg.norm(test[1], axis=1)
order = np.argsort(errors)
figure, axes = plt.subplots(1, 4, figsize=(11, 3), width_ratios=[1, 1, 1, 1.3])
for axis, index in zip(axes, order[[len(order) // 2, -2, -1]], strict=False):
    for part, name in ((slice(0, 20), "prey"), (slice(20, 40), "predators")):
        line = axis.plot(
            TIMES,
            answers[index, part],
            color=("#d55e00" if part.start else "#0072b2"),
            label=name,
        )
        axis.plot(TIMES, test[1][index, part], "k.", ms=4)
    axis.set(xlabel="time", title=f"relative error {errors[index]:.0e}")
axes[0].set(ylabel="population (dots: simulated)")
axes[0].legend()
history = solution.history
for name, style in (("train_error", "-"), ("validation_error", "--")):
    axes[3].loglog(
        history["work_units"],
        history[name],
        style,
        color=COLOURS["GNvpro"],
        label=name.split("_")[0],
    )
axes[3].set(xlabel="work units", ylabel="relative error")
axes[3].legend()
plt.show()

# %% [markdown]
# ## An ensemble
#
# The error of a new answer is not known, since the simulator is what we want to save.
# Several surrogates from different starts agree where the data determine the answer,
# and differ where they do not. Their spread is a warning that costs no simulation. We
# look at it inside the range of the training runs, and outside: there each parameter
# may be up to one and a half times as far from the middle.

# %% tags=["thumbnail"]
MEMBERS = 2 if QUICK else 6
members = [(problem, solution)]
for seed in range(1, MEMBERS):
    members.append(surrogate(seed, train, max_work=40 if QUICK else 1500))


def ensemble(inputs):
    """Mean and standard deviation of the members' answers."""
    answers = [vp.predict(p, s.theta, s.w, inputs) for p, s in members]
    return np.mean(answers, axis=0), np.std(answers, axis=0, ddof=1)


units, _ = sample(50 if QUICK else 300, seed=4)
wide = 1.5 * units
outside = wide[jnp.max(jnp.abs(wide), axis=1) > 1]
observed = np.array(
    [simulate(LOW + (u + 1) / 2 * (HIGH - LOW)) for u in np.asarray(outside)]
)
places = {"inside": test, "outside": (outside, observed)}

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
colours = {"inside": "#0072b2", "outside": "#d55e00"}
for name, (inputs, targets) in places.items():
    mean, spread = ensemble(inputs)
    size = np.linalg.norm(targets, axis=1)
    error_of = np.linalg.norm(mean - targets, axis=1) / size
    spread_of = np.linalg.norm(spread, axis=1) / size
    axes[0].loglog(spread_of, error_of, ".", color=colours[name], label=name)
    within = np.mean(error_of <= 2 * spread_of)
    print(
        f"{name:8} error of the mean {np.median(error_of):.1e}, spread "
        f"{np.median(spread_of):.1e} (medians); error below twice the spread "
        f"in {100 * within:.0f} %"
    )
    axes[1].hist(
        np.log10(error_of), bins=25, histtype="step", color=colours[name], label=name
    )
limits = np.array(axes[0].get_xlim())
axes[0].plot(limits, limits, "k:", label="error = spread")
axes[0].set(
    xlabel="spread of the ensemble, relative", ylabel="error of its mean, relative"
)
axes[1].set(xlabel="log₁₀ of the relative error", ylabel="answers")
axes[0].legend()
axes[1].legend()
plt.show()

# %% [markdown]
# Spread and error go together over orders of magnitude, so a large spread is a reason
# to run the simulator. The spread is not an error bar: all members share the same data
# and the same form, and can be wrong together.

# %% [markdown]
# ## What to change
#
# - `train`: with 100 runs the test error is several times the training error. With 1000
#   runs the gap closes, and the network and its budget are the limit: raise `WIDTH` or
#   `max_work`.
# - `WIDTH`: a wider network fits the training runs more closely. Look at the validation
#   error before you believe it.
# - `curvature="dense"`: `vp.lbfgsvpro(problem)` takes cheaper steps. Compare the two at
#   equal work and at equal seconds.
#
# ## What to try next
#
# - `vp.datasets.convection_diffusion_reaction` and `vp.datasets.dc_resistivity` are
#   larger simulators, and `python -m benchmarks cdr` trains their surrogates.
# - [Differential equations](07_pinn.ipynb) trains a network on the equation itself,
#   without a simulator.
# - [Curve fitting](09_curve_fitting.ipynb) goes the other way, from observations to
#   parameters.
