"""The functions that are answered without C++: a few lines of assembly each, written from the libraries' symbol tables.

What is not implemented in `csrc/` falls into one of these kinds, by its library's `Policy`:

- *product*: computes on the device and reports nothing to the host: succeeds and does nothing;
- *handle*: makes an object that only such functions read: hands out the address of an empty one;
- *number*: writes numbers where it is told to, and succeeds. The sizes of workspaces are 0: they are not known here,
  which is said once;
- *same*: what another function does that has the same first arguments;
- *version*, *text*: what the real library of this installation says;
- everything else is *missing*: says so once, with its name, keeps the name for the report, and returns the library's
  own code for "not supported".
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_NOTHING = r"(?!)"


@dataclass(frozen=True)
class Policy:
    """How a library's functions without an implementation are answered; patterns match whole names.

    Attributes:
        not_supported: the library's status code for an operation that it does not support.
        products, handles, texts: patterns of the names that are of these kinds.
        numbers: patterns of the names that write numbers, and what they write: `((11, 8, 0),)` is that the eleventh
            argument points to eight bytes that become 0.
        same: patterns of the names that another function answers, and its name, which may refer to their groups.
            Functions called `vgpu_...` are those of `csrc/stubs.h`.
        version: name of the function that returns the version, or writes it to `*first_argument`.
        version_is_returned: which of the two.
        notice: the bit of Notice (account.h) that is told when a number is asked for; 0 for none.
    """

    not_supported: int
    products: str = _NOTHING
    handles: str = _NOTHING
    texts: str = _NOTHING
    numbers: tuple[tuple[str, tuple[tuple[int, int, int], ...]], ...] = ()
    same: tuple[tuple[str, str], ...] = ()
    version: str | None = None
    version_is_returned: bool = True
    notice: int = 0


# --- What each library's functions do ---------------------------------------------------------------------------------

# Everything submitted is done, and what only hints or sets up has nothing to do.
_CUDART = Policy(
    801,
    products=(
        r"cuda(Device(Synchronize|SetLimit|SetCacheConfig)|SetDeviceFlags|Profiler(Start|Stop)"
        r"|Stream(Synchronize|Query|WaitEvent|AttachMemAsync)|ThreadExchangeStreamCaptureMode"
        r"|Event(Query|Synchronize)|Mem(Advise|PrefetchAsync)(_v2)?)"
        r"|__cuda(RegisterFatBinaryEnd|UnregisterFatBinary|Register(Managed|Host)?Var)"
    ),
    numbers=(
        (r"cudaDeviceCanAccessPeer|cudaGetDeviceFlags", ((1, 4, 0),)),
        (r"cudaDeviceGetLimit", ((1, 8, 0),)),
        (r"cudaHostGetFlags", ((1, 4, 3),)),  # portable, mapped
        (r"cudaStreamIsCapturing", ((2, 4, 0),)),
    ),
    same=(
        (r"(cuda(Malloc|Free|Memcpy|Memcpy2D|MemcpyPeer|Memset))Async", r"\1"),
        (r"cudaMallocHost", "cudaHostAlloc"),
        (r"cudaRuntimeGetVersion", "cudaDriverGetVersion"),
        (r"cudaEventCreate", "cudaEventCreateWithFlags"),
        (r"cudaEventRecordWithFlags", "cudaEventRecord"),
        (r"cudaEventDestroy", "vgpu_free"),
        (r"(cudaEventElapsedTime|cudaStreamGetCaptureInfo)_v[23]", r"\1"),
        (r"cudaOccupancyMaxActiveBlocksPerMultiprocessor", r"\g<0>WithFlags"),
        (r"cudaGetKernel|cudaGetFuncBySymbol", "__cudaGetKernel"),
        (r"cudaLaunch(CooperativeKernel|KernelExC)|__cudaLaunchKernel", "cudaLaunchKernel"),
        (r"cuda(MemcpyToSymbol(Async)?|FuncSet(Attribute|CacheConfig)|KernelSetAttributeForDevice)", "vgpu_enter"),
    ),
)

# Modules, kernels and functions are handles: nothing is loaded and nothing runs. The driver logs nothing either.
DRIVER = Policy(
    801,
    products=(
        r"cu(DevicePrimaryCtxRelease(_v2)?|Ctx(SetLimit|Synchronize)|ModuleUnload|LibraryUnload|TensorMapEncodeTiled"
        r"|FuncSet(Attribute|CacheConfig)|Stream(Synchronize|Query|WaitEvent)|Event(Synchronize|Query)|MemSetAccess"
        r"|Logs(Unr|R)egisterCallback)"
    ),
    handles=r"cu(ModuleLoad(Data(Ex)?)?|ModuleGetFunction|LibraryLoadData|LibraryGetKernel|KernelGetFunction)",
    numbers=(
        (r"cuDeviceCanAccessPeer", ((1, 4, 0),)),
        (r"cuCtxGetLimit", ((1, 8, 1 << 20),)),
        (r"cuOccupancyMaxActiveBlocksPerMultiprocessor", ((1, 4, 2),)),
        (r"cuOccupancyMaxActiveClusters", ((1, 4, 1),)),
        (r"cuStreamIsCapturing", ((2, 4, 0),)),
    ),
    same=(
        (r"cuMemcpy(HtoD|HtoDAsync|DtoHAsync|DtoDAsync)_v2", "cuMemcpyDtoH_v2"),
        (r"cuLaunch(Kernel(Ex)?|CooperativeKernel)", "vgpu_launched"),
    ),
)

# Products of matrices have no result that the host reads; what creates, queries or measures does.
_COMPUTES = r"(?!.*(Get|Create|Query|Alloc|Init|Check|Xt|Version)).*"

# The graph interface is in csrc/dnn_backend.cpp, RNNs in csrc/dnn.cpp. Positions are those of cudnn_ops.h and
# cudnn_adv.h (cuDNN 9). The older convolution interface, which PyTorch has left, is refused.
_CUDNN = Policy(
    3000,
    products=(
        r"cudnn(Destroy.*|Set.*|RNN(Forward|Backward.*_v8)|BatchNormalization.*|CTCLoss(_v8)?|Pooling.*|SpatialTf.*"
        r"|Dropout(Forward|Backward)|RestoreDropoutDescriptor|Activation(Forward|Backward)|Softmax(Forward|Backward)"
        r"|Backend(Initialize|Finalize|Execute))"
    ),
    handles=r"cudnnCreate.*Descriptor",
    same=(
        (r"cudnnCreate((Tensor|RNN|RNNData)Descriptor)?", "vgpu_make"),
        (r"cudnnDestroy((Tensor|RNN|RNNData)Descriptor)?", "vgpu_free"),
    ),
    version="cudnnGetVersion",
    numbers=(
        (r"cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize", ((9, 8, 0),)),
        (r"cudnnGetBatchNormalizationBackwardExWorkspaceSize", ((11, 8, 0),)),
        (r"cudnnGetBatchNormalizationTrainingExReserveSpaceSize", ((6, 8, 0),)),
        (r"cudnnGetCTCLossWorkspaceSize", ((9, 8, 0),)),
        (r"cudnnGetCTCLossWorkspaceSize_v8", ((6, 8, 0),)),
        (r"cudnnDropoutGetStatesSize", ((2, 8, 0),)),
    ),
    notice=2,
)

# Positions of cusparse.h (CUDA 12 and 13). The sum of two sparse matrices is in csrc/sparse.cpp.
_CUSPARSE = Policy(
    10,
    products=(
        r"cusparse(?!Create|Sp\w+_createDescr|.*_bufferSize|.*Nnz|SpMatGet|SpGEMM_(workEstimation|compute|estimate))"
        r"(Destroy.*|Set.*|\w+SetStridedBatch|CsrSetPointers|SpMatSet.*|Sp.*|SDDMM.*|[SDCZ](bsr|csr|gem|gt|gp).*|X.*)"
    ),
    handles=r"cusparse(Create(?!IdentityPermutation).*|\w+_createDescr)",
    texts=r"cusparseGetError(String|Name)",
    numbers=(
        (r"cusparse(SpMM|SDDMM|SpSM)_bufferSize", ((11, 8, 0),)),
        (r"cusparse(SpMV|SpSV)_bufferSize", ((10, 8, 0),)),
        (r"cusparseSpGEMM_(workEstimation|compute)", ((12, 8, 0),)),
        (r"cusparseSpMatGetSize", ((2, 8, 0), (3, 8, 0), (4, 8, 0))),
        (r"cusparseX(coo|csr)sort_bufferSizeExt", ((7, 8, 0),)),
        (r"cusparse[SDCZ]csrgeam2_bufferSizeExt", ((20, 8, 0),)),
        (r"cusparse[SDCZ]bsrsv2_bufferSize", ((12, 4, 0),)),
        (r"cusparse[SDCZ]bsrsm2_bufferSize", ((14, 4, 0),)),
    ),
    notice=8,
)

# Positions of cusolverDn.h (CUDA 12 and 13): the older functions give a number of elements (an int), those with X the
# bytes on the device and on the host.
_CUSOLVER = Policy(
    9,
    products=r"cusolverDn(?!Create|Get|.*_bufferSize|IRS).*",
    handles=r"cusolverDnCreate.*",
    numbers=(
        (r"cusolverDn[SDCZ]gesvd_bufferSize", ((4, 4, 0),)),
        (r"cusolverDn[SDCZ]sytrf_bufferSize", ((5, 4, 0),)),
        (r"cusolverDn[SDCZ](geqrf|getrf|potrf)_bufferSize", ((6, 4, 0),)),
        (r"cusolverDn[SDCZ](orgqr|ungqr|syevd|heevd|syevj|heevj|syevjBatched|heevjBatched)_bufferSize", ((8, 4, 0),)),
        (r"cusolverDn[SDCZ](ormqr|unmqr|gesvdjBatched)_bufferSize", ((12, 4, 0),)),
        (r"cusolverDn[SDCZ]gesvdj_bufferSize", ((13, 4, 0),)),
        (r"cusolverDn[SDCZ]gesvdaStridedBatched_bufferSize", ((17, 4, 0),)),
        (r"cusolverDnXpotrf_bufferSize", ((9, 8, 0), (10, 8, 0))),
        (r"cusolverDnXgeqrf_bufferSize", ((11, 8, 0), (12, 8, 0))),
        (r"cusolverDnX(syevd|syevBatched|sytrs)_bufferSize", ((12, 8, 0), (13, 8, 0))),
        (r"cusolverDnXgeev_bufferSize", ((18, 8, 0), (19, 8, 0))),
    ),
    notice=4,
)

# A plan is a number; 0 will do for all of them.
_CUFFT = Policy(
    16,
    products=r"cufft(Destroy|SetStream|SetAutoAllocation|SetWorkArea|XtExec|Exec.*)",
    numbers=(
        (r"cufftCreate", ((1, 4, 0),)),
        (r"cufftXtMakePlanMany", ((13, 8, 0),)),
        (r"cufftMakePlanMany(64)?", ((12, 8, 0),)),
    ),
    notice=16,
)

# What a collective delivers that is computed from several ranks, or another's, is not known, as after a kernel.
_NCCL = Policy(
    5,
    products=r"nccl(CommFinalize|Send|Group(Start|End)|Comm(Window)?Deregister|RedOpDestroy)",
    texts=r"p?nccl(GetErrorString|GetLastError)",
    numbers=(
        (r"ncclCommGetAsyncError", ((2, 4, 0),)),
        (r"ncclCommMemStats", ((3, 8, 0),)),  # of NCCL's own memory, none is known
        (r"ncclRedOpCreatePreMulSum", ((1, 4, 5),)),  # the first after its own operations (ncclNumOps)
    ),
    same=(
        (r"p(nccl.*)", r"\1"),  # the names that profilers use
        (r"ncclCommInitRankConfig", "ncclCommInitRank"),
        (r"ncclComm(Destroy|Abort)", "vgpu_free"),
        (r"nccl(AllReduce|Reduce|ReduceScatter|AlltoAll|Gather|Scatter|Recv)", "vgpu_launched"),
    ),
    version="ncclGetVersion",
    version_is_returned=False,
)

POLICIES: Mapping[str, Policy] = {
    "cudart": _CUDART,
    "cublas": Policy(
        15,
        products=f"cublas{_COMPUTES}",
        same=((r"cublasCreate_v2", "vgpu_make"), (r"cublasDestroy_v2", "vgpu_free")),
    ),
    "cublasLt": Policy(
        15,
        products=f"cublasLt{_COMPUTES}",
        handles=r"cublasLt(|MatmulDesc|MatrixLayout|MatmulPreference|MatrixTransformDesc)Create",
        version="cublasLtGetVersion",
    ),
    "cudnn": _CUDNN,
    "cusparse": _CUSPARSE,
    "cusolver": _CUSOLVER,
    "cufft": _CUFFT,
    "curand": Policy(999),
    "cusparseLt": Policy(10),
    "nccl": _NCCL,
}


# --- Their assembly ---------------------------------------------------------------------------------------------------

_STUB = """\
    .globl {name}
    .type {name}, @function
{name}:
{body}
    .size {name}, . - {name}
"""

# The System V calling convention: six arguments in registers, the others on the stack above the return address.
_ARGUMENT_REGISTERS = ("%rdi", "%rsi", "%rdx", "%rcx", "%r8", "%r9")


def classify(policy: Policy, name: str) -> str:
    """`product`, `handle`, `number`, `same`, `text`, `version` or `missing`."""
    if name == policy.version:
        return "version"
    if _numbers(policy, name):
        return "number"
    kinds = {"text": policy.texts, "same": "|".join(pattern for pattern, _ in policy.same) or _NOTHING}
    kinds |= {"handle": policy.handles, "product": policy.products}
    return next((kind for kind, pattern in kinds.items() if re.fullmatch(pattern, name)), "missing")


def _numbers(policy: Policy, name: str) -> tuple[tuple[int, int, int], ...]:
    return next((numbers for pattern, numbers in policy.numbers if re.fullmatch(pattern, name)), ())


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
    kind = classify(policy, name)
    succeed = ["xorl %eax, %eax", "ret"]
    lines = [f"leaq .Lname_{name}(%rip), %rdi", "jmp .Lmissing"]
    if kind == "product":
        lines = succeed
    elif kind == "handle":
        lines = ["leaq vgpu_empty_object(%rip), %rax", "movq %rax, (%rdi)", *succeed]
    elif kind == "text":
        lines = ["leaq .Ltext(%rip), %rax", "ret"]
    elif kind == "number":
        lines = _write_numbers(_numbers(policy, name))
        lines += [f"movl ${policy.notice}, %edi", "jmp vgpu_notice@PLT"] if policy.notice else succeed
    elif kind == "same":
        matches = ((re.fullmatch(pattern, name), target) for pattern, target in policy.same)
        lines = [f"jmp {next(match.expand(target) for match, target in matches if match)}@PLT"]
    elif kind == "version" and policy.version_is_returned:
        lines = [f"movl ${version}, %eax", "ret"]
    elif kind == "version":
        lines = [f"movl ${version}, (%rdi)", *succeed]
    return "    " + "\n    ".join(lines)


def _write_numbers(numbers: tuple[tuple[int, int, int], ...]) -> list[str]:
    lines = []
    for position, size, number in numbers:
        register = _ARGUMENT_REGISTERS[position - 1] if position <= 6 else "%rax"
        if position > 6:
            lines.append(f"movq {8 * (position - 6)}(%rsp), %rax")
        lines.append(f"mov{'l' if size == 4 else 'q'} ${number}, ({register})")
    return lines


def write_version_script(node: str | None, names: Iterable[str]) -> str:
    """A linker version script that exports exactly `names`, under the version that the real library gives them."""
    exported = "".join(f"    {name};\n" for name in sorted(set(names)))
    return f"{node or ''} {{\n  global:\n{exported}  local: *;\n}};\n"


# As texts: compiling them takes longer than all else that a run with a known build needs of this module.
_DECLARATION = r"^\s*(?:extern\s+)?CUresult\s+CUDAAPI\s+(cu[A-Z]\w+)\s*\("
_RENAMING = r"^\s*#\s*define\s+(cu[A-Z]\w+)\s+(?:__CUDA_API_PT\w+\()?(cu[A-Z]\w+?)\)?\s*$"


def driver_functions(header: str) -> tuple[list[str], dict[str, str]]:
    """Functions that the text of cuda.h declares, under their binary names, and its renamings."""
    found = re.findall(_RENAMING, header, re.MULTILINE)
    renamings = {name: symbol for name, symbol in found if name != symbol}
    declared = {renamings.get(name, name) for name in re.findall(_DECLARATION, header, re.MULTILINE)}
    return sorted(declared | set(renamings.values())), renamings
