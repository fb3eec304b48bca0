"""A trained model as a transformers folder: what AutoModel…from_pretrained and the next stage read."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from . import chat, lora, parallel


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """By the first process: written beside the old folder, then put in its place. Adapters are merged, so that it loads
    as any other."""
    weights: dict[str, Tensor] | None = None
    if any(map(parallel.is_sharded, model.parameters())):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)  # type: ignore[assignment]
    parallel.from_first(partial(_write, model, weights, tokenizer, folder))


def _write(model: Any, weights: dict[str, Tensor] | None, tokenizer: Any, folder: Path) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    disable_progress_bar()
    plain = lora.merged(model, weights)
    if plain is not model:
        model, weights = plain, None
    if (
        getattr(model, "generation_config", None) is not None
    ):  # whoever generates with it stops where its turns end
        stop = sorted(chat.ends(tokenizer, model.generation_config.eos_token_id))
        model.generation_config.eos_token_id = stop if len(stop) > 1 else stop[0]
    use_cache, model.config.use_cache = model.config.use_cache, True  # off in training alone
    try:
        model.save_pretrained(temporary, state_dict=weights)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"model: cannot write {temporary}: {error}") from error
    finally:
        model.config.use_cache = use_cache
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
