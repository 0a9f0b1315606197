"""Colour maps of equal perceived steps, made in OKLab (B. Ottosson, 2020), and the colours of two questions."""

import numpy as np

FIRST, SECOND, BOTH = (64, 205, 229), (255, 150, 62), (246, 247, 250)
STEPS = 64


def oklch_to_srgb(lightness, chroma, hue) -> np.ndarray:
    """(n, 3) sRGB in 0..1, unclipped; hue in degrees."""
    a, b = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
    cones = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        axis=-1,
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = cones**3 @ to_linear.T
    magnitude = np.abs(linear)
    gamma = np.where(magnitude <= 0.0031308, 12.92 * magnitude, 1.055 * magnitude ** (1 / 2.4) - 0.055)
    return np.sign(linear) * gamma


def ramp(lightness, chroma, hue) -> np.ndarray:
    """(STEPS, 3) uint8: from one (lightness, hue) to the other in equal steps, as colourful as a screen allows."""
    share = np.linspace(0, 1, STEPS)
    lightness = lightness[0] + share * (lightness[1] - lightness[0])
    hue = hue[0] + share * (hue[1] - hue[0])
    low, high = np.zeros(STEPS), np.interp(share, [0, 0.5, 1], chroma)
    colours = oklch_to_srgb(lightness, high, hue)
    if not ((colours >= 0) & (colours <= 1)).all():
        limit = high
        for _ in range(20):  # the largest chroma that is inside sRGB, by bisection
            middle = (low + high) / 2
            colours = oklch_to_srgb(lightness, np.minimum(middle, limit), hue)
            inside = ((colours >= 0) & (colours <= 1)).all(1)
            low, high = np.where(inside, middle, low), np.where(inside, high, middle)
        colours = oklch_to_srgb(lightness, low, hue)
    return (colours.clip(0, 1) * 255).round().astype(np.uint8)


HEAT = ramp((0.16, 0.96), (0.07, 0.19, 0.12), (288, 462))  # night, violet, red, amber, pale yellow
ORDER = ramp((0.95, 0.26), (0.15, 0.11, 0.08), (118, 292))  # first: lime; then green, teal, blue; last: indigo


def colour_of(values: np.ndarray, palette: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values (...,) as colours (..., 3), uint8."""
    share = (values - low) / (high - low) if high > low else np.zeros_like(values, dtype=float)
    return palette[(share.clip(0, 1) * (len(palette) - 1)).round().astype(int)]
