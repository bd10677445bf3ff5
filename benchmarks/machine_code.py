"""Which machine instructions a launch would execute, without a GPU to ask.

The emulator counts how often each line of a kernel's PTX is executed. The assembler, asked for line information, says
which line each of its instructions comes from (and makes the same code as without). Together that is how often each
machine instruction would be issued. It is an estimate:

- what the assembler keeps for warps whose lanes have parted at a shuffle or a vote (behind BRA.DIV, one step of a
  collective after the other) is left out: they do not here;
- a branch that the assembler has turned into predicates is issued whichever way it goes, here it is not;
- a loop that the assembler unrolls counts once for each copy (tests/test_predictions.py: those over a row are not);
- subroutines (64-bit divisions, divisions by extreme numbers) are left out: at most one of them is called for a row.
"""

import collections
import functools
import re

from gpusoftmax.kernels.cuda import compile
from tests import codegen

_MARK = re.compile(r'\s*//## File "\.nv_debug_ptx_txt[^"]*", line (\d+)')
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)")
_PARTED = re.compile(r"BRA\.DIV[^`]*`\((\.L\w+)\)")
_LABEL = re.compile(r"(\.L\w+):")
_SECTION = re.compile(r"//-+ \.text\.([\w$]+)")


def executed(ptx: str, arch: str, warp_lines: dict[int, int]) -> collections.Counter:
    """How often a warp issues each opcode, such as "LDS.U16", if each line of the PTX is executed so often."""
    total = collections.Counter()
    for line, opcodes in _opcodes(ptx, arch).items():
        for opcode in opcodes:
            total[opcode] += warp_lines.get(line, 0)
    return total


@functools.lru_cache(maxsize=64)
def _opcodes(ptx: str, arch: str) -> dict[int, list[str]]:
    """The machine instructions that come from each line."""
    cubin, _ = compile.link(ptx, arch, lineinfo=True)
    text = codegen.sass(cubin, "--print-line-info-ptx")
    kernel = re.search(r"\.entry\s+([\w$]+)", ptx)[1]
    parted = set(_PARTED.findall(text))
    found, section, line, together = collections.defaultdict(list), None, None, True
    for one in text.splitlines():
        if match := _SECTION.match(one):
            section, line = match[1], None
        elif match := _MARK.match(one):
            line = int(match[1])
        elif match := _LABEL.match(one):
            together = together and match[1] not in parted
        elif section == kernel and line and (match := _INSTRUCTION.match(one)):
            if together and match[2] != "NOP":
                found[line].append(match[2])
            together = together or (match[2] == "BRA" and not match[1])  # back to those that are together
    return dict(found)
