// Where the generated stubs of missing functions end up.
#include "account.h"

extern "C" VGPU_SHARED int vgpu_refuse(const char* name, int not_supported) {
  vgpu::note_missing(name, nullptr);
  return not_supported;
}
