// What every attention program is told, and how rows find their head, their keys and their mask.
// Build options: HEAD_DIM (a multiple of 32), HALF (1: query, key, value and results are stored as float16).

typedef struct {
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
} Problem;

// Scores and maxima are in natural units: a finite mask value, however low, times log2(e) need not be finite. Differences of
// scores are multiplied by it.
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

#if HALF
typedef half stored;
#define READ16(i, p) vload_half16(i, p)
#define WRITE16(x, i, p) vstore_half16_rte(x, i, p)
#define READ(i, p) vload_half(i, p)
#define WRITE(x, i, p) vstore_half_rte(x, i, p)
#else
typedef float stored;
#define READ16(i, p) vload16(i, p)
#define WRITE16(x, i, p) vstore16(x, i, p)
#define READ(i, p) (p)[i]
#define WRITE(x, i, p) (p)[i] = (x)
#endif

// Write the log-sum-exp of a row, or, where the keys are split, what merge.cl needs of it: the maximum `top` of its scores,
// and the sum of their exponentials relative to it (0: no key). Their log-sum-exp would lose the sum beside a maximum near
// the lowest finite number.
static inline void write_sum(__global float *lse, const Problem p, size_t at, float top, float sum) {
  if (p.splits > 1) vstore2((float2)(top, sum), at, lse);
  else lse[at] = sum > 0 ? top + log2(sum) * LN2 : -INFINITY;
}

static inline int head_of(const Problem p, int unit, int row) {
  return (unit % p.units_per_batch) * p.heads_per_unit + row / p.len_q;
}

// The mask's row for a query row of a unit.
static inline __global const float *mask_row(__global const float *mask, const Problem p, int unit, int row) {
  const int batch = unit / p.units_per_batch;
  return mask + (long)batch * p.mask_batch + (long)head_of(p, unit, row) * p.mask_head + (long)(row % p.len_q) * p.mask_row;
}

// Where the key ranges of a query row's block begin in the index.
static inline int ranges_of(const Problem p, int unit, int row) {
  return unit / p.units_per_batch * p.plan_batch + head_of(p, unit, row) * p.plan_head + row % p.len_q / p.block_q;
}
