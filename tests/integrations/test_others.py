"""The smaller integrations, each against the trainer's own code where it is installed (make integrations), else against a
small copy of its interface; loss and gradients equal."""

import contextlib
import dataclasses
import enum
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import fastloss
from fastloss.integrations.handle import Handle, UnknownVersion, expect_signature, replace_everywhere
from integrations.peers import load
from integrations.table import record
from integrations.tiny_models import VOCAB, batch, tiny_model

B, T, D, V = 3, 8, 16, 61


def generator():
    return torch.Generator().manual_seed(0)


def head_inputs():
    g = generator()
    hidden = torch.randn(B, T, D, generator=g).requires_grad_()
    head = torch.nn.Linear(D, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=g))
    target = torch.randint(0, V, (B, T), generator=g)
    target[0, :3] = -100
    return hidden, head, target


def policy_inputs():
    g = generator()
    new = (-torch.rand(B, T, generator=g) * 3).requires_grad_()
    old = new.detach() + 0.4 * torch.randn(B, T, generator=g)
    advantages = torch.randn(B, T, generator=g)
    mask = torch.ones(B, T)
    mask[0, 5:] = 0
    return new, old, advantages, mask


def same(trainer, model, loss, ours, theirs, leaves, interface="package", tolerance=1e-5):
    """Values and the gradients of ``leaves`` equal; the comparison goes into the table."""
    results = []
    for value in (ours, theirs):
        grads = torch.autograd.grad(value, leaves, retain_graph=True)
        results.append((value.detach().float(), grads))
    (a, ga), (b, gb) = results
    difference = (abs(a - b) / max(abs(b), 1e-12)).item()
    gradient = max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(ga, gb, strict=True))
    record(trainer, model, loss, difference, gradient, interface)
    assert difference < tolerance and gradient < 5 * tolerance, (difference, gradient)


@contextlib.contextmanager
def package(name, **contents):
    """A module ``name`` (and its parents) with these contents, for a test."""
    made = []
    with pytest.MonkeyPatch.context() as m:
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:n]))
            module.__path__ = []
            m.setitem(sys.modules, module.__name__, module)
            if made:
                setattr(made[-1], parts[n - 1], module)
            made.append(module)
        vars(made[-1]).update(contents)
        yield made[-1]


# -- how names are replaced ----------------------------------------------------------------------------------------------


def test_names_are_found_by_identity_and_put_back():
    function, other = (lambda: 1), (lambda: 2)
    with package("peer.inner", function=function, alias=function, other=other) as inner:
        sys.modules["peer"].function = function
        undo = replace_everywhere("peer", function, other)
        assert inner.function is inner.alias is sys.modules["peer"].function is other
        inner.alias = None
        Handle([undo]).undo()
        assert inner.function is sys.modules["peer"].function is function
        assert inner.alias is None and inner.other is other


def test_handle_undoes_in_reverse_and_once():
    order = []
    with pytest.raises(KeyError):
        with Handle([lambda: order.append(1), lambda: order.append(2)]) as handle:
            raise KeyError
    handle.undo()
    assert order == [2, 1]


def test_an_unknown_signature_is_refused():
    with package("peer"):
        sys.modules["peer"].__version__ = "9.9"
        with pytest.raises(UnknownVersion, match=r"peer 9\.9: .* takes \(a, b\), expected \(a\)"):
            expect_signature(lambda a, b: None, "a", "peer")


# -- torchtitan ----------------------------------------------------------------------------------------------------------


def test_torchtitan():
    loss_module = load("torchtitan.components.loss")
    sys.modules.pop("fastloss.integrations.torchtitan", None)
    from fastloss.integrations.torchtitan import LinearCrossEntropyLoss

    hidden, head, target = head_inputs()
    leaves = (hidden, head.weight)
    ours = LinearCrossEntropyLoss(LinearCrossEntropyLoss.Config(num_chunks=4))
    assert isinstance(ours, loss_module.ChunkedLossWrapper)
    with pytest.raises(ValueError, match="lm_head"):
        ours(hidden, target)
    ours.set_lm_head(head)
    tokens = torch.tensor(17.0)
    loss, metrics = ours(hidden, target, tokens)
    whole = loss_module.CrossEntropyLoss(loss_module.CrossEntropyLoss.Config())
    expected, _ = whole(head(hidden), target, tokens)
    assert metrics == {}
    same("torchtitan", "linear head", "cross-entropy", loss, expected, leaves)
    head.weight.grad = hidden.grad = None
    chunked = loss_module.ChunkedLossWrapper(loss_module.ChunkedLossWrapper.Config(num_chunks=4))
    chunked.set_lm_head(head)
    chunked(hidden, target, tokens)[0].backward()
    theirs = [t.grad.clone() for t in leaves]
    for a, b in zip(torch.autograd.grad(ours(hidden, target, tokens)[0], leaves), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert not ours(hidden, target, tokens)[0].requires_grad


# -- verl ----------------------------------------------------------------------------------------------------------------


class VerlConfig(dict):
    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, None, 0.28

    def __init__(self, **batch):
        super().__init__(clip_ratio_c=3.0)
        self.global_batch_info = batch


@pytest.mark.parametrize("mode, info", [
    ("token-mean", {}),
    ("token-mean", {"dp_size": 2, "batch_num_tokens": 31}),
    ("seq-mean-token-sum", {"dp_size": 2, "global_batch_size": 5}),
    ("seq-mean-token-mean", {}),
    ("seq-mean-token-sum-norm", {"loss_scale_factor": 11}),
])  # fmt: skip
@pytest.mark.parametrize("weighted", [False, True])
def test_verl_policy_loss(mode, info, weighted):
    core = load("verl.trainer.ppo.core_algos")
    load("verl.utils.experimental.torch_functional")
    load("verl.utils.kernel.linear_cross_entropy")
    from fastloss.integrations import verl

    new, old, advantages, mask = policy_inputs()
    weights = torch.rand(B, T, generator=generator()) if weighted else None
    arguments = (old, new, advantages, mask, mode, VerlConfig(**info), weights)
    expected, metrics = core.compute_policy_loss_vanilla(*arguments)
    with verl.register():
        ours, our_metrics = core.get_policy_loss_fn("fastloss")(*arguments)
    same("verl", "tokens", f"policy loss, {mode}", ours, expected, (new,))
    assert our_metrics == pytest.approx(metrics, abs=1e-5)
    assert "fastloss" not in core.POLICY_LOSS_REGISTRY


def test_verl_head():
    load("verl.trainer.ppo.core_algos")
    heads = load("verl.utils.experimental.torch_functional")
    kernel = load("verl.utils.kernel.linear_cross_entropy")
    from fastloss.integrations import verl

    hidden, head, target = head_inputs()
    ids, leaves = target.clamp(min=0), (hidden, head.weight)
    stock = heads.FusedLinearForPPO
    logprobs, entropy = stock()(hidden, head.weight, ids, 0.7)
    with verl.register():
        assert heads.FusedLinearForPPO is not stock
        with verl.register():
            pass
        ours = heads.FusedLinearForPPO(impl_backend="torch")(hidden, head.weight, ids, temperature=0.7)
        triton = kernel.linear_cross_entropy(hidden, head.weight, ids, 0.7, "none")
    assert heads.FusedLinearForPPO is stock
    for a, b in zip(ours, triton, strict=True):
        assert a.shape == ids.shape and torch.equal(a, b)
    mix = lambda lp, en: lp.sin().sum() + en.square().sum()
    same("verl", "linear head", "log-probabilities, entropy", mix(*ours), mix(logprobs, entropy), leaves)


# -- OpenRLHF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"dual_clip": 2.0}, {"token_level_loss": False}, {"policy_loss_type": "gspo"}]
)
@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 31.0, "global_batch_size": 6.0}])
def test_openrlhf_policy_loss(options, counts):
    load("openrlhf.models.utils")
    losses = load("openrlhf.models.loss")
    from fastloss.integrations import openrlhf

    new, old, advantages, mask = policy_inputs()
    module = losses.PolicyLoss(0.2, 0.28, **options)
    expected = module(new, old, advantages, action_mask=mask, **counts)
    stock = losses.PolicyLoss.forward
    with openrlhf.apply():
        ours = module(new, old, advantages, action_mask=mask, **counts)
    assert losses.PolicyLoss.forward is stock
    how = ", ".join(f"{k}={v}" for k, v in options.items()) or "ppo"
    same("openrlhf", "tokens", f"policy loss, {how}", ours[0], expected[0], (new,))
    torch.testing.assert_close(ours[2], expected[2], rtol=1e-5, atol=1e-6)


def test_openrlhf_actor_makes_no_logits():
    """What its Actor.forward does with the logits, on a model whose logits are lazy."""
    utils = load("openrlhf.models.utils")
    from fastloss.integrations import openrlhf, transformers

    model, inputs = tiny_model("LlamaForCausalLM"), batch()
    rolled = torch.roll(inputs["input_ids"], -1, 1)

    def actor():
        output = model(inputs["input_ids"])
        output["logits"] = output["logits"].to(torch.float32)
        output["logits"].div_(0.7)
        return output["logits"], utils.log_probs_from_logits(
            output["logits"], rolled
        ).sin().sum() + utils.compute_entropy(output["logits"]).sum()

    leaves = tuple(model.parameters())
    _, expected = actor()
    with openrlhf.apply(), transformers.apply(model):
        logits, ours = actor()
    assert logits.is_lazy
    same("openrlhf", "LlamaForCausalLM", "the actor's log-probabilities, entropy", ours, expected, leaves)


# -- SkyRL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [False, True])
def test_skyrl(dual):
    utils = load("skyrl.backends.skyrl_train.utils.ppo_utils")
    from fastloss.integrations import skyrl

    new, old, advantages, mask = policy_inputs()
    config = types.SimpleNamespace(
        policy_loss_type="dual_clip" if dual else "regular", dual_clip=dual, eps_clip_low=0.2, eps_clip_high=0.28, clip_ratio_c=2.0, off_policy_correction=None
    )  # fmt: skip
    expected, metrics = utils.ppo_policy_loss(new, old, advantages, config, mask)
    with skyrl.register():
        ours, our_metrics = utils.PolicyLossRegistry.get("fastloss")(new, old, advantages, config, mask)
    same("skyrl", "tokens", f"policy loss, {config.policy_loss_type}", ours, expected, (new,))
    assert our_metrics["clip_ratio"] == pytest.approx(metrics["clip_ratio"])
    assert "fastloss" not in utils.PolicyLossRegistry.list_available()


# -- Axolotl, LLaMA-Factory, ms-swift --------------------------------------------------------------------------------------


def test_axolotl():
    load("axolotl.integrations.base")
    sys.modules.pop("fastloss.integrations.axolotl", None)
    from fastloss.integrations.axolotl import FastlossArgs, FastlossPlugin

    plugin, model = FastlossPlugin(), tiny_model("LlamaForCausalLM")
    assert plugin.get_input_args() == "fastloss.integrations.axolotl.FastlossArgs" and FastlossArgs().fastloss
    expected = model(**batch()).loss
    plugin.post_model_load(types.SimpleNamespace(fastloss=False), model)
    assert type(model(**batch()).logits) is torch.Tensor
    plugin.post_model_load(types.SimpleNamespace(), model)
    out = model(**batch())
    assert out.logits.is_lazy
    same("axolotl", "LlamaForCausalLM", "plugin", out.loss, expected, tuple(model.parameters()))
    plugin.post_train_unload(None)
    assert type(model(**batch()).logits) is torch.Tensor


def test_llamafactory():
    interface = load("llamafactory.v1.plugins.model_plugins.kernels.interface")
    from fastloss.integrations import llamafactory

    model = tiny_model("LlamaForCausalLM")
    expected = model(**batch()).loss
    with llamafactory.register():
        assert interface.KernelPlugin("fastloss")(model=model, include_kernels=False) is model
        assert type(model(**batch()).logits) is torch.Tensor
        assert interface.KernelPlugin("fastloss")(model=model, include_kernels="auto") is model
    out = model(**batch())
    assert out.logits.is_lazy
    same("llamafactory", "LlamaForCausalLM", "kernel plugin", out.loss, expected, tuple(model.parameters()))
    with pytest.raises(ValueError, match="not registered"):
        interface.KernelPlugin("fastloss")(model=model)


@pytest.mark.parametrize("scaled", [False, True])
def test_ms_swift(scaled):
    losses = load("swift.loss")
    from fastloss.integrations import ms_swift

    model, inputs = tiny_model("LlamaForCausalLM"), batch()
    trainer = types.SimpleNamespace(model=model, template=types.SimpleNamespace(sequence_parallel_size=1))
    labels = inputs["labels"]
    labels[:, 0] = -100
    scale = torch.rand(labels.numel(), generator=generator()) if scaled else None

    # ms-swift's loss (swift.loss.causal_lm and swift.trainers.per_token_loss_func), which imports its whole trainer
    def stock(outputs):
        token = F.cross_entropy(
            outputs.logits.float().view(-1, VOCAB), labels.roll(-1, -1).view(-1), reduction="none"
        )
        return (token if scale is None else token * scale).sum() / 13

    expected = stock(model(inputs["input_ids"]))
    with ms_swift.register():
        loss = losses.loss_map["fastloss"](None, trainer)
        assert isinstance(loss, losses.BaseLoss)
        first = loss(model(inputs["input_ids"]), labels, num_items_in_batch=13, loss_scale=scale)
        outputs = model(inputs["input_ids"])
        ours = loss(outputs, labels, num_items_in_batch=13, loss_scale=scale)
    assert outputs.logits.is_lazy and "fastloss" not in losses.loss_map
    torch.testing.assert_close(first, ours)
    same(
        "ms_swift",
        "LlamaForCausalLM",
        "loss_map, against PyTorch" + ", loss_scale" * scaled,
        ours,
        expected,
        tuple(model.parameters()),
    )


# -- Megatron, DeepSpeed, nanochat -------------------------------------------------------------------------------------------


@pytest.mark.own_process
def test_megatron(tmp_path):
    import torch.distributed as dist

    module = load("megatron.core.fusions.fused_cross_entropy")
    from fastloss.integrations import megatron

    g = generator()
    logits = torch.randn(T, B, V, generator=g).requires_grad_()
    target = torch.randint(0, V, (T, B), generator=g)
    stock = module.fused_vocab_parallel_cross_entropy
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        theirs = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(T, B)
        with megatron.apply(), megatron.apply():
            ours = module.fused_vocab_parallel_cross_entropy(logits, target, group)
            assert module.fused_vocab_parallel_cross_entropy is not stock
    finally:
        dist.destroy_process_group()
    assert module.fused_vocab_parallel_cross_entropy is stock
    assert ours.shape == (T, B) and ours.dtype == torch.float32
    weights = torch.rand(T, B, generator=g)
    same(
        "megatron-core",
        "logits",
        "fused_vocab_parallel_cross_entropy, against PyTorch",
        (ours * weights).sum(),
        (theirs * weights).sum(),
        (logits,),
    )


class TiledLoss(torch.autograd.Function):
    """The interface of DeepSpeed's TiledFusedLogitsLoss: fn(head, tile of hidden, of target, of mask), summed."""

    @staticmethod
    def forward(ctx, fn, head, x, y, mask, shards, params, reduction):
        tile = lambda t: (None,) * shards if t is None else t.chunk(shards, 1)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            losses = [fn(head, *tiles) for tiles in zip(tile(x), tile(y), tile(mask), strict=True)]
            total = torch.stack(losses).sum()
        total.backward()
        ctx.save_for_backward(x.grad)
        return total.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, None, ctx.saved_tensors[0] * grad, None, None, None, None, None


@pytest.mark.parametrize("shards", [1, 4])
def test_deepspeed(shards):
    from fastloss.integrations.deepspeed import head_loss

    hidden, head, target = head_inputs()
    mask = torch.rand(B, T, generator=generator()) > 0.3
    masked = target.masked_fill(~mask, -100)
    expected = F.cross_entropy(head(hidden).flatten(0, 1), masked.flatten(), reduction="sum")
    theirs = torch.autograd.grad(expected, (hidden, head.weight), retain_graph=True)
    loss = TiledLoss.apply(head_loss, head, hidden, target, mask, shards, [head.weight], "sum")
    loss.backward()
    for a, b in zip((hidden.grad, head.weight.grad), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    same(
        "deepspeed",
        "linear head",
        "tiled loss, as one",
        head_loss(head, hidden, target, mask),
        expected,
        (hidden, head.weight),
        "copy in the test",
    )


class TinyGPT(torch.nn.Module):
    """How nanochat's GPT ends: padded head, float32, soft-cap 15, ignore_index -1, the loss's reduction as an argument."""

    def __init__(self):
        super().__init__()
        self.wte, self.lm_head = torch.nn.Embedding(V, D), torch.nn.Linear(D, 64, bias=False)

    def forward(self, idx, targets=None, loss_reduction="mean"):
        logits = self.lm_head(self.wte(idx))[..., :V].float()
        logits = 15 * torch.tanh(logits / 15)
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1, reduction=loss_reduction
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nanochat(reduction):
    from fastloss.integrations import nanochat

    model, (_, _, target) = TinyGPT().train(), head_inputs()
    ids, target = target.clamp(min=0), torch.where(target < 0, -1, target)
    expected = model(ids, target, reduction)
    with nanochat.apply(model):
        assert model(ids).is_lazy
        ours = model(ids, target, reduction)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, target, reduction)
    torch.testing.assert_close(compiled, expected)
    with torch.no_grad():
        assert type(model(ids)) is torch.Tensor
    same(
        "nanochat",
        "tiny GPT",
        f"cross-entropy, {reduction}",
        ours.sum(),
        expected.sum(),
        tuple(model.parameters()),
        "copy in the test",
    )


# -- prime-rl, NeMo-RL ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclasses.dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict


@pytest.mark.parametrize("weighted", [False, True])
def test_prime_rl(weighted):
    from fastloss.integrations.prime_rl import policy_loss

    new, old, advantages, mask = (t[0] for t in policy_inputs())
    new = new.detach().requires_grad_()
    weights = torch.rand(T, generator=generator()) if weighted else None
    inputs = LossInputs(new, old, None, advantages, mask.bool(), weights)
    with package("prime_rl.trainer.rl.loss", LossInputs=LossInputs, LossOutputs=LossOutputs):
        out = policy_loss(inputs, clip_low=0.2, clip_high=0.2)
    ratio = (new - old).exp()
    token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    expected = ((token if weights is None else token * weights) * mask).sum()
    assert isinstance(out, LossOutputs) and set(out.metrics) >= {"approx_kl"}
    same(
        "prime-rl",
        "tokens",
        "custom loss" + ", weights" * weighted,
        out.loss,
        expected,
        (new,),
        "copy in the test",
    )


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_nemo_rl(aggregation):
    from fastloss.integrations import nemo_rl

    class LossType(enum.Enum):
        TOKEN_LEVEL, SEQUENCE_LEVEL = "token_level", "sequence_level"

    class LossInputType(enum.Enum):
        LOGPROB = "logprob"

    new, old, advantages, mask = policy_inputs()
    samples = torch.tensor([1.0, 0.0, 1.0])
    pad = lambda t: F.pad(t, (1, 0))
    data = {"prev_logprobs": pad(old), "advantages": pad(advantages), "token_mask": pad(mask), "sample_mask": samples,
            "reference_policy_logprobs": pad(old - 0.1)}  # fmt: skip
    with package("nemo_rl.algorithms.loss.interfaces", LossType=LossType, LossInputType=LossInputType):
        function = nemo_rl.PolicyLoss(clip_low=0.2, clip_high=0.28, aggregation=aggregation, beta=0.05)
        loss, metrics = function(data, torch.tensor(5.0), torch.tensor(29.0), next_token_logprobs=new)
    assert function.input_type is LossInputType.LOGPROB
    assert function.loss_type is (
        LossType.TOKEN_LEVEL if aggregation == "token-mean" else LossType.SEQUENCE_LEVEL
    )
    both = mask * samples[:, None]
    ratio = (new - old).exp()
    token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    log_ratio = (old - 0.1) - new
    token = token + 0.05 * (log_ratio.exp() - 1 - log_ratio)
    if aggregation == "token-mean":
        expected = (token * both).sum() / 29
    else:
        expected = ((token * both).sum(1) / both.sum(1).clamp(min=1)).sum() / 5
    assert metrics["num_valid_samples"] == 2 and isinstance(metrics["approx_kl"], float)
    same("nemo-rl", "tokens", f"policy loss, {aggregation}", loss, expected, (new,), "copy in the test")


# -- accelerate, Lightning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 1024.0])
def test_accelerate(scale):
    """GradScaler's gradient of the loss is not 1; accelerate puts a forward of its own on the model."""
    accelerate = pytest.importorskip("accelerate")
    from fastloss.integrations import transformers

    def train(lazy, before):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        model = tiny_model("LlamaForCausalLM")
        handle = transformers.apply(model) if lazy and before else Handle([])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        if lazy and not before:
            handle = transformers.apply(model)
        scaler, losses = torch.amp.GradScaler("cpu", init_scale=scale), []
        for n in range(4):
            with accelerator.accumulate(model):
                out = model(**batch(seed=n))
                assert not lazy or out.logits.is_lazy
                losses.append(out.loss.item())
                accelerator.backward(scaler.scale(out.loss) / scale)
                optimizer.step()
                optimizer.zero_grad()
        handle.undo()
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()])

    losses, parameters = train(False, False)
    for before in (True, False):
        ours, our_parameters = train(True, before)
        assert ours == pytest.approx(losses, rel=1e-2)
        difference = ((our_parameters - parameters).abs().max() / parameters.abs().max()).item()
        assert difference < 1e-2
    record(
        "accelerate",
        "LlamaForCausalLM",
        f"its own, bf16, scale {scale:.0f}",
        max(abs(a - b) / b for a, b in zip(ours, losses)),
        difference,
    )


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    from fastloss.integrations.lightning import FastlossCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses, self.lazy = tiny_model("LlamaForCausalLM"), [], []

        def training_step(self, inputs, _):
            out = self.model(**inputs)
            self.losses.append(out.loss.item())
            self.lazy.append(isinstance(out.logits, fastloss.LazyLogits) and out.logits.is_lazy)
            return out.loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(callbacks):
        module = Module()
        trainer = lightning.Trainer(
            max_steps=4, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accumulate_grad_batches=2, callbacks=callbacks, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader([batch(seed=n) for n in range(8)], batch_size=None))
        return module

    stock, ours = train([]), train([FastlossCallback()])
    assert all(ours.lazy) and not any(stock.lazy) and len(ours.losses) == len(stock.losses) == 8
    assert ours.losses == pytest.approx(stock.losses, rel=1e-5)
    assert type(ours.model).__module__.startswith("transformers") and "_fastloss_original" not in vars(
        type(ours.model)
    )
    a, b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (ours, stock))
    difference = ((a - b).abs().max() / b.abs().max()).item()
    record(
        "lightning",
        "LlamaForCausalLM",
        "its own",
        max(abs(x - y) / y for x, y in zip(ours.losses, stock.losses)),
        difference,
    )
    assert difference < 1e-5
