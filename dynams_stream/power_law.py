"""The data-size power law err(n) = a·n^(−b) + c, fitted to the test errors of runs on subsets.

Hestness et al. 2017 (arXiv 1712.00409) and Kaplan et al. 2020 (arXiv 2001.08361) find it for random subsets: it says
what a fraction of the data costs when it is chosen blindly, which is what a selection has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynams_stream.errors import MissingExtraError, UsageError

Values = npt.NDArray[np.float64]

LEAST_SIZES = 4
"""Three parameters, and one more to see whether they fit."""
_RESAMPLES = 400
_SEED = 0


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law.

    Attributes:
        a, b, c: its parameters: err(n) = a·n^(−b) + c.
        residual: standard deviation of the logarithm of the measured errors around the law.
        resampled: (R, 3), parameters fitted to resampled points, for intervals.
    """

    a: float
    b: float
    c: float
    residual: float
    resampled: Values

    def error(self, samples: float) -> float:
        """The expected error of a training set of so many samples."""
        return float(_law(np.array([self.a, self.b, self.c]), np.array([samples], dtype=float))[0])

    def interval(self, samples: float, level: float = 0.9) -> tuple[float, float]:
        """Between what that expectation lies, by resampling the points: (low, high) of the central `level`."""
        sizes = np.array([samples], dtype=float)
        errors = [float(_law(parameters, sizes)[0]) for parameters in self.resampled]
        tail = (1 - level) / 2
        low, high = np.quantile(errors, [tail, 1 - tail])
        return float(low), float(high)


def fit_power_law(sizes: Sequence[float], errors: Sequence[float]) -> PowerLaw:
    """Fit the law by least squares on the logarithm of the error, with a, b > 0 and c ≥ 0.

    Args:
        sizes: training samples of each run, of at least 4 different values.
        errors: its test error, in (0, 1].

    Intervals come from a bootstrap: errors around the fitted law, scattered by its residuals, are fitted again.

    Raises:
        UsageError: there are too few sizes, or values out of range.
        MissingExtraError: scipy is not installed.
    """
    try:
        from scipy.optimize import least_squares
        from scipy.stats import t as student
    except ImportError as error:
        raise MissingExtraError("fitting the power law needs scipy: pip install 'dynams-stream[plan]'") from error
    n, err = np.asarray(sizes, dtype=float), np.asarray(errors, dtype=float)
    if n.shape != err.shape or n.ndim != 1:
        raise UsageError(f"{n.size} sizes and {err.size} errors; one error for each size is needed")
    if not (np.all(n >= 1) and np.all((err > 0) & (err <= 1))):
        raise UsageError("sizes have to be 1 or more, and errors in (0, 1]; an error of 0 says nothing about the law")
    if len(np.unique(n)) < LEAST_SIZES:
        raise UsageError(
            f"{len(np.unique(n))} different sizes; the law has three parameters: give runs on {LEAST_SIZES} or more"
        )

    def fitted(points: Values, starts: Sequence[Values]) -> Values:
        def misfit(logarithms: Values) -> Values:
            return np.asarray(np.log(_law(_parameters(logarithms), n)) - np.log(points))

        fits = [least_squares(misfit, start, max_nfev=500) for start in starts]
        return _parameters(np.asarray(min(fits, key=lambda fit: float(fit.cost)).x))

    best = fitted(err, _starts(n, err))
    residuals = np.log(err) - np.log(_law(best, n))
    freedom = max(1, len(n) - 3)
    # As wide as Student's t says: few points that happen to lie near a curve of three parameters prove little.
    spread = residuals * np.sqrt(len(n) / freedom) * (student.ppf(0.95, freedom) / student.ppf(0.95, 1e9))
    generator = np.random.default_rng(_SEED)
    near = [np.log(np.maximum(best, 1e-6))]
    drawn = [_law(best, n) * np.exp(generator.choice(spread, len(n))) for _ in range(_RESAMPLES)]
    resampled = [fitted(points, near) for points in drawn]
    a, b, c = best.tolist()
    return PowerLaw(a, b, c, float(np.sqrt(np.sum(residuals**2) / freedom)), np.array(resampled))


def _law(parameters: Values, n: Values) -> Values:
    a, b, c = parameters
    return np.asarray(a * n ** (-b) + c)


def _parameters(logarithms: Values) -> Values:
    """a, b and c from their logarithms, which keeps them positive."""
    return np.asarray(np.exp(np.clip(logarithms, -60, 60)))


def _starts(n: Values, points: Values) -> list[Values]:
    """Where fits begin: with c at several shares of the smallest error, of which the best fit is kept."""
    slope = max(0.05, -float(np.polyfit(np.log(n), np.log(points), 1)[0]))
    floors = [share * float(points.min()) for share in (1e-3, 0.5, 0.95)]
    heights = [max(float(points.max()) - floor, 1e-9) * float(n.min()) ** slope for floor in floors]
    return [np.log([height, slope, floor]) for height, floor in zip(heights, floors, strict=True)]
