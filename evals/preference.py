"""What people prefer: a blind page that shows two models' images side by side, and the test of its votes."""
import base64
import io
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from data import load_image
from evals.generation import read_prompts
from evals.report import fingerprint, print_table, rate, read_text, save_results, write_text

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
        urls = [data_url(Path(folder) / job["file"]) for folder in args.folders]
        left, right = urls if a_is_left(args.seed, number) else urls[::-1]
        pairs.append({"id": number, "prompt": job["prompt"], "left": left, "right": right})
    pairs = [pairs[i] for i in np.random.default_rng(args.seed).permutation(len(pairs))]
    a, b = args.folders
    study = {"id": fingerprint(pairs), "seed": args.seed, "a": a, "b": b, "asked": QUESTIONS, "pairs": pairs}
    script = json.dumps(study).replace("<", "\\u003c")               # no text may end the page's script
    file = Path(args.out) / "compare.html"
    write_text(file, read_text(PAGE).replace("/*STUDY*/", script))
    print(file)


def sign_test(wins, losses):
    """Two-sided p-value of `wins` against `losses` where both are equally likely (exact binomial; ties
    left out)."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(max(wins, losses), n + 1)) / 2 ** n)


def count_ballot(ballot, tallies):
    """Add an exported file's votes to {question: Counter of "A", "B", "alike"}, sides undone."""
    for number, vote in ballot["votes"].items():
        left, right = "AB" if a_is_left(ballot["seed"], int(number)) else "BA"
        for name, side in vote.items():
            tallies[name][{"left": left, "right": right, "alike": "alike"}[side]] += 1


def votes(args):
    """`compare --votes FILE ...`: wins of A and B, the fraction that A won (ties left out), interval,
    p-value.

    Raises ValueError for a file that is no export, that is of another page, or for no votes at all.
    """
    tallies, study = {name: Counter() for name in QUESTIONS}, None
    for file in args.votes:
        try:
            ballot = json.loads(read_text(file))
            study = study or ballot
            count_ballot(ballot, tallies)
            same_page = ballot["id"] == study["id"]
            a, b = ballot["a"], ballot["b"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is cut short, or no export of a comparison page") from None
        if not same_page:
            raise ValueError(f"{file} is of another page than {args.votes[0]}")
    table = {}
    for name, tally in tallies.items():
        wins, losses = tally["A"], tally["B"]
        if wins + losses:
            table[name] = {**rate([True] * wins + [False] * losses), "A": wins, "B": losses,
                           "alike": tally["alike"], "p": sign_test(wins, losses)}
    if not table:
        raise ValueError(f"no votes for either side in {', '.join(args.votes)}")
    print_table(f"how often A = {a} beat B = {b}, {len(args.votes)} people", table)
    save_results(args, {"table": table})
