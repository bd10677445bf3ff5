"""An emulated GPU for the tests: compiled PTX run on NumPy arrays, every memory access checked.

gpu.py is what tests use. parser.py reads PTX, machine.py runs it (operands, accesses, races and barriers are parts of
it), instructions/ says what each instruction does, rounding.py and approximations.py what floating point gives.
"""

from tests.emulator.gpu import EmulatedArray, EmulatedGPU, emulated_gpu

__all__ = ["EmulatedArray", "EmulatedGPU", "emulated_gpu"]
