"""What can go wrong in a kernel or a launch. Messages name instruction, thread, block, address and nearest array."""


class EmulatorError(RuntimeError):
    """Base of everything that the emulator raises about a kernel or a launch."""


class ParseError(EmulatorError):
    """The PTX text cannot be read."""


class Unsupported(EmulatorError, NotImplementedError):
    """The PTX uses something that the emulator does not know."""


class InvalidLaunch(EmulatorError, ValueError):
    """A launch that the driver would refuse: sizes, parameters, cluster or shared memory."""


class WrongArchitecture(EmulatorError):
    """An image compiled for another architecture than that of the device."""


class ForeignStream(EmulatorError):
    """A launch on a stream on which its arrays do not live."""


class ForeignMemory(EmulatorError):
    """Memory of one device used by a kernel on another."""


class FreedMemory(EmulatorError):
    """An address inside an array that has been freed."""


class OutsideChanged(EmulatorError):
    """Bytes of a base array that lie outside every view given to the library have changed."""


class OutOfBounds(EmulatorError):
    """An address outside every array, outside the view of one, or outside shared, local or parameter memory."""


class Misaligned(EmulatorError):
    """An address that is no multiple of the size of the access."""


class UninitialisedRead(EmulatorError):
    """Memory read before anything was written to it."""


class ReadOnlyWrite(EmulatorError):
    """A write to a read-only array or constant."""


class NonCoherentRead(EmulatorError):
    """ld.global.nc of memory that the same kernel has written."""


class SharedRace(EmulatorError):
    """Two warps touch the same shared memory, one of them writing, with no barrier between."""


class ClusterError(EmulatorError):
    """Distributed shared memory used outside the life of its block, or a wrong rank."""


class BarrierError(EmulatorError):
    """A barrier used against its rules."""


class Deadlock(EmulatorError):
    """No thread can go on."""


class Timeout(EmulatorError):
    """More steps than the launch was given."""


class Trap(EmulatorError):
    """The kernel executed trap, or an assertion failed."""
