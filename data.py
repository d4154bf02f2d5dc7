"""Data: captioned images and conversations -> Examples; prompts, tokens and pixels.

    a source (Shards) -> item -> a task (CaptionTask) -> Example -> train.py collates a batch of them

Sample p of a run is a pure function of (seed, p), whatever the processes and workers. In reading order:
Example, tasks and Samples; where samples lie on disk; Shards; the cache of frozen features; tokens and the
chat template; pixels. B batch, L tokens, S the side of a square image, H W pixels, N patches, C channels.
"""
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Tokenizers
from tqdm import tqdm

from checkpoint import (
    COUNT,
    atomic_write,
    file_lock,
    from_json,
    open_file,
    parse_json,
    path_below,
    read_file,
    read_json,
    require_settings,
    section,
    sentence,
    typed,
)

# The prompts of the official system, and two of ours: prompt upsampling (Betker et al. 2023, section 3.5)
# and the question of VQAScore (arXiv 2404.01291).
SYSTEM = "You are a helpful assistant."
GENERATE = "Please generate image based on the following caption: {}"
RECONSTRUCT = "Please reconstruct the given image."
DESCRIBE = "Describe this image."
UPSAMPLE = "Describe an image of the following caption in full: {}"
UPSAMPLE_EDIT = "Describe this image in full after the following change: {}"
MATCH = 'Does this image show "{}"? Answer yes or no.'
# Control tokens with which a model that was taught so asks for an image: IMG from the request alone, EDIT
# from the last image and the request.
IMG, EDIT = "[IMG]", "<image>"

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TEXT_SUFFIXES = (".txt", ".caption", ".text")         # the first of these that an image has counts
TABLE_SUFFIXES = (".csv", ".tsv")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", *TABLE_SUFFIXES)        # of files with a record per sample
METADATA = ("metadata.csv", "metadata.jsonl")         # Hugging Face's, of the images in its folder
# What records call their caption and their image's file: the first name that one has counts.
CAPTION_NAMES = ("caption", "text", "prompt", "title")
IMAGE_NAMES = ("image", "file_name", "filename", "file", "filepath", "file_path", "path", "image_path",
               "img_path", "image_file", "img")
OTHER_IMAGES = tuple(".gif .avif .heic .heif .bmp .jfif .tif .tiff .jxl .jp2 .svg .ppm".split())
OTHER_SUFFIXES = (*OTHER_IMAGES, *".parquet .arrow .csv .tsv .jsonl .ndjson .gz .tgz .zip .zst".split())
# Why files were left out, counted while indexing; a suffix stands for files that may have been meant.
LEFT_OUT = ("no caption", "no image", "second image", "link", "sparse", "hidden", "behind the end",
            *OTHER_SUFFIXES)
NO_CAPTION = LEFT_OUT.index("no caption")
INDEX_FOLDER = Path("runs/index")                     # where the index of the shards is kept
INDEX_VERSION = 4                                     # of its files, and of what is in them
MAX_UNREADABLE = 100                                  # broken samples in a row that end a run
MAX_SHARDS = 10 ** 6                                  # that the braces of one pattern may stand for

# What a sample may cost. An image of MAX_PIXELS takes 0.8 GiB while it is read; the largest cameras have 102
# million.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")           # for EPS PIL would start a program
MAX_PIXELS, STRIP = 100 * 2 ** 20, 2 ** 24            # STRIP: pixels converted at a time
MAX_CAPTION, MAX_CONVERSATION = 2 ** 14, 2 ** 16      # bytes
MAX_RECORD = 2 ** 24                                  # bytes of JSON
MAX_BYTES = {"image too large": 2 ** 29, "caption too long": MAX_CAPTION, "record too large": MAX_RECORD}
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
csv.field_size_limit(16 * MAX_RECORD)                # a cell above MAX_RECORD costs its row, not the table
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY           # 64 MiB: profiles pass 1 MiB


# ---- examples: all that training sees of the data -------------------------------------------------------

@dataclass
class Example:
    """One finished training example. A stage collates it and never asks where it came from."""
    rng: np.random.Generator                     # the sample's own: noise, time, dropping
    image: np.ndarray | None = None              # the target, uint8 (S, S, 3)
    features: dict | None = None                 # cached features of the target, instead
    prompt: str = ""                             # what to generate
    prompt_image: np.ndarray | None = None       # the image inside the prompt, uint8 (S, S, 3)
    turns: list = ()                             # a conversation [(user, assistant)]
    turns_images: list = ()                      # of each turn uint8 (S, S, 3) or None; may end early
    hard_negative: str | None = None             # a prompt that must fit worse; probes only
    skipped: list = ()                           # (cause, name) of broken items passed over


class BadSample(ValueError):
    """An unusable sample. cause: why, in two or three words, to count by."""

    def __init__(self, cause, message):
        super().__init__(printable(message)[:500])
        self.cause = cause


def printable(text):
    """The text in one line: what would break it, or can't be printed, is replaced. Names are data."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", str(text))


@dataclass
class CaptionTask:
    """Turns an item of Shards into an Example: image generation from its caption, or a conversation about
    its image.

    converse: fraction of samples that become conversations (1: all of them, stage 0; --joint in stages 1 and
    2). reconstruct: fraction of the others whose prompt is the image itself. short_caption: probability of
    the short caption where an item has several (None: never).
    """
    converse: float = 0.0
    reconstruct: float = 0.0
    short_caption: float | None = None

    def __call__(self, item, rng):
        """An item {"image" or "features" or neither, "caption", "captions", "turns"} -> Example; raises
        BadSample, also for a conversation that this task doesn't train on."""
        caption, image = self.choose_caption(item, rng), item.get("image")
        has_image = item.keys() & {"image", "features"}
        cause = "no caption" if caption is None else None if has_image else "no image"
        if cause and not self.converse:
            raise BadSample(cause, f"a conversation with {cause}: only stage 0 and --joint train on it")
        if self.converse == 1 or self.converse and (cause or rng.random() < self.converse):
            turns = item.get("turns") or [("<image>" + DESCRIBE, caption)]
            # LLaVA's <image> mark is dropped: the image always precedes the text, also without a mark.
            shows = bool(has_image) or any("<image>" in user for user, _ in turns)
            if shows and image is None:
                raise BadSample("no image", "a conversation shows an <image> that isn't there")
            turns = [(user.replace("<image>", "").strip(), assistant) for user, assistant in turns]
            return Example(rng, turns=turns, turns_images=[image] if shows else [])
        if self.reconstruct and rng.random() < self.reconstruct:
            return Example(rng, image, item.get("features"), RECONSTRUCT, prompt_image=image)
        return Example(rng, image, item.get("features"), caption)

    def choose_caption(self, item, rng):
        """One of the captions of an item: the last one is the short one; None where there is none."""
        short = self.short_caption is not None and rng.random() < self.short_caption
        captions = item.get("captions", [None])
        if short or len(captions) < 3:
            return captions[-1 if short else 0]
        return captions[int(rng.integers(len(captions) - 1))]


class Samples(torch.utils.data.Dataset):
    """Examples by position in the run: sample p is a pure function of (seed, p).

    source: items by index, and `index(position, ahead, seed, held_out)`; task(item, rng) -> Example. A
    broken item is replaced by the next readable one of the source's order. held_out: the samples that are
    never trained on, instead of all others.
    """

    def __init__(self, source, task, seed=0, held_out=False):
        self.source, self.task, self.seed, self.held_out = source, task, seed, held_out

    def __getitem__(self, position):
        """The Example at a position; its `skipped` lists (cause, name) of the broken items that it replaces,
        the position's own first.

        Raises ValueError if MAX_UNREADABLE items in a row are broken; BadSample, which needn't end a run, if
        all held-out ones are.
        """
        skipped = []
        most = min(MAX_UNREADABLE, len(self.source.held_out)) if self.held_out else MAX_UNREADABLE
        while len(skipped) < most:
            i = self.source.index(position, len(skipped), self.seed, self.held_out)
            rng = np.random.default_rng((self.seed, position, 1))
            try:
                example = self.task(self.source[i], rng)
                example.skipped = skipped
                return example
            except BadSample as error:
                skipped.append((error.cause, self.source.name(i)))
                last = error
        if not most:
            raise BadSample("no held-out sample", "no sample is held out")
        causes = ", ".join(f"{n} {cause}" for cause, n in Counter(cause for cause, _ in skipped).items())
        message = f"samples in a row can't be read ({causes}); the last: {last} ({skipped[-1][1]})"
        if self.held_out:
            raise BadSample("no held-out sample", f"{most} held-out {message}")
        raise ValueError(f"{most} {message}")


# ---- reading one sample ---------------------------------------------------------------------------------

def load_image(file, square=None):
    """An image file (path or binary file object) as an RGB PIL image, upright (EXIF), transparency on white,
    first frame. square: the side that `crop_square` makes it.

    Raises BadSample with one sentence if the file isn't an image of FORMATS, is broken, or has more than
    MAX_PIXELS.
    """
    is_path = isinstance(file, (str, Path))
    name = file if is_path else "the image"
    if isinstance(file, str) and ADDRESS.match(file):
        raise BadSample("no image", f"a web address, or data, is no file: save it as one first ({file})")
    try:
        opened = open_file(file) if is_path else nullcontext(file)
    except (OSError, ValueError) as error:
        raise BadSample("no image", f"{name} can't be read as an image: {sentence(error)}") from None
    try:
        with opened as content:
            image = Image.open(content, formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"it has {image.width} x {image.height} pixels; "
                                                   f"{MAX_PIXELS // 2 ** 20} million is the limit")
            if image.mode == "F" or image.mode == "I" and image.format == "TIFF":    # of any range
                raise ValueError("its pixels are floats, signed or of 32 bits: save it with 8 or 16 bits "
                                 "without sign")
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            image = as_generated(to_rgb(image), image.info.get(ENLARGED))
            return image if square is None else crop_square(image, square)
    except Exception as error:  # broken bytes make PIL raise half a dozen kinds
        causes = {UnidentifiedImageError: "not an image", Image.DecompressionBombError: "too many pixels"}
        cause = causes.get(type(error), "broken image")
        why = f"it is none of {', '.join(FORMATS)}" if cause == "not an image" else sentence(error)
        raise BadSample(cause, f"{name} can't be read as an image: {why}") from None


ENLARGED = "nano_blip3o_enlarged"  # the note in a PNG of sample.py: each pixel became a square of this side


def as_generated(image, scale):
    """A PIL image that sample.py enlarged by `scale`, a string, as it was before: models read the pixels
    that they made. All others, as after a change in another program, stay as they are."""
    if scale is None or not re.fullmatch("[1-9][0-9]{0,3}", scale):
        return image
    size = [side // int(scale) for side in image.size]
    small = image.resize([max(1, side) for side in size], Image.NEAREST)
    return small if small.resize(image.size, Image.NEAREST).tobytes() == image.tobytes() else image


def to_rgb(image):
    """A loaded PIL image of any mode as RGB, transparency on white; in strips, which bound the copies."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    w, h = image.size
    rows = max(1, STRIP // w)
    if h > rows:
        whole = Image.new("RGB", image.size)
        for top in range(0, h, rows):
            whole.paste(to_rgb(image.crop((0, top, w, min(h, top + rows)))), (0, top))
        return whole
    if image.mode.startswith("I"):                                   # PIL would clip 16 bits, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


ADDRESS = re.compile(r"(?i)([a-z][a-z0-9+.-]*://|pipe:|data:)")      # what can't be opened as a file
EMPTY = (None, "", [])                               # what programs write into a field that a record lacks


@dataclass
class Record:
    """What is read of a key.json; other fields may hold anything."""
    caption: str | None = None
    captions: list[str | None] | None = None
    short_caption: str | None = None
    conversations: list[dict] | None = None
    found = ()                                   # the names of its fields, or of a table's columns


@dataclass
class Line(Record):
    """What is read of a line of JSONL, a row of a table, or a record in a JSON list, as LLaVA writes it."""
    image: str | list[str] | None = None


def read_record(content, cls, renamed=True):
    """The JSON object in bytes (None: an empty one) as a Record or a Line; BadSample "broken JSON".

    renamed: may its fields have the names that `rename` knows?
    """
    try:
        # No parse_json: img2dataset writes NaN into fields that aren't read here.
        raw = {} if content is None else json.loads(content.decode("utf-8-sig"))
        raw = typed(raw, dict, None, "the record")
        record = from_json(cls, rename(raw) if renamed else raw, "the record")
        record.found = [name for name, value in raw.items() if value not in EMPTY]
        return record
    except (ValueError, RecursionError) as error:                    # a UnicodeError is a ValueError
        raise BadSample("broken JSON", f"this isn't JSON with captions: {error}") from None


def rename(raw):
    """The fields of a record, with its caption and its image under the names of a Line, where these are
    strings under another of CAPTION_NAMES and IMAGE_NAMES, or "images" is a list. Empty fields don't
    count."""
    names = {name.strip().lower(): name for name in reversed(raw) if isinstance(raw[name], str)}
    full, images = {name for name, value in raw.items() if value not in EMPTY}, raw.get("images")
    if "image" not in full and isinstance(images, list) and all(isinstance(name, str) for name in images):
        raw = {**raw, "image": images}
    if "conversations" not in full:                                  # LLaVA's
        for field, others in ("caption", CAPTION_NAMES), ("image", IMAGE_NAMES):
            known = [names[name] for name in others if name in names]
            if known and full.isdisjoint((field, f"{field}s")):
                raw = {**raw, field: raw[next((name for name in known if name in full), known[0])]}
    return raw


def read_line(path, header, content):
    """The record of a file of RECORD_SUFFIXES, in bytes, as a Line; BadSample. header: a table's, else
    None."""
    if header is None:
        return read_record(content, Line)
    try:
        form, columns = read_header(header, path)
        cells = read_cells(content, form)
    except (ValueError, csv.Error) as error:
        raise BadSample("broken row", f"the table has changed since it was indexed: {error}") from None
    if len(cells) != len(columns):
        mark = f": a cell with {form['delimiter']!r} in it must stand in quotation marks"
        raise BadSample("broken row", f"the row has {len(cells)} cells for {len(columns)} columns"
                        + mark * (len(cells) > len(columns)))
    raw = rename(row_fields(columns, cells))
    line = Line(**{name: raw.get(name) for name in ("image", "caption", "short_caption")})
    line.found = columns
    return line


def row_fields(columns, cells):
    """A row of a table as a record; of two columns of one name the first counts. No cell holds a list."""
    return {name: cell.strip() for name, cell in zip(reversed(columns), reversed(cells))
            if name not in ("captions", "conversations", "images")}


def read_cells(content, form, strict=True):
    """The cells of one row of a table, in bytes; UnicodeDecodeError, csv.Error (fewer if not strict). form:
    see `read_header`."""
    text = io.StringIO(content.decode("utf-8-sig"), newline="")
    return next(csv.reader(text, **form, strict=strict), [])


def read_header(header, path):
    """(its form, names of the columns) of a table from its first line, in bytes; ValueError where no column
    holds images, or none captions. form: csv.reader's delimiter, and whether spaces follow it."""
    if b"\r" in header.strip(b"\r\n"):
        raise ValueError(f"the lines of {path} end in CR alone: save it with other line ends")
    forms = [{"delimiter": mark, "skipinitialspace": mark.encode() + b" " in header} for mark in "\t,;|"]
    tables = [(form, read_cells(header, form, strict=False)) for form in forms]
    for form, columns in tables:
        if rename(row_fields(columns, columns)).keys() >= {"image", "caption"}:
            return form, columns
    columns = max((columns for _, columns in tables), key=len)
    names = {name.strip().lower() for name in columns}
    lacks = [f"{what} ({', '.join(known)})" for what, known in
             (("image files", IMAGE_NAMES), ("captions", CAPTION_NAMES)) if names.isdisjoint(known)]
    links = [f"; what {printable(name)[:50]} names must be downloaded first" for name in columns
             if re.search("(?i)url|link", name)]
    raise ValueError(f"{path} has no column of {' nor of '.join(lacks)}: its first line says "
                     f"{printable(', '.join(columns))[:200]}{''.join(links[:1])}")


def image_path(line, folder):
    """Where the image of a Line lies below `folder`, None if it has none; BadSample if it has several, or
    one that lies elsewhere."""
    names = line.image if isinstance(line.image, list) else [line.image] if line.image else []
    if len(names) > 1:
        raise BadSample("several images", f"the record has {len(names)} images; only one can be trained on")
    if names and ADDRESS.match(names[0]):
        raise BadSample("no image", f"the image is an address, {names[0]}: download it first")
    try:
        return path_below(folder, names[0], "image") if names else None
    except ValueError as error:
        raise BadSample("outside the folder", str(error)) from None


def read_texts(text, record):
    """The bytes of a key.txt (or None) and a Record -> {"caption": str, "captions": [str, ...], "turns":
    [(user, assistant), ...]}, each if there is one.

    captions: the long ones first, the short one last. "turns" keep the <image> marks of LLaVA's
    conversations. Raises BadSample.
    """
    try:
        captions = [None if text is None else text.decode("utf-8-sig"), record.caption]
        captions += (record.captions or []) + [record.short_caption]
        captions = [caption.strip() for caption in captions if caption is not None]
        messages = [(typed(m.get("from"), str, None, "from"), typed(m.get("value"), str, None, "value"))
                    for m in record.conversations or []]
        messages = [(role, words.strip()) for role, words in messages if role != "system"]
        roles, words = [role for role, _ in messages], [words for _, words in messages]
        lengths = [len(text.encode("utf-8")) for text in captions + words]   # JSON can hold half a character
    except UnicodeError:
        raise BadSample("not UTF-8", "the caption isn't UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise BadSample("broken JSON", f"conversations are lists of from and value: {error}") from None
    if any("\0" in text for text in captions + words):
        raise BadSample("not UTF-8", "the text has NUL characters, as UTF-16 would")
    if max(lengths[:len(captions)], default=0) > MAX_CAPTION:
        raise BadSample("caption too long", f"the caption has more than {MAX_CAPTION} bytes")
    if sum(lengths[len(captions):]) > MAX_CONVERSATION:
        raise BadSample("conversation too long", f"it has more than {MAX_CONVERSATION} bytes of text")
    turns = list(zip(words[::2], words[1::2]))
    if roles != ["human", "gpt"] * len(turns) or not all(user and assistant for user, assistant in turns):
        raise BadSample("broken conversation", "a conversation must alternate between human and gpt, and "
                        f"end with gpt; this one has {', '.join(roles[:9])}")
    texts = {"turns": turns} if turns else {}
    distinct = list(dict.fromkeys(filter(None, captions)))
    if distinct:
        texts |= {"caption": distinct[0], "captions": distinct}
    if not texts:
        if captions or not record.found:
            raise BadSample("empty caption" if captions else "no caption", "there is no caption")
        raise BadSample("no caption", f"the record has {', '.join(record.found[:9])}, but no caption, "
                        "captions, short_caption or conversations")
    return texts


# ---- where samples lie: tar shards, JSONL files and folders are scanned once ----------------------------

# Index row: offset and size of image, .txt and .json; offset -1 if absent.
ABSENT = (-1, 0)
JUNK = ("__MACOSX", "@eaDir", "lost+found")           # folders that systems make; others begin with a dot

# What files begin with that are given as shards and aren't any.
FOREIGN = {
    "compressed with gzip: unpack it (gunzip)": (b"\x1f\x8b",),
    "compressed: unpack it": (b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!"),
    "a zip archive: unpack it, and give the folder": (b"PK\x03\x04",),
    "a Parquet table: write its rows into tar shards or JSONL": (b"PAR1",),
    "an Arrow table: write its rows into tar shards or JSONL": (b"ARROW1", b"\xff\xff\xff\xff"),
    "text in UTF-16: save it as UTF-8": (b"\xff\xfe", b"\xfe\xff"),
    "an image: give its folder, or a JSONL file that names it": (b"\xff\xd8\xff", b"\x89PNG"),
    "JSON: call it .jsonl if each line is an object, .json if it is a list": (b"{", b"["),
    "a web page or XML, perhaps an error message in place of a download": (b"<",),
}


def foreign(path):
    """What a file is that can't be read as a shard, and what to do with it; None if that isn't known."""
    with open_file(path) as file:
        start = file.read(4096)
    return next((what for what, magic in FOREIGN.items() if start.lstrip().startswith(magic)), None)


def holds_records(path):
    """Is a file JSONL, a JSON list or a table, by its name? All others are tar shards."""
    return path.suffix.lower() in RECORD_SUFFIXES


def hidden(name):
    """Is a file, or a folder on the way to it, hidden or made by a system: ._a.jpg, .git/a.jpg, __MACOSX?"""
    return any(part in JUNK or part[:1] == "." and part.strip(".") for part in name.split("/"))


def count_causes(left_out):
    """{cause: number} of the causes of LEFT_OUT that occur in a list of their counts."""
    return {cause: n for cause, n in zip(LEFT_OUT, np.sum(left_out, 0).tolist()) if n}


def scan_shard(path):
    """Offsets of the samples in a tar shard, a JSONL file, a JSON list or a table, in file order.

    Returns rows (n, 6) int64, and how many members are left out for each cause of LEFT_OUT. Raises
    ValueError, which says what the file is, if it can't be read.
    """
    is_table = path.suffix.lower() in TABLE_SUFFIXES
    scan = scan_table if is_table else scan_records if holds_records(path) else scan_tar
    rows, left_out = scan(path)
    return np.array(rows, np.int64).reshape(-1, 6), np.array(left_out)


def scan_records(path):
    """Rows of a JSONL file or a JSON list, whichever it is: a line or an entry is the sample's .json."""
    with open_file(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        line, newline, _ = start.partition(b"\n")
        what = foreign(path)
        if start[:1] not in (b"{", b"[") and what:
            raise ValueError(f"{path} holds no JSON: it is {what}")
        one_object = start[:1] == b"{" and path.suffix.lower() == ".json"
        broken = one_object and newline and line.strip()[-1:] != b"}"
        try:
            places = [] if broken else list(list_entries(file) if start[:1] == b"[" else lines(file))
        except ValueError as error:
            raise ValueError(f"{path} isn't a JSON list of records: {error}") from None
        line = read_first(path, file, ABSENT, places)
        if broken or one_object and len(places) == 1 and not line:
            key = re.match(r'{\s*("[^"]{1,60}")', start.decode("utf-8", "replace"))
            raise ValueError(f"{path} must hold a JSON list of records, or one record in each line, not one "
                             f"object{' that begins with ' + printable(key[1]) if key else ''}")
    return [(*ABSENT, *ABSENT, *place) for place in places], [0] * len(LEFT_OUT)


def read_first(path, file, header, places):
    """Has the first record at these (offset, size) of an open file an image, a caption or a conversation?
    ValueError where its image is an address: then they all are."""
    line = None
    with suppress(BadSample):
        header = None if header == ABSENT else read_at(file, *header, "caption too long")
        line = read_line(path, header, read_at(file, *places[0], "record too large")) if places else None
    if line and isinstance(line.image, str) and ADDRESS.match(line.image):
        raise ValueError(f"the images of {path} are addresses, {printable(line.image)[:200]}: download them "
                         "first (img2dataset makes tar shards of them)")
    return line is not None and bool(line.image or line.caption or line.captions or line.conversations)


def scan_table(path):
    """Rows of a CSV or TSV table: the header is each sample's .txt, a row its .json."""
    what = foreign(path)
    if what:
        raise ValueError(f"{path} holds no table: it is {what}")
    at, number, first, places = 0, 0, 1, []                          # first: line of the present row
    with open_file(path) as file:
        def texts():                                                 # csv.reader takes no line ahead
            nonlocal at, number
            for line in iter(lambda: file.readline(16 * MAX_RECORD), b""):
                at, number = at + len(line), number + 1
                yield line.decode("utf-8")
        try:
            line = next((line for line in texts() if line.strip("\ufeff \t\r\n")), "").encode()
            if not 0 < len(line) <= MAX_CAPTION:
                raise ValueError(f"{path} isn't a table: its first line has {len(line)} bytes")
            header, start, first = (at - len(line), len(line)), at, number + 1
            form, columns = read_header(line, path)
            for cells in csv.reader(texts(), **form, strict=True):
                if any(cells):
                    places.append((start, at - start))
                start, first = at, number + 1
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} isn't UTF-8 text (line {number}: {error.reason}): save it as "
                             "UTF-8") from None
        except csv.Error as error:
            raise ValueError(f"{path} isn't a table: {error} in the row that begins at line {first} (is a "
                             "quotation mark missing, or not doubled within a cell?)") from None
        if not places:
            raise ValueError(f"{path} has the columns {printable(', '.join(columns))[:200]}, but no rows")
        read_first(path, file, header, places)
    return [(*ABSENT, *header, *place) for place in places], [0] * len(LEFT_OUT)


def lines(file):
    """(offset, size) of the lines of a binary file that aren't blank, however long they are."""
    at = size = 0
    blank = True
    file.seek(0)
    for piece in iter(lambda: file.readline(2 ** 20), b""):
        size, blank = size + len(piece), blank and not piece.strip()
        if piece.endswith(b"\n"):
            if not blank:
                yield at, size
            at, size, blank = at + size, 0, True
    if not blank:
        yield at, size


SPACE = re.compile(r"[ \t\r\n]*")


def list_entries(file):
    """(offset, size) of the entries of the JSON list in a binary file; ValueError if it isn't one.

    Read as Latin-1 characters are bytes, and what separates entries is what it is in UTF-8. Only the next
    MAX_RECORD bytes and a few more are in memory; up to 16 times as many, to pass over too large an entry.
    """
    text, at, ended, decode = "", 0, False, json.JSONDecoder().raw_decode
    file.seek(0)
    start = file.seek(file.read(4096).index(b"[") + 1)               # where `text` begins in the file
    while True:
        if not ended and len(text) - at < MAX_RECORD:
            chunk = file.read(MAX_RECORD).decode("latin-1")
            start, text, at, ended = start + at, text[at:] + chunk, 0, not chunk
        at = SPACE.match(text, at).end()
        if text[at:at + 1] != "]":
            try:
                _, end = decode(text, at)
            except (json.JSONDecodeError, RecursionError) as error:
                if not ended and len(text) - at < 16 * MAX_RECORD:
                    chunk = file.read(max(MAX_RECORD, min(len(text), 8 * MAX_RECORD))).decode("latin-1")
                    text, ended = text + chunk, not chunk
                    continue
                pos = getattr(error, "pos", at)
                raise ValueError(f"{getattr(error, 'msg', 'too deep')} at byte {start + pos}") from None
            yield start + at, end - at
            at = SPACE.match(text, end).end()
        at += 1
        if text[at - 1:at] == "]":
            break
        if text[at - 1:at] != ",":
            raise ValueError(f"at byte {start + at - 1} there is neither a comma nor the list's end")
    if text[at:].strip() or file.read(1):
        raise ValueError(f"it goes on behind the list's end, at byte {start + at}")


def tar_members(file, at=0):
    """Yield (name, kind, (offset, size) of its bytes) of each member of an open tar (POSIX, GNU or PAX) from
    the header at byte `at` on. kind: "file", "sparse" (a file with holes), or "link", which has no bytes.

    Not by tarfile, which takes a broken header for the end and follows a negative size backwards for ever.
    Raises ValueError for a header that is broken or claims more bytes than there are.
    """
    length, extended = os.fstat(file.fileno()).st_size, {}           # extended: of the next header
    while True:
        file.seek(at)
        header = file.read(512)
        if not header.strip(b"\0"):
            return
        at += 512
        name, kind, size = header[:100].partition(b"\0")[0], header[156:157], tar_number(header[124:136])
        summed = header[:148] + b" " * 8 + header[156:]
        beyond = sum(summed) - tar_number(header[148:156])           # some writers sum signed bytes
        if beyond and beyond != 256 * sum(byte > 127 for byte in summed):
            raise ValueError(f"the header at byte {at - 512} is broken")
        if kind == b"\0" and name.endswith(b"/"):
            kind = b"5"
        if header[257:265] != b"ustar  \0" and header[345:500].strip(b"\0"):
            name = header[345:500].partition(b"\0")[0] + b"/" + name
        size = 0 if kind in b"123456" else extended.get(b"size", size)
        block, more = header, 482
        while kind == b"S" and block[more:more + 1].strip(b"\0"):    # GNU's map of holes goes on
            block, more, at = file.read(512), 504, at + 512
        if not 0 <= size <= (min(2 ** 20, length - at) if kind in b"LKxXg" else length - at):
            raise ValueError(f"the header at byte {at - 512} claims {size} bytes, and {max(0, length - at)} "
                             "follow: is the file complete?")
        if kind in b"LKxXg":
            extended |= extension(kind, file.read(size))
        else:
            sparse = kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in extended)
            name = extended.get(b"GNU.sparse.name", extended.get(b"path", name))
            kind = "link" if kind not in b"07\0S" else "sparse" if sparse else "file"
            yield name.decode("utf-8", "surrogateescape"), kind, (at, size)
            extended = {}
        at += -(-size // 512) * 512


def tar_number(field):
    """A number in a tar header, octal or in base 256; -1 if it is none."""
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(field[1:], "big") if field[0] == 128 else -1
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def extension(kind, content):
    """What an extended header says of the next member: {b"path": ..., b"size": ...} and the like."""
    if kind == b"L":
        return {b"path": content.partition(b"\0")[0]}
    fields, at = {}, 0
    while kind in b"xX" and at < len(content):                       # "LENGTH KEY=VALUE\n"
        digits = content[at:at + 20].partition(b" ")[0]
        if not digits.isdigit() or int(digits) <= len(digits):
            break
        key, _, value = content[at + len(digits) + 1:at + int(digits) - 1].partition(b"=")
        fields[key], at = value, at + int(digits)
    if b"size" in fields:
        fields[b"size"] = int(fields[b"size"]) if fields[b"size"].isdigit() else -1
    return fields


def member_name(path, offset):
    """The full name of the member of a tar whose bytes begin at `offset`: long names stand in front of its
    header."""
    with suppress(OSError, ValueError), open_file(path) as file:
        for start in range(max(0, offset - 2 ** 16), offset, 512):
            with suppress(ValueError, StopIteration):
                name, _, (at, _) = next(tar_members(file, start))
                if at == offset:
                    return name
    return f"the member at byte {offset}"


def scan_tar(path):
    """Rows of a tar shard: images with texts of the same stem. Links are left out: they may lead outside.
    So is what stands behind the end, where several tars were put together by `cat`."""
    behind = []
    try:
        with open_file(path) as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError("it is empty")
            members = list(tar_members(file))
            at, padding = file.tell(), file.read(2 ** 20)
            at += (len(padding) - len(padding.lstrip(b"\0"))) // 512 * 512
            with suppress(ValueError):                               # anything may follow there
                behind.extend(tar_members(file, at))
    except ValueError as error:
        what = foreign(path)
        why = f"it is {what}" if what else error
        raise ValueError(f"{path} isn't a readable tar shard: {why}") from None
    rows, left_out = pair(members, is_tar=True)
    left_out[LEFT_OUT.index("behind the end")] = len(behind)
    return rows, left_out


def pair(files, is_tar):
    """Rows of files [(name, kind, (offset, size))], as of `tar_members`, and how many are left out for each
    cause of LEFT_OUT.

    In a tar, the folder that holds all files may be hidden, and of images that differ in nothing but the
    suffix the last one counts (the others are "second image"), in a folder each.
    """
    root = len(os.path.commonprefix([name for name, _, _ in files]).rpartition("/")[0]) if is_tar else 0
    images, left_out, others, image_names = {}, Counter(), set(), set()
    texts = {suffix: {} for suffix in (".json", *reversed(TEXT_SUFFIXES))}
    for name, kind, place in files:
        stem, dot, suffix = name.rpartition(".")
        suffix = dot + suffix.lower()
        if hidden(name[root:]):
            left_out["hidden"] += suffix in IMAGE_SUFFIXES
        elif suffix in OTHER_SUFFIXES or suffix in IMAGE_SUFFIXES and kind != "file":
            left_out[suffix if suffix in OTHER_SUFFIXES else kind] += 1
            others.add(stem)
        elif suffix in IMAGE_SUFFIXES:
            images[stem if is_tar else name] = stem, place
            image_names.add(name)
        elif suffix in texts and kind == "file":
            texts[suffix][stem] = place
    left_out["second image"] = len(image_names) - len(images)
    records, *texts = texts.values()
    texts = {stem: place for found in texts for stem, place in found.items()}    # .txt comes last
    rows = [(*place, *texts.get(stem, ABSENT), *records.get(stem, ABSENT))
            for stem, place in images.values() if stem in texts or stem in records]
    left_out["no caption"] = len(images) - len(rows)
    stems = {stem for stem, _ in images.values()}
    left_out["no image"] = len((texts.keys() | records.keys()) - stems - others)
    return rows, [left_out[cause] for cause in LEFT_OUT]


def unfold(path, listings, described):
    """A path of --data as a list of Paths: a folder is followed by the tar shards and the METADATA in it.

    Its other files are put into `listings`, sorted, and into `described` how many images each of METADATA
    has. Raises ValueError if there is nothing.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise ValueError(f"there is no shard or folder at {printable(path)}")
    if not path.is_dir():
        return [path]
    files = sorted(files_below(path))
    sources = [file for file in files if (file.suffix.lower() == ".tar" or file.name in METADATA)
               and file.is_file() and not hidden(file.relative_to(path).as_posix())]
    below = files_of_tables({file.parent: file for file in sources if file.name in METADATA}, files)
    described |= {table: n for table, (_, n) in below.items()}
    taken = {file for members, _ in below.values() for file in members}
    listings[path] = [file for file in files if file not in taken]
    return [path, *(file for file in sources if file.suffix.lower() == ".tar" or file in described)]


def files_of_tables(tables, files):
    """{table: (its files, number of images)} of tables by their folder. A file belongs to the nearest table
    above it. Where an image has a text of its own, the table doesn't count."""
    members = {folder: [] for folder in tables}
    for file in files if tables else ():
        nearest = next((folder for folder in file.parents if folder in tables), None)
        members.get(nearest, []).append(file)
    scans = {folder: scan_folder(folder, bytearray(), inside) for folder, inside in members.items()}
    return {tables[folder]: (members[folder], int(left_out[NO_CAPTION]))
            for folder, (rows, left_out) in scans.items() if left_out[NO_CAPTION] and not len(rows)}


def files_below(folder):
    """Yield the paths of all files below a folder, each real folder once; what links lead to comes last.
    OSError for a folder that can't be read, unless it is hidden."""
    def refuse(error):
        if not hidden(os.path.relpath(error.filename, folder)):
            raise error
    def identity(path):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    starts, seen = [folder], set()
    for start in starts:
        for root, folders, names in () if identity(start) in seen else os.walk(start, onerror=refuse):
            if identity(root) in seen:
                folders.clear()
                continue
            seen.add(identity(root))
            folders.sort()                                           # which of two links wins
            paths = [os.path.join(root, name) for name in folders if not hidden(name)]
            starts.extend(filter(os.path.islink, paths))
            yield from (Path(root, name) for name in names)


def scan_folder(path, names, files):
    """Like scan_shard, for a folder with these files: offsets and sizes point into `names`, to which the
    paths are appended."""
    members = []
    for file in files:
        name = os.fsencode(file)
        members.append((file.relative_to(path).as_posix(), "file", (len(names), len(name))))
        names.extend(name)
    rows, left_out = pair(members, is_tar=False)
    return np.array(rows, np.int64).reshape(-1, 6), np.array(left_out)


def try_scan(path):
    """What `scan_shard` returns, or (None, the sentence that it raises)."""
    try:
        return scan_shard(path)
    except (ValueError, OSError) as error:
        return None, sentence(error)


def scan_shards(paths):
    """[(rows, left_out)] of many shards, by several processes where they are many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loader = torch.utils.data.DataLoader(
        paths, batch_size=None, collate_fn=try_scan,
        generator=torch.Generator(),  # its own: the run's noise stays as it is
        num_workers=min(16, cores) if cores > 1 and len(paths) > 100 else 0)
    quiet = None if len(paths) > 20 else True                        # None: where there is no terminal
    scans = list(tqdm(loader, desc="indexing shards", leave=False, disable=quiet))
    broken = [why for rows, why in scans if rows is None]
    if broken:
        raise ValueError(broken[0] + (f" ({len(broken) - 1} more can't be read)" if broken[1:] else ""))
    return scans


def load_index(file, count):
    """(rows (n, 6), shards (count, 3 + causes)) of an index file; of no shard where the file is absent,
    broken, another's or of another version."""
    width = 3 + len(LEFT_OUT)
    try:
        open_file(file).close()                                      # load_file would wait for a pipe
        stored = load_file(file)
        rows, shards = stored["rows"], stored["shards"]
        fits = (rows.dtype == shards.dtype == torch.int64 and rows.shape[1:] == (6,)
                and shards.shape == (count, width) and bool((shards[:, 2] >= 0).all()))
        if fits and shards[:, 2].sum() == len(rows) and index_sum(rows, shards).equal(stored["sum"]):
            return rows, shards
    except (OSError, SafetensorError, KeyError, IndexError, ValueError, RuntimeError):
        pass
    return torch.empty(0, 6, dtype=torch.int64), torch.tensor([[-1, -1, *[0] * (width - 2)]] * count)


def index_sum(rows, shards):
    """What an index file's "sum" must be."""
    return rows.sum() + shards.sum() + INDEX_VERSION


def index_shards(paths):
    """`scan_shard` of many files, cached: (rows (n, 6) of all, shards (S, 3 + causes)), two int64 tensors.

    shards: size, mtime, number of samples, then the counts of LEFT_OUT. The file in INDEX_FOLDER is
    named after the list of paths; a shard whose size or time has changed is scanned again. All processes of
    a machine share the file's pages as they are on disk: the rows of 30 million samples take 1.4 GB of
    memory once, not once a worker.
    """
    absolute_paths = "\n".join(map(os.path.abspath, paths))
    file = INDEX_FOLDER / f"{hashlib.sha256(os.fsencode(absolute_paths)).hexdigest()[:16]}.safetensors"
    stamps = torch.tensor([(s.st_size, s.st_mtime_ns) for s in map(os.stat, paths)])  # (S, 2)
    with file_lock(file.with_suffix(".lock"), wait=True):              # one process builds it
        rows, shards = load_index(file, len(paths))
        stale = (shards[:, :2] != stamps).any(1).nonzero().flatten().tolist()
        if not stale:
            return rows, shards
        rows_by_shard, shards = list(rows.split(shards[:, 2].tolist())), shards.clone()
        for i, (table, left_out) in zip(stale, scan_shards([paths[i] for i in stale])):
            rows_by_shard[i] = torch.from_numpy(table)
            shards[i] = torch.tensor([*stamps[i], len(table), *left_out])
        rows = torch.cat(rows_by_shard)
        try:
            with atomic_write(file) as temporary:
                save_file({"rows": rows, "shards": shards, "sum": index_sum(rows, shards)}, temporary)
            return load_file(file)["rows"], shards
        except (OSError, SafetensorError) as error:
            tqdm.write(f"the index of {len(paths)} shards can't be kept in {INDEX_FOLDER}, so the next "
                       f"start builds it again: {error}", file=sys.stderr)
            return rows, shards


# ---- shards: captioned images as a source ---------------------------------------------------------------

class Part(NamedTuple):
    """One of the mixed sources: `length` items from the item `first` on, which make `fraction` of all
    samples.

    held_out: which of them, counted from `first`, are never trained on; a sorted array.
    """
    first: int
    length: int
    fraction: Fraction
    held_out: np.ndarray

    def training_item(self, k):
        """The item number of the k-th item that is not held out."""
        before = self.held_out - np.arange(len(self.held_out))  # training items in front of each of them
        return self.first + k + int(np.searchsorted(before, k, "right"))


def held_out_items(n):
    """Which of n items are never trained on: 1 % of them, at least 16, at most 512, never more than half;
    sorted.

    Evenly spaced, so a function of n alone: the same at every restart, whatever the seed.
    """
    count = min(512, max(16, n // 100), n // 2)
    return (2 * np.arange(count) + 1) * n // (2 * max(count, 1))


def refuse_repeats(paths, folders):
    """ValueError where of these paths two are one file, or one of the folders lies in another: what is held
    out of the one would be trained on in the other. (Records may still name images of a folder.)"""
    real, seen = {path: path.resolve() for path in paths}, {}
    for path in sorted(paths, key=lambda path: len(real[path].parts)):    # folders before what is inside
        inside = [folder for folder in real[path].parents if folder in seen
                  and not hidden(real[path].relative_to(folder).as_posix())] if path in folders else []
        if real[path] in seen or inside:
            how, other = ("is the same as", seen[real[path]]) if real[path] in seen else \
                ("lies in", seen[inside[0]])
            raise ValueError(f"--data has samples twice: {printable(path)} {how} {printable(other)}; leave "
                             "one out (=fraction gives it another share)")
        seen[real[path]] = path


class Shards:
    """Captioned images from tar shards, JSONL files, JSON lists, tables and folders (with the tar shards and
    METADATA in them), mixed in given fractions.

    A sample is key.jpg (.jpeg, .png, .webp) with key.txt or key.json or both; or a line of a JSONL file, an
    entry of a JSON list or a row of a table, its "image" a path below that file's folder; without an image
    it is a conversation in text. sources: [(paths, fraction)], the fractions exact Fractions or
    None: those without one are one source together, which gets what the others leave. size: side S of the
    square images. Item i costs one seek. With a FeatureCache as `cache`, items hold the features of their
    image instead of the image. Raises ValueError if a path is missing, a source holds no sample, or the
    fractions don't fit together.
    """

    def __init__(self, sources, size=64):
        listings, described, names = {}, {}, bytearray()
        groups = [([file for path in paths for file in unfold(path, listings, described)], fraction)
                  for paths, fraction in self.weighted_groups(sources)]
        self.size, self.cache, self.orders = size, None, {}          # orders: see `index`
        self.paths, self.folders = [path for paths, _ in groups for path in paths], set(listings)
        refuse_repeats(self.paths, self.folders)
        files = [path for path in self.paths if path not in listings]
        rows, shards = index_shards(files) if files else torch.empty(2, 0, 6, dtype=torch.int64)
        indexed = zip(rows.split(shards[:, 2].tolist()), shards[:, 3:].numpy())
        scans = [scan_folder(path, names, listings[path]) if path in listings else next(indexed)
                 for path in self.paths]
        self.rows = [torch.as_tensor(table) for table, _ in scans]
        self.names = torch.frombuffer(names, dtype=torch.uint8) if names else None
        self.ends = np.cumsum([len(table) for table in self.rows])
        left_out = [counts for _, counts in scans]
        for i, path in enumerate(self.paths):                        # images that METADATA doesn't name
            if path in described:
                unnamed = max(0, described[path] - len(self.rows[i]))
                left_out[i] = left_out[i] + unnamed * (np.arange(len(LEFT_OUT)) == NO_CAPTION)
        self.left_out = count_causes(left_out)
        self.parts = list(self.make_parts(groups, left_out))
        held_out = [part.first + part.held_out for part in self.parts]
        # Shuffled, so that any prefix is a fair sample of all sources.
        self.held_out = np.random.default_rng(0).permutation(np.concatenate(held_out))

    @staticmethod
    def weighted_groups(sources):
        """[(paths, fraction)], the sources without a fraction first, as one."""
        rest = [path for paths, fraction in sources if fraction is None for path in paths]
        weighted = [(paths, fraction) for paths, fraction in sources if fraction is not None]
        left = 1 - sum(fraction for _, fraction in weighted)
        if left < 0 or (left > 0) != bool(rest) or any(fraction <= 0 for _, fraction in weighted):
            given = ", ".join(str(float(fraction)) for _, fraction in weighted)
            raise ValueError(f"the fractions of the sources are {given}: each must be above 0, and their "
                             "sum 1, or less than 1 if there are sources without a fraction")
        return ([(rest, left)] if rest else []) + weighted

    def make_parts(self, groups, left_out):
        """The Part of each group of paths."""
        held_out, first, shard = held_out_items(len(self)), 0, 0
        for paths, fraction in groups:
            shard += len(paths)
            end = int(self.ends[shard - 1])
            if first == end:
                where = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
                causes = count_causes(left_out[shard - len(paths):shard])
                why = ", ".join(f"{n} {cause}" for cause, n in causes.items()) or "nothing"
                if all(holds_records(path) and path not in self.folders for path in paths):
                    raise ValueError(f"there are no records in {where}")
                listed = causes.keys() & RECORD_SUFFIXES and any(path in self.folders for path in paths)
                raise ValueError(f"no image with a caption in {where}: looked for name.jpg, .png or .webp "
                                 f"with name{', '.join(TEXT_SUFFIXES)} or .json, in folders also for tar "
                                 f"shards of these and {' or '.join(METADATA)}; left out: {why}"
                                 + ": --data takes such a file by its name" * bool(listed))
            inside = held_out[(held_out >= first) & (held_out < end)] - first
            yield Part(first, end - first, fraction, inside[:end - first - 1])  # leaves one to train on
            first = end

    def __len__(self):
        return int(self.ends[-1])

    def locate(self, position):
        """Which source a position of the run belongs to, and which of that source's samples it is: (number,
        k).

        A source with fraction w gets the positions p at which floor(w p) grows, and there its sample k =
        floor(w p). The others divide the rest among themselves in the same way. Integers only, so it is
        exact at any position.
        """
        left = Fraction(1)
        for number in [*range(1, len(self.parts)), 0]:
            share = self.parts[number].fraction / left
            k = position * share.numerator // share.denominator
            if (position + 1) * share.numerator // share.denominator > k:
                return number, k
            position, left = position - k, left - self.parts[number].fraction

    def index(self, position, ahead=0, seed=0, held_out=False):
        """The item at a position of the run, or `ahead` items later in its source.

        Each epoch of each source has its own permutation of the items that are trained on.
        """
        if held_out:
            return int(self.held_out[(position + ahead) % len(self.held_out)])
        number, k = self.locate(position)
        part = self.parts[number]
        length = part.length - len(part.held_out)
        epoch, at = divmod(k + ahead, length)
        if self.orders.get(number, (None,))[0] != (seed, epoch):
            # The same as permutation(length), in a third of its memory: 100 MB for 25 million.
            order = np.arange(length, dtype=np.uint32 if length < 2 ** 32 else np.uint64)
            np.random.default_rng((seed, epoch, number)).shuffle(order)
            self.orders[number] = (seed, epoch), order
        return part.training_item(int(self.orders[number][1][at]))

    def place(self, i):
        """Item i -> (path of its shard, records or folder, its row in the index, its number in there)."""
        shard = int(np.searchsorted(self.ends, i, "right"))
        i -= int(self.ends[shard]) - len(self.rows[shard])
        return self.paths[shard], self.rows[shard][i].tolist(), i

    def path_in_folder(self, place):
        """The path of a file in a folder, from its (offset, size) in the index; of the image from a row."""
        return os.fsdecode(self.names[place[0]:place[0] + place[1]].numpy().tobytes())

    def name(self, i):
        """Human-readable location of item i."""
        path, row, number = self.place(i)
        if path in self.folders:
            return printable(self.path_in_folder(row))
        if holds_records(path):
            return printable(f"{path}, sample {number + 1}")
        return printable(f"{path}: {member_name(path, row[0])}")

    def fingerprint(self):
        """A hash of all shards, and of images in folders or named by records: name, size and time of change;
        or that they are absent."""
        digest = hashlib.sha256()
        for path, rows in zip(self.paths, self.rows):
            for file in self.files_of(path, rows.tolist()):
                stamp = "absent "
                with suppress(OSError, TypeError, ValueError):       # None, a name with "\0"
                    status = os.stat(file)
                    stamp = f"{Path(file).name} {status.st_size} {status.st_mtime_ns} "
                digest.update(os.fsencode(stamp))
            digest.update(os.fsencode(f"{path.name} {len(rows)}\n"))
        return digest.hexdigest()[:16]

    def files_of(self, path, rows):
        """Yield the files that hold the samples of one of `paths` with these rows: the images of a folder; a
        shard; records, and the path of each one's image, None if it has none."""
        if path in self.folders:
            yield from map(self.path_in_folder, rows)
            return
        yield path
        if not holds_records(path):
            return
        with open_file(path) as file:
            for row in tqdm(rows, desc=f"images of {path}", leave=False, disable=None, delay=5):
                header, name = None, None
                with suppress(BadSample):
                    if row[2] >= 0:
                        header = read_at(file, *row[2:4], "caption too long")
                    record = read_line(path, header, read_at(file, *row[4:], "record too large"))
                    name = image_path(record, path.parent)
                yield name

    def __getitem__(self, i):
        """{"image": uint8 (S, S, 3) or "features", and what `read_texts` returns}; raises BadSample. A
        conversation without an image has neither."""
        if self.cache is not None:
            _, texts = self.read(i, texts_only=True)
            return {"features": self.cache[i], **texts}
        image, texts = self.read(i)
        if image is None:
            return texts
        return {"image": np.asarray(load_image(io.BytesIO(image), self.size)), **texts}

    def read(self, i, texts_only=False):
        """(the image's bytes, what `read_texts` returns) of item i; raises BadSample if the texts can't be
        used, or there is neither an image nor a conversation.

        The image is None for a conversation without one, and with texts_only, where it isn't read.
        """
        path, row, _ = self.place(i)
        is_folder = path in self.folders
        places = [ABSENT if texts_only else tuple(row[:2]), tuple(row[2:4]), tuple(row[4:])]
        with nullcontext() if is_folder else opened(path, "no shard") as shard:
            image, text, record = (None if place == ABSENT else read_at(shard, *place, cause) if shard
                                   else read_whole(self.path_in_folder(place), cause)
                                   for place, cause in zip(places, MAX_BYTES))
        named = not is_folder and holds_records(path)
        if named:
            text, record = None, read_line(path, text, record)
        else:
            record = read_record(record, Record, renamed=text is None)
        texts, name = read_texts(text, record), image_path(record, path.parent) if named else None
        if named and name is None and "turns" not in texts:
            raise BadSample("no image", f"the record has {', '.join(record.found[:9])}, but no image, and "
                            "no conversations")
        if name is not None and not texts_only:
            image = read_whole(name, "image too large")
        if image == b"":
            raise BadSample("empty image", "the image has no bytes")
        return image, texts


@contextmanager
def opened(path, cause):
    """A file, open for reading; where it can't be read, BadSample of that cause."""
    try:
        with open_file(path, 0) as file:
            yield file
    except BadSample:
        raise
    except (OSError, ValueError) as error:                           # ValueError: a pipe, a device, a folder
        raise BadSample(cause, sentence(error)) from None


def read_at(file, offset, size, cause):
    """`size` bytes of an open file; BadSample with that cause of MAX_BYTES if they are too many."""
    if size > MAX_BYTES[cause]:
        raise BadSample(cause, f"there are {size} bytes; {MAX_BYTES[cause]} is the limit")
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise BadSample("cut file", "the file has become shorter since it was indexed")
    return content


def read_whole(path, cause):
    """The bytes of a file; raises as `read_at`, and BadSample "no image" or "no caption" where it can't be
    read."""
    with opened(path, "no image" if cause == "image too large" else "no caption") as file:
        return read_at(file, 0, os.fstat(file.fileno()).st_size, cause)


# ---- --data ---------------------------------------------------------------------------------------------

FRACTION = re.compile(r"(?s)(.+)=([+-]?(?:[0-9]{1,9}/0*[1-9][0-9]{0,8}"
                      r"|(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(?:[eE]-?[0-9])?))")


def open_source(spec, size=64, seed=0):
    """`--data` as a source of items with images of side `size`: comma-separated tar shards, folders, JSONL
    files, JSON lists, tables or patterns of them, each with its fraction of all samples if it ends in
    =fraction (long/*.tar,short/*.tar=0.1).

    None is the synthetic world of the miniature, number `seed`. Raises ValueError where a pattern matches
    nothing.
    """
    if spec is None:
        from miniature.tasks import World
        return World(seed, size)
    return Shards(parse_sources(spec), size)


def parse_sources(spec):
    """`--data` -> [(paths, fraction or None)]. What exists is taken as it stands, whatever marks are in its
    name; else ~ is the home folder, {00..99} and {a,b} stand for several paths, and * ? [ match files."""
    sources, pieces = [], spec.split(",")
    while pieces:
        for n in range(min(len(pieces), 16), 0, -1):                 # names may hold commas: the longest
            part, fraction = split_fraction(",".join(pieces[:n]))
            if existing(part):
                sources.append(([existing(part)], fraction))
                break
        else:
            while n < len(pieces) and ",".join(pieces[:n]).count("{") > ",".join(pieces[:n]).count("}"):
                n += 1
            part, fraction = split_fraction(",".join(pieces[:n]).strip())
            if not part:
                raise ValueError(f"--data {spec!r} has an empty part: paths are separated by one comma each")
            if ADDRESS.match(part):
                raise ValueError(f"--data takes files on this machine: download {printable(part)} first")
            sources.append(([path for text in expand_braces(part) for path in find(text)], fraction))
        del pieces[:n]
    return sources


def split_fraction(part):
    """A part of --data -> (path or pattern, Fraction or None)."""
    match = None if existing(part) else FRACTION.fullmatch(part)
    return (match[1], Fraction(match[2])) if match else (part, None)


def existing(name):
    """The name as it is, stripped, or with ~ expanded: the first of these that exists, else None."""
    names = (name, os.path.expanduser(name), name.strip(), os.path.expanduser(name.strip()))
    return next((name for name in names if name and os.path.exists(name)), None)


def expand_braces(text):
    """As a shell does: a{1..3}b, a{001..100}b and a{x,y}b stand for several texts. ValueError if they are
    more than MAX_SHARDS."""
    texts = list(islice(expand(text), MAX_SHARDS + 1)) if text.count("{") <= 16 else [text]
    if len(texts) > MAX_SHARDS:
        raise ValueError(f"the braces of {printable(text)} stand for more than {MAX_SHARDS} paths")
    return list(dict.fromkeys(texts))


def expand(text):
    """Yield what the braces of a text stand for, the innermost first."""
    number = "([0-9]{1,9})"
    braces = re.search(rf"\{{(?:{number}\.\.{number}(?:\.\.{number})?|([^{{}}]*,[^{{}}]*))\}}", text)
    if braces is None:
        yield text
        return
    first, last, step, words = braces.groups()
    if words is None:
        sign = 1 if int(first) <= int(last) else -1
        padded = any(len(n) > 1 and n.startswith("0") for n in (first, last))
        width = max(len(first), len(last)) if padded else 0
        numbers = range(int(first), int(last) + sign, sign * max(1, int(step or 1)))
        options = (f"{n:0{width}d}" for n in numbers)
    else:
        options = words.split(",")
    for option in options:
        yield from expand(text[:braces.start()] + option + text[braces.end():])


def find(pattern):
    """The path, or the paths that a glob pattern matches, sorted. Folders that exist are taken as they are
    called; hidden files and folders are matched only where the pattern has a name that begins with a dot.
    ValueError if there are none."""
    pattern = os.path.expanduser(pattern)
    if not any(c in pattern for c in "*?["):
        return [pattern]
    root, rest = Path("/" if pattern.startswith("/") else "."), list(Path(pattern.lstrip("/")).parts)
    while len(rest) > 1 and os.path.exists(root / rest[0]):
        root /= rest.pop(0)
    try:
        paths = sorted(root.glob(os.path.join(*rest)))
    except (ValueError, OSError, NotImplementedError, IndexError, re.error) as error:
        raise ValueError(f"{printable(pattern)} is no pattern of files: {printable(error)}") from None
    if not any(part.startswith(".") for part in rest):
        paths = [path for path in paths if not hidden(path.relative_to(root).as_posix())]
    if not paths:
        raise ValueError(f"no file matches {printable(pattern)}")
    return paths


# ---- a cache of frozen encoders' features ---------------------------------------------------------------

class FeatureCache:
    """Features of the items of Shards on disk: folder/<name>/NNNNNN.safetensors, 1024 items in each.

    The name is a hash of encoders, preprocessing, shards and image files: where they change, a new cache is
    made. Each file is written whole, so a crash loses only its file.
    """
    items_per_file = 1024

    def __init__(self, folder, name):
        self.folder, self.opened = Path(folder) / name, {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def __getstate__(self):
        return {**self.__dict__, "opened": {}}  # file handles can't be pickled

    def file(self, number):
        """Path of cache file `number`."""
        return self.folder / f"{number:06d}.safetensors"

    def open(self, number):
        """(the open cache file, {item as str: (cause, sentence)} of broken images); ValueError if there is
        no such file or it is damaged."""
        try:
            file = safe_open(self.file(number), framework="pt")
            bad = parse_json(file.metadata()["bad"], "its list of broken images")
            if all(len(typed(pair, list[str], None, "it")) == 2 for pair in bad.values()):
                return file, bad
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            pass
        raise ValueError(f"{self.file(number)} is missing or damaged: the next start makes it again")

    def is_whole(self, number, length):
        """Is cache file `number` there, with all its items of the `length` ones of the source?"""
        items = min(self.items_per_file, length - number * self.items_per_file)
        with suppress(ValueError):
            file, _ = self.open(number)
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 - no dict
            return bool(shapes) and all(shape[:1] == [items] for shape in shapes)
        return False

    def fill(self, source, encode, batch, workers=0, rank=0, world=1, quiet=False):
        """Write this process's part of the files that are missing or damaged. encode: pixels (B, 3, S, S) ->
        {name: (B, ...)}."""
        numbers = range(rank, math.ceil(len(source) / self.items_per_file), world)
        missing = [number for number in numbers if not self.is_whole(number, len(source))]
        for number in tqdm(missing, desc=f"features into {self.folder}", disable=quiet or None):
            first = number * self.items_per_file
            items = range(first, min(first + self.items_per_file, len(source)))
            loader = torch.utils.data.DataLoader(ItemImages(source), batch, sampler=items,
                                                 num_workers=workers, collate_fn=list)
            features, bad = {}, {}
            for start, images in zip(range(first, items.stop, batch), loader):
                bad |= {str(start + j): image for j, image in enumerate(images) if isinstance(image, tuple)}
                blank = np.zeros((source.size, source.size, 3), np.uint8)
                images = [blank if isinstance(image, tuple) else image for image in images]
                for key, value in encode(to_pixels(np.stack(images))).items():
                    features.setdefault(key, []).append(value.cpu().contiguous())
            try:
                with atomic_write(self.file(number)) as temporary:
                    save_file({key: torch.cat(parts) for key, parts in features.items()}, temporary,
                              {"bad": json.dumps(bad)})
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self.file(number)} can't be written: {sentence(error)}; run the same "
                                 "command again once there is room, or choose another --cache") from None

    def __getitem__(self, i):
        """{name: tensor} of item i; raises the BadSample that its image raised."""
        number, row = divmod(i, self.items_per_file)
        if number not in self.opened:
            self.opened[number] = self.open(number)
        file, bad = self.opened[number]
        if str(i) in bad:
            raise BadSample(*bad[str(i)])
        return {key: file.get_slice(key)[row] for key in file.keys()}  # noqa: SIM118 - a file, not a dict


class QueryStates:
    """Query states of prompts on disk, (n_query, D) each: what a frozen language model with frozen queries
    makes of a prompt never changes. Files of random names hold up to 256 prompts each, and name them.

    Unlike images, prompts come as an epoch meets them: the first one computes, all others read.
    """
    prompts_per_file = 256

    def __init__(self, folder):
        self.folder, self.rows, self.new = Path(folder), {}, {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.safetensors")):
            self.open(path)

    def open(self, path):
        """Add the prompts of a file; those of a damaged one are computed again."""
        with suppress(OSError, SafetensorError, KeyError, TypeError, ValueError):
            file = safe_open(path, framework="pt")
            keys = json.loads(file.metadata()["prompts"])
            states = file.get_slice("states")
            if states.get_shape()[0] == len(keys):
                self.rows |= {key: (states, row) for row, key in enumerate(keys)}

    def __call__(self, ids, mask, compute):
        """The states (B, n_query, D) of prompts ids (B, L) with mask (B, L), all on the host; compute(ids,
        mask) makes those that are missing."""
        keys = [" ".join(map(str, row[real].tolist())) for row, real in zip(ids, mask)]
        missing = {key: i for i, key in enumerate(keys) if key not in self.rows and key not in self.new}
        if missing:
            rows = list(missing.values())
            with torch.no_grad():
                self.new |= zip(missing, compute(ids[rows], mask[rows]).cpu())
        states = torch.stack([self.new[key] if key in self.new else self.row(key) for key in keys])
        if len(self.new) >= self.prompts_per_file:
            self.flush()
        return states

    def row(self, key):
        """The states (n_query, D) of a prompt that is on disk."""
        states, row = self.rows[key]
        return states[row]

    def flush(self):
        """Write what is not yet on disk."""
        if not self.new:
            return
        path = self.folder / f"{os.urandom(8).hex()}.safetensors"    # several runs may share the folder
        with atomic_write(path) as temporary:
            save_file({"states": torch.stack(list(self.new.values()))}, temporary,
                      {"prompts": json.dumps(list(self.new))})
        self.new = {}
        self.open(path)


class ItemImages(torch.utils.data.Dataset):
    """The images of a source by item (S, S, 3), or (cause, sentence) where one can't be used."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, i):
        try:
            return self.source[i].get("image", ("no image", "a conversation has no image"))
        except BadSample as error:
            return error.cause, str(error)


# ---- tokens and the chat template -----------------------------------------------------------------------

# Qwen2.5's added tokens in the order of their ids, then the three of BLIP3-o: [IMG] is vocab_size - 3 at
# every size.
SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
           "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
           "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
           "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> [IMG] [/IMG] <image>").split()
# The pre-tokenisation pattern of Qwen2's tokenizer.
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")


class ChatFormat(NamedTuple):
    """How a conversation is written: [begin], then for each message start, role, [role_end], gap, text, end,
    after."""
    begin: str | None
    start: str
    role_end: str | None
    gap: str
    end: str
    after: str = ""
    system_prefix: str = ""          # what the template writes before a system message
    mark: str | None = None          # a token that only tokenizers of this format have

    @property
    def control(self):
        """The control tokens that a tokenizer of this format has."""
        return {name for name in (self.begin, self.start, self.role_end, self.end, self.mark) if name}


CHATML = ChatFormat(None, "<|im_start|>", None, "\n", "<|im_end|>", "\n")
LLAMA_3 = ChatFormat("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>")
# The template in the files of Llama 3.1 and 3.2 states two dates; the second is today's where the library
# knows it, else this one. A fixed date keeps answers reproducible.
LLAMA_3_1 = LLAMA_3._replace(
    mark="<|eom_id|>", system_prefix="Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n")


@contextmanager
def library_errors(where):
    """Errors of the tokenizers library, also its panics, which are no Exceptions, become a ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, ValueError, OSError):
        raise
    except BaseException as error:
        raise ValueError(f"{where}: {error}") from None


class Tokenizer:
    """Text <-> ids by a `tokenizer.json`, of Qwen2's form or another, at any vocabulary size.

    Text typed by a user never becomes a control token: `<|im_end|>` in a prompt is tokenized as plain
    characters, whatever tokenizer.json says of it; so is everything that it calls special.

    special   {control token: id, None if there is none}, without what stands for unknown characters
    n_text    the number of tokens without BLIP3-o's three; vocab_size: with them
    format    the ChatFormat, None if it is none that is known here
    pad_id    what fills rows up; any id does, for it is masked
    """

    def __init__(self, bpe):
        self.bpe = bpe
        self.bpe.encode_special_tokens = True
        self.bpe.no_truncation()                                     # callers decide, as in transformers
        self.bpe.no_padding()
        ids = bpe.get_vocab()
        self.format = next((f for f in (CHATML, LLAMA_3_1, LLAMA_3) if f.control <= ids.keys()), None)
        unknown = bpe.encode("\ufdd0", add_special_tokens=False).ids  # no character: [UNK], bytes or nothing
        own = [token.content for i, token in sorted(bpe.get_added_tokens_decoder().items())
               if token.special and token.content and i not in unknown]
        names = dict.fromkeys((*SPECIAL, *own, *(self.format.control if self.format else ())))
        self.special = {name: ids.get(name) for name in names}
        if self.special["[IMG]"] is None:  # a plain language model's: BLIP3-o adds three
            n = max(ids.values(), default=-1) + 1
            self.special.update({name: n + i for i, name in enumerate(SPECIAL[-3:])})
        self.n_text, self.vocab_size = self.special["[IMG]"], self.special["[IMG]"] + 3
        self.names = {i: s for s, i in self.special.items() if i is not None}
        cuts = (f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names)
        self.inside_control = re.compile("|".join(cuts))
        self.pad_id = next((i for i in map(ids.get, PADDING) if i is not None), 0)

    def __reduce__(self):
        return Tokenizer, (self.bpe,)                                # pickling forgets encode_special_tokens

    @classmethod
    def from_pretrained(cls, folder):
        """Reads folder/tokenizer.json; ValueError if it isn't there or isn't a tokenizer."""
        file = Path(folder) / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"there is no tokenizer.json in {folder}: take the model's, or make one of its "
                             "other files (transformers: AutoTokenizer.from_pretrained, save_pretrained)")
        content = read_file(file)
        model = section(parse_json(content, file), "model", file)    # the library may crash on odd JSON
        if model.get("dropout"):
            raise ValueError(f"{file} asks for dropout, so that a text's tokens are random: take it out")
        with library_errors(f"{file} isn't a tokenizer"):
            return cls(Tokenizers.from_str(content.decode("utf-8-sig")))

    def save(self, folder):
        """Writes folder/tokenizer.json."""
        with atomic_write(Path(folder) / "tokenizer.json") as temporary:
            self.bpe.save(str(temporary))

    def encode(self, text):
        """Plain text -> list of ids."""
        with library_errors("this tokenizer can't read the text"):
            # Where tokenizer.json doesn't call a control token special, it is read out of text: then the
            # text is cut inside of these tokens, or, if a normalizer makes them, into characters.
            for pieces in [text], self.inside_control.split(text), text:
                ids = [i for piece in pieces for i in self.bpe.encode(piece, add_special_tokens=False).ids]
                if self.names.keys().isdisjoint(ids):
                    return ids
        return [i for i in ids if i not in self.names]

    def decode(self, ids):
        """Ids -> text, control tokens left out."""
        ids = [int(i) for i in ids if int(i) not in self.names]
        with library_errors("this tokenizer can't write the answer"):
            return self.bpe.decode(ids, skip_special_tokens=False)

    def control(self, name):
        """The list of one id of a control token, of none for None; ValueError if the tokenizer has none."""
        if name is not None and self.special.get(name) is None:
            raise ValueError(f"tokenizer.json has no {name}: the model of this tokenizer takes no images")
        return [] if name is None else [self.special[name]]


PADDING = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<|end_of_text|>")


def chat_ids(tokenizer, turns, image_tokens=(), system=SYSTEM):
    """The chat template of the tokenizer's model. turns: [(user, assistant)], the last assistant None to
    leave its turn open.

    image_tokens[i]: the number of <|image_pad|> tokens of each image in turn i, one per merged patch; images
    stand in front of the user's text. An assistant that says just IMG or EDIT says that control token.
    Returns (ids, targets), two lists of one length; targets is True on what an assistant says, its end token
    included. The text between two control tokens is encoded in one piece, as the reference tokenizer does.
    Raises ValueError for a tokenizer of another format than ChatML (Qwen, SmolLM2) and Llama-3's.
    """
    f, encode, control = tokenizer.format, tokenizer.encode, tokenizer.control
    if f is None:
        raise ValueError(f"tokenizer.json lacks {CHATML.end} or {LLAMA_3.end} and their companions: "
                         "conversations and prompts are written in ChatML or in Llama-3's format only")

    def opening(role, text):
        if f.role_end is None:
            return control(f.start) + encode(role + f.gap + text)
        return control(f.start) + encode(role) + control(f.role_end) + encode(f.gap + text)
    closing = encode(f.after) if f.after else []
    ids = [*control(f.begin), *opening("system", f.system_prefix + system), *control(f.end), *closing]
    targets = [False] * len(ids)
    for i, (user, assistant) in enumerate(turns):
        vision = []
        for count in image_tokens[i] if i < len(image_tokens) else ():
            pads = control("<|image_pad|>") * count
            vision += control("<|vision_start|>") + pads + control("<|vision_end|>")
        message = opening("user", "") + vision + encode(user) if vision else opening("user", user)
        ids += [*message, *control(f.end), *closing, *opening("assistant", "")]
        targets += [False] * (len(ids) - len(targets))
        if assistant is not None:
            ids += (control if assistant in (IMG, EDIT) else encode)(assistant) + control(f.end)
            targets += [True] * (len(ids) - len(targets))
            ids += closing
            targets += [False] * len(closing)
    return ids, targets


def prompt_ids(tokenizer, prompt, image_tokens=0):
    """Ids of the official inference template for a prompt to generate; [IMG] and the queries follow in
    model.py.

    image_tokens: of an image in the prompt; the text then follows on a new line, without GENERATE, as in
    the official "<image>\\nPlease reconstruct the given image.".
    """
    if image_tokens:
        return chat_ids(tokenizer, [("\n" + prompt, None)], [[image_tokens]])[0]
    return chat_ids(tokenizer, [(GENERATE.format(prompt), None)])[0]


def pad(rows, value=0):
    """Lists of ids -> (ids (B, L) long, mask (B, L) bool), right-padded with `value`."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [value] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask


# ---- pixels ---------------------------------------------------------------------------------------------

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # of CLIP; EVA-CLIP and Qwen's ViT both use them
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def crop_square(image, size):
    """PIL image -> PIL (size, size): short side scaled to `size` (bicubic), centre crop, as official."""
    scale = size / min(image.size)
    w, h = (max(size, round(s * scale)) for s in image.size)
    left, top = (w - size) // 2, (h - size) // 2
    if max(w, h) > 64 * size:            # scaled whole, a line of 1 x 100000 pixels would take gigabytes
        x, y = image.width / w, image.height / h
        return image.resize((size, size), Image.BICUBIC,
                            (left * x, top * y, (left + size) * x, (top + size) * y))
    return image.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))


def to_pixels(images):
    """uint8 (B, H, W, 3) array -> float (B, 3, H, W), normalised with CLIP's mean and standard deviation."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN[:, None, None]) / STD[:, None, None]


def to_signed(pixels):
    """Normalised pixels (B, 3, H, W) -> the same in [-1, 1], as the VAE takes them."""
    mean, std = (y[:, None, None].to(pixels, non_blocking=True) for y in (MEAN, STD))
    return (pixels * std + mean) * 2 - 1


def smart_resize(height, width, factor=28, min_pixels=None, max_pixels=None):
    """(height, width) that Qwen2.5-VL scales an image to: multiples of `factor` with an area between the two
    limits.

    The limits default to 4 and 16384 cells of factor x factor (3136 and 12845056 pixels at 28, as the
    released preprocessor). Raises ValueError at an aspect ratio above 200.
    """
    low, high = min_pixels or 4 * factor ** 2, max_pixels or 16384 * factor ** 2
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"the image is {width} x {height}: Qwen2.5-VL takes aspect ratios up to 200")
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > high:
        beta = math.sqrt(height * width / high)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < low:
        beta = math.sqrt(low / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


def to_patches(pixels, patch=14, merge=2, frames=2):
    """Normalised (B, 3, H, W) -> (patches (B*N, 3*frames*patch*patch), grid (B, 3)) in Qwen's merge-block
    order.

    N = H/patch * W/patch. Each merge x merge block's patches follow each other; a still image is repeated
    `frames` times.
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


# What preprocessor_config.json may say beside the limits: the only values implemented here.
PIXEL_SETTINGS = {
    "image_mean": (MEAN.tolist(),), "image_std": (STD.tolist(),), "rescale_factor": (1 / 255,),
    "resample": (3,), "temporal_patch_size": (2,), "do_center_crop": (False,), "do_pad": (False,),
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), (True,))}


def read_pixel_limits(folder, patch=14, merge=2):
    """{"min_pixels", "max_pixels"} of a model folder as far as it says them: in processor_config.json, under
    "image_processor", as transformers 5 writes, else in preprocessor_config.json; there as "size", too.

    Raises ValueError for a file that asks for another preprocessing than this one.
    """
    file = Path(folder) / "processor_config.json"
    raw = read_json(file).get("image_processor") if file.exists() else None
    if raw is None:
        file = Path(folder) / "preprocessor_config.json"
        raw = read_json(file) if file.exists() else {}
    raw = {name: value for name, value in typed(raw, dict, None, f"{file}: image_processor").items()
           if value is not None}
    require_settings(raw, {**PIXEL_SETTINGS, "patch_size": (patch,), "merge_size": (merge,)}, file)
    size = typed(raw.get("size", {}), dict, None, f"{file}: size")
    names = {"min_pixels": "min_pixels", "shortest_edge": "min_pixels", "max_pixels": "max_pixels",
             "longest_edge": "max_pixels"}                           # under "size", in the order of versions
    limits = {names[name]: size[name] for name in names if size.get(name) is not None}
    limits |= {name: raw[name] for name in names.values() if name in raw}  # these win, as in transformers
    limits = {name: typed(value, int, COUNT, f"{file}: {name}") for name, value in limits.items()}
    if size.keys() - names:
        raise ValueError(f"{file} has the size {size}: only shortest_edge and longest_edge are implemented")
    if limits.get("min_pixels", 0) > limits.get("max_pixels", math.inf):
        raise ValueError(f"{file} has min_pixels {limits['min_pixels']} above max_pixels "
                         f"{limits['max_pixels']}")
    return limits


def preprocess_qwen(image, patch=14, merge=2, min_pixels=None, max_pixels=None):
    """PIL image of any size -> (patches (N, 3*2*patch*patch), grid (1, 3)) for Qwen's ViT."""
    h, w = smart_resize(image.height, image.width, patch * merge, min_pixels, max_pixels)
    return to_patches(to_pixels(np.asarray(image.resize((w, h), Image.BICUBIC))[None]), patch, merge)
