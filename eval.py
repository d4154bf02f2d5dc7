"""Scores: does the picture show what was asked, is the answer right, does a picture survive the autoencoder?

B batch, H W pixels. The world is synthetic, so a rule-based judge can read its pictures exactly and no other network is
needed. Generation is scored on the six skills of GenEval (arXiv 2310.11513) with that benchmark's rules.

    python eval.py judge                                        how far the judge itself can be trusted
    python eval.py alignment --ckpt weights/nano                text -> picture, six skills
    python eval.py understanding --ckpt weights/nano            picture -> text: questions and captions
    python eval.py understanding --data FILE.tsv|.jsonl         the same for MMBench, MME, POPE, VQAv2, MM-Vet, ...
    python eval.py reconstruction --ckpt weights/nano           picture -> features -> picture
    python eval.py binding --ckpt weights/nano                  whose colour is it? the DiT's loss, colours exchanged
    python eval.py editing --ckpt weights/nano                  picture and change -> picture
    python eval.py generate --bench geneval --prompts FILE      pictures as GenEval, DPG-Bench, WISE, MJHQ want them
    python eval.py score geneval --results FILE                 their scorers' outputs -> the published figures
    python eval.py fid --a DIR --b DIR                          how far two sets of pictures are apart
    python eval.py compare A B --prompts FILE                   a blind page for people; --votes FILE counts
    python eval.py leakage --train SHARDS --prompts FILE        were evaluation prompts trained on?
    python eval.py figure4 | figure5                            the paper's figures in miniature; --quick: does it run?
    python eval.py ablation --what shift                        also queries, rope, ema, size; steps and guidance
    python eval.py speed                                        beside transformers, diffusers and webdataset
"""
import argparse
import ast
import base64
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

import data
from clip_decoder import (PRESETS as DECODER_PRESETS, EvaClip, EvaConfig, UNet, VAE, load_strict, read_weights,
                          weight_map)
from dit import DiTConfig
from model import BLIP3o, BLIP3oConfig, TextConfig
from sample import Parser, Pipeline, pick_device, to_uint8

BATCH = 32                                # pictures or questions that a model works on at a time
SHEET = 192                               # most pictures of a contact sheet

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
MATCH_WORD = 0.6                          # the same for a word; that of another word is seldom above


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
class SeenWord:
    """A word as judged: its letters, colour and the overlap (IoU) with its drawing; text "" where none fits well enough."""
    text: str
    colour: str
    match: float


@dataclass(frozen=True)
class Seen:
    """What the judge reads off a picture: the background's name or "unknown", and the objects, best match first; the word,
    where one was looked for."""
    background: str
    things: tuple
    word: SeenWord | None = None


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


@functools.cache
def word_templates():
    """Coverage (number of words, SIDE, SIDE) of every word of data.TWO_LETTERS, drawn around the middle."""
    scenes = [data.Scene("black", (), data.Word(text, "red", 0.5, 0.5)) for text in data.TWO_LETTERS]
    low, high = (np.array(c, np.float32) for c in (data.BACKGROUNDS["black"], data.COLOURS["red"]))
    toward = high - low
    return np.stack([(data.draw(scene, SIDE) - low) @ toward / (toward @ toward) for scene in scenes])


def read_word(image, ground, pieces):
    """The word of a picture (SIDE, SIDE, 3) with this background and these masks of what stands out from it -> SeenWord.

    All pieces together are the word. Their boxes' middles are laid over each other, and each word's drawing is tried there
    and up to a pixel beside it.
    """
    if not pieces:
        return SeenWord("", "unknown", 0.0)
    taken = np.any(pieces, 0)
    core = ~grow(~taken)
    colour = np.median(image[core if core.sum() > 4 else taken], 0)
    toward = colour - ground
    cover = np.clip(SHARPEN * ((image - ground) @ toward / (toward @ toward) - 0.5) + 0.5, 0, 1) * grow(grow(taken))
    rows, columns = np.flatnonzero(taken.any(1)), np.flatnonzero(taken.any(0))
    templates, best = word_templates(), (0.0, 0)
    middles = [(np.flatnonzero((t > 0.5).any(1))[[0, -1]].sum() // 2, np.flatnonzero((t > 0.5).any(0))[[0, -1]].sum() // 2)
               for t in templates]
    y, x = (rows[0] + rows[-1]) // 2, (columns[0] + columns[-1]) // 2
    for at in set(middles):
        alike = [i for i, middle in enumerate(middles) if middle == at]
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            moved = np.roll(cover, (at[0] - y + dy, at[1] - x + dx), (0, 1))
            low = np.minimum(templates[alike], moved).sum((1, 2))
            ious = low / (templates[alike].sum((1, 2)) + moved.sum() - low)
            best = max(best, (float(ious.max()), alike[int(ious.argmax())]))
    match, index = best
    return SeenWord(data.TWO_LETTERS[index] if match >= MATCH_WORD else "", nearest(colour, data.COLOURS), match)


def judge(image, words=False):
    """What a picture of the world shows, by rules alone. image: uint8 (S, S, 3), any S -> Seen. words: look for a word, too.

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
    return Seen(nearest(ground, data.BACKGROUNDS), tuple(sorted(things, key=lambda t: -t.match)),
                read_word(image, ground, pieces) if words else None)


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


def asked_word(entry):
    """(the word, its colour or None) that an entry asks for; (None, None) if it asks for things."""
    return next(((clause["word"], clause.get("color")) for clause in entry["include"] if "word" in clause), (None, None))


def fits(entry, seen):
    """Does a judged picture show exactly what an entry asks: as many things as its clauses together, those of each with
    its class, and the colour, size, background and place that are told? Clauses may differ in colour alone. Of an entry
    that asks for a word: that word, in its colour."""
    (word, colour), groups = asked_word(entry), []
    if word:
        return (seen.word.text == word and seen.word.colour == (colour or seen.word.colour)
                and seen.background == entry.get("background", seen.background))
    for clause in entry["include"]:
        group = [t for t in seen.things if t.shape == clause["class"] and t.colour == clause.get("color", t.colour)
                 and t.size == clause.get("size", t.size)]
        link, other = clause.get("position", (None, None))
        if len(group) != clause["count"]:
            return False
        if link and not all(link in relations(a, b) for a in group for b in groups[other]):
            return False
        groups.append(group)
    return len(seen.things) == sum(map(len, groups)) and seen.background == entry.get("background", seen.background)


def hits_strictly(entry, seen):
    """`hits`, and nothing else is in the picture: not one object more, known or unknown."""
    return hits(entry, seen) and len(seen.things) == sum(clause["count"] for clause in entry["include"])


def colours_fit(entry, seen):
    """Are there just as many things as an entry asks, and the colours that it names among theirs, whatever their shapes?"""
    (word, colour), clauses = asked_word(entry), entry["include"]
    if word:
        return seen.word.colour == (colour or seen.word.colour)
    named = Counter(clause["color"] for clause in clauses for _ in range(clause["count"]) if "color" in clause)
    return len(seen.things) == sum(clause["count"] for clause in clauses) and named <= Counter(t.colour for t in seen.things)


def look(pictures, entries):
    """What the judge sees in each picture; words, too, if any of the entries asks for one."""
    words = any(asked_word(entry)[0] for entry in entries)
    return [judge(picture, words) for picture in pictures]


def judge_all(entries, seen):
    """(hit, strict hit, do the colours fit?) of judged pictures under one entry each; of no GenEval skill: exact ones."""
    return [((hits(e, s), hits_strictly(e, s)) if e["tag"] in data.SKILLS else (fits(e, s),) * 2) + (colours_fit(e, s),)
            for e, s in zip(entries, seen, strict=True)]


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


def by_skill(tags, verdicts):
    """Skills and booleans of pictures -> {skill or "overall": {"score", "low", "high", "n"}}.

    "overall" is GenEval's unweighted mean of the skills. Its interval is Wilson's with the number of trials that gives
    a mean of unequal groups the same variance; pictures count as independent, also those of one prompt.
    """
    skills = list(dict.fromkeys(tags))
    table = {skill: share(v for tag, v in zip(tags, verdicts) if tag == skill) for skill in skills}
    rows = list(table.values())
    score = sum(r["score"] for r in rows) / len(rows)
    trials = len(rows) ** 2 / sum(1 / r["n"] for r in rows)
    low, high = wilson(score * trials, trials)
    table["overall"] = {"score": score, "low": low, "high": high, "n": sum(r["n"] for r in rows)}
    return table


def summarise(entries, verdicts):
    """Entries and what judge_all says -> the table of `by_skill`, beside it the shares "strict" and "colours"."""
    hit, strict, colours = (by_skill([e["tag"] for e in entries], column) for column in zip(*verdicts))
    return {skill: {**row, "strict": strict[skill]["score"], "colours": colours[skill]["score"]} for skill, row in hit.items()}


def score_images(images, entries):
    """Pictures (B, 3, H, W) in [0, 1] and their B entries of data.skill_prompts -> the table of `summarise`."""
    return summarise(entries, judge_all(entries, look(to_uint8(images.float().clamp(0, 1)), entries)))


def scene_for(entry, rng):
    """A Scene that shows exactly what an entry of data.skill_prompts asks; what it leaves open is drawn at random.

    Open colours avoid HELD_OUT pairs. Three and more objects are small, as in the world.
    """
    word, colour = asked_word(entry)
    if word:
        scene = data.make_word(1, int(rng.integers(10 ** 6)))
        scene = replace(scene, word=replace(scene.word, text=word, colour=colour or scene.word.colour))
        return replace(scene, background=entry.get("background", scene.background))
    clauses = entry["include"][::-1]                                 # the clause with a position, the last, comes first
    link = clauses[0].get("position", (None,))[0] if clauses else None
    ground = entry.get("background") or data.pick(rng, list(data.BACKGROUNDS))
    while clauses:
        kinds = []
        for clause in clauses:
            open_colours = [c for c in data.COLOURS if (c, clause["class"]) not in data.HELD_OUT]
            colour = clause.get("color") or data.pick(rng, open_colours)
            size = clause.get("size") or ("small" if clause["count"] > 2 else data.pick(rng, list(data.SIZES)))
            kinds += [(clause["class"], colour, size)] * clause["count"]
        things = data.place(kinds, rng, link)
        if things:
            return data.Scene(ground, things)
    return data.Scene(ground, ())


def read_entries(path):
    """Prompts of one's own: a file with the fields of data.skill_prompts; a clause may also have "size", an entry
    "background". Raises ValueError where one asks for what this world or this judge doesn't have."""
    entries = read_records(path, ("tag", "prompt", "include"))
    for number, entry in enumerate(entries, 1):
        try:
            fine = entry["tag"] not in data.SKILLS and entry.get("background", "black") in data.BACKGROUNDS
            for at, clause in enumerate(entry["include"]):
                link, other = clause.get("position", ("above", -1))
                if "word" in clause:
                    fine &= clause["word"] in data.TWO_LETTERS and clause.get("color", "red") in data.COLOURS
                    continue
                fine &= clause["class"] in data.SHAPES and clause.get("color", "red") in data.COLOURS
                fine &= clause.get("size", "small") in data.SIZES and clause["count"] > 0
                fine &= link in data.RELATIONS and other < at
        except (KeyError, TypeError, ValueError, AttributeError):
            fine = False
        if not fine:
            raise ValueError(f"entry {number} of {path} asks for what the judge doesn't know, or has a skill's tag")
    return entries


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
# Files and reports
# ----------------------------------------------------------------------------------------------------------------------
def write_whole(path, content):
    """Write text or a picture (uint8 (H, W, 3), as PNG) such that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")        # hidden: scorers walk these folders
    if isinstance(content, str):
        part.write_text(content, "utf-8")
    else:
        Image.fromarray(content).save(part, "PNG")
    os.replace(part, path)


def read_text(path):
    """The text of a file; ValueError where it is empty or no UTF-8."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} isn't UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def read_records(path, need=()):
    """The objects of a .jsonl file (one a line) or a .json file: a list, or {key: object}, then with the field "key".

    Raises ValueError naming the line or entry that is cut short or broken, or lacks a field of `need`.
    """
    text, whole, rows = read_text(path), Path(path).suffix == ".json", []
    for number, line in enumerate([text] if whole else text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            at = number + error.lineno - 1
            raise ValueError(f"{path}, line {at}, is cut short or no JSON ({error.msg})") from None
    if whole and isinstance(rows[0], dict):
        rows = [{"key": key, **row} if isinstance(row, dict) else row for key, row in rows[0].items()]
    elif whole:
        rows = rows[0] if isinstance(rows[0], list) else rows
    if not rows:
        raise ValueError(f"{path} has no entries")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"entry {number} of {path} is no object with fields")
        if absent := [field for field in need if field not in row]:
            raise ValueError(f"entry {number} of {path} lacks the field {', '.join(absent)}")
    return rows


def read_pictures(folder):
    """The pictures below a folder, by name, in lists of (file, PIL picture); ValueError where there is none."""
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in data.PICTURES)
    if not found:
        raise ValueError(f"no picture ({', '.join(data.PICTURES)}) in {folder}")
    return ([(file, data.load_image(file)) for file in found[i:i + BATCH]]
            for i in tqdm(range(0, len(found), BATCH), disable=None))


NUMBERS = {"dB": ".2f", "points": ".1f", "SSIM": ".3f", "cosine": ".3f", "distance": ".3f", "Frechet": ".4g", "MMD": ".3g", "p": ".2g",
           "feature spread": ".3f", "pixel spread": ".3f", "gap, t = 0.02": ".4f", "gap, t = 0.05": ".4f",
           "seconds": ".0f"}


def show(title, table):
    """Print {row: {column: value}}: shares as per cent, with the interval in brackets; NUMBERS as they are."""
    print(f"\n{title}")
    for name, row in table.items():
        cells = []
        for key, value in row.items():
            if key == "score":
                cells.append(f"{100 * value:5.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]")
            elif key not in ("low", "high"):
                cells.append(f"{key} {value:{NUMBERS[key]}}" if key in NUMBERS else
                             f"{key} {100 * value:.1f} %" if isinstance(value, float) else f"{key} {value}")
        print(f"  {name:<26}" + "   ".join(cells))


def save(args, results, name=None):
    """Write the settings and results of a command as OUT/NAME.json (NAME: the command's) and name the file."""
    file = Path(args.out) / f"{name or args.command}.json"
    write_whole(file, json.dumps({"settings": vars(args), **results}, indent=1) + "\n")
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
# Commands on the synthetic world
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


def draw_entries(pipe, entries, seed, best_of=1, **sampling):
    """Entries of data.skill_prompts -> their pictures, uint8 (H, W, 3), and their seeds; `sampling`: see pipe.images. With
    best_of, the one of so many that the model itself likes best.

    One seed per picture, whatever the batch; far enough apart that two values of `seed` share none.
    """
    seeds, pictures = [seed * 10 ** 6 + i for i in range(len(entries))], []
    for i in tqdm(range(0, len(entries), BATCH), leave=False, disable=None):
        prompts, some = [e["prompt"] for e in entries[i:i + BATCH]], seeds[i:i + BATCH]
        if best_of > 1:
            drawn, seeds[i:i + BATCH] = pipe.best(prompts, some, best_of, **sampling)
        else:
            drawn = pipe.images(prompts, some, **sampling)
        pictures += list(to_uint8(drawn))
    return pictures, seeds


def tells(entry, text):
    """Does an expanded prompt tell of the things that the entry asks for, in their numbers and colours, and of no others?"""
    things = [{shape, *words} for shape, *words in data.things_told(text)
              for _ in range(max([1, *(data.NUMBERS.index(word) for word in words if word in data.NUMBERS)]))]
    counts = [clause.get("count", 1) for clause in entry["include"]]
    return len(things) == sum(counts) and all(
        sum({clause["class"], clause.get("color", clause["class"])} <= thing for thing in things) >= count
        for clause, count in zip(entry["include"], counts))


def run_alignment(args):
    """Does the model draw what the prompts of the six skills ask? Beside it: shuffled prompts, and true renders."""
    pipe = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva)
    prompts, name = data.skill_prompts(args.n_prompts, args.seed, args.novel, args.things), "alignment"
    if args.prompts:
        prompts = [e for e in read_entries(args.prompts) if sum(clause.get("count", 1) for clause in e["include"]) <= args.things]
        name = f"alignment-{Path(args.prompts).stem}"
        if not prompts:
            raise ValueError(f"no prompt in {args.prompts} asks for {args.things} things or fewer (--things)")
    elif args.words:
        prompts, name = data.word_prompts(args.n_prompts, args.seed), "alignment-words"
    entries = [entry for entry in prompts for _ in range(args.images)]
    pictures, seeds = draw_entries(pipe, entries, args.seed, args.best_of, expand=args.expand)
    seen = look(pictures, entries)
    verdicts = judge_all(entries, seen)
    rng = np.random.default_rng(args.seed)
    tables = {"model": summarise(entries, verdicts),
              "real": score_renders(entries, [data.draw(scene_for(e, rng), len(pictures[0])) for e in entries])}
    others = [seen[i] for i in rng.permutation(len(seen))]
    tables["shuffled"] = summarise(entries, judge_all(entries, others))
    show(f"{len(prompts)} prompts x {args.images} pictures", tables["model"])
    show("the same pictures under shuffled prompts", tables["shuffled"])
    show("the same prompts' true renders", tables["real"])
    drawn = [pipe.expanded.get((e["prompt"], seed), e["prompt"]) for e, seed in zip(entries, seeds)]
    if pipe.expanded and not args.words:
        tables["told in full"] = {"overall": share([tells(e, text) for e, text in zip(entries, drawn)])}
        show("the prompts told in full tell of the things asked", tables["told in full"])
    every = -(-len(pictures) // SHEET)                               # of how many prompts one is on the contact sheet
    chosen = [i for i in range(len(pictures)) if i // args.images % every == 0]
    sheet = contact_sheet([pictures[i] for i in chosen], [entries[i]["prompt"] for i in chosen],
                          [verdicts[i][0] for i in chosen], max(8, 4 * args.images))
    write_whole(Path(args.out) / f"{name}.png", np.asarray(sheet))
    save(args, {**tables, "pictures": [
        {"tag": e["tag"], "prompt": e["prompt"], "drawn": text, "seed": seed, "hit": hit, "strict": strict, "seen": asdict(s)}
        for e, text, seed, (hit, strict, _), s in zip(entries, drawn, seeds, verdicts, seen)]}, name)


def draw_questions(seed, n, most=4):
    """n questions about scenes of the world `seed`, of at most `most` things (two or more), the kinds in turn:
    [(scene, kind, question, answer)]."""
    found, index = [], 0
    while len(found) < n:
        scene, kind = data.make_scene(seed, index, most=most), data.QUESTIONS[len(found) % len(data.QUESTIONS)]
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


def answers_right(answers, truths):
    """Which answers are the expected ones, whatever their case and a full stop."""
    return [a.strip().lower().removesuffix(".") == t for a, t in zip(answers, truths)]


def run_understanding(args):
    """Questions of six kinds, beside what the commonest training answer of each kind would score; captions; claims.

    An answer is right if it is the expected one, whatever its case and a full stop. Captions: see caption_truth.
    With --data, the questions of a file instead (see answer_file); with --write, nothing but a file of such questions.
    """
    if args.data or args.write:
        return answer_file(args) if args.data else write_questions(args)
    pipe = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva)
    asked = draw_questions(args.seed, args.n)
    scenes, kinds, questions, truths = zip(*asked)
    answers = answer_all(pipe, scenes, questions)
    right = answers_right(answers, truths)
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
    claims, truths_of_claims = zip(*(data.claim(scene, np.random.default_rng((args.seed, i))) for i, scene in enumerate(scenes)))
    fine = answers_right(answer_all(pipe, scenes, claims), truths_of_claims)
    for name, few in ("claim, one thing", True), ("claim, several", False):
        table[name] = share(ok for ok, scene in zip(fine, scenes) if (len(scene.things) == 1) == few)
    show(f"{args.n} questions and captions about unseen pictures", table)
    save(args, {"table": table, "answers": [
        {"question": q, "answer": a, "expected": t, "caption": c, "caption_true": v, "scene": asdict(s)}
        for s, q, a, t, c, v in zip(scenes, questions, answers, truths, captions, truth)]})


@torch.no_grad()
def run_editing(args):
    """Does the model draw a picture again, changed as told? --n unseen scenes, the kinds of data.edit in turn, and
    "again" without a change. Right: the judge sees the things of the changed scene in shape, colour and size, and its
    background; after a move also the thing in its new region. Beside it, how often the picture as it was would pass."""
    pipe, rng = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva), np.random.default_rng(args.seed)
    kinds, tasks, index = ("again", "colour", "place", "remove", "background"), [], 0
    while len(tasks) < args.n:                                       # scenes that can't be changed so are passed over
        scene, kind, index = data.make_scene(args.seed, index), kinds[len(tasks) % len(kinds)], index + 1
        asked = (data.RECONSTRUCT, scene) if kind == "again" else data.edit(scene, rng, kind)
        tasks += [(kind, scene, *asked)] if asked else []
    pictures, shown = [], [Image.fromarray(data.draw(scene)) for _, scene, _, _ in tasks]
    for i in tqdm(range(0, len(tasks), BATCH), disable=None):
        prompts = [task[2] for task in tasks[i:i + BATCH]]
        seeds = [args.seed * 10 ** 6 + i + j for j in range(len(prompts))]
        pictures += list(to_uint8(pipe.images(prompts, seeds, images=shown[i:i + BATCH])))

    def told(things):
        return Counter((t.shape, t.colour, t.size) for t in things)

    def right(task, picture):
        kind, before, _, after = task
        seen, new = judge(np.asarray(picture)), set(after.things) - set(before.things)
        there = {(t.shape, t.colour, data.region(t)) for t in seen.things}
        return seen.background == after.background and told(seen.things) == told(after.things) and (
            kind != "place" or all((t.shape, t.colour, data.region(t)) in there for t in new))
    verdicts = [right(task, picture) for task, picture in zip(tasks, pictures)]
    unchanged = [right(task, picture) for task, picture in zip(tasks, shown)]
    tags = [task[0] for task in tasks]
    table, floor = by_skill(tags, verdicts), by_skill(tags, unchanged)
    table = {kind: {**row, "unchanged": floor[kind]["score"]} for kind, row in table.items()}
    show(f"{args.n} pictures drawn again", table)
    pairs = [picture for i in range(min(32, len(tasks))) for picture in (np.asarray(shown[i]), pictures[i])]
    sheet = contact_sheet(pairs, [text for task in tasks[:32] for text in (data.describe(task[1]), task[2])],
                          [verdict for i in range(min(32, len(tasks))) for verdict in (True, verdicts[i])], 8)
    write_whole(Path(args.out) / "editing.png", np.asarray(sheet))
    save(args, {**table, "pictures": [{"kind": kind, "asked": asked, "scene": data.describe(scene), "right": fine}
                                      for (kind, scene, asked, _), fine in zip(tasks, verdicts)]})


def run_reconstruction(args):
    """Both ceilings: what the VAE alone keeps of a picture, and what CLIP features and the decoder keep.

    With --images, of the pictures in a folder: see reconstruct_files.
    """
    if args.images:
        return reconstruct_files(args)
    pipe = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva)
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
    write_whole(Path(args.out) / "reconstruction.png", sheet)
    save(args, {"table": table})


# ----------------------------------------------------------------------------------------------------------------------
# Benchmarks of drawing: prompts as published, pictures as their scorers want them, scores as published
# ----------------------------------------------------------------------------------------------------------------------
BENCHES = ("geneval", "dpg", "wise", "mjhq")
# WISE: first and last prompt_id of a category, and its weight in the overall score.
WISE = {"cultural": (1, 400, 0.4), "time": (401, 567, 0.167), "space": (568, 700, 0.133), "biology": (701, 800, 0.1),
        "physics": (801, 900, 0.1), "chemistry": (901, 1000, 0.1)}


def read_prompts(bench, path, seed=0):
    """A benchmark's prompts -> its picture files in order, [{"file", "prompt", "seeds", "entry"}].

    geneval: a jsonl; for line i, I/samples/0000.png to 0003.png beside I/metadata.jsonl, the line. dpg: a folder of txt
    files; NAME.png, four pictures as 2 x 2. wise: a json or a folder of them; PROMPT_ID.png. mjhq: meta_data.json;
    CATEGORY/KEY.png. Seeds count all pictures of a prompt file, so that no two share one.
    """
    path = Path(path)
    if bench == "geneval":
        jobs = [(f"{i:05}/samples/{k:04}.png", entry["prompt"], entry)
                for i, entry in enumerate(read_records(path, ("tag", "include", "prompt"))) for k in range(4)]
    elif bench == "dpg":
        jobs = [(f"{file.stem}.png", read_text(file), None) for file in sorted(path.glob("*.txt"))]
    elif bench == "wise":
        parts = sorted(path.glob("*.json")) if path.is_dir() else [path]
        jobs = [(f"{e['prompt_id']}.png", e["Prompt"], None)
                for file in parts for e in read_records(file, ("prompt_id", "Prompt"))]
    else:
        jobs = [(f"{e['category']}/{e['key']}.png", e["prompt"], None)
                for e in read_records(path, ("key", "category", "prompt"))]
    n, files = 4 if bench == "dpg" else 1, Counter(file for file, _, _ in jobs)
    if not jobs:
        raise ValueError(f"no prompts of {bench} in {path}")
    for file, prompt, _ in jobs:
        if files[file] > 1 or not isinstance(prompt, str) or not prompt.strip():
            problem = "there twice" if files[file] > 1 else "empty or no text"
            raise ValueError(f"{path}: the prompt of {file} is {problem}")
    return [{"file": file, "prompt": prompt.strip(), "entry": entry,
             "seeds": [seed * 10 ** 6 + i * n + k for k in range(n)]} for i, (file, prompt, entry) in enumerate(jobs)]


def run_generate(args):
    """A benchmark's pictures in the layout of its scorer, in OUT/BENCH.

    The same line goes on where a run stopped; under torchrun (or with RANK and WORLD_SIZE set) each process draws its
    share. A picture depends on its place in the prompt file and on --seed: not on batches, processes or what was there.
    """
    jobs, folder = read_prompts(args.bench, args.prompts, args.seed), Path(args.out) / args.bench
    rank, world, local = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = f"cuda:{local}" if args.device == "auto" and torch.cuda.is_available() else args.device
    pipe, note = Pipeline(args.ckpt, device, args.dtype, eva=args.eva), folder.with_suffix(".json")
    about = {"ckpt": args.ckpt, "seed": args.seed, "dtype": str(pipe.dtype), "sampling": pipe.sampling,
             "prompts": fingerprint(jobs)}
    if folder.exists() and (not note.exists() or json.loads(read_text(note)) != about):
        raise ValueError(f"{folder} holds pictures of other settings than these (see {note}): choose another --out")
    write_whole(note, json.dumps(about, indent=1) + "\n")
    n, mine = len(jobs[0]["seeds"]), jobs[rank::world]
    todo = [job for job in mine if not (folder / job["file"]).exists()]
    step = max(1, BATCH // n)
    for i in tqdm(range(0, len(todo), step), disable=None):
        batch = todo[i:i + step]
        seeds = [seed for job in batch for seed in job["seeds"]]
        drawn = to_uint8(pipe.images([job["prompt"] for job in batch for _ in range(n)], seeds))
        pipe.negatives.clear()                                       # one for each seed: they would fill the memory
        for job, cells in zip(batch, drawn.reshape(len(batch), n, *drawn.shape[1:])):
            if job["entry"]:
                write_whole(folder / job["file"].split("/")[0] / "metadata.jsonl", json.dumps(job["entry"]) + "\n")
            write_whole(folder / job["file"], cells[0] if n == 1 else np.concatenate(
                [np.concatenate(list(row), 1) for row in (cells[:2], cells[2:])]))
    print(f"{len(todo)} new files, {len(mine) - len(todo)} were there: {folder}")


def fingerprint(content):
    """16 hex digits that tell contents (objects or bytes) apart."""
    return hashlib.sha256(content if isinstance(content, bytes) else json.dumps(content).encode()).hexdigest()[:16]


def score_geneval(rows):
    """Lines of GenEval's evaluate_images.py -> {skill, "overall" (the published score), "prompts" (any picture right)}.

    Raises ValueError where prompts have unequal numbers of pictures: the scorer was stopped.
    """
    prompts = defaultdict(list)
    for row in rows:
        if row["correct"] not in (True, False):
            raise ValueError(f"a result of the prompt {row['prompt']!r} is {row['correct']!r}, not true or false")
        prompts[str(row.get("metadata", row["prompt"]))].append(row["correct"])
    if len(set(map(len, prompts.values()))) > 1:
        raise ValueError("some prompts have fewer results than others: let the scorer finish")
    if strange := {str(row["tag"]) for row in rows} - set(data.SKILLS):
        raise ValueError(f"{', '.join(strange)} is no skill of GenEval")
    return {**by_skill([row["tag"] for row in rows], [bool(row["correct"]) for row in rows]),
            "prompts": share(any(p) for p in prompts.values())}


def score_wise(rows):
    """Lines of WISE's gpt_eval.py -> {category or "overall": {"score", "low", "high", "n"}}, normal 95 % intervals.

    WiScore = (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2. Raises ValueError where a result is missing,
    or no number from 0 to 2 (999: the judge's answer could not be read).
    """
    marks = {}
    for row in rows:
        values = [row[key] for key in ("consistency", "realism", "aesthetic_quality")]
        if not all(isinstance(v, (int, float)) and 0 <= v <= 2 for v in values):
            raise ValueError(f"prompt {row['prompt_id']} has the marks {values}, not numbers from 0 to 2: judge again")
        if row["prompt_id"] not in range(1, 1001):
            raise ValueError(f"there is no prompt {row['prompt_id']!r}: those of WISE are 1 to 1000")
        marks[row["prompt_id"]] = float(np.dot((0.35, 0.1, 0.05), values))
    if absent := [i for i in range(1, 1001) if i not in marks]:
        raise ValueError(f"{len(absent)} of 1000 prompts have no result (first: {absent[0]}): let the scorer finish")
    parts = {name: np.array([marks[i] for i in range(first, last + 1)]) for name, (first, last, _) in WISE.items()}
    means = {name: float(values.mean()) for name, values in parts.items()}
    errors = {name: values.std(ddof=1) / math.sqrt(len(values)) for name, values in parts.items()}
    means["overall"] = sum(WISE[name][2] * mean for name, mean in means.items())
    errors["overall"] = math.sqrt(sum((WISE[name][2] * error) ** 2 for name, error in errors.items()))
    return {name: {"score": mean, "low": mean - 1.959964 * errors[name], "high": mean + 1.959964 * errors[name],
                   "n": len(parts.get(name, marks))} for name, mean in means.items()}


def run_score(args):
    """The published figures, with intervals, from the file that the official scorer wrote; several files: joined."""
    need = {"geneval": ("tag", "prompt", "correct"),
            "wise": ("prompt_id", "consistency", "realism", "aesthetic_quality")}
    rows = [row for file in args.results for row in read_records(file, need[args.bench])]
    table = {"geneval": score_geneval, "wise": score_wise}[args.bench](rows)
    if args.bench == "geneval" and len(rows) != 4 * 553:
        print(f"eval.py: published scores are of 2212 pictures, this one of {len(rows)}", file=sys.stderr)
    show(f"{args.bench}, {len(rows)} results", table)
    save(args, {"table": table}, f"score-{args.bench}")


# ----------------------------------------------------------------------------------------------------------------------
# Benchmarks of looking: questions as they are published, answers by their rules
# ----------------------------------------------------------------------------------------------------------------------
TASKS = {"choice": 128, "mme": 16, "pope": 128, "vqav2": 128, "textvqa": 128, "mmvet": 1024}  # most tokens of an answer
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
THINK = "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
OFFICIAL_PIXELS = {"min_pixels": 256 * 28 * 28, "max_pixels": 1605632}      # of the official run of lmms-eval


def as_list(cell):
    """A table's cell as a list: "['a', 'b']" has two entries, anything else is one."""
    try:
        cell = ast.literal_eval(cell) if str(cell)[0] == "[" and isinstance(cell, str) else cell
    except (ValueError, SyntaxError):
        pass
    return cell if isinstance(cell, list) else [cell]


def read_table(path):
    """The rows of a TSV file as dicts without empty cells; ValueError where one has not as many cells as the header."""
    csv.field_size_limit(2 ** 31 - 1)                                # a cell can be a picture
    header, *lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    for number, cells in enumerate(lines, 1):
        if len(cells) != len(header):
            raise ValueError(f"row {number} of {path} has {len(cells)} cells, not {len(header)}: is it cut short?")
    if not lines:
        raise ValueError(f"{path} has a header, but no rows")
    return [{name: cell for name, cell in zip(header, cells) if cell} for cells in lines]


def read_questions(path, task=None, images=None):
    """A file's (task, [{"index", "pictures": [bytes or path], "question", "hint", "options": {letter: text}, "answers",
    "category", "group"}]). task None is "choice" where there are options, else "vqav2".

    .tsv: the layout of VLMEvalKit, pictures in base64, a short one being the index of the row whose picture is meant.
    .jsonl (or .json): question or text, answer, answers or label, and image, a file in the folder `images` (the data's
    if None). group: what the two questions of MME about one picture have in common.
    """
    table, found = Path(path).suffix == ".tsv", []
    rows = read_table(path) if table else read_records(path)
    cells = {str(row.get("index")): row.get("image") for row in rows}
    for number, row in enumerate(rows, 1):
        where, pictures = f"row {number} of {path}", []

        def field(*names):
            values = [row[name] for name in names if row.get(name) not in (None, "")]
            if not values:
                raise ValueError(f"{where} has no {' or '.join(names)}")
            return values[0]
        for cell in as_list(field("image", "image_path", "imagename")):
            if table and "image" in row:
                try:
                    pictures.append(base64.b64decode(cells.get(cell, cell), validate=True))
                    data.load_image(io.BytesIO(pictures[-1]))        # a broken one is found before the work begins
                except ValueError:                                   # binascii's is one, too
                    raise ValueError(f"{where}: its image is no picture in base64") from None
            else:
                pictures.append(Path(images or Path(path).parent) / cell)
                if not pictures[-1].is_file():
                    raise ValueError(f"{where}: there is no picture {pictures[-1]}")
        answers = [a["answer"] if isinstance(a, dict) else str(a) for a in as_list(field("answers", "answer", "label"))]
        options = {name: str(row[name]) for name in sorted(row) if re.fullmatch("[A-Z]", name)}
        if options and answers[0] not in options:
            raise ValueError(f"{where}: the answer {answers[0]!r} is none of its options {', '.join(options)}")
        index = next((row[name] for name in ("index", "question_id", "key") if name in row), number)
        category = str(row.get("category", "all"))
        found.append({"index": str(index), "pictures": pictures, "question": str(field("question", "text")),
                      "hint": row.get("hint"), "options": options, "answers": answers, "category": category,
                      "group": (category, row.get("image_path", pictures[0]))})
    if len({q["index"] for q in found}) < len(found):
        raise ValueError(f"two rows of {path} have the same index")
    return task or ("choice" if any(q["options"] for q in found) else "vqav2"), found


def official_text(task, q):
    """The text that goes to the model with the pictures of a question, worded as in the official evaluation."""
    text = re.sub(r"<image(?: \d+)?>", "", q["question"]).strip()
    if task == "choice":
        lines = [*filter(None, [q["hint"], text]), *(f"{letter}. {option}" for letter, option in q["options"].items())]
        return "\n".join([*lines, LETTER if q["options"] else SHORT])
    bare = re.sub(r"\s*Please answer yes or no\.", "", text) if task == "mme" else text
    return {"mme": f"{bare}\n{SHORT}", "pope": f"{text}\n{SHORT}", "textvqa": f"{text.capitalize()}\n{SHORT}",
            "mmvet": THINK + text, "vqav2": text}[task]


def pick_option(answer, options):
    """The letter that an answer chooses: at its beginning, alone in it, or through the option's words; else None."""
    letters, said = "".join(options), answer.strip().lower().removesuffix(".")
    if first := re.match(rf"\(?([{letters}])(?:[).:,]|$)", answer.strip()):
        return first[1]
    named = set(re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", answer))
    if len(named) == 1 and not (named == {"A"} and re.search(r"\bA [a-z]", answer)):         # "A cat" names no option
        return named.pop()
    inside = [k for k, text in options.items() if re.search(rf"(?<!\w){re.escape(text.lower())}(?!\w)", said)]
    equal = [k for k in inside if options[k].lower() == said]
    return equal[0] if equal else inside[0] if len(inside) == 1 else None


def yes_or_no(task, answer):
    """MME's reading: "yes" or "no" within the first four characters, else "other". POPE's: "no" if the first sentence
    has the word no or not, else "yes"."""
    if task == "pope":
        return "no" if {"No", "no", "not"} & set(answer.split(".")[0].replace(",", "").split(" ")) else "yes"
    return next((word for word in ("yes", "no") if word in answer.strip().lower()[:4]), "other")


# The contractions that VQA's evaluation restores: each may have lost one of its apostrophes.
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split() for i, letter in enumerate(word) if letter == "'"}
DIGITS = dict(zip("none zero one two three four five six seven eight nine ten".split(), map(str, (0, *range(11)))))


def vqa_normal(text):
    """An answer in the normal form of VQA's evaluation: lower case, no articles, numbers as digits, no punctuation
    (it becomes nothing where it stands beside a space or the text has a number like 1,000, else a space)."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out, comma = text, re.search(r"\d,\d", text)
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        out = out.replace(mark, "" if comma or f"{mark} " in text or f" {mark}" in text else " ")
    words = [DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", out).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_score(answer, truths):
    """VQA's soft accuracy: min(1, people who said it / 3), averaged over leaving out each one; one truth: exact match.

    Both sides are normalised, as in TextVQA; VQAv2's own script leaves them as they are where all ten people agree.
    """
    said, truths = vqa_normal(answer), [vqa_normal(t) for t in truths]
    if len(truths) == 1:
        return float(said == truths[0])
    return sum(min(1, (truths.count(said) - (truth == said)) / 3) for truth in truths) / len(truths)


KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")   # the answer follows
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:e[+-]?\d+)?(?![\d,]*\d)")


def open_normal(text):
    """What MMMU compares: of a number [its value to two decimals], of words [lower case], of one letter [it and a space
    on either side]."""
    text = text.strip().lower()
    with suppress(ValueError):
        return [round(float(text.replace(",", "")), 2)]
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_score(answer, truths):
    """MMMU's rule for questions without options: 1 if a truth stands in an answer's words or equals one of its numbers.

    Of each line only what follows the last of KEYS counts (the shortest such end; in the last line also after "="), if
    any line has one; else all. Numbers are read whole: the published script takes 1,234.5 for 234.5, too, and .5 for 5.
    """
    lines, ends = answer.strip().rstrip(".").lower().split("\n"), []
    for i, line in enumerate(lines):
        after = [line.rsplit(key, 1)[1].strip() for key in (*KEYS, *"="[:i == len(lines) - 1]) if key in line]
        ends += [end for end in [min(after, key=len, default="")] if end.strip(":,.!?;'")]
    ends = ends or ["\n".join(lines)]
    said = [part for text in (*ends, *(n for end in ends for n in NUMBER.findall(end))) for part in open_normal(text)]
    return float(any(truth in part if isinstance(truth, str) and isinstance(part, str) else truth == part
                     for truth in sum(map(open_normal, truths), []) for part in said))


def grade(task, q, answer):
    """(what an answer says, its score from 0 to 1) by the task's rule."""
    if task == "choice" and q["options"]:
        said = pick_option(answer, q["options"])
        return said, float(said == q["answers"][0])
    if task == "choice":                                             # as some questions of MMMU
        return answer.strip(), open_score(answer, q["answers"])
    if task in ("mme", "pope"):
        said = yes_or_no(task, answer)
        return said, float(said == q["answers"][0].lower())
    return vqa_normal(answer), vqa_score(answer, q["answers"])


def tabulate(task, questions, answers):
    """Questions and answers -> the table of a task: a row for each category, then one for all.

    "baseline" is what always giving the commonest answer of each category would score: more than a model gets without
    looking, since it knows the answers' frequencies. POPE adds F1, precision, recall and the share of yes; MME adds
    accuracy+ (both questions of a picture right) and points (accuracy and accuracy+ in per cent, summed).
    """
    graded, rows, table = [grade(task, q, a) for q, a in zip(questions, answers)], defaultdict(list), {}
    for i, q in enumerate(questions):
        rows[q["category"]].append(i)
    common = {name: Counter(a for i in mine for a in questions[i]["answers"]).most_common(1)[0][0]
              for name, mine in rows.items()}
    blind = [grade(task, q, common[q["category"]])[1] for q in questions]
    if len(rows) > 1:
        rows["overall"] = range(len(questions))
    for name, mine in rows.items():
        table[name] = {**share(graded[i][1] for i in mine), "baseline": sum(blind[i] for i in mine) / len(mine)}
        if task == "pope":
            pairs = Counter((graded[i][0], questions[i]["answers"][0].lower()) for i in mine)
            true, false, missed = pairs["yes", "yes"], pairs["yes", "no"], pairs["no", "yes"]
            table[name].update({
                "F1": 2 * true / max(1, 2 * true + false + missed), "precision": true / max(1, true + false),
                "recall": true / max(1, true + missed), "yes": (true + false) / len(mine)})
        if task == "mme":
            groups = defaultdict(list)
            for i in mine:
                groups[questions[i]["group"]].append(graded[i][1])
            if any(len(pair) != 2 for pair in groups.values()):
                raise ValueError(f"MME asks two questions about each picture; those of {name} don't come in pairs")
            plus = sum(all(pair) for pair in groups.values()) / len(groups)
            table[name].update({"plus": plus, "points": 100 * (table[name]["score"] + plus)})
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if task == "mme" and set(members) <= set(table):
            table[name] = {"points": sum(table[m]["points"] for m in members)}
    return table


def answer_file(args):
    """`understanding --data NAME.tsv`: answer the questions, into OUT/NAME.answers.jsonl, then score them, into
    OUT/NAME.score.json (MM-Vet: write what its judge reads, OUT/NAME.predictions.json).

    The same line goes on where a run stopped. Prompts are worded as in the official run; with --official, pictures go
    through JPEG and are scaled as there, too.
    """
    path, done = Path(args.data), {}
    task, questions = read_questions(path, args.task, args.images)
    file = Path(args.out) / f"{path.stem}.answers.jsonl"
    if task != "mmvet":
        tabulate(task, questions, [""] * len(questions))             # what can't be scored is found before the work
    about = {"ckpt": args.ckpt, "task": task, "official": args.official, "data": fingerprint(path.read_bytes())}
    if file.exists():
        try:                                                         # the rest of a killed run's last line is dropped
            before, *told = map(json.loads, file.read_text("utf-8").split("\n")[:-1])
        except ValueError:
            raise ValueError(f"{file} is broken: remove it, or choose another --out") from None
        if before != about:
            raise ValueError(f"{file} holds answers of another run ({before}): choose another --out")
        done = {line["index"]: line["prediction"] for line in told}
    pipe, todo = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva), [q for q in questions if q["index"] not in done]
    pipe.limits = OFFICIAL_PIXELS if args.official else {}
    lines = [about, *({"index": index, "prediction": answer} for index, answer in done.items())]
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
    with open(file, "a", encoding="utf-8") as log:
        for i in tqdm(range(0, len(todo), BATCH), disable=None):
            conversations = []
            for q in todo[i:i + BATCH]:
                shown = [data.load_image(io.BytesIO(p) if isinstance(p, bytes) else p) for p in q["pictures"]]
                shown = [Image.fromarray(jpeg(np.asarray(p))) for p in shown] if args.official else shown
                conversations.append(([(official_text(task, q), None)], [shown]))
            for q, answer in zip(todo[i:], pipe.ask(conversations, TASKS[task])):
                done[q["index"]] = answer
                log.write(json.dumps({"index": q["index"], "prediction": answer}) + "\n")
            log.flush()
    if task == "mmvet":                                              # only its judge can score these
        named = {f"v1_{index}" if index.isdigit() else index: answer for index, answer in done.items()}
        file = file.with_name(f"{path.stem}.predictions.json")
        write_whole(file, json.dumps(named, indent=1) + "\n")
        return print(f"{file} is for MM-Vet's judge")
    answers = [done[q["index"]] for q in questions]
    table = tabulate(task, questions, answers)
    show(f"{path.name}, {len(questions)} questions, as {task}", table)
    save(args, {"table": table, "task": task, "answers": [
        {"index": q["index"], "asked": official_text(task, q), "answer": answer, "expected": q["answers"],
         **dict(zip(("read", "score"), grade(task, q, answer)))} for q, answer in zip(questions, answers)]},
         f"{path.stem}.score")


def write_questions(args):
    """`understanding --write FILE.tsv`: the questions of this seed about the world, in VLMEvalKit's layout."""
    text = io.StringIO()
    out = csv.writer(text, delimiter="\t", lineterminator="\n")
    out.writerow(["index", "image", "question", "answer", "category"])
    for i, (scene, kind, question, answer) in enumerate(draw_questions(args.seed, args.n)):
        file = io.BytesIO()
        Image.fromarray(data.draw(scene)).save(file, "PNG")
        out.writerow([i, base64.b64encode(file.getvalue()).decode(), question, answer, kind])
    write_whole(Path(args.write), text.getvalue())
    print(args.write)


# ----------------------------------------------------------------------------------------------------------------------
# Distances between pictures, and between sets of them
# ----------------------------------------------------------------------------------------------------------------------
def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two batches (B, 3, H, W) in [0, 1] -> (B,)."""
    return -10 * torch.log10(((a - b) ** 2).mean((1, 2, 3)).clamp(min=1e-10))


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of two batches (B, 3, H, W) in [0, 1] -> (B,), the channels' mean.

    Gaussian windows of 11 x 11, standard deviation 1.5, only where they lie within the picture.
    """
    bell = torch.exp(-(torch.arange(11.0, dtype=torch.float64) - 5) ** 2 / (2 * 1.5 ** 2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2                           # (1, 1, 11, 11)
    a, b = (x.double().flatten(0, 1)[:, None] for x in (a, b))                               # (B * 3, 1, H, W)
    ma, mb, aa, bb, ab = (F.conv2d(x, window) for x in (a, b, a * a, b * b, a * b))   # each (B * 3, 1, H - 10, W - 10)
    light = (2 * ma * mb + 0.01 ** 2) / (ma ** 2 + mb ** 2 + 0.01 ** 2)
    shape = (2 * (ab - ma * mb) + 0.03 ** 2) / (aa - ma ** 2 + bb - mb ** 2 + 0.03 ** 2)
    return (light * shape).mean((1, 2, 3)).view(-1, 3).mean(1)


def frechet(x, y):
    """Frechet distance of the normal distributions with the moments of two sets of features (N, C), (M, C)."""
    (mx, rx), (my, ry) = ((z.mean(0), np.linalg.qr((z - z.mean(0)) / math.sqrt(len(z) - 1), "r"))  # r'r: the covariance
                          for z in (np.float64(x), np.float64(y)))
    # trace sqrt(cx cy) without the root of a covariance, whose zeros (fewer pictures than numbers) are only nearly so.
    both = np.linalg.svd(rx @ ry.T, compute_uv=False).sum()
    return float(((mx - my) ** 2).sum() + (rx ** 2).sum() + (ry ** 2).sum() - 2 * both)


def mmd(x, y):
    """Unbiased squared maximum mean discrepancy of features (N, C) and (M, C), with KID's kernel (x.y / C + 1)^3."""
    def total(a, b):                                                 # in blocks: 30,000 pictures would take 7 GB
        return sum((((a[i:i + 1024] @ b.T) / a.shape[1] + 1) ** 3).sum() for i in range(0, len(a), 1024))

    def within(a):                                                   # without the pairs of a picture with itself
        return (total(a, a) - (((a * a).mean(1) + 1) ** 3).sum()) / (len(a) * (len(a) - 1))
    x, y = np.float64(x), np.float64(y)
    return float(within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y)))


@torch.no_grad()
def clip_features(pipe, pictures):
    """The image encoder's features (B, 64, C) of PIL pictures, fp32 on the CPU."""
    pixels = torch.cat([data.preprocess_clip(p, pipe.eva.config.image_size) for p in pictures])
    return pipe.eva.encode(pixels.to(pipe.device, pipe.dtype)).float().cpu()


# Inception v3 as the TensorFlow graph of 2015-12-05 has it, whose features FID is defined on (arXiv 1512.00567, figures
# 5 to 7; 1706.08500). A block is its branches' convolutions in turn, (channels, height, width, stride if not 1); a list
# of two is a fork: both read the same and are joined.
MEAN = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAX, HALVE = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1), partial(F.max_pool2d, kernel_size=3, stride=2)


def block_a(channels):
    """The 35 x 35 blocks: they differ in the channels after the pool."""
    return {"branch1x1": [(64, 1, 1)], "branch5x5": [(48, 1, 1), (64, 5, 5)],
            "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)], "branch_pool": [(channels, 1, 1)]}


def block_c(c):
    """The 17 x 17 blocks: they differ in the channels c inside their branches."""
    return {"branch1x1": [(192, 1, 1)], "branch7x7": [(c, 1, 1), (c, 1, 7), (192, 7, 1)],
            "branch7x7dbl": [(c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)], "branch_pool": [(192, 1, 1)]}


FORK = [(384, 1, 3), (384, 3, 1)]
BLOCK_E = {"branch1x1": [(320, 1, 1)], "branch3x3": [(384, 1, 1), FORK],
           "branch3x3dbl": [(448, 1, 1), (384, 3, 3), FORK], "branch_pool": [(192, 1, 1)]}
BLOCKS = {  # name: (pool, branches). The last pool takes the maximum: an oddity of that graph, and part of FID
    "Mixed_5b": (MEAN, block_a(32)), "Mixed_5c": (MEAN, block_a(64)), "Mixed_5d": (MEAN, block_a(64)),
    "Mixed_6a": (HALVE, {"branch3x3": [(384, 3, 3, 2)], "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3, 2)],
                         "branch_pool": []}),
    "Mixed_6b": (MEAN, block_c(128)), "Mixed_6c": (MEAN, block_c(160)), "Mixed_6d": (MEAN, block_c(160)),
    "Mixed_6e": (MEAN, block_c(192)),
    "Mixed_7a": (HALVE, {"branch3x3": [(192, 1, 1), (320, 3, 3, 2)],
                         "branch7x7x3": [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)], "branch_pool": []}),
    "Mixed_7b": (MEAN, BLOCK_E), "Mixed_7c": (MAX, BLOCK_E)}


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU: (B, width, H, W) -> (B, channels, H', W'), padded to equal size
    unless it strides or is not to be the `same`."""

    def __init__(self, width, channels, height, wide, stride=1, same=True):
        super().__init__()
        pad = (height // 2, wide // 2) if same and stride == 1 else 0
        self.conv = nn.Conv2d(width, channels, (height, wide), stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block of BLOCKS: (B, width, H, W) -> (B, self.width, H', W'), its branches side by side."""

    def __init__(self, width, pool, branches):
        super().__init__()
        self.pool, self.width, self.chains = pool, 0, []             # chains: (branch, [[layer, or both of a fork]])
        for branch, steps in branches.items():
            last, chain = width, []
            for number, step in enumerate(steps, 1):
                forks = step if isinstance(step, list) else [step]
                stem = f"{branch}_{number}" if len(steps) > 1 else branch
                chain.append([stem + letter for letter in ("ab" if len(forks) > 1 else [""])])
                for name, conv in zip(chain[-1], forks):
                    self.add_module(name, ConvNorm(last, *conv))
                last = sum(conv[0] for conv in forks)
            self.width += last
            self.chains.append((branch, chain))

    def forward(self, x):
        out = []
        for branch, chain in self.chains:
            y = self.pool(x) if branch == "branch_pool" else x
            for forks in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in forks], 1)
            out.append(y)
        return torch.cat(out, 1)


class Inception(nn.Module):
    """Pixels (B, 3, 299, 299) in [-1, 1] -> the features of FID (B, 2048); tensors named as in pytorch-fid's file."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = ConvNorm(3, 32, 3, 3, 2), ConvNorm(32, 32, 3, 3, same=False)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = ConvNorm(32, 64, 3, 3), ConvNorm(64, 80, 1, 1)
        self.Conv2d_4a_3x3, width = ConvNorm(80, 192, 3, 3, same=False), 192
        for name, (pool, branches) in BLOCKS.items():
            self.add_module(name, Mixed(width, pool, branches))
            width = self.get_submodule(name).width
        self.fc = nn.Linear(width, 1008)                             # is in the file; the features lie before it

    def forward(self, x):
        x = HALVE(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))                   # (B, 64, 73, 73)
        x = HALVE(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))                                       # (B, 192, 35, 35)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)                          # (B, 2048, 8, 8) in the end
        return x.mean((2, 3))


CONVERT = ("make it once of the published file: python -c \"import torch, safetensors.torch as s; s.save_file({k: "
           "v.contiguous() for k, v in torch.load('pt_inception-2015-12-05-6726825d.pth', weights_only=True).items()}, "
           "'inception.safetensors')\"")


def load_inception(file):
    """The network in a safetensors file of pytorch-fid's tensors; ValueError, saying how to make one, for all else."""
    try:
        if not Path(file).is_file():
            raise ValueError(f"there is no file {file}")
        state = read_weights(weight_map(file))
        for name in [name for name in state if name.endswith(".running_var")]:       # older files have no such counters
            state.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0.0))
        return load_strict(Inception, state, file)
    except ValueError as error:
        raise ValueError(f"no weights of FID's Inception: {textwrap.shorten(str(error), 240)}; {CONVERT}") from None


@torch.no_grad()
def inception_features(net, pictures):
    """FID's features (B, 2048), on the CPU, of PIL pictures resized as in pytorch-fid, on which the numbers depend:
    bilinear on the tensor, without antialiasing."""
    device = next(net.parameters()).device
    pixels = [torch.from_numpy(np.array(p)).to(device).permute(2, 0, 1)[None] / 255 for p in pictures]  # (1, 3, H, W)
    return net(torch.cat([F.interpolate(x, (299, 299), mode="bilinear") for x in pixels]) * 2 - 1).cpu()


def run_fid(args):
    """How far two folders of pictures are apart: Frechet distance and unbiased MMD of features of the model's own CLIP
    tower, averaged over each picture. NOT the Inception FID of papers: compare only numbers of one tower.

    With --inception it is that FID (and the MMD is KID's, of all pictures at once), resized as pytorch-fid does it.
    Beside it the noise floor: the same between random halves of A, which differ by chance alone.
    """
    folders = [read_pictures(folder) for folder in (args.a, args.b)]      # an empty one is found before the work
    if args.inception:
        features = "FID's Inception of 2015-12-05, resized as in pytorch-fid: bilinear, no antialias"
        measure = partial(inception_features, load_inception(args.inception).to(pick_device(args.device)))
    else:
        features = "this model's CLIP tower (not Inception)"
        pipe = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva)
        measure = lambda pictures: clip_features(pipe, pictures).mean(1)
    a, b = (np.concatenate([measure([p for _, p in batch]).numpy() for batch in folder]) for folder in folders)
    if (fewest := min(len(a), len(b))) < 4:
        raise ValueError(f"one folder holds {fewest} pictures: the distance of two sets needs four or more")
    if fewest < 5000:
        print(f"eval.py: {fewest} pictures are fewer than 5,000: the Frechet distance comes out far too large, and is "
              "comparable only at the same number; the MMD is unbiased, but noisy", file=sys.stderr)
    order = np.random.default_rng(args.seed).permutation(len(a))
    table = {name: {"Frechet": frechet(x, y), "MMD": mmd(x, y), "n": f"{len(x)} and {len(y)}"} for name, x, y in
             (("A and B", a, b), ("noise floor, halves of A", a[order[::2]], a[order[1::2]]))}
    show(f"distances of {args.a} and {args.b} in features of {features}", table)
    save(args, {"features": features, "table": table}, "fid-inception" if args.inception else "fid")


def reconstruct_files(args):
    """`reconstruction --images DIR`: PSNR, SSIM and cosine of CLIP features between pictures (middle squares) and what
    the decoder makes of their 64 features."""
    pipe, found, names = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva), {}, ("dB", "SSIM", "cosine")
    for batch in read_pictures(args.images):
        files, pictures = zip(*batch)
        made = pipe.reconstruct(pictures, range(len(found), len(found) + len(files)))          # (B, 3, H, W)
        truth = np.stack([data.crop_square(p, made.shape[-1]) for p in pictures])
        truth = torch.from_numpy(truth).permute(0, 3, 1, 2) / 255
        before, after = (clip_features(pipe, ps) for ps in (pictures, map(Image.fromarray, to_uint8(made))))
        values = psnr(made, truth), ssim(made, truth), F.cosine_similarity(before, after, dim=-1).mean(1)
        found.update((str(file), row) for file, *row in zip(files, *(v.tolist() for v in values)))
    table = {f"{len(found)} pictures": dict(zip(names, np.mean(list(found.values()), 0).tolist()))}
    show(f"{args.images}: pictures and their reconstructions", table)
    save(args, {"table": table, "pictures": {file: dict(zip(names, row)) for file, row in found.items()}})


# ----------------------------------------------------------------------------------------------------------------------
# What people prefer
# ----------------------------------------------------------------------------------------------------------------------
# The two questions of the paper's study, in our words.
ASKED = {"quality": "Which picture looks better: appeal, layout, clarity, shapes, cleanliness?",
         "alignment": "Which picture shows better what the text says?"}
PAGE = Path(__file__).parent / "assets" / "compare.html"


def a_is_left(seed, number):
    """Is the picture of A on the left in pair `number` of a page? A coin that the votes' reader can toss again."""
    return bool(np.random.default_rng((seed, number)).integers(2))


def data_url(path, most=768):
    """A picture file as a data: URL, scaled down to `most` pixels; small ones as PNG, large ones as JPEG."""
    image, file = data.load_image(path), io.BytesIO()
    image.thumbnail((most, most))
    kind = "PNG" if max(image.size) <= 256 else "JPEG"
    image.save(file, kind, quality=92)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def sign_test(wins, losses):
    """Two-sided p-value of `wins` against `losses` where both are equally likely (exact binomial; ties left out)."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(max(wins, losses), n + 1)) / 2 ** n)


def run_compare(args):
    """A blind comparison by people: A and B, two folders of `generate` for one prompt file, become OUT/compare.html.

    One page without network: pairs in random order, sides by coin, two questions, votes kept in the browser and
    exported as JSON. With --votes, everybody's exported files: how often A won, with a sign test's two-sided p-value.
    """
    if args.votes:
        return count_votes(args)
    if len(args.folders) != 2 or not args.prompts:
        raise ValueError("compare takes two folders of pictures and --prompts, or --votes")
    pairs = []
    for number, job in enumerate(read_prompts(args.bench, args.prompts)):
        urls = [data_url(Path(folder) / job["file"]) for folder in args.folders]
        left, right = urls if a_is_left(args.seed, number) else urls[::-1]
        pairs.append({"id": number, "prompt": job["prompt"], "left": left, "right": right})
    pairs = [pairs[i] for i in np.random.default_rng(args.seed).permutation(len(pairs))]
    a, b = args.folders
    study = {"id": fingerprint(pairs), "seed": args.seed, "a": a, "b": b, "asked": ASKED, "pairs": pairs}
    file = Path(args.out) / "compare.html"
    write_whole(file, read_text(PAGE).replace("/*STUDY*/", json.dumps(study).replace("<", "\\u003c")))
    print(file)


def count_votes(args):
    """`compare --votes FILE ...`: wins of A and B, the share that A won (ties left out), interval, p-value."""
    tallies, study = {name: Counter() for name in ASKED}, None
    for file in args.votes:
        try:
            ballot = json.loads(read_text(file))
            study = study or ballot
            for number, vote in ballot["votes"].items():
                sides = ("left", "right") if a_is_left(ballot["seed"], int(number)) else ("right", "left")
                for name, side in vote.items():
                    tallies[name][{sides[0]: "A", sides[1]: "B", "alike": "alike"}[side]] += 1
            other, a, b = ballot["id"] != study["id"], ballot["a"], ballot["b"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is cut short, or no export of a comparison page") from None
        if other:
            raise ValueError(f"{file} is of another page than {args.votes[0]}")
    table = {name: {**share([True] * t["A"] + [False] * t["B"]), "A": t["A"], "B": t["B"], "alike": t["alike"],
                    "p": sign_test(t["A"], t["B"])} for name, t in tallies.items() if t["A"] + t["B"]}
    if not table:
        raise ValueError(f"no votes for either side in {', '.join(args.votes)}")
    show(f"how often A = {a} beat B = {b}, {len(args.votes)} people", table)
    save(args, {"table": table})


# ----------------------------------------------------------------------------------------------------------------------
# Was the test trained on?
# ----------------------------------------------------------------------------------------------------------------------
def shingles(text):
    """(normalised text, its set of word pairs, the ends included): case and punctuation don't count."""
    words = re.findall(r"\w+", text.lower())
    return " ".join(words), set(zip(["^", *words], [*words, "$"]))


def find_leaks(prompts, texts, least):
    """For each prompt (Jaccard similarity of its word pairs with the nearest training caption, that caption, are all
    words the same?); (0, None, False) below `least`. Prompts are indexed by word pairs, captions stream by."""
    known, where, best = [shingles(p) for p in prompts], defaultdict(list), [(0.0, None, False)] * len(prompts)
    for i, (_, pairs) in enumerate(known):
        for pair in pairs:
            where[pair].append(i)
    for text in texts:
        words, pairs = shingles(text)
        for i, common in Counter(i for pair in pairs for i in where.get(pair, ())).items():
            found = common / (len(pairs) + len(known[i][1]) - common), text.strip(), words == known[i][0]
            if found[0] >= least and found[::2] > best[i][::2]:
                best[i] = found
    return best


def run_leakage(args):
    """Which evaluation prompts stand in the training captions, word for word or nearly (word pairs, Jaccard)?

    Without --prompts: those of `alignment`. Without --train: captions of the world's first --n training pictures.
    """
    jobs = read_prompts(args.bench, args.prompts) if args.prompts else data.skill_prompts()
    if not 0 < args.near <= 1:
        raise ValueError(f"--near lies between 0 and 1, not {args.near}")
    prompts, source = list(dict.fromkeys(job["prompt"] for job in jobs)), data.open_source(args.train)
    samples = data.Samples(source)

    def captions():
        for i in tqdm(range(len(source) if args.train else args.n), disable=None):
            with suppress(data.BadSample):                           # training passes over these, too
                yield from source.read(i, True)[1].get("captions", ()) if args.train else [samples[i]["caption"]]
    best = find_leaks(prompts, captions(), args.near)
    table = {"word for word": share(same for _, _, same in best),
             f"{args.near:.2f} alike or more": share(s > 0 for s, _, _ in best)}
    show(f"{len(prompts)} different prompts found in the captions of {args.train or 'the synthetic world'}", table)
    save(args, {"table": table, "found": [{"prompt": p, "similarity": s, "exact": same, "caption": text}
                                          for p, (s, text, same) in zip(prompts, best) if text is not None]})


def run_neighbours(args):
    """What is memorised? To each picture in --a the nearest of --train's pictures, by the root mean square difference of all
    64 CLIP features. A copy is far nearer than training pictures are to each other; that distance stands beside it.

    OUT/neighbours.png: the pictures, each with the nearest one below it.
    """
    pipe, source = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva), data.open_source(args.train)
    numbers, known, side = [], [], pipe.eva.config.image_size
    features = lambda pictures: clip_features(pipe, pictures).flatten(1)                       # (B, 64 C)
    files, drawn = zip(*itertools.chain(*read_pictures(args.a)))
    pictures = [data.crop_square(picture, side) for picture in drawn]
    mine = torch.cat([features(pictures[i:i + BATCH]) for i in range(0, len(pictures), BATCH)])
    for i in tqdm(range(0, min(args.n, len(source)), BATCH), disable=None):
        some = []
        for j in range(i, min(i + BATCH, args.n, len(source))):
            with suppress(data.BadSample):                           # training passes over these, too
                some.append(source[j]["image"])
                numbers.append(j)
        known += [features(some)] if some else []
    if len(numbers) < 2:
        raise ValueError(f"{args.train} holds {len(numbers)} pictures that can be read: two are the least")
    known, root = torch.cat(known), mine.shape[1] ** 0.5
    distances, nearest = (torch.cdist(mine, known) / root).min(1)                              # (pictures,)
    usual = (torch.cdist(known[:1000], known) / root).fill_diagonal_(math.inf).min(1).values
    found = [source[numbers[k]] for k in nearest.tolist()]
    table = {"to training pictures": {"distance": distances.median().item(), "n": len(pictures)},
             "among training pictures": {"distance": usual.median().item(), "n": len(known)}}
    show(f"median distance to the nearest, {args.a} and {args.train}", table)
    shown = range(0, len(pictures), -(-len(pictures) // (SHEET // 12)))
    rows = [[np.asarray(pictures[i]) for i in shown], [np.asarray(data.crop_square(found[i]["image"], side)) for i in shown]]
    sheet = np.concatenate([np.concatenate(row, 1) for row in rows]).repeat(2, 0).repeat(2, 1)
    write_whole(Path(args.out) / "neighbours.png", sheet)
    save(args, {"table": table, "pictures": [
        {"file": str(file), "distance": d, "nearest": item.get("captions", [None])[0]}
        for file, d, item in zip(files, distances.tolist(), found)]})


# ----------------------------------------------------------------------------------------------------------------------
# Binding: whose colour is it?
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def run_binding(args):
    """Does the model know which colour belongs to which thing? Its velocity's error under captions that are true, that
    have their two colours exchanged, that are another picture's, and under none.

    Captions of two things of unlike shapes and colours, from unseen scenes. A DiT that hears a bag of words is as
    content with exchanged colours as with true ones, whatever its loss. Printed before the table is the same question
    to the condition: how far the exchange moves the queries' states, as a share of what another prompt does.
    """
    pipe = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva)
    if pipe.model.latent_queries is None:
        raise ValueError(f"the model in {args.ckpt} has no latent queries: there is no condition to measure")
    if pipe.model.config.latents:
        raise ValueError(f"the model in {args.ckpt} draws VAE latents; binding is measured on CLIP features")
    rng, scenes, i = np.random.default_rng(args.seed), [], 0
    captions = {"true": [], "exchanged": []}
    while len(scenes) < args.n:
        scene, i = data.make_scene(args.seed, i), i + 1
        text = data.caption(scene, rng)
        exchanged = data.exchange_colours(text)
        if exchanged and len(scene.things) == 2 and scene.things[0].shape != scene.things[1].shape:
            scenes.append(scene)
            captions["true"].append(text)
            captions["exchanged"].append(exchanged)
    batches, room = [slice(a, a + BATCH) for a in range(0, args.n, BATCH)], 1 + pipe.model.config.n_query
    conds = {name: torch.cat([pipe.model.condition(*pipe.padded(pipe.rows(texts[part])[0], room)) for part in batches])
             for name, texts in captions.items()}                    # each (n, queries, D)
    conds |= {"another's": conds["true"].roll(1, 0), "none": torch.zeros_like(conds["true"])}
    moved = [(conds["true"] - conds[name]).square().mean().item() for name in ("exchanged", "another's")]
    print(f"the exchange moves the condition by {moved[0] / moved[1]:.1%} of what another prompt does\n")
    if pipe.model.dit is None:                                       # as stage 0 leaves a model
        return save(args, {"moved": moved[0] / moved[1]})
    size = pipe.eva.config.image_size
    x1 = torch.cat([pipe.eva.encode(data.to_pixels(np.stack([data.draw(s, size) for s in scenes[part]]))
                                    .to(pipe.device, pipe.dtype)) for part in batches])
    x1 = x1.float().transpose(1, 2).unflatten(2, (pipe.model.config.grid,) * 2)                # (n, C, 8, 8)
    print("| t | " + " | ".join(conds) + " | exchanged - true |\n|" + "---|" * (len(conds) + 2))
    noise, table = torch.randn(x1.shape, generator=torch.Generator().manual_seed(args.seed)).to(x1), {}
    for t in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3):
        times = torch.full((args.n,), t, device=x1.device)
        xt = (1 - t) * noise + t * x1
        errors = {name: torch.cat([(pipe.model.dit(xt[part], times[part], cond[part]) - (x1 - noise)[part])
                                   .square().flatten(1).mean(1) for part in batches]) for name, cond in conds.items()}
        gain = errors["exchanged"] - errors["true"]
        table[t] = {name: e.mean().item() for name, e in errors.items()}
        table[t] |= {"gain": gain.mean().item(), "standard error": (gain.std() / args.n ** 0.5).item()}
        print(f"| {t} | " + " | ".join(f"{table[t][name]:.4f}" for name in conds)
              + f" | {table[t]['gain']:+.4f} ± {table[t]['standard error']:.4f} |", flush=True)
    save(args, {"moved": moved[0] / moved[1], "table": table})


# ----------------------------------------------------------------------------------------------------------------------
# Studies: the paper's figures in miniature
# ----------------------------------------------------------------------------------------------------------------------
# A study trains each of `runs` ({name: flags of train.py, beside `flags` of all}) with several seeds on equally many
# pictures, from the same language model and a fresh DiT, and measures it several times on the way. `vary` trains
# nothing: --ckpt draws with each of the `values` of one setting.
SMALL = "--dit dim=128,n_layers=4,n_heads=4,n_kv_heads=2,ffn_dim=352"
STUDIES = {
    # 64 fresh queries for all: CLIP + MSE maps query i to feature i.
    "figure4": dict(runs={"CLIP + MSE": "--design clip-mse", "CLIP + flow matching": "--design clip-fm",
                          "VAE + flow matching": "--design vae-fm"}, flags=f"--queries 64 {SMALL}", seeds=3,
                    panels=("alignment", "colours", "Frechet", "feature spread")),
    "figure5": dict(runs={"sequential": "--joint 0", "joint": "--joint 0.5"}, flags=SMALL, seeds=2, things=2,
                    panels=("alignment", "Frechet", "questions", "captions")),
    "queries": dict(runs={"16 queries": "--queries 16", "64 queries": "--queries 64"}, flags=SMALL,
                    panels=("alignment", "colours", "Frechet")),
    "rope": dict(runs={"2D RoPE": f"{SMALL},rope=2d", "3D RoPE": f"{SMALL},rope=3d"}, panels=("alignment", "colours", "Frechet")),
    "shift": dict(runs={f"shift {shift}": f"--shift {shift}" for shift in (1, 2, 5, 10)}, flags=SMALL,
                  panels=("alignment", "colours", "gap, t = 0.02", "gap, t = 0.05")),
    "ema": dict(runs={"averaged weights": "--ema 0.999", "last weights": "--ema 0"}, flags=SMALL,
                panels=("alignment", "colours", "Frechet")),
    "size": dict(runs={f"width {dim}, {layers} layers": f"--dit dim={dim},n_layers={layers},n_heads={dim // 32},"
                       f"n_kv_heads={kv},ffn_dim={ffn}"
                       for dim, layers, kv, ffn in ((64, 4, 1, 176), (128, 4, 2, 352), (192, 6, 2, 512))},
                 panels=("alignment", "colours", "Frechet")),
    "steps": dict(vary="steps", values=(4, 8, 15, 30, 60), below="Euler steps", n_prompts=100, seeds=3, things=4,
                  panels=("alignment", "colours", "Frechet")),
    "guidance": dict(vary="guidance", values=(1, 1.5, 2, 3, 5), below="guidance", n_prompts=100, seeds=3, things=4,
                     panels=("alignment", "Frechet", "feature spread")),
}
PANELS = {"alignment": "Alignment: % of pictures that show what was asked",
          "colours": "Colours: % with as many things, and the colours asked",
          "Frechet": "Frechet distance to true pictures (own CLIP)",
          "feature spread": "CLIP features: difference of pictures of a prompt",
          "questions": "Understanding: % of questions answered right",
          "captions": "Understanding: % of captions right in all objects",
          "gap, t = 0.02": "Loss of shuffled less true prompts at t = 0.02",
          "gap, t = 0.05": "Loss of shuffled less true prompts at t = 0.05"}
USUAL = {"steps": 400, "points": 5, "batch": 64, "seeds": 1, "n_prompts": 48, "images": 2, "n": 120, "things": 1}
# The same with --quick, to see that everything runs; its figures mean nothing.
QUICK = {"steps": 4, "points": 2, "batch": 8, "seeds": 1, "n_prompts": 6, "images": 2, "n": 12}


def spread(x, k):
    """x (n * k, ...), k of a prompt -> root mean square difference of two of a prompt: mean over pairs and prompts."""
    x = torch.as_tensor(x).flatten(1).unflatten(0, (-1, k))                                    # (n, k, D)
    first, second = zip(*itertools.combinations(range(k), 2))
    return float((x[:, first] - x[:, second]).square().mean(2).sqrt().mean())


def measure_pictures(pipe, args, seed, draw):
    """Alignment, Frechet distance and spread of the uint8 pictures (H, W, 3) that draw(entries) makes of --n-prompts
    prompts, --images of each."""
    entries = [e for e in data.skill_prompts(args.n_prompts, seed, most=args.things) for _ in range(args.images)]
    pictures, rng = draw(entries), np.random.default_rng((seed, 1))
    true = [data.draw(scene_for(e, rng), len(pictures[0])) for e in entries]
    made, real = (torch.cat([clip_features(pipe, map(Image.fromarray, some[i:i + BATCH]))
                             for i in range(0, len(some), BATCH)]) for some in (pictures, true))         # (N, 64, C)
    scores = score_renders(entries, pictures)["overall"]
    return {"alignment": scores["score"], "colours": scores["colours"],
            "Frechet": frechet(made.mean(1), real.mean(1)), "feature spread": spread(made, args.images),
            "pixel spread": spread(np.stack(pictures) / np.float32(255), args.images)}


def measure(folder, args, seed, understands=False, **sampling):
    """The numbers of a model folder, with the image parts of --eva; `understands`: also the understanding scores."""
    pipe = Pipeline(folder, eva=args.eva)
    pipe.sampling = Pipeline(args.eva).sampling                      # all runs draw alike
    if args.quick:
        pipe.sampling = pipe.sampling | {"steps": 2, "decoder_steps": 2}
    found = measure_pictures(pipe, args, seed, lambda entries: draw_entries(pipe, entries, seed, **sampling)[0])
    if understands:                                                  # a frozen language model sees as that of --init
        scenes, _, questions, truths = zip(*draw_questions(1, args.n, args.things))
        eyes = pipe if pipe.model.visual is not None else Pipeline(args.init)
        right = answers_right(answer_all(eyes, scenes, questions), truths)
        captions = answer_all(eyes, scenes, [data.DESCRIBE] * args.n)
        found |= {"questions": sum(right) / args.n,
                  "captions": sum(caption_truth(text, scene)[0] for text, scene in zip(captions, scenes)) / args.n}
    return found


def read_log(run):
    """log.jsonl of a run of train.py -> {step: its numbers}, {} before its first; what a crash undid counts once."""
    log, rows = run / "log.jsonl", {}
    for row in read_records(log) if log.exists() and log.stat().st_size else ():
        rows.setdefault(row["step"], {}).update(row)
    return dict(sorted(rows.items()))


def read_run(run, step):
    """What a run's log says of its first `step` steps: pictures, seconds of training, and how far the DiT listens."""
    rows, samples, seconds = read_log(run), 0, 0.0
    for row in (row for at, row in rows.items() if at <= step and "per_s" in row):
        seconds += (row["samples"] - samples) / row["per_s"]
        samples = row["samples"]
    gaps = {f"gap, t = {t}": rows[step][f"_shuffled@{t}"] - rows[step][f"_true@{t}"] for t in (0.02, 0.05)
            if f"_true@{t}" in rows[step]}
    return {"step": step, "samples": samples, "seconds": seconds, **gaps}


class Trainer:
    """The runs of a study: --jobs at a time, each by train.py on one thread, then measured. What is done is kept."""

    def __init__(self, args, study, folder):
        self.args, self.study, self.folder, self.stopped, self.children = args, study, folder, False, set()
        every = max(1, args.steps // args.points)
        self.every, self.points = every, sorted({*range(every, args.steps + 1, every), args.steps})
        self.jobs = {(name, seed): folder / re.sub(r"[^\w.]+", "-", f"{name} {seed}").lower()
                     for seed in range(args.seeds) for name in study["runs"]}

    def train(self, name, seed, run):
        """Train a run to its end from wherever it stands; ValueError if it fails or was another run."""
        a, models = self.args, [run / f"model-{step:06d}" for step in self.points]
        flags = " ".join((self.study.get("flags", ""), self.study["runs"][name]))
        if a.quick:
            flags = re.sub("--dit ([^ ]+)", r"--dit \1,n_layers=1", f"--dit rope=3d {flags}")
        command = ["--stage", "1", "--fresh", "--init", a.init, "--eva", a.eva, *flags.split(), "--seed", seed,
                   "--steps", a.steps, "--batch", a.batch, "--things", a.things, *["--bf16"] * a.bf16, "--save-every", self.every,
                   "--log-every", math.gcd(20, self.every), "--out", run, "--save", run / "model-{step}"]
        command, note = [str(word) for word in command], run / "command.json"
        if note.exists() and json.loads(read_text(note)) != command:
            raise ValueError(f"{run} holds a run of other settings than these: choose another --runs, or delete it")
        if all((model / "config.json").exists() for model in models):
            return
        write_whole(note, json.dumps(command) + "\n")
        with open(run / "train.txt", "a+") as told:
            child = subprocess.Popen([sys.executable, Path(__file__).with_name("train.py"), *command, "--quiet"],
                                     stdout=told, stderr=told, env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.children.add(child)
            child.wait()
            self.children.discard(child)
            if child.returncode and not self.stopped:
                told.seek(0)
                raise ValueError(f"training {run} failed: {(told.read().strip() or 'it was killed').splitlines()[-1]}")
        if absent := [str(model) for model in models if not (model / "config.json").exists() and not self.stopped]:
            raise ValueError(f"{run} was killed before {absent[0]} was written: delete {run}, to train it anew")

    def __call__(self, name, seed):
        """[numbers at each point] of one run."""
        run, found, a = self.jobs[name, seed], [], self.args
        self.train(name, seed, run)
        for step in self.points:
            if self.stopped:
                break
            asked = {"n_prompts": a.n_prompts, "images": a.images, "seed": a.seed, "n": a.n}
            note = run / f"model-{step:06d}" / "measured.json"
            if not note.exists() or json.loads(read_text(note))["asked"] != asked:
                numbers = measure(note.parent, a, a.seed, "questions" in self.study["panels"], expand=False)
                write_whole(note, json.dumps({"asked": asked, "found": numbers}) + "\n")
            found.append({**read_run(run, step), **json.loads(read_text(note))["found"]})
            self.measured.update()
        return found

    def all(self):
        """{name: [[numbers at each point] of each seed]}, under two bars: steps trained, and times measured."""
        with ThreadPoolExecutor(self.args.jobs) as pool, \
                tqdm(total=self.args.steps * len(self.jobs), desc="training", unit="step") as bar, \
                tqdm(total=len(self.points) * len(self.jobs), desc="measuring") as self.measured:
            waiting = {pool.submit(self, *job): job for job in self.jobs}
            found = dict(waiting)
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)               # else trainings would outlive us
            try:
                while waiting:
                    for future in wait(waiting, timeout=2, return_when=FIRST_COMPLETED).done:
                        found[future] = future.result()
                        del waiting[future]
                    with suppress(ValueError):                       # a line that is just being written
                        bar.update(sum(max(read_log(run), default=0) for run in self.jobs.values()) - bar.n)
            finally:                                                 # after Ctrl-C trainings write their state
                signal.signal(signal.SIGTERM, before)
                self.stopped = bool(waiting)
                pool.shutdown(wait=False, cancel_futures=True)
                for child in set(self.children):
                    child.send_signal(signal.SIGINT)
        rows = list(found.values())
        return {name: [row for (other, _), row in zip(self.jobs, rows) if other == name] for name in self.study["runs"]}


def run_study(args):
    """The paper's figures and what people ask about them, in miniature. Each trains its runs on equally many pictures,
    and goes on where it stopped; numbers are in OUT/STUDY/results.json, the figure and the logs of training beside it.

    figure4: CLIP features by regression, CLIP features by flow matching, or VAE latents by flow matching? And how much
    do the pictures of a prompt differ? figure5: is the language model better frozen or trained along? ablation --what:
    number of queries, RoPE, shift of time, EMA, size of the DiT; without training, Euler steps and guidance of --ckpt.
    """
    study = STUDIES[getattr(args, "what", args.command)]
    folder = (f"ablation-{args.what}" if args.command == "ablation" else args.command) + "-quick" * args.quick
    for key, usual in USUAL.items():
        if getattr(args, key) is None:
            setattr(args, key, QUICK[key] if args.quick and key in QUICK else study.get(key, usual))
    if not ("questions" in study.get("panels", ())) < args.things <= 4:
        raise ValueError(f"--things must lie between 1 and 4 (figure5, which asks where things lie: 2), not {args.things}")
    if args.images < 2:
        raise ValueError("--images must be at least 2: pictures of one prompt are compared")
    out = Path(args.out) / folder
    if "runs" in study:
        torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
        trainer = Trainer(args, study, Path(args.runs) / folder)
        runs, x, below = trainer.all(), "step", f"training steps of {args.batch} pictures"
        for run in trainer.jobs.values():
            write_whole(out / f"{run.name}.jsonl", (run / "log.jsonl").read_text())
    else:                                                            # each seed has its own prompts
        args.eva, x, below = args.ckpt, study["vary"], study["below"]
        runs = {Path(args.ckpt).name: [[{x: value, **measure(args.ckpt, args, args.seed + seed, **{x: value})}
                                        for value in tqdm(study["values"], desc=below)] for seed in range(args.seeds)]}
    rng = np.random.default_rng((args.seed, 2))
    true = measure_pictures(Pipeline(args.eva), args, args.seed,
                            lambda entries: [data.draw(scene_for(e, rng)) for e in entries])
    keep = (*study["panels"], "feature spread", "seconds")
    last = {name: {key: float(np.mean([rows[-1][key] for rows in seeds])) for key in keep if key in seeds[0][-1]}
            for name, seeds in {**runs, "true pictures": [[true]]}.items()}
    show(f"{folder}, the last point: means over seeds ({args.seeds})", last)

    def band(seeds, key):
        for rows in zip(*seeds):                                     # one point of all seeds
            values = [row[key] * (100 if "%" in PANELS[key] else 1) for row in rows]
            yield rows[0][x], min(values), float(np.mean(values)), max(values)
    charts = [(PANELS[key], below, {name: list(band(seeds, key)) for name, seeds in runs.items() if key in seeds[0][0]})
              for key in study["panels"]]
    for key, (_, _, curves) in zip(study["panels"], charts):         # of pictures, the best that can be had
        if key in true and "%" not in PANELS[key]:
            curves["true pictures"] = [(row[x], *(true[key],) * 3) for row in next(iter(runs.values()))[0]]
    out.mkdir(parents=True, exist_ok=True)
    data.draw_charts(charts).save(out / "figure.png")
    save(args, {"runs": runs, "true pictures": true}, f"{folder}/results")


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
    return {"ours": np.median(times[:, 0]), "theirs": np.median(times[:, 1]),
            "ratio": np.median(times[:, 1] / times[:, 0])}


def race_data(args, webdataset, n=128, shape=(480, 640), size=448):
    """One reading worker beside the `webdataset` library: n JPEGs of a shard, decoded and cropped to `size`.

    Ours in the shuffled order of training, theirs as the shard has them; both must end in the same pixels. Returns
    seconds as `race` does, images/s of both, and the largest difference of a pixel.
    """
    rng, shard = np.random.default_rng(0), Path(args.out) / "speed.tar"
    with tarfile.open(shard, "w") as tar:
        for i in range(n):                                           # blotches and grain: a photo has as many bytes
            coarse, file = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)), io.BytesIO()
            coarse = np.asarray(coarse.resize(shape[::-1], Image.BICUBIC))
            grain = np.clip(coarse + rng.normal(0, 6, (*shape, 1)), 0, 255).astype(np.uint8)
            Image.fromarray(grain).save(file, "JPEG", quality=90)
            for suffix, content in ("jpg", file.getvalue()), ("txt", f"{i}".encode()):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    samples = data.Samples(data.open_source(str(shard)), size)
    reference = webdataset.WebDataset(str(shard), shardshuffle=False).decode("pilrgb").to_tuple("txt", "jpg")

    def ours():
        return {s["caption"]: s["image"] for s in map(samples.__getitem__, range(n))}

    def theirs():
        return {text: np.asarray(data.crop_square(image, size)) for text, image in reference}
    mine, other = ours(), theirs()
    apart = max(int(np.abs(mine[text].astype(int) - other[text]).max()) for text in mine.keys() | other.keys())
    found = race(ours, theirs, args.rounds)
    shard.unlink()
    return {**found, "images_per_s": [n / found["ours"], n / found["theirs"]], "apart": apart}


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "aten::_slow_conv2d_forward")


def products_share(run):
    """The share of a run's time spent inside matrix products and convolutions, which are not ours to tune: whatever is
    done about the rest, the ratio can't rise above ratio / share."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(spent.get(key, 0) for key in PRODUCTS) / sum(spent.values())


def qwen_of(llm):
    """A Transformer's language model as transformers' Qwen2.5-VL with the same weights (its vision tower is tiny)."""
    import transformers
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps")
    rope = dict(rope_type="default", rope_theta=llm.config.rope_theta, mrope_section=llm.config.mrope_section)
    qwen = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=dict({n: getattr(llm.config, n) for n in names}, tie_word_embeddings=False, bos_token_id=None,
                         eos_token_id=None, pad_token_id=0, rope_parameters=rope),
        vision_config=dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32,
                           out_hidden_size=llm.config.hidden_size),
        tie_word_embeddings=False, eos_token_id=None, pad_token_id=0)).eval()
    state = {k: v for k, v in llm.state_dict().items() if not k.startswith("lm_head")}
    qwen.model.language_model.load_state_dict(state)
    qwen.lm_head.load_state_dict(llm.lm_head.state_dict())
    return qwen


def most_memory(run):
    """Most bytes that tensors made during run() took at one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([0] + [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def race_training(args):
    """A step of stage 1 beside the official loop: equal weights, noise and times, equal gradients, runs in turn, fp32.

    The official loop is rebuilt of transformers' language model and diffusers' DiT as the released code drives them:
    the encoder runs at every step, the prompt and the queries go through the language model as one sequence with
    gradients and activation checkpointing, and logits are computed that nobody uses. The encoder is the same on both
    sides. Returns {what is raced: {"apart" (gradients), "MiB", "their MiB", and what `race` says}}.
    """
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
    torch.manual_seed(0)
    # 113 to 228 M parameters a part; the encoder is the largest, as in the released models (4.4 B; the DiT has 1.4 B).
    B, L, n = 4, 160, 64
    text = TextConfig(2000, 768, 2816, 14, 12, 2, mrope_section=[8, 12, 12])
    config = DiTConfig(in_channels=768, dim=896, n_layers=7, n_heads=14, n_kv_heads=14, ffn_dim=2560, cond_dim=768,
                       rope="2d")
    eva = EvaClip(EvaConfig(image_size=448, patch_size=14, width=768, layers=24, heads=12, mlp_hidden=4608))
    eva.eval().requires_grad_(False)
    model = BLIP3o(BLIP3oConfig(text, dit=config))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    model.llm.requires_grad_(False)
    qwen, dit = qwen_of(model.llm), lumina(config)
    dit.load_state_dict(model.dit.state_dict())
    qwen.requires_grad_(False).train()
    dit.train()
    qwen.gradient_checkpointing_enable({"use_reentrant": False})
    dit.gradient_checkpointing = True
    queries = torch.nn.Parameter(model.latent_queries.detach().clone())
    ids, pixels = torch.randint(10, 1900, (B, L)), torch.randn(B, 3, 448, 448)
    x0, t = torch.randn(B, 768, 8, 8), torch.rand(B)
    rope, mask = get_2d_rotary_pos_embed_lumina(config.head_dim, 384, 384), torch.ones(B, n)
    cached = eva.encode(pixels)

    def their_condition():
        embeds = qwen.get_input_embeddings()(torch.cat([ids, torch.full((B, 1), text.vocab_size - 3)], 1))
        embeds = torch.cat([embeds, queries.expand(B, -1, -1)], 1)
        return qwen.model.language_model(inputs_embeds=embeds).last_hidden_state                # (B, L + 1 + n, 768)

    def theirs():
        features = eva.encode(pixels)
        hidden = their_condition()
        qwen.lm_head(hidden)
        x1, s = features.transpose(1, 2).unflatten(2, (8, 8)), (1 - t).view(-1, 1, 1, 1)
        c, times = dit.caption_projection(hidden[:, -n:]), torch.floor(1000 * (1 - t) + 1e-3)
        v = dit((1 - s) * x1 + s * x0, times, c, mask, rope, cross_attention_kwargs={}).sample
        (v - (x0 - x1)).square().mean().backward()

    def ours(features=None, checkpointing=False):
        model.dit.checkpointing = model.llm.checkpointing = checkpointing
        features = eva.encode(pixels) if features is None else features
        model(ids, features=features, drop=0.0, x0=x0, t=t)["flow"].mean().backward()

    push = torch.randn(B, n, 768)
    pairs = {"a step, features cached": (lambda: ours(cached), theirs), "a step, encoder live": (ours, theirs),
             "cached, with --checkpointing": (lambda: ours(cached, True), theirs),
             "the language model's part": (lambda: (model.condition(ids) * push).sum().backward(),
                                           lambda: (their_condition()[:, -n:] * push).sum().backward())}
    table = {}
    for name, (mine, other) in pairs.items():
        for module in (model, dit):
            module.zero_grad(set_to_none=True)
        queries.grad = None
        mine()
        other()
        found, others = [(model.latent_queries.grad, queries.grad)], dict(dit.named_parameters())
        found += [(p.grad, others[k].grad) for k, p in model.dit.named_parameters() if p.grad is not None]
        apart = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in found)
        grown = [most_memory(run) / 2 ** 20 for run in (mine, other)]
        table[name] = {"apart": apart, "MiB": grown[0], "their MiB": grown[1], **race(mine, other, args.rounds)}
        row = table[name]
        print(f"  {name:28} ours {row['ours']:6.2f} s, {grown[0]:5.0f} MiB   official {row['theirs']:6.2f} s, "
              f"{grown[1]:5.0f} MiB   {row['ratio']:5.2f}x   gradients apart by {apart:.0e}", flush=True)
    return table


@torch.no_grad()
def run_speed(args):
    """Sampling and training beside transformers and diffusers: equal random weights, equal results, runs in turn, on
    the CPU in fp32.

    The parts have 84 to 344 M parameters. Outputs are compared first: a race between different results means nothing.
    """
    try:
        import diffusers
        import transformers
        import webdataset
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
    config = DiTConfig(in_channels=1024, dim=896, n_layers=8, n_heads=14, n_kv_heads=14, ffn_dim=2560, cond_dim=768,
                       rope="2d")
    model, steps = BLIP3o(BLIP3oConfig(text, dit=config)).eval(), 10
    for p in model.parameters():                                     # gates are born as zeros, which compare nothing
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
    compare(f"DiT, {steps} guided steps", model.dit, lambda: model.generate_features(cond, steps, 3.0, noise),
            official_loop)

    # Text: greedy tokens after a prompt, with each side's own KV cache.
    qwen = qwen_of(model.llm)
    ids = torch.randint(10, 1900, (1, 64))
    compare("text, 64 + 64 tokens", model.llm,
            lambda: model.generate_text(ids, max_new_tokens=64, stop_ids=[])[0].float(),
            lambda: qwen.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64,
                                  min_new_tokens=64, do_sample=False)[0, 64:].float())

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
    with torch.enable_grad():
        table |= race_training(args)
    table["data"] = race_data(args, webdataset)
    row = table["data"]
    ours, theirs = row["images_per_s"]
    print(f"  data, 640 px JPEG to 448     ours {ours:4.0f} images/s   webdataset {theirs:4.0f} images/s   "
          f"{row['ratio']:5.2f}x   apart by {row['apart']}", flush=True)
    save(args, {"table": table, "torch": torch.__version__, "transformers": transformers.__version__,
                "diffusers": diffusers.__version__, "threads": torch.get_num_threads()})


WEIGHTS = Path(__file__).parent / "weights"
STUDY = {name.replace("_", "-"): None for name in USUAL}             # None: the study's own
COMMANDS = {"judge": run_judge, "alignment": run_alignment, "understanding": run_understanding,
            "reconstruction": run_reconstruction, "binding": run_binding, "editing": run_editing,
            "generate": run_generate, "score": run_score,
            "fid": run_fid, "compare": run_compare, "leakage": run_leakage, "neighbours": run_neighbours,
            "figure4": run_study, "figure5": run_study, "ablation": run_study, "speed": run_speed}


def parse(argv):
    """The command line; ValueError for what can't be meant."""
    parser = Parser("eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, add = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS)), {}
    for name, seed, counts in (("judge", 1, {"n": 1000, "size": 64}), ("alignment", 0, {"n-prompts": 553, "images": 4}),
                               ("understanding", 1, {"n": 600}), ("reconstruction", 1, {"n": 200}),
                               ("binding", 1, {"n": 256}), ("editing", 1, {"n": 200}),
                               ("speed", 0, {"rounds": 5}), ("generate", 0, {}),
                               ("score", 0, {}), ("fid", 0, {}), ("compare", 0, {}), ("leakage", 0, {"n": 20000}), ("neighbours", 0, {"n": 20000}),
                               ("figure4", 0, STUDY), ("figure5", 0, STUDY), ("ablation", 0, STUDY)):
        command = commands.add_parser(name, description=COMMANDS[name].__doc__)
        add[name] = command.add_argument
        for option, value in counts.items():
            command.add_argument(f"--{option}", type=int, default=value)
        command.add_argument("--seed", type=int, default=seed, help="of the prompts and pictures")
        command.add_argument("--out", default="runs/eval", help="folder of the results")
        if name in ("alignment", "understanding", "reconstruction", "binding", "editing", "generate", "fid", "neighbours"):
            command.add_argument("--ckpt", default=str(WEIGHTS / "nano"), help="model folder")
            command.add_argument("--eva", help="folder with EVA-CLIP and the diffusion-decoder, if --ckpt has none")
            command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
            command.add_argument("--dtype", default="auto", help="auto, fp32, bf16, fp16")
        if name in ("generate", "compare", "leakage"):
            command.add_argument("--bench", choices=BENCHES, default="geneval", help="whose prompt file it is")
            command.add_argument("--prompts", required=name == "generate", help="prompt file or folder as published")
    for name in ("figure4", "figure5", "ablation"):
        add[name]("--init", default=str(WEIGHTS / "nano"), help="model folder with the language model of all runs")
        add[name]("--eva", default=str(WEIGHTS / "nano"), help="model folder with EVA-CLIP and the diffusion-decoder")
        add[name]("--jobs", type=int, default=2, help="trainings at a time, one thread each")
        add[name]("--runs", default="runs", help="folder in which the trainings of a study have a folder")
        add[name]("--quick", action="store_true", help="see in a minute that it runs; the numbers mean nothing")
        commands.choices[name].set_defaults(out="runs")
        add[name]("--bf16", action="store_true", help="train in bf16, as train.py's flag")
    add["ablation"]("--what", required=True, choices=[name for name in STUDIES if not name.startswith("figure")])
    add["ablation"]("--ckpt", default=str(WEIGHTS / "nano"), help="model folder that draws for steps and guidance")
    add["alignment"]("--novel", action="store_true", help="pairs of colour and shape never trained on")
    add["alignment"]("--words", action="store_true", help="prompts for words, half of them never trained on")
    add["alignment"]("--things", type=int, default=4, choices=range(1, 5), help="prompts of at most so many things alone")
    add["alignment"]("--expand", action=argparse.BooleanOptionalAction, help="let the language model tell each prompt in full "
                     "before it is drawn (as the checkpoint does)")
    add["alignment"]("--best-of", type=int, default=1, help="of so many pictures score the one that the model likes best")
    add["alignment"]("--prompts", help="other prompts, as in assets/free_prompts.jsonl: pictures must fit exactly")
    add["understanding"]("--data", help="questions: .tsv as VLMEvalKit's, .jsonl, or MM-Vet's .json")
    add["understanding"]("--task", choices=TASKS, help="wording and scoring (choice, or vqav2 without options)")
    add["understanding"]("--images", help="folder of the pictures that a .jsonl names (its own)")
    add["understanding"]("--official", action="store_true", help="JPEG and scale pictures as the official run")
    add["understanding"]("--write", help="write --n questions about the world to this .tsv, and stop")
    add["reconstruction"]("--images", help="a folder of pictures instead of the world's")
    add["score"]("bench", choices=("geneval", "wise"))
    add["score"]("--results", nargs="+", required=True, help="what the official scorer wrote (.jsonl)")
    add["fid"]("--a", required=True, help="a folder of pictures")
    add["fid"]("--b", required=True, help="another")
    add["fid"]("--inception", metavar="FILE", help="FID's Inception weights (.safetensors) instead of the CLIP tower")
    add["compare"]("folders", nargs="*", help="two folders that `generate` filled, A and B")
    add["compare"]("--votes", nargs="+", help="files that the page exported")
    add["leakage"]("--train", help="shards as in train.py --data (the world's first --n captions)")
    add["neighbours"]("--a", required=True, help="a folder of pictures")
    add["neighbours"]("--train", required=True, help="shards as in train.py --data (their first --n pictures)")
    add["leakage"]("--near", type=float, default=0.7, help="least similarity of a near-duplicate")
    args = parser.parse_args(argv)
    for name in ("n", "n_prompts", "images", "size", "rounds", "seeds", "steps", "points", "batch", "jobs", "best_of"):
        least = 16 if name == "size" else 1
        if isinstance(vars(args).get(name), int) and vars(args)[name] < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {vars(args)[name]}")
    most = 1000 // getattr(args, "best_of", 1)                       # each has a million seeds of pictures
    if not 0 <= args.seed < most:
        raise ValueError(f"--seed must lie between 0 and {most - 1}, not {args.seed}")
    if args.command in ("understanding", "reconstruction", "binding", "editing") and args.seed == 0:
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
        missing = isinstance(error, OSError) and error.filename      # without Python's "[Errno 2]"
        message = f"{error.filename}: {error.strerror}" if missing else str(error)
        print(f"eval.py: {' '.join(message.split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
