"""The wing evals/: published benchmarks in and out, distances, the study with people, leakage, the
mistakes of all commands of eval.py."""
import base64
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import checkpoint
import data
import demo
import dit
import eval as command_line
import sample
from clip_decoder import EvaClip
from conftest import gap
from evals import (
    distances,
    explain,
    generation,
    gpu,
    leakage,
    preference,
    report,
    scale,
    speed,
    understanding,
)
from model import rotate_half_split


# ---- shared ----------------------------------------------------------------------------------------
class Model:
    """A stand-in for the pipeline: images (8 x 8) are a function of prompt and seed, answers those of
    `says(question, images)`; `asked` collects what it was asked."""
    sampling, precision, digest = {}, torch.float32, "x"

    def __init__(self):
        self.negatives, self.asked, self.says = {}, [], lambda question, images: "yes"

    def images(self, prompts, seeds):
        if any("too long" in prompt for prompt in prompts):
            raise ValueError("the prompt takes too many tokens")
        self.asked.extend(zip(prompts, seeds))
        streams = [np.random.default_rng(zlib.crc32(p.encode()) + seed) for p, seed in zip(prompts, seeds)]
        return torch.from_numpy(np.stack([stream.random((3, 8, 8), np.float32) for stream in streams]))

    def ask(self, conversations, max_new_tokens):
        if any("too long" in turns[0][0] for turns, _ in conversations):
            raise ValueError("the prompt takes too many tokens")
        asked = [(turns[0][0], images[0]) for turns, images in conversations]
        self.asked.extend(asked)
        return [self.says(*question) for question in asked]


@pytest.fixture
def model(monkeypatch):
    """`generate` and `understanding --data` with a stand-in for a model."""
    model = Model()
    for module in generation, understanding:
        monkeypatch.setattr(module, "Pipeline", lambda *_, **__: model)
    return model


@pytest.fixture
def run(tmp_path):
    """Run a command line with --out tmp_path/out, expecting an exit code; returns a result file if named."""
    def run(line, result=None, out=".", code=0):
        assert command_line.main([*line.split(), "--out", str(tmp_path / out)]) == code
        return json.loads((tmp_path / out / result).read_text()) if result else None
    return run


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tsv(path, rows):
    """Write dicts as a TSV file with the first row's columns."""
    def cell(x):
        return '"' + str(x).replace('"', '""') + '"' if any(c in str(x) for c in '\n\t"') else str(x)
    lines = ["\t".join(rows[0])] + ["\t".join(cell(row.get(name, "")) for name in rows[0]) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_prompts(path, n):
    """A prompt file of GenEval's form with n entries."""
    entry = {"tag": "colors", "include": [{"class": "dog", "count": 1}]}
    return write_jsonl(path, [{**entry, "prompt": f"{i} red dogs"} for i in range(n)])


def files_below(folder):
    """{relative path: bytes} of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def noise(seed, *shape):
    """A uint8 array of noise."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def base64_image(colour="red", size=(9, 7)):
    """A plain image as VLMEvalKit keeps it in a cell."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


ROW = {"index": 1, "image": base64_image(), "question": "q?", "answer": "yes"}
CUT_IMAGE = {**ROW, "index": 2, "image": base64_image(size=(90, 70))[:100]}
NARROW = {**ROW, "index": 3, "image": base64_image(size=(1, 201))}
ENTRY = json.dumps({"tag": "colors", "include": [], "prompt": "a red dog"})
GENEVAL = json.dumps({"tag": "colors", "prompt": "p", "correct": True})
WISE = json.dumps({"prompt_id": 7, "consistency": 2, "realism": 1, "aesthetic_quality": 1})


def without(name):
    return {key: value for key, value in ROW.items() if key != name}


BALLOT = {"id": "1", "seed": 0, "a": "", "b": "", "votes": {"3": {"quality": "left"}}}
ASKED = {"question_id": 1, "image": "a.jpg", "question": "q?", "answer": "yes"}


# ---- generation ------------------------------------------------------------------------------------
def test_generate_geneval_folder_passes_the_scorers_walk(model, run, monkeypatch, tmp_path):
    """All 553 prompts: every numbered folder has the entry and four readable images, all seeds differ."""
    monkeypatch.setattr(os, "fsync", lambda file: None)              # 2,765 files
    prompts, walked = write_prompts(tmp_path / "prompts.jsonl", 553), []
    entries = [json.loads(line) for line in prompts.read_text().splitlines()]
    run(f"generate --prompts {prompts}")
    for folder in sorted((tmp_path / "geneval").iterdir()):          # as GenEval's scorer walks it
        walked.append(json.loads((folder / "metadata.jsonl").read_text()))
        names = sorted(os.listdir(folder / "samples"))
        assert folder.name.isdigit() and names == [f"{i:04}.png" for i in range(4)]
        images = [Image.open(folder / "samples" / name) for name in names]
        assert {(image.convert("RGB").size, image.format) for image in images} == {((8, 8), "PNG")}
    assert walked == entries and len({seed for _, seed in model.asked}) == 4 * 553
    assert [prompt for prompt, _ in model.asked] == [e["prompt"] for e in entries for _ in range(4)]


def test_generate_parts_batches_and_restarts_change_no_image(model, monkeypatch, run, tmp_path, capsys):
    """Three processes of other batch sizes, one of them restarted after losing files, make what one
    process makes."""
    line = f"generate --prompts {write_prompts(tmp_path / 'prompts.jsonl', 9)}"
    run(line, out="one")
    whole = files_below(tmp_path / "one")
    assert len(whole) == 1 + 9 * 5
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "3")
        for rank in range(3):
            patch.setenv("RANK", str(rank))
            patch.setattr(generation, "BATCH", 5 + 2 * rank)
            run(line, out="three")
            assert len(model.asked) == 36 + 12 * (rank + 1)        # a third each
    assert files_below(tmp_path / "three") == whole
    lost = sorted(tmp_path.glob("three/geneval/*/samples/0002.png"))[:4]
    lost[0].unlink()
    for file, size in zip(lost[1:], (0, 5, 60)):                     # copied by halves
        os.truncate(file, size)
    del model.asked[:]
    run(line, out="three")
    assert files_below(tmp_path / "three") == whole and len(model.asked) == 4
    assert "4 new files, 32 were there" in capsys.readouterr().out
    run(f"{line} --seed 1", out="one", code=2)
    assert "other settings" in capsys.readouterr().err and files_below(tmp_path / "one") == whole


def test_generate_with_a_real_model(tiny_folder, run, tmp_path):
    """The images in the folder are those of sample.Pipeline for that prompt and seed."""
    run(f"generate --prompts {write_prompts(tmp_path / 'p.jsonl', 2)} --ckpt {tiny_folder} --seed 2")
    alone = sample.Pipeline(tiny_folder).images(["1 red dogs"], [2 * 10 ** 6 + 6])[0]
    image = np.asarray(Image.open(tmp_path / "geneval/00001/samples/0002.png"))
    assert abs(image - sample.to_uint8(alone).astype(int)).max() <= 1


def test_generate_other_benchmarks_layouts(model, run, tmp_path):
    """DPG-Bench: 2 x 2 as its scorer cuts them; WISE: numbers; MJHQ: a folder for each category."""
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg/drawbench_7.txt").write_text("A long text.\n")
    (tmp_path / "dpg/COCOval_1.txt").write_text("Another.")
    wise = [{"Prompt": f"p{i}", "Explanation": "e", "Category": "c", "prompt_id": i} for i in (701, 3)]
    (tmp_path / "wise.json").write_text(json.dumps(wise))
    mjhq = {"ab12": {"category": "food", "prompt": "soup"}, "cd34": {"category": "art", "prompt": "a smile"}}
    (tmp_path / "mjhq.json").write_text(json.dumps(mjhq))
    for bench, file, names in (("dpg", "dpg", ["COCOval_1.png", "drawbench_7.png"]),
                               ("wise", "wise.json", ["3.png", "701.png"]),
                               ("mjhq", "mjhq.json", ["art/cd34.png", "food/ab12.png"])):
        run(f"generate --bench {bench} --prompts {tmp_path / file}", out="out")
        assert sorted(files_below(tmp_path / "out" / bench)) == names
    image = Image.open(tmp_path / "out/dpg/drawbench_7.png")
    boxes = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    for box, seed in zip(boxes, (4, 5, 6, 7)):                     # the second file by name: seeds from 4 on
        alone = sample.to_uint8(Model().images(["A long text."], [seed])[0])
        assert (np.asarray(image.crop(box)) == alone).all()


def test_score_geneval_by_hand(run, tmp_path, capsys):
    """The unweighted mean of the skills, not of the images; prompts count if any image is right."""
    plan = {"single_object": [[1, 1], [1, 0], [0, 0]], "counting": [[0, 0]], "colors": [[1, 1]]}
    rows = [{"tag": tag, "prompt": "same", "metadata": f"{tag}{i}", "correct": bool(c), "filename": "f"}
            for tag, prompts in plan.items() for i, pair in enumerate(prompts) for c in pair]
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    table = run(f"score geneval --results {file}", "score-geneval.json")["table"]
    assert table == generation.score_geneval(rows)
    assert table["single_object"]["score"] == pytest.approx(3 / 6) and table["counting"]["score"] == 0
    assert table["overall"]["score"] == pytest.approx((1 / 2 + 0 + 1) / 3) and table["overall"]["n"] == 10
    assert table["overall"]["low"] < 0.5 < table["overall"]["high"]
    assert table["prompts"]["score"] == pytest.approx(3 / 5)
    output = capsys.readouterr()
    assert "50.0 %" in output.out and "published scores are of 2212 images, this one of 10" in output.err


def test_wilson_equals_published_values():
    """8 of 10 and 0 of 10, as statistics texts print them (R's binom.wilson; Wilson 1927)."""
    for count, interval in ((8, (0.4902, 0.9433)), (0, (0.0, 0.2775)), (10, (0.7225, 1.0))):
        assert report.wilson(count, 10) == pytest.approx(interval, abs=1e-4)


def test_score_wise_by_hand():
    """Published rows (category figures and overall, PKU-YuanGroup/WISE), then marks counted by hand."""
    published = {"GPT4o": (.81, .71, .89, .83, .79, .74, .80),
                 "FLUX.1-dev": (.48, .58, .62, .42, .51, .35, .50),
                 "MetaQuery-XL": (.56, .55, .62, .49, .63, .41, .55),
                 "Janus-Pro-7B": (.30, .37, .49, .36, .42, .26, .35)}
    fields = ("consistency", "realism", "aesthetic_quality")
    for *parts, overall in published.values():                 # three equal marks of 2 m make a WiScore of m
        sizes = [last - first + 1 for first, last, _ in generation.WISE.values()]
        table = generation.score_wise([{"prompt_id": i, **dict.fromkeys(fields, 2 * mean)}
                                       for i, mean in enumerate(np.repeat(parts, sizes), 1)])
        assert round(table["overall"]["score"], 2) == overall
    rows = [{"prompt_id": i, "consistency": 2 * (i <= 400), "realism": i % 2 * 2, "aesthetic_quality": 1}
            for i in range(1, 1001)]
    table = generation.score_wise(rows)
    assert table["cultural"]["score"] == pytest.approx((0.7 * 2 + 0.2 * 1 + 0.1) / 2)
    assert table["physics"]["score"] == pytest.approx((0.2 * 1 + 0.1) / 2)
    assert table["time"]["score"] == pytest.approx((0.2 * 2 * 84 / 167 + 0.1) / 2)
    deviation = np.std([0.85 + 0.1 * (-1) ** i for i in range(400)], ddof=1)
    half = table["cultural"]["high"] - table["cultural"]["score"]
    assert half == pytest.approx(1.96 * deviation / 20, rel=1e-4)
    assert table["overall"]["score"] == pytest.approx(0.4 * 0.85 + 0.6 * 0.15, abs=1e-3)


# ---- understanding ---------------------------------------------------------------------------------
def test_choice_table_in_vlmevalkits_layout(model, run, tmp_path):
    """Options, hints, line breaks, images of other rows, several images; accuracy and baseline by hand."""
    red, blue = base64_image("red"), base64_image("blue")
    fields = ("index", "image", "hint", "question", "A", "B", "C", "answer", "category")
    rows = [(10, red, "Look.", "What\ncolour?", "red", "blue", "", "A", "colour"),
            (11, "10", "", 'The "same"?', "no", "yes", "", "B", "same"),
            (12, blue, "", "Colour?", "red", "blue", "green", "B", "colour"),
            (13, str([red, blue]), "", "<image 1> or <image 2>?", "x", "y", "", "A", "colour")]
    file = write_tsv(tmp_path / "bench.tsv", [dict(zip(fields, row)) for row in rows])
    answers = {"What": "A", "The": "I think (B).", "Colour": "C. green", "or": "both"}
    model.says = lambda question, images: next(a for start, a in answers.items() if start in question)
    results = run(f"understanding --data {file}", "bench.score.json")
    (first, images), (second, again), _, (last, two) = model.asked
    assert first == f"Look.\nWhat\ncolour?\nA. red\nB. blue\n{understanding.LETTER}"
    assert second == f'The "same"?\nA. no\nB. yes\n{understanding.LETTER}' and last.startswith("or ?")
    colours = [image.getpixel((0, 0)) for image in (*images, *again, *two)]
    assert colours == [(255, 0, 0)] * 3 + [(0, 0, 255)] and images[0].size == (9, 7)
    assert {name: (row["score"], row["baseline"]) for name, row in results["table"].items()} == {
        "colour": (1 / 3, 2 / 3), "same": (1, 1), "overall": (0.5, 0.75)}
    assert [answer["read"] for answer in results["answers"]] == ["A", "B", "C", None]
    lines = [json.loads(line) for line in (tmp_path / "bench.answers.jsonl").read_text().splitlines()]
    assert lines[1:] == [{"index": str(10 + i), "prediction": a} for i, a in enumerate(answers.values())]


def test_understanding_goes_on_where_it_was_cut(model, monkeypatch, run, tmp_path, capsys):
    """A kill in the middle of a line costs that answer alone; another run's answers are refused."""
    image = base64_image()
    rows = [{"index": i, "image": image, "question": f"q{i}?", "answer": "ny"[i % 2]} for i in range(7)]
    line = f"understanding --data {write_tsv(tmp_path / 'qa.tsv', rows)}"
    run(line)
    answers, score = tmp_path / "qa.answers.jsonl", tmp_path / "qa.score.json"
    whole, table = answers.read_bytes(), score.read_bytes()
    answers.write_bytes(b"".join(whole.splitlines(True)[:4]) + b'{"index": "3", "pre')
    score.unlink()
    del model.asked[:]
    monkeypatch.setattr(report, "BATCH", 2)
    run(line)
    assert answers.read_bytes() == whole and score.read_bytes() == table
    assert [question for question, _ in model.asked] == ["q3?", "q4?", "q5?", "q6?"]
    run(f"{line} --task textvqa", code=2)
    assert "another run" in capsys.readouterr().err and answers.read_bytes() == whole


def test_the_worlds_questions_as_a_table(model, run, tmp_path):
    """`--write`, read back: the questions of draw_questions, all right for a model that knows; the
    baseline by hand."""
    from miniature import scores, world
    run(f"understanding --write {tmp_path / 'w.tsv'} --n 60")
    asked = scores.draw_questions(1, 60)
    truth = {(q.question, world.render(q.scene).tobytes()): q.answer for q in asked}
    model.says = lambda question, images: truth[question, np.asarray(images[0]).tobytes()].capitalize() + "."
    table = run(f"understanding --data {tmp_path / 'w.tsv'}", "w.score.json")["table"]
    assert list(table) == [*world.QUESTIONS, "overall"] and all(row["score"] == 1 for row in table.values())
    answers = [Counter(q.answer for q in asked if q.kind == kind) for kind in world.QUESTIONS]
    common = sum(counts.most_common(1)[0][1] for counts in answers)
    assert table["overall"]["baseline"] == pytest.approx(common / 60)


def test_understanding_with_a_real_model(tiny_folder, monkeypatch, run, tmp_path):
    """The answers in the file are those of sample.Pipeline; with --official, of the image after JPEG,
    enlarged."""
    pixels = noise(0, 40, 40, 3)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    rows = [{"question_id": 5, "image": "p.png", "text": "a circle?", "label": "yes"}]
    line = f"understanding --data {write_jsonl(tmp_path / 'q.jsonl', rows)} --task pope --ckpt {tiny_folder}"
    answer = run(line, "q.score.json")["answers"][0]
    pipe = sample.Pipeline(tiny_folder)
    assert answer["answer"] == pipe.answer(Image.fromarray(pixels), f"a circle?\n{understanding.SHORT}", 128)
    assert answer["index"] == "5"
    calls, vision_inputs = [], sample.Pipeline.vision_inputs

    def watched(self, image):
        calls.append((np.asarray(image), vision_inputs(self, image)))
        return calls[-1][1]
    monkeypatch.setattr(sample.Pipeline, "vision_inputs", watched)
    run(f"{line} --official", out="official")
    (image, (patches, _)), = calls
    assert (image == report.jpeg(pixels)).all() and (image != pixels).any()
    assert 200704 <= len(patches) * 8 ** 2 <= 1605632                # patches of 8 x 8 pixels


OPTIONS = {"A": "a cat", "B": "dog", "C": "hot dog"}
READINGS = [  # (a rule, what it reads off answers)
    (lambda answer: understanding.pick_option(answer, OPTIONS),
     {"A": "A", "(B)": "B", "B.": "B", "C: hot dog": "C", "The answer is B": "B", "I'd say B": "B",
      "It must be (C), surely": "C", "A cat sits there": "A", "dog": "B", "Hot dog.": "C",
      "It is a cat": "A", "A or B": None, "D": None, "": None, "A hot dog": None, "neither": None,
      "Because": None}),
    (lambda answer: understanding.yes_or_no("mme", answer),
     {"yes": "yes", "No, it": "no", " nope": "no", "The": "other", "It is yes": "other", "Yes.": "yes"}),
    (lambda answer: understanding.yes_or_no("pope", answer),
     {"Yes, there is.": "yes", "No": "no", "There is not one. Yes": "no", "I see no dog": "no",
      "a dog": "yes", "Yes. No.": "yes", "No, sir": "no", "nothing": "yes"}),
    (understanding.vqa_normal,                                       # vqaEval.py of VQA
     {"The  Red, ball!": "red ball", "two": "2", "none": "0", "dont": "don't", "Couldn'tve": "couldn't've",
      "youd've": "you'd've", "1,000": "1000", "u.s.": "us", "3.5": "3.5", "black/white": "black white",
      "t-shirt": "t shirt", "left - right": "left right", "An apple\n": "apple", "it's": "it's",
      "What? ": "what", "ten.": "10", "1,000 (red)": "1000 red", "6:30": "6:30", "A": ""})]


CHOICES = {"A": "a cat", "B": "Dog", "C": "a cat", "J": "b"}


@pytest.mark.parametrize("answer, letter", [
    ("B", "B"), ("b", "B"), (" (b). ", "B"), ("j", "J"), ("dog", "B"), ("Dog ", "B"), ("a cat", None),
    ("E", None), ("AB", None)])
def test_right_options(answer, letter):
    """A letter in any case, or the text of just one option; else the row is named."""
    if letter:
        assert understanding.right_option(answer, CHOICES, "row 1") == letter
    else:
        with pytest.raises(ValueError, match="row 1: the answer .* is none of its options A, B, C, J"):
            understanding.right_option(answer, CHOICES, "row 1")


@pytest.mark.parametrize("read, cases", READINGS, ids=["options", "mme", "pope", "vqa"])
def test_answers_are_read_as_the_benchmarks_read_them(read, cases):
    """Clear letters or words of options, MME's first four characters, POPE's first sentence, VQA's
    normal form."""
    assert {answer: read(answer) for answer in cases} == cases


def test_mme_by_hand(model, run, tmp_path):
    """Accuracy and accuracy+ of each category; perception sums ten categories, cognition four; official
    wording."""
    rows = [{"image": base64_image(size=(8 + pair, 8 + c)), "category": category, "answer": answer,
             "question": f"Is {category} {pair}? Please answer yes or no."}
            for c, category in enumerate((*understanding.PERCEPTION, *understanding.COGNITION))
            for pair in range(2) for answer in ("Yes", "No")]
    rows = [{"index": i, **row} for i, row in enumerate(rows)]
    # Always "Yes, ...": half of the questions, no pair. In "count" the first pair is right as well.
    turn = iter(range(100))
    model.says = lambda question, images: "No" if next(turn) % 2 and "count 0?" in question else "Yes, it is"
    file = write_tsv(tmp_path / "mme.tsv", rows)
    table = run(f"understanding --task mme --data {file}", "mme.score.json")["table"]
    assert model.asked[0][0] == f"Is existence 0?\n{understanding.SHORT}"
    assert [table["count"][column] for column in ("score", "plus", "points")] == [0.75, 0.5, 125]
    assert table["scene"]["points"] == 50 and table["cognition"]["points"] == 200
    assert table["perception"]["points"] == 9 * 50 + 125


def test_pope_by_hand():
    """3 true yes, 1 false yes, 2 missed, 4 true no: precision 3/4, recall 3/5, F1 2/3."""
    truths = ["yes"] * 3 + ["no"] + ["yes"] * 2 + ["no"] * 4
    questions = [{"category": "random", "answers": [truth], "options": {}} for truth in truths]
    row = understanding.tabulate("pope", questions, ["Yes"] * 4 + ["No."] * 6)["random"]
    assert row["score"] == 0.7 and row["F1"] == pytest.approx(2 / 3) and row["yes"] == 0.4
    assert row["precision"] == 0.75 and row["recall"] == 0.6 and row["baseline"] == 0.5


def test_vqa_by_hand():
    """Soft accuracy with its leave-one-out mean."""
    people = ["yes"] * 3 + ["no"] * 2 + ["two", "2", "maybe", "a cat", "cat"]
    # 3 of 10: the three themselves have two others, 2/3; the seven rest see three, 1.
    scores = {"Yes.": (3 * 2 / 3 + 7) / 10, "no": (2 * 1 / 3 + 8 * 2 / 3) / 10, "2": 0.6, "Two.": 0.6,
              "the cat": 0.6, "perhaps": 0}
    assert {answer: understanding.vqa_score(answer, people) for answer in scores} == pytest.approx(scores)
    assert understanding.vqa_score("yes", ["yes"] * 10) == understanding.vqa_score("Two", ["2"]) == 1


def test_mmmu_open_questions_by_hand():
    """MMMU's published rule: what follows a key word, numbers to two decimals, any truth within the
    words."""
    cases = [("8", ["8"], 1), ("The answer is 8.", ["8"], 1), ("8 or 9", ["9.004"], 1), ("8.01", ["8"], 0),
             ("It costs $1,234.50", ["1234.5"], 1), ("It costs $1,234.50", ["234.5"], 0), ("-3", ["3"], 0),
             ("6e3 ohms", ["6000"], 1), ("x = 3\nso y = 4", ["3"], 0), ("so x is 3 = 4", ["4"], 1),
             ("so x is 3 = 4", ["3"], 0),                            # the shortest end is the one after "="
             ("x = 4\nfinal answer 5", ["4"], 0),                    # "=" counts in the last line alone
             ("Transistor, therefore a diode", ["transistor"], 0), ("a Schottky diode", ["Diode"], 1),
             ("diode", ["schottky diode"], 0), ("a diode", ["tube", "diode"], 1), ("the loop a b", ["b"], 1),
             ("cab", ["b"], 0), ("b", ["B"], 1), (".5", ["0.5"], 1), ("12,34", ["12"], 0), ("", ["8"], 0),
             ("The answer :", ["answer"], 1), ("24/7", ["24/7"], 1), ("2.999", ["3"], 1)]
    for answer, truths, score in cases:
        assert understanding.open_score(answer, truths) == score, (answer, truths)
    question = {"options": {}, "answers": ["$6", "6"], "category": "Math"}
    grade = understanding.grade("choice", question, " It is 6.00 dollars")
    assert grade == ("It is 6.00 dollars", 1)


def test_questions_of_other_layouts(model, run, tmp_path):
    """VQAv2's lists of people, TextVQA's lists in a cell, MM-Vet's json and predictions for its judge."""
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "a.jpg")
    people = [{"answer": "yes", "answer_id": i} for i in range(5)] + [{"answer": "no", "answer_id": 9}] * 5
    rows = [{"question_id": 77, "image": "a.jpg", "question": "Blue?", "answers": people}]
    results = run(f"understanding --data {write_jsonl(tmp_path / 'vqa.jsonl', rows)}", "vqa.score.json")
    assert results["table"]["all"]["score"] == 1 and results["answers"][0]["asked"] == "Blue?"
    rows = [{"index": 0, "image": base64_image(), "question": "what does it SAY?",
             "answer": str(["yes"] * 2 + ["no"] * 8)}]
    file = write_tsv(tmp_path / "text.tsv", rows)
    answer = run(f"understanding --data {file} --task textvqa", "text.score.json")["answers"][0]
    assert answer["asked"] == f"What does it say?\n{understanding.SHORT}"
    assert answer["score"] == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    vet = {"v1_0": {"imagename": "a.jpg", "question": "Why?", "answer": "because", "capability": ["rec"]}}
    file = tmp_path / "mm-vet.json"
    file.write_text(json.dumps(vet))
    assert run(f"understanding --data {file} --task mmvet", "mm-vet.predictions.json") == {"v1_0": "yes"}
    assert json.loads(file.read_text()) == vet
    question = model.asked[-1][0]
    assert question.startswith("First please perform reasoning") and question.endswith("Why?")


POPE = [{"question_id": i, "image": "a.jpg", "text": "A dog?", "label": label} for i, label in
        enumerate(("yes", "no"))]
VQA = {"info": {"year": 2015}, "data_subtype": "val2014", "license": {}, "questions": [
    {"image_id": 42, "question": "Blue?", "question_id": 42000 + i} for i in range(2)]}
VQA_ANSWERS = {"info": {}, "annotations": [
    {"question_id": 42001, "image_id": 42, "answer_type": "other", "multiple_choice_answer": "sky",
     "answers": [{"answer": "sky", "answer_confidence": "yes", "answer_id": i} for i in range(10)]},
    {"question_id": 42000, "image_id": 42, "answer_type": "yes/no", "multiple_choice_answer": "yes",
     "answers": [{"answer": "yes" if i else "", "answer_id": i} for i in range(10)]}]}
TEXT_VQA = {"dataset_name": "textvqa", "data": [
    {"question": "what DOES it say?", "image_id": "0000599864f8", "image_classes": ["x"], "question_id": 7,
     "flickr_original_url": "https://", "answers": ["yes"] * 5 + ["no"] * 5, "set_name": "val"}]}
HEADER = "index\timage\tquestion\thint\tA\tB\tC\tanswer"
VALID = [  # (name of the file, its content, flags, [score of each question]), of a model that says yes
    ("pope.json", "\n".join(map(json.dumps, POPE)) + "\n\n", "--task pope", [1, 0]),
    ("pope-list.json", POPE, "--task pope", [1, 0]), ("one.json", POPE[0], "--task pope", [1]),
    ("pope.JSONL", b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, POPE)).encode(), "--task pope", [1, 0]),
    ("v2_OpenEnded_mscoco_val2014_questions.json", VQA, "", [1, 0]),
    ("mine.json", VQA, "--annotations v2_mscoco_val2014_annotations.json", [1, 0]),
    ("TextVQA_0.5.1_val.json", TEXT_VQA, "--task textvqa", [1]),
    ("numbers.jsonl", {"image": "a.jpg", "question": 5, "answers": [8, 2.5, "yes"]}, "", [1 / 3 * 2 / 3]),
    ("several.jsonl", {"image": ["a.jpg", "sub/b.png"], "question": "q", "answer": "yes"}, "", [1]),
    ("null.jsonl", {**ASKED, "A": "yes", "B": "no", "C": None, "answer": "A", "hint": None}, "", [1])
] + [(name, content.format(base64_image()), "", [1]) for name, content in (
    ("bom.TSV", f"\ufeff{HEADER}\r\n1\t{{}}\tq?\tnan\tyes\tno\tnan\tA\r\n\r\n\t\t\t\t\t\t\t\r\n"),
    ("quotes.tsv", f'{HEADER}\n1\t"{{}}"\t"a ""q""\n\there?"\t\tyes\tno\tNaN\tA\n'),
    ("url.tsv", f"{HEADER}\n1\tdata:image/png;base64,{{}}\tq 5\" wide?\t\tyes\tno\t\tA\n"),
    ("brackets.tsv", f"{HEADER}\n1\t['{{}}']\t[IMG] q?\t[hint\tyes\t[no\t\tA"))]


@pytest.mark.parametrize("name, content, flags, scores", VALID, ids=[row[0] for row in VALID])
def test_questions_as_people_have_them(model, run, tmp_path, monkeypatch, name, content, flags, scores):
    """Files as published, and what spreadsheets and editors make of them: every question is asked, options
    are those that are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for file in ("a.jpg", "sub/b.png", "COCO_val2014_000000000042.jpg", "0000599864f8.jpg"):
        Image.new("RGB", (9, 9)).save(file)
    write_content(tmp_path / "v2_mscoco_val2014_annotations.json", VQA_ANSWERS)
    write_content(tmp_path / name, content)
    results = run(f"understanding --data {name} {flags}", f"{Path(name).stem}.score.json", out="out")
    assert [answer["score"] for answer in results["answers"]] == pytest.approx(scores)
    assert not results["not asked"] and len(model.asked) == len(scores)
    if "VQA" not in name and "A. " in model.asked[0][0]:
        assert "\nA. yes\nB. " in model.asked[0][0] and "C. " not in model.asked[0][0]
        assert "nan" not in model.asked[0][0].lower()
    if scores == [1, 0] and "pope" not in name:
        assert list(results["table"]) == ["yes/no", "other", "overall"]


@pytest.mark.parametrize("task", ["pope", "mme", "vqav2", "choice"])
def test_one_bad_row_is_named_and_counts_as_wrong(model, run, tmp_path, capsys, task):
    """A broken image, one of 1 x 201, and a question that is too long: the others are answered, and a mended
    image is asked about when the run is started again."""
    write_content(tmp_path / "a.png", base64.b64decode(base64_image()))
    write_content(tmp_path / "narrow.png", base64.b64decode(NARROW["image"]))
    write_content(tmp_path / "broken.png", b"\x89PNG")
    truth, wrong = ("A", {"A": "yes", "B": "no"}) if task == "choice" else ("no", {})
    rows = [{"image": name, "question": question, "answer": truth, **wrong} for name, question in (
        ("a.png", "q"), ("broken.png", "q"), ("narrow.png", "q"), ("a.png", "too long"), ("a.png", "r"),
        ("a.png", "s"))]
    model.says = lambda question, images: "A" if task == "choice" else "No"
    if task == "mme":                                                # pairs have one image_path
        rows = [{**row, "image_path": str(i // 2), "image": row["image"]} for i, row in enumerate(rows)]
    line = f"understanding --task {task} --data {write_jsonl(tmp_path / 'q.jsonl', rows)}"
    results = run(line, "q.score.json", out="out")
    message = capsys.readouterr().err
    assert "3 of 6 questions can't be asked, and count as wrong: row 2 of" in message
    assert "broken.png can't be read" in message
    assert [answer["score"] for answer in results["answers"]] == [1, 0, 0, 0, 1, 1]
    assert results["table"]["all"]["score"] == 0.5 and list(results["not asked"]) == ["2", "3", "4"]
    assert "1 x 201" in results["not asked"]["3"] and "too many tokens" in results["not asked"]["4"]
    if task == "pope":
        assert results["table"]["all"]["precision"] == 0
    shutil.copy(tmp_path / "a.png", tmp_path / "broken.png")
    del model.asked[:]
    assert run(line, "q.score.json", out="out")["table"]["all"]["score"] == pytest.approx(4 / 6)
    assert len(model.asked) == 1 and "2 of 6" in capsys.readouterr().err


# ---- distances -------------------------------------------------------------------------------------
@pytest.mark.reference
def test_psnr_and_ssim_equal_scikit_image():
    """Against skimage.metrics, on noise, on a shifted image and on equal ones."""
    metrics = pytest.importorskip("skimage.metrics", reason="needs pip install scikit-image")
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(noise(1, 8, 9, 3)).resize((52, 40), Image.BICUBIC)
    a = np.stack([rng.random((40, 52, 3)), np.asarray(smooth) / 255, np.full((40, 52, 3), 0.3)])
    b = np.stack([rng.random((40, 52, 3)), np.roll(a[1], 2, 0), a[2]])
    mine, others = (torch.from_numpy(x).permute(0, 3, 1, 2).float() for x in (a, b))
    how = dict(data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    theirs = [metrics.structural_similarity(x, y, **how) for x, y in zip(a, b)]
    assert distances.ssim(mine, others).tolist() == pytest.approx(theirs, abs=1e-5) and theirs[1] < 0.95
    theirs = [metrics.peak_signal_noise_ratio(x, y, data_range=1) for x, y in zip(a[:2], b)]
    assert distances.psnr(mine, others)[:2].tolist() == pytest.approx(theirs, abs=1e-4)


@pytest.mark.reference
def test_frechet_and_mmd_equal_independent_forms():
    """Against scipy's matrix square root, normal distributions in one dimension, and the MMD's sums
    written out."""
    linalg = pytest.importorskip("scipy.linalg", reason="needs pip install scipy")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(50, 5)) + 0.5
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    theirs = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * linalg.sqrtm(cx @ cy).real)
    assert distances.frechet(x, y) == pytest.approx(theirs, rel=1e-8)
    assert distances.frechet(x, x) == pytest.approx(0, abs=1e-8)
    a, b = x[:, :1], y[:, :1]                               # differences of means and of deviations, squared
    moments = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert distances.frechet(a, b) == pytest.approx(moments)

    def kernel(p, q):
        return (sum(p[i] * q[i] for i in range(5)) / 5 + 1) ** 3

    def within(s):
        return np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
    across = np.mean([kernel(p, q) for p in x for q in y])
    assert distances.mmd(x, y) == pytest.approx(within(x) + within(y) - 2 * across, rel=1e-9)
    halves = rng.normal(size=(400, 2, 30, 5))
    assert abs(np.mean([distances.mmd(p, q) for p, q in halves])) < 0.02        # unbiased


def test_fid_and_reconstruction_of_folders(tiny_folder, run, tmp_path, capsys):
    """Folders of images through a real tower: features by hand, the noise floor, the warning, the three
    measures."""
    sets = {name: [Image.fromarray(noise((seed, i), 40, 40, 3)) for i in range(6)]
            for seed, name in enumerate("ab")}
    for name, images in sets.items():
        (tmp_path / name / "sub").mkdir(parents=True)
        for i, image in enumerate(images):
            image.save(tmp_path / name / "sub" / f"{i}.png")
    table = run(f"fid --a {tmp_path / 'a'} --b {tmp_path / 'b'} --ckpt {tiny_folder}", "fid.json")["table"]
    assert "fewer than 5,000" in capsys.readouterr().err
    assert set(table) == {"A and B", "noise floor, halves of A"}
    eva = EvaClip.from_pretrained(tiny_folder)
    with torch.no_grad():
        features = [eva.encode(torch.cat([data.preprocess_clip(p, 32) for p in images])).mean(1).numpy()
                    for images in sets.values()]
    assert table["A and B"]["Frechet"] == pytest.approx(distances.frechet(*features), rel=1e-3)
    assert table["A and B"]["MMD"] == pytest.approx(distances.mmd(*features), rel=1e-3)
    results = run(f"reconstruction --images {tmp_path / 'a'} --ckpt {tiny_folder}", "reconstruction.json")
    assert len(results["pictures"]) == 6
    made = sample.Pipeline(tiny_folder).reconstruct([sets["a"][3]], [3])[0].permute(1, 2, 0).numpy()
    truth = np.asarray(data.crop_square(sets["a"][3], 32)) / 255
    row = results["pictures"][str(tmp_path / "a/sub/3.png")]
    assert row["dB"] == pytest.approx(-10 * math.log10(((made - truth) ** 2).mean()), abs=0.01)
    assert -1 <= row["cosine"] <= 1 and -1 <= row["SSIM"] < 1


@pytest.fixture(scope="module")
def inception_state():
    """FID's Inception with random weights that keep the scale of activations, as the state dict of its
    file."""
    torch.manual_seed(0)
    net = distances.Inception()
    for name, tensor in net.state_dict().items():
        if tensor.ndim == 4:
            nn.init.kaiming_normal_(tensor)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim:
            tensor.normal_(float(name.endswith("bn.weight")), 0.1)
    return net.state_dict()


# The graph as text: the steps of a branch, each NAME, or NAME:hws, h and w its padding, s its stride.
STEM = "Conv2d_1a_3x3:002 Conv2d_2a_3x3 Conv2d_2b_3x3:111", "Conv2d_3b_1x1 Conv2d_4a_3x3"
TRIPLE, TALL = "3x3dbl_1 3x3dbl_2:111 ", "_1 7x7_2:031 7x7_3:301"
DOUBLE = "7x7dbl_1 7x7dbl_2:301 7x7dbl_3:031 7x7dbl_4:301 7x7dbl_5:031"
BRANCHES = {"5": ("1x1", "5x5_1 5x5_2:221", TRIPLE + "3x3dbl_3:111", "mean _pool"),
            "6a": ("3x3:002", TRIPLE + "3x3dbl_3:002", "halve"),
            "6": ("1x1", "7x7" + TALL, DOUBLE, "mean _pool"),
            "7a": ("3x3_1 3x3_2:002", "7x7x3_1 7x7x3_2:031 7x7x3_3:301 7x7x3_4:002", "halve"),
            "7": ("1x1", "3x3_1 3x3_2a:011", "3x3_1 3x3_2b:101", TRIPLE + "3x3dbl_3a:011",
                  TRIPLE + "3x3dbl_3b:101", "mean _pool")}


def plain_inception(state, image, pad_counts=False, last_mean=False):
    """FID's Inception written out in float64, resizing included: uint8 (H, W, 3) -> (2048,).

    pad_counts, last_mean: two ways to get it wrong: pools that count the padding, a mean for a maximum.
    """
    def matrix(n):                                     # (299, n): half-pixel centres, edges repeated
        at = np.clip((np.arange(299) + 0.5) * n / 299 - 0.5, 0, n - 1)
        return torch.from_numpy(np.maximum(0, 1 - abs(at[:, None] - np.arange(n))))

    def conv(x, name, height=0, width=0, stride=1):
        keys = ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias")
        weight, *norm = (state[f"{name}.{key}"].double() for key in keys)
        mean, var, scale, shift = (x[:, None, None] for x in norm)
        y = F.conv2d(x, weight, stride=stride, padding=(height, width))
        return ((y - mean) / (var + 1e-3).sqrt() * scale + shift).clamp(min=0)

    def around(x, fill):                                             # the nine neighbours of every pixel
        padded, (h, w) = F.pad(x, (1, 1, 1, 1), value=fill), x.shape[2:]
        return torch.stack([padded[..., i:i + h, j:j + w] for i in range(3) for j in range(3)])

    def pool(x, name):
        if name == "mean":
            return around(x, 0.0).sum(0) / (9 if pad_counts else around(torch.ones_like(x), 0.0).sum(0))
        most = around(x, -math.inf).amax(0)
        return most if name == "max" else most[..., 1:-1:2, 1:-1:2]  # halve: windows that fit

    def chain(x, steps, prefix=""):
        for name, _, numbers in (step.partition(":") for step in steps.split()):
            is_pool = name in ("mean", "max", "halve")
            x = pool(x, name) if is_pool else conv(x, prefix + name, *map(int, numbers))
        return x
    pixels = torch.tensor(image).permute(2, 0, 1).double() / 255 * 2 - 1
    x = (matrix(image.shape[0]) @ pixels @ matrix(image.shape[1]).T)[None]
    for steps in STEM:
        x = pool(chain(x, steps), "halve")
    for block in "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split():
        branches = BRANCHES.get(block) or BRANCHES[block[0]]
        if block == "7c" and not last_mean:
            branches = [steps.replace("mean", "max") for steps in branches]
        x = torch.cat([chain(x, steps, f"Mixed_{block}.branch") for steps in branches], 1)
    return x.mean((0, 2, 3))


@pytest.mark.slow
def test_fid_of_inception_equals_plain_formulas(inception_state, run, tmp_path, capsys):
    """The command's FID of odd-sized images: features as written out layer by layer, the distance by
    scipy's square root of a matrix, with random weights; what the two oddities of that graph are
    worth."""
    linalg = pytest.importorskip("scipy.linalg", reason="needs pip install scipy")
    weights = [v for k, v in inception_state.items() if k.endswith(("weight", "bias"))]
    assert len(inception_state) == 566 and sum(v.numel() for v in weights) == 23850960
    file = tmp_path / "inception.safetensors"
    save_file({k: v for k, v in inception_state.items() if "tracked" not in k}, file)
    net, sets = distances.load_inception(file), []
    for k, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        sizes = (37, 91), (1, 50), (299, 640), (64, 64)
        images = [noise((k, i), *size, 3) for i, size in enumerate(sizes)]
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
        sets.append(torch.stack([plain_inception(inception_state, image) for image in images]))
        mine = distances.inception_features(net, [Image.fromarray(image) for image in images])
        assert all(gap(m, t) < 1e-5 for m, t in zip(mine, sets[-1].float()))
    for bug in ("pad_counts", "last_mean"):
        assert gap(plain_inception(inception_state, images[3], **{bug: True}).float(), mine[3]) > 1e-2
    results = run(f"fid --a {tmp_path / 'a'} --b {tmp_path / 'b'} --inception {file}", "fid-inception.json")
    assert "resized as in pytorch-fid" in capsys.readouterr().out
    a, b = (s.numpy() for s in sets)
    # The covariances are x'x and y'y; x y'y x' has the eigenvalues of their product.
    x, y = ((s - s.mean(0)) / math.sqrt(3) for s in (a, b))
    theirs = ((a.mean(0) - b.mean(0)) ** 2).sum() + (x ** 2).sum() + (y ** 2).sum()
    theirs -= 2 * np.trace(linalg.sqrtm(x @ y.T @ y @ x.T)).real
    assert results["table"]["A and B"]["Frechet"] == pytest.approx(theirs, rel=1e-5)
    assert results["table"]["A and B"]["MMD"] == pytest.approx(distances.mmd(a, b), rel=1e-3)
    assert "pytorch-fid: bilinear" in results["features"] and not (tmp_path / "fid.json").exists()


@pytest.mark.reference
def test_inception_matches_torch_fidelity(inception_state, tmp_path, monkeypatch):
    """The network of torch-fidelity with the same weights, which it reads from a file of its own kind."""
    package = importlib.util.find_spec("torch_fidelity")
    if not package:
        pytest.skip("pip install --no-deps torch-fidelity to compare with it")
    bare = type(sys)("torch_fidelity")                      # its __init__ wants torchvision, the network not
    bare.__path__ = list(package.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "torch_fidelity", bare)
    theirs = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(inception_state, tmp_path / "w.pth")
    save_file(inception_state, tmp_path / "w.safetensors")
    theirs = theirs.FeatureExtractorInceptionV3("inception", ["2048"], str(tmp_path / "w.pth"))
    pixels = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    with torch.no_grad():
        mine = distances.load_inception(tmp_path / "w.safetensors")((pixels.float() - 128) / 128)
        assert gap(mine, theirs(pixels)[0]) < 1e-5


@pytest.mark.slow
def test_inception_weights_that_are_none(inception_state, run, tmp_path, capsys):
    """A pickle, a missing file, other networks: one sentence, whose line of Python makes a file that is
    read."""
    state = {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v
             for k, v in inception_state.items()}                    # as ported weights may lie
    torch.save(state, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    other = {k.replace("Mixed", "mixed"): v.contiguous() for k, v in state.items()}
    save_file(other, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-1])
    for i in range(4):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{i}.png")
    for name, sentence in (("pt_inception-2015-12-05-6726825d.pth", "a PyTorch pickle"),
                           ("none", "there is no file"), ("other.safetensors", "don't fit Inception"),
                           ("cut.safetensors", "cut short or broken")):
        run(f"fid --a {tmp_path} --b {tmp_path} --inception {tmp_path / name}", out="out", code=2)
        message = capsys.readouterr().err
        assert message.startswith("eval.py: ") and message.count("\n") == 1 and sentence in message, message
        assert len(message) < 700 and files_below(tmp_path / "out") == {}
    command = message[message.index("python -c"):].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    loaded = distances.load_inception(tmp_path / "inception.safetensors").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


# ---- people ----------------------------------------------------------------------------------------
@pytest.fixture
def compare_page(model, run, tmp_path):
    """n -> (a comparison page of two generated folders, its study, the folders)."""
    def compare_page(n=3):
        prompts = write_prompts(tmp_path / "prompts.jsonl", n)
        run(f"generate --prompts {prompts} --seed 0", out="first")
        run(f"generate --prompts {prompts} --seed 1", out="second")
        folders = [tmp_path / name / "geneval" for name in ("first", "second")]
        run(f"compare {folders[0]} {folders[1]} --prompts {prompts} --seed 5")
        page = tmp_path / "compare.html"
        return page, json.loads(re.search(r"const study = (.*);\n", page.read_text())[1]), folders
    return compare_page


def test_compare_page_is_blind_whole_and_shuffled(compare_page):
    """Every pair once, in another order, sides by coin; images are in the page, which names no other
    address."""
    page, study, folders = compare_page(12)
    assert not re.search(r"(?:src|href)=|https?:|url\(|@import", page.read_text())
    ids = [pair["id"] for pair in study["pairs"]]
    assert sorted(ids) == list(range(48)) != ids
    for pair in study["pairs"]:
        name = f"{pair['id'] // 4:05}/samples/{pair['id'] % 4:04}.png"
        files = [folder / name for folder in folders]
        if not preference.a_is_left(5, pair["id"]):
            files.reverse()
        for side, file in zip(("left", "right"), files):
            kind, code = pair[side].split(",")
            assert kind == "data:image/png;base64"
            image = Image.open(io.BytesIO(base64.b64decode(code)))
            assert (np.asarray(image) == np.asarray(data.load_image(file))).all()
    assert 12 < sum(preference.a_is_left(5, i) for i in range(48)) < 36


@pytest.mark.reference
def test_votes_are_counted_and_tested(run, tmp_path, capsys):
    """By hand with sides undone; the p-value equals scipy's exact binomial test; files of two people
    add up."""
    stats = pytest.importorskip("scipy.stats", reason="needs pip install scipy")
    for wins, losses in ((0, 1), (5, 5), (8, 2), (3, 14), (60, 41), (900, 1000)):
        theirs = stats.binomtest(wins, wins + losses).pvalue
        assert preference.sign_test(wins, losses) == pytest.approx(theirs, rel=1e-9)
    files = []
    for person, prefers_a in enumerate((range(9), range(7))):
        sides = {i: "left" if (i in prefers_a) == preference.a_is_left(3, i) else "right" for i in range(10)}
        votes = {str(i): {"quality": side} for i, side in sides.items()}
        votes["10"] = {"quality": "alike", "alignment": "alike"}
        ballot = {"id": "x", "seed": 3, "a": "ours", "b": "theirs", "votes": votes}
        files.append(write_jsonl(tmp_path / f"{person}.json", [ballot]))
    table = run(f"compare --votes {files[0]} {files[1]}", "compare.json")["table"]
    assert list(table) == ["quality"]                        # no side was ever chosen for the other question
    row = table["quality"]
    assert (row["A"], row["B"], row["alike"], row["score"]) == (16, 4, 2, 0.8)
    assert row["p"] == pytest.approx(stats.binomtest(16, 20).pvalue)
    assert "ours beat B = theirs" in capsys.readouterr().out


@pytest.fixture
def browser():
    """Headless Chromium: the one that the variable CHROMIUM names, else one on PATH, else Playwright's
    own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    names = "chromium chromium-browser google-chrome google-chrome-stable chrome headless_shell".split()
    with playwright.sync_playwright() as p:
        there = [*filter(None, map(shutil.which, names)), p.chromium.executable_path]
        chromium = os.environ.get("CHROMIUM") or there[0]
        if "CHROMIUM" not in os.environ and not Path(chromium).is_file():
            pytest.skip(f"none of {', '.join(names)} on PATH: apt install chromium, or set CHROMIUM")
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width, height", [(1280, 720), (360, 740), (740, 360)])
def test_compare_page_fits_screens(compare_page, browser, width, height):
    """On a desk, on a phone and on a phone held across: no sideways scrolling, buttons on one line and
    large enough to tap, images of equal size side by side that a tap enlarges."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(compare_page()[0].as_uri())
    page.evaluate("document.getElementById('prompt').textContent = 'many words '.repeat(30)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = [b.bounding_box() for b in page.locator("button").all()]
    assert len(boxes) == 9 and all(36 <= b["height"] < 60 and b["width"] >= 60 for b in boxes)
    assert all(b["x"] >= 0 and b["x"] + b["width"] <= width for b in boxes)
    left, right = (page.locator(f"#{side}").bounding_box() for side in ("left", "right"))
    assert left["y"] == right["y"] and left["width"] == pytest.approx(right["width"], abs=1)
    assert left["width"] > 150
    assert left["height"] <= max(0.61 * height, 194)
    page.click("#left")
    assert page.locator("#left").bounding_box() == {"x": 0, "y": 0, "width": width, "height": height}
    page.click("#left")
    page.click("#right")
    page.click("#right")
    assert page.locator("#left").bounding_box()["width"] == left["width"]


def test_compare_page_in_a_browser(compare_page, browser, run, tmp_path):
    """Click through the page in headless Chromium, reload in between: the export is what was clicked,
    and counts."""
    file, study, _ = compare_page()
    clicked, rng, page, errors = {}, np.random.default_rng(1), browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route(re.compile("^https?:"), lambda route: errors.append(route.request.url))
    page.goto(file.as_uri())
    for number, pair in enumerate(study["pairs"]):
        if number == 5:
            page.reload()                                            # goes on at the first unanswered pair
        assert page.text_content("#prompt") == pair["prompt"]
        assert page.evaluate("document.getElementById('left').naturalWidth") == 8
        assert page.text_content("#count") == f"{number + 1} of 12, {number} answered"
        for name in preference.QUESTIONS:
            for side in rng.choice(["left", "alike", "right"], 2).tolist():      # minds change
                page.click(f"button[data-name={name}][data-side={side}]")
                clicked.setdefault(str(pair["id"]), {})[name] = side
            assert page.locator(f"button[data-name={name}].on").count() == 1
        if number < 11:
            page.click("#next")
    assert page.is_disabled("#next") and "12 answered" in page.text_content("#count")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "votes.json")
    assert not errors and json.loads((tmp_path / "votes.json").read_text())["votes"] == clicked
    table = run(f"compare --votes {tmp_path / 'votes.json'}", "compare.json")["table"]
    for name, row in table.items():
        sides = {int(i): vote[name] for i, vote in clicked.items()}
        wins = sum(side == ("left" if preference.a_is_left(5, i) else "right") for i, side in sides.items())
        ties = sum(side == "alike" for side in sides.values())
        assert (row["A"], row["alike"], row["B"]) == (wins, ties, 12 - wins - ties)


# ---- a look inside one prompt ----------------------------------------------------------------------
def heard_run(folder, prompt="a red star", seed=3):
    """A pipeline, what `record` heard of one image, that image, and the prompt's ids."""
    pipe = sample.Pipeline(folder, "cpu")
    with explain.record(pipe, pipe.sampling["cfg"], pipe.sampling["decoder_cfg"]) as tape:
        image = pipe.images([prompt], [seed])[0]
    return pipe, tape, image, pipe.prompt_rows([prompt])[0][0]


def test_attention_weights_are_those_of_torch():
    """Against torch's own function with the unit vectors as values: masks, scales, grouped heads."""
    q, k, eye = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.eye(7).expand(2, 2, 7, 7)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., 0] = True
    for asked in ({}, {"scale": 0.1}, {"mask": mask}, {"mask": torch.randn(2, 1, 5, 7)}, {"causal": True}):
        theirs = F.scaled_dot_product_attention(
            q, k, eye, attn_mask=asked.get("mask"), is_causal="causal" in asked, scale=asked.get("scale"),
            enable_gqa=True)
        assert gap(explain.attention_weights(q, k, **asked), theirs) < 1e-5


def test_explained_attention_is_an_explicit_softmax(tiny_folder, monkeypatch):
    """Of the first layer of the language model, by hand from the embeddings without cache; of all of the
    DiT, from its own queries and keys. All rows sum to 1, and afterwards nothing listens."""
    crossed, attend, original = [], dit.attend, F.scaled_dot_product_attention

    def attending(q, k, v):
        crossed.append((q[0], k[0]))
        return attend(q, k, v)
    monkeypatch.setattr(dit, "attend", attending)
    pipe, tape, image, ids = heard_run(tiny_folder)
    net, cross = pipe.model.requires_grad_(False), crossed[1::2]        # after each one's self-attention
    n, length, layer = net.config.n_query, len(ids) + 1, net.llm.layers[0]
    assert F.scaled_dot_product_attention is original and not net.dit._forward_hooks
    assert torch.equal(image, sample.Pipeline(tiny_folder, "cpu").images(["a red star"], [3])[0])
    embeds = net.llm.embed_tokens(torch.tensor([[*ids, net.config.img_token_id]]))
    x = layer.input_layernorm(torch.cat([embeds, net.latent_queries], 1))                    # (1, L + n, D)
    cos, sin = net.llm.rope(torch.arange(length + n)[None], x.dtype)
    q, k = (project(x).unflatten(-1, (-1, net.config.text.head_dim)).transpose(1, 2)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    q, k = (rotate_half_split(y, cos, sin) for y in (q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)))
    scores = (q @ k.mT)[0] / net.config.text.head_dim ** 0.5
    scores = scores.masked_fill(torch.ones(length + n, length + n).triu(1).bool(), -math.inf)
    by_hand = scores.softmax(-1)[:, length:]
    assert set(tape.layers) == set(range(len(net.llm.layers)))
    assert gap(tape.layers[0], by_hand) < 1e-5
    maps = [row for step in tape.maps for row in step]
    assert len(maps) == 4 * len(net.dit.layers)
    for weights, (q, k) in zip(maps, cross, strict=True):
        scores = torch.einsum("hnd,md->hnm", q, k[0]) / q.shape[-1] ** 0.5          # one key head
        assert gap(weights, scores.softmax(-1).mean(0)) < 1e-5
    for rows in (*tape.layers.values(), *maps):
        assert gap(rows.sum(-1), torch.ones(rows.shape[:-1])) < 1e-5


def page_run(page):
    """What a page shows, as a dict."""
    return json.loads(re.search(r"const run = (.*);\n", page)[1])


def image_in(address):
    """The pixels of an image in a page."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_explain_page_shows_that_very_run(tiny_folder, tmp_path, capsys):
    """Tokens, states, predictions and the image are those of --prompt; every line of code is where the page
    says; the same again gives the same file, other settings another one."""
    prompt = 'a "red" star </script> /*RUN*/ ABOUT'
    command = ["--ckpt", tiny_folder, "--device", "cpu", "--out", str(tmp_path), "--seed", "3"]
    command += ["--explain", prompt]
    assert sample.main(command) == 0
    file = Path(capsys.readouterr().out.strip())
    assert file.name == "a-red-star-script-run-about-seed3-explained.html"
    run, text = page_run(file.read_text("utf-8")), file.read_text("utf-8")
    assert not re.search(r"https?:|url\(|@import", text) and text.count("</script>") == 1
    pipe = sample.Pipeline(tiny_folder, "cpu")
    image = pipe.images([prompt], [3])[0]
    assert (image_in(run["image"]) == sample.to_uint8(image)).all() and run["prompt"] == prompt
    assert json.loads(sample.made_from(file))["prompt"] == prompt
    tokens = "".join(token["text"] for token in run["tokens"] if token["kind"] == "text")
    assert prompt in tokens and len(run["tokens"]) == len(pipe.prompt_rows([prompt])[0][0]) + 1 + run["n"]
    states, predictions = pipe.trajectory(prompt, 3)
    seeds, flow = [3] * len(states), run["flow"]
    negative = pipe.negative(seeds)
    for name, features in (("state", states), ("prediction", predictions)):
        pixels = pipe.pixels(features, seeds, negative=negative)
        for frame, theirs in zip(flow["frames"], pixels, strict=True):
            assert np.abs(image_in(frame[name]) - sample.to_uint8(theirs).astype(int)).max() <= 2
    assert [frame["step"] for frame in flow["frames"]] == [0, 1, 2, 3, 4] and run["guided"]
    assert len(run["decoder"]["frames"]) == 3 and min(frame["pull"] for frame in flow["frames"]) > 0
    last = image_in(run["decoder"]["frames"][-1]["prediction"])
    assert np.abs(last - sample.to_uint8(image).astype(int)).max() <= 1      # its end is the image
    for panel in run["panels"].values():
        name, number = panel["place"].split(":")
        line = (Path(sample.__file__).parent / name).read_text("utf-8").splitlines()[int(number) - 1]
        assert panel["code"] and panel["code"] in line
    assert sample.main(command) == 0 and sample.main([*command, "--cfg", "1", "--decoder-cfg", "1"]) == 0
    same, other = map(Path, capsys.readouterr().out.split())
    assert same == file and other.name.endswith("explained-v2.html")
    assert not page_run(other.read_text("utf-8"))["guided"]


def test_explain_page_of_other_samplers(tiny_folder, tmp_path, capsys):
    """Order 2 and guidance at early times alone: the page is of that run, and pulls where it was guided."""
    command = ["--ckpt", tiny_folder, "--device", "cpu", "--out", str(tmp_path), "--explain", "a star"]
    words = "--sampler ab2 --cfg-interval 0 0.1 --decoder-sampler dpm++2m --decoder-spacing karras"
    command += words.split()
    assert sample.main(command) == 0
    run = page_run(Path(capsys.readouterr().out.strip()).read_text("utf-8"))
    pipe = sample.open_pipeline(sample.parse(command)[1])
    image, other = (each.images(["a star"], [0])[0] for each in (pipe, sample.Pipeline(tiny_folder, "cpu")))
    assert (image_in(run["image"]) == sample.to_uint8(image)).all() and gap(image, other) > 1e-2
    assert [frame["pull"] > 0 for frame in run["flow"]["frames"]] == [True, True, False, False, False]
    last = image_in(run["decoder"]["frames"][-1]["prediction"])
    assert np.abs(last - sample.to_uint8(image).astype(int)).max() <= 1
    schedule = pipe.decoder.schedule.with_steps(3, "dpm++2m", "karras")
    sigmas = [frame["sigma"] for frame in run["decoder"]["frames"]]
    assert sigmas == pytest.approx(schedule.sigmas[:3].tolist())


def test_explain_page_is_small_for_large_models(tiny_folder, monkeypatch):
    """Layers, heads, frames and pixels are capped; half precision, a model without DiT."""
    caps = {"LAYERS": 1, "HEADS": 2, "LARGE": 16, "LARGE_FRAMES": 2, "PIXELS": 8, "RESULT": 16}
    for name, value in caps.items():
        monkeypatch.setattr(explain, name, value)
    pipe = sample.Pipeline(tiny_folder, "cpu", "bf16", offload=True)
    page, image = explain.explain_page(pipe, "a star", 0, "{}", upsample=True)
    run = page_run(page)
    assert run["attention"]["layers"] == [1] and run["attention"]["heads"] == 3 and run["upsampled"]
    assert len(base64.b64decode(run["attention"]["weights"])) == 3 * run["n"] * len(run["tokens"])
    assert [frame["step"] for frame in run["flow"]["frames"]] == [0, 4]
    assert image_in(run["flow"]["frames"][0]["state"]).shape == (8, 8, 3)
    assert len(run["decoder"]["frames"]) == 2 and image_in(run["image"]).shape == (16, 16, 3)
    assert torch.equal(image, pipe.images(["a star"], [0], upsample=True)[0])
    pipe.model.dit = None
    with pytest.raises(ValueError, match="has no DiT"):
        explain.explain_page(pipe, "a star", 0, "{}")


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (360, "dark")])
def test_explain_page_in_a_browser(tiny_folder, browser, tmp_path, width, scheme):
    """The slider moves every panel that depends on time; layers, heads and queries can be chosen; it plays;
    nothing throws, no request leaves, and a phone needs no sideways scrolling."""
    about = json.dumps({"seed": 0, "cfg": 1.5, "ckpt": "tiny", "dtype": "float32", "device": "cpu"})
    file, errors, asked = tmp_path / "page.html", [], []
    text, _ = explain.explain_page(sample.Pipeline(tiny_folder, "cpu"), "a star", 0, about)
    file.write_text(text, "utf-8")
    page = browser.new_page(viewport={"width": width, "height": 740}, color_scheme=scheme)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width

    def seen():
        return page.evaluate("""() => [...document.querySelectorAll("#x_t, #x_1, #latents, #predicted")]
            .map(image => image.src).concat([...document.querySelectorAll("svg line")].map(line =>
            line.getAttribute("x1"))).concat([...document.querySelectorAll("#maps canvas")].map(canvas =>
            canvas.toDataURL())).concat(document.getElementById("now").textContent)""")

    def slide(step):
        page.evaluate("""step => { const e = document.getElementById("time"); e.value = step;
            e.dispatchEvent(new Event("input")) }""", step)
        return seen()
    first, last = slide(0), slide(4)
    assert len(first) == 4 + 2 + 4 + 1 and all(a != b for a, b in zip(first, last, strict=True))
    assert "step 4 of 4" in last[-1] and page.evaluate("document.getElementById('x_t').naturalWidth") == 32
    page.click("#play")                                                 # from its end: begins anew
    page.wait_for_function("document.getElementById('now').textContent.startsWith('step 4 of 4')")
    for selector in ("button[data-key=layer] >> nth=0", "button[data-key=head] >> nth=2",
                     "#maps button >> nth=1"):
        before = page.text_content("#attention .note")
        page.click(selector)
        assert page.get_attribute(selector, "class") == "on"
        assert page.text_content("#attention .note") != before
    assert page.text_content("#attention .note").startswith("Query 2 most")
    page.hover("canvas.matrix >> nth=0")
    assert "query" in page.text_content("#attention .note")
    assert not errors and {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert len([url for url in asked if url.startswith("file")]) == 1


# ---- leakage ---------------------------------------------------------------------------------------
def test_leaks_equal_brute_force():
    """Nearest captions by every pair's Jaccard similarity; exact ones whatever the case."""
    rng = np.random.default_rng(0)
    words = "a the red blue small star circle dog on above and two".split()
    captions = [" ".join(rng.choice(words, rng.integers(3, 9))) + "." for _ in range(300)]
    prompts = [" ".join(rng.choice(words, rng.integers(2, 7))) for _ in range(40)]
    prompts += [captions[7].upper() + "!", "nothing like it"]

    def pairs(text):
        words = ["^", *re.sub(r"[^a-z ]", "", text.lower()).split(), "$"]
        return {*zip(words, words[1:])}

    def jaccard(a, b):
        return len(pairs(a) & pairs(b)) / len(pairs(a) | pairs(b))
    leaks = leakage.find_leaks(prompts, captions, 0.5)
    for prompt, (similarity, caption, _) in zip(prompts, leaks):
        best = max(jaccard(prompt, text) for text in captions)
        assert similarity == pytest.approx(best if best >= 0.5 else 0)
        assert caption is None or jaccard(prompt, caption) == pytest.approx(best)
    assert leaks[-1] == (0, None, False) and leaks[-2][0] == 1 and leaks[-2][2]


def test_leakage_of_a_folder_and_of_the_world(run, tmp_path):
    """A folder as source, whose images aren't read; without files, the prompts of `alignment` and the
    world's captions."""
    for i, text in enumerate((b"A photo of a circle.", b"\xff\xfe", b"a photo of two big stars")):
        (tmp_path / f"{i}.png").write_bytes(b"captions that training passes over don't count")
        (tmp_path / f"{i}.txt").write_bytes(text)
    prompts = [{"tag": "t", "include": [], "prompt": prompt}
               for prompt in ("a photo of a circle", "a photo of two stars", "a dog")]
    file = write_jsonl(tmp_path / "p.jsonl", prompts)
    results = run(f"leakage --train {tmp_path} --prompts {file} --near 0.5", "leakage.json", out="out")
    assert [row["score"] for row in results["table"].values()] == pytest.approx([1 / 3, 2 / 3])
    assert [row["exact"] for row in results["found"]] == [True, False]
    results = run("leakage --n 400 --near 0.6", "leakage.json", out="world")
    assert results["table"]["word for word"]["n"] > 100 and results["found"]
    assert all(0.6 <= row["similarity"] <= 1 and row["caption"] for row in results["found"])


def test_neighbours_find_what_is_copied(tiny_folder, run, tmp_path, capsys):
    """A copy of a training image lies at distance 0 of it, another image beyond; broken training images
    are passed over."""
    train_set, made = tmp_path / "train", tmp_path / "made"
    train_set.mkdir()
    made.mkdir()
    for i in range(6):
        Image.fromarray(noise(i, 32, 32, 3)).save(train_set / f"{i}.png")
        (train_set / f"{i}.txt").write_text(f"image {i}")
    (train_set / "7.png").write_bytes(b"broken")
    (train_set / "7.txt").write_text("broken")
    shutil.copy(train_set / "4.png", made / "copy.png")
    Image.fromarray(noise(9, 32, 32, 3)).save(made / "new.png")
    line = f"neighbours --a {made} --train {train_set} --ckpt {tiny_folder}"
    results = run(line, "neighbours.json")
    assert "median distance" in capsys.readouterr().out
    copied, new = results["pictures"]
    assert copied["nearest"] == "image 4" and copied["distance"] < 1e-3 < new["distance"]
    usual = results["table"]["among training pictures"]
    assert usual["n"] == 6 and usual["distance"] > 1e-3
    sheet = np.asarray(Image.open(tmp_path / "neighbours.png"))
    assert sheet.shape == (128, 128, 3) and (sheet[:64, :64] == sheet[64:, :64]).all()
    assert (sheet[:64, 64:] != sheet[64:, 64:]).any()
    run(f"{line} --n 1", code=2)
    assert "--n: 1 isn't at least 2" in capsys.readouterr().err


# ---- speed -----------------------------------------------------------------------------------------
@pytest.mark.reference
def test_speed_in_small(run, tmp_path, capfd):
    """Each row stands in the table and as a line of JSON, nothing on stderr; references agree; precisions
    take the memory and have the errors that they should."""
    for library in ("webdataset", "diffusers", "transformers"):
        pytest.importorskip(library, reason=f"needs pip install {library}")
    rows = run("speed --quick --rounds 1", "speed.json")["rows"]
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert [json.loads(line) for line in lines if line[0] == "{"] == rows and err == ""
    assert sum(line.startswith(f"  {row['row']}") for line, row in zip(lines[::2], rows)) == len(rows) == 18
    assert min(row[key] for row in rows for key in ("seconds", "reference_seconds", "ratio")) > 0
    tensors = [row for row in rows if row["reference"] != "webdataset"]
    assert min(row[key] for row in tensors for key in ("MiB", "reference_MiB", "evaluations")) > 0
    assert max(row["error"] for row in rows if row["reference"] != "fp32") < 1e-5 and rows[-1]["error"] == 0
    parts = {row["row"]: {} for row in rows if row["reference"] == "fp32"}
    for row in (row for row in rows if row["reference"] == "fp32"):
        parts[row["row"]][row["precision"]] = row
    for part in parts.values():
        exact, half, int8 = (part[name] for name in ("fp32", "bf16", "int8"))
        assert exact["error"] == 0 and 1e-4 < half["error"] < 0.05 and 1e-4 < int8["error"] < 0.08
        assert half["weights_MiB"] == exact["weights_MiB"] / 2 and exact["ratio"] == 1
        assert exact["weights_MiB"] / 4 < int8["weights_MiB"] < exact["weights_MiB"]
    assert len(parts) == 3 and {path.name for path in tmp_path.iterdir()} == {"speed.json"}


@pytest.mark.reference
def test_gradients_of_both_training_loops_are_compared():
    """Other noise, or other prompts, on one side alone is seen in the gradients."""
    pytest.importorskip("diffusers", reason="needs pip install diffusers")
    pair = speed.TrainingPair(speed.sizes(True))

    def changed(name):
        before, loop = getattr(pair, name), pair.theirs

        def theirs():
            setattr(pair, name, before.roll(1, 0))
            loop()
            setattr(pair, name, before)
        return theirs

    def ours():
        pair.ours(pair.cached)
    assert pair.gradient_difference(ours, pair.theirs) < 1e-5
    assert all(pair.gradient_difference(ours, changed(name)) > 0.01 for name in ("x0", "ids", "t"))


# ---- a GPU's checklist -----------------------------------------------------------------------------
@pytest.mark.slow
def test_gpu_checklist_runs_on_a_cpu(run, tmp_path, monkeypatch, capsys):
    """Every section has its rows, of which a CPU leaves out those that need CUDA; both files are there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = run("gpu --quick", "gpu.json")
    rows, table = results["rows"], (tmp_path / "gpu.md").read_text()
    assert list(results["seconds"]) == [title for title, _, _ in gpu.SECTIONS] and all(results["machine"])
    assert {row["section"] for row in rows} == set(results["seconds"])
    assert all(row["value"] is not None or row["ok"] or row["note"] == gpu.NEEDS_CUDA for row in rows)
    assert not any(row["ok"] is False for row in rows) and sum(row["ok"] is True for row in rows) > 12
    assert all(row["check"] in table for row in rows) and "FAILED" not in capsys.readouterr().out
    checks = [row["check"] for row in rows]
    assert all(any(f"{name} against" in check for check in checks) for name in gpu.BOUNDS)


def test_gpu_sections_are_guarded(run, monkeypatch):
    """What raises, is too slow or beyond its bound is in the table, the rest runs, the exit code is 1."""
    def raises(bench):
        raise RuntimeError("no kernel")

    def too_small(bench):
        raise torch.OutOfMemoryError("2 GiB")

    def too_slow(bench):
        while True:
            pass

    def measures(bench):
        bench.row("far", 2.0, "m", bound=1.0)
        bench.row("near", 0.5, "m", bound=1.0)
    sections = tuple((check.__name__, check, 1.5) for check in (raises, too_small, too_slow, measures))
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    rows = run("gpu --quick", "gpu.json", code=1)["rows"]
    assert [row["ok"] for row in rows] == [False, None, False, False, True]
    errors = [row["note"].split(":")[0] for row in rows[:3]]
    assert errors == ["RuntimeError", "OutOfMemoryError", "TimeoutError"]
    monkeypatch.setattr(gpu, "SECTIONS", sections[1:2])
    assert run("gpu --quick", "gpu.json")["rows"][0]["note"] == "OutOfMemoryError: 2 GiB"
    monkeypatch.setattr(gpu, "LIMIT", 0)
    assert run("gpu --quick", "gpu.json")["rows"][0]["check"] == "skipped"


# ---- scale -----------------------------------------------------------------------------------------
@pytest.fixture
def many(tmp_path, monkeypatch):
    """A source of 12 shards of 10 samples, of which 104 are trained on."""
    monkeypatch.setattr(data, "INDEX_FOLDER", tmp_path / "index")
    scale.write_sparse_shard(tmp_path / "shard", 10, 50_000)
    for i in range(12):
        (tmp_path / f"{i:02d}.tar").hardlink_to(tmp_path / "shard")
    source = data.open_source(f"{tmp_path}/*.tar", 64)
    assert len(source) == 120 and os.stat(tmp_path / "shard").st_size > 500_000
    assert source[7]["image"].shape == (64, 64, 3) and source[7]["caption"] == "caption 7"
    return source


def test_scale_finds_wrong_orders(many, monkeypatch):
    """The order of 4 ranks is that of one, over an epoch's end, too; and it is seen where ranks meet other
    samples, or where an order holds one twice, leaves one out, holds a held-out one or isn't numpy's."""
    length = 120 - len(many.held_out)
    def agree():
        return scale.ranks_agree(many, 4, range(2, 12), 12)
    assert 2 * 12 < length < 12 * 12 and agree()
    assert all(scale.epoch_is_whole(many, 120, epoch) == (True, True) for epoch in (0, 3))

    class Blocks(scale.MicroBatches):
        def __getitem__(self, first):
            n = self.size // self.ranks
            examples = [self.samples[first + self.rank * n + i] for i in range(n)]
            return self.collate(examples)
    with monkeypatch.context() as patch:
        patch.setattr(scale, "MicroBatches", Blocks)
        assert not agree()
    index = many.index
    with monkeypatch.context() as patch:
        patch.setattr(many, "index", lambda p, ahead, seed: index(p - p % 2, ahead, seed))
        assert not agree() and scale.epoch_is_whole(many, 120, 0) == (False, True)
    for change in (lambda order: order[1], lambda order: length):    # twice; beyond the end
        index(0)
        many.orders[0][1][0] = change(many.orders[0][1])
        assert scale.epoch_is_whole(many, 120, 0) == (False, False)
        many.orders.clear()


@pytest.mark.slow
def test_scale_runs_in_small(run, tmp_path):
    """Every section has its rows, and nothing else is left; the plan's numbers follow from results/gpu.json
    and the paper's."""
    results, table = run("scale --quick", "scale.json"), (tmp_path / "scale.md").read_text()
    rows = {row["check"]: row for row in results["rows"]}
    assert list(dict.fromkeys(row["section"] for row in results["rows"])) == list(scale.SECTIONS)
    assert {path.name for path in tmp_path.iterdir()} <= {"scale.json", "scale.md"}
    assert len(rows) == len(results["rows"]) and all(check in table for check in rows)
    assert [row["ok"] for row in rows.values() if row["ok"] is not None] == [True] * 7
    assert rows["samples"]["value"] == 1200 and rows["a start: the first batch"]["value"] > 0
    assert abs(rows["features of all images, bf16"]["value"] * 1e12 - 1200 * 64 * 2) < 1
    speeds = {row["check"]: row["value"] for row in json.loads(scale.GPU_TABLE.read_text())["rows"]}
    one, encoder = speeds["stage 1 of the 4B, eager, batch 16"], speeds["EVA-CLIP features, bf16, batch 8"]
    days = 150_000 * 512 / 32 / 86400
    name = "32 GPUs, 16 images each"
    for check, value in {f"{name}: days with the cache": days / one,
                         f"{name}: days without": days * (1 / one + 1 / encoder),
                         f"{name}: reading the cache": 32 * one * 64 * 1792 * 2 / 1e9,
                         "256 GPUs, 32 images each: failures": 256 * 419 / 54 / 16384}.items():
        assert abs(rows[check]["value"] / value - 1) < 1e-6


# ---- mistakes --------------------------------------------------------------------------------------
MISTAKES = {  # command line: what the sentence must name
    "": "required", "paint": "invalid choice", "alignment --ckpt /nowhere": "no model in /nowhere",
    "alignment --seed -1": "--seed: -1 isn't at least 0", "alignment --seed x": "--seed: 'x' is no whole",
    "understanding --seed 0": "world that models are trained on",
    "alignment --best-of 600 --seed 2": "--seed",
    "judge --n 0": "--n: 0 isn't at least 1", "judge --n 2.5": "no whole number",
    "judge --n nan": "no whole",
    "judge --size x": "--size", "judge --size 8": "--size: 8 isn't at least 16",
    "judge --size 1000000": "at most 4096", "binding --n 1": "--n: 1 isn't at least 2",
    "alignment --n-prompts 0": "--n-prompts", "alignment --objects 5": "at most 4",
    "alignment --best-of 0": "--best-of", "alignment --images -3": "--images",
    "speed --rounds -1": "--rounds",
    "figure4 --jobs 0": "--jobs", "figure4 --seeds 0": "--seeds", "figure4 --batch 1e3": "--batch",
    "figure4 --points 0": "--points: 0 isn't at least 1",
    "figure4 --seed 999 --seeds 2": "--seed is too large",
    "figure4 --images 1": "--images: 1 isn't at least 2", "figure5 --objects 1": "must lie between",
    "leakage --near nan": "--near: 'nan' is no number",
    "leakage --near 2": "--near: 2 isn't above 0 and at mo",
    "leakage --near 0": "--near", "ablation --what luck": "--what", "fid --a FOLDER --b x": "no image",
    "judge --dtype fp32": "unrecognized", "judge --n-p 3": "unrecognized",
    "alignment --dtype int4": "--dtype",
    f"fid --a {Path(command_line.__file__).parent / 'docs'} --b FOLDER": "no image",
    "reconstruction --images FOLDER": "no image", "fid --a FOLDER/x --b y": "x is no folder of images",
    "understanding --data=--": "--data: it is empty", "generate --prompts=--": "--prompts: it is empty",
    "generate --bench dpg --prompts FOLDER": "no prompts",
    "leakage --prompts FOLDER/none.jsonl": "^eval.py: [^[]*none.jsonl: No such file",
    "generate --prompts FOLDER": "geneval are a file, not the folder",
    "score wise --results FOLDER": "folder",
    "generate --prompts /dev/zero": "pipe or device", "understanding --data /dev/zero": "pipe or device",
    "understanding --data FOLDER": "folder", "compare --votes /dev/null": "pipe or device",
    "alignment --prompts FOLDER": "folder", "leakage --prompts /dev/null": "pipe or device",
    "understanding --write FOLDER": ".tsv", "understanding --data=": "--data is empty",
    "understanding --write /proc/none/x.tsv": "/proc/none",
    # flags without effect
    "understanding --data x.tsv --n 5": "--n has no effect with --data",
    "understanding --data x.tsv --seed=3": "--seed has no effect", "understanding --official": "--official",
    "understanding --data x.tsv --write y.tsv": "--write has no effect",
    "understanding --task pope": "--task",
    "understanding --images x": "--images", "understanding --annotations x": "--annotations has no effect",
    "understanding --write x.tsv --task mme": "--task", "understanding --write x.tsv --ckpt x": "--ckpt",
    "understanding --write x.tsv --device cpu": "--device", "understanding --eva x": "unrecognized",
    "reconstruction --images x --n 5": "--n has no effect", "alignment --prompts x --novel": "--novel",
    "alignment --words": "unrecognized", "upsampling --seed 0": "--seed 0 is the world",
    "fid --a x --b y --inception z --ckpt w": "--ckpt",
    "compare --votes x --seed 1": "--seed", "compare a b --votes x": "folders has",
    "leakage --bench wise": "--bench",
    "leakage --train x --n 5": "--n has no effect", "figure4 --n 5": "--n has no effect",
    "ablation --what rope --ckpt x": "--ckpt has no effect", "ablation --what steps --bf16": "--bf16 has no",
    "ablation --what guidance --jobs 3": "--jobs", "score geneval --results x --seed 1": "unrecognized"}
HARMLESS = (  # flags without effect, but at their defaults
    "understanding --data x.tsv --n 600 --seed 1", "reconstruction --images x --n 200",
    "leakage --train x --bench geneval --n 20000", "compare --votes x --bench geneval --seed 0",
    "alignment --prompts x --objects 4", "fid --a x --b y --inception z --dtype auto")


@pytest.mark.parametrize("line", HARMLESS)
def test_flags_at_their_defaults_are_harmless(line):
    assert command_line.parse(line.split()).command == line.split()[0]


DEEP = "[" * 3000 + "]" * 3000
FREE = {"tag": "t", "prompt": "p", "include": [{"class": "star", "count": 1}]}
BROKEN_FILES = {  # command line: [(what is in FILE: text, bytes, JSON, or rows of a TSV; the sentence)]
    "understanding --data FILE.tsv": [
        ([{**ROW, "image": "%%%notbase64" * 9}], "row 1 .*no picture in base64"),
        ([without("answer")], "no answers or answer"), ([NARROW], "row 1 .*1 x 201"),
        ([without("image")], "no image"), ([{**ROW, "A": "x", "B": "y"}], "none of its options"),
        ([{**ROW, "A": "nan", "B": "y", "answer": "A"}], "none of its options B"),
        ([ROW, ROW], "same index"), ("index\timage\n", "no rows"), ("index\timage\n\t\n\n", "no rows"),
        ("index,image,question\n1,2,3\n", "no tabs"), ('"index\timage\n1\t2\n', "no tabs"),
        ("index\tindex\n1\t2\n", "two columns 'index'"), ("a\t\0\n1\t2\n", "row 1"),
        ("index\timage\tquestion\tanswer\n1\tab", "row 1 .*2 cells, not 4"),
        ('index\timage\tquestion\tanswer\n1\tx\t"a\tb\n', "quotation mark"),
        *((f"index\timage\tquestion\tanswer\n1\t{cell}\tq?\ty\n", "row 1 .*base64")
          for cell in ("[" * 10 ** 5, "[" + "-" * 10 ** 5 + "1]", "[" + "1+" * 10 ** 4 + "1]",
          "['a', 'b']")),
        ("index\timage\tquestion\tanswer\n1\t[[1], [2]]\tq?\ty\n", "row 1 .*must be a text"),
        (b"PAR1\0\0", "a Parquet file"), (b"PK\3\4", "zip archive or a spreadsheet"),
        (b"\x1f\x8b\x08", "gzip"), (b"\xff\xfea\0", "UTF-16"), (b"a\xff\xfe", "isn't UTF-8"),
        (b"version https://git-lfs.github.com", "git lfs pull"), (b"<html>", "a web page"),
        (bytes(257) + b"ustar", "a tar archive"), ("\n\n", "is empty")],
    "understanding --data FILE.csv": [("index,image\n1,2\n", "a CSV table: convert it")],
    "understanding --task mme --data FILE.tsv": [([ROW], "don't come in pairs")],
    "understanding --task pope --data FILE.tsv": [([{**ROW, "answer": "maybe"}], "row 1 .*yes or no")],
    "understanding --images FOLDER --data FILE.tsv": [([ROW], "--images has no effect")],
    "understanding --annotations FILE.json --data FILE.json": [([ASKED], "--annotations has no effect")],
    "understanding --data FILE.jsonl": [
        ('{"image": "no.png", "question": "q", "answer": "a"}', "there is no .*no.png"),
        ({**ASKED, "image": "../a.jpg"}, "row 1 .*'../a.jpg' isn't the name of a file below"),
        ({**ASKED, "image": "/etc/passwd"}, "row 1 .*isn't the name"), ({**ASKED, "image": "a\0"}, "row 1"),
        ({**ASKED, "image": "x" * 5000}, "row 1 .*no picture"),
        ({**ASKED, "image": {}}, "row 1 .*image must be"),
        ({**ASKED, "image": [["a.jpg"]]}, "row 1 .*image must be"), ({**ASKED, "image": [None]}, "no image"),
        ({**ASKED, "image": True}, "row 1 .*image must be"), ({**ASKED, "answer": {}}, "answer must be"),
        ({**ASKED, "answer": [[1]]}, "answer must be"), ({**ASKED, "answer": None}, "row 1 .*no answers"),
        ({**ASKED, "answer": [{"text": "x"}]}, "answer must be"),
        ({**ASKED, "question": ["q"]}, "question must"),
        ({**ASKED, "question": None}, "row 1 .*no question"),
        ({**ASKED, "question_id": [1]}, "question_id must"),
        ({**ASKED, "category": {}}, "category must be"), ({**ASKED, "hint": {}}, "hint must be"),
        ({**ASKED, "A": {}}, "A must be"), ('{"image": NaN}', "line 1.* NaN is no number"),
        ("3", "row 1 .*no obj"),
        (f'{{"image": {DEEP}}}', "line 1 isn't valid JSON: it is nested too deeply"),
        ("{}", "row 1 .*no image"),
        ('{"question": "\\ud800"}', "line 1 holds half a character"),
        ('{"a": 1}\n{"a"', "line 2 isn't valid")],
    "understanding --data FILE.json": [
        ({"questions": [{"question_id": 1, "image_id": 5, "question": "q?"}]}, "row 1 .*no picture .*5"),
        ({"questions": []}, "no entries"), ({"data": [3]}, "row 1 .*no object"), ("[", "isn't valid JSON"),
        ("null", "must hold a list or a JSON object")],
    "generate --prompts FILE.jsonl": [
        ("", "is empty"), (f"{ENTRY}\n{ENTRY[:20]}", "line 2 isn't valid JSON"),
        ('{"tag": "x", "include": []}', "entry 1 .*lacks the field prompt"),
        (ENTRY.replace("a red dog", " "), "is empty"),
        ({"tag": 1, "include": [], "prompt": "p"}, "tag must be"),
        ({"tag": "x", "include": {}, "prompt": "p"}, "include must be a list"),
        ({"prompt_id": 1, "Prompt": "a"}, "the prompts of --bench wise"),
        ({"key": "a", "category": "b", "prompt": "c"}, "the prompts of --bench mjhq")],
    "generate --bench dpg --prompts FILE.jsonl": [(ENTRY, "a folder of .txt files")],
    "generate --bench wise --prompts FILE.json": [
        ('{"a": 1}', "entry 1 .* lacks the field prompt_id"), (ENTRY, "the prompts of --bench geneval"),
        (json.dumps([{"prompt_id": 1, "Prompt": "a"}] * 2), "there twice"),
        (json.dumps([{"prompt_id": name, "Prompt": "a"} for name in ("a", "A")]), "there twice"),
        *(([{"prompt_id": name, "Prompt": "a"}], "entry 1 .*name of an image")
          for name in ("../../x", "/x", "", ".", "..", ".x", "a/b", "a\\b", "a\0b", "x" * 300, "é" * 150,
          "a\n",
                       "c:x", " ", "x.", "*")),
        ([{"prompt_id": None, "Prompt": "a"}], "prompt_id must be"),
        ([{"prompt_id": 1.5, "Prompt": "a"}], "must"),
        ([{"prompt_id": 1, "Prompt": ["a"]}], "Prompt must be a text")],
    "generate --bench mjhq --prompts FILE.json": [
        ("[3]", "entry 1 .* no object"), ('{"a": {"prompt"', "isn't valid JSON"),
        ({"../a": {"category": "food", "prompt": "p"}}, "'../a' can't be the name"),
        ({"a": {"category": "../..", "prompt": "p"}}, "'../..' can't be the name"),
        ({"a": {"category": "b", "prompt": "p"}, "A": {"category": "B", "prompt": "p"}}, "there twice"),
        ({"a": {"category": "food", "prompt": {}}}, "prompt must be a text")],
    "score geneval --results FILE.jsonl": [
        (f"{GENEVAL}\n{GENEVAL[:-4]}", "line 2 isn't valid JSON"),
        (GENEVAL.replace("true", '"no"'), "entry 1 .*correct must be true or false"),
        (GENEVAL.replace("true", "7"), "not true or false"),
        (GENEVAL.replace('"p"', "[]"), "prompt must be"),
        (GENEVAL.replace('"colors"', '"sizes"'), "no skill of GenEval"),
        ("\n".join([GENEVAL, GENEVAL, GENEVAL.replace('"p"', '"q"')]), "finish")],
    "score geneval --results FILE.json": [("[]", "no entries"), ({"data": {}}, "entry 1 .*lacks")],
    "score wise --results FILE.jsonl": [
        (WISE.replace("1,", "999,"), "judge again"), (WISE, "999 of 1000"),
        (WISE.replace("1,", '"1",'), "realism"),
        (WISE.replace("1,", "-0.5,"), "judge again"), (WISE.replace("1,", "NaN,"), "line 1"),
        (WISE.replace("7", "7777"), "no prompt 7777"),
        (WISE.replace('id": 7', 'id": true'), "prompt_id must be"),
        (f"{WISE}\n{WISE.replace('1,', '0,')}", "prompt 7 has two different results"),
        (WISE.replace('id": 7', 'id": [7]'), "prompt_id must be")],
    "compare --votes FILE.json": [
        ('{"id": 3, "votes"', "isn't valid JSON"), ({**BALLOT, "votes": {}}, "no votes"),
        *(({**BALLOT, **wrong}, "no export of a comparison page") for wrong in (
            {"id": 1}, {"seed": "0"}, {"seed": -1}, {"a": None}, {"votes": []}, {"votes": {"x": {}}},
            {"votes": {"-1": {}}}, {"votes": {"9" * 5000: {}}}, {"votes": {"1": []}}, {"voter": 3},
            {"votes": {"1": {"quality": "up"}}}, {"votes": {"1": {"taste": "left"}}},
            {"votes": {"1": {"quality": ["left"]}}})),
        ("[]", "must hold a JSON object"), ('{"id": "1"}', "lacks the field seed")],
    "compare --prompts FILE.jsonl": [(ENTRY, "two folders")],
    "alignment --prompts FILE.jsonl": [
        *(({**FREE, **wrong}, "entry 1 ") for wrong in (
            {"include": 3}, {"include": [3]}, {"include": [{}]}, {"include": [{"class": "star"}]},
            {"include": [{"class": ["star"], "count": 1}]}, {"include": [{"class": "star", "count": "1"}]},
            {"include": [{"class": "star", "count": True}]}, {"include": [{"class": "star", "count": -1}]},
            {"include": [{"class": "star", "count": 1, "color": {}}]}, {"background": []}, {"tag": {}},
            {"include": [{"class": "star", "count": 1, "position": ["above", -1]}]}, {"prompt": " "},
            {"include": [{"class": "star", "count": 1, "position": "above"}]}, {"background": "pink"},
            {"include": [{"word": "HI"}]}, {"include": [{"word": "HI", "color": None}]})),
        ({**FREE, "include": [{"class": "star", "count": 4, "size": "large"}]}, "'p' asks for has no room"),
        ({**FREE, "include": [{"class": "star", "count": 10 ** 8}]}, "asks for 4 objects or fewer")],
    "leakage --train /nowhere --prompts FILE.jsonl": [(ENTRY, "no shard or folder")],
    "leakage --prompts FILE.jsonl": [(ENTRY.replace('"a red dog"', "null"),
    "prompt must be a text, not null")],
}


def write_content(path, content):
    """Write bytes, a text, the rows of a TSV, or JSON."""
    if path.suffix == ".tsv" and isinstance(content, list):
        write_tsv(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("line, content, sentence", [
    *((line, None, sentence) for line, sentence in MISTAKES.items()),
    *((line, *case) for line, cases in BROKEN_FILES.items() for case in cases)])
def test_mistakes_are_sentences(model, tmp_path, capsys, line, content, sentence):
    """Exit code 2, one line on stderr that says where, and nothing written."""
    out = tmp_path / "out"
    (tmp_path / "FOLDER").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    words = [str(tmp_path / word) if word.startswith(("FILE", "FOLDER")) else word for word in line.split()]
    for file in [Path(word) for word in words if "FILE" in word]:
        write_content(file, content)
    before = files_below(tmp_path)
    assert command_line.main([*words, "--out", str(out)] if words else []) == 2
    message = capsys.readouterr().err
    assert message.startswith("eval.py: ") and message.count("\n") == 1 and len(message) < 999, message
    assert re.search(sentence, message), message
    assert files_below(tmp_path) == before


def test_one_prompt_stops_no_other(model, run, tmp_path, capsys):
    """`generate` makes all images but those of the prompt that the model can't take, which is named."""
    rows = [{"prompt_id": i, "Prompt": prompt} for i, prompt in enumerate(("a", "too long", "é b", "c"), 1)]
    write_content(tmp_path / "wise.json", rows)
    run(f"generate --bench wise --prompts {tmp_path / 'wise.json'}", out="out", code=2)
    assert sorted(files_below(tmp_path / "out/wise")) == ["1.png", "3.png", "4.png"]
    output = capsys.readouterr()
    assert "3 new files" in output.out
    assert "1 images can't be generated: 2.png: the prompt takes too many" in output.err
    write_content(tmp_path / "wise.json", [{"prompt_id": 1, "Prompt": "too long"}])
    run(f"generate --bench wise --prompts {tmp_path / 'wise.json'}", out="none", code=2)
    assert capsys.readouterr().err == "eval.py: the prompt takes too many tokens\n"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", "-1", "x", "0.5", "3"])
def test_numbers_of_processes(model, run, monkeypatch, tmp_path, capsys, name, value):
    """RANK and WORLD_SIZE that can't be are refused before the work."""
    monkeypatch.setenv("RANK", "0" if name == "WORLD_SIZE" else value)
    monkeypatch.setenv("WORLD_SIZE", "3" if name == "RANK" else value.replace("3", "0"))
    run(f"generate --prompts {write_prompts(tmp_path / 'p.jsonl', 1)}", out="out", code=2)
    assert "RANK and WORLD_SIZE must be whole numbers" in capsys.readouterr().err
    assert files_below(tmp_path / "out") == {}


def test_what_is_given_twice_counts_once(run, tmp_path, capsys):
    """Vote files and scorers' results: the same, a copy, and two exports of one browser."""
    ballots = [{**BALLOT, "votes": {str(i): {"quality": "left"} for i in range(n)}, "voter": voter}
               for n, voter in ((1, "x"), (3, "x"), (1, "y"))]
    files = [tmp_path / f"{i}.json" for i in range(4)]
    for file, ballot in zip(files, [*ballots, ballots[2]]):
        write_content(file, ballot)
    line = f"compare --votes {' '.join(map(str, [*files, files[2]]))}"
    row = run(line, "compare.json", out="out")["table"]["quality"]
    output = capsys.readouterr()
    assert row["n"] == 3 + 1 and "2 people" in output.out
    assert output.err.count("the same as") == 2 and output.err.count("counted already") == 1
    write_content(tmp_path / "r.jsonl", GENEVAL)
    shutil.copy(tmp_path / "r.jsonl", tmp_path / "copy.jsonl")
    line = f"score geneval --results {tmp_path / 'r.jsonl'} {tmp_path / 'copy.jsonl'}"
    assert run(line, "score-geneval.json", out="out")["table"]["overall"]["n"] == 1
    assert "copy.jsonl is the same as" in capsys.readouterr().err


def test_images_that_are_left_out_are_said(tiny_folder, run, tmp_path, capsys):
    """Broken ones, other formats by suffix; hidden files and folders count for nothing."""
    folder = tmp_path / "images"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(noise(i, 16, 16, 3)).save(folder / f"{i}.PNG")
    for name in ("a.gif", "b.GIF", "c.heic", "broken.jpg", "._d.png", ".ipynb_checkpoints/e.png", "f.txt"):
        (folder / name).write_bytes(b"no image")
    results = run(f"reconstruction --images {folder} --ckpt {tiny_folder}", "reconstruction.json")
    assert len(results["pictures"]) == 2
    message = capsys.readouterr().err
    assert "2 .gif, 1 .heic in" in message and "1 of 3 images" in message and "broken.jpg" in message
    run(f"fid --a {folder} --b {folder} --ckpt {tiny_folder}", code=2)
    assert "3 images (.jpg" in (message := capsys.readouterr().err) and "4 are the least; 2 .gif" in message
    for file in folder.glob("*.PNG"):
        file.write_bytes(b"no image")
    run(f"reconstruction --images {folder} --ckpt {tiny_folder}", code=2)
    assert "3 of 3 images" in capsys.readouterr().err


def test_an_out_that_cannot_be_written_is_found_first(monkeypatch, tmp_path, capsys):
    """A file, a device, and what the system refuses: the command isn't started."""
    monkeypatch.setattr(command_line, "choose", lambda args: lambda args: pytest.fail("it was started"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", "/dev/null", "/proc/none", tmp_path / "file" / "in", "a\0b", "x" * 300):
        assert command_line.main(["judge", "--out", str(out)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("eval.py: ") and message.count("\n") == 1


# ---- fuzz ------------------------------------------------------------------------------------------
ODD = [None, True, 3, -1, 2.5, 1e308, 10 ** 30, "", " ", "x", "nan", "../x", "a\0", "[", "[1]", "yes",
       "\ud800", [], [[]], [None], ["a.jpg"], {}, {"answer": 1}, {"a": {"b": []}}, "left",
       "9" * 30, "é" * 300]


def mutate(rng, value):
    """A JSON value with one of its parts replaced, removed, doubled or wrapped."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        copy = value.copy()
        key = list(copy)[rng.integers(len(copy))] if isinstance(copy, dict) else int(rng.integers(len(copy)))
        if rng.random() < 0.1:
            del copy[key]
        else:
            copy[key] = mutate(rng, copy[key])
        return copy
    choice = rng.integers(len(ODD) + 2)
    return ODD[choice] if choice < len(ODD) else [value, value] if choice == len(ODD) else {"key": value}


def damage(rng, content):
    """Bytes with some of them cut out, changed or doubled."""
    at, size = int(rng.integers(len(content) + 1)), int(rng.integers(1, 9))
    odd = [b"", b"\0", b"\xff", b"\n", b"\t", b'"', b"[" * 2000, b"NaN", b"1e999", b"\\ud800", content[:at]]
    return content[:at] + odd[rng.integers(len(odd))] + content[at + size:]


LINES = "\n".join(map(json.dumps, POPE))
READERS = {  # what reads a file: (its name, valid contents, the function)
    "questions": ("q.json", [POPE, VQA, TEXT_VQA, {"v1_0": {**ASKED, "imagename": "a.jpg"}}, LINES.encode()],
                  lambda path: understanding.read_questions(path)),
    "lines": ("q.jsonl", [ASKED, {**ASKED, "A": "x", "B": "yes", "answer": "B"}, LINES.encode()],
              lambda path: understanding.tabulate(*understanding.read_questions(path), ["yes"] * 2)),
    "tables": ("q.tsv", [f"{HEADER}\n1\t{base64_image()}\tq?\t\tyes\tno\t\tA\n2\t1\t['a']".encode()
                         + b"\t\t\t\t\t['b']\n"], lambda path: understanding.read_questions(path)),
    "annotations": ("annotations.json", [VQA_ANSWERS], lambda path: understanding.read_questions(
        path.with_name("vqa.json"), annotations=path)),
    "answers": ("a.jsonl", [b'{"a": 1}\n{"index": "1", "prediction": "x"}\n'],
                lambda path: understanding.read_answers(path, {"a": 1})),
    "geneval": ("p.jsonl", [json.loads(ENTRY)], lambda path: generation.read_prompts("geneval", path)),
    "wise": ("p.json", [[{"prompt_id": 1, "Prompt": "a"}]],
             lambda path: generation.read_prompts("wise", path)),
    "mjhq": ("p.json", [{"a": {"category": "food", "prompt": "p"}}],
             lambda path: generation.read_prompts("mjhq", path)),
    "dpg": ("folder/p.txt", [b"A long prompt."], lambda path: generation.read_prompts("dpg", path.parent)),
    "scores": ("s.jsonl", [json.loads(GENEVAL)], lambda path: generation.score_geneval(
        report.read_records(path, generation.SCORERS["geneval"][1]))),
    "marks": ("s.jsonl", [json.loads(WISE)], lambda path: generation.score_wise(
        report.read_records(path, generation.SCORERS["wise"][1]))),
    "votes": ("v.json", [BALLOT], lambda path: [preference.count_ballot(ballot, {
        name: Counter() for name in preference.QUESTIONS}) for ballot in preference.read_ballots([path])])}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_fuzzed_files_are_read_or_refused(fuzz, tmp_path, reader):
    """Values of other types, cut and changed bytes: success, or one sentence that names the file; no name
    leads out of the folder."""
    name, contents, read = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for file in ("a.jpg", "COCO_val2014_000000000042.jpg", "0000599864f8.jpg"):
        Image.new("RGB", (9, 9)).save(tmp_path / file)
    write_content(tmp_path / "vqa.json", VQA)
    for content in contents:
        write_content(path, content)
        with suppress(ValueError):
            read(path)
    for rng in fuzz:
        content = contents[rng.integers(len(contents))]
        for _ in range(rng.integers(1, 4)):
            content = damage(rng, content) if isinstance(content, bytes) else mutate(rng, content)
        write_content(path, content if isinstance(content, bytes) else json.dumps(content))
        try:
            found = read(path)
        except ValueError as error:
            text = checkpoint.sentence(error)
            assert len(text) < 2000 and (str(tmp_path) in text or reader in ("scores", "marks"))
            continue
        for job in found if reader in ("geneval", "wise", "mjhq", "dpg") else ():
            assert (tmp_path / job["file"]).resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.slow
def test_fuzzed_command_lines_are_understood_or_refused(fuzz):
    """Any flags of a command with any values: arguments, or one sentence, and never a crash."""
    values = ["0", "-1", "1", "3", "nan", "inf", "1e9", "9" * 30, "", " ", "x", "--", "é", "x.tsv", "a\0b"]
    for rng in fuzz:
        command = rng.choice(list(command_line.COMMANDS))
        words = [str(command)]
        flags = [names[0] for names, _ in command_line.COMMANDS[command][2]] + ["--out", "--seed", "--none"]
        for name in rng.choice(flags, rng.integers(6)):
            value = str(rng.choice(values))
            words += [f"{name}={value}"] if rng.random() < 0.2 else [name, value][:rng.integers(1, 3)]
        try:
            args = command_line.parse(words)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
        else:
            assert args.command == command


def test_ctrl_c_is_no_mistake(monkeypatch, run, capsys):
    """Exit code 130 and nothing on stderr."""
    def interrupt(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(generation, "score", interrupt)
    run("score geneval --results x", code=130)
    assert not capsys.readouterr().err


# ---- demo.py and docs/walkthrough.ipynb ------------------------------------------------------------
def test_demo_without_gradio_says_what_to_install(monkeypatch, capsys):
    """One sentence, exit code 2."""
    monkeypatch.setattr(demo, "gr", None)
    assert checkpoint.run_command("demo.py", lambda: demo.serve([])) == 2
    said = "demo.py: the page needs Gradio: pip install -r requirements-demo.txt\n"
    assert capsys.readouterr().err == said


def test_demo_buttons(tiny_folder, image_file, tmp_path):
    """The functions behind the page: generate, edit, reconstruct, and a talk with images both ways."""
    page = demo.Page(["--ckpt", tiny_folder, "--out", str(tmp_path)])
    file, origin = page.generate("a red star", 3, 2)
    assert Path(file).parent == tmp_path and origin == "a red star (seed 3)"
    edited, origin = page.generate("make it blue", 4, 2, image_file)
    assert Path(edited).is_file() and edited != file and origin == "make it blue (seed 4)"
    assert page.reconstruct(0, image_file).dtype == np.uint8
    shown, chat, message = page.talk("", {"text": "what is it?", "files": [image_file]}, [], None, 0, 2)
    assert [each["role"] for each in shown] == ["user", "user", "assistant"] and message is None
    shown, chat, _ = page.talk("/edit", {"text": "blue", "files": []}, shown, chat, 0, 2)
    assert shown[-2]["content"] == {"path": chat.last} and shown[-1]["content"] == "blue (seed 0)"
    _, chat, _ = page.talk("", {"text": f"@{image_file}", "files": []}, [], None, 0, 2)
    assert chat.images == [[]]                                  # no @ shows the page a file of this machine
    assert page.talk("", {"text": " ", "files": []}, [], None, 0, 2)[0] == []


def test_demo_mistakes_are_sentences(tiny_folder, tmp_path, monkeypatch):
    """Bad uploads and numbers: a warning without flags and folders, and nothing else on the page changes."""
    page, said = demo.Page(["--ckpt", tiny_folder, "--out", str(tmp_path)]), []
    stand_in = SimpleNamespace(Warning=lambda text, title: said.append(text), skip=lambda: "as it was")
    monkeypatch.setattr(demo, "gr", stand_in)
    upload = tmp_path / ("a" * 64) / "bad.png"
    upload.parent.mkdir()
    upload.write_text("<b>junk")
    mistakes = [(page.generate, "", 0, 2), (page.generate, "x", None, 2), (page.generate, "x", 0, 0),
                (page.generate, "x", 0, 2, None), (page.generate, "x", 0, 2, str(upload)),
                (page.reconstruct, 0, str(upload)),
                (page.talk, "", {"text": "x", "files": [str(upload)]}, [], None, 0, 2),
                (page.talk, "/edit", {"text": "x", "files": []}, [], None, 0, 2)]
    assert all(demo.attempt(*mistake) == "as it was" for mistake in mistakes)
    assert said[0] == "prompt is empty" and said[3] == "image is empty" and "no image to edit" in said[-1]
    assert all(text.startswith("bad.png can't be read as an image: ") for text in said[4:7])
    with pytest.raises(ValueError, match="no effect with --reconstruct: leave out --n"):
        demo.Page(["--n", "4"])


def test_demo_page_is_built(tiny_folder):
    """Of Gradio's parts; events are private and share one queue of one."""
    pytest.importorskip("gradio")
    blocks = demo.build(demo.Page(["--ckpt", tiny_folder]))
    limits = {(fn.concurrency_id, fn.concurrency_limit) for fn in blocks.fns.values()}
    assert len(blocks.fns) == 7 and limits == {("model", 1)}


def test_demo_in_a_browser(tiny_folder, browser, tmp_path):
    """An image by clicks, then a bad upload, which costs a sentence; no request leaves, nothing throws."""
    pytest.importorskip("gradio")
    blocks = demo.build(demo.Page(["--ckpt", tiny_folder, "--out", str(tmp_path / "out")]))
    bad, asked, errors = tmp_path / "bad.png", [], []
    bad.write_text("junk")
    _, address, _ = blocks.launch(server_name="127.0.0.1", share=False, prevent_thread_lock=True, quiet=True,
                                  ssr_mode=False, allowed_paths=[str(tmp_path / "out")])
    try:
        tab = browser.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        tab.get_by_role("tab", name="Generate").click()
        tab.get_by_label("Prompt").locator("visible=true").fill("a red star")
        tab.get_by_role("button", name="Generate", exact=True).click()
        origin = tab.get_by_label("Generated from").locator("visible=true")
        tab.wait_for_function("box => box.value == 'a red star (seed 0)'", arg=origin.element_handle())
        assert len(list((tmp_path / "out").glob("a-red-star-seed0.png"))) == 1
        tab.get_by_role("tab", name="Reconstruct").click()
        tab.locator("[role=tabpanel]:visible input[type=file]").first.set_input_files(bad)
        tab.get_by_role("button", name="Reconstruct", exact=True).click()
        tab.get_by_text("bad.png can't be read as an image").wait_for()
    finally:
        blocks.close()
    assert not errors and all(url.startswith((address, "data:", "blob:")) for url in asked)


def walkthrough():
    """The notebook's file."""
    return Path(__file__).parent.parent / "docs" / "walkthrough.ipynb"


def test_walkthrough_is_committed_with_outputs():
    """Every cell has run; eight folded answers, each with its assert; small enough to look at on a page."""
    text = walkthrough().read_text("utf-8")
    cells = json.loads(text)["cells"]
    assert len(text) < 600_000
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) > 3
    answers = [source for cell in cells if "<details>" in (source := "".join(cell["source"]))]
    assert len(answers) == 8 and all("\nassert " in each or "\n    assert " in each for each in answers)


@pytest.mark.slow
def test_walkthrough_runs():
    """Every cell and every answer, in a process of its own."""
    script = walkthrough().with_name("execute.py")
    process = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
