"""Writes `golden_current.json`: what the head, the loss and scores must be.

    python make_golden.py [FOLDER]

It knows the formulas and nothing of the package: decimal arithmetic with sixty
digits, one number after the other, and slopes from differences with a step of
1e-20. Each figure is rounded once, when it is written, so that every computer
writes the same file. `golden.json` has numbers of the published method.
"""

import decimal
import json
import pathlib
import random
import sys
from decimal import Decimal

decimal.getcontext().prec = 60
decimal.getcontext().Emin = decimal.MIN_EMIN
decimal.getcontext().Emax = decimal.MAX_EMAX

STEP = Decimal("1e-20")
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
FLOOR = Decimal("1e-3")
ONE, HALF = Decimal(1), Decimal("0.5")

CASES = [
    # Classes, dimensions, label smoothing, distilled, soft labels, raw gamma,
    # bias at the origin, bias far out, scale of what is far out.
    (2, 2, "0.125", True, False, 10, -2, -3, 1),
    (2, 16, "0", False, True, -2, 1, "-0.25", "1.5"),
    (3, 2, "0.25", False, False, 2, -4, -6, "0.5"),
    (3, 16, "0.125", True, True, 18, 3, -12, "0.75"),
    (10, 2, "0.125", False, True, 40, -1, -30, 2),
    (10, 16, "0.25", True, False, 17, 5, -10, 1),
]


def softplus(value):
    return (ONE + value.exp()).ln()


def log_sum_exp(values):
    top = max(values)
    return top + sum((value - top).exp() for value in values).ln()


def mean_square(vector):
    return sum(v * v for v in vector) / len(vector)


def squared_distance(first, second):
    return mean_square([a - b for a, b in zip(first, second, strict=True)])


def centered(centroids):
    mean = [
        sum(column) / len(centroids) for column in zip(*centroids, strict=True)
    ]
    return [
        [v - m for v, m in zip(row, mean, strict=True)] for row in centroids
    ]


def floored_log(value):
    if value >= FLOOR:
        return value.ln()
    return FLOOR.ln() + (value - FLOOR) / FLOOR


def radial(squared_radius, dim):
    volume = HALF - ONE / dim
    return squared_radius / 2 - volume * floored_log(squared_radius)


class Head:
    """Everything about one embedding, from its distances to centroids."""

    def __init__(self, x, centroids, raw_gamma):
        self.dim = len(x)
        self.gamma = softplus(raw_gamma)
        self.radii = [squared_distance(x, c) for c in centered(centroids)]
        self.squared_norm = mean_square(x)
        shift = self.gamma * self.squared_norm
        self.logits = [shift - self.gamma * r for r in self.radii]

    def abstain_logit(self, bias, far_bias=None, far_scale=None):
        if far_bias is None:
            return bias
        top = max(self.logits)
        far = self.gamma * self.squared_norm / 2 + far_bias
        return log_sum_exp([bias, top + far_scale * (far - top)])


def margin(num_classes, dim, smoothing):
    """The bias against which the loss trains a head with a far background."""
    shell = ONE - Decimal(2) / dim
    high, low = Decimal("0.99"), Decimal("0.01") / num_classes
    if smoothing:
        low = smoothing / num_classes
        high = ONE - smoothing + low
    return 20 / (2 - shell) * (1 - shell) - (high / low).ln()


def targets(head, labels, smoothing, distill):
    num_classes = len(labels)
    if not smoothing:
        return labels
    if not distill:
        return [(1 - smoothing) * y + smoothing / num_classes for y in labels]
    mixture = [Decimal(0)] * num_classes
    for own, share in enumerate(labels):
        masses = [(-head.gamma * r / smoothing).exp() for r in head.radii]
        masses[own] = ONE
        for k, mass in enumerate(masses):
            mixture[k] += share * mass / sum(masses)
    return mixture


def loss(head, soft, labels, bias):
    total = log_sum_exp([*head.logits, bias])
    cross_entropy = sum(
        q * (total - s) for q, s in zip(soft, head.logits, strict=True)
    )
    return cross_entropy + sum(
        y * radial(r, head.dim)
        for y, r in zip(labels, head.radii, strict=True)
        if y
    )


def negative_log_erfc(x):
    if x < 8:
        with decimal.localcontext() as context:
            context.prec = 120
            term, total, n = x, x, 0
            while abs(term) > Decimal("1e-110") and term:
                n += 1
                term *= -x * x / n
                total += term / (2 * n + 1)
            return -(ONE - 2 * total / PI.sqrt()).ln()
    fraction = Decimal(0)
    for n in range(300, 0, -1):
        fraction = Decimal(n) / 2 / (x + fraction)
    return x * x + ((x + fraction) * PI.sqrt()).ln()


def radial_tail(squared_radius, dim):
    """The closed form that stands in the docstring of the score."""
    delta = squared_radius - 1
    excess = delta - floored_log(squared_radius)
    rho = (2 * excess).sqrt() / abs(delta)
    w = delta * (Decimal(dim) / 2).sqrt() * rho
    return negative_log_erfc(abs(w - rho.ln() / w) / Decimal(2).sqrt())


def all_scores(head, abstain_logit):
    logits, dim, gamma = head.logits, head.dim, head.gamma
    total = log_sum_exp(logits)
    best = max(logits)
    others = list(logits)
    others.remove(best)
    nearest = min(head.radii)
    mean = sum(logits) / len(logits)
    # There is no direction at the origin.
    length = head.squared_norm.sqrt()
    gap = -(best - mean) / (gamma * length) if length else None
    entropy = Decimal(0)
    for k, logit in enumerate(logits):
        rest = log_sum_exp(logits[:k] + logits[k + 1 :])
        entropy += ((logit + rest - 2 * total) / 10).exp()
    log_total = log_sum_exp([*logits, abstain_logit])
    return {
        "abstain": abstain_logit - total,
        "gap": gap,
        "gen": entropy,
        "max_logit": -best,
        "logit_gap": sum(others) / len(others) - best,
        "joint": log_total
        - total
        + dim * min(radial(r, dim) for r in head.radii),
        "radius": radial_tail(nearest, dim),
        "energy": -log_sum_exp([-gamma * r for r in head.radii]),
        "max_probability": log_total - best,
        "nearest": nearest,
    }


def vector(rng, dim, scale=1):
    """Multiples of 1/64, which float32 holds exactly."""
    return [Decimal(rng.randint(-96, 96)) * scale / 64 for _ in range(dim)]


def slopes(function, values):
    """Central differences of a function of a list of numbers."""
    found = []
    for i, value in enumerate(values):
        up, down = (
            function([*values[:i], value + step, *values[i + 1 :]])
            for step in (STEP, -STEP)
        )
        found.append((up - down) / (2 * STEP))
    return found


def rows(values, width):
    return [values[i : i + width] for i in range(0, len(values), width)]


def flat(matrix):
    return [value for row in matrix for value in row]


def make_case(
    seed, num_classes, dim, smoothing, distill, soft, raw, bias, far, scale
):
    rng = random.Random(seed)
    smoothing, raw, bias, far, scale = (
        Decimal(v) for v in (smoothing, raw, bias, far, scale)
    )
    # Their mean is the offset, and what is left of each is exact.
    centroids = [vector(rng, dim) for _ in range(num_classes - 1)]
    centroids.append([-sum(column) for column in zip(*centroids, strict=True)])
    members = centroids[:2]
    offset = vector(rng, dim)
    centroids = [
        [v + o for v, o in zip(row, offset, strict=True)] for row in centroids
    ]
    embeddings = [
        [v + e / 2 for v, e in zip(members[0], vector(rng, dim), strict=True)],
        [v + e / 2 for v, e in zip(members[1], vector(rng, dim), strict=True)],
        [(a + b) / 2 for a, b in zip(*members, strict=True)],
        members[0],
        [Decimal(0)] * dim,
        vector(rng, dim, 8),
    ]
    extremes = [
        vector(rng, dim, Decimal(1) / 128),
        [256 * v for v in members[1]],
        vector(rng, dim, 4096),
    ]
    labels = []
    for i in range(len(embeddings)):
        label = [Decimal(0)] * num_classes
        label[i % 2 if i < 2 else 0] = ONE
        if soft:
            label = [y * Decimal("0.75") for y in label]
            label[-1] += Decimal("0.25")
        labels.append(label)

    training_bias = margin(num_classes, dim, smoothing)
    heads = [Head(x, centroids, raw) for x in embeddings]
    soft_targets = [
        targets(head, y, smoothing, distill)
        for head, y in zip(heads, labels, strict=True)
    ]

    # Targets are constants of the gradient.
    def loss_of(i, x, centroids, raw):
        head = Head(x, centroids, raw)
        return loss(head, soft_targets[i], labels[i], training_bias)

    def mean_loss(centroids, raw):
        return sum(
            loss_of(i, x, centroids, raw) for i, x in enumerate(embeddings)
        ) / len(embeddings)

    outputs = [*heads, *(Head(x, centroids, raw) for x in extremes)]
    case = {
        "num_classes": num_classes,
        "embedding_dim": dim,
        "label_smoothing": smoothing,
        "distill": distill,
        "raw_gamma": raw,
        "bias": bias,
        "far_bias": far,
        "far_scale": scale,
        "centroids": centroids,
        "embeddings": embeddings,
        "extremes": extremes,
        "labels": labels,
        "gamma": heads[0].gamma,
        "far_radius": max(-far / heads[0].gamma, FLOOR),
        "training_bias": training_bias,
        "logits": [head.logits for head in outputs],
        "squared_norm": [head.squared_norm for head in outputs],
        "squared_radii": [head.radii for head in outputs],
        "targets": soft_targets,
        "loss": [
            loss_of(i, x, centroids, raw) for i, x in enumerate(embeddings)
        ],
        "gradient_of_embeddings": [
            [
                slope / len(embeddings)
                for slope in slopes(
                    lambda x, i=i: loss_of(i, x, centroids, raw), x
                )
            ]
            for i, x in enumerate(embeddings)
        ],
        "gradient_of_centroids": rows(
            slopes(lambda c: mean_loss(rows(c, dim), raw), flat(centroids)), dim
        ),
        "gradient_of_raw_gamma": slopes(
            lambda r: mean_loss(centroids, r[0]), [raw]
        )[0],
    }
    for name, far_background in (("near", ()), ("far", (far, scale))):
        abstain = [
            head.abstain_logit(bias, *far_background) for head in outputs
        ]
        case[f"{name}_abstain_logit"] = abstain
        scores = [
            all_scores(head, a)
            for head, a in zip(outputs, abstain, strict=True)
        ]
        case[f"{name}_scores"] = {
            method: [row[method] for row in scores] for method in scores[0]
        }
    return case


def main(folder):
    cases = [make_case(seed, *case) for seed, case in enumerate(CASES)]
    lines = [
        ",\n".join(
            f"{json.dumps(key)}: {json.dumps(value, default=float)}"
            for key, value in case.items()
        )
        for case in cases
    ]
    text = '{"cases": [{\n' + "\n}, {\n".join(lines) + "\n}]}\n"
    (pathlib.Path(folder) / "golden_current.json").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:] or [pathlib.Path(__file__).parent])
