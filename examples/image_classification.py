"""Handwritten digits, told apart by four clients that hold different ones: LoRA on a small vision transformer.

    python examples/image_classification.py OUT [key=value ...]

Needs no network: scikit-learn brings the images, and the base model is made here, so its frozen weights know nothing.
In place of it, name one of the hub by model.source=google/vit-base-patch16-224-in21k.
"""

import sys
from pathlib import Path

from peerlora import load_config, simulate


def write_digits(folder: Path) -> str:
    """Write 1,797 images of 8 x 8 pixels, a folder for each digit."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).save(place / f"{number:04d}.png")
    return f"folder:{folder}"


def write_model(folder: Path) -> str:
    """Write a vision transformer with random weights, and the image processor that belongs to it."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel, set_seed

    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ViTModel(ViTConfig(**sizes, image_size=8, patch_size=2, initializer_range=0.1)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def main(out: str, *words: str):
    made = Path(out).with_name(f"{Path(out).name}-made")
    settings = {
        "model": {"source": write_model(made / "model")},
        "task": {"kind": "image-classification"},
        "data": {"train": write_digits(made / "digits"), "label": "label", "holdout": 0.2},
        "partition": {"kind": "dirichlet", "concentration": 0.5},
        "adapter": {"targets": "all-linear"},
        "clients": 4,
        "topology": {"kind": "ring"},
        "algorithm": {"name": "dec-lora"},
        "train": {"rounds": 20, "local_steps": 10, "batch": 32, "lr": 0.01},
    }
    reached = simulate(load_config(settings, words), out).summary["scores"]
    print(f"held-out accuracy: mean client {reached['own_mean']:.3f}, averaged {reached['averaged']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
