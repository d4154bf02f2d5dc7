"""The study of few steps, `python eval.py ablation --what steps`: which sampler needs how many?

Trains nothing: --ckpt generates by each way to sample, in several numbers of steps. A way changes the DiT's
sampling or the decoder's, and leaves the other's as the checkpoint has it. Three numbers of each: what it
costs, how far its result is from that of REFERENCE steps of the official loop, and alignment.
"""
import math
import time
from contextlib import contextmanager

import torch
from tqdm import tqdm

import clip_decoder
import flow
from clip_decoder import EulerSchedule
from evals.report import BATCH, wilson
from miniature import world
from miniature.judge import score_renders
from miniature.scores import SEEDS
from sample import Pipeline, to_uint8

# Of each part: what a way changes in Pipeline.sampling; the first is the official one.
WAYS = {
    "DiT": {f"{sampler}{words}": {"sampler": sampler, "cfg_interval": interval}
            for sampler, words, interval in (("euler", "", [0.0, 1.0]), ("ab2", "", [0.0, 1.0]),
                                             ("euler", ", guidance 0 to 0.2", [0.0, 0.2]),
                                             ("euler", ", guidance 0.03 to 0.3", [0.03, 0.3]))},
    "decoder": {f"{sampler}, {spacing}": {"decoder_sampler": sampler, "decoder_spacing": spacing}
                for sampler, spacing in (("euler", "leading"), ("euler", "karras"), ("dpm++2m", "leading"),
                                         ("dpm++2m", "trailing"), ("dpm++2m", "karras"))}}
STEPS = {"DiT": (4, 6, 8, 16), "decoder": (3, 5, 10)}       # whose images are judged
CURVE = (4, 8, 16, 32, 64)                                  # of the figure
NAMES = {"DiT": "steps", "decoder": "decoder_steps"}        # of the setting
RATES = ("as typed", "upsampled")
REFERENCE = 1000
COMPARED = 6                                                # images whose distance is measured


@contextmanager
def observed(module, images):
    """Within: a dict with a network's evaluations, and the seconds of one core in them, for each of so many
    images. With guidance an image takes two evaluations a step."""
    spent, start = {"evaluations": 0.0, "core-seconds": 0.0}, []

    def before(*_):
        start.append(time.process_time())

    def after(_, args, output):
        spent["core-seconds"] += (time.process_time() - start.pop()) / images
        spent["evaluations"] += len(args[0]) / images
    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


class Study:
    """The ways of --ckpt to sample, measured on --n-prompts prompts of one seed, --images of each."""

    def __init__(self, args, seed):
        self.pipe = Pipeline(args.ckpt, "cpu")
        if self.pipe.model.dit is None or self.pipe.model.config.latents:
            raise ValueError(f"{args.ckpt} has no DiT that generates CLIP features: it has no samplers to "
                             "compare")
        self.own = self.pipe.sampling
        prompts = world.skill_prompts(args.n_prompts, seed, most=args.objects)
        self.entries = [entry for entry in prompts for _ in range(args.images)]
        self.seeds = [seed * SEEDS + i for i in range(len(self.entries))]
        typed = [entry["prompt"] for entry in self.entries]
        texts = {"as typed": typed, "upsampled": self.pipe.upsample_prompts(typed, self.seeds)}
        self.rows = {name: self.pipe.prompt_rows(each)[0] for name, each in texts.items()}
        self.reference, some = (8, 1) if args.quick else (REFERENCE, None)
        self.judged = {part: steps[:some] for part, steps in STEPS.items()}
        self.drawn = CURVE if some is None else CURVE[:2]
        count = len(self.entries)
        self.compared = [i * count // COMPARED for i in range(COMPARED)]         # of all skills

    def features(self, rows, seeds, **changes):
        """Rows of token ids -> features (N, 64, C), by sampling with these changes of the checkpoint's."""
        self.pipe.sampling = self.own | changes
        return torch.cat([self.pipe.generate(rows[i:i + BATCH], seeds[i:i + BATCH])
                          for i in range(0, len(rows), BATCH)])

    def pixels(self, features, seeds, **changes):
        """Features (N, 64, C) -> pixels (N, 3, H, W)."""
        self.pipe.sampling = self.own | changes
        return torch.cat([self.pipe.decode_features(features[i:i + BATCH], seeds[i:i + BATCH])
                          for i in range(0, len(features), BATCH)])

    def distances(self, part):
        """{(way, steps): the relative distance of a part's results from those of `reference` steps, the
        median of some images, and their cost}: the DiT's features, the decoder's pixels."""
        rows, seeds = ([all_of[i] for i in self.compared] for all_of in (self.rows["upsampled"], self.seeds))
        module, given, make = self.pipe.model.dit, rows, self.features
        if part == "decoder":
            module, given, make = self.pipe.decoder.unet, self.features(rows, seeds), self.pixels
        name = NAMES[part]
        official, *_ = WAYS[part].values()
        exact, found = make(given, seeds, **official, **{name: self.reference}), {}
        for way, changes in tqdm(WAYS[part].items(), desc=f"{part}: distances", disable=None):
            for steps in sorted({*self.judged[part], *self.drawn}):
                with observed(module, len(seeds)) as spent:
                    made = make(given, seeds, **changes, **{name: steps})
                gaps = (made - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
                found[way, steps] = {name: steps, "relative distance": float(gaps.quantile(0.5)), **spent}
        return found

    def scores(self, part):
        """{(way, steps): alignment of the images, as typed and upsampled, and their cost}"""
        found, features, count = {}, {}, len(self.rows) * len(self.entries)
        settings = [(way, steps) for way in WAYS[part] for steps in self.judged[part]]
        for way, steps in tqdm(settings, desc=f"{part}: alignment", disable=None):
            changes = WAYS[part][way] | {NAMES[part]: steps}
            with observed(self.pipe.model.dit, count) as costs_dit:
                if part == "DiT" or not features:                    # the decoder decodes the same ones
                    features = {name: self.features(rows, self.seeds, **changes)
                                for name, rows in self.rows.items()}
            with observed(self.pipe.decoder.unet, count) as costs_decoder:
                pixels = {name: self.pixels(each, self.seeds, **changes) for name, each in features.items()}
            rates = {name: score_renders(self.entries, to_uint8(each))["overall"]["score"]
                     for name, each in pixels.items()}
            found[way, steps] = {"images": len(self.entries), **rates,
                                 **(costs_dit if part == "DiT" else costs_decoder)}
        return found


def measure_ways(args):
    """{part: {way: [[numbers at each number of steps] of each seed]}}; those whose images were judged have
    RATES, and "images", their number."""
    found = {part: {way: [] for way in ways} for part, ways in WAYS.items()}
    for seed in range(args.seed, args.seed + args.seeds):
        study = Study(args, seed)
        for part, ways in WAYS.items():
            distances, scores = study.distances(part), study.scores(part)
            for way in ways:
                found[part][way].append([{**row, **scores.get((way, steps), {})}
                                         for (name, steps), row in distances.items() if name == way])
    return found


def judged(found):
    """What `measure_ways` returned -> {part: {"DiT, ab2, 4 steps": [numbers of each seed]}}, as far as
    images were judged."""
    return {part: {f"{part}, {way}, {rows[0][NAMES[part]]} steps": rows
                   for way, seeds in ways.items() for rows in map(list, zip(*seeds)) if "images" in rows[0]}
            for part, ways in found.items()}


def cheapest(settings):
    """Of {name: [numbers of each seed]} the one of fewest evaluations among those that have each of RATES
    within the 95 % interval of the best; by name."""
    rates, images = {}, sum(row["images"] for row in next(iter(settings.values())))
    for name, rows in settings.items():
        rates[name] = [sum(row[rate] for row in rows) / len(rows) for rate in RATES]
    least = [wilson(max(each) * images, images)[0] for each in zip(*rates.values())]
    good = [name for name in settings if all(rate >= low for rate, low in zip(rates[name], least))]
    return min(good, key=lambda name: settings[name][0]["evaluations"]) if good else None


def logarithms(steps, distances):
    """A point of a curve as draw_charts takes it: log10 of each seed's distance, over log2 of steps."""
    logs = [math.log10(max(distance, 1e-9)) for distance in distances]
    return math.log2(steps), min(logs), sum(logs) / len(logs), max(logs)


def curves(part, ways):
    """The ways of a part -> {way: its curve}: the relative distance by the number of steps."""
    return {way: [logarithms(rows[0][NAMES[part]], [row["relative distance"] for row in rows])
                  for rows in zip(*seeds)] for way, seeds in ways.items()}


def exact_curves(mean=1.5, std=0.4):
    """{sampler: its curve} for Gaussian data, whose flow is known in closed form: twice the steps halve the
    distance at order 1 and quarter it at order 2. The decoder's is that at the last noise level."""
    start, lines = torch.linspace(-3, 3, 60).view(60, 1, 1, 1), {}

    def velocity(x, t):
        t = t.view(-1, 1, 1, 1)
        return mean + (t * std ** 2 - (1 - t)) / (t ** 2 * std ** 2 + (1 - t) ** 2) * (x - t * mean)

    def latents(steps, sampler):
        schedule, seen = EulerSchedule(steps, sampler=sampler, spacing="karras"), []

        def predict(x, t):
            sigma = schedule.sigmas[len(seen)]
            seen.append(x * (sigma ** 2 + 1).sqrt())
            return sigma * (seen[-1] - mean) / (std ** 2 + sigma ** 2)
        schedule.denoise(predict, start)
        variances = std ** 2 + schedule.sigmas ** 2
        return seen[-1], mean + (seen[0] - mean) * (variances[-2] / variances[0]).sqrt()
    for part, samplers in (("DiT", flow.SAMPLERS), ("decoder", clip_decoder.SAMPLERS)):
        for sampler in samplers:
            points = lines[f"{part}: {sampler}"] = []
            for steps in CURVE[1:]:
                made, exact = latents(steps, sampler) if part == "decoder" else (
                    flow.euler_sample(velocity, start, steps, sampler=sampler), mean + std * start)
                points.append(logarithms(steps, [float((made - exact).norm() / exact.norm())]))
    return lines
