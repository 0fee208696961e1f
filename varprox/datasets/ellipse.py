"""Points inside and outside an ellipse: the smallest problem that no linear classifier solves."""

import numpy as np

from varprox.datasets._cache import Dataset, check_integer, float_dtype, one_hot

SEMI_AXES = (1.0, 0.4)


def ellipse(n: int = 5000, n_validation: int = 1000, seed: int = 0) -> Dataset:
    """Classification of points as inside or outside the ellipse x² + (y / 0.4)² = 1.

    A point is r (cos t, 0.4 sin t) with t uniform in [0, 2π), and with r uniform in [0, 1) inside
    and in [1, 2) outside. So the points are densest at the centre, and none lies beyond twice the
    ellipse. ⌈n/2⌉ points are inside and ⌊n/2⌋ outside, in random order. The training points do not
    depend on `n_validation`.

    Arguments:
        n: The number of training points, an integer ≥ 1.
        n_validation: The number of validation points, an integer ≥ 1.
        seed: An integer ≥ 0, which fixes the points.

    Returns:
        A `Dataset` with inputs (n, 2) and one-hot targets (n, 2) in JAX's default float dtype.
        Column 0 of the targets means inside and column 1 outside.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If `n` or `n_validation` is below 1, or `seed` below 0.

    Example:
        >>> import varprox as vp
        >>> data = vp.datasets.ellipse(100, n_validation=20)
        >>> inputs, targets = data.train
        >>> inputs.shape, targets.sum(axis=0).tolist()
        ((100, 2), [50.0, 50.0])

    Source:
        The circle example in the code of Newman, Ruthotto, Hart, van Bloemen Waanders,
        arXiv:2007.13171.
    """
    n = check_integer("n", n, least=1)
    n_validation = check_integer("n_validation", n_validation, least=1)
    rng = np.random.default_rng(check_integer("seed", seed, least=0))
    return Dataset(train=_sample(rng, n), validation=_sample(rng, n_validation))


def _sample(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    outside = rng.permutation(np.arange(n) % 2)
    radius = rng.uniform(size=n) + outside
    angle = rng.uniform(0, 2 * np.pi, n)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    inputs = radius[:, None] * circle * np.array(SEMI_AXES)
    return inputs.astype(float_dtype()), one_hot(outside, 2)
