"""What kernels and steps cost, by counting: the same numbers on every machine."""

import collections
import contextlib

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@contextlib.contextmanager
def _before_every_launch(hook):
    """Calls `hook(name, kernel, arguments)` for our kernels, compiled or interpreted."""
    from abft_kernels.loss_triton import backward, forward, query_gradient

    hooks = []
    for module in (forward, backward, query_gradient):
        for full_name, kernel in vars(module).items():
            if full_name.endswith("_kernel"):
                name = full_name.strip("_").removesuffix("_kernel")
                hooks.append((kernel, lambda *args, n=name, k=kernel, **_: hook(n, k, args)))
    for kernel, called in hooks:
        kernel.add_pre_run_hook(called)
    try:
        yield
    finally:
        for kernel, called in hooks:
            kernel.pre_run_hooks.remove(called)


@contextlib.contextmanager
def counted_launches():
    """Counter of launches by kernel."""
    found = collections.Counter()
    with _before_every_launch(lambda name, *_: found.update([name])):
        yield found


def moved(found, before):
    """Which counts are not what they were; empty where all are."""
    return ", ".join(
        f"{name}: {found.get(name, 0)}, before {before.get(name, 0)}"
        for name in {**before, **found}
        if found.get(name, 0) != before.get(name, 0)
    )


class Traffic:
    """Bytes that interpreted kernels load and store, by kernel and argument.

    Masked elements are neither read nor written. Of arguments that share memory the first counts.

    Attributes:
        read, written: bytes by (kernel, argument).
    """

    def __init__(self):
        self.read, self.written = collections.Counter(), collections.Counter()
        self._kernel, self._arguments = None, []

    def of(self, kernel):
        """Both counters of one kernel, arguments that moved nothing left out."""
        return tuple(
            {name: size for (where, name), size in counter.items() if where == kernel and size}
            for counter in (self.read, self.written)
        )

    def begin(self, name, kernel, arguments):
        """A launch; the kernel's pointers come before all it takes by name."""
        self._kernel, self._arguments = name, []
        for argument, value in zip(kernel.arg_names, arguments, strict=False):
            if isinstance(value, Tensor) and value.numel():
                span = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
                start = value.data_ptr()
                end = start + (span + 1) * value.element_size()
                self._arguments.append((argument.removesuffix("_ptr"), start, end))

    def move(self, counter, pointers, mask):
        """One load or store of the launch that runs."""
        addresses = pointers.data[mask.data.astype(bool)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        for name, start, end in self._arguments:
            inside = (addresses >= start) & (addresses < end)
            counter[self._kernel, name] += int(inside.sum()) * size
            addresses = addresses[~inside]
        assert not addresses.size, f"{self._kernel} moves bytes outside its arguments"


@contextlib.contextmanager
def counted_traffic():
    """The Traffic of what runs inside."""
    from triton.runtime.interpreter import interpreter_builder as interpreter

    found = Traffic()
    load, store = interpreter.create_masked_load, interpreter.create_masked_store

    def counted_load(pointers, mask, *rest):
        found.move(found.read, pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        found.move(found.written, pointers, mask)
        return store(pointers, value, mask, *rest)

    interpreter.create_masked_load = counted_load
    interpreter.create_masked_store = counted_store
    try:
        with _before_every_launch(found.begin):
            yield found
    finally:
        del interpreter.create_masked_load, interpreter.create_masked_store


class Waits(contextlib.ExitStack):
    """Counts what makes a host wait for its device: values, shapes or data that move between them.

    On a CPU nothing waits, but the calls are the same.

    Args:
        inside_ops: look inside this project's own ops too, with what they do on a CPU alone.

    Attributes:
        found: times each was called.
    """

    def __init__(self, inside_ops=False):
        super().__init__()
        self.found = collections.Counter()
        calls = _CallsThatWait(self.found)
        self._modes = calls, _OpsThatWait(self.found, calls if inside_ops else None)

    def __enter__(self):
        for mode in self._modes:
            self.enter_context(mode)
        return super().__enter__().found


class _CallsThatWait(TorchFunctionMode):
    """Those that reach no op on a CPU."""

    _NAMES = ("tolist", "numpy", "cpu", "as_tensor", "tensor", "new_tensor", "synchronize")

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", None)
        if name in self._NAMES and not (name == "as_tensor" and isinstance(args[0], Tensor)):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class _OpsThatWait(TorchDispatchMode):
    """Those that do."""

    _NAMES = (
        "item", "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero",
        "unique_dim", "_unique", "_unique2", "unique_consecutive", "repeat_interleave",
    )  # fmt: skip

    def __init__(self, found, calls_inside):
        super().__init__()
        self.found, self.calls_inside = found, calls_inside

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:2])
        )
        counted = kwargs and kwargs.get("output_size") is not None  # then the device need not count
        if (name in self._NAMES and not counted) or by_mask:
            self.found["item" if name == "_local_scalar_dense" else name] += 1
        if self.calls_inside and function.namespace == "abft":
            inside = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            with self, self.calls_inside:
                return function.redispatch(inside, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """Notes the most elements of any one tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = (t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        self.elements = max(self.elements, *made, 0)
        return out


class MatrixProducts(TorchDispatchMode):
    """Counts the floating-point operations of matrix products.

    torch's own counter needs the graphs of modules that `local` computes without one.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.flops += flop_registry[function.overloadpacket](*args, out_val=out)
        return out
