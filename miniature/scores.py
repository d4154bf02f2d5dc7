"""The scores on the world, one function for each command of eval.py: does the image show what was asked, is
the answer right, does an image survive the autoencoder, which words does a colour belong to?

All models are scored on scenes and prompts that they were never trained on (other seeds than 0), by
miniature/judge.py. Each command takes the parsed command line, prints tables, and writes OUT/NAME.json and
often a sheet OUT/NAME.png.
"""
import base64
import csv
import io
import itertools
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

from data import DESCRIBE, EDIT, IMG, RECONSTRUCT, to_pixels
from evals.distances import psnr
from evals.report import (
    BATCH,
    SHEET,
    by_skill,
    contact_sheet,
    format_cell,
    jpeg,
    print_table,
    rate,
    save_results,
    write_image,
    write_text,
)
from flow import flow_matching_loss
from miniature import world
from miniature.judge import (
    agrees,
    caption_truth,
    count_asked,
    judge,
    judge_all,
    outlines_are_true,
    read_entries,
    scene_for,
    score_renders,
    summarise,
)
from sample import Chat, Pipeline, parse, to_uint8

TRAINING_WORLD = 0                 # the seed of the scenes that models are trained on
SEEDS = 10 ** 6                    # so many images, each with its own seed, belong to one value of --seed
TIMES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)     # at which `binding` measures the loss


def load_pipeline(args):
    """The Pipeline that --ckpt, --device, --dtype and, where there is one, --eva name. How it samples stands
    among the settings of the results."""
    pipe = Pipeline(args.ckpt, args.device, args.dtype, eva=getattr(args, "eva", None))
    args.sampling = pipe.sampling
    return pipe


def batches(count, leave=True):
    """Slices of BATCH out of `count` items, under a progress bar."""
    return (slice(i, i + BATCH) for i in tqdm(range(0, count, BATCH), leave=leave, disable=None))


# ---- the judge itself -----------------------------------------------------------------------------------

def unchanged(image):
    """uint8 (H, W, 3) -> the same."""
    return image


def blur(image):
    """uint8 (H, W, 3) -> blurred with a standard deviation of one pixel in 64."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(len(image) / 64)))


def noise(image):
    """uint8 (H, W, 3) -> with Gaussian noise of standard deviation 8, a function of the image."""
    rng = np.random.default_rng(int(image.sum()))
    return np.clip(np.round(image + rng.normal(0, 8, image.shape)), 0, 255).astype(np.uint8)


DISTORTIONS = {"clean": unchanged, "JPEG 75": jpeg, "blur": blur, "noise": noise}


def rate_agreement(scenes, seen):
    """The rate of scenes of whose images (judged: Seen) everything is right; "outline": and every outline is
    true as well."""
    right = [agrees(scene, image) for scene, image in zip(scenes, seen, strict=True)]
    true = [verdict and outlines_are_true(image) for verdict, image in zip(right, seen)]
    return {**rate(right), "outline": sum(true) / len(true)}


def rate_read_right(scenes, size, distort):
    """`rate_agreement` of scenes and their distorted renders."""
    seen = [judge(distort(world.render(scene, size))) for scene in tqdm(scenes, leave=False, disable=None)]
    return rate_agreement(scenes, seen)


def run_judge(args):
    """How far the judge can be trusted: true images must pass in four conditions, others must not.

    outline: all objects' outlines are true, too (see `alignment`). Only clean and noisy ones must pass that:
    what blurs the small stars blunts them.
    """
    read_right, skills = {}, {}
    for name, novel in (("world", False), ("novel", True)):
        scenes = [world.make_scene(args.seed, i, novel) for i in range(args.n)]
        for condition, distort in DISTORTIONS.items():
            read_right[f"{name}, {condition}"] = rate_read_right(scenes, args.size, distort)
    print_table(f"images of scenes in which everything is read right, {args.size} px", read_right)
    entries = world.skill_prompts(seed=args.seed) + world.skill_prompts(seed=args.seed, novel=True)
    rng = np.random.default_rng(args.seed)
    true = [world.render(scene_for(entry, rng), args.size) for entry in entries]
    for condition, distort in DISTORTIONS.items():
        skills[condition] = score_renders(entries, [distort(image) for image in true])
    skills["other prompt's image"] = score_renders(entries, [true[i] for i in rng.permutation(len(true))])
    colours = list(world.BACKGROUNDS.values())
    blanks = [np.full_like(image, colours[i % len(colours)]) for i, image in enumerate(true)]
    skills["blank image"] = score_renders(entries, blanks)
    for condition, table in skills.items():
        print_table(f"prompts of the six skills, {condition}", table)
    save_results(args, {"scenes": read_right, "skills": skills})


# ---- text -> image --------------------------------------------------------------------------------------

def generate_images(pipe, entries, seed, best_of=1, **sampling):
    """Entries -> (their images, uint8 (H, W, 3); their seeds). `sampling`: as Pipeline.images takes it. With
    best_of, of so many images the one that the model itself scores best.

    One seed per image, whatever the batch; far enough apart that two values of `seed` share none.
    """
    seeds, images = [seed * SEEDS + i for i in range(len(entries))], []
    for part in batches(len(entries), leave=False):
        prompts = [entry["prompt"] for entry in entries[part]]
        if best_of > 1:
            pixels, seeds[part] = pipe.best_of(prompts, seeds[part], best_of, **sampling)
        else:
            pixels = pipe.images(prompts, seeds[part], **sampling)
        images += list(to_uint8(pixels))
    return images, seeds


def side_of(words):
    """(x, y), each -1, 0 or 1: where in the image, or on which side of the other, a parsed object lies."""
    return np.array([("right" in words) - ("left" in words),
                     len(words & {"bottom", "below"}) - len(words & {"top", "above"})])


def states_relation(clause, words, others):
    """Do a parsed object and those of the clause that "position" names lie as that asks, by their words?"""
    relation, _ = clause["position"]
    for other in others:
        offset, direction = side_of(words) - side_of(other), np.array(world.RELATIONS[relation])
        if offset @ direction <= 0 or offset @ direction < abs(offset @ direction[::-1]):
            return False
    return True


def states_what_was_asked(entry, text):
    """Does an upsampled prompt name the objects of an entry, in their numbers, and no others?

    Their colours, sizes and background are those asked for, and they lie as asked, by the relation that the
    prompt names or by the places that it gives them.
    """
    objects = [set(words) for words in world.parse_caption(text) for _ in range(world.number_of(words))]
    if len(objects) != count_asked(entry):
        return False
    ground = entry.get("background")
    if ground and any(words & set(world.BACKGROUNDS) != {ground} for words in objects):
        return False
    slots = [i for i, clause in enumerate(entry["include"]) for _ in range(clause.get("count", 1))]

    def fit(order):
        groups = [[words for at, words in zip(slots, order) if at == i] for i in range(len(slots))]
        for i, words in zip(slots, order):
            clause = entry["include"][i]
            asked = {clause[name] for name in ("class", "color", "size") if name in clause}
            if not asked <= words:
                return False
            if "position" in clause and not states_relation(clause, words, groups[clause["position"][1]]):
                return False
        return True
    return any(map(fit, itertools.permutations(objects)))


def choose_prompts(args):
    """(the entries of --prompts, the first --n-prompts, or of the skills; the name of the results)"""
    if args.prompts:
        entries = [entry for entry in read_entries(args.prompts) if count_asked(entry) <= args.objects]
        entries = entries[:args.n_prompts]                           # None: all
        for entry in entries:
            scene_for(entry, np.random.default_rng(0))               # what can't be shown is found now
        if not entries:
            raise ValueError(f"no prompt in {args.prompts} asks for {args.objects} objects or fewer "
                             "(--objects)")
        return entries, f"alignment-{Path(args.prompts).stem}"
    args.n_prompts = args.n_prompts or 553
    return world.skill_prompts(args.n_prompts, args.seed, args.novel, args.objects), "alignment"


def run_alignment(args):
    """Do images show what prompts of the six skills ask? Beside it: shuffled prompts, and true renders.

    strict: and nothing else. outline: and all objects, asked for or not, are as round, straight and pointed
    as true ones: the outline's overlap (IoU) with the true shape is at least 0.9. colours: the colours asked
    for are there, whatever the shapes.
    """
    prompts, name = choose_prompts(args)
    pipe = load_pipeline(args)
    entries = [entry for entry in prompts for _ in range(args.images)]
    images, seeds = generate_images(pipe, entries, args.seed, args.best_of, upsample=args.upsample)
    seen = [judge(image) for image in images]
    verdicts = judge_all(entries, seen)
    rng = np.random.default_rng(args.seed)
    renders = [world.render(scene_for(entry, rng), len(images[0])) for entry in entries]
    others = [seen[i] for i in rng.permutation(len(seen))]
    tables = {"model": summarise(entries, verdicts), "real": score_renders(entries, renders),
              "shuffled": summarise(entries, judge_all(entries, others))}
    print_table(f"{len(prompts)} prompts x {args.images} images", tables["model"])
    print_table("the same images under shuffled prompts", tables["shuffled"])
    print_table("the same prompts' true renders", tables["real"])
    texts = [pipe.upsampled.get((e["prompt"], seed), e["prompt"]) for e, seed in zip(entries, seeds)]
    if pipe.upsampled:
        stated = rate(states_what_was_asked(entry, text) for entry, text in zip(entries, texts))
        tables["upsampled"] = {"overall": stated}
        print_table("upsampled prompts state what was asked", tables["upsampled"])
    every = -(-len(images) // SHEET)             # of so many prompts one is on the contact sheet
    shown = [i for i in range(len(images)) if i // args.images % every == 0]
    sheet = contact_sheet([images[i] for i in shown], [entries[i]["prompt"] for i in shown],
                          [verdicts[i].hit for i in shown], max(8, 4 * args.images))
    write_image(Path(args.out) / f"{name}.png", np.asarray(sheet))
    rows = [{"tag": entry["tag"], "prompt": entry["prompt"], "generated_from": text, "seed": seed,
             "hit": verdict.hit, "strict": verdict.strict, "outline": verdict.outline, "seen": asdict(image)}
            for entry, text, seed, verdict, image in zip(entries, texts, seeds, verdicts, seen)]
    save_results(args, {**tables, "images": rows}, name)


def run_upsampling(args):
    """Do upsampled prompts keep what was asked? --n paraphrased prompts, whose answers a parser reads; and
    those outside of this world ("a dog"), which the language model must decline.

    A prompt is kept if the answer names just the objects asked for, in their numbers, colours, sizes and
    places, on the background asked for. One that is declined isn't.
    """
    pipe, entries = load_pipeline(args), world.upsampling_prompts(args.n, args.seed)
    prompts = [entry["prompt"] for entry in entries]
    seeds = [args.seed * SEEDS + i for i in range(len(entries))]
    rows = []
    for part in batches(len(entries)):
        answers = zip(entries[part], pipe.declined(prompts[part]),
                      pipe.upsample_prompts(prompts[part], seeds[part]))
        for entry, declined, text in answers:
            outside = entry["tag"] == "outside"
            right = declined is not None if outside else not declined and states_what_was_asked(entry, text)
            rows.append({**entry, "answer": declined or text, "declined": declined is not None,
                         "right": right})
    table = by_skill([row["tag"] for row in rows], [row["right"] for row in rows])
    print_table(f"{args.n} prompts upsampled", table)
    failures = [f"  {row['prompt']!r} -> {row['answer']!r}" for row in rows if not row["right"]]
    if failures:
        print("\n".join(["\nnot right, the first of them", *failures[:20]]))
    save_results(args, {"table": table, "prompts": rows})


# ---- image -> text --------------------------------------------------------------------------------------

class Asked(NamedTuple):
    """A question about a scene: its kind, one of world.QUESTIONS, its words and the expected answer."""
    scene: world.Scene
    kind: str
    question: str
    answer: str


def draw_questions(seed, n, most=4, paraphrase=False):
    """n Asked about scenes of the world `seed`, of at most `most` (>= 2) objects, the kinds in turn;
    paraphrase: in other words than the standard ones."""
    asked, index = [], 0
    while len(asked) < n:
        kind = world.QUESTIONS[len(asked) % len(world.QUESTIONS)]
        scene = world.make_scene(seed, index, most=most)
        found = world.question(scene, np.random.default_rng((seed, index)), kind, paraphrase)
        index += 1
        if found:                                                    # not every scene can answer every kind
            asked.append(Asked(scene, *found))
    return asked


def answer_all(pipe, scenes, questions):
    """The model's answers to one question about the render of each scene, in batches."""
    answers = []
    for part in batches(len(scenes)):
        images = [Image.fromarray(world.render(scene)) for scene in scenes[part]]
        answers += pipe.answers(images, questions[part])
    return answers


def answers_right(answers, expected):
    """Which answers are the expected ones, whatever their case and a full stop."""
    return [answer.strip().lower().removesuffix(".") == truth for answer, truth in zip(answers, expected)]


def rate_by_kind(asked, right):
    """{kind: the rate of right answers, beside it the commonest answer to that kind in the training world,
    and how often that one would be right}."""
    table, training = {}, draw_questions(TRAINING_WORLD, 1200)
    commonest = {kind: Counter(q.answer for q in training if q.kind == kind).most_common(1)[0][0]
                 for kind in world.QUESTIONS}
    for kind in dict.fromkeys(q.kind for q in asked):
        members = [i for i, q in enumerate(asked) if q.kind == kind]
        baseline = sum(asked[i].answer == commonest[kind] for i in members) / len(members)
        table[kind] = {**rate(right[i] for i in members), "answer": commonest[kind], "baseline": baseline}
    return table


def rate_questions(pipe, asked):
    """(the model's answers to Asked questions, the table of `rate_by_kind`)"""
    answers = answer_all(pipe, [q.scene for q in asked], [q.question for q in asked])
    return answers, rate_by_kind(asked, answers_right(answers, [q.answer for q in asked]))


def rate_match_questions(pipe, scenes, seed):
    """The rates of right answers to world.match_question of scenes with one object, and with several, as far
    as there are any."""
    questions, expected = zip(*(world.match_question(scene, np.random.default_rng((seed, i)))
                                for i, scene in enumerate(scenes)))
    right = answers_right(answer_all(pipe, scenes, questions), expected)
    groups = {"match, one object": [], "match, several": []}
    for scene, verdict in zip(scenes, right):
        groups["match, one object" if len(scene.objects) == 1 else "match, several"].append(verdict)
    return {name: rate(verdicts) for name, verdicts in groups.items() if verdicts}


def run_understanding(args):
    """Questions of six kinds, in the standard words and paraphrased, beside what each kind's commonest
    training answer would score; captions; matches.

    An answer is right if it is the expected one, whatever its case and a full stop. Captions: see
    `caption_truth`. Matches: does this caption say what the image shows? (world.match_question)
    """
    pipe, asked = load_pipeline(args), draw_questions(args.seed, args.n)
    scenes = [question.scene for question in asked]
    answers, table = rate_questions(pipe, asked)
    paraphrased = draw_questions(args.seed, args.n, paraphrase=True)
    paraphrased_answers, of_paraphrases = rate_questions(pipe, paraphrased)
    table |= {f"{kind}, paraphrased": row for kind, row in of_paraphrases.items()}
    captions = answer_all(pipe, scenes, [DESCRIBE] * len(scenes))
    truths = [caption_truth(text, scene) for text, scene in zip(captions, scenes)]
    table["caption, objects"] = rate(objects for objects, _ in truths)
    table["caption, every detail"] = rate(details for _, details in truths)
    table |= rate_match_questions(pipe, scenes, args.seed)
    print_table(f"{args.n} questions and captions about unseen images", table)
    rows = [{"question": q.question, "answer": answer, "expected": q.answer, "caption": caption,
             "caption_true": truth, "scene": asdict(q.scene)}
            for q, answer, caption, truth in zip(asked, answers, captions, truths)]
    others = [{"question": q.question, "answer": answer, "expected": q.answer, "scene": asdict(q.scene)}
              for q, answer in zip(paraphrased, paraphrased_answers)]
    save_results(args, {"table": table, "answers": rows, "paraphrased": others})


def write_questions(args):
    """`understanding --write FILE.tsv`: the questions of this seed, in VLMEvalKit's layout."""
    text = io.StringIO()
    out = csv.writer(text, delimiter="\t", lineterminator="\n")
    out.writerow(["index", "image", "question", "answer", "category"])
    for i, asked in enumerate(draw_questions(args.seed, args.n)):
        file = io.BytesIO()
        Image.fromarray(world.render(asked.scene)).save(file, "PNG")
        image = base64.b64encode(file.getvalue()).decode()
        out.writerow([i, image, asked.question, asked.answer, asked.kind])
    write_text(Path(args.write), text.getvalue())
    print(args.write)


# ---- image -> image -------------------------------------------------------------------------------------

EDITS = ("again", "colour", "place", "remove", "background")     # "again": RECONSTRUCT; else world.edit
# (kind, number of objects before the edit); the only object isn't removed.
EDIT_CELLS = [(kind, number) for kind in EDITS for number in (1, 2, 3) if (kind, number) != ("remove", 1)]


class Edit(NamedTuple):
    """A scene, the instruction to change it, and the scene after it; kind is one of EDITS."""
    kind: str
    before: world.Scene
    instruction: str
    after: world.Scene


def draw_edits(seed, n):
    """n Edits of scenes of the world `seed`, EDIT_CELLS in turn; scenes that rule one out are skipped."""
    rng, edits, index = np.random.default_rng(seed), [], 0
    while len(edits) < n:
        kind, number = EDIT_CELLS[len(edits) % len(EDIT_CELLS)]
        scene, index = world.make_scene(seed, index), index + 1
        if len(scene.objects) != number:
            continue
        change = (RECONSTRUCT, scene) if kind == "again" else world.edit(scene, rng, kind)
        if change:
            edits.append(Edit(kind, scene, *change))
    return edits


def edit_is_right(edit, image):
    """Does a uint8 image (H, W, 3) show the objects of the changed scene in shape, colour and size, and its
    background; after a move also the moved object in its new region?"""
    seen, after = judge(image), edit.after
    kinds, wanted = (Counter((o.shape, o.colour, o.size) for o in scene.objects) for scene in (seen, after))
    if seen.background != after.background or kinds != wanted:
        return False
    places = {(o.shape, o.colour, world.region(o)) for o in seen.objects}
    moved = set(after.objects) - set(edit.before.objects) if edit.kind == "place" else ()
    return all((o.shape, o.colour, world.region(o)) in places for o in moved)


def generate_edits(pipe, edits, seed):
    """Edits -> (the images given, those generated from them as asked: uint8 (n, H, W, 3); their prompts as
    upsampled, where the model does that)."""
    given, made, texts = [world.render(edit.before) for edit in edits], [], []
    seeds = [seed * SEEDS + i for i in range(len(edits))]
    for part in batches(len(edits)):
        prompts = [edit.instruction for edit in edits[part]]
        before = [Image.fromarray(image) for image in given[part]]
        made += list(to_uint8(pipe.images(prompts, seeds[part], images=before)))
        texts += pipe.final_prompts(prompts, seeds[part], before, None)        # what it has just made them
    return given, made, texts


def edit_tables(edits, right, unchanged):
    """Edits, which were done right and which images would pass unchanged -> {"kinds": by_skill's table by
    kind, "numbers": by number of objects before the edit, "cells": by both}."""
    kinds, numbers = [edit.kind for edit in edits], [str(len(edit.before.objects)) for edit in edits]
    cells, tables = list(map(", ".join, zip(kinds, numbers))), {}
    for name, tags in (("kinds", kinds), ("numbers", numbers), ("cells", cells)):
        floor = by_skill(tags, unchanged)
        tables[name] = {tag: {**row, "unchanged": floor[tag]["score"]}
                        for tag, row in by_skill(tags, right).items() if name == "kinds" or tag != "overall"}
    return tables


def print_edit_tables(n, tables):
    """Print the tables of `edit_tables`, those by number as a matrix of rates with intervals."""
    print_table(f"{n} images edited", tables["kinds"])
    matrix = {}
    totals = {f"all, {number}": row for number, row in tables["numbers"].items()}
    for name, row in {**tables["cells"], **totals}.items():
        kind, number = name.split(", ")
        matrix.setdefault(kind, {})[number] = format_cell("score", row["score"], row)
    print_table("by the number of objects before the edit", matrix)


@torch.no_grad()
def run_editing(args):
    """Does the model generate an image again, changed as asked? --n unseen scenes, the kinds of world.edit
    and "again" without a change, for one, two and three objects in turn, as many of each; beside it, how
    often the image as it was would pass."""
    pipe, edits = load_pipeline(args), draw_edits(args.seed, args.n)
    given, made, texts = generate_edits(pipe, edits, args.seed)
    right = [edit_is_right(edit, image) for edit, image in zip(edits, made)]
    tables = edit_tables(edits, right, [edit_is_right(edit, image) for edit, image in zip(edits, given)])
    print_edit_tables(args.n, tables)
    cells = []                                   # of the sheet: before and after, in turn
    for edit, before, after, verdict in list(zip(edits, given, made, right))[:32]:
        cells += [(before, world.describe(edit.before), True), (after, edit.instruction, verdict)]
    write_image(Path(args.out) / "editing.png", np.asarray(contact_sheet(*zip(*cells), 8)))
    rows = [{"kind": edit.kind, "objects": len(edit.before.objects), "instruction": edit.instruction,
             "scene": world.describe(edit.before), "generated_from": text, "right": verdict}
            for edit, text, verdict in zip(edits, texts, right)]
    save_results(args, {**tables, "images": rows})


@torch.no_grad()
def vae_round_trip(pipe, pixels):
    """Pixels (B, 3, H, W) in [0, 1] -> what the VAE alone makes of them, on the CPU."""
    vae = pipe.decoder.vae
    signed = (pixels * 2 - 1).to(pipe.device, next(vae.parameters()).dtype)
    return (vae.decode(vae.encode(signed)).float().cpu() / 2 + 0.5).clamp(0, 1)


def run_reconstruction(args):
    """Both ceilings: what the VAE alone keeps of an image, and what CLIP features and the decoder keep.

    outline: fully right, and all objects' outlines are true (see `alignment`).
    """
    pipe = load_pipeline(args)
    side = pipe.decoder.unet.config.sample_size * pipe.decoder.vae.factor
    scenes = [world.make_scene(args.seed, i) for i in range(args.n)]
    renders = np.stack([world.render(scene, side) for scene in scenes])                        # (n, H, W, 3)
    truth = torch.from_numpy(renders).permute(0, 3, 1, 2) / 255                                # (n, 3, H, W)
    vae_alone, whole = [], []
    for part in batches(args.n):
        vae_alone.append(vae_round_trip(pipe, truth[part]))
        whole.append(pipe.reconstruct([Image.fromarray(r) for r in renders[part]], range(args.n)[part]))
    table, rows = {}, [renders[:12]]
    for name, made in (("VAE alone", torch.cat(vae_alone)), ("features and decoder", torch.cat(whole))):
        seen = [judge(image) for image in to_uint8(made)]
        but_shape = [agrees(scene, image, ("colour", "size")) for scene, image in zip(scenes, seen)]
        table[name] = {"dB": psnr(made, truth).mean().item(), **rate_agreement(scenes, seen),
                       "shape aside": sum(but_shape) / args.n}
        rows.append(to_uint8(made[:12]))
    print_table(f"{args.n} unseen images: PSNR, rate judged fully right, right but for shape", table)
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    write_image(Path(args.out) / "reconstruction.png", sheet)
    save_results(args, {"table": table})


# ---- conversations: text and images, both ways ------------------------------------------------------------

def scene_of(seen):
    """What the judge has seen -> a Scene that can be changed and asked about."""
    return world.Scene(seen.background, tuple(world.Object(o.shape, o.colour, o.size, o.x, o.y)
                                              for o in seen.objects))


def hold_conversation(chat, entry, rng):
    """Lead a sample.Chat through a request (of an entry), a change of its image and a question about that.

    Returns a row for each turn: {"turn", "message", "answer" (None: there was no image to go on with),
    "confused": it answered with text where an image was due, with a fresh one where a change was, or with an
    image to a question; "right"}. Change and question are drawn from what the judge sees in the last image.
    """
    rows = []

    def say(turn, message, due=None):
        chat.read(message)
        answer = chat.turns[-1][1]
        confused = answer != due if due else answer in chat.pipe.requests.values()
        rows.append({"turn": turn, "message": message, "answer": answer, "confused": confused})
        return None if chat.last is None else np.asarray(Image.open(chat.last).convert("RGB"))

    image = say("request", entry["prompt"], IMG)
    rows[0]["right"] = image is not None and judge_all([entry], [judge(image)])[0].hit
    if image is None:
        return rows + [{"turn": turn, "message": None, "answer": None, "confused": False, "right": False}
                       for turn in ("change", "question")]
    before = scene_of(judge(image))
    kinds = rng.permutation(EDITS[1:])           # of which "background" is always possible
    kind, change = next((kind, change) for kind in kinds if (change := world.edit(before, rng, kind)))
    image = say("change", change[0], EDIT)
    made = edit_is_right(Edit(kind, before, *change), image)
    rows[1]["right"] = rows[1]["answer"] == EDIT and made
    scene = scene_of(judge(image))
    known = scene.objects and all(obj.is_known for obj in scene.objects)
    kinds = world.QUESTIONS if known else ("background",)
    question, truth = world.ask(scene, rng, kinds, paraphrase=rng.random() < 0.5)
    say("question", question)
    rows[2] |= {"expected": truth, "right": answers_right([rows[2]["answer"]], [truth])[0]}
    return rows


def run_chat(args):
    """Do conversations work as people have them with sample.py --chat? --n of three turns: a request for an
    image, a change of it, a question about what came out. The model alone decides what it answers with.

    Right is an image that shows what was asked for, or what the last one showed, changed as asked, and the
    true answer. confused: text where an image was due, an image where text was, a fresh image for a change.
    """
    pipe, folder = load_pipeline(args), Path(args.out) / "chat"
    if not pipe.requests:
        raise ValueError(f"the model in {args.ckpt} was never taught to answer with images: its config.json "
                         "doesn't say nano_blip3o.chat_images")
    entries = [entry for entry in world.upsampling_prompts(2 * args.n, args.seed) if entry["include"]]
    rows = []
    for i, entry in enumerate(tqdm(entries[:args.n], disable=None)):
        seed = args.seed * SEEDS + 2 * i
        _, flags = parse(["--chat", "--ckpt", args.ckpt, "--out", str(folder), "--seed", str(seed)])
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            rows.append(hold_conversation(Chat(pipe, flags), entry, np.random.default_rng(seed)))
    table = {turns[0]["turn"]: {**rate(row["right"] for row in turns),
                                "confused": sum(row["confused"] for row in turns) / args.n}
             for turns in zip(*rows)}
    whole = rate(all(row["right"] for row in turns) for turns in rows)
    table["all three"] = {**whole, "confused": sum(any(row["confused"] for row in turns)
                                                   for turns in rows) / args.n}
    print_table(f"{args.n} conversations of three turns", table)
    save_results(args, {"table": table, "conversations": rows})


# ---- binding: whose colour is it, and whose shape? ------------------------------------------------------

EXCHANGED = {"colours": world.COLOURS, "shapes": world.SHAPES}


def draw_swaps(seed, n, upsample):
    """n unseen scenes of two objects of unlike shapes and colours, and for each a caption that names both
    colours and both shapes, upsampled to a description or not: (scenes, {"true": captions, "colours" and
    "shapes": the same with the two exchanged})."""
    rng, scenes, index = np.random.default_rng(seed), [], 0
    captions = {"true": [], **{name: [] for name in EXCHANGED}}
    while len(scenes) < n:
        scene, index = world.make_scene(seed, index), index + 1
        text = world.caption(scene, rng)
        if len(scene.objects) != 2 or not all(world.swap(text, names) for names in EXCHANGED.values()):
            continue
        if upsample:
            text = world.upsample_caption(scene, text, world.parse_caption(text))
        scenes.append(scene)
        captions["true"].append(text)
        for name, names in EXCHANGED.items():
            captions[name].append(world.swap(text, names))
    return scenes, captions


def encode_scenes(pipe, scenes):
    """CLIP features of the renders of scenes as the DiT takes them, (n, C, 8, 8) fp32."""
    size, features = pipe.eva.config.image_size, []
    for start in range(0, len(scenes), BATCH):
        renders = np.stack([world.render(scene, size) for scene in scenes[start:start + BATCH]])
        features.append(pipe.eva.encode(to_pixels(renders).to(pipe.device, pipe.dtype)))
    return torch.cat(features).float().transpose(1, 2).unflatten(2, (pipe.model.config.grid,) * 2)


def binding_table(pipe, x1, conds, seed):
    """Print and return the mean losses at TIMES, of the same noise under all conditions: {t: {condition:
    loss, "colours - true", "shapes - true": how much the exchange raises it, [mean, standard error]}}."""
    gains = {f"{name} - true": name for name in EXCHANGED}
    print(f"| t | {' | '.join((*conds, *gains))} |\n|{'---|' * (1 + len(conds) + len(gains))}")
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(seed)).to(x1)
    table, parts = {}, [slice(i, i + BATCH) for i in range(0, len(x1), BATCH)]
    for time in TIMES:
        t, losses = torch.full((len(x1),), time, device=x1.device), {}
        for name, cond in conds.items():
            losses[name] = torch.cat([
                flow_matching_loss(pipe.model.dit, x1[part], cond[part], drop=0, x0=x0[part], t=t[part])
                for part in parts])                                  # (n,)
        row = table[time] = {name: loss.mean().item() for name, loss in losses.items()}
        cells = [f"{loss:.4f}" for loss in row.values()]
        for title, name in gains.items():
            gain = losses[name] - losses["true"]
            row[title] = [gain.mean().item(), (gain.std() / len(x1) ** 0.5).item()]
            cells.append("{:+.4f} ± {:.4f}".format(*row[title]))
        print(f"| {time} | {' | '.join(cells)} |", flush=True)
    return table


@torch.no_grad()
def run_binding(args):
    """Does the model know which colour and which shape belong to which object? The DiT's loss under captions
    that are true, that have their two colours or shapes exchanged, that are another image's, and under none.

    Captions of two objects of unlike shapes and colours, from unseen scenes, perfectly upsampled where the
    model upsamples prompts. A DiT that takes its prompt for a bag of words is as content with exchanged
    colours as with true ones, whatever its loss. Printed before the table is the same question to the
    condition: how far each exchange moves the query states, as a fraction of what another prompt does. A
    model without a DiT gets these numbers alone.
    """
    pipe = load_pipeline(args)
    if pipe.model.latent_queries is None:
        raise ValueError(f"the model in {args.ckpt} has no latent queries: there is no condition to measure")
    if pipe.model.config.latents:
        raise ValueError(f"the model in {args.ckpt} generates VAE latents; binding needs CLIP features")
    scenes, captions = draw_swaps(args.seed, args.n, pipe.setting("upsample", args.upsample))
    conds = {name: torch.cat([pipe.condition(texts[i:i + BATCH]) for i in range(0, args.n, BATCH)])
             for name, texts in captions.items()}                    # each (n, queries, D)
    conds |= {"another's": conds["true"].roll(1, 0), "none": torch.zeros_like(conds["true"])}
    distances = {name: (conds["true"] - cond).square().mean().item() for name, cond in conds.items()}
    moved = {name: distances[name] / distances["another's"] for name in EXCHANGED}
    words = ", ".join(f"{name} {fraction:.1%}" for name, fraction in moved.items())
    print(f"how far an exchange moves the condition, of what another prompt does: {words}\n")
    results = {"moved": moved}
    if pipe.model.dit is not None:
        results["table"] = binding_table(pipe, encode_scenes(pipe, scenes), conds, args.seed)
    save_results(args, results)
