"""The libraries themselves, called without PyTorch."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lowmem.virtual_gpu import Card, build, discovery, get_card, run, stubs

CSRC = Path(build.__file__).with_name("csrc")

# Calls that hold a lock for milliseconds run in a thread while this process forks. The child must get the lock.
FORKS = """
import ctypes, os, random, sys, threading, time

runtime, driver = ctypes.CDLL("libcudart.so.{major}"), ctypes.CDLL("libcuda.so.1")
number = ctypes.c_uint64
assert runtime.cudaFree(None) == 0

def register(address):
    runtime.__cudaRegisterFunction(number(address), number(address), *[None] * 3, 0, *[None] * 5)

def sort_kernels():
    register(1)
    runtime.cudaFuncGetAttributes(attributes, number(2))

def unmap():
    assert driver.cuMemUnmap(base, number(pages << 21)) == 0

if sys.argv[1] == "runtime":
    attributes = ctypes.create_string_buffer(4096)
    for _ in range(100_000):
        register(random.getrandbits(40))
    prepare, hold, ask = (lambda: None), sort_kernels, lambda: register(3)
else:
    base, handle, pages = number(), number(), 20_000
    properties = (ctypes.c_int * 8)(1, 0, 1, 0)  # pinned memory on device 0
    assert driver.cuMemAddressReserve(ctypes.byref(base), number(pages << 21), number(0), number(0), number(0)) == 0
    assert driver.cuMemCreate(ctypes.byref(handle), number(2 << 20), properties, number(0)) == 0

    def prepare():
        for page in range(pages):
            place = number(base.value + (page << 21))
            assert driver.cuMemMap(place, number(2 << 20), number(0), handle, number(0)) == 0

    hold, ask = unmap, lambda: driver.cuMemRelease(number(0))

for _ in range(10):
    prepare()
    thread = threading.Thread(target=hold)
    thread.start()
    time.sleep(random.random() / 1000)
    child = os.fork()
    if child == 0:
        ask()
        os._exit(0)
    deadline = time.monotonic() + 5
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            sys.exit("a forked child waits for a lock that nobody holds")
        time.sleep(0.001)
    thread.join()
"""


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("library", ["runtime", "driver"])
def test_a_fork_while_another_thread_holds_a_lock_leaves_it_free_in_the_child(laptop: Card, library: str) -> None:
    major = int(build.ensure_built().versions["cuda"]) // 1000
    program = FORKS.replace("{major}", str(major))
    assert run([sys.executable, "-c", program, library], laptop, timeout=60).exit_code == 0


def test_every_lock_is_taken_through_the_guard_that_knows_of_forks() -> None:
    assert {path.name for path in CSRC.glob("*.*") if "pthread_mutex_lock" in path.read_text()} == {"guard.h"}


# Sizes of which some overflow when rounded to pages, some when added to what is in use, some in a product.
HUGE = """
import ctypes
runtime, driver = ctypes.CDLL("libcudart.so.{major}"), ctypes.CDLL("libcuda.so.1")
number, place = ctypes.c_uint64, ctypes.c_uint64()
properties = (ctypes.c_int * 8)(1, 0, 1, 0)  # pinned memory on device 0
assert runtime.cudaFree(None) == 0
for size in (2**64 - 1, 2**64 - 2**20, 2**64 - 2**21, 2**64 - 2**30, 2**63, 2**62 + 1):
    size, at = number(size), ctypes.byref(place)
    assert runtime.cudaMalloc(at, size), size
    assert runtime.cudaMallocManaged(at, size, 1), size
    assert runtime.cudaHostAlloc(at, size, 0), size
    assert runtime.cudaMallocPitch(at, ctypes.byref(number()), size, number(3)), size
    assert runtime.cudaHostRegister(number(4096), size, 0), size
    assert driver.cuMemAlloc_v2(at, size), size
    assert driver.cuMemCreate(at, size, properties, number(0)), size
    assert driver.cuMemAddressReserve(at, size, number(0), number(0), number(0)), size
assert runtime.cudaMallocPitch(at, ctypes.byref(number()), number(2**32), number(2**32))
"""


@pytest.mark.usefixtures("built")
def test_no_size_is_so_large_that_it_fits_again(laptop: Card) -> None:
    major = int(build.ensure_built().versions["cuda"]) // 1000
    report = run([sys.executable, "-c", HUGE.replace("{major}", str(major))], laptop, timeout=60)
    assert report.exit_code == 0
    assert report.peak_device_bytes == laptop.context_bytes
    assert (report.peak_managed_bytes, report.peak_pinned_host_bytes) == (0, 0)


# Each field of cudaDeviceProp that cudaDeviceGetAttribute also answers, by the names that driver_types.h gives both.
FIELDS = """
accessPolicyMaxWindowSize=MaxAccessPolicyWindowSize asyncEngineCount=AsyncEngineCount
canMapHostMemory=CanMapHostMemory canUseHostPointerForRegisteredMem=CanUseHostPointerForRegisteredMem
clusterLaunch=ClusterLaunch computePreemptionSupported=ComputePreemptionSupported
concurrentKernels=ConcurrentKernels concurrentManagedAccess=ConcurrentManagedAccess
cooperativeLaunch=CooperativeLaunch deferredMappingCudaArraySupported=DeferredMappingCudaArraySupported
directManagedMemAccessFromHost=DirectManagedMemAccessFromHost ECCEnabled=EccEnabled
globalL1CacheSupported=GlobalL1CacheSupported gpuDirectRDMAFlushWritesOptions=GPUDirectRDMAFlushWritesOptions
gpuDirectRDMASupported=GPUDirectRDMASupported gpuDirectRDMAWritesOrdering=GPUDirectRDMAWritesOrdering
hostNativeAtomicSupported=HostNativeAtomicSupported hostRegisterReadOnlySupported=HostRegisterReadOnlySupported
hostRegisterSupported=HostRegisterSupported integrated=Integrated ipcEventSupported=IpcEventSupport
isMultiGpuBoard=IsMultiGpuBoard l2CacheSize=L2CacheSize localL1CacheSupported=LocalL1CacheSupported
major=ComputeCapabilityMajor managedMemory=ManagedMemory maxBlocksPerMultiProcessor=MaxBlocksPerMultiprocessor
maxGridSize[0]=MaxGridDimX maxGridSize[1]=MaxGridDimY maxGridSize[2]=MaxGridDimZ
maxSurface1D=MaxSurface1DWidth maxSurface1DLayered[0]=MaxSurface1DLayeredWidth
maxSurface1DLayered[1]=MaxSurface1DLayeredLayers maxSurface2D[0]=MaxSurface2DWidth
maxSurface2D[1]=MaxSurface2DHeight maxSurface2DLayered[0]=MaxSurface2DLayeredWidth
maxSurface2DLayered[1]=MaxSurface2DLayeredHeight maxSurface2DLayered[2]=MaxSurface2DLayeredLayers
maxSurface3D[0]=MaxSurface3DWidth maxSurface3D[1]=MaxSurface3DHeight maxSurface3D[2]=MaxSurface3DDepth
maxSurfaceCubemap=MaxSurfaceCubemapWidth maxSurfaceCubemapLayered[0]=MaxSurfaceCubemapLayeredWidth
maxSurfaceCubemapLayered[1]=MaxSurfaceCubemapLayeredLayers maxTexture1D=MaxTexture1DWidth
maxTexture1DLayered[0]=MaxTexture1DLayeredWidth maxTexture1DLayered[1]=MaxTexture1DLayeredLayers
maxTexture1DMipmap=MaxTexture1DMipmappedWidth maxTexture2D[0]=MaxTexture2DWidth maxTexture2D[1]=MaxTexture2DHeight
maxTexture2DGather[0]=MaxTexture2DGatherWidth maxTexture2DGather[1]=MaxTexture2DGatherHeight
maxTexture2DLayered[0]=MaxTexture2DLayeredWidth maxTexture2DLayered[1]=MaxTexture2DLayeredHeight
maxTexture2DLayered[2]=MaxTexture2DLayeredLayers maxTexture2DLinear[0]=MaxTexture2DLinearWidth
maxTexture2DLinear[1]=MaxTexture2DLinearHeight maxTexture2DLinear[2]=MaxTexture2DLinearPitch
maxTexture2DMipmap[0]=MaxTexture2DMipmappedWidth maxTexture2DMipmap[1]=MaxTexture2DMipmappedHeight
maxTexture3D[0]=MaxTexture3DWidth maxTexture3D[1]=MaxTexture3DHeight maxTexture3D[2]=MaxTexture3DDepth
maxTexture3DAlt[0]=MaxTexture3DWidthAlt maxTexture3DAlt[1]=MaxTexture3DHeightAlt
maxTexture3DAlt[2]=MaxTexture3DDepthAlt maxTextureCubemap=MaxTextureCubemapWidth
maxTextureCubemapLayered[0]=MaxTextureCubemapLayeredWidth maxTextureCubemapLayered[1]=MaxTextureCubemapLayeredLayers
maxThreadsDim[0]=MaxBlockDimX maxThreadsDim[1]=MaxBlockDimY maxThreadsDim[2]=MaxBlockDimZ
maxThreadsPerBlock=MaxThreadsPerBlock maxThreadsPerMultiProcessor=MaxThreadsPerMultiProcessor
memoryBusWidth=GlobalMemoryBusWidth memoryPoolsSupported=MemoryPoolsSupported
memoryPoolSupportedHandleTypes=MemoryPoolSupportedHandleTypes memPitch=MaxPitch minor=ComputeCapabilityMinor
multiGpuBoardGroupID=MultiGpuBoardGroupID multiProcessorCount=MultiProcessorCount
pageableMemoryAccess=PageableMemoryAccess
pageableMemoryAccessUsesHostPageTables=PageableMemoryAccessUsesHostPageTables pciBusID=PciBusId
pciDeviceID=PciDeviceId pciDomainID=PciDomainId persistingL2CacheMaxSize=MaxPersistingL2CacheSize
regsPerBlock=MaxRegistersPerBlock regsPerMultiprocessor=MaxRegistersPerMultiprocessor
reservedSharedMemPerBlock=ReservedSharedMemoryPerBlock sharedMemPerBlock=MaxSharedMemoryPerBlock
sharedMemPerBlockOptin=MaxSharedMemoryPerBlockOptin sharedMemPerMultiprocessor=MaxSharedMemoryPerMultiprocessor
sparseCudaArraySupported=SparseCudaArraySupported streamPrioritiesSupported=StreamPrioritiesSupported
surfaceAlignment=SurfaceAlignment tccDriver=TccDriver textureAlignment=TextureAlignment
texturePitchAlignment=TexturePitchAlignment timelineSemaphoreInteropSupported=TimelineSemaphoreInteropSupported
totalConstMem=TotalConstantMemory unifiedAddressing=UnifiedAddressing warpSize=WarpSize
"""
FIELDS_UNTIL_12 = """
clockRate=ClockRate computeMode=ComputeMode cooperativeMultiDeviceLaunch=CooperativeMultiDeviceLaunch
deviceOverlap=GpuOverlap kernelExecTimeoutEnabled=KernelExecTimeout maxTexture1DLinear=MaxTexture1DLinearWidth
memoryClockRate=MemoryClockRate singleToDoublePrecisionPerfRatio=SingleToDoublePrecisionPerfRatio
"""
FIELDS_FROM_13 = """
deviceNumaConfig=NumaConfig deviceNumaId=NumaId gpuPciDeviceID=GpuPciDeviceId gpuPciSubsystemID=GpuPciSubsystemId
hostNumaId=HostNumaId hostNumaMultinodeIpcSupported=HostNumaMultinodeIpcSupported mpsEnabled=MpsEnabled
"""

FIGURES = """
#include <cuda_runtime_api.h>
#include <cstdio>
#define ROW(field, attribute) \\
  cudaDeviceGetAttribute(&value, cudaDevAttr##attribute, 0); \\
  printf("%s %lld %d\\n", #field, static_cast<long long>(p.field), value);
int main() {
  cudaDeviceProp p;
  int value;
  if (cudaGetDeviceProperties(&p, 0)) return 1;
"""


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Card], list[str]]:
    """Runs a compiled program on a card: a line `field property attribute` for every field."""
    request.getfixturevalue("built")
    folder = tmp_path_factory.mktemp("figures")
    cuda = discovery.find_cuda(frozenset(stubs.policies()))
    names = FIELDS + (FIELDS_FROM_13 if discovery.header_version(cuda.headers) >= 13000 else FIELDS_UNTIL_12)
    rows = "".join(f"  ROW({field}, {attribute})\n" for field, attribute in (pair.split("=") for pair in names.split()))
    source = folder / "figures.cpp"
    source.write_text(f"{FIGURES}{rows}}}\n")
    runtime = next(library for library in cuda.libraries if library.stem == "cudart")
    headers = ["-I", str(cuda.headers), "-idirafter", str(CSRC)]
    command = [*build.find_compiler(), "-w", *headers, str(source), str(runtime.path), "-o", str(folder / "figures")]
    subprocess.run(command, check=True)

    def read(card: Card) -> list[str]:
        with (folder / "printed").open("w") as printed:
            assert run([str(folder / "figures")], card, stdout=printed).exit_code == 0
        return (folder / "printed").read_text().splitlines()

    return read


@pytest.mark.parametrize("name", ["t4-16gb", "rtx-4050-laptop-6gb", "h100-80gb"])
def test_properties_and_attributes_of_a_device_say_the_same(figures: Callable[[Card], list[str]], name: str) -> None:
    card = get_card(name)
    said = {
        field: (int(of_properties), int(attribute)) for field, of_properties, attribute in map(str.split, figures(card))
    }
    assert {field: both for field, both in said.items() if both[0] != both[1]} == {}
    assert said["multiProcessorCount"] == (card.sm_count, card.sm_count)
    assert said["sharedMemPerBlockOptin"][0] == card.shared_per_block_optin
    assert said["maxGridSize[1]"][0] == 65535


def test_every_field_with_a_figure_is_compared(figures: Callable[[Card], list[str]], laptop: Card) -> None:
    """Of the table in attributes.cpp, none is forgotten above."""
    table = re.findall(
        r"(?:FIELD|ELEMENT)\((\w+)(?:, (\d))?\)", (CSRC / "attributes.cpp").read_text().partition("kAttributes")[2]
    )
    wanted = {f"{name}[{index}]" if index else name for name, index in table}
    assert wanted <= {line.split()[0] for line in figures(laptop)}
