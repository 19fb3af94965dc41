"""The training step: views, forward, loss, backward, optimiser. On a GPU its kernels are launched as CUDA graphs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from simsiam import ranks
from simsiam.compute import Compute, out_of_memory, seed_of
from simsiam.data.loader import Batch
from simsiam.data.views import ViewSettings, random_views
from simsiam.encoders import Encoder
from simsiam.heads import Siamese
from simsiam.kernels import Images

_WARM = 3
"""Calls before a capture, during which libraries initialise and constants are sent to the device."""


class Step:
    """Performs one training step on a batch.

    A step is a thousand operations, many of a few microseconds: launched one by one, they leave a GPU waiting for the
    CPU. Captured once as CUDA graphs, they are launched together, with the same results.

    Args:
        optimizer: None to leave the weights unchanged.
        captures: whether to use CUDA graphs; None: on a GPU, in a single process. A method can forbid it
            (`Siamese.fixed`).
        compiles: whether to compile the encoder, which fuses BN, ReLU and shortcut.
        say: called once if no graph can be captured.
    """

    def __init__(
        self,
        method: Siamese,
        optimizer: torch.optim.Optimizer | None,
        views: list[ViewSettings],
        compute: Compute,
        captures: bool | None = None,
        compiles: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.method, self.optimizer, self.compute = method, optimizer, compute
        self._forward, self._settings = ranks.data_parallel(method, method.sync_bn), views
        self._parameters = list(method.parameters())
        self._draws = torch.Generator(compute.device)
        self.encoders = [module for module in method.modules() if isinstance(module, Encoder)]
        self._fused: dict[Encoder, Callable[[list[Tensor]], Sequence[Tensor]]] = {}
        if compiles:
            self._fused = {encoder: torch.compile(encoder.together, dynamic=False) for encoder in self.encoders}
        if captures is None:
            captures = compute.device.type == "cuda" and not ranks.is_distributed()
        self._drawn = Captured(self._draw, say, self._draws) if captures else None
        self._differentiated = Captured(self._differentiate, say) if captures else None

    def __call__(self, batch: Batch, *key: int) -> tuple[Tensor, Tensor]:
        """Return loss and std, scalars still on the device. Random numbers are a function of the key and the rank."""
        views = self.views(batch, *key)
        torch.manual_seed(seed_of(*key, -1, *ranks.rank_key()))  # for dropout
        return self.update(views, batch.index)

    def update(self, views: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """Perform the step on the given views."""
        captured = self._differentiated if self.method.fixed else None
        loss, std = (captured or self._differentiate)(*views, index)
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.clone(), std.clone()

    def views(self, batch: Batch, *key: int) -> tuple[Tensor, ...]:
        """Return a view for every setting: float32 [B,3,size,size], normalised."""
        self._draws.manual_seed(seed_of(*key, *ranks.rank_key()))
        images, whole = batch.images, batch.sizes is None
        if whole and isinstance(images, Tensor) and self._drawn is not None and self._drawn.takes(images):
            return self._drawn(images)
        return self._draw(images, batch.sizes)

    def _draw(self, images: Images, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        return random_views(images, self._settings, self._draws, sizes)

    def _differentiate(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *views, index = inputs
        for parameter in self._parameters:  # zero_grad() looks for them each time: 1 % of a step on a CPU
            parameter.grad = None
        with self.compute.autocast(), self._compiled():
            loss, stats = self._forward(views, index)
        loss.backward()
        return loss.detach(), stats["std"].detach()

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        """Use the compiled encoders only in here: other code runs them in other modes or sizes, uncompiled."""
        for encoder, fused in self._fused.items():
            encoder.together = fused  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            for encoder in self._fused:
                del encoder.together


class Captured:
    """A function of tensors that launches the same kernels at every call, replayed as one CUDA graph.

    The next call overwrites its results. If CUDA refuses the capture, for example because a backbone inspects values,
    the function is called directly.
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
        """Whether the inputs have the shapes of the captured ones; True before the capture."""
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
        """Run on a side stream, as the capture does: autograd keeps the stream of a weight's first use."""
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
            with warnings.catch_warnings():  # torch 2.14 warns: its graphs find generators themselves
                warnings.simplefilter("ignore")
                graph.register_generator_state(self._draws)
        with torch.cuda.device(device):  # a graph records one stream, which belongs to one device
            try:
                # thread_local: other threads decode and read ahead meanwhile.
                with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
                    self._outputs = self._function(*own)
            except RuntimeError as error:
                torch.cuda.set_stream(main)  # torch leaves the capture's stream in place
                self._free_generators(device)
                if out_of_memory(error):
                    raise
                self._refused = True
                reason = str(error).splitlines()[0][:100]
                self._say(f"No CUDA graph of the training step could be captured ({reason}): training will be slower.")
            else:
                self._graph, self._inputs = graph, own

    def _free_generators(self, device: torch.device) -> None:
        """Release the generators: up to torch 2.11 a failed capture leaves them waiting for its end, and the next draw
        would fail."""
        for draws in (torch.cuda.default_generators[device.index or 0], self._draws):
            if draws is not None:
                draws.graphsafe_set_state(draws.clone_state())
