// Parts of the keys into the whole: part [splits, rows, HEAD_DIM], part_lse [splits, rows].
__kernel void merge(__global const float *part, __global const float *part_lse, __global stored *out, __global float *lse,
                    int splits) {
  const size_t row = get_global_id(0), rows = get_global_size(0);
  float top = -INFINITY, total = 0.0f;
  for (int s = 0; s < splits; s++) top = max(top, part_lse[s * rows + row]);
  if (top > -INFINITY)
    for (int s = 0; s < splits; s++) total += exp(part_lse[s * rows + row] - top);
  lse[row] = top > -INFINITY ? top + log(total) : -INFINITY;
  for (int c = 0; c < HEAD_DIM / 16; c++) {
    float16 sum = 0.0f;
    if (top > -INFINITY)
      for (int s = 0; s < splits; s++)
        sum += vload16((s * rows + row) * (HEAD_DIM / 16) + c, part) * (exp(part_lse[s * rows + row] - top) / total);
    WRITE16(sum, row * (HEAD_DIM / 16) + c, out);
  }
}
