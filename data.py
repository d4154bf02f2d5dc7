"""What comes in: the synthetic world, shards of captioned pictures, prompts, tokens and image preprocessing.

B batch, L tokens, H W pixels, N patches. Imports nothing else of this project.

Reading order: the world (scenes, pictures, captions, questions) -> sources of samples -> tokens and templates -> pixels.
"""
import io
import math
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tokenizers import AddedToken, Regex, Tokenizer as Tokenizers, decoders, models, normalizers, pre_tokenizers, trainers

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
class Scene:
    """A background colour and a tuple of `Thing`s that don't touch each other or the border."""
    background: str
    things: tuple


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


def make_scene(seed, index, novel=False):
    """The scene number `index` of the world `seed`: a pure function of both.

    A third of the scenes shows one object, the rest two different ones, several alike, or a mixture of three or four.
    Training scenes (novel=False) never show a HELD_OUT pair of colour and shape; novel ones always show at least one.
    """
    rng = np.random.default_rng((seed, index, int(novel)))
    pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT]
    while True:
        layout = int(np.searchsorted([0.26, 0.68, 0.88, 0.96], rng.random()))     # one, two, several alike, three, four
        count = (1, 2, int(rng.integers(2, 5)), 3, 4)[layout]
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


def draw(scene, size=64):
    """The picture of a scene as uint8 (size, size, 3): drawn at four times the size, then averaged (anti-aliasing)."""
    big = 4 * size
    image = Image.new("RGB", (big, big), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    for t in scene.things:
        corners = (OUTLINES[t.shape] * SIZES[t.size] + (t.x, t.y)) * big - 0.5
        pen.polygon([tuple(c) for c in corners], fill=COLOURS[t.colour])
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
    long = rng.random() < 0.33 if long is None else long
    colour, size, place_of = (True, True, True) if long else (rng.random() < 0.75, rng.random() < 0.35, rng.random() < 0.1)
    words = {"small": pick(rng, ["small", "small", "little", "tiny"]), "large": pick(rng, ["large", "large", "big"])}
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


def ask(scene, rng, text=None):
    """(question, answer) about a scene, of a kind that it can answer; with `text`, only what that caption tells as well."""
    told = {kind: True for kind in QUESTIONS}
    if text is not None:
        told["colour"] = told["shape"] = told["existence"] = scene.things[0].colour in text
        told["position"] = any(f" {link} " in text for link in (*RELATIONS, "under"))
        told["background"] = scene.background in text
    while True:
        found = question(scene, rng)
        if found and told[found[0]]:
            return found[1], found[2]


def describe(scene):
    """The answer to DESCRIBE: everything, from left to right, in one fixed form (captions vary, and a model that is to
    learn to see learns more from a text that only the picture can change)."""
    things = sorted(scene.things, key=lambda t: t.x)
    told = [f"{article(noun(t, size=True))} {region(t)}" for t in things]
    return f"{join(told)} on {article(f'{scene.background} background')}"


def world_texts(n):
    """n captions, questions and answers of the world, then the templates: what its tokenizer learns from."""
    for i in range(n):
        scene, rng = make_scene(0, i), np.random.default_rng(i)
        yield caption(scene, rng)
        yield " ".join((*ask(scene, rng), describe(scene)))
    for text in (f"system\n{SYSTEM}", "user\n" + GENERATE.format("a"), f"user\n{DESCRIBE}", "assistant\n"):
        yield from [text] * n


SKILLS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}


def skill_prompts(n=553, seed=0, novel=False):
    """`n` prompts of the six GenEval skills about this world, in that benchmark's proportions and jsonl fields.

    Returns [{"tag", "prompt", "include": [{"class", "count", "color"?, "position"?: [relation, index]}]}], as
    GenEval's evaluation_metadata.jsonl (arXiv 2310.11513). novel=True uses HELD_OUT pairs in the skills with colours,
    which no training picture shows.
    """
    rng = np.random.default_rng((seed, 7, int(novel)))
    pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) == novel]
    plan = [tag for tag, share in SKILLS.items() for _ in range(share)]
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


# ----------------------------------------------------------------------------------------------------------------------
# Sources: item i -> picture and captions
# ----------------------------------------------------------------------------------------------------------------------
class World:
    """The synthetic world as a source: item i is scene i; `seed` 0 is for training, other seeds for evaluation."""

    def __init__(self, seed=0, size=64, length=10 ** 9):
        self.seed, self.size, self.length = seed, size, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        """{"image": uint8 (size, size, 3), "caption": str, "scene": Scene}."""
        scene = make_scene(self.seed, i)
        return {"image": draw(scene, self.size), "scene": scene}


PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def load_image(file):
    """A picture file (path or binary file object) as an RGB PIL image, upright (EXIF), transparency on white.

    Raises ValueError with one sentence if the file isn't a readable picture.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(file))
        if image.mode.startswith("I;16"):                            # PIL would clip 16 bits, not scale them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:                                       # broken bytes make PIL raise half a dozen kinds
        name = file if isinstance(file, (str, Path)) else "this member"
        raise ValueError(f"{name} can't be read as a picture: {error}") from None


class Shards:
    """Captioned pictures from tar shards (`key.jpg|png|webp` + `key.txt`) or folders of the same pairs.

    The members' offsets are read once; pictures are read where they lie, so that item i costs one seek.
    Raises ValueError if a path is missing or holds no pair.
    """

    def __init__(self, paths):
        self.items = []                                              # (picture, caption): each a path or (tar, offset, size)
        for path in map(Path, paths):
            if path.is_dir():
                pairs = [(p, p.with_suffix(".txt")) for p in sorted(path.rglob("*")) if p.suffix.lower() in PICTURES]
                self.items += [pair for pair in pairs if pair[1].is_file()]
            elif path.is_file():
                self.items += self.read_tar(path)
            else:
                raise ValueError(f"there is no shard or folder at {path}")
        if not self.items:
            raise ValueError(f"no picture with a caption (name.jpg + name.txt) in {', '.join(map(str, paths))}")

    @staticmethod
    def read_tar(path):
        """[(picture, caption)] of one shard, in the order in which the pictures stand in it."""
        pictures, captions = {}, {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    stem, dot, suffix = member.name.rpartition(".")
                    where = (path, member.offset_data, member.size)
                    if dot + suffix.lower() in PICTURES:
                        pictures[stem] = where
                    elif suffix == "txt":
                        captions[stem] = where
        except tarfile.TarError as error:
            raise ValueError(f"{path} isn't a readable tar shard: {error}") from None
        return [(where, captions[stem]) for stem, where in pictures.items() if stem in captions]

    @staticmethod
    def read(where):
        """The bytes of a path or of a tar member (tar, offset, size)."""
        if isinstance(where, Path):
            return where.read_bytes()
        path, offset, size = where
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        """{"image": PIL image, "caption": str}; raises ValueError if the picture or the caption is broken."""
        picture, text = self.items[i]
        try:
            words = self.read(text).decode("utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"the caption {text} isn't UTF-8 text") from None
        if not words:
            raise ValueError(f"the caption {text} is empty")
        return {"image": load_image(io.BytesIO(self.read(picture))), "caption": words}


class Samples(torch.utils.data.Dataset):
    """Samples by position: sample p of a run is a pure function of (seed, p), whatever the ranks and workers.

    Epoch p // len(source) has its own permutation. A broken item is replaced by the next readable one of that order,
    deterministically. image: uint8 (size, size, 3), short side scaled to `size`, middle cut out. long: the world's captions.
    """

    def __init__(self, source, size=64, seed=0, long=None):
        self.source, self.size, self.seed, self.long, self.epoch, self.order = source, size, seed, long, None, None

    def index(self, position):
        """The item of the source at a position. The world is endless: there position and item are the same."""
        epoch, at = divmod(position, len(self.source))
        if isinstance(self.source, World):
            return at
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.source))
        return int(self.order[at])

    def __getitem__(self, position):
        """{"image", "caption", "scene" (the world only), "rng": a generator for what the caller draws for this sample}."""
        rng = np.random.default_rng((self.seed, position, 1))
        last = None
        for attempt in range(100):
            try:
                item = self.source[self.index(position + attempt)]
                break
            except ValueError as error:
                last = error
        else:
            raise ValueError(f"100 samples in a row can't be read; the last: {last}")
        image = item["image"]
        if isinstance(image, Image.Image):
            image = np.asarray(crop_square(image, self.size))
        return {**item, "image": image, "skipped": [("unreadable", str(last))] * attempt, "rng": rng,
                "caption": item.get("caption") or caption(item["scene"], rng, self.long)}


def open_source(spec, size=64, seed=0):
    """`--data`: None is the synthetic world; else comma-separated shards, folders or glob patterns."""
    if spec is None:
        return World(seed, size)
    paths = []
    for part in spec.split(","):
        found = sorted(Path("/" if part.startswith("/") else ".").glob(part.lstrip("/"))) if any(c in part for c in "*?[") else [part]
        if not found:
            raise ValueError(f"no file matches {part}")
        paths += found
    return Shards(paths)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and templates
# ----------------------------------------------------------------------------------------------------------------------
SYSTEM = "You are a helpful assistant."
GENERATE = "Please generate image based on the following caption: {}"
DESCRIBE = "Describe this image."
RECONSTRUCT = "Please reconstruct the given image."
REPEAT = "Repeat the caption."
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
        if self.special["[IMG]"] is None:                            # a bare Qwen2.5-VL tokenizer: BLIP3-o adds three
            self.special.update({s: 151665 + i for i, s in enumerate(SPECIAL[-3:])})
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
