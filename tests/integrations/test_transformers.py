"""transformers with lazy logits against transformers as it is: losses, gradients, trainers, wrappers."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch

import fastloss

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss  # noqa: E402

from fastloss.integrations.transformers import apply, lazy_class  # noqa: E402
from integrations.table import record  # noqa: E402
from integrations.tiny_models import VOCAB, batch, class_names, tiny_model  # noqa: E402

# plain; soft-cap; scale; divided; bias; MoE with auxiliary loss; tied; head behind a transform; unshifted labels of an
# own loss; scale per class; padded vocabulary; recurrent; multi-token heads
SELECTION = [
    "LlamaForCausalLM", "Gemma2ForCausalLM", "CohereForCausalLM", "GraniteForCausalLM", "PhiForCausalLM",
    "MixtralForCausalLM", "Qwen3MoeForCausalLM", "GPT2LMHeadModel", "BertLMHeadModel", "BartForCausalLM",
    "DoryForCausalLM", "MiniCPM3ForCausalLM", "MambaForCausalLM",
]  # fmt: skip
SELECTION = [name for name in SELECTION if name in class_names()]


def step(model, **inputs):
    model.zero_grad()
    torch.manual_seed(1)
    out = model(**{**batch(), **inputs})
    out.loss.backward()
    grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return out, out.loss.detach(), grads


def differences(a, b):
    (_, loss, grads), (_, other, others) = a, b
    assert grads.keys() == others.keys()
    largest = max(g.abs().max() for g in grads.values())
    return abs(loss - other).item() / max(abs(loss).item(), 1e-30), max(
        ((grads[n] - others[n]).abs().max() / largest).item() for n in grads
    )


def compare(name, model, **inputs):
    stock = step(model, **inputs)
    with apply(model):
        ours = step(model, **inputs)
    lazy = [v for v in ours[0].values() if isinstance(v, fastloss.LazyLogits)]
    assert lazy and all(z.is_lazy for z in lazy), "the logits were made"
    loss, grad = differences(stock, ours)
    record("transformers", name, "its own", loss, grad)
    assert loss < 2e-5 and grad < 2e-5, (loss, grad)
    return ours[0]


@pytest.mark.parametrize("name", SELECTION)
def test_loss_and_gradients(name):
    model = tiny_model(name)
    compare(name, model)
    assert type(model).__module__.startswith("transformers.") and not hasattr(
        type(model), "_fastloss_original"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in class_names() if n not in SELECTION])
def test_loss_and_gradients_of_every_class(name):
    try:
        model = tiny_model(name)
    except Exception as error:
        pytest.skip(f"a tiny one does not run stock: {error}")
    compare(name, model)


@pytest.mark.slow
def test_how_many_classes_run():
    runs = 0
    for name in class_names():
        try:
            tiny_model(name)
            runs += 1
        except Exception:
            continue
    assert runs >= 0.9 * len(class_names())


@pytest.fixture
def llama():
    return tiny_model("LlamaForCausalLM")


@pytest.mark.parametrize("items", [17, torch.tensor(17), torch.tensor([17]), None])
def test_number_of_items(llama, items):
    compare("LlamaForCausalLM", llama, num_items_in_batch=items)


def test_shift_labels(llama):
    inputs = batch()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    compare("LlamaForCausalLM", llama, shift_labels=shifted)


def test_attention_mask_and_no_masked_label(llama):
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 8:] = 0
    compare("LlamaForCausalLM", llama, attention_mask=mask, labels=inputs["input_ids"])


def test_loss_scaled_in_place(llama):
    def scaled(model):
        model.zero_grad()
        loss = model(**batch()).loss
        loss *= 4
        loss = loss / 8
        loss.backward()
        return None, loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    stock = scaled(llama)
    with apply(llama):
        assert max(differences(stock, scaled(llama))) < 2e-5


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_half_precision(name):
    model = tiny_model(name)
    exact = step(copy.deepcopy(model).double())
    model.bfloat16()
    stock = step(model)
    with apply(model):
        ours = step(model)
    assert ours[1].dtype == stock[1].dtype == torch.float32
    assert abs(ours[1] - exact[1]) < abs(stock[1] - exact[1]) + 5e-3
    for n, grad in ours[2].items():
        error = (grad.double() - exact[2][n]).norm()
        assert error <= 1.2 * (stock[2][n].double() - exact[2][n]).norm() + 1e-3 * exact[2][n].norm()


def test_autocast(llama):
    with torch.autocast("cpu", torch.bfloat16):
        stock = step(llama)
        with apply(llama):
            ours = step(llama)
    assert ours[1].dtype == stock[1].dtype == torch.float32
    assert max(differences(stock, ours)) < 2e-2


def test_gradient_checkpointing(llama):
    llama.gradient_checkpointing_enable()
    compare("LlamaForCausalLM", llama)


def test_auxiliary_loss_is_kept():
    model = tiny_model("MixtralForCausalLM")
    plain = compare("MixtralForCausalLM", model)
    with_aux = compare("MixtralForCausalLM", model, output_router_logits=True)
    assert with_aux.loss > plain.loss and with_aux.aux_loss > 0


def test_tied_head():
    model = tiny_model("GPT2LMHeadModel")
    assert model.lm_head.weight is model.transformer.wte.weight
    compare("GPT2LMHeadModel", model)
    with apply(model):
        assert model.lm_head.weight is model.transformer.wte.weight


def test_frozen_head(llama):
    llama.lm_head.weight.requires_grad_(False)
    compare("LlamaForCausalLM", llama)
    assert llama.lm_head.weight.grad is None


def test_logits_when_asked_for(llama):
    stock = step(llama)[0].logits
    with apply(llama):
        out, _, _ = step(llama)
        assert out.logits.is_lazy and out.logits.shape == stock.shape
        assert torch.equal(out.logits.dense(), stock)
        as_tuple = llama(**batch(), return_dict=False)
        assert torch.equal(as_tuple[1].softmax(-1), stock.softmax(-1))


def test_evaluation_and_generation(llama):
    llama.eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        stock = llama(**batch())
        tokens = llama.generate(ids[:1, :4], max_new_tokens=4, do_sample=False)
    with apply(llama), torch.no_grad():
        ours = llama(**batch())
        assert ours.logits.is_lazy and not ours.logits.requires_grad
        assert torch.equal(ours.logits.argmax(-1), stock.logits.argmax(-1)) and ours.logits.is_lazy
        torch.testing.assert_close(ours.loss, stock.loss)
        assert (ours.logits.numpy() == stock.logits.numpy()).all()
        assert type(llama(ids).logits) is torch.Tensor
        assert torch.equal(llama.generate(ids[:1, :4], max_new_tokens=4, do_sample=False), tokens)


def test_inference_mode(llama):
    expected = llama.eval()(**batch())
    with apply(llama), torch.inference_mode():
        out = llama(**batch())
        assert out.logits.is_lazy and torch.equal(out.logits.softmax(-1), expected.logits.softmax(-1))
    torch.testing.assert_close(out.loss, expected.loss)


def test_undo_twice_and_nested(llama):
    original = type(llama), type(llama.lm_head)
    first = apply(llama)
    assert isinstance(llama, original[0]) and type(llama) is not original[0]
    assert type(llama).__name__ == original[0].__name__ and llama._get_name() == "LlamaForCausalLM"
    with apply(llama):
        pass
    assert step(llama)[0].logits.is_lazy, "the inner block undid the outer one's work"
    first.undo()
    first.undo()
    assert (type(llama), type(llama.lm_head)) == original
    assert type(step(llama)[0].logits) is torch.Tensor


def test_loss_mapping_and_signature_are_untouched(llama):
    stock = inspect.signature(llama.forward)
    with apply(llama):
        assert LOSS_MAPPING["ForCausalLM"] is ForCausalLMLoss and llama.loss_function is ForCausalLMLoss
        assert inspect.signature(llama.forward) == stock


def test_copies_and_pickles_are_models_of_their_own(llama):
    stock = step(llama)
    with apply(llama):
        copied, pickled = copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))
    for other in (copied, pickled):
        ours = step(other)
        assert ours[0].logits.is_lazy
        assert max(differences(stock, ours)) < 2e-5
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert step(other)[1] != ours[1], "the copy's head is not the one that is used"


def test_save_and_load(llama, tmp_path):
    with apply(llama):
        llama.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert max(differences(step(llama), step(loaded.train()))) < 1e-6


def test_own_loss_function(llama):
    llama.loss_function = lambda logits, labels, vocab_size, **_: logits.float().square().mean()
    stock = step(llama)
    with apply(llama):
        assert max(differences(stock, step(llama))) < 1e-6


def test_forward_of_its_own(llama):
    """accelerate and other patches put a forward on the model itself."""
    inner, calls = llama.forward, []
    llama.forward = lambda *a, **k: calls.append(1) or inner(*a, **k)
    with apply(llama):
        assert step(llama)[0].logits.is_lazy and calls
    assert type(step(llama)[0].logits) is torch.Tensor


def test_data_parallel_replicas_use_their_own_head(llama):
    stock = step(llama)
    with apply(llama):
        replica = llama._replicate_for_data_parallel()
        replica._parameters = {}
        replica.lm_head = copy.deepcopy(llama.lm_head)
        with torch.no_grad():
            replica.lm_head.weight.zero_()
        out = replica(**batch())
    torch.testing.assert_close(out.loss.item(), torch.log(torch.tensor(float(VOCAB))).item())
    assert stock[1] != out.loss


def test_head_named_by_hand():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unembed = torch.nn.Embedding(VOCAB, 16), torch.nn.Linear(16, VOCAB)

        def forward(self, ids, labels=None):
            logits = self.unembed(self.body(ids))
            return torch.nn.functional.cross_entropy(logits.view(-1, VOCAB), labels.view(-1)), logits

    model, ids = Model(), batch()["input_ids"]
    expected = model(ids, labels=ids)[0]
    with pytest.raises(TypeError, match="vocabulary head"):
        apply(model)
    with apply(model, heads="unembed"):
        loss, logits = model(ids, labels=ids)
        assert logits.is_lazy
    torch.testing.assert_close(loss, expected)


def test_not_a_model():
    with pytest.raises(TypeError, match="model: expected"):
        apply("gpt2")


def test_a_class_before_its_models_are_built():
    patching = pytest.importorskip("transformers.monkey_patching")
    cls = lazy_class(transformers.LlamaForCausalLM)
    patching.register_patch_mapping({"LlamaForCausalLM": cls}, overwrite=True)
    try:
        with patching.apply_patches():
            model = transformers.AutoModelForCausalLM.from_config(
                tiny_model("LlamaForCausalLM").config
            ).train()
    finally:
        patching.unregister_patch_mapping(["LlamaForCausalLM"])
    ours = step(model)
    assert type(model) is cls and ours[0].logits.is_lazy
    stock = transformers.LlamaForCausalLM(model.config).train()
    stock.load_state_dict(model.state_dict())
    assert type(stock) is not cls
    assert max(differences(step(stock), ours)) < 2e-5


@pytest.mark.parametrize("target", ["body", "head", "head saved whole", "applied before"])
def test_adapters(llama, target):
    peft = pytest.importorskip("peft")
    handle = apply(llama) if target == "applied before" else None
    names = ["q_proj", "v_proj"] + (["lm_head"] if target in ("head", "applied before") else [])
    config = peft.LoraConfig(
        r=4, target_modules=names, modules_to_save=["lm_head"] if "saved" in target else None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama, config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if handle:
        ours = step(model)
        handle.undo()
        stock = step(model)
    else:
        stock = step(model)
        with apply(model):
            ours = step(model)
    assert type(stock[0].logits) is torch.Tensor
    assert ours[0].logits.is_lazy
    assert max(differences(stock, ours)) < 2e-5


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", pytest.param("Gemma2ForCausalLM", marks=pytest.mark.slow)]
)
def test_compiled_in_one_graph(name):
    model = tiny_model(name)
    stock = step(model)
    torch._dynamo.reset()
    with apply(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        ours = step(compiled)
    grads = {n.removeprefix("_orig_mod."): g for n, g in ours[2].items()}
    assert max(differences(stock, (None, ours[1], grads))) < 2e-5
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_with_an_adapter_on_the_head(llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    stock = step(model)
    torch._dynamo.reset()
    with apply(model):
        ours = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    grads = {n.removeprefix("_orig_mod."): g for n, g in ours[2].items()}
    assert max(differences(stock, (None, ours[1], grads))) < 2e-5
    torch._dynamo.reset()


@pytest.mark.own_process
def test_sharded_by_fsdp2(llama, tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    stock = step(llama)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for own_group in (False, True):
            model = tiny_model("LlamaForCausalLM")
            handle = apply(model)
            if own_group:
                fully_shard(model.lm_head, mesh=mesh)
            fully_shard(model, mesh=mesh)
            out = model(**batch())
            assert out.logits.is_lazy
            out.loss.backward()
            grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
            assert max(differences(stock, (None, out.loss.detach(), grads))) < 2e-5
            handle.undo()
            assert type(model(**batch()).logits) is torch.Tensor
    finally:
        dist.destroy_process_group()


@pytest.mark.own_process
def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
            model = tiny_model("LlamaForCausalLM")
            stock = step(model)
            wrapped = torch.nn.parallel.DistributedDataParallel(model, **options)
            with apply(wrapped):
                for _ in range(2):
                    model.zero_grad()
                    out = wrapped(**batch())
                    assert out.logits.is_lazy
                    out.loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters()}
            assert max(differences(stock, (None, out.loss.detach(), grads))) < 2e-5, options
    finally:
        dist.destroy_process_group()


def test_torch_func_gets_real_logits(llama):
    parameters = {n: p.detach() for n, p in llama.named_parameters()}
    loss = lambda p: torch.func.functional_call(llama, p, kwargs=batch()).loss
    stock = step(llama)
    with apply(llama):
        grads = torch.func.grad(loss)(parameters)
    assert max(differences(stock, (None, stock[1], grads))) < 2e-5


def train(tmp_path, lazy, model_name="LlamaForCausalLM", steps=4, **options):
    model = tiny_model(model_name)
    g = torch.Generator().manual_seed(5)
    data = [{"input_ids": ids, "labels": torch.where(torch.arange(12) < n, -100, ids)}
            for ids, n in zip(torch.randint(3, VOCAB, (32, 12), generator=g), torch.arange(32) % 9)]  # fmt: skip
    seen = {}

    def metrics(prediction):
        seen["logits"] = prediction.predictions
        return {"mean": float(prediction.predictions.mean())}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, per_device_eval_batch_size=4, logging_steps=1, report_to=[],
        save_strategy="no", learning_rate=1e-2, disable_tqdm=True, use_cpu=True, seed=3, **{"gradient_accumulation_steps": 2, **options},
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:8], compute_metrics=metrics
    )
    handle = apply(model) if lazy else None
    trainer.train()
    evaluated = trainer.evaluate()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if handle:
        handle.undo()
    return (
        curve,
        evaluated["eval_loss"],
        evaluated["eval_mean"],
        seen["logits"],
        {n: p.detach() for n, p in model.named_parameters()},
    )


TRAINED = [("LlamaForCausalLM", {}), *(pytest.param(n, o, marks=pytest.mark.slow) for n, o in [
    ("Gemma2ForCausalLM", {}),
    ("Qwen3MoeForCausalLM", {}),
    ("GPT2LMHeadModel", {"gradient_accumulation_steps": 1}),
    ("LlamaForCausalLM", {"bf16": True}),
    ("LlamaForCausalLM", {"label_smoothing_factor": 0.1}),
    ("LlamaForCausalLM", {"gradient_checkpointing": True}),
    ("LlamaForCausalLM", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ("LlamaForCausalLM", {"average_tokens_across_devices": False}),
])]  # fmt: skip


@pytest.mark.parametrize("name, options", TRAINED)
def test_the_trainers_curve(tmp_path, name, options):
    curve, loss, mean, logits, parameters = train(tmp_path, False, name, **options)
    ours = train(tmp_path, True, name, **options)
    tolerance = 2e-2 if options.get("bf16") else 2e-4
    assert len(curve) == 4 and ours[0] == pytest.approx(curve, rel=tolerance)
    assert ours[1:3] == pytest.approx((loss, mean), rel=tolerance, abs=tolerance)
    assert ours[3].shape == logits.shape
    largest = max(p.abs().max() for p in parameters.values())
    difference = max(((p - ours[4][n]).abs().max() / largest).item() for n, p in parameters.items())
    assert difference < 20 * tolerance
    how = "its own, Trainer" + "".join(f", {k}={v}" for k, v in options.items())
    record(
        "transformers", name, how, max(abs(a - b) for a, b in zip(curve, ours[0])) / max(curve), difference
    )
