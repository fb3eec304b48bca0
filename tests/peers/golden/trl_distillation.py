"""distillation_loss, linear_distillation_loss and topk_distillation_loss: TRL's GKD, its chunked divergence, and its IW-OPD over the
likeliest K tokens, called on seeded logits and hidden states."""

from __future__ import annotations

import torch
from golden_format import DTYPES, TOLERANCE, Family, grid, leaf, peer, tensor
from torch import Tensor
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

BATCH, WIDTH, VOCAB = 2, 4, 13
STUDENT, TEACHER = grid(141, BATCH, WIDTH, VOCAB, scale=1.5), grid(142, BATCH, WIDTH, VOCAB, scale=1.5)
TARGET = torch.tensor([[3, -100, 0, 12], [5, 5, -100, 7]])
DIM, TEACHER_DIM = 6, 9


def divergence(beta: float) -> dict[str, object]:
    """TRL's beta 0 and 1 are the KLs; between them the interpolation of a JSD."""
    return {"divergence": "jsd", "interpolation": beta}


def gkd() -> None:
    inputs = {"logits": STUDENT, "teacher_logits": TEACHER, "target": TARGET}
    family = Family("trl_gkd", "distillation_loss", peer("trl", "GKDTrainer.generalized_jsd_loss"), inputs)
    for beta in (0.0, 0.3, 0.5, 1.0):
        for temperature in (1.0, 1.7):
            for dtype in DTYPES:
                logits = leaf(STUDENT, dtype)
                loss = GKDTrainer.generalized_jsd_loss(
                    logits, TEACHER.to(dtype), labels=TARGET, beta=beta, temperature=temperature
                )
                loss.backward()
                options = {**divergence(beta), "temperature": temperature, "teacher_temperature": temperature}
                family.add(
                    f"beta={beta} temperature={temperature}",
                    dtype,
                    options,
                    {"loss": loss},
                    {"logits": logits.grad},
                )
    family.write()


def chunked() -> None:
    """In float32 alone, as its statistics are; each token's divergence."""
    rows = BATCH * WIDTH
    hidden, weight = grid(143, rows, DIM), grid(144, VOCAB, DIM)
    teacher_hidden, teacher_weight = grid(145, rows, TEACHER_DIM, scale=0.7), grid(146, VOCAB, TEACHER_DIM)
    upstream = grid(147, rows)
    inputs = {
        "input": hidden,
        "linear_weight": weight,
        "teacher_input": teacher_hidden,
        "teacher_weight": teacher_weight,
    }
    where = peer("trl", "kernels/chunked_divergence.py ChunkedDivergenceFunction")
    family = Family("trl_chunked_divergence", "linear_distillation_loss", where, inputs)
    for beta in (0.0, 0.4, 1.0):
        for temperature in (1.0, 1.7):
            x, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
            loss, _ = ChunkedDivergenceFunction.apply(
                x, w, None, teacher_hidden.float(), teacher_weight.float(), None, beta, temperature
            )
            (loss * upstream.float()).sum().backward()
            options = {
                **divergence(beta), "temperature": temperature, "teacher_temperature": temperature, "reduction": "none",
            }  # fmt: skip
            family.add(f"beta={beta} temperature={temperature}", torch.float32, options, {"loss": loss},
                       {"input": x.grad, "linear_weight": w.grad}, upstream=tensor(upstream.float()),
                       tolerance={"rtol": 5e-5, "atol": 5e-6})  # fmt: skip
    family.write()


def support_of(student: Tensor, teacher: Tensor, beta: float, k: int) -> Tensor:
    """The ids that its ``top_k`` takes: the teacher's, the student's, or both, -1 where one stands there already."""
    if beta in (0.0, 1.0):
        return (teacher if beta == 0 else student).topk(k, -1).indices
    both = torch.cat([teacher.topk(k, -1).indices, student.topk(k, -1).indices], -1)
    earlier = (both[..., :, None] == both[..., None, :]).tril(-1).any(-1)
    return both.masked_fill(earlier, -1)


def top_k() -> None:
    where = peer("trl", "IWOPDTrainer.generalized_jsd_loss")
    family = Family(
        "trl_topk_distillation", "topk_distillation_loss", where, {"logits": STUDENT, "target": TARGET}
    )
    for beta in (0.0, 0.3, 1.0):
        for add_tail in (True, False):
            for temperature in (1.0, 1.7):
                for dtype in DTYPES:
                    logits, teacher = leaf(STUDENT, dtype), TEACHER.to(dtype)
                    loss = IWOPDTrainer.generalized_jsd_loss(
                        logits,
                        teacher,
                        labels=TARGET,
                        beta=beta,
                        temperature=temperature,
                        top_k=4,
                        add_tail=add_tail,
                    )
                    loss.backward()
                    ids = support_of(STUDENT, TEACHER, beta, 4)
                    given = (TEACHER / temperature).log_softmax(-1).gather(-1, ids.clamp(min=0))
                    options = {
                        **divergence(beta), "temperature": temperature, "tail": "bin" if add_tail else "renormalize",
                    }  # fmt: skip
                    family.add(f"beta={beta} tail={add_tail} temperature={temperature}", dtype, options, {"loss": loss},
                               {"logits": logits.grad}, inputs={"teacher_ids": ids, "teacher_logprobs": given},
                               tolerance={**TOLERANCE[dtype], "atol": 5e-6} if dtype == torch.float32 else None)  # fmt: skip
    family.write()


def main() -> None:
    gkd()
    chunked()
    top_k()


if __name__ == "__main__":
    main()
