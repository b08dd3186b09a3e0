#version 450
layout(constant_id = 1) const int THREADS = 64;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes { int height, width, fields; float dt; } p;
layout(binding = 0) readonly buffer Phi { float phi[]; };
layout(binding = 1) writeonly buffer Next { float next[]; };

void element(int field, int y, int c) {
  const int grid = field * p.height * p.width, row = grid + y * p.width;
  const int up = grid + (y + p.height - 1) % p.height * p.width, down = grid + (y + 1) % p.height * p.width;
  const float here = phi[row + c];
  const float neighbours = phi[up + c] + phi[down + c] + phi[row + (c + p.width - 1) % p.width] + phi[row + (c + 1) % p.width];
  next[row + c] = here + p.dt * exp(-2.0 * here) * (neighbours - 4.0 * here);
}

void main() {
  for (uint field = gl_WorkGroupID.z; field < p.fields; field += gl_NumWorkGroups.z)
    for (uint y = gl_WorkGroupID.y; y < p.height; y += gl_NumWorkGroups.y)
      for (uint c = gl_GlobalInvocationID.x; c < p.width; c += gl_NumWorkGroups.x * THREADS)
        element(int(field), int(y), int(c));
}
