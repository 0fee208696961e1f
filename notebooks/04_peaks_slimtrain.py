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
problem = vp.Problem(model, vp.least_squares(), theta_penalty=1e-10)

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
# \qquad \Sigma_k = \sum_{i \le k} \Lambda_i.$$
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
