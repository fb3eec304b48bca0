"""topk_distillation_loss with tail="none": verl's forward KL over the teacher's likeliest K tokens, each token's."""

from __future__ import annotations

import types

import torch
from golden_format import Family, grid, leaf, peer, tensor
from stand_ins import load

verl = load("verl", ("verl.trainer.distillation.fsdp.losses",), ("verl.workers", "verl.utils.ulysses"))
verl.get_ulysses_sequence_parallel_world_size = lambda: 1
ROWS, VOCAB, K = 6, 13, 4


def main() -> None:
    student, teacher, upstream = (
        grid(161, ROWS, VOCAB, scale=1.5),
        grid(162, ROWS, VOCAB, scale=1.5),
        grid(163, ROWS),
    )
    logprobs, ids = teacher.log_softmax(-1).topk(K, -1)
    logprobs = (logprobs * 256).round() / 256  # what an engine would have sent
    where = peer("verl", "trainer/distillation/fsdp/losses.py compute_forward_kl_topk", "0.9.1")
    inputs = {"logits": student, "teacher_ids": ids, "teacher_logprobs": logprobs}
    family = Family("verl_topk_distillation", "topk_distillation_loss", where, inputs)
    for in_chunks in (False, True):
        logits = leaf(student, torch.float32)
        settings = types.SimpleNamespace(
            use_chunked_topk=in_chunks, chunked_topk_chunk_size=4, log_prob_min_clamp=None
        )
        rows = [
            torch.nested.nested_tensor([x.float() if x.is_floating_point() else x], layout=torch.jagged)
            for x in (logprobs, ids)
        ]
        out = verl.compute_forward_kl_topk(
            logits[None], rows[0], rows[1], types.SimpleNamespace(distillation_loss=settings), "thd"
        )  # fmt: skip
        loss = out["distillation_losses"][0]
        (loss * upstream.float()).sum().backward()
        metrics = {"mass": out["student_mass"].mean(), "teacher_mass": out["teacher_mass"].mean()}
        family.add(f"chunks={in_chunks}", torch.float32, {"tail": "none", "reduction": "none"},
                   {"loss": loss, "metrics": metrics}, {"logits": logits.grad}, upstream=tensor(upstream.float()))  # fmt: skip
    family.write()


if __name__ == "__main__":
    main()
