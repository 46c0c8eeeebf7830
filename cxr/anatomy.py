"""The chest that the phantom exposes: paths of the beam through soft tissue, air, bone and lesions.

Nothing is painted. Each organ is the length that a ray runs through it: overlaps add up as on a film, a rib that turns
along the beam becomes bright, and a lesion, which puts fluid where air was, wipes out the silhouettes that it touches.
Lengths are in image widths; x runs from the middle to the image's right (the patient's left), y from the top down.
"""

import math
from types import SimpleNamespace

import cv2
import numpy as np

AIR = 0.74  # share of a path's attenuation that is missing where the path runs through lung
EVERYONE = {
    "apex_x": (0.105, 0.125), "gap": (0.0, 0.04), "sulcus": (0.08, 0.13), "bone": (0.8, 1.2), "spine": (-0.012, 0.012),
    "deep": (0.9, 1.1), "drop": (0.9, 1.2), "bubble": (-0.05, 0.10), "thymus": (-0.03, 0.02),
}  # fmt: skip
CHILD = {
    "wide": (0.29, 0.335), "apex": (0.15, 0.20), "dome": (0.70, 0.76), "heart": (0.82, 1.05), "tilt": (0.5, 0.9),
    "pitch": (0.059, 0.067), "rib": (0.0115, 0.0145), "lift": (0.05, 0.10), "arms": (-1.25, -0.35),
    "jaw": (-0.18, 0.06), "top": (0.044, 0.056), "fat": (0.01, 0.045),
}  # fmt: skip
ADULT = {
    "wide": (0.345, 0.39), "apex": (0.09, 0.14), "dome": (0.73, 0.80), "heart": (0.78, 1.0), "tilt": (0.6, 1.0),
    "pitch": (0.060, 0.068), "rib": (0.0100, 0.0120), "lift": (0.01, 0.05), "arms": (0.7, 1.3), "jaw": (-0.3, -0.2),
    "top": (0.042, 0.052), "fat": (0.03, 0.07),
}  # fmt: skip


def chest(rng, kind, n, patient, severity):
    """Return the attenuation (0 to about 4), the lung field (0 or 1) and the lesion's extent [0, 1].

    All are float32 `(n, n)`. `rng` draws what changes between films (breath, bowel gas); `patient`, a seed, fixes the
    anatomy and the place of the lesion; `kind` and `severity` are those of `phantom.render`.
    """
    a, breath = _anatomy(patient, kind == "covid"), rng.normal(0, 0.015)
    grid = (np.arange(n, dtype=np.float32) + 0.5) / n
    x, y, half = grid[None] - 0.5, grid[:, None], (np.arange(n // 2, dtype=np.float32)[:, None] + 0.5) / (n // 2)
    body, heart = (cv2.resize(p, (n, n)) for p in (_body(a, half.T - 0.5, half), _heart(a, half.T - 0.5, half, breath)))
    lung, field = _lungs(a, x, y, breath)
    vessels = _tree(a, n, breath)
    fill, extent = _lesion(a, kind, n, x, y, severity, vessels)
    air = lung * np.maximum(1 - heart, 0) * (1 - fill)
    soft = body - AIR * air + 1.7 * sum(vessels) * np.clip(air / 0.3, 0, 1) - 0.7 * _airways(a, n)
    soft *= 1 + 0.03 * _noise(rng, n, 7) + 0.015 * _noise(rng, n, 40)
    gas = 1.2 - ((x - a.spine - 0.12) / 0.12) ** 2 - ((y - a.dome - 0.12) / 0.06) ** 2 + 0.9 * _noise(rng, n, 10)
    soft -= max(a.bubble, 0) * _step(gas) * _step((y - a.dome - a.gap - breath - 0.025) / 0.02)
    path = 5.0 * np.where(body > 0.01, np.maximum(soft, 0) + _bones(a, n, breath) + _spine(a, x, y), 0)
    return path.astype(np.float32), np.float32(field & (heart < 0.75)), extent.astype(np.float32)


def _noise(rng, n, cells):
    """Smooth random field `(n, n)`, about zero mean and unit spread, `cells` bumps across."""
    return cv2.resize(rng.standard_normal((cells, cells), dtype=np.float32), (n, n), interpolation=cv2.INTER_CUBIC)


def _step(x):
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _ellipsoid(x, y, cx, cy, rx, ry, tilt=0.0):
    """Path through an ellipsoid, 1 along its axis."""
    c, s, x, y = math.cos(tilt), math.sin(tilt), x - cx, y - cy
    return np.sqrt(np.maximum(1 - ((x * c + y * s) / rx) ** 2 - ((y * c - x * s) / ry) ** 2, 0))


def _tubes(n, x, y, weights, radius, hollow=0.0):
    """Path through tubes swept along points; `weights` are the lengths (in depth, too) that the points stand for.

    The projection of a tube is its line density convolved with a disc; a hollow one keeps a bright cortex.
    """
    x, y = np.ravel(x) * n + n / 2 - 0.5, np.ravel(y) * n - 0.5
    keep = (x > 0) & (x < n - 1.001) & (y > 0) & (y < n - 1.001)
    x, y, weights = x[keep], y[keep], np.ravel(weights)[keep] * n
    i, j = x.astype(int), y.astype(int)
    fx, fy, at = x - i, y - j, j * n + i
    share = np.concatenate([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy]) * np.tile(weights, 4)
    line = np.bincount(np.concatenate([at, at + 1, at + n, at + n + 1]), share, n * n).reshape(n, n)
    r, reach = radius * n, int(radius * n + 1)
    d = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1])
    kernel = np.clip(r + 0.5 - d, 0, 1) - hollow * np.clip(0.7 * r + 0.5 - d, 0, 1)
    return cv2.filter2D(line.astype(np.float32), -1, kernel.astype(np.float32)) / n


def _anatomy(seed, adult):
    rng = np.random.default_rng(seed)
    limits = (ADULT if adult else CHILD) | EVERYONE
    a = SimpleNamespace(**{name: rng.uniform(*limit) for name, limit in limits.items()}, adult=adult)
    a.arms = rng.uniform(*ADULT["arms"]) if rng.random() < 0.3 else a.arms
    a.wall, a.seed = a.wide + 0.018 + a.fat, int(rng.integers(2**32))
    return a


def _body(a, x, y):
    """Path through soft tissue: neck, torso, arms, jaw."""
    rows, levels = y[:, 0], [0.0, 0.05, 0.11, 0.19, 0.3, 0.6, 1.0]
    half = np.interp(rows, levels, [0.115, 0.14, 0.21, a.wall - 0.03, a.wall - 0.005, a.wall, a.wall + 0.005])
    half = cv2.GaussianBlur(np.float32(half[:, None]), (1, 0), 0, None, len(rows) * 0.025, cv2.BORDER_REPLICATE)
    depth = a.deep * np.interp(rows, [0, 0.1, 0.3, 0.7, 1], [0.26, 0.34, 0.48, 0.52, 0.54])[:, None]
    square = np.float32(depth**2) * np.maximum(1 - (x / half) ** 4, 0)
    for side in (-1, 1):
        sx, sy, dx, dy = side * (a.wall - 0.095), 0.18, side * math.cos(a.arms), math.sin(a.arms)
        along = np.clip((x - sx) * dx + (y - sy) * dy, 0, 0.6)
        across = (x - sx - along * dx) ** 2 + (y - sy - along * dy) ** 2
        square += 0.075 * np.maximum(1 - across / (0.095 + 0.08 * along) ** 2, 0)
    return np.sqrt(square) + 0.25 * _ellipsoid(x, y, a.spine, a.jaw - 0.10, 0.19, 0.14)


def _edge(a, t):
    """Outer border of the lung at height `t` (0 at the widest level, 1 at the apex)."""
    return a.apex_x + (a.wide - a.apex_x) * (1 - np.clip(t, 0, 1) ** 1.75) ** 0.55


def _lungs(a, x, y, breath):
    """Path through both lungs as if there were no heart, and the field above the diaphragm."""
    t = np.clip((0.62 - y) / (0.62 - a.apex), 0, 1)
    lateral, medial = _edge(a, t), a.apex_x - (a.apex_x - 0.02) * np.sqrt(1 - t**4)
    depth = np.where(y > a.apex, 0.40 * a.deep * np.sqrt(1 - t**2.5), 0).astype(np.float32)
    air, field = 0, False
    for side in (-1, 1):
        s = side * (x - a.spine)
        u = (s - medial) / np.maximum(lateral - medial, 1e-3)
        border = a.dome + breath + a.gap * (side > 0) + a.sulcus * (np.maximum(s - 0.13, -0.03) / (a.wide - 0.13)) ** 2
        liver = np.sqrt(1 - (1 - np.clip((y - border) / 0.15, 0, 1)) ** 2)
        inside, u = (u > 0) & (u < 1) & (depth > 0), np.clip(u, 0, 1)
        air = air + inside * depth * np.sqrt(1 - u * u * np.sqrt(u)) * _step(u * 6) * np.maximum(1 - 1.1 * liver, 0)
        field = field | (inside & (y < border))
    return air, field


def _heart(a, x, y, breath):
    """Share of the lung's depth that heart, great vessels and thymus take."""
    x, low, h = x - a.spine, breath * 0.8 + (a.dome - 0.73) * 0.7, a.heart
    top = 0.060 + 0.008 * (not a.adult) + max(a.thymus, 0)
    parts = [0.96 * _ellipsoid(x, y, 0.065 * h, 0.655 + low, 0.20 * h, 0.14 * h, a.tilt),
             0.80 * _ellipsoid(x, y, -0.028, 0.64 + low, 0.085 * h, 0.17 * h, -0.1),
             0.72 * _ellipsoid(x, y, 0.025, 0.43, 0.075, 0.14, -0.25),
             0.66 * _ellipsoid(x, y, 0.0, 0.30, top, 0.30),
             0.80 * _ellipsoid(x, y, 0.042, 0.335, 0.035 + 0.012 * a.adult, 0.045),
             0.35 * _ellipsoid(x, y, -0.06, 0.47, 0.04, 0.10, 0.3)]  # fmt: skip
    share, low = np.sqrt(np.sqrt(sum((p * p) ** 2 for p in parts))), int(0.62 * len(y))
    share[low:] = np.maximum.accumulate(share[low:])  # the heart rests on the diaphragm
    return share


def _bones(a, n, breath):
    """Bone along each path: ribs as tilted loops in space, clavicles, scapulae, humeri."""
    rng, t, k = np.random.default_rng(a.seed), np.linspace(0.08, 2.5, 200), np.arange(12)[:, None]
    drop = a.drop * np.interp(k, [0, 3, 11], [0.10, 0.24, 0.32]) + breath * 0.3
    first = a.apex - 0.03 + (k + 0.35 * (k == 0)) * a.pitch + rng.normal(0, 0.0015, (12, 1))
    reach = np.where(k == 0, 0.115, _edge(a, (0.62 - first - 0.4 * drop) / (0.62 - a.apex)) + 0.004)
    x, z = 0.02 + (reach - 0.02) * np.sin(t), -0.24 * np.cos(t) * np.where(k == 0, 0.4, 1)
    y = first + drop * ((1 - np.cos(t)) / 2) ** 1.3 - 0.028 * np.sin(np.clip(2 * t, 0, np.pi)) * (k > 0)
    length = np.sqrt(sum(np.gradient(p, axis=1) ** 2 for p in (x, y, z)))
    length *= np.interp(k, [0, 1, 8, 11], [0.5, 1, 1, 0.6])
    length *= np.interp(t, [0, 1.2, 1.9, 2.5], [1, 1, 0.8, 0.3]) * (t < np.interp(k, [0, 8, 11], [2.5, 2.3, 1.2]))
    y = np.stack([y, y]) + rng.normal(0, 0.002, (2, 12, 1))
    ribs = _tubes(n, np.stack([a.spine - x, a.spine + x]), y, np.stack([length, length]), a.rib, 0.72)
    s, along = np.linspace(0, 1, 120), np.linspace(0, 5, 160)
    blade = np.transpose([[-0.08, 0.17], [-0.145, 0.20], [-0.12, 0.29], [-0.08, 0.40], [-0.055, 0.29], [-0.05, 0.21]])
    x = np.r_[0.03 + s * (a.wall - 0.10), a.wall + np.interp(along, np.arange(6), blade[0])]
    y = np.r_[a.apex + 0.055 - a.lift * s + 0.016 * np.sin(2 * np.pi * s), np.interp(along, np.arange(6), blade[1])]
    weight = np.hypot(np.diff(x, prepend=x[0]), np.diff(y, prepend=y[0]))
    weight *= np.r_[1 + 0.5 * np.abs(s - 0.5), 0, np.full(159, 0.5)]  # 0: the jump from clavicle to scapula
    girdle = _tubes(n, np.r_[a.spine - x, a.spine + x], np.r_[y, y], np.r_[weight, weight], a.rib * 0.85, 0.7)
    x, y = a.wall - 0.07 + np.cos(a.arms) * s / 2, 0.17 + np.sin(a.arms) * s / 2
    humeri = _tubes(n // 2, np.r_[a.spine - x, a.spine + x], np.r_[y, y], np.full(240, 0.5 / 120), 0.019, 0.72)
    return a.bone * (1.75 * ribs + 3.2 * girdle + 1.6 * cv2.resize(humeri, (n, n)))


def _spine(a, x, y):
    """Bone of the spine: vertebral bodies with endplates, pedicles, spinous and transverse processes."""
    s, v = np.abs(x - a.spine) / a.top, (y - 0.02) / a.pitch
    v = v - np.floor(v)
    disc = np.minimum(v, 1 - v)
    body = 0.1 + 0.6 * _step(disc / 0.14) + 0.6 * np.exp(-(((disc - 0.14) / 0.05) ** 2))
    out = 0.55 * body * np.sqrt(np.maximum(1 - (s * s) ** 2, 0))
    processes = (0.6, 0.6, 0.15, 0.38, 0.13), (0.5, 0, 0.13, 0.78, 0.17), (0.3, 1.15, 0.3, 0.4, 0.14)
    for much, at, wide, level, high in processes:
        out += much * np.exp(-(((s - at) / wide) ** 2)) * np.exp(-(((v - level) / high) ** 2))
    return 0.075 * a.bone * out


def _tree(a, n, breath):
    """Vessels branching out of both hila: one path map a generation, thick to thin."""
    rng, side = np.random.default_rng(a.seed), np.repeat([-1.0, 1.0], 8)
    angle = np.tile(np.linspace(-1.3, 1.4, 8), 2) + rng.normal(0, 0.12, 16)
    x, y = 0.05 + 0 * angle, 0.455 + 0.6 * breath - 0.02 * (side > 0) + 0.04 * np.sin(angle)
    length = 0.17 * rng.uniform(0.7, 1.2, 16) * (1 + 0.35 * np.sin(angle))
    k = 15 * max(1, round(n / 320))  # points a branch: dense enough for large films
    m, maps, pick = np.linspace(0, 1, k), [], [k // 3, 2 * k // 3, k - 1]
    for generation in range(4):
        turn = angle[:, None] + rng.normal(0, 0.3, (len(angle), 1)) * m
        step = length[:, None] / k
        px, py = x[:, None] + np.cumsum(np.cos(turn) * step, 1), y[:, None] + np.cumsum(np.sin(turn) * step, 1)
        radius = max(0.0095 * 0.66**generation, 0.6 / n)
        maps.append(_tubes(n, a.spine + side[:, None] * px, py, step * (1 - 0.4 * m), radius))
        x, y, side = px[:, pick].ravel(), py[:, pick].ravel(), np.repeat(side, 3)
        angle = (turn[:, pick] + rng.normal(0, 0.15, (len(angle), 3)) + [-0.6, 0.6, 0.0]).ravel()
        length = np.repeat(length, 3) * rng.uniform(0.45, 0.75, len(side))
    return maps


def _airways(a, n):
    """Path through trachea and main bronchi."""
    s = np.linspace(0, 1, 60)
    x = np.r_[-0.006 * s, -0.006 - 0.073 * s, -0.006 + 0.088 * s]
    y = np.r_[0.36 * s, 0.36 + 0.068 * s, 0.36 + 0.048 * s]
    return cv2.resize(_tubes(n // 2, a.spine + x, y, np.repeat([0.006, 0.001, 0.001], 60), 0.019), (n, n))


def _lesion(a, kind, n, x, y, severity, vessels):
    """Share of the air that fluid replaces, and the lesion's extent, both `(n, n)` in [0, 1]."""
    rng, s, dome = np.random.default_rng([a.seed, 1]), x - a.spine, a.dome  # follow-up films show the same lesion
    extent, texture = np.zeros((n, n), np.float32), 1
    rough = 0.45 * _noise(rng, n, 7) + 0.2 * _noise(rng, n, 20)
    net = np.exp(-((_noise(rng, n, 56) / 0.5) ** 2))

    def oval(side, from_middle, wide, from_top, high):
        return ((side * s - rng.uniform(*from_middle)) / wide) ** 2 + ((y - rng.uniform(*from_top)) / high) ** 2

    if kind == "bacterial":  # one or two lobes, cut off at a fissure, with air bronchograms
        for _ in range(1 + (rng.random() < 0.25)):
            side, level = int(rng.choice([-1, 1])), int(rng.integers(3))
            heights = ((0.31, 0.37), (0.51, 0.57), (dome - 0.13, dome - 0.07))[level]
            q = oval(side, (0.12, 0.22), rng.uniform(0.07, 0.13), heights, rng.uniform(0.07, 0.12))
            fissure = (y - 0.47 - rng.normal(0, 0.15) * (side * s - 0.15)) / 0.015
            bound = (_step(0.5 - fissure), _step(0.5 + fissure), 1)[level]
            extent = np.maximum(extent, _step((1.7 - q - rough) / 1.4) * bound * (side * s > 0))
        bronchi = np.roll(vessels[0] + 0.6 * vessels[1], (n // 100, n // 100), (0, 1))
        texture = 0.85 - rng.uniform(0.1, 0.4) * np.clip(bronchi / 0.02, 0, 1) + 0.15 * rough
    elif kind == "viral":  # haze and thickened bronchial walls around both hila
        for side in (-1, 1):
            q = oval(side, (0.10, 0.14), 0.12, (0.46, 0.54), rng.uniform(0.16, 0.22))
            extent = np.maximum(extent, rng.uniform(0.7, 1) * np.exp(-q * 0.9) * np.clip(1 - 0.6 * rough, 0.2, 1.3))
        cuffs = cv2.GaussianBlur(sum(vessels[:3]), (0, 0), n * 0.004)
        texture = 0.32 + 0.14 * net + np.clip(cuffs / 0.06, 0, 0.25)
    elif kind == "covid":  # patches of ground glass along the outer wall of both lungs, low rather than high
        for i in range(rng.integers(4, 9)):
            side, r = (-1, 1)[i % 2], rng.uniform(0.05, 0.10)
            q = oval(side, (0.62 * a.wide, 0.92 * a.wide), r, (0.45, dome), r * rng.uniform(0.8, 1.6))
            extent = np.maximum(extent, rng.uniform(0.5, 1) * _step((1.6 - q - rough) / 1.6) * (side * s > 0))
        texture = 0.55 + 0.12 * net
    return np.clip(severity * extent * texture, 0, 0.9), extent
