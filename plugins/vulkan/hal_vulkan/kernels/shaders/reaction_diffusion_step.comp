#version 450
layout(constant_id = 1) const int THREADS = 64;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes {
  int height, width, fields;
  float dt, diffusion_u, diffusion_v, reaction, epsilon, decay, offset;
} p;
layout(binding = 0) readonly buffer U { float u[]; };
layout(binding = 1) readonly buffer V { float v[]; };
layout(binding = 2) writeonly buffer NextU { float next_u[]; };
layout(binding = 3) writeonly buffer NextV { float next_v[]; };

void element(int field, int y, int c) {
  const int grid = field * p.height * p.width, row = grid + y * p.width;
  const int up = grid + (y + p.height - 1) % p.height * p.width, down = grid + (y + 1) % p.height * p.width;
  const int left = (c + p.width - 1) % p.width, right = (c + 1) % p.width;
  // The nine-point average (1/6 for edge neighbours, 1/12 for corners) minus the middle, periodic.
  const float a = u[row + c], b = v[row + c];
  const float spread_u = (u[up + c] + u[down + c] + u[row + left] + u[row + right]) / 6.0
                       + (u[up + left] + u[up + right] + u[down + left] + u[down + right]) / 12.0 - a;
  const float spread_v = (v[up + c] + v[down + c] + v[row + left] + v[row + right]) / 6.0
                       + (v[up + left] + v[up + right] + v[down + left] + v[down + right]) / 12.0 - b;
  next_u[row + c] = a + p.dt * (p.diffusion_u * spread_u + p.reaction * (a - a * a * a - b));
  next_v[row + c] = b + p.dt * (p.diffusion_v * spread_v + p.reaction * p.epsilon * (a - p.decay * b + p.offset));
}

void main() {
  for (uint field = gl_WorkGroupID.z; field < p.fields; field += gl_NumWorkGroups.z)
    for (uint y = gl_WorkGroupID.y; y < p.height; y += gl_NumWorkGroups.y)
      for (uint c = gl_GlobalInvocationID.x; c < p.width; c += gl_NumWorkGroups.x * THREADS)
        element(int(field), int(y), int(c));
}
