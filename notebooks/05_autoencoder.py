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
# # An autoencoder from a few hundred images
#
# A convolutional autoencoder squeezes each image into eight numbers and makes the image
# anew from them. Its last layer is a transposed convolution, which is linear in its
# weights, too, so slimTrain can solve for it. You will see how the validation loss
# falls for slimTrain and for Adam when images are few, and what the reconstructions
# look like.

# %%
import os

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view
from tensorly.datasets import load_indian_pines

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
# ## The images
#
# [Indian Pines](https://doi.org/10.4231/R7RX991C) shows farmland from the air, 145 ×
# 145 pixels in 200 bands of the spectrum. It comes with the package tensorly, so
# nothing is downloaded. Of the standardised bands we take the first principal
# component, which holds two thirds of their variance, and cut the picture into patches
# of 16 × 16 pixels. Patches for training come from the left of the line and those for
# validation from the right, so that they share no pixel.

# %%
samples = 64 if QUICK else 256
bands = np.asarray(load_indian_pines().tensor, float)
bands = (bands - bands.mean(axis=(0, 1))) / bands.std(axis=(0, 1))
_, directions = np.linalg.eigh(np.cov(bands.reshape(-1, 200).T))
picture = bands @ (directions[:, -1] * np.sign(directions[:, -1].sum()))
picture = (picture / picture.std()).astype(np.float32)


def patches(part, stride):
    """All patches whose corners lie `stride` pixels apart, (patches, 16, 16, 1)."""
    windows = sliding_window_view(part, (16, 16))[::stride, ::stride]
    return windows.reshape(-1, 16, 16, 1)


rng = np.random.default_rng(0)
train = jnp.asarray(rng.permutation(patches(picture[:, :96], 2))[:samples])
validation = jnp.asarray(patches(picture[:, 96:], 4))
print(f"{len(train)} patches for training, {len(validation)} for validation")

# %%
figure, ax = plt.subplots(figsize=(5, 4.2))
image = ax.imshow(picture, cmap="viridis")
ax.axvline(95.5, color="w", linewidth=2)
ax.set(xlabel="pixels", ylabel="pixels", title="First principal component of the bands")
ax.grid(False)
figure.colorbar(image, label="standard deviations")
plt.show()

# %% [markdown]
# ## The network
#
# `vp.networks.Autoencoder` is the network of the slimTrain paper ([Newman, Chung, Chung
# and Ruthotto 2022](https://arxiv.org/abs/2109.14002), section 5.2). Two convolutions
# halve the patch twice, a linear layer makes eight numbers of what is left, and the
# decoder goes the way back, with batch norm. `head`, a transposed convolution, makes a
# patch of 16 × 16 pixels from 16 channels of 8 × 8.
#
# All output pixels share the weights $W$ of the head, so each patch brings 256
# equations for them. The targets of an autoencoder are its inputs.

# %%
net = vp.networks.Autoencoder((16, 16), channels=16, latent=8, rngs=nnx.Rngs(0))
theta, model = vp.nnx.split(net)
problem = vp.Problem(model, vp.least_squares())
print("W has", vp.nnx.initial_w(net).size, "weights")

# %% [markdown]
# ## slimTrain
#
# Adam moves the weights θ of all other layers, at three rates. The loss is half the sum
# of squares over a patch.

# %%
rates = [3e-3] if QUICK else [1e-3, 3e-3, 1e-2]
epochs, batch_size = (1 if QUICK else 50), 32
slimtrain = {
    rate: vp.fit(
        vp.slimtrain(problem, optax.adam(rate)),
        theta,
        (train, train),
        validation=(validation, validation),
        epochs=epochs,
        batch_size=batch_size,
    )
    for rate in rates
}

# %% [markdown]
# ## Adam
#
# The usual loop of flax, with the weights of the last layer among those that Adam
# moves. θ starts where it does for slimTrain. $W$ starts once at random, as it comes
# with the network, and once where slimTrain starts: at zero, with the mean of the
# patches for its bias.


# %%
@nnx.jit
def loss(net, images):
    return problem.loss.value(net(images), images)


@nnx.jit
def step(net, optimizer, images):
    optimizer.update(net, nnx.grad(loss)(net, images))


def adam(rate, net):
    """The trained network, and its validation loss before each epoch and in the end."""
    net = nnx.clone(net)
    optimizer = nnx.Optimizer(net, optax.adam(rate), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    net.eval()
    losses = [loss(net, validation)]
    for _ in range(epochs):
        net.train()
        for batch in rng.permutation(samples).reshape(-1, batch_size):
            step(net, optimizer, train[batch])
        net.eval()
        losses.append(loss(net, validation))
    return net, np.array(losses)


at_zero = nnx.clone(net)
at_zero.head.kernel[...] = jnp.zeros_like(net.head.kernel[...])
at_zero.head.bias[...] = jnp.full_like(net.head.bias[...], train.mean())
adam_random = {rate: adam(rate, net) for rate in rates}
adam_zero = {rate: adam(rate, at_zero) for rate in rates}

# %% [markdown]
# ## A yardstick
#
# The best linear autoencoder with eight numbers is known without any training: the
# principal components of the patches.


# %%
def flat(images):
    return np.asarray(images).reshape(len(images), -1)


mean = flat(train).mean(axis=0)
_, _, components = np.linalg.svd(flat(train) - mean, full_matrices=False)
codes = (flat(validation) - mean) @ components[:8].T
linear = (codes @ components[:8] + mean).reshape(validation.shape)
linear_loss = problem.loss.value(linear, validation)

# %% [markdown]
# ## The validation loss

# %% tags=["thumbnail"]
ticks = [10, 20, 50, 100, 200]
green, dashed = {"color": COLOURS["Adam"]}, {"linestyle": "--"}
figure, axes = plt.subplots(
    1, len(rates), figsize=(7.8, 3.8), sharey=True, squeeze=False
)
for ax, rate in zip(axes[0], rates, strict=True):
    losses = slimtrain[rate].history["validation_loss"]
    ax.semilogy(losses, color=COLOURS["slimTrain"], label="slimTrain")
    ax.semilogy(adam_zero[rate][1], label="Adam, W as slimTrain", **green)
    ax.semilogy(adam_random[rate][1], label="Adam, W at random", **green, **dashed)
    ax.axhline(linear_loss, color="k", linestyle=":", label="principal components")
    ax.set(xlabel="epochs", title=f"rate {rate:g}", ylim=(10, 200))
    ax.set_yticks(ticks, ticks)
axes[0, 0].set_ylabel("validation loss (½ sum of squares)")
handles, labels = axes[0, 0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# At each rate slimTrain comes down to its level in about half the epochs that Adam
# takes from a random $W$. Much of this lead is due to the start: from slimTrain's own
# $W$ Adam follows closely. In the end all curves lie together. So few patches do not
# suffice for any of them to do better than principal components.
#
# ## Reconstructions
#
# Eight of the most varied patches for validation, and what comes out. A network that
# `fit` has trained is made by `vp.nnx.merge`; `model` carries the statistics of batch
# norm.

# %%
rate = rates[-1]
solution = slimtrain[rate]
trained = vp.nnx.merge(net, solution.theta, solution.w, model=solution.problem.model)
trained.eval()
rows = {
    "patches": validation,
    "slimTrain": trained(validation),
    "Adam": adam_zero[rate][0](validation),
    "principal\ncomponents": linear,
}
varied = flat(validation).std(axis=1).argsort()[-80::10]
figure, axes = plt.subplots(len(rows), 8, figsize=(7.6, 3.8))
for line, (name, images) in zip(axes, rows.items(), strict=True):
    for ax, image in zip(line, np.asarray(images)[varied, ..., 0], strict=True):
        drawn = ax.imshow(image, vmin=-1.5, vmax=2, cmap="viridis")
        ax.set(xticks=[], yticks=[])
    line[0].set_ylabel(name)
figure.colorbar(drawn, ax=axes, label="standard deviations", shrink=0.8)
plt.show()

# %% [markdown]
# All three smooth the patches in the same way: eight numbers hold the large fields, and
# their edges are lost.
#
# ## What to change
#
# - `samples`: with 64 patches all losses are higher, and slimTrain ends below Adam.
#   With 1024 all come down within ten epochs, nearly to the principal components, and
#   the lead is small.
# - `latent` to 32, with 32 principal components: the losses are less than half, and the
#   components are further ahead.
# - `vp.slimtrain(…, memory=0)`: as fast at first, since one batch determines 257
#   weights. Later the validation loss rises more, since $W$ follows every single batch.
# - `vp.slimtrain(…, selection=vp.sgcv())`: the losses are about the same. Each step
#   takes longer, as it computes the eigenvalues of a 257 × 257 matrix.
#
# ## What to try next
#
# - [04_peaks_slimtrain](04_peaks_slimtrain.ipynb) shows what memory and Λ do in every
#   step.
# - Any flax network that ends in `nnx.Linear`, `nnx.Conv` or `nnx.ConvTranspose` is
#   trained in the same way: see [03_your_own_network](03_your_own_network.ipynb).
# - `vp.datasets.mnist(2048)` has digits of 28 × 28 pixels, for
#   `vp.networks.Autoencoder((28, 28), …)` with 50 numbers, as in the paper. They are
#   downloaded once.
