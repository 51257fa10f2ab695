// Which process a number means, and which program runs in it.
#pragma once

#include <cstdint>

namespace vgpu {

struct ProcessIdentity {
  char state = 'X';  // as ps shows it; X: there is none
  uint64_t start_ticks = 0;
  uint64_t image = 0;  // changes when it calls exec; 0: this process may not know
};

ProcessIdentity identify(int pid);

}  // namespace vgpu
