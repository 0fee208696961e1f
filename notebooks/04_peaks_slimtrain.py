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
# # Five samples and nine weights
#
# slimTrain solves for the last layer anew in every minibatch, even if a batch has fewer
# samples than the layer has weights. You will see the two things that make this
# possible, a memory of earlier batches and a regularisation parameter Λ that is chosen
# in every step, and how many weights they let a step determine. You will learn what the
# options of `vp.slimtrain` do, and how it compares with Adam.

# %%
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
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
# ## The setting
#
# A network learns the peaks function, a surface with three hills and two hollows, from
# 2000 points in batches of five. It is the small residual network of the slimTrain
# paper ([Newman, Chung, Chung and Ruthotto 2022](https://arxiv.org/abs/2109.14002),
# section 5.1): eight features and a constant, so its last layer $W$ has nine weights.
#
# One run says little, since minibatches are random. So each experiment runs from five
# starts, with an order of the batches for each. All methods get the same starts and the
# same batches.

# %%
starts, epochs, batch_size = (2, 2, 5) if QUICK else (5, 20, 5)
train, validation = vp.datasets.peaks(100 if QUICK else 2000, 500)
inputs, targets = map(jnp.asarray, train)


def network(seed):
    return vp.networks.AntisymmetricResNet(
        2, 8, 1, steps=7, final_time=5.0, bias_scale=2.0, rngs=nnx.Rngs(seed)
    )


split = [vp.nnx.split(network(seed)) for seed in range(starts)]
thetas = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(theta for theta, _ in split))
model = split[0][1]
problem = vp.Problem(model, vp.least_squares())

order = np.tile(np.arange(len(inputs)), (starts, epochs, 1))
order = np.random.default_rng(0).permuted(order, axis=2)
order = order.reshape(starts, epochs, -1, batch_size)

# %% [markdown]
# ## What a step does
#
# Let $A_k$ be the design rows of batch $k$, a row for each sample, divided by the root
# of the batch size, and $c_k$ the targets likewise. A step moves $W$ by
#
# $$W_k = W_{k-1} - \Big(\sum_{i=k-r}^{k} A_i^\top A_i + \Sigma_k I\Big)^{-1}
# \Big(A_k^\top (A_k W_{k-1} - c_k) + \Lambda_k W_{k-1}\Big),
# \qquad \Sigma_k = \Sigma_0 + \sum_{i=1}^k \Lambda_i.$$
#
# The sum over $A_i^\top A_i$ is the memory: `memory` is $r$, the number of earlier
# batches in it. Their samples are not kept, only these matrices. $\Sigma_k$ says how
# firmly a step keeps $W$ where it was. `selection` is the rule that chooses
# $\Lambda_k$, which may be negative as long as the sum stays positive. Then any
# optimizer moves θ by the gradient at the new $W$.
#
# How much of $W$ does a step determine? With the eigenvalues $\mu_j$ of the sum of
# $A_i^\top A_i$, the hat matrix of the rows in memory has the trace
#
# $$\sum_j \frac{\mu_j}{\mu_j + \Sigma_k},$$
#
# known as the degrees of freedom. It counts the directions of $W$ that follow the
# samples in memory; in the others $W$ stays where it was. Here it is at most 9, and
# without a memory at most 5.


# %%
def degrees_of_freedom(tikhonov):
    eigenvalues = jnp.linalg.eigvalsh(tikhonov.grams.sum(axis=0))
    eigenvalues = jnp.maximum(eigenvalues, 0)  # less is rounding
    return jnp.sum(eigenvalues / (eigenvalues + tikhonov.lambda_sum))


# %% [markdown]
# A method of varprox is a pair of pure functions, `init` and `step`. So the runs are a
# few lines of JAX: a scan over the batches of an epoch, a scan over the epochs, and
# `vmap` over the starts. A run returns the validation loss after every epoch and what
# `report` says of every step.


# %%
def run(state, step, report, order):
    def of_batch(state, batch):
        state, info = step(state, (inputs[batch], targets[batch]))
        return state, report(state, info)

    def of_epoch(state, batches):
        state, reports = jax.lax.scan(of_batch, state, batches)
        predictions = vp.predict(problem, state.theta, state.w, validation[0])
        return state, (problem.loss.value(predictions, validation[1]), reports)

    return jax.lax.scan(of_epoch, state, order)[1]


def slimtrain(rate, memory, selection):
    method = vp.slimtrain(problem, optax.adam(rate), memory, selection)

    def report(state, info):
        freedom = degrees_of_freedom(state.tikhonov)
        return {"Λ": info.lambda_, "ΣΛ": info.lambda_sum, "freedom": freedom}

    def from_start(theta, order):
        return run(method.init(theta, train), method.step, report, order)

    return jax.jit(jax.vmap(from_start))(thetas, order)


# %% [markdown]
# ## Three ways to choose Λ
#
# - `vp.constant(1e-10)`: as good as none. $\Sigma_k$ stays at its initial value, 0.05.
# - `vp.sgcv()`, the choice of the paper: sampled generalised cross validation, which
#   estimates from the batch alone how well $W$ would predict other samples.
# - `vp.proportional()`, the default: $\Sigma_k$ falls from a high value to one in
#   proportion to the size of the features.
#
# Adam moves θ at the paper's rate, $10^{-3}$.

# %%
selections = {
    "constant": vp.constant(1e-10),
    "sGCV": vp.sgcv(),
    "proportional": vp.proportional(),
}
memories = [5] if QUICK else [0, 5]
runs = {
    (name, memory): slimtrain(1e-3, memory, selection)
    for name, selection in selections.items()
    for memory in memories
}

# %% [markdown]
# This is what the steps of one start did, with a memory of five batches.

# %% tags=["thumbnail"]
colours = {"constant": "0.6", "sGCV": "k", "proportional": COLOURS["slimTrain"]}
figure, axes = plt.subplots(3, 1, figsize=(6.8, 6.6), sharex=True)
for name, colour in colours.items():
    _, reports = runs[name, 5]
    for ax, quantity in zip(axes, ("Λ", "ΣΛ", "freedom"), strict=True):
        values = reports[quantity][0].ravel()
        steps = np.arange(1, len(values) + 1)
        ax.plot(steps, values, color=colour, linewidth=0.8, label=name)
axes[0].set(xscale="log", ylabel="Λ")
axes[0].set_yscale("symlog", linthresh=1e-3)
axes[1].set(yscale="log", ylabel="ΣΛ")
axes[2].set(xlabel="steps", ylabel="degrees of freedom", ylim=(0, 9.3))
figure.align_ylabels()
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
plt.show()

# %% [markdown]
# With the constant rule and a memory, most of the nine directions of $W$ follow the
# last thirty samples. sGCV takes Λ of either sign. ΣΛ wanders over orders of magnitude
# and in the end lies near its lower bound, $10^{-7}$, where all nine directions follow.
# The reason is that sGCV looks at the batch that $W$ is fitted to.
#
# The proportional rule goes the other way. It keeps ΣΛ so high that a step determines
# about two directions, and in the first hundred steps, while the features are poor,
# about one. $W$ then changes little from step to step, so it rests on many more samples
# than those in memory.
#
# ## Memory
#
# The same runs, with and without memory: the validation loss after every epoch, as the
# median of the five starts. The band goes from the lowest to the highest.


# %%
def draw(ax, losses, **style):
    """The median over the starts, and the range as a band."""
    x = np.arange(1, epochs + 1)
    low, middle, high = np.quantile(losses, [0, 0.5, 1], axis=0)
    ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    ax.plot(x, middle, **style)


figure, axes = plt.subplots(1, 3, figsize=(7.8, 3.4), sharey=True)
for ax, (name, colour) in zip(axes, colours.items(), strict=True):
    for memory in memories:
        line = "-" if memory else "--"
        losses, _ = runs[name, memory]
        draw(ax, losses, color=colour, linestyle=line, label=f"memory={memory}")
    ax.set(yscale="log", xlabel="epochs", title=name)
    ax.legend()
axes[0].set_ylabel("validation loss (½ mean square)")
plt.show()

# %% [markdown]
# With the constant rule and with sGCV the memory is needed: after ten epochs the loss
# is lower by a factor of two or more, because a batch alone leaves at least four of
# nine directions open. With the proportional rule the memory makes no difference, since
# $W$ itself remembers. It also has the narrowest band at the start and the lowest loss
# in the end.
#
# ## Beside Adam
#
# Adam moves all weights by gradients, those of the last layer too. It starts at the
# same θ, and at the $W$ that slimTrain starts at, which predicts the mean of the
# targets everywhere. In a further run it starts at $W(\theta)$, the best last layer for
# all 2000 points at this θ. slimTrain gets no such help. Each is tried at three rates.


# %%
class Weights(NamedTuple):
    theta: Any
    w: jax.Array
    optimizer: Any


def adam(rate, ws):
    optimizer = optax.adam(rate)

    def loss(weights, batch):
        predictions = vp.predict(problem, *weights, batch[0])
        return problem.loss.value(predictions, batch[1])

    def step(state, batch):
        weights = state.theta, state.w
        gradients = jax.grad(loss)(weights, batch)
        updates, after = optimizer.update(gradients, state.optimizer)
        return Weights(*optax.apply_updates(weights, updates), after), None

    def from_start(theta, w, order):
        state = Weights(theta, w, optimizer.init((theta, w)))
        return run(state, step, lambda state, info: None, order)

    losses, _ = jax.jit(jax.vmap(from_start))(thetas, ws, order)
    return losses


method = vp.slimtrain(problem, optax.adam(1e-3))
same = jax.vmap(lambda theta: method.init(theta, train).w)(thetas)
solved = jax.vmap(lambda theta: vp.solve_w(problem, theta, train))(thetas)

rates = [1e-3] if QUICK else [1e-3, 3e-3, 1e-2]
figure, axes = plt.subplots(
    1, len(rates), figsize=(7.8, 3.8), sharey=True, squeeze=False
)
for ax, rate in zip(axes[0], rates, strict=True):
    known = {1e-3: runs["proportional", 5]}
    losses, _ = known.get(rate) or slimtrain(rate, 5, vp.proportional())
    draw(ax, losses, color=COLOURS["slimTrain"], label="slimTrain, proportional")
    draw(ax, adam(rate, same), color=COLOURS["Adam"], label="Adam, same start")
    dashed = {"color": COLOURS["Adam"], "linestyle": "--"}
    draw(ax, adam(rate, solved), label="Adam from W(θ)", **dashed)
    ax.set(yscale="log", xlabel="epochs", title=f"rate {rate:g}")
axes[0, 0].set_ylabel("validation loss (½ mean square)")
handles, labels = axes[0, 0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# At the lowest rate slimTrain is ahead of Adam for the first ten epochs: its $W$ is at
# its best from the first steps on, whatever the rate, while Adam has to learn it.
# Towards the twentieth epoch Adam catches up. Given $W(\theta)$ at the start, Adam is
# as fast as slimTrain at first, and then falls behind.
#
# At the rates that suit both better nothing is left of this after a few epochs. The
# curves of all three lie within the spread of the starts, and Adam ends as low as
# slimTrain. On this small problem, run for long at a tuned rate, Adam is as good a
# choice. What slimTrain brings is a faster start at rates that are too low, and no rate
# for $W$.
#
# ## What to change
#
# - `batch_size` to 50, with rates ten times as high: ten times as many samples
#   determine nine weights without a memory, and `memory=0` with the constant rule is as
#   good as any.
# - `memory` to 20 with `vp.sgcv()`: as good as `vp.constant(1e-10)` with the same
#   memory, as ΣΛ no longer matters.
# - `vp.constant(1e-3)`: Λ adds up, so ΣΛ grows without end, from 0.05 to eight in 20
#   epochs, and the degrees of freedom fall below three. The memory then matters little.
# - `vp.proportional(3)`: ΣΛ is higher, and $W$ and the loss follow more slowly.
# - `epochs` to 50: at the lowest rate Adam overtakes slimTrain before the twentieth
#   epoch and ends lower by a factor of about two.
#
# ## What to try next
#
# - [05_autoencoder](05_autoencoder.ipynb) has a last layer with hundreds of weights
#   that all pixels of an image share.
# - [08_optax](08_optax.ipynb) takes the same steps in a training loop of flax.
# - `vp.slimtik(memory=5, selection=vp.sgcv())` is the update of $W$ alone, for rows and
#   targets of your own; `info.trace` and `info.residual` are what its selection looks
#   at.
# - On these data, with all points in every step, `vp.gnvpro` comes orders of magnitude
#   lower: see [03_your_own_network](03_your_own_network.ipynb) for how to call it.
