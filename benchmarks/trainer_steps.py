"""Steps of the transformers Trainer and of TRL's trainers, stock and with fastloss in turn, in one run of each trainer.

    python benchmarks/trainer_steps.py [transformers] [sft] [dpo] [kto] [grpo] [rloo] --tokens 1024 --steps 8

A model of about 50M parameters with a vocabulary of 128256. Time is a step's, optimizer included; memory is the highest
resident size inside the step above the one that it began with. Even steps are stock, odd ones fastloss's; the first of each
is left out. GRPO's and RLOO's completions are random tokens, handed out in no time: a step is their scoring, loss and backward.
Prints one line of JSON per trainer; ``--out`` adds them to a file, of which tests/integrations/table.py makes a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time

import torch
import transformers

import fastloss
from fastloss.integrations import transformers as lazy

VOCAB = 128256


def status(name: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))


class InTurn(transformers.TrainerCallback):
    """fastloss in every second step; the time and the peak of each."""

    out = ""  # a file that gets the lines, too

    def __init__(self, apply) -> None:
        self.apply, self.handle, self.seen = apply, None, {"stock": [], "fastloss": []}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step % 2:
            self.handle = self.apply()
        gc.collect()
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        self.memory, self.start = status("VmRSS"), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        took, peak = time.perf_counter() - self.start, status("VmHWM") - self.memory
        self.seen["fastloss" if self.handle else "stock"].append((took, peak))
        if self.handle:
            self.handle.undo()
            self.handle = None

    def report(self, name: str, **more: object) -> None:
        row: dict[str, object] = {"trainer": name, **more}
        for side, steps in self.seen.items():
            row[f"{side} s"] = round(statistics.median(t for t, _ in steps[1:]), 3)
            row[f"{side} MiB"] = round(statistics.median(m for _, m in steps[1:]))
        row["time ratio"] = round(row["fastloss s"] / row["stock s"], 3)  # type: ignore[operator]
        row["memory ratio"] = round(row["fastloss MiB"] / row["stock MiB"], 3)  # type: ignore[operator]
        with open("/proc/cpuinfo", encoding="ascii") as file:
            row["cpu"] = next(
                (line.split(":")[1].strip() for line in file if line.startswith("model name")), ""
            )
        row.update(
            threads=torch.get_num_threads(), torch=torch.__version__, load=round(os.getloadavg()[0], 1)
        )
        print(json.dumps(row), flush=True)
        if self.out:
            with open(self.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def model(tie: bool = True):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=320, intermediate_size=960, num_hidden_layers=6, num_attention_heads=5, num_key_value_heads=5,
        max_position_embeddings=4096, tie_word_embeddings=tie, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def arguments(cls, folder: str, steps: int, rows: int, **more: object):
    return cls(output_dir=folder, max_steps=steps, per_device_train_batch_size=rows, logging_steps=1000, report_to=[], save_strategy="no",
               disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False, **more)  # fmt: skip


def tokens(rows: int, length: int):
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCAB, (rows, length), generator=g, dtype=torch.int64, device="cpu").tolist()


def run_transformers(folder: str, steps: int, length: int, rows: int) -> None:
    trained = model()
    turns = InTurn(lambda: lazy.apply(trained))
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(steps * rows, length)]
    args = arguments(transformers.TrainingArguments, folder, steps, rows)
    transformers.Trainer(trained, args, train_dataset=data, callbacks=[turns]).train()
    turns.report("transformers Trainer", version=transformers.__version__, tokens=rows * length)


def run_trl(kind: str, folder: str, steps: int, length: int, rows: int) -> None:
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    from fastloss.integrations import trl as integration

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{n}": n for n in range(3, VOCAB)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    trained, turns = model(), InTurn(integration.apply)
    if kind == "sft":
        data = Dataset.from_dict({"input_ids": tokens(steps * rows, length)})
        args = arguments(trl.SFTConfig, folder, steps, rows, max_length=length)
        trainer = trl.SFTTrainer(
            trained, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[turns]
        )
    elif kind == "kto":
        half = length // 2
        texts = [" ".join(f"w{n}" for n in ids) for ids in tokens(2 * steps * rows, half - 1)]
        labels = [n % 2 == 0 for n in range(steps * rows)]
        data = Dataset.from_dict({"prompt": texts[::2], "completion": texts[1::2], "label": labels})
        args = arguments(trl.KTOConfig, folder, steps, rows, max_length=length)
        trainer = trl.KTOTrainer(
            trained,
            ref_model=model(),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[turns],
        )
    elif kind in ("grpo", "rloo"):
        config, cls = (
            (trl.GRPOConfig, trl.GRPOTrainer) if kind == "grpo" else (trl.RLOOConfig, trl.RLOOTrainer)
        )
        half = length // 2
        texts = [" ".join(f"w{n}" for n in ids) for ids in tokens(steps, half)]
        args = arguments(
            config, folder, steps, rows, num_generations=rows, max_completion_length=half, beta=0.0
        )
        drawn = iter(tokens(2 * steps * rows, half))

        class Drawn(cls):
            def _generate_single_turn(self, prompt_ids, *others, **options):
                ids = [next(drawn) for _ in prompt_ids]
                return (ids, None) if kind == "grpo" else ids

        trainer = Drawn(
            trained,
            reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[turns],
        )
    else:
        half = length // 2
        texts = [" ".join(f"w{n}" for n in ids) for ids in tokens(3 * steps * rows, half - 1)]
        data = Dataset.from_dict({"prompt": texts[::3], "chosen": texts[1::3], "rejected": texts[2::3]})
        args = arguments(trl.DPOConfig, folder, steps, rows, max_length=length)
        trainer = trl.DPOTrainer(
            trained,
            ref_model=model(),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[turns],
        )
    trainer.train()
    turns.report(f"trl {kind.upper()}", version=trl.__version__, tokens=rows * length)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trainers", nargs="*", default=["transformers", "sft", "dpo", "kto", "grpo", "rloo"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    InTurn.out = given.out
    torch.set_num_threads(given.threads)
    rows = max(1, given.tokens // given.length)
    for name in given.trainers:
        with tempfile.TemporaryDirectory() as folder:
            if name == "transformers":
                run_transformers(folder, given.steps, given.length, rows)
            else:
                run_trl(name, folder, given.steps, given.length, rows)
    print(
        json.dumps({"fastloss": fastloss.__version__, "torch": torch.__version__, "threads": given.threads})
    )


if __name__ == "__main__":
    main()
