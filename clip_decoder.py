"""BOTH halves of the image autoencoder: EVA-CLIP (pixels -> 64 features) and SDXL UNet + VAE (64 features -> pixels).

The paper takes both from others and freezes them: EVA-CLIP-E/14-plus at 448 px, whose features are the flow's targets,
and Emu2's visual decoder, which is SDXL with its text condition replaced by the 64 features. Between the two there is
no normalisation, projection or statistics: features are raw.

    pixels (B,3,448,448) -> EvaClip -> (B,1024,1792) -> pool -> (B,64,1792) -> PixelDecoder -> pixels (B,3,1024,1024)

In reading order: weights on disk; EVA-CLIP and its trainer `CLIP`; VAE; UNet; Euler schedule; PixelDecoder; PRESETS.
Parameter names are the released checkpoints' (BLIP3-o's vision tower; diffusers' UNet2DConditionModel, AutoencoderKL).
"""
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# ---------------------------------------------------------------------------------------------------------------------
# Weights on disk: one reader, one strict loader, one writer for all three networks


def weight_map(folder):
    """{tensor name: file} of the safetensors in `folder` (or of one file): shards and .bf16/.fp16 variants too.

    Where several variants lie side by side, the plain one wins, then bf16, then fp16. {} where there is none.
    Raises ValueError where a shard named by the index is absent, a file is cut short or no safetensors file, or where
    two files hold the same tensor.
    """
    folder = Path(folder)
    found = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    variant = lambda f: 1 if ".bf16" in f.name else 2 if ".fp16" in f.name else 0
    best = min(map(variant, found), default=0)
    found = [f for f in found if variant(f) == best]
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        if variant(index) == best:
            found = [folder / f for f in sorted(set(read_json(index)["weight_map"].values()))]
            if absent := [f.name for f in found if not f.exists()]:
                raise ValueError(f"{folder} lacks the shards {', '.join(absent)} that {index.name} names")
    where = {}
    for file in found:
        try:
            with safe_open(file, "pt") as f:
                names = list(f.keys())
        except SafetensorError as error:
            raise ValueError(f"{file} is cut short or broken ({error}): download it again") from None
        for name in names:
            if name in where:
                raise ValueError(f"{name} is both in {where[name]} and in {file}: remove one of the files")
            where[name] = file
    return where


def read_weights(where, prefix="", device="cpu", dtype=torch.float32):
    """The tensors of a `weight_map` whose names start with `prefix`, which is cut off: mapped, copied at most once.

    A file is opened anew for each tensor: what was mapped of the one before leaves memory with its mapping. On the device
    "meta" only headers are read.
    """
    state = {}
    for name, file in where.items():
        if name.startswith(prefix):
            with safe_open(file, "pt") as f:
                state[name[len(prefix):]] = (torch.empty(f.get_slice(name).get_shape(), dtype=dtype, device="meta")
                                             if str(device) == "meta" else f.get_tensor(name).to(device, dtype))
    return state


def load_strict(build, state, source):
    """`build()` a module without memory, then assign it `state`; ValueError listing every key that misfits."""
    if not state:
        raise ValueError(f"{source} holds no weights (*.safetensors)")
    with torch.device("meta"):
        module = build()
    want = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    got = {k: tuple(v.shape) for k, v in state.items()}
    wrong = [f"missing {k}" for k in want if k not in got] + [f"unexpected {k}" for k in got if k not in want]
    wrong += [f"{k} has shape {got[k]} instead of {want[k]}" for k in want if k in got and got[k] != want[k]]
    if wrong:
        raise ValueError(f"{type(module).__name__} weights in {source} misfit in {len(wrong)} keys: {'; '.join(wrong)}")
    module.load_state_dict(state, assign=True)
    return module.eval()


def save_weights(module, path, dtype=None):
    """Write a module's tensors to `path`, as `dtype` if given; through a temporary file, against crashes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in module.state_dict().items()}
    save_file(state, f"{path}.tmp", metadata={"format": "pt"})
    os.replace(f"{path}.tmp", path)


def read_json(path):
    """The object in a JSON file."""
    return json.loads(Path(path).read_text())


def write_json(path, content):
    """Write an object as JSON, through a temporary file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------------------------------------------------------------
# EVA-CLIP: pixels -> features


@dataclass(frozen=True)
class EvaConfig:
    """Sizes of the image tower; the defaults are EVA-CLIP-E/14-plus at 448 px (4.35 B parameters)."""
    image_size: int = 448
    patch_size: int = 14
    width: int = 1792
    layers: int = 64
    heads: int = 16
    mlp_hidden: int = 15360
    n_query: int = 64               # features per image after pooling


def pool(tokens, n=64):
    """Average-pool a square grid, row-major: (B, N, C) -> (B, n, C). Official: `early_pool2d_4`, 32x32 -> 8x8.

    Raises ValueError where a sqrt(N) x sqrt(N) grid does not divide into sqrt(n) x sqrt(n) equal windows.
    """
    B, N, C = tokens.shape
    side, out = math.isqrt(N), math.isqrt(n)
    if side * side != N or out * out != n or n < 1 or side % out:
        raise ValueError(f"cannot pool {N} tokens to {n}: both must be square grids, one a multiple of the other")
    k = side // out
    return tokens.view(B, out, k, out, k, C).mean(dim=(2, 4)).reshape(B, n, C)


class EvaBlock(nn.Module):
    """Transformer block whose LayerNorm sits at the END of each residual branch: x + LN(attn(x)), then x + LN(mlp(x)).

    Neither the usual pre-norm (x + attn(LN(x))) nor the original post-norm (LN(x + attn(x))): nothing ever rescales the
    residual stream, so the raw output of the last block still carries the position embedding. EVA-CLIP's `postnorm`.
    """

    def __init__(self, cfg):
        super().__init__()
        C = cfg.width
        self.heads = cfg.heads
        self.norm1 = nn.LayerNorm(C, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(C, 3 * C), "proj": nn.Linear(C, C)})
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(C, cfg.mlp_hidden), "fc2": nn.Linear(cfg.mlp_hidden, C)})

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.attn["qkv"](x).view(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                             # each (B, h, N, hd)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
        x = x + self.norm1(self.attn["proj"](y))
        return x + self.norm2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](x))))      # exact (erf) GELU


class EvaClip(nn.Module):
    """EVA-CLIP image tower: (B, 3, S, S) pixels, CLIP-normalised -> (B, (S/p)^2, C) tokens of the last block, raw."""

    def __init__(self, config):
        super().__init__()
        if config.image_size % config.patch_size or config.width % config.heads:
            raise ValueError(f"image_size must be a multiple of patch_size, and width of heads: {config}")
        self.config = config
        self.grid = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, config.width))
        p = config.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, p, stride=p)})
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.layers))
        self.init_weights()

    def init_weights(self):
        """Start values for training from scratch."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                # 1 / sqrt(fan in): the usual 0.02 at width 1792, and still large enough at width 48.
                nn.init.trunc_normal_(m.weight, std=m.weight[0].numel() ** -0.5)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.LayerNorm):
                # Each branch ends in this norm, so its gain IS the branch's size. With 1 / sqrt(number of branches) all
                # of them add unit variance, at any depth, and don't bury the pixels and positions that enter below.
                nn.init.constant_(m.weight, (2 * len(self.blocks)) ** -0.5)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        # Positions start as sines and cosines of std 0.5, not as noise of std 0.02: the pixel decoder's cross-attention
        # has no positions of its own and finds WHERE a feature belongs only from what pos_embed left in it.
        with torch.no_grad():
            self.pos_embed[0, 1:] = sincos_positions(self.config.width, self.grid)

    def forward(self, pixels, with_cls=False):
        """pixels (B, 3, S, S), CLIP-normalised -> tokens (B, (S/p)^2, C), or (tokens, class token (B, C)) with_cls."""
        S = self.config.image_size
        if tuple(pixels.shape[1:]) != (3, S, S):
            raise ValueError(f"EVA-CLIP takes pixels (B, 3, {S}, {S}), not {tuple(pixels.shape)}")
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)                      # (B, N, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed    # (B, 1+N, C), no norm
        for block in self.blocks:
            x = block(x)
        # The last block's output as it is, no final LayerNorm, no head: the flow and the decoder were trained on that.
        return (x[:, 1:], x[:, 0]) if with_cls else x[:, 1:]

    def encode(self, pixels):
        """The image features of BLIP3-o: pixels (B, 3, S, S), CLIP-normalised -> (B, 64, C)."""
        return pool(self(pixels), self.config.n_query)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """Load the tower of a model folder: its gen_vision_tower/, else its own files (model shards, or it is a tower).

        Any prefix is accepted (`model.gen_vision_tower.vision_tower.model.`, `visual.` of an original EVA-CLIP file),
        fused or split q/k/v biases too. Sizes come from the tensors, heads from our config.json or 112 channels each.
        Raises ValueError where there is no tower or where a key does not fit.
        """
        folder = Path(folder)
        tower = folder / "gen_vision_tower" if (folder / "gen_vision_tower").is_dir() else folder
        where = weight_map(tower)
        prefixes = [name.removesuffix("cls_token") for name in where if name.endswith("cls_token")]
        if len(prefixes) != 1:
            raise ValueError(f"{tower} holds {len(prefixes)} EVA-CLIP towers (tensors named *cls_token), not one")
        state = fuse_biases(read_weights(where, prefixes[0], device, dtype))
        for name in [k for k in state if k.startswith(EVA_EXTRAS)]:
            del state[name]
        return load_strict(lambda: cls(eva_config(folder, state)), state, tower)

    def save_pretrained(self, folder, dtype=None):
        """Write gen_vision_tower/model.safetensors and this tower's sizes into config.json, whose other keys stay."""
        folder = Path(folder)
        save_weights(self, folder / "gen_vision_tower" / "model.safetensors", dtype)
        path = folder / "config.json"
        content = read_json(path) if path.exists() else {}
        content.setdefault("nano_blip3o", {"format": 1})["clip"] = asdict(self.config)
        write_json(path, content)


# What an original EVA-CLIP file holds beside the blocks: the contrastive head, the text tower. BLIP3-o uses none of it.
EVA_EXTRAS = ("norm.", "head.", "text.", "logit_scale", "mask_token")


def fuse_biases(state):
    """Original EVA-CLIP and Emu2 files keep q_bias and v_bias (keys have none); BLIP3-o's a qkv.bias: [q | 0 | v]."""
    for stem in [k.removesuffix("q_bias") for k in state if k.endswith("attn.q_bias")]:
        if stem + "v_bias" in state:        # else the strict loader names what is missing
            q, v = state.pop(stem + "q_bias"), state.pop(stem + "v_bias")
            state[stem + "qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return state


def eva_config(folder, state):
    """EvaConfig from the tensors' shapes; what they don't tell (heads, pooling) from config.json here or above."""
    need = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    if absent := [k for k in need if k not in state]:
        raise ValueError(f"EVA-CLIP weights in {folder} lack {', '.join(absent)}")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    grid = math.isqrt(state["pos_embed"].shape[1] - 1)
    config = next((read_json(d / "config.json") for d in (folder, folder.parent) if (d / "config.json").exists()), {})
    ours = config.get("nano_blip3o", {}).get("clip", {})
    if "heads" not in ours and width % 112:
        raise ValueError(f"width {width} is no multiple of EVA-CLIP's 112 a head, and no config.json names the heads")
    stride = str(config.get("gen_pooling", "early_pool2d_4")).rsplit("_", 1)[-1]    # the name's number is the stride
    n_query = (grid // int(stride)) ** 2 if stride.isdigit() else 64
    layers = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    return EvaConfig(grid * patch, patch, width, layers, ours.get("heads", width // 112),
                     len(state["blocks.0.mlp.fc1.weight"]), ours.get("n_query", n_query))


def sincos_positions(width, grid, std=0.5):
    """(grid^2, width): centred sines and cosines of the row and column in a square grid, wavelengths 4 to 2 * grid."""
    K = width // 4
    omega = math.pi / 2 * (2 / max(grid, 2)) ** torch.linspace(0, 1, K)             # (K,) radians per cell
    angle = torch.arange(grid)[:, None] * omega                                     # (grid, K)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                             # (grid, 2K)
    rows, cols = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    table = torch.cat([rows, cols], dim=2).reshape(grid * grid, 4 * K)
    table = table - table.mean(0)
    return F.pad(table / table.std() * std, (0, width - 4 * K))


# ---------------------------------------------------------------------------------------------------------------------
# CLIP: training an image tower from scratch


class TextBlock(nn.Module):
    """Pre-norm transformer block of the text tower; `mask` (B, L) is True at real tokens."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, mask):
        B, L, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                             # each (B, h, L, hd)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])       # all see all real tokens
        x = x + self.proj(y.transpose(1, 2).reshape(B, L, C))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TextTower(nn.Module):
    """Token ids (B, L) and mask (B, L) -> a vector per text (B, E): bidirectional, averaged over real tokens."""

    def __init__(self, vocab_size, width, layers, embed_dim, context):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.ModuleList(TextBlock(width, max(1, width // 32)) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids, mask):
        L, context = ids.shape[1], len(self.positional_embedding)
        if L > context:
            raise ValueError(f"a caption of {L} tokens is longer than the text tower's context of {context}")
        x = self.token_embedding(ids) + self.positional_embedding[:L]                    # (B, L, D)
        for block in self.blocks:
            x = block(x, mask)
        w = mask.to(x.dtype).unsqueeze(-1)                                               # (B, L, 1)
        return self.head((self.norm(x) * w).sum(1) / w.sum(1).clamp(min=1))              # (B, E)


class CLIP(nn.Module):
    """An EVA-CLIP tower and what trains it from scratch: a text tower (contrastive), a linear pixel head, a scale loss.

    Only `.visual` is BLIP3-o's encoder; norm, head and text are CLIP's contrastive half, pixel_head helps in training.
    """

    def __init__(self, config, vocab_size, text_width=96, text_layers=2, embed_dim=64, context=128):
        super().__init__()
        C, side = config.width, math.isqrt(config.n_query)
        if config.image_size % side:
            raise ValueError(f"image_size {config.image_size} does not divide into a {side}x{side} grid of features")
        self.visual = EvaClip(config)
        self.norm = nn.LayerNorm(C, eps=1e-6)
        self.head = nn.Linear(C, embed_dim)
        self.text = TextTower(vocab_size, text_width, text_layers, embed_dim, context)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.pixel_head = nn.Linear(C, 3 * (config.image_size // side) ** 2)
        self.place_head = nn.Linear(C, 16)
        self.register_buffer("places", 2 * sincos_positions(16, side), persistent=False)       # (64, 16), unit scale

    def encode_image(self, pixels):
        """pixels (B, 3, S, S), CLIP-normalised -> unit vectors (B, E)."""
        return F.normalize(self.head(self.norm(self.visual(pixels, with_cls=True)[1])), dim=-1)

    def encode_text(self, ids, mask):
        """ids (B, L), mask (B, L) True at real tokens -> unit vectors (B, E)."""
        return F.normalize(self.text(ids, mask), dim=-1)

    def forward(self, pixels, ids, mask, noise=0.3, generator=None, drawn=None):
        """Losses of a batch of pairs, each a mean: {"contrastive", "pixels", "places", "scale"}. Weigh and add them as you like.

        contrastive  symmetric InfoNCE (CLIP): every image finds its caption in the batch, every caption its image.
        pixels       MSE of each pooled feature's own block of the normalised image, predicted linearly from the feature
                     plus Gaussian noise of std `noise`, which is `noise` times `drawn` (B, 64, C) if given. The flow will add errors of that size, so shapes and colours
                     have to sit in directions of large variance (the noise-augmented decoders of representation
                     autoencoders). Contrastive training alone collapses small towers to a few dimensions.
        places       the same for where a feature lies in the grid: the pixel decoder's cross-attention sees a set of features and
                     learns only from themselves which is which. Without it, a probe finds 3/4 of the variance of rows and columns.
        scale        per channel, mean^2 + (std - 1)^2: the RAW features then have the unit scale that flow matching
                     from unit noise wants, and no statistics have to be stored beside the weights.
        """
        tokens, cls = self.visual(pixels, with_cls=True)
        z = pool(tokens, self.visual.config.n_query)                                     # (B, 64, C)
        image, text = F.normalize(self.head(self.norm(cls)), dim=-1), self.encode_text(ids, mask)
        logits = self.logit_scale.clamp(max=math.log(100)).exp() * image @ text.T        # (B, B)
        target = torch.arange(len(logits), device=logits.device)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        if drawn is None:
            drawn = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        noisy = z + noise * drawn.to(z)
        flat = z.flatten(0, 1)                                                           # (B*64, C)
        return {"contrastive": contrastive,
                "pixels": F.mse_loss(self.pixel_head(noisy), image_blocks(pixels, math.isqrt(z.shape[1]))),
                "places": F.mse_loss(self.place_head(noisy), self.places.expand(len(z), -1, -1)),
                "scale": (flat.mean(0) ** 2 + (flat.std(0) - 1) ** 2).mean()}


def image_blocks(pixels, grid):
    """Cut images (B, 3, S, S) into a grid of square blocks, row-major: (B, grid^2, 3 * (S/grid)^2)."""
    return F.pixel_unshuffle(pixels, pixels.shape[-1] // grid).flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Convolutional parts that the VAE and the UNet share


class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W): norm, SiLU, conv, twice; the UNet adds a time embedding (B, E) between."""

    def __init__(self, c_in, c_out, groups, eps, emb_dim=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if emb_dim is not None:
            self.time_emb_proj = nn.Linear(emb_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Downsample(nn.Module):
    """Halve height and width. The UNet pads all sides by one, the VAE only right and bottom (as LDM's code does)."""

    def __init__(self, channels, pad_all_sides):
        super().__init__()
        self.pad_all_sides = pad_all_sides
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all_sides else 0)

    def forward(self, x):
        return self.conv(x if self.pad_all_sides else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: each pixel four times, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The parts at one resolution, under diffusers' names; who owns a level runs it, in its own forward."""

    def __init__(self, resnets, attentions=(), downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)         # empty, or one after each resnet
        self.downsamplers = nn.ModuleList(downsamplers)     # empty or one
        self.upsamplers = nn.ModuleList(upsamplers)         # empty or one


class Attention(nn.Module):
    """Multi-head attention from x (B, N, C) to context (B, M, D); without context, to x itself."""

    def __init__(self, width, context_width, heads, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width, width, bias=bias)
        self.to_v = nn.Linear(context_width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, context=None):
        context = x if context is None else context
        split = lambda y: y.unflatten(2, (self.heads, -1)).transpose(1, 2)               # (B, N, C) -> (B, h, N, hd)
        y = F.scaled_dot_product_attention(split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context)))
        return self.to_out[0](y.transpose(1, 2).flatten(2))


def component(folder, name):
    """Where a part of the pixel decoder lies: folder/diffusion-decoder/name, folder/name, or folder itself."""
    folder = Path(folder)
    return next((d for d in (folder / "diffusion-decoder" / name, folder / name) if d.is_dir()), folder)


def read_config(path, cls, fixed):
    """A config dataclass from a diffusers config.json; ValueError if a field is absent or asks for what we lack."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    raw = read_json(path)
    if absent := [f.name for f in fields(cls) if f.name not in raw]:
        raise ValueError(f"{path} lacks {', '.join(absent)}")
    if other := [f"{k} = {raw[k]}" for k, v in fixed.items() if raw.get(k, v) != v]:
        raise ValueError(f"{path} asks for {', '.join(other)}, which is not implemented")
    if raw.get("num_attention_heads"):      # where it is not null, diffusers prefers this name for the same head counts
        raw["attention_head_dim"] = raw["num_attention_heads"]
    return cls(**{f.name: as_levels(raw[f.name], f.default, len(raw["block_out_channels"])) for f in fields(cls)})


def as_levels(value, default, levels):
    """A JSON value as the dataclass wants it: a list becomes a tuple; one number for all levels is repeated."""
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, list) else (value,) * levels
    return value


# ---------------------------------------------------------------------------------------------------------------------
# VAE: pixels <-> latents (AutoencoderKL of SDXL)


@dataclass(frozen=True)
class VAEConfig:
    """Fields of diffusers' vae/config.json; the defaults are SDXL's (83.7 M parameters, 8x smaller sides)."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.13025     # 1 / standard deviation of the raw latents
    sample_size: int = 1024             # image side it was trained at; for the record only


VAE_FIXED = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
             "shift_factor": None, "latents_mean": None, "latents_std": None}


class SpatialAttention(Attention):
    """Single-head attention over all positions of a feature map, with its norm and residual: (B, C, H, W) -> same."""

    def __init__(self, channels, groups):
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x):
        y = self.group_norm(x).flatten(2).transpose(1, 2)                                # (B, H*W, C)
        return x + super().forward(y).transpose(1, 2).unflatten(2, x.shape[2:])


class Encoder(nn.Module):
    """pixels (B, 3, H, W) -> (B, 2 * latent, H/f, W/f): mean and log variance, before quant_conv."""

    def __init__(self, cfg):
        super().__init__()
        res = lambda a, b: ResBlock(a, b, cfg.norm_num_groups, 1e-6)
        chans, n = cfg.block_out_channels, cfg.layers_per_block
        c = chans[0]
        self.conv_in = nn.Conv2d(cfg.in_channels, c, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, c_out in enumerate(chans):
            down = [Downsample(c_out, pad_all_sides=False)] if i < len(chans) - 1 else []
            self.down_blocks.append(Level([res(c if j == 0 else c_out, c_out) for j in range(n)], downsamplers=down))
            c = c_out
        self.mid_block = Level([res(c, c), res(c, c)], [SpatialAttention(c, cfg.norm_num_groups)])
        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            for part in (*level.resnets, *level.downsamplers):
                x = part(x)
        x = self.mid_block.resnets[1](self.mid_block.attentions[0](self.mid_block.resnets[0](x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """latents (B, latent, h, w), after post_quant_conv -> pixels (B, 3, h*f, w*f)."""

    def __init__(self, cfg):
        super().__init__()
        res = lambda a, b: ResBlock(a, b, cfg.norm_num_groups, 1e-6)
        chans, n = cfg.block_out_channels[::-1], cfg.layers_per_block + 1       # one resnet more than the encoder
        c = chans[0]
        self.conv_in = nn.Conv2d(cfg.latent_channels, c, 3, padding=1)
        self.mid_block = Level([res(c, c), res(c, c)], [SpatialAttention(c, cfg.norm_num_groups)])
        self.up_blocks = nn.ModuleList()
        for i, c_out in enumerate(chans):
            up = [Upsample(c_out)] if i < len(chans) - 1 else []
            self.up_blocks.append(Level([res(c if j == 0 else c_out, c_out) for j in range(n)], upsamplers=up))
            c = c_out
        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, cfg.out_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid_block.resnets[1](self.mid_block.attentions[0](self.mid_block.resnets[0](x)))
        for level in self.up_blocks:
            for part in (*level.resnets, *level.upsamplers):
                x = part(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Variational autoencoder of SDXL. One convention: latents that enter or leave it are SCALED (unit variance).

    Inside, raw latents = scaled latents / config.scaling_factor. Pixels are (B, 3, H, W) in [-1, 1].
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.factor = 2 ** (len(config.block_out_channels) - 1)     # pixels per latent, along a side
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, pixels):
        """pixels (B, 3, H, W) in [-1, 1] -> mean and log variance of the RAW latents, each (B, latent, H/f, W/f)."""
        if pixels.shape[-2] % self.factor or pixels.shape[-1] % self.factor:
            raise ValueError(f"the VAE takes sides that are multiples of {self.factor}, not {tuple(pixels.shape[-2:])}")
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, pixels, sample=False, generator=None):
        """pixels (B, 3, H, W) in [-1, 1] -> scaled latents (B, latent, H/f, W/f), the mean or a sample."""
        mean, logvar = self.moments(pixels)
        if sample:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            mean = mean + (logvar / 2).exp() * noise
        return mean * self.config.scaling_factor

    def decode(self, latents):
        """scaled latents (B, latent, h, w) -> pixels (B, 3, h*f, w*f), about [-1, 1], not clamped."""
        # channels_last: what convolutions of large maps are fastest with; every layer hands it on to the next.
        latents = (latents / self.config.scaling_factor).contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, pixels, generator=None, noise=None):
        """For training: (reconstruction (B, 3, H, W) of a sample, KL to the unit normal in nats per latent number).

        The sample's unit normal noise (B, latent, H/f, W/f) is drawn unless given.
        """
        mean, logvar = self.moments(pixels)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        return self.decoder(self.post_quant_conv(mean + (logvar / 2).exp() * noise.to(mean))), kl

    @torch.no_grad()
    def calibrate(self, pixels):
        """Set scaling_factor to 1 / std of these images' raw latents: once, after training and before the UNet's."""
        self.config = replace(self.config, scaling_factor=1 / float(self.moments(pixels)[0].std()))

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """Load from a model folder, its diffusion-decoder, or the VAE's own folder (diffusers layout)."""
        folder = component(folder, "vae")
        config = read_config(folder / "config.json", VAEConfig, VAE_FIXED)
        return load_strict(lambda: cls(config), read_weights(weight_map(folder), "", device, dtype), folder)

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and weights into `folder` (the VAE's own), so that diffusers' AutoencoderKL loads them."""
        levels = len(self.config.block_out_channels)
        write_json(Path(folder) / "config.json", {
            "_class_name": "AutoencoderKL", **asdict(self.config), **VAE_FIXED, "force_upcast": True,
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels})
        save_weights(self, Path(folder) / "diffusion_pytorch_model.safetensors", dtype)


# ---------------------------------------------------------------------------------------------------------------------
# UNet: noisy latents + features -> noise (SDXL's, with the 64 features in the place of its text tokens)


@dataclass(frozen=True)
class UNetConfig:
    """Fields of diffusers' unet/config.json; the defaults are Emu2's and BLIP3-o's decoder (2.53 B parameters).

    Raises ValueError where lists of one entry per level differ in length, or a level's type is unknown.
    """
    sample_size: int = 128                              # latents along a side of the default picture
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: tuple = (1, 2, 10)
    attention_head_dim: tuple = (5, 10, 20)             # number of HEADS per level, whatever diffusers calls it
    cross_attention_dim: int = 1792
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 3328   # 1792 + 6 * 256
    norm_num_groups: int = 32
    down_block_types: tuple = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")

    def __post_init__(self):
        levels = len(self.block_out_channels)
        lists = (self.transformer_layers_per_block, self.attention_head_dim, self.down_block_types, self.up_block_types)
        if any(len(x) != levels for x in lists):
            raise ValueError(f"a UNet of {levels} levels needs {levels} entries in each list of its config: {self}")
        if unknown := set(self.down_block_types + self.up_block_types) - {"DownBlock2D", "CrossAttnDownBlock2D",
                                                                         "UpBlock2D", "CrossAttnUpBlock2D"}:
            raise ValueError(f"unknown UNet block types: {', '.join(sorted(unknown))}")


UNET_FIXED = {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-05,
              "use_linear_projection": True, "addition_embed_type": "text_time", "resnet_time_scale_shift": "default",
              "center_input_sample": False, "mid_block_type": "UNetMidBlock2DCrossAttn"}


def sinusoid(t, width):
    """Numbers (n,) -> (n, width) in fp32, cosines first: cos and sin of t * 10000^(-k / (width/2))."""
    half = width // 2
    freq = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the features, GEGLU feed-forward; pre-norm, on tokens (B, N, C)."""

    def __init__(self, width, heads, cond_width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, cond_width, heads)
        self.norm3 = nn.LayerNorm(width)
        up = nn.ModuleDict({"proj": nn.Linear(width, 8 * width)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([up, nn.Identity(), nn.Linear(4 * width, width)])})

    def forward(self, x, cond):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), cond)
        up, _, down = self.ff["net"]
        value, gate = up["proj"](self.norm3(x)).chunk(2, dim=-1)
        return x + down(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the positions of a feature map: (B, C, H, W), cond (B, L, D) -> (B, C, H, W)."""

    def __init__(self, channels, depth, heads, cond_width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)       # 1e-6 here, 1e-5 in the resnets
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, cond_width) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x, cond):
        y = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # (B, H*W, C); free if channels_last
        for block in self.transformer_blocks:
            y = block(y, cond)
        return x + self.proj_out(y).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """SDXL's UNet: predicts the noise in latents, given the 64 features, their mean, and the picture's size."""

    def __init__(self, config):
        super().__init__()
        self.config = cfg = config
        chans, n, groups = cfg.block_out_channels, cfg.layers_per_block, cfg.norm_num_groups
        emb = 4 * chans[0]
        res = lambda c_in, c_out: ResBlock(c_in, c_out, groups, 1e-5, emb)
        attn = lambda i: SpatialTransformer(chans[i], cfg.transformer_layers_per_block[i], cfg.attention_head_dim[i],
                                            cfg.cross_attention_dim, groups)
        attns = lambda i, kind, k: [attn(i) for _ in range(k)] if kind.startswith("CrossAttn") else []
        self.conv_in = nn.Conv2d(cfg.in_channels, chans[0], 3, padding=1)
        mlp = lambda width: nn.ModuleDict({"linear_1": nn.Linear(width, emb), "linear_2": nn.Linear(emb, emb)})
        self.time_embedding = mlp(chans[0])
        self.add_embedding = mlp(cfg.projection_class_embeddings_input_dim)

        c, skips = chans[0], [chans[0]]                 # channels now, and of every output that the way up will take
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(cfg.down_block_types):
            down = [Downsample(chans[i], pad_all_sides=True)] if i < len(chans) - 1 else []
            resnets = [res(c if j == 0 else chans[i], chans[i]) for j in range(n)]
            self.down_blocks.append(Level(resnets, attns(i, kind, n), down))
            skips += [chans[i]] * (n + len(down))
            c = chans[i]
        self.mid_block = Level([res(c, c), res(c, c)], [attn(len(chans) - 1)])
        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(len(chans))), cfg.up_block_types):
            ins = [(c if j == 0 else chans[i]) + skips.pop() for j in range(n + 1)]
            up = [Upsample(chans[i])] if i > 0 else []
            self.up_blocks.append(Level([res(c_in, chans[i]) for c_in in ins], attns(i, kind, n + 1), upsamplers=up))
            c = chans[i]
        self.conv_norm_out = nn.GroupNorm(groups, c, eps=1e-5)
        self.conv_out = nn.Conv2d(c, cfg.out_channels, 3, padding=1)

        # Zero the last layer of every residual branch and of the network: training starts at identity and output 0.
        ends = [m.conv2 for m in self.modules() if isinstance(m, ResBlock)]
        for m in [*ends, *(m.proj_out for m in self.modules() if isinstance(m, SpatialTransformer)), self.conv_out]:
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, x, t, cond, text_embeds, time_ids):
        """x (B,4,h,w), t number or (B,) in 0..999, cond (B,L,D), text_embeds (B,D), time_ids (B,6) -> noise (B,4,h,w).

        Raises ValueError where h or w does not halve evenly at every level.
        """
        side = 2 ** (len(self.down_blocks) - 1)
        if x.shape[2] % side or x.shape[3] % side:
            raise ValueError(f"the UNet takes latents whose sides are multiples of {side}, not {tuple(x.shape[2:])}")
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        mlp = lambda m, y: m["linear_2"](F.silu(m["linear_1"](y.to(x.dtype))))
        ids = sinusoid(time_ids.flatten(), self.config.addition_time_embed_dim).view(len(x), -1)     # (B, 6 * 256)
        emb = mlp(self.time_embedding, sinusoid(t, self.config.block_out_channels[0]))               # (B, E)
        emb = emb + mlp(self.add_embedding, torch.cat([text_embeds.to(ids.dtype), ids], dim=1))

        h = self.conv_in(x)                                                                          # (B, C, h, w)
        skips = [h]
        for level in self.down_blocks:
            for i, res in enumerate(level.resnets):
                h = res(h, emb)
                h = level.attentions[i](h, cond) if level.attentions else h
                skips.append(h)
            for down in level.downsamplers:
                h = down(h)
                skips.append(h)
        h = self.mid_block.resnets[0](h, emb)
        h = self.mid_block.resnets[1](self.mid_block.attentions[0](h, cond), emb)
        for level in self.up_blocks:
            for i, res in enumerate(level.resnets):
                h = res(torch.cat([h, skips.pop()], dim=1), emb)
                h = level.attentions[i](h, cond) if level.attentions else h
            for up in level.upsamplers:
                h = up(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """Load from a model folder, its diffusion-decoder, or the UNet's own folder (diffusers layout)."""
        folder = component(folder, "unet")
        config = read_config(folder / "config.json", UNetConfig, UNET_FIXED)
        return load_strict(lambda: cls(config), read_weights(weight_map(folder), "", device, dtype), folder)

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and weights into `folder` (the UNet's own), so that diffusers loads them."""
        write_json(Path(folder) / "config.json",
                   {"_class_name": "UNet2DConditionModel", **asdict(self.config), **UNET_FIXED})
        save_weights(self, Path(folder) / "diffusion_pytorch_model.safetensors", dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Euler schedule: which noise levels to visit


class EulerSchedule:
    """Noise levels of diffusers' EulerDiscreteScheduler in SDXL's setting: scaled-linear betas, "leading" steps.

    timesteps (steps,) falling; sigmas (steps + 1,) with a final 0; init_noise_sigma, the scale of the first latents;
    alpha_bar (1000,), for training. sigma = sqrt((1 - alpha_bar) / alpha_bar): noise per unit of signal.
    Raises ValueError unless 1 <= steps <= num_train_timesteps.
    """

    def __init__(self, steps=50, beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, steps_offset=1):
        if not 1 <= steps <= num_train_timesteps:
            raise ValueError(f"steps must be between 1 and {num_train_timesteps}, not {steps}")
        self.config = {"beta_start": beta_start, "beta_end": beta_end, "num_train_timesteps": num_train_timesteps,
                       "steps_offset": steps_offset}
        beta = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, num_train_timesteps, dtype=torch.float64) ** 2
        alpha_bar = (1 - beta).cumprod(0)
        t = torch.arange(steps).flip(0) * (num_train_timesteps // steps) + steps_offset
        # Only where steps = num_train_timesteps does the offset lead past the last level; the reference clamps too.
        a = alpha_bar[t.clamp(max=num_train_timesteps - 1)]
        self.timesteps = t.float()
        self.sigmas = F.pad(((1 - a) / a).sqrt(), (0, 1)).float()
        self.init_noise_sigma = float((self.sigmas[0] ** 2 + 1).sqrt())
        self.alpha_bar = alpha_bar.float()

    def with_steps(self, steps):
        """The same noise with another number of sampling steps."""
        return EulerSchedule(steps, **self.config)

    def add_noise(self, z, noise, t):
        """UNet input at t (B,) long: sqrt(a) z + sqrt(1 - a) noise, which is (z + sigma noise) / sqrt(sigma^2 + 1)."""
        a = self.alpha_bar.to(z.device)[t].view(-1, 1, 1, 1).to(z.dtype)
        return a.sqrt() * z + (1 - a).sqrt() * noise

    @classmethod
    def from_pretrained(cls, folder):
        """Read scheduler_config.json of a model folder, its diffusion-decoder or the folder; SDXL's numbers if none."""
        path = component(folder, "scheduler") / "scheduler_config.json"
        raw = read_json(path) if path.exists() else {}
        if other := [f"{k} = {raw[k]}" for k, v in SCHEDULE_FIXED.items() if raw.get(k, v) != v]:
            raise ValueError(f"{path} asks for {', '.join(other)}, which is not implemented")
        return cls(**{k: raw[k] for k in ("beta_start", "beta_end", "num_train_timesteps", "steps_offset") if k in raw})

    def save_pretrained(self, folder):
        """Write scheduler_config.json into `folder` (the scheduler's own)."""
        write_json(Path(folder) / "scheduler_config.json",
                   {"_class_name": "EulerDiscreteScheduler", **self.config, **SCHEDULE_FIXED})


SCHEDULE_FIXED = {"beta_schedule": "scaled_linear", "prediction_type": "epsilon", "timestep_spacing": "leading",
                  "interpolation_type": "linear", "use_karras_sigmas": False, "trained_betas": None,
                  "rescale_betas_zero_snr": False}


# ---------------------------------------------------------------------------------------------------------------------
# PixelDecoder: features -> pixels


class PixelDecoder(nn.Module):
    """Emu2's visual decoder: 64 features -> picture, by UNet denoising in the VAE's latent space."""

    def __init__(self, unet, vae, schedule=None):
        super().__init__()
        self.unet, self.vae = unet, vae
        self.schedule = schedule or EulerSchedule()

    def added_conditions(self, cond, size, original_size, crop):
        """text_embeds (B, D), the features' mean; time_ids (B, 6): original (h, w), crop (top, left), size (h, w)."""
        ids = torch.tensor([*original_size, *crop, *size], dtype=torch.float32, device=cond.device)
        return cond.mean(dim=1), ids.expand(len(cond), 6)

    @torch.no_grad()
    def decode(self, features, negative=None, steps=50, guidance=3.0, noise=None, size=None, original_size=None,
               crop=(0, 0), progress=None):
        """features (B, 64, C) -> pixels (B, 3, H, W) in [0, 1], fp32.

        negative (B or 1, 64, C)  what guidance leads away from: the features that the whole model generates for the
                                  text " ", or, to reconstruct a picture, those of an all-zero normalised image.
                                  Unused at guidance 1.
        noise (B, 4, H/f, W/f)    unit normal; drawn here if absent. Drawn per picture, a batch changes no picture.
        size, original_size       (height, width); size defaults to the UNet's own, original_size to size.
        crop                      (top, left), what SDXL is told of the picture's place in its original.
        progress                  called as progress(steps done, steps) after each step.
        Raises ValueError for a wrong shape, size or number of steps.
        """
        dtype, device = self.unet.conv_in.weight.dtype, features.device
        factor, B, guided = self.vae.factor, len(features), guidance != 1
        size = size or (self.unet.config.sample_size * factor,) * 2
        grain = factor * 2 ** (len(self.unet.down_blocks) - 1)
        if size[0] % grain or size[1] % grain:
            raise ValueError(f"height and width must be multiples of {grain}, not {tuple(size)}")
        if guided and negative is None:
            raise ValueError(f"guidance {guidance} needs negative features to lead away from")
        shape = (B, self.unet.config.in_channels, size[0] // factor, size[1] // factor)
        noise = torch.randn(shape, device=device) if noise is None else noise
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise for size {tuple(size)} must be {shape}, not {tuple(noise.shape)}")

        schedule = self.schedule.with_steps(steps)
        # Order [cond, uncond], as Emu2; the DiT's guidance stacks them the other way round.
        cond = torch.cat([features, negative.expand_as(features)]) if guided else features
        cond = cond.to(dtype)
        added = self.added_conditions(cond, size, original_size or size, crop)
        x = noise.to(device, torch.float32) * schedule.init_noise_sigma
        for i, t in enumerate(schedule.timesteps):
            sigma, sigma_next = schedule.sigmas[i].item(), schedule.sigmas[i + 1].item()
            x_in = (x / (sigma ** 2 + 1) ** 0.5).to(dtype)
            eps = self.unet(x_in.repeat(2, 1, 1, 1) if guided else x_in, t, cond, *added).float()
            if guided:
                eps, eps_uncond = eps.chunk(2)
                eps = eps_uncond + guidance * (eps - eps_uncond)
            x = x + (sigma_next - sigma) * eps                                  # Euler step of dx/dsigma = eps
            if progress:
                progress(i + 1, steps)
        # The VAE runs in fp32: SDXL's overflows in fp16, and its config asks for it (official code still runs bf16).
        return (self.vae.decode(x) / 2 + 0.5).clamp(0, 1)

    def loss(self, images, features, drop=0.1, generator=None, negative=None, max_weight=1.0, t=None,
             noise=None):
        """Mean squared error of the predicted noise (as Emu2 trains its decoder), a scalar.

        images: pixels (B, 3, H, W) in [-1, 1], encoded here without gradient, or scaled latents (B, 4, h, w).
        With probability `drop` a picture's features (B, 64, C) are replaced by `negative` (B or 1, 64, C), so that
        guidance has something to lead away from. Give what sampling will use: the features of an all-zero normalised
        image. None means zeros. What is random may also be given: t (B,) long, noise like the latents, drop (B,) bool.
        """
        z = images
        if images.shape[1] != self.unet.config.in_channels:
            with torch.no_grad():
                z = self.vae.encode(images, sample=True, generator=generator)
        B, device = len(z), z.device
        if t is None:
            t = torch.randint(0, len(self.schedule.alpha_bar), (B,), generator=generator, device=device)
        if noise is None:
            noise = torch.randn(z.shape, generator=generator, device=device)
        if not torch.is_tensor(drop):
            drop = torch.rand(B, generator=generator, device=device) < drop
        noise = noise.to(z)
        cond = torch.where(drop.view(-1, 1, 1), torch.zeros_like(features) if negative is None else negative, features)
        size = (z.shape[2] * self.vae.factor, z.shape[3] * self.vae.factor)
        eps = self.unet(self.schedule.add_noise(z, noise, t), t, cond, *self.added_conditions(cond, size, size, (0, 0)))
        weight = (1 / self.schedule.alpha_bar.to(device)[t]).clamp(max=max_weight)                # 1 / alpha_bar = 1 + sigma^2
        return (weight * (eps - noise).square().flatten(1).mean(1)).mean()

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """Load unet/, vae/ and scheduler/ of a model folder or of its diffusion-decoder; the VAE always in fp32."""
        return cls(UNet.from_pretrained(folder, device, dtype), VAE.from_pretrained(folder, device),
                   EulerSchedule.from_pretrained(folder))

    def save_pretrained(self, folder, dtype=None):
        """Write diffusion-decoder/{unet,vae,scheduler} into a model folder, in diffusers' layout."""
        base = Path(folder) / "diffusion-decoder"
        self.unet.save_pretrained(base / "unet", dtype)
        self.vae.save_pretrained(base / "vae", dtype)
        self.schedule.save_pretrained(base / "scheduler")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes

PRESETS = {
    # 64 px pictures, 64 features of 48 numbers; trains on two CPU cores. Cross-attention at both levels: the 16x16
    # latents are where shapes are placed exactly.
    "nano": {
        "clip": EvaConfig(image_size=64, patch_size=8, width=48, layers=4, heads=4, mlp_hidden=384),
        "vae": VAEConfig(block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=4,
                         scaling_factor=1.0, sample_size=64),
        "unet": UNetConfig(sample_size=16, block_out_channels=(48, 96), layers_per_block=1,
                           transformer_layers_per_block=(1, 1), attention_head_dim=(2, 3), cross_attention_dim=48,
                           addition_time_embed_dim=32, projection_class_embeddings_input_dim=48 + 6 * 32,
                           norm_num_groups=16,
                           down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2),
    },
    "official": {"clip": EvaConfig(), "vae": VAEConfig(), "unet": UNetConfig()},
}
