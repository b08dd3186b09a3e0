// The kernels of fields for AVX-512 (F, BW, VL, DQ) with FMA.
#include "field_rows.hpp"

namespace hal {

const FieldKernels& avx512_field_kernels() {
  static const FieldKernels table = field_kernels<16>();
  return table;
}

}  // namespace hal
