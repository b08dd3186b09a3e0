// Results of work groups that have the same rows and, as splits, keys of their own: each leaves its part, and the last one to
// arrive merges them all, so that no second dispatch waits for every group. Needs ROWS and the bindings 0 to 5 before it.
#extension GL_KHR_memory_scope_semantics : require

layout(binding = 6) writeonly buffer Out { STORED result[]; };
layout(binding = 7) writeonly buffer Lse { float lse[]; };
layout(binding = 8) coherent buffer Part { vec4 part[]; };          // [splits, rows of all units, QUADS], normalised
layout(binding = 9) coherent buffer PartSums { ROW_SUM part_sums[]; };  // [splits, rows of all units]
layout(binding = 10) coherent buffer Arrived { uint arrived[]; };  // groups, by unit and block of rows; 0 before and after

const int MOST_SPLITS = 64, BATCH = 4;  // parts that are read at once
shared ROW_SUM split_sums[MOST_SPLITS * ROWS];
shared bool is_last;

// Four numbers of this group's part of a row: `row` of all units, normalised.
void leave(int row, int quad, vec4 numbers, ROW_SUM row_sum) {
  if (p.splits == 1) {
    result[row * QUADS + quad] = narrow(numbers);
    if (quad == 0) lse[row] = row_sum.y > 0.0 ? row_sum.x + log2(row_sum.y) * LN2 : -INFINITE;
  } else {
    const int to = int(gl_WorkGroupID.z * gl_NumWorkGroups.y) * p.unit_rows + row;
    part[to * QUADS + quad] = numbers;
    if (quad == 0) part_sums[to] = row_sum;
  }
}

// After `leave`, by all invocations: the parts of `rows` rows from `first` on become the result, if all have been left.
void arrive(int first, int rows) {
  if (p.splits == 1) return;
  const int local = int(gl_LocalInvocationID.x), block = int(gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x);
  controlBarrier(gl_ScopeWorkgroup, gl_ScopeDevice, gl_StorageSemanticsBuffer, gl_SemanticsAcquireRelease);
  if (local == 0) {
    const uint before = atomicAdd(arrived[block], 1u, gl_ScopeDevice, gl_StorageSemanticsBuffer, gl_SemanticsAcquireRelease);
    is_last = before == uint(p.splits - 1);
    if (is_last) atomicStore(arrived[block], 0u, gl_ScopeDevice, gl_StorageSemanticsNone, gl_SemanticsRelaxed);
  }
  controlBarrier(gl_ScopeWorkgroup, gl_ScopeDevice, gl_StorageSemanticsBuffer | gl_StorageSemanticsShared, gl_SemanticsAcquireRelease);
  if (!is_last) return;
  const int all = int(gl_NumWorkGroups.y) * p.unit_rows;
  [[dont_unroll]] for (int n = local; n < p.splits * ROWS; n += THREADS)
    split_sums[n] = part_sums[n / ROWS * all + first + min(n % ROWS, rows - 1)];
  barrier();
  [[dont_unroll]] for (int m = local; m < rows * QUADS; m += THREADS) {
    const int r = m / QUADS, quad = m % QUADS;
    float top = LOWEST, total = 0.0;
    vec4 sum = vec4(0.0);
    [[dont_unroll]] for (int n = 0; n < p.splits; n++)
      if (split_sums[n * ROWS + r].y > 0.0) top = max(top, split_sums[n * ROWS + r].x);
    [[dont_unroll]] for (int n = 0; n < p.splits; n += BATCH) {
      vec4 x[BATCH];
      [[unroll]] for (int u = 0; u < BATCH; u++) x[u] = part[(min(n + u, p.splits - 1) * all + first + r) * QUADS + quad];
      [[unroll]] for (int u = 0; u < BATCH; u++) {
        const ROW_SUM part_sum = n + u < p.splits ? split_sums[(n + u) * ROWS + r] : ROW_SUM(0.0);
        const float weight = part_sum.y > 0.0 ? part_sum.y * exp2((part_sum.x - top) * LOG2E) : 0.0;
        total += weight;
        sum += weight * x[u];
      }
    }
    result[(first + r) * QUADS + quad] = narrow(sum * (total > 0.0 ? 1.0 / total : 0.0));
    if (quad == 0) lse[first + r] = total > 0.0 ? top + log2(total) * LN2 : -INFINITE;
  }
}
