// FlashInfer's own planners. Reads one batch per line, prints what planning it takes:
//   fa2|fa3 multiprocessors heads kv_heads head_dim captured uniform float_bytes int_bytes rows (queries length) ...
// float_bytes, int_bytes: the memory it may use. Prints tile, split, bytes of integers used, and the plan's offsets.
#define FLASHINFER_POS_ENC_CUH_  // device code
namespace flashinfer {
enum class PosEncodingMode { kNone };
}
#include <flashinfer/attention/scheduler.cuh>
#include <iostream>
#include <string>
#include <vector>

using namespace flashinfer;

constexpr int PAGE = 16;

#ifdef HAS_UNIFORM
#define UNIFORM uniform,
#else
#define UNIFORM
#endif

int main() {
  attributes[cudaDevAttrComputeCapabilityMajor] = 9;
  attributes[cudaDevAttrComputeCapabilityMinor] = 0;
  attributes[cudaDevAttrMaxSharedMemoryPerMultiprocessor] = 102400;
  attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin] = 101376;
  std::string kernels;
  int multiprocessors, heads, kv_heads, head_dim, captured, uniform, rows;
  size_t float_bytes, int_bytes;
  while (std::cin >> kernels >> multiprocessors >> heads >> kv_heads >> head_dim >> captured >> uniform >>
         float_bytes >> int_bytes >> rows) {
    attributes[cudaDevAttrMultiProcessorCount] = multiprocessors;
    std::vector<int32_t> starts{0}, lists{0}, lengths;
    for (int row = 0; row < rows; row++) {
      int queries, length;
      std::cin >> queries >> length;
      starts.push_back(starts.back() + queries);
      lists.push_back(lists.back() + (length + PAGE - 1) / PAGE);
      lengths.push_back(length);
    }
    std::vector<char> ints(int_bytes), pinned(int_bytes);
    void* floats = reinterpret_cast<void*>(1 << 20);  // an address: planners do not touch it
    try {
      std::vector<int64_t> plan;
      if (kernels == "fa2") {
        PrefillPlanInfo info;
        PrefillPlan<int32_t>(floats, float_bytes, ints.data(), pinned.data(), int_bytes, info, starts.data(),
                             lists.data(), starts.back(), rows, heads, kv_heads, head_dim, head_dim, PAGE, captured, 2,
                             -1, -1, false, 0, UNIFORM nullptr);
        plan = info.ToVector();
      } else {
        PrefillPlanSM90Info info;
        PrefillSM90Plan<int32_t>(floats, float_bytes, ints.data(), pinned.data(), int_bytes, info, starts.data(),
                                 lists.data(), lengths.data(), starts.back(), rows, heads, kv_heads, head_dim, head_dim,
                                 PAGE, true, captured, 2, nullptr);
        plan = info.ToVector();
      }
      for (auto each : plan) std::cout << each << ' ';
      std::cout << '\n';
    } catch (const std::exception& error) {
      std::string text = error.what();
      std::cout << "error " << text.substr(0, text.find('\n')) << '\n';
    }
  }
}
