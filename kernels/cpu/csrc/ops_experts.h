// The operator of a mixture of experts, over the operators of matrix products: one call for all networks of a layer.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "ops_products.h"
#include "team.h"

namespace {

// Networks of two products each: a gated one, and one of its results, which is float32.
class Networks : public torch::CustomClassHolder {
 public:
  // Adds a product; the arguments are those of the operator that `kind` names, without x, of which `third` and `last` are its own:
  // 0: linear (offsets, tiles_from); 1: linear_int4 (zeros, -); 2: linear_coded (-, e4m3).
  void add(int64_t kind, int64_t kernels, const Tensor& weights, const std::optional<Tensor>& scales, const std::optional<Tensor>& third,
           const std::optional<Tensor>& bias, int64_t features, int64_t columns, int64_t gate, int64_t last) {
    TORCH_CHECK(kind >= 0 && kind <= 2 && (kind == 0 || scales), "experts: kind of product");
    const bool first = products_.size() % 2 == 0;
    TORCH_CHECK(first == (gate != 0), "experts: gated products and others must alternate");
    if (!products_.empty()) {
      const Product& reference = first ? products_[0] : products_.back();
      TORCH_CHECK(features == (first ? reference.features : reference.columns), "experts: ", features, " features");
      TORCH_CHECK(first || products_.size() == 1 || columns == products_[1].columns, "experts: ", columns, " columns");
    }
    products_.push_back({kind, kernels, weights, scales, third, bias, features, columns, gate, last});
  }

  int64_t size() const { return int64_t(products_.size() / 2); }
  int64_t columns() const { return products_[1].columns; }

  // Computes a network: [rows, features] to [rows, columns] float32.
  Tensor run(int64_t network, const Tensor& x) const { return products_[2 * network + 1].run(products_[2 * network].run(x)); }

 private:
  struct Product {
    int64_t kind, kernels;
    Tensor weights;
    std::optional<Tensor> scales, third, bias;
    int64_t features, columns, gate, last;

    Tensor run(const Tensor& x) const {
      const bool float_out = gate == 0;
      if (kind == 0) return linear(kernels, x, weights, scales, third, bias, features, columns, gate, float_out, last);
      if (kind == 1) return linear_int4(kernels, x, weights, *scales, third, bias, features, columns, gate, float_out);
      return linear_coded(kernels, x, weights, last != 0, *scales, bias, features, columns, gate, float_out);
    }
  };
  std::vector<Product> products_;
};

// Chooses a token's networks; see kernels.reference_experts. scores: [count]. chosen, weights: [per_token], by ascending number.
// taken: [count], used as scratch. shares: likewise.
void choose_networks(const float* scores, int64_t count, int64_t per_token, bool normalised, float* shares, char* taken, int64_t* chosen,
                     float* weights) {
  float largest = scores[0], sum = 0;
  for (int64_t i = 1; i < count; i++) largest = std::max(largest, scores[i]);
  for (int64_t i = 0; i < count; i++) sum += shares[i] = std::exp(scores[i] - largest);
  std::fill(taken, taken + count, 0);
  for (int64_t k = 0; k < per_token; k++) {
    int64_t best = -1;  // of NaN the first ones
    for (int64_t i = 0; i < count; i++)
      if (!taken[i] && (best < 0 || shares[i] > shares[best])) best = i;
    taken[best] = 1;
  }
  float kept = 0;
  for (int64_t i = 0, k = 0; i < count; i++)
    if (taken[i]) {
      chosen[k] = i;
      kept += weights[k++] = shares[i] / sum;
    }
  if (normalised)
    for (int64_t k = 0; k < per_token; k++) weights[k] /= kept;
}

Tensor experts(const c10::intrusive_ptr<Networks>& networks, const Tensor& x, const Tensor& scores, int64_t per_token, bool normalised) {
  const int64_t tokens = x.size(0), count = networks->size();
  TORCH_CHECK(count > 0 && scores.dim() == 2 && scores.scalar_type() == at::kFloat && scores.is_contiguous() && scores.size(0) == tokens &&
              scores.size(1) == count, "experts: scores");
  TORCH_CHECK(per_token >= 1 && per_token <= count, "experts: ", per_token, " of ", count);
  check_rows(x, 1, "x");
  Tensor total = at::zeros({tokens, networks->columns()}, scores.options());
  std::vector<float> shares(count), weights(tokens * per_token);
  std::vector<char> taken(count);
  std::vector<int64_t> chosen(tokens * per_token), starts(count + 1);
  for (int64_t t = 0; t < tokens; t++) {
    choose_networks(scores.const_data_ptr<float>() + t * count, count, per_token, normalised, shares.data(), taken.data(),
                    &chosen[t * per_token], &weights[t * per_token]);
    for (int64_t k = 0; k < per_token; k++) starts[chosen[t * per_token + k] + 1]++;
  }
  for (int64_t i = 0; i < count; i++) starts[i + 1] += starts[i];
  std::vector<int64_t> pairs(tokens * per_token), next(starts.begin(), starts.end() - 1);
  for (int64_t pair = 0; pair < tokens * per_token; pair++) pairs[next[chosen[pair]]++] = pair;

  const int64_t bytes = x.size(1) * x.element_size(), stride = x.stride(0) * x.element_size(), columns = total.size(1);
  const auto* rows = static_cast<const char*>(x.const_data_ptr());
  auto* sums = total.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; i++) {
    const int64_t n = starts[i + 1] - starts[i];
    if (!n) continue;
    const int64_t* mine = &pairs[starts[i]];
    Tensor input = x;
    if (n < tokens) {
      input = at::empty({n, x.size(1)}, x.options());
      auto* gathered = static_cast<char*>(input.mutable_data_ptr());
      for_rows(team(), n, x.size(1), [&](int64_t row) { std::memcpy(gathered + row * bytes, rows + mine[row] / per_token * stride, bytes); });
    }
    const Tensor output = networks->run(i, input);
    const float* y = output.const_data_ptr<float>();
    // A token's networks are added in the order of their numbers.
    for_rows(team(), n, columns, [&](int64_t row) {
      const float weight = weights[mine[row]];
      float* sum = sums + mine[row] / per_token * columns;
      for (int64_t j = 0; j < columns; j++) sum[j] += weight * y[row * columns + j];
    });
  }
  return total;
}

}  // namespace
