"""Every stage of training, one loop.

    python train.py --stage 0 --save runs/nano                          understanding: language and vision
    python train.py --stage decoder --init runs/nano --save runs/nano   64 features -> latents (UNet)
    python train.py --stage 1 --init runs/nano --save runs/nano         64 queries + DiT, on captions
    python train.py --stage 2 --init runs/nano --save runs/nano         the same, on short prompts
    python train.py --stage 1 --design vae-fm                           Figure 3; also clip-mse
    python train.py --stage 1 --joint 0.5                               Figure 5: trains the LLM, too
    python train.py --stage all --data IMAGES --out runs/mine           your images: all that is missing
    python train.py --stage 1 --data 'shards/*.tar' --cache features    your images, with the parts of --init
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
import codecs
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import typing
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import flow
from checkpoint import (
    COUNT,
    FRACTION,
    POSITIVE,
    Interval,
    Parser,
    atomic_write,
    check_writable,
    file_lock,
    folder_parts,
    from_json,
    model_folder,
    number,
    publish,
    read_file,
    read_json,
    read_tensor,
    run_command,
    sentence,
    settings,
    write_json,
)
from clip_decoder import PRESETS as DECODER_PRESETS
from clip_decoder import VAE, EulerSchedule, EvaClip, PixelDecoder, UNet
from model import PRESETS, BLIP3o, DiTConfig, preset

NANO = Path(__file__).parent / "weights" / "nano"                    # what a clone ships

# Steps and guidance that suit what is trained at nano size; saved with the weights, sample.py takes them
# from there.
NANO_SAMPLING = {"steps": 6, "cfg": 3.0, "decoder_steps": 5, "decoder_cfg": 1.0, "decoder_spacing": "karras"}

# The recipe of each stage at nano size (two CPU cores). The learning rate rises to `lr` in `warmup` steps
# and falls along a cosine to `final_lr` of it. steps, batch, lr, ema and optimizer are flags, too.
SHARED = dict(ema=0.999, beta2=0.95, weight_decay=0.0, clip=1.0, max_nonfinite=10)
RECIPES = {
    "clip":    dict(steps=2000, batch=64, lr=2e-3, final_lr=0.01, warmup=100, optimizer="adamw"),
    "vae":     dict(steps=3000, batch=16, lr=2e-3, final_lr=0.01, warmup=100, optimizer="adamw"),
    "0":       dict(steps=5000, batch=24, lr=1e-3, final_lr=0.01, warmup=100, optimizer="muon"),
    "decoder": dict(steps=2500, batch=16, lr=1e-3, final_lr=0.01, warmup=100, optimizer="muon"),
    "1":       dict(steps=3200, batch=96, lr=2e-3, final_lr=0.025, warmup=100, optimizer="muon"),
    "2":       dict(steps=500, batch=96, lr=1.2e-3, final_lr=0.0, warmup=50, optimizer="muon"),
}
# The paper's: stage 1 from 1e-4 to 1e-5 in 150k steps of 512, stage 2 from 1e-4 to 0 in 10k.
PAPER = {
    "1": dict(steps=150_000, batch=512, lr=1e-4, final_lr=0.1, warmup=450, optimizer="adamw", ema=0.9999),
    "2": dict(steps=10_000, batch=512, lr=1e-4, final_lr=0.0, warmup=30, optimizer="adamw", ema=0.9999),
}
LEAST_PSNR = 20.0            # dB that encoder and decoder must keep of the images of stages 1 and 2
FEATURE_NOISE = 0.2          # decoder: largest standard deviation of the noise on its features
MAX_LOSS_WEIGHT = 16.0       # decoder: cap of the loss weight 1 + sigma^2 (1: as Emu2)
NULL_DECODER = 0.1           # decoder: probability of the negative features instead of the image's
HELD_OUT = 64                # held-out samples of a probe
PREVIEWS = 16                # and of a preview of stages 1 and 2
MAX_TOKENS = 4096            # longest prompt or conversation: a whole book would exhaust memory
GRACE = 5.0                  # seconds after a signal that a step may go on, before it is given up
LARGEST = torch.finfo(torch.float16).max        # what a folder of weights in fp16 can hold
COUNTED = Interval(0, 2 ** 53)                  # what a run counts


# ---- examples -> tensors, pickled to DataLoader's workers: no weights in here ---------------------------

def collate_images(examples):
    """The targets of Examples: "pixels" (B, 3, S, S) or cached "features" {name: (B, ...)}; {} without."""
    if examples[0].features is not None:
        names = examples[0].features.keys()
        return {"features": {name: torch.stack([e.features[name] for e in examples]) for name in names}}
    if examples[0].image is None:
        return {}
    return {"pixels": data.to_pixels(np.stack([e.image for e in examples]))}


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
        rows = [data.chat_ids(self.tokenizer, e.turns, [[self.tokens_per_image] * (image is not None)
                                                        for image in e.turns_images]) for e in examples]
        ids, mask = data.pad([ids for ids, _ in rows], self.tokenizer.pad_id)
        targets, _ = data.pad([targets for _, targets in rows], False)
        return {**collate_images(examples), "ids": ids, "mask": mask, "labels": ids.where(targets, -100),
                **self.vision_inputs([image for e in examples for image in e.turns_images])}

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
        generations, batch = [e for e in examples if not e.turns], {}
        if generations:
            batch = {**collate_images(generations), "prompts": self.prompts(generations),
                     **self.noise(generations), **self.hard_negatives(generations)}
        if conversations:
            batch["conversations"] = super().__call__(conversations)
        return batch

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
    export; `parts` says in words where each part of the model comes from, `encoders` are the frozen modules
    that `encode` runs.

    forward(batch) returns {name: scalar}; the sum of those whose names don't begin with _ is minimised.
    """
    size = 64                       # side S of the images that this stage reads
    long_captions = None            # of the world. True: long captions, False: short ones, None: a mixture
    converse = 0.0                  # fraction of the samples that are conversations
    query_states = None             # with --freeze-queries and --cache: data.QueryStates

    def __init__(self):
        super().__init__()
        # For torch.compile: the part whose shapes never change. (A class attribute would hide the module.)
        self.compile_target, self.parts, self.encoders = None, {}, []

    def encode(self, pixels):
        """Frozen encoders' outputs {name: (B, ...)} for pixels (B, 3, S, S); --cache keeps them."""
        raise ValueError("--cache keeps what frozen encoders make of images: this stage has none")

    @torch.no_grad()
    def targets(self, batch):
        """`encode` of a batch, or what the cache has of it."""
        return batch["features"] if "features" in batch else self.encode(batch["pixels"])

    def calibrate(self, batch):
        """Measure on a held-out batch what `export` writes beside the weights."""

    def export(self, folder):
        """Write the trained parts into the model folder `folder`; what else lies there stays."""
        raise NotImplementedError

    def check(self, batch):
        """Look at a held-out batch of --data before the first step; raises ValueError where training would
        be in vain."""

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
        if len(parts & {"visual", "llm"}) == 1 and not args.fresh:
            has, lacks = ("vision tower", "language model")[::1 if "visual" in parts else -1]
            raise ValueError(f"stage 0 trains a language model together with its vision tower: {args.init} "
                             f"has a {has}, but no {lacks}. Name a Qwen2.5-VL with --init, or add --fresh "
                             "for random weights of the nano sizes")
        if "visual" in parts and not args.fresh:
            self.trained = BLIP3o.from_pretrained(args.init, parts={"llm", "visual", "queries"} & parts)
        else:
            self.trained = BLIP3o(nano_config(self.tokenizer, dit=None))
        if self.trained.latent_queries is not None:
            self.trained.latent_queries.requires_grad_(False)        # unused in this stage
        self.parts = dict.fromkeys(("language model", "vision tower"), origin(args, "visual" in parts))
        self.trained.llm.checkpointing = args.checkpointing
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
        self.eva = frozen_clip(args, args.eva, "--eva")
        if not (args.joint and states(Path(args.out))):      # a resumed run has changed its own
            need_same("llm", args.save, args.init, "--init")
        self.folders = args.init, args.eva
        self.size, self.decoder = self.eva.config.image_size, None
        if "unet" in folder_parts(args.eva):
            self.decoder = frozen(PixelDecoder.from_pretrained(args.eva, dtype=args.frozen_dtype))
        self.trained, continues, keeps_queries = self.load(args)
        if args.data:                            # upsampled prompts describe the synthetic world
            self.trained.config.upsample_prompts = False
        config = self.trained.config
        self.design = design_of(config)
        if self.design == "vae-fm" and self.decoder is None:
            raise ValueError(f"design vae-fm generates a VAE's latents: {args.eva} has no diffusion-decoder "
                             "(--eva names one)")
        self.encoders = [self.decoder.vae if self.design == "vae-fm" else self.eva]
        trained = ("dit.", "regressor.") + ("latent_queries",) * (not args.freeze_queries)
        for name, p in self.trained.named_parameters():
            p.requires_grad_(bool(args.joint) or name.startswith(trained))
            p.data = p.data.float() if p.requires_grad else p.data
        for part in self.trained.dit, self.trained.llm:
            if part is not None:
                part.checkpointing = args.checkpointing
        self.compile_target = self.trained.dit
        queries = origin(args, keeps_queries)
        if not self.trained.latent_queries.requires_grad:
            queries = f"frozen, {'from ' + args.init if keeps_queries else 'as they are drawn'}"
        self.parts = {
            "EVA-CLIP": f"frozen, from {args.eva}",
            "decoder": f"frozen, from {args.eva}" if self.decoder else "absent: no previews",
            "language model": f"{'continued' if args.joint else 'frozen,'} from {args.init}",
            "queries": queries, "regressor" if self.trained.dit is None else "DiT": origin(args, continues)}
        shape = config.gen_hidden_size, config.grid, config.grid
        self.collate = GenerationCollate(self.tokenizer, config.vision, self.size, shape, args.draws,
                                         args.drop, config.shift)

    def check(self, batch):
        # The released decoder keeps the meaning of an image, not its pixels.
        if self.decoder is None or is_official(self.eva):
            return
        pixels = batch["pixels"]
        (target,) = self.encode(pixels).values()
        kept = float(psnr(self.decode(target), to_unit_range(pixels)))
        if rank() == 0:
            print(f"encoder and decoder keep {kept:.1f} dB of {len(pixels)} held-out images", flush=True)
        if kept < LEAST_PSNR:
            raise ValueError(f"encoder and decoder keep {kept:.1f} dB of held-out images, less than "
                             f"{LEAST_PSNR:g}, and nothing better can be generated. Train those of "
                             f"{self.folders[1]} on your images, or for more steps, with --stage all; or "
                             "name better ones with --eva; or add --force")

    def load(self, args):
        """Return (model with its generator; is that continued? are its queries those of --init?)."""
        stored, parts = BLIP3o.from_pretrained(args.init, "meta").config, folder_parts(args.init)
        continues = not args.fresh and stored.generates and args.design in (None, design_of(stored))
        resumes = bool(states(Path(args.out)))       # --init may be --save, with this run's own generator
        check_use(args, {"fresh": resumes or not continues,
                         "flow": (design_of(stored) if continues else args.design) != "clip-mse"})
        wanted = {"llm"} | ({"visual"} if args.joint or args.prompt_images else set())
        keeps = args.freeze_queries and not args.fresh
        if continues or keeps and not (args.queries or args.paper):
            wanted |= {"queries"} & parts        # other queries are learnt with the generator, so as fresh
        if continues:
            wanted.add("regressor" if stored.mse_channels else "dit")
        dtype = torch.float32 if args.joint else args.frozen_dtype
        model = BLIP3o.from_pretrained(args.init, dtype=dtype, parts=wanted)
        if continues:
            return model, True, model.latent_queries is not None
        config = self.fresh_config(stored, args)
        keeps_queries = model.latent_queries is not None and model.latent_queries.shape[1] == config.n_query
        model.resize_vocabulary(config.text.vocab_size)
        if not keeps_queries:
            model.add_queries(config.n_query, config.query_std)
            if not stored.n_query and not is_official(self.eva):
                # A language model that never had queries knows its own words: its states after them tell
                # prompts apart, those after noise hardly (as prompt tuning starts, arXiv 2104.08691).
                words = torch.randperm(stored.text.vocab_size)[:config.n_query]
                model.latent_queries.data[0] = model.llm.embed_tokens.weight[words].detach()
        model.add_generator(config)
        return model, False, keeps_queries

    def fresh_config(self, stored, args):
        """The BLIP3oConfig of a fresh generator for the language model of `stored`: the nano DiT makes
        narrow features, the released one wide ones; --dit changes single fields."""
        nano, is_wide = PRESETS["nano"], is_official(self.eva)
        n_query = args.queries or 64 * args.paper or stored.n_query or (64 if is_wide else nano["n_query"])
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
            if args.queries not in (None, grid ** 2):
                raise ValueError(f"--design clip-mse has a query for each of the {grid ** 2} features, not "
                                 f"--queries {args.queries}")
            return replace(base, n_query=grid ** 2, mse_channels=self.eva.config.width)
        try:
            config = DiTConfig(**dit | dit_fields(args.dit))
            if grid % config.patch_size:
                raise ValueError(f"patch_size {config.patch_size} doesn't divide the {grid} x {grid} grid")
            weights = config.n_layers * config.dim * (2 * config.dim + 3 * config.ffn_dim)   # at least
            need_memory((4 if args.device == "cpu" else 1) * weights, "its weights and their optimizer")
        except ValueError as error:
            words = f"--dit {args.dit}" if args.dit else "the DiT"
            raise ValueError(f"{words}: {error}") from None
        return replace(base, n_query=n_query, dit=config)

    def encode(self, pixels):
        """pixels (B, 3, S, S) -> the design's target: CLIP features (B, n, C) or VAE latents (B, h w, C)."""
        if self.design == "vae-fm":
            return {"latents": self.decoder.vae.encode(data.to_signed(pixels)).flatten(2).transpose(1, 2)}
        return {"features": self.eva.encode(pixels)}

    def forward(self, batch):
        # Every process takes part in every all-reduce, also one without samples of a kind.
        each = empty = torch.zeros(0, device=self.trained.latent_queries.device)
        name = "mse" if self.trained.dit is None else "flow"
        if "prompts" in batch:
            (target,), cond = self.targets(batch).values(), self.condition(batch["prompts"])
            each = self.trained(batch["prompts"]["ids"], features=target, cond=cond, x0=batch["x0"],
                                t=batch["t"], dropped=batch["dropped"])[name]            # (B draws,)
        losses = {name: mean_over_ranks(each)}
        if name == "flow" and "prompts" in batch:
            bin_of = (batch["t"] * self.bins).long().clamp(max=self.bins - 1)
            pairs = torch.stack([each.detach(), torch.ones_like(each)])
            losses["_by_t"] = pairs.new_zeros(2, self.bins).index_add_(1, bin_of, pairs)     # sums, numbers
        if "conversations" in batch:
            losses["text"] = text_loss(self.trained, batch["conversations"])
        elif self.converse:
            losses["text"] = mean_over_ranks(empty)
        return losses

    def export(self, folder):
        """Also what the folder lacks for every use of the model: vision tower, encoder and decoder, and the
        files beside the weights, as --init and --eva have them."""
        (init, eva), stored, model = self.folders, folder_parts(folder), self.trained
        lacks, visual = (folder_parts(init) | folder_parts(eva)) - stored, model.visual
        self.tokenizer.save(folder)
        try:
            if visual is None and "visual" in lacks & folder_parts(init):    # for questions about images
                model.visual = BLIP3o.from_pretrained(init, dtype=torch.float16, parts={"visual"}).visual
            model.save_pretrained(folder, torch.float16)
        finally:
            model.visual = visual
        if "clip" in lacks:
            self.eva.save_pretrained(folder, torch.float16)
        if "unet" in lacks and self.decoder is not None:
            self.decoder.save_pretrained(folder, torch.float16)
        for name in ("generation_config.json", "preprocessor_config.json"):
            if (Path(init) / name).is_file() and not (folder / name).exists():
                shutil.copy(Path(init) / name, folder / name)
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
        """Collated prompts -> the condition (B, n_query, D), from the cache if there is one."""
        if self.query_states is not None:
            states = self.query_states(prompts["ids"], prompts["mask"], self.trained.condition)
            return states.to(self.trained.latent_queries.device)
        return self.trained.condition(prompts["ids"], prompts["mask"], prompts["patches"], prompts["grid"])

    def generate(self, cond):
        """The features (B, n, C) that are generated for a condition, always from the same noise."""
        return self.trained.generate_features(cond, 10, 2.0, generator=torch.Generator().manual_seed(0))

    def decode(self, target):
        """The design's target, CLIP features (B, n, C) or VAE latents (B, h w, C), -> images (B, 3, S, S) in
        [0, 1]."""
        if self.design != "vae-fm":
            return decode_preview(self.decoder, target, self.size)
        z = target.transpose(1, 2).unflatten(2, (self.trained.config.grid,) * 2)  # (B, C, h, w)
        return (self.decoder.vae.decode(z) / 2 + 0.5).clamp(0, 1)

    def preview(self, batch):
        if self.decoder is None:
            return None
        generated = self.generate(self.condition(batch["prompts"])[:PREVIEWS])
        return [self.decode(generated), to_unit_range(batch["pixels"][:PREVIEWS])]


class DecoderStage(Stage):
    """The pixel decoder as Emu2 trains it: SDXL's UNet learns to generate the image from frozen EVA-CLIP
    features.

    The features get a little noise of random strength, because at sampling time they come from the imperfect
    DiT (the noise-augmented decoder of RAE, arXiv 2510.11690, section 4).
    """

    def __init__(self, args):
        super().__init__()
        self.eva = frozen_clip(args, args.init, "--init")
        vae, eva = frozen(VAE.from_pretrained(args.init)), self.eva.config
        self.size, has_unet = eva.image_size, "unet" in folder_parts(args.init) and not args.fresh
        preset_name = "official" if is_official(self.eva) else "nano"
        config, channels = DECODER_PRESETS[preset_name]["unet"], vae.config.latent_channels
        config = replace(config, in_channels=channels, out_channels=channels)
        unet = UNet.from_pretrained(args.init) if has_unet else UNet(config)
        self.compile_target = self.trained = unet.to(memory_format=torch.channels_last)
        self.decoder = PixelDecoder(unet, vae, EulerSchedule())
        self.encoders = [self.eva, vae]
        with torch.no_grad():  # guidance leads away from an image of the mean colour
            negative = self.eva.encode(torch.zeros(1, 3, self.size, self.size, dtype=args.frozen_dtype))
        self.register_buffer("negative", negative)                   # (1, n, C)
        self.parts = {"EVA-CLIP": f"frozen, from {args.init}", "VAE": f"frozen, from {args.init}",
                      "UNet": origin(args, has_unet)}
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
                  "0": pretrain.FreshUnderstandingStage}
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
    """--dit "dim=192,rope=2d" -> {"dim": 192, "rope": "2d"}; ValueError for what is no field of DiTConfig,
    or can't be its value. The widths in_channels and cond_dim are those of the other parts."""
    kinds = {}
    for name, hint in typing.get_type_hints(DiTConfig).items():
        kind = hint if hint in (str, float) else int
        interval = POSITIVE if kind is float else Interval(1, 256 if name == "n_layers" else 2 ** 16)
        words = f"{name} must be a {'whole ' * (kind is int)}number {interval}"
        kinds[name] = (str if kind is str else number(kind, interval)), words
    del kinds["in_channels"], kinds["cond_dim"]
    return settings("--dit", spec, kinds)


# What tells two models' frozen parts apart: the class, and a tensor that all training of the part changes.
MARKS = {"clip": (EvaClip, "cls_token", "EVA-CLIP"),
         "llm": (BLIP3o, "llm.layers.0.mlp.down_proj.weight", "language model")}


def need_same(part, save, folder, flag):
    """ValueError where the model folder `save` has a part of MARKS, but another one than `folder`: what is
    trained with the one would be used with the other, or the part would be lost."""
    if part in folder_parts(save if Path(save).is_dir() else None):
        kind, key, words = MARKS[part]
        first, second = (read_tensor(kind.from_pretrained(path, "meta").sources[key]).half()
                         for path in (save, folder))
        if not torch.equal(first, second):
            raise ValueError(f"--save {save} has another {words} than {flag} {folder}: choose another one")


def frozen_clip(args, folder, flag):
    """The EVA-CLIP of a model folder, frozen; ValueError where it holds none, or --save another one."""
    if "clip" not in folder_parts(folder):
        raise ValueError(f"{folder} holds no EVA-CLIP: name a folder that does with {flag}")
    need_same("clip", args.save, folder, flag)
    return frozen(EvaClip.from_pretrained(folder, dtype=args.frozen_dtype))


def decode_preview(decoder, features, size):
    """Features (B, n, C) -> images (B, 3, size, size) in [0, 1], in 10 steps from always the same noise."""
    shape = decoder.latent_shape(len(features), (size, size))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return decoder.decode(features, None, 10, 1.0, noise, (size, size))


def origin(args, continues):
    """In words: where the weights of a part come from that is trained."""
    return f"continued from {args.init}" if continues else "fresh"


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
    kinds share one learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2; their factor is 0.2, to
    resemble AdamW's steps; this small DiT learnt faster with 0.6). Groups with "matrices": True hold (m, n)
    parameters.

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
    trained, hidden = [p for p in stage.trained.parameters() if p.requires_grad], set()
    if args.optimizer == "muon":  # the LM head stays with AdamW, as published
        hidden = {m.weight for name, m in stage.trained.named_modules()
                  if isinstance(m, nn.Linear) and name != "llm.lm_head"}
    groups = [{"params": [p for p in trained if p not in hidden]},
              {"params": [p for p in trained if p in hidden], "matrices": True}]
    groups = [group for group in groups if group["params"]]
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
    if isinstance(stage.collate, ConversationCollate):
        task, probe = (partial(bounded, task, stage.tokenizer) for task in (task, probe))
    source, unseen = (data.open_source(args.data, stage.size) for _ in range(2))
    if args.cache:
        source.cache = feature_cache(args, stage, source, device)
        if args.freeze_queries:
            frozen_weights = ("queries", stage.trained.latent_queries), *stage.trained.llm.named_parameters()
            name = digest_of(f"query states {args.frozen_dtype}", frozen_weights)
            stage.query_states = data.QueryStates(Path(args.cache) / name)
    return data.Samples(source, task, args.seed), data.Samples(unseen, probe, args.seed, held_out=True)


def bounded(task, tokenizer, item, rng):
    """The Example that a task makes of an item; texts that don't fit are BadSamples, counted as all are."""
    example = task(item, rng)
    texts = [example.prompt, *(text for turn in example.turns for text in turn)]
    size = sum(len(text.encode()) for text in texts)                 # at least as many as tokens
    if size > MAX_TOKENS and (size > 16 * MAX_TOKENS or
                              sum(len(tokenizer.encode(text)) for text in texts) > MAX_TOKENS):
        raise data.BadSample("too many tokens", f"{size} bytes are more than {MAX_TOKENS} tokens")
    return example


def digest_of(text, parameters):
    """A hash of a text and a sample of every tensor of [(name, tensor)]: the name of a cache."""
    digest = hashlib.sha256(text.encode())
    for name, p in parameters:
        sample = p.detach().flatten()[::max(1, p.numel() // 1024)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def feature_cache(args, stage, source, device):
    """The filled FeatureCache of a source."""
    design, encoders = getattr(stage, "design", None), nn.ModuleList(stage.encoders)
    # By one process: it may have to read every record.
    fingerprint = gather_objects(source.fingerprint() if rank() == 0 else None)[0]
    cache = data.FeatureCache(args.cache, digest_of(
        f"{fingerprint} {stage.size} square bicubic {design}", encoders.named_parameters()))

    @torch.no_grad()
    def encode(pixels):
        with autocast(args, device):
            return stage.encode(pixels.to(device))
    cache.fill(source, encode, args.batch, args.workers, rank(), world_size(), args.quiet)
    barrier()
    # On a disk of its own, a machine lacks what the others have written.
    _, _, *local = environment()
    cache.fill(source, encode, args.batch, args.workers, *local, args.quiet)
    barrier()
    return cache


def held_out_batch(stage, samples, device):
    """The batch that probes and previews see, or None where nothing is held out, or nothing of it can be
    read: a small or broken set must not end a run."""
    available = HELD_OUT if samples.held_out is False else min(HELD_OUT, len(samples.source.held_out))
    examples, problem = [], None
    for i in range(available):
        try:
            examples.append(samples[i])
        except ValueError as error:
            problem = error
    if examples:
        return to_device(stage.collate(examples), device)
    if problem and rank() == 0:
        print(f"there will be no probes, as no held-out sample can be used: {sentence(problem)}")
    return None


class MicroBatches(torch.utils.data.Dataset):
    """This process's part of the micro-batch whose first sample has position `first`, collated, and the
    (cause, name) of what was "skipped" for it.

    A mistake is returned, not raised: from a worker, DataLoader would wrap it in a traceback.
    """

    def __init__(self, samples, collate, size):
        self.samples, self.collate, self.size = samples, collate, size
        self.rank, self.ranks = rank(), world_size()                 # workers don't know them

    def __getitem__(self, first):
        positions = range(first + self.rank, first + self.size, self.ranks)
        try:
            examples = [self.samples[position] for position in positions]
            # Of several skipped items only the first belongs to its position: each is counted at its own.
            skipped = [broken for e in examples for broken in e.skipped[:1]]
            return {**self.collate(examples), "skipped": skipped}
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if sys.flags.dev_mode:
                raise
            return ValueError(sentence(error))


def batches(samples, stage, start, args, device):
    """Micro-batches of this process from step `start` on: step s uses the positions s * batch ... (s + 1)
    * batch - 1."""
    micro = args.batch // args.accumulate         # samples of a micro-batch, of all processes
    return torch.utils.data.DataLoader(
        MicroBatches(samples, stage.collate, micro), batch_size=None,    # it gives batches already
        sampler=range(start * args.batch, args.steps * args.batch, micro), num_workers=args.workers,
        pin_memory=device.type == "cuda")


@contextmanager
def reading(loader):
    """Within: the iterator of a DataLoader. Its workers start with SIGNALS blocked: a run that is saving
    still needs them when a signal goes to the whole process group. So SIGTERM can't end them, SIGKILL does.
    """
    has_masks = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if has_masks else None
    try:
        iterator = iter(loader)
    finally:
        if has_masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield iterator
    finally:
        getattr(iterator, "_shutdown_workers", bool)()
        for worker in getattr(iterator, "_workers", ()):
            worker.kill()


ON_HOST = ("ids", "mask", "labels", "grid")     # decide about shapes, which the host must know: see BLIP3o


def to_device(batch, device):
    """A batch, a tree of dicts, on a device, except for the tensors that decide about shapes."""
    if isinstance(batch, dict):
        return {key: value if key in ON_HOST else to_device(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=True) if torch.is_tensor(batch) else batch


# ---- processes ------------------------------------------------------------------------------------------

def environment():
    """(processes, number of this one, its number on this machine, processes there), as torchrun says."""
    values = []
    for name, default, interval in (("WORLD_SIZE", 1, COUNT), ("RANK", 0, Interval(0)),
                                    ("LOCAL_RANK", 0, Interval(0)), ("LOCAL_WORLD_SIZE", 1, COUNT)):
        try:
            values.append(number(int, interval)(os.environ.get(name, str(default))))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"the environment variable {name}: {error}; torchrun sets it") from None
    if 1 < values[0] <= values[1]:
        raise ValueError(f"the environment variables RANK {values[1]} and WORLD_SIZE {values[0]} don't go "
                         "together: torchrun sets them")
    return tuple(values)


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


# Ctrl-C, the end that a scheduler or `kill` asks for, and a terminal that is closed.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Steady:
    """A text stream that loses what it can't write, where the run would be lost otherwise: on a full disk,
    or in a pipe whose reader (`| tee`) the same Ctrl-C has ended."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write text, if that is possible."""
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        """Flush, if that is possible."""
        try:
            self.stream.flush()
        except BrokenPipeError:                                      # nobody reads what is still to come
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError:
            pass


class Stopped(KeyboardInterrupt):
    """A signal gave up what was running: nothing of it counts."""


class StopRequest:
    """One of SIGNALS to any process stops all of them after the same step. Signals that the parent process
    had this one ignore (nohup) stay ignored.

    The flag is all-reduced between the hosts asynchronously and read one step later: nothing waits for it.
    What takes longer, and can be given up, runs `within` a patience.
    """

    def __init__(self):
        self.requested, self.flag, self.exchange, self.patience = False, None, None, None
        handled = [sig for sig in SIGNALS if signal.getsignal(sig) != signal.SIG_IGN]
        self.before = {sig: signal.signal(sig, self.request) for sig in handled}
        self.alarm = signal.signal(signal.SIGALRM, self.give_up) if hasattr(signal, "setitimer") else None

    def close(self):
        """Signals do again what they did before."""
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.alarm)
        for sig, handler in self.before.items():
            signal.signal(sig, handler)

    def request(self, *_):
        """The signal handler; a second signal ends the process at once, but a terminal that closes may send
        SIGHUP twice."""
        self.requested = True
        for sig, handler in self.before.items():
            signal.signal(sig, signal.SIG_IGN if sig == getattr(signal, "SIGHUP", None) else handler)
        if self.patience == 0:
            raise Stopped
        if rank() == 0:                                              # print isn't allowed in a handler
            with suppress(OSError):                                  # nobody reads it
                os.write(2, b"train.py: stopping, and saving, after this step; a second signal stops at "
                            b"once\n")
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, GRACE)

    def give_up(self, *_):
        """The handler of the alarm."""
        if self.patience is not None:
            raise Stopped

    @contextmanager
    def within(self, patience):
        """Within: Stopped is raised so many seconds after a signal (None: never)."""
        self.patience = patience
        try:
            if self.requested and patience is not None:
                raise Stopped
            yield
        except RuntimeError:
            if patience is None or not self.requested:
                raise
            raise Stopped from None              # the same signal has ended processes that read for this one
        finally:
            self.patience = None

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

def remove(path):
    """Remove a file, a link or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_state(out, step, ema, optimizer, args, counts, samples):
    """Write out/step-NNNNNN atomically, point `latest` at it, keep the last two.

    model.safetensors (what is trained), ema.safetensors, optimizer.safetensors (with --zero
    optimizer-RANK.safetensors, from each process its part), state.json (step, counts, flags, and how many
    samples there are; the order of samples and all noise are functions of seed and step, so the step is all
    there is to know). Every process calls it. Raises ValueError on all of them if one can't write.
    """
    name, temporary = f"step-{step:06d}", out / ".step.tmp"  # a crash's leftovers are overwritten

    def begin():
        remove(temporary)
        temporary.mkdir()
        for file, tensors in ("model", ema.params), ("ema", ema.average):
            tensors = {n: tensor.detach().contiguous() for n, tensor in tensors.items()}
            save_file(tensors, temporary / f"{file}.safetensors")
        write_json(temporary / "state.json", {
            "step": step, "updates": ema.updates, "counts": counts, "torch": torch.__version__,
            "optimizer_files": world_size() if args.zero else 1, "samples": samples,
            "args": {name: getattr(args, name) for name in FLAGS}})

    def add_moments():
        if rank() == 0 or args.zero:                                 # with --zero, each process has a part
            file = f"optimizer-{rank()}.safetensors" if args.zero else "optimizer.safetensors"
            states_of, names = local_optimizer(optimizer).state, {p: n for n, p in ema.params.items()}
            save_file({f"{names[p]}.{key}": value.reshape(1) if value.ndim == 0 else value.contiguous()
                       for p, moments in states_of.items() for key, value in moments.items()},
                      temporary / file)

    def finish():
        remove(out / name)
        publish(temporary, out / name)
        if not (out / "latest").is_file():
            remove(out / "latest")
        with atomic_write(out / "latest") as latest:
            latest.write_text(name)
        for old in [folder for folder in states(out) if int(folder.name[5:]) < step][:-1]:
            shutil.rmtree(old, ignore_errors=True)                   # never the one just published

    for write, by_all in (begin, False), (add_moments, True), (finish, False):
        problem = None
        try:
            if by_all or rank() == 0:
                write()
        except (OSError, SafetensorError) as error:
            problem = error
        if any(gather_objects(problem is not None)):  # all processes fail together
            raise ValueError(sentence(problem) if problem else "another process could not write its part")


@dataclass
class RunState:
    """state.json: how far a run is; see save_state."""
    step: int = field(metadata={"interval": COUNTED})
    updates: int = field(metadata={"interval": COUNTED})
    counts: dict = field(default_factory=dict)
    args: dict = field(default_factory=dict)
    optimizer_files: int | None = None
    samples: int | None = None

    def __post_init__(self):
        if not all(type(count) is int and count in COUNTED for count in self.counts.values()):
            raise ValueError("counts must be whole numbers")


def states(out):
    """The folders of the states in `out`, the oldest first. Other names are ignored."""
    numbers = {int(f.name[5:]): f for f in out.glob("step-*") if re.fullmatch("step-[0-9]{6,}", f.name)}
    return [f for n, f in sorted(numbers.items()) if f.name == f"step-{n:06d}" and f.is_dir()]


def candidates(out):
    """The states to go on from, the best first: what `latest` names, then the others, the newest first."""
    folders, latest, named = states(out)[::-1], out / "latest", None
    if not folders and latest.exists():
        raise ValueError(f"{latest} names a state, but there is none in {out}: delete it to start anew")
    with suppress(OSError, ValueError):
        named = out / read_file(latest).decode().strip()
    if folders and named not in folders:
        warn(f"{latest} names no state: going on from the newest")
    return sorted(folders, key=lambda folder: folder != named)


def load_state(out, ema, optimizer, args):
    """Continue where `out` stopped: fills weights, averages and optimizer from the first whole candidate.

    Returns its RunState; one of step 0 if nothing is there. Raises ValueError if no state is whole, or the
    run in `out` was started with other flags that change the result.
    """
    problems, state = [], RunState(0, 0)
    for folder in candidates(out):
        try:
            state = from_json(RunState, read_json(folder / "state.json"), folder / "state.json")
            if state.step != int(folder.name[5:]):
                raise ValueError(f"its state.json is one of step {state.step}")
            other = changed_flags(state, args, SAME)
            tensors = None if other else read_tensors(folder, state, ema)
        except (ValueError, OSError, SafetensorError) as error:
            problems.append(f"{folder} is damaged: {sentence(error)}")
            continue
        if other:
            raise ValueError(f"{out} holds a run with {', not '.join(other[0])}: choose another --out, or "
                             "delete the folder to start anew")
        fill(ema, local_optimizer(optimizer), *tensors)
        ema.updates = state.updates
        for problem in problems:
            warn(f"{problem}; going on from {folder}")
        break
    else:
        if problems:
            raise ValueError("; ".join(problems) + "; delete the folder to start anew")
        if args.resume:
            raise ValueError(f"--resume: there is no run in {out} to go on with")
    if len(set(gather_objects(state.step))) > 1:
        raise ValueError(f"the processes find different states in {out}: it must be one folder for all")
    return state


def changed_flags(state, args, resume):
    """[("--flag value", present value)] of the flags with this rule of resuming that a state has otherwise.
    ValueError if the state lacks one."""
    names = [name for name, flag in FLAGS.items() if flag.resume == resume]
    if lacking := [name for name in names if name not in state.args]:
        raise ValueError(f"state.json lacks the flag {lacking[0]}")

    def value(flags, name):                      # the model of this very run may be moved together with it
        own = name in ("init", "eva") and flags[name] == flags.get("save")
        return "the folder of --save" if own else flags[name]
    pairs = {name: (value(state.args, name), value(vars(args), name)) for name in names}
    return [(f"--{name.replace('_', '-')} {before}", str(now)) for name, (before, now) in pairs.items()
            if before != now]


def warn(text):
    """One line on stderr, from one process."""
    if rank() == 0:
        print(f"train.py: {text}", file=sys.stderr)


MOMENTS = ("exp_avg", "exp_avg_sq", "momentum", "step")


def read_tensors(folder, state, ema):
    """(weights, averages, moments) of a state. Raises ValueError or SafetensorError unless files, names,
    shapes and types are those of what is trained, and weights and averages finite."""
    weights, average = (load_file(folder / f"{file}.safetensors") for file in ("model", "ema"))
    for tensors, expected in (weights, ema.params), (average, ema.average):
        if {n: (t.shape, t.dtype) for n, t in tensors.items()} != {
                n: (t.shape, t.dtype) for n, t in expected.items()}:
            raise ValueError("its weights are of another model than this stage trains")
        check_finite(tensors)
    files, moments = sorted(folder.glob("optimizer*.safetensors")), {}
    if len(files) != (state.optimizer_files or max(1, len(files))):
        raise ValueError("a file of the optimizer is missing")
    for file in files:  # one for each process that had a part of them
        moments |= load_file(file)
    for key, moment in moments.items():
        name, _, kind = key.rpartition(".")
        shape = () if kind == "step" else getattr(ema.params.get(name), "shape", None)
        shape = (1,) if shape == () else shape                       # as save_state writes scalars
        if kind not in MOMENTS or moment.shape != shape or not moment.is_floating_point():
            raise ValueError(f"{key} isn't a moment of the optimizer")
    return weights, average, moments


def fill(ema, optimizer, weights, average, moments):
    """Put the tensors of a state to where they are used."""
    own = {p for group in optimizer.param_groups for p in group["params"]}
    for n, p in ema.params.items():
        p.data.copy_(weights[n])
        ema.average[n].copy_(average[n])
        # In p's memory format: the fused kernel assumes equal strides.
        of_p = {kind: torch.empty_like(p).copy_(moments[f"{n}.{kind}"].reshape(p.shape))
                for kind in MOMENTS[:3] if f"{n}.{kind}" in moments}
        if f"{n}.step" in moments:
            of_p["step"] = moments[f"{n}.step"].to(p.device).reshape(())
        if of_p and p in own:
            optimizer.state[p] = of_p


def check_finite(tensors):
    """ValueError for weights {name: tensor} that are NaN, infinite, or too large for fp16."""
    sizes = torch.stack(torch._foreach_norm([t.detach() for t in tensors.values()], math.inf)).tolist()
    for name, size in zip(tensors, sizes):
        if not size <= LARGEST:
            raise ValueError(f"{name} has grown to {size:g}")


# ---- the log --------------------------------------------------------------------------------------------

class Log:
    """log.jsonl, one object a line, and with --wandb the same numbers there; from `step` on."""

    def __init__(self, path, args, step=0):
        trim_log(path, step)
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


def trim_log(path, step):
    """Make a log agree with a run at `step`: what isn't whole, what came later, and what stands there twice
    goes."""
    if not path.exists():
        return
    rows, content = {}, read_file(path)
    for line in content.removeprefix(codecs.BOM_UTF8).splitlines():
        try:
            row = json.loads(line)
            if type(row["step"]) is int and 0 <= row["step"] <= step:
                rows[row["step"], "lr" in row] = line + b"\n"        # a row of a step, one of its probe
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
    if b"".join(rows.values()) != content:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(rows.values()))


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

    def add_step(self, found_inf, skipped):
        """One more step; found_inf () is 1 where its gradient wasn't finite, skipped: [(cause, name)] of
        samples that could not be read."""
        total, in_a_row, most = self.nonfinite
        in_a_row = (in_a_row + 1) * found_inf
        self.nonfinite = torch.stack([total + found_inf, in_a_row, torch.maximum(most, in_a_row)])
        self.steps += 1
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
        if number > args.max_bad * step * args.batch + 10 * (args.max_bad > 0):
            first = "".join(f"\n  {cause}: {name}" for cause, name in names[:20])
            raise ValueError(f"{number} broken samples in {step * args.batch}: more than --max-bad "
                             f"{args.max_bad} allows ({counted(self.counts)}); the first of them:{first}")
        most = int(self.nonfinite[2])
        if most > args.max_nonfinite:
            raise ValueError(f"no finite gradient in {most} steps in a row, up to step {step} (seed "
                             f"{args.seed}): lower --lr ({args.lr}) or look at the samples before "
                             f"{step * args.batch}; {args.out} keeps the last state")


def counted(by_cause):
    """{cause: number} -> words."""
    return ", ".join(f"{n} {cause}" for cause, n in by_cause.items() if n) or "none"


# ---- the loop -------------------------------------------------------------------------------------------

def autocast(args, device):
    """bf16 autocast, with --bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


def train(args, device, stop):
    """Train one stage, resuming the run in --out. Returns False if a signal stopped it."""
    fixed = itertools.takewhile(lambda part: "{step}" not in part, Path(args.save).parts)
    check_writable(args.out)
    with nullcontext() if rank() > 0 else file_lock(Path(args.out) / ".lock"):
        for folder in filter(None, (Path(*fixed), args.cache)):
            check_writable(folder)
        with stop.within(0):
            run = Run(args, device)
        if run.step < args.steps:
            return run.loop(stop)
        if rank() == 0:                                              # a finished run can still be exported
            run.export()
        return True


class Run:
    """What is trained, with what, and how far it is: set up from the command line and the state in --out.

    saved: the step of the last state; problem: what became of neither state nor export then, or None.
    """

    def __init__(self, args, device):
        torch.manual_seed(args.seed)  # the same fresh weights on every process
        self.args, self.device, self.out = args, device, Path(args.out)
        self.stage = build_stage(args).to(device)
        micro = args.batch // args.accumulate // world_size()
        need_memory(3 * micro * self.stage.size ** 2, f"images of --batch {args.batch}")
        self.samples, held_out = open_samples(args, self.stage, device)
        self.test = held_out_batch(self.stage, held_out, device)
        self.optimizer, self.ema = make_optimizer(self.stage, args), EMA(self.stage.trained, args.ema)
        state = load_state(self.out, self.ema, self.optimizer, args)
        self.step, self.saved, self.problem = state.step, state.step, None
        if args.data and state.step == 0 and not args.force and self.test is not None:
            with torch.no_grad(), autocast(args, device):
                self.stage.check(self.test)
        if args.compile and self.stage.compile_target is not None:
            self.stage.compile_target.compile()
        self.net = self.stage
        if world_size() > 1:  # with conversations, a batch may need only some parameters
            self.net = DistributedDataParallel(self.stage, find_unused_parameters=bool(self.stage.converse))
        if rank() == 0:
            announce(args, self.stage, self.ema, self.samples, state)
        self.log = Log(self.out / "log.jsonl", args, state.step) if rank() == 0 else None
        self.meter = Meter(state.counts, device)
        self.stage.trained.train()

    def loop(self, stop):
        """All steps that are left, with states and lines of the log between them. Returns False if a signal
        ended it; raises ValueError if the last state or export could not be written."""
        args, ema, optimizer, meter, halt = self.args, self.ema, self.optimizer, self.meter, False
        patience, first = None if dist.is_initialized() else GRACE, self.step    # several stop together
        bar = tqdm(total=args.steps, initial=self.step, disable=self.log is None or args.quiet, unit="step")
        with reading(batches(self.samples, self.stage, self.step, args, self.device)) as loader:
            while self.step < args.steps and not halt:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(self.step, args)
                try:
                    with stop.within(patience):
                        losses, skipped = self.gradient(loader)
                except Stopped:
                    break
                norm = nn.utils.clip_grad_norm_(list(ema.params.values()), args.clip)    # of all processes
                found_inf = local_optimizer(optimizer).found_inf = (~norm.isfinite()).float()
                with autocast(args, self.device):                    # Newton-Schulz in bf16, as published
                    optimizer.step()
                ema.update()
                optimizer.zero_grad(set_to_none=True)
                meter.add_step(found_inf, skipped)
                self.step += 1
                bar.update()
                self.estimate(self.step - first)
                if self.step % args.log_every == 0 or self.step == args.steps:
                    row = meter.row(self.step, args)
                    row |= {"lr": optimizer.param_groups[0]["lr"], "grad": float(norm)}
                    if self.log is not None:
                        self.log.write(row)
                        bar.set_postfix({name: f"{row[name]:.4f}" for name in losses if name in row})
                halt = stop.agreed()
                if self.step % args.save_every == 0:
                    self.save()
            if self.step > self.saved:
                self.save()
        stop.wait()
        bar.close()
        if self.problem:
            raise ValueError(f"the run ended at step {self.step}, but its last state or export could not be "
                             f"written: {self.problem}; the same command tries again")
        return self.step >= args.steps

    def estimate(self, done):
        """After `done` steps since the start, 6 of them, say how long the others will take."""
        if done == 1:                            # compiles, fills caches
            self.began = time.time()
        left = self.args.steps - self.step
        if done == 6 and left and self.log is not None:
            seconds = (time.time() - self.began) / 5
            tqdm.write(f"{seconds:.2g} s a step: about {math.ceil(seconds * left / 60)} minutes for the "
                       f"{left} steps that are left")

    def gradient(self, loader):
        """Forward and backward of all micro-batches of a step; returns the last one's losses, and the
        (cause, name) of all that was skipped. Raises ValueError for samples that can't be used."""
        args, skipped = self.args, []
        for micro in range(args.accumulate):
            before, last = time.time(), micro == args.accumulate - 1
            batch = next(loader)
            if isinstance(batch, ValueError):
                raise batch
            batch = to_device(batch, self.device)
            self.meter.waited += time.time() - before
            skipped += batch.pop("skipped")
            # Gradients are reduced once a step, with the last micro-batch.
            with nullcontext() if last or not dist.is_initialized() else self.net.no_sync():
                with autocast(args, self.device):
                    losses = self.net(batch)
                loss = (sum(value for name, value in losses.items() if name[0] != "_") / args.accumulate)
                loss.backward()
            self.meter.add(losses, 1 / args.accumulate)
        return losses, skipped

    def save(self):
        """Write the state, then, with the averaged weights, the probe, the preview and the exported model;
        every process calls it. What can't be written is said, and the rest goes on: a full disk must not
        end a run of days. Raises ValueError for weights that nobody can use: the last state is kept."""
        began, out, step, log = time.time(), self.out, self.step, self.out / "log.jsonl"
        try:
            check_finite(self.ema.params)
            check_finite(self.ema.average)
        except ValueError as error:
            raise ValueError(f"{error} after step {step}: lower --lr ({self.args.lr}); {out} keeps the last "
                             "state") from None
        problems = [attempt(f"state of step {step}", save_state, out, step, self.ema, self.optimizer,
                            self.args, self.meter.totals(), len(self.samples.source))]
        if rank() == 0:
            from evals.charts import save_curves
            if self.test is not None:
                attempt(f"probe of step {step}", self.evaluate)
            problems.append(attempt(f"model of step {step}", self.export))
            attempt("curves", save_curves, log, out / "curves.png")
        if self.stage.query_states is not None:
            attempt("query states", self.stage.query_states.flush)
        barrier()
        self.saved, self.problem = step, "; ".join(filter(None, problems))
        self.meter.since += time.time() - began                      # samples/s exclude saving

    @torch.no_grad()
    def export(self):
        """Write the averaged weights into the model folder that --save names."""
        folder = Path(self.args.save.replace("{step}", f"{self.step:06d}"))
        folder.mkdir(parents=True, exist_ok=True)
        with averaged_weights(self.stage, self.ema):
            if self.test is not None:
                self.stage.calibrate(self.test)
            self.stage.export(folder)

    @torch.no_grad()
    def evaluate(self):
        """The probe into the log, the preview into a PNG, both of held-out samples."""
        # Eager: probes have other batch sizes, and recompiling would not pay.
        with averaged_weights(self.stage, self.ema), autocast(self.args, self.device), \
                torch.compiler.set_stance("force_eager"):
            numbers = {k: round(float(v), 4) for k, v in self.stage.probe(self.test).items()}
            rows = self.stage.preview(self.test)
        if numbers:
            self.log.write({"step": self.step, **numbers})
            tqdm.write(f"step {self.step}  " + "  ".join(f"{k[1:]} {v}" for k, v in numbers.items()))
        if rows:
            from evals.charts import save_grid
            save_grid(rows, self.out / f"preview-{self.step:06d}.png")


def attempt(what, write, *inputs):
    """write(*inputs) -> None, or, after saying so, why it could not be written."""
    try:
        write(*inputs)
        return None
    except (OSError, ValueError, SafetensorError) as error:
        if rank() == 0:
            tqdm.write(f"the {what} could not be written: {sentence(error)}")
        return sentence(error)


def need_memory(numbers, what):
    """ValueError for so many numbers in fp32 that this machine can't hold them: it would end the process."""
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if 4 * numbers > memory:
            raise ValueError(f"{what} take {4 * numbers / 2 ** 30:,.0f} GiB of memory, this machine has "
                             f"{memory / 2 ** 30:,.0f} GiB")


def announce(args, stage, ema, samples, state):
    """Print a summary of the run, and where each part of the model comes from."""
    millions = sum(p.numel() for p in ema.params.values()) / 1e6
    print(f"stage {args.stage}: {millions:.2f} M trained parameters, {args.steps} steps of {args.batch}, "
          f"{'from step ' + str(state.step) if state.step else 'from the start'}, in {args.out}")
    for part, source in stage.parts.items():
        going_on = state.step and not source.startswith(("frozen", "absent"))
        print(f"  {part + ':':<16}{'resumed from ' + args.out if going_on else source}")
    print(f"  {'saved to:':<16}{args.save}")
    changed = changed_flags(state, args, NEW) if state.step else []
    if state.samples not in (None, len(samples.source)):
        changed.append((f"{state.samples} samples in --data", str(len(samples.source))))
    if changed:
        print("changed since: " + ", ".join(map(" -> ".join, changed)))
    if state.step > args.steps:
        print(f"{state.step} steps are done, more than --steps {args.steps}: there is nothing to train")
    if args.zero and world_size() == 1:
        print("--zero divides moments among processes: one process keeps them all")
    if args.data:
        source = samples.source
        held_out, n = len(source.held_out), len(source)
        print(f"  {'samples:':<16}{n}, {held_out} of them ({held_out / n:.1%}) held out; "
              f"left out: {counted(source.left_out)}")
    if args.device == "cpu" and args.bf16 and torch.backends.mkldnn.is_available() and \
            not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("this CPU computes bf16 by way of fp32, which is slower: leave out --bf16")


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


# ---- the command line -----------------------------------------------------------------------------------

SAME, NEW, FREE = "must match", "may change", "has no effect on the weights"
GENERATION = ("1", "2")
# What a flag may need besides its stages, and the message where that is missing.
NEEDS = {
    "data": "goes with --data, not with the synthetic world",
    "dry_run": "goes with --dry-run",
    "flow": "belongs to flow matching: --design clip-mse has none",
    "frozen": "needs a frozen language model: leave out --joint",
    "fresh": "is for a fresh generator, but that of --init is trained further: add --fresh",
}


class Flag(NamedTuple):
    """What a run makes of a flag: its default; may a resumed run have another value; the stages in which it
    has an effect; what else it needs, a key of NEEDS."""
    default: object
    resume: str
    stages: tuple
    needs: tuple


def some_text(text):
    """The `type` of a flag that names something."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def make_parser():
    """(the parser, {name: Flag}): the ONE table of all flags, their ranges, and where they belong."""
    raw, flags = argparse.RawDescriptionHelpFormatter, {}
    parser = Parser("train.py", description=__doc__, formatter_class=raw)

    def add(flag, help=None, resume=FREE, stages=STAGES, needs=(), default=None, **options):
        if "action" not in options and "choices" not in options:
            options.setdefault("type", some_text)
        action = parser.add_argument(flag, help=help, default=argparse.SUPPRESS, **options)
        flags[action.dest] = Flag(default, resume, stages, needs)
    switch, optional = {"action": "store_true", "default": False}, {"action": argparse.BooleanOptionalAction}
    count, fraction = number(int, COUNT), number(float, Interval(0, below=1))
    add("--stage", "all: with --data, one after the other what --init and --eva lack, and stage 1",
        resume=SAME, required=True, choices=[*STAGES, "all"])
    # what to read and write
    add("--data", "tar shards, folders, JSONL, CSV or patterns, comma-separated, maybe with =fraction. "
        "Default: the miniature's world", SAME)
    add("--world", "options of the synthetic world, as in objects=2,edit=0.2: see miniature/tasks.py", SAME)
    add("--short-caption", "probability of a sample's short caption", SAME, ("clip", "0", "1", "2"),
        type=number(float, FRACTION))
    add("--cache", "folder for what frozen encoders make of --data: computed once, then never again", NEW,
        ("decoder", "1", "2"), ("data",))
    add("--init", "model folder to start from; what it lacks starts from random weights. Default: "
        "weights/nano, but random weights for what this stage trains (stage 2 trains on)", SAME)
    add("--fresh", "random weights for what this stage trains, whatever --init has of it", SAME, **switch)
    add("--eva", "folder with EVA-CLIP and the diffusion-decoder, if --init has none", SAME, GENERATION)
    add("--save", "model folder that gets the trained parts at every checkpoint; with {step}: one for each. "
        "Default: OUT/model")
    add("--out", "folder of the run (state, log, images); a run in it goes on. Default runs/STAGE")
    add("--resume", "refuse to start anew: there must be a run in --out to go on with", **switch)
    add_recipe(add, switch, count, fraction)
    # the machine
    add("--device", None, NEW, default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--bf16", "products in bf16 (autocast). Default: on a GPU; CPUs with avx512_bf16 or AMX gain, too",
        NEW, **optional)
    add("--compile", "torch.compile of the heaviest part. Default: on CUDA", NEW,
        ("clip", "vae", "decoder", "1", "2"), ("flow",), **optional)
    add("--checkpointing", "recompute activations in the backward pass instead of keeping them", NEW,
        ("0", "1", "2"), **switch)
    add("--zero", "each process keeps a part of the optimizer's moments (ZeRO-1)", NEW, **switch)
    add("--workers", "processes that read images, for each training process", default=0,
        type=number(int, Interval(0, 1024)))
    add("--force", "train, though encoder and decoder lose what the images show", FREE, GENERATION,
        ("data",), **switch)
    add("--max-bad", "fraction of broken samples (and ten more) above which the run stops; 0: at the first",
        needs=("data",), default=0.01, type=number(float, FRACTION))
    add("--log-every", default=20, type=count)
    add("--save-every", default=500, type=count)
    add("--wandb", "project of Weights & Biases that gets the log, too (needs the package wandb)")
    add("--quiet", "no progress bar", **switch)
    add("--dry-run", "train nothing: print what is trained, and what memory and time it takes", **switch)
    add("--gpus", "--dry-run: number of GPUs", needs=("dry_run",), default=1,
        type=number(int, Interval(1, 10 ** 6)))
    return parser, flags


def add_recipe(add, switch, count, fraction):
    """The flags of what is learnt, and how; defaults by stage."""
    def generation(flag, help, needs=(), **options):
        add(flag, help, SAME, GENERATION, needs, **options)
    generation("--design", "section 3.3: flow matching or regression of CLIP features, or flow matching of "
               "VAE latents. Default: that of --init, else clip-fm",
               choices=["clip-fm", "clip-mse", "vae-fm"])
    generation("--joint", "fraction of conversations; the language model is trained, too", default=0.0,
               type=fraction)
    generation("--reconstruct", "fraction of samples whose prompt is the image itself (stage 2 of the "
               "world: 0.1)", type=fraction)
    generation("--draws", "noises and times of each sample, for one pass of the language model over its "
               "prompt", ("flow",), default=1, type=number(int, Interval(1, 1000)))
    generation("--dit", "other sizes for a fresh DiT: fields of DiTConfig, as in dim=192,rope=2d",
               ("flow", "fresh"))
    generation("--queries", "number of fresh latent queries, instead of those of --init", ("fresh",),
               type=number(int, Interval(1, MAX_TOKENS)))
    generation("--freeze-queries", "don't train the queries; with --cache, each prompt of --data runs "
               "through the language model only once", ("frozen",), **switch)
    generation("--paper", "the paper's recipe (stages 1 and 2) instead of the nano one", **switch)
    add("--steps", None, NEW, type=count)
    add("--batch", "samples of one step, over all processes", SAME, type=number(int, Interval(1, 10 ** 6)))
    add("--lr", "peak learning rate", NEW, type=number(float, POSITIVE))
    add("--ema", "decay of the averaged weights", NEW, type=fraction)
    add("--accumulate", "micro-batches of one step", NEW, default=1, type=count)
    add("--optimizer", "muon: orthogonalised steps for hidden matrices, AdamW for the rest", SAME,
        choices=["adamw", "muon"])
    generation("--drop", "stages 1, 2: probability of the null condition", ("flow",), default=0.1,
               type=number(float, FRACTION))
    generation("--shift", "shift of time toward noise for a fresh DiT. Default 5; with --paper 1",
               ("flow", "fresh"), type=number(float, Interval(1e-3, 1e3)))
    add("--seed", None, SAME, default=0, type=number(int, Interval(0, 2 ** 32 - 1)))


FLAGS = make_parser()[1]


def resolve(given, later=None):
    """The flags {name: value} that were given -> all of them; what the recipe of the stage leaves open is
    filled in here. args.given: the names of those that were given; later: a model folder that will be there
    when the run begins. ValueError for flags that contradict each other."""
    args = argparse.Namespace(**{name: flag.default for name, flag in FLAGS.items()} | given)
    args.given = sorted(given)
    check_use(args, {"data": args.data, "dry_run": args.dry_run, "flow": args.design != "clip-mse",
                     "frozen": not args.joint})
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
    args.eva = args.eva or args.init
    if "{step}" in args.out:
        raise ValueError("--out is one folder for all steps: {step} belongs to --save")
    args.save = args.save or f"{args.out}/model"
    for name in ("init", "eva"):
        if getattr(args, name) not in (None, later):
            setattr(args, name, existing_model(getattr(args, name), name))
    choose_device(args)
    choose_task(args)
    dit_fields(args.dit)
    return args


def runs_of(argv):
    """The flags [{name: value}] of each run that a command line asks for."""
    given = vars(make_parser()[0].parse_args(argv))
    if given["stage"] != "all":
        return [given]
    from miniature.pretrain import plan
    return plan(given)


def existing_model(path, name):
    """The model folder that the flag --name means; ValueError if there is none."""
    if not Path(path).is_dir():
        raise ValueError(f"there is no model folder at {path} (--{name})")
    return str(model_folder(path))


def check_use(args, facts):
    """ValueError for a flag that was given, but has no effect here. facts: {key of NEEDS: is it so?}, those
    that are known. The value that changes nothing may be given everywhere."""
    for name in args.given:
        flag, value = FLAGS[name], getattr(args, name)
        if value is False or value == flag.default:
            continue
        if args.stage not in flag.stages:
            *others, last = flag.stages
            raise ValueError(f"--{name.replace('_', '-')} belongs to stages {', '.join(others)} and {last}, "
                             f"not to stage {args.stage}")
        for need in flag.needs:
            if not facts.get(need, True):
                raise ValueError(f"--{name.replace('_', '-')} {NEEDS[need]}")


def choose_device(args):
    """Fill in the device and what depends on it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = "cuda" if available["cuda"] else "cpu"
    if not available[args.device]:
        raise ValueError(f"--device {args.device}, but torch finds no such device here: use --device cpu")
    args.bf16 = args.device != "cpu" if args.bf16 is None else args.bf16
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    if args.stage == "vae" and args.device == "cpu" and args.bf16 and args.compile:
        raise ValueError("--compile and --bf16 together lose the VAE's gradients on a CPU (PyTorch 2.13): "
                         "leave one of them out")
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
        args.world = parse_options(args.world, args.stage, has_vision)
        edit = args.world["edit"]
    if args.reconstruct + edit >= 1:
        raise ValueError("--reconstruct and --world edit are fractions of the samples: together below 1")
    args.prompt_images = args.reconstruct + edit > 0
    if args.cache and (args.joint or args.prompt_images):
        raise ValueError("--cache keeps features, not images: it doesn't go with --joint and --reconstruct, "
                         "which show the images to the language model")


def main(argv=None):
    """Set up the processes and train. Returns the exit code: 2, and one sentence, for a user's mistake."""
    return run_command("train.py", partial(run, argv))


def set_up(args, processes, local_rank):
    """The device of this process, ready to train; ValueError if --batch doesn't divide among processes."""
    if args.batch % (processes * args.accumulate):
        raise ValueError(f"--batch {args.batch} must divide by processes ({processes}) x --accumulate "
                         f"({args.accumulate})")
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if processes > 1 and not dist.is_initialized():
        init_distributed(device)
    return device


def run(argv):
    """What the command line asks for; ValueError if that makes no sense."""
    stop = StopRequest()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Steady(stream) for stream in streams)
    try:
        with stop.within(0):
            processes, number, local_rank, _ = environment()
            lines = runs_of(argv)
            later = lines[0]["save"] if len(lines) > 1 else None
            runs = [resolve(flags, later) for flags in lines]        # report mistakes before training
            if len(runs) > 1 and not number:
                print(f"stages to train, one after the other: {', '.join(args.stage for args in runs)}")
            if len(runs) > 1 and not any(states(Path(args.out)) for args in runs) and \
                    "0" in [args.stage for args in runs]:            # a language model needs one
                from miniature.pretrain import save_tokenizer
                save_tokenizer(runs[0].data, Path(runs[0].save))
        for args in runs:
            with stop.within(0):
                if args.dry_run:
                    args.gpus = max(args.gpus, processes)
                    from evals.estimate import estimate_training
                    return estimate_training(args)
                device = set_up(args, processes, local_rank)
            if not train(args, device, stop):
                print(f"stopped; the same command goes on from {args.out}")
                break
            barrier()                                    # the next stage reads what this one wrote
        if processes > 1:
            dist.destroy_process_group()
    except Stopped:
        print("stopped before the first step of this start: the same command starts again, or goes on")
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = streams
        stop.close()


if __name__ == "__main__":
    from train import main as run_as_module  # not __main__: miniature/pretrain.py imports `train`, too
    sys.exit(run_as_module())
