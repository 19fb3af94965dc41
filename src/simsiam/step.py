"""The training step: views, forward, loss, backward, optimiser. On a GPU its kernels are launched as CUDA graphs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from simsiam import ranks
from simsiam.compute import Compute, out_of_memory, seed_of
from simsiam.data.loader import Batch
from simsiam.data.views import ViewSettings, random_views
from simsiam.encoders import Encoder
from simsiam.kernels import Images

_WARM = 3
"""Calls before a capture: libraries set themselves up, and constants are sent to the device."""


class Step:
    """Takes one step on a batch.

    A step is a thousand operations, many of a few microseconds: launched one by one, they leave a GPU waiting for the
    processor. Captured once, they are launched together, and the numbers stay the same.

    Args:
        optimizer: None to leave the weights as they are.
        captures: whether to launch graphs; None: on a GPU, in one process. A method can forbid it (`Siamese.fixed`).
        compiles: whether the encoder is compiled, which fuses BN, ReLU and shortcut.
        say: is told, once, where no graph can be made.
    """

    def __init__(
        self,
        method: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        views: list[ViewSettings],
        compute: Compute,
        captures: bool | None = None,
        compiles: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.method, self.optimizer, self.compute = method, optimizer, compute
        self._forward, self._settings = ranks.parallel(method), views
        self._draws = torch.Generator(compute.device)
        self.encoders = [module for module in method.modules() if isinstance(module, Encoder)]
        self._fused: dict[Encoder, Callable[[list[Tensor]], Sequence[Tensor]]] = {}
        if compiles:
            self._fused = {encoder: torch.compile(encoder.together, dynamic=False) for encoder in self.encoders}
        if captures is None:
            captures = compute.device.type == "cuda" and not ranks.several()
        self._drawn = Captured(self._draw, say, self._draws) if captures else None
        self._differentiated = Captured(self._differentiate, say) if captures else None

    def __call__(self, batch: Batch, *key: int) -> tuple[Tensor, Tensor]:
        """Loss and std, scalars that nobody waits for. What is random is a function of the key and the rank."""
        views = self.views(batch, *key)
        torch.manual_seed(seed_of(*key, -1, *ranks.own_key()))  # dropout's, where there is any
        return self.update(views, batch.index)

    def update(self, views: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """The step without its views."""
        captured = self._differentiated if getattr(self.method, "fixed", True) else None
        loss, std = (captured or self._differentiate)(*views, index)
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.clone(), std.clone()

    def views(self, batch: Batch, *key: int) -> tuple[Tensor, ...]:
        """float32 [B,3,size,size] for every setting, normalised."""
        self._draws.manual_seed(seed_of(*key, *ranks.own_key()))
        images, whole = batch.images, batch.sizes is None
        if whole and isinstance(images, Tensor) and self._drawn is not None and self._drawn.takes(images):
            return self._drawn(images)
        return self._draw(images, batch.sizes)

    def _draw(self, images: Images, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        return random_views(images, self._settings, self._draws, sizes)

    def _differentiate(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *views, index = inputs
        self._forward.zero_grad(set_to_none=True)
        with self.compute.autocast(), self._compiled():
            loss, stats = self._forward(views, index)
        loss.backward()
        return loss.detach(), stats["std"].detach()

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        """Only here: whatever else runs the encoders, in another mode or size, runs them as they are."""
        for encoder, fused in self._fused.items():
            encoder.together = fused  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            for encoder in self._fused:
                del encoder.together


class Captured:
    """A function of tensors whose kernels are the same at every call, launched as one CUDA graph.

    Its results are overwritten by the next call. Where CUDA refuses to capture it, say because a backbone looks at values,
    it is called as it is.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        say: Callable[[str], None] = lambda _: None,
        draws: torch.Generator | None = None,
    ) -> None:
        self._function, self._say, self._draws = function, say, draws
        self._warm, self._refused = 0, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()

    def takes(self, *inputs: Tensor) -> bool:
        """False where the captured inputs are of another shape."""
        return not self._inputs or [each.shape for each in inputs] == [own.shape for own in self._inputs]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._graph is None and self._warm < _WARM:
            self._warm += 1
            return self._beside(*inputs)
        if self._graph is None and not self._refused:
            self._capture(inputs)
        if self._graph is None:
            return self._function(*inputs)
        assert self.takes(*inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._outputs

    def _beside(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """On a stream of its own, as the capture will be: autograd keeps the stream of a weight's first use."""
        device = inputs[0].device
        main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            results = self._function(*inputs)
        main.wait_stream(side)
        return results

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        device = inputs[0].device
        main = torch.cuda.current_stream(device)
        own = tuple(torch.empty_like(each).copy_(each) for each in inputs)
        graph = torch.cuda.CUDAGraph()
        if self._draws is not None and hasattr(graph, "register_generator_state"):
            with warnings.catch_warnings():  # of torch 2.14, whose graphs find their generators themselves
                warnings.simplefilter("ignore")
                graph.register_generator_state(self._draws)
        with torch.cuda.device(device):  # a graph holds what is launched on its own stream, which is of one device
            try:
                # Of this thread alone: others decode and read ahead meanwhile.
                with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
                    self._outputs = self._function(*own)
            except RuntimeError as error:
                torch.cuda.set_stream(main)  # torch leaves that of the capture in place
                self._free_generators(device)
                if out_of_memory(error):
                    raise
                self._refused = True
                reason = str(error).splitlines()[0][:100]
                self._say(f"No CUDA graph of this step can be made ({reason}): it runs slower.")
            else:
                self._graph, self._inputs = graph, own

    def _free_generators(self, device: torch.device) -> None:
        """A capture that failed leaves them waiting for its end, up to torch 2.11: the next draw would be refused."""
        for draws in (torch.cuda.default_generators[device.index or 0], self._draws):
            if draws is not None:
                draws.graphsafe_set_state(draws.clone_state())
