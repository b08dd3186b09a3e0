// Threads that work on a call together.
#pragma once

#include "hal_cpu_native.h"

namespace hal {

// Calls function(data) on up to `threads` threads at once, the calling one among them, and returns when all have
// returned. With one thread, or from inside another call, the calling thread works alone. `function` must be right for
// any number of threads.
void run_on_threads(int threads, void (*function)(void*), void* data);

void set_runner(hal_runner run);

}  // namespace hal
