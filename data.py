"""Data: captioned images and conversations -> Examples; prompts, tokens and pixels.

    a source (Shards) -> item -> a task (CaptionTask) -> Example -> train.py collates a batch of them

Sample p of a run is a pure function of (seed, p), whatever the processes and workers. In reading order:
Example, tasks and Samples; where samples lie on disk; Shards; the cache of frozen features; tokens and the
chat template; pixels. B batch, L tokens, S the side of a square image, H W pixels, N patches, C channels.
"""
import hashlib
import io
import json
import math
import os
import sys
import tarfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Tokenizers
from tqdm import tqdm

from checkpoint import atomic_write

# The prompts of the official system, and two of ours: prompt upsampling (Betker et al. 2023, section 3.5)
# and the question of VQAScore (arXiv 2404.01291).
SYSTEM = "You are a helpful assistant."
GENERATE = "Please generate image based on the following caption: {}"
RECONSTRUCT = "Please reconstruct the given image."
DESCRIBE = "Describe this image."
UPSAMPLE = "Describe an image of the following caption in full: {}"
MATCH = 'Does this image show "{}"? Answer yes or no.'

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LEFT_OUT = ("no caption", "no image", "link")         # reasons for skipping, counted while indexing
INDEX_FOLDER = Path("runs/index")                     # where the index of the shards is kept
MAX_UNREADABLE = 100                                  # broken samples in a row that end a run


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
    turns_image: np.ndarray | None = None        # the image that the conversation is about, uint8 (S, S, 3)
    hard_negative: str | None = None             # a prompt that must fit worse; probes only
    query_targets: np.ndarray | None = None      # (n_query, D), where a task supervises the queries' states
    skipped: list = ()                           # (cause, name) of broken items passed over


class BadSample(ValueError):
    """An unusable sample. cause: why, in two or three words, to count by."""

    def __init__(self, cause, message):
        super().__init__(message)
        self.cause = cause


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
        """An item {"image" or "features", "caption", "captions", "turns"} -> Example; raises BadSample."""
        caption, image = self.choose_caption(item, rng), item.get("image")
        if caption is None and not self.converse:
            raise BadSample("no caption", "a conversation without a caption")
        if self.converse == 1 or self.converse and (caption is None or rng.random() < self.converse):
            turns = item.get("turns") or [("<image>" + DESCRIBE, caption)]
            # LLaVA's <image> mark is dropped: the image always precedes the text.
            shows = any("<image>" in user for user, _ in turns)
            turns = [(user.replace("<image>", "").strip(), assistant) for user, assistant in turns]
            return Example(rng, turns=turns, turns_image=image if shows else None)
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
        the position's own first. Raises ValueError if MAX_UNREADABLE items in a row are broken."""
        skipped = []
        while len(skipped) < MAX_UNREADABLE:
            i = self.source.index(position, len(skipped), self.seed, self.held_out)
            rng = np.random.default_rng((self.seed, position, 1))
            try:
                example = self.task(self.source[i], rng)
                example.skipped = skipped
                return example
            except BadSample as error:
                skipped.append((error.cause, self.source.name(i)))
                last = error
        raise ValueError(f"{MAX_UNREADABLE} samples in a row can't be read; "
                         f"the last: {last} ({skipped[-1][1]})")


# ---- reading one sample ---------------------------------------------------------------------------------

def load_image(file):
    """An image file (path or binary file object) as an RGB PIL image, upright (EXIF), transparency on white,
    first frame.

    Raises BadSample with one sentence if the file isn't a readable image.
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
    except Exception as error:  # broken bytes make PIL raise half a dozen kinds
        causes = {FileNotFoundError: "no image", UnidentifiedImageError: "not an image",
                  Image.DecompressionBombError: "too many pixels"}
        name = file if isinstance(file, (str, Path)) else "this member"
        cause = causes.get(type(error), "broken image")
        raise BadSample(cause, f"{name} can't be read as an image: {error}") from None


def read_texts(text, record):
    """The bytes of a key.txt (or None) and a dict with "caption", "captions", "short_caption" and
    "conversations" in any combination -> {"caption": str, "captions": [str, ...], "turns": [(user,
    assistant), ...]}, each if there is one.

    captions: the long ones first, the short one last. "turns" keep the <image> marks of LLaVA's
    conversations.
    """
    try:
        captions = [None if text is None else text.decode("utf-8"), record.get("caption")]
        captions += (record.get("captions") or []) + [record.get("short_caption")]
        captions = [caption.strip() for caption in captions if caption is not None]
        messages = [m for m in record.get("conversations") or [] if m["from"] != "system"]
        roles, words = [m["from"] for m in messages], [m["value"].strip() for m in messages]
        "".join(captions + words).encode("utf-8")                    # JSON can hold half a character
    except UnicodeError:
        raise BadSample("not UTF-8", "the caption isn't UTF-8 text") from None
    except (AttributeError, KeyError, TypeError):
        raise BadSample("broken JSON",
                        "captions must be strings, conversations lists of {'from', 'value'}") from None
    turns = list(zip(words[::2], words[1::2]))
    if roles != ["human", "gpt"] * len(turns) or not all(user and assistant for user, assistant in turns):
        raise BadSample("broken conversation",
                        "a conversation must alternate between human and gpt, and end with gpt")
    texts = {"turns": turns} if turns else {}
    distinct = list(dict.fromkeys(filter(None, captions)))
    if distinct:
        texts |= {"caption": distinct[0], "captions": distinct}
    if not texts:
        raise BadSample("empty caption" if captions else "no caption", "there is no caption")
    return texts


# ---- where samples lie: tar shards, JSONL files and folders are scanned once ----------------------------

# Index row: offset and size of image, .txt and .json; offset -1 if absent.
ABSENT = (-1, 0)


def scan_shard(path):
    """Offsets of the samples in a tar shard or a JSONL file, in file order.

    Returns rows (n, 6) int64, and how many members are left out for each cause of LEFT_OUT. Raises
    ValueError if it isn't a tar archive.
    """
    rows, left_out = scan_jsonl(path) if path.suffix == ".jsonl" else scan_tar(path)
    return np.array(rows, np.int64).reshape(-1, 6), np.array(left_out)


def scan_jsonl(path):
    """Rows of a JSONL file: the line is the sample's .json."""
    rows, at = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                rows.append((*ABSENT, *ABSENT, at, len(line)))
            at += len(line)
    return rows, (0, 0, 0)


def scan_tar(path):
    """Rows of a tar shard: images with texts of the same stem. Links are ignored: they may lead outside."""
    members, links = {"image": {}, ".txt": {}, ".json": {}}, set()     # kind -> stem -> (offset, size)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, dot, suffix = member.name.rpartition(".")
                suffix = dot + suffix.lower()
                kind = "image" if suffix in IMAGE_SUFFIXES else suffix
                if kind in members and member.isfile():
                    members[kind][stem] = member.offset_data, member.size
                elif kind == "image":
                    links.add(stem)
    except tarfile.TarError as error:
        raise ValueError(f"{path} isn't a readable tar shard: {error}") from None
    images, texts, records = members["image"], members[".txt"], members[".json"]
    rows = [(*place, *texts.get(stem, ABSENT), *records.get(stem, ABSENT))
            for stem, place in images.items() if stem in texts or stem in records]
    without_image = (texts.keys() | records.keys()) - images.keys() - links
    return rows, (len(images) - len(rows), len(without_image), len(links))


def scan_folder(path, names):
    """Like scan_shard, for a folder: an image's offset and size point into `names`, the concatenated paths;
    texts have (0, 0) if present."""
    files = sorted(path.rglob("*"))
    stems = {suffix: {f.with_suffix("") for f in files if f.suffix == suffix}
             for suffix in (".txt", ".json")}
    images = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES]
    rows = []
    for image in images:
        stem, name = image.with_suffix(""), os.fsencode(image)
        if any(stem in with_text for with_text in stems.values()):
            texts = [(0, 0) if stem in with_text else ABSENT for with_text in stems.values()]
            rows.append((len(names), len(name), *texts[0], *texts[1]))
            names += name
    without_image = (stems[".txt"] | stems[".json"]) - {image.with_suffix("") for image in images}
    left_out = np.array([len(images) - len(rows), len(without_image), 0])
    return np.array(rows, np.int64).reshape(-1, 6), left_out


@contextmanager
def file_lock(file):
    """Of the processes that start together, let one build the index and the others wait for it.

    Best effort: without locks (Windows, a read-only disk) each builds its own; writes are atomic.
    """
    lock = None
    try:
        import fcntl  # not on Windows
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file.with_suffix(".lock"), "w")                  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (OSError, ImportError):
        pass
    try:
        yield
    finally:
        if lock:
            lock.close()


class ShardScan(torch.utils.data.Dataset):
    """The shards to scan, as a dataset: DataLoader's processes divide the work."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        """What `scan_shard` returns, or (None, the sentence that it raises)."""
        try:
            return scan_shard(self.paths[i])
        except ValueError as error:
            return None, str(error)


def scan_shards(paths):
    """[(rows, left_out)] of many shards, by several processes where they are many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loader = torch.utils.data.DataLoader(
        ShardScan(paths), batch_size=None, collate_fn=tuple,
        generator=torch.Generator(),  # its own: the run's noise stays as it is
        num_workers=min(16, cores) if cores > 1 and len(paths) > 100 else 0)
    scans = []
    for rows, left_out in tqdm(loader, desc="indexing shards", leave=False,
                               disable=None if len(paths) > 20 else True):
        if rows is None:
            raise ValueError(left_out)
        scans.append((rows, left_out))
    return scans


def load_index(file, count):
    """(rows (n, 6), shards (count, 6)) of an index file; of no shard where the file is absent, broken or
    another's."""
    try:
        stored = load_file(file)
        rows, shards = stored["rows"], stored["shards"]
        complete = len(shards) == count and shards[:, 2].sum() == len(rows)
        if complete and rows.sum() + shards.sum() == stored["sum"]:
            return rows, shards
    except (OSError, SafetensorError, KeyError, IndexError):
        pass
    return torch.empty(0, 6, dtype=torch.int64), torch.tensor([[-1, -1, 0, 0, 0, 0]] * count)


def index_shards(paths):
    """`scan_shard` of many files, cached: (rows (n, 6) of all, shards (S, 6)), two
    int64 tensors.

    shards: size, mtime, number of samples, then the counts of LEFT_OUT. The file in INDEX_FOLDER is
    named after the list of paths; a shard whose size or time has changed is scanned again. All processes of
    a machine share the file's pages as they are on disk: the rows of 30 million samples take 1.4 GB of
    memory once, not once a worker.
    """
    absolute_paths = "\n".join(map(os.path.abspath, paths))
    file = INDEX_FOLDER / f"{hashlib.sha256(absolute_paths.encode()).hexdigest()[:16]}.safetensors"
    stamps = torch.tensor([(s.st_size, s.st_mtime_ns) for s in map(os.stat, paths)])  # (S, 2)
    with file_lock(file):
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
                save_file({"rows": rows, "shards": shards, "sum": rows.sum() + shards.sum()}, temporary)
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


class Shards:
    """Captioned images from tar shards, JSONL files and folders, mixed in given fractions.

    A sample is key.jpg (.jpeg, .png, .webp) with key.txt or key.json or both; or a line of a JSONL file, its
    "image" a path relative to that file. sources: [(paths, fraction)], the fractions exact Fractions or
    None: those without one are one source together, which gets what the others leave. size: side S of the
    square images. Item i costs one seek. With a FeatureCache as `cache`, items hold the features of their
    image instead of the image. Raises ValueError if a path is missing, a source holds no sample, or the
    fractions don't fit together.
    """

    def __init__(self, sources, size=64):
        groups = self.weighted_groups(sources)
        self.size, self.cache, self.orders = size, None, {}          # orders: see `index`
        self.paths = [Path(path) for paths, _ in groups for path in paths]
        for path in self.paths:
            if not path.exists():
                raise ValueError(f"there is no shard or folder at {path}")
        files, names = [path for path in self.paths if not path.is_dir()], bytearray()
        rows, shards = index_shards(files) if files else torch.empty(2, 0, 6, dtype=torch.int64)
        indexed = zip(rows.split(shards[:, 2].tolist()), shards[:, 3:].numpy())
        scans = [scan_folder(path, names) if path.is_dir() else next(indexed) for path in self.paths]
        self.rows = [torch.as_tensor(table) for table, _ in scans]
        self.names = torch.frombuffer(names, dtype=torch.uint8) if names else None
        self.ends = np.cumsum([len(table) for table in self.rows])
        self.left_out = dict(zip(LEFT_OUT, np.sum([left_out for _, left_out in scans], 0).tolist()))
        self.parts = list(self.make_parts(groups))
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

    def make_parts(self, groups):
        """The Part of each group of paths."""
        held_out, first, shard = held_out_items(len(self)), 0, 0
        for paths, fraction in groups:
            shard += len(paths)
            end = int(self.ends[shard - 1])
            if first == end:
                where = ", ".join(map(str, paths))
                raise ValueError(f"no image with a caption (name.jpg + name.txt) in {where}")
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
            order = np.random.default_rng((seed, epoch, number)).permutation(length)
            self.orders[number] = (seed, epoch), order.astype(np.uint32 if length < 2 ** 32 else np.uint64)
        return part.training_item(int(self.orders[number][1][at]))

    def place(self, i):
        """Item i -> (path of its shard, JSONL file or folder, its row in the index, its number in there)."""
        shard = int(np.searchsorted(self.ends, i, "right"))
        i -= int(self.ends[shard]) - len(self.rows[shard])
        return self.paths[shard], self.rows[shard][i].tolist(), i

    def path_in_folder(self, row):
        """The path of an image in a folder, from its row."""
        return os.fsdecode(self.names[row[0]:row[0] + row[1]].numpy().tobytes())

    def name(self, i):
        """Human-readable location of item i."""
        path, row, number = self.place(i)
        if path.suffix == ".jsonl":
            return f"{path}, sample {number + 1}"
        if path.is_dir():
            return self.path_in_folder(row)
        with open(path, "rb") as file:
            header = read_at(file, row[0] - 512, 512)
        return f"{path}: {header[:100].rstrip(bytes(1)).decode('utf-8', 'replace')}"

    def fingerprint(self):
        """A hash of all shards and images in folders: name, size and time of change."""
        digest = hashlib.sha256()
        for path, rows in zip(self.paths, self.rows):
            files = map(self.path_in_folder, rows.tolist()) if path.is_dir() else [path]
            for file in files:
                stamp = os.stat(file)
                digest.update(f"{Path(file).name} {stamp.st_size} {stamp.st_mtime_ns} ".encode())
            digest.update(f"{path.name} {len(rows)}\n".encode())
        return digest.hexdigest()[:16]

    def __getitem__(self, i):
        """{"image": uint8 (S, S, 3) or "features", and what `read_texts` returns}; raises BadSample."""
        if self.cache is not None:
            _, texts = self.read(i, texts_only=True)
            return {"features": self.cache[i], **texts}
        image, texts = self.read(i)
        image = load_image(io.BytesIO(image) if isinstance(image, bytes) else image)
        return {"image": np.asarray(crop_square(image, self.size)), **texts}

    def read(self, i, texts_only=False):
        """(the image's bytes or path, what `read_texts` returns) of item i; raises BadSample if the texts
        can't be used.

        With texts_only, the image isn't read.
        """
        path, row, _ = self.place(i)
        if texts_only:
            row[0:2] = row[0:2] if path.is_dir() else ABSENT
        image, text, record = (self.read_folder if path.is_dir() else self.read_shard)(path, row, texts_only)
        try:
            record = {} if record is None else dict(json.loads(record))
            image = path.parent / record["image"] if path.suffix == ".jsonl" else image
        except KeyError:
            raise BadSample("no image", 'a line of a JSONL file needs an "image"') from None
        except (ValueError, TypeError, RecursionError) as error:
            raise BadSample("broken JSON", f"this can't be read as a JSON object: {error}") from None
        texts = read_texts(text, record)
        if image == b"":
            raise BadSample("empty image", "the image has no bytes")
        return image, texts

    @staticmethod
    def read_shard(path, row, texts_only):
        """The bytes of image, .txt and .json of a row of a tar shard or JSONL file, None where absent."""
        with open(path, "rb", buffering=0) as file:
            return [read_at(file, at, size) if at >= 0 else None for at, size in zip(row[::2], row[1::2])]

    def read_folder(self, path, row, texts_only):
        """The same of a folder."""
        image = Path(self.path_in_folder(row))
        files = (None if texts_only else image, image.with_suffix(".txt"), image.with_suffix(".json"))
        try:
            return [file.read_bytes() if file and at >= 0 else None for at, file in zip(row[::2], files)]
        except OSError as error:                                     # it went away, or is a folder
            raise BadSample("no image", str(error)) from None


def read_at(file, offset, size):
    """`size` bytes of a binary file."""
    file.seek(offset)
    return file.read(size)


def open_source(spec, size=64, seed=0):
    """`--data` as a source of items with images of side `size`: comma-separated tar shards, folders, JSONL
    files or glob patterns, each with its fraction of all samples if it ends in =fraction
    (long/*.tar,short/*.tar=0.1).

    None is the synthetic world of the miniature, number `seed`. Raises ValueError where a pattern matches
    nothing.
    """
    if spec is None:
        from miniature.tasks import World
        return World(seed, size)
    sources = []
    for part in spec.split(","):
        fraction, (path, _, number) = None, part.rpartition("=")
        if path and not Path(part).exists():
            with suppress(ValueError, ZeroDivisionError):            # no number: a part of the name
                part, fraction = path, Fraction(number)
        paths = [part]
        if any(c in part for c in "*?["):
            paths = sorted(Path("/" if part.startswith("/") else ".").glob(part.lstrip("/")))
        if not paths:
            raise ValueError(f"no file matches {part}")
        sources.append((paths, fraction))
    return Shards(sources, size)


# ---- a cache of frozen encoders' features ---------------------------------------------------------------

class FeatureCache:
    """Features of the items of Shards on disk: folder/<name>/NNNNNN.safetensors, 1024 items in each.

    The name is a hash of encoders, preprocessing and shards: where they change, a new cache is made. (Images
    that a JSONL file names are not looked at.) Each file is written whole, so a crash loses only its file.
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

    def fill(self, source, encode, batch, workers=0, rank=0, world=1, quiet=False):
        """Write this process's part of the files that are missing. encode: pixels (B, 3, S, S) -> {name:
        (B, ...)}."""
        numbers = range(rank, math.ceil(len(source) / self.items_per_file), world)
        missing = [number for number in numbers if not self.file(number).exists()]
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
            with atomic_write(self.file(number)) as temporary:
                save_file({key: torch.cat(parts) for key, parts in features.items()}, temporary,
                          {"bad": json.dumps(bad)})

    def __getitem__(self, i):
        """{name: tensor} of item i; raises the BadSample that its image raised."""
        number, row = divmod(i, self.items_per_file)
        if number not in self.opened:
            file = safe_open(self.file(number), framework="pt")
            self.opened[number] = file, json.loads(file.metadata()["bad"])
        file, bad = self.opened[number]
        if str(i) in bad:
            raise BadSample(*bad[str(i)])
        return {key: file.get_slice(key)[row] for key in file.keys()}  # noqa: SIM118 - a file, not a dict


class ItemImages(torch.utils.data.Dataset):
    """The images of a source by item (S, S, 3), or (cause, sentence) where one can't be used."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            return self.source[i]["image"]
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


class Tokenizer:
    """Text <-> ids by a `tokenizer.json` of the Qwen2 form, at any vocabulary size.

    Text typed by a user never becomes a control token: `<|im_end|>` in a prompt is tokenized as plain
    characters.
    """

    def __init__(self, bpe):
        self.bpe = bpe
        self.bpe.encode_special_tokens = True
        self.special = {s: bpe.token_to_id(s) for s in SPECIAL}
        if self.special["[IMG]"] is None:  # a plain language model's: BLIP3-o adds three
            self.special.update({s: bpe.get_vocab_size() + i for i, s in enumerate(SPECIAL[-3:])})
        self.vocab_size = self.special["[IMG]"] + 3
        self.names = {i: s for s, i in self.special.items()}

    def __reduce__(self):
        return Tokenizer, (self.bpe,)                                # pickling forgets encode_special_tokens

    @classmethod
    def from_pretrained(cls, folder):
        """Reads folder/tokenizer.json; ValueError if it isn't there or isn't a tokenizer."""
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"there is no tokenizer.json in {folder}")
        try:
            return cls(Tokenizers.from_file(str(file)))
        except Exception as error:                                   # the library raises nothing narrower
            raise ValueError(f"{file} isn't a tokenizer: {error}") from None

    def save(self, folder):
        """Writes folder/tokenizer.json."""
        with atomic_write(Path(folder) / "tokenizer.json") as temporary:
            self.bpe.save(str(temporary))

    def encode(self, text):
        """Plain text -> list of ids."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text, control tokens left out."""
        return self.bpe.decode([int(i) for i in ids if int(i) not in self.names], skip_special_tokens=False)


def chat_ids(tokenizer, turns, image_tokens=(), system=SYSTEM):
    """The Qwen2.5 chat template. turns: [(user, assistant)], the last assistant None to leave its turn open.

    image_tokens[i]: the number of <|image_pad|> tokens of each image in turn i, one per merged patch; images
    stand in front of the user's text. Returns (ids, targets), two lists of one
    length; targets is True on what an assistant says, its <|im_end|> included. The text between two control
    tokens is encoded in one piece, as the reference tokenizer does.
    """
    t = tokenizer.special
    start, end, newline = t["<|im_start|>"], t["<|im_end|>"], tokenizer.encode("\n")
    ids = [start, *tokenizer.encode(f"system\n{system}"), end, *newline]
    targets = [False] * len(ids)
    for i, (user, assistant) in enumerate(turns):
        vision = []
        for count in image_tokens[i] if i < len(image_tokens) else ():
            vision += [t["<|vision_start|>"], *[t["<|image_pad|>"]] * count, t["<|vision_end|>"]]
        message = tokenizer.encode(f"user\n{user}")
        if vision:
            message = [*tokenizer.encode("user\n"), *vision, *tokenizer.encode(user)]
        ids += [start, *message, end, *newline, start, *tokenizer.encode("assistant\n")]
        targets += [False] * (len(ids) - len(targets))
        if assistant is not None:
            ids += [*tokenizer.encode(assistant), end]
            targets += [True] * (len(ids) - len(targets))
            ids += newline
            targets += [False] * len(newline)
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


def preprocess_qwen(image, patch=14, merge=2, min_pixels=None, max_pixels=None):
    """PIL image of any size -> (patches (N, 3*2*patch*patch), grid (1, 3)) for Qwen's ViT."""
    h, w = smart_resize(image.height, image.width, patch * merge, min_pixels, max_pixels)
    return to_patches(to_pixels(np.asarray(image.resize((w, h), Image.BICUBIC))[None]), patch, merge)
