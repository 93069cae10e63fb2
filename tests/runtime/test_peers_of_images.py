"""Real peers that learn from images: their image processors must agree, as their base models must."""

import json
import shutil

import pytest

from peerlora.config.loading import load_config
from peerlora.runtime.compose import compose
from peerlora.runtime.peer.site import settings_of


@pytest.fixture
def told(models, pictures, tmp_path):
    """A function that gives the settings in a site's greeting, with changes to its image processor."""

    def settings(**changes):
        folder = tmp_path / f"base{len(list(tmp_path.iterdir()))}"
        shutil.copytree(models("vit"), folder)
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        tree = {
            "model": {"source": str(folder)},
            "task": {"kind": "image-classification"},
            "data": {"train": str(pictures), "label": "label"},
            "partition": "iid",
            "clients": 2,
            "topology": "complete",
            "threads": 1,
        }
        return settings_of(compose(load_config(tree), clients=[0]))

    return settings


def test_sites_with_another_image_processor_do_not_greet_each_other(told):
    """The digest of a base model's weights does not tell it, and its pixels would mean something else."""
    own = told()
    assert told() == own
    for changes in ({"image_mean": [0.4, 0.5, 0.5]}, {"image_std": [1, 1, 1]}, {"do_normalize": False}):
        other = told(**changes)
        assert {name for name in own if own[name] != other[name]} == {"image-processor"}, changes


def test_of_texts_a_greeting_says_nothing_of_images(config):
    assert "image-processor" not in settings_of(compose(config(), clients=[0]))
