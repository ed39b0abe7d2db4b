"""From counts to certificates: exact binomial bounds, and the radius that follows from them.

`hits` of `n` independent samples had the class; `p` is the probability that a sample has it.
"""

from __future__ import annotations

from math import exp, inf, log, log1p, nextafter

from scipy.special import betainc, betaincinv, betaln, ndtr, ndtri

from prunekit_smoothing import SURE


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


def log_evidence(hits: int, n: int, p: float) -> float:
    """Log of the evidence that samples hit with a probability above p, which is in (0, 1).

    The likelihood of the hits, averaged over probabilities above p (1 with the weight `SURE`,
    others alike), over that at p. If hits are no more probable than p, it never reaches
    log(1 / alpha), at whatever n one looks, but with probability alpha (Ville's inequality;
    Robbins 1970). Where no more than p n hit, -inf, which is less.

    >>> round(log_evidence(10, 10, 0.5), 3)  # 0.7 * 2^10 + 0.3 * 2 (2^10 - 0.5) / 11
    6.65
    """
    missed = n - hits
    if hits <= p * n:
        return -inf
    at = hits * log(p) + missed * log1p(-p)
    mass = float(betainc(missed + 1, hits + 1, 1 - p))
    others = log((1 - SURE) * mass / (1 - p)) + float(betaln(hits + 1, missed + 1)) - at
    if missed:
        return others
    sure = log(SURE) - at
    return max(sure, others) + log1p(exp(-abs(sure - others)))


def needed(radius: float, sigma: float) -> float:
    """The least bound on p that certifies a radius: Phi(radius / sigma), rounded upwards.

    >>> needed(0.0, 0.25)
    0.5
    """
    p = float(ndtr(radius / sigma))
    while certified_radius(p, sigma) < radius:
        p = nextafter(p, 1)
    return p


def certified_radius(p: float, sigma: float) -> float:
    """The certified L2 radius sigma * Phi^-1(p) in pixel units; negative for p < 1/2.

    Source: Cohen et al., ICML 2019, theorem 1 with pB = 1 - pA.

    >>> round(certified_radius(0.975, 0.25), 4)
    0.49
    """
    return sigma * float(ndtri(p))
