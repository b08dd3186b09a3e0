#version 450
#extension GL_GOOGLE_include_directive : require
// A work item walks down a strip of a column and keeps what it has loaded: three numbers a cell are loaded, not five.
layout(constant_id = 1) const int THREADS = 64;
layout(constant_id = 2) const int ROWS = 1;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes { int height, width, fields; float dt; } p;
layout(binding = 0) readonly buffer Phi { float phi[]; };
layout(binding = 1) writeonly buffer Next { float next[]; };
#include "ricci.glsl"

void walk(int grid, int first, int last, int c) {
  const int left = c == 0 ? p.width - 1 : c - 1, right = c + 1 == p.width ? 0 : c + 1;
  float up = phi[grid + (first == 0 ? p.height - 1 : first - 1) * p.width + c];
  int row = grid + first * p.width;
  float here = phi[row + c];
  for (int y = first; y < last; y++) {
    const int below = y + 1 == p.height ? grid : row + p.width;
    const float down = phi[below + c];
    next[row + c] = next_phi(here, up, down, phi[row + left], phi[row + right]);
    row = below;
    up = here;
    here = down;
  }
}

void main() {
  for (int field = int(gl_WorkGroupID.z); field < p.fields; field += int(gl_NumWorkGroups.z))
    for (int y = int(gl_WorkGroupID.y) * ROWS; y < p.height; y += int(gl_NumWorkGroups.y) * ROWS)
      for (int c = int(gl_GlobalInvocationID.x); c < p.width; c += int(gl_NumWorkGroups.x) * THREADS)
        walk(field * p.height * p.width, y, min(y + ROWS, p.height), c);
}
