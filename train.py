"""Every stage of training, one loop.

    python train.py --stage clip    --save runs/nano      # EVA-CLIP tower and a text tower, from scratch
    python train.py --stage vae     --save runs/nano      # pixels <-> latents
    python train.py --stage 0       --save runs/nano      # understanding: Qwen2.5-VL learns to read, look and answer
    python train.py --stage decoder --init runs/nano --save runs/nano      # 64 features -> latents (UNet); needs clip, vae
    python train.py --stage 1       --init runs/nano --save runs/nano      # 64 queries + DiT; needs clip, 0
    python train.py --stage 2       --init runs/nano --save runs/nano      # the same, on short prompts
    python train.py --stage 1 --design vae-fm                              # Figure 3; also clip-mse
    python train.py --stage 1 --joint 0.5                                  # Figure 5: the language model learns along
    python train.py --stage 1 --data 'shards/*.tar' --cache runs/features  # your pictures; --dry-run: what will it take?

The paper trains stages 1 and 2 and takes the other parts from Qwen2.5-VL, EVA-CLIP and Emu2; a nano model has nobody to
take them from. Without --data the pictures are the synthetic world of data.py. `torchrun --nproc_per_node=2 train.py ...`
runs the same on two processes. A run stopped by anything goes on with the same line.

What is trained (everything else is frozen):
    clip     EVA-CLIP tower (+ text tower)          0   Qwen2.5-VL: vision tower, language model; queries
    vae      VAE encoder and decoder                1   latent queries and DiT
    decoder  SDXL UNet                              2   latent queries and DiT
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
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import flow
from clip_decoder import (CLIP, PRESETS as DECODER_PRESETS, EvaClip, EulerSchedule, PixelDecoder, UNet, VAE,
                          read_json, write_json)
from model import BLIP3o, DiTConfig, PRESETS, component, preset, read_headers

NANO = Path(__file__).parent / "weights" / "nano"                   # what a clone ships
VOCABULARY = 512                                                    # upper limit of the nano tokenizer's size

# Steps and guidance that suit what is trained at nano size; saved with the weights, sample.py takes them from there.
NANO_SAMPLING = {"steps": 30, "cfg": 2.0, "decoder_steps": 10, "decoder_cfg": 1.0}

# The recipe of each stage at nano size (two CPU cores); every number is a flag of the same name. `lr` falls from its peak
# to `min_lr` along a cosine, after `warmup` steps. The paper's stage 1: 1e-4 to 1e-5, batch 512, 150k steps; stage 2:
# 1e-4 to 0, 10k steps (see --paper).
RECIPES = {
    "clip":    dict(steps=3000, batch=64, lr=2e-3, min_lr=2e-5, warmup=100, ema=0.999, optimizer="adamw", words=0.1),
    "vae":     dict(steps=3000, batch=16, lr=2e-3, min_lr=2e-5, warmup=100, ema=0.999, optimizer="adamw", words=0.1),
    "decoder": dict(steps=3500, batch=16, lr=2e-3, min_lr=2e-5, warmup=100, ema=0.999, optimizer="adamw", words=0.1),
    "0":       dict(steps=9000, batch=16, lr=2e-3, min_lr=2e-5, warmup=100, ema=0.999, optimizer="muon", words=0.3),
    "1":       dict(steps=3200, batch=128, lr=2e-3, min_lr=5e-5, warmup=100, ema=0.999, optimizer="muon", words=0.0),
    "2":       dict(steps=800, batch=128, lr=1.2e-3, min_lr=0.0, warmup=50, ema=0.999, optimizer="muon", words=0.2),
}
PAPER = {
    "1": dict(steps=150_000, batch=512, lr=1e-4, min_lr=1e-5, warmup=450, ema=0.9999, optimizer="adamw", words=0.0),
    "2": dict(steps=10_000, batch=512, lr=1e-4, min_lr=0.0, warmup=30, ema=0.9999, optimizer="adamw", words=0.0),
}


# ----------------------------------------------------------------------------------------------------------------------
# Stages: what a batch is, what its losses are, what is saved
# ----------------------------------------------------------------------------------------------------------------------
class Stage(nn.Module):
    """One stage: `trained` (a module whose parameters with requires_grad learn), collate, forward -> losses, export.

    forward(batch) returns {name: scalar}; the sum is minimised.
    """
    size = 64                       # side of the pictures that this stage reads
    captions = None                 # of the world. True: long captions, False: short ones, None: a mixture
    talk = False                    # does it learn from conversations, too? Else each sample must have a caption
    query_lr = 1.0                  # learning rate of the queries, as a share of the others'

    def __init__(self):
        super().__init__()
        self.heavy = None           # the part whose shapes never change: what torch.compile gets

    def collate(self, samples):
        """A list of data.Samples items -> a dict of tensors, and `skipped`: (cause, name) of each broken item among them.

        Of a row of broken items only the first stands at this sample's own position; the others are counted at theirs.
        """
        batch = {"skipped": [bad for s in samples for bad in s["skipped"][:1]]}
        if "image" in samples[0]:
            batch["pixels"] = data.to_pixels(np.stack([s["image"] for s in samples]))
        if "frozen" in samples[0]:                                   # from --cache
            batch["frozen"] = {key: torch.stack([s["frozen"][key] for s in samples]) for key in samples[0]["frozen"]}
        return batch

    def encode(self, pixels):
        """What frozen encoders make of pixels (B, 3, H, W), {name: (B, ...)}: what --cache keeps."""
        raise ValueError("--cache keeps what frozen encoders make of pictures: this stage has none")

    @torch.no_grad()
    def frozen(self, batch):
        """`encode` of a batch, from the cache if it has been there."""
        return batch["frozen"] if "frozen" in batch else self.encode(batch["pixels"])

    def held_out(self, samples):
        """The batch that preview and probe get."""
        return self.collate(samples)

    def export(self, folder):
        """Write the trained parts into the model folder `folder`; what else lies there stays."""
        raise NotImplementedError

    def preview(self, batch):
        """A list of rows of pictures (B, 3, H, W) in [0, 1] to look at, or None."""

    def probe(self, batch):
        """Further numbers for the log, measured on a held-out batch without gradient."""
        return {}


def unit_normal(samples, *shape):
    """Noise (B, *shape) of the samples' own: the same on any number of processes."""
    return torch.from_numpy(np.stack([s["rng"].standard_normal(shape, dtype=np.float32) for s in samples]))


def show(pixels):
    """Normalised pixels -> [0, 1] for the eye."""
    return (data.to_signed(pixels) / 2 + 0.5).clamp(0, 1)


class ClipStage(Stage):
    """EVA-CLIP from scratch: contrastive (Radford et al. 2021), plus what makes its features fit for a flow."""
    captions = True

    def __init__(self, init, args):
        super().__init__()
        self.tokenizer = tokenizer_of(init)
        config = DECODER_PRESETS["nano"]["clip"]
        self.size, self.trained = config.image_size, CLIP(config, self.tokenizer.vocab_size)
        if holds(init, "clip") and not args.fresh:
            self.trained.visual = EvaClip.from_pretrained(init)
        self.heavy = self.trained.visual

    def collate(self, samples):
        ids, mask = data.pad([self.tokenizer.encode(s["caption"])[:128] for s in samples])
        noise = unit_normal(samples, self.trained.visual.config.n_query, self.trained.visual.config.width)
        return {**super().collate(samples), "ids": ids, "mask": mask, "noise": noise}

    def forward(self, batch):
        losses = self.trained(batch["pixels"], batch["ids"], batch["mask"], drawn=batch["noise"])
        return {"pixels": 3 * losses["pixels"], "places": losses["places"], "contrastive": 0.3 * losses["contrastive"],
                "scale": 0.3 * losses["scale"]}

    def export(self, folder):
        self.tokenizer.save(folder)
        self.trained.visual.save_pretrained(folder, torch.float16)

    def probe(self, batch):
        image, text = self.trained.encode_image(batch["pixels"]), self.trained.encode_text(batch["ids"], batch["mask"])
        found = (image @ text.T).argmax(1) == torch.arange(len(image), device=image.device)
        places = self.trained.place_head(self.trained.visual.encode(batch["pixels"]))
        return {"_top1": found.float().mean(), "_psnr": psnr(self.preview(batch)[0], show(batch["pixels"])),
                "_place_error": F.mse_loss(places, self.trained.places.expand_as(places))}

    def preview(self, batch):
        side = math.isqrt(self.trained.visual.config.n_query)
        blocks = self.trained.pixel_head(self.trained.visual.encode(batch["pixels"])).transpose(1, 2)
        return [show(F.pixel_shuffle(blocks.unflatten(2, (side, side)), self.size // side)), show(batch["pixels"])]


class VaeStage(Stage):
    """The VAE: L1 reconstruction plus a little KL (Rombach et al. 2022, without the GAN, which plain shapes don't need)."""

    def __init__(self, init, args):
        super().__init__()
        self.size = DECODER_PRESETS["nano"]["clip"].image_size
        self.trained = VAE.from_pretrained(init) if holds(init, "vae") and not args.fresh else VAE(DECODER_PRESETS["nano"]["vae"])
        self.heavy = self.trained.to(memory_format=torch.channels_last)

    def collate(self, samples):
        side, channels = self.size // self.trained.factor, self.trained.config.latent_channels
        return {**super().collate(samples), "noise": unit_normal(samples, channels, side, side)}

    def forward(self, batch):
        target = data.to_signed(batch["pixels"]).to(memory_format=torch.channels_last)
        reconstruction, kl = self.trained(target, noise=batch["noise"])
        return {"l1": F.l1_loss(reconstruction, target), "mse": F.mse_loss(reconstruction, target), "kl": 1e-6 * kl}

    def export(self, folder):
        self.trained.save_pretrained(Path(folder) / "diffusion-decoder" / "vae", torch.float16)

    def probe(self, batch):
        self.trained.calibrate(data.to_signed(batch["pixels"]))      # unit-variance latents for the UNet
        return {"_psnr": psnr(self.preview(batch)[0], show(batch["pixels"]))}

    def preview(self, batch):
        target = data.to_signed(batch["pixels"])
        return [(self.trained.decode(self.trained.encode(target)) / 2 + 0.5).clamp(0, 1), show(batch["pixels"])]


class DecoderStage(Stage):
    """The pixel decoder as Emu2 trains it: SDXL's UNet learns to draw the image from frozen EVA-CLIP features.

    The features get a little noise of random strength, because at sampling time they come from the DiT, which errs
    (the noise-augmented decoder of RAE, arXiv 2510.11690, section 4).
    """

    def __init__(self, init, args):
        super().__init__()
        self.eva = frozen(EvaClip.from_pretrained(init, dtype=args.frozen_dtype))
        vae = frozen(VAE.from_pretrained(init))
        self.size, self.noise, self.max_weight = self.eva.config.image_size, args.feature_noise, args.max_weight
        unet = UNet.from_pretrained(init) if holds(init, "unet") and not args.fresh else UNet(DECODER_PRESETS["nano"]["unet"])
        self.heavy = self.trained = unet.to(memory_format=torch.channels_last)
        self.decoder = PixelDecoder(self.trained, vae, EulerSchedule())
        with torch.no_grad():                                        # the negative of guidance: a picture of the mean colour
            self.negative = self.eva.encode(torch.zeros(1, 3, self.size, self.size, dtype=args.frozen_dtype))

    def collate(self, samples):
        side, rngs = self.size // self.decoder.vae.factor, [s["rng"] for s in samples]
        level = torch.tensor([self.noise * rng.random() for rng in rngs], dtype=torch.float32)
        return {**super().collate(samples), "noise": unit_normal(samples, self.trained.config.in_channels, side, side),
                "t": torch.tensor([int(rng.integers(len(self.decoder.schedule.alpha_bar))) for rng in rngs]),
                "feature_noise": level.view(-1, 1, 1) * unit_normal(samples, self.eva.config.n_query, self.eva.config.width),
                "drop": torch.tensor([rng.random() < 0.1 for rng in rngs])}

    def forward(self, batch):
        found = self.frozen(batch)
        features = found["features"] + batch["feature_noise"].to(found["features"])
        return {"epsilon": self.decoder.loss(found["latents"], features, batch["drop"], negative=self.negative.to(features),
                                             max_weight=self.max_weight, t=batch["t"], noise=batch["noise"])}

    def encode(self, pixels):
        return {"features": self.eva.encode(pixels), "latents": self.decoder.vae.encode(data.to_signed(pixels))}

    def export(self, folder):
        self.decoder.save_pretrained(folder, torch.float16)

    def probe(self, batch):
        """PSNR of drawn pictures; and, much earlier to move, the error of the clean latents that the UNet sees through
        strong noise, given the picture's own features and another's."""
        z, features = self.decoder.vae.encode(data.to_signed(batch["pixels"])), self.eva.encode(batch["pixels"])
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
        found = {"_psnr": psnr(self.preview(batch)[0], show(batch["pixels"][:32]))}
        for t in (600, 800, 950):
            times, a = torch.full((len(z),), t, device=z.device), float(self.decoder.schedule.alpha_bar[t])
            for name, cond in ("true", features), ("shuffled", features.roll(1, 0)):
                added = self.decoder.added_conditions(cond, (self.size,) * 2, (self.size,) * 2, (0, 0))
                eps = self.trained(self.decoder.schedule.add_noise(z, noise, times), times, cond, *added)
                found[f"_{name}@{t}"] = F.mse_loss(eps, noise) * (1 - a) / a
        return found

    def preview(self, batch):
        features = self.eva.encode(batch["pixels"][:32])
        drawn = self.decoder.decode(features, None, 10, 1.0, latent_noise(self.decoder, len(features)))
        return [drawn, show(batch["pixels"][:32])]


class UnderstandingStage(Stage):
    """Stage 0: Qwen2.5-VL learns language and sight together. Real shards give captions to write; the world asks as well.

    Half of the world's conversations are about a picture: questions, whether it shows what a caption says, and somewhere
    among them a description of everything; or whether a spoilt picture shows what it would have shown (it doesn't).
    The other half tell captions in full (data.EXPAND): whatever a caption leaves open is decided, which sample.Pipeline.expand
    will ask for before it draws. That makes the language model bind each colour to its object while it reads: predicting
    captions alone never needs this, and the frozen states will have to tell the DiT who is red.

    And the states of the latent queries have to say it, in a way that a DiT can use. Left to chance they tell which words a
    prompt holds, hardly which belong together: exchanging two colours moved them by 2 % of what another prompt does, and the
    DiT learnt to draw bags of words. So the queries are taught here what to say (`tell`): one thing of the caption each, the
    things taking turns, as a sum of fixed random vectors for its words (data.code_of). The paper has no such loss; it has a
    language model of 7B, whose states hold conjunctions such as "red circle" after reading the internet.
    """
    talk = True
    questions = 4                   # in one conversation: the prompt is read once, so more questions cost little
    spoilt = 0.2                    # share of pictures with a thing that is neither this nor that

    def __init__(self, init, args, trained=None):
        super().__init__()
        self.tokenizer = tokenizer_of(init)
        self.size = DECODER_PRESETS["nano"]["clip"].image_size
        if trained is not None:
            self.trained = trained
        elif holds(init, "visual") and not args.fresh:
            self.trained = BLIP3o.from_pretrained(init, parts={"llm", "visual"} | heard(init))
        else:
            self.trained = BLIP3o(nano_config(self.tokenizer, dit=None))
        self.vision = self.trained.config.vision
        self.trained.config.expands |= not args.data                 # the world teaches it
        self.tell = 0 if self.trained.latent_queries is None else args.tell      # a bare Qwen2.5-VL has none to teach

    def collate(self, samples):
        turns, looks = zip(*map(self.task, samples))
        merged = (self.size // self.vision.patch_size // self.vision.spatial_merge_size) ** 2
        batch = {**super().collate(samples), **self.conversations(turns, [merged * look for look in looks])}
        batch |= look_at(batch["pixels"], looks, self.vision)
        if self.tell:
            asked, shown, told = zip(*map(self.request, samples))
            pads, size = [merged * show for show in shown], (self.trained.config.n_query, self.trained.config.text.hidden_size)
            batch["prompts"] = *data.pad([data.prompt_ids(self.tokenizer, *each) for each in zip(asked, pads)]), \
                *look_at(batch["pixels"], shown, self.vision).values()
            batch["told"] = torch.tensor([bool(things) for things in told])
            batch["codes"] = torch.from_numpy(np.stack([data.code_of(things, *size) for things in told]))
        return batch

    def conversations(self, turns, pads):
        """One list of turns and a number of image placeholders (0: no picture) for each row -> ids, mask, labels (B, L)."""
        rows = [data.chat_ids(self.tokenizer, t, [[n]] if n else []) for t, n in zip(turns, pads)]
        ids, mask = data.pad([r[0] for r in rows], self.tokenizer.special["<|endoftext|>"])
        targets, _ = data.pad([r[1] for r in rows], False)
        return {"ids": ids, "mask": mask, "labels": ids.where(targets, -100)}

    def task(self, sample):
        """(turns of one conversation, does it show the picture?)"""
        rng, scene = sample["rng"], sample.get("scene")
        if "turns" in sample:                                        # wherever LLaVA's mark is, the picture comes first
            turns = [(user.replace("<image>", "").strip(), said) for user, said in sample["turns"]]
            return turns, any("<image>" in user for user, _ in sample["turns"])
        if scene is None:
            return [(data.DESCRIBE, sample["caption"])], True
        if rng.random() < 0.5:
            if scene.things and rng.random() < self.spoilt:          # no caption is true of it, and nobody shall draw it again
                sample["image"], sample["spoilt"] = data.spoil(scene, rng, self.size), True
                return [(data.claim(scene, rng)[0], "no") for _ in range(self.questions)], True
            turns = [(data.claim if i % 2 else data.ask)(scene, rng) for i in rng.permutation(self.questions)]
            turns.insert(int(rng.integers(len(turns) + 1)), (data.DESCRIBE, data.describe(scene)))
            return turns, True
        turns = []
        for text, scene in ((sample["caption"], scene), *(self.read_of(rng) for _ in range(2))):
            asked, told = data.reworded(text, rng) if rng.random() < 0.5 else (text, data.things_told(text))
            turns.append((data.EXPAND.format(asked), data.in_full(scene, text, told)))
        return turns, False

    def read_of(self, rng):
        """(caption, scene) to read of, not to see: so a fifth of them has a pair of colour and shape that no picture shows."""
        scene = data.make_scene(0, int(rng.integers(10 ** 9)), novel=rng.random() < 0.2)
        return data.caption(scene, rng), scene

    def request(self, sample):
        """(a prompt to draw, does it show the picture?, the things that the queries shall tell): most of them captions, often in full or
        in other words, the others the picture, to be drawn again or with a change."""
        rng, scene, text = sample["rng"], sample.get("scene"), sample["caption"] or ""
        if scene is None or "spoilt" in sample or rng.random() < 0.6:
            form = rng.random() if scene else 1.0
            text, scene = self.read_of(rng) if scene and rng.random() < 0.2 else (text, scene)
            text = data.in_full(scene, text, data.things_told(text)) if form < 0.4 else text
            text, told = data.reworded(text, rng) if 0.4 < form < 0.7 else (text, data.things_told(text))
            return text, False, told
        asked, after = (data.RECONSTRUCT, scene) if rng.random() < 0.4 else data.edit(scene, rng)
        return asked, True, data.things_told(data.describe(after))

    def forward(self, batch):
        losses = {"text": self.trained(batch["ids"], batch["mask"], labels=batch["labels"], pixels=batch["patches"],
                                       grid_thw=batch["grid"])["text"]}
        if self.tell:
            wrong = self.trained.condition(*batch["prompts"]).float() - batch["codes"]                    # (B, n_query, D)
            losses["tell"] = self.tell * wrong.square().mean((1, 2))[batch["told"]]
        return {name: mean_over_ranks(each) for name, each in losses.items()}

    def export(self, folder):
        self.tokenizer.save(folder)
        self.trained.save_pretrained(folder, torch.float16)
        config, area = self.trained.config, self.size ** 2
        write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": config.eos_token_id,
                                                       "pad_token_id": config.pad_token_id})
        if not (folder / "preprocessor_config.json").exists():       # pictures of any size are looked at as in training
            write_json(folder / "preprocessor_config.json", {"min_pixels": area, "max_pixels": area})


class GenerationStage(Stage):
    """Stages 1 and 2: the frozen language model reads the prompt, the queries and the DiT learn to make its features.

    --design: what is made and how (section 3.3, Figure 3). clip-fm: flow matching makes CLIP features; clip-mse: a linear
    map of each query's state regresses one; vae-fm: flow matching makes the VAE's latents. --reconstruct: the share of
    samples whose prompt is the picture itself. --joint: that share of the samples are conversations instead, and the
    language model learns with the rest (section 3.4, Figure 5).

    As in every stage noise, time and dropping of the condition (probability 0.1, for classifier-free guidance) belong to the
    sample, not to the process: any number of ranks computes the same losses. The probe is the early warning: the loss close to noise with
    the true, a shuffled and no condition. While they are equal, the DiT doesn't listen to the prompt; pictures show it
    hours later.
    """
    bins = 5                        # the loss is logged by time, too: equal parts of [0, 1]

    def __init__(self, init, args):
        super().__init__()
        self.tokenizer, self.drop = tokenizer_of(init), args.drop
        self.captions = False if args.stage == "2" else None
        self.eva = frozen(EvaClip.from_pretrained(args.eva, dtype=args.frozen_dtype))
        self.decoder = frozen(PixelDecoder.from_pretrained(args.eva, dtype=args.frozen_dtype)) if holds(args.eva, "unet") else None
        self.size, self.reconstruct, self.edit = self.eva.config.image_size, args.reconstruct, args.edit
        self.draws = args.draws
        stored = BLIP3o.from_pretrained(init, "meta").config
        go_on = not args.fresh and stored.draws and args.design in (None, design_of(stored))
        looks = {"visual"} if args.joint or args.reconstruct or args.edit else set()
        drawn = {"regressor" if stored.mse_channels else "dit"} if go_on else set()
        dtype = torch.float32 if args.joint else args.frozen_dtype
        kept = heard(init) if go_on or not args.queries else set()
        self.trained = BLIP3o.from_pretrained(init, dtype=dtype, parts={"llm"} | looks | kept | drawn)
        taught = self.trained.latent_queries
        if not go_on:
            self.trained.add_generator(self.new_config(stored, args))
        if args.query_lr is not None:
            self.query_lr = args.query_lr
        elif taught is self.trained.latent_queries and self.trained.config.query_std < 0.1 and not args.joint:
            self.query_lr = 0.0                                      # one step of Adam would be a 15th of such small ones
        self.full = args.stage == "2" and self.trained.config.expands if args.full is None else args.full
        self.design, self.shift = design_of(self.trained.config), self.trained.config.shift
        if self.design == "vae-fm" and self.decoder is None:
            raise ValueError(f"design vae-fm makes a VAE's latents: {args.eva} has no diffusion-decoder (--eva names one)")
        for name, p in self.trained.named_parameters():
            learns = ("dit.", "regressor.") + ("latent_queries",) * (self.query_lr > 0)
            p.requires_grad_(bool(args.joint) or name.startswith(learns))
            p.data = p.data.float() if p.requires_grad else p.data
        for part in self.trained.dit, self.trained.llm:
            if part is not None:
                part.checkpointing = args.checkpointing
        self.heavy = self.trained.dit
        self.joint, self.talk = args.joint, bool(args.joint)
        self.understanding = UnderstandingStage(init, args, self.trained) if args.joint else None

    def new_config(self, stored, args):
        """The BLIP3oConfig of a fresh generator for the language model of `stored`: the nano DiT makes narrow features,
        the released one wide ones; --dit changes single fields."""
        nano, wide = PRESETS["nano"], self.eva.config.width >= 1024
        fields = {} if wide else {**nano["dit"]}
        n_query = args.queries or stored.n_query or (64 if wide else nano["n_query"])
        grid = math.isqrt(self.eva.config.n_query)
        fields |= dict(in_channels=self.eva.config.width, cond_dim=stored.text.hidden_size)
        if args.design == "vae-fm" and self.decoder is not None:
            vae = self.decoder.vae
            grid = self.size // vae.factor
            fields |= dict(in_channels=vae.config.latent_channels, patch_size=2)
        text = replace(stored.text, vocab_size=max(stored.text.vocab_size, self.tokenizer.vocab_size))
        common = dict(text=text, grid=grid, shift=args.shift, query_std=1.0 if wide else nano["query_std"], dit=None)
        if args.design == "clip-mse":
            return replace(stored, **common, n_query=grid ** 2, mse_channels=self.eva.config.width, latents=False)
        common["dit"] = DiTConfig(**{**fields, **dit_fields(args.dit)})
        return replace(stored, **common, n_query=n_query, mse_channels=None, latents=args.design == "vae-fm")

    def encode(self, pixels):
        """What the design makes of these pixels (B, 3, H, W): CLIP features (B, 64, C) or VAE latents (B, h w, C)."""
        if self.design == "vae-fm":
            return {"latents": self.decoder.vae.encode(data.to_signed(pixels)).flatten(2).transpose(1, 2)}
        return {"features": self.eva.encode(pixels)}

    def collate(self, samples):
        talks = [self.talk and bool(not s["caption"] or s["rng"].random() < self.joint) for s in samples]
        talk, drawn = ([s for s, talk in zip(samples, talks) if talk == which] for which in (True, False))
        batch = self.drawings(drawn, self.reconstruct, self.edit) if drawn else {}
        return {**batch, **({"talk": self.understanding.collate(talk)} if talk else {}),
                "skipped": [bad for s in samples for bad in s["skipped"][:1]]}

    def held_out(self, samples):
        return self.drawings(samples)

    def request(self, sample, reconstruct, edit):
        """(prompt, does it show the picture?, the picture that it asks for) of one sample."""
        chance = sample["rng"].random() if reconstruct or edit else 1.0
        if chance < reconstruct:
            return data.RECONSTRUCT, True, sample["image"]
        if chance < reconstruct + edit:
            asked, after = data.edit(sample["scene"], sample["rng"])
            return asked, True, data.draw(after, self.size)
        text, scene = sample["caption"], sample.get("scene")
        if self.full and scene:
            text = data.in_full(scene, text, data.things_told(text))
        return text, False, sample.get("image")                      # None where --cache has its features

    def drawings(self, samples, reconstruct=0.0, edit=0.0):
        """The batch of the samples that shall be drawn, a share `reconstruct` of them from the picture itself, a share `edit`
        with a change of it."""
        config, vision = self.trained.config, self.trained.config.vision
        asked, looks, wanted = zip(*(self.request(s, reconstruct, edit) for s in samples))
        pads = (self.size // vision.patch_size // vision.spatial_merge_size) ** 2 if any(looks) else 0
        ids, mask = data.pad([data.prompt_ids(self.tokenizer, text, pads * look) for text, look in zip(asked, looks)])
        shown = data.to_pixels(np.stack([s["image"] for s in samples])) if any(looks) else None
        samples = [s if image is None else {**s, "image": image} for s, image in zip(samples, wanted)]
        shape = (config.gen_hidden_size, config.grid, config.grid)
        t = torch.tensor([s["rng"].random() for s in samples for _ in range(self.draws)], dtype=torch.float32)
        x0, batch = unit_normal(samples, self.draws, *shape).flatten(0, 1), super().collate(samples)      # (B draws, ...)
        return {**batch, "ids": ids, "mask": mask, "captions": [s["caption"] for s in samples],
                "x0": x0, "t": flow.shift_time(t, self.shift),
                "drop": torch.tensor([s["rng"].random() < self.drop for s in samples for _ in range(self.draws)]),
                **(look_at(shown, looks, vision) if any(looks) else {"patches": None, "grid": None})}

    def forward(self, batch):
        # A part that no sample of this process has still has a loss, of no samples: the processes reckon together.
        found = {"mse" if self.trained.dit is None else "flow": torch.zeros(0, device=self.trained.latent_queries.device)}
        if "ids" in batch:
            (target,) = self.frozen(batch).values()
            found = self.trained(batch["ids"], batch["mask"], features=target, pixels=batch["patches"],
                                 grid_thw=batch["grid"], drop=batch["drop"], x0=batch["x0"], t=batch["t"])
        losses = {name: mean_over_ranks(each) for name, each in found.items()}
        if "flow" in found and "ids" in batch:                       # for the log: sums and numbers of the bins of t
            at = (batch["t"] * self.bins).long().clamp(max=self.bins - 1)
            each = torch.stack([found["flow"].detach(), torch.ones_like(batch["t"])])                     # (2, B)
            losses["_by_t"] = torch.zeros(2, self.bins, device=each.device).index_add_(1, at, each)
        if "talk" in batch:
            losses |= self.understanding(batch["talk"])
        elif self.talk:
            losses["text"] = mean_over_ranks(torch.zeros(0, device=self.trained.latent_queries.device))
        return losses

    def export(self, folder):
        self.tokenizer.save(folder)
        self.trained.save_pretrained(folder, torch.float16)
        config = read_json(folder / "config.json")
        if self.trained.config.shift != 1:                           # official weights keep the official numbers
            config["nano_blip3o"].setdefault("sampling", NANO_SAMPLING)
            write_json(folder / "config.json", config)

    def probe(self, batch):
        (target,), cond = self.encode(batch["pixels"]).values(), self.trained.condition(batch["ids"], batch["mask"])
        made = self.made(cond)
        mean = target.mean((0, 1))
        a, b = (F.normalize(y.mean(1) - mean, dim=1) for y in (made, target))                             # (B, C)
        found = {"_cosine": (a * b).sum(1).mean(),
                 "_retrieval": ((a @ b.T).argmax(1) == torch.arange(len(a), device=a.device)).float().mean()}
        if self.trained.dit is None:
            return found
        x1 = target.transpose(1, 2).unflatten(2, (self.trained.config.grid,) * 2)                         # (B, C, h, w)
        noise = torch.randn(x1.shape, generator=torch.Generator().manual_seed(0)).to(x1)

        def loss(t, cond, rows=slice(None)):
            times = torch.full((len(x1[rows]),), t, device=x1.device)
            return flow.flow_matching_loss(self.trained.dit, x1[rows], cond, drop=0, x0=noise[rows], t=times).mean()
        for t in (0.02, 0.05, 0.3):
            for name, c in ("true", cond), ("shuffled", cond.roll(1, 0)), ("null", torch.zeros_like(cond)):
                found[f"_{name}@{t}"] = loss(t, c)
        # Does the DiT know which colour belongs to which thing? The same words with two colours exchanged must fit worse.
        swapped = {i: text for i, c in enumerate(batch["captions"]) if (text := data.exchange_colours(c))}
        if swapped:
            ids, mask = to_device(data.pad([data.prompt_ids(self.tokenizer, c) for c in swapped.values()]), x1.device)
            rows = list(swapped)
            found |= {"_bound@0.15": loss(0.15, cond[rows], rows),
                      "_exchanged@0.15": loss(0.15, self.trained.condition(ids, mask), rows)}
        return found

    def made(self, cond):
        """The features (B, n, C) that are made of a condition, always from the same noise."""
        return self.trained.generate_features(cond, 10, 2.0, generator=torch.Generator().manual_seed(0))

    def preview(self, batch):
        if self.decoder is None:
            return None
        features = self.made(self.trained.condition(batch["ids"][:16], batch["mask"][:16]))
        if self.design == "vae-fm":
            z = features.transpose(1, 2).unflatten(2, (self.trained.config.grid,) * 2)
            drawn = (self.decoder.vae.decode(z) / 2 + 0.5).clamp(0, 1)
        else:
            drawn = self.decoder.decode(features, None, 10, 1.0, latent_noise(self.decoder, len(features)))
        return [drawn, show(batch["pixels"][:16])]


STAGES = {"clip": ClipStage, "vae": VaeStage, "decoder": DecoderStage, "0": UnderstandingStage,
          "1": GenerationStage, "2": GenerationStage}


def design_of(config):
    """The name of a BLIP3oConfig's design, as --design takes it; None if it can't draw."""
    return "clip-mse" if config.mse_channels else None if config.dit is None else "vae-fm" if config.latents else "clip-fm"


def dit_fields(spec):
    """--dit "dim=192,rope=2d" -> {"dim": 192, "rope": "2d"}; ValueError for what is no field of DiTConfig."""
    kinds, found = {f.name: f.type for f in fields(DiTConfig)}, {}
    for part in filter(None, (spec or "").split(",")):
        name, _, value = part.partition("=")
        try:
            found[name] = value if kinds[name] is str else float(value) if kinds[name] is float else int(value)
        except (KeyError, ValueError):
            raise ValueError(f"--dit takes {', '.join(kinds)}, as in dim=192,n_layers=8; not {part!r}") from None
    return found


def look_at(pixels, looks, vision):
    """The pixels (B, 3, H, W) of the rows where `looks` is True as Qwen's ViT takes them: {"patches", "grid"}, or None."""
    seen = torch.tensor([bool(look) for look in looks])
    if not seen.any():
        return {"patches": None, "grid": None}
    return dict(zip(("patches", "grid"), data.to_patches(pixels[seen], vision.patch_size, vision.spatial_merge_size)))


def mean_over_ranks(each):
    """Losses (n,), n of its own on every rank -> a scalar whose average over the ranks is the mean of all of them."""
    count = torch.tensor(float(len(each)), device=each.device)
    if dist.is_initialized():
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return each.sum() / count.clamp(min=1e-6)


def latent_noise(decoder, n):
    """The same n starting points (n, 4, h, w) for every preview."""
    side = decoder.unet.config.sample_size
    return torch.randn(n, decoder.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))


def holds(folder, part):
    """Does a model folder (or None) have this part: clip, vae, unet, or a component of BLIP3o as model.py names them?"""
    if folder is None:
        return False
    if part in ("vae", "unet"):
        return any((Path(folder) / base / part).is_dir() for base in ("diffusion-decoder", "."))
    if part == "clip":
        return (Path(folder) / "gen_vision_tower").is_dir()
    folder = Path(folder)
    stored = read_headers(folder) if any(folder.glob("model*.safetensors")) else {}
    return any(component(key) == part for key in stored)


def heard(folder):
    """{"queries"} if a model folder has trained queries."""
    return {"queries"} if holds(folder, "queries") else set()


def nano_config(tokenizer, **changes):
    """The BLIP3oConfig of the nano preset for a tokenizer: its vocabulary and the ids of its control tokens."""
    t = tokenizer.special
    return preset("nano", tokenizer.vocab_size, **changes, image_token_id=t["<|image_pad|>"], eos_token_id=t["<|im_end|>"],
                  vision_start_token_id=t["<|vision_start|>"], pad_token_id=t["<|endoftext|>"])


def frozen(module):
    """A module in evaluation mode without gradients."""
    return module.eval().requires_grad_(False)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    return -10 * (a - b).square().mean().log10()


def tokenizer_of(folder):
    """The tokenizer of a model folder; without one, a small BPE learnt from captions, questions and templates of the world."""
    if folder and (Path(folder) / "tokenizer.json").is_file():
        return data.Tokenizer.from_pretrained(folder)
    return data.train_tokenizer(data.world_texts(6000), VOCABULARY)


# ----------------------------------------------------------------------------------------------------------------------
# What frozen encoders make of the pictures, computed once
# ----------------------------------------------------------------------------------------------------------------------
class FeatureCache:
    """A source like data.Shards whose items hold what the stage's frozen encoders make of the picture, not the picture.

    Computed before the first step, in order, by all processes together; a second run or epoch never runs the encoder, and no
    picture is decoded again. Lies in folder/<name>, where the name is a hash of encoders, preprocessing and shards: it can't
    be stale, and whatever changes makes a new one. Parts of 1024 items, each written whole: what was made before a crash
    stays. Items whose picture can't be used raise the BadSample that the picture raised.
    """
    part = 1024

    def __init__(self, folder, stage, source, args, rank, world, device):
        if isinstance(source, data.World) or args.joint or args.reconstruct:
            raise ValueError("--cache keeps features, not pictures, of --data: it goes with neither the endless synthetic "
                             "world nor --joint and --reconstruct, which look at the pictures")
        self.source, self.opened = source, {}
        found = hashlib.sha256(f"{source.fingerprint()} {stage.size} square bicubic {args.design}".encode())
        learns = set(stage.trained.parameters())
        for name, p in stage.named_parameters():                     # a sample of every tensor of the frozen encoders
            if p not in learns:
                found.update(name.encode() + p.detach().flatten()[::max(1, p.numel() // 1024)].float().cpu().numpy().tobytes())
        self.folder = Path(folder) / found.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [i for i in range(math.ceil(len(source) / self.part)) if not self.file(i).exists()]
        for i in tqdm(missing[rank::world], desc=f"features into {self.folder}", disable=args.quiet or None):
            self.make(i, stage, args, device)
        if world > 1:
            dist.barrier()

    def __getattr__(self, name):
        return getattr(self.__dict__["source"], name)                # parts, locate, name, left_out: as the source has them

    def __len__(self):
        return len(self.source)

    def file(self, i):
        """The file of part i."""
        return self.folder / f"{i:06d}.safetensors"

    @torch.no_grad()
    def make(self, i, stage, args, device):
        """Encode the items of part i."""
        items = range(i * self.part, min((i + 1) * self.part, len(self.source)))
        loader = torch.utils.data.DataLoader(Pictures(self.source, stage.size), args.batch, sampler=items,
                                             num_workers=args.workers, collate_fn=list)
        rows, bad = {}, {}
        for at, batch in zip(range(items.start, items.stop, args.batch), loader):
            bad |= {str(at + j): image for j, image in enumerate(batch) if isinstance(image, tuple)}
            blank = np.zeros((stage.size, stage.size, 3), np.uint8)
            pixels = data.to_pixels(np.stack([blank if isinstance(image, tuple) else image for image in batch]))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                for key, value in stage.encode(pixels.to(device)).items():
                    rows.setdefault(key, []).append(value.cpu().contiguous())
        temporary = self.file(i).with_suffix(f".tmp{os.getpid()}")
        save_file({key: torch.cat(parts) for key, parts in rows.items()}, temporary, {"bad": json.dumps(bad)})
        os.replace(temporary, self.file(i))

    def __getitem__(self, i):
        """{"frozen": {name: tensor}, and the texts}; raises BadSample."""
        _, texts = self.source.read(i, texts_only=True)
        part, row = divmod(i, self.part)
        if part not in self.opened:
            file = safe_open(self.file(part), framework="pt")
            self.opened[part] = file, json.loads(file.metadata()["bad"])
        file, bad = self.opened[part]
        if str(i) in bad:
            raise data.BadSample(*bad[str(i)])
        return {"frozen": {key: file.get_slice(key)[row] for key in file.keys()}, **texts}


class Pictures(torch.utils.data.Dataset):
    """The items of a source as arrays (size, size, 3), or (cause, sentence) where one can't be used."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            return np.asarray(data.crop_square(self.source[i]["image"], self.size))
        except data.BadSample as error:
            return error.cause, str(error)


# ----------------------------------------------------------------------------------------------------------------------
# Averaged weights, and a run's state on disk
# ----------------------------------------------------------------------------------------------------------------------
class Muon(torch.optim.AdamW):
    """AdamW for everything but hidden matrices, which move along their orthogonalised momentum (Muon, Jordan et al. 2024).

    A matrix's step has the same size in every direction that its momentum spans, so rare directions learn as fast as common
    ones. Scaled by sqrt(larger side), the root mean square of a step doesn't depend on the matrix's shape, and both kinds
    share one learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2; their factor is 0.2, to resemble AdamW's steps;
    this small DiT learnt faster with 0.6). Groups with "matrices": True hold (m, n) parameters.
    """
    factor = 0.6

    @torch.no_grad()
    def step(self):
        """One step from the gradients; those of the matrices are gone afterwards."""
        for group in self.param_groups:
            shapes = {}
            for p in group["params"] if group.get("matrices") else ():
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():                     # matrices of one shape go through the products together
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(momenta, [p.grad for p in params], 0.05)
                nesterov = torch.stack([p.grad.lerp(m, 0.95) for p, m in zip(params, momenta)])      # (k, m, n)
                scale = group["lr"] * self.factor * math.sqrt(max(shape))
                for p, direction in zip(params, orthogonalise(nesterov)):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-scale)
                    p.grad = None                                    # AdamW passes over it
        super().step()


def orthogonalise(x, steps=5):
    """(k, m, n) -> the nearest semi-orthogonal matrices, roughly: five Newton-Schulz steps bring singular values near 1."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):  # an odd quintic of the singular values; Jordan's coefficients lift small ones fastest, to 0.7 - 1.2
        gram = x @ x.mT                                              # (k, m, m) with m the shorter side: the cheaper product
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if tall else x


class EMA:
    """Exponential moving average of the trained parameters, kept in fp32; its decay warms up as (1 + n) / (10 + n)."""

    def __init__(self, module, decay):
        self.decay, self.updates = decay, 0
        self.params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().float().clone() for n, p in self.params.items()}

    @torch.no_grad()
    def update(self):
        """One step towards the present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), [p.detach().float() for p in self.params.values()], 1 - decay)

    def swap(self):
        """Exchange the weights in use and the averaged ones; call it twice around whatever shall see the average."""
        for n, p in self.params.items():
            self.average[n], p.data = p.data.float(), self.average[n].to(p.dtype)


def moments_of(optimizer, names):
    """{"parameter.moment": tensor} of what this process holds: all, or with --zero its share. names: parameter -> name."""
    state = getattr(optimizer, "optim", optimizer).state
    return {f"{names[p]}.{key}": value.reshape(1) if value.ndim == 0 else value.contiguous()
            for p, moments in state.items() for key, value in moments.items()}


def save_state(out, step, ema, optimizer, args, counts, rank, device):
    """Write out/step-NNNNNN whole (temporary name, fsync, rename), point `latest` at it, keep the last two.

    model.safetensors (what is trained), ema.safetensors, optimizer.safetensors (with --zero optimizer-RANK.safetensors, from
    each process its share), state.json (step, counts and flags; the order of samples and all noise are functions of seed and
    step, so the step is all there is to know). Every process calls it. Raises OSError on all of them if one can't write.
    """
    name, temporary = f"step-{step:06d}", out / ".step.tmp"          # one name: what a crash leaves is overwritten
    names = {p: n for n, p in ema.params.items()}

    def begin():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({n: p.detach().contiguous() for n, p in ema.params.items()}, temporary / "model.safetensors")
        save_file({n: p.contiguous() for n, p in ema.average.items()}, temporary / "ema.safetensors")
        state = {"step": step, "updates": ema.updates, "counts": counts, "torch": torch.__version__,
                 "args": {k: v for k, v in vars(args).items() if k != "frozen_dtype"}}
        (temporary / "state.json").write_text(json.dumps(state, indent=1))

    def add_moments():
        if rank == 0 or args.zero:
            file = f"optimizer-{rank}.safetensors" if args.zero else "optimizer.safetensors"
            save_file(moments_of(optimizer, names), temporary / file)

    def publish():
        for file in temporary.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        shutil.rmtree(out / name, ignore_errors=True)
        os.replace(temporary, out / name)
        (out / "latest.tmp").write_text(name)
        os.replace(out / "latest.tmp", out / "latest")
        for old in sorted(out.glob("step-*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    for do, everybody in (begin, False), (add_moments, True), (publish, False):
        problem = None
        try:
            if everybody or rank == 0:
                do()
        except (OSError, SafetensorError) as error:
            problem = error
        if any_process(problem is not None, device):                 # nobody may wait for a process that has given up
            raise OSError(problem or "another process could not write its part")


def load_state(out, ema, optimizer, args):
    """Continue where `out` stopped: fills weights, averages and optimizer; returns (step, counts), (0, {}) if nothing is
    there.

    Raises ValueError if the run in `out` was started with other flags that change what is learnt.
    """
    if not (out / "latest").is_file():
        if args.resume:
            raise ValueError(f"--resume: there is no run in {out} to go on with")
        return 0, {}
    folder = out / (out / "latest").read_text()
    state = json.loads((folder / "state.json").read_text())
    for key in ("stage", "data", "short_caption", "seed", "batch", "init", "shift", "optimizer", "design", "joint",
                "reconstruct", "edit", "words", "things", "draws", "tell", "dit", "queries"):
        if state["args"].get(key, getattr(args, key)) != getattr(args, key):                 # older states know fewer flags
            raise ValueError(f"{out} holds a run with --{key.replace('_', '-')} {state['args'].get(key)}, not "
                             f"{getattr(args, key)}: choose another --out, or delete the folder to start anew")
    model, average = load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")
    moments = {}
    for file in folder.glob("optimizer*.safetensors"):               # one for each process that had a share of them
        moments |= load_file(file)
    if set(model) != set(ema.params):
        raise ValueError(f"the weights in {folder} are of another model than this stage trains: choose another --out")
    inner = getattr(optimizer, "optim", optimizer)
    own = {p for group in inner.param_groups for p in group["params"]}
    for n, p in ema.params.items():
        p.data.copy_(model[n])
        ema.average[n].copy_(average[n])
        found = {k: moments[f"{n}.{k}"].to(p.device).reshape(() if k == "step" else p.shape)
                 for k in ("step", "exp_avg", "exp_avg_sq", "momentum") if f"{n}.{k}" in moments}
        if found and p in own:
            inner.state[p] = found
    ema.updates = state["updates"]
    return state["step"], state.get("counts", {})


# ----------------------------------------------------------------------------------------------------------------------
# Pictures of a run
# ----------------------------------------------------------------------------------------------------------------------
def save_grid(rows, path, columns=16, scale=2):
    """Rows of pictures (B, 3, H, W) in [0, 1], the first `columns` of each, as one PNG."""
    grid = torch.cat([torch.cat(list(r[:columns].float().cpu()), 2) for r in rows], 1)
    image = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(path)


def save_curves(log, path):
    """Every number of log.jsonl over the steps as a small line chart each, together on one PNG."""
    series = {}
    for row in map(json.loads, log.read_text().splitlines()):
        for key, value in row.items():
            if isinstance(value, float) and math.isfinite(value):
                series.setdefault(key, []).append((row["step"], value))
    series = {key: points for key, points in series.items() if len(points) > 1}
    if series:
        tops = {key: np.quantile([y for _, y in points], 0.98) for key, points in series.items()}  # spikes hide it
        data.draw_charts([(f"{key.lstrip('_')}: {points[-1][1]:.4g} at step {points[-1][0]}", "",
                           {key: [(x, *(min(y, tops[key]),) * 3) for x, y in points]})
                          for key, points in series.items()], columns=3, size=(420, 220)).save(path)


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------
def learning_rate(step, args):
    """Linear warmup from 0, then a cosine from `lr` to `min_lr` at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * min(1, progress))) / 2


def batches(samples, stage, start, args, rank, world):
    """Micro-batches of this rank from step `start` on: step s uses the positions s * batch ... (s + 1) * batch - 1."""
    share = args.batch // world // args.accumulate
    plan = [range(s * args.batch + rank + m * share * world, s * args.batch + (m + 1) * share * world, world)
            for s in range(start, args.steps) for m in range(args.accumulate)]
    return torch.utils.data.DataLoader(samples, batch_sampler=plan, collate_fn=stage.collate, num_workers=args.workers)


def to_device(batch, device):
    """The tensors of a batch, a tree of dicts and tuples, on a device."""
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple):
        return tuple(to_device(v, device) for v in batch)
    return batch.to(device, non_blocking=True) if torch.is_tensor(batch) else batch


def connect(backend):
    """init_process_group that survives `torchrun --max_restarts`.

    torchrun keeps one store through all its restarts, so a new process would read where a dead one listened and call there.
    Rank 0 draws a new name for the keys of this start; the others go by the name that it returns under a key of their own.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    mine = os.urandom(8).hex()
    if rank == 0:
        store.set("start", mine)
        for other in range(1, world):
            store.set(store.get(f"{mine}/{other}").decode(), mine)
    else:
        while not store.check([mine]):                               # what "start" says may be an earlier start's, and change
            store.set(store.get("start").decode() + f"/{rank}", mine)
            time.sleep(0.1)
    start = mine if rank == 0 else store.get(mine).decode()
    dist.init_process_group(backend, store=dist.PrefixStore(start, store), rank=rank, world_size=world)


def from_all(value):
    """[value of rank 0, value of rank 1, ...]"""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def any_process(flag, device):
    """Is a flag set on any of the processes? They must leave the loop after the same step, or the others wait for ever."""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


class Log:
    """log.jsonl, one object a line, and with --wandb the same numbers there."""

    def __init__(self, path, args):
        self.path, self.file, self.remote = path, open(path, "a"), None
        if args.wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("--wandb needs the package wandb: pip install wandb") from None
            config = {key: str(value) for key, value in vars(args).items()}
            self.remote = wandb.init(project=args.wandb, config=config, name=args.out, resume="allow")

    def note(self, row):
        """One more line. A full disk costs the line, not the run."""
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            tqdm.write(f"{self.path}: {error}")
        if self.remote:
            self.remote.log(row, step=row["step"])


def optimizer_of(stage, args, world, device):
    """AdamW, or Muon for hidden matrices and AdamW for the rest; with --zero each process keeps a share of the moments."""
    named = {name: p for name, p in stage.trained.named_parameters() if p.requires_grad}
    queries = [named.pop("latent_queries")] if "latent_queries" in named else []
    groups = [{"params": list(named.values())}, {"params": queries, "share": stage.query_lr}]
    if args.optimizer == "muon":                                     # the head of a language model is no hidden matrix
        hidden = {m.weight for name, m in stage.trained.named_modules() if isinstance(m, nn.Linear) and name != "llm.lm_head"}
        groups += [{"params": [p for p in named.values() if p in hidden], "matrices": True}]
        groups[0] = {"params": [p for p in named.values() if p not in hidden]}
    groups = [group for group in groups if group["params"]]
    options = dict(lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay, fused=device.type == "cuda")
    if args.zero and world > 1:
        return ZeroRedundancyOptimizer(groups, optimizer_class=Muon, **options)
    return Muon(groups, **options)


class Meter:
    """What happened since the last line of the log, on this process: losses, samples that were passed over, time waited."""

    def __init__(self, counts):
        self.counts = Counter(counts)                                # causes -> broken samples, since the run began
        self.bad = []                                                # names of the first of them
        self.clear()

    def clear(self):
        """Begin a new line."""
        self.sums, self.steps, self.waited, self.since, self.new = {}, 0, 0.0, time.time(), Counter()

    def add(self, losses, share):
        """A micro-batch's losses, `share` of a step."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float().cpu() * (1 if name[0] == "_" else share)

    def skip(self, skipped):
        """[(cause, name)] of samples that could not be read."""
        self.new.update(cause for cause, _ in skipped)
        self.bad = (self.bad + skipped)[:20]

    def row(self, step, args):
        """The line of the log, the same on all processes; ValueError if more samples were broken than --max-bad allows."""
        ranks = from_all((self.sums, self.new, self.bad))
        for _, new, _ in ranks:
            self.counts.update(new)
        broken = {cause: n for cause, n in self.counts.items() if cause != "lost steps"}
        if sum(broken.values()) > args.max_bad * step * args.batch + 10:
            told = "".join(f"\n  {cause}: {name}" for cause, name in [name for _, _, bad in ranks for name in bad][:20])
            raise ValueError(f"{sum(broken.values())} broken samples in {step * args.batch}: more than --max-bad "
                             f"{args.max_bad} allows ({counted(broken)}); the first of them:{told}")
        row = {"step": step, "samples": step * args.batch}
        for name in dict.fromkeys(name for sums, _, _ in ranks for name in sums):
            total = sum(sums.get(name, 0) for sums, _, _ in ranks)
            if name == "_by_t":                                      # sums and numbers of samples in bins of t
                row |= {f"flow, t < {(i + 1) / len(total[0]):.1f}": float(error / n)
                        for i, (error, n) in enumerate(zip(*total)) if n > 0}
            else:
                row[name] = float(total) / len(ranks) / max(self.steps, 1)
        spent = time.time() - self.since
        row |= {"per_s": round(self.steps * args.batch / spent, 1), "wait": round(self.waited / spent, 3)}
        self.clear()
        return row | ({"skipped": dict(self.counts)} if self.counts else {})


def counted(by_cause):
    """{cause: number} -> words."""
    return ", ".join(f"{n} {cause}" for cause, n in by_cause.items() if n) or "none"


def train(args, rank, world, device):
    """Train one stage from wherever `--out` stands to `--steps`. Returns False if a signal stopped it before."""
    out, main = Path(args.out), rank == 0
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)                                     # the same fresh weights on every rank
    stage = STAGES[args.stage](args.init, args).to(device)
    source = data.open_source(args.data, stage.size, args.seed, words=args.words, most=args.things)
    kept = FeatureCache(args.cache, stage, source, args, rank, world, device) if args.cache else source
    samples = data.Samples(kept, stage.size, args.seed, stage.captions, args.short_caption, stage.talk)
    unseen = source if args.data else data.World(10 ** 6, stage.size, words=args.words, most=args.things)
    held_out = data.Samples(unseen, stage.size, 10 ** 6, stage.captions, args.short_caption, stage.talk)
    test = to_device(stage.held_out([held_out[i] for i in range(64)]), device)
    params = [p for p in stage.trained.parameters() if p.requires_grad]
    optimizer, ema = optimizer_of(stage, args, world, device), EMA(stage.trained, args.ema)
    step, counts = load_state(out, ema, optimizer, args)
    if args.compile and stage.heavy is not None:
        stage.heavy.compile()
    net = stage
    if world > 1:                                                    # in some stages a batch may happen to show no picture
        net = DistributedDataParallel(stage, device_ids=[device.index] if device.type == "cuda" else None,
                                      find_unused_parameters=args.stage == "0" or bool(args.joint))
    stopped = []
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: stopped.append(True))
    if main:
        print(f"stage {args.stage}: {sum(p.numel() for p in params) / 1e6:.2f} M trained parameters, "
              f"{args.steps} steps of {args.batch}, {'from step ' + str(step) if step else 'from the start'}, in {out}")
        if args.data:
            print(f"{len(source)} samples; left out: {counted(source.left_out)}")

    log = Log(out / "log.jsonl", args) if main else None
    bar = tqdm(total=args.steps, initial=step, disable=not main or args.quiet, unit="step", smoothing=0.05)
    loader = iter(batches(samples, stage, step, args, rank, world))
    meter, lost = Meter(counts), 0                                   # lost: steps in a row without a finite gradient
    stage.trained.train()
    halt = False
    while step < args.steps and not halt:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args) * group.get("share", 1)
        for _ in range(args.accumulate):
            before = time.time()
            batch = to_device(next(loader), device)
            meter.waited += time.time() - before
            meter.skip(batch.pop("skipped"))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                losses = net(batch)
            (sum(value for name, value in losses.items() if name[0] != "_") / args.accumulate).backward()
            meter.add(losses, 1 / args.accumulate)
        norm = nn.utils.clip_grad_norm_(params, args.clip)           # the gradients, and so the norm, are alike on all ranks
        if torch.isfinite(norm):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):       # Muon's products, as published
                optimizer.step()
            ema.update()
            lost = 0
        else:
            lost += 1
            meter.counts["lost steps"] += 1
            if lost > args.max_skipped:
                raise ValueError(f"no finite gradient in {lost} steps in a row, the last with the samples {step * args.batch} to "
                                 f"{(step + 1) * args.batch - 1} of seed {args.seed}: lower --lr ({args.lr}) or look at these "
                                 f"samples; {out} keeps the last state")
        optimizer.zero_grad(set_to_none=True)
        step, meter.steps = step + 1, meter.steps + 1
        bar.update()
        if step % args.log_every == 0 or step == args.steps:
            row = meter.row(step, args) | {"lr": optimizer.param_groups[0]["lr"], "grad": float(norm)}
            if main:
                log.note(row)
                bar.set_postfix({k: f"{row[k]:.4f}" for k in losses if k in row} | {"wait": f"{row['wait']:.0%}"})
        halt = any_process(bool(stopped), device)
        if step % args.save_every == 0 or step == args.steps or halt:
            before = time.time()
            checkpoint(out, step, stage, ema, optimizer, test, log, args, dict(meter.counts + meter.new), rank, device)
            meter.since += time.time() - before                      # samples/s are those of training
    bar.close()
    return step >= args.steps


@torch.no_grad()
def checkpoint(out, step, stage, ema, optimizer, test, log, args, counts, rank, device):
    """Everything that a pause writes: the state, then from the averaged weights the probe, the preview and the export."""
    try:
        save_state(out, step, ema, optimizer, args, counts, rank, device)
        if rank > 0:
            return
        stage.trained.eval()
        ema.swap()
        try:
            # Other batch sizes than in training, seldom: compiling the heavy part for each would take longer than it saves.
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16), torch.compiler.set_stance("force_eager"):
                found, rows = {k: round(float(v), 4) for k, v in stage.probe(test).items()}, stage.preview(test)
            if found:
                log.note({"step": step, **found})
                tqdm.write(f"step {step}  " + "  ".join(f"{k[1:]} {v}" for k, v in found.items()))
            if rows:
                save_grid(rows, out / f"preview-{step:06d}.png")
            if args.save:
                folder = Path(args.save.replace("{step}", f"{step:06d}"))
                folder.mkdir(parents=True, exist_ok=True)
                stage.export(folder)
        finally:                                                     # whatever failed, training goes on with its own weights
            ema.swap()
            stage.trained.train()
        save_curves(out / "log.jsonl", out / "curves.png")
    except (OSError, SafetensorError) as error:                      # a full disk must not end a run of days
        tqdm.write(f"step {step} could not be written to {out}: {error}; training goes on, the state before it is kept")
    finally:
        if dist.is_initialized():
            dist.barrier()


# ----------------------------------------------------------------------------------------------------------------------
# --dry-run: what would it take?
# ----------------------------------------------------------------------------------------------------------------------
# What each stage trains, and what else it runs; in the order of the columns.
PARTS = ("EVA-CLIP", "VAE", "UNet", "Qwen ViT", "LLM", "queries", "DiT")
TRAINED = {"clip": {"EVA-CLIP"}, "vae": {"VAE"}, "decoder": {"UNet"}, "0": {"Qwen ViT", "LLM", "queries"},
           "1": {"queries", "DiT"}, "2": {"queries", "DiT"}}
FROZEN = {"decoder": {"EVA-CLIP", "VAE"}, "1": {"EVA-CLIP", "LLM"}, "2": {"EVA-CLIP", "LLM"}}
PROMPT = 160                        # tokens of a long caption in its template


def used(stage, design=None, joint=0.0, looks=0.0):
    """(names of PARTS that are trained, names that run frozen) in a stage."""
    trained, kept = set(TRAINED[stage]), set(FROZEN.get(stage, ()))
    if joint:
        trained |= {"Qwen ViT", "LLM"}
    elif looks:
        kept |= {"Qwen ViT"}
    if design == "vae-fm":
        kept = kept - {"EVA-CLIP"} | {"VAE"}
    return trained, kept - trained


def dry_run(args, world):
    """Print which parts learn in which stage, and for args.stage parameters, memory and work at the sizes of model.PRESETS.

    Estimates: activations are 34 bf16 numbers a token, layer and unit of width (17 that a layer keeps, attention's and the
    MLP's wider ones), or one with --checkpointing; two operations a parameter and token forward, four backward, of which
    frozen weights need two, and those that no gradient passes none.
    """
    rows = [(name, *used(name)) for name in STAGES] + [
        (f"1 --design {design}", *used("1", design)) for design in ("clip-mse", "vae-fm")] + [("1 --joint", *used("1", joint=0.5))]
    print("| stage | " + " | ".join(PARTS) + " |\n|" + "---|" * (len(PARTS) + 1))
    for name, trained, kept in rows:
        cells = ["**trained**" if p in trained else "frozen" if p in kept else "" for p in PARTS]
        if name.endswith("clip-mse"):
            cells[-1] = "**linear map**"
        print(f"| `{name}` | " + " | ".join(cells) + " |")
    trained, kept = used(args.stage, args.design, args.joint, args.reconstruct + args.edit)
    print(f"\nstage {args.stage}, batch {args.batch} on {world} process{'es' if world > 1 else ''}, {args.steps} steps\n")
    print("| size | trained | frozen | weights and optimizer | activations | TFLOP a sample | days on this many GPUs |")
    print("|---|---|---|---|---|---|---|")
    for size in PRESETS:
        with torch.device("meta"):
            model = BLIP3o(preset(size, **({"vocab_size": VOCABULARY} if size == "nano" else {})))
            sizes = DECODER_PRESETS["nano" if size == "nano" else "official"]
            eva, unet, vae = EvaClip(sizes["clip"]), UNet(sizes["unet"]), VAE(sizes["vae"])
        modules = dict(zip(PARTS, (eva, vae, unet, model.visual, model.llm, None, model.dit)))
        n = {name: m.numel() if torch.is_tensor(m) else sum(p.numel() for p in m.parameters())
             for name, m in {**modules, "queries": model.latent_queries}.items()}
        learns, idle = sum(n[p] for p in trained), sum(n[p] for p in kept)
        moments = 8 / (world if args.zero else 1)                    # two of AdamW; Muon's matrices have one
        weights = learns * (4 + 4 + 4 + moments) + idle * 2          # fp32 weights, gradients, averages; frozen ones in bf16
        picture = (eva.config.image_size // eva.config.patch_size) ** 2
        tokens = {"EVA-CLIP": picture, "DiT": 64, "LLM": model.config.n_query, "Qwen ViT": picture, "UNet": unet.config.sample_size ** 2,
                  "VAE": unet.config.sample_size ** 2, "queries": 0}
        if args.stage == "0" or args.joint:
            tokens["LLM"] += PROMPT
        layers = {"EVA-CLIP": (eva.config.layers, eva.config.width), "DiT": (model.config.dit.n_layers, model.config.dit.dim),
                  "LLM": (model.config.text.num_hidden_layers, model.config.text.hidden_size),
                  "Qwen ViT": (model.config.vision.depth, model.config.vision.hidden_size)}
        kept_numbers = 2 if args.checkpointing else 34
        passed = trained | ({"LLM"} if "queries" in trained else set())                      # gradients go through these
        micro = args.batch / world / args.accumulate
        activations = sum(micro * tokens[p] * layers[p][0] * layers[p][1] * 2 * kept_numbers for p in passed if p in layers)
        work = sum(n[p] * tokens[p] * (6 if p in trained else 4 if p in passed else 2) for p in trained | kept)
        work += 2 * n["LLM"] * PROMPT if "LLM" in kept else 0        # the prompt: forward only
        days = work * args.batch * args.steps / (world * args.tflops * 1e12 * args.mfu) / 86400
        print(f"| {size} | {learns:,} | {idle:,} | {weights / 2 ** 30:.1f} GiB | {activations / 2 ** 30:.1f} GiB | "
              f"{work / 1e12:.3g} | {days:.2g} |")
    print(f"\nMemory for each process, pictures of 448 px at the released sizes, {PROMPT} tokens of prompt; days "
          f"at {args.mfu:.0%} of {args.tflops:g} TFLOP/s. UNet and VAE: weights and optimizer only.")


def arguments():
    """The command line; what the recipe of the stage leaves open is filled in here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", required=True, choices=list(STAGES))
    # what to read and write
    add("--data", help="tar shards, folders, JSONL files or glob patterns, comma-separated, each with =share or without; "
                       "default: the synthetic world")
    add("--short-caption", type=float, help="probability of a sample's short caption; default: of shards 0, of the world as "
                                            "the stage likes them")
    add("--cache", help="folder for what frozen encoders make of --data: computed once, then never again")
    add("--init", help="model folder to start from: parts that it lacks start from random weights. Default: weights/nano "
                       "for what is frozen, random weights for what this stage trains (but stage 2 trains on)")
    add("--fresh", action="store_true", help="random weights for what this stage trains, whatever --init holds of it")
    add("--eva", help="folder with EVA-CLIP and the diffusion-decoder, if --init has none (a bare language model)")
    add("--save", help="model folder into which the trained parts are written at every checkpoint; with {step} in its "
                       "name, a folder for each")
    add("--out", help="folder of the run (state, log, pictures); if it holds a run, that run goes on. Default runs/STAGE")
    add("--resume", action="store_true", help="refuse to start anew: there must be a run in --out to go on with")
    # what is learnt (stages 1 and 2)
    add("--design", choices=["clip-fm", "clip-mse", "vae-fm"], help="section 3.3: flow matching of CLIP features, regression "
        "of CLIP features, flow matching of VAE latents. Default: that of --init, else clip-fm")
    add("--joint", type=float, default=0.0, help="share of understanding samples (stage 0's); the language model trains, too")
    add("--reconstruct", type=float, help="share of samples whose prompt is the picture itself. Default: 0, but 0.1 in stage 2 "
                                          "of the world")
    add("--edit", type=float, help="share of samples of the world whose prompt is a picture and a change of it. Default: 0, in "
                                   "stage 2 0.2")
    add("--full", action=argparse.BooleanOptionalAction, help="the world's captions as a language model tells them in full before "
        "they are drawn. Default: in stage 2, if this one does")
    add("--words", type=float, help="share of the world's pictures that show a word")
    add("--things", type=int, default=4, help="the most things that a picture of the world shows: 1 is learnt in minutes")
    add("--draws", type=int, default=1, help="stages 1, 2: noises and times of each picture, for one reading of its prompt: cheap "
        "where the language model is large beside the DiT")
    add("--dit", help="other sizes for a fresh DiT: fields of DiTConfig, as in dim=192,n_layers=8,rope=2d")
    add("--queries", type=int, help="number of fresh latent queries for a fresh generator, instead of those of --init")
    add("--tell", type=float, help="stage 0: weight of what the queries are taught to say. Default 1, 0 with --joint or --data")
    # the recipe; defaults by stage
    add("--paper", action="store_true", help="the paper's recipe (stages 1 and 2) instead of the nano one")
    add("--steps", type=int)
    add("--batch", type=int, help="samples of one step, over all processes")
    add("--lr", type=float)
    add("--min-lr", type=float)
    add("--warmup", type=int, help="steps")
    add("--ema", type=float, help="decay of the averaged weights")
    add("--accumulate", type=int, default=1, help="micro-batches of one step")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--optimizer", choices=["adamw", "muon"], help="muon: orthogonalised steps for hidden matrices, AdamW for the rest")
    add("--query-lr", type=float, help="learning rate of the queries as a share of --lr. Default 1, but 0 for those of the "
        "nano model that stage 0 has taught")
    add("--beta2", type=float, default=0.95)
    add("--weight-decay", type=float, default=0.0)
    add("--drop", type=float, default=0.1, help="stages 1, 2: probability of dropping the condition")
    add("--shift", type=float, help="stage 1: shift of time toward noise for a fresh DiT. Default 5; with --paper 1")
    add("--feature-noise", type=float, default=0.2, help="decoder: largest standard deviation of noise on its features")
    add("--max-weight", type=float, default=300.0, help="decoder: cap of the loss weight 1 + sigma^2 (1: as Emu2)")
    add("--seed", type=int, default=0)
    # the machine
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--checkpointing", action="store_true", help="compute activations again in the backward pass instead of keeping them")
    add("--zero", action="store_true", help="each process keeps a share of the optimizer's moments (ZeRO-1)")
    add("--workers", type=int, default=0, help="processes that read pictures, per rank")
    add("--max-bad", type=float, default=0.01, help="share of broken samples above which the run stops")
    add("--max-skipped", type=int, default=10, help="steps in a row without a finite gradient that a run survives")
    add("--bf16", action=argparse.BooleanOptionalAction, help="products in bf16 (autocast). Default: on a GPU. It pays on "
        "CPUs with avx512_bf16 or AMX (lscpu), too; others are slower with it")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile of the heaviest part. Default: on a GPU; a CPU "
        "compiles for a minute or two")
    add("--log-every", type=int, default=20)
    add("--save-every", type=int, default=500)
    add("--wandb", help="project of Weights & Biases that gets the log, too (needs the package wandb)")
    add("--quiet", action="store_true", help="no progress bar")
    add("--dry-run", action="store_true", help="train nothing: print what learns, and what memory and time it would take")
    add("--world", type=int, help="--dry-run: number of GPUs")
    add("--tflops", type=float, default=989, help="--dry-run: peak of a GPU in bf16, in TFLOP/s (989: H100)")
    add("--mfu", type=float, default=0.4, help="--dry-run: share of that peak that is reached")
    args = parser.parse_args()
    if args.paper and args.stage not in PAPER:
        raise ValueError(f"the paper doesn't train stage {args.stage}: --paper goes with stages 1 and 2")
    for key, value in (PAPER if args.paper else RECIPES)[args.stage].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.out = args.out or f"runs/{args.stage}"
    args.warmup = min(args.warmup, args.steps // 2)
    args.cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch finds no CUDA device here: use --device cpu")
    args.bf16, args.compile = (args.cuda if flag is None else flag for flag in (args.bf16, args.compile))
    args.frozen_dtype = torch.bfloat16 if args.cuda else torch.float32                        # what doesn't learn on a GPU: half
    args.shift = args.shift or (1.0 if args.paper else 5.0)
    args.queries = args.queries or (64 if args.paper else None)
    args.tell = args.tell if args.tell is not None else float(not args.joint and not args.data)
    if args.init is None:
        args.fresh |= args.stage != "2"
        args.init = str(NANO) if NANO.is_dir() else None
    if args.stage in ("decoder", "1", "2") and not args.init:
        raise ValueError(f"stage {args.stage} builds on trained parts: name a model folder with --init")
    if args.init and not Path(args.init).is_dir():
        raise ValueError(f"there is no model folder at {args.init} (--init)")
    args.eva = args.eva or args.init
    shows = args.stage == "2" and not args.data and holds(args.init, "visual")               # what stage 2 of the world is for
    for key, share in ("reconstruct", 0.1 * shows), ("edit", 0.2 * shows):
        if getattr(args, key) is None:
            setattr(args, key, share)
    if args.stage not in ("1", "2") and (args.design or args.joint or args.reconstruct or args.edit or args.dit):
        raise ValueError("--design, --joint, --reconstruct, --edit and --dit belong to stages 1 and 2")
    if not all(0 <= share < 1 for share in (args.joint, args.reconstruct, args.edit, args.reconstruct + args.edit, args.words)):
        raise ValueError("--joint, --reconstruct, --edit and --words are shares of the samples: from 0 to below 1")
    if args.edit and args.data:
        raise ValueError("--edit changes pictures of the synthetic world: it doesn't go with --data")
    if not 1 <= args.things <= 4:
        raise ValueError(f"--things must lie between 1 and 4, the most that the world has, not {args.things}")
    for key in ("steps", "batch", "draws", "accumulate", "log_every", "save_every"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be at least 1, not {getattr(args, key)}")
    if args.lr <= 0 or args.min_lr < 0 or not 0 <= args.drop <= 1 or not 0 <= (args.short_caption or 0) <= 1:
        raise ValueError("--lr must be positive, --min-lr not negative, --drop and --short-caption between 0 and 1")
    return args


def main():
    """Set up the processes, train, and turn every mistake of a user into one sentence and exit code 2."""
    try:
        args = arguments()
        world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if args.dry_run:
            return dry_run(args, args.world or world)
        if args.batch % (world * args.accumulate):
            raise ValueError(f"--batch {args.batch} must divide by processes ({world}) x --accumulate ({args.accumulate})")
        cuda = args.cuda
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if world > 1:
            connect("nccl" if cuda else "gloo")
        finished = train(args, rank, world, device)
        if world > 1:
            dist.destroy_process_group()
        if not finished:
            print(f"stopped; the same command goes on from {args.out}")
    except (ValueError, OSError, SafetensorError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
