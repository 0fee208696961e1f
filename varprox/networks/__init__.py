"""The papers' feature extractors as flax `nnx` modules, each ending in a linear layer, `head`.

A network computes `head(features(inputs))` for inputs (…, in_features) of its weights' dtype. That
is `param_dtype`, where None means JAX's default float: float64 under x64, else float32. Linear
layers start with LeCun-normal kernels and zero biases, those that open a flow with normal biases of
standard deviation `bias_scale`, which spreads the points where their units saturate over the
inputs. Imports JAX and flax.
"""

from varprox.networks.autoencoder import Autoencoder
from varprox.networks.dense import Dense, tanh
from varprox.networks.flows import AntisymmetricResNet, HamiltonianNet, ResNet, prolong

__all__ = [
    "AntisymmetricResNet", "Autoencoder", "Dense", "HamiltonianNet", "ResNet", "prolong", "tanh",
]  # fmt: skip
