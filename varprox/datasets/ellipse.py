"""Points inside and outside an ellipse: the smallest problem that no linear classifier solves."""

import numpy as np

from varprox.datasets._cache import Dataset, check_integer, float_dtype, one_hot

SEMI_AXES = (1.0, 0.4)


def ellipse(n: int = 5000, n_validation: int = 1000, seed: int = 0) -> Dataset:
    """Classification of points as inside or outside the ellipse x² + (y / 0.4)² = 1.

    A point is r (cos t, 0.4 sin t) with t uniform in [0, 2π), and r uniform in [0, 1) inside, in
    [1, 2) outside: the points are densest at the centre, and none lies beyond twice the ellipse.
    Inputs are (n, 2), targets one-hot (n, 2), column 0 for inside and column 1 for outside, both in
    jax's default float dtype. ⌈n/2⌉ points are inside, ⌊n/2⌋ outside, in random order. The training
    points do not depend on `n_validation`.

    Raises TypeError or ValueError unless `n` and `n_validation` are integers ≥ 1 and `seed` is
    one ≥ 0.

    The circle example in the code of Newman, Ruthotto, Hart and van Bloemen Waanders,
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
