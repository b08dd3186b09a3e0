#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_vote : require
#extension GL_KHR_shader_subgroup_shuffle : require
#include "problem.glsl"

// Attention of few query rows, bound by reading the keys once: LANES invocations share a key, 16 bytes each, and hold their
// part of all rows of a unit and of the output in registers. A subgroup has LOADS loads of keys and of values in flight: the
// next keys are asked for once these are multiplied, the next values once these are weighed. Its LOADS x ROWS scores of a key
// group are summed by halves, so that an invocation ends with few whole ones, weighs those and hands the weights round. The
// output is scaled down only when a score passes its row's maximum so far by SLACK. Subgroups take keys in turn; what they
// found is merged at the end, in loops that stay loops: instructions that run once cost their reading from memory.
// Online softmax: Milakov & Gimelshein 2018; the lazy scaling: FlashAttention-4, 2025.

layout(constant_id = 2) const int LOADS = 4;
layout(constant_id = 3) const int ROWS = 1;
layout(constant_id = 4) const int SUBGROUP = 32;
layout(constant_id = 5) const int LANES = 16;   // a power of 2
layout(constant_id = 6) const int GENERAL = 1;  // 0: no mask, no block plan, no softcap, a positive scale

layout(binding = 0) readonly buffer Query { uvec4 query[]; };
layout(binding = 1) readonly buffer Key { uvec4 keys[]; };
layout(binding = 2) readonly buffer Value { uvec4 values[]; };
layout(binding = 3) readonly buffer Mask { float mask[]; };
layout(binding = 4) readonly buffer Index { int range_index[]; };
layout(binding = 5) readonly buffer Bounds { ivec2 ranges[]; };
#include "arriving.glsl"
#include "score.glsl"

#if HALF
const int HELD = 2;  // vec4 of 16 bytes
vec4 wide_part(uvec4 x, int n) { return wide(n == 0 ? x.xy : x.zw); }
#else
const int HELD = 1;
vec4 wide_part(uvec4 x, int n) { return uintBitsToFloat(x); }
#endif

const int WIDE = QUADS / HELD;                   // loads of 16 bytes in a row
const int PIECES = (WIDE + LANES - 1) / LANES;   // of them that a lane has
const int OWN = PIECES * HELD;                   // vec4 of a row that a lane has
const int TOGETHER = SUBGROUP / LANES;           // keys of a load
const int SUBGROUPS = THREADS / SUBGROUP, SPAN = SUBGROUPS * LOADS * TOGETHER;
const int SCORES = LOADS * ROWS;                           // powers of 2
const int WHOLE = SCORES > LANES ? SCORES / LANES : 1;     // scores that an invocation ends with
const int COPIES = SCORES > LANES ? 1 : LANES / SCORES;    // invocations that end with the same
const float SLACK = 8.0;
shared vec4 outs[SUBGROUPS * ROWS * QUADS];
shared float tops[SUBGROUPS * ROWS], totals[SUBGROUPS * ROWS];

// sum + dot(x, y), so that nothing is left to add up across the four.
float dotted(vec4 x, vec4 y, float sum) { return fma(x.w, y.w, fma(x.z, y.z, fma(x.y, y.y, fma(x.x, y.x, sum)))); }

// Where load `n` of this invocation lies for the keys from `key` on, the unit's first key being row `key_row`; beyond the last
// key, the last one's.
int place(int key_row, int key, int n) {
  const int lane = int(gl_SubgroupInvocationID), mine = (int(gl_SubgroupID) * LOADS + n / PIECES) * TOGETHER + lane / LANES;
  return (key_row + min(key + mine, p.len_k - 1)) * WIDE + min(n % PIECES * LANES + lane % LANES, WIDE - 1);
}

void main() {
  const int unit = int(gl_WorkGroupID.y), split = int(gl_WorkGroupID.z), row0 = int(gl_WorkGroupID.x) * ROWS;
  const int local = int(gl_LocalInvocationID.x), subgroup = int(gl_SubgroupID), lane = int(gl_SubgroupInvocationID);
  const int rows = min(ROWS, p.unit_rows - row0), at_lane = lane % LANES, mine = subgroup * LOADS * TOGETHER + lane / LANES;
  const int key_row = unit * p.heads_per_unit / p.group * p.len_k;
  // Scores are in powers of 2 without GENERAL, else in natural units.
  const float factor_q = GENERAL != 0 ? 1.0 : in_bits(), bits = GENERAL != 0 ? LOG2E : 1.0, slack = SLACK / bits;
  vec4 q[ROWS * OWN], o[ROWS * OWN];
  float top[ROWS], own_top[WHOLE], total[WHOLE];  // maxima by row, the same in the subgroup, and for this invocation's scores
  const int mine0 = at_lane / COPIES * WHOLE;      // the first of its scores, numbered by load and row
  [[unroll]] for (int j = 0; j < WHOLE; j++) {
    own_top[j] = LOWEST;  // finite, so that a row without a key yet gets weights of 0
    total[j] = 0.0;
  }
  [[unroll]] for (int r = 0; r < ROWS; r++) {
    top[r] = LOWEST;
    [[unroll]] for (int n = 0; n < PIECES; n++) {
      const int c = n * LANES + at_lane;
      const uvec4 x = c < WIDE ? query[(unit * p.unit_rows + row0 + min(r, rows - 1)) * WIDE + c] : uvec4(0);
      [[unroll]] for (int h = 0; h < HELD; h++) {
        q[r * OWN + n * HELD + h] = wide_part(x, h) * factor_q;
        o[r * OWN + n * HELD + h] = vec4(0.0);
      }
    }
  }
  const int low = max(p.lower, 0), high = min(p.len_q + p.upper, p.len_k);
  const int inner_low = p.len_q - 1 + p.lower, inner_high = min(p.upper + 1, p.len_k);
  const bool planned = GENERAL != 0 && p.has_plan != 0;
  const int index = planned ? ranges_of(unit, row0) : 0;
  const int begin = planned ? range_index[index] : 0, end = planned ? range_index[index + 1] : 1;
  for (int range = begin; range < end; range++) {
    ivec2 within = ivec2(low, high);
    if (planned) within = ivec2(max(within.x, ranges[range].x), min(within.y, ranges[range].y));
    uvec4 k[LOADS * PIECES], v[LOADS * PIECES];
    const int start = within.x + split * SPAN, step = p.splits * SPAN;  // splits take turns
    [[unroll]] for (int m = 0; m < LOADS * PIECES; m++) k[m] = keys[place(key_row, start, m)];
    [[unroll]] for (int m = 0; m < LOADS * PIECES; m++) v[m] = values[place(key_row, start, m)];
    [[dont_unroll]] for (int key = start; key < within.y; key += step) {
      float s[LOADS * ROWS];
      [[unroll]] for (int u = 0; u < LOADS; u++) [[unroll]] for (int r = 0; r < ROWS; r++) {
        float sum = 0.0;
        [[unroll]] for (int n = 0; n < OWN; n++) sum = dotted(wide_part(k[u * PIECES + n / HELD], n % HELD), q[r * OWN + n], sum);
        s[u * ROWS + r] = sum;
      }
      [[unroll]] for (int m = 0; m < LOADS * PIECES; m++) k[m] = keys[place(key_row, key + step, m)];
      [[unroll]] for (int fold = 1; fold < 8; fold++) {  // LANES is at most 128
        const int m = LANES >> fold, pairs = SCORES >> fold;
        if (m > 0 && pairs > 0) {
          const bool upper = (lane & m) != 0;
          [[unroll]] for (int n = 0; n < pairs; n++) {
            const float kept = upper ? s[n + pairs] : s[n], sent = upper ? s[n] : s[n + pairs];
            s[n] = kept + subgroupShuffleXor(sent, m);
          }
        } else if (m > 0) {
          s[0] += subgroupShuffleXor(s[0], m);
        }
      }
      bool far = false;
      [[unroll]] for (int j = 0; j < WHOLE; j++) {
        if (GENERAL != 0 || key < max(inner_low, within.x) || key + SPAN > min(inner_high, within.y))
          s[j] = score(s[j], unit, row0 + min((mine0 + j) % ROWS, rows - 1), key + mine + (mine0 + j) / ROWS * TOGETHER, within);
        far = far || s[j] > own_top[j] + slack;
      }
      if (subgroupAny(far)) {
        [[unroll]] for (int r = 0; r < ROWS; r++) {
          float now = top[r];
          [[unroll]] for (int j = 0; j < WHOLE; j++) now = (mine0 + j) % ROWS == r ? max(now, s[j]) : now;
          [[unroll]] for (int m = 1; m < SUBGROUP; m *= 2) now = max(now, subgroupShuffleXor(now, m));
          const float factor = exp2((top[r] - now) * bits);
          top[r] = now;
          [[unroll]] for (int n = 0; n < OWN; n++) o[r * OWN + n] *= factor;
          [[unroll]] for (int j = 0; j < WHOLE; j++) {
            if ((mine0 + j) % ROWS == r) {
              own_top[j] = now;
              total[j] *= factor;
            }
          }
        }
      }
      float w[WHOLE];
      [[unroll]] for (int j = 0; j < WHOLE; j++) {
        w[j] = exp2((s[j] - own_top[j]) * bits);
        total[j] += w[j];
      }
      [[unroll]] for (int n = 0; n < SCORES; n++)
        s[n] = subgroupShuffle(w[n % WHOLE], lane / LANES * LANES + n / WHOLE * COPIES);
      [[unroll]] for (int u = 0; u < LOADS; u++) [[unroll]] for (int n = 0; n < OWN; n++) {
        const vec4 x = wide_part(v[u * PIECES + n / HELD], n % HELD);
        [[unroll]] for (int r = 0; r < ROWS; r++) o[r * OWN + n] = fma(vec4(s[u * ROWS + r]), x, o[r * OWN + n]);
      }
      [[unroll]] for (int m = 0; m < LOADS * PIECES; m++) v[m] = values[place(key_row, key + step, m)];
    }
  }
  [[unroll]] for (int r = 0; r < ROWS; r++) {
    float sum = 0.0;
    [[unroll]] for (int j = 0; j < WHOLE; j++) sum += (mine0 + j) % ROWS == r && at_lane % COPIES == 0 ? total[j] : 0.0;
    [[unroll]] for (int m = 1; m < SUBGROUP; m *= 2) sum += subgroupShuffleXor(sum, m);
    [[unroll]] for (int m = LANES; m < SUBGROUP; m *= 2)
      [[unroll]] for (int n = 0; n < OWN; n++) o[r * OWN + n] += subgroupShuffleXor(o[r * OWN + n], m);
    if (lane < LANES)
      [[unroll]] for (int n = 0; n < OWN; n++) {
        const int c = (n / HELD * LANES + at_lane) * HELD + n % HELD;
        if (c < QUADS) outs[(subgroup * ROWS + r) * QUADS + c] = o[r * OWN + n];
      }
    if (lane == 0) {
      tops[subgroup * ROWS + r] = GENERAL != 0 ? top[r] : top[r] * LN2;
      totals[subgroup * ROWS + r] = sum;
    }
  }
  barrier();
  [[dont_unroll]] for (int m = local; m < rows * QUADS; m += THREADS) {
    const int r = m / QUADS, c = m % QUADS;
    float best = -INFINITE, sum = 0.0;
    vec4 whole = vec4(0.0);
    [[dont_unroll]] for (int n = 0; n < SUBGROUPS; n++) if (totals[n * ROWS + r] > 0.0) best = max(best, tops[n * ROWS + r]);
    [[dont_unroll]] for (int n = 0; n < SUBGROUPS; n++) {
      const float factor = totals[n * ROWS + r] > 0.0 ? exp2((tops[n * ROWS + r] - best) * LOG2E) : 0.0;
      sum += factor * totals[n * ROWS + r];
      whole += factor * outs[(n * ROWS + r) * QUADS + c];
    }
    whole *= sum > 0.0 ? 1.0 / sum : 0.0;
    leave(unit * p.unit_rows + row0 + r, c, whole, ROW_SUM(best, sum));
  }
  arrive(unit * p.unit_rows + row0, rows);
}
