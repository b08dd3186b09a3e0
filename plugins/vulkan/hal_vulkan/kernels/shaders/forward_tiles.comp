#version 450
#extension GL_GOOGLE_include_directive : require
#include "problem.glsl"

// Attention with tiles in shared memory. A work group takes ROWS query rows against tiles of TILE keys; an invocation holds
// HEIGHT rows x COLUMNS keys of the scores, and HEIGHT rows x OWN float4 of the output. Rows of shared memory are padded
// by one float4, so that neighbours read from different banks. Online softmax: Milakov & Gimelshein 2018.

layout(constant_id = 2) const int ROWS = 8;
layout(constant_id = 3) const int TILE = 32;
layout(constant_id = 4) const int HEIGHT = 8;

layout(binding = 0) readonly buffer Query { STORED query[]; };
layout(binding = 1) readonly buffer Key { STORED keys[]; };
layout(binding = 2) readonly buffer Value { STORED values[]; };
layout(binding = 3) readonly buffer Mask { float mask[]; };
layout(binding = 4) readonly buffer Index { int range_index[]; };
layout(binding = 5) readonly buffer Bounds { ivec2 ranges[]; };
layout(binding = 6) writeonly buffer Out { STORED result[]; };
layout(binding = 7) writeonly buffer Lse { float lse[]; };  // a ROW_SUM per split and row where the keys are split
layout(binding = 8) writeonly buffer Part { vec4 part[]; };

const int ACROSS = THREADS * HEIGHT / ROWS;  // invocations that share a row
const int COLUMNS = TILE / ACROSS;
const int PITCH = QUADS + 1;
const int WEIGHTS = TILE / 4 + 1;
const int OWN = (QUADS + ACROSS - 1) / ACROSS;

shared vec4 q[ROWS * PITCH];
shared vec4 kv[TILE * PITCH];
shared float weights[ROWS * WEIGHTS * 4];
shared float shared_rows[ROWS * ACROSS];

void main() {
  const int unit = int(gl_WorkGroupID.y), split = int(gl_WorkGroupID.z), row0 = int(gl_WorkGroupID.x) * ROWS;
  const int local = int(gl_LocalInvocationID.x), across = local % ACROSS, down = local / ACROSS * HEIGHT;
  const int rows = min(ROWS, p.unit_rows - row0), key_unit = unit * p.heads_per_unit / p.group;
  for (int n = local; n < ROWS * QUADS; n += THREADS) {
    const int row = n / QUADS, quad = n % QUADS;
    q[row * PITCH + quad] = wide(query[(unit * p.unit_rows + row0 + min(row, rows - 1)) * QUADS + quad]) * p.scale;
  }
  vec4 o[HEIGHT * OWN];
  float top[HEIGHT], total[HEIGHT];
  int first[HEIGHT], last[HEIGHT];
  [[unroll]] for (int r = 0; r < HEIGHT; r++) {
    const int i = min(row0 + down + r, p.unit_rows - 1) % p.len_q;
    [[unroll]] for (int m = 0; m < OWN; m++) o[r * OWN + m] = vec4(0.0);
    top[r] = -INFINITE;
    total[r] = 0.0;
    first[r] = max(i + p.lower, 0);
    last[r] = min(i + p.upper + 1, p.len_k);
  }
  const bool one_head = row0 / p.len_q == (row0 + rows - 1) / p.len_q;  // then its first and last row bound the keys
  int low = max((one_head ? row0 % p.len_q : 0) + p.lower, 0);
  int high = min((one_head ? (row0 + rows - 1) % p.len_q : p.len_q - 1) + p.upper + 1, p.len_k);
  low = max(low, split * p.chunk);
  high = min(high, split * p.chunk + p.chunk);
  const int place = p.has_plan != 0 ? ranges_of(unit, row0) : 0;
  const int begin = p.has_plan != 0 ? range_index[place] : 0, end = p.has_plan != 0 ? range_index[place + 1] : 1;
  for (int n = begin; n < end; n++) {
    int from = low, to = high;
    if (p.has_plan != 0) {
      from = max(from, ranges[n].x);
      to = min(to, ranges[n].y);
    }
    for (int key = from / TILE * TILE; key < to; key += TILE) {
      const int at = key_unit * p.len_k + key, most = p.len_k - key - 1;
      barrier();
      for (int m = local; m < TILE * QUADS; m += THREADS)
        kv[m / QUADS * PITCH + m % QUADS] = wide(keys[(at + min(m / QUADS, most)) * QUADS + m % QUADS]);
      barrier();
      float s[HEIGHT * COLUMNS];
      [[unroll]] for (int m = 0; m < HEIGHT * COLUMNS; m++) s[m] = 0.0;
      for (int d = 0; d < QUADS; d++) {
        vec4 y[COLUMNS];
        [[unroll]] for (int c = 0; c < COLUMNS; c++) y[c] = kv[(c * ACROSS + across) * PITCH + d];
        [[unroll]] for (int r = 0; r < HEIGHT; r++) {
          const vec4 x = q[(down + r) * PITCH + d];
          [[unroll]] for (int c = 0; c < COLUMNS; c++)
            s[r * COLUMNS + c] = fma(x.x, y[c].x, fma(x.y, y[c].y, fma(x.z, y[c].z, fma(x.w, y[c].w, s[r * COLUMNS + c]))));
        }
      }
      [[unroll]] for (int r = 0; r < HEIGHT; r++) {
        const int start = max(from, first[r]), stop = min(to, last[r]);
        const int masked = p.has_mask != 0 ? mask_row(unit, min(row0 + down + r, p.unit_rows - 1)) + key : 0;
        float highest = -INFINITE;
        [[unroll]] for (int c = 0; c < COLUMNS; c++) {
          const int j = c * ACROSS + across;
          float x = s[r * COLUMNS + c];
          if (p.softcap > 0.0) x = bounded_tanh(x / p.softcap) * p.softcap;
          if (p.has_mask != 0) x += mask[masked + min(j, most)];
          x = key + j >= start && key + j < stop ? x : -INFINITE;
          s[r * COLUMNS + c] = x;
          highest = max(highest, x);
        }
        shared_rows[(down + r) * ACROSS + across] = highest;
      }
      barrier();
      for (int m = local; m < TILE * QUADS; m += THREADS)
        kv[m / QUADS * PITCH + m % QUADS] =
            m / QUADS <= most ? wide(values[(at + min(m / QUADS, most)) * QUADS + m % QUADS]) : vec4(0.0);
      [[unroll]] for (int r = 0; r < HEIGHT; r++) {
        float now = top[r];
        for (int a = 0; a < ACROSS; a++) now = max(now, shared_rows[(down + r) * ACROSS + a]);
        const float anchor = now == -INFINITE ? 0.0 : now;  // no key yet: exp2(-inf) = 0, not exp2(nan)
        const float factor = top[r] == -INFINITE ? 0.0 : exp2((top[r] - anchor) * LOG2E);
        top[r] = now;
        total[r] *= factor;
        [[unroll]] for (int m = 0; m < OWN; m++) o[r * OWN + m] *= factor;
        [[unroll]] for (int c = 0; c < COLUMNS; c++) {
          const float x = s[r * COLUMNS + c];
          const float weight = x == -INFINITE ? 0.0 : exp2((x - anchor) * LOG2E);
          total[r] += weight;  // of this invocation's keys; the row's are added up at the end
          weights[(down + r) * WEIGHTS * 4 + c * ACROSS + across] = weight;
        }
      }
      barrier();
      for (int j = 0; j < TILE; j += 4) {
        vec4 w[HEIGHT];
        [[unroll]] for (int r = 0; r < HEIGHT; r++) {
          const int from_row = (down + r) * WEIGHTS * 4 + j;
          w[r] = vec4(weights[from_row], weights[from_row + 1], weights[from_row + 2], weights[from_row + 3]);
        }
        [[unroll]] for (int m = 0; m < OWN; m++) {
          const int quad = min(m * ACROSS + across, QUADS - 1);
          const vec4 v0 = kv[j * PITCH + quad], v1 = kv[(j + 1) * PITCH + quad];
          const vec4 v2 = kv[(j + 2) * PITCH + quad], v3 = kv[(j + 3) * PITCH + quad];
          [[unroll]] for (int r = 0; r < HEIGHT; r++)
            o[r * OWN + m] = fma(vec4(w[r].x), v0, fma(vec4(w[r].y), v1, fma(vec4(w[r].z), v2, fma(vec4(w[r].w), v3, o[r * OWN + m]))));
        }
      }
    }
  }
  barrier();
  [[unroll]] for (int r = 0; r < HEIGHT; r++) shared_rows[(down + r) * ACROSS + across] = total[r];
  barrier();
  [[unroll]] for (int r = 0; r < HEIGHT; r++) {
    float sum = 0.0;
    for (int a = 0; a < ACROSS; a++) sum += shared_rows[(down + r) * ACROSS + a];
    const int row = unit * p.unit_rows + row0 + down + r, all = int(gl_NumWorkGroups.y) * p.unit_rows;
    const float factor = sum > 0.0 ? 1.0 / sum : 0.0;
    if (down + r < rows) {
      if (across == 0 && p.splits > 1) {
        lse[2 * (split * all + row)] = top[r];
        lse[2 * (split * all + row) + 1] = sum;
      } else if (across == 0) {
        lse[row] = sum > 0.0 ? top[r] + log2(sum) * LN2 : -INFINITE;
      }
      [[unroll]] for (int m = 0; m < OWN; m++) {
        const int quad = m * ACROSS + across;
        if (quad < QUADS) {
          if (p.splits > 1) part[(split * all + row) * QUADS + quad] = o[r * OWN + m] * factor;
          else result[row * QUADS + quad] = narrow(o[r * OWN + m] * factor);
        }
      }
    }
  }
}
