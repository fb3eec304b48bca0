"""TRL's trainers with fastloss's head against TRL as it is: per-token functions, and real runs."""

import copy

import pytest
import torch

trl = pytest.importorskip("trl", minversion="1.16")

import transformers  # noqa: E402
from trl.trainer import utils  # noqa: E402

from fastloss.integrations.handle import UnknownVersion  # noqa: E402
from fastloss.integrations.trl import FastlossLogProb, apply  # noqa: E402
from fastloss.lazy_logits import LazyLogits  # noqa: E402
from integrations.table import record  # noqa: E402

N, D, V = 24, 16, 61
NAMES = ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def operands(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in ((N, D), (V, D), (V,)))
    return [t.requires_grad_() for t in (hidden, weight, bias)], torch.randint(0, V, (N,), generator=g)


HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 5.0},
    "scaled softcap": {"softcap": 5.0, "scale": 0.25, "temperature": 1.3},
    "scale": {"scale": 1 / 8},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("name", HEADS)
def test_the_heads_five_outputs(name):
    how = {"temperature": 1.0, "softcap": None, "scale": 1.0, "bias": True, **HEADS[name]}
    results = []
    for head in (utils._ChunkedLogProbFunction, FastlossLogProb):
        (hidden, weight, bias), target = operands()
        outputs = head.apply(
            hidden,
            weight,
            bias if how["bias"] else None,
            target,
            how["temperature"],
            32,
            how["softcap"],
            how["scale"],
            NAMES[1:],
        )
        (outputs[0].sin().sum() + 0.3 * outputs[1].square().sum()).backward()
        results.append([*outputs, hidden.grad, weight.grad, bias.grad])
    for ours, theirs in zip(*results, strict=True):
        if theirs is None:
            assert ours is None
        elif theirs.dtype == torch.bool:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def test_outputs_that_nobody_asked_for_are_none():
    (hidden, weight, bias), target = operands()
    outputs = FastlossLogProb.apply(hidden, weight, bias, target, 1.0, 32, outputs=("is_top1",))
    assert [o is None for o in outputs] == [False, True, True, True, False]
    assert outputs[0].dtype == torch.float32 and not outputs[4].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_functions_of_logits(dtype, masked, temperature):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 8, V, generator=g).to(dtype)
    index = torch.randint(0, V, (3, 8), generator=g)
    mask = (torch.arange(8) % 3 > 0).expand(3, 8) if masked else None

    def run(dtype=dtype):
        z = logits.to(dtype, copy=True).requires_grad_()
        one = utils.selective_log_softmax(z, index, temperature, row_mask=mask)
        several = utils.selective_log_softmax(z, torch.stack([index, index.flip(0)], -1))
        entropy = utils.entropy_from_logits(z, chunk_size=5)
        pair = utils.selective_log_softmax_and_entropy(z, index, temperature=temperature, row_mask=mask)
        frozen = utils.selective_log_softmax_and_entropy(z, index, entropy_requires_grad=False)
        assert not frozen[1].requires_grad
        values = (one, several, entropy, *pair, *frozen)
        sum(v.float().sin().sum() for v in values).backward()
        return [*values, z.grad]

    stock = run()
    with apply():
        ours = run()
    for a, b, exact in zip(ours, stock, run(torch.float64), strict=True):
        ours_error, stock_error = (a - exact).abs().max(), (b - exact).abs().max()
        assert ours_error <= stock_error + (2e-5 if dtype == torch.float32 else 8e-3)


def test_lazy_logits():
    (hidden, weight, bias), target = operands()
    with apply():
        z = LazyLogits(hidden.view(2, N // 2, D), weight, bias)
        logprobs, entropy = utils.selective_log_softmax_and_entropy(z / 0.7, target.view(2, -1))
        assert z.is_lazy
    expected = FastlossLogProb.apply(hidden, weight, bias, target, 0.7, 32)
    torch.testing.assert_close(logprobs.flatten(), expected[0])
    torch.testing.assert_close(entropy.flatten(), expected[1])


def test_temperature_must_be_positive():
    with apply(), pytest.raises(ValueError, match="temperature"):
        utils.selective_log_softmax_and_entropy(
            torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), temperature=0
        )


def test_in_and_out():
    from trl.experimental.tpo import tpo_trainer

    names = (
        "_ChunkedLogProbFunction",
        "selective_log_softmax",
        "entropy_from_logits",
        "selective_log_softmax_and_entropy",
        "_use_triton",
    )
    before = [getattr(utils, n) for n in names]
    first = apply()
    second = apply()
    second.undo()
    assert utils._ChunkedLogProbFunction is FastlossLogProb
    assert trl.kernels.ChunkedLogProbFunction is FastlossLogProb
    assert (
        tpo_trainer.selective_log_softmax_and_entropy
        is utils.selective_log_softmax_and_entropy
        is not before[3]
    )
    assert utils._use_triton(torch.device("cpu"))
    first.undo()
    assert [getattr(utils, n) for n in names] == before
    assert tpo_trainer.selective_log_softmax_and_entropy is before[3]


def test_a_version_that_was_not_read_is_refused(monkeypatch):
    head = utils._ChunkedLogProbFunction
    monkeypatch.setattr(utils, "entropy_from_logits", lambda logits, rows=1: None)
    with pytest.raises(
        UnknownVersion, match=r"trl .*takes \(logits, rows\), expected \(logits, chunk_size\)"
    ):
        apply()
    assert utils._ChunkedLogProbFunction is head


# -- real trainers -----------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def model(tokenizer, cls="LlamaForCausalLM", **more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=False, **more,
    )  # fmt: skip
    made = getattr(transformers, cls)(config)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.1)
    return made


WORDS = [
    "the cat",
    "a dog runs",
    "two and two",
    "why not",
    "it rains",
    "so it goes",
    "no",
    "a longer answer than these",
]


def dataset(kind):
    from datasets import Dataset

    rows = []
    for n in range(16):
        prompt, good, bad = (WORDS[(n * k + k) % 8] for k in (1, 3, 5))
        rows.append(
            {
                "sft": {"prompt": prompt + "? ", "completion": good},
                "text": {"text": f"{prompt} {good} {bad}"},
                "pairs": {"prompt": prompt + "? ", "chosen": good + "!", "rejected": bad},
                "kto": {"prompt": prompt + "? ", "completion": good, "label": n % 2 == 0},
                "prompts": {"prompt": prompt + "? "},
                "chat": {
                    "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]
                },
            }[kind]
        )
    return Dataset.from_list(rows)


def trainer(kind, tokenizer, folder, **options):
    """The arguments and the trainer of one kind, three steps of it. ``lora``: of adapters, the model without them as the reference."""
    lora, adapters = options.pop("lora", False), {}
    if lora:
        from peft import LoraConfig

        adapters["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
        )
    common = {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [], "save_strategy": "no",
                  "learning_rate": 1e-2, "disable_tqdm": True, "use_cpu": True, "bf16": False, "seed": 3, **options}  # fmt: skip
    made = model(tokenizer)
    generation = {"max_completion_length": 8, "num_generations": 4, "temperature": 0.9}
    if kind == "SFT":
        args = trl.SFTConfig(**common, max_length=64)
        return trl.SFTTrainer(
            made, args=args, train_dataset=dataset("sft"), processing_class=tokenizer, **adapters
        )
    if kind == "DPO":
        args = trl.DPOConfig(**common, max_length=64)
        return trl.DPOTrainer(
            made,
            ref_model=None if lora else copy.deepcopy(made),
            args=args,
            train_dataset=dataset("pairs"),
            processing_class=tokenizer,
            **adapters,
        )
    if kind == "KTO":
        args = trl.KTOConfig(**common, max_length=64)
        return trl.KTOTrainer(
            made,
            ref_model=None if lora else copy.deepcopy(made),
            args=args,
            train_dataset=dataset("kto"),
            processing_class=tokenizer,
            **adapters,
        )
    if kind == "Reward":
        made = model(tokenizer, "LlamaForSequenceClassification", num_labels=1)
        args = trl.RewardConfig(**common, max_length=64)
        return trl.RewardTrainer(made, args=args, train_dataset=dataset("pairs"), processing_class=tokenizer)
    if kind == "Distillation":
        args = trl.DistillationConfig(**common, max_completion_length=8, temperature=0.9)
        teacher = model(tokenizer)
        with torch.no_grad():
            for p in teacher.parameters():
                p.mul_(1.5)
        return trl.DistillationTrainer(
            made, teacher, args=args, train_dataset=dataset("prompts"), processing_class=tokenizer
        )
    if kind in ("GRPO", "RLOO"):
        config, cls = (
            (trl.GRPOConfig, trl.GRPOTrainer) if kind == "GRPO" else (trl.RLOOConfig, trl.RLOOTrainer)
        )
        args = config(**generation, **common)
        made.save_pretrained(folder)  # the reference model is loaded from where the model came from
        if torch.distributed.is_initialized():  # the first process writes it
            torch.distributed.barrier()
        made = transformers.LlamaForCausalLM.from_pretrained(folder)
        reward = lambda completions, **_: [float(sum(map(ord, c)) % 7) for c in completions]
        return cls(
            made,
            reward_funcs=reward,
            args=args,
            train_dataset=dataset("prompts"),
            processing_class=tokenizer,
            **adapters,
        )
    raise KeyError(kind)


IGNORED = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "step_time",
    "flos",
    "mfu",
    "tokens_per_second",
    "time",
)


def logs(made):
    """What a trainer logged, without times."""
    return [{k: v for k, v in e.items() if not any(i in k for i in IGNORED)} for e in made.state.log_history]


def run(kind, tokenizer, folder, **options):
    transformers.set_seed(11)
    made = trainer(kind, tokenizer, folder, **options)
    made.train()
    return logs(made), {n: p.detach().clone() for n, p in made.model.named_parameters()}


RUNS = [
    ("SFT", {}),
    *(
        pytest.param(kind, options, marks=pytest.mark.slow)
        for kind, options in [
            ("SFT", {"completion_only_loss": False}),
            ("SFT", {"loss_type": "dft"}),
            ("SFT", {"gradient_accumulation_steps": 2}),
            ("DPO", {}),
            ("DPO", {"loss_type": "ipo"}),
            ("DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
            ("KTO", {}),
            ("Reward", {}),
            ("GRPO", {}),
            ("GRPO", {"beta": 0.04, "loss_type": "dr_grpo"}),
            ("GRPO", {"top_entropy_quantile": 0.5}),
            ("RLOO", {}),
            ("Distillation", {"beta": 0.5}),
        ]
    ),
]


@pytest.mark.parametrize("kind, options", RUNS)
def test_the_same_run(kind, options, tokenizer, tmp_path):
    log, parameters = run(kind, tokenizer, tmp_path, **options)
    calls = []
    inner = FastlossLogProb.apply
    with apply(), pytest.MonkeyPatch.context() as m:
        m.setattr(FastlossLogProb, "apply", staticmethod(lambda *a, **k: calls.append(1) or inner(*a, **k)))
        ours, ours_parameters = run(kind, tokenizer, tmp_path, **options)
    assert calls or kind in ("Reward", "Distillation"), "the trainer never came to fastloss"
    assert len(log) == len(ours) >= 3
    worst = 0.0
    for a, b in zip(log, ours, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=2e-3, abs=2e-4), key
        if "loss" in a:
            worst = max(worst, abs(a["loss"] - b["loss"]) / max(abs(a["loss"]), 1.0))
    largest = max(p.abs().max() for p in parameters.values())
    difference = max(((p - ours_parameters[n]).abs().max() / largest).item() for n, p in parameters.items())
    assert difference < 1e-2
    record(
        f"trl {kind}",
        "tiny Llama",
        ", ".join(f"{k}={v}" for k, v in options.items()) or "default",
        worst,
        difference,
    )
