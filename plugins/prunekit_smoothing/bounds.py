"""From counts to certificates: exact binomial bounds, and the radius that follows from them.

`hits` of `n` independent samples had the class; `p` is the probability that a sample has it.
"""

from __future__ import annotations

from scipy.special import betaincinv, ndtri


def lower_bound(hits: int, n: int, alpha: float) -> float:
    """Exact lower bound on p, wrong with probability at most alpha (Clopper and Pearson 1934).

    It is the p for which `hits` or more hits have probability alpha, BetaInv(alpha; hits, n - hits
    + 1).

    >>> lower_bound(0, 10, 0.05), round(lower_bound(10, 10, 0.05), 4)  # the latter 0.05 ** (1 / 10)
    (0.0, 0.7411)
    """
    return float(betaincinv(hits, n - hits + 1, alpha)) if hits else 0.0


def upper_bound(hits: int, n: int, alpha: float) -> float:
    """Exact upper bound on p, wrong with probability at most alpha.

    >>> upper_bound(10, 10, 0.05), round(upper_bound(0, 10, 0.05), 4)
    (1.0, 0.2589)
    """
    return 1 - lower_bound(n - hits, n, alpha)


def certified_radius(p: float, sigma: float) -> float:
    """The certified L2 radius sigma * Phi^-1(p) in pixel units; negative for p < 1/2.

    Source: Cohen et al., ICML 2019, theorem 1 with pB = 1 - pA.

    >>> round(certified_radius(0.975, 0.25), 4)
    0.49
    """
    return sigma * float(ndtri(p))
