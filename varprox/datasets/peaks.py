"""MATLAB's peaks function: a smooth surface over the plane with three hills and two hollows."""

import numpy as np

from varprox.datasets._cache import Dataset, check_integer, float_dtype


def peaks(n: int = 2000, n_validation: int = 500, seed: int = 0) -> Dataset:
    """Regression of MATLAB's peaks function from random points.

    Inputs are points drawn uniformly from [−3, 3]². A target is `peaks_function` of its input,
    computed in float64 and rounded once. The training points do not depend on `n_validation`.

    Arguments:
        n: The number of training points, an integer ≥ 1.
        n_validation: The number of validation points, an integer ≥ 1.
        seed: An integer ≥ 0, which fixes the points.

    Returns:
        A `Dataset` with inputs (n, 2) and targets (n, 1) in JAX's default float dtype.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If `n` or `n_validation` is below 1, or `seed` below 0.

    Example:
        >>> import varprox as vp
        >>> data = vp.datasets.peaks(100, n_validation=20)
        >>> inputs, targets = data.train
        >>> inputs.shape, targets.shape
        ((100, 2), (100, 1))
    """
    n = check_integer("n", n, least=1)
    n_validation = check_integer("n_validation", n_validation, least=1)
    rng = np.random.default_rng(check_integer("seed", seed, least=0))
    return Dataset(train=_sample(rng, n), validation=_sample(rng, n_validation))


def peaks_function(points: np.ndarray) -> np.ndarray:
    """MATLAB's peaks function, a smooth surface with three hills and two hollows.

    ::

        f(x, y) = 3 (1 − x)² exp(−x² − (y + 1)²)
                  − 10 (x/5 − x³ − y⁵) exp(−x² − y²)
                  − ⅓ exp(−(x + 1)² − y²)

    Arguments:
        points: An array of points (x, y), of shape (…, 2).

    Returns:
        The values f(x, y), of shape (…, 1), in the dtype of `points`.

    Example:
        >>> import numpy as np
        >>> import varprox as vp
        >>> vp.datasets.peaks_function(np.array([[0.0, 0.0], [0.0, 1.6]])).round(2).tolist()
        [[0.98], [8.1]]
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
