// What every kind of call is checked for.
#pragma once

#include "call.hpp"

namespace hal {

// HAL_OK, the call with its derived sizes and the kernels of its instruction set; or why it cannot be run.
int checked(const hal_attention* given, Call& call, const KernelTable*& kernels);

}  // namespace hal
