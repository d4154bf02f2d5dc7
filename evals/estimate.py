"""`--dry-run` of train.py and sample.py: parameters, memory and work, before anything is read.

Modules are built on the device "meta", where they have sizes and no memory.
"""
import math
from contextlib import suppress
from pathlib import Path

import torch

from checkpoint import (
    DTYPES,
    INT8_BLOCK,
    Int8,
    Int8Linear,
    activation_dtype,
    folder_parts,
    quantise_linears,
    stacked_layers,
    unties,
)
from clip_decoder import PRESETS as DECODER_PRESETS
from clip_decoder import VAE, EvaClip, PixelDecoder, UNet
from model import PRESETS, BLIP3o, preset
from sample import BATCH, DECODER_PIXELS, GIB, Pipeline, pick_device, pick_dtype
from train import STAGES

UNET_WORK, VAE_WORK = 13, 7.5       # working memory in full-size feature maps of the first level's width
BLUEPRINTS = [name for name in PRESETS if name != "nano"]       # nano's vocabulary is its tokenizer's
# What each use of a model needs.
USES = {"draw": ("LLM", "DiT", "UNet", "VAE"), "answer": ("Qwen ViT", "LLM"),
        "reconstruct": ("EVA-CLIP", "UNet", "VAE")}


# ---- sampling ---------------------------------------------------------------------------------------------

class Blueprint(Pipeline):
    """A Pipeline of an official size without files and without memory."""

    def __init__(self, name, device="auto", dtype="auto"):
        self.folder, self.device, sizes = None, pick_device(device), DECODER_PRESETS["official"]
        self.precision = pick_dtype(dtype, self.device)
        self.dtype, config = activation_dtype(self.precision), preset(name)
        config.text.tie_word_embeddings &= not unties(self.precision)
        with torch.device("meta"):
            self.model = BLIP3o(config).to(self.dtype)
            self.eva = EvaClip(sizes["clip"]).to(self.dtype)
            unet, vae = UNet(sizes["unet"]).to(self.dtype), VAE(sizes["vae"])
        if isinstance(self.precision, Int8):
            for module in (self.model, self.eva, unet):
                quantise_linears(module, self.dtype)
        self.decoder = PixelDecoder(unet, vae)


def components(pipe):
    """{name: module} of what a Pipeline's folders hold; nothing is read but headers."""
    parts, model = folder_parts(pipe.eva_folder) if pipe.folder else {"clip", "unet"}, pipe.model
    modules = {"Qwen ViT": model.visual, "LLM": model.llm, "DiT": model.dit, "regressor": model.regressor}
    if "clip" in parts:
        modules["EVA-CLIP"] = pipe.eva
    if parts & {"unet", "vae"}:
        modules |= {"UNet": pipe.decoder.unet, "VAE": pipe.decoder.vae}
    return {name: module for name, module in modules.items() if module is not None}


def working_memory(pipe, name, n, size=None):
    """Bytes that a part needs beside its weights for n images of `size` pixels a side (None: as the
    decoder does), roughly: its largest intermediate results."""
    bytes, n, config = pipe.dtype.itemsize, min(n, BATCH), pipe.model.config
    if name in ("LLM", "Qwen ViT"):         # SwiGLU's three, and residuals
        sizes, tokens = (config.text, 256) if name == "LLM" else (config.vision, 1024)
        return tokens * n * (3 * sizes.intermediate_size + 8 * sizes.hidden_size) * bytes
    if name == "DiT":                       # the condition's keys and values in every layer, too
        dit = config.dit
        return 128 * n * (3 * dit.ffn_dim + (8 + 2 * dit.n_layers) * dit.dim) * bytes
    if name == "EVA-CLIP":
        eva = pipe.eva.config
        return n * eva.image_size ** 2 // eva.patch_size ** 2 * eva.mlp_hidden * 2 * bytes
    unet, vae = pipe.decoder.unet.config, pipe.decoder.vae
    side = size // vae.factor if size else unet.sample_size
    n = max(1, min(n, DECODER_PIXELS // (side * vae.factor) ** 2))
    if name == "UNet":                      # and the largest weight once more, in another memory layout
        largest = max(p.nbytes for p in pipe.decoder.unet.parameters())
        return int(UNET_WORK * 2 * n * side ** 2 * unet.block_out_channels[0] * bytes) + largest
    return int(VAE_WORK * n * (side * vae.factor) ** 2 * vae.config.block_out_channels[0] * 4)


def dequantised(pipe, module):
    """Bytes of the largest int8 weight of a module, or of a block of it on a CPU, as floats: what Int8Linear
    makes of it for a product. 0 without int8."""
    largest = max((m.weight.numel() for m in module.modules() if isinstance(m, Int8Linear)), default=0)
    return min(largest, INT8_BLOCK if pipe.device.type == "cpu" else largest) * pipe.dtype.itemsize


def weight_bytes(module):
    """Bytes of a module's weights."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def unread_bytes(pipe, module):
    """Bytes of those weights that stay in their file: of a table of embeddings that is stored in the dtype
    in which it is used, as official ones are in bf16, a CPU maps only the rows that it looks up; of one that
    is the head, too, all."""
    table = getattr(module, "embed_tokens", None)
    if table is None or pipe.device.type != "cpu" or module.config.tie_word_embeddings:
        return 0
    stored = getattr(module, "sources", {}).get("embed_tokens.weight")
    dtype = DTYPES[stored.dtype] if stored is not None else torch.bfloat16
    return table.weight.nbytes * (dtype == table.weight.dtype)


def layered_bytes(module):
    """Bytes of a module's weights of which only the largest of its stacked layers is in memory."""
    layers = [weight_bytes(module.get_submodule(name)) for name in stacked_layers(module)]
    return weight_bytes(module) - sum(layers) + max(layers, default=0)


def peaks(pipe, modules, parts, n, size=None):
    """Bytes that a use of `parts` takes beside the process itself, at its peak: all modules at once, with
    offload, and with offload of layers. Arguments as those of `components` and `working_memory`."""
    work = {name: working_memory(pipe, name, n, size) + dequantised(pipe, modules[name]) for name in parts}
    unread = {name: unread_bytes(pipe, modules[name]) for name in parts}
    return (sum(weight_bytes(modules[name]) - unread[name] for name in parts) + max(work.values()),
            max(weight_bytes(modules[name]) - unread[name] + work[name] for name in parts),
            max(layered_bytes(modules[name]) - unread[name] + work[name] for name in parts))


def estimate_sampling(args):
    """`sample.py --dry-run`: what each part takes, and the peak memory of each use."""
    without_files = args.ckpt in BLUEPRINTS and not Path(args.ckpt).exists()
    if without_files:
        if args.eva:
            raise ValueError(f"--eva: there is no folder {args.ckpt}, so all parts of that size count: leave"
                             " it out")
        pipe = Blueprint(args.ckpt, args.device, args.dtype)
    else:
        pipe = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva)
    modules = components(pipe)
    if args.eva and not modules.keys() & {"EVA-CLIP", "UNet"}:
        raise ValueError(f"--eva: there is neither an EVA-CLIP nor a diffusion-decoder in {args.eva}")
    sizes = {name: (sum(p.numel() for p in module.parameters()), weight_bytes(module))
             for name, module in modules.items()}
    total = tuple(map(sum, zip(*sizes.values())))
    print(f"{args.ckpt} in {str(pipe.precision).removeprefix('torch.')}, on {pipe.device.type}")
    print(f"{'':16}{'parameters':>16}{'GiB':>9}")
    for name, (count, bytes) in {**sizes, "all": total}.items():
        print(f"{name:16}{count:16,}{bytes / GIB:9.3f}")
    print(f"\n{'peak, GiB':25}{'at once':>16}{'--offload':>12}{'--offload layers':>19}")
    if not without_files:
        with suppress(OSError, ValueError):
            _ = pipe.tokenizer          # takes memory, too
    base = pipe.peak_memory()           # Python and PyTorch themselves
    for use, parts in USES.items():
        if not sizes.keys() >= set(parts):
            continue
        cells = ["unknown" if base is None else f"{(base + bytes) / GIB:.3f}"
                 for bytes in peaks(pipe, modules, parts, args.n, args.size)]
        print(f"{use:25}{cells[0]:>16}{cells[1]:>12}{cells[2]:>19}")


# ---- training ---------------------------------------------------------------------------------------------

# What each stage trains, and what else it runs; in the order of the columns.
PARTS = ("EVA-CLIP", "VAE", "UNet", "Qwen ViT", "LLM", "queries", "DiT")
TRAINED = {"clip": {"EVA-CLIP"}, "vae": {"VAE"}, "decoder": {"UNet"}, "0": {"Qwen ViT", "LLM"},
           "1": {"queries", "DiT"}, "2": {"queries", "DiT"}}
FROZEN = {"decoder": {"EVA-CLIP", "VAE"}, "1": {"EVA-CLIP", "LLM"}, "2": {"EVA-CLIP", "LLM"}}
PROMPT = 160                        # tokens of a long caption in its template
TFLOPS, MFU = 989, 0.4              # peak of an H100 in bf16, and the fraction of it that is reached


def parts_of_stage(stage, design=None, joint=0.0, prompt_images=False):
    """(names of PARTS that are trained, names that run frozen) in a stage."""
    trained, kept = set(TRAINED[stage]), set(FROZEN.get(stage, ()))
    if joint:
        trained |= {"Qwen ViT", "LLM"}
    elif prompt_images:
        kept |= {"Qwen ViT"}
    if design == "vae-fm":
        kept = kept - {"EVA-CLIP"} | {"VAE"}
    return trained, kept - trained


def estimate_training(args):
    """Print which parts are trained in which stage, and for args.stage parameters, memory and work at the
    sizes of model.PRESETS."""
    rows = [(name, *parts_of_stage(name)) for name in STAGES]
    rows += [(f"1 --design {design}", *parts_of_stage("1", design)) for design in ("clip-mse", "vae-fm")]
    rows += [("1 --joint", *parts_of_stage("1", joint=0.5))]
    print("| stage | " + " | ".join(PARTS) + " |\n|" + "---|" * (len(PARTS) + 1))
    for name, trained, kept in rows:
        cells = ["**trained**" if part in trained else "frozen" if part in kept else "" for part in PARTS]
        if name.endswith("clip-mse"):
            cells[-1] = "**linear map**"
        print(f"| `{name}` | " + " | ".join(cells) + " |")
    print(f"\nstage {args.stage}, batch {args.batch} on {args.gpus} process{'es' if args.gpus > 1 else ''}, "
          f"{args.steps} steps\n")
    print("| size | trained | frozen | weights and optimizer | activations | TFLOP a sample | "
          "days on this many GPUs |")
    print("|---|---|---|---|---|---|---|")
    for size in PRESETS:
        trained, kept, weights, activations, work = estimate(size, args)
        days = work * args.batch * args.steps / (args.gpus * TFLOPS * 1e12 * MFU) / 86400
        print(f"| {size} | {trained:,} | {kept:,} | {weights / 2 ** 30:.1f} GiB | "
              f"{activations / 2 ** 30:.1f} GiB | {work / 1e12:.3g} | {days:.2g} |")
    print(f"\nMemory for each process, images of 448 px at the released sizes, {PROMPT} tokens of prompt; "
          f"days at {MFU:.0%} of {TFLOPS} TFLOP/s. UNet and VAE: weights and optimizer only.")


def estimate(size, args):
    """(trained and frozen parameters, bytes of weights and optimizer, bytes of activations, operations of a
    sample) of args.stage at a size of model.PRESETS.

    Activations are 34 bf16 numbers a token, layer and unit of width (17 that a layer keeps, attention's and
    the MLP's wider ones), or one with --checkpointing. Two operations a parameter and token forward, four
    backward, of which frozen weights need two, and those that no gradient passes none.
    """
    with torch.device("meta"):
        model = BLIP3o(preset(size, **({"vocab_size": 512} if size == "nano" else {})))
        sizes = DECODER_PRESETS["nano" if size == "nano" else "official"]
        eva, unet, vae = EvaClip(sizes["clip"]), UNet(sizes["unet"]), VAE(sizes["vae"])
    modules = dict(zip(PARTS, (eva, vae, unet, model.visual, model.llm, None, model.dit)))
    n = {part: sum(p.numel() for p in module.parameters()) for part, module in modules.items() if module}
    n["queries"] = model.latent_queries.numel()
    trained, kept = parts_of_stage(args.stage, args.design, args.joint, args.prompt_images)
    count, frozen_count = sum(n[part] for part in trained), sum(n[part] for part in kept)
    moments = 8 / (args.gpus if args.zero else 1)                    # two of AdamW; Muon's matrices have one
    # Weights, gradients and averages in fp32; frozen weights in bf16.
    weights = count * (4 + 4 + 4 + moments) + frozen_count * 2

    patches, latents = (eva.config.image_size // eva.config.patch_size) ** 2, unet.config.sample_size ** 2
    tokens = {"EVA-CLIP": patches, "DiT": 64, "LLM": model.config.n_query, "Qwen ViT": patches,
              "UNet": latents, "VAE": latents, "queries": 0}
    if args.stage == "0" or args.joint:
        tokens["LLM"] += PROMPT
    c = model.config
    layers = {"EVA-CLIP": (eva.config.layers, eva.config.width), "DiT": (c.dit.n_layers, c.dit.dim),
              "LLM": (c.text.num_hidden_layers, c.text.hidden_size),
              "Qwen ViT": (c.vision.depth, c.vision.hidden_size)}
    passed = trained | ({"LLM"} if "queries" in trained else set())  # gradients go through these
    micro, numbers = args.batch / args.gpus / args.accumulate, 2 if args.checkpointing else 34
    activations = sum(micro * tokens[part] * math.prod(layers[part]) * 2 * numbers
                      for part in passed & set(layers))
    operations = {part: 6 if part in trained else 4 if part in passed else 2 for part in trained | kept}
    work = sum(n[part] * tokens[part] * operations[part] for part in operations)
    work += 2 * n["LLM"] * PROMPT if "LLM" in kept else 0            # the prompt: forward only
    return count, frozen_count, weights, activations, work
