"""Scores: does the picture show what was asked, is the answer right, does a picture survive the autoencoder?

B batch, H W pixels. The world is synthetic, so a rule-based judge can read its pictures exactly and no other network is
needed. Generation is scored on the six skills of GenEval (arXiv 2310.11513) with that benchmark's rules.

    python eval.py judge                                        how far the judge itself can be trusted
    python eval.py alignment --ckpt weights/nano                text -> picture, six skills
    python eval.py understanding --ckpt weights/nano            picture -> text: questions and captions
    python eval.py reconstruction --ckpt weights/nano           picture -> features -> picture
    python eval.py speed                                        sampling, beside transformers and diffusers
"""
import argparse
import io
import itertools
import json
import math
import re
import sys
import tempfile
import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from safetensors import SafetensorError
from tqdm import tqdm

import data
from clip_decoder import PRESETS as DECODER_PRESETS, UNet, VAE
from dit import DiTConfig
from model import BLIP3o, BLIP3oConfig, TextConfig
from sample import Parser, Pipeline, to_uint8

BATCH = 32                                # pictures or questions that a model works on at a time

# ----------------------------------------------------------------------------------------------------------------------
# The judge: pixels -> what is there
# ----------------------------------------------------------------------------------------------------------------------
SIDE = 64                                 # pictures of any size are judged at this one
CONTRAST = 40                             # least RGB distance of an object to the background; the palette's least is 94
SPECK = 12                                # pixels below which a piece is dropped; the world's smallest object has 147
COLOUR_RADIUS = 50                        # RGB distance beyond which a colour is none of the palette
SHARPEN = 2                               # steepens soft edges, and wipes out noise and the ripples of JPEG beside them
GRID, SPAN = 32, 1.8                      # shapes are compared on GRID x GRID samples over +-SPAN area-equivalent radii
SCALES = (0.94, 1.0, 1.06)                # radii around the area-equivalent one at which each shape is tried
# Least overlap (IoU) with the drawn shape. Just under what JPEG leaves of the hardest colours (green, purple and orange
# on grey, which differ mostly in chroma). A diamond is 0.84 of a circle, a triangle upside down 0.70 of a triangle.
MATCH = {"circle": 0.85, "square": 0.82, "triangle": 0.78, "star": 0.68}


@dataclass(frozen=True)
class SeenThing:
    """One object as judged: data.py's names or "unknown"; centre x, y and area in units of the side; match: its IoU."""
    shape: str
    colour: str
    size: str
    x: float
    y: float
    area: float
    match: float


@dataclass(frozen=True)
class Seen:
    """What the judge reads off a picture: the background's name or "unknown", and the objects, best match first."""
    background: str
    things: tuple


def nearest(colour, palette):
    """The palette's name of an RGB colour, or "unknown" where none is within COLOUR_RADIUS."""
    gaps = np.sqrt(((np.array(list(palette.values())) - colour) ** 2).sum(1))
    return list(palette)[gaps.argmin()] if gaps.min() <= COLOUR_RADIUS else "unknown"


def components(mask, least):
    """The 4-connected pieces of a bool mask (H, W) with at least `least` pixels, as a list of masks.

    Every pixel takes the largest label around it, then the label of the pixel that this label names, until nothing
    changes: the second step makes the number of rounds logarithmic.
    """
    padded = np.pad(mask, 1)
    width, at = padded.shape[1], np.flatnonzero(padded)
    around = at + np.array([[0], [1], [-1], [width], [-width]])
    label = np.arange(padded.size) * padded.ravel()                  # a pixel's label is the number of some pixel
    while True:
        new = label[label[around].max(0)]
        if (new == label[at]).all():
            break
        label[at] = new
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


def roundness(shape):
    """Radius of the circle that has the area of the shape's outline at size 1."""
    x, y = data.OUTLINES[shape].T
    return math.sqrt(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 / math.pi)


def draw_templates():
    """Coverage (4 shapes * len(SCALES), GRID, GRID) of the outlines around the centre, in area-equivalent radii."""
    fine, covers = 8 * GRID, []
    for shape, corners in data.OUTLINES.items():
        for scale in SCALES:
            canvas = Image.new("L", (fine, fine))
            points = (corners * scale / roundness(shape) / SPAN + 1) / 2 * fine - 0.5
            ImageDraw.Draw(canvas).polygon([tuple(p) for p in points], fill=255)
            covers.append(np.asarray(canvas.reduce(8), np.float32) / 255)
    return np.stack(covers)


TEMPLATES = draw_templates()
LEAST = np.repeat(list(MATCH.values()), len(SCALES))                 # (4 shapes * len(SCALES),)


def match_shape(cover, x, y, radius):
    """A soft mask (H, W), its centre and area-equivalent radius in pixels -> (shape, IoU, scale) of the best template.

    Best is the largest IoU in units of what its shape needs: blunted stars look more like circles than circles need.
    """
    steps = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * SPAN * radius

    def weights(centre, length):                                     # bilinear samples along one axis, as a matrix
        return np.maximum(0, 1 - abs((centre + steps)[:, None] - np.arange(length)))     # (GRID, length)

    patch = weights(y, cover.shape[0]) @ cover @ weights(x, cover.shape[1]).T             # (GRID, GRID)
    total = patch.sum() + TEMPLATES.sum((1, 2))
    apart = abs(patch - TEMPLATES).sum((1, 2))
    ious = (total - apart) / (total + apart)                         # sum of the minima over sum of the maxima
    best = int((ious / LEAST).argmax())
    return data.SHAPES[best // len(SCALES)], float(ious[best]), SCALES[best % len(SCALES)]


def find_pieces(strength):
    """Distance of each pixel to the background (H, W) -> masks of the objects.

    An object's edge lies where the distance falls to half of the largest nearby (7 x 7), whatever the colours: one
    absolute threshold would join bright neighbours before it finds pale ones.
    """
    peak = np.pad(strength, 3)
    peak = np.max([peak[i:i + len(strength)] for i in range(7)], 0)
    peak = np.max([peak[:, i:i + len(strength)] for i in range(7)], 0)
    return components((strength > CONTRAST) & (strength > peak / 2), SPECK)


def judge(image):
    """What a picture of the world shows, by rules alone. image: uint8 (S, S, 3), any S -> Seen.

    The background is the border's median. Each connected piece that differs from it gets the palette's colour nearest
    to its eroded median, and the shape whose drawing it overlaps best; a piece that no colour or shape fits well enough
    is "unknown" in that respect, so that blobs don't count. Raises ValueError for another form of array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1] or image.dtype != np.uint8:
        raise ValueError(f"the judge takes square uint8 pictures (S, S, 3), not {image.dtype} {image.shape}")
    if len(image) != SIDE:
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.BOX))
    image = image.astype(np.float32)
    ground = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), 0)          # (3,)
    away = image - ground                                                                            # (S, S, 3)
    pieces = find_pieces(np.sqrt((away ** 2).sum(2)))
    things, taken = [], np.any(pieces, 0)
    for piece in pieces:
        core = ~grow(~piece)
        colour = np.median(image[core if core.sum() > 4 else piece], 0)
        toward = colour - ground
        cover = away @ toward / (toward @ toward)                    # 0 is ground, 1 is the object's colour
        cover = np.clip(SHARPEN * (cover - 0.5) + 0.5, 0, 1) * (grow(grow(piece)) & ~(taken & ~piece))
        area = float(cover.sum())
        x, y = float(cover.sum(0) @ np.arange(SIDE)) / area, float(cover.sum(1) @ np.arange(SIDE)) / area
        shape, match, scale = match_shape(cover, x, y, math.sqrt(area / math.pi))
        radius = math.sqrt(area / math.pi) * scale / roundness(shape) / SIDE
        things.append(SeenThing(shape if match >= MATCH[shape] else "unknown", nearest(colour, data.COLOURS),
                                min(data.SIZES, key=lambda s: abs(math.log(radius / data.SIZES[s]))),
                                (x + 0.5) / SIDE, (y + 0.5) / SIDE, area / SIDE ** 2, match))
    return Seen(nearest(ground, data.BACKGROUNDS), tuple(sorted(things, key=lambda t: -t.match)))


def agrees(scene, seen, attributes=("shape", "colour", "size")):
    """Does the judge see the scene's background and just its objects, with these attributes, 0.05 off at most?"""
    def same(thing, other):
        return (math.hypot(thing.x - other.x, thing.y - other.y) < 0.05
                and all(getattr(thing, a) == getattr(other, a) for a in attributes))
    return (seen.background == scene.background and len(seen.things) == len(scene.things)
            and all(any(same(t, o) for o in seen.things) for t in scene.things))


# ----------------------------------------------------------------------------------------------------------------------
# GenEval's rules
# ----------------------------------------------------------------------------------------------------------------------
def relations(a, b):
    """The set of RELATIONS that hold from `a` to `b`, by GenEval's rule: after a margin of a tenth of both diameters is
    taken off, more than half of the distance lies along that axis. A diagonal can be two relations at once."""
    offset = np.array([a.x - b.x, a.y - b.y])
    margin = 0.1 * 2 * (math.sqrt(a.area / math.pi) + math.sqrt(b.area / math.pi))
    rest = np.maximum(abs(offset) - margin, 0) * np.sign(offset) / max(np.linalg.norm(offset), 1e-9)
    return {name for name, direction in data.RELATIONS.items() if rest @ np.array(direction) > 0.5}


def hits(entry, seen):
    """Does a judged picture show what an entry of data.skill_prompts asks? GenEval's rules.

    Each clause of "include" needs `count` objects of its class: the surest ones (best match) are taken, and they must
    have the colour asked for and lie as asked to those of the clause that "position" names. Other objects are allowed,
    except that counting prompts want exactly `count` of the class.
    """
    groups = []
    for clause in entry["include"]:
        alike = [t for t in seen.things if t.shape == clause["class"]]
        group = alike[:clause["count"]]
        if len(group) < clause["count"] or (entry["tag"] == "counting" and len(alike) > clause["count"]):
            return False
        if any(t.colour != clause.get("color", t.colour) for t in group):
            return False
        link, other = clause.get("position", (None, None))
        if link and not all(link in relations(a, b) for a in group for b in groups[other]):
            return False
        groups.append(group)
    return True


def hits_strictly(entry, seen):
    """`hits`, and nothing else is in the picture: not one object more, known or unknown."""
    return hits(entry, seen) and len(seen.things) == sum(clause["count"] for clause in entry["include"])


def wilson(count, n, z=1.959964):
    """(low, high): Wilson's 95 % interval for a share of `count` hits in `n` independent trials, maybe not whole."""
    share, spread = count / n, z * z / n
    middle, half = share + spread / 2, z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def share(verdicts):
    """Booleans -> {"score", "low", "high", "n"} with Wilson's interval."""
    verdicts = list(verdicts)
    low, high = wilson(sum(verdicts), len(verdicts))
    return {"score": sum(verdicts) / len(verdicts), "low": low, "high": high, "n": len(verdicts)}


def summarise(entries, verdicts):
    """Entries and their (hit, strict hit) -> {skill or "overall": {"score", "low", "high", "strict", "n"}}.

    "overall" is GenEval's unweighted mean of the skills. Its interval is Wilson's with the number of trials that gives
    a mean of unequal groups the same variance; pictures count as independent, also those of one prompt.
    """
    table = {}
    for skill in data.SKILLS:
        mine = [v for entry, v in zip(entries, verdicts) if entry["tag"] == skill]
        if mine:
            table[skill] = {**share(hit for hit, _ in mine), "strict": sum(strict for _, strict in mine) / len(mine)}
    rows = list(table.values())
    score, strict = (sum(r[key] for r in rows) / len(rows) for key in ("score", "strict"))
    trials = len(rows) ** 2 / sum(1 / r["n"] for r in rows)
    low, high = wilson(score * trials, trials)
    table["overall"] = {"score": score, "low": low, "high": high, "strict": strict, "n": sum(r["n"] for r in rows)}
    return table


def score_images(images, entries):
    """Pictures (B, 3, H, W) in [0, 1] and their B entries of data.skill_prompts -> the table of `summarise`."""
    seen = [judge(image) for image in to_uint8(images.float().clamp(0, 1))]
    return summarise(entries, [(hits(e, s), hits_strictly(e, s)) for e, s in zip(entries, seen, strict=True)])


def scene_for(entry, rng):
    """A Scene that shows exactly what an entry of data.skill_prompts asks; what it leaves open is drawn at random.

    Open colours avoid HELD_OUT pairs. Three and more objects are small, as in the world.
    """
    clauses = entry["include"][::-1]                                 # the clause with a position, the last, comes first
    link = clauses[0].get("position", (None,))[0]
    while True:
        kinds = []
        for clause in clauses:
            open_colours = [c for c in data.COLOURS if (c, clause["class"]) not in data.HELD_OUT]
            colour = clause.get("color") or data.pick(rng, open_colours)
            size = "small" if clause["count"] > 2 else data.pick(rng, list(data.SIZES))
            kinds += [(clause["class"], colour, size)] * clause["count"]
        things = data.place(kinds, rng, link)
        if things:
            return data.Scene(data.pick(rng, list(data.BACKGROUNDS)), things)


# ----------------------------------------------------------------------------------------------------------------------
# Is a caption true?
# ----------------------------------------------------------------------------------------------------------------------
SIZE_WORDS = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"}
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
LINKS = {**{r: r for r in data.RELATIONS}, "under": "below", "to the left of": "left of", "to the right of": "right of"}
ITEM = re.compile(rf"\b({'|'.join(COUNTS)}) (?:({'|'.join(SIZE_WORDS)}) )?(?:({'|'.join(data.COLOURS)}) )?"
                  rf"({'|'.join(data.SHAPES)})s?\b"
                  r"( in the (?:top|bottom) (?:left|right) corner| on the (?:left|right)| at the (?:top|bottom)"
                  r"| in the middle)?")
GROUND = "|".join(data.BACKGROUNDS)
FRAME = re.compile(rf"(?:a ({GROUND}) background with )?(?:(?:a picture|a photo|an image) of |there is |there are )?"
                   rf"(?:#(?:, #)*(?: and #)?|# ({'|'.join(LINKS)}) #)(?: on (?:an? )?({GROUND})(?: background)?)?")


def caption_truth(text, scene):
    """(objects, details): is a caption true of a scene, in its objects and in everything it says?

    It must be a sentence of data.caption's grammar, in any case and with or without a full stop; else both are False.
    objects: its noun phrases, counted out ("two red circles" is two), can be paired with the scene's objects one to
    one, none left over on either side, such that each has the shape and, where it names one, the colour of its object.
    details: such a pairing exists in which every size, region, relation and background that is named is right as well.
    """
    text = text.strip().lower().removesuffix(".")
    frame = FRAME.fullmatch(ITEM.sub("#", text))
    phrases = [phrase for number, *phrase in ITEM.findall(text) for _ in range(COUNTS[number])]
    if not frame or len(phrases) != len(scene.things):
        return False, False
    ground_before, link, ground_after = frame.groups()
    objects = details = False
    for order in itertools.permutations(scene.things):
        if all(shape == t.shape and colour in ("", t.colour) for (_, colour, shape, _), t in zip(phrases, order)):
            objects = True
            details |= (all(SIZE_WORDS.get(size, t.size) == t.size and region.strip() in ("", data.region(t))
                            for (size, _, _, region), t in zip(phrases, order))
                        and all(g in (None, scene.background) for g in (ground_before, ground_after))
                        and (link is None or len(order) == 2 and data.relation(*order) == LINKS[link]))
    return objects, details


# ----------------------------------------------------------------------------------------------------------------------
# Reports
# ----------------------------------------------------------------------------------------------------------------------
def show(title, table):
    """Print {row: {column: value}}: shares as per cent, with the interval in brackets; other numbers as they are."""
    print(f"\n{title}")
    for name, row in table.items():
        cells = []
        for key, value in row.items():
            if key == "score":
                cells.append(f"{100 * value:5.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]")
            elif key not in ("low", "high"):
                cells.append(f"{key} {100 * value:.1f} %" if isinstance(value, float) and key != "dB" else
                             f"{key} {value:.2f}" if key == "dB" else f"{key} {value}")
        print(f"  {name:<26}" + "   ".join(cells))


def save(args, results):
    """Write the settings and results of a command as OUT/COMMAND.json and name the file."""
    file = Path(args.out) / f"{args.command}.json"
    file.write_text(json.dumps({"settings": vars(args), **results}, indent=1) + "\n")
    print(file)


def contact_sheet(pictures, labels, verdicts, columns):
    """uint8 pictures (H, W, 3), scaled to 128 pixels, framed green (hit) or red (miss), labels below -> PIL image."""
    side, edge, text = 128, 4, 40
    cell_w, cell_h = side + 4 * edge, side + 3 * edge + text
    sheet = Image.new("RGB", (columns * cell_w, -(-len(pictures) // columns) * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, label, good) in enumerate(zip(pictures, labels, verdicts)):
        x, y = i % columns * cell_w + edge, i // columns * cell_h + edge
        end = side + 2 * edge - 1
        pen.rectangle((x, y, x + end, y + end), (30, 160, 60) if good else (215, 40, 40))
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.BOX), (x + edge, y + edge))
        pen.multiline_text((x, y + side + 2 * edge + 1), textwrap.fill(label, side // 6), "black", spacing=1)
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------
def jpeg(image):
    """uint8 (H, W, 3) -> the same after JPEG at quality 75."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file).convert("RGB"))


def blur(image):
    """uint8 (H, W, 3) -> blurred with a standard deviation of one pixel in 64."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(len(image) / 64)))


def noise(image):
    """uint8 (H, W, 3) -> with normal noise of standard deviation 8, a function of the picture."""
    rng = np.random.default_rng(int(image.sum()))
    return np.clip(np.round(image + rng.normal(0, 8, image.shape)), 0, 255).astype(np.uint8)


def run_judge(args):
    """How far the judge can be trusted: true pictures must pass in four conditions, others must not."""
    def trial(scenes, spoil):
        return share(agrees(s, judge(spoil(data.draw(s, args.size)))) for s in tqdm(scenes, leave=False, disable=None))

    conditions = {"clean": lambda image: image, "JPEG 75": jpeg, "blur": blur, "noise": noise}
    fully = {}
    for name, novel in (("world", False), ("novel", True)):
        scenes = [data.make_scene(args.seed, i, novel) for i in range(args.n)]
        fully.update({f"{name}, {condition}": trial(scenes, spoil) for condition, spoil in conditions.items()})
    show(f"pictures of scenes in which everything is read right, {args.size} px", fully)
    skills = {}
    entries = data.skill_prompts(seed=args.seed) + data.skill_prompts(seed=args.seed, novel=True)
    rng = np.random.default_rng(args.seed)
    true = [data.draw(scene_for(entry, rng), args.size) for entry in entries]
    for condition, spoil in conditions.items():
        skills[condition] = score_renders(entries, [spoil(image) for image in true])
    skills["other prompt's picture"] = score_renders(entries, [true[i] for i in rng.permutation(len(true))])
    grounds = list(data.BACKGROUNDS.values())
    skills["blank picture"] = score_renders(entries, [np.full_like(im, grounds[i % 3]) for i, im in enumerate(true)])
    for condition, table in skills.items():
        show(f"prompts of the six skills, {condition}", table)
    save(args, {"scenes": fully, "skills": skills})


def score_renders(entries, pictures):
    """`score_images` for a list of uint8 pictures (H, W, 3)."""
    return score_images(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255, entries)


def run_alignment(args):
    """Does the model draw what the prompts of the six skills ask? Beside it: the same prompts' true renders."""
    pipe = Pipeline(args.ckpt, args.device, args.dtype)
    prompts = data.skill_prompts(args.n_prompts, args.seed, args.novel)
    entries = [entry for entry in prompts for _ in range(args.images)]
    # One seed per picture, whatever the batch; far enough apart that two values of --seed share none.
    seeds = [args.seed * 10 ** 6 + i for i in range(len(entries))]
    pictures = []
    for i in tqdm(range(0, len(entries), BATCH), disable=None):
        pictures += list(to_uint8(pipe.images([e["prompt"] for e in entries[i:i + BATCH]], seeds[i:i + BATCH])))
    seen = [judge(picture) for picture in pictures]
    verdicts = [(hits(e, s), hits_strictly(e, s)) for e, s in zip(entries, seen)]
    rng = np.random.default_rng(args.seed)
    tables = {"model": summarise(entries, verdicts),
              "real": score_renders(entries, [data.draw(scene_for(e, rng), len(pictures[0])) for e in entries])}
    show(f"{len(prompts)} prompts x {args.images} pictures", tables["model"])
    show("the same prompts' true renders", tables["real"])
    columns = max(8, 4 * args.images)
    sheet = contact_sheet(pictures, [e["prompt"] for e in entries], [hit for hit, _ in verdicts], columns)
    sheet.save(Path(args.out) / "alignment.png")
    save(args, {**tables, "pictures": [
        {"tag": e["tag"], "prompt": e["prompt"], "seed": seed, "hit": hit, "strict": strict, "seen": asdict(s)}
        for e, seed, (hit, strict), s in zip(entries, seeds, verdicts, seen)]})


def draw_questions(seed, n):
    """n questions about scenes of the world `seed`, the kinds in turn: [(scene, kind, question, answer)]."""
    found, index = [], 0
    while len(found) < n:
        scene, kind = data.make_scene(seed, index), data.QUESTIONS[len(found) % len(data.QUESTIONS)]
        asked = data.question(scene, np.random.default_rng((seed, index)), kind)
        index += 1
        if asked:
            found.append((scene, *asked))
    return found


def answer_all(pipe, scenes, questions):
    """The model's answers about the pictures of scenes, in batches."""
    answers = []
    for i in tqdm(range(0, len(scenes), BATCH), disable=None):
        pictures = [Image.fromarray(data.draw(scene)) for scene in scenes[i:i + BATCH]]
        answers += pipe.answers(pictures, questions[i:i + BATCH])
    return answers


def run_understanding(args):
    """Questions of six kinds, beside what the commonest training answer of each kind would score; then captions.

    An answer is right if it is the expected one, whatever its case and a full stop. Captions: see caption_truth.
    """
    pipe = Pipeline(args.ckpt, args.device, args.dtype)
    asked = draw_questions(args.seed, args.n)
    scenes, kinds, questions, truths = zip(*asked)
    answers = answer_all(pipe, scenes, questions)
    right = [a.strip().lower().removesuffix(".") == t for a, t in zip(answers, truths)]
    common, training = {}, draw_questions(0, 1200)
    for kind in data.QUESTIONS:
        common[kind] = Counter(t for _, k, _, t in training if k == kind).most_common(1)[0][0]
    table = {}
    for kind in dict.fromkeys(kinds):
        mine = [i for i, k in enumerate(kinds) if k == kind]
        table[kind] = {**share(right[i] for i in mine), "answer": common[kind],
                       "baseline": sum(truths[i] == common[kind] for i in mine) / len(mine)}
    captions = answer_all(pipe, scenes, [data.DESCRIBE] * len(scenes))
    truth = [caption_truth(text, scene) for text, scene in zip(captions, scenes)]
    table["caption, objects"], table["caption, every detail"] = share(t[0] for t in truth), share(t[1] for t in truth)
    show(f"{args.n} questions and captions about unseen pictures", table)
    save(args, {"table": table, "answers": [
        {"question": q, "answer": a, "expected": t, "caption": c, "caption_true": v, "scene": asdict(s)}
        for s, q, a, t, c, v in zip(scenes, questions, answers, truths, captions, truth)]})


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two batches (B, 3, H, W) in [0, 1] -> (B,)."""
    return -10 * torch.log10(((a - b) ** 2).mean((1, 2, 3)).clamp(min=1e-10))


@torch.no_grad()
def run_reconstruction(args):
    """Both ceilings: what the VAE alone keeps of a picture, and what CLIP features and the decoder keep."""
    pipe = Pipeline(args.ckpt, args.device, args.dtype)
    unet, vae = pipe.decoder.unet, pipe.decoder.vae
    scenes = [data.make_scene(args.seed, i) for i in range(args.n)]
    renders = np.stack([data.draw(s, unet.config.sample_size * vae.factor) for s in scenes])       # (n, H, W, 3)
    truth = torch.from_numpy(renders).permute(0, 3, 1, 2) / 255                                    # (n, 3, H, W)
    vae_only, whole = [], []
    for i in tqdm(range(0, args.n, BATCH), disable=None):
        pixels = (truth[i:i + BATCH] * 2 - 1).to(pipe.device, next(vae.parameters()).dtype)
        vae_only.append((vae.decode(vae.encode(pixels)).float().cpu() / 2 + 0.5).clamp(0, 1))
        whole.append(pipe.reconstruct([Image.fromarray(r) for r in renders[i:i + BATCH]], range(args.n)[i:i + BATCH]))
    table, rows = {}, [renders[:12]]
    for name, made in (("VAE alone", torch.cat(vae_only)), ("features and decoder", torch.cat(whole))):
        seen = [judge(picture) for picture in to_uint8(made)]
        table[name] = {"dB": psnr(made, truth).mean().item(), **share(agrees(s, j) for s, j in zip(scenes, seen)),
                       "shape aside": sum(agrees(s, j, ("colour", "size")) for s, j in zip(scenes, seen)) / args.n}
        rows.append(to_uint8(made[:12]))
    show(f"{args.n} unseen pictures: PSNR, share judged fully right, right but for shape", table)
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    Image.fromarray(sheet).save(Path(args.out) / "reconstruction.png")
    save(args, {"table": table})


# ----------------------------------------------------------------------------------------------------------------------
# Speed, beside the reference libraries
# ----------------------------------------------------------------------------------------------------------------------
def lumina(config):
    """The official DiT's module tree for a DiTConfig, out of diffusers: LuminaNextDiT2DModel with BLIP3-o's caption
    projection in front and its FFN width. Takes a NextDiT's state dict strictly."""
    from diffusers.models.attention import LuminaFeedForward
    from diffusers.models.embeddings import PixArtAlphaTextProjection
    from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel
    dit = LuminaNextDiT2DModel(patch_size=config.patch_size, in_channels=config.in_channels, hidden_size=config.dim,
                               num_layers=config.n_layers, num_attention_heads=config.n_heads,
                               num_kv_heads=config.n_kv_heads, norm_eps=config.norm_eps, learn_sigma=False,
                               cross_attention_dim=config.dim)
    del dit.pad_token  # a leftover of Lumina that no forward reads and BLIP3-o's file doesn't have
    for layer in dit.layers:
        layer.feed_forward = LuminaFeedForward(config.dim, inner_dim=config.ffn_dim, multiple_of=1)
    dit.caption_projection = PixArtAlphaTextProjection(config.cond_dim, config.dim)
    return dit.eval()


def race(ours, theirs, rounds):
    """Run two functions in turn, after one run of each to warm up: median seconds of each, median of their ratios."""
    times = []
    for i in tqdm(range(rounds + 1), leave=False, disable=None):
        pair = []
        for run in (ours, theirs) if i % 2 else (theirs, ours):
            start = time.perf_counter()
            run()
            pair.append(time.perf_counter() - start)
        times.append(pair if i % 2 else pair[::-1])
    times = np.array(times[1:])
    return {"ours": np.median(times[:, 0]), "theirs": np.median(times[:, 1]), "ratio": np.median(times[:, 1] / times[:, 0])}


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "aten::_slow_conv2d_forward")


def products_share(run):
    """The share of a run's time spent inside matrix products and convolutions, which are not ours to tune: whatever is
    done about the rest, the ratio can't rise above ratio / share."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(spent.get(key, 0) for key in PRODUCTS) / sum(spent.values())


@torch.no_grad()
def run_speed(args):
    """Sampling beside transformers and diffusers: equal random weights, equal results, runs in turn, on the CPU in fp32.

    The parts have 84 to 344 M parameters. Outputs are compared first: a race between different results means nothing.
    """
    try:
        import diffusers
        import transformers
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
    except ImportError as error:
        raise ValueError(f"{error}: the references come with pip install -r requirements-dev.txt") from None
    torch.manual_seed(0)
    table = {}

    def compare(name, module, ours, theirs):
        mine, other = ours(), theirs()
        apart = ((mine - other).abs().max() / other.abs().max()).item()
        table[name] = {"M": sum(p.numel() for p in module.parameters()) / 1e6, "apart": apart,
                       **race(ours, theirs, args.rounds), "products": products_share(ours)}
        print(f"  {name:28}{table[name]['M']:6.0f} M   ours {table[name]['ours']:7.2f} s   reference "
              f"{table[name]['theirs']:7.2f} s   {table[name]['ratio']:5.2f}x   apart by {apart:.0e}   "
              f"{table[name]['products']:4.0%} products", flush=True)

    # The DiT: the whole sampling loop with guidance. The reference loop is the official pipeline's.
    text = TextConfig(2000, 768, 2816, 12, 12, 2, mrope_section=[8, 12, 12])
    config = DiTConfig(in_channels=1024, dim=896, n_layers=8, n_heads=14, n_kv_heads=14, ffn_dim=2560, cond_dim=768, rope="2d")
    model, steps = BLIP3o(BLIP3oConfig(text, dit=config)).eval(), 10
    for p in model.parameters():                                     # gates at birth are zero: nothing would be compared
        p.normal_(0, 0.02)
    reference = lumina(config)
    reference.load_state_dict(model.dit.state_dict())
    cond, noise = torch.randn(1, 64, 768), torch.randn(1, 1024, 8, 8)
    rope, mask = get_2d_rotary_pos_embed_lumina(config.head_dim, 384, 384), torch.ones(2, 64)

    def official_loop():
        x, sigmas = noise, torch.cat([torch.linspace(1, 1 / steps, steps), torch.zeros(1)])
        for sigma, following in zip(sigmas, sigmas[1:]):
            c = reference.caption_projection(torch.cat([torch.zeros_like(cond), cond]))
            t = torch.floor(1000 * sigma + 1e-3).expand(2)
            null, true = reference(x.repeat(2, 1, 1, 1), t, c, mask, rope, cross_attention_kwargs={}).sample.chunk(2)
            x = x + (following - sigma) * (null + 3 * (true - null))
        return x.flatten(2).transpose(1, 2)
    compare(f"DiT, {steps} guided steps", model.dit, lambda: model.generate_features(cond, steps, 3.0, noise), official_loop)

    # Text: greedy tokens after a prompt, with each side's own KV cache.
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps")
    qwen = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=dict({n: getattr(text, n) for n in names}, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
                         pad_token_id=0, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12])),
        vision_config=dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=768),
        tie_word_embeddings=False, eos_token_id=None, pad_token_id=0)).eval()
    qwen.model.language_model.load_state_dict({k: v for k, v in model.llm.state_dict().items() if not k.startswith("lm_head")})
    qwen.lm_head.load_state_dict(model.llm.lm_head.state_dict())
    ids = torch.randint(10, 1900, (1, 64))
    compare("text, 64 + 64 tokens", model.llm,
            lambda: model.generate_text(ids, max_new_tokens=64, stop_ids=[])[0].float(),
            lambda: qwen.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64,
                                  do_sample=False)[0, 64:].float())

    # The pixel decoder's parts, written by us and read by diffusers.
    unet = UNet(replace(DECODER_PRESETS["official"]["unet"], block_out_channels=(160, 320, 640),
                        transformer_layers_per_block=(1, 1, 4), attention_head_dim=(2, 5, 10))).eval()
    vae = VAE(DECODER_PRESETS["official"]["vae"]).eval()
    for p in [*unet.parameters(), *vae.parameters()]:
        if p.ndim > 1:
            p.normal_(0, 0.02)
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(Path(folder) / "unet")
        vae.save_pretrained(Path(folder) / "vae")
        their_unet = diffusers.UNet2DConditionModel.from_pretrained(Path(folder) / "unet", low_cpu_mem_usage=False)
        their_vae = diffusers.AutoencoderKL.from_pretrained(Path(folder) / "vae", low_cpu_mem_usage=False)
    x, cond, ids = torch.randn(2, 4, 32, 32), torch.randn(2, 64, 1792), torch.zeros(2, 6)
    added = {"text_embeds": cond.mean(1), "time_ids": ids}
    compare("UNet, one guided step, 256 px", unet, lambda: unet(x, 500.0, cond, cond.mean(1), ids),
            lambda: their_unet(x, 500.0, cond, added_cond_kwargs=added).sample)
    z = torch.randn(1, 4, 24, 24)
    compare("VAE decode, 192 px", vae, lambda: vae.decode(z),
            lambda: their_vae.decode(z / vae.config.scaling_factor).sample)
    save(args, {"table": table, "torch": torch.__version__, "transformers": transformers.__version__,
                "diffusers": diffusers.__version__, "threads": torch.get_num_threads()})


COMMANDS = {"judge": run_judge, "alignment": run_alignment, "understanding": run_understanding,
            "reconstruction": run_reconstruction, "speed": run_speed}


def parse(argv):
    """The command line; ValueError for what can't be meant."""
    parser = Parser("eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, seed, counts in (("judge", 1, {"n": 1000, "size": 64}), ("alignment", 0, {"n-prompts": 200, "images": 4}),
                               ("understanding", 1, {"n": 600}), ("reconstruction", 1, {"n": 200}), ("speed", 0, {"rounds": 5})):
        command = commands.add_parser(name, description=COMMANDS[name].__doc__)
        for option, value in counts.items():
            command.add_argument(f"--{option}", type=int, default=value)
        command.add_argument("--seed", type=int, default=seed, help="of the prompts and pictures")
        command.add_argument("--out", default="runs/eval", help="folder of the results")
        if name not in ("judge", "speed"):
            command.add_argument("--ckpt", default=str(Path(__file__).parent / "weights" / "nano"), help="model folder")
            command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
            command.add_argument("--dtype", default="auto", help="auto, fp32, bf16, fp16")
        if name == "alignment":
            command.add_argument("--novel", action="store_true", help="pairs of colour and shape never trained on")
    args = parser.parse_args(argv)
    for name in ("n", "n_prompts", "images", "size", "rounds"):
        if vars(args).get(name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {vars(args)[name]}")
    if not 0 <= args.seed < 1000:                                    # each has a million seeds of pictures
        raise ValueError(f"--seed must lie between 0 and 999, not {args.seed}")
    if args.command in ("understanding", "reconstruction") and args.seed == 0:
        raise ValueError("--seed 0 is the world that models are trained on: take another for unseen pictures")
    return args


def main(argv=None):
    """Run one command; returns the exit code: 0, 2 after a mistake (one sentence on stderr), 130 after Ctrl-C."""
    try:
        args = parse(argv)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        COMMANDS[args.command](args)
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, SafetensorError) as error:
        print(f"eval.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
