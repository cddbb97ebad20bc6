// Whether a call of a fused convolution is the one that was prepared before: same modules in the
// same state, a tensor of the same layout, nothing that would have to see the call.

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "ops.h"

namespace py = pybind11;

namespace fused_resnet {
namespace {

// Whether an op may run here without telling anyone: no gradient, autocast, profiler, dispatch or
// torch-function mode, transform of torch.func, or tracer is at work on this thread.
bool nobody_watches() {
  if (c10::GradMode::is_enabled() || at::impl::torch_function_mode_enabled()) return false;
  if (at::hasCallbacks()) return false;
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return keys.excluded_.has_all(c10::autocast_dispatch_keyset) &&
         (keys.included_ - c10::default_included_set).empty();
}

// Python objects that the guard compares with, found once.
struct Classes {
  py::object tensor, conv, batch_norm, relu;
  std::array<py::object, 4> global_hooks;  // dictionaries of torch.nn.modules.module

  static const Classes& get() {
    // Never destroyed: the interpreter may be gone before.
    static const Classes* classes = new Classes();
    return *classes;
  }

 private:
  Classes() {
    const py::module_ nn = py::module_::import("torch.nn");
    tensor = py::module_::import("torch").attr("Tensor");
    conv = nn.attr("Conv2d");
    batch_norm = nn.attr("BatchNorm2d");
    relu = nn.attr("ReLU");
    const py::module_ module = py::module_::import("torch.nn.modules.module");
    global_hooks = {module.attr("_global_forward_hooks"), module.attr("_global_forward_pre_hooks"),
                    module.attr("_global_backward_hooks"),
                    module.attr("_global_backward_pre_hooks")};
  }
};

// Attribute names as Python keeps them, so that a lookup compares pointers.
struct Names {
  PyObject* forward = PyUnicode_InternFromString("forward");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
  PyObject* buffers = PyUnicode_InternFromString("_buffers");
  PyObject* training = PyUnicode_InternFromString("training");
  PyObject* eps = PyUnicode_InternFromString("eps");
  std::array<PyObject*, 4> hooks = {PyUnicode_InternFromString("_forward_hooks"),
                                    PyUnicode_InternFromString("_forward_pre_hooks"),
                                    PyUnicode_InternFromString("_backward_hooks"),
                                    PyUnicode_InternFromString("_backward_pre_hooks")};
  // What nn.Conv2d reads beside its parameters.
  std::array<PyObject*, 5> geometry = {
      PyUnicode_InternFromString("stride"), PyUnicode_InternFromString("padding"),
      PyUnicode_InternFromString("dilation"), PyUnicode_InternFromString("groups"),
      PyUnicode_InternFromString("padding_mode")};
  std::array<PyObject*, 2> conv_parameters = {PyUnicode_InternFromString("weight"),
                                              PyUnicode_InternFromString("bias")};
  std::array<PyObject*, 3> norm_buffers = {PyUnicode_InternFromString("running_mean"),
                                           PyUnicode_InternFromString("running_var"),
                                           PyUnicode_InternFromString("num_batches_tracked")};

  static const Names& get() {
    static const Names* names = new Names();
    return *names;
  }
};

bool is_empty_dict(PyObject* value) {
  return value != nullptr && PyDict_Check(value) && PyDict_GET_SIZE(value) == 0;
}

bool no_global_hooks() {
  for (const py::object& hooks : Classes::get().global_hooks) {
    if (!is_empty_dict(hooks.ptr())) return false;
  }
  return true;
}

// The instance dictionary of a module that does what its class says, or nothing.
std::optional<py::object> plain_module(py::handle module, const py::object& cls) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())) != cls.ptr()) return std::nullopt;
  py::object dict =
      py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
  if (!dict) throw py::error_already_set();
  const Names& names = Names::get();
  if (PyDict_GetItem(dict.ptr(), names.forward) != nullptr) return std::nullopt;
  for (PyObject* hooks : names.hooks) {
    if (!is_empty_dict(PyDict_GetItem(dict.ptr(), hooks))) return std::nullopt;
  }
  return dict;
}

// A tensor that a module holds: the object, its memory and its version. The weak references keep
// both addresses from being given to others, so equal addresses mean the same tensor and memory.
class HeldTensor {
 public:
  explicit HeldTensor(const at::Tensor& tensor)
      : impl_(tensor.getIntrusivePtr()),
        storage_(tensor.storage().getWeakStorageImpl()),
        raw_impl_(tensor.unsafeGetTensorImpl()),
        raw_storage_(tensor.storage().unsafeGetStorageImpl()),
        data_(tensor.const_data_ptr()),
        version_(tensor._version()) {}

  bool is(const at::Tensor& tensor) const {
    return tensor.unsafeGetTensorImpl() == raw_impl_ &&
           tensor.storage().unsafeGetStorageImpl() == raw_storage_ &&
           tensor.const_data_ptr() == data_ && tensor._version() == version_;
  }

 private:
  c10::weak_intrusive_ptr<c10::TensorImpl> impl_;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const c10::TensorImpl* raw_impl_;
  const c10::StorageImpl* raw_storage_;
  const void* data_;
  uint32_t version_;
};

// An entry of a module's `_parameters` or `_buffers`: a tensor, or None.
class HeldEntry {
 public:
  // Nothing where the entry cannot be guarded: absent, or a tensor that keeps no version.
  static std::optional<HeldEntry> of(PyObject* value) {
    if (value == nullptr) return std::nullopt;
    if (value == Py_None) return HeldEntry();
    if (!THPVariable_Check(value)) return std::nullopt;
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (tensor.is_inference() || tensor.layout() != at::kStrided || !tensor.has_storage()) {
      return std::nullopt;
    }
    // A subclass that is told of every op, as DTensor is.
    if (tensor.key_set().has_any(c10::python_ks)) return std::nullopt;
    HeldEntry entry;
    entry.tensor_.emplace(tensor);
    return entry;
  }

  bool is(PyObject* value) const {
    if (!tensor_.has_value()) return value == Py_None;
    return value != nullptr && THPVariable_Check(value) && tensor_->is(THPVariable_Unpack(value));
  }

 private:
  std::optional<HeldTensor> tensor_;
};

// Layout of an activation.
class HeldLayout {
 public:
  static std::optional<HeldLayout> of(py::handle value) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())) != Classes::get().tensor.ptr()) {
      return std::nullopt;
    }
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    if (tensor.dim() != 4 || tensor.layout() != at::kStrided) return std::nullopt;
    HeldLayout layout;
    layout.keys_ = tensor.key_set();
    layout.dtype_ = tensor.scalar_type();
    layout.device_ = tensor.device();
    for (int d = 0; d < 4; ++d) {
      layout.sizes_[d] = tensor.size(d);
      layout.strides_[d] = tensor.stride(d);
    }
    return layout;
  }

  bool is(py::handle value) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())) != Classes::get().tensor.ptr()) {
      return false;
    }
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    return tensor.key_set() == keys_ && tensor.scalar_type() == dtype_ &&
           tensor.device() == device_ && tensor.sizes().equals(sizes_) &&
           tensor.strides().equals(strides_);
  }

 private:
  c10::DispatchKeySet keys_;  // those of lazily negated, conjugated or wrapped tensors differ
  at::ScalarType dtype_ = at::kFloat;
  c10::Device device_ = at::kCPU;
  std::array<int64_t, 4> sizes_{};
  std::array<int64_t, 4> strides_{};
};

// The state of a call act(bn(conv(x)) + residual) that was computed by one op.
class CallGuard {
 public:
  // Guards the call; None where it is not one whose every condition this class can check.
  static py::object of(py::handle x, py::handle residual, py::handle conv, py::handle bn,
                       py::handle act) {
    CallGuard guard;
    if (!guard.record(x, residual, conv, bn, act)) return py::none();
    return py::cast(std::move(guard));
  }

  // Whether this call may be computed as the recorded one was.
  bool holds(py::handle x, py::handle residual, py::handle conv, py::handle bn,
             py::handle act) const {
    if (!nobody_watches() || !x_->is(x) || !no_global_hooks()) return false;
    if (residual_.has_value() ? !residual_->is(residual) : !residual.is_none()) return false;
    const Classes& classes = Classes::get();
    const Names& names = Names::get();

    const auto conv_dict = plain_module(conv, classes.conv);
    if (!conv_dict) return false;
    for (size_t i = 0; i < geometry_.size(); ++i) {
      if (PyDict_GetItem(conv_dict->ptr(), names.geometry[i]) != geometry_[i].ptr()) return false;
    }
    size_t entry = 0;
    if (!same(*conv_dict, names.parameters, names.conv_parameters, entry)) return false;

    if (has_act_ ? !plain_module(act, classes.relu) : !act.is_none()) return false;
    if (!has_norm_) return bn.is_none();
    const auto norm_dict = plain_module(bn, classes.batch_norm);
    if (!norm_dict || PyDict_GetItem(norm_dict->ptr(), names.training) != Py_False) return false;
    if (PyDict_GetItem(norm_dict->ptr(), names.eps) != eps_.ptr()) return false;
    return same(*norm_dict, names.parameters, names.conv_parameters, entry) &&
           same(*norm_dict, names.buffers, names.norm_buffers, entry);
  }

 private:
  bool record(py::handle x, py::handle residual, py::handle conv, py::handle bn, py::handle act) {
    x_ = HeldLayout::of(x);
    if (!x_) return false;
    if (!residual.is_none()) {
      residual_ = HeldLayout::of(residual);
      if (!residual_) return false;
    }
    const Classes& classes = Classes::get();
    const Names& names = Names::get();
    const auto conv_dict = plain_module(conv, classes.conv);
    if (!conv_dict) return false;
    for (size_t i = 0; i < geometry_.size(); ++i) {
      // Held, so that no other object can take its address.
      geometry_[i] =
          py::reinterpret_borrow<py::object>(PyDict_GetItem(conv_dict->ptr(), names.geometry[i]));
      if (!geometry_[i]) return false;
    }
    if (!record(*conv_dict, names.parameters, names.conv_parameters)) return false;
    has_act_ = !act.is_none();
    if (has_act_ && !plain_module(act, classes.relu)) return false;
    has_norm_ = !bn.is_none();
    if (!has_norm_) return true;
    const auto norm_dict = plain_module(bn, classes.batch_norm);
    if (!norm_dict || PyDict_GetItem(norm_dict->ptr(), names.training) != Py_False) return false;
    eps_ = py::reinterpret_borrow<py::object>(PyDict_GetItem(norm_dict->ptr(), names.eps));
    return eps_ && record(*norm_dict, names.parameters, names.conv_parameters) &&
           record(*norm_dict, names.buffers, names.norm_buffers);
  }

  template <size_t kCount>
  bool record(const py::object& module_dict, PyObject* table,
              const std::array<PyObject*, kCount>& keys) {
    PyObject* entries = PyDict_GetItem(module_dict.ptr(), table);
    if (entries == nullptr || !PyDict_Check(entries)) return false;
    for (PyObject* key : keys) {
      auto entry = HeldEntry::of(PyDict_GetItem(entries, key));
      if (!entry) return false;
      entries_.push_back(std::move(*entry));
    }
    return true;
  }

  template <size_t kCount>
  bool same(const py::object& module_dict, PyObject* table,
            const std::array<PyObject*, kCount>& keys, size_t& entry) const {
    PyObject* entries = PyDict_GetItem(module_dict.ptr(), table);
    if (entries == nullptr || !PyDict_Check(entries)) return false;
    for (PyObject* key : keys) {
      if (!entries_[entry++].is(PyDict_GetItem(entries, key))) return false;
    }
    return true;
  }

  std::optional<HeldLayout> x_, residual_;
  std::array<py::object, 5> geometry_;
  py::object eps_;
  bool has_act_ = false;
  bool has_norm_ = false;
  // weight and bias of conv; weight, bias, running_mean, running_var, num_batches_tracked of bn
  std::vector<HeldEntry> entries_;
};

}  // namespace

void bind_call_guard(py::module_& m) {
  py::class_<CallGuard>(m, "CallGuard", "The recorded state of a call of a fused convolution.")
      .def_static("of", &CallGuard::of, py::arg("x"), py::arg("residual"), py::arg("conv"),
                  py::arg("bn"), py::arg("act"),
                  "A guard of this call, or None if not everything it depends on can be checked.")
      .def("holds", &CallGuard::holds, py::arg("x"), py::arg("residual"), py::arg("conv"),
           py::arg("bn"), py::arg("act"),
           "Whether a call is the guarded one again, and nobody but its caller is to see it.");
}

}  // namespace fused_resnet
