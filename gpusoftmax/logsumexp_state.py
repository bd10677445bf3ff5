"""Log-sum-exp of rows that come in parts."""

from typing import Any, NamedTuple

from gpusoftmax import _arrays, _checks, _compilers, _rows
from gpusoftmax.kernels.operands import STATE_COLS, STATE_NUMBERS


class _Part(NamedTuple):
    """Neighbouring columns [first, stop) of all rows. Their states are table[:, at : at + n_chunks]."""

    first: int
    stop: int
    table: Any
    at: int

    @property
    def n_chunks(self) -> int:
        return _chunks_of(self.first, self.stop)


class LogSumExpState:
    """What log-sum-exp needs to know of rows whose columns come in parts, from a stream or from several devices.

    A state is made by `empty`, takes columns by `update` and those of other states by `merge`, both in place, and gives
    the log-sum-exp of the columns it has by `logsumexp`, as often as is asked. Parts may come in any order; the bits do
    not depend on how the columns were cut, in what order they came, or which states were merged. On the CPU they are
    those of `gpusoftmax.logsumexp` of the whole rows; on a GPU they are those of one `update` with all columns.

    Columns are kept by chunks of `CHUNK_COLS`: a part begins at a multiple of it, and only the last columns of a row
    may end elsewhere. What is kept are four numbers for each chunk of each row, 1/512 as many as there are logits.

    Attributes
    ----------
    CHUNK_COLS : int
        2048.
    n_rows : int
    temperature : float
    columns : tuple of (first, stop)
        The columns that the state has, in ascending order.
    table : array, shape (n_rows, n_chunks, 4)
        The numbers, to be sent elsewhere, see `from_table`; not to be written to. float32, or float64 where the state
        is computed in it. They are those of kernels/cpu/logsumexp_state.py: the maximum of a chunk, the sum of the
        other exponentials in two parts, relative to a reference that follows from the maximum, and how many logits that
        equal it the sum leaves out. States that a CPU and a GPU have measured may be merged, on either.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import LogSumExpState, logsumexp
    >>> logits = np.random.default_rng(0).standard_normal((3, 5000), dtype=np.float32)
    >>> state = LogSumExpState.empty(3, like=logits)
    >>> state.update(logits[:, 4096:], first_col=4096)
    >>> other = LogSumExpState.empty(3, like=logits)
    >>> other.update(logits[:, :4096])
    >>> state.merge(other)
    >>> state.columns
    ((0, 5000),)
    >>> bool((state.logsumexp() == logsumexp(logits)).all())
    True
    """

    CHUNK_COLS = STATE_COLS

    def __init__(self, n_rows: int, temperature: float, parts: list[_Part]):
        """Not for users: see `empty` and `from_table`. There is always a part, perhaps without columns."""
        self.n_rows = n_rows
        self.temperature = temperature
        self._parts = parts

    @classmethod
    @_compilers.left_alone
    def empty(cls, n_rows: int, *, like: Any, temperature: float = 1.0) -> "LogSumExpState":
        """A state of rows without columns, whose log-sum-exp is -inf.

        Parameters
        ----------
        n_rows : int
            How many rows.
        like : array
            Of the library and on the device of the columns to come, of NumPy, CuPy, torch or JAX. The state is computed
            in float64 if its dtype is float64, else in float32.
        temperature : float
            Divides the logits, as in `logsumexp`.

        Returns
        -------
        LogSumExpState

        Raises
        ------
        TypeError, ValueError
            No count, unsupported dtypes, or a bad temperature.
        """
        array = _arrays.logits(like, "like")
        dtype = _arrays.compute_dtype(array)
        temperature = _checks.temperature(temperature)
        _checks.temperature_fits(temperature, dtype)
        n_rows = _checks.row_count(n_rows)
        table = _arrays.result(_arrays.empty(array, (n_rows, 0, STATE_NUMBERS), dtype))
        return cls(n_rows, temperature, [_Part(0, 0, table, 0)])

    @classmethod
    @_compilers.left_alone
    def from_table(
        cls, table: Any, columns: tuple[tuple[int, int], ...], *, temperature: float = 1.0
    ) -> "LogSumExpState":
        """The state whose `table`, `columns` and `temperature` these are: what another process has sent.

        Parameters
        ----------
        table : array, shape (n_rows, n_chunks, 4)
            float32 or float64. It is not copied if it is C-contiguous, and must not change while the state is in use.
        columns : tuple of (first, stop)
            Which columns they are of, in ascending order.
        temperature : float
            That of the state.

        Returns
        -------
        LogSumExpState

        Raises
        ------
        TypeError, ValueError
            Arguments that no state has.

        Examples
        --------
        Where each of several processes has some columns of the same rows, with a communicator of mpi4py:

        >>> def logsumexp_of_all(comm, logits, first_col):
        ...     state = LogSumExpState.empty(len(logits), like=logits)
        ...     state.update(logits, first_col)
        ...     whole = LogSumExpState.empty(len(logits), like=logits)
        ...     for table, columns in comm.allgather((state.table, state.columns)):
        ...         whole.merge(LogSumExpState.from_table(table, columns))
        ...     return whole.logsumexp()
        """
        array = _arrays.wrap(table, "table")
        ranges = _checks.column_ranges(columns, STATE_COLS)
        n_chunks = sum(_chunks_of(*one) for one in ranges)
        _checks.state_table(array, n_chunks, STATE_NUMBERS)
        temperature = _checks.temperature(temperature)
        _checks.temperature_fits(temperature, array.dtype)
        table = _arrays.result(_rows.contiguous(array, array.dtype))
        parts, at = [], 0
        for first, stop in ranges or [(0, 0)]:
            parts.append(_Part(first, stop, table, at))
            at += parts[-1].n_chunks
        return cls(array.shape[0], temperature, parts)

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        joined: list[tuple[int, int]] = []
        for part in self._parts:
            if joined and joined[-1][1] == part.first:
                joined[-1] = joined[-1][0], part.stop
            elif part.stop > part.first:
                joined.append((part.first, part.stop))
        return tuple(joined)

    @_compilers.left_alone
    def update(self, columns: Any, first_col: int = 0) -> None:
        """Takes columns of the rows, which are read once.

        Parameters
        ----------
        columns : array, shape (n_rows, n_cols)
            The logits of the columns first_col, first_col + 1, ...; float16, bfloat16, float32 or, if the state is
            computed in it, float64; of the library and on the device of the state, with any strides. Not modified.
        first_col : int
            The first of them in the whole rows, a multiple of `CHUNK_COLS`.

        Raises
        ------
        TypeError
            Unsupported dtypes; arrays of another library or device; a torch tensor that requires grad.
        ValueError
            Another shape; a first column inside a chunk; columns that the state has already; columns behind a chunk
            that has not all of its own. The state is what it was before.
        """
        x, home = _arrays.logits(columns, "columns"), self._home()
        _checks.same_home(home, x, "the state", "columns")
        _checks.rows_of_state(x, self.n_rows, home.dtype)
        first = _checks.first_column(first_col, STATE_COLS)
        stop = first + x.shape[1]
        _checks.new_columns(self.columns, first, stop, STATE_COLS, "columns are")
        if stop == first:
            return
        table = _arrays.empty(home, (self.n_rows, _chunks_of(first, stop), STATE_NUMBERS), home.dtype)
        measure = _arrays.kernels(home.place, "logsumexp_state").measure
        for chunks, states in _by_size(x, table):
            _rows.for_rows(
                lambda *rows: measure(*rows, self.temperature, x.place),
                (2,),
                [chunks],
                [_rows.per_row(_rows.part(states, 0), (2,), 3)],
            )
        self._add([_Part(first, stop, _arrays.result(table), 0)])

    @_compilers.left_alone
    def merge(self, other: "LogSumExpState") -> None:
        """Takes the columns of another state of the same rows, which stays as it is.

        Parameters
        ----------
        other : LogSumExpState
            Of as many rows, computed in the same format on the same device, at the same temperature.

        Raises
        ------
        TypeError, ValueError
            Another kind of state; columns that this one has already, or behind a chunk that has not all of its own.
        """
        _checks.state(other, LogSumExpState)
        home, theirs = self._home(), other._home()
        _checks.same_home(home, theirs, "the state", "other")
        _checks.same_kind_of_state(
            (self.n_rows, home.dtype, self.temperature), (other.n_rows, theirs.dtype, other.temperature)
        )
        for first, stop in other.columns:
            _checks.new_columns(self.columns, first, stop, STATE_COLS, "other has")
        self._add(other._parts)

    @_compilers.left_alone
    def logsumexp(self) -> Any:
        """The log-sum-exp of the columns that the state has, in nats.

        Returns
        -------
        array, shape (n_rows,)
            float32, or float64 where the state is computed in it; of the state's library, on its device. -inf for a row
            without columns or with nothing but -inf, +inf for one that holds +inf, NaN for one with NaN.
        """
        states = _arrays.wrap(self.table, "table")
        lse = _arrays.empty(states, (self.n_rows,), states.dtype)
        fold = _arrays.kernels(states.place, "logsumexp_state").fold
        _rows.for_rows(
            lambda *rows: fold(*rows, self.temperature, states.place),
            (1,),
            [_flat(states)],
            [_rows.per_row(lse, (1,), 2)],
        )
        return _arrays.result(lse)

    @property
    @_compilers.left_alone
    def table(self) -> Any:
        if len(self._parts) > 1:
            home, parts = self._home(), self._parts
            joined = _arrays.empty(home, (self.n_rows, sum(part.n_chunks for part in parts), STATE_NUMBERS), home.dtype)
            at, moved = 0, []
            for part in parts:
                source = _chunks(_arrays.wrap(part.table, "table"), part.at, part.n_chunks)
                _rows.copy_into(_flat(source), _flat(_chunks(joined, at, part.n_chunks)))
                moved.append((part.first, part.stop, at))
                at += part.n_chunks
            table = _arrays.result(joined)
            self._parts = [_Part(first, stop, table, at) for first, stop, at in moved]
        return self._parts[0].table

    def _home(self) -> _arrays.Array:
        """An array of the state's dtype where it lives."""
        return _arrays.wrap(self._parts[0].table, "the state")

    def _add(self, parts: list[_Part]) -> None:
        with_columns = [part for part in (*self._parts, *parts) if part.stop > part.first]
        self._parts = sorted(with_columns, key=lambda part: part.first) or self._parts


def _chunks_of(first: int, stop: int) -> int:
    return -(-(stop - first) // STATE_COLS)


def _by_size(x: _arrays.Array, table: _arrays.Array) -> list[tuple[_arrays.Array, _arrays.Array]]:
    """(logits, states) of the whole chunks and of the last one, if it is shorter: each chunk is a row."""
    n_rows, n_cols = x.shape
    row, col = x.strides
    whole, rest = divmod(n_cols, STATE_COLS)
    found = []
    if whole:
        chunks = x._replace(shape=(n_rows, whole, STATE_COLS), strides=(row, STATE_COLS * col, col))
        found.append((chunks, _chunks(table, 0, whole)))
    if rest:
        pointer = x.pointer + whole * STATE_COLS * col * x.itemsize
        last = x._replace(pointer=pointer, shape=(n_rows, 1, rest), strides=(row, 0, col))
        found.append((last, _chunks(table, whole, 1)))
    return found


def _chunks(table: _arrays.Array, at: int, count: int) -> _arrays.Array:
    """table[:, at : at + count]"""
    n_rows, _, n_numbers = table.shape
    pointer = table.pointer + at * table.strides[1] * table.itemsize
    return table._replace(pointer=pointer, shape=(n_rows, count, n_numbers))


def _flat(states: _arrays.Array) -> _arrays.Array:
    """The numbers of each row in one line; those of a row are neighbours."""
    n_rows, n_chunks, n_numbers = states.shape
    return states._replace(shape=(n_rows, n_chunks * n_numbers), strides=(states.strides[0], 1))
