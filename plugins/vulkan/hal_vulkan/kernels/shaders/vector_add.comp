#version 450
layout(constant_id = 1) const int THREADS = 64;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes { int count; } p;
layout(binding = 0) readonly buffer A { float a[]; };
layout(binding = 1) readonly buffer B { float b[]; };
layout(binding = 2) writeonly buffer Out { float result[]; };

void main() {
  for (int n = int(gl_GlobalInvocationID.x); n < p.count; n += int(gl_NumWorkGroups.x) * THREADS) result[n] = a[n] + b[n];
}
