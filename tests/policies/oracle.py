"""The method in plain loops over Python numbers, one row at a time: slow, and as the paper says it.

Letters as in the package: h heads, g query heads of a group, w window queries, t tokens, n scored tokens.
"""

import math
from fractions import Fraction

from torch import Tensor

Vector = list[float]
Matrix = list[Vector]

INFINITY = float("inf")


def window_attention(
    queries: Tensor, keys: Tensor, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> list[list[Matrix]]:
    """Queries (q, w, d), keys (h, t, d) of one row to importances [h][g][w][n]."""
    q, w, _ = queries.shape
    h, t, _ = keys.shape
    group = q // h
    result = []
    for head in range(h):
        rows_of_head = []
        for query_head in range(head * group, (head + 1) * group):
            rows = []
            for number in range(w):
                query = queries[query_head, number].tolist()
                logits = []
                for position in range(t - w + number + 1):
                    logit = _dot(query, keys[head, position].tolist()) * scaling
                    logits.append(logit if softcap is None else softcap * math.tanh(logit / softcap))
                extra = [] if sinks is None else [float(sinks[query_head])]
                top = max(logits + extra)
                total = sum(math.exp(logit - top) for logit in logits + extra)
                rows.append([math.exp(logit - top) / total for logit in logits[: t - w]])
            rows_of_head.append(rows)
        result.append(rows_of_head)
    return result


def mean_filter(row: Vector, kernel_size: int) -> Vector:
    reach = kernel_size // 2
    return [sum(row[max(0, i - reach) : i + reach + 1]) / kernel_size for i in range(len(row))]


def mean(importance: list[Matrix], kernel_size: int) -> Vector:
    """[g][w][n] of one head to [n]: the mean, then the filter."""
    return mean_filter(_mean_over_queries(importance), kernel_size)


def defensive(importance: list[Matrix], kernel_size: int) -> Vector:
    """[g][w][n] of one head to [n]: filter, rescale, worst case, floor at the mean."""
    rows = []
    for row in (row for rows_of_head in importance for row in rows_of_head):
        smooth = mean_filter(row, kernel_size)
        scale = sum(row) / sum(smooth) if sum(smooth) else 0.0
        rows.append([value * scale for value in smooth])
    worst = [max(column) for column in zip(*rows, strict=True)]
    prior = sum(worst) / len(worst)
    return [max(value, prior) for value in worst]


def value_norms(values: Tensor, projection: Tensor) -> Matrix:
    """Values (h, t, v), projection (hidden, q * v) to [h][t]."""
    h, t, v = values.shape
    group = projection.shape[1] // (h * v)
    norms = []
    for head in range(h):
        row = []
        for position in range(t):
            value = values[head, position].tolist()
            total = 0.0
            for query_head in range(head * group, (head + 1) * group):
                block = projection[:, query_head * v : (query_head + 1) * v].tolist()
                total += sum(abs(_dot(value, weights)) for weights in block)
            row.append(total / group)
        norms.append(row)
    return norms


def two_stage_value_norm(
    scores: Matrix, means: Matrix, norms: Matrix, share: Fraction, mass: float = 0.9
) -> tuple[Matrix, float]:
    """DefensiveKV's weighting, and how near the closest cumulative sum came to its threshold."""
    n, t = len(scores[0]), len(norms[0])
    window = t - n
    sums = [sum(row[position] for row in norms) for position in range(n)]
    weighted = [[row[i] * norms[head][i] / sums[i] for i in range(n)] for head, row in enumerate(scores)]
    top = max(max(row) for row in weighted)
    limit = max(0, math.floor(n * share - window))
    bias = sum(sum(row[max(0, n - window) :]) for row in means) / len(means)
    margin = INFINITY
    for head, row in enumerate(means):
        order = sorted(range(n), key=lambda i, row=row: -row[i])  # type: ignore[misc]
        cumulative = 0.0
        for pins, position in enumerate(order):
            cumulative += row[position] / sum(row)
            margin = min(margin, abs(cumulative - (mass - bias)))
            if cumulative >= mass - bias or pins == limit:
                break
            weighted[head][position] = top
    return weighted, margin


def two_stage_critical(scores: Matrix, norms: Matrix, share: Fraction) -> Matrix:
    """CriticalKV's weighting: half of the head's budget by score, the window counted, the rest by the product."""
    n, t = len(scores[0]), len(norms[0])
    count = max(0, math.floor(t * share / 2) - (t - n))
    result = []
    for head, row in enumerate(scores):
        first = set(sorted(range(n), key=lambda i, row=row: -row[i])[:count])  # type: ignore[misc]
        result.append([INFINITY if i in first else (row[i] + 1e-4) * norms[head][i] for i in range(n)])
    return result


def highest(scores: Vector, count: int) -> set[int]:
    """Indices of the `count` highest, the first of equals."""
    return set(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def per_head(layers: list[Matrix], share: Fraction) -> list[list[set[int]]]:
    return [[highest(row, math.floor(len(row) * share)) for row in layer] for layer in layers]


def per_layer(layers: list[Matrix], share: Fraction, safeguard: Fraction) -> list[list[set[int]]]:
    result = []
    for layer in layers:
        t = len(layer[0])
        safe = [highest(row, math.floor(math.floor(t * share) * safeguard)) for row in layer]
        rest = [(-row[i], head, i) for head, row in enumerate(layer) for i in range(t) if i not in safe[head]]
        missing = math.floor(t * share * len(layer)) - sum(map(len, safe))
        for _, head, position in sorted(rest)[:missing]:
            safe[head].add(position)
        result.append(safe)
    return result


def across_layers(layers: list[Matrix], share: Fraction) -> list[list[set[int]]]:
    flat = [value for layer in layers for row in layer for value in row]
    chosen = highest(flat, math.floor(len(flat) * share))
    kept, start = [], 0
    for layer in layers:
        sets = []
        for row in layer:
            sets.append({index - start for index in chosen if start <= index < start + len(row)})
            start += len(row)
        kept.append(sets)
    return kept


def _mean_over_queries(importance: list[Matrix]) -> Vector:
    rows = [row for rows_of_head in importance for row in rows_of_head]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
