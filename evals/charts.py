"""Line charts: the curves of a training run, and the figures of the miniature's studies; grids of images."""
import json
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from checkpoint import atomic_write

INK = ("#2b59c3", "#d1495b", "#2a9d54", "#e08a1e", "#7b4bb7", "#555555")


def ticks(low, high, most=6):
    """Round numbers between low and high, at most `most` of them and their step 1, 2 or 5 times a power
    of ten."""
    base = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * base for m in (1, 2, 5, 10, 20) if (high - low) / (m * base) <= most - 1)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Chart:
    """One line chart on a larger image: its corner (x0, y0), its plotting area and the range of its axes.

    All is drawn `fine` times as large as it will be: Pillow has no soft edges.
    """

    def __init__(self, pen, corner, size, curves, below, fine):
        (x0, y0), (width, height), self.pen, self.fine = corner, size, pen, fine
        self.font = ImageFont.load_default(12 * fine)
        self.left, self.right = x0 + 62, x0 + width - 16
        self.top, self.bottom = y0 + (52 if len(curves) > 1 else 34), y0 + height - (46 if below else 28)
        points = np.array([p for curve in curves.values() for p in curve], dtype=float)             # (n, 4)
        (first, last), (low, high) = ((v.min(), v.max()) for v in (points[:, 0], points[:, 1:]))
        low = 0.0 if 0 <= low < high / 2 else low  # else more than half of the axis would be cut off
        last, high = (b if b > a else a + (abs(a) or 1.0) for a, b in ((first, last), (low, high)))
        self.first, self.last = first, last
        self.low, self.high = low - 0.05 * (high - low) * (low != 0), high + 0.05 * (high - low)

    def at(self, x, y):
        """Data -> pixels of the fine image."""
        across, up = (x - self.first) / (self.last - self.first), (y - self.low) / (self.high - self.low)
        return (self.fine * (self.left + (self.right - self.left) * across),
                self.fine * (self.bottom - (self.bottom - self.top) * up))

    def line(self, points, ink, width=1):
        """A line through pixels of the fine image."""
        self.pen.line(points, ink, width * self.fine, "curve")

    def write(self, x, y, text, anchor, ink="#333333"):
        """Text at a pixel of the image."""
        self.pen.text((self.fine * x, self.fine * y), text, ink, self.font, anchor)

    def axes(self):
        """Grid lines, ticks and axes."""
        for y in ticks(self.low, self.high):
            self.line([self.at(self.first, y), self.at(self.last, y)], "#e4e4e4")
            self.write(self.left - 7, self.at(self.first, y)[1] / self.fine, f"{y:.6g}", "rm")
        for x in ticks(self.first, self.last):
            foot = self.at(x, self.low)
            self.line([foot, (foot[0], self.fine * (self.bottom + 4))], "#999999")
            self.write(foot[0] / self.fine, self.bottom + 7, f"{x:.6g}", "mt")
        corners = (self.first, self.high), (self.first, self.low), (self.last, self.low)
        self.line([self.at(*corner) for corner in corners], "#999999")

    def curve(self, points, ink):
        """Points (x, low, y, high): y as a line, low to high as a band behind it; few points as dots,
        too."""
        below = [self.at(x, low) for x, low, _, _ in points]
        above = [self.at(x, high) for x, _, _, high in reversed(points)]
        self.pen.polygon(below + above, ink + "30")
        line = [self.at(x, y) for x, _, y, _ in points]
        self.line(line, ink, 2)
        for x, y in line if len(line) <= 12 else ():
            r = 3 * self.fine
            self.pen.ellipse((x - r, y - r, x + r, y + r), ink)


def draw_charts(panels, columns=2, size=(560, 380), fine=3):
    """Line charts side by side -> PIL image. panels: [(title, words at the x axis, {label: [(x, low, y,
    high), ...]})].

    The y axis begins at zero where that leaves less than half of it empty.
    """
    (width, height), across, down = size, min(columns, len(panels)), math.ceil(len(panels) / columns)
    image = Image.new("RGB", (fine * width * across, fine * height * down), "white")
    pen = ImageDraw.Draw(image, "RGBA")
    for i, (title, below, curves) in enumerate(panels):
        x0, y0 = i % columns * width, i // columns * height
        chart = Chart(pen, (x0, y0), size, curves, below, fine)
        chart.axes()
        chart.write(x0 + 14, y0 + 10, title, "lt", "black")
        chart.write((chart.left + chart.right) / 2, y0 + height - 8, below, "mb")
        legend = x0 + 14
        for number, (label, points) in enumerate(curves.items()):
            ink = INK[number % len(INK)]
            chart.curve(points, ink)
            if len(curves) > 1:
                y = fine * (y0 + 38)
                chart.line([(fine * legend, y), (fine * (legend + 18), y)], ink, 3)
                chart.write(legend + 23, y0 + 38, label, "lm")
                legend += 38 + chart.font.getlength(label) / fine
    return image.reduce(fine)


def save_curves(log, path):
    """Every number of log.jsonl over the steps as a small line chart each, together on one PNG; numbers that
    no axis can hold are left out."""
    series = {}
    for row in map(json.loads, log.read_text("utf-8").splitlines()):
        for key, value in row.items():
            if isinstance(value, float) and abs(value) < 1e30:
                series.setdefault(key, []).append((row["step"], value))
    panels = []
    for key, points in series.items():
        if len(points) > 1:
            top = np.quantile([y for _, y in points], 0.98)          # spikes would hide the rest
            title = f"{key.lstrip('_')}: {points[-1][1]:.4g} at step {points[-1][0]}"
            panels.append((title, "", {key: [(x, *(min(y, top),) * 3) for x, y in points]}))
    if panels:
        with atomic_write(path) as temporary:
            draw_charts(panels, columns=3, size=(420, 220)).save(temporary, "PNG")


def save_grid(rows, path, columns=16, scale=2):
    """Rows of images (B, 3, H, W) in [0, 1], the first `columns` of each, as one PNG."""
    grid = torch.cat([torch.cat(list(row[:columns].float().cpu()), 2) for row in rows], 1)
    image = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
    with atomic_write(path) as temporary:
        image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(temporary, "PNG")
