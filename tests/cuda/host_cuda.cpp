// A device of type CUDA in host memory, for a torch without CUDA: every operation runs on the CPU.
//
// What it is for: the branches that code takes for CUDA tensors, with real values, autograd's device
// thread included. Operations that mix devices are refused as CUDA refuses them, and so is, where a
// test asks for that, every read of a device's value by the host, which on a GPU would wait.
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
#include <string>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
bool may_read = true;

void host_reads() { TORCH_CHECK(may_read, "the host waits for the device"); }

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
  return at::from_blob(
      t.data_ptr(), t.sizes(), t.strides(), [t](void*) {},
      at::TensorOptions().dtype(t.dtype()).device(kDevice), kDevice);
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
}

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (!self.is_cuda() && !non_blocking) host_reads();
  on_host(self).copy_(on_host(source));
  return self;
}

at::Scalar item(const at::Tensor& self) {
  host_reads();
  return on_host(self).item();
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
}
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &item);
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
