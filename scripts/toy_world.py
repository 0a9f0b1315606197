"""Generated videos and images of small coloured shapes, with questions and dense labels.

The world that the tiny checkpoint is trained and measured on. A video is 8 frames of 96x96 pixels: a textured
background, clutter, and a crowd of objects of about one pooled visual token (16 pixels) each. Some objects are there all
the time, some come late, some vanish, one or two move. An image is a still of the same kind in one of three sizes.

Everything follows from a seed. Seeds below `HELD_OUT_START` are for training, seeds from it on are for measuring:

    from toy_world import HELD_OUT_START, sample_video
    scene = sample_video(HELD_OUT_START)
    scene.frames                  # uint8 (8, 96, 96, 3)
    scene.questions               # [Question(type="colour", question="what colour is the star?", answer="red"), ...]

Only numpy and PIL are needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

# The one place where training, choosing and measuring are kept apart: who draws which scenes. Training draws seeds from
# [0, HELD_OUT_START). The scenes that training is followed on and ends with, and the samples, come from HELD_OUT_START on,
# those of the tables from TABLES_START on, and those that settings are chosen on from CHOICES_START on.
HELD_OUT_START = 10**9
TABLES_START = HELD_OUT_START + 10_000
CHOICES_START = HELD_OUT_START + 5_000_000
HELD_OUT_END = 2 * HELD_OUT_START

NUM_FRAMES = 8
FRAMES_PER_SECOND = 2  # what models are told whose positions count seconds
FRAME_SIZE = 96
PATCH_SIZE = 8
SLOT = 16  # objects stand near the centres of a grid of slots; one slot is one pooled visual token of a frame
IMAGE_SIZES = ((96, 96), (96, 192), (192, 96))  # height, width

COLOURS = {
    "red": (215, 35, 40),
    "green": (45, 180, 60),
    "blue": (50, 85, 230),
    "yellow": (240, 220, 50),
    "purple": (160, 50, 190),
    "orange": (245, 135, 25),
    "white": (245, 245, 245),
}
SHAPES = ("star", "circle", "square", "triangle", "cross", "ring")
PLURALS = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}
PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
MOVES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
MAX_COUNT = 4
ORDER_GAP = 2  # frames between the arrivals of two objects whose order is asked for

STILL_TYPES = ("colour", "shape", "place", "count", "presence")
VIDEO_TYPES = (*STILL_TYPES, "motion", "order")


@dataclass(frozen=True)
class Question:
    """One question about a scene: its type (one of `VIDEO_TYPES`), its text and the only right answer."""

    type: str
    question: str
    answer: str


@dataclass(frozen=True)
class Thing:
    """One object: what it is, in which frames it is visible (`first` <= t < `end`) and where its centre is then.

    `centres` is int (T, 2), row and column in pixels; `move` is "" for an object that stays put.
    """

    shape: str
    colour: str
    radius: int
    first: int
    end: int
    centres: np.ndarray
    move: str = ""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def visible(self, t: int) -> bool:
        return self.first <= t < self.end


@dataclass(frozen=True)
class Scene:
    """A video or (with one frame) an image: `frames` uint8 (T, H, W, 3), the objects in it, and questions about it.

    `counted` is the shape that "how many" asks for: its objects stay put and are visible in all frames.
    """

    frames: np.ndarray
    things: tuple[Thing, ...]
    counted: str
    questions: tuple[Question, ...]


# ---------------------------------------------------------------------------------------------------------------- drawing


@cache
def shape_mask(shape: str, radius: int) -> np.ndarray:
    """How much of each pixel a shape covers: float32 (2 * radius + 1, 2 * radius + 1, 1) in 0..1."""
    scale = 8
    side = (2 * radius + 1) * scale
    picture = Image.new("L", (side, side))
    draw = ImageDraw.Draw(picture)
    middle = side / 2

    def around(angles: Sequence[float], reach: Sequence[float]) -> list[tuple[float, float]]:
        return [
            (middle + r * middle * np.sin(np.radians(a)), middle - r * middle * np.cos(np.radians(a)))
            for a, r in zip(angles, reach, strict=True)
        ]

    edge = 0.08 * side
    if shape == "star":
        draw.polygon(around([36 * i for i in range(10)], [1.0, 0.42] * 5), fill=255)
    elif shape == "circle":
        draw.ellipse((edge, edge, side - edge, side - edge), fill=255)
    elif shape == "square":
        draw.rectangle((edge, edge, side - edge, side - edge), fill=255)
    elif shape == "triangle":
        draw.polygon([(middle, 0), (side, side - edge), (0, side - edge)], fill=255)
    elif shape == "cross":
        arm = 0.15 * side
        draw.rectangle((middle - arm, 0, middle + arm, side), fill=255)
        draw.rectangle((0, middle - arm, side, middle + arm), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, side, side), fill=255)
        draw.ellipse((0.26 * side, 0.26 * side, 0.74 * side, 0.74 * side), fill=0)
    else:
        raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")
    small = picture.resize((2 * radius + 1, 2 * radius + 1), Image.Resampling.BOX)
    return (np.asarray(small, np.float32) / 255)[..., None]


def _stretch(coarse: np.ndarray, height: int, width: int) -> np.ndarray:
    """A coarse float32 map, smoothly enlarged to (height, width)."""
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A background: float32 (height, width, 3), dull colours with a gradient, stripes, blotches or noise over them."""
    base = rng.uniform(35, 115) + rng.uniform(-14, 14, 3).astype(np.float32)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    kind = rng.integers(4)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * rows + np.sin(angle) * columns
    if kind == 0:
        pattern = along / FRAME_SIZE
    elif kind == 1:
        pattern = np.sin(along * 2 * np.pi / rng.uniform(6, 30))
    elif kind == 2:
        pattern = _stretch(rng.normal(size=(height // 12, width // 12)).astype(np.float32), height, width)
    else:
        pattern = rng.random((height, width), dtype=np.float32) * 2 - 1
    return base + (pattern * rng.uniform(8, 26))[..., None] * rng.uniform(0.6, 1.2, 3).astype(np.float32)


def _add_clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Draws specks and scratches, some of them in the colours of objects but too small to be one, into `canvas`."""
    height, width = canvas.shape[:2]
    palette = np.array(list(COLOURS.values()), np.float32)
    for _ in range(rng.integers(6, 13)):
        colour = palette[rng.integers(len(palette))] if rng.random() < 0.5 else rng.uniform(20, 170, 3)
        row, column = rng.integers(height - 8), rng.integers(width - 8)
        long, thick = rng.integers(2, 9), rng.integers(1, 3)
        rows, columns = (long, thick) if rng.random() < 0.5 else (thick, long)
        patch = canvas[row : row + rows, column : column + columns]
        patch += 0.7 * (colour - patch)


def _paste(canvas: np.ndarray, mask: np.ndarray, centre: np.ndarray, value: np.ndarray) -> None:
    """Blends `value` into `canvas` (H, W, C) where `mask` covers it; parts beyond the edge are cut off."""
    radius = mask.shape[0] // 2
    top, left = centre[0] - radius, centre[1] - radius
    cut_top, cut_left = max(0, -top), max(0, -left)
    region = canvas[max(0, top) : centre[0] + radius + 1, max(0, left) : centre[1] + radius + 1]
    part = mask[cut_top : cut_top + region.shape[0], cut_left : cut_left + region.shape[1]]
    region += part * (value - region)


def _render(rng: np.random.Generator, things: Sequence[Thing], height: int, width: int, num_frames: int) -> np.ndarray:
    """The frames of a scene: uint8 (num_frames, height, width, 3)."""
    canvas = _texture(rng, height, width)
    _add_clutter(rng, canvas)
    paints = [np.array(COLOURS[thing.colour], np.float32) + rng.uniform(-12, 12, 3) for thing in things]
    # a little grain that differs from frame to frame, as a camera has
    frames = canvas + rng.integers(-6, 7, (num_frames, height, width, 1), dtype=np.int8)
    frames = frames.astype(np.float32)
    for t in range(num_frames):
        for thing, paint in zip(things, paints, strict=True):
            if thing.visible(t):
                _paste(frames[t], shape_mask(thing.shape, thing.radius), thing.centres[t], paint)
    return frames.clip(0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------- scenes


class _Crowd:
    """Collects objects that differ in (shape, colour) and stand in slots of their own."""

    def __init__(self, rng: np.random.Generator, height: int, width: int, num_frames: int):
        self.rng = rng
        self.num_frames = num_frames
        self.free = np.ones((height // SLOT, width // SLOT), bool)
        self.things: list[Thing] = []

    def _identity(self, shapes: Sequence[str]) -> tuple[str, str]:
        taken = {(thing.shape, thing.colour) for thing in self.things}
        choices = [pair for pair in PAIRS if pair[0] in shapes and pair not in taken]
        return choices[self.rng.integers(len(choices))]

    def _pixels(self, slots: np.ndarray) -> np.ndarray:
        """Slots, float (T, 2), as centres in pixels, int (T, 2), all shifted by one small random offset."""
        return np.rint(slots * SLOT + SLOT / 2 + self.rng.integers(-2, 3, 2)).astype(int)

    def add(self, shapes: Sequence[str], first: int = 0, end: int | None = None) -> None:
        """Adds an object that stays put."""
        slots = np.argwhere(self.free)
        slot = slots[self.rng.integers(len(slots))]
        self.free[tuple(slot)] = False
        shape, colour = self._identity(shapes)
        centres = self._pixels(np.tile(slot, (self.num_frames, 1)))
        end = self.num_frames if end is None else end
        self.things.append(Thing(shape, colour, int(self.rng.integers(6, 9)), first, end, centres))

    def add_mover(self, shapes: Sequence[str]) -> None:
        """Adds an object that crosses at least three slots in a straight line; the lane is kept free for it."""
        move = list(MOVES)[self.rng.integers(len(MOVES))]
        step = np.array(MOVES[move])
        lanes = []
        for start in np.ndindex(self.free.shape):
            for length in range(3, max(self.free.shape)):
                lane = np.array(start) + np.arange(length + 1)[:, None] * step
                inside = (lane >= 0).all() and (lane < self.free.shape).all()
                if inside and self.free[tuple(lane.T)].all():
                    lanes.append(lane)
        if not lanes:  # a second mover may find no lane; then there is one mover
            return
        lane = lanes[self.rng.integers(len(lanes))]
        self.free[tuple(lane.T)] = False
        shape, colour = self._identity(shapes)
        way = np.linspace(lane[0], lane[-1], self.num_frames)
        self.things.append(
            Thing(shape, colour, int(self.rng.integers(6, 9)), 0, self.num_frames, self._pixels(way), move)
        )


def _check_seed(seed: int) -> None:
    if not 0 <= seed < HELD_OUT_END:
        raise ValueError(
            f"seed {seed} is out of range: give 0..{HELD_OUT_START - 1} for training, "
            f"{HELD_OUT_START}..{HELD_OUT_END - 1} for held-out scenes"
        )


def sample_video(seed: int) -> Scene:
    """The video of a seed: frames uint8 (8, 96, 96, 3) and one question of each type that the scene has an answer to."""
    _check_seed(seed)
    rng = np.random.default_rng((0, seed))
    crowd = _Crowd(rng, FRAME_SIZE, FRAME_SIZE, NUM_FRAMES)
    counted = SHAPES[rng.integers(len(SHAPES))]
    others = [shape for shape in SHAPES if shape != counted]
    for _ in range(rng.integers(1, 3)):
        crowd.add_mover(others)
    arrivals = rng.choice(np.arange(1, NUM_FRAMES - 1, ORDER_GAP), 2, replace=False)
    for first in arrivals:
        crowd.add(others, first=int(first))
    if rng.random() < 0.5:
        crowd.add(others, end=int(rng.integers(2, NUM_FRAMES - 1)))
    for _ in range(rng.integers(MAX_COUNT + 1)):
        crowd.add([counted])
    while len(crowd.things) < 7:
        crowd.add(others)
    things = tuple(crowd.things)
    frames = _render(rng, things, FRAME_SIZE, FRAME_SIZE, NUM_FRAMES)
    return Scene(frames, things, counted, tuple(draw_questions(things, counted, frames.shape[1:3], VIDEO_TYPES, rng)))


def sample_image(seed: int) -> Scene:
    """The image of a seed: one frame, uint8 (1, H, W, 3) with (H, W) one of `IMAGE_SIZES`, and questions about it."""
    _check_seed(seed)
    rng = np.random.default_rng((1, seed))
    height, width = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
    crowd = _Crowd(rng, height, width, num_frames=1)
    counted = SHAPES[rng.integers(len(SHAPES))]
    others = [shape for shape in SHAPES if shape != counted]
    for _ in range(rng.integers(MAX_COUNT + 1)):
        crowd.add([counted])
    total = rng.integers(6, 9)
    while len(crowd.things) < total:
        crowd.add(others)
    things = tuple(crowd.things)
    frames = _render(rng, things, height, width, num_frames=1)
    return Scene(frames, things, counted, tuple(draw_questions(things, counted, (height, width), STILL_TYPES, rng)))


# -------------------------------------------------------------------------------------------------------------- questions


def place_of(thing: Thing, size: tuple[int, int]) -> str:
    """Where an object that stays put is, on a 3x3 grid over a scene of `size` (height, width)."""
    row, column = (int(3 * centre // side) for centre, side in zip(thing.centres[0], size, strict=True))
    return PLACES[3 * row + column]


def _pick(rng: np.random.Generator, choices: Sequence):
    return choices[rng.integers(len(choices))]


def _alone(things: Sequence[Thing], attribute: str) -> list[Thing]:
    """The things that share their shape or colour with no other thing."""
    values = [getattr(thing, attribute) for thing in things]
    return [thing for thing, value in zip(things, values, strict=True) if values.count(value) == 1]


def _ask_colour(things, counted, size, rng):
    if choices := _alone(things, "shape"):
        thing = _pick(rng, choices)
        form = _pick(rng, ("what colour is the {}?", "which colour does the {} have?", "tell me the colour of the {}?"))
        return Question("colour", form.format(thing.shape), thing.colour)


def _ask_shape(things, counted, size, rng):
    if choices := _alone(things, "colour"):
        thing = _pick(rng, choices)
        form = _pick(
            rng, ("what shape is the {} thing?", "what is the {} object?", "which shape does the {} thing have?")
        )
        return Question("shape", form.format(thing.colour), thing.shape)


def _ask_place(things, counted, size, rng):
    if choices := [thing for thing in things if not thing.move]:
        thing = _pick(rng, choices)
        form = _pick(rng, ("where is the {}?", "in which place is the {}?"))
        return Question("place", form.format(thing.name), place_of(thing, size))


def _ask_count(things, counted, size, rng):
    form = _pick(rng, ("how many {} are there?", "how many {} do you see?", "what is the number of {}?"))
    return Question("count", form.format(PLURALS[counted]), str(sum(thing.shape == counted for thing in things)))


def _ask_presence(things, counted, size, rng):
    here = {(thing.shape, thing.colour) for thing in things}
    if rng.random() < 0.5:
        (shape, colour), answer = _pick(rng, sorted(here)), "yes"
    else:
        # half of the absent ones combine a shape and a colour that are both there, on different objects
        absent = [pair for pair in PAIRS if pair not in here]
        shapes, colours = {pair[0] for pair in here}, {pair[1] for pair in here}
        mixed = [pair for pair in absent if pair[0] in shapes and pair[1] in colours]
        (shape, colour), answer = _pick(rng, mixed if mixed and rng.random() < 0.5 else absent), "no"
    form = _pick(rng, ("is there a {}?", "do you see a {}?", "can you see a {} anywhere?"))
    return Question("presence", form.format(f"{colour} {shape}").replace("a orange", "an orange"), answer)


def _ask_motion(things, counted, size, rng):
    if choices := [thing for thing in things if thing.move]:
        thing = _pick(rng, choices)
        form = _pick(
            rng, ("which way does the {} move?", "where is the {} going?", "in which direction does the {} move?")
        )
        return Question("motion", form.format(thing.name), thing.move)


def _ask_order(things, counted, size, rng):
    late = [thing for thing in things if thing.first > 0]
    pairs = [(a, b) for a in late for b in late if abs(a.first - b.first) >= ORDER_GAP]
    if pairs:
        a, b = _pick(rng, pairs)
        form = _pick(rng, ("which comes first, the {} or the {}?", "what appears first, the {} or the {}?"))
        return Question("order", form.format(a.name, b.name), min(a, b, key=lambda thing: thing.first).name)


_ASK: dict[str, Callable] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "place": _ask_place,
    "count": _ask_count,
    "presence": _ask_presence,
    "motion": _ask_motion,
    "order": _ask_order,
}


def draw_questions(
    things: Sequence[Thing],
    counted: str,
    size: tuple[int, int],
    types: Sequence[str],
    rng: np.random.Generator,
) -> list[Question]:
    """One random question for each entry of `types` (repeats allowed); types without an answer here are left out."""
    for type_ in types:
        if type_ not in _ASK:
            raise ValueError(f"unknown question type {type_!r}: expected one of {', '.join(_ASK)}")
    questions = (_ASK[type_](things, counted, size, rng) for type_ in types)
    return [question for question in questions if question is not None]


# ----------------------------------------------------------------------------------------------------------- dense labels


def object_map(scene: Scene, t: int = 0) -> np.ndarray:
    """Which object covers each pixel of frame `t`: uint8 (H, W), 0 for background, i + 1 for `scene.things[i]`."""
    canvas = np.zeros((*scene.frames.shape[1:3], 1), np.float32)
    for i, thing in enumerate(scene.things):
        if thing.visible(t):
            mask = (shape_mask(thing.shape, thing.radius) > 0.5).astype(np.float32)
            _paste(canvas, mask, thing.centres[t], np.float32(i + 1))
    return canvas[..., 0].astype(np.uint8)


def patch_labels(things: Sequence[Thing], objects: np.ndarray) -> np.ndarray:
    """What covers each patch of a view whose pixels belong to `objects`, uint8 (H, W) as from `object_map`.

    Returns int64 (H / 8, W / 8, 4): shape (0 none, else 1 + index in `SHAPES`), colour (0 none, else 1 + index in
    `COLOURS`), row and column of the patch. An object owns a patch when it covers at least an eighth of it and more than
    any other object does.
    """
    height, width = objects.shape
    if height % PATCH_SIZE or width % PATCH_SIZE:
        raise ValueError(f"a view of {height}x{width} pixels has no whole patches: give multiples of {PATCH_SIZE}")
    rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
    owners = np.arange(1, len(things) + 1, dtype=np.uint8)[:, None, None]
    cover = (objects == owners).reshape(-1, rows, PATCH_SIZE, columns, PATCH_SIZE).mean((2, 4))
    best = np.where(cover.max(0) >= 1 / 8, cover.argmax(0) + 1, 0)
    names = list(COLOURS)
    shapes = np.array([0] + [1 + SHAPES.index(thing.shape) for thing in things])
    colours = np.array([0] + [1 + names.index(thing.colour) for thing in things])
    row, column = np.mgrid[0:rows, 0:columns]
    return np.stack([shapes[best], colours[best], row, column], -1)
