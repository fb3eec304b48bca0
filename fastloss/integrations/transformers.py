"""transformers: training that never makes the logits of the batch, without a copy of any model's forward.

``apply(model)`` lets the model's vocabulary head hand out :class:`fastloss.LazyLogits`. The model's own forward goes on
with them, its own loss function ends in ``F.cross_entropy``, and that is fastloss's loss of the linear head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fastloss.integrations.handle import Handle
from fastloss.integrations.heads import LAZY, activate, deactivate, is_lazy, patch_head, subclass, take_back

__all__ = ["apply", "lazy_class"]


def apply(model: Any, *, heads: Any = None) -> Handle:
    """Training with ``model`` makes no logits of the batch; losses and gradients stay what they were.

    In a call with labels, or in training mode, ``outputs.logits`` are :class:`fastloss.LazyLogits`: a tensor that
    multiplies itself out when it is asked for more than a loss. Generation, and evaluation without labels, are as
    before. Nothing of transformers is replaced, only the classes of this model and of its head, by subclasses of the
    same name: copies, pickles and wrappers (PEFT, DDP, FSDP2, accelerate, torch.compile) keep working.

    Args:
        model: a transformers model with a vocabulary head, or a wrapper of one (PEFT, DDP, a compiled model); any other
            module whose forward takes ``labels``, if ``heads`` names its heads.
        heads: names of the vocabulary heads inside ``model`` (str or a sequence of str). None: the model's
            ``get_output_embeddings()``.

    Returns:
        Handle: ``undo()``, or leave the ``with`` block. Applying twice is harmless; the first handle undoes it.

    Raises:
        TypeError: ``model`` is not a module, or no vocabulary head was found in it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inner = unwrap(model)
    names = (heads,) if isinstance(heads, str) else heads
    found = _heads(inner, names)
    if not found:
        raise TypeError(
            f"model: expected a module with a vocabulary head (get_output_embeddings, or heads=), got {type(inner).__name__}"
        )
    if is_lazy(type(inner)):
        if not inner.__dict__.get("_fastloss_off", False):
            return Handle([])
        inner._fastloss_off = False
        return Handle([functools.partial(setattr, inner, "_fastloss_off", True)])
    for head in found:
        patch_head(head)
    model_class: Any = type(inner)
    inner.__class__ = lazy_class(model_class)
    inner._fastloss_heads = names
    own = _replace_own_forward(inner)

    def undo() -> None:
        own()
        if LAZY not in type(inner).__dict__:
            # Somebody (FSDP2) made a subclass of ours since: it is switched off where it stands.
            inner._fastloss_off = True
            return
        for module in (*_heads(inner, names), inner):
            take_back(module)
        inner.__dict__.pop("_fastloss_heads", None)

    return Handle([undo])


@functools.cache
def lazy_class(model_class: Any) -> Any:
    """``model_class`` whose instances train without logits: for a whole class, before its models are built.

    >>> import torch
    >>> from fastloss.integrations.transformers import lazy_class
    >>> lazy_class(torch.nn.Linear).__name__
    'Linear'

    With transformers' own registry::

        from transformers import LlamaForCausalLM
        from transformers.monkey_patching import register_patch_mapping
        register_patch_mapping({"LlamaForCausalLM": lazy_class(LlamaForCausalLM)})
    """
    inner = model_class.forward

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _wants_lazy(self, args, kwargs):
            return inner(self, *args, **kwargs)
        return _with_lazy_heads(self, functools.partial(inner, self), args, kwargs)

    return subclass(model_class, forward, lazy_class)


def unwrap(model: Any) -> Any:
    """The model inside PEFT's, torch.compile's and the data-parallel wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _heads(model: Any, names: Any) -> list[Any]:
    if names is not None:
        return [model.get_submodule(name) for name in names]
    if not hasattr(model, "get_output_embeddings"):
        return []
    try:
        head = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return []
    found = list(head) if isinstance(head, (list, tuple, nn.ModuleList)) else [head]
    return [h for h in found if isinstance(h, nn.Module)]


def _replace_own_forward(model: Any) -> Any:
    """A model that was given a forward of its own (accelerate's hooks, an earlier patch) is called through that one."""
    own = vars(model).get("forward")
    if own is None:
        return lambda: None

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not _wants_lazy(model, args, kwargs):
            return own(*args, **kwargs)
        return _with_lazy_heads(model, own, args, kwargs)

    model.forward = forward

    def undo() -> None:
        if vars(model).get("forward") is forward:
            model.forward = own

    return undo


def _wants_lazy(model: Any, args: Any, kwargs: Any) -> bool:
    if getattr(model, "_fastloss_off", False):
        return False
    training = model.training and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return training
    return training or kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None


def _with_lazy_heads(model: Any, forward: Any, args: Any, kwargs: Any) -> Any:
    active = activate(_heads(model, model.__dict__.get("_fastloss_heads")))
    try:
        return forward(*args, **kwargs)
    finally:
        deactivate(active)
