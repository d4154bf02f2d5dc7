"""The synthetic world: images of one to four plain objects, about which everything is known.

Scenes are pure functions of (seed, index). Everything else is a function of a scene and of an `rng`, a
`numpy.random.Generator`; the order of its draws is fixed, for recorded numbers depend on it.

Reading order: scenes -> images -> captions -> reading and rewriting captions -> edits and perturbations ->
questions -> prompts that score a model.
"""
import itertools
import math
import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from data import MATCH

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
    def is_known(self):
        """Whether shape and colour are of this world: the judge may see others in a generated image."""
        return self.shape in SHAPES and self.colour in COLOURS

    @property
    def reach(self):
        """Distance from the centre to the farthest corner, at most, if the judge doesn't know the shape."""
        return SIZES[self.size] * REACH.get(self.shape, max(REACH.values()))


@dataclass(frozen=True)
class Scene:
    """A background and `Object`s that touch neither each other nor the border."""
    background: str
    objects: tuple


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


def place(kinds, rng, wanted=None, first=1):
    """A tuple of `Object`s without contact for [(shape, colour, size)], or None after 60 tries.

    `wanted` (one of RELATIONS): how each of the `first` shall lie relative to each of the others.
    """
    margin = np.array([SIZES[size] * REACH[shape] + 0.02 for shape, _, size in kinds])[:, None]    # (K, 1)
    centres = margin + (1 - 2 * margin) * rng.random((60, len(kinds), 2))    # (60, K, 2)
    for attempt in centres.round(4).tolist():
        objects = tuple(Object(*kind, *centre) for kind, centre in zip(kinds, attempt))
        if not all(apart(a, b) for a, b in itertools.combinations(objects, 2)):
            continue
        pairs = itertools.product(objects[:first], objects[first:]) if wanted else ()
        if all(relation(a, b) == wanted for a, b in pairs):
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


# ---- Images ----------------------------------------------------------------------------------------------
def render(scene, size=64):
    """The image of a scene, uint8 (size, size, 3): drawn at four times the size, then averaged."""
    big = 4 * size
    image = Image.new("RGB", (big, big), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    for obj in scene.objects:
        corners = (OUTLINES[obj.shape] * SIZES[obj.size] + (obj.x, obj.y)) * big - 0.5
        pen.polygon([tuple(corner) for corner in corners], fill=COLOURS[obj.colour])
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


def group_caption(rng, novel=False):
    """(caption, scene) with a relation of two groups of objects: "two green stars above a yellow triangle".

    Three or four objects, to be read: images of them hardly ever lie like this. novel: HELD_OUT pairs may be
    among them.
    """
    while True:
        counts = pick(rng, ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2)))
        pairs = [pick(rng, PAIRS if novel else TRAINING_PAIRS) for _ in counts]
        kinds = [(shape, colour, "small") for n, (colour, shape) in zip(counts, pairs) for _ in range(n)]
        wanted = pick(rng, list(RELATIONS))
        objects = pairs[0] != pairs[1] and place(kinds, rng, wanted, counts[0])
        if objects:
            names = [noun(objects[0]), noun(objects[-1])]
            a, b = (article(name) if count == 1 else f"{NUMBERS[count]} {name}s"
                    for count, name in zip(counts, names))
            scene = Scene(pick(rng, list(BACKGROUNDS)), objects)
            text = f"{a} {pick(rng, WORDS_OF_RELATION[wanted])} {b}"
            return (on_background(text, scene) if rng.random() < 0.3 else text), scene


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


def describe(scene):
    """The answer to DESCRIBE: every object and attribute, from left to right, in one fixed form.

    Captions vary; a model that is to learn to see learns more from a text that only the image can change.
    """
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
SIDE_WORDS = ("left", "right", "above", "below")    # of a phrase of parse_caption
# What a query target can say of an object; "of two": there are two objects in all.
CAPTION_WORDS = (*NUMBERS[2:], *SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, "left", "right", "above", "below",
                 "top", "bottom", "middle", "of one", "of two", "of three", "of four")
NOUN_PHRASE = re.compile(
    rf"\b(?:an?|{'|'.join(NUMBERS[2:])}) (?:(?:{'|'.join(SIZE_SYNONYMS)}) )?(?:(?:{'|'.join(COLOURS)}) )?"
    rf"(?:{'|'.join(SHAPES)})s?\b(?: (?:{'|'.join(REGIONS)}))?")


def parse_caption(text):
    """The objects that a caption names, in its order, each as a list of CAPTION_WORDS with the shape first.

    [] for texts that are no captions of this world.

    "A tiny red circle left of two stars on grey" -> [["circle", "small", "red", "left", "grey"],
                                                      ["star", "two", "right", "grey"]]
    """
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


def named_words(parsed, names):
    """Those words of all parsed phrases that are among `names`, in their order."""
    return [word for words in parsed for word in words if word in names]


def upsample_caption(scene, text, parsed):
    """The answer to UPSAMPLE: the scene as its caption `text` puts it, with every attribute left open there.

    parsed: parse_caption(text), or what `paraphrase` returned. Its order stays, so that a small language
    model has little to do but copy; a relation stays, too. Without one, regions are given.
    """
    attributes = (*SHAPES, *COLOURS, *SIZES)
    ordered, remaining = [], list(scene.objects)
    for words in parsed:
        asked = {word for word in words if word in attributes}
        fitting = [obj for obj in remaining if asked <= {obj.shape, obj.colour, obj.size}][:number_of(words)]
        ordered += fitting
        remaining = [obj for obj in remaining if not any(obj is other for other in fitting)]
    if len(ordered) == 2 and any(f" {words} " in text for words in SIDES):
        first, second = (article(noun(obj, size=True)) for obj in ordered)
        return on_background(f"{first} {relation(*ordered)} {second}", scene)
    return on_background(regions_phrase(ordered), scene)


SYNONYMS = {
    "red": ("crimson", "scarlet", "ruby", "cherry"), "orange": ("amber", "tangerine"),
    "yellow": ("golden", "lemon", "canary"), "green": ("emerald", "lime", "olive"),
    "blue": ("azure", "navy", "sapphire", "cobalt"), "purple": ("violet", "lilac", "lavender"),
    "grey": ("gray", "silver"), "black": ("dark", "jet black"), "white": ("blank", "snow white"),
    "circle": ("disc", "dot", "ball", "round shape"), "square": ("box", "block", "cube"),
    "triangle": ("pyramid",), "star": ("star shape",),
    "small": ("tiny", "little", "mini", "wee", "very small", "really small"),
    "large": ("big", "huge", "giant", "enormous", "very big", "great"),
    "two": ("2", "a pair of", "a couple of", "exactly two"), "three": ("3", "a trio of", "exactly three"),
    "four": ("4", "a quartet of", "exactly four")}
REQUEST_FORMS = (
    *["{}"] * 6, "draw {}", "draw me {}", "draw me {}, please", "please draw {}", "can you make {}?",
    "could you draw {}?", "show me {}", "paint {}", "generate {}", "create an image of {}", "make {}",
    "just {}", "i want {}", "i would like to see {}", "i need {}", "give me {}", "a drawing of {}",
    "a picture with {}", "a simple image of {}", "this is {}", "this image shows {}", "here we see {}",
    "only {}, nothing else", "{} and nothing else", "my favourite: {}", "let me see {}", "imagine {}")
PAIR_FORMS = ("{} and {}", "{}, {}", "{} with {}", "{} plus {}", "{} & {}", "{} beside {}", "{} next to {}",
              "both {} and {}", "{} and also {}", "{}. {}.", "{} together with {}", "{} as well as {}",
              "{} and then {}", "{} accompanied by {}", "two things: {}, {}", "there is {}, and there is {}")
LIST_FORMS = ("{}, {}", "{}, and {}", "{} and {}", "{} plus {}")    # between more than two
SIDE_FORMS = {    # {0} is on that side of {1}
    "left": ("{} to the left of {}", "{} on the left, {} on the right", "on the left {}, on the right {}",
             "left: {}, right: {}", "{1} with {0} on its left", "{1}, and left of it {0}",
             "{1} with {0} on its left side", "{1} to the right of {0}", "{1}, and to its left {0}",
             "first {}, then to the right of that {}", "{0} is on the left side of {1}"),
    "above": ("{} over {}", "{} on top of {}", "{} at the top, {} at the bottom",
              "at the top {}, at the bottom {}", "above: {}, below: {}", "{1} underneath {0}",
              "{1} beneath {0}", "{1} with {0} over it", "{0}, and under it {1}", "{0} higher than {1}",
              "{1} lower than {0}", "{1}, and above it {0}", "{0} lies above {1}")}
BACKGROUND_FORMS = ("{0} on {1}", "{0} on a {1} background", "{1} background, {0}", "on {1}: {0}",
                    "against {1}, {0}", "{0} in front of a {1} wall", "{0} on {1} paper", "on {1} {0}",
                    "a {1} background with {0}", "{0}, background {1}", "{0} with a {1} background")
DENIALS = (", no {}s", " but no {}", ", without any {}s", ", and no {}s", " but not a {}", " without a {}")


def synonym(word, rng):
    """The word, or at random one of its SYNONYMS."""
    return pick(rng, SYNONYMS.get(word, (word,))) if rng.random() < 0.4 else word


def paraphrase(text, rng):
    """(a caption in other words, as people may type it; its objects in the form and order of parse_caption).

    Texts that name no object, or regions, stay as they are.
    """
    parsed = parse_caption(text)
    if not parsed or any(name in text.lower() for name in REGIONS):
        return text, parsed
    sides = named_words(parsed, SIDE_WORDS)
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
        link = pick(rng, LIST_FORMS)
        body = link.format(", ".join(phrases[:-1]), phrases[-1]) if phrases[1:] else phrases[0]
    absent = [shape for shape in SHAPES if all(words[0] != shape for words in parsed)]
    if absent and rng.random() < 0.08:
        body += pick(rng, DENIALS).format(pick(rng, absent))
    backgrounds = named_words(parsed, BACKGROUNDS)
    if backgrounds:
        body = pick(rng, BACKGROUND_FORMS).format(body, synonym(backgrounds[0], rng))
    request = pick(rng, REQUEST_FORMS).format(body)
    if rng.random() < 0.16:
        return request.upper(), parsed
    return request[0].upper() + request[1:] if rng.random() < 0.2 else request, parsed


def paraphrase_object(words, rng):
    """One entry of parse_caption as a noun phrase, with synonyms, the colour before or after the shape."""
    number, size, colour, shape = (
        [synonym(word, rng) for word in words if word in kind] for kind in (NUMBERS, SIZES, COLOURS, SHAPES))
    if number:
        shape[0] += "es" if shape[0].endswith("x") else "s"
    order, start = rng.random() if colour or size else 1.0, rng.random()
    if order < 0.1 and colour:
        parts = size + shape + ["in"] + colour
    elif order < 0.2:
        parts = shape + ["that are" if number else "that is"] + [" and ".join(size + colour)]
    elif order < 0.25:
        return f"{' '.join(number) or 'a'} {shape[0]}, {' and '.join(size + colour)}"
    elif order < 0.3:
        parts = colour + shape + (["of", *size, "size"] if size else [])
    else:
        parts = size + colour + shape
    phrase = " ".join(number + parts)
    if number or start < 0.1:
        return phrase
    return f"{pick(rng, ('one', 'a single'))} {phrase}" if start < 0.2 else article(phrase)


def swap(text, names):
    """A caption in which two different ones of `names` (COLOURS or SHAPES) stand, with the two exchanged;
    None for any other."""
    named = re.findall("|".join(names), text)
    if len(named) != 2 or named[0] == named[1]:
        return None
    other = {named[0]: named[1], named[1]: named[0]}
    swapped = re.sub("|".join(names), lambda match: other[match[0]], text)
    return re.sub(r"\b([Aa])n? (?=(\w))",
                  lambda match: match[1] + ("n " if match[2] in "aeiou" else " "), swapped)


# ---- Edits and perturbations -----------------------------------------------------------------------------
EDIT_FORMS = {    # {0} is the object, {1} its new colour or place, or the new background
    "colour": ("make {0} {1}", "make {0} {1}, please", "turn {0} {1}", "paint {0} {1}", "colour {0} {1}",
               "change the colour of {0} to {1}", "change {0} to {1}", "{0} should be {1}",
               "can you make {0} {1}?", "i want {0} to be {1}", "now make {0} {1}"),
    "place": ("move {0} to {1}", "put {0} to {1}", "shift {0} to {1}", "move {0} over to {1}, please",
              "can you move {0} to {1}?", "{0} should go to {1}"),
    "remove": ("remove {0}", "delete {0}", "take {0} away", "take away {0}", "erase {0}", "without {0}",
               "remove {0}, please", "get rid of {0}", "can you remove {0}?", "i don't want {0}"),
    "background": ("make the background {1}", "change the background to {1}", "on a {1} background",
                   "turn the background {1}", "put it on {1}", "the background should be {1}",
                   "the same on {1}", "can you make the background {1}?", "paint the background {1}")}


def names_of(obj, scene):
    """How a request may name one object of a scene, without doubt: "the star", "the left one", "it", ..."""
    others = [other for other in scene.objects if other is not obj]
    names = [f"the {noun(obj, colour, size)}" for colour in (False, True) for size in (False, True)
             if all(noun(obj, colour, size) != noun(other, colour, size) for other in others)]
    if all(obj.colour != other.colour for other in others):
        names.append(f"the {obj.colour} one")
    if not others:
        return [*names, "it", "the object"]
    for words, (dx, dy) in {"left": (-1, 0), "right": (1, 0), "upper": (0, -1), "lower": (0, 1)}.items():
        if all((obj.x - other.x) * dx + (obj.y - other.y) * dy > 0.12 for other in others):
            of_kind = all(other.shape == obj.shape for other in others)
            names += [f"the {words} one"] + [f"the {words} {obj.shape}"] * of_kind
    return names


def edit(scene, rng, kind=None):
    """(instruction, the scene after it), or None if a change of the wanted `kind` isn't possible.

    An object gets another "colour" or "place", or goes ("remove"); or the "background" changes. Without a
    kind, any that is possible. Objects keep their order; one that isn't known stays as it is.
    """
    named = [(obj, names) for obj in scene.objects if obj.is_known and (names := names_of(obj, scene))]
    kinds = ("colour", "place", "background") if named else ("background",)
    if named and len(scene.objects) > 1:
        kinds += ("remove",)
    if kind is not None and kind not in kinds:
        return None
    any_kind = kind is None
    kind = kind or pick(rng, kinds)
    form = pick(rng, EDIT_FORMS[kind])
    if kind == "background":
        background = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
        return form.format("", background), replace(scene, background=background)
    target, names = pick(rng, named)
    name = pick(rng, names)
    others, value, changed = [other for other in scene.objects if other is not target], "", ()
    if kind == "colour":
        pairs = [pair for pair in TRAINING_PAIRS if pair[1] == target.shape and pair[0] != target.colour]
        value = pick(rng, pairs)[0]
        changed = (replace(target, colour=value),)
    elif kind == "place":
        moved = move(target, others, rng)
        if moved is None:    # nowhere else is room for it
            return edit(scene, rng, "background") if any_kind else None
        value, changed = region(moved).split(" ", 1)[1], (moved,)    # without its "on", "at" or "in"
    at = next(i for i, obj in enumerate(scene.objects) if obj is target)
    objects = scene.objects[:at] + changed + scene.objects[at + 1:]
    return form.format(name, value), replace(scene, objects=objects)


def describe_edit(before, after):
    """The answer to UPSAMPLE_EDIT: describe(after), its objects in the order that they had before.

    A move would change the order from left to right, and small language models copy better than they sort.
    """
    order = sorted(range(len(before.objects)), key=lambda i: before.objects[i].x)
    if len(after.objects) == len(before.objects):
        return on_background(regions_phrase([after.objects[i] for i in order]), after)
    return describe(after)


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
    background, or everything.
    """
    kind = pick(rng, ("colour", "shape", "less", "more", "places", "colours", "background", "all"))
    if kind == "all":
        return make_scene(0, int(rng.integers(10 ** 9)))
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
# The wordings of a question, the standard one first. {0}, {1}: what it is about.
QUESTION_FORMS = {
    "colour": ("What colour is the {0}?", "What is the colour of the {0}?",
               "Which colour does the {0} have?", "What color is the {0}?",
               "Tell me the colour of the {0}.", "The {0} is of what colour?"),
    "shape": ("What shape is the {0} object?", "Which shape is {0}?", "What is the {0} thing?",
              "What shape does the {0} one have?", "Name the shape of the {0} object.",
              "What is the shape of the {0} object?"),
    "count": ("How many {0}s are there?", "How many {0}s do you see?", "Count the {0}s.",
              "What is the number of {0}s?", "how many {0}s", "How many {0}s does the image show?"),
    "existence": ("Is there {0}?", "Do you see {0}?", "Can you see {0}?", "Does the image have {0}?",
                  "Is {0} in the image?", "Can {0} be seen?"),
    "position": ("Where is the {0} relative to the {1}?", "Where is the {0}, seen from the {1}?",
                 "On which side of the {1} is the {0}?", "Where does the {0} lie relative to the {1}?",
                 "Where is the {0} in relation to the {1}?"),
    "relation": ("Is the {0} {2} the {1}?", "Does the {0} lie {2} the {1}?",
                 "Can you see the {0} {2} the {1}?", "Is it true that the {0} is {2} the {1}?"),
    "background": ("What colour is the background?", "What is the colour of the background?",
                   "Which colour is the background?", "What colour is behind everything?",
                   "What is the background colour?", "On what colour is this?")}
OBJECT_NOUNS = ("object", "shape", "thing")                        # in questions about all objects
SPOKEN_RELATIONS = {"left of": ("to the left of", "on the left of"), "below": ("under", "beneath"),
                    "right of": ("to the right of", "on the right of"), "above": ("over", "higher than")}


def question(scene, rng, kind=None, paraphrase=False):
    """(kind, question, answer), or None where the scene can't answer it; kind: of QUESTIONS, drawn if None.

    Existence and half of the position questions are answered yes or no, evenly; the others by a name.
    paraphrase: in any other wording of QUESTION_FORMS than the first.
    """
    kind = kind or pick(rng, QUESTIONS)
    objects = scene.objects
    subject = pick(rng, objects)
    shapes = [obj.shape for obj in objects]
    colours = [obj.colour for obj in objects]

    def ask_in_words(form, answer, *names):
        forms = QUESTION_FORMS[form]
        return kind, (pick(rng, forms[1:]) if paraphrase else forms[0]).format(*names), answer
    if kind == "background":
        return ask_in_words(kind, scene.background)
    if kind == "colour" and shapes.count(subject.shape) == 1:
        return ask_in_words(kind, subject.colour, subject.shape)
    if kind == "shape" and colours.count(subject.colour) == 1:
        return ask_in_words(kind, subject.shape, subject.colour)
    if kind == "count":
        if rng.random() < 0.4:
            noun_for_all = pick(rng, OBJECT_NOUNS) if paraphrase else "object"
            return ask_in_words(kind, NUMBERS[len(objects)], noun_for_all)
        shape = subject.shape if rng.random() < 0.8 else pick(rng, SHAPES)
        count = shapes.count(shape)
        return ask_in_words(kind, NUMBERS[count] if count else "none", shape)
    if kind == "existence":
        if rng.random() < 0.5:
            return ask_in_words(kind, "yes", article(noun(subject)))
        present = set(zip(colours, shapes))
        similar = [(colour, shape) for colour, shape in PAIRS if (colour, shape) not in present
                   and (colour == subject.colour) != (shape == subject.shape)]
        return ask_in_words(kind, "no", article(" ".join(pick(rng, similar))))
    if kind == "position":
        pairs = [(a, b) for a, b in itertools.permutations(objects, 2)
                 if shapes.count(a.shape) == shapes.count(b.shape) == 1 and relation(a, b)]
        if pairs:
            a, b = pick(rng, pairs)
            truth = relation(a, b)
            if rng.random() < 0.5:
                return ask_in_words("position", truth, a.shape, b.shape)
            asked = truth if rng.random() < 0.5 else pick(rng, [name for name in RELATIONS if name != truth])
            words = pick(rng, SPOKEN_RELATIONS[asked]) if paraphrase else asked
            return ask_in_words("relation", "yes" if asked == truth else "no", a.shape, b.shape, words)
    return None


def ask(scene, rng, kinds=QUESTIONS, paraphrase=False):
    """(question, answer) about a scene, of one of the kinds that it can answer."""
    asked = None
    while asked is None:
        asked = question(scene, rng, pick(rng, kinds), paraphrase)
    return asked[1:]


# All but the first are asked of a noun phrase.
MATCH_FORMS = (MATCH, "Does this image show {}?", "Does the picture show {}?", "Is this {}?",
               "Do you see {}?", "Can you see {} here?", "Does it show {}?")


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
    forms = MATCH_FORMS if text.startswith(("a ", "an ", *NUMBERS)) else MATCH_FORMS[:1]
    if rng.random() < 0.5:
        forms, (text, _) = MATCH_FORMS[:1], paraphrase(text, rng)
    return pick(rng, forms).format(text.removesuffix(".")), "yes" if same else "no"


# ---- Conversations that are not about an image, and prompts from outside ---------------------------------
GREETING = "Hello! I draw circles, squares, triangles and stars, and answer questions about images of them."
NO_IMAGE = "There is no image yet: ask for one, or show me one."
OUTSIDE = "I know only up to four circles, squares, triangles and stars, in six colours."
THANKS = "You are welcome."
SMALL_TALK = {
    GREETING: ("hello", "hi", "hey", "hello there", "hi there", "good morning", "good evening",
               "who are you", "what can you do", "what are you", "help", "what are you for", "how are you",
               "what do you know", "can you help me", "what should i ask",
               "nice to meet you", "introduce yourself"),
    THANKS: ("thanks", "thank you", "great", "nice", "well done", "perfect", "that is good", "ok", "cool",
             "good job", "i like it", "wonderful", "thank you very much", "looks good")}
THINGS = tuple(
    "dog cat horse cow bird fish lion tiger bear mouse house tree car train boat plane bike chair table "
    "lamp book phone apple banana pizza cake flower rose mountain river beach forest city street bridge "
    "castle man woman child girl boy king queen robot dragon monster face hand eye nose hat shoe shirt "
    "dress hexagon pentagon rectangle oval heart cross arrow spiral moon sun cloud snowman ship rocket "
    "guitar piano clock cup bottle window door garden lake island desert road bus truck duck frog snake "
    "spider elephant monkey rabbit sheep pig chicken egg bread cheese soup computer pencil game "
    "portrait".split())
OTHER_COLOURS = ("pink", "brown", "turquoise", "beige", "striped", "transparent", "rainbow", "spotted")
OTHER_NUMBERS = ("five", "six", "seven", "eight", "nine", "ten", "twelve", "5", "6", "7", "a hundred",
                 "many")
SYLLABLES = tuple("ba be bo da di do fa fe go ka ki ko la le lo ma mi mo na no pa pe po ra ri ro sa se so "
                  "ta te to va vo wa zo".split())


def outside_prompt(rng):
    """A prompt that asks for what the world doesn't have: other things, colours or numbers."""
    def thing():
        if rng.random() < 0.3:
            return "".join(pick(rng, SYLLABLES) for _ in range(rng.integers(1, 4))) + pick(rng, "nrstlkm")
        return pick(rng, THINGS)
    kind, shape, colour = rng.random(), pick(rng, SHAPES), pick(rng, list(COLOURS))
    if kind < 0.2:
        body = f"{pick(rng, OTHER_NUMBERS)} {colour + ' ' if rng.random() < 0.5 else ''}{shape}s"
    elif kind < 0.35:
        body = article(f"{pick(rng, OTHER_COLOURS)} {shape}")
    elif kind < 0.5:
        body = article(thing())
    elif kind < 0.65:
        body = article(f"{pick(rng, (colour, 'small', 'big', 'old', 'white', 'beautiful'))} {thing()}")
    elif kind < 0.9:
        link = pick(rng, ("and", "on", "with", "in", "next to", "under", "behind", "riding", "near"))
        body = f"{article(thing())} {link} {article(thing())}"
    else:
        both = [article(thing()), article(f"{colour} {shape}")]
        body = "{} {} {}".format(both.pop(int(rng.integers(2))), pick(rng, ("and", "with", "on")), both[0])
    text = pick(rng, REQUEST_FORMS).format(body)
    return text[0].upper() + text[1:] if rng.random() < 0.2 else text


def small_talk(rng):
    """(what people say when they ask for nothing, what is answered)."""
    answer = pick(rng, (GREETING, THANKS))
    text = pick(rng, SMALL_TALK[answer]) + pick(rng, ("", "", "!", "?" if answer == GREETING else "."))
    return (text[0].upper() + text[1:] if rng.random() < 0.4 else text), answer


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


def upsampling_prompts(n=200, seed=0):
    """`n` prompts as people type them, in the fields of `skill_prompts`, by what makes them hard: "relation"
    of two groups, "list" of three or four, "denial", "capitals", "other words", "outside" (nothing to show).

    A clause may have "size", an entry "background".
    """
    tags = ("relation", "list", "denial", "capitals", "other words", "outside")
    rng, entries = np.random.default_rng((seed, 8)), []
    while len(entries) < n:
        tag, index = tags[len(entries) % len(tags)], int(rng.integers(10 ** 9))
        if tag == "outside":
            entries.append({"tag": tag, "prompt": outside_prompt(rng), "include": []})
            continue
        if tag == "relation":
            text, _ = group_caption(rng)
        else:
            scene = make_scene(1, index)
            if tag == "list" and len(scene.objects) < 3:
                continue
            text = caption(scene, rng, long=False)
        prompt, parsed = paraphrase(text, rng)
        is_denial = any(f" {word} " in f" {prompt.lower()} " for word in ("no", "not", "without"))
        if prompt == text or (tag == "denial") != is_denial or (tag == "capitals") != prompt.isupper():
            continue
        entries.append(prompt_entry(tag, prompt, parsed))
    return entries


def prompt_entry(tag, prompt, parsed):
    """An entry of `skill_prompts` that asks for what parse_caption or `paraphrase` found in a prompt."""
    include = []
    for shape, *words in parsed:
        clause = {"class": shape, "count": number_of(words)}
        for word in words:
            clause |= {"color": word} if word in COLOURS else {"size": word} if word in SIZES else {}
        include.append(clause)
    sides = named_words(parsed, SIDE_WORDS)
    if len(parsed) == 2 and sides:
        side = {"left": "left of", "right": "right of"}.get(sides[0], sides[0])
        include = [include[1], {**include[0], "position": [side, 0]}]
    entry = {"tag": tag, "prompt": prompt, "include": include}
    backgrounds = named_words(parsed, BACKGROUNDS)
    return entry | ({"background": backgrounds[0]} if backgrounds else {})
