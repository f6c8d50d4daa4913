// The kernels as torch operators, which check their arguments and pass pointers on. kernels: what `open` returned.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "ops_arguments.h"
#include "ops_experts.h"
#include "ops_products.h"

namespace {

int64_t open(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, dlerror());
  auto* kernels = reinterpret_cast<decltype(&magicdec_kernels)>(dlsym(library, "magicdec_kernels"));
  TORCH_CHECK(kernels, path, " holds no kernels");
  TORCH_CHECK(kernels()->permitted(), "the system does not permit the instructions of ", path);
  return reinterpret_cast<int64_t>(kernels());
}

// Returns what attention reads of records k and v, [pages, kv_heads, bytes] uint8. kind: a number of `Sealed`.
SealedPages sealed_pages(const Tensor& k, const Tensor& v, int64_t kind, const Tensor& exact) {
  TORCH_CHECK(kind >= 0 && kind <= int64_t(Sealed::int4x2_drafts) && exact.size(2) == SEALED_SLOTS, "attention: kind of sealed pages");
  for (const Tensor* part : {&k, &v}) {
    const int64_t parameters = 4 * (part == &k ? exact.size(3) : SEALED_SLOTS);
    TORCH_CHECK(part->dim() == 3 && part->scalar_type() == at::kByte && part->size(0) == k.size(0) && part->size(1) == exact.size(1) &&
                part->size(2) == SEALED_SLOTS * exact.size(3) + parameters, "attention: sealed pages");
    check_rows(*part, 2, "sealed pages");
  }
  return {Sealed(kind), k.size(0), k.const_data_ptr<uint8_t>(), v.const_data_ptr<uint8_t>(), k.stride(0), v.stride(0)};
}

std::tuple<Tensor, Tensor> attention(int64_t kernels, const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& queries, const Tensor& lengths, const Tensor& pages, double scale,
                                     int64_t fetch_blocks, bool fetch_to_l2, int64_t window, const std::optional<Tensor>& sinks,
                                     const std::optional<Tensor>& voters, int64_t unit, std::optional<Tensor> votes,
                                     const std::optional<Tensor>& sealed_k, const std::optional<Tensor>& sealed_v, int64_t sealed_kind) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 4 && k.sizes() == v.sizes() && k.strides() == v.strides(), "attention: shapes");
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "attention: types differ");
  TORCH_CHECK(q.size(2) == k.size(3) && q.size(2) % 16 == 0 && k.size(1) > 0 && q.size(1) % k.size(1) == 0, "attention: heads");
  check_rows(q, 2, "q");
  check_rows(k, 3, "k");
  check_ints(queries, "queries");
  check_ints(lengths, "lengths");
  TORCH_CHECK(pages.scalar_type() == at::kLong && pages.size(0) == queries.size(0) && lengths.numel() == queries.numel(), "attention: pages");
  check_rows(pages, 1, "pages");
  TORCH_CHECK(pages.dim() == 2 || (pages.dim() == 3 && pages.size(1) == k.size(1)), "attention: pages");
  TORCH_CHECK(!sealed_k == !sealed_v, "attention: sealed keys and values, or none");
  TORCH_CHECK(!sinks || (sinks->scalar_type() == at::kFloat && sinks->is_contiguous() && sinks->sizes() == q.sizes().slice(1, 1)), "attention: sinks");
  TORCH_CHECK(!voters == !votes, "attention: voters and votes, or none");
  if (voters) {
    check_ints(*voters, "voters");
    TORCH_CHECK(voters->dim() == 2 && voters->size(0) == queries.numel() && voters->size(1) == 2, "attention: voters");
    TORCH_CHECK(unit >= 1 && k.size(2) % unit == 0, "attention: ", unit, " slots do not divide a page of ", k.size(2));
    TORCH_CHECK(votes->dim() == 3 && votes->scalar_type() == at::kFloat && votes->size(0) == queries.numel() && votes->size(1) == k.size(1), "attention: votes");
    check_rows(*votes, 1, "votes");
  }
  TORCH_CHECK(window >= 0 && (window == 0 || !voters), "attention: a window of ", window, voters ? " slots, and votes" : " slots");
  int64_t tokens = 0;
  for (int64_t row = 0; row < queries.numel(); row++) {
    const int64_t n = queries.const_data_ptr<int64_t>()[row], length = lengths.const_data_ptr<int64_t>()[row];
    TORCH_CHECK(n >= 1 && n <= length && length <= pages.size(-1) * k.size(2), "attention: ", n, " queries over ", length, " slots of ", pages.size(-1), " pages");
    tokens += n;
    if (!voters) continue;
    TORCH_CHECK(length <= votes->size(2) * unit, "attention: ", length, " slots, votes for ", votes->size(2) * unit);
    for (const int64_t* voter = voters->const_data_ptr<int64_t>() + 2 * row; voter < voters->const_data_ptr<int64_t>() + 2 * row + 2; voter++)
      TORCH_CHECK(*voter >= -1 && *voter < n, "attention: voter ", *voter, " of ", n, " queries");
  }
  TORCH_CHECK(tokens == q.size(0), "attention: ", q.size(0), " queries, not ", tokens);
  AttentionArgs args{};
  args.team = team();
  args.type = type_of(q);
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.rows = int(queries.numel());
  args.heads = int(q.size(1));
  args.kv_heads = int(k.size(1));
  args.head_dim = int(q.size(2));
  args.page_size = int(k.size(2));
  args.q_stride = q.stride(0);
  args.page_stride = k.stride(0);
  args.queries = queries.const_data_ptr<int64_t>();
  args.lengths = lengths.const_data_ptr<int64_t>();
  args.pages = pages.const_data_ptr<int64_t>();
  args.row_stride = pages.stride(0);
  args.head_stride = pages.dim() == 3 ? pages.stride(1) : 0;
  args.window = window;
  if (sealed_k) args.sealed = sealed_pages(*sealed_k, *sealed_v, sealed_kind, k);
  args.scale = float(scale);
  if (sinks) args.sinks = sinks->const_data_ptr<float>();
  TORCH_CHECK(fetch_blocks >= 1 && fetch_blocks <= 16, "attention: fetch_blocks");
  args.fetch_blocks = int(fetch_blocks);
  args.fetch_to_l2 = fetch_to_l2;
  if (voters) {
    args.voters = voters->const_data_ptr<int64_t>();
    args.vote_unit = int(unit);
    args.votes = votes->mutable_data_ptr<float>();
    args.votes_row_stride = votes->stride(0);
    args.votes_head_stride = votes->stride(1);
  }
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor sums = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
  args.out = out.mutable_data_ptr();
  args.lse = sums.mutable_data_ptr<float>();
  if (args.rows == 0) return {out, sums};
  Tensor scratch = scratch_of(table(kernels).attention_scratch(args));
  args.scratch = scratch.mutable_data_ptr();
  table(kernels).attention(args);
  return {out, sums};
}

Tensor norm(int64_t kernels, Tensor x, const std::optional<Tensor>& delta, const Tensor& weight, double eps) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && weight.numel() == x.size(1) && weight.is_contiguous(), "norm: shapes");
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "norm: types differ");
  TORCH_CHECK(!delta || (delta->sizes() == x.sizes() && delta->is_contiguous() && delta->scalar_type() == x.scalar_type()), "norm: delta");
  Tensor out = at::empty_like(x);
  table(kernels).norm({team(), type_of(x), x.mutable_data_ptr(), delta ? delta->const_data_ptr() : nullptr, weight.const_data_ptr(),
                       out.mutable_data_ptr(), int(x.size(0)), int(x.size(1)), float(eps)});
  return out;
}

void rotary(int64_t kernels, Tensor qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions, const Tensor& slots,
            Tensor k, Tensor v, const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps) {
  TORCH_CHECK(qkv.dim() == 3 && qkv.is_contiguous() && k.dim() == 4 && k.sizes() == v.sizes() && k.strides() == v.strides(), "rotary: shapes");
  TORCH_CHECK(k.scalar_type() == qkv.scalar_type() && v.scalar_type() == qkv.scalar_type(), "rotary: types differ");
  TORCH_CHECK(cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat && cos.is_contiguous() && sin.is_contiguous() &&
              cos.sizes() == sin.sizes() && cos.size(1) * 2 == qkv.size(2) && k.size(3) == qkv.size(2), "rotary: angles");
  TORCH_CHECK(!q_norm == !k_norm, "rotary: both norms or none");
  for (const auto* each : {&q_norm, &k_norm})
    TORCH_CHECK(!*each || ((*each)->numel() == qkv.size(2) && (*each)->is_contiguous() && (*each)->scalar_type() == qkv.scalar_type()), "rotary: norms");
  TORCH_CHECK(qkv.size(1) > 2 * k.size(1) && positions.numel() == qkv.size(0) && slots.numel() == qkv.size(0), "rotary: sizes");
  check_ints(positions, "positions");
  check_ints(slots, "slots");
  check_rows(k, 3, "k");
  check_range(positions, cos.size(0), "positions");
  check_range(slots, k.size(0) * k.size(2), "slots");
  RotaryArgs args{};
  args.team = team();
  args.type = type_of(qkv);
  args.qkv = qkv.mutable_data_ptr();
  args.cos = cos.const_data_ptr<float>();
  args.sin = sin.const_data_ptr<float>();
  args.positions = positions.const_data_ptr<int64_t>();
  args.slots = slots.const_data_ptr<int64_t>();
  args.q_norm = q_norm ? q_norm->const_data_ptr() : nullptr;
  args.k_norm = k_norm ? k_norm->const_data_ptr() : nullptr;
  args.eps = float(eps);
  args.k = k.mutable_data_ptr();
  args.v = v.mutable_data_ptr();
  args.page_stride = k.stride(0);
  args.tokens = int(qkv.size(0));
  args.kv_heads = int(k.size(1));
  args.heads = int(qkv.size(1)) - 2 * args.kv_heads;
  args.head_dim = int(qkv.size(2));
  args.page_size = int(k.size(2));
  table(kernels).rotary(args);
}

std::tuple<Tensor, Tensor> sample(int64_t kernels, const Tensor& logits, const Tensor& temperature, const Tensor& seeds,
                                  const Tensor& positions, int64_t first) {
  TORCH_CHECK(logits.dim() == 2 && logits.scalar_type() == at::kFloat && temperature.scalar_type() == at::kFloat, "sample: types");
  const int64_t rows = logits.size(0);
  TORCH_CHECK(temperature.numel() == rows && seeds.numel() == rows && positions.numel() == rows && temperature.is_contiguous(), "sample: shapes");
  check_rows(logits, 1, "logits");
  check_ints(seeds, "seeds");
  check_ints(positions, "positions");
  Tensor values = at::full({rows}, -std::numeric_limits<float>::infinity(), logits.options());
  Tensor tokens = at::full({rows}, first, seeds.options());
  if (rows == 0) return {values, tokens};
  SampleArgs args{team(), logits.const_data_ptr<float>(), logits.stride(0), int(rows), logits.size(1), first,
                  temperature.const_data_ptr<float>(), seeds.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>(),
                  values.mutable_data_ptr<float>(), tokens.mutable_data_ptr<int64_t>(), nullptr};
  Tensor scratch = scratch_of(table(kernels).sample_scratch(args));
  args.scratch = scratch.mutable_data_ptr();
  table(kernels).sample(args);
  return {values, tokens};
}

Tensor best(int64_t kernels, const Tensor& x, int64_t count) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat && x.is_contiguous(), "best: expected contiguous rows of float32");
  TORCH_CHECK(count >= 0 && count <= x.size(1) && x.size(1) <= std::numeric_limits<int32_t>::max(), "best: ", count, " of ", x.size(1));
  Tensor indices = at::empty({x.size(0), count}, x.options().dtype(at::kLong));
  if (indices.numel() == 0) return indices;
  BestArgs args{team(), x.const_data_ptr<float>(), x.size(0), x.size(1), count, indices.mutable_data_ptr<int64_t>(), nullptr};
  Tensor scratch = scratch_of(table(kernels).best_scratch(args));
  args.scratch = scratch.mutable_data_ptr();
  table(kernels).best(args);
  return indices;
}

// Fails unless both are the bounds of pages of keys with these heads and this size of heads.
void check_bounds(const Tensor& low, const Tensor& high, at::ScalarType type, int64_t kv_heads, int64_t head_dim) {
  TORCH_CHECK(low.dim() == 3 && low.size(1) == kv_heads && low.size(2) == head_dim && head_dim % 16 == 0 && low.sizes() == high.sizes(), "bounds: shapes");
  TORCH_CHECK(low.scalar_type() == type && high.scalar_type() == type && low.strides() == high.strides(), "bounds: types");
  check_rows(low, 2, "bounds");
}

void summarise(int64_t kernels, const Tensor& k, const Tensor& pages, Tensor low, Tensor high) {
  TORCH_CHECK(k.dim() == 4 && low.size(0) == k.size(0) && k.size(2) > 0, "summarise: shapes");
  check_rows(k, 3, "k");
  check_bounds(low, high, k.scalar_type(), k.size(1), k.size(3));
  check_ints(pages, "pages");
  check_range(pages, k.size(0), "pages");
  SummariseArgs args{};
  args.team = team();
  args.type = type_of(k);
  args.k = k.const_data_ptr();
  args.page_stride = k.stride(0);
  args.pages = pages.const_data_ptr<int64_t>();
  args.count = pages.numel();
  args.kv_heads = int(k.size(1));
  args.page_size = int(k.size(2));
  args.head_dim = int(k.size(3));
  args.low = low.mutable_data_ptr();
  args.high = high.mutable_data_ptr();
  args.bounds_stride = low.stride(0);
  table(kernels).summarise(args);
}

Tensor bounds(int64_t kernels, const Tensor& q, const Tensor& pages, const Tensor& low, const Tensor& high, int64_t first,
              const Tensor& ends) {
  TORCH_CHECK(q.dim() == 3 && pages.dim() == 2 && low.dim() == 3 && pages.size(0) == q.size(0) && ends.numel() == q.size(0), "bounds: shapes");
  TORCH_CHECK(low.size(1) > 0 && q.size(1) % low.size(1) == 0, "bounds: heads");
  check_rows(q, 2, "q");
  check_bounds(low, high, q.scalar_type(), low.size(1), q.size(2));
  TORCH_CHECK(pages.scalar_type() == at::kLong, "pages: expected int64");
  check_rows(pages, 1, "pages");
  check_ints(ends, "ends");
  TORCH_CHECK(first >= 0, "bounds: first");
  BoundsArgs args{};
  args.team = team();
  args.type = type_of(q);
  args.q = q.const_data_ptr();
  args.q_stride = q.stride(0);
  args.low = low.const_data_ptr();
  args.high = high.const_data_ptr();
  args.bounds_stride = low.stride(0);
  args.pages = pages.const_data_ptr<int64_t>();
  args.row_stride = pages.stride(0);
  args.rows = q.size(0);
  args.width = pages.size(1);
  args.first = first;
  args.ends = ends.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < args.rows; row++)
    for (int64_t i = first; i < std::min(args.width, args.ends[row]); i++) {
      const int64_t page = args.pages[row * args.row_stride + i];
      TORCH_CHECK(page >= 0 && page < low.size(0), "pages: ", page, " is not below ", low.size(0));
    }
  args.heads = int(q.size(1));
  args.kv_heads = int(low.size(1));
  args.head_dim = int(q.size(2));
  Tensor scores = at::empty({q.size(0), low.size(1), pages.size(1)}, q.options().dtype(at::kFloat));
  if (scores.numel() == 0) return scores;
  args.scores = scores.mutable_data_ptr<float>();
  Tensor scratch = scratch_of(table(kernels).bounds_scratch(args));
  args.scratch = scratch.mutable_data_ptr();
  table(kernels).bounds(args);
  return scores;
}

}  // namespace

TORCH_LIBRARY(magicdec_cpu, m) {
  m.class_<Networks>("Networks").def(torch::init<>()).def("add", &Networks::add);
  m.def("open(str path) -> int", &open);
  m.def("linear(int kernels, Tensor x, Tensor packed, Tensor? scales, Tensor? offsets, Tensor? bias, int features, int columns, int gate, bool float_out, int tiles_from) -> Tensor");
  m.def("linear_int4(int kernels, Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int features, int columns, int gate, bool float_out) -> Tensor");
  m.def("linear_coded(int kernels, Tensor x, Tensor packed, bool e4m3, Tensor scales, Tensor? bias, int features, int columns, int gate, bool float_out) -> Tensor");
  m.def("attention(int kernels, Tensor q, Tensor k, Tensor v, Tensor queries, Tensor lengths, Tensor pages, float scale, int fetch_blocks, bool fetch_to_l2, int window, Tensor? sinks, Tensor? voters, int unit, Tensor(a!)? votes, Tensor? sealed_k, Tensor? sealed_v, int sealed_kind) -> (Tensor, Tensor)");
  m.def("experts(__torch__.torch.classes.magicdec_cpu.Networks networks, Tensor x, Tensor scores, int per_token, bool normalised) -> Tensor");
  m.def("norm(int kernels, Tensor(a!) x, Tensor? delta, Tensor weight, float eps) -> Tensor");
  m.def("rotary(int kernels, Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor positions, Tensor slots, Tensor(b!) k, Tensor(c!) v, Tensor? q_norm, Tensor? k_norm, float eps) -> ()");
  m.def("sample(int kernels, Tensor logits, Tensor temperature, Tensor seeds, Tensor positions, int first) -> (Tensor, Tensor)");
  m.def("best(int kernels, Tensor x, int count) -> Tensor");
  m.def("summarise(int kernels, Tensor k, Tensor pages, Tensor(a!) low, Tensor(b!) high) -> ()");
  m.def("bounds(int kernels, Tensor q, Tensor pages, Tensor low, Tensor high, int first, Tensor ends) -> Tensor");
}

TORCH_LIBRARY_IMPL(magicdec_cpu, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_int4", &linear_int4);
  m.impl("linear_coded", &linear_coded);
  m.impl("experts", &experts);
  m.impl("attention", &attention);
  m.impl("norm", &norm);
  m.impl("rotary", &rotary);
  m.impl("sample", &sample);
  m.impl("best", &best);
  m.impl("summarise", &summarise);
  m.impl("bounds", &bounds);
}
