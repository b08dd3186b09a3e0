#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_vote : require
#extension GL_KHR_shader_subgroup_shuffle : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "problem.glsl"
#define STORES 2
#include "matrix.glsl"

// Attention with cooperative matrices of KHR alone: scores go through shared memory, where a lane has its row and its keys,
// and come back as weights. The next keys are on their way in registers meanwhile. Online softmax: Milakov & Gimelshein
// 2018; the order of work: FlashAttention-2, Dao 2023.

const int WEIGHTS = KEYS < 24 ? KEYS / 4 + 3 : KEYS / 4 + 1;  // pitch of scores and weights, in vec4
const int SHARERS = SUBGROUP / SIDE;                          // lanes of a row
const int HELD = KEYS / 4 / SHARERS;                          // vec4 of scores that a lane has
shared vec4 weights[SUBGROUPS * TALL * WEIGHTS];

void main() {
  Place at = begin();
  load_queries();
  LEFT q[HEIGHT * DEEP];
  [[unroll]] for (int r = 0; r < HEIGHT; r++) [[unroll]] for (int k = 0; k < DEEP; k++)
    coopMatLoad(q[r * DEEP + k], tile, (base + r * SIDE) * PITCH + k * SIDE / 8, PITCH, gl_CooperativeMatrixLayoutRowMajor);
  barrier();
  SUMS o[HEIGHT * DEEP];
  [[unroll]] for (int k = 0; k < HEIGHT * DEEP; k++) o[k] = SUMS(0.0);
  const int row = lane % SIDE, side = lane / SIDE;
  const float bits = in_bits();
  float top[HEIGHT], total[HEIGHT];
  [[unroll]] for (int r = 0; r < HEIGHT; r++) {
    top[r] = LOWEST;  // finite, so that a row without a key yet gets weights of 0
    total[r] = 0.0;
  }
  const int key_tile = me * TILE, value_tile = ALONE != 0 ? key_tile : TILE;
  uvec4 fetched[OWN];
  if (there(at)) FETCH(fetched, keys, first_key(at))
  [[dont_unroll]] while (there(at)) {
    sync();
    PUT(fetched, key_tile)
    sync();
    FETCH(fetched, values, first_key(at))
    SUMS s[HEIGHT * ACROSS];
    SCORES(s, key_tile)
    [[unroll]] for (int r = 0; r < HEIGHT; r++) [[unroll]] for (int n = 0; n < ACROSS; n++)
      coopMatStore(s[r * ACROSS + n], weights, (subgroup * TALL + r * SIDE) * WEIGHTS + n * SIDE / 4, WEIGHTS,
                   gl_CooperativeMatrixLayoutRowMajor);
    subgroupBarrier();
    bool grew[HEIGHT];
    [[unroll]] for (int r = 0; r < HEIGHT; r++) {
      const int slot = (subgroup * TALL + r * SIDE + row) * WEIGHTS;
      vec4 x[HELD];
      float now = top[r];
      [[unroll]] for (int c = 0; c < HELD; c++) {
        x[c] = weights[slot + side * HELD + c];
        if (GENERAL != 0 || edge(at))
          [[unroll]] for (int d = 0; d < 4; d++)
            x[c][d] = score(x[c][d], unit, row0 + min(base + r * SIDE + row, rows - 1), first_key(at) + (side * HELD + c) * 4 + d,
                            ivec2(at.from, at.to));
        now = max(now, max(max(x[c].x, x[c].y), max(x[c].z, x[c].w)));
      }
      [[unroll]] for (int m = SIDE; m < SUBGROUP; m *= 2) now = max(now, subgroupShuffleXor(now, m));
      grew[r] = subgroupAny(now > top[r]);
      const float factor = exp2((top[r] - now) * bits);
      top[r] = now;
      total[r] *= factor;
      subgroupBarrier();
      [[unroll]] for (int c = 0; c < HELD; c += 2) {
        const vec4 y = exp2((x[c] - now) * bits), z = exp2((x[c + 1] - now) * bits);
        total[r] += y.x + y.y + y.z + y.w + z.x + z.y + z.z + z.w;
        weights[slot + (side * HELD + c) / 2] = uintBitsToFloat(uvec4(narrow(y), narrow(z)));
      }
      if (grew[r])
        [[unroll]] for (int c = 0; c < SIDE / 4; c += SHARERS) weights[slot + KEYS / 8 + c + side] = vec4(factor);
    }
    subgroupBarrier();
    LEFT w[HEIGHT * ACROSS];
    [[unroll]] for (int r = 0; r < HEIGHT; r++) {
      const int slot = (subgroup * TALL + r * SIDE) * WEIGHTS;
      if (grew[r]) {
        SUMS factor;
        coopMatLoad(factor, weights, slot + KEYS / 8, WEIGHTS, gl_CooperativeMatrixLayoutRowMajor);
        [[unroll]] for (int k = 0; k < DEEP; k++) o[r * DEEP + k] = o[r * DEEP + k] * factor;
      }
      [[unroll]] for (int n = 0; n < ACROSS; n++)
        coopMatLoad(w[r * ACROSS + n], weights, slot + n * SIDE / 8, WEIGHTS, gl_CooperativeMatrixLayoutRowMajor);
    }
    PUT(fetched, value_tile)
    at = after(at);
    if (there(at)) FETCH(fetched, keys, first_key(at))
    sync();
    GATHER(value_tile)
  }
  [[unroll]] for (int r = 0; r < HEIGHT; r++) {
    [[unroll]] for (int m = SIDE; m < SUBGROUP; m *= 2) total[r] += subgroupShuffleXor(total[r], m);
    if (side == 0) {
      tops[subgroup * TALL + r * SIDE + row] = top[r] * natural();
      totals[subgroup * TALL + r * SIDE + row] = total[r];
    }
  }
  barrier();
  WRITE()
}
