"""MATLAB's peaks function: a smooth surface over the plane with three hills and two hollows."""

import numpy as np

from varprox.datasets._cache import Dataset, check_integer, float_dtype


def peaks(n: int = 2000, n_validation: int = 500, seed: int = 0) -> Dataset:
    """Regression of the peaks function from points drawn uniformly at random from [−3, 3]².

    Inputs are (n, 2), targets (n, 1), both in jax's default float dtype; a target is
    `peaks_function` of its input, rounded once. The training points do not depend on
    `n_validation`.

    Raises TypeError or ValueError unless `n` and `n_validation` are integers ≥ 1 and `seed` is
    one ≥ 0.
    """
    n = check_integer("n", n, least=1)
    n_validation = check_integer("n_validation", n_validation, least=1)
    rng = np.random.default_rng(check_integer("seed", seed, least=0))
    return Dataset(train=_sample(rng, n), validation=_sample(rng, n_validation))


def peaks_function(points: np.ndarray) -> np.ndarray:
    """MATLAB's peaks at points (…, 2), as (…, 1), in the dtype of `points`.

    f(x, y) = 3 (1 − x)² exp(−x² − (y + 1)²)
              − 10 (x/5 − x³ − y⁵) exp(−x² − y²)
              − ⅓ exp(−(x + 1)² − y²)
    """
    x, y = points[..., :1], points[..., 1:]
    return (
        3 * (1 - x) ** 2 * np.exp(-(x**2) - (y + 1) ** 2)
        - 10 * (x / 5 - x**3 - y**5) * np.exp(-(x**2) - y**2)
        - np.exp(-((x + 1) ** 2) - y**2) / 3
    )


def _sample(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    inputs = rng.uniform(-3, 3, (n, 2)).astype(float_dtype())
    return inputs, peaks_function(inputs.astype(np.float64)).astype(inputs.dtype)
