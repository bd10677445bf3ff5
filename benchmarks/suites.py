"""The cases that are measured as a whole: what people run, and where implementations change their ways."""

from benchmarks.cases import Case

_FLOAT32_SOFTMAX = (
    (4096, 1024),
    (1024, 8192),
    (256, 32768),
    (16, 262144),
    (1, 262144),
    (100_000, 10),
    (65536, 64),
    (65536, 1024),  # 256 MB
    (8, 16),  # the cost of a call
)
SOME = ((4096, 1024), (256, 32768), (16, 262144), (1, 262144), (100_000, 10), (65536, 64))
LONG = ((1024, 8192), (256, 32768), (16, 262144))
SCORED = ((1024, 32768), (64, 151936))
_TOKENS = (
    "token_logprobs",
    "token_logprobs_and_rank",
    "top_logprobs",
    "argmax",
    "soft_argmax",
    "sample",
    "sample_top_p",
)

_MORE = ("masked_softmax", "logsumexp_state")
_SMALL = ("logsumexp", "cross_entropy", "cross_entropy_with_grad", "token_logprobs", "sample")
"""Of these, too, the cost of a call."""
_DISTILLATION = ("kl_div_with_grad", "soft_cross_entropy_with_grad")

VOCABULARIES = (1000, 4096, 8192, 32000, 50257, 128256, 151936, 262144, 1048576)
DECODE_VOCABULARIES = (32000, 128256, 151936, 262144)
DECODE_ROWS = (1, 4, 16, 64)
_GIB = 2**30


def cpu(quick: bool = False) -> list[Case]:
    """Issue by issue the shapes where CPU kernels differ: short, long, single and very many rows."""
    if quick:
        shapes = ((4096, 1024), (1, 262144), (100_000, 10), (8, 16))
        cases = [Case("softmax", *shape, "float32") for shape in shapes]
        return [
            *cases,
            Case("softmax", 4096, 1024, "bfloat16"),
            Case("logsumexp", 256, 32768, "float32"),
            Case("cross_entropy_with_grad", 8192, 1000, "float32"),
        ]
    return [
        *(Case("softmax", *shape, "float32") for shape in _FLOAT32_SOFTMAX),
        *(Case("softmax", *shape, "float64") for shape in (*SOME[:1], *LONG)),
        *(Case("softmax", *shape, dtype) for dtype in ("bfloat16", "float16") for shape in SOME),
        *(Case("log_softmax", *shape, "float32") for shape in SOME),
        *(Case("log_softmax", 4096, 1024, dtype) for dtype in ("float64", "bfloat16", "float16")),
        *(Case("logsumexp", *shape, "float32") for shape in (*SOME, (1024, 8192))),
        *(Case("logsumexp", 256, 32768, dtype) for dtype in ("float64", "bfloat16", "float16")),
        *(Case("cross_entropy", *shape, "float32") for shape in ((1024, 32768), (8192, 1000))),
        *(Case("cross_entropy_with_grad", *shape, "float32") for shape in ((1024, 32768), (4096, 8192), (8192, 1000))),
        Case("cross_entropy_with_grad", 1024, 32768, "bfloat16"),
        *(Case("softmax_backward", *shape, "float32") for shape in ((4096, 1024), *LONG)),
        *(Case("logsumexp", *shape, "float32") for shape in SCORED),
        *(Case(op, *shape, "float32") for op in _TOKENS for shape in SCORED),
        *(Case(op, 64, 151936, "bfloat16") for op in _TOKENS),
        *(Case(op, *shape, "float32") for op in _MORE for shape in SCORED),
        *(Case("topk_softmax", 16384, n_experts, "float32") for n_experts in (64, 256)),
        *(Case(op, *shape, "float32") for op in _DISTILLATION for shape in SCORED),
        *(Case(op, 8, 16, "float32") for op in _SMALL),
    ]


def gpu(quick: bool = False) -> list[Case]:
    """About a gigabyte of logits for every vocabulary, and the few rows of a decoding step. Most telling first."""
    ops = ("softmax", "cross_entropy_with_grad", "log_softmax", "cross_entropy")
    if quick:
        return [
            *(_gibibyte("softmax", n_cols, "bfloat16") for n_cols in (4096, 50257, 128256)),
            _gibibyte("softmax", 128256, "float32"),
            Case("softmax", 4, 128256, "bfloat16"),
            _gibibyte("cross_entropy_with_grad", 128256, "bfloat16"),
        ]
    return [
        *(_gibibyte("softmax", n_cols, dtype) for dtype in ("bfloat16", "float32") for n_cols in VOCABULARIES),
        *_decode("softmax", "bfloat16"),
        *_decode("softmax", "float32"),
        *(
            _gibibyte(op, n_cols, dtype)
            for op in ops[1:]
            for dtype in ("bfloat16", "float32")
            for n_cols in VOCABULARIES
        ),
        *_decode("log_softmax", "float32"),
        *(_gibibyte(op, n_cols, "bfloat16") for op in (*_TOKENS, *_MORE) for n_cols in (32000, 151936)),
        *(_gibibyte("topk_softmax", n_experts, "bfloat16") for n_experts in (64, 256)),
        *(_gibibyte(op, n_cols, "bfloat16") for op in _DISTILLATION for n_cols in (32000, 151936)),
        *(_gibibyte(op, n_cols, "float16") for op in ops for n_cols in VOCABULARIES),
    ]


def _gibibyte(op: str, n_cols: int, dtype: str) -> Case:
    """Rows by the sixteen, so that the blocks that a case repeats are not single rows."""
    n_rows = _GIB // (n_cols * Case(op, 1, 1, dtype).numpy_dtype.itemsize)
    return Case(op, n_rows - n_rows % 16, n_cols, dtype)


def _decode(op: str, dtype: str) -> list[Case]:
    return [Case(op, n_rows, n_cols, dtype) for n_rows in DECODE_ROWS for n_cols in DECODE_VOCABULARIES]
