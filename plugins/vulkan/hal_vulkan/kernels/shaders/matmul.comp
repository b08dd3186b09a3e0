#version 450
#extension GL_EXT_control_flow_attributes : require
// out[batch, m, n] = a[batch, m, k] @ b[batch, k, n]; an invocation takes 4 rows x 4 columns, neighbours lie along a row.
layout(constant_id = 1) const int THREADS = 64;
layout(local_size_x_id = 1) in;
layout(push_constant) uniform Sizes { int m, n, k, a_stride, b_stride, batches; } p;
layout(binding = 0) readonly buffer A { float a[]; };
layout(binding = 1) readonly buffer B { float b[]; };
layout(binding = 2) writeonly buffer Out { float result[]; };

void block(int batch, int row0, int column0) {
  float sum[16];
  [[unroll]] for (int e = 0; e < 16; e++) sum[e] = 0.0;
  for (int i = 0; i < p.k; i++) {
    float y[4];
    [[unroll]] for (int c = 0; c < 4; c++) y[c] = b[batch * p.b_stride + i * p.n + min(column0 + c * THREADS, p.n - 1)];
    [[unroll]] for (int r = 0; r < 4; r++) {
      const float x = a[batch * p.a_stride + min(row0 + r, p.m - 1) * p.k + i];
      [[unroll]] for (int c = 0; c < 4; c++) sum[r * 4 + c] = fma(x, y[c], sum[r * 4 + c]);
    }
  }
  [[unroll]] for (int r = 0; r < 4; r++)
    [[unroll]] for (int c = 0; c < 4; c++)
      if (row0 + r < p.m && column0 + c * THREADS < p.n)
        result[(batch * p.m + row0 + r) * p.n + column0 + c * THREADS] = sum[r * 4 + c];
}

void main() {
  const uvec3 step = gl_NumWorkGroups * uvec3(THREADS * 4, 4, 1);
  for (uint batch = gl_WorkGroupID.z; batch < p.batches; batch += step.z)
    for (uint row = gl_WorkGroupID.y * 4; row < p.m; row += step.y)
      for (uint column = gl_WorkGroupID.x * THREADS * 4; column < p.n; column += step.x)
        block(int(batch), int(row), int(column + gl_LocalInvocationID.x));
}
