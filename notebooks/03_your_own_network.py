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
# # Your own network
#
# From the angles of its three joints a network learns where the hand of a robot arm is.
# You will see how to hand over a model of your own, a flax network or a plain function,
# how to train it on all data at once or in minibatches, and how to read, evaluate, save
# and load what comes back. Replace the arrays and the network by yours, and the rest of
# this notebook stays as it is.

# %%
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
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
# ## The data
#
# The arm has three links. Each joint turns by up to 90° to either side of the link
# before it. Somebody has set the joints at random and has measured where the hand is,
# with an error of 2 mm in each direction.
#
# varprox takes data as a pair `(inputs, targets)` of NumPy or JAX arrays. Samples come
# first: here inputs are `(samples, 3)` and targets `(samples, 2)`.

# %%
LENGTHS = np.array([0.5, 0.3, 0.2])  # of the links, in metres
NOISE = 2e-3  # standard deviation of a measured coordinate, in metres
rng = np.random.default_rng(0)


def joints(angles):
    """Where the links end, (samples, links, 2), for angles (samples, links)."""
    directions = np.cumsum(angles, axis=1)
    steps = np.stack([np.cos(directions), np.sin(directions)], axis=2)
    return np.cumsum(LENGTHS[:, None] * steps, axis=1)


def measure(samples):
    angles = rng.uniform(-np.pi / 2, np.pi / 2, (samples, 3))
    hands = joints(angles)[:, -1]
    return angles, hands + NOISE * rng.normal(size=hands.shape)


train = measure(100 if QUICK else 1000)
validation = measure(500)

# %%
figure, ax = plt.subplots(figsize=(3.6, 4.4))
ax.scatter(*train[1].T, s=5, color="0.75")
for pose in joints(np.array([[0.2, 0.3, 0.4], [1.0, 0.9, 1.2], [-1.2, 0.9, -0.8]])):
    ax.plot(*np.vstack([[0, 0], pose]).T, "o-", color="k", linewidth=2, markersize=4)
ax.set(xlabel="x (m)", ylabel="y (m)", aspect="equal")
ax.set_title("Three poses of the arm\nand the measured hands")
plt.show()

# %% [markdown]
# ## A flax network
#
# Any `nnx.Module` will do if its last operation is a linear layer: an `nnx.Linear`, an
# `nnx.Conv` or an `nnx.ConvTranspose`. This layer is looked for under the name `head`;
# `vp.nnx.split(net, "out")` would take the one named `out`.
#
# flax makes weights in single precision unless it is told otherwise. With
# `param_dtype=float` they follow JAX's default, which the first cell has set to double
# precision.


# %%
class Network(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(3, width, param_dtype=float, rngs=rngs)
        self.second = nnx.Linear(width, width, param_dtype=float, rngs=rngs)
        self.head = nnx.Linear(width, 2, param_dtype=float, rngs=rngs)

    def __call__(self, angles):
        z = nnx.tanh(self.first(angles))
        z = nnx.tanh(self.second(z))
        return self.head(z)


net = Network(16, nnx.Rngs(0))

# %% [markdown]
# `split` takes the network apart: `theta` holds the weights of everything but the last
# layer, and `model` knows how to compute with them. The weights $W$ of the last layer
# do not appear: for every $\theta$ varprox solves for the best ones.
#
# A problem is a model, a loss and penalties. With features $z$ of the $n$ inputs $x_i$
# and targets $c_i$, this one minimises
#
# $$\Phi(W, \theta) = \frac{1}{2n} \sum_{i=1}^n \| W^\top z(x_i, \theta) - c_i \|^2
# + \frac{\alpha}{2} \|\theta\|^2 + \frac{\alpha}{2} \|W\|^2, \qquad \alpha = 10^{-7}.$$

# %%
theta, model = vp.nnx.split(net)
problem = vp.Problem(model, vp.least_squares(), theta_penalty=1e-7, w_penalty=1e-7)

# %% [markdown]
# ## Training on all data at once
#
# `vp.fit` wants a problem, the weights to start at, the data and a budget. The budget
# is in work units: a forward or a backward pass over all data is one. A metric is a
# function of predictions and targets that returns one number. This one is the mean
# distance between the predicted and the measured hand.


# %%
def distance(predictions, targets):
    """In millimetres."""
    return 1e3 * jnp.mean(jnp.linalg.norm(predictions - targets, axis=1))


metrics = {"distance": distance}
full_batch = vp.fit(
    problem,
    theta,
    train,
    validation=validation,
    metrics=metrics,
    max_work=10 if QUICK else 400,
)
print(full_batch)

# %% [markdown]
# The solution says why the run has ended. Its `history` has one row for each step and
# is ready for pandas. `ratio` compares the decrease of the objective with the decrease
# that the step promised: near one, the method's model of the objective is right.

# %%
pd.options.display.float_format = "{:.3g}".format
columns = ["work_units", "objective", "gradient_norm", "ratio", "validation_distance"]
pd.DataFrame(full_batch.history)[columns].iloc[::8]

# %% [markdown]
# ## Training in minibatches
#
# When there are too many data to see all of them in a step, `vp.slimtrain` takes a
# minibatch in every step. Any optimizer of optax moves $\theta$, here Adam; $W$ follows
# without a learning rate. An epoch is two work units, one forward and one backward.

# %%
method = vp.slimtrain(problem, optax.adam(1e-2))
minibatches = vp.fit(
    method,
    theta,
    train,
    validation=validation,
    metrics=metrics,
    epochs=5 if QUICK else 200,
    batch_size=32,
)
print(minibatches)

# %% [markdown]
# ## A plain function
#
# Features need not come from flax. Any function `features(theta, inputs)` that returns
# `(samples, m)` will do, and `theta` may be an array or any pytree of arrays. So what
# you know about your problem can go into the features. Here it is known that hands go
# round in circles. So the features are cosines and sines of three sums of the angles,
# and which sums these are is learned: `theta` is the matrix of their coefficients.


# %%
def features(theta, angles):
    directions = angles @ theta
    return jnp.hstack([jnp.cos(directions), jnp.sin(directions)])


circles = vp.Problem(
    vp.Separable(features, head=vp.dense(bias=False)), vp.least_squares()
)
start = rng.uniform(size=(3, 3))
plain = vp.fit(
    circles, start, train, validation=validation, metrics=metrics, max_work=300
)
print(plain)
assert plain.status == vp.Status.CONVERGED

# %% [markdown]
# A column of `theta` says which joints turn a link: `1 0 0` belongs to the first link,
# `1 1 0` to the second and `1 1 1` to the third. The rows of $W$ are in the same order
# as the columns, cosines first, and hold the lengths of the links in metres. The method
# was told neither the joints nor the lengths.
#
# The columns may come in another order. One with the other sign has the same cosine,
# and a sine whose length is negative.

# %%
with np.printoptions(precision=2, suppress=True):
    print("theta:", np.asarray(plain.theta), "W:", np.asarray(plain.w), sep="\n")

# %% [markdown]
# ## How the runs went
#
# All runs count their work in the same units. The measurements have errors, so no model
# can have a validation loss far below the variance of a measured coordinate, the dotted
# line.

# %% tags=["thumbnail"]
runs = {
    "network, full batch": (full_batch, COLOURS["GNvpro"], "-"),
    "network, slimTrain": (minibatches, COLOURS["slimTrain"], "-"),
    "plain function, full batch": (plain, COLOURS["GNvpro"], "--"),
}
figure, axes = plt.subplots(1, 2, figsize=(7.8, 3.6), sharey=True)
for name, (run, colour, line) in runs.items():
    work = run.history["work_units"]
    for ax, column in zip(axes, ("objective", "validation_loss"), strict=True):
        ax.plot(work, run.history[column], line, color=colour, label=name)
for ax, title in zip(axes, ("Objective", "Validation loss"), strict=True):
    ax.axhline(NOISE**2, color="k", linewidth=1, linestyle=":", label="noise")
    ax.set(xlabel="work units", title=title, xlim=(1, None))
    ax.set_xscale("log", nonpositive="mask")
    ax.set_yscale("log")
axes[0].set_ylabel("½ mean squared distance (m²)")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# With all data at once the network comes down to the noise. slimTrain, which sees 32
# samples in a step, is still well above it after the same work. It is made for more
# data than one step can take. The plain function has nine weights and the right form.
# It needs the fewest work units.
#
# The last rows of the three histories say the same in millimetres.

# %%
last = {name: pd.DataFrame(run.history).iloc[-1] for name, (run, *_) in runs.items()}
pd.DataFrame(last).T[["work_units", "train_distance", "validation_distance"]]

# %% [markdown]
# ## Predicting
#
# `vp.predict` runs the model on new inputs. It takes the problem from the solution,
# since the features of some networks learn more than weights, such as the statistics of
# batch norm.

# %%
predictions = vp.predict(
    full_batch.problem, full_batch.theta, full_batch.w, validation[0]
)
print(f"mean distance {distance(predictions, validation[1]):.2f} mm")

# %% [markdown]
# For use elsewhere `vp.nnx.merge` puts the weights back: `trained` is an ordinary flax
# network of the class above.

# %%
trained = vp.nnx.merge(net, full_batch.theta, full_batch.w)
np.testing.assert_allclose(trained(validation[0]), predictions, atol=1e-5)

# %% [markdown]
# ## Saving and loading
#
# A solution goes into a folder, with its history and the state to go on from. Functions
# are not stored, so what loads it makes the problem again.

# %%
with tempfile.TemporaryDirectory() as folder:
    full_batch.save(folder)
    loaded = vp.load(folder, problem)

again = vp.predict(problem, loaded.theta, loaded.w, validation[0])
np.testing.assert_array_equal(again, predictions)
print(loaded)

# %% [markdown]
# The run goes on from there with a larger budget, `vp.fit(method, theta, data,
# start=loaded, max_work=…)`. With `checkpoint=folder`, `vp.fit` writes such a folder
# while it runs.
#
# The state of a flax network is a tree of arrays. What loads it needs flax and the
# class of the network, but not varprox.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "network.npz"
    leaves, structure = jax.tree.flatten(nnx.state(trained))
    np.savez(path, *leaves)
    fresh = Network(16, nnx.Rngs(1))
    with np.load(path) as file:
        kept = map(jnp.asarray, file.values())
        nnx.update(fresh, jax.tree.unflatten(structure, kept))

np.testing.assert_array_equal(fresh(validation[0]), trained(validation[0]))

# %% [markdown]
# ## What to change
#
# - `theta_penalty` and `w_penalty`: with `1e-9` the network follows the noise, so the
#   training distance falls and the validation distance rises. With `1e-5` it is too
#   stiff and both rise.
# - The number of training samples: with 200 the network fits them twice as closely and
#   predicts twice as badly. The plain function predicts as well as before.
# - The width of the network: with 4 instead of 16 the distance is over ten times as
#   large, and the run converges before the budget is used up.
# - The learning rate of Adam in `vp.slimtrain`: `1e-3` is too low for 200 epochs.
# - The line with `jax_enable_x64`: without it everything runs in single precision. The
#   full-batch run then ends earlier, at an objective that is slightly higher.
# - `start` of the plain function: with `rng.normal(size=(3, 3))` some draws end in a
#   local minimum with a loss over a hundred times as high. Try other seeds.
#
# ## What to try next
#
# - `vp.fit(vp.gnvpro(problem), …)` names a full-batch method; `vp.broydenvpro` and
#   `vp.lbfgsvpro` are the others.
# - `vp.softmax_cross_entropy()` in place of `vp.least_squares()` makes a classifier, as
#   in [02_geometry](02_geometry.ipynb).
# - [04_peaks_slimtrain](04_peaks_slimtrain.ipynb) shows what slimTrain does in a step
#   and what it can be told.
# - [05_autoencoder](05_autoencoder.ipynb) trains a network whose last layer is a
#   convolution.
# - [08_optax](08_optax.ipynb) puts both kinds of method into a training loop of flax.
