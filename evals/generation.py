"""Benchmarks of text to image: GenEval, DPG-Bench, WISE, MJHQ. Published prompts in, images as the
official scorers want them; the scorers' files in, the published figures out."""
import json
import math
import os
import re
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from checkpoint import Interval, open_file, path_below, read_json
from evals.report import (
    BATCH,
    Z,
    by_skill,
    check_fields,
    distinct_files,
    fingerprint,
    in_batches,
    print_table,
    rate,
    read_records,
    read_text,
    save_results,
    say,
    write_image,
    write_text,
)
from sample import Pipeline, to_uint8

GENEVAL_SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_IMAGES = 4 * 553                  # four of each published prompt
# WISE: first and last prompt_id of a category, and its weight in the overall score.
WISE = {"cultural": (1, 400, 0.4), "time": (401, 567, 0.167), "space": (568, 700, 0.133),
        "biology": (701, 800, 0.1), "physics": (801, 900, 0.1), "chemistry": (901, 1000, 0.1)}


# ---- prompts -> images ----------------------------------------------------------------------------------

# The fields of a benchmark's entries; DPG-Bench has a text file for each prompt instead.
FIELDS = {"geneval": {"tag": str, "include": list, "prompt": str},
          "wise": {"prompt_id": int | str, "Prompt": str},
          "mjhq": {"key": int | str, "category": str, "prompt": str}}


def read_entries(bench, path):
    """The entries of a benchmark's prompt file; ValueError for another's, which it names."""
    rows = read_records(path)
    for number, row in enumerate(rows, 1):
        try:
            row |= check_fields(row, FIELDS[bench], f"entry {number} of {path}")
        except ValueError as error:
            others = [name for name, need in FIELDS.items() if need.keys() <= row.keys() and name != bench]
            hint = f": these are the prompts of --bench {others[0]}" if others else ""
            raise ValueError(f"{error}{hint}") from None
    return rows


def file_name(value, where):
    """A name of an image as a prompt file says it: no path, and a name on every system; else ValueError."""
    name = str(value)
    fits = re.fullmatch(r'[^\x00-\x1f/\\:*?"<>|]+', name) and len(name.encode()) <= 200
    if not fits or name != name.strip(". "):
        raise ValueError(f"{where}: {name[:60]!r} can't be the name of an image")
    return name


def list_files(bench, path):
    """A benchmark's image files in order, [(file, prompt, GenEval's entry or None)]: see `read_prompts`."""
    if bench == "dpg":
        if not path.is_dir():
            raise ValueError(f"the prompts of dpg are a folder of .txt files, not {path}")
        return [(f"{file.stem}.png", read_text(file), None) for file in sorted(path.glob("[!.]*.txt"))]
    if path.is_dir() and bench != "wise":
        raise ValueError(f"the prompts of {bench} are a file, not the folder {path}")
    if bench == "geneval":
        return [(f"{i:05}/samples/{k:04}.png", entry["prompt"], entry)
                for i, entry in enumerate(read_entries(bench, path)) for k in range(4)]
    files = []
    for part in sorted(path.glob("[!.]*.json")) if path.is_dir() else [path]:
        for number, row in enumerate(read_entries(bench, part), 1):
            where = f"entry {number} of {part}"
            if bench == "wise":
                files.append((f"{file_name(row['prompt_id'], where)}.png", row["Prompt"], None))
            else:
                folder, name = (file_name(row[field], where) for field in ("category", "key"))
                files.append((f"{folder}/{name}.png", row["prompt"], None))
    return files


def read_prompts(bench, path, seed=0):
    """A benchmark's prompts -> its image files in order, [{"file", "prompt", "seeds", "entry"}].

    geneval: a jsonl; for line i, I/samples/0000.png to 0003.png beside I/metadata.jsonl, the line. dpg:
    a folder of txt files; NAME.png, four images as 2 x 2. wise: a json or a folder of them;
    PROMPT_ID.png. mjhq: meta_data.json; CATEGORY/KEY.png. Seeds count all images of a prompt file, so
    that no two share one. Raises ValueError for no prompts, an empty one, another benchmark's, two for one
    file, or a name that no file can have.
    """
    files = list_files(bench, Path(path))
    if not files:
        raise ValueError(f"no prompts of {bench} in {path}")
    times = Counter(file.casefold() for file, _, _ in files)        # some file systems don't see the case
    for file, prompt, _ in files:
        if times[file.casefold()] > 1:
            raise ValueError(f"{path}: the prompt of {file} is there twice (upper and lower case count as "
                             "one)")
        if not prompt.strip():
            raise ValueError(f"{path}: the prompt of {file} is empty")
    n = 4 if bench == "dpg" else 1
    return [{"file": file, "prompt": prompt.strip(), "entry": entry,
             "seeds": [seed * 10 ** 6 + i * n + k for k in range(n)]}
            for i, (file, prompt, entry) in enumerate(files)]


def claim_folder(folder, about):
    """Note beside a folder of images what they are made with; ValueError if it holds images of other
    settings."""
    note = folder.with_suffix(".json")
    # Notes of earlier versions say less.
    if folder.exists() and (not note.exists() or about | read_json(note) != about):
        raise ValueError(f"{folder} holds images of other settings than these (see {note}): "
                         "choose another --out")
    write_text(note, json.dumps(about, indent=1) + "\n")


def is_whole(path):
    """Is there a PNG with its end? Ours are whole; a folder that was copied may hold halves."""
    with suppress(OSError, ValueError), open_file(path) as file:
        file.seek(-8, os.SEEK_END)
        return file.read() == b"IEND\xaeB`\x82"
    return False


def write_job(folder, job, images):
    """Write the uint8 images (n, H, W, 3) of a job: one as it is, four as 2 x 2; GenEval's entry goes
    beside them."""
    file = path_below(folder, job["file"], "the prompts")
    if job["entry"]:
        write_text(file.parents[1] / "metadata.jsonl", json.dumps(job["entry"]) + "\n")
    rows = [images] if len(images) == 1 else [images[:2], images[2:]]
    write_image(file, np.concatenate([np.concatenate(list(row), 1) for row in rows]))


def process_number():
    """(RANK, WORLD_SIZE) as torchrun sets them, (0, 1) without it; ValueError for numbers that can't be."""
    names = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(re.fullmatch("[0-9]{1,9}", name) for name in names) or int(names[0]) >= int(names[1]):
        raise ValueError("RANK and WORLD_SIZE must be whole numbers, RANK from 0 to below WORLD_SIZE, not "
                         f"{' and '.join(names)}")
    return int(names[0]), int(names[1])


def generate(args):
    """A benchmark's images in the layout of its scorer, in OUT/BENCH.

    The same line goes on where a run stopped; under torchrun (or with RANK and WORLD_SIZE set) each
    process makes its part. An image depends on its place in the prompt file and on --seed: not on
    batches, processes or what was there. A prompt that the model can't take, a too long one, stops no other.
    """
    jobs = read_prompts(args.bench, args.prompts, args.seed)
    folder = Path(args.out) / args.bench
    rank, world_size = process_number()
    device = args.device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    pipe = Pipeline(args.ckpt, device, args.dtype, eva=args.eva)
    claim_folder(folder, {"ckpt": args.ckpt, "model": pipe.digest, "seed": args.seed,
                          "dtype": str(pipe.precision), "sampling": pipe.sampling,
                          "prompts": fingerprint(jobs)})
    mine = jobs[rank::world_size]
    missing = [job for job in mine if not is_whole(folder / job["file"])]
    n = len(jobs[0]["seeds"])

    def draw(batch):
        prompts = [job["prompt"] for job in batch for _ in range(n)]
        seeds = [seed for job in batch for seed in job["seeds"]]
        images = to_uint8(pipe.images(prompts, seeds))               # (len(batch) * n, H, W, 3)
        pipe.negatives.clear()                                # one for each seed: they would fill the memory
        return images.reshape(len(batch), n, *images.shape[1:])
    errors = []
    for job, images, error in in_batches(missing, draw, max(1, BATCH // n)):
        if error:
            errors.append(f"{job['file']}: {error}")
        else:
            write_job(folder, job, images)
    print(f"{len(missing) - len(errors)} new files, {len(mine) - len(missing)} were there: {folder}")
    if errors:
        raise ValueError(f"{len(errors)} images can't be generated: {errors[0]}")


# ---- the official scorers' files -> the published figures -----------------------------------------------

def score_geneval(rows):
    """Lines of GenEval's evaluate_images.py -> {skill, "overall" (the published score), "prompts" (any
    image right)}.

    Raises ValueError where prompts have unequal numbers of images: the scorer was stopped.
    """
    prompts = defaultdict(list)
    for row in rows:
        if row["correct"] not in (True, False):
            raise ValueError(f"a result of the prompt {row['prompt']!r} is {row['correct']}, "
                             "not true or false")
        prompts[str(row.get("metadata", row["prompt"]))].append(row["correct"])
    if len(set(map(len, prompts.values()))) > 1:
        raise ValueError("some prompts have fewer results than others: let the scorer finish")
    if unknown := {str(row["tag"]) for row in rows} - set(GENEVAL_SKILLS):
        raise ValueError(f"{', '.join(unknown)} is no skill of GenEval")
    table = by_skill([row["tag"] for row in rows], [bool(row["correct"]) for row in rows])
    return {**table, "prompts": rate(any(verdicts) for verdicts in prompts.values())}


def wise_scores(rows):
    """Lines of WISE's gpt_eval.py -> {prompt_id: WiScore, (0.7 consistency + 0.2 realism + 0.1
    aesthetic quality) / 2}.

    Raises ValueError where a result is missing, or no number from 0 to 2 (999: the judge's answer could
    not be read).
    """
    scores = {}
    for row in rows:
        marks = [row[key] for key in ("consistency", "realism", "aesthetic_quality")]
        if not all(mark in Interval(0, 2) for mark in marks):
            raise ValueError(f"prompt {row['prompt_id']} has the marks {marks}, not numbers from 0 to 2: "
                             "judge again")
        if row["prompt_id"] not in range(1, 1001):
            raise ValueError(f"there is no prompt {row['prompt_id']!r}: those of WISE are 1 to 1000")
        value = float(np.dot((0.35, 0.1, 0.05), marks))
        if scores.setdefault(row["prompt_id"], value) != value:
            raise ValueError(f"prompt {row['prompt_id']} has two different results: give one")
    if absent := [i for i in range(1, 1001) if i not in scores]:
        raise ValueError(f"{len(absent)} of 1000 prompts have no result (first: {absent[0]}): "
                         "let the scorer finish")
    return scores


def score_wise(rows):
    """Lines of WISE's gpt_eval.py -> {category or "overall": {"score", "low", "high", "n"}}, normal 95
    % intervals."""
    scores = wise_scores(rows)
    parts = {name: np.array([scores[i] for i in range(first, last + 1)])
             for name, (first, last, _) in WISE.items()}
    means = {name: float(part.mean()) for name, part in parts.items()}
    errors = {name: part.std(ddof=1) / math.sqrt(len(part)) for name, part in parts.items()}
    means["overall"] = sum(WISE[name][2] * mean for name, mean in means.items())
    errors["overall"] = math.sqrt(sum((WISE[name][2] * error) ** 2 for name, error in errors.items()))
    return {name: {"score": mean, "low": mean - Z * errors[name], "high": mean + Z * errors[name],
                   "n": len(parts.get(name, scores))} for name, mean in means.items()}


SCORERS = {"geneval": (score_geneval, {"tag": str, "prompt": str, "correct": bool | int}),
           "wise": (score_wise, {"prompt_id": int, "consistency": float, "realism": float,
                                 "aesthetic_quality": float})}


def score(args):
    """The published figures, with intervals, from the file that the official scorer wrote; several
    files: joined, copies counted once."""
    scorer, fields = SCORERS[args.bench]
    rows = [row for file in distinct_files(args.results) for row in read_records(file, fields)]
    table = scorer(rows)
    if args.bench == "geneval" and len(rows) != GENEVAL_IMAGES:
        say(f"published scores are of {GENEVAL_IMAGES} images, this one of {len(rows)}")
    print_table(f"{args.bench}, {len(rows)} results", table)
    save_results(args, {"table": table}, f"score-{args.bench}")
