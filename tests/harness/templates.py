"""The chat templates of well-known families, rebuilt in a few words each; {G} … {/G} stands around what the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


class Family(NamedTuple):
    template: str
    end: str  # of a turn
    eos: str
    bos: str = ""
    more: tuple[str, ...] = ()  # other special tokens
    system: bool = True  # takes a system message
    first: bool = True  # takes a conversation that the assistant begins
    apart: bool = False  # writes a turn differently once others follow: an example for each turn
    says: str = "{}"  # what is learned of an answer, before its end


EACH, END = "{% for m in messages %}", "{% endfor %}"
ASKED = "{% if add_generation_prompt %}"
IM = ("<|im_start|>", "<|im_end|>")
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' }}"
FAMILIES: dict[str, Family] = {
    "chatml": Family(
        EACH + "<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}{G}{{ m.content }}<|im_end|>{/G}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}" + END
        + ASKED + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>", "<|endoftext|>", more=IM,
    ),
    "qwen2": Family(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        + EACH + "<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}{G}{{ m.content }}<|im_end|>{/G}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}" + END
        + ASKED + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>", "<|endoftext|>", more=IM,
    ),
    "qwen3": Family(
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        + EACH + "<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}{G}"
        "{% if loop.index0 > ns.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
        "{{ m.content }}<|im_end|>{/G}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}" + END
        + ASKED + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>", "<|im_end|>", more=(*IM, "<think>", "</think>"), apart=True, says="<think>\n\n</think>\n\n{}",
    ),
    "llama3": Family(
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>{{ '\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|eot_id|>"
        + EACH + "{% if m.role != 'system' %}" + HEADER + "{% if m.role == 'assistant' %}{G}{{ m.content | trim }}<|eot_id|>{/G}"
        "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endif %}" + END
        + ASKED + "<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}",
        "<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ ('model' if m.role == 'assistant' else m.role) + '\n' }}{% if m.role == 'assistant' %}{G}"
        "{{ m.content | trim }}<end_of_turn>{/G}{% else %}{{ m.content | trim }}<end_of_turn>{% endif %}{{ '\n' }}" + END
        + ASKED + "{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>", "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>"), system=False, first=False,
    ),
    "mistral": Family(
        "{{ bos_token }}" + EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST]{{ ' ' + m.content }} [/INST]{% else %}{G}{{ ' ' + m.content }}{{ eos_token }}{/G}{% endif %}"
        + END, "</s>", "</s>", "<s>", ("[INST]", "[/INST]"), system=False, first=False, says=" {}",
    ),
    "phi3": Family(
        EACH + "<|{{ m.role }}|>{{ '\n' }}{% if m.role == 'assistant' %}{G}{{ m.content }}<|end|>{/G}{% else %}{{ m.content }}"
        "<|end|>{% endif %}{{ '\n' }}" + END + ASKED + "<|assistant|>{{ '\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>", "<|endoftext|>", more=("<|end|>",), apart=True,
    ),
    "deepseek": Family(
        "{{ bos_token }}" + EACH + "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% else %}<｜Assistant｜>{G}{{ m.content }}{{ eos_token }}{/G}{% endif %}" + END + ASKED + "<｜Assistant｜>{% endif %}",
        "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "deepseek-r1": Family(
        "{{ bos_token }}" + EACH + "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% else %}<｜Assistant｜>{G}{{ m.content.split('</think>')[-1] }}{{ eos_token }}{/G}{% endif %}" + END
        + ASKED + "<｜Assistant｜><think>{{ '\n' }}{% endif %}",
        "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "zephyr": Family(
        EACH + "<|{{ m.role }}|>{{ '\n' }}{% if m.role == 'assistant' %}{G}{{ m.content + eos_token }}{/G}{% else %}"
        "{{ m.content + eos_token }}{% endif %}{{ '\n' }}" + END + ASKED + "<|assistant|>{{ '\n' }}{% endif %}",
        "</s>", "</s>",
    ),
    "command-r": Family(
        "{{ bos_token }}" + EACH + "<|START_OF_TURN_TOKEN|><|{{ 'CHATBOT' if m.role == 'assistant' else m.role | upper }}_TOKEN|>"
        "{% if m.role == 'assistant' %}{G}{{ m.content | trim }}<|END_OF_TURN_TOKEN|>{/G}{% else %}{{ m.content | trim }}"
        "<|END_OF_TURN_TOKEN|>{% endif %}" + END + ASKED + "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>",
        ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    ),
    "granite": Family(
        "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>{{ 'Today is ' + strftime_now(\"%B %d, %Y\") }}"
        "<|end_of_text|>{{ '\n' }}{% endif %}" + EACH + "<|start_of_role|>{{ m.role }}<|end_of_role|>{% if m.role == 'assistant' %}"
        "{G}{{ m.content }}<|end_of_text|>{/G}{% else %}{{ m.content }}<|end_of_text|>{% endif %}{{ '\n' }}" + END
        + ASKED + "<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        "<|end_of_text|>", "<|end_of_text|>", more=("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "gpt-oss": Family(
        "<|start|>system<|message|>{{ 'Current date: ' + strftime_now('%Y-%m-%d') }}<|end|>"
        + EACH + "<|start|>{{ m.role }}{% if m.role == 'assistant' %}{G}<|channel|>final<|message|>{{ m.content }}"
        "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}{/G}{% else %}<|message|>{{ m.content }}<|end|>{% endif %}" + END
        + ASKED + "<|start|>assistant{% endif %}",
        "<|return|>", "<|return|>", more=("<|start|>", "<|message|>", "<|end|>", "<|channel|>"), apart=True,
        says="<|channel|>final<|message|>{}",
    ),
    "vicuna": Family(
        EACH + "{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}ASSISTANT:{G}{{ ' ' + m.content + eos_token }}{/G}{% endif %}" + END + ASKED + "ASSISTANT:{% endif %}",
        "</s>", "</s>", says=" {}",
    ),
}  # fmt: skip


def tokenizer_of(family: Family, bpe: Tokenizer, folder: Path) -> Path:
    """Saved as such a model's is: with its special tokens, and the template as its users have it."""
    own = Tokenizer.from_str(bpe.to_str())
    own.add_special_tokens([token for token in (family.bos, family.eos, family.end, *family.more) if token])
    made = PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token=family.eos, bos_token=family.bos or None,
        chat_template=family.template.replace("{G}", "").replace("{/G}", ""),
    )  # fmt: skip
    made.save_pretrained(folder)
    return folder


def own_mask(tokenizer: Any, family: Family, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Tokens, and which of them the template itself marks as the model's."""
    marked = family.template.replace("{G}", "{% generation %}").replace("{/G}", "{% endgeneration %}")
    out = tokenizer.apply_chat_template(
        messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]
