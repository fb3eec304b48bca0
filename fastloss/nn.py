"""The losses as torch.nn modules: thin shells over the functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastloss.losses.cross_entropy import cross_entropy
from fastloss.losses.distillation import DistillationOutput, distillation_loss, linear_distillation_loss
from fastloss.losses.linear_cross_entropy import linear_cross_entropy, linear_logits
from fastloss.losses.multi_token import multi_token_targets
from fastloss.losses.policy import PolicyOutput, policy_loss
from fastloss.losses.preference import PreferenceOutput, preference_loss
from fastloss.losses.reward_lists import (
    ListwiseOutput,
    listwise_preference_loss,
    listwise_reward_loss,
    reward_regression_loss,
    tied_reward_loss,
)
from fastloss.losses.reward_model import RewardOutput, reward_model_loss
from fastloss.losses.router import RouterOutput, moe_load_balancing_loss, router_z_loss
from fastloss.losses.supervised import SupervisedOutput, linear_supervised_loss, supervised_loss
from fastloss.losses.token_stats import TokenStats, linear_token_stats
from fastloss.losses.topk_distillation import linear_topk_distillation_loss, topk_distillation_loss


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` computed by :func:`fastloss.cross_entropy`, whose further keywords it takes.

    >>> import torch, fastloss
    >>> loss = fastloss.nn.CrossEntropyLoss(z_loss=1e-4)(torch.zeros(2, 4), torch.tensor([0, 1]))
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.options = options

    def forward(self, input: Tensor, target: Tensor, **options: Any) -> Any:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **{**self.options, **options},
        )


class LinearCrossEntropyLoss(nn.modules.loss._WeightedLoss):
    """A linear head and its cross-entropy: ``torch.nn.LinearCrossEntropyLoss`` (torch 2.13), its constructor, its defaults and
    its parameters' names, so that checkpoints move between the two; computed by :func:`fastloss.linear_cross_entropy`.

    Args:
        in_features: D. num_classes: C. out_features: ``(d1, …)`` of a K-dimensional loss.
        bias: a bias of the linear map.
        weight, ignore_index, reduction, label_smoothing, options: as in :func:`fastloss.linear_cross_entropy`; its further
            keywords (``z_loss``, ``softcap``, …) are taken too.

    Raises:
        RuntimeError: a class weight of the wrong shape, a label smoothing outside [0, 1] (PyTorch's errors).

    >>> import torch, fastloss
    >>> layer = fastloss.nn.LinearCrossEntropyLoss(8, 5)
    >>> layer(torch.zeros(3, 8), torch.tensor([0, 1, 2])).backward()
    >>> list(layer.state_dict())
    ['linear.weight']
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        **more: Any,
    ):
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"weight: expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}"
            )
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(
                f"label_smoothing: expected label_smoothing to be in range [0, 1], got {label_smoothing}"
            )
        super().__init__(weight=weight, size_average=None, reduce=None, reduction=reduction)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.options, self.more = options, more
        rows = math.prod(self.out_features, start=num_classes)
        self.linear = nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """The initial weights of ``nn.Linear``, after ``to_empty()`` of a module made on the meta device."""
        self.linear.reset_parameters()

    def forward(self, input: Tensor, target: Tensor, **more: Any) -> Any:
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **{**self.more, **more},
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
        )


class _WithOptions(nn.Module):
    """A loss without state: the options of its function, fixed where it is made, which a call may replace."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class PreferenceLoss(_WithOptions):
    """:func:`fastloss.preference_loss` with its options kept.

    >>> import torch, fastloss
    >>> same = torch.tensor([-3.0])
    >>> round(fastloss.nn.PreferenceLoss(loss_type="hinge", beta=0.2)(same, same, same, same).loss.item(), 4)
    1.0
    """

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        **options: Any,
    ) -> PreferenceOutput:
        options = {**self.options, **options}
        return preference_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, **options)


class RewardModelLoss(_WithOptions):
    """:func:`fastloss.reward_model_loss` with its options kept.

    >>> import torch, fastloss
    >>> round(fastloss.nn.RewardModelLoss()(torch.zeros(2), torch.zeros(2)).loss.item(), 4)
    0.6931
    """

    def forward(self, chosen_rewards: Tensor, rejected_rewards: Tensor, **options: Any) -> RewardOutput:
        return reward_model_loss(chosen_rewards, rejected_rewards, **{**self.options, **options})


class LinearHead(nn.Linear):
    """A vocabulary head that can give logits, a loss, or token statistics.

    It owns the weight, so that FSDP and tensor-parallel wrappers see a module and gather the weight in its forward.

    >>> import torch, fastloss
    >>> head = fastloss.nn.LinearHead(8, 5)
    >>> hidden, target = torch.zeros(3, 8), torch.tensor([0, 1, 2])
    >>> head(hidden).shape, head(hidden, target).shape
    (torch.Size([3, 5]), torch.Size([]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.options = options

    def forward(
        self,
        input: Tensor,
        target: Tensor | None = None,
        *,
        stats: tuple[str, ...] | None = None,
        **options: Any,
    ) -> Any:  # type: ignore[override]
        """Logits without a target; else the loss, or the ``stats`` asked for as :class:`TokenStats`. ``lora`` among the options is
        that of :func:`fastloss.linear_cross_entropy`, for all three."""
        options = {**self.options, **options}
        if target is None and stats is None:
            return linear_logits(input, self.weight, self.bias, options.get("lora"))
        if stats is not None:
            return self._stats(input, target, stats, options)
        assert target is not None
        return linear_cross_entropy(input, self.weight, target, linear_bias=self.bias, **options)

    def _stats(
        self, input: Tensor, target: Tensor | None, stats: tuple[str, ...], options: dict[str, Any]
    ) -> TokenStats:
        return linear_token_stats(input, self.weight, target, linear_bias=self.bias, outputs=stats, **options)


class PolicyLoss(_WithOptions):
    """:func:`fastloss.policy_loss` with its options fixed; the call takes the tensors and may override options.

    >>> import torch, fastloss
    >>> loss = fastloss.nn.PolicyLoss(loss_type="grpo", clip_high=0.28)
    >>> loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2)).loss
    tensor(-1.)
    """

    def __init__(self, loss_type: str = "dapo", **options: Any):
        super().__init__(loss_type=loss_type, **options)

    def forward(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> PolicyOutput:
        return policy_loss(logprobs, old_logprobs, advantages, mask, **{**self.options, **options})


class DistillationLoss(_WithOptions):
    """:func:`fastloss.distillation_loss` with its options fixed; the call takes the tensors and may override options.

    >>> import torch, fastloss
    >>> loss = fastloss.nn.DistillationLoss("jsd", interpolation=0.5)
    >>> loss(torch.zeros(1, 4), torch.zeros(1, 4)).loss
    tensor(0.)
    """

    def __init__(self, divergence: str = "forward_kl", **options: Any):
        super().__init__(divergence=divergence, **options)

    def forward(
        self, logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, **options: Any
    ) -> DistillationOutput:
        return distillation_loss(logits, teacher_logits, target, **{**self.options, **options})


class LinearDistillationLoss(_WithOptions):
    """:func:`fastloss.linear_distillation_loss` with its options fixed; the weights are the models' own.

    >>> import torch, fastloss
    >>> loss = fastloss.nn.LinearDistillationLoss("reverse_kl", temperature=2.0)
    >>> loss(torch.zeros(1, 8), torch.zeros(4, 8), torch.zeros(1, 16), torch.zeros(4, 16)).loss
    tensor(0.)
    """

    def __init__(self, divergence: str = "forward_kl", **options: Any):
        super().__init__(divergence=divergence, **options)

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        target: Tensor | None = None,
        **options: Any,
    ) -> DistillationOutput:
        options = {**self.options, **options}
        return linear_distillation_loss(
            input, linear_weight, teacher_input, teacher_weight, target, **options
        )


class TopKDistillationLoss(_WithOptions):
    """:func:`fastloss.topk_distillation_loss` with its options fixed: a teacher of K classes a position.

    >>> import torch, fastloss
    >>> ids, logprobs = torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.25]]).log()
    >>> round(fastloss.nn.TopKDistillationLoss()(torch.zeros(1, 4), ids, logprobs).loss.item(), 4)
    0.1733
    """

    def __init__(self, tail: str = "bin", **options: Any):
        super().__init__(tail=tail, **options)

    def forward(
        self,
        logits: Tensor,
        teacher_ids: Tensor,
        teacher_logprobs: Tensor,
        target: Tensor | None = None,
        **options: Any,
    ) -> DistillationOutput:
        options = {**self.options, **options}
        return topk_distillation_loss(logits, teacher_ids, teacher_logprobs, target, **options)


class LinearTopKDistillationLoss(_WithOptions):
    """:func:`fastloss.linear_topk_distillation_loss` with its options fixed; the weight is the model's own.

    >>> import torch, fastloss
    >>> ids, logprobs = torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.25]]).log()
    >>> loss = fastloss.nn.LinearTopKDistillationLoss()
    >>> round(loss(torch.zeros(1, 8), torch.zeros(4, 8), ids, logprobs).loss.item(), 4)
    0.1733
    """

    def __init__(self, tail: str = "bin", **options: Any):
        super().__init__(tail=tail, **options)

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        teacher_ids: Tensor,
        teacher_logprobs: Tensor,
        target: Tensor | None = None,
        **options: Any,
    ) -> DistillationOutput:
        options = {**self.options, **options}
        return linear_topk_distillation_loss(
            input, linear_weight, teacher_ids, teacher_logprobs, target, **options
        )


class SupervisedLoss(_WithOptions):
    """:func:`fastloss.supervised_loss` with its options fixed.

    >>> import torch, fastloss
    >>> round(fastloss.nn.SupervisedLoss("dft")(torch.zeros(1, 4), torch.tensor([1])).loss.item(), 4)
    0.3466
    """

    def __init__(self, loss_type: str = "nll", **options: Any):
        super().__init__(loss_type=loss_type, **options)

    def forward(self, logits: Tensor, target: Tensor, **options: Any) -> SupervisedOutput:
        return supervised_loss(logits, target, **{**self.options, **options})


class LinearSupervisedLoss(_WithOptions):
    """:func:`fastloss.linear_supervised_loss` with its options fixed; the weight is the model's own.

    >>> import torch, fastloss
    >>> loss = fastloss.nn.LinearSupervisedLoss("dft")
    >>> round(loss(torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([1])).loss.item(), 4)
    0.3466
    """

    def __init__(self, loss_type: str = "nll", **options: Any):
        super().__init__(loss_type=loss_type, **options)

    def forward(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any
    ) -> SupervisedOutput:
        return linear_supervised_loss(input, linear_weight, target, **{**self.options, **options})


class LinearMultiTokenLoss(nn.Module):
    """The summed cross-entropy of K heads over one vocabulary matrix: :func:`fastloss.multi_token_targets`, then
    :func:`fastloss.linear_cross_entropy` of the stacked hidden states.

    Args:
        heads, first, weights: as in :func:`fastloss.multi_token_targets`; head k has weight w_k times its mean.
        ignore_index: the label of no target.
        options: further keywords of :func:`fastloss.linear_cross_entropy`.

    >>> import torch, fastloss
    >>> loss = fastloss.nn.LinearMultiTokenLoss(heads=2, weights=[1.0, 0.5])
    >>> round(loss(torch.zeros(2, 5, 8), torch.zeros(4, 8), torch.tensor([0, 1, 2, 3, 0])).item(), 4)  # 1.5 log 4
    2.0794
    """

    def __init__(
        self,
        heads: int,
        *,
        first: int = 1,
        weights: Sequence[float] | None = None,
        ignore_index: int = -100,
        **options: Any,
    ):
        super().__init__()
        self.heads, self.first, self.ignore_index, self.options = heads, first, ignore_index, options
        self.weights = None if weights is None else tuple(weights)

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        labels: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """``input [K, ..., T, D]``, ``labels [..., T]``; documents as in :func:`fastloss.multi_token_targets`."""
        t = multi_token_targets(
            labels, self.heads, first=self.first, weights=self.weights, cu_seqlens=cu_seqlens,
            position_ids=position_ids, segment_ids=segment_ids, ignore_index=self.ignore_index,
        )  # fmt: skip
        options = {**self.options, **options}
        return linear_cross_entropy(
            input, linear_weight, t.target, token_weight=t.token_weight, ignore_index=self.ignore_index,
            reduction="sum", **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        own = {"heads": self.heads, "first": self.first, "weights": self.weights}
        if self.ignore_index != -100:
            own["ignore_index"] = self.ignore_index
        return ", ".join(f"{name}={value!r}" for name, value in {**own, **self.options}.items())


class MoELoadBalancingLoss(_WithOptions):
    """:func:`fastloss.moe_load_balancing_loss` with its options fixed.

    >>> import torch, fastloss
    >>> fastloss.nn.MoELoadBalancingLoss(top_k=2)(torch.zeros(1, 3, 4)).loss
    tensor(2.)
    """

    def __init__(self, top_k: int, **options: Any):
        super().__init__(top_k=top_k, **options)

    def forward(self, router_logits: Tensor | Sequence[Tensor], **options: Any) -> RouterOutput:
        return moe_load_balancing_loss(router_logits, **{**self.options, **options})


class RouterZLoss(_WithOptions):
    """:func:`fastloss.router_z_loss` with its options fixed.

    >>> import torch, fastloss
    >>> round(fastloss.nn.RouterZLoss()(torch.zeros(1, 3, 4)).item(), 4)  # (log 4)²
    1.9218
    """

    def forward(self, router_logits: Tensor | Sequence[Tensor], **options: Any) -> Tensor:
        return router_z_loss(router_logits, **{**self.options, **options})


class TiedRewardLoss(_WithOptions):
    """:func:`fastloss.tied_reward_loss` with its options fixed.

    >>> import torch, fastloss
    >>> loss = fastloss.nn.TiedRewardLoss("davidson", tie_strength=1.0)
    >>> round(loss(torch.zeros(1), torch.zeros(1), torch.tensor([1])).loss.item(), 4)  # log 3
    1.0986
    """

    def __init__(self, model: str = "rao_kupper", **options: Any):
        super().__init__(model=model, **options)

    def forward(
        self, first_rewards: Tensor, second_rewards: Tensor, outcome: Tensor, **options: Any
    ) -> RewardOutput:
        return tied_reward_loss(first_rewards, second_rewards, outcome, **{**self.options, **options})


class ListwiseRewardLoss(_WithOptions):
    """:func:`fastloss.listwise_reward_loss` with its options fixed.

    >>> import torch, fastloss
    >>> loss = fastloss.nn.ListwiseRewardLoss("plackett_luce")
    >>> round(loss(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])).loss.item(), 4)  # log 6
    1.7918
    """

    def __init__(self, loss_type: str = "plackett_luce", **options: Any):
        super().__init__(loss_type=loss_type, **options)

    def forward(self, scores: Tensor, labels: Tensor, **options: Any) -> RewardOutput:
        return listwise_reward_loss(scores, labels, **{**self.options, **options})


class ListwisePreferenceLoss(_WithOptions):
    """:func:`fastloss.listwise_preference_loss` with its options fixed.

    >>> import torch, fastloss
    >>> same, labels = torch.tensor([[-3.0, -3.0]]), torch.tensor([[1.0, 0.0]])
    >>> round(fastloss.nn.ListwisePreferenceLoss(beta=0.2)(same, labels, same).loss.item(), 4)  # log 2
    0.6931
    """

    def __init__(self, loss_type: str = "plackett_luce", **options: Any):
        super().__init__(loss_type=loss_type, **options)

    def forward(
        self, logps: Tensor, labels: Tensor, ref_logps: Tensor | None = None, **options: Any
    ) -> ListwiseOutput:
        return listwise_preference_loss(logps, labels, ref_logps, **{**self.options, **options})


class RewardRegressionLoss(_WithOptions):
    """:func:`fastloss.reward_regression_loss` with its options fixed.

    >>> import torch, fastloss
    >>> fastloss.nn.RewardRegressionLoss("mse")(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])).loss
    tensor(2.)
    """

    def __init__(self, loss_type: str = "mse", **options: Any):
        super().__init__(loss_type=loss_type, **options)

    def forward(self, rewards: Tensor, labels: Tensor, **options: Any) -> RewardOutput:
        return reward_regression_loss(rewards, labels, **{**self.options, **options})
