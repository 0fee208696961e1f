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
# # In a training loop of flax
#
# You have a training loop in flax and want to keep it. varprox comes as two gradient
# transformations of optax that fit into it: `slimtik`, which solves for the last layer
# batch by batch and leaves the rest to any optimizer, and `gnvpro`, which takes
# full-batch steps and needs no learning rate. You will see each beside Adam, and which
# lines of the loop change.

# %%
import os

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import varprox as vp

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
# ## The network and the loss
#
# The data are 1000 points of peaks, a smooth surface over the plane. The network has
# two methods: `features` is everything but the last layer, and the last layer is called
# `head`. All of this notebook runs in single precision, JAX's default.

# %%
(inputs, targets), validation = vp.datasets.peaks(100 if QUICK else 1000, 500)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 16, rngs=rngs)
        self.second = nnx.Linear(16, 16, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def features(self, points):
        return nnx.tanh(self.second(nnx.tanh(self.first(points))))

    def __call__(self, points):
        return self.head(self.features(points))


def loss_and_features(net, points, heights):
    z = net.features(points)
    return 0.5 * jnp.mean((net.head(z) - heights) ** 2), z


@nnx.jit
def loss(net, points, heights):
    return loss_and_features(net, points, heights)[0]


# %% [markdown]
# ## The loop with Adam
#
# This is the loop as flax has it: a jitted step with `nnx.Optimizer`, and epochs of
# shuffled batches around it. All runs begin at the same weights and see the same
# batches.

# %%
epochs, batch_size = (2, 20) if QUICK else (40, 20)


@nnx.jit
def step_of_adam(net, optimizer, points, heights):
    _, gradients = nnx.value_and_grad(loss_and_features, has_aux=True)(
        net, points, heights
    )
    optimizer.update(net, gradients)


def train(step, transformation):
    """The validation loss at the start and after every epoch."""
    net = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, transformation, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    losses = [loss(net, *validation)]
    for _ in range(epochs):
        for batch in rng.permutation(len(inputs)).reshape(-1, batch_size):
            step(net, optimizer, inputs[batch], targets[batch])
        losses.append(loss(net, *validation))
    return np.array(losses)


rates = [1e-2] if QUICK else [3e-3, 1e-2, 3e-2]
adam = {rate: train(step_of_adam, optax.adam(rate)) for rate in rates}

# %% [markdown]
# ## slimtik: the last layer solved for, the rest by Adam
#
# `vp.transforms.slimtik` wraps the optimizer. It takes the gradients of the last layer
# out and puts in a step of slimTik, a regularised least-squares solve with the features
# of this batch and the Gram matrices of the last few. So `update` wants these features
# and the targets. The loss has to be a mean of squares. Nothing else of the loop
# changes.


# %%
@nnx.jit
def step_of_slimtik(net, optimizer, points, heights):
    (_, z), gradients = nnx.value_and_grad(loss_and_features, has_aux=True)(
        net, points, heights
    )
    optimizer.update(net, gradients, features=z, targets=heights)


slimtik = {
    rate: train(step_of_slimtik, vp.transforms.slimtik(optax.adam(rate), head="head"))
    for rate in rates
}

# %% [markdown]
# ## gnvpro: full-batch steps without a learning rate
#
# The second transformation trains all weights but those of the last layer, so the
# filter of `nnx.Optimizer` leaves these out. The problem tells it the model, the loss
# and the penalties; `vp.nnx.split` makes the model from the network. Solved for by the
# transformation, the last layer is in its state, and the step writes it into the
# network.
#
# `update` looks at no gradients. `nnx.Optimizer` wants something in their shape, for
# which the weights will do. `data` are arguments of the jitted step rather than
# constants in it, which would be compiled into it.

# %%
_, model = vp.nnx.split(Network(nnx.Rngs(0)))
problem = vp.Problem(model, vp.least_squares(), theta_penalty=1e-7, w_penalty=1e-7)
all_but_head = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("head")))


@nnx.jit
def step_of_gnvpro(net, optimizer, data):
    optimizer.update(net, nnx.state(net, all_but_head), data=data)
    kernel, bias = model.head.unpack(optimizer.opt_state.w[...])
    net.head.kernel[...], net.head.bias[...] = kernel, bias


# %% [markdown]
# A step takes more than one pass over the data, and not each takes the same number. The
# state counts them in work units, a forward or a backward pass being one. An epoch of
# the loops above is two. So this loop gets the work of as many epochs, and it stops
# earlier if the state says that the run has ended.

# %%
data = jnp.asarray(inputs), jnp.asarray(targets)
net = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(net, vp.transforms.gnvpro(problem, data), wrt=all_but_head)
state = optimizer.opt_state
work, gnvpro = [0.0], [loss(net, *validation)]
while state.status[...] == vp.Status.RUNNING and work[-1] < 2 * epochs:
    step_of_gnvpro(net, optimizer, data)
    work.append(float(state.work_units[...]))
    gnvpro.append(loss(net, *validation))
print(f"{len(work) - 1} steps, training loss {loss(net, *data):.1e}")

# %% [markdown]
# ## The loss curves
#
# The thick lines are the rates with which Adam and slimtik end lowest, by the mean of
# the last ten epochs. The thin lines are the other rates.

# %% tags=["thumbnail"]
figure, ax = plt.subplots(figsize=(6.4, 4))
for name, colour, runs in (
    ("Adam", COLOURS["Adam"], adam),
    ("slimtik with Adam", COLOURS["slimTrain"], slimtik),
):
    best = min(runs, key=lambda rate: runs[rate][-10:].mean())
    for rate, losses in runs.items():
        style = {"linewidth": 2, "label": f"{name}, rate {rate:g}"}
        style = style if rate == best else {"linewidth": 0.7}
        ax.semilogy(2 * np.arange(len(losses)), losses, color=colour, **style)
ax.semilogy(work, gnvpro, color=COLOURS["GNvpro"], linewidth=2, label="gnvpro")
ax.set(xlabel="work units", ylabel="validation loss (½ mean square)")
ax.legend()
plt.show()

# %% [markdown]
# At equal rates slimtik is below Adam after ten epochs. Later the noise of small
# batches slows both down, and neither leads for good. gnvpro sees all points in every
# step, so it has no such noise, and it is an order of magnitude lower after the same
# work. But its steps form and factorise matrices, which no work unit counts. With many
# more weights they would take longer than the passes.
#
# ## What to change
#
# - The optimizer inside slimtik: any other of optax, or
#   `optax.adam(optax.cosine_decay_schedule(3e-2, 2000))`. A rate that falls lowers the
#   end of both curves, and slimtik comes down sooner.
# - `batch_size`: with 100 there are five times fewer steps in an epoch, and slimtik is
#   ahead of Adam up to the end.
# - `epochs`: with 200 the lowest of Adam and of slimtik fall further by a factor of two
#   to three, and gnvpro by two orders of magnitude.
# - Double precision: `jax.config.update("jax_enable_x64", True)` before anything else
#   and `param_dtype=float` in the layers. With 200 epochs gnvpro then ends several
#   times lower.
#
# ## What to try next
#
# - `vp.slimtrain` and `vp.gnvpro` are the same steps without optax, and `vp.fit` is a
#   loop around them that counts work and keeps a history: see
#   [03_your_own_network](03_your_own_network.ipynb).
# - [04_peaks_slimtrain](04_peaks_slimtrain.ipynb) looks at what slimTik chooses in
#   every step. `slimtik` takes the same `memory` and `selection`.
# - For a last layer that is a convolution, `layer=vp.conv((3, 3), padding=(1, 1))`
#   tells `slimtik` what the kernel of flax means.
