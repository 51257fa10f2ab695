// What a user is told of a run, each once on a virtual machine; account.cpp keeps what was told.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "stubs.h"

namespace vgpu {
namespace {

// Set by worker/vgpu_hooks.py; a forked child has what its parent had.
bool hooked = false;

bool quiet() {
  const char* value = getenv("QLORA_LOWMEM_QUIET");
  return value != nullptr && *value != 0 && strcmp(value, "0") != 0;
}

const char* text_of(uint32_t notice) {
  switch (notice) {
    case kNcclBuffers: return "NCCL's own buffers are not known here, and not in the peak";
    case kDnnWorkspaces: return "the workspaces of cuDNN's older functions (RNNs: an estimate) may be larger on a card";
    case kSolverWorkspaces: return "cuSOLVER's workspaces are not known here, and not in the peak";
    case kSparseWorkspaces: return "cuSPARSE's workspaces are not known here, and not in the peak";
    case kFftWorkspaces: return "cuFFT's workspaces are not known here, and not in the peak";
    case kNoHooks:
      return "a process uses PyTorch without the hooks in PYTHONPATH (it was changed, or python got -I, -E or -S): its "
             "masks select nothing, and its allocator's peaks are not in the report";
    case kValuesRead:
      return "this program reads values back from the card; they are not real (zeros), only the memory is. "
             "QLORA_LOWMEM_QUIET=1 hides this line.";
    default: return "";
  }
}

}  // namespace

// A process that lost PYTHONPATH on its way is on the virtual machine, but sees zeros where the worst case should be.
void tell_if_without_hooks() {
  static bool asked = false;
  if (hooked || asked) return;
  asked = true;
  if (void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
    dlclose(torch);
    vgpu_notice(kNoHooks);
  }
}

void note_missing(const char* name, const char* why) {
  if (!first_call_of_missing(name)) return;
  fprintf(stderr, "virtual GPU: the program called %s, which is not implemented%s%s\n", name,
          why == nullptr ? "; " : ": ", why == nullptr ? "report it at the project's issue tracker with this line" : why);
}

void note_linked_runtime(const char* library) {
  if (!first_notice(kStaticRuntime) || quiet()) return;
  fprintf(stderr,
          "virtual GPU: %s has the CUDA runtime linked into it (libcudart_static), which finds no card here: what it "
          "allocates and launches fails. Build it with the shared runtime (nvcc -cudart shared).\n", library);
}

}  // namespace vgpu

using namespace vgpu;

int vgpu_notice(uint32_t notice) {
  if (first_notice(notice) && !quiet()) fprintf(stderr, "virtual GPU: %s\n", text_of(notice));
  return 0;
}

// Tells the launcher that this process is on the machine, whatever it goes on to do. It is no call for a card yet: the
// account is not kept mapped. Also called by worker/vgpu_server.py, whose children get their account after the fork.
extern "C" VGPU_SHARED __attribute__((constructor)) void vgpu_say_in_force() {
  const char* name = getenv("VGPU_ACCOUNT");
  int file = name == nullptr ? -1 : open(name, O_RDWR | O_CLOEXEC);
  if (file < 0) return;
  off_t size = lseek(file, 0, SEEK_END);
  void* memory = MAP_FAILED;
  if (size >= static_cast<off_t>(sizeof(Account))) {
    memory = mmap(nullptr, sizeof(Account), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  close(file);
  if (memory == MAP_FAILED) return;
  auto* found = static_cast<Account*>(memory);
  bool ours = memcmp(found->magic, "VGPUACC", 8) == 0 && found->layout_version == kLayoutVersion;
  if (ours) __atomic_fetch_or(&found->notices, kInForce, __ATOMIC_RELAXED);
  munmap(memory, sizeof(Account));
}

extern "C" VGPU_SHARED void vgpu_hooks_are_in() { hooked = true; }
