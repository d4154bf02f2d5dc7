"""What all evaluations share: reading their files, intervals, tables, contact sheets and result files."""
import hashlib
import io
import json
import math
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from checkpoint import atomic_write
from data import IMAGE_SUFFIXES, load_image

BATCH = 32                                # images or questions that a model works on at a time
SHEET = 192                               # most images of a contact sheet
Z = 1.959964                              # half the width of a 95 % interval, in standard errors

# How numbers other than fractions are printed.
FORMATS = {"dB": ".2f", "points": ".1f", "SSIM": ".3f", "cosine": ".3f", "distance": ".3f", "Frechet": ".4g",
           "MMD": ".3g", "p": ".2g", "feature spread": ".3f", "pixel spread": ".3f", "gap, t = 0.02": ".4f",
           "gap, t = 0.05": ".4f", "seconds": ".0f"}


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


def read_text(path):
    """The text of a file; ValueError if it is empty or not UTF-8."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} isn't UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def parse_records(path):
    """The JSON values of a .jsonl file (one a line) or of a .json file: see `read_records`."""
    text = read_text(path)
    whole = Path(path).suffix == ".json"
    values = []
    for number, line in enumerate([text] if whole else text.split("\n"), 1):
        try:
            if line.strip():
                values.append(json.loads(line))
        except json.JSONDecodeError as error:
            at = number + error.lineno - 1
            raise ValueError(f"{path}, line {at}, is cut short or no JSON ({error.msg})") from None
    if whole and isinstance(values[0], dict):
        return [{"key": key, **row} if isinstance(row, dict) else row for key, row in values[0].items()]
    return values[0] if whole and isinstance(values[0], list) else values


def read_records(path, need=()):
    """The objects of a .jsonl file (one a line) or a .json file: a list, or {key: object}, then with
    the field "key".

    Raises ValueError naming the line or entry that is cut short or broken, or lacks a field of `need`.
    """
    rows = parse_records(path)
    if not rows:
        raise ValueError(f"{path} has no entries")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"entry {number} of {path} is no object with fields")
        if absent := [field for field in need if field not in row]:
            raise ValueError(f"entry {number} of {path} lacks the field {', '.join(absent)}")
    return rows


def read_images(folder):
    """The images below a folder, by name, in lists of up to BATCH (file, PIL image); ValueError if
    there is none."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in {folder}")
    return ([(file, load_image(file)) for file in files[i:i + BATCH]]
            for i in tqdm(range(0, len(files), BATCH), disable=None))


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


def contact_sheet(images, labels, verdicts, columns):
    """uint8 images (H, W, 3), scaled to 128 pixels, framed green (hit) or red (miss), labels below ->
    PIL image."""
    side, edge, text = 128, 4, 40
    cell_w, cell_h = side + 4 * edge, side + 3 * edge + text
    sheet = Image.new("RGB", (columns * cell_w, -(-len(images) // columns) * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, label, hit) in enumerate(zip(images, labels, verdicts)):
        x, y = i % columns * cell_w + edge, i // columns * cell_h + edge
        end = side + 2 * edge - 1
        pen.rectangle((x, y, x + end, y + end), (30, 160, 60) if hit else (215, 40, 40))
        sheet.paste(Image.fromarray(image).resize((side, side), Image.BOX), (x + edge, y + edge))
        pen.multiline_text((x, y + side + 2 * edge + 1), textwrap.fill(label, side // 6), "black", spacing=1)
    return sheet
