"""From counts to certificates: exact binomial bounds, and the radius that a probability is worth.

Of `n` independent samples `hits` gave the class; `p` is the probability that one does.
"""

from __future__ import annotations

from scipy.special import betaincinv, ndtri


def lower_bound(hits: int, n: int, alpha: float) -> float:
    """Exact lower bound on p, above it with probability alpha at most (Clopper and Pearson 1934).

    The p at which so many hits or more have probability alpha, BetaInv(alpha; hits, n - hits + 1).

    >>> lower_bound(0, 10, 0.05), round(lower_bound(10, 10, 0.05), 4)  # the latter 0.05 ** (1 / 10)
    (0.0, 0.7411)
    """
    return float(betaincinv(hits, n - hits + 1, alpha)) if hits else 0.0


def upper_bound(hits: int, n: int, alpha: float) -> float:
    """Exact upper bound on p, below it with probability alpha at most.

    >>> upper_bound(10, 10, 0.05), round(upper_bound(0, 10, 0.05), 4)
    (1.0, 0.2589)
    """
    return 1 - lower_bound(n - hits, n, alpha)


def certified_radius(p: float, sigma: float) -> float:
    """sigma * Phi^-1(p) (Cohen et al., ICML 2019, theorem 1 with pB = 1 - pA); negative below 1/2.

    >>> round(certified_radius(0.975, 0.25), 4)
    0.49
    """
    return sigma * float(ndtri(p))
