"""Speed of sampling, training and reading beside transformers, diffusers and webdataset: equal weights,
equal results, runs in turn, on the CPU in fp32; and what bf16 and int8 change. Results are compared first: a
race between different results means nothing."""
import io
import json
import math
import os
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
from checkpoint import load_strict
from clip_decoder import PRESETS, VAE, EvaClip, EvaConfig, UNet
from dit import DiTConfig
from evals.report import save_results
from model import BLIP3o, BLIP3oConfig, TextConfig
from sample import pick_dtype

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "aten::_slow_conv2d_forward",
            "aten::_weight_int8pack_mm")
PRECISIONS = ("fp32", "bf16", "int8")


def sizes(quick):
    """What is measured: parts of 84 to 344 M parameters; with `quick` tiny ones, each with layers that int8
    quantises.

    In training the encoder is the largest part, as in the released models (4.4 B; the DiT has 1.4 B).
    """
    if quick:
        text = TextConfig(400, 128, 512, 2, 4, 2, mrope_section=[4, 6, 6])
        dit = DiTConfig(in_channels=48, dim=192, n_layers=2, n_heads=6, n_kv_heads=6, ffn_dim=512,
                        cond_dim=128, rope="2d")
        nano = PRESETS["nano"]
        return SimpleNamespace(text=text, dit=dit, unet=nano["unet"], vae=nano["vae"], eva=nano["clip"],
                               train_text=text, train_dit=dit, steps=2, tokens=8, latents=(8, 8),
                               batch=2, prompt=16, reading=(16, (60, 80), 32))
    text = TextConfig(2000, 768, 2816, 12, 12, 2, mrope_section=[8, 12, 12])
    dit = DiTConfig(in_channels=1024, dim=896, n_layers=8, n_heads=14, n_kv_heads=14, ffn_dim=2560,
                    cond_dim=768, rope="2d")
    unet = replace(PRESETS["official"]["unet"], block_out_channels=(160, 320, 640),
                   transformer_layers_per_block=(1, 1, 4), attention_head_dim=(2, 5, 10))
    eva = EvaConfig(image_size=448, patch_size=14, width=768, layers=24, heads=12, mlp_hidden=4608)
    return SimpleNamespace(text=text, dit=dit, unet=unet, vae=PRESETS["official"]["vae"], eva=eva,
                           train_text=replace(text, num_hidden_layers=14),
                           train_dit=replace(dit, in_channels=768, n_layers=7), steps=10, tokens=64,
                           latents=(32, 24), batch=4, prompt=160, reading=(128, (480, 640), 448))


# ---- measuring ------------------------------------------------------------------------------------------

def take_turns(runs, rounds):
    """Seconds (rounds, len(runs)) of functions that run in turn, forwards and backwards, after one run of
    each to warm up."""
    times = np.zeros((rounds + 1, len(runs)))
    for i in tqdm(range(rounds + 1), leave=False, disable=None):
        for j in range(len(runs))[::1 if i % 2 else -1]:
            start = time.perf_counter()
            runs[j]()
            times[i, j] = time.perf_counter() - start
    return times[1:]


def durations(times, reference):
    """Medians of times (rounds,), of those of a reference, and of the ratios reference / times."""
    return {"seconds": np.median(times), "reference_seconds": np.median(reference),
            "ratio": np.median(reference / times)}


@contextmanager
def quiet():
    """Within: the process's stderr is discarded, that of libraries in C++ too, which no setting silences."""
    sys.stderr.flush()
    with open(os.devnull, "w") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


def profiled(run):
    """The profile of one run(), with memory."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with quiet(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    return profile


def products_fraction(profile):
    """The fraction of a run's time spent inside matrix products and convolutions, which are not ours to
    tune: whatever is done about the rest, the ratio can't rise above ratio / fraction."""
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(times.get(key, 0) for key in PRODUCTS) / sum(times.values())


def most_memory(profile):
    """MiB that tensors made during a run took at one time."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([0] + [event.nbytes() for event in events]).max()) / 2 ** 20


def weights_memory(module):
    """MiB of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]) / 2 ** 20


def max_relative_difference(a, b, least=0.0):
    """Largest difference of two tensors, relative to the largest number in `b` (`least` at least)."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=least)).item()


def show(name, row):
    """Print a row as a line of the table and as a line of JSON, and return it with its name.

    error is relative; MiB counts the tensors made during one run, weights_MiB those that it begins with;
    evaluations are a network's forward passes of one sample.
    """
    row = {"row": name, **row}

    def side(prefix=""):
        memory = row.get(f"{prefix}MiB")
        return f"{row[prefix + 'seconds']:8.3f} s" + ("" if memory is None else f", {memory:5.0f} MiB")
    products = f"   {row['products']:4.0%} products" if "products" in row else ""
    weights = f"   weights {row['weights_MiB']:5.0f} MiB" if "weights_MiB" in row else ""
    print(f"  {name:30} {row['precision']:5} {side():20}   {row['reference']:13} {side('reference_'):20}   "
          f"{row['ratio']:5.2f}x   apart by {row['error']:.0e}{products}{weights}", flush=True)
    print(json.dumps(row), flush=True)
    return row


@torch.no_grad()
def compare_outputs(name, reference, evaluations, module, ours, theirs, rounds):
    """The row of two functions that return the same tensor; `reference` is the name of the second."""
    times, mine, other = take_turns((ours, theirs), rounds), profiled(ours), profiled(theirs)
    return show(name, {
        "reference": reference, "precision": "fp32", "evaluations": evaluations,
        "parameters": sum(p.numel() for p in module.parameters()),
        "error": max_relative_difference(ours(), theirs()), **durations(*times.T), "MiB": most_memory(mine),
        "reference_MiB": most_memory(other), "weights_MiB": weights_memory(module),
        "products": products_fraction(mine)})


# ---- the references, with our weights -------------------------------------------------------------------

def lumina(config):
    """The official DiT's module tree for a DiTConfig, out of diffusers: LuminaNextDiT2DModel with
    BLIP3-o's caption projection in front and its FFN width. Takes a NextDiT's state dict strictly."""
    from diffusers.models.attention import LuminaFeedForward
    from diffusers.models.embeddings import PixArtAlphaTextProjection
    from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel
    dit = LuminaNextDiT2DModel(patch_size=config.patch_size, in_channels=config.in_channels,
                               hidden_size=config.dim, num_layers=config.n_layers,
                               num_attention_heads=config.n_heads, num_kv_heads=config.n_kv_heads,
                               norm_eps=config.norm_eps, learn_sigma=False, cross_attention_dim=config.dim)
    del dit.pad_token  # a leftover of Lumina that no forward reads and BLIP3-o's file doesn't have
    for layer in dit.layers:
        layer.feed_forward = LuminaFeedForward(config.dim, inner_dim=config.ffn_dim, multiple_of=1)
    dit.caption_projection = PixArtAlphaTextProjection(config.cond_dim, config.dim)
    return dit.eval()


def qwen_of(llm):
    """A Transformer's language model as transformers' Qwen2.5-VL with the same weights (its vision
    tower is tiny)."""
    import transformers
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps")
    config = llm.config
    rope = dict(rope_type="default", rope_theta=config.rope_theta, mrope_section=config.mrope_section)
    text = dict({name: getattr(config, name) for name in names}, tie_word_embeddings=False,
                bos_token_id=None, eos_token_id=None, pad_token_id=0, rope_parameters=rope)
    vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32,
                  out_hidden_size=config.hidden_size)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False,
                                           eos_token_id=None, pad_token_id=0)
    qwen = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    weights = {k: v for k, v in llm.state_dict().items() if not k.startswith("lm_head")}
    qwen.model.language_model.load_state_dict(weights)
    qwen.lm_head.load_state_dict(llm.lm_head.state_dict())
    return qwen


@torch.no_grad()
def randomise(*modules):
    """Random matrices that keep the size of their inputs, norms around 1, biases and gates around 0: gates
    are born as zeros, which compare nothing. Returns the last module, in eval mode."""
    for module in modules:
        for name, p in module.named_parameters():
            if p.ndim > 1:
                p.normal_(0, math.prod(p.shape[1:]) ** -0.5)
            else:
                p.normal_(float(name.endswith("weight")), 0.1)
    return modules[-1].eval()


# ---- sampling -------------------------------------------------------------------------------------------

def official_sampler(dit, cond, noise, steps, guidance=3.0):
    """The official pipeline's sampling loop with diffusers' DiT: features (1, N, C) of cond (1, n, D)."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
    head_dim = dit.config.hidden_size // dit.config.num_attention_heads
    rope, mask = get_2d_rotary_pos_embed_lumina(head_dim, 384, 384), torch.ones(2, cond.shape[1])

    def sample():
        x, sigmas = noise, torch.cat([torch.linspace(1, 1 / steps, steps), torch.zeros(1)])
        for sigma, following in zip(sigmas, sigmas[1:]):
            c = dit.caption_projection(torch.cat([torch.zeros_like(cond), cond]))
            t = torch.floor(1000 * sigma + 1e-3).expand(2)
            v = dit(x.repeat(2, 1, 1, 1), t, c, mask, rope, cross_attention_kwargs={}).sample
            null, true = v.chunk(2)
            x = x + (following - sigma) * (null + guidance * (true - null))
        return x.flatten(2).transpose(1, 2)
    return sample


@torch.no_grad()
def benchmark_model(s, rounds):
    """Rows of the DiT's sampling loop with guidance, and of greedy tokens after a prompt with each side's
    own KV cache."""
    config, tokens = s.dit, s.tokens
    model = randomise(BLIP3o(BLIP3oConfig(s.text, dit=config)))
    reference = lumina(config)
    reference.load_state_dict(model.dit.state_dict())
    cond, noise = torch.randn(1, 64, config.cond_dim), torch.randn(1, config.in_channels, 8, 8)
    yield compare_outputs(f"DiT, {s.steps} guided steps", "diffusers", 2 * s.steps, model.dit,
                          lambda: model.generate_features(cond, s.steps, 3.0, noise),
                          official_sampler(reference, cond, noise, s.steps), rounds)
    qwen = qwen_of(model.llm)
    ids = random_prompt(s.text)

    def ours():
        return model.generate_text(ids, max_new_tokens=tokens, stop_ids=[])[0].float()

    def theirs():
        return qwen.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                             min_new_tokens=tokens, do_sample=False)[0, ids.shape[1]:].float()
    yield compare_outputs(f"text, 64 + {tokens} tokens", "transformers", tokens, model.llm, ours, theirs,
                          rounds)


def random_prompt(text, *shape):
    """Ids of a TextConfig that are no special tokens, (1, 64) unless `shape` says otherwise."""
    return torch.randint(10, text.vocab_size - 100, shape or (1, 64))


def unet_inputs(s):
    """Latents (2, 4, h, w), a time, features (2, 64, D), pooled (2, D) and time ids (2, 6) of a UNet: one
    guided step."""
    x, cond = torch.randn(2, 4, *[s.latents[0]] * 2), torch.randn(2, 64, s.unet.cross_attention_dim)
    return x, 500.0, cond, cond.mean(1), torch.zeros(2, 6)


@torch.no_grad()
def benchmark_decoder(s, rounds):
    """Rows of the pixel decoder's parts, written by us and read by diffusers."""
    import diffusers
    unet, vae = randomise(UNet(s.unet)), randomise(VAE(s.vae))
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(Path(folder) / "unet")
        vae.save_pretrained(Path(folder) / "vae")
        whole = {"low_cpu_mem_usage": False}
        their_unet = diffusers.UNet2DConditionModel.from_pretrained(f"{folder}/unet", **whole)
        their_vae = diffusers.AutoencoderKL.from_pretrained(f"{folder}/vae", **whole)
    inputs = unet_inputs(s)
    x, t, cond, pooled, ids = inputs
    added = {"text_embeds": pooled, "time_ids": ids}
    z = torch.randn(1, s.vae.latent_channels, *[s.latents[1]] * 2)
    yield compare_outputs(f"UNet, a guided step, {s.latents[0]}^2", "diffusers", 2, unet,
                          lambda: unet(*inputs),
                          lambda: their_unet(x, t, cond, added_cond_kwargs=added).sample, rounds)
    yield compare_outputs(f"VAE decode, {s.latents[1]}^2", "diffusers", 1, vae, lambda: vae.decode(z),
                          lambda: their_vae.decode(z / vae.config.scaling_factor).sample, rounds)


# ---- precision ------------------------------------------------------------------------------------------

def precision_parts(s):
    """{part: (build, part of the module, output(module), run(module), evaluations)}: a run is timed, an
    output is what is compared with that in fp32; activations have the dtype of the module."""
    build = partial(BLIP3o, BLIP3oConfig(s.text, dit=s.dit))
    x, t, cond = torch.randn(2, s.dit.in_channels, 8, 8), torch.rand(2), torch.randn(2, 64, s.dit.cond_dim)
    ids, inputs = random_prompt(s.text), unet_inputs(s)

    def velocity(model):
        return model.dit(x, t, cond)

    def eps(unet):
        dtype = unet.conv_in.weight.dtype
        latents, time, *rest = inputs
        return unet(latents.to(dtype), time, *[tensor.to(dtype) for tensor in rest])
    return {"DiT, a guided step": (build, "dit", velocity, velocity, 2),
            f"text, 64 + {s.tokens} tokens": (
                build, "llm", lambda model: model.logits(ids),
                lambda model: model.generate_text(ids, max_new_tokens=s.tokens, stop_ids=[]), s.tokens),
            "UNet, a guided step": (partial(UNet, s.unet), "", eps, eps, 2)}


@torch.no_grad()
def benchmark_precisions(s, rounds):
    """Rows of each part in each of PRECISIONS beside itself in fp32: the error is |a - b| / |b| of
    velocities, logits and eps."""
    for name, (build, part, output, run, evaluations) in precision_parts(s).items():
        weights = randomise(build()).state_dict()
        dtypes = [pick_dtype(precision, torch.device("cpu")) for precision in PRECISIONS]
        modules = [load_strict(build, weights, "random weights", dtype=dtype) for dtype in dtypes]
        runs = [partial(run, module) for module in modules]
        outputs, profiles = [output(module).float() for module in modules], [*map(profiled, runs)]
        times, memory = take_turns(runs, rounds).T, [*map(most_memory, profiles)]
        for i, module in enumerate(modules):
            own = module.get_submodule(part)
            yield show(name, {
                "reference": "fp32", "precision": PRECISIONS[i], "evaluations": evaluations,
                "parameters": sum(p.numel() for p in own.parameters()),
                "error": ((outputs[i] - outputs[0]).norm() / outputs[0].norm()).item(),
                **durations(times[i], times[0]), "MiB": memory[i], "reference_MiB": memory[0],
                "weights_MiB": weights_memory(own), "products": products_fraction(profiles[i])})


# ---- training -------------------------------------------------------------------------------------------

class TrainingPair:
    """Our model and the official training loop, rebuilt of transformers' language model and diffusers'
    DiT as the released code drives them, with equal weights and one random batch.

    In the official loop the encoder runs at every step, the prompt and the queries go through the
    language model as one sequence with gradients and activation checkpointing, and logits are computed
    that nobody uses. The encoder is the same on both sides.
    """

    def __init__(self, s, n=64):
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
        self.n, self.text, config, B = n, s.train_text, s.train_dit, s.batch
        self.eva = EvaClip(s.eva)
        self.eva.eval().requires_grad_(False)
        self.model = BLIP3o(BLIP3oConfig(self.text, dit=config))
        randomise(self.model)
        self.model.llm.requires_grad_(False)
        self.qwen, self.dit = qwen_of(self.model.llm), lumina(config)
        self.dit.load_state_dict(self.model.dit.state_dict())
        self.qwen.requires_grad_(False).train()
        self.dit.train()
        with quiet():                                                # newer versions call it otherwise
            self.qwen.gradient_checkpointing_enable({"use_reentrant": False})
        self.dit.gradient_checkpointing = True
        self.queries = torch.nn.Parameter(self.model.latent_queries.detach().clone())
        self.ids = random_prompt(s.text, B, s.prompt)
        self.pixels = torch.randn(B, 3, s.eva.image_size, s.eva.image_size)
        self.x0, self.t = torch.randn(B, config.in_channels, 8, 8), torch.rand(B)
        self.rope, self.mask = get_2d_rotary_pos_embed_lumina(config.head_dim, 384, 384), torch.ones(B, n)
        self.cached = self.eva.encode(self.pixels)
        self.push = torch.randn(B, n, config.cond_dim)               # a gradient for the condition alone

    def ours(self, features=None, checkpointing=False):
        """One step of stage 1: the loss and its gradients."""
        self.model.dit.checkpointing = self.model.llm.checkpointing = checkpointing
        features = self.eva.encode(self.pixels) if features is None else features
        loss = self.model(self.ids, features=features, drop=0.0, x0=self.x0, t=self.t)["flow"]
        loss.mean().backward()

    def their_hidden(self):
        """The language model's states of the prompt, [IMG] and the queries: (B, L + 1 + n, D)."""
        start = torch.full((len(self.ids), 1), self.text.vocab_size - 3)
        embeds = self.qwen.get_input_embeddings()(torch.cat([self.ids, start], 1))
        embeds = torch.cat([embeds, self.queries.expand(len(self.ids), -1, -1)], 1)
        return self.qwen.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def theirs(self):
        """One step of the official loop."""
        features = self.eva.encode(self.pixels)
        hidden = self.their_hidden()
        self.qwen.lm_head(hidden)
        x1, s = features.transpose(1, 2).unflatten(2, (8, 8)), (1 - self.t).view(-1, 1, 1, 1)
        c, times = self.dit.caption_projection(hidden[:, -self.n:]), torch.floor(1000 * (1 - self.t) + 1e-3)
        xt = (1 - s) * x1 + s * self.x0
        v = self.dit(xt, times, c, self.mask, self.rope, cross_attention_kwargs={}).sample
        (v - (self.x0 - x1)).square().mean().backward()

    def our_condition(self):
        """The gradient of the language model's part alone."""
        (self.model.condition(self.ids) * self.push).sum().backward()

    def their_condition(self):
        """The same of the official loop."""
        (self.their_hidden()[:, -self.n:] * self.push).sum().backward()

    def gradient_difference(self, ours, theirs):
        """Largest relative difference of all gradients that two functions leave behind, each relative to
        its own largest number."""
        for module in (self.model, self.dit):
            module.zero_grad(set_to_none=True)
        self.queries.grad = None
        ours()
        theirs()
        others = dict(self.dit.named_parameters())
        pairs = [(self.model.latent_queries.grad, self.queries.grad)]
        pairs += [(p.grad, others[name].grad)
                  for name, p in self.model.dit.named_parameters() if p.grad is not None]
        least = 1e-4 * max(b.abs().max() for _, b in pairs)          # biases of keys have none but rounding
        return max(max_relative_difference(a, b, least) for a, b in pairs)


def benchmark_training(s, rounds):
    """Rows of a step of stage 1 beside the official loop: equal weights, noise and times, equal gradients,
    runs in turn, fp32. The error is that of gradients."""
    pair = TrainingPair(s)
    runs = {"a step, features cached": (lambda: pair.ours(pair.cached), pair.theirs),
            "a step, encoder live": (pair.ours, pair.theirs),
            "cached, with --checkpointing": (lambda: pair.ours(pair.cached, True), pair.theirs),
            "the language model's part": (pair.our_condition, pair.their_condition)}
    for name, (ours, theirs) in runs.items():
        error = pair.gradient_difference(ours, theirs)
        memory = [most_memory(profiled(run)) for run in (ours, theirs)]
        yield show(name, {"reference": "official loop", "precision": "fp32", "evaluations": s.batch,
                          "error": error, **durations(*take_turns((ours, theirs), rounds).T),
                          "MiB": memory[0], "reference_MiB": memory[1]})


# ---- reading --------------------------------------------------------------------------------------------

def write_shard(file, n, shape):
    """A tar of n JPEGs of blotches and grain (a photo has as many bytes), each with its number as
    caption."""
    rng = np.random.default_rng(0)
    with tarfile.open(file, "w") as tar:
        for i in range(n):
            blotches = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            blotches = np.asarray(blotches.resize(shape[::-1], Image.BICUBIC))
            grain = np.clip(blotches + rng.normal(0, 6, (*shape, 1)), 0, 255).astype(np.uint8)
            jpeg = io.BytesIO()
            Image.fromarray(grain).save(jpeg, "JPEG", quality=90)
            for suffix, content in ("jpg", jpeg.getvalue()), ("txt", f"{i}".encode()):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def benchmark_reading(folder, rounds, n, shape, size):
    """The row of one reading worker beside the `webdataset` library: n JPEGs (H, W) of a shard, decoded and
    cropped to `size`.

    Ours in the shuffled order of training, theirs as the shard has them; both must end in the same
    pixels. The error is the largest difference of a pixel; the memory is no tensor's, thus unknown.
    """
    import webdataset
    shard = Path(folder) / "speed.tar"
    write_shard(shard, n, shape)
    source, task = data.open_source(str(shard), size), data.CaptionTask()
    held_out = len(source.held_out)                                  # these have an order of their own
    parts = ((data.Samples(source, task), n - held_out),
             (data.Samples(source, task, held_out=True), held_out))
    reference = webdataset.WebDataset(str(shard), shardshuffle=False).decode("pilrgb").to_tuple("txt", "jpg")

    def ours():
        return {example.prompt: example.image for samples, count in parts
                for example in map(samples.__getitem__, range(count))}

    def theirs():
        return {text: np.asarray(data.crop_square(image, size)) for text, image in reference}
    mine, others = ours(), theirs()
    error = max(int(np.abs(mine[text].astype(int) - others[text]).max())
                for text in mine.keys() | others.keys())
    row = durations(*take_turns((ours, theirs), rounds).T)
    shard.unlink()
    return show(f"{n} JPEGs, {shape[1]} px to {size}", {
        "reference": "webdataset", "precision": "uint8", "evaluations": 0, "error": error, **row,
        "MiB": None, "reference_MiB": None,
        "images_per_s": [n / row["seconds"], n / row["reference_seconds"]]})


def speed(args):
    """Sampling and training beside transformers and diffusers: equal random weights, equal results,
    runs in turn, on the CPU in fp32; then DiT, text and UNet in fp32, bf16 and int8.

    The parts have 84 to 344 M parameters. Outputs are compared first: a race between different results
    means nothing. Each row is printed twice: for people, and as a line of JSON (grep '^{').
    """
    try:
        import diffusers
        import transformers
        import webdataset  # noqa: F401 (used by benchmark_reading: told now, not after all the others)
    except ImportError as error:
        raise ValueError(f"{error}: the references come with pip install -r requirements-dev.txt") from None
    torch.manual_seed(0)
    s, rows = sizes(args.quick), []
    for benchmark in benchmark_model, benchmark_decoder, benchmark_precisions, benchmark_training:
        rows += benchmark(s, args.rounds)
    rows.append(benchmark_reading(args.out, args.rounds, *s.reading))
    save_results(args, {"rows": rows, "torch": torch.__version__,
                        "transformers": transformers.__version__, "diffusers": diffusers.__version__,
                        "threads": torch.get_num_threads()})
