// Fields on grids: what the kernels of each instruction set share.
#pragma once

#include <cstdint>

namespace hal {

// Rows that one task works on: with both fields, old and new, they stay in a core's cache.
constexpr int64_t kBandRows = 32;
// Floats before the first row and after the last one in the workspace: room for whole vectors and for neighbours.
constexpr int64_t kMargin = 16;

// A field of `height` rows at distance `stride`. Where `framed`, value -1 of a row is its last one and value `width` its
// first one, and whole vectors may be read up to kMargin beyond the last row.
struct Field {
  float* values;
  int64_t stride;
  bool framed;
};

// dt * reaction and what belongs to it, as reaction_diffusion_step writes its step: new u = share_u * u + rate_u * S(u)
// - r (u^3 + v), new v = share_v * v + rate_v * S(v) + s * u + constant, with S the (1, 2, 1) x (1, 2, 1) sum.
struct Reaction {
  float rate_u, rate_v, share_u, share_v, r, s, constant;
  bool reacts;
};

// Each fills rows first to last - 1 of the new fields. Old fields are framed.
struct FieldKernels {
  void (*reaction_diffusion)(const Reaction&, const Field old[2], const Field now[2], int64_t height, int64_t width, int64_t first, int64_t last);
  void (*ricci)(float dt, const Field& old, const Field& now, int64_t height, int64_t width, int64_t first, int64_t last);
  // Corners minus edges plus pixels at grid rows first to last - 1 (0 to height), into `parts`. bits: 2 lines of
  // `width / 64 + 2` words.
  void (*euler)(const float* field, float level, int32_t* parts, uint64_t* bits, int64_t height, int64_t width, int64_t first, int64_t last);
};

const FieldKernels& avx2_field_kernels();
const FieldKernels& avx512_field_kernels();

}  // namespace hal
