"""The joint objective with mpmath numbers of 60 digits: loops, and nothing clever.

Derivatives are central differences with a step of 1e-20: right to about 1e-36, relative.
"""

import mpmath
import torch

from attnreg.certificate.coordinates import Coordinates, Setting

DIGITS = 60
STEP = mpmath.mpf(10) ** -20


def matrix(tensor):
    return [[mpmath.mpf(float(entry)) for entry in row] for row in tensor]


def value(case, center, X, Y):
    """``L`` plus the ridges of a case of tests/twins.py; ``X`` and ``Y`` are lists of rows."""
    options = case.options
    scale = mpmath.mpf(options.get("scale") or 1.0)
    rho_x, rho_y = options.get("ridge_x", 0.0), options.get("ridge_y", 0.0)
    loss = mpmath.mpf(0)
    queries, keys, values = [], [], []
    for a1, a2, a3, b, w, bias in case.sequences:
        a1, a2, a3, b, bias = map(matrix, (a1, a2, a3, b, bias))
        queries += [(a, mpmath.mpf(float(u))) for a, u in zip(a1, w, strict=True)]
        keys += a2
        values += a3
        outputs = [product(v, Y) for v in a3]
        for a, target, u, row in zip(a1, b, w, bias, strict=True):
            q = product(a, X)
            z = [scale * dot(q, k) + c for k, c in zip(a2, row, strict=True)]
            e = [mpmath.exp(entry) for entry in z]
            mass = mpmath.fsum(e)
            for i, wanted in enumerate(target):
                got = mpmath.fsum(p * out[i] for p, out in zip(e, outputs, strict=True)) / mass
                loss += mpmath.mpf(float(u)) * (got - wanted) ** 2
    move_x = difference(X, center, "X")
    move_y = difference(Y, center, "Y")
    for a, u in queries:
        q = product(a, move_x)
        loss += rho_x * u * mpmath.fsum(dot(q, k) ** 2 for k in keys)
    loss += rho_y * mpmath.fsum(dot(o, o) for o in (product(v, move_y) for v in values))
    return loss


def gradient(case, center, parameters):
    """Gradients by ``X`` and ``Y`` as lists of rows."""
    X, Y = matrix(parameters["X"]), matrix(parameters["Y"])
    found = []
    for target in (X, Y):
        rows = []
        for row in target:
            slopes = []
            for i, entry in enumerate(row):
                row[i] = entry + STEP
                above = value(case, center, X, Y)
                row[i] = entry - STEP
                below = value(case, center, X, Y)
                row[i] = entry
                slopes.append((above - below) / (2 * STEP))
            rows.append(slopes)
        found.append(rows)
    return found


def pulled_back(left, rows, right=None):
    """``left^T rows right`` of float64 matrices and a list of rows."""
    right = torch.eye(len(rows[0]), dtype=torch.float64) if right is None else right
    left, right = matrix(left.mT), matrix(right)
    middle = [[dot(line, column) for column in zip(*rows, strict=True)] for line in left]
    return [product(line, right) for line in middle]


def whitened(case, center, parameters):
    """The setting, its coordinates and the exact gradient in them."""
    problem = case.problem(center=center)
    setting = Setting.of(problem, parameters)
    coordinates = Coordinates.of(setting, problem.dtype)
    g_x, g_y = gradient(case, center, parameters)
    x = pulled_back(coordinates.t1, g_x, coordinates.t2)
    return setting, coordinates, x, pulled_back(coordinates.t3, g_y)


def distance(rows, tensor):
    """Frobenius distance of a list of rows from a float64 matrix."""
    flat = zip([e for row in rows for e in row], tensor.flatten().tolist(), strict=True)
    return float(mpmath.sqrt(mpmath.fsum((a - mpmath.mpf(b)) ** 2 for a, b in flat)))


def dot(a, b):
    return mpmath.fsum(x * y for x, y in zip(a, b, strict=True))


def product(row, rows):
    return [dot(row, column) for column in zip(*rows, strict=True)]


def difference(rows, center, name):
    if center is None:
        return rows
    pairs = zip(rows, matrix(center[name]), strict=True)
    return [[a - b for a, b in zip(row, other, strict=True)] for row, other in pairs]
