"""Stand-ins for the models and data sets of the hub's organisation ``trl-internal-testing``, made on this machine.

A model has TRL's name, class, chat template and tiny sizes, random weights, and a tokenizer that is trained here on the data
sets' own text; it lies in a folder that is laid out as the hub's cache, so that ``from_pretrained`` finds it offline. The data sets
are made by the scripts of TRL's repository that made the originals.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ORGANISATION = "trl-internal-testing"
REVISION = "0" * 40
DATA = ("zen", "toolcall", "harmony")
VOCAB = 512
END, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = [PAD, "<|im_start|>", END, "<bos>"]
SMALL = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# The name in TRL's tests: architecture, chat template of the trl package, what its configuration has besides SMALL.
MODELS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", "qwen2_5", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2ForSequenceClassification", "qwen2_5", {"hidden_size": 16, "num_labels": 1}),
    "tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "qwen3", {"head_dim": 2}),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3ForSequenceClassification", "qwen3", {"hidden_size": 16, "head_dim": 4, "num_labels": 1}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", "qwen3", {"head_dim": 2, **EXPERTS}),
    "tiny-LlamaForCausalLM-3": ("LlamaForCausalLM", "llama3", {}),
    "tiny-LlamaForCausalLM-3.1": ("LlamaForCausalLM", "llama3_1", {}),
    "tiny-LlamaForCausalLM-3.2": ("LlamaForCausalLM", "llama3_2", {}),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", "llama3_2", {"hidden_size": 16, "num_labels": 1}),
    "tiny-MistralForCausalLM-0.1": ("MistralForCausalLM", None, {}),
    "tiny-MistralForCausalLM-0.2": ("MistralForCausalLM", None, {}),
    "tiny-GemmaForCausalLM": ("GemmaForCausalLM", "gemma", {"head_dim": 2}),
    "tiny-Gemma2ForCausalLM": ("Gemma2ForCausalLM", "gemma", {"head_dim": 2}),
    "tiny-CohereForCausalLM": ("CohereForCausalLM", "cohere", {"logit_scale": 0.125}),
    "tiny-Cohere2ForCausalLM": ("Cohere2ForCausalLM", "cohere2", {"logit_scale": 0.125}),
    "tiny-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", None, {}),
    "tiny-Phi3ForCausalLM": ("Phi3ForCausalLM", "phi3", {}),
    "tiny-Olmo3ForCausalLM": ("Olmo3ForCausalLM", None, {}),
}  # fmt: skip


def data_sets(checkout: Path) -> dict[str, dict[str, DatasetDict]]:
    """Every configuration of DATA, by the scripts that made them: what they would push to the hub is kept here."""
    made: dict[str, dict[str, DatasetDict]] = {name: {} for name in DATA}

    def keep(self: Dataset | DatasetDict, repo_id: str, config_name: str) -> None:
        parts = self if isinstance(self, DatasetDict) else DatasetDict(train=self)
        made[repo_id.partition("/")[2]][config_name] = parts

    pushes = Dataset.push_to_hub, DatasetDict.push_to_hub
    Dataset.push_to_hub = DatasetDict.push_to_hub = keep
    try:
        for name in DATA:
            path = checkout / "scripts" / f"generate_{name}_dataset.py"
            runpy.run_path(str(path))["main"](0.1, True, f"{ORGANISATION}/{name}")
    finally:
        Dataset.push_to_hub, DatasetDict.push_to_hub = pushes
    return made


def texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in texts(part)]


def tokenizer(data: dict[str, DatasetDict], template: str | None) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen's, trained on the data set; a model without a template has none."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(
        texts([list(split) for parts in data.values() for split in parts.values()]), trainer
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=END,
        pad_token=PAD,
        bos_token="<bos>",
        additional_special_tokens=SPECIAL[1:2],
    )
    if template:
        folder = Path(trl.__file__).parent / "chat_templates"
        made.chat_template = (folder / f"{template}.jinja").read_text(encoding="utf-8")
    return made


def model(architecture: str, options: dict[str, Any], words: Any) -> transformers.PreTrainedModel:
    cls = getattr(transformers, architecture)
    config = cls.config_class(
        vocab_size=len(words), eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id, **{**SMALL, **options},
    )  # fmt: skip
    torch.manual_seed(0)
    made: transformers.PreTrainedModel = cls(config).to(torch.bfloat16)
    return made


def build(checkout: Path, home: Path) -> None:
    """``home``/hub as the hub's cache, ``home``/data with the configurations of DATA."""
    datasets.disable_progress_bars()
    made = data_sets(checkout)
    for data, configurations in made.items():
        for name, parts in configurations.items():
            parts.save_to_disk(str(home / "data" / data / name))
    for name, (architecture, template, options) in MODELS.items():
        root = home / "hub" / f"models--{ORGANISATION}--{name}"
        snapshot = root / "snapshots" / REVISION
        words = tokenizer(made["zen"], template)
        words.save_pretrained(snapshot)
        model(architecture, options, words).save_pretrained(snapshot)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(REVISION)


def load_dataset(home: Path) -> Any:
    """In place of ``datasets.load_dataset``: DATA from ``home``, any other as before."""
    stock = datasets.load_dataset

    def load(
        path: str,
        name: str | None = None,
        *args: Any,
        split: str | None = None,
        streaming: bool = False,
        **how: Any,
    ) -> Any:
        folder = home / "data" / path.removeprefix(f"{ORGANISATION}/") / str(name)
        if not folder.exists():
            return stock(path, name, *args, split=split, streaming=streaming, **how)
        parts = datasets.load_from_disk(str(folder))
        if split is not None:
            which, _, rows = split.partition("[:")
            chosen = parts[which]
            chosen = chosen.select(range(int(rows[:-1]))) if rows else chosen
            return chosen.to_iterable_dataset() if streaming else chosen
        if streaming:
            return datasets.IterableDatasetDict(
                {key: part.to_iterable_dataset() for key, part in parts.items()}
            )
        return parts

    return load
