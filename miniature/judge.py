"""The judge: what an image of the world shows, by rules on its pixels, and whether that is what a prompt
asked for.

The world is synthetic: a rule can read its images exactly, and no other network is needed. `eval.py judge`
measures how far these rules can be trusted. Generation is scored on the six skills of GenEval (arXiv
2310.11513) with that benchmark's rules; an entry is a dict with the fields of its evaluation_metadata.jsonl,
as `world.skill_prompts` has them. H, W are pixels; images are uint8 arrays (S, S, 3) unless a docstring says
otherwise.

Reading order: image -> Seen (judge) -> does it show what was asked (hits, fits) -> a table (summarise); then
captions.
"""
import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from checkpoint import Interval, typed
from evals.report import by_skill, read_records
from miniature import world

SIDE = 64                          # images of any size are judged at this one
CONTRAST = 40                      # least RGB distance of an object to the background; the palette's is 94
SPECK = 12                        # smaller pieces (pixels) are dropped; the world's smallest object has 147
COLOUR_RADIUS = 50                 # RGB distance beyond which a colour is none of the palette
SHARPEN = 2                        # steepens soft edges, wipes out noise and the ripples of JPEG beside them
GRID, SPAN = 32, 1.8               # shapes are compared on GRID^2 samples over +-SPAN area-equivalent radii
SCALES = (0.94, 1.0, 1.06)         # radii around the area-equivalent one at which each shape is tried
# Least overlap (IoU) with the rendered shape. Just under what JPEG leaves of the hardest colours (green,
# purple and orange on grey, which differ mostly in chroma). A diamond is 0.84 of a circle, a triangle upside
# down 0.70 of a triangle.
LEAST_IOU = {"circle": 0.85, "square": 0.82, "triangle": 0.78, "star": 0.68}
LEAST_OUTLINE = 0.9                # the same for an outline as it should be: round, straight, sharp corners
OUTLINE_SCALES, OUTLINE_SHIFTS = (0.94, 0.97, 1.0, 1.03, 1.06), (-0.5, 0.0, 0.5)   # tried for it; in pixels


# ---- pixels -> what is there ----------------------------------------------------------------------------

@dataclass(frozen=True)
class SeenObject:
    """An object as judged: world.py's names or "unknown"; x, y and area in units of the side.

    match: the IoU by which the shape was chosen; outline: the finer one of `outline_iou`.
    """
    shape: str
    colour: str
    size: str
    x: float
    y: float
    area: float
    match: float
    outline: float


@dataclass(frozen=True)
class Seen:
    """What the judge sees in an image: the background's name or "unknown"; the objects, best match first."""
    background: str
    objects: tuple


def nearest(colour, palette):
    """The palette's name of an RGB colour, or "unknown" where none is within COLOUR_RADIUS."""
    distances = np.sqrt(((np.array(list(palette.values())) - colour) ** 2).sum(1))
    return list(palette)[distances.argmin()] if distances.min() <= COLOUR_RADIUS else "unknown"


def components(mask, least):
    """The 4-connected pieces of a bool mask (H, W) with at least `least` pixels, as a list of masks.

    Every pixel takes the largest label around it, then the label of the pixel that this label names, until
    nothing changes: the second step makes the number of rounds logarithmic.
    """
    padded = np.pad(mask, 1)
    width, pixels = padded.shape[1], np.flatnonzero(padded)
    neighbours = pixels + np.array([[0], [1], [-1], [width], [-width]])
    label = np.arange(padded.size) * padded.ravel()         # a pixel's label is the number of some pixel
    while True:
        new = label[label[neighbours].max(0)]
        if (new == label[pixels]).all():
            break
        label[pixels] = new
    names, counts = np.unique(new, return_counts=True)
    label = label.reshape(padded.shape)[1:-1, 1:-1]
    return [label == name for name in names[counts >= least]]


def grow(mask):
    """A bool mask (H, W) and the four neighbours of all its pixels."""
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out


def find_pieces(distance):
    """Distance of each pixel to the background (H, W) -> masks of the objects.

    An object's edge lies where the distance falls to half of the largest nearby (7 x 7), whatever the
    colours: one absolute threshold would join bright neighbours before it finds pale ones.
    """
    peak = np.pad(distance, 3)
    peak = np.max([peak[i:i + len(distance)] for i in range(7)], 0)
    peak = np.max([peak[:, i:i + len(distance)] for i in range(7)], 0)
    return components((distance > CONTRAST) & (distance > peak / 2), SPECK)


def median_colour(image, mask):
    """The median RGB colour of a mask (H, W), without the mask's edge where more than 4 pixels remain."""
    core = ~grow(~mask)
    return np.median(image[core if core.sum() > 4 else mask], 0)


def sharpen(cover):
    """How much of each pixel is the object, (H, W), with edges that are steeper, but at the same place."""
    return np.clip(SHARPEN * (cover - 0.5) + 0.5, 0, 1)


def soft_mask(away, colour, ground, allowed):
    """How much of each pixel is the object, in [0, 1], (H, W): 0 is the background's colour, 1 the object's.

    away (H, W, 3) is the image minus the background's colour; pixels outside the bool mask `allowed` are 0.
    """
    toward = colour - ground
    cover = away @ toward / (toward @ toward)
    return sharpen(cover) * allowed


def equivalent_radius(shape):
    """Radius of the circle that has the area of the shape's outline at size 1."""
    x, y = world.OUTLINES[shape].T
    return math.sqrt(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 / math.pi)


def render_cover(corners, side):
    """Coverage (side, side), in [0, 1], of a polygon; its corners (K, 2) in pixels from the top left."""
    canvas = Image.new("L", (8 * side, 8 * side))
    ImageDraw.Draw(canvas).polygon((8 * corners - 0.5).ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(8), np.float32) / 255


def render_templates():
    """Coverage (4 shapes * len(SCALES), GRID, GRID) of the outlines, in area-equivalent radii."""
    return np.stack([render_cover((corners * scale / equivalent_radius(shape) / SPAN + 1) / 2 * GRID, GRID)
                     for shape, corners in world.OUTLINES.items() for scale in SCALES])


TEMPLATES = render_templates()
TEMPLATE_LEAST_IOU = np.repeat(list(LEAST_IOU.values()), len(SCALES))        # (4 shapes * len(SCALES),)


def match_shape(cover, x, y, radius):
    """A soft mask (H, W), its centre and area-equivalent radius in pixels -> the best (shape, IoU, scale).

    Best is the largest IoU relative to what its shape needs: blunted stars come too close to circles.
    """
    steps = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * SPAN * radius

    def weights(centre, length):                                  # bilinear samples of one axis, as a matrix
        return np.maximum(0, 1 - abs((centre + steps)[:, None] - np.arange(length)))     # (GRID, length)

    patch = weights(y, cover.shape[0]) @ cover @ weights(x, cover.shape[1]).T             # (GRID, GRID)
    total = patch.sum() + TEMPLATES.sum((1, 2))
    difference = abs(patch - TEMPLATES).sum((1, 2))
    ious = (total - difference) / (total + difference)             # sum of the minima over sum of the maxima
    best = int((ious / TEMPLATE_LEAST_IOU).argmax())
    return world.SHAPES[best // len(SCALES)], float(ious[best]), SCALES[best % len(SCALES)]


def contour(cover):
    """The inside (4 H, 4 W) of a soft mask's contour at one half, followed between its pixels (H, W)."""
    height, width = cover.shape
    return np.asarray(Image.fromarray(cover).resize((4 * width, 4 * height), Image.BILINEAR)) > 0.5


def outline_iou(cover, shape, x, y, radius):
    """The IoU of what the contours of a soft mask (H, W) and of a shape's true rendering enclose.

    x, y, radius: as `match_shape` takes them. The best scale there is tried at other centres, too. True
    renders have 0.93 or more, small stars least; a circle with waves of a tenth of its radius has 0.88.
    """
    reach = math.ceil(SPAN * radius)                                 # half of the window around the centre
    row, column = round(y), round(x)
    window = np.pad(cover, reach)[row:row + 2 * reach + 1, column:column + 2 * reach + 1].astype(np.float32)
    inside = contour(window)
    centre = np.array([x - column, y - row]) + reach + 0.5
    corners = world.OUTLINES[shape] * radius / equivalent_radius(shape)

    def iou(scale, dx=0.0, dy=0.0):
        true = contour(sharpen(render_cover(corners * scale + centre + (dx, dy), len(window))))
        return float(np.count_nonzero(inside & true) / np.count_nonzero(inside | true))

    scale = max(OUTLINE_SCALES, key=iou)
    dx = max(OUTLINE_SHIFTS, key=lambda dx: iou(scale, dx))
    return max(iou(scale, dx, dy) for dy in OUTLINE_SHIFTS)


def read_object(image, ground, piece, others):
    """One piece (H, W) of an image with this background -> SeenObject; `others`: all other pieces."""
    colour = median_colour(image, piece)
    cover = soft_mask(image - ground, colour, ground, grow(grow(piece)) & ~others)
    area = float(cover.sum())
    x, y = float(cover.sum(0) @ np.arange(SIDE)) / area, float(cover.sum(1) @ np.arange(SIDE)) / area
    radius = math.sqrt(area / math.pi)
    shape, match, scale = match_shape(cover, x, y, radius)
    unit = radius * scale / equivalent_radius(shape) / SIDE      # radius of the outline in units of the side
    size = min(world.SIZES, key=lambda name: abs(math.log(unit / world.SIZES[name])))
    outline = outline_iou(cover, shape, x, y, radius)
    shape = shape if match >= LEAST_IOU[shape] else "unknown"
    return SeenObject(shape, nearest(colour, world.COLOURS), size, (x + 0.5) / SIDE, (y + 0.5) / SIDE,
                      area / SIDE ** 2, match, outline)


def judge(image):
    """What an image of the world shows: uint8 (S, S, 3), any S -> Seen.

    The background is the border's median. Each connected piece that differs from it gets the palette's
    colour nearest to its eroded median, and the shape whose rendering it overlaps best; a piece that no
    colour or shape fits well enough is "unknown" in that respect, so that blobs don't count. Raises
    ValueError for another form of array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1] or image.dtype != np.uint8:
        raise ValueError(f"the judge takes square uint8 images (S, S, 3), not {image.dtype} {image.shape}")
    if len(image) != SIDE:
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.BOX))
    image = image.astype(np.float32)
    ground = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), 0)          # (3,)
    pieces = find_pieces(np.sqrt(((image - ground) ** 2).sum(2)))
    everything = np.any(pieces, 0)
    objects = [read_object(image, ground, piece, everything & ~piece) for piece in pieces]
    return Seen(nearest(ground, world.BACKGROUNDS), tuple(sorted(objects, key=lambda o: -o.match)))


def agrees(scene, seen, attributes=("shape", "colour", "size")):
    """Does the judge see just the scene's background and objects, with these attributes, within 0.05?"""
    def same(true, judged):
        return (math.hypot(true.x - judged.x, true.y - judged.y) < 0.05
                and all(getattr(true, a) == getattr(judged, a) for a in attributes))
    return (seen.background == scene.background and len(seen.objects) == len(scene.objects)
            and all(any(same(true, judged) for judged in seen.objects) for true in scene.objects))


# ---- genEval's rules ------------------------------------------------------------------------------------

def relations(a, b):
    """The set of world.RELATIONS that hold from `a` to `b`, by GenEval's rule: less a margin of a tenth of
    both diameters, over half of the distance lies along that axis. A diagonal can be two at once."""
    offset = np.array([a.x - b.x, a.y - b.y])
    margin = 0.1 * 2 * (math.sqrt(a.area / math.pi) + math.sqrt(b.area / math.pi))
    rest = np.maximum(abs(offset) - margin, 0) * np.sign(offset) / max(np.linalg.norm(offset), 1e-9)
    return {name for name, direction in world.RELATIONS.items() if rest @ np.array(direction) > 0.5}


def lies_as_asked(clause, group, groups):
    """Do the objects of a clause lie as its "position" asks to all those of the clause that it names?"""
    relation, other = clause.get("position", (None, None))
    return relation is None or all(relation in relations(a, b) for a in group for b in groups[other])


def hits(entry, seen):
    """Does a judged image show what an entry asks? GenEval's rules.

    Each clause of "include" needs `count` objects of its class: the surest ones (best match) are taken, and
    they must have the colour asked for and lie as asked to those of the clause that "position" names. Other
    objects are allowed, except that counting prompts want exactly `count` of the class.
    """
    groups = []
    for clause in entry["include"]:
        of_class = [o for o in seen.objects if o.shape == clause["class"]]
        group = of_class[:clause["count"]]
        if len(group) < clause["count"] or (entry["tag"] == "counting" and len(of_class) > clause["count"]):
            return False
        if any(o.colour != clause.get("color", o.colour) for o in group):
            return False
        if not lies_as_asked(clause, group, groups):
            return False
        groups.append(group)
    return True


def fits(entry, seen):
    """Does a judged image show exactly what an entry asks: as many objects as its clauses together, those of
    each with its class, and the colour, size, background and place that are asked for? Clauses may differ in
    colour alone."""
    if seen.background != entry.get("background", seen.background):
        return False
    groups = []
    for clause in entry["include"]:
        group = [o for o in seen.objects if o.shape == clause["class"]
                 and o.colour == clause.get("color", o.colour) and o.size == clause.get("size", o.size)]
        if len(group) != clause["count"] or not lies_as_asked(clause, group, groups):
            return False
        groups.append(group)
    return len(seen.objects) == sum(map(len, groups))


def count_asked(entry):
    """The number of objects that all clauses of an entry ask for together; without "count" it is one."""
    return sum(clause.get("count", 1) for clause in entry["include"])


def hits_strictly(entry, seen):
    """`hits`, and nothing else is in the image: not one object more, known or unknown."""
    return hits(entry, seen) and len(seen.objects) == count_asked(entry)


def outlines_are_true(seen):
    """Are all objects of a judged image as round, straight and pointed as their shapes are?"""
    return all(o.outline >= LEAST_OUTLINE for o in seen.objects)


def colours_fit(entry, seen):
    """Are there as many objects as an entry asks, its colours among theirs, whatever their shapes?"""
    asked = Counter()
    for clause in entry["include"]:
        if "color" in clause:
            asked[clause["color"]] += clause["count"]
    return len(seen.objects) == count_asked(entry) and asked <= Counter(o.colour for o in seen.objects)


class Verdict(NamedTuple):
    """An image under its entry: GenEval's verdict; the strict one (nothing else is in the image); do the
    colours fit? outline: a hit whose objects, asked for or not, all have true outlines (LEAST_OUTLINE)."""
    hit: bool
    strict: bool
    outline: bool
    colours: bool


def judge_all(entries, seen):
    """Judged images, one entry each -> Verdicts. Entries of no GenEval skill must fit exactly."""
    verdicts = []
    for entry, image in zip(entries, seen, strict=True):
        if entry["tag"] in world.SKILLS:
            hit, strict = hits(entry, image), hits_strictly(entry, image)
        else:
            hit = strict = fits(entry, image)
        verdicts.append(Verdict(hit, strict, hit and outlines_are_true(image), colours_fit(entry, image)))
    return verdicts


def summarise(entries, verdicts):
    """Entries and their Verdicts -> the table of `by_skill`, beside it the rates "strict", "outline" and
    "colours"."""
    tags = [entry["tag"] for entry in entries]
    hit, *others = (by_skill(tags, column) for column in zip(*verdicts))
    return {skill: row | {name: table[skill]["score"] for name, table in zip(Verdict._fields[1:], others)}
            for skill, row in hit.items()}


def score_renders(entries, images):
    """uint8 images (H, W, 3) and one entry for each -> the table of `summarise`."""
    return summarise(entries, judge_all(entries, map(judge, images)))


def scene_for(entry, rng):
    """A Scene that shows exactly what an entry asks; what it leaves open is drawn at random.

    Open colours avoid HELD_OUT pairs. Three and more objects are small, as in the world.
    """
    clauses = entry["include"][::-1]             # the clause with a position, the last, comes first
    relation = clauses[0].get("position", (None,))[0] if clauses else None
    background = entry.get("background") or world.pick(rng, list(world.BACKGROUNDS))
    for _ in range(1000 if clauses else 0):
        kinds = []
        for clause in clauses:
            open_colours = [c for c in world.COLOURS if (c, clause["class"]) not in world.HELD_OUT]
            colour = clause.get("color") or world.pick(rng, open_colours)
            size = clause.get("size") or ("small" if clause["count"] > 2 else None)
            size = size or world.pick(rng, list(world.SIZES))
            kinds += [(clause["class"], colour, size)] * clause["count"]
        objects = world.place(kinds, rng, relation)
        if objects:
            return world.Scene(background, objects)
    if clauses:
        raise ValueError(f"what {entry['prompt']!r} asks for has no room in an image of the world")
    return world.Scene(background, ())


CLAUSE = {"class": str, "count": int, "color": str, "size": str, "position": list[str | int]}


def clause_is_known(clause, number, where):
    """Can the world show what clause `number` of an entry asks? ValueError, which begins with `where`, for
    what is of a wrong type."""
    clause = typed(clause, dict, Interval(), where)
    values = {name: typed(clause[name], hint, Interval(0, 10 ** 9), f"{where}: {name}")
              for name, hint in CLAUSE.items() if name in clause}
    if values.get("color", "red") not in world.COLOURS:
        return False
    if "position" in values:
        position = values["position"]
        if len(position) != 2 or position[0] not in world.RELATIONS or position[1] not in range(number):
            return False
    return (values.get("count", 0) > 0 and values.get("class") in world.SHAPES
            and values.get("size", "small") in world.SIZES)


def read_entries(path):
    """Prompts of one's own: a file with the fields of world.skill_prompts; a clause may also have "size", an
    entry "background". Raises ValueError where one asks for what this world or this judge doesn't have."""
    entries = read_records(path, {"tag": str, "prompt": str, "include": list})
    for number, entry in enumerate(entries, 1):
        where = f"entry {number} of {path}"
        ground = typed(entry.get("background", "black"), str, Interval(), f"{where}: background")
        known = entry["tag"] not in world.SKILLS and ground in world.BACKGROUNDS
        if not known or not all(clause_is_known(clause, at, f"{where}: include[{at}]")
                                for at, clause in enumerate(entry["include"])):
            raise ValueError(f"{where} asks for what the judge doesn't know, or has a skill's tag")
        if not entry["prompt"].strip():
            raise ValueError(f"{where} has an empty prompt")
    return entries


# ---- is a caption true? ---------------------------------------------------------------------------------

SIZE_WORDS = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"}
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
RELATION_WORDS = {**{r: r for r in world.RELATIONS}, "under": "below", "to the left of": "left of",
                  "to the right of": "right of"}
GROUND = "|".join(world.BACKGROUNDS)
PHRASE = re.compile(
    rf"\b({'|'.join(COUNTS)}) (?:({'|'.join(SIZE_WORDS)}) )?(?:({'|'.join(world.COLOURS)}) )?"
    rf"({'|'.join(world.SHAPES)})s?\b"
    r"( in the (?:top|bottom) (?:left|right) corner| on the (?:left|right)| at the (?:top|bottom)"
    r"| in the middle)?")
SENTENCE = re.compile(             # each # is a noun phrase
    rf"(?:a ({GROUND}) background with )?(?:(?:a picture|a photo|an image) of |there is |there are )?"
    rf"(?:#(?:, #)*(?: and #)?|# ({'|'.join(RELATION_WORDS)}) #)"
    rf"(?: on (?:an? )?({GROUND})(?: background)?)?")


def caption_truth(text, scene):
    """(objects, details): is a caption true of a scene, in its objects and in everything it says?

    It must be a sentence of world.caption's grammar, in any case and with or without a full stop; else both
    are False. objects: its noun phrases, counted out ("two red circles" is two), can be paired with the
    scene's objects one to one, none left over on either side, such that each has the shape and, where it
    names one, the colour of its object. details: such a pairing exists in which every size, region, relation
    and background that is named is right as well.
    """
    text = text.strip().lower().removesuffix(".")
    sentence = SENTENCE.fullmatch(PHRASE.sub("#", text))
    phrases = [phrase for number, *phrase in PHRASE.findall(text) for _ in range(COUNTS[number])]
    if not sentence or len(phrases) != len(scene.objects):
        return False, False
    ground_before, relation, ground_after = sentence.groups()
    ground = {ground_before, ground_after} <= {None, scene.background}
    any_objects = any_details = False
    for order in itertools.permutations(scene.objects):
        pairs = list(zip(phrases, order))
        if not all(shape == o.shape and colour in ("", o.colour) for (_, colour, shape, _), o in pairs):
            continue
        any_objects = True
        sizes = all(SIZE_WORDS.get(size, o.size) == o.size for (size, _, _, _), o in pairs)
        regions = all(region.strip() in ("", world.region(o)) for (_, _, _, region), o in pairs)
        related = relation is None or (len(order) == 2
                                       and world.relation(*order) == RELATION_WORDS[relation])
        any_details |= ground and sizes and regions and related
    return any_objects, any_details
