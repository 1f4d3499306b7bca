"""How many bytes are alive at once? Runs the code on tensors with shapes and no numbers."""

import contextlib
import weakref

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import plan

aten = torch.ops.aten


class Counting(TorchDispatchMode):
    """`now` is the bytes of all storages that are alive, `most` the largest it was.

    What only numbers could tell is answered by the largest case: all rows live, all places hidden.
    """

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it comes again with the part that this rank holds
        everywhere = lambda x: torch.zeros(x.numel(), dtype=torch.long)
        if func is aten._local_scalar_dense.default:
            return {torch.bool: False, torch.long: 2**20}.get(args[0].dtype, 1.0)
        if func is aten.nonzero.default:
            out = everywhere(args[0])[:, None].expand(-1, args[0].dim())
        elif func is aten.index.Tensor and getattr(args[1][0], "dtype", 0) == torch.bool:
            (where,) = args[1]
            out = func(args[0].flatten(0, where.dim() - 1), [everywhere(where)])
        else:
            out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor) and x.untyped_storage()._cdata not in self.sizes:
                storage = x.untyped_storage()
                self.resize(storage, storage.nbytes())
                weakref.finalize(storage, self.resize, storage._cdata, None)
        return out

    def resize(self, storage, size: int | None):
        key = storage if size is None else storage._cdata
        self.now += (size or 0) - self.sizes.pop(key, 0)
        self.most = max(self.most, self.now)
        if size is not None:
            self.sizes[key] = size

    def peak(self, work) -> tuple[object, int]:
        """What `work` returns, and the most that was alive meanwhile."""
        self.most = self.now
        return work(), self.most


@contextlib.contextmanager
def counting():
    """Counts the fake tensors made inside; FSDP frees a storage by giving it no size."""
    resize = torch.UntypedStorage.resize_
    with FakeTensorMode(allow_non_fake_inputs=True), Counting() as count:

        def resized(storage, size):
            if storage._cdata in count.sizes:
                count.resize(storage, size)
            return resize(storage, size)

        torch.UntypedStorage.resize_ = resized
        try:
            yield count
        finally:
            torch.UntypedStorage.resize_ = resize


def allocated(net):
    """The network of the meta device with weights that take room; in place."""
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(
                module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
            )
    net.never_V = torch.zeros(net.config.vocab_size, dtype=torch.bool)
    net.ends = torch.zeros(1, dtype=torch.long)
    return net


class Packed(nn.Module):
    """Takes the room of bitsandbytes' nf4 linear, whose Params4bit cannot be a fake tensor: the
    stored bytes, and the whole weight while it is multiplied, forward and backward."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        size = int(linear.weight.numel() * plan.NF4)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
        self.bias, self.dtype = linear.bias, linear.weight.dtype

    def forward(self, x):
        y = Unpacked.apply(x.to(self.dtype), (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias


class Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shape):
        ctx.shape = shape
        return x @ torch.empty(shape, dtype=x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ torch.empty(ctx.shape, dtype=grad.dtype), None
