"""The papers' feature extractors as flax `nnx` modules, each ending in a linear layer, `head`.

A network computes ``head(features(inputs))`` for inputs (…, in_features) in the dtype of its
weights. This is `param_dtype`; None means JAX's default float: float64 under x64, else float32.
Linear layers start with LeCun-normal kernels and zero biases. The layer that opens a flow starts
with normal biases of standard deviation `bias_scale`, which spreads the points at which its units
saturate over the inputs.
"""

from varprox.networks.autoencoder import Autoencoder
from varprox.networks.convolutional import Convolutional
from varprox.networks.dense import Dense, tanh
from varprox.networks.flows import AntisymmetricResNet, HamiltonianNet, ResNet, prolong

__all__ = [
    "AntisymmetricResNet", "Autoencoder", "Convolutional", "Dense", "HamiltonianNet", "ResNet",
    "prolong", "tanh",
]  # fmt: skip
