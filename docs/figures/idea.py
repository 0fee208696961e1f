"""Draws idea.svg, the picture of the front page: python docs/figures/idea.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import varprox as vp

BLUE, GREY = "#0072b2", "#555555"

jax.config.update("jax_enable_x64", True)

times = jnp.linspace(0, 1, 50)[:, None]
data = times, jnp.tanh(2 * times)
model = vp.Separable(lambda theta, times: jnp.tanh(theta * times), head=vp.dense(bias=False))
problem = vp.Problem(model, loss=vp.least_squares())


@jax.jit
def objective(theta, w):
    """Φ(W, θ) for numbers θ and W."""
    return 0.5 * jnp.mean((w * jnp.tanh(theta * times) - data[1]) ** 2)


def descend(theta, w, rate=0.3, steps=100):
    """The path of gradient descent on both weights."""
    path = [(theta, w)]
    for _ in range(steps):
        slopes = jax.grad(objective, (0, 1))(*path[-1])
        path.append(tuple(x - rate * slope for x, slope in zip(path[-1], slopes, strict=True)))
    return jnp.array(path)


def project(theta, steps=4):
    """The path of GNvpro, (θ, W(θ))."""
    method = vp.gnvpro(problem)
    state = method.init(jnp.array([theta]), data)
    path = [(theta, state.w[0, 0])]
    for _ in range(steps):
        state, _ = method.step(state, data)
        path.append((state.theta[0], state.w[0, 0]))
    return jnp.array(path)


plt.rcParams |= {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "contour.negative_linestyle": "solid",
    "svg.hashsalt": "varprox",
}
thetas = jnp.linspace(0.05, 4, 300)
weights = jnp.linspace(0, 3.6, 300)
reduced = [vp.reduced_objective(problem)(jnp.array([theta]), data) for theta in thetas]
values = jnp.array([value for value, _ in reduced])
valley = jnp.array([w[0, 0] for _, w in reduced])
both, projected = descend(0.4, 0.4), project(0.4)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
levels = jax.vmap(jax.vmap(objective, (0, None)), (None, 0))(thetas, weights)
left.contour(thetas, weights, jnp.log10(levels), levels=jnp.arange(-5, 1, 0.5), colors="#cccccc")
left.plot(thetas, valley, color=BLUE, label="W(θ), the best W for each θ")
left.plot(*both.T, ".-", color=GREY, lw=0.8, ms=3, label="gradient descent on θ and W, 100 steps")
left.plot(*projected.T, "o", color=BLUE, ms=5, label="GNvpro on θ alone, 4 steps")
left.set(xlabel="θ", ylabel="W", xlim=(0, 4), ylim=(0, 3.6), title="Φ(W, θ)")
left.legend(loc="upper right", facecolor="white", frameon=True, edgecolor="none")
right.semilogy(thetas, values, color=BLUE)
right.semilogy(
    projected[:, 0],
    jnp.array([objective(*point) for point in projected]),
    "o",
    color=BLUE,
    ms=5,
)
right.set(xlabel="θ", xlim=(0, 4), ylim=(1e-6, 1), title="Φ(W(θ), θ)")
figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
