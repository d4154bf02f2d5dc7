"""`sample.py --contact-sheet`: all that a model does with one prompt, in one image: what is generated, on
its way from noise, changed, described, and sent through its features and back."""
import torch
from PIL import Image

import data
from sample import to_uint8

FRAMES = 4                              # of the way from noise
CHANGE = "make the background {}"      # to what it isn't yet


def cells(pipe, prompt, seed, sampling):
    """Yield (label, uint8 image (H, W, 3)) of each cell. sampling: steps, guidance, decoder_steps,
    decoder_guidance, size and upsample, as Pipeline.images takes them. Models without a vision tower neither
    read nor change images."""
    pixels = pipe.images([prompt], [seed], **sampling)
    (image,) = to_uint8(pixels)
    (text,) = pipe.final_prompts([prompt], [seed], None, sampling["upsample"])
    said = f"generated from: {prompt}" + f", upsampled to: {text}" * (text != prompt)
    yield said, image
    if not pipe.model.config.latents and pipe.model.dit is not None:
        states, _ = pipe.trajectory(prompt, seed, *map(sampling.get, ("steps", "guidance", "upsample")))
        time = torch.arange(FRAMES) / FRAMES                         # most happens at the end
        chosen = ((len(states) - 1) * (2 - time) * time).long()
        frames = pipe.pixels(states[chosen], [seed] * FRAMES, sampling["decoder_steps"],
                             sampling["decoder_guidance"], sampling["size"])
        for step, frame in zip(chosen.tolist(), to_uint8(frames)):
            yield f"the same after {step} of {len(states) - 1} steps", frame
    shown = Image.fromarray(image)
    if pipe.model.visual is not None:
        change = CHANGE.format("black" if image[0].mean() > 127 else "white")
        yield f"changed: {change}", to_uint8(pipe.images([change], [seed], images=[shown], **sampling))[0]
        yield f"{data.DESCRIBE} {pipe.answer(shown, data.DESCRIBE)}", image
    if not pipe.model.config.latents:
        again = pipe.reconstruct([shown], [seed], sampling["decoder_steps"], sampling["decoder_guidance"])
        yield "through its features and back", to_uint8(again)[0]
