"""Loops over kept weights, compiled by numba, for activations whose images lie innermost.

An activation is a flat float32 array of [C][H][W][N]. Every inner loop runs over contiguous images,
or over a row of pixels times images, which the compiler turns into vector instructions. Sums may be
reordered and contracted; NaN and infinity are kept, as without `nnan` and `ninf` they must be.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

compiled: Any = njit(
    nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, error_model="numpy"
)

ZERO = np.float32(0)


@compiled
def convolve(x, y, ptr, places, values, shifts, bias, residual, relu, sizes, begin, end):
    """y[o, sy*i+py, sy*j+qy] = sum over kept (c, dh, dw) of v * x[c, sx*i+dh, sx*j+dw].

    `sizes` is (H, W, M, P, Q, N, columns, sx, sy, py, qy, span): x is (C, H, W, N), y (M, P, Q, N),
    and j < columns. An entry's `places` is (c*H + dh)*W. Entries are ordered by o, dw and dh; those
    with shift number k, (dw, dh) = shifts[k], are ptr[o * K + k] to ptr[o * K + k + 1], as numbers
    in `values` by `entries`. Starts from bias[o], adds `residual` if it is not empty, and ends with
    max(0, .) if `relu`. Computes rows i from `begin` to `end`, `span` columns at a time, so that
    what is read of x stays in the cache.
    """
    H, W, M, P, Q, N, columns, sx, sy, py, qy, span = sizes
    K = len(shifts)
    for i in range(begin, end):
        for a in range(0, columns, span):
            b = min(a + span, columns)
            for o in range(M):
                base = ((o * P + sy * i + py) * Q + qy) * N
                start = bias[o]
                if sy == 1:
                    out = y[base + a * N : base + b * N]
                    for n in range(len(out)):
                        out[n] = start
                else:
                    for j in range(a, b):
                        out = y[base + sy * j * N : base + sy * j * N + N]
                        for n in range(N):
                            out[n] = start
                k = 0
                while k < K:
                    dw = shifts[k, 0]
                    first = k
                    while k < K and shifts[k, 0] == dw:
                        k += 1
                    lowest, highest = first, k
                    while lowest < k and sx * i + shifts[lowest, 1] < 0:
                        lowest += 1
                    while highest > lowest and sx * i + shifts[highest - 1, 1] >= H:
                        highest -= 1
                    p, q = ptr[o * K + lowest], ptr[o * K + highest]
                    # Columns with 0 <= sx * j + dw < W.
                    left = max(a, -(dw // sx))
                    right = min(b, (W - 1 - dw) // sx + 1)
                    if p >= q or left >= right:
                        continue
                    at = sx * i * W + sx * left + dw
                    if sx == 1 and sy == 1:
                        length = (right - left) * N
                        out = y[base + left * N : base + left * N + length]
                        while p + 4 <= q:
                            v0, v1 = values[p], values[p + 1]
                            v2, v3 = values[p + 2], values[p + 3]
                            o0, o1 = (places[p] + at) * N, (places[p + 1] + at) * N
                            o2, o3 = (places[p + 2] + at) * N, (places[p + 3] + at) * N
                            x0, x1 = x[o0 : o0 + length], x[o1 : o1 + length]
                            x2, x3 = x[o2 : o2 + length], x[o3 : o3 + length]
                            for n in range(length):
                                out[n] += v0 * x0[n] + v1 * x1[n] + v2 * x2[n] + v3 * x3[n]
                            p += 4
                        while p < q:
                            v0 = values[p]
                            o0 = (places[p] + at) * N
                            x0 = x[o0 : o0 + length]
                            for n in range(length):
                                out[n] += v0 * x0[n]
                            p += 1
                    else:
                        while p < q:
                            v0 = values[p]
                            o0 = (places[p] + at) * N
                            for j in range(left, right):
                                out = y[base + sy * j * N : base + sy * j * N + N]
                                x0 = x[o0 : o0 + N]
                                for n in range(N):
                                    out[n] += v0 * x0[n]
                                o0 += sx * N
                            p += 1
                if sy == 1 and (len(residual) or relu):
                    out = y[base + a * N : base + b * N]
                    if len(residual):
                        other = residual[base + a * N : base + b * N]
                        for n in range(len(out)):
                            out[n] += other[n]
                    if relu:
                        for n in range(len(out)):
                            out[n] = ZERO if out[n] < ZERO else out[n]


@compiled
def correlate(x, dy, gradient, ptr, places, shifts, sizes, begin, end):
    """gradient[e] = sum over i, j, n of dy[o, i, j, n] * x[c, s*i+dh, s*j+dw, n], for each entry e.

    Arguments as in `convolve`, `sizes` is (H, W, M, P, Q, N, s); output channels from `begin` to
    `end`.
    """
    H, W, _, P, Q, N, s = sizes
    K = len(shifts)
    for o in range(begin, end):
        gradient[ptr[o * K] : ptr[o * K + K]] = ZERO
    for i in range(P):
        for o in range(begin, end):
            base = (o * P + i) * Q * N
            k = 0
            while k < K:
                dw = shifts[k, 0]
                first = k
                while k < K and shifts[k, 0] == dw:
                    k += 1
                lowest, highest = first, k
                while lowest < k and s * i + shifts[lowest, 1] < 0:
                    lowest += 1
                while highest > lowest and s * i + shifts[highest - 1, 1] >= H:
                    highest -= 1
                p, q = ptr[o * K + lowest], ptr[o * K + highest]
                left = max(0, -(dw // s))
                right = min(Q, (W - 1 - dw) // s + 1)
                if p >= q or left >= right:
                    continue
                at = s * i * W + s * left + dw
                if s == 1:
                    length = (right - left) * N
                    out = dy[base + left * N : base + left * N + length]
                    while p + 4 <= q:
                        o0, o1 = (places[p] + at) * N, (places[p + 1] + at) * N
                        o2, o3 = (places[p + 2] + at) * N, (places[p + 3] + at) * N
                        x0, x1 = x[o0 : o0 + length], x[o1 : o1 + length]
                        x2, x3 = x[o2 : o2 + length], x[o3 : o3 + length]
                        s0 = s1 = s2 = s3 = ZERO
                        for n in range(length):
                            d = out[n]
                            s0 += d * x0[n]
                            s1 += d * x1[n]
                            s2 += d * x2[n]
                            s3 += d * x3[n]
                        gradient[p] += s0
                        gradient[p + 1] += s1
                        gradient[p + 2] += s2
                        gradient[p + 3] += s3
                        p += 4
                    while p < q:
                        o0 = (places[p] + at) * N
                        x0 = x[o0 : o0 + length]
                        s0 = ZERO
                        for n in range(length):
                            s0 += out[n] * x0[n]
                        gradient[p] += s0
                        p += 1
                else:
                    while p < q:
                        o0 = (places[p] + at) * N
                        total = ZERO
                        for j in range(left, right):
                            out = dy[base + j * N : base + j * N + N]
                            x0 = x[o0 : o0 + N]
                            s0 = ZERO
                            for n in range(N):
                                s0 += out[n] * x0[n]
                            total += s0
                            o0 += s * N
                        gradient[p] += total
                        p += 1


@compiled
def sort_entries(positions, channels, ranks, K, forward, ptr, order):
    """Order flat `positions` of a weight (M, channels, taps) by their output and their shift.

    `ranks` (taps,) numbers the shift of each tap among K, or is -1 where it is left out. The output
    is o, or if not `forward` c. `order` gets the numbers of the positions in that order, `ptr`
    (outputs * K + 1,) where those of each output and shift begin. Returns how many there are.
    """
    taps = len(ranks)
    for position in positions:
        rank = ranks[position % taps]
        if rank >= 0:
            row = position // taps
            output = row // channels if forward else row % channels
            ptr[output * K + rank + 1] += 1
    for k in range(1, len(ptr)):
        ptr[k] += ptr[k - 1]
    filled = ptr[:-1].copy()
    for number in range(len(positions)):
        rank = ranks[positions[number] % taps]
        if rank >= 0:
            row = positions[number] // taps
            k = (row // channels if forward else row % channels) * K + rank
            order[filled[k]] = number
            filled[k] += 1
    return ptr[-1]
