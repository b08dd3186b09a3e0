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

// 16 columns of a row of a periodic grid, with those to their left and right. A division for each element of an index costs
// more than its step.
typedef struct { float16 left, middle, right; } Line;

static inline Line line_at(__global const float *x, int y, int c, int width) {
  __global const float *row = x + y * width;
  Line line;
  if (c + 16 <= width) {
    line.middle = vload16(0, row + c);
    line.left = (float16)(row[c ? c - 1 : width - 1], line.middle.s0123, line.middle.s4567, line.middle.s89ab,
                          line.middle.sc, line.middle.sd, line.middle.se);
    line.right = (float16)(line.middle.s123, line.middle.s4567, line.middle.s89ab, line.middle.scdef,
                           row[c + 16 < width ? c + 16 : 0]);
  } else {
    line.left = line.middle = line.right = 0.0f;
    for (int e = 0; c + e < width; e++) {
      ((float *)&line.left)[e] = row[c + e ? c + e - 1 : width - 1];
      ((float *)&line.middle)[e] = row[c + e];
      ((float *)&line.right)[e] = row[c + e + 1 < width ? c + e + 1 : 0];
    }
  }
  return line;
}

static inline void store_line(float16 value, __global float *row, int c, int width) {
  if (c + 16 <= width) vstore16(value, 0, row + c);
  else for (int e = 0; c + e < width; e++) row[c + e] = ((float *)&value)[e];
}

// The nine-point average minus the middle.
static inline float16 spread(Line up, Line here, Line down) {
  const float16 edges = up.middle + down.middle + here.left + here.right;
  const float16 corners = up.left + up.right + down.left + down.right;
  return (2.0f * edges + corners) / 12.0f - here.middle;  // a product with 1 / 12, rounded, would lose mass
}

static inline void react(__global const float *u, __global const float *v, __global float *next_u, __global float *next_v,
                         int y, int c, int height, int width, float dt, float diffusion_u, float diffusion_v,
                         float reaction, float epsilon, float decay, float offset) {
  const int y0 = y ? y - 1 : height - 1, y1 = y + 1 < height ? y + 1 : 0;
  const Line of_u = line_at(u, y, c, width), of_v = line_at(v, y, c, width);
  const float16 spread_u = spread(line_at(u, y0, c, width), of_u, line_at(u, y1, c, width));
  const float16 spread_v = spread(line_at(v, y0, c, width), of_v, line_at(v, y1, c, width));
  const float16 a = of_u.middle, b = of_v.middle;
  store_line(a + dt * (diffusion_u * spread_u + reaction * (a - a * a * a - b)), next_u + y * width, c, width);
  store_line(b + dt * (diffusion_v * spread_v + reaction * epsilon * (a - decay * b + offset)), next_v + y * width, c,
             width);
}

__kernel void reaction_diffusion_step(__global const float *u, __global const float *v, __global float *next_u,
                                      __global float *next_v, int height, int width, float dt, float diffusion_u,
                                      float diffusion_v, float reaction, float epsilon, float decay, float offset) {
  const size_t grid = (size_t)get_global_id(2) * height * width;
  react(u + grid, v + grid, next_u + grid, next_v + grid, get_global_id(1), get_global_id(0) * 16, height, width, dt,
        diffusion_u, diffusion_v, reaction, epsilon, decay, offset);
}

// Many steps of fields that one work group holds: it steps a field to the end, from one set of buffers to the other. The
// last step writes the results.
__kernel void reaction_diffusion_steps(__global const float *u, __global const float *v, __global float *target_u,
                                       __global float *target_v, __global float *spare_u, __global float *spare_v,
                                       int height, int width, int repeats, float dt, float diffusion_u,
                                       float diffusion_v, float reaction, float epsilon, float decay, float offset) {
  const size_t grid = (size_t)get_group_id(2) * height * width;
  const int across = (width + 15) / 16;
  __global const float *from_u = u + grid, *from_v = v + grid;
  for (int left = repeats - 1; left >= 0; left--) {
    __global float *to_u = (left % 2 ? spare_u : target_u) + grid, *to_v = (left % 2 ? spare_v : target_v) + grid;
    for (int i = get_local_id(0); i < height * across; i += get_local_size(0))
      react(from_u, from_v, to_u, to_v, i / across, i % across * 16, height, width, dt, diffusion_u, diffusion_v,
            reaction, epsilon, decay, offset);
    barrier(CLK_GLOBAL_MEM_FENCE);
    from_u = to_u;
    from_v = to_v;
  }
}

static inline void flatten(__global const float *phi, __global float *next, int y, int c, int height, int width, float dt) {
  const Line line = line_at(phi, y, c, width);
  const float16 up = line_at(phi, y ? y - 1 : height - 1, c, width).middle, here = line.middle;
  const float16 down = line_at(phi, y + 1 < height ? y + 1 : 0, c, width).middle;
  const float16 factor = dt * exp(-2.0f * here);
  store_line(here + factor * (up + down + line.left + line.right - 4.0f * here), next + y * width, c, width);
}

__kernel void ricci_flow_step(__global const float *phi, __global float *next, int height, int width, float dt) {
  const size_t grid = (size_t)get_global_id(2) * height * width;
  flatten(phi + grid, next + grid, get_global_id(1), get_global_id(0) * 16, height, width, dt);
}

__kernel void ricci_flow_steps(__global const float *phi, __global float *target, __global float *spare, int height,
                               int width, int repeats, float dt) {
  const size_t grid = (size_t)get_group_id(2) * height * width;
  const int across = (width + 15) / 16;
  __global const float *from = phi + grid;
  for (int left = repeats - 1; left >= 0; left--) {
    __global float *to = (left % 2 ? spare : target) + grid;
    for (int i = get_local_id(0); i < height * across; i += get_local_size(0))
      flatten(from, to, i / across, i % across * 16, height, width, dt);
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
