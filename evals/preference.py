"""What people prefer: a blind page that shows two models' images side by side, and the test of its votes."""
import base64
import io
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from checkpoint import Interval, path_below, read_json, typed
from data import load_image
from evals.generation import read_prompts
from evals.report import (
    check_fields,
    distinct_files,
    fingerprint,
    print_table,
    rate,
    save_results,
    say,
    write_text,
)

# The two questions of the paper's study, in our words.
QUESTIONS = {"quality": "Which picture looks better: appeal, layout, clarity, shapes, cleanliness?",
             "alignment": "Which picture shows better what the text says?"}
PAGE = Path(__file__).with_name("compare.html")


def a_is_left(seed, number):
    """Is the image of A on the left in pair `number` of a page? A coin that the votes' reader can toss
    again."""
    return bool(np.random.default_rng((seed, number)).integers(2))


def data_url(path, most=768):
    """An image file as a data: URL, scaled down to `most` pixels; small ones as PNG, large ones as JPEG."""
    image, file = load_image(path), io.BytesIO()
    image.thumbnail((most, most))
    kind = "PNG" if max(image.size) <= 256 else "JPEG"
    image.save(file, kind, quality=92)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def compare(args):
    """A blind comparison by people: A and B, two folders of `generate` for one prompt file, become
    OUT/compare.html.

    One page without network: pairs in random order, sides by coin, two questions, votes kept in the
    browser and exported as JSON. With --votes, everybody's exported files: how often A won, with a sign
    test's two-sided p-value.
    """
    if len(args.folders) != 2 or not args.prompts:
        raise ValueError("compare takes two folders of images and --prompts, or --votes")
    pairs = []
    for number, job in enumerate(read_prompts(args.bench, args.prompts)):
        urls = [data_url(path_below(folder, job["file"], args.prompts)) for folder in args.folders]
        left, right = urls if a_is_left(args.seed, number) else urls[::-1]
        pairs.append({"id": number, "prompt": job["prompt"], "left": left, "right": right})
    pairs = [pairs[i] for i in np.random.default_rng(args.seed).permutation(len(pairs))]
    a, b = args.folders
    study = {"id": fingerprint(pairs), "seed": args.seed, "a": a, "b": b, "asked": QUESTIONS, "pairs": pairs}
    script = json.dumps(study).replace("<", "\\u003c")               # no text may end the page's script
    file = Path(args.out) / "compare.html"
    write_text(file, PAGE.read_text("utf-8").replace("/*STUDY*/", script))
    print(file)


def sign_test(wins, losses):
    """Two-sided p-value of `wins` against `losses` where both are equally likely (exact binomial; ties
    left out)."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(max(wins, losses), n + 1)) / 2 ** n)


SIDES = ("left", "right", "alike")


def read_ballot(file):
    """The content of an exported file: {"id", "seed", "a", "b", "votes": {number: {question: side}},
    "voter"}; ValueError for a file that is none. Older exports name no voter: their votes do."""
    where = f"{file} is no export of a comparison page"
    ballot = read_json(file)
    ballot |= check_fields(ballot, {"id": str, "seed": int, "a": str, "b": str, "votes": dict}, where)
    for number, vote in ballot["votes"].items():
        vote = typed(vote, dict, Interval(), f"{where}: votes")
        if not (re.fullmatch("[0-9]{1,9}", number) and set(vote) <= set(QUESTIONS) and ballot["seed"] >= 0
                and all(side in SIDES for side in vote.values())):
            raise ValueError(f"{where}: it has the vote {number[:20]!r}: {json.dumps(vote)[:60]}")
    ballot.setdefault("voter", fingerprint(sorted(ballot["votes"].items())))
    return ballot | check_fields(ballot, {"voter": str}, where)


def count_ballot(ballot, tallies):
    """Add an exported file's votes to {question: Counter of "A", "B", "alike"}, sides undone."""
    for number, vote in ballot["votes"].items():
        left, right = "AB" if a_is_left(ballot["seed"], int(number)) else "BA"
        for name, side in vote.items():
            tallies[name][{"left": left, "right": right, "alike": "alike"}[side]] += 1


def read_ballots(files):
    """The exported files of one page, one of each person; ValueError for a file that is none, or of another
    page."""
    ballots = {}
    for file in distinct_files(files):
        ballot = read_ballot(file)
        first = next(iter(ballots.values()), ballot)
        if any(ballot[key] != first[key] for key in ("id", "seed", "a", "b")):
            raise ValueError(f"{file} is of another page than {files[0]}")
        key = ballot["voter"]
        if key in ballots:
            say(f"{file} is of a person who is counted already: the larger of both files counts")
        ballots[key] = max(ballots.get(key, ballot), ballot, key=lambda each: len(each["votes"]))
    return list(ballots.values())


def votes(args):
    """`compare --votes FILE ...`: wins of A and B, the fraction that A won (ties left out), interval,
    p-value. Who exported twice, or a file given twice, counts once.

    Raises ValueError for a file that is no export, that is of another page, or for no votes at all.
    """
    tallies, ballots = {name: Counter() for name in QUESTIONS}, read_ballots(args.votes)
    for ballot in ballots:
        count_ballot(ballot, tallies)
    a, b = ballots[0]["a"], ballots[0]["b"]
    table = {}
    for name, tally in tallies.items():
        wins, losses = tally["A"], tally["B"]
        if wins + losses:
            table[name] = {**rate([True] * wins + [False] * losses), "A": wins, "B": losses,
                           "alike": tally["alike"], "p": sign_test(wins, losses)}
    if not table:
        raise ValueError(f"no votes for either side in {', '.join(args.votes)}")
    print_table(f"how often A = {a} beat B = {b}, {len(ballots)} people", table)
    save_results(args, {"table": table})
