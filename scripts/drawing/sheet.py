"""The contact sheet: rows are methods and keep ratios, columns are questions, cells are all panels of the media."""

import io
from dataclasses import dataclass
from typing import Optional

import numpy as np
from drawing.colours import BOTH, FIRST, HEAT, ORDER, SECOND, colour_of
from drawing.trace import LOOKS
from PIL import Image, ImageDraw, ImageFont

WIDTH, NARROWEST = 1280, 1000  # about what a page or a screen shows without shrinking it
EDGE, LABELS, BETWEEN, GAP = 48, 250, 36, 6
SMALLEST, LARGEST = 54, 300  # height of a panel
FEW = 3  # panels
SHORT_LINE, LONG_LINE = 4, 8  # panels side by side, of up to eight and of more
BACKGROUND, INK, SOFT, RULE, ACCENT = (16, 18, 24), (240, 242, 248), (152, 160, 178), (44, 48, 60), (255, 196, 61)
DIMMED, CLOUD, TINT = 0.30, 0.80, 0.45


def sheet(panels, traces, title: str, ratios, width: int = WIDTH) -> bytes:
    """
    Args:
        panels: the pictures.
        traces: for each question a list of traces, one for each method.
        title: a line for the head.
        ratios: the keep ratios to show, among those of the traces.
        width: about how wide the sheet is to be, in pixels.

    Returns:
        a PNG file.
    """
    ratios = sorted(ratios, reverse=True)
    # Few panels leave room to put all that there is to see of a method into one row, instead of one for each.
    in_rows = len(panels) <= FEW
    columns = max(len(ratios) + 1 + (item.look is not None) for item in traces[0]) if in_rows else len(traces)
    page = Page(panels, columns, width)
    page.head(title, [] if in_rows else [group[0].question for group in traces])
    for group in zip(*traces):
        (page.method_in_rows if in_rows else page.method_in_columns)(group, ratios)
    if len(traces) == 2:
        changing = [pair for pair in zip(*traces) if (pair[0].masks != pair[1].masks).any()]
        page.changes(changing, ratios[len(ratios) // 2], len(traces[0]))
    page.foot(len(traces[0][0].ratios))
    buffer = io.BytesIO()
    page.picture().save(buffer, format="png", optimize=True)
    return buffer.getvalue()


@dataclass
class Exhibit:
    """One thing to see of a method: its pictures for each question, with a label, a detail and a colour bar."""

    label: str
    detail: str
    pictures: list
    bar: Optional[tuple] = None  # palette, what its ends are


class Page:
    """A picture that grows downwards."""

    def __init__(self, panels, columns: int, width: int):
        shapes = [panel.picture.shape[:2] for panel in panels]
        self.per_line = SHORT_LINE if len(panels) <= LONG_LINE else LONG_LINE
        lines = [shapes[start : start + self.per_line] for start in range(0, len(panels), self.per_line)]
        widest = max(sum(across / high for high, across in line) for line in lines)
        room = (width - 2 * EDGE - LABELS + BETWEEN) / columns - BETWEEN - GAP * (len(lines[0]) - 1)
        self.cell, self.y, self.parts = int(min(LARGEST, max(SMALLEST, room / widest))), EDGE, []
        self.sizes = [(round(self.cell * across / high), self.cell) for high, across in shapes]
        resize = Image.Resampling.LANCZOS
        self.bright = [Image.fromarray(panel.picture).resize(size, resize) for panel, size in zip(panels, self.sizes)]
        self.grey = [picture.convert("L").convert("RGB") for picture in self.bright]
        self.strip_width = max(
            sum(across + GAP for across, _ in self.sizes[start : start + self.per_line]) - GAP
            for start in range(0, len(panels), self.per_line)
        )
        self.strip_height = len(lines) * (self.cell + GAP) - GAP
        self.columns = [EDGE + LABELS + index * (self.strip_width + BETWEEN) for index in range(columns)]
        self.width = max(self.columns[-1] + self.strip_width + EDGE, NARROWEST)

    def picture(self) -> Image.Image:
        canvas = Image.new("RGB", (self.width, self.y + EDGE), BACKGROUND)
        draw = ImageDraw.Draw(canvas)
        for paint in self.parts:
            paint(canvas, draw)
        return canvas

    def text(self, x, y, text, size=17, fill=INK, width=None):
        font = ImageFont.load_default(size)
        text = text if width is None else shorten(text, font, width)
        self.parts.append(lambda canvas, draw: draw.text((x, y), text, fill=fill, font=font))

    def rule(self):
        y = self.y
        self.parts.append(lambda canvas, draw: draw.line((EDGE, y, self.width - EDGE, y), fill=RULE, width=1))

    def bar(self, x, y, palette, low: str, high: str, width=96):
        gradient = Image.fromarray(palette[None]).resize((width, 8), Image.Resampling.BILINEAR)
        font = ImageFont.load_default(13)
        self.text(x, y - 4, low, 13, SOFT)
        start = round(x + font.getlength(low) + 7)
        self.parts.append(lambda canvas, draw: canvas.paste(gradient, (start, y)))
        self.text(start + width + 7, y - 4, high, 13, SOFT)

    def strip(self, column: int, pictures):
        x, y = self.columns[column], self.y
        for index, picture in enumerate(pictures):
            if index and index % self.per_line == 0:
                x, y = self.columns[column], y + self.cell + GAP
            self.parts.append(lambda canvas, draw, at=(x, y), picture=picture: canvas.paste(picture, at))
            x += picture.width + GAP

    def head(self, title: str, questions):
        self.text(EDGE, self.y - 6, "What stays of the visual tokens", 34)
        self.text(EDGE, self.y + 42, title, 17, SOFT, self.width - 2 * EDGE)
        self.y += 90
        self.rule()
        self.y += 20
        if not questions:
            return
        font = ImageFont.load_default(24)
        blocks = [wrapped(quoted(question), font, self.strip_width, lines=3) for question in questions]
        for x, block, colour in zip(self.columns, blocks, colours_of(len(questions))):
            for line, text in enumerate(block):
                self.text(x, self.y + 31 * line, text, 24, colour)
        self.y += 16 + 31 * max(map(len, blocks))

    def row(self, label: str, details, columns, bar=None):
        self.text(EDGE, self.y + 2, label, 17, INK, LABELS - 24)
        for line, detail in enumerate(details):
            self.text(EDGE, self.y + 26 + 19 * line, detail, 14, SOFT, LABELS - 24)
        if bar:
            self.bar(EDGE, self.y + 36 + 19 * len(details), *bar)
        for column, pictures in enumerate(columns):
            self.strip(column, pictures)
        self.y += max(self.strip_height, 62) + 12

    def method_in_columns(self, group, ratios):
        """One method, a column for each question."""
        self.text(EDGE, self.y, spaced(group[0].setting), 20, ACCENT)
        self.y += 34
        for exhibit in self.exhibits(group, ratios):
            self.row(exhibit.label, [exhibit.detail], exhibit.pictures, exhibit.bar)
        self.y += 16

    def method_in_rows(self, group, ratios):
        """One method, a row for each question."""
        exhibits = self.exhibits(group, ratios)
        name, _, changes = group[0].setting.partition(",")
        self.text(EDGE, self.y, name, 20, ACCENT, LABELS - 24)
        self.text(EDGE, self.y + 27, spaced(changes), 14, SOFT, LABELS - 24)
        for x, exhibit in zip(self.columns, exhibits):
            self.text(x, self.y, exhibit.label, 16, INK, self.strip_width)
            if exhibit.bar:
                self.bar(x, self.y + 31, *exhibit.bar)
            else:
                self.text(x, self.y + 24, exhibit.detail, 14, SOFT, self.strip_width)
        self.y += 50
        for index, (item, colour) in enumerate(zip(group, colours_of(len(group)))):
            for line, text in enumerate(
                wrapped(quoted(item.question), ImageFont.load_default(17), LABELS - 24, lines=5)
            ):
                self.text(EDGE, self.y + 22 * line, text, 17, colour)
            for column, exhibit in enumerate(exhibits):
                self.strip(column, exhibit.pictures[index])
            self.y += max(self.strip_height, 112) + 12
        self.y += 20

    def exhibits(self, group, ratios) -> list:
        """The keep ratios of a method, the order of its picks, and what it looks at."""
        first, found = group[0], []
        for ratio in ratios:
            step = first.step(ratio)
            pictures = [self.kept(item, item.masks[step]) for item in group]
            found.append(Exhibit(f"keep {ratio:g}", f"{first.counts[step]} of {first.num_tokens} tokens", pictures))
        pictures = [self.order(item) for item in group]
        if all(item.exact for item in group):
            detail = "the first nine numbered" if self.numbered(first) else "bright: picked early"
            found.append(Exhibit("order of the picks", detail, pictures, (ORDER, "first", "last")))
        else:
            bar = (ORDER, "small ratio", "large")
            found.append(Exhibit("first ratio that keeps it", "bright: stays at small ratios", pictures, bar))
        if all(item.look is not None for item in group):
            looks = np.concatenate([item.look for item in group])
            low, high = looks.min(), looks.max()  # one scale for all questions
            pictures = [self.clouded(item, colour_of(item.look, HEAT, low, high)) for item in group]
            bar = (HEAT, f"{low:.2g}", f"{high:.2g}")
            found.append(Exhibit(LOOKS[first.look_name], "what it compares tokens by", pictures, bar))
        return found

    def changes(self, pairs, ratio: float, num_methods: int):
        """What another question changes, method by method."""
        self.rule()
        self.y += 18
        self.text(EDGE, self.y, "What changes with the question", 24)
        self.y += 40
        if pairs:
            left, right, *_ = self.columns
            self.text(
                left, self.y, f"kept at {ratio:g}: by both (white), by one (blue, orange)", 14, SOFT, self.strip_width
            )
            self.text(right, self.y, "compared by: higher for the first, the second", 14, SOFT, self.strip_width)
            self.y += 24
        for first, second in pairs:
            step = first.step(ratio)
            a, b = first.masks[step], second.masks[step]
            columns = [self.kept_by_two(first, a, b)]
            if first.look is not None and second.look is not None:
                change = second.look - first.look
                sides = np.where(change[:, None] > 0, SECOND, FIRST).astype(np.uint8)
                columns.append(self.clouded(first, sides, 0.9 * np.abs(change) / max(np.abs(change).max(), 1e-12)))
            name, _, changes = first.setting.partition(",")
            details = [spaced(changes)] if changes else []
            self.row(name, [*details, f"{int((a & b).sum())} of {int(a.sum())} kept by both"], columns)
        if len(pairs) < num_methods:
            text = "Every method chooses" if not pairs else "The other methods choose"
            self.text(EDGE, self.y, f"{text} the same tokens for both questions.", 15, SOFT)
            self.y += 30

    def foot(self, num_ratios: int):
        self.rule()
        lines = (
            "Bright patches stay, dimmed ones are dropped; a merged token is drawn where the token was whose place it takes."
            " Pictures are the pixels that the model sees.",
            f"Order: each method was run at {num_ratios} keep ratios. Where each choice contains the smaller one, and"
            " tokens come in one by one, that is the order of the picks; otherwise the colour is the smallest ratio at"
            " which a token stays.",
        )
        self.y += 14
        font = ImageFont.load_default(14)
        for text in (text for line in lines for text in wrapped(line, font, self.width - 2 * EDGE, lines=9)):
            self.text(EDGE, self.y, text, 14, SOFT)
            self.y += 21

    # -- pictures of one trace ---------------------------------------------------------------------------------------

    def kept(self, item, mask):
        pictures = []
        for index, part in enumerate(item.panel_slices):
            dimmed = Image.eval(self.grey[index], lambda value: int(value * DIMMED))
            picture = Image.composite(self.bright[index], dimmed, self.cells(item, index, 255 * mask[part]))
            self.outline(picture, item.grids[index], mask[part], ACCENT)
            pictures.append(picture)
        return pictures

    def kept_by_two(self, item, a, b):
        """What either of two choices keeps; a colour for each where only one does."""
        pictures = self.kept(item, a | b)
        for index, (part, grid) in enumerate(zip(item.panel_slices, item.grids)):
            for only, colour in ((a & ~b, FIRST), (b & ~a, SECOND), (a & b, BOTH)):
                tint = 0 if colour is BOTH else 255 * TINT
                pictures[index].paste(colour, (0, 0), self.cells(item, index, tint * only[part]))
                self.outline(pictures[index], grid, only[part], colour, 1 if colour is BOTH else 2)
        return pictures

    def clouded(self, item, colours, strength=None):
        """The panels in grey under one colour for each token."""
        strength = np.full(item.num_tokens, CLOUD) if strength is None else strength
        pictures = []
        for index, (part, grid) in enumerate(zip(item.panel_slices, item.grids)):
            cloud = Image.fromarray(colours[part].reshape(*grid, 3)).resize(self.sizes[index], Image.Resampling.NEAREST)
            base = Image.eval(self.grey[index], lambda value: int(value * (1 if strength.min() == CLOUD else 0.35)))
            pictures.append(Image.composite(cloud, base, self.cells(item, index, 255 * strength[part])))
        return pictures

    def order(self, item):
        """Early picks bright; where the order is known pick by pick, the first nine in each set with their numbers."""
        last = len(item.ratios) - 1
        values = item.entry / max(1, last)
        pictures = self.clouded(item, colour_of(np.sqrt(values), ORDER, 0, 1))
        for picture, part, (height, width) in zip(pictures, item.panel_slices, item.grids):
            if not self.numbered(item):
                break
            cell = min(picture.height / height, picture.width / width)
            draw, font = ImageDraw.Draw(picture), ImageFont.load_default(min(22, 0.72 * cell))
            for index in np.flatnonzero(item.rank[part] <= 9):
                row, column = divmod(int(index), width)
                centre = ((column + 0.5) * picture.width / width, (row + 0.5) * picture.height / height)
                draw.text(centre, str(item.rank[part][index]), fill=(10, 20, 24), font=font, anchor="mm")
        return pictures

    def numbered(self, item) -> bool:
        """Whether there is an order, and room in every patch to write it."""
        sides = [min(size[0] / width, size[1] / height) for size, (height, width) in zip(self.sizes, item.grids)]
        return item.exact and min(sides) >= 11

    def cells(self, item, index: int, values) -> Image.Image:
        values = np.asarray(values).astype(np.uint8).reshape(item.grids[index])
        return Image.fromarray(values).resize(self.sizes[index], Image.Resampling.NEAREST)

    @staticmethod
    def outline(picture, grid, mask, colour, width_of_line=1):
        height, width = grid
        if min(picture.height / height, picture.width / width) < 9:
            return
        draw = ImageDraw.Draw(picture)
        for index in np.flatnonzero(mask):
            row, column = divmod(int(index), width)
            box = [column * picture.width / width, row * picture.height / height]
            box += [(column + 1) * picture.width / width - 1, (row + 1) * picture.height / height - 1]
            draw.rectangle(box, outline=colour, width=width_of_line)


def quoted(question: str) -> str:
    return f"\u201c{question}\u201d" if question.strip() else "(no question)"


def spaced(setting: str) -> str:
    return ", ".join(setting.split(","))


def colours_of(num_questions: int) -> tuple:
    return (FIRST, SECOND) if num_questions == 2 else (INK,) * num_questions


def wrapped(text: str, font, width: float, lines: int) -> list:
    """`text` in at most so many lines, the last of them cut."""
    done, words = [], text.split()
    while words and len(done) < lines - 1:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        done.append(shorten(" ".join(words[:taken]), font, width))
        words = words[taken:]
    return done + ([shorten(" ".join(words), font, width)] if words else [])


def shorten(text: str, font, width: float) -> str:
    """`text`, cut so that it fits."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "\u2026") > width:
        text = text[:-1]
    return text.rstrip() + "\u2026"
