"""What each CUDA library's functions without an implementation in `csrc/` do (`stubs.py` says what the kinds are)."""

from collections.abc import Mapping
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
        sizes: patterns of the names that write numbers, each with the arguments that point to them: `((11, 8),)` is the
            eleventh, to eight bytes. They get 0.
        notice: the bit of Notice (account.h) that is told when a size is asked for; 0 for none.
    """

    not_supported: int
    products: str = r"(?!)"
    handles: str = r"(?!)"
    texts: str = r"(?!)"
    version: str | None = None
    version_is_returned: bool = True
    sizes: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = ()
    notice: int = 0


# Products of matrices have no result that the host reads; what creates, queries or measures does.
_COMPUTES = r"(?!.*(Get|Create|Query|Alloc|Init|Check|Xt|Version)).*"

# The graph interface is in csrc/dnn_backend.cpp, RNNs in csrc/dnn_rnn.cpp. Sizes are positions of cudnn_ops.h and
# cudnn_adv.h (cuDNN 9). The older convolution interface, which PyTorch has left, is refused.
_CUDNN = Policy(
    3000,
    products=(
        r"cudnn(Destroy.*|Set.*|RNN(Forward|Backward.*_v8)|BatchNormalization.*|CTCLoss(_v8)?|Pooling.*|SpatialTf.*"
        r"|Dropout(Forward|Backward)|RestoreDropoutDescriptor|Activation(Forward|Backward)|Softmax(Forward|Backward))"
    ),
    handles=r"cudnnCreate.*Descriptor",
    version="cudnnGetVersion",
    sizes=(
        (r"cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize", ((9, 8),)),
        (r"cudnnGetBatchNormalizationBackwardExWorkspaceSize", ((11, 8),)),
        (r"cudnnGetBatchNormalizationTrainingExReserveSpaceSize", ((6, 8),)),
        (r"cudnnGetCTCLossWorkspaceSize", ((9, 8),)),
        (r"cudnnGetCTCLossWorkspaceSize_v8", ((6, 8),)),
        (r"cudnnDropoutGetStatesSize", ((2, 8),)),
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
    sizes=(
        (r"cusparse(SpMM|SDDMM|SpSM)_bufferSize", ((11, 8),)),
        (r"cusparse(SpMV|SpSV)_bufferSize", ((10, 8),)),
        (r"cusparseSpGEMM_(workEstimation|compute)", ((12, 8),)),
        (r"cusparseSpMatGetSize", ((2, 8), (3, 8), (4, 8))),
        (r"cusparseX(coo|csr)sort_bufferSizeExt", ((7, 8),)),
        (r"cusparse[SDCZ]csrgeam2_bufferSizeExt", ((20, 8),)),
        (r"cusparse[SDCZ]bsrsv2_bufferSize", ((12, 4),)),
        (r"cusparse[SDCZ]bsrsm2_bufferSize", ((14, 4),)),
    ),
    notice=8,
)

# Positions of cusolverDn.h (CUDA 12 and 13): the older functions give a number of elements (an int), those with X the
# bytes on the device and on the host.
_CUSOLVER = Policy(
    9,
    products=r"cusolverDn(?!Create|Get|.*_bufferSize|IRS).*",
    handles=r"cusolverDnCreate.*",
    sizes=(
        (r"cusolverDn[SDCZ]gesvd_bufferSize", ((4, 4),)),
        (r"cusolverDn[SDCZ]sytrf_bufferSize", ((5, 4),)),
        (r"cusolverDn[SDCZ](geqrf|getrf|potrf)_bufferSize", ((6, 4),)),
        (r"cusolverDn[SDCZ](orgqr|ungqr|syevd|heevd|syevj|heevj|syevjBatched|heevjBatched)_bufferSize", ((8, 4),)),
        (r"cusolverDn[SDCZ](ormqr|unmqr|gesvdjBatched)_bufferSize", ((12, 4),)),
        (r"cusolverDn[SDCZ]gesvdj_bufferSize", ((13, 4),)),
        (r"cusolverDn[SDCZ]gesvdaStridedBatched_bufferSize", ((17, 4),)),
        (r"cusolverDnXpotrf_bufferSize", ((9, 8), (10, 8))),
        (r"cusolverDnXgeqrf_bufferSize", ((11, 8), (12, 8))),
        (r"cusolverDnX(syevd|syevBatched|sytrs)_bufferSize", ((12, 8), (13, 8))),
        (r"cusolverDnXgeev_bufferSize", ((18, 8), (19, 8))),
    ),
    notice=4,
)

# A plan is a number; 0 will do for all of them.
_CUFFT = Policy(
    16,
    products=r"cufft(Destroy|SetStream|SetAutoAllocation|SetWorkArea|XtExec|Exec.*)",
    sizes=(
        (r"cufftCreate", ((1, 4),)),
        (r"cufftXtMakePlanMany", ((13, 8),)),
        (r"cufftMakePlanMany(64)?", ((12, 8),)),
    ),
    notice=16,
)

POLICIES: Mapping[str, Policy] = {
    "cudart": Policy(801),
    "cublas": Policy(15, products=f"cublas{_COMPUTES}"),
    "cublasLt": Policy(15, products=f"cublasLt{_COMPUTES}", version="cublasLtGetVersion"),
    "cudnn": _CUDNN,
    "cusparse": _CUSPARSE,
    "cusolver": _CUSOLVER,
    "cufft": _CUFFT,
    "curand": Policy(999),
    "cusparseLt": Policy(10),
    "nccl": Policy(
        5,
        texts=r"p?nccl(GetErrorString|GetLastError)",
        version="ncclGetVersion",
        version_is_returned=False,
    ),
}
