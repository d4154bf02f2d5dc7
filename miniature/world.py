"""The synthetic world: images of one to four plain objects, or of a word, about which everything is known.

Scenes are pure functions of (seed, index). Everything else is a function of a scene and of an `rng`, a
`numpy.random.Generator`; the order of its draws is fixed, for recorded numbers depend on it.

Reading order: scenes -> images -> captions -> reading and rewriting captions -> query targets -> edits and
perturbations -> questions -> prompts that score a model.
"""
import itertools
import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

from data import DESCRIBE, GENERATE, MATCH, SYSTEM

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {"red": (222, 45, 45), "orange": (245, 140, 25), "yellow": (240, 218, 55),
           "green": (45, 165, 75), "blue": (45, 85, 220), "purple": (150, 60, 190)}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (135, 135, 135), "black": (15, 15, 15)}
SIZES = {"small": 0.125, "large": 0.195}    # radius of a circle of that size; unit: the side of the image
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}    # (x, y), b to a
NUMBERS = ("no", "one", "two", "three", "four")
HELD_OUT = {("purple", "triangle"), ("orange", "star"), ("green", "square")}    # never in a training image
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
TRAINING_PAIRS = [pair for pair in PAIRS if pair not in HELD_OUT]


# ---- Scenes ----------------------------------------------------------------------------------------------
def arc(x, y, rx, ry, start, end):
    """Points of an ellipse around (x, y) from one angle to another, in degrees clockwise from the right."""
    angles = [math.radians(angle) for angle in np.linspace(start, end, 25)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


# Letters that stay apart at 64 pixels, as strokes: lists of points in a unit square, y down.
GLYPHS = {
    "A": [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.65), (0.8, 0.65)]],
    "C": [arc(0.55, 0.5, 0.55, 0.5, 315, 45)],
    "E": [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.85, 0.5)]],
    "H": [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(0, 0.5), (1, 0.5)]],
    "I": [[(0.5, 0), (0.5, 1)]],
    "K": [[(0, 0), (0, 1)], [(1, 0), (0, 0.55), (1, 1)]],
    "L": [[(0, 0), (0, 1), (1, 1)]],
    "N": [[(0, 1), (0, 0), (1, 1), (1, 0)]],
    "O": [arc(0.5, 0.5, 0.5, 0.5, 0, 360)],
    "P": [[(0, 1), (0, 0), *arc(0.5, 0.28, 0.5, 0.28, -90, 90), (0, 0.56)]],
    "T": [[(0, 0), (1, 0)], [(0.5, 0), (0.5, 1)]],
    "U": [[(0, 0), *arc(0.5, 0.6, 0.5, 0.4, 180, 0), (1, 0)]],
    "X": [[(0, 0), (1, 1)], [(1, 0), (0, 1)]],
    "Y": [[(0, 0), (0.5, 0.5), (1, 0)], [(0.5, 0.5), (0.5, 1)]]}
LETTER, GAP, STROKE = (0.27, 0.38), 0.12, 0.08    # (width, height) of a letter, gap, width of a stroke
TWO_LETTERS = [first + second for first in GLYPHS for second in GLYPHS]
HELD_OUT_WORDS = {word for i, word in enumerate(TWO_LETTERS) if i % 9 == 4}    # never in a training image


def pick(rng, options):
    """One of a sequence, evenly (rng.choice is ten times slower on small lists)."""
    return options[int(rng.integers(len(options)))]


def outline(shape):
    """Corners (K, 2) of a shape of size 1, x to the right, y down; every area is nearly the unit circle's.

    A circle is a 48-gon. The star's arms are long: at 16 pixels, blunt ones look like circles.
    """
    radii, start = {"circle": ([1.0] * 48, 0), "square": ([1.25] * 4, np.pi / 4),
                    "triangle": ([1.45] * 3, -np.pi / 2), "star": ([1.4, 0.56] * 5, -np.pi / 2)}[shape]
    angles = start + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.asarray(radii)[:, None]


OUTLINES = {shape: outline(shape) for shape in SHAPES}
REACH = {shape: float(np.linalg.norm(corners, axis=1).max()) for shape, corners in OUTLINES.items()}


@dataclass(frozen=True)
class Object:
    """Names from SHAPES, COLOURS and SIZES; centre (x, y) in units of the image's side, y down."""
    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def reach(self):
        """Distance from the centre to the farthest corner."""
        return SIZES[self.size] * REACH[self.shape]


@dataclass(frozen=True)
class Word:
    """Two of the GLYPHS in one colour; centre (x, y) like an `Object`'s."""
    text: str
    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """A background and `Object`s that touch neither each other nor the border; or a `Word` alone."""
    background: str
    objects: tuple
    word: Word | None = None


def relation(a, b):
    """Where `a` lies, seen from `b`: one of RELATIONS, or None where neither axis clearly dominates."""
    dx, dy = a.x - b.x, a.y - b.y
    shorter, longer = sorted((abs(dx), abs(dy)))
    if longer < 0.15 or shorter > 0.7 * longer:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def region(obj):
    """Where in the image an object lies: one of the nine REGIONS."""
    column = "left" if obj.x < 0.36 else "right" if obj.x > 0.64 else ""
    row = "top" if obj.y < 0.36 else "bottom" if obj.y > 0.64 else ""
    if row and column:
        return f"in the {row} {column} corner"
    if column:
        return f"on the {column}"
    return f"at the {row}" if row else "in the middle"


def apart(a, b):
    """Do the circles around two objects leave a gap between them?"""
    return math.hypot(a.x - b.x, a.y - b.y) > a.reach + b.reach + 0.03


def place(kinds, rng, wanted=None):
    """A tuple of `Object`s without contact for [(shape, colour, size)], or None after 60 tries.

    `wanted` (one of RELATIONS): how the first shall lie relative to the second.
    """
    margin = np.array([SIZES[size] * REACH[shape] + 0.02 for shape, _, size in kinds])[:, None]    # (K, 1)
    centres = margin + (1 - 2 * margin) * rng.random((60, len(kinds), 2))    # (60, K, 2)
    for attempt in centres.round(4).tolist():
        objects = tuple(Object(*kind, *centre) for kind, centre in zip(kinds, attempt))
        if not all(apart(a, b) for a, b in itertools.combinations(objects, 2)):
            continue
        if wanted is None or relation(objects[0], objects[1]) == wanted:
            return objects
    return None


def make_scene(seed, index, novel=False, most=4):
    """Scene number `index` of the world `seed`, with at most `most` objects: a pure function of these.

    A quarter of the scenes shows one object, the others two different ones, several alike, or three or four.
    Training scenes (novel=False) never show a HELD_OUT pair of colour and shape; novel ones always do.
    """
    rng = np.random.default_rng((seed, index, int(novel)))
    layouts = ("one", "two", "alike", "three", "four")
    while True:
        layout = layouts[int(np.searchsorted([0.26, 0.68, 0.88, 0.96], rng.random()))]
        several = int(rng.integers(2, 5))
        count = {"one": 1, "two": 2, "alike": several, "three": 3, "four": 4}[layout]
        if count > most:
            continue
        pairs = [pick(rng, TRAINING_PAIRS) for _ in range(count)]
        if novel:
            held_out = pick(rng, sorted(HELD_OUT))
            pairs[int(rng.integers(count))] = held_out
        if layout == "alike":
            pairs = [pairs[0]] * count
            if novel and pairs[0] not in HELD_OUT:
                continue
        sizes = [pick(rng, list(SIZES)) for _ in range(count)]
        if layout == "alike":
            sizes = [sizes[0]] * count
        if count >= 3:    # four large ones don't fit
            sizes = ["small"] * count
        related = layout == "two" and rng.random() < 0.8
        wanted = pick(rng, list(RELATIONS)) if related else None
        kinds = [(shape, colour, size) for (colour, shape), size in zip(pairs, sizes)]
        objects = place(kinds, rng, wanted)
        if objects:
            return Scene(pick(rng, list(BACKGROUNDS)), objects)


def make_word(seed, index, novel=False):
    """Scene number `index` with a word; novel ones show HELD_OUT_WORDS, the others never do."""
    rng = np.random.default_rng((seed, index, 2 + novel))
    text = pick(rng, [word for word in TWO_LETTERS if (word in HELD_OUT_WORDS) == novel])
    x, y = (0.5 + (2 * rng.random(2) - 1) * (0.12, 0.2)).round(4).tolist()
    background = pick(rng, list(BACKGROUNDS))
    return Scene(background, (), Word(text, pick(rng, list(COLOURS)), x, y))


# ---- Images ----------------------------------------------------------------------------------------------
def strokes(word):
    """The strokes of a `Word`, one array of points (K, 2) at a time, in units of the image's side."""
    width, height = LETTER
    for i, letter in enumerate(word.text):
        left = word.x + (i - len(word.text) / 2) * (width + GAP) + GAP / 2
        for points in GLYPHS[letter]:
            yield np.array(points) * LETTER + (left, word.y - height / 2)


def render(scene, size=64):
    """The image of a scene, uint8 (size, size, 3): drawn at four times the size, then averaged."""
    big = 4 * size
    image = Image.new("RGB", (big, big), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    for obj in scene.objects:
        corners = (OUTLINES[obj.shape] * SIZES[obj.size] + (obj.x, obj.y)) * big - 0.5
        pen.polygon([tuple(corner) for corner in corners], fill=COLOURS[obj.colour])
    if scene.word:
        colour, radius = COLOURS[scene.word.colour], STROKE * big / 2
        for stroke in strokes(scene.word):
            points = [tuple(point) for point in stroke * big - 0.5]
            pen.line(points, colour, round(2 * radius), joint="curve")
            for x, y in (points[0], points[-1]):    # round ends
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    return np.asarray(image.reduce(4))


# ---- Captions --------------------------------------------------------------------------------------------
WORDS_OF_SIZE = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
WORDS_OF_RELATION = {"left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
                     "above": ("above",), "below": ("below", "under")}


def article(phrase):
    """A noun phrase with 'a' or 'an' in front."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def join(phrases):
    """['x', 'y', 'z'] -> 'x, y and z'."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def noun(obj, colour=True, size=False, size_words=None):
    """'large red circle' with the attributes asked for; `size_words`: synonyms for 'small' and 'large'."""
    size_word = (size_words or {}).get(obj.size, obj.size)
    return " ".join(filter(None, [size and size_word, colour and obj.colour, obj.shape]))


def caption(scene, rng, long=None):
    """One English caption, exactly true of the scene; wording and left-out attributes are random.

    Short ones have the forms of the six GenEval skills; `long` ones (a third, if None) give every attribute
    and the region. Every caption counts every object of the scene: what it does not name is not there.
    """
    if scene.word:
        return word_caption(scene, rng, long)
    if long is None:
        long = rng.random() < 0.33
    with_colour = long or rng.random() < 0.75
    with_size = long or rng.random() < 0.35
    with_region = long or rng.random() < 0.1
    size_words = {size: pick(rng, words) for size, words in WORDS_OF_SIZE.items()}
    names = [noun(obj, with_colour, with_size, size_words) for obj in scene.objects]
    different = len(names) == 2 and names[0] != names[1]
    if different and relation(*scene.objects) and rng.random() < (0.4 if long else 0.6):
        body = relation_phrase(scene.objects, names, rng)
    else:
        body = list_phrase(scene.objects, names, with_region, rng)
    be = "is" if body.startswith(("a ", "an ")) else "are"
    forms = ["{}", "{}", "{}", "a picture of {}", "a photo of {}", "an image of {}", f"there {be} {{}}"]
    if long or rng.random() < 0.4:
        ground = article(f"{scene.background} background")
        forms = [f"{form} on {name}" for form in forms for name in (ground, scene.background)]
        forms += [f"{ground} with {{}}"] * 5
    text = pick(rng, forms).format(body)
    return text[0].upper() + text[1:] + "." if rng.random() < 0.25 else text


def relation_phrase(objects, names, rng):
    """'a star left of a circle', in either order, for two objects and what they are called."""
    pair = list(zip(objects, names))
    if rng.random() < 0.5:
        pair.reverse()
    (a, name_of_a), (b, name_of_b) = pair
    words = pick(rng, WORDS_OF_RELATION[relation(a, b)])
    return f"{article(name_of_a)} {words} {article(name_of_b)}"


def list_phrase(objects, names, with_region, rng):
    """'two stars and a circle on the left' in random order: objects of one name are counted together."""
    phrases = []
    for name in dict.fromkeys(names):
        members = [obj for obj, its_name in zip(objects, names) if its_name == name]
        if len(members) > 1:
            phrases.append(f"{NUMBERS[len(members)]} {name}s")
        else:
            phrases.append(article(name) + (f" {region(members[0])}" if with_region else ""))
    return join([phrases[i] for i in rng.permutation(len(phrases))])


def word_caption(scene, rng, long=None):
    """A caption of a scene with a word: its text and, at random or if `long`, its colour and background."""
    text = f"{pick(rng, ('the word', 'the word', 'the text', 'the letters'))} '{scene.word.text}'"
    if long or rng.random() < 0.8:
        text += f" in {scene.word.colour}"
    if long or rng.random() < 0.4:
        text += " on " + pick(rng, (scene.background, article(f"{scene.background} background")))
    return pick(rng, ("{}", "{}", "a picture of {}", "a photo of {}", "an image of {}")).format(text)


def describe(scene):
    """The answer to DESCRIBE: every object and attribute, from left to right, in one fixed form.

    Captions vary; a model that is to learn to see learns more from a text that only the image can change.
    """
    if scene.word:
        return on_background(f"the word '{scene.word.text}' in {scene.word.colour}", scene)
    return on_background(regions_phrase(sorted(scene.objects, key=lambda obj: obj.x)), scene)


def regions_phrase(objects):
    """'a small red star on the left and ...': every attribute and the region of each object."""
    return join([f"{article(noun(obj, size=True))} {region(obj)}" for obj in objects])


def on_background(body, scene):
    """`body` and the background it is on."""
    return f"{body} on {article(f'{scene.background} background')}"


# ---- Reading and rewriting captions ----------------------------------------------------------------------
REGIONS = [f"in the {row} {column} corner" for row in ("top", "bottom") for column in ("left", "right")]
REGIONS += ["on the left", "on the right", "at the top", "at the bottom", "in the middle"]
SIZE_SYNONYMS = {synonym: size for size, synonyms in WORDS_OF_SIZE.items() for synonym in synonyms}
# What stands between two objects -> the side that the first and the second lie on.
SIDES = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("above", "below"),
         "below": ("below", "above"), "under": ("below", "above")}
# What a query target can say of an object; "of two": there are two objects in all.
CAPTION_WORDS = (*NUMBERS[2:], *SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, "left", "right", "above", "below",
                 "top", "bottom", "middle", "of one", "of two", "of three", "of four")
NOUN_PHRASE = re.compile(
    rf"\b(?:an?|{'|'.join(NUMBERS[2:])}) (?:(?:{'|'.join(SIZE_SYNONYMS)}) )?(?:(?:{'|'.join(COLOURS)}) )?"
    rf"(?:{'|'.join(SHAPES)})s?\b(?: (?:{'|'.join(REGIONS)}))?")
QUOTED = re.compile(r"""(?:word|text|letters|says) ?["']?([A-Z]{2})\b|["']([A-Z]{2})["']""")


def parse_caption(text):
    """The objects that a caption names, in its order, each as a list of CAPTION_WORDS with the shape first.

    [] for texts that are no captions of this world. Of a word its two letters take the place of objects.

    "A tiny red circle left of two stars on grey" -> [["circle", "small", "red", "left", "grey"],
                                                      ["star", "two", "right", "grey"]]
    "the word 'HI' in red" -> [["first H", "red"], ["second I", "red"]]
    """
    quoted = QUOTED.search(text)
    letters = (quoted[1] or quoted[2]) if quoted else ""
    if letters and set(letters) <= set(GLYPHS):
        named = [name for name in (*COLOURS, *BACKGROUNDS) if re.search(rf"\b{name}\b", text.lower())]
        return [[f"{ordinal} {letter}", *named] for ordinal, letter in zip(("first", "second"), letters)]
    phrases = list(NOUN_PHRASE.finditer(text.lower()))
    between = text[phrases[0].end():phrases[1].start()] if len(phrases) == 2 else ""
    sides = next((pair for words, pair in SIDES.items() if words in between), [""] * len(phrases))
    backgrounds = [name for name in BACKGROUNDS if name in text.lower()]
    canonical = SIZE_SYNONYMS | {f"{shape}s": shape for shape in SHAPES}
    parsed = []
    for phrase, side in zip(phrases, sides):
        words = [canonical.get(word, word) for word in re.findall("[a-z]+", phrase[0])]
        known = [word for word in (*words, side, *backgrounds) if word in CAPTION_WORDS]
        parsed.append(sorted(dict.fromkeys(known), key=lambda word: word not in SHAPES))
    return parsed


def number_of(words):
    """How many objects a parsed phrase stands for: its number word, else 1."""
    return next((NUMBERS.index(word) for word in words if word in NUMBERS), 1)


def upsample_caption(scene, text, parsed):
    """The answer to UPSAMPLE: the scene as its caption `text` puts it, with every attribute left open there.

    parsed: parse_caption(text), or what `paraphrase` returned. Its order stays, so that a small language
    model has little to do but copy; a relation stays, too. Without one, regions are given.
    """
    if scene.word:
        return describe(scene)
    attributes = (*SHAPES, *COLOURS, *SIZES)
    ordered, remaining = [], list(scene.objects)
    for words in parsed:
        asked = {word for word in words if word in attributes}
        fitting = [obj for obj in remaining if asked <= {obj.shape, obj.colour, obj.size}][:number_of(words)]
        ordered += fitting
        remaining = [obj for obj in remaining if not any(obj is other for other in fitting)]
    if any(f" {words} " in text for words in SIDES):
        first, second = (article(noun(obj, size=True)) for obj in ordered)
        return on_background(f"{first} {relation(*ordered)} {second}", scene)
    return on_background(regions_phrase(ordered), scene)


SYNONYMS = {
    "red": ("crimson", "scarlet"), "orange": ("amber",), "yellow": ("golden",), "green": ("emerald", "lime"),
    "blue": ("azure", "navy"), "purple": ("violet",), "grey": ("gray",), "circle": ("disc", "dot", "ball"),
    "square": ("box", "block"), "small": ("tiny", "little", "mini"), "large": ("big", "huge", "giant"),
    "two": ("2", "a pair of", "a couple of"), "three": ("3", "a trio of"), "four": ("4",)}
REQUEST_FORMS = (
    "{}", "{}", "draw {}", "draw me {}, please", "can you make {}?", "show me {}", "paint {}", "just {}",
    "i want {}", "i would like to see {}", "a drawing of {}", "this is {}", "only {}, nothing else")
PAIR_FORMS = ("{} and {}", "{}, {}", "{} with {}", "{} plus {}", "{} & {}", "{} beside {}", "{} next to {}",
              "both {} and {}", "{} and also {}", "{}. {}.")
SIDE_FORMS = {    # {0} is on that side of {1}
    "left": ("{} to the left of {}", "{} on the left, {} on the right", "on the left {}, on the right {}",
             "left: {}, right: {}", "{1} with {0} on its left", "{1}, and left of it {0}"),
    "above": ("{} over {}", "{} on top of {}", "{} at the top, {} at the bottom",
              "at the top {}, at the bottom {}", "above: {}, below: {}", "{1} underneath {0}",
              "{1} beneath {0}", "{1} with {0} over it")}
BACKGROUND_FORMS = ("{0} on {1}", "{0} on a {1} background", "{1} background, {0}", "on {1}: {0}",
                    "against {1}, {0}", "{0} in front of a {1} wall")


def synonym(word, rng):
    """The word, or at random one of its SYNONYMS."""
    return pick(rng, SYNONYMS.get(word, (word,))) if rng.random() < 0.4 else word


def paraphrase(text, rng):
    """(a caption in other words, as people may type it; its objects in the form and order of parse_caption).

    Texts that name no object, or a word, or regions stay as they are.
    """
    parsed = parse_caption(text)
    if not parsed or parsed[0][0] not in SHAPES or any(name in text.lower() for name in REGIONS):
        return text, parsed
    sides = [word for words in parsed for word in words if word in ("left", "right", "above", "below")]
    axis = {"right": "left", "below": "above"}.get(sides[0], sides[0]) if sides else None
    form = pick(rng, SIDE_FORMS[axis] if sides else PAIR_FORMS)
    turned = sides[:1] in (["right"], ["below"])    # the caption's first object is the {1} of a SIDE_FORM
    starts_with_second = form.startswith("{1}")
    if turned != starts_with_second:    # the order in which the new text names them
        parsed = parsed[::-1]
    phrases = [paraphrase_object(words, rng) for words in parsed]
    if len(phrases) == 2:
        body = form.format(*(reversed(phrases) if starts_with_second else phrases))
    else:
        body = join(phrases)
    backgrounds = [word for word in parsed[0] if word in BACKGROUNDS]
    if backgrounds:
        name = synonym(backgrounds[0], rng)
        body = pick(rng, BACKGROUND_FORMS).format(body, name)
    request = pick(rng, REQUEST_FORMS).format(body)
    if rng.random() < 0.05:
        return request.upper(), parsed
    return request[0].upper() + request[1:] if rng.random() < 0.2 else request, parsed


def paraphrase_object(words, rng):
    """One entry of parse_caption as a noun phrase, with synonyms, the colour before or after the shape."""
    number, size, colour, shape = (
        [synonym(word, rng) for word in words if word in kind] for kind in (NUMBERS, SIZES, COLOURS, SHAPES))
    if number:
        shape[0] += "es" if shape[0].endswith("x") else "s"
    colour_order = rng.random() if colour else 1.0
    if colour_order < 0.15:
        parts = size + shape + ["in"] + colour
    elif colour_order < 0.3:
        parts = size + shape + ["that are" if number else "that is"] + colour
    else:
        parts = size + colour + shape
    phrase = " ".join(number + parts)
    start = rng.random()
    if number or start < 0.1:
        return phrase
    return f"one {phrase}" if start < 0.2 else article(phrase)


def swap_colours(text):
    """A caption that names two different colours of objects, with the two swapped; None for any other."""
    named = re.findall("|".join(COLOURS), text)
    if len(named) != 2 or named[0] == named[1]:
        return None
    other = {named[0]: named[1], named[1]: named[0]}
    swapped = re.sub("|".join(COLOURS), lambda match: other[match[0]], text)
    return re.sub(r"\b([Aa])n? (?=(\w))",
                  lambda match: match[1] + ("n " if match[2] in "aeiou" else " "), swapped)


# ---- Query targets ---------------------------------------------------------------------------------------
@cache
def target_tables():
    """{"words": (len(CAPTION_WORDS), 128), "letters": (2 places, len(GLYPHS), 128)}: Gaussian codes, fp32.

    They are shipped rather than drawn: the queries of the shipped weights have learnt just these.
    """
    return load_file(Path(__file__).with_name("query_targets.safetensors"))


def query_targets(parsed, n, dim):
    """Targets (n, dim) fp32 for the states of n queries: one entry of parse_caption each, in turn.

    An object is the sum of the codes of its words and of how many objects there are in all (without that,
    one of two is often left out), scaled to an rms of 1. Random codes are nearly orthogonal: a linear map
    can read off each word. Letters have one for each place. Nothing parsed: zeros. dim > 128: ValueError.
    """
    words_table, letters_table = target_tables()["words"], target_tables()["letters"]
    widest = words_table.shape[1]
    if dim > widest:
        raise ValueError(f"query targets have {widest} dimensions at most, the language model {dim}: leave "
                         "them out with --world query_supervision=0")
    total = sum(number_of(words) for _, *words in parsed)
    targets = np.zeros((max(1, len(parsed)), dim), np.float32)
    for target, (name, *words) in zip(targets, parsed):
        if name in SHAPES:
            words = [name, *words, f"of {NUMBERS[min(total, 4)]}"]
        else:
            ordinal, letter = name.split()
            target += letters_table[("first", "second").index(ordinal), list(GLYPHS).index(letter), :dim]
        target += words_table[[CAPTION_WORDS.index(word) for word in words], :dim].sum(0)
        target /= np.sqrt(np.square(target).mean())
    return targets[np.arange(n) % len(targets)]


# ---- Edits and perturbations -----------------------------------------------------------------------------
def edit(scene, rng, kind=None):
    """(instruction, the scene after it), or None if a change of the wanted `kind` isn't possible.

    An object that is the only one of its shape gets another "colour" or "place", or goes ("remove"); or the
    "background" changes. Without a kind, any that is possible.
    """
    shapes = [obj.shape for obj in scene.objects]
    unique = [obj for obj in scene.objects if shapes.count(obj.shape) == 1]
    kinds = ("colour", "place", "background") if unique else ("background",)
    if unique and len(shapes) > 1:
        kinds += ("remove",)
    if kind is not None and kind not in kinds:
        return None
    any_kind = kind is None
    if any_kind:
        kind = pick(rng, kinds)
    if kind == "background":
        background = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
        return f"make the background {background}", replace(scene, background=background)
    target = pick(rng, unique)
    others = tuple(obj for obj in scene.objects if obj is not target)
    if kind == "remove":
        return f"remove the {target.shape}", replace(scene, objects=others)
    if kind == "colour":
        pairs = [pair for pair in TRAINING_PAIRS if pair[1] == target.shape and pair[0] != target.colour]
        changed = replace(target, colour=pick(rng, pairs)[0])
        return f"make the {target.shape} {changed.colour}", replace(scene, objects=others + (changed,))
    moved = move(target, others, rng)
    if moved is None:    # nowhere else is room for it
        return edit(scene, rng, "background") if any_kind else None
    where = region(moved).split(" ", 1)[1]    # without its "on", "at" or "in"
    return f"move the {target.shape} to {where}", replace(scene, objects=others + (moved,))


def move(obj, others, rng):
    """The object in another region, clear of the others; None after 40 tries."""
    for _ in range(40):
        (moved,) = place([(obj.shape, obj.colour, obj.size)], rng)
        if all(apart(moved, other) for other in others) and region(moved) != region(obj):
            return moved
    return None


def perturb(scene, rng):
    """A scene that differs in one respect, to be captioned, not rendered: its objects may overlap.

    An object of another colour or shape, one less or more, two that have swapped places or colours, another
    background, or everything; of a word its text or colour.
    """
    kind = pick(rng, ("colour", "shape", "less", "more", "places", "colours", "background", "all"))
    if kind == "all":
        make = make_word if scene.word else make_scene
        return make(0, int(rng.integers(10 ** 9)))
    if scene.word:
        text = make_word(0, int(rng.integers(10 ** 9))).word.text
        colour = pick(rng, list(COLOURS))
        change = {"text": text} if kind in ("shape", "less", "more") else {"colour": colour}
        return replace(scene, word=replace(scene.word, **change))
    if kind == "background":
        return replace(scene, background=pick(rng, list(BACKGROUNDS)))
    objects = perturb_objects([scene.objects[i] for i in rng.permutation(len(scene.objects))], kind, rng)
    if any((obj.colour, obj.shape) in HELD_OUT for obj in objects):
        return perturb(scene, rng)
    return replace(scene, objects=tuple(objects))


def perturb_objects(objects, kind, rng):
    """A list of objects after one kind of `perturb`, done to the first of them."""
    first, *others = objects
    if kind == "colour":
        return [replace(first, colour=pick(rng, list(COLOURS))), *others]
    if kind == "shape":
        return [replace(first, shape=pick(rng, SHAPES)), *others]
    if kind == "less":
        return others or objects
    if kind == "more":
        extra = pick(rng, objects)
        return objects[:3] + [replace(extra, x=float(rng.random()), y=float(rng.random()))]
    if not others:
        return objects
    second, *rest = others
    if kind == "places":
        return [replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y), *rest]
    return [replace(first, colour=second.colour), replace(second, colour=first.colour), *rest]


def chimera(scene, rng, size=64):
    """The image of a scene (size, size, 3) in which one object is two in one.

    On one side of a line through it, it has another shape, colour or both. A DiT that has not learnt enough
    generates such images, and a model that has only ever seen whole objects lets them pass.
    """
    original = render(scene, size)
    while True:
        target, *others = (scene.objects[i] for i in rng.permutation(len(scene.objects)))
        shape = pick(rng, SHAPES) if rng.random() < 0.8 else target.shape
        colour = pick(rng, list(COLOURS)) if rng.random() < 0.3 else target.colour
        changed = replace(target, shape=shape, colour=colour)
        other = render(replace(scene, objects=(changed, *others)), size)
        angle = 2 * math.pi * rng.random()
        offset = target.reach * (rng.random() - 0.5)
        y, x = (np.mgrid[:size, :size] + 0.5) / size
        beyond = (x - target.x) * math.cos(angle) + (y - target.y) * math.sin(angle) > offset
        mixed = np.where(beyond[..., None], other, original)    # (size, size, 3)
        if all((mixed != image).any(2).sum() > size * size / 120 for image in (original, other)):
            return mixed


# ---- Questions -------------------------------------------------------------------------------------------
QUESTIONS = ("colour", "shape", "count", "existence", "position", "background")


def question(scene, rng, kind=None):
    """(kind, question, answer), or None where the scene can't answer it; kind: of QUESTIONS, drawn if None.

    Existence and half of the position questions are answered yes or no, evenly; the others by a name. Of a
    word: its text ("reading"), its colour or its background, whatever the kind.
    """
    if scene.word:
        return pick(rng, (("reading", "What word is there?", scene.word.text),
                          ("colour", "What colour is the word?", scene.word.colour),
                          ("background", "What colour is the background?", scene.background)))
    kind = kind or pick(rng, QUESTIONS)
    objects = scene.objects
    subject = pick(rng, objects)
    shapes = [obj.shape for obj in objects]
    colours = [obj.colour for obj in objects]
    if kind == "background":
        return kind, "What colour is the background?", scene.background
    if kind == "colour" and shapes.count(subject.shape) == 1:
        return kind, f"What colour is the {subject.shape}?", subject.colour
    if kind == "shape" and colours.count(subject.colour) == 1:
        return kind, f"What shape is the {subject.colour} object?", subject.shape
    if kind == "count":
        if rng.random() < 0.4:
            return kind, "How many objects are there?", NUMBERS[len(objects)]
        shape = subject.shape if rng.random() < 0.8 else pick(rng, SHAPES)
        return kind, f"How many {shape}s are there?", NUMBERS[shapes.count(shape)]
    if kind == "existence":
        if rng.random() < 0.5:
            return kind, f"Is there {article(noun(subject))}?", "yes"
        present = set(zip(colours, shapes))
        similar = [(colour, shape) for colour, shape in PAIRS if (colour, shape) not in present
                   and (colour == subject.colour) != (shape == subject.shape)]
        return kind, f"Is there {article(' '.join(pick(rng, similar)))}?", "no"
    if kind == "position" and len(objects) == 2 and shapes[0] != shapes[1] and relation(*objects):
        other = objects[0] if subject is objects[1] else objects[1]
        return kind, *position_question(subject, other, rng)
    return None


def position_question(subject, other, rng):
    """(question, answer) about the relation of two objects, asked for by name or as yes or no."""
    truth = relation(subject, other)
    if rng.random() < 0.5:
        false_ones = [name for name in RELATIONS if name != truth]
        asked = truth if rng.random() < 0.5 else pick(rng, false_ones)
        return f"Is the {subject.shape} {asked} the {other.shape}?", "yes" if asked == truth else "no"
    return f"Where is the {subject.shape} relative to the {other.shape}?", truth


def ask(scene, rng):
    """(question, answer) about a scene, of a kind that it can answer."""
    asked = None
    while asked is None:
        asked = question(scene, rng)
    return asked[1:]


def match_question(scene, rng):
    """(MATCH with a caption, "yes" or "no"): does the image show it?

    Three in ten captions are the scene's own, the others a perturbed scene's, true all the same where they
    leave the difference out. Both are written with the same draws, so that what they name can be compared;
    then half of them are paraphrased.
    """
    wording = int(rng.integers(2 ** 32))
    claimed = scene if rng.random() < 0.3 else perturb(scene, rng)
    own, text = (caption(described, np.random.default_rng(wording)) for described in (scene, claimed))
    same = sorted(map(sorted, parse_caption(own))) == sorted(map(sorted, parse_caption(text)))
    if rng.random() < 0.5:
        text, _ = paraphrase(text, rng)
    return MATCH.format(text), "yes" if same else "no"


def world_texts(n):
    """What the tokenizer learns from: n captions, n questions with answers, each template n times."""
    for i in range(n):
        scene, rng = make_scene(0, i), np.random.default_rng(i)
        yield caption(scene, rng)
        yield " ".join((*ask(scene, rng), describe(scene)))
    for text in (f"system\n{SYSTEM}", "user\n" + GENERATE.format("a"), f"user\n{DESCRIBE}", "assistant\n"):
        yield from [text] * n


# ---- Prompts that score a model --------------------------------------------------------------------------
# GenEval's skills and its number of prompts for each (arXiv 2310.11513).
SKILLS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
          "color_attr": 100}


def skill_prompts(n=553, seed=0, novel=False, most=4):
    """`n` prompts of the six GenEval skills about this world, in that benchmark's proportions.

    Returns [{"tag", "prompt", "include": [{"class", "count", "color"?, "position"?: [relation, index]}]}],
    as GenEval's evaluation_metadata.jsonl (arXiv 2310.11513). novel=True: only HELD_OUT pairs in the skills
    with colours, which no training image shows. most=1: only the two skills that need one object.
    """
    rng = np.random.default_rng((seed, 7, int(novel)))
    pairs = [pair for pair in PAIRS if (pair in HELD_OUT) == novel]
    tags = list(SKILLS) if most > 1 else ["single_object", "colors"]
    plan = [tag for tag in tags for _ in range(SKILLS[tag])]
    return [skill_prompt(plan[int((i + 0.5) * len(plan) / n)], pairs, rng) for i in range(n)]


def skill_prompt(tag, pairs, rng):
    """One prompt of a skill as an entry of `skill_prompts`; `pairs`: the (colour, shape) to choose from."""
    a, b = (str(shape) for shape in rng.choice(SHAPES, 2, replace=False))
    (colour_a, shape_a), (colour_b, shape_b) = (pairs[i] for i in rng.choice(len(pairs), 2, replace=False))
    if tag == "single_object":
        text = article(a)
        include = [{"class": a, "count": 1}]
    elif tag == "two_object":
        text = f"{article(a)} and {article(b)}"
        include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
    elif tag == "counting":
        count = int(rng.integers(2, 5))
        text = f"{NUMBERS[count]} {a}s"
        include = [{"class": a, "count": count}]
    elif tag == "colors":
        text = article(f"{colour_a} {shape_a}")
        include = [{"class": shape_a, "count": 1, "color": colour_a}]
    elif tag == "position":
        link = pick(rng, list(RELATIONS))
        text = f"{article(a)} {link} {article(b)}"
        include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [link, 0]}]
    else:
        if shape_a == shape_b:    # GenEval's attribution pairs two kinds of object
            start = int(rng.integers(len(pairs)))
            colour_b, shape_b = next((colour, shape) for colour, shape in pairs[start:] + pairs
                                     if shape != shape_a and colour != colour_a)
        text = f"{article(f'{colour_a} {shape_a}')} and {article(f'{colour_b} {shape_b}')}"
        include = [{"class": shape_a, "count": 1, "color": colour_a},
                   {"class": shape_b, "count": 1, "color": colour_b}]
    return {"tag": tag, "prompt": f"a photo of {text}", "include": include}


def word_prompts(n=553, seed=0):
    """`n` prompts for words, in turn from training ("word") and from HELD_OUT_WORDS ("new word").

    Entries have the fields of `skill_prompts`, include is [{"word", "color"}].
    """
    prompts = []
    for i in range(n):
        novel = i % 2 == 1
        word = make_word(10 ** 6 + seed, i, novel).word
        prompts.append({"tag": "new word" if novel else "word",
                        "prompt": f"the word '{word.text}' in {word.colour}",
                        "include": [{"word": word.text, "color": word.colour}]})
    return prompts
