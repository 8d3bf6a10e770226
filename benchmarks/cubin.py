"""Kernels compiled for GPUs that this machine does not have, and what their machine code says.

The triton wheel brings ptxas, cuobjdump and nvdisasm; no driver and no CUDA is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FakeDriver:
    """The part of Triton's driver that compiling asks for."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@contextmanager
def driver_for(capability: int) -> Iterator[None]:
    """Triton compiles for this compute capability (90: an H100) until the end of the block."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(FakeDriver(capability))
    try:
        yield
    finally:
        triton.runtime.driver._active = before  # reset_active() would look for a GPU


@dataclass(frozen=True, slots=True)
class Code:
    """One compiled kernel."""

    ttir: str
    """Triton's own intermediate form."""
    cubin: bytes
    """What a GPU runs."""
    resources: str
    """What cuobjdump says of registers and memory."""
    sass: str
    """Machine code, disassembled."""
    threads: int
    """Threads a program."""

    def count(self, instruction: str) -> int:
        """How often an instruction occurs; `instruction` is a regular expression for its whole name."""
        return sum(re.fullmatch(instruction, name) is not None for _, name, _ in _INSTRUCTION.findall(self.sass))

    @property
    def registers(self) -> int:
        """Registers a thread."""
        return self._resource("REG")

    @property
    def spills(self) -> int:
        """Bytes of stack and local memory, and instructions that touch them: 0 where nothing is spilled."""
        return self._resource("STACK") + self._resource("LOCAL") + self.count(r"(LDL|STL)[\w.]*")

    @property
    def shared_bytes(self) -> int:
        """Shared memory a program."""
        return self._resource("SHARED")

    @property
    def instructions(self) -> int:
        """Instructions of a thread: those of the innermost loop if there is one, else all up to the last exit."""
        lines = [(int(address, 16), name, rest) for address, name, rest in _INSTRUCTION.findall(self.sass)]
        assert any(name == "EXIT" for _, name, _ in lines), "nvdisasm printed something that this does not read"
        labels = {
            match[1]: int(match[2], 16)
            for match in re.finditer(r"^(\.L_x_\d+):\n(?:\s*\n)*\s+/\*([0-9a-f]+)\*/", self.sass, re.MULTILINE)
        }
        loops = []
        for address, name, rest in lines:
            target = re.search(r"\((\.L_x_\d+)\)", rest)
            if name.startswith("BRA") and target and labels.get(target[1], address) < address:
                loops.append((labels[target[1]], address))
        if not loops:
            return len([name for _, name, _ in lines if name not in ("NOP", "BRA")])
        begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
        return sum(begin <= address <= end for address, _, _ in lines)

    def bits(self, access: str) -> int:
        """How much of the data one access of a kind ("LDG" or "STG") moves, in bits; 0 if there is none.

        Tables are read 32 bits at a time, so that any other width is that of the data; the narrowest counts.
        """
        widths = set()
        for parts in (name.split(".") for _, name, _ in _INSTRUCTION.findall(self.sass)):
            if parts[0] == access:
                known = [int(part.lstrip("US")) for part in parts if part in ("U8", "S8", "U16", "S16", "64", "128")]
                widths.add(known[0] if known else 32)
        narrow, wide = [width for width in widths if width < 32], [width for width in widths if width > 32]
        return min(narrow, default=max(wide, default=max(widths, default=0)))

    def _resource(self, name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", self.resources)
        assert found, self.resources
        return int(found[1])


def compile_for(capability: int, kernel: Any, arguments: Sequence[Any], **options: Any) -> Code:
    """Compile a kernel for the arguments of a launch; tensors may be on the meta device and count as aligned.

    Triton specialises as in a real launch: on the dtypes, and on which integers are 1 or multiples of 16.
    """
    with driver_for(capability), tempfile.TemporaryDirectory() as folder:
        kernel.device_caches.clear()  # keyed by device index: another target would get this one's code
        typed = [a.dtype if isinstance(a, torch.Tensor) else a for a in arguments]
        compiled = kernel.warmup(*typed, grid=(1,), **options)
        kernel.device_caches.clear()
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        resources, sass = disassemble(path)
    return Code(compiled.asm["ttir"], compiled.asm["cubin"], resources, sass, 32 * compiled.metadata.num_warps)


def disassemble(cubin: Path) -> tuple[str, str]:
    """(resource usage, machine code) of a cubin."""
    resources, sass = (
        subprocess.run([str(TOOLS / tool[0]), *tool[1:], str(cubin)], check=True, capture_output=True, text=True).stdout
        for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    return resources, sass
