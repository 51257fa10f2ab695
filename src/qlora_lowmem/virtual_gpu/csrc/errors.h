// What CUDA's errors are called. Runtime and driver share their numbers and texts.
#pragma once

#include "account.h"

namespace vgpu {

struct ErrorText {
  int error;
  const char* runtime_name;
  const char* driver_name;
  const char* text;
};
VGPU_SHARED const ErrorText& error_text(int error);

}  // namespace vgpu
