// The kernels of fields for AVX2 with FMA.
#include "field_rows.hpp"

namespace hal {

const FieldKernels& avx2_field_kernels() {
  static const FieldKernels table = field_kernels<8>();
  return table;
}

}  // namespace hal
