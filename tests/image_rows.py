"""Images for tests: small models that read them, and rows with them."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
SMALL |= dict(image_size=8, patch_size=4)
NAMES = ("left", "middle", "right")


def _swin(tf):
    windows = dict(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, drop_path_rate=0.0)
    return tf.SwinModel(tf.SwinConfig(image_size=8, patch_size=2, **windows))


MODELS = {
    "vit": lambda tf: tf.ViTModel(tf.ViTConfig(**SMALL), add_pooling_layer=False),
    "deit": lambda tf: tf.DeiTModel(tf.DeiTConfig(**SMALL)),
    "beit": lambda tf: tf.BeitModel(tf.BeitConfig(**SMALL, use_relative_position_bias=True)),
    "dinov2": lambda tf: tf.Dinov2Model(tf.Dinov2Config(**SMALL)),
    "convnext": lambda tf: tf.ConvNextModel(tf.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])),
    "swin": _swin,
}


def save_model(kind, folder):
    """Save a randomly initialised model that reads 8 x 8 pixels, and its image processor."""
    import transformers

    torch.manual_seed(1)
    model = MODELS[kind](transformers)
    for parameter in model.parameters():  # larger than usual, so that a wrong factor shows
        parameter.data.mul_(4) if parameter.ndim in (2, 4) else None
    model.save_pretrained(folder)
    size = {"height": 8, "width": 8}
    transformers.ViTImageProcessorPil(size=size, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


def draw(count=48):
    """(8 x 10 RGB images of noise with a bright part, the number of their class): its place is the class."""
    generator = np.random.default_rng(0)
    for i in range(count):
        values = generator.integers(0, 120, (8, 10, 3), dtype=np.uint8)
        values[:, 3 * (i % 3) : 3 * (i % 3) + 3] += 120
        yield Image.fromarray(values), i % 3


def write_table(path):
    """Write a parquet file with image {bytes, path}, label with names, and site."""
    rows = []
    for i, (image, label) in enumerate(draw()):
        image.save(file := io.BytesIO(), format="PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": f"{i}.png"}, "label": label, "site": f"site{i % 4}"})
    note = {"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}}
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(note)}), path)
    return path


def write_folder(root):
    """Write PNG files into a folder for each class."""
    for i, (image, label) in enumerate(draw()):
        folder = root / NAMES[label]
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{i:02d}.png")
    return root
