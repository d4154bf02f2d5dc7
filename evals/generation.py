"""Benchmarks of text to image: GenEval, DPG-Bench, WISE, MJHQ. Published prompts in, images as the
official scorers want them; the scorers' files in, the published figures out."""
import json
import math
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evals.report import (
    BATCH,
    Z,
    by_skill,
    fingerprint,
    print_table,
    rate,
    read_records,
    read_text,
    save_results,
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

def list_files(bench, path):
    """A benchmark's image files in order, [(file, prompt, GenEval's entry or None)]: see `read_prompts`."""
    if bench == "geneval":
        entries = read_records(path, ("tag", "include", "prompt"))
        return [(f"{i:05}/samples/{k:04}.png", entry["prompt"], entry)
                for i, entry in enumerate(entries) for k in range(4)]
    if bench == "dpg":
        return [(f"{file.stem}.png", read_text(file), None) for file in sorted(path.glob("*.txt"))]
    if bench == "wise":
        parts = sorted(path.glob("*.json")) if path.is_dir() else [path]
        rows = [row for part in parts for row in read_records(part, ("prompt_id", "Prompt"))]
        return [(f"{row['prompt_id']}.png", row["Prompt"], None) for row in rows]
    rows = read_records(path, ("key", "category", "prompt"))
    return [(f"{row['category']}/{row['key']}.png", row["prompt"], None) for row in rows]


def read_prompts(bench, path, seed=0):
    """A benchmark's prompts -> its image files in order, [{"file", "prompt", "seeds", "entry"}].

    geneval: a jsonl; for line i, I/samples/0000.png to 0003.png beside I/metadata.jsonl, the line. dpg:
    a folder of txt files; NAME.png, four images as 2 x 2. wise: a json or a folder of them;
    PROMPT_ID.png. mjhq: meta_data.json; CATEGORY/KEY.png. Seeds count all images of a prompt file, so
    that no two share one. Raises ValueError for no prompts, an empty one, or two for one file.
    """
    files = list_files(bench, Path(path))
    if not files:
        raise ValueError(f"no prompts of {bench} in {path}")
    times = Counter(file for file, _, _ in files)
    for file, prompt, _ in files:
        if times[file] > 1:
            raise ValueError(f"{path}: the prompt of {file} is there twice")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path}: the prompt of {file} is empty or no text")
    n = 4 if bench == "dpg" else 1
    return [{"file": file, "prompt": prompt.strip(), "entry": entry,
             "seeds": [seed * 10 ** 6 + i * n + k for k in range(n)]}
            for i, (file, prompt, entry) in enumerate(files)]


def claim_folder(folder, about):
    """Note beside a folder of images what they are made with; ValueError if it holds images of other
    settings."""
    note = folder.with_suffix(".json")
    if folder.exists() and (not note.exists() or json.loads(read_text(note)) != about):
        raise ValueError(f"{folder} holds images of other settings than these (see {note}): "
                         "choose another --out")
    write_text(note, json.dumps(about, indent=1) + "\n")


def write_job(folder, job, images):
    """Write the uint8 images (n, H, W, 3) of a job: one as it is, four as 2 x 2; GenEval's entry goes
    beside them."""
    if job["entry"]:
        write_text(folder / job["file"].split("/")[0] / "metadata.jsonl", json.dumps(job["entry"]) + "\n")
    rows = [images] if len(images) == 1 else [images[:2], images[2:]]
    write_image(folder / job["file"], np.concatenate([np.concatenate(list(row), 1) for row in rows]))


def generate(args):
    """A benchmark's images in the layout of its scorer, in OUT/BENCH.

    The same line goes on where a run stopped; under torchrun (or with RANK and WORLD_SIZE set) each
    process makes its part. An image depends on its place in the prompt file and on --seed: not on
    batches, processes or what was there.
    """
    jobs = read_prompts(args.bench, args.prompts, args.seed)
    folder = Path(args.out) / args.bench
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = args.device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    pipe = Pipeline(args.ckpt, device, args.dtype, eva=args.eva)
    claim_folder(folder, {"ckpt": args.ckpt, "seed": args.seed, "dtype": str(pipe.dtype),
                          "sampling": pipe.sampling, "prompts": fingerprint(jobs)})
    mine = jobs[rank::world_size]
    missing = [job for job in mine if not (folder / job["file"]).exists()]
    n = len(jobs[0]["seeds"])
    step = max(1, BATCH // n)
    for i in tqdm(range(0, len(missing), step), disable=None):
        batch = missing[i:i + step]
        prompts = [job["prompt"] for job in batch for _ in range(n)]
        seeds = [seed for job in batch for seed in job["seeds"]]
        images = to_uint8(pipe.images(prompts, seeds))               # (len(batch) * n, H, W, 3)
        pipe.negatives.clear()                                # one for each seed: they would fill the memory
        for job, its_images in zip(batch, images.reshape(len(batch), n, *images.shape[1:])):
            write_job(folder, job, its_images)
    print(f"{len(missing)} new files, {len(mine) - len(missing)} were there: {folder}")


# ---- the official scorers' files -> the published figures -----------------------------------------------

def score_geneval(rows):
    """Lines of GenEval's evaluate_images.py -> {skill, "overall" (the published score), "prompts" (any
    image right)}.

    Raises ValueError where prompts have unequal numbers of images: the scorer was stopped.
    """
    prompts = defaultdict(list)
    for row in rows:
        if row["correct"] not in (True, False):
            raise ValueError(f"a result of the prompt {row['prompt']!r} is {row['correct']!r}, "
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
        if not all(isinstance(mark, (int, float)) and 0 <= mark <= 2 for mark in marks):
            raise ValueError(f"prompt {row['prompt_id']} has the marks {marks}, not numbers from 0 to 2: "
                             "judge again")
        if row["prompt_id"] not in range(1, 1001):
            raise ValueError(f"there is no prompt {row['prompt_id']!r}: those of WISE are 1 to 1000")
        scores[row["prompt_id"]] = float(np.dot((0.35, 0.1, 0.05), marks))
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


SCORERS = {"geneval": (score_geneval, ("tag", "prompt", "correct")),
           "wise": (score_wise, ("prompt_id", "consistency", "realism", "aesthetic_quality"))}


def score(args):
    """The published figures, with intervals, from the file that the official scorer wrote; several
    files: joined."""
    scorer, fields = SCORERS[args.bench]
    rows = [row for file in args.results for row in read_records(file, fields)]
    table = scorer(rows)
    if args.bench == "geneval" and len(rows) != GENEVAL_IMAGES:
        print(f"eval.py: published scores are of {GENEVAL_IMAGES} images, this one of {len(rows)}",
              file=sys.stderr)
    print_table(f"{args.bench}, {len(rows)} results", table)
    save_results(args, {"table": table}, f"score-{args.bench}")
