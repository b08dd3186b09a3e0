// What every source here begins with. No header is included: NVRTC needs no CUDA toolkit then.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct fp16 { u16 bits; };
struct bf16 { u16 bits; };

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ float wide(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(float x, fp16& y) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
__device__ __forceinline__ void narrow(float x, bf16& y) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const u32 bits = __float_as_uint(x);
    y.bits = x != x ? (u16)0x7fff : (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

// 16 bytes, as one load or store moves them.
template <typename T> struct Vector {
    static const int SIZE = 16 / sizeof(T);
    union { uint4 raw; T item[SIZE]; };
    __device__ __forceinline__ Vector() {}
    __device__ __forceinline__ void load(const T* from) { raw = *reinterpret_cast<const uint4*>(from); }
    __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<uint4*>(to) = raw; }
};
