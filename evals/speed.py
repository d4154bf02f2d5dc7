"""Speed of sampling, training and reading beside transformers, diffusers and webdataset: equal weights,
equal results, runs in turn, on the CPU in fp32. Results are compared first: a race between different
results means nothing."""
import io
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
from clip_decoder import PRESETS, VAE, EvaClip, EvaConfig, UNet
from dit import DiTConfig
from evals.report import save_results
from model import BLIP3o, BLIP3oConfig, TextConfig

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "aten::_slow_conv2d_forward")


# ---- measuring ------------------------------------------------------------------------------------------

def benchmark(ours, theirs, rounds):
    """Run two functions in turn, after one run of each to warm up: median seconds of each, median of
    their ratios."""
    times = []
    for i in tqdm(range(rounds + 1), leave=False, disable=None):
        pair = []
        for run in (ours, theirs) if i % 2 else (theirs, ours):
            start = time.perf_counter()
            run()
            pair.append(time.perf_counter() - start)
        times.append(pair if i % 2 else pair[::-1])
    times = np.array(times[1:])                                      # (rounds, 2)
    return {"ours": np.median(times[:, 0]), "theirs": np.median(times[:, 1]),
            "ratio": np.median(times[:, 1] / times[:, 0])}


def products_fraction(run):
    """The fraction of a run's time spent inside matrix products and convolutions, which are not ours to
    tune: whatever is done about the rest, the ratio can't rise above ratio / fraction."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(times.get(key, 0) for key in PRODUCTS) / sum(times.values())


def most_memory(run):
    """Most bytes that tensors made during run() took at one time."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([0] + [event.nbytes() for event in events]).max())


def max_relative_difference(a, b, least=0.0):
    """Largest difference of two tensors, relative to the largest number in `b` (`least` at least)."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=least)).item()


@torch.no_grad()
def compare_outputs(name, module, ours, theirs, rounds):
    """A table row of two functions that return the same tensor: parameters of `module` in millions,
    difference, `benchmark`'s numbers, and the fraction of products; it is printed, too."""
    apart = max_relative_difference(ours(), theirs())
    row = {"M": sum(p.numel() for p in module.parameters()) / 1e6, "apart": apart,
           **benchmark(ours, theirs, rounds), "products": products_fraction(ours)}
    print(f"  {name:28}{row['M']:6.0f} M   ours {row['ours']:7.2f} s   reference {row['theirs']:7.2f} s   "
          f"{row['ratio']:5.2f}x   apart by {apart:.0e}   {row['products']:4.0%} products", flush=True)
    return row


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
    """Give all parameters random values: gates are born as zeros, which compare nothing."""
    for module in modules:
        for p in module.parameters():
            p.normal_(0, 0.02)


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
def benchmark_model(rounds, steps=10):
    """The DiT's sampling loop with guidance, and greedy tokens after a prompt with each side's own KV
    cache."""
    text = TextConfig(2000, 768, 2816, 12, 12, 2, mrope_section=[8, 12, 12])
    config = DiTConfig(in_channels=1024, dim=896, n_layers=8, n_heads=14, n_kv_heads=14, ffn_dim=2560,
                       cond_dim=768, rope="2d")
    model = BLIP3o(BLIP3oConfig(text, dit=config)).eval()
    randomise(model)
    reference = lumina(config)
    reference.load_state_dict(model.dit.state_dict())
    cond, noise = torch.randn(1, 64, 768), torch.randn(1, 1024, 8, 8)
    name = f"DiT, {steps} guided steps"
    table = {name: compare_outputs(name, model.dit, lambda: model.generate_features(cond, steps, 3.0, noise),
                                   official_sampler(reference, cond, noise, steps), rounds)}
    qwen = qwen_of(model.llm)
    ids = torch.randint(10, 1900, (1, 64))

    def ours():
        return model.generate_text(ids, max_new_tokens=64, stop_ids=[])[0].float()

    def theirs():
        return qwen.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64,
                             min_new_tokens=64, do_sample=False)[0, 64:].float()
    name = "text, 64 + 64 tokens"
    return {**table, name: compare_outputs(name, model.llm, ours, theirs, rounds)}


@torch.no_grad()
def benchmark_decoder(rounds):
    """The pixel decoder's parts, written by us and read by diffusers."""
    import diffusers
    unet = UNet(replace(PRESETS["official"]["unet"], block_out_channels=(160, 320, 640),
                        transformer_layers_per_block=(1, 1, 4), attention_head_dim=(2, 5, 10))).eval()
    vae = VAE(PRESETS["official"]["vae"]).eval()
    for p in [*unet.parameters(), *vae.parameters()]:
        if p.ndim > 1:
            p.normal_(0, 0.02)
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(Path(folder) / "unet")
        vae.save_pretrained(Path(folder) / "vae")
        whole = {"low_cpu_mem_usage": False}
        their_unet = diffusers.UNet2DConditionModel.from_pretrained(f"{folder}/unet", **whole)
        their_vae = diffusers.AutoencoderKL.from_pretrained(f"{folder}/vae", **whole)
    x, cond, ids = torch.randn(2, 4, 32, 32), torch.randn(2, 64, 1792), torch.zeros(2, 6)
    added = {"text_embeds": cond.mean(1), "time_ids": ids}
    z = torch.randn(1, 4, 24, 24)
    rows = {"UNet, one guided step, 256 px": (
                unet, lambda: unet(x, 500.0, cond, cond.mean(1), ids),
                lambda: their_unet(x, 500.0, cond, added_cond_kwargs=added).sample),
            "VAE decode, 192 px": (
                vae, lambda: vae.decode(z), lambda: their_vae.decode(z / vae.config.scaling_factor).sample)}
    return {name: compare_outputs(name, *row, rounds) for name, row in rows.items()}


# ---- training -------------------------------------------------------------------------------------------

class TrainingPair:
    """Our model and the official training loop, rebuilt of transformers' language model and diffusers'
    DiT as the released code drives them, with equal weights and one random batch.

    In the official loop the encoder runs at every step, the prompt and the queries go through the
    language model as one sequence with gradients and activation checkpointing, and logits are computed
    that nobody uses. The encoder is the same on both sides. It is the largest part, as in the released
    models (4.4 B; the DiT has 1.4 B): 113 to 228 M parameters a part.
    """

    def __init__(self, B=4, L=160, n=64):
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
        self.n, self.text = n, TextConfig(2000, 768, 2816, 14, 12, 2, mrope_section=[8, 12, 12])
        config = DiTConfig(in_channels=768, dim=896, n_layers=7, n_heads=14, n_kv_heads=14, ffn_dim=2560,
                           cond_dim=768, rope="2d")
        self.eva = EvaClip(EvaConfig(image_size=448, patch_size=14, width=768, layers=24, heads=12,
                                     mlp_hidden=4608))
        self.eva.eval().requires_grad_(False)
        self.model = BLIP3o(BLIP3oConfig(self.text, dit=config))
        randomise(self.model)
        self.model.llm.requires_grad_(False)
        self.qwen, self.dit = qwen_of(self.model.llm), lumina(config)
        self.dit.load_state_dict(self.model.dit.state_dict())
        self.qwen.requires_grad_(False).train()
        self.dit.train()
        self.qwen.gradient_checkpointing_enable({"use_reentrant": False})
        self.dit.gradient_checkpointing = True
        self.queries = torch.nn.Parameter(self.model.latent_queries.detach().clone())
        self.ids, self.pixels = torch.randint(10, 1900, (B, L)), torch.randn(B, 3, 448, 448)
        self.x0, self.t = torch.randn(B, 768, 8, 8), torch.rand(B)
        self.rope, self.mask = get_2d_rotary_pos_embed_lumina(config.head_dim, 384, 384), torch.ones(B, n)
        self.cached = self.eva.encode(self.pixels)
        self.push = torch.randn(B, n, 768)                           # a gradient for the condition alone

    def ours(self, features=None, checkpointing=False):
        """One step of stage 1: the loss and its gradients."""
        self.model.dit.checkpointing = self.model.llm.checkpointing = checkpointing
        features = self.eva.encode(self.pixels) if features is None else features
        loss = self.model(self.ids, features=features, drop=0.0, x0=self.x0, t=self.t)["flow"]
        loss.mean().backward()

    def their_hidden(self):
        """The language model's states of the prompt, [IMG] and the queries: (B, L + 1 + n, 768)."""
        start = torch.full((len(self.ids), 1), self.text.vocab_size - 3)
        embeds = self.qwen.get_input_embeddings()(torch.cat([self.ids, start], 1))
        embeds = torch.cat([embeds, self.queries.expand(len(self.ids), -1, -1)], 1)
        return self.qwen.model.language_model(inputs_embeds=embeds).last_hidden_state

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
        """Largest relative difference of all gradients that two functions leave behind."""
        for module in (self.model, self.dit):
            module.zero_grad(set_to_none=True)
        self.queries.grad = None
        ours()
        theirs()
        others = dict(self.dit.named_parameters())
        pairs = [(self.model.latent_queries.grad, self.queries.grad)]
        pairs += [(p.grad, others[name].grad)
                  for name, p in self.model.dit.named_parameters() if p.grad is not None]
        return max(max_relative_difference(a, b, 1e-6) for a, b in pairs)


def benchmark_training(rounds):
    """A step of stage 1 beside the official loop: equal weights, noise and times, equal gradients, runs
    in turn, fp32.

    Returns {what is timed: {"apart" (gradients), "MiB", "their MiB", and what `benchmark` says}}.
    """
    torch.manual_seed(0)
    pair = TrainingPair()
    runs = {"a step, features cached": (lambda: pair.ours(pair.cached), pair.theirs),
            "a step, encoder live": (pair.ours, pair.theirs),
            "cached, with --checkpointing": (lambda: pair.ours(pair.cached, True), pair.theirs),
            "the language model's part": (pair.our_condition, pair.their_condition)}
    table = {}
    for name, (ours, theirs) in runs.items():
        apart = pair.gradient_difference(ours, theirs)
        memory = [most_memory(run) / 2 ** 20 for run in (ours, theirs)]
        row = {"apart": apart, "MiB": memory[0], "their MiB": memory[1], **benchmark(ours, theirs, rounds)}
        table[name] = row
        print(f"  {name:28} ours {row['ours']:6.2f} s, {memory[0]:5.0f} MiB   "
              f"official {row['theirs']:6.2f} s, {memory[1]:5.0f} MiB   {row['ratio']:5.2f}x   "
              f"gradients apart by {apart:.0e}", flush=True)
    return table


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


def benchmark_reading(folder, rounds, n=128, shape=(480, 640), size=448):
    """One reading worker beside the `webdataset` library: n JPEGs of a shard, decoded and cropped to
    `size`.

    Ours in the shuffled order of training, theirs as the shard has them; both must end in the same
    pixels. Returns seconds as `benchmark` does, images/s of both, and the largest difference of a
    pixel.
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
    apart = max(int(np.abs(mine[text].astype(int) - others[text]).max())
                for text in mine.keys() | others.keys())
    row = benchmark(ours, theirs, rounds)
    shard.unlink()
    return {**row, "images_per_s": [n / row["ours"], n / row["theirs"]], "apart": apart}


def speed(args):
    """Sampling and training beside transformers and diffusers: equal random weights, equal results,
    runs in turn, on the CPU in fp32.

    The parts have 84 to 344 M parameters. Outputs are compared first: a race between different results
    means nothing.
    """
    try:
        import diffusers
        import transformers
        import webdataset  # noqa: F401 (used by benchmark_reading: told now, not after all the others)
    except ImportError as error:
        raise ValueError(f"{error}: the references come with pip install -r requirements-dev.txt") from None
    torch.manual_seed(0)
    table = benchmark_model(args.rounds)
    table |= benchmark_decoder(args.rounds)
    table |= benchmark_training(args.rounds)
    row = benchmark_reading(args.out, args.rounds)
    ours, theirs = row["images_per_s"]
    print(f"  data, 640 px JPEG to 448     ours {ours:4.0f} images/s   webdataset {theirs:4.0f} images/s   "
          f"{row['ratio']:5.2f}x   apart by {row['apart']}", flush=True)
    save_results(args, {"table": {**table, "data": row}, "torch": torch.__version__,
                        "transformers": transformers.__version__, "diffusers": diffusers.__version__,
                        "threads": torch.get_num_threads()})
