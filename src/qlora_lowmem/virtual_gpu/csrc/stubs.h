// What the functions of the replaced libraries end up in: those that are written in C++, and the generated (stubs.py).
#pragma once

#include "account.h"

#define API extern "C" VGPU_SHARED

extern "C" {

// Each returns 0, every library's code for success, but where it says otherwise.

// Says what the notice says, once.
VGPU_SHARED int vgpu_notice(uint32_t notice);

// Says once that the function is missing; returns its library's code for that.
VGPU_SHARED int vgpu_refuse(const char* name, int not_supported);

// A kernel ran, or a library's function that runs one at least: what the host wrote to a device is no longer known there.
VGPU_SHARED int vgpu_launched();

// A copy was made whose bytes are not looked at, with the same effect.
VGPU_SHARED int vgpu_copied();

// Kernels, copies and memsets that this process has submitted, or all of the machine have (account.h).
VGPU_SHARED void vgpu_read_launches(int of_all, uint64_t* counts);
VGPU_SHARED void vgpu_tune(int more);

// Handles and descriptors: zeroed memory, big enough for all of them.
VGPU_SHARED int vgpu_make(void** object);
VGPU_SHARED int vgpu_free(void* object);

// Part 0, 1 or 2 of a version, 92400 -> 9, 24, 0, as libraryPropertyType counts; `bad_value` if it is none of them.
VGPU_SHARED int vgpu_version_part(int version, int part, int* value, int bad_value);

}  // extern "C"

namespace vgpu {

constexpr size_t kObjectBytes = 512;

// What CUDA's errors are called (errors.cpp). Runtime and driver share their numbers and texts.
struct ErrorText {
  int error;
  const char* runtime_name;
  const char* driver_name;
  const char* text;
};
VGPU_SHARED const ErrorText& error_text(int error);

// Every library's code for success.
struct Success {
  template <typename Status>
  operator Status() const {
    return Status{};
  }
};

// What a function does that only tells something.
template <typename T, typename Value>
Success tell(T* where, Value value) {
  *where = static_cast<T>(value);
  return {};
}

}  // namespace vgpu
