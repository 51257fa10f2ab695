"""The functions that are answered without C++: a line of assembly each, written from the libraries' symbol tables.

What is not implemented in `csrc/` falls into one of these kinds, by the library's row in `POLICIES`:

- *product*: computes on the device and reports nothing to the host: succeeds and does nothing;
- *handle*: makes an object that only such functions read: hands out the address of an empty one;
- *size*: writes 0 where it was told to (a workspace's size, which is not known here), says so once, and succeeds;
- *version*, *text*: what the real library of this installation says;
- everything else is *missing*: says so once, with its name, keeps the name for the report, and returns the library's
  own code for "not supported".
"""

import re
from collections.abc import Iterable, Mapping

from .policies import POLICIES, Policy

__all__ = ["POLICIES", "Policy", "classify", "driver_functions", "write_assembly", "write_driver_assembly"]


_STUB = """\
    .globl {name}
    .type {name}, @function
{name}:
{body}
    .size {name}, . - {name}
"""


def classify(policy: Policy, name: str) -> str:
    """`product`, `handle`, `text`, `version`, `size` or `missing`."""
    if name == policy.version:
        return "version"
    if _pointers(policy, name):
        return "size"
    for kind, pattern in (("handle", policy.handles), ("text", policy.texts), ("product", policy.products)):
        if re.fullmatch(pattern, name):
            return kind
    return "missing"


def _pointers(policy: Policy, name: str) -> tuple[tuple[int, int], ...]:
    return next((pointers for pattern, pointers in policy.sizes if re.fullmatch(pattern, name)), ())


def write_assembly(policy: Policy, functions: Iterable[str], implemented: Iterable[str], version: int) -> str:
    """Assembly of those of a library's exported functions that its C++ does not implement.

    `version` is what the library's version function answers.
    """
    have = set(implemented)
    names = [name for name in functions if name not in have]
    stubs = [_STUB.format(name=name, body=_body(policy, name, version)) for name in names]
    return _wrap(stubs, policy.not_supported, names)


def write_driver_assembly(functions: Iterable[str], aliases: Mapping[str, str], implemented: Iterable[str]) -> str:
    """The same for libcuda.so.1, of which no library is installed: `functions` are the names that cuda.h declares.

    `aliases` maps the names that programs ask for to those that cuda.h gives them, for `cuGetProcAddress`.
    """
    have = set(implemented)
    policy = Policy(801)
    names = [name for name in functions if name not in have]
    stubs = [_STUB.format(name=name, body=_body(policy, name, 0)) for name in names]
    table = ['    .section .data.rel.ro, "aw"', "    .globl vgpu_driver_aliases", "vgpu_driver_aliases:"]
    texts = []
    for index, (name, symbol) in enumerate(sorted(aliases.items())):
        table.append(f"    .quad .Lalias{index}, .Lsymbol{index}")
        texts += [f'.Lalias{index}: .string "{name}"', f'.Lsymbol{index}: .string "{symbol}"']
    table += ["    .quad 0, 0", "    .section .rodata", *texts]
    return _wrap(stubs, policy.not_supported, names) + "\n".join(table) + "\n"


def _body(policy: Policy, name: str, version: int) -> str:
    kind = classify(policy, name)
    if kind == "product":
        return "    xorl %eax, %eax\n    ret"
    if kind == "handle":
        return "    leaq vgpu_empty_object(%rip), %rax\n    movq %rax, (%rdi)\n    xorl %eax, %eax\n    ret"
    if kind == "text":
        return "    leaq .Ltext(%rip), %rax\n    ret"
    if kind == "size":
        return _write_zeros(_pointers(policy, name), policy.notice)
    if kind == "version" and policy.version_is_returned:
        return f"    movl ${version}, %eax\n    ret"
    if kind == "version":
        return f"    movl ${version}, (%rdi)\n    xorl %eax, %eax\n    ret"
    return f"    leaq .Lname_{name}(%rip), %rdi\n    jmp .Lmissing"


# The System V calling convention: six arguments in registers, the others on the stack above the return address.
_ARGUMENT_REGISTERS = ("%rdi", "%rsi", "%rdx", "%rcx", "%r8", "%r9")


def _write_zeros(pointers: tuple[tuple[int, int], ...], notice: int) -> str:
    lines = []
    for position, size in pointers:
        register = _ARGUMENT_REGISTERS[position - 1] if position <= 6 else "%rax"
        if position > 6:
            lines.append(f"movq {8 * (position - 6)}(%rsp), %rax")
        lines.append(f"mov{'l' if size == 4 else 'q'} $0, ({register})")
    lines += [f"movl ${notice}, %edi", "jmp vgpu_notice@PLT"] if notice else ["xorl %eax, %eax", "ret"]
    return "    " + "\n    ".join(lines)


def _wrap(stubs: list[str], not_supported: int, names: list[str]) -> str:
    # The arguments of a missing function are of no interest, so its name may take the first one's place.
    lines = ["    .text", *stubs, ".Lmissing:", f"    movl ${not_supported}, %esi", "    jmp vgpu_refuse@PLT"]
    lines += ["    .section .rodata", '.Ltext: .string "not supported on a virtual GPU"']
    lines += [f'.Lname_{name}: .string "{name}"' for name in names]
    lines += ["    .local vgpu_empty_object", "    .comm vgpu_empty_object, 4096, 64"]
    lines += ['    .section .note.GNU-stack, "", @progbits', ""]
    return "\n".join(lines)


def write_version_script(node: str | None, names: Iterable[str]) -> str:
    """A linker version script that exports exactly `names`, under the version that the real library gives them."""
    exported = "".join(f"    {name};\n" for name in sorted(set(names)))
    return f"{node or ''} {{\n  global:\n{exported}  local: *;\n}};\n"


_DECLARATION = re.compile(r"^\s*(?:extern\s+)?CUresult\s+CUDAAPI\s+(cu[A-Z]\w+)\s*\(", re.MULTILINE)
_RENAMING = re.compile(r"^\s*#\s*define\s+(cu[A-Z]\w+)\s+(?:__CUDA_API_PT\w+\()?(cu[A-Z]\w+?)\)?\s*$", re.MULTILINE)


def driver_functions(header: str) -> tuple[list[str], dict[str, str]]:
    """Functions that the text of cuda.h declares, under their binary names, and its renamings."""
    renamings = {name: symbol for name, symbol in _RENAMING.findall(header) if name != symbol}
    declared = {renamings.get(name, name) for name in _DECLARATION.findall(header)}
    return sorted(declared | set(renamings.values())), renamings
