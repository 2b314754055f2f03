"""How first-order scores answer to cheaper ones: a rising curve fitted on a few candidates."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize_scalar

FEWEST = 8
LEAST_CORRELATION = 0.5
# ``k`` times the largest |x| is looked for up to here: there the curve is almost a step.
MOST_BENT = 100.0


@dataclass(frozen=True)
class Response:
    """``y = a + b x / (1 + k |x|)`` with ``b > 0`` and ``k >= 0``: rising, and flatter far out.

    An optimizer that saturates (AdamW) answers large gradients with less than its line. As the
    curve rises it leaves ranks as they are; it mends sizes, signs and the mean.
    """

    a: float = 0.0
    b: float = 1.0
    k: float = 0.0

    def __call__(self, x: float) -> float:
        return self.a + self.b * x / (1 + self.k * abs(x))


def fit_response(x: Float[np.ndarray, " pilots"], y: Float[np.ndarray, " pilots"]) -> Response:
    """Least squares: ``a`` and ``b`` in closed form, ``k`` by a search in one dimension.

    Args:
        x: the cheaper scores.
        y: those that they are held to. Pairs with a number that is not finite are left out; below
            8 pairs, or a correlation of 0.5, nothing is fitted: ``y = x``.
    """
    fine = np.isfinite(x) & np.isfinite(y)
    x, y = x[fine].astype(np.float64), y[fine].astype(np.float64)
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Response()
    size, height = float(np.abs(x).max()), float(np.abs(y).max())
    z, target = x / size, y / height
    if np.corrcoef(z, target)[0, 1] < LEAST_CORRELATION:
        return Response()

    def line(bend: float) -> tuple[float, float, float]:
        """``a``, ``b`` and the squared error at ``k = bend / size``."""
        bent = z / (1 + bend * np.abs(z))
        columns = np.stack([np.ones_like(bent), bent], axis=1)
        found = np.linalg.lstsq(columns, target, rcond=None)[0]
        return float(found[0]), float(found[1]), float(np.sum((columns @ found - target) ** 2))

    # On a grid first: the error may have several valleys.
    grid = np.array([0.0, *np.geomspace(0.01, MOST_BENT, 25)])
    best = int(np.argmin([line(bend)[2] for bend in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    search = minimize_scalar(
        lambda bend: line(bend)[2], bounds=(low, high), method="bounded", options={"xatol": 1e-9}
    )
    bend = min((0.0, float(grid[best]), float(search.x)), key=lambda bend: line(bend)[2])
    a, b, _ = line(bend)
    return Response(height * a, height * b / size, bend / size) if b > 0 else Response()
