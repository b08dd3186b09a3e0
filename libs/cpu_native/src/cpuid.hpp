// Which instruction sets this processor has.
#pragma once

#include "hal_cpu_native.h"

namespace hal {

// The highest enum hal_isa that can run here; 0: none.
int best_isa();

// The one that AUTO takes: the fastest of them.
int preferred_isa();

}  // namespace hal
