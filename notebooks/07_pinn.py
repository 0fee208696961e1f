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
# # Differential equations: physics-informed networks
#
# A network that solves a *linear* differential equation by collocation is linear in its
# last layer, so for given hidden weights the best last layer is the solution of one
# linear least-squares problem. You will see how to write that problem down in a few
# lines, and what it brings: 32 tanh units solve Poisson's equation to about eight
# digits. The same lines then solve the heat equation, and find an unknown diffusivity
# from noisy measurements, with an error bar.

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.optimize
from jax.flatten_util import ravel_pytree

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
# ## Why the last layer is a linear problem
#
# Write the network as features $\varphi_j$ with nonlinear weights $\theta$, and a last
# layer $W = (w_1, \dots, w_m)$:
#
# $$u(x) = \sum_j w_j\, \varphi_j(x; \theta).$$
#
# A linear differential operator $L$ passes through the sum, so the residual of
# $L u = f$ is linear in $W$, too:
#
# $$L u(x) - f(x) = \sum_j w_j\, L \varphi_j(x; \theta) - f(x).$$
#
# Boundary conditions $u = g$ are linear without further ado. With collocation points
# $x_i$ and weights $\omega_i$, all conditions together are one least-squares problem,
#
# $$\min_{\theta, W}\ \tfrac12 \lVert A(\theta) W - c \rVert^2, \qquad
# A_{ij} = \omega_i \begin{cases} L \varphi_j(x_i; \theta) & \text{inside} \\
# \varphi_j(x_i; \theta) & \text{on the boundary,} \end{cases} \qquad
# c_i = \omega_i \begin{cases} f(x_i) & \text{inside} \\
# g(x_i) & \text{on the boundary.} \end{cases}$$
#
# For fixed $\theta$ this is a linear problem in $W$. Variable projection solves it
# exactly in every step, and trains $\theta$ alone.

# %% [markdown]
# ## The rows in code
#
# The features are tanh units and the constant 1, at one point. The constant is a
# feature, not a bias of the last layer, because $L$ acts on it as well.


# %%
def basis(theta, x):
    """The features at one point, with shape (units + 1,)."""
    return jnp.append(jnp.tanh(theta["k"] @ x + theta["b"]), jnp.ones(1, x.dtype))


def start(units, seed):
    rng = np.random.default_rng(seed)
    weights = {"k": rng.normal(size=(units, 2)), "b": rng.normal(size=units)}
    return jax.tree.map(jnp.asarray, weights)


# %% [markdown]
# A condition at a point is a linear combination of $u$ and its derivatives there, so it
# is a point and five coefficients. Automatic differentiation does the rest: `jet` holds
# the derivatives, and the features of a condition are its coefficients times the jet of
# the basis.


# %%
def jet(f, x):
    """The rows f, ∂₁f, ∂₂f, ∂₁²f and ∂₂²f at x."""

    def along(f, v):
        return lambda x: jax.jvp(f, (x,), (v,))[1]

    axes = jnp.eye(2, dtype=x.dtype)
    first = [along(f, v) for v in axes]
    second = [along(along(f, v), v) for v in axes]
    return jnp.stack([g(x) for g in (f, *first, *second)])


def apply(f, inputs):
    """The left-hand sides of the conditions for f."""
    return jax.vmap(lambda x, coefficients: coefficients @ jet(f, x))(*inputs)


def features(theta, inputs):
    return apply(lambda x: basis(theta, x), inputs)


def separable(features, penalty=1e-12):
    model = vp.Separable(features, head=vp.dense(bias=False))
    return vp.Problem(
        model, vp.least_squares(), theta_penalty=penalty, w_penalty=penalty
    )


problem = separable(features)

# %% [markdown]
# The conditions come in parts, such as the equation inside and the value on the
# boundary. A part's coefficients are scaled such that the objective is half the sum
# over parts of *weight* times the part's *mean* square: then the number of points in a
# part has no influence on its importance.


# %%
def conditions(*parts):
    """The inputs for parts (points, coefficients, weight)."""
    total = sum(len(x) for x, *_ in parts)
    points = np.concatenate([x for x, *_ in parts])
    coefficients = [
        np.sqrt(weight * total / len(x)) * np.broadcast_to(c, (len(x), 5))
        for x, c, weight in parts
    ]
    return jnp.asarray(points), jnp.asarray(np.concatenate(coefficients))


def grid(across, up):
    return np.stack(np.meshgrid(across, up, indexing="ij"), -1).reshape(-1, 2)


# %% [markdown]
# ## Poisson's equation
#
# The equation is $-\Delta u = f$ on the unit square, with 900 points inside and 120 on
# the boundary. We choose the solution $u = \sin \pi x \sin \pi y$ and compute the
# right-hand sides from it, so that the error is known. It is measured on a grid of
# 65 × 65 other points, where the condition is the value itself.

# %%
VALUE, MINUS_LAPLACIAN = np.array([[1, 0, 0, 0, 0], [0, 0, 0, -1, -1]])
cells, ticks, sides = (np.arange(30) + 0.5) / 30, np.linspace(0, 1, 30), [0.0, 1.0]
interior = grid(cells, cells)
edge = np.concatenate([grid(ticks, sides), grid(sides, ticks)])
fine = conditions((grid(np.linspace(0, 1, 65), np.linspace(0, 1, 65)), VALUE, 1.0))


def solved_by(exact, inputs):
    """Data whose right-hand sides are such that `exact` meets all conditions."""
    return inputs, jax.jit(apply, static_argnums=0)(exact, inputs)


def smooth(x):
    return jnp.prod(jnp.sin(jnp.pi * x), keepdims=True)


poisson = conditions((interior, MINUS_LAPLACIAN, 1.0), (edge, VALUE, 10.0))
data, test = solved_by(smooth, poisson), solved_by(smooth, fine)

# %% [markdown]
# That is the whole set-up. `fit` takes the error as a metric on the test data.


# %%
@jax.jit
def error(predictions, targets):
    """The L2 error relative to the solution."""
    return jnp.sqrt(jnp.mean((predictions - targets) ** 2) / jnp.mean(targets**2))


work = 40 if QUICK else 3000
measured = {"metrics": {"error": error}, "evaluate_every": 10}
theta = start(32, seed=0)
solution = vp.fit(
    vp.gnvpro(problem), theta, data, validation=test, max_work=work, **measured
)
print(solution)
print(f"relative error: {solution.history['validation_error'][-1]:.1e}")

# %% [markdown]
# ## A race against training all weights
#
# Three methods of variable projection, and four that train hidden weights and last
# layer together. All begin at the same $\theta$. The work is the same for all: 3000
# passes over the points, forward or backward. Seconds exclude compilation and the
# evaluation of errors.
#
# The first two rivals are the same optimisers as GNvpro and Broydenvpro, with the last
# layer among the weights that they train: the whole network is a single feature, and
# no more than its scale is left to be solved for. The second of them is self-scaled
# Broyden on all weights, which Urbán, Stefanou and Pons (2025) recommend for
# physics-informed networks. For both the last layer starts at random, as is usual.


# %%
def network(weights, inputs):
    return features(weights["theta"], inputs) @ weights["w"]


whole = separable(network)
random_w = jnp.asarray(np.random.default_rng(1).normal(size=(33, 1)) / 33**0.5)
random = {"theta": theta, "w": random_w}
solved = {"theta": theta, "w": vp.solve_w(problem, theta, data)}

runs = {
    "GNvpro": (vp.gnvpro(problem), theta),
    "Broydenvpro": (vp.broydenvpro(problem), theta),
    "LBFGSvpro": (vp.lbfgsvpro(problem), theta),
    "GN, all weights": (vp.gnvpro(whole), random),
    "Broyden, all weights": (vp.broydenvpro(whole), random),
}
if QUICK:
    runs = {"GNvpro": runs["GNvpro"]}


def race(data, test):
    """Work, seconds and error along each run, and where the runs ended."""
    curves, ends = {}, {}
    for name, (method, begin) in runs.items():
        vp.fit(method, begin, data, epochs=1)  # the first call of anything is slower
        ends[name] = vp.fit(
            method, begin, data, validation=test, max_work=work, **measured
        )
        table = ends[name].history
        seen = np.isfinite(table["validation_error"])
        columns = "work_units", "seconds", "validation_error"
        curves[name] = [table[column][seen] for column in columns]
    return curves, ends


curves, ends = race(data, test)

# %% [markdown]
# The other two rivals are independent of varprox: SciPy's L-BFGS, and Adam with a
# cosine schedule and the better of two rates. Each runs from the random last layer and
# from $W(\theta)$, and the better run is shown.


# %%
@jax.jit
@jax.value_and_grad
def objective(weights):
    return 0.5 * jnp.mean((network(weights, data[0]) - data[1]) ** 2)


@jax.jit
def error_of(weights):
    return error(network(weights, test[0]), test[1])


def lbfgs(weights):
    flat, unravel = ravel_pytree(weights)
    path, passes = [], 0

    def value_and_gradient(x):
        nonlocal passes
        passes += 2
        value, gradient = objective(unravel(jnp.asarray(x)))
        return float(value), np.asarray(ravel_pytree(gradient)[0])

    def note(x):
        path.append((passes, time.perf_counter() - begin, x.copy()))

    budget = {"maxfun": work // 2, "maxiter": work, "ftol": 0, "gtol": 0, "maxcor": 20}
    value_and_gradient(flat)  # compiles
    begin, passes = time.perf_counter(), 0
    scipy.optimize.minimize(
        value_and_gradient,
        flat,
        jac=True,
        method="L-BFGS-B",
        callback=note,
        options=budget,
    )
    return [(n, s, error_of(unravel(jnp.asarray(x)))) for n, s, x in path[::10]]


cosine = optax.cosine_decay_schedule(1.0, work // 2)
direction = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(cosine))


@jax.jit
def adam_step(weights, gradient, state, rate):
    change, state = direction.update(gradient, state)
    return jax.tree.map(lambda a, d: a - rate * d, weights, change), state


def adam(weights, rate):
    state, path = direction.init(weights), []
    gradient = objective(weights)[1]
    jax.block_until_ready(adam_step(weights, gradient, state, rate))  # compiles
    begin = time.perf_counter()
    for k in range(1, work // 2 + 1):
        weights, state = adam_step(weights, objective(weights)[1], state, rate)
        if k % 20 == 0:
            jax.block_until_ready(weights)
            path.append((2 * k, time.perf_counter() - begin, weights))
    return [(n, s, error_of(weights)) for n, s, weights in path]


tried = {("L-BFGS", "random"): lbfgs(random), ("L-BFGS", "W(θ)"): lbfgs(solved)}
for rate in (0.2,) if QUICK else (0.02, 0.2):
    tried[("Adam", f"random, rate {rate}")] = adam(random, rate)
    tried[("Adam", f"W(θ), rate {rate}")] = adam(solved, rate)
for (name, settings), path in tried.items():
    print(f"{name:7} {settings:18} ends at {path[-1][-1]:.1e}")
for name in ("L-BFGS", "Adam"):
    best = min((p for (n, _), p in tried.items() if n == name), key=lambda p: p[-1][-1])
    curves[name] = np.array(best, dtype=float).T

# %% [markdown]
# The table says how much work and time each method took to an error of $10^{-4}$ and of
# $10^{-6}$, and where it ended.


# %%
def first(column, errors, level):
    below = np.flatnonzero(errors <= level)
    return f"{column[below[0]]:.3g}" if len(below) else "–"


heads = "work, 1e-4", "work, 1e-6", "seconds, 1e-4", "seconds, 1e-6", "at the end"
print(f"{'':20}" + "".join(f"{head:>15}" for head in heads))
for name, (passes, seconds, errors) in curves.items():
    row = [first(c, errors, at) for c in (passes, seconds) for at in (1e-4, 1e-6)]
    print(f"{name:20}" + "".join(f"{v:>15}" for v in [*row, f"{errors[-1]:.1e}"]))

assert QUICK or curves["GNvpro"][2][-1] < 1e-6

# %% tags=["thumbnail"]
STYLE = {name: {"color": colour} for name, colour in COLOURS.items()} | {
    "GN, all weights": {"color": COLOURS["GN"], "ls": "--"},
    "Broyden, all weights": {"color": COLOURS["Broydenvpro"], "ls": "--"},
    "L-BFGS": {"color": COLOURS["L-BFGS"], "ls": "--"},
    "Adam": {"color": COLOURS["Adam"], "ls": "--"},
}


def image(axis, column, title, signed=False):
    """Filled contours of values on the fine grid, with a colour bar."""
    picture, ticks = np.reshape(column, (65, 65)).T, np.linspace(0, 1, 65)
    low, high = np.min(picture), np.max(picture)
    if signed:
        low, high = -max(-low, high), max(-low, high)
    levels, colours = np.linspace(low, high, 22), "RdBu_r" if signed else "viridis"
    shown = axis.contourf(ticks, ticks, picture, levels, cmap=colours)
    axis.set(title=title, xticks=(0, 1), yticks=(0, 1), aspect="equal")
    axis.grid(False)
    plt.colorbar(shown, ax=axis, shrink=0.9, ticks=plt.MaxNLocator(4))


def draw(axis, curves, column, label):
    """The errors against a column of the curves, at up to forty points of each run."""
    for name, curve in curves.items():
        shown = np.unique(np.geomspace(1, len(curve[2]), 40).astype(int)) - 1
        axis.loglog(curve[column][shown], curve[2][shown], label=name, **STYLE[name])
    axis.set(xlabel=label, ylabel="relative L2 error")


u = vp.predict(problem, ends["GNvpro"].theta, ends["GNvpro"].w, test[0])
wrong = u - test[1]
figure, axes = plt.subplot_mosaic(
    [["u", "curves"], ["error", "curves"]], figsize=(8.5, 4.2), width_ratios=[1, 2.4]
)
image(axes["u"], u, "solution $u$ by GNvpro")
image(axes["error"], wrong, "its error", signed=True)
draw(axes["curves"], curves, 1, "seconds")
axes["curves"].legend()
plt.show()

# %% [markdown]
# Solid lines belong to variable projection, dashed ones to the training of all weights.
# Compare each dashed line with the solid one of its colour: the optimiser is the same,
# and what is left is the effect of the projection. At equal accuracy it saves most of
# the work. From five starts that we tried, to an error of $10^{-6}$, the factor is
# between two and twelve for Gauss–Newton, and between two and five or more for Broyden.
# L-BFGS and Adam are far behind. Second derivatives make the least-squares problem
# ill-conditioned, and the exact solve for $W$ takes away a large part of this.
#
# The same runs against work:

# %%
figure, axis = plt.subplots(figsize=(7.5, 3.4))
draw(axis, curves, 0, "work: passes over the points")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## When is it worth training the hidden weights?
#
# The solve for $W$ alone is a method of its own: draw many hidden weights at random,
# never train them, and solve once. Let us compare it with 32 trained units on two
# solutions. One is the smooth solution above. The other has a steep layer along a line
# besides:
# $u = \sin \pi x \sin \pi y + \tfrac12 \arctan 10\,(x + \tfrac12 y - \tfrac34)$.


# %%
def layered(x):
    return smooth(x) + 0.5 * jnp.arctan(10 * (x[:1] + 0.5 * x[1:] - 0.75))


def random_units(units, data, test):
    """The error without training, with the best of three sizes of hidden weights."""
    rows, errors = jax.jit(features), []
    for size in (1.0, 2.0, 4.0):
        drawn = {name: size * array for name, array in start(units, seed=2).items()}
        w = np.linalg.lstsq(rows(drawn, data[0]), data[1], rcond=1e-15)[0]
        errors.append(float(error(rows(drawn, test[0]) @ w, test[1])))
    return min(errors)


steep_data, steep_test = solved_by(layered, poisson), solved_by(layered, fine)
widths = (32,) if QUICK else (32, 64, 128, 256, 512)
untrained = {units: random_units(units, steep_data, steep_test) for units in widths}
print("random units   smooth     steep")
for units in widths:
    plain = random_units(units, data, test)
    print(f"{units:12}  {plain:.1e}   {untrained[units]:.1e}")

# %% [markdown]
# For the smooth solution one solve with a few hundred random units is more accurate
# than 32 trained units, and takes less time. So there is no need to train where the
# solution is smooth and a wide network is welcome. For the steep solution hundreds of
# random units still miss it by per cents, because few of them lie along the layer.
# Trained units go there:

# %%
steep, steep_ends = race(steep_data, steep_test)
for name, (_, seconds, errors) in steep.items():
    print(f"{name:20} ends at {errors[-1]:.1e} after {seconds[-1]:.1f} seconds")

# %%
trained = steep_ends["GNvpro"]
u = vp.predict(problem, trained.theta, trained.w, steep_test[0])
figure, axes = plt.subplot_mosaic(
    [["start", "curves"], ["end", "curves"]], figsize=(8.5, 4.2), width_ratios=[1, 2.4]
)
for panel, weights in (("start", theta), ("end", trained.theta)):
    image(axes[panel], u, f"the units at the {panel}")
    for k, b in zip(*map(np.asarray, (weights["k"], weights["b"])), strict=True):
        # The line in the middle of the unit's step, k · x + b = 0.
        middle, along_line = -b * k / (k @ k), np.array([-k[1], k[0]]) / np.hypot(*k)
        line = middle + np.outer([-3, 3], along_line)
        axes[panel].plot(*line.T, color="white", lw=0.7)
    axes[panel].set(xlim=(0, 1), ylim=(0, 1))
draw(axes["curves"], steep, 0, "work: passes over the points")
units = widths[-1]
axes["curves"].axhline(
    untrained[units], color="black", ls=":", label=f"{units} random units"
)
axes["curves"].legend()
plt.show()

# %% [markdown]
# White lines show where a unit has its step, $k \cdot x + b = 0$; many of them have
# moved to the layer. The start is a different story from the smooth solution: there the
# training of all weights is ahead down to an error of about $10^{-3}$. It begins with a
# small random $W$, while $W(\theta)$ is large as long as the units fit badly.
# Afterwards the methods of variable projection pass their counterparts again. LBFGSvpro
# knows too little of the curvature for this problem.

# %% [markdown]
# ## The heat equation
#
# Time is one more coordinate: $u_t = \kappa\, u_{xx}$ for $0 < x < 1$ and $0 < t < 1$,
# with $u = 0$ at the walls and a given initial state. This equation has other
# coefficients, and the initial state is one more part of the conditions. Here
# $\kappa = 0.1$, and the solution is a sum of two decaying waves.

# %%
KAPPA = 0.1


def waves(x):
    decay = -(jnp.pi**2) * KAPPA * x[1:]
    first = jnp.exp(decay) * jnp.sin(jnp.pi * x[:1])
    return first + 0.5 * jnp.exp(4 * decay) * jnp.sin(2 * jnp.pi * x[:1])


walls, initial = grid(sides, ticks), grid(np.linspace(0, 1, 60), [0.0])
heat = conditions(
    (interior, [0, 0, 1, -KAPPA, 0], 1.0), (walls, VALUE, 10.0), (initial, VALUE, 10.0)
)
heat_data, heat_test = solved_by(waves, heat), solved_by(waves, fine)

# %% [markdown]
# Without a method, `fit` chooses one itself.

# %%
heat_problem = separable(features, penalty=1e-14)
solution = vp.fit(
    heat_problem, theta, heat_data, validation=heat_test, max_work=work, **measured
)
print(solution)
print(f"relative error: {solution.history['validation_error'][-1]:.1e}")

# %%
u = vp.predict(heat_problem, solution.theta, solution.w, heat_test[0])
wrong = u - heat_test[1]
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), width_ratios=[1.1, 1.1, 1.3])
image(axes[0], u, "$u(x, t)$")
image(axes[1], wrong, "its error", signed=True)
for axis in axes[:2]:
    axis.set(xlabel="$x$", ylabel="$t$")
for row in (0, 8, 20, 64):
    slices = [np.reshape(column, (65, 65))[:, row] for column in (u, heat_test[1])]
    colour = plt.cm.viridis(0.9 * (1 - row / 64))
    label = f"$t = {row / 64:.3g}$"
    axes[2].plot(np.linspace(0, 1, 65), slices[0], color=colour, label=label)
    axes[2].plot(np.linspace(0, 1, 17), slices[1][::4], ".", color=colour)
axes[2].set(xlabel="$x$", ylabel="$u$ (dots: exact)")
axes[2].legend(loc="upper right", labelspacing=0.2)
plt.show()

# %% [markdown]
# ## An inverse problem: which diffusivity?
#
# Now $\kappa$ is unknown, and so is the initial state. What is known are 100
# measurements of $u$ at random places and times, with noise of standard deviation 0.01.
# A measurement asks for the value of $u$, so its row is like that of a boundary point.
# The diffusivity becomes one more entry of $\theta$, as its logarithm, which keeps it
# positive. A condition has two sets of coefficients now: those that are known, and
# those that $\kappa$ multiplies.

# %%
NOISE = 0.01


def with_kappa(theta, inputs):
    points, known, times_kappa = inputs
    coefficients = known + jnp.exp(theta["log_kappa"]) * times_kappa
    return features(theta, (points, coefficients))


inverse = separable(with_kappa, penalty=1e-14)


def measurements(seed):
    """Where it was measured, and the data with the conditions that are known."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(size=(100, 2))

    def inputs_for(equation, value):
        parts = (interior, equation, 100.0), (walls, value, 100.0), (places, value, 1.0)
        return conditions(*parts)

    points, known = inputs_for([0, 0, 1, 0, 0], VALUE)
    _, times_kappa = inputs_for([0, 0, 0, -1, 0], [0, 0, 0, 0, 0])
    _, targets = solved_by(waves, (points, known + KAPPA * times_kappa))
    noise = np.zeros((len(points), 1))
    noise[-100:] = known[-100:, :1] * NOISE * rng.normal(size=(100, 1))
    return places, ((points, known, times_kappa), targets + noise)


# %% [markdown]
# This time we call the method's own `init` and `step`, and note $\kappa$ after each
# step. One run begins at a tenth of the true value, one at ten times it.

# %%
inverter = vp.gnvpro(inverse)


def estimate(begin, data, steps):
    state = inverter.init(begin, data)
    found = [float(jnp.exp(state.theta["log_kappa"]))]
    while state.status == vp.Status.RUNNING and len(found) <= steps:
        state, _ = inverter.step(state, data)
        found.append(float(jnp.exp(state.theta["log_kappa"])))
    return state, found


places, seen = measurements(seed=0)
paths = {}
for guess in (1.0, 0.01):
    begin = theta | {"log_kappa": jnp.asarray(np.log(guess))}
    state, paths[guess] = estimate(begin, seen, steps=0 if QUICK else 250)
    print(f"from {guess}: {paths[guess][-1]:.5f} after {len(paths[guess]) - 1} steps")

# %% [markdown]
# How far can this be off? Near the minimum the reduced objective is a quadratic in
# $\theta$, with the Gauss–Newton matrix $H$. The last layer is eliminated, so
# $H^{-1}$ is the covariance of $\theta$ with all that is uncertain in $W$ taken into
# account, up to the factor $\sigma^2 / 100$ from the noise and the mean over 100
# measurements. `gauss_newton` gives products with $H$; there are 97 weights, so we form
# it.


# %%
@jax.jit
def deviation(theta, data):
    """The standard deviation of log κ."""
    flat, unravel = ravel_pytree(theta)
    curvature = vp.gauss_newton(inverse, theta, data)
    columns = jax.vmap(lambda v: ravel_pytree(curvature.matvec(unravel(v)))[0])
    only_kappa = {
        name: jnp.full_like(a, name == "log_kappa") for name, a in theta.items()
    }
    pick = ravel_pytree(only_kappa)[0]
    return jnp.sqrt(
        NOISE**2 / 100 * pick @ jnp.linalg.solve(columns(jnp.eye(len(flat))), pick)
    )


# %% [markdown]
# To see whether these error bars are right, we measure anew ten times, with other noise
# at other places. Each of these runs begins where the one above ended.

# %%
draws = []
for seed in range(0 if QUICK else 10):
    _, again = measurements(seed)
    end, path = estimate(state.theta, again, steps=100)
    draws.append((path[-1], float(deviation(end.theta, again))))
draws = np.reshape(draws, (-1, 2))
scores = np.log(draws[:, 0] / KAPPA) / draws[:, 1]
print("kappa   ± deviation   (estimate − truth) / deviation")
for (kappa, log_deviation), score in zip(draws, scores, strict=True):
    print(f"{kappa:.5f} ± {kappa * log_deviation:.5f}    {score:+.2f}")

# %%
u = vp.predict(problem, state.theta, state.w, fine)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), width_ratios=[1.2, 1.1, 1.1])
for (guess, path), dashes in zip(paths.items(), ("-", "--"), strict=True):
    steps, style = (
        np.arange(1, len(path) + 1),
        {"color": COLOURS["GNvpro"], "ls": dashes},
    )
    axes[0].loglog(steps, path, label=f"from {guess}", **style)
axes[0].axhline(KAPPA, color="black", ls=":", label="true")
axes[0].legend()
axes[0].set(xlabel="step", ylabel=r"$\kappa$", title="the estimate")
image(axes[1], u, "$u$, from the measurements")
axes[1].plot(*places.T, "w.", ms=3)
axes[1].set(xlabel="$x$", ylabel="$t$")
bars = draws[:, 0] * draws[:, 1]
axes[2].errorbar(
    np.arange(len(draws)), draws[:, 0], bars, fmt="o", color=COLOURS["GNvpro"]
)
axes[2].axhline(KAPPA, color="black", ls=":")
axes[2].set(xlabel="measured anew", ylabel=r"$\kappa$", title="with error bars")
plt.show()

# %% [markdown]
# Both runs agree after some thirty steps. The scores in the last column of the table
# should be like draws from a standard normal distribution, and they are about as large.
# No initial state was given: it comes out of the measurements and the equation. The
# same steps work for any parameter on which the coefficients depend.

# %% [markdown]
# ## Nonlinear equations
#
# If $L$ is nonlinear, the residual is nonlinear in $W$, and there is no last layer to
# project out. Newton's method is the way back: linearise the equation around the
# present solution, solve the linear equation as above, and repeat (Dong and Yang,
# 2022). For $-\Delta u + 10 u^3 = f$ around $u_k$ this is
#
# $$-\Delta u + 30 u_k^2\, u = f + 20 u_k^3.$$
#
# Only coefficients and right-hand sides change from one linear equation to the next.
# The hidden weights go on from where they are, so each of these equations takes few
# steps.

# %%
points, linear = poisson
scale = -linear[:, 4:]  # of the rows inside; zero on the boundary
here = conditions((points, VALUE, 1.0))
_, exact_here = solved_by(smooth, here)
targets = data[1] + scale * 10 * exact_here**3  # f is −Δu + 10 u³ now
hidden, present = theta, jnp.zeros_like(exact_here)
for outer in range(0 if QUICK else 8):
    inputs = points, linear + scale * 30 * present**2 * VALUE
    right = targets + scale * 20 * present**3
    solution = vp.fit(vp.gnvpro(problem), hidden, (inputs, right), max_work=200)
    hidden, w = solution.theta, solution.w
    present = vp.predict(problem, hidden, w, here)
    wrong = error(vp.predict(problem, hidden, w, fine), test[1])
    print(f"linearisation {outer}: relative error {wrong:.1e}")

# %% [markdown]
# The first four errors fall as Newton's method promises. From there on it is the
# network that improves.

# %% [markdown]
# ## Settings that matter
#
# First, the weight of the boundary and the penalties, for Poisson's equation with
# GNvpro:


# %%
def final_error(problem, data, test):
    begin = jax.tree.map(lambda array: array.astype(data[1].dtype), theta)
    end = vp.fit(problem, begin, data, validation=test, max_work=1200, **measured)
    return f"{end.history['validation_error'][-1]:.1e}, {end.status.name}"


for weight in () if QUICK else (0.1, 10.0, 1000.0):
    inputs = conditions((interior, MINUS_LAPLACIAN, 1.0), (edge, VALUE, weight))
    reached = final_error(problem, solved_by(smooth, inputs), test)
    print(f"weight of the boundary {weight:6}: {reached}")
for penalty in () if QUICK else (0.0, 1e-14, 1e-10, 1e-8):
    reached = final_error(separable(features, penalty), data, test)
    print(f"penalties {penalty:6}: {reached}")

# %% [markdown]
# The boundary's weight may vary by orders of magnitude, since an exact $W$ balances all
# conditions at once. If in doubt take it large. The penalties have to be small beside
# the objective that one hopes to reach, which for this solution is below $10^{-10}$. A
# tiny one is better than none, as it keeps $W$ from growing along directions that
# rounding decides. In the heat equation all right-hand sides but the initial state are
# zero and the objective is smaller, hence its smaller penalty.
#
# Second, single precision:

# %%
low = [jax.tree.map(lambda a: a.astype(jnp.float32), pair) for pair in (data, test)]
for penalty in () if QUICK else (1e-8,):
    print(f"penalties {penalty}: {final_error(separable(features, penalty), *low)}")

# %% [markdown]
# About three digits are lost, with any penalty: use double precision where you can.
#
# One word of caution. Where the solution of one linear equation in a simple domain is
# all that is wanted, finite elements or a spectral method are faster than any network.
# Networks have their place where a solver is laborious to set up: unknown parameters,
# scattered measurements, odd domains.

# %% [markdown]
# ## What to change
#
# - `start(8, 0)` and `start(16, 0)` in place of `start(32, 0)`: the errors are about
#   $10^{-5}$ and $10^{-7}$. With 64 units a step takes longer, and the error stays at
#   $10^{-8}$.
# - Points: 8 × 8 cells and 8 ticks a side give $10^{-7}$, 15 × 15 cells are as good as
#   30 × 30, and so are 900 random points.
# - `jnp.sin` in place of `jnp.tanh`: the error falls to $10^{-13}$, since sines can
#   represent this solution exactly. The test says little then.
# - `jnp.sin(2 * jnp.pi * x)` in `smooth`: with more waves the error is $10^{-7}$.
# - A curved layer, such as $\arctan 10\,(r - 0.7)$ with $r$ the distance to the point
#   $(-0.05, -0.05)$: 32 units reach no more than about $10^{-2}$. With another hidden
#   layer of 16 units before them, in `basis`, the error falls to some $10^{-5}$, with
#   `vp.gnvpro` and, in less time, with `vp.broydenvpro`.
# - Boundary conditions on a derivative are other coefficients: `[0, 1, 0, 0, 0]` on the
#   left and right edge prescribes $\partial u / \partial x$.
#
# ## What to try next
#
# - [Your own network](03_your_own_network.ipynb): networks with more layers.
# - [Curve fitting](09_curve_fitting.ipynb): data in place of an equation, error bars
#   included.
# - [Surrogates](06_surrogate.ipynb): a network that learns from runs of a solver.
# - `vp.solve_w` is differentiable, so a loss of your own can depend on the solution.
#
# ## References
#
# - S. Dong, J. Yang. *Numerical approximation of partial differential equations by a
#   variable projection method with artificial neural networks.* 2022. arXiv:2201.09989
# - J. F. Urbán, P. Stefanou, J. A. Pons. *Unveiling the optimization process of physics
#   informed neural networks: How accurate and competitive can PINNs be?* J. Comput.
#   Phys. 523, 2025. arXiv:2405.04230
# - S. Dong, Z. Li. *Local extreme learning machines and domain decomposition for
#   solving linear and nonlinear partial differential equations.* Comput. Methods Appl.
#   Mech. Engrg. 387, 2021. arXiv:2012.02895. This is the work on random hidden weights.
