"""The former place of ``peerlora.lora.base_models``, for scripts that import from it."""

from peerlora.lora.base_models import load_base, load_tokenizer

__all__ = ["load_base", "load_tokenizer"]
