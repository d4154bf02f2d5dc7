"""The scores on the world, one function for each command of eval.py: does the image show what was asked, is
the answer right, does an image survive the autoencoder, which words does a colour belong to?

All models are scored on scenes and prompts that they were never trained on (other seeds than 0), by
miniature/judge.py. Each command takes the parsed command line, prints tables, and writes OUT/NAME.json and
often a sheet OUT/NAME.png.
"""
import base64
import csv
import io
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

from data import DESCRIBE, RECONSTRUCT, to_pixels
from evals.distances import psnr
from evals.report import (
    BATCH,
    SHEET,
    by_skill,
    contact_sheet,
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
    judge_images,
    read_entries,
    scene_for,
    score_renders,
    summarise,
)
from sample import Pipeline, to_uint8

TRAINING_WORLD = 0                 # the seed of the scenes that models are trained on
SEEDS = 10 ** 6                    # so many images, each with its own seed, belong to one value of --seed
TIMES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)     # at which `binding` measures the loss


def load_pipeline(args):
    """The Pipeline that --ckpt, --device, --dtype and, where there is one, --eva name."""
    return Pipeline(args.ckpt, args.device, args.dtype, eva=getattr(args, "eva", None))


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


def rate_read_right(scenes, size, distort):
    """The rate of scenes of whose distorted renders the judge reads everything right."""
    scenes = tqdm(scenes, leave=False, disable=None)
    return rate(agrees(scene, judge(distort(world.render(scene, size)))) for scene in scenes)


def run_judge(args):
    """How far the judge can be trusted: true images must pass in four conditions, others must not."""
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


def states_what_was_asked(entry, text):
    """Does an upsampled prompt name the objects of an entry, in their numbers and colours, and no others?"""
    objects = []
    for words in world.parse_caption(text):
        objects += [set(words)] * world.number_of(words)
    if len(objects) != count_asked(entry):
        return False
    for clause in entry["include"]:
        asked = {clause["class"], clause.get("color", clause["class"])}
        if sum(asked <= words for words in objects) < clause.get("count", 1):
            return False
    return True


def choose_prompts(args):
    """(the entries of --prompts, the first --n-prompts, of --words or of the skills, the name of the
    results)"""
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
    if args.words:
        return world.word_prompts(args.n_prompts, args.seed), "alignment-words"
    return world.skill_prompts(args.n_prompts, args.seed, args.novel, args.objects), "alignment"


def run_alignment(args):
    """Do images show what prompts of the six skills ask? Beside it: shuffled prompts, and true renders."""
    prompts, name = choose_prompts(args)
    pipe = load_pipeline(args)
    entries = [entry for entry in prompts for _ in range(args.images)]
    images, seeds = generate_images(pipe, entries, args.seed, args.best_of, upsample=args.upsample)
    seen = judge_images(images, entries)
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
    if pipe.upsampled and not args.words:
        stated = rate(states_what_was_asked(entry, text) for entry, text in zip(entries, texts))
        tables["upsampled"] = {"overall": stated}
        print_table("upsampled prompts state what was asked", tables["upsampled"])
    every = -(-len(images) // SHEET)             # of so many prompts one is on the contact sheet
    shown = [i for i in range(len(images)) if i // args.images % every == 0]
    sheet = contact_sheet([images[i] for i in shown], [entries[i]["prompt"] for i in shown],
                          [verdicts[i].hit for i in shown], max(8, 4 * args.images))
    write_image(Path(args.out) / f"{name}.png", np.asarray(sheet))
    rows = [{"tag": entry["tag"], "prompt": entry["prompt"], "generated_from": text, "seed": seed,
             "hit": verdict.hit, "strict": verdict.strict, "seen": asdict(image)}
            for entry, text, seed, verdict, image in zip(entries, texts, seeds, verdicts, seen)]
    save_results(args, {**tables, "images": rows}, name)


# ---- image -> text --------------------------------------------------------------------------------------

class Asked(NamedTuple):
    """A question about a scene: its kind, one of world.QUESTIONS, its words and the expected answer."""
    scene: world.Scene
    kind: str
    question: str
    answer: str


def draw_questions(seed, n, most=4):
    """n Asked about scenes of the world `seed`, of at most `most` (>= 2) objects, the kinds in turn."""
    asked, index = [], 0
    while len(asked) < n:
        kind = world.QUESTIONS[len(asked) % len(world.QUESTIONS)]
        scene = world.make_scene(seed, index, most=most)
        found = world.question(scene, np.random.default_rng((seed, index)), kind)
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
    """Questions of six kinds, beside what each kind's commonest training answer would score; captions;
    matches.

    An answer is right if it is the expected one, whatever its case and a full stop. Captions: see
    `caption_truth`. Matches: does this caption say what the image shows? (world.match_question)
    """
    pipe, asked = load_pipeline(args), draw_questions(args.seed, args.n)
    scenes = [question.scene for question in asked]
    answers = answer_all(pipe, scenes, [question.question for question in asked])
    table = rate_by_kind(asked, answers_right(answers, [question.answer for question in asked]))
    captions = answer_all(pipe, scenes, [DESCRIBE] * len(scenes))
    truths = [caption_truth(text, scene) for text, scene in zip(captions, scenes)]
    table["caption, objects"] = rate(objects for objects, _ in truths)
    table["caption, every detail"] = rate(details for _, details in truths)
    table |= rate_match_questions(pipe, scenes, args.seed)
    print_table(f"{args.n} questions and captions about unseen images", table)
    rows = [{"question": q.question, "answer": answer, "expected": q.answer, "caption": caption,
             "caption_true": truth, "scene": asdict(q.scene)}
            for q, answer, caption, truth in zip(asked, answers, captions, truths)]
    save_results(args, {"table": table, "answers": rows})


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


class Edit(NamedTuple):
    """A scene, the instruction to change it, and the scene after it; kind is one of EDITS."""
    kind: str
    before: world.Scene
    instruction: str
    after: world.Scene


def draw_edits(seed, n):
    """n Edits of scenes of the world `seed`, the kinds in turn; scenes that rule a kind out are skipped."""
    rng, edits, index = np.random.default_rng(seed), [], 0
    while len(edits) < n:
        scene, kind = world.make_scene(seed, index), EDITS[len(edits) % len(EDITS)]
        index += 1
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


@torch.no_grad()
def run_editing(args):
    """Does the model generate an image again, changed as asked? --n unseen scenes, the kinds of world.edit
    in turn, and "again" without a change; beside it, how often the image as it was would pass."""
    pipe, edits = load_pipeline(args), draw_edits(args.seed, args.n)
    given = [world.render(edit.before) for edit in edits]
    seeds = [args.seed * SEEDS + i for i in range(len(edits))]
    made = []
    for part in batches(len(edits)):
        prompts = [edit.instruction for edit in edits[part]]
        before = [Image.fromarray(image) for image in given[part]]
        made += list(to_uint8(pipe.images(prompts, seeds[part], images=before)))
    kinds = [edit.kind for edit in edits]
    right = [edit_is_right(edit, image) for edit, image in zip(edits, made)]
    floor = by_skill(kinds, [edit_is_right(edit, image) for edit, image in zip(edits, given)])
    table = by_skill(kinds, right)
    for kind, row in table.items():
        row["unchanged"] = floor[kind]["score"]
    print_table(f"{args.n} images edited", table)
    cells = []                                   # of the sheet: before and after, in turn
    for edit, before, after, verdict in list(zip(edits, given, made, right))[:32]:
        cells += [(before, world.describe(edit.before), True), (after, edit.instruction, verdict)]
    write_image(Path(args.out) / "editing.png", np.asarray(contact_sheet(*zip(*cells), 8)))
    rows = [{"kind": edit.kind, "instruction": edit.instruction, "scene": world.describe(edit.before),
             "right": verdict} for edit, verdict in zip(edits, right)]
    save_results(args, {**table, "images": rows})


@torch.no_grad()
def vae_round_trip(pipe, pixels):
    """Pixels (B, 3, H, W) in [0, 1] -> what the VAE alone makes of them, on the CPU."""
    vae = pipe.decoder.vae
    signed = (pixels * 2 - 1).to(pipe.device, next(vae.parameters()).dtype)
    return (vae.decode(vae.encode(signed)).float().cpu() / 2 + 0.5).clamp(0, 1)


def run_reconstruction(args):
    """Both ceilings: what the VAE alone keeps of an image, and what CLIP features and the decoder keep."""
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
        table[name] = {"dB": psnr(made, truth).mean().item(), **rate(map(agrees, scenes, seen)),
                       "shape aside": sum(but_shape) / args.n}
        rows.append(to_uint8(made[:12]))
    print_table(f"{args.n} unseen images: PSNR, rate judged fully right, right but for shape", table)
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    write_image(Path(args.out) / "reconstruction.png", sheet)
    save_results(args, {"table": table})


# ---- binding: whose colour is it? -----------------------------------------------------------------------

def draw_colour_swaps(seed, n):
    """n unseen scenes of two objects of unlike shapes and colours, and for each a caption that names both
    colours: (scenes, {"true": captions, "exchanged": the same with the two colours exchanged})."""
    rng, scenes, index = np.random.default_rng(seed), [], 0
    captions = {"true": [], "exchanged": []}
    while len(scenes) < n:
        scene, index = world.make_scene(seed, index), index + 1
        text = world.caption(scene, rng)
        exchanged = world.swap_colours(text)
        if exchanged and len(scene.objects) == 2 and scene.objects[0].shape != scene.objects[1].shape:
            scenes.append(scene)
            captions["true"].append(text)
            captions["exchanged"].append(exchanged)
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
    loss, "gain": how much an exchange of colours raises it, "standard error"}}."""
    print("| t | " + " | ".join(conds) + " | exchanged - true |\n|" + "---|" * (len(conds) + 2))
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(seed)).to(x1)
    table, parts = {}, [slice(i, i + BATCH) for i in range(0, len(x1), BATCH)]
    for time in TIMES:
        t, losses = torch.full((len(x1),), time, device=x1.device), {}
        for name, cond in conds.items():
            losses[name] = torch.cat([
                flow_matching_loss(pipe.model.dit, x1[part], cond[part], drop=0, x0=x0[part], t=t[part])
                for part in parts])                                  # (n,)
        gain = losses["exchanged"] - losses["true"]
        row = {name: loss.mean().item() for name, loss in losses.items()}
        row |= {"gain": gain.mean().item(), "standard error": (gain.std() / len(x1) ** 0.5).item()}
        table[time] = row
        print(f"| {time} | " + " | ".join(f"{row[name]:.4f}" for name in conds)
              + f" | {row['gain']:+.4f} ± {row['standard error']:.4f} |", flush=True)
    return table


@torch.no_grad()
def run_binding(args):
    """Does the model know which colour belongs to which object? The DiT's loss under captions that are true,
    that have their two colours exchanged, that are another image's, and under none.

    Captions of two objects of unlike shapes and colours, from unseen scenes. A DiT that takes its prompt for
    a bag of words is as content with exchanged colours as with true ones, whatever its loss. Printed before
    the table is the same question to the condition: how far the exchange moves the query states, as a
    fraction of what another prompt does. A model without a DiT gets that number alone.
    """
    pipe = load_pipeline(args)
    if pipe.model.latent_queries is None:
        raise ValueError(f"the model in {args.ckpt} has no latent queries: there is no condition to measure")
    if pipe.model.config.latents:
        raise ValueError(f"the model in {args.ckpt} generates VAE latents; binding needs CLIP features")
    scenes, captions = draw_colour_swaps(args.seed, args.n)
    conds = {name: torch.cat([pipe.condition(texts[i:i + BATCH]) for i in range(0, args.n, BATCH)])
             for name, texts in captions.items()}                    # each (n, queries, D)
    conds |= {"another's": conds["true"].roll(1, 0), "none": torch.zeros_like(conds["true"])}
    distances = {name: (conds["true"] - cond).square().mean().item() for name, cond in conds.items()}
    results = {"moved": distances["exchanged"] / distances["another's"]}
    print(f"the exchange moves the condition by {results['moved']:.1%} of what another prompt does\n")
    if pipe.model.dit is not None:
        results["table"] = binding_table(pipe, encode_scenes(pipe, scenes), conds, args.seed)
    save_results(args, results)
