#include "identity.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace vgpu {

// Fields 3, 22 and 26 to 28 (where code and stack lie) of /proc/PID/stat; the name before them may hold spaces and
// brackets.
ProcessIdentity identify(int pid) {
  char file[64], text[1024];
  snprintf(file, sizeof file, "/proc/%d/stat", pid);
  int fd = open(file, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return {};
  ssize_t length = read(fd, text, sizeof text - 1);
  close(fd);
  if (length <= 0) return {};
  text[length] = 0;
  char* field = strrchr(text, ')');
  if (field == nullptr) return {};
  ProcessIdentity identity;
  identity.state = field[2];
  uint64_t numbers[29] = {};
  for (int i = 2; i < 28 && field != nullptr; ++i) {
    field = strchr(field + 1, ' ');
    if (field != nullptr) numbers[i + 1] = strtoull(field + 1, nullptr, 10);
  }
  identity.start_ticks = numbers[22];
  if (numbers[28] != 0) identity.image = (numbers[26] * 31 + numbers[27]) * 31 + numbers[28];
  return identity;
}

}  // namespace vgpu
