#version 450
// Corners minus edges plus pixels of the set field >= level at each point of a row of the grid of corners: the corner,
// the edges to its right and below, and the pixel between them. An invocation per row, level and field.
layout(constant_id = 1) const int THREADS = 64;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes { int height, width, count, fields; } p;
layout(binding = 0) readonly buffer Field { float field[]; };
layout(binding = 1) readonly buffer Levels { float levels[]; };
layout(binding = 2) writeonly buffer Parts { int parts[]; };

void row(int n, int t, int y) {
  const float level = levels[t];
  const int here = (n * p.height + y) * p.width, above = here - p.width;
  int sum = 0, a = 0, c = 0;
  for (int x = 0; x <= p.width; x++) {
    int b = 0, d = 0;
    if (x < p.width) {
      if (y > 0) b = int(field[above + x] >= level);
      if (y < p.height) d = int(field[here + x] >= level);
    }
    sum += (a | b | c | d) - (b | d) - (c | d) + d;
    a = b;
    c = d;
  }
  parts[(n * p.count + t) * (p.height + 1) + y] = sum;
}

void main() {
  for (uint n = gl_WorkGroupID.z; n < p.fields; n += gl_NumWorkGroups.z)
    for (uint t = gl_WorkGroupID.y; t < p.count; t += gl_NumWorkGroups.y)
      for (uint y = gl_GlobalInvocationID.x; y <= p.height; y += gl_NumWorkGroups.x * THREADS)
        row(int(n), int(t), int(y));
}
