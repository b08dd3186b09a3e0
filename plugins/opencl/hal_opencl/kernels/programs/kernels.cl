// Kernels beside attention, all on float32.

__kernel void vector_add(__global const float *a, __global const float *b, __global float *out, int count) {
  const int n = get_global_id(0);
  if (n < count) out[n] = a[n] + b[n];
}

// Each work item adds every stride-th element, with the rounding error carried along (Kahan 1965).
__kernel void reduce_sum(__global const float *x, __global float *parts, int count) {
  float sum = 0.0f, lost = 0.0f;
  for (int n = get_global_id(0); n < count; n += get_global_size(0)) {
    const float next = x[n] - lost, now = sum + next;
    lost = (now - sum) - next;
    sum = now;
  }
  parts[get_global_id(0)] = sum;
}

// out[batch, m, n] = a[batch, m, k] @ b[batch, k, n], 4 rows x 16 columns per work item; a has stride 0 or m * k between
// batch entries, b likewise.
__kernel void matmul(__global const float *a, __global const float *b, __global float *out, int m, int n, int k,
                     int a_stride, int b_stride) {
  const int column = get_global_id(0) * 16, row = get_global_id(1) * 4, batch = get_global_id(2);
  a += (size_t)batch * a_stride;
  b += (size_t)batch * b_stride;
  out += (size_t)batch * m * n;
  float16 sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const int whole = column + 16 <= n;
  for (int i = 0; i < k; i++) {
    float16 y = 0.0f;
    if (whole) y = vload16(0, b + (size_t)i * n + column);
    else for (int e = 0; column + e < n; e++) ((float *)&y)[e] = b[(size_t)i * n + column + e];
    #pragma unroll
    for (int r = 0; r < 4; r++) sum[r] = mad((float16)a[(size_t)min(row + r, m - 1) * k + i], y, sum[r]);
  }
  for (int r = 0; r < 4 && row + r < m; r++) {
    if (whole) vstore16(sum[r], 0, out + (size_t)(row + r) * n + column);
    else for (int e = 0; column + e < n; e++) out[(size_t)(row + r) * n + column + e] = ((float *)&sum[r])[e];
  }
}

// The nine-point average minus the middle, periodic.
static inline float spread(__global const float *x, int y0, int y, int y1, int x0, int c, int x1, int width) {
  const float edges = x[y0 * width + c] + x[y1 * width + c] + x[y * width + x0] + x[y * width + x1];
  const float corners = x[y0 * width + x0] + x[y0 * width + x1] + x[y1 * width + x0] + x[y1 * width + x1];
  return edges / 6.0f + corners / 12.0f - x[y * width + c];
}

static inline void react(__global const float *u, __global const float *v, __global float *next_u, __global float *next_v,
                         int y, int c, int height, int width, float dt, float diffusion_u, float diffusion_v,
                         float reaction, float epsilon, float decay, float offset) {
  const int y0 = (y + height - 1) % height, y1 = (y + 1) % height, x0 = (c + width - 1) % width, x1 = (c + 1) % width;
  const int at = y * width + c;
  const float a = u[at], b = v[at];
  next_u[at] = a + dt * (diffusion_u * spread(u, y0, y, y1, x0, c, x1, width) + reaction * (a - a * a * a - b));
  next_v[at] = b + dt * (diffusion_v * spread(v, y0, y, y1, x0, c, x1, width)
                         + reaction * epsilon * (a - decay * b + offset));
}

__kernel void reaction_diffusion_step(__global const float *u, __global const float *v, __global float *next_u,
                                      __global float *next_v, int height, int width, float dt, float diffusion_u,
                                      float diffusion_v, float reaction, float epsilon, float decay, float offset) {
  const size_t grid = (size_t)get_global_id(2) * height * width;
  react(u + grid, v + grid, next_u + grid, next_v + grid, get_global_id(1), get_global_id(0), height, width, dt,
        diffusion_u, diffusion_v, reaction, epsilon, decay, offset);
}

// Many steps of fields that one work group holds: it steps a field to the end, from one set of buffers to the other. The
// last step writes the results.
__kernel void reaction_diffusion_steps(__global const float *u, __global const float *v, __global float *target_u,
                                       __global float *target_v, __global float *spare_u, __global float *spare_v,
                                       int height, int width, int repeats, float dt, float diffusion_u,
                                       float diffusion_v, float reaction, float epsilon, float decay, float offset) {
  const size_t grid = (size_t)get_group_id(2) * height * width;
  __global const float *from_u = u + grid, *from_v = v + grid;
  for (int left = repeats - 1; left >= 0; left--) {
    __global float *to_u = (left % 2 ? spare_u : target_u) + grid, *to_v = (left % 2 ? spare_v : target_v) + grid;
    for (int i = get_local_id(0); i < height * width; i += get_local_size(0))
      react(from_u, from_v, to_u, to_v, i / width, i % width, height, width, dt, diffusion_u, diffusion_v, reaction,
            epsilon, decay, offset);
    barrier(CLK_GLOBAL_MEM_FENCE);
    from_u = to_u;
    from_v = to_v;
  }
}

static inline void flatten(__global const float *phi, __global float *next, int y, int c, int height, int width, float dt) {
  const int up = (y + height - 1) % height * width + c, down = (y + 1) % height * width + c;
  const int left = y * width + (c + width - 1) % width, right = y * width + (c + 1) % width, at = y * width + c;
  const float here = phi[at];
  next[at] = here + dt * exp(-2.0f * here) * (phi[up] + phi[down] + phi[left] + phi[right] - 4.0f * here);
}

__kernel void ricci_flow_step(__global const float *phi, __global float *next, int height, int width, float dt) {
  const size_t grid = (size_t)get_global_id(2) * height * width;
  flatten(phi + grid, next + grid, get_global_id(1), get_global_id(0), height, width, dt);
}

__kernel void ricci_flow_steps(__global const float *phi, __global float *target, __global float *spare, int height,
                               int width, int repeats, float dt) {
  const size_t grid = (size_t)get_group_id(2) * height * width;
  __global const float *from = phi + grid;
  for (int left = repeats - 1; left >= 0; left--) {
    __global float *to = (left % 2 ? spare : target) + grid;
    for (int i = get_local_id(0); i < height * width; i += get_local_size(0))
      flatten(from, to, i / width, i % width, height, width, dt);
    barrier(CLK_GLOBAL_MEM_FENCE);
    from = to;
  }
}

// Corners minus edges plus pixels of the set field >= level at each point of a row of the grid of corners: the corner, the
// edges to its right and below, and the pixel between them.
__kernel void euler_characteristic(__global const float *field, __global const float *levels, __global int *parts, int height,
                                   int width, int count) {
  const int y = get_global_id(0), t = get_global_id(1);
  const float level = levels[t];
  __global const float *above = field + ((long)get_global_id(2) * height + y - 1) * width, *row = above + width;
  int sum = 0, a = 0, c = 0;
  for (int x = 0; x <= width; x++) {
    const int b = y > 0 && x < width && above[x] >= level, d = y < height && x < width && row[x] >= level;
    sum += (a | b | c | d) - (b | d) - (c | d) + d;
    a = b;
    c = d;
  }
  parts[((size_t)get_global_id(2) * count + t) * (height + 1) + y] = sum;
}
