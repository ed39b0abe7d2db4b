"""Loops over whole activations: what comes between convolutions. See `loops`."""

from __future__ import annotations

import numpy as np

from prunekit_sparse.loops import ZERO, compiled


@compiled
def clip_gradient(dy, y, out, begin, end):
    """out = dy where y > 0, and 0 elsewhere: the gradient through a ReLU whose output is y."""
    up, own, to = dy[begin:end], y[begin:end], out[begin:end]
    for n in range(len(to)):
        to[n] = up[n] if own[n] > ZERO else ZERO


@compiled
def normalize(x, y, gamma, beta, residual, relu, mean, inverse, variance, size, eps, begin, end):
    """Batch normalization of channels `begin` to `end` of x (C, size) with statistics of its own.

    Fills mean, 1 / sqrt(variance + eps) and the biased variance of each channel; y adds `residual`
    if it is not empty, and is max(0, .) if `relu`.
    """
    for c in range(begin, end):
        own = x[c * size : c * size + size]
        out = y[c * size : c * size + size]
        total = 0.0
        for a in range(0, size, 4096):
            part, some = ZERO, own[a : a + 4096]
            for n in range(len(some)):
                part += some[n]
            total += part
        middle = np.float32(total / size)
        total = 0.0
        for a in range(0, size, 4096):
            part, some = ZERO, own[a : a + 4096]
            for n in range(len(some)):
                part += (some[n] - middle) * (some[n] - middle)
            total += part
        mean[c], variance[c] = middle, np.float32(total / size)
        inverse[c] = np.float32(1 / np.sqrt(total / size + eps))
        factor = inverse[c] * gamma[c]
        shift = beta[c] - middle * factor
        if len(residual):
            other = residual[c * size : c * size + size]
            for n in range(size):
                out[n] = own[n] * factor + shift + other[n]
        else:
            for n in range(size):
                out[n] = own[n] * factor + shift
        if relu:
            for n in range(size):
                out[n] = ZERO if out[n] < ZERO else out[n]


@compiled
def normalize_backward(x, dz, dx, gamma, mean, inverse, dgamma, dbeta, size, begin, end):
    """The gradient of `normalize` at x, gamma and beta from that behind ReLU and residual, dz."""
    for c in range(begin, end):
        own = x[c * size : c * size + size]
        up = dz[c * size : c * size + size]
        out = dx[c * size : c * size + size]
        m, s = mean[c], inverse[c]
        total, along = 0.0, 0.0
        for a in range(0, size, 4096):
            part, other = ZERO, ZERO
            some, over = own[a : a + 4096], up[a : a + 4096]
            for n in range(len(some)):
                part += over[n]
                other += over[n] * (some[n] - m)
            total += part
            along += other
        along *= s
        dgamma[c], dbeta[c] = np.float32(along), np.float32(total)
        factor = gamma[c] * s
        level = np.float32(total / size)
        slope = np.float32(along / size) * s
        for n in range(size):
            out[n] = factor * (up[n] - level - (own[n] - m) * slope)


@compiled
def pool(x, y, chosen, sizes, begin, end):
    """Max pooling of channels `begin` to `end`; `chosen` is the tap that is largest, the first of
    equal ones, as in torch. `sizes` is (H, W, P, Q, N, k, s, p)."""
    H, W, P, Q, N, k, s, p = sizes
    for c in range(begin, end):
        for i in range(P):
            for j in range(Q):
                at = ((c * P + i) * Q + j) * N
                out, which = y[at : at + N], chosen[at : at + N]
                fresh = True
                for t in range(k * k):
                    h, w = i * s - p + t // k, j * s - p + t % k
                    if h < 0 or w < 0 or h >= H or w >= W:
                        continue
                    base = ((c * H + h) * W + w) * N
                    own = x[base : base + N]
                    if fresh:
                        for n in range(N):
                            out[n] = own[n]
                            which[n] = t
                        fresh = False
                    else:
                        for n in range(N):
                            better = own[n] > out[n] or own[n] != own[n]
                            out[n] = own[n] if better else out[n]
                            which[n] = t if better else which[n]


@compiled
def pool_backward(dy, chosen, dx, sizes, begin, end):
    """The gradient of `pool` at x; `dx` starts as zeros."""
    H, W, P, Q, N, k, s, p = sizes
    for c in range(begin, end):
        for i in range(P):
            for j in range(Q):
                at = ((c * P + i) * Q + j) * N
                up, which = dy[at : at + N], chosen[at : at + N]
                for t in range(k * k):
                    h, w = i * s - p + t // k, j * s - p + t % k
                    if h < 0 or w < 0 or h >= H or w >= W:
                        continue
                    base = ((c * H + h) * W + w) * N
                    own = dx[base : base + N]
                    for n in range(N):
                        own[n] += up[n] if which[n] == t else ZERO


@compiled
def turn(x, y, rows, columns, begin, end):
    """y (columns, rows) = x (rows, columns) transposed, its rows from `begin` to `end`. Reads whole
    lines of the cache: x's rows are often a power of two apart, so that few of them fit at once."""
    for a in range(begin, end, 64):
        b = min(a + 64, end)
        for i in range(rows):
            own, to = x[i * columns + a : i * columns + b], y[a * rows + i :]
            for j in range(b - a):
                to[j * rows] = own[j]
