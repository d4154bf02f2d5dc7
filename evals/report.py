"""What all evaluations share: reading their files, intervals, tables, contact sheets and result files."""
import csv
import hashlib
import io
import json
import math
import re
import sys
import textwrap
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from checkpoint import Interval, atomic_write, parse_json, read_file, typed
from data import IMAGE_SUFFIXES, OTHER_IMAGES, BadSample, load_image

BATCH = 32                                # images or questions that a model works on at a time
SHEET = 192                               # most images of a contact sheet
Z = 1.959964                              # half the width of a 95 % interval, in standard errors

# How numbers other than fractions are printed.
FORMATS = {"dB": ".2f", "points": ".1f", "SSIM": ".3f", "cosine": ".3f", "distance": ".3f", "Frechet": ".4g",
           "MMD": ".3g", "p": ".2g", "feature spread": ".3f", "pixel spread": ".3f", "gap, t = 0.02": ".4f",
           "gap, t = 0.05": ".4f", "seconds": ".0f", "core-seconds": ".3f", "relative distance": ".4f"}


def wilson(count, n, z=Z):
    """(low, high): Wilson's 95 % interval of a fraction: `count` (maybe not whole) of `n` independent
    trials."""
    fraction, spread = count / n, z * z / n
    middle = fraction + spread / 2
    half = z * math.sqrt(fraction * (1 - fraction) / n + spread / (4 * n))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def rate(verdicts):
    """Booleans, or scores from 0 to 1 -> {"score": their mean, "low", "high": Wilson's interval, "n"}."""
    verdicts = list(verdicts)
    low, high = wilson(sum(verdicts), len(verdicts))
    return {"score": sum(verdicts) / len(verdicts), "low": low, "high": high, "n": len(verdicts)}


def by_skill(tags, verdicts):
    """Skills and booleans of images -> {skill or "overall": {"score", "low", "high", "n"}}.

    "overall" is GenEval's unweighted mean of the skills. Its interval is Wilson's with the number of
    trials that gives a mean of unequal groups the same variance; images count as independent, also
    those of one prompt.
    """
    table = {skill: rate(verdict for tag, verdict in zip(tags, verdicts) if tag == skill)
             for skill in dict.fromkeys(tags)}
    rows = list(table.values())
    score = sum(row["score"] for row in rows) / len(rows)
    trials = len(rows) ** 2 / sum(1 / row["n"] for row in rows)
    low, high = wilson(score * trials, trials)
    table["overall"] = {"score": score, "low": low, "high": high, "n": sum(row["n"] for row in rows)}
    return table


def fingerprint(content):
    """16 hex digits that distinguish contents (bytes, or anything that JSON can hold)."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return hashlib.sha256(content).hexdigest()[:16]


# ---- reading what people bring --------------------------------------------------------------------------

# How files begin that are brought in the place of text.
SIGNATURES = {
    b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text", b"PK\3\4": "a zip archive or a spreadsheet (.xlsx)",
    b"\xd0\xcf\x11\xe0": "a spreadsheet (.xls)", b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2", b"\xfd7zXZ": "compressed with xz",
    b"(\xb5/\xfd": "compressed with zstd", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive",
    b"\x89PNG": "an image", b"\xff\xd8\xff": "an image", b"%PDF": "a PDF", b"SQLite format 3": "a database",
    b"\x93NUMPY": "a NumPy array", b"\x89HDF": "an HDF5 file", b"\x80\x04": "a pickle",
    b"<!DOCTYPE": "a web page", b"<!doctype": "a web page", b"<html": "a web page"}
LISTS = ("questions", "annotations", "data")        # fields of an official file that hold its entries


def say(sentence):
    """Tell a person, on stderr, what an evaluation passes over."""
    print(f"eval.py: {sentence}", file=sys.stderr)


def read_text(path):
    """The text of a file; ValueError if it is empty, or not UTF-8: then it says what it is, if that is
    known."""
    content = read_file(path)
    if Path(path).suffix.lower() == ".csv":
        raise ValueError(f"{path} is a CSV table: convert it to .tsv (cells separated by tabs) or .jsonl")
    kinds = [kind for start, kind in SIGNATURES.items() if content.startswith(start)]
    if content[257:262] == b"ustar":
        kinds.append("a tar archive")
    if kinds:
        raise ValueError(f"{path} is {kinds[0]}: only UTF-8 text is read here (.tsv, .jsonl, .json, .txt)")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} isn't UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def parse_records(path):
    """The JSON values of a file: one a line, or a list, or an object of objects, or an object with a list in
    one of LISTS. A .json file may hold lines, too, as POPE's do."""
    text = read_text(path)
    by_line = Path(path).suffix.lower() != ".json" and not text.lstrip().startswith("[")
    first, _, rest = text.strip().partition("\n")
    if rest and not by_line:
        with suppress(ValueError):                                   # else the whole file is one value
            by_line = bool(parse_json(first, path))
    if by_line:
        return [parse_text(line, f"{path}, line {number}", JSON_TYPES)
                for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    whole = parse_text(text, path, (list, dict))
    if isinstance(whole, dict):
        whole = next((whole[name] for name in LISTS if isinstance(whole.get(name), list)), whole)
    if isinstance(whole, dict) and any(isinstance(row, dict) for row in whole.values()):
        return [{"key": key, **row} if isinstance(row, dict) else row for key, row in whole.items()]
    return whole if isinstance(whole, list) else [whole]


JSON_TYPES = (dict, list, str, int, float, bool, type(None))


def parse_text(text, where, kinds):
    """checkpoint.parse_json; ValueError also for half of a surrogate pair, which can't be written again."""
    value = parse_json(text, where, kinds)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (UnicodeEncodeError, RecursionError):
            raise ValueError(f"{where} holds half a character (a lone surrogate): that is no text") from None
    return value


def read_records(path, need=None, unit="entry"):
    """The objects of a .jsonl file (one a line) or a .json file: a list, {key: object}, then with the field
    "key", or {"questions", "annotations" or "data": list}.

    need: {field: its type, as checkpoint.typed takes it}; other fields are as they are. Raises ValueError
    naming the line or entry (unit) that is cut short or broken, or lacks a field, or has it of another type.
    """
    rows = parse_records(path)
    if not rows:
        raise ValueError(f"{path} has no entries")
    records = []
    for number, row in enumerate(rows, 1):
        where = f"{unit} {number} of {path}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no object with fields")
        records.append(row | check_fields(row, need or {}, where))
    return records


def check_fields(row, need, where):
    """{field: value} of a JSON object for all of need {field: type}; ValueError, which begins with `where`,
    if one is missing or of another type."""
    if absent := [name for name in need if name not in row]:
        raise ValueError(f"{where} lacks the field {', '.join(absent)}")
    return {name: typed(row[name], hint, Interval(), f"{where}: {name}") for name, hint in need.items()}


def read_table(path):
    """The rows of a TSV file as dicts without empty cells; ValueError where one has not as many cells
    as the header. Empty rows are passed over."""
    csv.field_size_limit(2 ** 31 - 1)                                # a cell can be an image
    try:
        header, *lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    except csv.Error as error:
        raise ValueError(f"{path} isn't a table of cells separated by tabs: {error}") from None
    if len(header) == 1:
        raise ValueError(f"{path} has no tabs in its first line: the cells of a .tsv are separated by them")
    if twice := [name for name, times in Counter(filter(None, header)).items() if times > 1]:
        raise ValueError(f"{path} has two columns {twice[0]!r}")
    rows = []
    for number, cells in enumerate(lines, 1):
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise ValueError(f"row {number} of {path} has {len(cells)} cells, not {len(header)}: is it cut "
                             "short, or does a quotation mark not end?")
        rows.append({name: cell for name, cell in zip(header, cells) if cell})
    if not rows:
        raise ValueError(f"{path} has a header, but no rows")
    return rows


def distinct_files(files):
    """The files without copies of earlier ones, which would count twice: these are said."""
    seen = {}
    for file in files:
        key = fingerprint(read_file(file))
        if key in seen:
            say(f"{file} is the same as {seen[key]}: it counts once")
        seen.setdefault(key, file)
    return list(seen.values())


def read_images(folder, least=1):
    """The images below a folder, by name, in lists of up to BATCH (file, PIL image).

    Hidden files don't count. Broken images are passed over and said, as are images of other formats. Raises
    ValueError for fewer images than `least`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of images")
    files = sorted(p for p in folder.rglob("*")
                   if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    suffixes = Counter(p.suffix.lower() for p in files)
    others = ", ".join(f"{suffixes[suffix]} {suffix}" for suffix in OTHER_IMAGES if suffixes[suffix])
    files = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    if len(files) < least:
        found = f"{len(files) or 'no'} image{'s' * (len(files) > 1)} ({', '.join(IMAGE_SUFFIXES)})"
        raise ValueError(f"{found} in {folder}" + f": {least} are the least" * (least > 1)
                         + f"; {others} can't be read" * bool(others))
    if others:
        say(f"{others} in {folder} are left out: only {', '.join(IMAGE_SUFFIXES)} are read")
    return load_images(folder, files, least)


def load_images(folder, files, least):
    """The generator of `read_images`."""
    broken = []
    for i in tqdm(range(0, len(files), BATCH), disable=None):
        batch = []
        for file in files[i:i + BATCH]:
            try:
                batch.append((file, load_image(file)))
            except BadSample as error:
                broken.append(error)
        if batch:
            yield batch
    if len(files) - len(broken) < least:
        raise ValueError(f"{len(broken)} of {len(files)} images in {folder} can't be read ({broken[0]}): "
                         f"{least} are the least")
    if broken:
        say(f"{len(broken)} of {len(files)} images in {folder} can't be read and are left out: {broken[0]}")


def in_batches(items, work, size=None):
    """Yield (item, result, None) for each item, of work(up to `size` items) -> results. Where that fails, it
    is done item by item, and what still fails is (item, None, its ValueError): one item stops no run.

    Raises the error where all of the first batch fail alike: then it isn't the items.
    """
    any_done, size = False, size or BATCH
    for i in tqdm(range(0, len(items), size), disable=None):
        batch = items[i:i + size]
        try:
            results = [(item, result, None) for item, result in zip(batch, work(batch), strict=True)]
        except ValueError:
            results = [one_by_one(item, work) for item in batch]
        errors = [error for _, _, error in results]
        any_done |= None in errors
        if not any_done and len(set(map(str, errors))) == 1 and not isinstance(errors[0], BadSample):
            raise errors[0]
        yield from results


def one_by_one(item, work):
    """(item, its result, None), or (item, None, the ValueError)."""
    try:
        return item, work([item])[0], None
    except ValueError as error:
        return item, None, error


# ---- writing --------------------------------------------------------------------------------------------

def write_text(path, text):
    """Write text such that the file is there whole or not at all."""
    with atomic_write(path) as part:
        part.write_text(text, "utf-8")


def write_image(path, image):
    """Write a uint8 image (H, W, 3) as PNG such that the file is there whole or not at all."""
    with atomic_write(path) as part:
        Image.fromarray(image).save(part, "PNG")


def format_cell(key, value, row):
    """One number of a table row as text: see `print_table`."""
    if key == "score":
        return f"{100 * value:5.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    if key in FORMATS:
        return f"{key} {value:{FORMATS[key]}}"
    return f"{key} {100 * value:.1f} %" if isinstance(value, float) else f"{key} {value}"


def print_table(title, table):
    """Print {row: {column: value}}: fractions in per cent, "score" with its interval in brackets,
    FORMATS as they are."""
    print(f"\n{title}")
    for name, row in table.items():
        cells = [format_cell(key, value, row) for key, value in row.items() if key not in ("low", "high")]
        print(f"  {name:<26}" + "   ".join(cells))


def save_results(args, results, name=None):
    """Write the settings and results of a command as OUT/NAME.json (NAME: the command's) and print the
    file's name."""
    file = Path(args.out) / f"{name or args.command}.json"
    write_text(file, json.dumps({"settings": vars(args), **results}, indent=1) + "\n")
    print(file)


def jpeg(image):
    """uint8 (H, W, 3) -> the same after JPEG at quality 75."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file).convert("RGB"))


def contact_sheet(images, labels, verdicts, columns, side=128):
    """uint8 images (H, W, 3), scaled to `side` pixels, framed green (True), red (False) or not (None), with
    labels below -> PIL image."""
    edge, texts = 4, [textwrap.fill(label, side // 6) for label in labels]
    text = max([40, *(13 * len(label.splitlines()) + 4 for label in texts)])         # pixels of the labels
    cell_w, cell_h = side + 4 * edge, side + 3 * edge + text
    sheet = Image.new("RGB", (columns * cell_w, -(-len(images) // columns) * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, label, hit) in enumerate(zip(images, texts, verdicts)):
        x, y = i % columns * cell_w + edge, i // columns * cell_h + edge
        end = side + 2 * edge - 1
        frame = {None: "white", True: (30, 160, 60), False: (215, 40, 40)}[hit]
        pen.rectangle((x, y, x + end, y + end), frame)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.BOX), (x + edge, y + edge))
        pen.multiline_text((x, y + side + 2 * edge + 1), label, "black", spacing=1)
    return sheet
