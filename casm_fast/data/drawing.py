"""Vectorised drawing of the embedded set: scenes of textured shapes, many pictures at once.

A scene lives on the plane in units of the picture's shorter side; a `View` says which part of the
plane a picture shows and at how many pixels. The same scene can therefore be drawn at any size and
aspect ratio, and its masks are exact at each of them.

Shapes are signed distances (negative inside), so one evaluation gives the coverage of the edge
pixels, the outline and the soft contact shadow. Every operation on pixels is an addition,
multiplication, division, square root, floor or comparison, which IEEE 754 rounds the same way on
every machine; sines and powers occur only in the few parameters of an object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
# float32 throughout; NumPy's stubs call float32 beside a plain number a wider type.

OUTLINE = 0.07  # width of an object's darker rim, as a share of its radius
SHADOW = 0.35  # reach of the contact shadow, as a share of the radius
LOG_STRETCH = 0.12  # of an item: its length changes by at most exp(LOG_STRETCH), either way
# Nothing of an object, shadow included, is drawn beyond this many radii: the tip of a triangle's
# shadow, (0.56 + 0.35) * 2, times the largest stretch, exp(0.12).
REACH = 2.06


def _length(x: Floats, y: Floats) -> Floats:
    length: Floats = np.sqrt(x * x + y * y)
    return length


def _either(first: Floats, second: Floats) -> Floats:
    """The union of two shapes, or the smaller of two fields."""
    smaller: Floats = np.minimum(first, second)
    return smaller


def _both(first: Floats, second: Floats) -> Floats:
    """The intersection of two shapes, or the larger of two fields."""
    larger: Floats = np.maximum(first, second)
    return larger


def _unit(field: Floats) -> Floats:
    clipped: Floats = np.clip(field, 0, 1)
    return clipped


# --- shapes: signed distance in units of the radius, (u, v) local coordinates ---------------------
# Plain numbers stay float32 beside float32 arrays.


def _disc(u: Floats, v: Floats) -> Floats:
    return _length(u, v) - 0.88


def _square(u: Floats, v: Floats) -> Floats:
    return _both(abs(u), abs(v)) - 0.78


def _triangle(u: Floats, v: Floats) -> Floats:
    return _both(0.5 * v + 0.8660254 * abs(u), -v) - 0.56


def _star(u: Floats, v: Floats) -> Floats:
    # Five-fold symmetry by two reflections, then the distance to one edge of one arm.
    kx, ky = 0.809016994, -0.587785252
    tip, notch = 1.08, 0.52
    x, y = abs(u), -v
    for side in (kx, -kx):
        fold = 2 * np.maximum(side * x + ky * y, 0)
        x, y = x - fold * side, y - fold * ky
    x, y = abs(x), y - tip
    ex, ey = -ky * notch, kx * notch - 1
    along = np.clip((x * ex + y * ey) / (ex * ex + ey * ey), 0, tip)
    return _length(x - ex * along, y - ey * along) * np.sign(y * ex - x * ey)


def _heart(u: Floats, v: Floats) -> Floats:
    scale = 0.7
    x, y = abs(u) * scale, 0.54 - v * scale
    lobe = _length(x - 0.25, y - 0.75) - 0.353553
    half = 0.5 * np.maximum(x + y, 0)
    point = _either(_length(x, y - 1), _length(x - half, y - half)) * np.sign(x - y)
    distance: Floats = np.where(x + y > 1, lobe, point) / scale
    return distance


def _cross(u: Floats, v: Floats) -> Floats:
    x, y = abs(u), abs(v)
    return _either(_both(x - 0.95, y - 0.36), _both(x - 0.36, y - 0.95))


def _crescent(u: Floats, v: Floats) -> Floats:
    return _both(_length(u, v) - 0.98, 0.72 - _length(u - 0.5, v))


def _flower(u: Floats, v: Floats) -> Floats:
    petals = _length(abs(u) - 0.47, abs(v) - 0.47) - 0.46
    return _either(petals, _length(u, v) - 0.4)


def _capsule(u: Floats, v: Floats) -> Floats:
    return _length(np.maximum(abs(u) - 0.7, 0), v) - 0.26


def _ring(u: Floats, v: Floats) -> Floats:
    return abs(_length(u, v) - 0.72) - 0.18


def _half_disc(u: Floats, v: Floats) -> Floats:
    y = v + 0.4
    return _both(_length(u, y) - 0.95, -y)


def _lens(u: Floats, v: Floats) -> Floats:
    return _length(u, abs(v) + 0.75) - 1.2


SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "heart": _heart,
    "star": _star,
    "crescent": _crescent,
    "flower": _flower,
    "cross": _cross,
    # The shapes below belong to no class: they appear only as distractors.
    "capsule": _capsule,
    "ring": _ring,
    "half-disc": _half_disc,
    "lens": _lens,
}
CLASS_SHAPES = 8  # the first entries of SHAPES


# --- textures: 0 (first colour) .. 1 (second colour); (p, q) local coordinates in periods ---------


def _triangle_wave(t: Floats) -> Floats:
    wave: Floats = 4 * abs(t - np.floor(t) - 0.5) - 1
    return wave


def _stripes(p: Floats, q: Floats, pixels: Floats) -> Floats:
    del q
    return _unit(0.5 + _triangle_wave(p) * (pixels / 4))


def _dots(p: Floats, q: Floats, pixels: Floats) -> Floats:
    return _unit(0.5 + (0.31 - _length(p - np.floor(p) - 0.5, q - np.floor(q) - 0.5)) * pixels)


def _checks(p: Floats, q: Floats, pixels: Floats) -> Floats:
    # A check is half a period wide; the smaller slope keeps its corners from aliasing.
    return _unit(0.5 + _triangle_wave(p / 2) * _triangle_wave(q / 2) * (pixels / 2))


def _rings(p: Floats, q: Floats, pixels: Floats) -> Floats:
    return _unit(0.5 + _triangle_wave(_length(p, q)) * (pixels / 4))


def _plain(p: Floats, q: Floats, pixels: Floats) -> Floats:
    del q, pixels
    return np.zeros_like(p)


TEXTURES: dict[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "striped": _stripes,
    "dotted": _dots,
    "checked": _checks,
    "ringed": _rings,
    # No class has the texture below: only distractors are plain.
    "plain": _plain,
}
CLASS_TEXTURES = 4  # the first entries of TEXTURES

_SHAPE_FUNCTIONS = tuple(SHAPES.values())
_TEXTURE_FUNCTIONS = tuple(TEXTURES.values())


# --- scenes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Items:
    """The things to draw: N scenes with L slots each, painted from slot 0 upwards.

    Attributes:
        present: ``[N, L]`` bool; an absent slot is not drawn.
        shape: ``[N, L]`` index into `SHAPES`.
        texture: ``[N, L]`` index into `TEXTURES`.
        centre: ``[N, L, 2]`` (y, x), in shorter sides.
        radius: ``[N, L]``, in shorter sides.
        angle: ``[N, L]``, radians.
        stretch: ``[N, L]``, local x is drawn this much longer and local y this much shorter.
        period: ``[N, L]`` of the texture, in shorter sides.
        phase: ``[N, L, 2]`` of the texture, in periods.
        colours: ``[N, L, 2, 3]`` sRGB in [0, 1].
    """

    present: NDArray[np.bool_]
    shape: NDArray[np.int64]
    texture: NDArray[np.int64]
    centre: Floats
    radius: Floats
    angle: Floats
    stretch: Floats
    period: Floats
    phase: Floats
    colours: Floats


@dataclass(frozen=True)
class Backgrounds:
    """The ground of N scenes: clouds between three colours, woven with two soft waves.

    Attributes:
        colours: ``[N, 3, 3]`` sRGB in [0, 1].
        coarse: ``[N, 6, 6]`` lattice of the large clouds, in [0, 1]; repeats beyond the square.
        fine: ``[N, 16, 16]`` lattice of the small ones.
        waves: ``[N, 2, 4]`` per wave: frequency along y, along x, phase, bending by the clouds.
        strength: ``[N, 3]`` of the first wave, the second, and their product.
        grain: ``[N]`` standard deviation of the film grain.
        seed: ``[N]`` of the grain.
    """

    colours: Floats
    coarse: Floats
    fine: Floats
    waves: Floats
    strength: Floats
    grain: Floats
    seed: NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """A window on the plane of a scene, in pixels.

    Attributes:
        height: Pixels.
        width: Pixels.
        top: Where the scene's square begins, in shorter sides (0 or more).
        left: The same along x.
    """

    height: int
    width: int
    top: float = 0.0
    left: float = 0.0

    @property
    def side(self) -> int:
        """The shorter side in pixels: the unit of the scene."""
        return min(self.height, self.width)

    def axes(self) -> tuple[Floats, Floats]:
        """Scene coordinates of the pixel centres, ``[height]`` and ``[width]``."""
        ys = (np.arange(self.height) + 0.5) / self.side - self.top
        xs = (np.arange(self.width) + 0.5) / self.side - self.left
        return ys.astype(np.float32), xs.astype(np.float32)


def _lattice(values: Floats, ys: Floats, xs: Floats) -> Floats:
    """Smoothly interpolated periodic lattice, ``[n, k, k]`` -> ``[n, H, W]``."""
    side = values.shape[-1]

    def weights(t: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        cell = np.floor(t * side)
        f = t * side - cell
        low = cell.astype(np.int64)
        return low % side, (low + 1) % side, f * f * (3 - 2 * f)

    y0, y1, fy = weights(ys)
    x0, x1, fx = weights(xs)
    rows = values[:, y0] + fy[None, :, None] * (values[:, y1] - values[:, y0])
    left = rows[:, :, x0]
    return left + fx * (rows[:, :, x1] - left)


def _paint_ground(grounds: Backgrounds, view: View) -> Floats:
    """``[n, 3, H, W]`` sRGB."""
    ys, xs = view.axes()
    coarse = _lattice(grounds.coarse, ys, xs)
    fine = _lattice(grounds.fine, ys, xs)

    def wave(k: int) -> Floats:
        fy, fx, phase, bend = (grounds.waves[:, k, i, None, None] for i in range(4))
        t = fy * ys[None, :, None] + (fx * xs[None, None, :] + phase) + bend * coarse
        return _triangle_wave(t)

    first, second = wave(0), wave(1)
    s = grounds.strength[:, :, None, None]
    woven = s[:, 0] * first + s[:, 1] * second + s[:, 2] * (first * second)
    tone = np.clip(coarse + 0.25 * (fine - 0.5) + woven, 0, 1)
    spot = np.clip(fine * 1.6 - 0.6, 0, 1)
    canvas = np.empty((len(coarse), 3, view.height, view.width), np.float32)
    for c in range(3):
        low, high, other = (grounds.colours[:, k, c, None, None] for k in range(3))
        ground = low + tone * (high - low)
        canvas[:, c] = ground + spot * (0.45 * (other - ground))
    return canvas


def _paint_slot(
    canvas: Floats, items: Items, slot: int, view: View, rows: NDArray[np.int64]
) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Draws one slot of the scenes ``rows`` into ``canvas``.

    Returns:
        The window that was touched and the items' masks ``[len(rows), h, w]`` inside it.
    """
    ys, xs = view.axes()
    radius = items.radius[rows, slot]
    cy, cx = items.centre[rows, slot, 0], items.centre[rows, slot, 1]
    reach = radius * REACH
    y_window = slice(*np.searchsorted(ys, [(cy - reach).min(), (cy + reach).max()]))
    x_window = slice(*np.searchsorted(xs, [(cx - reach).min(), (cx + reach).max()]))
    ys, xs = ys[y_window], xs[x_window]

    angle = items.angle[rows, slot].astype(np.float64)
    cos = np.cos(angle).astype(np.float32)[:, None, None]
    sin = np.sin(angle).astype(np.float32)[:, None, None]
    dy = ys[None, :, None] - cy[:, None, None]
    dx = xs[None, None, :] - cx[:, None, None]
    p, q = dx * cos + dy * sin, dy * cos - dx * sin  # object coordinates, shorter sides
    r = radius[:, None, None]
    stretch = items.stretch[rows, slot, None, None]
    period = items.period[rows, slot, None, None]
    phase = items.phase[rows, slot, :, None, None]

    u, v = p / (r * stretch), q * (stretch / r)
    p, q = p / period, q / period
    distance = np.empty_like(u)
    shape = items.shape[rows, slot]
    for kind in np.unique(shape):
        of_kind = np.flatnonzero(shape == kind)
        distance[of_kind] = _SHAPE_FUNCTIONS[kind](u[of_kind], v[of_kind])
    pattern = np.empty_like(u)
    texture = items.texture[rows, slot]
    for kind in np.unique(texture):
        of_kind = np.flatnonzero(texture == kind)
        centred = kind == _TEXTURE_FUNCTIONS.index(_rings)  # rings stay around the centre
        shift = phase[of_kind] * (not centred)
        py, px = shift[:, 0], shift[:, 1]
        pattern[of_kind] = _TEXTURE_FUNCTIONS[kind](
            p[of_kind] + px, q[of_kind] + py, period[of_kind] * view.side
        )

    coverage = np.clip(0.5 - distance * (r * view.side), 0, 1)
    shadow = np.clip(1 - distance / SHADOW, 0, 1)
    shadow *= shadow * 0.4
    light = 1 - (dx + dy) * (0.16 / r)  # from the upper left
    rim = np.clip(0.5 + (distance + OUTLINE) * (r * view.side), 0, 1)
    light *= 1 - 0.45 * rim
    for c in range(3):
        first = items.colours[rows, slot, 0, c, None, None]
        second = items.colours[rows, slot, 1, c, None, None]
        ground = canvas[rows, c, y_window, x_window]
        ground *= 1 - shadow
        ground += coverage * ((first + pattern * (second - first)) * light - ground)
        canvas[rows, c, y_window, x_window] = ground
    return y_window, x_window, distance < 0


def _grain(grounds: Backgrounds, view: View) -> Floats:
    """``[n, 1, H, W]`` noise of a triangular distribution, from each scene's own seed."""
    shape = (2, view.height, view.width)
    noise = np.empty((len(grounds.seed), 1, view.height, view.width), np.float32)
    for i, seed in enumerate(grounds.seed):
        raw = np.random.Generator(np.random.PCG64(int(seed))).bytes(2 * view.height * view.width)
        pair = np.frombuffer(raw, np.uint8).reshape(shape)
        noise[i, 0] = pair[0].astype(np.float32) - pair[1]
    # The difference of two bytes has standard deviation sqrt((256^2 - 1) / 6) = 104.5.
    noise *= (grounds.grain / 104.5)[:, None, None, None]
    return noise


def paint(
    items: Items, grounds: Backgrounds, view: View, objects: slice
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draws N scenes.

    Args:
        items: What to draw, N scenes.
        grounds: What to draw it on, N scenes.
        view: The window on the plane, the same for all.
        objects: The slots whose masks are wanted.

    Returns:
        The pictures ``[N, H, W, 3]`` and a mask per wanted slot ``[N, slots, H, W]`` (a pixel
        belongs to an object when its centre lies inside the shape).
    """
    scenes, slots = items.present.shape
    wanted = range(slots)[objects]
    masks = np.zeros((scenes, len(wanted), view.height, view.width), np.bool_)
    canvas = _paint_ground(grounds, view)
    for slot in range(slots):
        rows = np.flatnonzero(items.present[:, slot])
        if not rows.size:
            continue
        y_window, x_window, inside = _paint_slot(canvas, items, slot, view, rows)
        if slot in wanted:
            masks[rows, wanted.index(slot), y_window, x_window] = inside
    canvas += _grain(grounds, view)
    canvas *= 255
    canvas += 0.5
    np.clip(canvas, 0, 255, out=canvas)
    return np.ascontiguousarray(canvas.astype(np.uint8).transpose(0, 2, 3, 1)), masks


def colour(
    lightness: NDArray[np.float64], chroma: NDArray[np.float64], hue: NDArray[np.float64]
) -> Floats:
    """OKLCH to sRGB, clipped to [0, 1].

    OKLCH (B. Ottosson, "A perceptual color space for image processing", 2020) keeps perceived
    lightness and saturation even while the hue turns, so that no class owns a brightness.

    Args:
        lightness: 0..1, any shape.
        chroma: 0..0.3, the same shape.
        hue: Radians, the same shape.

    Returns:
        The colours, one more axis of 3 at the end.
    """
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ],
        axis=-1,
    ).clip(0, 1)
    curve = 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055
    return np.where(linear <= 0.0031308, 12.92 * linear, curve).astype(np.float32)
