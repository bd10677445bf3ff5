"""PTX instructions by kind; importing this package fills the tables."""

from tests.emulator.instructions import arithmetic, bits, compare, control, convert, loads, move, warp
from tests.emulator.instructions.registry import CONTROL, ORDINARY

__all__ = ["CONTROL", "ORDINARY", "arithmetic", "bits", "compare", "control", "convert", "loads", "move", "warp"]
