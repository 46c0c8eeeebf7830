"""Near duplicates that are verified, not merely hashed; exact ones are equal in a manifest's `pixel_sha256`.

All chests look alike: at distance 0 an 8 x 8 difference hash matches 67 test images of `chest_xray` to other patients.
So cheap descriptors only propose pairs, fewer and fewer, and a pair counts when, after affine alignment, its fine
detail correlates above `SAME_FILM`. On `chest_xray` two patients reach 0.57 at most, and two films of one patient
rarely 0.7; copies of one film that were re-encoded, blurred, cropped, shifted or written on keep 0.75 to 0.99.
Phantoms are more alike than people: in 16 sets of 788 two patients reach 0.87, two phantoms of one patient 0.92 and
once 0.98, copies 0.98 or more. So on a synthetic set the audit asks for `SAME_PHANTOM`.
"""

import concurrent.futures
import zlib

import cv2
import joblib
import numpy as np
from scipy import fft
from scipy.sparse import coo_array, csgraph

VERSION = "v6"  # raise it when other pairs come out; cached results carry it
SAME_FILM, SAME_PHANTOM = 0.75, 0.95
SIDE = 112  # px at which two films are compared; in fewer the detail that tells them apart is gone
_NEIGHBOURS, _ALIKE = 3, 0.35  # proposals an image, and the least likeness of one
_STRETCHES = 0.8, 0.9, 1.0, 1.1, 1.25  # of the height: films of other proportions were squeezed to one square
_NEAR = 0.66  # correlation at the best stretch and shift above which a pair is aligned: copies reach 0.70, most do not
_SLANT = 0.1  # by how much a stretch of the one film may fit better than the inverse stretch of the other
_COARSE, _LIKELY = 48, 0.76  # px of a first alignment in two steps, and what it must reach: so does 1 in 100 others
_INVERSE = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


def near_pairs(images):
    """Return pairs of images that show the same film, altered.

    Found: re-encoding, resizing, exposure, contrast, blur, burnt-in text, another height, turns to 3°, shifts to 3 %
    and crops of 4 % of a side in all (of 150 films of `chest_xray` 95 % or more of each). Not looked for: mirrored
    images, larger crops.

    Args:
        images: uint8 `(n, size, size)`, of `SIDE` px or more, without exact duplicates.

    Returns:
        List of `(i, j, correlation)` with `i < j`, best first.
    """
    if len(images) < 2:
        return []
    order = sorted(range(len(images)), key=lambda row: zlib.crc32(np.ascontiguousarray(images[row])))  # of no name
    images = [images[row] for row in order]
    details = _details(images, 32, 1.5)
    found, groups, seek = [], np.arange(len(images)), np.arange(len(images))
    while len(seek):
        new = _verified(images, details, _neighbours(details.reshape(len(images), -1), seek, groups))
        found += new
        groups, seek = _crowded([pair[:2] for pair in found], [pair[:2] for pair in new], len(images))
    return sorted(((*sorted((order[i], order[j])), score) for i, j, score in found), key=lambda item: -item[2])


def _verified(images, details, pairs):
    """Return those of the proposed pairs that show one film, as `near_pairs` does."""
    pairs, maps = _fitting(details, pairs)
    kept, places = np.unique(pairs, return_inverse=True)
    small = _details(images, _COARSE, 2, kept)
    coarse = _in_threads(lambda case: _align(*small[case[0]], case[1], 2),
                         list(zip(places.reshape(-1, 2), maps * _scale(32, _COARSE), strict=True)))
    likely = [(*pair, warp) for pair, (reached, warp) in zip(pairs.tolist(), coarse, strict=True) if reached > _LIKELY]
    scores = _in_threads(lambda case: _correlation(images[case[0]], images[case[1]], case[2]), likely)
    return [(i, j, score) for (i, j, _), score in zip(likely, scores, strict=True) if score >= SAME_FILM]


def _crowded(found, new, count):
    """Return the group of copies of each image, and the images that have proposed no other group than their own.

    An image with as many copies beside it as it may propose finds nobody else before these are left out.
    """
    i, j = np.array(found, int).reshape(-1, 2).T
    _, groups = csgraph.connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(count, count)), directed=False)
    grown = np.unique(groups[np.array(new, int).ravel()])
    return groups, np.flatnonzero(np.isin(groups, grown[np.bincount(groups)[grown] > _NEIGHBOURS]))


def _in_threads(function, items):
    with concurrent.futures.ThreadPoolExecutor(joblib.cpu_count()) as pool:
        return list(pool.map(function, items))


def _neighbours(described, rows, groups):
    """Propose for each of some rows its few nearest neighbours of other groups, as sorted pairs `(m, 2)`."""
    pairs, count = [], min(_NEIGHBOURS, len(described) - 1)
    for start in range(0, len(rows), 1024):
        some = rows[start:start + 1024]
        likeness, place = described[some] @ described.T, np.arange(len(some))
        likeness[groups[some, None] == groups] = -1
        for _ in range(count):
            nearest = likeness.argmax(1)
            alike = likeness[place, nearest] > _ALIKE
            pairs.append(np.sort(np.stack([some, nearest], 1)[alike], axis=1))
            likeness[place, nearest] = -1
    return np.unique(np.concatenate(pairs), axis=0)


def _fitting(details, pairs):
    """Return the pairs worth aligning, the better way round, and the map of each as `_best_fit` does."""
    reached, maps = _best_fit(details, pairs)
    near = reached > _NEAR - _SLANT
    pairs, reached, maps = pairs[near], reached[near], maps[near]
    backward, others = _best_fit(details, pairs[:, ::-1])
    turned = backward > reached + 1e-3  # unstretched, both ways are the same but for rounding
    pairs[turned], reached[turned], maps[turned] = pairs[turned, ::-1], backward[turned], others[turned]
    return pairs[reached > _NEAR], maps[reached > _NEAR]


def _best_fit(details, pairs):
    """Return the correlation of each pair at the best of `_STRETCHES` and of all shifts around the edges.

    Returns:
        Also the map `(2, 3)` of each that reaches it, from places in the first film to places in the second.
    """
    side, best = details.shape[1], np.zeros(len(pairs))
    maps = np.tile(np.eye(2, 3, dtype=np.float32), (len(pairs), 1, 1))
    still = fft.rfft2(details, workers=-1)
    for stretch in _STRETCHES:
        to_second = np.float32([[1, 0, 0], [0, 1 / stretch, (1 - 1 / stretch) * (side - 1) / 2]])  # about the middle
        rows = cv2.warpAffine(np.eye(side, dtype=np.float32), to_second, (side, side), flags=_INVERSE)
        moved = rows @ details
        moved = fft.rfft2(moved / (np.linalg.norm(moved, axis=(1, 2), keepdims=True) + 1e-6), workers=-1).conj()

        def fit(start, moved=moved, to_second=to_second):
            part = slice(start, start + 256)
            first, second = pairs[part].T
            reached = fft.irfft2(still[first] * moved[second], (side, side)).reshape(len(first), -1)
            where = reached.argmax(1)
            reached = reached[np.arange(len(first)), where]
            better = reached > best[part]
            down, right = (np.stack(np.divmod(where[better], side)) + side // 2) % side - side // 2
            best[part][better], maps[part][better] = reached[better], to_second
            maps[part][better, :, 2] -= np.stack([right, down * to_second[1, 1]], 1)

        _in_threads(fit, range(0, len(pairs), 256))
    return best, maps


def _scale(side, other):
    """Return by what an affine map between images of one side is multiplied, to be one between images of another."""
    return np.float32([1, 1, other / side])


def _details(images, side, sigma, rows=None):
    """Return the local contrast of images (of those in `rows`) at `side` px, `(n, side, side)` of unit norm.

    Exposure and contrast leave no trace in it.
    """
    rows = np.arange(len(images)) if rows is None else rows
    found = np.empty((len(rows), side, side), np.float32)

    def describe(start):  # as the channels of one image, of which OpenCV takes 128 at most
        small = np.stack([cv2.resize(np.asarray(images[row]), (side, side), interpolation=cv2.INTER_AREA)
                          for row in rows[start:start + 64]], -1).astype(np.float32)
        high = small - _blurred(small, sigma)
        high /= np.sqrt(_blurred(high * high, 2 * sigma)) + 2
        high -= high.mean((0, 1))
        high /= np.linalg.norm(high, axis=(0, 1)) + 1e-6
        found[start:start + 64] = high.transpose(2, 0, 1)

    _in_threads(describe, range(0, len(rows), 64))
    return found


def _blurred(maps, sigma):
    return cv2.GaussianBlur(maps, (0, 0), sigma).reshape(maps.shape)  # OpenCV drops the axis of a single channel


def _align(first, second, start, iterations):
    """Return the correlation reached, and the affine map that reaches it, from places in `first` to those in `second`.

    Source: Evangelidis & Psarakis 2008 (enhanced correlation coefficient).
    """
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, iterations, 1e-3)
    side = len(first)
    try:
        return cv2.findTransformECC(first * side, second * side, start, cv2.MOTION_AFFINE, criteria, None, 1)
    except cv2.error:  # it did not converge: these are two different films
        return 0.0, start


def same_film(first, second):
    """Return the correlation of the fine detail of two grey uint8 images after affine alignment, in [-1, 1]."""
    (start,) = _best_fit(_details([first, second], 32, 1.5), np.array([[0, 1]]))[1]
    _, start = _align(*_details([first, second], _COARSE, 2), start * _scale(32, _COARSE), 2)
    return _correlation(first, second, start)


def _correlation(first, second, start):
    """Return what `same_film` does, aligned from a map that was found at `_COARSE` px."""
    _, warp = _align(*_details([first, second], SIDE, 4), start * _scale(_COARSE, SIDE), 30)
    how = {"dsize": (SIDE, SIDE), "flags": _INVERSE}
    fine, other = _details([first, second], SIDE, 2)
    moved = cv2.warpAffine(other, warp, **how)
    common = cv2.warpAffine(np.ones((SIDE, SIDE), np.float32), warp, **how) > 0.5
    if common.mean() < 0.5 or fine[common].std() == 0 or moved[common].std() == 0:
        return 0.0
    return float(np.corrcoef(fine[common], moved[common])[0, 1])
