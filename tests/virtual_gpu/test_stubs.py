import pytest

from qlora_lowmem.virtual_gpu import stubs


@pytest.mark.parametrize(
    ("stem", "name", "kind"),
    [
        ("cublas", "cublasSgemm_v2", "product"),
        ("cublas", "cublasGemmStridedBatchedEx", "product"),
        ("cublas", "cublasSetWorkspace_v2", "idle"),
        ("cublas", "cublasSetVector", "same"),
        ("cublas", "cublasGetEmulationStrategy", "missing"),
        ("cublas", "cublasXtSgemm", "missing"),  # copies to and from the host
        ("cublasLt", "cublasLtMatmul", "product"),
        ("cublasLt", "cublasLtMatmulAlgoCheck", "missing"),
        ("cublasLt", "cublasLtMatmulDescSetAttribute", "idle"),
        ("cublasLt", "cublasLtMatrixLayoutDestroy", "idle"),
        ("cudart", "cudaGraphLaunch", "missing"),
        ("cudnn", "cudnnCreateActivationDescriptor", "handle"),
        ("cudnn", "cudnnBatchNormalizationForwardTrainingEx", "product"),
        ("cudnn", "cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize", "number"),
        ("cudnn", "cudnnConvolutionForward", "missing"),
        ("cudnn", "cudnnBackendExecute", "product"),
        ("cudnn", "cudnnBackendFinalize", "idle"),
        ("cudnn", "cudnnDestroyPoolingDescriptor", "idle"),
        ("nccl", "ncclGetVersion", "version"),
        ("nccl", "ncclGetErrorString", "text"),
        ("nccl", "ncclDevCommCreate", "missing"),
        ("cusolver", "cusolverDnSgetrf_bufferSize", "number"),
        ("cusolver", "cusolverDnSgetrf", "product"),
        ("cusolver", "cusolverDnSetStream", "idle"),
        ("cusolver", "cusolverDnSSgesv_bufferSize", "missing"),
        ("cusolver", "cusolverDnCreateGesvdjInfo", "handle"),
        ("cusparse", "cusparseCreateCsr", "handle"),
        ("cusparse", "cusparseSpMM", "product"),
        ("cusparse", "cusparseDestroySpMat", "idle"),
        ("cusparse", "cusparseSpMM_bufferSize", "number"),
        ("cusparse", "cusparseSpMM_preprocess", "product"),
        ("cusparse", "cusparseScsrgeam2", "product"),
        ("cusparse", "cusparseDenseToSparse_bufferSize", "missing"),
        ("cufft", "cufftXtExec", "product"),
        ("cufft", "cufftSetStream", "idle"),
        ("cufft", "cufftPlan1d", "missing"),
        ("cusparseLt", "cusparseLtInit", "missing"),
        ("cudart", "cudaStreamSynchronize", "idle"),
        ("cudart", "cudaMemcpyAsync", "same"),
        ("cudart", "cudaDeviceGetLimit", "number"),
        ("cudnn", "cudnnCreateTensorDescriptor", "same"),
        ("nccl", "pncclAllReduce", "same"),
        ("nccl", "ncclAllReduce", "same"),
    ],
)
def test_what_a_function_without_implementation_does(stem, name, kind):
    assert stubs.classify(stubs.policies()[stem], name)[0] == kind


def test_an_implemented_function_gets_no_stub():
    functions = ["cublasCreate_v2", "cublasSgemm_v2"]
    text = stubs.write_assembly(stubs.policies()["cublas"], functions, ["cublasCreate_v2"], 0)
    assert "cublasSgemm_v2:" in text
    assert "cublasCreate_v2" not in text


def test_a_version_script_exports_the_names_and_nothing_else():
    script = stubs.write_version_script("libcudart.so.13", ["cudaMalloc", "cudaFree"])
    assert script == "libcudart.so.13 {\n  global:\n    cudaFree;\n    cudaMalloc;\n  local: *;\n};\n"


def test_driver_functions_are_read_with_their_binary_names():
    header = """
#define cuMemAlloc                          cuMemAlloc_v2
#define cuStreamSynchronize                 __CUDA_API_PTSZ(cuStreamSynchronize)
CUresult CUDAAPI cuInit(unsigned int Flags);
CUresult CUDAAPI cuMemAlloc(CUdeviceptr *dptr, size_t bytesize);
"""
    functions, renamings = stubs.driver_functions(header)
    assert functions == ["cuInit", "cuMemAlloc_v2"]
    assert renamings == {"cuMemAlloc": "cuMemAlloc_v2"}


def test_a_size_is_written_where_the_argument_points():
    """The second argument is in a register; the eighth lies on the stack, above the return address and the seventh.

    Where it points nowhere (null), nothing is written.
    """
    policy = stubs.Policy(1, number={"small": [(2, 4, 0)], "late": [(8, 8, 0)]}, notice=4)
    text = stubs.write_assembly(policy, ["small", "late"], [], 0)
    written = "    testq {0}, {0}\n    jz 1f\n    mov{1} $0, ({0})\n    1:\n    movl $4, %edi\n    jmp vgpu_notice@PLT"
    assert "small:\n" + written.format("%rsi", "l") in text
    assert "late:\n    movq 16(%rsp), %rax\n" + written.format("%rax", "q") in text


def test_a_number_that_is_no_size_is_written_without_a_word():
    text = stubs.write_assembly(stubs.policies()["driver"], ["cuOccupancyMaxActiveBlocksPerMultiprocessor"], [], 0)
    assert "movl $2, (%rdi)\n    1:\n    xorl %eax, %eax\n    ret" in text


@pytest.mark.parametrize(
    ("stem", "name", "other"),
    [
        ("cudart", "cudaMallocAsync", "cudaMalloc"),
        ("cudart", "cudaEventElapsedTime_v2", "cudaEventElapsedTime"),
        ("nccl", "pncclAllReduce", "ncclAllReduce"),
        ("nccl", "ncclAllReduce", "vgpu_launched"),
        ("driver", "cuLaunchKernelEx", "vgpu_launched"),
    ],
)
def test_a_function_that_another_answers_jumps_to_it(stem, name, other):
    assert f"{name}:\n    jmp {other}@PLT\n" in stubs.write_assembly(stubs.policies()[stem], [name], [], 0)
