"""PTX types as NumPy sees them, and the layout of the emulated address spaces."""

import re

import numpy as np

f16, f32, f64 = np.float16, np.float32, np.float64
u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64


class PtxType:
    """One PTX type.

    dtype is the NumPy dtype of a value (bfloat16 is held as its bits), bits the width of the register, lanes the
    number of packed values. kind: p predicate, u unsigned or plain bits, s signed, f IEEE float, g bfloat16.
    """

    def __init__(self, name, dtype, bits, kind, lanes=1):
        self.name, self.dtype, self.bits, self.kind, self.lanes = name, np.dtype(dtype), bits, kind, lanes
        self.unsigned = np.dtype(f"u{max(bits // 8 // lanes, 1)}")
        self.is_float = kind in "fg"


TYPES = {"pred": PtxType("pred", bool, 1, "p")}
for _bits in (8, 16, 32, 64):
    TYPES[f"u{_bits}"] = PtxType(f"u{_bits}", f"u{_bits // 8}", _bits, "u")
    TYPES[f"s{_bits}"] = PtxType(f"s{_bits}", f"i{_bits // 8}", _bits, "s")
    TYPES[f"b{_bits}"] = PtxType(f"b{_bits}", f"u{_bits // 8}", _bits, "u")
for _bits in (16, 32, 64):
    TYPES[f"f{_bits}"] = PtxType(f"f{_bits}", f"f{_bits // 8}", _bits, "f")
TYPES["bf16"] = PtxType("bf16", u16, 16, "g")
TYPES["u16x2"] = PtxType("u16x2", u16, 32, "u", 2)
TYPES["s16x2"] = PtxType("s16x2", i16, 32, "s", 2)
TYPES["f16x2"] = PtxType("f16x2", f16, 32, "f", 2)
TYPES["bf16x2"] = PtxType("bf16x2", u16, 32, "g", 2)
TYPES["f32x2"] = PtxType("f32x2", f32, 64, "f", 2)
U32, U64, PRED = TYPES["u32"], TYPES["u64"], TYPES["pred"]

SPECIAL_REGISTER = re.compile(
    r"%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyzw]$|"
    r"%(laneid|warpid|nwarpid|lanemask_(eq|le|lt|ge|gt)|cluster_ctarank|cluster_nctarank|is_explicit_cluster|"
    r"smid|nsmid|gridid|clock|clock_hi|clock64|globaltimer|globaltimer_lo|globaltimer_hi|dynamic_smem_size|"
    r"total_smem_size|aggr_smem_size)$"
)

# A generic address is window << 40 | offset; windows above PARAM are global memory.
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 40, 2 << 40, 3 << 40
MODULE_BASE = 0x60 << 40  # .global and .const variables of kernels
DEVICE_BASE = 0x70 << 40  # arrays of device 0; those of device d are d << 40 higher
RANK_SHIFT = 24  # a shared::cluster address is rank << 24 | offset
SHARED_FIRST, LOCAL_FIRST = 1024, 64

POISON = 0xA5  # what memory and registers hold before anything is written
# State of each byte of memory. Bit 0: it may be accessed; any other bit: it may not be read yet.
OUTSIDE, READY, FRESH, PENDING = 0, 1, 3, 5
