"""The card of an adapter folder says how its base is found."""

import pytest

from peerlora.lora.adapter_card import card_of_base, write_card


@pytest.mark.parametrize(("location", "told"), [("packaged:some-model", True), ("/somewhere/model", False)])
def test_a_base_that_is_a_gguf_file_of_a_package_is_told(location, told):
    card = write_card("packaged:some-model", location, "Rank 4", {})
    assert ("`peerlora export --with-base` or `peerlora merge`" in card) == told
    assert "package_model('some-model')" in card
    moved = card_of_base(card, location, "owner/base")
    assert "package" not in moved and "GGUF" not in moved and '"base_model": "owner/base"' in moved
