#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_shuffle : require
#include "problem.glsl"

// Attention for drivers that run on the host's processor, where an invocation is a lane of a vector, a load is one load per
// lane, and storage buffers are slower than uniform ones. A lane keeps ROWS query rows and their output in registers. Each
// lane loads another piece of a key or value, and shuffles by constants, which cost one instruction, spread the pieces over
// the lanes. One dispatch per key head and chunk: what is known so far is kept as a normalised partial result and
// its ROW_SUM.

layout(constant_id = 2) const int ROWS = 8;
layout(constant_id = 3) const int BAND = 1;  // 0: every row of the dispatch reads every key of the chunk

layout(constant_id = 4) const int MASKED = 0;
layout(constant_id = 5) const int CAPPED = 0;

layout(binding = 0) readonly buffer Query { STORED query[]; };
layout(binding = 1) uniform Key { vec4 keys[4096]; };
layout(binding = 2) uniform Value { vec4 values[4096]; };
layout(binding = 3) buffer Part { vec4 part[]; };
layout(binding = 4) buffer PartSums { ROW_SUM part_sums[]; };
layout(binding = 5) readonly buffer Mask { float mask[]; };

const int STEP = 8;  // keys between two rescalings of the output

void main() {
  // The fields that other shaders use for plans and splits say which piece this dispatch works on.
  const int unit = p.plan_batch + int(gl_WorkGroupID.y), row_base = p.plan_head, key_base = p.block_q, count = p.chunk;
  const int lane = int(gl_LocalInvocationID.x), row0 = row_base + int(gl_WorkGroupID.x) * THREADS * ROWS + lane;
  vec4 q[ROWS * QUADS], o[ROWS * QUADS];
  float top[ROWS], total[ROWS];
  int first[ROWS], last[ROWS], at[ROWS], masked[ROWS];
  [[unroll]] for (int r = 0; r < ROWS; r++) {
    const int row = min(row0 + r * THREADS, p.unit_rows - 1), i = row % p.len_q;
    at[r] = unit * p.unit_rows + row;
    masked[r] = MASKED != 0 ? mask_row(unit, row) + key_base : 0;
    first[r] = i + p.lower - key_base;
    last[r] = min(i + p.upper + 1, p.len_k) - key_base;
    const ROW_SUM before = part_sums[at[r]];
    total[r] = before.y;
    top[r] = before.y > 0.0 ? before.x : -INFINITE;
    [[unroll]] for (int d = 0; d < QUADS; d++) {
      q[r * QUADS + d] = wide(query[at[r] * QUADS + d]) * p.scale;
      o[r * QUADS + d] = before.y > 0.0 ? part[at[r] * QUADS + d] * before.y : vec4(0.0);
    }
  }
  for (int key = 0; key < count; key += STEP) {
    float s[ROWS * STEP];
    [[unroll]] for (int n = 0; n < ROWS * STEP; n++) s[n] = 0.0;
    [[unroll]] for (int j0 = 0; j0 < STEP; j0 += 2)
      [[unroll]] for (int m = 0; m < QUADS; m += THREADS) {
        vec4 mine[2];
        [[unroll]] for (int j = 0; j < 2; j++) mine[j] = keys[(key + j0 + j) * QUADS + m + lane];
        [[unroll]] for (int l = 0; l < THREADS; l++) {
          vec4 x[2];
          [[unroll]] for (int j = 0; j < 2; j++) x[j] = subgroupShuffle(mine[j], l);
          [[unroll]] for (int r = 0; r < ROWS; r++) {
            const vec4 y = q[r * QUADS + m + l];
            [[unroll]] for (int j = 0; j < 2; j++)
              s[r * STEP + j0 + j] = fma(y.w, x[j].w, fma(y.z, x[j].z, fma(y.y, x[j].y, fma(y.x, x[j].x, s[r * STEP + j0 + j]))));
          }
        }
      }
    [[unroll]] for (int r = 0; r < ROWS; r++) {
      float now = top[r];
      [[unroll]] for (int j = 0; j < STEP; j++) {
        float x = s[r * STEP + j];
        if (CAPPED != 0) x = bounded_tanh(x / p.softcap) * p.softcap;
        if (MASKED != 0) x += mask[masked[r] + min(key + j, count - 1)];
        s[r * STEP + j] = x;
        if (BAND != 0) s[r * STEP + j] = key + j >= first[r] && key + j < last[r] ? x : -INFINITE;
        now = max(now, s[r * STEP + j]);
      }
      const float anchor = BAND != 0 && now == -INFINITE ? 0.0 : now;
      const float factor = exp2(max((top[r] - anchor) * LOG2E, -1e30));  // 0 where no key was read before
      top[r] = now;
      total[r] *= factor;
      [[unroll]] for (int d = 0; d < QUADS; d++) o[r * QUADS + d] *= factor;
      [[unroll]] for (int j = 0; j < STEP; j++) {
        const float weight = exp2(max((s[r * STEP + j] - anchor) * LOG2E, -1e30));
        s[r * STEP + j] = weight;
        total[r] += weight;
      }
    }
    [[unroll]] for (int m = 0; m < QUADS; m += THREADS) {
      vec4 mine[STEP];
      [[unroll]] for (int j = 0; j < STEP; j++) mine[j] = values[(key + j) * QUADS + m + lane];
      [[unroll]] for (int l = 0; l < THREADS; l++)
        [[unroll]] for (int j = 0; j < STEP; j++) {
          const vec4 x = subgroupShuffle(mine[j], l);
          [[unroll]] for (int r = 0; r < ROWS; r++)
            o[r * QUADS + m + l] = fma(vec4(s[r * STEP + j]), x, o[r * QUADS + m + l]);
        }
    }
  }
  [[unroll]] for (int r = 0; r < ROWS; r++) {
    if (row0 + r * THREADS < p.unit_rows) {
      const float factor = total[r] > 0.0 ? 1.0 / total[r] : 0.0;
      part_sums[at[r]] = ROW_SUM(top[r], total[r]);
      [[unroll]] for (int d = 0; d < QUADS; d++) part[at[r] * QUADS + d] = o[r * QUADS + d] * factor;
    }
  }
}
