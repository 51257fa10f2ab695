// The one kind of lock here. A child that is forked while another thread holds it finds it free, and what it guards in
// order: the thread that forks takes it first, and in the child, where that thread is the only one, makes it anew.
#pragma once

#include <pthread.h>

namespace vgpu {

// `pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;` of a file, held while the object lives: `Guard<mutex> guard;`.
//
// Forking takes the mutexes in the reverse order of their registration, when the libraries are loaded. Where one is
// taken under another (driver_memory.cpp, then memory.cpp, then account.cpp), the inner one's file is loaded first:
// libcuda.so.1 needs libvgpu.so, and within that the linker is given account.cpp first.
template <pthread_mutex_t& mutex>
class Guard {
 public:
  Guard() {
    (void)fork_handlers;
    pthread_mutex_lock(&mutex);
  }
  ~Guard() { pthread_mutex_unlock(&mutex); }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  static inline const int fork_handlers =
      pthread_atfork([] { pthread_mutex_lock(&mutex); }, [] { pthread_mutex_unlock(&mutex); },
                     [] { pthread_mutex_init(&mutex, nullptr); });
};

}  // namespace vgpu
