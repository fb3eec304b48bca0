"""TRL's losses of SFT, DPO, KTO, GRPO and RLOO in one pass over the head, against TRL's: loss, gradients and metrics of one batch."""

import pytest
import torch

trl = pytest.importorskip("trl", minversion="1.16")

from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402

import fastloss  # noqa: E402
from fastloss.integrations import trl_losses  # noqa: E402
from fastloss.integrations.handle import UnknownVersion  # noqa: E402
from fastloss.integrations.trl import apply  # noqa: E402
from integrations.table import record  # noqa: E402
from integrations.test_trl import tokenizer, trainer  # noqa: E402, F401


@pytest.fixture(scope="module")
def ready(tokenizer, tmp_path_factory):  # noqa: F811
    """kind -> (trainer, a batch of it); made once."""
    made = {}

    def of(kind):
        if kind not in made:
            # What the constructor prepares for; the cases switch it on and off.
            more = {"GRPO": {"beta": 0.1}, "DPO": {"use_weighting": True}}.get(kind, {})
            own = trainer(kind, tokenizer, tmp_path_factory.mktemp(kind), **more)
            own.model.train()
            own.current_gradient_accumulation_steps = 2
            torch.manual_seed(0)
            inputs = own._prepare_inputs(next(iter(own.get_train_dataloader())))
            if kind == "GRPO":
                mask, g = inputs["completion_mask"], torch.Generator().manual_seed(1)
                mask[0, 3:], mask[1] = 0, 0  # shorter ones, and one of no token
                noise = lambda: torch.randn(mask.shape, generator=g)
                inputs["old_per_token_logps"] = -5.5 + 0.3 * noise()
                inputs["ref_per_token_logps"] = -5.5 + 0.3 * noise()
                inputs["importance_sampling_ratio"] = noise().exp()
                inputs["sampling_per_token_logps"] = -5.5 + 0.3 * noise()
                inputs["tools"] = (noise() > -1).long()
            if kind == "RLOO":
                # What the policy had a step ago; TRL's own are of this very policy, whose ratios are all 1.
                inputs["old_logps"] = inputs["old_logps"] + torch.tensor([0.3, -0.1, 0.05, -0.4])
            made[kind] = own, inputs
        return made[kind]

    return of


def step(own, inputs, **keywords):
    """(loss, gradients by name, metrics) of one call."""
    own.model.zero_grad()
    own._metrics["train"].clear()
    loss = own.compute_loss(own.model, dict(inputs), **keywords)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in own.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, {k: v for k, v in own._metrics["train"].items() if k != "num_tokens"}


CASES = [
    ("SFT", {}, {"num_items_in_batch": 50}),
    ("DPO", {}, {}),
    ("GRPO", {"loss_type": "dapo", "args.delta": 1.3, "args.use_bias_correction_kl": True}, {}),
    ("GRPO", {"loss_type": "grpo", "importance_sampling_level": "sequence"}, {}),
    ("KTO", {}, {}),
    ("RLOO", {}, {}),
]
MORE = [
    ("SFT", {}, {"num_items_in_batch": None}),
    *[("DPO", {"loss_types": [kind], "loss_weights": [1.0]}, {}) for kind in
      ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm")],
    ("DPO", {"loss_types": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]}, {}),
    ("DPO", {"loss_types": ["robust", "exo_pair"], "loss_weights": [0.7, 0.3], "label_smoothing": 0.1}, {}),
    ("DPO", {"ld_alpha": 0.4}, {}),
    ("DPO", {"use_weighting": True}, {}),
    *[("DPO", {"f_divergence_type": kind}, {}) for kind in ("forward_kl", "js_divergence", "alpha_divergence")],
    *[("GRPO", {"loss_type": kind}, {}) for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo")],
    ("GRPO", {"loss_type": "cispo", "epsilon_high": 1.1}, {}),
    ("GRPO", {"beta": 0.0, "old": None}, {}),
    ("GRPO", {"tools": True}, {}),
    ("GRPO", {"use_vllm": True, "vllm_importance_sampling_correction": True}, {}),
    *[("GRPO", {"loss_type": kind, "importance_sampling_level": "sequence"}, {}) for kind in ("dapo", "luspo", "cispo", "sapo")],
    ("GRPO", {"loss_type": "vespo", "ratio": None}, {}),
    ("GRPO", {"off_policy_mask_threshold": 0.02}, {}),
    ("GRPO", {"off_policy_mask_threshold": 0.02, "sampling": None}, {}),
    ("GRPO", {"top_entropy_quantile": 0.5, "tools": True}, {}),
    ("KTO", {"loss_type": "apo_zero_unpaired", "calculate_KL": False}, {}),
    ("KTO", {"desirable_weight": 1.5, "undesirable_weight": 0.7, "beta": 0.5}, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind, options, keywords", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_the_same_batch(kind, options, keywords, ready, monkeypatch):
    own, inputs = ready(kind)
    inputs, options = dict(inputs), dict(options)
    tools = inputs.pop("tools", None)
    if options.pop("tools", False):
        inputs["tool_mask"] = tools
    for option, name in (("sampling", "sampling_per_token_logps"), ("ratio", "importance_sampling_ratio")):
        if option in options:
            inputs.pop(name)
            del options[option]
    if "old" in options:
        inputs["old_per_token_logps"] = options.pop("old")
    for name, value in {"use_weighting": False, **options}.items() if kind == "DPO" else options.items():
        monkeypatch.setattr(own.args if name.startswith("args.") else own, name.removeprefix("args."), value)
    loss, grads, metrics = step(own, inputs, **keywords)
    with apply():
        ours, our_grads, our_metrics = step(own, inputs, **keywords)
        if kind == "DPO":
            inputs.update(dict.fromkeys(trl_losses.REFERENCE, torch.zeros(4)))
            monkeypatch.setattr(own, "precompute_ref_logps", True)
        if kind == "KTO":
            inputs.update(dict.fromkeys(trl_losses.KTO_REFERENCE, torch.zeros(4)))
            monkeypatch.setattr(own, "precompute_ref_logps", True)
            monkeypatch.setattr(own, "calculate_KL", False)
            if own.loss_type == "kto":  # its mismatched answers are another call of the head
                monkeypatch.setattr(own, "_compute_kl_logps", lambda model, batch: torch.zeros(4))
        plan = fastloss.explain(own.compute_loss, own.model, inputs, **keywords)
    assert 3 <= plan["gemms"] < 4, plan
    # RLOO's is a mean of terms of both signs, of ratios whose log is a small difference of two sums.
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5 if kind == "RLOO" else 1e-6)
    assert grads.keys() == our_grads.keys()
    largest = max(g.abs().max() for g in grads.values())
    difference = max(((our_grads[n] - g).abs().max() / largest).item() for n, g in grads.items())
    assert difference < 2e-5
    assert metrics.keys() == our_metrics.keys() and len(metrics) >= 2
    for name, value in metrics.items():
        assert our_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
    worst = abs((ours - loss) / loss.abs().clamp(min=1)).item()
    words = ", ".join(f"{k.removeprefix('args.')}={v}" for k, v in options.items()) or "its own"
    record(f"trl {kind}", "tiny Llama", f"one pass, {words}", worst, difference)


def test_what_is_not_one_pass_goes_trls_way(ready, monkeypatch):
    own, inputs = ready("DPO")
    monkeypatch.setattr(own, "use_weighting", False)
    with apply(), torch.no_grad():
        value = own.compute_loss(own.model, dict(inputs))
    assert not value.requires_grad
    monkeypatch.setattr(own, "loss_types", ["aot"])
    loss, grads, _ = step(own, inputs)
    with apply():
        ours, our_grads, _ = step(own, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_grads, grads, rtol=1e-3, atol=1e-5)


def test_a_trainer_with_another_loss_is_refused_at_its_first_step(ready, monkeypatch):
    own, inputs = ready("GRPO")
    inputs = {k: v for k, v in inputs.items() if k != "tools"}
    stock = GRPOTrainer._compute_loss
    with apply():
        ours = GRPOTrainer._compute_loss
        assert ours is not stock
        head = own._get_per_token_logps_and_entropies

        def doubled(*args, **keywords):
            logprobs, *rest = head(*args, **keywords)
            return 2 * logprobs, *rest

        monkeypatch.setattr(own, "_get_per_token_logps_and_entropies", doubled)
        with pytest.raises(RuntimeError, match=r"another loss than TRL's; .*losses=False"):
            own.compute_loss(own.model, inputs)
    assert GRPOTrainer._compute_loss is stock


def test_code_that_was_not_read_is_refused(monkeypatch):
    before = DPOTrainer._compute_loss
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda self, model, inputs: None)
    with pytest.raises(UnknownVersion, match=r"is not that of trl 1.16.*losses=False"):
        apply()
    assert DPOTrainer._compute_loss is before
    with apply(losses=False):
        assert DPOTrainer._compute_loss is before


@pytest.mark.parametrize("mixture", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("total", [None, 40])
def test_the_divergence_of_two_heads(mixture, total):
    from trl.trainer import distillation_trainer

    g = torch.Generator().manual_seed(4)
    rows, vocab = (2, 9), 61
    mask = (torch.rand(rows, generator=g) > 0.3).long()
    leaves = [
        torch.randn(*s, generator=g) for s in ((*rows, 16), (*rows, 24), (vocab, 16), (vocab, 24), (vocab,))
    ]
    results = []
    for ours in (False, True):
        hidden, theirs, weight, frozen, bias = (x.clone() for x in leaves)
        for leaf in (hidden, weight, bias):
            leaf.requires_grad_()
        with apply(losses=ours):
            loss, entropy, count = distillation_trainer._chunked_divergence_loss(
                hidden, theirs, weight, frozen, mask, mixture, total, student_lm_head_bias=bias,
                student_logit_scale=0.5, teacher_logit_scale=0.25, temperature=1.3,
            )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), entropy.detach(), count, hidden.grad, weight.grad, bias.grad))
    for ours, stock in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)
    difference = max(
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip(results[1][3:], results[0][3:], strict=True)
    )
    worst = abs((results[1][0] / results[0][0]).item() - 1)
    record("trl Distillation", "two heads", f"its divergence, beta={mixture}", worst, difference)
