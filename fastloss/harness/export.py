"""A trained model as a transformers folder: what AutoModel…from_pretrained and the next stage read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from . import lora


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """Written beside the old folder, then put in its place; adapters are merged, so that it loads as any other."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    disable_progress_bar()
    model = lora.merged(model)
    use_cache, model.config.use_cache = model.config.use_cache, True  # off in training alone
    model.save_pretrained(temporary)
    model.config.use_cache = use_cache
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
