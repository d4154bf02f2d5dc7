"""The studies: the paper's figures and the ablations in miniature, `python eval.py figure4 | figure5 |
ablation`.

A study trains each of its runs with several seeds on equally many images, and measures it several times on
the way; captions and prompts are upsampled. Two ablations train nothing: --ckpt generates with each value of
one setting. Whatever is done is kept: the same line again goes on where it stopped.
"""
import itertools
import math
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from checkpoint import POSITIVE, Interval, read_json, typed, write_json
from data import DESCRIBE
from evals.charts import draw_charts, save_grid
from evals.distances import clip_features, frechet
from evals.report import BATCH, FORMATS, read_records, save_results, wilson, write_image, write_text
from miniature import steps, world
from miniature.judge import caption_truth, count_asked, scene_for, score_renders
from miniature.scores import SEEDS, answer_all, answers_right, draw_questions, generate_images
from sample import Pipeline
from train import SIGNALS

# `runs` is {name: flags of train.py}, `start` and `flags` are those of all runs, in which {init} is --init;
# `typed` names the runs whose captions and prompts are not upsampled, `panels` the charts of the figure;
# other keys replace the defaults in USUAL. `vary` is the argument of Pipeline.images that takes `values`.
START = "--stage 1 --fresh --init {init}"
SMALL = "--dit dim=128,n_layers=4,n_heads=4,n_kv_heads=2,ffn_dim=352"
STUDIES = {
    # 64 fresh queries for all: CLIP + MSE maps query i to feature i.
    "figure4": dict(
        runs={"CLIP + MSE": "--design clip-mse", "CLIP + flow matching": f"{SMALL} --design clip-fm",
              "VAE + flow matching": f"{SMALL} --design vae-fm"},
        flags="--queries 64", points=10,
        panels=("alignment", "Frechet", "feature spread", "pixel spread")),
    "figure5": dict(
        runs={"sequential": "--joint 0", "joint": "--joint 0.5"}, flags=SMALL, objects=2,
        panels=("alignment", "Frechet", "questions", "captions")),
    # Both at stage 2's learning rate, which ends near zero: they differ in their data alone.
    "stage2": dict(
        runs={"stage 2": "--stage 2", "more of stage 1": "--stage 1"}, start="--init {ckpt} --lr 1.2e-3",
        steps=800, batch=128, objects=4, panels=("alignment", "Frechet")),
    "upsample": dict(
        runs={"upsampled": "", "as typed": ""}, flags=SMALL, typed=("as typed",),
        panels=("alignment", "colours", "Frechet", "gap, t = 0.05")),
    "queries": dict(
        runs={"16 queries": "--queries 16", "64 queries": "--queries 64"}, flags=SMALL,
        panels=("alignment", "colours", "Frechet")),
    "rope": dict(
        runs={"2D RoPE": f"{SMALL},rope=2d", "3D RoPE": f"{SMALL},rope=3d"},
        panels=("alignment", "colours", "Frechet")),
    "shift": dict(
        runs={f"shift {shift}": f"--shift {shift}" for shift in (1, 2, 5, 10)}, flags=SMALL,
        panels=("alignment", "colours", "gap, t = 0.02", "gap, t = 0.05")),
    "ema": dict(
        runs={"averaged weights": "--ema 0.999", "last weights": "--ema 0"}, flags=SMALL,
        panels=("alignment", "colours", "Frechet")),
    "size": dict(
        runs={"width 64, 4 layers": "--dit dim=64,n_layers=4,n_heads=2,n_kv_heads=1,ffn_dim=176",
              "width 128, 4 layers": SMALL,
              "width 192, 6 layers": "--dit dim=192,n_layers=6,n_heads=6,n_kv_heads=2,ffn_dim=512"},
        panels=("alignment", "colours", "Frechet")),
    "steps": dict(ways=True, seeds=1, n_prompts=553, images=1, objects=4, panels=()),     # see steps.py
    "guidance": dict(
        vary="guidance", values=(1, 1.5, 2, 3, 5), x_label="guidance", objects=4,
        panels=("alignment", "Frechet", "feature spread")),
}
PANELS = {"alignment": "Alignment: % of images that show what was asked",
          "colours": "Colours: % with as many objects, and the colours asked",
          "Frechet": "Image quality: Frechet distance to true images (own CLIP)",
          "feature spread": "Diversity: difference of images of a prompt (CLIP features)",
          "pixel spread": "Diversity: difference of images of a prompt (pixels, 0 to 1)",
          "questions": "Understanding: % of questions answered right",
          "captions": "Understanding: % of captions right in all objects",
          "gap, t = 0.02": "Loss of shuffled less true prompts at t = 0.02",
          "gap, t = 0.05": "Loss of shuffled less true prompts at t = 0.05"}
# Numbers that are rates, and the number that counts their trials.
RATES = {"alignment": "images", "colours": "images", "questions": "scenes", "captions": "scenes",
         **dict.fromkeys(steps.RATES, "images")}
EXAMPLES = 8         # prompts of the image that shows what the runs generate
USUAL = {"steps": 2000, "points": 5, "batch": 64, "seeds": 3, "n_prompts": 128, "images": 2, "n": 120,
         "objects": 1}
# The same with --quick, to see that everything runs; its figures mean nothing.
QUICK = {"steps": 4, "points": 2, "batch": 8, "seeds": 1, "n_prompts": 6, "images": 2, "n": 12}


# ---- numbers of one model -------------------------------------------------------------------------------

def spread(x, k):
    """x (n * k, ...), k of a prompt -> RMS difference of two of a prompt, mean over pairs and prompts."""
    x = torch.as_tensor(x).flatten(1).unflatten(0, (-1, k))                                    # (n, k, D)
    first, second = zip(*itertools.combinations(range(k), 2))
    return float((x[:, first] - x[:, second]).square().mean(2).sqrt().mean())


def encode_images(pipe, images):
    """uint8 images (H, W, 3) -> their CLIP features (N, 64, C)."""
    return torch.cat([clip_features(pipe, map(Image.fromarray, images[i:i + BATCH]))
                      for i in range(0, len(images), BATCH)])


def asked_entries(args, seed):
    """Up to --n-prompts prompts for at most --objects objects, each of them --images times in a row."""
    prompts = [entry for entry in world.skill_prompts(args.n_prompts, seed, most=args.objects)
               if count_asked(entry) <= args.objects]
    return [entry for entry in prompts for _ in range(args.images)]


def measure_images(pipe, args, seed, generate):
    """Alignment, Frechet distance and spread of the uint8 images (H, W, 3) that generate(entries) makes of
    `asked_entries`."""
    entries = asked_entries(args, seed)
    images, rng = generate(entries), np.random.default_rng((seed, 1))
    renders = [world.render(scene_for(entry, rng), len(images[0])) for entry in entries]
    made, real = encode_images(pipe, images), encode_images(pipe, renders)                     # (N, 64, C)
    scores = score_renders(entries, images)["overall"]
    return {"images": len(images), "alignment": scores["score"], "colours": scores["colours"],
            "Frechet": frechet(made.mean(1), real.mean(1)), "feature spread": spread(made, args.images),
            "pixel spread": spread(np.stack(images) / np.float32(255), args.images)}


def measure_understanding(pipe, args):
    """The fractions of --n unseen scenes with a right answer, and with a caption right in all objects."""
    asked = draw_questions(1, args.n, args.objects)
    scenes = [question.scene for question in asked]
    answers = answer_all(pipe, scenes, [question.question for question in asked])
    captions = answer_all(pipe, scenes, [DESCRIBE] * args.n)
    true = [caption_truth(text, scene)[0] for text, scene in zip(captions, scenes)]
    right = answers_right(answers, [question.answer for question in asked])
    return {"scenes": args.n, "questions": sum(right) / args.n, "captions": sum(true) / args.n}


def open_model(folder, args, seed, upsample=None, **sampling):
    """(the pipeline of a model folder with the image parts of --eva, its generate(entries) -> uint8 images
    (H, W, 3)). upsample, sampling: as Pipeline.images takes them.

    All images of a prompt are generated from one upsampled prompt: so they differ by what follows the
    language model.
    """
    pipe = Pipeline(folder, eva=args.eva)
    pipe.sampling = Pipeline(args.eva).sampling                      # all runs sample alike
    if args.quick:
        pipe.sampling = pipe.sampling | {"steps": 2, "decoder_steps": 2}

    def generate(entries):
        if pipe.setting("upsample", upsample):
            prompts = [entry["prompt"] for entry in entries[::args.images]]
            texts = pipe.upsample_prompts(prompts, [seed * SEEDS + i for i in range(len(prompts))])
            entries = [{**entry, "prompt": texts[i // args.images]} for i, entry in enumerate(entries)]
        return generate_images(pipe, entries, seed, upsample=False, **sampling)[0]
    return pipe, generate


def measure(folder, args, seed, upsample=None, understands=False, **sampling):
    """The numbers of a model folder; understands: also of reading images. The rest as `open_model`."""
    pipe, generate = open_model(folder, args, seed, upsample, **sampling)
    numbers = measure_images(pipe, args, seed, generate)
    if understands:              # a frozen language model is that of --init, which also has the vision tower
        reader = pipe if pipe.model.visual is not None else Pipeline(args.init)
        numbers |= measure_understanding(reader, args)
    return numbers


# ---- training the runs of a study -----------------------------------------------------------------------

LOGGED = {"samples", "per_s", "_true@0.02", "_shuffled@0.02", "_true@0.05", "_shuffled@0.05"}


def read_log(run):
    """A run's log.jsonl -> {step: its numbers}, {} before the first; what a crash undid counts once."""
    log, rows = run / "log.jsonl", {}
    for row in read_records(log, {"step": int}) if log.exists() and log.stat().st_size else ():
        for name in LOGGED & row.keys():
            interval = POSITIVE if name == "per_s" else Interval()
            typed(row[name], int | float, interval, f"{log}, step {row['step']}: {name}")
        rows.setdefault(row["step"], {}).update(row)
    return dict(sorted(rows.items()))


def read_run(run, step):
    """What a run's log says of its first `step` steps: images, also a second, minutes, and at small t the
    gap: the loss of shuffled prompts less that of true ones, zero for a DiT that ignores its condition."""
    rows, samples, seconds = read_log(run), 0, 0.0
    if step not in rows:
        raise ValueError(f"{run / 'log.jsonl'} lacks step {step}: delete {run}, to train it anew")
    for at, row in rows.items():
        if at <= step and {"per_s", "samples"} <= row.keys():
            seconds += (row["samples"] - samples) / row["per_s"]
            samples = row["samples"]
    gaps = {f"gap, t = {t}": rows[step][f"_shuffled@{t}"] - rows[step][f"_true@{t}"] for t in (0.02, 0.05)
            if {f"_true@{t}", f"_shuffled@{t}"} <= rows[step].keys()}
    return {"step": step, "samples": samples, "images/s": samples / max(seconds, 1e-9),
            "minutes": seconds / 60, **gaps}


class Trainer:
    """The runs of a study: --jobs at a time, each by train.py on one thread, then measured."""

    def __init__(self, args, study, folder):
        self.args, self.study, self.folder = args, study, folder
        self.stopped, self.children = False, set()
        self.every = max(1, args.steps // args.points)
        self.points = sorted({*range(self.every, args.steps + 1, self.every), args.steps})
        self.jobs = {(name, seed): folder / re.sub(r"[^\w.]+", "-", f"{name} {seed}").lower()
                     for seed in range(args.seeds) for name in study["runs"]}

    def upsample(self, name):
        """Are the captions and prompts of a run upsampled?"""
        return name not in self.study.get("typed", ())

    def command(self, name, seed, run):
        """The flags of train.py for one run."""
        args, study = self.args, self.study
        flags = " ".join((study.get("start", START), study.get("flags", ""), study["runs"][name]))
        if args.quick:
            flags = re.sub(r"n_layers=\d+", "n_layers=1", flags)
        words = [*(word.format(**vars(args)) for word in flags.split()), "--eva", args.eva,
                 "--seed", seed, "--steps", args.steps, "--batch", args.batch, *["--bf16"] * args.bf16,
                 "--world", f"objects={args.objects},upsample={int(self.upsample(name))}",
                 "--save-every", self.every, "--log-every", math.gcd(20, self.every),
                 "--out", run, "--save", run / "model-{step}"]
        return [str(word) for word in words]

    def train(self, name, seed, run):
        """Train a run to its end from wherever it stands; ValueError if it fails or was another run."""
        models = [run / f"model-{step:06d}" / "config.json" for step in self.points]
        command, note = self.command(name, seed, run), run / "command.json"
        if note.exists() and read_json(note, list) != command:
            raise ValueError(f"{run} holds a run of other settings than these: choose another --runs, or "
                             "delete it")
        if all(model.exists() for model in models):
            return
        write_json(note, command)
        script = Path(__file__).parent.parent / "train.py"
        with open(run / "train.txt", "a+") as output:
            # In a session of its own it doesn't hear a terminal's Ctrl-C: a second signal would keep it from
            # saving.
            child = subprocess.Popen([sys.executable, script, *command, "--quiet"], stdout=output,
                                     stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                     start_new_session=True)
            self.children.add(child)
            child.wait()
            self.children.discard(child)
            if child.returncode and not self.stopped:
                output.seek(0)
                last = (output.read().strip() or "it was killed").splitlines()[-1]
                raise ValueError(f"training {run} failed: {last}")
        absent = [str(model.parent) for model in models if not model.exists()]
        if absent and not self.stopped:
            raise ValueError(f"{run} was killed before {absent[0]} was written: delete {run}, to train it "
                             "anew")

    def measure_point(self, name, run, step):
        """The numbers of a run after `step` steps, from its measured.json if that asked the same."""
        args, note = self.args, run / f"model-{step:06d}" / "measured.json"
        asked = {"n_prompts": args.n_prompts, "images": args.images, "seed": args.seed, "n": args.n}
        stored = read_json(note) if note.exists() else {}
        if stored.get("asked") != asked:
            understands = "questions" in self.study["panels"]
            numbers = measure(note.parent, args, args.seed, self.upsample(name), understands)
            stored = {"asked": asked, "numbers": numbers}
            write_json(note, stored)
        numbers = typed(stored.get("numbers"), dict, Interval(), f"{note}: numbers")
        needed = {panel for panel in self.study["panels"] if not panel.startswith("gap")}
        needed |= {RATES[panel] for panel in needed & RATES.keys()}
        if not needed <= numbers.keys() or not {int, float} >= set(map(type, numbers.values())):
            raise ValueError(f"{note} doesn't hold the numbers of this study: delete it, to measure again")
        return {**read_run(run, step), **numbers}

    def __call__(self, name, seed):
        """[numbers at each point] of one run."""
        run, numbers = self.jobs[name, seed], []
        self.train(name, seed, run)
        for step in self.points:
            if self.stopped:
                break
            numbers.append(self.measure_point(name, run, step))
            self.measured.update()
        return numbers

    def wait_for(self, futures, bar):
        """Wait until all futures are done, or one fails; `bar` shows the steps trained so far."""
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            with suppress(ValueError):                               # a line that is just being written
                bar.update(sum(max(read_log(run), default=0) for run in self.jobs.values()) - bar.n)

    def all(self):
        """{name: [[numbers at each point] of each seed]}, under two progress bars."""
        with ThreadPoolExecutor(self.args.jobs) as pool, \
                tqdm(total=self.args.steps * len(self.jobs), desc="training", unit="step") as bar, \
                tqdm(total=len(self.points) * len(self.jobs), desc="measuring") as self.measured:
            futures = {job: pool.submit(self, *job) for job in self.jobs}
            # Trainings must not outlive us. (In the background SIGINT may be ignored: hence terminate.)
            ends = [sig for sig in SIGNALS if signal.getsignal(sig) == signal.SIG_DFL]
            before = {sig: signal.signal(sig, signal.default_int_handler) for sig in ends}
            try:
                self.wait_for(futures.values(), bar)
            except BaseException:
                self.stopped = True              # the other runs end without an error of their own
                raise
            finally:
                for sig, handler in before.items():
                    signal.signal(sig, handler)
                pool.shutdown(wait=False, cancel_futures=True)
                for child in set(self.children):                     # it writes its state
                    child.terminate()
        return {name: [futures[job].result() for job in self.jobs if job[0] == name]
                for name in self.study["runs"]}


# ---- the commands ---------------------------------------------------------------------------------------

def fill_settings(args, study):
    """Give settings left open (None) on the command line the study's values; ValueError if impossible."""
    for key, usual in USUAL.items():
        if getattr(args, key) is None:
            setattr(args, key, QUICK[key] if args.quick and key in QUICK else study.get(key, usual))
    if not ("questions" in study["panels"]) < args.objects <= 4:
        raise ValueError("--objects must lie between 1 and 4 (figure5, which asks where objects lie: 2), "
                         f"not {args.objects}")


def train_runs(args, study, folder, out):
    """Train and measure all runs in --runs, copy their logs to `out`: {name: [[numbers] of each seed]}."""
    torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
    trainer = Trainer(args, study, Path(args.runs) / folder)
    runs = trainer.all()
    if "{ckpt}" in study.get("start", ""):
        before = measure(args.ckpt, args, args.seed, True)
        runs["before"] = [[{"step": step, **before} for step in trainer.points]]
    for run in trainer.jobs.values():
        write_text(out / f"{run.name}.jsonl", (run / "log.jsonl").read_text())
    save_examples(trainer, out / "images.png")
    return runs


def save_examples(trainer, path):
    """What the runs of the first seed generate in the end, as one PNG: a row for each run, EXAMPLES prompts
    from first to last across, of each its --images side by side; true images in the last row."""
    args, rows, rng = trainer.args, [], np.random.default_rng((trainer.args.seed, 3))
    prompts = asked_entries(args, args.seed)[::args.images]
    chosen = [prompts[i] for i in np.linspace(0, len(prompts) - 1, min(EXAMPLES, len(prompts))).astype(int)]
    entries = [entry for entry in chosen for _ in range(args.images)]
    for name in trainer.study["runs"]:
        folder = trainer.jobs[name, 0] / f"model-{args.steps:06d}"
        rows.append(open_model(folder, args, args.seed, trainer.upsample(name))[1](entries))
    rows.append([world.render(scene_for(entry, rng), len(rows[0][0])) for entry in entries])
    save_grid([torch.from_numpy(np.stack(row)).permute(0, 3, 1, 2) / 255 for row in rows], path,
              columns=len(entries))


def vary_setting(args, study):
    """Measure --ckpt with each value of one setting, other prompts for each seed; returns as train_runs."""
    setting, points = study["vary"], []
    for seed in range(args.seeds):
        points.append([{setting: value, **measure(args.ckpt, args, args.seed + seed, **{setting: value})}
                       for value in tqdm(study["values"], desc=study["x_label"])])
    return {Path(args.ckpt).name: points}


def chart(runs, true, panel, x, x_label):
    """One panel of `draw_charts`: a line for each run, its mean over seeds, in a band from the lowest to the
    highest; of the Frechet distance also the true images' own, the best that can be had."""
    scale = 100 if panel in RATES else 1
    lines = {}
    for name, seeds in runs.items():
        if panel not in seeds[0][0]:                                 # CLIP + MSE has no loss at a time t
            continue
        lines[name] = []
        for point in zip(*seeds):                                    # of all seeds
            values = [row[panel] * scale for row in point]
            lines[name].append((point[0][x], min(values), float(np.mean(values)), max(values)))
    if panel == "Frechet":
        points = next(iter(runs.values()))[0]
        lines["true images"] = [(row[x], true[panel], true[panel], true[panel]) for row in points]
    return PANELS[panel], x_label, lines


def cell_text(column, last):
    """The last points of all seeds -> one number as text, 61.2 % [57.8, 64.5], 60.1 to 62.9: the mean, of a
    rate with Wilson's interval, trials of all seeds together; the lowest and the highest seed."""
    if column not in last[0]:
        return ""
    values = [numbers[column] for numbers in last]
    scale, digits = (100, ".1f") if column in RATES else (1, FORMATS.get(column, ".1f"))
    mean, lowest, highest = (f"{scale * v:{digits}}" for v in (np.mean(values), min(values), max(values)))
    if column in RATES:
        trials = sum(numbers[RATES[column]] for numbers in last)
        low, high = wilson(float(np.mean(values)) * trials, trials)
        mean += f" % [{100 * low:.1f}, {100 * high:.1f}]"
    return mean + f", {lowest} to {highest}" * (len(values) > 1)


def markdown(runs, columns):
    """{name: [[numbers at each point] of each seed]} -> a table in Markdown of the last points, a row for
    each run; its corner says what a cell is."""
    last = {name: [points[-1] for points in seeds] for name, seeds in runs.items()}
    columns = [column for column in columns if any(column in rows[0] for rows in last.values())]
    lines = [["mean [95 % interval], lowest to highest seed", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell_text(column, rows) for column in columns)] for name, rows in last.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def by_value(runs, x):
    """What `vary_setting` returned -> the same with a run for each value: {"steps 8": [[numbers] of each
    seed]}."""
    (seeds,) = runs.values()
    return {f"{x} {numbers[0][x]}": [[row] for row in numbers] for numbers in zip(*seeds)}


def compare_ways(args, folder, out):
    """Measure the samplers of --ckpt by miniature/steps.py; print and write table, figure and numbers."""
    found = steps.measure_ways(args)
    settings = steps.judged(found)
    rows = {name: [[row] for row in each] for part in settings.values() for name, each in part.items()}
    table = markdown(rows, ("evaluations", "core-seconds", "relative distance", *steps.RATES))
    best = {part: steps.cheapest(each) for part, each in settings.items()}
    words = "".join(f"\nThe cheapest within the best one's intervals: {name}." for name in best.values())
    about = (f"{args.n_prompts} prompts (alignment's own: 553) x {args.images} images, seeds: {args.seeds}; "
             f"relative distance: the median of {steps.COMPARED} images, to the result of "
             f"{steps.REFERENCE:,} official steps")
    print(f"\n{folder}, {about}\n{table}{words}")
    write_text(out / "table.md", f"{about}\n\n{table}{words}\n")
    title = "log10 of the relative distance to {:,} steps: {}"
    panels = [(title.format(steps.REFERENCE, part), "log2 of the number of steps", steps.curves(part, ways))
              for part, ways in found.items()]
    panels.append(("The same where it is known: Gaussian data", panels[0][1], steps.exact_curves()))
    write_image(out / "figure.png", np.asarray(draw_charts(panels, size=(720, 420))))
    save_results(args, {"ways": found, "cheapest": best}, f"{folder}/results")


def run_study(args):
    """The paper's figures and what people ask about them, in miniature. Each trains its runs on as many
    images, and goes on where it stopped; numbers are in OUT/STUDY/results.json, the table (table.md: last
    points of all runs, or every value of a setting), figure, images of each run and logs of training beside
    it.

    figure4: CLIP features by regression, CLIP features by flow matching, or VAE latents by flow matching?
    And how much do the images of a prompt differ? figure5: is the language model better frozen or trained
    along? ablation --what: stage 2, or as many more images of stage 1 (both from --ckpt); upsampled captions
    and prompts, or as typed; number of queries, RoPE, shift of time, EMA, size of the DiT; without training,
    guidance of --ckpt, and its samplers, each in several numbers of steps.
    """
    study = STUDIES[getattr(args, "what", args.command)]
    name = f"ablation-{args.what}" if args.command == "ablation" else args.command
    folder = name + "-quick" * args.quick
    out = Path(args.out) / folder
    fill_settings(args, study)
    if "ways" in study:
        return compare_ways(args, folder, out)
    if "runs" in study:
        x, x_label = "step", f"training steps of {args.batch} images"
        rows = runs = train_runs(args, study, folder, out)
    else:
        x, x_label = study["vary"], study["x_label"]
        args.eva = args.ckpt
        runs = vary_setting(args, study)
        rows = by_value(runs, x)
    rng = np.random.default_rng((args.seed, 2))
    true = measure_images(Pipeline(args.eva), args, args.seed,
                          lambda entries: [world.render(scene_for(entry, rng)) for entry in entries])
    # Nothing upsampled the prompts of true images: their spread is another quantity.
    true = {key: number for key, number in true.items() if "spread" not in key}
    columns = (*study["panels"], "colours", "feature spread", "pixel spread", "images/s", "minutes")
    table = markdown({**rows, "true images": [[true]]}, dict.fromkeys(columns))
    print(f"\n{folder}, seeds: {args.seeds}\n{table}")
    write_text(out / "table.md", table)
    figure = draw_charts([chart(runs, true, panel, x, x_label) for panel in study["panels"]])
    write_image(out / "figure.png", np.asarray(figure))
    save_results(args, {"runs": runs, "true images": true}, f"{folder}/results")
