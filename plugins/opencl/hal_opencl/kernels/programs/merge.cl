// Parts of the keys into the whole: part [splits, rows, HEAD_DIM], normalised; part_sums [splits, rows], see write_sum.
__kernel void merge(__global const float *part, __global const float *part_sums, __global stored *out, __global float *lse,
                    int splits) {
  const size_t row = get_global_id(0), rows = get_global_size(0);
  float top = -FLT_MAX, total = 0.0f;
  for (int s = 0; s < splits; s++) {
    const float2 part_sum = vload2(s * rows + row, part_sums);
    if (part_sum.y > 0) top = max(top, part_sum.x);
  }
  for (int s = 0; s < splits; s++) {
    const float2 part_sum = vload2(s * rows + row, part_sums);
    if (part_sum.y > 0) total += part_sum.y * exp(part_sum.x - top);
  }
  lse[row] = total > 0 ? top + log(total) : -INFINITY;
  for (int c = 0; c < HEAD_DIM / 16; c++) {
    float16 sum = 0.0f;
    for (int s = 0; s < splits; s++) {
      const float2 part_sum = vload2(s * rows + row, part_sums);
      if (part_sum.y > 0)
        sum += vload16((s * rows + row) * (HEAD_DIM / 16) + c, part) * (part_sum.y * exp(part_sum.x - top) / total);
    }
    WRITE16(sum, row * (HEAD_DIM / 16) + c, out);
  }
}
