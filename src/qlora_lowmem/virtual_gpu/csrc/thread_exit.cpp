// Python before 3.14 ends a thread that asks for the interpreter while it shuts down with pthread_exit, which unwinds the
// thread's stack. Autograd's threads ask for it when they drop their last tensors, from functions that may not be
// unwound: the process then aborts ("terminate called without an active exception") although the program had succeeded.
// A real card leaves those threads time; here a step takes milliseconds, and a short script meets them every few runs.
// As Python does from 3.14 on, such a thread is left waiting instead: the process is about to end.
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include "account.h"

namespace {

bool python_is_finalizing() {
  using Question = int (*)();
  void* found = dlsym(RTLD_DEFAULT, "Py_IsFinalizing");
  if (found == nullptr) found = dlsym(RTLD_DEFAULT, "_Py_IsFinalizing");  // until Python 3.12
  return found != nullptr && reinterpret_cast<Question>(found)() != 0;
}

}  // namespace

extern "C" VGPU_SHARED void pthread_exit(void* result) {
  if (python_is_finalizing()) {
    for (;;) pause();
  }
  using Exit = void (*)(void*);
  static Exit real = reinterpret_cast<Exit>(dlsym(RTLD_NEXT, "pthread_exit"));
  real(result);
  __builtin_unreachable();
}
