#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_NV_cooperative_matrix2 : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_vote : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "problem.glsl"
layout(constant_id = 8) const int AHEAD = 1;
#define STORES (AHEAD == 1 ? 4 : 2)
#include "matrix.glsl"

// Attention with cooperative matrices of NV_cooperative_matrix2, in subgroups: masks, maxima and weights stay in registers, by
// its per-element operations, reductions and conversions. The output is scaled down only when a score passes its row's
// maximum so far by SLACK, so that weights are at most 2^SLACK and most tiles need neither a reduction nor a scaling. AHEAD:
// the scores of the next tile are made beside this tile's weights, from two sets of tiles in shared memory in turn (1) or from
// one (2). Tiles of which every row reads every key have loops of their own, without the registers that masks need.
// Online softmax: Milakov & Gimelshein 2018; the order of work: FlashAttention-2, Dao 2023; the lazy scaling and the scores
// ahead: FlashAttention-3 and 4, Shah et al. 2024, 2025.

const float SLACK = 8.0;  // float16 holds 2^15

#if HALF == 2  // the conversion to bfloat16 was seen to cut the lower half off
#define ROUNDED(x) uintBitsToFloat(floatBitsToUint(x) + 0x8000u & 0xffff0000u)
#else
#define ROUNDED(x) (x)
#endif

float larger(const in float x, const in float y) { return max(x, y); }
float added(const in float x, const in float y) { return x + y; }
float scored(const in uint row, const in uint column, const in float x, const in int first, const in int key, const in ivec2 range) {
  return score(x, unit, row0 + min(first + int(row), rows - 1), key + int(column), range);
}

// Apply what hides and changes scores.
#define MASK(s, at)                                                                                             \
  if (GENERAL != 0 || edge(at))                                                                                 \
    [[unroll]] for (int r = 0; r < HEIGHT; r++) [[unroll]] for (int n = 0; n < ACROSS; n++)                     \
      coopMatPerElementNV(s[r * ACROSS + n], s[r * ACROSS + n], scored, base + r * SIDE, first_key(at) + n * SIDE, \
                          ivec2(at.from, at.to));

// Raise the maxima where a score is far above.
#define RAISE(s)                                                                                                \
  [[unroll]] for (int r = 0; r < HEIGHT; r++) {                                                                 \
    SUMS now = s[r * ACROSS];                                                                                   \
    bool far = false;                                                                                           \
    [[unroll]] for (int n = 1; n < ACROSS; n++)                                                                 \
      [[unroll]] for (int e = 0; e < now.length(); e++) now[e] = max(now[e], s[r * ACROSS + n][e]);             \
    [[unroll]] for (int e = 0; e < now.length(); e++) far = far || now[e] > top[r][e] + slack;                  \
    if (subgroupAny(far)) {                                                                                     \
      coopMatReduceNV(now, now, gl_CooperativeMatrixReduceRowNV, larger);                                       \
      SUMS factor;                                                                                              \
      [[unroll]] for (int e = 0; e < now.length(); e++) {                                                       \
        const float x = max(now[e], top[r][e]);                                                                 \
        factor[e] = exp2((top[r][e] - x) * bits);                                                               \
        top[r][e] = x;                                                                                          \
        bias[r][e] = -x * bits;                                                                                 \
      }                                                                                                         \
      total[r] = total[r] * factor;                                                                             \
      [[unroll]] for (int k = 0; k < DEEP; k++) o[r * DEEP + k] = o[r * DEEP + k] * factor;                     \
    }                                                                                                           \
  }

// A masked score may be too low for the factor `bits`: its maximum is subtracted first.
#define WEIGHT(x, r, e) exp2(GENERAL != 0 ? ((x) - top[r][e]) * bits : fma(x, bits, bias[r][e]))

#define WEIGH(s)                                                                                                \
  [[unroll]] for (int r = 0; r < HEIGHT; r++) [[unroll]] for (int n = 0; n < ACROSS; n++) {                     \
    SUMS x = s[r * ACROSS + n];                                                                                 \
    [[unroll]] for (int e = 0; e < x.length(); e++) x[e] = ROUNDED(WEIGHT(x[e], r, e));                         \
    total[r] = total[r] + x;                                                                                    \
    w[r * ACROSS + n] = LEFT(NARROW(x));                                                                        \
  }

// One tile, and the next one's scores beside it. Fetched meanwhile: keys `then`, values `next`. CHANGE changes the scores.
#define STEP_AHEAD(LOAD, CHANGE, then, next)                                                                    \
  barrier();                                                                                                    \
  LOAD(fetched, keys, then)                                                                                     \
  LOAD(brought, values, next)                                                                                   \
  CHANGE                                                                                                        \
  RAISE(s)                                                                                                      \
  SUMS t[HEIGHT * ACROSS];                                                                                      \
  SCORES(t, set)                                                                                                \
  WEIGH(s)                                                                                                      \
  GATHER(set + TILE)                                                                                            \
  if (AHEAD == 1) set = 2 * TILE - set; else barrier();                                                         \
  PUT(fetched, set)                                                                                             \
  PUT(brought, set + TILE)                                                                                      \
  [[unroll]] for (int n = 0; n < HEIGHT * ACROSS; n++) s[n] = t[n];

// One tile by itself, its values fetched from `key`, the next one's keys from `next`.
#define STEP(LOAD, CHANGE, key, next)                                                                           \
  sync();                                                                                                       \
  PUT(fetched, key_tile)                                                                                        \
  sync();                                                                                                       \
  LOAD(fetched, values, key)                                                                                    \
  SCORES(s, key_tile)                                                                                           \
  CHANGE                                                                                                        \
  RAISE(s)                                                                                                      \
  WEIGH(s)                                                                                                      \
  if (ALONE != 0) subgroupBarrier();                                                                            \
  PUT(fetched, value_tile)                                                                                      \
  LOAD(fetched, keys, next)                                                                                     \
  sync();                                                                                                       \
  GATHER(value_tile)

void main() {
  Place at = begin();
  load_queries();
  LEFT q[HEIGHT * DEEP], w[HEIGHT * ACROSS];
  [[unroll]] for (int r = 0; r < HEIGHT; r++) [[unroll]] for (int k = 0; k < DEEP; k++)
    coopMatLoad(q[r * DEEP + k], tile, (base + r * SIDE) * PITCH + k * SIDE / 8, PITCH, gl_CooperativeMatrixLayoutRowMajor);
  barrier();
  SUMS o[HEIGHT * DEEP], s[HEIGHT * ACROSS], top[HEIGHT], bias[HEIGHT], total[HEIGHT];
  [[unroll]] for (int k = 0; k < HEIGHT * DEEP; k++) o[k] = SUMS(0.0);
  [[unroll]] for (int r = 0; r < HEIGHT; r++) {
    top[r] = SUMS(LOWEST);  // finite, so that a row without a key yet gets weights of 0
    bias[r] = SUMS(0.0);
    total[r] = SUMS(0.0);
  }
  const float bits = in_bits(), slack = SLACK / bits;
  uvec4 fetched[OWN];
  if (there(at)) FETCH(fetched, keys, first_key(at))
  if (ALONE == 0 && AHEAD != 0) {
    uvec4 brought[OWN];
    int set = 0;
    if (there(at)) {
      PUT(fetched, 0)
      FETCH(brought, values, at.key)
      FETCH(fetched, keys, after(at).key)
      barrier();
      SCORES(s, 0)
      if (AHEAD == 1) set = 2 * TILE; else barrier();
      PUT(fetched, set)
      PUT(brought, set + TILE)
    }
    [[dont_unroll]] while (there(at)) {
      [[dont_unroll]] for (int run = unhidden(at, 2); run > 0; run--) {
        STEP_AHEAD(FETCH_WHOLE, , at.key + 2 * KEYS, at.key + KEYS)
        at.key += KEYS;
      }
      const Place next = after(at);
      STEP_AHEAD(FETCH, MASK(s, at), after(next).key, next.key)
      at = next;
    }
  } else {
    const int key_tile = me * TILE, value_tile = ALONE != 0 ? key_tile : TILE;  // alone, values take the place of their keys
    [[dont_unroll]] while (there(at)) {
      [[dont_unroll]] for (int run = unhidden(at, 1); run > 0; run--) {
        STEP(FETCH_WHOLE, , first_key(at), first_key(at) + stride)
        at.key += stride;
      }
      const Place next = after(at);
      STEP(FETCH, MASK(s, at), first_key(at), first_key(next))
      at = next;
    }
  }
  barrier();
  [[unroll]] for (int r = 0; r < HEIGHT; r++) {
    const int slot = subgroup * TALL + r * SIDE;
    coopMatReduceNV(total[r], total[r], gl_CooperativeMatrixReduceRowNV, added);
    coopMatStore(total[r], tile, slot * SLICE, SLICE, gl_CooperativeMatrixLayoutRowMajor);
    subgroupBarrier();
    if (lane < SIDE) totals[slot + lane] = uintBitsToFloat(tile[(slot + lane) * SLICE].x);
    subgroupBarrier();
    coopMatStore(top[r], tile, slot * SLICE, SLICE, gl_CooperativeMatrixLayoutRowMajor);
    subgroupBarrier();
    if (lane < SIDE) tops[slot + lane] = uintBitsToFloat(tile[(slot + lane) * SLICE].x) * natural();
  }
  barrier();
  WRITE()
}
