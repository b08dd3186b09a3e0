#version 450
#extension GL_GOOGLE_include_directive : require
// A work item walks down a strip of a column and keeps the rows that it has loaded: three numbers a cell are loaded, not nine.
layout(constant_id = 1) const int THREADS = 64;
layout(constant_id = 2) const int ROWS = 1;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes {
  int height, width, fields;
  float dt, diffusion_u, diffusion_v, reaction, epsilon, decay, offset;
} p;
layout(binding = 0) readonly buffer U { float u[]; };
layout(binding = 1) readonly buffer V { float v[]; };
layout(binding = 2) writeonly buffer NextU { float to_u[]; };
layout(binding = 3) writeonly buffer NextV { float to_v[]; };
#include "reaction.glsl"

void walk(int grid, int first, int last, int c) {
  const int left = c == 0 ? p.width - 1 : c - 1, right = c + 1 == p.width ? 0 : c + 1;
  int row = grid + (first == 0 ? p.height - 1 : first - 1) * p.width;
  vec3 up_u = vec3(u[row + left], u[row + c], u[row + right]), up_v = vec3(v[row + left], v[row + c], v[row + right]);
  row = grid + first * p.width;
  vec3 here_u = vec3(u[row + left], u[row + c], u[row + right]), here_v = vec3(v[row + left], v[row + c], v[row + right]);
  for (int y = first; y < last; y++) {
    const int at = row + c;
    row = y + 1 == p.height ? grid : row + p.width;
    const vec3 down_u = vec3(u[row + left], u[row + c], u[row + right]);
    const vec3 down_v = vec3(v[row + left], v[row + c], v[row + right]);
    to_u[at] = next_u(up_u, here_u, down_u, here_v.y);
    to_v[at] = next_v(up_v, here_v, down_v, here_u.y);
    up_u = here_u;
    up_v = here_v;
    here_u = down_u;
    here_v = down_v;
  }
}

void main() {
  for (int field = int(gl_WorkGroupID.z); field < p.fields; field += int(gl_NumWorkGroups.z))
    for (int y = int(gl_WorkGroupID.y) * ROWS; y < p.height; y += int(gl_NumWorkGroups.y) * ROWS)
      for (int c = int(gl_GlobalInvocationID.x); c < p.width; c += int(gl_NumWorkGroups.x) * THREADS)
        walk(field * p.height * p.width, y, min(y + ROWS, p.height), c);
}
