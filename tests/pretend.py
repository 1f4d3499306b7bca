"""A device that is not the CPU, on machines that have no other.

Every operation runs on the CPU, with tensors that say they live elsewhere. One that mixes them with
the CPU's raises, as on a GPU; one that makes the host wait for the device is written down, with the
line of ours that caused it. What this cannot show: kernels, autocast, streams, memory and speed.
"""

import contextlib
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

REPO, HERE = Path(__file__).parents[1], Path(__file__)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2"}
COPIES = {"_to_copy", "copy_"}


class Module(backend_registration._DummyBackendModule):
    """What torch asks a device's module for."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("gpu", Module())
torch.serialization.register_package(  # a saved storage is the CPU's; loading moves it with `to`
    5, lambda storage: None, lambda storage, place: storage if place.startswith("gpu") else None
)
DEVICE = torch.device("gpu", 0)


class Far(torch.Tensor):
    """A tensor on the device; `near` has its numbers."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device=DEVICE
        )

    def __init__(self, near):
        self.near = near

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of `pretending`")

    def tolist(self):  # torch's own refuses subclasses
        return self.cpu().tolist()

    def untyped_storage(self):  # safetensors asks where it begins
        return self.near.untyped_storage()

    def __reduce_ex__(self, protocol):
        return self.cpu().__reduce_ex__(protocol)


class Pretend(TorchDispatchMode):
    """Runs every operation of `Far` tensors. `waits`: file, line number and line of each wait."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        if name == "_fused_sdp_choice":
            return 0  # written out: no fused kernel is the device's
        device, moved = kwargs.get("device"), "device" in kwargs
        flat = list(tree_iter((args, kwargs)))
        far = {id(x.near): x for x in flat if isinstance(x, Far)}
        near = [x for x in flat if type(x) in (torch.Tensor, torch.nn.Parameter) and x.dim()]
        if name in ("index", "index_put", "index_put_"):  # indices may come from the CPU
            near = [x for x in near if not any(x is index for index in args[1])]
        if far and near and name not in COPIES:
            raise RuntimeError(f"{func} mixes {DEVICE} and cpu: {caller()}")
        to = torch.device(device).type if device is not None else None
        if name in WAITS and far or name in COPIES and (near and far or far and to == "cpu"):
            self.waits.append(caller())
        elif name == "_to_copy" and not far and to == "gpu" or looks_up_booleans(name, args):
            self.waits.append(caller())
        if moved:
            kwargs["device"] = torch.device("cpu") if to == "gpu" else device
        strip = lambda tree: tree_map_only(Far, lambda x: x.near, tree)
        out = func(*strip(args), **strip(kwargs))
        here = to == "gpu" if to else isinstance(args[0], Far) if name == "copy_" else bool(far)
        wrap = lambda x: far[id(x)] if id(x) in far else Far(x)  # what works in place returns it
        return tree_map_only(torch.Tensor, wrap, out) if here else out


def looks_up_booleans(name: str, args) -> bool:
    """Is the shape of the result, or of what is written, in the data?"""
    if name not in ("index", "index_put", "index_put_"):
        return False
    masks = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return masks and (name == "index" or args[2].numel() > 1)


def caller() -> str:
    """The line of ours, not a test's, that is being executed."""
    frame = sys._getframe()
    while frame and Path(frame.f_code.co_filename).parent not in (REPO, REPO / "examples"):
        frame = frame.f_back
    if frame is None:
        return "a test"
    file, number = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(file).name}:{number} {linecache.getline(file, number).strip()}"


@contextlib.contextmanager
def pretending() -> Iterator[list[str]]:
    """Inside there is such a device, DEVICE; yields the list of waits."""
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with torch.autograd.set_multithreading_enabled(False), Pretend() as mode:
            yield mode.waits
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
