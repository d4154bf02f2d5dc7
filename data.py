"""What comes in: the synthetic world, shards of captioned pictures, prompts, tokens and image preprocessing.

B batch, L tokens, H W pixels, N patches. Imports nothing else of this project.

Reading order: the world (scenes, pictures, captions, questions) -> sources of samples -> tokens and templates -> pixels;
last, the charts that train.py and eval.py draw of numbers.
"""
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import tarfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer as Tokenizers, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# The world: pictures of 1 to 4 plain objects, about which everything is known
# ----------------------------------------------------------------------------------------------------------------------
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {"red": (222, 45, 45), "orange": (245, 140, 25), "yellow": (240, 218, 55),
           "green": (45, 165, 75), "blue": (45, 85, 220), "purple": (150, 60, 190)}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (135, 135, 135), "black": (15, 15, 15)}
SIZES = {"small": 0.125, "large": 0.195}              # radius of a circle of that size; unit: the side of the picture
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}      # direction a -> seen from b
NUMBERS = ("no", "one", "two", "three", "four")
HELD_OUT = {("purple", "triangle"), ("orange", "star"), ("green", "square")}    # never in a training picture


def arc(x, y, rx, ry, start, end):
    """Points of an ellipse around (x, y) from one angle to another, in degrees clockwise from the right."""
    return [(x + rx * math.cos(math.radians(a)), y + ry * math.sin(math.radians(a))) for a in np.linspace(start, end, 25)]


# Letters that 64 pixels keep apart, as strokes: lists of points in a unit square, y down.
GLYPHS = {"A": [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.65), (0.8, 0.65)]], "C": [arc(0.55, 0.5, 0.55, 0.5, 315, 45)],
           "E": [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.85, 0.5)]], "H": [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(0, 0.5), (1, 0.5)]],
           "I": [[(0.5, 0), (0.5, 1)]], "K": [[(0, 0), (0, 1)], [(1, 0), (0, 0.55), (1, 1)]], "L": [[(0, 0), (0, 1), (1, 1)]],
           "N": [[(0, 1), (0, 0), (1, 1), (1, 0)]], "O": [arc(0.5, 0.5, 0.5, 0.5, 0, 360)],
           "P": [[(0, 1), (0, 0), *arc(0.5, 0.28, 0.5, 0.28, -90, 90), (0, 0.56)]], "T": [[(0, 0), (1, 0)], [(0.5, 0), (0.5, 1)]],
           "U": [[(0, 0), *arc(0.5, 0.6, 0.5, 0.4, 180, 0), (1, 0)]], "X": [[(0, 0), (1, 1)], [(1, 0), (0, 1)]],
           "Y": [[(0, 0), (0.5, 0.5), (1, 0)], [(0.5, 0.5), (0.5, 1)]]}
LETTER, GAP, STROKE = (0.27, 0.38), 0.12, 0.08        # width and height of a letter, the gap between two, the strokes' width
TWO_LETTERS = [a + b for a in GLYPHS for b in GLYPHS]
HELD_OUT_WORDS = {word for i, word in enumerate(TWO_LETTERS) if i % 9 == 4}           # never in a training picture


def pick(rng, options):
    """One of a sequence, evenly (rng.choice is ten times slower on small lists)."""
    return options[int(rng.integers(len(options)))]


def outline(shape):
    """Corners (K, 2) of a shape of size 1, x to the right, y down; all shapes have nearly the area of the unit circle.

    A circle is a 48-gon. The star's arms are long (inner radius 0.4 of the outer): blunt ones read as circles at 16 px.
    """
    def ring(radii, start):
        angles = start + 2 * np.pi * np.arange(len(radii)) / len(radii)
        return np.stack([np.cos(angles), np.sin(angles)], 1) * np.asarray(radii)[:, None]
    return {"circle": ring([1.0] * 48, 0), "square": ring([1.25] * 4, np.pi / 4),
            "triangle": ring([1.45] * 3, -np.pi / 2), "star": ring([1.4, 0.56] * 5, -np.pi / 2)}[shape]


OUTLINES = {shape: outline(shape) for shape in SHAPES}
REACH = {shape: float(np.linalg.norm(o, axis=1).max()) for shape, o in OUTLINES.items()}


@dataclass(frozen=True)
class Thing:
    """One object: names from SHAPES, COLOURS and SIZES, centre (x, y) in units of the picture's side, y down."""
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
    """A word of two of the GLYPHS in one colour, centre (x, y) as a `Thing`'s."""
    text: str
    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """A background colour and a tuple of `Thing`s that don't touch each other or the border; or a word alone."""
    background: str
    things: tuple
    word: Word | None = None


def relation(a, b):
    """How thing `a` lies to thing `b`, one of RELATIONS, or None where neither axis clearly dominates."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < 0.15 or min(abs(dx), abs(dy)) > 0.7 * max(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def place(kinds, rng, wanted=None):
    """Centres for [(shape, colour, size)] without contact, or None after 60 tries; `wanted` relates the first to the second."""
    room = np.array([SIZES[size] * REACH[shape] + 0.02 for shape, _, size in kinds])[:, None]
    for centres in (room + (1 - 2 * room) * rng.random((60, len(kinds), 2))).round(4).tolist():
        things = tuple(Thing(*kind, *centre) for kind, centre in zip(kinds, centres))
        apart = all(math.hypot(a.x - b.x, a.y - b.y) > a.reach + b.reach + 0.03
                    for i, a in enumerate(things) for b in things[:i])
        if apart and (wanted is None or relation(things[0], things[1]) == wanted):
            return things
    return None


def make_scene(seed, index, novel=False, most=4):
    """The scene number `index` of the world `seed`, of at most `most` things: a pure function of these.

    A third of the scenes shows one object, the rest two different ones, several alike, or a mixture of three or four.
    Training scenes (novel=False) never show a HELD_OUT pair of colour and shape; novel ones always show at least one.
    """
    rng = np.random.default_rng((seed, index, int(novel)))
    pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT]
    while True:
        layout = int(np.searchsorted([0.26, 0.68, 0.88, 0.96], rng.random()))     # one, two, several alike, three, four
        count = (1, 2, int(rng.integers(2, 5)), 3, 4)[layout]
        if count > most:
            continue
        picks = [pick(rng, pairs) for _ in range(count)]
        if novel:
            picks[int(rng.integers(count))] = pick(rng, sorted(HELD_OUT))
        if layout == 2:
            picks = [picks[0]] * count
            if novel and picks[0] not in HELD_OUT:
                continue
        sizes = [pick(rng, list(SIZES)) for _ in range(count)]
        if count >= 3:
            sizes = ["small"] * count                                # four large ones don't fit
        if layout == 2:
            sizes = [sizes[0]] * count
        wanted = pick(rng, list(RELATIONS)) if layout == 1 and rng.random() < 0.8 else None
        things = place([(s, c, z) for (c, s), z in zip(picks, sizes)], rng, wanted)
        if things:
            return Scene(pick(rng, list(BACKGROUNDS)), things)


def make_word(seed, index, novel=False):
    """The word number `index` of the world `seed` as a Scene; novel ones are HELD_OUT_WORDS, the others never."""
    rng = np.random.default_rng((seed, index, 2 + novel))
    text = pick(rng, [word for word in TWO_LETTERS if (word in HELD_OUT_WORDS) == novel])
    x, y = (0.5 + (2 * rng.random(2) - 1) * (0.12, 0.2)).round(4).tolist()
    return Scene(pick(rng, list(BACKGROUNDS)), (), Word(text, pick(rng, list(COLOURS)), x, y))


def strokes(word):
    """The strokes of a `Word`: lists of points (K, 2) in units of the picture's side."""
    width, height = LETTER
    for i, letter in enumerate(word.text):
        left = word.x + (i - len(word.text) / 2) * (width + GAP) + GAP / 2
        for points in GLYPHS[letter]:
            yield np.array(points) * LETTER + (left, word.y - height / 2)


def draw(scene, size=64):
    """The picture of a scene as uint8 (size, size, 3): drawn at four times the size, then averaged (anti-aliasing)."""
    big = 4 * size
    image = Image.new("RGB", (big, big), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    for t in scene.things:
        corners = (OUTLINES[t.shape] * SIZES[t.size] + (t.x, t.y)) * big - 0.5
        pen.polygon([tuple(c) for c in corners], fill=COLOURS[t.colour])
    for points in strokes(scene.word) if scene.word else ():
        points, round_ = [tuple(p) for p in points * big - 0.5], STROKE * big / 2
        pen.line(points, COLOURS[scene.word.colour], round(2 * round_), joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse((x - round_, y - round_, x + round_, y + round_), COLOURS[scene.word.colour])
    return np.asarray(image.reduce(4))


def article(phrase):
    """'a' or 'an' in front of a noun phrase."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def join(phrases):
    """['x', 'y', 'z'] -> 'x, y and z'."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def region(thing):
    """Where in the picture a thing lies: one of nine names."""
    column = "left" if thing.x < 0.36 else "right" if thing.x > 0.64 else ""
    row = "top" if thing.y < 0.36 else "bottom" if thing.y > 0.64 else ""
    if row and column:
        return f"in the {row} {column} corner"
    return f"on the {column}" if column else f"at the {row}" if row else "in the middle"


def noun(thing, colour=True, size=False, words=None):
    """'large red circle' with the attributes that are asked for; `words` replaces 'small' and 'large' by synonyms."""
    return " ".join(filter(None, [size and (words or {}).get(thing.size, thing.size), colour and thing.colour, thing.shape]))


def caption(scene, rng, long=None):
    """One English caption, exactly true of the scene; varied wording, attributes left out at random.

    Short ones have the forms of the six GenEval skills; `long` ones (a third, if None) tell everything, region included.
    Every object of the scene is counted in every caption: what is not named is not there.
    """
    if scene.word:
        return word_caption(scene, rng, long)
    long = rng.random() < 0.33 if long is None else long
    colour, size, place_of = (True, True, True) if long else (rng.random() < 0.75, rng.random() < 0.35, rng.random() < 0.1)
    words = {size: pick(rng, options) for size, options in WORDS_OF_SIZE.items()}
    names = [noun(t, colour, size, words) for t in scene.things]
    kinds = list(dict.fromkeys(names))
    link = relation(*scene.things) if len(scene.things) == 2 and len(kinds) == 2 else None
    if link and rng.random() < (0.4 if long else 0.6):
        a, b = names
        if rng.random() < 0.5:                                       # say the same the other way round
            (a, b), link = (b, a), relation(scene.things[1], scene.things[0])
        verb = {"left of": ["left of", "to the left of"], "right of": ["right of", "to the right of"],
                "above": ["above"], "below": ["below", "under"]}[link]
        body = f"{article(a)} {pick(rng, verb)} {article(b)}"
    else:
        phrases = []
        for kind in kinds:
            members = [t for t, n in zip(scene.things, names) if n == kind]
            phrase = article(kind) if len(members) == 1 else f"{NUMBERS[len(members)]} {kind}s"
            if place_of and len(members) == 1:
                phrase += " " + region(members[0])
            phrases.append(phrase)
        body = join([phrases[i] for i in rng.permutation(len(phrases))])
    be = "is" if body.startswith(("a ", "an ")) else "are"
    forms = ["{}", "{}", "{}", "a picture of {}", "a photo of {}", "an image of {}", f"there {be} {{}}"]
    if long or rng.random() < 0.4:
        ground = article(f"{scene.background} background")
        forms = [f + " on " + g for f in forms for g in (ground, scene.background)] + [f"{ground} with {{}}"] * 5
    text = pick(rng, forms).format(body)
    return text[0].upper() + text[1:] + "." if rng.random() < 0.25 else text


def word_caption(scene, rng, long=None):
    """A caption of a scene with a word: what it says, and at random its colour and the background (`long`: always)."""
    text = f"{pick(rng, ('the word', 'the word', 'the text', 'the letters'))} '{scene.word.text}'"
    if long or rng.random() < 0.8:
        text += f" in {scene.word.colour}"
    if long or rng.random() < 0.4:
        text += " on " + pick(rng, (scene.background, article(f"{scene.background} background")))
    return pick(rng, ("{}", "{}", "a picture of {}", "a photo of {}", "an image of {}")).format(text)


WORDS_OF_SIZE = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}    # as often as here
PLACES = [f"in the {row} {column} corner" for row in ("top", "bottom") for column in ("left", "right")]
PLACES += ["on the left", "on the right", "at the top", "at the bottom", "in the middle"]
MENTION = re.compile(r"\b(?:an?|{}) (?:(?:{}) )?(?:(?:{}) )?(?:{})s?\b(?: (?:{}))?".format(*map("|".join, (
    NUMBERS[2:], sum(WORDS_OF_SIZE.values(), ()), COLOURS, SHAPES, PLACES))))
DIRECTIONS = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("above", "below"),
              "below": ("below", "above"), "under": ("below", "above")}


TOLD = (*NUMBERS[2:], *SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *dict.fromkeys(sum(DIRECTIONS.values(), ())), "top", "bottom",
        "middle", "of one", "of two", "of three", "of four")             # the last: how many there are in all


QUOTED = re.compile(r"""(?:word|text|letters|says) ?["']?([A-Z]{2})\b|["']([A-Z]{2})["']""")


def things_told(text):
    """The things that a caption of the world names, in its order, each with the words of TOLD that it says of it, its shape
    first; [] for other texts. Of a word its letters, first and second, take the place of things.

    "A tiny red circle left of two stars on grey" -> [["circle", "small", "red", "left", "grey"],
                                                      ["star", "two", "right", "grey"]]
    """
    quoted = QUOTED.search(text)
    if quoted and set(word := quoted[1] or quoted[2]) <= set(GLYPHS):
        said = [c for c in (*COLOURS, *BACKGROUNDS) if re.search(rf"\b{c}\b", text.lower())]
        return [[f"{place} {letter}", *said] for place, letter in zip(("first", "second"), word)]
    found = list(MENTION.finditer(text.lower()))
    between = text[found[0].end():found[1].start()] if len(found) == 2 else ""
    sides = next((sides for link, sides in DIRECTIONS.items() if link in between), [""] * len(found))
    ground = [name for name in BACKGROUNDS if name in text.lower()]
    canonical = {word: size for size, words in WORDS_OF_SIZE.items() for word in words}
    canonical |= {f"{shape}s": shape for shape in SHAPES}
    things = []
    for mention, side in zip(found, sides):
        said = [canonical.get(word, word) for word in re.findall("[a-z]+", mention[0])] + [side] + ground
        things.append(sorted({word: 0 for word in said if word in TOLD}, key=lambda word: word not in SHAPES))
    return things


def code_of(things, n, dim):
    """What n listeners shall hear of `things_told`, one each, the things taking turns, as vectors: (n, dim) fp32.

    Every word of TOLD has a random code. A thing is the sum of its words' codes and of the code of how many things there are
    in all (without it, one of two was often left out), scaled to an rms of 1. Random directions are nearly orthogonal, so a
    linear map can read off each word. A letter of a word has one code for each place. No things: zeros.
    """
    letters = np.random.default_rng(1).standard_normal((2, len(GLYPHS), dim), dtype=np.float32)
    total = sum(next((NUMBERS.index(word) for word in said if word in NUMBERS), 1) for _, *said in things)
    # The first blocks were the codes of pairs; they are drawn still, for the shipped weights know the last block.
    codes = np.random.default_rng(0).standard_normal((len(SHAPES) + 1, len(TOLD), dim), dtype=np.float32)[-1]
    rows = np.zeros((max(1, len(things)), dim), np.float32)
    for row, (shape, *said) in zip(rows, things):
        if shape in SHAPES:
            said = shape, *said, f"of {NUMBERS[min(total, 4)]}"
        else:
            place, letter = shape.split()
            row += letters[("first", "second").index(place), list(GLYPHS).index(letter)]
        row += codes[[TOLD.index(word) for word in said]].sum(0)
        row /= np.sqrt(np.square(row).mean())
    return rows[np.arange(n) % len(rows)]


SYNONYMS = {"red": ("crimson", "scarlet"), "orange": ("amber",), "yellow": ("golden",), "green": ("emerald", "lime"),
            "blue": ("azure", "navy"), "purple": ("violet",), "grey": ("gray",), "circle": ("disc", "dot", "ball"),
            "square": ("box", "block"), "small": ("tiny", "little", "mini"), "large": ("big", "huge", "giant"),
            "two": ("2", "a pair of", "a couple of"), "three": ("3", "a trio of"), "four": ("4",)}
REQUESTS = ("{}", "{}", "draw {}", "draw me {}, please", "can you make {}?", "show me {}", "paint {}", "just {}", "i want {}",
            "i would like to see {}", "a drawing of {}", "this is {}", "only {}, nothing else")
BESIDE = ("{} and {}", "{}, {}", "{} with {}", "{} plus {}", "{} & {}", "{} beside {}", "{} next to {}", "both {} and {}",
          "{} and also {}", "{}. {}.")
LYING = {"left": ("{} to the left of {}", "{} on the left, {} on the right", "on the left {}, on the right {}",
                  "left: {}, right: {}", "{1} with {0} on its left", "{1}, and left of it {0}"),
         "above": ("{} over {}", "{} on top of {}", "{} at the top, {} at the bottom", "at the top {}, at the bottom {}",
                   "above: {}, below: {}", "{1} underneath {0}", "{1} beneath {0}", "{1} with {0} over it")}
GROUNDS = ("{0} on {1}", "{0} on a {1} background", "{1} background, {0}", "on {1}: {0}", "against {1}, {0}",
           "{0} in front of a {1} wall")


def reworded(text, rng):
    """(a caption of the world in other words, as people may type it; the things it tells, in its order). Texts that name no
    thing, or a word, or tell of regions stay as they are."""
    told = things_told(text)
    if not told or told[0][0] not in SHAPES or any(place in text.lower() for place in PLACES):
        return text, told
    side = next((word for words in told for word in words if word in ("left", "right", "above", "below")), None)
    form = pick(rng, LYING[{"right": "left", "below": "above"}.get(side, side)] if side else BESIDE)
    if (side in ("right", "below")) != form.startswith("{1}"):       # the order in which the new text will tell them
        told = told[::-1]
    phrases = []
    for words in told:
        number, size, colour, shape = ([pick(rng, SYNONYMS.get(word, (word,))) if rng.random() < 0.4 else word
                                        for word in words if word in kind] for kind in (NUMBERS, SIZES, COLOURS, SHAPES))
        if number:
            shape[0] += "es" if shape[0][-1] == "x" else "s"
        swap = rng.random() if colour else 1.0
        be = ["that are" if number else "that is"]
        phrase = size + shape + ["in"] + colour if swap < 0.15 else size + shape + be + colour if swap < 0.3 else size + colour + shape
        phrase, how = " ".join(number + phrase), rng.random()
        phrases.append(phrase if number or how < 0.1 else f"one {phrase}" if how < 0.2 else article(phrase))
    body = join(phrases) if len(phrases) != 2 else form.format(*phrases[::-1 if form.startswith("{1}") else 1])
    ground = next((word for word in told[0] if word in BACKGROUNDS), None)
    if ground:
        ground = pick(rng, SYNONYMS.get(ground, (ground,))) if rng.random() < 0.4 else ground
        body = pick(rng, GROUNDS).format(body, ground)
    text = pick(rng, REQUESTS).format(body)
    return text.upper() if rng.random() < 0.05 else text[0].upper() + text[1:] if rng.random() < 0.2 else text, told


def edit(scene, rng, kind=None):
    """(instruction, the scene after it): a thing alone in its kind gets another "colour" or "place" or goes ("remove"), or
    the "background" changes. None if a change of the wanted kind isn't possible; without one, any that is."""
    alone = [t for t in scene.things if sum(o.shape == t.shape for o in scene.things) == 1]
    kinds = ("colour", "place", "background") + ("remove",) * (len(scene.things) > 1) if alone else ("background",)
    if kind is not None and kind not in kinds:
        return None
    anything, kind = kind is None, kind or pick(rng, kinds)
    if kind == "background":
        ground = pick(rng, [g for g in BACKGROUNDS if g != scene.background])
        return f"make the background {ground}", replace(scene, background=ground)
    thing = pick(rng, alone)
    others = tuple(t for t in scene.things if t is not thing)
    if kind == "remove":
        return f"remove the {thing.shape}", replace(scene, things=others)
    if kind == "colour":
        colour = pick(rng, [c for c in COLOURS if c != thing.colour and (c, thing.shape) not in HELD_OUT])
        return f"make the {thing.shape} {colour}", replace(scene, things=others + (replace(thing, colour=colour),))
    for _ in range(40):
        (moved,) = place([(thing.shape, thing.colour, thing.size)], rng)
        clear = all(math.hypot(moved.x - t.x, moved.y - t.y) > moved.reach + t.reach + 0.03 for t in others)
        if clear and region(moved) != region(thing):
            where = region(moved).split(" ", 1)[1]                   # without its "on", "at" or "in"
            return f"move the {thing.shape} to {where}", replace(scene, things=others + (moved,))
    return edit(scene, rng, "background") if anything else None      # nowhere else is room for it


def exchange_colours(text):
    """A caption that names two different colours of things, with the two exchanged; None for any other caption."""
    named = re.findall("|".join(COLOURS), text)
    if len(named) != 2 or named[0] == named[1]:
        return None
    text = re.sub("|".join(COLOURS), lambda found: named[found[0] == named[0]], text)
    return re.sub(r"\b([Aa])n? (?=(\w))", lambda found: found[1] + ("n " if found[2] in "aeiou" else " "), text)


QUESTIONS = ("colour", "shape", "count", "existence", "position", "background")


def question(scene, rng, kind=None):
    """(kind, question, answer) about a scene; kind one of QUESTIONS, drawn if None; None where the scene can't answer it.

    Answers are one word, except that existence and half of the position questions are answered yes or no, evenly.
    """
    if scene.word:
        return pick(rng, (("reading", "What word is there?", scene.word.text), ("colour", "What colour is the word?", scene.word.colour),
                          ("background", "What colour is the background?", scene.background)))
    kind = kind or pick(rng, QUESTIONS)
    things = scene.things
    t = pick(rng, things)
    only = lambda key: sum(key(o) == key(t) for o in things) == 1
    if kind == "background":
        return kind, "What colour is the background?", scene.background
    if kind == "colour" and only(lambda o: o.shape):
        return kind, f"What colour is the {t.shape}?", t.colour
    if kind == "shape" and only(lambda o: o.colour):
        return kind, f"What shape is the {t.colour} object?", t.shape
    if kind == "count":
        if rng.random() < 0.4:
            return kind, "How many objects are there?", NUMBERS[len(things)]
        shape = t.shape if rng.random() < 0.8 else pick(rng, SHAPES)
        return kind, f"How many {shape}s are there?", NUMBERS[sum(o.shape == shape for o in things)]
    if kind == "existence":
        pairs = {(o.colour, o.shape) for o in things}
        if rng.random() < 0.5:
            return kind, f"Is there {article(noun(t))}?", "yes"
        near = [(c, s) for c in COLOURS for s in SHAPES if (c == t.colour) != (s == t.shape) and (c, s) not in pairs]
        return kind, f"Is there {article(' '.join(pick(rng, near)))}?", "no"
    if kind == "position" and len(things) == 2 and len({o.shape for o in things}) == 2 and relation(*things):
        other = things[0] if t is things[1] else things[1]
        truth = relation(t, other)
        if rng.random() < 0.5:
            asked = truth if rng.random() < 0.5 else pick(rng, [r for r in RELATIONS if r != truth])
            return kind, f"Is the {t.shape} {asked} the {other.shape}?", "yes" if asked == truth else "no"
        return kind, f"Where is the {t.shape} relative to the {other.shape}?", truth
    return None


def ask(scene, rng):
    """(question, answer) about a scene, of a kind that it can answer."""
    while not (found := question(scene, rng)):
        pass
    return found[1:]


def describe(scene):
    """The answer to DESCRIBE: everything, from left to right, in one fixed form (captions vary, and a model that is to
    learn to see learns more from a text that only the picture can change)."""
    if scene.word:
        return f"the word '{scene.word.text}' in {scene.word.colour} on {article(f'{scene.background} background')}"
    things = sorted(scene.things, key=lambda t: t.x)
    told = [f"{article(noun(t, size=True))} {region(t)}" for t in things]
    return f"{join(told)} on {article(f'{scene.background} background')}"


def in_full(scene, text, told):
    """What EXPAND asks for: the scene as its caption `text` tells it, with all that it leaves open. `told`: things_told of the
    caption, or what `reworded` gave; their order stays, so that a small language model has little to do but copy. A relation
    that the caption tells stays, too; else things have their regions. Of a word as `describe`."""
    if scene.word:
        return describe(scene)
    things, rest = [], list(scene.things)
    for words in told:
        number = next((NUMBERS.index(word) for word in words if word in NUMBERS), 1)
        known = [(t, {t.shape, t.colour, t.size}) for t in rest]
        alike = [t for t, has in known if all(w in has for w in words if w in (*SHAPES, *COLOURS, *SIZES))][:number]
        things, rest = things + alike, [t for t in rest if not any(t is one for one in alike)]
    names = [article(noun(t, size=True)) for t in things]
    if any(f" {link} " in text for link in (*RELATIONS, "under")):
        body = f"{names[0]} {relation(*things)} {names[1]}"
    else:
        body = join([f"{name} {region(t)}" for name, t in zip(names, things)])
    return f"{body} on {article(f'{scene.background} background')}"


def changed(scene, rng):
    """A scene that differs in one respect, to be told of, not to be drawn: a thing of another colour or shape, one less or one
    more, two that have exchanged places or colours, another background, or everything; of a word its text or colour."""
    kind = pick(rng, ("colour", "shape", "less", "more", "places", "colours", "background", "all"))
    if kind == "all":
        return (make_word if scene.word else make_scene)(0, int(rng.integers(10 ** 9)))
    if scene.word:
        text, colour = make_word(0, int(rng.integers(10 ** 9))).word.text, pick(rng, list(COLOURS))
        return replace(scene, word=replace(scene.word, **({"text": text} if kind in ("shape", "less", "more") else {"colour": colour})))
    if kind == "background":
        return replace(scene, background=pick(rng, list(BACKGROUNDS)))
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    first, *others = things
    if kind in ("colour", "shape"):
        things[0] = replace(first, **{kind: pick(rng, list(COLOURS if kind == "colour" else SHAPES))})
    elif kind == "less":
        things = others or things
    elif kind == "more":
        things = things[:3] + [replace(pick(rng, things), x=float(rng.random()), y=float(rng.random()))]
    elif others:
        swap = ("x", "y") if kind == "places" else ("colour",)
        a, b = ({name: getattr(thing, name) for name in swap} for thing in things[:2])
        things[:2] = replace(first, **b), replace(others[0], **a)
    if any((thing.colour, thing.shape) in HELD_OUT for thing in things):
        return changed(scene, rng)
    return replace(scene, things=tuple(things))


def claim(scene, rng):
    """(CLAIM of a caption, its answer): a third of the captions are the scene's own, the others a `changed` one's, true all
    the same where they don't tell the difference. Both are worded alike, so what they tell can be compared; then one is
    reworded, or not."""
    wording, other = int(rng.integers(2 ** 32)), scene if rng.random() < 0.3 else changed(scene, rng)
    texts = [caption(each, np.random.default_rng(wording)) for each in (scene, other)]
    true, said = (sorted(map(sorted, things_told(text))) for text in texts)
    text = reworded(texts[1], rng)[0] if rng.random() < 0.5 else texts[1]
    return CLAIM.format(text), "yes" if said == true else "no"


def spoil(scene, rng, size=64):
    """The scene drawn (size, size, 3), one thing of it two in one: on one side of a line through it another shape, colour or
    both. So a DiT draws that has not learnt enough; a model that only ever saw whole things would pass it."""
    true = draw(scene, size)
    while True:
        first, *others = (scene.things[i] for i in rng.permutation(len(scene.things)))
        shape, colour = ((pick(rng, list(kinds)) if rng.random() < share else own)
                         for kinds, share, own in ((SHAPES, 0.8, first.shape), (COLOURS, 0.3, first.colour)))
        other = draw(replace(scene, things=(replace(first, shape=shape, colour=colour), *others)), size)
        angle, off = 2 * math.pi * rng.random(), first.reach * (rng.random() - 0.5)
        y, x = (np.mgrid[:size, :size] + 0.5) / size
        side = (x - first.x) * math.cos(angle) + (y - first.y) * math.sin(angle) > off
        mixed = np.where(side[..., None], other, true)
        if all((mixed != each).any(2).sum() > size * size / 120 for each in (true, other)):
            return mixed


def world_texts(n):
    """n captions, questions and answers of the world, then the templates: what its tokenizer learns from."""
    for i in range(n):
        scene, rng = make_scene(0, i), np.random.default_rng(i)
        yield caption(scene, rng)
        yield " ".join((*ask(scene, rng), describe(scene)))
    for text in (f"system\n{SYSTEM}", "user\n" + GENERATE.format("a"), f"user\n{DESCRIBE}", "assistant\n"):
        yield from [text] * n


SKILLS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}


def skill_prompts(n=553, seed=0, novel=False, most=4):
    """`n` prompts of the six GenEval skills about this world, in that benchmark's proportions and jsonl fields. most=1: of
    the two skills that need one thing only.

    Returns [{"tag", "prompt", "include": [{"class", "count", "color"?, "position"?: [relation, index]}]}], as
    GenEval's evaluation_metadata.jsonl (arXiv 2310.11513). novel=True uses HELD_OUT pairs in the skills with colours,
    which no training picture shows.
    """
    rng = np.random.default_rng((seed, 7, int(novel)))
    pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) == novel]
    plan = [tag for tag, share in SKILLS.items() for _ in range(share) if most > 1 or tag in ("single_object", "colors")]
    prompts = []
    for i in range(n):
        tag = plan[int((i + 0.5) * len(plan) / n)]
        a, b = (str(s) for s in rng.choice(SHAPES, 2, replace=False))
        (ca, sa), (cb, sb) = (pairs[j] for j in rng.choice(len(pairs), 2, replace=False))
        if tag == "single_object":
            text, include = article(a), [{"class": a, "count": 1}]
        elif tag == "two_object":
            text, include = f"{article(a)} and {article(b)}", [{"class": a, "count": 1}, {"class": b, "count": 1}]
        elif tag == "counting":
            k = int(rng.integers(2, 5))
            text, include = f"{NUMBERS[k]} {a}s", [{"class": a, "count": k}]
        elif tag == "colors":
            text, include = article(f"{ca} {sa}"), [{"class": sa, "count": 1, "color": ca}]
        elif tag == "position":
            link = pick(rng, list(RELATIONS))
            text = f"{article(a)} {link} {article(b)}"
            include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [link, 0]}]
        else:
            if sa == sb:                                              # GenEval's attribution pairs two kinds of object
                cb, sb = next((c, s) for c, s in pairs[int(rng.integers(len(pairs))):] + pairs if s != sa and c != ca)
            text = f"{article(f'{ca} {sa}')} and {article(f'{cb} {sb}')}"
            include = [{"class": sa, "count": 1, "color": ca}, {"class": sb, "count": 1, "color": cb}]
        prompts.append({"tag": tag, "prompt": f"a photo of {text}", "include": include})
    return prompts


def word_prompts(n=553, seed=0):
    """`n` prompts for words in turn from training and from HELD_OUT_WORDS, in the fields of `skill_prompts`; tags "word" and
    "new word"."""
    prompts = []
    for i in range(n):
        word = make_word(10 ** 6 + seed, i, novel=i % 2 == 1).word
        prompts.append({"tag": ("word", "new word")[i % 2], "prompt": f"the word '{word.text}' in {word.colour}",
                        "include": [{"word": word.text, "color": word.colour}]})
    return prompts


# ----------------------------------------------------------------------------------------------------------------------
# Sources: item i -> picture and captions
# ----------------------------------------------------------------------------------------------------------------------
class World:
    """The synthetic world as a source: item i is scene i, of at most `most` things; `seed` 0 is for training, other seeds
    for evaluation. A share `words` of the scenes shows a word instead."""

    def __init__(self, seed=0, size=64, length=10 ** 9, words=0.0, most=4):
        self.seed, self.size, self.length, self.words, self.most = seed, size, length, words, most

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        """{"image": uint8 (size, size, 3), "caption": str, "scene": Scene}."""
        word = self.words and np.random.default_rng((self.seed, i, 4)).random() < self.words
        scene = make_word(self.seed, i) if word else make_scene(self.seed, i, most=self.most)
        return {"image": draw(scene, self.size), "scene": scene}


PICTURES = (".jpg", ".jpeg", ".png", ".webp")
LEFT_OUT = ("no caption", "no picture", "link")                      # what never becomes a sample, counted while indexing
INDEX = Path("runs/index")                                           # where the index of the shards is kept


class BadSample(ValueError):
    """A sample that nothing can be learnt from. cause: why, in two or three words, to count by."""

    def __init__(self, cause, message):
        super().__init__(message)
        self.cause = cause


def load_image(file):
    """A picture file (path or binary file object) as an RGB PIL image, upright (EXIF), transparency on white, first frame.

    Raises BadSample with one sentence if the file isn't a readable picture.
    """
    try:
        image = Image.open(file)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):                               # PIL would clip 16 bits, not scale them
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()
        return image
    except Exception as error:                                       # broken bytes make PIL raise half a dozen kinds
        causes = {FileNotFoundError: "no picture", UnidentifiedImageError: "not a picture",
                  Image.DecompressionBombError: "too many pixels"}
        name = file if isinstance(file, (str, Path)) else "this member"
        raise BadSample(causes.get(type(error), "broken picture"), f"{name} can't be read as a picture: {error}") from None


def read_texts(text, record):
    """The bytes of a key.txt (or None) and a dict with "caption", "captions", "short_caption" and "conversations" in any
    combination -> {"caption": str, "captions": [str, ...], "turns": [(user, assistant), ...]}, each if there is one.

    captions: the long ones first, the short one last. "turns" keep the <image> marks of LLaVA's conversations.
    """
    try:
        texts = [None if text is None else text.decode("utf-8"), record.get("caption")]
        texts += (record.get("captions") or []) + [record.get("short_caption")]
        texts = [t.strip() for t in texts if t is not None]
        said = [(m["from"], m["value"].strip()) for m in record.get("conversations") or [] if m["from"] != "system"]
        roles, words = [role for role, _ in said], [word for _, word in said]
        "".join(texts + words).encode("utf-8")                       # JSON can hold half a character
    except UnicodeError:
        raise BadSample("not UTF-8", "the caption isn't UTF-8 text") from None
    except (AttributeError, KeyError, TypeError):
        raise BadSample("broken JSON", "captions must be strings, conversations lists of {'from', 'value'}") from None
    turns = list(zip(words[::2], words[1::2]))
    if roles != ["human", "gpt"] * len(turns) or not all(user and answer for user, answer in turns):
        raise BadSample("broken conversation", "a conversation must alternate between human and gpt, and end with gpt")
    captions = list(dict.fromkeys(filter(None, texts)))
    if not captions and not turns:
        raise BadSample("empty caption" if texts else "no caption", "there is no caption")
    return {**({"caption": captions[0], "captions": captions} if captions else {}), **({"turns": turns} if turns else {})}


def scan(path):
    """Where the samples of a tar shard or of a JSONL file lie, in the order in which they stand in it.

    Returns rows (n, 6) int64, offset and size of the picture, the .txt and the .json (offset -1: there is none), and how
    many members are left out for each cause of LEFT_OUT. ValueError if it isn't a tar archive.
    """
    rows, left, links = [], dict.fromkeys(LEFT_OUT, 0), set()
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            at = 0
            for line in file:
                if line.strip():
                    rows.append((-1, 0, -1, 0, at, len(line)))
                at += len(line)
    else:
        found = {"picture": {}, "txt": {}, "json": {}}               # stem -> (offset, size)
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    stem, dot, suffix = member.name.rpartition(".")
                    kind = "picture" if dot + suffix.lower() in PICTURES else suffix.lower()
                    if kind in found and member.isfile():
                        found[kind][stem] = member.offset_data, member.size
                    elif kind == "picture":                          # a link could lead anywhere
                        links.add(stem)
        except tarfile.TarError as error:
            raise ValueError(f"{path} isn't a readable tar shard: {error}") from None
        none = (-1, 0)
        rows = [(*where, *found["txt"].get(stem, none), *found["json"].get(stem, none))
                for stem, where in found["picture"].items() if stem in found["txt"] or stem in found["json"]]
        left["no caption"] = len(found["picture"]) - len(rows)
        left["no picture"] = len((found["txt"].keys() | found["json"].keys()) - found["picture"].keys() - links)
        left["link"] = len(links)
    return np.array(rows, np.int64).reshape(-1, 6), np.array(list(left.values()))


def scan_folder(path, names):
    """The pairs of a folder as `scan` gives those of a shard, but offset and size tell where in `names`, a bytearray that
    grows, the picture's path stands; those of the texts are 0 where there is one."""
    found = sorted(path.rglob("*"))
    stems = {suffix: {p.with_suffix("") for p in found if p.suffix == suffix} for suffix in (".txt", ".json")}
    rows, pictures = [], [p for p in found if p.suffix.lower() in PICTURES]
    for picture in pictures:
        stem, name = picture.with_suffix(""), os.fsencode(picture)
        if stem in stems[".txt"] or stem in stems[".json"]:
            rows.append((len(names), len(name), *(x for s in stems.values() for x in (0 if stem in s else -1, 0))))
            names += name
    lonely = (stems[".txt"] | stems[".json"]) - {p.with_suffix("") for p in pictures}
    return np.array(rows, np.int64).reshape(-1, 6), np.array([len(pictures) - len(rows), len(lonely), 0])


@contextmanager
def alone(file):
    """One process at a time, of all that start together: the first one builds the index, the others find it built."""
    lock = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file.with_suffix(".lock"), "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:                                                  # a disk that can't be written: each for itself
        pass
    try:
        yield
    finally:
        if lock:
            lock.close()


class Unread(torch.utils.data.Dataset):
    """The shards that have to be scanned, as a dataset, so that DataLoader's processes can share the work."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        """What `scan` returns, or (None, the sentence that it raises)."""
        try:
            return scan(self.paths[i])
        except ValueError as error:
            return None, str(error)


def index_shards(paths):
    """`scan` of many files, each read once and then kept: (rows (n, 6) of all, shards (S, 6)), two int64 tensors.

    shards: size, time of change, number of samples, then the counts of LEFT_OUT. The file in INDEX is named after the list
    of paths; a shard whose size or time has changed is scanned again. All processes of a machine share the file's pages as
    they are on disk: the rows of 30 million samples take 1.4 GB of memory once, not once a worker.
    """
    file = INDEX / f"{hashlib.sha256(chr(10).join(map(os.path.abspath, paths)).encode()).hexdigest()[:16]}.safetensors"
    stamps = torch.tensor([(s.st_size, s.st_mtime_ns) for s in map(os.stat, paths)])                  # (S, 2)
    with alone(file):
        rows, shards = torch.empty(0, 6, dtype=torch.int64), torch.tensor([[-1, -1, 0, 0, 0, 0]] * len(paths))
        try:
            kept = load_file(file)
            if len(kept["shards"]) == len(paths) and kept["shards"][:, 2].sum() == len(kept["rows"]) \
                    and kept["rows"].sum() + kept["shards"].sum() == kept["sum"]:
                rows, shards = kept["rows"], kept["shards"]
        except (OSError, SafetensorError, KeyError, IndexError):     # not there, or broken: build it anew
            pass
        stale = (shards[:, :2] != stamps).any(1).nonzero().flatten().tolist()
        if not stale:
            return rows, shards
        parts, shards = list(rows.split(shards[:, 2].tolist())), shards.clone()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        loader = torch.utils.data.DataLoader(                        # its own generator: the run's noise stays as it is
            Unread([paths[i] for i in stale]), batch_size=None, collate_fn=tuple, generator=torch.Generator(),
            num_workers=min(16, cores) if cores > 1 and len(stale) > 100 else 0)
        bar = tqdm(loader, desc="indexing shards", leave=False, disable=None if len(stale) > 20 else True)
        for i, (table, left) in zip(stale, bar):
            if table is None:
                raise ValueError(left)
            parts[i], shards[i] = torch.from_numpy(table), torch.tensor([*stamps[i], len(table), *left])
        rows = torch.cat(parts)
        try:
            temporary = file.with_suffix(".tmp")
            save_file({"rows": rows, "shards": shards, "sum": rows.sum() + shards.sum()}, temporary)
            os.replace(temporary, file)
            return load_file(file)["rows"], shards
        except (OSError, SafetensorError) as error:
            tqdm.write(f"the index of {len(paths)} shards can't be kept in {INDEX}, so the next start builds it again: "
                       f"{error}", file=sys.stderr)
            return rows, shards


class Shards:
    """Captioned pictures from tar shards, JSONL files and folders, mixed in given shares.

    A sample is key.jpg (.jpeg, .png, .webp) with key.txt or key.json or both; or a line of a JSONL file, its "image" a path
    relative to that file. sources: [(paths, share)], the shares exact Fractions or None: those without one are one source
    together, which gets what the others leave. Item i costs one seek, wherever it lies.
    Raises ValueError if a path is missing, a source holds no sample, or the shares don't fit together.
    """

    def __init__(self, sources):
        rest = [path for paths, share in sources if share is None for path in paths]
        weighted = [(paths, share) for paths, share in sources if share is not None]
        left = 1 - sum(share for _, share in weighted)
        if left < 0 or (left > 0) != bool(rest) or any(share <= 0 for _, share in weighted):
            told = ", ".join(str(float(share)) for _, share in weighted)
            raise ValueError(f"the shares of the sources are {told}: each must be above 0, and their sum 1, or less than 1 if "
                             "there are sources without a share")
        groups = ([(rest, left)] if rest else []) + weighted
        self.paths = [Path(path) for paths, _ in groups for path in paths]
        for path in self.paths:
            if not path.exists():
                raise ValueError(f"there is no shard or folder at {path}")
        files, names = [path for path in self.paths if not path.is_dir()], bytearray()
        rows, shards = index_shards(files) if files else (torch.empty(0, 6), torch.empty(0, 6, dtype=torch.int64))
        scanned = zip(rows.split(shards[:, 2].tolist()), shards[:, 3:].numpy())
        found = [next(scanned) if not path.is_dir() else scan_folder(path, names) for path in self.paths]
        self.rows = [torch.as_tensor(table) for table, _ in found]
        self.names = torch.frombuffer(names, dtype=torch.uint8) if names else None
        self.ends = np.cumsum([len(table) for table in self.rows])
        self.left_out = dict(zip(LEFT_OUT, np.sum([left for _, left in found], 0).tolist()))
        self.parts, first, u = [], 0, 0                              # (first item, number of items, share of all samples)
        for paths, share in groups:
            u += len(paths)
            if first == self.ends[u - 1]:
                raise ValueError(f"no picture with a caption (name.jpg + name.txt) in {', '.join(map(str, paths))}")
            self.parts.append((first, int(self.ends[u - 1]) - first, share))
            first = int(self.ends[u - 1])

    def __len__(self):
        return int(self.ends[-1])

    def locate(self, position):
        """Which source a position of the run belongs to, and which of that source's samples it is: (number, k).

        A source with share w gets the positions p at which floor(w p) grows, and there its sample k = floor(w p). The others
        divide the rest among themselves in the same way. Integers only, so it is exact at any position.
        """
        left = Fraction(1)
        for number in [*range(1, len(self.parts)), 0]:
            share = self.parts[number][2] / left
            k = position * share.numerator // share.denominator
            if (position + 1) * share.numerator // share.denominator > k:
                return number, k
            position, left = position - k, left - self.parts[number][2]

    def place(self, i):
        """Item i -> (path of its shard, JSONL file or folder, its row as `scan` gives it, its number in there)."""
        u = int(np.searchsorted(self.ends, i, "right"))
        i -= int(self.ends[u]) - len(self.rows[u])
        return self.paths[u], self.rows[u][i].tolist(), i

    def name(self, i):
        """What a person finds item i by."""
        path, (at, size, *_), number = self.place(i)
        if path.suffix == ".jsonl":
            return f"{path}, sample {number + 1}"
        if path.is_dir():
            return os.fsdecode(self.names[at:at + size].numpy().tobytes())
        with open(path, "rb") as file:
            header = os.pread(file.fileno(), 512, at - 512)
        return f"{path}: {header[:100].rstrip(bytes(1)).decode('utf-8', 'replace')}"

    def fingerprint(self):
        """A short name of what lies where: it changes with every shard that is changed, added or left out."""
        found = hashlib.sha256()
        for path, rows in zip(self.paths, self.rows):
            stamp = path.stat()
            found.update(f"{path.name} {stamp.st_size} {stamp.st_mtime_ns} {len(rows)}\n".encode())
        return found.hexdigest()[:16]

    def __getitem__(self, i):
        """{"image": PIL image, and what `read_texts` finds}; raises BadSample if picture or text can't be used."""
        image, texts = self.read(i)
        return {"image": load_image(io.BytesIO(image) if isinstance(image, bytes) else image), **texts}

    def read(self, i, texts_only=False):
        """(the picture's bytes or path, what `read_texts` finds) of item i; raises BadSample if the texts can't be used.

        With texts_only, the picture isn't read.
        """
        path, row, _ = self.place(i)
        if path.is_dir():
            picture = Path(os.fsdecode(self.names[row[0]:row[0] + row[1]].numpy().tobytes()))
        if texts_only:
            row[0] = -1
        if path.is_dir():
            try:
                image, text, record = (file.read_bytes() if at >= 0 else None for at, file in zip(
                    row[::2], (picture, picture.with_suffix(".txt"), picture.with_suffix(".json"))))
            except OSError as error:                                 # it went away, or is a folder
                raise BadSample("no picture", str(error)) from None
        else:
            with open(path, "rb", buffering=0) as file:
                image, text, record = (os.pread(file.fileno(), size, at) if at >= 0 else None
                                       for at, size in zip(row[::2], row[1::2]))
        try:
            record = {} if record is None else dict(json.loads(record))
            image = path.parent / record["image"] if path.suffix == ".jsonl" else image
        except KeyError:
            raise BadSample("no picture", "a line of a JSONL file needs an \"image\"") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise BadSample("broken JSON", f"this can't be read as a JSON object: {error}") from None
        texts = read_texts(text, record)
        if image == b"":
            raise BadSample("empty picture", "the picture has no bytes")
        return image, texts


class Samples(torch.utils.data.Dataset):
    """Samples by position: sample p of a run is a pure function of (seed, p), whatever the ranks and workers.

    Each epoch of each source has its own permutation. A broken item is replaced by the next readable one of that order,
    deterministically. image: uint8 (size, size, 3), short side scaled to `size`, middle cut out. long: the world's captions.
    short: probability of the short caption where there is one (None: the world's as `long` says, else the long one). talk:
    conversations will do where there is no caption.
    """

    def __init__(self, source, size=64, seed=0, long=None, short=None, talk=False):
        self.source, self.size, self.seed, self.long, self.short, self.talk = source, size, seed, long, short, talk
        self.orders = {}                                             # number of a source -> (epoch, its permutation)

    def index(self, position, ahead=0):
        """The item at a position, or `ahead` places behind it in its source. The world is endless: no order but its own."""
        if isinstance(self.source, World):
            return (position + ahead) % len(self.source)
        number, k = self.source.locate(position)
        first, length, _ = self.source.parts[number]
        epoch, at = divmod(k + ahead, length)
        if self.orders.get(number, (None,))[0] != epoch:
            order = np.random.default_rng((self.seed, epoch, number)).permutation(length)
            self.orders[number] = epoch, order.astype(np.uint32 if length < 2 ** 32 else np.uint64)
        return first + int(self.orders[number][1][at])

    def choose(self, item, rng):
        """One of the captions of an item, or None."""
        short = self.short is not None and rng.random() < self.short
        if "scene" in item:
            return caption(item["scene"], rng, self.long if self.short is None else not short)
        captions = item.get("captions", [None])
        return captions[-1 if short else 0] if len(captions) < 3 or short else pick(rng, captions[:-1])

    def __getitem__(self, position):
        """{"image", "caption" and maybe "turns", "scene" (the world only), "skipped": [(cause, name)] of the items that were
        passed over, this position's own first, "rng": a generator for what the caller draws for this sample}."""
        rng, skipped = np.random.default_rng((self.seed, position, 1)), []
        while len(skipped) < 100:
            i = self.index(position, len(skipped))
            try:
                item = self.source[i]
                if not self.talk and "turns" in item and "caption" not in item:
                    raise BadSample("no caption", "a conversation without a caption")
                break
            except BadSample as error:
                skipped.append((error.cause, self.source.name(i)))
                last = error
        else:
            raise ValueError(f"100 samples in a row can't be read; the last: {last} ({skipped[-1][1]})")
        if isinstance(item.get("image"), Image.Image):
            item["image"] = np.asarray(crop_square(item["image"], self.size))
        return {**item, "skipped": skipped, "rng": rng, "caption": self.choose(item, rng)}


def open_source(spec, size=64, seed=0, **world):
    """`--data`: None is the synthetic world (further arguments are World's); else comma-separated tar shards, folders, JSONL
    files or glob patterns, each with its share of all samples if it ends in =share (long/*.tar,short/*.tar=0.1)."""
    if spec is None:
        return World(seed, size, **world)
    sources = []
    for part in spec.split(","):
        share, (path, _, number) = None, part.rpartition("=")
        if path and not Path(part).exists():
            with suppress(ValueError, ZeroDivisionError):            # no number: a part of the name
                part, share = path, Fraction(number)
        found = sorted(Path("/" if part.startswith("/") else ".").glob(part.lstrip("/"))) if any(c in part for c in "*?[") else [part]
        if not found:
            raise ValueError(f"no file matches {part}")
        sources.append((found, share))
    return Shards(sources)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and templates
# ----------------------------------------------------------------------------------------------------------------------
SYSTEM = "You are a helpful assistant."
GENERATE = "Please generate image based on the following caption: {}"
DESCRIBE = "Describe this image."
EXPAND = "Describe an image of the following caption in full: {}"
CLAIM = 'Does this image show "{}"? Answer yes or no.'               # VQAScore's question (arXiv 2404.01291), in other words
RECONSTRUCT = "Please reconstruct the given image."
# Qwen2.5's added tokens in the order of their ids, then the three of BLIP3-o: [IMG] is vocab_size - 3 at every size.
SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
           "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
           "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
           "[IMG] [/IMG] <image>").split()
# The pre-tokenisation pattern of Qwen2's tokenizer.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE of Qwen2's form, learnt from an iterable of strings; at most vocab_size entries, SPECIAL last."""
    bpe = Tokenizers(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens([AddedToken(s, normalized=False) for s in SPECIAL])
    return Tokenizer(bpe)


class Tokenizer:
    """Text <-> ids by a `tokenizer.json` of the Qwen2 form, at any vocabulary size.

    Text typed by a user never becomes a control token: `<|im_end|>` in a prompt stays seven plain characters and more.
    """

    def __init__(self, bpe):
        self.bpe = bpe
        self.bpe.encode_special_tokens = True
        self.special = {s: bpe.token_to_id(s) for s in SPECIAL}
        if self.special["[IMG]"] is None:                            # a bare language model's: BLIP3-o adds three
            self.special.update({s: bpe.get_vocab_size() + i for i, s in enumerate(SPECIAL[-3:])})
        self.vocab_size = self.special["[IMG]"] + 3
        self.names = {i: s for s, i in self.special.items()}

    @classmethod
    def from_pretrained(cls, folder):
        """Reads folder/tokenizer.json; ValueError if it isn't there."""
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"there is no tokenizer.json in {folder}")
        try:
            return cls(Tokenizers.from_file(str(file)))
        except Exception as error:                                   # the library raises nothing narrower
            raise ValueError(f"{file} isn't a tokenizer: {error}") from None

    def save(self, folder):
        """Writes folder/tokenizer.json."""
        self.bpe.save(str(Path(folder) / "tokenizer.json"))

    def encode(self, text):
        """Plain text -> list of ids."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text, control tokens left out."""
        return self.bpe.decode([int(i) for i in ids if int(i) not in self.names], skip_special_tokens=False)


def chat_ids(tokenizer, turns, pictures=(), system=SYSTEM):
    """The Qwen2.5 chat template. turns: [(user, assistant)], the last assistant None to leave its turn open.

    pictures: for the first turns, a list each of what their pictures take: numbers of <|image_pad|>, one for each merged
    patch. They stand in front of the user's text. Returns (ids, targets): two lists of one length; targets is True on what
    an assistant says, its <|im_end|> included. The text between two control tokens is encoded in one piece, as the
    reference tokenizer does.
    """
    t = tokenizer.special
    start, end, newline = t["<|im_start|>"], t["<|im_end|>"], tokenizer.encode("\n")
    ids = [start, *tokenizer.encode(f"system\n{system}"), end, *newline]
    targets = [False] * len(ids)
    for i, (user, assistant) in enumerate(turns):
        shown = pictures[i] if i < len(pictures) else ()
        looks = [id for pads in shown for id in (t["<|vision_start|>"], *[t["<|image_pad|>"]] * pads, t["<|vision_end|>"])]
        said = [*tokenizer.encode("user\n"), *looks, *tokenizer.encode(user)] if looks else tokenizer.encode(f"user\n{user}")
        ids += [start, *said, end, *newline, start, *tokenizer.encode("assistant\n")]
        targets += [False] * (len(ids) - len(targets))
        if assistant is not None:
            ids += [*tokenizer.encode(assistant), end]
            targets += [True] * (len(ids) - len(targets))
            ids += newline
            targets += [False] * len(newline)
    return ids, targets


def prompt_ids(tokenizer, prompt, pads=0):
    """Ids of the official inference template for a prompt to draw; [IMG] and the queries follow in model.py.

    pads: of a picture that is part of the prompt; then the text stands bare, one line below it, as in official
    "<image>\\nPlease reconstruct the given image.".
    """
    if pads:
        return chat_ids(tokenizer, [("\n" + prompt, None)], [[pads]])[0]
    return chat_ids(tokenizer, [(GENERATE.format(prompt), None)])[0]


def pad(rows, value=0):
    """Lists of ids -> (ids (B, L) long, mask (B, L) bool), right-padded with `value`."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [value] * (width - len(r)) for r in rows])
    mask = torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows])
    return ids, mask


# ----------------------------------------------------------------------------------------------------------------------
# Pixels
# ----------------------------------------------------------------------------------------------------------------------
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])            # of CLIP; EVA-CLIP and Qwen's ViT both use them
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def crop_square(image, size):
    """PIL image -> PIL (size, size): shorter side scaled to `size` (bicubic), the middle cut out. The official training path."""
    scale = size / min(image.size)
    w, h = (max(size, round(s * scale)) for s in image.size)
    left, top = (w - size) // 2, (h - size) // 2
    return image.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))


def to_pixels(images):
    """uint8 (B, H, W, 3) array -> float (B, 3, H, W), normalised with CLIP's mean and standard deviation."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN[:, None, None]) / STD[:, None, None]


def to_signed(pixels):
    """Normalised pixels (B, 3, H, W) -> the same in [-1, 1], as the VAE takes them."""
    return (pixels * STD[:, None, None].to(pixels) + MEAN[:, None, None].to(pixels)) * 2 - 1


def smart_resize(height, width, factor=28, min_pixels=None, max_pixels=None):
    """(height, width) that Qwen2.5-VL scales a picture to: multiples of `factor` with an area between the two limits.

    The limits default to 4 and 16384 cells of factor x factor (3136 and 12845056 pixels at 28, as the released
    preprocessor). Raises ValueError at an aspect ratio above 200.
    """
    low, high = min_pixels or 4 * factor ** 2, max_pixels or 16384 * factor ** 2
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"the picture is {width} x {height}: Qwen2.5-VL takes aspect ratios up to 200")
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > high:
        beta = math.sqrt(height * width / high)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < low:
        beta = math.sqrt(low / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


def to_patches(pixels, patch=14, merge=2, frames=2):
    """Normalised (B, 3, H, W) -> (patches (B*N, 3*frames*patch*patch), grid (B, 3)) in Qwen's merge-block order.

    N = H/patch * W/patch. Each merge x merge block's patches follow each other; a still picture is repeated `frames` times.
    """
    B, C, H, W = pixels.shape
    h, w = H // patch, W // patch
    x = pixels.view(B, C, h // merge, merge, patch, w // merge, merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)                            # (B, h/m, w/m, m, m, C, p, p)
    x = x.unsqueeze(6).expand(*x.shape[:6], frames, patch, patch)    # (B, h/m, w/m, m, m, C, T, p, p)
    return x.reshape(B * h * w, C * frames * patch ** 2), torch.tensor([[1, h, w]]).repeat(B, 1)


def preprocess_clip(image, size=448):
    """PIL image -> (1, 3, size, size) normalised, for EVA-CLIP."""
    return to_pixels(np.asarray(crop_square(image, size))[None])


def preprocess_qwen(image, patch=14, merge=2, min_pixels=None, max_pixels=None):
    """PIL image of any size -> (patches (N, 3*2*patch*patch), grid (1, 3)) for Qwen's ViT."""
    h, w = smart_resize(image.height, image.width, patch * merge, min_pixels, max_pixels)
    return to_patches(to_pixels(np.asarray(image.resize((w, h), Image.BICUBIC))[None]), patch, merge)


# ----------------------------------------------------------------------------------------------------------------------
# Charts: what train.py and eval.py draw of their numbers
# ----------------------------------------------------------------------------------------------------------------------
INK = ("#2b59c3", "#d1495b", "#2a9d54", "#e08a1e", "#7b4bb7", "#555555")


def ticks(low, high, most=6):
    """Round numbers between low and high, at most `most` of them and their step 1, 2 or 5 times a power of ten."""
    base = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * base for m in (1, 2, 5, 10, 20) if (high - low) / (m * base) <= most - 1)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw_charts(panels, columns=2, size=(560, 380), fine=3):
    """Line charts side by side -> PIL image. panels: [(title, words at the x axis, {label: [(x, low, y, high), ...]})].

    y is drawn as a line, low to high as a band behind it. The y axis begins at zero where that leaves less than half of
    it empty. All is drawn `fine` times as large first: Pillow has no soft edges.
    """
    width, height = size
    across, down = min(columns, len(panels)), math.ceil(len(panels) / columns)
    image = Image.new("RGB", (fine * width * across, fine * height * down), "white")
    pen, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(12 * fine)
    for i, (title, below, curves) in enumerate(panels):
        x0, y0 = i % columns * width, i // columns * height
        left, top, right = x0 + 62, y0 + (52 if len(curves) > 1 else 34), x0 + width - 16
        bottom = y0 + height - (46 if below else 28)
        points = np.array([p for curve in curves.values() for p in curve], dtype=float)               # (n, 4)
        (first, last), (low, high) = ((v.min(), v.max()) for v in (points[:, 0], points[:, 1:]))
        low = 0.0 if 0 <= low < high / 2 else low
        last, high = (b if b > a else a + (abs(a) or 1.0) for a, b in ((first, last), (low, high)))
        low, high = low - 0.05 * (high - low) * (low != 0), high + 0.05 * (high - low)

        def at(x, y):
            return (fine * (left + (right - left) * (x - first) / (last - first)),
                    fine * (bottom - (bottom - top) * (y - low) / (high - low)))

        def write(x, y, text, anchor, ink="#333333"):
            pen.text((fine * x, fine * y), text, ink, font, anchor)
        for y in ticks(low, high):
            pen.line((*at(first, y), *at(last, y)), "#e4e4e4", fine)
            write(left - 7, at(first, y)[1] / fine, f"{y:.6g}", "rm")
        for x in ticks(first, last):
            pen.line((*at(x, low), at(x, low)[0], fine * (bottom + 4)), "#999999", fine)
            write(at(x, low)[0] / fine, bottom + 7, f"{x:.6g}", "mt")
        pen.line((*at(first, high), *at(first, low), *at(last, low)), "#999999", fine)
        write(x0 + 14, y0 + 10, title, "lt", "black")
        write((left + right) / 2, y0 + height - 8, below, "mb")
        along = x0 + 14
        for (label, curve), ink in zip(curves.items(), itertools.cycle(INK)):
            line = [at(x, y) for x, _, y, _ in curve]
            pen.polygon([at(x, a) for x, a, _, _ in curve] + [at(x, b) for x, _, _, b in reversed(curve)], ink + "30")
            pen.line(line, ink, 2 * fine, "curve")
            if len(line) <= 12:
                for x, y in line:
                    pen.ellipse((x - 3 * fine, y - 3 * fine, x + 3 * fine, y + 3 * fine), ink)
            if len(curves) > 1:
                pen.line((fine * along, fine * (y0 + 38), fine * (along + 18), fine * (y0 + 38)), ink, 3 * fine)
                write(along + 23, y0 + 38, label, "lm")
                along += 38 + font.getlength(label) / fine
    return image.reduce(fine)
