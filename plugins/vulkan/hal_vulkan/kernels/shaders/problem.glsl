// What every attention shader is told, and how rows find their head, their keys and their mask.
// Compiled for each dtype: HALF 0 (query, key, value and results are float32), 1 (float16) and 2 (bfloat16), the latter two
// unpacked on reading, so that no 16-bit feature of the device is needed. Sums are float32.
#extension GL_EXT_control_flow_attributes : require

layout(constant_id = 0) const int HEAD_DIM = 64;  // a multiple of 32
layout(constant_id = 1) const int THREADS = 8;    // invocations of a work group
layout(local_size_x_id = 1) in;

layout(push_constant) uniform Problem {
  int len_q, len_k;      // tokens
  int unit_rows;         // query rows in a unit: len_q, or heads_per_unit * len_q
  int heads_per_unit;    // query heads that a unit holds
  int units_per_batch;   // units in a batch entry
  int group;             // query heads of one key head
  int lower, upper;      // row i reads keys i + lower to i + upper
  int mask_batch, mask_head, mask_row;  // strides of the mask, in elements; 0 broadcasts
  int plan_batch, plan_head;            // strides of the key ranges' index, in query blocks
  int block_q;           // query rows that share key ranges
  int chunk;             // keys of one split, a multiple of the key tile
  int has_mask, has_plan, splits;
  float scale;           // factor on the scores
  float softcap;         // 0 for none
} p;

const int QUADS = HEAD_DIM / 4;
const float LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;
#define INFINITE uintBitsToFloat(0x7f800000u)
#define LOWEST uintBitsToFloat(0xff7fffffu)  // the lowest finite number: masks hold it, and it is not minus infinity

#if HALF == 2
#define STORED uvec2
vec4 wide(uvec2 x) { return uintBitsToFloat(uvec4(x.x << 16, x.x & 0xffff0000u, x.y << 16, x.y & 0xffff0000u)); }
uvec2 narrow(vec4 x) {  // the upper halves, rounded to the nearest, ties to even
  const uvec4 bits = floatBitsToUint(x);
  const uvec4 rounded = mix(bits + 0x7fffu + (bits >> 16 & 1u), uvec4(0x7fc00000u), isnan(x));
  return uvec2(rounded.x >> 16 | rounded.y & 0xffff0000u, rounded.z >> 16 | rounded.w & 0xffff0000u);
}
#elif HALF == 1
#define STORED uvec2
vec4 wide(uvec2 x) { return vec4(unpackHalf2x16(x.x), unpackHalf2x16(x.y)); }
uvec2 narrow(vec4 x) { return uvec2(packHalf2x16(x.xy), packHalf2x16(x.zw)); }
#else
#define STORED vec4
vec4 wide(vec4 x) { return x; }
vec4 narrow(vec4 x) { return x; }
#endif

// What a part of the keys leaves of a row besides its normalised output: the maximum of its scores, and the sum of their
// exponentials relative to it. Their log-sum-exp would lose the sum beside a maximum near LOWEST. Sum 0: no key.
#define ROW_SUM vec2

int head_of(int unit, int row) { return unit % p.units_per_batch * p.heads_per_unit + row / p.len_q; }

// Where the mask's row for a query row of a unit begins.
int mask_row(int unit, int row) {
  return unit / p.units_per_batch * p.mask_batch + head_of(unit, row) * p.mask_head + row % p.len_q * p.mask_row;
}

// Where the key ranges of a query row's block begin in the index.
int ranges_of(int unit, int row) {
  return unit / p.units_per_batch * p.plan_batch + head_of(unit, row) * p.plan_head + row % p.len_q / p.block_q;
}

// tanh: exp(2x) would overflow, and 1 - exp(-2x) loses the digits of a small x, for which the Taylor series is used (its
// next term is below 1e-8 of the sum).
float bounded_tanh(float x) {
  const float square = x * x, e = exp(-2.0 * abs(x));
  const float series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))));
  return abs(x) < 0.25 ? x * series : sign(x) * (1.0 - e) / (1.0 + e);
}
