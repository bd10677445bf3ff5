"""Hand-written PTX for the tests of the emulator: what compile.image gives, without a compiler."""

import functools
import itertools

import numpy as np

from gpusoftmax.kernels.cuda import driver
from gpusoftmax.kernels.cuda.compile import link, ptx_architecture
from gpusoftmax.kernels.cuda.plan import Plan
from tests.emulator.gpu import emulated_gpu

HEADER = ".version 8.0\n.target {target}\n.address_size 64\n"
ENTRY = """{header}{top}
.visible .entry {name}({params}) {{
  .reg .pred %p<64>; .reg .b16 %h<64>; .reg .b32 %r<64>; .reg .b64 %rd<64>; .reg .f32 %f<64>; .reg .f64 %fd<64>;
  ld.param.u64 %rd0, [x]; ld.param.u64 %rd1, [y]; mov.u32 %r0, %tid.x;
  cvta.to.global.u64 %rd0, %rd0; cvta.to.global.u64 %rd1, %rd1;
{body}
  ret;
}}
"""
# One thread per element: %rd2 is the address of element %r0 of x, %rd3 that of element %r0 of y.
ELEMENT = """
  mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r0, %r1, %r2, %r0;
  setp.ge.u32 %p0, %r0, {count}; @%p0 ret;
  mad.wide.u32 %rd2, %r0, {in_size}, %rd0; mad.wide.u32 %rd3, %r0, {out_size}, %rd1;
{body}"""


class HandwrittenImage:
    """As compile.Image: PTX and, when asked for, a cubin."""

    def __init__(self, ptx, entry="kernel", arch="sm_90"):
        self.ptx, self.entry, self.arch = ptx, entry, arch

    @functools.cached_property
    def cubin(self):
        return link(self.ptx, self.arch)[0]


def image(body, top="", more_params="", arch="sm_90"):
    """A kernel around a body. %rd0 is the pointer x, %rd1 the pointer y, %r0 the number of the thread."""
    params = ".param .u64 x, .param .u64 y" + more_params
    header = HEADER.format(target=ptx_architecture(arch))
    return HandwrittenImage(ENTRY.format(header=header, top=top, name="kernel", params=params, body=body), arch=arch)


def element_image(body, count, in_size, out_size, arch="sm_90"):
    """A kernel that turns element [%rd2] of x into element [%rd3] of y."""
    return image(ELEMENT.format(count=count, in_size=in_size, out_size=out_size, body=body), arch=arch)


def pointer(array):
    return array.__cuda_array_interface__["data"][0]


def launch(kernel_image, *args, threads=32, blocks=1, cluster=1, shared=0, device=0, stream=7):
    """Launch through the driver. Arrays are passed as their pointers."""
    loaded = driver.load(kernel_image, driver.device(device), stream)
    words = tuple(arg if isinstance(arg, (int, np.generic)) else pointer(arg) for arg in args)
    plan = Plan("handwritten", threads, blocks, chunk_cols=0, shared_bytes=shared, cluster=cluster)
    driver.launch(loaded, plan, stream, words)


# ---- one instruction applied to many values: for test_arithmetic.py and test_conformance.py


def packed(*columns):
    """Arrays of one length side by side, as records of raw bytes: record k holds element k of each, then padding."""
    columns = [np.ascontiguousarray(column) for column in columns]
    records = np.zeros((len(columns[0]), _record_size(columns)), np.uint8)
    at = 0
    for column in columns:
        records[:, at : at + column.itemsize] = column.view(np.uint8).reshape(len(column), -1)
        at += column.itemsize
    return records


def _record_size(columns):
    size = sum(np.dtype(getattr(column, "dtype", column)).itemsize for column in columns)
    return -(-size // 16) * 16


def instruction_image(text, inputs, output, count, arch="sm_90"):
    """A kernel that applies PTX to columns of the given dtypes, as packed() lays them out.

    In the text, {a}, {b}, {c} are the registers of the inputs, {d} that of the result. Wider inputs come first.
    """
    body, names, at = "", {}, 0
    for name, dtype, number in zip("abc", inputs, itertools.count(40)):
        names[name], suffix = _register(dtype, number)
        body += f"  ld.global.{suffix} {names[name]}, [%rd2+{at}];\n"
        at += np.dtype(dtype).itemsize
    names["d"], suffix = _register(output, 50)
    body += f"  {text.format(**names)}\n  st.global.{suffix} [%rd3], {names['d']};"
    return element_image(body, count, _record_size(inputs), np.dtype(output).itemsize, arch)


def _register(dtype, number):
    """(register name, type of its load and store); half types are held as bits"""
    dtype = np.dtype(dtype)
    known = {"f4": ("%f", "f32"), "f8": ("%fd", "f64")}
    by_size = {2: ("%h", "b16"), 4: ("%r", "b32"), 8: ("%rd", "b64")}
    prefix, suffix = known.get(dtype.str[1:]) or by_size[dtype.itemsize]
    return f"{prefix}{number}", suffix


def emulate(text, columns, output, arch="sm_90", **options):
    """The results of an instruction, one per element of the columns, on the emulator."""
    count, output = len(columns[0]), np.dtype(output)
    kernel_image = instruction_image(text, [column.dtype for column in columns], output, count, arch)
    with emulated_gpu(arch, **options) as gpu:
        x, y = gpu.array(packed(*columns)), gpu.empty(count * output.itemsize, np.uint8)
        launch(kernel_image, x, y, threads=64, blocks=-(-count // 64))
        return gpu.get(y).view(output)
