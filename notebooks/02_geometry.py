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
# # A classifier seen from its last layer
#
# A network bends the plane until a straight cut separates the classes.
# You will see this happen for points inside and outside an ellipse, layer by layer and
# step by step, with the last layer W(θ) at its best for the features in every frame.
# You will learn to step a method by hand with `method.init` and `method.step`.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import varprox as vp

jax.config.update("jax_enable_x64", True)
QUICK = "VARPROX_QUICK" in os.environ  # the test suite sets it
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
# ## The problem
#
# Points lie inside or outside the ellipse x² + (y / 0.4)² = 1. The network has two
# hidden layers of four tanh units and a linear last layer with two outputs, one for
# each class. Their difference decides, so the decision is one hyperplane in the space
# of the four last features.

# %%
data = vp.datasets.ellipse(n=1000, n_validation=500)
train, validation = jax.tree.map(jnp.asarray, tuple(data))
net = vp.networks.Dense((2, 4, 4, 2), rngs=nnx.Rngs(0))
theta, model = vp.nnx.split(net)
problem = vp.Problem(
    model, loss=vp.softmax_cross_entropy(), theta_penalty=1e-6, w_penalty=1e-8
)

# %% [markdown]
# ## Training by hand
#
# A method is a pair of pure functions. `init` gives a state, `step` gives the next one.
# A state is a named tuple that nothing changes later, so a list of states is a film of
# the training.

# %%
STEPS = 4 if QUICK else 30
FRAMES = (0, 1, 2, 3, STEPS) if QUICK else (0, 2, 4, 8, STEPS)
method = vp.gnvpro(problem)
states = [method.init(theta, train)]
for _ in range(STEPS):
    state, info = method.step(states[-1], train)
    states.append(state)

print("step   objective   work units")
for step in FRAMES:
    state = states[step]
    print(f"{step:4}{state.objective:12.2e}{int(state.work_units):13}")

# %% [markdown]
# W is no part of what is stepped. At every state it is W(θ): the gradient of the
# objective in W vanishes, before training as well as after it.


# %%
def objective_of_w(w, theta):
    logits = vp.predict(problem, theta, w, train[0])
    return problem.loss.value(logits, train[1]) + problem.penalty_on_w(w)


for step in (0, STEPS):
    gradient = jax.grad(objective_of_w)(states[step].w, states[step].theta)
    largest = abs(gradient).max()
    print(f"step {step:2}: largest entry of the gradient in W {largest:.0e}")
    assert largest < 1e-3

# %% [markdown]
# The objective never rises. The points on the wrong side become fewer as it falls.


# %%
@jax.jit
def wrong(state, inputs, targets):
    """The share of points on the wrong side, in per cent."""
    logits = vp.predict(problem, state.theta, state.w, inputs)
    return 100 * jnp.mean(logits.argmax(axis=1) != targets.argmax(axis=1))


objective = [state.objective for state in states]
figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.2))
left.semilogy(objective, color=COLOURS["GNvpro"])
left.plot(FRAMES, [objective[k] for k in FRAMES], "ko", markersize=5, label="frames")
left.set(xlabel="step", ylabel="objective Φ")
left.legend()
for name, points, style in (("training", train, "-"), ("validation", validation, "--")):
    shares = [wrong(state, *points) for state in states]
    right.plot(shares, style, color=COLOURS["GNvpro"], label=name)
right.set(xlabel="step", ylabel="points on the wrong side, %")
right.legend()
plt.show()
print(f"wrong at the end: training {wrong(states[-1], *train):.1f} %, "
      f"validation {wrong(states[-1], *validation):.1f} %")  # fmt: skip

# %% [markdown]
# ## Layer by layer
#
# `vp.nnx.merge` puts θ and W back into the network, whose layers can then be called one
# by one.


# %%
def layers(state, inputs):
    """The outputs of both hidden layers, (points, units) each."""
    trained = vp.nnx.merge(net, state.theta, state.w)
    first = jnp.tanh(trained.layers[0](inputs))
    return np.asarray(first), np.asarray(jnp.tanh(trained.layers[1](first)))


# %% [markdown]
# Four features do not fit into a picture. For the first layer we take the two principal
# components, the directions in which the points differ most.
#
# For the second layer there is a better view. Its horizontal axis is the normal of the
# hyperplane, which therefore appears as a vertical line. Nothing that matters for the
# decision is lost: a point is right of the line exactly if the network takes it to be
# inside. The vertical axis is the first principal component of what remains.


# %%
def principal(z, count):
    """The directions in which the rows of z differ most, (features, count)."""
    return np.linalg.svd(z - z.mean(axis=0), full_matrices=False)[2][:count].T


def hyperplane(w):
    """Its unit normal, its position along it, and the slope of the logits across it."""
    *v, bias = np.asarray(w[:, 0] - w[:, 1])
    slope = np.linalg.norm(v)
    return np.array(v) / slope, -bias / slope, slope


# %% [markdown]
# Rows are frames. Left: the plane with every third point. Middle: the first layer.
# Right: the second layer, and the line that W(θ) draws. Shading is the probability of
# inside. The black curve is the ellipse, carried through the layers. Scales differ from
# frame to frame.

# %% tags=["thumbnail"]
angle = np.linspace(0, 2 * np.pi, 400)
ellipse = np.stack([np.cos(angle), 0.4 * np.sin(angle)], axis=1)
x, y = np.meshgrid(np.linspace(-2.1, 2.1, 141), np.linspace(-0.9, 0.9, 61))
plane = jnp.stack([x.ravel(), y.ravel()], axis=1)
some = slice(None, None, 3)  # points, drawn in the colours of their classes
point_colours = np.where(train[1][some, 0] == 1, "#8b1a1a", "#00306b")
shades = {"levels": np.linspace(0, 1, 11), "cmap": "RdBu_r", "alpha": 0.6}


def draw(ax, points, curve):
    ax.scatter(*points[some].T, s=4, c=point_colours, marker="s", linewidths=0,
               antialiased=False)  # fmt: skip
    ax.plot(*curve.T, "k-", linewidth=1.5)
    ax.grid(False)


figure, axes = plt.subplots(len(FRAMES), 3, figsize=(7.6, 2 * len(FRAMES) + 0.8))
for (left, middle, right), step in zip(axes, FRAMES, strict=True):
    state = states[step]
    (first, second), on_ellipse = layers(state, train[0]), layers(state, ellipse)

    logits = vp.predict(problem, state.theta, state.w, plane)
    inside = jax.nn.softmax(logits)[:, 0].reshape(x.shape)
    shown = left.contourf(x, y, inside, **shades)
    draw(left, np.asarray(train[0]), ellipse)
    left.set_ylabel(f"step {step}\n\ny")

    components = principal(first, 2)
    draw(middle, first @ components, on_ellipse[0] @ components)

    normal, position, slope = hyperplane(state.w)
    rest = principal(second - np.outer(second @ normal, normal), 1)
    view = np.column_stack([normal, rest])
    draw(right, second @ view, on_ellipse[1] @ view)
    right.axvline(position, color="#e69f00", linewidth=2)
    limits = right.get_xlim(), right.get_ylim()
    along = np.linspace(*limits[0], 200)
    shade = np.tile(jax.nn.sigmoid(slope * (along - position)), (2, 1))
    right.contourf(along, limits[1], shade, **shades, zorder=0)
    right.set(xlim=limits[0], ylim=limits[1])
for ax, title in zip(axes[0], ("inputs", "first layer", "second layer"), strict=True):
    ax.set_title(title)
for ax, label in zip(
    axes[-1], ("x", "first component", "along the normal"), strict=True
):
    ax.set_xlabel(label)
figure.colorbar(shown, ax=axes[-1, :], location="bottom", shrink=0.4, aspect=30,
                label="probability of inside")  # fmt: skip
plt.show()

# %% [markdown]
# What the frames show:
#
# - **Before training** the features are a smooth, nearly linear picture of the plane.
#   No line can cut out the middle of it, and the best line leaves about four points in
#   ten on the wrong side.
# - **During training** the second layer folds the plane. Points from all around the
#   ellipse come to lie on one side.
# - **After training** the ellipse, a closed curve, is squeezed onto the straight line.
#
# The line never lags behind the features, and it makes up for what they lack. Early in
# training the classes are close together and W(θ) makes the line steep. Later the
# features move the classes apart themselves. The table has the mean distance between
# the classes along the normal, and the slope of the difference of the logits.

# %%
print("step   gap between the classes   slope of the logits")
for step in FRAMES:
    normal, _, slope = hyperplane(states[step].w)
    along = layers(states[step], train[0])[1] @ normal
    inside = np.asarray(train[1][:, 0] == 1)
    gap = along[inside].mean() - along[~inside].mean()
    print(f"{step:4}{gap:26.4f}{slope:22.0f}")

# %% [markdown]
# ## The features as functions of the inputs
#
# Each panel is one feature at the end of training. The first layer has four soft steps.
# The second layer combines them, and a weighted sum of its four features is zero on the
# dashed curve, which is the decision of the network.

# %%
state = states[-1]
logits = vp.predict(problem, state.theta, state.w, plane)
width = len(state.w) - 1
figure, axes = plt.subplots(2, width, figsize=(8.2, 3.6), sharex=True, sharey=True)
for row, name, features in zip(
    axes, ("first layer", "second layer"), layers(state, plane), strict=True
):
    for ax, feature in zip(row, features.T, strict=True):
        values = feature.reshape(x.shape)
        shown = ax.pcolormesh(x, y, values, cmap="RdBu_r", vmin=-1, vmax=1)
        ax.grid(False)
    row[0].set_ylabel(f"{name}\n\ny")
for ax in axes[1]:
    decision = (logits[:, 0] - logits[:, 1]).reshape(x.shape)
    ax.contour(x, y, decision, [0], colors="k", linestyles="dashed")
    ax.set_xlabel("x")
figure.colorbar(shown, ax=axes, label="feature")
plt.show()

# %% [markdown]
# ## What to change
#
# - `nnx.Rngs(0)` to another seed: another film with much the same end.
# - `(2, 4, 4, 2)` to `(2, 3, 3, 2)`: three units in a layer still enclose the ellipse.
#   With `(2, 2, 2, 2)` about one point in ten remains on the wrong side.
# - `w_penalty=1e-3`: W stays small, and the features have to move the classes farther
#   apart. The last table shows it.
# - `theta_penalty=1e-2`: the features stay close together, and W makes the line steep.
# - `vp.gnvpro` to `vp.lbfgsvpro` and 30 steps to 100: cheaper steps, and more of them.
#
# ## What to try next
#
# - `01_coupling`: why W is better solved for than stepped.
# - `vp.fit(problem, theta, train, validation=validation, epochs=30)`: the same loop,
#   with a history, a choice of method and a reason for the end.
# - `jax.lax.scan` over `method.step`: the loop above as one compiled program.
