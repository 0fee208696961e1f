"""A run of slimTrain in a process that may be killed: `python kept_run.py FOLDER`.

Prints a line after every entry of the history, and keeps every one of them in the folder.
"""

import sys

import jax
import jax.numpy as jnp
import optax

import varprox as vp

EPOCHS = 40


def run(**options):
    """The run; deterministic, whatever `options` are."""
    inputs = jax.random.normal(jax.random.key(0), (40, 2))
    data = inputs, jnp.sin(inputs[:, :1]) * inputs[:, 1:]
    theta = 0.5 * jax.random.normal(jax.random.key(1), (2, 5))
    model = vp.Separable(lambda theta, inputs: jnp.tanh(inputs @ theta))
    method = vp.slimtrain(vp.Problem(model, vp.least_squares()), optax.sgd(0.1, momentum=0.9))
    return vp.fit(method, theta, data, epochs=EPOCHS, batch_size=8, **options)


if __name__ == "__main__":
    run(checkpoint=sys.argv[1], every=0, callback=lambda *_: print("entry", flush=True))
