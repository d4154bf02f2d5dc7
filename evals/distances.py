"""How far images, or two sets of images, are apart: PSNR, SSIM, Frechet distance, MMD, FID's Inception."""
import math
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from checkpoint import load_strict, read_headers
from data import crop_square, preprocess_clip
from evals.report import print_table, read_images, save_results, say
from sample import Pipeline, pick_device, to_uint8

# ---- measures -------------------------------------------------------------------------------------------

def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two batches (B, 3, H, W) in [0, 1] -> (B,)."""
    return -10 * torch.log10(((a - b) ** 2).mean((1, 2, 3)).clamp(min=1e-10))


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of two batches (B, 3, H, W) in [0, 1] -> (B,), the
    channels' mean.

    Gaussian windows of 11 x 11, standard deviation 1.5, only where they lie within the image.
    """
    bell = torch.exp(-(torch.arange(11.0, dtype=torch.float64) - 5) ** 2 / (2 * 1.5 ** 2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2               # (1, 1, 11, 11)
    a, b = (x.double().flatten(0, 1)[:, None] for x in (a, b))                   # (B * 3, 1, H, W)
    # Means, and means of products: each (B * 3, 1, H - 10, W - 10)
    ma, mb, aa, bb, ab = (F.conv2d(x, window) for x in (a, b, a * a, b * b, a * b))
    luminance = (2 * ma * mb + 0.01 ** 2) / (ma ** 2 + mb ** 2 + 0.01 ** 2)
    structure = (2 * (ab - ma * mb) + 0.03 ** 2) / (aa - ma ** 2 + bb - mb ** 2 + 0.03 ** 2)
    return (luminance * structure).mean((1, 2, 3)).view(-1, 3).mean(1)


def moments(x):
    """Features (N, C) -> their mean (C,) and a matrix r such that r' r is their covariance (C, C)."""
    mean = x.mean(0)
    return mean, np.linalg.qr((x - mean) / math.sqrt(len(x) - 1), "r")


def frechet(x, y):
    """Frechet distance of the normal distributions with the moments of two sets of features (N, C), (M,
    C)."""
    (mx, rx), (my, ry) = moments(np.float64(x)), moments(np.float64(y))
    # trace sqrt(cx cy) without the root of a covariance, whose zeros (fewer images than numbers) are only
    # nearly so.
    both = np.linalg.svd(rx @ ry.T, compute_uv=False).sum()
    return float(((mx - my) ** 2).sum() + (rx ** 2).sum() + (ry ** 2).sum() - 2 * both)


def kernel_sum(a, b):
    """Sum of KID's kernel (x.y / C + 1)^3 over all pairs of (N, C) and (M, C), in blocks: 30,000 images
    would take 7 GB."""
    return sum((((a[i:i + 1024] @ b.T) / a.shape[1] + 1) ** 3).sum() for i in range(0, len(a), 1024))


def mmd(x, y):
    """Unbiased squared maximum mean discrepancy of features (N, C) and (M, C), with KID's kernel."""
    def within(a):                                                # without the pairs of an image with itself
        return (kernel_sum(a, a) - (((a * a).mean(1) + 1) ** 3).sum()) / (len(a) * (len(a) - 1))
    x, y = np.float64(x), np.float64(y)
    return float(within(x) + within(y) - 2 * kernel_sum(x, y) / (len(x) * len(y)))


@torch.no_grad()
def clip_features(pipe, images):
    """The image encoder's features (B, 64, C) of PIL images, fp32 on the CPU."""
    pixels = torch.cat([preprocess_clip(image, pipe.eva.config.image_size) for image in images])
    return pipe.eva.encode(pixels.to(pipe.device, pipe.dtype)).float().cpu()


# ----------------------------------------------------------------------------------------------------
# Inception v3 as the TensorFlow graph of 2015-12-05 has it, whose features FID is defined on (arXiv
# 1512.00567, figures 5 to 7; 1706.08500)
# ----------------------------------------------------------------------------------------------------
# A block is its branches' convolutions in turn, (channels, height, width, stride if not 1); a list of two is
# a fork: both read the same and are joined.
MEAN = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAX = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
HALVE = partial(F.max_pool2d, kernel_size=3, stride=2)


def block_a(channels):
    """The 35 x 35 blocks: they differ in the channels after the pool."""
    return {"branch1x1": [(64, 1, 1)], "branch5x5": [(48, 1, 1), (64, 5, 5)],
            "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)], "branch_pool": [(channels, 1, 1)]}


def block_c(c):
    """The 17 x 17 blocks: they differ in the channels c inside their branches."""
    return {"branch1x1": [(192, 1, 1)], "branch7x7": [(c, 1, 1), (c, 1, 7), (192, 7, 1)],
            "branch7x7dbl": [(c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)],
            "branch_pool": [(192, 1, 1)]}


FORK = [(384, 1, 3), (384, 3, 1)]
BLOCK_E = {"branch1x1": [(320, 1, 1)], "branch3x3": [(384, 1, 1), FORK],
           "branch3x3dbl": [(448, 1, 1), (384, 3, 3), FORK], "branch_pool": [(192, 1, 1)]}
# name: (pool, branches). The last pool takes the maximum: an oddity of that graph, and part of FID.
BLOCKS = {
    "Mixed_5b": (MEAN, block_a(32)), "Mixed_5c": (MEAN, block_a(64)), "Mixed_5d": (MEAN, block_a(64)),
    "Mixed_6a": (HALVE, {"branch3x3": [(384, 3, 3, 2)],
                         "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3, 2)], "branch_pool": []}),
    "Mixed_6b": (MEAN, block_c(128)), "Mixed_6c": (MEAN, block_c(160)), "Mixed_6d": (MEAN, block_c(160)),
    "Mixed_6e": (MEAN, block_c(192)),
    "Mixed_7a": (HALVE, {"branch3x3": [(192, 1, 1), (320, 3, 3, 2)],
                         "branch7x7x3": [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)],
                         "branch_pool": []}),
    "Mixed_7b": (MEAN, BLOCK_E), "Mixed_7c": (MAX, BLOCK_E)}


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU: (B, in_channels, H, W) -> (B, channels, H', W'), padded to equal
    size unless it strides or is not to be the `same`."""

    def __init__(self, in_channels, channels, height, width, stride=1, same=True):
        super().__init__()
        padding = (height // 2, width // 2) if same and stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, channels, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block of BLOCKS: (B, in_channels, H, W) -> (B, self.channels, H', W'), its branches side by side."""

    def __init__(self, in_channels, pool, branches):
        super().__init__()
        self.pool, self.channels = pool, 0
        self.chains = []                                 # (branch, [[name of a layer, or of a fork's both]])
        for branch, steps in branches.items():
            last, chain = in_channels, []
            for number, step in enumerate(steps, 1):
                convolutions = step if isinstance(step, list) else [step]
                stem = f"{branch}_{number}" if len(steps) > 1 else branch
                chain.append([stem + letter for letter in ("ab" if len(convolutions) > 1 else [""])])
                for name, sizes in zip(chain[-1], convolutions):
                    self.add_module(name, ConvNorm(last, *sizes))
                last = sum(sizes[0] for sizes in convolutions)
            self.channels += last
            self.chains.append((branch, chain))

    def forward(self, x):
        outputs = []
        for branch, chain in self.chains:
            y = self.pool(x) if branch == "branch_pool" else x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


class Inception(nn.Module):
    """Pixels (B, 3, 299, 299) in [-1, 1] -> the features of FID (B, 2048); tensors named as in
    pytorch-fid's file."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = ConvNorm(3, 32, 3, 3, 2), ConvNorm(32, 32, 3, 3, same=False)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = ConvNorm(32, 64, 3, 3), ConvNorm(64, 80, 1, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, 3, same=False)
        channels = 192
        for name, (pool, branches) in BLOCKS.items():
            self.add_module(name, Mixed(channels, pool, branches))
            channels = self.get_submodule(name).channels
        self.fc = nn.Linear(channels, 1008)                      # is in the file; the features lie before it

    def forward(self, x):
        x = HALVE(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))            # (B, 64, 73, 73)
        x = HALVE(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))                               # (B, 192, 35, 35)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)                          # (B, 2048, 8, 8) in the end
        return x.mean((2, 3))


CONVERT = ("make it once of the published file: python -c \"import torch, safetensors.torch as s; "
           "s.save_file({k: v.contiguous() for k, v in torch.load('pt_inception-2015-12-05-6726825d.pth', "
           "weights_only=True).items()}, 'inception.safetensors')\"")


def load_inception(file):
    """The network in a safetensors file of pytorch-fid's tensors; ValueError, saying how to make one,
    for all else."""
    try:
        if not Path(file).is_file():
            raise ValueError(f"there is no file {file}")
        tensors = read_headers(file)
        for name in [name for name in tensors if name.endswith(".running_var")]:
            # Older files have no such counters.
            tensors.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0.0))
        return load_strict(Inception, tensors, file)
    except ValueError as error:
        problem = textwrap.shorten(str(error), 240)
        raise ValueError(f"no weights of FID's Inception: {problem}; {CONVERT}") from None


@torch.no_grad()
def inception_features(net, images):
    """FID's features (B, 2048), on the CPU, of PIL images resized as in pytorch-fid, on which the
    numbers depend: bilinear on the tensor, without antialiasing."""
    device = next(net.parameters()).device
    resized = []
    for image in images:
        pixels = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None] / 255     # (1, 3, H, W)
        resized.append(F.interpolate(pixels, (299, 299), mode="bilinear"))
    return net(torch.cat(resized) * 2 - 1).cpu()


# ---- commands -------------------------------------------------------------------------------------------

def clip_means(pipe, images):
    """CLIP features of PIL images, averaged over each image: (B, C)."""
    return clip_features(pipe, images).mean(1)


def open_features(args):
    """(a function from PIL images to features (B, C), what the features are) as the flags of `fid` say."""
    if args.inception:
        net = load_inception(args.inception).to(pick_device(args.device))
        return (partial(inception_features, net),
                "FID's Inception of 2015-12-05, resized as in pytorch-fid: bilinear, no antialias")
    pipe = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva)
    return partial(clip_means, pipe), "this model's CLIP tower (not Inception)"


def fid(args):
    """How far two folders of images are apart: Frechet distance and unbiased MMD of features of the
    model's own CLIP tower, averaged over each image. NOT the Inception FID of papers: compare only
    numbers of one tower.

    With --inception it is that FID (and the MMD is KID's, of all images at once), resized as
    pytorch-fid does it. Beside it the noise floor: the same between random halves of A, which differ by
    chance alone.
    """
    folders = [read_images(folder, 4) for folder in (args.a, args.b)]
    measure, features = open_features(args)
    a, b = (np.concatenate([measure([image for _, image in batch]).numpy() for batch in folder])
            for folder in folders)                                   # (N, C), (M, C)
    fewest = min(len(a), len(b))
    if fewest < 5000:
        say(f"{fewest} images are fewer than 5,000: the Frechet distance is far too large, and is "
            "comparable only at the same number; the MMD is unbiased, but noisy")
    order = np.random.default_rng(args.seed).permutation(len(a))
    pairs = {"A and B": (a, b), "noise floor, halves of A": (a[order[::2]], a[order[1::2]])}
    table = {name: {"Frechet": frechet(x, y), "MMD": mmd(x, y), "n": f"{len(x)} and {len(y)}"}
             for name, (x, y) in pairs.items()}
    print_table(f"distances of {args.a} and {args.b} in features of {features}", table)
    save_results(args, {"features": features, "table": table}, "fid-inception" if args.inception else "fid")


def reconstruct_files(args):
    """`reconstruction --images DIR`: PSNR, SSIM and cosine of CLIP features between images (middle
    squares) and what the decoder makes of their 64 features."""
    pipe = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva)
    rows = {}
    for batch in read_images(args.images):
        files, images = zip(*batch)
        made = pipe.reconstruct(images, range(len(rows), len(rows) + len(files)))              # (B, 3, H, W)
        truth = np.stack([crop_square(image, made.shape[-1]) for image in images])
        truth = torch.from_numpy(truth).permute(0, 3, 1, 2) / 255
        before = clip_features(pipe, images)
        after = clip_features(pipe, map(Image.fromarray, to_uint8(made)))
        cosine = F.cosine_similarity(before, after, dim=-1).mean(1)
        values = zip(psnr(made, truth).tolist(), ssim(made, truth).tolist(), cosine.tolist())
        for file, numbers in zip(files, values):
            rows[str(file)] = dict(zip(("dB", "SSIM", "cosine"), numbers))
    means = {name: np.mean([row[name] for row in rows.values()]).item() for name in ("dB", "SSIM", "cosine")}
    table = {f"{len(rows)} pictures": means}
    print_table(f"{args.images}: images and their reconstructions", table)
    save_results(args, {"table": table, "pictures": rows})
