"""Every stage of training, one loop.

    python train.py --stage 0 --save runs/nano                          understanding: language and vision
    python train.py --stage decoder --init runs/nano --save runs/nano   64 features -> latents (UNet)
    python train.py --stage 1 --init runs/nano --save runs/nano         64 queries + DiT, on captions
    python train.py --stage 2 --init runs/nano --save runs/nano         the same, on short prompts
    python train.py --stage 1 --design vae-fm                           Figure 3; also clip-mse
    python train.py --stage 1 --joint 0.5                               Figure 5: trains the LLM, too
    python train.py --stage 1 --data 'shards/*.tar' --cache features    your images
    torchrun --nproc_per_node=8 train.py --stage 1 --data 'shards/*.tar' --init QWEN --eva EVA --paper

The paper trains stages 1 and 2 and takes the other parts from Qwen2.5-VL, EVA-CLIP and Emu2. A nano model
has to train them: stages clip and vae, and stage 0 from random weights, are in miniature/pretrain.py.
Without --data the images are the miniature's synthetic world. The same line resumes a run that was stopped
by anything, with any number of processes.

    stage        0                                    1, 2                     decoder
    is trained   Qwen2.5-VL's LLM and vision tower    latent queries and DiT   SDXL's UNet

B batch, L tokens, S side of a square image, C channels of a feature, h w its grid, n features of an image.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import flow
from checkpoint import Parser, atomic_write, folder_parts, publish, read_json, run_command, write_json
from clip_decoder import PRESETS as DECODER_PRESETS
from clip_decoder import VAE, EulerSchedule, EvaClip, PixelDecoder, UNet
from model import PRESETS, BLIP3o, DiTConfig, preset

NANO = Path(__file__).parent / "weights" / "nano"                    # what a clone ships

# Steps and guidance that suit what is trained at nano size; saved with the weights, sample.py takes them
# from there.
NANO_SAMPLING = {"steps": 30, "cfg": 2.0, "decoder_steps": 10, "decoder_cfg": 1.0}

# The recipe of each stage at nano size (two CPU cores). The learning rate rises to `lr` in `warmup` steps
# and falls along a cosine to `final_lr` of it. steps, batch, lr, ema and optimizer are flags, too.
SHARED = dict(ema=0.999, beta2=0.95, weight_decay=0.0, clip=1.0, max_nonfinite=10)
RECIPES = {
    "clip":    dict(steps=3000, batch=64, lr=2e-3, final_lr=0.01, warmup=100, optimizer="adamw"),
    "vae":     dict(steps=3000, batch=16, lr=2e-3, final_lr=0.01, warmup=100, optimizer="adamw"),
    "0":       dict(steps=9000, batch=16, lr=2e-3, final_lr=0.01, warmup=100, optimizer="muon"),
    "decoder": dict(steps=3500, batch=16, lr=2e-3, final_lr=0.01, warmup=100, optimizer="adamw"),
    "1":       dict(steps=3200, batch=128, lr=2e-3, final_lr=0.025, warmup=100, optimizer="muon"),
    "2":       dict(steps=800, batch=128, lr=1.2e-3, final_lr=0.0, warmup=50, optimizer="muon"),
}
# The paper's: stage 1 from 1e-4 to 1e-5 in 150k steps of 512, stage 2 from 1e-4 to 0 in 10k.
PAPER = {
    "1": dict(steps=150_000, batch=512, lr=1e-4, final_lr=0.1, warmup=450, optimizer="adamw", ema=0.9999),
    "2": dict(steps=10_000, batch=512, lr=1e-4, final_lr=0.0, warmup=30, optimizer="adamw", ema=0.9999),
}
FEATURE_NOISE = 0.2          # decoder: largest standard deviation of the noise on its features
MAX_LOSS_WEIGHT = 300.0      # decoder: cap of the loss weight 1 + sigma^2 (1: as Emu2)
NULL_DECODER = 0.1           # decoder: probability of the negative features instead of the image's
HELD_OUT = 64                # held-out samples of a probe
PREVIEWS = 16                # and of a preview of stages 1 and 2


# ---- examples -> tensors, pickled to DataLoader's workers: no weights in here ---------------------------

def collate_images(examples):
    """The targets of Examples: "pixels" (B, 3, S, S) or cached "features" {name: (B, ...)}; and "skipped".

    Only the first skipped item belongs to this position; the others are counted at their own.
    """
    batch = {"skipped": [broken for e in examples for broken in e.skipped[:1]]}
    if examples[0].features is not None:
        names = examples[0].features.keys()
        batch["features"] = {name: torch.stack([e.features[name] for e in examples]) for name in names}
    elif examples[0].image is not None:
        batch["pixels"] = data.to_pixels(np.stack([e.image for e in examples]))
    return batch


def unit_normal(examples, *shape):
    """Noise (B, *shape) from each example's own rng, whatever the number of processes."""
    return torch.from_numpy(np.stack([e.rng.standard_normal(shape, dtype=np.float32) for e in examples]))


class ConversationCollate:
    """Examples with turns -> ids, mask, labels (B, L), and their images as Qwen's ViT takes them."""

    def __init__(self, tokenizer, vision, size):
        self.tokenizer, self.vision, self.tokens_per_image = tokenizer, vision, 0
        if vision is not None:
            self.tokens_per_image = (size // vision.patch_size // vision.spatial_merge_size) ** 2

    def __call__(self, examples):
        shown = [e.turns_image is not None for e in examples]
        rows = [data.chat_ids(self.tokenizer, e.turns, [[self.tokens_per_image]] if show else [])
                for e, show in zip(examples, shown)]
        ids, mask = data.pad([ids for ids, _ in rows], self.tokenizer.special["<|endoftext|>"])
        targets, _ = data.pad([targets for _, targets in rows], False)
        return {**collate_images(examples), "ids": ids, "mask": mask, "labels": ids.where(targets, -100),
                **self.vision_inputs([e.turns_image for e in examples])}

    def prompts(self, examples):
        """The prompts to generate: ids, mask (B, L), and the images in them."""
        counts = [0 if e.prompt_image is None else self.tokens_per_image for e in examples]
        rows = [data.prompt_ids(self.tokenizer, e.prompt, count) for e, count in zip(examples, counts)]
        ids, mask = data.pad(rows)
        return {"ids": ids, "mask": mask, **self.vision_inputs([e.prompt_image for e in examples])}

    def vision_inputs(self, images):
        """Images uint8 (S, S, 3) or None -> "patches" (N, P) and "grid" (images, 3) of those that are
        there, or None."""
        images = [image for image in images if image is not None]
        if not images:
            return {"patches": None, "grid": None}
        pixels = data.to_pixels(np.stack(images))
        patches, grid = data.to_patches(pixels, self.vision.patch_size, self.vision.spatial_merge_size)
        return {"patches": patches, "grid": grid}


class GenerationCollate(ConversationCollate):
    """Examples to generate, and conversations among them -> prompts, targets, and noise, time and dropping
    of each.

    shape (C, h, w) of what the DiT generates; draws: how many noises and times each sample gets; drop: the
    probability of the null condition; shift: of the times toward noise.
    """

    def __init__(self, tokenizer, vision, size, shape, draws, drop, shift):
        super().__init__(tokenizer, vision, size)
        self.shape, self.draws, self.drop, self.shift = shape, draws, drop, shift

    def __call__(self, examples):
        conversations = [e for e in examples if e.turns]
        generations = [e for e in examples if not e.turns]
        batch = {}
        if generations:
            batch = {**collate_images(generations), "prompts": self.prompts(generations)}
            batch |= self.noise(generations) | self.hard_negatives(generations)
        if conversations:
            batch["conversations"] = super().__call__(conversations)
            del batch["conversations"]["skipped"]
        return {**batch, "skipped": [broken for e in examples for broken in e.skipped[:1]]}

    def noise(self, examples):
        """x0 (B draws, C, h, w), times t (B draws,) and which conditions are dropped (B draws,)."""
        t = torch.tensor([e.rng.random() for e in examples for _ in range(self.draws)], dtype=torch.float32)
        x0 = unit_normal(examples, self.draws, *self.shape).flatten(0, 1)
        dropped = torch.tensor([e.rng.random() < self.drop for e in examples for _ in range(self.draws)])
        return {"x0": x0, "t": flow.shift_time(t, self.shift), "dropped": dropped}

    def hard_negatives(self, examples):
        """The hard negatives of those examples that have one: their rows in the batch, and their prompts."""
        rows = [i for i, e in enumerate(examples) if e.hard_negative is not None]
        if not rows:
            return {}
        prompts = [replace(examples[i], prompt=examples[i].hard_negative) for i in rows]
        return {"hard_negatives": {"rows": rows, **self.prompts(prompts)}}


class DecoderCollate:
    """Examples -> pixels or features, and noise, time, feature noise and dropping of each.

    latents (C, h, w) and features (n, C): their shapes; times: the number of noise levels.
    """

    def __init__(self, latents, features, times):
        self.latents, self.features, self.times = latents, features, times

    def __call__(self, examples):
        level = torch.tensor([FEATURE_NOISE * e.rng.random() for e in examples], dtype=torch.float32)
        noise = unit_normal(examples, *self.latents)
        t = torch.tensor([int(e.rng.integers(self.times)) for e in examples])
        feature_noise = level.view(-1, 1, 1) * unit_normal(examples, *self.features)
        dropped = torch.tensor([e.rng.random() < NULL_DECODER for e in examples])
        return {**collate_images(examples), "noise": noise, "t": t, "feature_noise": feature_noise,
                "dropped": dropped}


# ---- stages: what is trained, what its losses are, what is saved ----------------------------------------

class Stage(nn.Module):
    """One stage: `trained` (a module whose parameters with requires_grad are trained), collate, forward,
    export.

    forward(batch) returns {name: scalar}; the sum of those whose names don't begin with _ is minimised.
    """
    size = 64                       # side S of the images that this stage reads
    long_captions = None            # of the world. True: long captions, False: short ones, None: a mixture
    converse = 0.0                  # fraction of the samples that are conversations

    def __init__(self):
        super().__init__()
        # For torch.compile: the part whose shapes never change. (A class attribute would hide the module.)
        self.compile_target = None

    def encode(self, pixels):
        """Frozen encoders' outputs {name: (B, ...)} for pixels (B, 3, S, S); --cache keeps them."""
        raise ValueError("--cache keeps what frozen encoders make of images: this stage has none")

    @torch.no_grad()
    def targets(self, batch):
        """`encode` of a batch, or what the cache has of it."""
        return batch["features"] if "features" in batch else self.encode(batch["pixels"])

    def export(self, folder):
        """Write the trained parts into the model folder `folder`; what else lies there stays."""
        raise NotImplementedError

    def preview(self, batch):
        """A list of rows of images (B, 3, H, W) in [0, 1] to look at, or None."""

    def probe(self, batch):
        """Further numbers for the log, measured on a held-out batch without gradient."""
        return {}


class UnderstandingStage(Stage):
    """Stage 0: Qwen2.5-VL learns from conversations about images; captions are descriptions to write."""
    converse = 1.0

    def __init__(self, args):
        super().__init__()
        self.tokenizer, parts = tokenizer_of(args.init), folder_parts(args.init)
        if "visual" in parts and not args.fresh:
            self.trained = BLIP3o.from_pretrained(args.init, parts={"llm", "visual", "queries"} & parts)
        else:
            self.trained = BLIP3o(nano_config(self.tokenizer, dit=None))
        if self.trained.latent_queries is not None:
            self.trained.latent_queries.requires_grad_(False)        # unused in this stage
        vision = self.trained.config.vision
        self.size = 448 if vision.patch_size == 14 else DECODER_PRESETS["nano"]["clip"].image_size
        self.collate = ConversationCollate(self.tokenizer, vision, self.size)

    def forward(self, batch):
        return {"text": text_loss(self.trained, batch)}

    def export(self, folder):
        self.tokenizer.save(folder)
        self.trained.save_pretrained(folder, torch.float16)
        config, area = self.trained.config, self.size ** 2
        write_json(folder / "generation_config.json", {
            "do_sample": False, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id})
        if not (folder / "preprocessor_config.json").exists():  # images of any size are read as in training
            write_json(folder / "preprocessor_config.json", {"min_pixels": area, "max_pixels": area})


class GenerationStage(Stage):
    """Stages 1 and 2: the language model is frozen; queries and DiT learn to generate image features.

    --design: what is generated and how (section 3.3, Figure 3). clip-fm: CLIP features by flow matching;
    clip-mse: each query's state is mapped to one CLIP feature, trained by regression; vae-fm: the VAE's
    latents by flow matching. --joint: that fraction of the samples are conversations instead, and the
    language model is trained with the rest (section 3.4, Figure 5).

    Noise, time and dropping belong to the sample, so any number of processes computes the same losses. The
    probe compares the loss near t = 0 under the true, a shuffled and the null condition: while they are
    equal, the DiT ignores its prompt.
    """
    bins = 5                        # the loss is logged by time, too: equal parts of [0, 1]

    def __init__(self, args):
        super().__init__()
        self.tokenizer, self.converse = tokenizer_of(args.init), args.joint
        self.long_captions = False if args.stage == "2" else None
        self.eva = frozen(EvaClip.from_pretrained(args.eva, dtype=args.frozen_dtype))
        self.size, self.decoder = self.eva.config.image_size, None
        if "unet" in folder_parts(args.eva):
            self.decoder = frozen(PixelDecoder.from_pretrained(args.eva, dtype=args.frozen_dtype))
        self.trained, keeps_queries = self.load(args)
        config = self.trained.config
        self.design = design_of(config)
        if self.design == "vae-fm" and self.decoder is None:
            raise ValueError(f"design vae-fm generates a VAE's latents: {args.eva} has no diffusion-decoder "
                             "(--eva names one)")
        trained = ("dit.", "regressor.", "latent_queries")
        if keeps_queries and config.queries_supervised:  # they encode what stage 0 taught, for any DiT
            trained = ("dit.", "regressor.")
        for name, p in self.trained.named_parameters():
            p.requires_grad_(bool(args.joint) or name.startswith(trained))
            p.data = p.data.float() if p.requires_grad else p.data
        for part in self.trained.dit, self.trained.llm:
            if part is not None:
                part.checkpointing = args.checkpointing
        self.compile_target = self.trained.dit
        shape = config.gen_hidden_size, config.grid, config.grid
        self.collate = GenerationCollate(self.tokenizer, config.vision, self.size, shape, args.draws,
                                         args.drop, config.shift)

    def load(self, args):
        """Return (model with its generator, fresh or continued; whether its queries are those of --init)."""
        stored, parts = BLIP3o.from_pretrained(args.init, "meta").config, folder_parts(args.init)
        continues = not args.fresh and stored.generates and args.design in (None, design_of(stored))
        if continues and (args.dit or args.queries):
            raise ValueError("--dit and --queries are for a fresh generator, but that of "
                             f"{args.init} is trained further: add --fresh")
        wanted = {"llm"} | ({"visual"} if args.joint or args.prompt_images else set())
        if continues or not (args.queries or args.paper):
            wanted |= {"queries"} & parts
        if continues:
            wanted.add("regressor" if stored.mse_channels else "dit")
        dtype = torch.float32 if args.joint else args.frozen_dtype
        model = BLIP3o.from_pretrained(args.init, dtype=dtype, parts=wanted)
        if continues:
            return model, True
        config = self.fresh_config(stored, args)
        keeps_queries = model.latent_queries is not None and model.latent_queries.shape[1] == config.n_query
        model.resize_vocabulary(config.text.vocab_size)
        if not keeps_queries:
            model.add_queries(config.n_query, config.query_std)
        model.add_generator(replace(config, queries_supervised=keeps_queries and stored.queries_supervised))
        return model, keeps_queries

    def fresh_config(self, stored, args):
        """The BLIP3oConfig of a fresh generator for the language model of `stored`: the nano DiT makes
        narrow features, the released one wide ones; --dit changes single fields."""
        nano, is_wide = PRESETS["nano"], is_official(self.eva)
        n_query = args.queries or (64 if args.paper else None) or stored.n_query
        n_query = n_query or (64 if is_wide else nano["n_query"])
        grid = math.isqrt(self.eva.config.n_query)
        dit = {} if is_wide else {**nano["dit"]}
        dit |= dict(in_channels=self.eva.config.width, cond_dim=stored.text.hidden_size)
        if args.design == "vae-fm" and self.decoder is not None:
            vae = self.decoder.vae
            grid = self.size // vae.factor
            dit |= dict(in_channels=vae.config.latent_channels, patch_size=2)
        text = replace(stored.text, vocab_size=self.tokenizer.vocab_size)    # Qwen's embeddings are padded
        query_std = 1.0 if is_wide else nano["query_std"]
        base = replace(stored, text=text, grid=grid, shift=args.shift, query_std=query_std, dit=None,
                       mse_channels=None, latents=args.design == "vae-fm")
        if args.design == "clip-mse":
            return replace(base, n_query=grid ** 2, mse_channels=self.eva.config.width)
        return replace(base, n_query=n_query, dit=DiTConfig(**dit | dit_fields(args.dit)))

    def encode(self, pixels):
        """pixels (B, 3, S, S) -> the design's target: CLIP features (B, n, C) or VAE latents (B, h w, C)."""
        if self.design == "vae-fm":
            return {"latents": self.decoder.vae.encode(data.to_signed(pixels)).flatten(2).transpose(1, 2)}
        return {"features": self.eva.encode(pixels)}

    def forward(self, batch):
        # Every process takes part in every all-reduce, also one without samples of a kind.
        empty = torch.zeros(0, device=self.trained.latent_queries.device)
        name = "mse" if self.trained.dit is None else "flow"
        each, losses = empty, {}
        if "prompts" in batch:
            p, (target,) = batch["prompts"], self.targets(batch).values()
            each = self.trained(p["ids"], p["mask"], features=target, pixels=p["patches"],
                                grid_thw=p["grid"], dropped=batch["dropped"], x0=batch["x0"],
                                t=batch["t"])[name]                  # (B draws,)
        losses[name] = mean_over_ranks(each)
        if name == "flow" and "prompts" in batch:
            losses["_by_t"] = self.by_time(each.detach(), batch["t"])
        if "conversations" in batch:
            losses["text"] = text_loss(self.trained, batch["conversations"])
        elif self.converse:
            losses["text"] = mean_over_ranks(empty)
        return losses

    def by_time(self, each, t):
        """Losses and times (B,) -> sums and numbers of losses in bins of time, (2, bins)."""
        bin_of = (t * self.bins).long().clamp(max=self.bins - 1)
        sums = torch.zeros(2, self.bins, device=each.device)
        return sums.index_add_(1, bin_of, torch.stack([each, torch.ones_like(t)]))

    def export(self, folder):
        self.tokenizer.save(folder)
        self.trained.save_pretrained(folder, torch.float16)
        config = read_json(folder / "config.json")
        if not is_official(self.eva):  # official sizes are sampled with the official numbers
            config["nano_blip3o"].setdefault("sampling", NANO_SAMPLING)
            write_json(folder / "config.json", config)

    def probe(self, batch):
        (target,), cond = self.encode(batch["pixels"]).values(), self.condition(batch["prompts"])
        generated, mean = self.generate(cond), target.mean((0, 1))
        a, b = (F.normalize(features.mean(1) - mean, dim=1) for features in (generated, target))    # (B, C)
        nearest = (a @ b.T).argmax(1)
        numbers = {"_cosine": (a * b).sum(1).mean(),
                   "_retrieval": (nearest == torch.arange(len(a), device=a.device)).float().mean()}
        if self.trained.dit is None:
            return numbers
        x1 = target.transpose(1, 2).unflatten(2, (self.trained.config.grid,) * 2)  # (B, C, h, w)
        x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(0)).to(x1)

        def loss(t, cond, rows=slice(None)):
            times = torch.full((len(x1[rows]),), t, device=x1.device)
            each = flow.flow_matching_loss(self.trained.dit, x1[rows], cond, drop=0, x0=x0[rows], t=times)
            return each.mean()
        for t in (0.02, 0.05, 0.3):
            numbers |= {f"_true@{t}": loss(t, cond), f"_shuffled@{t}": loss(t, cond.roll(1, 0)),
                        f"_null@{t}": loss(t, torch.zeros_like(cond))}
        # Does the DiT bind attributes to objects? A hard negative, the same words exchanged, must fit worse.
        if negatives := batch.get("hard_negatives"):
            rows = negatives["rows"]
            numbers |= {"_positive@0.15": loss(0.15, cond[rows], rows),
                        "_hard_negative@0.15": loss(0.15, self.condition(negatives), rows)}
        return numbers

    def condition(self, prompts):
        """Collated prompts -> the condition (B, n_query, D)."""
        return self.trained.condition(prompts["ids"], prompts["mask"], prompts["patches"], prompts["grid"])

    def generate(self, cond):
        """The features (B, n, C) that are generated for a condition, always from the same noise."""
        return self.trained.generate_features(cond, 10, 2.0, generator=torch.Generator().manual_seed(0))

    def preview(self, batch):
        if self.decoder is None:
            return None
        features = self.generate(self.condition(batch["prompts"])[:PREVIEWS])
        if self.design == "vae-fm":
            z = features.transpose(1, 2).unflatten(2, (self.trained.config.grid,) * 2)
            images = (self.decoder.vae.decode(z) / 2 + 0.5).clamp(0, 1)
        else:
            images = decode_preview(self.decoder, features, self.size)
        return [images, to_unit_range(batch["pixels"][:PREVIEWS])]


class DecoderStage(Stage):
    """The pixel decoder as Emu2 trains it: SDXL's UNet learns to generate the image from frozen EVA-CLIP
    features.

    The features get a little noise of random strength, because at sampling time they come from the imperfect
    DiT (the noise-augmented decoder of RAE, arXiv 2510.11690, section 4).
    """

    def __init__(self, args):
        super().__init__()
        self.eva = frozen(EvaClip.from_pretrained(args.init, dtype=args.frozen_dtype))
        vae, eva = frozen(VAE.from_pretrained(args.init)), self.eva.config
        self.size, has_unet = eva.image_size, "unet" in folder_parts(args.init) and not args.fresh
        preset_name = "official" if is_official(self.eva) else "nano"
        unet = UNet.from_pretrained(args.init) if has_unet else UNet(DECODER_PRESETS[preset_name]["unet"])
        self.compile_target = self.trained = unet.to(memory_format=torch.channels_last)
        self.decoder = PixelDecoder(unet, vae, EulerSchedule())
        with torch.no_grad():  # guidance leads away from an image of the mean colour
            negative = self.eva.encode(torch.zeros(1, 3, self.size, self.size, dtype=args.frozen_dtype))
        self.register_buffer("negative", negative)                   # (1, n, C)
        latents = unet.config.in_channels, self.size // vae.factor, self.size // vae.factor
        times = len(self.decoder.schedule.alpha_bar)
        self.collate = DecoderCollate(latents, (eva.n_query, eva.width), times)

    def encode(self, pixels):
        """{"features": (B, 64, C), "latents": (B, 4, h, w)} of pixels (B, 3, S, S)."""
        latents = self.decoder.vae.encode(data.to_signed(pixels))
        return {"features": self.eva.encode(pixels), "latents": latents}

    def forward(self, batch):
        targets = self.targets(batch)
        features = targets["features"] + batch["feature_noise"].to(targets["features"])
        return {"epsilon": self.decoder.loss(targets["latents"], features, batch["dropped"],
                                             negative=self.negative.to(features), max_weight=MAX_LOSS_WEIGHT,
                                             t=batch["t"], noise=batch["noise"])}

    def export(self, folder):
        self.decoder.save_pretrained(folder, torch.float16)

    def probe(self, batch):
        """PSNR of decoded images; and, much earlier to move, the error of the clean latents that the UNet
        predicts under strong noise, given the image's own features and another's."""
        targets = self.encode(batch["pixels"])
        z, features, schedule = targets["latents"], targets["features"], self.decoder.schedule
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
        numbers = {"_psnr": psnr(*self.preview(batch))}
        for t in (600, 800, 950):
            times, a = torch.full((len(z),), t, device=z.device), float(schedule.alpha_bar[t])
            for name, cond in ("true", features), ("shuffled", features.roll(1, 0)):
                added = self.decoder.added_conditions(cond, (self.size,) * 2, (self.size,) * 2, (0, 0))
                eps = self.trained(schedule.add_noise(z, noise, times), times, cond, *added)
                numbers[f"_{name}@{t}"] = F.mse_loss(eps, noise) * (1 - a) / a
        return numbers

    def preview(self, batch):
        features = self.eva.encode(batch["pixels"][:32])
        return [decode_preview(self.decoder, features, self.size), to_unit_range(batch["pixels"][:32])]


STAGES = ("clip", "vae", "0", "decoder", "1", "2")  # in order of dependency


def build_stage(args):
    """The Stage that --stage names."""
    if args.stage in ("clip", "vae") or args.stage == "0" and args.data is None:
        from miniature import pretrain
        stages = {"clip": pretrain.ClipStage, "vae": pretrain.VaeStage,
                  "0": pretrain.SupervisedUnderstandingStage}
        return stages[args.stage](args)
    return {"0": UnderstandingStage, "decoder": DecoderStage}.get(args.stage, GenerationStage)(args)


def text_loss(model, batch):
    """Cross-entropy of what the assistant says in a batch of conversations, a scalar."""
    losses = model(batch["ids"], batch["mask"], labels=batch["labels"], pixels=batch["patches"],
                   grid_thw=batch["grid"])
    return mean_over_ranks(losses["text"])


def mean_over_ranks(each):
    """Losses (n,) -> a scalar whose average over the processes is the mean of all their losses."""
    count = torch.full((), float(len(each)), device=each.device)
    if dist.is_initialized():
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return each.sum() / count.clamp(min=1e-6)


def design_of(config):
    """The name of a BLIP3oConfig's design, as --design takes it; None if it generates nothing."""
    if config.mse_channels:
        return "clip-mse"
    return None if config.dit is None else "vae-fm" if config.latents else "clip-fm"


def dit_fields(spec):
    """--dit "dim=192,rope=2d" -> {"dim": 192, "rope": "2d"}; ValueError for what is no field of
    DiTConfig."""
    kinds, values = {f.name: f.type for f in fields(DiTConfig)}, {}
    for part in filter(None, (spec or "").split(",")):
        name, _, value = part.partition("=")
        try:
            kind = kinds[name] if kinds[name] in (str, float) else int
            values[name] = kind(value)
        except (KeyError, ValueError):
            names = ", ".join(kinds)
            raise ValueError(f"--dit takes {names}, as in dim=192,n_layers=8; not {part!r}") from None
    return values


def decode_preview(decoder, features, size):
    """Features (B, n, C) -> images (B, 3, size, size) in [0, 1], in 10 steps from always the same noise."""
    side, generator = size // decoder.vae.factor, torch.Generator().manual_seed(0)
    noise = torch.randn(len(features), decoder.unet.config.in_channels, side, side, generator=generator)
    return decoder.decode(features, None, 10, 1.0, noise, (size, size))


def is_official(eva):
    """Is this the released EVA-CLIP's width? Else sizes and settings are the nano model's."""
    return eva.config.width >= 1024


def nano_config(tokenizer, **changes):
    """The nano preset with the vocabulary and the control tokens of a tokenizer."""
    t = tokenizer.special
    return preset("nano", tokenizer.vocab_size, **changes, image_token_id=t["<|image_pad|>"],
                  eos_token_id=t["<|im_end|>"], vision_start_token_id=t["<|vision_start|>"],
                  pad_token_id=t["<|endoftext|>"])


def tokenizer_of(folder):
    """The tokenizer of a model folder; without one, the miniature's."""
    if folder and (Path(folder) / "tokenizer.json").is_file():
        return data.Tokenizer.from_pretrained(folder)
    from miniature.pretrain import world_tokenizer
    return world_tokenizer()


def frozen(module):
    """A module in evaluation mode without gradients."""
    return module.eval().requires_grad_(False)


def to_unit_range(pixels):
    """Normalised pixels -> [0, 1]."""
    return (data.to_signed(pixels) / 2 + 0.5).clamp(0, 1)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    return -10 * (a - b).square().mean().log10()


# ---- optimizer, averaged weights, schedule --------------------------------------------------------------

class Muon(torch.optim.AdamW):
    """AdamW, but linear layers step along their orthogonalised momentum (Muon, Jordan et al. 2024).

    Scaled by sqrt(larger side), the root mean square of a step doesn't depend on the matrix's shape, so both
    kinds share one learning rate (Liu et al. 2025, arXiv 2502.16982, section
    2.2; their factor is 0.2, to resemble AdamW's steps; this small DiT learnt faster with 0.6). Groups with
    "matrices": True hold (m, n) parameters.

    found_inf, a scalar on the device, is 1 if a gradient isn't finite: then the step changes nothing. The
    fused AdamW reads it, too; the host never waits for it.
    """
    factor, found_inf = 0.6, None

    @torch.no_grad()
    def step(self):
        """One step; sets the matrices' gradients to None, so that AdamW skips them."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"] if group.get("matrices") else ():
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():  # equal shapes go through the products together
                self.step_matrices(params, group)
        super().step()

    def step_matrices(self, params, group):
        """The step of k matrices of one shape (m, n)."""
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        grads, lr, keep = [p.grad for p in params], group["lr"], 1.0
        if self.found_inf is not None:
            keep = 1 - self.found_inf
            grads = [torch.where(keep > 0, grad, momentum) for grad, momentum in zip(grads, momenta)]
        torch._foreach_lerp_(momenta, grads, 0.05)
        nesterov = [grad.lerp(momentum, 0.95) for grad, momentum in zip(grads, momenta)]
        scale = lr * self.factor * math.sqrt(max(params[0].shape))
        for p, direction in zip(params, orthogonalise(torch.stack(nesterov))):    # (k, m, n)
            p.mul_(1 - lr * group["weight_decay"] * keep).sub_(direction * (scale * keep))
            p.grad = None                                            # AdamW passes over it


def orthogonalise(x, steps=5):
    """(k, m, n) -> roughly the nearest semi-orthogonal matrices, by Newton-Schulz steps."""
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):    # an odd quintic of the singular values; Jordan's coefficients
        gram = x @ x.mT  # (k, m, m), m the shorter side: the cheaper product
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if is_tall else x


def make_optimizer(stage, args):
    """AdamW, or Muon for linear layers and AdamW for the rest; --zero divides the moments (ZeRO-1)."""
    named = {name: p for name, p in stage.trained.named_parameters() if p.requires_grad}
    hidden = set()
    if args.optimizer == "muon":  # the LM head stays with AdamW, as published
        hidden = {m.weight for name, m in stage.trained.named_modules()
                  if isinstance(m, nn.Linear) and name != "llm.lm_head"}
    groups = [{"params": [p for p in named.values() if p not in hidden]},
              {"params": [p for p in named.values() if p in hidden], "matrices": True}]
    groups = [group for group in groups if group["params"]]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, named.values()))
    options = dict(lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay, fused=True)
    if args.zero and world_size() > 1:
        return ZeroRedundancyOptimizer(groups, optimizer_class=Muon, **options)
    return Muon(groups, **options)


def local_optimizer(optimizer):
    """The optimizer that holds this process's moments: ZeroRedundancyOptimizer wraps it."""
    return getattr(optimizer, "optim", optimizer)


class EMA:
    """Exponential moving average of the trained parameters, kept in fp32; its decay warms up as (1 + n) /
    (10 + n)."""

    def __init__(self, module, decay):
        self.decay, self.updates = decay, 0
        self.params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().float().clone() for n, p in self.params.items()}

    @torch.no_grad()
    def update(self):
        """One step towards the present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        present = [p.detach().float() for p in self.params.values()]
        torch._foreach_lerp_(list(self.average.values()), present, 1 - decay)

    def swap(self):
        """Exchange the weights in use and the averaged ones: call it before and after using the average."""
        for n, p in self.params.items():
            self.average[n], p.data = p.data.float(), self.average[n].to(p.dtype)


def learning_rate(step, args):
    """Linear warmup from 0, then a cosine from `lr` to `final_lr` of it at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    last = args.lr * args.final_lr
    return last + (args.lr - last) * (1 + math.cos(math.pi * min(1, progress))) / 2


# ---- batches --------------------------------------------------------------------------------------------

def open_samples(args, stage, device):
    """(training samples, held-out samples) of a stage."""
    if args.data is None:
        from miniature.tasks import open_world
        return open_world(args, stage)
    task = data.CaptionTask(stage.converse, args.reconstruct, args.short_caption)
    probe = replace(task, converse=float(stage.converse == 1), reconstruct=0.0)
    source, unseen = (data.open_source(args.data, stage.size) for _ in range(2))
    if args.cache:
        source.cache = feature_cache(args, stage, source, device)
    return data.Samples(source, task, args.seed), data.Samples(unseen, probe, args.seed, held_out=True)


def feature_cache(args, stage, source, device):
    """The filled FeatureCache of a source; ValueError where the stage needs the images themselves."""
    if args.joint or args.prompt_images:
        raise ValueError("--cache keeps features, not images: it doesn't go with --joint and --reconstruct, "
                         "which show the images to the language model")
    design = getattr(stage, "design", None)
    digest = hashlib.sha256(f"{source.fingerprint()} {stage.size} square bicubic {design}".encode())
    trained = set(stage.trained.parameters())
    for name, p in stage.named_parameters():  # a sample of every tensor of the frozen encoders
        if p not in trained:
            sample = p.detach().flatten()[::max(1, p.numel() // 1024)].float().cpu()
            digest.update(name.encode() + sample.numpy().tobytes())
    cache = data.FeatureCache(args.cache, digest.hexdigest()[:16])

    @torch.no_grad()
    def encode(pixels):
        with autocast(args, device):
            return stage.encode(pixels.to(device))
    cache.fill(source, encode, args.batch, args.workers, rank(), world_size(), args.quiet)
    barrier()
    # On a disk of its own, a machine lacks what the others have written.
    local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cache.fill(source, encode, args.batch, args.workers, *local, args.quiet)
    barrier()
    return cache


def held_out_batch(stage, samples, device):
    """The batch that probes and previews see, or None where the data is too small to hold anything out."""
    available = HELD_OUT if samples.held_out is False else min(HELD_OUT, len(samples.source.held_out))
    if not available:
        return None
    return to_device(stage.collate([samples[i] for i in range(available)]), device)


def batches(samples, stage, start, args, device):
    """Micro-batches of this process from step `start` on: step s uses the positions s * batch ... (s + 1)
    * batch - 1."""
    ranks, micro = world_size(), args.batch // args.accumulate  # samples of a micro-batch, of all processes
    plan = [range(first + rank(), first + micro, ranks)
            for first in range(start * args.batch, args.steps * args.batch, micro)]
    return torch.utils.data.DataLoader(samples, batch_sampler=plan, collate_fn=stage.collate,
                                       num_workers=args.workers, pin_memory=device.type == "cuda")


ON_HOST = ("ids", "mask", "labels", "grid")     # decide about shapes, which the host must know: see BLIP3o


def to_device(batch, device):
    """A batch, a tree of dicts, on a device, except for the tensors that decide about shapes."""
    if isinstance(batch, dict):
        return {key: value if key in ON_HOST else to_device(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=True) if torch.is_tensor(batch) else batch


# ---- processes ------------------------------------------------------------------------------------------

def init_distributed(device):
    """init_process_group that survives `torchrun --max_restarts`; CPU tensors go through gloo.

    torchrun reuses one store across restarts, so stale addresses could be read. Rank 0 picks a fresh key
    prefix for each start and hands it to each other rank.
    """
    store, number, count = next(dist.rendezvous("env://"))
    mine = os.urandom(8).hex()
    if number == 0:
        store.set("start", mine)
        for other in range(1, count):
            store.set(store.get(f"{mine}/{other}").decode(), mine)
    else:
        while not store.check([mine]):  # what "start" says may be an earlier start's, and change
            store.set(store.get("start").decode() + f"/{number}", mine)
            time.sleep(0.1)
    start = mine if number == 0 else store.get(mine).decode()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(start, store), rank=number, world_size=count)


def rank():
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value):
    """[value of process 0, value of process 1, ...]"""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(flag):
    """Is a flag set on any of the processes?"""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


class StopRequest:
    """Ctrl-C or SIGTERM of any process stops all of them after the same step.

    The flag is all-reduced between the hosts asynchronously and read one step later: nothing waits for it.
    """

    def __init__(self):
        self.requested, self.flag, self.exchange = False, None, None
        self.before = {sig: signal.signal(sig, self.request) for sig in (signal.SIGINT, signal.SIGTERM)}

    def request(self, *_):
        """The signal handler; a second signal ends the process at once."""
        self.requested = True
        for sig, handler in self.before.items():
            signal.signal(sig, handler)

    def agreed(self):
        """Do all processes stop now? Every process calls it once a step."""
        if not dist.is_initialized():
            return self.requested
        stop = self.wait()
        self.flag = torch.tensor(float(self.requested))
        self.exchange = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
        return stop

    def wait(self):
        """What the last exchange said."""
        if self.exchange is None:
            return False
        self.exchange.wait()
        return bool(self.flag)


# ---- a run's state on disk ------------------------------------------------------------------------------

def optimizer_state(optimizer, names):
    """{"parameter.moment": tensor} of what this process holds: all, or with --zero its part. names:
    parameter -> name."""
    return {f"{names[p]}.{key}": value.reshape(1) if value.ndim == 0 else value.contiguous()
            for p, moments in local_optimizer(optimizer).state.items() for key, value in moments.items()}


def save_state(out, step, ema, optimizer, args, counts):
    """Write out/step-NNNNNN atomically, point `latest` at it, keep the last two.

    model.safetensors (what is trained), ema.safetensors, optimizer.safetensors (with --zero
    optimizer-RANK.safetensors, from each process its part), state.json (step, counts and flags; the order of
    samples and all noise are functions of seed and step, so the step is all there is to know). Every process
    calls it. Raises OSError on all of them if one can't write.
    """
    name, temporary = f"step-{step:06d}", out / ".step.tmp"  # a crash's leftovers are overwritten
    names = {p: n for n, p in ema.params.items()}

    def begin():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for file, tensors in ("model", ema.params), ("ema", ema.average):
            tensors = {n: tensor.detach().contiguous() for n, tensor in tensors.items()}
            save_file(tensors, temporary / f"{file}.safetensors")
        state = {"step": step, "updates": ema.updates, "counts": counts, "torch": torch.__version__,
                 "args": {k: v for k, v in vars(args).items() if k != "frozen_dtype"}}
        (temporary / "state.json").write_text(json.dumps(state, indent=1))

    def add_moments():
        if rank() == 0 or args.zero:
            file = f"optimizer-{rank()}.safetensors" if args.zero else "optimizer.safetensors"
            save_file(optimizer_state(optimizer, names), temporary / file)

    def finish():
        publish(temporary, out / name)
        with atomic_write(out / "latest") as latest:
            latest.write_text(name)
        for old in sorted(out.glob("step-*"), key=lambda folder: int(folder.name[5:]))[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    for write, by_all in (begin, False), (add_moments, True), (finish, False):
        problem = None
        try:
            if by_all or rank() == 0:
                write()
        except (OSError, SafetensorError) as error:
            problem = error
        if any_process(problem is not None):  # all processes fail together
            raise OSError(problem or "another process could not write its part")


# Flags that change the result: a run can't be resumed with other ones.
MUST_MATCH = ("stage", "data", "world", "short_caption", "seed", "batch", "init", "eva", "shift",
              "optimizer", "design", "joint", "reconstruct", "draws", "drop", "dit", "queries")


def load_state(out, ema, optimizer, args):
    """Continue where `out` stopped: fills weights, averages and optimizer; returns (step, counts), (0, {})
    if nothing is there.

    Raises ValueError if the run in `out` was started with other flags that change the result.
    """
    if not (out / "latest").is_file():
        if args.resume:
            raise ValueError(f"--resume: there is no run in {out} to go on with")
        return 0, {}
    folder = out / (out / "latest").read_text()
    state = read_json(folder / "state.json")
    for key in MUST_MATCH:
        before, now = state["args"].get(key), getattr(args, key)
        if before != now:
            raise ValueError(f"{out} holds a run with --{key.replace('_', '-')} {before}, not {now}: "
                             "choose another --out, or delete the folder to start anew")
    model, average = load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")
    moments = {}
    for file in folder.glob("optimizer*.safetensors"):  # one for each process that had a part of them
        moments |= load_file(file)
    if set(model) != set(ema.params):
        raise ValueError(f"the weights in {folder} are of another model than this stage trains: "
                         "choose another --out")
    local = local_optimizer(optimizer)
    own = {p for group in local.param_groups for p in group["params"]}
    for n, p in ema.params.items():
        p.data.copy_(model[n])
        ema.average[n].copy_(average[n])
        # In p's memory format: the fused kernel assumes equal strides.
        of_p = {k: torch.empty_like(p).copy_(moments[f"{n}.{k}"])
                for k in ("exp_avg", "exp_avg_sq", "momentum") if f"{n}.{k}" in moments}
        if f"{n}.step" in moments:
            of_p["step"] = moments[f"{n}.step"].to(p.device).reshape(())
        if of_p and p in own:
            local.state[p] = of_p
    ema.updates = state["updates"]
    return state["step"], state.get("counts", {})


# ---- the log --------------------------------------------------------------------------------------------

class Log:
    """log.jsonl, one object a line, and with --wandb the same numbers there."""

    def __init__(self, path, args):
        self.path, self.file, self.remote = path, open(path, "a"), None              # noqa: SIM115
        if args.wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("--wandb needs the package wandb: pip install wandb") from None
            config = {key: str(value) for key, value in vars(args).items()}
            self.remote = wandb.init(project=args.wandb, config=config, name=args.out, resume="allow")

    def write(self, row):
        """One more line. A full disk costs the line, not the run."""
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            tqdm.write(f"{self.path}: {error}")
        if self.remote:
            self.remote.log(row, step=row["step"])


class Meter:
    """What happened on this process since the last line of the log: losses, skipped samples, time waited.

    Losses and the steps without a finite gradient are summed up on the device: only `row` waits for them.
    """

    def __init__(self, counts, device):
        self.counts = Counter(counts)  # causes -> broken samples, since the run began
        self.nonfinite = torch.zeros(3, device=device)  # steps: since the run began, in a row, most in a row
        self.nonfinite[0] = self.counts.pop("nonfinite steps", 0)
        self.broken = []  # (cause, name) of the first broken samples
        self.clear()

    def clear(self):
        """Reset for the next line of the log."""
        self.sums, self.steps, self.waited, self.since, self.new = {}, 0, 0.0, time.time(), Counter()

    def add(self, losses, fraction):
        """A micro-batch's losses, `fraction` of a step."""
        for name, value in losses.items():
            weight = 1 if name[0] == "_" else fraction
            self.sums[name] = self.sums.get(name, 0) + value.detach().float() * weight

    def add_step(self, found_inf):
        """One more step; found_inf () is 1 where its gradient wasn't finite."""
        total, in_a_row, most = self.nonfinite
        in_a_row = (in_a_row + 1) * found_inf
        self.nonfinite = torch.stack([total + found_inf, in_a_row, torch.maximum(most, in_a_row)])
        self.steps += 1

    def skip(self, skipped):
        """[(cause, name)] of samples that could not be read."""
        self.new.update(cause for cause, _ in skipped)
        self.broken = (self.broken + skipped)[:20]

    def totals(self):
        """{cause: number} since the run began, for its state."""
        steps = int(self.nonfinite[0])
        new = sum(gather_objects(self.new), Counter())               # since the last line, of all processes
        return dict(self.counts + new) | ({"nonfinite steps": steps} if steps else {})

    def row(self, step, args):
        """The line of the log, the same on all processes; ValueError where too much is broken to go on."""
        sums = {name: total.cpu() for name, total in self.sums.items()}
        ranks = gather_objects((sums, self.new, self.broken))
        for _, new, _ in ranks:
            self.counts.update(new)
        self.check(step, args, [broken for _, _, names in ranks for broken in names])
        row = {"step": step, "samples": step * args.batch}
        for name in dict.fromkeys(name for sums, _, _ in ranks for name in sums):
            total = sum(sums.get(name, 0) for sums, _, _ in ranks)
            if name == "_by_t":  # sums and numbers of samples in bins of t
                row |= {f"flow, t < {(i + 1) / len(total[0]):.1f}": float(error / n)
                        for i, (error, n) in enumerate(zip(*total)) if n > 0}
            else:
                row[name] = float(total) / len(ranks) / max(self.steps, 1)
        spent = time.time() - self.since
        row |= {"per_s": round(self.steps * args.batch / spent, 1), "wait": round(self.waited / spent, 3)}
        self.clear()
        totals = self.totals()
        return row | ({"skipped": totals} if totals else {})

    def check(self, step, args, names):
        """ValueError if more samples were broken than --max-bad allows, or too many steps in a row
        weren't finite."""
        number = sum(self.counts.values())
        if number > args.max_bad * step * args.batch + 10:
            first = "".join(f"\n  {cause}: {name}" for cause, name in names[:20])
            raise ValueError(f"{number} broken samples in {step * args.batch}: more than --max-bad "
                             f"{args.max_bad} allows ({counted(self.counts)}); the first of them:{first}")
        most = int(self.nonfinite[2])
        if most > args.max_nonfinite:
            raise ValueError(f"no finite gradient in {most} steps in a row, up to step {step} (seed "
                             f"{args.seed}): lower --lr ({args.lr}) or look at the samples before "
                             f"{step * args.batch}; "
                             f"{args.out} keeps the last state")


def counted(by_cause):
    """{cause: number} -> words."""
    return ", ".join(f"{n} {cause}" for cause, n in by_cause.items() if n) or "none"


# ---- the loop -------------------------------------------------------------------------------------------

def autocast(args, device):
    """bf16 autocast, with --bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


def train(args, device):
    """Train one stage, resuming the run in --out. Returns False if a signal stopped it."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)  # the same fresh weights on every process
    stage = build_stage(args).to(device)
    samples, held_out = open_samples(args, stage, device)
    test = held_out_batch(stage, held_out, device)
    optimizer, ema = make_optimizer(stage, args), EMA(stage.trained, args.ema)
    step, counts = load_state(out, ema, optimizer, args)
    if args.compile and stage.compile_target is not None:
        stage.compile_target.compile()
    net = stage
    if world_size() > 1:  # with conversations, a batch may need only some parameters
        net = DistributedDataParallel(stage, find_unused_parameters=bool(stage.converse))
    stop, is_main = StopRequest(), rank() == 0
    if is_main:
        announce(args, ema, samples, step)
    log = Log(out / "log.jsonl", args) if is_main else None
    bar = tqdm(total=args.steps, initial=step, disable=not is_main or args.quiet, unit="step")
    loader, meter = iter(batches(samples, stage, step, args, device)), Meter(counts, device)
    stage.trained.train()
    if step >= args.steps and is_main:                               # a finished run can still be exported
        export(args, stage, ema, step)
    halt = False
    while step < args.steps and not halt:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        for micro in range(args.accumulate):
            last = micro == args.accumulate - 1  # gradients are reduced once a step, with the last one
            with nullcontext() if net is stage or last else net.no_sync():
                losses = forward_backward(net, loader, meter, args, device)
        norm = nn.utils.clip_grad_norm_(list(ema.params.values()), args.clip)    # the same on all processes
        found_inf = local_optimizer(optimizer).found_inf = (~norm.isfinite()).float()
        with autocast(args, device):                                 # Newton-Schulz in bf16, as published
            optimizer.step()
        ema.update()
        optimizer.zero_grad(set_to_none=True)
        meter.add_step(found_inf)
        step += 1
        bar.update()
        if step % args.log_every == 0 or step == args.steps:
            row = meter.row(step, args) | {"lr": optimizer.param_groups[0]["lr"], "grad": float(norm)}
            if is_main:
                log.write(row)
                bar.set_postfix({name: f"{row[name]:.4f}" for name in losses if name in row})
        halt = stop.agreed()
        if step % args.save_every == 0 or step == args.steps or halt:
            before = time.time()
            checkpoint(out, step, stage, ema, optimizer, test, log, args, meter.totals(), device)
            meter.since += time.time() - before                      # samples/s exclude saving
    stop.wait()
    bar.close()
    return step >= args.steps


def forward_backward(net, loader, meter, args, device):
    """Forward and backward of the next micro-batch."""
    before = time.time()
    batch = to_device(next(loader), device)
    meter.waited += time.time() - before
    meter.skip(batch.pop("skipped"))
    with autocast(args, device):
        losses = net(batch)
    (sum(value for name, value in losses.items() if name[0] != "_") / args.accumulate).backward()
    meter.add(losses, 1 / args.accumulate)
    return losses


def announce(args, ema, samples, step):
    """Print a summary of the run."""
    millions = sum(p.numel() for p in ema.params.values()) / 1e6
    print(f"stage {args.stage}: {millions:.2f} M trained parameters, {args.steps} steps of {args.batch}, "
          f"{'from step ' + str(step) if step else 'from the start'}, in {args.out}")
    if args.data:
        source = samples.source
        print(f"{len(source)} samples, {len(source.held_out)} of them held out; "
              f"left out: {counted(source.left_out)}")


@torch.no_grad()
def checkpoint(out, step, stage, ema, optimizer, test, log, args, counts, device):
    """Write the state, then, with the averaged weights, the probe, the preview and the exported model."""
    try:
        save_state(out, step, ema, optimizer, args, counts)
        if rank() > 0:
            return
        if test is not None:
            with averaged_weights(stage, ema):
                evaluate(out, step, stage, test, log, args, device)
        export(args, stage, ema, step)
        from evals.charts import save_curves
        save_curves(out / "log.jsonl", out / "curves.png")
    except (OSError, SafetensorError) as error:                      # a full disk must not end a run of days
        tqdm.write(f"step {step} could not be written to {out}: {error}; training goes on, the state before "
                   "it is kept")
    finally:
        barrier()


@contextmanager
def averaged_weights(stage, ema):
    """Within: the averaged weights, in evaluation mode. Whatever fails, training goes on with its own."""
    stage.trained.eval()
    ema.swap()
    try:
        yield
    finally:
        ema.swap()
        stage.trained.train()


@torch.no_grad()
def export(args, stage, ema, step):
    """Write the averaged weights into the model folder that --save names, if any."""
    if args.save:
        folder = Path(args.save.replace("{step}", f"{step:06d}"))
        folder.mkdir(parents=True, exist_ok=True)
        with averaged_weights(stage, ema):
            stage.export(folder)


def evaluate(out, step, stage, test, log, args, device):
    """The probe into the log, the preview into a PNG, both of held-out samples."""
    # Eager: probes have other batch sizes, and recompiling would not pay.
    with autocast(args, device), torch.compiler.set_stance("force_eager"):
        numbers, rows = {k: round(float(v), 4) for k, v in stage.probe(test).items()}, stage.preview(test)
    if numbers:
        log.write({"step": step, **numbers})
        tqdm.write(f"step {step}  " + "  ".join(f"{k[1:]} {v}" for k, v in numbers.items()))
    if rows:
        save_grid(rows, out / f"preview-{step:06d}.png")


# ---- images of a run ------------------------------------------------------------------------------------

def save_grid(rows, path, columns=16, scale=2):
    """Rows of images (B, 3, H, W) in [0, 1], the first `columns` of each, as one PNG."""
    grid = torch.cat([torch.cat(list(row[:columns].float().cpu()), 2) for row in rows], 1)
    image = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(path)


# ---- the command line -----------------------------------------------------------------------------------

def make_parser():
    """The flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("train.py", description=__doc__, formatter_class=raw)

    def add(flag, help=None, **options):
        parser.add_argument(flag, help=help, **options)
    switch, optional = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}
    add("--stage", required=True, choices=STAGES)
    # what to read and write
    add("--data", "tar shards, folders, JSONL files or patterns, comma-separated, maybe with =fraction. "
        "Default: the miniature's world")
    add("--world", "options of the synthetic world, as in words=0.2,objects=2: see miniature/tasks.py")
    add("--short-caption", "probability of a sample's short caption", type=float)
    add("--cache", "folder for what frozen encoders make of --data: computed once, then never again")
    add("--init", "model folder to start from; what it lacks starts from random weights. Default: "
        "weights/nano, but random weights for what this stage trains (stage 2 trains on)")
    add("--fresh", "random weights for what this stage trains, whatever --init has of it", **switch)
    add("--eva", "folder with EVA-CLIP and the diffusion-decoder, if --init has none")
    add("--save", "model folder that gets the trained parts at every checkpoint; with {step}: one for each")
    add("--out", "folder of the run (state, log, images); a run in it goes on. Default runs/STAGE")
    add("--resume", "refuse to start anew: there must be a run in --out to go on with", **switch)
    # what is learnt in stages 1 and 2
    add("--design", "section 3.3: flow matching or regression of CLIP features, or flow matching of VAE "
        "latents. Default: that of --init, else clip-fm", choices=["clip-fm", "clip-mse", "vae-fm"])
    add("--joint", "fraction of conversations; the language model is trained, too", type=float, default=0.0)
    add("--reconstruct", "fraction of samples whose prompt is the image itself (stage 2 of the world: 0.1)",
        type=float)
    add("--draws", "noises and times of each sample, for one pass of the language model over its prompt",
        type=int, default=1)
    add("--dit", "other sizes for a fresh DiT: fields of DiTConfig, as in dim=192,n_layers=8,rope=2d")
    add("--queries", "number of fresh latent queries, instead of those of --init", type=int)
    # the recipe; defaults by stage
    add("--paper", "the paper's recipe (stages 1 and 2) instead of the nano one", **switch)
    add("--steps", type=int)
    add("--batch", "samples of one step, over all processes", type=int)
    add("--lr", "peak learning rate", type=float)
    add("--ema", "decay of the averaged weights", type=float)
    add("--accumulate", "micro-batches of one step", type=int, default=1)
    add("--optimizer", "muon: orthogonalised steps for hidden matrices, AdamW for the rest",
        choices=["adamw", "muon"])
    add("--drop", "stages 1, 2: probability of the null condition", type=float, default=0.1)
    add("--shift", "shift of time toward noise for a fresh DiT. Default 5; with --paper 1", type=float)
    add("--seed", type=int, default=0)
    # the machine
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--bf16", "products in bf16 (autocast). Default: on a GPU; CPUs with avx512_bf16 or AMX gain, too",
        **optional)
    add("--compile", "torch.compile of the heaviest part. Default: on CUDA", **optional)
    add("--checkpointing", "recompute activations in the backward pass instead of keeping them", **switch)
    add("--zero", "each process keeps a part of the optimizer's moments (ZeRO-1)", **switch)
    add("--workers", "processes that read images, for each training process", type=int, default=0)
    add("--max-bad", "fraction of broken samples above which the run stops", type=float, default=0.01)
    add("--log-every", type=int, default=20)
    add("--save-every", type=int, default=500)
    add("--wandb", "project of Weights & Biases that gets the log, too (needs the package wandb)")
    add("--quiet", "no progress bar", **switch)
    add("--dry-run", "train nothing: print what is trained, and what memory and time it takes", **switch)
    add("--gpus", "--dry-run: number of GPUs", type=int, default=1)
    return parser


def arguments(argv=None):
    """The command line; what the recipe of the stage leaves open is filled in here. ValueError for what
    can't be meant."""
    args = make_parser().parse_args(argv)
    if args.paper and args.stage not in PAPER:
        raise ValueError(f"the paper doesn't train stage {args.stage}: --paper goes with stages 1 and 2")
    for key, value in {**SHARED, **(PAPER if args.paper else RECIPES)[args.stage]}.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    args.out = args.out or f"runs/{args.stage}"
    args.warmup = min(args.warmup, args.steps // 2)
    args.shift = (1.0 if args.paper else 5.0) if args.shift is None else args.shift
    if args.init is None:
        args.fresh |= args.stage != "2"
        args.init = str(NANO) if NANO.is_dir() else None
    if args.stage in ("decoder", "1", "2") and not args.init:
        raise ValueError(f"stage {args.stage} builds on trained parts: name a model folder with --init")
    if args.init and not Path(args.init).is_dir():
        raise ValueError(f"there is no model folder at {args.init} (--init)")
    args.eva = args.eva or args.init
    choose_device(args)
    choose_task(args)
    check(args)
    return args


def choose_device(args):
    """Fill in the device and what depends on it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = "cuda" if available["cuda"] else "cpu"
    if not available[args.device]:
        raise ValueError(f"--device {args.device}, but torch finds no such device here: use --device cpu")
    args.bf16 = args.device != "cpu" if args.bf16 is None else args.bf16
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    args.frozen_dtype = torch.bfloat16 if args.bf16 and args.device != "cpu" else torch.float32


def choose_task(args):
    """Fill in what the prompts are: args.world (the world's options, None with --data), reconstruct,
    prompt_images."""
    if args.data and args.world:
        raise ValueError("--world describes the synthetic world: it doesn't go with --data")
    has_vision = args.stage == "2" and "visual" in folder_parts(args.init)
    if args.reconstruct is None:
        args.reconstruct = 0.1 if has_vision and not args.data else 0.0
    edit = 0.0
    if not args.data:
        from miniature.tasks import parse_options
        args.world = parse_options(args.world, args.stage, args.paper, has_vision, bool(args.joint))
        edit = args.world["edit"]
    if args.cache and not args.data:
        raise ValueError("--cache keeps features of --data: the synthetic world is endless")
    if args.reconstruct + edit >= 1:
        raise ValueError("--reconstruct and --world edit are fractions of the samples: together below 1")
    args.prompt_images = args.reconstruct + edit > 0


def check(args):
    """ValueError for numbers that can't be meant, and flags that another stage has."""
    if args.stage not in ("1", "2"):
        unset_values = dict(design=None, joint=0, reconstruct=0, draws=1, dit=None, queries=None)
        for name, unset in unset_values.items():
            if getattr(args, name) != unset:
                raise ValueError(f"--{name} belongs to stages 1 and 2, not to stage {args.stage}")
    for name in ("joint", "reconstruct"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} is a fraction: from 0 to below 1, not {getattr(args, name)}")
    for key in ("steps", "batch", "draws", "accumulate", "log_every", "save_every", "gpus"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be at least 1, not {getattr(args, key)}")
    for key in ("lr", "shift"):
        if getattr(args, key) <= 0:
            raise ValueError(f"--{key} must be positive, not {getattr(args, key)}")
    for key in ("drop", "short_caption", "max_bad"):
        if not 0 <= (getattr(args, key) or 0) <= 1:
            raise ValueError(f"--{key.replace('_', '-')} must lie between 0 and 1, not {getattr(args, key)}")
    if not 0 <= args.ema < 1:
        raise ValueError(f"--ema must lie between 0 and below 1, not {args.ema}")


def main(argv=None):
    """Set up the processes and train. Returns the exit code: 2, and one sentence, for a user's mistake."""
    return run_command("train.py", partial(run, argv))


def run(argv):
    """What the command line asks for; raises ValueError for what can't be meant."""
    args = arguments(argv)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.dry_run:
        args.gpus = max(args.gpus, processes)
        from evals.estimate import estimate_training
        return estimate_training(args)
    if args.batch % (processes * args.accumulate):
        raise ValueError(f"--batch {args.batch} must divide by processes ({processes}) x --accumulate "
                         f"({args.accumulate})")
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if processes > 1:
        init_distributed(device)
    finished = train(args, device)
    if processes > 1:
        dist.destroy_process_group()
    if not finished:
        print(f"stopped; the same command goes on from {args.out}")


if __name__ == "__main__":
    from train import main as run_as_module  # not __main__: miniature/pretrain.py imports `train`, too
    sys.exit(run_as_module())
