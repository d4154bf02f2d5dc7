"""Every stage of training, one loop.

    python train.py --stage clip    --save runs/nano      # EVA-CLIP tower and a text tower, from scratch
    python train.py --stage vae     --save runs/nano      # pixels <-> latents
    python train.py --stage 0       --save runs/nano      # understanding: Qwen2.5-VL learns to read, look and answer
    python train.py --stage decoder --init runs/nano --save runs/nano      # 64 features -> latents (UNet); needs clip, vae
    python train.py --stage 1       --init runs/nano --save runs/nano      # 64 queries + DiT; needs clip, 0
    python train.py --stage 2       --init runs/nano --save runs/nano      # the same, on short prompts

The paper trains stages 1 and 2 and takes the other parts from Qwen2.5-VL, EVA-CLIP and Emu2; a nano model has nobody to
take them from. Without --data the pictures are the synthetic world of data.py. `torchrun --nproc_per_node=2 train.py ...`
runs the same on two processes. A run stopped by anything goes on with the same line.

What is trained (everything else is frozen):
    clip     EVA-CLIP tower (+ text tower)          0   Qwen2.5-VL: vision tower and language model
    vae      VAE encoder and decoder                1   latent queries and DiT
    decoder  SDXL UNet                              2   latent queries and DiT
"""
import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import flow
from clip_decoder import (CLIP, PRESETS as DECODER_PRESETS, EvaClip, EulerSchedule, PixelDecoder, UNet, VAE,
                          read_json, write_json)
from model import BLIP3o, component, preset, read_headers

NANO = Path(__file__).parent / "weights" / "nano"                   # what a clone ships
VOCABULARY = 512                                                    # upper limit of the nano tokenizer's size

# Steps and guidance that suit what is trained at nano size; saved with the weights, sample.py takes them from there.
NANO_SAMPLING = {"steps": 30, "cfg": 2.0, "decoder_steps": 10, "decoder_cfg": 1.0}

# The recipe of each stage at nano size (two CPU cores); every number is a flag of the same name. `lr` falls from its peak
# to `min_lr` along a cosine, after `warmup` steps. The paper's stage 1: 1e-4 to 1e-5, batch 512, 150k steps; stage 2:
# 1e-4 to 0, 10k steps (see --paper).
RECIPES = {
    "clip":    dict(steps=3000, batch=64, lr=2e-3, min_lr=2e-5, warmup=100, ema=0.999, optimizer="adamw"),
    "vae":     dict(steps=3000, batch=16, lr=2e-3, min_lr=2e-5, warmup=100, ema=0.999, optimizer="adamw"),
    "decoder": dict(steps=3500, batch=16, lr=2e-3, min_lr=2e-5, warmup=100, ema=0.999, optimizer="adamw"),
    "0":       dict(steps=9000, batch=16, lr=2e-3, min_lr=2e-5, warmup=100, ema=0.999, optimizer="muon"),
    "1":       dict(steps=8000, batch=64, lr=1.5e-3, min_lr=5e-5, warmup=100, ema=0.999, optimizer="muon"),
    "2":       dict(steps=950, batch=64, lr=8e-4, min_lr=0.0, warmup=50, ema=0.999, optimizer="muon"),
}
PAPER = {
    "1": dict(steps=150_000, batch=512, lr=1e-4, min_lr=1e-5, warmup=450, ema=0.9999, optimizer="adamw"),
    "2": dict(steps=10_000, batch=512, lr=1e-4, min_lr=0.0, warmup=30, ema=0.9999, optimizer="adamw"),
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
    heavy = None                    # the part whose shapes never change: what torch.compile gets on CUDA

    def collate(self, samples):
        """A list of data.Samples items -> a dict of tensors, and `skipped`: (cause, name) of each broken item among them.

        Of a row of broken items only the first stands at this sample's own position; the others are counted at theirs.
        """
        pixels = data.to_pixels(np.stack([s["image"] for s in samples]))
        return {"pixels": pixels, "skipped": [bad for s in samples for bad in s["skipped"][:1]]}

    def export(self, folder):
        """Write the trained parts into the model folder `folder`; what else lies there stays."""
        raise NotImplementedError

    def preview(self, batch):
        """A list of rows of pictures (B, 3, H, W) in [0, 1] to look at, or None."""

    def probe(self, batch):
        """Further numbers for the log, measured on a held-out batch without gradient."""
        return {}


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
        return {**super().collate(samples), "ids": ids, "mask": mask}

    def forward(self, batch):
        losses = self.trained(batch["pixels"], batch["ids"], batch["mask"])
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

    def forward(self, batch):
        target = data.to_signed(batch["pixels"]).to(memory_format=torch.channels_last)
        reconstruction, kl = self.trained(target)
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
        self.eva, vae = frozen(EvaClip.from_pretrained(init)), frozen(VAE.from_pretrained(init))
        self.size, self.noise, self.max_weight = self.eva.config.image_size, args.feature_noise, args.max_weight
        unet = UNet.from_pretrained(init) if holds(init, "unet") and not args.fresh else UNet(DECODER_PRESETS["nano"]["unet"])
        self.heavy = self.trained = unet.to(memory_format=torch.channels_last)
        self.decoder = PixelDecoder(self.trained, vae, EulerSchedule())
        with torch.no_grad():                                        # the negative of guidance: a picture of the mean colour
            self.negative = self.eva.encode(torch.zeros(1, 3, self.size, self.size))

    def forward(self, batch):
        with torch.no_grad():
            features = self.eva.encode(batch["pixels"])
            level = self.noise * torch.rand(len(features), 1, 1, device=features.device)
            features = features + level * torch.randn_like(features)
            latents = self.decoder.vae.encode(data.to_signed(batch["pixels"]))
        return {"epsilon": self.decoder.loss(latents, features, negative=self.negative.to(features),
                                             max_weight=self.max_weight)}

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

    Half of the world's conversations are about a picture: questions, then a description of everything. The other half
    are about a caption that asked for a picture. That makes the language model bind each colour to its object while it
    reads: predicting captions alone never needs this, and the frozen states will have to tell the DiT who is red.
    """
    talk = True
    questions = 4                   # in one conversation: the prompt is read once, so more questions cost little

    def __init__(self, init, args):
        super().__init__()
        self.tokenizer = tokenizer_of(init)
        self.size = DECODER_PRESETS["nano"]["clip"].image_size
        if holds(init, "visual") and not args.fresh:
            self.trained = BLIP3o.from_pretrained(init, parts={"llm", "visual"})
        else:
            self.trained = BLIP3o(replace(nano_config(self.tokenizer), dit=None))
        self.vision = self.trained.config.vision

    def collate(self, samples):
        turns, looks = zip(*map(self.task, samples))
        merged = (self.size // self.vision.patch_size // self.vision.spatial_merge_size) ** 2
        rows = [data.chat_ids(self.tokenizer, t, [[merged]] * look) for t, look in zip(turns, looks)]
        ids, mask = data.pad([r[0] for r in rows], self.tokenizer.special["<|endoftext|>"])
        targets, _ = data.pad([r[1] for r in rows], False)
        batch = super().collate(samples)
        seen = torch.tensor(looks)
        patches, grid = (None, None) if not seen.any() else data.to_patches(
            batch["pixels"][seen], self.vision.patch_size, self.vision.spatial_merge_size)
        return {**batch, "ids": ids, "mask": mask, "labels": ids.where(targets, -100), "patches": patches, "grid": grid}

    def task(self, sample):
        """(turns of one conversation, does it show the picture?)"""
        rng, scene = sample["rng"], sample.get("scene")
        if "turns" in sample:                                        # wherever LLaVA's mark is, the picture comes first
            turns = [(user.replace("<image>", "").strip(), said) for user, said in sample["turns"]]
            return turns, any("<image>" in user for user, _ in sample["turns"])
        if scene is None:
            return [(data.DESCRIBE, sample["caption"])], True
        if rng.random() < 0.5:
            return [data.ask(scene, rng) for _ in range(self.questions)] + [(data.DESCRIBE, data.describe(scene))], True
        text = sample["caption"]
        return [(data.GENERATE.format(text), "")] + [data.ask(scene, rng, text) for _ in range(self.questions)], False

    def forward(self, batch):
        return {"text": self.trained(batch["ids"], batch["mask"], labels=batch["labels"], pixels=batch["patches"],
                                     grid_thw=batch["grid"])["text"]}

    def export(self, folder):
        self.tokenizer.save(folder)
        self.trained.save_pretrained(folder, torch.float16)
        config, area = self.trained.config, self.size ** 2
        write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": config.eos_token_id,
                                                       "pad_token_id": config.pad_token_id})
        if not (folder / "preprocessor_config.json").exists():       # pictures of any size are looked at as in training
            write_json(folder / "preprocessor_config.json", {"min_pixels": area, "max_pixels": area})


class GenerationStage(Stage):
    """Stages 1 and 2: the frozen language model reads the prompt, 64 queries and the DiT learn to make its features.

    The condition of a sample is dropped with probability 0.1 for classifier-free guidance. The probe is the early
    warning: the loss close to noise with the true, a shuffled and no condition. While they are equal, the DiT doesn't
    listen to the prompt; pictures show it hours later.
    """

    def __init__(self, init, args):
        super().__init__()
        self.tokenizer = tokenizer_of(init)
        self.eva = frozen(EvaClip.from_pretrained(init))
        drawn = {"queries", "dit"} if holds(init, "dit") and not args.fresh else set()
        self.trained = BLIP3o.from_pretrained(init, parts={"llm"} | drawn)
        if not drawn:
            config = nano_config(self.tokenizer)
            self.trained.add_generator(config.dit, self.tokenizer.vocab_size, config.n_query, args.shift, config.query_std)
        for name, p in self.trained.named_parameters():
            p.requires_grad_(name.startswith(("dit.", "latent_queries")))
        self.heavy = self.trained.dit
        self.size, self.drop, self.captions = self.eva.config.image_size, args.drop, False if args.stage == "2" else None
        self.decoder = frozen(PixelDecoder.from_pretrained(init)) if holds(init, "unet") else None

    def collate(self, samples):
        ids, mask = data.pad([data.prompt_ids(self.tokenizer, s["caption"]) for s in samples])
        return {**super().collate(samples), "ids": ids, "mask": mask, "captions": [s["caption"] for s in samples]}

    def forward(self, batch):
        with torch.no_grad():
            features = self.eva.encode(batch["pixels"])
        return {"flow": self.trained(batch["ids"], batch["mask"], features=features, drop=self.drop)["flow"]}

    def export(self, folder):
        self.tokenizer.save(folder)
        self.trained.save_pretrained(folder, torch.float16)
        config = read_json(folder / "config.json")
        if self.trained.config.shift != 1:                           # official weights keep the official numbers
            config["nano_blip3o"].setdefault("sampling", NANO_SAMPLING)
            write_json(folder / "config.json", config)

    def probe(self, batch):
        x1 = self.eva.encode(batch["pixels"]).transpose(1, 2).unflatten(2, (8, 8))           # (B, C, 8, 8)
        cond = self.trained.condition(batch["ids"], batch["mask"])
        noise = torch.randn(x1.shape, generator=torch.Generator().manual_seed(0)).to(x1)
        found = {}
        for t in (0.02, 0.05, 0.3):
            for name, c in ("true", cond), ("shuffled", cond.roll(1, 0)), ("null", torch.zeros_like(cond)):
                loss = flow.flow_matching_loss(self.trained.dit, x1, c, drop=0, x0=noise, t=torch.full((len(x1),), t, device=x1.device))
                found[f"_{name}@{t}"] = loss.mean()
        return found

    def preview(self, batch):
        if self.decoder is None:
            return None
        cond = self.trained.condition(batch["ids"][:16], batch["mask"][:16])
        features = self.trained.generate_features(cond, 30, 2.0, generator=torch.Generator().manual_seed(0))
        drawn = self.decoder.decode(features, None, 10, 1.0, latent_noise(self.decoder, len(features)))
        return [drawn, show(batch["pixels"][:16])]


STAGES = {"clip": ClipStage, "vae": VaeStage, "decoder": DecoderStage, "0": UnderstandingStage,
          "1": GenerationStage, "2": GenerationStage}


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


def nano_config(tokenizer):
    """The BLIP3oConfig of the nano preset for a tokenizer: its vocabulary and the ids of its control tokens."""
    t = tokenizer.special
    return preset("nano", tokenizer.vocab_size, image_token_id=t["<|image_pad|>"], eos_token_id=t["<|im_end|>"],
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


def save_state(out, step, ema, optimizer, args):
    """Write out/step-NNNNNN whole (temporary name, fsync, rename), point `latest` at it, keep the last two.

    model.safetensors (what is trained), ema.safetensors, optimizer.safetensors, state.json (step and flags; the order of
    samples and all noise are functions of seed and step, so the step is all there is to know).
    """
    name = f"step-{step:06d}"
    temporary = out / ".step.tmp"                                    # one name: what a crash leaves is overwritten
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    moments = {f"{n}.{key}": value.reshape(1) if value.ndim == 0 else value.contiguous()
               for n, p in ema.params.items() for key, value in optimizer.state[p].items()}
    save_file({n: p.detach().contiguous() for n, p in ema.params.items()}, temporary / "model.safetensors")
    save_file({n: p.contiguous() for n, p in ema.average.items()}, temporary / "ema.safetensors")
    save_file(moments, temporary / "optimizer.safetensors")
    state = {"step": step, "updates": ema.updates, "torch": torch.__version__, "args": vars(args)}
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    for file in temporary.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(out / name, ignore_errors=True)
    os.replace(temporary, out / name)
    (out / "latest.tmp").write_text(name)
    os.replace(out / "latest.tmp", out / "latest")
    for old in sorted(out.glob("step-*"))[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(out, ema, optimizer, args):
    """Continue where `out` stopped: fills weights, averages and optimizer; returns the step, 0 if nothing is there.

    Raises ValueError if the run in `out` was started with other flags that change what is learnt.
    """
    if not (out / "latest").is_file():
        return 0
    folder = out / (out / "latest").read_text()
    state = json.loads((folder / "state.json").read_text())
    for key in ("stage", "data", "short_caption", "seed", "batch", "init", "shift", "optimizer"):
        if state["args"].get(key) != getattr(args, key):
            raise ValueError(f"{out} holds a run with --{key.replace('_', '-')} {state['args'].get(key)}, not "
                             f"{getattr(args, key)}: choose another --out, or delete the folder to start anew")
    model, average = load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")
    moments = load_file(folder / "optimizer.safetensors")
    if set(model) != set(ema.params):
        raise ValueError(f"the weights in {folder} are of another model than this stage trains: choose another --out")
    for n, p in ema.params.items():
        p.data.copy_(model[n])
        ema.average[n].copy_(average[n])
        optimizer.state[p] = {k: moments[f"{n}.{k}"].to(p.device).reshape(() if k == "step" else p.shape)
                              for k in ("step", "exp_avg", "exp_avg_sq", "momentum") if f"{n}.{k}" in moments}
    ema.updates = state["updates"]
    return state["step"]


# ----------------------------------------------------------------------------------------------------------------------
# Pictures of a run
# ----------------------------------------------------------------------------------------------------------------------
def save_grid(rows, path, columns=16, scale=2):
    """Rows of pictures (B, 3, H, W) in [0, 1], the first `columns` of each, as one PNG."""
    grid = torch.cat([torch.cat(list(r[:columns].float().cpu()), 2) for r in rows], 1)
    image = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(path)


def save_curve(log, path, key, size=(720, 300)):
    """The column `key` of log.jsonl over steps as a PNG line chart with its range written at the axes."""
    from PIL import ImageDraw
    points = [(r["step"], r[key]) for r in map(json.loads, log.read_text().splitlines()) if key in r]
    if len(points) < 2:
        return
    xs, ys = np.array(points, dtype=float).T
    low, high = ys.min(), np.quantile(ys, 0.98)
    left, top, right, bottom = 60, 24, size[0] - 12, size[1] - 24
    x = left + (right - left) * (xs - xs[0]) / max(xs[-1] - xs[0], 1)
    y = bottom - (bottom - top) * np.clip((ys - low) / max(high - low, 1e-12), 0, 1)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((left, top, right, bottom), outline="#cccccc")
    pen.line(list(zip(x.tolist(), y.tolist())), fill="#2b59c3", width=2)
    pen.text((left, 6), f"{key}: {ys[-1]:.4g} at step {int(xs[-1])}", fill="black")
    for value, at in (high, top), (low, bottom - 10):
        pen.text((4, at), f"{value:.4g}", fill="black")
    pen.text((left, bottom + 6), str(int(xs[0])), fill="black")
    pen.text((right - 40, bottom + 6), str(int(xs[-1])), fill="black")
    image.save(path)


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
    """The tensors of a batch on a device."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def any_process(flag, device):
    """Is a flag set on any of the processes? They must leave the loop after the same step, or the others wait for ever."""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def gather(mine):
    """The lists of all processes as one, in the order of ranks."""
    if not dist.is_initialized():
        return mine
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, mine)
    return sum(lists, [])


def counts(by_cause):
    """{cause: number} -> words."""
    return ", ".join(f"{n} {cause}" for cause, n in by_cause.items() if n) or "none"


def note(log, row):
    """One more line of log.jsonl. A full disk costs the line, not the run."""
    try:
        log.write(json.dumps(row) + "\n")
        log.flush()
    except OSError as error:
        tqdm.write(f"{log.name}: {error}")


def train(args, rank, world, device):
    """Train one stage from wherever `--out` stands to `--steps`. Returns False if a signal stopped it before."""
    out, main = Path(args.out), rank == 0
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)                                     # the same fresh weights on every rank
    stage = STAGES[args.stage](args.init, args).to(device)
    source = data.open_source(args.data, stage.size, args.seed)
    samples = data.Samples(source, stage.size, args.seed, stage.captions, args.short_caption, stage.talk)
    unseen = source if args.data else data.World(10 ** 6, stage.size)
    held_out = data.Samples(unseen, stage.size, 10 ** 6, stage.captions, args.short_caption, stage.talk)
    test = to_device(stage.collate([held_out[i] for i in range(64)]), device)

    params = [p for p in stage.trained.parameters() if p.requires_grad]
    groups = [{"params": params}]
    if args.optimizer == "muon":                                     # the head of a language model is no hidden matrix
        hidden = {m.weight for name, m in stage.trained.named_modules() if isinstance(m, nn.Linear) and name != "llm.lm_head"}
        groups = [{"params": [p for p in params if p not in hidden]},
                  {"params": [p for p in params if p in hidden], "matrices": True}]
    optimizer = Muon(groups, lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay,
                     fused=device.type == "cuda")
    ema = EMA(stage.trained, args.ema)
    step = load_state(out, ema, optimizer, args)
    if device.type == "cuda" and args.compile and stage.heavy is not None:
        stage.heavy.compile()
    net = stage
    if world > 1:                                                    # in stage 0 a batch may happen to show no picture
        net = DistributedDataParallel(stage, device_ids=[device.index] if device.type == "cuda" else None,
                                      find_unused_parameters=args.stage == "0")
    stopped = []
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: stopped.append(True))
    if main:
        print(f"stage {args.stage}: {sum(p.numel() for p in params) / 1e6:.2f} M trained parameters, "
              f"{args.steps} steps of {args.batch}, {'from step ' + str(step) if step else 'from the start'}, in {out}")
        if args.data:
            print(f"{len(source)} samples; left out: {counts(source.left_out)}")

    log = open(out / "log.jsonl", "a") if main else None
    bar = tqdm(total=args.steps, initial=step, disable=not main or args.quiet, unit="step", smoothing=0.05)
    loader = iter(batches(samples, stage, step, args, rank, world))
    sums, summed, skipped, since = {}, 0, [], time.time()            # losses since the last line of the log
    bad, first = [], step                                            # broken samples of all processes since step `first`
    stage.trained.train()
    halt = False
    while step < args.steps and not halt:
        torch.manual_seed(hash((args.seed, step, rank)) % 2 ** 63)   # all noise is a function of (seed, step, rank)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        for _ in range(args.accumulate):
            batch = to_device(next(loader), device)
            skipped += batch.pop("skipped")
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                losses = net(batch)
            (sum(losses.values()) / args.accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / args.accumulate
        norm = nn.utils.clip_grad_norm_(params, args.clip)
        if not torch.isfinite(norm):
            raise ValueError(f"the gradient of step {step} isn't finite: lower --lr ({args.lr}); {out} keeps the last state")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
        step, summed = step + 1, summed + 1
        bar.update()
        if step % args.log_every == 0 or step == args.steps:
            bad, skipped = bad + gather(skipped), []
            if len(bad) > args.max_bad * (step - first) * args.batch + 10:
                told = "".join(f"\n  {cause}: {name}" for cause, name in bad[:20])
                raise ValueError(f"{len(bad)} broken samples in {(step - first) * args.batch}: more than --max-bad "
                                 f"{args.max_bad} allows ({counts(Counter(cause for cause, _ in bad))}); the first of them:{told}")
            row = {"step": step, "samples": step * args.batch, **{k: float(v) / summed for k, v in sums.items()},
                   "lr": optimizer.param_groups[0]["lr"], "grad": float(norm),
                   "skipped": Counter(cause for cause, _ in bad),
                   "per_s": round(summed * args.batch / (time.time() - since), 1)}
            sums, summed, since = {}, 0, time.time()
            if main:
                note(log, {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
                bar.set_postfix({k: f"{row[k]:.4f}" for k in losses})
        halt = any_process(bool(stopped), device)
        if step % args.save_every == 0 or step == args.steps or halt:
            if main:
                checkpoint(out, step, stage, ema, optimizer, test, log, args, list(losses)[0])
            if world > 1:
                dist.barrier()
            since = time.time()
    bar.close()
    return step >= args.steps


@torch.no_grad()
def checkpoint(out, step, stage, ema, optimizer, test, log, args, key):
    """Everything that a pause writes: the state, then from the averaged weights the probe, the preview and the export."""
    try:
        save_state(out, step, ema, optimizer, args)
        stage.trained.eval()
        ema.swap()
        try:
            found = {k: round(float(v), 4) for k, v in stage.probe(test).items()}
            if found:
                note(log, {"step": step, **found})
                tqdm.write(f"step {step}  " + "  ".join(f"{k[1:]} {v}" for k, v in found.items()))
            rows = stage.preview(test)
            if rows:
                save_grid(rows, out / f"preview-{step:06d}.png")
            if args.save:
                Path(args.save).mkdir(parents=True, exist_ok=True)
                stage.export(Path(args.save))
        finally:                                                     # whatever failed, training goes on with its own weights
            ema.swap()
            stage.trained.train()
        save_curve(out / "log.jsonl", out / "loss.png", key)
    except (OSError, SafetensorError) as error:                      # a full disk must not end a run of days
        tqdm.write(f"step {step} could not be written to {out}: {error}; training goes on, the state before it is kept")


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
    add("--init", help="model folder to start from: parts that it lacks start from random weights. Default: weights/nano "
                       "for what is frozen, random weights for what this stage trains (but stage 2 trains on)")
    add("--fresh", action="store_true", help="random weights for what this stage trains, whatever --init holds of it")
    add("--save", help="model folder into which the trained parts are written at every checkpoint")
    add("--out", help="folder of the run (state, log, pictures); if it holds a run, that run goes on. Default runs/STAGE")
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
    add("--beta2", type=float, default=0.95)
    add("--weight-decay", type=float, default=0.0)
    add("--drop", type=float, default=0.1, help="stages 1, 2: probability of dropping the condition")
    add("--shift", type=float, default=5.0, help="stage 1: shift of time toward noise for a fresh DiT (1: the paper)")
    add("--feature-noise", type=float, default=0.2, help="decoder: largest standard deviation of noise on its features")
    add("--max-weight", type=float, default=300.0, help="decoder: cap of the loss weight 1 + sigma^2 (1: as Emu2)")
    add("--seed", type=int, default=0)
    # the machine
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--workers", type=int, default=0, help="processes that read pictures, per rank")
    add("--max-bad", type=float, default=0.01, help="share of broken samples above which the run stops")
    add("--no-compile", dest="compile", action="store_false", help="CUDA: run without torch.compile")
    add("--log-every", type=int, default=20)
    add("--save-every", type=int, default=500)
    add("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if args.paper and args.stage not in PAPER:
        raise ValueError(f"the paper doesn't train stage {args.stage}: --paper goes with stages 1 and 2")
    for key, value in (PAPER if args.paper else RECIPES)[args.stage].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.out = args.out or f"runs/{args.stage}"
    args.warmup = min(args.warmup, args.steps // 2)
    if args.init is None:
        args.fresh |= args.stage != "2"
        args.init = str(NANO) if NANO.is_dir() else None
    if args.stage in ("decoder", "1", "2") and not args.init:
        raise ValueError(f"stage {args.stage} builds on trained parts: name a model folder with --init")
    if args.init and not Path(args.init).is_dir():
        raise ValueError(f"there is no model folder at {args.init} (--init)")
    for key in ("steps", "batch", "accumulate", "log_every", "save_every"):
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
        if args.batch % (world * args.accumulate):
            raise ValueError(f"--batch {args.batch} must divide by processes ({world}) x --accumulate ({args.accumulate})")
        cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch finds no CUDA device here: use --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        finished = train(args, rank, world, device)
        if world > 1:
            dist.destroy_process_group()
        if not finished:
            print(f"stopped; the same command goes on from {args.out}")
            sys.exit(130)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
