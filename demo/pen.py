"""A small drawing kit on top of PIL. Shapes are drawn four times as large and shrunk at the end, to antialias them."""

import math

from PIL import Image, ImageDraw

SIZE = 64
SCALE = 4

WHITE, BLACK, INK = (250, 250, 250), (30, 30, 34), (52, 40, 40)


def shade(colour, factor):
    return tuple(max(0, min(255, round(c * factor))) for c in colour)


class Pen:
    """PIL's drawing calls in picture coordinates (0..64), moved by (dx, dy)."""

    def __init__(self, background):
        self.image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), background)
        self.draw = ImageDraw.Draw(self.image)
        self.dx = self.dy = 0.0

    def _at(self, points):
        return [((x + self.dx) * SCALE, (y + self.dy) * SCALE) for x, y in points]

    def corners(self, x0, y0, x1, y1):
        return self._at([(x0, y0), (x1, y1)])

    def box(self, x0, y0, x1, y1, fill, radius=0.0):
        self.draw.rounded_rectangle(self.corners(x0, y0, x1, y1), radius * SCALE, fill)

    def oval(self, x, y, rx, ry, fill):
        self.draw.ellipse(self.corners(x - rx, y - ry, x + rx, y + ry), fill)

    def poly(self, *points, fill):
        self.draw.polygon(self._at(points), fill)

    def line(self, *points, fill, width=1.0):
        self.draw.line(self._at(points), fill, round(width * SCALE), joint="curve")

    def arc(self, x, y, rx, ry, start, end, fill, width=1.0):
        box = self.corners(x - rx, y - ry, x + rx, y + ry)
        self.draw.arc(box, start, end, fill, round(width * SCALE))

    def star(self, x, y, radius, fill):
        tips = [(x + math.sin(i * math.pi / 5) * radius * (1 if i % 2 == 0 else 0.42),
                 y - math.cos(i * math.pi / 5) * radius * (1 if i % 2 == 0 else 0.42))
                for i in range(10)]
        self.poly(*tips, fill=fill)

    def finished(self):
        return self.image.resize((SIZE, SIZE), Image.Resampling.BOX)
