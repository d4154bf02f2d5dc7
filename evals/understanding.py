"""Benchmarks of image understanding: questions as they are published, answers graded by the benchmarks'
own rules."""
import ast
import base64
import io
import json
import os
import re
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoint import Interval, parse_json, path_below, read_file, typed
from data import BadSample, load_image, smart_resize
from evals.report import (
    check_fields,
    fingerprint,
    in_batches,
    jpeg,
    print_table,
    rate,
    read_records,
    read_table,
    save_results,
    say,
    write_text,
)
from sample import Pipeline

# Most tokens of an answer.
TASKS = {"choice": 128, "mme": 16, "pope": 128, "vqav2": 128, "textvqa": 128, "mmvet": 1024}
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
THINK = ("First please perform reasoning, and think step by step to provide best answer to the following "
         "question: \n\n")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
              "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
OFFICIAL_PIXELS = {"min_pixels": 256 * 28 * 28, "max_pixels": 1605632}     # of the official run of lmms-eval


# ---- reading questions ----------------------------------------------------------------------------------

def as_list(cell):
    """A table's cell as a list: "['a', 'b']" has two entries, anything else is one."""
    if isinstance(cell, str) and cell.startswith("["):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):   # a text that begins with [
            cell = ast.literal_eval(cell)
    return cell if isinstance(cell, list) else [cell]


def get_field(row, where, *names, default=None):
    """(name, value) of the first of the named fields that is there and not empty; without a default,
    ValueError if none is."""
    for name in names:
        if row.get(name) not in (None, "", []):
            return name, row[name]
    if default is None:
        raise ValueError(f"{where} has no {' or '.join(names)}")
    return names[0], default


TEXT = str | int | float


def get_text(row, where, *names, default=None):
    """The same as text, which it must be, or a number."""
    name, value = get_field(row, where, *names, default=default)
    return str(typed(value, TEXT, Interval(), f"{where}: {name}"))


def is_missing(value):
    """Is a cell empty? VLMEvalKit's tables say nan, too, JSON null."""
    return value is None or isinstance(value, str) and value.strip().lower() in ("", "nan")


def decode_image(cell):
    """The bytes of an image in base64, also of a data: URL; b"" if it is none."""
    with suppress(ValueError):                                       # binascii's is one, too
        return base64.b64decode("".join(cell.rpartition(",")[2].split()), validate=True)
    return b""


# Names of COCO's images by their number, and of images named without their suffix.
IMAGE_NAMES = ("{}", "{}.jpg", "COCO_val2014_{:0>12}.jpg", "COCO_train2014_{:0>12}.jpg",
               "COCO_test2015_{:0>12}.jpg", "{:0>12}.jpg", "{}.png")


def find_image(folder, name, where):
    """The path of an image file in a folder, by its name or COCO's number; ValueError if there is none."""
    for pattern in IMAGE_NAMES:
        file = path_below(folder, pattern.format(name), where)
        if os.path.isfile(file):
            return file
    raise ValueError(f"{where}: there is no picture {Path(folder) / name[:200]}")


def open_image(source, where):
    """The PIL image of a path or of bytes; BadSample, which begins with `where`, if no model can read it."""
    try:
        image = load_image(source if isinstance(source, Path) else io.BytesIO(source))
    except BadSample as error:
        reason = error if isinstance(source, Path) else "its image is no picture in base64"
        raise BadSample(error.cause, f"{where}: {reason}") from None
    try:
        smart_resize(image.height, image.width)
    except ValueError as error:
        raise BadSample("narrow image", f"{where}: {error}") from None
    return image


def right_option(answer, options, where):
    """The letter of the right option, which a file says by that, in any case, or by the option's text;
    ValueError if it is none of them."""
    letter = answer.strip(" ().").upper()
    same_text = [name for name, text in options.items() if text.strip().lower() == answer.strip().lower()]
    if letter not in options and len(same_text) != 1:
        raise ValueError(f"{where}: the answer {answer!r} is none of its options {', '.join(options)}")
    return letter if letter in options else same_text[0]


def read_question(row, where, number, images, folder):
    """One row as a question of `read_questions`. images: {index: image cell} of a table with images in
    it, else None.

    Raises ValueError, which begins with `where`, if the row lacks something or doesn't fit.
    """
    name, value = get_field(row, where, "image", "image_path", "imagename", "image_id")
    cells = [get_text({name: cell}, where, name) for cell in as_list(value)]
    if images is not None and name == "image":
        files = [decode_image(images.get(cell) or cell) for cell in cells]
    else:
        files = [find_image(folder, cell, where) for cell in cells]
    name, value = get_field(row, where, "answers", "answer", "label")
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in as_list(value)]
    answers = [str(typed(answer, TEXT, Interval(), f"{where}: {name}")) for answer in answers]
    options = {letter: get_text(row, where, letter) for letter in sorted(row)
               if re.fullmatch("[A-Z]", letter) and not is_missing(row[letter])}
    if options:
        answers[0] = right_option(answers[0], options, where)
    hint = None if is_missing(row.get("hint")) else get_text(row, where, "hint")
    category, group = get_text(row, where, "category", default="all"), row.get("image_path")
    return {"index": get_text(row, where, "index", "question_id", "key", default=number), "where": where,
            "images": files, "question": get_text(row, where, "question", "text"), "hint": hint,
            "options": options, "answers": answers, "category": category,
            "group": (category, group if isinstance(group, str) else files[0])}


def official_annotations(path):
    """The file beside VQAv2's published questions with their answers, named as published; else None."""
    name = path.name.replace("OpenEnded_", "").replace("questions", "annotations")
    return path.with_name(name) if name != path.name and path.with_name(name).is_file() else None


def add_answers(rows, path, file):
    """VQAv2's questions with the answers, and the kinds of answer as categories, of its annotations."""
    need = {"question_id": int | str, "answers": list}
    answers = {row["question_id"]: row for row in read_records(file, need)}
    joined = []
    for number, row in enumerate(rows, 1):
        where = f"row {number} of {path}"
        about = answers.get(check_fields(row, {"question_id": int | str}, where)["question_id"])
        if about is None:
            raise ValueError(f"{where}: {file} has no answers to question {row['question_id']}")
        joined.append({"category": about.get("answer_type"), **row, "answers": about["answers"]})
    return joined


def read_rows(path, images, annotations):
    """The rows of a file of questions, with the answers of another where it is published in two."""
    if path.suffix.lower() == ".tsv":
        rows = read_table(path)
        if annotations or images and any("image" in row for row in rows):
            raise ValueError(f"--{'annotations' if annotations else 'images'} has no effect: "
                             f"{path} holds its own")
        return rows
    rows = read_records(path, unit="row")
    has_answers = any(rows[0].get(name) for name in ("answers", "answer", "label"))
    if annotations and has_answers:
        raise ValueError(f"--annotations has no effect: {path} holds its own answers")
    file = annotations or not has_answers and official_annotations(path)
    return add_answers(rows, path, file) if file else rows


def read_questions(path, task=None, images=None, annotations=None):
    """A file's (task, [{"index", "where", "images": [bytes or path], "question", "hint", "options": {letter:
    text}, "answers", "category", "group"}]). task None is "choice" where there are options, else
    "vqav2".

    .tsv: the layout of VLMEvalKit, images in base64, a short one being the index of the row whose image
    is meant. .jsonl or .json: question or text, answer, answers or label, and image, or COCO's image_id, a
    file in the folder `images` (the data's if None); VQAv2's answers are in a second file, `annotations`, or
    beside the questions under its published name. group: what the two questions of MME about one image have
    in common. Raises ValueError naming the row; that an image can be read is not checked.
    """
    path = Path(path)
    rows = read_rows(path, images, annotations)
    is_table = path.suffix.lower() == ".tsv"
    cells = {str(row.get("index")): row.get("image") for row in rows} if is_table else None
    questions = [read_question(row, f"row {number} of {path}", number, cells, images or path.parent)
                 for number, row in enumerate(rows, 1)]
    index, times = Counter(q["index"] for q in questions).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{times} rows of {path} have the same index {index!r}")
    task = task or ("choice" if any(q["options"] for q in questions) else "vqav2")
    for q in questions if task in ("mme", "pope") else ():
        if q["answers"][0].lower() not in ("yes", "no"):
            raise ValueError(f"{q['where']}: the answer of {task} is yes or no, not {q['answers'][0]!r}")
    return task, questions


def official_text(task, q):
    """The text that goes to the model with the images of a question, worded as in the official
    evaluation."""
    text = re.sub(r"<image(?: \d+)?>", "", q["question"]).strip()
    if task == "choice":
        options = [f"{letter}. {option}" for letter, option in q["options"].items()]
        lines = [line for line in (q["hint"], text) if line]
        return "\n".join([*lines, *options, LETTER if options else SHORT])
    if task == "mme":
        text = re.sub(r"\s*Please answer yes or no\.", "", text)
    return {"mme": f"{text}\n{SHORT}", "pope": f"{text}\n{SHORT}",
            "textvqa": f"{text.capitalize()}\n{SHORT}", "mmvet": THINK + text, "vqav2": text}[task]


# ---- grading answers ------------------------------------------------------------------------------------

def pick_option(answer, options):
    """The letter that an answer chooses: at its beginning, alone in it, or by the option's words; else
    None."""
    letters = "".join(options)
    if first := re.match(rf"\(?([{letters}])(?:[).:,]|$)", answer.strip()):
        return first[1]
    named = set(re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", answer))
    article = named == {"A"} and re.search(r"\bA [a-z]", answer)     # "A cat" names no option
    if len(named) == 1 and not article:
        return named.pop()
    words = answer.strip().lower().removesuffix(".")
    inside = [k for k, text in options.items()
              if re.search(rf"(?<!\w){re.escape(text.lower())}(?!\w)", words)]
    equal = [k for k in inside if options[k].lower() == words]
    if equal:
        return equal[0]
    return inside[0] if len(inside) == 1 else None


def yes_or_no(task, answer):
    """MME's reading: "yes" or "no" within the first four characters, else "other". POPE's: "no" if the
    first sentence has the word no or not, else "yes"."""
    if task == "pope":
        words = answer.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "no", "not"} & set(words) else "yes"
    return next((word for word in ("yes", "no") if word in answer.strip().lower()[:4]), "other")


# The contractions that VQA's evaluation restores: each may have lost one of its apostrophes.
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't "
    "mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that's there'd there'd've there're there's "
    "they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's "
    "won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split() for i, letter in enumerate(word) if letter == "'"}
DIGITS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                  "0 0 1 2 3 4 5 6 7 8 9 10".split()))


def vqa_normal(text):
    """An answer in the normal form of VQA's evaluation: lower case, no articles, numbers as digits, no
    punctuation (it becomes nothing where it stands beside a space or the text has a number like
    1,000, else a space)."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", text)
    plain = text
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if has_thousands or beside_space else " ")
    words = [DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", plain).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_score(answer, truths):
    """VQA's soft accuracy: min(1, people who said it / 3), averaged over leaving out each one; one
    truth: exact match.

    Both sides are normalised, as in TextVQA; VQAv2's own script leaves them as they are where all ten
    people agree.
    """
    answer, truths = vqa_normal(answer), [vqa_normal(truth) for truth in truths]
    if len(truths) == 1:
        return float(answer == truths[0])
    agree = truths.count(answer)
    return sum(min(1, (agree - (truth == answer)) / 3) for truth in truths) / len(truths)


# MMMU's key words: the answer follows.
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:e[+-]?\d+)?(?![\d,]*\d)")


def open_normal(text):
    """What MMMU compares: of a number [its value to two decimals], of words [lower case], of one letter
    [it and a space on either side]."""
    text = text.strip().lower()
    with suppress(ValueError):
        return [round(float(text.replace(",", "")), 2)]
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def answer_ends(answer):
    """The parts of an answer that MMMU looks at: see `open_score`."""
    lines = answer.strip().rstrip(".").lower().split("\n")
    ends = []
    for i, line in enumerate(lines):
        keys = (*KEYS, "=") if i == len(lines) - 1 else KEYS
        after = [line.rsplit(key, 1)[1].strip() for key in keys if key in line]
        end = min(after, key=len, default="")
        if end.strip(":,.!?;'"):
            ends.append(end)
    return ends or ["\n".join(lines)]


def open_score(answer, truths):
    """MMMU's rule for questions without options: 1 if a truth stands in an answer's words or equals one
    of its numbers.

    Of each line only what follows the last of KEYS counts (the shortest such end; in the last line also
    after "="), if any line has one; else all. Numbers are read whole: the published script takes
    1,234.5 for 234.5, too, and .5 for 5.
    """
    ends = answer_ends(answer)
    numbers = [number for end in ends for number in NUMBER.findall(end)]
    parts = [part for text in ends + numbers for part in open_normal(text)]

    def matches(truth, part):
        both_words = isinstance(truth, str) and isinstance(part, str)
        return truth in part if both_words else truth == part
    wanted = [part for truth in truths for part in open_normal(truth)]
    return float(any(matches(truth, part) for truth in wanted for part in parts))


def grade(task, q, answer):
    """(what an answer says, its score from 0 to 1) by the task's rule; None is no answer, which is wrong."""
    if answer is None:
        return None, 0.0
    if task == "choice" and q["options"]:
        letter = pick_option(answer, q["options"])
        return letter, float(letter == q["answers"][0])
    if task == "choice":                                             # as some questions of MMMU
        return answer.strip(), open_score(answer, q["answers"])
    if task in ("mme", "pope"):
        word = yes_or_no(task, answer)
        return word, float(word == q["answers"][0].lower())
    return vqa_normal(answer), vqa_score(answer, q["answers"])


# ---- tables ---------------------------------------------------------------------------------------------

def pope_columns(answers, truths):
    """F1, precision and recall of "yes", and the fraction of answers that are "yes"; None is a wrong one."""
    wrong = {"yes": "no", "no": "yes"}
    pairs = Counter((answer or wrong[truth], truth) for answer, truth in zip(answers, truths))
    true, false, missed = pairs["yes", "yes"], pairs["yes", "no"], pairs["no", "yes"]
    return {"F1": 2 * true / max(1, 2 * true + false + missed), "precision": true / max(1, true + false),
            "recall": true / max(1, true + missed), "yes": (true + false) / len(truths)}


def mme_columns(name, groups, scores):
    """accuracy+ (both questions of an image right) and points (accuracy and accuracy+ in per cent,
    summed)."""
    by_image = defaultdict(list)
    for group, score in zip(groups, scores):
        by_image[group].append(score)
    if any(len(pair) != 2 for pair in by_image.values()):
        raise ValueError(f"MME asks two questions about each picture; those of {name} don't come in pairs")
    plus = sum(all(pair) for pair in by_image.values()) / len(by_image)
    return {"plus": plus, "points": 100 * (sum(scores) / len(scores) + plus)}


def tabulate(task, questions, answers):
    """Questions and answers -> the table of a task: a row for each category, then one for all.

    "baseline" is what always giving the commonest answer of each category would score: more than a
    model gets without vision inputs, since it knows the answers' frequencies. POPE adds F1, precision,
    recall and the fraction of yes; MME accuracy+ and points, summed over perception and cognition.
    ValueError where MME's questions don't come in pairs.
    """
    graded = [grade(task, q, answer) for q, answer in zip(questions, answers)]
    rows = defaultdict(list)                                         # category -> numbers of its questions
    for i, q in enumerate(questions):
        rows[q["category"]].append(i)
    given = defaultdict(Counter)                                     # category -> its answers
    for q in questions:
        given[q["category"]].update(q["answers"])
    common = {name: answers.most_common(1)[0][0] for name, answers in given.items()}
    blind = [grade(task, q, common[q["category"]])[1] for q in questions]
    if len(rows) > 1:
        rows["overall"] = range(len(questions))
    table = {}
    for name, members in rows.items():
        scores = [graded[i][1] for i in members]
        table[name] = {**rate(scores), "baseline": sum(blind[i] for i in members) / len(members)}
        if task == "pope":
            table[name] |= pope_columns([graded[i][0] for i in members],
                                        [questions[i]["answers"][0].lower() for i in members])
        if task == "mme":
            table[name] |= mme_columns(name, [questions[i]["group"] for i in members], scores)
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if task == "mme" and set(members) <= set(table):
            table[name] = {"points": sum(table[member]["points"] for member in members)}
    return table


# ---- the command ----------------------------------------------------------------------------------------

def read_answers(file, about):
    """{index: answer} of an earlier run that was stopped, {} if there is none; ValueError if it is
    another run's."""
    if not file.exists():
        return {}
    lines = read_file(file).split(b"\n")[:-1]               # the rest of a killed run's last line is dropped
    rows = [parse_json(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]
    if rows and rows[0] != about:
        raise ValueError(f"{file} holds answers of another run ({rows[0]}): choose another --out")
    need = {"index": str, "prediction": str}
    rows = [check_fields(row, need, f"{file}, line {number}") for number, row in enumerate(rows[1:], 2)]
    return {row["index"]: row["prediction"] for row in rows}


def ask_model(pipe, task, questions, official):
    """Yield (question, answer, None) for all questions, asked in batches; (question, None, its ValueError)
    where it can't be asked."""
    def ask(batch):
        conversations = []
        for q in batch:
            images = [open_image(source, q["where"]) for source in q["images"]]
            if official:
                images = [Image.fromarray(jpeg(np.asarray(image))) for image in images]
            conversations.append(([(official_text(task, q), None)], [images]))
        return pipe.ask(conversations, TASKS[task])
    return in_batches(questions, ask)


def check_images(questions):
    """ValueError if no question has images that can be read: then it isn't the images. Stops at the first
    that has."""
    for q in questions:
        with suppress(BadSample):
            for source in q["images"]:
                open_image(source, q["where"])
            return
    open_image(questions[0]["images"][0], questions[0]["where"])


def answer_file(args):
    """`understanding --data NAME.tsv`: answer the questions, into OUT/NAME.answers.jsonl, then score
    them, into OUT/NAME.score.json (MM-Vet: write what its judge reads, OUT/NAME.predictions.json).

    .tsv as VLMEvalKit's; .jsonl or .json with question, image, answer; POPE's, TextVQA's and MM-Vet's
    files as published; VQAv2's questions as published, their annotations beside them or in --annotations.
    The same line goes on where a run stopped. A question that can't be asked, of a broken image or one that
    is over 200 times as long as wide, is named and counts as wrong. Prompts are worded as in the official
    run; with --official, images go through JPEG and are scaled as there, too.
    """
    path = Path(args.data)
    task, questions = read_questions(path, args.task, args.images, args.annotations)
    file = Path(args.out) / f"{path.stem}.answers.jsonl"
    if task != "mmvet":
        tabulate(task, questions, [""] * len(questions))      # what can't be scored is found before the work
    about = {"ckpt": args.ckpt, "task": task, "official": args.official,
             "data": fingerprint(read_file(path))}
    answers = read_answers(file, about)
    missing = [q for q in questions if q["index"] not in answers]
    check_images(questions)
    pipe = Pipeline(args.ckpt, args.device, args.dtype)
    pipe.limits = OFFICIAL_PIXELS if args.official else {}
    lines = [about, *({"index": index, "prediction": answer} for index, answer in answers.items())]
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
    reasons = {}                                              # not logged: the next run asks these again
    with open(file, "a", encoding="utf-8") as log:
        for q, answer, error in ask_model(pipe, task, missing, args.official):
            if error:
                reasons[q["index"]] = f"{q['where']}: {str(error).removeprefix(q['where'] + ': ')}"
                continue
            answers[q["index"]] = answer
            log.write(json.dumps({"index": q["index"], "prediction": answer}) + "\n")
            log.flush()
    if reasons:
        first = next(iter(reasons.values()))
        if not answers:
            raise ValueError(f"none of {len(questions)} questions can be asked: {first}")
        say(f"{len(reasons)} of {len(questions)} questions can't be asked, and count as wrong: {first}")
    if task == "mmvet":
        write_predictions(file.with_name(f"{path.stem}.predictions.json"),
                          {q["index"]: answers.get(q["index"], "") for q in questions})
    else:
        save_scores(args, task, questions, [answers.get(q["index"]) for q in questions], reasons)


def write_predictions(file, answers):
    """Write {index: answer} as MM-Vet's judge reads it: only that can score these answers."""
    named = {f"v1_{index}" if index.isdigit() else index: answer for index, answer in answers.items()}
    write_text(file, json.dumps(named, indent=1) + "\n")
    print(f"{file} is for MM-Vet's judge")


def save_scores(args, task, questions, answers, reasons):
    """Print the table of a file's questions, and write it with all answers as OUT/NAME.score.json. reasons:
    {index: why it couldn't be asked}."""
    path, table = Path(args.data), tabulate(task, questions, answers)
    print_table(f"{path.name}, {len(questions)} questions, as {task}", table)
    rows = []
    for q, answer in zip(questions, answers):
        read, score = grade(task, q, answer)
        rows.append({"index": q["index"], "asked": official_text(task, q), "answer": answer,
                     "expected": q["answers"], "read": read, "score": score})
    results = {"table": table, "task": task, "not asked": reasons, "answers": rows}
    save_results(args, results, f"{path.stem}.score")
