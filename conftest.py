"""What the test files share: two helpers, ONE set of tiny sizes, and the tiny model that has them."""
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_decoder
import data
import model
import train
from checkpoint import read_json, write_json
from clip_decoder import VAE, EvaClip, EvaConfig, PixelDecoder, UNet, UNetConfig, VAEConfig
from evals import charts

torch.set_num_threads(1)     # tensors are tiny: threads would only wait for each other

# 32 px images, 64 features of 16 numbers: the nano presets made smaller still. Tests put them in the
# presets' place.
TINY_DECODER = {
    "clip": EvaConfig(image_size=32, patch_size=4, width=16, layers=2, heads=2, mlp_hidden=32),
    "vae": VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0,
                     sample_size=32),
    "unet": UNetConfig(sample_size=16, block_out_channels=(16, 32), layers_per_block=1,
                       attention_head_dim=(1, 2), transformer_layers_per_block=(1, 1),
                       cross_attention_dim=16, addition_time_embed_dim=8,
                       projection_class_embeddings_input_dim=16 + 6 * 8, norm_num_groups=8,
                       down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                       up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
}
TINY_MODEL = {
    "text": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, mrope_section=[1, 1, 2], tie_word_embeddings=True),
    "vision": dict(depth=2, hidden_size=16, num_heads=2, intermediate_size=32, patch_size=8, window_size=32,
                   fullatt_block_indexes=(1,), out_hidden_size=32),
    "dit": dict(in_channels=16, patch_size=2, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=64,
                cond_dim=32),
    "n_query": 4, "query_std": 0.02, "shift": 5.0,
}
TINY_SAMPLING = {"cfg": 1.5, "steps": 4, "decoder_steps": 3, "decoder_cfg": 2.0}


def randomise(module, seed=0, std=0.2):
    """Fill all parameters with Gaussian noise (norm weights around 1), so that no zero or unit init hides
    a bug."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * std + mean)
    return module.eval()


def gap(a, b):
    """Largest difference of two tensors of one shape, relative to the largest number in `b` where that is
    above 1."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def tiny_tokenizer():
    """The tokenizer of the tiny model: 330 entries, learnt from texts of the miniature's world."""
    from miniature.pretrain import train_tokenizer
    from miniature.tasks import world_texts
    return train_tokenizer(world_texts(100), 330)


def write_tiny_folder(folder):
    """Write a complete model folder of the tiny sizes with random weights; returns its path."""
    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    ids = tokenizer.special
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "nano", TINY_MODEL)
        config = model.preset("nano", tokenizer.vocab_size, image_token_id=ids["<|image_pad|>"],
                              vision_start_token_id=ids["<|vision_start|>"], eos_token_id=ids["<|im_end|>"],
                              pad_token_id=ids["<|endoftext|>"])
    torch.manual_seed(0)
    whole = randomise(model.BLIP3o(config))
    randomise(whole.dit, std=0.1)
    whole.save_pretrained(folder)
    tokenizer.save(folder)
    EvaClip(TINY_DECODER["clip"]).save_pretrained(folder)
    unet = randomise(UNet(TINY_DECODER["unet"]), std=0.1)
    PixelDecoder(unet, VAE(TINY_DECODER["vae"])).save_pretrained(folder)
    settings = read_json(folder / "config.json")
    settings["nano_blip3o"]["sampling"] = TINY_SAMPLING
    write_json(folder / "config.json", settings)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A model folder (as a string) that can draw, answer and reconstruct. Read only: all tests share it."""
    return str(write_tiny_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def image_file(tmp_path_factory):
    """An image file (as a string) that is neither square nor small: noise of 70 x 40 pixels."""
    file = tmp_path_factory.mktemp("images") / "Some cat.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    return str(file)


@pytest.fixture(scope="session", autouse=True)
def index_folder(tmp_path_factory):
    """Tests leave no index of their shards behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "INDEX_FOLDER", tmp_path_factory.mktemp("index"))
        yield


def run_script(name, *args):
    """`python NAME ARGS` in a process of its own, as users start it: the finished process with stdout and
    stderr."""
    script = Path(__file__).with_name(name)
    return subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True,
                          cwd=script.parent, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})


@contextmanager
def tiny_presets(folder):
    """Within: the nano presets are the tiny ones, `folder` is weights/nano, probes are small, no curves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip_decoder.PRESETS, "nano", TINY_DECODER)
        patch.setitem(model.PRESETS, "nano", TINY_MODEL)
        patch.setattr(train, "NANO", Path(folder))
        patch.setattr(train, "HELD_OUT", 2)
        patch.setattr(charts, "save_curves", lambda *_: None)
        yield Path(folder)


@pytest.fixture
def tiny(tiny_folder):
    """The tiny model folder in the place of weights/nano; all that is trained has the tiny sizes."""
    with tiny_presets(tiny_folder) as folder:
        yield folder


def pytest_addoption(parser):
    """--fuzz-seconds: how long each fuzz test goes on."""
    parser.addoption("--fuzz-seconds", type=float, default=20.0, help="length of each fuzz test")


@pytest.fixture
def fuzz(request):
    """Random generators of the seeds 0, 1, 2, ... until --fuzz-seconds are over; a failing seed is named."""
    def generators():
        end, seed = time.monotonic() + request.config.getoption("--fuzz-seconds"), 0
        while time.monotonic() < end:
            try:
                yield np.random.default_rng(seed)
            except GeneratorExit:
                print(f"the fuzz test stopped at seed {seed}")
                raise
            seed += 1
    return generators()
