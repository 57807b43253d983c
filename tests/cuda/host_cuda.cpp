// A device of type CUDA in host memory, for a torch without CUDA: every operation runs on the CPU.
//
// What it is for: the branches that code takes for CUDA tensors, with real values, autograd's device
// thread included. Operations that mix devices are refused as CUDA refuses them, and so is, where a
// test asks for that, every read of a device's value by the host, which on a GPU would wait.
//
// A captured graph is a list of operations with the very memory they were given. Between
// `capture(true)` and `capture(false)` they run as always, so that what follows has values; then all
// memory gets its former contents back, as if they had not. `replay` runs them again.
//
// To be loaded before libtorch, which asks once whether there is a CUDA (host_cuda.py does).

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <mutex>
#include <set>
#include <string>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
bool may_read = true;
bool capturing = false;

void host_reads() {
  TORCH_CHECK(!capturing, "operation not permitted when stream is capturing: the host reads");
  TORCH_CHECK(may_read, "the host waits for the device");
}

// All memory of the device, for a capture to give it back its contents.
std::mutex storages_mutex;
std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages;
struct Contents {
  c10::Storage storage;
  std::vector<char> bytes;
};
std::vector<Contents> before;

at::Tensor known(at::Tensor t) {
  std::lock_guard<std::mutex> lock(storages_mutex);
  if (storages.size() > 100000) {
    std::erase_if(storages, [](const auto& weak) { return weak.expired(); });
  }
  storages.emplace_back(t.storage().getWeakStorageImpl());
  return t;
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    return {data, data, &std::free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

Memory memory;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

// The same elements as a CPU tensor.
at::Tensor on_host(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  auto plain = at::from_blob(
      t.data_ptr(), t.sizes(), t.strides(), [t](void*) {}, options);
  if (t.is_conj()) plain = plain.conj();
  if (t.is_neg()) plain = plain._neg_view();
  return plain;
}

// A CPU tensor's memory as a tensor of the device.
at::Tensor on_device(const at::Tensor& t) {
  if (!t.defined() || t.is_cuda()) return t;
  return known(at::from_blob(
      t.data_ptr(), t.sizes(), t.strides(), [t](void*) {},
      at::TensorOptions().dtype(t.dtype()).device(kDevice), kDevice));
}

// Another name of the same elements, whatever is done to `t` itself.
at::Tensor name_of(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(), t.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(t.storage_offset());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
  return view;
}

c10::IValue names_of(const c10::IValue& value) {
  if (value.isTensor()) return name_of(value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> list;
    for (const auto& t : value.toTensorVector()) list.push_back(name_of(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorList()) {
      list.push_back(t ? std::optional<at::Tensor>(name_of(*t)) : t);
    }
    return list;
  }
  return value;
}

struct Recorded {
  c10::OperatorHandle op;
  std::vector<c10::IValue> given, results;
};
std::vector<Recorded> recorded;

void record(
    const c10::OperatorHandle& op, const std::vector<c10::IValue>& given, const c10::IValue* result,
    size_t results) {
  Recorded one{op, {}, {}};
  for (const auto& value : given) one.given.push_back(names_of(value));
  for (size_t i = 0; i < results; ++i) one.results.push_back(names_of(result[i]));
  recorded.push_back(std::move(one));
}

// On a GPU the host would wait to learn how many elements these find.
void check_size_is_known(const c10::OperatorHandle& op, const std::vector<c10::IValue>& given) {
  static const std::set<std::string> finds = {
      "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2",
      "aten::unique_dim", "aten::unique_consecutive", "aten::bincount"};
  const auto& name = op.schema().name();
  if (finds.count(name)) host_reads();
  if (name.rfind("aten::index", 0) != 0 && name.rfind("aten::_index_put", 0) != 0) return;
  for (const auto& value : given) {
    if (!value.isOptionalTensorList()) continue;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorList()) {
      if (!t || !t->defined()) continue;
      if (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte) host_reads();
      TORCH_CHECK(!capturing || t->is_cuda(), "indices in pageable memory while capturing");
    }
  }
}

// As CUDA: tensors on the CPU go with those on the device only if they are scalars; indices may.
void check_one_device(const c10::OperatorHandle& op, const at::Tensor& t) {
  const auto& name = op.schema().name();
  bool indexes = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0;
  TORCH_CHECK(
      !t.defined() || t.is_cuda() || t.dim() == 0 || indexes,
      "Expected all tensors to be on the same device, but found cuda:0 and cpu (", name, ")");
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  size_t count = schema.arguments().size(), first = stack->size() - count;
  std::vector<c10::IValue> given(stack->begin() + first, stack->end());
  check_size_is_known(op, given);
  std::vector<std::pair<at::Tensor, at::Tensor>> grown;
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[first + i];
    const auto* alias = schema.arguments()[i].alias_info();
    if (value.isTensor() && alias && alias->isWrite() && value.toTensor().numel() == 0) {
      const auto& t = value.toTensor();  // an out= that will be given its size
      auto fresh = at::empty(t.sizes(), at::TensorOptions().dtype(t.dtype()).device(at::kCPU));
      grown.emplace_back(t, fresh);
      value = fresh;
    } else if (value.isTensor()) {
      check_one_device(op, value.toTensor());
      value = on_host(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const auto& t : value.toTensorVector()) {
        check_one_device(op, t);
        list.push_back(on_host(t));
      }
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList()) {
        if (t) check_one_device(op, *t);
        list.push_back(t ? std::optional<at::Tensor>(on_host(*t)) : t);
      }
      value = list;
    } else if (value.isDevice()) {
      value = c10::Device(at::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [t, fresh] : grown) {
    if (fresh.sizes() != t.sizes()) t.resize_(fresh.sizes()).copy_(on_device(fresh));
  }
  size_t results = schema.returns().size(), from = stack->size() - results;
  for (size_t i = 0; i < results; ++i) {
    auto& value = (*stack)[from + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {  // the argument itself, not another name of its memory
      for (size_t j = 0; j < count; ++j) {
        const auto* written = schema.arguments()[j].alias_info();
        if (written && *written == *alias) value = given[j];
      }
    } else if (value.isTensor()) {
      value = on_device(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(on_device(t));
      value = list;
    }
  }
  if (capturing) record(op, given, stack->data() + from, results);
}

void same_elements(const at::Tensor& from, const at::Tensor& to) {
  if (!to.defined() || !to.is_cuda() || from.data_ptr() == to.data_ptr()) return;
  on_host(to).copy_(on_host(from));
}

// What was recorded from one operation to another, on the memory of the capture.
void replay(int64_t first, int64_t last) {
  for (int64_t at = first; at < last; ++at) {
    auto& one = recorded[at];
    torch::jit::Stack stack(one.given.begin(), one.given.end());
    if (one.op.schema().name() == "aten::copy_") {
      on_host(stack[0].toTensor()).copy_(on_host(stack[1].toTensor()));
      continue;
    }
    on_cpu(one.op, &stack);
    for (size_t i = 0; i < one.results.size(); ++i) {
      if (one.results[i].isTensor()) {
        same_elements(stack[i].toTensor(), one.results[i].toTensor());
      } else if (one.results[i].isTensorList()) {
        auto from = stack[i].toTensorVector(), to = one.results[i].toTensorVector();
        for (size_t j = 0; j < to.size(); ++j) same_elements(from[j], to[j]);
      }
    }
  }
}

void capture(bool begins) {
  std::lock_guard<std::mutex> lock(storages_mutex);
  capturing = begins;
  if (!begins) {
    for (auto& one : before) {
      std::memcpy(one.storage.mutable_data(), one.bytes.data(), one.bytes.size());
    }
    before.clear();
    return;
  }
  std::set<c10::StorageImpl*> seen;
  for (const auto& weak : storages) {
    auto storage = weak.lock();
    if (!storage || !storage->nbytes() || !seen.insert(storage.get()).second) continue;
    const char* data = static_cast<const char*>(storage->data());
    std::vector<char> bytes(data, data + storage->nbytes());
    before.push_back({c10::Storage(std::move(storage)), std::move(bytes)});
  }
}

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return known(at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format));
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return known(at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype)));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (!self.is_cuda() && !non_blocking) host_reads();
  TORCH_CHECK(
      !capturing || (self.is_cuda() && source.is_cuda()),
      "operation not permitted when stream is capturing: a copy of pageable memory");
  on_host(self).copy_(on_host(source));
  if (capturing) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    record(op, {self, source, non_blocking}, nullptr, 0);
  }
  return self;
}

at::Scalar item(const at::Tensor& self) {
  host_reads();
  return on_host(self).item();
}

// A product of narrow operands with a wide result, which CPUs do not have.
at::Tensor mm_wide(const at::Tensor& a, const at::Tensor& b, at::ScalarType wide) {
  return at::mm(a.to(wide), b.to(wide));
}

at::Tensor as_strided(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
    std::optional<c10::SymInt> offset) {
  auto at_offset = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(at_offset.value_or(self.storage_offset()));
  view.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return view;
}

at::Tensor reshape_alias(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return as_strided(self, size, stride, std::nullopt);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  auto sizes = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(size), self.numel());
  auto strides = at::detail::computeStride(self.sizes(), self.strides(), sizes);
  TORCH_CHECK(strides, "view size is not compatible with the tensor's size and stride");
  return as_strided(
      self, c10::fromIntArrayRefSlow(sizes), c10::fromIntArrayRefSlow(*strides), std::nullopt);
}

const at::Tensor& resize(
    const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto* impl = self.unsafeGetTensorImpl();
  size_t needed = c10::multiply_integers(sizes) * self.element_size();
  if (needed > self.storage().nbytes()) {
    auto grown = memory.allocate(needed);
    std::memcpy(grown.get(), self.data_ptr(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(grown));
    self.storage().set_nbytes(needed);
  }
  impl->set_sizes_contiguous(sizes);
  return self;
}

at::Tensor& set_source(
    at::Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset.expect_int());
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}

TORCH_LIBRARY(host_cuda, m) {
  m.def("host(Tensor device) -> Tensor", &on_host);
  m.def("allow_reads(bool allowed) -> ()", [](bool allowed) { may_read = allowed; });
  m.def("capture(bool begins) -> ()", &capture);
  m.def("recorded() -> int", [] { return static_cast<int64_t>(recorded.size()); });
  m.def("replay(int first, int last) -> ()", &replay);
}
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &item);
  m.impl("mm.dtype", &mm_wide);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("view", &view);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_source);
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
const bool registered = [] {
  c10::SetAllocator(c10::DeviceType::CUDA, &memory);
  return true;
}();

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::Hooks)
}
