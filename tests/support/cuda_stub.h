// A CUDA runtime without a device, as far as FlashInfer's planners use one. They ask for the attributes of a device,
// and copy their plan to it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaErrorNotSupported };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
using cudaStream_t = void*;
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct int2 {
  int x, y;
};
struct cudaDeviceProp {
  int multiProcessorCount, major, minor;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct half {};
struct half2 {};
struct nv_bfloat16 {};
using __nv_bfloat16 = nv_bfloat16;
struct nv_bfloat162 {};
struct __nv_fp8_e4m3 {};
struct __nv_fp8_e5m2 {};

inline std::map<cudaDeviceAttr, int> attributes;  // of the device; the test sets them

using std::max, std::min;

inline const char* cudaGetErrorString(cudaError_t) { return "not supported"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attributes.at(attribute), cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int) { return cudaErrorNotSupported; }
template <typename... Arguments>
cudaError_t cudaFuncSetAttribute(Arguments...) {
  return cudaSuccess;
}
template <typename... Arguments>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(Arguments...) {
  return cudaErrorNotSupported;
}
template <typename... Arguments>
cudaError_t cudaOccupancyMaxPotentialClusterSize(Arguments...) {
  return cudaErrorNotSupported;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, count), cudaSuccess;
}
