"""A pretend GPU: tensors that say they are on "cuda", hold real numbers that the CPU computes, and fail where a GPU's would.

    with pretend_gpu():
        torch.ones(3, device="cuda") + torch.ones(3)  # RuntimeError: Expected all tensors to be on the same device

It marks the storages of CPU tensors, and looks at every call of torch in Python. What CUDA allows is allowed: copies between
devices, CPU scalars (0-dim tensors) beside tensors on the GPU, CPU indices into them. What cannot be seen: mixing inside one
call of torch, calls in threads, speed, memory, streams, and what CUDA's own kernels lack or round otherwise.

For its compute capability, 7.0, moepress takes plain torch in place of its Triton kernels; with (8, 0) these run in Triton's
interpreter. While a CUDA graph is "captured" nothing may wait for the GPU; there is nothing to replay.
"""

from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

MEMORY = 8 * 2**30
CUDA = torch.device("cuda", 0)
MOVES = ("to", "type_as", "cpu", "cuda", "as_tensor", "asarray")
ANYWHERE = ("copy_", "__deepcopy__", "__set__", "expand_as", "view_as", "reshape_as")
ANYWHERE += ("_has_compatible_shallow_copy_type",)  # asked by modules that move
MAKES_NUMPY = ("numpy", "__array__")
WAITS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "bincount", "masked_select", "unique")


def is_on_gpu(tensor: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return getattr(tensor.untyped_storage(), "is_on_gpu", False)


def mark(value, to_gpu: bool = True) -> None:
    """Say of all tensors in a result where they are."""
    for tensor in tensors_of(value):
        with torch._C.DisableTorchFunction():
            tensor.untyped_storage().is_on_gpu = to_gpu


def tensors_of(*values) -> list[torch.Tensor]:
    """Those among some values and what they hold; none of the meta device."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found += [] if value.is_meta else [value]
        elif isinstance(value, list | tuple | dict):
            found += tensors_of(*(value.values() if isinstance(value, dict) else value))
    return found


def mixed(name: str, tensor: torch.Tensor) -> RuntimeError:
    found = f"found at least two devices, cuda:0 and cpu! (in {name}, a {tensor.device.type} tensor of shape {[*tensor.shape]})"
    return RuntimeError(f"Expected all tensors to be on the same device, but {found}")


def check(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether the result is on the GPU. Raises RuntimeError for tensors of both devices where CUDA does not allow it."""
    tensors = tensors_of(args, kwargs)
    on_gpu = any(map(is_on_gpu, tensors))
    if name in ANYWHERE or not on_gpu:
        return on_gpu and is_on_gpu(tensors[0])
    if name in ("__getitem__", "__setitem__", "index_put_", "index_put"):
        own, indices, values = args[0], [i for i in tensors_of(args[1]) if i.dim()], tensors_of(args[2:])
        if wrong := [i for i in indices if is_on_gpu(i) and not is_on_gpu(own)]:
            raise mixed(name, wrong[0])
        if wrong := [v for v in values if indices and v.dim() and is_on_gpu(v) != is_on_gpu(own)]:
            raise mixed(name, wrong[0])
        return is_on_gpu(own)
    is_inplace = (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name != "__invert__")
    written = [*args[:is_inplace], *tensors_of(kwargs.get("out"))]
    for tensor in tensors:
        if not is_on_gpu(tensor) and (tensor.dim() or any(tensor is each for each in written)):
            raise mixed(name, tensor)
    return True


class Devices(TorchFunctionMode):
    """Sees every call of torch: where its tensors are, and so where its result is. Inside torch all are on the CPU."""

    def __init__(self):
        super().__init__()
        self.is_inside = self.is_recording = False

    @contextmanager
    def state(self, **state: bool):
        before = {name: getattr(self, name) for name in state}
        vars(self).update(state)
        try:
            yield
        finally:
            vars(self).update(before)

    def record(self, name: str, args: tuple, to_gpu: bool) -> None:
        """RuntimeError for what waits for the GPU, or reads the CPU's memory, while a CUDA graph is captured."""
        tensors = tensors_of(args)
        is_mixed = len({is_on_gpu(tensor) for tensor in tensors if tensor.dim()} | ({to_gpu} if name in MOVES else set())) > 1
        is_mask = name == "__getitem__" and any(tensor.dtype == torch.bool for tensor in tensors_of(args[1:]))
        if is_mixed or is_mask or (name in WAITS and any(map(is_on_gpu, tensors))) or (name == "tensor" and to_gpu):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", str(func)), dict(kwargs or {})
        if name == "__get__":
            found = func(*args, **kwargs)
            if func == torch.Tensor.grad.__get__ and found is not None:  # made by autograd, out of sight
                mark(found, is_on_gpu(args[0]))
            return found
        if name in MAKES_NUMPY and is_on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if name == "get_device":
            return 0 if is_on_gpu(args[0]) else -1
        if name in MOVES and isinstance(args[0], torch.Tensor):
            return self.move(name, args, kwargs)
        wanted = kwargs.get("device")
        if wanted is None:
            to_gpu = check(name, args, kwargs)
        elif to_gpu := torch.device(wanted).type == "cuda":
            kwargs["device"] = "cpu"
        if self.is_recording:
            self.record(name, args, to_gpu)
        if isinstance(generator := kwargs.get("generator"), torch.Generator):
            own, its = "cuda" if to_gpu else "cpu", generator.device.type
            if own != its:
                raise RuntimeError(f"Expected a '{own}' device type for generator but found '{its}'")
        if name == "histc" and to_gpu and not args[0].is_floating_point():  # CUDA has it for integers, too
            args = (args[0].float(), *args[1:])
        with self.state(is_inside=True):
            found = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in tensors_of(args, kwargs)} if wanted is None else ()
        mark([t for t in tensors_of(found) if t.untyped_storage()._cdata not in known], to_gpu)
        return found

    def move(self, name: str, args: tuple, kwargs: dict):
        """`Tensor.to` and its like: to another device a copy."""
        own, *rest = args
        if name in ("cpu", "cuda"):
            rest = [name]
        copy = kwargs.pop("copy", False)
        device, dtype, *_ = torch._C._nn._parse_to(*rest, **kwargs)
        device, dtype = device or own.device, dtype or own.dtype
        if device.type == "meta" or own.is_meta:
            return own.to(device, dtype)
        to_gpu = is_on_gpu(rest[0]) if rest and isinstance(rest[0], torch.Tensor) else device.type == "cuda"
        if self.is_recording:
            self.record(name, (own,), to_gpu)
        made = own.to(dtype, copy=copy or to_gpu != is_on_gpu(own))
        if made is not own:
            mark(made, to_gpu)
        return made


class Generator(torch.Generator):
    """torch's, with a device that may be the pretend GPU's."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    @property
    def device(self):
        return self.place


class Autocast(torch.autocast):
    """That of CUDA by that of the CPU."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@contextmanager
def pretend_gpu(capability: tuple[int, int] = (7, 0)):
    """Inside, this machine has one GPU."""
    facts = SimpleNamespace(name="Pretend", total_memory=MEMORY, shared_memory_per_block_optin=2**17)
    zero, nothing = lambda *_: 0, lambda *_: None
    cuda = {
        "_lazy_init": nothing,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": zero,
        "get_device_name": lambda *_: facts.name,
        "get_device_properties": lambda *_: facts,
        "get_device_capability": lambda *_: capability,
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (MEMORY, MEMORY),
        "memory_allocated": zero,
        "max_memory_allocated": zero,
        "reset_peak_memory_stats": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "device": lambda _: nullcontext(),
        "device_of": lambda _: nullcontext(),
        "Stream": mock.MagicMock,
        "stream": lambda _: nullcontext(),
        "current_stream": lambda *_: mock.MagicMock(),
        "CUDAGraph": mock.MagicMock,
        "graph": lambda _: mode.state(is_recording=True),
    }
    native, mode, keep = torch.Tensor.device, Devices(), checkpoint._checkpoint_without_reentrant_generator
    tensor = {
        "device": property(lambda own: CUDA if is_on_gpu(own) and not mode.is_inside else native.__get__(own)),
        "is_cuda": property(lambda own: own.device.type == "cuda"),
        "is_cpu": property(lambda own: own.device.type == "cpu"),
    }

    def checkpointed(function, *args, **kwargs):
        def again(*inputs, **keywords):  # on the way back, inside torch
            with mode, mode.state(is_inside=False):
                return function(*inputs, **keywords)

        return keep(again, *args, **kwargs)

    # what a torch that is built for CUDA asks a driver for
    accelerator = {"current_device_index": zero, "current_stream": lambda *_: SimpleNamespace(is_capturing=lambda: False)}

    places = [(torch.cuda, cuda), (torch.accelerator, accelerator), (torch.Tensor, tensor)]
    places.append((torch, {"Generator": Generator, "autocast": Autocast}))
    places.append((checkpoint, {"_checkpoint_without_reentrant_generator": checkpointed}))
    with ExitStack() as stack:
        for place, answers in places:
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(place, name, answer))
        looks = {"default": lambda tensor: (tensor.shape, tensor.dtype)}  # not at devices: inside torch all are on the CPU
        stack.enter_context(mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, looks))
        stack.enter_context(mode)
        yield
