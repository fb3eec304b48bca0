"""The native linear head (csrc/cpu/head.h) and its GEMM, by address, against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from cpu_kernel_calls import CODES, cpu, effective, expect_ce, expect_stats, isa  # noqa: F401 - every test runs on every one

from fastloss.tables import CrossEntropyOptions

F32, BF16 = torch.float32, torch.bfloat16
# hidden, weight, multiplied in pairs
OPERANDS = {
    "float32": (F32, F32, False),
    "bfloat16": (BF16, BF16, False),
    "pairs": (BF16, BF16, True),
    "tiles": (BF16, BF16, "tiles"),
    "autocast": (BF16, F32, False),
}
STATS = ("logsumexp", "logprobs", "entropy", "log_sum_sq_probs", "mean_logits")


def operands(rows, dim, vocab, kinds, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator).to(kinds[0])
    weight = (2 * torch.randn(vocab, dim, generator=generator) / dim**0.5).to(kinds[1])
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=generator)


def call(
    hidden, weight, target, *, pairs=False, keep=None, bias=None, w=None, width=None, stored=None, threads=3,
    gradients=("d_hidden", "d_weight", "d_bias"), spread=True, split=None, memory=None, **options,
):  # fmt: skip
    """All outputs of one native call, by name."""
    rows = hidden.shape[0] if keep is None else len(keep)
    vocab, dim = weight.shape
    panel = cpu.head_panel()
    width = -(-(width or 1) // panel) * panel
    shapes = {
        "d_hidden": (hidden.shape[0] if spread else rows, dim),
        "d_weight": (vocab, dim),
        "d_bias": (vocab,),
    }
    out = {
        name: torch.full(shapes[name], 77.0, dtype=weight.dtype if name == "d_weight" else F32)
        for name in gradients
    }
    out |= {
        name: torch.full((rows,), 77.0)
        for name in ("loss", *STATS)
        if name != "logprobs" or target is not None
    }
    out["lse_parts"] = torch.full((rows, 2), 77.0)
    c = cpu.HeadCall()
    c.rows, c.vocab, c.dim, c.width = rows, vocab, dim, width
    c.ignore_index, c.scale, c.softcap = -100, options.get("scale", 1.0), options.get("softcap", 0.0)
    c.set_loss(CrossEntropyOptions(label_smoothing=options.get("eps", 0.0), z_loss=options.get("zeta", 0.0)))
    c.grad_scale, c.w_row_stride = (
        options.get("gs", 1.0),
        w.stride(0) if w is not None and w.dim() == 2 else 0,
    )
    c.hidden_dtype, c.hidden_stride = CODES[hidden.dtype], hidden.stride(0)
    c.weight_dtype, c.weight_stride = CODES[weight.dtype], weight.stride(0)
    c.stored = (
        0
        if "d_weight" not in gradients or "given" in options
        else min(rows, dim)
        if stored is None
        else stored
    )
    c.spread, c.pairs, c.tiles = spread, bool(pairs), pairs == "tiles"
    c.split = rows if split is None else split
    given = options.get("given", {})
    state = torch.full((rows, cpu.ROW_STATE_DOUBLES), 77.0, dtype=torch.float64)
    if options.get("argmax"):
        out["argmax"] = torch.full((rows,), -7)
    more_logits = None
    if memory is not None:  # of d weight, where logits are kept, and of more logits
        c.stats_only, c.d_weight = not gradients, memory[0].data_ptr()
        c.stored, more_logits = min(rows, dim) if stored is None else stored, memory[1]
        c.more = more_logits.shape[1]
        if "d_weight" in out:
            out["d_weight"] = memory[0]
    origins = torch.full((-(-vocab // cpu.HEAD_SEGMENT), c.stored + c.more), 77.0)
    if memory is not None:
        origins = memory[2]
    tensors = {
        "more_logits": more_logits, "origins": origins, "token_weight": options.get("token_weight"), "row_scale": options.get("row_scale"),
        "hidden": hidden, "weight": weight, "target": target, "keep": keep, "bias": bias, "w": w,
        "state": state, **given, **options.get("selected", {}), **out,
    }  # fmt: skip
    if "sum" in options:
        tensors["d_weight_sum"], c.adds_to_sum = options["sum"]
    if "skip" in options:
        out["mass"] = torch.full((-(-vocab // cpu.HEAD_SEGMENT), rows), 77.0)
        c.skip, c.width = options["skip"], cpu.HEAD_SEGMENT
        tensors |= {"mass": out["mass"], "order": options.get("order")}
    c.selected_count = options["selected"]["selected"].shape[1] if "selected" in options else 0
    for name, tensor in tensors.items():
        setattr(c, name, 0 if tensor is None else tensor.data_ptr())
    rest = torch.full((rows - c.split, dim), 77.0)
    c.d_hidden_rest = rest.data_ptr()
    scratch = torch.full(
        (c.workspace_bytes(threads) + 64,), 0xFF, dtype=torch.uint8
    )  # NaN, if it is ever used
    assert threads * c.scratch_bytes() >= c.workspace_bytes(threads)
    c.run(-(-scratch.data_ptr() // 64) * 64, threads)
    if len(rest):
        assert (out["d_hidden"][c.split :] == 77).all()
        out["d_hidden"][c.split :] = rest
    return out


def expected(hidden, weight, target, *, bias=None, w=None, eps=0.0, zeta=0.0, gs=1.0, scale=1.0, softcap=0.0):
    """The definition in float64, with the logits' gradient in the weight's dtype as PyTorch would have it."""
    z = hidden.double() @ weight.double().t()
    form = {"bias": bias, "scale": scale, "softcap": softcap}
    loss, dz = expect_ce(z, target, w=w, eps=eps, zeta=zeta, gs=gs, **form)
    dz = dz.to(weight.dtype).double()
    return {
        "loss": loss,
        **expect_stats(z, target, **form),
        "d_hidden": dz @ weight.double(),
        "d_weight": dz.t() @ hidden.double(),
        "d_bias": dz.sum(0),
    }


def compare(got, want, kinds):
    """Sums of K in float32; in bfloat16 a logit on the edge of two roundings may take the other one."""
    rounding = 2**-8 if kinds[1] == BF16 else 2e-6
    for name, value in got.items():
        if name == "lse_parts":
            name, value = "logsumexp", value.sum(-1)
        size = float(want[name].abs().max()) + 1e-6
        # Sums over the vocabulary or the rows: a rounding of one logit or of one gradient is a part of them.
        error = float((value.double() - want[name]).abs().max())
        assert error <= 2 * rounding * size, f"{name}: {error} of {size}"


OPTIONS = [
    {},
    {"bias": True, "scale": 0.7, "softcap": 4.0},
    {"eps": 0.2, "zeta": 1e-2, "gs": 0.3},
    {"w": "classes", "eps": 0.1, "bias": True},
    {"w": "probabilities"},
]


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "rows, dim, vocab, width",
    [(1, 2, 1, 1), (7, 10, 33, 16), (97, 34, 301, 64), (200, 130, 257, 128), (300, 8, 65, 200)],
)
def test_against_the_definition(rows, dim, vocab, width, options, kind):
    kinds = OPERANDS[kind]
    options = dict(options)
    hidden, weight, target = operands(rows, dim, vocab, kinds, seed=rows)
    generator = torch.Generator().manual_seed(5)
    if options.get("bias"):
        options["bias"] = torch.randn(vocab, generator=generator)
    if options.get("w") == "classes":
        options["w"] = torch.rand(vocab, generator=generator) + 0.5
    elif options.get("w"):
        options["w"], target = torch.rand(rows, vocab, generator=generator).softmax(-1), None
    want = expected(hidden, weight, target, **options)
    for stored in {min(rows, dim), 0, min(rows, dim) // 2}:
        got = call(hidden, weight, target, width=width, stored=stored, pairs=kinds[2], **options)
        compare(got, want, kinds)


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "scale": 0.7, "softcap": 4.0}, {"w": True, "zeta": 1e-2}]
)
@pytest.mark.parametrize("rows, dim, vocab, width", [(1, 2, 1, 1), (7, 10, 33, 16), (330, 34, 301, 64)])
def test_d_hidden_alone(rows, dim, vocab, width, options, kind):
    kinds = OPERANDS[kind]
    options = dict(options)
    hidden, weight, target = operands(rows, dim, vocab, kinds, seed=rows)
    generator = torch.Generator().manual_seed(5)
    if "bias" in options:  # rising: the largest logit comes again and again
        options["bias"] = torch.linspace(-9, 9, vocab) + torch.randn(vocab, generator=generator)
    if "w" in options:
        options["w"] = torch.rand(vocab, generator=generator) + 0.5
    want = expected(hidden, weight, target, gs=0.3, **options)
    alone = {"width": width, "pairs": kinds[2], "gradients": ("d_hidden",), "gs": 0.3, **options}
    got = call(hidden, weight, target, **alone)
    compare(got, want, kinds)
    for name, value in call(hidden, weight, target, threads=1, **alone).items():
        assert torch.equal(value, got[name]), name
    if rows > 9:
        keep = torch.arange(3, rows, 2)
        part = call(hidden, weight, target[keep].contiguous(), keep=keep, **alone)
        assert torch.equal(part["d_hidden"][keep], got["d_hidden"][keep])
        assert (part["d_hidden"][::2] == 77).all()


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("names", ["ab", "abc", "bcd", "abcd", "c"])
@pytest.mark.parametrize("form", [{}, {"bias": True, "scale": 0.7, "softcap": 4.0}])
@pytest.mark.parametrize("gradients", [("d_hidden", "d_weight", "d_bias"), ("d_hidden",), ("d_bias",)])
def test_a_backward_alone(names, form, gradients, kind):
    kinds = OPERANDS[kind]
    rows, dim, vocab = 130, 30, 201
    hidden, weight, target = operands(rows, dim, vocab, kinds)
    target[:20] = -100
    generator = torch.Generator().manual_seed(3)
    form = dict(form)
    if "bias" in form:
        form["bias"] = torch.randn(vocab, generator=generator)
    w = torch.rand(vocab, generator=generator) if "d" in names else None
    z = hidden.double() @ weight.double().t()
    u, slope = effective(z, **form)
    lse = u.logsumexp(-1)
    k = {name: torch.randn(rows, generator=generator) for name in names}
    log_p = u - lse[:, None]
    one = torch.nn.functional.one_hot(target.clamp(min=0), vocab)
    full = {name: k.get(name, torch.zeros(rows)).double()[:, None] for name in "abcd"}
    dz = full["a"] * one + (full["b"] + full["c"] * log_p) * log_p.exp()
    if w is not None:
        dz = dz + full["d"] * w.double()
    dz = (dz * slope).to(kinds[1]).double() * (target != -100)[:, None]
    want = {"d_hidden": dz @ weight.double(), "d_weight": dz.t() @ hidden.double(), "d_bias": dz.sum(0)}
    got = call(
        hidden, weight, target, w=w, width=64, gradients=gradients, pairs=kinds[2], given={"given_lse_parts": torch.stack([lse, torch.zeros_like(lse)], -1).float(), **k}, **form,
    )  # fmt: skip
    compare({name: got[name] for name in gradients}, want, kinds)


@pytest.mark.parametrize("kind", OPERANDS)
def test_rows_apart_rows_left_out_and_gradients_not_wanted(kind):
    kinds = OPERANDS[kind]
    hidden, weight, target = operands(230, 24, 150, kinds)
    wide_hidden = torch.full((230, 30), float("nan"), dtype=kinds[0])
    wide_weight = torch.full((150, 26), float("nan"), dtype=kinds[1])
    wide_hidden[:, :24], wide_weight[:, :24] = hidden, weight
    keep = torch.arange(230)[torch.arange(230) % 3 != 0]
    dropped = torch.arange(230) % 3 == 0
    wide_hidden[dropped] = float("nan")
    args = wide_hidden[:, :24], wide_weight[:, :24], target[keep].contiguous()
    want = expected(hidden[keep], weight, target[keep])
    got = call(*args, keep=keep, width=32, pairs=kinds[2])
    untouched = got["d_hidden"][dropped]
    assert (untouched == 77).all()
    dense = call(*args, keep=keep, width=32, pairs=kinds[2], spread=False)
    assert torch.equal(dense["d_hidden"], got["d_hidden"][keep])
    in_two = call(*args, keep=keep, width=32, pairs=kinds[2], spread=False, split=101)
    assert torch.equal(in_two["d_hidden"], dense["d_hidden"])
    got["d_hidden"] = dense["d_hidden"]
    compare(got, want, kinds)
    for gradients in ((), ("d_weight",), ("d_weight", "d_hidden")):
        part = call(*args, keep=keep, width=32, pairs=kinds[2], spread=False, gradients=gradients)
        for name, value in part.items():
            assert torch.equal(value, got[name]), name


def test_ignored_and_bad_targets_and_a_nan():
    hidden, weight, target = operands(40, 16, 90, OPERANDS["float32"])
    target[3], target[5] = -100, 90
    hidden[7] = float("nan")
    got = call(hidden, weight, target, width=16)
    assert got["loss"][3] == 0 and not got["d_hidden"][3].any()
    assert got["loss"][[5, 7]].isnan().all() and got["d_hidden"][[5, 7]].isnan().all()
    assert got["d_weight"].isnan().all()
    rest = torch.tensor([i for i in range(40) if i not in (3, 5, 7)])
    want = expected(hidden[rest], weight, target[rest])
    compare({name: got[name][rest] for name in ("loss", *STATS, "d_hidden")}, want, OPERANDS["float32"])


@pytest.mark.parametrize("kind", OPERANDS)
def test_same_bits_in_every_run(kind):
    kinds = OPERANDS[kind]
    hidden, weight, target = operands(300, 40, 700, kinds)
    first = call(hidden, weight, target, width=64, pairs=kinds[2], threads=4)
    for _ in range(5):
        again = call(hidden, weight, target, width=64, pairs=kinds[2], threads=4)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("form", [{}, {"bias": True, "scale": 0.7, "softcap": 4.0, "eps": 0.1}])
def test_a_row_has_the_same_bits_in_any_batch(kind, form):
    """Alone, in another order, at another place, with other blocks, threads and gradients."""
    kinds, form = OPERANDS[kind], dict(form)
    rows, vocab = 133, 4700  # more than two chapters
    hidden, weight, target = operands(rows, 36, vocab, kinds)
    if "bias" in form:
        form["bias"] = torch.randn(vocab, generator=torch.Generator().manual_seed(9))
    form |= {"pairs": kinds[2], "argmax": True}
    full = call(hidden, weight, target, threads=1, width=64, gradients=(), **form)

    def expect(got, rows_of_it, what):
        for name in ("loss", *STATS, "argmax"):
            assert torch.equal(got[name], full[name][rows_of_it]), f"{what}: {name}"

    everything = torch.arange(rows)
    for threads, width in ((2, 64), (3, 192), (5, 512)):
        expect(
            call(hidden, weight, target, threads=threads, width=width, **form), everything, (threads, width)
        )
    if "eps" not in form:
        expect(
            call(hidden, weight, target, threads=3, width=768, gradients=("d_hidden",), **form),
            everything,
            "d hidden alone",
        )
    for some in (
        torch.tensor([77]),
        torch.tensor([5, 132]),
        torch.randperm(rows)[:40],
        torch.arange(rows - 1, -1, -1),
    ):
        got = call(
            hidden[some].contiguous(), weight, target[some].contiguous(), gradients=(), threads=2, **form
        )
        expect(got, some, len(some))
        got = call(hidden, weight, target[some].contiguous(), keep=some, gradients=(), threads=2, **form)
        expect(got, some, f"{len(some)} kept")


@pytest.mark.parametrize("kind", OPERANDS)
def test_other_threads_and_blocks_give_the_same_gradients(kind):
    """A gradient's sums over rows do not depend on either, and one over the vocabulary on the threads alone."""
    kinds = OPERANDS[kind]
    hidden, weight, target = operands(300, 40, 900, kinds)
    one = call(hidden, weight, target, width=128, threads=1, pairs=kinds[2])
    for threads in (2, 4, 11):
        for name, value in call(hidden, weight, target, width=128, threads=threads, pairs=kinds[2]).items():
            assert torch.equal(value, one[name]), (threads, name)
    other = call(hidden, weight, target, width=320, threads=3, pairs=kinds[2])
    for name in ("d_weight", "d_bias"):
        assert torch.equal(other[name], one[name]), name


@pytest.mark.parametrize("kind", [kind for kind in OPERANDS if OPERANDS[kind][1] == BF16])
@pytest.mark.parametrize("rows", [7, 300])
def test_d_weight_goes_to_a_float32_sum(kind, rows):
    """Of parts of rows: the first writes it, the others add to it, and none is rounded."""
    kinds = OPERANDS[kind]
    hidden, weight, target = operands(rows, 40, 330, kinds)
    rounded = call(hidden, weight, target, width=128, pairs=kinds[2])
    total = torch.full((330, 40), float("nan"))
    got = call(hidden, weight, target, width=128, pairs=kinds[2], sum=(total, False))
    assert torch.equal(total.bfloat16(), rounded["d_weight"])
    assert not torch.equal(total, rounded["d_weight"].float())
    for name in ("d_hidden", "d_bias", "loss"):
        assert torch.equal(got[name], rounded[name]), name
    before = torch.randn(330, 40)
    more = before.clone()
    call(hidden, weight, target, width=128, pairs=kinds[2], sum=(more, True))
    assert torch.equal(more, before + total)


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("stored, more", [(30, 0), (30, 60), (7, 100), (0, 130), (0, 0)])
def test_gradients_from_logits_that_the_statistics_left(kind, stored, more):
    kinds = OPERANDS[kind]
    rows, dim, vocab = 130, 30, 201
    hidden, weight, target = operands(rows, dim, vocab, kinds)
    generator = torch.Generator().manual_seed(3)
    k = {name: torch.randn(rows, generator=generator) for name in "abc"}
    memory = (
        torch.full((vocab, dim), 55.0, dtype=kinds[1]),
        torch.full((vocab, more), 55.0, dtype=kinds[1]),
        torch.full((-(-vocab // cpu.HEAD_SEGMENT), stored + more), 55.0),
    )
    first = call(
        hidden, weight, target, pairs=kinds[2], gradients=(), memory=memory, stored=stored, width=192
    )
    plain = call(hidden, weight, target, pairs=kinds[2], gradients=())
    for name, value in first.items():
        assert torch.equal(value, plain[name]), name
    given = {"given": {"given_lse_parts": first["lse_parts"], **k}, "pairs": kinds[2], "width": 64}
    want = call(hidden, weight, target, **given)
    got = call(hidden, weight, target, memory=memory, stored=stored, **given)
    for name in ("d_hidden", "d_weight", "d_bias"):
        if kinds[1] == F32:
            assert torch.equal(got[name], want[name]), name
        else:  # a probability from a kept logit is off by 0.0008 at most
            error = (got[name].double() - want[name].double()).abs().max()
            assert error <= 2**-7 * want[name].abs().max(), name
    whole = call(hidden, weight, target, pairs=kinds[2], memory=memory, stored=stored)  # the same in one call
    compare(whole, expected(hidden, weight, target), kinds)


def selected_ids(rows, vocab, count):
    """Ascending, with a repeat where there is room for one, and padding; a row of padding alone, one of neighbours."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(vocab, (rows, count), generator=generator, dtype=torch.int64, device="cpu")
    ids[:, -1] = ids[:, 0]
    ids[:: max(2, rows // 9), -1] = vocab
    ids[rows // 2], ids[rows // 3] = vocab, torch.arange(count, dtype=torch.int64, device="cpu") % vocab
    return ids.sort(1).values.int()


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize(
    "form, rows, dim, vocab, count, more",
    [
        ({}, 9, 4, 5, 5, 0),
        ({}, 130, 30, 601, 7, 60),
        ({"bias": True, "scale": 0.7, "softcap": 4.0}, 9, 4, 5, 5, 0),
        ({"bias": True, "scale": 0.7, "softcap": 4.0}, 101, 16, 2100, 70, 0),
        ({"bias": True}, 130, 30, 601, 7, 60),
        ({"scale": 1.7}, 101, 16, 2100, 70, 0),
    ],
)
def test_selected_classes(kind, form, rows, dim, vocab, count, more):
    """Their logits out of the sums, or their log-probs beside them; a gradient of their own, from kept logits and from others."""
    kinds, form = OPERANDS[kind], dict(form)
    hidden, weight, target = operands(rows, dim, vocab, kinds)
    target[1] = -100
    named = selected_ids(rows, vocab, count)
    ids = named.long()
    generator = torch.Generator().manual_seed(3)
    if "bias" in form:
        form["bias"] = torch.randn(vocab, generator=generator)
    z, slope = effective(hidden.double() @ weight.double().t(), **form)
    there = (ids < vocab) & (target != -100)[:, None]
    theirs = z.gather(1, ids.clamp(max=vocab - 1)).masked_fill(~there, 77.0)
    mask = torch.zeros(rows, vocab + 1, dtype=torch.bool).scatter_(1, ids, True)[:, :vocab]
    others = z.masked_fill(mask, -torch.inf).logsumexp(1)
    lse = z.logsumexp(1)
    close = {"rtol": 2e-6, "atol": 2e-5}
    memory = (
        torch.full((vocab, dim), 55.0, dtype=kinds[1]),
        torch.full((vocab, more), 55.0, dtype=kinds[1]),
        torch.full((-(-vocab // cpu.HEAD_SEGMENT), min(rows, dim) + more), 55.0),
    )
    common = {"pairs": kinds[2], "width": 64, **form}

    found = torch.full((rows, count), 77.0)
    left = {"selected": {"selected": named, "selected_logits": found}}
    first = call(hidden, weight, target, gradients=(), memory=memory, **common, **left)
    torch.testing.assert_close(found.double(), theirs, **close)
    counts = target != -100
    nothing = counts & mask.all(1)
    assert nothing.any() == (vocab == 5)
    assert (first["lse_parts"][nothing, 1] == -torch.inf).all()
    rest = first["lse_parts"].double().sum(1)
    torch.testing.assert_close(rest[counts & ~nothing], others[counts & ~nothing], **close)

    logprobs = torch.full((rows, count), 77.0)
    beside = {
        "selected": {"selected": named, "selected_logits": found.clone(), "selected_logprobs": logprobs}
    }
    second = call(hidden, weight, target, gradients=(), threads=2, **common, **beside)
    plain = call(hidden, weight, target, gradients=(), **common)
    assert torch.equal(second["lse_parts"], plain["lse_parts"])
    torch.testing.assert_close(logprobs[there].double(), (theirs - lse[:, None])[there], **close)
    if count < vocab:  # the bits of the target's
        of_first = call(hidden, weight, ids[:, 0].contiguous(), gradients=(), **common)["logprobs"]
        some = there[:, 0]
        assert torch.equal(logprobs[some, 0], of_first[some])

    b, given = torch.randn(rows, generator=generator), torch.randn(rows, count, generator=generator)
    dz = b.double()[:, None] * (z - lse[:, None]).exp() * slope
    dz = torch.nn.functional.pad(dz, (0, 1))  # a column for the padding
    for entry in range(count - 1, -1, -1):  # the first of a class last
        dz.scatter_(1, ids[:, entry, None], given[:, entry, None].double())
    dz = dz[:, :vocab]
    dz = (dz * counts[:, None]).to(kinds[1]).double()
    want = {"d_hidden": dz @ weight.double(), "d_weight": dz.t() @ hidden.double(), "d_bias": dz.sum(0)}
    parts = torch.stack([lse, torch.zeros_like(lse)], 1).float()
    for kept in ({"memory": memory}, {}):
        got = call(
            hidden, weight, target, given={"given_lse_parts": parts, "b": b},
            selected={"selected": named, "selected_gradient": given}, **kept, **common,
        )  # fmt: skip
        compare({name: got[name] for name in want}, want, kinds)


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("gradients", [("d_hidden", "d_weight", "d_bias"), ("d_hidden",)])
def test_token_weights_and_row_scales(kind, softcap, gradients):
    """A row's scale is one over its temperature; its weight multiplies its loss and gradient."""
    kinds = OPERANDS[kind]
    rows, dim, vocab = 70, 18, 300
    hidden, weight, target = operands(rows, dim, vocab, kinds)
    generator = torch.Generator().manual_seed(8)
    factors = {name: torch.rand(rows, generator=generator) + 0.5 for name in ("token_weight", "row_scale")}
    factors["token_weight"][4] = 0
    options = {"pairs": kinds[2], "softcap": softcap, "scale": 0.8, "zeta": 1e-2}
    got = call(hidden, weight, target, gradients=gradients, **factors, **options)
    alone = []
    for i in range(rows):
        one = {"gs": float(factors["token_weight"][i]), "softcap": softcap, "zeta": 1e-2}
        scale = 0.8 * float(factors["row_scale"][i])
        alone.append(expected(hidden[i : i + 1], weight, target[i : i + 1], scale=scale, **one))
        alone[-1]["loss"] = alone[-1]["loss"] * one["gs"]
    want = {name: torch.cat([one[name] for one in alone]) for name in ("loss", *STATS, "d_hidden")}
    want |= {name: torch.stack([one[name] for one in alone]).sum(0) for name in ("d_weight", "d_bias")}
    compare(got, want, kinds)


@pytest.mark.parametrize("kind", OPERANDS)
def test_argmax(kind):
    kinds = OPERANDS[kind]
    hidden, weight, target = operands(61, 20, 2500, kinds)
    hidden, weight = (hidden * 4).round(), (weight * 4).round()  # exact logits, many of them equal
    weight[2300] = weight[17]
    got = call(hidden, weight, target, pairs=kinds[2], gradients=(), argmax=True)["argmax"]
    z = (hidden.double() @ weight.double().t()).to(kinds[1])
    assert torch.equal(got, z.double().argmax(-1))
    minus_inf = torch.full((2500,), -float("inf"))
    nothing = call(hidden, weight, None, bias=minus_inf, w=torch.ones(2500), gradients=(), argmax=True)
    assert (nothing["argmax"] == 0).all()


@pytest.mark.parametrize("kind", ["bfloat16", "pairs", "tiles"])
@pytest.mark.parametrize("offset", [0, 300])
def test_logits_are_not_rounded(kind, offset):
    """Nearer to float64 than logits in bfloat16, whose distance is 2 at 300; the gradient, too, where they are kept."""
    kinds = OPERANDS[kind]
    hidden, weight, target = operands(90, 96, 700, kinds)
    hidden[:, 0], weight[:, 0] = offset, 1
    z = hidden.double() @ weight.double().t()
    want = expect_stats(z, target)["logprobs"]
    dz = expect_ce(z, target)[1]
    for stored in (90, 0):
        got = call(hidden, weight, target, pairs=kinds[2], stored=stored)
        assert (got["logprobs"] - want).abs().max() < (1 + offset) * 4e-6
        error = (got["d_bias"] - dz.sum(0)).abs().max()  # of dz, whose sum over the rows this is
        assert error <= 2**-8 * dz.abs().sum(0).max(), stored


@pytest.mark.parametrize("kind", ["bfloat16", "pairs", "tiles"])
def test_kept_logits_are_relative_to_the_largest_with_its_bias(kind):
    """A bias that lifts a small logit over all others, and one of -inf, as of a vocabulary's padding."""
    kinds = OPERANDS[kind]
    hidden, weight, target = operands(40, 48, 500, kinds)
    hidden[:, 0], weight[:, 0] = 4, 0
    weight[7, 0] = -4
    bias = torch.zeros(500)
    bias[7], bias[490:] = 22, -float("inf")
    target %= 490
    dz = expect_ce(hidden.double() @ weight.double().t(), target, bias=bias)[1]
    got = call(hidden, weight, target, bias=bias, pairs=kinds[2], stored=40)
    want = {"d_bias": dz.sum(0), "d_hidden": dz @ weight.double()}
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= 2**-8 * value.abs().max(), name
    assert not got["d_bias"][490:].any()


def check_left_out(mass, p, target, skip):
    """That ``mass`` is by the rule for the probabilities ``p``; the factor of each of them."""
    segment, one_in = cpu.HEAD_SEGMENT, cpu.HEAD_ONE_IN
    rows, vocab = p.shape
    factor = mass.t().double()  # [rows, segments]
    assert ((factor == cpu.HEAD_LEFT_OUT) | (factor == 1) | (factor == one_in)).all()
    least, most = factor != 1, skip / (one_in - 1)
    share = torch.nn.functional.pad(p, (0, -vocab % segment)).view(rows, -1, segment).sum(-1)
    own = target[:, None] // segment
    assert not least.gather(1, own).any()
    total = (share * least).sum(1)
    assert (total <= most * (1 + 1e-5)).all()
    # Nothing more had room, and nothing else is less than one of these, but for those of one quarter of an octave.
    rest = share.masked_fill(least, 1.0).scatter(1, own, 1.0).min(1).values
    assert (total + rest > most * (1 - 1e-5)).all()
    assert (rest >= (share * least).max(1).values / 2**0.5).all()
    return factor.repeat_interleave(segment, 1)[:, :vocab]


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize(
    "rows, dim, vocab, skip", [(70, 34, 1000, 0.06), (250, 64, 1025, 0.3), (9, 10, 700, 1e-6)]
)
@pytest.mark.parametrize("ordered", [False, True])
def test_blocks_are_left_out(kind, rows, dim, vocab, skip, ordered):
    kinds = OPERANDS[kind]
    hidden, weight, target = operands(rows, dim, vocab, kinds, seed=rows)
    generator = torch.Generator().manual_seed(7)
    # As a model's: much of the probability on few classes, most of it on the same ones for all rows.
    bias = -3 * torch.log1p(torch.arange(vocab) / 20.0)
    order = torch.arange(vocab)
    if ordered:
        bias = bias[torch.randperm(vocab, generator=generator)]
        order = bias.argsort(descending=True)
    form = {"scale": 0.7, "softcap": 30.0, "zeta": 1e-2}
    z, want = weight[order], bias[order]
    place = order.argsort()[target]
    loss, dz = expect_ce(
        hidden.double() @ z.double().t(), place, bias=want, gs=0.3, **{**form, "w": None, "eps": 0.0}
    )
    stats = expect_stats(hidden.double() @ z.double().t(), place, bias=want, scale=0.7, softcap=30.0)
    logits = 0.7 * 30 * torch.tanh((hidden.double() @ z.double().t() + want) / 30)
    for stored, more in ((min(rows, dim), 0), (0, 0), (min(rows, dim), min(30, max(0, rows - dim)))):
        memory = None
        if more:
            memory = (
                torch.full((vocab, dim), 77.0, dtype=kinds[1]),
                torch.full((vocab, more), 77.0, dtype=kinds[1]),
            )
            memory = (*memory, torch.full((-(-vocab // cpu.HEAD_SEGMENT), stored + more), 77.0))
        results = [
            call(
                hidden, weight, place, bias=want, stored=stored, memory=memory, pairs=kinds[2], gs=0.3, skip=skip,
                order=order if ordered else None, threads=threads, **form,
            )
            for threads in (1, 3)
        ]  # fmt: skip
        for name in results[0]:
            assert torch.equal(results[0][name], results[1][name]), name
        got = results[0]
        factor = check_left_out(got.pop("mass"), logits.softmax(-1), place, skip)
        assert 0.05 < (factor == cpu.HEAD_LEFT_OUT).float().mean() < 1 or skip == 1e-6
        kept = (dz * factor).to(kinds[1]).double()
        d_weight = torch.empty(vocab, dim, dtype=torch.float64)
        d_weight[order] = kept.t() @ hidden.double()
        expected_grads = {"d_hidden": kept @ z.double(), "d_weight": d_weight, "d_bias": kept.sum(0)}
        compare(got, {"loss": loss, **stats, **expected_grads}, kinds)
        # The bound: a row errs by at most `skip` of its coefficient of the probabilities.
        error = (dz * (factor - 1)).abs().sum(1)
        lse = stats["logsumexp"]
        assert (error <= skip * 0.3 * 0.7 * (1 + 2e-2 * lse).abs() * (1 + 1e-6)).all()


def test_left_out_at_random():
    """What is expected of many rows with the same logits is their gradient: which blocks are left out differs."""
    rows, vocab = 4000, 700
    x = torch.linspace(0, -9, vocab)
    hidden, weight, target = (
        x.expand(rows, vocab).contiguous(),
        torch.eye(vocab),
        torch.zeros(rows, dtype=torch.int64),
    )
    got = call(hidden, weight, target, stored=0, skip=0.3, gradients=("d_hidden", "d_weight"))
    least = got["mass"][1:] != 1
    assert least.any() and (least == least[:, :1]).all()  # the same of all rows
    kept = (got["mass"][1:][least] == cpu.HEAD_ONE_IN).double()
    spread = (0.25 * 0.75 / len(kept)) ** 0.5
    assert abs(kept.mean() - 0.25) < 4 * spread
    p = x.double().softmax(-1)
    mean = got["d_hidden"].double().mean(0)[256:]  # without the target's block
    assert ((mean - p[256:]).abs() <= 4 * (3 / rows) ** 0.5 * p[256:]).all()


@pytest.mark.parametrize("kind", OPERANDS)
def test_blocks_left_out_of_ignored_and_bad_rows_and_of_a_nan(kind):
    kinds = OPERANDS[kind]
    hidden, weight, target = operands(40, 16, 600, kinds)
    weight[256:] *= 0.1
    hidden[:, 0], weight[:256, 0] = 8.0, 4.0
    target[3], target[5] = -100, 600
    hidden[7] = float("nan")
    got = call(hidden, weight, target, pairs=kinds[2], skip=0.5, gradients=("d_hidden", "d_weight"))
    assert not got["d_hidden"][3].any() and (got["mass"][:, 3] == cpu.HEAD_LEFT_OUT).all()
    for bad in (5, 7):
        assert got["d_hidden"][bad].isnan().all() and (got["mass"][:, bad] != cpu.HEAD_LEFT_OUT).all()
    others = [i for i in range(40) if i not in (3, 5, 7)]
    assert got["d_hidden"][others].isfinite().all() and (got["mass"][:, others] == cpu.HEAD_LEFT_OUT).any()


@pytest.mark.parametrize(
    "change, what",
    [
        ({"width": 0}, "width"), ({"width": 7}, "width"), ({"width": 1 << 20}, "width"), ({"stored": 9}, "stored"),
        ({"rows": 0}, "rows"), ({"hidden_dtype": 3}, "dtype"), ({"pairs": True}, "pairs"),
        ({"d_weight": 0}, "weight"), ({"d_weight": 0, "stored": 0}, "index targets"), ({"tiles": True}, "tiles"),
        ({"more": 1}, "more"), ({"more_logits": 64, "more": 1}, "more"), ({"stats_only": True, "given_lse_parts": 64}, "stats_only"),
        ({"weight_dtype": 1}, "origins"), ({"d_weight_sum": 64}, "d_weight_sum"), ({"order": 64}, "order"),
        ({"mass": 64, "width": 256}, "skip"), ({"mass": 64, "skip": 0.1}, "blocks"), ({"mass": 64, "skip": 0.1, "width": 256}, "targets"),
    ],
)  # fmt: skip
def test_bad_calls(change, what):
    c = cpu.HeadCall()
    c.rows, c.vocab, c.dim, c.width = 4, 100, 8, cpu.head_panel()
    c.d_weight, c.d_hidden, c.stored = 64, 64, 4
    assert c.scratch_bytes() > 0
    for name, value in change.items():
        setattr(c, name, value)
    with pytest.raises(ValueError, match=what):
        c.scratch_bytes()
    with pytest.raises(ValueError, match=what):
        c.run(64, 1)


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (7, 70, 9), (97, 130, 33), (200, 513, 64)])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("function", ["gemm_bf16", "gemm_bf16_in_tiles"])
def test_gemm_bf16(m, n, k, accumulate, function):
    generator = torch.Generator().manual_seed(m)
    a = torch.randn(k, m + 5, generator=generator).bfloat16()[:, :m]
    b = torch.randn(k, n + 3, generator=generator).bfloat16()[:, :n]  # views: their rows are further apart
    c = torch.randn(m, n, generator=generator)
    exact = a.double().t() @ b.double() + (c.double() if accumulate else 0)
    once = None
    for threads in (1, 3):
        out = c.clone()
        getattr(cpu, function)(
            a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), out.data_ptr(), n, m, n, k, accumulate, threads,
        )  # fmt: skip
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5 * k**0.5)
        assert once is None or torch.equal(out, once)
        once = out


@pytest.fixture(autouse=True)
def _pairs_can_be_multiplied(request, isa):  # noqa: F811
    """AVX-512 without AVX512_BF16 (Skylake) has no pairs."""
    name = request.node.name
    if not cpu.can_multiply_pairs() and ("pairs" in name or "gemm" in name):
        pytest.skip("AVX-512 without AVX512_BF16")
