"""The functions that are answered without C++: a line of assembly each, written from the libraries' symbol tables.

What is not implemented in `csrc/` falls into one of these kinds, by the library's row in `POLICIES`:

- *product*: computes on the device and reports nothing to the host: succeeds and does nothing;
- *handle*: makes an object that only such functions read: hands out the address of an empty one;
- *version*, *text*: what the real library of this installation says;
- everything else is *missing*: says so once, with its name, keeps the name for the report, and returns the library's
  own code for "not supported".
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """How a library's functions without an implementation are answered.

    Attributes:
        not_supported: its status code for an operation that it does not support.
        products: pattern of the names that succeed and do nothing.
        handles: pattern of the names that set `*first_argument` to an object.
        texts: pattern of the names that return a C string.
        version: name of the function that returns the version, or writes it to `*first_argument`.
        version_is_returned: which of the two.
    """

    not_supported: int
    products: str = r"(?!)"
    handles: str = r"(?!)"
    texts: str = r"(?!)"
    version: str | None = None
    version_is_returned: bool = True


# Products of matrices have no result that the host reads; what creates, queries or measures does.
_COMPUTES = r"(?!.*(Get|Create|Query|Alloc|Init|Check|Xt|Version)).*"

POLICIES: Mapping[str, Policy] = {
    "cudart": Policy(801),
    "cublas": Policy(15, products=f"cublas{_COMPUTES}"),
    "cublasLt": Policy(15, products=f"cublasLt{_COMPUTES}", version="cublasLtGetVersion"),
    # Its graph interface is in csrc/dnn_backend.cpp; what the older one would take of the memory is not known here.
    "cudnn": Policy(
        3000,
        products=r"cudnn(Destroy.*|SetStream)",
        handles=r"cudnnCreate",
        version="cudnnGetVersion",
    ),
    "cusparse": Policy(
        10,
        products=r"cusparse(Destroy.*|SetStream|SetPointerMode)",
        handles=r"cusparseCreate",
        texts=r"cusparseGetError(String|Name)",
    ),
    "cusolver": Policy(9, products=r"cusolverDn(Destroy.*|SetStream)", handles=r"cusolverDn(Create|CreateParams)"),
    "cufft": Policy(16, products=r"cufft(Destroy|SetStream)"),
    "curand": Policy(999),
    "cusparseLt": Policy(10),
    "nccl": Policy(
        5,
        texts=r"p?nccl(GetErrorString|GetLastError)",
        version="ncclGetVersion",
        version_is_returned=False,
    ),
}

_STUB = """\
    .globl {name}
    .type {name}, @function
{name}:
{body}
    .size {name}, . - {name}
"""


def classify(policy: Policy, name: str) -> str:
    """`product`, `handle`, `text`, `version` or `missing`."""
    if name == policy.version:
        return "version"
    for kind, pattern in (("handle", policy.handles), ("text", policy.texts), ("product", policy.products)):
        if re.fullmatch(pattern, name):
            return kind
    return "missing"


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
    if kind == "version" and policy.version_is_returned:
        return f"    movl ${version}, %eax\n    ret"
    if kind == "version":
        return f"    movl ${version}, (%rdi)\n    xorl %eax, %eax\n    ret"
    return f"    leaq .Lname_{name}(%rip), %rdi\n    jmp .Lmissing"


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
