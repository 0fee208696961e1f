"""Networks that are flows in time, and how their weights go over to a finer time grid."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from varprox.networks.dense import Network, check_counts, dtype_or_default, tanh


class _Flow(Network):
    """An opening layer tanh(y K₀ + b₀), a flow through time on its output, and the head.

    The flow's weights have time as their leading axis, which alone says how many steps there are.
    It acts on states (width, samples), samples along the contiguous axis: the faster layout on CPU
    for narrow networks, and that of the formulas. The steps are scanned: unrolled they run about as
    fast, but compile in a time that grows with their number.
    """

    def __init__(
        self, in_features, width, out_features, steps, final_time, bias_scale, rngs, dtype
    ):
        check_counts(in_features=in_features, width=width, out_features=out_features, steps=steps)
        if not (final_time > 0 and math.isfinite(final_time)):
            raise ValueError(f"final_time: expected a positive number, got {final_time!r}")
        self.final_time = float(final_time)
        if not (bias_scale >= 0 and math.isfinite(bias_scale)):
            raise ValueError(f"bias_scale: expected a number ≥ 0, got {bias_scale!r}")
        spread = nnx.initializers.normal(bias_scale)
        self.opening = nnx.Linear(
            in_features, width, bias_init=spread, param_dtype=dtype, rngs=rngs
        )
        self.head = nnx.Linear(width, out_features, param_dtype=dtype, rngs=rngs)

    def features(self, inputs: jax.Array) -> jax.Array:
        """Inputs (…, in_features) to features (…, width)."""
        z = tanh(self.opening(inputs))
        return self.flow(z.reshape(-1, z.shape[-1]).T).T.reshape(z.shape)

    def flow(self, z: jax.Array) -> jax.Array:
        """States (width, samples) at time zero to states at `final_time`."""
        raise NotImplementedError


class ResNet(_Flow):
    """A residual network: forward Euler for ż = activation(K(t) z + b(t)).

    A linear layer and tanh open it: z = tanh(y K₀ + b₀). Then every step takes

    z ← z + h activation(K_j z + b_j) with h = final_time / steps,

    and a linear head ends it. The weights of the steps are `kernel` (steps, width, width),
    LeCun-normal at the start and drawn anew for every step, and `bias` (steps, width), zero at the
    start.

    Arguments:
        in_features: The number of inputs.
        width: The number of units, which is the number of features.
        out_features: The number of outputs.
        steps: The number of steps in time, each with weights of its own.
        final_time: The time at the end of the last step, a positive number.
        bias_scale: The standard deviation of the opening layer's initial biases, a number ≥ 0.
        activation: A function from arrays to arrays, by default `tanh`.
        rngs: A `flax.nnx.Rngs`, from which the initial weights are drawn.
        param_dtype: The dtype of the weights; None, the default, means JAX's default float.

    Raises:
        ValueError: If a count is not a positive integer, if `final_time` is not positive, or if
            `bias_scale` is negative.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> net = vp.networks.ResNet(2, 4, 1, steps=3, final_time=1.0, rngs=nnx.Rngs(0))
        >>> net.kernel.shape, net(jnp.ones((5, 2))).shape
        ((3, 4, 4), (5, 1))
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        out_features: int,
        *,
        steps: int,
        final_time: float,
        bias_scale: float = 1.0,
        activation: Callable[[jax.Array], jax.Array] = tanh,
        rngs: nnx.Rngs,
        param_dtype=None,
    ):
        dtype = dtype_or_default(param_dtype)
        super().__init__(
            in_features, width, out_features, steps, final_time, bias_scale, rngs, dtype
        )
        self.activation = activation
        self.kernel = nnx.Param(_square_kernels(rngs.params(), steps, width, dtype))
        self.bias = nnx.Param(jnp.zeros((steps, width), dtype))

    def flow(self, z: jax.Array) -> jax.Array:
        """States (width, samples) at time zero to states at `final_time`."""
        h = self.final_time / len(self.kernel)

        def step(z, weights):
            kernel, bias = weights
            return z + h * self.activation(kernel @ z + bias[:, None]), None

        return jax.lax.scan(step, z, (self.kernel[...], self.bias[...]))[0]


class AntisymmetricResNet(_Flow):
    """A stable residual network: RK4 for ż = tanh(K(t) z + b(t)) with K = T − Tᵀ − γ I.

    A linear layer and tanh open it, z = tanh(y K₀ + b₀), and a linear head ends it. T is strictly
    lower triangular. The eigenvalues of K have real part −γ: signals do not explode, and for small
    γ they do not fade.

    The weights are T and b at the nodes and midpoints of the time grid: `lower` (2 steps + 1, width
    (width − 1) / 2), which holds T row by row, and `bias` (2 steps + 1, width). All nodes start
    with the same T, normal with standard deviation 1.5 / √width, and with b = 0. The eigenvalues of
    K are then within about ±3i, so states turn and mix on their way.

    Within a step the weights are the parabola through its two nodes and its midpoint. `min_steps`
    lets the states follow this parabola in finer steps.

    Arguments:
        in_features: The number of inputs.
        width: The number of units, at least 2, which is the number of features.
        out_features: The number of outputs.
        steps: The number of steps of the time grid on which the weights live.
        final_time: The time at the end of the last step, a positive number.
        bias_scale: The standard deviation of the opening layer's initial biases, a number ≥ 0.
        gamma: The damping γ, a number ≥ 0.
        min_steps: The least number of steps that the states take. If `steps` is smaller, it is
            doubled until it is at least this; `prolong` changes nothing up to there.
        rngs: A `flax.nnx.Rngs`, from which the initial weights are drawn.
        param_dtype: The dtype of the weights; None, the default, means JAX's default float.

    Raises:
        ValueError: If a count is not a positive integer, if `width` is below 2, if `final_time` is
            not positive, or if `bias_scale` or `gamma` is negative.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> net = vp.networks.AntisymmetricResNet(
        ...     2, 4, 1, steps=3, final_time=1.0, rngs=nnx.Rngs(0)
        ... )
        >>> net.lower.shape, net(jnp.ones((5, 2))).shape
        ((7, 6), (5, 1))

    Source:
        Haber, Ruthotto, Stable architectures for deep neural networks, arXiv:1705.03341.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        out_features: int,
        *,
        steps: int,
        final_time: float,
        bias_scale: float = 1.0,
        gamma: float = 1e-4,
        min_steps: int = 1,
        rngs: nnx.Rngs,
        param_dtype=None,
    ):
        dtype = dtype_or_default(param_dtype)
        super().__init__(
            in_features, width, out_features, steps, final_time, bias_scale, rngs, dtype
        )
        if width < 2:
            raise ValueError(f"width: expected at least 2, got {width}")
        if not (gamma >= 0 and math.isfinite(gamma)):
            raise ValueError(f"gamma: expected a number ≥ 0, got {gamma!r}")
        check_counts(min_steps=min_steps)
        self.gamma = float(gamma)
        self.min_steps = min_steps
        draw = nnx.initializers.normal(1.5 / math.sqrt(width))
        lower = draw(rngs.params(), (width * (width - 1) // 2,), dtype)
        self.lower = nnx.Param(jnp.tile(lower, (2 * steps + 1, 1)))
        self.bias = nnx.Param(jnp.zeros((2 * steps + 1, width), dtype))

    def kernels(self) -> jax.Array:
        """K at the nodes and midpoints, (2 steps + 1, width, width)."""
        width, lower = self.bias.shape[1], self.lower[...]
        rows, columns = np.tril_indices(width, -1)
        # A product, not an index, whose derivative for each sample would be a scatter: slow on CPU.
        place = np.zeros((rows.size, width, width))
        place[np.arange(rows.size), rows, columns] = 1
        place = (place - place.mT).reshape(rows.size, -1).astype(lower.dtype)
        kernels = (lower @ place).reshape(-1, width, width)
        return kernels - self.gamma * jnp.eye(width, dtype=lower.dtype)[None]

    def flow(self, z: jax.Array) -> jax.Array:
        """States (width, samples) at time zero to states at `final_time`."""
        kernels, biases = self.kernels(), self.bias[..., None]
        while len(kernels) < 2 * self.min_steps + 1:
            kernels, biases = _interpolate(kernels), _interpolate(biases)
        h = 2 * self.final_time / (len(kernels) - 1)

        def slope(z, node):
            kernel, bias = node
            return tanh(kernel @ z + bias)

        # Derivatives keep z and the slopes; the rest follows from them without a matrix product.
        @partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.save_only_these_names("tanh"),
            prevent_cse=False,  # scan does
        )
        def step(z, nodes):
            start, middle, end = nodes
            k1 = slope(z, start)
            k2 = slope(z + h / 2 * k1, middle)
            k3 = slope(z + h / 2 * k2, middle)
            k4 = slope(z + h * k3, end)
            return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        times = slice(0, -2, 2), slice(1, None, 2), slice(2, None, 2)
        return jax.lax.scan(step, z, [(kernels[t], biases[t]) for t in times])[0]


class HamiltonianNet(_Flow):
    """A Hamiltonian network: leapfrog for ẏ = tanh(K(t) z + b(t)), ż = −tanh(K(t)ᵀ y + b(t)).

    A linear layer and tanh open it: y = tanh(x K₀ + b₀) for inputs x, and z = 0. Then every step
    takes

    z ← z − h tanh(K_jᵀ y + b_j), then y ← y + h tanh(K_j z + b_j), with h = final_time / steps.

    The features are the final y, and a linear head ends the network. Each step preserves volume in
    (y, z). The weights of the steps are `kernel` (steps, width, width), LeCun-normal at the start
    and drawn anew for every step, and `bias` (steps, width), zero at the start.

    Arguments:
        in_features: The number of inputs.
        width: The number of units in y, and in z; the number of features.
        out_features: The number of outputs.
        steps: The number of steps in time, each with weights of its own.
        final_time: The time at the end of the last step, a positive number.
        bias_scale: The standard deviation of the opening layer's initial biases, a number ≥ 0.
        rngs: A `flax.nnx.Rngs`, from which the initial weights are drawn.
        param_dtype: The dtype of the weights; None, the default, means JAX's default float.

    Raises:
        ValueError: If a count is not a positive integer, if `final_time` is not positive, or if
            `bias_scale` is negative.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> net = vp.networks.HamiltonianNet(2, 4, 1, steps=3, final_time=1.0, rngs=nnx.Rngs(0))
        >>> net.kernel.shape, net(jnp.ones((5, 2))).shape
        ((3, 4, 4), (5, 1))

    Source:
        Haber, Ruthotto, Stable architectures for deep neural networks, arXiv:1705.03341.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        out_features: int,
        *,
        steps: int,
        final_time: float,
        bias_scale: float = 1.0,
        rngs: nnx.Rngs,
        param_dtype=None,
    ):
        dtype = dtype_or_default(param_dtype)
        super().__init__(
            in_features, width, out_features, steps, final_time, bias_scale, rngs, dtype
        )
        self.kernel = nnx.Param(_square_kernels(rngs.params(), steps, width, dtype))
        self.bias = nnx.Param(jnp.zeros((steps, width), dtype))

    def flow(self, y: jax.Array) -> jax.Array:
        """States y (width, samples) at time zero to states at `final_time`, with z from zero."""
        return self.phase_flow(y, jnp.zeros_like(y))[0]

    def phase_flow(self, y: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """States y and z, each (width, samples), at time zero to states at `final_time`."""
        h = self.final_time / len(self.kernel)

        def step(state, weights):
            y, z = state
            kernel, bias = weights
            z = z - h * tanh(kernel.T @ y + bias[:, None])
            y = y + h * tanh(kernel @ z + bias[:, None])
            return (y, z), None

        return jax.lax.scan(step, (y, z), (self.kernel[...], self.bias[...]))[0]


def prolong(theta: dict) -> dict:
    """The nonlinear weights θ of a flow for twice as many steps in time.

    The model stays the same, because the leading axis of the weights says how many steps there are.

    =====================  ===========================================  =====================
    network                new weights                                  change of the outputs
    =====================  ===========================================  =====================
    `AntisymmetricResNet`  on the parabola through each step's weights  O(h⁴)
    `ResNet`               each step's weights twice                    O(h)
    `HamiltonianNet`       each step's weights twice                    O(h)
    =====================  ===========================================  =====================

    Here h is the length of a step. O(h⁴) holds even if the weights jump from step to step, because
    RK4 sees nothing of a step but its nodes and midpoint. The outputs of an `AntisymmetricResNet`
    that takes its `min_steps` before and after change by nothing but rounding. O(h) is the order of
    the other two methods.

    Arguments:
        theta: The nonlinear weights of a `ResNet`, `AntisymmetricResNet` or `HamiltonianNet`, as
            `varprox.nnx.split` gives them.

    Returns:
        Weights of the same structure, with time axes for twice as many steps. The function itself
        is the option `prolong` of `varprox.fit_levels`.

    Raises:
        ValueError: If `theta` has another structure.

    Example:
        >>> from flax import nnx
        >>> import varprox as vp
        >>> net = vp.networks.ResNet(2, 4, 1, steps=3, final_time=1.0, rngs=nnx.Rngs(0))
        >>> theta, model = vp.nnx.split(net)
        >>> vp.networks.prolong(theta)["kernel"].shape
        (6, 4, 4)
    """
    names = {"opening", "bias"}
    if not isinstance(theta, dict) or set(theta) - {"kernel", "lower"} != names or len(theta) != 3:
        raise ValueError(
            f"theta: expected the weights of a ResNet, AntisymmetricResNet or HamiltonianNet, "
            f"got {list(theta) if isinstance(theta, dict) else type(theta).__name__}"
        )

    refine = _interpolate if "lower" in theta else lambda steps: jnp.repeat(steps, 2, axis=0)
    return {name: refine(x) if name != "opening" else x for name, x in theta.items()}


def _interpolate(nodes):
    """Weights at nodes and midpoints of a time grid, (2 steps + 1, …), for twice the steps."""
    start, middle, end = nodes[:-1:2], nodes[1::2], nodes[2::2]
    first = (3 * start + 6 * middle - end) / 8
    third = (3 * end + 6 * middle - start) / 8
    steps = jnp.stack([start, first, middle, third], axis=1).reshape(-1, *nodes.shape[1:])
    return jnp.concatenate([steps, nodes[-1:]])


def _square_kernels(key, steps, width, dtype):
    """LeCun-normal kernels (steps, width, width) that act as K @ z."""
    draw = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2, batch_axis=0)
    return draw(key, (steps, width, width), dtype)
