"""How a call is laid out on the CPU: along or across rows, on how many threads, with how much scratch memory."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpusoftmax.kernels.cpu import call, parallel
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS, REGISTERS
from gpusoftmax.kernels.cpu.job import MAX_PARTS, Job
from gpusoftmax.kernels.cpu.memory import (
    CACHE_LINE,
)
from gpusoftmax.kernels.cpu.program import Program, Start, assemble
from gpusoftmax.kernels.cpu.rows import Address, Strided
from gpusoftmax.kernels.cpu.states import FIELDS
from gpusoftmax.kernels.cpu.vector import (
    ACROSS_BYTES,
    REGISTER_BYTES,
    VECTOR_BYTES,
    Way,
)
from gpusoftmax.kernels.cpu.walk import ACROSS, ALONG, IN_BLOCKS
from gpusoftmax.kernels.operands import MASKS, STORAGE, Labels, Numbers, Operand, Rows, Transform

# Up to here, copying rows into columns costs less than what is lost on vectors that a row does not fill.
TINY_ROW = 32
# Where neighbouring rows cannot be read along, more of that is worth it.
SHORT_ROW = 64
# Up to here a row's own numbers are worth folding with those of others.
BLOCK_COLS = 512
# Of the rows of a block: they stay in the first-level cache.
BLOCK_BYTES = 8 << 10
# A few rows do not fill vectors across them either.
FEW_ROWS = 16
# A thread that joins costs about as much as this many logits.
LOGITS_PER_THREAD = 16384
LOGITS_PER_ITEM = 32768
# A part of a split row: long enough to hide the counters, short enough to share a row evenly.
CHUNKS_PER_PART = 8
# An output larger than the caches is written past them: it would only push out what is still to be read. It has to be
# larger where exponentials are kept until then beyond the first-level cache, and for sixteen bits (Zen 4, softmax: 1.2
# times as fast at 4096 x 1024, no faster at 1024 x 8192, nor in bfloat16 at 8192 x 1024; 1.3 times at 65536 x 512).
# Of rows across it is the copy that is written, whatever its format (Zen 5, axis 0: 0.72 to 0.88 of the time).
STREAM_BYTES = 16 << 20
LATE_STREAM_BYTES = 40 << 20
FIRST_LEVEL_BYTES = 16 << 10
_WIDEST = np.dtype(np.float64).itemsize
# Rows that share cache lines with their neighbours have to be long (Zen 4: twice as slow at 1000 columns, 1.2 times as
# fast at 50257).
LONG_ROW_BYTES = 64 << 10
# Of a thread. Columns whose copies would take more are gathered one by one.
WORKSPACE_BYTES = 64 << 20
# Of a thread, between calls. To have more of it anew at each takes time (Zen 5, a row of 2^28 float16 columns in
# reverse: log-sum-exp 180 ms with what was kept, 230 without, softmax 280 and 450).
KEPT_BYTES = 1 << 30
PAGE = 4096


class _Recorder(threading.local):
    note: Callable[[Start], None] | None = None


_recorder = _Recorder()


@contextlib.contextmanager
def recording(note: Callable[[Start], None]) -> Iterator[None]:
    """Tells `note` what this thread starts, before it does."""
    _recorder.note = note
    try:
        yield
    finally:
        _recorder.note = None


def run(
    kernel,
    rows: Rows,
    first: Operand,
    second: Operand | None,
    target: Operand | None,
    *numbers,
    keeps_exponentials: bool = False,
    only_along: bool = False,
    whole_rows: bool = False,
    in_blocks: bool = True,
    in_parts: bool = True,
    streams: bool = True,
    numbers_of_row: int = 0,
) -> None:
    """Runs an op's kernel over all rows, on the threads that Numba is set to use; see `walk.walk`.

    keeps_exponentials: they need a place, rows.Here.home, from when a row is measured until it is written.
    only_along: the kernel knows vectors along rows and no others. whole_rows: these alone, and a row is one thread's,
    who may go over it again: its exponentials are not kept where the result goes. in_blocks: whether the steps can
    take a block of rows. in_parts: whether the parts of a row may be different threads'. streams: whether the result
    may be written past the caches: not if much of it is written again. numbers_of_row: how many more numbers of a row
    are kept beside its states.
    """
    only_along = only_along or whole_rows
    laid_out = plan(
        kernel, rows, first, second, target, numbers, keeps_exponentials, only_along, whole_rows, in_blocks, in_parts,
        streams, numbers_of_row,
    )  # fmt: skip
    _start(laid_out)


def run_alone(kernel, *arguments) -> None:
    """Runs a kernel that walks over no rows, on this thread."""
    arguments = tuple(map(_for_kernel, arguments))
    _start(_laid_out(kernel, ALONG, _ON_THIS_THREAD, arguments, 0, 0))


_PLACES = "partials", "scratch", "stage", "target_copy", "first_copy", "second_copy"
"""Of a slot: the offsets of a Job."""
_ON_THIS_THREAD = Job(*(0,) * len(Job._fields))._replace(n_threads=1)


def _start(laid_out: Start) -> None:
    if _recorder.note is not None:
        _recorder.note(laid_out)
    n_arrays = len(laid_out.addresses)
    play(assemble([(laid_out, [(number, 0) for number in range(n_arrays)])], n_arrays), laid_out.addresses)


def play(program: Program, addresses: Sequence[int]) -> bool:
    """Runs a program on arrays at these addresses; whether it came to its end, see program.py."""
    # Held: a call that comes in between, by a signal's handler or a finaliser, may need more and replace it.
    _held, own = _workspace(program.own_bytes)
    return parallel.play(program, addresses, own)


def plan(
    kernel,
    rows: Rows,
    first: Operand,
    second: Operand | None,
    target: Operand | None,
    numbers: tuple,
    keeps_exponentials: bool,
    only_along: bool,
    whole_rows: bool,
    in_blocks: bool,
    in_parts: bool,
    streams: bool,
    numbers_of_row: int,
) -> Start:
    # Neighbours are rows that follow each other along the inner batch axis: they should be many.
    if rows.n_inner < min(FEW_ROWS, rows.n_rows // rows.n_inner):
        rows = rows._replace(n_inner=rows.n_rows // rows.n_inner)
        first, second, target, *numbers = map(_with_axes_swapped, (first, second, target, *numbers))
    # A row is transformed along, into a copy of it.
    transformed = first.transform is not None
    only_along = only_along or transformed
    like = next(number for number in numbers if isinstance(number, np.floating))
    lines = [line for line in (first, second, target) if line is not None]
    way = ALONG if only_along else _way(rows, lines, in_blocks)
    lanes = ACROSS_BYTES // like.itemsize
    n_chunks = max(1, -(-rows.n_cols // CHUNK_COLS))
    n_threads = threads_for(rows.n_rows * rows.n_cols)
    # A result may be written past the caches; exponentials along rows may need another place than the result's.
    streamed = streams and target is not None and _is_streamed(rows, way, target, like, keeps_exponentials)
    keeps = keeps_exponentials and way is not ACROSS
    keeps = keeps and (whole_rows or streamed or target.dtype != like.dtype.name)
    if way is IN_BLOCKS and rows.n_cols * like.itemsize % VECTOR_BYTES:
        # Whatever is loaded where part of a vector was stored waits for the store.
        keeps = keeps_exponentials
    height = 1 if way is ALONG else lanes
    if way is IN_BLOCKS:
        height = min(lanes, max(1, BLOCK_BYTES // (rows.n_cols * like.itemsize)))
    is_copied = transformed or (way is ALONG and any(line.col_stride != 1 for line in lines))

    # The memory of a slot, see Job: one record for every chunk, and one for the row.
    size = ((n_chunks + 1) * FIELDS + numbers_of_row) * (like.itemsize if way is ALONG else ACROSS_BYTES)
    places = dict.fromkeys(_PLACES, 0)

    def reserve(name, n_bytes):
        nonlocal size
        size = _padded(size)
        places[name] = size if n_bytes else 0
        size += n_bytes

    scratch_bytes = _padded(rows.n_cols * like.itemsize) if keeps else 0
    reserve("scratch", height * scratch_bytes)
    if way is ACROSS:
        side = REGISTER_BYTES // like.itemsize
        copy_bytes = -(-rows.n_cols // side) * side * ACROSS_BYTES
        reserve("partials", 3 * (VECTOR_BYTES // like.itemsize) * ACROSS_BYTES)
        reserve("first_copy", copy_bytes)
        reserve("second_copy", copy_bytes if second is not None else 0)
    elif way is IN_BLOCKS:
        reserve("partials", REGISTERS * lanes * REGISTER_BYTES)
        reserve("stage", FIELDS * ACROSS_BYTES)
    else:
        reserve("target_copy", _bytes_of_copy(target, rows.n_cols))
        reserve("first_copy", rows.n_cols * like.itemsize if transformed else _bytes_of_copy(first, rows.n_cols))
        reserve("second_copy", _bytes_of_copy(second, rows.n_cols))
    # Slots of different threads share no page, nor do they start at the same place in one.
    slot_bytes = -(-size // PAGE) * PAGE + PAGE + CACHE_LINE

    parts = 1
    n_units, neighbours = rows.n_rows, 1
    if way is not ALONG:
        neighbours = rows.n_inner if way is IN_BLOCKS or rows.n_inner >= lanes else rows.n_rows
        n_units = rows.n_rows // neighbours * -(-neighbours // height)
    per_item = max(1, LOGITS_PER_ITEM // (height * max(rows.n_cols, 1)))
    in_parts = in_parts and not whole_rows
    if way is ALONG and not is_copied and in_parts and rows.n_rows < 2 * n_threads:
        parts = min(MAX_PARTS, max(1, n_chunks // CHUNKS_PER_PART))
    n_threads = min(n_threads, n_units * parts if parts > 1 else -(-n_units // per_item))
    if n_threads <= 1:
        per_item, parts, n_threads = n_units, 1, 1
    n_split = rows.n_rows if parts > 1 else 0
    n_slots = n_split or n_threads
    job = Job(
        counters=0,
        workspace=0,
        n_threads=n_threads,
        rows_per_item=per_item,
        parts=parts,
        height=height,
        slot_bytes=slot_bytes,
        **places,
        scratch_cols=scratch_bytes // like.itemsize,
        streamed=int(streamed),
        has_second=int(second is not None),
        has_target=int(target is not None),
    )
    lines = (first, *(first._replace(transform=None) if line is None else line for line in (second, target)))
    arguments = (rows, *map(_for_kernel, (*lines, *numbers)))
    return _laid_out(kernel, way, job, arguments, n_split, n_slots * slot_bytes)


def _laid_out(kernel, way: Way, job: Job, arguments: tuple, n_split: int, workspace_bytes: int) -> Start:
    located = tuple(call.addresses(arguments))
    return Start(
        entry=call.entry(kernel, way, arguments),
        block=call.pack(job, arguments, n_split),
        positions=tuple(position for position, _ in located),
        addresses=tuple(address for _, address in located),
        n_threads=job.n_threads,
        workspace_bytes=workspace_bytes,
    )


def _with_axes_swapped(argument):
    """An argument for rows that are numbered along the other batch axis first: the longer one has more neighbours."""
    if isinstance(argument, Transform):
        return Transform(*map(_with_axes_swapped, argument))
    if not hasattr(argument, "inner_stride"):
        return argument
    if getattr(argument, "transform", None) is not None:
        argument = argument._replace(transform=_with_axes_swapped(argument.transform))
    return argument._replace(outer_stride=argument.inner_stride, inner_stride=argument.outer_stride)


def threads_for(n_logits: int) -> int:
    """How many threads take part in a call on so many logits, at most; 0 is as good as 1."""
    wanted = n_logits // LOGITS_PER_THREAD
    return min(parallel.thread_count(), wanted) if wanted > 1 else wanted


def may_be_streamed(n_logits: int) -> bool:
    """Whether a result of a call on so many logits can be large enough to be written past the caches."""
    return n_logits * _WIDEST >= STREAM_BYTES


def _way(rows: Rows, lines: list[Operand], in_blocks: bool) -> Way:
    if rows.n_rows < FEW_ROWS:
        return ALONG
    along = all(line.col_stride == 1 for line in lines)
    if in_blocks and TINY_ROW < rows.n_cols <= BLOCK_COLS and along and rows.n_inner >= FEW_ROWS:
        return IN_BLOCKS
    return ACROSS if _is_across(rows, lines) else ALONG


def _is_across(rows: Rows, lines: list[Operand]) -> bool:
    if rows.n_cols <= SHORT_ROW:
        return True
    if rows.n_cols > WORKSPACE_BYTES // (2 * ACROSS_BYTES):
        return False
    return rows.n_inner >= FEW_ROWS and any(line.col_stride != 1 and line.inner_stride == 1 for line in lines)


def _bytes_of_copy(array: Operand | None, n_cols: int) -> int:
    """What a copy of a row takes, along rows; 0 where it is walked in place."""
    if array is None or array.col_stride == 1:
        return 0
    return n_cols * np.dtype(STORAGE[array.dtype]).itemsize


def _padded(size: int) -> int:
    return -(-size // CACHE_LINE) * CACHE_LINE


def _is_streamed(rows: Rows, way: Way, target: Operand, like: np.floating, keeps_exponentials: bool) -> bool:
    """Whether a result is so large that it is written past the caches."""
    itemsize = np.dtype(STORAGE[target.dtype]).itemsize
    row_bytes = rows.n_cols * itemsize
    stays_near = rows.n_cols * like.itemsize <= FIRST_LEVEL_BYTES or not keeps_exponentials
    early = stays_near and target.dtype == like.dtype.name
    large = rows.n_rows * row_bytes >= (STREAM_BYTES if early or way is ACROSS else LATE_STREAM_BYTES)
    if way is ACROSS:
        block_bytes = ACROSS_BYTES // like.itemsize * itemsize  # of a column: half a line with short registers, perhaps
        strides = target.pointer, target.col_stride * itemsize, target.outer_stride * itemsize, block_bytes
        return large and target.inner_stride == 1 and not any(stride % CACHE_LINE for stride in strides)
    strides = target.pointer, target.inner_stride * itemsize, target.outer_stride * itemsize, row_bytes
    whole_lines = all(stride % CACHE_LINE == 0 for stride in strides)
    # Elements that lie astride, as torch has them in files that were mapped, never come to the start of a line.
    has_lines = target.col_stride == 1 and target.pointer % itemsize == 0
    return large and has_lines and (whole_lines or row_bytes >= LONG_ROW_BYTES)


class _Kept(threading.local):
    memory: tuple[np.ndarray, int] = np.empty(0, np.uint8), 0


_kept = _Kept()


def _workspace(size: int) -> tuple[np.ndarray, int]:
    """Memory that this thread keeps for its next call, if it is not too much, and the address of `size` bytes in it."""
    memory = _kept.memory
    if memory[0].size < size + CACHE_LINE:
        array = np.empty(size + CACHE_LINE, np.uint8)
        memory = array, _padded(array.ctypes.data)
        if size <= KEPT_BYTES:
            _kept.memory = memory
    return memory


def _for_kernel(argument):
    """An argument in the form that compiled code takes: no strings."""
    if isinstance(argument, Operand):
        *numbers, dtype, transform = argument
        if transform is not None:
            transform = Transform(*map(_in_transform, transform))
        return Strided(*numbers, (STORAGE | MASKS)[dtype](0), transform)
    return Address(argument.pointer) if isinstance(argument, Numbers) else argument


def _in_transform(field):
    """A field of a transform, likewise. Its numbers are doubles: they keep their value."""
    if isinstance(field, Operand):
        return _for_kernel(field)
    if isinstance(field, tuple) and not isinstance(field, Labels):
        return tuple(map(float, field))
    return float(field) if isinstance(field, np.floating) else field
