#include "stubs.h"

#include <cstdlib>

#include "written.h"

int vgpu_refuse(const char* name, int not_supported) {
  vgpu::note_missing(name, nullptr);
  return not_supported;
}

int vgpu_launched() {
  vgpu::count_launch(vgpu::kKernel);
  vgpu::forget_written();
  return 0;
}

int vgpu_copied() {
  vgpu::count_launch(vgpu::kCopy);
  vgpu::forget_written();
  return 0;
}

void vgpu_tune(int more) { vgpu::tune(more); }

void vgpu_read_launches(int of_all, uint64_t* counts) { vgpu::read_launches(of_all != 0, counts); }

int vgpu_make(void** object) { return vgpu::tell(object, calloc(1, vgpu::kObjectBytes)); }

int vgpu_free(void* object) {
  free(object);
  return 0;
}

int vgpu_version_part(int version, int part, int* value, int bad_value) {
  int parts[] = {version / 10000, version / 100 % 100, version % 100};
  return part < 0 || part > 2 ? bad_value : vgpu::tell(value, parts[part]);
}
