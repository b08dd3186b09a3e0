// What the attention shaders on cooperative matrices share: sizes, buffers, tiles of keys, scores' meaning, results.
// A subgroup holds TALL query rows and their output in matrices of SIDE x SIDE. Subgroups share tiles of KEYS keys and have
// rows of their own, or (ALONE, for few rows) share the rows and have tiles of their own, whose results are merged at the end.
// STORES is the number of tiles of keys and values that lie in shared memory where subgroups share them.

layout(constant_id = 2) const int KEYS = 64;
layout(constant_id = 3) const int SIDE = 16;
layout(constant_id = 4) const int SUBGROUP = 32;
layout(constant_id = 5) const int HEIGHT = 1;   // matrices of rows in a subgroup
layout(constant_id = 6) const int ALONE = 0;
layout(constant_id = 7) const int GENERAL = 1;  // 0: no mask, no softcap, a positive scale
layout(constant_id = 9) const int TURNED = 0;   // 1: work groups go through the units first, then through their rows

layout(binding = 0) readonly buffer Query { uvec4 query[]; };
layout(binding = 1) readonly buffer Key { uvec4 keys[]; };
layout(binding = 2) readonly buffer Value { uvec4 values[]; };
layout(binding = 3) readonly buffer Mask { float mask[]; };
layout(binding = 4) readonly buffer Index { int range_index[]; };
layout(binding = 5) readonly buffer Bounds { ivec2 ranges[]; };
layout(binding = 6) writeonly buffer Out { STORED result[]; };
layout(binding = 7) writeonly buffer Lse { float lse[]; };  // a ROW_SUM per split and row where the keys are split
layout(binding = 8) writeonly buffer Part { vec4 part[]; };

#include "score.glsl"

const int WIDE = HEAD_DIM / 8;  // loads of 16 bytes in a row
const int PITCH = WIDE + 1;     // neighbouring rows lie in different banks
const int SUBGROUPS = THREADS / SUBGROUP, TALL = HEIGHT * SIDE;
const int ROWS = ALONE != 0 ? TALL : SUBGROUPS * TALL;
const int ACROSS = KEYS / SIDE, DEEP = HEAD_DIM / SIDE;
const int LOADERS = ALONE != 0 ? SUBGROUP : THREADS;
const int OWN = KEYS * WIDE / LOADERS;
const int TILE = KEYS * PITCH;
const int TILES = ALONE != 0 ? SUBGROUPS : STORES;
const int SLICE = ALONE != 0 ? HEAD_DIM / 4 + 1 : SIDE / 4 + 1;  // pitch of the output on its way, in vec4
const int ENDING = SUBGROUPS * TALL * SLICE, QUERY_SIZE = ROWS * PITCH, TILE_SIZE = TILES * TILE;
const int MOST = QUERY_SIZE > ENDING ? QUERY_SIZE : ENDING;
shared uvec4 tile[TILE_SIZE > MOST ? TILE_SIZE : MOST];
shared float tops[SUBGROUPS * TALL], totals[SUBGROUPS * TALL];  // of each row: maximum in natural units, sum of weights

#define SUMS coopmat<float, gl_ScopeSubgroup, SIDE, SIDE, gl_MatrixUseAccumulator>
#define NARROW coopmat<float16_t, gl_ScopeSubgroup, SIDE, SIDE, gl_MatrixUseAccumulator>
#define LEFT coopmat<float16_t, gl_ScopeSubgroup, SIDE, SIDE, gl_MatrixUseA>
#define RIGHT coopmat<float16_t, gl_ScopeSubgroup, SIDE, SIDE, gl_MatrixUseB>

int local, subgroup, lane, loader, me;  // `me`: which of the work group's tiles is this subgroup's
int units, unit, row0, rows, base, key_row;  // `base`: this subgroup's first row in the work group
int lead, stride;                       // of the first tiles of a range from its start, and of tiles from one another
int low, high, last_range;              // keys that some row of the work group reads, and where its ranges end
int inner_low, inner_high;              // keys that every row of this subgroup reads
int whole_low, whole_high;              // keys that every row of the work group reads

struct Place { int range, key, from, to; };  // `key` is the first of the work group's tiles, [from, to) its range

// The first tile at or after a place that has keys of the present range or a later one.
Place settled(Place at) {
  while (at.key >= at.to && at.range + 1 < last_range) {
    at.range++;
    at.from = max(low, ranges[at.range].x);
    at.to = min(high, ranges[at.range].y);
    at.key = at.from / KEYS * KEYS + lead;
  }
  return at;
}

const int SPAN = ALONE != 0 ? SUBGROUPS * KEYS : KEYS;  // keys of the work group's tiles

Place after(Place at) {
  at.key += stride;
  return settled(at);
}

bool there(Place at) { return at.key < at.to; }
int first_key(Place at) { return at.key + me * KEYS; }  // may lie behind the last key: then every weight is 0

// Whether some row of this subgroup does not read some key of the tile.
bool edge(Place at) {
  return first_key(at) < max(inner_low, at.from) || first_key(at) + KEYS > min(inner_high, at.to);
}

// How many tiles from this one on, of the same range, have no key that is hidden from a row, nor do the `more` after each.
int unhidden(Place at, int more) {
  const int end = min(whole_high, at.to) - SPAN - more * stride;
  return GENERAL != 0 || at.key < max(whole_low, at.from) || at.key > end ? 0 : (end - at.key) / stride + 1;
}

// Find the rows and keys of this work group; the place of the first tile.
Place begin() {
  const int split = int(gl_WorkGroupID.z);
  local = int(gl_LocalInvocationID.x);
  subgroup = int(gl_SubgroupID);
  lane = int(gl_SubgroupInvocationID);
  loader = ALONE != 0 ? lane : local;
  me = ALONE != 0 ? subgroup : 0;
  units = int(TURNED != 0 ? gl_NumWorkGroups.x : gl_NumWorkGroups.y);
  unit = int(TURNED != 0 ? gl_WorkGroupID.x : gl_WorkGroupID.y);
  const uint block = TURNED != 0 ? gl_WorkGroupID.y : gl_WorkGroupID.x, blocks = TURNED != 0 ? gl_NumWorkGroups.y : gl_NumWorkGroups.x;
  row0 = int(blocks - 1 - block) * ROWS;  // a causal call's longest rows first
  rows = min(ROWS, p.unit_rows - row0);
  base = ALONE != 0 ? 0 : subgroup * TALL;
  key_row = unit * p.heads_per_unit / p.group * p.len_k;
  const bool one_head = row0 / p.len_q == (row0 + rows - 1) / p.len_q;
  const int first = one_head ? row0 % p.len_q : 0, last = one_head ? (row0 + rows - 1) % p.len_q : p.len_q - 1;
  // Alone, splits take tiles in turn, so that all read near each other; else each has a stretch of the keys.
  lead = ALONE != 0 ? split * SPAN : 0;
  stride = ALONE != 0 ? p.splits * SPAN : SPAN;
  low = max(first + p.lower, ALONE != 0 ? 0 : split * p.chunk);
  high = min(last + p.upper + 1, ALONE != 0 ? p.len_k : min(split * p.chunk + p.chunk, p.len_k));
  whole_low = last + p.lower;
  whole_high = min(first + p.upper + 1, p.len_k);
  inner_low = !one_head ? whole_low : min(first + base + TALL - 1, last) + p.lower;
  inner_high = !one_head ? whole_high : min(min(first + base, last) + p.upper + 1, p.len_k);
  last_range = 1;
  Place at = Place(0, low / KEYS * KEYS + lead, low, high);
  if (p.has_plan != 0) {
    const int place = ranges_of(unit, row0);
    last_range = range_index[place + 1];
    at = Place(range_index[place] - 1, 0, 0, 0);
  }
  return settled(at);
}

// Put the work group's query rows into `tile`; rows behind the last repeat it.
void load_queries() {
  for (int m = local; m < ROWS * WIDE; m += THREADS)
    tile[m / WIDE * PITCH + m % WIDE] = query[(unit * p.unit_rows + row0 + min(m / WIDE, rows - 1)) * WIDE + m % WIDE];
  barrier();
}

void sync() {
  if (ALONE != 0) subgroupBarrier(); else barrier();
}

// From memory into registers, 16 bytes at a time, and from there into `tile`. FETCH: keys behind the last repeat it.
// FETCH_WHOLE: there are none behind.
#define FETCH_WHOLE(into, from, key)                                                                            \
  [[unroll]] for (int n = 0; n < OWN; n++) into[n] = from[(key_row + (key)) * WIDE + n * LOADERS + loader];
#define FETCH(into, from, key)                                                                                  \
  [[unroll]] for (int n = 0; n < OWN; n++)                                                                      \
    into[n] = from[(key_row + min((key) + (n * LOADERS + loader) / WIDE, p.len_k - 1)) * WIDE + (n * LOADERS + loader) % WIDE];
#define PUT(from, offset)                                                                                       \
  [[unroll]] for (int n = 0; n < OWN; n++)                                                                      \
    tile[(offset) + (n * LOADERS + loader) / WIDE * PITCH + (n * LOADERS + loader) % WIDE] = from[n];

// Scores of the keys at an offset in `tile`.
#define SCORES(s, offset)                                                                                       \
  [[unroll]] for (int n = 0; n < HEIGHT * ACROSS; n++) s[n] = SUMS(0.0);                                        \
  [[unroll]] for (int k = 0; k < DEEP; k++) [[unroll]] for (int n = 0; n < ACROSS; n++) {                       \
    RIGHT b;                                                                                                    \
    coopMatLoad(b, tile, (offset) + n * SIDE * PITCH + k * SIDE / 8, PITCH, gl_CooperativeMatrixLayoutColumnMajor); \
    [[unroll]] for (int r = 0; r < HEIGHT; r++) s[r * ACROSS + n] = coopMatMulAdd(q[r * DEEP + k], b, s[r * ACROSS + n]); \
  }

// Weighted sums of the values at an offset in `tile`, added to the output.
#define GATHER(offset)                                                                                          \
  [[unroll]] for (int n = 0; n < ACROSS; n++) [[unroll]] for (int k = 0; k < DEEP; k++) {                       \
    RIGHT b;                                                                                                    \
    coopMatLoad(b, tile, (offset) + n * SIDE * PITCH + k * SIDE / 8, PITCH, gl_CooperativeMatrixLayoutRowMajor); \
    [[unroll]] for (int r = 0; r < HEIGHT; r++) o[r * DEEP + k] = coopMatMulAdd(w[r * ACROSS + n], b, o[r * DEEP + k]); \
  }

// Write the log-sum-exp of a row, or, where the keys are split, what `merge` needs of it.
void write_sum(int to, float top, float sum) {
  if (p.splits > 1) {
    lse[2 * to] = top;
    lse[2 * to + 1] = sum;
  } else {
    lse[to] = sum > 0.0 ? top + log2(sum) * LN2 : -INFINITE;
  }
}

// Merge what the subgroups found in their keys (see `tops`, `totals`; sums in `tile`) and write it.
void write_merged() {
  const int all = units * p.unit_rows, split = int(gl_WorkGroupID.z);
  for (int m = local; m < rows * QUADS; m += THREADS) {
    const int r = m / QUADS, c = m % QUADS, to = split * all + unit * p.unit_rows + row0 + r;
    float best = LOWEST, sum = 0.0;
    vec4 whole = vec4(0.0);
    for (int n = 0; n < SUBGROUPS; n++) if (totals[n * TALL + r] > 0.0) best = max(best, tops[n * TALL + r]);
    for (int n = 0; n < SUBGROUPS; n++) {
      const float factor = totals[n * TALL + r] > 0.0 ? exp2((tops[n * TALL + r] - best) * LOG2E) : 0.0;
      sum += factor * totals[n * TALL + r];
      whole += factor * uintBitsToFloat(tile[(n * TALL + r) * SLICE + c]);
    }
    whole *= sum > 0.0 ? 1.0 / sum : 0.0;
    if (c == 0) write_sum(to, best, sum);
    if (p.splits > 1) part[to * QUADS + c] = whole;
    else result[to * QUADS + c] = narrow(whole);
  }
}

// Write the log-sum-exp of SIDE rows of this subgroup from row `slot` of the work group.
void write_lse(int slot) {
  if (lane < SIDE && slot + lane < rows) {
    const int to = (int(gl_WorkGroupID.z) * units + unit) * p.unit_rows + row0 + slot + lane;
    write_sum(to, tops[slot + lane], totals[slot + lane]);
  }
}

// Write SIDE columns from column `k` of the same rows, whose sums lie in `tile`.
void write_slice(int slot, int k) {
  for (int m = lane; m < SIDE * SIDE / 4; m += SUBGROUP) {
    const int y = m / (SIDE / 4), c = m % (SIDE / 4), at = unit * p.unit_rows + row0 + slot + y;
    const float sum = totals[slot + y];
    const vec4 whole = uintBitsToFloat(tile[(slot + y) * SLICE + c]) * (sum > 0.0 ? 1.0 / sum : 0.0);
    if (slot + y < rows) {
      if (p.splits > 1) part[(int(gl_WorkGroupID.z) * units * p.unit_rows + at) * QUADS + k / 4 + c] = whole;
      else result[at * QUADS + k / 4 + c] = narrow(whole);
    }
  }
}

// Write the output `o`, once `tops` and `totals` are known.
#define WRITE()                                                                                                 \
  if (ALONE != 0) {                                                                                             \
    [[unroll]] for (int r = 0; r < HEIGHT; r++) [[unroll]] for (int k = 0; k < DEEP; k++)                       \
      coopMatStore(o[r * DEEP + k], tile, (subgroup * TALL + r * SIDE) * SLICE + k * SIDE / 4, SLICE,           \
                   gl_CooperativeMatrixLayoutRowMajor);                                                         \
    barrier();                                                                                                  \
    write_merged();                                                                                             \
  } else {                                                                                                      \
    [[unroll]] for (int r = 0; r < HEIGHT; r++) {                                                               \
      const int slot = subgroup * TALL + r * SIDE;                                                              \
      write_lse(slot);                                                                                          \
      [[unroll]] for (int k = 0; k < DEEP; k++) {                                                               \
        coopMatStore(o[r * DEEP + k], tile, slot * SLICE, SLICE, gl_CooperativeMatrixLayoutRowMajor);           \
        subgroupBarrier();                                                                                      \
        write_slice(slot, k * SIDE);                                                                            \
        subgroupBarrier();                                                                                      \
      }                                                                                                         \
    }                                                                                                           \
  }
