"""A checklist for a GPU: is it exact, does it compile once, how much memory, how fast? Random weights.

Nothing is downloaded and no weights are written: parts of official sizes are built on the device "meta" and
filled at random on the GPU, where sample.Pipeline and train.py's parts use them as ever. Sections stand in
the order of their value; each is guarded, and the files are written after each.
"""
import gc
import json
import math
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
from checkpoint import activation_dtype, load_strict
from clip_decoder import PRESETS as DECODER_PRESETS
from clip_decoder import VAE, EvaClip, PixelDecoder, UNet
from dit import NextDiT
from evals.estimate import USES, components, peaks
from evals.report import save_results, write_text
from evals.speed import max_relative_difference
from model import BLIP3o, Transformer, preset
from sample import GIB, OFFICIAL, Pipeline, pick_device, pick_dtype
from train import EMA, NANO, autocast, frozen, make_optimizer

LIMIT = 450                         # seconds of all sections: what is left is skipped
PROMPT = "a red circle above a blue square on a white background"
# Bounds of |a - b| / |b| over a few layers of random weights.
BOUNDS = {"bf16": 0.05, "fp16": 0.01, "int8": 0.08}
NEEDS_CUDA = "needs CUDA"


# ---- random models ----------------------------------------------------------------------------------------

def sizes(quick):
    """What is measured: official widths, or with `quick` nano ones in a few steps."""
    if quick:
        config = preset("nano", data.Tokenizer.from_pretrained(NANO).vocab_size)
        config = replace(config, text=replace(config.text, num_hidden_layers=1),
                         dit=replace(config.dit, n_layers=1))
        decoder = DECODER_PRESETS["nano"]
        return SimpleNamespace(name="nano", config=config, decoder=decoder, few=config, few_decoder=decoder,
                               side=64, small_side=64, steps=2, decoder_steps=2, batches=(1, 2), tokens=4,
                               text_batches=(1, 2), train_batches=(2,), rounds=2, train=(2, 2), matrix=256)
    config, decoder = replace(preset("4b"), vision=None), DECODER_PRESETS["official"]
    few = replace(config, text=replace(config.text, num_hidden_layers=4),
                  dit=replace(config.dit, n_layers=4))
    few_decoder = decoder | {"clip": replace(decoder["clip"], layers=4),
                             "unet": replace(decoder["unet"], transformer_layers_per_block=(1, 1, 2))}
    return SimpleNamespace(name="4B", config=config, decoder=decoder, few=few, few_decoder=few_decoder,
                           side=1024, small_side=512, steps=30, decoder_steps=50, batches=(1, 4), tokens=128,
                           text_batches=(1, 16), train_batches=(16, 32), rounds=30, train=(20, 64),
                           matrix=8192)


class RandomWeight(NamedTuple):
    """Random numbers of a parameter, made where and as `load_strict` wants them: one tensor at a time."""
    name: str
    shape: tuple

    def to(self, device, dtype):
        """Matrices that keep the size of their inputs; norms around 1, biases around 0. dtype None: that of
        a file, bf16."""
        numbers = torch.empty(self.shape, device=device, dtype=dtype or torch.bfloat16)
        if len(self.shape) > 1:
            return numbers.normal_(0, math.prod(self.shape[1:]) ** -0.5)
        return numbers.normal_(float(self.name.endswith("weight")), 0.1)


def random_module(build, device, dtype):
    """build() on a device, with random weights."""
    with torch.device("meta"):
        weights = {name: RandomWeight(name, p.shape) for name, p in build().state_dict().items()}
    return load_strict(build, weights, "random weights", device, dtype)


class RandomPipeline(Pipeline):
    """A Pipeline of any sizes without files: parts get random weights when they are first called."""

    def __init__(self, config, decoder, device, dtype, offload=False, compiled=False):
        self.folder = self.eva_folder = NANO
        self.config, self.sampling, self.limits = {}, OFFICIAL, {}
        self.device, self.precision = device, pick_dtype(dtype, device)
        self.dtype = activation_dtype(self.precision)
        self.offload, self.compiled = offload, compiled
        self.resident, self.seconds, self.negatives, self.upsampled = [], {}, {}, {}
        self.tokenizer = data.Tokenizer.from_pretrained(NANO)        # its ids are ids of any vocabulary
        with torch.device("meta"):
            self.model = BLIP3o(config).to(self.dtype).eval()
        queries = torch.randn(self.model.latent_queries.shape, device=device)
        self.model.latent_queries = nn.Parameter(queries.to(self.dtype))
        self.model.llm = self.part(partial(Transformer, config.text))
        self.model.dit = self.part(partial(NextDiT, config.dit), compile_target=True)
        self.eva = None                                              # draws without it
        unet = self.part(partial(UNet, decoder["unet"]), compile_target=True)
        self.decoder = PixelDecoder(unet, self.part(partial(VAE, decoder["vae"]), torch.float32))

    def part(self, build, dtype=None, compile_target=False):
        """build() without memory, until it is called."""
        return self.load_when_called(random_module(build, "meta", dtype or self.precision), compile_target)


class Training:
    """Stage 1 as train.py runs it on a GPU: the language model frozen in bf16, queries and DiT in fp32 under
    autocast, fused AdamW, averaged weights; one random batch with features from the cache."""

    def __init__(self, config, batch, device):
        torch.manual_seed(0)
        self.args = SimpleNamespace(optimizer="adamw", lr=1e-4, beta2=0.95, weight_decay=0.0, zero=False,
                                    bf16=device.type == "cuda")
        self.device, dit = device, config.dit
        with torch.device("meta"):
            self.model = BLIP3o(config)
        self.model.visual = None
        half = torch.bfloat16 if self.args.bf16 else torch.float32
        self.model.llm = frozen(random_module(partial(Transformer, config.text), device, half))
        self.model.dit = random_module(partial(NextDiT, dit), device, torch.float32)
        self.model.latent_queries = nn.Parameter(torch.randn(1, config.n_query, config.text.hidden_size,
                                                             device=device))
        self.net = self.model.train()
        self.optimizer = make_optimizer(SimpleNamespace(trained=self.model), self.args)
        self.ema = EMA(self.model, 0.9999)
        self.ids = torch.randint(10, 200, (batch, 32))               # on the host, as train.ON_HOST says
        shape = batch, dit.in_channels, config.grid, config.grid
        noise = {"features": torch.randn(batch, config.grid ** 2, dit.in_channels), "x0": torch.randn(shape),
                 "t": torch.rand(batch), "dropped": torch.rand(batch) < 0.1}
        self.batch = {name: tensor.to(device) for name, tensor in noise.items()}

    def step(self):
        """One step; its loss, a scalar on the device."""
        with autocast(self.args, self.device):
            loss = self.net(self.ids, **self.batch)["flow"].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.ema.params.values()), 1.0)
        self.optimizer.step()
        self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


# ---- the table --------------------------------------------------------------------------------------------

class Bench:
    """The device, the sizes, and the table of all checks so far, printed and written as it grows."""

    def __init__(self, args):
        self.args, self.device, self.began = args, pick_device("auto"), time.monotonic()
        self.cuda = self.device.type == "cuda"
        self.half = "bf16" if self.cuda else "fp32"
        self.sizes = sizes(args.quick or not self.cuda)
        self.rows, self.seconds, self.section, self.ends = [], {}, "", 0.0
        self.machine = {
            "device": torch.cuda.get_device_name(self.device) if self.cuda else "CPU",
            "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0],
            "sizes": self.sizes.name, "precision": self.half}

    def row(self, check, value=None, unit="", bound=None, note="", ok=None, **more):
        """One more row. bound: the most that `value` may be."""
        ok = bool(value <= bound) if bound is not None and value is not None else ok
        self.rows.append({"section": self.section, "check": check, "value": value, "unit": unit,
                          "bound": bound, "ok": ok, "note": note, **more})
        print("  " + "   ".join(cell for cell in self.cells(self.rows[-1]) if cell), flush=True)

    def cells(self, row):
        """The row as words: check, value, bound, verdict."""
        value = "" if row["value"] is None else f"{row['value']:.4g} {row['unit']}".strip()
        bound = "" if row["bound"] is None else f"{row['bound']:g}"
        note = f"({row['note']})" if value and row["note"] else row["note"]
        verdict = {None: "", True: "ok", False: "FAILED"}[row["ok"]]
        return [row["check"], f"{value} {note}".strip(), bound, verdict]

    def left(self):
        """Seconds left to this section."""
        return self.ends - time.monotonic()

    def time(self, run, rounds=1):
        """Seconds of one run() on the device."""
        self.wait()
        start = time.perf_counter()
        for _ in range(rounds):
            run()
        self.wait()
        return (time.perf_counter() - start) / rounds

    def wait(self):
        """Until the device has done all that it was asked."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def free(self):
        """Give back the memory of what is no longer used, and begin a new peak; returns the bytes in use."""
        gc.collect()
        torch.compiler.reset()
        if not self.cuda:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak_note(self):
        """The peak memory since `free`, in words."""
        return f", peak {torch.cuda.max_memory_allocated(self.device) / GIB:.2f} GiB" if self.cuda else ""

    def pipeline(self, dtype, **options):
        """A RandomPipeline of the whole model."""
        return RandomPipeline(self.sizes.config, self.sizes.decoder, self.device, dtype, **options)

    def save(self):
        """Write gpu.json and gpu.md."""
        table = ["| check | value | bound | |", "|---|---|---|---|"]
        for section, seconds in self.seconds.items():
            table.append(f"| **{section}**, {seconds:.0f} s | | | |")
            table += [f"| {' | '.join(self.cells(row))} |" for row in self.rows if row["section"] == section]
        head = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        text = "\n".join([f"# GPU checklist\n\n{head}\n", *table]) + "\n"
        write_text(Path(self.args.out) / "gpu.md", text)
        save_results(self.args, {"machine": self.machine, "seconds": self.seconds, "rows": self.rows})


@contextmanager
def time_limit(seconds):
    """Within: TimeoutError after so many seconds, where signals allow that."""
    def stop(*_):
        raise TimeoutError(f"took more than {seconds:.0f} s")
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def traced_only():
    """Within: torch.compile traces, and generates no code, which takes minutes on a CPU."""
    return patch.object(torch, "compile", partial(torch.compile, backend="eager"))


@contextmanager
def tf32(on):
    """Within: fp32 products and convolutions in TF32, or exactly."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = on
    try:
        yield
    finally:
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value


# ---- speed ------------------------------------------------------------------------------------------------

@contextmanager
def no_recompilation(bench, what):
    """Within: `what`, after its warm-up. A row says how many graphs torch.compile has compiled meanwhile."""
    from torch._dynamo.utils import counters
    graphs = counters["stats"]["unique_graphs"]
    yield
    again = counters["stats"]["unique_graphs"] - graphs
    bench.row(f"graphs compiled again, {what}", again, bound=0, note=f"{graphs} at first")


def image_seconds(bench, pipe, n, label):
    """Rows of n images at once, with official settings: seconds per image, share of each part, peak memory.
    Returns the seconds of all."""
    s, size = bench.sizes, (bench.sizes.side,) * 2
    prompts, seeds = [PROMPT] * n, list(range(n))
    pipe.negatives.clear()
    pipe.seconds.clear()
    seconds = bench.time(lambda: pipe.images(prompts, seeds, s.steps, 3.0, s.decoder_steps, 3.0, size))
    parts = dict(pipe.seconds)
    note = ", ".join(f"{part} {spent / seconds:.1%}" for part, spent in parts.items())
    check = f"{s.name}, {s.side} px, {s.steps} and {s.decoder_steps} steps, {bench.half}, {label}, batch {n}"
    bench.row(check, seconds / n, "s per image", note=note + bench.peak_note(), parts=parts)
    return seconds


def warm_up(bench, pipe, n):
    """n images in one step of each network: loads the parts, or compiles them."""
    pipe.negatives.clear()
    pipe.images([PROMPT] * n, list(range(n)), 1, 3.0, 1, 3.0, (bench.sizes.side,) * 2)


def draw_images(bench):
    """Seconds per image of the whole model, eager."""
    pipe, seconds, last = bench.pipeline(bench.half), 0.0, 1
    for n in bench.sizes.batches:
        if 1.5 * seconds * n / last > bench.left():
            bench.row(f"images, batch {n}", note="skipped: no time left")
            continue
        warm_up(bench, pipe, n)
        bench.free()
        seconds, last = image_seconds(bench, pipe, n, "eager"), n
    vae = pipe.decoder.vae
    side = bench.sizes.side // vae.factor
    latents = torch.randn(1, vae.config.latent_channels, side, side, device=bench.device)
    with torch.no_grad():
        seconds = bench.time(partial(vae.decode, latents), 2)
    bench.row("VAE's part of the decoder, fp32, batch 1", seconds, "s per image")


def draw_compiled(bench):
    """Seconds per image compiled, after seconds of compiling; no step compiles again."""
    pipe = bench.pipeline(bench.half, compiled=True)
    warm_up(bench, pipe, 1)                                          # loads: the next call compiles
    bench.row("compiling DiT and UNet", bench.time(partial(warm_up, bench, pipe, 1)), "s")
    with no_recompilation(bench, f"sampling in {bench.sizes.steps} + {bench.sizes.decoder_steps} steps"):
        image_seconds(bench, pipe, 1, "compiled")


def decode_text(bench):
    """Greedy tokens per second with generate_text's KV cache, prompts of 64 tokens."""
    for name in (bench.half, "int8"):
        bench.free()
        decode_as(bench, name)


def decode_as(bench, name):
    """The rows of `decode_text` in one precision."""
    s, config = bench.sizes, bench.sizes.config
    with torch.device("meta"):
        model = BLIP3o(replace(config, dit=None, n_query=0)).eval()
    build = partial(Transformer, config.text)
    model.llm = random_module(build, bench.device, pick_dtype(name, bench.device))
    for n in s.text_batches:
        ids = torch.randint(10, 200, (n, 64), device=bench.device)
        run = partial(model.generate_text, ids, stop_ids=[-1])
        run(max_new_tokens=3)
        seconds = bench.time(partial(run, max_new_tokens=s.tokens))
        bench.row(f"{s.name}, {s.tokens} tokens after 64, {name}, batch {n}", n * s.tokens / seconds,
                  "tokens/s", note=bench.peak_note().removeprefix(", "))


def products_per_second(bench, dtype):
    """The device's operations a second in one large product, measured."""
    n = bench.sizes.matrix
    a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
    bench.time(lambda: a @ b, 3)
    most = 2 * n ** 3 / bench.time(lambda: a @ b, 20)
    bench.row(f"{bench.half} product of {n} x {n}", most / 1e12, "TFLOP/s")
    return most


def encode_images(bench, dtype):
    """EVA-CLIP's images per second."""
    clip = bench.sizes.decoder["clip"]
    eva = random_module(partial(EvaClip, clip), bench.device, dtype)
    pixels = torch.randn(8, 3, clip.image_size, clip.image_size, device=bench.device, dtype=dtype)
    with torch.no_grad():
        eva.encode(pixels)
        seconds = bench.time(partial(eva.encode, pixels), 3)
    bench.row(f"EVA-CLIP features, {bench.half}, batch 8", 8 / seconds, "images/s")


def train_images(bench):
    """Images per second and MFU of a step of stage 1, features cached: eager, then with a compiled DiT."""
    s, dtype = bench.sizes, pick_dtype(bench.half, bench.device)
    most = products_per_second(bench, dtype)
    encode_images(bench, dtype)

    def measure(training, label, operations, rounds):
        seconds, n = bench.time(training.step, rounds), len(training.ids)
        mfu = operations / seconds / most
        bench.row(f"stage 1 of the {s.name}, {label}, batch {n}", n / seconds, "images/s",
                  note=f"{seconds:.3f} s a step, MFU {mfu:.1%}{bench.peak_note()}",
                  mfu=mfu, flops=operations)
    for n in s.train_batches:
        training = None                                              # frees the one before
        bench.free()
        with tf32(True):                                             # as train.py
            training = Training(s.config, n, bench.device)
            with FlopCounterMode(display=False) as counter:
                training.step()
            operations = counter.get_total_flops()
            training.step()
            measure(training, "eager", operations, 5)
    with tf32(True):
        training.model.dit.compile()
        bench.row("compiling the DiT's step", bench.time(training.step), "s")
        training.step()
        with no_recompilation(bench, f"training in {s.rounds} steps"):
            measure(training, "compiled", operations, s.rounds)


# ---- exactness --------------------------------------------------------------------------------------------

def float_dtype(module):
    """The dtype in which a module computes."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def networks(config, decoder, device):
    """{name: (build, output(module))}: each network of the model with one random input, batch 2."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(2, *shape, generator=generator).to(device)
    ids = torch.randint(10, 200, (2, 64), generator=generator).to(device)
    positions, t = torch.arange(64, device=device).expand(2, 64), torch.tensor([0.2, 0.7], device=device)
    x = noise(config.dit.in_channels, config.grid, config.grid)
    cond = noise(config.n_query, config.dit.cond_dim)
    latents, features = noise(4, 32, 32), noise(64, decoder["unet"].cross_attention_dim)
    pixels, time_ids = noise(3, *[decoder["clip"].image_size] * 2), torch.full((2, 6), 256.0, device=device)

    def unet(module):
        y, c = latents.to(float_dtype(module)), features.to(float_dtype(module))
        return module(y, 500.0, c, c.mean(1), time_ids)
    return {
        "LLM, hidden states": (partial(Transformer, config.text),
                               lambda m: m(m.embed(ids), positions)),
        "DiT, velocity": (partial(NextDiT, config.dit), lambda m: m(x, t, cond)),
        "UNet, eps": (partial(UNet, decoder["unet"]), unet),
        "EVA-CLIP, features": (partial(EvaClip, decoder["clip"]),
                               lambda m: m.encode(pixels.to(float_dtype(m))))}


@torch.no_grad()
def parity(bench):
    """Every precision against fp32 at official widths, few layers; fp32 on the GPU against the CPU."""
    s = bench.sizes
    with tf32(False):
        for part, (build, output) in networks(s.few, s.few_decoder, bench.device).items():
            bench.free()
            reference = random_module(build, bench.device, torch.float32)
            exact = output(reference)
            weights = reference.state_dict()
            for name, bound in BOUNDS.items():
                dtype = pick_dtype(name, bench.device)
                module = load_strict(build, weights, "random weights", bench.device, dtype)
                gap = (output(module).float() - exact).norm() / exact.norm()
                bench.row(f"{part}, {name} against fp32", gap.item(), "of the norm", bound)
        tiny = sizes(True)
        here = networks(tiny.few, tiny.few_decoder, torch.device("cpu"))
        for part, (build, output) in networks(tiny.few, tiny.few_decoder, bench.device).items():
            check = f"{part}, fp32, GPU against CPU, tiny"
            if not bench.cuda:
                bench.row(check, note=NEEDS_CUDA)
                continue
            module = random_module(build, torch.device("cpu"), torch.float32)
            exact = here[part][1](module)
            gap = max_relative_difference(output(module.to(bench.device)).cpu(), exact)
            bench.row(check, gap, "of the largest", 1e-4)


def offload(bench):
    """The peak memory of an image, against what `sample.py --dry-run` predicts."""
    s = bench.sizes
    modes = {False: "at once", True: "with --offload", "layers": "with --offload layers"}
    for name in (bench.half, "int8"):
        for i, offload in enumerate(modes):
            pipe = None                                              # frees the one before
            before = bench.free()
            pipe = bench.pipeline(name, offload=offload)
            predicted = peaks(pipe, components(pipe), USES["draw"], 1, s.small_side)[i] / GIB
            pipe.images([PROMPT], [0], 2, 3.0, 1, 3.0, (s.small_side,) * 2)
            check = f"{s.name}, {s.small_side} px, {name}, peak {modes[offload]}"
            if bench.cuda:
                peak = (torch.cuda.max_memory_allocated(bench.device) - before) / GIB
                bench.row(check, abs(peak / predicted - 1), "from the prediction", 0.05,
                          f"{peak:.2f} GiB, predicted {predicted:.2f}")
            else:
                bench.row(check, note=NEEDS_CUDA)


def fused(bench):
    """train.py's optimizer is the fused AdamW, and steps as the plain one does."""
    s, torch_args = bench.sizes, dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    module = random_module(partial(NextDiT, s.few.dit), bench.device, torch.float32)
    plain = [nn.Parameter(p.detach().clone()) for p in module.parameters()]
    args = SimpleNamespace(optimizer="adamw", lr=1e-3, beta2=0.95, weight_decay=0.01, zero=False)
    ours = make_optimizer(SimpleNamespace(trained=module), args)
    for p, q in zip(module.parameters(), plain):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    reference = torch.optim.AdamW(plain, **torch_args, fused=False, foreach=False)
    ours.step()
    reference.step()
    gap = max(max_relative_difference(p.detach(), q.detach()) for p, q in zip(module.parameters(), plain))
    bench.row("fused AdamW against the plain one, one step", gap, "of the largest", 1e-6)
    bench.row("train.py's optimizer is fused", ok=all(group["fused"] for group in ours.param_groups))
    foreach = torch.optim.AdamW(plain, **torch_args, fused=False)
    numbers = sum(p.numel() for p in plain) / 1e6
    for name, optimizer in (("fused", ours), ("foreach", foreach)):
        optimizer.step()
        seconds = bench.time(optimizer.step, 5)
        bench.row(f"AdamW, {name}, {numbers:.0f} M numbers", seconds * 1000, "ms a step")


def ddp(bench):
    """Losses of one process with DistributedDataParallel, and of train.py under torchrun, against plain."""
    s = bench.sizes
    config, losses, (steps, _) = sizes(True).config, [], s.train
    dist.init_process_group("nccl" if bench.cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (lambda model: model, DistributedDataParallel):
            training = Training(config, 8, bench.device)
            training.net = wrap(training.model)
            losses.append(torch.stack([training.step() for _ in range(steps)]))
    finally:
        dist.destroy_process_group()
    gap = max_relative_difference(*losses)
    bench.row(f"losses of {steps} steps, DDP against plain", gap, "of the largest", 1e-3)
    check = "losses of train.py, torchrun against plain"
    if not bench.cuda:
        bench.row(check, note=NEEDS_CUDA)
        return
    logs = train_logs(bench, *s.train)
    losses = [torch.tensor([row["flow"] for row in log if "flow" in row]) for log in logs]
    bench.row(check, max_relative_difference(*losses), "of the largest", 1e-3, f"{len(losses[0])} steps")


def train_logs(bench, steps, batch):
    """The rows of log.jsonl of train.py's stage 1 on the nano weights: plain, and with torchrun."""
    script = str(Path(__file__).resolve().parent.parent / "train.py")
    flags = [script, "--stage", "1", "--steps", str(steps), "--batch", str(batch), "--log-every", "1",
             "--no-compile", "--quiet", "--device", bench.device.type, "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    launchers = {"plain": [], "torchrun": torchrun}
    with tempfile.TemporaryDirectory() as folder:
        runs = [subprocess.Popen([sys.executable, *launcher, *flags, f"{folder}/{name}"], text=True,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                for name, launcher in launchers.items()]
        try:
            for run in runs:
                errors = run.communicate(timeout=bench.left())[1]
                if run.returncode:
                    raise RuntimeError(f"train.py ended with code {run.returncode}: {errors[-500:]}")
        finally:
            for run in runs:
                run.terminate()
        return [[json.loads(line) for line in (Path(folder) / name / "log.jsonl").read_text().splitlines()]
                for name in launchers]


# Title, function, and the most seconds that it may take.
SECTIONS = (("images", draw_images, 90), ("text", decode_text, 60), ("training", train_images, 140),
            ("precision", parity, 60), ("memory", offload, 90), ("optimizer", fused, 30),
            ("processes", ddp, 60), ("compiled images", draw_compiled, 150))


def gpu(args):
    """Check and time this machine's GPU in under 8 minutes: images, text and training of a random 4B model,
    precisions, memory, recompilation, the optimizer, DDP. Exit code 1 if a check failed.

    On a CPU, or with --quick, tiny sizes show that it runs.
    """
    bench = Bench(args)
    for title, check, most in SECTIONS:
        bench.section, start = title, time.monotonic()
        bench.ends = min(start + most, bench.began + LIMIT)
        print(title, flush=True)
        try:
            if bench.left() < 1:
                bench.row("skipped", note=f"{LIMIT} s are over")
            else:
                with time_limit(bench.left()), nullcontext() if bench.cuda else traced_only():
                    check(bench)
        except Exception as error:                                   # the other sections still count
            small = isinstance(error, torch.OutOfMemoryError)        # no mistake of ours
            about = " ".join(f"{type(error).__name__}: {error}"[:300].split())
            bench.row(f"the rest of {title}", note=about, ok=None if small else False)
        bench.seconds[title] = time.monotonic() - start
        bench.free()
        bench.save()
    return int(any(row["ok"] is False for row in bench.rows))
