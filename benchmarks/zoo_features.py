"""The features of the zoo: functions of θ and inputs, which its problems share.

Constants in them are leading arguments, bound by `jax.tree_util.Partial`, so that problems which
differ in these share what is compiled.
"""

import jax
import jax.numpy as jnp

# Curves: features of a scalar, whose parameters are few.


def decays(p, t):
    """exp(−t eᵖ)."""
    return jnp.exp(-t[:, None] * jnp.exp(p))


def rates(p, t):
    """exp(−p t), the rates themselves being sought."""
    return jnp.exp(-t[:, None] * p)


def waves(p, t):
    """Damped cosines and sines; p is (2, terms), logarithms of the dampings and frequencies."""
    damped, phase = jnp.exp(-t[:, None] * jnp.exp(p[0])), t[:, None] * p[1]
    return jnp.concatenate([damped * jnp.cos(phase), damped * jnp.sin(phase)], axis=1)


def bells(p, x):
    """Gaussians; p is (2, terms), centres and logarithms of widths, and so below."""
    return jnp.exp(-0.5 * ((x[:, None] - p[0]) / jnp.exp(p[1])) ** 2)


def lorentzians(p, x):
    return 1 / (1 + ((x[:, None] - p[0]) / jnp.exp(p[1])) ** 2)


def hyperbolas(p, x):
    return 1 / (1 + x[:, None] * jnp.exp(p))


def steps(p, x):
    return jnp.tanh((x[:, None] - p[0]) / jnp.exp(p[1]))


def bells_in_plane(p, x):
    """Gaussians of two variables; p is (3, terms), two centres and the logarithm of the width."""
    squares = (x[:, :1] - p[0]) ** 2 + (x[:, 1:] - p[1]) ** 2
    return jnp.exp(-0.5 * squares / jnp.exp(2 * p[2]))


def extended(further, p, t):
    """Decays and one column more, `further[0]` times the first decay plus `further[1]`."""
    z = decays(p, t)
    return jnp.concatenate([z, further[0] * z[:, :1] + further[1]], axis=1)


def ridges(p, x):
    """tanh(a x + b) for p (2, terms)."""
    return jnp.tanh(x[:, None] * p[0] + p[1])


# Features that couple samples.


def convolved(response, p, t):
    """Decays seen through an instrument: a convolution along the samples."""
    length = 2 * len(t)
    spectrum = jnp.fft.rfft(response, length)[:, None] * jnp.fft.rfft(decays(p, t), length, axis=0)
    return jnp.fft.irfft(spectrum, length, axis=0)[: len(t)]


def normalised(p, x):
    """tanh of units that are centred and scaled over the batch."""
    z = x @ p["kernel"]
    z = (z - z.mean(axis=0)) / jnp.sqrt(z.var(axis=0) + 1e-3)
    return jnp.tanh(z * (1 + p["scale"]) + p["shift"])


def solved(slope, initial, p, t):
    """The states of ẋ = slope(eᵖ, x) at the times t, by RK4 from `initial` at the first of them."""
    k = jnp.exp(p)

    def step(x, h):
        k1 = slope(k, x)
        k2 = slope(k, x + h / 2 * k1)
        k3 = slope(k, x + h / 2 * k2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(k, x + h * k3))
        return x, x

    later = jax.lax.scan(step, initial, jnp.diff(t))[1]
    return jnp.concatenate([initial[None], later])


def enzyme(k, x):
    """Michaelis–Menten: what is made decays."""
    rate = k[0] * x[0] / (k[1] + x[0])
    return jnp.stack([-rate, rate - k[2] * x[1]])


def oscillator(k, x):
    """Van der Pol's."""
    return jnp.stack([x[1], k[0] * (1 - x[0] ** 2) * x[1] - k[1] * x[0]])


# Networks of the user's own.


def gated(p, x):
    """The last state of a gated recurrent unit over sequences (batch, times)."""
    size = p["inner"].shape[0]

    def step(h, x):
        fed = x[:, None] * p["outer"] + p["bias"]
        gates = jax.nn.sigmoid(fed[:, : 2 * size] + h @ p["inner"][:, : 2 * size])
        reset, keep = jnp.split(gates, 2, axis=1)
        new = jnp.tanh(fed[:, 2 * size :] + (reset * h) @ p["inner"][:, 2 * size :])
        return keep * h + (1 - keep) * new, None

    return jax.lax.scan(step, jnp.zeros((len(x), size), x.dtype), x.T)[0]


# Linear differential equations by collocation: rows of the operator inside, of values on the edge.


def collocated(operator, p, inputs):
    """Features tanh(x K + b) and 1 of points x (batch, 2); the operator's coefficients are those of
    the first derivatives, and of the unmixed second ones."""
    x, inside, weight = inputs
    first_order, second_order = operator
    value = jnp.tanh(x @ p["kernel"] + p["bias"])
    first = 1 - value**2
    second = -2 * value * first
    applied = first * (first_order @ p["kernel"]) + second * (second_order @ p["kernel"] ** 2)
    one = jnp.where(inside, jnp.zeros_like(weight), jnp.ones_like(weight))
    return weight * jnp.concatenate([jnp.where(inside, applied, value), one], axis=1)
