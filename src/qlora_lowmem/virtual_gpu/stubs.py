"""The functions that are answered without C++: a few lines of assembly each, written from the libraries' symbol tables.

What is not implemented in `csrc/` falls into one of these kinds, by its library's table in `functions.toml`:

- *product*: computes on the device and reports nothing to the host: succeeds, and what was known there no longer is.
  It counts as one kernel, the least that it launches: how many more there are (a split product, a transposition) is
  the library's choice on the card;
- *idle*: has nothing to do where nothing computes, or only sets up: succeeds;
- *handle*: makes an object that only such functions read: hands out the address of an empty one;
- *number*: writes numbers where it is told to, and succeeds. The sizes of workspaces are 0: they are not known here,
  which is said once;
- *same*: what another function does that has the same first arguments;
- *version*, *text*: what the real library of this installation says;
- everything else is *missing*: says so once, with its name, keeps the name for the report, and returns the library's
  own code for "not supported".
"""

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TABLES = Path(__file__).with_name("functions.toml")
_KINDS = ("number", "text", "same", "handle", "product", "idle")


@dataclass(frozen=True)
class Policy:
    """How a library's functions without an implementation are answered: a table of `functions.toml`.

    The head of that file says what each field is. Patterns match whole names.
    """

    not_supported: int
    notice: int = 0
    version: str | None = None
    version_written: bool = False
    number: Mapping[str, Sequence[tuple[int, int, int]]] = field(default_factory=dict)
    text: Sequence[str] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    handle: Sequence[str] = ()
    product: Sequence[str] = ()
    idle: Sequence[str] = ()


@functools.cache
def policies() -> dict[str, Policy]:
    """Policies by the stem of the library's file, `cudart`; `driver` is that of libcuda.so.1."""
    return {name: Policy(**table) for name, table in tomllib.loads(TABLES.read_text(encoding="utf-8")).items()}


def classify(policy: Policy, name: str) -> tuple[str, re.Match[str] | None]:
    """`version`, `missing`, or the kind whose pattern the name matches, with the match."""
    if name == policy.version:
        return "version", None
    for kind in _KINDS:
        for pattern in getattr(policy, kind):
            if match := re.fullmatch(pattern, name):
                return kind, match
    return "missing", None


_STUB = """\
    .globl {name}
    .type {name}, @function
{name}:
{body}
    .size {name}, . - {name}
"""

# The System V calling convention: six arguments in registers, the others on the stack above the return address.
_ARGUMENT_REGISTERS = ("%rdi", "%rsi", "%rdx", "%rcx", "%r8", "%r9")


def write_assembly(policy: Policy, functions: Iterable[str], implemented: Iterable[str], version: int) -> str:
    """Assembly of those of a library's exported functions that its C++ does not implement.

    `version` is what the library's version function answers.
    """
    names = sorted(set(functions) - set(implemented))
    # The arguments of a missing function are of no interest, so its name may take the first one's place.
    lines = ["    .text", *(_STUB.format(name=name, body=_body(policy, name, version)) for name in names)]
    lines += [".Lmissing:", f"    movl ${policy.not_supported}, %esi", "    jmp vgpu_refuse@PLT"]
    lines += ["    .section .rodata", '.Ltext: .string "not supported on a virtual GPU"']
    lines += [f'.Lname_{name}: .string "{name}"' for name in names]
    lines += ["    .local vgpu_empty_object", "    .comm vgpu_empty_object, 4096, 64"]
    return "\n".join([*lines, '    .section .note.GNU-stack, "", @progbits', ""])


def write_aliases(aliases: Mapping[str, str]) -> str:
    """Assembly of libcuda.so.1's table of the names that programs ask for, and those that cuda.h gives them."""
    table = ['    .section .data.rel.ro, "aw"', "    .globl vgpu_driver_aliases", "vgpu_driver_aliases:"]
    texts = []
    for index, (name, symbol) in enumerate(sorted(aliases.items())):
        table.append(f"    .quad .Lalias{index}, .Lsymbol{index}")
        texts += [f'.Lalias{index}: .string "{name}"', f'.Lsymbol{index}: .string "{symbol}"']
    return "\n".join([*table, "    .quad 0, 0", "    .section .rodata", *texts, ""])


def _body(policy: Policy, name: str, version: int) -> str:
    kind, match = classify(policy, name)
    succeed = ["xorl %eax, %eax", "ret"]
    lines = [f"leaq .Lname_{name}(%rip), %rdi", "jmp .Lmissing"]
    if kind == "product":
        lines = ["jmp vgpu_launched@PLT"]
    elif kind == "idle":
        lines = succeed
    elif kind == "handle":
        lines = ["leaq vgpu_empty_object(%rip), %rax", "movq %rax, (%rdi)", *succeed]
    elif kind == "text":
        lines = ["leaq .Ltext(%rip), %rax", "ret"]
    elif kind == "number" and match:
        lines = _write_numbers(policy.number[match.re.pattern])
        lines += [f"movl ${policy.notice}, %edi", "jmp vgpu_notice@PLT"] if policy.notice else succeed
    elif kind == "same" and match:
        lines = [f"jmp {match.expand(policy.same[match.re.pattern])}@PLT"]
    elif kind == "version":
        lines = [f"movl ${version}, (%rdi)", *succeed] if policy.version_written else [f"movl ${version}, %eax", "ret"]
    return "    " + "\n    ".join(lines)


def _write_numbers(numbers: Sequence[tuple[int, int, int]]) -> list[str]:
    lines = []
    for position, size, number in numbers:
        register = _ARGUMENT_REGISTERS[position - 1] if position <= 6 else "%rax"
        if position > 6:
            lines.append(f"movq {8 * (position - 6)}(%rsp), %rax")
        lines += [f"testq {register}, {register}", "jz 1f"]
        lines += [f"mov{'l' if size == 4 else 'q'} ${number}, ({register})", "1:"]
    return lines


def write_version_script(node: str, names: Iterable[str]) -> str:
    """A linker version script that exports exactly `names`, under the version that the real library gives them."""
    exported = "".join(f"    {name};\n" for name in sorted(set(names)))
    return f"{node} {{\n  global:\n{exported}  local: *;\n}};\n"


# As texts: compiling them takes longer than all else that a run with a known build needs of this module.
_DECLARATION = r"^\s*(?:extern\s+)?CUresult\s+CUDAAPI\s+(cu[A-Z]\w+)\s*\("
_RENAMING = r"^\s*#\s*define\s+(cu[A-Z]\w+)\s+(?:__CUDA_API_PT\w+\()?(cu[A-Z]\w+?)\)?\s*$"


def driver_functions(header: str) -> tuple[list[str], dict[str, str]]:
    """Functions that the text of cuda.h declares, under their binary names, and its renamings."""
    found = re.findall(_RENAMING, header, re.MULTILINE)
    renamings = {name: symbol for name, symbol in found if name != symbol}
    declared = {renamings.get(name, name) for name in re.findall(_DECLARATION, header, re.MULTILINE)}
    return sorted(declared | set(renamings.values())), renamings
