"""What the features of a problem allow: derivatives, and samples that are taken apart."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from varprox.precision import full_products
from varprox.problem.hosted import at_hand, leaves_of, shapes_of, taken
from varprox.problem.model import Problem


def treats_samples_alone(problem: Problem, theta, inputs) -> bool:
    """Are the features of a sample the same without the rest of the batch?

    Where θ, inputs or arrays bound to the features are traced, random ones in their place tell.
    Inputs without an array have no samples to take apart, so features of them are never alone.

    The first, the middle and the last sample are compared. A coupling along the batch in one
    direction, such as a convolution, a solution in time or a cumulative sum, leaves only the sample
    at one end as it is alone; one by a mean, a sum or a norm leaves none but those that happen to
    be the mean, and one by an extremum those that are extremal, of which two may be at the ends,
    hence the third.

    The weights are shifted by about a tenth of their size for this, so that a coupling is seen that
    vanishes at θ, as with a weight that starts at zero. A coupling that depends on the weights
    analytically vanishes almost nowhere or everywhere; so where the features agree at such a place,
    their derivatives do. Where the shift leads to what is not a number, θ itself is tried.

    Batches of another size are added up in another order, so features may differ by rounding: by
    eps^½ of the largest in their column, which forgives cancellation of half the digits, plus
    eps^¾ of the largest of all, for columns that are nothing but rounding. The cost is a pass over
    the data and its compilation; where they are taken in chunks, one over samples for one chunk.
    """
    batches = [len(leaf) for leaf in leaves_of(inputs)]
    if not batches:
        return False
    batch = batches[0]
    if batch == 1:
        return True
    if problem.chunk is not None and problem.chunked(inputs):
        few = min(batch, max(problem.chunk, 3))
        inputs, batch = taken(at_hand(inputs), np.arange(few) * (batch - 1) // (few - 1)), few
    chosen = np.array([0, batch // 2, batch - 1])
    for at in _places(problem.model.features, theta, inputs):
        try:
            with jax.ensure_compile_time_eval():  # a caller's jit may hold all of this as constants
                found = _features_alone(*at, chosen)
            together, alone, sizes = map(np.asarray, found)
        except Exception:  # features may raise anything for a shape that they do not expect
            return False
        if alone.shape != together.shape:
            return False
        eps = float(jnp.finfo(sizes.dtype).eps)
        tolerance = eps**0.5 * sizes + eps**0.75 * np.max(sizes)
        if not np.all(np.isclose(alone, together, rtol=0, atol=tolerance, equal_nan=True)):
            return False
        if np.isfinite(together).all():
            break
    return True


def _places(features, theta, inputs):
    """Features, θ and inputs to compare at, the next ones for where features are not finite: at a
    shifted θ, at θ itself, and where arrays are made up with positive ones, as variances are."""
    given = features, theta, inputs
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given))
    for positive in (False, True) if traced else (False,):
        features, theta, inputs = _made_up(given, positive)
        yield features, _shifted(theta), inputs
        yield features, theta, inputs


def _made_up(tree, positive):
    """The tree with random arrays of the same shapes and dtypes where it is traced."""
    rng = np.random.default_rng(0)

    def concrete(leaf):
        if not isinstance(leaf, jax.core.Tracer):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            with jax.ensure_compile_time_eval():
                return jnp.broadcast_to(
                    jax.random.key(0, impl=jax.random.key_impl(leaf)), leaf.shape
                )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return rng.integers(0, 2, leaf.shape).astype(leaf.dtype)
        drawn = rng.uniform(0.5, 1.5, leaf.shape) if positive else rng.normal(size=leaf.shape)
        return np.asarray(drawn).astype(leaf.dtype)

    return jax.tree.map(concrete, tree)


@jax.jit
@full_products
def _features_alone(features, theta, inputs, chosen):
    """The features of the chosen samples among all and alone, and the sizes of all columns."""
    samples = jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], inputs)
    alone = jax.vmap(lambda x: features(theta, jax.tree.map(lambda leaf: leaf[None], x)))
    z = features(theta, inputs)
    sizes = jnp.max(jnp.where(jnp.isfinite(z), jnp.abs(z), 0), axis=0)
    return z[chosen][:, None], alone(samples), sizes


def _shifted(theta):
    """θ with every weight moved by 5 to 15 % of the root mean square of its array, up or down; of
    the largest of all where the array is zero."""
    leaves, structure = jax.tree.flatten(theta)
    leaves = [np.asarray(leaf) for leaf in leaves]
    sizes = [float(np.sqrt(np.mean(np.square(leaf, dtype=float)))) for leaf in leaves]
    rng = np.random.default_rng(0)

    def shifted(leaf, size):
        way = rng.choice([-1, 1], leaf.shape) * rng.uniform(0.05, 0.15, leaf.shape)
        return (leaf + (size or max(sizes) or 1.0) * way).astype(leaf.dtype)

    return jax.tree.unflatten(structure, map(shifted, leaves, sizes))


def derivatives(problem: Problem, theta, inputs) -> tuple[bool, bool]:
    """Can the rows be differentiated in forward mode, and in reverse mode? Nothing is computed.

    Functions with a rule for one mode only, such as `jax.custom_vjp`, and loops whose length
    depends on what they compute, such as `jax.lax.while_loop`, lack one of them.
    """

    def forward(model, theta, inputs):
        return jax.jvp(lambda theta: model.rows(theta, inputs), (theta,), (theta,))

    def reverse(model, theta, inputs):
        rows, pullback = jax.vjp(lambda theta: model.rows(theta, inputs), theta)
        return pullback(rows)

    types = *jax.tree.map(_type, (problem.model, theta)), shapes_of(inputs)
    # That `custom_vjp` has no forward mode is not found before the function is lowered.
    ways = partial(jax.jit(forward).lower, *types), partial(jax.eval_shape, reverse, *types)
    return _succeeds(ways[0]), _succeeds(ways[1])


def _type(x):
    x = jax.typeof(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)


def _succeeds(fn):
    try:
        fn()
    except Exception:  # a function of the user may raise anything
        return False
    return True
